"""A probe, fully specified: the head, and how it is trained."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from featcache.errors import BadInput

# How to say the logit offset at which an all-zero B-cos head starts every class at p = 1/C.
UNIFORM_OFFSET = "-ln(C-1)"
IMPORTED = "imported"


@dataclass(frozen=True)
class Head:
    """linear: one layer. mlp: `layers` layers of width `hidden` with `norm` and ReLU between them.
    bcos: `layers` B-cos layers with exponent b and max_out responses a unit, `norm` between them.

    Heads are 1x1 convolutions on the map; pool says whether the logits are averaged over positions
    (after, as How-to-Probe does) or the features are (before). hidden is 0 for a single layer. norm:
    bn, bnu (batch norm that leaves the mean, without bias) or none. bias: of every layer that no bn
    follows; bcos has none. offset: a constant added to every logit.
    """

    type: str
    layers: int = 1
    hidden: int = 0
    norm: str = "none"
    bias: bool = True
    pool: str = "after"
    b: float = 1.0
    max_out: int = 1
    offset: float | str = 0.0

    @property
    def pools_first(self):
        """Whether pooled features give the same logits: the mean commutes with a plain linear layer alone."""
        return self.type == "linear" or self.pool == "before"


@dataclass(frozen=True)
class Loss:
    """bce: mean over classes of binary cross-entropy. ce: softmax cross-entropy. See losses.py."""

    type: str


@dataclass(frozen=True)
class Optimizer:
    """sgd or adam with PyTorch's update rules; momentum is 0 for adam.

    imported: the probe was trained elsewhere; all numbers are None, for a file of weights tells none.
    """

    type: str
    lr: float | None
    momentum: float | None = 0.0
    weight_decay: float | None = 0.0


@dataclass(frozen=True)
class Schedule:
    """constant, step or cosine after a linear warm-up; see schedules.py for the formulas. Or imported, as above."""

    type: str = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float | None = 0.1
    warmup_epochs: float | None = 0.0


@dataclass(frozen=True)
class ProbeSpec:
    """All that decides a probe's weights, given a store and the order seed. seed draws its initial weights.

    source: of an imported probe the sha256 of its weights, which then stands for how it was trained:
    epochs, batch_size, seed and views are None.
    views: of the training images, over which the epochs rotate; 0 trains on the images as they are.
    None, in a grid, stands for all that the store has.
    """

    name: str
    features: str
    head: Head
    loss: Loss
    optimizer: Optimizer
    schedule: Schedule
    epochs: int | None
    batch_size: int | None
    seed: int | None
    views: int | None = 0
    source: str | None = None

    @property
    def id(self):
        """10 hex digits of the sha256 over every field but the name, and views if there are none."""
        fields = asdict(self)
        del fields["name"]
        if self.views == 0:
            del fields["views"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]

    def flat(self):
        """Return the fields as {"optimizer.lr": 0.1, ...}, for tables."""
        row = {}
        for key, value in asdict(self).items():
            parts = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            row |= {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in parts.items()}
        return row


def spec_from_dict(fields):
    """Rebuild a ProbeSpec from asdict() that went through JSON."""
    parts = {"head": Head, "loss": Loss, "optimizer": Optimizer}
    schedule = fields["schedule"] | {"milestones": tuple(fields["schedule"]["milestones"])}
    built = {key: make(**fields[key]) for key, make in parts.items()}
    return ProbeSpec(**(fields | built | {"schedule": Schedule(**schedule)}))


def imported_spec(name, features, head, loss, source):
    """Return the spec of a probe that was trained elsewhere: what is not known of it is None."""
    optimizer = Optimizer(IMPORTED, lr=None, momentum=None, weight_decay=None)
    schedule = Schedule(IMPORTED, gamma=None, warmup_epochs=None)
    return ProbeSpec(name, features, head, Loss(loss), optimizer, schedule, None, None, None, None, source)


def logit_offset(offset, classes):
    """Return a head's offset as a number. Raises BadInput where -ln(C-1) has none."""
    if offset != UNIFORM_OFFSET:
        return offset
    if classes < 2:
        raise BadInput(f"offset {UNIFORM_OFFSET} needs at least two classes, and the store has {classes}")
    return -math.log(classes - 1)
