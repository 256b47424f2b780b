"""Grids of probes: their YAML, ranges and rules, and the specs that come from them."""
