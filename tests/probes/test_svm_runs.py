"""`featcache svm` from a store of VOC's layout to report, export, maps and resumed runs, as a user would."""

import csv
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from extracting import SIZE
from folders import CHECKOUT
from processes import stop_group

import featcache
from featcache.backbones.load import load_backbone
from featcache.demo.scenes import make_scenes
from featcache.errors import BadInput
from featcache.feature import Feature
from featcache.probes.grids.grid import parse_grid, read_grid
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.solvers.low_shot import digest_of_draw, draw_few
from featcache.probes.svm import Settings, svm_grid

pytestmark = pytest.mark.process

LAYERS = "last:pooled,layer3:pooled"
COSTS = "0.1,1,10"
PIPELINES = CHECKOUT / "pipelines/openmixup"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A VOC2007 with ten classes, some objects of which are difficult."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(root, {"train": 80, "val": 40, "test": 40})
    return root


@pytest.fixture(scope="module")
def store(scenes, checkpoint, tmp_path_factory):
    return featcache.extract(
        checkpoint, "voc", root=scenes, features="pooled,spatial,layer3:pooled,layer3:grid(2,2,0)", size=SIZE,
        dtype="float32", workers=0, batch_size=8, store=tmp_path_factory.mktemp("store") / "digits.zarr",
    )  # fmt: skip


@pytest.fixture(scope="module")
def full(store, tmp_path_factory):
    return featcache.svm(store, LAYERS, costs=[0.1, 1, 10], run=tmp_path_factory.mktemp("run") / "full")


