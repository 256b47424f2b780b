"""What every way to mask images is."""

from typing import Any, ClassVar

import torch

from featcache.feature import Feature
from featcache.kinds import Kind


class Masking(Kind):
    """Base class of ways to make many variants of an image, which depend neither on a probe nor on a class.

    counted: the field that says how many variants there are; None where other fields decide that. extends: whether the
    first variants are the same, however many there are. noted: a feature that a store has of each image besides those
    of its variants. It is a map [1, S, S] from which they can be drawn again without the image; None where nothing is
    needed.
    """

    counted: ClassVar[str | None] = None
    extends: ClassVar[bool] = False
    noted: ClassVar[Feature | None] = None

    def number(self, size: int) -> int:
        """Return how many variants an image has. size: of its side in pixels."""
        raise NotImplementedError

    def start(self, image: torch.Tensor, id: str) -> Any:
        """Return what the variants of an image are made of. image: [C, S, S], as the backbone takes it."""
        return None

    def masked(self, image: torch.Tensor, made: Any, first: int, end: int) -> torch.Tensor:
        """Make some of the variants of an image, by their numbers: [n, C, S, S]. made: what start() returned."""
        raise NotImplementedError

    def note(self, made: Any) -> torch.Tensor:
        """Return the map [1, S, S] of an image that a store has as the feature `noted`."""
        raise NotImplementedError

    def recall(self, note: torch.Tensor | None, id: str) -> Any:
        """Return what start() did, without the image: enough to tell what each variant left out.

        note: see note(); None where nothing is noted. Raises ValueError if it cannot be one.
        """
        return None
