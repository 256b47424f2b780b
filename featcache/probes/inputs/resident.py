"""Training features that stay in memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from featcache.device import free_bytes
from featcache.probes.inputs.batches import Piece, epoch_order
from featcache.probes.inputs.input import Input
from featcache.store.reader import Store


class Resident:
    """An input from a union of splits, held in memory, one tensor for each view; view 0 is the image as it is.

    As many views stay in memory as fit; the others are read again. rows: sorted rows of the union, by default all.
    """

    def __init__(
        self,
        input: Input,
        store: Store,
        splits: Sequence[str],
        device: torch.device,
        rows: np.ndarray | None = None,
    ):
        self._input, self._store, self._splits, self._device, self._rows = input, store, splits, device, rows
        self._views: dict[int, Tensor] = {}
        self._replaced_next: int | None = None

    def __getitem__(self, view: int) -> Tensor:
        if view not in self._views:
            if self._replaced_next is not None:
                self._views.pop(self._replaced_next, None)
            self._views[view] = self._input.load(self._store, self._splits, self._device, view, self._rows)
            # It makes way for the next view unless there is room for both and for training.
            roomy = free_bytes(self._views[view].device) >= 2 * self._views[view].nbytes
            self._replaced_next = None if roomy else view
        return self._views[view]

    def pieces(self, view: int, seed: int, epoch: int) -> Iterator[Piece]:
        """Yield the single Piece of an epoch: all rows, with every order equally likely."""
        values = self[view]
        order = epoch_order(len(values), seed, epoch).to(values.device)
        yield Piece(values, order, order, True)
