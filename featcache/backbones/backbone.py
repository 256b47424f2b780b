"""The frozen network that features come from."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from featcache.backbones.architecture import Architecture
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.reductions import Output
from featcache.errors import BadInput
from featcache.feature import Feature


class Backbone(nn.Module):
    """A frozen network in eval mode that yields features of its layers.

    Attributes: arch (the architecture's name), architecture, aliases (`last` and the like to module paths), layers
    (module paths), preprocessing, weights_sha256 (over the tensors that run: the trunk's, with positions fitted to the
    input's size), load_report (a few lines for people on how the architecture was found and what was loaded),
    preprocessing_report (lines on where the preprocessing is from), class_token (whether the last layer has one).

        features = parse_features("pooled,layer3:spatial", backbone.aliases, backbone.layers)
        pooled = backbone(images, features)["layer4:pooled"]  # [B, 2048] for a ResNet-50
    """

    def __init__(
        self,
        architecture: Architecture,
        network: nn.Module,
        preprocessing: Preprocessing,
        load_report: str,
        preprocessing_report: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.arch = architecture.name
        self.architecture = architecture
        self.aliases = architecture.aliases
        self.preprocessing = preprocessing
        self.preprocessing_report = preprocessing_report
        fitted = architecture.fit(network, preprocessing.size) if architecture.fit else ""
        self.load_report = "\n  ".join(line for line in (load_report, *architecture.note.split("\n"), fitted) if line)
        self.trunk = architecture.trunk(network).eval().requires_grad_(False)
        # channels_last: 1.3 to 1.5 times faster on CPUs, and what tensor cores want. It has no meaning for videos.
        if all(tensor.ndim != 5 for tensor in self.trunk.state_dict().values()):
            self.trunk.to(memory_format=torch.channels_last)
        self.weights_sha256 = hash_tensors(self.trunk.state_dict())
        # What stands in the classifier's place is no layer of the network.
        gone = architecture.classifier
        self.layers = [name for name, _ in self.trunk.named_modules() if name and not f"{name}.".startswith(gone)]
        self.class_token = architecture.tokens is not None and architecture.tokens.cls

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode whatever is asked: batch-norm statistics never move."""
        return super().train(False)

    def forward(self, images: torch.Tensor, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Run normalised images [B, 3, H, W] and return {str(feature): tensor [B, ...]}; see feature.py.

        B-cos networks take six channels too. The result is a copy, so that layers which work in place
        later do not reach it; gradients flow if the caller asks for them.
        """
        results: dict[Feature, torch.Tensor] = {}
        before_norm: dict[Feature, torch.Tensor] = {}
        hooks = [self._keep(feature, images, results, before_norm) for feature in features]
        try:
            self.run(images)
        finally:
            for hook in hooks:
                hook.remove()
        for feature, output in before_norm.items():
            path, _, second = feature.layer.partition("+")
            norm = self.trunk.get_submodule(second)
            try:
                output = norm(output)
            except (RuntimeError, ValueError, TypeError):
                raise BadInput(f"feature {feature}: {second} of {self.arch} does not take what {path} yields") from None
            results[feature] = self._output(output, norm, images).reduce(feature, self.arch)
        for feature in features:
            if feature not in results:
                raise BadInput(f"feature {feature}: {self.arch} does not run its module {feature.layer} for features")
        return {str(feature): results[feature] for feature in features}

    def _keep(
        self,
        feature: Feature,
        images: torch.Tensor,
        results: dict[Feature, torch.Tensor],
        before_norm: dict[Feature, torch.Tensor],
    ) -> RemovableHandle:
        """Have a layer leave its feature in `results` when it runs, or its output in `before_norm` for A+B."""
        path, norm, _ = feature.layer.partition("+")

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.dtype in (torch.float16, torch.bfloat16):
                # Means of half-precision maps are taken in float32.
                output = output.float()
            if norm and isinstance(output, torch.Tensor):
                before_norm[feature] = output.clone()
            else:
                results[feature] = self._output(output, module, images).reduce(feature, self.arch)

        return self.trunk.get_submodule(path).register_forward_hook(hook)

    def run(self, images: torch.Tensor) -> Any:
        """Run the trunk on normalised images [B, 3, H, W]; B-cos networks are given [x, 1 - x]."""
        if self.architecture.inverse and images.shape[1] == 3:
            images = torch.cat([images, 1 - images], 1)
        return self.trunk(images.contiguous(memory_format=torch.channels_last))

    def _output(self, output: Any, module: nn.Module, images: torch.Tensor) -> Output:
        return Output(output, module, self.architecture, images.shape[2:], images.shape[0])


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 (hex) over names, dtypes, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous()
        # A name need not be text that can be written; the one of a network in memory is any string.
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode(errors="surrogatepass"))
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
