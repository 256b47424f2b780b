"""What a grid would do: its stacks, memory and time, without training anything."""

import time
from collections import Counter
from dataclasses import dataclass

import torch

from featcache.arguments import FLAG, NAME, PATH, takes
from featcache.device import choose_device, free_bytes, multiplying
from featcache.errors import BadInput
from featcache.probes.features import feature_bytes, input_name, input_shape
from featcache.probes.gemm import multiply
from featcache.probes.grids.grid import Grid, load_grid
from featcache.probes.heads.head import footprint
from featcache.probes.heads.weights import initial_weights
from featcache.probes.resolve import resolve
from featcache.probes.scores.scoring import work
from featcache.probes.stack import FULL_BATCH_BYTES, stack_key
from featcache.probes.sweep import plan_buffers
from featcache.store.reader import open_store

# Copies of a probe's weights that training keeps: themselves, their gradient, and what the rule remembers.
COPIES = {"sgd": 3, "lars": 3, "adam": 4, "adamw": 4, "lbfgs": FULL_BATCH_BYTES // 4}
# About how often full-batch training goes over the images for a probe, by weight decays of 1e-8 to 0.1.
PASSES = 150
# What it keeps of each image: its features in both precisions, and logits, targets and their like.
ROTATED_BYTES, LOGITS_BYTES = 12, 8 * 10
# Of a layer's outputs: themselves, what the norm and activation make of them, and their gradients.
ACTIVATIONS = 4
GEMM_SECONDS = 0.03


@dataclass(frozen=True)
class PlannedStack:
    """Probes that train on the same mini-batches, in blocks that fit the cache: those of one stack.stack_key.

    loss: how many probes have which. precision: of the products. flops: of the whole training, of all probes, and
    only about so many where the optimiser (lbfgs) goes on until it has converged. seconds: about, at the rate of the
    stack's own matrix product. weight_bytes: weights, gradients and the optimiser's
    memory of one block; activation_bytes: of one batch of it. feature_bytes: of the training rows, as
    they are kept; streamed: they do not fit into the memory for features.
    """

    features: str
    head: object
    loss: dict
    optimizer: str
    precision: str
    epochs: int
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
    """A grid's stacks on a store. Without a store, stacks is empty, and missing says why.

    groups: [(name, number of probes)] in the grid's order. rows: of the training splits together.
    """

    grid: Grid
    groups: list
    stacks: list
    rows: int
    device: str
    free: int
    missing: str | None

    def __repr__(self):
        return f"Plan({self.grid}, {len(self.stacks)} stacks, {self.rows} images)"

    @property
    def probes(self):
        """Number of probes."""
        return len(self.grid.specs)

    @property
    def seconds(self):
        """Seconds of training, about."""
        return sum(stack.seconds for stack in self.stacks)

    @property
    def memory(self):
        """Bytes at the same time, about: one block trains at a time, on one feature."""
        return max(
            (s.feature_bytes * (not s.streamed) + s.weight_bytes + s.activation_bytes for s in self.stacks), default=0
        )


@takes(store=PATH, parity=NAME, allow_overlap=FLAG)
def plan_probes(grid, store=None, device=None, parity=None, memory=None, allow_overlap=False):
    """Say what train_probes would do with the same arguments; nothing is written or trained.

    Takes a fraction of a second, to measure the device. Returns a Plan. Raises BadInput for a grid that
    is wrong, or does not fit the store; a store that is not there only leaves the plan without stacks.
    """
    device = choose_device(device)
    checked = load_grid(grid, parity)
    groups = list(Counter(spec.name for spec in checked.specs).items())
    source = store or checked.store
    free = free_bytes(device)
    try:
        opened = open_store(source) if source else None
    except BadInput as error:
        return Plan(checked, groups, [], 0, str(device), free, error.message)
    if opened is None:
        return Plan(checked, groups, [], 0, str(device), free, "no store given")
    found = resolve(checked, opened, device, allow_overlap)
    specs, splits = found.specs, found.splits
    rows = sum(len(opened[name]) for name in splits["train"])
    buffers = plan_buffers(specs, opened, splits, memory, device)
    rates, stacks = {}, []
    for blocks, feature, pool in work(specs, opened, device):
        dim, positions = input_shape(opened, feature, pool)
        size = feature_bytes(opened, splits["train"], feature, pool)
        streamed = buffers[input_name(feature, pool)] is not None
        together = {}
        for block in blocks:
            together.setdefault(stack_key(block[0]), []).append(block)
        for members in together.values():
            shape = (dim, positions, rows, len(opened.classes))
            stacks.append(_stack(members, feature, shape, size, streamed, device, rates))
    return Plan(checked, groups, stacks, rows, str(device), free, None)


def probe_flops(head, dim, positions, classes):
    """Operations of one probe on one image, forward and backward: 4 D C for a linear one (docs/performance.md).

    A layer of n inputs and m outputs costs 2 n m forward and 2 n m for the weights' gradient, at every
    position; a layer behind it 2 n m more for the gradient of its input. The last layer of an MLP
    sees the mean over positions. Attention costs 4 D h S + 4 D D forward (attentive.py), and three times that in all.
    """
    if head.type == "attentive":
        return 3 * (4 * dim * (head.heads * positions + dim) + 2 * dim * classes)
    widths = [dim, *[head.hidden] * (head.layers - 1), classes]
    total = 0
    for i in range(head.layers):
        last = i == head.layers - 1
        at = 1 if last and i and head.type == "mlp" else positions
        total += (4 if i == 0 else 6) * widths[i] * widths[i + 1] * head.max_out * at
    return total


def _stack(blocks, feature, shape, size, streamed, device, rates):
    """Plan one stack. shape: width, positions, rows and classes. rates: {product's shape: measured}, filled here."""
    dim, positions, rows, classes = shape
    specs = [spec for block in blocks for spec in block]
    first, largest = specs[0], max(len(block) for block in blocks)
    lbfgs = first.optimizer.type == "lbfgs"
    passes = PASSES if lbfgs else first.epochs
    # Full-batch training sees no more directions than images.
    width = min(rows, dim) if lbfgs else dim
    flops = len(specs) * passes * rows * probe_flops(first.head, width, positions, classes)
    numbers = sum(w.numel() for w in initial_weights(first, dim, classes).values())
    weights, outputs = footprint(first.head, dim, classes, positions)
    batch = rows if lbfgs else min(first.batch_size, rows)
    product = ((1 if lbfgs else largest) * max(weights // dim, 1), dim, batch * positions, first.precision)
    activations = ACTIVATIONS * 4 * largest * outputs * batch * first.head.layers
    if lbfgs:
        activations = rows * (ROTATED_BYTES * width + LOGITS_BYTES * classes)
    if product not in rates:
        rates[product] = gemm_rate(*product, device)
    return PlannedStack(
        features=feature,
        head=first.head,
        loss=dict(Counter(s.loss.type for s in specs)),
        optimizer=first.optimizer.type,
        precision=first.precision,
        epochs=first.epochs,
        batch_size=first.batch_size,
        probes=len(specs),
        blocks=len(blocks),
        flops=flops,
        seconds=flops / rates[product],
        weight_bytes=COPIES[first.optimizer.type] * 4 * largest * numbers,
        activation_bytes=activations,
        feature_bytes=size,
        streamed=streamed,
    )


def gemm_rate(outputs, inputs, columns, precision, device):
    """Measure operations a second of a product [outputs, inputs] x [inputs, columns] in a precision on a device.

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


def _wait(result):
    """Until a device has computed a result."""
    result[0, 0].item()
