"""The dry run: what it says is what training then does, and it writes nothing."""

import pytest
import torch
import yaml
from folders import tree_hash
from grids import GRID
from parts import Head
from torch.utils.flop_counter import FlopCounterMode

import featcache
from featcache.errors import BadInput
from featcache.probes.engine.waves import blocks_by_input
from featcache.probes.grids.grid import load_grid
from featcache.probes.heads.module import HeadModule
from featcache.probes.plan import gemm_rate, plan_probes
from featcache.probes.resolve import resolve
from featcache.probes.weights import initial_weights


def test_stacks_of_a_grid(store):
    probes = [*GRID["probes"], {**GRID["probes"][0], "epochs": 7, "seed": 0}]
    plan = plan_probes({"probes": probes}, store=store, device="cpu")
    assert plan.probes == 8 + 1 + 4 and plan.groups == [("lin", 12), ("mlp", 1)] and plan.rows == 40
    assert [(s.features, s.head.type, s.loss, s.optimizer, s.epochs, s.batch_size, s.probes, s.blocks) for s in plan.stacks] == [
        ("layer4:pooled", "linear", {"bce": 4, "ce": 4}, "sgd", 4, 16, 8, 1),
        ("layer4:pooled", "linear", {"bce": 2, "ce": 2}, "sgd", 7, 16, 4, 1),
        ("layer4:spatial", "mlp", {"bce": 1}, "adam", 2, 16, 1, 1),
    ]  # fmt: skip
    linear, _, mlp = plan.stacks
    classes = len(featcache.open_store(store).classes)
    assert linear.flops == 8 * 4 * 40 * 4 * 512 * classes
    assert linear.feature_bytes == 40 * 512 * 4 and mlp.feature_bytes == 40 * 512 * 4 * 4
    weights = 8 * 512 + 8 + 2 * 2 * 8 + classes * 8 + classes - 8  # batch norm follows the first layer: no bias
    assert mlp.weight_bytes == 4 * 4 * weights, "weights, gradients and two moments"
    assert all(s.seconds > 0 and not s.streamed for s in plan.stacks)
    assert plan.seconds == pytest.approx(sum(s.seconds for s in plan.stacks))
    assert max(s.feature_bytes for s in plan.stacks) < plan.memory < plan.free


def test_stacks_are_those_that_train(store):
    """Whatever keeps probes apart in training keeps them apart here: the sweep's blocks are counted by their keys."""
    base = {"features": "pooled", "head": "linear", "loss": "bce", "epochs": 2, "batch_size": 16}
    sgd = base | {"optimizer": {"type": "sgd", "lr": [0.1, 1.0]}}
    groups = [
        sgd | {"name": "f", "precision": ["float32", "bf16"]},
        sgd | {"name": "k", "keep": "best"},
        sgd | {"name": "p", "patience": 1},
        sgd | {"name": "n", "optimizer": {"type": "sgd", "lr": [0.1, 1.0], "nesterov": True}},
        base | {"name": "l", "optimizer": {"type": "lbfgs", "weight_decay": [0.1, 1.0], "iterations": [10, 1000]}},
    ]
    plan = plan_probes({"probes": groups}, store=store, device="cpu")
    assert [(s.optimizer, s.precision, s.probes, s.blocks) for s in plan.stacks] == [
        ("sgd", "float32", 2, 1),
        ("sgd", "bf16", 2, 1),
        ("sgd", "float32", 2, 1),
        ("sgd", "float32", 2, 1),
        ("sgd", "float32", 2, 1),
        ("lbfgs", "float32", 2, 1),
        ("lbfgs", "float32", 2, 1),
    ]
    opened = featcache.open_store(store)
    found = resolve(load_grid({"probes": groups}), opened, torch.device("cpu"))
    ((_, trained),) = blocks_by_input(found.specs, opened, torch.device("cpu"))
    assert [[len(block) for block in trained]] == [[s.probes for s in plan.stacks]]
    few, many = plan.stacks[-2:]
    assert many.flops == few.flops, "both end when they have converged"


