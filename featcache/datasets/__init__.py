"""Datasets by name: a registry of functions that read the layouts in which people keep them on disk.

To add one, write a file with a function `(root, splits=None) -> Dataset` and put it into DATASETS under its name.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from featcache.datasets.augmentation import Augmentation
from featcache.datasets.cifar import read_cifar
from featcache.datasets.coco import read_coco
from featcache.datasets.complete import completed
from featcache.datasets.folder import read_folder
from featcache.datasets.huggingface import read_huggingface
from featcache.datasets.imagenet import read_imagenet, read_imagenet100
from featcache.datasets.inaturalist2018 import read_inaturalist2018
from featcache.datasets.lists import read_lists
from featcache.datasets.manifest import read_manifest_file
from featcache.datasets.places205 import read_places205
from featcache.datasets.record import Dataset, Record
from featcache.datasets.stl10 import read_stl10
from featcache.datasets.voc import read_voc
from featcache.datasets.webdataset import read_webdataset
from featcache.errors import BadInput, nearest

__all__ = ["DATASETS", "Augmentation", "Dataset", "Record", "list_records", "read_dataset"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "voc": partial(read_voc, year=2007),
    "voc2007": partial(read_voc, year=2007),
    "voc2012": partial(read_voc, year=2012),
    "coco": partial(read_coco, year=2014),
    "coco2014": partial(read_coco, year=2014),
    "coco2017": partial(read_coco, year=2017),
    "imagenet": read_imagenet,
    "imagenet100": read_imagenet100,
    "places205": read_places205,
    "inaturalist2018": read_inaturalist2018,
    "cifar10": partial(read_cifar, classes=10),
    "cifar100": partial(read_cifar, classes=100),
    "stl10": read_stl10,
    "lists": read_lists,
    "folder": read_folder,
    "manifest": read_manifest_file,
    "huggingface": read_huggingface,
    "webdataset": read_webdataset,
}


def read_dataset(name: str, root: str | os.PathLike[str] | None = None, splits: Sequence[str] | None = None) -> Dataset:
    """Read a dataset's records, complete with the sizes of their images.

    root: folder; by default $FEATCACHE_DATA/<name>, else data/<name>.
    splits: names of splits; by default all that the dataset's protocol needs.
    Raises BadInput for an unknown name and for whatever is wrong on disk.

        data = read_dataset("voc", "/data", splits=["train", "val"])
        data.splits["train"][0].boxes  # float32 [M, 4]
        data.labels("train")  # int8 [N, 20]
    """
    return completed(list_records(name, root, splits))


def list_records(name: str, root: str | os.PathLike[str] | None = None, splits: Sequence[str] | None = None) -> Dataset:
    """Read a dataset's records as its layout lists them, without looking at images. Takes read_dataset's arguments."""
    if name not in DATASETS:
        raise BadInput(f"unknown dataset {name!r}{nearest(name, DATASETS)} (known: {', '.join(DATASETS)})")
    if root is None:
        root = Path(os.environ.get("FEATCACHE_DATA", "data")) / name
    return DATASETS[name](Path(root), splits=splits)
