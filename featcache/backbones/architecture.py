"""What featcache needs to know of an architecture."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A network that featcache can build.

    build() returns the whole network, with the parameter names of its checkpoints. trunk(network)
    returns the module to run for features: without the classifier, its submodules under the names
    that layers go by. signature: a key that only checkpoints of this family have. classifier:
    prefixes of the keys that features do not need. aliases: layer names for people (`last`,
    `feat1`..`feat5`) to module paths. size (pixels), mean, std, interpolation: input of the public
    weights. inverse: the input is B-cos's six channels [x, 1 - x].
    """

    name: str
    build: Callable[[], nn.Module]
    trunk: Callable[[nn.Module], nn.Module]
    signature: str
    classifier: tuple[str, ...]
    aliases: dict[str, str]
    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    inverse: bool = False
