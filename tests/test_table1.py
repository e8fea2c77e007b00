"""`benchmarks/table1`: its columns against direct formulas, what it keeps and computes again, and what it writes."""

import csv
import gzip
import importlib
import io
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
try:
    outputs, page, problem, record, report, run, scores, worker = (
        importlib.import_module(f"table1.{name}")
        for name in ("outputs", "page", "problem", "record", "report", "run", "scores", "worker")
    )
finally:
    sys.path.pop(0)

pytest.importorskip("sklearn")


def random_covariances(n, c, generator):
    root = torch.randn(n, c, c, dtype=torch.float64, generator=generator)
    return root @ root.mT + 0.1 * torch.eye(c, dtype=torch.float64)


# -- logits -----------------------------------------------------------------------------------------------------------


def test_draws_have_the_covariance_and_not_that_of_the_other_triangle(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 4, dtype=torch.float64, generator=generator)
    V = random_covariances(1, 4, generator)
    monkeypatch.setattr(outputs, "_log_mean_softmax", lambda draws: draws.movedim(0, 1))
    eye = torch.eye(4, dtype=torch.float64).expand(1, 4, 4)
    white = outputs.GaussianLogits(torch.zeros_like(mean), eye).log_probabilities()[0]
    drawn = outputs.GaussianLogits(mean, V).log_probabilities()[0]
    assert len(white) == 2048
    root = torch.linalg.lstsq(white, drawn - mean).solution.mT  # the linear map from noise to draws
    assert torch.allclose(root @ root.mT, V[0], rtol=1e-10, atol=1e-10)
    L = torch.linalg.cholesky(V[0])
    assert not torch.allclose(L.mT @ L, V[0], rtol=1e-2)
    white = outputs.GaussianLogits(torch.zeros_like(mean), eye).log_probabilities_as_published()[0]
    drawn = outputs.GaussianLogits(mean, V).log_probabilities_as_published()[0]
    root = torch.linalg.lstsq(white, drawn - mean).solution.mT
    assert torch.allclose(root, L.mT, rtol=1e-10, atol=1e-10)  # the script's is of the other one


def test_mean_softmax_of_gaussian_logits_against_quadrature():
    mean = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    V = torch.tensor([[[4.0, 1.5], [1.5, 1.0]]], dtype=torch.float64)
    spread = math.sqrt(4 + 1 - 2 * 1.5)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    values = 1 / (1 + np.exp(-(1.5 + spread * nodes)))
    expected = float((weights * values).sum() / weights.sum())
    deviation = math.sqrt(float((weights * (values - expected) ** 2).sum() / weights.sum()) / 2048)
    found = float(outputs.GaussianLogits(mean, V).log_probabilities()[0, 0].exp())
    assert abs(found - expected) < 4 * deviation
    assert outputs.GaussianLogits(mean, V).log_probabilities()[0, 0].exp() == found  # the same draws again


def test_log_determinants_against_slogdet_and_of_singular_covariances():
    V = random_covariances(5, 3, torch.Generator().manual_seed(1))
    found = outputs.GaussianLogits(torch.zeros(5, 3), V).log_determinants()
    assert torch.allclose(found, torch.linalg.slogdet(V).logabsdet, rtol=1e-10)
    singular = outputs.GaussianLogits(torch.zeros(2, 3), torch.stack([torch.ones(3, 3), torch.zeros(3, 3)]))
    assert torch.isfinite(singular.log_determinants()).all()
    assert outputs.CertainLogits(torch.zeros(2, 3)).log_determinants() is None


def test_probabilities_of_drawn_logits_do_not_underflow():
    draws = torch.tensor([[[0.0, -500.0]], [[0.0, -600.0]]])
    found = outputs.DrawnLogits(draws).log_probabilities()[0, 1]
    assert float(found) == pytest.approx(-500 - math.log(2), rel=1e-6)


# -- columns ----------------------------------------------------------------------------------------------------------


def pairs(inside, outside):
    """AUROC by counting pairs."""
    d = outside[None, :] - inside[:, None]
    return float((d > 0).double().mean() + 0.5 * (d == 0).double().mean())


def entropies(p):
    return -(p * p.log()).sum(-1)


