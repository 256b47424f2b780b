"""The input that a ViT in timm's layout was trained for, as far as its checkpoint tells: see docs/preprocessing.md."""

import math

from featcache.backbones.architecture import Architecture, Checkpoint, Fields, Origins
from featcache.backbones.checkpoints.encoder import Tensors
from featcache.backbones.families.usual_inputs import CLIP, HALF, IMAGENET, PLAIN, SHORT_SIDE_256

# Numbers of classes of ImageNet-21k and -12k, on which timm's ViTs were trained with HALF; 11221 is MIIL's.
HALF_CLASSES = (21843, 21841, 11821)


def vit_input(tensors: Tensors, size: int) -> Fields:
    """Return the input that fits a ViT's tensors, under timm's names: fields of Architecture.

    size: pixels of the position grid. Where published networks of the same shapes differ, `origins` calls it a guess.
    """
    mean, crop_pct, guess = _family(tensors, size)
    origins = dict.fromkeys(("mean", "std"), guess) if guess else {}
    if crop_pct is None:
        return mean | {"origins": origins | {"short_side": SHORT_SIDE_256}}
    short = "the size itself" if crop_pct == 1 else f"size / {crop_pct:g}"
    origins["short_side"] = f"a guess: {short}, as timm and OpenCLIP have it for most of these"
    return mean | {"size": size, "short_side": math.floor(size / crop_pct), "origins": origins}


def clip_origins(width: int, patch: int) -> dict[str, str]:
    """Return Architecture.origins of a CLIP ViT."""
    if (width, patch) == (1024, 14):
        return dict.fromkeys(("mean", "std"), "a guess: CLIP's; LAION-2B's ViT-L/14 has 0.5")
    if width > 1024 and patch == 14:
        return {"short_side": "a guess: the size itself; DFN-5B and MetaCLIP 2 squash (--resize squash)"}
    return {}


def customs(architecture: Architecture, checkpoint: Checkpoint | None) -> tuple[Fields, Origins]:
    """Return what the layout of a ViT's checkpoint tells of its input: (fields of Architecture, where each is from)."""
    if checkpoint is None:
        return {}, {}
    encoder = checkpoint.encoder
    words = encoder.prefix.split(".")
    if is_open_clips(architecture, words):
        return open_clip(architecture, encoder.tensors)
    if "visual" in words:
        fields = IMAGENET | {"short_side": architecture.size, "interpolation": "bilinear"}
        return fields, dict.fromkeys(fields, "a guess: as of SLIP, whose layout this is")
    if encoder.method:
        # How the methods themselves evaluate; among these ViTs only MoCo v3's is not bicubic.
        bilinear = {"interpolation": "bilinear"} if "base_encoder" in words else {}
        return IMAGENET | {"short_side": None} | bilinear, {"mean": None, "std": None, "short_side": SHORT_SIDE_256}
    return {}, {}


def is_open_clips(architecture: Architecture, words: list[str]) -> bool:
    """Return whether the words of an encoder's prefix are those of OpenCLIP's towers that timm builds."""
    return {"visual", "trunk"} <= set(words) and "." not in architecture.name


def open_clip(architecture: Architecture, tensors: Tensors) -> tuple[Fields, Origins]:
    """Return the input of OpenCLIP's towers that timm builds: (fields of Architecture, where each is from)."""
    origins: Origins
    if any(key.startswith("attn_pool.") for key in tensors):
        # SigLIP's.
        origins = dict.fromkeys(("mean", "std", "short_side"))
        return HALF | {"resize": "squash", "short_side": architecture.size}, origins
    fields: Fields = {"short_side": architecture.size}
    origins = {"short_side": None}
    if (architecture.mean, architecture.std) == tuple(IMAGENET.values()):
        # A timm network whose own weights are not CLIP's, such as a ConvNeXt.
        fields |= CLIP
        origins |= dict.fromkeys(("mean", "std"), "a guess: CLIP's, as of most of OpenCLIP's towers")
    return fields, origins


def _family(tensors: Tensors, size: int) -> tuple[Fields, float | None, str | None]:
    """Return (mean and std, timm's crop_pct or None for 256/224, what the guess is).

    The facts are from timm's pretrained_cfgs, OpenCLIP's configurations and the methods' own evaluations.
    """
    width, patch = len(tensors["patch_embed.proj.weight"]), tensors["patch_embed.proj.weight"].shape[-1]
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    scaled = "blocks.0.ls1.gamma" in tensors
    mean_pooled = "fc_norm.weight" in tensors and "norm.weight" not in tensors
    if "norm_pre.weight" in tensors:
        return CLIP, 1.0, clip_origins(width, patch).get("mean")
    if any(key.startswith("attn_pool.") for key in tensors):
        # SigLIP; with registers a test network of timm's.
        return HALF, 0.95 if registers else 0.9, None
    if "cls_token" not in tensors:
        if not registers and not scaled and width in (1280, 1408):
            return IMAGENET, 0.9, "a guess: ImageNet's, as of I-JEPA"
        # SigLIP without its pool; timm's own networks, with registers or scaled blocks.
        crop_pct = 1.0 if size >= 384 else 0.95 if registers or scaled else 0.9
        return HALF, crop_pct, "a guess: 0.5, as of SigLIP and timm's other ViTs without class token"
    if registers:
        if registers >= 5:
            return CLIP, 1.0, "a guess: CLIP's, as of RADIO"
        return (PLAIN, 1.0, "a guess: 0 and 1, as of TIPSv2") if registers == 1 else (IMAGENET, None, None)
    if scaled or "dist_token" in tensors or "mask_token" in tensors:
        # DINOv2, DeiT III, DeiT, MAE.
        return IMAGENET, None, None
    if mean_pooled:
        if patch == 14 and width == 1024:
            return CLIP, 1.0, "a guess: CLIP's, as of EVA"
        return IMAGENET, None, "a guess: ImageNet's, as of fine-tuned MAEs"
    # What remains is AugReg's and ViT's (0.5), or DINO's, MoCo v3's, DeiT's, MAE's (ImageNet's).
    bare = math.isqrt(tensors["pos_embed"].shape[1]) ** 2 == tensors["pos_embed"].shape[1]
    half = classes in HALF_CLASSES or bare or patch == 32 or any(key.startswith("pre_logits.") for key in tensors)
    half |= classes == 1000 and ((width, patch) in ((768, 8), (1024, 16)) or (width < 768 and size == 384))
    if half:
        return HALF, 0.95 if bare else 0.9 if size < 384 else 1.0, "a guess: 0.5, as of timm's ViTs of these shapes"
    return IMAGENET, None, "a guess: ImageNet's, as of DINO, DeiT, MAE and MoCo v3; timm's AugReg ViTs have 0.5"
