"""From a checkpoint to a frozen Backbone."""

from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
from torch import nn

from featcache.backbones.architecture import Architecture, Checkpoint, Hints
from featcache.backbones.backbone import Backbone
from featcache.backbones.checkpoints.encoder import Encoder, dotted, find_encoder, grouped
from featcache.backbones.checkpoints.files import read_checkpoint
from featcache.backbones.checkpoints.strict import Loaded, load_strictly
from featcache.backbones.families import ARCHITECTURES
from featcache.backbones.families.transformers_models import PREFIX, load_transformers
from featcache.backbones.families.user_code import module_architecture
from featcache.backbones.input.preprocessing import preprocessing_of
from featcache.backbones.input.weights import with_input, without_weights
from featcache.backbones.recognise import find_architecture, is_network, recognise, split_name
from featcache.backbones.undrawn import Undrawn
from featcache.errors import BadInput

RANDOM = "random"


def load_backbone(
    path: str | PathLike[str] | nn.Module,
    arch: str | None = None,
    seed: int = 0,
    weights_key: str | None = None,
    **preprocessing: Any,
) -> Backbone:
    """Load a frozen backbone from a checkpoint, or copy one from memory.

    path: checkpoint file or folder, "random" for an untrained network of `arch` drawn from `seed`, or a module in memory,
    which takes images [B, 3, H, W]. arch: architecture name; by default inferred from the tensors' names and shapes.
    weights_key: which encoder of a checkpoint that holds several, such as "teacher". preprocessing: fields of
    Preprocessing (size, resize, ...) in place of the weights' own, see preprocessing_of. Raises BadInput.

        backbone = load_backbone("dino_vitsmall16_pretrain_full_checkpoint.pth", weights_key="teacher", size=448)
        print(backbone.load_report)
    """
    if isinstance(path, nn.Module):
        if arch is not None or weights_key is not None:
            raise BadInput("arch, weights_key: they are for checkpoints; a module in memory is the whole backbone")
        architecture, network = module_architecture(path, preprocessing.get("size"))
        return as_backbone(architecture, network, f"{architecture.name}, a module in memory", **preprocessing)
    return as_backbone(*load_network(path, arch, seed, weights_key), **preprocessing)


def load_network(
    path: str | PathLike[str], arch: str | None = None, seed: int = 0, weights_key: str | None = None
) -> tuple[Architecture, nn.Module, str]:
    """Load the whole network that a Backbone is made of. If it is a checkpoint's, the classifier's values are undefined.

    Takes the arguments of load_backbone. Returns (architecture, network, load report). Raises BadInput.
    """
    if str(path) == RANDOM:
        if arch is None:
            raise BadInput("--backbone random needs --arch, the architecture to draw")
        architecture = without_weights(find_architecture(arch))
        return architecture, _random_network(architecture, seed), f"{arch} with random weights, seed {seed}"
    if arch and arch.startswith(PREFIX) and (loaded := load_transformers(path, arch)):
        if weights_key is not None:
            raise BadInput(f"--weights-key {weights_key}: {path} holds one model of transformers, not several encoders")
        return loaded
    content = read_checkpoint(path)
    try:
        return _load(content, path, arch, weights_key)
    except BadInput as error:
        likely = arch and _likely(content, path, weights_key)
        if not arch or not likely or likely in error.message or split_name(likely)[0] == split_name(arch)[0]:
            raise
        raise BadInput(f"{error.message}; by names and shapes the checkpoint is most like {likely}") from None


def as_backbone(architecture: Architecture, network: nn.Module, load_report: str, **preprocessing: Any) -> Backbone:
    """Cut and freeze what load_network returned. Takes preprocessing as load_backbone does."""
    made, report = preprocessing_of(architecture, **preprocessing)
    return Backbone(architecture, network, made, load_report, report)


def draw_like(backbone: Backbone, seed: int, size: int) -> Backbone:
    """Draw a backbone of another one's architecture with random weights, for images of a side."""
    architecture = without_weights(backbone.architecture)
    return as_backbone(architecture, _random_network(architecture, seed), f"random weights, seed {seed}", size=size)


def _load(
    content: Any, path: str | PathLike[str], arch: str | None, weights_key: str | None
) -> tuple[Architecture, nn.Module, str]:
    """Load what read_checkpoint returned; see load_network."""
    is_known = arch is not None and (":" in arch or split_name(arch)[0] in ARCHITECTURES)
    encoder = find_encoder(content, _signatures(arch), is_network, path, weights_key, arch if is_known else None)
    hints = _hints(encoder)
    asked = find_architecture(arch, encoder.tensors, hints) if arch else None
    architecture = asked or recognise(encoder.tensors, path, hints)
    # The user's own code may look at what it draws.
    with nullcontext() if ":" in architecture.name else Undrawn():
        network = architecture.build()
    loaded = load_strictly(
        network, architecture.named(encoder.tensors), architecture.classifier, path, architecture.name
    )
    report = _report(path, encoder, architecture, loaded, asked is not None)
    return with_input(architecture, Checkpoint(path, encoder, network), content), network, report


def _likely(content: Any, path: str | PathLike[str], weights_key: str | None) -> str:
    """Return the name of the architecture that would be taken without --arch; empty if none would."""
    try:
        encoder = find_encoder(content, _signatures(None), is_network, path, weights_key)
        return recognise(encoder.tensors, path, _hints(encoder)).name
    except BadInput:
        return ""


def _signatures(arch: str | None) -> list[str]:
    """Return the keys by which an encoder is found: those of every family, or of the architecture that is asked for."""
    if arch and ":" in arch:
        # In a network that featcache does not know, the longest name is the least likely to occur elsewhere.
        asked = find_architecture(arch)
        keys = (key for key in asked.build().state_dict() if not key.startswith(asked.classifier))
        return [max(keys, key=len)]
    family = ARCHITECTURES.get(split_name(arch)[0]) if arch else None
    families = [family] if family else ARCHITECTURES.values()
    return list(dict.fromkeys(key for a in families for key in (a.signature, *a.layouts) if key))


def _hints(encoder: Encoder) -> Hints:
    return {"words": {word for name in (encoder.prefix, *encoder.others) for word in name.split(".")}}


def _report(
    path: str | PathLike[str], encoder: Encoder, architecture: Architecture, loaded: Loaded, asked: bool
) -> str:
    """Return lines for people on what was loaded and why."""
    prefix = dotted(encoder.prefix)
    left_out = [*(prefix + name for name in loaded.left_out), *encoder.others]
    reason = "as --arch says" if asked else "by tensor names and shapes"
    absent = f"{len(loaded.absent)} batch counters, which play no part" if loaded.absent else "none"
    return "\n".join(
        (
            f"{path}",
            f"  rule: {encoder.rule} ({prefix}*)",
            f"  architecture: {architecture.name}, {reason}",
            f"  loaded: {loaded.used} tensors, {loaded.parameters / 1e6:.2f} M values",
            f"  left out: {grouped(left_out, encoder.prefix)}",
            f"  missing: {absent}",
        )
    )


def _random_network(architecture: Architecture, seed: int) -> nn.Module:
    """Build a network with convolutions drawn as He et al. (ICCV 2015), fan-in mode.

    An architecture's own initialisation counts on batch statistics: in eval mode, where batch norm
    does nothing yet, EfficientNet's lets the signal fade to 1e-8.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = architecture.build()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return network
