"""Computing features and writing them to a store, shard by shard."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from featcache.backbones.precision import running
from featcache.errors import BadInput
from featcache.extraction.images import Images, image_batches
from featcache.extraction.job import Job
from featcache.extraction.masked import masked_features
from featcache.ranks import Alone
from featcache.store.manifest import feature_of
from featcache.store.shard import Shard
from featcache.store.writer import put_shard


def fill(job: Job, todo: Sequence[Shard], images: Images, ranks: Alone) -> None:
    """Compute and write shards, each with the features of its manifest, as the processes draw them.

    Worker processes decode images, this thread runs the backbone, and another one writes.
    """
    if not todo:
        return
    # All parts of a store have the same.
    batch_size = todo[0].manifest.compute["batch_size"]
    job.model.to(job.device)
    drawn: deque[Shard] = deque()
    # The variants of an image are a batch of their own, or several.
    batches = _batches(ranks.draw(todo), drawn, 1 if job.masking else batch_size)
    side, on_gpu = job.model.preprocessing.size, job.device.type == "cuda"
    memory = torch.empty(batch_size, side, side, 3, device=job.device)
    progress = tqdm(total=sum(map(len, todo)), unit="img", desc="extract", disable=ranks.rank != 0)
    rows: _Rows | None = None
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer, progress:
        for pixels, digests in image_batches(images, batches, job.settings.workers, pin_memory=on_gpu):
            if rows is None:
                rows = _Rows(drawn.popleft(), job, images)
            with running(job.settings.precision, job.device):
                normalised = job.model.preprocessing.normalise(pixels.to(job.device, non_blocking=True), memory)
                rows.add(_features(job, normalised, rows, batch_size), digests)
            progress.update(ranks.count(len(pixels)) - progress.n)
            if rows.are_complete:
                if writing:
                    writing.result()
                writing = writer.submit(put_shard, rows.shard, rows.ids, rows.stored(), rows.digests())
                rows = None
        if writing:
            writing.result()


def _features(job: Job, images: torch.Tensor, rows: "_Rows", batch_size: int) -> dict[str, torch.Tensor]:
    """Return the features of normalised images [B, C, S, S], or of the variants of one, which come next in a shard."""
    if job.masking is None:
        return job.model(images, rows.features)
    return masked_features(job.model, job.masking, images, rows.next_id, rows.features, batch_size)


def _batches(shards: Iterator[Shard], drawn: deque[Shard], size: int) -> Iterator[list[tuple[str, int]]]:
    """Yield the keys of Images for each batch of some shards, and append each shard to `drawn` before its first batch.

    The last batch of a shard is short rather than reaching into the next one.
    """
    for shard in shards:
        drawn.append(shard)
        first, end = shard.rows
        for start in range(first, end, size):
            yield [(shard.split, row) for row in range(start, min(start + size, end))]


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
