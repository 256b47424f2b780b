"""Losses in closed form against torch's, torchvision's and slow ones, values and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import Loss
from plain import plain_loss
from sklearn.utils.class_weight import compute_class_weight

from featcache.probes.grids.grid import parse_grid
from featcache.probes.losses.loss import LossFunction

share = st.floats(0, 1)
LOSSES = st.one_of(
    st.builds(
        Loss, st.just("bce"), off_label=st.one_of(share, st.just("1/C")), label_smoothing=share,
        class_weights=st.sampled_from(["none", "balanced"]), difficult=st.sampled_from(["ignored", "negative"]),
    ),
    st.builds(
        Loss, st.just("ce"), label_smoothing=share, class_weights=st.sampled_from(["none", "balanced"]),
        difficult=st.sampled_from(["ignored", "negative"]),
    ),
    st.builds(Loss, st.just("focal"), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]), alpha=share),
    st.builds(
        Loss, st.just("asymmetric"), gamma_pos=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        gamma_neg=st.sampled_from([0.0, 1.0, 2.0, 4.0]), clip=st.sampled_from([0.0, 0.05, 0.3]),
        difficult=st.sampled_from(["ignored", "negative"]),
    ),
    st.builds(
        Loss, st.just("squared_hinge"), positive_weight=st.sampled_from([0.5, 1.0, 2.0]),
        difficult=st.sampled_from(["ignored", "negative"]),
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(LOSSES, st.integers(1, 9), st.integers(1, 3), st.integers(2, 7), st.booleans(), st.integers(0, 2**31))
def test_values_and_gradients_equal_the_obvious_formula(loss, rows, probes, classes, single, seed):
    """In float64, by autograd. The class weights are those of more images than the batch has."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(scale=3, size=(rows, probes, classes))).requires_grad_()
    if single:
        whole = torch.from_numpy(random.integers(0, classes, 3 * rows))
    else:
        whole = torch.from_numpy(random.choice([1, 0, -1], p=[0.4, 0.4, 0.2], size=(3 * rows, classes)).astype(np.int8))
    function = LossFunction(loss, whole, classes)
    value, gradient = function(logits.detach(), whole[:rows])
    for p in range(probes):
        expected = plain_loss(loss, logits[:, p], whole[:rows], function.weights)
        assert value[p].item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
        (slow,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(gradient[:, p], slow[:, p], rtol=1e-7, atol=1e-10)


@settings(deadline=None, max_examples=100)
@given(LOSSES, st.booleans(), st.integers(0, 2**31))
def test_means_of_parts_weighed_by_their_count_make_the_mean_of_all(loss, single, seed):
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(9, 2, 4)))
    labels = random.integers(0, 4, 9) if single else random.integers(-1, 2, (9, 4)).astype(np.int8)
    labels = torch.from_numpy(labels)
    function = LossFunction(loss, labels, 4)
    parts = [(function(z, y), function.count(y)) for z, y in zip(logits.split(4), labels.split(4), strict=True)]
    total = max(sum(count for _, count in parts), 1)
    value, gradient = function(logits, labels)
    torch.testing.assert_close(sum(v * count / total for (v, _), count in parts), value)
    torch.testing.assert_close(torch.cat([g * count / total for (_, g), count in parts]), gradient)


