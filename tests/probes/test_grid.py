"""Grids: what they expand to, and every error by its YAML path."""

import copy
import itertools
import re

import pytest
import yaml
from folders import CHECKOUT
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import BadInput
from featcache.probes.grids.grid import parse_grid, read_grid
from featcache.probes.spec import spec_from_dict, spec_to_dict

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
    assert {getattr(s.schedule, "milestones", ()) for s in specs} == {(), (0.6, 0.8), (5.0,)}


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

    for spec in parse_grid(
        grid(schedule=["cosine", {"type": "step", "milestones": [3]}], head=["linear", "mlp"])
    ).specs:
        assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


ERRORS = [
    (grid(learning_rat=1), "probes[0].learning_rat: unknown field"),
    (grid(batchsize=1), "probes[0].batchsize: unknown field; did you mean 'batch_size'?"),
    (grid(optimizer={"type": "sgd", "learning": 1}), "probes[0].optimizer.learning: unknown field"),
    (grid(optimizer={"type": "sgd"}), "probes[0].optimizer.lr: missing"),
    (grid(optimizer={"type": "sgdd", "lr": 1}), "probes[0].optimizer.type: 'sgdd' is not one of sgd, adam, adamw, lars, lamb, lbfgs, svm, none; did you mean 'sgd'?"),
    (grid(optimizer={"type": "sgd", "lr": 0}), "probes[0].optimizer.lr: 0 is not a number above 0"),
    (grid(optimizer={"type": "sgd", "lr": -1}), "probes[0].optimizer.lr: -1 is not a number above 0"),
    (grid(optimizer={"type": "sgd", "lr": [0.1, "fast"]}), "probes[0].optimizer.lr[1]: 'fast' is not a number above 0"),
    (grid(optimizer={"type": "sgd", "lr": float("nan")}), "probes[0].optimizer.lr: nan is not a number"),
    (grid(optimizer={"type": "sgd", "lr": float("inf")}), "probes[0].optimizer.lr: inf is not a number"),
    (grid(optimizer={"type": "sgd", "lr": True}), "probes[0].optimizer.lr: True is not a number"),
    (grid(optimizer={"type": "sgd", "lr": {"log": [1, 2]}}), "probes[0].optimizer.lr.log: expected [lowest, highest, how many], not [1, 2]"),
    (grid(optimizer={"type": "sgd", "lr": {"log": [0, 2, 3]}}), "probes[0].optimizer.lr.log: expected [lowest, highest, how many], with lowest and highest above 0"),
    (grid(optimizer={"type": "sgd", "lr": 1, "momentum": 1}), "probes[0].optimizer.momentum: 1 is not a number of at least 0 and at most 0.9999"),
    (grid(optimizer={"type": "sgd", "lr": 1, "weight_decay": -1e-4}), "probes[0].optimizer.weight_decay: -0.0001"),
    (grid(epochs=0), "probes[0].epochs: 0 is not a whole number of at least 1"),
    (grid(epochs=1.5), "probes[0].epochs: 1.5 is not a whole number"),
    (grid(seed=[]), "probes[0].seed: an empty list leaves no probe"),
    (grid(loss=[]), "probes[0].loss: an empty list leaves no probe"),
    (grid(head="lineer"), "probes[0].head: 'lineer' is not one of linear, bn_linear, mlp, bcos, attentive, efficient, knn; did you mean 'linear'?"),
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
    (grid() | {"select": {"metric": "mapp"}}, "select.metric: 'mapp' is not one of map, precision_macro"),
    (grid() | {"store": 3}, "store: 3 is not a path"),
    (grid(epochs=10**400), "probes[0].epochs: 1000"),
    (grid(epochs={"linspace": [1, 2, 1]}), "probes[0].epochs.linspace: how many must be a whole number from 2 to 10000, not 1"),
    (grid(epochs={"linspace": [1, "x", 3]}), "probes[0].epochs.linspace: expected [lowest, highest, how many]"),
    (grid(epochs={"log": [1, 2, 3], "x": 1}), "probes[0].epochs: expected a number, a list, or one of the ranges log, linspace,"),
    (grid(epochs={"lgo": [1, 2, 3]}), "choice; did you mean 'log'?"),
    (grid(views="al"), "or all; did you mean 'all'?"),
    (grid(epochs={"choice": []}), "probes[0].epochs.choice: expected a list of values"),
    (grid(epochs={"choice": [1, 0]}), "probes[0].epochs.choice[1]: 0 is not a whole number of at least 1"),
    (grid(epochs={"uniform": [1, 5]}), "probes[0].epochs.uniform: is drawn from; say how often, with random:"),
    (grid(epochs={"uniform": [5, 1]}, random={"n": 2}), "probes[0].epochs.uniform: [5, 1] is not [lowest, highest]"),
    (grid(epochs={"uniform": [0, 5]}, random={"n": 2}), "probes[0].epochs: 0.0 is not a whole number of at least 1"),
    (grid(loss={"choice": ["ce", "bcee"]}, random={"n": 1}), "probes[0].loss.choice[1]: 'bcee' is not one of bce, ce"),
    (grid(random={"n": 2}), "probes[0].random.n: 2 draws asked for, and only 1 differ"),
    (grid(random={"m": 2}), "probes[0].random.m: unknown field"),
    (grid(random=3), "probes[0].random: expected n, how many to draw, and seed"),
    (grid(random={"n": [2, 3]}), "probes[0].random.n: expected one value, not several"),
    (grid(keep="bset"), "probes[0].keep: 'bset' is not one of last, best; did you mean 'best'?"),
    (grid(patience=-1), "probes[0].patience: -1 is not a whole number of at least 0"),
    (grid(precision="fp16"), "probes[0].precision: 'fp16' is not one of float32, tf32, bf16"),
    (grid(schedule={"type": "step", "milestones": "68"}), "probes[0].schedule.milestones: '68' is not a list"),
    (grid() | {"search": "halfing"}, "search: 'halfing' is not one of halving; did you mean 'halving'?"),
    (grid() | {"search": {"type": "halving", "factor": 1}}, "search.factor: 1 is not a number above 1"),
    (grid() | {"search": {"type": "halving", "first": [0.1, 0.2]}}, "search: expected one value for each field"),
    (grid(**{"from": "x"}), "probes[0].from: no group is called 'x'"),
    ({"probes": [BASE | {"name": "base"}, {"from": "bse", "seed": 1}]}, "probes[1].from: no group is called 'bse'; did you mean 'base'?"),
    ({"probes": [BASE | {"name": "a"}, BASE | {"name": "a"}, {"from": "a"}]}, "probes[2].from: 2 groups are called 'a'"),
    ({"probes": [{"name": "a", "from": "b"}, {"name": "b", "from": "a"}]}, "starts from itself"),
    (grid() | {"include": 3}, "include: 3 is not the path of a file"),
    (grid() | {"include": ["none.yaml"]}, "include[0]: grid not found: none.yaml"),
    (grid() | {"exclude": {"loss": "ce"}}, "exclude: expected a list of at least one rule"),
    (grid() | {"exclude": [{}]}, "exclude[0]: expected some fields of the probes that are meant"),
    (grid() | {"exclude": [{"loss": "ce"}]}, "exclude[0]: drops no probe"),
    (grid() | {"exclude": [{"loss.gamma": 0}]}, "exclude[0]: drops no probe"),
    (grid() | {"exclude": [{"head.norm": "l2"}]}, "exclude[0]: drops no probe"),
    (grid() | {"splits": {"test": ["a", "a"]}}, "splits.test: names a split twice"),
    (grid(features="poold"), "probes[0].features: feature 'poold': 'poold' is not one of"),
    (grid(optimizer="lbfgs", views=0, patience=2), "optimizer lbfgs has no epochs to choose from"),
    (grid() | {"exclude": [{"loss": "bce"}]}, "exclude[0]: leaves no probe of the grid"),
    (grid() | {"exclude": [{"optimizer.lrr": 1}]}, "exclude[0].optimizer.lrr: unknown field; did you mean 'optimizer.lr'?"),
    (grid() | {"exclude": [{"loss": {"tpye": "ce"}}]}, "exclude[0].loss.tpye: unknown field; did you mean 'type'?"),
    (grid() | {"parity": "x"}, "parity: the grid has no profile 'x' (it has none)"),
    (grid() | {"profiles": {"p": {"chagne": []}}}, "profiles.p.chagne: unknown field; did you mean 'change'?"),
    (grid() | {"profiles": {"p": {"exclude": [{"loss": "ce"}]}}}, "profiles.p.exclude[0]: drops no probe"),
    (grid() | {"profiles": {"p": {"exclude": {"loss": "ce"}}}}, "profiles.p.exclude: expected a list of at least one rule"),
    (grid() | {"profiles": {"p": {"select": {"split": "vla"}}}}, "profiles.p.select.split: 'vla' is not one of"),
    (grid() | {"profiles": {"p": {"splits": {"train": "test"}}}}, "profiles.p.splits.test: 'test' is in splits.train too"),
    (grid() | {"profiles": {"p": {"change": [{"where": {"loss": "ce"}, "set": {"epochs": 3}}]}}}, "profiles.p.change[0].where: no probe has these values"),
    (grid() | {"profiles": {"p": {"change": [{"set": {"epochs": 0}}]}}}, "profiles.p.change[0].set.epochs: 0 is not a whole number"),
    (grid() | {"profiles": {"p": {"change": [{"set": {"epochs": [1, 2]}}]}}}, "profiles.p.change[0].set.epochs: expected one value, not several"),
    (grid() | {"profiles": {"p": {"change": [{"set": {"head": {"hidden": 3}}}]}}}, "profiles.p.change[0].set.head.hidden: unknown field"),
    (grid(seed=[0, 1]) | {"profiles": {"p": {"change": [{"set": {"seed": 2}}]}}}, "profiles.p.change: makes two probes the same"),
    (grid() | {"splits": {"val": "test"}}, "splits.test: 'test' is in splits.val too"),
    (grid(seed={"linspace": [0, 1000, 1001]}, epochs={"linspace": [1, 1000, 1000]}), "probes[0]: 1,001,000 combinations; a grid has at most 100,000 probes"),
    (grid(head={"type": "bcos", "hidden": {"linspace": [1, 1000, 1000]}, "b": {"linspace": [1, 2, 1000]}}), "probes[0].head: 1,000,000 combinations"),
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
    assert caught.value.message.startswith("grid has 3 errors:")
    assert len(caught.value.message.split("\n")) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("probes: [", "line"),
        ("probes: !!python/object:os.system [x]", "line 1"),
        ("probes: 1\nprobes: 2", "key 'probes' is given twice"),
        ("probes: [{a: 1, a: 2}]", "key 'a' is given twice"),
        ("probes: [{epochs: 010}]", "line 1, column 19: YAML takes 010 for a number of base 8 or 60"),
        ("probes: [{batch_size: 1:30}]", "takes 1:30 for a number of base 8 or 60"),
        ("- 1", "expected fields"),
        ("", "expected fields"),
        ("probes: 2001-02-30", "line 1, column 9: '2001-02-30' is not what YAML calls timestamp"),
        ("probes: !!int x", "'x' is not what YAML calls int"),
        ("probes: !!python/object/apply:os.system [x]", "could not determine a constructor for the tag"),
        ("probes: &a [*a]", "an alias refers to what it stands in"),
        ("probes: " + "[" * 1000, "nested too deeply"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in itertools.pairwise("abcdefg")),
            "more than 1,000,000 values",
        ),
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
    with pytest.raises(BadInput, match="cannot read grid .*latin.yaml: byte 5 is not UTF-8"):
        read_grid(tmp_path / "latin.yaml")
    with pytest.raises(BadInput, match="cannot read grid"):
        read_grid(tmp_path)


