"""RISE."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from featcache.attribution.methods.perturbation import MASKS, Image, Perturbation


class RISE(Perturbation):
    """The mean of random masks, each weighed by the probability of the image that it leaves.

    Masks are grids of random cells, enlarged bilinearly and shifted. They are the same for all images.
    """

    type: Literal["rise"] = "rise"
    masks: Annotated[int, Field(ge=1, le=1_000_000)] = Field(2000, description="masks")
    cells: Annotated[int, Field(ge=1, le=1000)] = Field(7, description="cells of a mask along a side")
    keep: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="probability of a cell to be kept")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="draws the masks")
    paper: ClassVar[str] = "Petsiuk et al., BMVC 2018"

    def count(self, size: int, channels: int) -> int:
        """The masks."""
        return self.masks

    def _masks(self, size: int, first: int, end: int) -> torch.Tensor:
        """Return some of the masks, float32 [n, S, S]; each is drawn from a seed of its own."""
        cell, masks = -(-size // self.cells), []
        for number in range(first, end):
            generator = torch.Generator().manual_seed((self.seed << 31) + number)
            grid = (torch.rand(1, 1, self.cells, self.cells, generator=generator) < self.keep).float()
            side = (self.cells + 1) * cell
            large = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)[0, 0]
            y, x = torch.randint(cell, (2,), generator=generator).tolist()
            masks.append(large[y : y + size, x : x + size])
        return torch.stack(masks)

    def variants(self, image: Image, made: None, first: int, end: int) -> torch.Tensor:
        """Multiply the normalised image by the masks."""
        return image.values * self._masks(image.batch.size, first, end).to(image.values)[:, None]

    def maps(self, image: Image, made: None, scores: torch.Tensor) -> torch.Tensor:
        """Return sum(score mask) / (N keep)."""
        size = image.batch.size
        total = scores.new_zeros(len(scores), size * size)
        for first in range(0, self.masks, MASKS):
            part = scores[:, first : first + MASKS]
            total += part @ self._masks(size, first, first + part.shape[1]).to(scores).flatten(1)
        return (total / (self.masks * self.keep)).unflatten(1, (size, size))
