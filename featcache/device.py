"""Where tensors are computed on, in which arithmetic, and how much fits there."""

import os
from contextlib import contextmanager

import torch

from featcache.errors import BadInput, shown


def choose_device(name=None, local_rank=0):
    """Return the torch device of that name, by default cuda if there is one, else cpu. Raises BadInput.

    local_rank: of this process among those of its machine, each of which gets a GPU of its own.
    """
    if not isinstance(name, str | int | torch.device | None):
        raise BadInput(f"--device: expected a name such as cpu or cuda:0, not a {type(name).__qualname__}")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        # torch explains at length; its first sentence says what is wrong.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise BadInput(
            f"--device {name if isinstance(name, str) else shown(name)}: cannot be used here ({reason})"
        ) from None
    if device.type == "cuda":
        # What names no device, such as pinned memory, would else claim some of the first GPU from every process.
        torch.cuda.set_device(device)
    return device


def why_not(precision, device):
    """Why a device has no products in tf32 or bf16, or None if it has."""
    if precision == "tf32" and device.type != "cuda":
        return f"is of NVIDIA GPUs, not of {device.type}: use float32 or bf16"
    if precision in ("tf32", "bf16") and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"is of newer GPUs than {torch.cuda.get_device_name(device)}: use float32"
    return None


@contextmanager
def multiplying(precision):
    """Products and convolutions of float32 as they are, or in tf32, and sums of bf16 in float32, within the block.

    torch would let cuDNN's convolutions use tf32, and sums of bf16 stay bf16; its own settings are put back.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = precision == "tf32", False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before[1:]


def free_bytes(device):
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        # What torch keeps for later is taken for the driver, but not for us.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            # Unlike the free pages, this counts the page cache, which a store that was just read fills.
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sent(tensor, device):
    """A tensor on a device; to a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
