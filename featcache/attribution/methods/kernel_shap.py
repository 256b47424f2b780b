"""Kernel SHAP."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.masked import Masked
from featcache.extraction.masks.coalitions import Coalitions
from featcache.extraction.masks.superpixels import Segmented


class KernelSHAP(Coalitions, Masked):
    """The Shapley values of an image's superpixels for the probability, by a weighted regression on coalitions.

    Superpixels are quickshift's; those outside a coalition have their mean colour. The values sum to the difference
    between the whole image's probability and that of the image in mean colours alone. They are exact where `samples`
    suffices for all coalitions. All probes and classes share one factorisation.
    """

    type: Literal["kernel_shap"] = "kernel_shap"
    paper: ClassVar[str] = "Lundberg and Lee, NeurIPS 2017"

    def maps(self, size: int, made: Segmented, scores: torch.Tensor) -> torch.Tensor:
        """Solve the regressions, whose coefficients have a given sum; every pixel gets its superpixel's coefficient."""
        kept, targets = made.kept, scores.double().cpu().t()  # [N, G], [N, Q]
        whole, nothing = targets[0], targets[1]
        weighted, count = kept * self.weights(kept)[:, None], kept.shape[1]
        # Lagrange: the last row and column hold the sum.
        matrix = torch.ones(count + 1, count + 1, dtype=torch.float64)
        matrix[:count, :count] = weighted.t() @ kept
        matrix[count, count] = 0
        given = torch.cat([weighted.t() @ (targets - nothing), (whole - nothing)[None]])
        # With too few coalitions, of all solutions the one with the smallest coefficients.
        values = (torch.linalg.pinv(matrix, hermitian=True) @ given)[:count]  # [G, Q]
        return made.painted(values.t().to(scores))
