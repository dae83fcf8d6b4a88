"""What became of the documents of each source: counted, named, and judged."""

import logging
import math
from collections.abc import Mapping

from gemma4_jax.errors import InputError

LEFT_OUT = {
    "unreadable": "unreadable",
    "dropped": "too large for a row",
    "nothing_to_learn": "with nothing to learn",
}
"""Counter of documents that are not trained on -> why."""

COUNTERS = ("read", "documents", "images", "images_missing", "split", "shortened", *LEFT_OUT)
"""What is counted of each source: documents read; documents and images packed, and images that documents go on without;
documents split into pieces, shortened, and left out. A document counts each time that it comes, in every epoch."""

MIN_JUDGED = 100
"""Documents of a source that are read before the share left out is looked at."""

MAX_NAMED = 20
"""Documents left out of a source that the log names, each once; the rest are only counted."""


class Judge:
    """Stops a run whose sources give too little. One for all the tallies of a process.

    Args:
      max_left_out: share of a source's documents that may be left out, at least 0 and less than 1.
    """

    def __init__(self, max_left_out: float) -> None:
        self._max_left_out = max_left_out
        # So many in a row come once in 10**12 tries from a source of which the share that may be left out is.
        self._longest_run = max(1, math.ceil(math.log(1e-12) / math.log(max_left_out))) if max_left_out else 1
        self._tallies: list[Tally] = []
        self._runs: dict[str, int] = {}
        self._named: dict[str, set[str]] = {}

    def tally(self) -> "Tally":
        """Another tally, whose documents count with those of the others."""
        self._tallies.append(Tally(self))
        return self._tallies[-1]

    def end_run(self, source: str) -> None:
        """A document of the source can be used."""
        self._runs[source] = 0

    def judge(self, source: str, reason: str) -> None:
        """Names a document that is left out.

        Raises:
          InputError: too many of the source are left out.
        """
        self._runs[source] = run = self._runs.get(source, 0) + 1
        self.name(source, reason)
        all_counters = [tally.counters.get(source, {}) for tally in self._tallies]
        counters = {name: sum(counts.get(name, 0) for counts in all_counters) for name in COUNTERS}
        is_above = _left_out(counters) > self._max_left_out * counters["read"]
        if run >= self._longest_run:
            why = "and the last document" if run == 1 else f"and the last {run} one after another"
        elif counters["read"] >= MIN_JUDGED and is_above:
            why = "more than the share that may be"
        else:
            return
        raise InputError(
            f"{_sentence(source, counters)}, {why}: mend the source, set its weight to 0, or allow more than "
            f"data.max_left_out={self._max_left_out}; the last: {reason}"
        )

    def name(self, source: str, reason: str) -> None:
        """Names a document that is left out in the log, once."""
        named = self._named.setdefault(source, set())
        if reason not in named and len(named) < MAX_NAMED:
            named.add(reason)
            logging.warning("Left out a document of %r: %s", source, reason)


class Tally:
    """Counts of one sequence of documents.

    Args:
      judge: that hears of what is left out.

    Attributes:
      counters: source -> its `COUNTERS`.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.counters: dict[str, dict[str, int]] = {}

    def add(self, source: str, **counts: int) -> None:
        """Adds to the counters of a source."""
        counters = self.counters.setdefault(source, dict.fromkeys(COUNTERS, 0))
        for name, count in counts.items():
            counters[name] += count

    def accept(self, source: str, **counts: int) -> None:
        """Counts a document that is read and will be packed, and what else is to be counted of it."""
        self.add(source, read=1, **counts)
        self._judge.end_run(source)

    def leave_out(self, source: str, counter: str, reason: str, *, read: int = 1) -> None:
        """Counts a document that is left out, and names it in the log.

        Args:
          source: of the document.
          counter: one of `LEFT_OUT`.
          reason: one sentence that names the document.
          read: 0 of a document that was accepted before it showed.
        Raises:
          InputError: too many of the source are left out.
        """
        self.add(source, read=read, **{counter: 1})
        self._judge.judge(source, reason)

    def name(self, source: str, reason: str) -> None:
        """Names a document that is left out in the log, once."""
        self._judge.name(source, reason)

    def get_state(self) -> dict[str, dict[str, int]]:
        """What `set_state` takes, to be kept as JSON."""
        return {source: dict(counters) for source, counters in self.counters.items()}

    def set_state(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on with the counts of a `get_state`."""
        none = dict.fromkeys(COUNTERS, 0)  # of a counter that the state does not know yet
        self.counters = {source: none | dict(counters) for source, counters in state.items()}


def _left_out(counters: Mapping[str, int]) -> int:
    return sum(counters[name] for name in LEFT_OUT)


def _sentence(source: str, counters: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{counters[name]} {why}" for name, why in LEFT_OUT.items() if counters[name])
    return f"{_left_out(counters)} of {counters['read']} documents read of {source!r} were left out ({reasons})"


def left_out_sentences(counters: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What to tell at the end of a run of each source of which documents or images were left out, or shortened.

    Args:
      counters: source -> its `COUNTERS`.
    """
    sentences = [_sentence(source, counts) for source, counts in counters.items() if _left_out(counts)]
    for source, counts in counters.items():
        if counts["shortened"]:
            sentences.append(f"{counts['shortened']} documents of {source!r} were shortened")
        if counts["images_missing"]:
            sentences.append(f"{counts['images_missing']} images of {source!r} were missing, and left out")
    return sentences
