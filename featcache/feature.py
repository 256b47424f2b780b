"""The name of a feature: LAYER:REDUCE, as in `layer4:pooled`; and of several side by side: `last:cls + last:pooled`."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from featcache.errors import BadInput, nearest, shown

# The axes of a row after each reduction.
REDUCTIONS = {
    "pooled": ("channel",),
    "spatial": ("channel", "y", "x"),
    "cls": ("channel",),
    "patch_mean": ("channel",),
    "tokens": ("token", "channel"),
    "grid": ("channel", "y", "x"),
}
# The reductions as people write them.
WORDS = {name: name for name in REDUCTIONS} | {"grid": "grid(k,s,p)"}
# Stands between features that one head reads side by side.
BESIDE = " + "
WHOLE = re.compile(rf"(.*:)?({'|'.join(REDUCTIONS)})(\([^)]*\))?")


@dataclass(frozen=True)
class Feature:
    """A layer of a backbone, and how its output is reduced to a row.

    layer: a module path, or two joined by `+`: the output of the first, put through the second.
    If the output is a map, `pooled` is the mean over all positions, [C]; `spatial` is the map itself, [C, H, W];
    `grid(k,s,p)` is the map averaged over windows of k x k, s apart, with p zeros around it, as nn.AvgPool2d
    does, [C, h, w]. If it is tokens, `cls` is the class token, [D]; `patch_mean`, also called `pooled`, is the
    mean over the patches, [D]; `tokens` is all of them, [N, D]; `spatial` and `grid` see the patches as a map.
    """

    layer: str
    reduction: str

    def __str__(self) -> str:
        return f"{self.layer}:{self.reduction}"

    @property
    def kind(self) -> str:
        """The reduction without its numbers: a word of REDUCTIONS."""
        return self.reduction.partition("(")[0]

    @property
    def window(self) -> tuple[int, ...]:
        """Kernel, stride and padding of a grid."""
        return tuple(int(number) for number in self.reduction[len("grid(") : -1].split(","))

    @property
    def folder(self) -> str:
        """Name of the array in a store: ':', '(' and ',' are not allowed in file names everywhere."""
        return f"{self.layer}.{self.reduction.rstrip(')').replace('(', '-').replace(',', '-')}"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of one row, unique to this feature."""
        return tuple(f"{self.folder}.{axis}" for axis in REDUCTIONS[self.kind])

    def axes_of(self, row: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the axes of a row of this shape: `axes`, perhaps with that of masked variants before them."""
        return (f"{self.folder}.variant",) * (len(row) - len(self.axes)) + self.axes


def parse_feature(text: object, aliases: Mapping[str, str], known_layers: Collection[str] | None = None) -> Feature:
    """Turn `pooled`, `last:spatial`, `layer3:grid(8,3,0)` or `blocks.8+norm:cls` into a Feature, aliases resolved.

    A bare reduction means the last layer. aliases: names for people to module paths. known_layers: module paths, which
    the layer must be one of; None leaves it unchecked. Raises BadInput for an unknown reduction or layer.

        parse_feature("pooled", {"last": "layer4"})  # Feature("layer4", "pooled")
    """
    layer, _, reduction = re.sub(r"\s", "", str(text)).rpartition(":")
    layer = layer or "last"
    reduction = _reduction(text, reduction)
    layer = aliases.get(layer, layer)
    if known_layers is not None:
        parts = layer.split("+")
        for part in parts[:2]:
            if part not in known_layers:
                words = [*aliases, *known_layers] if len(parts) == 1 else known_layers
                raise BadInput(f"feature {text!r}: the backbone has no layer {part!r}{nearest(part, words)}")
        if len(parts) > 2:
            raise BadInput(f"feature {text!r}: more than one '+'; a layer is a module path, or LAYER+NORM")
    return Feature(layer, reduction)


def _reduction(text: object, word: str) -> str:
    """Check a reduction and write out the numbers of a grid: a stride defaults to the kernel, a padding to 0."""
    name, bracket, rest = word.partition("(")
    if name not in REDUCTIONS:
        raise BadInput(
            f"feature {text!r}: {name!r} is not one of {', '.join(WORDS.values())}{nearest(name, REDUCTIONS)}"
        )
    if name != "grid" and not bracket:
        return name
    numbers = re.fullmatch(r"(\d+)(?:,(\d+))?(?:,(\d+))?\)", rest)
    if name != "grid" or not numbers:
        raise BadInput(f"feature {text!r}: {word!r} is not one of {', '.join(WORDS.values())}")
    kernel = int(numbers[1])
    stride, padding = int(numbers[2] or kernel), int(numbers[3] or 0)
    if kernel < 1 or stride < 1 or padding > kernel // 2:
        raise BadInput(
            f"feature {text!r}: a grid needs kernel and stride of at least 1 and padding of at most half the kernel"
        )
    return f"grid({kernel},{stride},{padding})"


def parse_features(
    text: object, aliases: Mapping[str, str], known_layers: Collection[str] | None = None
) -> tuple[Feature, ...]:
    """Turn names separated by commas, or a list of names, into Features, each once, in the order given.

    `lastN:REDUCE` stands for the last N blocks of a transformer, first to last. The other arguments and the errors are
    those of parse_feature.
    """
    # A comma between brackets belongs to a grid.
    parts = re.split(r",(?![^(]*\))", text) if isinstance(text, str) else text
    if not isinstance(parts, list | tuple):
        raise BadInput(f"features: expected names separated by commas, or a list of them, not {shown(text)}")
    features: list[Feature] = []
    for part in parts:
        features += [parse_feature(name, aliases, known_layers) for name in _last_blocks(part, aliases)]
    return tuple(dict.fromkeys(features))


def _last_blocks(part: object, aliases: Mapping[str, str]) -> list[object]:
    """Return the names that `lastN:REDUCE` stands for; any other name stands for itself."""
    several = re.fullmatch(r"last([1-9]\d*):(.*)", str(part).strip())
    if not several or several[0].partition(":")[0] in aliases:
        return [part]
    layers = [f"last-{i}" for i in range(int(several[1]) - 1, 0, -1)] + ["last"]
    for layer in layers:
        if layer not in aliases:
            most = sum(alias.startswith("last-") for alias in aliases)
            have = f"its last {most + 1} blocks have names" if most else "it is no transformer"
            raise BadInput(f"feature {part!r}: the backbone has no {layer!r}; {have}")
    return [f"{layer}:{several[2]}" for layer in layers]


def split_beside(text: str) -> list[str]:
    """Return the names of the features that stand side by side in a text, each without blanks around it.

    A `+` within a layer, as in `blocks.8+norm:cls`, is not followed by a feature: what stands before it has no reduction.

        split_beside("blocks.8+norm:cls + pooled")  # ["blocks.8+norm:cls", "pooled"]
    """
    names, begun = [], ""
    for piece in text.split("+"):
        begun += piece
        if WHOLE.fullmatch(re.sub(r"\s", "", begun)):
            names.append(begun.strip())
            begun = ""
        else:
            begun += "+"
    return [*names, begun[:-1].strip()] if begun or not names else names


def parse_beside(
    text: str, aliases: Mapping[str, str], known_layers: Collection[str] | None = None
) -> tuple[Feature, ...]:
    """Turn features that one head reads side by side into Features, in order, aliases resolved.

    `lastN:REDUCE` stands for the last N blocks, as in parse_features, whose arguments and errors these are. Raises
    BadInput for a feature that is named twice.

        parse_beside("last2:cls + pooled", aliases)  # the class tokens of two blocks, and the mean of the patches
    """
    names = [name for part in split_beside(text) for name in _last_blocks(part, aliases)]
    features = [parse_feature(name, aliases, known_layers) for name in names]
    for feature in features:
        if features.count(feature) > 1:
            raise BadInput(f"features {text!r}: {feature} stands beside itself")
    return tuple(features)


def beside(features: Iterable[Feature]) -> str:
    """Return the name of features that one head reads side by side."""
    return BESIDE.join(map(str, features))
