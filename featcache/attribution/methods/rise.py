"""RISE."""

from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch.nn import functional as F

from featcache.attribution.methods.masked import Masked
from featcache.extraction.masks.masking import Masking
from featcache.extraction.masks.random_cells import RandomCells

# Masks whose products with the scores are summed at a time, and maps that are made at a time: their sums stay in the cache,
# or nearly so.
MASKS, MAPS = 4096, 32


class Wide(NamedTuple):
    """Masks that are enlarged along x alone, in order of their shifts along y.

    order: int64 [n], their numbers. masks: float32 [n, cells * S]. bounds: of the masks of each shift.
    """

    order: torch.Tensor
    masks: torch.Tensor
    bounds: list[tuple[int, int]]


class RISE(RandomCells, Masked):
    """The mean of random masks, each weighed by the probability of the image that it leaves.

    Masks are grids of random cells, enlarged bilinearly and shifted. They are the same for all images.
    """

    type: Literal["rise"] = "rise"
    paper: ClassVar[str] = "Petsiuk et al., BMVC 2018"

    def maps(self, size: int, made: None, scores: torch.Tensor) -> torch.Tensor:
        """Return sum(score mask) / (N keep).

        Enlarging is linear, and one side can be enlarged after the other. So masks that are enlarged along x alone are
        summed for each shift along y, and the sums are enlarged at the end: a tenth of the operations.
        """
        cell, maps = self.cell(size), scores.new_empty(len(scores), size, size)
        down = _down(self.cells, cell, size)
        for first in range(0, len(scores), MAPS):
            part = scores[first : first + MAPS]
            sums = part.new_zeros(len(part), self.cells, cell, size)
            for start in range(0, self.masks, MASKS):
                wide = _wide(self.masking, size, start, scores.device)
                ordered = part[:, start : start + MASKS][:, wide.order]
                for shift, (low, high) in enumerate(wide.bounds):
                    if low < high:
                        product = ordered[:, low:high] @ wide.masks[low:high]
                        sums[:, :, shift] += product.unflatten(1, (self.cells, size))
            rows = sums.flatten(1, 2)
            for row, low, matrix in down:
                product = matrix.to(scores) @ rows[:, low : low + matrix.shape[1]]
                maps[first : first + MAPS, row : row + len(matrix)] = product
        return maps.div_(self.masks * self.keep)


def _enlarging(cells: int, cell: int, size: int) -> torch.Tensor:
    """Return what enlarges a row of cells bilinearly, for each shift: float32 [cell, S, cells]."""
    whole = F.interpolate(torch.eye(cells)[None], (cells + 1) * cell, mode="linear", align_corners=False)[0].t()
    return torch.stack([whole[shift : shift + size] for shift in range(cell)])


@lru_cache(maxsize=4)
def _down(cells: int, cell: int, size: int) -> list[tuple[int, int, torch.Tensor]]:
    """Return what enlarges sums [cells * cell, S] along y, for `cell` rows of the map at a time.

    Yields (first of the rows, first of the sums that they need, float32 [rows, sums]). A row needs those that are near.
    """
    whole = _enlarging(cells, cell, size).permute(1, 2, 0).flatten(1)  # [S, cells * cell]
    blocks = []
    for row in range(0, size, cell):
        used = whole[row : row + cell].any(0).nonzero()[:, 0]
        low, high = int(used[0]), int(used[-1]) + 1
        blocks.append((row, low, whole[row : row + cell, low:high].contiguous()))
    return blocks


@lru_cache(maxsize=4)
def _wide(masking: Masking, size: int, start: int, device: torch.device) -> Wide:
    """Enlarge MASKS masks from number `start` on along x."""
    assert isinstance(masking, RandomCells), "RISE masks so"
    grids, y, x = (tensor[start : start + MASKS].to(device) for tensor in masking.drawn(size))
    order = y.argsort(stable=True)
    across = _enlarging(masking.cells, masking.cell(size), size).to(device)  # [cell, S, cells]
    masks = torch.einsum("nsc,ndc->nds", across[x[order]], grids[order]).flatten(1)
    ends = y.bincount(minlength=masking.cell(size)).cumsum(0).tolist()
    return Wide(order, masks, list(zip([0, *ends[:-1]], ends, strict=True)))
