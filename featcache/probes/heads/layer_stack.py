"""P heads of several layers side by side, which see the same features."""

from torch import Tensor

from featcache.probes.heads.head import Gradient, Head, scaled, unscaled
from featcache.probes.heads.stacked_layers import Layer, Memory


class LayerStack:
    """P heads of one shape that see the same features [B, D] or maps [B, D, S]; see stacked_layers.py and Stack.

    layers: in order, made of the weights.
    """

    def __init__(self, head: Head, weights: dict[str, Tensor], precision: str, layers: list[Layer]):
        self.head, self.precision, self.weights = head, precision, weights
        self.parameters = [w for name, w in self.weights.items() if "running" not in name]
        self.layers = layers
        for place, layer in enumerate(self.layers):
            layer.place = place

    def forward(self, features: Tensor, training: bool = False) -> Tensor:
        """Map features to logits [B, P, C]; with training, by the statistics of the batch, and ready for backward()."""
        self.memory = Memory.shared()
        self._turn = self.memory.turn = object()
        for layer in self.layers:
            layer.memory = self.memory
        rows, positions = self._rows(features)
        for layer in self.layers:
            layer.precision, layer.positions = self.precision if training else "float32", positions
            rows = layer.forward(rows, training)
        # A copy, because the layers write to the same memory in every step.
        return scaled(rows.clone(), self.head).permute(2, 0, 1)

    def _rows(self, features: Tensor) -> tuple[Tensor, int]:
        """Return features as [D, B S], and S."""
        if features.ndim == 2:
            return features.t(), 1
        batch, dim, positions = features.shape
        rows = self.memory.tensor("features", (dim, batch, positions), features)
        return rows.copy_(features.transpose(0, 1)).flatten(1), positions

    def backward(self, features: Tensor, logits: Tensor, gradient: Tensor) -> list[Gradient]:
        """Return the parameters' gradients; no other stack may have run its forward() since this one's."""
        if self.memory.turn is not self._turn:
            raise RuntimeError("another stack has used the memory since this one's forward()")
        flow: Tensor | None = unscaled(gradient, self.head).permute(1, 2, 0).contiguous()  # [P, C, B]
        for layer in reversed(self.layers):
            if flow is None:
                raise RuntimeError("a layer behind the first returned no gradient of its input")
            flow = layer.backward(flow)
        return [g for layer in self.layers for g in layer.gradients]
