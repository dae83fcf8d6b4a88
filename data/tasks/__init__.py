"""What becomes of a record: one file a task, and the table of them.

A task is a function from columns of a record to a `Document`. Its parameters name the columns that it reads; one with a
default may be missing. `data.sources.NAME.columns` says where a record calls a column something else, and
`data.sources.NAME.options` gives one that is the same for every record. Parameters after `*` are options alone, and
`**others`, in a task that has it, is what else the record holds.

    def answer(question: str, answer: str) -> Document:
        return Document((Text(question, loss=False), Text(answer)))
"""

from collections.abc import Callable

from gemma4_jax.data.document import Document
from gemma4_jax.data.tasks.auto import auto
from gemma4_jax.data.tasks.caption import caption
from gemma4_jax.data.tasks.chat import chat
from gemma4_jax.data.tasks.interleaved import interleaved
from gemma4_jax.data.tasks.segments import segments
from gemma4_jax.data.tasks.text import text

TASKS: dict[str, Callable[..., Document]] = {
    "auto": auto,
    "segments": segments,
    "text": text,
    "caption": caption,
    "chat": chat,
    "interleaved": interleaved,
}
"""Name -> task. It raises InputError for a record that it cannot use."""
