"""timm's networks that compute something else on tensors of the same names and shapes as one of ours.

They load as ours without an error, so the load report names those with published weights. tests/backbones/test_lookalikes.py
compares these tables with timm's networks; timm is not imported to use them.
"""

from collections.abc import Mapping
from typing import Any

from featcache.backbones.families.timm_models import PREFIX

# Networks with pooling or a blur in place of strides; with an input that is not turned to -1..1.
FIXED = {"resnet50": ("resnetaa50", "resnetblur50"), "inception_v3": ("inception_v3.gluon_in1k",)}
# ({argument that the tensors tell: its value}, {network: (width, depth)}); patch and input size are in the name.
VITS: tuple[tuple[dict[str, Any], dict[str, tuple[int, int]]], ...] = (
    # QuickGELU for GELU.
    ({"pre_norm": True, "class_token": True}, {
        "vit_base_patch16_clip_quickgelu_224": (768, 12), "vit_base_patch32_clip_quickgelu_224": (768, 12),
        "vit_large_patch14_clip_quickgelu_224": (1024, 24), "vit_large_patch14_clip_quickgelu_336": (1024, 24),
        "vit_huge_patch14_clip_quickgelu_224": (1280, 32), "vit_huge_patch14_clip_quickgelu_378": (1280, 32),
        "vit_gigantic_patch14_clip_quickgelu_224": (1664, 48),
    }),
    # Rotary positions besides the embeddings.
    ({"init_values": 1.0, "no_embed_class": True, "class_token": True, "pre_norm": False, "reg_tokens": 0}, {
        "vit_small_patch16_rope_ape_224": (384, 12), "vit_base_patch16_rope_ape_224": (768, 12),
        "vit_large_patch16_rope_ape_224": (1024, 24),
    }),
    # Norms after attention and MLP, not before.
    ({"class_token": False, "fc_norm": True}, {"vit_base_patch16_rpn_224": (768, 12)}),
    # GELU by its tanh approximation.
    *(
        ({"class_token": False, "fc_norm": False, "pre_norm": False, "init_values": None, "attn_pool": pool}, {
            f"vit_{size}_siglip_{'' if pool else 'gap_'}{side}": width_depth
            for size, width_depth, sides in (
                ("base_patch32", (768, 12), (256,)), ("large_patch16", (1024, 24), (512,)),
                ("so400m_patch16", (1152, 27), (256, 384, 512)), ("giantopt_patch16", (1536, 40), (256, 384)),
            )
            for side in sides
        })
        for pool in (True, False)
    ),
)  # fmt: skip


def like_fixed(name: str) -> tuple[str, ...]:
    """Return names for --arch of the networks that load as torchvision's of this name."""
    return tuple(PREFIX + other for other in FIXED.get(name, ()))


def like_vit(chosen: Mapping[str, Any]) -> tuple[str, ...]:
    """Return names for --arch of the networks that load as the vision transformer of these arguments.

    chosen: as vit.infer makes them, with attn_pool: whether the checkpoint has one.
    """
    sizes = (chosen["embed_dim"], chosen["depth"])
    end = f"_{chosen['img_size']}"
    return tuple(
        PREFIX + name
        for marks, names in VITS
        if marks.items() <= chosen.items()
        for name, width_depth in names.items()
        if width_depth == sizes and f"_patch{chosen['patch_size']}_" in name and name.endswith(end)
    )
