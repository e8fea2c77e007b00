"""curvlinops as a referee of products, and as a source of them."""

import itertools

import pytest
import torch
from networks import problem
from torch import nn

from curvlin import Isotropic
from curvlin_nn import from_linear_operator, matrix_free

curvlinops = pytest.importorskip(
    "curvlinops", reason="curvlinops (curvlinops-for-pytorch) is not installed; it is a referee only"
)

LOSSES = {"classification": nn.CrossEntropyLoss, "regression": nn.MSELoss}
OPERATORS = {"ggn": "GGNLinearOperator", "hessian": "HessianLinearOperator", "ef": "EFLinearOperator"}
# A sum of squares is twice the negative log-likelihood, and its gradients twice as long: four times for "ef".
SCALES = {("regression", "ggn"): 2, ("regression", "hessian"): 2, ("regression", "ef"): 4}


def referee(p, kind: str):
    loss = LOSSES[p.likelihood](reduction="sum")
    parameters = [t for t in p.model.parameters() if t.requires_grad]
    return getattr(curvlinops, OPERATORS[kind])(p.model, loss, parameters, p.batches(4))


@pytest.mark.parametrize(("likelihood", "kind"), list(itertools.product(LOSSES, OPERATORS)))
def test_products_are_those_of_curvlinops(likelihood, kind):
    p = problem("mlp", likelihood)
    columns = "empirical" if kind == "ef" else "exact"
    H = matrix_free(
        p.model, likelihood, p.batches(4), columns, kind="hessian" if kind == "hessian" else "ggn"
    )
    X = torch.randn(H.size, 3).double()
    expected = referee(p, kind) @ X / SCALES.get((likelihood, kind), 1)
    assert float((H @ X - expected).norm() / expected.norm()) < 1e-10


def test_an_operator_of_curvlinops_is_solved_with():
    p = problem("mlp", "classification")
    like = torch.empty(0, dtype=torch.float64)
    theirs = from_linear_operator(referee(p, "ggn"), like)
    prior = Isotropic(torch.tensor(0.5, dtype=torch.float64), theirs.size)
    ours = matrix_free(p.model, "classification", p.batches(4))
    b = torch.randn(theirs.size).double()
    x = (theirs + prior).solve(b, rtol=1e-12).require()
    expected = (ours + prior).solve(b, rtol=1e-12).require()
    assert float((x - expected).norm() / expected.norm()) < 1e-9
