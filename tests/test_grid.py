"""Grids: what they expand to, and every error by its YAML path."""

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import BadInput
from featcache.probes.grid import parse_grid, read_grid
from featcache.probes.spec import spec_from_dict

BASE = {"features": "pooled", "head": "linear", "loss": "bce", "optimizer": {"type": "sgd", "lr": 0.1}, "epochs": 2}


def grid(**changes):
    return {"probes": [BASE | changes]}


def test_lists_multiply_in_every_field():
    specs = parse_grid(
        grid(
            features=["pooled", "layer3:pooled"],
            head={"type": "linear", "bias": [True, False]},
            loss=["bce", {"type": "ce"}],
            optimizer=[
                {"type": "sgd", "lr": {"log": [0.01, 1, 3]}, "weight_decay": [0, 1e-4]},
                {"type": "adam", "lr": 1e-3},
            ],
            schedule=["cosine", {"type": "step", "milestones": [[0.6, 0.8], [5]], "gamma": 0.1}],
            epochs=[2, 10],
            seed=[0, 1],
        )
    ).specs
    assert len(specs) == 2 * 2 * 2 * (3 * 2 + 1) * 3 * 2 * 2
    assert len({s.id for s in specs}) == len(specs)
    assert {s.optimizer.lr for s in specs} == {0.01, 0.1, 1.0, 1e-3}
    assert {s.schedule.milestones for s in specs} == {(), (0.6, 0.8), (5.0,)}


def test_numbers_that_yaml_reads_as_text():
    content = yaml.safe_load(
        "probes: [{features: pooled, head: linear, loss: ce, epochs: 3, optimizer: {type: sgd, lr: [1e-3, 2e-3]}}]"
    )
    assert content["probes"][0]["optimizer"]["lr"] == ["1e-3", "2e-3"], "the trap is there"
    assert [s.optimizer.lr for s in parse_grid(content).specs] == [1e-3, 2e-3]


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.integers(2, 50))
def test_log_ranges_keep_their_ends(low, high, count):
    if abs(low - high) < 1e-3 * low:
        return
    rates = [
        s.optimizer.lr for s in parse_grid(grid(optimizer={"type": "sgd", "lr": {"log": [low, high, count]}})).specs
    ]
    assert len(rates) == count
    assert rates[0] == pytest.approx(low, rel=1e-5) and rates[-1] == pytest.approx(high, rel=1e-5)
    steps = [b / a for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-4)


def test_ids_depend_on_all_but_the_name():
    one, other = (parse_grid(grid(name=n)).specs[0] for n in ("a", "b"))
    assert one.id == other.id
    changes = [
        {"loss": "ce"},
        {"epochs": 3},
        {"seed": 1},
        {"batch_size": 32},
        {"schedule": "cosine"},
        {"features": "layer3:pooled"},
    ]
    changes += [{"optimizer": {"type": "sgd", "lr": 0.1 + 1e-12}}, {"head": {"type": "linear", "bias": False}}]
    assert len({one.id, *(parse_grid(grid(**c)).specs[0].id for c in changes)}) == 1 + len(changes)


def test_specs_survive_json():
    import json
    from dataclasses import asdict

    for spec in parse_grid(
        grid(schedule=["cosine", {"type": "step", "milestones": [3]}], head=["linear", "mlp"])
    ).specs:
        assert spec_from_dict(json.loads(json.dumps(asdict(spec)))) == spec


