"""Attribution methods on images that are in no store."""

import torch

from featcache.attribution.batch import Batch, Network, Source
from featcache.attribution.reading import Reading
from featcache.attribution.targets import Target
from featcache.backbones.input.preprocessing import Preprocessing


def read(feature):
    """A Reading of a Feature, or of what is one already."""
    return feature if isinstance(feature, Reading) else Reading((feature,))


def batch_of(backbone, feature, images, classes):
    """A Batch of normalised images [B, C, S, S]. classes: those to explain of each image, equally many."""
    preprocessing = Preprocessing(images.shape[-1], (0, 0, 0), (1, 1, 1))
    source = Source(None, preprocessing, images.device, Network(backbone, None), (read(feature),), 2e9)
    # So few that what is made of an image goes through the backbone in several parts.
    vars(source)["at_once"] = 4
    vars(source)["id_of"] = str
    vars(source)["channels"] = lambda feature: read(feature).of_images(backbone, images[:1]).shape[1]
    targets = [Target(image, label, None) for image, own in enumerate(classes) for label in own]
    batch = Batch(targets, source)
    vars(batch)["inputs"] = images.detach()
    return batch


def explain(method, backbone, feature, heads, images, classes):
    """The maps that a method makes of each head: [heads, B, K, S, S]."""
    made = method.explain(heads, read(feature), batch_of(backbone, feature, images, classes))
    return torch.stack([getattr(each, "maps", each) for each in made]).unflatten(1, (len(images), -1))
