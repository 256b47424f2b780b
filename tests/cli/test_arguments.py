"""The commands' Python twins: an argument of the wrong kind is one line that names it, before anything is done."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

import featcache
from featcache.arguments import NUMBERS, PATH, PATHS, takes, whole
from featcache.errors import BadInput

WRONG = {
    "backbone": [None, 5, {"conv1.weight": torch.zeros(1)}],
    "dataset": [None, 5, ["voc"], torch.utils.data.TensorDataset(torch.ones(1))],
    "root": [5],
    "splits": [5, "val", [1]],
    "features": [3, {"pooled": 1}],
    "store": [5, ["x.zarr"]],
    "format": [["zarr"]],
    "arch": [5, torch.nn.Linear],
    "weights_key": [5],
    "size": ["x", "64", 64.5, (64, 64), True, 0],
    "resize": [["crop"]],
    "short_side": ["x"],
    "mean": [5, "0.5,0.5,0.5", [None] * 3],
    "precision": [torch.bfloat16],
    "dtype": [torch.float32, "float64"],
    "batch_size": ["x", 0, 2.5],
    "workers": ["x", -1],
    "device": [[5]],
    "seed": ["x"],
    "views": ["x", 1.5],
    "crop_scale": [5, "x"],
    "decoder": [["exact"]],
}


@pytest.mark.parametrize("name", WRONG)
def test_extract_says_which_argument_is_wrong(scenes, checkpoint, tmp_path, name):
    given = {
        "backbone": checkpoint,
        "dataset": "voc",
        "root": scenes,
        "size": 64,
        "workers": 0,
        "store": tmp_path / "s",
    }
    for value in WRONG[name]:
        with pytest.raises(BadInput) as caught:
            featcache.extract(**given | {name: value})
        assert name in caught.value.message and "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())


def test_a_network_in_memory_where_a_file_is_needed_is_told_how_to_become_one(tmp_path):
    with pytest.raises(BadInput) as caught:
        featcache.finetune(resnet18(), "voc", {}, tmp_path)
    assert caught.value.message == (
        "backbone: expected the path of a checkpoint, not a ResNet; save the tensors of a network in memory with "
        "torch.save(network.state_dict(), 'network.pth') and give that path"
    )


def test_the_other_twins_too(store, tmp_path):
    cases = {
        "store: expected a path or URL, not 5": [
            lambda: featcache.open_store(5), lambda: featcache.inspect(5), lambda: featcache.verify(5),
            lambda: featcache.convert(5, "hdf5"), lambda: featcache.convert(store, "hdf5", out=5),
        ],
        "store: expected a path, not a Store": [
            lambda: featcache.train_probes({}, store=featcache.open_store(store)),
            lambda: featcache.plan_probes({}, store=featcache.open_store(store)),
            lambda: featcache.import_probes("x.pth", featcache.open_store(store), tmp_path / "run", "bce"),
        ],
        "name: expected a name, not None": [lambda: featcache.inspect_dataset(None)],
        "runs: expected a path or a list of paths, not 5": [lambda: featcache.report(5), lambda: featcache.compare(5)],
        "checkpoints: expected a path or a list of paths, not 5": [lambda: featcache.export(5, "x.pth")],
        "root: expected a path, not 5": [lambda: featcache.attribute("run", root=5)],
    }  # fmt: skip
    for message, calls in cases.items():
        for call in calls:
            with pytest.raises(BadInput) as caught:
                call()
            assert caught.value.message == message


def test_what_is_right_passes_as_it_came():
    @takes(path=PATH, paths=PATHS, count=whole(1), numbers=NUMBERS)
    def call(path, paths=None, count=None, numbers=(1, 2)):
        """Its words."""
        return path, paths, count, numbers

    given = (Path("x"), ["y", Path("z")], np.int64(3), np.ones(3))
    assert all(a is b for a, b in zip(call(*given), given, strict=True))
    assert call("x") == ("x", None, None, (1, 2)) and call("x", None, None)[1:3] == (None, None)
    assert call.__doc__ == "Its words." and list(inspect.signature(call).parameters) == [
        "path",
        "paths",
        "count",
        "numbers",
    ]
    with pytest.raises(BadInput, match="path: expected a path, not None"):
        call(None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nmubers'"):
        call("x", nmubers=[1])
