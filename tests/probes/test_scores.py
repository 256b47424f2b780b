"""The tables of a run's scores, the choice of probes, and the comparison of two."""

import csv
import dataclasses
import json
import shutil
import statistics

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score, f1_score, log_loss

import featcache
from featcache.errors import BadInput
from featcache.probes.engine import memory
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import open_run, select
from featcache.reporting.table import score_rows
from featcache.store.sealed import seal, unseal

GRID = {
    "probes": [
        {"name": "lin", "features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 6, "batch_size": 16,
         "optimizer": {"type": "sgd", "lr": [0.03, 0.3]}, "seed": [0, 1, 2]},
        {"name": "mlp", "features": "layer3:spatial", "head": {"type": "mlp", "hidden": 8}, "loss": "bce", "epochs": 3,
         "batch_size": 16, "optimizer": {"type": "adam", "lr": 1e-3}},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A finished run of GRID: 12 linear probes, 3 seeds each of 4 recipes, and one MLP."""
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


def table(run, name):
    with open(run.path / name, newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_saved_probes(run, store):
    """Every table, from ordinary modules and scikit-learn."""
    test = featcache.open_store(store)["test"]
    labels, classes = test.labels, featcache.open_store(store).classes
    per_class = {(r["probe"], r["split"], r["class"]): r for r in table(run, "scores_per_class.csv")}
    assert len(per_class) == 13 * 3 * len(classes)
    for probe in {r["probe"] for r in run.scores if r["loss.type"] == "bce"}:
        trained = load_probe(run.path, probe)
        maps = torch.from_numpy(test[trained.spec.features.replace(":pooled", ":spatial")][:]).float()
        logits = HeadModule(trained.spec.head, trained.weights)(maps).double().numpy()
        known = labels >= 0
        p = 1 / (1 + np.exp(-logits))
        for c, name in enumerate(classes):
            row = per_class[probe, "test", name]
            assert int(row["positives"]) == (labels[:, c] == 1).sum()
            if int(row["positives"]):
                expected = average_precision_score(labels[known[:, c], c] == 1, logits[known[:, c], c])
                assert float(row["ap"]) == pytest.approx(expected, abs=1e-6)
            else:
                assert row["ap"] == ""
        f1 = f1_score((labels == 1).astype(int), (known & (p >= 0.5)).astype(int), average="macro", zero_division=0)
        assert run.row(probe, "f1_macro", "test")["value"] == pytest.approx(f1, abs=1e-6)
        nll = log_loss(labels[known] == 1, p[known])
        assert run.row(probe, "nll", "test")["value"] == pytest.approx(nll, rel=1e-4)
        bins = [r for r in table(run, "calibration.csv") if (r["probe"], r["split"]) == (probe, "test")]
        assert len(bins) == 15 and sum(int(r["pairs"]) for r in bins) == known.sum()
        gaps = [int(r["pairs"]) * abs(float(r["confidence"]) - float(r["outcome"])) for r in bins if r["confidence"]]
        assert run.row(probe, "ece", "test")["value"] == pytest.approx(sum(gaps) / known.sum(), abs=1e-9)


def test_passes_of_a_few_probes_give_the_same_scores(run, store, tmp_path, monkeypatch):
    shutil.copytree(run.path, tmp_path / "r")
    summary = unseal((tmp_path / "r/run.json").read_bytes())
    (tmp_path / "r/run.json").write_text(
        json.dumps({k: summary[k] for k in ("store_id", "seed", "splits", "select", "search")})
    )
    monkeypatch.setattr(memory, "CPU", dataclasses.replace(memory.CPU, scores=60_000))
    featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    for name in ("scores.csv", "scores_per_class.csv", "calibration.csv", "seeds.csv", "history.csv"):
        assert (tmp_path / "r" / name).read_bytes() == (run.path / name).read_bytes()


def test_intervals_on_the_train_split_are_made_on_request(run, store, tmp_path):
    assert {r["split"] for r in run.scores if r["low"] is not None} == {"val", "test"}
    assert all(r["low"] <= r["value"] <= r["high"] for r in run.scores if r["low"] is not None)
    few = {"probes": [GRID["probes"][0] | {"loss": "bce", "epochs": 1}], "intervals": ["train"]}
    asked = featcache.train_probes(few, store=store, run=tmp_path / "r")
    assert {r["split"] for r in asked.scores if r["low"] is not None} == {"train"}
    with pytest.raises(BadInput, match="intervals: 'tran' is not one of train, val, test; did you mean 'train'?"):
        featcache.train_probes(few | {"intervals": ["tran"]}, store=store, run=tmp_path / "r")


def test_seeds(run):
    rows = table(run, "seeds.csv")
    assert len(rows) == 5 * 3 * 9
    for row in rows:
        members = [run.row(p, row["metric"], row["split"]) for p in row["probes"].split()]
        assert [m["seed"] for m in members] == row["seeds"].split() and len(members) == int(row["n"])
        assert {(m["loss.type"], m["optimizer.lr"]) for m in members} == {(row["loss.type"], row["optimizer.lr"])}
        assert float(row["mean"]) == pytest.approx(statistics.mean(m["value"] for m in members))
        if len(members) == 1:
            assert row["std"] == "" and row["head.type"] == "mlp"
        else:
            assert float(row["std"]) == pytest.approx(statistics.stdev(m["value"] for m in members))
    columns, lines = score_rows(run)
    assert columns[-1] == "test mAP % over seeds"
    assert {line[-1][-3:] if line[1] == "linear" else line[-1] for line in lines} == {"(3)", "-"}


def test_select_knows_the_better_direction_and_nested_fields(run):
    def val(metric, probe):
        return run.row(probe, metric, "val")["value"]

    probes = list(dict.fromkeys(r["probe"] for r in run.scores))
    (lowest,) = select(run, "best NLL")
    assert val("nll", lowest) == min(val("nll", p) for p in probes)
    (highest,) = select(run, "best f1_macro")
    assert val("f1_macro", highest) == max(val("f1_macro", p) for p in probes)
    chosen = select(run, "best ECE per optimizer.lr,head")
    fields = [(run.row(p, "ece", "val")["optimizer.lr"], run.row(p, "ece", "val")["head.type"]) for p in chosen]
    assert sorted(fields) == [("0.001", "mlp"), ("0.03", "linear"), ("0.3", "linear")]
    # Of equal scores the first.
    tied = open_run(run.path)
    for row in tied.scores:
        row["value"] = 0.5
    assert select(tied, "best map") == select(tied, "best nll") == probes[:1]
    assert select(run, "best map per lr") == select(run, "best map per optimizer.lr"), "as the tables call it"
    assert select(run, "best map per wd,momentum,head") == select(
        run, "best map per optimizer.weight_decay,optimizer.momentum,head.type"
    )
    with pytest.raises(BadInput, match="unknown field 'gamma'; did you mean 'loss.gamma' or 'schedule.gamma'?"):
        select(run, "best map per gamma")


def test_choosing_on_test_is_said_wherever_scores_are_shown(run, store, command, tmp_path):
    """As How-to-Probe's protocol has it: the role val is the test split, under parity alone."""
    grid = GRID | {"profiles": {"old": {"splits": {"train": ["train", "val"], "val": "test", "test": "test"}}}}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(grid | {"probes": GRID["probes"][:1]}))
    words = ["train-probes", "--grid", tmp_path / "g.yaml", "--store", store, "--run", tmp_path / "r"]
    code, out, err = command(*words, "--parity", "old")
    said = "chosen on the images that they are scored on, test (parity old): the scores are too good"
    assert code == 0 and said in out, err
    chosen = open_run(tmp_path / "r")
    assert chosen.caution == said and run.caution is None
    (best,) = select(chosen, "best map")
    assert chosen.row(best, "map", "test")["value"] == max(
        r["value"] for r in chosen.scores if (r["split"], r["metric"]) == ("test", "map")
    )
    featcache.report([tmp_path / "r"], tmp_path / "r.html")
    assert f"C{said[1:]}" in (tmp_path / "r.html").read_text()


def test_report_chosen_by_nll(run, tmp_path):
    """A metric without chance, and for which lower is better."""
    shutil.copytree(run.path, tmp_path / "r")
    summary = unseal((tmp_path / "r/run.json").read_bytes())
    (tmp_path / "r/run.json").write_bytes(seal(summary | {"select": {"metric": "nll", "split": "val"}}))
    page = featcache.report([tmp_path / "r"], tmp_path / "r.html").read_text()
    assert "<td>chance</td>" not in page and page.count("<img") == 3 and "val NLL" in page
    with pytest.raises(BadInput, match="different metrics do not fit one page: map, nll"):
        featcache.report([run.path, tmp_path / "r"], tmp_path / "r.html")
    columns, lines = score_rows(open_run(tmp_path / "r"))
    values = [float(line[columns.index("val NLL")]) for line in lines]
    assert values == sorted(values)


def test_compare(run, command):
    first, second = select(run, "best map per loss")[:2]
    results = featcache.compare(run.path, probes=[first, second])
    assert tuple(c.metric for c in results) == run.metrics
    for c in results:
        rows = [run.row(p, c.metric, "test")["value"] for p in (first, second)]
        assert c.scores == pytest.approx(rows, abs=1e-12) and c.difference == pytest.approx(
            rows[0] - rows[1], abs=1e-12
        )
        assert c.low <= c.high and 0 < c.p <= 1
        # The interval and the test are two views of one thing.
        assert (c.p < 0.049) <= (not c.low <= 0 <= c.high)
    back = featcache.compare(run.path, probes=[second, first])
    assert [(-c.low, -c.high, c.p) for c in back] == [
        (pytest.approx(c.high), pytest.approx(c.low), c.p) for c in results
    ]
    code, out, err = command("compare", "--run", run.path, "--select", "best map per loss")
    assert code == 0 and "difference [95%]" in out and first in out and second in out
    assert "one probe gives a softmax, the other sigmoids" in err
    code, out, _ = command("compare", "--run", run.path, "--run", run.path, "--probe", first, "--probe", first)
    assert code == 0 and all(line.endswith("1.000") for line in out.splitlines()[2:])


def test_compare_refuses_what_cannot_be_compared(run, store, command, tmp_path):
    first, *_ = select(run, "best map")
    for words, message in (
        ([], "name two probes"),
        (["--probe", first], "compare takes two probes; --probe names 1"),
        (["--probe", first, "--probe", first], "--probe names 1"),
        (["--select", "best map"], "names 1"),
        (["--probe", first, "--probe", "nothere"], "has no probe nothere"),
        (["--probe", first, "--probe", first, "--store", store, "--store", store], "as many stores"),
        (["--run", run.path, "--run", run.path, "--select", "best map"], "one or two runs"),
    ):
        code, _, err = command("compare", "--run", run.path, *words)
        assert code == 2 and message in err, err
    shutil.copytree(run.path, tmp_path / "r")
    summary = unseal((tmp_path / "r/run.json").read_bytes())
    summary["splits"] |= {"test": ["val"]}
    (tmp_path / "r/run.json").write_bytes(seal(summary))
    code, _, err = command("compare", "--run", run.path, "--run", tmp_path / "r", "--select", "best map")
    assert code == 2 and "their test splits hold other images" in err
