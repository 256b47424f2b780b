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

        box: (x0, y0, x1, y1) of what is to be seen, in pixels of the image, which may be parts of one; by
        default all of it. flip: mirror the result from left to right.
        """
        if box is not None:
            image, box = _crop(image, box)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # A copy, because torch warns about PIL's read-only memory.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def normalise(self, images):
        """Turn uint8 [B, 3, H, W] into float32 (x / 255 - mean) / std on the same device, channels_last."""
        values = images.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)  # [B, H, W, 3]
        values /= 255
        # By whole rows: where the three channels lie innermost, broadcasting over them is three times slower.
        rows = values.flatten(2)
        rows -= torch.tensor(self.mean, device=images.device).repeat(images.shape[3])
        rows /= torch.tensor(self.std, device=images.device).repeat(images.shape[3])
        return values.permute(0, 3, 1, 2)


def _crop(image, box):
    """Crop to the whole pixels that a box touches; return the image and the box within it.

    Cropped before it is resized, as torchvision does, so that the filter sees nothing outside.
    """
    x0, y0, x1, y1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    if (x0, y0, x1, y1) == (0, 0, *image.size):
        return image, box
    return image.crop((x0, y0, x1, y1)), (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)
