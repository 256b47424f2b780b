"""From a store to the tensors that probes train on and are scored on."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from featcache.device import free_bytes
from featcache.errors import BadInput
from featcache.store.manifest import feature_of

# Rows that are scored at a time.
CHUNK_ROWS = 1024


def as_input(rows, feature, pool):
    """Rows of a feature as probes read them, [n, D] or [n, D, S].

    rows: tensor [n, ...] as stored. A grid(k,s,p) is one long vector, channel by channel: D is its C h w.
    Tokens [n, N, D] are read as the positions of a map. pool: average a map over positions now, in
    float32, exact for a plain linear head.
    """
    kind = feature_of(feature).kind
    if kind == "grid":
        return rows.flatten(1)
    if kind == "tokens":
        rows = rows.transpose(1, 2)
    if pool and rows.ndim > 2:
        return rows.float().flatten(2).mean(2)
    return rows.flatten(2) if rows.ndim > 2 else rows


def load_features(store, splits, feature, pool, device, view=0):
    """Load a feature of a union of splits onto a device, as as_input() makes it, in the store's dtype, float32 if pooled.

    view: of every split. Raises BadInput if it does not fit there.
    """
    arrays = [store[name].view(view)[feature] for name in splits]
    needed, free = feature_bytes(store, splits, feature, pool), free_bytes(device)
    if needed > free:
        raise BadInput(
            f"feature {feature} of {'+'.join(splits)} needs {needed / 2**30:.1f} GiB of memory on "
            f"{device}, {free / 2**30:.1f} are free"
        )
    result, at = None, 0
    for array in arrays:
        for _, piece in array.pieces():
            part = as_input(torch.from_numpy(piece).to(device), feature, pool)
            if result is None:
                result = part.new_empty(sum(map(len, arrays)), *part.shape[1:])
            result[at : at + len(part)] = part
            at += len(part)
    return result


def read_chunks(store, splits, feature, pool, device):
    """Yield a feature of a union of splits in order, as float32 pieces of some hundred rows; holds no more."""
    for name in splits:
        for _, piece in store[name][feature].pieces():
            yield from as_input(torch.from_numpy(piece).to(device), feature, pool).float().split(CHUNK_ROWS)


def input_of(spec):
    """What a probe reads: (feature, whether its map is averaged over positions first)."""
    return spec.features, spec.head.pools_first and feature_of(spec.features).kind != "grid"


def input_name(feature, pool):
    """An input of probes, for people and for run.json."""
    return f"{feature}, pooled first" if pool else feature


def input_shape(store, feature, pool):
    """Width of a probe's input, and at how many positions it is read: D and S of [N, D, S]; S is 1 for [N, D]."""
    shape, kind = store.manifest.features[feature]["shape"], feature_of(feature).kind
    if kind == "grid":
        return math.prod(shape), 1
    if kind == "tokens":
        return shape[1], shape[0]
    return shape[0], 1 if pool else math.prod(shape[1:])


def load_labels(store, splits):
    """Labels of a union of splits: int8 [N, C] if multi-label, int64 [N] if single-label."""
    return torch.from_numpy(np.concatenate([store[name].labels for name in splits]))


