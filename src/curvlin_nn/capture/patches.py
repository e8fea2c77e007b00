"""Patches of images, held by the images: the inputs of a convolution, which overlap, and so do their products."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curvlin.numerics.gram import add_lower_gram, symmetric_of_lower

Sizes = tuple[int, ...]
"""One number for each spatial axis."""

GRAM_BUDGET = 2**18
"""Entries of the rows that are converted and multiplied at once, which stay in cache; one image at least."""


LEAST_INNER = 32
"""Entries of a patch along all axes but the first spatial one, from which on products run fast enough."""


@dataclass(frozen=True)
class Patches:
    """What each output pixel of a convolution sees, in the order of the flattened weight.

    Attributes:
        images: one of each sample.
        kernel: the size of a patch.
        stride: from one patch to the next.
        dilation: from one pixel of a patch to the next.
        padding: zeros before and behind the images along each axis.
    """

    images: Float[Tensor, "N C *input"]
    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    padding: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """The length of a patch."""
        return self.images.shape[1] * math.prod(self.kernel)

    @property
    def places(self) -> Sizes:
        """How many patches fit along each axis."""
        axes = zip(self.images.shape[2:], self.padding, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, pad, k, s, d in axes)

    @property
    def count(self) -> int:
        """The number of patches."""
        return len(self.images) * math.prod(self.places)

    def of_samples(self, samples: slice | Int[Tensor, " n"]) -> Patches:
        """Those of some samples."""
        return Patches(self.images[samples], self.kernel, self.stride, self.dilation, self.padding)

    @functools.cached_property
    def written_out(self) -> Float[Tensor, "N *output size"]:
        """Each by itself, as a vector."""
        return cut_out(zero_padded(self.images, self.padding), self.kernel, self.stride, self.dilation)

    def dense(self, like: Tensor) -> Float[Tensor, "N S size"]:
        """The patches of each sample as vectors."""
        return self.written_out.flatten(1, -2)

    @property
    def shares_products(self) -> bool:
        """Whether `gram` takes less time than to multiply the patches written out.

        Not where few rows of the image meet several rows of the kernel, nor where its products are small ones, nor for
        fewer patches than they are long: a sum over batches takes these together (`GramSum`).
        """
        overlap = self.stride[0] == 1 and 1 < self.kernel[0] <= self.places[0]
        return overlap and self.size >= LEAST_INNER * self.kernel[0] and self.count >= self.size

    def gram(self, dtype: torch.dtype) -> Float[Tensor, "size size"]:
        """``sum patch (x) patch``, float64, from products in `dtype`.

        Along the first spatial axis, patches are the rows ``p + i`` of an image under the rows p of the kernel. For two
        of these, the sum over i is one over rows u of the image, of ``row_u (x) row_{u+lag}`` with lag their distance:
        the same terms for all pairs p at this lag, but for some at the border. So it takes half of the products for a
        kernel of 3 rows, and the rows are cut into patches along the other axes only. Needs a stride of one there.
        """
        n_rows, out = self.images.shape[2], self.places[0]
        k, d, before = self.kernel[0], self.dilation[0], self.padding[0][0]
        inner = self.size // k
        shape = (self.images.shape[1], k, inner // self.images.shape[1])
        total = torch.zeros(*shape, *shape, dtype=torch.float64, device=self.images.device)
        # The rows u that the row p of the kernel meets, as far as they and those at the lag are in the image.
        windows = [
            [(max(0, p * d - before), min(n_rows - lag * d, p * d - before + out)) for p in range(k - lag)]
            for lag in range(k)
        ]
        segments = [_segments(of_lag) for of_lag in windows]
        sums = [[total.new_zeros(inner, inner, dtype=dtype) for _ in of_lag] for of_lag in segments]
        for rows in self._rows(dtype):  # (inner, rows u, the rest)
            for lag, of_lag in enumerate(segments):
                for (start, stop), product in zip(of_lag, sums[lag], strict=True):
                    left = rows[:, start:stop].flatten(1)
                    if lag == 0:
                        add_lower_gram(left.mT, product)
                        continue
                    right = rows[:, start + lag * d : stop + lag * d].flatten(1)
                    product.addmm_(left, right.mT)
        for lag, of_lag in enumerate(windows):
            for p, (start, stop) in enumerate(of_lag):
                met = [
                    s for s, (a, b) in zip(sums[lag], segments[lag], strict=True) if start <= a and b <= stop
                ]
                if not met:
                    continue
                product = torch.stack(met).sum(0, dtype=torch.float64)
                product = symmetric_of_lower(product) if lag == 0 else product
                product = product.unflatten(1, shape[::2]).unflatten(0, shape[::2])
                total[:, p, :, :, p + lag] = product
                if lag:
                    total[:, p + lag, :, :, p] = product.permute(2, 3, 0, 1)
        return total.reshape(self.size, self.size)

    def _rows(self, dtype: torch.dtype) -> Iterator[Float[Tensor, "inner rows M"]]:
        """Images cut along all axes but the first spatial one, some at a time, that one in front of samples."""
        inner = self.size // self.kernel[0]
        at_once = max(1, GRAM_BUDGET // (self.images.shape[2] * math.prod(self.places[1:]) * inner))
        for some in self.images.split(at_once):
            padded = zero_padded(some, ((0, 0), *self.padding[1:]))
            windows = _windows(padded, (1, *self.kernel[1:]), (1, *self.stride[1:]), (1, *self.dilation[1:]))
            ndim = len(self.kernel)
            order = (1, *range(2 + ndim, 2 + 2 * ndim), 2, 0, *range(3, 2 + ndim))
            windows = windows.permute(order)
            rows = torch.empty(windows.shape, dtype=dtype, device=windows.device).copy_(windows)
            yield rows.flatten(0, ndim).flatten(2)


def _segments(windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The windows cut at each other's ends: each is made of some of these."""
    windows = [(start, stop) for start, stop in windows if start < stop]
    ends = sorted({end for window in windows for end in window})
    return [
        (a, b)
        for a, b in itertools.pairwise(ends)
        if any(start <= a and b <= stop for start, stop in windows)
    ]


def cut_out(
    images: Float[Tensor, "N C *input"], kernel: Sizes, stride: Sizes, dilation: Sizes
) -> Float[Tensor, "N *output CK"]:
    """Where the kernel fits into an image, what lies under it; channels vary slowest."""
    windows, ndim = _windows(images, kernel, stride, dilation), len(kernel)
    places = windows.shape[2 : 2 + ndim]
    # One copy, in runs of the image's own rows: several times as fast as torch's im2col.
    columns = windows.permute(0, 1, *range(2 + ndim, 2 + 2 * ndim), *range(2, 2 + ndim))
    size = images.shape[1] * math.prod(kernel)
    return columns.reshape(len(images), size, math.prod(places)).mT.unflatten(1, places)


def _windows(
    images: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes
) -> Float[Tensor, "N C *output *kernel"]:
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        images = images.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    return images


def zero_padded(images: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    """With zeros before and behind along each axis."""
    return F.pad(images, [size for pair in reversed(padding) for size in pair])
