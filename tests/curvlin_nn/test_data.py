"""What loaders yield, and how many samples that are: what was seen counts, whatever a loader says of itself."""

import math
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from network_oracle import ggn, half_squared_error
from networks import mlp
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from curvlin_nn import Laplace, marglik_training, metrics
from curvlin_nn.errors import DataError

N = 12


def data(n=N):
    torch.manual_seed(3)
    return mlp(2), torch.randn(n, 4).double(), torch.randn(n, 2).double()


class Stream(IterableDataset):
    """Without a length; several worker processes share it."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from zip(self.x[start::step], self.y[start::step], strict=True)


class Repeated(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Once:
    """Can be iterated, has no length, and says so when asked."""

    def __init__(self, x, y, size):
        self.parts = list(zip(x.split(size), y.split(size), strict=True))

    def __iter__(self):
        return iter(self.parts)


LOADERS = {
    "a list of tensors": lambda x, y: list(zip(x.split(5), y.split(5), strict=True)),
    "lists": lambda x, y: [list(pair) for pair in zip(x.split(5), y.split(5), strict=True)],
    "no length": lambda x, y: Once(x, y, 5),
    "a loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=5),
    "dropped last batch": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=5, drop_last=True),
    "one by one": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=1),
    "a stream": lambda x, y: DataLoader(Stream(x, y), batch_size=5),
    "a stream of two workers": lambda x, y: DataLoader(Stream(x, y), batch_size=5, num_workers=2),
    "two workers": lambda x, y: DataLoader(Repeated(x, y), batch_size=5, num_workers=2),
}
SEEN = {"dropped last batch": 10}


@pytest.mark.parametrize("structure", ["full", "ekfac"])
@pytest.mark.parametrize("name", LOADERS)
def test_the_count_is_what_was_seen(name, structure):
    model, x, y = data()
    la = Laplace(model, "regression", "all", structure).fit(LOADERS[name](x, y))
    n = SEEN.get(name, N)
    assert la.n_data == n
    exact = ggn(model, x[:n], y[:n], half_squared_error)
    if structure == "full":
        torch.testing.assert_close(la.curvature.to_dense(), exact, rtol=1e-10, atol=1e-12)
    else:  # has the trace of the exact matrix, of as many samples
        torch.testing.assert_close(la.curvature.diagonal().sum(), exact.trace(), rtol=1e-10, atol=0)


def test_a_weighted_sampler_counts_each_draw():
    """Of a data set of 300 it may draw 64, some of them twice: curvature is of these 64."""
    model, x, y = data(300)
    sampler = WeightedRandomSampler(torch.linspace(0, 1, 300), 64, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, y), batch_size=10, sampler=sampler)
    drawn = list(WeightedRandomSampler(sampler.weights, 64, generator=torch.Generator().manual_seed(1)))
    assert len(set(drawn)) < 64
    exact = ggn(model, x[drawn], y[drawn], half_squared_error)
    for structure in ("full", "diag", "kron"):
        sampler.generator.manual_seed(1)
        la = Laplace(model, "regression", "all", structure).fit(loader)
        assert la.n_data == 64
        if structure != "kron":
            torch.testing.assert_close(la.curvature.diagonal(), exact.diagonal(), rtol=1e-10, atol=1e-12)
            continue
        biases = [
            range(24, 30),
            range(60, 65),
            range(75, 77),
        ]  # exact in KFAC, its weights are of one scale with them
        for bias in biases:
            index = torch.tensor(bias)
            torch.testing.assert_close(
                la.curvature.diagonal()[index], exact.diagonal()[index], rtol=1e-10, atol=1e-12
            )


class Words(nn.Module):
    """Takes what a tokenizer gives, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head((self.embed(input_ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Together(Words):
    """Takes it whole."""

    def forward(self, batch):
        assert "labels" not in batch and "target" not in batch
        return super().forward(batch["input_ids"], batch["attention_mask"])


class BatchEncoding(UserDict):
    """What tokenizers of Hugging Face give."""


def words(n=6):
    torch.manual_seed(2)
    ids, mask, labels = torch.randint(7, (n, 4)), torch.ones(n, 4, dtype=torch.long), torch.randint(2, (n,))
    mask[1::2, 2:] = 0
    return ids, mask, labels


@pytest.mark.parametrize("kind", [Words, Together])
@pytest.mark.parametrize("make", [dict, BatchEncoding])
@pytest.mark.parametrize("key", ["labels", "target"])
def test_mappings_hold_their_targets_under_a_name(kind, make, key):
    torch.manual_seed(0)
    model = kind().double()
    ids, mask, labels = words()
    loader = [
        make({"input_ids": ids[s], "attention_mask": mask[s], key: labels[s]})
        for s in (slice(0, 4), slice(4, 6))
    ]
    la = Laplace(model, "classification", "all", "full", dict_key_y=key).fit(loader)
    pairs = [(BatchEncoding({"input_ids": ids, "attention_mask": mask}), labels)]
    expected = Laplace(model, "classification", "all", "full").fit(pairs)
    assert la.n_data == 6 and all(key in batch for batch in loader)
    torch.testing.assert_close(la.curvature.to_dense(), expected.curvature.to_dense(), rtol=1e-10, atol=1e-13)
    x = loader[0]
    x.pop(key)
    torch.testing.assert_close(la(x), expected(x), rtol=1e-10, atol=0)
    if kind is Words:
        triples = Laplace(model, "classification", "all", "full").fit([(ids, mask, labels)])
        torch.testing.assert_close(
            triples.curvature.to_dense(), la.curvature.to_dense(), rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("method", ["gridsearch", "cv"])
def test_every_loader_of_mappings_is_read_by_the_name_that_the_posterior_has(method):
    torch.manual_seed(0)
    model = Words().double()
    ids, mask, labels = words()
    named = [{"input_ids": ids, "attention_mask": mask, "target": labels}]
    pairs = [(BatchEncoding({"input_ids": ids, "attention_mask": mask}), labels)]
    la = Laplace(model, "classification", "all", "full", dict_key_y="target").fit(named)
    expected = Laplace(model, "classification", "all", "full").fit(pairs)
    loader = "val_loader" if method == "gridsearch" else "train_loader"
    found = la.optimize_prior_precision(method, grid_size=3, **{loader: named})
    best = expected.optimize_prior_precision(method, grid_size=3, **{loader: pairs})
    torch.testing.assert_close(found.scores, best.scores, rtol=1e-12, atol=0)
    assert metrics.evaluate(la, named) == metrics.evaluate(expected, pairs)
    other = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    assert metrics.evaluate(la, other, dict_key_y="labels") == metrics.evaluate(expected, pairs)


def test_training_by_the_evidence_reads_mappings_too():
    ids, mask, labels = words()
    found = []
    for loader, options in (
        ([{"input_ids": ids, "attention_mask": mask, "target": labels}], {"dict_key_y": "target"}),
        ([(BatchEncoding({"input_ids": ids, "attention_mask": mask}), labels)], {}),
    ):
        torch.manual_seed(0)
        found.append(marglik_training(Words().double(), loader, n_epochs=3, **options))
    assert found[0].margliks == found[1].margliks
    assert found[0].la.dict_key_y == "target"


def test_a_mapping_without_targets_says_which_names_it_has():
    model, (ids, _, labels) = Words().double(), words()
    with pytest.raises(
        DataError, match=r"a tensor under 'labels', found dict with input_ids, y; .*dict_key_y"
    ) as caught:
        Laplace(model, "classification").fit([{"input_ids": ids, "y": labels}])
    assert "\n" not in str(caught.value)


class Rewards(nn.Module):
    """The rewards of both texts of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, first, second):
        return torch.cat([self.head(torch.tanh(self.body(x))) for x in (first, second)], dim=1)


def test_preference_pairs():
    torch.manual_seed(0)
    model, first, second = Rewards().double(), torch.randn(6, 4).double(), torch.randn(6, 4).double()
    preferred = torch.randint(2, (6,))
    loader = DataLoader(TensorDataset(first, second, preferred), batch_size=4)
    la = Laplace(model, "reward_modeling", "all", "full").fit(loader)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x[:, 0], x[:, 1])

    def loss(f, y):
        d = f[0] - f[1]
        return F.binary_cross_entropy_with_logits(d, 1.0 - y.double(), reduction="sum")

    exact = ggn(Joined(), torch.stack([first, second], dim=1), preferred, loss)
    assert la.n_data == 6
    torch.testing.assert_close(la.curvature.to_dense(), exact, rtol=1e-10, atol=1e-12)


def test_weights_of_unbalanced_classes_count_from_fit_to_evidence():
    torch.manual_seed(0)
    model, x, y = mlp(3), torch.randn(9, 4).double(), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 0])
    weight = torch.tensor([0.4, 1.5, 3.0]).double()
    la = Laplace(model, nn.CrossEntropyLoss(weight), "all", "full", prior_precision=0.8)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=4))

    def loss(f, y):
        return F.cross_entropy(f, y, weight, reduction="sum")

    exact = ggn(model, x, y, loss)
    torch.testing.assert_close(la.curvature.to_dense(), exact, rtol=1e-10, atol=1e-12)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    P = exact + 0.8 * torch.eye(len(theta)).double()
    logdets = torch.logdet(P) - len(theta) * math.log(0.8)
    evidence = -loss(model(x), y) - 0.4 * theta @ theta - logdets / 2
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure", ["full", "ekfac"])
def test_a_loader_that_yields_nothing_or_only_once(structure):
    model, x, y = data()
    la = Laplace(model, "regression", "all", structure)
    with pytest.raises(DataError, match="no batch"):
        la.fit([])
    if structure == "ekfac":
        with pytest.raises(DataError, match="iterated several times"):
            la.fit(iter([(x, y)]))
    assert la._fitted is None
