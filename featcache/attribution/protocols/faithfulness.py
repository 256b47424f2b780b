"""Images as they are, for scores that ask whether a map shows what a probe's probability rests on."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from featcache.attribution.batch import Source
from featcache.attribution.explained import Explained
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.scores.deletion import Deletion
from featcache.attribution.scores.insertion import Insertion
from featcache.attribution.targets import Target
from featcache.errors import BadInput


class Faithfulness(Protocol):
    """Every class that an image is labelled with is explained, and pixels change in the order of its map.

    It needs no boxes.
    """

    type: Literal["faithfulness"] = "faithfulness"
    scores: ClassVar[tuple[str, ...]] = (Insertion.word(), Deletion.word())

    def pose(
        self, source: Source, limit: int | None, explained: Sequence[Explained]
    ) -> tuple[Source, Sequence[Target]]:
        """See Protocol.pose. Raises BadInput if no image has a label."""
        labels = source.split.labels  # [N, C] of 1, 0 and -1, or [N]
        given = [[int(own)] if labels.ndim == 1 else np.flatnonzero(own == 1).tolist() for own in labels]
        rows = [row for row, own in enumerate(given) if own][:limit]
        if not rows:
            raise BadInput(f"--protocol {self.type}: no image of split {source.split.name} has a label to explain")
        return source, [Target(row, label) for row in rows for label in given[row]]
