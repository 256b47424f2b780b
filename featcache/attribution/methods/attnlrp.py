"""AttnLRP, layer-wise relevance propagation for transformers."""

from typing import ClassVar, Literal

import torch
from torch import nn

from featcache.attribution.attention import is_attention, is_timms
from featcache.attribution.attention_rules import ACTIVATIONS, ATTENTION
from featcache.attribution.forward import Rule
from featcache.attribution.methods.gradient_method import GradientMethod
from featcache.attribution.reading import Reading
from featcache.backbones.backbone import Backbone
from featcache.backbones.families import clip
from featcache.backbones.families.torchvision_import import models
from featcache.probes.heads.attentive import Attentive
from featcache.probes.heads.bn_linear import BnLinear
from featcache.probes.heads.head import Head
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp

# Modules that are the sum of their parts, or linear.
KNOWN = (
    nn.Sequential, nn.ModuleList, nn.Conv2d, nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout, *ACTIVATIONS,
    clip.VisionTransformer, clip.Transformer, clip.Block, models.VisionTransformer, models.vision_transformer.Encoder,
    models.vision_transformer.EncoderBlock, models.vision_transformer.MLPBlock,
)  # fmt: skip
TIMMS = (
    "VisionTransformer", "VisionTransformerDistilled", "PatchEmbed", "Block", "LayerScale", "Mlp", "GluMlp", "DropPath",
    "LayerNorm", "PatchDropout",
)  # fmt: skip


class AttnLRP(GradientMethod):
    """The relevance of each pixel of a vision transformer, by AttnLRP's rules, summed over channels.

    By these rules relevance is the input times a gradient: linear layers have the epsilon rule, activations and the
    deviations of norms are constant factors, and products, as in attention, share relevance equally.
    """

    type: Literal["attnlrp"] = "attnlrp"
    paper: ClassVar[str] = "Achtibat et al., ICML 2024"
    rule: ClassVar[Rule] = ATTENTION

    def misfit(self, backbone: Backbone) -> str | None:
        """Rules are made for the layers of plain vision transformers."""
        if not any(map(is_attention, backbone.trunk.modules())):
            return "has no attention that its rules are made for"
        for module in backbone.trunk.modules():
            gated = is_attention(module) and getattr(module, "gate", None) is not None
            inside = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            if not (inside or isinstance(module, KNOWN) or is_timms(module, *TIMMS) or is_attention(module)) or gated:
                return f"has a {type(module).__name__}, which its rules do not fit"
        return None

    def unfit(self, head: Head, reading: Reading) -> str | None:
        """Other heads hold parts without a rule."""
        if type(head) not in (Linear, BnLinear, Mlp, Attentive):
            return f"has a head of type {head.type}, and rules fit linear, bn_linear, mlp and attentive"
        if isinstance(head, Linear) and head.norm != "none":
            return f"has a head with norm: {head.norm}, which no rule fits"
        return None

    def combine(self, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Multiply, and sum over channels."""
        return (inputs * gradients).sum(1)
