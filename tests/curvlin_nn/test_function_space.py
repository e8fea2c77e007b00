"""``hessian_structure="gp"``: the dual form equals the primal one, and a subset of the data is what it says."""

import math

import network_oracle as oracle
import pytest
import torch
from networks import Problem, Tied, problem
from torch import nn

from curvlin import BlockDiag, BlockFeatures, Woodbury
from curvlin_nn import Laplace, curvature
from curvlin_nn.data_subset import random_subset
from curvlin_nn.errors import DataError, UnsupportedError

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
PRIORS = {
    "scalar": lambda space: 0.7,
    "layerwise": lambda space: torch.linspace(0.2, 3.0, len(space.names)).double(),
    "diag": lambda space: torch.linspace(0.1, 5.0, space.size).double(),
}


def fitted(p: Problem, structure: str, **options) -> Laplace:
    sigma = 0.4 if p.likelihood == "regression" else 1.0
    la = Laplace(p.model, p.likelihood, "all", structure, sigma_noise=sigma, temperature=0.7, **options)
    return la.fit(p.batches())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_dual_equals_primal(kind, likelihood, prior):
    """Two hidden layers and more, three outputs, softmax with its whole output Hessian."""
    p = problem(kind, likelihood)
    dual, primal = fitted(p, "gp"), fitted(p, "full")
    for la in (dual, primal):
        la.prior_precision = PRIORS[prior](la.parameters)
    if likelihood == "regression":
        for options in ({}, {"joint": True}, {"diagonal_output": True}):
            torch.testing.assert_close(dual(p.x_test, **options), primal(p.x_test, **options), **TIGHT)
    else:
        torch.testing.assert_close(dual(p.x_test), primal(p.x_test), **TIGHT)
    torch.testing.assert_close(
        dual.log_marginal_likelihood(), primal.log_marginal_likelihood(), rtol=1e-9, atol=0
    )
    # Draws: the identity pushed through the sampler is a root of the covariance.
    root = dual.posterior_precision.unwhiten(torch.eye(dual.n_params).double())
    expected = torch.linalg.inv(primal.posterior_precision.to_dense())
    torch.testing.assert_close(root.mT @ root, expected, **TIGHT)


def test_it_is_the_gaussian_process_with_the_tangent_kernel():
    """``K_** - K_*X (K_XX + sigma^2 I)^-1 K_X*`` over all pairs of outputs, by dense Jacobians."""
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "all", "gp", prior_precision=0.5, sigma_noise=0.3).fit(p.batches())
    J, J_test = (oracle.jacobian(p.model, x).flatten(0, 1) for x in (p.x, p.x_test))
    K = J @ J.T / 0.5 + 0.09 * torch.eye(len(J)).double()
    cross = J_test @ J.T / 0.5
    expected = J_test @ J_test.T / 0.5 - cross @ torch.linalg.solve(K, cross.T)
    torch.testing.assert_close(la(p.x_test, "gp", joint=True)[1], expected, **TIGHT)