def rates(**group):
    """The learning rates of a grid of one group."""
    return [s.optimizer.lr for s in parse_grid(grid(**group)).specs]


def test_ranges():
    assert rates(optimizer={"type": "sgd", "lr": {"linspace": [0.1, 0.5, 5]}}) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert rates(optimizer={"type": "sgd", "lr": {"choice": ["1e-1", 2]}}) == [0.1, 2]
    widths = parse_grid(grid(features="spatial", head={"type": "mlp", "hidden": {"log": [64, 2048, 6]}})).specs
    assert [s.head.hidden for s in widths] == [64, 128, 256, 512, 1024, 2048]
    sections = parse_grid(grid(loss={"choice": ["ce", {"type": "bce", "off_label": [0, "1/C"]}]})).specs
    assert [(s.loss.type, getattr(s.loss, "off_label", 0)) for s in sections] == [("ce", 0), ("bce", 0), ("bce", "1/C")]
    assert parse_grid(grid(seed=2**63 - 1)).specs[0].seed == 2**63 - 1, "no rounding to a float on the way"


def test_random_search_draws_the_same_numbers_everywhere():
    sgd = {"type": "sgd", "lr": {"loguniform": [1e-3, 10]}, "momentum": {"uniform": [0, 0.9]}}
    group = {"optimizer": sgd, "epochs": {"uniform": [1, 3]}, "loss": {"choice": ["ce", "bce"]}, "random": {"n": 4}}
    specs = parse_grid(grid(**group)).specs
    # Pinned: sha256 of seed, draw and field.
    assert [(s.optimizer.lr, s.optimizer.momentum, s.epochs, s.loss.type) for s in specs] == [
        (0.519974, 0.840893, 3, "bce"),
        (0.136957, 0.702296, 2, "bce"),
        (0.418212, 0.380024, 3, "ce"),
        (4.78148, 0.0581361, 2, "ce"),
    ]
    # Of the draws nothing changes when the group draws less, and nothing stays under another seed.
    fewer = parse_grid(grid(**group | {"loss": "ce", "seed": [0, 1]})).specs
    assert (
        [s.optimizer.lr for s in fewer[::2]] == [s.optimizer.lr for s in fewer[1::2]] == [s.optimizer.lr for s in specs]
    )
    other = parse_grid(grid(**group | {"random": {"n": 4, "seed": 1}})).specs
    assert not {s.optimizer.lr for s in other} & {s.optimizer.lr for s in specs}


