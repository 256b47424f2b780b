"""What every attribution method is."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.backbones.backbone import Backbone
from featcache.kinds import Kind
from featcache.probes.heads.head import Head
from featcache.probes.heads.module import HeadModule
from featcache.words import written


class Explanation:
    """The maps of one head, and what else a method says of them.

    maps: float32 [T, S, S]. cells: {one of the method's `columns`: T values, NaN where there is none}. colours: {number
    of a pictured pair: its map in colours of its own, with opacity, uint8 [S, S, 4]}, of methods that have them.
    """

    def __init__(
        self,
        maps: torch.Tensor,
        cells: dict[str, torch.Tensor] | None = None,
        colours: dict[int, torch.Tensor] | None = None,
    ) -> None:
        self.maps, self.cells, self.colours = maps, cells or {}, colours or {}


class Method(Kind):
    """Base class of attribution methods, which say how much each pixel of an image speaks for a class.

    runs_backbone: whether the method needs the backbone and the images. reads_maps: whether it needs the map that the
    head reads, from the store. paper: where it was published. columns: of attribution.csv, which it fills beside the
    scores. coloured: whether its Explanations have colours.
    """

    runs_backbone: ClassVar[bool] = False
    reads_maps: ClassVar[bool] = True
    paper: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    coloured: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Its name in tables: its word, and the fields that are not at their defaults, such as rise:masks=500."""
        return written(self)

    def misfit(self, backbone: Backbone) -> str | None:
        """Return why the method cannot explain a backbone, such as "has no ReLU", or None if it can."""
        return None

    def unfit(self, head: Head, reading: Reading) -> str | None:
        """Return why the method cannot explain a probe, such as "has a head of type bcos", or None if it can.

        A method that reads maps needs a reading whose positions lie in the image.
        """
        return f"reads {reading}, which is no map of the image" if self.reads_maps and not reading.is_map else None

    def explain(
        self, heads: Sequence[HeadModule], feature: Reading, batch: Batch
    ) -> Iterable[torch.Tensor | Explanation]:
        """Compute the maps of a batch for heads that all read the same, `feature`, so that they can share work.

        Returns float32 [T, S, S] for each head, in their order: one map for each of the batch's T pairs of an image
        and a class, S = batch.size pixels a side. Positive values speak for the class. A generator holds the maps
        of one head at a time.
        """
        raise NotImplementedError

    @property
    def shared(self) -> Hashable:
        """What methods have in common that share their passes through the backbone: see explain_together."""
        return self

    @classmethod
    def explain_together(
        cls, methods: Sequence[Any], heads: Sequence[HeadModule], feature: Reading, batch: Batch
    ) -> Iterator[tuple[torch.Tensor | Explanation, ...]]:
        """Yield what methods of one `shared` value explain, head by head; see explain."""
        yield from zip(*(method.explain(heads, feature, batch) for method in methods), strict=True)

    def passes(self, work: Work) -> Passes:
        """Return the passes through the backbone that the method takes for some work, where all share what they can."""
        return Passes()

    def passes_alone(self, work: Work) -> Passes:
        """Return the passes where every image is explained on its own for every class and probe, as is usual."""
        return Passes()
