"""The nearest training images of other images: a fast product finds candidates, exact similarities decide.

Similarities are first computed as a product in float32, or in TF32 where that pays. Let e bound the error of such a
similarity, whatever the order of its sum. Then what is more than 2 e away from the k-th largest is certainly among the
k largest or certainly not, and only what lies within is computed again, in float64 from the features as they are
stored. So the neighbours are those of a ranking in float64, on every device. Of images that are equally near, up to
rounding to float32, the one that comes first among the training images is the nearer.

The largest numbers of a row are more than k, so that the rows beyond them can be ruled out in the same way. An image
for which they cannot, for example because hundreds of training images are equal, is searched again in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featcache.device import multiplying
from featcache.probes.neighbours.memory import SearchMemory
from featcache.probes.neighbours.rows import TrainingRows
from featcache.probes.neighbours.selection import Selection

# Half the distance between 1 and the next number of float32.
UNIT = 2.0**-24
# TF32 pays where there are so many training images for each candidate, whose similarity is then computed again.
ROWS_PER_CANDIDATE = 256


@dataclass(frozen=True, eq=False)
class Draw:
    """Training images to choose from, and how many neighbours are wanted of them.

    rows: their numbers in the matrix of TrainingRows, sorted int64, or None for all. ks: every number of neighbours that
    is asked for. exact: whether the similarities of all neighbours are needed as exactly as their order.
    """

    rows: Tensor | None
    ks: tuple[int, ...]
    exact: bool = False

    def size(self, training: TrainingRows) -> int:
        """Return how many training images there are to choose from."""
        return training.count if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest training images, nearest first: rows int64 [q, k], similarities float32 [q, k], for the largest k."""

    rows: Tensor
    similarities: Tensor