@settings(deadline=None, max_examples=40)
@given(
    st.floats(1e-6, 1e3),
    st.floats(2, 1e4),
    st.integers(1, 20),
    st.integers(0, 2**63 - 1),
    st.integers(1, 9),
    st.booleans(),
)
def test_random_search_stays_in_its_ranges(low, ratio, count, seed, epochs, logarithmic):
    high = low * ratio + 1e-3
    kind = "loguniform" if logarithmic else "uniform"
    group = {
        "optimizer": {"type": "sgd", "lr": {kind: [low, high]}},
        "epochs": {kind: [epochs, epochs + 5]},
        "seed": [0, 1],
        "random": {"n": count, "seed": seed},
    }
    grid_, again = parse_grid(grid(**group)), parse_grid(grid(**group))
    assert grid_.specs == again.specs and len(set(grid_.specs)) == 2 * count
    assert all(low <= s.optimizer.lr <= high and epochs <= s.epochs <= epochs + 5 for s in grid_.specs)
    assert all(isinstance(s.epochs, int) for s in grid_.specs)


def test_a_search_of_every_choice_finds_them_all():
    group = grid(epochs={"choice": list(range(1, 21))}, random={"n": 20})
    assert sorted(s.epochs for s in parse_grid(group).specs) == list(range(1, 21))


