"""RISE."""

from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch.nn import functional as F

from featcache.attribution.methods.masked import Masked
from featcache.extraction.masks.masking import Masking
from featcache.extraction.masks.random_cells import RandomCells

# Masks whose product with the scores is taken at a time, and maps that are enlarged at a time, so that both stay in the
# cache or nearly so.
MASKS, MAPS = 4096, 64


class Tall(NamedTuple):
    """Masks that are enlarged along y alone, in order of their shifts along x.

    order: int64 [n], their numbers. masks: float32 [n, S * cells]. bounds: of the masks of each shift.
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

        Enlarging is linear, and one side can be enlarged after the other. So masks that are enlarged along y alone are
        summed for each shift along x, and the sums are enlarged at the end: a seventh of the operations.
        """
        cell, maps = self.cell(size), scores.new_empty(len(scores), size, size)
        across = _enlarging(self.cells, cell, size).to(scores).transpose(1, 2).flatten(0, 1)  # [cell * cells, S]
        for first in range(0, len(scores), MAPS):
            part = scores[first : first + MAPS]
            sums = part.new_zeros(len(part), size, cell, self.cells)
            for start in range(0, self.masks, MASKS):
                tall = _tall(self.masking, size, start, scores.device)
                ordered = part[:, start : start + MASKS][:, tall.order]
                for shift, (low, high) in enumerate(tall.bounds):
                    if low < high:
                        product = ordered[:, low:high] @ tall.masks[low:high]
                        sums[:, :, shift] += product.unflatten(1, (size, self.cells))
            maps[first : first + MAPS] = sums.flatten(2) @ across
        return maps / (self.masks * self.keep)


def _enlarging(cells: int, cell: int, size: int) -> torch.Tensor:
    """Return what enlarges a row of cells bilinearly, for each shift: float32 [cell, S, cells]."""
    whole = F.interpolate(torch.eye(cells)[None], (cells + 1) * cell, mode="linear", align_corners=False)[0].t()
    return torch.stack([whole[shift : shift + size] for shift in range(cell)])


@lru_cache(maxsize=4)
def _tall(masking: Masking, size: int, start: int, device: torch.device) -> Tall:
    """Enlarge MASKS masks from number `start` on along y."""
    assert isinstance(masking, RandomCells), "RISE masks so"
    grids, y, x = (tensor[start : start + MASKS].to(device) for tensor in masking.drawn(size))
    order = x.argsort(stable=True)
    down = _enlarging(masking.cells, masking.cell(size), size).to(device)  # [cell, S, cells]
    masks = torch.einsum("nsc,ncd->nsd", down[y[order]], grids[order]).flatten(1)
    ends = x.bincount(minlength=masking.cell(size)).cumsum(0).tolist()
    return Tall(order, masks, list(zip([0, *ends[:-1]], ends, strict=True)))
