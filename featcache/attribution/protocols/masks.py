"""Images as they are, with the segmentation of their objects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from featcache.attribution.batch import Source
from featcache.attribution.explained import Explained
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.targets import Target
from featcache.datasets.record import Record
from featcache.errors import BadInput
from featcache.progress import Progress
from featcache.ranks import say_once


class Masks(Protocol):
    """Every class that has an object with a mask is explained, and maps should point at the objects' pixels.

    Void pixels do not count, and neither do those of the class's difficult objects. Masks are read from the data set.
    """

    type: Literal["masks"] = "masks"
    region: ClassVar[str] = "masks"

    def pose(
        self, source: Source, limit: int | None, explained: Sequence[Explained]
    ) -> tuple[Source, Sequence[Target]]:
        """See Protocol.pose. Raises BadInput without the data set, and where none of its images has masks."""
        split = source.split
        if source.records is None:
            raise BadInput(f"--protocol {self.type} reads the data set's segmentation: give --dataset and --root")
        shown = [row for row, record in enumerate(source.records) if not record.box_difficult.all()]
        masked = [row for row in shown if source.records[row].masks is not None]
        if not masked:
            raise BadInput(
                f"--protocol {self.type}: no image of split {split.name} has a segmentation mask (VOC: in "
                "SegmentationClass/ and SegmentationObject/, COCO: segmentation of its annotations); take --protocol boxes"
            )
        if len(masked) < len(shown):
            left_out = len(shown) - len(masked)
            say_once(f"notice: {left_out} of {len(shown)} images with objects have no mask; they are left out")
        targets: list[Target] = []
        images = 0
        # The annotations of COCO take minutes.
        with Progress("masks", len(masked), unit="img", fleeting=True) as progress:
            for row in masked:
                if images == limit:
                    break
                own = _targets_of(row, source.records[row], source)
                images += bool(own)
                targets += own
                progress.update()
        if not targets:
            raise BadInput(
                f"--protocol {self.type}: no mask of split {split.name} has a pixel in what the backbone sees"
            )
        return replace(source, note="masks"), targets


def _targets_of(row: int, record: Record, source: Source) -> list[Target]:
    """Return the Targets of an image with masks: every class that has a visible pixel."""
    assert record.masks is not None, "images without masks are left out"
    objects = source.preprocessing.map_masks(record.masks.read())
    border = record.masks.read_void()
    outside = False if border is None else source.preprocessing.map_masks(border)
    targets = []
    for label in sorted(set(record.box_classes[~record.box_difficult].tolist())):
        alike = record.box_classes == label
        mask = objects[alike & ~record.box_difficult].any(0)
        void = (objects[alike & record.box_difficult].any(0) | outside) & ~mask
        if mask.any():
            targets.append(Target(row, label, torch.from_numpy(mask), torch.from_numpy(void)))
    return targets
