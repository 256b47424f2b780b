"""CLIP's image towers (Radford et al., ICML 2021) in OpenAI's key names, without the `visual.` prefix.

The residual network has a stem of three convolutions, average pooling in place of every stride, and an attention pool
at its end, which may be missing (How-to-Probe's clipresnet50 has none). The vision transformer has a norm before its
blocks, and the QuickGELU x * sigmoid(1.702 x). Most of LAION's networks have GELU instead, which no tensor tells.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from featcache.backbones.architecture import Architecture, Fields, Hints, Tokens, last_blocks
from featcache.backbones.checkpoints.encoder import Tensors
from featcache.backbones.families.attention_heads import choose_heads, usual_heads
from featcache.backbones.families.positions import fit_positions
from featcache.backbones.families.usual_inputs import CLIP
from featcache.backbones.families.vit_input import clip_origins

INPUT: Fields = CLIP | {"interpolation": "bicubic"}
# Width, blocks of each stage, input size, width of the embedding.
RESNETS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "rn50": (64, (3, 4, 6, 3), 224, 1024), "rn101": (64, (3, 4, 23, 3), 224, 512),
    "rn50x4": (80, (4, 6, 10, 6), 288, 640), "rn50x16": (96, (6, 8, 18, 8), 384, 768), "rn50x64": (128, (3, 15, 36, 10), 448, 1024),
}  # fmt: skip
# Width, blocks, patch, width of the embedding.
VITS = {
    "b32": (768, 12, 32, 512), "b16": (768, 12, 16, 512), "l14": (1024, 24, 14, 768), "h14": (1280, 32, 14, 1024),
    "g14": (1408, 40, 14, 1024), "bigg14": (1664, 48, 14, 1280),
}  # fmt: skip


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions of stride 1, with average pooling where a ResNet has a stride."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        fan_out = 4 * width
        self.conv1 = nn.Conv2d(fan_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, fan_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(fan_out)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1 or fan_in != fan_out:
            conv = nn.Conv2d(fan_in, fan_out, 1, bias=False)
            parts: OrderedDict[str, nn.Module] = OrderedDict(
                [("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", nn.BatchNorm2d(fan_out))]
            )
            self.downsample = nn.Sequential(parts)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] to [B, 4 * width, H / stride, W / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        out = self.relu1(self.bn1(self.conv1(maps)))
        out = self.avgpool(self.relu2(self.bn2(self.conv2(out))))
        return self.relu3(self.bn3(self.conv3(out)) + shortcut)


class AttentionPool(nn.Module):
    """Attention over all positions of a map, whose one query is made of their mean, and a projection."""

    def __init__(self, side: int, width: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, width) / math.sqrt(width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embedding)
        self.heads = heads

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Map [B, C, h, w] to the image's embedding [B, E]."""
        rows = maps.flatten(2).permute(2, 0, 1)  # [h * w, B, C]
        rows = torch.cat([rows.mean(0, keepdim=True), rows]) + self.positional_embedding[:, None]
        pooled, _ = F.multi_head_attention_forward(
            query=rows, key=rows, value=rows, embed_dim_to_check=rows.shape[2], num_heads=self.heads,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias, training=False, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return pooled[0]


class ModifiedResNet(nn.Module):
    """CLIP's residual network. embedding: width of the image's embedding, None without attention pool."""

    def __init__(self, width: int, blocks: Sequence[int], size: int, embedding: int | None) -> None:
        super().__init__()
        half = width // 2
        for i, (fan_in, fan_out, stride) in enumerate(((3, half, 2), (half, half, 1), (half, width, 1)), 1):
            self.add_module(f"conv{i}", nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(fan_out))
            self.add_module(f"relu{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(2)
        fan_in = width
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for number in range(count):
                stage.append(Bottleneck(fan_in, width << i, 2 if i and not number else 1))
                fan_in = 4 * width << i
            self.add_module(f"layer{i + 1}", stage)
        self.attnpool: nn.Module | None = None
        if embedding:
            self.attnpool = AttentionPool(size // 32, fan_in, fan_in // 64, embedding)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to embeddings [B, E], or to the last map without attention pool."""
        part: Any = self  # Its modules are added by name.
        maps = part.relu1(part.bn1(part.conv1(images)))
        maps = part.relu2(part.bn2(part.conv2(maps)))
        maps = part.avgpool(part.relu3(part.bn3(part.conv3(maps))))
        maps = part.layer4(part.layer3(part.layer2(part.layer1(maps))))
        return maps if self.attnpool is None else self.attnpool(maps)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a tensor of any shape to the same."""
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        parts: tuple[tuple[str, nn.Module], ...] = (
            ("c_fc", nn.Linear(width, hidden)),
            ("gelu", activation()),
            ("c_proj", nn.Linear(hidden, width)),
        )
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, D] to the same."""
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


class Transformer(nn.Module):
    """`resblocks`, one after another."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, D] to the same."""
        return self.resblocks(tokens)


class VisionTransformer(nn.Module):
    """CLIP's vision transformer; `embedding` yields the image's embedding. embedding=None: without projection."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        side: int,
        hidden: int,
        embedding: int | None,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(side * side + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer([Block(width, heads, hidden, activation) for _ in range(depth)])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embedding)) if embedding else None
        self.embedding = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to embeddings [B, E], or to normed class tokens without projection."""
        tokens = self.conv1(images).flatten(2).transpose(1, 2)  # [B, h * w, D]
        first = self.class_embedding.expand(len(images), 1, -1)
        tokens = self.ln_pre(torch.cat([first, tokens], 1) + self.positional_embedding)
        tokens = self.ln_post(self.transformer(tokens))
        return self.embedding(tokens[:, 0] if self.proj is None else tokens[:, 0] @ self.proj)


def architectures() -> dict[str, Architecture]:
    """Return CLIP's image towers by name; *_gelu have GELU, *_no_attnpool no attention pool."""
    resnets = [
        _resnet(width, blocks, size, e)
        for width, blocks, size, embedding in RESNETS.values()
        for e in (embedding, None)
    ]
    vits = {
        f"clip_vit_{name}{end}": _vit(width, depth, patch, 224 // patch, 4 * width, embedding, end)
        for end in ("", "_gelu")
        for name, (width, depth, patch, embedding) in VITS.items()
    }
    return {a.name: a for a in resnets} | vits


def _resnet(width: int, blocks: tuple[int, ...], size: int, embedding: int | None) -> Architecture:
    known = {(w, b): name for name, (w, b, _, _) in RESNETS.items()}
    kind = known.get((width, blocks), f"rn_w{width}_{'-'.join(map(str, blocks))}")
    name = f"clip_{kind}" if embedding else f"clip_{kind}_no_attnpool"
    aliases = {"feat1": "relu3", **{f"feat{i + 1}": f"layer{i}" for i in range(1, 5)}, "last": "layer4"}
    return Architecture(
        name=name,
        build=partial(ModifiedResNet, width, blocks, size, embedding),
        trunk=lambda network: network,
        signature="conv3.weight",
        classifier=("fc.",),
        aliases=aliases,
        size=size,
        short_side=size,
        infer=_infer_resnet,
        fit=partial(_fit_resnet, name),
        **INPUT,
    )


def _infer_resnet(tensors: Tensors, hints: Hints) -> Architecture | None:
    if "layer4.0.conv1.weight" not in tensors:
        return None
    blocks = tuple(
        1 + max(int(key.split(".")[1]) for key in tensors if key.startswith(f"layer{i}.")) for i in (1, 2, 3, 4)
    )
    width = len(tensors["layer1.0.conv1.weight"])
    positions, pool = tensors.get("attnpool.positional_embedding"), tensors.get("attnpool.c_proj.weight")
    if positions is None or pool is None:
        sizes = {known[:2]: known[2] for known in RESNETS.values()}
        return _resnet(width, blocks, sizes.get((width, blocks), 224), None)
    return _resnet(width, blocks, 32 * math.isqrt(len(positions)), len(pool))


def _fit_resnet(name: str, network: nn.Module, size: int) -> str:
    if not isinstance(network.attnpool, AttentionPool):
        return ""
    note = fit_positions(network.attnpool, "positional_embedding", size, 32, "antialias", name)
    return note and f"{note} (CLIP's own code does not: `attnpool` is ours at this size)"


def _vit(
    width: int,
    depth: int,
    patch: int,
    side: int,
    hidden: int,
    embedding: int | None,
    end: str,
    heads: int | None = None,
    note: str = "",
) -> Architecture:
    known = {(w, d, p): name for name, (w, d, p, _) in VITS.items()}
    kind = known.get((width, depth, patch), f"d{width}_l{depth}_patch{patch}")
    heads = heads or usual_heads(width)
    name = f"clip_vit_{kind}" + (f"_heads{heads}" if heads != usual_heads(width) else "") + end
    return Architecture(
        name=name,
        build=partial(
            VisionTransformer, width, depth, heads, patch, side, hidden, embedding, nn.GELU if end else QuickGELU
        ),
        trunk=lambda network: network,
        signature="class_embedding",
        classifier=("fc.",),
        aliases=last_blocks([f"transformer.resblocks.{i}" for i in range(depth)], "ln_post"),
        size=side * patch,
        short_side=side * patch,
        origins=clip_origins(width, patch),
        tokens=Tokens(prefix=1, cls=True, patch=patch),
        heads=heads,
        infer=partial(_infer_vit, end),
        fit=lambda network, size: fit_positions(network, "positional_embedding", size, patch, "antialias", name),
        note=note,
        **INPUT,
    )


def _infer_vit(end: str, tensors: Tensors, hints: Hints) -> Architecture | None:
    if any(key not in tensors for key in ("conv1.weight", "class_embedding", "positional_embedding")):
        # A text tower has the same blocks, but not these.
        return None
    width, _, patch, _ = tensors["conv1.weight"].shape
    depth = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("transformer.resblocks."))
    side = math.isqrt(len(tensors["positional_embedding"]))
    hidden = len(tensors["transformer.resblocks.0.mlp.c_fc.weight"])
    embedding = tensors["proj"].shape[1] if "proj" in tensors else None
    if side * side + 1 != len(tensors["positional_embedding"]):
        return None
    heads, reason = choose_heads(width, hints)
    return _vit(width, depth, patch, side, hidden, embedding, end, heads, f"heads: {heads}, {reason}")
