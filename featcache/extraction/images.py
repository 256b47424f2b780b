"""Decoding images in worker processes, in batches that never straddle a shard."""

import torch
from torch.utils.data import DataLoader, Dataset

from featcache.datasets.image import open_image
from featcache.errors import BadInput


class Images(Dataset):
    """The decoded images of all splits. Index: (split, row). Item: uint8 [3, S, S], or an error's text.

    An error travels as text because DataLoader wraps exceptions of its workers in a traceback.
    """

    def __init__(self, dataset, preprocessing):
        self.records = dataset.splits
        self.preprocessing = preprocessing

    def __getitem__(self, key):
        split, row = key
        record = self.records[split][row]
        try:
            image = open_image(record.image)
        except BadInput as error:
            return error.message
        if image.size != (record.width, record.height):
            return (
                f"image {record.image} is {image.width}x{image.height} pixels, its annotation says "
                f"{record.width}x{record.height}: boxes would be wrong"
            )
        return self.preprocessing.apply(image)


def _collate(items):
    for item in items:
        if isinstance(item, str):
            return item
    return torch.stack(items)


def image_batches(dataset, preprocessing, batches, workers, pin_memory=False):
    """Yield uint8 [B, 3, S, S] for each batch, a list of (split, row), in order.

    Raises BadInput for the first image that cannot be used, naming its path.
    """
    loader = DataLoader(
        Images(dataset, preprocessing),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise BadInput(batch)
        yield batch
