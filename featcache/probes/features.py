"""From a store to the tensors that probes train on and are scored on."""

import math
import os

import numpy as np
import torch

from featcache.errors import BadInput
from featcache.store.manifest import feature_of


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

    A grid(k,s,p) is one long vector, channel by channel: D is its C h w. pool: average the map over positions now, in float32, exact for a plain linear head. view: of every
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
        if feature_of(feature).kind == "grid":
            result = result.reshape(len(result), -1)
        elif result.ndim == 4:
            result = result.reshape(*result.shape[:2], -1)
    return torch.from_numpy(result).to(device)


def input_of(spec):
    """What a probe reads: (feature, whether its map is averaged over positions first)."""
    return spec.features, spec.head.pools_first and feature_of(spec.features).kind != "grid"


def input_shape(store, feature, pool):
    """Width of a probe's input, and at how many positions it is read: D and S of [N, D, S]; S is 1 for [N, D]."""
    shape = store.manifest.features[feature]["shape"]
    if feature_of(feature).kind == "grid":
        return math.prod(shape), 1
    return shape[0], 1 if pool else math.prod(shape[1:])


def load_labels(store, splits):
    """Labels of a union of splits: int8 [N, C] if multi-label, int64 [N] if single-label."""
    return torch.from_numpy(np.concatenate([store[name].labels for name in splits]))


class TrainingViews:
    """A feature of a union of splits under every view: index it by the view's number; 0 is the image as it is.

    Views are read when they are asked for. As many stay in memory as fit, the others are read again.
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
