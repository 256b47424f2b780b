"""Support vector machines: against scikit-learn, class by class, and against definitions that are written out."""

import hashlib

import numpy as np
import pytest
import torch
from parts import Head, Loss
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from featcache.errors import BadInput
from featcache.probes.grids.grid import parse_grid
from featcache.probes.heads.module import HeadModule
from featcache.probes.solvers.low_shot import digest_of_draw, draw_few
from featcache.probes.solvers.stratified import stratified_folds
from featcache.probes.solvers.svm import COSTS, Svm
from featcache.probes.spec import ProbeSpec, spec_from_dict, spec_to_dict

IMAGES, WIDTH, CLASSES = 150, 24, 3
HEAD = {"norm": "l2", "pool": "before"}
EXACT = {"tol": 1e-10, "max_iter": 1_000_000}


@pytest.fixture(scope="module")
def data():
    """Features float32 [N, D], labels int8 [N, C] with some that are difficult."""
    random = np.random.default_rng(0)
    labels = (random.random((IMAGES, CLASSES)) < [0.3, 0.2, 0.12]).astype(np.int8)
    labels[random.random(labels.shape) < 0.06] = -1
    features = np.abs(random.normal(size=(IMAGES, WIDTH)) + (labels == 1) @ random.normal(size=(CLASSES, WIDTH)))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def spec_of(difficult="ignored", bias=True, seed=0, norm="l2", weight=2.0, **fields):
    loss = Loss("squared_hinge", positive_weight=weight, difficult=difficult)
    return ProbeSpec("svm", "l:pooled", Head("linear", bias=bias, norm=norm, pool="before"), loss, Svm(**fields),
                     epochs=None, views=0, seed=seed)  # fmt: skip


def fit_of(data, spec):
    (fit,) = spec.optimizer.fit([spec], *data, CLASSES)
    return fit


def normalised(features):
    features = features.double().numpy()
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def signs_of(labels, difficult):
    """int8 [N, C]: 1, -1, and 0 for images that a class does not have."""
    y = np.where(labels.numpy() == 1, 1, -1)
    return np.where((labels.numpy() < 0) & (difficult == "ignored"), 0, y)


def by_sklearn(features, signs, costs, weight=2.0, folds=3):
    """What VISSL's scripts do with one class: (average precision of each cost, the cost, weights, bias)."""
    used = signs != 0
    x, y = features[used], signs[used]

    def machine(cost):
        return LinearSVC(C=cost, class_weight={1: weight, -1: 1}, loss="squared_hinge", random_state=0, **EXACT)

    table = [cross_val_score(machine(cost), x, y, cv=folds, scoring="average_precision").mean() for cost in costs]
    chosen = costs[int(np.argmax(table))]
    fitted = machine(chosen).fit(x, y)
    return table, chosen, fitted.coef_[0], fitted.intercept_[0]


@pytest.mark.parametrize("engine", ["newton", "liblinear"])
@pytest.mark.parametrize("difficult", ["ignored", "negative"])
def test_costs_and_machines_are_scikit_learns(data, engine, difficult):
    costs = (0.01, 0.1, 1.0, 10.0)
    fit = fit_of(data, spec_of(difficult, costs=costs, engine=engine))
    features, signs = normalised(data[0]), signs_of(data[1], difficult)
    near = 2e-6 if engine == "newton" else 2e-3
    for c in range(CLASSES):
        table, cost, weight, bias = by_sklearn(features, signs[:, c], costs)
        assert fit.choice.ap[c] == pytest.approx(table, abs=1e-9 if engine == "newton" else 2e-3)
        assert costs[fit.choice.chosen[c]] == cost and fit.choice.folds[c] == 3
        reach = np.abs(features @ weight + bias).max()
        mine = features @ fit.weights["fc0.weight"][c].double().numpy() + fit.weights["fc0.bias"][c].item()
        assert np.abs(mine - (features @ weight + bias)).max() <= near * reach
    assert fit.converged and fit.choice.draw is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["l2", "none"])
