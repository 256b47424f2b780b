"""Every dataset layout from disk to a store, and what is wrong with each named in one line."""

import pickle

import numpy as np
import pytest
from layouts import LAYOUTS

import featcache
from featcache.datasets import DATASETS, read_dataset
from featcache.datasets.image import open_image


def test_every_name_has_a_layout_here():
    assert set(DATASETS) == set(LAYOUTS) | {"voc", "voc2007", "voc2012", "coco2014"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_extract_writes_what_the_layout_says(name, tmp_path, command):
    root, expected = LAYOUTS[name](tmp_path / "data")
    words = ("--backbone", "random", "--arch", "resnet18", "--size", 32, "--workers", 0, "--features", "pooled")
    code, _, err = command("extract", *words, "--dataset", name, "--root", root, "--store", tmp_path / "s.zarr")
    assert code == 0, err
    store = featcache.open_store(tmp_path / "s.zarr")
    assert {s: list(zip(store[s].ids, store[s].labels.tolist(), strict=True)) for s in store.splits} == expected
    assert store.task == ("multi-label" if name.startswith("coco") else "single-label")
    data = read_dataset(name, root)
    for split, records in data.splits.items():
        images = [open_image(record.image) for record in records]
        assert store[split].sizes.tolist() == [[image.height, image.width] for image in images]
        assert all(record.image_bytes > 0 for record in records)
        # Worker processes get the records by pickle, wherever they are not forked.
        for record, image in zip(pickle.loads(pickle.dumps(records)), images, strict=True):
            assert np.array_equal(open_image(record.image), image) and np.ptp(np.asarray(image)) > 0
    assert data.fingerprint(split) == read_dataset(name, root, [split]).fingerprint(split)
