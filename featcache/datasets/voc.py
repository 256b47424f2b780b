"""PASCAL VOC 2007 and 2012 in their VOCdevkit layout (Everingham et al., IJCV 2010)."""

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from featcache.datasets.augmentation import MULTI_LABEL
from featcache.datasets.image import FORMATS
from featcache.datasets.layout import read_flag, read_text, require_folder, whole_number, wrong_layout
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput, shown
from featcache.names import file_name
from featcache.progress import say

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
# The annotations of the 2012 test set were never published.
SPLITS = {2007: ("train", "val", "test"), 2012: ("train", "val")}
TREE = """
VOCdevkit/{name}/
  Annotations/000005.xml ...
  ImageSets/Main/train.txt ...
  JPEGImages/000005.jpg ...
  SegmentationClass/000032.png ...     (may be missing)
  SegmentationObject/000032.png ...    (may be missing)
"""
# The value of pixels at the borders of objects in segmentation masks; they belong to nothing.
VOID = 255

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VocObject:
    """One <object> of an annotation. corners: xmin, ymin, xmax, ymax as VOC counts pixels."""

    name: str
    difficult: bool
    corners: list[float]


@dataclass(frozen=True, slots=True)
class VocMasks:
    """The segmentation of one image.

    class_file, object_file: paths of its PNGs in SegmentationClass and SegmentationObject. objects: number of boxes.
    size: (height, width) of the image.
    """

    class_file: str
    object_file: str
    objects: int
    size: tuple[int, int]

    def read(self) -> np.ndarray:
        """Return bool [M, H, W]: the pixels of each box's object, in the order of the boxes; void pixels are in none."""
        indices = _read_indices(self.object_file, self.size)
        last = max(self.objects, int(indices.max(where=indices != VOID, initial=0)))
        if last > self.objects:
            raise BadInput(f"{self.object_file} shows object {last}, its annotation lists {self.objects}")
        return np.asarray(indices == np.arange(1, self.objects + 1)[:, None, None])

    def read_void(self) -> np.ndarray:
        """Return bool [H, W]: the pixels at the borders of objects, and of objects too small to be drawn."""
        return np.asarray(_read_indices(self.object_file, self.size) == VOID)

    def read_classes(self) -> np.ndarray:
        """Return uint8 [H, W]: 0 is background, n the n-th class, 255 void."""
        return _read_indices(self.class_file, self.size)


def _read_indices(path: str, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode not in ("P", "L"):
                raise BadInput(f"segmentation mask {path} is no palette image but {image.mode}")
            if image.size != size[::-1]:
                raise BadInput(
                    f"segmentation mask {path} is {image.width}x{image.height} pixels, the annotation of its image "
                    f"says {size[1]}x{size[0]}"
                )
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"unreadable segmentation mask {path}: {error}") from None


def read_voc(root: Path, year: int, splits: Sequence[str] | None = None) -> Dataset:
    """Read a VOC dataset as multi-label records with boxes.

    root: the folder VOC<year>, or one that holds VOC<year> or VOCdevkit/VOC<year>.
    A class is present (1) if the image has a box of it that is not difficult, and -1 if all its
    boxes are difficult. Images of the segmentation challenge have masks. Classes are the 20 of VOC; if
    the annotations name others, they are the sorted names in all of Annotations/, with a notice.
    """
    home = _find_home(root, year)
    splits = tuple(splits or SPLITS[year])
    ids = {split: _read_ids(home, split) for split in splits}
    annotations = {i: _read_annotation(home, i) for split_ids in ids.values() for i in split_ids}
    segmented = _segmented(home)
    classes: tuple[str, ...] = CLASSES
    if {box.name for _, boxes in annotations.values() for box in boxes} - set(CLASSES):
        classes = _classes_from_data(home)
        say(
            f"notice: {home} is not annotated with VOC's 20 classes; using the {len(classes)} found there: "
            f"{', '.join(classes)}"
        )
    return Dataset(
        name=f"voc{year}",
        classes=classes,
        task="multi-label",
        splits={
            split: tuple(_record(home, i, annotations[i], classes, i in segmented) for i in split_ids)
            for split, split_ids in ids.items()
        },
        augmentation=MULTI_LABEL,
    )


def _find_home(root: Path, year: int) -> Path:
    name = f"VOC{year}"
    for home in (root, root / name, root / "VOCdevkit" / name):
        if (home / "ImageSets" / "Main").is_dir():
            if home is root and root.name in {f"VOC{y}" for y in SPLITS} - {name}:
                raise BadInput(f"{root} is {root.name}, not {name}: use --dataset {root.name.lower()}")
            return home
    require_folder(root)
    others = [f"VOC{y}" for y in SPLITS if y != year]
    for other in others:
        if (root / other).is_dir() or (root / "VOCdevkit" / other).is_dir():
            raise BadInput(f"{root} holds {other} but no {name}: use --dataset {other.lower()}")
    raise wrong_layout(root, f"no {name} in {root}", TREE.format(name=name), root / "VOCdevkit")


