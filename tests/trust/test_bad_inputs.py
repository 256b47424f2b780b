"""Bad inputs to every reader: the result of the good input, or one line that names the file; never anything else."""

import functools
import inspect
import os
import random
import shutil

import bad_inputs
import click
import pytest
import torch
import trust
import yaml
from layouts import LAYOUTS, encoded, imagenet_meta, manifest

import featcache
from featcache.backbones.load import load_backbone
from featcache.cli import cli
from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.probes.grids.grid import read_grid

# Of the many cases of a reader, those that always run.
SLICE = 12
# Of the command lines and calls, which take longer than files, those that always run.
LINES = 24


def dataset(name, root):
    """What a dataset is read as."""
    data = read_dataset(name, root)
    return repr(
        (data.classes, data.task, {s: [(r.id, data.fingerprint(s)) for r in rows] for s, rows in data.splits.items()})
    )


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
    "imagenet folders": (
        functools.partial(written, "imagenet"), functools.partial(dataset, "imagenet"), bad_inputs.imagenet_folder_cases,
    ),
    "cifar10": (
        functools.partial(written, "cifar10"),
        functools.partial(dataset, "cifar10"),
        functools.partial(
            bad_inputs.cifar_cases, "cifar10", "cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"
        ),
    ),
    "cifar100": (
        functools.partial(written, "cifar100"),
        functools.partial(dataset, "cifar100"),
        functools.partial(bad_inputs.cifar_cases, "cifar100", "cifar-100-python/train", "cifar-100-python/meta"),
    ),
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


def load(root):
    backbone = load_backbone(root / "net.pth", arch="trust:network")
    click.echo(backbone.load_report)
    return backbone.weights_sha256


