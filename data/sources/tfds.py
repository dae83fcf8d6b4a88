"""Data sets prepared by TensorFlow Datasets, read through their ArrayRecord files without TensorFlow."""

from typing import Any

import numpy as np

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.errors import InputError


class TfdsSource:
    """The examples of one split; an example becomes its image, a fixed prompt, and one of its features as text.

    Args:
      name: NAME/SPLIT or NAME/CONFIG/SPLIT, such as "mnist/train" or "wikipedia/20230601.en/train[:90%]".
      text: the feature that becomes the text to learn: text, or a class label, written by its name.
      image: the feature that holds the image; empty for none.
      prompt: text between the image and the text, which carries no loss.
      data_dir: where the data set was prepared; empty for TFDS's own default.
    Raises:
      InputError: if the data set is not there in the ArrayRecord format, or lacks the split or a feature.
    """

    OPTIONS = ("text", "image", "prompt", "data_dir")

    def __init__(self, name: str, *, text: str = "text", image: str = "", prompt: str = "", data_dir: str = "") -> None:
        import tensorflow_datasets as tfds  # heavy, and most runs do without

        builder_name, _, split = name.rpartition("/")
        if not builder_name or not split:
            raise InputError(f"The source 'tfds:{name}' is not complete: write it as tfds:NAME/SPLIT.")
        try:
            # Encoded images stay encoded: they are decoded where every other image is, and without TensorFlow.
            decoders = {image: tfds.decode.SkipDecoding()} if image else None
            builder = tfds.builder(builder_name, data_dir=data_dir or None)
            self._examples = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:  # TFDS raises exceptions of every kind, with pages of text
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"The source 'tfds:{name}' cannot be opened ({reason}): prepare it first with "
                f"`tfds build {builder_name} --file_format=array_record`."
            ) from error
        features = builder.info.features
        for feature in filter(None, (text, image)):
            if feature not in features:
                have = ", ".join(features)
                raise InputError(f"The source 'tfds:{name}' has no feature {feature!r}: its features are {have}.")
        self._name, self._text, self._image, self._prompt = name, text, image, prompt
        self._data_set = f"{builder.info.full_name}/{split}"
        self._label_name = features[text].int2str if isinstance(features[text], tfds.features.ClassLabel) else None

    def fingerprint(self) -> dict[str, Any]:
        read = {"text": self._text, "image": self._image, "prompt": self._prompt}
        return {"kind": "tfds", "data_set": self._data_set, "documents": len(self), **read}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Document:
        try:
            example = self._examples[index]
        except Exception as error:  # damaged files end in exceptions of every kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self._name} {index}: it cannot be read ({reason:.200}).") from error
        segments: list[Text | Image] = []
        if self._image:
            image = example[self._image]
            segments.append(Image(image if isinstance(image, bytes) else np.asarray(image)))
        if self._prompt:
            segments.append(Text(self._prompt, loss=False))
        segments.append(Text(self._as_text(example[self._text])))
        return Document(tuple(segments), f"{self._name} {index}")

    def _as_text(self, value: Any) -> str:
        if self._label_name:
            return str(self._label_name(int(value)))
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
