"""Multi-label metrics in plain numpy that skip unknown labels.

    python metrics.py outputs/*                      # the results table of several runs
    python metrics.py outputs/* --sort map --group-by backbone
    python metrics.py RUN_A RUN_B --paired           # two runs on the same images: what differs, and what is noise

    import metrics
    thresholds = metrics.find_thresholds(targets, scores, "soft")
    print(metrics.format_report(metrics.report(targets, scores, thresholds, classes)))

`targets` is always (N, C) with 1, 0 and NaN for an unknown label (NA); `scores` is (N, C), finite, and
`predictions` is (N, C) with 0 and 1. A number means what scikit-learn means by it, with `zero_division=0`, taken
over the known labels alone. Three consequences are worth knowing:

* A class without a known positive has precision, recall, F1 and average precision 0, and the macro mean counts it.
* ROC AUC is NaN for a class without a known positive or without a known negative, and so is then the macro mean.
  (report() also has the means over the classes that can be judged.)
* A row without a known label is left out of the row-wise numbers (subset accuracy, `average="samples"`).

Wrong input is a ValueError that names the argument and the first offending place.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np

GRID = np.linspace(0, 1, 41)  # what find_thresholds(method="grid") tries
FALLBACK = 0.5  # the threshold of a class that val says nothing about
LOGITS = np.linspace(-6, 6, 241)  # what find_thresholds(method="soft") tries
SOFTNESS = 0.5  # of its counts, in the logit
PRIOR = 50  # positives that its expectation counts for
MIN_POSITIVES = 4  # known positives that a class needs to be in an interval; chosen by tests/bench.py intervals
STUDENT_T = np.array([  # 1 / degrees of freedom, 97.5 % quantile
    [0, 1.960], [1 / 60, 2.000], [1 / 20, 2.086], [1 / 10, 2.228], [1 / 6, 2.447], [1 / 4, 2.776], [1 / 3, 3.182],
    [1 / 2, 4.303], [1, 12.706]])
HEADLINES = ("hamming_loss", "subset_accuracy", "f1_micro", "f1_macro", "f1_weighted", "f1_samples", "map",
             "roc_auc_macro", "ece", "brier", "log_loss")
JUDGED = ("f1_macro_judged", "map_judged", "roc_auc_macro_judged")  # three of them, over the classes that can be judged
LOWER_IS_BETTER = ("hamming_loss", "ece", "brier", "log_loss", "val_loss")


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_array(values, name, ndim):
    """`values` as an array of numbers that is not empty."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, not {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' if ndim > 1 else ''}, not shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: shape {array.shape} has no rows, or has no classes")
    return array


def _refuse(wrong, array, name, what):
    """Raise a ValueError that names the first place where `wrong` (boolean, the shape of `array`)
    is True."""
    if wrong.any():
        place = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise ValueError(f"{name}[{', '.join(map(str, place))}] is {array[place]}: it must be {what}")


def _check_both(targets, values, name, ndim=2):
    """-> (positive, known, values): two boolean arrays, and the "scores", "probabilities" or
    "predictions"."""
    targets = _check_array(targets, "targets", ndim)
    positive = targets == 1
    known = positive | (targets == 0)
    if not known.all():
        _refuse(~known & ~np.isnan(targets), targets, "targets", "0, 1 or NaN")
    values = _check_array(values, name, ndim)
    if values.shape != targets.shape:
        raise ValueError(f"{name} has shape {values.shape}, but targets has shape {targets.shape}")
    if name == "scores":
        _refuse(~np.isfinite(values), values, name, "finite")
    elif name == "probabilities":
        _refuse(~((values >= 0) & (values <= 1)), values, name, "a number from 0 to 1")
    elif values.dtype != bool:
        _refuse((values != 0) & (values != 1), values, name, "0 or 1")
    return positive, known, values


def _check_predictions(targets, predictions):
    """-> (positive, known, present), boolean (N, C); `present` only where the label is known."""
    positive, known, predictions = _check_both(targets, predictions, "predictions")
    return positive, known, (predictions == 1) & known


def _check_average(average, *allowed):
    if average not in allowed:
        raise ValueError(f"average is {average!r}: it must be one of {', '.join(map(str, allowed))}")


# ---------------------------------------------------------------------------------------------------------------------
# Counts: predictions against targets


def _divide(numerator, denominator):
    """Element by element, 0 where the denominator is 0."""
    denominator = np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)


def _share(part, whole):
    """How many are True in `part`, over how many are in `whole`; 0 when none is."""
    return float(_divide(np.count_nonzero(part), np.count_nonzero(whole)))


def _count(array, axis):
    """How many of a boolean (N, C) are True, along an axis, or in all when it is None."""
    return np.count_nonzero(array) if axis is None else array.sum(axis=axis, dtype=np.int32)


def hamming_loss(targets, predictions):
    """The share of known labels that are predicted wrong, in [0, 1]; 0 when no label is known.

    targets (N, C) with 0, 1, NaN; predictions (N, C) with 0, 1.

    >>> hamming_loss([[1, 0], [1, float("nan")]], [[1, 1], [1, 1]])
    0.3333333333333333
    """
    positive, known, present = _check_predictions(targets, predictions)
    return _share(positive ^ present, known)


def subset_accuracy(targets, predictions):
    """The share of rows whose known labels are all predicted right, in [0, 1]; 0 when no label is
    known.

    targets (N, C) with 0, 1, NaN; predictions (N, C) with 0, 1. Rows without a known label are left
    out.

    >>> subset_accuracy([[1, 0], [1, float("nan")]], [[1, 1], [1, 1]])
    0.5
    """
    return _subset_accuracy(*_check_predictions(targets, predictions))


def _subset_accuracy(positive, known, present):
    wrong = (positive ^ present).any(axis=1)
    judged = known.any(axis=1)
    return _share(judged & ~wrong, judged)