READERS |= {
    "image": (write_pictures, decode, bad_inputs.image_cases),
    "grid": (write_grid, lambda root: repr(read_grid(root / "grid.yaml")), bad_inputs.grid_cases),
    "checkpoint": (
        write_checkpoint,
        load,
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
    root.mkdir()
    root = write(root)
    cases = list(make(root))
    names = trust.chosen(
        {str(case): case for case in (random.Random(0).sample(cases, min(most or len(cases), len(cases))))}
    )
    read_root = functools.partial(read, root)
    good, failures = trust.outcome(read_root), {}
    # A long path loses its middle; an absolute one in a list is that one; ids are those of a split.
    says_where = (str(root)[:50], "not found: /x", ", split ")
    assert good.kind == "value", good
    for name, case in names.items():
        before = case.file.read_bytes()
        replaced(case.file, case.data)
        got = trust.outcome(read_root)
        replaced(case.file, before)
        if got.kind == "fault":
            failures[name] = got.said
        elif got.kind == "value" and got.value != good.value and not case.free and got.said == good.said:
            failures[name] = "SILENT DIFFERENCE"
        elif got.kind == "line" and not any(word in got.said for word in (case.file.name, *says_where)):
            failures[name] = f"the line does not say where: {got.said}"
    assert trust.outcome(read_root) == good, "the files are as they were"
    assert not os.path.exists("/tmp/featcache-evidence"), "code ran"
    trust.judged(failures, names, f"{__file__}::{test}")


@pytest.mark.process
@pytest.mark.parametrize("reader", READERS)
def test_bad_input_is_an_error(reader, tmp_path):
    check(reader, tmp_path / "data", SLICE, f"test_bad_input_is_an_error[{reader}]")


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_all_bad_inputs_are_errors(reader, tmp_path):
    check(reader, tmp_path / "data", None, f"test_all_bad_inputs_are_errors[{reader}]")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """{name: path} of what the commands need, all of it good."""
    place = tmp_path_factory.mktemp("parts")
    (place / "images").mkdir()
    images = trust.write_images(place / "images")
    found = {"images": images, "store": place / "s.zarr", "run": place / "run", "grid": place / "grid.yaml"}
    trust.quietly(lambda: (trust.write_store(images, found["store"]), trust.train(found["store"], found["run"])))
    trust.quietly(lambda: featcache.attribute(found["run"]))
    write_grid(place), write_checkpoint(place)
    return found | {"net": place / "net.pth", "probe": featcache.open_run(found["run"]).scores[0]["probe"]}


BACKBONE = "--backbone {net} --arch trust:network"
# A good command line of each command. Every option that it has or could have is then given what it may not be.
COMMANDS = {
    "extract": f"{BACKBONE} --dataset manifest --root {{images}} --store new.zarr --size 32 --workers 0",
    "inspect": "{store}",
    "inspect --dataset": "--dataset manifest --root {images}",
    "layers": "{net} --arch trust:network",
    "verify": "{store}",
    "convert": "{store} --out new.hdf5",
    "train-probes": "--grid {grid} --store {store} --run new",
    "compare": "{run}",
    "attribute": "--run {run} --limit 2",
    "report": "--run {run} --out page.html",
    "export": f"--run {{run}} --probe {{probe}} {BACKBONE} --to new.safetensors",
    "import-probes": "{net} --store {store} --run imported --loss bce",
}
# Where files are written to: elsewhere than in the test's folder is not for a test to try.
PLACES = ("--store", "--run", "--out", "--to")


def command_lines(parts):
    """{name: words of a command line in which one option is given an odd value}."""
    found = {}
    for base, line in COMMANDS.items():
        command, *more = base.split()
        given = line.format_map(parts).split()
        for parameter in cli.commands[command].params:
            flag = parameter.opts[-1]
            if getattr(parameter, "is_flag", False) or not flag.startswith("--") or flag == "--help":
                continue
            for name, word in bad_inputs.WORDS.items():
                if (
                    (flag in PLACES and name in ("up", "slash"))
                    or "\0" in word
                    or (flag == "--workers" and word.isdigit())
                ):
                    # No system passes a NUL on a command line; and many workers only take long to start.
                    continue
                words = list(given)
                if flag in words:
                    words[words.index(flag) + 1] = word
                else:
                    words += [flag, word]
                found[f"{base}: {flag} {name}"] = [command, *words]
    return found


def check_commands(parts, command, place, monkeypatch, most, test):
    monkeypatch.chdir(place)
    cases = command_lines(parts)
    cases = trust.chosen({name: cases[name] for name in random.Random(0).sample(sorted(cases), most or len(cases))})
    failures = {}
    for name, words in cases.items():
        for other in place.iterdir():
            shutil.rmtree(other) if other.is_dir() else other.unlink()
        try:
            code, _, said = command(*words)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        last = said.strip().splitlines()[-1:] or [""]
        if code not in (0, 2) or "Traceback" in said or (code == 2 and len(last[0]) > trust.MOST_CHARACTERS):
            failures[name] = f"exit {code}: {last[0][:300]}"
    trust.judged(failures, cases, f"{__file__}::{test}")


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")
def test_odd_options_are_errors(parts, command, tmp_path, monkeypatch):
    check_commands(parts, command, tmp_path, monkeypatch, LINES, "test_odd_options_are_errors")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_odd_options_are_errors(parts, command, tmp_path, monkeypatch):
    check_commands(parts, command, tmp_path, monkeypatch, None, "test_all_odd_options_are_errors")


# Good arguments of the commands' Python twins.
TWINS = {
    "extract": {"backbone": "{net}", "arch": "trust:network", "dataset": "manifest", "root": "{images}", "store": "new.zarr",
                "size": 32, "workers": 0},
    "inspect_dataset": {"name": "manifest", "root": "{images}"},
    "layers": {"backbone": "{net}", "arch": "trust:network"},
    "verify": {"path": "{store}"},
    "open_store": {"path": "{store}"},
    "open_run": {"folder": "{run}"},
    "convert": {"store": "{store}", "out": "new.hdf5"},
    "train_probes": {"grid": "{grid}", "store": "{store}", "run": "new"},
    "plan_probes": {"grid": "{grid}", "store": "{store}"},
    "compare": {"runs": "{run}", "rule": "best map per loss"},
    "attribute": {"run": "{run}", "limit": 2},
    "report": {"runs": "{run}", "out": "page.html"},
    "export": {"run": "{run}", "probe": "{probe}", "backbone": "{net}", "arch": "trust:network", "to": "new.safetensors"},
}  # fmt: skip


def calls(parts):
    """{name: (function, arguments of which one is odd)}."""
    found = {}
    for name, good in TWINS.items():
        function = getattr(featcache, name)
        given = {k: v.format_map(parts) if isinstance(v, str) else v for k, v in good.items()}
        for argument in inspect.signature(function).parameters:
            for what, value in bad_inputs.VALUES.items():
                if argument != "workers":
                    found[f"{name}({argument}={what})"] = (function, given | {argument: value})
    return found


def check_calls(parts, place, monkeypatch, most, test):
    monkeypatch.chdir(place)
    cases = calls(parts)
    cases = trust.chosen({name: cases[name] for name in random.Random(0).sample(sorted(cases), most or len(cases))})
    failures = {}
    for name, (function, arguments) in cases.items():
        for other in place.iterdir():
            shutil.rmtree(other) if other.is_dir() else other.unlink()
        got = trust.outcome(lambda f=function, a=arguments: f(**a))
        # From Python the system's own error is one; the command line makes a line of it.
        if got.kind == "fault" and not got.said.startswith("OSError"):
            failures[name] = got.said
    trust.judged(failures, cases, f"{__file__}::{test}")


@pytest.mark.process
def test_odd_arguments_are_errors(parts, tmp_path, monkeypatch):
    check_calls(parts, tmp_path, monkeypatch, LINES, "test_odd_arguments_are_errors")


@pytest.mark.slow
def test_all_odd_arguments_are_errors(parts, tmp_path, monkeypatch):
    check_calls(parts, tmp_path, monkeypatch, None, "test_all_odd_arguments_are_errors")
