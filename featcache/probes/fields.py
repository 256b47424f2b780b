"""The fields of a grid's group: what each may be, and its default."""

import math

from featcache.errors import nearest, shown
from featcache.probes.spec import UNIFORM_OFFSET, Head, Loss, Optimizer, Schedule


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
        if isinstance(value, bool) or not inside or number == math.inf or (self.integer and number != int(number)):
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


class Offset(Number):
    """A number of either sign, or -ln(C-1), which becomes one when the number of classes is known."""

    def read(self, value):
        """Return the number or the word, or raise ValueError."""
        if value == UNIFORM_OFFSET:
            return value
        try:
            return super().read(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {UNIFORM_OFFSET}") from None


class Fraction(Number):
    """A number, or 1/C."""

    def read(self, value):
        """Return the number or the word, or raise ValueError."""
        return value if value == "1/C" else super().read(value)


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
            raise ValueError(f"{error}, nor all") from None


WARMUP = {
    "warmup_epochs": Number(0, default=0.0),
    "warmup_start": Number(0, 1, default=0.0),
    "per": Choice("step", "epoch", default="step"),
}
DECAY = {"weight_decay": Number(0, default=0.0)}


def _head(type, **fields):
    if type == "bcos":
        fields["bias"] = False
        if fields["layers"] == 1:
            # Nothing lies between layers: the widths and norms of a grid are meant for its deeper heads.
            fields |= {"hidden": 0, "norm": "none"}
    return Head(type, **fields)


# Of every head.
LOGITS = {
    "pool": Choice("after", "before", default="after"),
    "offset": Offset(-1e6, 1e6, default=0.0),
}
BIAS = {"bias": Choice(True, False, default=True)}
HIDDEN = Number(1, integer=True, default=2048)
DIFFICULT = Choice("ignored", "negative", default="ignored")
# Sections that are chosen by their `type`, with the fields of each type.
SECTIONS = {
    "head": (_head, {
        "linear": {**BIAS, **LOGITS},
        "mlp": {
            "layers": Number(2, 8, integer=True, default=2),
            "hidden": HIDDEN,
            "norm": Choice("bn", "bnu", "none", default="bn"),
            **BIAS,
            **LOGITS,
        },
        "bcos": {
            "layers": Number(1, 8, integer=True, default=1),
            "hidden": HIDDEN,
            "b": Number(1, 16, default=2.0),
            "max_out": Number(1, 64, integer=True, default=1),
            "norm": Choice("bnu", "none", default="bnu"),
            **LOGITS,
        },
    }),
    "loss": (Loss, {
        "bce": {"off_label": Fraction(0, 1, default=0.0), "difficult": DIFFICULT},
        "ce": {"difficult": DIFFICULT},
    }),
    "optimizer": (Optimizer, {
        "sgd": {"lr": Number(0, above=True), "momentum": Number(0, 0.9999, default=0.9), **DECAY},
        "adam": {"lr": Number(0, above=True), **DECAY},
    }),
    "schedule": (Schedule, {
        "constant": WARMUP,
        "step": {"milestones": Milestones(), "every": Number(0, default=0.0), "gamma": Number(0, 1, above=True, default=0.1), **WARMUP},
        "cosine": WARMUP,
    }),
}  # fmt: skip
FIELDS = {
    "features": Text(),
    "epochs": Number(1, integer=True),
    "batch_size": Number(1, integer=True, default=64),
    "seed": Number(0, 2**63 - 1, integer=True, default=0),
    "views": Views(),
    "keep": Choice("last", "best", default="last"),
    "patience": Number(0, integer=True, default=0),
    "precision": Choice("float32", "tf32", "bf16", default="float32"),
}
DEFAULTS = {"schedule": "constant"}
# Of the grid as a whole.
SEARCH = {"halving": {"factor": Number(1, 100, above=True, default=3.0), "first": Number(0, 1, above=True, default=0.1)}}