@pytest.mark.parametrize("n_softmax", [1, 2])
def test_columns_against_direct_formulas(n_softmax):
    generator = torch.Generator().manual_seed(2)
    logits = {
        name: 3 * torch.randn(40, 4, dtype=torch.float64, generator=generator)
        for name in ("test", "kmnist", "mnist")
    }
    determinants = {
        name: torch.randn(40, dtype=torch.float64, generator=generator) + k for k, name in enumerate(logits)
    }
    y = torch.randint(4, (40,), generator=generator)
    predicted = {name: scores.Predicted(f.log_softmax(-1), determinants[name]) for name, f in logits.items()}
    outside = {name: predicted[name] for name in ("kmnist", "mnist")}
    found = scores.scores(predicted["test"], y, outside, n_softmax)
    p = {name: f.softmax(-1) for name, f in logits.items()}
    twice = {name: q.softmax(-1) if n_softmax == 2 else q for name, q in p.items()}
    hit = p["test"].argmax(-1) == y
    confidence = p["test"].amax(-1)
    bin_of = (confidence * 15).ceil().long() - 1
    ece = sum(
        abs(float(hit[bin_of == b].double().sum() - confidence[bin_of == b].sum())) / 40 for b in range(15)
    )
    truth = torch.eye(4, dtype=torch.float64)[y]
    expected = {
        "ACC": 100 * float(hit.double().mean()),
        "NLL": float(-p["test"][range(40), y].log().mean()),
        "ECE": ece,
        "Brier": float((p["test"] - truth).square().sum(-1).mean()),
    }
    for name in ("kmnist", "mnist"):
        expected[f"AUC {name}"] = pairs(entropies(p["test"]), entropies(p[name]))
        expected[f"AUC {name}, as published"] = pairs(entropies(twice["test"]), entropies(twice[name]))
        expected[f"Gaussian AUC {name}"] = pairs(determinants["test"], determinants[name])
    assert found == pytest.approx(expected, rel=1e-10)
    single, second = found["AUC kmnist"], found["AUC kmnist, as published"]
    assert (single != second) == (n_softmax == 2)  # the convention matters here


def test_a_method_without_covariance_has_no_gaussian_column():
    of = scores.Predicted(torch.randn(20, 3, dtype=torch.float64).log_softmax(-1), None)
    y = torch.arange(20) % 3
    assert scores.scores(of, y, {"kmnist": of}, 1)["Gaussian AUC kmnist"] is None
    assert "Gaussian entropy" not in scores.histograms({"test": of})


def test_paired_difference_has_the_error_of_differences():
    a, b = torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.tensor([0.0, 1.0, 3.0, 5.0])
    found = scores.difference(a.double(), b.double())
    assert found["mean"] == pytest.approx(0.75)
    assert found["standard error"] == pytest.approx(0.5 / 2)


def test_histograms_hold_every_image():
    of = {name: scores.Predicted(torch.randn(30, 5).log_softmax(-1), torch.randn(30)) for name in ("a", "b")}
    for histogram in scores.histograms(of).values():
        assert {sum(counts) for counts in histogram["counts"].values()} == {30}


# -- files ------------------------------------------------------------------------------------------------------------


def task(row, seed=0):
    return record.Task(row, "ours", seed, False, 1.0, "data", "cache")


def result(row, seed, **changed):
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, row)))
    values = torch.rand(20, dtype=torch.float64, generator=generator).tolist()
    names = ["ACC", "NLL", "ECE", "Brier"]
    for data in ("kmnist", "mnist"):
        names += [f"AUC {data}", f"AUC {data}, as published", f"Gaussian AUC {data}"]
    counts = {"edges": [0.0, 1.0, 2.0], "counts": {"test": [3, 1], "kmnist": [1, 3], "mnist": [2, 2]}}
    return {
        "row": row,
        "protocol": "ours",
        "quick": False,
        "seed": seed,
        "scores": dict(zip(names, values, strict=False)) | changed,
        "NLL minus MAP": {"mean": values[10] - 0.5, "standard error": values[11]},
        "seconds": {"fit": 100 * values[12], "predict 10,000": 10 * values[13]},
        "peak memory, MiB": 1000 * values[14],
        "options": {"seconds": 1.0, "prior precision": 100 * values[15]},
        "versions": {},
        "histograms": {"entropy": counts, "Gaussian entropy": counts},
    }


class Recording:
    """Does nothing but to write a result, and knows what it was asked for."""

    def __init__(self, failing=()):
        self.failing, self.done = failing, []

    def __call__(self, task, path):
        self.done.append(task.row)
        if task.row in self.failing:
            raise RuntimeError("exit code 1\nout of luck")
        path.write_text(json.dumps(result(task.row, task.seed)))


