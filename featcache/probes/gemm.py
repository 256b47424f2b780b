"""Matrix products in the precision that a probe asks for. Operands and results are float32.

bf16 rounds both factors to bfloat16 and sums in float32; tf32 is the format of NVIDIA's GPUs. Weights, moments and
everything else that is not a matrix product stay float32, so that small updates are not lost.
"""

import torch
from torch import Tensor

PRECISIONS = ("float32", "tf32", "bf16")


def multiply(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """Return a b for matrices [n, m] and [m, k], or for P pairs of them [P, ...]; write it to `out` if that is given."""
    if precision != "bf16":
        return torch.matmul(a, b, out=out)
    product = torch.matmul(a.bfloat16(), b.bfloat16())
    return product.float() if out is None else out.copy_(product)


def accumulate(into: Tensor, a: Tensor, b: Tensor, beta: float, precision: str) -> None:
    """Set into = beta into + a b in place; float32 products take no extra pass over memory."""
    if precision == "bf16":
        # One pass over the float32 memory.
        torch.add(torch.matmul(a.bfloat16(), b.bfloat16()), into, alpha=beta, out=into)
    elif a.ndim == 2:
        into.addmm_(a, b, beta=beta)
    else:
        into.baddbmm_(a, b, beta=beta)
