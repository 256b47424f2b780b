"""LIME."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from featcache.attribution.methods.masked import Masked
from featcache.extraction.masks.superpixels import RandomSuperpixels, Segmented


class LIME(RandomSuperpixels, Masked):
    """The coefficients of a ridge regression of the probability on the superpixels that a variant keeps.

    Superpixels are quickshift's; those that are not kept have their mean colour. Variants are weighed by the cosine
    between them and the whole image. All probes and classes share one factorisation.
    """

    type: Literal["lime"] = "lime"
    kernel: Annotated[float, Field(gt=0)] = Field(0.25, description="width of the weights' kernel")
    ridge: Annotated[float, Field(gt=0)] = Field(1.0, description="penalty of the regression")
    paper: ClassVar[str] = "Ribeiro et al., KDD 2016"

    def maps(self, size: int, made: Segmented, scores: torch.Tensor) -> torch.Tensor:
        """Solve the regressions with an intercept that is not penalised; every pixel gets its superpixel's coefficient."""
        kept, targets = made.kept, scores.double().cpu().t()  # [N, G], [N, Q]
        cosine = kept.sum(1).sqrt() / kept.shape[1] ** 0.5
        weights = (-((1 - cosine) ** 2) / self.kernel**2).exp().sqrt()[:, None]
        share = weights / weights.sum()
        kept, targets = kept - (share * kept).sum(0), targets - (share * targets).sum(0)
        matrix = kept.t() @ (weights * kept) + self.ridge * torch.eye(kept.shape[1], dtype=torch.float64)
        coefficients = torch.linalg.solve(matrix, kept.t() @ (weights * targets))  # [G, Q]
        return made.painted(coefficients.t().to(scores))
