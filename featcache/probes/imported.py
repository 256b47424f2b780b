"""How probes were trained that come from elsewhere: everything unknown is None."""

from typing import ClassVar, Literal

from featcache.probes.schedules.schedule import Schedule
from featcache.probes.solvers.solver import Solver


class ImportedSolver(Solver):
    """The probe was trained elsewhere: a file of weights does not say how."""

    type: Literal["imported"] = "imported"
    lr: None = None
    momentum: None = None
    weight_decay: None = None

    full_batch: ClassVar[bool] = False


class ImportedSchedule(Schedule):
    """The probe was trained elsewhere."""

    type: Literal["imported"] = "imported"
    gamma: None = None
    warmup_epochs: None = None
