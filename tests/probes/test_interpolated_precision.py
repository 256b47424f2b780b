"""VOC's two average precisions against their definitions, written as slowly as they read."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from featcache.probes.scores.metrics import METRICS, known_metrics, metrics_of
from featcache.probes.scores.tally import Tally

NAMES = ("map_voc10", "map_voc07", "map")


def data(seed, images=300, classes=4, probes=2, ties=False):
    """Logits [P, n, C] that know something of the labels [n, C]; some labels are unknown."""
    random = np.random.default_rng(seed)
    labels = (random.random((images, classes)) < 0.1).astype(np.int8)
    labels[random.random((images, classes)) < 0.05] = -1
    logits = random.normal(size=(probes, images, classes)) + 1.5 * (labels == 1)
    logits = np.round(logits, 1) if ties else logits
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


def by_the_devkit(logits, labels):
    """(AP of VOC2010's VOCap.m, AP of VOC2007's VOCevalcls.m), one image after another in falling order."""
    positive = labels[np.argsort(-logits, kind="stable")] == 1
    tp, fp = np.cumsum(positive), np.cumsum(~positive)
    recall, precision = tp / positive.sum(), tp / (tp + fp)
    mrec, mpre = np.r_[0, recall, 1], np.r_[0, precision, 0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    where = np.flatnonzero(mrec[1:] != mrec[:-1]) + 1
    area = ((mrec[where] - mrec[where - 1]) * mpre[where]).sum()
    points = [precision[recall >= t - 1e-12].max(initial=0) for t in np.arange(11) / 10]
    return area, np.mean(points)


def by_sklearns_curve(logits, labels):
    """The same from scikit-learn's thresholds, at which equal logits stand together."""
    precision, recall, _ = precision_recall_curve(labels == 1, logits)
    precision, recall = precision[:-1][::-1], recall[:-1][::-1]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    area = (np.diff(np.r_[0, recall]) * envelope).sum()
    return area, np.mean([precision[recall >= t - 1e-12].max(initial=0) for t in np.arange(11) / 10])


def tallied(logits, labels):
    tally = Tally(labels, labels.shape[1], [False] * len(logits), NAMES)
    tally.add(logits)
    return tally


@pytest.mark.parametrize("ties", [False, True])
def test_by_definition(ties):
    logits, labels = data(0, ties=ties)
    tally = tallied(logits, labels)
    scores, by_class = tally.scores(), tally.by_class()
    for p in range(2):
        for c in range(4):
            known = labels[:, c] >= 0
            z, y = logits[p, known, c].numpy(), labels[known, c].numpy()
            area, points = (by_sklearns_curve if ties else by_the_devkit)(z, y)
            assert by_class["map_voc10"][p, c].item() == pytest.approx(area, abs=1e-12)
            assert by_class["map_voc07"][p, c].item() == pytest.approx(points, abs=1e-12)
            assert by_class["map"][p, c].item() == pytest.approx(average_precision_score(y == 1, z), abs=1e-12)
        for name in NAMES:
            assert scores[name][p].item() == pytest.approx(by_class[name][p].mean().item(), abs=1e-12)
    assert (scores["map_voc10"] > scores["map"] + 1e-3).all(), "they are not interchangeable"


def test_the_score_without_each_group_is_the_score_of_the_other_images():
    logits, labels = data(1, images=230)
    # A class with a single positive, and one without any.
    labels[:, 2] = labels[:, 2].clamp(max=0)
    labels[7, 2] = 1
    labels[:, 3] = labels[:, 3].clamp(max=0)
    tally = tallied(logits, labels)
    for name in ("map_voc10", "map_voc07"):
        (scores, left_out) = tally._table(lambda s, without, _: (s, without), True)[name]
        assert left_out.shape == (2, 100)
        for group in (0, 7, 50, 99):
            stay = torch.arange(230) % 100 != group
            rest = tallied(logits[:, stay], labels[stay]).scores()[name]
            torch.testing.assert_close(left_out[:, group], rest, rtol=0, atol=1e-12)
        assert tally.by_class()[name][:, 3].isnan().all() and scores.isfinite().all()


def test_they_are_computed_where_a_grid_chooses_by_them():
    assert not {"map_voc10", "map_voc07"} & set(metrics_of("multi-label"))
    assert set(metrics_of("multi-label", "map_voc10")) - set(metrics_of("multi-label")) == {"map_voc10"}
    assert set(known_metrics("multi-label")) - set(metrics_of("multi-label")) == {"map_voc10", "map_voc07"}
    assert METRICS.meant("map_vissl") == "map_voc10"


def test_a_perfect_and_a_hopeless_ranking():
    labels = torch.tensor([[1], [1], [0], [0]], dtype=torch.int8)
    logits = torch.tensor([[[4.0], [3], [2], [1]], [[1.0], [2], [3], [4]]])
    scores = tallied(logits, labels).scores()
    assert scores["map_voc10"].tolist() == [1, 0.5] and scores["map_voc07"].tolist() == [1, 0.5]
