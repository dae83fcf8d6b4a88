"""Data sets prepared by TensorFlow Datasets, read through their ArrayRecord files without TensorFlow."""

from typing import Any

from gemma4_jax.data.sources import Source
from gemma4_jax.errors import InputError


class TfdsSource(Source):
    """The examples of one split: their features by name, images as the bytes of their files, class labels by name.

    Args:
      path: NAME/SPLIT or NAME/CONFIG/SPLIT, such as "mnist/train" or "wikipedia/20230601.en/train[:90%]".
      data_dir: where the data set was prepared; empty for TFDS's own default.
    Raises:
      InputError: the data set is not there in the ArrayRecord format, or lacks the split.
    """

    def __init__(self, path: str, *, data_dir: str = "") -> None:
        import tensorflow_datasets as tfds  # heavy, and most runs do without

        builder_name, _, split = path.rpartition("/")
        if not builder_name or not split:
            raise InputError(f"The path {path!r} is not complete: write it as NAME/SPLIT.")
        try:
            builder = tfds.builder(builder_name, data_dir=data_dir or None)
            features = builder.info.features
            # Encoded images stay encoded: they are decoded where every other image is, and without TensorFlow.
            images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
            decoders = {name: tfds.decode.SkipDecoding() for name in images}
            self._examples = builder.as_data_source(split=split, decoders=decoders or None)
        except Exception as error:  # TFDS raises exceptions of every kind, with pages of text
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"The data set {path!r} cannot be opened ({reason}): prepare it first with "
                f"`tfds build {builder_name} --file_format=array_record`."
            ) from error
        self.columns = list(features)
        self._path = path
        self._data_set = f"{builder.info.full_name}/{split}"
        labels = {name: label for name, label in features.items() if isinstance(label, tfds.features.ClassLabel)}
        self._label_names = {name: label.int2str for name, label in labels.items()}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = dict(self._examples[index])
            labels = {name: str(name_of(int(example[name]))) for name, name_of in self._label_names.items()}
        except Exception as error:  # damaged files end in exceptions of every kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"it cannot be read ({reason:.200}).") from error
        return example | labels

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "tfds", "data_set": self._data_set, "documents": len(self)}

    def name(self, index: int) -> str:
        return f"{self._path} {index}"
