"""A last layer: closed forms without columns or backward passes, several heads, reductions over positions."""

from __future__ import annotations

from functools import partial

import network_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, mlp, problem, state
from torch import Tensor, nn

from curvlin import KhatriRaoFeatures
from curvlin.testing import forbid_dense
from curvlin_nn import Laplace, curvature, feature_maps, likelihoods
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.structures import Diagonal, Kronecker


class Tagger(nn.Module):
    """A class for each of several positions; the head comes last."""

    def __init__(self, n_classes: int = 4) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).cumsum(1))


class Pooled(Tagger):
    """The head sees every position, and one output of them counts, or the mean."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        reductions = {
            "pick_first": lambda f: f[:, 0],
            "pick_last": lambda f: f[:, -1],
            "average": lambda f: f.mean(1),
        }
        return reductions[self.reduction](outputs)


LIKELIHOODS = {
    "plain": likelihoods.Categorical(),
    "class weights": likelihoods.Categorical(weight=torch.tensor([1.0, 0.5, 2.0, 3.0])),
    "ignored and smoothed": likelihoods.Categorical(ignore_index=-100, label_smoothing=0.1),
    "regression": likelihoods.Gaussian(),
    "correlated noise": likelihoods.Gaussian(covariance=torch.eye(4).double() + 0.3),
    "poisson": likelihoods.Poisson(),
}


def batch(likelihood: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(7, 6, 3).double()
    if likelihood in ("regression", "correlated noise"):
        return x, torch.randn(7, 6, 4).double()
    if likelihood == "poisson":
        return x, torch.randint(5, (7, 6, 4)).double()
    y = torch.randint(4, (7, 6))
    if likelihood == "ignored and smoothed":
        y[1, 2:] = -100
        y[3] = -100
    return x, y


def by_columns(space, structure):
    """The same structure, fed with columns."""
    state = structure(space)
    state.takes_output_curvature = False
    return state


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("approximation", ["expand", "reduce", "joint", "diag"])
def test_closed_forms_equal_sums_over_columns(approximation, likelihood):
    structure = {
        "expand": Kronecker,
        "reduce": partial(Kronecker, approximation="reduce"),
        "joint": partial(Kronecker, joint_bias=True),
        "diag": Diagonal,
    }[approximation]
    model, (x, y) = Tagger().double(), batch(likelihood)
    loader = list(zip(x.split(3), y.split(3), strict=True))
    family = LIKELIHOODS[likelihood]
    found = curvature(model, family, loader, structure, subset_of_weights=["head"])
    expected = curvature(
        model, family, loader, partial(by_columns, structure=structure), subset_of_weights=["head"]
    )
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_parameter_without_influence_beside_a_head_has_no_curvature(structure):
    model = Heads().double()
    model.forward = lambda x: model.first(x)
    x, y = torch.randn(6, 4).double(), torch.randint(2, (6,))
    H = curvature(
        model, "classification", [(x, y)], structure, subset_of_weights=["first", "second"]
    ).to_dense()
    assert bool((H[10:] == 0).all())
    alone = curvature(model, "classification", [(x, y)], structure, subset_of_weights=["first"]).to_dense()
    torch.testing.assert_close(H[:10, :10], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "ekfac"])
def test_curvature_of_a_head_equals_autodiff(structure):
    p = problem("mlp", "classification")
    found = curvature(
        p.model, p.likelihood, p.batches(), structure, subset_of_weights="last_layer"
    ).to_dense()
    names = ["4.weight", "4.bias"]
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy, names)
    if structure == "full":
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-14)
    if structure in ("diag", "ekfac"):
        torch.testing.assert_close(found.diagonal().sum(), exact.diagonal().sum(), rtol=1e-11, atol=0)
    if structure == "diag":
        torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=1e-11, atol=0)
    if structure == "kron":
        expected = oracle.kfac(p.model, p.x, p.y, oracle.cross_entropy)[-18:, -18:]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_curvature_of_saturated_classes_is_not_rounded_away():
    head = nn.Linear(2, 3, bias=False).double()
    head.weight.data = torch.tensor([[60.0, 0.0], [0.0, 0.0], [0.0, 1.0]]).double()
    x = torch.ones(4, 2).double()
    H = curvature(
        nn.Sequential(head), "classification", [(x, torch.zeros(4).long())], "diag", subset_of_weights="all"
    )
    others = torch.tensor([-60.0, -59.0]).double().exp()  # p of the other classes; 1 - p_0 is their sum
    expected = 4 * torch.stack([others.sum(), *others]).repeat_interleave(2)
    torch.testing.assert_close(H.diagonal(), expected, rtol=1e-10, atol=0)


def test_no_backward_pass_and_one_run_of_the_body_for_each_batch(monkeypatch):
    p = problem("mlp", "classification")
    runs = []
    p.model[0].register_forward_hook(lambda *_: runs.append(1))
    la = Laplace(p.model, p.likelihood).fit(p.batches())
    first = len(runs)
    runs.clear()
    la.fit(p.batches() + p.batches())
    assert len(runs) == first + len(p.batches())  # what is more is the check of the first batch
    la(p.x_test)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    found = la._fit.accumulated.recorder
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    features = feature_maps.JacobianMap.of(found)(p.x_test)[1]
    torch.testing.assert_close(features.to_dense(), oracle_jacobian(p.model, p.x_test))


def oracle_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """``[I (x) phi, I]``."""
    with torch.no_grad():
        phi = model[:-1](x)
    eye = torch.eye(model[-1].out_features).double()
    rows = torch.einsum("ro,ni->nroi", eye, phi).flatten(2)
    return torch.cat([rows, eye.expand(len(x), -1, -1)], dim=2)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_nothing_has_a_matrix_of_outputs_for_each_sample(structure):
    torch.manual_seed(0)
    n, n_classes, width = 40, 60, 8
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, n_classes)).double()
    x, y = torch.randn(n, 3).double(), torch.randint(n_classes, (n,))
    with forbid_dense(limit=8 * n_classes**2):
        la = Laplace(model, "classification", hessian_structure=structure).fit([(x, y)])
        found = la(x)
        la.log_marginal_likelihood()
    J = oracle_jacobian(model, x)
    C = J @ torch.linalg.inv(la.posterior_precision.to_dense()) @ J.mT
    with torch.no_grad():
        expected = oracle.probit(model(x), C.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(la._predictive().mean_and_covariance(x)[1], C, rtol=1e-9, atol=1e-12)
    joint = (
        J.flatten(0, 1)[:300] @ torch.linalg.inv(la.posterior_precision.to_dense()) @ J.flatten(0, 1)[:300].T
    )
    torch.testing.assert_close(la._predictive().joint(x[:5])[1], joint, rtol=1e-9, atol=1e-12)


def test_a_head_at_several_positions_has_the_jacobian_of_autodiff():
    model, x = Tagger().double(), batch("plain")[0]
    f, features = feature_maps.JacobianMap(model, ["head"])(x)
    J = oracle.jacobian_row_by_row(model, [(sample[None],) for sample in x], ["head.weight", "head.bias"])
    torch.testing.assert_close(features.to_dense(), J, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(f, model(x).flatten(1).detach())


@pytest.mark.parametrize("reduction", ["pick_first", "pick_last", "average"])
def test_reduced_features_are_those_of_a_model_that_reduces_first(reduction):
    torch.manual_seed(1)
    model, (x, y) = Pooled(reduction).double(), batch("plain")
    y = y[:, 0]
    before = state(model)
    la = Laplace(model, "classification", feature_reduction=reduction).fit([(x, y)])
    assert_same(before, state(model))

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = model.head

        def forward(self, phi: Tensor) -> Tensor:
            return self.head(phi)

    with torch.no_grad():
        hidden = torch.tanh(model.body(x)).cumsum(1)
    phi = {"pick_first": hidden[:, 0], "pick_last": hidden[:, -1], "average": hidden.mean(1)}[reduction]
    head = Laplace(First(), "classification", "all").fit([(phi, y)])
    torch.testing.assert_close(la.curvature.to_dense(), head.curvature.to_dense(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(la(x), head(phi), rtol=1e-11, atol=0)
    features = la._fit.accumulated.feature_map(x)[1]
    assert isinstance(features.parts[0], KhatriRaoFeatures)
    assert features.parts[0].n_positions == 1

    # Exact without a name too; only KFAC counts other inputs then.
    H = [
        curvature(model, "classification", [(x, y)], "full", subset_of_weights=["head"]).to_dense(),
        Laplace(model, "classification", hessian_structure="full", feature_reduction=reduction)
        .fit([(x, y)])
        .curvature.to_dense(),
    ]
    torch.testing.assert_close(*H, rtol=1e-11, atol=1e-13)


def test_a_reduction_that_the_model_does_not_do_is_refused():
    model, (x, y) = Pooled("pick_first").double(), batch("plain")
    la = Laplace(model, "classification", feature_reduction="pick_last")
    with pytest.raises(
        UnsupportedError, match=r"'pick_last' is not what the model does on batch 0: .*\(7, 6, 5\)"
    ):
        la.fit([(x, y[:, 0])])
    p = problem("mlp", "classification")
    with pytest.raises(UnsupportedError, match="needs the chosen parameters to be one linear layer"):
        Laplace(p.model, p.likelihood, "all", feature_reduction="average").fit(p.batches())
    la = Laplace(p.model, p.likelihood, feature_reduction="average").fit(
        p.batches()
    )  # one position: nothing to do
    torch.testing.assert_close(la(p.x_test), Laplace(p.model, p.likelihood).fit(p.batches())(p.x_test))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return torch.cat([self.first(h), self.second(h)], dim=1)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_several_heads_by_name(structure):
    model = Heads().double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 5).double()
    heads = ["first", "second"]
    la = Laplace(model, "regression", heads, structure, sigma_noise=0.5).fit([(x, y)])
    names = [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    J = oracle.jacobian(model, x, names)
    P = la.curvature.to_dense() / 0.25 + torch.eye(J.shape[2]).double()
    torch.testing.assert_close(la(x)[1], J @ torch.linalg.inv(P) @ J.mT, rtol=1e-10, atol=1e-12)
    if structure == "full":
        exact = oracle.ggn(model, x, y, oracle.half_squared_error, names)
        torch.testing.assert_close(la.curvature.to_dense(), exact, rtol=1e-11, atol=1e-13)


def test_several_heads_are_named_where_one_is_looked_for():
    model = Heads()
    with pytest.raises(UnsupportedError, match=r"as in subset_of_weights=\['first', 'second'\]"):
        Laplace(model, "regression").fit([(torch.randn(6, 3), torch.randn(6, 5))])


def test_a_named_last_layer():
    p = problem("mlp", "classification")
    named = Laplace(p.model, p.likelihood, last_layer_name="2").fit(p.batches())
    by_list = Laplace(p.model, p.likelihood, ["2"]).fit(p.batches())
    assert torch.equal(named(p.x_test), by_list(p.x_test))
    assert named.last_layer_name == "2"
    detected = Laplace(p.model, p.likelihood, "last_layer", last_layer_name="4").fit(p.batches())
    torch.testing.assert_close(detected(p.x_test), Laplace(p.model, p.likelihood).fit(p.batches())(p.x_test))


@pytest.mark.parametrize("case", ["one sample", "one output", "float32", "no bias", "frozen bias", "matmul"])
def test_edges(case):
    torch.manual_seed(0)
    model = mlp(1 if case == "one output" else 3)
    x = torch.randn(1 if case == "one sample" else 5, 4).double()
    if case == "no bias":
        model[4] = nn.Linear(5, 3, bias=False).double()
    if case == "matmul":
        model = Matmul().double()
    if case == "float32":
        model, x = model.float(), x.float()
    y = torch.randn(len(x), 1 if case == "one output" else 3).to(x)
    names = {"no bias": ["4.weight"], "frozen bias": ["4.weight"], "matmul": ["w"]}.get(case, ["4"])
    la = Laplace(model, "regression", names).fit([(x, y)])
    chosen = [n for n, _ in model.named_parameters() if n in names or n.split(".")[0] in names]
    J = oracle.jacobian(model.double(), x.double(), chosen)
    if case == "float32":
        model.float()
    P = la.posterior_precision.to_dense().double()
    rtol = 1e-5 if case == "float32" else 1e-10
    torch.testing.assert_close(
        la(x)[1].double(), J @ torch.linalg.inv(P) @ J.mT, rtol=rtol, atol=1e-7 if rtol > 1e-6 else 1e-12
    )


class Matmul(nn.Module):
    """The weight stands as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.w = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x)) @ self.w
