"""An exported model, as transformers loads and calls it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from covft.checkpoints.export.shipped.configuration_covft import CoVFTConfig
from covft.conversation import IGNORE_INDEX
from covft.models.mllm import MLLM
from covft.models.vision.tower import VisionTower


class CoVFTForConditionalGeneration(PreTrainedModel):
    """A multimodal LLM whose vision encoder may read the instruction.

    The inputs are those that the folder's processor gives::

        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        inputs = processor(text="What is it?", images=image)
        processor.batch_decode(model.generate(**inputs, max_new_tokens=64))

    Args:
        config: What the model is built from.
    """

    config_class = CoVFTConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")

    def __init__(self, config: CoVFTConfig) -> None:
        super().__init__(config)
        self.mllm = MLLM(**config.model)
        self.post_init()
        # transformers looks for these in direct children only.
        for name, module in self.named_modules():
            if module is not self and isinstance(module, PreTrainedModel):
                for target, source in module.all_tied_weights_keys.items():
                    self.all_tied_weights_keys[f"{name}.{target}"] = f"{name}.{source}"

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's token embeddings."""
        return self.mllm.llm.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the LLM's output layer."""
        return self.mllm.llm.model.get_output_embeddings()

    def can_generate(self) -> bool:
        """Return that :meth:`generate` works: transformers then loads generation_config.json."""
        return True

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **inputs: Any
    ) -> CausalLMOutput:
        """Return the logits at every position, and the mean loss if there are labels.

        Args:
            input_ids: Token ids, the processor's id for visual tokens at those, (B, T).
            attention_mask: True at real positions, (B, T); padding is on the right.
            labels: Token ids at supervised positions, -100 elsewhere, (B, T).
            inputs: The processor's further outputs, see :meth:`covft.models.MLLM.forward`.
        """
        embeds = self.mllm.embeddings(input_ids, **inputs)
        logits = self.mllm.llm.logits(self.mllm.llm.hidden_states(embeds, attention_mask))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE_INDEX,
            )
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """Continue prompts, greedily unless the arguments say otherwise.

        Args:
            input_ids: See :meth:`forward`.
            attention_mask: See :meth:`forward`.
            kwargs: The processor's further outputs, and arguments of transformers' ``generate``.

        Returns:
            New token ids, (B, T'); shorter answers are filled up by the padding id.
        """
        stops = kwargs.pop("eos_token_id", self.generation_config.eos_token_id)
        stops = [stops] if isinstance(stops, int) else list(stops or [])
        rows = self.mllm.generate(
            input_ids=input_ids, attention_mask=attention_mask, eos_token_id=stops, **kwargs
        )
        pad, length = self.generation_config.pad_token_id or 0, max(map(len, rows), default=0)
        padded = [row + [pad] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=input_ids.device).view(-1, length)

    def _init_weights(self, module: nn.Module) -> None:
        # Weights come from the folder. What isn't stored there, the pixels' mean and deviation, is
        # lost when transformers builds the model without memory.
        if isinstance(module, VisionTower):
            module._reset_buffers()
