"""What methods have in common that pass contributions back by a rule for each kind of layer."""

from typing import ClassVar

from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.bn_linear import BnLinear
from featcache.probes.heads.head import Head
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp


class LayerRules(Method):
    """Base of methods with rules for the layers of some backbones, and of heads of linear layers, norms and activations.

    Given the forward pass, what comes back is linear in where it starts, so that one pass serves all probes and classes.
    """

    runs_backbone: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = False

    def unfit(self, head: Head, reading: Reading) -> str | None:
        """Other heads hold parts without a rule."""
        if type(head) not in (Linear, BnLinear, Mlp):
            return f"has a head of type {head.type}, and rules fit linear, bn_linear and mlp"
        if isinstance(head, Linear) and head.norm != "none":
            return f"has a head with norm: {head.norm}, which no rule fits"
        return None

    def passes(self, work: Work) -> Passes:
        """A forward pass of each image for every layer that probes read, and a backward pass for each map."""
        return Passes(work.images * work.layers, work.pairs * work.probes)

    def passes_alone(self, work: Work) -> Passes:
        """Both for each map."""
        return Passes(work.pairs * work.probes, work.pairs * work.probes)
