"""The device that tensors are computed on, its arithmetic, and its free memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from featcache.errors import BadInput, shown


def choose_device(name: str | torch.device | None = None, local_rank: int = 0) -> torch.device:
    """Return the torch device of a name; by default cuda if there is one, else cpu. Raises BadInput.

    local_rank: the rank of this process on its machine. The processes of a machine share its GPUs out by rank.
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
        # Calls that name no device, such as those for pinned memory, would otherwise make every process claim some
        # memory of the first GPU.
        torch.cuda.set_device(device)
    return device


def why_not(precision: str, device: torch.device) -> str | None:
    """Return why a device cannot multiply in tf32 or bf16, or None if it can."""
    if precision == "tf32" and device.type != "cuda":
        return f"is of NVIDIA GPUs, not of {device.type}: use float32 or bf16"
    if precision in ("tf32", "bf16") and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"is of newer GPUs than {torch.cuda.get_device_name(device)}: use float32"
    return None


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Within the block, multiply and convolve float32 exactly, or in tf32 if asked for, and sum bf16 in float32.

    By default torch lets cuDNN convolve in tf32, and sums bf16 in bf16. Its settings are put back afterwards.
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


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of memory can still be allocated on a device."""
    if device.type == "cuda":
        # The driver counts what torch keeps for later as taken, but it is free for us.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            # Unlike the free pages, this counts the page cache, which a store that was just read fills.
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device. It reaches a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
