"""A probe, fully specified: the head, and how it is trained."""

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Head:
    """linear: one layer. mlp: `layers` layers of width `hidden` with `norm` and ReLU between them.

    Heads are 1x1 convolutions on the map; pool says whether the logits are averaged over positions
    (after, as How-to-Probe does) or the features are (before). hidden is 0 for linear. bias: of every
    layer that no batch norm follows.
    """

    type: str
    layers: int = 1
    hidden: int = 0
    norm: str = "none"
    bias: bool = True
    pool: str = "after"


@dataclass(frozen=True)
class Loss:
    """bce: mean over classes of binary cross-entropy. ce: softmax cross-entropy. See losses.py."""

    type: str


@dataclass(frozen=True)
class Optimizer:
    """sgd or adam with PyTorch's update rules; momentum is 0 for adam."""

    type: str
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """constant, step or cosine after a linear warm-up; see schedules.py for the formulas."""

    type: str = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0


@dataclass(frozen=True)
class ProbeSpec:
    """All that decides a probe's weights, given a store and the order seed. seed draws its initial weights.

    views: of the training images, over which the epochs rotate; 0 trains on the images as they are.
    None, in a grid, stands for all that the store has.
    """

    name: str
    features: str
    head: Head
    loss: Loss
    optimizer: Optimizer
    schedule: Schedule
    epochs: int
    batch_size: int
    seed: int
    views: int | None = 0

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
