"""Where a sparse posterior looks at first: centroids or members of the data, or inputs that are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.errors import DataError, UnsupportedError, one_of

POOL = 10_000
"""The most samples that are looked at."""

ITERATIONS = 20
"""Of Lloyd's algorithm, at most."""


def k_means(
    x: Float[Tensor, "N D"], k: int, generator: torch.Generator | None = None
) -> Float[Tensor, "k D"]:
    """Centroids by Lloyd's algorithm from the seeds of k-means++ (Arthur & Vassilvitskii, 2007).

    Where there are fewer different samples than centroids, some of these are equal.
    """
    centroids = x[_draw(torch.ones(len(x)), generator)].expand(1, -1)
    nearest = (x - centroids).square().sum(1)
    while len(centroids) < k:
        weights = nearest if bool(nearest.any()) else torch.ones_like(nearest)
        new = x[_draw(weights, generator)]
        nearest = torch.minimum(nearest, (x - new).square().sum(1))
        centroids = torch.cat([centroids, new[None]])
    for _ in range(ITERATIONS):
        owner = torch.cdist(x, centroids).argmin(1)
        counts = owner.bincount(minlength=k).unsqueeze(1)
        sums = torch.zeros_like(centroids).index_add_(0, owner, x)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def members(
    x: Float[Tensor, "N D"], k: int, generator: torch.Generator | None = None
) -> Float[Tensor, "k D"]:
    """k samples, all different ones."""
    device = "cpu" if generator is None else generator.device
    return x[torch.randperm(len(x), generator=generator, device=device)[:k].to(x.device)]


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.multinomial(weights.to(device), 1, generator=generator)[0].to(weights.device)


CHOICES: dict[str, Callable[[Tensor, int, torch.Generator | None], Tensor]] = {
    "kmeans": k_means,
    "random": members,
}
"""How inducing inputs are chosen, by name."""


def check_choice(inducing: object) -> None:
    """Whether this is a name, or a tensor.

    Raises:
        UnsupportedError: if it is neither.
    """
    if not isinstance(inducing, Tensor) and not (isinstance(inducing, str) and inducing in CHOICES):
        found = repr(inducing) if isinstance(inducing, str) else type(inducing).__name__
        raise UnsupportedError(
            f"inducing={found} is not supported; expected {one_of(CHOICES)} or a tensor of inputs"
        )


def chosen(
    x: Float[Tensor, "N D"],
    classes: Int[Tensor, " N"] | None,
    n_inducing: int,
    n_outputs: int,
    name: str,
    generator: torch.Generator | None,
) -> tuple[Float[Tensor, "M D"], Int[Tensor, " M"]]:
    """Inducing inputs, and of which output each is.

    Every class gets as many, chosen among its samples (among all, if it has too few); without classes they are chosen
    together, and outputs are taken in turn.

    Args:
        x: flat inputs.
        classes: of each sample.
        n_inducing: M.
        n_outputs: C.
        name: of the choice.
        generator: source of randomness.

    Raises:
        DataError: if there are more inducing inputs than samples.
    """
    if n_inducing > len(x):
        raise DataError(
            f"n_inducing must be at most the number of samples that are looked at, {len(x)}, found {n_inducing}"
        )
    choose = CHOICES[name]
    outputs = torch.arange(n_inducing, device=x.device) % n_outputs
    if classes is None:
        return choose(x, n_inducing, generator), outputs
    outputs = outputs.sort().values
    parts = []
    for c, k in enumerate(outputs.bincount(minlength=n_outputs).tolist()):
        if k:
            own = x[classes == c]
            parts.append(choose(own if len(own) >= k else x, k, generator))
    return torch.cat(parts), outputs