EXTREMES = [
    Loss("bce"), Loss("bce", class_weights="balanced"), Loss("ce"), Loss("focal", gamma=2.0, alpha=0.25),
    Loss("focal", gamma=0.5, alpha=0.5), Loss("asymmetric", gamma_neg=4.0, clip=0.05),
    Loss("asymmetric", gamma_neg=0.5), Loss("asymmetric", gamma_neg=0.5, clip=0.05), Loss("asymmetric", gamma_pos=0.5),
    Loss("squared_hinge", positive_weight=2.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", EXTREMES, ids=str)
def test_losses_at_their_limits(loss, dtype):
    huge = torch.tensor([[[0.0, 1e4, -1e4]]], dtype=dtype)
    for labels in ([[1, 1, 0]], [[-1, -1, -1]], [[0, 0, 0]], [[-1, 1, -1]], [[0, 0, 1]]):
        labels = torch.tensor(labels, dtype=torch.int8)
        function = LossFunction(loss, labels, 3)
        value, gradient = function(huge, labels)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        ignored = labels[0] < 0
        assert (gradient[0, 0][ignored] == 0).all(), "an ignored class is neither pushed up nor down"
        assert not ignored.all() or value.item() == 0


def test_a_difficult_label_pushes_down_where_it_is_a_negative():
    labels = torch.tensor([[-1, 1]], dtype=torch.int8)
    focal = {"gamma": 1.0, "alpha": 0.5}
    for loss, fields in (("bce", {}), ("ce", {}), ("focal", focal), ("asymmetric", {}), ("squared_hinge", {})):
        found = LossFunction(Loss(loss, difficult="negative", **fields), labels, 2)(torch.zeros(1, 1, 2), labels)
        as_absent = LossFunction(Loss(loss, **fields), labels, 2)(
            torch.zeros(1, 1, 2), torch.tensor([[0, 1]], dtype=torch.int8)
        )
        assert torch.equal(found[1], as_absent[1]) and found[1][0, 0, 0] > 0


def test_uniform_off_labels_of_how_to_probe():
    """Targets max(onehot, 1/C), the mean over images and classes; -ln(C-1) is where a class of 1/C has no gradient."""
    labels = torch.tensor([2, 0])
    logits = torch.full((2, 1, 10), -np.log(9.0))
    value, gradient = LossFunction(Loss("bce", off_label="1/C"), labels, 10)(logits.double(), labels)
    target = torch.full((2, 10), 0.1).double()
    target[0, 2] = target[1, 0] = 1
    p = torch.full((2, 10), 0.1).double()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert value.item() == pytest.approx(expected.item())
    assert gradient[:, 0].abs()[target < 1].max() < 1e-9


def test_balanced_weights():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert Loss("ce", class_weights="balanced").weigh_classes(labels, 3).tolist() == pytest.approx(expected.tolist())
    assert Loss("ce", class_weights="balanced").weigh_classes(labels, 4)[3] == 1, "a class that nothing trains"
    assert Loss("bce", class_weights="balanced").weigh_classes(labels, 3).tolist() == pytest.approx([1.0, 2.0, 5.0])
    multi = torch.tensor([[1, 1, -1], [0, 1, 1], [0, 1, -1], [-1, 1, 0]], dtype=torch.int8)
    assert Loss("bce", class_weights="balanced").weigh_classes(multi, 3).tolist() == pytest.approx([2.0, 1.0, 1.0])
    assert Loss("bce", class_weights="balanced", difficult="negative").weigh_classes(
        multi, 3
    ).tolist() == pytest.approx([3.0, 1.0, 3.0])
    assert Loss("ce", class_weights="balanced").weigh_classes(multi, 3).tolist() == pytest.approx(
        [6 / 3, 6 / 12, 6 / 3]
    )


def test_grid_fields():
    group = {"features": "pooled", "head": "linear", "epochs": 1, "optimizer": {"type": "sgd", "lr": 1}}
    loss = [
        "bce", "ce", "focal", "asymmetric", "squared_hinge", {"type": "bce", "off_label": [0.1, "1/C"], "difficult": "negative"},
        {"type": "ce", "label_smoothing": 0.1, "class_weights": "balanced"},
    ]  # fmt: skip
    specs = parse_grid({"probes": [group | {"loss": loss}]}).specs
    assert len({s.id for s in specs}) == 8
    assert specs[2].loss == Loss("focal", gamma=2.0, alpha=0.25)
    assert specs[3].loss == Loss("asymmetric", gamma_neg=4.0, clip=0.05)
    assert specs[4].loss == Loss("squared_hinge", positive_weight=1.0)
    assert [s.loss.off_label for s in specs[5:7]] == [0.1, "1/C"]
