"""A Gaussian Markov random field seen through a few observations that couple its blocks.

    python examples/gmrf.py

Shows a posterior that is a low-rank update of a block-diagonal prior. S stations each have a series of T months, an
autoregressive process whose precision is tridiagonal; the series are independent until averages over the stations of a
region are observed, which couple all stations of the region:

    prior        P = blockdiag(P_1, ..., P_S)                  BlockDiag
    seen         y = Phi x + e,  e ~ N(0, Lambda^-1)           k rows: averages, and some single months
    posterior    P + Phi^T Lambda Phi                          Woodbury over the BlockDiag

Factorising costs O(S T^3 + D T k + D k^2) with D = S T, where the matrix of D rows would cost O(D^3). Marginals,
conditionals, variances and draws are exact. About two seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin import BlockDiag, Dense, Gaussian

STATIONS, MONTHS = 24, 60
REGIONS = {"north": range(0, 8), "south": range(8, 24)}
NOISE_SD = 0.05


def autoregression(correlation: float, sd: float, length: int) -> Dense:
    """The tridiagonal precision of a stationary AR(1) series, ``x_t = rho x_(t-1) + sd sqrt(1 - rho^2) e_t``."""
    rho = correlation
    inner = torch.full((length,), 1 + rho**2, dtype=torch.float64)
    inner[0] = inner[-1] = 1.0
    off = torch.full((length - 1,), -rho, dtype=torch.float64)
    return Dense((inner.diag() + off.diag(1) + off.diag(-1)) / (sd**2 * (1 - rho**2)))


def field() -> Gaussian:
    """The prior: one series per station, from slow and small to fast and large."""
    correlations = torch.linspace(0.98, 0.8, STATIONS).tolist()
    sds = torch.linspace(0.5, 2.0, STATIONS).tolist()
    blocks = [autoregression(rho, sd, MONTHS) for rho, sd in zip(correlations, sds, strict=True)]
    return Gaussian(torch.zeros(STATIONS * MONTHS, dtype=torch.float64), BlockDiag(blocks))


def months_of(station: int) -> range:
    """The coordinates of one station's series."""
    return range(station * MONTHS, (station + 1) * MONTHS)


def observed_rows() -> Tensor:
    """Phi: each region's average in every third month, and station 0 in the first year."""
    rows = []
    for stations in REGIONS.values():
        for month in range(0, MONTHS, 3):
            row = torch.zeros(STATIONS, MONTHS, dtype=torch.float64)
            row[list(stations), month] = 1 / len(stations)
            rows.append(row.flatten())
    for month in range(12):
        row = torch.zeros(STATIONS, MONTHS, dtype=torch.float64)
        row[0, month] = 1.0
        rows.append(row.flatten())
    return torch.stack(rows)


@dataclass(frozen=True)
class Result:
    """The distributions and numbers that the table is made of."""

    prior: Gaussian
    posterior: Gaussian
    Phi: Tensor
    y: Tensor
    truth: Tensor
    log_evidence: Tensor
    pair: Gaussian
    given: Gaussian
    draws: Tensor


def analyse(seed: int = 0, n_draws: int = 400) -> Result:
    """Draw a field and its observations, and ask everything of the posterior."""
    generator = torch.Generator().manual_seed(seed)
    prior, Phi = field(), observed_rows()
    truth = prior.sample(generator=generator)
    noise = NOISE_SD * torch.randn(len(Phi), dtype=torch.float64, generator=generator)
    y = Phi @ truth + noise
    posterior, log_evidence = prior.condition(Phi, y, noise_precision=NOISE_SD**-2)

    # Two stations together, the others integrated out; and station 1 when all others are known.
    pair = posterior.marginal([*months_of(1), *months_of(2)])
    others = [i for i in range(STATIONS * MONTHS) if i not in months_of(1)]
    given = posterior.conditional(months_of(1), truth[others])
    draws = posterior.sample((n_draws,), generator)
    return Result(prior, posterior, Phi, y, truth, log_evidence, pair, given, draws)


def main() -> Result:
    result = analyse()
    sd_before, sd_after = (q.variance.sqrt().view(STATIONS, MONTHS) for q in (result.prior, result.posterior))
    error = (result.posterior.mean - result.truth).view(STATIONS, MONTHS)
    D, k = result.prior.event_shape[0], len(result.y)
    print(f"{D} unknowns, {k} observations, log evidence {float(result.log_evidence):.2f}\n")
    print(f"{'':26}{'sd before':>10}{'sd after':>10}{'rms error':>10}")
    averages = {f"a station of the {name}": list(stations) for name, stations in REGIONS.items()}
    for name, stations in averages.items():
        print(_line(name, sd_before[stations], sd_after[stations], error[stations]))
    print(_line("station 0, first year", sd_before[0, :12], sd_after[0, :12], error[0, :12]))
    print(_line("station 1", sd_before[1], sd_after[1], error[1]))
    print(_line("  all others known", sd_before[1], result.given.variance.sqrt(), _gap(result)))
    covariance = result.pair.covariance.to_dense()
    correlation = covariance[0, MONTHS] / (covariance[0, 0] * covariance[MONTHS, MONTHS]).sqrt()
    print(f"\ncorrelation of stations 1 and 2 in month 0: 0 before, {float(correlation):.3f} after")
    for name, stations in REGIONS.items():
        mean = result.draws.view(-1, STATIONS, MONTHS)[:, list(stations)].mean((1, 2))
        print(f"mean of the {name} over all months, {len(mean)} draws: {mean.mean():.3f} +- {mean.std():.3f}")
    return result


def _gap(result: Result) -> Tensor:
    return result.given.mean - result.truth[list(months_of(1))]


def _line(name: str, before: Tensor, after: Tensor, error: Tensor) -> str:
    def rms(t: Tensor) -> float:
        return float(t.square().mean().sqrt())

    return f"{name:26}{rms(before):10.3f}{rms(after):10.3f}{rms(error):10.3f}"


if __name__ == "__main__":
    main()
