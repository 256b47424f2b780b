"""Inputs: how features in a store become the tensors that probes train on and are scored on."""