def precision_recall_f1(targets, predictions, average):
    """Precision, recall and F1 -> (precision, recall, f1), each a float, or (C,) when `average` is
    None.

    targets (N, C) with 0, 1, NaN; predictions (N, C) with 0, 1. average: "micro" counts all labels
    together, "macro" is the mean over classes, "weighted" weighs each class by its positives,
    "samples" is the mean over rows, None gives the values per class. F1 = 2 tp / (2 tp + fp + fn);
    0 / 0 is 0.

    >>> precision_recall_f1([[1, 0], [1, 1]], [[1, 1], [0, 1]], "micro")
    (0.6666666666666666, 0.6666666666666666, 0.6666666666666666)
    """
    _check_average(average, "micro", "macro", "weighted", "samples", None)
    return _precision_recall_f1(*_check_predictions(targets, predictions), average)


def _precision_recall_f1(positive, known, present, average):
    axis = {"micro": None, "samples": 1}.get(average, 0)
    hits, predicted, actual = (_count(array, axis) for array in (positive & present, present, positive))
    values = _divide(hits, predicted), _divide(hits, actual), _divide(2 * hits, predicted + actual)
    weights = known.any(axis=1) if average == "samples" else actual
    return tuple(_average(value, average, weights) for value in values)


def f1_score(targets, predictions, average):
    """F1 alone: the third value of precision_recall_f1(), which says what the arguments mean.

    >>> f1_score([[1, 0], [1, 1]], [[1, 1], [0, 1]], None)
    array([0.66666667, 0.66666667])
    """
    return precision_recall_f1(targets, predictions, average)[2]


def _average(values, average, weights):
    """Values per class (C,), or per row, or the pooled one -> what `average` asks for."""
    if average is None:
        return values
    if average in ("weighted", "samples"):
        counted = weights > 0  # a class without a positive weighs nothing, also when its value is NaN
        return float(_divide((values[counted] * weights[counted]).sum(), weights.sum()))
    return float(values.mean())


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: scores against targets. Everything follows from the sorted scores of the positives and of the negatives.


def _sorted_scores(positive, known, scores):
    """Yield for each class (scores of its positives, of its negatives), both ascending."""
    for start in range(0, scores.shape[1], 16):  # a few columns at a time are copied, so that reading them is fast
        block = slice(start, start + 16)
        columns = [np.ascontiguousarray(array[:, block].T) for array in (positive, known, scores)]
        for is_positive, is_known, column in zip(*columns):
            yield np.sort(column[is_positive]), np.sort(column[is_known & ~is_positive])


def _at_least(ascending, thresholds):
    """How many of the ascending scores are >= each threshold."""
    return len(ascending) - np.searchsorted(ascending, thresholds, side="left")


def _average_precision(positives, negatives):
    """The mean over the positives of the precision at their score: the same sum as AP = sum (R_n -
    R_n-1) P_n."""
    if len(positives) == 0:
        return 0.0
    hits = _at_least(positives, positives)
    return float(np.mean(hits / (hits + _at_least(negatives, positives))))


def _roc_auc(positives, negatives):
    """The probability that a positive scores higher than a negative, a tie counting half
    (Mann-Whitney U)."""
    if len(positives) == 0 or len(negatives) == 0:
        return float("nan")
    lower = np.searchsorted(negatives, positives, side="left") + np.searchsorted(negatives, positives, side="right")
    return float(lower.sum() / 2 / len(positives) / len(negatives))


def _ranking_score(function, targets, scores, average):
    _check_average(average, "micro", "macro", "weighted", None)
    positive, known, scores = _check_both(targets, scores, "scores")
    if average == "micro":
        return function(np.sort(scores[positive]), np.sort(scores[known & ~positive]))
    values = np.array([function(*pair) for pair in _sorted_scores(positive, known, scores)])
    return _average(values, average, _count(positive, 0))


def average_precision(targets, scores, average="macro"):
    """Average precision, the area under the precision-recall curve as steps: sum over n of (R_n -
    R_(n-1)) P_n.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite, higher for a likelier label. average:
    "macro" (the mean over classes, mAP), "micro", "weighted" by positives, or None -> (C,). 0 for a
    class without a known positive.

    >>> average_precision([[1], [0], [1]], [[0.9], [0.8], [0.7]])
    0.8333333333333333
    """
    return _ranking_score(_average_precision, targets, scores, average)


def roc_auc(targets, scores, average="macro"):
    """Area under the ROC curve. Arguments as in average_precision().

    NaN for a class without a known positive or without a known negative; so is then the mean over
    classes.

    >>> roc_auc([[1], [0], [1]], [[0.9], [0.8], [0.7]])
    0.5
    """
    return _ranking_score(_roc_auc, targets, scores, average)


def precision_recall_curve(targets, scores):
    """The precision-recall curve of one class -> (precision (K+1,), recall (K+1,), thresholds
    (K,)).

    targets (N,) with 0, 1, NaN; scores (N,), finite. `thresholds` are the K distinct scores of the
    known rows, ascending; precision[k] and recall[k] are those of `scores >= thresholds[k]`; the
    last point is precision 1, recall 0. Without a known positive recall is 1 before that point, as
    in scikit-learn; without a known label K is 0.

    >>> precision, recall, thresholds = precision_recall_curve([1, 0, 1], [0.9, 0.8, 0.7])
    >>> recall
    array([1. , 0.5, 0.5, 0. ])
    """
    positive, known, scores = _check_both(targets, scores, "scores", ndim=1)
    thresholds = np.unique(scores[known])
    hits = _at_least(np.sort(scores[positive]), thresholds)
    precision = hits / _at_least(np.sort(scores[known]), thresholds)
    recall = hits / hits[0] if hits.any() else np.ones(len(hits))
    return np.append(precision, 1.0), np.append(recall, 0.0), thresholds


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: probabilities that mean what they say


def logit(probabilities):
    """log(p / (1 - p)) of probabilities, kept 1e-7 away from 0 and 1 -> float64."""
    p = np.clip(np.asarray(probabilities, float), 1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))


