"""Our conversation templates as transformers' chat templates (Jinja)."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from covft.conversation import IMAGE_TOKEN, Template

_JINJA = """\
{{- SYSTEM -}}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is string -%}
{%- set content = [{'type': 'text', 'text': content}] -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set count = content | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set moved = IMAGE_FIRST and count == 1 -%}
{%- set turn = namespace(text='', front='') -%}
{%- for item in content -%}
{%- if item['type'] != 'image' -%}
{%- set turn.text = turn.text + (item['text'] if KEEP else '') -%}
{%- elif moved or turn.text == '' -%}
{%- set turn.front = turn.front + IMAGE + SEPARATOR -%}
{%- else -%}
{%- set turn.text = turn.text + IMAGE -%}
{%- endif -%}
{%- endfor -%}
{%- set question = turn.front + (turn.text.strip() if moved else turn.text) -%}
{%- set question = question.rstrip() if turn.front else question -%}
{%- set question = question.strip() if STRIP else question -%}
{{- BEFORE + question + AFTER -}}
{%- elif message['role'] == 'assistant' -%}
{%- set turn = namespace(text='') -%}
{%- for item in content -%}{%- set turn.text = turn.text + item['text'] -%}{%- endfor -%}
{%- set answer = turn.text.strip() if STRIP else turn.text -%}
{{- (LEAD + answer if answer else '') + END + AFTER_ANSWER -}}
{%- else -%}
{{- raise_exception('this model was trained with one system prompt, which is added by itself') -}}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template that writes conversations as a model was trained on them.

    There is nothing to add for generation: a question's end is where the model takes over.

    Args:
        template: Ours.
        tokenizer: The LLM's, with ``<image>`` as a token.
    """
    suffix = template.image_suffix or _gap(template, tokenizer)
    values = {
        "SYSTEM": template.system,
        "BEFORE": template.before_question,
        "AFTER": template.after_question,
        "LEAD": template.answer_lead,
        "END": template.end_of_answer(tokenizer),
        "AFTER_ANSWER": template.after_answer,
        "IMAGE": template.image_prefix + IMAGE_TOKEN + suffix,
        "SEPARATOR": template.image_separator,
        "IMAGE_FIRST": template.image_first,
        "STRIP": template.strip,
        "KEEP": template.keep_questions,
    }
    # Jinja reads the escapes of Python's ASCII literals.
    settings = "".join(
        f"{{%- set {name} = {ascii(value) if isinstance(value, str) else str(value).lower()} -%}}\n"
        for name, value in values.items()
    )
    return settings + _JINJA


def _gap(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what has to stand after ``<image>`` so that the text's ids are those of training.

    Training tokenises what follows an image by itself, as LLaVA's code does. SentencePiece then
    puts a space before it, but not after a token within a text unless it is a "legacy" one.
    """
    after = f"{template.image_separator}What"
    alone = list(tokenizer(after, add_special_tokens=False)["input_ids"])
    for gap in ("", " "):
        text = f"{IMAGE_TOKEN}{gap}{after}"
        if list(tokenizer(text, add_special_tokens=False)["input_ids"])[1:] == alone:
            return gap
    return ""
