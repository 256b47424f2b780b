"""A metric of another package: in grids, scores, choices, comparisons and the report; and what is wrong with one."""

import ast
import csv
import math
import re
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import featcache
from featcache.errors import BadInput
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import open_run, select
from featcache.probes.scores.evidence import Ranks
from featcache.probes.scores.jackknife import Z, deviations
from featcache.probes.scores.metric import Estimate, Metric, PlainMetric
from featcache.probes.scores.metrics import METRICS, default_metric, gain, metric_kind, metrics_of
from featcache.probes.scores.tally import Tally

DOCS = Path(__file__).parents[2] / "docs/scores.md"
GRID = {
    "select": {"metric": "hit"},
    "probes": [{"features": "pooled", "head": "linear", "loss": "bce", "epochs": 2, "batch_size": 16, "seed": [0, 1],
                "optimizer": {"type": "sgd", "lr": [0.03, 0.3]}}],
}  # fmt: skip


def install(folder, monkeypatch, code, **metrics):
    """Install a package `other_metrics` of that code, which brings metrics: {name: class}."""
    (folder / "other_metrics.py").write_text(code)
    info = folder / "other_metrics-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-metrics\nVersion: 1\n")
    points = "".join(f"{name} = other_metrics:{kind}\n" for name, kind in metrics.items())
    (info / "entry_points.txt").write_text(f"[featcache.metrics]\n{points}")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(METRICS.__dict__, "_kinds", raising=False)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a package for one test: package(code, name="Class")."""
    folder = tmp_path / "site"
    folder.mkdir()
    with monkeypatch.context() as patch:
        yield lambda code, **metrics: install(folder, patch, code, **metrics)
    METRICS.__dict__.pop("_kinds", None)
    sys.modules.pop("other_metrics", None)


def example():
    """The metric that docs/scores.md shows."""
    return re.search(r"```python\n(.*?class \w+\(PlainMetric\).*?)```", DOCS.read_text(), re.DOTALL).group(1)


def test_the_metric_of_the_documentation_is_a_metric_like_any_other(store, package, tmp_path, command):
    package(example(), hit="Hit")
    assert metrics_of("multi-label")[-1] == "hit" and "hit" not in metrics_of("single-label")
    run = featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    assert run.metric == "hit" and run.summary["chance"]["test"]["hit"] is None
    test = featcache.open_store(store)["test"]
    maps, labels = torch.from_numpy(test["layer4:spatial"][:]).float(), test.labels
    for probe in {row["probe"] for row in run.scores}:
        trained = load_probe(run.path, probe)
        top = HeadModule(trained.spec.head, trained.weights)(maps).argmax(1).numpy()
        hits = labels[np.arange(len(labels)), top] == 1
        row, p, n = run.row(probe, "hit", "test"), hits.mean(), len(hits)
        assert row["value"] == pytest.approx(p)
        # On so few images every one is left out by itself: Wilson's interval of a share.
        centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n))
        ends = [(centre + sign * half) / (1 + Z**2 / n) for sign in (-1, 1)]
        assert [row["low"], row["high"]] == pytest.approx([max(ends[0], 0), min(ends[1], 1)])
        # It was looked at after every epoch only if the grid asks for that.
        assert trained.epoch == 2
    with open(run.path / "seeds.csv", newline="") as file:
        assert sum(row["metric"] == "hit" for row in csv.DictReader(file)) == 2 * 3
    (best,) = select(run, "best hit")
    assert run.row(best, "hit", "val")["value"] == max(
        row["value"] for row in run.scores if (row["metric"], row["split"]) == ("hit", "val")
    )
    others = [probe for probe in dict.fromkeys(row["probe"] for row in run.scores) if probe != best]
    (compared,) = [c for c in featcache.compare(run.path, probes=[best, others[0]]) if c.metric == "hit"]
    assert compared.low <= compared.difference <= compared.high and 0 <= compared.p <= 1
    page = featcache.report(run.path, tmp_path / "r.html").read_text()
    assert "chosen by val hit rate" in page and page.count("hit rate %") > 3
    code, out, _ = command("train-probes", "--grid", run.path / "grid.yaml", "--run", tmp_path / "again")
    assert code == 0 and "test hit rate % [95%]" in out and "by val hit rate" in out


def test_a_run_with_a_metric_of_a_package_that_is_gone_says_so(store, package, tmp_path, command):
    package(example(), hit="Hit")
    featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    package_kinds = METRICS.__dict__.pop("_kinds")
    METRICS.__dict__["_kinds"] = {name: kind for name, kind in package_kinds.items() if name != "hit"}
    for action in (
        lambda: featcache.report(tmp_path / "r", tmp_path / "r.html"),
        lambda: select(open_run(tmp_path / "r"), "best hit"),
    ):
        with pytest.raises(BadInput, match="metric 'hit' is not known here.*install the package that brings it"):
            action()
    with pytest.raises(BadInput, match="select.metric: 'hit' is not one of"):
        featcache.train_probes(GRID, store=store, run=tmp_path / "r")


def test_training_looks_at_a_metric_of_a_package(store, package, tmp_path):
    """keep: best asks for it after every epoch."""
    package(example(), hit="Hit")
    grid = GRID | {"probes": [GRID["probes"][0] | {"keep": "best", "epochs": 4}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    with open(run.path / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    for row in (row for row in run.scores if (row["metric"], row["split"]) == ("hit", "val")):
        epochs = [float(h["val_hit"]) for h in history if h["probe"] == row["probe"]]
        assert len(epochs) == 4 and row["value"] == pytest.approx(max(epochs))


@pytest.mark.parametrize(
    "code, metrics, message",
    [
        (
            "import nowhere",
            {"hit": "Hit"},
            "metric 'hit': other_metrics:Hit of package other-metrics cannot be imported: Mod",
        ),
        ("Hit = 3", {"hit": "Hit"}, "other_metrics:Hit of package other-metrics is no Metric"),
        (example(), {"map": "Hit"}, "two metrics are called 'map': one of featcache and other_metrics:Hit"),
        (example(), {"other": "Hit"}, "other_metrics:Hit of package other-metrics calls itself 'hit'"),
        (
            example().replace('("multi-label",)', '"multilabel"'),
            {"hit": "Hit"},
            "ValueError: tasks of metric hit: expected a tuple of multi-label and single-label, not 'multilabel'",
        ),
        (
            "from typing import Literal\nfrom featcache.probes.scores.metric import Metric\n"
            'class Hit(Metric):\n    type: Literal["hit"] = "hit"\n',
            {"hit": "Hit"},
            "ValueError: metric hit does not say which evidence it reads: subclass PlainMetric, or give reads",
        ),
        (
            example().replace('"hit"', '"Hit 1"'),
            {"hit": "Hit"},
            "cannot be imported: ValueError: 'Hit 1' is no name of a metric: use a to z",
        ),
    ],
)
def test_packages_that_cannot_be_used_are_one_line(store, package, tmp_path, command, code, metrics, message):
    package(code, **metrics)
    grid = tmp_path / "g.yaml"
    grid.write_text(
        "probes: [{features: pooled, head: linear, loss: bce, epochs: 1, batch_size: 8, optimizer: {type: sgd, lr: 1}}]"
    )
    status, _, err = command("train-probes", "--grid", grid, "--store", store, "--run", tmp_path / "r")
    assert status == 2 and message in err and "Traceback" not in err, err


class Spread(PlainMetric):
    """The standard deviation of an image's logits, on average: not a fraction, and streamed."""

    type: Literal["spread"] = "spread"
    bounds = (0, math.inf)

    def gather(self, logits, labels, softmax):
        return torch.where(softmax.unsqueeze(1), logits.double().std(2), 0.0)

    def value(self, gathered, labels):
        return gathered.mean(1)


