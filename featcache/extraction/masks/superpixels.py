"""Variants that lack some of an image's superpixels: those of LIME, and what all such variants have in common."""

import hashlib
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from featcache.errors import BadInput
from featcache.extraction.masks.masking import Masking
from featcache.feature import Feature

# The number of the superpixel that each pixel belongs to. No backbone has a layer of this name.
SUPERPIXELS = Feature("superpixels", "spatial")


class Segmented(NamedTuple):
    """An image in superpixels.

    labels: int64 [S, S]. filled: [C, S, S], every pixel the mean of its superpixel; None where there is no image. kept:
    float64 [N, G], 1 where a variant has a superpixel.
    """

    labels: torch.Tensor
    filled: torch.Tensor | None
    kept: torch.Tensor

    def painted(self, values: torch.Tensor) -> torch.Tensor:
        """Give every pixel the value of its superpixel. values: [Q, G]. Returns [Q, S, S]."""
        return values[:, self.labels.to(values.device)]


class Superpixels(Masking):
    """Base of variants in which some superpixels have their mean colour. Superpixels are quickshift's."""

    samples: Annotated[int, Field(ge=1, le=1_000_000)] = Field(1000, description="variants, the first being the image")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="draws the variants, with the image's id")
    counted: ClassVar[str | None] = "samples"
    noted: ClassVar[Feature | None] = SUPERPIXELS

    def number(self, size: int) -> int:
        """The variants."""
        return self.samples

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw which of `count` superpixels each variant keeps: float64 [N, count] of 0 and 1, the first row all 1."""
        raise NotImplementedError

    def start(self, image: torch.Tensor, id: str) -> Segmented:
        """Cut the image into superpixels, and draw which of them each variant keeps."""
        labels = self._segments(image)
        count = int(labels.max()) + 1
        flat = labels.flatten().to(image.device)
        sums = image.new_zeros(image.shape[0], count).index_add_(1, flat, image.flatten(1))
        means = sums / labels.flatten().bincount(minlength=count).to(sums)
        return Segmented(labels, means[:, labels], self._kept(labels, id))

    def masked(self, image: torch.Tensor, made: Segmented, first: int, end: int) -> torch.Tensor:
        """Put the mean colours of the superpixels that are not kept into the image."""
        assert made.filled is not None, "variants are made from images"
        kept = (made.kept[first:end, made.labels] > 0).to(image.device)[:, None]
        return torch.where(kept, image, made.filled)

    def note(self, made: Segmented) -> torch.Tensor:
        """Return the numbers of the superpixels as a map."""
        return made.labels[None]

    def recall(self, note: torch.Tensor | None, id: str) -> Segmented:
        """Draw again which superpixels each variant keeps. Raises ValueError if the map does not number superpixels."""
        assert note is not None, "superpixels are noted"
        labels = note[0].long()
        numbers = labels.unique()
        if not torch.equal(labels.to(note), note[0]) or not torch.equal(numbers, torch.arange(len(numbers))):
            raise ValueError("its superpixels are not numbered from 0")
        return Segmented(labels, None, self._kept(labels, id))

    def _kept(self, labels: torch.Tensor, id: str) -> torch.Tensor:
        # By the id rather than the row, which is another one in a store of some of the images.
        seed = hashlib.sha256(f"{self.seed} {id}".encode(errors="surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8]) >> 1)
        return self.draw(int(labels.max()) + 1, generator)

    def _segments(self, image: torch.Tensor) -> torch.Tensor:
        """Cut an image [C, S, S] into superpixels: their numbers, int64 [S, S]. Raises BadInput without scikit-image."""
        try:
            from skimage.segmentation import quickshift
        except ImportError:
            raise BadInput(
                f"{self.type} needs the package scikit-image: pip install 'featcache[attribution]'"
            ) from None
        # Of B-cos's six channels, the last three follow from the first.
        pixels = image[:3].permute(1, 2, 0).cpu().double()
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
        return torch.from_numpy(quickshift(pixels.numpy(), kernel_size=4, max_dist=200, ratio=0.2, rng=0)).long()


class RandomSuperpixels(Superpixels):
    """Variants that keep every superpixel with probability 1/2. The first keeps all."""

    type: Literal["lime"] = "lime"
    extends: ClassVar[bool] = True

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See Superpixels.draw."""
        kept = torch.randint(2, (self.samples, count), generator=generator).double()
        kept[0] = 1
        return kept
