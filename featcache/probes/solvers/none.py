"""No training, for heads that have no weights."""

from typing import ClassVar, Literal

from featcache.probes.part import Whole
from featcache.probes.solvers.solver import Solver


class NoTraining(Solver):
    """Nothing is trained, because the head has no weights."""

    type: Literal["none"] = "none"

    full_batch: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if spec.head.trains:
            return f"optimizer none trains nothing, and a head of type {spec.head.type} has weights to train"
        return None
