"""`IterativePrecision`: a precision known only by its products, whose answers say how good they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import floating, positive_integer, same_kind
from curvlin._random import random_signs, standard_normal
from curvlin._tables import TRACE_SOLVE, lookup
from curvlin._tree import hide_from_compiler, needs_grad
from curvlin.errors import NotClosedError
from curvlin.features.base import FeatureOperator
from curvlin.iterative import adjoint, krylov, traces
from curvlin.iterative.krylov import Settings, Whitening
from curvlin.iterative.lanczos import inverse_root
from curvlin.iterative.nystrom import nystrom
from curvlin.iterative.product import Function, Product, product_of
from curvlin.iterative.quadrature import log_quadrature
from curvlin.iterative.results import Estimate, LowRankApproximation, Solution, exactly
from curvlin.precision.base import PrecisionOperator, exact_operator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

MAX_ITERATIONS = 1000


@hide_from_compiler
class IterativePrecision:
    """A symmetric positive (semi)definite matrix given by its products; the way out where no closed form exists.

    Not a `PrecisionOperator`: a solve ends with a residual (`Solution`), and a determinant, a trace or a diagonal is an
    estimate with a standard error (`Estimate`). What needs an exact operator refuses it.

        P = IterativePrecision([A, B], preconditioner=A)      # A + B, which has no structure of its own
        P.solve(b).require()                                  # b, or an error that says what to do
        P.logdet(generator=g).interval(0.95)

    A preconditioner is any exact operator M near P: solves then depend on how far ``M^-1 P`` is from the identity,
    ``log det P = log det M + tr log(M^-1/2 P M^-1/2)`` leaves only the second term to chance, and so do traces and
    variances. It is factorised here, once, and is a constant of all derivatives.

    Values of `solve`, `inv_quad`, `logdet` and `sample` are differentiable twice in the tensors of P by the adjoint
    method (autograd; not `torch.func`). Traces and diagonals are not.

    Args:
        source: a function ``(X, *parameters) -> P X`` for X of shape ``(D, K)``; a symmetric matrix, dense, sparse or
            of `scipy.sparse`; a precision operator; a feature operator Phi, for ``Phi^T Phi``; or a list of such, for
            their sum. No batches.
        parameters: the tensors that a function depends on, for derivatives.
        size: D, needed for a function.
        dtype: of a function's argument and value; by default that of its first parameter, or torch's default.
        device: likewise.
        root: for a function, ``(Z, *parameters) -> L Z`` with ``L L^T = P``, which `sample` needs.
        root_size: the rows of Z; D by default.
        preconditioner: M, positive definite.

    Raises:
        TypeError, ValueError: if arguments do not fit each other, or a function closes over what needs a gradient.
        NotPositiveDefiniteError: if the preconditioner is not.
    """

    __array_ufunc__ = None
    exact = False
    batch_shape = torch.Size()

    def __init__(
        self,
        source: Any,
        parameters: Sequence[Tensor] = (),
        *,
        size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        root: Function | None = None,
        root_size: int | None = None,
        preconditioner: PrecisionOperator | None = None,
    ) -> None:
        if not isinstance(parameters, (list, tuple)):
            raise TypeError(f"parameters must be a tuple of tensors, found {type(parameters).__name__}")
        like = None if dtype is None and device is None else torch.empty(0, dtype=dtype, device=device)
        self._set(product_of(source, tuple(parameters), size, like, root, root_size), preconditioner)

    def _set(self, product: Product, preconditioner: PrecisionOperator | None) -> None:
        if preconditioner is not None:
            exact_operator("preconditioner", preconditioner)
            shape = torch.Size([product.size, product.size])
            if preconditioner.shape != shape:
                raise ValueError(
                    f"preconditioner must have shape {tuple(shape)}, found {tuple(preconditioner.shape)}"
                )
            same_kind("preconditioner", next(preconditioner._tensors())[0], product.like)
            preconditioner = preconditioner.detach().factor()
        self._product, self._preconditioner = product, preconditioner
        self._whitening = Whitening.by(preconditioner)

    @classmethod
    def _of(cls, product: Product, preconditioner: PrecisionOperator | None = None) -> IterativePrecision:
        new = cls.__new__(cls)
        new._set(product, preconditioner)
        return new

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """D, the number of rows."""
        return self._product.size

    @property
    def shape(self) -> torch.Size:
        """``(D, D)``."""
        return torch.Size([self.size, self.size])

    @property
    def dtype(self) -> torch.dtype:
        """Of products and answers (standard errors and traces are float64)."""
        return self._product.like.dtype

    @property
    def device(self) -> torch.device:
        """Of products and answers."""
        return self._product.like.device

    @property
    def preconditioner(self) -> PrecisionOperator | None:
        """M, factorised."""
        return self._preconditioner

    def __repr__(self) -> str:
        count = len(self._product.terms)
        parts = f"{count} term{'s' * (count > 1)}"
        by = "" if self._preconditioner is None else f", preconditioner={type(self._preconditioner).__name__}"
        return f"IterativePrecision({self.size}x{self.size}, {parts}{by}, dtype={self.dtype}, device={self.device})"

    def preconditioned_by(self, preconditioner: PrecisionOperator | None) -> IterativePrecision:
        """The same matrix with another preconditioner, or none."""
        return self._of(self._product, preconditioner)

    def __add__(self, other: Any) -> IterativePrecision:
        """The sum with another, or with an exact or feature operator; without P's preconditioner, which was its own."""
        if isinstance(other, int) and other == 0:  # where the builtin sum() starts
            return self
        if isinstance(other, (IterativePrecision, PrecisionOperator, FeatureOperator)):
            return self._of(self._product + product_of(other))
        return NotImplemented

    __radd__ = __add__

    def __mul__(self, c: float | Tensor) -> IterativePrecision:
        """``c P`` for a positive number c, preconditioned by ``c M``."""
        if not isinstance(c, (Real, Tensor)):
            return NotImplemented
        c = c if isinstance(c, Tensor) else float(c)
        c = torch.as_tensor(c, dtype=self.dtype, device=self.device)
        floating("the scale of an operator", c)
        if c.ndim > 0 or not bool(c > 0):
            raise ValueError(f"the scale of an operator must be one positive number, found {c.tolist()}")
        M = self._preconditioner
        return self._of(self._product.scaled(c), None if M is None else c.detach() * M)

    __rmul__ = __mul__

    # -- products and solves ---------------------------------------------------------------------------------

    def __matmul__(self, X: Float[Tensor, D * K]) -> Float[Tensor, D * K]:
        """``P X`` for a vector or for columns; differentiable as the source is."""
        X, was_vector = self._columns("X", X)
        product = self._live_product(X)
        return product.squeeze(-1) if was_vector else product

    def solve(
        self,
        X: Float[Tensor, D * K],
        *,
        method: str = "cg",
        rtol: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        progress_bar: bool = False,
    ) -> Solution:
        """``P^-1 X`` to ``|X - P x| <= rtol |X|`` in every column.

        Args:
            X: one right-hand side, or columns that are solved together.
            method: "cg" (preconditioned conjugate gradients; P positive definite) or "minres" (residuals fall
                steadily, and P may be singular if X is in its range; a product more expensive in vectors).
            rtol: the relative residual to reach; the root of the rounding unit of the dtype when None.
            max_iterations: products with all columns at a time, at most.
            progress_bar: show one.

        Raises:
            NotPositiveDefiniteError: if conjugate gradients meet negative curvature.
        """
        X, was_vector = self._columns("X", X)
        settings = self._settings(method, rtol, max_iterations, progress_bar)
        x = self._live_solve(X, settings)
        return replace(x, value=x.value.squeeze(-1), residual=x.residual.squeeze(-1)) if was_vector else x

    def inv_quad(
        self,
        x: Float[Tensor, " D"],
        *,
        method: str = "cg",
        rtol: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        progress_bar: bool = False,
    ) -> Solution:
        """``x^T P^-1 x`` as ``2 x^T y - y^T P y`` with y from `solve`.

        The largest value that this expression can take is the answer, so it errs from below and only by
        ``r^T P^-1 r`` with r the residual of y: twice the digits of the solve.
        """
        floating("x", x, ndim=1, like=self._like)
        if x.ndim != 1:
            raise ValueError(f"x must be one vector of {self.size} entries, found shape {tuple(x.shape)}")
        y = self.solve(x, method=method, rtol=rtol, max_iterations=max_iterations, progress_bar=progress_bar)
        return replace(y, value=2 * (x * y.value).sum() - (y.value * (self @ y.value)).sum())

    # -- determinants, traces, diagonals ---------------------------------------------------------------------

    def logdet(
        self,
        probes: int = 10,
        *,
        shifts: Sequence[float] | Tensor | None = None,
        max_steps: int = 100,
        rtol: float | None = None,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Estimate:
        """``log det P`` by stochastic Lanczos quadrature, after the preconditioner's determinant is split off.

        Lanczos stops when quadrature may change the mean by no more than a hundredth of the standard error, which
        is then due to the probes alone; `Estimate.truncation` says what was left. Memory is that of ``probes *
        steps`` vectors, all orthogonal to each other.

        Args:
            probes: random vectors; the standard error falls with their root.
            shifts: numbers s >= 0 for which ``log det(P + s M)`` is estimated from the same products, with M the
                preconditioner (the identity without one); `Estimate.value` has their shape.
            max_steps: products with all probes, at most.
            rtol: of the solve that a derivative needs; see `solve`.
            generator: source of randomness; None is torch's default generator.
            progress_bar: show one.

        Returns:
            The estimate in float64. Without `shifts` it has derivatives: unbiased estimates from the same probes, by a
            solve in the backward pass (also where the value is exact).

        Raises:
            NotPositiveDefiniteError: if P is seen not to be positive definite.
        """
        probes = _at_least("probes", probes, 4)
        max_steps = positive_integer("max_steps", max_steps)
        s = torch.as_tensor(0.0 if shifts is None else shifts, dtype=torch.float64, device=self.device)
        if s.numel() == 0 or not bool(((s >= 0) & torch.isfinite(s)).all()) or s.requires_grad:
            raise ValueError(f"shifts must be finite numbers of at least 0, without grad, found {s.tolist()}")
        Z = random_signs((self.size, probes), generator, self._like)
        M = self._preconditioner
        live = shifts is None and self._needs_grad()
        with torch.no_grad():
            S = self._whitening.whitened(self._product)
            found = log_quadrature(S, Z, s.flatten(), max_steps, progress_bar)
            known = 0.0 if M is None else _asked(M, lambda M, factors: M._logdet(factors))
            result = replace(
                found,
                value=found.value.reshape(s.shape) + known,
                standard_error=found.standard_error.reshape(s.shape),
            )
            if not live:
                return result
            V, RZ = self._whitening.unwhiten(Z), self._whitening.root_matvec(Z)
        inverse = self._inverse(self._settings("cg", rtol, MAX_ITERATIONS, progress_bar))
        value = adjoint.log_determinant(
            result.value, V, RZ, self._product.multiply, inverse, self._product.tensors
        )
        return replace(result, value=value)

    def trace(
        self, products: int = 60, *, method: str = "xtrace", generator: torch.Generator | None = None
    ) -> Estimate:
        """``tr P``.

        Args:
            products: to be spent; D of them or more give the exact trace.
            method: "xtrace", "hutch++" or "hutchinson"; see `curvlin.iterative.traces`.
            generator: source of randomness; None is torch's default generator.
        """
        return self._trace(self._product, products, method, generator)

    def diagonal(self, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
        """The diagonal of P by XDiag, with a standard error for each entry, ``(D,)``; arguments as in `trace`."""
        return self._diagonal(self._product, products, generator)

    def trace_solve(
        self,
        Q: PrecisionOperator | IterativePrecision,
        products: int = 60,
        *,
        method: str = "xtrace",
        rtol: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Estimate:
        """``tr(P^-1 Q)``, as an exact ``tr(M^-1 Q)``, where that has a rule, and an estimate of the rest.

        Args:
            Q: an operator of the same size.
            products: with ``P^-1 Q``, each a solve.
            method: as in `trace`.
            rtol: of the solves; see `solve`.
            max_iterations: of the solves.
            generator: source of randomness; None is torch's default generator.
            progress_bar: show one.

        Raises:
            NotConvergedError: if a solve does not converge.
        """
        if not isinstance(Q, (PrecisionOperator, IterativePrecision)):
            raise TypeError(f"Q must be a PrecisionOperator or IterativePrecision, found {type(Q).__name__}")
        if Q.shape != self.shape:
            raise ValueError(f"Q must have shape {tuple(self.shape)}, found {tuple(Q.shape)}")
        if Q.dtype != self.dtype:
            raise TypeError(f"Q must have dtype {self.dtype}, found {Q.dtype}; convert it with .to()")
        inverse = self._inverse(self._settings("cg", rtol, max_iterations, progress_bar))
        M = self._preconditioner
        rule = None if M is None else lookup(TRACE_SOLVE, type(M), type(Q))
        if M is None or rule is None or isinstance(Q, IterativePrecision):
            return self._trace(lambda X: inverse(Q @ X), products, method, generator)
        known = _asked(M, lambda M, factors: rule(M, Q.to(torch.float64), factors))

        def rest(X: Tensor) -> Tensor:
            QX = Q @ X
            return inverse(QX) - M.solve(QX)

        return self._trace(rest, products, method, generator).plus(known)

    def inverse_diagonal(
        self,
        products: int = 60,
        *,
        rtol: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Estimate:
        """The marginal variances, ``diag(M^-1)`` exactly and the difference by XDiag; arguments as in `trace_solve`.

        Raises:
            NotConvergedError: if a solve does not converge.
        """
        inverse = self._inverse(self._settings("cg", rtol, max_iterations, progress_bar))
        M = self._preconditioner
        if M is None:
            return self._diagonal(inverse, products, generator)
        rest = self._diagonal(lambda X: inverse(X) - M.solve(X), products, generator)
        return rest.plus(_asked(M, lambda M, factors: M._inverse_diagonal(factors)))

    # -- samples and low rank --------------------------------------------------------------------------------

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
        *,
        method: str = "perturb",
        rtol: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        progress_bar: bool = False,
    ) -> Solution:
        """Draws of N(0, P^-1), ``(*sample_shape, D)``.

        Args:
            sample_shape: leading shape of the draws.
            generator: source of randomness; None is torch's default generator.
            method: "perturb" draws ``P^-1 sum_i L_i z_i`` with roots of the terms, ``L_i L_i^T = P_i`` (Papandreou &
                Yuille 2010), differentiable; "lanczos" needs no roots: it applies ``S^-1/2``, with S the whitened P,
                in the Krylov space of the noise (no derivatives).
            rtol: of the solve, see `solve`; for "lanczos" the change of the last step relative to the draw, which
                then is `Solution.residual`.
            max_iterations: products with all draws at a time, at most.
            progress_bar: show one.

        Raises:
            NotClosedError: if a term has no root ("perturb"), or a derivative is asked for ("lanczos").
        """
        if method not in ("perturb", "lanczos"):
            raise ValueError(f"method must be 'perturb' or 'lanczos', found {method!r}")
        settings = self._settings("cg", rtol, max_iterations, progress_bar)

        def noise(size: int) -> Tensor:
            z = standard_normal(sample_shape, torch.Size([size]), generator, self._like)
            return z.reshape(-1, size).mT

        if method == "perturb":
            draws = self._live_solve(self._product.coloured(noise), settings)
        else:
            draws = self._square_root(noise(self.size), settings)
        shape = torch.Size(sample_shape)
        return replace(
            draws, value=draws.value.mT.reshape(*shape, self.size), residual=draws.residual.reshape(shape)
        )

    def low_rank(
        self,
        rank: int,
        *,
        oversampling: int = 10,
        power_iterations: int = 1,
        probes: int = 10,
        generator: torch.Generator | None = None,
    ) -> LowRankApproximation:
        """``P ~ U U^T`` by a block randomised Nystrom approximation, and what it leaves.

        ``Isotropic(delta, D).update(U)`` is then a preconditioner for ``P + delta I`` (Frangella, Tropp & Udell 2023).

        Args:
            rank: columns of U.
            oversampling: further columns of the random block, cut off at the end.
            power_iterations: products more with the block, for spectra that decay slowly.
            probes: products for the estimate of the residual.
            generator: source of randomness; None is torch's default generator.
        """
        rank = positive_integer("rank", rank)
        probes = _at_least("probes", probes, 4)
        for name, value in (("oversampling", oversampling), ("power_iterations", power_iterations)):
            if value != 0:
                positive_integer(name, value)
        if rank > self.size:
            raise ValueError(f"rank must be at most {self.size}, found {rank}")
        with torch.no_grad():
            return nystrom(
                self._product,
                self.size,
                rank,
                oversampling,
                power_iterations,
                probes,
                generator,
                self._like,
            )

    def to_scipy(self) -> ScipyLinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` whose product is ``P @ x`` (CPU)."""
        from curvlin.interop.scipy import to_scipy

        return to_scipy(self)

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _like(self) -> Tensor:
        return self._product.like

    def _needs_grad(self) -> bool:
        return any(needs_grad(t) for t in self._product.tensors)

    def _settings(self, method: str, rtol: float | None, max_iterations: int, progress_bar: bool) -> Settings:
        if method not in krylov.METHODS:
            raise ValueError(f"method must be one of {sorted(krylov.METHODS)}, found {method!r}")
        rtol = torch.finfo(self.dtype).eps ** 0.5 if rtol is None else float(rtol)
        if not 0 < rtol < 1:
            raise ValueError(f"rtol must be between 0 and 1, found {rtol}")
        return Settings(method, rtol, positive_integer("max_iterations", max_iterations), progress_bar)

    def _solve(self, X: Tensor, settings: Settings) -> Solution:
        with torch.no_grad():
            return krylov.solve(self._product, X.detach(), self._whitening, settings)

    def _inverse(self, settings: Settings) -> Callable[[Tensor], Tensor]:
        """``P^-1 X`` without derivatives; raises where it does not converge."""
        return lambda X: self._solve(X, settings).require()

    def _live_product(self, X: Tensor) -> Tensor:
        """``P X`` with derivatives."""
        return adjoint.product(X, self._product.multiply, self._product.tensors)

    def _live_solve(self, X: Tensor, settings: Settings) -> Solution:
        """`_solve` with derivatives."""
        x = self._solve(X, settings)
        if not (needs_grad(X) or self._needs_grad()):
            return x
        inverse = self._inverse(settings)
        return replace(
            x, value=adjoint.solution(x.value, X, self._product.multiply, inverse, self._product.tensors)
        )

    def _square_root(self, Z: Tensor, settings: Settings) -> Solution:
        """``R^-T S^-1/2 Z`` with S the whitened P."""
        if self._needs_grad():
            raise NotClosedError(
                'draws by method="lanczos" have no derivatives; use method="perturb", or draw under torch.no_grad()'
            )
        with torch.no_grad():
            draws = inverse_root(self._whitening.whitened(self._product), Z, settings)
            return replace(draws, value=self._whitening.unwhiten(draws.value))

    def _trace(
        self, A: Callable[[Tensor], Tensor], products: int, method: str, generator: torch.Generator | None
    ) -> Estimate:
        if method not in traces.TRACES:
            raise ValueError(f"method must be one of {sorted(traces.TRACES)}, found {method!r}")
        products = _at_least("products", products, min(self.size, traces.LEAST[method]))
        with torch.no_grad():
            if products >= self.size:
                return exactly(traces.exact_diagonal(A, self.size, self._like).value.sum(), self.size)
            return traces.TRACES[method](A, self.size, products, generator, self._like)

    def _diagonal(
        self, A: Callable[[Tensor], Tensor], products: int, generator: torch.Generator | None
    ) -> Estimate:
        products = _at_least("products", products, min(self.size, traces.LEAST["xdiag"]))
        with torch.no_grad():
            if products >= self.size:
                return traces.exact_diagonal(A, self.size, self._like)
            return traces.xdiag(A, self.size, products, generator, self._like)

    def _columns(self, name: str, X: Tensor) -> tuple[Tensor, bool]:
        floating(name, X, ndim=1, like=self._like)
        if X.ndim > 2 or X.shape[0] != self.size:
            raise ValueError(
                f"{name} must have shape ({self.size},) or ({self.size}, K), found {tuple(X.shape)}"
            )
        return (X.unsqueeze(-1), True) if X.ndim == 1 else (X, False)


def _at_least(name: str, value: int, least: int) -> int:
    if positive_integer(name, value) < least:
        raise ValueError(
            f"{name} must be at least {least}, found {value}: fewer samples of signs may be equal by chance"
        )
    return value


def _asked(M: PrecisionOperator, hook: Callable[[PrecisionOperator, Any], Tensor]) -> Tensor:
    """An answer in float64 from the factors that M keeps."""
    with torch.no_grad():
        return hook(*M._factored())
