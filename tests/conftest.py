"""Shared parts: a small VOC of digit scenes, a small checkpoint, a store of both. All real files."""

import sys

import pytest
import torch
from extracting import SIZE
from torchvision.models import resnet18

import featcache
from featcache.cli import main
from featcache.demo.scenes import make_scenes


def pytest_collection_modifyitems(config, items):
    """Leave out slow tests, whatever else -m chooses, unless it speaks of them."""
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Root of a VOC2007 layout: 40 train, 20 val, 20 test scenes."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(root, {"train": 40, "val": 20, "test": 20})
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A ResNet-18 checkpoint with batch-norm statistics that are not the initial ones."""
    torch.manual_seed(0)
    network = resnet18().train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, SIZE, SIZE))
    path = tmp_path_factory.mktemp("ckpt") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def store(scenes, checkpoint, tmp_path_factory):
    """Path of a finished float32 store, pooled and spatial features of layer3 and layer4."""
    return featcache.extract(
        checkpoint,
        "voc",
        root=scenes,
        features="pooled,spatial,layer3:spatial",
        size=SIZE,
        dtype="float32",
        device="cpu",
        workers=0,
        batch_size=8,
        store=tmp_path_factory.mktemp("store") / "digits.zarr",
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the featcache command in this process: command("extract", ...) -> (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["featcache", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run