def test_a_second_run_computes_nothing(tmp_path):
    tasks = [task("MAP"), task("LLA"), task("MAP", 1)]
    first, second = Recording(), Recording()
    assert record.complete(tasks, tmp_path, 2, first, lambda _: None) == []
    assert sorted(first.done) == ["LLA", "MAP", "MAP"]
    assert record.complete(tasks, tmp_path, 2, second, lambda _: None) == []
    assert second.done == []
    assert len(record.results(tmp_path, "ours", False)) == 3
    assert record.results(tmp_path, "published", False) == []


def test_a_truncated_file_is_computed_again(tmp_path):
    tasks = [task("MAP"), task("LLA")]
    record.complete(tasks, tmp_path, 1, Recording(), lambda _: None)
    path = tmp_path / "ours-seed0-lla.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert [r["row"] for r in record.results(tmp_path, "ours", False)] == ["MAP"]
    again = Recording()
    record.complete(tasks, tmp_path, 1, again, lambda _: None)
    assert again.done == ["LLA"]
    assert path.read_text() == whole


def test_a_row_that_fails_is_reported_and_others_go_on(tmp_path):
    tasks, said = [task("MAP"), task("LLA"), task("ELLA")], []
    failed = record.complete(tasks, tmp_path, 1, Recording(failing=("LLA",)), said.append)
    assert [t.row for t in failed] == ["LLA"]
    assert [r["row"] for r in record.results(tmp_path, "ours", False)] == ["ELLA", "MAP"]
    complaint = tmp_path / "ours-seed0-lla.error.txt"
    assert "out of luck" in complaint.read_text()
    assert any("LLA" in line and "out of luck" in line for line in said)
    record.complete(tasks, tmp_path, 1, Recording(), said.append)
    assert not complaint.exists()


def test_the_end_of_what_a_failing_worker_says_is_kept(tmp_path, monkeypatch):
    worker_file = tmp_path / "worker.py"
    worker_file.write_text("import sys; sys.exit('no ' + sys.argv[2])")
    monkeypatch.setattr(record, "WORKER", worker_file)
    with pytest.raises(RuntimeError, match=r"exit code 1\nno .*file\.json"):
        record.in_subprocess(task("MAP"), tmp_path / "file.json")
    worker_file.write_text("pass")
    said = []
    assert record.complete([task("MAP")], tmp_path, 1, say=said.append) == [task("MAP")]
    assert "no result" in said[0]


def test_the_exit_code_tells_of_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "OUT", tmp_path / "out")
    arguments = ["--data-dir", "data", "--results", str(tmp_path / "r"), "--rows", "MAP", "LLLA"]
    assert run.main(arguments, Recording(failing=("network",))) == 1
    assert run.main(arguments, Recording(failing=("LLLA",))) == 1
    assert run.main(arguments, Recording()) == 0
    nothing = Recording()
    assert run.main(arguments, nothing) == 0
    assert nothing.done == []
    assert "| MAP |" in capsys.readouterr().out


# -- what is written --------------------------------------------------------------------------------------------------


def cells(table, row):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_of_the_page_are_those_of_the_files(tmp_path):
    pytest.importorskip("matplotlib")
    rows = tmp_path / "table1" / "rows"
    tasks = [task(row, seed) for row in ("MAP", "LLA", "ScaLLA") for seed in (0, 1, 2)]
    record.complete(tasks, rows, 1, Recording(), lambda _: None)
    text = page.written(tmp_path / "table1", False)
    written = (tmp_path / "table1.md").read_text()
    assert text in written
    found = [json.loads(path.read_text()) for path in rows.glob("*lla.json")]
    lla = [r for r in found if r["row"] == "LLA"]
    acc = np.array([r["scores"]["ACC"] for r in lla])
    expected = f"{acc.mean():.2f} ± {acc.std(ddof=1) / math.sqrt(3):.2f}"
    main = written[written.index("NLL - MAP |") :]
    assert cells(main[: main.index("###")], "LLA")[1] == expected
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table1" / "ours.csv").read_text())))
    assert len(lines) == 9
    for r in found:
        (line,) = [e for e in lines if (e["method"], int(e["seed"])) == (r["row"], r["seed"])]
        assert {name: float(line[name]) for name in r["scores"]} == r["scores"]
    for picture in (tmp_path / "table1").glob("*.png"):
        assert f"(table1/{picture.name})" in written


