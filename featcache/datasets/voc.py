"""PASCAL VOC 2007 and 2012 in their VOCdevkit layout (Everingham et al., IJCV 2010)."""

import xml.etree.ElementTree as ElementTree

import click
import numpy as np

from featcache.datasets.augmentation import MULTI_LABEL
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
# The annotations of the 2012 test set were never published.
SPLITS = {2007: ("train", "val", "test"), 2012: ("train", "val")}


def read_voc(root, year, splits=None):
    """Read a VOC dataset as multi-label records with boxes.

    root: the folder VOC<year>, or one that holds VOC<year> or VOCdevkit/VOC<year>.
    A class is present (1) if the image has a box of it that is not difficult, and -1 if all its
    boxes are difficult. Classes are the 20 of VOC, or, where the annotations name others, the
    sorted names found in all of Annotations/, with a notice.
    """
    home = _find_home(root, year)
    splits = tuple(splits or SPLITS[year])
    ids = {split: _read_ids(home, split) for split in splits}
    objects = {i: _read_annotation(home, i) for split_ids in ids.values() for i in split_ids}
    classes = CLASSES
    strangers = {o["name"] for _, found in objects.values() for o in found} - set(CLASSES)
    if strangers:
        classes = _classes_from_data(home)
        click.echo(
            f"notice: {home} is not annotated with VOC's 20 classes; using the {len(classes)} found there: "
            f"{', '.join(classes)}",
            err=True,
        )
    return Dataset(
        name=f"voc{year}",
        classes=classes,
        task="multi-label",
        splits={
            split: tuple(_record(home, i, *objects[i], classes) for i in split_ids) for split, split_ids in ids.items()
        },
        augmentation=MULTI_LABEL,
        training=("train", "trainval"),
    )


def _find_home(root, year):
    name = f"VOC{year}"
    for home in (root, root / name, root / "VOCdevkit" / name):
        if (home / "ImageSets" / "Main").is_dir():
            if home is root and root.name in {f"VOC{y}" for y in SPLITS} - {name}:
                raise BadInput(f"{root} is {root.name}, not {name}: use --dataset {root.name.lower()}")
            return home
    if not root.is_dir():
        raise BadInput(f"dataset folder not found: {root} (give it with --root, or set FEATCACHE_DATA)")
    others = [f"VOC{y}" for y in SPLITS if y != year]
    for other in others:
        if (root / other).is_dir() or (root / "VOCdevkit" / other).is_dir():
            raise BadInput(f"{root} holds {other} but no {name}: use --dataset {other.lower()}")
    raise BadInput(
        f"no {name} in {root}; expected this layout:\n"
        f"  {root}/\n    VOCdevkit/{name}/\n"
        "      Annotations/000005.xml ...\n      ImageSets/Main/train.txt ...\n      JPEGImages/000005.jpg ..."
    )


def _read_ids(home, split):
    path = home / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        there = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise BadInput(f"split file not found: {path} (splits there: {', '.join(there) or 'none'})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read split file {path}: {error}") from None
    ids = [line.split()[0] for line in lines if line.strip()]
    if not ids:
        raise BadInput(f"split file is empty: {path}")
    if len(set(ids)) < len(ids):
        repeated = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise BadInput(f"split file {path} lists {repeated!r} twice")
    return ids


def _parse(path):
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise BadInput(f"annotation not found: {path}") from None
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"broken XML in {path}: {error}") from None
    except OSError as error:
        raise BadInput(f"cannot read annotation {path}: {error}") from None


def _read_annotation(home, image_id):
    """Return ((height, width), [{name, difficult, box}]) of one image."""
    path = home / "Annotations" / f"{image_id}.xml"
    root = _parse(path)
    try:
        size = (int(root.findtext("size/height")), int(root.findtext("size/width")))
        objects = [
            {
                "name": item.findtext("name").strip(),
                "difficult": int(item.findtext("difficult") or 0) != 0,
                "box": [float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")],
            }
            for item in root.findall("object")
        ]
    except (AttributeError, TypeError, ValueError):
        raise BadInput(
            f"annotation {path}: <size> needs height and width, and each <object> a name and a bndbox of numbers"
        ) from None
    for item in objects:
        x0, y0, x1, y1 = item["box"]
        if not (x0 <= x1 and y0 <= y1):
            raise BadInput(f"annotation {path}: box of {item['name']!r} has xmax < xmin or ymax < ymin")
    return size, objects


def _classes_from_data(home):
    names = {
        (item.findtext("name") or "").strip()
        for path in (home / "Annotations").glob("*.xml")
        for item in _parse(path).findall("object")
    }
    return tuple(sorted(names - {""}))


def _record(home, image_id, size, objects, classes):
    image = home / "JPEGImages" / f"{image_id}.jpg"
    try:
        image_bytes = image.stat().st_size
    except OSError:
        raise BadInput(f"image not found: {image} (listed in {home / 'ImageSets' / 'Main'})") from None
    labels = np.zeros(len(classes), dtype=np.int8)
    box_classes = np.array([classes.index(o["name"]) for o in objects], dtype=np.int64)
    difficult = np.array([o["difficult"] for o in objects], dtype=bool)
    labels[box_classes[difficult]] = -1
    labels[box_classes[~difficult]] = 1
    boxes = np.array([o["box"] for o in objects], dtype=np.float32).reshape(-1, 4)
    # VOC counts pixels from 1 and includes the last one; ours count from 0 and exclude it.
    boxes -= np.array([1, 1, 0, 0], dtype=np.float32)
    return Record(image_id, image, image_bytes, *size, labels, boxes, box_classes, difficult)
