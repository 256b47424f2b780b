"""Images in two roles: ids that begin anew in each split are none, the same bytes are, under whatever name."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from folders import tree_hash, unpack
from layouts import encoded, picture, save, write_coco, write_tar
from stores import write_store

import featcache
from featcache.errors import BadInput
from featcache.probes.runs.run import open_run
from featcache.store.sealed import seal, unseal

PROBE = {"features": "pooled", "head": "linear", "loss": "bce", "optimizer": {"type": "sgd", "lr": 0.1}, "epochs": 1}
GRID = {"splits": {"train": "train", "val": "val", "test": "val2"}, "probes": [PROBE]}
SPLITS = ("train", "val", "val2")
WORDS = ("--backbone", "random", "--arch", "resnet18", "--size", 32, "--workers", 0, "--features", "pooled")
# Four pictures a split, two of each class, numbered alike in every split.
ROWS = [("a", 0), ("a", 1), ("b", 2), ("b", 3)]


def number(split, n):
    return 10 * SPLITS.index(split) + n


def folder(root):
    for split in SPLITS:
        for label, n in ROWS:
            save(root / split / label / f"{n}.png", number(split, n))
    return "folder", root


def manifest(root):
    lines = []
    for split in SPLITS:
        for label, n in ROWS:
            save(root / split / f"{n}.png", number(split, n))
            lines.append({"path": f"{split}/{n}.png", "label": label, "split": split, "id": str(n)})
    (root / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "manifest", root / "list.jsonl"


def webdataset(root):
    for split in SPLITS:
        members = {f"{n}.jpg": encoded(number(split, n)) for _, n in ROWS} | {f"{n}.cls": c.encode() for c, n in ROWS}
        write_tar(root / split / "0000.tar", members)
    return "webdataset", root


def huggingface(root):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    saved = datasets.DatasetDict()
    for split in SPLITS:
        images = [picture(number(split, n)) for _, n in ROWS]
        cells = {"image": images, "label": [label for label, _ in ROWS]}
        saved[split] = datasets.Dataset.from_dict(cells, features=features)
    saved.save_to_disk(str(root))
    return "huggingface", root


def coco(root):
    box = {"bbox": [2, 3, 20, 10], "area": 150}
    for split in ("train", "val"):
        images = {n: [{"category_id": {"a": 1, "b": 18}[label], **box}] for label, n in ROWS}
        path = write_coco(root, images, name=f"{split}2014")
        for image in json.loads(path.read_text())["images"]:
            save(path.parent.parent / f"{split}2014" / image["file_name"], number(split, image["id"]))
    return "coco", root


def grid_of(name, path, **more):
    """A grid's file; COCO has no third split."""
    content = GRID | more if name != "coco" else {"probes": [PROBE]} | more
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.process
@pytest.mark.parametrize("layout", [folder, manifest, webdataset, huggingface, coco])
def test_ids_that_begin_anew_in_each_split_train_and_report(layout, tmp_path, command):
    name, root = layout(tmp_path / "data")
    code, _, err = command("extract", *WORDS, "--dataset", name, "--root", root, "--store", tmp_path / "s.zarr")
    assert code == 0, err
    store = featcache.open_store(tmp_path / "s.zarr")
    assert store["train"].ids == store["val"].ids
    grid = grid_of(name, tmp_path / "g.yaml")
    code, _, err = command("train-probes", "--grid", grid, "--store", store.path, "--run", tmp_path / "r")
    assert code == 0 and "notice" not in err, err
    assert open_run(tmp_path / "r").summary["overlap"] == []
    assert command("report", "--run", tmp_path / "r", "--out", tmp_path / "r.html")[0] == 0


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A store of a folder in which one image of train, under another name, is in val, and two of val are in val2."""
    root = tmp_path_factory.mktemp("leaky")
    folder(root / "data")
    for source, target in (
        ("train/a/0.png", "val/b/3.png"),
        ("val/a/0.png", "val2/a/0.png"),
        ("val/b/2.png", "val2/b/9.png"),
    ):
        shutil.copy(root / "data" / source, root / "data" / target)
    return featcache.extract(
        "random", "folder", root=root / "data", arch="resnet18", size=32, workers=0, features="pooled",
        store=root / "s.zarr", views=1,
    )  # fmt: skip


def test_the_same_bytes_in_two_roles_are_refused(leaky, tmp_path, command):
    grid = grid_of("folder", tmp_path / "g.yaml")
    words = ("train-probes", "--grid", grid, "--store", leaky, "--run", tmp_path / "r")
    for more in ((), ("--dry-run",)):
        code, _, err = command(*words, *more)
        assert code == 2 and not (tmp_path / "r").exists()
        assert "splits.val: 1 of the 4 val images are in train too (val 'b/3.png' is train 'a/0.png'); keep" in err
        assert "splits.test: 2 of the 5 test images are in val too (val2 'a/0.png' is val 'a/0.png')" in err
        assert "--allow-overlap" in err
    # Of a union, the split is named in which the image lies. That val and test are one split is the profile's affair.
    splits = {"train": ["val2", "val"], "val": "train", "test": "train"}
    grid = GRID | {"splits": splits, "parity": "old", "profiles": {"old": {}}}
    with pytest.raises(
        BadInput, match=r"splits.val: 1 of the 4 val images are in train too \(train 'a/0.png' is val 'b/3"
    ):
        featcache.train_probes(grid, store=leaky, run=tmp_path / "r")


def test_a_union_may_hold_an_image_and_an_id_twice(leaky, tmp_path):
    splits = {"train": "train", "val": ["val2"], "test": ["val2"]}
    grid = GRID | {"splits": splits, "parity": "old", "profiles": {"old": {}}}
    run = featcache.train_probes(grid, store=leaky, run=tmp_path / "r")
    assert run.summary["overlap"] == [] and run.caution.startswith("chosen on the images that they are scored on")
    grid = GRID | {"splits": {"train": ["val", "val2"], "val": "train", "test": "train"}} | {"parity": "old"}
    run = featcache.train_probes(
        grid | {"profiles": {"old": {}}}, store=leaky, run=tmp_path / "union", allow_overlap=True
    )
    assert run.summary["rows"]["train"] == 9


def test_consent_is_recorded_and_shown(leaky, tmp_path, command):
    grid = grid_of("folder", tmp_path / "g.yaml")
    words = ("train-probes", "--grid", grid, "--store", leaky, "--run", tmp_path / "r")
    code, out, err = command(*words, "--allow-overlap")
    assert code == 0, err
    good = "too: scores on them are too good"
    said = f"1 of the 4 val images are in train {good}; 2 of the 5 test images are in val {good}"
    assert said in out and open_run(tmp_path / "r").caution == said
    summary = json.loads((tmp_path / "r/run.json").read_text())
    assert [(found["roles"], found["images"]) for found in summary["overlap"]] == [
        (["train", "val"], 1),
        (["val", "test"], 2),
    ]
    assert command("report", "--run", tmp_path / "r", "--out", tmp_path / "r.html")[0] == 0
    assert said in (tmp_path / "r.html").read_text()
    # The run's own grid says it, and so trains the same run again.
    again = ("train-probes", "--grid", tmp_path / "r/grid.yaml", "--run", tmp_path / "r")
    code, _, err = command(*again)
    assert code == 0 and "is finished already" in err
    assert command("train-probes", "--grid", grid, "--store", leaky, "--dry-run", "--allow-overlap")[0] == 0
    grid = grid_of("folder", tmp_path / "wrong.yaml", allow_overlap="yes please")
    code, _, err = command("train-probes", "--grid", grid, "--store", leaky)
    assert code == 2 and "allow_overlap: expected true or false, not 'yes please'" in err


def test_a_digest_is_the_sha256_of_the_file(leaky):
    for split in ("train", "train@1", "val2"):
        part = featcache.open_store(leaky)[split]
        files = [
            hashlib.sha256((Path(leaky).parent / "data" / split.partition("@")[0] / i).read_bytes()) for i in part.ids
        ]
        assert [bytes(d) for d in part.digests] == [file.digest()[:16] for file in files]


def test_digests_go_through_conversion(tmp_path):
    for known in (True, False):
        write_store(tmp_path / f"{known}.zarr", known=known)
        digests = featcache.open_store(tmp_path / f"{known}.zarr")["train"].digests
        hdf5 = featcache.open_store(featcache.convert(tmp_path / f"{known}.zarr", "hdf5"))
        assert np.array_equal(hdf5["train"].digests, digests) and (digests is not None) == known
        featcache.convert(hdf5.path, out=tmp_path / "back.zarr")
        assert tree_hash(tmp_path / "back.zarr") == tree_hash(tmp_path / f"{known}.zarr")
        shutil.rmtree(tmp_path / "back.zarr")


def forget_digests(store):
    """Make the markers of a store those of an earlier version, which had no digests."""
    for path in store.glob("commits/*/*.json"):
        content = unseal(path.read_bytes())
        del content["images"]
        path.write_bytes(seal(content))


def test_a_store_without_digests_and_with_ids_of_its_own_trains_too(store, tmp_path, capsys):
    shutil.copytree(store, tmp_path / "s.zarr")
    forget_digests(tmp_path / "s.zarr")
    grid = {"probes": [PROBE]}
    old, new = (
        featcache.train_probes(grid, store=s, run=tmp_path / n) for s, n in ((tmp_path / "s.zarr", "o"), (store, "n"))
    )
    assert capsys.readouterr().err.count("was not checked\n") == 1
    assert [r["probe"] for r in old.scores] == [r["probe"] for r in new.scores]
    assert (old.path / "scores.csv").read_bytes() == (new.path / "scores.csv").read_bytes()


def test_a_store_without_digests_trains_with_a_notice(leaky, tmp_path, command):
    shutil.copytree(leaky, tmp_path / "s.zarr")
    forget_digests(tmp_path / "s.zarr")
    assert featcache.verify(tmp_path / "s.zarr") == []
    grid = grid_of("folder", tmp_path / "g.yaml")
    code, out, err = command("train-probes", "--grid", grid, "--store", tmp_path / "s.zarr", "--run", tmp_path / "r")
    assert code == 0 and "too good" not in out
    assert "notice: store" in err and "kept no digests of images" in err and "was not checked" in err
    assert "1 images of test have the id, labels, size and file length of one of val, such as 'a/0.png'" in err


def test_version_one_has_no_digests(tmp_path):
    unpack("store_v1", tmp_path)
    for place in tmp_path.iterdir():
        store = featcache.open_store(place)
        assert store[store.splits[0]].digests is None


def test_runs_are_compared_on_the_same_images_only(tmp_path):
    """The splits val and val2 have the same ids and labels, and other images; a manifest has val2's by other ids."""
    folder(tmp_path / "data")
    rows = [{"path": f"data/val2/{c}/{n}.png", "label": c, "split": "holdout", "id": f"x{n}"} for c, n in ROWS]
    rows += [row | {"path": row["path"].replace("val2", "train"), "split": "train"} for row in rows]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"arch": "resnet18", "size": 32, "workers": 0, "features": "pooled"}
    stores = [
        featcache.extract("random", "folder", root=tmp_path / "data", store=tmp_path / "f.zarr", **given),
        featcache.extract("random", "manifest", root=tmp_path / "list.jsonl", store=tmp_path / "m.zarr", **given),
    ]

    def run(name, store, val, test):
        roles = {"train": "train", "val": val, "test": test}
        grid = GRID | {"splits": roles, "profiles": {"p": {}}, "parity": "p"}
        return featcache.train_probes(grid, store=stores[store], run=tmp_path / name).path

    one, other, same = run("1", 0, "val", "val2"), run("2", 0, "val2", "val"), run("3", 1, "holdout", "holdout")
    with pytest.raises(BadInput, match="their test splits hold other images"):
        featcache.compare([one, other], rule="best top1")
    assert all(c.difference == 0 for c in featcache.compare([one, same], rule="best top1") if c.metric == "top1")
