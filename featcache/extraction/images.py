"""Decoding images in worker processes, in batches that never straddle a shard."""

import math
import os
import sys
import threading
from multiprocessing import connection, parent_process
from multiprocessing.queues import Queue

import click
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from featcache.backbones.input.preprocessing import OPENCV, import_opencv
from featcache.datasets.image import read_image
from featcache.errors import BadInput
from featcache.store.manifest import split_of

# What the identity of a store calls them.
DECODERS = {"exact": "pillow", "draft": "pillow-draft"}
# A JPEG is decoded at a part of its sides only where that leaves this many pixels for one of the input.
DRAFT_PIXELS = 2


def check_decoder(decoder, preprocessing):
    """Raise BadInput for a decoder (one of DECODERS) that is not known or does not go with the preprocessing."""
    if decoder not in DECODERS:
        raise BadInput(f"unknown decoder {decoder!r} (known: {', '.join(DECODERS)})")
    if preprocessing.interpolation == OPENCV:
        if decoder != "exact":
            raise BadInput(f"--decoder {decoder} does not go with --interpolation {OPENCV}, which resizes whole pixels")
        import_opencv()


def load_input(record, preprocessing, decoder="pillow", crop=None):
    """Decode a record's image and bring it to the backbone's input: uint8 [3, S, S]. See read_input."""
    return read_input(record, preprocessing, decoder, crop)[0]


def read_input(record, preprocessing, decoder, crop):
    """Return the input of the backbone, uint8 [3, S, S], of a record's image, and the image's digest.

    decoder: one of DECODERS' values. crop: (top, left, height, width, flip) of a view, in pixels of the
    original image, or None. Raises BadInput for an image that cannot be read or is not the annotated one.
    """
    top, left, height, width, flip = crop if crop is not None else (0, 0, record.height, record.width, 0)
    reduce = 1
    if decoder == DECODERS["draft"]:
        fits = (r for r in (8, 4, 2) if min(height, width) >= r * DRAFT_PIXELS * preprocessing.short)
        reduce = next(fits, 1)
    image, digest = read_image(record.image, reduce)
    if image.size == (record.width, record.height):
        reduce = 1
    elif image.size != (math.ceil(record.width / reduce), math.ceil(record.height / reduce)):
        raise BadInput(
            f"image {record.image} is {image.width}x{image.height} pixels, its annotation says "
            f"{record.width}x{record.height}: boxes would be wrong"
        )
    # Not the image's own size: that is rounded up where it was reduced.
    box = (left / reduce, top / reduce, (left + width) / reduce, (top + height) / reduce)
    if crop is None:
        return preprocessing.apply(image, box), digest
    return preprocessing.apply_view(image, box, bool(flip)), digest


class Images(Dataset):
    """The decoded images of all splits and views. Index: (split or view, row). Item: (uint8 [3, S, S], its
    digest, see read_image), or an error.

    crops: {view's name: int [N, 5]}, see load_input. An error travels as text because DataLoader wraps
    exceptions of its workers in a traceback.
    """

    def __init__(self, dataset, preprocessing, decoder="pillow", crops=None):
        self.splits = dataset.splits
        self.preprocessing = preprocessing
        self.decoder = decoder
        self.crops = crops or {}

    def records(self, group, first, end):
        """The records of some rows of a split or view."""
        return self.splits[split_of(group)][first:end]

    def __getitem__(self, key):
        group, row = key
        crop = self.crops[group][row].tolist() if group in self.crops else None
        try:
            return read_input(self.splits[split_of(group)][row], self.preprocessing, self.decoder, crop)
        except BadInput as error:
            return error.message


def _collate(items):
    for item in items:
        if isinstance(item, str):
            return item
    digests = np.array([np.frombuffer(digest, np.uint8) for _, digest in items])
    # [S, S, 3] is how the pixels lie: the one copy goes straight into memory that the processes share,
    # and what arrives is channels_last, as the backbone wants it.
    pixels = [pixels.permute(1, 2, 0) for pixels, _ in items]
    try:
        return default_collate(pixels), digests
    except RuntimeError:
        # Too little memory can be shared, 64 MB in Docker's containers: as an array the batch goes through a pipe.
        return torch.stack(pixels).numpy(), digests


def _begin_worker(_number):
    """Make a worker end with the main process, and never without its noticing."""

    # A main process that is stopped while it fetches a batch hangs up, and the thread of the worker that hands
    # batches over would print that as a traceback of its own, below the one line that says it was stopped.
    def hook(kind, error, traceback):
        if not issubclass(kind, (EOFError, ConnectionError)):
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook
    # That thread would else drop a batch that it cannot hand over, and the main process would wait for it forever.
    Queue._on_queue_feeder_error = staticmethod(lambda error, _batch: os._exit(getattr(error, "errno", None) or 1))

    def follow():
        connection.wait([parent_process().sentinel])
        # Not sys.exit, which waits for batches to be read that nobody reads any more.
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def image_batches(images, batches, workers, pin_memory=False):
    """Yield (uint8 [B, 3, S, S], channels_last, and digests uint8 [B, 16]) for each batch, a list of keys of Images.

    Where the machine has too little for workers, or for handing batches over in shared memory, a notice says so,
    and the same batches come more slowly. Raises BadInput for the first image that cannot be used, naming its path.
    """

    def begin(workers):
        return iter(
            DataLoader(
                images,
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=_collate,
                worker_init_fn=_begin_worker,
                pin_memory=pin_memory,
                prefetch_factor=4 if workers else None,
            )
        )

    try:
        loader = begin(workers)
    except OSError as error:
        if not workers:
            raise
        # No semaphore in a full /dev/shm, or no process more.
        click.echo(f"notice: no worker can be started ({error.strerror}); images are decoded without workers", err=True)
        loader = begin(0)
    shared = True
    for batch in loader:
        if isinstance(batch, str):
            raise BadInput(batch)
        pixels, digests = batch
        if isinstance(pixels, np.ndarray):
            if shared:
                click.echo(
                    "notice: shared memory (/dev/shm) is too small for batches of images; they go through pipes, which "
                    "is slower. docker run --shm-size 2g gives a container more",
                    err=True,
                )
            shared, pixels = False, torch.from_numpy(pixels)
        yield pixels.permute(0, 3, 1, 2), digests
