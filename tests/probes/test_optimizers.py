"""Optimisers: each probe of a stack equals the same probe alone, and torch.optim on plain modules."""

import itertools
import math

import numpy as np
import pytest
import torch
from loop import fit_convex, train_block
from parts import Head, Loss, Optimizer, Schedule, changed
from plain import assert_near, plain_loss, train_plain
from sklearn.linear_model import LogisticRegression
from timm.optim import Lamb
from torch import nn

from featcache.errors import BadInput
from featcache.probes.engine.blocks import blocks
from featcache.probes.engine.fit import fit_block
from featcache.probes.engine.training import Training
from featcache.probes.grids.grid import parse_grid
from featcache.probes.spec import ProbeSpec

N, D, C, S, BATCH, EPOCHS = 20, 8, 4, 3, 8, 20
HEADS = [
    Head("linear"),
    Head("mlp", 2, 12, "bn"),
    Head("mlp", 3, 12, "bnu", activation="gelu", temperature=0.5, offset=-1.0, norm_batch=5),
    Head("bcos", 2, 12, "bnu", False, b=2.0, offset=-math.log(C - 1)),
    Head("attentive", heads=2),
    Head("efficient", queries=2),
    Head("bn_linear", cells=2),
]
MORE_HEADS = [
    Head("linear", bias=False, offset=0.5),
    Head("mlp", 2, 12, "none"),
    Head("mlp", 3, 12, "bn", activation="gelu"),
    Head("mlp", 2, 12, "bnu", bias=False),
    Head("bcos", 1, 0, "none", False, b=2.0),
    # Of b below 2, steep at zero, and max-out, plain torch in float32 and in float64 come apart by more than 1e-5.
    Head("bcos", 3, 12, "bnu", False, b=2.5),
    Head("bcos", 2, 12, "none", False, b=2.0, temperature=2.0),
    Head("attentive", heads=4, bias=False),
    Head("attentive", heads=2, queries=2),
    Head("bn_linear", affine=False, bias=False),
    Head("linear", init_std=0.01),
]
LOSSES = [
    Loss("bce"),
    Loss("bce", off_label="1/C", label_smoothing=0.1, difficult="negative"),
    Loss("ce", label_smoothing=0.1),
    Loss("focal", gamma=2.0, alpha=0.25),
    Loss("asymmetric", gamma_pos=1.0, gamma_neg=4.0, clip=0.05),
]
RULES = {
    "sgd": Optimizer("sgd", 0.02, 0.9),
    "nesterov": Optimizer("sgd", 0.02, 0.8, nesterov=True),
    "adam": Optimizer("adam", 1e-3),
    "adamw": Optimizer("adamw", 1e-3),
    "lars": Optimizer("lars", 0.02, 0.9, trust=0.1),
}
MORE_RULES = {
    "lars of MoCo v3": Optimizer("lars", 0.02, 0.9, trust=0.1, form="moco_v3"),
    "sgd, norms undecayed": Optimizer("sgd", 0.02, 0.9, undecayed="norms"),
    "nesterov, biases undecayed": Optimizer("sgd", 0.02, 0.8, nesterov=True, undecayed="biases"),
    "adamw of CAPI": Optimizer("adamw", 1e-3, beta2=0.95, undecayed="both"),
}


@pytest.fixture(scope="module")
def data():
    """Maps [N, D, S], pooled features and labels with some of -1."""
    random = np.random.default_rng(0)
    maps = torch.from_numpy(random.normal(0.5, 1, size=(N, D, S)).astype(np.float32))
    return (
        maps,
        maps.mean(2),
        torch.from_numpy(random.choice([1, 0, -1], p=[0.4, 0.5, 0.1], size=(N, C)).astype(np.int8)),
    )


def specs(head, rule, losses):
    """Sixteen probes that differ in all that may differ within a stack."""
    made = []
    for n, loss in zip(range(16), itertools.cycle(losses), strict=False):
        optimizer = changed(
            rule, lr=rule.lr * (1 + n % 3), weight_decay=0.01 * (n % 4), clip=(0, 0.05)[n % 2], lr_base=(0, 16)[n % 2],
            momentum=getattr(rule, "momentum", 0.0) and rule.momentum - 0.1 * (n % 2),
        )  # fmt: skip
        made.append(ProbeSpec("x", "l:pooled", head, loss, optimizer, Schedule(), EPOCHS, BATCH, n))
    return made


