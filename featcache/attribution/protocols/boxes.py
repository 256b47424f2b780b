"""Images as they are, with the boxes of their objects."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from featcache.attribution.batch import Source
from featcache.attribution.explained import Explained
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.targets import Target, find_targets


class Boxes(Protocol):
    """Every class that has a box which is not difficult is explained, and maps should point into its boxes."""

    type: Literal["boxes"] = "boxes"
    region: ClassVar[str] = "boxes"

    def pose(
        self, source: Source, limit: int | None, explained: Sequence[Explained]
    ) -> tuple[Source, Sequence[Target]]:
        """See Protocol.pose."""
        return source, find_targets(source.split, source.preprocessing, limit)
