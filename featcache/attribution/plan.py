"""How many passes through the backbone an attribution takes, before it is computed: `featcache attribute --dry-run`."""

from collections.abc import Iterable
from dataclasses import dataclass

from featcache.attribution.passes import Passes, Work
from featcache.attribution.task import Task


@dataclass(frozen=True)
class Shared:
    """Methods that share their passes: their names, the passes that they take, and those of each map on its own."""

    methods: tuple[str, ...]
    passes: Passes
    alone: Passes


@dataclass(frozen=True)
class AttributionPlan:
    """What an attribution takes, with the number of its maps.

    again: how many images at most are explained a second time, for pictures that rules choose.
    """

    work: Work
    maps: int
    again: int
    shared: tuple[Shared, ...]

    @property
    def passes(self) -> Passes:
        """Of all methods."""
        return total(shared.passes for shared in self.shared)

    @property
    def alone(self) -> Passes:
        """Of all methods, where every image is explained on its own for every class and probe."""
        return total(shared.alone for shared in self.shared)


def plan_attribution(task: Task) -> AttributionPlan:
    """Count the passes of a task."""
    work = task.work
    shared = tuple(
        Shared(
            tuple(method.label for method in group),
            group[0].passes(work),
            total(method.passes_alone(work) for method in group),
        )
        for group in task.sharing()
    )
    if not task.source.stored and any(method.reads_maps for method in task.methods):
        shared = (Shared(("maps that no store has",), Passes(work.images), Passes()), *shared)
    again = sum(rule.most for rule in task.examples.rules)
    return AttributionPlan(work, work.pairs * work.probes * len(task.methods), again, shared)


def total(passes: Iterable[Passes]) -> Passes:
    """Add passes up."""
    return sum(passes, Passes())
