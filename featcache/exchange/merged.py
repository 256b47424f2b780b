"""A backbone and a probe's head as one network, in the forms that plain torch takes."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from featcache.backbones.architecture import Architecture
from featcache.backbones.backbone import Backbone
from featcache.feature import beside, parse_beside
from featcache.probes.heads.bn_linear import BnLinear
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.module import HeadModule
from featcache.probes.inputs.input import Input
from featcache.probes.trained import TrainedProbe

# torch 2.6 wants a bound on the batch size; nobody will reach this one.
LARGEST_BATCH = 1 << 30


class Merged(nn.Module):
    """Normalised images [B, 3, S, S] to logits [B, C], through the backbone and the head of a probe."""

    def __init__(self, backbone: Backbone, probe: TrainedProbe):
        super().__init__()
        self.backbone = backbone
        self.features = parse_beside(probe.spec.features, backbone.aliases, backbone.layers)
        self.head = HeadModule(probe.spec.head, probe.weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        results = self.backbone(images, self.features)
        values = Input(beside(self.features)).read(results[str(feature)] for feature in self.features)
        return self.head(values[:, :, None, None] if values.ndim == 2 else values.unsqueeze(3))


def example(backbone: Backbone, count: int = 2) -> torch.Tensor:
    """Return a batch of noise as the backbone takes it, float32 [count, 3, S, S]."""
    size = backbone.preprocessing.size
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return backbone.preprocessing.normalise(pixels)


def own_tensors(architecture: Architecture, network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors under the names that its architecture gives them: all but the classifier's."""
    return {k: v for k, v in network.state_dict().items() if not k.startswith(architecture.classifier)}


def as_program(merged: Merged, images: torch.Tensor) -> torch.export.ExportedProgram:
    """Trace the merged network by torch.export, for batches of any size. images: float32 [2, ...]."""
    # torch.export would take 1, if that were the example's batch size, for the only one.
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}}
    # torch.export.save takes weights that lie channels last for parts of larger ones, and warns.
    plain = copy.deepcopy(merged).to(memory_format=torch.contiguous_format)
    return torch.export.export(plain, (images,), dynamic_shapes=shapes, strict=False)


def linear_layer(probe: TrainedProbe) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (weight [C, D], bias [C]) of the linear layer that is all of a probe's head, or None if it is more.

    A batch norm before it, temperature and offset are part of the layer.
    """
    head = probe.spec.head
    if isinstance(head, BnLinear):
        weight, bias = head.folded(probe.weights)
    elif isinstance(head, Linear) and head.norm == "none":
        weight = probe.weights["fc0.weight"]
        bias = probe.weights.get("fc0.bias", torch.zeros(len(weight)))
    else:
        return None
    return weight / head.temperature, bias / head.temperature + float(head.offset)


def as_own_network(
    merged: Merged, probe: TrainedProbe, tensors: Mapping[str, torch.Tensor], images: torch.Tensor
) -> dict[str, torch.Tensor] | None:
    """Return the state dict of the architecture's own network with the probe as its classifier, or None.

    tensors: of the backbone. There is one if the classifier is a single linear layer, and if the
    network with the probe's weights in it gives the merged network's logits on the images.
    """
    layer = linear_layer(probe)
    if layer is None:
        return None
    weight, bias = layer
    architecture = merged.backbone.architecture
    with torch.random.fork_rng(devices=[]):
        network = architecture.build()
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.".startswith(architecture.classifier)
    ]
    if len(names) != 1 or network.get_submodule(names[0]).in_features != weight.shape[1]:
        return None
    network.set_submodule(names[0], nn.Linear(weight.shape[1], weight.shape[0]))
    state = dict(tensors) | {f"{names[0]}.weight": weight, f"{names[0]}.bias": bias}
    wanted = network.state_dict()
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in state.items()}:
        return None
    network.load_state_dict(state)
    with torch.inference_mode():
        expected, logits = merged(images), network.eval()(images)
    close = logits.shape == expected.shape and (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    return state if close else None
