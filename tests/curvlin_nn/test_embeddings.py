"""Embeddings: inputs held as tokens give what one-hot vectors give, at the memory of tokens."""

from dataclasses import replace

import network_oracle as oracle
import pytest
import torch
from torch import nn

from curvlin.testing import forbid_dense
from curvlin_nn import Laplace, ParameterSpace, curvature, structures
from curvlin_nn.capture import Block, Captures, OneHot
from curvlin_nn.capture.blocks import joined, merged
from curvlin_nn.errors import UnsupportedError

SPACE = ParameterSpace(("w",), (torch.Size((5, 3)),))


class Bag(nn.Module):
    """Tokens, of which samples hold several alike, to one row of outputs; token 2 is padding."""

    def __init__(self, vocabulary=6, dim=3, n_outputs=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=2)
        self.head = nn.Linear(dim, n_outputs)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).tanh().sum(1))


@pytest.fixture
def bag():
    torch.manual_seed(0)
    return (
        Bag().double(),
        torch.tensor([[0, 0, 1, 2], [3, 4, 3, 3], [5, 2, 2, 2], [1, 1, 4, 0]]),
        torch.randn(4, 2),
    )


def written_out(captures: Captures) -> Captures:
    return replace(captures, parts=captures.blocks)


def tokens_of(n: int, seed: int) -> Captures:
    """Rows of a (5, 3) embedding by two columns at four positions, -1 for none."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, 2, 4, 3, dtype=torch.float64, generator=generator)
    index = torch.randint(-1, 5, (n, 4), generator=generator)
    return Captures(n, (Block("w", 0, left, None, transposed=True, compact=OneHot(index, 5)),))


@pytest.mark.parametrize("structure", ["full", "diag", "ekfac", "kfoc", "kron", "kron-lowrank"])
@pytest.mark.parametrize("kept", [False, True])
def test_tokens_are_unit_vectors(structure, kept):
    batches = [tokens_of(3, 1), tokens_of(2, 2)]
    if kept:
        batches = [replace(c, kept=torch.rand(c.n_samples, 4) < 0.7) for c in batches]
    found = []
    for form in (lambda c: c, written_out):
        state = structures.resolve(structure)(SPACE)
        for index in range(state.passes):
            state.begin(index)
            for batch in batches:
                state.update(form(batch))
        found.append(state.finish().to_dense())
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_states_of_tokens_and_of_vectors_merge():
    first, second = tokens_of(3, 1), tokens_of(2, 2)
    whole = structures.Kronecker(SPACE)
    for batch in (first, second):
        whole.update(batch)
    for forms in ((first, written_out(second)), (written_out(first), second)):
        states = [structures.Kronecker(SPACE) for _ in forms]
        for state, batch in zip(states, forms, strict=True):
            state.update(batch)
        states[0].merge(states[1])
        torch.testing.assert_close(
            states[0].finish().to_dense(), whole.finish().to_dense(), rtol=1e-12, atol=1e-12
        )


def test_several_uses_and_samples_stand_side_by_side():
    a, b = tokens_of(3, 1).parts[0], tokens_of(3, 2).parts[0]
    rows = a.rows() + b.rows()
    torch.testing.assert_close(merged("w", 0, [a, b]).rows(), rows)
    torch.testing.assert_close(merged("w", 0, [a, b.dense()]).rows(), rows)
    shorter = replace(b, left=b.left[:, :, :2], compact=OneHot(b.compact.index[:, :2], 5))
    (both,) = joined("w", [[a.of_samples(slice(0, 1))], [shorter.of_samples(slice(1, 2))]])
    assert both.compact is not None
    torch.testing.assert_close(both.rows(), torch.cat([a.rows()[:1], shorter.rows()[1:2]]))


def test_curvature_of_a_model_is_that_of_per_sample_autodiff(bag):
    model, x, y = bag
    J = oracle.jacobian_row_by_row(model, [(sample[None],) for sample in x])
    G = torch.einsum("ncp,ncq->pq", J, J)
    data = [(x[:3], y[:3].double()), (x[3:], y[3:].double())]
    found = {
        name: curvature(model, "regression", data, name).to_dense()
        for name in ("full", "diag", "ekfac", "kron")
    }
    torch.testing.assert_close(found["full"], G, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["diag"].diagonal(), G.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["ekfac"].trace(), G.trace(), rtol=1e-10, atol=0)
    tokens = torch.bincount(x[x != 2], minlength=6).double() / x.numel()
    with torch.no_grad():
        slope = model.head.weight[:, None, None] * (1 - model.embedding(x).tanh().square())  # (C, N, S, D)
    B = torch.einsum("cnso,cnsp->op", slope, slope)
    torch.testing.assert_close(
        found["kron"][:18, :18], torch.kron(torch.diag(tokens), B), rtol=1e-10, atol=1e-12
    )


VOCABULARY, DIM, N, LENGTH = 50_257, 8, 6, 16


def test_a_large_vocabulary_takes_the_memory_of_its_parameters():
    torch.manual_seed(0)
    model = Bag(VOCABULARY, DIM)
    x, y = torch.randint(VOCABULARY, (N, LENGTH)), torch.randint(2, (N,))
    choice = {"embedding": "diag", "*": "kron"}
    with forbid_dense(3 * VOCABULARY * DIM):
        la = Laplace(model, "classification", "all", choice).fit([(x, y)])
        la.optimize_prior_precision()
    J = oracle.jacobian_row_by_row(model, [(x[:1],)], ["embedding.weight"])[0]
    with torch.no_grad():
        p = model(x[:1]).softmax(-1)[0]
    alone = curvature(
        model, "classification", [(x[:1], y[:1])], "diag", subset_of_weights=["embedding"]
    ).diagonal()
    expected = torch.einsum("cp,cd,dp->p", J, torch.diag(p) - torch.outer(p, p), J)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    with forbid_dense(2 * N * LENGTH * VOCABULARY):  # features are written out, never a matrix of tokens
        probabilities = la(x)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(N))


def test_a_factor_of_many_tokens_is_refused_by_name():
    torch.manual_seed(0)
    model, x = Bag(VOCABULARY, 2), torch.randint(VOCABULARY, (3, 4))
    for structure in ("kron", "ekfac"):
        with pytest.raises(
            UnsupportedError, match=r"'embedding.weight' has a Kronecker factor of 50257 tokens.*'diag'"
        ):
            curvature(model, "classification", [(x, torch.zeros(3).long())], structure)
