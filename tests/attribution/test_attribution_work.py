"""How an attribution is computed: shared passes, bounded memory, pieces that survive a kill, processes that share them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from processes import free_port

import featcache
from featcache.attribution.frozen_norms import frozen_norms
from featcache.attribution.pieces import FOLDER
from featcache.datasets import read_dataset

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 2, "optimizer": {"type": "sgd", "lr": 0.5}},
        {"features": "layer3:spatial", "head": {"type": "mlp", "hidden": 16}, "loss": "bce", "epochs": 2,
         "optimizer": {"type": "adam", "lr": 0.01}},
    ]
}  # fmt: skip
# The real program with pieces of two images, so that a small split has many.
SMALL_PIECES = "import featcache.attribution.pieces as p; p.IMAGES = 2; from featcache.cli import main; main()"
FILES = ("attribution.csv", "attribution.npz")


@pytest.fixture
def words(trained, scenes, checkpoint):
    """Words of a command line that explains all probes with both ways of working."""
    probes = dict.fromkeys(row["probe"] for row in trained.scores)
    backbone = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes, "--device", "cpu"]
    chosen = [word for probe in probes for word in ("--probe", probe)]
    return ["--method", "gradcam,input_x_gradient", *backbone, *chosen]


def read_rows(table):
    """EPG by what names a map, -1 where there is none."""
    rows = [line.split(",") for line in table.decode().splitlines()[1:]]
    return {tuple(row[:5]): float(row[5] or -1) for row in rows}


def written(run):
    return {name: (run / name).read_bytes() for name in FILES}


def explained(run, trained, words, program=SMALL_PIECES, ranks=1):
    """Start an attribution of a copy of the run."""
    if not run.exists():
        shutil.copytree(trained.path, run)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    start = [*launch, "--no-python", "--", sys.executable] if ranks > 1 else []
    line = [sys.executable, *start, "-c", program, "attribute", "--run", run, *words]
    # torchrun gives its processes one thread each, and threads can change the last bits.
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings
    )


def pairs(trained, limit=None):
    """How many images have an object, and how many pairs of an image and a class there are."""
    boxes = featcache.open_store(trained.summary["store"])["test"].boxes
    counts = [len(set(classes[~difficult].tolist())) for _, classes, difficult in boxes]
    counts = [count for count in counts if count][:limit]
    return len(counts), sum(counts)


def test_one_forward_pass_of_an_image_serves_everything(trained, words, command, tmp_path):
    """Both layers, three probes, all classes; and a backward pass for each map alone."""
    shutil.copytree(trained.path, tmp_path / "r")
    images, targets = pairs(trained, 9)
    shared, alone = f"{images} forward and {3 * targets} backward", f"{6 * targets} forward and {3 * targets} backward"
    code, out, _ = command("attribute", "--run", tmp_path / "r", *words, "--limit", 9, "--dry-run")
    assert code == 0 and f"{6 * targets} maps: 3 probes, {targets} pairs of image and class, {images} images" in out
    assert f"through the backbone: {shared}; one by one: {alone}; nothing was written" in out
    assert not (tmp_path / "r/attribution.csv").exists() and not (tmp_path / "r" / FOLDER).exists()
    code, _, err = command("attribute", "--run", tmp_path / "r", *words, "--limit", 9)
    assert code == 0 and f"passes of an image through the backbone: {shared}; one by one: {alone}" in err
    assert not (tmp_path / "r" / FOLDER).exists()


def test_what_a_dry_run_counts_is_what_every_method_takes(trained, words, command, tmp_path):
    """All methods in one call; and they share a forward pass where they compute alike."""
    shutil.copytree(trained.path, tmp_path / "r")
    methods = (
        "gradcam,gradcampp,layercam,position_logits,cached_occlusion,deeplift,lrp,gradient,input_x_gradient,guided_backprop,smoothgrad:samples=3,"
        "intgrad:steps=2,occlusion,rise:masks=5,lime:samples=4,scorecam"
    )
    line = ["attribute", "--run", tmp_path / "r", *words, "--limit", 1, "--method", methods]
    code, out, err = command(*line, "--dry-run")
    assert code == 0 and "gradient, input_x_gradient" in out, err
    (counts,) = re.findall("through the backbone: (.*); nothing", out)
    code, out, err = command(*line)
    assert code == 0 and f"through the backbone: {counts}\n" in err, (counts, err)
    assert len(re.findall("^[0-9a-f]{10} ", out, re.MULTILINE)) == 3 * 16
    # With no memory the maps of one probe are made after those of another, and variants go through the backbone once.
    table = (tmp_path / "r/attribution.csv").read_bytes()
    several = [
        "deeplift",
        "lrp",
        "smoothgrad:samples=3",
        "intgrad:steps=2",
        "rise:masks=5",
        "lime:samples=4",
        "scorecam",
    ]
    code, _, err = command(*line[:-1], ",".join(several), "--memory", 1e-6)
    assert code == 0, err
    expected, rows = (read_rows(data) for data in (table, (tmp_path / "r/attribution.csv").read_bytes()))
    assert rows.keys() == {key for key in expected if key[1] in several}
    for key, value in rows.items():
        assert value == pytest.approx(expected[key], abs=2e-3), key


def test_memory_changes_nothing_but_the_batches(trained, words, command, tmp_path):
    tables = []
    for memory in ("0.000001", "2"):
        shutil.copytree(trained.path, tmp_path / memory)
        code, _, err = command("attribute", "--run", tmp_path / memory, *words, "--memory", memory)
        assert code == 0, err
        tables.append((tmp_path / memory / "attribution.csv").read_text().splitlines())
    one, many = ([re.split(",", line) for line in table] for table in tables)
    assert [line[:5] for line in one] == [line[:5] for line in many]
    for left, right in zip(one[1:], many[1:], strict=True):
        assert float(left[5] or -1) == pytest.approx(float(right[5] or -1), abs=2e-3)
    code, _, err = command("attribute", "--run", tmp_path / "2", *words, "--memory", "0")
    assert code == 2 and "--memory" in err


@pytest.fixture(scope="module")
def single(scenes, checkpoint, tmp_path_factory):
    """A finished single-label run, and words that explain its probes on grids."""
    place, data, rows = tmp_path_factory.mktemp("single"), read_dataset("voc", scenes), []
    for split, records in data.splits.items():
        rows += [{"path": str(r.image), "label": data.classes[r.box_classes[0]], "split": split} for r in records]
    manifest = place / "single.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = featcache.extract(
        checkpoint, "manifest", root=manifest, features="pooled,spatial", size=32, device="cpu", workers=0,
        store=place / "s.zarr",
    )  # fmt: skip
    run = featcache.train_probes({"probes": GRID["probes"][:1]}, store=store, run=place / "r")
    backbone = ["--backbone", checkpoint, "--dataset", "manifest", "--root", manifest, "--device", "cpu"]
    return run, [*backbone, "--protocol", "gridpg:side=2:grids=12"]


@pytest.mark.process
@pytest.mark.parametrize(("protocol", "ranks"), [("boxes", 1), ("gridpg", 2)])
def test_a_killed_attribution_goes_on_to_the_same_bytes(trained, words, single, tmp_path, protocol, ranks):
    """Several methods and scores; the grids go on in two processes."""
    trained, words = single if protocol == "gridpg" else (trained, words)
    methods = ["--method", "gradcam,input_x_gradient,intgrad:steps=2,rise:masks=3", "--score", "epg,box_iou,complexity"]
    words = [*words, *methods]
    whole = explained(tmp_path / "whole", trained, words)
    assert whole.wait() == 0, whole.stderr.read()
    killed, begun = explained(tmp_path / "killed", trained, words), tmp_path / "killed" / FOLDER
    while len(list(begun.glob("*.safetensors"))) < 3 and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    files = sorted(begun.glob("*.safetensors"))
    assert 3 <= len(files) and not (tmp_path / "killed/attribution.csv").exists()
    # One piece is damaged, and must be made again; the others must not be.
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
    kept = files[0].stat().st_mtime_ns
    program = SMALL_PIECES.replace("; main()", f"""
