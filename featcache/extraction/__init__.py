"""Stage 1: run a frozen backbone once over a dataset and fill a store."""
