"""Features that teach nothing, that are not finite, or that a store lacks: one line each, whatever the probe."""

import shlex

import numpy as np
import pytest
from digits import CLASSES, digits
from stores import write_features

import featcache
from featcache.errors import BadInput

pytestmark = pytest.mark.process
SGD = {
    "name": "sgd", "features": "pooled", "head": "linear", "loss": "ce", "epochs": 2, "batch_size": 64,
    "optimizer": {"type": "sgd", "lr": 0.1},
}  # fmt: skip
FULL = {"name": "full", "features": "pooled", "head": "linear", "loss": "ce"}
FULL["optimizer"] = {"type": "lbfgs", "weight_decay": 1e-3}
GROUPS = {"mini-batches": SGD, "full batch": FULL, "shots": SGD | {"shots": 5}}


def odd_store(tmp_path, split, change):
    """A store of digits whose features of a split are changed."""
    splits = digits()
    ids, labels, values = splits[split]
    splits[split] = ids, labels, change(values.copy())
    return write_features(tmp_path / "s.zarr", splits, CLASSES)


def with_nan(values):
    values[:, 3] = np.nan
    values[0] = 0
    return values


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("memory", [None, 40_000], ids=["in memory", "streamed"])
def test_a_value_that_is_not_finite_is_named_by_its_image(tmp_path, group, memory):
    if memory and "epochs" not in group:
        pytest.skip("full batches are in memory")
    store = odd_store(tmp_path, "train", with_nan)
    with pytest.raises(
        BadInput, match="feature layer4:pooled of train 'd/0.*' holds a value that is not finite; extract"
    ):
        featcache.train_probes({"probes": [group]}, store=store, run=tmp_path / "r", memory=memory)


def test_a_value_that_is_not_finite_in_a_split_that_is_scored(tmp_path):
    store = odd_store(tmp_path, "test", with_nan)
    with pytest.raises(BadInput, match="feature layer4:pooled of test 'd/1301' holds a value that is not finite"):
        featcache.train_probes({"probes": [SGD]}, store=store, run=tmp_path / "r")


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("memory", [None, 40_000], ids=["in memory", "streamed"])
def test_features_that_are_the_same_for_all_images(tmp_path, group, memory):
    if memory and "epochs" not in group:
        pytest.skip("full batches are in memory")
    store = odd_store(tmp_path, "train", lambda values: values * 0 + 1)
    with pytest.raises(BadInput, match="layer4:pooled is the same for all images of train: nothing can be learned"):
        featcache.train_probes({"probes": [group]}, store=store, run=tmp_path / "r", memory=memory)


def test_a_column_that_is_constant_is_nothing_odd(tmp_path):
    def dead(values):
        values[:, :5] = 0
        return values

    store = odd_store(tmp_path, "train", dead)
    run = featcache.train_probes({"probes": [SGD, FULL]}, store=store, run=tmp_path / "r")
    assert run.summary["diverged"] == []


def test_a_feature_that_the_store_lacks_comes_with_the_command_that_adds_it(
    tmp_path, monkeypatch, scenes, checkpoint, command
):
    monkeypatch.chdir(tmp_path)
    given = {
        "size": 32,
        "resize": "warp",
        "short_side": 40,
        "interpolation": "bicubic",
        "dtype": "float32",
        "workers": 0,
    }
    featcache.extract(
        checkpoint, "voc", root=scenes, splits=["val", "test"], features="pooled", store="s.zarr", **given
    )
    grid = {"splits": {"train": "val", "test": "test"}, "probes": [SGD | {"features": "layer3:pooled"}]}
    with pytest.raises(BadInput) as caught:
        featcache.train_probes(grid, store="s.zarr", run="r")
    printed = caught.value.message.partition("if the backbone has that layer: featcache ")[2].replace(
        "CKPT", str(checkpoint)
    )
    code, _, err = command(*shlex.split(printed), "--root", scenes, "--split", "val,test", "--workers", 0)
    assert code == 0 and "adding layer3:pooled of val, test to s.zarr" in err, err
    assert featcache.train_probes(grid, store="s.zarr", run="r").summary["probes"] == 1