def test_a_single_cost_is_not_cross_validated(data, bias, norm):
    spec = spec_of(costs=(0.7,), bias=bias, norm=norm, weight=1.5)
    fit = fit_of(data, spec)
    assert np.isnan(fit.choice.ap).all() and fit.choice.folds == [0] * CLASSES
    assert set(fit.weights) == {"fc0.weight"} | ({"fc0.bias"} if bias else set())
    features = normalised(data[0]) if norm == "l2" else data[0].double().numpy()
    for c, sign in enumerate(signs_of(data[1], "ignored").T):
        used = sign != 0
        exact = LinearSVC(C=0.7, class_weight={1: 1.5, -1: 1}, fit_intercept=bias, random_state=0, **EXACT)
        exact.fit(features[used], sign[used])
        np.testing.assert_allclose(fit.weights["fc0.weight"][c], exact.coef_[0], rtol=2e-4, atol=2e-5)


def test_the_excess_bounds_how_far_the_objective_is_above_its_minimum(data):
    """Stopped early, a machine says so, and its objective is within the bound that it gives."""

    def objective(fit, c, sign, features):
        w, b = fit.weights["fc0.weight"][c].double().numpy(), fit.weights["fc0.bias"][c].item()
        short = np.maximum(0, 1 - sign * (features @ w + b))[sign != 0]
        scale = np.where(sign[sign != 0] > 0, 2.0, 1.0)
        return (w @ w + b * b) / 2 + 10 * (scale * short**2).sum()

    best, early = (
        fit_of(data, spec_of(costs=(10.0,), **how)) for how in ({}, {"engine": "liblinear", "iterations": 3})
    )
    assert best.converged and not early.converged
    assert max(best.choice.excess) < 1e-9 < min(early.choice.excess)
    features = normalised(data[0])
    for c, sign in enumerate(signs_of(data[1], "ignored").T):
        low, high = objective(best, c, sign, features), objective(early, c, sign, features)
        assert 0 < high - low <= early.choice.excess[c] * high + 1e-9


def test_folds_are_scikit_learns():
    random = np.random.default_rng(0)
    for folds in (2, 3, 5):
        for _ in range(40):
            positive = random.random(random.integers(20, 70)) < random.uniform(0.2, 0.8)
            expected = np.empty(len(positive), int)
            if min(positive.sum(), (~positive).sum()) < folds:
                continue
            for number, (_, held) in enumerate(StratifiedKFold(folds).split(positive, positive)):
                expected[held] = number
            np.testing.assert_array_equal(stratified_folds(positive, folds), expected)


def test_the_lists_of_costs():
    assert len(COSTS["voc07"]) == 19 and COSTS["voc07"][:4] == (1, 10, 100, 0.0625) and COSTS["voc07"][-1] == 0.5**19
    assert COSTS["vissl"] == (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)


class TestLowShot:
    def test_every_class_draws_its_own_images(self, data):
        labels = data[1].numpy()
        draws = {(k, seed): draw_few(labels, k, 4, seed) for k in (1, 3, 6) for seed in range(5)}
        for (k, _), drawn in draws.items():
            assert ((drawn == 1).sum(0) == k).all() and ((drawn == 0).sum(0) == 4 * k).all()
            assert (labels[drawn >= 0] == drawn[drawn >= 0]).all(), "difficult labels are never drawn"
        assert len({digest_of_draw(drawn) for drawn in draws.values()}) == 15
        again = draw_few(labels, 3, 4, 2)
        assert digest_of_draw(again) == digest_of_draw(draws[3, 2]) == hashlib.sha256(again.tobytes()).hexdigest()[:16]

    def test_a_draw_is_the_same_on_every_machine(self):
        labels = np.random.PCG64(7).random_raw(200).reshape(50, 4) % 3 == 0
        assert digest_of_draw(draw_few(labels.astype(np.int8), 2, 5, 1)) == "4dcd560bb728381f"

    def test_all_images_are_equally_likely(self):
        labels = np.zeros((40, 1), np.int8)
        labels[:20] = 1
        counts = sum((draw_few(labels, 5, 1, seed) >= 0).astype(int) for seed in range(2000))[:, 0]
        assert np.abs(counts / 2000 - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 2000)

    @pytest.mark.parametrize("engine", ["newton", "liblinear"])
    def test_each_class_is_trained_on_its_draw(self, data, engine):
        costs, k = (0.1, 1.0, 10.0), 6
        fit = fit_of(data, spec_of(costs=costs, positives=k, negatives=5, seed=3, engine=engine))
        drawn = draw_few(data[1].numpy(), k, 5, 3)
        assert fit.choice.draw == digest_of_draw(drawn)
        features = normalised(data[0])
        for c in range(CLASSES):
            sign = np.where(drawn[:, c] == 1, 1, np.where(drawn[:, c] == 0, -1, 0))
            table, cost, weight, _ = by_sklearn(features, sign, costs)
            assert fit.choice.ap[c] == pytest.approx(table, abs=1e-9 if engine == "newton" else 2e-2)
            assert costs[fit.choice.chosen[c]] == cost
            np.testing.assert_allclose(fit.weights["fc0.weight"][c], weight, atol=2e-3 * np.abs(weight).max())

    def test_few_shots_have_as_many_folds_and_one_shot_has_none(self, data):
        folds = {k: fit_of(data, spec_of(costs=(0.1, 1.0, 10.0), positives=k)).choice for k in (1, 2, 3, 5)}
        assert {k: choice.folds for k, choice in folds.items()} == {k: [{1: 0, 2: 2}.get(k, 3)] * 3 for k in folds}
        assert folds[1].chosen == [1] * 3, "the cost that is nearest to 1"


