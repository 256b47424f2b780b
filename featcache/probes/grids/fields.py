"""The fields of a grid's group: what each may be, and its default."""

import math

from featcache.errors import BadInput, nearest, shown
from featcache.feature import parse_feature
from featcache.probes.gemm import PRECISIONS
from featcache.probes.spec import (
    PER,
    UNIFORM_OFFSET,
    UNIFORM_TARGET,
    Head,
    Loss,
    Optimizer,
    Schedule,
)


class Number:
    """A number in a range; text such as 1e-3, which YAML 1.1 does not read as a number, is coerced."""

    def __init__(self, low, high=math.inf, integer=False, above=False, default=None):
        self.low, self.high, self.integer, self.above, self.default = low, high, integer, above, default

    def read(self, value):
        """Return the number, or raise ValueError that says what is expected."""
        kind = "a whole number" if self.integer else "a number"
        expected = f"{kind} {'above' if self.above else 'of at least'} {self.low:g}"
        expected += f" and at most {self.high:g}" if self.high < math.inf else ""
        try:
            # A whole number stays what it is: a float has 53 bits, and a seed 63.
            number = value if isinstance(value, int) and self.integer else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        inside = (number > self.low if self.above else number >= self.low) and number <= self.high
        whole = not self.integer or (abs(number) < 2**63 and number == int(number))
        if isinstance(value, bool) or not inside or not whole or number == math.inf:
            raise ValueError(f"{shown(value)} is not {expected}")
        return int(number) if self.integer else number


class Choice:
    """One of a few words, or true/false."""

    def __init__(self, *words, default=None):
        self.words, self.default = words, default

    def read(self, value):
        """Return the word, or raise ValueError with the nearest one."""
        for word in self.words:
            if value == word and isinstance(value, bool) == isinstance(word, bool):
                return word
        raise ValueError(f"{shown(value)} is not one of {', '.join(map(str, self.words))}{nearest(value, self.words)}")


class Text:
    """A non-empty string."""

    default = None

    def read(self, value):
        """Return the string, or raise ValueError."""
        if not isinstance(value, str) or not value:
            raise ValueError(f"{shown(value)} is not a word")
        return value


class FeatureName(Text):
    """LAYER:REDUCE; the layer is looked for in the store."""

    def read(self, value):
        """Return the string, or raise ValueError."""
        try:
            parse_feature(super().read(value), {})
        except BadInput as error:
            raise ValueError(error.message) from None
        return value


