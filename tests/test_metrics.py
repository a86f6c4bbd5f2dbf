"""metrics.py against scikit-learn, and against plain loops where scikit-learn has no word."""

import doctest
import json
import math
import subprocess
import sys
import warnings

import bench
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn
import sklearn.metrics as sk
from hypothesis import example as always_with
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import metrics
from conftest import ROOT

CASES = settings(max_examples=100, deadline=None)
AVERAGES = ("micro", "macro", "weighted", "samples", None)


@pytest.fixture(autouse=True)
def quiet_oracle():
    with (
        warnings.catch_warnings(),
        sklearn.config_context(assume_finite=True, skip_parameter_validation=True),
    ):
        warnings.simplefilter("ignore")
        yield


@st.composite
def problems(draw, unknown=False, min_classes=1):
    """Draw targets and scores with ties, constant columns, empty classes, one row, all positive or all negative."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(min_classes, 4)))
    values = [0.0, 1.0, np.nan] if unknown else [0.0, 1.0]
    values = draw(st.sampled_from([values, [1.0], [0.0]]))
    targets = draw(arrays(np.float64, shape, elements=st.sampled_from(values)))
    few = st.sampled_from([0.0, 0.25, 0.5, 0.5000001, 1.0])
    return targets, draw(arrays(np.float64, shape, elements=draw(st.sampled_from([few, st.floats(-3, 3)]))))


def columns(targets, *others):
    """Yield the known part of each column."""
    for c in range(targets.shape[1]):
        known = ~np.isnan(targets[:, c])
        yield targets[known, c], *(other[known, c] for other in others)


@CASES
@given(problems(min_classes=2))
def test_prediction_metrics_agree_with_scikit_learn(problem):
    targets, scores = problem
    predictions = scores >= 0.5
    truth = targets.astype(int)
    assert metrics.hamming_loss(targets, predictions) == pytest.approx(
        sk.hamming_loss(truth, predictions), abs=1e-12
    )
    assert metrics.subset_accuracy(targets, predictions) == pytest.approx(
        sk.accuracy_score(truth, predictions), abs=1e-12
    )

    for average in AVERAGES:
        expected = sk.precision_recall_fscore_support(
            truth, predictions.astype(int), average=average, zero_division=0
        )
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
        curve = metrics.precision_recall_curve(targets[:, c], scores[:, c])
        for ours, theirs in zip(curve, sk.precision_recall_curve(truth, score)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)

    support = (targets == 1).sum(axis=0)
    assert metrics.f1_score(targets, predictions, "macro") == pytest.approx(
        per_class[:, 2].mean(), abs=1e-12
    )
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
    assert metrics.hamming_loss(targets, predictions) == pytest.approx(
        wrong / known if known else 0, abs=1e-12
    )
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
    """Return the lowest candidate with the best F1, by trying them all."""
    best, best_f1 = None, -1.0
    for candidate in candidates:
        predicted = score >= candidate
        f1 = 2 * sum(predicted * truth) / (sum(predicted) + sum(truth))
        if f1 > best_f1:
            best, best_f1 = candidate, f1
    return best


@CASES
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


@CASES
@given(problems(unknown=True))
def test_the_global_threshold_has_the_best_weighted_f1(problem):
    targets, scores = problem
    threshold = metrics.find_thresholds(targets, scores, "global")
    assert len(set(threshold)) == 1
    if (targets == 1).any():
        best = max(
            metrics.f1_score(targets, scores >= t, "weighted")
            for t in np.unique(scores[~np.isnan(targets)])
        )
        assert metrics.f1_score(targets, scores >= threshold, "weighted") == pytest.approx(best, abs=1e-12)
    else:
        assert threshold[0] == 0.5


def test_fixed_threshold_and_float32_scores_select_themselves():
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, (50, 3)).astype(np.float32), rng.random((50, 3)).astype(np.float32)
    assert metrics.find_thresholds(targets, scores, 0.3).tolist() == [0.3] * 3
    thresholds = metrics.find_thresholds(targets, scores, "pr_curve")
    assert ((scores >= thresholds).sum(axis=0) > 0).all()
    assert all(threshold in column for threshold, column in zip(thresholds, scores.T))


PER_CLASS = ["precision", "recall", "f1", "average_precision", "roc_auc", "positives",
             "negatives", "na", "prevalence", "threshold"]


def some_scores(rows=40, classes=3, unknown=0.2):
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, (rows, classes)).astype(float)
    targets[rng.random(targets.shape) < unknown] = np.nan
    return targets, rng.random((rows, classes))


def test_report_holds_the_same_numbers_and_is_json():
    targets, scores = some_scores()
    report = metrics.report(targets, scores, [0.3, 0.5, 0.7], ["a", "b", "c"], intervals=True)
    predictions = scores >= [0.3, 0.5, 0.7]
    assert report["rows"] == 40
    assert report["hamming_loss"] == metrics.hamming_loss(targets, predictions)
    assert report["subset_accuracy"] == metrics.subset_accuracy(targets, predictions)
    assert report["map"] == metrics.average_precision(targets, scores)
    assert report["roc_auc_macro"] == metrics.roc_auc(targets, scores)
    for average in ("micro", "macro", "weighted", "samples"):
        assert report[f"f1_{average}"] == pytest.approx(
            metrics.f1_score(targets, predictions, average), abs=1e-15
        )
    assert json.loads(json.dumps(report)) == report


def test_report_says_of_each_class_every_number_once():
    targets, scores = some_scores()
    thresholds = [0.3, 0.5, 0.7]
    per_class = metrics.report(targets, scores, thresholds, ["a", "b", "c"])["per_class"]

    precision, recall, f1 = metrics.precision_recall_f1(targets, scores >= thresholds, None)
    for c, name in enumerate(["a", "b", "c"]):
        row = per_class[name]
        assert list(row) == PER_CLASS
        assert [row["precision"], row["recall"], row["f1"]] == [precision[c], recall[c], f1[c]]
        assert row["average_precision"] == metrics.average_precision(targets, scores, None)[c]
        assert row["roc_auc"] == metrics.roc_auc(targets, scores, None)[c]
        assert row["threshold"] == thresholds[c]
        counts = [
            int((targets[:, c] == 1).sum()),
            int((targets[:, c] == 0).sum()),
            int(np.isnan(targets[:, c]).sum()),
        ]
        assert [row["positives"], row["negatives"], row["na"]] == counts
        assert row["prevalence"] == pytest.approx(counts[0] / (counts[0] + counts[1]))


@CASES
@given(problems(unknown=True))
def test_means_of_judged_classes_leave_out_those_without_a_known_positive(problem):
    targets, scores = problem
    report = metrics.report(targets, scores, 0.5, list("abcd")[: targets.shape[1]])
    f1, precision, auc = [], [], []
    for truth, score in columns(targets, scores):
        if truth.any():
            f1.append(sk.f1_score(truth, score >= 0.5, zero_division=0))
            precision.append(sk.average_precision_score(truth, score))
            if not truth.all():
                auc.append(sk.roc_auc_score(truth, score))
    assert report["classes_judged"] == len(f1)
    for name, values in (("f1_macro", f1), ("map", precision), ("roc_auc_macro", auc)):
        expected = np.mean(values) if values else np.nan
        assert report[f"{name}_judged"] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_report_says_how_many_classes_cannot_be_judged():
    targets, scores = some_scores(classes=3)
    everything = metrics.format_report(metrics.report(targets, scores, 0.5, list("abc")))
    assert "judged" not in everything
    targets[targets[:, 1] == 1, 1] = 0
    report = metrics.report(targets, scores, 0.5, list("abc"))
    text = metrics.format_report(report)
    assert "count as 0 in f1_macro and map: 1 of 3" in text
    assert f"map_judged {report['map_judged']:.3f}" in text and report["map_judged"] > report["map"]
    nothing = metrics.format_report(metrics.report(targets[:, 1:2], scores[:, 1:2], 0.5, ["b"]))
    assert "count as 0 in f1_macro and map: 1 of 1" in nothing and "judged" not in nothing
    assert max(map(len, (text + "\n" + nothing).splitlines())) <= 100


def test_report_refuses_a_class_that_is_there_twice():
    targets, scores = some_scores(classes=2)
    with pytest.raises(ValueError, match="classes has a name twice: a, a"):
        metrics.report(targets, scores, 0.5, ["a", "a"])


def interval_by_loops(value, without, transform):
    """Return the 95 % jackknife interval of a value, from its values without each row, on a transformed scale."""
    count = len(without)
    moves = [one - sum(without) / count for one in without]
    squares = sum(move**2 for move in moves)
    freedom = min(count - 1, 2 / (sum(move**4 for move in moves) / squares**2 - 1 / count))
    reach = scipy.stats.t.ppf(0.975, freedom) * math.sqrt((count - 1) / count * squares)
    bias = (count - 1) * (sum(without) / count - value)

    ends = []
    for move in (-reach - 2 * max(bias, 0), reach + 2 * max(-bias, 0)):
        if transform == "logit":
            odds = value / (1 - value) * math.exp(move / (value * (1 - value)))
            ends.append(odds / (1 + odds))
        else:
            ends.append(value * math.exp(move / value) if transform == "log" else value + move)
    return ends


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_those_of_a_loop_over_reports_without_a_row(seed):
    targets, one = example(rows=50, seed=seed)
    two = np.clip(one + np.random.default_rng(seed).normal(0, 0.2, one.shape), 0, 1).round(1)  # with ties
    thresholds = np.linspace(0.3, 0.7, 200).reshape(50, 4)
    supported = (targets == 1).sum(axis=0) >= 4
    assert 1 < supported.sum() < 4

    def numbers(rows, p):
        report = metrics.report(targets[rows], p[rows], thresholds[rows], list("abcd"))
        part = metrics.report(targets[rows][:, supported], p[rows][:, supported], thresholds[rows][:, supported],
                              list("abcd")[: supported.sum()])
        return report | {f"{name}_supported": part[name] for name in ("f1_macro", "map")}

    report = metrics.report(targets, two, thresholds, list("abcd"), intervals=True)
    assert report["classes_supported"] == supported.sum()
    assert set(report["intervals"]) == {"hamming_loss", "subset_accuracy", "f1_micro", "f1_weighted", "f1_samples",
                                        "brier", "log_loss", "f1_macro_supported", "map_supported"}
    values = [numbers(np.arange(50), p) for p in (one, two)]
    without = [[numbers(np.arange(50) != row, p) for row in range(50)] for p in (one, two)]
    paired = metrics.paired_differences(targets, one, thresholds, two, thresholds)
    assert set(paired) == {*report["intervals"], "f1_macro", "map"}
    assert paired["map"] == (values[0]["map"], values[1]["map"], values[1]["map"] - values[0]["map"], None, None)
    for name, interval in report["intervals"].items():
        assert report[name] == pytest.approx(values[1][name])
        left = [row[name] for row in without[1]]
        expected = interval_by_loops(report[name], left, "log" if name == "log_loss" else "logit")
        assert interval == pytest.approx(expected, rel=0.005)  # quantiles are interpolated
        difference = values[1][name] - values[0][name]
        left = [after[name] - before[name] for before, after in zip(*without)]
        assert paired[name] == pytest.approx((values[0][name], values[1][name], difference,
                                              *interval_by_loops(difference, left, None)), rel=0.03)


@CASES
@given(problems(unknown=True), st.floats(0, 1))
def test_a_number_lies_in_its_interval_and_a_difference_too(problem, threshold):
    targets, scores = problem
    names = list("abcd")[: targets.shape[1]]
    report = metrics.report(targets, scores, threshold, names, intervals=True)
    for name, (low, high) in report["intervals"].items():
        assert 0 <= low <= report[name] <= high < np.inf
        assert high <= 1 or name == "log_loss"
    positives = (targets == 1).sum(axis=0)
    supported = positives >= 4
    if supported.sum() < 0.5 * (positives > 0).sum():
        supported[:] = False
    assert report["classes_supported"] == supported.sum()
    assert ("map_supported" in report) == (0 < supported.sum() < len(names))
    if not supported.all():
        assert not {"f1_macro", "map"} & report["intervals"].keys()

    there = metrics.paired_differences(targets, scores, threshold, -scores, 0.5)
    back = metrics.paired_differences(targets, -scores, 0.5, scores, threshold)
    for name, (value, other, difference, low, high) in there.items():
        assert difference == other - value
        if low is None:
            assert back[name] == (other, value, -difference, None, None)
        else:
            assert low <= difference <= high
            assert back[name] == pytest.approx((other, value, -difference, -high, -low), abs=1e-9)


def test_what_no_row_changes_has_no_interval():
    targets = np.zeros((200, 20))
    targets[np.arange(20) * 10, np.arange(20)] = 1
    alone = metrics.report(targets, targets, 0.5, list(map(str, range(20))), intervals=True)
    assert alone["f1_macro"] == 1 and set(alone["intervals"]) == {"f1_samples"} and alone["classes_supported"] == 0
    assert "no interval of f1_macro and map" in metrics.format_report(alone)
    targets = np.repeat(targets, 4, axis=0)
    perfect = metrics.report(targets, targets, 0.5, list(map(str, range(20))), intervals=True)
    assert set(perfect["intervals"]) == {"f1_samples"} and perfect["classes_supported"] == 20
    wrong = metrics.paired_differences(targets, targets, 0.5, 1 - targets, 0.5)
    assert wrong["f1_macro"] == (1, 0, -1, None, None)
    one_row = metrics.report(targets[:1], targets[:1] / 2, 0.5, list(map(str, range(20))), intervals=True)
    assert one_row["intervals"] == {}


def test_the_report_shows_each_interval_beside_its_own_number():
    targets, scores = some_scores(classes=3)
    report = metrics.report(targets, scores, 0.5, list("abc"), intervals=True)
    text = metrics.format_report(report)
    assert "map {:.3f} [{:.3f}, {:.3f}]".format(report["map"], *report["intervals"]["map"]) in text
    targets[2:, 1] = np.where(targets[2:, 1] == 1, np.nan, targets[2:, 1])
    report = metrics.report(targets, scores, 0.5, list("abc"), intervals=True)
    text = metrics.format_report(report)
    assert "intervals of f1_macro and map cover the 2 classes with at least 4 known positives" in text
    assert f"map {report['map']:.3f} [" not in text
    for name in ("f1_macro_supported", "map_supported"):
        assert "{} {:.3f} [{:.3f}, {:.3f}]".format(name, report[name], *report["intervals"][name]) in text
    without_c = metrics.report(targets[:, ::2], scores[:, ::2], 0.5, list("ac"), intervals=True)
    assert report["intervals"]["map_supported"] == pytest.approx(without_c["intervals"]["map"])
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("positives", [4, 6])
def test_intervals_cover_the_truth_of_rare_classes(positives):
    rng = np.random.default_rng(0)
    prevalence = np.full(20, positives / 150)
    distances = np.linspace(2, 4, 20)
    names = list(map(str, range(20)))
    targets, *models = bench.simulate(rng, 20_000, prevalence, distances)
    thresholds = [metrics.find_thresholds(targets, p, "pr_curve") for p in models]
    true_f1 = [metrics.f1_score(targets, p >= t, None) for p, t in zip(models, thresholds)]
    true_ap = [metrics.average_precision(targets, p, None) for p in models]

    hits = []
    for _ in range(60):
        targets, *models = bench.simulate(rng, 150, prevalence, distances)
        supported = (targets == 1).sum(axis=0) >= 4
        report = metrics.report(targets, models[0], thresholds[0], names, intervals=True)
        paired = metrics.paired_differences(targets, models[0], thresholds[0], models[1], thresholds[1])
        for column, (one, other) in (("f1_macro", true_f1), ("map", true_ap)):
            name = column if supported.all() else f"{column}_supported"
            one, other = one[supported].mean(), other[supported].mean()
            if name in report["intervals"]:
                low, high = report["intervals"][name]
                hits.append(low <= one <= high)
            if name in paired and paired[name][3] is not None:
                hits.append(paired[name][3] <= other - one <= paired[name][4])
    assert len(hits) > 120 and np.mean(hits) > 0.92


def test_student_t_is_that_of_scipy_and_wider_between_its_steps():
    freedom = 1 / np.linspace(1e-6, 1, 500)
    ours = np.interp(1 / freedom, *metrics.STUDENT_T.T)
    exact = scipy.stats.t.ppf(0.975, freedom)
    assert (ours > exact * 0.999).all()
    assert (ours < exact * 1.03)[freedom > 2].all()


@CASES
@given(problems(), st.sampled_from(["pr_curve", "global", "grid"]))
def test_thresholds_between_probabilities_decide_the_same_and_lie_on_none(problem, method):
    targets, scores = problem
    scores = np.clip(scores, 0, 1).astype(np.float32)
    thresholds = metrics.find_thresholds(targets, scores, method)
    between = metrics.between_scores(thresholds, scores)
    np.testing.assert_array_equal(scores >= between, scores >= thresholds)
    for c, column in enumerate(scores.T):
        if thresholds[c] not in column:
            assert between[c] == thresholds[c]
        else:
            lower = column[column < thresholds[c]].max(initial=0)
            assert lower < between[c] < thresholds[c] or thresholds[c] == 0


def test_a_threshold_between_scores_is_halfway_and_the_argument_is_left_alone():
    scores = np.array([[0.2, 0.1, 0.5], [0.8, 0.9, 0.5], [0.4, 0.3, 0.7]], np.float32)
    thresholds = np.array([scores[1, 0], 0.5, scores[0, 2]], float)
    before = thresholds.copy()
    assert metrics.between_scores(thresholds, scores) == pytest.approx([0.6, 0.5, 0.25])
    np.testing.assert_array_equal(thresholds, before)


def test_format_report_fits_100_columns():
    targets, scores = some_scores(classes=2)
    targets[:, 1] = np.nan
    names = ["a class name that has forty-four characters..", "b"]
    text = metrics.format_report(metrics.report(targets, scores, 0.5, names, intervals=True))
    assert max(map(len, text.splitlines())) <= 100
    assert "n/a" in text and "…" in text and "[0." in text


def test_of_many_classes_the_report_shows_the_worst_and_the_best():
    targets, scores = some_scores(60, 500, unknown=0)
    names = [f"class {c}" for c in range(500)]
    report = metrics.report(targets, scores, 0.5, names)
    lines = metrics.format_report(report).splitlines()
    assert len(lines) < 50
    gap = next(number for number, line in enumerate(lines) if line.startswith("... 470 classes"))
    assert "metrics.json" in lines[gap]
    by_precision = sorted(names, key=lambda name: report["per_class"][name]["average_precision"])
    assert [line[:12].strip() for line in lines[gap - 15 : gap]] == by_precision[:15]
    assert [line[:12].strip() for line in lines[gap + 1 :]] == by_precision[-15:]
    few = metrics.format_report(metrics.report(targets[:, :30], scores[:, :30], 0.5, names[:30]))
    assert "..." not in few and all(f"{name} " in few for name in names[:30])


WRONG = [
    (lambda t, s: metrics.hamming_loss(t, s[:1] > 0.5),
     "predictions has shape (1, 2), but targets has shape (3, 2)"),
    (lambda t, s: metrics.average_precision(t, s[:, :1]), "scores has shape (3, 1)"),
    (lambda t, s: metrics.f1_score(t + np.eye(3, 2) * 2, s > 0.5, "micro"), "targets[0, 0] is 2.0"),
    (lambda t, s: metrics.f1_score(t, s, "micro"), "predictions[0, 0] is 0.1: it must be 0 or 1"),
    (lambda t, s: metrics.roc_auc(t, np.where(s == 0.4, np.nan, s)), "scores[1, 1] is nan: it must be"),
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
    targets = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    scores = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    with pytest.raises(ValueError) as error:
        call(targets, scores)
    assert message in str(error.value)


def test_docstring_examples_run():
    result = doctest.testmod(metrics)
    assert result.attempted >= 10 and result.failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# The results table


@pytest.fixture
def make_run(tmp_path):
    """Write the folder of a finished run, and return its path: make_run(name, options, scores)."""

    def make(name, options, scores):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(options))
        report = {"split": "test", "map": None, "per_class": {}, "val": {"f1_macro": 0.1}, **scores}
        (folder / "metrics.json").write_text(json.dumps(report))
        return str(folder)

    return make


@pytest.fixture
def runs(make_run):
    return [
        make_run("a", {"backbone": "resnet18", "lr": 3e-4, "seed": 0}, {"f1_macro": 0.5, "val_loss": 0.4}),
        make_run("b", {"backbone": "resnet50", "lr": 3e-4, "seed": 0}, {"f1_macro": 0.9, "val_loss": 0.3}),
        make_run("c", {"backbone": "resnet18", "lr": 3e-4, "seed": 0}, {"f1_macro": 0.7, "val_loss": 0.2}),
    ]


def order(text):
    return [line.split()[0].rsplit("/")[-1] for line in text.splitlines()[1:]]


def cells(text):
    """Return the cells of a results table as {title: column}."""
    titles, *lines = (line.split() for line in text.splitlines())
    return dict(zip(titles, zip(*lines)))


def test_results_table_sorts_and_groups(runs):
    assert order(metrics.main(runs)) == ["b", "c", "a"]
    assert order(metrics.main([*runs, "--ascending"])) == ["a", "c", "b"]
    assert order(metrics.main([*runs, "--group-by", "backbone"])) == ["b", "c"]
    mean = metrics.main([*runs, "--group-by", "backbone", "--group-mode", "mean"])
    assert "0.600" in mean and "mean of 2" in mean
    for arguments in (["--sort", "speed"], ["--group-by", "speed"], ["--group-by", "backbone,speed"]):
        with pytest.raises(ValueError, match="no run has 'speed'"):
            metrics.main([*runs, *arguments])
    with pytest.raises(ValueError, match="--frobnicate"):
        metrics.main([*runs, "--frobnicate"])


def test_results_table_sorts_by_the_loss_of_val_whose_best_is_the_lowest(runs):
    text = metrics.main([*runs, "--sort", "val_loss", "--ascending"])
    assert order(text) == ["c", "b", "a"]
    assert cells(text)["val_loss"] == ("0.200*", "0.300", "0.400")
    assert cells(text)["f1_macro"] == ("0.700", "0.900*", "0.500")


def test_results_table_shows_the_options_in_which_runs_differ(make_run):
    runs = []
    for name, lr, layers in (("a", 3e-4, "all"), ("b", 1e-3, "head"), ("c", 3e-4, "head")):
        options = {"backbone": "resnet18", "lr": lr, "batch_size": 16, "train_layers": layers}
        options["device"] = name
        runs.append(make_run(name, options, {"f1_macro": 0.5}))
    table = cells(metrics.main(runs))
    assert table["lr"] == ("0.0003", "0.001", "0.0003")
    assert table["train_layers"] == ("all", "head", "head")
    assert not {"backbone", "batch_size", "device", "map", "per_class", "val"} & set(table)
    assert cells(metrics.main([*runs, "--sort", "backbone"]))["backbone"] == ("resnet18",) * 3
    assert order(metrics.main([*runs, "--sort", "lr"]))[0] == "b"


def test_results_table_shows_means_of_judged_classes_where_they_differ_from_the_headline(make_run):
    same = {"map": 0.5, "map_judged": 0.5}
    runs = [make_run("a", {}, same), make_run("b", {}, {"map": 0.4})]
    runs.append(make_run("c", {}, {"map": 0.6, "map_judged": 0.6}))
    assert "map_judged" not in metrics.main([*runs, "--sort", "map"])
    assert cells(metrics.main([*runs, "--sort", "map_judged"]))["map_judged"] == ("0.600*", "0.500", "n/a")
    runs.append(make_run("d", {}, {"map": 0.3, "map_judged": 0.9}))
    assert cells(metrics.main([*runs, "--sort", "map"]))["map_judged"] == ("0.600", "0.500", "n/a", "0.900*")
    text = metrics.main([*runs[2:], "--sort", "map_judged", "--group-by", "split", "--group-mode", "mean"])
    assert cells(text.replace("mean of 2", "mean"))["map_judged"] == ("0.750",)


def test_results_table_groups_by_several_options(make_run):
    runs = []
    for number, (lr, layers) in enumerate([(1e-3, "all"), (1e-3, "head"), (1e-4, "all"), (1e-3, "all")]):
        options = {"lr": lr, "train_layers": layers}
        runs.append(make_run(str(number), options, {"f1_macro": 0.1 + 0.2 * number}))
    best = metrics.main([*runs, "--group-by", "lr,train_layers"])
    assert order(best) == ["3", "2", "1"]
    assert cells(best)["lr"] == ("0.001", "0.0001", "0.001")
    assert cells(best)["train_layers"] == ("all", "all", "head")
    text = metrics.main([*runs, "--group-by", "lr,train_layers", "--group-mode", "mean"])
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == ["mean of 1", "mean of 2", "mean of 1"]
    assert ["0.500*" in text, "0.400" in text, "0.300" in text] == [True] * 3


def test_a_run_without_a_score_comes_last(make_run):
    runs = [
        make_run("a", {}, {}),
        make_run("b", {}, {"f1_macro": 0.2}),
        make_run("c", {}, {"f1_macro": 0.3}),
    ]
    assert order(metrics.main(runs)) == ["c", "b", "a"]
    assert order(metrics.main([*runs, "--ascending"])) == ["b", "c", "a"]
    assert cells(metrics.main(runs))["f1_macro"] == ("0.300*", "0.200", "n/a")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "5", b"\xff\xfe", "[" * 100_000, '{"a":' * 100_000,
                                     '{"f1_macro": 1%s}' % ("0" * 5000), '{"f1_macro": -1%s}' % ("0" * 400)])
@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_a_damaged_file_of_a_run_is_named(runs, name, content):
    path = f"{runs[1]}/{name}"
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        metrics.main(runs)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_a_score_that_is_not_finite_counts_as_missing(make_run):
    runs = [make_run(name, {}, {"f1_macro": value}) for name, value in zip("abcd", (0.2, math.nan, 0.3, -math.inf))]
    assert order(metrics.main(runs)) == ["c", "a", "b", "d"]
    assert cells(metrics.main(runs))["f1_macro"] == ("0.300*", "0.200", "n/a", "n/a")


def test_results_table_needs_no_torch_and_fails_in_one_line(runs):
    code = "import sys, metrics; metrics.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, *runs], cwd=ROOT, capture_output=True).returncode == 0
    result = subprocess.run(
        [sys.executable, ROOT / "metrics.py", "/nowhere"], capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == ""
    with pytest.raises(ValueError, match="is not the folder of a finished run"):
        metrics.main(["x" * 5000])
    assert result.stderr == "error: /nowhere is not the folder of a finished run: it has no metrics.json\n"


# ---------------------------------------------------------------------------------------------------------------------
# Soft thresholds, calibration, paired comparison


def example(rows=60, classes=4, seed=0):
    """Return targets with NA and a class without a positive, and probabilities that are overconfident but of use."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, classes)) < [0.5, 0.2, 0.1, 0.0][:classes]).astype(float)
    probabilities = 1 / (1 + np.exp(-(3 * targets + rng.normal(0, 2, targets.shape))))
    targets[rng.random(targets.shape) < 0.1] = np.nan
    return targets, probabilities


