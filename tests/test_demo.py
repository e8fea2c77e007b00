"""The demo, end to end, as `make demo` runs it."""

import sys
from pathlib import Path

import pytest

PICTURES = ["entropy.png", "reliability.png", "regression.png", "spectrum.png"]


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import demo

    yield demo
    for name in ("demo", "regression", "_data", "_pictures"):
        sys.modules.pop(name, None)


def test_demo_on_digits_prints_every_method_and_draws_every_picture(demo, tmp_path, capsys):
    rows = demo.main(["--epochs", "4", "--noise", "0.2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES)
    for name in ("MAP", "last layer, full", "last layer, kron", "all, full", "all, kron", "all, diag"):
        assert f"\n{name}  " in printed
    assert "Noise of 0.5 was chosen to make MAP overconfident" in printed
    assert all(row.log_marginal_likelihood < 0 for row in rows if not row.name.startswith("MAP"))


@pytest.mark.slow
def test_demo_on_fashion_mnist_is_as_accurate_as_the_network(demo, data_dir, tmp_path, capsys):
    rows = demo.main(
        ["--data-dir", str(data_dir), "--images", "2000", "--epochs", "8", "--out", str(tmp_path)]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES)
    assert "all, full    left out" in capsys.readouterr().out
    network, *others = rows
    assert network.accuracy > 0.7
    for row in others:
        assert row.accuracy > network.accuracy - 0.02, row.name
        assert row.auroc > 0.7, row.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "anywhere", "--noise", "0.1"], "--noise is for the digits"),
        (["--images", "100"], "--images is for Fashion-MNIST"),
    ],
)
def test_demo_refuses_options_that_would_be_ignored(demo, capsys, arguments, message):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err
