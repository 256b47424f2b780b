"""Scores against those of Quantus, which is no dependency: CONTRIBUTING.md says how to install it beside the others."""

import math

import numpy as np
import pytest
import torch
from explaining import batch_of
from torch import nn
from torchvision.models import resnet18

from featcache.attribution.reading import Reading
from featcache.attribution.scores.compactness import Compactness
from featcache.attribution.scores.complexity import Complexity
from featcache.attribution.scores.deletion import Deletion
from featcache.attribution.scores.epg import EPG
from featcache.attribution.scores.pointing_game import PointingGame
from featcache.backbones.load import load_backbone
from featcache.feature import Feature

quantus = pytest.importorskip("quantus")
# Quantus takes maps as they are given.
AS_IS = {"abs": False, "normalise": False, "disable_warnings": True}
SIZE, COUNT = 32, 6


@pytest.fixture(scope="module")
def maps():
    """Maps [6, 32, 32] of different values from above zero on."""
    return torch.rand(COUNT, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) ** 4


@pytest.fixture(scope="module")
def masks():
    return torch.rand(COUNT, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.3


def by_quantus(metric, maps, masks=None, model=None, images=None, labels=None, **more):
    given = torch.zeros(COUNT, 3, SIZE, SIZE) if images is None else images
    return metric(
        model=model or nn.Identity(), x_batch=given.numpy(), y_batch=np.zeros(COUNT, int) if labels is None else labels,
        a_batch=maps[:, None].numpy().copy(), s_batch=None if masks is None else masks[:, None].numpy(), device="cpu",
        channel_first=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("score", "metric", "factor"),
    [
        (EPG(), quantus.RelevanceMassAccuracy(**AS_IS), 1),
        (PointingGame(), quantus.PointingGame(**AS_IS), 1),
        (Compactness(), quantus.Sparseness(**AS_IS), 1),
        (Complexity(), quantus.Complexity(**AS_IS), math.log(SIZE**2)),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_scores_of_maps(score, metric, factor, maps, masks):
    expected = by_quantus(metric, maps, masks)
    assert (factor * score.measure(maps, masks)).tolist() == pytest.approx(np.array(expected, float).tolist(), abs=1e-5)


def test_deletion_is_pixel_flipping(maps, tmp_path):
    """Quantus counts a pixel once for each channel: after three of its steps as many pixels are gone as after one."""
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), tmp_path / "c.pth")
    backbone, feature, steps = load_backbone(tmp_path / "c.pth", size=SIZE), Reading((Feature("layer3", "spatial"),)), 8

    class Probe(nn.Module):
        """The network with a head; its link is what Quantus would put behind a model itself."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(256, 5, 1)

        def probabilities(self, maps):
            return self.layer(maps).mean((2, 3)).softmax(1)

        def forward(self, images):
            return self.probabilities(feature.of_images(backbone, images))

    model, images = Probe().eval(), torch.randn(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    labels = np.array([1, 0, 3, 4, 2, 2])
    batch = batch_of(backbone, feature, images, labels[:, None].tolist())
    values, _ = Deletion(steps=steps).judge(batch, [(model, feature)])(maps, 0)
    flipping = quantus.PixelFlipping(features_in_step=SIZE**2 // steps, perturb_baseline=0.0, **AS_IS)
    curves = by_quantus(flipping, maps, None, model, images, labels, softmax=False)
    with torch.no_grad():
        first = model(images)[range(COUNT), labels].numpy()
    for value, start, curve in zip(values.tolist(), first, curves, strict=True):
        assert value == pytest.approx(np.trapezoid([start, *curve[2::3]], dx=1 / steps), abs=1e-5)
