"""An approximate inverse of the Hessian, for conjugate gradients: diagonal in the eigenbasis, but exact for some images.

The Hessian of one column is X'DX + decay, with D the curvature of the loss at each image. At weak decays most of D lies
on the few images that are neither clearly right nor clearly wrong. The preconditioner takes the R images with the largest
curvature as they are, and all others by their mean:

    M = A + X_top' D_top X_top,  A = diag(mean square of X along each direction) sum(D_rest) + decay

With V = D_top^1/2 X_top A^-1/2, Woodbury's identity gives M^-1 = A^-1/2 (1 - V' (1 + V V')^-1 V) A^-1/2.
"""

import torch
from torch import Tensor

from featcache.probes.losses.curvature import Curvature
from featcache.probes.solvers.convex.basis import Eigenbasis, at_most

# Bytes for V of all columns, and for those that are worked on at a time, which should stay in the cache.
BYTES, CACHED_BYTES = 512 << 20, 8 << 20
# The number of products falls about as 1 / (HALVING + R); measured for a softmax at decays of 1e-3 to 1e-6.
HALVING = 25
# How many images may be taken as they are. Each makes every product dearer than an image more would, because V is read
# from memory for a single column. To prepare V takes so many times R^2 images.
CHOICES, DEARER, PREPARED = (32, 64, 96, 128), 12, 1.5
# It pays if it promises to save this share of the time, and if these images have this share of the curvature.
SAVED, WORTH = 0.25, 0.2
# V V' is known to this share of its diagonal in float32. This share of D_top stays in A too, so that A is never zero.
RESOLUTION, KEPT = 3e-6, 0.01


class Work:
    """How many products the Newton steps of a path take, and so how many images are worth to be taken as they are."""

    def __init__(self) -> None:
        self._difficulty = 0.0

    def note(self, products: float, exact: int) -> None:
        """Note how many products of each problem a step took, with so many images taken as they are."""
        self._difficulty = products * (HALVING + exact)

    def exact(self, images: int, columns: int, directions: int, device: torch.device) -> int:
        """Return how many images to take as they are, whose products and preparation take least time.

        A product takes as long as there are images, and DEARER for each that is taken as it is.
        """
        room = at_most(BYTES, device) // (4 * columns * directions)
        times = {
            exact: self._difficulty * (images + DEARER * exact) / (HALVING + exact) + PREPARED * exact**2
            for exact in CHOICES
            if exact <= min(room, images / 2, directions / 2)
        }
        best = min(times, key=lambda exact: times[exact], default=0)
        return best if times and times[best] < (1 - SAVED) * self._difficulty * images / HALVING else 0


class Preconditioner:
    """The inverse of M for the columns of Q problems; see above.

    inverse: of A, float32 [Q, R, K]. root: A^-1/2 V', as rows, float32 [Q R, exact, K], and corner: (1 + V V')^-1,
    float32 [Q R, exact, exact]; None where no image is taken as it is.
    """

    def __init__(self, inverse: Tensor, root: Tensor | None = None, corner: Tensor | None = None):
        self.inverse, self.root, self.corner = inverse, root, corner

    @classmethod
    def of(cls, basis: Eigenbasis, loss: Curvature, curvature: Tensor, penalty: Tensor, exact: int) -> "Preconditioner":
        """Return that of a Hessian.

        curvature: as loss.slope() returns it. penalty: [Q, 1, K]. exact: how many images to take as they are.
        """
        diagonal = loss.diagonal(curvature)  # [Q, R, N]
        total = diagonal.sum(2)
        top, places = diagonal.topk(exact, 2) if exact else (diagonal[..., :0], None)
        share = top.sum(2)
        if places is not None and float(share.sum() / total.sum()) > WORTH:
            total = torch.maximum(total - share, KEPT * total)
        else:
            places = None
        hessian = basis.spread * total.unsqueeze(2) + penalty
        inverse = (1 / hessian.clamp(min=1e-10 * hessian.amax((1, 2), keepdim=True))).float()
        if places is None:
            return cls(inverse)
        scale, top, places = inverse.flatten(0, 1).sqrt(), top.float().sqrt().flatten(0, 1), places.flatten(0, 1)
        root, corner = scale.new_empty(len(scale), exact, scale.shape[1]), scale.new_empty(len(scale), exact, exact)
        for part in _parts(root):
            rows = root[part]
            torch.mul(basis.rows(places[part].flatten()).view_as(rows), top[part].unsqueeze(2), out=rows)
            rows.mul_(scale[part].unsqueeze(1))
            square = torch.bmm(rows, rows.transpose(1, 2)).double()
            own = square.diagonal(dim1=1, dim2=2)
            own += 1 + RESOLUTION * own.amax(1, keepdim=True)
            corner[part] = torch.cholesky_inverse(torch.linalg.cholesky(square))
            rows.mul_(scale[part].unsqueeze(1))
        return cls(inverse, root, corner)

    @property
    def exact(self) -> int:
        """How many images it takes as they are."""
        return 0 if self.root is None else self.root.shape[1]

    def __call__(self, residual: Tensor) -> Tensor:
        """Return M^-1 times a residual, both float32 [Q, R, K]."""
        result = self.inverse * residual
        if self.root is None or self.corner is None:
            return result
        # A vector times a matrix: the product of a matrix and a column takes torch five times as long.
        flat, own = result.view(len(self.root), 1, -1), residual.reshape(len(self.root), 1, -1)
        for part in _parts(self.root):
            rows = self.root[part]
            inner = torch.bmm(torch.bmm(own[part], rows.transpose(1, 2)), self.corner[part])
            flat[part].baddbmm_(inner, rows, alpha=-1)
        return result

    def take(self, kept: Tensor) -> "Preconditioner":
        """Return that of some of the problems, bool [Q]."""
        if self.root is None or self.corner is None:
            return Preconditioner(self.inverse[kept])
        columns = kept.repeat_interleave(self.inverse.shape[1])
        return Preconditioner(self.inverse[kept], self.root[columns], self.corner[columns])


def _parts(root: Tensor) -> list[slice]:
    """Return slices of columns whose rows stay in the cache; on a GPU, one slice."""
    size = len(root) if root.device.type != "cpu" else max(CACHED_BYTES // (4 * root[0].numel()), 1)
    return [slice(start, start + size) for start in range(0, len(root), size)]
