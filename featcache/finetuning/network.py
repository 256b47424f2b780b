"""A backbone with its weights free, and a probe's head on one of its features, as one network."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import OWN
from featcache.backbones.load import as_backbone, load_network
from featcache.datasets.record import Dataset
from featcache.errors import BadInput
from featcache.feature import beside, parse_beside
from featcache.finetuning.drop_path import set_drop_path
from featcache.probes.heads.module import HeadModule
from featcache.probes.inputs.input import Input
from featcache.probes.spec import ProbeSpec
from featcache.probes.tuning import Full
from featcache.probes.weights import initial_weights

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where the backbone comes from: path, arch, seed and weights_key are those of load_backbone."""

    path: str | os.PathLike[str]
    arch: str | None = None
    weights_key: str | None = None
    seed: int = 0

    def load(self, data: Dataset, tuning: Full | None = None) -> tuple[Backbone, nn.Module]:
        """Load the backbone with the input that a recipe or else the dataset asks for. Raises BadInput.

        Returns (Backbone, the whole network, which shares its weights).
        """
        architecture, network, report = load_network(self.path, self.arch, self.seed, self.weights_key)
        asked = tuning or Full()
        preprocessing = {
            "size": asked.size or data.size,
            "resize": OWN if data.resize == "crop" else data.resize,
            "short_side": asked.short_side or None,
            "interpolation": None if asked.interpolation == "own" else asked.interpolation,
        }
        return as_backbone(architecture, network, report, **preprocessing), network


class Network(nn.Module):
    """Normalised images [B, 3, S, S] to logits float32 [B, C], through a backbone and a head that are both trained.

    trunk, head: the parts. layers: {name of a parameter of the trunk that the feature depends on: the parameter}.
    Raises BadInput if the recipe asks for what the network does not have.
    """

    def __init__(self, backbone: Backbone, network: nn.Module, spec: ProbeSpec, classes: int):
        super().__init__()
        assert isinstance(spec.finetune, Full), "a recipe of fine-tuning"
        # Not as modules of this one: the weights of both are those of the trunk.
        self._loaded = backbone, network
        self.trunk = backbone.trunk.requires_grad_(True)
        self.spec, self.tuning, self.classes = spec, spec.finetune, classes
        self.features = parse_beside(spec.features, backbone.aliases, backbone.layers)
        self.input = Input(beside(self.features), Input.of(spec).pooled)
        self._check_sizes(backbone)
        if self.tuning.drop_path and not set_drop_path(self.trunk, self.tuning.drop_path):
            raise BadInput(f"finetune.drop_path: {backbone.arch} has no residual branches to drop; leave it out")
        self.layers, width = self._used(backbone)
        self.initial = initial_weights(spec, width, classes)
        self.fill_head(self.initial)

    def _check_sizes(self, backbone: Backbone) -> None:
        size, train = backbone.preprocessing.size, self.tuning.train_size
        if backbone.architecture.tokens is not None and train not in (0, size):
            raise BadInput(f"finetune.train_size {train}: the positions of {backbone.arch} are those of size {size}")

    def _used(self, backbone: Backbone) -> tuple[dict[str, nn.Parameter], int]:
        """Return the parameters that the feature depends on, and its width, by a run on two images of noise."""
        size = self.tuning.train_size or backbone.preprocessing.size
        noise = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        named = {name: p for name, p in self.trunk.named_parameters() if p.is_floating_point()}
        values = self._read(backbone(noise, self.features))
        if not values.requires_grad:
            raise BadInput(f"features {self.input.feature}: they depend on no weights of {backbone.arch}")
        slopes = torch.autograd.grad(values.sum(), list(named.values()), allow_unused=True)
        used = {name: p for (name, p), g in zip(named.items(), slopes, strict=True) if g is not None}
        return used, values.shape[1]

    def fill_head(self, weights: dict[str, Tensor]) -> None:
        """Put a probe's weights into a new head. Raises BadInput for a head that cannot be trained as a module."""
        self.head = HeadModule(self.spec.head, weights).requires_grad_(True)
        if self.head_weights().keys() != self.initial.keys():
            raise BadInput(f"head: {self.spec.head.type} heads cannot be fine-tuned; take one of linear layers")

    def head_weights(self) -> dict[str, Tensor]:
        """Return the weights of the head as a probe has them: {name: float32 CPU tensor}."""
        weights = {}
        for name, value in self.head.state_dict().items():
            own = name.removeprefix("layers.").replace(".linear.", ".")
            if own in self.initial:
                weights[own] = value.detach().cpu().reshape(self.initial[own].shape).clone()
        return weights

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the backbone's tensors under the names of its architecture, without the classifier's, on the CPU."""
        classifier = self.backbone.architecture.classifier
        tensors = {k: v for k, v in self._loaded[1].state_dict().items() if not k.startswith(classifier)}
        return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    @property
    def backbone(self) -> Backbone:
        """The backbone whose trunk is trained."""
        return self._loaded[0]

    def train(self, mode: bool = True) -> "Network":
        """Set the mode; with norm: eval the backbone's batch norms stay in eval mode."""
        super().train(mode)
        if mode and self.tuning.norm == "eval":
            for norm in batch_norms(self.trunk):
                norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits."""
        with self._autocast(images.device):
            results = self.backbone(images, self.features)
        rows = self._read(results)
        return self.head(rows[:, :, None, None] if rows.ndim == 2 else rows.unsqueeze(3))

    def _read(self, results: Mapping[str, Tensor]) -> Tensor:
        """Return the features of a batch as the head reads them: float32 [B, D] or [B, D, S]."""
        return self.input.read(results[str(feature)].float() for feature in self.features)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        dtype = AMP.get(self.tuning.amp)
        return torch.autocast(device.type, dtype) if dtype else nullcontext()


def batch_norms(module: nn.Module) -> Sequence[nn.Module]:
    """Return the modules that take statistics of a batch in training."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
