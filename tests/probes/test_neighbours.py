"""Nearest neighbours and their votes against a search written slowly in float64, and against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from featcache.errors import BadInput
from featcache.probes.heads.knn import Knn
from featcache.probes.losses.bce import Bce
from featcache.probes.losses.ce import Ce
from featcache.probes.neighbours.memory import SearchMemory
from featcache.probes.neighbours.search import Draw, Search
from featcache.probes.neighbours.selection import largest
from featcache.probes.neighbours.votes import vote

CPU = torch.device("cpu")
DISTANCES = ("cosine", "euclidean", "dot")
KS = (1, 5, 20, 50)


class Rows:
    """A matrix in the place of TrainingRows, read in tiles of an odd size."""

    def __init__(self, values, tile=37):
        self.values, self.tile = values, tile
        self.count, self.width = values.shape
        self.norms = values.double().norm(dim=1)

    def tiles(self):
        yield from zip(range(0, self.count, self.tile), self.values.split(self.tile), strict=True)

    def pick(self, rows):
        return self.values[rows]


def memory(rows, width, room=1e9, **changes):
    return replace(SearchMemory.of(room, CPU, rows, width, 2, 100), **changes)


def features(count, width=24, seed=0, spread=1.0):
    """float16 [count, width], of which every tenth row repeats the one before it."""
    random = np.random.default_rng(seed)
    values = torch.from_numpy(1 + spread * random.normal(size=(count, width))).half()
    values[10::10] = values[9:-1:10]
    return values


def similarities_in_float64(images, rows, distance):
    x, y = images.double().numpy(), rows.double().numpy()
    if distance == "euclidean":
        return -np.sqrt(np.square(x[:, None] - y[None]).sum(2))
    dots = x @ y.T
    return dots / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)) if distance == "cosine" else dots


def slowly(images, rows, distance, k, own=None, among=None):
    """Numbers and similarities of the k nearest rows, the first of equally near ones first."""
    s = similarities_in_float64(images, rows, distance).astype(np.float32)
    if own is not None:
        s[np.arange(len(s)), own] = -np.inf
    if among is not None:
        s[:, np.setdiff1d(np.arange(len(rows)), among)] = -np.inf
    order = np.argsort(-s, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(s, order, 1)


def same_neighbours(found, wanted, ks, similar=True):
    """For every k the same rows, in any order; and, if they were asked for, the similarities to float32's digits."""
    numbers, similarities = wanted
    for k in ks:
        assert (np.sort(found.rows[:, :k].numpy(), 1) == np.sort(numbers[:, :k], 1)).all()
    if similar:
        np.testing.assert_allclose(found.similarities.numpy(), similarities, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_neighbours_are_those_of_float64(distance, exact, spread):
    """Also where similarities differ by less than a product in float32 tells, and where rows are equal."""
    rows, images = features(1500, spread=spread), features(40, seed=1, spread=spread).float()
    plan = memory(1500, 24, window=256, exact=1 << 14, prepared=exact)
    (found,) = Search(Rows(rows), distance, [Draw(None, KS, exact)], plan)(images)
    wanted = slowly(images, rows, distance, max(KS))
    # A Euclidean distance is a small difference of large numbers, unless it is asked for exactly.
    same_neighbours(found, wanted, KS, exact or distance != "euclidean")
    if exact:
        assert (found.rows.numpy() == wanted[0]).all() and (found.similarities.numpy() == wanted[1]).mean() > 0.99


@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_neighbours_of_a_product_in_tf32(spread):
    """Its factors are rounded as for GPUs; then all similarities are computed again."""
    rows, images = features(1500, spread=spread), features(40, seed=1, spread=spread).float()
    search = Search(Rows(rows), "cosine", [Draw(None, KS)], memory(1500, 24, window=256))
    (found,) = search._found(images, None, search._draws, tf32=True)
    same_neighbours(found, slowly(images, rows, "cosine", max(KS)), KS)


@pytest.mark.parametrize("distance", DISTANCES)
def test_images_leave_themselves_out(distance):
    rows = features(600)
    own = torch.arange(600)
    search = Search(Rows(rows), distance, [Draw(None, KS)], memory(600, 24, window=128))
    (found,) = search(rows.float(), own)
    assert (found.rows != own[:, None]).all()
    same_neighbours(found, slowly(rows.float(), rows, distance, max(KS), own.numpy()), KS, distance != "euclidean")


def test_draws_share_a_search():
    """Each draw has the neighbours that it would have alone; a draw may be smaller than the largest k of others."""
    rows, images = features(900), features(30, seed=1).float()
    random = np.random.default_rng(3)
    drawn = [np.sort(random.choice(900, size, replace=False)) for size in (7, 60, 500)]
    draws = [Draw(None, KS), *(Draw(torch.from_numpy(d), tuple(k for k in KS if k <= len(d))) for d in drawn)]
    found = Search(Rows(rows), "cosine", draws, memory(900, 24, window=100))(images)
    for draw, among, one in zip(draws, [None, *drawn], found, strict=True):
        same_neighbours(one, slowly(images, rows, "cosine", max(draw.ks), among=among), draw.ks)


@pytest.mark.parametrize("distance", DISTANCES)
def test_hundreds_of_equal_rows(distance):
    """More of them than there are candidates: the first ones are the nearest."""
    rows = torch.cat([features(50), features(1, seed=7).expand(700, -1), features(50, seed=8)])
    images = torch.cat([features(1, seed=7), features(3, seed=9)]).float()
    (found,) = Search(Rows(rows), distance, [Draw(None, (20,), True)], memory(800, 24))(images)
    assert (found.rows.numpy() == slowly(images, rows, distance, 20)[0]).all()
    if distance != "dot":
        assert found.rows[0].tolist() == list(range(50, 70))


def test_all_rows_may_be_neighbours():
    rows, images = features(33), features(5, seed=1).float()
    (found,) = Search(Rows(rows), "cosine", [Draw(None, (33,))], memory(33, 24))(images)
    assert (found.rows.sort(1).values == torch.arange(33)).all()


@pytest.mark.parametrize(("count", "size"), [(5, 5), (100, 3), (1000, 7), (1003, 7), (4096, 100), (2999, 1)])
def test_the_largest_numbers_of_rows(count, size):
    matrix = torch.randn(9, count, generator=torch.Generator().manual_seed(count))
    values, columns = largest(matrix, size)
    assert (values.sort(1).values == matrix.topk(size, 1).values.flip(1)).all()
    assert (matrix.gather(1, columns) == values).all()


def test_a_search_keeps_within_its_memory():
    for room in (3e8, 1e9, 4e9):
        plan = SearchMemory.of(room, CPU, 50_000, 2048, 2, 257)
        assert plan.bytes <= room and plan.images >= 64
    assert SearchMemory.of(2e9, CPU, 50_000, 2048, 2, 257).prepared
    assert not SearchMemory.of(3e8, CPU, 50_000, 2048, 2, 257).held
    with pytest.raises(BadInput, match=r"--memory: a search for neighbours among 50000 images needs at least 0.* GB"):
        SearchMemory.of(1e7, CPU, 50_000, 2048, 2, 257)


# Votes


def votes_slowly(head, similarities, labels, classes):
    """Shares of the votes of one image, as the published code adds them up: float64 [C]."""
    total = np.zeros(classes)
    for s, label in list(zip(similarities.astype(np.float64), labels, strict=True))[: head.k]:
        distance = 1 - s if head.distance == "cosine" else -s
        weight = {"uniform": 1, "exp": np.exp(s / head.temperature), "inverse": 1 / distance if distance else np.inf}
        total[label] += weight[head.weights]
    return total / total.sum()


@pytest.mark.parametrize("weights", ["exp", "uniform", "inverse"])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.01])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_votes_are_those_of_published_code(weights, temperature, k):
    random = np.random.default_rng(k)
    s = torch.from_numpy(-np.sort(-random.uniform(0.2, 0.9, (50, 20)), axis=1)).float()
    labels = torch.from_numpy(random.integers(0, 6, (50, 20)))
    head = Knn(k=k, temperature=temperature, weights=weights)
    logits = vote(head, Ce(), s, labels, 6)
    wanted = np.stack([votes_slowly(head, a, b, 6) for a, b in zip(s.numpy(), labels.numpy(), strict=True)])
    np.testing.assert_allclose(logits.double().softmax(1), wanted, rtol=2e-6, atol=1e-13)
    assert (logits.argmax(1).numpy() == wanted.argmax(1)).all()
    sigmoid = vote(head, Bce(), s, labels, 6).double().sigmoid()
    np.testing.assert_allclose(sigmoid, wanted, rtol=2e-6, atol=1e-13)


