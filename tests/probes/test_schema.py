"""The JSON schema of grids, and the tables of docs/grid.md, which are made from the same classes."""

import json
import re
from pathlib import Path

import grid_tables
import jsonschema
import pytest
import yaml
from grids import GRID

import featcache
from featcache.errors import BadInput
from featcache.probes.grids.grid import parse_grid
from featcache.probes.grids.schema import schema

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "pipelines").rglob("*.yaml") if "probes:" in path.read_text())
PLAIN = {"features": "pooled", "head": "linear", "loss": "bce", "optimizer": {"type": "sgd", "lr": 0.1}, "epochs": 2}


@pytest.fixture(scope="module")
def check():
    """A function that says whether a grid's content fits the schema."""
    content = schema()
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content).is_valid


def test_the_command_prints_it(command):
    code, out, _ = command("schema")
    assert code == 0 and json.loads(out) == featcache.schema()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_fit(check, path):
    assert check(yaml.safe_load(path.read_text())), path


def test_every_grid_of_the_page_fits(check):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/grid.md").read_text(), re.DOTALL)
    assert check(GRID) and check(yaml.safe_load((ROOT / "featcache/demo/grid.yaml").read_text()))
    random = yaml.safe_load(next(block for block in blocks if "random:" in block))
    assert check({"probes": random})


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": [1, 2]}, {"optimizer": {"type": "sgd", "lr": {"log": [0.1, 1, 3]}}}, {"head": ["linear", {"type": "mlp"}]},
        {"optimizer": {"type": "SGD".lower(), "lr": "1e-3"}}, {"loss": "cross_entropy"}, {"views": "all"},
        {"schedule": {"type": "step", "milestones": [0.6, 0.8]}}, {"head": {"type": "linear", "offset": "-ln(C-1)"}},
        {"seed": {"choice": [1, 2]}, "random": {"n": 2}},
    ],
)  # fmt: skip
def test_what_a_grid_takes_the_schema_takes(check, change):
    content = {"probes": [PLAIN | change]}
    parse_grid(content)
    assert check(content)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0}, {"epochs": "many"}, {"optimizer": {"type": "sgd", "lr": -1}}, {"head": "lineer"}, {"hed": "linear"},
        {"head": {"type": "linear", "layers": 2}}, {"loss": {"type": "ce", "off_label": 0}}, {"optimizer": {"type": "sgd"}},
        {"schedule": {"type": "step", "milestones": 6}}, {"keep": "bset"}, {"seed": 1.5},
    ],
)  # fmt: skip
def test_what_a_grid_refuses_the_schema_refuses(check, change):
    content = {"probes": [PLAIN | change]}
    with pytest.raises(BadInput):
        parse_grid(content)
    assert not check(content)


def test_the_tables_of_the_page_are_those_of_the_classes():
    text = grid_tables.PAGE.read_text(encoding="utf-8")
    assert text == grid_tables.with_tables(text), "run python tests/support/grid_tables.py"
    assert text.count("<!-- fields:") == 6


@pytest.mark.parametrize(
    ("group", "field", "word"),
    [
        ({"optimizer": {"type": "SGD", "lr": 0.1}}, "optimizer", "sgd"), ({"optimizer": {"type": "AdamW", "lr": 0.1}}, "optimizer", "adamw"),
        ({"loss": "cross_entropy"}, "loss", "ce"), ({"loss": "CrossEntropyLoss"}, "loss", "ce"),
        ({"loss": {"type": "BCE", "off_label": "1/C"}}, "loss", "bce"), ({"head": "Linear"}, "head", "linear"),
    ],
)  # fmt: skip
def test_what_people_write_is_understood(group, field, word):
    (spec,) = parse_grid({"probes": [PLAIN | group]}).specs
    assert getattr(spec, field).type == word


def test_metrics_as_people_write_them():
    for word in ("acc", "Accuracy", "TOP1", "top-1"):
        assert parse_grid({"probes": [PLAIN], "select": {"metric": word}}).metric == "top1"


def test_a_field_outside_its_section_is_told_where_it_belongs():
    with pytest.raises(BadInput, match=r"probes\[0\].lr: unknown field; did you mean 'optimizer.lr'"):
        parse_grid({"probes": [PLAIN | {"lr": 0.1}]})


def test_an_optimizer_that_sees_all_images_asks_for_no_epochs():
    group = {key: value for key, value in PLAIN.items() if key != "epochs"}
    (spec,) = parse_grid({"probes": [group | {"optimizer": "lbfgs", "views": 0}]}).specs
    assert spec.epochs is None
    drawn = {"optimizer": {"choice": ["lbfgs"]}, "views": 0, "random": {"n": 1}}
    assert parse_grid({"probes": [group | drawn]}).specs[0].epochs is None
    (with_epochs,) = parse_grid({"probes": [PLAIN | {"optimizer": "lbfgs", "views": 0}]}).specs
    assert with_epochs.epochs == 2, "a grid of before names them, and its probes keep their ids"
    with pytest.raises(BadInput, match=r"probes\[0\].epochs: missing"):
        parse_grid({"probes": [group]})
    with pytest.raises(BadInput, match=r"probes\[0\].epochs: missing"):
        parse_grid({"probes": [group | {"optimizer": ["lbfgs", {"type": "sgd", "lr": 1}], "views": 0}]})
