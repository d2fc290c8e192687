"""Miniature MLLMs of transformers, ours of the same architecture, and the public names by hand."""

import re
from functools import cache

import torch
from safetensors.torch import save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from covft.models import MLLM

VOCABULARY, IMAGE_ID, DEPTH, TEXT_WIDTH = 90, 90, 3, 24
LLAMA = dict(
    model_type="llama",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
ENCODER = dict(hidden_dim=32, depth=DEPTH, num_heads=4, mlp_dim=64, patch_size=8, image_size=32)
HF_VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4
)
BERT = dict(
    model_type="bert",
    hidden_size=TEXT_WIDTH,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=60,
)


def randomise(module, *, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.05)


@cache
def hf_llava() -> LlavaForConditionalGeneration:
    """A LLaVA with three tokens that the LLM's own vocabulary doesn't have, image token first."""
    text = {**LLAMA, "vocab_size": VOCABULARY + 3}
    vision = dict(model_type="clip_vision_model", image_size=32, patch_size=8, **HF_VISION)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID)
    return _random(LlavaForConditionalGeneration, config)


@cache
def hf_internvl() -> InternVLForConditionalGeneration:
    text = {**LLAMA, "vocab_size": VOCABULARY + 1}
    vision = dict(
        model_type="internvl_vision",
        image_size=[32, 32],
        patch_size=[8, 8],
        attention_bias=True,
        use_mean_pooling=True,
        **HF_VISION,
    )
    config = InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_ID, tie_word_embeddings=False
    )
    return _random(InternVLForConditionalGeneration, config)


def _random(kind, config):
    config._attn_implementation = "sdpa"
    model = kind(config).eval()
    randomise(model)
    return model


def our_llava(*, vft=None, seed: int = 0, encoder=None, llm=None, text=None, **projector) -> MLLM:
    torch.manual_seed(seed)
    return MLLM(
        vision=dict(
            backbone=encoder or dict(type="CLIP", arch=ENCODER), vft=vft or dict(type="Full")
        ),
        projector={"type": "MLPProjector", **projector},
        llm=dict(type="CausalLM", arch={**LLAMA, **(llm or {})}),
        text_encoder=dict(type="TextEncoder", arch={**BERT, **(text or {})}),
    ).eval()


def our_internvl(*, seed: int = 0, vocabulary: int = VOCABULARY + 1) -> MLLM:
    encoder = dict(type="InternViT", arch=ENCODER)
    llm = dict(vocab_size=vocabulary)
    return our_llava(seed=seed, encoder=encoder, llm=llm, type="PixelShuffleProjector")


def random_llava(**options) -> MLLM:
    """Return our model with every parameter random, frozen ones and buffers too."""
    model = our_llava(**options)
    randomise(model, seed=3)
    return model


def save(folder, tensors, *, name: str = "model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value.clone().contiguous() for key, value in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(plain, folder / name)
    else:
        torch.save(plain, folder / name)
    return folder


def rename(tensors, *rules):
    """Rename by regular expressions; each name has to match exactly one of them."""
    renamed = {}
    for name, tensor in tensors.items():
        hits = [re.sub(old, new, name) for old, new in rules if re.match(old, name)]
        assert len(hits) == 1, (name, hits)
        renamed[hits[0]] = tensor
    return renamed


def llava_files(vocabulary: int = VOCABULARY):
    """The miniature LLaVA as the public layouts have it, by the names transformers 5 has."""
    state = hf_llava().state_dict()
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        state[name] = state[name][:vocabulary]
    vision, llm, head = r"model\.vision_tower\.", r"model\.language_model\.", r"lm_head\."
    first, second = (rf"model\.multi_modal_projector\.linear_{n}\." for n in (1, 2))
    llava = rename(
        state,
        (vision, "model.vision_tower.vision_tower.vision_model."),
        (first, "model.mm_projector.0."),
        (second, "model.mm_projector.2."),
        (llm, "model."),
        (head, "lm_head."),
    )
    xtuner = rename(
        state,
        (vision, "visual_encoder.vision_model."),
        (first, "projector.model.0."),
        (second, "projector.model.2."),
        (llm, "llm.model."),
        (head, "llm.lm_head."),
    )
    hub = rename(
        state,
        (vision, "vision_tower.vision_model."),
        (first, "multi_modal_projector.linear_1."),
        (second, "multi_modal_projector.linear_2."),
        (llm, "language_model.model."),
        (head, "language_model.lm_head."),
    )
    projector = {name: tensor for name, tensor in llava.items() if "mm_projector" in name}
    return {
        "llava": llava,
        "hf-llava": hub,
        "in-memory": state,
        "xtuner": xtuner,
        "mm_projector": projector,
    }


def internvl_files():
    """The miniature InternVL as transformers' and OpenGVLab's files have it."""
    state = hf_internvl().state_dict()
    state.pop("model.vision_tower.embeddings.mask_token", None)
    projector = r"model\.multi_modal_projector\."
    hub = rename(
        state,
        (r"model\.vision_tower\.", "vision_tower."),
        (projector, "multi_modal_projector."),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    layer = r"model\.vision_tower\.encoder\.layer\.(\d+)\."
    their_layer = r"vision_model.encoder.layers.\1."
    embeddings = r"model\.vision_tower\.embeddings\."
    public = rename(
        _fused(state),
        (embeddings + "cls_token", "vision_model.embeddings.class_embedding"),
        (embeddings + r"patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
        (embeddings + "position_embeddings", "vision_model.embeddings.position_embedding"),
        (layer + r"attention\.qkv", their_layer + "attn.qkv"),
        (layer + r"attention\.projection_layer", their_layer + "attn.proj"),
        (layer + "layernorm_before", their_layer + "norm1"),
        (layer + "layernorm_after", their_layer + "norm2"),
        (layer + "lambda_", their_layer + "ls"),
        (layer + "mlp", their_layer + "mlp"),
        (projector + "layer_norm", "mlp1.0"),
        (projector + "linear_1", "mlp1.1"),
        (projector + "linear_2", "mlp1.3"),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    return {"hf-internvl": hub, "internvl2": public, "in-memory": state}


def _fused(state):
    fused = {}
    for name, tensor in state.items():
        if "vision_tower" in name and "attention.q_proj" in name:
            parts = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            fused[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif "vision_tower" not in name or not re.search(r"attention\.[kv]_proj", name):
            fused[name] = tensor
    return fused
