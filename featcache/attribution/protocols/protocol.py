"""What every protocol is."""

from collections.abc import Sequence
from typing import ClassVar

from featcache.attribution.batch import Source
from featcache.attribution.explained import Explained
from featcache.attribution.scores.epg import EPG
from featcache.attribution.targets import Target
from featcache.kinds import Kind
from featcache.words import written


class Protocol(Kind):
    """Base class of protocols, which say what images are explained, for which classes, and where maps should point.

    region: what the masks of its Targets are, "boxes", "masks" (of segmentation), or "" for none. scores: those that
    are taken by default.
    """

    region: ClassVar[str] = ""
    scores: ClassVar[tuple[str, ...]] = (EPG.word(),)

    @property
    def label(self) -> str:
        """Its name in tables: its word, and the fields that are not at their defaults, such as gridpg:side=2."""
        return written(self)

    def pose(
        self, source: Source, limit: int | None, explained: Sequence[Explained]
    ) -> tuple[Source, Sequence[Target]]:
        """Return the images to explain and the Targets in them, in order of their rows. Raises BadInput.

        source: the images of the split. limit: how many images to explain at most. explained: the probes, by which a
        protocol may choose images.
        """
        raise NotImplementedError
