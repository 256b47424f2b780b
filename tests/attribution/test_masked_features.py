"""Masked images' features from a store of `extract --masks`: the maps are those of masks that are made on the fly."""

import itertools
import math
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from extracting import options
from folders import tree_hash

import featcache
from featcache.attribution.methods import rise as rise_module
from featcache.attribution.methods.kernel_shap import KernelSHAP
from featcache.attribution.methods.rise import RISE
from featcache.errors import BadInput
from featcache.extraction import job
from featcache.extraction.masks import MASKS, parse_masks
from featcache.extraction.masks.coalitions import Coalitions
from featcache.extraction.masks.random_cells import RandomCells
from featcache.extraction.masks.superpixels import RandomSuperpixels, Segmented
from featcache.probes.runs.run import open_run
from featcache.store.verify import verify

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 4, "optimizer": {"type": "sgd", "lr": 0.5}},
        {"features": "pooled", "head": {"type": "mlp", "hidden": 8, "pool": "before"}, "loss": "bce", "epochs": 2,
         "optimizer": {"type": "adam", "lr": 0.01}},
        {"features": "layer3:spatial", "head": {"type": "mlp", "hidden": 8}, "loss": "bce", "epochs": 2,
         "optimizer": {"type": "adam", "lr": 0.01}},
    ]
}  # fmt: skip
LIMIT = 3
KINDS = ("rise:24:cells=4", "lime:30", "kernel_shap:20", "occlusion:stride=32")
METHODS = ["rise:masks=24:cells=4", "lime:samples=30", "kernel_shap:samples=20", "occlusion:stride=32"]


@pytest.fixture(scope="module")
def folder(store, scenes, checkpoint, tmp_path_factory):
    """A folder with a copy of the store, a run on it, and float32 stores of masked images beside it."""
    folder = tmp_path_factory.mktemp("masks")
    shutil.copytree(store, folder / "digits.zarr")
    featcache.train_probes(GRID, store=folder / "digits.zarr", run=folder / "run")
    for number, kind in enumerate(KINDS):
        mask(folder / f"{number}.{'hdf5' if number % 2 else 'zarr'}", scenes, checkpoint, kind)
    return folder


def mask(path, scenes, checkpoint, kind, **more):
    """Extract the masked images of the test split."""
    given = {"splits": ["test"], "limit": LIMIT, "dtype": "float32"} | more
    return featcache.extract(
        checkpoint, "voc", scenes, size=64, store=path, masks=kind, device="cpu", workers=0, batch_size=8, **given
    )


@pytest.fixture(scope="module")
def probes(folder):
    """The ids of probes by what they read: [two linear, one MLP], and one that needs positions."""
    read = {row["probe"]: row["features"] for row in open_run(folder / "run").scores}
    pooled = [probe for probe, features in read.items() if features == "layer4:pooled"]
    (spatial,) = read.keys() - set(pooled)
    return pooled, spatial


def maps_of(folder, probes, **more):
    """Explain probes in a copy of the run; return (rows, maps)."""
    run = folder / "copy"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "run", run)
    given = {"methods": METHODS, "limit": LIMIT, "store": folder / "digits.zarr", "device": "cpu"} | more
    rows = featcache.attribute(run, probes=probes, **given)
    return rows, np.load(run / "attribution.npz")["maps"]


def test_maps_from_stores_equal_those_on_the_fly(folder, probes, scenes, checkpoint, store, capsys, tmp_path):
    pooled, spatial = probes
    rows, maps = maps_of(folder, pooled)
    said = capsys.readouterr().err
    assert all(f"from {folder / name}" in said for name in ("0.zarr", "1.hdf5", "2.zarr", "3.hdf5"))
    assert "passes of an image" not in said
    # Beside the store of the session lie no masks.
    backbone = {"backbone": checkpoint, "dataset": "voc", "root": scenes}
    again, expected = maps_of(folder, pooled, store=store, **backbone)
    assert "masks:" not in capsys.readouterr().err
    assert [{**row, "epg": 0} for row in rows] == [{**row, "epg": 0} for row in again] and len(maps) == len(rows) > 9
    for own, other in zip(maps, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-3 * np.abs(other).max() + 1e-7)
    # One that reads positions goes through the backbone, and the others do not.
    masks = 24 * LIMIT
    both, mixed = maps_of(folder, [pooled[0], spatial, pooled[1]], methods=METHODS[:1], **backbone)
    said = capsys.readouterr().err
    assert "1 of 3 heads read their map by its positions" in said
    assert f"through the backbone: {masks} forward and 0 backward" in said
    expected = {row["probe"]: own for row, own in zip(rows, maps, strict=True) if row["method"] == METHODS[0]}
    last = {row["probe"]: own for row, own in zip(both, mixed, strict=True)}
    for probe in pooled[:2]:
        np.testing.assert_array_equal(last[probe], expected[probe])
    alone, _ = maps_of(folder, [spatial], methods=METHODS[:1], store=store, **backbone)
    assert [row["epg"] for row in both if row["probe"] == spatial] == pytest.approx([row["epg"] for row in alone])