def test_a_class_without_a_vote_ranks_last():
    """However far away the others are, and however small their shares."""
    s, labels = torch.tensor([[0.9, 0.1, -0.5]]), torch.tensor([[1, 2, 3]])
    logits = vote(Knn(k=3, temperature=0.02), Ce(), s, labels, 5)
    assert logits.argsort(descending=True, stable=True).tolist() == [[1, 2, 3, 0, 4]]
    assert logits.isfinite().all()


def test_several_labels_vote_class_by_class():
    """A label of -1 is no vote; read as absent, it is one against."""
    s = torch.zeros(1, 4)
    labels = torch.tensor([[[1, 1, 0, -1], [1, 0, 0, -1], [0, 1, 0, -1], [0, -1, 0, 1]]], dtype=torch.int8)
    head = Knn(k=4, weights="uniform")
    shares = vote(head, Bce(), s, labels, 4).double().sigmoid()
    np.testing.assert_allclose(shares, [[0.5, 2 / 3, 0, 1]], atol=1e-12)
    shares = vote(head, Bce(difficult="negative"), s, labels, 4).double().sigmoid()
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0, 0.25]], atol=1e-12)
    shares = vote(head, Ce(), s, labels, 4).double().softmax(1)
    np.testing.assert_allclose(shares, [[0.4, 0.4, 0, 0.2]], atol=1e-12)


