"""Plots: what the artists hold is what was computed, and nothing is shown, written or left behind."""

from __future__ import annotations

import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from networks import assert_same, fitted, state

from curvlin import Diagonal, KroneckerSum
from curvlin_nn import metrics, plots
from curvlin_nn.errors import DataError, OutputError, UnsupportedError
from curvlin_nn.feature_maps import SurrogateHistory, SurrogateMap


@pytest.fixture
def bins():
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(300, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    return metrics.calibration_bins(p, torch.multinomial(p, 1, generator=generator).squeeze(-1))


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


# -- predictions -----------------------------------------------------------------------------------------------------


def test_reliability_diagram_draws_accuracy_and_the_gap_to_confidence(bins):
    ax = plots.reliability_diagram(bins)
    used = bins.count > 0
    assert 0 < int(used.sum()) < 15  # with empty bins, which are not drawn
    assert heights(ax) == bins.accuracy[used].tolist()
    assert [bar.get_x() for bar in ax.patches] == bins.edges[:-1][used].tolist()
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([1 / 15] * len(ax.patches))
    (gaps,) = ax.collections
    expected = zip(bins.confidence[used].tolist(), bins.accuracy[used].tolist(), strict=True)
    assert [segment.tolist() for segment in gaps.get_segments()] == [[[c, a], [c, c]] for c, a in expected]
    diagonal, _ = ax.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]


def test_reliability_diagram_leaves_out_small_bins(bins):
    smallest = int(bins.count[bins.count > 0].min())
    ax = plots.reliability_diagram(bins, min_count=smallest + 1)
    assert heights(ax) == bins.accuracy[bins.count > smallest].tolist()


def test_reliability_diagram_of_equal_mass_has_bars_of_their_widths():
    p = torch.tensor([0.55, 0.6, 0.8, 0.9], dtype=torch.float64)
    bins = metrics.calibration_bins(torch.stack([p, 1 - p], -1), torch.tensor([0, 1, 0, 0]), 2, adaptive=True)
    ax = plots.reliability_diagram(bins)
    assert heights(ax) == [0.5, 1]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    assert spans == [pytest.approx((0.55, 0.8)), pytest.approx((0.8, 0.9))]


def test_confidence_histogram_draws_shares(bins):
    ax = plots.confidence_histogram(bins)
    assert heights(ax) == pytest.approx((bins.count / 300).tolist())


def test_predictive_band_draws_deviations_in_the_order_of_the_inputs():
    x = torch.tensor([[2.0], [0.0], [1.0]])
    mean, variance = torch.tensor([[20.0], [0.0], [10.0]]), torch.tensor([[[4.0]], [[0.0]], [[1.0]]])
    data = (torch.tensor([[0.5], [1.5]]), torch.tensor([[3.0], [4.0]]))
    ax = plots.predictive_band(x, mean, variance, 5.0, data=data, n_deviations=3)
    line, points = ax.lines
    assert line.get_xydata().tolist() == [[0, 0], [1, 10], [2, 20]]
    assert points.get_xydata().tolist() == [[0.5, 3], [1.5, 4]]
    outer, inner = ax.collections
    for band, deviations in ((inner, [0, 1, 2]), (outer, [5**0.5, 6**0.5, 3])):
        vertices = band.get_paths()[0].vertices
        for position, deviation in enumerate(deviations):
            edges = vertices[vertices[:, 0] == position, 1]
            assert edges.min() == pytest.approx(10 * position - 3 * deviation, rel=1e-6)
            assert edges.max() == pytest.approx(10 * position + 3 * deviation, rel=1e-6)
    assert ax.get_legend_handles_labels()[1] == ["with noise", "3 s.d. of f", "mean", "data"]


def test_predictive_band_takes_noise_by_input_or_none():
    x = torch.arange(3.0)
    assert len(plots.predictive_band(x, x, x + 1).collections) == 1
    outer, _ = plots.predictive_band(x, x, x + 1, torch.tensor([0.0, 3.0, 0.0])).collections
    vertices = outer.get_paths()[0].vertices
    for position, variance in enumerate([1, 5, 3]):
        top = vertices[vertices[:, 0] == position, 1].max()
        assert top == pytest.approx(position + 2 * variance**0.5, rel=1e-6)


