"""From an image file to the backbone's input. Part of the features' identity."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from featcache.errors import BadInput


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

    def load(self, path):
        """Decode and resize one image: uint8 tensor [3, size, size] and its original (height, width).

        Raises BadInput naming the path when the file is no readable image.
        """
        try:
            with Image.open(path) as image:
                width, height = image.size
                image = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
            raise BadInput(f"unreadable image {path}: {reason}") from None
        # A copy, because torch warns about PIL's read-only memory.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), (height, width)

    def normalise(self, images):
        """Turn uint8 [B, 3, H, W] into float32 (x / 255 - mean) / std on the same device."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return (images.float() / 255 - mean) / std
