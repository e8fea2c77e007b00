"""The four kinds of columns, through a network: exact ones give the GGN, random ones give it on average."""

import pytest
import torch
from likelihood_cases import CASES, Case, generator, ggn, network, tensor
from torch import Tensor, nn

from curvlin.testing import forbid_dense
from curvlin.testing.guard import DenseTensorError
from curvlin_nn import Laplace, curvature
from curvlin_nn import columns as columns_module
from curvlin_nn.columns import EXACT, Columns
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.likelihoods import Bernoulli, Categorical


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(4), y.split(4), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_exact_columns_give_the_ggn_of_the_torch_loss(name):
    """Every family and weighting, on outputs of any shape, summed over batches of different sizes."""
    case = CASES[name]
    model, x, y = network(case.shape), torch.randn(6, 3).double(), case.targets(6)
    expected = ggn(case, model, x, y)
    for structure, truth in (("full", expected), ("diag", torch.diag(expected.diagonal()))):
        found = curvature(model, case.make(), batches(x, y), structure, "exact")
        torch.testing.assert_close(found.to_dense(), truth, rtol=1e-9, atol=1e-11 * float(truth.abs().max()))


def per_token(case: Case) -> nn.Module:
    """One small network at every token."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, case.shape[-1])).double()


@pytest.mark.parametrize("name", ["tokens", "tokens, smoothing", "soft bits, weight, pos_weight"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_exact_columns_give_the_ggn_of_a_model_of_tokens(name, structure, monkeypatch):
    """Where terms share all weights; one term at a time or all at once."""
    case = CASES[name]
    model, x, y = per_token(case), torch.randn(5, 2, 2).double(), case.targets(5)
    expected = ggn(case, model, x, y)
    expected = torch.diag(expected.diagonal()) if structure == "diag" else expected
    for budget in (1, 2**22):
        monkeypatch.setattr(columns_module, "COLUMN_BUDGET", budget)
        found = curvature(model, case.make(), batches(x, y), structure)
        torch.testing.assert_close(found.to_dense(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_sequences_may_be_of_another_length_in_each_batch(structure):
    """As many samples with padding whose targets are ignored give the same."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x, y = torch.randn(6, 5, 2).double(), torch.randint(4, (6, 5))
    y[3:, 3:] = -100
    padded, ragged = [(x[:3], y[:3]), (x[3:], y[3:])], [(x[:3], y[:3]), (x[3:, :3], y[3:, :3])]
    likelihood = Categorical(ignore_index=-100)
    found, expected = (curvature(model, likelihood, data, structure).to_dense() for data in (ragged, padded))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    la = Laplace(model, likelihood, "all", structure).fit(ragged[:1]).fit(ragged[1:], override=False)
    torch.testing.assert_close(la.curvature.to_dense(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["weight, smoothing", "pos_weight", "covariance", "counts"])
def test_empirical_columns_give_the_sum_of_squares_of_per_sample_gradients(name):
    case = CASES[name]
    model, x, y = network(case.shape), torch.randn(6, 3).double(), case.targets(6)
    expected = torch.zeros((), dtype=torch.float64)
    for sample, target in zip(x, y, strict=True):
        gradient = torch.autograd.grad(case.loss(model(sample[None])[0], target), list(model.parameters()))
        g = torch.cat([block.flatten() for block in gradient])
        expected = expected + torch.outer(g, g)
    found = curvature(model, case.make(), batches(x, y), "full", "empirical")
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-10, atol=1e-12)


RANDOM = [
    ("tokens", "mc", 1),
    ("tokens", "sketch", 1),
    ("tokens", "sketch", 2),
    ("tokens, smoothing", "mc", 2),
    ("soft bits, weight, pos_weight", "mc", 1),
    ("soft bits, weight, pos_weight", "sketch", 1),
    ("custom covariance", "sketch", 2),
    ("variances", "mc", 2),
]


@pytest.mark.parametrize(("name", "kind", "n_columns"), RANDOM)
def test_random_columns_are_unbiased_over_all_entries_of_the_matrix(name, kind, n_columns):
    """|z| < 4 over 200 generators for every entry: terms of a sample share all weights, and their columns.

    What is drawn for each term makes products between terms cancel; shared signs would leave them in every entry.
    """
    case = CASES[name]
    model, x, y = per_token(case), torch.randn(2, 2, 2).double(), case.targets(2)
    data, expected = [(x, y)], ggn(case, model, x, y)
    draws = torch.stack(
        [
            curvature(
                model, case.make(), data, "full", kind, n_columns=n_columns, generator=generator(seed)
            ).to_dense()
            for seed in range(200)
        ]
    )
    z = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert float(z.abs().max()) < 4
    diagonal = torch.stack(
        [
            curvature(
                model, case.make(), data, "diag", kind, n_columns=n_columns, generator=generator(seed)
            ).diagonal()
            for seed in range(3)
        ]
    )
    torch.testing.assert_close(diagonal, draws[:3].diagonal(dim1=1, dim2=2), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "name", ["labels", "weight, smoothing, ignored", "heteroscedastic", "counts", "rewards", "bits"]
)
@pytest.mark.parametrize(("kind", "n_columns"), [("mc", 3), ("sketch", 1)])
def test_random_columns_are_unbiased_for_each_family(name, kind, n_columns):
    """z-scores of every entry over 4,000 copies of two samples, which draw independently."""
    case, n = CASES[name], 4000
    f, y = case.outputs(2), case.targets(2)
    family = case.make()
    repeated = f.repeat_interleave(n, 0)
    checked = family.check(repeated, y.repeat_interleave(n, 0), "the data")
    (S,) = Columns(kind, n_columns, generator())(family, repeated, checked)
    found = torch.einsum("vnc,vnd->ncd", S, S)
    for draws, Lambda in zip(found.split(n), case.hessians(f, y), strict=True):
        deviation = draws.std(0) / n**0.5
        gap = (draws.mean(0) - Lambda).abs()
        assert bool((gap <= 4 * deviation + 1e-12 * Lambda.abs().max()).all())


