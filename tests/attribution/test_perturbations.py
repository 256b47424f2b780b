"""Methods that change the image or the map, against captum, scikit-learn, or their definition written out."""

import numpy as np
import pytest
import torch
from captum.attr import Occlusion as CaptumOcclusion
from explaining import batch_of, explain
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances

from featcache.attribution.methods.cached_occlusion import CachedOcclusion
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.lime import LIME
from featcache.attribution.methods.occlusion import Occlusion
from featcache.attribution.methods.rise import RISE
from featcache.attribution.methods.scorecam import ScoreCAM
from featcache.attribution.reading import Reading
from featcache.backbones.load import load_backbone
from featcache.feature import Feature
from featcache.probes.heads.bcos import Bcos
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp
from featcache.probes.heads.module import HeadModule

LAYER, SIDE, CLASSES = Reading((Feature("layer1", "spatial"),)), 32, 5
CHOSEN = [(1, 2), (3, 0)]


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return load_backbone(checkpoint, size=SIDE)


@pytest.fixture(scope="module")
def heads():
    """Two of them give a softmax, one sigmoids."""
    made = []
    for number, kind in enumerate((Linear(), Mlp(hidden=8, norm="none"), Bcos(layers=2, hidden=8))):
        weights = kind.initial_weights(64, CLASSES, torch.Generator().manual_seed(number))
        made.append(HeadModule(kind, {k: 3 * v for k, v in weights.items()}, ("softmax", "sigmoid", "softmax")[number]))
    return made


@pytest.fixture(scope="module")
def images():
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic")


def probability(backbone, head, images):
    logits = head(LAYER.of_images(backbone, images))
    return torch.softmax(logits, 1) if head.link == "softmax" else torch.sigmoid(logits)


def assert_each(got, images, heads, oracle):
    """Compare [heads, B, K, S, S] with oracle(head, image [1, C, S, S], its number, class), [S, S]."""
    for number, head in enumerate(heads):
        for image, own in enumerate(CHOSEN):
            for at, label in enumerate(own):
                expected = torch.as_tensor(oracle(head, images[image : image + 1], image, label)).float()
                close = 1e-3 * float(expected.abs().max())
                torch.testing.assert_close(got[number, image, at], expected, rtol=1e-3, atol=close)


@pytest.mark.parametrize("window, stride", [pytest.param(8, 4, marks=pytest.mark.slow), (10, 7)])
def test_occlusion_equals_captums(backbone, heads, images, window, stride):
    got = explain(Occlusion(window=window, stride=stride), backbone, LAYER, heads, images, CHOSEN)

    def oracle(head, image, _, label):
        model = CaptumOcclusion(lambda x: probability(backbone, head, x))
        made = model.attribute(image, (3, window, window), (3, stride, stride), target=label)
        return made[0, 0]

    assert_each(got, images, heads, oracle)


@pytest.mark.parametrize("window", [1, 3])
def test_occlusion_of_the_cached_map_by_loops(heads, window):
    maps = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(2))
    batch = batch_of(None, LAYER, torch.zeros(2, 3, 4, 4), CHOSEN)
    batch._cached[LAYER] = maps
    got = torch.stack(list(CachedOcclusion(window=window).explain(heads, LAYER, batch))).unflatten(1, (2, 2))

    def oracle(head, _, image, label):
        falls, count = np.zeros((4, 4)), np.zeros((4, 4))
        for y in range(5 - window):
            for x in range(5 - window):
                changed = maps[image : image + 1].clone()
                changed[:, :, y : y + window, x : x + window] = 0
                fall = head(maps[image : image + 1])[0, label] - head(changed)[0, label]
                falls[y : y + window, x : x + window] += float(fall)
                count[y : y + window, x : x + window] += 1
        return falls / count

    assert_each(got, maps, heads, oracle)
    if window == 1:
        weight = heads[0].layers["fc0"].weight[list(CHOSEN[0]), :, 0, 0]
        torch.testing.assert_close(got[0, 0], torch.einsum("kd,dhw->khw", weight, maps[0]) / 16, rtol=1e-3, atol=1e-5)


def test_rise_by_its_definition(backbone, heads, images):
    method = RISE(masks=12, cells=4, keep=0.4, seed=3)
    got = explain(method, backbone, LAYER, heads, images, CHOSEN)
    masks = method.large(SIDE, 0, 12)
    assert masks.shape == (12, SIDE, SIDE) and 0 <= masks.min() and masks.max() < 1 + 1e-6
    assert RISE(masks=500, keep=0.4).large(SIDE, 0, 500).mean() == pytest.approx(0.4, abs=0.02)
    assert not torch.equal(masks, RISE(masks=12, cells=4, keep=0.4, seed=4).large(SIDE, 0, 12))

    def oracle(head, image, _, label):
        return sum(probability(backbone, head, image * mask)[0, label] * mask for mask in masks) / (12 * 0.4)

    assert_each(got, images, heads, oracle)


def test_scorecam_by_its_definition(backbone, heads, images):
    maps = LAYER.of_images(backbone, images)
    maps[0, 5] = 1.0
    batch = batch_of(backbone, LAYER, images, CHOSEN)
    batch._cached[LAYER] = maps
    got = torch.stack(list(ScoreCAM().explain(heads, LAYER, batch))).unflatten(1, (2, 2))

    def oracle(head, image, number, label):
        scores = []
        for channel in maps[number]:
            mask = upsample(channel[None], SIDE)[0]
            flat = mask.max() == mask.min()
            scores.append(
                probability(backbone, head, image * (0 if flat else (mask - mask.min()) / (mask.max() - mask.min())))[
                    0, label
                ]
            )
        weights = torch.stack(scores).softmax(0)
        small = sum(weight * channel for weight, channel in zip(weights, maps[number], strict=True))
        return upsample(small.clamp(min=0)[None], SIDE)[0]

    assert_each(got, images, heads, oracle)


def test_lime_is_scikit_learns_ridge(backbone, heads, images):
    # Squares of 16 pixels, each a segment.
    images = torch.nn.functional.interpolate(images[:, :, ::8, ::8], (64, 64))
    method = LIME(samples=60, seed=2)
    got = explain(method, backbone, LAYER, heads, images, CHOSEN)
    made = []
    for number, image in enumerate(images):
        made.append(method.start(image, str(number)))
        labels, filled = made[-1].labels, made[-1].filled
        assert labels.max() >= 2 and torch.equal(labels.unique(), torch.arange(labels.max() + 1))
        torch.testing.assert_close(
            filled[:, labels == 1], image[:, labels == 1].mean(1, keepdim=True).expand(-1, int((labels == 1).sum()))
        )

    def oracle(head, image, number, label):
        labels, filled, kept = made[number]
        variants = torch.stack([torch.where(row[labels] > 0, image[0], filled) for row in kept])
        scores = probability(backbone, head, variants)[:, label].detach().double()
        distance = pairwise_distances(kept, kept[:1], metric="cosine").ravel()
        weights = np.sqrt(np.exp(-(distance**2) / 0.25**2))
        ridge = Ridge(alpha=1, fit_intercept=True).fit(kept, scores, sample_weight=weights)
        return torch.from_numpy(ridge.coef_)[labels]

    assert_each(got, images, heads, oracle)


def test_one_forward_pass_of_a_variant_serves_all_probes_and_classes(backbone, heads, images):
    batch = batch_of(backbone, LAYER, images, CHOSEN)
    list(RISE(masks=10).explain(heads, LAYER, batch))
    assert (batch.source.passes.forward, batch.source.passes.backward) == (20, 0)
