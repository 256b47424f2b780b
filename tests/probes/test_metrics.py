"""Scores against scikit-learn, by hand, by slow loops, and by simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import Loss
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from featcache.probes.losses.loss import LossFunction
from featcache.probes.scores import average_precision as ap_module
from featcache.probes.scores import gatherers
from featcache.probes.scores.average_precision import average_precision
from featcache.probes.scores.evidence import BINS
from featcache.probes.scores.jackknife import Z, fraction_interval, influences, interval, paired_test
from featcache.probes.scores.metrics import gain, metric_kind, metrics_of
from featcache.probes.scores.tally import Tally


def tallied(kind, logits, labels, losses, chunk=7):
    """A tally of numpy logits [P, N, C] that were added in chunks."""
    assert kind == ("multi-label" if labels.ndim == 2 else "single-label")
    tally = Tally(torch.from_numpy(labels), logits.shape[2], [loss == "ce" for loss in losses])
    for part in torch.from_numpy(logits.astype(np.float32)).split(chunk, dim=1):
        tally.add(part)
    return tally


def multi_label(seed, images, classes, probes=3, ties=False):
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(probes, images, classes)).astype(np.float32)
    labels = random.choice([1, 0, -1], p=[0.3, 0.6, 0.1], size=(images, classes)).astype(np.int8)
    return logits.round() if ties else logits, labels


def sklearn_map(scores, labels):
    values = []
    for c in range(labels.shape[1]):
        known = labels[:, c] != -1
        if (labels[:, c] == 1).any():
            values.append(average_precision_score(labels[known, c] == 1, scores[known, c]))
    return np.mean(values) if values else math.nan


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 8), st.booleans())
def test_map_equals_scikit_learn(seed, images, classes, ties):
    logits, labels = multi_label(seed, images, classes, ties=ties)
    got = tallied("multi-label", logits, labels, ["bce"] * 3).scores()["map"]
    for p in range(3):
        assert got[p].item() == pytest.approx(sklearn_map(logits[p], labels), abs=1e-12, nan_ok=True)


def test_a_score_that_hangs_on_one_image_has_a_wide_interval():
    """Without it no class is left; what remains of the sums by rounding must not count."""
    logits, labels = next(kinds(1845423, 3, 6))[1:]
    scores, deviation, count = tallied("multi-label", logits, labels, ["ce"] * 3).estimates()["map"]
    low, high = fraction_interval(scores, deviation, count)
    assert deviation.isnan().all() and (high - low > 0.7).all()


def test_average_precision_by_hand():
    # Ranked: hit, miss, hit, miss: (1/1 + 2/3) / 2.
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    truth = torch.tensor([True, False, True, False])
    assert average_precision(scores, truth)[0].item() == pytest.approx(5 / 6)
    # All tied: one threshold, precision 1/2.
    assert average_precision(torch.zeros(1, 4), truth)[0].item() == pytest.approx(1 / 2)
    # Without each: miss, hit, miss; hit, hit, miss; hit, miss, miss; hit, miss, hit.
    value, change = average_precision(scores, truth, leave_out=True)
    assert (value + change)[0].tolist() == pytest.approx([1 / 2, 1, 1, 5 / 6])


def kinds(seed, images, classes, ties=False):
    """(kind of labels, logits [3, N, C], labels) of both tasks, of random images."""
    logits, labels = multi_label(seed, images, classes, ties=ties)
    yield "multi-label", logits, labels
    yield "single-label", logits, np.random.default_rng(seed).integers(0, classes, images)


def drawn_in(whole, without, labels):
    """mAP without an image, in which a class of K > 1 positives has moved by sqrt(1 - 1 / K) of the way."""
    positives = torch.from_numpy((labels == 1).sum(0)).double()
    share = torch.where(positives > 1, 1 - 1 / positives, 1).sqrt()
    return (whole + share * (without - whole)).nanmean(1)


@pytest.mark.process
@pytest.mark.parametrize("loss", ["bce", "ce"])
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 7), st.booleans())
def test_scores_without_an_image_are_those_of_the_other_images(loss, seed, images, classes, ties):
    """Down to classes of one image and ties; in pieces of a few images and probes, as large splits have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ap_module, "AT_ONCE", {"cpu": 40})
        patch.setattr(gatherers, "AT_ONCE", {"cpu": 40})
        for kind, logits, labels in kinds(seed, images, classes, ties):
            tally = tallied(kind, logits, labels, [loss] * 3)
            got = tally.influences()
            for i in range(images):
                rest = np.arange(images) != i
                others = tallied(kind, logits[:, rest], labels[rest], [loss] * 3)
                without = others.scores()
                if kind == "multi-label":
                    without["map"] = drawn_in(tally.by_class()["map"], others.by_class()["map"], labels)
                for metric, (scores, found) in got.items():
                    expected = (scores - without[metric]) * (images - 1) / images
                    torch.testing.assert_close(found[:, i], expected, rtol=0, atol=1e-11, equal_nan=True, msg=metric)


