"""The plan of a grid: its stacks, their memory and time, without training anything."""

import itertools
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featcache.arguments import FLAG, NAME, PATH, takes
from featcache.device import choose_device, free_bytes, multiplying
from featcache.errors import BadInput
from featcache.probes.engine.blocks import Block
from featcache.probes.engine.waves import blocks_by_input, plan_buffers
from featcache.probes.gemm import multiply
from featcache.probes.grids.grid import Grid, load_grid
from featcache.probes.heads.head import Head
from featcache.probes.inputs.input import Source
from featcache.probes.inputs.shared import shared_inputs
from featcache.probes.resolve import resolve
from featcache.probes.solvers.solver import FullBatchSolver, MiniBatchSolver
from featcache.probes.weights import initial_weights
from featcache.store.reader import open_store

# Tensors of the size of a layer's outputs that training holds: the outputs, what norm and activation make of them, and
# the gradients.
ACTIVATIONS = 4
GEMM_SECONDS = 0.03


@dataclass(frozen=True)
class PlannedStack:
    """Probes that train on the same mini-batches (they share a Block.key), in blocks that fit the cache.

    loss: {loss: number of probes}. full_batch: whether the optimizer sees all images at once. precision: of the matrix
    products. flops: for training all probes to the end, an estimate where the optimizer stops when it has converged.
    seconds: an estimate, at the measured rate of the stack's own matrix product. weight_bytes: weights, gradients and
    optimizer state of one block. activation_bytes: of one batch of one block. feature_bytes: of the training rows as
    they are kept, with those of other stacks that share them. streamed: whether these exceed the memory for features.
    """

    features: str
    head: Head
    loss: dict[str, int]
    optimizer: str
    full_batch: bool
    precision: str
    epochs: int | None
    batch_size: int
    probes: int
    blocks: int
    flops: float
    seconds: float
    weight_bytes: int
    activation_bytes: int
    feature_bytes: int
    streamed: bool


@dataclass(frozen=True, repr=False)
class Plan:
    """The stacks of a grid on a store. Without a store, stacks is empty and missing says why.

    groups: [(name, number of probes)] in the order of the grid. rows: number of training images. free: bytes of free
    memory on the device.
    """

    grid: Grid
    groups: list[tuple[str, int]]
    stacks: list[PlannedStack]
    rows: int
    device: str
    free: int
    missing: str | None

    def __repr__(self) -> str:
        return f"Plan({self.grid}, {len(self.stacks)} stacks, {self.rows} images)"

    @property
    def probes(self) -> int:
        """Number of probes."""
        return len(self.grid.specs)

    @property
    def seconds(self) -> float:
        """About how many seconds training takes."""
        return sum(stack.seconds for stack in self.stacks)

    @property
    def memory(self) -> int:
        """About how many bytes are held at once: one block trains at a time, on one feature."""
        return max(
            (s.feature_bytes * (not s.streamed) + s.weight_bytes + s.activation_bytes for s in self.stacks), default=0
        )


@takes(store=PATH, parity=NAME, allow_overlap=FLAG)
def plan_probes(
    grid: str | Path | dict[str, Any],
    store: str | Path | None = None,
    device: str | None = None,
    parity: str | None = None,
    memory: float | None = None,
    allow_overlap: bool = False,
) -> Plan:
    """Return the Plan of what train_probes would do with the same arguments. Nothing is written or trained.

    It takes a fraction of a second to measure the device. Raises BadInput for a grid that is wrong or does not fit the
    store; without a store the plan just has no stacks.

        featcache.plan_probes("grid.yaml", store="features/voc.zarr").seconds
    """
    chosen_device = choose_device(device)
    checked = load_grid(grid, parity)
    groups = list(Counter(spec.name for spec in checked.specs).items())
    source = store or checked.store
    free = free_bytes(chosen_device)
    try:
        opened = open_store(source) if source else None
    except BadInput as error:
        return Plan(checked, groups, [], 0, str(chosen_device), free, error.message)
    if opened is None:
        return Plan(checked, groups, [], 0, str(chosen_device), free, "no store given")
    resolved = resolve(checked, opened, chosen_device, allow_overlap)
    sets = resolved.sets
    specs = [*resolved.specs, *(fold for spec in resolved.specs for fold in spec.with_folds(resolved.folds or 0))]
    buffers, shared = plan_buffers(specs, sets, memory, chosen_device), shared_inputs(specs)
    rates: dict[Hashable, float] = {}
    stacks = []
    for read, blocks in blocks_by_input(specs, opened, chosen_device):
        for _, alike in itertools.groupby(blocks, lambda block: block.key):
            members = list(alike)
            reading, images = Source.of(members[0][0]), sets[members[0][0].sample]
            size = shared[reading].bytes(opened, images.splits, images.count)
            data = (read.feature, size, buffers[reading.name] is not None)
            shape = (*read.shape(opened), len(images), len(opened.classes))
            stacks.append(_stack(members, data, shape, chosen_device, rates))
    rows = sum(len(opened[name]) for name in resolved.splits["train"])
    return Plan(checked, groups, stacks, rows, str(chosen_device), free, None)


