"""Localisation scores by hand, by loops, and on uniform maps."""

import numpy as np
import pytest
import torch

import featcache
from featcache.attribution.scores import SCORES
from featcache.attribution.scores.box_iou import BoxIoU
from featcache.attribution.scores.compactness import Compactness
from featcache.attribution.scores.complexity import Complexity
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.attribution.scores.pointing_game import PointingGame
from featcache.reporting.localisation import MARK, _cells

MASK = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)


def maps_and_masks(count=12, side=16):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(count, side, side, generator=generator)
    return maps, torch.rand(count, side, side, generator=generator) < 0.3


def test_the_pointing_game_by_hand():
    inside = torch.tensor([[0, 3, 0], [0, 0, 0], [0, 0, 2.0]])
    outside, none = inside.flip(0, 1) * 2, -inside.abs() - 1
    values = PointingGame().measure(torch.stack([inside, outside, none]), MASK.expand(3, 3, 3))
    assert values[:2].tolist() == [1, 0] and values[2].isnan()
    assert PointingGame().uniform(MASK[None]).item() == pytest.approx(4 / 9)


def test_box_iou_by_hand():
    #  The values of at least 0.5 * 4 lie in rows 0..1 and columns 1..2: 2 of those 4 pixels are in the mask of 4.
    map_ = torch.tensor([[0, 4, 0], [0, 0, 2], [1, 0, -9.0]])
    assert BoxIoU(threshold=0.5).measure(map_[None], MASK[None]).item() == pytest.approx(2 / 6)
    assert BoxIoU(threshold=0.2).measure(map_[None], MASK[None]).item() == pytest.approx(4 / 9)
    assert BoxIoU().measure(-map_.abs()[None], MASK[None]).isnan()
    assert BoxIoU().uniform(MASK[None]).item() == pytest.approx(4 / 9)


def test_compactness_is_half_the_relative_mean_difference():
    """The Gini index by its other definition, over all pairs of pixels."""
    maps, masks = maps_and_masks()
    for got, map_ in zip(Compactness().measure(maps, masks), maps, strict=True):
        values = map_.clamp(min=0).flatten().double().numpy()
        gini = np.abs(values[:, None] - values[None]).mean() / (2 * values.mean())
        assert got.item() == pytest.approx(gini)
    one = torch.zeros(1, 16, 16).index_put((torch.tensor(0), torch.tensor(3), torch.tensor(4)), torch.tensor(7.0))
    assert Compactness().measure(one, masks[:1]).item() == pytest.approx(255 / 256)


def test_complexity_is_the_entropy():
    maps, masks = maps_and_masks()
    for got, map_ in zip(Complexity().measure(maps, masks), maps, strict=True):
        shares = map_.clamp(min=0).flatten().double().numpy()
        shares = shares[shares > 0] / shares.sum()
        assert got.item() * 8 == pytest.approx(-(shares * np.log2(shares)).sum())
    half = torch.zeros(1, 16, 16)
    half[:, :8] = 3
    assert Complexity().measure(half, masks[:1]).item() == pytest.approx(7 / 8)


@pytest.mark.parametrize("score", [score for score in SCORES.values() if issubclass(score, LocalisationScore)])
def test_every_score_has_its_level_of_chance_and_none_of_an_empty_map(score):
    maps, masks = maps_and_masks()
    made = score.model_validate({})
    values = made.measure(maps, masks)
    assert values.dtype == torch.float64 and ((values >= 0) & (values <= 1)).all()
    assert made.measure(-maps.abs() - 1, masks).isnan().all()
    torch.testing.assert_close(made.measure(7 * maps, masks), values)
    level = made.uniform(masks)
    if score is PointingGame:
        # Which pixel is the largest of a uniform map is chance.
        hits = torch.stack([PointingGame().measure(torch.rand(12, 16, 16), masks) for _ in range(2000)]).mean(0)
        torch.testing.assert_close(hits, level, rtol=0, atol=0.05)
    else:
        torch.testing.assert_close(made.measure(torch.ones(12, 16, 16), masks), level, rtol=0, atol=1e-12)


def test_a_mean_over_few_of_the_maps_is_marked():
    rows = [{"id": str(n), "epg": 0.5 if n < 2 else None, "box_share": 0.3} for n in range(349)]
    assert MARK in _cells(rows, "epg", "box_share")[0]
    assert MARK not in _cells(rows[:4], "epg", "box_share")[0]


def test_scores_are_chosen_with_fields(store, command, tmp_path):
    grid = {
        "probes": [
            {
                "features": "pooled",
                "head": "linear",
                "loss": "bce",
                "epochs": 1,
                "optimizer": {"type": "sgd", "lr": 0.5},
            }
        ]
    }
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    words = ["attribute", "--run", run.path, "--limit", 3]
    scores = "epg,pointing_game,box_iou:threshold=0.5,compactness,complexity"
    code, out, err = command(*words, "--score", scores)
    assert code == 0, err
    for heading in ("EPG %", "pointing game %", "box IoU %", "compactness %", "complexity %"):
        assert heading in out.splitlines()[0]
    code, _, err = command("report", "--run", run.path, "--out", tmp_path / "page.html")
    assert code == 0 and "notice" not in err and "lower is simpler" in (tmp_path / "page.html").read_text()
    code, _, err = command(*words, "--score", "box_iou,box_iou:threshold=0.5")
    assert code == 2 and "twice with different fields" in err
    code, _, err = command(*words, "--score", "box_iou:threshold=2")
    assert code == 2 and "--score box_iou:threshold=2: threshold: input should be less than or equal to 1" in err


def test_a_random_head_stands_beside_each_probe(store, command, tmp_path):
    grid = {"features": "spatial", "head": ["linear", {"type": "mlp", "hidden": 8}], "loss": "bce", "epochs": 1}
    grid |= {"optimizer": {"type": "sgd", "lr": 0.5}}
    run = featcache.train_probes({"probes": [grid]}, store=store, run=tmp_path / "r")
    probes = list(dict.fromkeys(row["probe"] for row in run.scores))
    chosen = [word for probe in probes for word in ("--probe", probe)]
    tables = []
    for seed in (0, 1):
        code, out, err = command("attribute", "--run", run.path, *chosen, "--limit", 4, "--sanity", "--seed", seed)
        assert code == 0, err
        assert out.count("gradcam (random head)") == 2 and out.count("gradcam") == 4
        tables.append([line.split(",") for line in (run.path / "attribution.csv").read_text().splitlines()])
    plain = featcache.attribute(run.path, probes=probes, limit=4)
    for left, right in zip(*tables, strict=True):
        assert left[:2] == right[:2] and (left == right) == ("random head" not in left[1]), "the seed draws it"
    assert len(tables[0]) - 1 == 2 * len(plain)
    code, _, err = command("report", "--run", run.path, "--out", tmp_path / "page.html")
    assert code == 0, err