def test_float16_rounds_and_fewer_masks_are_the_first(folder, probes, scenes, checkpoint, tmp_path):
    half = mask(tmp_path / "half.zarr", scenes, checkpoint, KINDS[0], dtype="float16", limit=2)
    own = {"methods": ["rise:masks=20:cells=4"], "limit": 2}
    _, maps = maps_of(folder, probes[0], masks=half, **own)
    _, expected = maps_of(folder, probes[0], masks=folder / "0.zarr", **own)
    assert np.abs(maps - expected).max() < 2e-3 * np.abs(expected).max() and (maps != expected).any()
    few, many = (RandomSuperpixels(samples=n).draw(7, torch.Generator().manual_seed(1)) for n in (5, 300))
    assert torch.equal(few, many[:5])


def test_blocks_of_heads_give_the_same(folder, probes):
    given = {"methods": METHODS[:1], "masks": folder / "0.zarr"}
    whole, _ = maps_of(folder, probes[0], **given)
    single, _ = maps_of(folder, probes[0], memory=1.0, **given)
    assert [row["epg"] for row in single] == pytest.approx([row["epg"] for row in whole], rel=1e-5)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--masks", "{0}", "--method", "rise:masks=99:cells=4"), "it has 24 masks, and --method rise:masks=99:cells=4 asks for 99: say --method rise:masks=24:cells=4"),
        (("--masks", "{0}", "--method", "rise:masks=24"), "its masks are rise:masks=24:cells=4, and those asked for rise:masks=24: say --method rise:masks=24:cells=4"),
        (("--masks", "{2}", "--method", "kernel_shap:samples=10"), "its masks are kernel_shap:samples=20, and those asked for kernel_shap:samples=10"),
        (("--masks", "{0}", "--method", "lime:samples=30"), "it has the masks of rise, and --method lime needs those of lime"),
        (("--masks", "{0}", "--method", "gradcam"), "--masks: none of these methods masks images as a store can hold; rise, lime, kernel_shap, occlusion do"),
        (("--masks", "{0}", "--method", "rise:masks=24:cells=4", "--limit", "5"), "it lacks 2 of the 5 images to explain, such as"),
        (("--masks", "{0}", "--method", "rise:masks=24:cells=4", "--split", "val"), "it has no split val (it has test)"),
        (("--masks", "{digits}", "--method", "rise"), "it is a store of images as they are; featcache extract --masks writes one of masked images"),
        (("--masks", "{other}", "--method", "rise:masks=4"), 'it is of another backbone, or of images prepared otherwise: preprocessing.mean: '),
        (("--method", "rise"), "--method rise runs the backbone: give --backbone, --dataset and --root, or --masks, a store of extract --masks rise"),
        (("--method", "rise:masks=24:cells=4", "--probe", "{spatial}"), "reads layer3:spatial by its positions, which the store of masked images lacks: give --backbone"),
        (("--method", "rise:masks=4", "--masks", "nowhere.zarr"), "store not found: nowhere.zarr"),
    ],
)  # fmt: skip
def test_stores_that_do_not_fit(folder, probes, scenes, checkpoint, command, tmp_path, words, message):
    if any("{other}" in word for word in words):
        mask(tmp_path / "other.zarr", scenes, checkpoint, "rise:4", limit=1, mean=(0.5, 0.5, 0.5))
    places = {"digits": folder / "digits.zarr", "other": tmp_path / "other.zarr", "spatial": probes[1]}
    given = [word.format(*(folder / f"{n}.zarr" for n in range(3)), **places) for word in words]
    limit = [] if "--limit" in words else ["--limit", LIMIT]
    code, _, err = command(
        "attribute", "--run", folder / "run", "--probe", probes[0][0], "--device", "cpu", *limit, *given
    )
    assert code == 2 and message in err and err.count("Error") == 1, err


