"""metrics.py against scikit-learn, and against plain loops where scikit-learn has no word."""

import doctest
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import metrics
from conftest import ROOT

CASES = settings(max_examples=500, deadline=None)
AVERAGES = ("micro", "macro", "weighted", "samples", None)


@pytest.fixture(autouse=True)
def quiet_oracle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@st.composite
def problems(draw, unknown=False, min_classes=1):
    """(targets, scores) with ties, constant columns, empty classes, one row, all positive, all negative."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(min_classes, 4)))
    values = [0.0, 1.0, np.nan] if unknown else [0.0, 1.0]
    targets = draw(arrays(np.float64, shape, elements=st.sampled_from(draw(st.sampled_from([values, [1.0], [0.0]])))))
    few = st.sampled_from([0.0, 0.25, 0.5, 0.5000001, 1.0])
    return targets, draw(arrays(np.float64, shape, elements=draw(st.sampled_from([few, st.floats(-3, 3)]))))


def columns(targets, *others):
    """The known part of each column."""
    for c in range(targets.shape[1]):
        known = ~np.isnan(targets[:, c])
        yield targets[known, c], *(other[known, c] for other in others)


@CASES
@given(problems(min_classes=2))
def test_prediction_metrics_agree_with_scikit_learn(problem):
    targets, scores = problem
    predictions = scores >= 0.5
    truth = targets.astype(int)
    assert metrics.hamming_loss(targets, predictions) == pytest.approx(sk.hamming_loss(truth, predictions), abs=1e-12)
    assert metrics.subset_accuracy(targets, predictions) == pytest.approx(
        sk.accuracy_score(truth, predictions), abs=1e-12
    )
    for average in AVERAGES:
        expected = sk.precision_recall_fscore_support(truth, predictions.astype(int), average=average, zero_division=0)
        np.testing.assert_allclose(
            metrics.precision_recall_f1(targets, predictions, average), expected[:3], rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(
            metrics.f1_score(targets, predictions, average), expected[2], rtol=0, atol=1e-12
        )


@CASES
@given(problems(min_classes=2))
def test_ranking_metrics_agree_with_scikit_learn(problem):
    targets, scores = problem
    truth = targets.astype(int)
    for average in ("micro", "macro", "weighted", None):
        if average != "weighted" or truth.any():
            np.testing.assert_allclose(
                metrics.average_precision(targets, scores, average),
                sk.average_precision_score(truth, scores, average=average), rtol=0, atol=1e-12,
            )
            np.testing.assert_allclose(
                metrics.roc_auc(targets, scores, average), sk.roc_auc_score(truth, scores, average=average),
                rtol=0, atol=1e-12,
            )


@CASES
@given(problems(unknown=True))
def test_columns_with_unknown_labels_agree_with_scikit_learn_on_the_known_ones(problem):
    targets, scores = problem
    predictions = scores >= 0.5
    per_class = np.array(metrics.precision_recall_f1(targets, predictions, None)).T
    precision, auc = metrics.average_precision(targets, scores, None), metrics.roc_auc(targets, scores, None)
    for c, (truth, score, predicted) in enumerate(columns(targets, scores, predictions)):
        if len(truth) == 0:
            assert list(per_class[c]) == [0, 0, 0] and precision[c] == 0 and np.isnan(auc[c])
            continue
        expected = sk.precision_recall_fscore_support(truth, predicted, average="binary", zero_division=0)
        np.testing.assert_allclose(per_class[c], expected[:3], rtol=0, atol=1e-12)
        assert precision[c] == pytest.approx(sk.average_precision_score(truth, score), abs=1e-12)
        assert auc[c] == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-12, nan_ok=True)
        for ours, theirs in zip(
            metrics.precision_recall_curve(targets[:, c], scores[:, c]), sk.precision_recall_curve(truth, score)
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    support = (targets == 1).sum(axis=0)
    assert metrics.f1_score(targets, predictions, "macro") == pytest.approx(per_class[:, 2].mean(), abs=1e-12)
    if support.any():
        weighted = np.average(per_class[:, 2], weights=support)
        assert metrics.f1_score(targets, predictions, "weighted") == pytest.approx(weighted, abs=1e-12)


@CASES
@given(problems(unknown=True))
def test_row_wise_and_pooled_metrics_agree_with_a_loop_over_the_known_labels(problem):
    targets, scores = problem
    predictions = scores >= 0.5
    rows = []  # (wrong, known, F1) of each row with a known label
    for truth, predicted in zip(targets, predictions):
        pairs = [(int(t == 1), int(p)) for t, p in zip(truth, predicted) if t == t]
        both, either = sum(t * p for t, p in pairs), sum(t + p for t, p in pairs)
        if pairs:
            rows.append((sum(t != p for t, p in pairs), len(pairs), 2 * both / either if either else 0.0))
    wrong, known = sum(row[0] for row in rows), sum(row[1] for row in rows)
    assert metrics.hamming_loss(targets, predictions) == pytest.approx(wrong / known if known else 0, abs=1e-12)
    exact = np.mean([row[0] == 0 for row in rows]) if rows else 0
    assert metrics.subset_accuracy(targets, predictions) == pytest.approx(exact, abs=1e-12)
    samples = np.mean([row[2] for row in rows]) if rows else 0
    assert metrics.f1_score(targets, predictions, "samples") == pytest.approx(samples, abs=1e-12)
    mask = ~np.isnan(targets)
    if mask.any():
        pooled = sk.f1_score(targets[mask], predictions[mask], zero_division=0)
        assert metrics.f1_score(targets, predictions, "micro") == pytest.approx(pooled, abs=1e-12)
        pooled = sk.average_precision_score(targets[mask], scores[mask])
        assert metrics.average_precision(targets, scores, "micro") == pytest.approx(pooled, abs=1e-12)


def best_threshold(truth, score, candidates):
    """The lowest candidate with the best F1, by trying them."""
    f1 = [sk.f1_score(truth, score >= candidate, zero_division=0) for candidate in candidates]
    return candidates[int(np.argmax(f1))]


@settings(max_examples=150, deadline=None)
@given(problems(unknown=True), st.sampled_from([0.4, 0.8, 1.0]))
def test_thresholds_are_those_of_brute_force(problem, most):
    targets, scores = problem
    scores = np.clip(scores, 0, 1)
    for method in ("pr_curve", "grid"):
        expected = []
        for truth, score in columns(targets, scores):
            candidates = np.unique(score) if method == "pr_curve" else np.linspace(0, 1, 41)
            value = best_threshold(truth, score, candidates) if (truth == 1).any() else 0.5
            expected.append(0.5 if value > most else value)
        np.testing.assert_array_equal(metrics.find_thresholds(targets, scores, method, most), expected)


@settings(max_examples=150, deadline=None)
@given(problems(unknown=True))
def test_the_global_threshold_has_the_best_weighted_f1(problem):
    targets, scores = problem
    threshold = metrics.find_thresholds(targets, scores, "global")
    assert len(set(threshold)) == 1
    if (targets == 1).any():
        best = max(metrics.f1_score(targets, scores >= t, "weighted") for t in np.unique(scores[~np.isnan(targets)]))
        assert metrics.f1_score(targets, scores >= threshold, "weighted") == pytest.approx(best, abs=1e-12)
    else:
        assert threshold[0] == 0.5


def test_fixed_threshold_and_float32_scores_select_themselves():
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, (50, 3)).astype(np.float32), rng.random((50, 3)).astype(np.float32)
    assert metrics.find_thresholds(targets, scores, 0.3).tolist() == [0.3] * 3
    thresholds = metrics.find_thresholds(targets, scores, "pr_curve")
    assert ((scores >= thresholds).sum(axis=0) > 0).all() and all(t in scores[:, c] for c, t in enumerate(thresholds))


def test_report_holds_the_same_numbers_and_is_json():
    rng = np.random.default_rng(1)
    targets, scores = rng.integers(0, 2, (40, 3)).astype(float), rng.random((40, 3))
    targets[rng.random((40, 3)) < 0.2] = np.nan
    report = metrics.report(targets, scores, [0.3, 0.5, 0.7], ["a", "b", "c"], bootstrap=50)
    predictions = scores >= [0.3, 0.5, 0.7]
    assert report["hamming_loss"] == metrics.hamming_loss(targets, predictions)
    assert report["subset_accuracy"] == metrics.subset_accuracy(targets, predictions)
    assert report["map"] == metrics.average_precision(targets, scores)
    for average in ("micro", "macro", "weighted", "samples"):
        assert report[f"f1_{average}"] == pytest.approx(metrics.f1_score(targets, predictions, average), abs=1e-15)
    row = report["per_class"]["b"]
    assert row["positives"] + row["negatives"] == row["known"] == 40 - row["na"]
    assert row["prevalence"] == row["support"] / row["known"] and row["threshold"] == 0.5
    assert json.loads(json.dumps(report)) == report


def test_bootstrap_intervals_are_those_of_a_loop():
    rng = np.random.default_rng(2)
    targets, scores = rng.integers(0, 2, (30, 2)).astype(float), rng.integers(0, 6, (30, 2)) / 5
    targets[rng.random((30, 2)) < 0.2] = np.nan
    intervals = metrics.report(targets, scores, 0.5, ["a", "b"], bootstrap=200, seed=3)["intervals"]
    weights = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), 200)
    drawn = []
    for weight in weights:
        rows = np.repeat(np.arange(30), weight)
        drawn.append(metrics.report(targets[rows], scores[rows], 0.5, ["a", "b"]))
    for name, interval in intervals.items():
        expected = np.quantile([report[name] for report in drawn], [0.025, 0.975])
        np.testing.assert_allclose(interval, expected, atol=1e-12)
    assert metrics.report(targets, scores, 0.5, ["a", "b"], bootstrap=200, seed=3)["intervals"] == intervals


def test_format_report_fits_100_columns():
    rng = np.random.default_rng(1)
    targets, scores = rng.integers(0, 2, (40, 2)).astype(float), rng.random((40, 2))
    targets[:, 1] = np.nan
    names = ["a class name that has forty-four characters..", "b"]
    text = metrics.format_report(metrics.report(targets, scores, 0.5, names, bootstrap=20))
    assert max(map(len, text.splitlines())) <= 100
    assert "n/a" in text and "…" in text and "[0." in text


WRONG = [
    (lambda t, s: metrics.hamming_loss(t, s[:1] > 0.5), "predictions has shape (1, 2), but targets has shape (3, 2)"),
    (lambda t, s: metrics.average_precision(t, s[:, :1]), "scores has shape (3, 1)"),
    (lambda t, s: metrics.f1_score(t + np.eye(3, 2) * 2, s > 0.5, "micro"), "targets[0, 0] is 2.0"),
    (lambda t, s: metrics.f1_score(t, s, "micro"), "predictions[0, 0] is 0.1: it must be 0 or 1"),
    (lambda t, s: metrics.roc_auc(t, np.where(s == 0.4, np.nan, s)), "scores[1, 1] is nan: it must be finite"),
    (lambda t, s: metrics.find_thresholds(t, np.where(s == 0.3, np.inf, s)), "scores[1, 0] is inf"),
    (lambda t, s: metrics.find_thresholds(t, s, "best"), "method is 'best'"),
    (lambda t, s: metrics.f1_score(t, s > 0.5, "mean"), "average is 'mean'"),
    (lambda t, s: metrics.report(t[:, :0], s[:, :0], 0.5, []), "has no classes"),
    (lambda t, s: metrics.report(t, s, 0.5, ["a"]), "classes has 1 names"),
    (lambda t, s: metrics.hamming_loss(t[0], s[0] > 0.5), "targets must have 2 dimensions"),
    (lambda t, s: metrics.hamming_loss([["x"]], [[1]]), "targets must hold numbers"),
    (lambda t, s: metrics.precision_recall_curve(t, s), "targets must have 1 dimension"),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_wrong_input_names_the_argument_and_the_place(call, message):
    targets, scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    with pytest.raises(ValueError) as error:
        call(targets, scores)
    assert message in str(error.value)


def test_docstring_examples_run():
    result = doctest.testmod(metrics)
    assert result.attempted >= 10 and result.failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# The results table


@pytest.fixture
def runs(tmp_path):
    for name, backbone, f1 in (("a", "resnet18", 0.5), ("b", "resnet50", 0.9), ("c", "resnet18", 0.7)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"backbone": backbone, "lr": 0.1}))
        scores = {"split": "test", "f1_macro": f1, "map": None, "per_class": {}}
        (folder / "metrics.json").write_text(json.dumps(scores))
    return [str(tmp_path / name) for name in "abc"]


def order(text):
    return [line.split()[0].rsplit("/")[-1] for line in text.splitlines()[1:]]


def test_results_table_sorts_and_groups(runs, capsys):
    assert order(metrics.main(runs)) == ["b", "c", "a"]
    assert order(metrics.main([*runs, "--ascending"])) == ["a", "c", "b"]
    assert order(metrics.main([*runs, "--group-by", "backbone"])) == ["b", "c"]
    mean = metrics.main([*runs, "--group-by", "backbone", "--group-mode", "mean"])
    assert "0.600" in mean and "mean of 2" in mean
    with pytest.raises(ValueError, match="no run has 'speed'"):
        metrics.main([*runs, "--sort", "speed"])


def test_results_table_needs_no_torch_and_fails_in_one_line(runs):
    code = "import sys, metrics; metrics.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, *runs], cwd=ROOT, capture_output=True).returncode == 0
    result = subprocess.run([sys.executable, ROOT / "metrics.py", "/nowhere"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: /nowhere is not the folder of a finished run: it has no metrics.json\n"