class Search:
    """The search for neighbours of images among training images.

    distance: cosine, euclidean or dot, see heads/knn.py. draws: all are served by the same products.
    """

    def __init__(self, training: TrainingRows, distance: str, draws: Sequence[Draw], memory: SearchMemory):
        self._training, self._distance, self._draws, self._memory = training, distance, draws, memory
        self._norm = float(training.norms.max()) if distance != "cosine" else 1.0
        self._kept: list[tuple[int, Tensor]] | None = None
        if memory.prepared:
            self._kept = [(first, self._prepared(tile, first)) for first, tile in training.tiles()]

    def __call__(self, images: Tensor, own: Tensor | None = None) -> list[Neighbours]:
        """Return the Neighbours of images, float32 [q, D], in each of the draws.

        own: the numbers of the images themselves in the matrix of TrainingRows, int64 [q], -1 for those that are not in
        it; an image is not its own neighbour.
        """
        return self._found(images, own, self._draws, self._tf32_pays(images))

    def _tf32_pays(self, images: Tensor) -> bool:
        kept = sum(candidates(max(draw.ks)) for draw in self._draws)
        return (
            self._distance == "cosine"
            and images.is_cuda
            and torch.cuda.get_device_capability(images.device) >= (8, 0)
            and self._training.count >= ROWS_PER_CANDIDATE * kept
        )

    def _found(self, images: Tensor, own: Tensor | None, draws: Sequence[Draw], tf32: bool) -> list[Neighbours]:
        norms = images.double().norm(dim=1)
        left = images * (1 / norms).float().unsqueeze(1) if self._distance == "cosine" else images
        sizes = [min(candidates(max(draw.ks), tf32), draw.size(self._training)) for draw in draws]
        selections = [Selection(len(images), size, images.device) for size in sizes]
        error = self._scan(left, norms, own, draws, selections, tf32)
        return [self._settled(images, norms, own, d, s, error, tf32) for d, s in zip(draws, selections, strict=True)]

    def _scan(
        self,
        left: Tensor,
        norms: Tensor,
        own: Tensor | None,
        draws: Sequence[Draw],
        selections: Sequence[Selection],
        tf32: bool,
    ) -> Tensor:
        """Multiply all training images with the images, and select candidates. Returns the error bound, float32 [q]."""
        rounding = torch.zeros(2, device=left.device)
        if tf32:
            # A number of float16 has as many digits as one of TF32, so that this product rounds none of them.
            rounded = left.half().float()
            rounding[0], left = (left - rounded).norm(dim=1).max(), rounded
        window = torch.empty(len(left), self._memory.window, device=left.device)
        begin = filled = 0
        with multiplying("tf32" if tf32 else "float32"):
            for first, tile in self._kept or self._training.tiles():
                right = tile if self._kept else self._prepared(tile, first)
                if tf32:
                    rounded = right.half().float()
                    rounding[1], right = max(rounding[1], (right - rounded).norm(dim=1).max()), rounded
                if filled + len(right) > window.shape[1]:
                    self._select(window[:, :filled], begin, own, draws, selections)
                    begin, filled = begin + filled, 0
                part = torch.mm(left, right.t(), out=window[:, filled : filled + len(right)])
                if self._distance == "euclidean":
                    part -= self._training.norms[first : first + len(right)].square().div(2).float()
                filled += len(right)
        self._select(window[:, :filled], begin, own, draws, selections)
        return self._error(norms, tf32) + rounding.sum() * (1 + 2e-3)

    def _prepared(self, tile: Tensor, first: int) -> Tensor:
        """Return rows as factors of the product: float32, for the cosine divided by their norms."""
        values = tile.float()
        if self._distance == "cosine":
            values = values * (1 / self._training.norms[first : first + len(tile)]).float().unsqueeze(1)
        return values

    def _select(
        self,
        similarities: Tensor,
        begin: int,
        own: Tensor | None,
        draws: Sequence[Draw],
        selections: Sequence[Selection],
    ) -> None:
        """Take the similarities [q, n] of the training rows from `begin` on."""
        end = begin + similarities.shape[1]
        if own is not None:
            inside = ((own >= begin) & (own < end)).nonzero().squeeze(1)
            similarities[inside, own[inside] - begin] = -torch.inf
        for draw, selection in zip(draws, selections, strict=True):
            if draw.rows is None:
                selection.add(similarities, None, begin)
                continue
            bounds = torch.tensor([begin, end], device=draw.rows.device)
            low, high = torch.searchsorted(draw.rows, bounds).tolist()
            if low < high:
                columns = draw.rows[low:high]
                selection.add(similarities[:, columns - begin], columns, 0)

    def _error(self, norms: Tensor, tf32: bool) -> Tensor:
        """Return a bound of the error of a similarity of each image, float32 [q].

        A sum of D products in any order has a relative error of at most D u / (1 - D u) in terms of |x| |y| (Higham,
        Accuracy and Stability of Numerical Algorithms, section 3.1), where GPUs that cut digits off have twice the u.
        """
        u = self._training.width * UNIT * (2 if tf32 else 1)
        largest = self._norm
        if self._distance == "cosine":
            # Both factors were divided by their norms, with two roundings each.
            return torch.full_like(norms, 1.01 * (u / (1 - u) + 4 * UNIT), dtype=torch.float32)
        bound = u / (1 - u) * norms * largest
        if self._distance == "euclidean":
            bound += 2 * UNIT * (norms * largest + largest**2)
        return (1.01 * bound).float()

    def _settled(
        self,
        images: Tensor,
        norms: Tensor,
        own: Tensor | None,
        draw: Draw,
        selection: Selection,
        error: Tensor,
        tf32: bool,
    ) -> Neighbours:
        """Return the Neighbours among candidates, and search anew for images whose neighbours may not be among them."""
        k, size = max(draw.ks), selection.size
        values, columns, margin = selection.values, selection.columns, 2 * error.unsqueeze(1)
        everything = size == draw.size(self._training)
        certain = torch.ones(len(images), dtype=torch.bool, device=images.device)
        if not everything:
            certain = values[:, -1] < values[:, k - 1] - margin.squeeze(1)
        doubtful = torch.full_like(values, draw.exact or tf32, dtype=torch.bool)
        for wanted in draw.ks:
            if wanted < size:
                low, high = values[:, wanted, None], values[:, wanted - 1, None]
                doubtful |= (high - low <= margin) & (values >= high - margin) & (values <= low + margin)
        doubtful &= (values > -torch.inf) & certain.unsqueeze(1)
        rows, similarities = columns.clone(), self._as_similarities(values, norms)
        places = doubtful.nonzero()
        if len(places):
            begins = doubtful & ~torch.cat([torch.zeros_like(doubtful[:, :1]), doubtful[:, :-1]], 1)
            runs = begins.flatten().cumsum(0)[doubtful.flatten()]
            numbers = columns[doubtful]
            exact = self._exact(images, norms, places[:, 0], numbers)
            order = numbers.argsort(stable=True)
            order = order[exact[order].argsort(descending=True, stable=True)]
            order = order[runs[order].argsort(stable=True)]
            rows[doubtful], similarities[doubtful] = numbers[order], exact[order]
        rows, similarities = rows[:, :k].contiguous(), similarities[:, :k].contiguous()
        again = (~certain).nonzero().squeeze(1)
        if len(again):
            others = None if own is None else own[again]
            if tf32:
                found = self._found(images[again], others, [draw], False)[0]
            else:
                found = self._in_float64(images[again], others, draw)
            rows[again], similarities[again] = found.rows, found.similarities
        return Neighbours(rows, similarities)

    def _as_similarities(self, values: Tensor, norms: Tensor) -> Tensor:
        """Turn numbers that the product ranks by into similarities, float32."""
        if self._distance != "euclidean":
            return values.clone()
        return -(norms.square().unsqueeze(1) - 2 * values.double()).clamp(min=0).sqrt().float()

    def _exact(self, images: Tensor, norms: Tensor, numbers: Tensor, rows: Tensor) -> Tensor:
        """Return the similarities of pairs of an image and a training row, by their numbers: float32 [n] from float64."""
        size = max(self._memory.exact // (16 * self._training.width), 1)
        parts = []
        for mine, others in zip(numbers.split(size), rows.split(size), strict=True):
            a, b = images[mine].double(), self._training.pick(others).double()
            if self._distance == "euclidean":
                parts.append(-(a - b).norm(dim=1))
                continue
            dots = (a * b).sum(1)
            parts.append(dots / (norms[mine] * self._training.norms[others]) if self._distance == "cosine" else dots)
        return torch.cat(parts).float()

    def _in_float64(self, images: Tensor, own: Tensor | None, draw: Draw) -> Neighbours:
        """Return the Neighbours of a few images by computing everything in float64."""
        k, parts = max(draw.ks), []
        size = max(self._memory.exact // (8 * (self._training.count + self._training.width)), 1)
        for start in range(0, len(images), size):
            part = images[start : start + size].double()
            columns = [self._row_of_float64(part, tile, first) for first, tile in self._training.tiles()]
            similarities = torch.cat(columns, 1).float()
            if own is not None:
                inside = (own[start : start + size] >= 0).nonzero().squeeze(1)
                similarities[inside, own[start : start + size][inside]] = -torch.inf
            if draw.rows is not None:
                similarities = similarities[:, draw.rows]
            values, places = similarities.sort(dim=1, descending=True, stable=True)
            rows = places[:, :k] if draw.rows is None else draw.rows[places[:, :k]]
            parts.append((rows, values[:, :k]))
        rows, similarities = (torch.cat(column) for column in zip(*parts, strict=True))
        return Neighbours(rows, similarities)

    def _row_of_float64(self, images: Tensor, tile: Tensor, first: int) -> Tensor:
        """Return the similarities of images and the training rows from `first` on, float64 [q, n]."""
        rows = tile.double()
        if self._distance == "euclidean":
            return -torch.cdist(images, rows, compute_mode="donot_use_mm_for_euclid_dist")
        dots = images @ rows.t()
        if self._distance == "dot":
            return dots
        return dots / (images.norm(dim=1, keepdim=True) * self._training.norms[first : first + len(tile)])


def candidates(k: int, tf32: bool = True) -> int:
    """Return how many candidates are kept for k neighbours."""
    return k + k // 2 + 64 if tf32 else k + k // 8 + 32
