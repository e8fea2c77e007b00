"""A Kalman-style sequence of low-rank updates: readings come in step by step, a wrong step is taken back.

    python examples/kalman.py

Shows sequential inference with operators. A signal is a sum of D waves with unknown amplitudes x; every step brings a
few readings ``y = Phi x + e``, ``e ~ N(0, Lambda^-1)``. `Gaussian.condition` is the update of a Kalman filter in
information form, and its log evidences add up to that of all readings at once:

    update       P' = P + Phi^T Lambda Phi              mean' = mean + P'^-1 Phi^T Lambda (y - Phi mean)
    take back    P' = P - Phi^T Lambda Phi              `downdate`, exact
    drift        x' = rho x + sqrt(1 - rho^2) xi        xi ~ N(0, P0^-1): the prior stays what it is without data

After k readings P is the diagonal prior P0 plus k columns, with drift as well. A step costs O(D k^2) and holds O(D k)
numbers, where a filter that holds its covariance needs D^2. About two seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin import Diagonal, Gaussian, Woodbury

WAVES, STEPS, READINGS = 1000, 30, 5
NOISE_SD = 0.1
RHO = 0.97  # of the drift, per step
BROKEN = 17  # the step whose readings are wrong


def prior() -> Gaussian:
    """Amplitudes of cosines and sines that fall off with frequency: a smooth signal."""
    frequency = torch.arange(WAVES, dtype=torch.float64) // 2 + 1
    return Gaussian(torch.zeros(WAVES, dtype=torch.float64), Diagonal(frequency.pow(3) / 3))


def waves(t: Tensor) -> Tensor:
    """The rows Phi of readings at times t in [0, 1]: ``(..., D)``."""
    frequency = torch.arange(1, WAVES // 2 + 1, dtype=torch.float64)
    angle = 2 * torch.pi * t[..., None] * frequency
    return torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)


@dataclass(frozen=True)
class Stream:
    """Rows ``(steps, readings, D)``, readings ``(steps, readings)``, and the amplitudes at the end."""

    Phi: Tensor
    y: Tensor
    x: Tensor


def simulate(rho: float = 1.0, broken: int | None = None, seed: int = 0) -> Stream:
    """Readings of a signal that drifts with `rho`; those of step `broken` are off by a constant."""
    generator = torch.Generator().manual_seed(seed)
    x = prior().sample(generator=generator)
    Phi = waves(torch.rand(STEPS, READINGS, dtype=torch.float64, generator=generator))
    y = NOISE_SD * torch.randn(STEPS, READINGS, dtype=torch.float64, generator=generator)
    for step in range(STEPS):
        x = rho * x + (1 - rho**2) ** 0.5 * prior().sample(generator=generator)
        y[step] += Phi[step] @ x
    if broken is not None:
        y[broken] += 3.0  # a loose contact
    return Stream(Phi, y, x)


def drifted(q: Gaussian, rho: float) -> Gaussian:
    """The law of ``rho x + sqrt(1 - rho^2) xi``.

    With ``P = P0 + U C U^T`` and ``K = U^T P0^-1 U``, the covariance ``P0^-1 - P0^-1 U (C^-1 + K)^-1 U^T P0^-1``
    becomes ``P0^-1 - rho^2 (...)``, whose inverse is ``P0 + U C' U^T`` with ``C'^-1 = (C^-1 + K) / rho^2 - K``.
    """
    P = q.precision
    if not isinstance(P, Woodbury):  # nothing seen yet
        return Gaussian(rho * q.mean, P)
    K = P.base.inv_congruence(P.U.mT)
    C = torch.eye(P.rank, dtype=torch.float64) if P.core is None else P.core
    core = ((C.inverse() + K) / rho**2 - K).inverse()
    return Gaussian(rho * q.mean, Woodbury(P.base, P.U, (core + core.mT) / 2))


def filtered(stream: Stream, rho: float = 1.0) -> tuple[Gaussian, Tensor]:
    """The posterior after all steps, and the log evidence that each step added."""
    q, gains = prior(), []
    for Phi, y in zip(stream.Phi, stream.y, strict=True):
        q, gain = (q if rho == 1.0 else drifted(q, rho)).condition(Phi, y, NOISE_SD**-2)
        gains.append(gain)
    return q, torch.stack(gains)


def without(q: Gaussian, Phi: Tensor, y: Tensor) -> Gaussian:
    """The posterior as if the readings y had never been seen."""
    P = q.precision.downdate(Phi.mT / NOISE_SD)
    return Gaussian(q.mean - P.solve(Phi.mT @ (y - Phi @ q.mean)) / NOISE_SD**2, P)


@dataclass(frozen=True)
class Static:
    """A state that stays: step by step, all at once, and with the worst step taken back."""

    stream: Stream
    sequential: Gaussian
    gains: Tensor
    batch: Gaussian
    batch_evidence: Tensor
    suspect: int
    corrected: Gaussian


@dataclass(frozen=True)
class Drifting:
    """A state that drifts: filtered as if it stayed, and as it is."""

    stream: Stream
    static: Gaussian
    static_gains: Tensor
    filtered: Gaussian
    gains: Tensor


def static() -> Static:
    stream = simulate(broken=BROKEN)
    sequential, gains = filtered(stream)
    batch, batch_evidence = prior().condition(stream.Phi.flatten(0, 1), stream.y.flatten(), NOISE_SD**-2)
    suspect = int(gains.argmin())  # the step that the earlier ones predicted worst
    corrected = without(sequential, stream.Phi[suspect], stream.y[suspect])
    return Static(stream, sequential, gains, batch, batch_evidence, suspect, corrected)


def drifting() -> Drifting:
    stream = simulate(rho=RHO)
    return Drifting(stream, *filtered(stream), *filtered(stream, RHO))


def main() -> tuple[Static, Drifting]:
    a, b = static(), drifting()
    print(f"{WAVES} amplitudes, {STEPS} steps of {READINGS} readings")
    print(f"least likely step: {a.suspect}, log evidence {float(a.gains[a.suspect]):.1f}\n")
    print(f"{'':34}{'log evidence':>14}{'rms error':>11}{'mean sd':>9}")
    _line("a state that stays", None, None, None)
    _line("  step by step", a.gains.sum(), a.sequential, a.stream)
    _line("  all at once", a.batch_evidence, a.batch, a.stream)
    _line(f"  step {a.suspect} taken back", None, a.corrected, a.stream)
    _line("a state that drifts", None, None, None)
    _line("  taken to stay", b.static_gains.sum(), b.static, b.stream)
    _line("  filtered with its drift", b.gains.sum(), b.filtered, b.stream)
    return a, b


def _line(name: str, evidence: Tensor | None, q: Gaussian | None, stream: Stream | None) -> None:
    """Errors and standard deviations of the signal on [0, 1] at the end of the stream."""
    text = f"{name:34}" + (f"{'':14}" if evidence is None else f"{float(evidence):14.4f}")
    if q is not None and stream is not None:
        grid = waves(torch.linspace(0, 1, 200, dtype=torch.float64))
        f = q.push_forward(grid)
        rms = (f.mean - grid @ stream.x).square().mean().sqrt()
        text += f"{float(rms):11.4f}{float(f.variance.sqrt().mean()):9.4f}"
    print(text.rstrip())


if __name__ == "__main__":
    main()
