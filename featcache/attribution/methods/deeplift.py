"""DeepLIFT."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.forward import Forward
from featcache.attribution.methods.intgrad import GAP
from featcache.attribution.methods.layer_rules import LayerRules
from featcache.attribution.methods.method import Explanation
from featcache.attribution.passes import Passes
from featcache.attribution.reading import Reading
from featcache.attribution.rescale import RESCALE
from featcache.backbones.backbone import Backbone
from featcache.errors import BadInput
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule

# Largest share of its change that a backbone may lack, in float32, to be one whose parts all have a rule.
LARGEST_GAP = 1e-2


class DeepLIFT(LayerRules):
    """What each pixel adds to the logit's change from an input of zeros, by the rescale rule, summed over channels.

    Zeros are the mean colour of the backbone's preprocessing. completeness_gap is what the map lacks to sum to the
    change, as a share of it. The reference goes through the backbone beside every batch, and is not counted as a pass.
    """

    type: Literal["deeplift"] = "deeplift"
    serves: ClassVar[str] = "networks of linear modules, element-wise activations and max-pools"
    paper: ClassVar[str] = "Shrikumar et al., ICML 2017"
    columns: ClassVar[tuple[str, ...]] = (GAP,)

    def misfit(self, backbone: Backbone) -> str | None:
        """The contributions of a backbone whose non-linear parts all have a rule sum to its change; this is measured."""
        if backbone.architecture.inverse:
            return "takes [x, 1 - x], of which zeros are no image"
        try:
            complete = self._is_complete(backbone)
        except BadInput:
            return "yields no map at its last layer"
        return None if complete else "has non-linear parts without a rule: its contributions do not sum to its change"

    def _is_complete(self, backbone: Backbone) -> bool:
        """Whether the contributions of an image of noise sum to the change of the last map. Raises BadInput without one."""
        feature = Reading((Feature(backbone.aliases["last"], "spatial"),))
        side, tensor = backbone.preprocessing.size, next(backbone.parameters())
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, side, side, generator=generator).to(tensor)
        forward = Forward(backbone, [feature], torch.cat([image, 0 * image]), Passes(), RESCALE)
        maps = forward.maps[feature].detach()
        change = maps[:1] - maps[1:]
        # By the signs of the changes, so that no large parts cancel.
        contributions = image * forward.gradient(feature, change.sign().expand_as(maps))[:1]
        return abs(float(contributions.sum() / change.abs().sum()) - 1) <= LARGEST_GAP

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[Explanation]:
        """Yield the maps of one head after another with their gaps, once all images are done."""
        batch.release()
        for block in batch.blocks(heads):
            yield from self._explain_block(block, feature, batch)

    def _explain_block(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[Explanation]:
        """Yield the maps of heads with their gaps."""
        source, classes = batch.source, batch.by_image
        maps = torch.empty(len(heads), *classes.shape, batch.size, batch.size, device=source.device)
        gaps = torch.empty(len(heads), *classes.shape, device=source.device, dtype=torch.float64)
        # The rule keeps copies, and beside each batch goes the reference: 2.6 times a plain pass on a ResNet-18.
        at_once = max(1, source.at_once // 3)
        for first in range(0, len(classes), at_once):
            part = slice(first, first + at_once)
            images, own = batch.inputs[part], classes[part]
            # The reference has classes as the images have, and nothing is made of them.
            asked, inputs = torch.cat([own, own[:1]]), torch.cat([images, torch.zeros_like(images[:1])])
            forward = Forward(source.backbone, [feature], inputs, Passes(), RESCALE)
            source.passes.forward += len(images)
            for number, head in enumerate(heads):
                for at, cotangent in enumerate(forward.cotangents(head, feature, asked)):
                    gradients = forward.gradient(feature, cotangent)[:-1]
                    maps[number, part, at] = (images * gradients).sum(1)
                    source.passes.backward += len(images)
                logits = head(forward.maps[feature].detach()).double()
                change = (logits[:-1] - logits[-1:]).gather(1, own)
                gaps[number, part] = (maps[number, part].double().sum((2, 3)) - change).abs() / change.abs()
        for own_maps, own_gaps in zip(maps, gaps, strict=True):
            yield Explanation(own_maps.flatten(0, 1), {GAP: own_gaps.flatten()})
