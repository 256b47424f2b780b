"""Grids of probes: YAML, ranges and rules, and the specs that they make."""
