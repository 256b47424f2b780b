"""The draws, lists and folds of training images: sizes, strata, nesting, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from featcache.errors import BadInput
from featcache.probes.sample import digest, draw_rows, fold_numbers, listed_rows, positives, random_order

CLASSES = [f"class {n}" for n in range(7)]
random = np.random.default_rng(0)
SINGLE = random.choice(7, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.06, 0.04], size=1000)
MULTI = random.choice([1, 0, -1], p=[0.15, 0.8, 0.05], size=(1000, 7)).astype(np.int8)
# What draws give.
ORDER = [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
SHOTS = [2, 9, 14, 16, 18, 28]
MULTI[:, 6] = random.random(1000) < 0.02


@pytest.mark.parametrize("labels", [SINGLE, MULTI], ids=["single", "multi"])
def test_draws_are_nested_and_differ_by_their_seed(labels):
    def drawn(**how):
        return set(draw_rows(labels, CLASSES, **how).tolist())

    assert drawn(label_fraction=0.05) < drawn(label_fraction=0.1) < drawn(label_fraction=0.5)
    assert drawn(shots=1) < drawn(shots=2) < drawn(shots=8)
    assert drawn(shots=4) == drawn(shots=4) != drawn(shots=4, draw=1)
    rows = draw_rows(labels, CLASSES, shots=4)
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()


def test_a_class_has_its_share_and_its_shots():
    counts = positives(SINGLE, 7)
    for fraction in (0.05, 0.1, 0.37):
        assert (positives(SINGLE[draw_rows(SINGLE, CLASSES, fraction)], 7) == np.floor(fraction * counts + 0.5)).all()
        assert abs(len(draw_rows(MULTI, CLASSES, fraction)) - fraction * 1000) <= 4, "half an image for each stratum"
    assert (positives(SINGLE[draw_rows(SINGLE, CLASSES, shots=9)], 7) == 9).all()
    assert (positives(MULTI[draw_rows(MULTI, CLASSES, shots=9)], 7) >= 9).all()


def test_shots_of_several_labels_are_the_first_of_each_class():
    order = random_order(1000, 3).tolist()
    expected = {row for c in range(7) for row in [row for row in order if MULTI[row, c] == 1][:5]}
    assert set(draw_rows(MULTI, CLASSES, shots=5, draw=3).tolist()) == expected


def test_draws_are_the_same_on_every_machine():
    """Literal rows: another version of numpy, or another machine, must not draw others."""
    assert random_order(10, 0).tolist() == ORDER
    assert draw_rows(np.arange(30) % 3, CLASSES[:3], shots=2, draw=1).tolist() == SHOTS
    assert digest(["a", "b"]) == "7e18f737311b2dc3"


def test_what_leaves_a_class_empty_is_refused():
    with pytest.raises(BadInput, match="a share of 0.01 holds no image of class 'class 6', which has .* larger share"):
        draw_rows(SINGLE, CLASSES, label_fraction=0.01)
    with pytest.raises(
        BadInput, match="64 images of each class are asked for, and class 'class 6' has .*; 2 classes have too few"
    ):
        draw_rows(SINGLE, CLASSES, shots=64)
    with pytest.raises(BadInput, match=r"class 'class 6' has \d+ images, and each of 60 folds needs one"):
        fold_numbers(SINGLE, CLASSES, 60)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_hold_their_share_of_every_class(folds):
    numbers = fold_numbers(SINGLE, CLASSES, folds)
    counts = np.array([positives(SINGLE[numbers == fold], 7) for fold in range(folds)])
    known = [positives(SINGLE[held], 7) for _, held in StratifiedKFold(folds).split(SINGLE, SINGLE)]
    assert np.ptp(counts, axis=0).max() <= np.ptp(np.array(known), axis=0).max() <= 1, "as balanced as scikit-learn's"
    assert np.ptp(np.bincount(numbers)) <= 1
    numbers = fold_numbers(MULTI, CLASSES, folds)
    counts = np.array([positives(MULTI[numbers == fold], 7) for fold in range(folds)])
    assert (np.ptp(counts, axis=0) <= 0.25 * counts.mean(0) + 2).all() and np.ptp(np.bincount(numbers)) <= 10
    assert np.ptp(counts[:, 6]) <= 1, "the rarest class is dealt first"
    assert (numbers == fold_numbers(MULTI, CLASSES, folds)).all()
    assert (numbers != fold_numbers(MULTI, CLASSES, folds, draw=1)).any()


@given(st.lists(st.integers(0, 2), min_size=6, max_size=40), st.integers(1, 3), st.integers(0, 2**32))
def test_shots_draw_from_every_class_or_refuse(labels, shots, draw):
    labels = np.array(labels)
    counts = positives(labels, 3)
    if (counts < shots).any():
        with pytest.raises(BadInput, match=f"{shots} images of each class"):
            draw_rows(labels, CLASSES[:3], shots=shots, draw=draw)
    else:
        assert (positives(labels[draw_rows(labels, CLASSES[:3], shots=shots, draw=draw)], 3) == shots).all()


IDS = ["n01_1", "n01_2", "n02_1", "n02_2"]
LABELS = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    "lines",
    [
        ["n01_2", "n02_1"],
        ["n01_2.JPEG", "n02_1.JPEG"],
        ["n01/n01_2.JPEG", "n02/n02_1.JPEG"],
        ["n02/n02_1.JPEG 1", "", "n01/n01_2.JPEG 0"],
    ],
)
def test_lists_as_they_are_published(tmp_path, lines):
    (tmp_path / "1percent.txt").write_text("\n".join(lines))
    assert listed_rows(tmp_path / "1percent.txt", IDS, LABELS, ["a", "b"]).tolist() == [1, 2]


def test_ids_with_folders_and_endings(tmp_path):
    (tmp_path / "l.txt").write_text("0.png\nb/1")
    assert listed_rows(tmp_path / "l.txt", ["a/0.png", "b/1.png"], LABELS[1:3], ["a", "b"]).tolist() == [0, 1]
    (tmp_path / "l.txt").write_text("a b/0 c.png 0\na b/1.png")
    assert listed_rows(tmp_path / "l.txt", ["a b/0 c.png", "a b/1"], LABELS[1:3] * 0, ["a"]).tolist() == [0, 1]
    (tmp_path / "l.txt").write_text("a/0\nb/0")
    assert listed_rows(tmp_path / "l.txt", ["a/0.png", "b/0.png"], LABELS[1:3], ["a", "b"]).tolist() == [0, 1]
    (tmp_path / "l.txt").write_text("0.png\n")
    with pytest.raises(BadInput, match="line 1: '0.png' is the name of 2 training images; the store calls them"):
        listed_rows(tmp_path / "l.txt", ["a/0.png", "b/0.png"], LABELS[1:3], ["a", "b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01_9\n", "line 1: 'n01_9' is the name of no training image; the store calls them 'n01_1'"),
        ("n01_1\n\nn01_1.JPEG\n", "line 3: names 'n01_1', as line 1 does"),
        ("n01_1 1\n", "line 1: gives 'n01_1' the class 1, and in the store it is of class 0"),
        ("n01_1 x\n", "line 1: 'n01_1 x' is the name of no training image"),
        ("n01_1\nn01_2\n", "holds no image of class 'b', which has 2"),
        ("", "is empty"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, message):
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(BadInput) as caught:
        listed_rows(tmp_path / "l.txt", IDS, LABELS, ["a", "b"])
    assert message in caught.value.message and str(tmp_path / "l.txt") in caught.value.message
