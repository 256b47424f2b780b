"""Input x gradient (Shrikumar et al., 2016) through backbone and head."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.methods.method import Method
from featcache.backbones.backbone import Backbone
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule


class InputXGradient(Method):
    """The normalised input times the gradient of the logit, summed over channels."""

    type: Literal["input_x_gradient"] = "input_x_gradient"
    runs_backbone: ClassVar[bool] = True

    def explain(self, heads: Sequence[HeadModule], feature: Feature, batch: Batch) -> Sequence[torch.Tensor]:
        """Return the maps of all heads; each image goes through the backbone once."""
        pairs = list(zip(batch.images.tolist(), batch.classes.tolist(), strict=True))
        targets = [(image, head, label) for head in range(len(heads)) for image, label in pairs]
        return input_x_gradient(batch.backbone, feature, heads, batch.inputs, targets).split(len(pairs))


def input_x_gradient(
    backbone: Backbone,
    feature: Feature,
    heads: Sequence[HeadModule],
    images: torch.Tensor,
    targets: Sequence[tuple[int, int, int]],
) -> torch.Tensor:
    """Explain logits from the pixels; one forward pass serves all heads and classes.

    images: normalised float32 [B, 3, S, S]. feature: the spatial feature that the heads read.
    targets: (image, head, class) as indices. Returns float32 [len(targets), S, S]: the sum over
    channels of input times gradient.
    """
    inputs = images.detach().requires_grad_()
    with torch.enable_grad():
        maps = backbone(inputs, [feature])[str(feature)]
        logits = [head(maps) for head in heads]
    # Images do not affect one another, so that one backward pass explains one target of every image.
    rounds: list[list[int]] = []
    turns: dict[int, int] = {}
    for number, (image, _, _) in enumerate(targets):
        turns[image] = turns.get(image, -1) + 1
        if turns[image] == len(rounds):
            rounds.append([])
        rounds[turns[image]].append(number)
    result = torch.empty(len(targets), *images.shape[2:], device=images.device)
    for numbers in rounds:
        total = torch.stack([logits[h][i, c] for i, h, c in (targets[n] for n in numbers)]).sum()
        (gradient,) = torch.autograd.grad(total, inputs, retain_graph=numbers is not rounds[-1])
        product = (inputs.detach() * gradient).sum(1)
        result[numbers] = product[[targets[n][0] for n in numbers]]
    return result
