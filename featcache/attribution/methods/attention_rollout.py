"""Gradient-weighted attention rollout."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from featcache.attribution.attention import attending, is_attention, is_other_attention, keeping
from featcache.attribution.batch import Batch
from featcache.attribution.forward import Forward, Rule
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.attribution.replaced import replaced
from featcache.backbones.backbone import Backbone
from featcache.probes.heads.head import Head
from featcache.probes.heads.module import HeadModule

# What a pass takes, as a multiple of a plain pass: it keeps the weights of all attention. Measured as 1.4 on a ViT-B/16.
KEPT = 2


class AttentionRollout(Method):
    """How much of each patch the attention brings to the token that the head reads, by the gradients of the weights.

    Every block adds (mean over heads of positive weight times gradient) times the relevance so far; the row of the class
    token, or the mean over patches for a head on their mean, is the map, without what a token has of itself.
    """

    type: Literal["attention_rollout"] = "attention_rollout"
    runs_backbone: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = False
    serves: ClassVar[str] = "vision transformers with the attention of timm, torchvision or CLIP"
    paper: ClassVar[str] = "Chefer et al., ICCV 2021"

    def misfit(self, backbone: Backbone) -> str | None:
        """The weights must be at hand, and tokens must stay in their places."""
        others = [type(module).__name__ for module in backbone.trunk.modules() if is_other_attention(module)]
        if backbone.architecture.tokens is None or not any(map(is_attention, backbone.trunk.modules())):
            return "has no attention between the tokens of patches"
        return f"has an attention of its own, {others[0]}" if others else None

    def unfit(self, head: Head, reading: Reading) -> str | None:
        """The head must read one token, or the mean of the patches."""
        kinds = [feature.kind for feature in reading.features]
        if kinds not in (["cls"], ["spatial"]):
            return f"reads {reading}, which is neither one class token nor the patches of one layer"
        if kinds == ["spatial"] and head.reads_tokens:
            return f"has a head of type {head.type}, which weighs the patches itself"
        return None

    def passes(self, work: Work) -> Passes:
        """A forward pass of each image for every layer that probes read, and a backward pass for each map."""
        return Passes(work.images * work.layers, work.pairs * work.probes)

    def passes_alone(self, work: Work) -> Passes:
        """Both for each map."""
        return Passes(work.pairs * work.probes, work.pairs * work.probes)

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another, once all images are done."""
        batch.release()
        source, classes = batch.source, batch.by_image
        at_once = max(1, source.at_once // KEPT)
        for block in batch.blocks(heads):
            maps = torch.empty(len(block), *classes.shape, batch.size, batch.size, device=source.device)
            for first in range(0, len(classes), at_once):
                part = slice(first, first + at_once)
                self._explain_part(block, feature, batch, part, maps[:, part])
            yield from maps.flatten(1, 2)

    def _explain_part(
        self, heads: Sequence[HeadModule], feature: Reading, batch: Batch, part: slice, maps: torch.Tensor
    ) -> None:
        """Write the maps of some of the images, [heads, n, K, S, S]."""
        source, classes, kept = batch.source, batch.by_image[part], list[torch.Tensor]()
        attend = keeping(kept)

        def forward_of(module: nn.Module) -> Callable[..., Any] | None:
            return attending(module, attend) if is_attention(module) else None

        rule = Rule("kept attention", lambda network: replaced(network, forward_of))
        forward = Forward(source.backbone, [feature], batch.inputs[part], source.passes, rule)
        tokens = source.backbone.architecture.tokens
        assert tokens is not None, "misfit() refuses backbones without tokens"
        side = batch.size // tokens.patch
        start = kept[0].new_zeros(len(classes), 1, kept[0].shape[3])
        if feature.features[0].kind == "cls":
            start[:, :, 0] = 1
        else:
            start[:, :, -side * side :] = 1 / side**2
        for number, head in enumerate(heads):
            for at, cotangent in enumerate(forward.cotangents(head, feature, classes)):
                slopes = torch.autograd.grad(
                    forward.maps[feature], kept, cotangent, retain_graph=True, allow_unused=True
                )
                source.passes.backward += len(classes)
                row = start
                for weights, slope in zip(reversed(kept), reversed(slopes), strict=True):
                    # A block behind the layer that the head reads has none.
                    if slope is not None:
                        row = row + row @ (weights.detach() * slope).clamp(min=0).mean(1)
                small = (row - start)[:, 0, -side * side :].unflatten(1, (side, side))
                maps[number, :, at] = upsample(small, batch.size)
