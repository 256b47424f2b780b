"""The masks of RISE."""

from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch.nn import functional as F

from featcache.extraction.masks.masking import Masking


class Drawn(NamedTuple):
    """Masks before they are enlarged. grids: float32 [N, cells, cells], 1 where kept. y, x: int64 [N], their shifts."""

    grids: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor


class RandomCells(Masking):
    """Grids of random cells, enlarged bilinearly and shifted. They are the same for all images."""

    type: Literal["rise"] = "rise"
    masks: Annotated[int, Field(ge=1, le=1_000_000)] = Field(2000, description="masks")
    cells: Annotated[int, Field(ge=1, le=1000)] = Field(7, description="cells of a mask along a side")
    keep: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="probability of a cell to be kept")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="draws the masks")
    counted: ClassVar[str | None] = "masks"
    extends: ClassVar[bool] = True

    def number(self, size: int) -> int:
        """The masks."""
        return self.masks

    def cell(self, size: int) -> int:
        """Return the side of a cell in pixels, which is also the number of shifts along a side."""
        return -(-size // self.cells)

    def drawn(self, size: int) -> Drawn:
        """Draw all masks, each from a seed of its own."""
        return _draw(self.masks, self.cells, self.keep, self.seed, self.cell(size))

    def large(self, size: int, first: int, end: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return some of the masks, float32 [n, S, S]."""
        cell, drawn = self.cell(size), self.drawn(size)
        side = (self.cells + 1) * cell
        grids = drawn.grids[first:end, None].to(device)
        enlarged = F.interpolate(grids, (side, side), mode="bilinear", align_corners=False)[:, 0]
        places = zip(enlarged, drawn.y[first:end].tolist(), drawn.x[first:end].tolist(), strict=True)
        return torch.stack([mask[y : y + size, x : x + size] for mask, y, x in places])

    def masked(self, image: torch.Tensor, made: None, first: int, end: int) -> torch.Tensor:
        """Multiply the normalised image by the masks."""
        return image * self.large(image.shape[-1], first, end, image.device).to(image)[:, None]


@lru_cache(maxsize=4)
def _draw(masks: int, cells: int, keep: float, seed: int, cell: int) -> Drawn:
    grids, shifts = torch.empty(masks, cells, cells), torch.empty(masks, 2, dtype=torch.int64)
    generator = torch.Generator()
    for number in range(masks):
        generator.manual_seed((seed << 31) + number)
        grids[number] = (torch.rand(1, 1, cells, cells, generator=generator) < keep)[0, 0]
        shifts[number] = torch.randint(cell, (2,), generator=generator)
    return Drawn(grids, *shifts.unbind(1))
