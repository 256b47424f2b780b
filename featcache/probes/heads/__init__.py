"""Heads: their layers and weights, many side by side and one alone."""
