"""From a checkpoint to a frozen Backbone."""

import torch
from torch import nn

from featcache.backbones import ARCHITECTURES
from featcache.backbones.backbone import Backbone
from featcache.backbones.checkpoint import find_encoder, grouped, load_strictly
from featcache.backbones.checkpoint_file import read_checkpoint
from featcache.backbones.loaded_input import with_input, without_weights
from featcache.backbones.preprocessing import preprocessing_of
from featcache.backbones.recognise import find_architecture, known, recognise
from featcache.errors import BadInput

RANDOM = "random"


def load_backbone(path, arch=None, seed=0, weights_key=None, **preprocessing):
    """Load a frozen backbone from a checkpoint.

    path: checkpoint file or folder, or "random" for an untrained network of `arch` drawn from `seed`.
    arch: architecture name; by default inferred from the tensors' names and shapes.
    weights_key: which encoder of a checkpoint that holds several, such as "teacher". preprocessing:
    fields of Preprocessing (size, resize, ...) in place of the weights' own, see preprocessing_of.
    Raises BadInput.
    """
    return as_backbone(*load_network(path, arch, seed, weights_key), **preprocessing)


def load_network(path, arch=None, seed=0, weights_key=None):
    """Load the whole network that a Backbone is made of, its classifier left as it was drawn.

    Arguments as load_backbone's. Returns (architecture, network, report). Raises BadInput.
    """
    if str(path) == RANDOM:
        if arch is None:
            raise BadInput("--backbone random needs --arch, the architecture to draw")
        architecture = without_weights(find_architecture(arch))
        network = _random_network(architecture, seed)
        report = f"{arch} with random weights, seed {seed}"
    else:
        content = read_checkpoint(path)
        encoder = find_encoder(content, _signatures(arch), known, path, weights_key)
        hints = _hints(encoder)
        asked = find_architecture(arch, encoder.tensors, hints) if arch else None
        architecture = asked or recognise(encoder.tensors, path, hints)
        network = architecture.build()
        loaded = load_strictly(
            network, architecture.named(encoder.tensors), architecture.classifier, path, architecture.name
        )
        report = _report(path, encoder, architecture, loaded, asked)
        architecture = with_input(architecture, network, encoder, path, content)
    return architecture, network, report


def as_backbone(architecture, network, report, **preprocessing):
    """Cut and freeze what load_network returned; preprocessing as load_backbone's."""
    made, said = preprocessing_of(architecture, **preprocessing)
    return Backbone(architecture, network, made, report, said)


def _signatures(arch):
    """The keys by which an encoder is found: of every family, or of the architecture that is asked for."""
    if arch and ":" in arch:
        # Of a stranger's network the longest name is the least likely to stand elsewhere.
        asked = find_architecture(arch)
        keys = (key for key in asked.build().state_dict() if not key.startswith(asked.classifier))
        return [max(keys, key=len)]
    families = [ARCHITECTURES[arch]] if arch in ARCHITECTURES else ARCHITECTURES.values()
    return list(dict.fromkeys(key for a in families for key in (a.signature, *a.layouts) if key))


def _hints(encoder):
    """What a method fixes and tensors do not say, see recognise."""
    words = {word for name in (encoder.way, *encoder.others) for word in name.split(".")}
    if words & {"base_encoder", "momentum_encoder"}:
        # The heads of MoCo v3's ViTs are not 64 wide: 12 in small and base.
        return {"heads": 12}
    if words & {"teacher", "student"} and "mask_token" not in encoder.tensors:
        return {"positions": "dino"}
    return {}


def _report(path, encoder, architecture, loaded, asked):
    """What was loaded and why, in lines for people."""
    prefix = f"{encoder.way}." if encoder.way else ""
    left_out = [*(prefix + name for name in loaded.left_out), *encoder.others]
    grounds = "as --arch says" if asked else "by tensor names and shapes"
    absent = f"{len(loaded.absent)} batch counters, which play no part" if loaded.absent else "none"
    return "\n".join(
        (
            f"{path}",
            f"  rule: {encoder.rule} ({prefix}*)",
            f"  architecture: {architecture.name}, {grounds}",
            f"  loaded: {loaded.used} tensors, {loaded.parameters / 1e6:.2f} M values",
            f"  left out: {grouped(left_out, encoder.way)}",
            f"  missing: {absent}",
        )
    )


def _random_network(architecture, seed):
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