ERRORS = [
    (grid(learning_rat=1), "probes[0].learning_rat: unknown field"),
    (grid(batchsize=1), "probes[0].batchsize: unknown field; did you mean 'batch_size'?"),
    (grid(optimizer={"type": "sgd", "learning": 1}), "probes[0].optimizer.learning: unknown field"),
    (grid(optimizer={"type": "sgd"}), "probes[0].optimizer.lr: missing"),
    (grid(optimizer={"type": "sgdd", "lr": 1}), "probes[0].optimizer.type: 'sgdd' is not one of sgd, adam, adamw, lars, lbfgs; did you mean 'sgd'?"),
    (grid(optimizer={"type": "sgd", "lr": 0}), "probes[0].optimizer.lr: 0 is not a number above 0"),
    (grid(optimizer={"type": "sgd", "lr": -1}), "probes[0].optimizer.lr: -1 is not a number above 0"),
    (grid(optimizer={"type": "sgd", "lr": [0.1, "fast"]}), "probes[0].optimizer.lr[1]: 'fast' is not a number above 0"),
    (grid(optimizer={"type": "sgd", "lr": float("nan")}), "probes[0].optimizer.lr: nan is not a number"),
    (grid(optimizer={"type": "sgd", "lr": float("inf")}), "probes[0].optimizer.lr: inf is not a number"),
    (grid(optimizer={"type": "sgd", "lr": True}), "probes[0].optimizer.lr: True is not a number"),
    (grid(optimizer={"type": "sgd", "lr": {"log": [1, 2]}}), "probes[0].optimizer.lr: expected a number, a list, or log:"),
    (grid(optimizer={"type": "sgd", "lr": {"log": [0, 2, 3]}}), "probes[0].optimizer.lr: expected"),
    (grid(optimizer={"type": "sgd", "lr": 1, "momentum": 1}), "probes[0].optimizer.momentum: 1 is not a number of at least 0 and at most 0.9999"),
    (grid(optimizer={"type": "sgd", "lr": 1, "weight_decay": -1e-4}), "probes[0].optimizer.weight_decay: -0.0001"),
    (grid(epochs=0), "probes[0].epochs: 0 is not a whole number of at least 1"),
    (grid(epochs=1.5), "probes[0].epochs: 1.5 is not a whole number"),
    (grid(seed=[]), "probes[0].seed: an empty list leaves no probe"),
    (grid(loss=[]), "probes[0].loss: an empty list leaves no probe"),
    (grid(head="lineer"), "probes[0].head: 'lineer' is not one of linear, mlp, bcos, attentive; did you mean 'linear'?"),
    (grid(head=["linear", "x"]), "probes[0].head[1]: 'x' is not one of"),
    (grid(head={"type": "linear", "hidden": 4}), "probes[0].head.hidden: unknown field"),
    (grid(head={"type": "linear", "bias": "yes"}), "probes[0].head.bias: 'yes' is not one of True, False"),
    (grid(schedule={"type": "step", "milestones": [8, 6]}), "probes[0].schedule.milestones: [8, 6] is not a rising list"),
    (grid(schedule={"type": "step", "milestones": 6}), "probes[0].schedule.milestones: 6 is not a list"),
    (grid(schedule={"type": "step"}), "probes[0]: schedule: a step needs either milestones or every"),
    (grid(seed=[0, 0]), "probes[0]: repeats a probe of probes[0]"),
    ({"probes": [BASE, BASE]}, "probes[1]: repeats a probe of probes[0]"),
    ({"probes": []}, "probes: expected a list of at least one group"),
    ({"probes": ["x"]}, "probes[0]: expected a group of fields"),
    ({"prbes": [BASE]}, "prbes: unknown field; did you mean 'probes'?"),
    (grid() | {"splits": {"trian": "train"}}, "splits.trian: unknown field; did you mean 'train'?"),
    (grid() | {"splits": {"train": ["a", "test"]}}, "splits.test: 'test' is in splits.train too"),
    (grid() | {"select": {"split": "test"}}, "select.split: choosing on test"),
    (grid() | {"select": {"metric": "mapp"}}, "select.metric: 'mapp' is not one of map, top1, top5; did you mean 'map'?"),
    (grid() | {"store": 3}, "store: 3 is not a path"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), ERRORS, ids=[m[:60] for _, m in ERRORS])
def test_errors_name_the_path(content, message):
    with pytest.raises(BadInput) as caught:
        parse_grid(content, "g.yaml")
    assert message in caught.value.message and "g.yaml" in caught.value.message
    assert caught.value.exit_code == 2


def test_all_errors_at_once():
    with pytest.raises(BadInput) as caught:
        parse_grid(grid(epochs=0, loss="x", optimizer={"type": "sgd", "lr": -1}))
    assert caught.value.message.startswith("grid grid has 3 errors:")
    assert len(caught.value.message.split("\n")) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("probes: [", "line"),
        ("probes: !!python/object:os.system [x]", "line 1"),
        ("probes: 1\nprobes: 2", "key 'probes' is given twice"),
        ("- 1", "expected fields"),
        ("", "expected fields"),
    ],
)
def test_broken_yaml(tmp_path, text, message):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read_grid(tmp_path / "g.yaml")
    assert "g.yaml" in caught.value.message


def test_unreadable_grids(tmp_path):
    with pytest.raises(BadInput, match="grid not found"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("# caf\xe9".encode("latin-1"))
    with pytest.raises(BadInput, match="cannot read grid .*latin.yaml"):
        read_grid(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("pipelines/*/*.yaml")), ids=lambda p: p.parent.name
)
def test_recipes_are_grids(path):
    assert len(read_grid(path).specs) > 10