def check_product(data, head, rule):
    maps, pooled, labels = data
    features = pooled if head.type in ("linear", "bn_linear") else maps
    (block,) = blocks(specs(head, (RULES | MORE_RULES)[rule], LOSSES), D, S, C)
    together = {t.spec.id: t for t in train_block(block, features, labels, C, 0)}
    for spec in {s.loss: s for s in block}.values():
        (alone,) = train_block([spec], features, labels, C, 0)
        assert alone.diverged is None
        assert_near(together[spec.id].weights, alone.weights)
        assert_near(alone.weights, train_plain(spec, maps, labels))


@pytest.mark.process
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_every_head_loss_and_optimizer(data, head, rule):
    check_product(data, head, rule)


@pytest.mark.process
@pytest.mark.parametrize("rule", MORE_RULES)
@pytest.mark.parametrize("head", [Head("attentive", heads=2), Head("bn_linear")], ids=str)
def test_what_decays_and_other_forms(data, head, rule):
    check_product(data, head, rule)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", MORE_HEADS, ids=str)
def test_every_other_head_loss_and_optimizer(data, head, rule):
    check_product(data, head, rule)


def test_clipping_is_of_each_probe_alone():
    """And leaves a probe without a limit as it is."""
    torch.manual_seed(0)
    parameters = [torch.zeros(3, 4, 5), torch.zeros(3, 4)]
    gradients = [(torch.randn(12, 6), torch.randn(6, 5)), torch.randn(3, 4)]
    rules = [Optimizer("sgd", 1.0, clip=clip) for clip in (0.5, 0.0, 1e6)]
    wanted = [ProbeSpec("x", "l:pooled", Head("linear"), Loss("bce"), rule, Schedule(), 1, 1, 0) for rule in rules]
    dense = [(gradients[0][0] @ gradients[0][1]).view(3, 4, 5), gradients[1].clone()]
    wanted[0].optimizer.rule(parameters, [s.optimizer for s in wanted], "float32", torch.device("cpu")).step(
        gradients, torch.ones(3)
    )
    for p, rule in enumerate(rules):
        own = [nn.Parameter(torch.zeros_like(g[p])) for g in dense]
        for parameter, gradient in zip(own, dense, strict=True):
            parameter.grad = gradient[p].clone()
        nn.utils.clip_grad_norm_(own, rule.clip or math.inf)
        for parameter, moved in zip(own, parameters, strict=True):
            torch.testing.assert_close(-moved[p], parameter.grad, rtol=1e-6, atol=1e-6)


