"""`Tokenizer`: text to token ids and back, with the special tokens known by their roles."""

from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers

from gemma4_jax.config import SpecialTokens
from gemma4_jax.errors import InputError

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


class Tokenizer:
    """A tokenizer.json in which every special token of Gemma 4 has an id.

    Attributes:
      path: the file it was read from.
      vocab_size: one more than the largest token id.
      tokens: ids of the special tokens by role.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads a tokenizer.json.

        Raises:
          InputError: if the file cannot be read, or lacks a special token.
        """
        self.path = Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.path.read_text("utf-8"))
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise InputError(f"tokenizer={str(path)!r} cannot be read as a tokenizer.json file: {error}.") from error
        vocab = self._tokenizer.get_vocab()
        if missing := [token for token in ROLES.values() if token not in vocab]:
            raise InputError(f"tokenizer={str(path)!r} lacks the special tokens {', '.join(missing)} of Gemma 4.")
        self.vocab_size = max(vocab.values()) + 1
        self.tokens = SpecialTokens(**{role: vocab[token] for role, token in ROLES.items()})
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Text from data is only text: "<eos>" in a document must not end it. Pickling forgets this setting.
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def load(cls, name: str) -> "Tokenizer":
        """The tokenizer shipped in this package, for "bundled", or the one in a tokenizer.json or its folder."""
        if name == BUNDLED:
            return cls(str(resources.files("gemma4_jax.data") / "bundled" / "tokenizer.json"))
        path = Path(name)
        return cls(path / "tokenizer.json" if path.is_dir() else path)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; nothing is added, and names of special tokens are plain characters."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens by name; ids outside the vocabulary are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """How the vocabulary writes one token; empty for an id outside it."""
        return self._tokenizer.id_to_token(token_id) or ""
