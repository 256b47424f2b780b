"""Vision transformers in timm's key layout: those of DINO, DINOv2, MAE, MoCo v3, DeiT and timm itself.

Everything but the number of heads follows from the tensors' shapes; timm's VisionTransformer is built
from them. Keys of DINOv2's code and of mmpretrain are renamed to timm's.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from featcache.backbones.architecture import Architecture, Hints, Tokens, last_blocks, with_forward
from featcache.backbones.checkpoints.encoder import Tensors
from featcache.backbones.families.attention_heads import (
    PUBLISHED,
    TWELVE,
    choose_heads,
    has_moco_v3_positions,
    twelve_by_names,
    usual_heads,
)
from featcache.backbones.families.lookalikes import like_vit
from featcache.backbones.families.positions import fit_positions
from featcache.backbones.families.vit_input import customs, vit_input
from featcache.errors import BadInput

# Width to name and usual depth.
SIZES = {
    192: ("tiny", 12), 384: ("small", 12), 768: ("base", 12), 1024: ("large", 24), 1280: ("huge", 32),
    1408: ("giant", 40), 1536: ("giant2", 40),
}  # fmt: skip
EPS = 1e-6
# For networks with a norm before their blocks.
CLIP_EPS = 1e-5
# Networks that can be named: {width: patches}, each at 224 pixels.
PATCHES = {192: (16,), 384: (8, 14, 16), 768: (8, 14, 16, 32), 1024: (14, 16), 1280: (14,), 1536: (14,)}
CLASSIFIER = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "attn_pool.", "mask_token", "masked_embed", "decoder_")
SIGNATURE = "blocks.0.attn.qkv.weight"
NEEDED = (SIGNATURE, "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")


def architectures() -> dict[str, Architecture]:
    """Return `vit`, which is read off any checkpoint of the layout, and the usual sizes by name."""
    usual = {}
    for width, patches in PATCHES.items():
        for patch in patches:
            made = _described(_usual(width, patch))
            usual[made.name] = made
    generic = Architecture(
        name="vit", build=_no_shapes, trunk=_trunk, signature=SIGNATURE, classifier=CLASSIFIER, aliases={},
        layouts=LAYOUTS, infer=infer, customs=customs, generic="a ViT in the layout of timm or DINOv2",
    )  # fmt: skip
    return {"vit": generic, **usual}


def _usual(width: int, patch: int) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer for a usual size."""
    swiglu = width == 1536
    return {
        "embed_dim": width, "depth": SIZES[width][1], "num_heads": usual_heads(width), "patch_size": patch,
        "img_size": 224, "hidden": 8192 if swiglu else 4 * width, "swiglu": swiglu, "eps": EPS,
    }  # fmt: skip


def _no_shapes() -> nn.Module:
    raise BadInput("--arch vit is read off a checkpoint's shapes; without one name its size, as vit_base_patch16")


