"""Inputs: from a store to the tensors that probes train on and are scored on."""
