"""The name of a feature: LAYER:REDUCE, as in `layer4:pooled`."""

from dataclasses import dataclass

from featcache.errors import BadInput, nearest

# What each reduction leaves of a row, axis by axis.
REDUCTIONS = {"pooled": ("channel",), "spatial": ("channel", "y", "x")}


@dataclass(frozen=True)
class Feature:
    """One layer of a backbone and how its map is reduced.

    `pooled` is the mean over all positions, [C]; `spatial` is the map itself, [C, H, W].
    """

    layer: str
    reduction: str

    def __str__(self):
        return f"{self.layer}:{self.reduction}"

    @property
    def folder(self):
        """Name of the array in a store: ':' is not allowed in file names everywhere."""
        return f"{self.layer}.{self.reduction}"

    @property
    def axes(self):
        """Names of the axes of one row, unique to this feature."""
        return tuple(f"{self.folder}.{axis}" for axis in REDUCTIONS[self.reduction])


def parse_feature(text, aliases, known_layers=None):
    """Turn `pooled`, `last:spatial` or `layer3:pooled` into a Feature with its aliases resolved.

    A bare reduction means the last layer. Raises BadInput for an unknown reduction or layer.
    """
    layer, _, reduction = str(text).strip().rpartition(":")
    layer = layer or "last"
    if reduction not in REDUCTIONS:
        raise BadInput(
            f"feature {text!r}: {reduction!r} is not one of {', '.join(REDUCTIONS)}{nearest(reduction, REDUCTIONS)}"
        )
    layer = aliases.get(layer, layer)
    if known_layers is not None and layer not in known_layers:
        words = [*aliases, *known_layers]
        raise BadInput(f"feature {text!r}: the backbone has no layer {layer!r}{nearest(layer, words)}")
    return Feature(layer, reduction)


def parse_features(text, aliases, known_layers=None):
    """Turn a comma-separated list into Features, each once, in the order given."""
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(dict.fromkeys(parse_feature(part, aliases, known_layers) for part in parts))
