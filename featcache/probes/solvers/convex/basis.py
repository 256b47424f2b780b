"""Images in the eigenbasis of their features, which all full-batch problems on these features share."""

from typing import Literal

import torch
from torch import Tensor

from featcache.device import free_bytes

CHUNK_ROWS = 4096
# Images are kept in the eigenbasis, in both precisions, if they take no more than this; otherwise every product rotates
# them again. On a GPU it is a quarter of the free memory.
KEPT_BYTES = 1 << 30


class Eigenbasis:
    """Images along the eigenvectors of the covariance of their features: [N, K].

    N images span at most N directions, and the weights stay in their span, so K = min(N, D). A free bias is one more
    direction, of ones, which is not penalised, and the features are then centred, which changes nothing but the bias. A
    penalised bias is the weight of one more feature that is always 1, like liblinear's with intercept_scaling 1.

    features: [N, D], any float dtype. scale: what all logits are multiplied by.
    spread: the mean square along each direction, float64 [K]. finite: whether all features are finite.
    """

    def __init__(self, features: Tensor, bias: Literal["free", "penalised", "none"] = "free", scale: float = 1.0):
        self.bias, self.scale = bias, scale
        if bias == "penalised":
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        self.features = features
        count, dim = features.shape
        mean = sum(rows.double().sum(0) for rows in features.split(CHUNK_ROWS)) / count
        self.finite = bool(torch.isfinite(mean).all())
        self.mean = mean if bias == "free" else torch.zeros_like(mean)
        centred = (rows.double() - self.mean for rows in features.split(CHUNK_ROWS))
        span = corner = None
        if not self.finite:
            square = torch.zeros_like(mean).diag()
        elif count <= dim:
            span, corner = torch.linalg.qr(torch.cat(list(centred)).t())  # [D, N], [N, N]
            square = corner @ corner.t()
        else:
            square = torch.zeros_like(mean).diag()
            for rows in centred:
                square.addmm_(rows.t(), rows)
        spread, turn = torch.linalg.eigh(square)
        self.spread = spread.clamp(min=0) * (scale**2 / count)
        self.directions = turn if span is None else span @ turn  # [D, K]
        self.longest = max(float((rows.double() - self.mean).norm(dim=1).max()) for rows in features.split(CHUNK_ROWS))
        self._rows = self._kept(turn, corner)
        if bias == "free":
            self.spread = torch.cat([self.spread, self.spread.new_full((1,), scale**2)])

    def _kept(self, turn: Tensor, corner: Tensor | None) -> dict[torch.dtype, Tensor] | None:
        """Return the images in the basis, {dtype: [N, K]}, or None if they are too large to keep."""
        if corner is not None:
            rows = corner.t() @ turn
        elif self.features.numel() * (8 + 4) <= at_most(KEPT_BYTES, self.features.device):
            rows = torch.cat([(rows.double() - self.mean) @ turn for rows in self.features.split(CHUNK_ROWS)])
        else:
            return None
        if self.bias == "free":
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        rows = rows.mul_(self.scale)
        return {rows.dtype: rows, torch.float32: rows.float()}

    def rows(self, numbers: Tensor) -> Tensor:
        """Return some images in the basis, float32 [n, K]. numbers: int64 [n]."""
        if self._rows:
            return self._rows[torch.float32][numbers]
        rows = (self.features[numbers].float() - self.mean.float()) @ self.directions.float()
        return (torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if self.bias == "free" else rows).mul_(self.scale)

    def penalty(self, decay: Tensor) -> Tensor:
        """Return what each direction is penalised by, [Q, 1, K], for decays [Q]."""
        penalty = decay.view(-1, 1, 1).repeat(1, 1, len(self.spread))
        if self.bias == "free":
            penalty[..., -1] = 0
        return penalty

    def slant(self, slope: Tensor) -> Tensor:
        """Return the norm of a gradient [Q, R, K] after the best free bias, or at least a bound on it: [Q].

        The slope of a loss rises with its logit. So if the bias moves until its own gradient b is 0, the slopes of all
        images move in one direction, by b in sum, and the gradient by the weights moves by at most b times the
        longest image.
        """
        if self.bias != "free":
            return slope.flatten(1).norm(dim=1)
        return slope[..., :-1].flatten(1).norm(dim=1) + self.longest * slope[..., -1].norm(dim=1)

    def along(self, points: Tensor) -> Tensor:
        """Return the logits of all images for points [Q, R, K], in the dtype of the points: [Q, R, N]."""
        flat = points.flatten(0, 1)
        if self._rows:
            logits = flat @ self._rows[points.dtype].t()
        else:
            weight, bias = self.as_weights(flat)
            parts = [weight @ rows.to(weight).t() for rows in self.features.split(CHUNK_ROWS)]
            logits = torch.cat(parts, dim=1).add_(bias.unsqueeze(1)).mul_(self.scale)
        return logits.unflatten(0, points.shape[:2])

    def pulled(self, pushes: Tensor) -> Tensor:
        """Return the transpose of along(): take gradients by the logits, [Q, R, N], to those by points, [Q, R, K]."""
        flat = pushes.flatten(0, 1)
        if self._rows:
            points = flat @ self._rows[pushes.dtype]
        else:
            points = flat.new_zeros(len(flat), self.features.shape[1])
            for rows, push in zip(self.features.split(CHUNK_ROWS), flat.split(CHUNK_ROWS, dim=1), strict=True):
                points.addmm_(push, rows.to(push))
            total = flat.sum(1, keepdim=True)
            points = (points - total * self.mean.to(flat)) @ self.directions.to(flat)
            points = (torch.cat([points, total], dim=1) if self.bias == "free" else points).mul_(self.scale)
        return points.unflatten(0, pushes.shape[:2])

    def as_weights(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return points [M, K] as weights [M, D] of the original features, and biases [M], before the scale."""
        weight = points[:, : self.directions.shape[1]] @ self.directions.t().to(points)
        shift = weight @ self.mean.to(points)
        return weight, points[:, -1] - shift if self.bias == "free" else -shift

    def as_probe(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return points [M, K] as weights [M, D] of the features as they were given, and biases [M]."""
        weight, bias = self.as_weights(points)
        return (weight[:, :-1], weight[:, -1]) if self.bias == "penalised" else (weight, bias)


def at_most(size: int, device: torch.device) -> int:
    """Return how many bytes something may take: this many on a CPU, and on a GPU a quarter of what is free."""
    return size if device.type == "cpu" else free_bytes(device) // 4