def test_an_image_that_was_replaced(folder, probes, scenes, checkpoint, tmp_path):
    """Of the same length, so that the dataset's fingerprint does not tell."""
    other = tmp_path / "scenes"
    shutil.copytree(scenes, other)
    opened = featcache.open_store(folder / "0.zarr")["test"]
    path = next(other.rglob(f"JPEGImages/{opened.ids[1]}.jpg"))
    data = bytearray(path.read_bytes())
    data[15] ^= 1  # the density, which changes no pixel
    path.write_bytes(data)
    mask(tmp_path / "s.zarr", other, checkpoint, "rise:4")
    with pytest.raises(
        BadInput, match=f"image {opened.ids[1]} was another file when its masked variants were extracted"
    ):
        maps_of(folder, probes[0], methods=["rise:masks=4"], masks=tmp_path / "s.zarr")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--masks foo:3 --split test", "--masks: unknown masks 'foo' (known: rise, lime, kernel_shap, occlusion)"),
        ("--masks rise:x --split test", "--masks rise:masks=x: masks: input should be a valid integer"),
        ("--masks rise:4:celsl=3 --split test", "'celsl=3' is no field=value of rise; did you mean 'cells'?"),
        ("--masks rise:4", "say of which split with --split, and --limit N"),
        ("--masks rise:4 --split train --views 1", "--masks and --views: masked variants are of the images as they are"),
        ("--limit 3", "--limit is for --masks"),
        ("--masks rise:5 --split test --limit 3 --store {masks}", "is another store (id"),
    ],
)  # fmt: skip
def test_what_extract_does_not_mask(folder, scenes, checkpoint, command, words, message):
    given = words.format(masks=folder / "0.zarr").split()
    common = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes, "--size", 64, "--dtype", "float32"]
    code, _, err = command("extract", *common, *given)
    assert code == 2 and message in err and err.count("Error") == 1, err


def test_probes_do_not_train_on_masked_images(folder):
    with pytest.raises(BadInput, match="is of masked images, which are for attribute"):
        featcache.train_probes(GRID, store=folder / "0.zarr", run=folder / "none")


