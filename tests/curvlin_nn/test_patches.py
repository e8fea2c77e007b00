"""Patches of images: cut out by index, and their products from the overlap."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from curvlin_nn.capture import Patches

CASES = [
    # images, kernel, stride, dilation, padding
    ((3, 2, 7), (3,), (1,), (1,), ((1, 1),)),
    ((3, 2, 4), (5,), (1,), (2,), ((4, 5),)),
    ((2, 3, 6, 5), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    ((2, 3, 2, 5), (3, 2), (1, 2), (1, 1), ((1, 1), (0, 1))),
    ((2, 2, 6, 7), (2, 3), (1, 1), (3, 2), ((0, 2), (2, 2))),
    ((2, 2, 9, 4), (3, 1), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((2, 2, 3, 4), (3, 3), (1, 1), (1, 1), ((0, 0), (1, 1))),  # one row of patches
    ((2, 2, 2, 4), (3, 3), (1, 1), (2, 1), ((4, 4), (1, 1))),  # rows of the kernel that meet no image
    ((2, 2, 4, 3, 5), (2, 3, 2), (1, 1, 2), (2, 1, 1), ((1, 1), (1, 1), (0, 1))),
    ((0, 2, 4, 4), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
]


def by_index(p: Patches) -> torch.Tensor:
    """Every patch, entry by entry."""
    padded = F.pad(p.images, [size for pair in reversed(p.padding) for size in pair])
    spans = [
        range(0, n - d * (k - 1), s)
        for n, k, s, d in zip(padded.shape[2:], p.kernel, p.stride, p.dilation, strict=True)
    ]
    rows = []
    for corner in itertools.product(*spans):
        under = [
            slice(o, o + d * (k - 1) + 1, d) for o, k, d in zip(corner, p.kernel, p.dilation, strict=True)
        ]
        rows.append(padded[(slice(None), slice(None), *under)].flatten(1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_of_patches_are_those_of_the_patches_written_out(case):
    shape, *options = case
    generator = torch.Generator().manual_seed(0)
    p = Patches(torch.randn(shape, generator=generator, dtype=torch.float64), *options)
    rows = by_index(p)
    assert torch.equal(p.dense(rows), rows)
    assert p.count == rows.shape[0] * rows.shape[1] and p.size == rows.shape[2]
    rows = rows.flatten(0, 1)
    torch.testing.assert_close(p.gram(torch.float64), rows.mT @ rows, rtol=1e-12, atol=1e-12)


def test_products_in_float64_do_not_see_the_dtype_of_the_images():
    """Few patches have a product of no more rank than they have: its zero eigenvalues lie below any prior's."""
    generator = torch.Generator().manual_seed(0)
    images = 100 * torch.randn(1, 4, 3, 3, generator=generator)
    p = Patches(images, (3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
    values = torch.linalg.eigvalsh(p.gram(torch.float64))
    assert values[-2].abs() < 1e-13 * values[-1]
    torch.testing.assert_close(values[-1], images.double().square().sum())


def test_products_in_float32_are_summed_to_float64():
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    p = Patches(images, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    single, double = p.gram(torch.float32), p.gram(torch.float64)
    assert single.dtype == torch.float64
    assert 0 < (single - double).norm() < 1e-6 * double.norm()
