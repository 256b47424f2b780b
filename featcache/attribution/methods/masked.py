"""What methods have in common whose variants of an image a store may hold: `featcache extract --masks`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.masked_features import MaskedFeatures
from featcache.attribution.methods.perturbation import Image, Perturbation
from featcache.attribution.reading import Reading
from featcache.extraction.masks import MASKS
from featcache.extraction.masks.masking import Masking
from featcache.probes.heads.module import HeadModule


class Masked(Masking, Perturbation):
    """Base of methods that are a Masking too: it makes the variants, and they make maps of the variants' probabilities.

    Heads whose features of the variants are in a store need no backbone, and read them together.
    """

    @property
    def masking(self) -> Masking:
        """The masking alone, without the fields that only the method has."""
        kind = MASKS[self.type]
        return kind.model_validate({name: getattr(self, name) for name in kind.model_fields})

    def count(self, size: int, channels: int) -> int:
        """See Perturbation.count."""
        return self.number(size)

    def begin(self, image: Image) -> Any:
        """See Perturbation.begin."""
        return self.start(image.values, image.id)

    def variants(self, image: Image, made: Any, first: int, end: int) -> torch.Tensor:
        """See Perturbation.variants."""
        return self.masked(image.values, made, first, end)

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another: those from a store as they come, the others once all images are done."""
        store = batch.source.masked.get(self.masking)
        if store is None:
            yield from super().explain(heads, feature, batch)
            return
        served = [store.serves(head, feature) for head in heads]
        stored = [head for head, own in zip(heads, served, strict=True) if own]
        others = [head for head, own in zip(heads, served, strict=True) if not own]
        read, through = self._from_store(store, stored, feature, batch), super().explain(others, feature, batch)
        for own in served:
            yield next(read if own else through)

    @torch.no_grad()
    def _from_store(
        self, store: MaskedFeatures, heads: Sequence[HeadModule], feature: Reading, batch: Batch
    ) -> Iterator[torch.Tensor]:
        """Yield the maps of heads that a store serves, of as many heads at a time as fit into memory."""
        variants, size = self.number(batch.size), batch.size
        for block in store.blocks(heads, feature, variants, len(batch.targets) * size * size, batch.source.memory):
            maps = torch.empty(len(block), len(batch.targets), size, size, device=batch.source.device)
            for row, own in zip(batch.rows, batch.pairs_of, strict=True):
                scores = block.probabilities(row, batch.classes[own])
                try:
                    made = self.recall(store.note(row, self), batch.source.id_of(row))
                except ValueError as error:
                    raise store.damaged(row, error) from None
                maps[:, own] = self.maps(size, made, scores.flatten(0, 1)).unflatten(0, scores.shape[:2])
            yield from maps
