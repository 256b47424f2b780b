"""From a checkpoint to a frozen Backbone."""

import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.checkpoint import load_strictly, read_state_dict
from featcache.backbones.preprocessing import Preprocessing
from featcache.backbones.recognise import find_architecture, recognise
from featcache.errors import BadInput

RANDOM = "random"


def load_backbone(path, arch=None, size=None, seed=0):
    """Load a frozen backbone from a checkpoint.

    path: checkpoint file, or "random" for an untrained network of `arch` drawn from `seed`.
    arch: architecture name; by default inferred from the tensors' names and shapes.
    size: input side in pixels; by default that of the public weights. Raises BadInput.
    """
    return as_backbone(*load_network(path, arch, seed), size)


def load_network(path, arch=None, seed=0):
    """Load the whole network that a Backbone is made of, its classifier left as it was drawn.

    Arguments as load_backbone's. Returns (architecture, network, grounds). Raises BadInput.
    """
    if str(path) == RANDOM:
        if arch is None:
            raise BadInput("--backbone random needs --arch, the architecture to draw")
        architecture = find_architecture(arch)
        network = _random_network(architecture, seed)
        grounds = f"{arch} with random weights, seed {seed}"
    else:
        tensors = read_state_dict(path)
        architecture = find_architecture(arch) if arch else recognise(tensors, path)
        network = architecture.build()
        ignored = load_strictly(network, tensors, architecture.classifier, path, architecture.name)
        grounds = (
            f"{architecture.name} ({'as --arch says' if arch else 'by tensor names and shapes'}), "
            f"{len(tensors) - len(ignored)} tensors loaded from {path}; "
            f"classifier left out: {', '.join(ignored) or 'none there'}"
        )
    return architecture, network, grounds


def as_backbone(architecture, network, grounds, size=None):
    """Cut and freeze what load_network returned; size as load_backbone's."""
    preprocessing = Preprocessing(size or architecture.size, architecture.mean, architecture.std)
    return Backbone(architecture, network, preprocessing, grounds)


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
