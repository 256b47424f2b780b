"""featcache plan: its figures are those of what extract then writes, and it writes nothing."""

import time
from dataclasses import replace

import pytest
import torch
from extracting import SIZE
from folders import tree_hash
from torchvision.models import resnet18

import featcache
from featcache.errors import BadInput
from featcache.extraction.plan import PlannedStore
from featcache.extraction.speed import together
from featcache.feature import Feature
from featcache.store.folder import open_folder
from featcache.store.manifest import plan as lay_out
from featcache.store.shard import Shard
from featcache.store.verify import drop_shard

FEATURES = ["layer4:pooled", "layer4:spatial"]


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of a few rows, so that a small dataset has many, the last of which is short."""
    monkeypatch.setattr("featcache.store.manifest.SHARD_BYTES", 70_000)
    monkeypatch.setattr("featcache.store.manifest.CHUNK_ROWS", 4)


@pytest.fixture
def given(scenes, monkeypatch):
    monkeypatch.setattr("featcache.extraction.speed.SECONDS", 0.1)
    return {"dataset": "voc", "root": str(scenes), "size": SIZE, "workers": 0, "batch_size": 8, "features": FEATURES}


def on_disk(path, features=FEATURES):
    """{feature: bytes of its files} of a store."""
    folders = {str(Feature(*name.split(":"))): Feature(*name.split(":")).folder for name in features}
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in ("zarr.json", "lock")]
    return {n: sum(f.stat().st_size for f in files if f"/{own}/" in f.as_posix()) for n, own in folders.items()}


def markers(path):
    return sorted(file.relative_to(path / "commits").as_posix() for file in path.glob("commits/*/*.json"))


@pytest.mark.parametrize(("suffix", "dtype"), [("zarr", "float16"), ("hdf5", "float32")])
def test_the_figures_are_those_of_what_is_written(checkpoint, given, small_shards, tmp_path, suffix, dtype):
    path = tmp_path / "new" / f"s.{suffix}"
    given |= {"store": path, "dtype": dtype, "views": 1, "splits": ["train", "val"]}
    plan = featcache.plan(checkpoint, **given, measure=False)
    assert not path.parent.exists()
    (store,) = plan.stores
    assert (store.state, store.splits) == ("new", {"train": 40, "val": 20, "train@1": 40})
    assert plan.passes[0].images == store.images_to_run == store.rows == 100 and plan.seconds is None
    missing = plan.missing()
    featcache.extract(checkpoint, **given)
    assert (
        {f.name: f.bytes for f in store.features} == {f.name: f.bytes_to_write for f in store.features} == on_disk(path)
    )
    assert [(f.rows, f.row_bytes) for f in store.features] == [
        (100, width * torch.finfo(getattr(torch, dtype)).bits // 8) for width in (512, 2048)
    ]
    assert [f"{shard.split}/{shard.shard:06d}.json" for shard in sorted(missing)] == markers(path)
    assert len(missing) == store.shards == store.shards_to_write > 9
    assert replace(plan, free=plan.bytes_to_write).fits and not replace(plan, free=plan.bytes_to_write - 1).fits
    assert plan.fits and plan.free > plan.bytes_to_write and store.id == featcache.open_store(path).manifest.id
    assert plan.missing() == []
    before = tree_hash(tmp_path)
    again = featcache.plan(checkpoint, **given)
    assert again.stores[0].state == "finished" and (again.bytes_to_write, again.passes, again.seconds) == (0, (), 0)
    assert again.stores[0].bytes == store.bytes and again.stores[0].id == store.id
    assert tree_hash(tmp_path) == before


def test_only_the_rest_of_a_begun_store_counts(checkpoint, given, small_shards, tmp_path):
    path = tmp_path / "s.zarr"
    given |= {"store": path, "splits": ["train"]}
    featcache.extract(checkpoint, **given)
    manifest, whole = featcache.open_store(path).manifest, on_disk(path)
    dropped = [Shard(open_folder(path), manifest, "train", number) for number in (0, manifest.shards("train") - 1)]
    for shard in dropped:
        drop_shard(shard, FEATURES)
    before, left = tree_hash(path), on_disk(path)
    plan = featcache.plan(checkpoint, **given, measure=False)
    (store,) = plan.stores
    assert (store.state, store.shards_to_write, store.shards) == ("begun", 2, manifest.shards("train"))
    assert store.images_to_run == sum(map(len, dropped)) < store.rows == 40
    assert {f.name: f.bytes_to_write for f in store.features} == {name: whole[name] - left[name] for name in whole}
    assert {f.name: f.bytes for f in store.features} == whole and tree_hash(path) == before
    with pytest.raises(BadInput, match="is another store"):
        featcache.plan(checkpoint, **{**given, "size": 96})


def test_only_what_a_store_lacks_counts(checkpoint, given, small_shards, tmp_path):
    path = tmp_path / "s.zarr"
    given |= {"store": path, "splits": ["val"]}
    featcache.extract(checkpoint, **{**given, "features": FEATURES[:1]})
    before, first = tree_hash(path), markers(path)
    more = {**given, "splits": ["val", "test"]}
    plan = featcache.plan(checkpoint, **more, measure=False)
    (store,) = plan.stores
    assert store.state == "growing" and tree_hash(path) == before
    # val again for the maps, and test for both.
    assert (store.images_to_run, store.rows) == (40, 40)
    held = on_disk(path)
    featcache.extract(checkpoint, **more)
    written = on_disk(path)
    assert {f.name: f.bytes for f in store.features} == written
    assert {f.name: f.bytes_to_write for f in store.features} == {n: written[n] - held[n] for n in written}
    assert store.shards_to_write == len(markers(path)) - len(first) and store.shards == len(markers(path))
    assert store.id == featcache.open_store(path).manifest.id and plan.missing() == []


def test_speed_is_measured_and_decoding_is_shared(checkpoint, given, tmp_path, command, scenes):
    torch.manual_seed(5)
    torch.save(resnet18().state_dict(), tmp_path / "other.pth")
    files, place = [str(checkpoint), str(tmp_path / "other.pth")], tmp_path / "stores"
    plan = featcache.plan(files, **given, store=place, devices=4)
    (one,) = plan.passes
    assert one.images == 80 and len(one.stores) == len(plan.stores) == 2 and not place.exists()
    assert one.bottleneck == ("decode" if one.decode < one.forward else "forward")
    # Without workers, images are decoded and run one after the other.
    assert plan.seconds == pytest.approx(80 / one.decode + 80 / one.forward)
    assert plan.seconds_on_devices == plan.seconds / 4
    words = [word for file in files for word in ("--backbone", file)] + ["--dataset", "voc", "--root", scenes]
    words += ["--size", SIZE, "--workers", 0, "--store", place, "--features", ",".join(FEATURES), "--no-measure"]
    code, out, _ = command("plan", *words)
    assert code == 0 and "time: not measured" in out and out.endswith("nothing was written\n") and not place.exists()
    featcache.extract_many(files, **given, store=place)
    assert sorted(map(str, place.iterdir())) == sorted(one.stores)


def test_masked_variants(checkpoint, given, tmp_path):
    given |= {"features": "pooled", "masks": "rise:20", "splits": ["test"], "limit": 3, "store": tmp_path / "m.zarr"}
    plan = featcache.plan(checkpoint, **given)
    assert plan.stores[0].images_to_run == 3 and plan.stores[0].features[0].shape == (20, 512) and plan.seconds > 0
    featcache.extract(checkpoint, **given)
    (feature,) = (f for f in plan.stores[0].features if f.name == "layer4:pooled")
    assert on_disk(tmp_path / "m.zarr", FEATURES[:1]) == {feature.name: feature.bytes}


def test_how_decoding_and_forwards_share_a_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert together(10, 4, 0, gpu) == 14
    assert together(10, 4, 4, gpu) == 10
    # 4 workers for 10 s, and 8 threads for 8 s: 104 CPU seconds on 8 cores.
    assert together(10, 8, 4, cpu) == 13
    assert together(10, 1, 1, cpu) == 10


GRID = """
probes:
  - {features: [pooled, layer3:pooled], head: linear, loss: bce, epochs: 3, optimizer: {type: sgd, lr: [0.1, 1.0]}}
  - {features: pooled, head: linear, loss: bce, epochs: 5, shots: 1, optimizer: {type: sgd, lr: 0.1}}
  - {features: pooled, head: linear, loss: bce, optimizer: lbfgs}
