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
    """Learned queries attend to the positions of a map; their answers stand side by side."""

    def __init__(self, queries, dim, heads):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, queries, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, maps):
        tokens = maps.flatten(2).transpose(1, 2)
        answer, _ = self.attention(self.token.repeat(len(maps), 1, 1), tokens, tokens)
        return answer.flatten(1)[:, :, None, None]


class EfficientAttention(nn.Module):
    """Queries attend to the positions themselves; each averages a slice of the values."""

    def __init__(self, queries, dim, width):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, queries, dim))
        self.value = nn.Linear(dim, width, bias=False)

    def forward(self, maps):
        tokens = maps.flatten(2).transpose(1, 2)  # [B, S, D]
        scores = torch.einsum("qd,bsd->bqs", self.token[0], tokens) / math.sqrt(tokens.shape[2])
        slices = self.value(tokens).unflatten(2, (self.token.shape[1], -1))  # [B, S, Q, E]
        return torch.einsum("bqs,bsqe->bqe", scores.softmax(2), slices).flatten(1)[:, :, None, None]


class Cells(nn.Module):
    """A norm of which so many neighbouring numbers share a channel: [B, D, 1, 1] as [B, D / cells, cells]."""

    def __init__(self, norm, cells):
        super().__init__()
        self.norm, self.cells = norm, cells

    def forward(self, maps):
        return self.norm(maps.reshape(len(maps), -1, self.cells)).reshape(maps.shape)


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
        fields, head = dict(head), every_field("head", head)
        layers, self.names = [], {}
        if head.type == "attentive":
            layers.append(Attention(head.queries, weights["attention.token"].shape[-1], head.heads))
        if head.type == "efficient":
            token, value = weights["attention.token"], weights["attention.value.weight"]
            layers.append(EfficientAttention(*token.shape, len(value)))
            self.names |= {"layers.0.token": "attention.token", "layers.0.value.weight": "attention.value.weight"}
        if head.type == "bn_linear":
            channels = len(weights["bn.running_mean"])
            norm = Cells(nn.BatchNorm1d(channels, fields["eps"], affine=fields["affine"]), fields["cells"] or 1)
            self._name(1, "bn", norm)
            layers += [nn.AdaptiveAvgPool2d(1), norm]
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
        attention, dim = self.layers[0], w["attention.token"].shape[-1]
        with torch.no_grad():
            attention.token.copy_(w["attention.token"].view(1, -1, dim))
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
                result[self.names[key]] = (
                    value.flatten(1) if value.ndim == 4 else value[0] if value.ndim == 3 else value
                )
            elif key.endswith("token"):
                result["attention.token"] = value.flatten() if value.shape[1] == 1 else value[0]
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
        if o.form == "moco_v3":
            return self._step_of_moco_v3(o, rate)
        for name, parameter in self.named.items():
            matrix, velocity = parameter.squeeze().ndim == 2, self.velocity[name]
            parts = 3 if name.endswith("in_proj_weight") else 1
            decay = o.weight_decay if matrix else 0.0
            for p, g, v in zip(*(t.chunk(parts) for t in (parameter, parameter.grad, velocity)), strict=True):
                local = o.trust * p.norm() / (g.norm() + decay * p.norm()) if matrix else 1.0
                v.copy_(o.momentum * v + rate * local * (g + decay * p))
                p -= v

    def _step_of_moco_v3(self, o, rate):
        """As moco-v3 and MAE have it in their own optimizer: the rate is outside the momentum."""
        for name, parameter in self.named.items():
            parts = 3 if name.endswith("in_proj_weight") else 1
            for p, g, v in zip(
                *(t.chunk(parts) for t in (parameter, parameter.grad, self.velocity[name])), strict=True
            ):
                if parameter.squeeze().ndim == 2:
                    g = g + o.weight_decay * p
                    g = g * o.trust * p.norm() / g.norm()
                v.mul_(o.momentum).add_(g)
                p.sub_(rate * v)


def plain_optimizer(o, model):
    """The torch.optim optimizer of a spec's, or PlainLARS."""
    parameters = list(model.parameters())
    if getattr(o, "undecayed", "none") != "none":
        names = {n: model.names.get(n, n) for n, _ in model.named_parameters()}
        # Torch keeps the biases of query, key and value in one tensor, in_proj_bias.
        alone = {n: o.leaves_alone(name.replace("_bias", ".bias")) for n, name in names.items()}
        spared, others = ([p for n, p in model.named_parameters() if alone[n] is a] for a in (True, False))
        parameters = [{"params": others}, {"params": spared, "weight_decay": 0.0}]
    if o.type == "sgd":
        return torch.optim.SGD(parameters, o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov)
    if o.type == "lars":
        return PlainLARS(model.named_parameters(), o)
    rule = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.type]
    return rule(parameters, o.lr, (0.9, o.beta2), weight_decay=o.weight_decay)


def train_plain(spec, maps, labels, factor=lambda epoch, step: 1.0, dtype=torch.float64):
    """Train one probe the ordinary way. maps: [N, D, S]. Returns its weights under featcache's names, float32."""
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    model = Plain(spec.head, initial_weights(spec, maps.shape[1], classes)).to(dtype).train()
    o, maps = spec.optimizer, maps.to(dtype).unsqueeze(3)
    optimizer = plain_optimizer(o, model)
    scale = spec.batch_size / o.lr_base if o.lr_base else 1.0
    for epoch in range(spec.epochs):
        for step, rows in enumerate(epoch_order(len(maps), 0, epoch).split(spec.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = o.lr * scale * factor(epoch, step)
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
