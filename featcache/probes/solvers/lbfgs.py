"""Full-batch training to the optimum. Grids call it lbfgs, after the method that most people use for it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from featcache.probes.heads.linear import Linear
from featcache.probes.part import AtLeast0, Whole
from featcache.probes.solvers.convex import Problem, fit_convex
from featcache.probes.solvers.convex.path import COLUMN_BYTES
from featcache.probes.solvers.solver import Fit, FullBatchSolver

# Roughly how often it goes over the images for a probe, measured with weight decays of 1e-8 to 0.1.
PASSES = 150
# Bytes for each number of an image's features, which are kept in both precisions.
ROTATED_BYTES = 12


class Lbfgs(FullBatchSolver):
    """All images at once, to the optimum of the loss plus weight_decay / 2 |W|^2, by Newton's method; see convex/."""

    type: Literal["lbfgs"] = "lbfgs"
    weight_decay: AtLeast0 = Field(0.0, description="weight decay; with ce, scikit-learn's C is 1 / (N weight_decay)")
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = Field(1000, description="most Newton steps")

    per_probe: ClassVar[frozenset[str]] = frozenset({"weight_decay"})

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if not isinstance(spec.head, Linear):
            return f"optimizer lbfgs trains linear heads, not {spec.head.type}"
        return super().conflict(spec)

    def fit(self, specs: Sequence[Whole], features: Tensor, labels: Tensor, classes: int) -> list[Fit]:
        """See FullBatchSolver.fit."""
        return self.fit_folds(specs, features, labels, classes, {})

    def shares_folds(self, spec: Whole) -> bool:
        """See FullBatchSolver.shares_folds. Without weight decay the images that are held out could move weights."""
        return spec.loss.convex and self.weight_decay > 0

    def fit_folds(
        self, specs: Sequence[Whole], features: Tensor, labels: Tensor, classes: int, held_out: Mapping[str, Tensor]
    ) -> list[Fit]:
        """See FullBatchSolver.fit_folds."""
        head = specs[0].head
        if not isinstance(head, Linear):
            raise TypeError(f"lbfgs trains linear heads, not {head.type}")
        problems = [_problem(spec, held_out) for spec in specs]
        return fit_convex(problems, head, head.normalised(features), labels, classes, held_out)

    def passes(self) -> int:
        """See FullBatchSolver.passes."""
        return PASSES

    def image_bytes(self, width: int, classes: int) -> int:
        """See FullBatchSolver.image_bytes."""
        return ROTATED_BYTES * width + COLUMN_BYTES * classes


def _problem(spec: Whole, held_out: Mapping[str, Tensor]) -> Problem:
    solver = spec.optimizer
    if not isinstance(solver, Lbfgs):
        raise TypeError(f"a probe of another optimizer, {solver.type}, is in a block of lbfgs")
    fold = spec.fold if spec.fold in held_out else None
    return Problem(spec.loss, solver.weight_decay, solver.iterations, fold)
