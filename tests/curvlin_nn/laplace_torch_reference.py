"""What laplace-torch 0.3 answers where it is right, computed by it; run this file to write the numbers down.

    python tests/curvlin_nn/laplace_torch_reference.py    (in an environment that has laplace-torch)

Networks and data are sines of integers: no generator, so that they are the same in every version of torch.
Only nets whose weights are used once per sample are here: for convolutions the two libraries mean the same by KFAC, but
laplace-torch reduces batches of them in another order, and the oracle of `network_oracle` is the stricter referee.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FILE = Path(__file__).parent / "data" / "laplace_torch_0.3.json"
LIKELIHOODS = ("classification", "regression")
SUBSETS = ("all", "last_layer")
STRUCTURES = ("full", "kron", "diag")
BRIDGES = ("bridge", "bridge_norm")
SIGMA = 0.6
LAYERWISE = (0.4, 1.1, 0.7, 1.9, 2.5, 0.3)


def sines(*shape: int, pace: float, phase: float) -> Tensor:
    """Numbers in (-1, 1) without a pattern that matters."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(pace * (steps + 1) ** 1.3 + phase).reshape(shape)


def network(n_outputs: int = 3) -> nn.Module:
    """Two hidden layers."""
    sizes = (4, 6, 5, n_outputs)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out).double(), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(1.3 / math.sqrt(p.shape[-1]) * sines(*p.shape, pace=1.7, phase=index))
    return model


@dataclass(frozen=True)
class Case:
    """One posterior."""

    likelihood: str
    subset: str
    structure: str

    @property
    def name(self) -> str:
        return f"{self.likelihood}, {self.subset}, {self.structure}"

    @property
    def options(self) -> dict[str, float]:
        """Classification at another temperature; regression at 1, where laplace-torch tempers its normaliser too."""
        tempered = self.likelihood == "classification"
        return {
            "prior_precision": 0.7,
            "prior_mean": 0.1,
            **({"temperature": 0.8} if tempered else {"sigma_noise": SIGMA}),
        }

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        y = 2 * sines(10, 3, pace=0.9, phase=0.5)
        return sines(10, 4, pace=0.6, phase=0.2), y.argmax(1) if self.likelihood == "classification" else y

    @property
    def x_test(self) -> Tensor:
        return 2 * sines(3, 4, pace=0.4, phase=0.9)

    def loader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.data), batch_size=4)


CASES = [Case(*choice) for choice in itertools.product(LIKELIHOODS, SUBSETS, STRUCTURES)]
CLASSIFIERS = [case for case in CASES if case.likelihood == "classification"]


def answers(Laplace, case: Case) -> dict[str, Tensor]:
    """What an implementation with these names says of a case."""
    la = Laplace(network(), case.likelihood, case.subset, case.structure, **case.options)
    la.fit(case.loader())
    x = case.x_test
    found = {
        name: getattr(la, name)
        for name in (
            "log_likelihood",
            "scatter",
            "log_det_ratio",
            "log_det_prior_precision",
            "log_det_posterior_precision",
        )
    }
    found["log_marginal_likelihood"] = la.log_marginal_likelihood()
    value = la.mean + 0.1 * sines(len(la.mean), pace=0.3, phase=0.1)
    found["square_norm"] = la.square_norm(value)
    found["log_prob"] = la.log_prob(value)
    found["log_prob, not normalized"] = la.log_prob(value, normalized=False)
    if case.structure == "diag":
        found["posterior_variance"] = la.posterior_variance
        found["posterior_scale"] = la.posterior_scale
    if case.structure == "full":
        found["posterior_covariance, projected"] = la.posterior_covariance @ value
        found["posterior_scale, projected"] = la.posterior_scale @ value
    if case.likelihood == "regression":
        found["mean"], found["covariance"] = la(x)
        found["joint mean"], found["joint covariance"] = la(x, joint=True)
        found["at another noise"] = la.log_marginal_likelihood(
            sigma_noise=torch.tensor(0.9, dtype=torch.float64)
        )
        la.sigma_noise = SIGMA  # laplace-torch keeps what it is asked about
    else:
        found["probit"] = la(x)
    other = torch.tensor(2.3, dtype=torch.float64)
    found["at another prior"] = la.log_marginal_likelihood(prior_precision=other)
    if case.subset == "all":
        layerwise = torch.tensor(LAYERWISE, dtype=torch.float64)
        found["at a prior for each tensor"] = la.log_marginal_likelihood(prior_precision=layerwise)
    return {name: value.detach().double().squeeze() for name, value in found.items()}


def bridged(Laplace, case: Case) -> dict[str, Tensor]:
    """Probabilities of a classifier by the links that `answers` leaves out."""
    la = Laplace(network(), case.likelihood, case.subset, case.structure, **case.options)
    la.fit(case.loader())
    return {link: la(case.x_test, link_approx=link) for link in BRIDGES}


def main() -> None:
    from laplace import Laplace

    found = {case.name: answers(Laplace, case) for case in CASES}
    for case in CLASSIFIERS:
        found[case.name] |= bridged(Laplace, case)
    lines = (
        f"{json.dumps(case)}: {json.dumps({name: value.tolist() for name, value in values.items()})}"
        for case, values in found.items()
    )
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