def test_what_a_search_does_not_draw_multiplies_it():
    head = {"type": "mlp", "hidden": {"linspace": [1, 1500, 1500]}}
    specs = parse_grid(grid(features="spatial", head=head, epochs={"uniform": [1, 9]}, random={"n": 2})).specs
    assert len(specs) == 3000 and len({s.head.hidden for s in specs}) == 1500 and len({s.epochs for s in specs}) == 2


def test_groups_that_start_from_others():
    base = BASE | {"name": "base", "optimizer": {"type": "sgd", "lr": [0.1, 0.2], "momentum": 0.5}}
    groups = [
        {"name": "last", "from": "middle", "loss": "ce"},
        {"name": "middle", "from": "base", "optimizer": {"lr": 3}},
        base,
        {"from": "base", "optimizer": {"type": "adam", "lr": 1}},
    ]
    checked = parse_grid({"probes": groups})
    assert [(s.name, s.loss.type, s.optimizer.type, s.optimizer.lr, getattr(s.optimizer, "momentum", 0)) for s in checked.specs] == [
        ("last", "ce", "sgd", 3, 0.5), ("middle", "bce", "sgd", 3, 0.5), ("base", "bce", "sgd", 0.1, 0.5),
        ("base", "bce", "sgd", 0.2, 0.5), ("base", "bce", "adam", 1, 0),
    ]  # fmt: skip
    assert parse_grid(checked.content).specs == checked.specs, "the content needs no other groups"
    several = [
        BASE | {"name": "a", "head": ["linear", {"type": "mlp"}], "features": "spatial"},
        {"from": "a", "head": {"bias": False}},
    ]
    assert [(s.head.type, s.head.bias) for s in parse_grid({"probes": several}).specs][2:] == [
        ("linear", False),
        ("mlp", False),
    ]


