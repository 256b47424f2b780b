"""What featcache needs to know of an architecture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypedDict

from torch import nn

from featcache.backbones.checkpoints.encoder import Encoder, Tensors

# Fields of an Architecture that describe the input of its weights, and where each value is from. An origin of None
# removes the one that was known before.
Fields = dict[str, Any]
Origins = dict[str, str | None]


@dataclass(frozen=True)
class Tokens:
    """How layers that yield tokens [B, N, D] are laid out.

    prefix: number of tokens before those of the patches. cls: whether the first of them is a class token. patch: side
    of a patch in pixels; the patches follow row by row.
    """

    prefix: int
    cls: bool
    patch: int


class Hints(TypedDict, total=False):
    """What a checkpoint's tensors do not say of a network.

    heads: attention heads that --arch names; None if it names a network without saying how many. eps: of norms, as
    --arch says. words: all words in the names of the file's other tensors and in the encoder's prefix.
    """

    heads: int | None
    eps: float
    words: set[str]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a network's weights are from: a checkpoint, its encoder, and the network that they were loaded into."""

    path: str | PathLike[str]
    encoder: Encoder
    network: nn.Module


@dataclass(frozen=True)
class Architecture:
    """A network that featcache can build.

    build() returns the whole network, with the parameter names of its checkpoints. trunk(network) returns the module
    to run for features: without the classifier, its submodules under the names that layers go by. signature: a key
    that checkpoints of this family have; empty if the architecture is only taken by name. layouts: {key of a foreign
    layout: function from its tensors to ours}. classifier: prefixes of the keys that features do not need. aliases:
    {layer name for people (`last`, `feat1`..`feat5`, `last-1`): module path}.

    size (pixels), short_side (of the whole image before the centre crop; None is size * 256 / 224), resize ("crop", or
    "squash" where nothing is cut off), mean, std, interpolation and bgr are the transform of the weights, see
    Preprocessing. origins: {one of these fields: where its value is from, or what about it is a guess}, for people.
    inverse: the input is B-cos's six channels [x, 1 - x]. customs(architecture, checkpoint) returns what a checkpoint's
    layout tells of the input beyond the tensors, by the customs of the package that writes it: (fields, origins). The
    checkpoint is None for random weights.

    heads: attention heads, where tensors do not tell. tokens: how layers that yield tokens are laid out. nhwc: whatever
    is not a convolution's output is [B, H, W, C], as in Swin. infer(tensors, hints) returns the Architecture with what
    only the checkpoint says (depth, width, position grid), or None if the tensors are another network's. generic: what
    tensors must be, for messages, where the architecture is a whole family that infer narrows down. fit(network, size)
    makes a loaded network take images of size x size; it returns a line on what it did, if anything. note: lines on
    what tensors cannot tell. alike: names for --arch of networks outside of ARCHITECTURES whose tensors have the same
    names and shapes.
    """

    name: str
    build: Callable[[], nn.Module]
    trunk: Callable[[nn.Module], nn.Module]
    signature: str
    classifier: tuple[str, ...]
    aliases: dict[str, str]
    size: int = 224
    short_side: int | None = None
    resize: str = "crop"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    bgr: bool = False
    origins: dict[str, str] = field(default_factory=dict)
    inverse: bool = False
    customs: "Callable[[Architecture, Checkpoint | None], tuple[Fields, Origins]] | None" = None
    tokens: Tokens | None = None
    heads: int | None = None
    nhwc: bool = False
    layouts: dict[str, Callable[[Tensors], Tensors]] = field(default_factory=dict)
    infer: "Callable[[Tensors, Hints], Architecture | None] | None" = None
    generic: str = ""
    fit: Callable[[nn.Module, int], str] | None = None
    note: str = ""
    alike: tuple[str, ...] = ()

    def named(self, tensors: Tensors) -> Tensors:
        """Return tensors under this architecture's own names. Those that have them already are left as they are."""
        for key, rename in self.layouts.items():
            if key in tensors:
                tensors = rename(tensors)
        return tensors


def without(*names: str) -> Callable[[nn.Module], nn.Module]:
    """Return a trunk function that puts nn.Identity in the place of the modules of these names."""

    def trunk(network: nn.Module) -> nn.Module:
        for name in names:
            setattr(network, name, nn.Identity())
        return network

    return trunk


def with_forward(network: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Give a network another forward(network, images), or any other module one of its own arguments. Its class changes, so that copies and compilers see it too."""
    kind = type(network)
    network.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return network


def last_blocks(blocks: Sequence[str], norm: str) -> dict[str, str]:
    """Return a transformer's aliases: `last`, and `last-1`.. for the blocks before, each through the final norm.

    DINOv2's linear evaluation takes the last n blocks in the same way. blocks: their module paths, in order. norm: path
    of the final norm.
    """
    return {"last": norm} | {f"last-{i}": f"{path}+{norm}" for i, path in enumerate(reversed(blocks)) if i}
