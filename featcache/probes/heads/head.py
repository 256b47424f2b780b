"""Heads: many of one shape side by side for training, and one alone as an ordinary module."""

from torch import nn

from featcache.probes.gemm import multiply
from featcache.probes.heads.attentive import AttentivePooling, AttentiveStack
from featcache.probes.heads.bcos import BatchNormUncentered2d, Bcos, BcosConv2d
from featcache.probes.heads.layers import GELU, BatchNorm, GhostNorm, Linear, Mean, Memory, ReLU, UncentredBatchNorm
from featcache.probes.heads.weights import NORMS

NORM_LAYERS = {"bn": BatchNorm, "bnu": UncentredBatchNorm}
ACTIVATIONS = {"relu": (ReLU, nn.ReLU), "gelu": (GELU, nn.GELU)}


def footprint(head, dim, classes, positions):
    """Roughly how many weights a probe has in a layer, and numbers it makes of an image in its widest one."""
    if head.type == "attentive":
        return 4 * dim * dim, head.heads * (positions + dim)
    width = head.max_out * max(head.hidden, classes) if head.type == "bcos" else head.hidden or classes
    return width * dim, width * positions


def _scaled(logits, head):
    """Divide logits by the temperature and add the offset, in place."""
    if head.temperature != 1:
        logits /= head.temperature
    if head.offset:
        logits += head.offset
    return logits


def _unscaled(gradient, head):
    """Take a gradient of the logits back through _scaled()."""
    return gradient if head.temperature == 1 else gradient / head.temperature


class LinearStack:
    """P linear probes that see the same features: one GEMM forward, one backward.

    weights: {name: [P, ...]}, which training changes; `parameters`: those of them that are trained, in order.
    """

    def __init__(self, specs, weights):
        self.head, self.precision = specs[0].head, specs[0].precision
        self.weights = weights
        self.parameters = list(self.weights.values())

    def forward(self, features, training=False):
        """Map features [B, D] to logits [B, P, C], in memory as [P, C, B]: weights first is the faster GEMM."""
        weight = self.weights["fc0.weight"]  # [P, C, D]
        precision = self.precision if training else "float32"
        logits = multiply(weight.flatten(0, 1), features.t(), precision).unflatten(0, weight.shape[:2])
        if self.head.bias:
            logits += self.weights["fc0.bias"].unsqueeze(2)
        return _scaled(logits, self.head).permute(2, 0, 1)

    def backward(self, features, logits, gradient):
        """Return the parameters' gradients; the weight's as the pair (A, B) that stands for A B."""
        gradient = _unscaled(gradient, self.head).permute(1, 2, 0)  # [P, C, B]
        weight = (gradient.flatten(0, 1), features)
        return [weight, gradient.sum(2)] if self.head.bias else [weight]


class LayerStack:
    """P MLPs or B-cos heads of one shape that see the same features [B, D] or maps [B, D, S]; see layers.py.

    The mean over positions is taken before the last layer of an MLP, with which it commutes.
    """

    def __init__(self, specs, weights):
        self.head, self.precision = specs[0].head, specs[0].precision
        head = self.head
        self.weights = weights
        self.parameters = [w for name, w in self.weights.items() if "running" not in name]
        self.mean, self.layers = Mean(), []
        for i in range(head.layers):
            last = i == head.layers - 1
            if last and head.type == "mlp":
                self.layers.append(self.mean)
            weight = self.weights[f"fc{i}.weight"]
            bcos = head.type == "bcos"
            self.layers.append(
                Bcos(weight, head.b, head.max_out) if bcos else Linear(weight, self.weights.get(f"fc{i}.bias"))
            )
            if not last:
                if head.norm != "none":
                    norm, held = NORM_LAYERS[head.norm], [self.weights[f"bn{i}.{n}"] for n in NORMS[head.norm]]
                    self.layers.append(GhostNorm(norm, held, head.norm_batch) if head.norm_batch else norm(*held))
                if head.type == "mlp":
                    self.layers.append(ACTIVATIONS[head.activation][0]())
        if head.type == "bcos":
            self.layers.append(self.mean)
        for place, layer in enumerate(self.layers):
            layer.place = place

    def forward(self, features, training=False):
        """Map features to logits [B, P, C]; with training, by the batch's statistics, and ready for backward()."""
        self.memory = Memory.shared()
        self._turn = self.memory.turn = object()
        for layer in self.layers:
            layer.memory = self.memory
        rows, positions = self._rows(features)
        for layer in self.layers:
            layer.precision, layer.positions = self.precision if training else "float32", positions
            rows = layer.forward(rows, training)
        # A copy, for the layers write to the same memory in every step.
        return _scaled(rows.clone(), self.head).permute(2, 0, 1)

    def _rows(self, features):
        """Features as [D, B S] and S."""
        if features.ndim == 2:
            return features.t(), 1
        batch, dim, positions = features.shape
        rows = self.memory.tensor("features", (dim, batch, positions), features)
        return rows.copy_(features.transpose(0, 1)).flatten(1), positions

    def backward(self, features, logits, gradient):
        """Return the parameters' gradients, of the last forward(), since when no other stack may have had one."""
        if self.memory.turn is not self._turn:
            raise RuntimeError("another stack has used the memory since this one's forward()")
        gradient = _unscaled(gradient, self.head).permute(1, 2, 0).contiguous()  # [P, C, B]
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient)
        return [g for layer in self.layers for g in layer.gradients]


STACKS = {"linear": LinearStack, "mlp": LayerStack, "bcos": LayerStack, "attentive": AttentiveStack}


class Head(nn.Module):
    """One trained head as an ordinary module: maps [B, D, h, w] to logits [B, C].

    Built from a probe's spec and its weights; the logits are averaged over positions (or the
    features, if the spec says pool: before), without which GradCAM and the like have no map.
    """

    def __init__(self, spec, weights):
        super().__init__()
        head, layers = spec.head, []
        if head.type == "attentive":
            attention = {name: w for name, w in weights.items() if name.startswith("attention.")}
            weights = {name: w for name, w in weights.items() if name not in attention}
            layers.append(("attention", AttentivePooling(head.heads, attention)))
        for i in range(head.layers):
            outputs, inputs = weights[f"fc{i}.weight"].shape
            if head.type == "bcos":
                layers.append((f"fc{i}", BcosConv2d(inputs, outputs, head.b, head.max_out)))
            else:
                layers.append((f"fc{i}", nn.Conv2d(inputs, outputs, 1, bias=f"fc{i}.bias" in weights)))
            if i < head.layers - 1:
                if head.norm != "none":
                    norm = nn.BatchNorm2d if head.norm == "bn" else BatchNormUncentered2d
                    layers.append((f"bn{i}", norm(outputs // head.max_out)))
                if head.type == "mlp":
                    layers.append((f"{head.activation}{i}", ACTIVATIONS[head.activation][1]()))
        self.pool, self.temperature, self.offset = head.pool, head.temperature, head.offset
        self.layers = nn.ModuleDict(layers)
        state = {f"layers.{n}": w[:, :, None, None] if w.ndim == 2 else w for n, w in weights.items()}
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [key for key in missing if "num_batches_tracked" not in key and "attention" not in key]
        if unexpected or missing:
            raise ValueError(f"weights do not fit the head: missing {missing}, unexpected {unexpected}")
        self.eval().requires_grad_(False)

    def forward(self, maps):
        """Map float32 [B, D, h, w] to logits [B, C]."""
        if self.pool == "before":
            maps = maps.mean((2, 3), keepdim=True)
        for layer in self.layers.values():
            maps = layer(maps)
        return maps.mean((2, 3)) / self.temperature + self.offset