def infer(tensors: Tensors, hints: Hints) -> Architecture | None:
    """Read an Architecture off the shapes of a checkpoint in timm's layout; None if it is no such ViT.

    Raises BadInput for a number of heads that cannot be, and for a Perception Encoder (Bolya et al., NeurIPS 2025),
    whose tensors would fit.
    """
    if any(key not in tensors for key in NEEDED):
        return None
    attn_pool = any(key.startswith("attn_pool.") for key in tensors)
    if attn_pool and "norm_pre.weight" in tensors:
        raise BadInput(
            "these are the tensors of a Perception Encoder, whose attention has rotary positions; name it with --arch, "
            "as timm:vit_pe_core_base_patch16_224"
        )
    _, length, width = tensors["pos_embed"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    hidden, gated = tensors["blocks.0.mlp.fc1.weight"].shape[0], tensors["blocks.0.mlp.fc2.weight"].shape[1]
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    prefix = sum(key in tensors for key in ("cls_token", "dist_token")) + registers
    bare = math.isqrt(length) ** 2 == length  # Only patches have positions.
    side = math.isqrt(length if bare else length - prefix)
    if side * side + (0 if bare else prefix) != length:
        return None
    heads, reason, others = _heads(tensors, depth, hidden == 2 * gated, side, hints)
    # The mask token of DINOv2's code has two axes, that of MAE's three.
    dinov2 = "mask_token" in tensors and tensors["mask_token"].ndim == 2
    chosen = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch,
        "img_size": side * patch,
        "hidden": hidden,
        "swiglu": hidden == 2 * gated,
        "eps": hints.get("eps", CLIP_EPS if "norm_pre.weight" in tensors else EPS),
        "reg_tokens": registers,
        "no_embed_class": bare,
        "class_token": "cls_token" in tensors,
        "distilled": "dist_token" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "proj_bias": "blocks.0.attn.proj.bias" in tensors,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "pre_norm": "norm_pre.weight" in tensors,
        "fc_norm": "fc_norm.weight" in tensors and "norm.weight" not in tensors,
    }
    note = f"heads: {heads}, {reason}"
    if others:
        note += f" ({others[0]} of these shapes have {others[1]}: --arch {_name(chosen | {'num_heads': others[1]})})"
    alike = like_vit(chosen | {"attn_pool": attn_pool})
    made = _described(chosen, _positions_rule(tensors, hints), 224 if dinov2 else side * patch)
    return replace(made, note=note, alike=alike, **vit_input(tensors, side * patch))


def _positions_rule(tensors: Tensors, hints: Hints) -> str:
    """Return the one of positions.RULES by which the code that wrote a checkpoint resizes its positions."""
    if "mask_token" in tensors:
        dinov2 = tensors["mask_token"].ndim == 2
        return ("antialias" if "reg_token" in tensors else "dino") if dinov2 else "plain"
    words = hints.get("words", set())
    return "dino" if words & {"teacher", "student"} and not twelve_by_names(words) else "plain"


def _heads(
    tensors: Tensors, depth: int, swiglu: bool, side: int, hints: Hints
) -> tuple[int, str, tuple[str, int] | None]:
    """Return (attention heads, why, (whose networks of the same shapes have others, how many) or None)."""
    positions, norm = tensors["pos_embed"][0], tensors.get("blocks.0.attn.q_norm.weight")
    width = positions.shape[1]
    if norm is not None and "heads" not in hints and norm.numel() and width % norm.numel() == 0:
        return width // norm.numel(), "by the width of the queries' norm", None
    # timm's networks for tests; SigLIP 2's giant, where DINOv2's has a SwiGLU; the `small` of mmpretrain and early timm.
    published = PUBLISHED | {64: 2, 96: 3} | ({} if swiglu else {1536: 16}) | ({768: 8} if depth == 8 else {})
    heads, reason = choose_heads(width, hints, published)
    if "heads" in hints or width not in TWELVE:
        return heads, reason, None
    method = twelve_by_names(hints.get("words", set()))
    twelve = f"the names of the tensors, which are {method}'s" if method else ""
    if not twelve and has_moco_v3_positions(positions[-side * side :]):
        twelve = "the fixed position embeddings, which are MoCo v3's"
    if twelve:
        return 12, f"a guess from {twelve}", ("other ViTs", heads)
    return heads, reason, (f"{TWELVE[width]} ViTs", 12)


def _name(chosen: Mapping[str, Any]) -> str:
    """Return the name of these arguments, which says everything that tensors do not."""
    width, depth, heads, patch = (chosen[k] for k in ("embed_dim", "depth", "num_heads", "patch_size"))
    known, usual_depth = SIZES.get(width, ("", 0))
    name = f"vit_{known}" if depth == usual_depth else f"vit_d{width}_l{depth}"
    name += f"_patch{patch}"
    registers = chosen.get("reg_tokens", 0)
    name += f"_reg{registers}" if registers else ""
    name += f"_heads{heads}" if heads != usual_heads(width) else ""
    return name + (f"_eps{chosen['eps']:g}" if chosen["eps"] != EPS else "")