@pytest.mark.parametrize("loss", ["bce", "ce"])
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.sampled_from([0, 1, 50]))
def test_an_interval_holds_its_estimate(loss, seed, images, classes, ties, knowing):
    """From a single image up, of probes that know nothing to those that are always right; never of no width."""
    for kind, logits, labels in kinds(seed, images, classes, ties):
        truth = labels if kind == "multi-label" else np.eye(classes)[labels]
        tally = tallied(kind, logits + knowing * truth, labels, [loss] * 3)
        for metric, (scores, *found) in tally.estimates().items():
            low, high = interval(scores, *found, metric_kind(metric).bounds)
            if metric_kind(metric).bounds[1] > 1:
                assert (low.isnan() | ((0 <= low) & (low <= scores) & (scores <= high))).all()
            else:
                assert (scores.isnan() | ((0 <= low) & (low <= scores) & (scores <= high) & (high <= 1))).all()
                assert (scores.isnan() | (low < high)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 8))
def test_precision_recall_f1_equal_scikit_learn(seed, images, classes):
    """Where a label is -1, prediction and truth count as 0, as How-to-Probe has it."""
    logits, labels = multi_label(seed, images, classes)
    got = tallied("multi-label", logits, labels, ["bce", "focal", "asymmetric"]).scores()
    for p in range(3):
        said = (1 / (1 + np.exp(-logits[p].astype(np.float64))) >= 0.5) & (labels >= 0)
        for average in ("macro", "micro"):
            # A single class is a column of booleans, which scikit-learn would take for two classes.
            padded = [np.hstack([a, np.zeros((images, 1), bool)]) for a in (labels == 1, said)]
            names = range(classes)
            expected = precision_recall_fscore_support(*padded, labels=names, average=average, zero_division=0)[:3]
            for name, value in zip(("precision", "recall", "f1"), expected, strict=True):
                assert got[f"{name}_{average}"][p].item() == pytest.approx(value, abs=1e-9)


def test_top_k_balanced_accuracy_and_nll_equal_scikit_learn():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(2, 80, 9)).astype(np.float32), random.integers(0, 8, 80)
    got = tallied("single-label", logits, labels, ["ce", "ce"]).scores()
    for p in range(2):
        probabilities = np.exp(logits[p].astype(np.float64))
        probabilities /= probabilities.sum(1, keepdims=True)
        for k in (1, 5):
            expected = top_k_accuracy_score(labels, logits[p], k=k, labels=range(9))
            assert got[f"top{k}"][p].item() == pytest.approx(expected)
        seen = np.isin(logits[p].argmax(1), labels)
        recalls = [np.mean(logits[p].argmax(1)[labels == c] == c) for c in np.unique(labels)]
        assert got["balanced_accuracy"][p].item() == pytest.approx(np.mean(recalls))
        if seen.all():
            expected = balanced_accuracy_score(labels, logits[p].argmax(1))
            assert got["balanced_accuracy"][p].item() == pytest.approx(expected)
        assert got["nll"][p].item() == pytest.approx(log_loss(labels, probabilities, labels=range(9)))
    few = tallied("single-label", logits[:, :, :3], labels % 3, ["ce", "ce"]).scores()
    assert few["top5"].eq(1).all()


def test_a_constant_gets_no_credit():
    labels = np.arange(40) % 4
    got = tallied("single-label", np.zeros((1, 40, 4)), labels, ["ce"]).scores()
    assert got["top1"].item() == got["balanced_accuracy"].item() == 0.25
    assert got["nll"].item() == pytest.approx(math.log(4)) and got["ece"].item() == pytest.approx(0)


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("single", [True, False])
def test_nll_is_the_loss_that_a_probe_is_trained_with(single, loss):
    logits, labels = multi_label(3, 60, 5)
    # An image without a class adds nothing to ce but counts there; a softmax cannot be judged by it.
    labels[:, 0] = np.where((labels == 1).any(1), labels[:, 0], 1)
    labels = np.random.default_rng(0).integers(0, 5, 60) if single else labels
    kind = "single-label" if single else "multi-label"
    got = tallied(kind, logits, labels, [loss] * 3).scores()["nll"]
    stacked = torch.from_numpy(logits).double().transpose(0, 1)
    expected, _ = LossFunction(Loss(loss), torch.from_numpy(labels), 5)(stacked, torch.from_numpy(labels))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("single", [True, False])