class Recalls(Metric[Ranks]):
    """The recall of class 0, with scores by class."""

    type: Literal["recalls"] = "recalls"
    tasks = ("single-label",)
    class_column = "recall"
    reads = Ranks

    def estimate(self, evidence, leave_out):
        hits = (evidence.ranks == 0).double()
        recalls = torch.stack([hits[:, evidence.labels == c].mean(1) for c in range(evidence.classes)], dim=1)
        return Estimate(recalls[:, 0], hits if leave_out else None, by_class=recalls)


@pytest.fixture
def here(monkeypatch):
    """The metrics of this file, beside the project's own."""
    monkeypatch.setitem(METRICS.__dict__, "_kinds", dict(METRICS) | {"spread": Spread, "recalls": Recalls})


def test_what_a_metric_gathers_of_chunks_is_what_it_would_of_all(here):
    """On more images than groups, the interval is that of a mean, to the accuracy that 100 groups have."""
    logits, labels = torch.randn(3, 5000, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5000) % 4
    tally = Tally(labels, 4, [True, True, False], ["spread", "recalls"])
    for part in logits.split(333, dim=1):
        tally.add(part)
    assert tally.bytes_per_image == 8 + 24 and Spread.title == "spread"
    score, deviation, count = tally.estimates()["spread"]
    spread = logits.double().std(2)[:2]
    torch.testing.assert_close(score, torch.cat([spread.mean(1), torch.zeros(1)]).double())
    expected = spread.std(1, correction=0) / math.sqrt(5000)
    torch.testing.assert_close(deviation[:2], expected, rtol=0.25, atol=0)
    assert deviation[2] == 0 and count.eq(5000).all()
    recalls = tally.by_class()["recalls"]
    hits = logits.argmax(2) == labels
    assert recalls[1, 3].item() == pytest.approx(hits[1, labels == 3].double().mean().item())
    # Of a mean of as many images as groups each is left out by itself.
    few = Tally(labels[:90], 4, [True] * 3, ["spread"])
    few.add(logits[:, :90])
    influences = few.influences()["spread"][1]
    expected = logits[:, :90].double().std(2).std(1, correction=0) / math.sqrt(90)
    torch.testing.assert_close(deviations(influences), expected)


