"""The chat template that belongs to a tokenizer."""

import functools
import json
from importlib import resources
from typing import Any

from gemma4_jax.chat import MAX_CHARACTERS, ChatTemplate
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer

PLAIN = resources.files("gemma4_jax.data").joinpath("bundled/plain_chat.jinja")
"""Of a tokenizer that brings none: Gemma's turns. It writes texts, images and sounds, and refuses tools."""


@functools.lru_cache(maxsize=8)
def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template beside a tokenizer.json: chat_template.jinja, else that of tokenizer_config.json, else `PLAIN`.

    Templates are compiled where they are needed, for they cannot be sent to worker processes.

    Raises:
      InputError: the file cannot be read, or holds no template.
    """
    folder = tokenizer.path.parent
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                return ChatTemplate(file.read(MAX_CHARACTERS + 1), tokenizer)
        path = folder / "tokenizer_config.json"
        config: Any = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        source = config.get("chat_template") if isinstance(config, dict) else None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON
        raise InputError(f"{path} cannot be read: {error}.") from error
    return ChatTemplate(source if isinstance(source, str) else PLAIN.read_text("utf-8"), tokenizer)