@pytest.mark.parametrize("name", CASES)
def test_a_sketch_with_as_many_columns_as_rank_is_exact_for_each_term(name):
    case = CASES[name]
    f, y = case.outputs(5), case.targets(5)
    family = case.make()
    y, terms = family.check(f, y, "the data"), family.terms(f)
    rank = family.rank(terms.shape[-1])
    (S,) = Columns("sketch", rank, generator())(family, f, y)
    by_term = torch.stack([family.terms(column) for column in S])
    root = family.root(terms, y)
    assert root.shape[-1] == rank
    weights = family.weights(terms, y)
    expected = root @ root.mT if weights is None else weights[..., None, None] * (root @ root.mT)
    found = torch.einsum("vnre,vnrg->nreg", by_term, by_term)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_the_product_with_the_root_of_a_softmax_needs_no_root(scale):
    """Where classes saturate too: to rounding in the size of what is added."""
    family = Categorical()
    terms, Q = scale * torch.randn(4, 3, 9).double(), torch.randn(4, 3, 8, 5).double()
    root = family.root(terms, terms)
    found = family.root_product(terms, terms, Q)
    assert bool(((found - root @ Q).abs() <= 1e-14 * (root.abs() @ Q.abs()) + 1e-300).all())


def test_draws_of_one_term_are_evenly_spread():
    """Each class is drawn the nearest whole number of times on either side of n p."""
    n, f = 13, torch.randn(40, 2, 5).double()
    p = torch.softmax(f, -1)
    labels = Categorical().draw(f, f, n, generator())
    counts = torch.nn.functional.one_hot(labels, 5).sum(0)
    assert bool(((counts - n * p).abs() < 2).all())  # a class is an interval: one more or less at either end
    cumulative = counts.cumsum(-1) - n * p.cumsum(-1)
    assert bool((cumulative.abs() < 1).all())
    ones = Bernoulli().draw(f[..., :1], f, n, generator())[..., 1].sum(0)
    assert bool(((ones - n * torch.sigmoid(f[..., 0])).abs() < 1).all())


@pytest.mark.parametrize("kind", ["mc", "sketch", "empirical"])
def test_many_classes_and_tokens_need_no_root(kind):
    """512 classes at 128 tokens: nothing near the 67 million entries of the roots is made."""
    f, y = torch.randn(2, 128, 512), torch.randint(512, (2, 128))
    family = Categorical(label_smoothing=0.1)
    y = family.check(f, y, "the data")
    with forbid_dense(4 * f.numel()):
        (found,) = Columns(kind, 1, generator())(family, f, y)
    assert found.shape == (1, *f.shape)
    with pytest.raises(DenseTensorError), forbid_dense(4 * f.numel()):
        family.root(f, y)


@pytest.mark.parametrize("kind", ["mc", "sketch"])
def test_generators_are_obeyed_and_the_default_one_is_used(kind):
    family, f = Categorical(), torch.randn(6, 2, 3)
    y = family.check(f, torch.zeros(6, 2).long(), "the data")

    def drawn(source: torch.Generator | None) -> Tensor:
        return torch.cat(list(Columns(kind, 2, source)(family, f, y)))

    before = torch.get_rng_state()
    assert torch.equal(drawn(generator(1)), drawn(generator(1)))
    assert not torch.equal(drawn(generator(1)), drawn(generator(2)))
    assert torch.equal(before, torch.get_rng_state())
    first = drawn(None)
    torch.set_rng_state(before)
    assert torch.equal(first, drawn(None))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            ("nonsense",),
            UnsupportedError,
            "columns='nonsense' is not supported; expected one of 'exact', 'mc'",
        ),
        (
            ("exact", 2),
            UnsupportedError,
            "n_columns=2 is not supported for columns='exact', whose number is fixed",
        ),
        (("empirical", 3), UnsupportedError, "n_columns=3 is not supported for columns='empirical'"),
        (("mc", 0), ValueError, "n_columns must be a positive integer, found 0"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Columns(*options)


@pytest.mark.parametrize(("family", "rank"), [(Categorical(), 2), (Bernoulli(), 1)])
def test_a_sketch_has_at_most_as_many_columns_as_rank(family, rank):
    f = torch.zeros(2, 3)
    y = family.check(f, torch.zeros(2).long() if rank == 2 else f, "the data")
    with pytest.raises(
        UnsupportedError, match=f"n_columns must be at most the rank {rank} of the output curvature"
    ):
        list(Columns("sketch", rank + 1)(family, f, y))


def test_samples_without_any_term_contribute_nothing():
    """A sample of padding only; its columns are there, and zero."""
    family, f = Categorical(ignore_index=0), torch.randn(2, 2, 3)
    y = family.check(f, torch.tensor([[0, 0], [1, 2]]), "the data")
    for kind in (EXACT, Columns("mc", 2), Columns("sketch"), Columns("empirical")):
        found = torch.cat(list(kind(family, f, y)))
        assert not found[:, 0].any()
        assert found[:, 1].any()
    nothing = family.check(f, torch.zeros(2, 2).long(), "the data")
    assert torch.equal(family.statistics(f, nothing), tensor(0.0))
