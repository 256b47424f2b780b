"""A backbone and a probe's head as one network, in the forms that plain torch takes."""

import copy

import torch
from torch import nn

from featcache.feature import parse_feature
from featcache.probes.heads.module import HeadModule
from featcache.probes.inputs.input import Input

# torch 2.6 wants a bound; this one nobody meets.
LARGEST_BATCH = 1 << 30


class Merged(nn.Module):
    """Normalised images [B, 3, S, S] to logits [B, C], through the backbone and the head of a probe."""

    def __init__(self, backbone, probe):
        super().__init__()
        self.backbone = backbone
        self.feature = parse_feature(probe.spec.features, backbone.aliases, backbone.layers)
        self.head = HeadModule(probe.spec.head, probe.weights)

    def forward(self, images):
        """Return the logits."""
        values = Input(str(self.feature)).read(self.backbone(images, [self.feature])[str(self.feature)])
        return self.head(values[:, :, None, None] if values.ndim == 2 else values.unsqueeze(3))


def example(backbone, count=2):
    """A batch of noise as the backbone takes it, float32 [count, 3, S, S]."""
    size = backbone.preprocessing.size
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return backbone.preprocessing.normalise(pixels)


def own_tensors(architecture, network):
    """The backbone's tensors under the names that its architecture gives them: all but the classifier's."""
    return {k: v for k, v in network.state_dict().items() if not k.startswith(architecture.classifier)}


def as_program(merged, images):
    """Trace the merged network by torch.export, for batches of any size. images: float32 [2, ...]."""
    # Not 1 in the example, which torch.export would take for the only batch size.
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}}
    # torch.export.save takes weights that lie channels last for parts of larger ones, and warns.
    plain = copy.deepcopy(merged).to(memory_format=torch.contiguous_format)
    return torch.export.export(plain, (images,), dynamic_shapes=shapes, strict=False)


def as_own_network(merged, probe, tensors, images):
    """The state dict of the architecture's own network with the probe as its classifier, or None.

    tensors: of the backbone. There is one where the classifier is a single linear layer, and the
    network with the probe's weights in it gives the merged network's logits on the images.
    """
    architecture, head = merged.backbone.architecture, probe.spec.head
    if head.type != "linear":
        return None
    with torch.random.fork_rng(devices=[]):
        network = architecture.build()
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.".startswith(architecture.classifier)
    ]
    weight = probe.weights["fc0.weight"]
    if len(names) != 1 or network.get_submodule(names[0]).in_features != weight.shape[1]:
        return None
    network.set_submodule(names[0], nn.Linear(weight.shape[1], weight.shape[0]))
    bias = probe.weights.get("fc0.bias", torch.zeros(len(weight))) / head.temperature + head.offset
    weight = weight / head.temperature
    tensors = tensors | {f"{names[0]}.weight": weight, f"{names[0]}.bias": bias}
    wanted = network.state_dict()
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in tensors.items()}:
        return None
    network.load_state_dict(tensors)
    with torch.inference_mode():
        expected, got = merged(images), network.eval()(images)
    close = got.shape == expected.shape and (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    return tensors if close else None
