"""The optima of problems from strong to weak decay.

The weaker the decay, the harder the problem. The search for an optimum therefore starts from that of a stronger decay,
and goes down the powers of ten. Problems share these stations, but where a search starts does not depend on which other
decays are asked for. It starts from zero above the first station; there, all images are active in a hinge, and the
first Newton step leads to the solution of ridge regression.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from featcache.probes.losses.curvature import Curvature
from featcache.probes.solvers.convex.basis import Eigenbasis, at_most
from featcache.probes.solvers.convex.newton import TOLERANCE, Optima, minimise
from featcache.probes.solvers.convex.preconditioner import Work

# The search leaves a power of ten once the gradient is this share of its first one, or after so many steps. There are
# at most so many powers; weaker decays, and no decay, start from the last.
ROUGHLY, ROUGH_STEPS, POWERS = 0.03, 50, 10
# Problems are solved side by side as long as they take no more than this, but one at least; on a GPU it is a quarter of
# the free memory. A column takes so many bytes for each image and each direction.
SLICE_BYTES, COLUMN_BYTES = 512 << 20, 128


class Path:
    """The way down the decays for all problems of a loss. shift: what is added to all logits."""

    def __init__(self, basis: Eigenbasis, loss: Curvature, shift: float = 0.0):
        self.basis, self.loss, self.shift, self.work = basis, loss, shift, Work()
        count, directions = len(basis.features), len(basis.spread)
        room = at_most(SLICE_BYTES, basis.spread.device)
        self.at_once = max(room // (COLUMN_BYTES * loss.columns * (count + directions)), 1)
        # Of features that are not finite nothing can be said.
        zero = 0.0 if basis.finite else math.nan
        self.start = basis.spread.new_full((loss.problems, loss.columns, directions), zero)
        numbers = torch.arange(loss.problems, device=self.start.device)
        looks = [self._look(part) for part in numbers.split(self.at_once)]
        self.steep = torch.cat([steep for steep, _ in looks])
        weights = basis.spread[:-1] if basis.bias == "free" else basis.spread
        strongest = float(weights.max()) * max(flat for _, flat in looks)
        self.first = math.floor(math.log10(strongest)) if 0 < strongest < math.inf else 0

    def _look(self, numbers: Tensor) -> tuple[Tensor, float]:
        """Return the norms of the gradients at zero, and the largest curvature there."""
        loss = self.loss.take(numbers)
        push, curvature = loss.slope(self.basis.along(self.start[numbers]) + self.shift)
        return self.basis.slant(self.basis.pulled(push)), float(loss.diagonal(curvature).sum(2).max())

    def optima(
        self, numbers: Tensor, decay: Tensor, steps: Tensor, tolerance: float = TOLERANCE
    ) -> Iterator[tuple[Tensor, Optima]]:
        """Yield which problems were solved, as places in `numbers`, int64 [Q], and their Optima, slice by slice.

        numbers: of the problems, int64 [M], which may repeat. decay: float64 [M]. steps: most Newton steps, int64 [M].
        """
        powers = [self._station(value) for value in decay.tolist()]
        points, reached = self.start, self.first + 1
        for power in sorted(set(powers), reverse=True):
            while reached > power:
                reached -= 1
                points = self._down(points, 10.0**reached)
            places = torch.tensor([n for n, other in enumerate(powers) if other == power], device=numbers.device)
            # Alike decays together, so that they end together.
            places = places[decay[places].argsort(descending=True, stable=True)]
            for part in places.split(self.at_once):
                chosen = numbers[part]
                yield part, self._minimise(points[chosen], chosen, decay[part], steps[part], tolerance=tolerance)

    def _station(self, decay: float) -> int:
        """Return the power of ten from which the search for a decay starts; above the first power it starts at zero."""
        if decay > 10.0**self.first:
            return self.first + 1
        last = self.first - POWERS + 1
        return next((power for power in range(last, self.first) if 10.0**power >= decay), self.first)

    def _down(self, points: Tensor, decay: float) -> Tensor:
        """Return all points roughly at the optima of a decay."""
        parts = []
        for numbers in torch.arange(len(points), device=points.device).split(self.at_once):
            decays = torch.full_like(self.steep[numbers], decay)
            steps = torch.full_like(numbers, ROUGH_STEPS)
            parts.append(self._minimise(points[numbers], numbers, decays, steps, share=ROUGHLY).points)
        return torch.cat(parts)

    def _minimise(self, points: Tensor, numbers: Tensor, decay: Tensor, steps: Tensor, **how: float) -> Optima:
        steep = self.steep[numbers]
        loss = self.loss.take(numbers)
        return minimise(self.basis, loss, points, decay, steep, steps, self.work, shift=self.shift, **how)
