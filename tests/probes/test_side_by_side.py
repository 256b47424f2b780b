"""Heads that read several features side by side: names, one copy of the features, the same weights, export."""

import json
import signal
import time

import numpy as np
import pytest
import torch
import yaml
from loop import train_block
from plain import assert_near
from processes import start_training

import featcache
from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.exchange.merged import Merged, as_program, example
from featcache.feature import beside, parse_beside, split_beside
from featcache.probes.engine.predict import Predictor
from featcache.probes.engine.scoring import new_tally
from featcache.probes.engine.waves import plan_buffers, plan_waves
from featcache.probes.grids.grid import load_grid, parse_grid
from featcache.probes.inputs.input import Input, Source
from featcache.probes.inputs.shared import shared_inputs
from featcache.probes.resolve import resolve
from featcache.probes.runs.probe_file import find_probes, load_probes
from featcache.store import manifest

ARCH = "vit_tiny_patch16"
# DINOv2's four representations.
INPUTS = ["last:cls", "last:cls + patch_mean", "last4:cls", "last4:cls + patch_mean"]
GRID = {
    "probes": [
        {"features": INPUTS, "head": "linear", "loss": "bce", "epochs": 3, "batch_size": 16,
         "optimizer": {"type": "sgd", "lr": [0.01, 0.1, 1.0]}, "schedule": "cosine"},
    ]
}  # fmt: skip
# Features of 40 images x 5 x 192 numbers of 4 bytes do not fit.
SMALL = 60_000