def _stack(
    blocks: Sequence[Block],
    data: tuple[str, int, bool],
    shape: tuple[int, int, int, int],
    device: torch.device,
    rates: dict[Hashable, float],
) -> PlannedStack:
    """Plan the stack of some blocks.

    data: feature, bytes of the training rows, and whether they are streamed. shape: width, positions, rows and classes.
    rates: {shape of a product: operations a second}, to which the stack's own is added.
    """
    (feature, feature_bytes, streamed), (dim, positions, rows, classes) = data, shape
    specs = [spec for block in blocks for spec in block]
    first, largest = specs[0], max(map(len, blocks))
    solver, head = first.optimizer, first.head
    numbers = sum(w.numel() for w in initial_weights(first, dim, classes).values())
    weights, outputs = head.footprint(dim, classes, positions)
    if isinstance(solver, FullBatchSolver):
        # It trains all probes side by side, in no more directions than there are images.
        passes, width, batch, at_once = solver.passes(), min(rows, dim), rows, largest
        activations = rows * solver.image_bytes(width, classes)
    elif not solver.trains:
        passes, width, batch, at_once, activations = 0, dim, 1, 1, 0
    else:
        assert isinstance(solver, MiniBatchSolver), "a grid's optimizers are of one sort or the other"
        passes, width, batch, at_once = first.epochs or 0, dim, min(first.batch_size or rows, rows), largest
        activations = ACTIVATIONS * 4 * largest * outputs * batch * head.depth
    flops = len(specs) * passes * rows * head.flops(width, classes, positions)
    product = (at_once * max(weights // dim, 1), dim, batch * positions, first.precision)
    if product not in rates:
        rates[product] = gemm_rate(*product, device)
    return PlannedStack(
        features=feature,
        head=head,
        loss=dict(Counter(s.loss.type for s in specs)),
        optimizer=solver.type,
        full_batch=solver.full_batch,
        precision=first.precision,
        epochs=first.epochs,
        batch_size=first.batch_size or rows,
        probes=len(specs),
        blocks=len(blocks),
        flops=flops,
        seconds=flops / rates[product],
        weight_bytes=solver.weight_copies * 4 * largest * numbers
        if isinstance(solver, FullBatchSolver | MiniBatchSolver)
        else 0,
        activation_bytes=activations,
        feature_bytes=feature_bytes,
        streamed=streamed,
    )


def gemm_rate(outputs: int, inputs: int, columns: int, precision: str, device: torch.device) -> float:
    """Measure the operations a second of a product [outputs, inputs] x [inputs, columns] on a device.

    Sizes beyond a few thousand make no difference and are cut, so that this takes a few hundredths of a second.
    """
    left = torch.ones(min(outputs, 4096), min(inputs, 2048), device=device)
    right = torch.ones(min(inputs, 2048), min(columns, 1024), device=device)
    with multiplying("tf32" if precision == "tf32" else "float32"):
        _wait(multiply(left, right, precision))
        started, times = time.perf_counter(), 0
        while time.perf_counter() - started < GEMM_SECONDS:
            _wait(multiply(left, right, precision))
            times += 1
    return 2 * times * left.numel() * right.shape[1] / (time.perf_counter() - started)


def _wait(result: torch.Tensor) -> None:
    """Wait until a device has computed a result."""
    result[0, 0].item()
