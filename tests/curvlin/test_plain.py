"""Operators as plain values: every kind comes back as it was, and names in what is read run no code."""

import json

import pytest
import torch

from curvlin import Diagonal
from curvlin._plain import from_plain, to_plain
from curvlin.testing import KINDS, make_case


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_was(kind, batch):
    P = make_case(kind, size=6, batch=batch).operator
    P = P.to(torch.float32).to(torch.float64)  # remembers how accurate it is
    tensors = []
    text = json.dumps(to_plain(P), default=lambda t: tensors.append(t) or {"tensor": len(tensors) - 1})

    def read(value):
        return tensors[value["tensor"]] if value.keys() == {"tensor"} else value

    Q = from_plain(json.loads(text, object_hook=read))
    assert type(Q) is type(P) and Q._structure() == P._structure() and Q.resolution == P.resolution
    assert torch.equal(Q.to_dense(), P.to_dense())


def test_a_name_that_is_no_operator_is_refused():
    plain = to_plain(Diagonal(torch.ones(3)))
    for name in ("os.system", "builtins.object", "curvlin.precision.diagonal.Nothing"):
        with pytest.raises(TypeError, match="import the package that defines it first"):
            from_plain({**plain, "class": name})
