"""From a store to the tensors that probes train on and are scored on."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from featcache.errors import BadInput


def free_bytes(device):
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            # Unlike the free pages, this counts the page cache, which a store that was just read fills.
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_features(store, splits, feature, pool, device, view=0):
    """Load a feature of a union of splits: [N, D], or [N, D, S] for a map, in the store's dtype.

    pool: average the map over positions now, in float32, exact for a plain linear head. view: of every
    split. Raises BadInput if it does not fit into memory.
    """
    arrays = [store[name].view(view)[feature] for name in splits]
    rows, bytes_ = sum(len(a) for a in arrays), sum(a.nbytes for a in arrays)
    pooled = pool and arrays[0].ndim == 4
    free = free_bytes(torch.device("cpu"))
    if not pooled and bytes_ > free:
        raise BadInput(
            f"feature {feature} of {'+'.join(splits)} needs {bytes_ / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        )
    if pooled:
        result = np.empty((rows, arrays[0].shape[1]), dtype=np.float32)
        at = 0
        for array in arrays:
            for start in range(0, len(array), 256):
                part = array[start : start + 256].astype(np.float32).mean((2, 3))
                result[at : at + len(part)] = part
                at += len(part)
    else:
        result = arrays[0][:] if len(arrays) == 1 else np.concatenate([a[:] for a in arrays])
        result = result.reshape(*result.shape[:2], -1) if result.ndim == 4 else result
    return torch.from_numpy(result).to(device)


def load_labels(store, splits):
    """Labels of a union of splits: int8 [N, C] if multi-label, int64 [N] if single-label."""
    return torch.from_numpy(np.concatenate([store[name].labels for name in splits]))


def feature_bytes(store, splits, feature, pool):
    """Bytes that load_features would take for one view."""
    arrays = [store[name][feature] for name in splits]
    if pool and arrays[0].ndim == 4:
        return sum(len(a) * a.shape[1] * 4 for a in arrays)
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
            # It goes again if there is no room for the next one beside it.
            roomy = free_bytes(self._held[view].device) >= self._held[view].nbytes
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
        self._source = (store, splits, feature)
        self._pool = pool
        self._buffer_rows = buffer_rows

    def pieces(self, view, seed, epoch):
        """Yield the Pieces of an epoch; every row is in one of them."""
        store, splits, feature = self._source
        arrays = [store[name].view(view)[feature] for name in splits]
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
            part = array[start:stop]
            if self._pool and part.ndim == 4:
                part = part.astype(np.float32).mean((2, 3))
            part = torch.from_numpy(part.reshape(*part.shape[:2], -1) if part.ndim == 4 else part)
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
