"""Layer-wise relevance propagation through zennit: its composites, for backbones and heads that its rules fit.

zennit's canonisers make batch norms part of the convolutions before them, and the sums of residual blocks modules with a
rule. What a rule computes without knowing the relevance is computed once here, and serves all probes and classes.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zennit import rules
from zennit.canonizers import AttributeCanonizer, MergeBatchNorm
from zennit.composites import layer_map_base
from zennit.core import BasicHook, Composite, ParamMod
from zennit.layer import Sum
from zennit.torchvision import ResNetBasicBlockCanonizer, ResNetBottleneckCanonizer

from featcache.attribution.frozen_norms import scale_and_shift
from featcache.backbones.families import clip, efficientnet_lite
from featcache.backbones.families.resnet import DeepStem
from featcache.backbones.families.torchvision_import import models
from featcache.probes.heads.bcos_modules import BatchNormUncentered2d, uncentred_scale
from featcache.probes.heads.module import HeadModule

# Modules whose computation is that of their parts, or a layer that zennit has a rule for.
LAYERS = (
    nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.Identity, nn.Dropout, nn.ZeroPad2d,
)  # fmt: skip
NETWORKS = (
    models.ResNet, models.resnet.BasicBlock, models.resnet.Bottleneck, DeepStem, models.VGG, models.AlexNet,
    models.SqueezeNet, models.squeezenet.Fire, models.MobileNetV2, models.mobilenetv2.InvertedResidual,
    clip.ModifiedResNet, clip.Bottleneck, efficientnet_lite.Trunk,
)  # fmt: skip


def unknown_part(trunk: nn.Module) -> str | None:
    """Return the modules that rules and canonisers do not fit, in words, or None if they fit the whole network."""
    previous: nn.Module | None = None
    # CLIP's attention pool comes behind the maps.
    modules = [module for name, module in trunk.named_modules() if not f"{name}.".startswith("attnpool.")]
    for module in modules:
        # The package of EfficientNet-Lite has classes of its own for a convolution and an identity.
        lite = type(module).__module__.startswith("efficientnet_lite_pytorch.")
        block = lite and not getattr(module, "has_se", False)
        if not (isinstance(module, NETWORKS) or type(module) in LAYERS or block or _is_sequence(module)):
            return f"{type(module).__name__} modules"
        if isinstance(module, nn.BatchNorm2d) and not isinstance(previous, nn.Conv2d):
            return "batch norms that follow no convolution"
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            previous = module
    return None


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module is an nn.Sequential of another name, such as torchvision's Conv2dNormActivation."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class _MergeNorms(MergeBatchNorm):  # type: ignore[misc]  # zennit has no types
    """Merges every batch norm into the convolution before it.

    zennit's own goes by modules without parts, and so does not see a convolution that holds its padding; and the norms
    that it leaves behind still divide by sqrt(1 + eps), which is 3 % of EfficientNet-Lite's features in the end.
    """

    def apply(self, root_module: nn.Module) -> list[Any]:
        """Merge, and return what undoes it."""
        merges, previous = [], None
        for module in root_module.modules():
            if isinstance(module, nn.BatchNorm2d) and previous is not None:
                merge = self.copy()
                norm: Any = module
                merge.register((previous,), norm)
                norm.running_var.data.sub_(norm.eps)
                merges.append(merge)
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                previous = module if isinstance(module, nn.Conv2d) else None
        return merges


class _SumBlocks(AttributeCanonizer):  # type: ignore[misc]  # zennit has no types
    """Gives the residual blocks that zennit does not know a module for their sum."""

    def __init__(self) -> None:
        super().__init__(self._attributes)

    @staticmethod
    def _attributes(name: str, module: nn.Module) -> dict[str, Any] | None:
        forward: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
        if isinstance(module, clip.Bottleneck):
            forward = _clip_bottleneck
        elif isinstance(module, models.mobilenetv2.InvertedResidual) and module.use_res_connect:
            forward = _inverted_residual
        elif type(module).__name__ == "MBConvBlock":
            forward = _mbconv
        return forward and {"forward": forward.__get__(module), "canonizer_sum": Sum()}


def _clip_bottleneck(block: Any, maps: torch.Tensor) -> torch.Tensor:
    out = block.relu1(block.bn1(block.conv1(maps)))
    out = block.avgpool(block.relu2(block.bn2(block.conv2(out))))
    shortcut = maps if block.downsample is None else block.downsample(maps)
    return block.relu3(block.canonizer_sum(torch.stack([block.bn3(block.conv3(out)), shortcut], -1)))


def _inverted_residual(block: Any, maps: torch.Tensor) -> torch.Tensor:
    return block.canonizer_sum(torch.stack([maps, block.conv(maps)], -1))


def _mbconv(block: Any, maps: torch.Tensor) -> torch.Tensor:
    """Compute EfficientNet-Lite's block, which has no squeeze-and-excitation; its activation is called _swish."""
    out, given = maps, block._block_args
    if given.expand_ratio != 1:
        out = block._swish(block._bn0(block._expand_conv(out)))
    out = block._swish(block._bn1(block._depthwise_conv(out)))
    out = block._bn2(block._project_conv(out))
    if block.id_skip and given.stride == 1 and given.input_filters == given.output_filters:
        out = block.canonizer_sum(torch.stack([maps, out], -1))
    return out


