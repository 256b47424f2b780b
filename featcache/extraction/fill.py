"""Computing features and writing them to stores, shard by shard."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from featcache.backbones.precision import running
from featcache.errors import BadInput
from featcache.extraction.images import Images, image_batches
from featcache.extraction.job import Job
from featcache.extraction.masked import masked_features
from featcache.progress import Progress
from featcache.ranks import Alone
from featcache.store.manifest import feature_of
from featcache.store.shard import Shard
from featcache.store.writer import put_shard


@dataclass(frozen=True, eq=False)
class Stretch:
    """Rows of a split that are read together, from the first to the end, and the shards of stores that they fill.

    shards: (number of the store's job, shard). No shard reaches out of the stretch.
    """

    split: str
    first: int
    end: int
    shards: tuple[tuple[int, Shard], ...]

    def __len__(self) -> int:
        return self.end - self.first


def stretches(todo: Sequence[Sequence[Shard]]) -> list[Stretch]:
    """Join the shards of several stores into the shortest stretches. todo: those of each store, in order."""
    order = {split: number for number, split in enumerate(dict.fromkeys(shard.split for own in todo for shard in own))}
    shards = [(number, shard) for number, own in enumerate(todo) for shard in own]
    joined: list[Stretch] = []
    for number, shard in sorted(shards, key=lambda one: (order[one[1].split], one[1].rows[0])):
        (first, end), last = shard.rows, joined[-1] if joined else None
        if last and last.split == shard.split and first < last.end:
            joined[-1] = Stretch(last.split, last.first, max(last.end, end), (*last.shards, (number, shard)))
        else:
            joined.append(Stretch(shard.split, first, end, ((number, shard),)))
    return joined


def fill(jobs: Sequence[Job], todo: Sequence[Sequence[Shard]], images: Images, ranks: Alone) -> None:
    """Compute and write shards of stores, each with the features of its manifest, as the processes draw them.

    jobs: of stores that read the same images in the same batches. todo: the shards of each, all of one part of its store.
    Worker processes decode every image once for all stores, this thread runs the backbones, and another one writes.
    """
    work = stretches(todo)
    if not work:
        return
    first = jobs[0]
    # All parts of a store have the same.
    batch_size = work[0].shards[0][1].manifest.compute["batch_size"]
    for job in jobs:
        job.model.to(job.device)
    drawn: deque[Stretch] = deque()
    # The variants of an image are a batch of their own, or several.
    batches = _batches(ranks.draw(work), drawn, 1 if first.masking else batch_size)
    side, on_gpu = first.model.preprocessing.size, first.device.type == "cuda"
    memory = torch.empty(batch_size, side, side, 3, device=first.device)
    progress = Progress("extract", sum(map(len, work)), unit="img")
    stretch: Stretch | None = None
    row = 0
    filled: dict[int, _Rows] = {}
    writing: dict[int, Future[None]] = {}
    with ThreadPoolExecutor(1) as writer, progress:
        # The copy of features from a GPU waits for the forward pass, so that its time is known without waiting otherwise.
        for pixels, digests in progress.waiting(
            "decode", image_batches(images, batches, first.settings.workers, pin_memory=on_gpu), "forward"
        ):
            if stretch is None or row == stretch.end:
                stretch = drawn.popleft()
                row = stretch.first
            filled |= {n: _Rows(shard, jobs[n], images) for n, shard in stretch.shards if shard.rows[0] == row}
            on_device = pixels.to(first.device, non_blocking=True)
            for number, rows in list(filled.items()):
                job = jobs[number]
                with running(job.settings.precision, job.device):
                    normalised = job.model.preprocessing.normalise(on_device, memory)
                    rows.add(_features(job, normalised, rows, batch_size), digests)
                if rows.are_complete:
                    if number in writing:
                        progress.phase("write")
                        writing[number].result()
                        progress.phase("forward")
                    writing[number] = writer.submit(put_shard, rows.shard, rows.ids, rows.stored(), rows.digests())
                    del filled[number]
            row += len(pixels)
            progress.reach(ranks.count(len(pixels)))
        progress.phase("write")
        for written in writing.values():
            written.result()


def _features(job: Job, images: torch.Tensor, rows: "_Rows", batch_size: int) -> dict[str, torch.Tensor]:
    """Return the features of normalised images [B, C, S, S], or of the variants of one, which come next in a shard."""
    if job.masking is None:
        return job.model(images, rows.features)
    return masked_features(job.model, job.masking, images, rows.next_id, rows.features, batch_size)


def _batches(work: Iterator[Stretch], drawn: deque[Stretch], size: int) -> Iterator[list[tuple[str, int]]]:
    """Yield the keys of Images for each batch of stretches, and append each stretch to `drawn` before its first batch.

    The last batch of a stretch is short rather than reaching into the next one.
    """
    for stretch in work:
        drawn.append(stretch)
        for start in range(stretch.first, stretch.end, size):
            yield [(stretch.split, row) for row in range(start, min(start + size, stretch.end))]


class _Rows:
    """The rows of a shard while its batches come in. ids: of all its rows. features: those of its manifest."""

    def __init__(self, shard: Shard, job: Job, images: Images) -> None:
        self.shard = shard
        self.ids = [record.id for record in images.records(shard.split, *shard.rows)]
        self._precision = job.settings.precision
        self._dtype: torch.dtype = getattr(torch, job.settings.dtype)
        shapes = {name: spec["shape"] for name, spec in shard.manifest.features.items()}
        self.features = [feature_of(name) for name in shapes]
        self._features = {name: torch.empty((len(shard), *row), dtype=self._dtype) for name, row in shapes.items()}
        self._digests: list[np.ndarray] = []
        self._count = 0

    def add(self, features: Mapping[str, torch.Tensor], digests: np.ndarray) -> None:
        """Add a batch: features [B, ...] and digests of the images, uint8 [B, 16]. Raises BadInput, see _cast."""
        start, end = self._count, self._count + len(digests)
        first_row = self.shard.rows[0] + start
        for name, values in features.items():
            cast = _cast(values, self._dtype, name, first_row, self.ids[start:], self._precision)
            self._features[name][start:end] = cast
        self._digests.append(digests)
        self._count = end

    @property
    def next_id(self) -> str:
        """The id of the first row that has not come yet."""
        return self.ids[self._count]

    @property
    def are_complete(self) -> bool:
        """Whether all rows of the shard have come."""
        return self._count == len(self.shard)

    def stored(self) -> dict[str, np.ndarray]:
        """Return the features as they are stored, {name: [rows, ...]}."""
        return {name: _as_stored(rows) for name, rows in self._features.items()}

    def digests(self) -> np.ndarray:
        """Return the digests of the images, uint8 [rows, 16]."""
        return np.concatenate(self._digests)


def _as_stored(rows: torch.Tensor) -> np.ndarray:
    """Return a numpy view of a tensor; bfloat16, which numpy lacks, comes as uint16."""
    return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def _cast(
    values: torch.Tensor, dtype: torch.dtype, name: str, first_row: int, ids: Sequence[str], precision: str = "float32"
) -> torch.Tensor:
    """Cast float32 [B, ...] to the store's dtype, on the CPU. Raises BadInput for values that the dtype cannot hold.

    name: of the feature. first_row, ids: of the rows. precision: of the network, which may explain an overflow.
    """
    cast = values.to(dtype)
    fine = torch.isfinite(cast).flatten(1).all(1)
    dtype_name = str(dtype).removeprefix("torch.")
    if not fine.all():
        at = int((~fine).nonzero()[0])
        peak = float(values[at].abs().max())
        where = f"feature {name}, row {first_row + at} (id {ids[at]})"
        if peak < float("inf"):
            raise BadInput(f"{where}: value {peak:.4g} is beyond {dtype_name}; extract with --dtype float32")
        lesser = "" if precision == "float32" else f" in {precision}; extract with --precision float32"
        raise BadInput(f"{where}: the backbone yields a value that is not finite{lesser}")
    # A map whose values are all below float16's smallest normal number would lose its digits silently.
    peak = float(values.abs().max())
    if 0 < peak < torch.finfo(dtype).tiny:
        raise BadInput(
            f"feature {name}, rows from {first_row} (id {ids[0]}): no value exceeds {peak:.2g}, too small for "
            f"{dtype_name}; extract with --dtype float32"
        )
    return cast.cpu()
