"""The chat template that belongs to a tokenizer."""

import contextlib
import functools
from importlib import resources

from gemma4_jax.chat import ChatTemplate, template_source
from gemma4_jax.data.documents import Documents, open_documents
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import DataConfig
from gemma4_jax.tokenizer import Tokenizer

PLAIN = resources.files("gemma4_jax.data").joinpath("bundled/plain_chat.jinja")
"""Of a tokenizer that brings none: Gemma's turns. It writes texts, images and sounds, and refuses tools."""


@functools.lru_cache(maxsize=8)
def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a tokenizer, see `template_text`.

    Templates are compiled where they are needed, for they cannot be sent to worker processes.

    Raises:
      InputError: a file cannot be read, or holds no template.
    """
    return ChatTemplate(template_text(tokenizer), tokenizer)


def template_text(tokenizer: Tokenizer) -> str:
    """The template beside a tokenizer.json (`template_source`), else `PLAIN`.

    Raises:
      InputError: a file cannot be read, or holds no template.
    """
    source = template_source(tokenizer.path.parent)
    return PLAIN.read_text("utf-8") if source is None else source


def plain_template_of(data: DataConfig, tokenizer: Tokenizer) -> str | None:
    """`PLAIN`, if that is what chats of a run are written by, so that whoever talks to the model writes them alike.

    None of a tokenizer with a template of its own, and of sources none of which gives chats, by its first document.

    Raises:
      InputError: a source cannot be read.
    """
    if template_source(tokenizer.path.parent) is not None:
        return None
    sources = data.mixture.values()
    gives_chats = any(_gives_chats(open_documents(source, seed=data.seed)) for source in sources)
    return PLAIN.read_text("utf-8") if gives_chats else None


def _gives_chats(documents: Documents) -> bool:
    for i in range(min(len(documents), 100)):
        with contextlib.suppress(InputError):  # a broken record says nothing of the others
            return documents[i].conversation is not None
    return False
