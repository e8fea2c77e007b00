"""Contractions of Khatri-Rao rows, without the rows.

Row r of sample n is ``phi_nr = sum_s g_nrs (x) a_ns``, with coordinates ``(o, i)``, D = out * in of them.
Against a weight ``w_oi`` per coordinate (None is ``w = 1``) the functions compute

    forward              sum_oi phi_nr,oi V_oi               backward   sum_nr phi_nr,oi u_nr
    per_sample           K_n[r, q]   = sum_oi phi_nr,oi w_oi phi_nq,oi
    per_sample_diagonal  K_n[r, r]
    cross                K[nr, mq]   = sum_oi phi_nr,oi w_oi psi_mq,oi

With ``S = 1`` the rank-one structure of a row makes each the price of a forward pass:
``K_n = g_n diag(v_n) g_n^T`` with ``v_no = sum_i a_ni^2 w_oi``. With ``S > 1`` there are two exact routes, and a
count of multiplications over the shapes chooses; for `per_sample`, per sample,

    rows     multiply the rows out, one chunk at a time:               R S D + R^2 D
    tokens   ``k_st,o = sum_i a_si w_oi a_ti``, then against g twice:  S^2 D + R S^2 out + R^2 S out

where with ``w = 1`` the token products ``k_st = a_s . a_t`` do not depend on o. For a batch of weights with features
that have none, rows are multiplied out once for all, and their products summed with all weights in one product of
matrices.

Temporaries are bounded by `chunk` samples at a time, or as `curvlin.numerics.chunks` chooses when it is None; where
one sample alone exceeds its ceiling, the sum over o is cut as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin.numerics import chunks
from curvlin.numerics.chunks import joined, pieces, recomputing
from curvlin.numerics.repeats import repeats


def multiplied(g: Float[Tensor, "*b N R S out"], a: Float[Tensor, "*b N S in"]) -> Float[Tensor, "*b N R D"]:
    """The rows themselves, all their ``N R D`` entries."""
    return torch.einsum("...nrso,...nsi->...nroi", g, a).flatten(-2)


def forward(
    g: Float[Tensor, "*b N R S out"],
    a: Float[Tensor, "*b N S in"],
    V: Float[Tensor, "*b out in K"],
) -> Float[Tensor, "*b N R K"]:
    """``sum_oi phi_nr,oi V_oi,k``: the layer applied to its inputs first, unless the rows are shorter."""
    (R, S, out), (inputs, K), item = g.shape[-3:], V.shape[-2:], _bytes(g, V.shape[:-3])
    rows = _rows_are_shorter(R, S, out, inputs, K)
    kernel = _forward_rows if rows else _forward_layer
    samples, channels = _product_pieces(g, inputs, K, item, rows=rows)
    kernel = recomputing(kernel, len(samples) * len(channels), g, a, V)

    def summed(n: slice) -> Tensor:
        parts = (kernel(g[..., n, :, :, o], a[..., n, :, :], V[..., o, :, :]) for o in channels)
        return functools.reduce(torch.add, parts)

    return joined([summed(n) for n in samples], dim=-3)


def backward(
    g: Float[Tensor, "*b N R S out"],
    a: Float[Tensor, "*b N S in"],
    u: Float[Tensor, "*b N R K"],
) -> Float[Tensor, "*b out in K"]:
    """``sum_nr phi_nr,oi u_nr,k``, the adjoint of `forward`, with the same choice of route."""
    (R, S, out), inputs, K, item = g.shape[-3:], a.shape[-1], u.shape[-1], _bytes(g, u.shape[:-3])
    rows = _rows_are_shorter(R, S, out, inputs, K)
    kernel = _backward_rows if rows else _backward_layer
    samples, channels = _product_pieces(g, inputs, K, item, rows=rows)
    kernel = recomputing(kernel, len(samples) * len(channels), g, a, u)

    def summed(o: slice) -> Tensor:
        parts = (kernel(g[..., n, :, :, o], a[..., n, :, :], u[..., n, :, :]) for n in samples)
        return functools.reduce(torch.add, parts)

    return joined([summed(o) for o in channels], dim=-3)


def per_sample(
    g: Float[Tensor, "*b N R S out"],
    a: Float[Tensor, "*b N S in"],
    w: Float[Tensor, "*b out in"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*b N R R"]:
    """``Phi_n diag(w) Phi_n^T`` for each sample n, symmetric."""
    K = _over_samples(_sample_route(g, a, w, diagonal=False), g, a, w, chunk, dim=-3)
    return (K + K.mT) / 2


def per_sample_diagonal(
    g: Float[Tensor, "*b N R S out"],
    a: Float[Tensor, "*b N S in"],
    w: Float[Tensor, "*b out in"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*b N R"]:
    """The diagonal of `per_sample` without the rest of it."""
    return _over_samples(_sample_route(g, a, w, diagonal=True), g, a, w, chunk, dim=-2)


def cross(
    g: Float[Tensor, "*b N R S out"],
    a: Float[Tensor, "*b N S in"],
    h: Float[Tensor, "*b M Q T out"],
    b: Float[Tensor, "*b M T in"],
    w: Float[Tensor, "*b out in"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*b N R M Q"]:
    """``Phi_n diag(w) Psi_m^T`` for every pair of samples."""
    route = _pair_route(g, a, h, b, w)
    lefts = pieces(g.shape[-4], route.bytes_left, chunk, route.least_left)
    rights = pieces(h.shape[-4], route.bytes_right, chunk, route.least_right)
    channels = _channels(g.shape[-1], route.bytes_least)

    def block(g: Tensor, a: Tensor, h: Tensor, b: Tensor, w: Tensor | None) -> Tensor:
        return route.contract(g, a, route.prepare(h, b, w))

    n_chunks = len(lefts) * len(rights) * len(channels)
    kernel = recomputing(block, n_chunks, g, a, h, b, w)
    contract = recomputing(route.contract, n_chunks, g, a, h, b, w)

    def column(m: slice, o: slice) -> Tensor:
        left = [(g[..., n, :, :, o], a[..., n, :, :]) for n in lefts]
        right = (h[..., m, :, :, o], b[..., m, :, :], None if w is None else w[..., o, :])
        # What is prepared outside of a chunk is kept for the backward pass, from all columns.
        if kernel is not block and route.bytes_prepared > chunks.CEILING:
            return joined([kernel(*pair, *right) for pair in left], dim=-4)
        prepared = route.prepare(*right)
        return joined([contract(*pair, prepared) for pair in left], dim=-4)

    return functools.reduce(torch.add, (joined([column(m, o) for m in rights], dim=-2) for o in channels))


# -- sizes of chunks -------------------------------------------------------------------------------------------


def _to_share_a_matrix(g: Tensor) -> int:
    """How many samples make reading (or adding) a matrix of D entries per column a small part of a product."""
    return math.ceil(64 / g.shape[-2])


def _channels(out: int, bytes_each: int) -> list[slice]:
    """The channels o, in pieces if one sample alone exceeds the ceiling."""
    return pieces(out, bytes_each // out, least=out) if bytes_each > chunks.CEILING else [slice(0, out)]


def _product_pieces(
    g: Tensor, inputs: int, K: int, item: int, *, rows: bool
) -> tuple[list[slice], list[slice]]:
    """The samples and the channels of a product with K columns, a piece at a time.

    Rows are multiplied out for some samples. The layer's outputs are made for some channels, whose part of the matrix
    (out, in, K) has to be reordered: in pieces that stay in cache.
    """
    N, R, S, out = g.shape[-4:]
    if rows:
        return pieces(N, item * R * out * inputs, least=_to_share_a_matrix(g)), [slice(0, out)]
    channels = pieces(out, item * inputs * K, least=math.ceil(64 / max(1, K)))
    return pieces(N, item * S * channels[0].stop * K, least=_to_share_a_matrix(g)), channels


def _bytes(g: Tensor, batch: torch.Size) -> int:
    """What one number per sample takes, over the whole batch."""
    copies: int = math.prod(torch.broadcast_shapes(g.shape[:-4], batch))
    return g.element_size() * copies


def _weight_bytes(g: Tensor, w: Tensor | None) -> int:
    return _bytes(g, torch.Size() if w is None else w.shape[:-2])


def _over_samples(
    route: _SampleRoute, g: Tensor, a: Tensor, w: Tensor | None, chunk: int | None, dim: int
) -> Tensor:
    samples = pieces(g.shape[-4], route.bytes_each, chunk)
    channels = _channels(g.shape[-1], route.bytes_each)
    kernel = recomputing(route.kernel, len(samples) * len(channels), g, a, w)

    def summed(n: slice) -> Tensor:
        weights = (None if w is None else w[..., o, :] for o in channels)
        parts = (
            kernel(g[..., n, :, :, o], a[..., n, :, :], w_o) for o, w_o in zip(channels, weights, strict=True)
        )
        return functools.reduce(torch.add, parts)

    return joined([summed(n) for n in samples], dim)


# -- products with vectors -----------------------------------------------------------------------------------


def _rows_are_shorter(R: int, S: int, out: int, inputs: int, K: int) -> bool:
    return R * S * out * inputs + R * out * inputs * K < K * (S * out * inputs + R * S * out)


def _forward_rows(g: Tensor, a: Tensor, V: Tensor) -> Tensor:
    return multiplied(g, a) @ V.flatten(-3, -2).unsqueeze(-3)


def _forward_layer(g: Tensor, a: Tensor, V: Tensor) -> Tensor:
    (S, out), K = g.shape[-2:], V.shape[-1]
    V = V.movedim(-2, -3).flatten(-2)  # (in, out * K): one product of matrices for all positions and columns
    outputs = a.flatten(-3, -2) @ V  # (n * s, out * K)
    outputs = outputs.reshape(*outputs.shape[:-2], a.shape[-3], S * out, K)
    return g.flatten(-2) @ outputs


def _backward_rows(g: Tensor, a: Tensor, u: Tensor) -> Tensor:
    product = multiplied(g, a).flatten(-3, -2).mT @ u.flatten(-3, -2)
    return product.reshape(*product.shape[:-2], g.shape[-1], a.shape[-1], u.shape[-1])


def _backward_layer(g: Tensor, a: Tensor, u: Tensor) -> Tensor:
    (S, out), K = g.shape[-2:], u.shape[-1]
    cotangents = g.flatten(-2).mT @ u  # (n, s * out, K)
    cotangents = cotangents.reshape(*cotangents.shape[:-3], g.shape[-4] * S, out * K)
    product = a.flatten(-3, -2).mT @ cotangents
    return product.reshape(*product.shape[:-1], out, K).movedim(-3, -2)


# -- one sample with itself ----------------------------------------------------------------------------------


class _SampleRoute(NamedTuple):
    kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    bytes_each: int


def _sample_route(g: Tensor, a: Tensor, w: Tensor | None, *, diagonal: bool) -> _SampleRoute:
    (R, S, out), inputs, item = g.shape[-3:], a.shape[-1], _weight_bytes(g, w)
    D, columns = out * inputs, 1 if diagonal else R
    many = _n_weights(g, a, w)
    if S == 1 and diagonal and repeats(g, -4):
        return _SampleRoute(_single_diagonal, item * (inputs + 2 * (R + out)))
    if S == 1:
        return _SampleRoute(_single_diagonal if diagonal else _single, item * (inputs + 2 * R * out))
    rows = R * S * D + many * R * columns * D
    tokens = S * S * (inputs if w is None else D) + R * S * S * out + R * columns * S * out
    if many * tokens <= rows:
        kernel = _tokens_diagonal if diagonal else _tokens
        return _SampleRoute(kernel, item * (S * S * (inputs + out) + 2 * R * S * out))
    if many > 1:
        kernel = _rows_of_squares if diagonal else _rows_of_pairs
        return _SampleRoute(kernel, g.element_size() * (R + R * columns) * D)
    return _SampleRoute(_rows_diagonal if diagonal else _rows, item * 2 * R * D)


def _n_weights(g: Tensor, a: Tensor, w: Tensor | None) -> int:
    """How many weights share features that have no batch; 1 where there is one each."""
    shared = math.prod(g.shape[:-4]) == math.prod(a.shape[:-3]) == 1
    return math.prod(w.shape[:-2]) if shared and w is not None else 1


def _single_weight(a: Tensor, w: Tensor | None) -> Tensor:
    """``v_no = sum_i a_ni^2 w_oi`` as ``(..., N, 1, out or 1)``."""
    squared = a.squeeze(-2).square()
    v = squared.sum(-1, keepdim=True) if w is None else squared @ w.mT
    return v.unsqueeze(-2)


def _single(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    g = g.squeeze(-2)
    return (g * _single_weight(a, w)) @ g.mT


def _single_diagonal(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    v = _single_weight(a, w)
    if repeats(g, -4):  # the same left side for all samples, of which one is enough
        squared = g[..., 0, :, 0, :].square()
        return (v.squeeze(-2).expand(*v.shape[:-2], squared.shape[-1])) @ squared.mT
    return (g.squeeze(-2).square() * v).sum(-1)


def _weighted(rows: Tensor, w: Tensor | None) -> Tensor:
    return rows if w is None else rows * w.flatten(-2)[..., None, None, :]


def _rows(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    rows = multiplied(g, a)
    return _weighted(rows, w) @ rows.mT


def _rows_diagonal(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    return _weighted(multiplied(g, a).square(), w).sum(-1)


def _rows_of_squares(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    assert w is not None
    return rows_with_many_weights(multiplied(g, a), w.flatten(-2), diagonal=True)


def _rows_of_pairs(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    assert w is not None
    return rows_with_many_weights(multiplied(g, a), w.flatten(-2), diagonal=False)


def rows_with_many_weights(
    rows: Float[Tensor, "*ones N R D"], w: Float[Tensor, "*b D"], *, diagonal: bool
) -> Float[Tensor, "*b N R"] | Float[Tensor, "*b N R R"]:
    """``Phi_n diag(w) Phi_n^T`` for each sample and each of the weights, or its diagonal: one product of matrices."""
    R = rows.shape[-2]
    if diagonal:
        return _summed(rows.square(), w)
    first, second = torch.triu_indices(R, R, device=rows.device)
    sums = _summed(rows[..., first, :] * rows[..., second, :], w)
    place = torch.empty((R, R), dtype=torch.long, device=rows.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=rows.device)
    return sums[..., place]


def _summed(products: Tensor, w: Tensor) -> Tensor:
    """``(*ones, n, J, D) -> (*b, n, J)`` with each of the weights ``(*b, D)``."""
    sums = products.reshape(products.shape[-3:]) @ w.flatten(0, -2).mT
    batch = torch.broadcast_shapes(products.shape[:-3], w.shape[:-1])
    return sums.movedim(-1, 0).reshape(*batch, *sums.shape[:-1])


def _through(products: Tensor, w: Tensor, own: int) -> Tensor:
    """``(..., i) -> (..., o)`` by w in one product; the last `own` dimensions before i are not batch."""
    weighted = products.flatten(-own - 1, -2) @ w.mT
    return weighted.reshape(*weighted.shape[:-2], *products.shape[-own - 1 : -1], w.shape[-2])


def _half_contracted(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    """``H_n,rto = sum_s g_nrso k_nst,o``."""
    if w is None:
        return torch.einsum("...rso,...st->...rto", g, a @ a.mT)
    k = _through(a.unsqueeze(-2) * a.unsqueeze(-3), w, own=3)
    return torch.einsum("...rso,...sto->...rto", g, k)


def _tokens(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    return _half_contracted(g, a, w).flatten(-2) @ g.flatten(-2).mT


def _tokens_diagonal(g: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
    return (_half_contracted(g, a, w) * g).sum((-2, -1))


# -- every sample with every other ---------------------------------------------------------------------------


class _PairRoute(NamedTuple):
    prepare: Callable[[Tensor, Tensor, Tensor | None], Any]
    """What of the right side serves every chunk of the left one."""
    contract: Callable[[Tensor, Tensor, Any], Tensor]
    bytes_left: int
    bytes_right: int
    bytes_least: int
    """What one pair of samples takes; above the budget the channels are cut."""
    least_left: int = 1
    least_right: int = 1
    bytes_prepared: int = 0
    """What is prepared of all of the right side takes, besides what is given."""


def _pair_route(g: Tensor, a: Tensor, h: Tensor, b: Tensor, w: Tensor | None) -> _PairRoute:
    (N, R, S, out), (M, Q, T, _) = g.shape[-4:], h.shape[-4:]
    inputs, item = a.shape[-1], max(_weight_bytes(g, w), _weight_bytes(h, w))
    D, single = out * inputs, S == T == 1
    if single and w is None:
        return _PairRoute(_as_given, _pairs_plain, item * R * Q * M, 0, 0)
    rows = N * R * S * D + M * Q * T * D + N * R * M * Q * D
    tokens = N * M * (S * T * (inputs if w is None else D) + (R * S * T + R * Q * T) * out)
    if single or tokens <= rows:
        pair = item * (S * T * (inputs + out) + (min(R, Q) if single else R) * T * out)
        # A block of pairs, as square as the numbers of samples allow: large enough to be worth a call, and never
        # much larger than what comes in and goes out.
        given = N * S * (R * out + inputs) + M * T * (Q * out + inputs) + N * R * M * Q
        block = max(1, min(4 * chunks.BUDGET, item * given) // max(1, pair))
        left = min(N, max(1, math.isqrt(block)))
        right = min(M, max(1, block // left))
        contract = _pairs_single if single else _pairs_tokens
        # Neither side may take more than its share, or the two together exceed the block.
        sizes = max(pair * right, chunks.BUDGET // left), max(pair * left, chunks.BUDGET // right)
        return _PairRoute(_as_given, contract, *sizes, pair, left, right)
    left, right = 2 * item * R * D, 2 * item * Q * D  # half of the budget for the rows of either side
    # Rows of the left are multiplied out again for every chunk of the right, which should outweigh that.
    least = math.ceil(16 / R), math.ceil(8 * max(S, 4) / Q)
    prepared = item * M * Q * D
    return _PairRoute(_prepared_rows, _pairs_rows, left, right, (left + right) // 2, *least, prepared)


def _as_given(h: Tensor, b: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return h, b, w


def _pairs_plain(g: Tensor, a: Tensor, right: tuple[Tensor, Tensor, None]) -> Tensor:
    """``(a_n . b_m) (g_nr . h_mq)``: two products of matrices."""
    h, b, _ = right
    g, a, h, b = (t.squeeze(-2) for t in (g, a, h, b))
    inputs = a @ b.mT
    outputs = g.flatten(-3, -2) @ h.flatten(-3, -2).mT
    outputs = outputs.reshape(*outputs.shape[:-2], *g.shape[-3:-1], *h.shape[-3:-1])
    return outputs * inputs[..., :, None, :, None]


def _pairs_single(g: Tensor, a: Tensor, right: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``sum_o g_nro v_nmo h_mqo`` with ``v_nmo = sum_i a_ni w_oi b_mi``."""
    h, b, w = right
    g, a, h, b = (t.squeeze(-2) for t in (g, a, h, b))
    v = _through(a.unsqueeze(-2) * b.unsqueeze(-3), w, own=2)
    if g.shape[-2] <= h.shape[-2]:
        return torch.einsum("...nmro,...mqo->...nrmq", g.unsqueeze(-3) * v.unsqueeze(-2), h)
    return torch.einsum("...nro,...nmqo->...nrmq", g, v.unsqueeze(-2) * h.unsqueeze(-4))


def _pairs_tokens(g: Tensor, a: Tensor, right: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """``sum_to H_nmrto h_mqto`` with ``H_nmrto = sum_s g_nrso k_nsmt,o``."""
    h, b, w = right
    if w is None:
        k = torch.einsum("...nsi,...mti->...nmst", a, b)
        H = torch.einsum("...nrso,...nmst->...nmrto", g, k)
    else:
        k = _through(a[..., :, None, :, None, :] * b[..., None, :, None, :, :], w, own=4)
        H = torch.einsum("...nrso,...nmsto->...nmrto", g, k)
    return torch.einsum("...nmrto,...mqto->...nrmq", H, h)


def _prepared_rows(h: Tensor, b: Tensor, w: Tensor | None) -> Tensor:
    return _weighted(multiplied(h, b), w)


def _pairs_rows(g: Tensor, a: Tensor, rows: Tensor) -> Tensor:
    left = multiplied(g, a)
    K = left.flatten(-3, -2) @ rows.flatten(-3, -2).mT
    return K.reshape(*K.shape[:-2], *left.shape[-3:-1], *rows.shape[-3:-1])
