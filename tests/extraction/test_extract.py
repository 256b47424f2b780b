"""Extraction: cached equals uncached, interruption costs nothing, bad input leaves nothing."""

import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from extracting import SIZE, SMALL_SHARDS, options
from folders import tree_hash
from torchvision.models import resnet18

import featcache
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.errors import BadInput
from featcache.extraction.fill import _cast


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_equals_uncached(scenes, checkpoint, tmp_path, dtype):
    """The plain torchvision network, fed by a loop of its own, against what the store holds."""
    path = featcache.extract(
        checkpoint, "voc", root=scenes, size=SIZE, dtype=dtype, batch_size=8, workers=2, store=tmp_path / "s.zarr"
    )
    network = resnet18()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval().to(memory_format=torch.channels_last)
    apply = load_backbone(checkpoint, size=SIZE).preprocessing.apply
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for split, records in read_dataset("voc", scenes).splits.items():
        images = torch.stack([(apply(open_image(r.image)) / 255 - mean) / std for r in records])
        with torch.inference_mode():
            parts = images.contiguous(memory_format=torch.channels_last).split(8)
            expected = torch.cat([network(part) for part in parts]).numpy()
        cached = featcache.open_store(path)[split]["pooled"][:]
        assert cached.dtype == dtype
        if dtype == "float32":
            assert np.abs(cached - expected).max() <= 1e-6
        else:
            np.testing.assert_allclose(cached, expected, rtol=2**-10, atol=1e-6)
        spatial = featcache.open_store(path)[split]["spatial"][:].astype(np.float32).mean((2, 3))
        np.testing.assert_allclose(spatial, expected, rtol=2e-3, atol=1e-4)


def test_bytes_do_not_depend_on_workers(scenes, checkpoint, tmp_path, command):
    for name, workers in (("a.zarr", 0), ("b.zarr", 2)):
        assert command("extract", *options(scenes, checkpoint, tmp_path / name, workers=workers))[0] == 0
    assert tree_hash(tmp_path / "a.zarr") == tree_hash(tmp_path / "b.zarr")


