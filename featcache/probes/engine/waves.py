"""Which probes of a grid are still to be trained, and which blocks train on the same pass over the data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from featcache.errors import BadInput
from featcache.probes.engine.blocks import Block, blocks, shared_sample
from featcache.probes.engine.memory import FeatureMemory, MemoryBudget, state_bytes
from featcache.probes.inputs.input import Input, Source
from featcache.probes.inputs.shared import shared_inputs
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.runs.probe_file import find_probes
from featcache.probes.runs.run_file import PARTIAL
from featcache.probes.runs.sealed_tensors import read_content
from featcache.probes.sample import Sample
from featcache.probes.solvers.solver import FullBatchSolver
from featcache.probes.spec import ProbeSpec, spec_from_dict
from featcache.progress import say
from featcache.store.reader import Store

# Rows of the shuffle buffer of each Source by name, None for features that are in memory.
Buffers = dict[str, int | None]


@dataclass(frozen=True)
class Wave:
    """Blocks that train on the same pass over one input, of which each reads some or all columns, on the same images.

    blocks: the ids of each block's probes, or the name of the file that holds its state. buffer_rows: of the shuffle
    buffer, None where the features are in memory.
    """

    blocks: list[list[str] | str]
    input: Input
    sample: Sample
    buffer_rows: int | None

    def to_json(self) -> list[Any]:
        """Return the wave as JSON values, to be sent to other processes."""
        return [self.blocks, self.input.feature, self.input.pooled, asdict(self.sample), self.buffer_rows]

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> "Wave":
        """Return the wave whose to_json() this is."""
        blocks, feature, pooled, sample, buffer_rows = content
        return cls(blocks, Input(feature, pooled), Sample(**sample), buffer_rows)


def blocks_by_input(
    specs: Iterable[ProbeSpec], store: Store, device: torch.device
) -> Iterator[tuple[Input, list[Block]]]:
    """Yield each input that the specs read, with the blocks that read it."""
    readers: dict[Input, list[ProbeSpec]] = {}
    for spec in specs:
        readers.setdefault(Input.of(spec), []).append(spec)
    for read, members in readers.items():
        dim, positions = read.shape(store)
        yield read, blocks(members, dim, positions, len(store.classes), MemoryBudget.of(device))


def plan_buffers(
    specs: Iterable[ProbeSpec],
    sets: TrainingSets,
    memory: float | None,
    device: torch.device,
    processes: int = 1,
) -> Buffers:
    """Return how each input of the grid is read, for each of the sets of images to train on.

    memory: bytes for features, by default half of what is free on the device. processes: how many share this machine.
    Raises BadInput if an optimizer needs an input in memory that does not fit.
    """
    specs = list(specs)
    room, shared = FeatureMemory.of(device, memory, processes), shared_inputs(specs)
    buffers: Buffers = {}
    for spec in specs:
        source, images = Source.of(spec), sets[spec.sample]
        if source.name not in buffers:
            size = shared[source].bytes(sets.store, images.splits, images.count)
            buffers[source.name] = room.buffer_rows(len(images), size)
        if buffers[source.name] is not None and isinstance(spec.optimizer, FullBatchSolver):
            size = shared[source].bytes(sets.store, images.splits, images.count)
            raise BadInput(
                f"{spec.optimizer.type} needs all of {source.input.feature} in memory, {size / 1e9:.3g} GB, and "
                f"{room.resident / 1e9:.3g} GB are for it; take another optimizer, or give more --memory"
            )
    return buffers


def plan_waves(
    folder: Path, specs: Sequence[ProbeSpec], store: Store, buffers: Buffers, device: torch.device
) -> list[Wave]:
    """Return the probes of a grid that a run folder lacks, as Waves."""
    shared, missing = shared_inputs(specs, buffers), missing_specs(folder, specs)
    if len(missing) < len(specs):
        say(f"run: {len(specs) - len(missing)} of {len(specs)} probes are trained already")
    states = _states(folder, {spec.id for spec in missing}, any(spec.refit for spec in specs))
    resumed = {spec.id for _, members in states for spec in members}
    waves = []
    for path, members in states:
        source = Source.of(members[0])
        waves.append(Wave([path.name], shared[source], source.sample, buffers[source.name]))
    groups: dict[tuple[Input, Sample, int | None], list[Block]] = {}
    for _, group in blocks_by_input([s for s in missing if s.id not in resumed], store, device):
        for block in group:
            source = Source.of(block[0])
            groups.setdefault((shared[source], shared_sample(block[0]), buffers[source.name]), []).append(block)
    for (whole, sample, buffer_rows), group in groups.items():
        for together in _together(group, store, buffer_rows, device):
            ids: list[list[str] | str] = [[spec.id for spec in block] for block in together]
            waves.append(Wave(ids, whole, sample, buffer_rows))
    return waves


def missing_specs(folder: Path, specs: Iterable[ProbeSpec]) -> list[ProbeSpec]:
    """Return the specs whose probes a run folder does not hold."""
    present = find_probes(folder)
    return [spec for spec in specs if spec.id not in present]


def unsaved(folder: Path, waves: Iterable[Wave]) -> list[Wave]:
    """Return the waves whose probes are not all saved. The state of a resumed block exists until they are."""
    present = find_probes(folder)

    def lacks(block: list[str] | str) -> bool:
        if isinstance(block, str):
            return (folder / PARTIAL / block).is_file()
        return not present.keys() >= set(block)

    return [wave for wave in waves if any(map(lacks, wave.blocks))]


def _together(group: Sequence[Block], store: Store, buffer_rows: int | None, device: torch.device) -> list[list[Block]]:
    """Divide blocks that read one input, or columns of it, into those that train on the same pass over the data.

    With pooled features in memory, one block trains at a time and stays in the cache. Otherwise a pass is expensive,
    and as many blocks share it as have room for their states.
    """
    # The same number of positions in all of them.
    positions = Input.of(group[0][0]).shape(store)[1]
    if buffer_rows is None and positions == 1:
        return [[block] for block in group]
    room, used = MemoryBudget.for_states(device), 0
    waves: list[list[Block]] = [[]]
    alone: list[list[Block]] = []
    for block in group:
        if block[0].optimizer.full_batch:
            alone.insert(0, [block])
            continue
        dim, _ = Input.of(block[0]).shape(store)
        size = len(block) * state_bytes(block[0].head, dim, len(store.classes), positions)
        if waves[-1] and used + size > room:
            waves, used = [*waves, []], 0
        waves[-1].append(block)
        used += size
    return [wave for wave in [*alone, *waves] if wave]


def _states(folder: Path, missing: set[str], refits: bool) -> list[tuple[Path, list[ProbeSpec]]]:
    """Return the states that a killed run left, with their specs, and remove those that are not needed.

    refits: whether the missing probes are refits, which are trained after all others; the states of the others stay.
    """
    states = []
    for path in sorted((folder / PARTIAL).glob("*.safetensors")):
        specs = [spec_from_dict(spec) for spec in read_content(path)["specs"]]
        if {spec.id for spec in specs} & missing:
            # Some of them may be finished, if the run was killed while it saved this block.
            states.append((path, specs))
        elif bool(specs[0].refit) == refits:
            path.unlink()
    return states
