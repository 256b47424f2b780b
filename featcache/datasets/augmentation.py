"""The random crops and flips that make views of a training image."""

from dataclasses import dataclass

import numpy as np

from featcache.errors import BadInput

TRIES = 10
# Rows drawn at a time, so that a large dataset needs little memory.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip, as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    scale: lowest and highest share of the image's area. ratio: lowest and highest width / height of
    the crop. flip: probability. The defaults are those of ImageNet training (Szegedy et al., 2015).
    Raises BadInput for values out of range.

        crops = Augmentation(scale=(0.7, 1.0)).draw(np.array([[375, 500]]), seed=0, view=1)  # int32 [1, 5]
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise BadInput(f"crop scale {self.scale[0]:g} to {self.scale[1]:g}: expected 0 < lowest <= highest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise BadInput(f"crop ratio {self.ratio[0]:g} to {self.ratio[1]:g}: expected 0 < lowest <= highest")
        if not 0 <= self.flip <= 1:
            raise BadInput(f"flip probability {self.flip:g}: expected 0 to 1")

    def draw(self, sizes: np.ndarray, seed: int, view: int) -> np.ndarray:
        """Draw one view of every row: int32 [N, 5] of top, left, height, width in pixels, and flip (0 or 1).

        sizes: int [N, 2], heights and widths of the images. Row r depends only on (seed, view, r) and its own
        size: it uses the r-th 41 uniform numbers of the stream of numpy's default_rng((seed, view)).
        """
        random = np.random.default_rng((seed, view))
        sizes = np.asarray(sizes, dtype=np.int64)
        parts = [self._draw(sizes[at : at + BLOCK], random) for at in range(0, len(sizes), BLOCK)]
        return np.concatenate(parts) if parts else np.empty((0, 5), np.int32)

    def _draw(self, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
        uniform = random.random((len(sizes), 4 * TRIES + 1))
        area, ratio, top, left = uniform[:, :-1].reshape(-1, TRIES, 4).transpose(2, 0, 1)  # [N, TRIES] each
        height, width = sizes[:, :1], sizes[:, 1:]
        area = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
        # Log-uniform, so that wide and tall crops are as likely.
        low, high = np.log(self.ratio)
        ratio = np.exp(low + ratio * (high - low))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top, left = np.floor(top * (height - h + 1)), np.floor(left * (width - w + 1))
        tries = np.stack([top, left, h, w], axis=2)  # [N, TRIES, 4]
        chosen = tries[np.arange(len(sizes)), fits.argmax(1)]
        chosen = np.where(fits.any(1)[:, None], chosen, self._central(*sizes.T))
        return np.column_stack([chosen, uniform[:, -1] < self.flip]).astype(np.int32)

    def _central(self, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Return the largest central crop whose ratio is allowed, for images in which no try fitted: [N, 4]."""
        ratio = width / height
        h = np.where(ratio < self.ratio[0], np.rint(width / self.ratio[0]), height)
        w = np.where(ratio > self.ratio[1], np.rint(height * self.ratio[1]), width)
        return np.column_stack([(height - h) // 2, (width - w) // 2, h, w])


# The training augmentations of How-to-Probe for multi-label datasets.
MULTI_LABEL = Augmentation(scale=(0.7, 1.0))
# The augmentation of OpenMixup for CIFAR and STL-10.
SMALL_IMAGES = Augmentation(scale=(0.2, 1.0))
