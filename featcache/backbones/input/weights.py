"""The input of the weights at hand: what they say themselves, then the customs of the package that made them."""

from dataclasses import replace

from featcache.backbones.families.torchvision_import import models
from featcache.backbones.families.torchvision_weights import loaded_input
from featcache.backbones.families.vit_input import CLIP, CUSTOM, HALF, IMAGENET
from featcache.backbones.input.stated import stated_input


def with_input(architecture, network, encoder, path, content):
    """Return the Architecture with the input of a checkpoint, and `said` where it is from.

    encoder: the checkpoint's Encoder; content: as read_checkpoint gives it.
    """
    fields, said = _customs(architecture, network, encoder, path)
    stated, where, notices = stated_input(path, content)
    if architecture.inverse:
        for field in ("mean", "std", "bgr"):
            stated.pop(field, None), where.pop(field, None)
    if "size" in stated and "short_side" not in stated:
        # A short side goes with the size it was made for.
        fields, said = fields | {"short_side": None}, said | {"short_side": None}
    said = {f: words for f, words in (architecture.said | said | where).items() if words}
    note = "; ".join(line for line in (architecture.note, *notices) if line)
    return replace(architecture, **fields | stated, said=said, note=note)


def without_weights(architecture):
    """Return the Architecture with the usual short side: none of the public weights' is that of random ones."""
    return replace(architecture, short_side=None) if _of_torchvision(architecture) else architecture


def _customs(architecture, network, encoder, path):
    """By the checkpoint's layout, where it says more than the architecture: {field: value}, {field: words or None}."""
    name, words = architecture.name.removesuffix("_caffe"), encoder.way.split(".")
    if _of_torchvision(architecture):
        if encoder.method:
            fields = {"short_side": None} | ({"interpolation": "bicubic"} if "teacher" in words else {})
            return fields, {"short_side": CUSTOM}
        bare = not encoder.way and name == architecture.name
        published = bare and _has_classifier(architecture, network, encoder.tensors)
        size = architecture.size if architecture.infer else None
        return loaded_input(name, size, published, path)
    if {"visual", "trunk"} <= set(words) and name.startswith(("vit_", "timm:")) and "." not in name:
        return _open_clip(architecture, encoder.tensors)
    if "visual" in words and name.startswith("vit_"):
        fields = IMAGENET | {"short_side": architecture.size, "interpolation": "bilinear"}
        return fields, dict.fromkeys(fields, "a guess: as of SLIP, whose layout this is")
    if encoder.method and name.startswith("vit_"):
        # The methods' own evaluations; of these ViTs MoCo v3's alone is not bicubic.
        how = {"interpolation": "bilinear"} if "base_encoder" in words else {}
        return IMAGENET | {"short_side": None} | how, {"mean": None, "std": None, "short_side": CUSTOM}
    return {}, {}


def _open_clip(architecture, tensors):
    """The input of OpenCLIP's towers that are built by timm."""
    if any(key.startswith("attn_pool.") for key in tensors):
        # SigLIP's.
        sure = dict.fromkeys(("mean", "std", "short_side"))
        return HALF | {"resize": "squash", "short_side": architecture.size}, sure
    fields, said = {"short_side": architecture.size}, {"short_side": None}
    if (architecture.mean, architecture.std) == tuple(IMAGENET.values()):
        # A timm network whose own weights are not CLIP's, such as a ConvNeXt.
        fields |= CLIP
        said |= dict.fromkeys(("mean", "std"), "a guess: CLIP's, as of most of OpenCLIP's towers")
    return fields, said


def _of_torchvision(architecture):
    return architecture.name.removesuffix("_caffe") in models.list_models(module=models)


def _has_classifier(architecture, network, tensors):
    """Whether a checkpoint holds the network's own classifier, of as many classes."""
    own = {k: v.shape for k, v in network.state_dict().items() if k.startswith(architecture.classifier)}
    return all(k in tensors and tensors[k].shape == shape for k, shape in own.items())
