"""From a decoded image to the backbone's input. Part of the features' identity."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from featcache.backbones.architecture import Architecture
from featcache.errors import BadInput, nearest

# (x0, y0, x1, y1) in pixels of an image, which may be fractions of a pixel.
Box = tuple[float, float, float, float]
# What each rule does with a whole image, for people.
RESIZE = {
    "squash": "squash to {size}x{size}",
    "crop": "short side to {short}, then centre crop {size}x{size}",
    "warp": "short side to {short}, then squash to {size}x{size}",
}
# The weights' own rule: squash where their transform squashes, else crop. A Preprocessing has one of these two instead.
OWN = "own"
OPENCV = "opencv_bilinear"
# How a value of Architecture.origins begins where nothing says the field's value.
GUESS = "a guess"
# Pillow's filters; OpenCV's interpolation is none of them.
INTERPOLATION: dict[str, Image.Resampling | None] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    OPENCV: None,
}


@dataclass(frozen=True)
class Preprocessing:
    """Resize rule and normalisation.

    size: side of the square input in pixels. resize: "squash" does not keep the aspect ratio (VOC and
    COCO in How-to-Probe); "crop" brings the short side to `short_side` and cuts out the centre
    (ImageNet), to the pixel as torchvision's Resize and CenterCrop on PIL images; "warp" brings the
    short side to `short_side` and then squashes (VISSL's VOC07 SVM). short_side: None is
    size * 256 / 224, rounded. interpolation: Pillow's bilinear or bicubic, which are anti-aliased, or
    OpenCV's bilinear, which is not. mean, std: of red, green and blue, for pixel values in 0..1. bgr: the
    network sees blue first, as OpenCV reads images. inverse: the input is B-cos's six channels [x, 1 - x]
    of pixel values in 0..1, with mean 0 and std 1 (Boehle et al., CVPR 2022). Raises BadInput for fields that do not
    go together.

        preprocessing = Preprocessing(224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="crop")
        pixels = preprocessing.apply(image)  # PIL to uint8 [3, 224, 224]
        images = preprocessing.normalise(pixels[None])  # float32 [1, 3, 224, 224]
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "squash"
    interpolation: str = "bilinear"
    short_side: int | None = None
    inverse: bool = False
    bgr: bool = False

    def __post_init__(self) -> None:
        for option, known in (("resize", RESIZE), ("interpolation", INTERPOLATION)):
            word = getattr(self, option)
            if word not in known:
                raise BadInput(f"--{option} {word}: unknown{nearest(word, known)} (known: {', '.join(known)})")
        for option in ("mean", "std"):
            values = tuple(float(v) for v in getattr(self, option))
            object.__setattr__(self, option, values)
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise BadInput(f"--{option}: expected three numbers, for red, green and blue")
            if max(values) > 1:
                raise BadInput(f"--{option} {_numbers(values)}: pixel values are in 0..1 here; divide by 255")
        if min(self.std) <= 0:
            raise BadInput(f"--std {_numbers(self.std)}: must be above 0")
        if self.inverse and (self.mean, self.std) != ((0, 0, 0), (1, 1, 1)):
            raise BadInput("--mean, --std: a network whose input is [x, 1 - x] takes pixels in 0..1 as they are")
        if self.size < 1:
            raise BadInput(f"--size {self.size}: must be at least 1")
        if self.short_side is not None and self.resize == "squash":
            raise BadInput("--short-side goes with --resize crop or warp; squash resizes both sides at once")
        if self.resize == "crop" and self.short < self.size:
            raise BadInput(f"--short-side {self.short} is less than the crop, --size {self.size}")
        if self.short < 1:
            raise BadInput(f"--short-side {self.short}: must be at least 1")

    @property
    def short(self) -> int:
        """Length of the short side of the resized image, before it is cropped or squashed, in pixels."""
        if self.resize == "squash":
            return self.size
        return round(self.size * 256 / 224) if self.short_side is None else self.short_side

    def changed(self, **fields: Any) -> "Preprocessing":
        """Return the same with other fields; those that are None stay as they are. Raises BadInput."""
        return replace(self, **{name: value for name, value in fields.items() if value is not None})

    def describe(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, without those that play no part."""
        fields: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        fields["short_side"] = None if self.resize == "squash" else self.short
        return {k: v for k, v in fields.items() if v not in (None, False)}

    def __str__(self) -> str:
        rule = RESIZE[self.resize].format(size=self.size, short=self.short)
        pixels = (
            "[x, 1 - x] of pixels in 0..1" if self.inverse else f"mean {_numbers(self.mean)}, std {_numbers(self.std)}"
        )
        return f"{rule} ({self.interpolation}), {pixels}" + (", blue before green and red" if self.bgr else "")

    def apply(self, image: Image.Image, box: Box | None = None) -> torch.Tensor:
        """Resize a PIL image in mode RGB to a uint8 tensor [3, size, size], whose memory is [size, size, 3].

        box: the part of the image that is to be seen; by default all of it.
        """
        side = self.size
        image, part = _crop(image, box or (0, 0, *image.size))
        if self.resize == "squash":
            return _pixels(self._resized(image, (side, side), part))
        image = self._resized(image, self._whole(part[2] - part[0], part[3] - part[1]), part)
        if self.resize == "warp":
            return _pixels(self._resized(image, (side, side), None))
        left, top = self._corner(*image.size)
        return _pixels(image.crop((left, top, left + side, top + side)))

    def apply_view(self, image: Image.Image, box: Box, flip: bool) -> torch.Tensor:
        """Squash a part of the image to the input whatever the resize rule, as in training; returns what `apply` does.

        torchvision's resized_crop does the same. flip: mirror the result from left to right.
        """
        image, box = _crop(image, box)
        image = self._resized(image, (self.size, self.size), box)
        return _pixels(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)

    def _resized(self, image: Image.Image, sides: tuple[int, int], box: Box | None) -> Image.Image:
        """Resize what a box holds of a PIL image to sides, (width, height). OpenCV resizes all of the image."""
        if self.interpolation != OPENCV:
            return image.resize(sides, INTERPOLATION[self.interpolation], box=box)
        cv2 = import_opencv()
        return Image.fromarray(cv2.resize(np.asarray(image), sides, interpolation=cv2.INTER_LINEAR))

    def _whole(self, width: float, height: float) -> tuple[int, int]:
        """Return width and height of a whole image with its short side at `short`, as torchvision rounds them."""
        long = int(self.short * max(width, height) / min(width, height))
        return (self.short, long) if width <= height else (long, self.short)

    def _corner(self, width: int, height: int) -> tuple[int, int]:
        """Return left and top of the centre crop, as torchvision rounds them: halves to the even number."""
        return round((width - self.size) / 2), round((height - self.size) / 2)

    def map_boxes(self, boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Convert boxes from pixels of an image to pixels of the input.

        boxes: [M, 4] as x0, y0, x1, y1 in an image of height x width. Returns float64 [M, 4], clipped
        to the input, and bool [M], whether any part of the box is in it.
        """
        whole, corner = self._placed(height, width)
        moved = np.asarray(boxes, np.float64).reshape(-1, 4) * (2 * whole) / (2 * (width, height)) - 2 * corner
        moved = moved.clip(0, self.size)
        return moved, (moved[:, 0] < moved[:, 2]) & (moved[:, 1] < moved[:, 3])

    def map_masks(self, masks: np.ndarray) -> np.ndarray:
        """Convert masks [..., H, W] of an image to pixels of the input, [..., size, size], each by its centre.

        A filled box becomes the pixels whose centre is in the box that map_boxes makes of it.
        """
        height, width = masks.shape[-2:]
        whole, corner = self._placed(height, width)
        # In whole numbers, so that no rounding moves a centre over the edge of a pixel.
        columns, rows = (
            (2 * (np.arange(self.size) + first) + 1) * side // (2 * sides)
            for first, side, sides in zip(corner, (width, height), whole, strict=True)
        )
        return masks[..., rows[:, None], columns]

    def _placed(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the (width, height) that an image is resized to, and the (left, top) of the input in it."""
        if self.resize != "crop":
            return (self.size, self.size), (0, 0)
        whole = self._whole(width, height)
        return whole, self._corner(*whole)

    def normalise(self, images: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Turn uint8 [B, 3, H, W] into the input on the same device: float32 [B, 3 or 6, H, W], channels_last.

        Three channels are (x - mean) / std of x in 0..1, six are [x, 1 - x]. memory: float32 [at least B, H, W, 3]
        to write to, so that the system does not have to map new memory for every batch; the result may lie in it.
        """
        pixels = images.permute(0, 2, 3, 1)
        values = torch.empty(pixels.shape, device=images.device) if memory is None else memory[: len(images)]
        values.copy_(pixels)
        values /= 255
        # By whole rows, since broadcasting over three channels that lie innermost is three times slower.
        rows = values.flatten(2)
        rows -= torch.tensor(self.mean, device=images.device).repeat(images.shape[3])
        rows /= torch.tensor(self.std, device=images.device).repeat(images.shape[3])
        x = values.permute(0, 3, 1, 2)
        if self.bgr:
            return x.flip(1)
        return torch.cat([x, 1 - x], 1) if self.inverse else x


def preprocessing_of(architecture: Architecture, **given: Any) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing of an Architecture's weights, with given fields in the place of theirs.

    given: fields of Preprocessing. None leaves the weights' own value, except that the resize rule is then squash,
    since datasets choose it; resize=OWN is the weights' rule. The weights' short side keeps its ratio at another size.
    Returns (Preprocessing, lines for people on where the weights' own values are from, or which are a guess). Raises
    BadInput.
    """
    given = {field: value for field, value in given.items() if value is not None}
    rule = given.setdefault("resize", Preprocessing.resize)
    if rule == OWN:
        rule = given["resize"] = architecture.resize
        chosen = given.keys() - {"resize"}
    else:
        chosen = set(given)
    unused = set() if rule == "crop" else {"short_side"}
    if rule == "crop" and architecture.short_side is not None:
        size = given.get("size", architecture.size)
        given = {"short_side": round(size * architecture.short_side / architecture.size)} | given
    origins = {field: origin for field, origin in architecture.origins.items() if field not in chosen | unused}
    return Preprocessing(**_own(architecture) | given), tuple(_lines(origins))


def _lines(origins: dict[str, str]) -> Iterator[str]:
    """Turn {field: origin} into lines, one for all fields of the same origin; a guess comes with its options."""
    fields_from: dict[str, list[str]] = {}
    for field in ("size", "resize", "short_side", "interpolation", "mean", "std", "bgr"):
        if field in origins:
            fields_from.setdefault(origins[field], []).append(field)
    for origin, fields in fields_from.items():
        if origin.startswith(GUESS):
            origin += f" ({', '.join('--' + field.replace('_', '-') for field in fields)} to differ)"
        yield f"{', '.join(fields).replace('_', ' ')}: {origin}"


def _own(architecture: Architecture) -> dict[str, Any]:
    fields = {f: getattr(architecture, f) for f in ("size", "mean", "std", "interpolation", "inverse", "bgr")}
    # Six channels are not normalised.
    return fields | ({"mean": (0, 0, 0), "std": (1, 1, 1), "bgr": False} if architecture.inverse else {})


def import_opencv() -> ModuleType:
    """Return the package cv2, set to run in one thread. Raises BadInput if it is not installed."""
    try:
        import cv2
    except ImportError:
        raise BadInput(f"--interpolation {OPENCV} needs OpenCV: pip install 'featcache[opencv]'") from None
    # Its threads would not survive the fork of a DataLoader's workers.
    cv2.setNumThreads(0)
    module: ModuleType = cv2
    return module


def _pixels(image: Image.Image) -> torch.Tensor:
    # A copy, because torch warns about PIL's read-only memory.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{v:.6g}" for v in values)


def _crop(image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    """Crop to the whole pixels that a box touches; return the image and the box within it.

    The image is cropped before it is resized, as torchvision does, so that the filter sees nothing outside the box.
    """
    x0, y0, x1, y1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    if (x0, y0, x1, y1) == (0, 0, *image.size):
        return image, box
    return image.crop((x0, y0, x1, y1)), (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)
