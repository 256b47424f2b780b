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
    paper: ClassVar[str] = "Shrikumar et al., ICML 2017"
    columns: ClassVar[tuple[str, ...]] = (GAP,)

    def misfit(self, backbone: Backbone) -> str | None:
        """The contributions of a backbone whose non-linear parts all have a rule sum to its change; this is measured."""
        if backbone.architecture.inverse:
            return "takes [x, 1 - x], of which zeros are no image"
        feature = Reading((Feature(backbone.aliases["last"], "spatial"),))
        side, tensor = backbone.preprocessing.size, next(backbone.parameters())
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, side, side, generator=generator).to(tensor)
        forward = Forward(backbone, [feature], torch.cat([image, 0 * image]), Passes(), RESCALE)
        maps = forward.maps[feature].detach()
        change = maps[:1] - maps[1:]
        # By the signs of the changes, so that no large parts cancel.
        contributions = image * forward.gradient(feature, change.sign().expand_as(maps))[:1]
        if abs(float(contributions.sum() / change.abs().sum()) - 1) <= LARGEST_GAP:
            return None
        return "has non-linear parts without a rule: its contributions do not sum to its change"

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[Explanation]:
        """Yield the maps of one head after another with their gaps, once all images are done."""
        batch.release()
        source, classes = batch.source, batch.by_image
        maps = torch.empty(len(heads), *classes.shape, batch.size, batch.size, device=source.device)
        gaps = torch.empty(len(heads), *classes.shape, device=source.device, dtype=torch.float64)
        for images, own, into in zip(
            batch.inputs.split(source.at_once), classes.split(source.at_once), range(0, len(classes), source.at_once),
            strict=True,
        ):  # fmt: skip
            part = slice(into, into + len(images))
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
