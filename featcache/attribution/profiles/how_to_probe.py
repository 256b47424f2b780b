"""How-to-Probe's evaluation of explanations as published, with its quirks (Gairola et al., ICLR 2025).

The arithmetic follows its scripts for EPG on VOC and COCO and for GridPG. docs/attribution.md lists every difference
from the default with its size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from featcache.attribution.batch import Batch, Source
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.methods.guided_backprop import GuidedBackprop
from featcache.attribution.methods.input_x_gradient import InputXGradient
from featcache.attribution.methods.intgrad import IntegratedGradients
from featcache.attribution.methods.lrp import LRP
from featcache.attribution.methods.method import Method
from featcache.attribution.profiles.last_convolution import LastConvolutionGradCAM
from featcache.attribution.profiles.profile import Profile
from featcache.attribution.profiles.published_images import QUIRKS, PublishedBoxes, PublishedGridPG
from featcache.attribution.protocols.boxes import Boxes
from featcache.attribution.protocols.gridpg import GridPG
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.rules import EXPLANATION_MODE, has_explanation_mode
from featcache.attribution.scores.box_iou import BoxIoU
from featcache.attribution.scores.compactness import Compactness
from featcache.attribution.scores.complexity import Complexity
from featcache.attribution.scores.epg import EPG
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.attribution.scores.score import Judge, Score
from featcache.errors import BadInput
from featcache.probes.heads.module import HeadModule

# Sides of the window of a mean and of a Gaussian, whose deviation is a quarter of it.
MEAN, GAUSSIAN = 5, 129
# What keeps quotients finite.
TINY = 1e-12


class _Settings(NamedTuple):
    """The smoothing of a method's maps before EPG and before box IoU, and the threshold of the latter."""

    epg: int
    iou: int
    threshold: float


