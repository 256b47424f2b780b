"""Maps of two probes or methods compared image by image, and means by size and class."""

import csv
import re
import shutil

import numpy as np
import pytest
from scipy.stats import ttest_rel

import featcache
from featcache.errors import BadInput
from featcache.probes.runs.run_file import seal_files, write_file
from featcache.reporting.localisation import SIZES, by_class, by_size, read_localisation

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 5, "optimizer": {"type": "sgd", "lr": 0.5}},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def network(scenes, checkpoint):
    """What attribute needs for methods that run the backbone, whose maps are never empty."""
    return {"backbone": checkpoint, "dataset": "voc", "root": scenes}


@pytest.fixture(scope="module")
def explained(store, network, tmp_path_factory):
    """A run with two linear probes, both explained by two methods."""
    run = featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")
    scores = ["epg", "pointing_game", "compactness"]
    featcache.attribute(run.path, methods=["gradient", "input_x_gradient"], scores=scores, **network)
    return featcache.open_run(run.path)


@pytest.fixture(scope="module")
def probes(explained):
    return list(dict.fromkeys(row["probe"] for row in explained.scores))


def table(run):
    with open(run / "attribution.csv", newline="") as file:
        return list(csv.DictReader(file))


def values(run, probe, method, score):
    """{(image, class): score} of a side."""
    rows = (row for row in table(run) if (row["probe"], row["method"]) == (probe, method))
    return {(row["id"], row["class"]): float(row[score]) for row in rows if row[score]}


def test_two_probes_from_the_command_line(explained, probes, command):
    """Each mean, and the paired test beside a t test over the differences of the images' means."""
    words = ["compare", "--run", explained.path, "--localisation"]
    code, out, err = command(*words, "--probe", probes[0], "--probe", probes[1], "--method", "gradient")
    assert code == 0, err
    lines = [re.split("  +", line) for line in out.splitlines()]
    assert lines[0] == ["score, gradient", *probes, "uniform map %", "difference [95%]", "p", "maps", "empty"]
    assert [line[0] for line in lines[2:]] == ["EPG %", "pointing game %", "compactness %"]
    first, second = (values(explained.path, probe, "gradient", "epg") for probe in probes)
    both = [key for key in first if key in second]
    assert lines[2][1:3] == [f"{100 * np.mean([side[key] for key in both]):.1f}" for side in (first, second)]
    everything = {key for key in ((r["id"], r["class"]) for r in table(explained.path))}
    assert lines[2][-2:] == [str(len(both)), str(len(everything) - len(both))]
    by_rule = command(*words, "--select", "best map per loss", "--method", "gradient")
    assert by_rule[0] == 0 and set(by_rule[1].split()) == set(out.split())
    code, out, err = command(*words, "--select", "best map per loss")
    assert code == 0 and out.count("input_x_gradient") == 3 and out.count("gradient") == 6, err


def test_the_test_is_paired(explained, probes):
    """p agrees with scipy's paired t test, where images have one map each, to the difference of t and normal."""
    (epg, *_) = featcache.compare_localisation(explained.path, probes=probes, methods=["gradient"])
    first, second = (values(explained.path, probe, "gradient", "epg") for probe in probes)
    both = [key for key in first if key in second]
    ids = sorted({image for image, _ in both})
    away = np.array([sum(first[key] - second[key] for key in both if key[0] == image) for image in ids])
    counts = np.array([sum(key[0] == image for key in both) for image in ids])
    mean = away.sum() / counts.sum()
    # The jackknife of a ratio, by hand.
    left = np.array([(away.sum() - a) / (counts.sum() - c) for a, c in zip(away, counts, strict=True)])
    spread = np.sqrt((((mean - left) * (len(ids) - 1) / len(ids)) ** 2).sum())
    assert epg.difference == pytest.approx(mean) and epg.low <= mean <= epg.high
    half = 1.959964 * spread / np.sqrt(1 - 1.959964**2 / len(ids))
    assert (epg.low, epg.high) == pytest.approx((mean - half, mean + half))
    t = ttest_rel([first[key] for key in both], [second[key] for key in both])
    assert epg.p == pytest.approx(t.pvalue, abs=0.1)


