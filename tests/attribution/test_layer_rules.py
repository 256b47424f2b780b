"""DeepLIFT against captum and its axiom, and the methods for transformers against their definitions written out."""

import copy

import pytest
import torch
from captum.attr import DeepLift
from explaining import batch_of, explain
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer
from vits import tiny_vit

from featcache.attribution.attention import attending, is_attention, keeping
from featcache.attribution.attention_rules import ATTENTION
from featcache.attribution.methods.attention_rollout import AttentionRollout
from featcache.attribution.methods.attnlrp import AttnLRP
from featcache.attribution.methods.deeplift import DeepLIFT
from featcache.attribution.methods.input_x_gradient import InputXGradient
from featcache.attribution.methods.intgrad import GAP
from featcache.attribution.reading import Reading
from featcache.attribution.replaced import replaced
from featcache.backbones.architecture import Architecture
from featcache.backbones.backbone import Backbone
from featcache.backbones.families import clip
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.feature import Feature
from featcache.probes.heads.attentive import Attentive
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp
from featcache.probes.heads.module import HeadModule

CLASSES, CHOSEN = 5, [(1, 2), (3, 0)]


def head_of(kind, channels, seed=0):
    weights = kind.initial_weights(channels, CLASSES, torch.Generator().manual_seed(seed))
    return HeadModule(kind, weights).double()