def sigmoid(logits):
    """1 / (1 + exp(-z)) -> float64."""
    return 0.5 + 0.5 * np.tanh(0.5 * np.asarray(logits, float))


def calibrate(probabilities, scale, offsets):
    """Probabilities (N, C) with logits z -> those with the logits scale * z + offsets, float64 (N,
    C)."""
    return sigmoid(scale * logit(probabilities) + offsets)


def fit_calibration(targets, probabilities):
    """What makes probabilities honest -> (scale, a float; offsets (C,)) for calibrate().

    targets (N, C) with 0, 1, NaN; probabilities (N, C). The two minimise the log loss, summed over
    the known labels, plus twice the squares of log(scale) and of the offsets: normal priors with a
    standard deviation of 0.5, which keep a class with few labels near offset 0. It is temperature
    scaling (Guo et al. 2017) with a bias per class; the steps are Newton's.

    >>> scale, offsets = fit_calibration([[1], [0], [0], [0]], [[0.9], [0.9], [0.8], [0.8]])
    >>> calibrate([[0.9], [0.8]], scale, offsets).round(2).tolist()
    [[0.73], [0.62]]
    """
    positive, known, probabilities = _check_both(targets, probabilities, "probabilities")
    z = logit(probabilities)

    def objective(theta):
        logits = np.exp(theta[0]) * z + theta[1:]
        return np.logaddexp(0, np.where(positive, -logits, logits))[known].sum() + 2 * (theta**2).sum()

    theta = np.zeros(z.shape[1] + 1)  # log(scale), offsets
    value = objective(theta)
    for _ in range(100):
        scaled = np.exp(theta[0]) * z
        p = sigmoid(scaled + theta[1:])
        error = np.where(known, p - positive, 0)
        weight = np.where(known, p * (1 - p), 0)
        gradient = 4 * theta + np.append((error * scaled).sum(), error.sum(axis=0))

        # Newton's step. Only log(scale) shares second derivatives with the offsets, which are eliminated first. If the
        # objective bends down along log(scale), the part of the curvature that can be negative is left out.
        of_offsets = 4 + weight.sum(axis=0)
        mixed = (weight * scaled).sum(axis=0)
        curvature = 4 + (weight * scaled**2).sum() - (mixed**2 / of_offsets).sum()
        bend = (error * scaled).sum()
        curvature += bend if curvature + bend > 0 else 0
        step = np.empty_like(theta)
        step[0] = (gradient[0] - (mixed * gradient[1:] / of_offsets).sum()) / curvature
        step[1:] = (gradient[1:] - mixed * step[0]) / of_offsets

        # A long step may overshoot: at most 1, and halved until the objective falls
        step /= max(1, np.abs(step).max())
        while objective(theta - step) > value and np.abs(step).max() > 1e-9:
            step /= 2
        theta -= step
        value = objective(theta)
        if np.abs(step).max() < 1e-9:
            break
    return float(np.exp(theta[0])), theta[1:]


def reliability_curve(targets, probabilities, bins=15):
    """How often labels were there, by the probability that was predicted -> (mean probability,
    share of positives, number of labels), each (bins,), for equal steps of probability over all
    known labels; NaN where there are none.

    targets (N, C) with 0, 1, NaN; probabilities (N, C).
    """
    return _reliability(*_check_both(targets, probabilities, "probabilities"), bins)


def _reliability(positive, known, scores, bins=15):
    counts, predicted, there = np.zeros((3, bins))
    for p, label in _known_labels(positive, known, scores):
        step = np.minimum((p * bins).astype(int), bins - 1)
        counts += np.bincount(step, minlength=bins)
        predicted += np.bincount(step, p, bins)
        there += np.bincount(step, label, bins)
    with np.errstate(invalid="ignore"):
        return predicted / counts, there / counts, counts.astype(int)


def _known_labels(positive, known, scores):
    """Yield (scores as float64, whether they are positive) of the known labels of some rows at a
    time, which takes less memory than all."""
    for start in range(0, len(known), 4096):
        rows = slice(start, start + 4096)
        yield scores[rows][known[rows]].astype(float), positive[rows][known[rows]]


def calibration_error(targets, probabilities):
    """Expected calibration error (Guo et al. 2017), in [0, 1]: the mean distance between the two
    curves of reliability_curve(), weighted by the number of labels; 0 when no label is known.
    Arguments as there."""
    return _calibration_error(*_check_both(targets, probabilities, "probabilities"))


def _calibration_error(positive, known, scores):
    if not _are_probabilities(scores):
        return float("nan")
    mean, share, counts = _reliability(positive, known, scores)
    return float(_divide(np.nansum(counts * np.abs(mean - share)), counts.sum()))


def brier_score(targets, probabilities):
    """The mean squared distance of the known labels from their probabilities, in [0, 1]; 0 when no
    label is known.

    targets (N, C) with 0, 1, NaN; probabilities (N, C).

    >>> brier_score([[1, 0], [1, float("nan")]], [[0.5, 0.5], [1, 1]])
    0.16666666666666666
    """
    return _honesty(*_check_both(targets, probabilities, "probabilities"))["brier"]


def log_loss(targets, probabilities):
    """The mean binary cross-entropy of the known labels; 0 when no label is known. Arguments as of
    brier_score(); probabilities are kept 1e-7 away from 0 and 1."""
    return _honesty(*_check_both(targets, probabilities, "probabilities"))["log_loss"]


def _are_probabilities(scores):
    return scores.min() >= 0 and scores.max() <= 1


