"""What insertion and deletion have in common (Petsiuk et al., RISE, BMVC 2018)."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from featcache.attribution.batch import Batch
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading, read_images
from featcache.attribution.scores.score import Judge, Score
from featcache.probes.heads.module import HeadModule

# Images get orders of their own, whatever else is scored.
STRIDE = 1_000_003


class Faithfulness(Score):
    """Base of scores that change an image pixel by pixel, the largest values of its map first, and see what becomes of
    the probability: the area under its curve over the share of pixels that have changed.

    Pixels of equal value change in a random order, and so do all pixels of a uniform map. The variants depend on the
    map: nothing is shared but the two ends of the curve, and the random order that serves all maps of an image.
    """

    steps: Annotated[int, Field(ge=2, le=100_000)] = Field(50, description="steps in which all pixels change")
    seed: int = Field(0, description="draws the order of pixels of equal value")
    runs_backbone: ClassVar[bool] = True
    lacking: ClassVar[str] = "different values"

    def ends(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what images [B, C, S, S] are at the beginning and in the end."""
        raise NotImplementedError

    def passes(self, work: Work, methods: int) -> Passes:
        """All steps in random order and both ends for each image, and the steps between the ends for each map."""
        return Passes(work.images * (self.steps + 1) + work.pairs * work.probes * methods * (self.steps - 1))

    def passes_alone(self, work: Work, methods: int) -> Passes:
        """All steps for each map, and both ends."""
        return Passes(work.pairs * work.probes * methods * (self.steps + 1))

    @torch.no_grad()
    def judge(self, batch: Batch, heads: Sequence[tuple[HeadModule, Reading]]) -> Judge:
        """See Score. All maps of a head go through the backbone together."""
        classes, ends = batch.by_image, self.ends(batch.inputs)  # [B, K], 2 x [B, C, S, S]
        orders = [self._order(row, batch.size) for row in batch.rows]
        images, readings = torch.arange(len(orders)), list(dict.fromkeys(reading for _, reading in heads))
        curves = torch.empty(len(heads), *classes.shape, self.steps + 1, dtype=torch.float64)
        random = torch.stack([_places(order) for order in orders])
        for which, steps, maps in self._run(batch, ends, random, images, range(self.steps + 1), readings):
            for number, (head, reading) in enumerate(heads):
                probabilities = head.probabilities(maps[reading]).gather(1, classes[which])
                curves[number, which, :, steps] = probabilities.double().cpu()
        curves = curves.flatten(1, 2)  # [heads, T, steps + 1]

        @torch.no_grad()
        def judge(maps: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
            head, reading = heads[number]
            flat, own, curve = maps.flatten(1), batch.images.cpu(), curves[number].clone()
            places = torch.stack(
                [_places(_sorted(each, orders[at])) for each, at in zip(flat, own.tolist(), strict=True)]
            )
            for which, steps, features in self._run(batch, ends, places, own, range(1, self.steps), [reading]):
                probabilities = head.probabilities(features[reading])
                chosen = probabilities.gather(1, batch.classes[which][:, None])[:, 0]
                curve[which, steps] = chosen.double().cpu()
            without = flat.amax(1) == flat.amin(1)
            return self._area(curve, batch.size).masked_fill(without, torch.nan), self._area(curves[number], batch.size)

        return judge

    def _run(
        self,
        batch: Batch,
        ends: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
        images: torch.Tensor,
        steps: range,
        readings: Sequence[Reading],
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[Reading, torch.Tensor]]]:
        """Yield (numbers of maps [n], steps [n], what heads read of these variants), as many as go through the backbone at once.

        places: int [N, S * S], when each pixel changes. images: int [N], of which image a map is.
        """
        (begin, end), counts = ends, self._counts(batch.size)
        maps, numbers = torch.meshgrid(torch.arange(len(places)), torch.tensor(steps), indexing="ij")
        at_once = batch.source.at_once
        for which, step in zip(maps.flatten().split(at_once), numbers.flatten().split(at_once), strict=True):
            changed = (places[which] < counts[step][:, None]).view(-1, 1, batch.size, batch.size).to(begin.device)
            inputs = torch.where(changed, end[images[which]], begin[images[which]])
            batch.source.passes.forward += len(inputs)
            yield which, step, read_images(batch.backbone, inputs, readings)

    def _order(self, row: int, size: int) -> torch.Tensor:
        """Return the random order of an image's pixels, int64 [S * S]."""
        generator = torch.Generator().manual_seed((self.seed * STRIDE + row) % 2**63)
        return torch.randperm(size * size, generator=generator)

    def _counts(self, size: int) -> torch.Tensor:
        """Return how many pixels have changed at each step: int64 [steps + 1]."""
        return (torch.arange(self.steps + 1) * (size * size) + self.steps // 2) // self.steps

    def _area(self, curves: torch.Tensor, size: int) -> torch.Tensor:
        """Return the area under curves [N, steps + 1] of probabilities over the share of pixels."""
        return torch.trapezoid(curves, self._counts(size).double() / (size * size))


def _sorted(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the pixels by their values, the largest first, those of equal value in a given order: int64 [S * S]."""
    return order[values[order].argsort(descending=True, stable=True)]


def _places(order: torch.Tensor) -> torch.Tensor:
    """Return at which place each pixel stands in an order: int64 [S * S]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