def test_an_error_is_told_once_and_where_it_stands():
    groups = [
        BASE | {"name": "a", "epochs": 0},
        {"name": "b", "from": "a", "seed": 1},
        {"name": "c", "from": "b", "optimizer": {"momentun": 0.5}},
        {"name": "d", "from": "c", "seed": 2},
    ]
    with pytest.raises(BadInput) as caught:
        parse_grid({"probes": groups})
    first, *lines = caught.value.message.split("\n  ")
    assert first.endswith("has 2 errors:") and lines[0].startswith("probes[0].epochs: 0")
    assert lines[1].startswith("probes[2].optimizer.momentun: unknown field; did you mean 'momentum'?")


def test_included_files(tmp_path):
    (tmp_path / "deep").mkdir()
    write = lambda name, content: (tmp_path / name).write_text(yaml.safe_dump(content))  # noqa: E731
    write("deep/base.yaml", {"select": {"metric": "top1"}, "store": "a.zarr", "probes": [BASE | {"name": "base"}]})
    write("deep/more.yaml", {"include": ["base.yaml"], "store": "b.zarr", "exclude": [{"seed": 3}],
                             "probes": [{"name": "more", "from": "base", "seed": [1, 3]}]})  # fmt: skip
    write("top.yaml", {"include": "deep/more.yaml", "store": "c.zarr", "exclude": [{"seed": 5}],
                       "probes": [{"name": "top", "from": "more", "seed": [4, 5]}]})  # fmt: skip
    checked = read_grid(tmp_path / "top.yaml")
    assert [(s.name, s.seed) for s in checked.specs] == [("top", 4), ("more", 1), ("base", 0)]
    assert (checked.metric, checked.store) == ("top1", "c.zarr")
    assert parse_grid(checked.content, "elsewhere/g.yaml").specs == checked.specs, "the content needs no other files"

    write("deep/base.yaml", {"probes": [BASE | {"name": "base", "epochs": 0}], "selekt": {}})
    with pytest.raises(BadInput) as caught:
        read_grid(tmp_path / "top.yaml")
    assert "base.yaml: probes[0].epochs: 0 is not" in caught.value.message
    assert "base.yaml: selekt: unknown field; did you mean 'select'?" in caught.value.message
    assert caught.value.message.count("epochs") == 1, "once, though two groups start from it"
    write("deep/base.yaml", {"include": "../top.yaml"})
    with pytest.raises(BadInput, match=r"base.yaml: include: ../top.yaml includes itself through other files"):
        read_grid(tmp_path / "top.yaml")
    write("self.yaml", {"include": "self.yaml"})
    with pytest.raises(BadInput, match=r"include: self.yaml includes itself$"):
        read_grid(tmp_path / "self.yaml")
    (tmp_path / "deep/base.yaml").write_text("[")
    with pytest.raises(BadInput, match=r"more.yaml: include\[0\]: grid .*base.yaml, line 1"):
        read_grid(tmp_path / "top.yaml")


def test_rules_read_values_as_they_are_written():
    cosine = {"type": "cosine", "per": ["step", "epoch"]}
    for rule, left in (({"schedule.per": "step"}, "epoch"), ({"schedule.per": "epoch"}, "step")):
        (spec,) = parse_grid(grid(schedule=cosine) | {"exclude": [rule]}).specs
        assert spec.schedule.per == left
    (spec,) = parse_grid(grid(views=["all", 0]) | {"exclude": [{"views": "all"}]}).specs
    assert spec.views == 0