def test_probes_do_not_depend_on_their_neighbours(data):
    specs = [spec_of(costs=c, positives=p, seed=s) for c in ((0.1, 1.0), (5.0,)) for p, s in ((0, 0), (4, 1), (4, 2))]
    together = specs[0].optimizer.fit(specs, *data, CLASSES)
    for spec, fit in zip(specs, together, strict=True):
        alone = fit_of(data, spec)
        for name, weights in alone.weights.items():
            torch.testing.assert_close(fit.weights[name], weights, atol=1e-6, rtol=1e-5)
        assert fit.choice.chosen == alone.choice.chosen and fit.choice.draw == alone.choice.draw
        np.testing.assert_array_equal(fit.choice.ap, alone.choice.ap)


def test_single_labels_are_one_against_the_rest(data):
    single = torch.arange(IMAGES) % CLASSES
    one_hot = torch.nn.functional.one_hot(single, CLASSES).to(torch.int8)
    spec = spec_of(costs=(1.0, 10.0))
    fits = [spec.optimizer.fit([spec], data[0], labels, CLASSES)[0] for labels in (single, one_hot)]
    assert torch.equal(fits[0].weights["fc0.weight"], fits[1].weights["fc0.weight"])


def test_the_losses_of_a_fit_are_those_of_the_loss(data):
    spec = spec_of(costs=(1.0,))
    fit = fit_of(data, spec)
    x, y = normalised(data[0]), signs_of(data[1], "ignored")
    z = x @ fit.weights["fc0.weight"].double().numpy().T + fit.weights["fc0.bias"].double().numpy()
    for value, logits in zip(fit.losses, (np.zeros_like(z), z), strict=True):
        losses = np.where(y > 0, 2, 1) * np.maximum(0, 1 - y * logits) ** 2
        assert value == pytest.approx(losses[y != 0].mean(), rel=1e-6)


class TestHeadsWithANorm:
    def test_stack_and_module_divide_by_the_norm(self, data):
        head = Head("linear", **HEAD)
        weights = head.initial_weights(WIDTH, CLASSES, torch.Generator().manual_seed(0))
        expected = normalised(data[0]) @ weights["fc0.weight"].double().numpy().T + weights["fc0.bias"].double().numpy()
        stack = head.stack({name: w[None] for name, w in weights.items()}, "float32")
        np.testing.assert_allclose(stack.forward(data[0])[:, 0], expected, atol=1e-6)
        module = HeadModule(head, weights)
        np.testing.assert_allclose(module(data[0][:, :, None, None]), expected, atol=1e-6)
        maps = torch.rand(2, WIDTH, 3, 3)
        torch.testing.assert_close(module(maps), module(maps.mean((2, 3), keepdim=True)))

    def test_the_gradient_is_that_of_autograd(self, data):
        head = Head("linear", **HEAD)
        weights = head.initial_weights(WIDTH, CLASSES, torch.Generator().manual_seed(0))
        stack = head.stack({name: w[None] for name, w in weights.items()}, "float32")
        logits = stack.forward(data[0], training=True)
        (left, right), of_bias = stack.backward(data[0], logits, torch.ones_like(logits))
        module = HeadModule(head, weights).requires_grad_()
        module(data[0][:, :, None, None]).sum().backward()
        convolution = module.layers["fc0"]
        torch.testing.assert_close(left @ right, convolution.weight.grad[:, :, 0, 0])
        torch.testing.assert_close(of_bias[0], convolution.bias.grad)

    def test_it_needs_pooled_features(self):
        group = {"features": "pooled", "head": {"type": "linear", "norm": "l2"}, "loss": "bce", "optimizer": "lbfgs"}
        with pytest.raises(BadInput, match="head.norm l2 is of the pooled features: say pool: before"):
            parse_grid({"probes": [group]})