def noise(side, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_close(got, expected):
    assert (got - expected).norm() < 1e-5 * expected.norm()


class Plain(nn.Module):
    """A network that captum's DeepLIFT takes: no module runs twice, pools do not overlap, and no two modules in a row
    are non-linear. Of two in a row, captum 0.9 passes the first the second's plain gradient, and the contributions do
    not sum to the change.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, images):
        return self.features(images)


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
def test_deeplift_equals_captums():
    torch.manual_seed(0)
    network = Plain().double().eval()
    plain = Architecture("plain", Plain, lambda made: made, "", (), {"last": "features"})
    backbone, images = Backbone(plain, network, Preprocessing(32, (0, 0, 0), (1, 1, 1)), ""), noise(32)
    assert DeepLIFT().misfit(backbone) is None
    heads, layer = [head_of(kind, 16) for kind in (Linear(), Mlp(hidden=8))], Reading((Feature("features", "spatial"),))
    got = explain(DeepLIFT(), backbone, layer, heads, images, CHOSEN)
    for number, head in enumerate(heads):
        model = DeepLift(nn.Sequential(network, head))
        for image, own in enumerate(CHOSEN):
            for at, label in enumerate(own):
                inputs = images[image : image + 1].clone().requires_grad_()
                assert_close(got[number, image, at], model.attribute(inputs, target=label).detach().sum(1)[0])


def test_deeplifts_contributions_sum_to_the_change_of_the_logit(checkpoint):
    """In a network whose modules run several times, and whose pools overlap."""
    backbone, layer = load_backbone(checkpoint, size=64).double(), Reading((Feature("layer4", "spatial"),))
    heads = [head_of(kind, 512) for kind in (Linear(), Mlp(hidden=8, activation="gelu"))]
    images = noise(64)
    batch = batch_of(backbone, layer, images, CHOSEN)
    made = list(DeepLIFT().explain(heads, layer, batch))
    assert (batch.source.passes.forward, batch.source.passes.backward) == (2, 8)
    for head, each in zip(heads, made, strict=True):
        ends = [head(layer.of_images(backbone, inputs)) for inputs in (images, torch.zeros_like(images))]
        change = (ends[0] - ends[1])[batch.images, batch.classes]
        torch.testing.assert_close(each.maps.sum((1, 2)).double(), change, rtol=1e-4, atol=1e-5)
        assert each.cells[GAP].max() < 1e-4
    assert not any("forward" in vars(module) for module in backbone.modules())


def gated_vit():
    from timm.layers import SwiGLUPacked

    return tiny_vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, init_values=0.5, qk_norm=True).trunk


def torchvisions_vit():
    network = TorchvisionTransformer(32, 8, 2, 2, 32, 64)
    network.heads = nn.Identity()
    return network


TRANSFORMERS = {
    "timm": lambda: tiny_vit().trunk,
    "timm, gated": gated_vit,
    "torchvision": torchvisions_vit,
    "clip": lambda: clip.VisionTransformer(32, 2, 2, 8, 4, 64, None, clip.QuickGELU),
    "attentive head": lambda: head_of(Attentive(heads=1, queries=3), 3).float(),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_rules_change_gradients_alone(name):
    """What a network computes stays the same, and all of its attention is got at."""
    torch.manual_seed(0)
    network, images, kept = TRANSFORMERS[name]().eval(), noise(32).float().requires_grad_(), []
    expected = network(images)
    # The squares of normed tokens have a sum that hardly changes.
    start = torch.randn(expected.shape)

    def forward_of(module):
        return attending(module, keeping(kept)) if is_attention(module) else None

    with ATTENTION.apply(network):
        torch.testing.assert_close(network(images), expected)
        (changed,) = torch.autograd.grad(network(images), images, start)
    with replaced(network, forward_of):
        torch.testing.assert_close(network(images), expected)
        (same,) = torch.autograd.grad(network(images), images, start)
    (plain,) = torch.autograd.grad(expected, images, start)
    torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    assert (changed - plain).norm() > 0.05 * plain.norm()
    assert len(kept) == 2 * sum(map(is_attention, network.modules())) > 0, "the network ran twice"


@pytest.fixture(scope="module")
def vit():
    return tiny_vit().double()


CLS, PATCHES = Reading((Feature("norm", "cls"),)), Reading((Feature("norm", "spatial"),))


@pytest.mark.parametrize("reading", [CLS, PATCHES, Reading((Feature("blocks.1+norm", "cls"),))], ids=str)
def test_rollout_by_its_definition(vit, reading):
    """With whole matrices, from hooks on timm's own attention."""
    heads, images = [head_of(Linear(), 32), head_of(Mlp(hidden=8, norm="none"), 32)], noise(32)
    got = explain(AttentionRollout(), vit, reading, heads, images, CHOSEN)
    weights, hooks = [], []
    for block in vit.trunk.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda *given: weights.append(given[2])))
    try:
        for number, head in enumerate(heads):
            for image, own in enumerate(CHOSEN):
                for at, label in enumerate(own):
                    weights.clear()
                    inputs = images[image : image + 1].clone().requires_grad_()
                    logit = head(reading.of_images(vit, inputs))[0, label]
                    slopes = torch.autograd.grad(logit, weights, allow_unused=True)
                    relevance = torch.eye(weights[0].shape[3], dtype=torch.float64)
                    for weight, slope in zip(weights, slopes, strict=True):
                        if slope is not None:
                            relevance = relevance + (weight * slope)[0].clamp(min=0).mean(0) @ relevance
                    relevance = relevance - torch.eye(len(relevance))
                    row = relevance[0] if reading != PATCHES else relevance[5:].mean(0)
                    small = row[5:].view(1, 1, 4, 4)
                    expected = nn.functional.interpolate(small, (32, 32), mode="bilinear")[0, 0].detach()
                    assert_close(got[number, image, at], expected)
    finally:
        for block, hook in zip(vit.trunk.blocks, hooks, strict=True):
            block.attn.fused_attn = True
            hook.remove()


class Relevance:
    """AttnLRP's rules, one layer after another; `values` are what a layer is given, `relevance` is of what it makes."""

    @staticmethod
    def linear(values, weight, bias, relevance):
        return values * ((relevance / (values @ weight.T + bias)) @ weight)

    @staticmethod
    def norm(norm, values, relevance):
        """The centring is linear, the deviation a constant, the bias takes its part."""
        centred = values - values.mean(-1, keepdim=True)
        scale = norm.weight / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        part = relevance / (centred * scale + norm.bias) * scale
        return values * (part - part.mean(-1, keepdim=True))

    @staticmethod
    def product(left, right, relevance):
        """[n, k] and [k, m]: every term of a sum has its part, and each factor half of it."""
        part = relevance / (left @ right)
        return left * (part @ right.T) / 2, right * (left.T @ part) / 2

    @staticmethod
    def softmax(scores, weights, relevance):
        return scores * (relevance - weights * relevance.sum(-1, keepdim=True))