def test_exclude():
    group = grid(features=["pooled", "last:pooled"], loss=["bce", "ce"], head=["linear", {"type": "mlp", "pool": "before"}],
                 optimizer={"type": "sgd", "lr": [1, 30]}, schedule={"type": "step", "milestones": [[60, 80], [30]]})  # fmt: skip
    everything = parse_grid(group).specs

    def left(*rules):
        return set(parse_grid(group | {"exclude": list(rules)}).specs)

    for rules, dropped in (
        ([{"head": {"type": "mlp"}, "loss": {"type": "ce"}}], lambda s: s.head.type == "mlp" and s.loss.type == "ce"),
        ([{"head": "mlp", "loss": "ce"}], lambda s: s.head.type == "mlp" and s.loss.type == "ce"),
        (
            [{"optimizer.lr": "3e1", "features": "last:pooled"}],
            lambda s: s.optimizer.lr == 30 and s.features != "pooled",
        ),
        ([{"loss": ["ce", "focal"]}, {"optimizer.lr": 30}], lambda s: s.loss.type == "ce" or s.optimizer.lr == 30),
        ([{"schedule.milestones": [60, 80]}], lambda s: s.schedule.milestones == (60, 80)),
        ([{"head.bias": True, "seed": 0, "loss": "ce"}], lambda s: s.loss.type == "ce"),
    ):
        assert left(*rules) == {s for s in everything if not dropped(s)}


def test_profiles():
    content = grid(loss=["bce", "ce"], features="spatial", head=["linear", {"type": "mlp", "hidden": 7}]) | {
        "profiles": {"how-to-probe": {"splits": {"val": "test"}, "change": [
            {"where": {"head": "mlp"}, "set": {"head": {"norm": "bnu", "offset": "-ln(C-1)"}, "epochs": 9}},
            {"where": {"loss": "ce", "epochs": 9}, "set": {"optimizer": {"type": "adam", "lr": 1e-3}}},
        ]}},
    }  # fmt: skip
    default, parity = parse_grid(content), parse_grid(content, parity="how-to-probe")
    assert default.parity is None and default.splits["val"] == ("val",)
    assert parity.parity == "how-to-probe" and parity.splits["val"] == parity.splits["test"] == ("test",)
    shown = [
        (
            s.head.type,
            getattr(s.head, "hidden", 0),
            getattr(s.head, "norm", "none"),
            s.head.offset,
            s.epochs,
            s.optimizer.type,
        )
        for s in parity.specs
    ]
    assert sorted(set(shown)) == [
        ("linear", 0, "none", 0, 2, "sgd"), ("mlp", 7, "bnu", "-ln(C-1)", 9, "adam"), ("mlp", 7, "bnu", "-ln(C-1)", 9, "sgd"),
    ]  # fmt: skip
    assert parse_grid(parity.content).specs == parity.specs, "the content says which profile it is under"
    content["profiles"]["some"] = {
        "exclude": [{"loss": "ce"}],
        "select": {"split": "none"},
        "change": [{"set": {"epochs": 1}}],
    }
    some = parse_grid(content, parity="some")
    assert {spec.loss.type for spec in some.specs} == {"bce"} and len(some.groups) == len(some.specs) == 2
    assert some.reports_all and not default.reports_all and parse_grid(some.content).reports_all
    assert parse_grid(parity.content).splits == parity.splits
    assert parse_grid(default.content).specs == default.specs


def test_anchors_and_merge_keys(tmp_path):
    (tmp_path / "g.yaml").write_text("""
probes:
  - &base {features: pooled, head: linear, loss: bce, epochs: 2, optimizer: &o {type: sgd, lr: 0.1}}
  - &second {<<: *base, loss: ce, optimizer: {<<: *o, momentum: 0}}
  - {<<: *second, epochs: 3}
""")
    specs = read_grid(tmp_path / "g.yaml").specs
    assert [(s.loss.type, s.epochs, s.optimizer.lr, s.optimizer.momentum) for s in specs] == [
        ("bce", 2, 0.1, 0.9), ("ce", 2, 0.1, 0), ("ce", 3, 0.1, 0),
    ]  # fmt: skip


def test_halving_and_the_new_fields_of_groups():
    assert parse_grid(grid()).search is None
    search = parse_grid(grid() | {"search": "halving"}).search
    assert (search.type, search.factor, search.first) == ("halving", 3.0, 0.1)
    assert parse_grid(grid() | {"search": {"type": "halving", "factor": 2, "first": "2e-1"}}).search.first == 0.2
    specs = parse_grid(grid(keep=["last", "best"], patience=[0, 3], precision=["float32", "tf32", "bf16"])).specs
    assert len({s.id for s in specs}) == 12 and parse_grid(grid()).specs[0] in specs


