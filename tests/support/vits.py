"""A vision transformer that is small."""

import torch

from featcache.backbones.backbone import Backbone
from featcache.backbones.families import ARCHITECTURES
from featcache.backbones.input.preprocessing import Preprocessing


def tiny_vit(side=32, **settings):
    """Three blocks of width 32 with two heads, a class token and four registers, patches of 8 pixels, as a Backbone."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    chosen = {"img_size": side, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "reg_tokens": 4}
    network = VisionTransformer(**chosen | settings)
    found = ARCHITECTURES["vit"].infer(network.state_dict(), {"heads": 2})
    return Backbone(found, network, Preprocessing(side, found.mean, found.std), "tiny")
