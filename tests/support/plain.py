"""Probes as one would write them with torch and the bcos package, one at a time: what stacks are compared with."""

import copy
import math

import torch
import torchvision
from bcos.modules import BcosConv2d, LogitLayer
from bcos.modules.norms import BatchNormUncentered2d, NoBias
from parts import every_field
from torch import nn
from torch.nn import functional as F

from featcache.probes.inputs.batches import epoch_order
from featcache.probes.weights import initial_weights


class Attention(nn.Module):
    """A learned query attends to the positions of a map."""

    def __init__(self, dim, heads):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, maps):
        tokens = maps.flatten(2).transpose(1, 2)
        answer, _ = self.attention(self.token.repeat(len(maps), 1, 1), tokens, tokens)
        return answer.transpose(1, 2).unsqueeze(3)


class Ghost(nn.Module):
    """A norm as on several GPUs without SyncBN: each sees so many images, and the first one's statistics are saved."""

    def __init__(self, norm, images):
        super().__init__()
        self.norm, self.images = norm, images

    def forward(self, maps):
        first, *others = maps.split(self.images if self.training else len(maps))
        # One parameter for all, buffers of each one's own.
        shared = {id(parameter): parameter for parameter in self.norm.parameters()}
        replicas = [copy.deepcopy(self.norm, dict(shared)) for _ in others]
        return torch.cat([norm(part) for norm, part in zip((self.norm, *replicas), (first, *others), strict=True)])


