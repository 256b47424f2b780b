"""LIME."""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from featcache.attribution.methods.perturbation import Image, Perturbation
from featcache.errors import BadInput


class Segmented(NamedTuple):
    """An image in segments. labels: int64 [S, S]. filled: [C, S, S], every pixel the mean of its segment.

    kept: float64 [N, G], 1 where a variant has a segment.
    """

    labels: torch.Tensor
    filled: torch.Tensor
    kept: torch.Tensor


class LIME(Perturbation):
    """The coefficients of a ridge regression of the probability on the segments that a variant keeps.

    Segments are quickshift's superpixels; those that are not kept have their mean colour. Variants are weighed by the
    cosine between them and the whole image. All probes and classes share one factorisation.
    """

    type: Literal["lime"] = "lime"
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = Field(1000, description="variants, the first being the image")
    kernel: Annotated[float, Field(gt=0)] = Field(0.25, description="width of the weights' kernel")
    ridge: Annotated[float, Field(gt=0)] = Field(1.0, description="penalty of the regression")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="draws the variants")
    paper: ClassVar[str] = "Ribeiro et al., KDD 2016"

    def count(self, size: int, channels: int) -> int:
        """The variants."""
        return self.samples

    def begin(self, image: Image) -> Segmented:
        """Cut the image into segments, and draw which of them each variant keeps."""
        try:
            from skimage.segmentation import quickshift
        except ImportError:
            raise BadInput(
                "--method lime needs the package scikit-image: pip install 'featcache[attribution]'"
            ) from None
        # Of B-cos's six channels, the last three follow from the first.
        pixels = image.values[:3].permute(1, 2, 0).cpu().double()
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
        labels = torch.from_numpy(quickshift(pixels.numpy(), kernel_size=4, max_dist=200, ratio=0.2, rng=0)).long()
        count = int(labels.max()) + 1
        sums = image.values.new_zeros(image.values.shape[0], count).index_add_(
            1, labels.flatten().to(image.values.device), image.values.flatten(1)
        )
        means = sums / labels.flatten().bincount(minlength=count).to(sums)
        generator = torch.Generator().manual_seed((self.seed << 31) + image.row)
        kept = torch.randint(2, (self.samples, count), generator=generator).double()
        kept[0] = 1
        return Segmented(labels, means[:, labels], kept)

    def variants(self, image: Image, made: Segmented, first: int, end: int) -> torch.Tensor:
        """Put the mean colours of the segments that are not kept into the image."""
        kept = (made.kept[first:end, made.labels] > 0).to(image.values.device)[:, None]
        return torch.where(kept, image.values, made.filled)

    def maps(self, image: Image, made: Segmented, scores: torch.Tensor) -> torch.Tensor:
        """Solve the regressions with an intercept that is not penalised, and give each pixel its segment's coefficient."""
        kept, targets = made.kept, scores.double().cpu().t()  # [N, G], [N, Q]
        cosine = kept.sum(1).sqrt() / kept.shape[1] ** 0.5
        weights = (-((1 - cosine) ** 2) / self.kernel**2).exp().sqrt()[:, None]
        share = weights / weights.sum()
        kept, targets = kept - (share * kept).sum(0), targets - (share * targets).sum(0)
        matrix = kept.t() @ (weights * kept) + self.ridge * torch.eye(kept.shape[1], dtype=torch.float64)
        coefficients = torch.linalg.solve(matrix, kept.t() @ (weights * targets))  # [G, Q]
        return coefficients.t()[:, made.labels].to(scores)