def test_a_finished_store_is_found_again(scenes, checkpoint, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = options(scenes, checkpoint, "")
    words = [w for pair in zip(words[::2], words[1::2], strict=True) if pair[0] != "--store" for w in pair]
    code, _, err = command("extract", *words)
    (path,) = (tmp_path / "features").iterdir()
    assert code == 0 and path.name.startswith("voc2007-resnet18-") and f"features/{path.name}" in err
    before = tree_hash(path)
    code, _, err = command("extract", *words)
    assert code == 0 and "is finished already" in err and "extract:" not in err
    assert tree_hash(path) == before


def test_another_identity_is_refused_with_the_field(scenes, checkpoint, tmp_path, command):
    path = tmp_path / "s.zarr"
    assert command("extract", *options(scenes, checkpoint, path, split="val"))[0] == 0
    before = tree_hash(path)
    code, _, err = command("extract", *options(scenes, checkpoint, path, split="val", dtype="float32"))
    assert code == 2 and 'dtype: "float16" -> "float32"' in err
    assert "with another --store, or with none, writes a new one" in err
    code, _, err = command("extract", *options(scenes, checkpoint, path, split="test", size=32))
    assert code == 2 and "preprocessing.size: 64 -> 32" in err and "dataset.splits" not in err
    assert tree_hash(path) == before


@pytest.mark.process
def test_kill_and_resume_gives_the_same_bytes(scenes, checkpoint, tmp_path):
    words = options(scenes, checkpoint, tmp_path / "s.zarr", workers=1)
    start = [sys.executable, "-c", SMALL_SHARDS, "extract"]
    subprocess.run(
        [*start, *options(scenes, checkpoint, tmp_path / "whole.zarr", workers=1)], check=True, capture_output=True
    )

    def markers(name="s.zarr"):
        return len(list((tmp_path / name).glob("commits/*/*.json")))

    total, moments, seen = markers("whole.zarr"), random.Random(0), []
    assert total > 8
    # Killed while it starts, then soon after the first commit, a quarter, and half of them.
    for target in (0, 1, total // 4, total // 2):
        process = subprocess.Popen([*start, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while markers() < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02 if target else 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(markers())
        if seen[-1] < total:
            with pytest.raises(BadInput, match="incomplete|not found|it has no manifest.json"):
                featcache.open_store(tmp_path / "s.zarr")
    assert any(0 < count < total for count in seen), seen
    subprocess.run([*start, *words], check=True, capture_output=True)
    assert tree_hash(tmp_path / "s.zarr") == tree_hash(tmp_path / "whole.zarr")


def test_a_store_goes_on_with_the_batch_size_it_was_begun_with(scenes, checkpoint, tmp_path, command):
    for name in ("a.zarr", "b.zarr"):
        assert command("extract", *options(scenes, checkpoint, tmp_path / name))[0] == 0
    (tmp_path / "b.zarr/commits/val/000000.json").unlink()
    code, _, err = command("extract", *options(scenes, checkpoint, tmp_path / "b.zarr", **{"batch-size": 3}))
    assert code == 0 and "was begun with batch size 8" in err
    assert tree_hash(tmp_path / "a.zarr") == tree_hash(tmp_path / "b.zarr")


def text_checkpoint(scenes, tmp_path):
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    return {"backbone": tmp_path / "text.pth"}, "text.pth"


def code_checkpoint(scenes, tmp_path):
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print))
    return {"backbone": tmp_path / "code.pth"}, "code.pth"


def no_checkpoint(scenes, tmp_path):
    return {"backbone": tmp_path / "none.pth"}, "none.pth"


def empty_folder(scenes, tmp_path):
    (tmp_path / "empty").mkdir()
    return {"root": tmp_path / "empty"}, "empty"


def no_folder(scenes, tmp_path):
    return {"root": tmp_path / "gone"}, "gone"


def missing_image(scenes, tmp_path):
    (scenes / "VOCdevkit/VOC2007/JPEGImages/000005.jpg").unlink()
    return {}, "000005.jpg"


def broken_xml(scenes, tmp_path):
    (scenes / "VOCdevkit/VOC2007/Annotations/000005.xml").write_text("<annotation><object>")
    return {}, "000005.xml"


def truncated_jpeg(scenes, tmp_path, number=5):
    image = scenes / f"VOCdevkit/VOC2007/JPEGImages/{number:06d}.jpg"
    image.write_bytes(image.read_bytes()[:3000])
    return {}, image.name


def not_an_image(scenes, tmp_path):
    (scenes / "VOCdevkit/VOC2007/JPEGImages/000005.jpg").write_bytes(b"")
    return {}, "000005.jpg"


def wrong_size(scenes, tmp_path):
    annotation = scenes / "VOCdevkit/VOC2007/Annotations/000005.xml"
    annotation.write_text(annotation.read_text().replace("<width>320<", "<width>640<"))
    return {}, "000005.jpg"


@pytest.mark.process
@pytest.mark.parametrize(
    "damage",
    [text_checkpoint, code_checkpoint, no_checkpoint, empty_folder, no_folder, missing_image, broken_xml, truncated_jpeg, not_an_image, wrong_size],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_input_is_one_clear_line_and_leaves_nothing(scenes, checkpoint, tmp_path, command, damage, workers):
    shutil.copytree(scenes, tmp_path / "scenes")
    given, culprit = damage(tmp_path / "scenes", tmp_path)
    words = options(tmp_path / "scenes", checkpoint, tmp_path / "out" / "s.zarr", workers=workers)
    for key, value in given.items():
        words[words.index(f"--{key}") + 1] = value
    code, out, err = command("extract", *words)
    (line,) = [part for part in err.split("\n") if part.startswith("Error")]
    assert code == 2 and culprit in line and "Traceback" not in err
    assert not list((tmp_path / "out").glob("*")), "nothing half-written is left behind"


def test_an_error_after_commits_keeps_what_is_whole(scenes, checkpoint, tmp_path, command):
    shutil.copytree(scenes, tmp_path / "scenes")
    truncated_jpeg(tmp_path / "scenes", tmp_path, number=70)
    path = tmp_path / "s.zarr"
    assert command("extract", *options(tmp_path / "scenes", checkpoint, path, features="pooled"))[0] == 2
    # Train and val were whole when the bad test image came.
    assert (path / "commits/train/000000.json").exists() and not (path / "commits/test").exists()
    with pytest.raises(BadInput, match="incomplete: split test"):
        featcache.open_store(path)


def test_what_float16_cannot_hold_is_named():
    ids = ["a", "b", "c"]
    with pytest.raises(
        BadInput, match=r"layer4:pooled, row 11 \(id b\): value 1e\+05 is beyond float16.*--dtype float32"
    ):
        _cast(torch.tensor([[1.0], [1e5], [2.0]]), torch.float16, "layer4:pooled", 10, ids)
    with pytest.raises(BadInput, match=r"row 12 \(id c\).*not finite"):
        _cast(torch.tensor([[1.0], [2.0], [float("nan")]]), torch.float32, "layer4:pooled", 10, ids)
    with pytest.raises(BadInput, match="too small for float16"):
        _cast(torch.full((3, 2), 1e-6), torch.float16, "layer4:pooled", 10, ids)
    assert _cast(torch.zeros(3, 2), torch.float16, "layer4:pooled", 10, ids).dtype == torch.float16


@pytest.mark.parametrize(
    "words",
    [
        ["--dtype", "float8"],
        ["--size", "0"],
        ["--features", "layer9:pooled"],
        ["--arch", "resnet"],
        ["--dataset", "vok"],
        ["--split", "tset"],
    ],
)
def test_wrong_options(scenes, checkpoint, tmp_path, command, words):
    code, _, err = command("extract", *options(scenes, checkpoint, tmp_path / "s.zarr"), *words)
    assert code == 2 and words[1] in err and "Traceback" not in err


@pytest.mark.process
def test_the_order_of_an_interrupt(scenes, checkpoint, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_SHARDS, "extract", *options(scenes, checkpoint, tmp_path / "s.zarr")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list((tmp_path / "s.zarr").glob("commits/train/*.json")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.process
def test_a_full_disk_is_one_clear_line(scenes, checkpoint, tmp_path):
    """RLIMIT_FSIZE stands in for the disk: no file may grow beyond 100 kB."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    words = options(scenes, checkpoint, tmp_path / "s.zarr")
    start = [sys.executable, "-c", limited + "from featcache.cli import main; main()", "extract", *words]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: {tmp_path}/s.zarr") and "File too large; raise the largest size of a file" in last
    assert not list(tmp_path.glob("s.zarr*")), "nothing was committed, so nothing is left"
