"""The order in which training visits the images, and how that order is cut into mini-batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from featcache.probes.inputs.input import Columns


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of an epoch: the features values[order], which are `rows` of the training data. last: the epoch's end."""

    values: Tensor
    order: Tensor
    rows: Tensor
    last: bool


class MiniBatches:
    """Cuts the Pieces of an epoch into mini-batches of one size; what is left of a piece starts the next batch.

    columns: of the features, by default all.
    """

    def __init__(self, size: int, columns: Columns | None = None):
        self.size, self.columns = size, columns
        self._left: tuple[Tensor, Tensor] | None = None

    def cut(self, piece: Piece) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features [B, ...] as stored, rows [B]); only the last batch of the epoch may be short."""
        start = 0
        parts = [piece.values]
        if self.columns is not None:
            parts = [piece.values[:, first:end] for first, end in self.columns]

        def taken(rows: Tensor) -> Tensor:
            return parts[0][rows] if len(parts) == 1 else torch.cat([part[rows] for part in parts], 1)

        if self._left is not None:
            values, rows = self._left
            start = self.size - len(rows)
            values = torch.cat([values, taken(piece.order[:start])])
            rows = torch.cat([rows, piece.rows[:start]])
            self._left = None
            if len(rows) < self.size and not piece.last:
                self._left = values, rows
                return
            yield values, rows
        for at in range(start, len(piece.order), self.size):
            chosen, rows = piece.order[at : at + self.size], piece.rows[at : at + self.size]
            if len(rows) < self.size and not piece.last:
                self._left = taken(chosen), rows
            else:
                yield taken(chosen), rows


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits the rows: a permutation [N] from (seed, epoch)."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def view_of_epoch(views: int | None, epoch: int) -> int:
    """Return the number of the view that an epoch (from 0) trains on: 1 to `views` in turn; 0 if there are none."""
    return epoch % views + 1 if views else 0
