"""Names of special tokens that stand in somebody's text, read as the text they are.

A question about HTML may hold ``</s>`` or ``<img>``, an answer about chat formats ``<|im_end|>``.
Tokenised as it stands, it would become the token that ends an answer: a model would be trained to
stop in the middle of a sentence, and a user could end his turn and write the assistant's. Only the
template's own markup means the special tokens. LLaVA's and InternVL's preprocessing don't tell the
two apart; their ids differ from these in such texts, and in no others.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

# Unicode reserves these two for a program's inner use; no text may hold them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def special_names(tokenizer: PreTrainedTokenizerBase, markup: Iterable[str]) -> frozenset[str]:
    """Return the names that mean something to the LLM beyond their text.

    Args:
        tokenizer: The LLM's; its special tokens count.
        markup: A template's texts; tokens in them count too where the tokenizer, as some do,
            doesn't call them special. Other added tokens (runs of spaces, say) are ordinary words.
    """
    written = tuple(markup)
    return frozenset(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content.strip() and any(token.content in text for text in written))
    )


class LiteralTokenizer:
    """A copy of a tokenizer that knows the special tokens by other names only.

    Args:
        tokenizer: A fast tokenizer; it isn't changed.
        names: Of the special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: frozenset[str]) -> None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["content"] in names
        self._tokenizer = Tokenizer.from_str(json.dumps(content))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._aliases: dict[str, str] = {}
        self._ids: dict[int, int] = {}
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token.content in names:
                self._add_alias(token_id, token)
        longest_first = sorted(self._aliases, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)))

    def markup(self, text: str) -> str:
        """Return markup with its special tokens under the names that mean them here."""
        return self._names.sub(lambda match: self._aliases[match[0]], text)

    def literal(self, text: str) -> str:
        """Return somebody's text, in which no name means a token.

        Raises:
            ValueError: If it holds the character by which markup is told apart.
        """
        if _OPEN in text:
            raise ValueError(
                f"the text holds U+{ord(_OPEN):04X}, which Unicode reserves for programs' inner "
                "use, and a special token's name; remove that character"
            )
        return text

    def tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids of the original tokenizer and character offsets, each (T,).

        Args:
            text: Made of what :meth:`markup` and :meth:`literal` return.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [self._ids.get(i, i) for i in encoding.ids], encoding.offsets

    def _add_alias(self, token_id: int, token: AddedToken) -> None:
        alias = f"{_OPEN}{len(self._aliases)}{_CLOSE}"
        # The same white space is swallowed; not special, so that it's found all the same.
        self._tokenizer.add_tokens(
            [
                AddedToken(
                    alias,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
            ]
        )
        self._aliases[token.content] = alias
        alias_id = self._tokenizer.token_to_id(alias)
        assert alias_id is not None
        self._ids[alias_id] = token_id


_Known = dict[frozenset[str], LiteralTokenizer]
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _Known] = weakref.WeakKeyDictionary()


def literal_tokenizer(
    tokenizer: PreTrainedTokenizerBase, names: frozenset[str]
) -> LiteralTokenizer:
    """Return the copy for a tokenizer and names; made once, since it takes a second or two."""
    known = _known.setdefault(tokenizer, {})
    if names not in known:
        known[names] = LiteralTokenizer(tokenizer, names)
    return known[names]
