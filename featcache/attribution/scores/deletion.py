"""Deletion (Petsiuk et al., RISE, BMVC 2018)."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.scores.faithfulness import Faithfulness


class Deletion(Faithfulness):
    """Deletion: the mean probability of the class while pixels are removed, the largest of the map first; lower is better.

    What is removed is zero in the normalised image, as in occlusion and RISE.
    """

    type: Literal["deletion"] = "deletion"
    heading: ClassVar[str] = "deletion"
    columns: ClassVar[tuple[str, str]] = ("deletion", "deletion_uniform")
    higher_is_better: ClassVar[bool] = False

    def ends(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images, and nothing."""
        return images, torch.zeros_like(images)
