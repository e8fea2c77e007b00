"""Identities that laplace-torch's own tests rely on, at tight tolerances and on two hidden layers.

Others of them stand with what they are about: additivity over data, the diagonal of the full matrix, exactness for one
sample and independence of batches in `test_structures`, densities in `test_posterior`, log-likelihoods in
`test_likelihoods`, unbiased columns in `test_columns`.
"""

from __future__ import annotations

import pytest
import torch
from network_oracle import jacobian
from networks import Problem, problem
from torch import Tensor

import curvlin_nn
from curvlin_nn import Laplace, LinkApprox

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
STRUCTURES = ["full", "kron", "diag", "ekfac"]
LIKELIHOODS = ["classification", "regression"]


def fitted(
    p: Problem, structure: str, subset_of_weights: object = "all", size: int = 3, **options
) -> Laplace:
    la = Laplace(p.model, p.likelihood, subset_of_weights, structure, prior_precision=0.7, **options)
    return la.fit(p.batches(size))


def answers(la: Laplace, x: Tensor) -> tuple[Tensor, ...]:
    """What a user sees of a posterior."""
    found = la(x)
    return (la.log_marginal_likelihood(), *(found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_functional_variances_are_products_with_the_posterior_covariance(structure, subset):
    p = problem("mlp", "regression")
    la = fitted(p, structure, subset)
    Js = jacobian(p.model, p.x_test, list(la.parameters.names))
    covariance = torch.linalg.inv(la.posterior_precision.to_dense())
    expected = torch.einsum("ncp,pq,mdq->ncmd", Js, covariance, Js)
    each = torch.stack([expected[n, :, n] for n in range(len(Js))])
    torch.testing.assert_close(la.functional_variance(Js), each, **TIGHT)
    torch.testing.assert_close(la.functional_covariance(Js), expected.reshape(15, 15), **TIGHT)
    torch.testing.assert_close(la(p.x_test)[1], each, **TIGHT)


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_blocks_of_the_joint_covariance_are_those_of_each_input(structure, kind):
    p = problem(kind, "regression")
    la = fitted(p, structure)
    mean, covariance = la(p.x_test)
    joint_mean, joint = la(p.x_test, joint=True)
    torch.testing.assert_close(joint_mean.view(5, 3), mean, **TIGHT)
    joint = joint.view(5, 3, 5, 3)
    torch.testing.assert_close(torch.stack([joint[n, :, n] for n in range(5)]), covariance, **TIGHT)
    assert float(joint[0, :, 1].norm()) > 1e-3 * float(joint[0, :, 0].norm())


@pytest.mark.parametrize("link", [link.value for link in LinkApprox])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_probabilities_sum_to_one(link, structure):
    p = problem("mlp", "classification")
    found = fitted(p, structure)(p.x_test, link_approx=link, n_samples=7)
    assert bool((found > 0).all())
    torch.testing.assert_close(found.sum(1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_posterior_depends_on_neither_batches_nor_order(structure, likelihood):
    p = problem("mlp", likelihood)
    backwards = Problem(p.model, likelihood, p.x.flip(0), p.y.flip(0), p.x_test)
    expected = answers(fitted(p, structure, size=8), p.x_test)
    for other in (fitted(p, structure, size=1), fitted(backwards, structure, size=3)):
        torch.testing.assert_close(answers(other, p.x_test), expected, **TIGHT)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_last_layer_by_any_name_is_the_last_layer(structure, likelihood):
    """Found, named, listed, or chosen by a mask."""
    p = problem("mlp", likelihood)
    expected = answers(fitted(p, structure, "last_layer"), p.x_test)
    mask = curvlin_nn.subnetwork.LastLayerSubnetMask(p.model)
    mask.select(p.batches())
    for la in (
        fitted(p, structure, "last_layer", last_layer_name="4"),
        fitted(p, structure, ["4"]),
        fitted(p, structure, mask),
        fitted(p, structure, "subnetwork", subnetwork_indices=mask.indices),
    ):
        torch.testing.assert_close(answers(la, p.x_test), expected, **TIGHT)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_a_subnetwork_of_all_parameters_is_all(structure):
    p = problem("mlp", "classification")
    everything = torch.arange(sum(q.numel() for q in p.model.parameters()))
    la = fitted(p, structure, "subnetwork", subnetwork_indices=everything)
    torch.testing.assert_close(answers(la, p.x_test), answers(fitted(p, structure), p.x_test), **TIGHT)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_function_space_is_weight_space(kind, likelihood, subset):
    """Predictions, evidence and covariances between inputs of the dual, for several outputs (E4)."""
    p = problem(kind, likelihood)
    primal, dual = fitted(p, "full", subset), fitted(p, "gp", subset)
    torch.testing.assert_close(answers(dual, p.x_test), answers(primal, p.x_test), **TIGHT)
    assert torch.equal(torch.cat(_flat(dual(p.x_test, pred_type="gp"))), torch.cat(_flat(dual(p.x_test))))
    if likelihood == "regression":
        torch.testing.assert_close(dual(p.x_test, joint=True), primal(p.x_test, joint=True), **TIGHT)


def _flat(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [t.flatten() for t in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_posterior_without_data_to_speak_of_is_the_prior(structure):
    """A prior that outweighs the data: variances are those of the network under the prior."""
    p = problem("mlp", "regression")
    la = fitted(p, structure)
    la.prior_precision = 1e12
    Js = jacobian(p.model, p.x_test)
    torch.testing.assert_close(la(p.x_test)[1] * 1e12, Js @ Js.mT, rtol=1e-8, atol=0)
    assert float(la.log_det_ratio) == pytest.approx(0, abs=1e-8)
