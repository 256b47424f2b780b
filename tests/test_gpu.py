"""Every command on a real GPU, against the same on the CPU. Skipped where there is no GPU."""

import itertools

import numpy as np
import pytest
import safetensors.torch
import torch
import trust
import tuning
from extracting import SIZE, options
from folders import tree_hash

import featcache
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.tuned import backbone_path, logits_path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LOSSES = [{"type": "bce", "off_label": "1/C", "class_weights": "balanced"}, {"type": "ce", "label_smoothing": 0.1},
          "focal", "asymmetric"]  # fmt: skip
METHODS = ["gradcam", "layercam", "cached_occlusion", "input_x_gradient", "guided_backprop", "smoothgrad:samples=2",
           "occlusion:stride=32", "rise:masks=4"]  # fmt: skip
RATES = {"sgd": [0.1, 0.5], "lars": [0.1, 0.5], "adam": [1e-3, 1e-2], "adamw": [1e-3, 1e-2]}


def group(name, features, head, rule="sgd", **more):
    """Return probes of a head with one rule, all losses and two rates each."""
    optimizer = {"type": rule, "lr": RATES[rule], "weight_decay": 1e-4}
    return {"name": name, "features": features, "head": head, "loss": LOSSES, "optimizer": optimizer,
            "schedule": "cosine", "epochs": 3, "batch_size": 16} | more  # fmt: skip