class Plain(nn.Module):
    """A head of torch's and the bcos package's own modules: logits averaged, then the logit layer."""

    def __init__(self, head, weights):
        super().__init__()
        head = every_field("head", head)
        layers, self.names = [], {}
        if head.type == "attentive":
            layers.append(Attention(len(weights["attention.token"]), head.heads))
        for i in range(head.layers):
            outputs, inputs = weights[f"fc{i}.weight"].shape
            if head.type == "bcos":
                conv = BcosConv2d(inputs, outputs // head.max_out, 1, b=head.b, max_out=head.max_out)
            else:
                conv = nn.Conv2d(inputs, outputs, 1, bias=f"fc{i}.bias" in weights)
            self._name(len(layers), f"fc{i}", conv)
            layers.append(conv)
            if i == head.layers - 1:
                break
            norms = {"bn": nn.BatchNorm2d, "bnu": NoBias(BatchNormUncentered2d)}
            if head.norm != "none":
                norm = norms[head.norm](outputs // head.max_out)
                norm = Ghost(norm, head.norm_batch) if head.norm_batch else norm
                self._name(len(layers), f"bn{i}", norm)
                layers.append(norm)
            if head.type == "mlp":
                layers.append(nn.GELU() if head.activation == "gelu" else nn.ReLU())
        self.layers = nn.Sequential(*layers)
        self.logits = LogitLayer(logit_temperature=head.temperature, logit_bias=head.offset or None)
        self.to(next(iter(weights.values())).dtype)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if name in self.names:
                    tensor.copy_(weights[self.names[name]].reshape(tensor.shape))
        if head.type == "attentive":
            self._fill_attention(weights)

    def _name(self, place, name, layer):
        uncentred = any(isinstance(module, BatchNormUncentered2d) for module in layer.modules())
        for key in layer.state_dict():
            if "num_batches" not in key and not (uncentred and "mean" in key):
                self.names[f"layers.{place}.{key}"] = f"{name}.{key.rpartition('.')[2]}"

    def _fill_attention(self, w):
        attention, dim = self.layers[0], len(w["attention.token"])
        with torch.no_grad():
            attention.token.copy_(w["attention.token"])
            inner = attention.attention
            for i, name in enumerate(("query", "key", "value")):
                inner.in_proj_weight[i * dim : (i + 1) * dim] = w[f"attention.{name}.weight"]
                if name != "key":
                    inner.in_proj_bias[i * dim : (i + 1) * dim] = w[f"attention.{name}.bias"]
            inner.out_proj.weight.copy_(w["attention.out.weight"])
            inner.out_proj.bias.copy_(w["attention.out.bias"])

    def forward(self, maps):
        return self.logits(self.layers(maps).mean((2, 3)))

    def named(self, tensors):
        """Tensors of the state dict, or gradients by the same names, under featcache's names and shapes."""
        result = {}
        for key, value in tensors.items():
            if key in self.names:
                result[self.names[key]] = value.flatten(1) if value.ndim == 4 else value
            elif key.endswith("token"):
                result["attention.token"] = value.flatten()
            elif "in_proj" in key:
                parts = dict(zip(("query", "key", "value"), value.chunk(3), strict=True))
                result |= {f"attention.{n}.{key.rpartition('_')[2]}": v for n, v in parts.items()}
            elif "out_proj" in key:
                result[f"attention.out.{key.rpartition('.')[2]}"] = value
        result.pop("attention.key.bias", None)  # It does nothing, and featcache does not have it.
        return result


def plain_loss(loss, logits, labels, weights=None):
    """A spec.Loss of logits [B, C], by torch's own functions where it has them. weights: of classes, [C]."""
    classes = logits.shape[1]
    if loss.type == "ce":
        if labels.ndim == 1:
            return F.cross_entropy(logits, labels, weights, label_smoothing=loss.label_smoothing)
        total = logits.sum() * 0
        for z, y in zip(logits, labels.clamp(min=0) if loss.difficult == "negative" else labels, strict=True):
            known, positive = y >= 0, (y == 1)
            if positive.any():
                target = (positive.double() / positive.sum())[known].to(z.dtype)
                w = None if weights is None else weights[known]
                total = total + F.cross_entropy(z[known][None], target[None], w, label_smoothing=loss.label_smoothing)
        return total / len(logits)
    labels = F.one_hot(labels, classes) if labels.ndim == 1 else labels
    known = labels >= 0 if loss.difficult == "ignored" else torch.ones_like(labels, dtype=torch.bool)
    target = (labels > 0).to(logits.dtype)
    if loss.type == "bce":
        off = 1 / classes if loss.off_label == "1/C" else loss.off_label
        target = torch.maximum(target, torch.tensor(off, dtype=target.dtype))
        target = (1 - loss.label_smoothing) * target + loss.label_smoothing / classes
        values = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weights)
    elif loss.type == "focal":
        values = torchvision.ops.sigmoid_focal_loss(logits, target, alpha=loss.alpha, gamma=loss.gamma)
    elif loss.type == "squared_hinge":
        values = F.relu(1 - (2 * target - 1) * logits).square() * (1 + (loss.positive_weight - 1) * target)
    else:
        p = logits.sigmoid()
        shifted = (p - loss.clip).clamp(min=0)
        positives = (1 - p) ** loss.gamma_pos * p.log()
        values = -torch.where(target > 0, positives, shifted**loss.gamma_neg * (1 - shifted).log())
    values = values[known]
    return values.mean() if len(values) else values.sum()


class PlainLARS:
    """You, Gitman & Ginsburg (2017), algorithm 1, on weight matrices; plain momentum SGD on vectors.

    Query, key and value, which torch keeps in one tensor, count as the three matrices that they are.
    """

    def __init__(self, named, optimizer):
        self.named, self.o = dict(named), optimizer
        self.velocity = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.param_groups = [{"lr": optimizer.lr}]

    def zero_grad(self):
        for p in self.named.values():
            p.grad = None

    @torch.no_grad()
    def step(self):
        o, rate = self.o, self.param_groups[0]["lr"]
        for name, parameter in self.named.items():
            matrix, velocity = parameter.squeeze().ndim == 2, self.velocity[name]
            parts = 3 if name.endswith("in_proj_weight") else 1
            decay = o.weight_decay if matrix else 0.0
            for p, g, v in zip(*(t.chunk(parts) for t in (parameter, parameter.grad, velocity)), strict=True):
                local = o.trust * p.norm() / (g.norm() + decay * p.norm()) if matrix else 1.0
                v.copy_(o.momentum * v + rate * local * (g + decay * p))
                p -= v


def plain_optimizer(o, model):
    """The torch.optim optimizer of a spec's, or PlainLARS."""
    parameters = list(model.parameters())
    if o.type == "sgd":
        return torch.optim.SGD(parameters, o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov)
    if o.type == "lars":
        return PlainLARS(model.named_parameters(), o)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.type](parameters, o.lr, weight_decay=o.weight_decay)


def train_plain(spec, maps, labels, factor=lambda epoch, step: 1.0, dtype=torch.float64):
    """Train one probe the ordinary way. maps: [N, D, S]. Returns its weights under featcache's names, float32."""
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    model = Plain(spec.head, initial_weights(spec, maps.shape[1], classes)).to(dtype).train()
    o, maps = spec.optimizer, maps.to(dtype).unsqueeze(3)
    optimizer = plain_optimizer(o, model)
    scale = spec.batch_size / o.lr_base if o.lr_base else 1.0
    for epoch in range(spec.epochs):
        for step, rows in enumerate(epoch_order(len(maps), 0, epoch).split(spec.batch_size)):
            optimizer.param_groups[0]["lr"] = o.lr * scale * factor(epoch, step)
            optimizer.zero_grad()
            plain_loss(spec.loss, model(maps[rows]), labels[rows]).backward()
            if o.clip:
                nn.utils.clip_grad_norm_(model.parameters(), o.clip)
            optimizer.step()
    return {name: w.float() for name, w in model.named(model.state_dict()).items()}


def assert_near(got, expected, tolerance=1e-5):
    """Weights by the same names, none further apart than the tolerance, absolute."""
    assert got.keys() == expected.keys()
    worst = {name: float((got[name] - expected[name]).abs().max()) for name in got}
    assert max(worst.values()) < tolerance and not any(math.isnan(v) for v in worst.values()), worst