def _described(chosen: Mapping[str, Any], rule: str = "plain", size: int | None = None) -> Architecture:
    """Return the Architecture of these arguments. rule: one of positions.RULES. size: of the input."""
    name, depth, patch = _name(chosen), chosen["depth"], chosen["patch_size"]
    registers = chosen.get("reg_tokens", 0)
    cls, distilled = chosen.get("class_token", True), chosen.get("distilled", False)
    return Architecture(
        name=name,
        build=partial(_build, **chosen),
        trunk=_trunk,
        signature=SIGNATURE,
        classifier=CLASSIFIER,
        aliases=last_blocks([f"blocks.{i}" for i in range(depth)], "norm"),
        size=size or chosen["img_size"],
        interpolation="bicubic",
        tokens=Tokens(prefix=cls + distilled + registers, cls=cls, patch=patch),
        heads=chosen["num_heads"],
        layouts=LAYOUTS,
        infer=infer,
        customs=customs,
        fit=partial(_fit, rule, patch, name),
    )


def _build(
    embed_dim: int,
    hidden: int,
    swiglu: bool,
    eps: float,
    distilled: bool = False,
    fc_norm: bool = False,
    class_token: bool = True,
    **chosen: Any,
) -> nn.Module:
    try:
        from timm.layers import SwiGLUPacked  # type: ignore[attr-defined]  # timm does not list its exports
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise BadInput("this vision transformer needs the package timm: pip install 'featcache[timm]'") from None
    if swiglu:
        chosen |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return (VisionTransformerDistilled if distilled else VisionTransformer)(
        embed_dim=embed_dim,
        # timm rounds the product down.
        mlp_ratio=(hidden + 0.5) / embed_dim,
        norm_layer=partial(nn.LayerNorm, eps=eps),
        num_classes=0,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=fc_norm,
        **chosen,
    )


def _trunk(network: nn.Module) -> nn.Module:
    """Return the network up to all tokens after the final norm, without what turns them into logits."""
    network.fc_norm = network.head = nn.Identity()
    return with_forward(network, lambda self, images: self.forward_features(images))


def _fit(rule: str, patch: int, arch: str, network: Any, size: int) -> str:
    note = fit_positions(network, "pos_embed", size, patch, rule, arch)
    network.patch_embed.set_input_size(img_size=(size, size))
    return note


def from_dinov2(tensors: Tensors) -> Tensors:
    """Rename the keys of DINOv2's code to timm's; those of timm are left as they are.

    DINOv2's position embeddings have an entry for the class token, which is added to that token here, and none for
    the registers. A ViT-g has a SwiGLU whose two halves are one matrix, w12. Checkpoints of DINOv2's training count
    blocks within chunks, blocks.CHUNK.BLOCK.
    """
    renamed = {}
    for key, value in tensors.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        key = re.sub(r"^(blocks\.\d+)\.gamma_(\d)$", r"\1.ls\2.gamma", key)  # DeiT III
        renamed[key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = value
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    return renamed


MMPRETRAIN = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^pre_norm\.", "norm_pre."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^layers\.(\d+)\.ln(\d)\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.attn\.gamma1\.weight$", r"blocks.\1.ls1.gamma"),
    (r"^layers\.(\d+)\.ffn\.gamma2\.weight$", r"blocks.\1.ls2.gamma"),
    (r"^layers\.(\d+)\.ffn\.(?:layers\.0\.0|w12)\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.(?:layers\.1|w3)\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
)


def from_mmpretrain(tensors: Tensors) -> Tensors:
    """Rename the keys of mmpretrain's (mmcls's, mmselfsup's) VisionTransformer to timm's."""
    renamed = {}
    for key, value in tensors.items():
        pattern, new = next(((p, n) for p, n in MMPRETRAIN if re.match(p, key)), (r"^", ""))
        renamed[re.sub(pattern, new, key)] = value
    return renamed


# {key by which a layout is told: function to timm's}; the second and third are DINOv2's, whole and in chunks.
LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "layers.0.ln1.weight": from_mmpretrain,
    SIGNATURE: from_dinov2,
    "blocks.0.0.attn.qkv.weight": from_dinov2,
}