def block_by_rules(block, tokens, relevance):
    """Take the relevance of a block's output [N, D] back to its input."""
    attention, heads = block.attn, block.attn.num_heads
    normed = block.norm1(tokens)
    parts = attention.qkv(normed).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    weights = (parts[0] @ parts[1].transpose(1, 2) * attention.scale).softmax(-1)
    mixed = (weights @ parts[2]).transpose(0, 1).flatten(1)
    attended = attention.proj(mixed)
    middle = tokens + attended
    again = block.norm2(middle)
    hidden = block.mlp.fc1(again)
    active = block.mlp.act(hidden)
    added = block.mlp.fc2(active)
    share = relevance / (middle + added)
    of_hidden = Relevance.linear(active, block.mlp.fc2.weight, block.mlp.fc2.bias, share * added)
    of_again = Relevance.linear(again, block.mlp.fc1.weight, block.mlp.fc1.bias, of_hidden)
    of_middle = share * middle + Relevance.norm(block.norm2, middle, of_again)
    share = of_middle / (tokens + attended)
    of_mixed = Relevance.linear(mixed, attention.proj.weight, attention.proj.bias, share * attended)
    of_parts = torch.zeros_like(parts)
    for number, own in enumerate(of_mixed.unflatten(1, (heads, -1)).transpose(0, 1)):
        query, key, value = parts[:, number]
        of_weights, of_parts[2, number] = Relevance.product(weights[number], value, own)
        scores = query @ key.T * attention.scale
        of_scores = Relevance.softmax(scores, weights[number], of_weights)
        of_parts[0, number], of_keys = Relevance.product(query * attention.scale, key.T, of_scores)
        of_parts[1, number] = of_keys.T
    of_qkv = of_parts.permute(2, 0, 1, 3).flatten(1)
    of_normed = Relevance.linear(normed, attention.qkv.weight, attention.qkv.bias, of_qkv)
    return share * tokens + Relevance.norm(block.norm1, tokens, of_normed)


def test_attnlrp_by_its_rules(vit):
    head, image = head_of(Linear(), 32), noise(32, 1)
    trunk = vit.trunk
    with torch.no_grad():
        embedded = trunk.patch_embed(image)
        states = [trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(embedded)))]
        for block in trunk.blocks:
            states.append(block(states[-1]))
        weight, bias = head.layers["fc0"].weight[:, :, 0, 0], head.layers["fc0"].bias
        token = trunk.norm(states[-1])[0, 0]
        label = 2
        of_token = token * weight[label] / (token @ weight[label] + bias[label]) * (token @ weight[label] + bias[label])
        relevance = torch.zeros_like(states[-1][0])
        relevance[0] = of_token
        relevance = torch.nan_to_num(Relevance.norm(trunk.norm, states[-1][0], relevance))
        for block, tokens in zip(reversed(trunk.blocks), reversed(states[:-1]), strict=True):
            relevance = block_by_rules(block, tokens[0], relevance)
        # Positions take a part of what the patches' tokens have, and the pixels the rest.
        projection = trunk.patch_embed.proj
        patches = nn.functional.unfold(image, 8, stride=8)[0].T
        part = (relevance[5:] / states[0][0, 5:]) @ projection.weight.flatten(1)
        expected = nn.functional.fold((patches * part).T[None], (32, 32), 8, stride=8)[0].sum(0)
    got = explain(AttnLRP(), vit, CLS, [head], image, [(label,)])[0, 0, 0]
    assert_close(got, expected)
    plain = explain(InputXGradient(), vit, CLS, [head], image, [(label,)])[0, 0, 0]
    assert (got - plain).norm() > 0.1 * plain.norm(), "the rules change something"
    assert not any("forward" in vars(module) for module in vit.modules())


def test_attention_that_is_another_is_not_taken_for_it(vit):
    """BEiT's has the same name, and a bias of positions."""
    from timm.models.beit import Attention

    assert AttentionRollout().misfit(vit) is None and AttnLRP().misfit(vit) is None
    other = copy.deepcopy(vit)
    other.trunk.blocks[1].attn = Attention(32, window_size=(4, 4))
    assert AttentionRollout().misfit(other) == "has an attention of its own, Attention"
    assert AttnLRP().misfit(other) == "has Attention modules, which its rules do not fit"
    assert "no attention" in AttnLRP().misfit(load_backbone("random", arch="squeezenet1_1", size=32))
