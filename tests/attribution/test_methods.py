"""Each method against captum, or against its definition written out."""

import numpy as np
import pytest
import torch
from bcos.modules.norms import BatchNormUncentered2d
from captum.attr import GuidedBackprop as CaptumGuidedBackprop
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import Saliency
from explaining import batch_of, explain
from torch import nn

from featcache.attribution.methods.bcos import BcosContributions
from featcache.attribution.methods.gradcampp import GradCAMPlusPlus
from featcache.attribution.methods.gradient import Gradient
from featcache.attribution.methods.gradient_method import GradientMethod
from featcache.attribution.methods.guided_backprop import GuidedBackprop
from featcache.attribution.methods.intgrad import GAP, IntegratedGradients
from featcache.attribution.methods.layercam import LayerCAM
from featcache.attribution.methods.position_logits import PositionLogits
from featcache.attribution.methods.smoothgrad import SmoothGrad
from featcache.attribution.reading import Reading
from featcache.attribution.rules import EXPLANATION_MODE
from featcache.backbones.load import load_backbone
from featcache.feature import Feature
from featcache.probes.heads.bcos import Bcos
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp
from featcache.probes.heads.module import HeadModule

LAYER, SIDE, CLASSES = Reading((Feature("layer4", "spatial"),)), 64, 5
CHOSEN = [(1, 2), (3, 0), (4, 1)]


