"""Pictures of a posterior: its spectrum, its Kronecker factors, its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import KroneckerSum
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.laplace import Laplace
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.plots._canvas import BLUE, ORANGE, array, axes, matplotlib
from curvlin_nn.prior import GroupedPrior, check_precision
from curvlin_nn.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def spectrum(la: Laplace, *, of: str = "curvature", ax: Axes | None = None) -> Axes:
    """The eigenvalues of a posterior's blocks, largest first, against the prior precision.

    Blocks of one parameter tensor are drawn as one line; a block of several tensors is a line of its own.

    Args:
        la: a fitted posterior.
        of: ``"curvature"``, the eigenvalues ``lambda / (sigma^2 T)``; or ``"posterior"``, with the prior precision
            added.
        ax: where to draw. Prior precisions are a dashed line, or the range between the least and the largest; what is
            below a millionth of them is cut off.

    Raises:
        UnsupportedError: if the curvature's eigenvalues are not known, or the prior cuts through its blocks.
        NotFittedError: before `fit`.
    """
    if of not in ("curvature", "posterior"):
        raise UnsupportedError(f"of={of!r} is not supported; expected {one_of(('curvature', 'posterior'))}")
    evidence, prior = la._evidence(), la._prior(la._prior_precision)
    H = evidence.curvature.spectrum
    if H is None or evidence.curvature.damped is not None or la.sigma_noise.ndim:
        raise UnsupportedError(
            f"the eigenvalues of a {type(evidence.curvature.total).__name__} are not known; expected a structure of "
            "blocks that are diagonal, dense or Kronecker products, without damping, and one sigma_noise"
        )
    eigenvalues = evidence.scale(la.sigma_noise.detach()) * H.eigenvalues
    grouped = isinstance(prior, GroupedPrior) and H.resolves(prior.groups)
    if isinstance(prior, GroupedPrior) and grouped:
        shift = prior.precision.detach()[prior.groups]
    elif of == "posterior":
        raise UnsupportedError("the prior cuts through blocks of the curvature; expected of='curvature'")
    ax = axes(ax)
    lines = eigenvalues_by_parameters(H, la.parameters)
    colours = matplotlib().colormaps["viridis"]
    for position, (name, index) in enumerate(lines.items()):
        values = eigenvalues[index] + (shift[index] if of == "posterior" else 0)
        label = name
        if grouped:
            label = f"{name}: {int((eigenvalues[index] > shift[index]).sum())} of {len(index)}"
        ordered = values.sort(descending=True).values
        rank = torch.arange(1, len(index) + 1) / len(index)
        seen = (ordered > 0).cpu()
        colour = colours(0.88 * position / max(len(lines) - 1, 1))
        marker = "." if len(index) == 1 else ""  # of one point there is no line
        ax.plot(array(rank[seen]), array(ordered[seen]), marker=marker, color=colour, lw=1.8, label=label)
    if grouped:
        least, largest = float(shift.min()), float(shift.max())
        if least < largest:
            ax.axhspan(least, largest, color=ORANGE, alpha=0.15, lw=0)
        else:
            ax.axhline(least, color=ORANGE, lw=1.2, ls="--")
        # Far below the prior nothing matters, and rounding is all there is.
        positive = eigenvalues[eigenvalues > 0]
        bottom = (
            least if of == "posterior" else max(1e-6 * least, float(positive.min()) if len(positive) else 0.0)
        )
        ax.set(ylim=(bottom / 2, 2 * (largest + float(eigenvalues.max()))))
    ax.set(yscale="log", xlim=(0, 1.01), xlabel="rank of the eigenvalue / size of the block")
    ax.set(ylabel=f"eigenvalue of the {of}")
    ax.legend(frameon=False, title="above the prior" if grouped else None)
    return ax


def kronecker_factor(
    H: PrecisionOperator, side: str = "right", *, correlation: bool = False, ax: Axes | None = None
) -> Axes:
    """A heat map of one factor of a layer's curvature ``left (x) right``.

    Args:
        H: a `KroneckerSum` of one term, such as ``la.curvature.blocks[0]``.
        side: ``"left"``, of the gradients of the layer's outputs; or ``"right"``, of its inputs.
        correlation: whether to divide by the roots of the diagonal; rows of zeros stay zero.
        ax: where to draw, with a colour bar beside it.

    Raises:
        UnsupportedError: if H has no such factor.
    """
    sides = ("left", "right")
    if side not in sides:
        raise UnsupportedError(f"side={side!r} is not supported; expected {one_of(sides)}")
    factor = H.terms[0][sides.index(side)] if isinstance(H, KroneckerSum) and len(H.terms) == 1 else None
    if factor is None or factor.ndim != 2:
        raise UnsupportedError(
            f"H must be a KroneckerSum of one term with a {side} factor, found {H!r}; a posterior's blocks are in "
            "la.curvature.blocks"
        )
    matrix = factor.detach().double()
    if correlation:
        root = matrix.diagonal().sqrt()
        inverse = torch.where(root > 0, 1 / root, 0.0)
        matrix = inverse[:, None] * matrix * inverse
    ax = axes(ax)
    bound = float(matrix.abs().max()) or 1.0
    image = ax.imshow(array(matrix), cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(matplotlib("matplotlib.ticker").MaxNLocator(integer=True))
    ax.set_title(f"{side} factor, {len(matrix)} x {len(matrix)}")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    return ax


def evidence_curve(
    la: Laplace, prior_precision: Float[Tensor, " K"] | None = None, *, ax: Axes | None = None
) -> Axes:
    """The log marginal likelihood over a prior precision that all parameters share.

    Args:
        la: a fitted posterior, which stays as it is; a point marks its prior precision if that is one number.
        prior_precision: where to evaluate; None takes 61 numbers within a factor of 1000 of the present one, or of 1.
        ax: where to draw. Where the maximum lies within, what is lower than the higher of the two ends is cut off.

    Raises:
        ValueError: if `prior_precision` is empty or not positive.
        LostPriorError: if a prior precision is lost in the rounding of the curvature.
    """
    ax = axes(ax)
    here = la.prior_precision
    present = (
        here.detach().double().cpu().reshape(()) if isinstance(here, Tensor) and here.numel() == 1 else None
    )
    if prior_precision is None:
        middle = 1.0 if present is None else float(present)
        prior_precision = middle * torch.logspace(-3, 3, 61, dtype=torch.float64)
    prior_precision = check_precision(prior_precision).reshape(-1).sort().values
    with torch.no_grad():
        values = torch.stack([la.log_marginal_likelihood(delta) for delta in prior_precision])
        if present is not None:
            marked = la.log_marginal_likelihood()
            ax.plot(
                float(present), float(marked), "o", color=ORANGE, zorder=3, label=f"at {float(present):.3g}"
            )
            ax.legend(frameon=False)
    ax.plot(array(prior_precision), array(values), color=BLUE, lw=1.8)
    top, end = float(values.max()), float(torch.maximum(values[0], values[-1]))
    if end < top:  # the end that falls off fastest would leave the maximum no room
        ax.set_ylim(end - 0.05 * (top - end), top + 0.05 * (top - end))
    ax.set(xscale="log", xlabel="prior precision", ylabel="log marginal likelihood (nats)")
    return ax


def eigenvalues_by_parameters(H: Spectrum, space: ParameterSpace) -> dict[str, Tensor]:
    """Where in a spectrum the eigenvalues of which parameters stand.

    Returns:
        Coordinates by the name of a parameter, or the names of parameters that share a block.
    """
    of_coordinate = torch.cat([torch.full((len(span),), k) for k, span in enumerate(space.spans.values())])
    of_coordinate = of_coordinate.to(H.block.device)
    groups = [{k} for k in range(len(space.names))]
    for a, b in torch.stack([of_coordinate, of_coordinate[H.block]], 1).unique(dim=0).tolist():
        if groups[a] is not groups[b]:
            groups[a] |= groups[b]
            for k in groups[a]:
                groups[k] = groups[a]
    distinct = {id(group): group for group in groups}.values()
    return {
        _together([space.names[k] for k in sorted(group)]): torch.isin(
            of_coordinate, torch.tensor(sorted(group), device=of_coordinate.device)
        )
        .nonzero()
        .squeeze(-1)
        for group in distinct
    }


def _together(names: Sequence[str]) -> str:
    return (
        names[0]
        if len(names) == 1
        else f"{names[0]} ... {names[-1]}"
        if len(names) > 2
        else " + ".join(names)
    )