profiles:
  shared: {splits: {train: [train, val], val: test, test: test}}
"""


def test_forwards_of_a_grid_that_trains_on_images(checkpoint, given, tmp_path):
    (tmp_path / "g.yaml").write_text(GRID)
    given |= {"features": "pooled,layer3:pooled", "store": tmp_path / "s.zarr", "measure": False}
    forwards = featcache.plan(checkpoint, **given, grid=tmp_path / "g.yaml").forwards
    labels = featcache.datasets.read_dataset("voc", given["root"]).labels("train")
    drawn = len(featcache.probes.sample.draw_rows(labels, range(10), shots=1))
    # Four probes: 3 epochs of 40 and 20 images, then 20. One of a shot. One full-batch probe reads 80 images once.
    few = 5 * (drawn + 20) + 20
    assert drawn < 40 and (forwards.probes, forwards.cached) == (6, 80)
    assert forwards.one_run_each == 4 * (3 * 60 + 20) + few + 80
    # Two runs at one learning rate each, with heads on both features.
    assert forwards.multi_head == 2 * (3 * 60 + 20) + few + 80
    shared = featcache.plan(checkpoint, **given, grid=tmp_path / "g.yaml", parity="shared").forwards
    assert shared.one_run_each > 4 * 3 * 80
    (tmp_path / "folds.yaml").write_text("select: {folds: 5}\n" + GRID.split("profiles")[0].replace("shots: 1, ", ""))
    folds = featcache.plan(checkpoint, **given, grid=tmp_path / "folds.yaml").forwards
    assert folds.one_run_each == 4 * (3 * 60 + 20) + 5 * 60 + 20 + 5 * (4 * 3 * 40 + 5 * 40) + 80


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--backbone", "gone.pth"], "gone.pth"),
        (["--dataset", "vocc"], "unknown dataset"),
        (["--features", "layer9:pooled"], "no layer 'layer9'"),
        (["--limit", 3], "--limit is for --masks"),
        (["--parity", "x"], "name the grid"),
        (["--grid", "none.yaml"], "none.yaml"),
        (["--grid", "g.yaml", "--features", "pooled,layer3:pooled", "--split", "val"], "trains on the split 'train'"),
        (["--grid", "g.yaml", "--features", "pooled"], "reads layer3:pooled"),
        (["--grid", "g.yaml", "--masks", "rise:20", "--split", "val"], "not on masked ones"),
        (["--store", "taken"], "is not a featcache store"),
    ],
)
def test_bad_input_is_one_line(checkpoint, scenes, tmp_path, monkeypatch, command, more, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.yaml").write_text(GRID)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    before = tree_hash(tmp_path)
    words = {"--backbone": checkpoint, "--dataset": "voc", "--root": scenes, "--size": SIZE, "--workers": 0}
    words |= dict(zip(more[::2], more[1::2], strict=True))
    code, _, err = command("plan", "--no-measure", *(word for pair in words.items() for word in pair))
    errors = [line for line in err.splitlines() if line.startswith("Error:")]
    assert code == 2 and len(errors) == 1 and err.endswith(errors[0] + "\n") and reason in errors[0]
    assert tree_hash(tmp_path) == before


def test_a_hundred_million_rows_are_planned_in_seconds(tmp_path):
    started = time.monotonic()
    manifest = lay_out(
        identity={}, rows={"train": 100_000_000}, shapes={Feature("layer4", "spatial"): (2048, 7, 7)}, dtype="float16",
        aliases={}, classes=["a"], task="single-label", compute={}, storage={"format": "zarr", "compression": None},
    )  # fmt: skip
    done = tmp_path / "commits" / "train"
    done.mkdir(parents=True)
    for number in range(0, 2000, 2):
        (done / f"{number:06d}.json").touch()
    store = PlannedStore(
        backbone="", arch="", path="s", id="", state="begun", splits={}, features=(), images_to_run=0, shards=0,
        shards_to_write=0, compression=None, folder=open_folder(tmp_path), parts=(manifest,),
    )  # fmt: skip
    missing = store.missing()
    assert len(missing) == manifest.shards("train") - 1000 > 150_000 and missing[0][2:] == ("train", 1)
    assert time.monotonic() - started < 10
