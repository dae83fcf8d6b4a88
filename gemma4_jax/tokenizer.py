"""`Tokenizer`: text to token ids and back, with the special tokens known by their roles."""

import functools
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
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_with_special_tokens"}

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
        return _encode(self._tokenizer, text).ids

    def encode_with_offsets(self, text: str, *, reads_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text that stands for itself, such as a rendered chat, and the characters each was made of.

        Args:
          text: any string; nothing is added.
          reads_special_tokens: whether the name of a special token is that token, or plain characters.
        Returns:
          (ids, for each its [start, stop) in the text).
        Raises:
          InputError: as in `encode`.
        """
        encoding = _encode(self._with_special_tokens if reads_special_tokens else self._tokenizer, text)
        return encoding.ids, encoding.offsets

    @functools.cached_property
    def _with_special_tokens(self) -> tokenizers.Tokenizer:
        # A tokenizer of its own: the setting belongs to the object, which other threads use.
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens by name; ids outside the vocabulary are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """How the vocabulary writes one token; empty for an id outside it."""
        return self._tokenizer.id_to_token(token_id) or ""


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError as error:  # the library's for what has no UTF-8 form
        raise InputError(f"a text must be a string without lone surrogates, and one is {text!r:.100}.") from error
