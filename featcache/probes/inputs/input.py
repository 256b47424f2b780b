"""What a probe reads: features side by side, and whether maps are averaged over positions first."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from featcache.device import free_bytes
from featcache.errors import BadInput
from featcache.feature import BESIDE
from featcache.probes.overlap import image_name
from featcache.probes.sample import Sample
from featcache.probes.spec import ProbeSpec
from featcache.store.feature_array import PIECE_BYTES, FeatureArray
from featcache.store.manifest import feature_of
from featcache.store.reader import Split, Store

# Rows scored at a time.
CHUNK_ROWS = 1024
# Ranges of the columns of a wider input: [(first, end)].
Columns = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Input:
    """Features of the store as probes read them, [n, D] or [n, D, S]: one, or several side by side along D.

    feature: their names, with ` + ` between them. A grid(k,s,p) is one long vector, channel by channel, so D is C h w.
    Tokens [n, N, D] are read as the positions of a map. pooled: maps are averaged over positions first, in float32,
    which is exact for a plain linear head.
    """

    feature: str
    pooled: bool = False

    @classmethod
    def of(cls, spec: ProbeSpec) -> "Input":
        """Return what a probe reads."""
        kinds = {feature_of(name).kind for name in spec.features.split(BESIDE)}
        return cls(spec.features, spec.head.pools_first and kinds != {"grid"})

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its features."""
        return tuple(self.feature.split(BESIDE))

    @property
    def name(self) -> str:
        """Its name in messages and in run.json."""
        return f"{self.feature}, pooled first" if self.pooled else self.feature

    def shape(self, store: Store) -> tuple[int, int]:
        """Return its width D and number of positions S, 1 for [n, D]. The parts have the same S."""
        shapes = [self.part_shape(name, store) for name in self.parts]
        return sum(width for width, _ in shapes), shapes[0][1]

    def part_shape(self, name: str, store: Store) -> tuple[int, int]:
        """Return the width and the number of positions of one of its features."""
        shape, kind = store.manifest.features[name]["shape"], feature_of(name).kind
        if kind == "grid":
            return math.prod(shape), 1
        if kind == "tokens":
            return shape[1], shape[0]
        return shape[0], 1 if self.pooled else math.prod(shape[1:])

    def columns(self, own: "Input", store: Store) -> Columns:
        """Return where another input lies among the columns of this one, which has all its parts."""
        ends = np.cumsum([0, *(self.part_shape(name, store)[0] for name in self.parts)]).tolist()
        at = dict(zip(self.parts, pairwise(ends), strict=True))
        ranges: list[tuple[int, int]] = []
        for first, end in (at[name] for name in own.parts):
            if ranges and ranges[-1][1] == first:
                first = ranges.pop()[0]
            ranges.append((first, end))
        return tuple(ranges)

    def bytes(self, store: Store, splits: Sequence[str], rows: int | None = None) -> int:
        """Return the bytes that load() takes for one view of a union of splits, or of so many of its rows."""
        count = sum(len(store[name]) for name in splits) if rows is None else rows
        return count * self._dtype(store).itemsize * math.prod(self.shape(store))

    def _dtype(self, store: Store) -> torch.dtype:
        """Return the dtype in which its rows are held: float32 if any of its features is averaged."""
        features = [store.manifest.features[name] for name in self.parts]
        kinds = {feature_of(name).kind for name in self.parts}
        averaged = self.pooled and kinds & {"spatial", "tokens"}
        # bfloat16 is read as float32.
        held = {"float16": torch.float16}.get(features[0]["dtype"], torch.float32)
        return torch.float32 if averaged else held

    def arrays(self, split: Split) -> list[FeatureArray]:
        """Return the arrays of its features in a split."""
        return [split[name] for name in self.parts]

    def read(self, rows: Iterable[Tensor]) -> Tensor:
        """Return stored rows [n, ...] of each feature as probes read them, [n, D] or [n, D, S]: in the store's dtype, or
        float32 if they are averaged.
        """
        parts = [self._read(name, part) for name, part in zip(self.parts, rows, strict=True)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _read(self, name: str, rows: Tensor) -> Tensor:
        kind = feature_of(name).kind
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
        """Load one view of a union of splits onto a device. Raises BadInput if it does not fit there, or teaches nothing.

        rows: sorted rows of the union, int64 [n], by default all.
        """
        chosen = [store[name].view(view) for name in splits]
        count = sum(map(len, chosen)) if rows is None else len(rows)
        needed, free = self.bytes(store, splits, count), free_bytes(device)
        if needed > free:
            raise BadInput(
                f"feature {self.feature} of {'+'.join(splits)} needs {needed / 2**30:.1f} GiB of memory on "
                f"{device}, {free / 2**30:.1f} are free"
            )
        values, at = torch.empty(0), 0
        for part in self._pieces(chosen, device, rows):
            if not at:
                values = part.new_empty(count, *part.shape[1:])
            values[at : at + len(part)] = part
            at += len(part)
        if count > 1 and all_alike(values, values[0]):
            raise self.constant(splits)
        return values

    def constant(self, splits: Sequence[str]) -> BadInput:
        """Return the BadInput for features that are the same for all images of a union of splits."""
        return BadInput(
            f"feature {self.feature} is the same for all images of {'+'.join(splits)}: nothing can be learned from it; "
            "see what the backbone loaded (featcache layers CKPT)"
        )

    def check_finite(self, part: Tensor, store: Store, splits: Sequence[str], rows: np.ndarray) -> None:
        """Raise BadInput, which names the image, if features as read() returns them are not all finite.

        rows: of the union of splits, one for each of the features.
        """
        # The smallest and the largest tell it in a fraction of the time that a look at each takes.
        if part.numel() and not bool(torch.isfinite(torch.stack(part.aminmax())).all()):
            bad = int(torch.isfinite(part.float()).flatten(1).all(1).logical_not().nonzero()[0])
            raise BadInput(
                f"feature {self.feature} of {image_name(store, splits, int(rows[bad]))} holds a value that is not finite; "
                "extract it again, into another store"
            )

    def chunks(
        self, store: Store, splits: Sequence[str], device: torch.device, rows: np.ndarray | None = None
    ) -> Iterator[Tensor]:
        """Yield a union of splits in order, as float32 pieces of up to CHUNK_ROWS rows. rows: as for load()."""
        for part in self._pieces([store[name] for name in splits], device, rows):
            yield from part.float().split(CHUNK_ROWS)

    def _pieces(self, splits: Sequence[Split], device: torch.device, rows: np.ndarray | None) -> Iterator[Tensor]:
        """Yield the rows of a union of splits, or some of them, in order as probes read them.

        It holds about 32 MB of the largest feature at a time.
        """
        first = 0
        for split in splits:
            arrays, at = self.arrays(split), 0
            own = None if rows is None else rows_within(rows, first, first + len(arrays[0]))
            first += len(arrays[0])
            for parts in _whole_pieces(arrays) if own is None else _picked_pieces(arrays, own):
                values = self.read(torch.from_numpy(part).to(device) for part in parts)
                numbers = np.arange(at, at + len(values)) if own is None else own[at : at + len(values)]
                self.check_finite(values, split.store, [split.name], numbers)
                at += len(values)
                yield values
                for array in arrays:
                    array.release()


@dataclass(frozen=True)
class Source:
    """What the training of a probe reads: an input, and which images if not all of train."""

    input: Input
    sample: Sample

    @classmethod
    def of(cls, spec: ProbeSpec) -> "Source":
        """Return what a probe's training reads."""
        return cls(Input.of(spec), spec.sample)

    @property
    def name(self) -> str:
        """Its name in messages and in run.json."""
        return ", ".join(filter(None, (self.input.name, self.sample.name)))


def all_alike(values: Tensor, row: Tensor) -> bool:
    """Return whether all features [n, ...] equal those of one image, [...]."""
    # The last one mostly tells the difference.
    return torch.equal(values[-1], row) and bool((values == row).all())


def _whole_pieces(arrays: Sequence[FeatureArray]) -> Iterator[list[np.ndarray]]:
    """Yield all rows of arrays of one split in order, as [a piece of each array]."""
    longest = max(arrays, key=lambda array: array.nbytes)
    for start, piece in longest.pieces():
        yield [piece if array is longest else array[start : start + len(piece)] for array in arrays]


def _picked_pieces(arrays: Sequence[FeatureArray], rows: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield some sorted rows of arrays of one split in order, as [a piece of each array]."""
    step = max(PIECE_BYTES * len(arrays[0]) // max(1, *(array.nbytes for array in arrays)), 1)
    for start in range(0, len(rows), step):
        yield [array.take(rows[start : start + step], check=True) for array in arrays]


def rows_within(rows: np.ndarray, first: int, end: int) -> np.ndarray:
    """Return the sorted rows from `first` up to `end`, counted from `first`."""
    start, stop = np.searchsorted(rows, (first, end))
    return rows[start:stop] - first


def narrowed(values: Tensor, columns: Columns) -> Tensor:
    """Return columns of [n, D] or [n, D, S]: a view if they are neighbours, else a copy."""
    parts = [values[:, first:end] for first, end in columns]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def load_labels(store: Store, splits: Sequence[str]) -> Tensor:
    """Return the labels of a union of splits: int8 [N, C] if multi-label, int64 [N] if single-label."""
    return torch.from_numpy(np.concatenate([store[name].labels for name in splits]))
