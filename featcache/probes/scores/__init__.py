"""Scores of trained probes: metrics, intervals, comparisons."""