def soft_threshold_by_loops(targets, probabilities):
    """Return the soft threshold of one class by the definition in find_thresholds(), written out."""
    known = [(t, math.log(p / (1 - p))) for t, p in zip(targets, probabilities) if t == t]
    positives = sum(t for t, _ in known)
    best = (-1, None)
    for k in range(241):
        cut = -6 + 12 * k / 240
        counted = [(t, 1 / (1 + math.exp(-(z - cut) / 0.5))) for t, z in known]
        f1 = 2 * sum(t * s for t, s in counted) / (sum(s for _, s in counted) + positives)
        best = max(best, (f1, -k))
    ranked = sorted((1 / (1 + math.exp(-z)) for _, z in known), reverse=True)
    cut = max(-6 - 12 * best[1] / 240, min(z for _, z in known))
    half = max(sum(ranked[:k]) / (k + sum(ranked)) for k in range(1, len(ranked) + 1))
    logit = (positives * cut + 50 * math.log(half / (1 - half))) / (positives + 50)
    return 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize("seed", range(5))
def test_soft_thresholds_are_those_of_their_definition(seed):
    targets, probabilities = example(seed=seed)
    found = metrics.find_thresholds(targets, probabilities, "soft")
    wanted = [soft_threshold_by_loops(*pair) for pair in zip(targets.T, probabilities.T)]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_one_image_moves_a_soft_threshold_little():
    targets, probabilities = example(rows=40, classes=3)
    moves = {"soft": [], "pr_curve": []}
    for method, found in moves.items():
        before = metrics.find_thresholds(targets, probabilities, method)
        for row in range(len(targets)):
            rest = np.arange(len(targets)) != row
            found.append(np.abs(metrics.find_thresholds(targets[rest], probabilities[rest], method) - before).max())
    assert np.mean(moves["soft"]) < 0.5 * np.mean(moves["pr_curve"])