def test_ece_by_a_slow_loop(single, loss):
    """Guo et al. 2017 for one label an image; for several, over all pairs of image and class."""
    logits, labels = multi_label(4, 90, 5, probes=1)
    labels = np.random.default_rng(0).integers(0, 5, 90) if single else labels
    pairs = []
    for values, truth in zip(logits[0].astype(np.float64), labels, strict=True):
        known = np.ones(5, bool) if single else truth >= 0
        exp = np.exp(values) * known
        p = exp / exp.sum() if loss == "ce" else 1 / (1 + np.exp(-values))
        if single:
            pairs.append((p.max(), float(p.argmax() == truth)))
        elif loss == "bce":
            pairs += [(p[c], float(truth[c] == 1)) for c in range(5) if known[c]]
        elif (truth == 1).any():
            pairs += [(p[c], (truth[c] == 1) / (truth == 1).sum()) for c in range(5) if known[c]]
    error, table = 0, np.zeros((BINS, 3))
    for b in range(BINS):
        inside = [(p, y) for p, y in pairs if b / BINS < p <= (b + 1) / BINS]
        if inside:
            table[b] = len(inside), sum(p for p, _ in inside), sum(y for _, y in inside)
            error += len(inside) / len(pairs) * abs(np.mean([p for p, _ in inside]) - np.mean([y for _, y in inside]))
    tally = tallied("single-label" if single else "multi-label", logits, labels, [loss])
    assert tally.scores()["ece"].item() == pytest.approx(error, abs=1e-9)
    np.testing.assert_allclose(tally.calibration()[0], table, atol=1e-9)


def test_a_probe_is_scored_as_if_it_were_alone():
    logits, labels = multi_label(5, 200, 6, probes=5)
    losses = ["bce", "bce", "ce", "focal", "ce"]
    logits[3, 17, 2] = math.nan
    for kind, truth in (("multi-label", labels), ("single-label", labels.argmax(1).astype(np.int64))):
        together = tallied(kind, logits, truth, losses).estimates()
        assert set(together) == set(metrics_of(kind))
        for p in (0, 2, 4):
            alone = tallied(kind, logits[p : p + 1], truth, losses[p : p + 1]).estimates()
            for metric, columns in alone.items():
                assert all(torch.equal(a[p], b[0]) for a, b in zip(together[metric], columns, strict=True)), (
                    "to the bit"
                )
        assert all(column[3].isnan() for columns in together.values() for column in columns), "a broken probe"


def test_intervals_by_hand():
    random = np.random.default_rng(1)
    labels = random.integers(0, 5, 400)
    logits = random.normal(size=(1, 400, 5)) + 2 * np.eye(5)[labels]
    scores, deviation, count = tallied("single-label", logits, labels, ["ce"]).estimates()["top1"]
    p = scores.item()
    assert count.item() == 400
    assert deviation.item() == pytest.approx(math.sqrt(p * (1 - p) / 400))
    # Wilson's interval of a share.
    low, high = fraction_interval(scores, deviation, count)
    half = Z / (1 + Z**2 / 400) * math.sqrt(p * (1 - p) / 400 + Z**2 / 4 / 400**2)
    centre = (p + Z**2 / 800) / (1 + Z**2 / 400)
    assert (low.item(), high.item()) == pytest.approx((centre - half, centre + half))
    # All right, of 400 images: Wilson's, too. Of a single image next to nothing is known.
    one, none = torch.ones(1).double(), torch.zeros(1).double()
    assert [end.item() for end in fraction_interval(one, none, count)] == pytest.approx([400 / (400 + Z**2), 1])
    assert [end.item() for end in fraction_interval(one, none * math.nan, one)] == pytest.approx([1 / (1 + Z**2), 1])