RICH = yaml.safe_load("""
store: s.zarr
splits: {train: [train, val], val: test, test: test}
parity: old
select: {metric: map, split: val}
search: {type: halving, factor: 3}
probes:
  - name: a
    features: [pooled, last:pooled]
    head: {type: linear, bias: [true, false], offset: -ln(C-1)}
    loss: [bce, {type: ce}]
    optimizer: {type: sgd, lr: {log: [0.1, 10, 3]}, momentum: {linspace: [0, 0.9, 2]}}
    schedule: {type: step, milestones: [60, 80]}
    epochs: 100
  - {name: b, from: a, optimizer: {lr: 7}, head: {bias: false}}
  - {from: b, random: {n: 3, seed: 1}, optimizer: {type: adam, lr: {loguniform: [1, 2]}}, loss: {choice: [ce, bce]}}
exclude: [{loss: ce, optimizer.lr: 10}]
profiles: {old: {splits: {val: test}, change: [{where: {name: b}, set: {epochs: 3, head: {offset: 0}}}]}}
""")
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=4) | st.dates()
    | st.sampled_from(["type", "linear", "sgd", "a", "b", "old", "ce", "1e-3", "choice", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "lr", "log", "choice", "uniform", "from", "where", "set", "loss", "head", "n"]) | st.integers(0, 2),
        inner, max_size=2,
    ),
    max_leaves=4,
)  # fmt: skip


def places(value, at=()):
    """Paths of everything in a nest of dicts and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in parts for place in places(part, (*at, key)))]


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_any_change_to_a_grid_is_a_grid_or_a_clear_error(data):
    content = copy.deepcopy(RICH)
    for _ in range(data.draw(st.integers(1, 2))):
        *within, last = data.draw(st.sampled_from([p for p in places(content) if p]))
        parent = content
        for key in within:
            parent = parent[key]
        action = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "delete":
            del parent[last]
        elif action == "add" and isinstance(parent, dict):
            parent[data.draw(st.sampled_from(["type", "lr", "include", "from", "random", "exclude", "x", 3, None]))] = (
                data.draw(JUNK)
            )
        else:
            parent[last] = data.draw(JUNK)
        if not content:
            break
    try:
        checked = parse_grid(content)
    except BadInput as error:
        head, *lines = error.message.split("\n  ")
        for line in lines or [head.removeprefix("grid: ")]:
            assert re.match(
                r"(store|splits|select|search|probes|exclude|profiles|parity|include|type|lr|from|random|x|3|None)\b",
                line,
            ), line
        return
    assert checked.specs
    again = yaml.safe_load(yaml.safe_dump(checked.content))
    assert parse_grid(again).specs == checked.specs


@settings(deadline=None, max_examples=100)
@given(
    st.text(alphabet=st.sampled_from("abc:-&*!?<>|[]{},#%@'\"\\ \n\t01.~=\x00é"), max_size=60) | st.binary(max_size=40)
)
def test_any_file_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else b"probes: " + text.encode())
    with pytest.raises(BadInput) as caught:
        read_grid(path)
    assert "any.yaml" in caught.value.message


def test_the_valid_grid_of_the_mutations():
    assert len(parse_grid(RICH).specs) == 2 * 2 * (2 * 3 * 2 - 2) + 2 * 2 * 2 + 2 * 3


def test_groups_together_have_a_limit(monkeypatch):
    monkeypatch.setattr("featcache.probes.grids.expand.MOST_PROBES", 15)
    both = [BASE | {"seed": list(range(10))}, BASE | {"seed": list(range(10)), "epochs": 3}]
    with pytest.raises(BadInput, match=r"probes\[1\]: more than 15 probes; make several grids of them"):
        parse_grid({"probes": both})


def test_ten_thousand_probes_do_not_keep_one_waiting():
    import time

    started = time.monotonic()
    many = grid(optimizer={"type": "sgd", "lr": {"log": [1e-3, 1, 1000]}}, loss=["bce", "ce"], seed=[0, 1, 2, 3, 4])
    assert len(parse_grid(many).specs) == 10_000
    # Generous: the figure is a third of a second; this only notices a product that was made too often.
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("pipelines/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipes_are_grids(path):
    assert read_grid(path).specs


def test_a_name_may_be_empty_and_tells_no_probes_apart():
    named, unnamed = (parse_grid(grid(name=name)).specs[0] for name in ("probe", ""))
    assert unnamed.name == "" and unnamed.id == named.id and unnamed.configuration == named.configuration
