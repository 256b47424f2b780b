"""Layer-wise relevance propagation."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from featcache.attribution.batch import Batch
from featcache.attribution.forward import Forward
from featcache.attribution.methods.layer_rules import LayerRules
from featcache.attribution.reading import Reading
from featcache.backbones.backbone import Backbone
from featcache.errors import BadInput
from featcache.probes.heads.bn_linear import BnLinear
from featcache.probes.heads.head import Head
from featcache.probes.heads.module import HeadModule

# What a pass takes, as a multiple of a plain pass: the inputs that rules make, and what layers make of them. Measured as
# 9 on a ResNet-18 and a ResNet-50.
KEPT = 10


class LRP(LayerRules):
    """The relevance of each pixel, passed back from the logit layer by layer, by zennit's rules, summed over channels.

    A pass starts with the logit less its offset, which the map sums to but for what biases take. Given the forward pass
    relevance is linear in where it starts, so that one serves all probes and classes. gamma_box is zennit's
    EpsilonGammaBox: the box rule in the first convolution, with black and white as bounds, and gamma in the others.
    plus_flat is EpsilonPlusFlat: flat in the first, z+ in the others. Layers of a head are taken for fully connected
    ones, as they are on pooled features, and get epsilon; or the rule of the convolutions, which they are to zennit.
    """

    type: Literal["lrp"] = "lrp"
    composite: Literal["gamma_box", "plus_flat"] = Field("gamma_box", description="which rules")
    gamma: Annotated[float, Field(ge=0, le=1000)] = Field(0.25, description="of the gamma rule")
    epsilon: Annotated[float, Field(gt=0, le=1000)] = Field(1e-6, description="of the epsilon rule")
    head: Literal["epsilon", "convolution"] = Field("epsilon", description="the rule of the head's layers")
    serves: ClassVar[str] = "ResNets, CLIP's too, VGG, AlexNet, SqueezeNet, MobileNetV2 and EfficientNet-Lite"
    paper: ClassVar[str] = "Bach et al., PLOS ONE 2015; Montavon et al., 2019"

    def misfit(self, backbone: Backbone) -> str | None:
        """Rules and canonisers are made for the layers of these networks. Raises BadInput without zennit."""
        part = _relevance().unknown_part(backbone.trunk)
        return part and f"has {part}, which its rules do not fit: LRP serves {self.serves}"

    def unfit(self, head: Head, reading: Reading) -> str | None:
        """Rules start at a map, and go through norms of single channels."""
        if isinstance(head, BnLinear) and head.cells > 1:
            return f"has a head whose norm is over {head.cells} cells, which no rule fits"
        return super().unfit(head, reading) or (
            None if reading.is_map else f"reads {reading}, and rules start at a map"
        )

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another, once all images are done and the backbone is as it was."""
        batch.release()
        for block in batch.blocks(heads):
            yield from self._explain_block(block, feature, batch)

    def _explain_block(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> torch.Tensor:
        """Return the maps of heads: [heads, T, S, S]."""
        relevance, source, classes = _relevance(), batch.source, batch.by_image
        rule = self._head_rule(relevance)
        layers = [relevance.canonical_head(head) for head in heads]
        maps = torch.empty(len(heads), *classes.shape, batch.size, batch.size, device=source.device)
        at_once = max(1, source.at_once // KEPT)
        for first in range(0, len(batch.inputs), at_once):
            part = slice(first, first + at_once)
            with self._composite(relevance, batch).context(source.backbone.trunk):
                forward = Forward(source.backbone, [feature], batch.inputs[part], source.passes)
                for number, (head, canonical) in enumerate(zip(heads, layers, strict=True)):
                    with relevance.head_composite(rule).context(canonical):
                        starts = _relevances(canonical, head, forward.maps[feature].detach(), classes[part])
                        for at, start in enumerate(starts):
                            maps[number, part, at] = forward.gradient(feature, start).sum(1)
        return maps.flatten(1, 2)

    def _composite(self, relevance: Any, batch: Batch) -> Any:
        if self.composite == "plus_flat":
            return relevance.flat_composite()
        normalise = batch.source.preprocessing.normalise
        pixel = torch.ones(1, 3, 1, 1, dtype=torch.uint8, device=batch.source.device)
        return relevance.box_composite(normalise(0 * pixel), normalise(255 * pixel), self.gamma)

    def _head_rule(self, relevance: Any) -> Any:
        if self.head == "epsilon":
            return relevance.rules.Epsilon(self.epsilon)
        return relevance.rules.Gamma(self.gamma) if self.composite == "gamma_box" else relevance.rules.ZPlus()


def _relevances(
    canonical: nn.Module, head: HeadModule, maps: torch.Tensor, classes: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield the relevance [B, D, h, w] of a head's map for each column of classes [B, K], within its composite."""
    maps = maps.requires_grad_()
    with torch.enable_grad():
        logits = canonical(maps).flatten(1)
    for column in classes.unbind(1):
        start = torch.zeros_like(logits)
        start.scatter_(1, column[:, None], logits.detach().gather(1, column[:, None]) / head.head.temperature)
        yield torch.autograd.grad(logits, maps, start, retain_graph=True)[0]


def _relevance() -> Any:
    """Import what needs zennit. Raises BadInput without it."""
    try:
        return importlib.import_module("featcache.attribution.relevance")
    except ModuleNotFoundError as error:
        if error.name != "zennit":
            raise
        raise BadInput("--method lrp needs the package zennit: pip install 'featcache[attribution]'") from None
