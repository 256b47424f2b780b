"""The pointing game (Zhang et al., IJCV 2018)."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.scores.localisation_score import LocalisationScore


class PointingGame(LocalisationScore):
    """Pointing game: whether the largest value of a map lies inside the boxes of the class explained.

    The first of equal values counts. A random pixel is inside with the boxes' share of the image.
    """

    type: Literal["pointing_game"] = "pointing_game"
    heading: ClassVar[str] = "pointing game"
    columns: ClassVar[tuple[str, str]] = ("pointing_game", "pointing_game_chance")
    lacking: ClassVar[str] = "positive value"

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Look up the mask at the largest value, if that is positive."""
        largest, at = maps.flatten(1).max(1)
        inside = masks.flatten(1).gather(1, at[:, None])[:, 0].double()
        return inside.masked_fill(largest <= 0, float("nan"))

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        """Return the boxes' share of the image."""
        return masks.double().mean((1, 2))

    def chance(self, masks: torch.Tensor, void: torch.Tensor | None) -> torch.Tensor:
        """Return the objects' share of the pixels that count."""
        if void is None:
            return self.uniform(masks)
        return masks.sum((1, 2)).double() / (~void).sum((1, 2))
