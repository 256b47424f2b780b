"""A probe, fully specified: the head, and how it is trained. docs/grid.md has the fields' formulas."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property

from featcache.errors import BadInput

# How to say the logit offset at which an all-zero B-cos head starts every class at p = 1/C.
UNIFORM_OFFSET = "-ln(C-1)"
# How to say that the target of an absent class is one over the number of classes.
UNIFORM_TARGET = "1/C"
# When a schedule changes its factor after the warm-up, if it does not say.
PER = {"constant": "epoch", "step": "epoch", "cosine": "step"}
IMPORTED = "imported"


def later(default):
    """A field that came after the first runs: a probe's id leaves it out where it has its default."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Head:
    """linear: one layer. mlp: `layers` layers of width `hidden` with `norm` and `activation` between them.
    bcos: `layers` B-cos layers with exponent b and max_out responses a unit, `norm` between them.
    attentive: a learned query attends to the positions with `heads` attention heads, then one linear layer.

    All but attentive are 1x1 convolutions on the map; pool says whether the logits are averaged over
    positions (after, as How-to-Probe does) or the features are (before). hidden is 0 for a single layer.
    norm: bn, bnu (batch norm that leaves the mean, without bias) or none. norm_batch: images over which it takes its
    statistics in training, 0 for the whole mini-batch. bias: of every layer that no bn
    follows; bcos has none. activation: relu or gelu (the exact form, with erf), of mlp. The logits are
    divided by temperature, and then offset is added to them.
    """

    type: str
    layers: int = 1
    hidden: int = 0
    norm: str = "none"
    bias: bool = True
    pool: str = "after"
    b: float = later(1.0)
    max_out: int = later(1)
    offset: float | str = later(0.0)
    activation: str = later("relu")
    temperature: float = later(1.0)
    heads: int = later(0)
    norm_batch: int = later(0)

    @property
    def pools_first(self):
        """Whether pooled features give the same logits: the mean commutes with a plain linear layer alone."""
        return self.type == "linear" or self.pool == "before"


@dataclass(frozen=True)
class Loss:
    """bce, ce, focal or asymmetric; see losses.py for the formulas.

    off_label: target of an absent class for bce, a number or 1/C. class_weights: none or balanced.
    alpha, gamma: of focal. gamma_pos, gamma_neg, clip: of asymmetric. difficult: what a label of -1 is,
    ignored (no gradient) or negative.
    """

    type: str
    off_label: float | str = later(0.0)
    label_smoothing: float = later(0.0)
    class_weights: str = later("none")
    gamma: float = later(0.0)
    alpha: float = later(0.0)
    gamma_pos: float = later(0.0)
    gamma_neg: float = later(0.0)
    clip: float = later(0.0)
    difficult: str = later("ignored")


@dataclass(frozen=True)
class Optimizer:
    """sgd, adam, adamw, lars or lbfgs; see optimizers.py and convex.py for the update rules.

    lr is None for lbfgs; momentum is 0 for all but sgd and lars. clip: largest norm of the probe's gradient,
    0 for any. lr_base: 0, or the batch size that lr is meant for (ProbeSpec.rate). trust: of lars.
    iterations: the most Newton steps that lbfgs takes.

    imported: the probe was trained elsewhere; all numbers are None, for a file of weights tells none.
    """

    type: str
    lr: float | None = None
    momentum: float | None = 0.0
    weight_decay: float | None = 0.0
    nesterov: bool = later(False)
    trust: float = later(0.0)
    clip: float = later(0.0)
    lr_base: int = later(0)
    iterations: int = later(0)


@dataclass(frozen=True)
class Schedule:
    """constant, step or cosine after a linear warm-up; see schedules.py for the formulas. Or imported, as above.

    every: epochs between the steps, in place of milestones. final: factor at the end of the cosine.
    warmup_start: factor of the first step, 0 for one over the number of warm-up steps. per: step or epoch,
    when the factor changes after the warm-up; None is the type's own way (PER).
    """

    type: str = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float | None = 0.1
    warmup_epochs: float | None = 0.0
    every: int = later(0)
    final: float = later(0.0)
    warmup_start: float = later(0.0)
    per: str | None = later(None)


@dataclass(frozen=True)
class ProbeSpec:
    """All that decides a probe's weights, given a store and the order seed. seed draws its initial weights.

    source: of an imported probe the sha256 of its weights, which then stands for how it was trained:
    epochs, batch_size, seed and views are None.
    views: of the training images, over which the epochs rotate; 0 trains on the images as they are.
    None, in a grid, stands for all that the store has.
    keep: last or best, which epoch's weights, the best by the selection metric on the selection split.
    patience: epochs without a better value of it after which training ends, 0 for never.
    precision: of the matrix products, float32, tf32 or bf16; weights and all else are float32.
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
    views: int | None = later(0)
    source: str | None = later(None)
    keep: str = later("last")
    patience: int = later(0)
    precision: str = later("float32")

    @cached_property
    def id(self):
        """10 hex digits of the sha256 over every field but the name, and later ones at their defaults."""
        hashed = spec_to_dict(self)
        del hashed["name"]
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def configuration(self):
        """The same for probes that differ in their seed, and in name, alone."""
        return replace(self, name="", seed=None)

    @property
    def rate(self):
        """The learning rate: lr, times batch_size / lr_base if there is one (Goyal et al., 2017)."""
        optimizer = self.optimizer
        return optimizer.lr * self.batch_size / optimizer.lr_base if optimizer.lr_base else optimizer.lr

    @property
    def conflict(self):
        """What of the parts does not go together, as a line for the user, or None."""
        optimizer, schedule = self.optimizer, self.schedule
        if optimizer.type == "lbfgs" and self.head.type != "linear":
            return f"optimizer lbfgs trains linear heads, not {self.head.type}"
        if optimizer.type == "lbfgs" and self.views:
            return "optimizer lbfgs trains on the images as they are: say views: 0"
        if optimizer.type == "lbfgs" and (self.keep != "last" or self.patience):
            return "optimizer lbfgs has no epochs to choose from: leave out keep and patience"
        if self.precision == "bf16" and (optimizer.type == "lbfgs" or self.head.type == "attentive"):
            return f"precision bf16 is not for {'lbfgs' if optimizer.type == 'lbfgs' else 'attentive heads'}"
        if optimizer.nesterov and not optimizer.momentum:
            return "optimizer.nesterov needs a momentum above 0"
        if schedule.type == "step" and bool(schedule.milestones) == bool(schedule.every):
            return "schedule: a step needs either milestones or every"
        return None

    def flat(self):
        """Return the fields as {"optimizer.lr": 0.1, ...}, for tables."""
        row = {}
        for key, value in asdict(self).items():
            parts = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            row |= {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in parts.items()}
        return row


def spec_to_dict(part):
    """The fields of a ProbeSpec, or of a part of it, as nested dicts, without later ones at their defaults."""
    values = {f: getattr(part, f.name) for f in fields(part)}
    return {
        f.name: spec_to_dict(value) if is_dataclass(value) else value
        for f, value in values.items()
        if not (f.metadata.get("later") and value == f.default)
    }


def spec_from_dict(content):
    """Rebuild a ProbeSpec from spec_to_dict(), or dataclasses.asdict(), that went through JSON."""
    parts = {"head": Head, "loss": Loss, "optimizer": Optimizer}
    schedule = content["schedule"] | {"milestones": tuple(content["schedule"]["milestones"])}
    built = {key: make(**content[key]) for key, make in parts.items()}
    return ProbeSpec(**(content | built | {"schedule": Schedule(**schedule)}))


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
