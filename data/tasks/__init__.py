"""What becomes of a record: one file a task, and the table of them.

A task is a function from columns of a record to a `Document`, or to a `Pair` of two. Its parameters name the columns
that it reads; one with a default may be missing. `data.sources.NAME.columns` says where a record calls a column
something else, and `data.sources.NAME.options` gives one that is the same for every record. Parameters after `*` are
options alone, and `**others`, in a task that has it, is what else the record holds.

    def answer(question: str, answer: str) -> Document:
        return Document((Text(question, loss=False), Text(answer)))
"""

from collections.abc import Callable

from gemma4_jax.data.document import Document, Pair
from gemma4_jax.data.tasks.auto import auto
from gemma4_jax.data.tasks.caption import caption
from gemma4_jax.data.tasks.chat import chat
from gemma4_jax.data.tasks.interleaved import interleaved
from gemma4_jax.data.tasks.preference import preference
from gemma4_jax.data.tasks.segments import segments
from gemma4_jax.data.tasks.speech import speech
from gemma4_jax.data.tasks.text import text
from gemma4_jax.data.tasks.video import video

TASKS: dict[str, Callable[..., Document | Pair]] = {
    "auto": auto,
    "segments": segments,
    "text": text,
    "caption": caption,
    "chat": chat,
    "interleaved": interleaved,
    "preference": preference,
    "speech": speech,
    "video": video,
}
"""Name -> task. It raises InputError for a record that it cannot use."""
