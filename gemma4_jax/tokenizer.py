"""`Tokenizer`: text to token ids and back, with the special tokens known by their roles."""

import functools
import itertools
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers

from gemma4_jax.config import SpecialTokens
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path, refuse_lfs_pointer

BUNDLED = "bundled"
"""The name of the tokenizer of 1,024 tokens that is shipped in this package."""

ROLES = {
    "pad": "<pad>",
    "eos": "<eos>",
    "bos": "<bos>",
    "begin_image": "<|image>",
    "image": "<|image|>",
    "end_image": "<image|>",
    "begin_audio": "<|audio>",
    "audio": "<|audio|>",
    "end_audio": "<audio|>",
    "video": "<|video|>",
}
"""How Gemma 4 writes each special token that has a role in this package."""

NAMES = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "escape_token": '<|"|>',
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
}
"""What the reference calls Gemma 4's special tokens, those of the chat format included, which a vocabulary may lack."""


_BYTE = re.compile("<0x([0-9A-F]{2})>")
_UNKNOWN_LENGTH = 1 << 30


class Tokenizer:
    """A tokenizer.json in which every special token of Gemma 4 has an id.

    Attributes:
      path: the file it was read from.
      vocab_size: one more than the largest token id.
      tokens: ids of the special tokens by role.
      special_tokens: every special token of the vocabulary, as it is written -> its id. Those of `ROLES` and `NAMES`
        are special whatever the file says of them.
      other_tokens: how the other tokens that were added to the vocabulary are written, such as line breaks and tags.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads a tokenizer.json.

        Raises:
          InputError: if the file cannot be read, or lacks a special token.
        """
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
            refuse_lfs_pointer(self.path, content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise InputError(f"tokenizer={str(path)!r} cannot be read as a tokenizer.json file: {error}.") from error
        vocab = self._tokenizer.get_vocab()
        if missing := [token for token in ROLES.values() if token not in vocab]:
            raise InputError(f"tokenizer={str(path)!r} lacks the special tokens {', '.join(missing)} of Gemma 4.")
        self.vocab_size = max(vocab.values()) + 1
        self.tokens = SpecialTokens(**{role: vocab[token] for role, token in ROLES.items()})
        self._tokenizer.add_special_tokens(sorted(vocab.keys() & {*ROLES.values(), *NAMES.values()}))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        self.other_tokens = [token.content for token in added.values() if not token.special]
        self._replaced = _take_normalizer(self._tokenizer)
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in self.__dict__.items() if name not in ("_with_special_tokens", "_lengths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Text from data is only text: "<eos>" in a document must not end it. Pickling forgets this setting.
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def load(cls, name: str) -> "Tokenizer":
        """The tokenizer shipped in this package, for "bundled", or the one in a tokenizer.json or its folder."""
        if name == BUNDLED:
            return cls(str(resources.files("gemma4_jax.data") / "bundled" / "tokenizer.json"))
        path = local_path(name)
        return cls(path / "tokenizer.json" if path.is_dir() else path)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; nothing is added, and names of special tokens are plain characters.

        Raises:
          InputError: the text holds a lone surrogate, half of a character.
        """
        return self._encode(self._tokenizer, text)

    def encode_with_ends(self, text: str, *, reads_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Token ids of a text that stands for itself, such as a rendered chat, and where each of them ends.

        Args:
          text: any string; nothing is added.
          reads_special_tokens: whether the name of a special token is that token, or plain characters.
        Returns:
          (ids, for each the number of characters of the text up to its end, ascending). The bytes of one character,
          where each is a token, end together.
        Raises:
          InputError: as in `encode`.
        """
        tokenizer = self._with_special_tokens if reads_special_tokens else self._tokenizer
        ids = self._encode(tokenizer, text)
        ends = list(itertools.accumulate(map(self._lengths.__getitem__, ids)))
        if ids and ends[-1] != len(text):  # some tokens are not as long as they are written
            encoding = tokenizer.encode(self._normalize(text), add_special_tokens=False)
            ends = [stop for _, stop in encoding.offsets]
        return ids, ends

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        try:  # in two thirds of the time of the library's `encode`
            return tokenizer.encode_batch_fast([self._normalize(text)], add_special_tokens=False)[0].ids
        except TypeError as error:  # the library's for what has no UTF-8 form
            raise InputError(f"a text must be a string without lone surrogates, and one is {text!r:.100}.") from error

    def _normalize(self, text: str) -> str:
        return text if self._replaced is None else str.replace(text, *self._replaced)

    @functools.cached_property
    def _with_special_tokens(self) -> tokenizers.Tokenizer:
        # A tokenizer of its own: the setting belongs to the object, which other threads use.
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    @functools.cached_property
    def _lengths(self) -> list[int]:
        """Characters of a text for which each token stands, by its id; of one that may stand for any, far too many.

        So offsets need not be asked of the library, which takes half as long again for them.
        """
        normalizer = self._tokenizer.normalizer
        keeps_lengths = normalizer is None or _replaced_by(normalizer) is not None
        lengths = [_UNKNOWN_LENGTH] * self.vocab_size
        for token, token_id in self._tokenizer.get_vocab().items() if keeps_lengths else ():
            byte = _BYTE.fullmatch(token)
            # Of the bytes of a character the first stands for it.
            lengths[token_id] = int(int(byte[1], 16) & 0xC0 != 0x80) if byte else len(token)
        if (unknown := self._tokenizer.token_to_id(NAMES["unk_token"])) is not None:
            lengths[unknown] = _UNKNOWN_LENGTH
        return lengths

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens by name; ids outside the vocabulary are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """How the vocabulary writes one token; empty for an id outside it."""
        return self._tokenizer.id_to_token(token_id) or ""


def _take_normalizer(tokenizer: tokenizers.Tokenizer) -> tuple[str, str] | None:
    """Takes the normalizer away from a tokenizer if `str.replace` does the same, and returns the arguments for it.

    Gemma 4's writes "▁" for " ", to which the library gives a fifth of its time. The library looks for added tokens
    first: it is only the same where none of them has to do with the two characters, or with what stands beside it.
    """
    replaced = None if tokenizer.normalizer is None else _replaced_by(tokenizer.normalizer)
    if replaced is None or any(
        token.lstrip or token.rstrip or token.single_word or not set(replaced).isdisjoint(token.content)
        for token in tokenizer.get_added_tokens_decoder().values()
    ):
        return None
    tokenizer.normalizer = None
    if tokenizer.pre_tokenizer is not None:
        step = json.loads(tokenizer.pre_tokenizer.__getstate__())
        if step["type"] == "Split" and step["pattern"] == {"String": replaced[0]} and not step["invert"]:
            tokenizer.pre_tokenizer = None  # there is nothing left at which to split
    return replaced


def _replaced_by(normalizer: Any) -> tuple[str, str] | None:
    """(a character, another) if a normalizer of the library does nothing but replace the one by the other."""
    step = json.loads(normalizer.__getstate__())
    old = step["pattern"].get("String") if step["type"] == "Replace" else None  # else a regular expression
    return (old, step["content"]) if old and len(old) == len(step["content"]) == 1 and old != step["content"] else None
