"""Which probes train together."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from featcache.probes.engine.memory import CPU, MemoryBudget
from featcache.probes.heads.head import MANY_ROWS
from featcache.probes.inputs.input import CHUNK_ROWS
from featcache.probes.sample import Sample
from featcache.probes.solvers.solver import FullBatchSolver
from featcache.probes.spec import ProbeSpec

MIN_ROWS = 32


@dataclass(frozen=True)
class Block(Sequence[ProbeSpec]):
    """Probes that train together: they share images, input and everything but rates, losses, seeds and the like."""

    specs: tuple[ProbeSpec, ...]

    def __len__(self) -> int:
        return len(self.specs)

    @overload
    def __getitem__(self, number: int) -> ProbeSpec: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[ProbeSpec, ...]: ...

    def __getitem__(self, number: int | slice) -> ProbeSpec | tuple[ProbeSpec, ...]:
        return self.specs[number]

    def __iter__(self) -> Iterator[ProbeSpec]:
        return iter(self.specs)

    @property
    def key(self) -> Hashable:
        """What the probes have in common."""
        return block_key(self.specs[0])


def blocks(
    specs: Iterable[ProbeSpec], dim: int, positions: int, classes: int, budget: MemoryBudget = CPU
) -> list[Block]:
    """Group specs into Blocks, in order of first appearance, as large as the budget allows.

    specs: all of one input. dim: its width. positions: of its map, 1 if it is pooled.
    """
    alike: dict[Hashable, list[ProbeSpec]] = {}
    for spec in specs:
        alike.setdefault(block_key(spec), []).append(spec)
    result = []
    for members in alike.values():
        # Sorted, so that each loss sees one slice of the stack, and that most stacks have one momentum.
        members.sort(key=lambda s: (s.optimizer.order, repr(s.loss)))
        count = -(-len(members) // _largest_block(members[0], dim, positions, classes, budget))
        size = -(-len(members) // count)
        result += [Block(tuple(members[i : i + size])) for i in range(0, len(members), size)]
    return result


def _largest_block(spec: ProbeSpec, dim: int, positions: int, classes: int, budget: MemoryBudget) -> int:
    """Return how many probes like this one may train at a time."""
    weights, activations = spec.head.footprint(dim, classes, positions)
    # An imported probe has no batch size, because it is only scored.
    cached = spec.head.in_cache((spec.batch_size or CHUNK_ROWS) * positions)
    most = (budget.weights if cached else budget.activations) // (4 * weights)
    most = min(most, budget.activations // (4 * activations * rows_at_once(spec.batch_size, positions)))
    if isinstance(spec.optimizer, FullBatchSolver):
        most = min(most, budget.activations // (4 * spec.optimizer.weight_copies * weights))
    return max(most, 1)


def block_key(spec: ProbeSpec) -> Hashable:
    """Return what the probes of one block have in common."""
    loop = (spec.epochs, spec.stop, spec.batch_size, spec.keep, spec.patience, spec.precision)
    return spec.features, spec.views, shared_sample(spec), spec.head.shared, spec.optimizer.shared, loop


def shared_sample(spec: ProbeSpec) -> Sample:
    """Return the images that the probes of its block share: its own, or with them those of the fold that it holds out."""
    solver = spec.optimizer
    if spec.fold and isinstance(solver, FullBatchSolver) and solver.shares_folds(spec):
        return replace(spec.sample, fold=None)
    return spec.sample


def rows_at_once(batch_size: int | None, positions: int) -> int:
    """Return how many images a stack sees at a time: a mini-batch, or in scoring enough to keep it busy."""
    return max(batch_size or 1, MANY_ROWS // positions)


def padded(specs: Sequence[ProbeSpec], classes: int) -> list[ProbeSpec]:
    """Repeat the last probe until the block has MIN_ROWS outputs.

    BLAS libraries compute a row of a product in the same way however many rows there are, except when there are very
    few, where they use other kernels. With the padding, a single probe gets the same bits as in a stack.
    """
    width = specs[0].head.first_width(classes)
    return [*specs, *[specs[-1]] * (-(-MIN_ROWS // width) - len(specs))]