@pytest.fixture(scope="module")
def store(scenes, tmp_path_factory):
    """A store of the class tokens of four blocks of a small ViT, and its patches; with chunks of 4 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "CHUNK_ROWS", 4)
        return featcache.extract(
            "random", "voc", root=scenes, arch=ARCH, size=32, features="last4:cls,patch_mean,tokens,spatial",
            dtype="float32", workers=0, store=tmp_path_factory.mktemp("vit") / "vit.zarr",
        )  # fmt: skip


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


def trained(run):
    return {probe.spec.id: probe for probe in load_probes(run.path, find_probes(run.path))}


def read_whole(store, name, split="train"):
    """Features side by side as plain numpy has them."""
    opened = featcache.open_store(store)
    features = parse_beside(name, opened.manifest.aliases)
    return torch.from_numpy(np.concatenate([opened[split][str(f)][:] for f in features], axis=1))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pooled", ["pooled"]),
        ("last:cls + patch_mean", ["last:cls", "patch_mean"]),
        ("cls+pooled", ["cls", "pooled"]),
        ("blocks.8+norm:cls", ["blocks.8+norm:cls"]),
        ("blocks.8 + norm:cls", ["blocks.8 + norm:cls"]),
        ("blocks.8+norm:cls + blocks.9+norm:cls+last:patch_mean", ["blocks.8+norm:cls", "blocks.9+norm:cls", "last:patch_mean"]),
        ("layer3:grid(8,3,0) + layer4:grid(6, 1, 0)", ["layer3:grid(8,3,0)", "layer4:grid(6, 1, 0)"]),
        ("cls + ", ["cls", ""]),
    ],
)  # fmt: skip
def test_where_one_feature_ends(text, parts):
    assert split_beside(text) == parts


def test_names_are_resolved():
    aliases = {"last": "norm", "last-1": "blocks.10+norm", "last-2": "blocks.9+norm"}
    features = parse_beside("last3:cls + patch_mean", aliases)
    assert beside(features) == "blocks.9+norm:cls + blocks.10+norm:cls + norm:cls + norm:patch_mean"
    assert parse_beside(beside(features), {}) == features
    with pytest.raises(BadInput, match="norm:cls stands beside itself"):
        parse_beside("last2:cls + cls", aliases)
    with pytest.raises(BadInput, match="the backbone has no 'last-3'; its last 3 blocks have names"):
        parse_beside("last4:cls", aliases)


def test_the_copy_that_is_held_has_each_feature_once(store, run):
    opened = featcache.open_store(store)
    specs = [probe.spec for probe in trained(run).values()]
    shared = shared_inputs(specs)
    assert len(shared) == 4
    (whole,) = set(shared.values())
    assert whole.shape(opened) == (5 * 192, 1)
    ranges = {len(source.input.parts): whole.columns(source.input, opened) for source in shared}
    assert ranges == {1: ((576, 768),), 2: ((576, 960),), 4: ((0, 768),), 5: ((0, 960),)}
    plan = featcache.plan_probes(GRID, store=store)
    assert {stack.feature_bytes for stack in plan.stacks} == {40 * 5 * 192 * 4}
    # What has no feature in common stays by itself.
    other = parse_grid({"probes": [GRID["probes"][0] | {"features": "x:cls"}]}).specs[0]
    assert shared_inputs([*specs, other])[Source.of(other)] == Input.of(other)


def test_one_pass_over_the_data_serves_all_heads_that_are_streamed(store, tmp_path):
    opened, device = featcache.open_store(store), torch.device("cpu")
    resolved = resolve(load_grid(GRID), opened, device)
    buffers = plan_buffers(resolved.specs, resolved.sets, SMALL, device)
    (wave,) = plan_waves(tmp_path, resolved.specs, opened, buffers, device)
    assert len(wave.blocks) == 4 and len(wave.input.parts) == 5 and wave.buffer_rows


@pytest.mark.parametrize("memory", [None, SMALL], ids=["in memory", "streamed"])
def test_a_probe_equals_the_same_on_features_put_together_by_hand(store, tmp_path, memory):
    run = featcache.train_probes(GRID, store=store, run=tmp_path / "r", memory=memory)
    buffers = json.loads((run.path / "run.json").read_text())["buffers"]
    assert len(buffers) == 4 and len(set(buffers.values())) == 1 and (memory is None) == (None in buffers.values())
    opened = featcache.open_store(store)
    labels = torch.from_numpy(opened["train"].labels)
    for probe in trained(run).values():
        features = read_whole(store, probe.spec.features)
        assert features.shape[1] == probe.weights["fc0.weight"].shape[1]
        if memory is None:
            (alone,) = train_block([probe.spec], features, labels, len(opened.classes), 0)
            assert_near(probe.weights, alone.weights)
        # Validation, scores and training read the same columns.
        test = read_whole(store, probe.spec.features, "test")
        tally = new_tally([probe.spec], torch.from_numpy(opened["test"].labels), len(opened.classes))
        tally.add(Predictor([probe.spec], [probe.weights], len(opened.classes), torch.device("cpu"))(test))
        assert run.row(probe.spec.id, "map", "test")["value"] == pytest.approx(float(tally.scores()["map"]), abs=1e-6)
    # Streamed probes see the rows in one order, whatever they read: alone, or beside the others.
    alone = featcache.train_probes(
        {"probes": [GRID["probes"][0] | {"features": INPUTS[3]}]}, store=store, run=tmp_path / "alone", memory=memory
    )
    for name, probe in trained(alone).items():
        assert_near(probe.weights, trained(run)[name].weights)


def test_columns_that_are_no_neighbours(store, tmp_path):
    """Three inputs that overlap: some of their columns are put together mini-batch by mini-batch."""
    names = ["last:cls + last-2:cls", "last-2:cls + last-1:cls", "last-1:cls + last:cls"]
    group = GRID["probes"][0] | {"features": names}
    for memory in (None, SMALL):
        run = featcache.train_probes({"probes": [group]}, store=store, run=tmp_path / f"{memory}", memory=memory)
        for probe in trained(run).values():
            one = {"probes": [group | {"features": probe.spec.features}]}
            # Two features of the three fit as many rows into two thirds of the memory.
            less = memory and memory * 2 // 3
            alone = featcache.train_probes(one, store=store, run=tmp_path / f"{memory}-{probe.spec.id}", memory=less)
            assert_near(probe.weights, trained(alone)[probe.spec.id].weights)


def test_maps_and_tokens_stand_side_by_side_too(store, tmp_path):
    group = GRID["probes"][0] | {"optimizer": {"type": "adam", "lr": 0.01}}
    opened = featcache.open_store(store)
    run = featcache.train_probes(
        {"probes": [group | {"head": {"type": "attentive", "heads": 2}, "features": "tokens"},
                    group | {"head": {"type": "mlp", "hidden": 8}, "features": "spatial"},
                    group | {"features": "spatial + cls"}]},
        store=store, run=tmp_path / "r",
    )  # fmt: skip
    assert len(run.scores) == 3 * 3 * 9
    wide = [p for p in trained(run).values() if "+ " in p.spec.features]
    assert [p.weights["fc0.weight"].shape[1] for p in wide] == [384], "the map is averaged first for a linear head"
    with pytest.raises(BadInput, match="norm:tokens has 5 positions and norm:cls has 1; features side by side have"):
        featcache.train_probes(
            {"probes": [group | {"head": {"type": "attentive", "heads": 2}, "features": "tokens + cls"}]}, store=store
        )
    with pytest.raises(BadInput, match="the store holds no feature 'blocks.7\\+norm:cls'"):
        featcache.train_probes({"probes": [group | {"features": "cls + blocks.7+norm:cls"}]}, store=store)
    assert opened.task == "multi-label"


def test_two_ways_to_write_the_same_features_are_one_probe(store, run):
    group = GRID["probes"][0] | {"features": ["last:cls + patch_mean", "cls+last:patch_mean"]}
    with pytest.raises(BadInput, match="repeats a probe"):
        featcache.plan_probes({"probes": [group]}, store=store)
    assert {row["features"] for row in run.scores} == {
        "norm:cls", "norm:cls + norm:patch_mean",
        "blocks.8+norm:cls + blocks.9+norm:cls + blocks.10+norm:cls + norm:cls",
        "blocks.8+norm:cls + blocks.9+norm:cls + blocks.10+norm:cls + norm:cls + norm:patch_mean",
    }, "aliases are resolved"  # fmt: skip


def test_a_merged_network_says_what_the_probe_says_of_the_cache(run):
    backbone = load_backbone("random", arch=ARCH, size=32)
    for probe in list(trained(run).values())[::5]:
        merged, images = Merged(backbone, probe), example(backbone, 3)
        features = parse_beside(probe.spec.features, backbone.aliases, backbone.layers)
        with torch.inference_mode():
            results = backbone(images, features)
            rows = torch.cat([results[str(feature)] for feature in features], 1)
            expected = Predictor([probe.spec], [probe.weights], 20, torch.device("cpu"))(rows)[0]
            torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(as_program(merged, images[:2]).module()(images), expected, rtol=1e-4, atol=1e-5)


def test_class_tokens_side_by_side_are_no_map(run, command):
    probe = next(p.spec.id for p in trained(run).values() if "+ " in p.spec.features)
    code, _, err = command("attribute", "--run", run.path, "--probe", probe)
    assert code == 2 and "which is no map of the image; methods that can explain it: gradient, " in err


@pytest.mark.process
@pytest.mark.parametrize(
    "memory", [None, pytest.param(SMALL / 1e9, marks=pytest.mark.slow)], ids=["in memory", "streamed"]
)
def test_killed_and_started_again_gives_the_same_bits(store, tmp_path, memory):
    grid, more = tmp_path / "grid.yaml", [] if memory is None else ["--memory", memory]
    grid.write_text(yaml.safe_dump({"probes": [GRID["probes"][0] | {"epochs": 60, "keep": "best"}]}))
    whole = start_training(grid, store, tmp_path / "whole", *more)
    assert whole.wait() == 0, whole.stderr.read()
    for _ in range(2):
        process = start_training(grid, store, tmp_path / "killed", *more)
        while not list((tmp_path / "killed").glob("partial/*.safetensors")) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert list((tmp_path / "killed").glob("partial/*.safetensors"))
    last = start_training(grid, store, tmp_path / "killed", *more)
    assert last.wait() == 0, last.stderr.read()
    for process in (whole, last):
        process.stderr.close()
    first, second = (
        {p.spec.id: p.weights for p in load_probes(tmp_path / n, find_probes(tmp_path / n))}
        for n in ("whole", "killed")
    )
    assert first.keys() == second.keys() and len(first) == 12
    for name, weights in first.items():
        for key, weight in weights.items():
            assert torch.equal(weight, second[name][key])
