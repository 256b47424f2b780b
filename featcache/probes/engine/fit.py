"""Training of a block whose optimizer sees all images at once."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from featcache.probes.solvers.solver import FullBatchSolver
from featcache.probes.spec import ProbeSpec
from featcache.probes.trained import TrainedProbe
from featcache.probes.weights import all_finite


def fit_block(
    specs: Sequence[ProbeSpec],
    features: Tensor,
    labels: Tensor,
    classes: int,
    held_out: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[TrainedProbe]:
    """Train the probes of one block, and return a TrainedProbe of each.

    features, labels: see FullBatchSolver.fit. held_out: see FullBatchSolver.fit_folds.
    """
    solver = specs[0].optimizer
    if not isinstance(solver, FullBatchSolver):
        raise TypeError(f"optimizer {solver.type} does not see all images at once")
    if held_out:
        fits = solver.fit_folds(specs, features, labels, classes, held_out)
    else:
        fits = solver.fit(specs, features, labels, classes)
    return [
        TrainedProbe(
            spec,
            fit.weights,
            fit.losses,
            None if all_finite(fit.weights) else len(fit.losses) - 1,
            spec.epochs,
            stopped=None if fit.converged else "iterations",
            choice=fit.choice,
            optimality=fit.optimality,
        )
        for spec, fit in zip(specs, fits, strict=True)
    ]
