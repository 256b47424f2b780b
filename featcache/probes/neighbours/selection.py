"""The largest numbers of each row of a matrix that is made column by column."""

import torch
from torch import Tensor

# Groups of columns that are compared by their largest number alone; more of them than this for each number that is kept.
GROUPS = 8
WIDEST_GROUP = 32


class Selection:
    """The `size` largest similarities of each of q images so far, and the columns that they are in.

    values: float32 [q, size], falling. columns: int64 [q, size].
    """

    def __init__(self, images: int, size: int, device: torch.device):
        self.size = size
        self.values = torch.full((images, size), -torch.inf, device=device)
        self.columns = torch.zeros(images, size, dtype=torch.int64, device=device)

    def add(self, similarities: Tensor, columns: Tensor | None, first: int) -> None:
        """Take the similarities [q, n] of n more columns. columns: int64 [n], their numbers, or None for first, first + 1, ..."""
        values, places = largest(similarities, min(self.size, similarities.shape[1]))
        numbers = places + first if columns is None else columns[places]
        values, numbers = torch.cat([self.values, values], 1), torch.cat([self.columns, numbers], 1)
        self.values, order = values.topk(self.size, dim=1)
        self.columns = numbers.gather(1, order)


def largest(matrix: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the `size` largest numbers of each row, [q, size] in no order, and their columns, int64 [q, size].

    matrix: float32 [q, n]. torch.topk reads every number in a few nanoseconds. Here it reads the largest number of
    each group of w columns, j, j + n/w, j + 2n/w, ..., which are found at the speed of memory; and then the members of
    the `size` best groups, among which the largest numbers of the row are.
    """
    images, n = matrix.shape
    width = 1
    while width < WIDEST_GROUP and n // (2 * width) >= GROUPS * size:
        width *= 2
    if width == 1:
        values, columns = matrix.topk(size, dim=1, sorted=False)
        return values, columns
    groups = n // width
    grouped = matrix[:, : groups * width].unflatten(1, (width, groups))
    best = grouped.amax(1).topk(size, dim=1, sorted=False).indices  # [q, size]
    members = grouped.gather(2, best.unsqueeze(1).expand(images, width, size)).flatten(1)
    columns = (best.unsqueeze(1) + groups * torch.arange(width, device=matrix.device).view(1, -1, 1)).flatten(1)
    rest = torch.arange(groups * width, n, device=matrix.device).expand(images, -1)
    members, columns = torch.cat([members, matrix[:, groups * width :]], 1), torch.cat([columns, rest], 1)
    values, places = members.topk(size, dim=1, sorted=False)
    return values, columns.gather(1, places)
