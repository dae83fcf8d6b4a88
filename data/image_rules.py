"""How many images of a document are read, and how finely: options of every source."""

import contextlib
import dataclasses
from typing import Any

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.image_sizes import upright_size
from gemma4_jax.errors import InputError
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

MAX_IMAGES = 256
"""Of a document."""


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """Rules for the images of a source; one of which its record says a budget has that.

    Attributes:
      soft_tokens: budget of an image, or a list of those that it may have: it gets the smallest with which it is not
        made smaller than it is, or else the largest. None is the run's `data.soft_tokens_per_image`.
      soft_token_pixels: side of what becomes a soft token; 48 in the released models.
      max_images: that a document may have. Of one all of which is learned, and that is no conversation, those behind
        are left out; any other with more is refused.
    Raises:
      InputError: a rule is not possible.
    """

    soft_tokens: Any = None
    soft_token_pixels: int = 48
    max_images: int = MAX_IMAGES

    def __post_init__(self) -> None:
        if not set(self._budgets) <= set(SOFT_TOKEN_BUDGETS) or self.soft_tokens == []:
            accepted = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
            raise InputError(f"soft_tokens={self.soft_tokens!r:.100} must be one of {accepted}, or a list of these.")
        if self.soft_token_pixels < 1:
            raise InputError(f"soft_token_pixels={self.soft_token_pixels} must be at least 1.")
        if not 0 <= self.max_images <= MAX_IMAGES:
            raise InputError(f"max_images={self.max_images} must be between 0 and {MAX_IMAGES}.")

    @property
    def _budgets(self) -> tuple[Any, ...]:
        given = self.soft_tokens
        return () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)

    def limit(self, document: Document) -> Document:
        """The document with no more images than it may have.

        Raises:
          InputError: it has more, and may not go on without them.
        """
        places = [i for i, segment in enumerate(document.segments) if isinstance(segment, Image)]
        if len(places) <= self.max_images:
            return document
        is_learned = all(segment.loss for segment in document.segments if isinstance(segment, Text))
        if document.conversation is not None or not is_learned or self.max_images == MAX_IMAGES:
            raise InputError(f"{len(places)} images are refused: a document may have max_images={self.max_images}.")
        gone = set(places[self.max_images :])
        kept = tuple(segment for i, segment in enumerate(document.segments) if i not in gone)
        return dataclasses.replace(document, segments=kept, images_missing=document.images_missing + len(gone))

    def spend(self, document: Document) -> Document:
        """The document, with the content of its images, with a budget for each of them that has none yet."""
        if not self._budgets:
            return document
        segments = (self._with_budget(s) if isinstance(s, Image) else s for s in document.segments)
        return dataclasses.replace(document, segments=tuple(segments))

    def _with_budget(self, image: Image) -> Image:
        budget = max(self._budgets)
        if len(self._budgets) > 1 and not isinstance(image.content, str):
            with contextlib.suppress(InputError):  # of one that cannot be read, which is said where it is
                height, width = upright_size(image.content)
                needed = height * width / self.soft_token_pixels**2
                budget = min((budget for budget in self._budgets if budget >= needed), default=budget)
        return image if image.max_soft_tokens is not None else dataclasses.replace(image, max_soft_tokens=budget)


def with_budgets(document: Document, given: Any) -> Document:
    """The document with the budgets that its record gives its images.

    Args:
      document: of a record.
      given: a budget of all its images, or a list of one each; None for nothing.
    Raises:
      InputError: there are not as many as images.
    """
    if given is None:
        return document
    num_images = sum(isinstance(segment, Image) for segment in document.segments)
    budgets = given if isinstance(given, list) else [given] * num_images
    if len(budgets) != num_images:
        raise InputError(f"its column of soft tokens has {len(budgets)} for {num_images} images: give one each.")
    chosen = iter(budgets)
    segments = (
        dataclasses.replace(segment, max_soft_tokens=next(chosen)) if isinstance(segment, Image) else segment
        for segment in document.segments
    )
    return dataclasses.replace(document, segments=tuple(segments))