def feature_bytes(store, splits, feature, pool):
    """Bytes that load_features would take for one view."""
    arrays = [store[name][feature] for name in splits]
    if pool and arrays[0].ndim > 2:
        return 4 * sum(len(a) for a in arrays) * input_shape(store, feature, pool)[0]
    return sum(a.nbytes for a in arrays)


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of rows in the order of training: features values[order], rows `rows`. last: the epoch ends with it."""

    values: torch.Tensor
    order: torch.Tensor
    rows: torch.Tensor
    last: bool


class Resident:
    """A feature of a union of splits in memory, under every view that is asked for; 0 is the image as it is.

    As many views stay in memory as fit, the others are read again.
    """

    def __init__(self, store, splits, feature, pool, device):
        self._source = (store, splits, feature, pool, device)
        self._held = {}
        self._passing = None

    def __getitem__(self, view):
        if view not in self._held:
            self._held.pop(self._passing, None)
            self._held[view] = load_features(*self._source, view)
            # It goes again if there is no room for the next one beside it, and for what training takes.
            roomy = free_bytes(self._held[view].device) >= 2 * self._held[view].nbytes
            self._passing = None if roomy else view
        return self._held[view]

    def pieces(self, view, seed, epoch):
        """Yield the one Piece of an epoch: all rows, every order equally likely."""
        values = self[view]
        order = epoch_order(len(values), seed, epoch).to(values.device)
        yield Piece(values, order, order, True)


class Streamed:
    """A feature of a union of splits that is read anew in every epoch, once, through a shuffle buffer.

    Chunks of neighbouring rows are drawn at random from all of them until the buffer is full; its rows
    are shuffled. The next buffer is read while this one is trained on. buffer_rows decides the order
    of the rows, beside seed and epoch, and so is part of a run.
    """

    def __init__(self, store, splits, feature, pool, buffer_rows):
        self._store, self._splits, self._feature, self._pool = store, splits, feature, pool
        self._buffer_rows = buffer_rows

    def pieces(self, view, seed, epoch):
        """Yield the Pieces of an epoch; every row is in one of them."""
        arrays = [self._store[name].view(view)[self._feature] for name in self._splits]
        firsts = np.cumsum([0, *(len(a) for a in arrays)])
        chunks = [
            (array, start, min(start + array.chunk_rows, len(array)), int(first))
            for array, first in zip(arrays, firsts, strict=False)
            for start in range(0, len(array), array.chunk_rows)
        ]
        random = np.random.default_rng((seed, epoch))
        chunks = [chunks[n] for n in random.permutation(len(chunks))]
        at_once = max(self._buffer_rows // arrays[0].chunk_rows, 1)
        fillings = [chunks[at : at + at_once] for at in range(0, len(chunks), at_once)]
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, fillings[0])
            for number in range(len(fillings)):
                values, rows = coming.result()
                last = number + 1 == len(fillings)
                if not last:
                    coming = reader.submit(self._read, fillings[number + 1])
                order = torch.from_numpy(random.permutation(len(rows)))
                yield Piece(values, order, rows[order], last)

    def _read(self, filling):
        values, numbers, at = None, [], 0
        total = sum(stop - start for _, start, stop, _ in filling)
        # In the order in which they lie on disk; the shuffle comes after.
        for array, start, stop, first in sorted(filling, key=lambda chunk: (chunk[3], chunk[1])):
            part = as_input(torch.from_numpy(array[start:stop]), self._feature, self._pool)
            values = part.new_empty(total, *part.shape[1:]) if values is None else values
            values[at : at + len(part)] = part
            at += len(part)
            numbers.append(torch.arange(first + start, first + stop))
            array.release()
        return values, torch.cat(numbers)


class MiniBatches:
    """Cuts the Pieces of an epoch into mini-batches of one size; what is left of a piece goes on in the next."""

    def __init__(self, size):
        self.size = size
        self._left = None

    def cut(self, piece):
        """Yield (features [B, ...] as stored, rows [B]); only the last batch of the epoch may be short."""
        start = 0
        if self._left is not None:
            values, rows = self._left
            start = self.size - len(rows)
            values = torch.cat([values, piece.values[piece.order[:start]]])
            rows = torch.cat([rows, piece.rows[:start]])
            self._left = None
            if len(rows) < self.size and not piece.last:
                self._left = values, rows
                return
            yield values, rows
        for at in range(start, len(piece.order), self.size):
            chosen, rows = piece.order[at : at + self.size], piece.rows[at : at + self.size]
            if len(rows) < self.size and not piece.last:
                self._left = piece.values[chosen], rows
            else:
                yield piece.values[chosen], rows


def epoch_order(rows, seed, epoch):
    """Return the order in which an epoch visits the rows: a permutation [N] from (seed, epoch)."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def view_of_epoch(views, epoch):
    """The number of the view that an epoch (from 0) trains on: 1 to `views` in turn; 0 if there are none."""
    return epoch % views + 1 if views else 0
