"""The images and the masks of How-to-Probe's evaluation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from featcache.attribution.batch import Network, Source
from featcache.attribution.explained import Explained
from featcache.attribution.protocols.boxes import Boxes
from featcache.attribution.protocols.gridpg import GridPG
from featcache.attribution.targets import Target
from featcache.backbones.input.box_mask import box_mask
from featcache.errors import BadInput
from featcache.probes.heads.bcos import Bcos

# What differs from the default. Each can be had alone, to measure what it does (tests/benchmarks/parity.py).
QUIRKS = frozenset(
    (
        "smoothing",
        "rounding",
        "edges",
        "empty",
        "normalisation",
        "convolution",
        "relevance",
        "head",
        "box",
        "images",
        "contrast",
    )
)
# CLIP's statistics.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# How many images are explained: the first of VOC's test split, and a draw of COCO's.
FIRST_OF_VOC, DRAWN_OF_COCO = 1001, 2001
MOST_PER_CLASS = 100


class PublishedBoxes(Boxes):
    """The images of EPG on VOC and COCO, squashed and normalised by CLIP's statistics, with box edges rounded down."""

    quirks: frozenset[str] = QUIRKS

    def pose(
        self, source: Source, limit: int | None, explained: Sequence[Explained]
    ) -> tuple[Source, Sequence[Target]]:
        """See Protocol.pose. limit: takes the place of the published number of images."""
        source = self._prepared(source)
        split, targets = source.split, list[Target]()
        for row in self._rows(source, limit):
            boxes, classes, difficult = split.boxes[row]
            for label in sorted(set(classes[~difficult].tolist())):
                mask = self._mask(source, row, boxes[(classes == label) & ~difficult])
                if "edges" in self.quirks or mask.any():
                    targets.append(Target(row, label, mask))
        if not targets:
            raise BadInput(f"split {split.name} of store {split.store.path} has no box to score against")
        return source, targets

    def _rows(self, source: Source, limit: int | None) -> list[int]:
        """Return the rows of the images, in order."""
        boxes = source.split.boxes
        marked = [row for row, (_, _, difficult) in enumerate(boxes) if not difficult.all()]
        if "images" not in self.quirks or limit is not None:
            return marked[:limit]
        if _dataset(source).startswith("coco"):
            # The published order is drawn anew by every run.
            drawn = random.Random(0).sample(marked, min(DRAWN_OF_COCO, len(marked)))
            return sorted(drawn)
        return [row for row in marked if row < FIRST_OF_VOC]

    def _prepared(self, source: Source) -> Source:
        """Return the source of the images as they are prepared for the backbone. Raises BadInput without one."""
        if "normalisation" not in self.quirks:
            return source
        own = replace(source.preprocessing, resize="squash", short_side=None, interpolation="bilinear")
        if not own.inverse:
            own = replace(own, mean=CLIP_MEAN, std=CLIP_STD)
        if own == source.preprocessing:
            return source
        network = source.network
        if network is None or network.prepared is None:
            raise BadInput(
                "--parity how-to-probe prepares images otherwise than the store, and runs the backbone: give --backbone, "
                "--dataset and --root"
            )
        other = replace(network, picture=network.prepared(own))
        return replace(source, preprocessing=own, network=other, masked={}, stored=False)

    def _mask(self, source: Source, row: int, boxes: np.ndarray) -> torch.Tensor:
        """Return the mask of the union of boxes [M, 4] of an image: bool [S, S]."""
        size, (height, width) = source.preprocessing.size, source.split.sizes[row].tolist()
        if "edges" not in self.quirks:
            return box_mask(source.preprocessing.map_boxes(boxes, height, width)[0], size)
        mask = torch.zeros(size, size, dtype=torch.bool)
        # The numbers in VOC's files, which count from 1, are taken as they are.
        first = 1 if _dataset(source).startswith("voc") else 0
        for x0, y0, x1, y1 in boxes.tolist():
            left, right = (size * int(x) // width for x in (x0 + first, x1))
            top, bottom = (size * int(y) // height for y in (y0 + first, y1))
            mask[top:bottom, left:right] = True
        return mask


class PublishedGridPG(GridPG):
    """Grids of images that every explained probe is sure of, at most 100 of a class, with stretched contrast."""

    quirks: frozenset[str] = QUIRKS

    def usable(self, source: Source, explained: Sequence[Explained]) -> np.ndarray:
        """Return the first images of each class of which all probes are sure: B-cos heads by a sigmoid, others by softmax."""
        if "images" not in self.quirks:
            return super().usable(source, explained)
        labels, usable = source.split.labels, np.ones(len(source.split), bool)
        for one in (one for one in explained if not one.note):
            link = "sigmoid" if isinstance(one.head.head, Bcos) else "softmax"
            usable &= one.confidence(source.split, source.device, link) >= (self.confidence or 0)
        for label in np.unique(labels):
            usable[np.flatnonzero(usable & (labels == label))[MOST_PER_CLASS:]] = False
        return usable

    def picture(self, network: Network) -> Callable[[int], torch.Tensor]:
        """Return the pictures with their values stretched to 0..255, as they were saved."""
        if "contrast" not in self.quirks:
            return network.picture
        return lambda row: stretched(network.picture(row))


def stretched(picture: torch.Tensor) -> torch.Tensor:
    """Stretch a picture, uint8 [3, S, S], so that its least value is 0 and its largest 255; fractions are cut off."""
    values = picture.float() / 255
    low, high = values.min(), values.max()
    return ((values - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255).to(torch.uint8)


def _dataset(source: Source) -> str:
    """Return the name of the dataset that a source's images are of."""
    identity = source.split.store.manifest.identity
    return str(identity.get("dataset", {}).get("name", ""))