@pytest.fixture(scope="module")
def low(store, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "low"
    return featcache.svm(
        store, "pooled", low_shot=True, shots=[1, 2, 4], samples=3, costs=[0.1, 1, 10], seed=5, run=run
    )


def rows_of(run, name):
    with open(run.path / name) as file:
        return list(csv.DictReader(file))


def test_the_table_of_layers(store, command, tmp_path, full):
    code, out, err = command("svm", "--store", store, "--features", LAYERS, "--costs", COSTS, "--run", tmp_path / "run")
    assert code == 0, err
    assert "mAP (VOC2010)" in out and "scikit-learn's" in out and "all probes are reported" in out
    for name in ("layer4:pooled", "layer3:pooled"):
        row = next(
            r for r in full.scores if r["features"] == name and r["metric"] == "map_voc10" and r["split"] == "test"
        )
        assert re.search(rf"{row['probe']} +{name} +{100 * row['value']:.1f} \[", out)
    # The same command again has nothing to do, and says the same.
    code, again, err = command(
        "svm", "--store", store, "--features", LAYERS, "--costs", COSTS, "--run", tmp_path / "run"
    )
    assert (code, again) == (0, out) and "finished already" in err


def test_by_default_every_vector_is_a_layer_and_the_run_has_the_commands_name(store, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--features", "pooled, layer3:grid(2,2,0)", "--costs", "1", "--train", "train, val")
    assert command("svm", "--store", store, *words)[0] == 0
    assert command("svm", "--store", store, "--low-shot", "--shots", "1", "--samples", "1", *words)[0] == 0
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs").iterdir())
    assert names == ["low-shot-svm", "svm"]
    grid = svm_grid(featcache.open_store(store), Settings())
    assert grid["probes"][0]["features"] == ["layer4:pooled", "layer3:pooled", "layer3:grid(2,2,0)"]
    assert grid["splits"] == {"train": ["train", "val"], "test": ["test"]}


def test_costs_choices_and_optimality_are_kept(full):
    rows = rows_of(full, "costs.csv")
    assert len(rows) == 2 * 10 * 3
    for (probe, name), own in _grouped(rows, "probe", "class").items():
        ap = [float(row["ap"]) for row in own]
        chosen = [row["chosen"] == "1" for row in own]
        assert chosen.index(True) == int(np.argmax(ap)) and sum(chosen) == 1, (probe, name)
        assert [row["excess"] != "" for row in own] == chosen
        assert all(float(row["excess"]) < 1e-6 for row in own if row["excess"])
        assert {row["folds"] for row in own} == {"3"}
    choice = load_probe(full.path, rows[0]["probe"]).choice
    assert choice.ap[0] == [float(row["ap"]) for row in rows[:3]]
    assert featcache.verify(full.path) == []


def _grouped(rows, *fields):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return groups


def test_the_reference_engine_finds_the_same(store, full, tmp_path):
    other = featcache.svm(store, LAYERS, costs=[0.1, 1, 10], engine="liblinear", run=tmp_path / "run")
    for a, b in zip(rows_of(full, "costs.csv"), rows_of(other, "costs.csv"), strict=True):
        assert float(a["ap"]) == pytest.approx(float(b["ap"]), abs=5e-3)
    for a, b in zip(full.scores, other.scores, strict=True):
        if a["metric"].startswith("map"):
            assert a["value"] == pytest.approx(b["value"], abs=5e-3)


def test_what_difficult_means(store, tmp_path, full):
    """In training by default nothing, under parity absent; in scores nothing."""
    losses = {}
    for parity in (None, "openmixup"):
        run = featcache.svm(store, "pooled", costs=[1.0], parity=parity, run=tmp_path / str(parity))
        losses[parity] = yaml.safe_load((run.path / "grid.yaml").read_text())["probes"][0]["loss"]["difficult"]
        assert run.scored_on == "test" and run.chosen_on is None
    assert losses == {None: "ignored", "openmixup": "negative"}
    opened = featcache.open_store(store)
    labels = np.concatenate([opened[name].labels for name in ("train", "val")])
    assert (labels == -1).any() and (opened["test"].labels == -1).any()


class TestLowShot:
    def test_samples_are_seeds_and_their_draws_are_recorded(self, store, low):
        opened = featcache.open_store(store)
        labels = np.concatenate([opened[name].labels for name in ("train", "val")])
        fields = {row["probe"]: row for row in low.scores}
        draws = {row["probe"]: row["draw"] for row in rows_of(low, "costs.csv") if row["draw"]}
        assert len(draws) == 9 and len(set(draws.values())) == 9
        for probe, draw in draws.items():
            k, seed = int(fields[probe]["optimizer.positives"]), int(fields[probe]["seed"])
            assert seed in (5, 6, 7) and draw == digest_of_draw(draw_few(labels, k, 19, seed))

    def test_the_table(self, store, low, command, tmp_path):
        words = (
            "--features",
            "pooled",
            "--low-shot",
            "--shots",
            "1,2,4",
            "--samples",
            3,
            "--costs",
            COSTS,
            "--seed",
            5,
        )
        code, out, err = command("svm", "--store", store, *words, "--run", low.path)
        assert code == 0, err
        for k in ("1", "2", "4"):
            values = [
                row["value"] for row in low.scores
                if (row["metric"], row["split"], row["optimizer.positives"]) == ("map_voc10", "test", k)
            ]  # fmt: skip
            assert len(values) == 3
            numbers = (statistics.fmean(values), min(values), max(values), statistics.stdev(values))
            assert re.search(rf"layer4:pooled +{k} +3 +" + " +".join(f"{100 * v:.2f}" for v in numbers), out), out
        assert "std (ddof 1)" in out and "k = 1: no cross-validation, cost 1" in out and "k = 2: 2 folds" in out

    def test_a_single_shot_alone_is_not_said_to_be_cross_validated(self, store, command, tmp_path):
        words = ("--features", "pooled", "--low-shot", "--shots", 1, "--samples", 1, "--run", tmp_path / "run")
        code, out, err = command("svm", "--store", store, *words)
        assert code == 0 and "k = 1: no cross-validation, cost 1" in out and "stratified" not in out, err

    def test_parity_chooses_the_cost_on_test(self, store, command, tmp_path):
        words = ("--features", "pooled", "--low-shot", "--shots", "1,4", "--samples", 2, "--costs", COSTS)
        code, out, err = command("svm", "--store", store, *words, "--parity", "openmixup", "--run", tmp_path / "run")
        assert code == 0, err
        run = featcache.open_run(tmp_path / "run")
        assert "std (ddof 0)" in out and "too good" in out and run.summary["probes"] == 2 * 2 * 3
        test = [row for row in run.scores if row["metric"] == "map_voc10" and row["split"] == "test"]
        for k in ("1", "4"):
            means = {}
            for costs, own in _grouped([r for r in test if r["optimizer.positives"] == k], "optimizer.costs").items():
                means[costs[0]] = [row["value"] for row in own]
            best = max(means, key=lambda cost: statistics.fmean(means[cost]))
            numbers = (
                statistics.fmean(means[best]),
                min(means[best]),
                max(means[best]),
                statistics.pstdev(means[best]),
            )
            line = " +".join(f"{100 * v:.2f}" for v in numbers)
            assert re.search(rf"layer4:pooled +{k} +2 +{line} +{float(best):g}", out), out


@pytest.mark.parametrize("metric", ["map", "map_voc07", "map_voc10"])
def test_the_metric_in_use_is_printed(store, command, tmp_path, metric):
    words = ("--features", "pooled", "--costs", "1", "--metric", metric, "--run", tmp_path / "run")
    code, out, err = command("svm", "--store", store, *words)
    title = {"map": "mAP", "map_voc07": "mAP (VOC2007, 11 points)", "map_voc10": "mAP (VOC2010)"}[metric]
    assert code == 0 and f"test {title} % [95%]" in out and f"\n{title}: the mean over classes" in out
    assert featcache.open_run(tmp_path / "run").metric == metric


def test_report_compare_attribute_and_export(store, scenes, checkpoint, full, low, command, tmp_path):
    page = tmp_path / "page.html"
    assert command("report", "--run", full.path, "--run", low.path, "--out", page)[0] == 0
    text = page.read_text()
    assert "Costs: full" in text and "Costs: low" in text and "mAP (VOC2010)" in text and "k = 2: 2 folds" in text
    assert len(re.findall(r"<td><strong>", text)) == (2 + 9) * 10, "a cost for each probe and class"
    probes = {row["features"]: row["probe"] for row in full.scores}
    words = [word for probe in probes.values() for word in ("--probe", probe)]
    code, out, err = command("compare", "--run", full.path, *words)
    assert code == 0 and "mAP (VOC2010) %" in out, err
    methods = ("--method", "gradcam,input_x_gradient", "--backbone", checkpoint, "--dataset", "voc", "--root", scenes)
    code, out, err = command(
        "attribute", "--run", full.path, "--probe", probes["layer4:pooled"], "--limit", 4, *methods
    )
    assert code == 0 and "input_x_gradient" in out, err
    given = ("--run", full.path, "--probe", probes["layer4:pooled"], "--backbone", checkpoint)
    code, _, err = command("export", *given, "--to", tmp_path / "merged.pth")
    assert code == 2 and "the head normalises its features (norm: l2)" in err and "FILE.pt2" in err
    assert command("export", *given, "--to", tmp_path / "merged.pt2")[0] == 0
    program = torch.export.load(tmp_path / "merged.pt2").module()
    images = torch.randn(3, 3, SIZE, SIZE)
    backbone = load_backbone(checkpoint, arch="resnet18", size=SIZE)
    with torch.inference_mode():
        features = next(iter(backbone(images, [Feature("layer4", "pooled")]).values())).double()
    features = features / (features.norm(dim=1, keepdim=True) + 1e-5)
    weights = load_probe(full.path, probes["layer4:pooled"]).weights
    expected = features @ weights["fc0.weight"].double().t() + weights["fc0.bias"].double()
    torch.testing.assert_close(program(images).double(), expected, atol=1e-4, rtol=1e-4)


def test_a_killed_run_ends_with_the_same_bytes(store, tmp_path):
    words = [
        sys.executable, "-m", "featcache", "svm", "--store", store, "--engine", "liblinear", "--low-shot", "--shots", "2",
        "--samples", "3", "--costs", "0.1,1,10",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*words, "--run", tmp_path / "whole"], env=environment, check=True, capture_output=True)
    struck = tmp_path / "struck"
    process = subprocess.Popen(
        [*words, "--run", struck], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while not list(struck.glob("probes/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    stop_group(process)
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(list(struck.glob("probes/*.safetensors"))) < 3 and "key" not in (struck / "run.json").read_text()
    done = subprocess.run([*words, "--run", struck], env=environment, check=True, capture_output=True, text=True)
    assert "probes are trained already" in done.stderr
    files = {path.relative_to(struck) for path in struck.rglob("*") if path.is_file() and path.name != "run.json"}
    assert files == {
        p.relative_to(tmp_path / "whole")
        for p in (tmp_path / "whole").rglob("*")
        if p.name != "run.json" and p.is_file()
    }
    for name in files:
        assert (struck / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert featcache.verify(struck) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "layer2:pooled"], "the store holds no feature 'layer2:pooled'"),
        (["--costs", "voc08"], "--costs voc08: expected voc07, vissl, or numbers; did you mean 'voc07'?"),
        (["--costs", ","], "--costs ,: expected voc07, vissl, or numbers"),
        (["--costs", "0,1"], "is not a number above 0"),
        (["--costs", "1,1"], "is not a list of one or more costs, each once"),
        (["--folds", "40"], "in training, and each of 40 folds needs one; take fewer folds, or a single cost"),
        (
            ["--low-shot", "--shots", "2,64"],
            "and 64 shots are drawn; take a smaller optimizer.positives (--shots)",
        ),
        (["--low-shot", "--shots", "99"], "svm: probes[0]: "),
        (["--low-shot", "--shots", "0"], "--shots: expected whole numbers of at least 1, each once, not [0]"),
        (["--low-shot", "--shots", "1,x"], "'1,x' is not a whole number, or several with commas between them"),
        (["--parity", "openmix"], "--parity openmix: svm has only openmixup; did you mean 'openmixup'?"),
        (["--metric", "map_voc"], "'map_voc' is not one of"),
        (["--metric", "top1"], "'top1' does not fit multi-label labels"),
        (["--train", "trn"], "has no split 'trn'; did you mean 'train'?"),
        (["--train", "train", "--test", "train"], "the roles must be kept apart"),
    ],
)
def test_bad_input_is_one_line(store, command, tmp_path, words, message):
    code, out, err = command("svm", "--store", store, "--run", tmp_path / "run", *words)
    assert code == 2 and message in err and "Traceback" not in err and not out
    assert not (tmp_path / "run/run.json").exists()


def test_a_feature_that_the_store_lacks_comes_with_the_command_that_adds_it(store, command):
    code, _, err = command("svm", "--store", store, "--features", "layer2:pooled")
    assert code == 2
    features = "layer4:pooled,layer4:spatial,layer3:pooled,layer3:grid(2,2,0),layer2:pooled"
    assert "featcache extract --backbone CKPT" in err and "--dataset voc2007" in err
    assert f"--features '{features}'" in err and " --store " in err


def test_the_python_function_checks_its_arguments(store):
    for given, message in (
        ({"shots": [1.5], "low_shot": True}, "--shots: expected whole numbers"),
        ({"costs": []}, "is not a list of one or more costs"),
        ({"samples": 0}, "samples: expected a whole number of at least 1"),
        ({"engine": "sklearn"}, "is not one of newton, liblinear"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            featcache.svm(store, **given)


class TestRecipes:
    """The files in pipelines/openmixup are what the command does."""

    def specs(self, store, low_shot, parity, features):
        asked = Settings(features=features, low_shot=low_shot, parity=parity)
        return parse_grid(svm_grid(featcache.open_store(store), asked))

    @pytest.mark.parametrize(
        ("name", "low_shot", "parity"),
        [
            ("voc07_svm", False, None),
            ("voc07_svm", False, "openmixup"),
            ("voc07_low_shot_svm", True, None),
            ("voc07_low_shot_svm_openmixup", True, "openmixup"),
        ],
    )
    def test_a_recipe_is_the_commands_grid(self, store, name, low_shot, parity):
        recipe = read_grid(PIPELINES / f"{name}.yaml", parity)
        grid = self.specs(store, low_shot, parity, "pooled")
        ours = {s.configuration: s.seed for s in grid.specs}
        theirs = {spec.features for spec in recipe.specs}
        assert theirs == {
            "feat1:grid(10,10,4)",
            "feat2:grid(16,8,0)",
            "feat3:grid(13,5,0)",
            "feat4:grid(8,3,0)",
            "feat5:grid(6,1,0)",
        }
        alike = [spec for spec in recipe.specs if spec.features == "feat5:grid(6,1,0)"]
        assert {replace(s, features="layer4:pooled", name="") for s in alike} == {
            replace(s, name="") for s in grid.specs
        }
        assert len(ours) * (5 if low_shot else 1) == len(alike) and len(recipe.specs) == 5 * len(alike)
        assert recipe.metric == grid.metric == "map_voc10" and recipe.chosen_on == grid.chosen_on
        assert recipe.splits["test"] == grid.splits["test"] and recipe.splits["train"] == ("train", "val")