def test_a_soft_threshold_is_there_for_one_image_and_for_none_known():
    thresholds = metrics.find_thresholds([[1, np.nan]], [[1.0, 0.3]], "soft")
    assert 0 < thresholds[0] < 1 and thresholds[1] == 0.5


def test_soft_thresholds_take_probabilities_alone():
    with pytest.raises(ValueError, match=r"scores\[0, 1\] is 1.5: it must be a probability"):
        metrics.find_thresholds([[0, 1]], [[0.5, 1.5]], "soft")


def test_a_calibration_has_the_lowest_penalised_log_loss():
    targets, probabilities = example(rows=200)
    scale, offsets = metrics.fit_calibration(targets, probabilities)
    logits = np.log(probabilities / (1 - probabilities))

    def penalised(theta):
        total = 2 * np.sum(theta**2)
        for c in range(targets.shape[1]):
            for t, z in zip(targets[:, c], logits[:, c]):
                if t == t:
                    score = math.exp(theta[0]) * z + theta[1 + c]
                    total += math.log1p(math.exp(-score if t else score))
        return total

    theta = np.append(math.log(scale), offsets)
    lowest = penalised(theta)
    for k in range(len(theta)):
        for step in (-1e-3, 1e-3):
            moved = theta.copy()
            moved[k] += step
            assert penalised(moved) > lowest
    assert scale < 0.9  # they were overconfident
    assert metrics.log_loss(targets, metrics.calibrate(probabilities, scale, offsets)) < metrics.log_loss(
        targets, probabilities)