def test_other_priors_and_neighbours():
    """Earlier posteriors of either form as priors, and this structure for some of the layers only."""
    p = problem("mlp", "classification")
    first, rest = p.batches()[:1], p.batches()[1:]

    def second(structure: str, prior: str) -> Laplace:
        before = Laplace(p.model, "classification", "all", prior).fit(first)
        return Laplace(
            p.model, "classification", "all", structure, prior_precision=before.posterior_precision
        ).fit(rest)

    at_once = Laplace(p.model, "classification", "all", "full").fit(p.batches())
    torch.testing.assert_close(second("gp", "gp")(p.x_test), at_once(p.x_test), **TIGHT)
    for prior in ("kron", "diag"):
        torch.testing.assert_close(second("gp", prior)(p.x_test), second("full", prior)(p.x_test), **TIGHT)
    mixed = [fitted(p, {"0": structure, "2": "kron", "*": structure}) for structure in ("gp", "full")]
    torch.testing.assert_close(*(la(p.x_test) for la in mixed), **TIGHT)
    torch.testing.assert_close(*(la.log_marginal_likelihood() for la in mixed), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_saturated_classes_carry_no_information_and_are_not_taken_for_noise(scale):
    """Logits in the hundreds: output Hessians of 1e-100 and zero, next to others of one."""
    p = problem("mlp", "classification")
    with torch.no_grad():
        p.model[-1].weight.mul_(scale)
        p.model[-1].bias.mul_(scale)
    assert float(torch.softmax(p.model(p.x).detach(), -1).amax(-1).max()) == 1
    torch.testing.assert_close(fitted(p, "gp")(p.x_test), fitted(p, "full")(p.x_test), **TIGHT)


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_evidence_has_the_gradient_of_the_primal_one(structure):
    p = problem("mlp", "classification")
    gradients = []
    for la in (fitted(p, "gp"), fitted(p, "full")):
        delta = torch.as_tensor(PRIORS[structure](la.parameters)).double().requires_grad_()
        gradients.append(torch.autograd.grad(la.log_marginal_likelihood(delta), delta)[0])
    torch.testing.assert_close(*gradients, **TIGHT)


def test_the_prior_precision_is_optimised_to_the_same_maximum():
    p = problem("mlp", "classification")
    found = [fitted(p, structure).optimize_prior_precision() for structure in ("gp", "full")]
    torch.testing.assert_close(*(optimum.prior_precision for optimum in found), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prior_structure", ["layerwise", "modulewise", "diag"])
def test_a_search_over_several_precisions_is_refused_with_a_mend_that_works(prior_structure):
    p = problem("mlp", "classification")
    la = fitted(p, "gp")
    with pytest.raises(UnsupportedError, match="one block of all parameters") as refused:
        la.optimize_prior_precision(prior_structure=prior_structure)
    assert "use prior_structure='scalar', or hessian_structure='full'" in str(refused.value)
    assert all(name not in str(refused.value) for name in ("'layerwise'", "'modulewise'", "'diag'"))
    la.optimize_prior_precision(prior_structure="scalar")
    if prior_structure != "diag":  # of which there is no maximum: a coordinate has no curvature
        fitted(p, "full").optimize_prior_precision(prior_structure=prior_structure)


def test_rows_stay_factored():
    p = problem("mlp", "classification")
    H = fitted(p, "gp").posterior_precision
    assert isinstance(H, Woodbury) and isinstance(H.U, BlockFeatures) and isinstance(H.base, BlockDiag)
    assert H.U.n_samples * H.U.n_rows == 8 * 2  # C - 1 columns for each of three classes
    assert sum(t.numel() for t, _ in H.U._tensors()) < 16 * H.size / 2


def test_batches_of_other_lengths_have_zeros_more():
    """Tokens of sequences of three and of five: other numbers of rows and of positions; a tied weight."""
    torch.manual_seed(3)
    model = Tied().double()
    loader = [(torch.randint(5, (2, length)), torch.randint(5, (2, length))) for length in (3, 5, 3)]
    dual, primal = (curvature(model, "classification", loader, structure) for structure in ("gp", "full"))
    torch.testing.assert_close(dual.to_dense(), primal.to_dense(), **TIGHT)


def test_fitting_in_parts_equals_fitting_at_once_and_takes_one_pass():
    p = problem("mlp", "classification")
    batches = p.batches()
    once = Laplace(p.model, "classification", "all", "gp").fit(iter(batches))
    parts = Laplace(p.model, "classification", "all", "gp").fit(batches[:1]).fit(batches[1:], override=False)
    torch.testing.assert_close(parts(p.x_test), once(p.x_test), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        parts.log_marginal_likelihood(), once.log_marginal_likelihood(), rtol=1e-12, atol=0
    )


def test_single_precision():
    """Answers in float32 of rows that are; not worse than the primal ones beside float64."""
    p = problem("mlp", "regression")
    expected = fitted(p, "full")(p.x_test)[1]
    p.model.float()
    la = Laplace(p.model, "regression", "all", "gp", sigma_noise=0.4, temperature=0.7)
    found = la.fit([(x.float(), y.float()) for x, y in p.batches()])(p.x_test.float())[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_pred_type_gp_is_of_this_structure():
    p = problem("mlp", "classification")
    la = fitted(p, "gp")
    assert torch.equal(la(p.x_test, pred_type="gp"), la(p.x_test, pred_type="glm"))
    with pytest.raises(UnsupportedError, match="pred_type='gp' needs hessian_structure='gp'; of other str"):
        fitted(p, "kron")(p.x_test, pred_type="gp")


class Unused(nn.Module):
    """A grouped convolution, in two blocks, that large inputs do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 2, 1, groups=2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.unsqueeze(-1)
        return self.head((h if float(x.detach().abs().max()) > 10 else self.conv(h)).squeeze(-1))


def test_batches_that_cut_a_parameter_otherwise_are_refused_by_name():
    x, y = torch.randn(3, 2), torch.randint(2, (3,))
    with pytest.raises(UnsupportedError, match="hessian_structure='gp' found parameters that are cut into"):
        Laplace(Unused(), "classification", "all", "gp").fit([(x, y), (20 * x.sign(), y)])


# -- a subset of the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["gp", "kron"])
def test_a_fit_to_a_subset_is_a_fit_to_these_samples(structure):
    p = problem("mlp", "classification", n=20)
    la = Laplace(
        p.model, "classification", "all", structure, n_subset=6, generator=torch.Generator().manual_seed(4)
    ).fit(p.batches())
    chosen = random_subset(p.batches(), 6, torch.device("cpu"), torch.Generator().manual_seed(4))
    other = Laplace(p.model, "classification", "all", structure).fit(chosen)
    assert la.n_data == 6
    torch.testing.assert_close(la(p.x_test), other(p.x_test), rtol=1e-12, atol=0)
    assert torch.equal(la.log_marginal_likelihood(), other.log_marginal_likelihood())


def test_every_pair_of_samples_is_as_probable():
    """How often each pair of 7 samples is in a subset of 3, in 4,000: z-scores of 21 counts."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.arange(3.0), torch.arange(3)), (torch.arange(3.0, 7.0), torch.arange(3, 7))]
    counts, n = torch.zeros(7, 7), 4000
    for _ in range(n):
        chosen = torch.cat([y for _, y in random_subset(data, 3, torch.device("cpu"), generator)])
        assert len(chosen.unique()) == 3
        counts[chosen[:, None], chosen] += 1
    p = 3 * 2 / (7 * 6)
    pairs = counts[torch.triu_indices(7, 7, 1).unbind()]
    assert ((pairs - n * p).abs() / math.sqrt(n * p * (1 - p))).max() < 4


def test_subsets_keep_inputs_with_their_targets_and_the_default_generator_decides():
    x = torch.arange(10.0)
    batches = [({"a": x[i : i + 4], "table": torch.zeros(3)}, x[i : i + 4] + 1) for i in (0, 4, 8)]
    torch.manual_seed(0)
    first = random_subset(batches, 5, torch.device("cpu"))
    second = random_subset(batches, 5, torch.device("cpu"))
    torch.manual_seed(0)
    again = random_subset(batches, 5, torch.device("cpu"))
    for inputs, targets in first:
        assert torch.equal(inputs["a"] + 1, targets) and len(inputs["table"]) == 3
    targets = [torch.cat([y for _, y in chosen]) for chosen in (first, second, again)]
    assert len(targets[0]) == 5 and torch.equal(targets[0], targets[2])
    assert not torch.equal(targets[0], targets[1])


def test_a_subset_larger_than_the_data_is_all_of_them():
    p = problem("mlp", "classification")
    la = Laplace(p.model, "classification", "all", "gp", n_subset=1000).fit(p.batches())
    assert la.n_data == 8
    torch.testing.assert_close(la.curvature.to_dense(), fitted(p, "gp").curvature.to_dense(), **TIGHT)


def test_bad_subsets_are_refused():
    p = problem("mlp", "classification")
    with pytest.raises(ValueError, match="n_subset must be a positive integer, found 0"):
        Laplace(p.model, "classification", n_subset=0)
    with pytest.raises(DataError, match="the loader yielded no batch"):
        Laplace(p.model, "classification", n_subset=3).fit([])
