"""Timing of benchmarks."""

import time

import torch


def seconds(run):
    """Run once and return the time that it took, with what a GPU still had to do."""
    finish = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    finish()
    started = time.perf_counter()
    run()
    finish()
    return time.perf_counter() - started
