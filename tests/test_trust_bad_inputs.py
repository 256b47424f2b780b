"""Bad inputs to every reader: the result of the good input, or one line that names the file; never anything else."""

import functools
import os
import random

import bad_inputs
import pytest
import torch
import trust
import yaml
from layouts import LAYOUTS, encoded, imagenet_meta, manifest

from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.probes.grids.grid import read_grid

# Of the many cases of a reader, those that always run.
SLICE = 12


def dataset(name, root):
    """What a dataset is read as."""
    data = read_dataset(name, root)
    return repr((data.classes, data.task, {s: [(r.id, data.fingerprint(s)) for r in rows] for s, rows in data.splits.items()}))


def written(name, root):
    return LAYOUTS[name](root)[0]


# {reader: (function that writes its files below a folder, what reads them, cases of them)}
READERS = {
    "voc": (bad_inputs.voc, functools.partial(dataset, "voc"), bad_inputs.voc_cases),
    "coco": (functools.partial(written, "coco"), functools.partial(dataset, "coco"), bad_inputs.coco_cases),
    "inaturalist2018": (
        functools.partial(written, "inaturalist2018"),
        functools.partial(dataset, "inaturalist2018"),
        bad_inputs.inaturalist_cases,
    ),
    "jsonl": (
        lambda root: manifest(root, "jsonl")[0].parent,
        lambda root: dataset("manifest", root / "list.jsonl"),
        bad_inputs.manifest_cases,
    ),
    "csv": (
        lambda root: manifest(root, "csv")[0].parent,
        lambda root: dataset("manifest", root / "list.csv"),
        bad_inputs.csv_cases,
    ),
    "parquet": (
        lambda root: manifest(root, "parquet")[0].parent,
        lambda root: dataset("manifest", root / "list.parquet"),
        bad_inputs.parquet_cases,
    ),
    "places205": (functools.partial(written, "places205"), functools.partial(dataset, "places205"), bad_inputs.places_cases),
    "imagenet": (lambda root: imagenet_meta(root)[0], functools.partial(dataset, "imagenet"), bad_inputs.imagenet_cases),
    "cifar10": (functools.partial(written, "cifar10"), functools.partial(dataset, "cifar10"), bad_inputs.cifar_cases),
    "stl10": (functools.partial(written, "stl10"), functools.partial(dataset, "stl10"), bad_inputs.stl_cases),
    "huggingface": (
        functools.partial(written, "huggingface"),
        functools.partial(dataset, "huggingface"),
        bad_inputs.huggingface_cases,
    ),
    "webdataset": (functools.partial(written, "webdataset"), functools.partial(dataset, "webdataset"), bad_inputs.webdataset_cases),
}  # fmt: skip


def write_pictures(root):
    for kind in ("JPEG", "PNG"):
        (root / f"{kind}.img").write_bytes(encoded(5, kind))
    return root


def decode(root):
    return [open_image(root / f"{kind}.img").tobytes() for kind in ("JPEG", "PNG")]


def write_grid(root):
    (root / "grid.yaml").write_text(yaml.safe_dump(trust.GRID))
    return root


def write_checkpoint(root):
    torch.manual_seed(0)
    torch.save(trust.network().state_dict(), root / "net.pth")
    return root


READERS |= {
    "image": (write_pictures, decode, bad_inputs.image_cases),
    "grid": (write_grid, lambda root: repr(read_grid(root / "grid.yaml")), bad_inputs.grid_cases),
    "checkpoint": (
        write_checkpoint,
        lambda root: load_backbone(root / "net.pth", arch="trust:network").weights_sha256,
        bad_inputs.checkpoint_cases,
    ),
}


def replaced(file, data):
    """Put other bytes in a file's place, as another file: the old one may still be mapped."""
    if data is None:
        file.unlink()
        return
    other = file.with_name("other")
    other.write_bytes(data)
    os.replace(other, file)


def check(reader, root, most, test):
    write, read, make = READERS[reader]
    root = write(root)
    cases = list(make(root))
    names = trust.chosen({str(case): case for case in (random.Random(0).sample(cases, min(most or len(cases), len(cases))))})
    read_root = functools.partial(read, root)
    good, failures = trust.outcome(read_root), {}
    assert good.kind == "value", good
    for name, case in names.items():
        before = case.file.read_bytes()
        replaced(case.file, case.data)
        got = trust.outcome(read_root)
        replaced(case.file, before)
        if got.kind == "fault":
            failures[name] = got.said
        elif got.kind == "value" and got.value != good.value and not case.free:
            failures[name] = "SILENT DIFFERENCE"
        elif got.kind == "line" and case.file.name not in got.said and case.file.parent.name not in got.said:
            failures[name] = f"the line does not name the file: {got.said}"
    assert trust.outcome(read_root) == good, "the files are as they were"
    assert not os.path.exists("/tmp/featcache-evidence"), "code ran"
    trust.judged(failures, names, f"{__file__}::{test}")


@pytest.mark.parametrize("reader", READERS)
def test_bad_input_is_an_error(reader, tmp_path):
    check(reader, tmp_path, SLICE, f"test_bad_input_is_an_error[{reader}]")


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_all_bad_inputs_are_errors(reader, tmp_path):
    check(reader, tmp_path, None, f"test_all_bad_inputs_are_errors[{reader}]")
