"""Small tokenizers trained on the spot, one per family that the templates are written for."""

import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TEXT = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: what color is the shape? ASSISTANT: blue",
    "Is there a red circle in the image? yes no 0 1 2 3 4 5 6 7 8 9",
] * 20


@lru_cache
def sentencepiece_model() -> Path:
    """Sentencepiece BPE with byte fallback, as Llama's; the model file."""
    path = Path(tempfile.mkdtemp()) / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return path


@lru_cache
def llama_tokenizer(*, legacy: bool = True) -> PreTrainedTokenizerBase:
    """The Llama kind, which puts a BOS token and a space before a text.

    Args:
        legacy: Put the space behind special tokens, too.
    """
    return _llama(legacy)


@lru_cache
def phi3_tokenizer(*, legacy: bool = False) -> PreTrainedTokenizerBase:
    """The Llama kind with Phi-3's role tokens, which swallow the white space to their right."""
    tokenizer = _llama(legacy)
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(r, rstrip=True, normalized=False) for r in roles], True)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<img>", "</img>")], True)
    return tokenizer


def _llama(legacy: bool) -> PreTrainedTokenizerBase:
    # A folder with the model: of a file alone the class makes a vocabulary of three, and what
    # save_pretrained writes has lost ``legacy``.
    folder = Path(tempfile.mkdtemp())
    shutil.copy(sentencepiece_model(), folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return LlamaTokenizer.from_pretrained(folder)


@lru_cache
def byte_level_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE as SmolLM2's: a BOS token is named, but never put."""
    return _byte_level(
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )


@lru_cache
def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE split as Qwen2's, where line breaks stick to the white space before them."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _byte_level(
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


def _byte_level(*splits: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )


@lru_cache
def bert_tokenizer() -> PreTrainedTokenizerBase:
    """WordPiece with [CLS] and [SEP], as text encoders have it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
