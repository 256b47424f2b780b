"""Scores against scikit-learn, by hand, and by simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from featcache.probes.metrics import (
    average_precision,
    chance,
    mean_average_precision,
    score,
    top_k,
)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 8), st.booleans())
def test_map_equals_scikit_learn(seed, images, classes, ties):
    random = np.random.default_rng(seed)
    scores = random.normal(size=(3, images, classes)).astype(np.float32)
    if ties:
        scores = scores.round()
    labels = random.choice([1, 0, -1], size=(images, classes)).astype(np.int8)
    got = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    for p in range(3):
        values = []
        for c in range(classes):
            known = labels[:, c] != -1
            if (labels[:, c] == 1).any():
                values.append(average_precision_score(labels[known, c] == 1, scores[p, known, c]))
        expected = np.mean(values) if values else math.nan
        assert got[p].item() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_average_precision_by_hand():
    # Ranked: hit, miss, hit, miss: (1/1 + 2/3) / 2.
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    assert average_precision(scores, torch.tensor([True, False, True, False]))[0] == pytest.approx(5 / 6)
    # All tied: one threshold, precision 1/2.
    assert average_precision(torch.zeros(1, 4), torch.tensor([True, False, True, False]))[0] == pytest.approx(1 / 2)
    assert average_precision(scores, torch.zeros(4, dtype=torch.bool)).isnan().all()


def test_resampled_scores_are_scores_of_the_repeated_images():
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.normal(size=(2, 30, 4)).round(1))
    labels = torch.from_numpy(random.choice([1, 0, -1], size=(30, 4)).astype(np.int8))
    counts = torch.from_numpy(random.multinomial(30, [1 / 30] * 30, size=5))
    got = mean_average_precision(scores, labels, counts)
    for r in range(5):
        repeated = torch.repeat_interleave(torch.arange(30), counts[r])
        expected = mean_average_precision(scores[:, repeated], labels[repeated])
        torch.testing.assert_close(got[:, r], expected)
    classes = torch.from_numpy(random.integers(0, 4, 30))
    hits = top_k(scores, classes, 2, counts)
    repeated = torch.repeat_interleave(torch.arange(30), counts[0])
    torch.testing.assert_close(hits[:, 0], top_k(scores[:, repeated], classes[repeated], 2))


def test_top_k_equals_scikit_learn():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(2, 80, 9)), random.integers(0, 9, 80)
    for k in (1, 5):
        got = top_k(torch.from_numpy(scores), torch.from_numpy(labels), k)
        for p in range(2):
            assert got[p].item() == pytest.approx(top_k_accuracy_score(labels, scores[p], k=k, labels=range(9)))
    assert top_k(torch.randn(1, 10, 3), torch.zeros(10, dtype=torch.int64), 5).item() == 1


def test_intervals_hold_the_score_and_broken_probes_have_none():
    random = np.random.default_rng(1)
    labels = torch.from_numpy(random.integers(0, 5, 400))
    logits = torch.from_numpy(random.normal(size=(2, 400, 5))) + 2 * torch.nn.functional.one_hot(labels, 5)
    logits[1, 3, 2] = math.nan
    (value, low, high), broken = score("top1", logits, labels)
    assert low < value < high
    # About +-1.96 sqrt(p (1 - p) / n).
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(value * (1 - value) / 400), rel=0.3)
    assert all(math.isnan(v) for v in broken)


def test_chance_is_what_a_random_ranking_scores():
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.choice([1, 0, -1], p=[0.1, 0.8, 0.1], size=(60, 6)).astype(np.int8))
    simulated = mean_average_precision(torch.from_numpy(random.normal(size=(3000, 60, 6))), labels)
    error = simulated.std().item() / math.sqrt(3000)
    assert chance("map", labels, 6) == pytest.approx(simulated.mean().item(), abs=4 * error)
    assert chance("top1", None, 20) == 1 / 20 and chance("top5", None, 3) == 1