def test_two_methods_of_one_probe_and_two_runs(explained, probes, network, command, tmp_path):
    words = ["compare", "--localisation", "--run", explained.path]
    code, out, err = command(*words, "--probe", probes[0], "--method", "gradient", "--method", "input_x_gradient")
    assert code == 0 and out.splitlines()[0].split()[2:4] == ["gradient", "input_x_gradient"], err
    # Another run was explained on fewer images: those that both have are compared.
    shutil.copytree(explained.path, tmp_path / "r")
    featcache.attribute(tmp_path / "r", probes=probes[:1], methods=["gradient"], limit=8, **network)
    fewer = len({key for key in ((row["id"], row["class"]) for row in table(tmp_path / "r"))})
    code, out, err = command(*words, "--run", tmp_path / "r", "--probe", probes[1], "--probe", probes[0])
    assert code == 0 and [line[:3] for line in out.splitlines()[2:]] == ["EPG"], err
    assert sum(map(int, out.splitlines()[2].split()[-2:])) == fewer
    (same,) = featcache.compare_localisation([explained.path, tmp_path / "r"], probes=[probes[0]] * 2)
    assert same.difference == 0 and same.p == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "gradeint"],
            "--method gradeint: attribution.csv of run R has no such maps; did you mean 'gradient'?",
        ),
        (
            ["--method", "gradient", "--method", "input_x_gradient", "--method", "lime"],
            "takes one or two methods, not 3",
        ),
        (["--store", "s.zarr"], "--store does not go with --localisation"),
    ],
)
def test_what_cannot_be_compared(explained, probes, command, words, message):
    chosen = [word for probe in probes for word in ("--probe", probe)]
    code, _, err = command("compare", "--run", explained.path, "--localisation", *chosen, *words)
    assert code == 2 and message.replace("run R", f"run {explained.path}") in err, err


def test_runs_without_maps_are_named(explained, probes, store, tmp_path, command):
    run = featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    with pytest.raises(BadInput, match="has no attribution.csv: run featcache attribute first"):
        featcache.compare_localisation(run.path, probes=probes)
    featcache.attribute(run.path, probes=probes[:1], limit=2)
    with pytest.raises(BadInput, match=f"has no maps of probe {probes[1]}: attribute it first"):
        featcache.compare_localisation(run.path, probes=probes)
    code, _, err = command("compare", "--run", run.path, "--probe", probes[0], "--method", "gradient")
    assert code == 2 and "--method goes with --localisation" in err


def test_runs_that_were_scored_differently_are_not_compared(explained, probes, tmp_path):
    for name, score in (("a", "mask_iou"), ("b", "mask_iou:threshold=0.5")):
        shutil.copytree(explained.path, tmp_path / name)
        featcache.attribute(tmp_path / name, probes=probes, scores=[score], limit=2)
    with pytest.raises(
        BadInput, match="--score was mask_iou in one and mask_iou:threshold=0.5 in the other; attribute both"
    ):
        featcache.compare_localisation([tmp_path / "a", tmp_path / "b"], probes=probes)
    assert featcache.compare_localisation(tmp_path / "b", probes=probes)[0].score == "mask IoU"


def test_other_images_with_the_same_ids_are_not_compared(explained, probes, tmp_path):
    """Their objects have other sizes. The table is that of a run whose images were numbered in the same way."""
    shutil.copytree(explained.path, tmp_path / "r")
    rows = table(explained.path)
    lines = [",".join(rows[0]), *(",".join((row | {"region_pixels": "7.0"}).values()) for row in rows)]
    entry = write_file(tmp_path / "r", "attribution.csv", "".join(f"{line}\n" for line in lines).encode())
    seal_files(tmp_path / "r", {"attribution.csv": entry})
    with pytest.raises(BadInput, match="pixels in one and 7 in the other, so these are other images"):
        featcache.compare_localisation([explained.path, tmp_path / "r"], probes=probes)


def test_means_by_size_and_class(explained, probes, command, tmp_path):
    """Every row of both tables is the mean over its own maps, and together they are all maps."""
    localisation, rows = read_localisation(explained), table(explained.path)
    sizes = by_size(explained, localisation)
    for (columns, lines), column in ((sizes, "objects"), (by_class(explained, localisation), "class")):
        at = {name: columns.index(name) for name in ("method", column, "EPG %", "maps", "empty")}
        for line in lines:
            own = [row for row in rows if (row["probe"], row["method"]) == (line[0], line[at["method"]])]
            name = line[at[column]]
            if column == "class":
                own = [row for row in own if row["class"] == name]
            else:
                low = [0, *SIZES.values()][list(SIZES).index(name)]
                own = [row for row in own if low <= float(row["region_pixels"]) < SIZES[name]]
            epg = [float(row["epg"]) for row in own if row["epg"]]
            assert line[at["EPG %"]].split()[0] == (f"{100 * np.mean(epg):.1f}" if epg else "-")
            assert (line[at["maps"]], line[at["empty"]]) == (str(len(own)), str(len(own) - len(epg)))
        assert sum(int(line[at["maps"]]) for line in lines) == len(rows)
    assert "compactness %" not in sizes[0], "it does not look at objects"
    code, _, err = command("report", "--run", explained.path, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "<th>objects</th>" in page and "<th>class</th>" in page, err