def test_the_claim_is_of_pairs_and_needs_every_part():
    network = [result("MAP", seed, ECE=0.01, **{"AUC kmnist": 0.7 + 0.1 * seed}) for seed in (0, 1)]
    good = {"ECE": 0.015, "Gaussian AUC kmnist": 0.985}
    method = [result("LLA", seed, **good, **{"AUC kmnist": 0.74 + 0.1 * seed}) for seed in (0, 1)]
    for r in method:
        r["NLL minus MAP"]["mean"] = -0.001
    found = cells(report.claim_table({"MAP": network, "LLA": method}), "LLA")
    values = ["0.985 ± 0.000", "0.040 ± 0.000", "-0.00100 ± 0.00000", "0.0050 ± 0.0000"]
    assert found == ["LLA", *(f"{value} yes" for value in values), "**yes**"]
    method[1]["scores"]["Gaussian AUC kmnist"] = 0.9
    found = cells(report.claim_table({"MAP": network, "LLA": method}), "LLA")
    assert found[1].endswith("no") and found[-1] == "no"


def test_the_paper_is_compared_with_by_the_conventions_of_its_script():
    r = result("LLLA", 1, **{"NLL, as published": 0.2714, "AUC kmnist, as published": 0.8, "AUC kmnist": 0.9})
    found = cells(report.comparison_table({"LLLA": [r]}), "LLLA")
    assert found[3:5] == ["0.2714", "0.2714"]
    assert found[5] == f"{r['scores']['ECE']:.4f}"  # nothing else is known of it
    assert found[7] == "0.800"
    off = cells(report.tolerance_table({"LLLA": [r]}), "LLLA")
    assert off[2] == "-0.0000 (within 0.01)" and off[4].startswith("-0.0415")


def test_one_seed_has_no_error():
    assert report.Value.of([0.25]).shown(2) == "0.25"


# -- the whole, on images that hold nothing ---------------------------------------------------------------------------


def write_images(folder, part, n, generator):
    folder.mkdir(exist_ok=True)
    pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=generator).numpy()
    labels = (torch.arange(n) % 10).to(torch.uint8).numpy()
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, values.ndim]) + b"".join(k.to_bytes(4, "big") for k in values.shape)
        with gzip.open(folder / f"{part}-{name}-ubyte.gz", "wb") as file:
            file.write(header + values.tobytes())


@pytest.fixture
def data_dir(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("fashion-mnist", "mnist", "kmnist"):
        for part in ("train", "t10k"):
            write_images(tmp_path / name, part, 60, generator)
    return tmp_path


@pytest.mark.parametrize("protocol", ["ours", "published"])
def test_rows_from_images_to_files(data_dir, tmp_path, monkeypatch, protocol):
    monkeypatch.setattr(problem, "FULL", problem.Size(1, None, None, 20, 40, 1.0))

    def execute(task, path):
        path.write_text(json.dumps(worker.evaluated(asdict(task))))

    tasks = [
        record.Task(row, protocol, 1, False, 1.0, str(data_dir), str(tmp_path / "cache"))
        for row in ("MAP", "LLLA")
    ]
    assert record.complete(tasks, tmp_path / "rows", 1, execute, print) == []
    found = {r["row"]: r for r in record.results(tmp_path / "rows", protocol, False)}
    n_train = 60 if protocol == "published" else 40
    assert (tmp_path / "cache" / f"map-{n_train}-seed1.pt").exists()
    assert found["MAP"]["NLL minus MAP"]["mean"] == 0
    assert found["MAP"]["scores"]["Gaussian AUC kmnist"] is None
    scored = {name: r["scores"]["NLL"] for name, r in found.items()}
    assert found["LLLA"]["NLL minus MAP"]["mean"] == pytest.approx(scored["LLLA"] - scored["MAP"])
    assert found["LLLA"]["options"]["prior precision"] > 0
    drawn = {name: report.as_published("NLL")(r) for name, r in found.items()}
    assert drawn["MAP"] == scored["MAP"]
    assert (drawn["LLLA"] != scored["LLLA"]) == (protocol == "published")
    assert sum(found["LLLA"]["histograms"]["entropy"]["counts"]["mnist"]) == 60
