"""ImageNet-1k (ILSVRC2012): class folders, or flat with a list or the devkit; subset lists too; and ImageNet-100."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from featcache.datasets.layout import (
    archives,
    first_file,
    folders_in,
    images_by_class,
    images_in,
    known_splits,
    read_lines,
    read_list,
    require_folder,
    wrong_layout,
)
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput

SPLITS = ("train", "val")
TREE = """
train/n01440764/*.JPEG ...
val/n01440764/*.JPEG ...                        or val/*.JPEG with one of
meta/val.txt                                        (lines "ILSVRC2012_val_00000001.JPEG 65")
ILSVRC2012_devkit_t12/data/                         (as its archive unpacks)
train_labeled_1percent.txt, 1percent.txt ...    for the split train-1percent; also in meta/
"""
TREE_100 = """
train/n01440764/*.JPEG ...                      all of ImageNet, in any of its layouts
val/n01440764/*.JPEG ...                        or val/*.JPEG
meta/ImageNet100/train_labeled_full.txt         (lines "n01440764/n01440764_10026.JPEG 0"; also beside ROOT in ../meta/)
meta/ImageNet100/val_labeled.txt                (also train.txt, val.txt)
"""
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def read_imagenet(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read ImageNet as single-label records; class names are the sorted wnids, as torchvision's ImageFolder has them.

    splits: train, val, and subsets such as train-1percent, for which there is a list. A list decides on images, order
    and labels, as in mmpretrain; without one the class folders do, else the devkit. A record's id is the image's file
    name without suffix.
    Raises BadInput for a list whose labels contradict the wnids in its file names.
    """
    require_folder(root)
    wnids = _wnids(root)
    return Dataset(
        name="imagenet",
        classes=wnids,
        task="single-label",
        splits={split: _records(root, split, wnids) for split in tuple(splits or SPLITS)},
        resize="crop",
    )


def read_imagenet100(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read the 100 classes of ImageNet that lists name (Tian et al., 2020), as single-label records with the lists' labels.

    The class names are the wnids in the order of the labels. A folder with just those 100 classes is read by
    read_imagenet. Raises BadInput for lists that contradict each other or the names of the files.
    """
    require_folder(root)
    chosen = known_splits(splits, SPLITS, "imagenet100")
    lists = {split: _list_of(root, split, "ImageNet100", inside=False) for split in SPLITS}
    names: dict[int, str] = {}
    rows: dict[str, list[tuple[str, int]]] = {}
    for split, path in lists.items():
        if path is None and split in chosen:
            raise wrong_layout(root, f"no list of ImageNet-100's split {split} in meta/ImageNet100 of {root}", TREE_100)
        rows[split] = []
        for number, image, label in read_list(path) if path else []:
            wnid = _wnid_of(image)
            if label is None:
                raise BadInput(f"{path} line {number}: {image} has no label")
            if wnid is not None and names.setdefault(label, wnid) != wnid:
                raise BadInput(f"{path} line {number}: label {label} is {names[label]}, the file is of {wnid}")
            rows[split].append((image, label))
    unnamed = sorted({label for listed in rows.values() for _, label in listed} - names.keys())
    if unnamed or sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
        raise BadInput(
            f"{root}: ImageNet-100's lists do not give each label from 0 one wnid, which the names of files hold"
        )
    read = {}
    for split in chosen:
        # A list may name images from the folder of the split, or from the folder above.
        nested = bool(folders_in(root / split))
        paths = [image.removeprefix(f"{split}/") for image, _ in rows[split]]
        paths = [
            image if "/" in image or not nested else f"{names[label]}/{image}"
            for image, (_, label) in zip(paths, rows[split], strict=True)
        ]
        read[split] = tuple(
            Record(id=os.path.splitext(os.path.basename(path))[0], image=os.path.join(root / split, path), labels=label)
            for path, (_, label) in zip(paths, rows[split], strict=True)
        )
    classes = tuple(names[label] for label in range(len(names)))
    return Dataset(name="imagenet100", classes=classes, task="single-label", splits=read, resize="crop")


def _wnids(root: Path) -> tuple[str, ...]:
    """Return the sorted wnids of the class folders, else of the folders that the lists name, else of the devkit."""
    for split in SPLITS:
        folders = folders_in(root / split)
        packed = [p for p in archives(root / split) if p.name.split(".")[0] not in folders]
        if packed:
            raise wrong_layout(root, f"{root / split} is only half unpacked", TREE, root / split)
        if folders:
            return tuple(folders)
    for split in SPLITS:
        listed = _list_of(root, split)
        wnids = [_wnid_of(image) for _, image, _ in read_list(listed)] if listed else []
        if wnids and None not in wnids:
            return tuple(sorted({wnid for wnid in wnids if wnid}))
    devkit = _devkit(root)
    if devkit:
        return tuple(sorted(_synsets(devkit).values()))
    raise wrong_layout(root, f"cannot tell ImageNet's classes in {root}", TREE)


def _records(root: Path, split: str, wnids: tuple[str, ...]) -> tuple[Record, ...]:
    base, _, subset = split.partition("-")
    folder = root / base
    if base not in SPLITS:
        raise BadInput(f"imagenet has no split {split!r} (it has train, val, and subsets such as train-1percent)")
    if not folder.is_dir():
        raise wrong_layout(root, f"no folder {folder}", TREE)
    listed, devkit = _list_of(root, split), _devkit(root)
    images: Iterable[tuple[str, int]]
    if listed:
        images = _read_listed(listed, folder, wnids)
    elif not subset and folders_in(folder):
        images = images_by_class(folder, wnids)
    elif not subset and split == "val" and devkit:
        images = _read_devkit(devkit, folder, wnids)
    else:
        raise wrong_layout(
            root, f"no list of the split {split} in {root}" if subset else f"no labels of {folder}", TREE
        )
    return tuple(Record(id=os.path.splitext(os.path.basename(p))[0], image=p, labels=label) for p, label in images)


def _list_of(root: Path, split: str, folder: str = "ImageNet", inside: bool = True) -> Path | None:
    """Return the list of a split, by the names that mmpretrain, OpenMixup and SimCLR give it, or None.

    folder: of the dataset's lists in `meta`. inside: whether lists may lie outside such a folder.
    """
    base, _, subset = split.partition("-")
    names = [f"{base}_labeled_{subset}.txt", f"{base}_{subset}.txt", f"{subset}.txt"]
    if not subset:
        names = [f"{base}.txt", f"{base}_labeled.txt", f"{base}_labeled_full.txt"]
    places = [*((root / "meta", root) if inside else (root / "meta" / folder,)), root.parent / "meta" / folder]
    return first_file(place / name for place in places for name in names)


def _wnid_of(image: str) -> str | None:
    """Return the wnid in a relative path: its folder, or the beginning of its file name; None if there is none."""
    match = re.search(r"(?:^|/)(n\d{8})[/_]", image)
    return match and match.group(1)


def _read_listed(path: Path, folder: Path, wnids: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield (path, label). The label is the list's, else that of the wnid in the file's name."""
    nested, index = bool(folders_in(folder)), {wnid: n for n, wnid in enumerate(wnids)}
    for number, image, label in read_list(path):
        wnid = _wnid_of(image)
        if wnid is not None and wnid not in index:
            raise BadInput(f"{path} line {number}: {wnid} is none of the {len(wnids)} classes")
        if label is None:
            if wnid is None:
                raise BadInput(f"{path} line {number}: {image} has no label, and no wnid in its name")
            label = index[wnid]
        if label >= len(wnids):
            raise BadInput(f"{path} line {number}: label {label} is out of range, there are {len(wnids)} classes")
        if wnid is not None and wnids[label] != wnid:
            raise BadInput(f"{path} line {number}: label {label} is {wnids[label]}, the file is of {wnid}")
        if nested and "/" not in image:
            image = f"{wnids[label]}/{image}"
        yield os.path.join(folder, image), label


def _devkit(root: Path) -> Path | None:
    """Return the devkit's data folder, or None."""
    places = (root / "ILSVRC2012_devkit_t12" / "data", root / "devkit" / "data", root / "data", root)
    truth = first_file(place / GROUND_TRUTH for place in places)
    return truth and truth.parent


def _synsets(devkit: Path) -> dict[int, str]:
    """Return {ILSVRC2012_ID: wnid} of the 1000 leaves, from map_clsloc.txt, else from meta.mat, which needs scipy."""
    if (devkit / "map_clsloc.txt").is_file():
        words = [line.split() for _, line in read_lines(devkit / "map_clsloc.txt")]
        return {int(number): wnid for wnid, number, *_ in words}
    meta = devkit / "meta.mat"
    if not meta.is_file():
        raise BadInput(f"{devkit / GROUND_TRUTH} numbers the classes by {meta}, which is missing")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise BadInput(
            f"{meta} needs scipy: pip install scipy, or sort the images of val into class folders, or give meta/val.txt"
        ) from None
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        return {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
    # The errors that scipy raises for a damaged file have no common base.
    except Exception as error:
        raise BadInput(f"cannot read {meta}: {error}") from None


def _read_devkit(devkit: Path, folder: Path, wnids: tuple[str, ...]) -> list[tuple[str, int]]:
    synsets, images = _synsets(devkit), images_in(folder)
    lines = read_lines(devkit / GROUND_TRUTH)
    if len(lines) != len(images):
        raise BadInput(f"{devkit / GROUND_TRUTH} has {len(lines)} lines, {folder} holds {len(images)} images")
    labelled = []
    for (number, line), image in zip(lines, images, strict=True):
        wnid = synsets.get(int(line)) if line.isdecimal() else None
        if wnid is None or wnid not in wnids:
            raise BadInput(f"{devkit / GROUND_TRUTH} line {number}: {line!r} is the number of no class")
        labelled.append((image, wnids.index(wnid)))
    return labelled
