"""What solvers with momentum share."""

from typing import Annotated, ClassVar

from pydantic import Field

from featcache.probes.solvers.solver import MiniBatchSolver


class MomentumSolver(MiniBatchSolver):
    """Base of solvers with momentum."""

    momentum: Annotated[float, Field(ge=0, le=0.9999)] = Field(0.9, description="momentum")

    per_probe: ClassVar[frozenset[str]] = MiniBatchSolver.per_probe | {"momentum"}

    @property
    def order(self) -> float:
        """See Solver.order. SGD is faster when all probes of a stack have the same momentum."""
        return self.momentum
