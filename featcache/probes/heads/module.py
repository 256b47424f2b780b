"""One trained head as an ordinary module."""

from torch import Tensor, nn

from featcache.probes.heads.head import Head


class HeadModule(nn.Module):
    """One trained head: maps float32 [B, D, h, w] to logits [B, C].

    The logits are averaged over positions (or the features, with pool: before), so that GradCAM and similar methods
    have a map. weights: {name: tensor} of the probe. Raises ValueError for weights that do not fit the head.
    """

    def __init__(self, head: Head, weights: dict[str, Tensor]):
        super().__init__()
        unused = dict(weights)
        try:
            layers = head.modules(unused)
        except KeyError as error:
            raise ValueError(f"weights do not fit the head: missing {error}") from None
        if unused:
            raise ValueError(f"weights do not fit the head: unexpected {list(unused)}")
        self.head, self.layers = head, nn.ModuleDict(layers)
        self.eval().requires_grad_(False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map float32 [B, D, h, w] to logits [B, C]."""
        if self.head.averages_features:
            maps = maps.mean((2, 3), keepdim=True)
        for layer in self.layers.values():
            maps = layer(maps)
        return maps.mean((2, 3)) / self.head.temperature + self.head.shift
