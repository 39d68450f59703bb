"""The search spaces: what the search starts from.

Decides: the initial networks, their sizes and the smallest network allowed. Paper, section "Search space I": four
plain networks, three Conv-BN-ReLU blocks with max-pooling between, two of them of separable convolutions.
"""

from __future__ import annotations

from lemonade_hpc.search.graph import Graph, chain
from lemonade_hpc.search.ops import (
    BatchNorm,
    Conv,
    Depthwise,
    GlobalPool,
    Input,
    Linear,
    MaxPool,
    Op,
    ReLU,
    Signature,
)

PAPER_SIDE = 32
"""Side in pixels of the images that the paper's sizes are meant for."""

SEPARABLE_WIDTHS = ((48, 96, 96), (88, 176, 176))
PLAIN_WIDTHS = ((32, 64, 128), (64, 128, 256))
"""16.7 k, 51.8 k, 94.8 k and 374 k parameters on 32x32x3 images and 10 classes: the paper's 15 k to 400 k."""


def scale(signature: Signature) -> float:
    """How widths follow the image's side: 1 from 32 pixels up, 1/4 at 8 pixels and below."""
    return min(1.0, max(0.25, min(signature.image[1:]) / PAPER_SIDE))


def min_params(signature: Signature) -> int:
    """The smallest network allowed: the paper's 10,000 parameters on 32x32 images, 312 on 8x8 ones."""
    return int(10_000 * scale(signature) ** 2.5)


def initial(signature: Signature) -> tuple[Graph, ...]:
    """The four initial networks, widths scaled with the image; smallest first on the paper's images."""
    factor = scale(signature)
    return tuple(
        plain([max(4, round(width * factor)) for width in widths], separable, signature)
        for separable, family in ((True, SEPARABLE_WIDTHS), (False, PLAIN_WIDTHS))
        for widths in family
    )


def plain(widths: list[int], separable: bool, signature: Signature) -> Graph:
    """Blocks of the given widths with pooling between them, while the image is large enough to pool."""
    ops: list[Op] = [Input()]
    side = min(signature.image[1:])
    for i, width in enumerate(widths):
        if i and side >= 2:
            ops.append(MaxPool())
            side //= 2
        ops += [Depthwise(3), Conv(width, 1)] if separable else [Conv(width, 3)]
        ops += [BatchNorm(), ReLU()]
    return chain([*ops, GlobalPool(), Linear()])
