"""The convex engine against scikit-learn, and against itself in other company."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from featcache.probes.solvers.convex import Columns, Eigenbasis, solve

N, D, C = 150, 10, 3


@pytest.fixture(scope="module", params=[D, 400], ids=["more images", "more features"])
def problem(request):
    """Features with a mean and scales that differ, targets, weights with zeros among them, and folds of each class."""
    random = np.random.default_rng(2)
    dim = request.param
    features = (random.normal(size=(N, dim)) + 0.5) * np.geomspace(0.1, 2, dim) * (D / dim) ** 0.5
    scores = features @ random.normal(size=(dim, C)) + random.normal(size=(N, C))
    targets = np.where(scores > np.quantile(scores, 0.8, axis=0), 1, -1)
    weights = np.where(targets > 0, 2.0, 1.0) * (random.random((N, C)) > 0.1)
    folds = np.ones((N, C, 3), dtype=bool)
    for c in range(C):
        for fold in range(2):
            folds[random.permutation(N)[: N // 3], c, fold] = False
    return [torch.from_numpy(array) for array in (features, targets, weights, folds)]


def test_squared_hinge_is_liblinears(problem):
    """Weights, biases and the decisions of all images, for every class, fold and cost."""
    features, targets, weights, folds = problem
    costs = torch.tensor([1e-3, 0.1, 10.0], dtype=torch.float64)
    found = solve(Eigenbasis(features, "penalised"), Columns("squared_hinge", targets, 1 / costs, weights, folds))
    assert found.converged.all() and (found.distance <= 1e-5).all()
    for c, fold, p in np.ndindex(C, 3, 3):
        share = (weights[:, c] * folds[:, c, fold]).numpy()
        model = LinearSVC(C=float(costs[p]), tol=1e-10, max_iter=1_000_000, random_state=0)
        model.fit(features.numpy(), targets[:, c].numpy(), sample_weight=share)
        size = (np.square(model.coef_).sum() + np.square(model.intercept_).sum()) ** 0.5
        assert np.abs(found.weights[c, fold, p].numpy() - model.coef_[0]).max() < 3e-5 * size
        assert abs(float(found.biases[c, fold, p]) - model.intercept_[0]) < 3e-5 * size
        decisions = model.decision_function(features.numpy())
        np.testing.assert_allclose(
            found.decisions[c, fold, p].numpy(), decisions, rtol=0, atol=1e-4 * np.abs(decisions).max()
        )
        margin = 1 - targets[:, c].numpy() * decisions
        theirs = (share * np.square(margin.clip(min=0))).sum() + size**2 / (2 * costs[p])
        assert float(found.objectives[c, fold, p]) == pytest.approx(float(theirs), rel=1e-7)


def test_logistic_is_scikit_learns(problem):
    features, targets, weights, folds = problem
    costs = torch.tensor([[1e-3, 1.0], [0.01, 10.0], [0.1, 0.1]], dtype=torch.float64)
    found = solve(Eigenbasis(features), Columns("logistic", targets, 1 / costs, weights, folds[:, 0]))
    assert found.converged.all()
    for c, fold, p in np.ndindex(C, 3, 2):
        share = (weights[:, c] * folds[:, 0, fold]).numpy()
        model = LogisticRegression(C=float(costs[c, p]), tol=1e-10, max_iter=10_000, solver="newton-cg")
        model.fit(features.numpy(), targets[:, c].numpy(), sample_weight=share)
        assert np.abs(found.weights[c, fold, p].numpy() - model.coef_[0]).max() < 3e-5 * np.linalg.norm(model.coef_)
        np.testing.assert_allclose(
            found.decisions[c, fold, p].numpy(), model.decision_function(features.numpy()), rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
@pytest.mark.parametrize("bias", ["free", "penalised", "none"])
def test_a_column_does_not_see_its_neighbours(problem, loss, bias, monkeypatch):
    """Nor whether columns are worked in slices, nor whether the images are kept in the basis."""
    features, targets, weights, folds = problem
    decays = torch.tensor([3.0, 1e-2, 1e-5], dtype=torch.float64)
    together = solve(Eigenbasis(features, bias), Columns(loss, targets, decays, weights, folds))
    assert together.converged.all()
    monkeypatch.setattr("featcache.probes.solvers.convex.basis.KEPT_BYTES", 0)
    monkeypatch.setattr("featcache.probes.solvers.convex.basis.CHUNK_ROWS", 64)
    monkeypatch.setattr("featcache.probes.solvers.convex.path.SLICE_BYTES", 1)
    basis = Eigenbasis(features, bias)
    for c, fold, p in ((0, 0, 0), (1, 2, 1), (2, 1, 2)):
        share = (weights[:, c] * folds[:, c, fold]).unsqueeze(1)
        alone = solve(basis, Columns(loss, targets[:, [c]], decays[[p]], share), decisions=False)
        assert alone.decisions is None
        gap = (alone.weights[0, 0, 0] - together.weights[c, fold, p]).norm()
        assert gap <= 2e-5 * alone.weights.norm()


def test_a_column_says_how_far_from_its_optimum_it_is(problem):
    features, targets, *_ = problem
    basis, columns = Eigenbasis(features), Columns("logistic", targets, torch.tensor([1e-3, 1e-6]).double())
    best = solve(basis, columns, tolerance=1e-9)
    for steps in (1, 3, 6):
        short = solve(basis, columns, steps=steps)
        assert (short.steps <= steps).all()
        gap = (short.weights - best.weights).norm(dim=3) / short.weights.norm(dim=3)
        assert (gap <= short.distance + 1e-6).all()
        assert torch.equal(short.converged, short.distance <= 1e-5)
        above = short.objectives - best.objectives
        bound = columns.decays / 2 * (short.distance * short.weights.norm(dim=3)).square()
        assert (above <= bound * 1.001 + 1e-9).all()
    assert not solve(basis, columns, steps=1).converged.any()


def test_a_fold_without_images_has_no_weights(problem):
    features, targets, *_ = problem
    folds = torch.zeros(N, 1)
    found = solve(Eigenbasis(features, "penalised"), Columns("squared_hinge", targets, torch.ones(1), folds=folds))
    assert found.converged.all() and not found.weights.any() and not found.distance.any()


def test_nothing_is_claimed_of_features_that_are_not_finite(problem):
    features, targets, *_ = problem
    features = features.clone()
    features[3, 2] = torch.inf
    found = solve(Eigenbasis(features), Columns("logistic", targets, torch.ones(1)))
    assert not found.converged.any() and found.weights.isnan().all() and found.gradient.isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("loss", "bias"), [("logistic", "free"), ("squared_hinge", "penalised")])
def test_a_gpu_finds_the_same(problem, loss, bias):
    features, targets, weights, folds = problem
    decays = torch.tensor([3.0, 1e-2]).double()
    expected = solve(Eigenbasis(features, bias), Columns(loss, targets, decays, weights, folds))
    features, *rest = (tensor.cuda() for tensor in (features, targets, decays, weights, folds))
    found = solve(Eigenbasis(features, bias), Columns(loss, *rest))
    assert found.converged.all() and found.weights.device.type == "cuda"
    gap = (found.weights.cpu() - expected.weights).norm(dim=3)
    assert (gap <= 2e-5 * expected.weights.norm(dim=3)).all()
