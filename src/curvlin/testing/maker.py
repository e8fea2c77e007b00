"""Functions that make operators, asked by name for a size, a condition, a scale, a batch, a dtype and randomness."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin.testing.cases import Case
from curvlin.testing.kinds import Spec, make_case
from curvlin.testing.matrices import SPECTRA

MakeOperator = Callable[..., PrecisionOperator | Case] | PrecisionOperator | str
"""A function by names (see `Maker`), a ready operator, or the name of a kind."""
Dense = Tensor | Callable[[Any], Tensor] | None
"""The matrix that an operator is meant to be: a tensor, or a function from the operator to it."""

OFFERED: dict[str, Callable[[Spec], Any]] = {
    "size": lambda spec: spec.size,
    "batch": lambda spec: spec.batch,
    "dtype": lambda spec: spec.dtype,
    "condition": lambda spec: 10.0**spec.log10cond,
    "log10cond": lambda spec: spec.log10cond,
    "scale": lambda spec: spec.scale,
    "log10scale": lambda spec: spec.log10scale,
    "spectrum": lambda spec: spec.spectrum,
    "seed": lambda spec: spec.seed,
    "generator": lambda spec: torch.Generator().manual_seed(spec.seed),
}
"""What a maker may take by name."""

_SAME = {"condition": "log10cond", "scale": "log10scale", "generator": "seed"}
"""Names for another field of `Spec`."""


class Maker:
    """Makes cases from a `MakeOperator`.

    Args:
        make_op: a function that takes any of `OFFERED` by name; a ready operator; or the name of a kind.
        dense: the matrix it is meant to be.
        singular: the operators have no inverse.

    Raises:
        TypeError: if the function needs an argument that is not offered.
    """

    def __init__(self, make_op: MakeOperator, dense: Dense = None, singular: bool = False) -> None:
        self.make_op, self.dense, self.singular = make_op, dense, singular
        self.names: tuple[str, ...] = ()
        if callable(make_op) and not isinstance(make_op, PrecisionOperator):
            parameters = inspect.signature(make_op).parameters.values()
            self.names = tuple(p.name for p in parameters if p.name in OFFERED)
            positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            for p in parameters:
                if p.name not in OFFERED and p.default is p.empty and p.kind not in positional:
                    raise TypeError(
                        f"make_op may take {', '.join(OFFERED)} by name, found the parameter {p.name!r} without "
                        "a default; wrap it in a function of these names"
                    )
        # Fields of `Spec` that change what is made.
        fields = ("size", "batch", "log10cond", "log10scale", "spectrum", "seed")
        self.takes = (
            frozenset(fields)
            if isinstance(make_op, str)
            else frozenset(_SAME.get(n, n) for n in self.names) & set(fields)
        )

    def case(self, spec: Spec) -> Case:
        """The case of this spec.

        Raises:
            ValueError: if `make_op` fails.
            TypeError: if it returns no operator.
        """
        if isinstance(self.make_op, str):
            return make_case(self.make_op, spec)
        made: Any = self.make_op
        if not isinstance(made, PrecisionOperator):
            arguments = {name: OFFERED[name](spec) for name in self.names}
            try:
                made = made(**arguments)
            except Exception as error:
                raise ValueError(
                    f"make_op must serve {self.arguments(spec) or 'a call without arguments'}, found "
                    f"{type(error).__name__}: {error}; restrict sizes= or conditions= to what it can make"
                ) from error
        if isinstance(made, Case):
            return made.to(spec.dtype)
        if not isinstance(made, PrecisionOperator):
            raise TypeError(f"make_op must return a PrecisionOperator, found {type(made).__name__}")
        return Case.of(made.to(spec.dtype), self.dense, singular=self.singular)

    def sweep(
        self, dtype: torch.dtype, sizes: Sequence[int], conditions: Sequence[float], seed: int
    ) -> Iterator[Spec]:
        """Specs over conditions and sizes, with scale, batch and spectrum varied along; none twice.

        What the maker does not take stays at its default.
        """
        scales, batches = (0.0, 6.0, -6.0), ((), (2,), ())
        seen = set()
        for i, condition in enumerate(conditions):
            for j, size in enumerate(sizes):
                spec = Spec(
                    size=size,
                    batch=batches[j % 3],
                    dtype=dtype,
                    log10cond=condition if size > 1 or "size" not in self.takes else conditions[0],
                    log10scale=scales[j % 3],
                    spectrum=SPECTRA[(i + j) % 4],  # the fifth has no inverse
                    seed=seed,
                )
                spec = self.restricted(spec)
                if spec not in seen:
                    seen.add(spec)
                    yield spec

    def restricted(self, spec: Spec) -> Spec:
        """The spec with defaults in the place of what the maker does not take."""
        plain = Spec(dtype=spec.dtype, seed=spec.seed)
        return replace(plain, **{name: getattr(spec, name) for name in self.takes})

    def arguments(self, spec: Spec) -> str:
        """The arguments of the call for a spec, as code."""
        if isinstance(self.make_op, str):
            plain = Spec()
            changed = {k: v for k, v in vars(spec).items() if v != getattr(plain, k)}
            return ", ".join([repr(self.make_op), *(f"{k}={v!r}" for k, v in changed.items())])
        code = {name: repr(OFFERED[name](spec)) for name in self.names if name != "generator"}
        if "generator" in self.names:
            code["generator"] = f"torch.Generator().manual_seed({spec.seed})"
        return ", ".join(f"{name}={value}" for name, value in code.items())

    def reproduction(self, law: str, spec: Spec) -> str:
        """Code that makes the case of a spec and asks a law of it."""
        lines, remarks = ["import torch"], []
        if isinstance(self.make_op, str):
            lines += [
                "from curvlin.testing import LAWS, make_case",
                f"case = make_case({self.arguments(spec)})",
            ]
            return "\n".join([*lines, f"LAWS[{law!r}](case)"])
        lines.append("from curvlin.testing import LAWS, Case")
        names = {}
        for role, value in (("make_op", self.make_op), ("dense", self.dense)):
            names[role] = "None" if value is None else getattr(value, "__name__", role)
            if (module := _importable(value)) is not None:
                lines.append(f"from {module} import {names[role]}")
            elif value is not None:
                names[role] = role
                remarks.append(role)
        if remarks:
            lines.append(f"# {' and '.join(remarks)}: as given to check_operator")
        made = names["make_op"]
        if not isinstance(self.make_op, PrecisionOperator):
            made += f"({self.arguments(spec)})"
        singular = ", singular=True" if self.singular else ""
        lines.append(f"P = {made}.to({spec.dtype})")
        lines.append(f"LAWS[{law!r}](Case.of(P, {names['dense']}{singular}))")
        return "\n".join(lines)


def _importable(value: Any) -> str | None:
    """The module from which a function can be imported by its name, if there is one."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    return module if getattr(sys.modules.get(module), name, None) is value else None
