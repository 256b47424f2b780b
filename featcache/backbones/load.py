"""From a checkpoint to a frozen Backbone."""

import torch
from torch import nn

from featcache.backbones import ARCHITECTURES
from featcache.backbones.backbone import Backbone
from featcache.backbones.checkpoint import find_encoder, grouped, load_strictly
from featcache.backbones.checkpoint_file import read_checkpoint
from featcache.backbones.preprocessing import default_preprocessing
from featcache.backbones.recognise import find_architecture, recognise
from featcache.backbones.resnet import name_children
from featcache.errors import BadInput

RANDOM = "random"


def load_backbone(path, arch=None, seed=0, weights_key=None, **preprocessing):
    """Load a frozen backbone from a checkpoint.

    path: checkpoint file or folder, or "random" for an untrained network of `arch` drawn from `seed`.
    arch: architecture name; by default inferred from the tensors' names and shapes.
    weights_key: which encoder of a checkpoint that holds several, such as "teacher". preprocessing:
    fields of Preprocessing (size, resize, ...) in place of those of the public weights; None leaves
    them. Raises BadInput.
    """
    return as_backbone(*load_network(path, arch, seed, weights_key), **preprocessing)


def load_network(path, arch=None, seed=0, weights_key=None):
    """Load the whole network that a Backbone is made of, its classifier left as it was drawn.

    Arguments as load_backbone's. Returns (architecture, network, report). Raises BadInput.
    """
    if str(path) == RANDOM:
        if arch is None:
            raise BadInput("--backbone random needs --arch, the architecture to draw")
        architecture = find_architecture(arch)
        network = _random_network(architecture, seed)
        report = f"{arch} with random weights, seed {seed}"
    else:
        content = read_checkpoint(path)
        asked = find_architecture(arch) if arch else None
        encoder = find_encoder(content, _signatures(asked), path, weights_key)
        architecture = asked or recognise(encoder.tensors, path)
        network = architecture.build()
        loaded = load_strictly(network, encoder.tensors, architecture.classifier, path, architecture.name)
        report = _report(path, encoder, architecture, loaded, asked)
    return architecture, network, report


def as_backbone(architecture, network, report, **preprocessing):
    """Cut and freeze what load_network returned; preprocessing as load_backbone's."""
    return Backbone(architecture, network, default_preprocessing(architecture).changed(**preprocessing), report)


def _signatures(asked):
    """The keys to look for, with what renames the tensors around each."""
    children = {"7.0.conv1.weight": name_children}
    if asked is not None:
        return {asked.signature: None} | (children if asked.signature == "layer4.0.conv1.weight" else {})
    return {a.signature: None for a in ARCHITECTURES.values()} | children


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
