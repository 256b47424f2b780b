"""Scores as pure numbers: metrics of logits, their intervals, and a test of differences. No folders, no stores."""
