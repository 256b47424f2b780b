"""What a head reads of a backbone's layers: one map, made of a feature or of several side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from featcache.backbones.backbone import Backbone
from featcache.feature import Feature, beside, parse_beside
from featcache.probes.spec import ProbeSpec
from featcache.store.reader import Store

# What is a mean over the positions of the layer's map, or the map itself.
OF_A_MAP = ("pooled", "patch_mean", "spatial")


@dataclass(frozen=True)
class Reading:
    """Features that a head reads side by side, as one map [B, D, h, w].

    A class token, a mean of a map and a grid(k,s,p) have one position; N tokens have N, one below the other.
    """

    features: tuple[Feature, ...]

    @classmethod
    def of(cls, spec: ProbeSpec, store: Store) -> "Reading":
        """Return what a probe is explained on. Raises BadInput if the store does not know its features.

        Means of maps become the maps, so that there are positions to point at: the head averages them itself. Several
        side by side do if the store has all their maps, and these are of one size.
        """
        read = tuple(map(store.manifest.feature, parse_beside(spec.features, store.manifest.aliases)))
        maps = tuple(Feature(feature.layer, "spatial") for feature in read)
        if any(feature.kind not in OF_A_MAP for feature in read):
            return cls(read)
        held = store.manifest.features
        sizes = [tuple(held[str(each)]["shape"][1:]) if str(each) in held else None for each in maps]
        return cls(maps if len(read) == 1 or (None not in sizes and len(set(sizes)) == 1) else read)

    def __str__(self) -> str:
        return beside(self.features)

    @property
    def is_map(self) -> bool:
        """Whether its positions lie side by side in the image."""
        return all(feature.kind == "spatial" for feature in self.features)

    def width(self, store: Store) -> int:
        """Return how many channels it has. The store may hold only means of a map."""
        return sum(_width(store, feature) for feature in self.features)

    def join(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Put features {name: [B, ...]}, as a backbone or a store yields them, side by side: [B, D, h, w]."""
        parts = [_as_map(feature, outputs[str(feature)]) for feature in self.features]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def of_images(self, backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
        """Run images [B, C, S, S] through the backbone: [B, D, h, w]."""
        return read_images(backbone, images, [self])[self]


def read_images(backbone: Backbone, images: torch.Tensor, readings: Sequence[Reading]) -> dict[Reading, torch.Tensor]:
    """Run images [B, C, S, S] through the backbone once, and return what each reading makes of it, [B, D, h, w]."""
    features = dict.fromkeys(feature for reading in readings for feature in reading.features)
    outputs = backbone(images, tuple(features))
    return {reading: reading.join(outputs) for reading in readings}


def _as_map(feature: Feature, values: torch.Tensor) -> torch.Tensor:
    if feature.kind == "spatial":
        return values
    if feature.kind == "tokens":
        return values.transpose(1, 2).unsqueeze(3)
    return values.flatten(1)[:, :, None, None]


def _width(store: Store, feature: Feature) -> int:
    held = store.manifest.features
    names = (str(Feature(feature.layer, kind)) for kind in OF_A_MAP) if feature.kind in OF_A_MAP else (str(feature),)
    shape: list[int] = next(held[name]["shape"] for name in names if name in held)
    if feature.kind == "grid":
        return math.prod(shape)
    return shape[1] if feature.kind == "tokens" else shape[0]