class NumberOr(Number):
    """A number, or a formula, which becomes one when the number of classes is known."""

    def __init__(self, formula, low, high, default):
        super().__init__(low, high, default=default)
        self.formula = formula

    def read(self, value):
        """Return the number or the formula, or raise ValueError."""
        if value == self.formula:
            return value
        try:
            return super().read(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {self.formula}{nearest(value, [self.formula])}") from None


class Milestones:
    """A list by nature: epochs (whole numbers) or fractions of the run (below 1), rising."""

    default = ()

    def read(self, value):
        """Return a tuple of floats, or raise ValueError."""
        if not isinstance(value, (list, tuple)):
            raise TypeError
        points = tuple(Number(0, above=True).read(v) for v in value)
        if list(points) != sorted(set(points)) or any(p >= 1 and p != int(p) for p in points):
            raise ValueError(f"{shown(value)} is not a rising list of epochs, or of fractions below 1")
        return points


class Views:
    """A whole number, or `all`, which reads as None: all that the store has."""

    default = "all"

    def read(self, value):
        """Return the number or None, or raise ValueError."""
        if value == "all":
            return None
        try:
            return Number(0, integer=True).read(value)
        except ValueError as error:
            raise ValueError(f"{error}, nor all{nearest(value, ['all'])}") from None


def _head(type, **fields):
    if type == "bcos":
        fields["bias"] = False
        if fields["layers"] == 1:
            # Nothing lies between layers: the widths and norms of a grid are meant for its deeper heads.
            fields |= {"hidden": 0, "norm": "none"}
    if fields.get("norm") == "none":
        fields["norm_batch"] = 0
    return Head(type, **fields)


def _schedule(type, per=None, **fields):
    # Written out or not, the type's own way is the same schedule.
    return Schedule(type, per=None if per == PER[type] else per, **fields)


OFFSET = NumberOr(UNIFORM_OFFSET, -1e6, 1e6, default=0.0)
# Of every head.
SCALE = {"temperature": Number(0, above=True, default=1.0), "offset": OFFSET}
LOGITS = {"pool": Choice("after", "before", default="after"), **SCALE}
BIAS = {"bias": Choice(True, False, default=True)}
HIDDEN = Number(1, integer=True, default=2048)
NORM_BATCH = Number(0, integer=True, default=0)
# Of every loss.
DIFFICULT = {"difficult": Choice("ignored", "negative", default="ignored")}
WEIGHED = {
    "label_smoothing": Number(0, 1, default=0.0),
    "class_weights": Choice("none", "balanced", default="none"),
    **DIFFICULT,
}
# Of every optimiser, and of those that take a step for every mini-batch.
DECAY = {"weight_decay": Number(0, default=0.0)}
RATE = {"lr": Number(0, above=True)}
STEPS = {
    **DECAY,
    "clip": Number(0, default=0.0),
    "lr_base": Number(0, integer=True, default=0),
}
MOMENTUM = Number(0, 0.9999, default=0.9)
# Of every schedule.
WARMUP = {"warmup_epochs": Number(0, default=0.0), "warmup_start": Number(0, 1, default=0.0)}
# Sections that are chosen by their `type`, with the fields of each type.
SECTIONS = {
    "head": (_head, {
        "linear": {**BIAS, **LOGITS},
        "mlp": {
            "layers": Number(2, 8, integer=True, default=2),
            "hidden": HIDDEN,
            "activation": Choice("relu", "gelu", default="relu"),
            "norm": Choice("bn", "bnu", "none", default="bn"),
            "norm_batch": NORM_BATCH,
            **BIAS,
            **LOGITS,
        },
        "bcos": {
            "layers": Number(1, 8, integer=True, default=1),
            "hidden": HIDDEN,
            "b": Number(1, 16, default=2.0),
            "max_out": Number(1, 64, integer=True, default=1),
            "norm": Choice("bnu", "none", default="bnu"),
            "norm_batch": NORM_BATCH,
            **LOGITS,
        },
        "attentive": {"heads": Number(1, 1024, integer=True, default=8), **BIAS, **SCALE},
    }),
    "loss": (Loss, {
        "bce": {"off_label": NumberOr(UNIFORM_TARGET, 0, 1, default=0.0), **WEIGHED},
        "ce": WEIGHED,
        "focal": {"gamma": Number(0, 100, default=2.0), "alpha": Number(0, 1, default=0.25), **DIFFICULT},
        "asymmetric": {
            "gamma_pos": Number(0, 100, default=0.0),
            "gamma_neg": Number(0, 100, default=4.0),
            "clip": Number(0, 0.9999, default=0.05),
            **DIFFICULT,
        },
    }),
    "optimizer": (Optimizer, {
        "sgd": {**RATE, "momentum": MOMENTUM, "nesterov": Choice(True, False, default=False), **STEPS},
        "adam": {**RATE, **STEPS},
        "adamw": {**RATE, **STEPS},
        "lars": {**RATE, "momentum": MOMENTUM, "trust": Number(0, above=True, default=0.001), **STEPS},
        "lbfgs": {**DECAY, "iterations": Number(1, 1_000_000, integer=True, default=1000)},
    }),
    "schedule": (_schedule, {
        "constant": WARMUP,
        "step": {
            "milestones": Milestones(),
            "every": Number(0, integer=True, default=0),
            "gamma": Number(0, 1, above=True, default=0.1),
            "per": Choice("step", "epoch", default="epoch"),
            **WARMUP,
        },
        "cosine": {"final": Number(0, 1, default=0.0), "per": Choice("step", "epoch", default="step"), **WARMUP},
    }),
}  # fmt: skip
FIELDS = {
    "features": FeatureName(),
    "epochs": Number(1, integer=True),
    "batch_size": Number(1, integer=True, default=64),
    "seed": Number(0, 2**63 - 1, integer=True, default=0),
    "views": Views(),
    "keep": Choice("last", "best", default="last"),
    "patience": Number(0, integer=True, default=0),
    "precision": Choice(*PRECISIONS, default="float32"),
}
DEFAULTS = {"schedule": "constant"}
# Of the grid as a whole.
SEARCH = {
    "halving": {"factor": Number(1, 100, above=True, default=3.0), "first": Number(0, 1, above=True, default=0.1)},
}
