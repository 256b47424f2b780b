"""One trained head as an ordinary module."""

from typing import Literal

from torch import Tensor, enable_grad, nn
from torch.autograd import grad

from featcache.probes.heads.head import Head


class HeadModule(nn.Module):
    """One trained head: maps float32 [B, D, h, w] to logits [B, C].

    The logits are averaged over positions (or the features, with pool: before), so that GradCAM and similar methods
    have a map. weights: {name: tensor} of the probe. link: of its loss, how logits become probabilities. Raises
    ValueError for weights that do not fit the head.
    """

    def __init__(self, head: Head, weights: dict[str, Tensor], link: Literal["sigmoid", "softmax"] = "sigmoid"):
        super().__init__()
        unused = dict(weights)
        try:
            layers = head.modules(unused)
        except KeyError as error:
            raise ValueError(f"weights do not fit the head: missing {error}") from None
        if unused:
            raise ValueError(f"weights do not fit the head: unexpected {list(unused)}")
        self.head, self.layers, self.link = head, nn.ModuleDict(layers), link
        self._slopes: Tensor | None
        self.register_buffer("_slopes", None, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map float32 [B, D, h, w] to logits [B, C]."""
        if self.head.averages_features:
            maps = maps.mean((2, 3), keepdim=True)
        for layer in self.layers.values():
            maps = layer(maps)
        return maps.mean((2, 3)) / self.head.temperature + self.head.shift

    def position_logits(self, maps: Tensor) -> Tensor:
        """Map float32 [B, D, h, w] to the logits of each position without the offset, [B, C, h, w].

        The head must not bring positions together before its last layer.
        """
        for layer in self.layers.values():
            maps = layer(maps)
        return maps / self.head.temperature

    def slopes(self, channels: int) -> Tensor:
        """Return the gradient [C, D] of the logits of a head that commutes with the mean, and so is affine.

        channels: D. It is computed once.
        """
        if self._slopes is None:
            zeros = next(self.parameters()).new_zeros(1, channels, 1, 1)
            points = zeros.repeat(self(zeros).shape[1], 1, 1, 1).requires_grad_()
            with enable_grad():
                (gradient,) = grad(self(points).diagonal().sum(), points)
            self._slopes = gradient[:, :, 0, 0]
        return self._slopes

    def probabilities(self, maps: Tensor) -> Tensor:
        """Map float32 [B, D, h, w] to the probabilities that the head was trained to give, [B, C]."""
        return self.of_logits(self(maps))

    def of_logits(self, logits: Tensor) -> Tensor:
        """Turn logits [B, C] into the probabilities that the head was trained to give."""
        return logits.softmax(1) if self.link == "softmax" else logits.sigmoid()
