"""Weights on their way to other programs and back: export of backbones and probes, import of trained heads."""