class TestGrids:
    GROUP = {
        "name": "svm", "features": "pooled", "head": {"type": "linear"}, "loss": "squared_hinge", "optimizer": {"type": "svm"},
    }  # fmt: skip

    def parsed(self, **changes):
        return parse_grid({"probes": [self.GROUP | changes]}).specs

    def test_costs_are_a_name_or_a_list_or_several_lists(self):
        costs = [
            [spec.optimizer.costs for spec in self.parsed(optimizer={"type": "svm", "costs": value})]
            for value in ("vissl", [1, "1e-1"], [[1], [10, 100]])
        ]
        assert costs == [["vissl"], [(1, 0.1)], [(1,), (10, 100)]]
        (spec,) = self.parsed(optimizer={"type": "svm", "costs": [1, 0.1], "positives": 4})
        assert spec_from_dict(spec_to_dict(spec)) == spec

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": {"type": "svm", "costs": []}}, r"costs: \[\] is not a list of one or more costs, each once"),
            ({"optimizer": {"type": "svm", "costs": [1, 1]}}, "is not a list of one or more costs, each once"),
            ({"optimizer": {"type": "svm", "costs": [0]}}, "is not a number above 0, or voc07, or vissl"),
            (
                {"optimizer": {"type": "svm", "costs": "voc08"}},
                "'voc08' is not a list, or voc07, or vissl; did you mean",
            ),
            ({"optimizer": {"type": "svm", "folds": 1}}, "1 is not a whole number of at least 2"),
            ({"loss": "bce"}, "optimizer svm minimises squared_hinge, not bce"),
            ({"head": {"type": "mlp"}}, "optimizer svm trains linear heads, not mlp"),
            ({"head": {"type": "linear", "temperature": 2}}, "without temperature and offset"),
            ({"keep": "best"}, "has no epochs to choose from"),
        ],
    )
    def test_what_does_not_fit(self, changes, message):
        with pytest.raises(BadInput, match=message):
            self.parsed(**changes)


class TestLabelsThatDoNotDo:
    CLASSES = ("cat", "dog", "owl")

    def why(self, labels, **fields):
        spec = spec_of(**fields)
        return spec.optimizer.unfit(spec, labels, self.CLASSES)

    def test_each_fold_needs_a_positive_and_a_negative(self, data):
        labels = data[1].clone()
        labels[:, 1] = 0
        labels[:2, 1] = 1
        labels[2:5, 1] = -1
        assert self.why(labels) == (
            "2 positives of class 'dog' in training, and each of 3 folds needs one; take fewer folds, or a single cost"
        )
        assert self.why(labels, folds=2) is self.why(labels, costs=(1.0,)) is None
        labels[:, 2] = 1
        assert self.why(labels, costs=(1.0,)) == "no negatives of class 'owl' in training; train on more images"

    def test_a_draw_needs_enough_of_both(self, data):
        assert self.why(data[1], positives=19) == (
            "18 positives of class 'dog' in training, and 19 shots are drawn; take a smaller optimizer.positives (--shots)"
        )
        assert "negatives of class 'cat' in training, and 10 shots are drawn, with 19 negatives for each" in self.why(
            data[1], positives=10
        )


def test_liblinear_without_scikit_learn_names_the_extra(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.svm", None)
    with pytest.raises(BadInput, match=r"needs scikit-learn: pip install 'featcache\[svm\]'"):
        fit_of(data, spec_of(engine="liblinear"))


def test_the_average_precision_of_cross_validation_is_scikit_learns(data):
    """Not that of the envelope, which the scores may have."""
    choice = fit_of(data, spec_of(costs=(1.0, 2.0))).choice
    features, sign = normalised(data[0]), signs_of(data[1], "ignored")[:, 0]
    x, y = features[sign != 0], sign[sign != 0]
    values = []
    for train, held in StratifiedKFold(3).split(x, y):
        machine = LinearSVC(C=1.0, class_weight={1: 2, -1: 1}, random_state=0, **EXACT).fit(x[train], y[train])
        values.append(average_precision_score(y[held] == 1, machine.decision_function(x[held])))
    assert choice.ap[0][0] == pytest.approx(np.mean(values), abs=1e-9)
