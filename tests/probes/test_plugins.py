"""Heads, losses, solvers and schedules that other packages bring, from the grid to the export; and what is wrong with some."""

import pytest
import torch
import yaml
from plugins import install, with_plugins

import featcache

SOURCE = '''
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from featcache.probes.heads.head import Head, scaled, unscaled
from featcache.probes.losses.loss import Loss
from featcache.probes.schedules.schedule import WarmedUp
from featcache.probes.solvers.rule import UpdateRule, per_probe
from featcache.probes.solvers.solver import MiniBatchSolver


class Prototypes(Head):
    """Minus the squared distance of the mean feature to a prototype of each class."""

    type: Literal["prototypes"] = "prototypes"
    spread: float = Field(1.0, gt=0, description="how far the first prototypes lie from zero")

    def initial_weights(self, dim, classes, generator):
        return {"prototypes": torch.empty(classes, dim).normal_(0, self.spread, generator=generator)}

    def stack(self, weights, precision):
        return Stack(self, weights)

    def modules(self, weights):
        return {"distance": Distance(weights.pop("prototypes"))}

    def footprint(self, dim, classes, positions):
        return classes * dim, classes

    def flops(self, dim, classes, positions):
        return 6 * dim * classes


class Stack:
    def __init__(self, head, weights):
        self.head, self.weights, self.parameters = head, weights, list(weights.values())

    def forward(self, features, training=False):
        means = features if features.ndim == 2 else features.mean(2)
        logits = -(means[:, None, None] - self.weights["prototypes"]).square().sum(3)
        return scaled(logits, self.head)

    def backward(self, features, logits, gradient):
        means, gradient = features if features.ndim == 2 else features.mean(2), unscaled(gradient, self.head)
        away = means[:, None, None] - self.weights["prototypes"]
        return [2 * (gradient[..., None] * away).sum(0)]


class Distance(nn.Module):
    def __init__(self, prototypes):
        super().__init__()
        self.prototypes = nn.Parameter(prototypes)

    def forward(self, maps):
        means = maps.mean((2, 3))
        return -(means[:, None] - self.prototypes).square().sum(2)[:, :, None, None]


class Squares(Loss):
    """The squared distance of each sigmoid to its label."""

    type: Literal["squares"] = "squares"

    def compute(self, logits, present, share):
        p = logits.sigmoid()
        away = p - present
        return (away.square() * share).sum((0, 2)), 2 * away * p * (1 - p) * share


class Signs(MiniBatchSolver):
    """Steps of the sign of the gradient."""

    type: Literal["signs"] = "signs"
    moments: ClassVar[int] = 0

    def rule(self, parameters, solvers, precision, device):
        return SignRule(parameters, solvers, precision, device)


class SignRule(UpdateRule):
    def state(self):
        return {}

    def update(self, number, parameter, gradient, rates):
        parameter.sub_(per_probe(rates, parameter) * self.dense(number, gradient).sign())


class Root(WarmedUp):
    """One over the square root of the epoch."""

    type: Literal["root"] = "root"

    def factor(self, now, epochs, steps):
        return (1 + now) ** -0.5
'''
KINDS = {
    "featcache.heads": {"prototypes": "Prototypes"},
    "featcache.losses": {"squares": "Squares"},
    "featcache.solvers": {"signs": "Signs"},
    "featcache.schedules": {"root": "Root"},
}
GRID = {
    "probes": [
        {
            "name": "own", "features": "spatial", "head": {"type": "prototypes", "spread": [0.1, 0.5]}, "loss": ["squares", "bce"],
            "optimizer": {"type": "signs", "lr": [0.01, 0.03]}, "schedule": "root", "epochs": 3, "batch_size": 16,
        },
        {"name": "linear", "features": "pooled", "head": "linear", "loss": "squares", "epochs": 2, "optimizer": {"type": "sgd", "lr": 0.1}},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A folder with an installed package that brings a kind of every sort."""
    folder = tmp_path_factory.mktemp("plugins")
    install(folder, SOURCE, KINDS)
    return folder


@pytest.mark.process
def test_a_package_brings_a_head_a_loss_a_solver_and_a_schedule(store, scenes, checkpoint, plugins, tmp_path, command):
    """Trained, scored, explained, reported, exported and verified; a probe alone equals the same among others."""
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(GRID))
    words = (
        "train-probes",
        "--grid",
        tmp_path / "g.yaml",
        "--store",
        store,
        "--device",
        "cpu",
        "--run",
        tmp_path / "r",
    )
    code, out, err = with_plugins(plugins, *words, "--dry-run")
    assert code == 0 and "prototypes" in out and "signs" in out, err
    code, out, err = with_plugins(plugins, *words)
    assert code == 0 and "best 9 of 9 probes" in out, err
    alone = {"probes": [GRID["probes"][0] | {"loss": "squares", "head": {"type": "prototypes", "spread": 0.5}}]}
    alone["probes"][0]["optimizer"] = {"type": "signs", "lr": 0.03}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(alone | {"select": {"split": "val"}}))
    code, _, err = with_plugins(plugins, *words[:1], "--grid", tmp_path / "one.yaml", *words[3:-1], tmp_path / "alone")
    assert code == 0, err
    rows = {(r["probe"], r["split"], r["metric"]): r["value"] for r in featcache.open_run(tmp_path / "r").scores}
    for row in featcache.open_run(tmp_path / "alone").scores:
        assert rows[row["probe"], row["split"], row["metric"]] == row["value"]
    probe = row["probe"]
    assert row["head.spread"] == "0.5" and row["loss.type"] == "squares" and row["optimizer.lr"] == "0.03"
    code, out, err = with_plugins(plugins, "attribute", "--run", tmp_path / "r", "--probe", probe, "--limit", 3)
    assert code == 0 and (tmp_path / "r/attribution.csv").exists(), err
    code, _, err = with_plugins(plugins, "report", "--run", tmp_path / "r", "--out", tmp_path / "page.html")
    assert code == 0 and "prototypes" in (tmp_path / "page.html").read_text(), err
    exported = (
        "--run",
        tmp_path / "r",
        "--probe",
        probe,
        "--backbone",
        checkpoint,
        "--to",
        tmp_path / "x.safetensors",
    )
    code, _, err = with_plugins(plugins, "export", *exported)
    assert code == 0 and (tmp_path / "x.safetensors").exists(), err
    code, out, err = with_plugins(plugins, "verify", tmp_path / "r")
    assert code == 0, err
    # Without the package its probes cannot be read, which is said in one line, and nothing is lost.
    code, _, err = command(*words)
    assert code == 2 and "prototypes" in err and "Traceback" not in err


@pytest.mark.process
def test_a_grid_that_does_not_fit_a_packages_kind(store, plugins, tmp_path):
    group = GRID["probes"][0] | {"head": {"type": "prototypes", "spraed": 1}, "optimizer": {"type": "sings", "lr": 1}}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({"probes": [group]}))
    code, _, err = with_plugins(plugins, "train-probes", "--grid", tmp_path / "g.yaml", "--store", store)
    assert code == 2 and "probes[0].head.spraed: unknown field; did you mean 'spread'?" in err
    assert "'sings' is not one of sgd, adam, adamw, lars, lamb, lbfgs, svm, none, signs; did you mean 'signs'?" in err


@pytest.mark.process
@pytest.mark.parametrize(
    ("source", "kinds", "message"),
    [
        ("import nonsense_of_nobody", {"featcache.heads": {"x": "X"}}, "head 'x': bad:X of package bad cannot be imported"),
        (SOURCE, {"featcache.heads": {"linear": "Prototypes"}}, "two heads are called 'linear': one of featcache and bad:Prototypes"),
        (SOURCE, {"featcache.losses": {"prototypes": "Prototypes"}}, "loss 'prototypes': bad:Prototypes of package bad is no Loss"),
        (SOURCE, {"featcache.solvers": {"sings": "Signs"}}, "optimizer 'sings': bad:Signs of package bad calls itself 'signs'"),
    ],
)  # fmt: skip
def test_a_package_that_is_wrong_is_one_line(store, tmp_path, source, kinds, message):
    install(tmp_path, source, kinds, name="bad")
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({"probes": [GRID["probes"][1] | {"loss": "bce"}]}))
    code, _, err = with_plugins(tmp_path, "train-probes", "--grid", tmp_path / "g.yaml", "--store", store)
    assert code == 2 and message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.process
def test_two_packages_with_one_name(tmp_path, store):
    install(tmp_path, SOURCE, {"featcache.heads": {"prototypes": "Prototypes"}}, name="one")
    install(tmp_path, SOURCE, {"featcache.heads": {"prototypes": "Prototypes"}}, name="other")
    code, _, err = with_plugins(tmp_path, "schema")
    assert code == 2 and "two heads are called 'prototypes'" in err and "package o" in err


def test_weights_that_are_not_a_heads_are_refused():
    from featcache.probes.heads.linear import Linear
    from featcache.probes.heads.module import HeadModule

    weights = {"fc0.weight": torch.zeros(3, 4), "fc0.bias": torch.zeros(3)}
    assert HeadModule(Linear(), weights)(torch.zeros(2, 4, 1, 1)).shape == (2, 3)
    for wrong in ({}, {"fc0.bias": weights["fc0.bias"]}, weights | {"fc1.weight": torch.zeros(1)}):
        with pytest.raises(ValueError, match="weights do not fit the head"):
            HeadModule(Linear(), wrong)
