"""Prepared data: documents that `gemma4 prepare` has encoded, by index."""

import hashlib
import json
from typing import Any

import numpy as np

from gemma4_jax.data.prepared import MAX_RECORD_BYTES, damage, from_record, open_reader, read_manifest, shards_in
from gemma4_jax.data.sources import Source
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path


class PreparedSource(Source):
    """The documents of a source, on one side of its split, as a run with the same encoding would encode them.

    Args:
      path: of the folder that `gemma4 prepare` has made of it.
      split: "train" or "held_out".
    Raises:
      InputError: there is no such folder, its preparation has not ended, or a file of it is damaged.
    """

    columns = ("encoded",)

    def __init__(self, path: str, split: str) -> None:
        self._folder, self._split = local_path(path), split
        manifest = read_manifest(self._folder)
        self._encoding: dict[str, Any] = manifest["encoding"]
        self.encoding = self._encoding
        shards = [(shard, known) for shard, known in shards_in(self._folder, manifest) if known["side"] == split]
        for shard, known in shards:
            if clause := damage(shard, known):
                raise InputError(f"{clause}: run `gemma4 prepare` again, which makes what is damaged anew.")
        self._shards = [shard for shard, _ in shards]
        self._stops = np.cumsum([known["documents"] for _, known in shards], dtype=np.int64)
        # What was made, not when: the same documents prepared twice are the same.
        self._digests = [known["files"] for _, known in shards]

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._stops, index, side="right"))
        place = index - (int(self._stops[number - 1]) if number else 0)
        shard = self._shards[number]
        try:
            # A range, not a list: the time of `read([place])` grows with the records of the file.
            (record,) = open_reader(shard.text).read(place, place + 1)
        except InputError:
            raise
        except Exception as error:  # the library raises exceptions of several kinds
            raise InputError(f"{shard.text} is damaged ({error}): run `gemma4 prepare` again.") from error
        if len(record) > MAX_RECORD_BYTES:
            raise InputError(f"a record of {len(record)} bytes is refused: at most {MAX_RECORD_BYTES} are read.")
        return {"encoded": from_record(record, shard.media, self._encoding)}

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.blake2b(json.dumps(self._digests, sort_keys=True).encode(), digest_size=16)
        return {"kind": "prepared", "documents": len(self), "blake2b": digest.hexdigest()}

    def name(self, index: int) -> str:
        return f"{self._folder.name} {self._split} document {index + 1}"
