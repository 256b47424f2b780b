"""Several backbones in one pass over the images: one store each, with the bytes of an extraction by itself."""

import subprocess
from pathlib import Path

import pytest
import torch
from extracting import SIZE, START, torchrun
from folders import tree_hash
from torchvision.models import mobilenet_v3_small, resnet18

import featcache
from featcache.errors import BadInput
from featcache.extraction.checkpoint_files import checkpoint_files, stems

FEATURES = "pooled,layer4:spatial,layer1:pooled"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """A folder with three checkpoints of one run: of epochs 2 and 10, and the last one, which is that of epoch 10."""
    place = tmp_path_factory.mktemp("checkpoints")
    for name, seed in {"epoch_2": 2, "epoch_10": 10, "last": 10}.items():
        torch.manual_seed(seed)
        torch.save(resnet18().state_dict(), place / f"{name}.pth")
    (place / "list.txt").write_text(f"# of one run\n\n{checkpoint}\n{place}/epoch_*.pth\n")
    return place


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of a few rows; how many depends on the features."""
    monkeypatch.setattr("featcache.store.manifest.SHARD_BYTES", 26_000)
    monkeypatch.setattr("featcache.store.manifest.CHUNK_ROWS", 4)


def settings(scenes, **more):
    return {"root": str(scenes), "size": SIZE, "workers": 0, "batch_size": 4, "splits": ["train", "val"]} | more


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint of another architecture, whose features are smaller and whose shards are longer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("other") / "mobile.pth"
    torch.save(mobilenet_v3_small().state_dict(), path)
    return path


@pytest.mark.parametrize("batch_size", [4, 3])
def test_each_store_has_the_bytes_of_one_extracted_by_itself(
    folder, other, scenes, small_shards, tmp_path, monkeypatch, batch_size
):
    """Batches of 3 end where shards do, which are of different lengths: then the two architectures take two passes."""
    given = settings(scenes, batch_size=batch_size, features="pooled", dtype="float32")
    files = [folder / "epoch_2.pth", other, folder / "epoch_10.pth"]
    alone = [tree_hash(featcache.extract(file, "voc", store=tmp_path / f"{file.stem}.zarr", **given)) for file in files]
    decoded = []
    import featcache.extraction.images as images

    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda *words: decoded.append(1) or read(*words))
    paths = featcache.extract_many(files, "voc", store=tmp_path / "all", **given)
    assert [tree_hash(path) for path in paths] == alone
    assert len(decoded) == 60 * (1 if batch_size == 4 else 2)
    assert len({len(list((tmp_path / "all").glob(f"*{file.stem}*/commits/*/*"))) for file in files}) == 2


def test_they_are_named_after_their_files_and_found_again(folder, scenes, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    words = ["extract", "--dataset", "voc", "--root", scenes, "--size", SIZE, "--workers", 0, "--features", "pooled"]
    code, _, err = command(*words, "--backbone", f"{folder}/epoch_*.pth", "--backbone", f"{folder}/last.pth")
    assert code == 0
    names = [path.name for path in sorted((tmp_path / "features").iterdir())]
    assert [name.rpartition("-")[0] for name in names] == ["voc2007-resnet18-epoch_10", "voc2007-resnet18-epoch_2"]
    assert "last.pth has the weights of another checkpoint" in err and err.count("preprocessing:") == 1
    before = {name: tree_hash(tmp_path / "features" / name) for name in names}
    code, _, err = command(*words, "--backbone", folder / "list.txt")
    assert code == 0 and err.count("is finished already") == 2
    # One by one, the same stores are found, and added to.
    code, _, err = command(*words, "--backbone", folder / "last.pth")
    assert code == 0 and f"features/{names[0]} is finished already" in err
    assert {name: tree_hash(tmp_path / "features" / name) for name in names} == before
    assert len(list((tmp_path / "features").iterdir())) == 3


@pytest.mark.process
def test_a_kill_and_another_number_of_processes_change_nothing(folder, scenes, tmp_path):
    words = [
        "--dataset",
        "voc",
        "--root",
        scenes,
        "--size",
        SIZE,
        "--workers",
        0,
        "--batch-size",
        4,
        "--split",
        "train",
    ]
    words = [*map(str, words), "--backbone", f"{folder}/epoch_*.pth", "--features", FEATURES]
    run = [*START, *words, "--store", str(tmp_path / "one")]
    assert subprocess.run(run, capture_output=True).returncode == 0
    whole = {path.name: tree_hash(path) for path in (tmp_path / "one").iterdir()}
    assert len(whole) == 2
    markers = len(list((tmp_path / "one").glob("*/commits/*/*")))
    process = subprocess.Popen([*START, *words, "--store", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("*/commits/*/*"))) < markers // 2 and process.poll() is None:
        pass
    process.kill()
    assert process.wait() != 0
    finished = subprocess.run(
        torchrun(2, [*words, "--store", str(tmp_path / "killed")]), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert {path.name: tree_hash(path) for path in (tmp_path / "killed").iterdir()} == whole
    again = subprocess.run(torchrun(2, [*words, "--store", str(tmp_path / "killed")]), capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("is finished already") == 2, again.stderr


def test_words_for_checkpoints(folder, checkpoint, tmp_path):
    epochs = [f"{folder}/epoch_2.pth", f"{folder}/epoch_10.pth"]
    assert checkpoint_files([f"{folder}/epoch_*.pth"]) == epochs
    assert checkpoint_files([folder / "list.txt", epochs[1]]) == [str(checkpoint), *epochs]
    odd = tmp_path / "a[1].pth"
    odd.touch()
    assert checkpoint_files([odd]) == [str(odd)]
    assert stems(epochs) == ["epoch_2", "epoch_10"]
    assert stems(["run-a/last.pth", "run-b/last.pth"]) == ["run-a_last", "run-b_last"]
    assert stems(["x.pth"]) == ["x"]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("nothing*.pth", "no file matches"),
        ("gone.pth", "there is no such file"),
        ("gone.txt", "No such file"),
        ("empty.txt", "no checkpoint is named"),
    ],
)
def test_words_that_name_nothing(tmp_path, monkeypatch, command, scenes, word, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(BadInput, match=reason):
        checkpoint_files([word])
    code, _, err = command("extract", "--backbone", word, "--backbone", word, "--dataset", "voc", "--root", scenes)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "features").exists()


def test_a_sweep_is_one_table_and_takes_in_new_checkpoints(folder, scenes, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    grid = "probes: [{features: pooled, head: linear, loss: bce, epochs: 2, optimizer: {type: sgd, lr: [0.1, 1.0]}}]\n"
    (tmp_path / "small.yaml").write_text(grid)
    words = ["sweep", "--dataset", "voc", "--root", scenes, "--size", SIZE, "--workers", 0, "--features", "pooled"]
    words += ["--grid", "small.yaml", "--backbone", folder / "epoch_2.pth"]
    assert command(*words)[0] == 0
    code, out, err = command(*words, "--backbone", folder / "epoch_10.pth")
    assert code == 0 and err.count("is finished already") == 2, err
    runs = {path.name.split("-")[2]: featcache.open_run(path) for path in (tmp_path / "runs").iterdir()}
    assert set(runs) == {"epoch_2", "epoch_10"}
    lines = out.splitlines()[2:]
    assert {line.split()[0] for line in lines} == set(runs)
    best = [
        max(r["value"] for r in runs[line.split()[0]].scores if (r["metric"], r["split"]) == ("map", "val"))
        for line in lines
    ]
    assert best == sorted(best, reverse=True)
    alone = featcache.train_probes("small.yaml", runs["epoch_10"].summary["store"], run=tmp_path / "alone")
    assert [r["value"] for r in alone.scores] == [r["value"] for r in runs["epoch_10"].scores]
    (tmp_path / "small.yaml").write_text("store: features/x.zarr\n" + grid)
    code, _, err = command(*words)
    assert code == 2 and err.splitlines()[-1].endswith("take the line store: out of the grid")


def test_two_parts_of_a_store_that_lack_the_same_rows(folder, scenes, small_shards, tmp_path, monkeypatch):
    """Of both stores a shard of the first part and one of an addition are lost; their lengths differ."""
    files = [folder / "epoch_2.pth", folder / "epoch_10.pth"]
    given = settings(scenes, batch_size=3, splits=["train"], store=tmp_path / "all")
    featcache.extract_many(files, "voc", features="pooled", **given)
    paths = featcache.extract_many(files, "voc", features="pooled,layer1:pooled", **given)
    whole = [tree_hash(path) for path in paths]
    for path in paths:
        lost = sorted(Path(path).glob("commits/train/000000*.json"))
        assert len(lost) == 2
        for marker in lost:
            marker.unlink()
    assert featcache.extract_many(files, "voc", features="pooled,layer1:pooled", **given) == paths
    assert [tree_hash(path) for path in paths] == whole
