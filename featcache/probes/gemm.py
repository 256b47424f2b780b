"""Matrix products in the arithmetic that a probe asks for; what goes in and comes out is float32.

bf16 rounds both factors to bfloat16 and sums in float32, tf32 is that of NVIDIA's GPUs. Weights, moments
and all that is not a product of matrices stay float32, so that small updates are not lost.
"""

from contextlib import contextmanager

import torch

from featcache.errors import BadInput

PRECISIONS = ("float32", "tf32", "bf16")


def check_precision(precision, device):
    """Raise BadInput for a precision that the device does not have."""
    if precision == "tf32" and device.type != "cuda":
        raise BadInput(f"precision tf32 is of NVIDIA GPUs, not of {device.type}: use float32 or bf16")


@contextmanager
def multiplying(precision):
    """Whether GPUs may use tf32 within the block; torch's own setting is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiply(a, b, precision, out=None):
    """a b of matrices [n, m] and [m, k], or of as many of them [P, ...]; into `out` if it is given."""
    if precision != "bf16":
        return torch.matmul(a, b, out=out)
    product = torch.matmul(a.bfloat16(), b.bfloat16())
    return product.float() if out is None else out.copy_(product)


def accumulate(into, a, b, beta, precision):
    """into = beta into + a b, in place; without a pass over memory of its own in float32."""
    if precision == "bf16":
        # One pass over the float32 memory.
        torch.add(torch.matmul(a.bfloat16(), b.bfloat16()), into, alpha=beta, out=into)
    elif a.ndim == 2:
        into.addmm_(a, b, beta=beta)
    else:
        into.baddbmm_(a, b, beta=beta)
