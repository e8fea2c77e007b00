"""Laws 14 to 18: dtypes and copies, memory, determinism, errors, adapters."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlin.errors import NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.diagonal import Isotropic
from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.guard import FACTOR, DenseTensorError, forbid_dense
from curvlin.testing.laws._law import (
    CONSTANT,
    UNCOUNTED,
    Measurement,
    claim,
    differing,
    forward,
    law,
    norms,
    product,
    worst,
    worst_counted,
)

Question = Callable[[PrecisionOperator], Tensor]


def columns(case: Case) -> Tensor:
    """Two right-hand sides for every element of the batch, in float64."""
    generator = case.generator(71)
    return torch.randn(*case.batch_shape, case.size, 2, dtype=torch.float64, generator=generator)


def questions(case: Case, X: Tensor) -> dict[str, Question]:
    """Every method with a tensor answer, on these right-hand sides rounded to the dtype of the operator."""

    def side(P: PrecisionOperator) -> Tensor:
        return X.to(P.dtype)

    return {
        "matmul": lambda P: P @ side(P),
        "solve": lambda P: P.solve(side(P)),
        "logdet": lambda P: P.logdet(),
        "inv_quad": lambda P: P.inv_quad(side(P)[..., 0]),
        "inv_congruence": lambda P: P.inv_congruence(side(P).mT),
        "inv_congruence_diagonal": lambda P: P.inv_congruence_diagonal(side(P).mT),
        "diagonal": lambda P: P.diagonal(),
        "inverse_diagonal": lambda P: P.inverse_diagonal(),
        "whiten": lambda P: P.whiten(side(P)[..., 0]),
        "unwhiten": lambda P: P.unwhiten(side(P)[..., 0]),
        "root_matvec": lambda P: P.root_matvec(side(P)[..., 0]),
        "root_solve": lambda P: P.root_solve(side(P)[..., 0]),
        "sample": lambda P: P.sample((2,), generator=torch.Generator().manual_seed(0)),
    }


@law(14)
def storage(case: Case) -> Iterator[Measurement]:
    """dtype and device are kept; copies, pickles and kept factors change nothing; float32 is close."""
    P = case.operator
    asked = questions(case, columns(case))
    answers = {name: ask(P) for name, ask in asked.items()}
    vector = torch.Size([*case.batch_shape, case.size])
    shapes = {
        "matmul": (*vector, 2),
        "solve": (*vector, 2),
        "logdet": case.batch_shape,
        "inv_quad": case.batch_shape,
        "inv_congruence": (*case.batch_shape, 2, 2),
        "inv_congruence_diagonal": (*case.batch_shape, 2),
        "sample": (2, *vector),
    }
    for name, answer in answers.items():
        yield claim(f"dtype of {name}", answer.dtype == case.dtype)
        yield claim(f"device of {name}", answer.device == P.device)
        yield claim(f"shape of {name}", answer.shape == torch.Size(shapes.get(name, vector)))
    index = torch.arange(max(1, case.size - 1)).flip(0)
    made: Any
    for name, made in (
        ("2 * P", 2 * P),
        # A dense marginal is an inverse of an inverse, which the condition may make singular.
        *([("marginal", P.marginal(index))] if forward(case) <= UNCOUNTED else []),
        ("conditional", P.conditional(index)),
        ("inverse", P.inverse()),
        ("to_dense", P.to_dense()),
    ):
        yield claim(f"dtype of {name}", made.dtype == case.dtype)
        yield claim(f"device of {name}", made.device == P.device)
    kept = P.factor()
    for name, ask in asked.items():
        yield differing(f"{name} after factor()", ask(kept), answers[name])
    for how, other in (
        ("deepcopy", copy.deepcopy(P)),
        ("pickle", pickle.loads(pickle.dumps(P))),
        (".to(float64) and back", P.to(torch.float64).to(case.dtype)),
        (".detach()", P.detach()),
    ):
        yield claim(f"type after {how}", type(other) is type(P))
        for name in ("solve", "logdet", "unwhiten"):
            yield differing(f"{name} after {how}", asked[name](other), answers[name])
    if case.dtype == torch.float64:
        yield from _single_precision(case, asked, answers)


def _single_precision(
    case: Case, asked: dict[str, Question], answers: dict[str, Tensor]
) -> Iterator[Measurement]:
    """float32 storage moves the matrix by its rounding and nothing else: ``C eps32 cond``."""
    roundings = 1 + len(case.tensors) + case.recipe.storage_roundings
    limit = CONSTANT * roundings * torch.finfo(torch.float32).eps * case.condition * torch.ones(())
    P = case.to(torch.float32).operator
    for name in ("solve", "logdet", "inv_quad", "inverse_diagonal", "inv_congruence"):
        try:
            single = asked[name](P).double()
        except NotPositiveDefiniteError:
            # Rounding may make a matrix indefinite, but only one that is singular to float32.
            yield claim(f"float32 {name} refused although well conditioned", float(limit) > 1e-2)
            continue
        exact = answers[name].double()
        size = exact.abs().amax() if name != "logdet" else torch.tensor(1.0) * case.size
        yield from worst_counted(
            f"float32 {name}", (single - exact).abs().amax() / size, limit, torch.ones(())
        )


@law(15)
def no_dense(case: Case) -> Iterator[Measurement]:
    """No method but `to_dense` makes a tensor of the size of the dense matrix."""
    P = case.operator
    arguments = 2 * case.size * case.batch_shape.numel()
    limit = FACTOR * (sum(t.numel() for t, _ in P._tensors()) + arguments)
    if limit >= case.size**2:
        return
    for name, ask in questions(case, columns(case)).items():
        guard = forbid_dense(limit)
        try:
            with guard:
                ask(P)
        except DenseTensorError:
            pass
        yield Measurement(f"elements of the largest tensor in {name}", float(guard.largest), float(limit))


@law(16)
def determinism(case: Case) -> Iterator[Measurement]:
    """The same call gives the same bits, and only ``sample(generator=None)`` reads torch's generator."""
    P, X = case.operator, columns(case)
    asked, given = questions(case, X), X.clone()
    held = [t.clone() for t, _ in P._tensors()]
    torch.manual_seed(12345)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    for name, ask in asked.items():
        yield differing(f"{name}, twice", ask(P), ask(P))
        yield differing(f"the argument of {name} after the call", X, given)
    kept = P.factor()
    P.update(torch.ones(case.size, 1, dtype=case.dtype))
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    yield claim("torch's generator is left alone", torch.equal(before[0], after[0]))
    yield claim("Python's and NumPy's generators are left alone", before[1:] == after[1:])
    for i, ((t, _), copied) in enumerate(zip(P._tensors(), held, strict=True)):
        yield differing(f"tensor {i} of P after every call", t, copied)
    yield differing("2 * P.factor() solves as 2 * P", asked["solve"](2 * kept), asked["solve"](2 * P))
    yield from _follows_edits(P, asked)
    one, two = (P.sample((2,), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    yield claim("samples depend on the generator", bool((one != two).any()))
    generator = torch.Generator().manual_seed(1)
    first, second = P.sample((2,), generator=generator), P.sample((2,), generator=generator)
    yield differing("samples follow the generator's seed", first, one)
    yield claim("a generator moves on", bool((first != second).any()))
    torch.manual_seed(1)
    default = P.sample((2,))
    torch.manual_seed(1)
    yield differing("samples follow torch's generator when none is given", default, P.sample((2,)))


def _follows_edits(P: PrecisionOperator, asked: dict[str, Question]) -> Iterator[Measurement]:
    """Answers are those of the tensors as they are now: nothing is remembered from before an edit in place."""
    edited = P._map(lambda t, _: t.clone())
    asked = {name: asked[name] for name in ("matmul", "solve", "logdet", "inverse_diagonal", "unwhiten")}
    for ask in asked.values():
        ask(edited)
    with torch.no_grad():
        for t, _ in edited._tensors():
            t.mul_(0.5)
    fresh = edited._map(lambda t, _: t.clone())
    for name, ask in asked.items():
        now, then = _answer(ask, edited), _answer(ask, fresh)
        if now is None or then is None:
            yield claim(f"{name} is refused after an edit in place", now is then)
        else:
            yield differing(f"{name} after an edit in place", now, then)


def _answer(ask: Question, P: PrecisionOperator) -> Tensor | None:
    try:
        return ask(P)
    except NotPositiveDefiniteError:
        return None


@law(17, invertible=False)
def errors(case: Case) -> Iterator[Measurement]:
    """Bad input raises the documented type, in one line that names the argument."""
    P, n = case.operator, case.size
    X = torch.ones(n, 2, dtype=case.dtype)
    wrong = torch.float32 if case.dtype == torch.float64 else torch.float64
    nan = X.clone()
    nan[0, 0] = torch.nan
    short = torch.ones(n + 1, 2, dtype=case.dtype)
    calls: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "@": ("X", lambda X: P @ X),
        "solve": ("X", lambda X: P.solve(X)),
        "inv_quad": ("x", lambda X: P.inv_quad(X.mT)),
        "inv_congruence": ("Phi", lambda X: P.inv_congruence(X.mT)),
        "whiten": ("x", lambda X: P.whiten(X.mT)),
        "unwhiten": ("z", lambda X: P.unwhiten(X.mT)),
        "root_matvec": ("z", lambda X: P.root_matvec(X.mT)),
        "root_solve": ("g", lambda X: P.root_solve(X.mT)),
    }
    wrongs = (
        ("wrong size", ValueError, short),
        ("integers", TypeError, X.long()),
        ("wrong dtype", TypeError, X.to(wrong)),
        ("NaN", ValueError, nan),
        ("other device", ValueError, X.to("meta")),
    )
    for name, (argument, call) in calls.items():
        for what, expected, value in wrongs:
            yield _raises(f"{name}, {what}", expected, partial(call, value), argument)
    yield _raises("solve of no tensor", TypeError, lambda: P.solve([1.0] * n), "X")  # type: ignore[arg-type]  # on purpose
    yield _raises("scaled by 0", ValueError, lambda: 0.0 * P, "scale")
    yield _raises("scaled by -1", ValueError, lambda: -1.0 * P, "scale")
    yield _raises("scaled by NaN", ValueError, lambda: float("nan") * P, "scale")
    yield _raises("+ 1.0", TypeError, lambda: P + 1.0, "")  # type: ignore[operator]  # on purpose
    yield _raises(
        "+ another size", ValueError, lambda: P + Isotropic(torch.ones((), dtype=case.dtype), n + 1), ""
    )
    yield _raises("+ another dtype", TypeError, lambda: P + Isotropic(torch.ones((), dtype=wrong), n), "")
    yield _raises("marginal of nothing", ValueError, lambda: P.marginal([]), "index")
    yield _raises("marginal out of range", ValueError, lambda: P.marginal([n]), "index")
    yield _raises("conditional of a repeated coordinate", ValueError, lambda: P.conditional([0, 0]), "index")
    yield _raises(
        "marginal of a mask", TypeError, lambda: P.marginal(torch.ones(n, dtype=torch.bool)), "index"
    )
    yield _raises("update of the wrong size", ValueError, lambda: P.update(short), "U")
    yield _raises("update with NaN", ValueError, lambda: P.update(nan), "U")
    yield from _not_definite(case)


def _not_definite(case: Case) -> Iterator[Measurement]:
    """Singular and indefinite operators refuse what needs an inverse."""
    P, n = case.operator, case.size
    x = torch.ones(n, dtype=case.dtype)
    largest = P.diagonal().detach().amax(-1).clamp(min=torch.finfo(case.dtype).tiny)
    U = torch.eye(n, 1, dtype=case.dtype) * (2 * largest.sqrt())[..., None, None]
    refusing = [("indefinite", P.downdate(U))]
    if case.recipe.singular:
        refusing.append(("singular", P))
    for name, Q in refusing:
        for what, call in (
            ("solve", lambda Q=Q: Q.solve(x)),
            ("logdet", lambda Q=Q: Q.logdet()),
            ("inv_quad", lambda Q=Q: Q.inv_quad(x)),
            ("inverse_diagonal", lambda Q=Q: Q.inverse_diagonal()),
            ("unwhiten", lambda Q=Q: Q.unwhiten(x)),
            ("sample", lambda Q=Q: Q.sample()),
            ("factor", lambda Q=Q: Q.factor()),
        ):
            yield _raises(
                f"{what} of a matrix that is {name}", NotPositiveDefiniteError, call, "not positive definite"
            )


def _raises(what: str, expected: type[Exception], call: Callable[[], Any], names: str) -> Measurement:
    try:
        call()
    except expected as error:
        message = str(error)
        good = "\n" not in message and names in message
        return claim(f"{what}: one line naming {names!r}, found {message!r}", good)
    except Exception as error:
        return claim(f"{what}: {expected.__name__}, found {type(error).__name__}: {error}", False)
    return claim(f"{what}: {expected.__name__}, found nothing raised", False)


@law(18)
def adapters(case: Case) -> Iterator[Measurement]:
    """Adapters answer as the operator does: linear_operator's exactly, SciPy's as a perfect preconditioner too."""
    from scipy.sparse.linalg import LinearOperator, cg

    if case.batch_shape:  # broadcast beforehand, which may round otherwise
        return
    yield from _linear_operator(case)
    if case.dtype != torch.float64:
        return
    P = case.operator
    A = P.to_scipy()
    X = right_hand_sides(case)["random"]
    yield claim(
        "is a scipy LinearOperator", isinstance(A, LinearOperator) and A.shape == (case.size, case.size)
    )
    # Equal to rounding: the memory of an array may be aligned otherwise than that of a tensor.
    allowed = product(case) * case.norm * norms(X)
    yield worst("matmat", norms(torch.from_numpy(A @ X.numpy()) - P @ X), allowed)
    matvec = torch.from_numpy(A @ X[:, 0].numpy()) - P @ X[:, 0]
    yield worst("matvec", norms(matvec.unsqueeze(-1)), allowed[:1])
    inverse = LinearOperator(
        A.shape, matvec=lambda v: P.solve(torch.from_numpy(v.reshape(-1))).numpy(), dtype=A.dtype
    )
    b = (P @ X)[:, 0]
    if case.condition < 1e8:
        steps: list[Any] = []
        x, info = cg(A, b.numpy(), M=inverse, rtol=1e-6, maxiter=3, callback=steps.append)
        gap = norms((P @ torch.from_numpy(x) - b).unsqueeze(-1)) / norms(b.unsqueeze(-1))
        yield claim(
            f"cg preconditioned by the inverse ends after one step ({len(steps)}, residual {float(gap):.1e})",
            info == 0 and len(steps) <= 1,
        )


def _linear_operator(case: Case) -> Iterator[Measurement]:
    """The same methods on the same tensors, hence the same bits."""
    P, X = case.operator, right_hand_sides(case)["random"].to(case.dtype)
    A, C = P.to_linear_operator("precision"), P.to_linear_operator("covariance")
    yield claim("linear_operator: shape", A.shape == C.shape == P.shape)
    for name, found, expected in (
        ("precision @", A @ X, P @ X),
        ("precision, solve", A.solve(X), P.solve(X)),
        ("precision, logdet", A.logdet(), P.logdet()),
        ("precision, diagonal", A.diagonal(), P.diagonal()),
        ("covariance @", C @ X, P.solve(X)),
        ("covariance, solve", C.solve(X), P @ X),
        ("covariance, logdet", C.logdet(), -P.logdet()),
        ("covariance, diagonal", C.diagonal(), P.inverse_diagonal()),
    ):
        yield differing(f"linear_operator: {name}", found, expected)