class _Once(BasicHook):  # type: ignore[misc]  # zennit has no types
    """A rule that runs its module once on each of the inputs that it makes, however often relevance comes back."""

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> tuple[torch.Tensor | None, ...]:
        """Return the relevance of the input, as BasicHook.backward does."""
        made = self.stored_tensors.get("made")
        if made is None:
            made = self.stored_tensors["made"] = self._made(module)
        inputs, outputs, live = made
        slopes = self.gradient_mapper(grad_output[0], outputs)
        slopes = [slopes] if isinstance(slopes, torch.Tensor) else list(slopes)
        # What is multiplied by inputs of zero, or comes from slopes of zero, is zero.
        at = [number for number in range(len(inputs)) if live[number] and bool(slopes[number].any())]
        found = torch.autograd.grad(
            [outputs[n] for n in at], [inputs[n] for n in at], [slopes[n] for n in at], retain_graph=True
        )
        gradients = dict(zip(at, found, strict=True))
        relevance = self.reducer(inputs, [gradients.get(n, inputs[n].new_zeros(())) for n in range(len(inputs))])
        relevance = relevance.detach().expand(inputs[0].shape)
        return tuple(relevance if each.shape == relevance.shape else None for each in grad_input)

    def _made(self, module: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[bool]]:
        original, inputs, outputs = self.stored_tensors["input"][0].detach(), [], []
        for by_input, by_weights, by_output in zip(
            self.input_modifiers, self.param_modifiers, self.output_modifiers, strict=True
        ):
            values = by_input(original).clone().requires_grad_()
            with ParamMod.ensure(by_weights)(module) as modified, torch.enable_grad():
                outputs.append(by_output(modified.forward(values)))
            inputs.append(values)
        return inputs, outputs, [bool(values.any()) for values in inputs]


class _Gamma(_Once, rules.Gamma):  # type: ignore[misc]  # zennit has no types
    """zennit's Gamma."""


class _ZPlus(_Once, rules.ZPlus):  # type: ignore[misc]  # zennit has no types
    """zennit's ZPlus."""


class _ZBox(_Once, rules.ZBox):  # type: ignore[misc]  # zennit has no types
    """zennit's ZBox."""


class _Flat(_Once, rules.Flat):  # type: ignore[misc]  # zennit has no types
    """zennit's Flat."""


def box_composite(low: torch.Tensor, high: torch.Tensor, gamma: float) -> Composite:
    """Return zennit's EpsilonGammaBox. low, high: [1, C, 1, 1], a black and a white pixel as the backbone takes them."""
    return _composite(_ZBox(low, high), _Gamma(gamma))


def flat_composite() -> Composite:
    """Return zennit's EpsilonPlusFlat."""
    return _composite(_Flat(), _ZPlus())


def _composite(first: BasicHook, convolution: BasicHook) -> Composite:
    """Return a composite with a rule for the first convolution, one for the others, and the usual ones for the rest.

    The first is told by its channels: zennit's own composites take the first in the order of registration.
    """

    def hook_of(context: dict, name: str, module: nn.Module) -> Any:
        if isinstance(module, nn.Conv2d):
            return first if module.in_channels == 3 else convolution
        return next((rule for kinds, rule in layer_map_base() if isinstance(module, kinds)), None)

    return Composite(hook_of, canonisers())


def head_composite(rule: BasicHook) -> Composite:
    """Return the composite of canonical_head: a rule for its layers, the usual ones for the rest."""

    def hook_of(context: dict, name: str, module: nn.Module) -> Any:
        if isinstance(module, nn.Conv2d):
            return rule
        return next((usual for kinds, usual in layer_map_base() if isinstance(module, kinds)), None)

    return Composite(hook_of)


def canonisers() -> list[Any]:
    """Return the canonisers of all networks that are served."""
    return [_MergeNorms(), ResNetBottleneckCanonizer(), ResNetBasicBlockCanonizer(), _SumBlocks()]


def canonical_head(head: HeadModule) -> nn.Sequential:
    """Return a head's layers as 1x1 convolutions, activations and the mean over positions.

    Norms are merged into the layers, and temperature and offset are left out. Maps [B, D, h, w] to [B, C, 1, 1].
    """
    parts: list[nn.Module] = []
    waiting: nn.BatchNorm2d | None = None  # A norm before the first layer.
    for module in head.layers.values():
        if isinstance(module, nn.BatchNorm2d) and not parts:
            waiting = module
        elif isinstance(module, nn.BatchNorm2d | BatchNormUncentered2d):
            _merge(parts[-1], *_scale_and_shift(module))
        else:
            parts.append(copy.deepcopy(module))
            if waiting is not None:
                scale, shift = _scale_and_shift(waiting)
                _merge_before(parts[-1], scale, shift)
                waiting = None
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*([pool, *parts] if head.head.averages_features else [*parts, pool])).eval()


def _scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(norm, BatchNormUncentered2d):
        scale = uncentred_scale(norm.weight, norm.running_var)
        return scale, torch.zeros_like(scale)
    return scale_and_shift(norm)


def _merge(layer: Any, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Let a convolution compute scale y + shift in the place of y."""
    bias = shift if layer.bias is None else layer.bias * scale + shift
    layer.weight = nn.Parameter(layer.weight * scale[:, None, None, None], requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)


def _merge_before(layer: Any, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Let a 1x1 convolution see scale x + shift in the place of x."""
    moved = layer.weight[:, :, 0, 0] @ shift
    layer.bias = nn.Parameter(moved if layer.bias is None else layer.bias + moved, requires_grad=False)
    layer.weight = nn.Parameter(layer.weight * scale[:, None, None], requires_grad=False)
