"""A small VOC2007-layout dataset: handwritten digits pasted on crops of photographs."""

import colorsys
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageFilter

from featcache.atomic import PARTIAL, write_whole
from featcache.errors import BadInput
from featcache.progress import Progress

WIDTH, HEIGHT = 320, 240
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "retina", "rocket",
)  # fmt: skip
# Of a digit, in pixels; half of those below the last are marked difficult.
MIN_SIDE, MAX_SIDE = 88, 176
DIFFICULT_SIDE = 100

# 0-based, half open: x0, y0, x1, y1.
Box = tuple[int, int, int, int]


def make_scenes(root: str | Path, counts: Mapping[str, int], seed: int = 0) -> bool:
    """Write VOCdevkit/VOC2007 under `root`, all or nothing; leave it alone if it exists already.

    counts: {split: number of scenes}. Each scene is a 320 x 240 JPEG with 1 to 3 digits of
    scikit-learn's set, at most 176 pixels high, on a crop of one of scikit-image's photographs;
    half of the digits under 100 pixels are marked difficult. Splits share photographs but no digit
    image. Returns whether anything was written.
    Raises BadInput if a package is missing or other files are in the way.
    """
    root = Path(root)
    recipe = json.dumps({"counts": counts, "seed": seed, "version": 1}, indent=1) + "\n"
    stamp = root / "scenes.json"
    if root.exists():
        if stamp.is_file() and stamp.read_text() == recipe:
            return False
        raise BadInput(
            f"{root} is in the way: it holds something else than these scenes; move it, or choose another --out"
        )
    digits, photographs = _load_sources()
    building = root.with_name(root.name + PARTIAL)
    shutil.rmtree(building, ignore_errors=True)
    try:
        _write_scenes(building / "VOCdevkit" / "VOC2007", counts, seed, digits, photographs)
        write_whole(building / "scenes.json", recipe)
        os.rename(building, root)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        # A write to a full disk does not say where.
        error.filename = error.filename or str(building)
        raise
    return True


def _write_scenes(
    home: Path,
    counts: Mapping[str, int],
    seed: int,
    digits: Sequence[tuple[int, np.ndarray]],
    photographs: Sequence[Image.Image],
) -> None:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (home / folder).mkdir(parents=True)
    random = np.random.default_rng(seed)
    pools = np.array_split(random.permutation(len(digits)), len(counts))
    number = 0
    with Progress("scenes", sum(counts.values()), unit="img") as progress:
        for pool, (split, count) in zip(pools, counts.items(), strict=True):
            ids = []
            for _ in range(count):
                number += 1
                ids.append(f"{number:06d}")
                image, objects = _draw_scene(random, [digits[i] for i in pool], photographs)
                image.save(home / "JPEGImages" / f"{ids[-1]}.jpg", quality=90)
                (home / "Annotations" / f"{ids[-1]}.xml").write_text(_annotation(ids[-1], objects))
                progress.update()
            (home / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))


def _load_sources() -> tuple[list[tuple[int, np.ndarray]], list[Image.Image]]:
    """Return ([(label, 8 x 8 array in 0..1)], [RGB photograph])."""
    try:
        from skimage import data
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadInput(f"the demo needs {error.name}: pip install 'featcache[demo]'") from None
    source: Any = load_digits()
    digits = [(int(label), pixels / 16) for label, pixels in zip(source.target, source.images, strict=True)]
    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    return digits, photographs


def _draw_scene(
    random: np.random.Generator, digits: Sequence[tuple[int, np.ndarray]], photographs: Sequence[Image.Image]
) -> tuple[Image.Image, list[tuple[str, bool, Box]]]:
    """Return an image and its objects [(class name, difficult, box)]."""
    image = _crop(random, photographs[int(random.integers(len(photographs)))])
    objects: list[tuple[str, bool, Box]] = []
    for _ in range(random.integers(1, 4)):
        for _ in range(50):
            side = int(random.integers(MIN_SIDE, MAX_SIDE + 1))
            x, y = int(random.integers(WIDTH - side)), int(random.integers(HEIGHT - side))
            if all(x + side <= a or x >= c or y + side <= b or y >= d for _, _, (a, b, c, d) in objects):
                break
        else:
            continue
        label, pixels = digits[int(random.integers(len(digits)))]
        box = _paste(random, image, pixels, side, x, y)
        objects.append((NAMES[label], bool(side < DIFFICULT_SIDE and random.random() < 0.5), box))
    return image, objects


def _crop(random: np.random.Generator, photograph: Image.Image) -> Image.Image:
    width, height = photograph.size
    scale = random.uniform(0.4, 1.0) * min(width / WIDTH, height / HEIGHT)
    w, h = int(WIDTH * scale), int(HEIGHT * scale)
    x, y = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
    crop = photograph.crop((x, y, x + w, y + h)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


def _paste(random: np.random.Generator, image: Image.Image, pixels: np.ndarray, side: int, x: int, y: int) -> Box:
    """Paste a light digit with a dark outline and return its tight box."""
    ink = Image.fromarray(np.uint8(255 * pixels)).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(random.uniform(-5, 5), Image.Resampling.BICUBIC)
    # More contrast, so that the stroke is solid and its edge is not a halo.
    stroke = Image.fromarray(np.uint8(np.clip((np.asarray(ink, dtype=np.float32) - 90) * 4, 0, 255)))
    outline = stroke.filter(ImageFilter.MaxFilter(7))
    colour = 255 * np.array(colorsys.hsv_to_rgb(random.random(), random.uniform(0, 0.6), 1))
    image.paste((10, 10, 10), (x, y), outline)
    image.paste(tuple(int(c) for c in colour), (x, y), stroke)
    tight: Any = outline.getbbox()
    x0, y0, x1, y1 = tight
    return x + x0, y + y0, x + x1, y + y1


def _annotation(image_id: str, objects: Sequence[tuple[str, bool, Box]]) -> str:
    items = "".join(
        f"\t<object>\n\t\t<name>{escape(name)}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
        f"\t\t<difficult>{int(difficult)}</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{x0 + 1}</xmin>\n\t\t\t<ymin>{y0 + 1}</ymin>\n"
        f"\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for name, difficult, (x0, y0, x1, y1) in objects
    )
    return (
        f"<annotation>\n\t<folder>VOC2007</folder>\n\t<filename>{image_id}.jpg</filename>\n"
        f"\t<size>\n\t\t<width>{WIDTH}</width>\n\t\t<height>{HEIGHT}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{items}</annotation>\n"
    )
