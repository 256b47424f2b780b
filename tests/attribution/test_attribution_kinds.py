"""Attribution methods and localisation scores that other packages bring, and what is wrong with some of these."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from plugins import install, with_plugins

import featcache
from featcache.attribution.methods import METHODS
from featcache.attribution.protocols import PROTOCOLS
from featcache.attribution.scores import SCORES
from featcache.attribution.scores.epg import EPG

SOURCE = '''
from typing import ClassVar, Literal

from torch.nn.functional import interpolate

from featcache.attribution.methods.method import Method
from featcache.attribution.scores.localisation_score import LocalisationScore


class Length(Method):
    """The length of the features at each position, whatever the head."""

    type: Literal["length"] = "length"

    def explain(self, heads, feature, batch):
        maps = interpolate(batch.cached(feature).norm(dim=1, keepdim=True), (batch.size, batch.size))
        return [maps[batch.images, 0] for _ in heads]


class Small(Length):
    """Maps that are as small as the features."""

    type: Literal["small"] = "small"

    def explain(self, heads, feature, batch):
        return [batch.cached(feature)[batch.images].norm(dim=1) for _ in heads]


class PointingGame(LocalisationScore):
    """Pointing game: whether the largest value is inside the boxes of the class explained."""

    type: Literal["pointing"] = "pointing"
    heading: ClassVar[str] = "pointing game"
    columns: ClassVar[tuple[str, str]] = ("pointing", "pointing_chance")
    lacking: ClassVar[str] = "largest value"

    def measure(self, maps, masks):
        at = maps.flatten(1).argmax(1, keepdim=True)
        return masks.flatten(1).gather(1, at)[:, 0].double()

    def uniform(self, masks):
        return masks.double().mean((1, 2))
'''
METHOD, SCORE = "featcache.attribution_methods", "featcache.localisation_scores"
GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 2, "optimizer": {"type": "sgd", "lr": 0.5}},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A folder with an installed package that brings two methods and a score."""
    folder = tmp_path_factory.mktemp("plugins")
    kinds = {METHOD: {"length": "Length", "small": "Small"}, SCORE: {"pointing": "PointingGame"}}
    install(folder, SOURCE, kinds)
    return folder


