"""Backbones: a checkpoint file in, a frozen network with named layers out.

To add an architecture, put `name -> Architecture` into ARCHITECTURES.
"""

from featcache.backbones import efficientnet_lite, resnet

ARCHITECTURES = {**resnet.architectures(), **efficientnet_lite.architectures()}
