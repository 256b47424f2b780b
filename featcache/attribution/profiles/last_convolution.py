"""GradCAM where How-to-Probe computes it: on the last convolution, before the norm and the residual sum after it."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from featcache.attribution.batch import Batch
from featcache.attribution.forward import logit_gradients
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.backbones.backbone import Backbone
from featcache.errors import BadInput
from featcache.probes.heads.module import HeadModule

# Where a layer's input is brought to the shape of its output: beside the way through the layer, not on it.
BESIDE = "downsample"


class LastConvolutionGradCAM(GradCAM):
    """GradCAM on the output of the last convolution of the layer that the head reads, through the backbone."""

    runs_backbone: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = False

    def passes(self, work: Work) -> Passes:
        """A forward pass for each image and layer; backward passes end at the last convolution."""
        return Passes(forward=work.images * work.layers)

    def misfit(self, backbone: Backbone) -> str | None:
        """Transformers have no convolution that could stand for their last layer."""
        convolutional = backbone.architecture.tokens is None and any(map(_is_convolution, backbone.modules()))
        return None if convolutional else "has no last convolution, on which How-to-Probe computes GradCAM"

    def explain(self, heads: Sequence[HeadModule], reading: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another, all from one forward pass."""
        classes = batch.by_image
        with torch.enable_grad():
            convolved, layer = _run(batch.backbone, batch.inputs, reading)
        batch.source.passes.forward += len(classes)
        for head in heads:
            maps = torch.empty(*classes.shape, *convolved.shape[2:], device=convolved.device)
            for number, cotangent in enumerate(logit_gradients(head, layer.detach(), classes)):
                (gradient,) = torch.autograd.grad(layer, convolved, cotangent, retain_graph=True)
                maps[:, number] = self.weigh(convolved.detach(), gradient)
            yield upsample(maps.flatten(0, 1), batch.size)


def _run(backbone: Backbone, inputs: torch.Tensor, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of the last convolution of a layer and of the layer, with a graph from the first to the second."""
    convolution = _last_convolution(backbone, inputs, reading)
    kept: list[torch.Tensor] = []

    def cut(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        # A copy, since a layer after it may work in place.
        return kept[0].clone()

    hook = convolution.register_forward_hook(cut)
    try:
        layer = reading.of_images(backbone, inputs)
    finally:
        hook.remove()
    return kept[0], layer


def _last_convolution(backbone: Backbone, inputs: torch.Tensor, reading: Reading) -> nn.Module:
    """Return the last convolution that runs before the last layer of a reading ends. Raises BadInput if there is none."""
    path = reading.features[-1].layer.partition("+")[0]
    ran: list[nn.Module] = []
    last: list[nn.Module] = []
    hooks = [backbone.trunk.get_submodule(path).register_forward_hook(lambda *_: last.extend(ran[-1:]))]
    hooks += [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for name, module in backbone.trunk.named_modules()
        if _is_convolution(module) and BESIDE not in name
    ]
    try:
        with torch.no_grad():
            backbone.run(inputs[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise BadInput(f"--parity how-to-probe: layer {path} of {backbone.arch} comes after no convolution for GradCAM")
    return last[0]


def _is_convolution(module: nn.Module) -> bool:
    # A B-cos convolution is a module around an ordinary one, and its output is scaled.
    return isinstance(module, nn.Conv2d) or type(module).__name__.startswith("BcosConv2d")
