"""A forward pass through the backbone that many backward passes share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from featcache.attribution.frozen_norms import frozen_norms
from featcache.attribution.passes import Passes
from featcache.attribution.reading import Reading, read_images
from featcache.backbones.backbone import Backbone
from featcache.probes.heads.module import HeadModule


@dataclass(frozen=True)
class Rule:
    """How the modules of a network compute within a block, so that gradients mean something else. apply(network): it."""

    name: str
    apply: Callable[[nn.Module], AbstractContextManager[None]]


PLAIN = Rule("plain", lambda network: nullcontext())


class Forward:
    """A forward pass of images [B, C, S, S] through the backbone, from which any number of backward passes start.

    Attributes: inputs (the images), maps ({what a head reads: [B, D, h, w]}), and rule, under which it was computed.
    """

    def __init__(
        self,
        backbone: Backbone,
        features: Sequence[Reading],
        inputs: torch.Tensor,
        passes: Passes,
        rule: Rule = PLAIN,
    ) -> None:
        self.inputs, self.rule, self._passes = inputs.detach().requires_grad_(), rule, passes
        with torch.enable_grad(), frozen_norms(backbone), rule.apply(backbone):
            self.maps = read_images(backbone, self.inputs, features)
        passes.forward += len(inputs)

    def gradient(self, feature: Reading, cotangent: torch.Tensor) -> torch.Tensor:
        """Take the gradient [B, D, h, w] of something with respect to a feature back to the input: [B, C, S, S]."""
        (gradient,) = torch.autograd.grad(self.maps[feature], self.inputs, cotangent, retain_graph=True)
        self._passes.backward += len(gradient)
        return gradient

    def cotangents(self, head: HeadModule, feature: Reading, classes: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the gradient [B, D, h, w] of a head's logits with respect to its feature, for each column of classes.

        classes: int64 [B, K], K classes of each image.
        """
        maps = self.maps[feature].detach()
        yield from logit_gradients(head, maps, classes, self.rule)


def logit_gradients(
    head: HeadModule, maps: torch.Tensor, classes: torch.Tensor, rule: Rule = PLAIN
) -> Iterator[torch.Tensor]:
    """Yield the gradient [B, D, h, w] of logits with respect to maps [B, D, h, w], for each column of classes [B, K]."""
    if head.head.commutes:
        weights, area = head.slopes(maps.shape[1]), maps.shape[2] * maps.shape[3]
        for column in classes.unbind(1):
            yield (weights[column] / area)[:, :, None, None].expand(maps.shape)
        return
    maps = maps.detach().requires_grad_()
    with torch.enable_grad(), rule.apply(head):
        logits = head(maps)
        for column in classes.unbind(1):
            chosen = logits.gather(1, column[:, None]).sum()
            yield torch.autograd.grad(chosen, maps, retain_graph=True)[0]


def bytes_kept(backbone: Backbone, features: Sequence[Reading], image: torch.Tensor) -> int:
    """Return the bytes that one image's forward pass keeps for backward passes. image: [1, C, S, S]."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Names the result, so that nothing of the graph is freed, and its memory used again, before the end.
        forward = Forward(backbone, features, image, Passes())
    return sum(kept.values()) + sum(each.nbytes for each in forward.maps.values())