def _segmented(home: Path) -> set[str]:
    """Return the ids of the images that have both masks."""
    kinds = [home / "SegmentationClass", home / "SegmentationObject"]
    return set.intersection(*({p.stem for p in kind.glob("*.png")} for kind in kinds))


def _read_ids(home: Path, split: str) -> list[str]:
    path = home / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        splits = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise BadInput(f"split file not found: {path} (splits there: {', '.join(splits) or 'none'})") from None
    ids = [file_name(line.split()[0], f"id in {path}:") for line in lines if line.strip()]
    if not ids:
        raise BadInput(f"split file is empty: {path}")
    if len(set(ids)) < len(ids):
        repeated = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise BadInput(f"split file {path} lists {shown(repeated)} twice")
    return ids


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise BadInput(f"annotation not found: {path}") from None
    except (ElementTree.ParseError, LookupError, RecursionError, ValueError) as error:
        raise BadInput(f"broken XML in {path}: {error}") from None
    except OSError as error:
        raise BadInput(f"cannot read annotation {path}: {error}") from None


def _read_annotation(home: Path, image_id: str) -> tuple[tuple[int, int], list[VocObject]]:
    """Return ((height, width), boxes) of one image."""
    path = home / "Annotations" / f"{image_id}.xml"
    root = _parse(path)

    def field(item: ElementTree.Element, name: str, read: Callable[[str | None], T], what: str, of: str = "") -> T:
        text = item.findtext(name)
        try:
            return read(text)
        except (TypeError, ValueError):
            problem = "is missing" if text is None else f"is {shown(text.strip())}"
            raise BadInput(f"annotation {path}: <{name.replace('/', '><')}>{of} {problem}, expected {what}") from None

    height, width = (field(root, f"size/{side}", _pixels, "a whole number of pixels") for side in ("height", "width"))
    boxes = []
    for number, item in enumerate(root.findall("object"), 1):
        of = f" of object {number}"
        corners = [field(item, f"bndbox/{edge}", _number, "a number", of) for edge in ("xmin", "ymin", "xmax", "ymax")]
        name = field(item, "name", _word, "the name of a class", of)
        if not (corners[0] <= corners[2] and corners[1] <= corners[3]):
            raise BadInput(f"annotation {path}: box of {shown(name)} has xmax < xmin or ymax < ymin")
        difficult = field(item, "difficult", read_flag, "0, 1, true, false or Unspecified", of)
        boxes.append(VocObject(name, difficult, corners))
    return (height, width), boxes


def _pixels(text: str | None) -> int:
    number = whole_number(text or "")
    if number is None or number < 1:
        raise ValueError("no size")
    return number


def _number(text: str | None) -> float:
    if text is None:
        raise ValueError("missing")
    number = float(text)
    # Python reads 1_0 as 10, which no other program does.
    if "_" in text or not math.isfinite(number):
        raise ValueError("no number")
    return number


def _word(text: str | None) -> str:
    word = (text or "").strip()
    if not word:
        raise ValueError("empty")
    return word


def _classes_from_data(home: Path) -> tuple[str, ...]:
    names = {
        (item.findtext("name") or "").strip()
        for path in (home / "Annotations").glob("*.xml")
        for item in _parse(path).findall("object")
    }
    return tuple(sorted(names - {""}))


def _record(
    home: Path,
    image_id: str,
    annotation: tuple[tuple[int, int], list[VocObject]],
    classes: tuple[str, ...],
    segmented: bool,
) -> Record:
    size, objects = annotation
    labels = np.zeros(len(classes), dtype=np.int8)
    box_classes = np.array([classes.index(box.name) for box in objects], dtype=np.int64)
    difficult = np.array([box.difficult for box in objects], dtype=bool)
    labels[box_classes[difficult]] = -1
    labels[box_classes[~difficult]] = 1
    boxes = np.array([box.corners for box in objects], dtype=np.float32).reshape(-1, 4)
    # VOC counts pixels from 1 and includes the last one; ours count from 0 and exclude it.
    boxes -= np.array([1, 1, 0, 0], dtype=np.float32)
    masks = None
    if segmented:
        by_class, by_object = (
            os.path.join(home, kind, f"{image_id}.png") for kind in ("SegmentationClass", "SegmentationObject")
        )
        masks = VocMasks(by_class, by_object, len(objects), size)
    return Record(
        id=image_id,
        image=os.path.join(home, "JPEGImages", f"{image_id}.jpg"),
        labels=labels,
        height=size[0],
        width=size[1],
        boxes=boxes,
        box_classes=box_classes,
        box_difficult=difficult,
        masks=masks,
    )
