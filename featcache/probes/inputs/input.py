"""What a probe reads: a feature, and whether its map is averaged over positions first."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featcache.device import free_bytes
from featcache.errors import BadInput
from featcache.probes.spec import ProbeSpec
from featcache.store.feature_array import PIECE_BYTES, FeatureArray
from featcache.store.manifest import feature_of
from featcache.store.reader import Store

# Rows scored at a time.
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Input:
    """A feature as probes read it, [n, D] or [n, D, S].

    A grid(k,s,p) is one long vector, channel by channel, so D is C h w. Tokens [n, N, D] are read as the positions of a
    map. pooled: the map is averaged over positions first, in float32, which is exact for a plain linear head.
    """

    feature: str
    pooled: bool = False

    @classmethod
    def of(cls, spec: ProbeSpec) -> "Input":
        """Return what a probe reads."""
        return cls(spec.features, spec.head.pools_first and feature_of(spec.features).kind != "grid")

    @property
    def name(self) -> str:
        """Its name in messages and in run.json."""
        return f"{self.feature}, pooled first" if self.pooled else self.feature

    def shape(self, store: Store) -> tuple[int, int]:
        """Return its width D and number of positions S, 1 for [n, D]."""
        shape, kind = store.manifest.features[self.feature]["shape"], feature_of(self.feature).kind
        if kind == "grid":
            return math.prod(shape), 1
        if kind == "tokens":
            return shape[1], shape[0]
        return shape[0], 1 if self.pooled else math.prod(shape[1:])

    def bytes(self, store: Store, splits: Sequence[str], rows: int | None = None) -> int:
        """Return the bytes that load() takes for one view of a union of splits, or of so many of its rows."""
        arrays = [store[name][self.feature] for name in splits]
        count = sum(len(a) for a in arrays)
        averaged = self.pooled and arrays[0].ndim > 2
        size = 4 * count * self.shape(store)[0] if averaged else sum(a.nbytes for a in arrays)
        return size if rows is None else size // max(count, 1) * rows

    def read(self, rows: Tensor) -> Tensor:
        """Return stored rows [n, ...] as probes read them: in the store's dtype, or float32 if they are averaged."""
        kind = feature_of(self.feature).kind
        if kind == "grid":
            return rows.flatten(1)
        if kind == "tokens":
            rows = rows.transpose(1, 2)
        if self.pooled and rows.ndim > 2:
            return rows.float().flatten(2).mean(2)
        return rows.flatten(2) if rows.ndim > 2 else rows

    def load(
        self,
        store: Store,
        splits: Sequence[str],
        device: torch.device,
        view: int = 0,
        rows: np.ndarray | None = None,
    ) -> Tensor:
        """Load one view of a union of splits onto a device. Raises BadInput if it does not fit there.

        rows: sorted rows of the union, int64 [n], by default all.
        """
        arrays = [store[name].view(view)[self.feature] for name in splits]
        count = sum(map(len, arrays)) if rows is None else len(rows)
        needed, free = self.bytes(store, splits, None if rows is None else count), free_bytes(device)
        if needed > free:
            raise BadInput(
                f"feature {self.feature} of {'+'.join(splits)} needs {needed / 2**30:.1f} GiB of memory on "
                f"{device}, {free / 2**30:.1f} are free"
            )
        values, at = torch.empty(0), 0
        for piece in _pieces(arrays, rows):
            part = self.read(torch.from_numpy(piece).to(device))
            if not at:
                values = part.new_empty(count, *part.shape[1:])
            values[at : at + len(part)] = part
            at += len(part)
        return values

    def chunks(
        self, store: Store, splits: Sequence[str], device: torch.device, rows: np.ndarray | None = None
    ) -> Iterator[Tensor]:
        """Yield a union of splits in order, as float32 pieces of up to CHUNK_ROWS rows, holding one 32 MB read at a time.

        rows: as for load().
        """
        for piece in _pieces([store[name][self.feature] for name in splits], rows):
            yield from self.read(torch.from_numpy(piece).to(device)).float().split(CHUNK_ROWS)


def source_name(spec: ProbeSpec) -> str:
    """Return what a probe's training reads, as run.json names it: its input, and which images if not all of train."""
    return ", ".join(filter(None, (Input.of(spec).name, spec.sample.name)))


def rows_within(rows: np.ndarray, first: int, end: int) -> np.ndarray:
    """Return the sorted rows from `first` up to `end`, counted from `first`."""
    start, stop = np.searchsorted(rows, (first, end))
    return rows[start:stop] - first


def _pieces(arrays: Sequence[FeatureArray], rows: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield the rows of a union of arrays, or some of them, in order, about 32 MB at a time."""
    first = 0
    for array in arrays:
        if rows is None:
            yield from (piece for _, piece in array.pieces())
            continue
        own, first = rows_within(rows, first, first + len(array)), first + len(array)
        step = max(PIECE_BYTES * len(array) // max(array.nbytes, 1), 1)
        for start in range(0, len(own), step):
            yield array.take(own[start : start + step], check=True)
            array.release()


def load_labels(store: Store, splits: Sequence[str]) -> Tensor:
    """Return the labels of a union of splits: int8 [N, C] if multi-label, int64 [N] if single-label."""
    return torch.from_numpy(np.concatenate([store[name].labels for name in splits]))
