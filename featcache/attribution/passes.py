"""How often images go through the backbone: the cost of an attribution method."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class Passes:
    """Passes of single images through the backbone, forward and backward."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __str__(self) -> str:
        return f"{self.forward:,} forward and {self.backward:,} backward"


class Work(NamedTuple):
    """What is to be explained: so many images, pairs of an image and a class, and probes.

    size: of the side of an image in pixels. channels: of each of the layers that the probes read.
    """

    images: int
    pairs: int
    probes: int
    size: int
    channels: tuple[int, ...]

    @property
    def layers(self) -> int:
        """How many layers the probes read."""
        return len(self.channels)
