"""Another package's structure, layer rule and likelihood, found by the metadata of an installed distribution."""

import os
import subprocess
import sys
from pathlib import Path

import tomllib

PACKAGE = Path(__file__).parents[1] / "plugin_package"

SCRIPT = """
import torch
from torch import nn
from torch.func import functional_call, jacrev
from curvlin_nn import Laplace, curvature, likelihoods, structures
import sys
assert "curvlin_plugin_example" not in sys.modules, "nothing is imported before it is asked for"
assert "trace" in structures.available() and "poisson_counts" in likelihoods.available()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        from curvlin_plugin_example import scaled_linear
        return scaled_linear(torch.tanh(self.first(x)), self.weight)

torch.manual_seed(0)
model, x = Model().double(), torch.randn(7, 3).double()
y = torch.poisson(torch.ones(7, 2)).double()
parameters = {name: p.detach() for name, p in model.named_parameters()}

def by_hand(p, x):
    h = torch.tanh(x @ p["first.weight"].mT + p["first.bias"])
    return 3 * h @ p["weight"].mT

blocks = jacrev(lambda p: by_hand(p, x))(parameters)
J = torch.cat([blocks[name].reshape(7, 2, -1) for name in parameters], dim=-1)
rates = by_hand(parameters, x).exp()
H = torch.einsum("ncp,nc,ncq->pq", J, rates, J)

full = curvature(model, "poisson_counts", [(x[:3], y[:3]), (x[3:], y[3:])], "full").to_dense()
torch.testing.assert_close(full, H, rtol=1e-10, atol=1e-12)
trace = curvature(model, "poisson_counts", [(x, y)], "trace").to_dense()
torch.testing.assert_close(trace, torch.eye(len(H)).double() * H.trace() / len(H), rtol=1e-10, atol=1e-12)
la = Laplace(model, "poisson_counts", "all", "full").fit([(x, y)])
log_p = torch.distributions.Poisson(rates).log_prob(y).sum()
theta = torch.cat([p.reshape(-1) for p in parameters.values()])
expected = log_p - theta @ theta / 2 - torch.logdet(H + torch.eye(len(H)).double()) / 2
torch.testing.assert_close(la.log_marginal_likelihood(), expected, rtol=1e-10, atol=0.0)
"""


def install(site: Path) -> None:
    """What an installer writes: the module, and the metadata that pyproject.toml declares."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    name = "curvlin_plugin_example"
    (site / f"{name}.py").write_text((PACKAGE / f"{name}.py").read_text())
    info = site / f"{name}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def test_a_second_package_adds_a_structure_a_layer_rule_and_a_likelihood(tmp_path):
    install(tmp_path)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
