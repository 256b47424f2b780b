"""Which probes go into one stack, and what a stack of trained ones says."""

import hashlib
import math
from dataclasses import dataclass

import torch

from featcache.device import multiplying
from featcache.probes.features import CHUNK_ROWS
from featcache.probes.heads.head import STACKS, footprint
from featcache.probes.heads.weights import side_by_side
from featcache.probes.optimizers import common

# With so many rows in a batch a product does not wait for weights to come from memory.
MANY_ROWS = 1024
MIN_ROWS = 32


@dataclass(frozen=True)
class Room:
    """Bytes of the probes trained at a time: a layer's weights, the numbers that it makes, and logits in a loss at a time.

    A stack keeps several copies of each layer's numbers, and the optimiser of its weights.
    """

    weights: int
    activations: int
    losses: int


# Weights and momentum should stay in the last-level cache, activations leave room for other things, and what a loss
# computes element by element stay in the second-level cache.
CPU_ROOM = Room(24 << 20, 256 << 20, 2 << 20)
# On a GPU a step costs its launches, so it should be one for all: as much as leaves room for features on a small one.
GPU_ROOM = Room(512 << 20, 512 << 20, 256 << 20)
# What full-batch training keeps of each weight of a probe until all of a block are trained: it, twice, in float32.
FULL_BATCH_BYTES = 2 * 4


def room_of(device):
    """The Room on a torch.device."""
    return CPU_ROOM if device.type == "cpu" else GPU_ROOM


@dataclass(frozen=True, repr=False)
class TrainedProbe:
    """What training leaves of a probe.

    weights: {name: float32 CPU tensor}. losses: mean training loss of every epoch. diverged: the step
    (from 0, over all epochs) at which its loss stopped being finite, or None; its weights are then NaN.
    epoch: after which the weights were taken. scores: validation metric after every epoch, NaN where it
    was not asked for. stopped: what ended training early ("patience", "halving", of lbfgs
    "iterations"), or None.
    """

    spec: object
    weights: dict
    losses: list
    diverged: int | None
    epoch: int | None = None
    scores: list = ()
    stopped: str | None = None

    def __repr__(self):
        shapes = ", ".join(f"{name} {list(weight.shape)}" for name, weight in self.weights.items())
        return f"TrainedProbe({self.spec.id}, {shapes})"

    @property
    def diverged_epoch(self):
        """The epoch, from 1, in which it diverged, or None."""
        if self.diverged is None:
            return None
        return next((n for n, loss in enumerate(self.losses, 1) if not math.isfinite(loss)), len(self.losses))


def blocks(specs, dim, positions, classes, room=CPU_ROOM):
    """Group specs into blocks that train together: same features, views, head, batches and rule; as the room is.

    specs: of one feature, of which dim is the width and positions the size of the map (1 if
    pooled). Returns lists of specs, in order of first appearance.
    """
    shapes = {}
    for spec in specs:
        shapes.setdefault(stack_key(spec), []).append(spec)
    result = []
    for members in shapes.values():
        head, optimizer, batch_size = members[0].head, members[0].optimizer, members[0].batch_size
        # Sorted, so that each loss sees one slice of the stack, and that most stacks have one momentum.
        members.sort(key=lambda s: (s.optimizer.momentum or 0.0, repr(s.loss)))
        weights, activations = footprint(head, dim, classes, positions)
        # A probe that was trained elsewhere has no batch size: it is only scored.
        cached = head.type == "linear" or (batch_size or CHUNK_ROWS) * positions < MANY_ROWS
        fit = (room.weights if cached else room.activations) // (4 * weights)
        fit = min(fit, room.activations // (4 * activations * rows_at_once(batch_size, positions)))
        if optimizer.type == "lbfgs":
            fit = min(fit, room.activations // (FULL_BATCH_BYTES * weights))
        count = -(-len(members) // max(fit, 1))
        size = -(-len(members) // count)
        result += [members[i : i + size] for i in range(0, len(members), size)]
    return result


def stack_key(spec):
    """What the probes of one feature that train together have in common."""
    loop = (spec.epochs, spec.batch_size, spec.keep, spec.patience, spec.precision)
    return spec.features, spec.views, spec.head, common(spec.optimizer), loop


def block_name(specs):
    """A name for the file of some probes, from their ids."""
    return hashlib.sha256(" ".join(spec.id for spec in specs).encode()).hexdigest()[:16]


def held_bytes(head, dim, positions, classes):
    """Of a probe while it trains, about: weights, their gradients and two moments at most, float32. As for blocks()."""
    return 16 * head.layers * footprint(head, dim, classes, positions)[0]


def rows_at_once(batch_size, positions):
    """How many images a stack sees at a time: a mini-batch, or in scoring enough to keep it busy."""
    return max(batch_size or 1, MANY_ROWS // positions)


def predict(stack, spec, features):
    """Logits [P, n, C] of a stack of probes like spec, of float32 features [n, D] or [n, D, S], always in float32."""
    rows = rows_at_once(spec.batch_size, features[0, 0].numel())
    with multiplying("float32"):
        # In memory as one part is, [P, C, n], so that a probe's numbers lie alike in any company.
        parts = [stack.forward(part).permute(1, 2, 0) for part in features.split(rows)]
    return (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).transpose(1, 2)


def padded(specs, classes):
    """Repeat the last probe until the block has MIN_ROWS outputs.

    BLAS libraries compute a row of a product in the same way however many rows there are, but for
    very few, where they use other kernels. So a probe alone gets the bits that it gets in a stack.
    """
    width = specs[0].head.hidden or classes
    return [*specs, *[specs[-1]] * (-(-MIN_ROWS // width) - len(specs))]


class Predictor:
    """Trained probes of one block, ready to be asked for their logits.

    weights: one {name: tensor} a spec.
    """

    def __init__(self, specs, weights, classes, device):
        full = padded(specs, classes)
        self._spec, self._probes = specs[0], len(specs)
        weights = [*weights, *[weights[-1]] * (len(full) - len(specs))]
        self._stack = STACKS[specs[0].head.type](full, side_by_side(weights, device))

    @torch.no_grad()
    def __call__(self, features):
        """Map features [n, D] or [n, D, S], any float dtype, to logits float32 [P, n, C] where the features are."""
        return predict(self._stack, self._spec, features.float())[: self._probes]
