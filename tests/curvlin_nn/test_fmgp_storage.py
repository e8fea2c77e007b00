"""FMGP in files: what comes back answers as what was saved, and nothing else is taken for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gpytorch.kernels import Kernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from safetensors import safe_open
from torch import Tensor, nn

from curvlin_nn.errors import NotFittedError, StaleModelError, StorageError
from curvlin_nn.variational import FMGP, VaLLA

D = 3


def network(n_outputs: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, n_outputs)).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matern(nu: float = 1.5) -> Kernel:
    prior = GammaPrior(2.0, 3.0)
    return ScaleKernel(MaternKernel(nu=nu, ard_num_dims=D, lengthscale_prior=prior)) + PeriodicKernel()


def fitted(
    likelihood: str, n_outputs: int, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[FMGP, nn.Module, list[tuple[Tensor, Tensor]]]:
    model = network(n_outputs, dtype)
    x, y = normal(30, D, dtype=dtype), normal(30, n_outputs, seed=1, dtype=dtype)
    targets = y.argmax(1) if likelihood == "classification" else y
    data = [(x[:15], targets[:15]), (x[15:], targets[15:])]
    options = {"n_inducing": 6, "inducing": "random"} | options
    fm = FMGP(model, likelihood, generator=torch.Generator().manual_seed(2), **options)
    return fm.fit(data, n_steps=8, lr=0.05), model, data


PAIR = (normal(6, D, seed=3), torch.tensor([0, 1, 0, 1, 1, 0]))

CASES: dict[str, tuple[str, int, dict[str, Any], Any]] = {
    "rbf": ("regression", 2, {"sigma_noise": torch.tensor([0.3, 0.6])}, None),
    "one output": ("regression", 1, {}, None),
    "one point": ("regression", 1, {"n_inducing": 1}, None),
    "float32": ("regression", 2, {"dtype": torch.float32}, None),
    "classes": ("classification", 3, {}, None),
    "points that were given": ("regression", 2, {"inducing": PAIR, "n_inducing": None}, None),
    "a kernel that was given": ("regression", 2, {"kernel": matern()}, matern),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_posterior_back(case: str, tmp_path: Path) -> None:
    likelihood, n_outputs, options, kernel = CASES[case]
    fm, model, data = fitted(likelihood, n_outputs, **options)
    fm.save(tmp_path / "fm")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = FMGP.load(tmp_path / "fm", model, kernel=None if kernel is None else kernel())
    assert torch.equal(torch.get_rng_state(), before)
    dtype = next(model.parameters()).dtype
    x, alike = (
        normal(4, D, seed=9, dtype=dtype),
        {"rtol": 1e-6 if dtype == torch.float32 else 1e-12, "atol": 0},
    )
    if likelihood == "classification":
        torch.testing.assert_close(again(x), fm(x), **alike)
    else:
        for mine, theirs in zip(again(x, joint=True), fm(x, joint=True), strict=True):
            torch.testing.assert_close(mine, theirs, **alike)
        assert torch.equal(again.sigma_noise, fm.sigma_noise)
    assert torch.equal(again.inducing_points.inputs, fm.inducing_points.inputs)
    assert torch.equal(again.inducing_points.outputs, fm.inducing_points.outputs)
    assert str(again.history) == str(fm.history) and again.n_data == 30
    torch.testing.assert_close(again.kl_divergence, fm.kl_divergence, rtol=1e-12, atol=0)
    for name, value in fm.gp.state_dict().items():
        assert torch.equal(again.gp.state_dict()[name], value), name
    assert not any(p.requires_grad for p in again.gp.parameters())

    # A further fit begins as one of the object that was saved does.
    for one in (fm, again):
        one._generator = torch.Generator().manual_seed(6)
        one.fit(data, n_steps=2)
    torch.testing.assert_close(again.gp.points, fm.gp.points, rtol=1e-12, atol=0)
    assert torch.equal(again.gp.log_sigma, fm.gp.log_sigma)


def test_what_is_in_the_file_are_tensors_by_name(tmp_path: Path) -> None:
    fm, _, _ = fitted("classification", 3)
    fm.save(tmp_path / "fm")
    with safe_open(tmp_path / "fm", framework="pt") as file:
        assert torch.equal(file.get_tensor("gp.points"), fm.gp.points)
        raw = file.get_tensor("gp.kernel.kernels.0.raw_lengthscale")
    assert torch.equal(raw, fm.kernel.kernels[0].raw_lengthscale)


def test_a_file_of_placement_by_kmeans_is_read_without_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    fm, model, _ = fitted("regression", 1, inducing="kmeans")
    fm.save(tmp_path / "fm")

    def missing(*_: Any) -> None:
        raise ImportError

    monkeypatch.setattr("curvlin_nn.variational.inducing.import_extra", missing)
    again = FMGP.load(tmp_path / "fm", model)
    assert again.inducing == "kmeans" and again.n_inducing == 6


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (None, "kernel was of class AdditiveKernel, which no name stands for; give one like it again"),
        (RBFKernel(), "is made of RBFKernel, expected AdditiveKernel of ScaleKernel of MaternKernel of"),
        (matern(nu=2.5), "other values at the inducing points"),
        (
            ScaleKernel(MaternKernel(nu=1.5, lengthscale_prior=GammaPrior(2.0, 3.0))) + PeriodicKernel(),
            r"raw_lengthscale' of the kernel has shape \(1, 1\), expected \(1, 3\)",
        ),
        (
            ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=D)) + PeriodicKernel(),
            r"prior.concentration' of the kernel has shape None, expected \(\)",
        ),
    ],
)
def test_a_kernel_that_is_not_like_the_stored_one_is_refused(
    kernel: Kernel | None, message: str, tmp_path: Path
) -> None:
    fm, model, _ = fitted("regression", 2, kernel=matern())
    fm.save(tmp_path / "fm")
    before = copy.deepcopy(kernel)
    with pytest.raises(StorageError, match=message):
        FMGP.load(tmp_path / "fm", model, kernel=kernel)
    if kernel is not None and before is not None:
        assert str(kernel.state_dict()) == str(before.state_dict())


def test_what_does_not_fit_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match="not fitted"):
        FMGP(network(1), "regression", inducing="random").save(tmp_path / "fm")
    assert not list(tmp_path.iterdir())
    fm, model, _ = fitted("regression", 1)
    fm.save(tmp_path / "fm")
    with pytest.raises(
        StorageError, match="kernel was 'rbf', found one of class RBFKernel in its place; leave kernel out"
    ):
        FMGP.load(tmp_path / "fm", model, kernel=RBFKernel())
    with pytest.raises(StorageError, match=r"expected 'curvlin_nn\.VaLLA'"):
        VaLLA.load(tmp_path / "fm", model)
    with pytest.raises(FileNotFoundError):
        FMGP.load(tmp_path / "other", model)
    with torch.no_grad():
        model[0].weight.mul_(2)  # type: ignore[index,operator,union-attr]
    with pytest.raises(StaleModelError, match=r"0\.weight"):
        FMGP.load(tmp_path / "fm", model)
    with pytest.raises(StaleModelError, match="another model was stored"):
        FMGP.load(tmp_path / "fm", network(2))
    content = (tmp_path / "fm").read_bytes()
    (tmp_path / "fm").write_bytes(content[:-9])
    with pytest.raises(StorageError, match="no whole safetensors file"):
        FMGP.load(tmp_path / "fm", model)
