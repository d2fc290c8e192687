"""How a conversation is written down for an LLM: the registered templates.

A template says which text surrounds a question and an answer, what ends an answer, and where
images go. Configs choose one by name (``template="v1"``), or by ``dict(type="chatml",
system="...")`` where a template takes arguments. A new template is a registered function that
returns a :class:`Template`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from covft.registry import TEMPLATES

#: Stands for one image in the text of a turn.
IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Template:
    """The text around questions and answers.

    The answers' lead, text and terminator are supervised, nothing else is.

    Attributes:
        name: The registered name.
        system: Text at the very start, its separator included.
        before_question: Text before every question.
        after_question: Text after every question, up to where the model takes over.
        answer_lead: Text between that place and the answer; the model produces it itself. An empty
            answer has none, so that its terminator alone is supervised.
        terminator: Ends an answer; None means the tokenizer's own end-of-sequence token.
        after_answer: Text after the terminator that no model has to produce.
        image_prefix: Text before every image.
        image_suffix: Text after every image.
        image_separator: Put between an image and the question that it's moved in front of.
        image_first: A lone image moves to the front of its turn. Where a sample has several, their
            places carry meaning and stay.
        strip: Remove white space around questions and answers.
        keep_questions: False drops the questions and leaves their images (captioning).
        added_tokens: Markup that the tokenizer must have as tokens of its own: in pieces, the model
            would read it as text.
        tokenizer_source: A published tokenizer that has them, for the error where they are missing.
    """

    name: str
    system: str = ""
    before_question: str = ""
    after_question: str = ""
    answer_lead: str = ""
    terminator: str | None = None
    after_answer: str = ""
    image_prefix: str = ""
    image_suffix: str = ""
    image_separator: str = "\n"
    image_first: bool = False
    strip: bool = True
    keep_questions: bool = True
    added_tokens: tuple[str, ...] = ()
    tokenizer_source: str = ""

    def end_of_answer(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text that ends an answer.

        Raises:
            ValueError: If it's the tokenizer's end-of-sequence token and there is none.
        """
        if self.terminator is not None:
            return self.terminator
        if not tokenizer.eos_token:
            raise ValueError(
                f"template '{self.name}' ends answers by the tokenizer's eos_token, but this "
                f"{type(tokenizer).__name__} has none; choose another template or set eos_token"
            )
        return str(tokenizer.eos_token)

    def check_added_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a tokenizer has the template's markup.

        Raises:
            ValueError: If it lacks some of ``added_tokens``.
        """
        known = tokenizer.get_added_vocab() if self.added_tokens else {}
        missing = [token for token in self.added_tokens if token not in known]
        if missing:
            raise ValueError(
                f"template '{self.name}' writes {', '.join(missing)}, which this "
                f"{type(tokenizer).__name__} has no tokens for; set model.llm.tokenizer to one "
                f"that has them, such as '{self.tokenizer_source}' (or add them by add_tokens(..., "
                "special_tokens=True), save_pretrained, and set that folder)"
            )

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids at which generation ends: the terminator's, and end-of-sequence.

        Raises:
            ValueError: If the tokenizer writes the terminator as several tokens: such a model could
                neither be stopped nor was trained to stop.
        """
        end = self.end_of_answer(tokenizer)
        encoded = tokenizer("a" + end, add_special_tokens=False, return_offsets_mapping=True)
        last = tuple(encoded["offset_mapping"][-1])
        if last != (1, 1 + len(end)):
            found = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
            raise ValueError(
                f"template '{self.name}' ends answers by {end!r}, which is no single token of this "
                f"tokenizer ('a{end}' gives {found}); choose a template that fits the LLM, 'qa' "
                "takes the tokenizer's own end-of-sequence token"
            )
        ids = [encoded["input_ids"][-1], tokenizer.eos_token_id]
        return list(dict.fromkeys(i for i in ids if i is not None))


def get_template(template: str | Mapping[str, Any] | Template) -> Template:
    """Return a template by its registered name or by ``dict(type=name, **arguments)``.

    Raises:
        ValueError: If the name is unknown (the nearest known one is named) or an argument is.
    """
    if isinstance(template, Template):
        return template
    cfg = {"type": template} if isinstance(template, str) else template
    built: Template = TEMPLATES.build(cfg)
    return built


@TEMPLATES.register_module(name="v1")
def v1() -> Template:
    """Vicuna v1 as in LLaVA-1.5 (Liu et al., 2024): ``SYS USER: q ASSISTANT: a</s>USER: …``."""
    return Template(
        name="v1",
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
        ),
        before_question="USER: ",
        after_question=" ASSISTANT:",
        answer_lead=" ",
        terminator="</s>",
        image_first=True,
        strip=False,
    )


@TEMPLATES.register_module(name="plain")
def plain() -> Template:
    r"""Captions, for training the projector (LLaVA-1.5, stage 1): ``<image>caption\n``."""
    return Template(
        name="plain", terminator="\n", image_separator="", strip=False, keep_questions=False
    )


INTERNVL2_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


@TEMPLATES.register_module(name="phi3-chat")
def phi3_chat(system: str = INTERNVL2_SYSTEM, image_marks: bool = True) -> Template:
    """Phi-3 as in InternVL2-4B (Chen et al., 2024), with its system prompt and image markup.

    There is no line break after ``<|end|>``; images stay where the question has them, all tiles of
    one between a single pair of marks. Phi-3's own tokenizer lacks the marks; InternVL2-4B's is
    Phi-3's with them added, in rows that Phi-3's embeddings have to spare.

    Args:
        system: The system prompt; empty for none.
        image_marks: Whether ``<img>`` and ``</img>`` stand around an image's tokens. False goes
            with Phi-3's own tokenizer.
    """
    marks = ("<img>", "</img>") if image_marks else ("", "")
    return Template(
        name="phi3-chat",
        system=f"<|system|>\n{system}<|end|>" if system else "",
        before_question="<|user|>\n",
        after_question="<|end|><|assistant|>\n",
        terminator="<|end|>",
        image_prefix=marks[0],
        image_suffix=marks[1],
        added_tokens=marks if image_marks else (),
        tokenizer_source="OpenGVLab/InternVL2-4B",
    )


@TEMPLATES.register_module(name="chatml")
def chatml(system: str = "You are a helpful assistant.") -> Template:
    """ChatML, the format of Qwen and SmolLM2.

    Args:
        system: The system prompt; empty for none.
    """
    return Template(
        name="chatml",
        system=f"<|im_start|>system\n{system}<|im_end|>\n" if system else "",
        before_question="<|im_start|>user\n",
        after_question="<|im_end|>\n<|im_start|>assistant\n",
        terminator="<|im_end|>",
        after_answer="\n",
        image_first=True,
    )


@TEMPLATES.register_module(name="qa")
def qa() -> Template:
    """Question, space, answer, end-of-sequence token: as few tokens as can be."""
    return Template(name="qa", answer_lead=" ", image_separator="", image_first=True)
