"""Datasets by name: a registry of functions that read what people have on disk.

To add one, put `name -> function(root, splits=None) -> Dataset` into DATASETS.
"""

import os
from functools import partial
from pathlib import Path

from featcache.datasets.augmentation import Augmentation
from featcache.datasets.record import Dataset, Record
from featcache.datasets.voc import read_voc
from featcache.errors import BadInput, nearest

__all__ = ["DATASETS", "Augmentation", "Dataset", "Record", "read_dataset"]

DATASETS = {
    "voc": partial(read_voc, year=2007),
    "voc2007": partial(read_voc, year=2007),
    "voc2012": partial(read_voc, year=2012),
}


def read_dataset(name, root=None, splits=None):
    """Read a dataset's records.

    root: folder; by default $FEATCACHE_DATA/<name>, else data/<name>.
    splits: names of splits; by default all that the dataset's protocol needs.
    Raises BadInput for an unknown name and for whatever is wrong on disk.
    """
    if name not in DATASETS:
        raise BadInput(f"unknown dataset {name!r}{nearest(name, DATASETS)} (known: {', '.join(DATASETS)})")
    if root is None:
        root = Path(os.environ.get("FEATCACHE_DATA", "data")) / name
    return DATASETS[name](Path(root), splits=splits)