def test_what_does_not_fit_is_streamed(store):
    plan = plan_probes(GRID, store=store, device="cpu", memory=200_000)
    assert [s.streamed for s in plan.stacks] == [False, True]


@pytest.mark.parametrize(
    "head",
    [
        Head("linear", bias=False),
        Head("mlp", layers=2, hidden=32, norm="bnu"),
        Head("mlp", layers=3, hidden=32, norm="none"),
        Head("bcos", layers=1, bias=False, b=2.0, max_out=2),
        Head("bcos", layers=3, hidden=32, norm="bnu", bias=False, b=2.0),
    ],
    ids=lambda h: f"{h.type}-{h.depth}",
)
def test_operations_are_those_of_the_layers(head):
    """Against torch's own count over the trained head as a module, pooled before the last layer of an MLP."""
    dim, side, classes = 24, 3, 5
    positions = 1 if head.type == "linear" else side * side
    spec = type("Spec", (), {"head": head, "seed": 0})
    module = HeadModule(spec.head, initial_weights(spec, dim, classes)).requires_grad_(True)
    if head.type == "mlp":
        last = module.layers[f"fc{head.depth - 1}"]
        last.register_forward_pre_hook(lambda _, maps: maps[0].mean((2, 3), keepdim=True))
    counter = FlopCounterMode(display=False)
    with counter:
        module(torch.randn(1, dim, *([1, 1] if positions == 1 else [side, side]))).sum().backward()
    assert head.flops(dim, classes, positions) == counter.get_total_flops()


def test_the_rate_is_about_that_of_the_device():
    big = gemm_rate(1024, 1024, 1024, "float32", torch.device("cpu"))
    small = gemm_rate(8, 8, 8, "float32", torch.device("cpu"))
    assert 0 < small < big < 1e15


def test_dry_run(store, tmp_path, command, monkeypatch):
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(GRID))
    monkeypatch.chdir(tmp_path)
    before = tree_hash(tmp_path)
    code, out, _ = command("train-probes", "--grid", "g.yaml", "--store", store, "--dry-run")
    assert code == 0 and "9 probes in 2 stacks on 40 images" in out and "nothing was written" in out
    assert "4 bce, 4 ce" in out and "mlp-2 (8)" in out and "about" in out
    for words in ([], ["--store", "nowhere.zarr"]):
        code, out, _ = command("train-probes", "--grid", "g.yaml", *words, "--dry-run")
        assert code == 0 and "9 probes; no stacks, memory or time without a store" in out
        assert ("store not found: nowhere.zarr" in out) == bool(words)
    assert tree_hash(tmp_path) == before and not (tmp_path / "runs").exists()


def test_what_would_not_train_is_refused(store, command, tmp_path):
    with pytest.raises(BadInput, match="the store holds no feature 'layer2:pooled'"):
        plan_probes({"probes": [GRID["probes"][0] | {"features": "layer2:pooled"}]}, store=store)
    (tmp_path / "g.yaml").write_text("probes: 3")
    code, _, err = command("train-probes", "--grid", tmp_path / "g.yaml", "--dry-run")
    assert code == 2 and "probes: expected a list of at least one group" in err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"select": {"metric": "top1"}}, "select.metric: 'top1' does not fit multi-label labels"),
        ({"precision": "tf32"}, "tf32 is of NVIDIA GPUs"),
        ({"search": "halving", "optimizer": "lbfgs"}, "the optimizer lbfgs has none"),
    ],
)
def test_what_training_refuses_is_refused_before(store, change, message):
    top = {key: change[key] for key in ("select", "search") if key in change}
    group = {"features": "pooled", "head": "linear", "loss": "bce", "epochs": 1, "optimizer": {"type": "sgd", "lr": 1}}
    group |= {key: change[key] for key in ("precision", "optimizer") if key in change}
    with pytest.raises(BadInput, match=message):
        plan_probes(top | {"probes": [group]}, store=store, device="cpu")
