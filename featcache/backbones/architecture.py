"""What featcache needs to know of an architecture."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Tokens:
    """How layers that yield tokens [B, N, D] are laid out.

    prefix: tokens that come before those of the patches. cls: whether the first of them is a class
    token. patch: side of a patch in pixels; the patches follow row by row.
    """

    prefix: int
    cls: bool
    patch: int


@dataclass(frozen=True)
class Architecture:
    """A network that featcache can build.

    build() returns the whole network, with the parameter names of its checkpoints. trunk(network)
    returns the module to run for features: without the classifier, its submodules under the names
    that layers go by. signature: a key that checkpoints of this family have; empty if it is only taken
    by name. layouts: {key of a foreign layout: function from its tensors to ours}. classifier:
    prefixes of the keys that features do not need. aliases: layer names for people (`last`,
    `feat1`..`feat5`, `last-1`) to module paths. size (pixels), short_side (of the whole image before the
    centre crop; None is size * 256 / 224), resize (crop, or squash where nothing is cut off), mean, std,
    interpolation, bgr: the transform of the weights, see Preprocessing. said: {one of these fields: where
    its value is from, or what of it is a guess}, for people. heads: attention heads, where tensors do not
    tell. inverse: the input is B-cos's six channels [x, 1 - x]. tokens: of networks that yield tokens.
    nhwc: what is not a convolution's output is [B, H, W, C], as in Swin.

    infer(tensors, hints) returns the Architecture with what only the checkpoint says (depth, width,
    position grid), or None if it is another network's. fit(network, size) makes a loaded network take
    images of size x size; it returns a line on what it did, if anything. note: lines on what tensors
    cannot tell. alike: names for --arch of networks outside of ARCHITECTURES with tensors of the same names and shapes.
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
    said: dict[str, str] = field(default_factory=dict)
    inverse: bool = False
    tokens: Tokens | None = None
    heads: int | None = None
    nhwc: bool = False
    layouts: dict[str, Callable[[dict], dict]] = field(default_factory=dict)
    infer: Callable[[dict, dict], "Architecture | None"] | None = None
    fit: Callable[[nn.Module, int], str] | None = None
    note: str = ""
    alike: tuple[str, ...] = ()

    def named(self, tensors):
        """Return a state dict under this architecture's own names. Pure; what has them already is left as it is."""
        for key, rename in self.layouts.items():
            if key in tensors:
                tensors = rename(tensors)
        return tensors


def without(*names):
    """Return a trunk function that puts nn.Identity in the place of the modules of these names."""

    def trunk(network):
        for name in names:
            setattr(network, name, nn.Identity())
        return network

    return trunk


def with_forward(network, forward):
    """Give a network another forward(network, images). Its class changes, so that copies and compilers see it too."""
    kind = type(network)
    network.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return network


def last_blocks(blocks, norm):
    """Aliases of a transformer: `last`, and `last-1`.. for the blocks before, each through the final norm.

    So does DINOv2's linear evaluation take the last n blocks. blocks: their module paths, in order.
    norm: path of the final norm.
    """
    return {"last": norm} | {f"last-{i}": f"{path}+{norm}" for i, path in enumerate(reversed(blocks)) if i}