@pytest.mark.process
def test_killed_and_shared_by_workers(scenes, checkpoint, tmp_path, monkeypatch, capsys):
    """An extraction of masked images that is killed gives the bytes of one that is not, whatever the number of workers."""
    monkeypatch.setattr(job, "SHARD_PASSES", 16)
    mask(tmp_path / "a.zarr", scenes, checkpoint, "rise:16", limit=18, dtype="float16")
    said = capsys.readouterr().err
    assert (
        "masks: rise:masks=16; 18 images x 16 variants x 1.0 kB: 288 passes through the backbone, 0.3 MB to write"
        in said
    )
    masks = {"masks": "rise:16", "split": "test", "limit": 18, "device": "cpu", "workers": 2}
    words = options(scenes, checkpoint, tmp_path / "b.zarr", **masks)
    small = "import featcache.extraction.job as j; j.SHARD_PASSES = 16; from featcache.cli import main; main()"
    killed = subprocess.Popen(
        [sys.executable, "-c", small, "extract", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while killed.poll() is None and len(list(tmp_path.glob("b.zarr/commits/test/*.json"))) < 2:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert 2 <= len(list(tmp_path.glob("b.zarr/commits/test/*.json"))) < 18
    mask(tmp_path / "b.zarr", scenes, checkpoint, "rise:16", limit=18, dtype="float16")
    assert tree_hash(tmp_path / "a.zarr") == tree_hash(tmp_path / "b.zarr") and not list(verify(tmp_path / "b.zarr"))


def test_a_store_of_masked_images_grows_as_any_store_does(scenes, checkpoint, tmp_path):
    path, given = tmp_path / "s.zarr", {"kind": "lime:8", "limit": 2, "dtype": "float16"}
    mask(path, scenes, checkpoint, **given)
    before = featcache.open_store(path)["test"]["pooled"][:]
    mask(path, scenes, checkpoint, features="layer3:pooled", **given)
    split = featcache.open_store(path)["test"]
    assert split["layer3:pooled"].shape == (2, 8, 256) and np.array_equal(split["pooled"][:], before)
    assert split["superpixels:spatial"].shape == (2, 1, 64, 64)


@pytest.mark.parametrize("size, cells, masks", [(37, 5, 50), (32, 7, 3), (10, 16, 20)])
def test_rise_sums_masks_before_it_enlarges_them(monkeypatch, size, cells, masks):
    monkeypatch.setattr(rise_module, "MASKS", 16)
    monkeypatch.setattr(rise_module, "MAPS", 2)
    method, scores = RISE(masks=masks, cells=cells), torch.rand(5, masks, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("qn,nyx->qyx", scores, method.large(size, 0, masks)) / (masks * 0.5)
    torch.testing.assert_close(method.maps(size, None, scores), expected, rtol=1e-4, atol=1e-5)


def shapley(value, count):
    """The Shapley values of a game, by all coalitions. value: from a set of players to a number."""
    values = []
    for player in range(count):
        others = [other for other in range(count) if other != player]
        total = 0.0
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for chosen in map(frozenset, itertools.combinations(others, size)):
                total += weight * (value(chosen | {player}) - value(chosen))
        values.append(total)
    return values


def of_coalitions(method, count, value, seed=0):
    """The values that kernel SHAP gives to so many superpixels, each a pixel in a row."""
    labels = torch.arange(count)[None]
    kept = method.draw(count, torch.Generator().manual_seed(seed))
    scores = torch.tensor([value(frozenset(row.nonzero()[:, 0].tolist())) for row in kept])
    return method.maps(1, Segmented(labels, None, kept), scores.float()[None])[0, 0].tolist()


@pytest.mark.parametrize("count, samples", [(1, 4), (2, 4), (5, 32), (5, 45)])
def test_kernel_shap_of_all_coalitions_is_shapleys(count, samples):
    random = np.random.default_rng(count)
    table = {frozenset(c): random.normal() for n in range(count + 1) for c in itertools.combinations(range(count), n)}
    assert of_coalitions(KernelSHAP(samples=samples), count, table.get) == pytest.approx(
        shapley(table.get, count), abs=1e-5
    )


def test_kernel_shap_of_some_coalitions():
    worth = np.random.default_rng(0).normal(size=10)

    def additive(chosen):
        return 1 + sum(worth[list(chosen)])

    def pairs(chosen):
        return additive(chosen) + sum(worth[a] * worth[b] for a, b in itertools.combinations(sorted(chosen), 2))

    assert of_coalitions(KernelSHAP(samples=101), 10, additive) == pytest.approx(worth.tolist(), abs=1e-5)
    exact = shapley(pairs, 10)
    got = of_coalitions(KernelSHAP(samples=600), 10, pairs)
    assert (
        sum(got) == pytest.approx(pairs(range(10)) - pairs(()), abs=1e-4)
        and np.abs(np.subtract(got, exact)).max() < 0.1
    )
    # With fewer coalitions than superpixels there are many solutions; that of the least squares has the right sum.
    assert sum(of_coalitions(KernelSHAP(samples=5), 10, pairs)) == pytest.approx(pairs(range(10)) - pairs(()), abs=1e-4)
    drawn = Coalitions(samples=4002).draw(30, torch.Generator().manual_seed(0))
    sizes, share = drawn[2:].sum(1).long().bincount(minlength=31)[1:30] / 4000, torch.arange(1, 30)
    expected = (1 / (share * (30 - share))) / (1 / (share * (30 - share))).sum()
    assert (sizes - expected).abs().max() < 0.02 and torch.equal(
        drawn[2::2] + drawn[3::2], torch.ones(2000, 30).double()
    )


def test_words_of_masks():
    assert (
        parse_masks("rise:5:keep=0.25") == RandomCells(masks=5, keep=0.25)
        and parse_masks("lime") == RandomSuperpixels()
    )
    assert parse_masks("rise:masks=5") == RandomCells(masks=5) and set(MASKS) <= {
        "rise",
        "lime",
        "kernel_shap",
        "occlusion",
    }
    with pytest.raises(BadInput, match="'5' is no field=value of occlusion"):
        parse_masks("occlusion:5")
