"""Decoding images in worker processes, batch by batch."""

import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection, parent_process
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.utils.data

from featcache.backbones.input.preprocessing import OPENCV, Preprocessing, import_opencv
from featcache.datasets.image import read_image
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput
from featcache.progress import say
from featcache.store.manifest import split_of

# What users call the decoders, and what the identity of a store calls them.
DECODERS = {"exact": "pillow", "draft": "pillow-draft"}
# A JPEG is decoded at a part of its sides only if that leaves so many pixels for each one of the input, on a side.
DRAFT_PIXELS = 2

# An image's input, uint8 [3, S, S], and its digest; or what is wrong with it.
Item = tuple[torch.Tensor, bytes] | str
# A batch's pixels, [B, S, S, 3], and digests, uint8 [B, 16]; or what is wrong with one of its images.
Collated = tuple[torch.Tensor | np.ndarray, np.ndarray] | str


def check_decoder(decoder: str, preprocessing: Preprocessing) -> None:
    """Raise BadInput for a decoder that is not one of DECODERS, or does not go with the preprocessing."""
    if decoder not in DECODERS:
        raise BadInput(f"unknown decoder {decoder!r} (known: {', '.join(DECODERS)})")
    if preprocessing.interpolation == OPENCV:
        if decoder != "exact":
            raise BadInput(f"--decoder {decoder} does not go with --interpolation {OPENCV}, which resizes whole pixels")
        import_opencv()


def load_input(
    record: Record, preprocessing: Preprocessing, decoder: str = "pillow", crop: Sequence[int] | None = None
) -> torch.Tensor:
    """Decode a record's image and bring it to the backbone's input: uint8 [3, S, S]. Takes the arguments of read_input.

    record = read_dataset("voc", "/data").splits["val"][0]
    pixels = load_input(record, load_backbone("ckpt.pth").preprocessing)
    """
    return read_input(record, preprocessing, decoder, crop)[0]


def read_input(
    record: Record, preprocessing: Preprocessing, decoder: str, crop: Sequence[int] | None
) -> tuple[torch.Tensor, bytes]:
    """Return the backbone's input for a record's image, uint8 [3, S, S], and the image's digest.

    record: with the size of its image. decoder: one of DECODERS' values. crop: (top, left, height, width, flip) of a
    view, in pixels of the original image, or None. Raises BadInput for an image that cannot be read or is not the
    annotated one.
    """
    if record.height is None or record.width is None:
        raise ValueError(f"record {record.id} does not say how large its image is; read_dataset completes records")
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
    # The size of a reduced image would not do: it is rounded up.
    box = (left / reduce, top / reduce, (left + width) / reduce, (top + height) / reduce)
    if crop is None:
        return preprocessing.apply(image, box), digest
    return preprocessing.apply_view(image, box, bool(flip)), digest


class Images(torch.utils.data.Dataset[Item]):
    """The decoded images of all splits and views, by (name of the split or view, row).

    crops: {name of a view: int [N, 5]}, see read_input. What is wrong with an image is an item too, since a DataLoader
    would wrap an exception of its workers in a traceback.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing,
        decoder: str = "pillow",
        crops: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.splits = dataset.splits
        self.preprocessing = preprocessing
        self.decoder = decoder
        self.crops = crops or {}

    def records(self, name: str, first: int, end: int) -> Sequence[Record]:
        """Return the records of some rows of a split or view."""
        return self.splits[split_of(name)][first:end]

    def __getitem__(self, key: tuple[str, int]) -> Item:
        name, row = key
        crop = self.crops[name][row].tolist() if name in self.crops else None
        try:
            return read_input(self.splits[split_of(name)][row], self.preprocessing, self.decoder, crop)
        except BadInput as error:
            return error.message


def _collate(items: list[Item]) -> Collated:
    good = []
    for item in items:
        if isinstance(item, str):
            return item
        good.append(item)
    digests = np.array([np.frombuffer(digest, np.uint8) for _, digest in good])
    # In memory the pixels are [S, S, 3]: the one copy goes straight into memory that the processes share, and the batch
    # arrives channels_last, as the backbone wants it.
    pixels = [pixels.permute(1, 2, 0) for pixels, _ in good]
    try:
        return torch.utils.data.default_collate(pixels), digests
    except RuntimeError:
        # Too little memory can be shared, as in Docker's containers (64 MB): an array goes through a pipe.
        return torch.stack(pixels).numpy(), digests


def _begin_worker(_number: int) -> None:
    """Make a worker end when the main process does, and never without the main process noticing."""

    # A main process that is stopped while it fetches a batch hangs up. The worker's thread that hands batches over would
    # print that as a traceback, below the one line that says that the command was stopped.
    def hook(error_type: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(error_type, (EOFError, ConnectionError)):
            sys.__excepthook__(error_type, error, traceback)

    sys.excepthook = hook

    # That thread would otherwise drop a batch that it cannot hand over, for which the main process would wait forever.
    def give_up(error: Exception, _batch: object) -> NoReturn:
        os._exit(getattr(error, "errno", None) or 1)

    # setattr, since this hook of the standard library is private and has no type.
    setattr(Queue, "_on_queue_feeder_error", staticmethod(give_up))  # noqa: B010
    main = parent_process()
    assert main is not None, "a worker has a parent"

    def follow() -> NoReturn:
        connection.wait([main.sentinel])
        # sys.exit would wait until somebody has read all batches, which nobody does any more.
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def image_batches(
    images: Images, batches: Iterable[list[Any]], workers: int, pin_memory: bool = False
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Yield (pixels uint8 [B, 3, S, S], channels_last, digests uint8 [B, 16]) for each batch.

    batches: lists of keys of Images. If the machine lacks what workers need, or shared memory, a notice says so, and the
    same batches come more slowly. Raises BadInput for the first image that cannot be used, naming its path.
    """

    def begin(workers: int) -> Iterator[Collated]:
        return iter(
            torch.utils.data.DataLoader(
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
        # There is no room for a semaphore in /dev/shm, or no further process may be started.
        say(f"notice: no worker can be started ({error.strerror}); images are decoded without workers")
        loader = begin(0)
    shared = True
    for batch in loader:
        if isinstance(batch, str):
            raise BadInput(batch)
        pixels, digests = batch
        if isinstance(pixels, np.ndarray):
            if shared:
                say(
                    "notice: shared memory (/dev/shm) is too small for batches of images; they go through pipes, which "
                    "is slower. docker run --shm-size 2g gives a container more"
                )
            shared, pixels = False, torch.from_numpy(pixels)
        yield pixels.permute(0, 3, 1, 2), digests