def test_lamb_is_timms():
    """Tensor by tensor, with and without decay, for two probes that differ in rate and decay."""
    torch.manual_seed(0)
    parameters, (a, b) = [torch.randn(2, 4, 5), torch.randn(2, 4)], (Optimizer("lamb", 0.1), Optimizer("lamb", 0.1))
    solvers = [changed(a, weight_decay=0.05), b]
    own = [[nn.Parameter(t[p].clone()) for t in parameters] for p in range(2)]
    theirs = [
        Lamb(own[p], lr, weight_decay=solver.weight_decay, max_grad_norm=None)
        for p, (solver, lr) in enumerate(zip(solvers, (0.1, 0.02), strict=True))
    ]
    rule = solvers[0].rule(parameters, solvers, "float32", torch.device("cpu"))
    for _ in range(10):
        gradients = [torch.randn_like(t) for t in parameters]
        for p in range(2):
            for parameter, gradient in zip(own[p], gradients, strict=True):
                parameter.grad = gradient[p].clone()
            theirs[p].step()
        rule.advance()
        rule.step(gradients, torch.tensor([0.1, 0.02]))
    for p in range(2):
        for parameter, moved in zip(own[p], parameters, strict=True):
            torch.testing.assert_close(moved[p], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_scaling_rule():
    spec = ProbeSpec("x", "l:pooled", Head("linear"), Loss("bce"), Optimizer("sgd", 0.1), Schedule(), 1, 512, 0)
    assert spec.optimizer.rate(spec.batch_size) == 0.1
    assert Optimizer("sgd", 0.1, lr_base=256).rate(512) == pytest.approx(0.2)


@pytest.fixture(scope="module")
def problem():
    """Features on scales that differ, multi-label and single-label labels."""
    random = np.random.default_rng(1)
    features = random.normal(size=(200, 12)) * np.geomspace(0.3, 3, 12)
    scores = features @ random.normal(size=(12, 4)) + random.normal(size=(200, 4)) * 3
    return (
        torch.from_numpy(features).float(),
        torch.from_numpy((scores > 2).astype(np.int8)),
        torch.from_numpy(scores.argmax(1)),
    )


def lbfgs(loss, decay, iterations=1000, **head):
    optimizer = Optimizer("lbfgs", weight_decay=decay, iterations=iterations)
    return ProbeSpec("x", "l:pooled", Head("linear", **head), loss, optimizer, Schedule(), 1, 64, 0)


def objective(spec, weights, features, labels):
    """Mean loss plus decay, of float64 weights, by autograd's torch."""
    logits = features.double() @ weights["fc0.weight"].double().t() + weights["fc0.bias"].double()
    counts = spec.loss.weigh_classes(labels, 4)
    penalty = spec.optimizer.weight_decay / 2 * weights["fc0.weight"].double().square().sum()
    return plain_loss(spec.loss, logits, labels, counts) + penalty


def test_lbfgs_finds_scikit_learns_solution(problem):
    features, multi, single = problem
    decays = (0.1, 1e-2, 1e-3)
    balanced = Loss("ce", class_weights="balanced")
    wanted = [lbfgs(loss, decay) for decay in decays for loss in (Loss("ce"), balanced)]
    fitted, losses, _ = fit_convex(wanted, features, single, 4)
    for spec, weights, history in zip(wanted, fitted, losses, strict=True):
        decay, x = spec.optimizer.weight_decay, features.double().numpy()
        weigh = "balanced" if spec.loss is balanced else None
        model = LogisticRegression(C=1 / (200 * decay), tol=1e-9, max_iter=5000, class_weight=weigh).fit(x, single)
        theirs = {"fc0.weight": torch.from_numpy(model.coef_), "fc0.bias": torch.from_numpy(model.intercept_)}
        distance = (weights["fc0.weight"] - theirs["fc0.weight"]).norm() / theirs["fc0.weight"].norm()
        assert distance < 1e-4
        ours, other = (objective(spec, w, features, single).item() for w in (weights, theirs))
        assert ours == pytest.approx(other, rel=1e-6)
        # Weights are stored in float32, the losses are those of float64.
        assert history[-1] == pytest.approx(ours - decay / 2 * float(weights["fc0.weight"].square().sum()), rel=1e-5)
        assert len(history) < 300


@pytest.mark.parametrize("loss", [Loss("bce"), Loss("bce", class_weights="balanced", label_smoothing=0.1)], ids=str)
def test_lbfgs_finds_torchs_optimum(problem, loss):
    features, multi, _ = problem
    multi = multi.masked_fill(torch.rand(multi.shape, generator=torch.Generator().manual_seed(0)) < 0.1, -1)
    spec = lbfgs(loss, 1e-2)
    (fitted,), *_ = fit_convex([spec], features, multi, 4)
    own = {"fc0.weight": nn.Parameter(torch.zeros(4, 12).double()), "fc0.bias": nn.Parameter(torch.zeros(4).double())}
    optimizer = torch.optim.LBFGS(
        own.values(), max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective(spec, own, features, multi)
        value.backward()
        return value

    optimizer.step(closure)
    for name, weight in own.items():
        torch.testing.assert_close(fitted[name].double(), weight.data, rtol=1e-4, atol=1e-5)


def test_lbfgs_probes_do_not_see_their_neighbours(problem, monkeypatch):
    """And rows in pieces, a piece whose labels are all ignored among them, give what they give at once."""
    features, multi, _ = problem
    multi = multi.clone()
    multi[64:128] = -1
    losses = [
        Loss("bce"),
        Loss("ce", label_smoothing=0.1),
        Loss("focal", gamma=2.0, alpha=0.25),
        Loss("asymmetric", gamma_neg=2.0),
    ]
    wanted = [lbfgs(loss, 10.0**-n, iterations=(30, 200)[n % 2], temperature=0.5) for n, loss in enumerate(losses)]
    together, histories, _ = fit_convex(wanted, features, multi, 4)
    monkeypatch.setattr("featcache.probes.solvers.convex.basis.CHUNK_ROWS", 64)
    for n, spec in enumerate(wanted):
        (alone,), (history,), _ = fit_convex([spec], features, multi, 4)
        assert_near(together[n], alone, 1e-4)
        assert history[:10] == pytest.approx(histories[n][:10], rel=1e-9)
        assert len(history) <= spec.optimizer.iterations + 1
        assert history[-1] < history[0]


def test_mini_batch_training_and_full_batch_training_do_not_take_each_others_probes():
    features, labels = torch.rand(N, D), torch.randint(0, C, (N,))
    full = lbfgs(Loss("ce"), 0.1)
    with pytest.raises(TypeError, match=f"probe {full.id} does not train on mini-batches: its optimizer is lbfgs"):
        Training([full], D, C, labels)
    mini = ProbeSpec(
        "x", "layer4:pooled", Head("linear"), Loss("ce"), Optimizer("adam", 0.1), epochs=1, batch_size=BATCH
    )
    with pytest.raises(TypeError, match="optimizer adam does not see all images at once"):
        fit_block([mini], features, labels, C)


def test_lbfgs_says_whose_iterations_ended_too_early(problem):
    """Of probes side by side, one alone has too few; the others converge after it has stopped."""
    features, multi, _ = problem
    wanted = [lbfgs(Loss("bce"), 0.1), lbfgs(Loss("bce"), 0.1, 2), lbfgs(Loss("ce"), 0.1)]
    assert fit_convex(wanted, features, multi, 4)[2] == [False, True, False]


def optimum(spec, weights, features, labels):
    """The optimum near weights that are close already, by Newton's method in float64: {name: tensor}."""
    sizes = [w.numel() for w in weights.values()]

    def value(flat):
        named = {n: part.view(w.shape) for (n, w), part in zip(weights.items(), flat.split(sizes), strict=True)}
        return objective(spec, named, features, labels)

    flat = torch.cat([w.double().flatten() for w in weights.values()])
    for _ in range(5):
        slope = torch.autograd.functional.jacobian(value, flat)
        curvature = torch.autograd.functional.hessian(value, flat)
        # A softmax leaves a direction open, in which the curvature is zero.
        flat = flat - torch.linalg.pinv(curvature, hermitian=True, rtol=1e-13) @ slope
    return {n: p.view(w.shape) for (n, w), p in zip(weights.items(), flat.split(sizes), strict=True)}


@pytest.mark.process
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("loss", [Loss("ce"), Loss("bce")], ids=lambda loss: loss.type)
def test_lbfgs_ends_at_the_optimum_in_any_company(problem, loss, scale):
    """Whatever the decay: it is the flattest directions that a tolerance of one size leaves open."""
    features, multi, single = problem
    features, labels = scale * features, single if loss.type == "ce" else multi
    wanted = [lbfgs(loss, 10.0**-n) for n in range(1, 9)]
    together, _, short = fit_convex(wanted, features, labels, 4)
    assert short == [False] * 8
    for n, spec in enumerate(wanted):
        (alone,), *_ = fit_convex([spec], features, labels, 4)
        best = optimum(spec, alone, features, labels)["fc0.weight"]
        for found in (alone, together[n]):
            assert (found["fc0.weight"] - best).norm() < 1.1e-5 * best.norm()


def test_a_softmax_converges_where_all_images_are_all_but_certain():
    """Where 1 - p is 1e-9, a loss or slope that is taken as a difference from 1 has few digits left."""
    random = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 80, generator=random), torch.arange(60) % 5
    wanted = [lbfgs(Loss("ce"), decay, 20) for decay in (1e-9, 1e-10, 1e-11, 1e-12)]
    fitted, losses, short = fit_convex(wanted, features, labels, 5)
    assert short == [False] * 4
    for spec, weights, history in zip(wanted, fitted, losses, strict=True):
        # The sum over classes of what pulls at the weights, as small numbers that are exact.
        logits = features.double() @ weights["fc0.weight"].double().t() + weights["fc0.bias"].double()
        behind = logits.gather(1, labels.unsqueeze(1)) - logits
        pulled = torch.exp(-behind)
        pulled = pulled.scatter(1, labels.unsqueeze(1), 0) / pulled.sum(1, keepdim=True)
        pulled.scatter_(1, labels.unsqueeze(1), -pulled.sum(1, keepdim=True))
        decay = spec.optimizer.weight_decay
        gradient = pulled.t() @ features.double() / 60 + decay * weights["fc0.weight"].double()
        assert gradient.norm() < 3e-5 * decay * weights["fc0.weight"].norm()
        assert 0 < history[-1] < 1e3 * decay


def test_lbfgs_does_not_take_rounding_for_an_optimum(problem):
    """Where the tolerance is beyond what float64 can tell, it says that it is not there."""
    features, multi, _ = problem
    wanted = [lbfgs(Loss("bce"), decay, 200) for decay in (1e-18, 1e-2)]
    assert fit_convex(wanted, features, multi, 4)[2] == [True, False]


def test_lbfgs_knows_a_distance_only_where_the_optimum_is_one(problem):
    """Weight decay bounds it for a convex loss."""
    features, multi, _ = problem
    for loss, decay, known in (("bce", 0.1, True), ("ce", 0.1, True), ("squared_hinge", 0.1, True), ("bce", 0, False),
                               ("focal", 0.1, False), ("asymmetric", 0.1, False)):  # fmt: skip
        spec = lbfgs(Loss(loss), decay)
        (fit,) = spec.optimizer.fit([spec], features, multi, 4)
        assert fit.converged and fit.optimality.gradient <= 1
        assert (fit.optimality.distance <= 1e-5) == known
        assert known or math.isinf(fit.optimality.distance)


def test_lbfgs_marks_what_is_not_finite(problem):
    features, multi, _ = problem
    features = features.clone()
    features[3, 2] = torch.inf
    fitted, *_ = fit_convex([lbfgs(Loss("bce"), 0.1)], features, multi, 4)
    assert fitted[0]["fc0.weight"].isnan().all()


def group(**change):
    return {
        "probes": [
            {"features": "pooled", "head": "linear", "loss": "bce", "epochs": 1, "optimizer": "lbfgs", "views": 0}
            | change
        ]
    }


def test_grid_fields():
    (spec,) = parse_grid(group()).specs
    assert spec.optimizer == Optimizer("lbfgs", iterations=1000)
    sgd = {"type": "sgd", "lr": 0.1, "nesterov": [True, False], "clip": [0, 1], "lr_base": [0, 256]}
    assert len({s.id for s in parse_grid(group(optimizer=sgd)).specs}) == 8
    lars = parse_grid(group(optimizer={"type": "lars", "lr": 1})).specs[0].optimizer
    assert lars == Optimizer("lars", 1.0, 0.9, trust=0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "mlp"}, "probes[0]: optimizer lbfgs trains linear heads, not mlp"),
        ({"views": 3}, "probes[0]: optimizer lbfgs trains on the images as they are: say views: 0"),
        ({"optimizer": {"type": "lbfgs", "lr": 1}}, "probes[0].optimizer.lr: unknown field"),
        ({"optimizer": {"type": "sgd", "lr": 1, "momentum": 0, "nesterov": True}}, "nesterov needs a momentum above 0"),
        ({"optimizer": {"type": "adam", "lr": 1, "clip": -1}}, "optimizer.clip: -1 is not a number of at least 0"),
    ],
)  # fmt: skip
def test_errors_name_the_field(change, message):
    with pytest.raises(BadInput) as caught:
        parse_grid(group(**change))
    assert message in caught.value.message


def test_a_block_of_lbfgs_probes_trains(problem):
    features, multi, _ = problem
    wanted = [lbfgs(Loss("bce"), decay) for decay in (0.1, 0.01)]
    (block,) = blocks(wanted, 12, 1, 4)
    trained = train_block(block, features, multi, 4, 0)
    fitted, losses, _ = fit_convex(block, features, multi, 4)
    assert [t.spec for t in trained] == list(block) and [t.losses for t in trained] == losses
    assert all(torch.equal(t.weights["fc0.weight"], w["fc0.weight"]) for t, w in zip(trained, fitted, strict=True))