def test_predictive_band_refuses_what_is_no_band():
    x = torch.arange(3.0)
    with pytest.raises(
        OutputError, match=r"variance must hold a number for each of 3 inputs, found shape \(3, 3\)"
    ):
        plots.predictive_band(x, x, torch.eye(3))
    with pytest.raises(OutputError, match="must not be negative, found -1"):
        plots.predictive_band(x, x, x - 1)


def test_entropy_histograms_are_shares_of_each_side():
    inside, outside = torch.tensor([0.1, 0.1, 0.3, 0.9]), torch.tensor([0.6, 1.0 + 1e-7])
    ax = plots.entropy_histograms(inside, outside, largest=1.0, n_bins=2, labels=("a", "b"))
    assert heights(ax) == pytest.approx([0.75, 0.25, 0, 1])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_xlim() == (0, 1)
    with pytest.raises(DataError, match="no entropies outside"):
        plots.entropy_histograms(inside, torch.empty(0))
    assert heights(plots.entropy_histograms(torch.zeros(2), torch.zeros(3), n_bins=2)) == [1, 0, 1, 0]


# -- posteriors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["curvature", "posterior"])
@pytest.mark.parametrize("structure", ["kron", "diag", "block", "ekfac"])
def test_spectrum_draws_the_eigenvalues_of_each_parameter(structure, of):
    delta = torch.tensor([0.3, 2.0, 1.0, 0.1, 5.0, 0.7], dtype=torch.float64)
    la = fitted(structure, "regression", prior_precision=delta, sigma_noise=0.5)
    ax = plots.spectrum(la, of=of)
    dense = la.curvature.to_dense() / 0.25
    assert len(ax.lines) == 6
    for line, (name, span), shift in zip(ax.lines, la.parameters.spans.items(), delta, strict=True):
        expected = torch.linalg.eigvalsh(dense[span][:, span]).flip(0)
        above = int((expected > shift).sum())
        assert line.get_label() == f"{name}: {above} of {len(span)}"
        expected = expected + (shift if of == "posterior" else 0)
        drawn = torch.tensor(line.get_ydata())
        assert len(drawn) == len(span) or of == "curvature"
        torch.testing.assert_close(drawn, expected[: len(drawn)], rtol=1e-8, atol=1e-12)
        assert line.get_xdata()[0] == pytest.approx(1 / len(span))
        # What is not drawn is zero.
        assert float(expected[len(drawn) :].abs().sum()) < 1e-9
    assert ax.get_yscale() == "log"


def test_spectrum_of_one_block_is_one_line():
    la = fitted("full", prior_precision=0.3)
    ax = plots.spectrum(la)
    line, prior = ax.lines
    assert line.get_label().startswith("0.weight ... 4.bias: ")
    expected = torch.linalg.eigvalsh(la.curvature.to_dense()).flip(0)
    drawn = torch.tensor(line.get_ydata())
    torch.testing.assert_close(drawn[:16], expected[:16], rtol=1e-8, atol=0)  # 8 samples of rank 2
    assert prior.get_ydata()[0] == 0.3
    (label,) = (text.get_text() for text in ax.get_legend().get_texts())
    assert label.endswith(f": {int((expected > 0.3).sum())} of 83")


def test_spectrum_refuses_what_has_none():
    la = fitted("full", prior_precision=torch.ones(6), prior_structure="layerwise")
    assert len(plots.spectrum(la).lines) == 1  # the prior cuts through the block, so that it is not drawn
    with pytest.raises(UnsupportedError, match="of='curvature'"):
        plots.spectrum(la, of="posterior")
    with pytest.raises(UnsupportedError, match="expected one of 'curvature', 'posterior'"):
        plots.spectrum(la, of="prior")
    plots.spectrum(fitted("diag", prior_precision=Diagonal(torch.ones(83).double())))


def test_kronecker_factor_draws_the_matrix():
    H = fitted().curvature.blocks[0]
    for side, matrix in zip(("left", "right"), H.terms[0], strict=True):
        ax = plots.kronecker_factor(H, side)
        (image,) = ax.images
        torch.testing.assert_close(torch.tensor(image.get_array().data), matrix)
        bound = float(matrix.abs().max())
        assert image.get_clim() == (-bound, bound)
        assert side in ax.get_title()


