"""How-to-Probe's arithmetic, written slowly from its description: loops over pixels, in float64."""

import math


def mean_of_25(image):
    """A 5x5 mean, zeros around the image."""
    size = len(image)
    return [
        [
            sum(
                image[y + dy][x + dx]
                for dy in range(-2, 3)
                for dx in range(-2, 3)
                if 0 <= y + dy < size and 0 <= x + dx < size
            )
            / 25
            for x in range(size)
        ]
        for y in range(size)
    ]


def mirrored(at, size):
    """The pixel that stands in for one outside the image, the edge itself not repeated."""
    return -at if at < 0 else 2 * (size - 1) - at if at >= size else at


def gaussian_of_129(image):
    """A Gaussian of 129 pixels with a deviation of 129 / 4, the image mirrored around; by rows, then by columns."""
    size, sigma = len(image), 129 / 4
    weights = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-64, 65)]
    total = sum(weights)

    def rows(values):
        return [
            [sum(w * row[mirrored(x + d, size)] for d, w in zip(range(-64, 65), weights, strict=True)) / total for x in range(size)]
            for row in values
        ]  # fmt: skip

    along = rows(image)
    turned = [list(column) for column in zip(*along, strict=True)]
    return [list(column) for column in zip(*rows(turned), strict=True)]


def positive(image):
    return [[max(value, 0.0) for value in row] for row in image]


def scaled_boxes(boxes, width, height, size):
    """Corners as whole pixels of the map, fractions cut off. boxes: the numbers in the file."""
    return [(size * int(a) // width, size * int(b) // height, size * int(c) // width, size * int(d) // height) for a, b, c, d in boxes]  # fmt: skip


def inside(x, y, scaled):
    return any(a <= x < c and b <= y < d for a, b, c, d in scaled)


def epg(image, scaled):
    """The share of the positive part of a smoothed map in the boxes, to two decimals; 0 for an empty map."""
    values, total, within = positive(image), 0.0, 0.0
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            total += value
            within += value * inside(x, y, scaled)
    return round(within / (total + 1e-12), 2)


def grid_share(image, cell, side):
    """The share in a cell of a grid, which is not rounded."""
    values, width = positive(image), len(image) // side
    top, left = cell // side * width, cell % side * width
    within = sum(sum(row[left : left + width]) for row in values[top : top + width])
    return within / (sum(map(sum, values)) + 1e-12)


def box_iou(image, scaled, threshold):
    """Intersection over union with the box around large values, which ends before the last of them."""
    values = positive(image)
    low, high = min(map(min, values)), max(map(max, values))
    large = [
        (x, y)
        for y, row in enumerate(values)
        for x, v in enumerate(row)
        if (v - low) / (1e-12 + high - low) >= threshold
    ]
    xs, ys = [x for x, _ in large], [y for _, y in large]
    box = (min(xs), min(ys), max(xs), max(ys)) if large else (0, 0, 1, 1)
    size, both, either = len(image), 0, 0
    for y in range(size):
        for x in range(size):
            one, other = inside(x, y, [box]), inside(x, y, scaled)
            both, either = both + (one and other), either + (one or other)
    return round(both / (either + 1e-10), 2)


def gini(image):
    """Compactness: of the positive part of the map as it is, with 1e-7 added."""
    values = sorted(value + 1e-7 for row in positive(image) for value in row)
    n = len(values)
    return sum((2 * i - n - 1) * value for i, value in enumerate(values, 1)) / (n * sum(values))


def entropy(image):
    """Complexity, in bits: of the positive part of the 5x5 mean, whatever the method."""
    values = [value for row in positive(mean_of_25(image)) for value in row]
    total = sum(values) + 1e-10
    return -sum(value / total * math.log2(value / total + 1e-10) for value in values)
