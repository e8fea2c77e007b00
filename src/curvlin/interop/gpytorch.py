"""`StructuredMVN`: a gpytorch distribution that is exact, because every question goes to a `curvlin.Gaussian`."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator.operators import LinearOperator
from torch import Tensor
from torch.distributions import MultivariateNormal as TorchMultivariateNormal
from torch.distributions import kl_divergence
from torch.distributions.kl import register_kl

from curvlin._tree import is_concrete
from curvlin.covariance import Covariance
from curvlin.errors import InexactPathError
from curvlin.gaussian import Gaussian
from curvlin.interop.ingestion import from_linear_operator
from curvlin.interop.linear_operator import CurvlinLinearOperator
from curvlin.interop.subscripts import coordinates, resolved
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic


class StructuredMVN(MultivariateNormal):  # type: ignore[misc]
    """A `gpytorch.distributions.MultivariateNormal` over a precision operator or a structured covariance.

    Values and derivatives are exact at every size, and no matrix of ``D x D`` entries is formed unless it is asked
    for by name (`covariance_matrix`, `precision_matrix`, `scale_tril`). What has no exact structured form raises
    `NotClosedError`.

    Args:
        mean: ``(*batch, D)``.
        covariance_matrix: a precision operator P, for the covariance ``P^-1``; a `Covariance`; or a
            `LinearOperator` (or tensor) whose structure is one of ours. The name is gpytorch's.
        validate_args: whether `log_prob` checks its argument, as in `torch.distributions`.

    Raises:
        NotClosedError: for a `LinearOperator` of another structure.
        TypeError, ValueError: if mean and covariance do not fit.
    """

    def __init__(
        self,
        mean: Float[Tensor, "*batch D"],
        covariance_matrix: PrecisionOperator | Covariance | LinearOperator | Tensor,
        validate_args: bool = False,
    ) -> None:
        self._hold(_gaussian(mean, covariance_matrix), validate_args)

    @classmethod
    def of(cls, gaussian: Gaussian) -> StructuredMVN:
        """The gpytorch face of a `curvlin.Gaussian`, which may be held by a factored operator."""
        new = cls.__new__(cls)
        new._hold(gaussian, bool(gaussian.__dict__.get("_validate_args", False)))
        return new

    def _hold(self, gaussian: Gaussian, validate_args: bool) -> None:
        self._gaussian = gaussian
        whole = gaussian.covariance.expand(gaussian.batch_shape)
        MultivariateNormal.__init__(self, gaussian.mean, CurvlinLinearOperator.of(whole), validate_args)
        self._validate_args = validate_args  # gpytorch sets False for every LinearOperator

    def _alike(self, mean: Tensor, held: Covariance) -> StructuredMVN:
        return type(self)(mean, held, self._validate_args)

    @property
    def loc(self) -> Float[Tensor, "*batch D"]:
        """The mean, which cannot be assigned: densities and draws are those of `gaussian`."""
        return self._gaussian.mean

    @loc.setter
    def loc(self, value: Tensor) -> None:
        if value is not self._gaussian.mean:  # which is what gpytorch's constructor assigns
            raise AttributeError(
                "loc of a StructuredMVN cannot be assigned; make StructuredMVN(mean, mvn.gaussian.covariance)"
            )

    @property
    def gaussian(self) -> Gaussian:
        """The `curvlin.Gaussian` behind it, with conditionals, linear maps and observations."""
        return self._gaussian

    # -- densities and draws ---------------------------------------------------------------------------------

    def log_prob(self, value: Float[Tensor, "*sample *batch D"]) -> Float[Tensor, "*sample *batch"]:
        """The log density."""
        if self._validate_args:
            self._validate_sample(value)
        return self._gaussian.log_prob(value)

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        base_samples: Float[Tensor, "*sample *batch D"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*sample *batch D"]:
        """Draws, differentiable in mean and covariance.

        Args:
            sample_shape: leading shape of the draws.
            base_samples: standard normal noise to make them of; its leading shape is that of the draws.
            generator: source of randomness where there are no base samples; None is torch's default.

        Raises:
            ValueError: if `base_samples` has another shape than the draws, or comes with a generator.
        """
        if base_samples is None:
            return self._gaussian.rsample(tuple(sample_shape), generator)
        own = self.loc.shape
        leading = base_samples.shape[: base_samples.ndim - len(own)]
        fits = base_samples.shape[base_samples.ndim - len(own) :] == own
        if not fits or (len(sample_shape) > 0 and tuple(sample_shape) != tuple(leading)):
            expected = f"({', '.join(map(str, (*(sample_shape or ('...',)), *own)))})"
            raise ValueError(f"base_samples must have shape {expected}, found {tuple(base_samples.shape)}")
        if generator is not None:
            raise ValueError("generator must be None beside base_samples, which are the randomness")
        return self.loc + self._gaussian.covariance.colour(base_samples)

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        base_samples: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*sample *batch D"]:
        """Draws without gradient; see `rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape, base_samples, generator=generator)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """``(log det C + D log(2 pi e)) / 2``."""
        return self._gaussian.entropy()

    # -- moments ---------------------------------------------------------------------------------------------

    @property
    def variance(self) -> Float[Tensor, "*batch D"]:
        """The variances as they are: gpytorch rounds those below 1e-6 up."""
        return self._gaussian.variance

    def confidence_region(self) -> tuple[Tensor, Tensor]:
        """Two standard deviations below and above the mean."""
        spread = 2 * self.stddev
        return self.mean - spread, self.mean + spread

    @property
    def covariance_matrix(self) -> Float[Tensor, "*batch D D"]:
        """C with all its ``D^2`` entries, made anew at each access."""
        return self._dense(self._gaussian.covariance.to_dense())

    @property
    def precision_matrix(self) -> Float[Tensor, "*batch D D"]:
        """``C^-1`` with all its ``D^2`` entries."""
        C = self._gaussian.covariance
        if C.inverted:
            return self._dense(C.operator.to_dense())
        return self._dense(C.solve(torch.eye(C.size, dtype=C.dtype, device=C.device)))

    @property
    def scale_tril(self) -> Float[Tensor, "*batch D D"]:
        """The Cholesky factor of C with all its ``D^2`` entries, no jitter added.

        Raises:
            NotPositiveDefiniteError: if C is singular to rounding.
        """
        P, factors = Dense(self._gaussian.covariance.to_dense())._factored()
        return self._dense(P._root(factors).to(self.loc.dtype))

    def _dense(self, matrix: Tensor) -> Tensor:
        return matrix.expand(*self.batch_shape, *matrix.shape[-2:])

    @property
    def _unbroadcasted_scale_tril(self) -> Tensor:
        raise InexactPathError(
            "a method of torch's MultivariateNormal that StructuredMVN does not override asked for a dense factor; "
            "take it from mvn.gaussian, or use scale_tril"
        )

    # -- the same distribution elsewhere, in part, or larger -------------------------------------------------

    def __getitem__(self, index: Any) -> StructuredMVN:
        """Elements of the batch and the marginal over the last dimension, in the order of the index.

        An integer in the last place, where there is a batch, gives one coordinate of each of its elements: a
        distribution over the last batch dimension with independent coordinates, as in gpytorch.

        Raises:
            IndexError: for tensors in the batch and in the last place together, and what torch refuses.
        """
        *batch, last = resolved(index, self.loc.shape, self.loc.device)
        if isinstance(last, Tensor) and any(isinstance(i, Tensor) for i in batch):
            raise IndexError(
                "index must not hold tensors for the batch and the event together, which are pairs in torch and no "
                "law; index one after the other, mvn[i][..., j]"
            )
        C, mean = self._gaussian.covariance, self.loc
        if any(isinstance(i, Tensor) or i != slice(None) for i in batch):
            C = C.expand(self.batch_shape)._map(lambda t, own: t[(*batch, *(slice(None),) * own)])
            mean = mean[(*batch, slice(None))]
        if isinstance(last, int):
            if mean.ndim < 2:
                raise ValueError(
                    f"index must leave a dimension for the event, found {index!r}; use a slice of length one"
                )
            variance = C.diagonal().expand(mean.shape)
            return self._alike(mean[..., last], Covariance.of(Diagonal(variance[..., last])))
        chosen = coordinates(last, mean.shape[-1], mean.device)
        if chosen is not None:
            mean, C = mean[..., chosen], C.marginal(chosen)
        return self._alike(mean, C)

    def expand(self, batch_size: Sequence[int], _instance: Any = None) -> StructuredMVN:
        """The same distribution with a larger batch, nothing copied and nothing factorised twice."""
        new = type(self).__new__(type(self))
        new._hold(self._gaussian.expand(torch.Size(batch_size)), self._validate_args)
        return new

    def unsqueeze(self, dim: int) -> StructuredMVN:
        """The batch with a dimension of one element inserted; a negative `dim` counts from its end."""
        n = len(self.batch_shape)
        if not -n - 1 <= dim <= n:
            raise IndexError(f"dim must lie in {-n - 1} .. {n}, found {dim}")
        dim = dim % (n + 1)
        whole = self._gaussian.covariance.expand(self.batch_shape)
        return self._alike(self.loc.unsqueeze(dim), whole._map(lambda t, _: t.unsqueeze(dim)))

    def add_jitter(self, noise: float = 1e-4) -> StructuredMVN:
        """Independent noise of variance `noise` on every coordinate; of variance 0, the same distribution.

        Raises:
            ValueError: if `noise` is negative or not finite.
            NotClosedError: if the covariance is held by a precision whose inverse has no structure of ours.
        """
        value = torch.as_tensor(noise, dtype=self.loc.dtype, device=self.loc.device)
        if is_concrete(value):
            if not bool((value.isfinite() & (value >= 0)).all()):
                raise ValueError(f"noise must be finite and at least 0, found {noise}")
            if not value.requires_grad and not bool(value.any()):
                return self
        return self._plus(self.loc, Covariance.of(Isotropic(value, self.loc.shape[-1])))

    def _plus(self, mean: Tensor, C: Covariance) -> StructuredMVN:
        return self._alike(mean, Covariance.of(self._gaussian.covariance._entries() + C._entries()))

    def __add__(self, other: Any) -> StructuredMVN:
        """The law of the sum with an independent normal, or with a number."""
        if isinstance(other, MultivariateNormal):
            theirs = as_gaussian(other)
            return self._plus(self.loc + theirs.mean, theirs.covariance)
        if not isinstance(other, Real):
            return NotImplemented
        return self._alike(self.loc + float(other), self._gaussian.covariance)

    def __radd__(self, other: Any) -> StructuredMVN:
        return self if isinstance(other, Real) and other == 0 else self.__add__(other)

    def __mul__(self, other: Any) -> StructuredMVN:
        """The law of a multiple by a number other than 0."""
        if not isinstance(other, Real):
            return NotImplemented
        if other == 1:
            return self
        if other == 0:
            raise ValueError(
                "a StructuredMVN times 0 has no density; found the factor 0, expected another number"
            )
        C, square = self._gaussian.covariance, float(other) ** 2
        scaled = C.operator / square if C.inverted else C.operator * square
        return self._alike(self.loc * float(other), Covariance(scaled, inverted=C.inverted))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> StructuredMVN:
        return self * (1.0 / other) if isinstance(other, Real) else NotImplemented


def _gaussian(mean: Tensor, held: Any) -> Gaussian:
    if isinstance(held, PrecisionOperator):
        return Gaussian(mean, held)
    if isinstance(held, CurvlinLinearOperator):
        held = held.covariance
    elif isinstance(held, (LinearOperator, Tensor)):
        held = from_linear_operator(held, "covariance")
    if not isinstance(held, Covariance):
        raise TypeError(
            "covariance_matrix must be a PrecisionOperator, a Covariance, a LinearOperator or a tensor, found "
            f"{type(held).__name__}"
        )
    return Gaussian.from_covariance(mean, held)


def as_gaussian(mvn: TorchMultivariateNormal) -> Gaussian:
    """A multivariate normal of gpytorch or torch whose covariance is one of ours, as a `curvlin.Gaussian`.

    Raises:
        NotClosedError: if the structure of its covariance is none of ours.
        TypeError: for a multitask normal, whose event is a matrix.
    """
    if isinstance(mvn, StructuredMVN):
        return mvn.gaussian
    if not isinstance(mvn, TorchMultivariateNormal) or isinstance(mvn, MultitaskMultivariateNormal):
        raise TypeError(f"mvn must be a MultivariateNormal over vectors, found {type(mvn).__name__}")
    if isinstance(mvn, MultivariateNormal) and mvn.islazy:
        return _gaussian(mvn.loc, mvn.lazy_covariance_matrix)
    return Gaussian.from_covariance(mvn.loc, mvn.covariance_matrix)


@register_kl(StructuredMVN, StructuredMVN)  # type: ignore[untyped-decorator]
@register_kl(StructuredMVN, MultivariateNormal)  # type: ignore[untyped-decorator]
@register_kl(MultivariateNormal, StructuredMVN)  # type: ignore[untyped-decorator]
@register_kl(StructuredMVN, TorchMultivariateNormal)  # type: ignore[untyped-decorator]
@register_kl(TorchMultivariateNormal, StructuredMVN)  # type: ignore[untyped-decorator]
def _kl(p: TorchMultivariateNormal, q: TorchMultivariateNormal) -> Float[Tensor, "*batch"]:
    """``KL(p | q)`` by `curvlin.Gaussian`'s exact rules, whichever of the two is ours.

    Raises:
        NotClosedError: if the two structures share no exact form.
    """
    return kl_divergence(as_gaussian(p), as_gaussian(q))
