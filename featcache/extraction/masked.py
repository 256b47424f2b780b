"""The features of an image's masked variants, which attribution methods read from a store of their own."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from featcache.backbones.backbone import Backbone
from featcache.backbones.input.box_mask import box_mask
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput
from featcache.extraction.masks.masking import Masking
from featcache.feature import Feature

# Passes through the backbone whose results are in one shard: so many are lost when an extraction is killed.
SHARD_PASSES = 4096


def masked_features(
    model: Backbone, masking: Masking, image: torch.Tensor, id: str, features: Sequence[Feature], batch_size: int
) -> dict[str, torch.Tensor]:
    """Run the variants of a normalised image [1, C, S, S] through the backbone: {name of a feature: [1, N, ...]}.

    id: of the image. features: of the backbone, and perhaps the one that the masking notes, [1, 1, S, S].
    """
    run = [feature for feature in features if feature != masking.noted]
    made, count = masking.start(image[0], id), masking.number(image.shape[-1])
    parts = []
    for first in range(0, count, batch_size):
        parts.append(model(masking.masked(image[0], made, first, min(first + batch_size, count)), run))
    results = {str(feature): torch.cat([part[str(feature)] for part in parts])[None] for feature in run}
    if masking.noted in features:
        results[str(masking.noted)] = masking.note(made)[None].float()
    return results


def choose_images(data: Dataset, preprocessing: Preprocessing, limit: int | None) -> Dataset:
    """Return a dataset with those images alone that attribute explains: of each split the first that have a box.

    A box counts if it is not difficult and holds the centre of a pixel of the input. A split without boxes keeps its
    first images. limit: how many images of a split, None for all. Raises BadInput for a dataset without images.
    """
    chosen = {}
    for split, records in data.splits.items():
        boxed = any(len(record.boxes) for record in records)
        own = [record for record in records if not boxed or _has_target(record, preprocessing)][:limit]
        if not own:
            raise BadInput(f"--masks: no image of split {split} has a box to explain")
        chosen[split] = tuple(own)
    return replace(data, splits=chosen)


def _has_target(record: Record, preprocessing: Preprocessing) -> bool:
    assert record.height is not None and record.width is not None, "read_dataset completes records"
    boxes, _ = preprocessing.map_boxes(record.boxes[~record.box_difficult], record.height, record.width)
    return bool(box_mask(boxes, preprocessing.size).any())
