"""The frozen network that features come from."""

import hashlib

import torch
from torch import nn

from featcache.backbones import ARCHITECTURES
from featcache.backbones.checkpoint import load_strictly, read_state_dict
from featcache.backbones.preprocessing import Preprocessing
from featcache.errors import BadInput, nearest

RANDOM = "random"


class Backbone(nn.Module):
    """A frozen network in eval mode that yields features of its layers.

    Attributes: arch (name), aliases (`last` and the like to module paths), layers (module paths),
    preprocessing, weights_sha256 (over the trunk's tensors), grounds (one line for people: how the
    architecture was found and what was loaded).
    """

    def __init__(self, architecture, network, preprocessing, grounds):
        super().__init__()
        self.arch = architecture.name
        self.aliases = architecture.aliases
        self.preprocessing = preprocessing
        self.grounds = grounds
        # channels_last: 1.3 to 1.5 times faster on CPUs, and what tensor cores want.
        self.trunk = architecture.trunk(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.weights_sha256 = _hash_tensors(self.trunk.state_dict())
        self.layers = [name for name, _ in self.trunk.named_modules() if name]

    def train(self, mode=True):
        """Stay in eval mode whatever is asked: batch-norm statistics never move."""
        return super().train(False)

    def forward(self, images, features):
        """Run normalised images [B, 3, H, W] and return {str(feature): tensor}.

        `pooled` gives [B, C], `spatial` [B, C, h, w]. The result is a copy, so that layers which
        work in place later do not reach it; gradients flow if the caller asks for them.
        """
        results = {}

        def keep(feature):
            def hook(module, inputs, output):
                if not (isinstance(output, torch.Tensor) and output.ndim == 4):
                    raise BadInput(
                        f"feature {feature}: layer {feature.layer} of {self.arch} yields no [B, C, H, W] map"
                    )
                results[str(feature)] = output.mean((2, 3)) if feature.reduction == "pooled" else output.clone()

            return hook

        hooks = [self.trunk.get_submodule(f.layer).register_forward_hook(keep(f)) for f in features]
        try:
            self.trunk(images.contiguous(memory_format=torch.channels_last))
        finally:
            for hook in hooks:
                hook.remove()
        return results


def _hash_tensors(tensors):
    """sha256 (hex) over names, dtypes, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_backbone(path, arch=None, size=None, seed=0):
    """Load a frozen backbone from a checkpoint.

    path: checkpoint file, or "random" for an untrained network of `arch` drawn from `seed`.
    arch: architecture name; by default inferred from the tensors' names and shapes.
    size: input side in pixels; by default that of the public weights. Raises BadInput.
    """
    if arch is not None and arch not in ARCHITECTURES:
        raise BadInput(
            f"unknown architecture {arch!r}{nearest(arch, ARCHITECTURES)} (known: {', '.join(ARCHITECTURES)})"
        )
    if str(path) == RANDOM:
        if arch is None:
            raise BadInput("--backbone random needs --arch, the architecture to draw")
        architecture = ARCHITECTURES[arch]
        network = _random_network(architecture, seed)
        grounds = f"{arch} with random weights, seed {seed}"
    else:
        tensors = read_state_dict(path)
        architecture = ARCHITECTURES[arch] if arch else _infer(tensors, path)
        network = architecture.build()
        ignored = load_strictly(network, tensors, architecture.classifier, path, architecture.name)
        grounds = (
            f"{architecture.name} ({'as --arch says' if arch else 'by tensor names and shapes'}), "
            f"{len(tensors) - len(ignored)} tensors loaded from {path}; "
            f"classifier left out: {', '.join(ignored) or 'none there'}"
        )
    preprocessing = Preprocessing(size or architecture.size, architecture.mean, architecture.std)
    return Backbone(architecture, network, preprocessing, grounds)


def _infer(tensors, path):
    """Return the architecture whose tensors agree best in name and shape; the load then checks all."""
    family = [a for a in ARCHITECTURES.values() if a.signature in tensors]
    if not family:
        keys = ", ".join(list(tensors)[:5])
        raise BadInput(
            f"cannot tell the architecture of {path} from its keys ({keys}, ...): no known network has them; "
            f"say it with --arch (known: {', '.join(ARCHITECTURES)})"
        )

    def agreement(architecture):
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in architecture.build().state_dict().items()}
        agreeing = sum(k in tensors and tensors[k].shape == shape for k, shape in shapes.items())
        return agreeing / len(shapes.keys() | tensors.keys())

    return max(family, key=agreement)


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
