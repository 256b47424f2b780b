"""From a decoded image to the backbone's input. Part of the features' identity."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """Resize rule and normalisation.

    size: side of the square input in pixels. resize: "squash" resizes to size x size without
    keeping the aspect ratio (the VOC protocol of How-to-Probe), so that a box maps to the input by
    scaling. Interpolation is PIL's bilinear, which is anti-aliased. mean, std: per channel, for
    pixel values in 0..1.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "squash"
    interpolation: str = "bilinear"

    def describe(self):
        """Return the fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def apply(self, image, box=None, flip=False):
        """Resize a PIL image in mode RGB: uint8 tensor [3, size, size], whose memory is [size, size, 3].

        box: (x0, y0, x1, y1) of a crop that is squashed to the input whatever the resize rule, as
        torchvision's resized_crop does. flip: mirror it from left to right.
        """
        if box is not None:
            image, box = _crop(image, box)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # A copy, because torch warns about PIL's read-only memory.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def normalise(self, images):
        """Turn uint8 [B, 3, H, W] into float32 (x / 255 - mean) / std on the same device."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return (images.float() / 255 - mean) / std


def _crop(image, box):
    """Crop to the whole pixels that a box touches; return the image and the box within it.

    Cropped before it is resized, as torchvision does, so that the filter sees nothing outside.
    """
    x0, y0 = math.floor(box[0]), math.floor(box[1])
    inner = tuple(value - origin for value, origin in zip(box, (x0, y0, x0, y0), strict=True))
    return image.crop((x0, y0, math.ceil(box[2]), math.ceil(box[3]))), inner
