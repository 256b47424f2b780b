"""Matrix products in the arithmetic that a probe asks for; what goes in and comes out is float32.

bf16 rounds both factors to bfloat16 and sums in float32, tf32 is that of NVIDIA's GPUs. Weights, moments
and all that is not a product of matrices stay float32, so that small updates are not lost.
"""

import torch

PRECISIONS = ("float32", "tf32", "bf16")


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
