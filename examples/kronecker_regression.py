"""Bayesian regression of several outputs with a Kronecker prior: evidence, its gradient and predictions, exact.

    python examples/kronecker_regression.py

Shows how a posterior of one's own is written as operators. For ``y_n = W x_n + e_n`` with R outputs and K features,

    prior        vec(W) ~ N(0, (G (x) A)^-1)         G acts on the outputs, A on the features
    noise        e_n ~ N(0, Lambda^-1)               Lambda couples the errors of the outputs
    posterior    P = Lambda (x) X^T X + G (x) A      two Kronecker terms: closed

and G, the roughness in A, and Lambda are learned by the gradient of the log evidence. A step costs O(R^3 + K^3), where
the matrix of RK rows would cost O(R^3 K^3). The data are the diabetes study that scikit-learn ships: three of its
columns are explained by bumps over the range of each of the other eight. About two seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

from curvlin import Gaussian, KhatriRaoFeatures, KroneckerSum

OUTPUTS = ("progression", "body mass", "blood pressure")
N_INPUTS, N_BUMPS = 8, 10
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Data:
    """Features ``(N, K)`` and outputs ``(N, R)``, every second patient for testing."""

    X: Tensor
    Y: Tensor
    X_test: Tensor
    Y_test: Tensor


def load() -> Data:
    """Outputs, standardised, and for each of the other columns a row of bumps over its range."""
    study = load_diabetes(scaled=False)
    columns = torch.tensor(study.data, dtype=torch.float64)
    outputs = torch.cat([torch.tensor(study.target, dtype=torch.float64)[:, None], columns[:, 2:4]], 1)
    inputs = columns[:, [0, 1, 4, 5, 6, 7, 8, 9]]
    train = torch.arange(len(inputs)) % 2 == 0
    inputs, Y = ((t - t[train].mean(0)) / t[train].std(0) for t in (inputs, outputs))
    centres = torch.linspace(-3, 3, N_BUMPS, dtype=torch.float64)
    X = (-0.5 * (inputs[:, :, None] - centres).square()).exp().flatten(1)
    return Data(X[train], Y[train], X[~train], Y[~train])


@dataclass(frozen=True)
class Model:
    """The three matrices of the model."""

    G: Tensor
    A: Tensor
    Lambda: Tensor

    def posterior(self, X: Tensor, Y: Tensor) -> tuple[Gaussian, Tensor]:
        """The posterior of vec(W), and the log evidence of Y.

        evidence  (N logdet Lambda + logdet(G (x) A) - logdet P - misfit - N R log 2 pi) / 2
        misfit    |Y - X W^T|^2_Lambda + |W|^2_(G (x) A)       at the posterior mean W
        """
        N, R = Y.shape
        prior = KroneckerSum([(self.G, self.A)])
        P = (KroneckerSum([(self.Lambda, X.mT @ X)]) + prior).factor()  # asked twice below
        mean = P.solve((self.Lambda @ Y.mT @ X).flatten())
        residual = Y - X @ mean.unflatten(0, (R, -1)).mT
        misfit = (residual @ self.Lambda * residual).sum() + mean @ (prior @ mean)
        evidence = N * self.Lambda.logdet() + prior.logdet() - P.logdet() - misfit - N * R * LOG_2PI
        return Gaussian(mean, P), evidence / 2

    def predict(self, posterior: Gaussian, X: Tensor) -> Gaussian:
        """The law of the outputs at every row of X: mean ``(N, R)``, covariance ``(N, R, R)`` with noise."""
        f = posterior.push_forward(features(X, len(self.G)))
        return Gaussian.from_covariance(f.mean, f.covariance.to_dense() + self.Lambda.inverse())


def features(X: Tensor, n_outputs: int) -> KhatriRaoFeatures:
    """``W x`` as a linear map of vec(W): rows ``e_r (x) x_n``, which are not multiplied out."""
    eye = torch.eye(n_outputs, dtype=X.dtype)
    return KhatriRaoFeatures(eye[:, None].expand(len(X), -1, -1, -1), X[:, None])


# -- learning ------------------------------------------------------------------------------------------------------


def model(root: Tensor, logs: Tensor, coupled: bool) -> Model:
    """The model of the Cholesky root of Lambda, and of the logs of G's diagonal and of the roughness.

    With `coupled` False the diagonal of the root alone counts.
    """
    Lambda = root.tril() @ root.tril().mT if coupled else root.diagonal().square().diag()
    eye = torch.eye(N_BUMPS, dtype=torch.float64)
    bend = eye.diff(2, dim=0)  # second differences of neighbouring weights: zero for a straight line
    A = eye + logs[-1].exp() * bend.mT @ bend
    return Model(logs[:-1].exp().diag(), torch.block_diag(*[A] * N_INPUTS), Lambda)


def learn(data: Data, coupled: bool, steps: int = 100) -> Model:
    """The model of largest evidence, by L-BFGS on the exact gradient."""
    root = torch.eye(len(OUTPUTS), dtype=torch.float64).requires_grad_()
    logs = torch.zeros(len(OUTPUTS) + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([root, logs], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        _, evidence = model(root, logs, coupled).posterior(data.X, data.Y)
        negative = -evidence / data.Y.numel()
        negative.backward()
        return negative

    optimiser.step(loss)
    with torch.no_grad():
        return model(root, logs, coupled)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    log_evidence: float
    test_log_density: float
    rmse: list[float]


def evaluate(name: str, fitted: Model, data: Data) -> Row:
    posterior, evidence = fitted.posterior(data.X, data.Y)
    prediction = fitted.predict(posterior, data.X_test)
    rmse = (prediction.mean - data.Y_test).square().mean(0).sqrt()
    return Row(name, float(evidence), float(prediction.log_prob(data.Y_test).mean()), rmse.tolist())


def main() -> list[Row]:
    data = load()
    choices = {"errors apart": False, "errors coupled": True}
    rows = [evaluate(name, learn(data, coupled), data) for name, coupled in choices.items()]
    print(f"{'':16} {'log evidence':>12} {'test log density':>17}   RMSE of {', '.join(OUTPUTS)}")
    for row in rows:
        errors = "  ".join(f"{e:.3f}" for e in row.rmse)
        print(f"{row.name:16} {row.log_evidence:12.1f} {row.test_log_density:17.3f}   {errors}")
    return rows


if __name__ == "__main__":
    main()