@pytest.mark.parametrize(("metric", "distance"), [("cosine", "cosine"), ("euclidean", "euclidean")])
@pytest.mark.parametrize(("theirs", "ours"), [("uniform", "uniform"), ("distance", "inverse")])
def test_votes_are_scikit_learns(metric, distance, theirs, ours):
    random = np.random.default_rng(0)
    rows, images = random.normal(size=(400, 12)).astype(np.float32), random.normal(size=(60, 12)).astype(np.float32)
    images[:3] = rows[:3]
    labels = random.integers(0, 5, 400)
    model = KNeighborsClassifier(9, weights=theirs, metric=metric, algorithm="brute").fit(
        rows.astype(np.float64), labels
    )
    head = Knn(k=9, weights=ours, distance=distance)
    search = Search(Rows(torch.from_numpy(rows)), distance, [Draw(None, (9,), head.needs_exact)], memory(400, 12))
    (found,) = search(torch.from_numpy(images))
    shares = vote(head, Ce(), found.similarities, torch.from_numpy(labels)[found.rows], 5).double().softmax(1)
    wanted = model.predict_proba(images.astype(np.float64))
    # scikit-learn's own cosine of an image with itself is not always exactly 1.
    others = slice(3, None) if ours == "inverse" else slice(None)
    np.testing.assert_allclose(shares[others], wanted[others], atol=1e-5)
    assert (shares[:3].argmax(1).numpy() == wanted[:3].argmax(1)).all()
