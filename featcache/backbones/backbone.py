"""The frozen network that features come from."""

import hashlib

import torch
from torch import nn

from featcache.backbones.reductions import Output
from featcache.errors import BadInput


class Backbone(nn.Module):
    """A frozen network in eval mode that yields features of its layers.

    Attributes: arch (name), aliases (`last` and the like to module paths), layers (module paths),
    preprocessing, weights_sha256 (over the tensors that run: the trunk's, positions fitted to the
    input's size), grounds (a few lines for people: how the architecture was found and what was
    loaded), preprocessing_grounds (such lines on where the preprocessing is from), class_token (whether the
    last layer has one).
    """

    def __init__(self, architecture, network, preprocessing, grounds, preprocessing_grounds=()):
        super().__init__()
        self.arch = architecture.name
        self.architecture = architecture
        self.aliases = architecture.aliases
        self.preprocessing = preprocessing
        self.preprocessing_grounds = preprocessing_grounds
        fitted = architecture.fit(network, preprocessing.size) if architecture.fit else ""
        self.grounds = "\n  ".join(line for line in (grounds, *architecture.note.split("\n"), fitted) if line)
        # channels_last: 1.3 to 1.5 times faster on CPUs, and what tensor cores want.
        self.trunk = architecture.trunk(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.weights_sha256 = _hash_tensors(self.trunk.state_dict())
        # What stands in the classifier's place is no layer of the network.
        gone = architecture.classifier
        self.layers = [name for name, _ in self.trunk.named_modules() if name and not f"{name}.".startswith(gone)]
        self.class_token = architecture.tokens is not None and architecture.tokens.cls

    def train(self, mode=True):
        """Stay in eval mode whatever is asked: batch-norm statistics never move."""
        return super().train(False)

    def forward(self, images, features):
        """Run normalised images [B, 3, H, W] and return {str(feature): tensor [B, ...]}; see feature.py.

        B-cos networks take six channels too. The result is a copy, so that layers which work in place
        later do not reach it; gradients flow if the caller asks for them.
        """
        results, before_norm = {}, {}

        def keep(feature):
            path, norm, _ = feature.layer.partition("+")

            def hook(module, inputs, output):
                if isinstance(output, torch.Tensor) and output.dtype in (torch.float16, torch.bfloat16):
                    # Means of half-precision maps are taken in float32.
                    output = output.float()
                if norm and isinstance(output, torch.Tensor):
                    before_norm[feature] = output.clone()
                else:
                    results[feature] = self._output(output, module, images).reduce(feature, self.arch)

            return self.trunk.get_submodule(path).register_forward_hook(hook)

        hooks = [keep(feature) for feature in features]
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

    def run(self, images):
        """Run the trunk on normalised images [B, 3, H, W], of which B-cos networks see [x, 1 - x]."""
        if self.architecture.inverse and images.shape[1] == 3:
            images = torch.cat([images, 1 - images], 1)
        return self.trunk(images.contiguous(memory_format=torch.channels_last))

    def _output(self, output, module, images):
        return Output(output, module, self.architecture, images.shape[2:], images.shape[0])


def _hash_tensors(tensors):
    """sha256 (hex) over names, dtypes, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous()
        # A name need not be text that can be written; the one of a network in memory is any string.
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode(errors="surrogatepass"))
        digest.update(array.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