@st.composite
def calibrations(draw):
    """Draw a few targets with NA, and logits that may be extreme, tied, tiny or all wrong."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 4)))
    known = st.sampled_from(draw(st.sampled_from([[0.0, 1.0, np.nan], [0.0, 1.0], [1.0], [0.0]])))
    targets = draw(arrays(np.float64, shape, elements=known))
    targets[:, draw(arrays(bool, shape[1]))] = np.nan if draw(st.booleans()) else 1
    logits = [st.floats(-20, 20), st.floats(-3, 3), st.sampled_from([-16.0, -11.0, 0.0, 9.0, 12.0, 16.0])]
    return targets, draw(arrays(np.float64, shape, elements=draw(st.sampled_from(logits))))


@CASES
@given(calibrations())
@always_with((np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[12.0, -11.0], [9.0, -14.0]])))
def test_a_calibration_is_at_the_minimum_that_scipy_finds(problem):
    targets, logits = problem
    probabilities = 1 / (1 + np.exp(-logits))
    known = ~np.isnan(targets)
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    z = np.log(p / (1 - p))

    def objective(theta):
        score = np.exp(theta[0]) * z + theta[1:]
        return np.logaddexp(0, np.where(targets == 1, -score, score))[known].sum() + 2 * np.sum(theta**2)

    scale, offsets = metrics.fit_calibration(targets, probabilities)
    starts = [np.append(start, np.zeros(len(offsets))) for start in (-3, 0, 2)]
    lowest = min(scipy.optimize.minimize(objective, start).fun for start in starts)
    assert objective(np.append(math.log(scale), offsets)) <= lowest + 1e-6


def test_merging_the_labels_of_many_rows_hardly_moves_a_calibration_and_no_soft_threshold(monkeypatch):
    rng = np.random.default_rng(0)
    targets, scores = bench.problem(metrics.MANY + 1000, 3, 0.2)
    targets[:, 0] = np.where(np.isnan(targets[:, 0]), np.nan, rng.random(len(targets)) < 0.7)  # many positives, too
    scores = np.where(targets == 1, scores**0.3, scores**3)  # from 0 to 1 in logits of all sizes
    scores[:50], scores[50:100] = 0, 1

    merged = metrics.fit_calibration(targets, scores), metrics.find_thresholds(targets, scores, "soft")
    monkeypatch.setattr(metrics, "MANY", np.inf)
    (scale, offsets), thresholds = metrics.fit_calibration(targets, scores), metrics.find_thresholds(targets, scores)
    np.testing.assert_array_equal(merged[1], thresholds)
    assert merged[0][0] != scale  # labels were merged indeed
    np.testing.assert_allclose(metrics.calibrate(scores, *merged[0]), metrics.calibrate(scores, scale, offsets),
                               rtol=0, atol=3e-6)


def test_a_calibration_ignores_unknown_labels_and_survives_certain_ones():
    targets, probabilities = example()
    unknown = np.isnan(targets)
    other = np.where(unknown, 0.999, probabilities)
    scale, _ = metrics.fit_calibration(targets, probabilities)
    assert metrics.fit_calibration(targets, other)[0] == pytest.approx(scale)
    scale, offsets = metrics.fit_calibration([[1.0, 0.0], [0.0, np.nan]], [[1.0, 0.0], [1.0, 1.0]])
    assert np.isfinite([scale, *offsets]).all()
    scale, offsets = metrics.fit_calibration(np.full((3, 2), np.nan), np.full((3, 2), 0.7))
    assert scale == 1 and (offsets == 0).all()


@CASES
@given(problems(unknown=True))
def test_brier_score_and_log_loss_agree_with_scikit_learn_on_the_known_labels(problem):
    targets, scores = problem
    probabilities = np.clip(scores, 0, 1)
    known = ~np.isnan(targets)
    if not known.any():
        assert metrics.brier_score(targets, probabilities) == metrics.log_loss(targets, probabilities) == 0
        assert metrics.calibration_error(targets, probabilities) == 0
        return

    truth, p = targets[known], probabilities[known]
    assert metrics.brier_score(targets, probabilities) == pytest.approx(np.mean((truth - p) ** 2))
    kept = np.clip(p, 1e-7, 1 - 1e-7)
    assert metrics.log_loss(targets, probabilities) == pytest.approx(sk.log_loss(truth, kept, labels=[0, 1]))

    total = 0
    for k in range(15):
        inside = (np.minimum((p * 15).astype(int), 14)) == k
        if inside.any():
            total += inside.sum() * abs(p[inside].mean() - truth[inside].mean())
    assert metrics.calibration_error(targets, probabilities) == pytest.approx(total / len(p), abs=1e-12)


def test_a_reliability_curve_counts_every_known_label_once():
    targets, probabilities = example()
    mean, share, counts = metrics.reliability_curve(targets, probabilities, bins=10)
    assert counts.sum() == (~np.isnan(targets)).sum()
    there = counts > 0
    assert ((mean >= np.arange(10) / 10) & (mean <= np.arange(1, 11) / 10))[there].all()
    assert (share * counts)[there].sum() == pytest.approx(np.nansum(targets))


def test_scores_that_are_no_probabilities_have_no_brier_score():
    report = metrics.report([[1], [0]], [[2.0], [-1.0]], 0.5, ["a"], intervals=True)
    assert math.isnan(report["ece"]) and math.isnan(report["brier"]) and math.isnan(report["log_loss"])
    assert "brier" not in report["intervals"]


def test_thresholds_may_differ_by_row():
    targets, probabilities = example()
    thresholds = np.random.default_rng(0).uniform(0.2, 0.8, targets.shape)
    report = metrics.report(targets, probabilities, thresholds, list("abcd"))
    assert report["f1_macro"] == metrics.f1_score(targets, probabilities >= thresholds, "macro")
    assert report["per_class"]["a"]["threshold"] == np.median(thresholds[:, 0])


def test_paired_differences_are_those_of_two_reports():
    targets, one = example(rows=120)
    targets = targets[:, :3]
    one = one[:, :3]
    two = np.clip(one + np.random.default_rng(1).normal(0, 0.2, one.shape), 0, 1)
    result = metrics.paired_differences(targets, one, 0.5, two, 0.4)
    first = metrics.report(targets, one, 0.5, list("abc"))
    second = metrics.report(targets, two, 0.4, list("abc"))
    assert set(result) == set(metrics.HEADLINES) - {"roc_auc_macro", "ece"}
    for name, (value, other, difference, _, _) in result.items():
        assert (value, other) == pytest.approx((first[name], second[name]))
        assert difference == pytest.approx(other - value)
    same = metrics.paired_differences(targets, one, 0.5, one, 0.5)
    assert set(same) == set(result) and all(value[2:] == (0, None, None) for value in same.values())


def write_run(folder, ids, probabilities, thresholds, split="test"):
    targets, _ = example(rows=len(ids))
    folder.mkdir()
    words = {1.0: "1", 0.0: "0"}
    labels = ["ID,a,b,c,d"]
    scores = ["ID,a,b,c,d"]
    for name, label_row, score_row in zip(sorted(ids), targets, probabilities):
        labels.append(",".join([name, *(words.get(value, "NA") for value in label_row)]))
        scores.append(",".join([name, *map(str, score_row)]))
    scores[1:] = sorted(scores[1:], key=lambda line: ids.index(line.split(",")[0]))

    (folder / f"{'train' if split == 'folds' else split}_metadata.csv").write_text("\n".join(labels))
    (folder / "probabilities.csv").write_text("\n".join(scores))
    (folder / "thresholds.json").write_text(json.dumps(dict(zip("abcd", thresholds))))
    rows = [",".join([line.split(",")[0], *map(str, thresholds)]) for line in scores[1:]]
    (folder / "fold_thresholds.csv").write_text("\n".join(["ID,a,b,c,d", *rows]))
    (folder / "metrics.json").write_text(json.dumps({"split": split}))
    return folder


def test_two_runs_are_compared_on_the_same_images(tmp_path, capsys):
    targets, one = example(rows=50)
    names = [f"{i:02}.jpg" for i in range(50)]
    a = write_run(tmp_path / "a", names, one, [0.5] * 4)
    b = write_run(tmp_path / "b", names[::-1], one, [0.5] * 4, split="folds")
    c = write_run(tmp_path / "c", names, np.where(targets == 1, 0.9, 0.1), [0.5] * 4)

    text = metrics.main([str(a), str(b), "--paired"])
    assert all("+0.000" in line and line.endswith("none") for line in text.splitlines()[1:-1])
    assert text.splitlines()[-1].endswith("cover the 3 classes with at least 4 known positives")
    text = metrics.main([str(a), str(c), "--paired"])
    line = next(line for line in text.splitlines() if line.startswith("f1_macro_supported"))
    assert "noise" not in line and "difference" in text.splitlines()[0]
    assert capsys.readouterr().out.endswith(text + "\n")

    other = write_run(tmp_path / "d", [f"other_{name}" for name in names], one, [0.5] * 4)
    with pytest.raises(ValueError, match="other images"):
        metrics.main([str(a), str(other), "--paired"])
    with pytest.raises(ValueError, match="name two"):
        metrics.main([str(a), "--paired"])
    (c / "probabilities.csv").unlink()
    with pytest.raises(ValueError, match=r"probabilities\.csv cannot be read"):
        metrics.main([str(a), str(c), "--paired"])


DAMAGED = [
    ("probabilities.csv", "", "has no rows"),
    ("probabilities.csv", "ID,a,b,c,d\n", "has no rows"),
    ("probabilities.csv", "ID,a,b,c,d\n\n", "line 2 has 0 cells instead of 5"),
    ("probabilities.csv", "ID,a,b,c,d\n00.jpg,1,0\n", "line 2 has 3 cells"),
    ("probabilities.csv", "ID,a,b,c,d\n00.jpg,1,0,0,x\n", "could not convert"),
    ("probabilities.csv", f"ID,a,b,c,d\n00.jpg,1,0,0,{'9' * 5000}\n", "scores[0, 3] is inf"),
    ("probabilities.csv", f"ID,a,b,c,d\n00.jpg,1,0,0,{'9' * 200_000}\n", "field larger than"),
    ("probabilities.csv", "ID,a,b,c,e\n00.jpg,1,0,0,0\n", "'e' is not in all files"),
    ("test_metadata.csv", "ID,a,b,c,e\n00.jpg,1,0,0,0\n", "'01.jpg' is not in all files"),
    ("test_metadata.csv", "ID,a,b,c,d\n01.jpg,1,0,0,2\n", "targets[0, 3] is 2.0"),
    ("thresholds.json", '{"a": 0.5, "b": 0.5, "c": 0.5}', "'d' is not in all files"),
    ("thresholds.json", '{"a": 0.5, "b": 0.5, "c": 0.5, "d": [1]}', "a threshold is not a number"),
    ("thresholds.json", '{"a": 0.5, "b": 0.5, "c": 0.5, "d": null}', "a threshold is not a number"),
    ("thresholds.json", '{"a": 0.5, "b": 0.5, "c": 0.5, "d": 1%s}' % ("0" * 5000), "a number of 5001 digits"),
    ("thresholds.json", "[" * 100_000, "nested too deeply"),
    ("fold_thresholds.csv", "ID,a,b,c,d\n00.jpg,1,0,0,0\n", "fold_thresholds.csv has other images"),
]


@pytest.mark.parametrize("name, content, message", DAMAGED)
def test_a_damaged_file_of_a_compared_run_is_one_line_that_names_it(tmp_path, name, content, message):
    _, probabilities = example(rows=50)
    names = [f"{i:02}.jpg" for i in range(50)]
    split = "folds" if name.startswith("fold") else "test"
    runs = [write_run(tmp_path / run, names, probabilities, [0.5] * 4, split) for run in "ab"]
    (runs[1] / name).write_text(content)
    if "targets" in message:
        (runs[1] / "probabilities.csv").write_text("ID,a,b,c,d\n01.jpg,0.5,0.5,0.5,0.5\n")
    with pytest.raises(ValueError) as error:
        metrics.main([*map(str, runs), "--paired"])
    assert message in str(error.value) and str(runs[1]) in str(error.value) and "\n" not in str(error.value)


def test_columns_of_labels_in_another_order_are_matched_by_name(tmp_path):
    _, probabilities = example(rows=50)
    names = [f"{i:02}.jpg" for i in range(50)]
    one = write_run(tmp_path / "one", names, probabilities, [0.5] * 4)
    two = write_run(tmp_path / "two", names, probabilities, [0.5] * 4)
    rows = [line.split(",") for line in (two / "test_metadata.csv").read_text().splitlines()]
    (two / "test_metadata.csv").write_text("\n".join(",".join([row[0], *row[:0:-1]]) for row in rows))
    np.testing.assert_array_equal(metrics.read_predictions(two)[2], metrics.read_predictions(one)[2])


@CASES
@given(problems(unknown=True))
def test_the_quality_of_a_label_is_the_probability_of_what_is_given(problem):
    targets, scores = problem
    probabilities = np.clip(scores, 0, 1)
    quality = metrics.label_quality(targets, probabilities)
    for place in np.ndindex(targets.shape):
        expected = {1: probabilities[place], 0: 1 - probabilities[place]}.get(targets[place], np.nan)
        np.testing.assert_equal(quality[place], expected)


def slow_questions(targets, probabilities, count, per_image, per_class):
    """Choose questions as the definition says: again and again the most uncertain label that may still be asked."""
    rows, columns = targets.shape
    chosen = []
    while len(chosen) < count:
        open_labels = [
            (abs(probabilities[r, c] - 0.5), r, c) for r in range(rows) for c in range(columns)
            if np.isnan(targets[r, c]) and (r, c) not in chosen
            and sum(row == r for row, _ in chosen) < per_image and sum(column == c for _, column in chosen) < per_class]
        if not open_labels:
            break
        chosen.append(min(open_labels)[1:])
    return chosen


@CASES
@given(problems(unknown=True), st.integers(0, 12), st.integers(1, 4), st.integers(1, 12))
def test_questions_are_the_most_uncertain_labels_that_the_limits_allow(problem, count, per_image, per_class):
    targets, scores = problem
    probabilities = np.clip(scores, 0, 1)
    chosen = metrics.choose_questions(targets, probabilities, count, per_image, per_class)
    assert chosen.shape == (len(chosen), 2)
    assert list(map(tuple, chosen)) == slow_questions(targets, probabilities, count, per_image, per_class)


def test_questions_and_label_quality_take_probabilities_alone():
    for function in (metrics.label_quality, lambda t, p: metrics.choose_questions(t, p, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"probabilities\[0, 1\] is 1.5"):
            function([[np.nan, 1.0]], [[0.5, 1.5]])
        with pytest.raises(ValueError, match="shape"):
            function([[np.nan, 1.0]], [[0.5]])