def _honesty(positive, known, scores):
    """The two of them -> dict; NaN for scores that are no probabilities."""
    if not _are_probabilities(scores):
        return {"brier": float("nan"), "log_loss": float("nan")}
    squares = 0.0
    losses = 0.0
    for p, label in _known_labels(positive, known, scores):
        squares += np.sum((p - label) ** 2)
        p = np.clip(p, 1e-7, 1 - 1e-7)
        losses -= np.sum(np.log(np.where(label, p, 1 - p)))
    total = np.count_nonzero(known)
    return {
        "brier": float(_divide(squares, total)),
        "log_loss": float(_divide(losses, total)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds


def find_thresholds(targets, scores, method="soft", max_threshold=None):
    """A threshold per class -> (C,) float64; a label is present when its score >= its threshold.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite. method:
      "soft"      what does not lean on single images, for probabilities. Each is counted as present by
                  sigmoid((z - t) / 0.5), z its logit, and t the best F1 of the class with such counts, on a grid of 241
                  steps from -6 to 6, or the lowest z when that is higher. With n positives known the logit of the
                  threshold is (n t + 50 e) / (n + 50): e is that of half the best F1 which the probabilities themselves
                  expect, the best threshold if they are right (Lipton, Elkan & Naryanaswamy 2014). A class without a
                  positive gets e.
      "pr_curve"  the score with the best F1 of the class; the lowest of equals. F1 is best at the score of a positive.
      "grid"      the same among 41 steps from 0 to 1.
      "global"    one value for all classes, by F1 weighted by positives, among the scores of positives (evenly thinned
                  to 1,000 when there are more).
      a number    that number, for all classes.
    By the others a class without a known positive gets 0.5. A threshold beyond `max_threshold`
    becomes 0.5.

    >>> find_thresholds([[1, 0], [0, 0], [1, 0]], [[0.9, 0.1], [0.3, 0.2], [0.6, 0.3]], "pr_curve")
    array([0.6, 0.5])
    """
    positive, known, scores = _check_both(targets, scores, "scores")
    if isinstance(method, (int, float)) and not isinstance(method, bool):
        return np.full(scores.shape[1], float(method))
    if method not in ("soft", "pr_curve", "grid", "global"):
        raise ValueError(f"method is {method!r}: it must be soft, pr_curve, grid, global or a number")
    if method == "soft":
        _refuse((scores < 0) | (scores > 1), scores, "scores", "a probability, from 0 to 1")
        thresholds = np.array([_soft_threshold(*pair) for pair in _sorted_scores(positive, known, scores)])
    elif method == "global":
        thresholds = np.full(scores.shape[1], _best_global(positive, known, scores))
    else:
        grid = GRID if method == "grid" else None
        thresholds = np.array([_best_threshold(*pair, grid) for pair in _sorted_scores(positive, known, scores)])
    if max_threshold is not None:
        thresholds[thresholds > max_threshold] = FALLBACK
    return thresholds


def _soft_threshold(positives, negatives):
    """The soft threshold of one class, a probability; 0.5 when no label is known."""
    p = np.sort(np.concatenate([positives, negatives]).astype(float))[::-1]
    if len(p) == 0:
        return FALLBACK
    hits = _soft_counts(positives)
    f1 = 2 * hits / (hits + _soft_counts(negatives) + len(positives))
    best = max(LOGITS[np.argmax(f1)], logit(p[-1]))
    expected_f1 = 2 * np.cumsum(p) / (np.arange(1, len(p) + 1) + p.sum())  # of taking the highest 1, 2, ...
    expected = logit(expected_f1.max() / 2)
    n = len(positives)
    return sigmoid((n * best + PRIOR * expected) / (n + PRIOR))


def _soft_counts(scores):
    """How many of the scores of one class lie above each of LOGITS, counted softly."""
    counts = np.zeros(len(LOGITS))
    steps = np.exp(LOGITS / SOFTNESS)
    for start in range(0, len(scores), 4096):
        below = np.exp(-logit(scores[start : start + 4096]) / SOFTNESS)
        counts += (1 / (1 + below[:, None] * steps)).sum(axis=0)
    return counts


def _f1_at(positives, negatives, thresholds):
    """F1 of one class at each threshold."""
    hits = _at_least(positives, thresholds)
    return _divide(2 * hits, hits + _at_least(negatives, thresholds) + len(positives))


def _best_threshold(positives, negatives, grid=None):
    """The lowest of the values with the best F1 of one class: on the grid, or among the scores of
    positives."""
    if len(positives) == 0:
        return FALLBACK
    candidates = np.unique(positives) if grid is None else grid
    return candidates[np.argmax(_f1_at(positives, negatives, candidates))]


def _best_global(positive, known, scores):
    """The score with the best F1 weighted by positives, among those of positives, or 1,000 of
    them."""
    candidates = np.unique(scores[positive])
    if len(candidates) == 0:
        return FALLBACK
    chosen = np.linspace(0, len(candidates) - 1, min(1000, len(candidates))).round().astype(int)
    candidates = candidates[chosen]
    total = np.zeros(len(candidates))
    for positives, negatives in _sorted_scores(positive, known, scores):
        total += len(positives) * _f1_at(positives, negatives, candidates)
    return candidates[np.argmax(total)]


def between_scores(thresholds, scores):
    """Thresholds that lie on a score, moved halfway to the next lower one of their class, or to 0
    -> (C,) float64.

    The decisions on these scores (N, C), probabilities, stay as they are, and no longer depend on
    how a processor rounds. Thresholds (C,) that are not among the scores stay too.

    >>> between_scores([0.8, 0.5], [[0.2, 0.1], [0.8, 0.9], [0.4, 0.3]])
    array([0.6, 0.5])
    """
    thresholds = np.array(thresholds, float)
    for c, column in enumerate(np.asarray(scores, float).T):
        if (column == thresholds[c]).any():
            lower = column[column < thresholds[c]]
            thresholds[c] = (thresholds[c] + lower.max(initial=0)) / 2
    return thresholds


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(targets, scores, thresholds, classes, intervals=False):
    """Everything about one split -> dict of plain Python values, ready for JSON but for NaN.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite; thresholds (C,), one number, or (N, C)
    where they differ by row, of which per_class has the median; classes: C different names.

    Keys: rows, the names in HEADLINES (floats; ece, brier and log_loss are NaN where scores are no
    probabilities), classes_judged (how many classes have a known positive), f1_macro_judged and
    map_judged (the means over these classes), roc_auc_macro_judged (the mean over those that have a
    known negative too), NaN where there are none, and per_class: name -> precision, recall, f1,
    average_precision, roc_auc, threshold, positives, negatives, na (counts), prevalence (positives
    among the known).

    intervals=True (or anything else that is true) adds "intervals": name -> [low, high], the 95 %
    intervals of the headlines but ROC AUC and ECE. A class with fewer than 4 known positives says too
    little of itself, so those of f1_macro and map are there only if every class has 4. If just some
    classes have, the means over these are f1_macro_supported and map_supported, and these have the
    intervals, unless they are fewer than half of the classes with a positive. classes_supported says
    how many classes they cover. A number that no single row changes has no interval, such as those of
    perfect predictions.

    >>> report([[1, 0], [0, 1]], [[0.9, 0.2], [0.1, 0.4]], 0.5, ["cat", "dog"])["f1_macro"]
    0.5
    """
    positive, known, scores = _check_both(targets, scores, "scores")
    if len(classes) != positive.shape[1]:
        raise ValueError(f"classes has {len(classes)} names, but targets has {positive.shape[1]} columns")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes has a name twice: {', '.join(map(str, classes))}")
    thresholds = np.atleast_2d(np.asarray(thresholds, float))  # a row for all, or one for each
    present = scores >= thresholds
    headlines, columns = _measure(positive, known, scores, present)
    columns["threshold"] = np.broadcast_to(np.median(thresholds, axis=0), len(classes))
    result = {"rows": len(known)} | headlines | {"ece": _calibration_error(positive, known, scores), "per_class": {}}
    for c, name in enumerate(classes):
        result["per_class"][name] = {key: values[c].item() for key, values in columns.items()}
    if intervals:
        _add_intervals(result, positive, known, scores, present)
    return result


def _measure(positive, known, scores, present):
    """-> the headlines of a report but the ECE, which is higher in every resample, and its columns,
    (C,) each: two dicts."""
    present = present & known
    precision, recall, f1 = _precision_recall_f1(positive, known, present, None)
    ranking = [(_average_precision(*pair), _roc_auc(*pair)) for pair in _sorted_scores(positive, known, scores)]
    average_precisions, aucs = np.array(ranking).T
    positives = _count(positive, 0)
    known_count = _count(known, 0)
    judged = positives > 0
    headlines = {
        "hamming_loss": _share(positive ^ present, known),
        "subset_accuracy": _subset_accuracy(positive, known, present),
        "f1_micro": _precision_recall_f1(positive, known, present, "micro")[2],
        "f1_macro": _average(f1, "macro", positives),
        "f1_weighted": _average(f1, "weighted", positives),
        "f1_samples": _precision_recall_f1(positive, known, present, "samples")[2],
        "map": float(average_precisions.mean()),
        "roc_auc_macro": float(aucs.mean()),
        **_honesty(positive, known, scores),
        "classes_judged": int(judged.sum()),
        "f1_macro_judged": _mean(f1[judged]),
        "map_judged": _mean(average_precisions[judged]),
        "roc_auc_macro_judged": _mean(aucs[~np.isnan(aucs)]),
    }
    columns = {
        "precision": precision, "recall": recall, "f1": f1, "average_precision": average_precisions, "roc_auc": aucs,
        "positives": positives, "negatives": known_count - positives,
        "na": len(known) - known_count, "prevalence": _divide(positives, known_count),
    }
    return headlines, columns


def _mean(values):
    """Return the mean of an array, NaN if it is empty."""
    return float(values.mean()) if len(values) else float("nan")


def _cell(value):
    """A table cell: a float with three decimals, None and NaN as n/a."""
    if value is None or value != value:
        return "n/a"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def shorten(text, width):
    """`text` in at most `width` characters, the middle replaced by an ellipsis."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def _format_judged(report):
    """Return lines of text about the classes with too few known positives, and the means over the others."""
    lines = []
    classes = len(report["per_class"])
    unjudged = classes - report["classes_judged"]

    if unjudged:
        lines.append(f"classes without a known positive, which count as 0 in f1_macro and map: {unjudged} of {classes}")

    differ = _differ_from_headlines([report])
    if differ:
        lines.append("over the judged classes: " + _format_values(report, differ))

    supported = report.get("classes_supported", classes)
    if supported < classes:
        lines.append(_explain_intervals(supported, classes))
    if 0 < supported < classes:
        lines.append(_format_values(report, ["f1_macro_supported", "map_supported"]))
    return lines


def _explain_intervals(supported, classes):
    """Return the sentence that says which classes the intervals of f1_macro and map cover, empty if they cover all."""
    if supported == classes:
        return ""
    if supported == 0:
        return f"no interval of f1_macro and map: too few classes have at least {MIN_POSITIVES} known positives"
    return f"intervals of f1_macro and map cover the {supported} classes with at least {MIN_POSITIVES} known positives"


def _format_values(report, names):
    """Return some numbers of a report as a line of text, each with its interval if it has one."""
    texts = []
    for name in names:
        texts.append(f"{name} {_cell(report[name])}")
        if name in report.get("intervals", {}):
            texts[-1] += " [{:.3f}, {:.3f}]".format(*report["intervals"][name])
    return "   ".join(texts)


def _differ_from_headlines(reports):
    """Return those of JUDGED that are not the same as their headline in all reports (dicts) that have them."""

    def differs(report, name):
        value = report.get(name)
        return value is not None and value == value and value != report.get(name.removesuffix("_judged"))

    return [name for name in JUDGED if any(differs(report, name) for report in reports)]


REPORT_COLUMNS = {  # column of the report's table -> its title, as wide as the column
    "precision": "precision", "recall": "recall", "f1": "   F1", "average_precision": "   AP", "roc_auc": "  AUC",
    "threshold": "threshold", "positives": "positives", "negatives": "negatives", "na": "    NA",
}


def format_report(report, most=30):
    """A report() as text: the headline numbers and an aligned table of the classes, at most 100
    columns wide.

    Of more than `most` classes the table has those with the lowest and those with the highest
    average precision.

    >>> numbers = report([[1], [0]], [[0.9], [0.1]], 0.5, ["cat"])
    >>> print(format_report(numbers).splitlines()[0])
    hamming_loss 0.000   subset_accuracy 1.000   map 1.000   roc_auc_macro 1.000
    """
    names = sorted(HEADLINES, key=lambda name: name.startswith("f1"))  # the four F1s last
    per_line = 2 if "intervals" in report else 4
    lines = [_format_values(report, names[start : start + per_line]) for start in range(0, len(names), per_line)]

    per_class = report["per_class"]
    lines += _format_judged(report)
    width = max(5, min(28, max(map(len, per_class))))
    lines += ["", " ".join(["class".ljust(width), *REPORT_COLUMNS.values()])]
    names = list(per_class)
    if len(names) > most:
        names.sort(key=lambda name: per_class[name]["average_precision"])
        names = [*names[: most // 2], None, *names[most // 2 - most :]]
    for name in names:
        if name is None:
            lines.append(f"... {len(per_class) - most} classes between the worst and the best: metrics.json has all")
            continue
        cells = [_cell(per_class[name][column]).rjust(len(title)) for column, title in REPORT_COLUMNS.items()]
        lines.append(" ".join([shorten(name, width).ljust(width), *cells]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals: how far a number may be from that of very many images like these
#
# They follow from the jackknife: how much a number changes when a row is left out. Resampling rows (the bootstrap) does
# worse here. A resample may lack a class, and the positives that it has twice raise the average precision.
# `tests/bench.py intervals` simulates how often the intervals cover the truth; it chose what is below.


def _add_intervals(result, positive, known, scores, present):
    """Add to a report what intervals=True asks for."""
    result["classes_supported"] = int(_supported_classes(_count(positive, 0)).sum())
    result["intervals"] = {}
    for name, (value, without) in _jackknife(positive, known, scores, present).items():
        result.setdefault(name, value)  # the means over the supported classes are new
        reach = _reach(value, without)
        if reach:
            result["intervals"][name] = _interval(name, value, *reach)


def _supported_classes(positives):
    """Return which classes the intervals of f1_macro and map cover, (C,) boolean. positives: known ones of each, (C,).

    They cover those with MIN_POSITIVES, but none if these are fewer than half of the classes with a positive: they
    would mostly be classes that have this many by chance, which raises their average precision.
    """
    enough = positives >= MIN_POSITIVES
    return enough & (2 * enough.sum() >= np.count_nonzero(positives))


def paired_differences(targets, scores, thresholds, other_scores, other_thresholds):
    """Compare two models on the same images: return {name: (value, other value, difference, low, high)}.

    targets (N, C) with 0, 1, NaN; both scores (N, C), finite; both thresholds as of report(). The names
    are those of the headlines but ROC AUC and ECE, and of the means over supported classes that report()
    explains. difference is other value - value; low and high are its 95 % interval, or None where it has
    none, as in report().
    """
    positive, known, scores = _check_both(targets, scores, "scores")
    other_scores = _check_both(targets, other_scores, "scores")[2]
    one = _jackknife(positive, known, scores, scores >= thresholds)
    other = _jackknife(positive, known, other_scores, other_scores >= other_thresholds)

    result = {}
    for name in [name for name in one if name in other]:
        (value, without), (other_value, other_without) = one[name], other[name]
        difference = other_value - value
        reach = _reach(difference, other_without - without)
        low = high = None
        if reach:
            most = np.inf if name == "log_loss" else 1.0
            low, high = max(difference - reach[0], -most), min(difference + reach[1], most)
        result[name] = value, other_value, difference, low, high
    return result


def _jackknife(positive, known, scores, present):
    """Return {name: (value, values (N,) without row 0, row 1, ...)} of the headlines but ROC AUC and ECE.

    If some classes have too few known positives, f1_macro and map do not change, which leaves them without an interval,
    and f1_macro_supported and map_supported are over the other classes.
    """
    headlines, columns = _measure(positive, known, scores, present)
    present = present & known
    positives = columns["positives"]
    supported = _supported_classes(positives)
    probabilities = _are_probabilities(scores)

    # Class by class, as all values of all classes at once would take many times the memory of the scores.
    f1_macro, f1_weighted, average_precision, squares, losses = np.zeros((5, len(known)))
    for c in range(len(positives)):
        is_positive, is_known, score, is_present = (array[:, c] for array in (positive, known, scores, present))
        f1 = _ratio_without(2 * (is_positive & is_present), is_positive.astype(int) + is_present)
        f1_weighted += f1 * (positives[c] - is_positive)
        if supported[c]:
            f1_macro += f1 / supported.sum()
            average_precision += _average_precision_without(is_positive, is_known, score) / supported.sum()
        if probabilities:
            p = score.astype(float)
            squares += np.where(is_known, (p - is_positive) ** 2, 0)
            p = np.clip(p, 1e-7, 1 - 1e-7)
            losses -= np.where(is_known, np.log(np.where(is_positive, p, 1 - p)), 0)

    judged = known.any(axis=1)
    wrong = positive ^ present
    hits, counted = _count(positive & present, 1), _count(positive, 1) + _count(present, 1)
    known_count = _count(known, 1)
    without = {
        "hamming_loss": _ratio_without(_count(wrong, 1), known_count),
        "subset_accuracy": _ratio_without(judged & ~wrong.any(axis=1), judged),
        "f1_micro": _ratio_without(2 * hits, counted),
        "f1_weighted": _divide(f1_weighted, positives.sum() - _count(positive, 1)),
        "f1_samples": _ratio_without(_divide(2 * hits, counted), judged),
    }
    if probabilities:
        without |= {"brier": _ratio_without(squares, known_count), "log_loss": _ratio_without(losses, known_count)}
    result = {name: (headlines[name], values) for name, values in without.items()}
    if not supported.all():
        result |= {name: (headlines[name], np.full(len(known), headlines[name])) for name in ("f1_macro", "map")}
    if supported.any():
        suffix = "" if supported.all() else "_supported"
        result[f"f1_macro{suffix}"] = float(columns["f1"][supported].mean()), f1_macro
        result[f"map{suffix}"] = float(columns["average_precision"][supported].mean()), average_precision
    return result


def _ratio_without(numerator, denominator):
    """Return sum(numerator) / sum(denominator), both (N,), without each of the N rows; 0 where that is 0 / 0."""
    return _divide(numerator.sum() - numerator, denominator.sum() - denominator)


def _average_precision_without(positive, known, scores):
    """Return the average precision of one class, with two positives or more, without each of its rows (N,)."""
    positives = np.sort(scores[positive])
    hits = _at_least(positives, positives)
    ranks = _at_least(np.sort(scores[known]), positives)
    precision = hits / ranks

    # What the precisions at all positives that score no more than a row gain when it is left out: a negative takes
    # away 1 from their ranks, a positive 1 from their hits too. Rank 1 is that of a positive which goes itself.
    fewer = np.maximum(ranks - 1, 1)
    below = np.searchsorted(positives, scores, side="right")
    gain = np.append(0, np.cumsum(hits / fewer - precision))[below]
    total = precision.sum() + np.where(known, gain, 0)
    result = total / len(positives)

    gone = np.append(0, np.cumsum((hits - 1) / fewer - precision))[below]
    own = ((hits - 1) / fewer)[below - 1]
    result[positive] = ((precision.sum() + gone - own) / (len(positives) - 1))[positive]
    return result


def _reach(value, without):
    """Return how far the 95 % interval of a value reaches (down, up); None if no row changes the value.

    without: (N,), the value without each row. The standard error is the jackknife's (Tukey 1958). If it rests on few
    rows, such as the positives of rare classes, it is itself uncertain: Student's t gets the degrees of freedom that
    match the variance of its square. The jackknife also estimates the bias, and the interval is longer by twice that:
    on few positives average precision is too high and F1 too low, and some classes are only covered because they
    happen to have more positives than usual, which the jackknife cannot see.
    """
    count = len(without)
    moves = without - without.mean()
    squares = (moves**2).sum()
    if count < 2 or np.abs(moves).max() < 1e-12:
        return None
    error = np.sqrt((count - 1) / count * squares)
    freedom = min(count - 1, 2 / max((moves**4).sum() / squares**2 - 1 / count, 1e-9))
    reach = np.interp(1 / freedom, *STUDENT_T.T) * error
    bias = (count - 1) * (without.mean() - value)
    return float(reach + 2 * max(bias, 0)), float(reach + 2 * max(-bias, 0))


def _interval(name, value, down, up):
    """Return [low, high] around a value that the interval reaches down and up from. It does so on the scale of logits,
    log_loss on that of logarithms, as no value is below 0 and only log_loss is above 1."""
    if name == "log_loss":
        low, high = value * np.exp(-down / value), value * np.exp(up / value)
    else:
        slope = max(value * (1 - value), 1e-12)  # 0 if the value is 1 because of the only row that can be judged
        low, high = sigmoid(logit(value) - down / slope), sigmoid(logit(value) + up / slope)
    return [float(min(low, value)), float(max(high, value))]


# ---------------------------------------------------------------------------------------------------------------------
# Results table


def read_run(folder):
    """What a run left in `folder` (config.json and metrics.json) -> dict of options and scores, its
    name as "run".

    Raises ValueError that names the file when metrics.json is missing or one of them is not a JSON
    object.
    """
    folder = Path(folder)
    if not os.path.exists(folder / "metrics.json"):  # which is also False for a name that is too long
        raise ValueError(f"{folder} is not the folder of a finished run: it has no metrics.json")
    row = {"run": str(folder)}
    for path in (folder / "config.json", folder / "metrics.json"):
        content = read_json(path) if path.exists() else {}
        row |= {key: value for key, value in content.items() if not isinstance(value, dict)}
    return row


def read_json(path):
    """Return the JSON object that a run wrote, a dict with None for NaN and infinities. Raise ValueError for others."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_parse_int, parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not what a run writes: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what a run writes: it holds no JSON object")
    return content


def _parse_int(digits):
    """Return an integer of a JSON file. Raise ValueError if it is larger than any float, as scores are compared."""
    if len(digits) > 300:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def read_predictions(folder):
    """What a run predicted for the images it reports -> (IDs, classes, targets (N, C), scores (N,
    C), thresholds (C,), or (N, C) of folds). Raises ValueError."""
    folder = Path(folder)
    split = read_run(folder).get("split")
    ids, classes, scores = _read_numbers(folder / "probabilities.csv")
    names, columns, targets = _read_numbers(folder / f"{'train' if split == 'folds' else split}_metadata.csv")
    row_of = {name: row for row, name in enumerate(names)}
    column_of = {name: column for column, name in enumerate(columns)}
    thresholds = read_json(folder / "thresholds.json")
    try:
        targets = targets[[row_of[name] for name in ids]][:, [column_of[name] for name in classes]]
        thresholds = [thresholds[name] for name in classes]
    except KeyError as error:
        raise ValueError(f"{folder}: {error} is not in all files of the run: were they changed?") from None

    if not all(isinstance(threshold, (int, float)) for threshold in thresholds):
        raise ValueError(f"{folder / 'thresholds.json'} is not what a run writes: a threshold is not a number")
    if split == "folds":
        *titles, thresholds = _read_numbers(folder / "fold_thresholds.csv")
        if titles != [ids, classes]:
            raise ValueError(f"{folder}: fold_thresholds.csv has other images or classes than probabilities.csv: "
                             "were they changed?")
    try:
        _check_both(targets, scores, "scores")
    except ValueError as error:
        raise ValueError(f"{folder}: the labels and probabilities.csv do not fit: {error}") from None
    return ids, classes, targets, scores, np.array(thresholds)


def _read_numbers(path):
    """A CSV file of a run with an ID and numbers -> (IDs, titles of the columns, float64 (N, C)),
    NaN for NA."""
    ids, values = [], []
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            for row in reader:
                if len(row) != len(header):
                    raise ValueError(f"line {reader.line_num} has {len(row)} cells instead of {len(header)}")
                ids.append(row[0])
                values.append([float("nan" if cell == "NA" else cell) for cell in row[1:]])
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not values:
        raise ValueError(f"{path} has no rows")
    return ids, header[1:], np.array(values)


def paired_table(folders):
    """Two runs on the same images -> their headlines side by side, as text. Raises ValueError."""
    (ids, classes, targets, scores, thresholds), other = map(read_predictions, folders)
    if set(ids) != set(other[0]) or classes != other[1]:
        raise ValueError(f"{folders[0]} and {folders[1]} report other images or classes: give both the same data and "
                         "--seed, or evaluate both on one labelled folder")
    row_of = {name: row for row, name in enumerate(other[0])}
    order = [row_of[name] for name in ids]
    table = [["", *map(str, folders), "difference", "95 % interval"]]
    other_thresholds = np.broadcast_to(other[4], scores.shape)[order]
    differences = paired_differences(targets, scores, thresholds, other[3][order], other_thresholds)
    for name, (one, two, difference, low, high) in differences.items():
        interval = "none"
        if low is not None:
            interval = f"[{low:+.3f}, {high:+.3f}]" + ("" if low > 0 or high < 0 else "  noise")
        table.append([name, _cell(one), _cell(two), f"{difference:+.3f}", interval])
    text = _aligned(table)

    too_few = _explain_intervals(_supported_classes((targets == 1).sum(axis=0)).sum(), len(classes))
    return f"{text}\n{too_few}" if too_few else text


def _aligned(table):
    """Lines of cells as text, in columns."""
    table = list(table)
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


OPTION_COLUMNS = ("preset", "backbone", "head", "size", "epochs", "batch_size", "lr", "lr_backbone", "train_layers",
                  "unfreeze", "augment", "pos_weight", "thresholds", "seed")  # shown where runs differ
SCORE_COLUMNS = ("split", "val_loss", "val_f1_weighted", *HEADLINES, *JUDGED)


def results_table(rows, sort="f1_macro", ascending=False, group_by=(), group_mode="best"):
    """Runs as rows -> the text of a table, sorted by a score or an option; the best of each score
    has a *.

    rows: dicts of read_run(). Options are shown where runs differ in them. group_by: names of
    options; one row is kept for each combination of their values: the first in the sort order, or,
    with group_mode "mean", the mean of the scores. Raises ValueError for a name that no run has.
    """
    for name in [sort, *group_by]:
        if not any(name in row for row in rows):
            names = sorted({key for row in rows for key in row})
            raise ValueError(f"no run has {name!r}; there is {', '.join(names)}")
    rows = _in_order(rows, sort, ascending)
    if group_by:
        groups = {}
        for row in rows:
            groups.setdefault(tuple(str(row.get(name)) for name in group_by), []).append(row)
        rows = [_mean_row(group_by, group) if group_mode == "mean" else group[0] for group in groups.values()]
        rows = _in_order(rows, sort, ascending)
    differing = [name for name in OPTION_COLUMNS if len({str(row.get(name)) for row in rows}) > 1]
    differ = _differ_from_headlines(rows)
    scores = [name for name in SCORE_COLUMNS if name not in JUDGED or name in differ]
    table = []
    for name in dict.fromkeys(["run", *group_by, *differing, *scores, sort]):
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            table.append([name, *_result_cells(name, values)])
    return _aligned(zip(*table))


def _in_order(rows, name, ascending):
    """Rows by the value of `name`: numbers by size, words by alphabet, and what is not there
    last."""

    def key(row):
        number = isinstance(row[name], (int, float))
        return number, row[name] if number else str(row[name])

    there = [row for row in rows if row.get(name) is not None]
    return sorted(there, key=key, reverse=not ascending) + [row for row in rows if row.get(name) is None]


def _mean_row(group_by, group):
    """The mean of the scores of a group of runs that share the options in group_by."""
    row = {"run": f"mean of {len(group)}"} | {name: group[0].get(name) for name in group_by}
    for name in SCORE_COLUMNS:
        values = _numbers(run.get(name) for run in group)
        if values:
            row[name] = float(np.mean(values))
    return row


def _numbers(values):
    return [value for value in values if isinstance(value, (int, float))]


def _result_cells(name, values):
    """A column of the results table: scores with three decimals and * at the best, options as they
    were given."""
    if name not in SCORE_COLUMNS:
        return [f"{value:g}" if isinstance(value, float) else _cell(value) for value in values]
    numbers = _numbers(values)
    best = None
    if len(numbers) > 1:
        best = min(numbers) if name in LOWER_IS_BETTER else max(numbers)
    return [_cell(value) + ("*" if value is not None and value == best else "") for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a wrong option as a ValueError."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def main(argv=None):
    """The command line; returns the text of the table it prints."""
    parser = ArgumentParser(prog="metrics.py", description="Print the results of runs as a table; * is the best.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="a folder that train.py wrote")
    add("--sort", default="f1_macro", metavar="NAME", help="a score or an option (default: %(default)s)")
    add("--ascending", action="store_true", help="lowest first")
    add("--group-by", default="", metavar="A,B", help="one row for each combination of these options")
    add("--group-mode", choices=("best", "mean"), default="best", help="what a group shows (default: %(default)s)")
    add("--paired", action="store_true", help="compare two runs that report the same images")
    options = parser.parse_args(argv)
    if options.paired and len(options.runs) != 2:
        raise ValueError("--paired compares two runs: name two")
    if options.paired:
        text = paired_table(options.runs)
        print(text)
        return text
    rows = [read_run(folder) for folder in options.runs]
    group_by = [name for name in options.group_by.split(",") if name]
    text = results_table(rows, options.sort, options.ascending, group_by, options.group_mode)
    print(text)
    return text


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
