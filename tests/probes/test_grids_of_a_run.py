"""A run folder that several grids were trained into, and grids in which nothing is chosen."""

import csv
import shutil

import pytest
import yaml
from grids import GRID

import featcache
from featcache.errors import BadInput
from featcache.probes.grids.grid import parse_grid, read_grid
from featcache.probes.runs.probe_file import find_probes
from featcache.probes.runs.run import best, open_run, select
from featcache.probes.runs.run_file import checksum
from featcache.reporting.table import score_rows
from featcache.store.sealed import seal, unseal

OTHER = {
    "probes": [
        {"name": "deep", "features": "spatial", "head": {"type": "mlp", "hidden": [4, 6]}, "loss": "ce", "epochs": 2,
         "batch_size": 16, "optimizer": {"type": "adam", "lr": 1e-3}, "seed": [0, 1]},
    ]
}  # fmt: skip
TABLES = ("scores.csv", "seeds.csv", "history.csv", "calibration.csv", "scores_per_class.csv")
SEEDS = {
    "splits": {"train": ["train", "val"], "test": "test"},
    "probes": [
        {"name": "lin", "features": "pooled", "head": "linear", "loss": "bce", "epochs": 2, "batch_size": 16,
         "optimizer": {"type": "sgd", "lr": 0.1}, "seed": [0, 1, 2]}
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def first(store, tmp_path_factory):
    """A finished run of GRID."""
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


@pytest.fixture(scope="module")
def second(store, tmp_path_factory):
    """A finished run of OTHER."""
    return featcache.train_probes(OTHER, store=store, run=tmp_path_factory.mktemp("runs") / "r")


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def values(run):
    """{(probe, metric, split): score and interval}."""
    return {(r["probe"], r["metric"], r["split"]): (r["value"], r["low"], r["high"]) for r in run.scores}


def probes_of(path):
    with open(path, newline="") as file:
        return {probe for row in csv.DictReader(file) for probe in (row.get("probe") or row["probes"]).split()}


def assert_union(run, *parts):
    """All probes of some runs are in all tables of `run`, with their own scores."""
    expected = {key: value for part in parts for key, value in values(part).items()}
    assert values(run) == expected
    everything = {probe for probe, *_ in expected}
    assert find_probes(run.path).keys() == everything and run.summary["probes"] == len(everything)
    for name in TABLES:
        assert probes_of(run.path / name) == everything, name


def test_another_grid_adds_its_probes_to_the_run(first, second, store, command, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(first.path, run)
    featcache.attribute(run, limit=3)
    grids = [write(tmp_path / f"{n}.yaml", grid) for n, grid in enumerate((GRID, OTHER))]
    code, out, err = command("train-probes", "--grid", grids[1], "--store", store, "--run", run)
    assert code == 0 and "9 probes of other grids are in" in err and "best 10 of 13 probes" in out
    assert_union(open_run(run), first, second)
    assert (run / "grid.yaml").read_bytes() == (first.path / "grid.yaml").read_bytes()
    (added,) = run.glob("grid-*.yaml")
    assert len(read_grid(added).specs) == 4
    for grid in grids:
        code, out, err = command("train-probes", "--grid", grid, "--store", store, "--run", run)
        assert code == 0 and "is finished already" in err and "of 13 probes" in out
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    assert code == 0 and "notice" not in err


def test_killed_amid_the_second_grid(first, second, store, tmp_path, capsys):
    """Whichever grid is given next, what is there is scored, and nothing is trained again."""
    run = tmp_path / "r"
    shutil.copytree(first.path, run)
    done = featcache.train_probes({"probes": [OTHER["probes"][0] | {"seed": 1}]}, store=store, run=tmp_path / "some")
    for file in (done.path / "probes").iterdir():
        shutil.copy(file, run / "probes")
    summary = unseal((run / "run.json").read_bytes())
    del summary["key"]
    (run / "run.json").write_bytes(seal(summary))
    before = {path: path.stat().st_mtime_ns for path in (run / "probes").iterdir()}
    assert_union(featcache.train_probes(GRID, store=store, run=run), first, done)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_union(featcache.train_probes(OTHER, store=store, run=run), first, second)
    assert "2 of 4 probes are trained already" in capsys.readouterr().err


def test_probes_that_an_older_version_dropped_from_the_scores_come_back(first, second, store, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(first.path, run)
    for file in (second.path / "probes").iterdir():
        shutil.copy(file, run / "probes")
    for name in (*TABLES, "grid.yaml"):
        shutil.copy(second.path / name, run)
    summary = unseal((second.path / "run.json").read_bytes())
    del summary["grids"]
    (run / "run.json").write_bytes(seal(summary))
    assert_union(featcache.train_probes(OTHER, store=store, run=run), second, first)


def test_a_name_stays_when_another_grid_comes(second, store, tmp_path):
    """Names are no part of a probe's id: those of the scores are kept."""
    run = tmp_path / "r"
    shutil.copytree(second.path, run)
    featcache.train_probes({"probes": [OTHER["probes"][0] | {"name": "renamed"}]}, store=store, run=run)
    grown = featcache.train_probes({"probes": GRID["probes"][1:]}, store=store, run=run)
    assert {r["name"] for r in grown.scores} == {"renamed", "mlp"}


def test_maps_of_probes_that_are_gone_are_left_out_with_a_notice(first, store, command, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(first.path, run)
    chosen = [*select(first, "best map per loss"), *select(first, "best map per head")][1:]
    rows = featcache.attribute(run, probes=chosen, limit=3)
    gone = rows[0]["probe"]
    for name in ("attribution.csv", "scores.csv"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(x for x in lines if name == "attribution.csv" or not x.startswith(gone)))
    summary = unseal((run / "run.json").read_bytes())
    summary["files"]["scores.csv"] = checksum((run / "scores.csv").read_bytes())
    (run / "run.json").write_bytes(seal(summary))
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    assert code == 0 and f"has 1 probes that the run does not have ({gone})" in err and "Traceback" not in err
    page = (tmp_path / "page.html").read_text()
    assert gone not in page and "image/jpeg" in page


def test_a_grid_in_which_nothing_is_chosen(store, command, tmp_path):
    grid, run = write(tmp_path / "g.yaml", SEEDS), tmp_path / "r"
    code, out, err = command("train-probes", "--grid", grid, "--store", store, "--run", run)
    assert code == 0, err
    assert "first 3 of 3 probes;" in out and "nothing was chosen: one configuration, its seeds are reported" in out
    finished = open_run(run)
    assert set(finished.summary["rows"]) == {"train", "test"} and finished.summary["rows"]["train"] == 60
    columns, lines = score_rows(finished)
    assert columns == ["probe", "head", "loss", "seed", "test mAP % [95%]", "test mAP % over seeds"]
    assert [line[3] for line in lines] == ["0", "1", "2"], "in the grid's order, not by their scores on test"
    assert len(read_grid(run / "grid.yaml").specs) == 3
    code, _, err = command("train-probes", "--grid", run / "grid.yaml", "--run", run)
    assert code == 0 and "is finished already" in err
    code, out, _ = command("attribute", "--run", run, "--limit", 2)
    assert code == 0 and all(probe in out for probe in best(finished)) and len(best(finished)) == 3
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "Nothing was chosen: one configuration" in page and "val mAP" not in page
    for words in (["attribute"], ["compare"]):
        code, _, err = command(*words, "--run", run, "--select", "best map")
        assert code == 2 and "has no split to choose on, only the seeds of one configuration" in err
    code, _, err = command("compare", "--run", run, "--probe", lines[0][0], "--probe", lines[1][0])
    assert code == 0, err
    with pytest.raises(BadInput, match="run .*, with this grid: 2 configurations and no split .* another --run"):
        featcache.train_probes(SEEDS | {"probes": [SEEDS["probes"][0] | {"epochs": 1}]}, store=store, run=run)
    assert open_run(run).summary["probes"] == 3, "a refused grid leaves the run as it was"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": ["bce", "ce"]}, "probes: 2 configurations and no split to choose between them on: name one"),
        ({"keep": "best"}, "probes[0].keep: looks at scores of a split to choose on"),
        ({"patience": 3}, "probes[0].patience: looks at scores of a split to choose on"),
        ({"search": "halving"}, "search: halving looks at scores of a split to choose on"),
        ({"select": {"split": "val"}}, "select.split: 'val' is not one of train"),
    ],
)
def test_what_needs_a_split_to_choose_on(store, tmp_path, change, message):
    at_top = change.keys() & {"search", "select"}
    grid = SEEDS | (change if at_top else {"probes": [SEEDS["probes"][0] | change]})
    with pytest.raises(BadInput) as caught:
        featcache.train_probes(grid, store=store, run=tmp_path / "r")
    assert message in caught.value.message and "\n" not in caught.value.message
    assert not (tmp_path / "r").exists()


def test_choosing_on_train_is_a_choice(store, tmp_path):
    grid = SEEDS | {"select": {"split": "train"}, "probes": [SEEDS["probes"][0] | {"loss": ["bce", "ce"]}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    assert len(best(run, "loss")) == 2 and run.caution is None


@pytest.mark.parametrize(
    ("splits", "roles"),
    [
        ({}, ["train", "val", "test"]),
        ({"train": "train", "test": "test"}, ["train", "val", "test"]),
        ({"train": ["train", "val"], "test": "test"}, ["train", "test"]),
        ({"train": ["train", "val"]}, ["train", "test"]),
        ({"test": "val"}, ["train", "test"]),
        ({"train": ["train", "val"], "val": "minival"}, ["train", "val", "test"]),
    ],
)
def test_the_role_val_is_left_out_where_its_split_has_another(splits, roles):
    assert list(parse_grid({"splits": splits, "probes": GRID["probes"]}).splits) == roles


def test_a_named_val_that_is_trained_on_is_refused_as_before():
    with pytest.raises(BadInput, match="splits.val: 'val' is in splits.train too; the roles must be kept apart"):
        parse_grid(SEEDS | {"splits": {"train": ["train", "val"], "val": "val"}})
    with pytest.raises(BadInput, match="splits.test: 'test' is in splits.train too"):
        parse_grid(SEEDS | {"splits": {"train": ["train", "test"]}})


def test_a_store_without_val_has_nothing_to_choose_on(checkpoint, scenes, tmp_path):
    """As CIFAR: train and test."""
    store = featcache.extract(
        checkpoint, "voc", root=scenes, splits=["train", "test"], size=64, workers=0, store=tmp_path / "s.zarr"
    )
    grid = {"probes": SEEDS["probes"]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    assert run.chosen_on is None and run.scored_on == "test"
    with pytest.raises(BadInput, match=r"no split to choose between .*store .* has train, test\)"):
        featcache.train_probes(GRID, store=store, run=tmp_path / "q")


def test_intervals_that_an_earlier_grid_asked_for_stay(store, tmp_path):
    featcache.train_probes(SEEDS | {"intervals": ["train"]}, store=store, run=tmp_path / "r")
    more = {**SEEDS, "probes": [SEEDS["probes"][0] | {"seed": 3}]}
    run = featcache.train_probes(more, store=store, run=tmp_path / "r")
    made = {row["split"] for row in run.scores if row["low"] is not None}
    assert made == {"train", "test"} and len({row["probe"] for row in run.scores}) == 4