@pytest.mark.process
def test_a_package_brings_a_method_and_a_score(run, store, plugins, command, tmp_path):
    words = ["attribute", "--run", run, "--limit", 5]
    code, out, err = with_plugins(plugins, *words, "--method", "gradcam,length", "--score", "pointing,epg")
    assert code == 0, err
    lines = out.splitlines()
    assert "pointing game %" in lines[0] and "EPG %" in lines[0]
    assert [("length" in line, "gradcam" in line) for line in lines[2:6]] == [(False, True)] * 2 + [(True, False)] * 2
    with open(run / "attribution.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[5:] == ["pointing", "pointing_chance", "epg", "box_share", "region_pixels"]
    assert {row["method"] for row in rows} == {"gradcam", "length"}
    assert [row["pointing_chance"] for row in rows] == [row["box_share"] for row in rows]
    test = featcache.open_store(store)["test"]
    for row in (row for row in rows if row["method"] == "length"):
        number = test.ids.index(row["id"])
        features = test["spatial"][number]  # [D, 2, 2], a position of which is 32 pixels of the input
        y, x = np.unravel_index(np.linalg.norm(features, axis=0).argmax(), (2, 2))
        boxes, classes, difficult = test.boxes[number]
        height, width = test.sizes[number]
        at_x, at_y = (32 * x + 0.5) * width / 64, (32 * y + 0.5) * height / 64
        own = boxes[(classes == featcache.open_store(store).classes.index(row["class"])) & ~difficult]
        assert float(row["pointing"]) == any(b[0] <= at_x < b[2] and b[1] <= at_y < b[3] for b in own)
    code, _, err = with_plugins(plugins, "report", "--run", run, "--out", tmp_path / "page.html")
    assert code == 0 and "notice" not in err, err
    page = (tmp_path / "page.html").read_text()
    assert "<th>pointing game %</th>" in page and "<td>length</td>" in page
    assert "Pointing game: whether the largest value is inside" in page
    # Where the package is not installed, its score is left out, and its method's rows are read as any other's.
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    assert code == 0 and "scores that are not installed (pointing, pointing_chance)" in err
    page = (tmp_path / "page.html").read_text()
    assert "pointing game %" not in page and "<td>length</td>" in page and "<th>EPG %</th>" in page


@pytest.mark.process
def test_maps_of_another_shape_are_refused(run, plugins):
    code, _, err = with_plugins(plugins, "attribute", "--run", run, "--limit", 2, "--method", "small")
    assert code == 2 and "--method small: its maps are (" in err and "and must be (" in err and "Traceback" not in err
    assert not (run / "attribution.csv").exists()


BROKEN = {
    "that cannot be imported": (
        [("import nothing_of_that_name\n", {METHOD: {"odd": "Odd"}})],
        "method 'odd': plugin0:Odd of package plugin0 cannot be imported: ModuleNotFoundError: No module named",
    ),
    "that call two methods the same": (
        [(SOURCE, {METHOD: {"length": "Length"}}), (SOURCE, {METHOD: {"length": "Length"}})],
        "two methods are called 'length': one of package plugin",
    ),
    "that calls a method like one of featcache": (
        [(SOURCE, {METHOD: {"gradcam": "Length"}})],
        "two methods are called 'gradcam': one of featcache and plugin0:Length of package plugin0",
    ),
    "that brings a score as a method": (
        [(SOURCE, {METHOD: {"pointing": "PointingGame"}})],
        "method 'pointing': plugin0:PointingGame of package plugin0 is no Method",
    ),
    "that brings a score that is none": (
        [("pointing = 1\n", {SCORE: {"pointing": "pointing"}})],
        "score 'pointing': plugin0:pointing of package plugin0 is no Score",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("packages, message", BROKEN.values(), ids=BROKEN)
def test_broken_packages_are_one_line(run, tmp_path, packages, message):
    for number, (source, kinds) in enumerate(packages):
        install(tmp_path, source, kinds, f"plugin{number}")
    code, _, err = with_plugins(tmp_path, "attribute", "--run", run)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not (run / "attribution.csv").exists()


def test_a_methods_fields_are_written_behind_its_name(run, scenes, checkpoint, command):
    """The column of a method, its label in tables, and what it says at the end."""
    backbone = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes]
    methods = "intgrad:steps=2,smoothgrad:samples=2:noise=0.1,gradient"
    code, out, err = command("attribute", "--run", run, "--limit", 2, "--method", methods, *backbone)
    assert code == 0, err
    assert "intgrad:steps=2: completeness_gap: median" in err and "smoothgrad:samples=2:noise=0.1" in out
    with open(run / "attribution.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {bool(row["completeness_gap"]) for row in rows if row["method"] == "intgrad:steps=2"} == {True}
    assert {row["completeness_gap"] for row in rows if row["method"] != "intgrad:steps=2"} == {""}
    code, _, err = command("report", "--run", run, "--out", run.parent / "page.html")
    assert code == 0 and "notice" not in err, err


def test_every_kind_is_documented_and_chosen_by_its_own_name():
    for registry in (METHODS, SCORES, PROTOCOLS):
        for name, kind in registry.items():
            assert kind.word() == name and kind.summary().endswith(".")


def test_the_level_of_chance_is_what_a_uniform_map_scores():
    masks = torch.rand(20, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(EPG().uniform(masks), masks.double().mean((1, 2)))


def test_methods_are_documented():
    """By their classes, and by the rows of a table that says what they need."""
    text = (Path(__file__).parents[2] / "docs/attribution.md").read_text()
    for name, kind in METHODS.items():
        assert kind.summary().endswith(".") and kind.serves and kind.paper, name
        row = next((line for line in text.splitlines() if line.startswith(f"| `{name}` | ")), None)
        if row is not None:
            assert (row.split("|")[2].strip() == "store") != kind.runs_backbone, row
            assert all(f"`{field}=" in row for field in kind.model_fields if field != "type"), row