import os
from featcache.attribution.pieces import Pieces
write = Pieces.write
def checked(self, number, piece):
    assert number != 0 and os.stat({str(files[0])!r}).st_mtime_ns == {kept}
    write(self, number, piece)
Pieces.write = checked
main()""")  # fmt: skip
    last = explained(tmp_path / "killed", trained, words, program, ranks)
    _, err = last.communicate()
    assert last.returncode == 0, err
    assert written(tmp_path / "killed") == written(tmp_path / "whole") and not begun.exists()
    for process in (whole, killed):
        process.stdout.close(), process.stderr.close()


def test_pieces_of_other_settings_are_not_taken(trained, words, command, tmp_path, monkeypatch):
    """What a killed attribution of fewer probes left has the same file names."""
    run = tmp_path / "r"
    shutil.copytree(trained.path, run)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("featcache.attribution.attribute.rows_of", killed)
        featcache.attribute(run, limit=3)
    assert len(list((run / FOLDER).iterdir())) == 1
    rows = featcache.attribute(run, limit=4)
    assert len({row["id"] for row in rows}) == 4 and not (run / FOLDER).exists()


@pytest.mark.process
def test_two_processes_share_the_images(trained, words, tmp_path):
    one, two = (explained(tmp_path / str(ranks), trained, words, ranks=ranks) for ranks in (1, 2))
    (out, err), _ = two.communicate(), one.communicate()
    assert (one.returncode, two.returncode) == (0, 0), err
    assert out.count("uniform map %") == 1, "one process prints the table"
    assert written(tmp_path / "1")["attribution.csv"] == written(tmp_path / "2")["attribution.csv"]


def test_frozen_norms_compute_what_norms_do():
    """With and without weights, in an order of memory that they keep; those that train or have no statistics are left."""
    torch.manual_seed(0)
    norms = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3, affine=False), torch.nn.BatchNorm2d(3, track_running_stats=False)
    )  # fmt: skip
    norms.requires_grad_(False)
    for _ in range(3):
        norms(5 * torch.randn(4, 3, 5, 5) + 2)
    norms[0].weight.copy_(torch.randn(3)), norms[0].bias.copy_(torch.randn(3))
    norms.eval()
    inputs = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for frozen in (False, True):
        with frozen_norms(norms) if frozen else nullcontext():
            outputs = norms(inputs)
        assert outputs.is_contiguous(memory_format=torch.channels_last)
        results.append((outputs, *torch.autograd.grad(outputs[0, :, 1].sum(), inputs)))
        assert not any("forward" in vars(norm) for norm in norms)
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)
    with frozen_norms(norms.train()):
        assert not any("forward" in vars(norm) for norm in norms)


def test_maps_for_pictures_keep_within_the_memory(trained, command, tmp_path):
    """A quarter of it holds the maps of two pairs of image and class for the three probes."""
    shutil.copytree(trained.path, tmp_path / "r")
    chosen = [word for probe in dict.fromkeys(row["probe"] for row in trained.scores) for word in ("--probe", probe)]
    memory = 4 * 3 * 4 * 64**2 * 2
    words = ["attribute", "--run", tmp_path / "r", *chosen, "--limit", 4, "--examples", 4, "--memory", memory / 1e9]
    code, _, err = command(*words)
    assert code == 0 and "are kept for pictures, not of 4; --memory holds no more" in err, err
    with np.load(tmp_path / "r/attribution.npz") as kept:
        assert kept["maps"].nbytes <= memory / 4 and len(kept["maps"]) == 3 * len(kept["ids"]) > 0
    code, _, err = command(*words[:-4], "--examples", "right:3,wrong:3", *words[-2:])
    assert code == 0 and "notice: the maps of 2 pairs of image and class that rules choose are kept, not of" in err, err
    with np.load(tmp_path / "r/attribution.npz") as kept:
        assert kept["maps"].nbytes == memory / 4