def test_the_paired_test_holds_its_level_and_finds_differences():
    """Under no difference p is uniform; the mean of paired normals stands in for a score."""
    random = np.random.default_rng(0)
    values = torch.from_numpy(random.normal(size=(2000, 100)))
    nothing = (0.0, torch.zeros(100).double())

    def mean(row):
        total = row.sum()
        return (total / 100).item(), influences(total / 100, (total - row) / 99)

    p = np.array([paired_test(mean(row), nothing)[3] for row in values])
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.015) and np.mean(p < 0.5) == pytest.approx(0.5, abs=0.035)
    difference, low, high, p = paired_test(mean(values[0] + 1), mean(values[0]))
    assert (difference, low, high) == pytest.approx((1, 1, 1)) and p == pytest.approx(math.erfc(10 / math.sqrt(2)))
    assert paired_test(mean(values[0]), mean(values[0]))[1:] == (0, 0, 1)
    for row in values[:200]:
        _, low, high, p = paired_test(mean(row), nothing)
        assert (p < 0.05) == (not low <= 0 <= high)
    # McNemar's: 30 images that only the first has right, 15 that only the second has.
    first, second = torch.zeros(2, 100).double()
    first[:30], second[30:45] = 1, 1
    assert paired_test(mean(first), mean(second))[3] == pytest.approx(math.erfc(15 / math.sqrt(45) / math.sqrt(2)))


def drawn(kind, images, generator, probes=1, classes=20):
    """Logits [P, N, 20] of probes of the same worth, and labels: 6% positives in each class, or one class an image."""
    labels = torch.rand(images, classes, generator=generator) < 0.06
    if kind == "single-label":
        labels = torch.eye(classes)[torch.randint(classes, (images,), generator=generator)] > 0
    logits = torch.randn(probes, images, classes, generator=generator) + 2 * labels - 2
    return logits, labels.to(torch.int8) if kind == "multi-label" else labels.int().argmax(1)


def estimated(kind, logits, labels, loss="bce"):
    tally = Tally(labels, logits.shape[2], [loss == "ce"] * len(logits))
    tally.add(logits)
    return tally


@pytest.mark.slow
@pytest.mark.parametrize("images", [150, 2000])
@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("kind", ["multi-label", "single-label"])
def test_intervals_cover_the_score_expected_of_as_many_images(kind, loss, images):
    """In 92 to 98 of 100 draws of images. That of ECE where it is near 0, its sign unsure, more often."""
    generator, found = torch.Generator().manual_seed(images), {}
    for _ in range(1000 if images < 1000 else 300):
        logits, labels = drawn(kind, images, generator)
        for metric, (score, *rest) in estimated(kind, 2 * logits, labels, loss).estimates().items():
            found.setdefault(metric, []).append(
                torch.stack([score, *interval(score, *rest, metric_kind(metric).bounds)])
            )
    for metric, rows in found.items():
        score, low, high = torch.cat(rows, dim=1)
        cover = ((low <= score.mean()) & (score.mean() <= high)).double().mean().item()
        assert 0.92 <= cover <= (1 if metric == "ece" else 0.98), (metric, cover)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi-label", "single-label"])
def test_the_paired_test_finds_no_difference_where_there_is_none(kind):
    """Two probes of the same worth differ at 0.05 in one of twenty draws of 150 images."""
    generator, p = torch.Generator().manual_seed(0), {}
    for _ in range(1000):
        for metric, (scores, each) in estimated(kind, *drawn(kind, 150, generator, 2)).influences().items():
            pair = [(score.item(), influence) for score, influence in zip(scores, each, strict=True)]
            p.setdefault(metric, []).append(paired_test(*pair)[3] < 0.05)
    for metric, found in p.items():
        # ECE near 0, its sign unsure, differs less than its deviation says, and so do means over small classes.
        low = {"ece": 0, "map": 0.04, "top1": 0.04}.get(metric, 0.03)
        assert low <= np.mean(found) <= 0.065, (metric, np.mean(found))


def chance(metric, labels, classes):
    return metric_kind(metric)(type=metric).chance(labels, classes)


def test_chance_is_what_a_random_ranking_scores():
    random = np.random.default_rng(0)
    labels = random.choice([1, 0, -1], p=[0.1, 0.8, 0.1], size=(60, 6)).astype(np.int8)
    simulated = tallied("multi-label", random.normal(size=(3000, 60, 6)), labels, ["bce"] * 3000, chunk=60)
    values = simulated.by_class()["map"].mean(1)
    error = values.std().item() / math.sqrt(3000)
    assert chance("map", torch.from_numpy(labels), 6) == pytest.approx(values.mean().item(), abs=4 * error)
    assert chance("top1", None, 20) == chance("balanced_accuracy", None, 20) == 1 / 20
    assert chance("top5", None, 3) == 1 and chance("nll", None, 3) is None


def test_lower_is_better_for_some():
    assert (
        gain("map", 0.6) > gain("map", 0.5) and gain("nll", 0.5) > gain("nll", 0.6) and gain("ece", 0) > gain("ece", 1)
    )