SETTINGS: dict[type[Method], _Settings] = {
    GradCAM: _Settings(MEAN, MEAN, 0.2),
    InputXGradient: _Settings(GAUSSIAN, GAUSSIAN, 0.5),
    GuidedBackprop: _Settings(MEAN, GAUSSIAN, 0.3),
    # Its box IoU was not computed; that of input x gradient, whose maps are alike, stands in.
    IntegratedGradients: _Settings(GAUSSIAN, GAUSSIAN, 0.5),
}
# B-cos explanations, LRP, and methods that were not run.
OTHERS = _Settings(MEAN, MEAN, 0.3)
# The probability that images of grids must have.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class HowToProbe(Profile):
    """The published evaluation. quirks: those of QUIRKS that are reproduced, all for users."""

    quirks: frozenset[str] = QUIRKS

    def protocol(self, protocol: Protocol) -> Protocol:
        """Return the published choice and preparation of images."""
        if type(protocol) is Boxes:
            return PublishedBoxes(quirks=self.quirks)
        if type(protocol) is GridPG:
            fields = protocol.model_dump()
            if protocol.confidence is None and "images" in self.quirks:
                fields["confidence"] = CONFIDENCE
            return PublishedGridPG(quirks=self.quirks, **fields)
        raise BadInput(f"--parity how-to-probe: it has no protocol {protocol.type}; take boxes or gridpg")

    def method(self, method: Method) -> Method:
        """Return GradCAM on the last convolution, and LRP that takes a head's layers for convolutions, as they were."""
        if type(method) is GradCAM and "convolution" in self.quirks:
            return LastConvolutionGradCAM()
        if isinstance(method, LRP) and "relevance" in self.quirks:
            return method.model_copy(update={"head": "convolution"})
        return method

    def explaining(self, heads: Sequence[HeadModule], source: Source) -> AbstractContextManager[None]:
        """Explain heads on B-cos backbones in explanation mode by all methods.

        Their B-cos explanation puts backbone and head into the mode, and only the backbone leaves it: from the second
        image on, all other methods see the head as linear. Here they do so from the first on.
        """
        backbone = source.network.backbone if source.network else None
        left = "head" in self.quirks and backbone is not None and has_explanation_mode(backbone)
        return _explaining(heads if left else ())

    def scored(self, score: Score, method: Method, protocol: Protocol, batch: Batch, judge: Judge) -> Judge:
        """Return what scores maps as published; scores that are not part of the published evaluation are the default's."""
        if not isinstance(score, LocalisationScore):
            return judge

        def published(maps: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.measure(score, method, protocol, maps, batch.masks).double(), judge(maps, head)[1]

        return published

    def measure(
        self, score: LocalisationScore, method: Method, protocol: Protocol, maps: torch.Tensor, masks: torch.Tensor
    ) -> torch.Tensor:
        """Score maps [N, S, S] of a method against masks [N, S, S], as published where there is a difference."""
        grids = isinstance(protocol, GridPG)
        settings = next((own for kind, own in SETTINGS.items() if isinstance(method, kind)), OTHERS)
        if isinstance(score, EPG):
            # On grids only input x gradient is smoothed by the Gaussian.
            window = MEAN if grids and not isinstance(method, InputXGradient) else settings.epg
            return self._rounded(self._epg(maps, masks, window), grids)
        if isinstance(score, BoxIoU) and "box" in self.quirks:
            return self._rounded(self._box_iou(maps, masks, settings), grids)
        if isinstance(score, Compactness) and "smoothing" in self.quirks:
            return _gini(maps)
        if isinstance(score, Complexity) and "smoothing" in self.quirks:
            return _entropy(maps)
        return score.measure_all(maps, masks)

    def _smoothed(self, maps: torch.Tensor, window: int) -> torch.Tensor:
        """Return the positive part of smoothed maps, float64 [N, S, S]."""
        return (smooth(maps, window) if "smoothing" in self.quirks else maps).clamp(min=0).double()

    def _epg(self, maps: torch.Tensor, masks: torch.Tensor, window: int) -> torch.Tensor:
        """Return the share of the energy inside the masks."""
        positive = self._smoothed(maps, window)
        total = positive.sum((1, 2))
        return self._with_empty((positive * masks).sum((1, 2)) / (total + TINY), total)

    def _box_iou(self, maps: torch.Tensor, masks: torch.Tensor, settings: _Settings) -> torch.Tensor:
        """Return the intersection over union of the masks and the box around values of at least the threshold.

        Values are scaled to 0..1 first. The box ends before the last row and column that have such a value; if there
        is none, it is the first pixel.
        """
        positive = self._smoothed(maps, settings.iou)
        lowest, highest = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
        large = (positive - lowest) / (highest - lowest + TINY) >= settings.threshold
        box = _up_to_last(large.any(2))[:, :, None] & _up_to_last(large.any(1))[:, None, :]
        box[~large.any(2).any(1), 0, 0] = True
        both, either = (box & masks).sum((1, 2)).double(), (box | masks).sum((1, 2))
        return self._with_empty(both / (either + 1e-10), highest[:, 0, 0])

    def _with_empty(self, values: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        """Count a map without positive energy as 0, or where that is not wanted give it no score."""
        return values if "empty" in self.quirks else values.masked_fill(energy <= 0, math.nan)

    def _rounded(self, values: torch.Tensor, grids: bool) -> torch.Tensor:
        """Round to two decimals; shares of grids are not rounded."""
        return values.round(decimals=2) if "rounding" in self.quirks and not grids else values


def smooth(maps: torch.Tensor, window: int) -> torch.Tensor:
    """Smooth maps float32 [N, S, S] by a mean over 5x5 pixels, with zeros around, or by a Gaussian of 129x129, mirrored.

    The Gaussian's deviation is 129 / 4. Raises BadInput where maps are too small to be mirrored.
    """
    if window == MEAN:
        return F.avg_pool2d(maps[:, None], MEAN, stride=1, padding=MEAN // 2)[:, 0]
    half, size = GAUSSIAN // 2, maps.shape[-1]
    if size <= half:
        raise BadInput(
            f"--parity how-to-probe smooths these maps by a Gaussian of {GAUSSIAN} pixels, which needs images of more "
            f"than {half} pixels; they have {size}"
        )
    weights = torch.exp(-(torch.arange(-half, half + 1).double() / (GAUSSIAN / 4)).square() / 2)
    weights = (weights / weights.sum()).to(maps)
    padded = F.pad(maps[:, None], (half,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


def _up_to_last(flags: torch.Tensor) -> torch.Tensor:
    """Return where a line lies from its first flag up to its last, without that: bool [N, S]."""
    later = flags.flip(1).cumsum(1).flip(1) - flags.long()
    return (flags.cumsum(1) > 0) & (later > 0)


def _gini(maps: torch.Tensor) -> torch.Tensor:
    """Return the Gini index of unsmoothed maps, of which every value is at least 1e-7."""
    values = (maps.flatten(1).double().clamp(min=0) + 1e-7).sort(1).values
    count = values.shape[1]
    ranks = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
    return values @ ranks / (count * values.sum(1))


def _entropy(maps: torch.Tensor) -> torch.Tensor:
    """Return the entropy of maps, smoothed by a mean whatever the method, as a share of a uniform map's.

    Times log2(pixels) it is the published entropy, in bits.
    """
    values = smooth(maps, MEAN).clamp(min=0).double().flatten(1)
    shares = values / (values.sum(1, keepdim=True) + 1e-10)
    return -(shares * (shares + 1e-10).log2()).sum(1) / math.log2(values.shape[1])


@contextmanager
def _explaining(heads: Sequence[HeadModule]) -> Iterator[None]:
    """Hold heads in explanation mode within the block."""
    with ExitStack() as stack:
        for head in heads:
            stack.enter_context(EXPLANATION_MODE.apply(head))
        yield
