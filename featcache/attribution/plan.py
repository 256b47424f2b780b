"""How many passes through the backbone an attribution takes, before it is computed: `featcache attribute --dry-run`."""

from collections.abc import Iterable
from dataclasses import dataclass

from featcache.attribution.passes import Passes, Work
from featcache.attribution.task import Task
from featcache.words import written


@dataclass(frozen=True)
class Shared:
    """Methods that share their passes, or a score: names, the passes that they take, and those of each map on its own."""

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
    works = [(source, task.work(len(probes))) for source, probes in task.by_source()]
    shared = [
        Shared(
            tuple(method.label for method in group),
            total(group[0].passes(task.left(group[0], source, work)) for source, work in works),
            total(method.passes_alone(work) for _, work in works for method in group),
        )
        for group in task.sharing()
    ]
    unknown = [work for source, work in works if not source.stored]
    if unknown and any(method.reads_maps for method in task.methods):
        shared.insert(0, Shared(("maps that no store has",), total(Passes(work.images) for work in unknown), Passes()))
    methods = len(task.methods)
    shared += [
        Shared(
            (written(score),),
            total(score.passes(work, methods) for _, work in works),
            total(score.passes_alone(work, methods) for _, work in works),
        )
        for score in task.scores
        if score.runs_backbone
    ]
    work = task.work(len(task.explained))
    again = sum(rule.most for rule in task.examples.rules)
    return AttributionPlan(work, work.pairs * work.probes * methods, again, tuple(shared))


def total(passes: Iterable[Passes]) -> Passes:
    """Add passes up."""
    return sum(passes, Passes())