GRID = {
    "probes": [
        *(group(f"linear-{rule}", "pooled", "linear", rule) for rule in RATES),
        group("mlp", "spatial", {"type": "mlp", "hidden": 16, "norm": "bn"}),
        group("bcos", "spatial", {"type": "bcos", "layers": 2, "hidden": 16, "max_out": 2}, "adam"),
        group("attentive", "spatial", {"type": "attentive", "heads": 4}, "adamw"),
        group("bn", "pooled", "bn_linear", "lars"),
        group("efficient", "spatial", {"type": "efficient", "queries": 4}, "adamw"),
        group("two", "pooled + layer3:spatial", {"type": "mlp", "hidden": 16, "pool": "before"}),
        {"name": "full", "features": "pooled", "head": "linear", "loss": ["bce", "ce", "squared_hinge"],
         "optimizer": {"type": "lbfgs", "weight_decay": [1e-1, 1e-4]}},
        {"name": "svm", "features": "pooled", "head": "linear", "loss": {"type": "squared_hinge", "positive_weight": 2},
         "optimizer": {"type": "svm", "costs": [0.01, 1], "folds": 2}},
        {"name": "knn", "features": "pooled", "head": {"type": "knn", "k": [1, 5, 10]}, "loss": "bce", "optimizer": "none"},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    """The same grid trained on both devices."""
    folder = tmp_path_factory.mktemp("runs")
    return [featcache.train_probes(GRID, store=store, run=folder / d, device=d) for d in ("cpu", "cuda")]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_features(scenes, checkpoint, store, tmp_path, precision):
    path = featcache.extract(
        checkpoint, "voc", root=scenes, size=SIZE, dtype="float32", precision=precision, device="cuda", batch_size=8,
        features="pooled,spatial,layer3:spatial", store=tmp_path / "s.zarr",
    )  # fmt: skip
    close = {"float32": 1e-5, "tf32": 3e-3, "bf16": 3e-2}[precision]
    for split, feature in itertools.product(("train", "test"), ("pooled", "spatial", "layer3:spatial")):
        expected = featcache.open_store(store)[split][feature][:]
        got = featcache.open_store(path)[split][feature][:]
        assert np.linalg.norm(got - expected) < close * np.linalg.norm(expected)


def test_an_extraction_gives_the_same_bytes_again(scenes, checkpoint, tmp_path, command):
    for name in ("a.zarr", "b.zarr"):
        assert command("extract", *options(scenes, checkpoint, tmp_path / name, device="cuda"))[0] == 0
    assert tree_hash(tmp_path / "a.zarr") == tree_hash(tmp_path / "b.zarr")


def test_probes_are_those_of_the_cpu(runs):
    cpu, gpu = ({r["probe"]: r for r in run.scores} for run in runs)
    assert cpu.keys() == gpu.keys()
    for probe, row in cpu.items():
        left, right = (load_probe(run.path, probe).weights for run in runs)
        for name, weight in left.items():
            away = (right[name].double() - weight.double()).norm()
            # Adam divides by roots of squares that start near zero, so that it enlarges rounding errors.
            assert away <= 2e-2 * weight.double().norm() + 1e-6, (row["name"], name)


def test_scores_are_those_of_the_cpu(runs):
    def values(run):
        keys = ("probe", "split", "metric")
        # Nearest neighbours are not scored on what they remember.
        return {tuple(r[k] for k in keys): r["value"] or 0 for r in run.scores if r["metric"] == "map"}

    cpu, gpu = map(values, runs)
    assert cpu.keys() == gpu.keys() and len(cpu) > 0
    assert max(abs(cpu[key] - gpu[key]) for key in cpu) < 1


def test_a_probe_among_others_is_the_probe_alone(store, runs, tmp_path):
    """The first probe of every group that takes steps, trained by itself on the GPU."""
    for probes in (p for p in GRID["probes"] if "lr" in p["optimizer"]):
        first = {k: v[0] if k == "loss" else v for k, v in probes.items()}
        rates = {k: v[0] if isinstance(v, list) else v for k, v in probes["optimizer"].items()}
        grid = {"probes": [first | {"optimizer": rates}]}
        alone = featcache.train_probes(grid, store=store, run=tmp_path / probes["name"], device="cuda")
        (probe,) = {r["probe"] for r in alone.scores}
        left, right = (load_probe(run.path, probe).weights for run in (alone, runs[1]))
        for name, weight in left.items():
            assert (right[name] - weight).abs().max() <= 1e-5 * weight.abs().max().clamp(min=1), (probes["name"], name)


def test_maps_are_those_of_the_cpu(store, checkpoint, scenes, runs, tmp_path):
    chosen = [next(r["probe"] for r in runs[0].scores if r["name"] == n) for n in ("linear-sgd", "mlp", "bcos")]
    tables = []
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        featcache.train_probes(GRID, store=store, run=run, device="cpu")
        tables.append(
            featcache.attribute(run, probes=chosen, methods=METHODS, scores=["epg", "compactness", "complexity"],
                                backbone=checkpoint, dataset="voc", root=scenes, device=device, limit=6)
        )  # fmt: skip
    for left, right in zip(*tables, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if isinstance(value, float):
                assert right[key] == pytest.approx(value, abs=2e-3, nan_ok=True), (key, left)
            else:
                assert right[key] == value


def test_streamed_features_give_the_same_probes(store, runs, tmp_path):
    """Features that do not fit are read from the store in every epoch."""
    grid = {"probes": [probes for probes in GRID["probes"] if "lr" in probes["optimizer"]]}
    streamed = featcache.train_probes(grid, store=store, run=tmp_path / "r", device="cuda", memory=2e5)
    assert {r["probe"] for r in streamed.scores} <= {r["probe"] for r in runs[1].scores}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_captured_steps_train_the_same_probes(store, tmp_path, monkeypatch, precision):
    """CUDA graphs against kernels launched one by one: an uneven last batch, clipping, probes that stop early."""
    groups = [
        group(f"{rule}-{batch}", "pooled", "linear", rule, batch_size=batch, epochs=12, patience=2, precision=precision,
              keep="best")
        for rule, batch in itertools.product(RATES, (8, 12))
    ]  # fmt: skip
    for probes in groups[::2]:
        probes["optimizer"] = probes["optimizer"] | {"clip": 0.5}
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(1), replay(graph))[1])
    captured = featcache.train_probes({"probes": groups}, store=store, run=tmp_path / "captured", device="cuda")
    assert replayed
    replayed.clear()
    monkeypatch.setattr("featcache.probes.engine.training.can_capture", lambda spec, device: False)
    eager = featcache.train_probes({"probes": groups}, store=store, run=tmp_path / "eager", device="cuda")
    assert not replayed
    for probe in {r["probe"] for r in eager.scores}:
        left, right = (load_probe(run.path, probe) for run in (captured, eager))
        assert left.epoch == right.epoch
        for name, weight in right.weights.items():
            assert (left.weights[name] - weight).abs().max() <= 1e-5 * weight.abs().max(), (probe, name)


@pytest.mark.parametrize(("amp", "near"), [("none", 1e-3), ("bf16", 0.05), ("fp16", 0.05)])
def test_fine_tuning(tmp_path, amp, near):
    """Weights of network and head after the same steps; images, order and mixing are the same."""
    images = trust.write_images(tmp_path)
    content = tuning.recipe({"amp": amp, "mixup": 0.5, "cutmix": 1.0, "ema": 0.9, "micro_batch": 4})
    runs = [tuning.finetune(images, content, tmp_path / device, device=device) for device in ("cpu", "cuda")]
    (probe,) = runs[0].summary["backbones"]
    for place in (backbone_path, logits_path):
        cpu, gpu = (safetensors.torch.load_file(place(run.path, probe)) for run in runs)
        for name in cpu:
            torch.testing.assert_close(
                gpu[name], cpu[name], rtol=near, atol=near, msg=lambda text, name=name: f"{name}: {text}"
            )
