"""Layer-wise relevance propagation, against plain zennit on backbone and head as one ordinary network."""

import copy

import pytest
import torch
from explaining import batch_of, explain
from torch import nn
from zennit.composites import EpsilonGammaBox, EpsilonPlusFlat
from zennit.torchvision import ResNetCanonizer

from featcache.attribution.methods.lrp import LRP
from featcache.attribution.reading import Reading
from featcache.backbones.load import load_backbone
from featcache.feature import Feature
from featcache.probes.heads.attentive import Attentive
from featcache.probes.heads.bcos import Bcos
from featcache.probes.heads.bn_linear import BnLinear
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp
from featcache.probes.heads.module import HeadModule

LAYER, SIDE, CLASSES = Reading((Feature("layer2", "spatial"),)), 32, 5
CHOSEN = [(1, 2), (3, 0)]
KINDS = [Linear(temperature=2.0, offset=3.0), BnLinear(), Mlp(hidden=8), Mlp(hidden=8, norm="bnu", pool="before")]


@pytest.fixture(scope="module")
def backbone(checkpoint):
    """Without the eps of its norms, by which zennit's merged norms still divide."""
    made = load_backbone(checkpoint, size=SIDE).double()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    return made


@pytest.fixture(scope="module")
def heads():
    """With norms that do something."""
    made, generator = [], torch.Generator().manual_seed(0)
    for kind in KINDS:
        weights = kind.initial_weights(128, CLASSES, generator)
        for name in weights:
            if name.startswith("bn"):
                weights[name] = torch.rand(weights[name].shape, generator=generator) + 0.5
        made.append(HeadModule(kind, weights).double())
    return made


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Positions(nn.Module):
    """A layer, applied at every position of a map."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, maps):
        return self.layer(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def dense(conv):
    layer = nn.Linear(conv.in_channels, conv.out_channels).double()
    layer.weight.data, layer.bias.data = conv.weight.data[:, :, 0, 0], conv.bias.data
    return layer


def ordinary(backbone, head, convolutions):
    """Backbone and head as one network of plain modules; norms of the head merged into its layers by hand."""
    layers = [copy.deepcopy(module) for module in head.layers.values()]
    for before, norm in zip(layers, layers[1:], strict=False):
        if isinstance(before, nn.Conv2d) and hasattr(norm, "running_var"):
            scale = norm.weight / (norm.running_var + 1e-5).sqrt()
            mean = getattr(norm, "running_mean", 0)
            bias = (0 if before.bias is None else before.bias) - mean
            before.bias = nn.Parameter(bias * scale + getattr(norm, "bias", 0))
            before.weight.data = before.weight.data * scale[:, None, None, None]
    if isinstance(layers[0], nn.BatchNorm2d):
        norm, layer = layers[0], layers[1]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        layer.bias.data = layer.bias.data + layer.weight.data[:, :, 0, 0] @ (norm.bias - norm.running_mean * scale)
        layer.weight.data = layer.weight.data * scale[:, None, None]
    kept = [module for module in layers if not hasattr(module, "running_var")]
    if not convolutions:
        kept = [Positions(dense(each)) if isinstance(each, nn.Conv2d) else each for each in kept]
    pool = nn.AdaptiveAvgPool2d(1)
    trunk = copy.deepcopy(backbone.trunk)
    trunk.forward = lambda x: trunk.layer2(trunk.layer1(trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))))
    parts = [pool, *kept] if head.head.averages_features else [*kept, pool]
    return nn.Sequential(trunk, *parts, nn.Flatten()).eval().requires_grad_(False)


def by_zennit(method, network, image, label, temperature):
    canonizers = [ResNetCanonizer()]
    if method.composite == "gamma_box":
        low, high = torch.zeros(1, 3, 1, 1).double(), torch.ones(1, 3, 1, 1).double()
        composite = EpsilonGammaBox(low, high, gamma=method.gamma, canonizers=canonizers)
    else:
        composite = EpsilonPlusFlat(canonizers=canonizers)
    image = image.clone().requires_grad_()
    with composite.context(network) as modified:
        logits = modified(image)
        start = torch.zeros_like(logits)
        start[0, label] = logits[0, label].detach() / temperature
        (relevance,) = torch.autograd.grad(logits, image, start)
    return relevance.sum(1)[0]


@pytest.mark.parametrize(
    "method", [LRP(), LRP(composite="plus_flat"), LRP(head="convolution", gamma=0.5)], ids=lambda m: m.label
)
def test_it_equals_plain_zennit_one_by_one(method, backbone, heads, images):
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    got = explain(method, backbone, LAYER, heads, images, CHOSEN)
    for number, head in enumerate(heads):
        network = ordinary(backbone, head, method.head == "convolution")
        for image, own in enumerate(CHOSEN):
            for at, label in enumerate(own):
                expected = by_zennit(method, network, images[image : image + 1], label, head.head.temperature)
                difference = (got[number, image, at] - expected).norm()
                assert difference < 1e-5 * expected.norm(), (number, image, label)
    after = backbone.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)


@pytest.mark.parametrize(
    ("arch", "layer"),
    [
        ("resnetv1d50", "layer1"),
        ("clip_rn50_no_attnpool", "layer1"),
        ("mobilenet_v2", "features.3"),
        ("efficientnet_lite0", "blocks.2"),
        ("squeezenet1_1", "features.4"),
    ],
)
def test_relevance_is_conserved_where_nothing_has_a_bias(arch, layer, images):
    """In networks whose blocks are not torchvision's ResNets': the sum is the logit less its offset."""
    backbone, reading = load_backbone("random", arch=arch, size=SIDE).double(), Reading((Feature(layer, "spatial"),))
    assert LRP().misfit(backbone) is None
    kind = Mlp(hidden=8, norm="none", bias=False, offset=5.0)
    maps = reading.of_images(backbone, images)
    head = HeadModule(kind, kind.initial_weights(maps.shape[1], CLASSES, torch.Generator().manual_seed(0))).double()
    expected = (head(maps) - 5).gather(1, torch.tensor(CHOSEN))
    got = explain(LRP(epsilon=1e-12), backbone, reading, [head], images, CHOSEN)[0]
    torch.testing.assert_close(got.sum((2, 3)).double(), expected, rtol=1e-3, atol=0)


def test_the_backbone_is_as_it_was_after_an_exception_too(backbone, heads, images, monkeypatch):
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in backbone.modules()]
    images = images.clone()
    monkeypatch.setattr("featcache.attribution.forward.Forward.gradient", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(LRP(), backbone, LAYER, heads, images, CHOSEN)
    after = backbone.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
    assert hooks == [len(module._forward_hooks) for module in backbone.modules()]
    assert not any("forward" in vars(module) or hasattr(module, "canonizer_sum") for module in backbone.modules())


@pytest.mark.parametrize(
    ("arch", "reason"),
    [("densenet121", "DenseNetTrunk"), ("efficientnet_b0", "EfficientNet"), ("bcos_resnet18", "BcosResNet")],
)
def test_what_its_rules_do_not_fit(arch, reason):
    backbone = load_backbone("random", arch=arch, size=SIDE)
    assert LRP().misfit(backbone).startswith(f"has a {reason}, which its rules do not fit: LRP serves ResNets")
    for head in (Attentive(), Bcos(), Linear(norm="l2", pool="before")):
        assert LRP().unfit(head, LAYER)
    assert "rules start at a map" in LRP().unfit(Linear(), Reading((Feature("norm", "cls"),)))


def test_one_forward_pass_serves_all(backbone, heads, images):
    batch = batch_of(backbone, LAYER, images, CHOSEN)
    list(LRP().explain(heads, LAYER, batch))
    assert (batch.source.passes.forward, batch.source.passes.backward) == (2, 4 * len(heads))
