"""What training on mini-batches reads from a probe's spec."""

from dataclasses import dataclass

from featcache.probes.solvers.solver import MiniBatchSolver
from featcache.probes.spec import ProbeSpec


@dataclass(frozen=True)
class MiniBatchRecipe:
    """The fields of a spec that training on mini-batches needs. Probes that train in another way lack them."""

    solver: MiniBatchSolver
    epochs: int
    batch_size: int

    @classmethod
    def of(cls, spec: ProbeSpec) -> "MiniBatchRecipe":
        """Return the recipe of a spec. Raises TypeError if the probe does not train on mini-batches."""
        solver = spec.optimizer
        if not isinstance(solver, MiniBatchSolver) or spec.epochs is None or spec.batch_size is None:
            raise TypeError(f"probe {spec.id} does not train on mini-batches: its optimizer is {solver.type}")
        return cls(solver, spec.epochs, spec.batch_size)

    @property
    def rate(self) -> float:
        """Learning rate before the schedule."""
        return self.solver.rate(self.batch_size)