def head_of(head, channels=512, seed=0):
    head = head.resolved(CLASSES)
    return HeadModule(head, head.initial_weights(channels, CLASSES, torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def backbone(checkpoint):
    """In float64: at a pre-activation of nearly zero, rounding would decide which way a ReLU goes."""
    return load_backbone(checkpoint, size=SIDE).double()


@pytest.fixture(scope="module")
def heads():
    return [head_of(each).double() for each in (Linear(), Mlp(hidden=8), Bcos(layers=2, hidden=8))]


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Whole(nn.Module):
    """The backbone up to its last map, and a head, as one network; it copies what a ReLU would overwrite."""

    def __init__(self, backbone, head):
        super().__init__()
        self.trunk, self.head, self.backbone = backbone.trunk, head, [backbone]

    def forward(self, images):
        return self.head(LAYER.of_images(self.backbone[0], images))


@pytest.fixture
def out_of_place(backbone):
    """captum's hooks need ReLUs that do not work in place."""
    relus = [module for module in backbone.modules() if isinstance(module, nn.ReLU)]
    for module in relus:
        module.inplace = False
    yield
    for module in relus:
        module.inplace = True


def assert_each(got, images, heads, backbone, oracle, tolerance=1e-5):
    """Compare [heads, B, K, S, S] with oracle(whole network, image [1, C, S, S], class), [S, S]."""
    for number, head in enumerate(heads):
        model = Whole(backbone, head).eval()
        for image, own in enumerate(CHOSEN):
            for at, label in enumerate(own):
                expected = oracle(model, images[image : image + 1].clone().requires_grad_(), label).detach()
                difference = (got[number, image, at] - expected).norm()
                assert difference < tolerance * expected.norm(), (number, image, label)


def test_gradient_equals_captums_saliency(backbone, heads, images):
    got = explain(Gradient(), backbone, LAYER, heads, images, CHOSEN)
    assert_each(got, images, heads, backbone, lambda m, x, c: Saliency(m).attribute(x, c).amax(1)[0])


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
def test_guided_backprop_equals_captums(backbone, heads, images, out_of_place):
    got = explain(GuidedBackprop(), backbone, LAYER, heads, images, CHOSEN)
    assert all("forward" not in vars(module) for module in backbone.modules()), "ReLUs are plain again"
    assert_each(got, images, heads, backbone, lambda m, x, c: CaptumGuidedBackprop(m).attribute(x, c).sum(1)[0])


def test_integrated_gradients_equal_captums_and_report_their_gap(backbone, heads, images):
    steps = 6
    got = explain(IntegratedGradients(steps=steps), backbone, LAYER, heads, images, CHOSEN)
    assert_each(
        got,
        images,
        heads,
        backbone,
        lambda m, x, c: CaptumIntegratedGradients(m).attribute(x, target=c, n_steps=steps).sum(1)[0],
    )
    gaps = []
    for count in (1, 30):
        batch = batch_of(backbone, LAYER, images[:1], CHOSEN[:1])
        (made,) = IntegratedGradients(steps=count).explain(heads[:1], LAYER, batch)
        model = Whole(backbone, heads[0])
        change = (model(images[:1]) - model(torch.zeros_like(images[:1])))[0, list(CHOSEN[0])]
        gap = (made.maps.sum((1, 2)) - change).abs() / change.abs()
        torch.testing.assert_close(made.cells[GAP], gap, rtol=1e-3, atol=1e-5)
        gaps.append(gap.max())
    assert gaps[1] < gaps[0] / 2, "more steps leave less of a gap"


def test_smoothgrad_is_the_mean_gradient_of_noisy_images(backbone, heads, images):
    method = SmoothGrad(samples=3, noise=0.2, seed=5)
    got = explain(method, backbone, LAYER, heads, images, CHOSEN)
    noisy = [method.sample(image, row)[0] for row, image in enumerate(images)]
    spread = torch.stack([inputs - image for inputs, image in zip(noisy, images, strict=True)]).std()
    assert spread == pytest.approx(0.2 * float(torch.stack([i.max() - i.min() for i in images]).mean()), rel=0.03)
    assert not torch.equal(noisy[0] - images[0], noisy[1] - images[1])

    def mean(model, image, label):
        (row,) = (number for number in range(3) if torch.equal(images[number], image[0]))
        gradients = [torch.autograd.grad(model(x[None])[0, label], x)[0] for x in noisy[row].requires_grad_().unbind()]
        return torch.stack(gradients).mean(0).abs().amax(0)

    assert_each(got, images, heads, backbone, mean)


def alpha_by_loops(maps, gradients):
    """GradCAM++'s map by its equations 10 and 19, position by position."""
    total = np.zeros(maps.shape[1:])
    for channel, slope in zip(maps, gradients, strict=True):
        weight = 0.0
        for g in slope.flat:
            below = 2 * g**2 + channel.sum() * g**3
            weight += (g**2 / below if below else 0) * max(g, 0)
        total += weight * channel
    return np.maximum(total, 0)


def layercam_by_loops(maps, gradients):
    return np.maximum((np.maximum(gradients, 0) * maps).sum(0), 0)


@pytest.mark.parametrize("method, oracle", [(GradCAMPlusPlus(), alpha_by_loops), (LayerCAM(), layercam_by_loops)])
def test_cams_by_their_definition(method, oracle, heads):
    maps = torch.rand(3, 512, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch = batch_of(None, LAYER, torch.zeros(3, 3, 2, 2, dtype=torch.float64), CHOSEN)
    batch._cached[LAYER] = maps
    for head, got in zip(heads, method.explain(heads, LAYER, batch), strict=True):
        for number, (image, label) in enumerate((i, c) for i, own in enumerate(CHOSEN) for c in own):
            own = maps[image : image + 1].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(head(own)[0, label], own)
            expected = oracle(own[0].detach().numpy(), gradient[0].numpy())
            np.testing.assert_allclose(got[number], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_logits_of_positions_average_to_the_logit_without_its_offset():
    maps = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch = batch_of(None, LAYER, torch.zeros(3, 3, 2, 2, dtype=torch.float64), CHOSEN)
    batch._cached[LAYER] = maps
    kinds = [Linear(temperature=2.0, offset=3.0, pool="before"), Mlp(hidden=8), Bcos(layers=2, hidden=8)]
    made = [head_of(kind, 16).double() for kind in kinds]
    for head, got in zip(made, PositionLogits().explain(made, LAYER, batch), strict=True):
        expected = (head(maps) - head.head.shift)[batch.images, batch.classes]
        torch.testing.assert_close(got.mean((1, 2)), expected)
        alone = head(maps[1:2, :, :1, 1:]) - head.head.shift
        torch.testing.assert_close(got[2, 0, 1], alone[0, CHOSEN[1][0]])
    assert "brings the positions together" in PositionLogits().unfit(Mlp(pool="before"), LAYER)
    assert PositionLogits().unfit(Linear(pool="before"), LAYER) is None and not PositionLogits.runs_backbone


@pytest.fixture(scope="module")
def bcos_backbone():
    """With the statistics of a few images in its norms, without which a random network yields next to nothing."""
    backbone = load_backbone("random", arch="bcos_resnet18", size=SIDE)
    norms = [module for module in backbone.modules() if isinstance(module, BatchNormUncentered2d)]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with torch.no_grad():
        backbone.run(torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4)))
    for norm in norms:
        norm.training = False
    return backbone


def test_bcos_contributions_sum_to_the_logit_without_its_offset(bcos_backbone):
    """And they are the package's own: the gradient in its explanation mode, times the input."""
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    images = torch.cat([pixels, 1 - pixels], 1)
    width = LAYER.of_images(bcos_backbone, images[:1]).shape[1]
    kinds = (
        Bcos(layers=2, hidden=8, offset="-ln(C-1)"),
        Bcos(b=1.5, max_out=2),
        Mlp(hidden=8, norm="none", bias=False),
    )
    made = [head_of(kind, width) for kind in kinds]
    got = explain(BcosContributions(), bcos_backbone, LAYER, made, images, CHOSEN)
    for head, maps in zip(made, got, strict=True):
        logits = head(LAYER.of_images(bcos_backbone, images)) - head.head.shift
        expected = logits.gather(1, torch.tensor(CHOSEN))
        torch.testing.assert_close(maps.sum((2, 3)), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    inputs = images.clone().requires_grad_()
    with EXPLANATION_MODE.apply(bcos_backbone), EXPLANATION_MODE.apply(made[0]):
        logit = made[0](LAYER.of_images(bcos_backbone, inputs))[1, 3]
    expected = (inputs * torch.autograd.grad(logit, inputs)[0])[1].sum(0).detach()
    torch.testing.assert_close(got[0, 1, 0], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_explanation_mode_ends_with_an_exception_too(bcos_backbone):
    head = head_of(Bcos(layers=2, hidden=8))
    modules = [m for network in (bcos_backbone, head) for m in network.modules() if hasattr(m, "set_explanation_mode")]
    assert len(modules) > 20
    with pytest.raises(ZeroDivisionError), EXPLANATION_MODE.apply(bcos_backbone), EXPLANATION_MODE.apply(head):
        assert all(module.detach for module in modules)
        raise ZeroDivisionError
    assert not any(module.detach for module in modules)


def test_methods_of_one_rule_share_every_pass(backbone, heads, images):
    batch = batch_of(backbone, LAYER, images, CHOSEN)
    for _ in GradientMethod.explain_together([Gradient(), Gradient()], heads, LAYER, batch):
        pass
    assert (batch.source.passes.forward, batch.source.passes.backward) == (3, 3 * 2 * len(heads))


def test_what_a_network_cannot_be_explained_by(backbone, bcos_backbone):
    assert "no B-cos layers" in BcosContributions().misfit(backbone) and not GuidedBackprop().misfit(backbone)
    assert "no ReLU" in GuidedBackprop().misfit(bcos_backbone) and not BcosContributions().misfit(bcos_backbone)