def test_a_single_image_has_no_deviation(here):
    tally = Tally(torch.tensor([1]), 4, [True], ["spread"])
    tally.add(torch.randn(1, 1, 4))
    score, deviation, _ = tally.estimates()["spread"]
    assert score.isfinite().all() and deviation.isnan().all()


@pytest.mark.parametrize(
    "method, result, message",
    [
        (
            "value",
            lambda values, labels: values.mean(),
            r"value\(\) returned a tensor of shape .*one score for each probe",
        ),
        ("value", lambda values, labels: 0.5, r"value\(\) returned a float; it must return a tensor"),
        (
            "value",
            lambda values, labels: -values.mean(1),
            r"value\(\) returned -.*, which is not between 0 and inf; give its class",
        ),
        ("gather", lambda logits, labels, softmax: logits.mean(1), r"gather\(\) returned a tensor of shape \[2, 4\]"),
    ],
)
def test_what_a_metric_may_return(here, monkeypatch, method, result, message):
    monkeypatch.setattr(Spread, method, lambda self, *given: result(*given))
    with pytest.raises(BadInput, match=f"metric spread: {message}"):
        tally = Tally(torch.arange(9) % 4, 4, [True, True], ["spread"])
        tally.add(torch.randn(2, 9, 4))
        tally.estimates()


def test_evidence_that_labels_do_not_have(here):
    with pytest.raises(BadInput, match="metric recalls reads Ranks, which multi-label data does not have"):
        Tally(torch.ones(3, 4, dtype=torch.int8), 4, [True], ["recalls"])


def test_only_the_metrics_name_metrics():
    """What another file says of a metric it asks its class for."""
    probes = Path(featcache.__file__).parent / "probes"
    names = {kind.word() for kind in METRICS.own}
    for path in (path for path in probes.rglob("*.py") if path.parent.name != "metrics"):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not names & strings, path


def test_scores_are_pure_numbers():
    """They know no store, no run and no probe."""
    for path in (Path(featcache.__file__).parent / "probes/scores").rglob("*.py"):
        for line in re.findall(r"^ *(?:from|import) (featcache[\w.]*)", path.read_text(), re.MULTILINE):
            assert line.startswith(("featcache.errors", "featcache.kinds", "featcache.probes.scores")), (path, line)


def test_the_documentation_lists_every_metric():
    text = DOCS.read_text()
    for kind in METRICS.own:
        tasks = " and ".join(kind.tasks)
        better = "higher" if kind.higher_is_better else "lower"
        row = f"| `{kind.word()}` | {kind.title} | {tasks} | {better} | {kind.summary().rstrip('.')} |"
        assert row in text, row
    for task in ("multi-label", "single-label"):
        assert f"`{default_metric(task)}` for {task} data" in text
    assert gain("nll", 1.0) == -1 and metric_kind("nll").unit() == ""
