"""What every protocol is."""

from collections.abc import Sequence
from typing import ClassVar

from featcache.attribution.batch import Source
from featcache.attribution.scores.epg import EPG
from featcache.attribution.targets import Target
from featcache.kinds import Kind


class Protocol(Kind):
    """Base class of protocols, which say what images are explained, for which classes, and where maps should point.

    region: what the masks of its Targets are, "boxes", "masks" (of segmentation), or "" for none. scores: those that
    are taken by default.
    """

    region: ClassVar[str] = ""
    scores: ClassVar[tuple[str, ...]] = (EPG.word(),)

    def pose(self, source: Source, limit: int | None) -> tuple[Source, Sequence[Target]]:
        """Return the images to explain and the Targets in them, in order of their rows. Raises BadInput.

        source: the images of the split. limit: how many images to explain at most.
        """
        raise NotImplementedError
