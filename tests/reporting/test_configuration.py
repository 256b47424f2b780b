"""What probes are called: in the terminal's table, the localisation table, the report and its plots."""

import itertools
import re

import pytest
import yaml

import featcache
from featcache.probes.runs.run import short_names
from featcache.reporting import plots
from featcache.reporting.configuration import labels, naming
from featcache.reporting.localisation import localisation_rows
from featcache.reporting.table import score_rows

BASE = {
    "name": "lin", "features": "pooled", "head": "linear", "loss": "bce", "epochs": 2, "batch_size": 16,
    "optimizer": {"type": "sgd", "lr": 0.1},
}  # fmt: skip
# 64 configurations, two seeds of each.
MANY = BASE | {
    "loss": {"type": "bce", "label_smoothing": [0, 0.1]},
    "optimizer": [{"type": "sgd", "lr": [0.1, 1.0]}, {"type": "adam", "lr": [0.001, 0.01]}],
    "schedule": ["constant", "cosine"],
    "epochs": [2, 3],
    "batch_size": [16, 32],
    "seed": [0, 1],
}


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    return featcache.train_probes({"probes": [MANY]}, store=store, run=tmp_path_factory.mktemp("runs") / "many")


def names_of(store, path, *groups):
    run = featcache.train_probes({"probes": list(groups)}, store=store, run=path)
    return list(naming(run))


@pytest.mark.process
def test_all_that_varies_tells_the_rows_of_every_table_apart(run, command, tmp_path):
    fields = ["head", "loss", "label_smoothing", "optimizer", "lr", "schedule", "epochs", "batch_size", "seed"]
    assert list(naming(run)) == fields
    columns, rows = score_rows(run)
    assert columns[1:10] == fields and len({tuple(row[1:10]) for row in rows}) == len(rows) == 64 * 2
    grid = tmp_path / "g.yaml"
    grid.write_text(yaml.safe_dump({"probes": [MANY]}))
    code, out, _ = command("train-probes", "--grid", grid, "--store", run.summary["store"], "--run", run.path)
    cells = [line.split()[1:10] for line in out.splitlines()[2:12]]
    assert code == 0 and out.split()[1:10] == fields and len(set(map(tuple, cells))) == 10
    featcache.attribute(run.path, limit=2)
    columns, _ = localisation_rows(run.path)
    assert columns[1:10] == fields
    page = featcache.report(run.path, tmp_path / "page.html").read_text()
    for field in fields:
        assert f"<th>{field}</th>" in page


def test_fields_that_do_not_vary_or_that_a_type_does_not_have_are_no_columns(store, tmp_path):
    assert names_of(store, tmp_path / "a", BASE) == ["head", "loss"]
    # The gamma of focal and the momentum of sgd are what these types have, and bnu and bn what heads of a type have.
    heads = [{"type": "mlp", "hidden": 4}, {"type": "bcos", "layers": [1, 2], "hidden": 4}]
    losses = {"loss": ["bce", "focal"], "optimizer": [{"type": t, "lr": 0.1} for t in ("sgd", "adam")]}
    group = BASE | losses | {"features": "spatial", "head": heads}
    assert names_of(store, tmp_path / "b", group) == ["head", "loss", "optimizer"]
    alike = {"type": "mlp", "hidden": 4, "norm": ["bn", "none"]}
    assert names_of(store, tmp_path / "c", group | {"head": alike}) == ["head", "loss", "norm", "optimizer"]
    gammas = [{"type": "focal", "gamma": [1, 2]}, "bce"]
    assert names_of(store, tmp_path / "d", BASE | {"loss": gammas}) == ["head", "loss", "loss.gamma"]


def test_short_names_are_given_where_no_two_agree():
    fields = ["name", "head.type", "optimizer.lr", "optimizer.weight_decay", "loss.gamma", "schedule.gamma", "epochs"]
    assert list(short_names(fields).values()) == ["name", "head", "lr", "wd", "loss.gamma", "schedule.gamma", "epochs"]


def test_labels_are_as_long_as_it_takes(run):
    probes = list(dict.fromkeys(row["probe"] for row in run.scores))
    assert labels(run, probes[:1]) == {probes[0]: "linear, bce"}
    seeds = next(row["probes"].split() for row in run.table("seeds.csv"))
    assert list(labels(run, seeds).values()) == ["linear, bce, seed 0", "linear, bce, seed 1"]
    assert len(set(labels(run, probes).values())) == len(probes)


def test_a_line_over_the_learning_rate_is_one_configuration_and_its_bars_are_its_seeds(run, monkeypatch):
    drawn = []
    original = plots._rate_line
    monkeypatch.setattr(plots, "_rate_line", lambda *given: drawn.append(given) or original(*given))
    picture = plots.learning_rates([run], "map")
    assert picture.startswith("data:image/svg+xml") and len(drawn) == plots.MOST_LINES
    for _, points, name, _ in drawn:
        wanted = dict(re.findall(r"(\w+) ([\w.]+)", name))
        kind = {"label_smoothing": "loss.label_smoothing", "optimizer": "optimizer.type", "schedule": "schedule.type"}
        rows = [
            r for r in run.scores
            if (r["metric"], r["split"]) == ("map", "val")
            and all(r[kind.get(k, k)].removesuffix(".0") == v for k, v in wanted.items())
        ]  # fmt: skip
        expected = {
            float(rate): sorted(100 * r["value"] for r in members)
            for rate, members in itertools.groupby(
                sorted(rows, key=lambda r: float(r["optimizer.lr"])), lambda r: r["optimizer.lr"]
            )
        }
        assert {rate: sorted(values) for rate, values in points.items()} == expected
        assert {len(values) for values in points.values()} == {2} and len(points) == 2
