"""`Pair` to two examples, of which the answers carry loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma4_jax.data.chat_templates import chat_template
from gemma4_jax.data.document import Document, Image, Pair, Sound, Text
from gemma4_jax.data.encode import MAX_CHARACTERS, Encoder
from gemma4_jax.data.example import SizedExample
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer


def encode_pair(pair: Pair, encode: Encoder) -> tuple[SizedExample, SizedExample]:
    """The examples of (chosen, rejected), which begin with the same tokens and carry loss on all that follows.

    The prompt ends where its own tokens, with the beginning of the model's turn behind them, are no longer those of
    both examples. A text begins with <bos> and ends with <eos>.

    Args:
      pair: from `Documents.read`.
      encode: of documents.
    Raises:
      InputError: as `encode`, or an answer has no tokens of its own.
    Source: `_prepare_dataset` of TRL 1.16, trainer/dpo_trainer.py.
    """
    documents = pair.chosen, pair.rejected
    name = pair.chosen.name
    try:
        prompt = _tokens(pair.chosen, encode.tokenizer, pair.num_prompt)
        wholes = [_tokens(document, encode.tokenizer) for document in documents]
        shared = min(_num_shared(prompt, whole) for whole in wholes)
        if shared == min(map(len, wholes)):
            raise InputError("an answer has no tokens.")
        chosen, rejected = (
            encode.fill(
                whole,
                [False] * shared + [True] * (len(whole) - shared),
                [segment for segment in document.segments if isinstance(segment, Image)],
                [segment for segment in document.segments if isinstance(segment, Sound)],
                name,
            )
            for document, whole in zip(documents, wholes, strict=True)
        )
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return chosen, rejected


def _tokens(document: Document, tokenizer: Tokenizer, num_prompt: int | None = None) -> list[int]:
    """Of a document, or of its prompt alone."""
    if document.conversation is not None:
        messages, tools = document.conversation.messages[:num_prompt], document.conversation.tools
        is_prompt = num_prompt is not None
        if not messages:  # an answer to nothing
            return []
        videos = document.conversation.videos[: sum(map(_num_videos, messages))]
        encode = chat_template(tokenizer).encode
        return encode(messages, tools=tools, add_generation_prompt=is_prompt, videos=videos)[0]
    text = "".join(segment.text for segment in document.segments if isinstance(segment, Text))
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"a text of {len(text)} characters is refused: at most {MAX_CHARACTERS} are read.")
    ends = [] if num_prompt is not None else [tokenizer.tokens.eos]
    return [tokenizer.tokens.bos, *tokenizer.encode(text[:num_prompt]), *ends]


def _num_videos(message: Mapping[str, Any]) -> int:
    parts = message.get("content")
    return sum(part["type"] == "video" for part in parts) if isinstance(parts, list) else 0


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