def test_kronecker_factor_as_correlations_keeps_rows_of_zeros():
    left, right = torch.eye(2), torch.tensor([[4.0, 0.0, 3.0], [0.0, 0.0, 0.0], [3.0, 0.0, 9.0]])
    (image,) = plots.kronecker_factor(KroneckerSum([(left, right)]), correlation=True).images
    assert image.get_array().tolist() == [[1, 0, 0.5], [0, 0, 0], [0.5, 0, 1]]


def test_kronecker_factor_refuses_other_operators():
    with pytest.raises(UnsupportedError, match=r"found Diagonal\(83x83"):
        plots.kronecker_factor(fitted("diag").curvature)
    with pytest.raises(UnsupportedError, match="side='both'"):
        plots.kronecker_factor(fitted().curvature.blocks[0], "both")


def test_evidence_curve_is_the_evidence_and_marks_where_it_is():
    la = fitted(prior_precision=2.0)
    ax = plots.evidence_curve(la)
    point, curve = ax.lines
    x, y = curve.get_data()
    assert (min(x), max(x)) == pytest.approx((2e-3, 2e3))
    for k in (0, 17, 60):
        assert y[k] == float(la.log_marginal_likelihood(float(x[k])))
    assert point.get_xydata().tolist() == [[2.0, float(la.log_marginal_likelihood())]]
    bottom, top = ax.get_ylim()
    assert min(y[0], y[-1]) < bottom < max(y[0], y[-1]) < max(y) < top
    optimum = la.optimize_prior_precision()
    assert max(y) <= optimum.log_marginal_likelihood
    grid = torch.tensor([3.0, 1.0])
    layered = fitted(prior_precision=torch.ones(6), prior_structure="layerwise")
    (only,) = plots.evidence_curve(layered, grid).lines
    assert only.get_xdata().tolist() == [1, 3]
    with pytest.raises(ValueError, match="prior_precision must be positive and finite"):
        plots.evidence_curve(la, torch.tensor([1.0, -1.0]))


# -- all of them -----------------------------------------------------------------------------------------------------


def everything(bins, la, ax):
    t = torch.rand(5, generator=torch.Generator().manual_seed(0))
    surrogate = SurrogateMap(la.model, la.model)
    surrogate.history = SurrogateHistory("exact", 0.1, [0, 1], [0.0, 1.0], [0.0, 1.0], [0.9, 0.5], [])
    surrogate._size = 3
    return {
        "reliability_diagram": lambda: plots.reliability_diagram(bins, ax=ax),
        "confidence_histogram": lambda: plots.confidence_histogram(bins, ax=ax),
        "predictive_band": lambda: plots.predictive_band(t, t, t, 0.1, data=(t, t), ax=ax),
        "entropy_histograms": lambda: plots.entropy_histograms(t, t, ax=ax),
        "spectrum": lambda: plots.spectrum(la, ax=ax),
        "kronecker_factor": lambda: plots.kronecker_factor(la.curvature.blocks[0], ax=ax),
        "evidence_curve": lambda: plots.evidence_curve(la, ax=ax),
        "surrogate_training": lambda: plots.surrogate_training(surrogate, ax=ax),
    }


def test_plots_draw_where_they_are_told_and_leave_no_trace(bins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    la = fitted(prior_precision=torch.tensor(1.0, requires_grad=True))
    settings, before, figures = dict(matplotlib.rcParams), state(la.model), plt.get_fignums()
    assert set(everything(bins, la, None)) == set(plots.__all__)
    for name in plots.__all__:
        own = Figure().subplots()
        assert everything(bins, la, own)[name]() is own, name
        new = everything(bins, la, None)[name]()
        new.figure.canvas.draw()  # it can be drawn
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings
    assert_same(before, state(la.model))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_missing_matplotlib_names_the_extra(monkeypatch, bins):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"extra 'plots'.*pip install 'curvlin\[plots\]'"):
        plots.reliability_diagram(bins)
