"""Pure numbers: metrics of logits, their intervals, and the test of a difference."""
