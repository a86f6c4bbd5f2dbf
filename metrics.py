"""Multi-label metrics in plain numpy that skip unknown labels.

    python metrics.py outputs/*                      # the results table of several runs
    python metrics.py outputs/* --sort map --group-by backbone

    import metrics
    thresholds = metrics.find_thresholds(targets, scores, "pr_curve")
    print(metrics.format_report(metrics.report(targets, scores, thresholds, classes)))

`targets` is always (N, C) with 1, 0 and NaN for an unknown label (NA); `scores` is (N, C), finite, and
`predictions` is (N, C) with 0 and 1. A number means what scikit-learn means by it, with `zero_division=0`, taken
over the known labels alone. Three consequences are worth knowing:

* A class without a known positive has precision, recall, F1 and average precision 0, and the macro mean counts it.
* ROC AUC is NaN for a class without a known positive or without a known negative, and so is then the macro mean.
* A row without a known label is left out of the row-wise numbers (subset accuracy, `average="samples"`).

Wrong input is a ValueError that names the argument and the first offending place.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

GRID = np.linspace(0, 1, 41)  # what find_thresholds(method="grid") tries
FALLBACK = 0.5  # the threshold of a class that val says nothing about
HEADLINES = ("hamming_loss", "subset_accuracy", "f1_micro", "f1_macro", "f1_weighted", "f1_samples", "map",
             "roc_auc_macro")


# ---------------------------------------------------------------------------------------------------------------------
# Input, checked once


def _first(wrong):
    """"[i, j]" of the first True in a boolean array."""
    return "[" + ", ".join(str(int(i)) for i in np.unravel_index(np.argmax(wrong), wrong.shape)) + "]"


def _array(values, name, ndim=2):
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, not {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, not shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: shape {array.shape}" + (" has no classes" * (array.shape[-1] == 0)))
    return array


def _check_targets(targets, ndim=2):
    """-> (positive, known), boolean, the shape of `targets`."""
    targets = _array(targets, "targets", ndim)
    positive = targets == 1
    known = targets == 0
    known |= positive
    unknown = known.size - np.count_nonzero(known)
    if unknown and np.count_nonzero(targets != targets) != unknown:  # NaN alone is not equal to itself
        wrong = ~known & (targets == targets)
        raise ValueError(f"targets{_first(wrong)} is {targets[wrong][0]}: it must be 0, 1 or NaN")
    return positive, known


def _same_shape(array, name, shape):
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, but targets has shape {shape}")
    return array


def _check_scores(scores, shape):
    scores = _same_shape(_array(scores, "scores", len(shape)), "scores", shape)
    finite = np.isfinite(scores)
    if not finite.all():
        raise ValueError(f"scores{_first(~finite)} is {scores[~finite][0]}: it must be finite")
    return scores


def _check_predictions(predictions, shape):
    predictions = _same_shape(_array(predictions, "predictions"), "predictions", shape)
    if predictions.dtype == bool:
        return predictions
    present = predictions == 1
    wrong = ~present & (predictions != 0)
    if wrong.any():
        raise ValueError(f"predictions{_first(wrong)} is {predictions[wrong][0]}: it must be 0 or 1")
    return present


def _check(targets, predictions):
    """-> (positive, known, present), boolean (N, C); `present` only where the label is known."""
    positive, known = _check_targets(targets)
    present = _check_predictions(predictions, positive.shape)
    return positive, known, present if known.all() else present & known


# ---------------------------------------------------------------------------------------------------------------------
# Counting: predictions against targets


def _divide(numerator, denominator):
    """Element by element, 0 where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)


def hamming_loss(targets, predictions):
    """The share of known labels that are predicted wrong, in [0, 1]; 0 when no label is known.

    targets (N, C) with 0, 1, NaN; predictions (N, C) with 0, 1.

    >>> hamming_loss([[1, 0], [1, float("nan")]], [[1, 1], [1, 1]])
    0.3333333333333333
    """
    return _hamming_loss(*_check(targets, predictions))


def _hamming_loss(positive, known, present):
    return float(_divide(np.count_nonzero(positive ^ present), np.count_nonzero(known)))


def subset_accuracy(targets, predictions):
    """The share of rows whose known labels are all predicted right, in [0, 1]; 0 when no label is known.

    targets (N, C) with 0, 1, NaN; predictions (N, C) with 0, 1. Rows without a known label are left out.

    >>> subset_accuracy([[1, 0], [1, float("nan")]], [[1, 1], [1, 1]])
    0.5
    """
    return _subset_accuracy(*_check(targets, predictions))


def _subset_accuracy(positive, known, present):
    wrong, judged = (positive ^ present).any(axis=1), known.any(axis=1)
    return float(_divide(np.count_nonzero(judged & ~wrong), np.count_nonzero(judged)))


def _count(array, axis):
    """np.count_nonzero() of a boolean (N, C), many times as fast along an axis: bytes are summed, 255 at a time."""
    if axis is None:
        return np.count_nonzero(array)
    ones, length = np.ascontiguousarray(array).view(np.uint8), array.shape[axis]
    if axis == 1:
        parts = (np.einsum("ij->i", ones[:, i : i + 255]) for i in range(0, length, 255))
        return sum(part.astype(np.int64) for part in parts)
    whole = length - length % 255
    sums = ones[:whole].reshape(255, -1).sum(axis=0, dtype=np.uint8).reshape(-1, ones.shape[1])  # each of 255 rows
    return sums.sum(axis=0, dtype=np.int64) + ones[whole:].sum(axis=0, dtype=np.int64)


def _counts(positive, present, average):
    """-> (true positives, predicted, actual): numbers (micro), (N,) for samples, else (C,)."""
    axis = {"micro": None, "samples": 1}.get(average, 0)
    return [_count(array, axis) for array in (positive & present, present, positive)]


def _average(values, average, support, judged):
    """Per-class or per-sample values -> what `average` asks for."""
    if average is None:
        return values
    if average == "micro":
        return float(values)
    if average == "samples":
        return float(_divide(values[judged].sum(), np.count_nonzero(judged)))
    if average == "weighted":
        return float(_divide((values * support)[support > 0].sum(), support.sum()))  # nothing weighs 0 * NaN
    return float(values.mean())


def _check_average(average, allowed):
    if average not in allowed:
        raise ValueError(f"average is {average!r}: it must be one of {', '.join(map(str, allowed))}")


def precision_recall_f1(targets, predictions, average):
    """Precision, recall and F1 -> (precision, recall, f1), each a float, or (C,) when `average` is None.

    targets (N, C) with 0, 1, NaN; predictions (N, C) with 0, 1. average: "micro" counts all labels together, "macro"
    is the mean over classes, "weighted" weighs each class by its positives, "samples" is the mean over rows, None gives
    the values per class. F1 = 2 tp / (2 tp + fp + fn); 0 / 0 is 0.

    >>> precision_recall_f1([[1, 0], [1, 1]], [[1, 1], [0, 1]], "micro")
    (0.6666666666666666, 0.6666666666666666, 0.6666666666666666)
    """
    _check_average(average, ("micro", "macro", "weighted", "samples", None))
    positive, known, present = _check(targets, predictions)
    hits, predicted, actual = _counts(positive, present, average)
    values = _divide(hits, predicted), _divide(hits, actual), _divide(2 * hits, predicted + actual)
    judged = known.any(axis=1) if average == "samples" else None
    return tuple(_average(value, average, actual, judged) for value in values)


def f1_score(targets, predictions, average):
    """F1 alone: the third value of precision_recall_f1(), which says what the arguments mean.

    >>> f1_score([[1, 0], [1, 1]], [[1, 1], [0, 1]], None)
    array([0.66666667, 0.66666667])
    """
    return precision_recall_f1(targets, predictions, average)[2]


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: scores against targets. Everything follows from the sorted scores of the positives and of the negatives.


def _sorted_scores(positive, known, scores):
    """Yield for each class (scores of its positives, of its negatives), both ascending. Blocks keep memory low."""
    for start in range(0, scores.shape[1], 16):
        block = slice(start, start + 16)
        columns = [np.ascontiguousarray(array[:, block].T) for array in (positive, known, scores)]
        for is_positive, is_known, column in zip(*columns):
            yield np.sort(column[is_positive]), np.sort(column[is_known & ~is_positive])


def _at_least(ascending, thresholds):
    """How many of the ascending scores are >= each threshold."""
    return len(ascending) - np.searchsorted(ascending, thresholds, side="left")


def _average_precision(positives, negatives):
    """The mean over the positives of the precision at their score: the same sum as AP = sum (R_n - R_n-1) P_n."""
    if len(positives) == 0:
        return 0.0
    hits = _at_least(positives, positives)
    return float(np.mean(hits / (hits + _at_least(negatives, positives))))


def _roc_auc(positives, negatives):
    """The probability that a positive scores higher than a negative, a tie counting half (Mann-Whitney U)."""
    if len(positives) == 0 or len(negatives) == 0:
        return float("nan")
    lower = np.searchsorted(negatives, positives, side="left") + np.searchsorted(negatives, positives, side="right")
    return float(lower.sum() / 2 / len(positives) / len(negatives))


def _ranking_score(function, targets, scores, average):
    _check_average(average, ("micro", "macro", "weighted", None))
    positive, known = _check_targets(targets)
    scores = _check_scores(scores, positive.shape)
    if average == "micro":
        return function(np.sort(scores[positive]), np.sort(scores[known & ~positive]))
    values = np.array([function(*pair) for pair in _sorted_scores(positive, known, scores)])
    return _average(values, average, _count(positive, 0), None)


def average_precision(targets, scores, average="macro"):
    """Average precision, the area under the precision-recall curve as steps: sum over n of (R_n - R_(n-1)) P_n.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite, higher for a likelier label. average: "macro" (the mean over
    classes, mAP), "micro", "weighted" by positives, or None -> (C,). 0 for a class without a known positive.

    >>> average_precision([[1], [0], [1]], [[0.9], [0.8], [0.7]])
    0.8333333333333333
    """
    return _ranking_score(_average_precision, targets, scores, average)


def roc_auc(targets, scores, average="macro"):
    """Area under the ROC curve. Arguments as in average_precision().

    NaN for a class without a known positive or without a known negative; so is then the mean over classes.

    >>> roc_auc([[1], [0], [1]], [[0.9], [0.8], [0.7]])
    0.5
    """
    return _ranking_score(_roc_auc, targets, scores, average)


def precision_recall_curve(targets, scores):
    """The precision-recall curve of one class -> (precision (K+1,), recall (K+1,), thresholds (K,)).

    targets (N,) with 0, 1, NaN; scores (N,), finite. `thresholds` are the K distinct scores of the known rows,
    ascending; precision[k] and recall[k] are those of `scores >= thresholds[k]`; the last point is precision 1, recall
    0. Without a known positive recall is 1 before that point, as in scikit-learn; without a known label K is 0.

    >>> precision, recall, thresholds = precision_recall_curve([1, 0, 1], [0.9, 0.8, 0.7])
    >>> recall
    array([1. , 0.5, 0.5, 0. ])
    """
    positive, known = _check_targets(targets, ndim=1)
    scores = _check_scores(scores, positive.shape)
    thresholds = np.unique(scores[known])
    hits = _at_least(np.sort(scores[positive]), thresholds)
    precision = hits / _at_least(np.sort(scores[known]), thresholds)
    recall = hits / hits[0] if hits.any() else np.ones(len(hits))
    return np.append(precision, 1.0), np.append(recall, 0.0), thresholds


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds


def _f1_at(positives, negatives, thresholds):
    """F1 of one class at each threshold."""
    hits = _at_least(positives, thresholds)
    return _divide(2 * hits, hits + _at_least(negatives, thresholds) + len(positives))


def _f1_on_grid(positive, known, scores):
    """F1 of every class at every step of GRID -> (C, 41): a histogram of each class, summed from above."""
    steps, classes = len(GRID), scores.shape[1]
    first = np.arange(classes) * (steps + 1)  # of a class's bins: bin k holds the scores that reach k steps
    hits, taken = np.zeros((2, classes * (steps + 1)), np.int64)
    for start in range(0, len(scores), 4096):
        rows = slice(start, start + 4096)
        scaled = scores[rows] * scores.dtype.type(steps - 1)
        bins = np.clip(np.floor(scaled), -1, steps - 1).astype(np.int64) + 1
        close = np.abs(scaled - np.rint(scaled)) < 1e-3  # so close to a step that rounding could decide
        bins[close] = np.searchsorted(GRID, scores[rows][close], side="right")
        bins += first
        hits += np.bincount(bins[positive[rows]], minlength=len(hits))
        taken += np.bincount(bins[known[rows]], minlength=len(taken))
    hits, taken = (counts.reshape(classes, -1)[:, :0:-1].cumsum(axis=1)[:, ::-1] for counts in (hits, taken))
    return _divide(2 * hits, taken + _count(positive, 0)[:, None])


def _global_candidates(scores, most=1000):
    """At most `most` of the given scores, evenly spaced by rank, ascending."""
    scores = np.unique(scores)
    return scores[np.unique(np.linspace(0, len(scores) - 1, min(most, len(scores))).round().astype(int))]


def find_thresholds(targets, scores, method="pr_curve", max_threshold=np.inf):
    """A threshold per class -> (C,) float64; a label is present when its score >= its threshold.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite. method:
      "pr_curve"  the score with the best F1 of the class; the lowest of equals. F1 is best at the score of a positive.
      "grid"      the same among 41 steps from 0 to 1.
      "global"    one value for all classes, by F1 weighted by positives, among the scores of positives (evenly thinned
                  to 1,000 when there are more).
      a number    that number, for all classes.
    A class without a known positive gets 0.5, and so does one whose threshold would exceed `max_threshold`.

    >>> find_thresholds([[1, 0], [0, 0], [1, 0]], [[0.9, 0.1], [0.3, 0.2], [0.6, 0.3]])
    array([0.6, 0.5])
    """
    positive, known = _check_targets(targets)
    scores = _check_scores(scores, positive.shape)
    support = _count(positive, 0)
    if isinstance(method, (int, float)) and not isinstance(method, bool):
        return np.full(len(support), float(method))
    if method not in ("pr_curve", "grid", "global"):
        raise ValueError(f"method is {method!r}: it must be pr_curve, grid, global or a number")
    thresholds = np.full(len(support), FALLBACK)
    if not support.any():
        return thresholds
    pairs = _sorted_scores(positive, known, scores)
    if method == "grid":
        thresholds = GRID[np.argmax(_f1_on_grid(positive, known, scores), axis=1)]
    elif method == "global":
        candidates = _global_candidates(scores[positive])
        f1 = sum(_f1_at(*pair, candidates) * weight for pair, weight in zip(pairs, support))
        thresholds[:] = candidates[np.argmax(f1)]
    else:
        for c, pair in enumerate(pairs):
            if support[c]:
                candidates = np.unique(pair[0])
                thresholds[c] = candidates[np.argmax(_f1_at(*pair, candidates))]
    if method != "global":
        thresholds[support == 0] = FALLBACK
    return np.where(thresholds > max_threshold, FALLBACK, thresholds)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def _headlines(positive, known, present):
    """The numbers of HEADLINES that come from predictions."""
    judged = known.any(axis=1)
    numbers = {
        "hamming_loss": _hamming_loss(positive, known, present),
        "subset_accuracy": _subset_accuracy(positive, known, present),
    }
    for average in ("micro", "macro", "weighted", "samples"):
        hits, predicted, actual = _counts(positive, present, average)
        numbers[f"f1_{average}"] = _average(_divide(2 * hits, predicted + actual), average, actual, judged)
    return numbers


def report(targets, scores, thresholds, classes, bootstrap=0, seed=0):
    """Everything about one split -> dict of plain Python values, ready for JSON but for NaN.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite; thresholds (C,) or one number; classes: C names. Keys: rows,
    the names in HEADLINES (floats), and per_class: name -> precision, recall, f1, average_precision, roc_auc,
    threshold, support (known positives), positives, negatives, known, na, prevalence. With `bootstrap` resamples,
    "intervals" holds name -> [low, high], the 95 % percentile interval (Efron 1979) over resampled rows.

    >>> report([[1, 0], [0, 1]], [[0.9, 0.2], [0.1, 0.4]], 0.5, ["cat", "dog"])["f1_macro"]
    0.5
    """
    positive, known = _check_targets(targets)
    scores = _check_scores(scores, positive.shape)
    if len(classes) != positive.shape[1]:
        raise ValueError(f"classes has {len(classes)} names, but targets has {positive.shape[1]} columns")
    thresholds = np.broadcast_to(np.asarray(thresholds, float), (len(classes),))
    present = (scores >= thresholds) & known
    hits, predicted, actual = _counts(positive, present, None)
    known_count = _count(known, 0)
    ranking = [(_average_precision(*pair), _roc_auc(*pair)) for pair in _sorted_scores(positive, known, scores)]
    precisions, aucs = np.array(ranking).T
    columns = {
        "precision": _divide(hits, predicted), "recall": _divide(hits, actual),
        "f1": _divide(2 * hits, predicted + actual), "average_precision": precisions, "roc_auc": aucs,
        "threshold": thresholds, "support": actual, "positives": actual, "negatives": known_count - actual,
        "known": known_count, "na": len(known) - known_count, "prevalence": _divide(actual, known_count),
    }
    result = {"rows": len(known)} | _headlines(positive, known, present)
    result |= {"map": float(precisions.mean()), "roc_auc_macro": float(aucs.mean())}
    result["per_class"] = {
        name: {key: values[c].item() for key, values in columns.items()} for c, name in enumerate(classes)
    }
    if bootstrap:
        result["intervals"] = _intervals(positive, known, present, scores, bootstrap, seed)
    return result


def _weighted_average_precision(order, last, positive, weights):
    """AP of one class for many resamples at once. order: rows by descending score; last: the end of each tie."""
    weights = weights[:, order]
    hits, taken = np.cumsum(weights * positive[order], axis=1), np.cumsum(weights, axis=1)
    precision = _divide(hits[:, last], taken[:, last])
    return _divide((weights * positive[order] * precision).sum(axis=1), hits[:, -1])


def _intervals(positive, known, present, scores, resamples, seed):
    """95 % bootstrap intervals of the F1s, the Hamming loss, the subset accuracy and mAP: a resample is a weight
    (how often it was drawn) for each row, so each number is a matrix product instead of a loop over resamples."""
    rows, classes = positive.shape
    rng, judged, wrong = np.random.default_rng(seed), known.any(axis=1), positive ^ present
    by_row = [array.sum(axis=1, dtype=float) for array in (positive & present, present, positive, wrong, known)]
    by_row += [_divide(2 * by_row[0], by_row[1] + by_row[2]), judged, judged & ~wrong.any(axis=1)]
    by_class = [array.astype(np.float64) for array in (positive & present, present, positive)]
    ranks = []
    for c in range(classes):
        order = np.flatnonzero(known[:, c])[np.argsort(-scores[known[:, c], c], kind="stable")]
        column = scores[order, c]
        ranks.append((order, np.searchsorted(-column, -column, side="right") - 1))
    drawn = {}
    step = max(1, min(resamples, 2**22 // rows))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = rng.multinomial(rows, np.full(rows, 1 / rows), size).astype(float)
        hits, predicted, actual, errors, labels, f1, used, right = (weights @ column for column in by_row)
        class_hits, class_predicted, class_actual = (weights @ array for array in by_class)
        class_f1 = _divide(2 * class_hits, class_predicted + class_actual)
        precisions = [
            _weighted_average_precision(order, last, positive[:, c], weights)
            for c, (order, last) in enumerate(ranks)
            if len(order)
        ]
        numbers = {
            "hamming_loss": _divide(errors, labels), "subset_accuracy": _divide(right, used),
            "f1_micro": _divide(2 * hits, predicted + actual), "f1_macro": class_f1.mean(axis=1),
            "f1_weighted": _divide((class_f1 * class_actual).sum(axis=1), class_actual.sum(axis=1)),
            "f1_samples": _divide(f1, used), "map": np.sum(precisions, axis=0) / classes + np.zeros(size),
        }
        for name, values in numbers.items():
            drawn.setdefault(name, []).append(values)
    return {name: np.quantile(np.concatenate(parts), [0.025, 0.975]).tolist() for name, parts in drawn.items()}


def _cell(value, width):
    """A table cell: floats rounded, None and NaN as n/a."""
    if value is None or value != value:
        return "n/a".rjust(width)
    return (f"{value:.3f}" if isinstance(value, float) else str(value)).rjust(width)


def shorten(text, width):
    """`text` in at most `width` characters, the middle replaced by an ellipsis."""
    if len(text) <= width:
        return text
    return text[: (width - 1) // 2 + (width - 1) % 2] + "…" + text[len(text) - (width - 1) // 2 :]


def format_report(report):
    """A report() as text: the headline numbers and an aligned table of the classes, at most 100 columns wide.

    >>> numbers = report([[1], [0]], [[0.9], [0.1]], 0.5, ["cat"])
    >>> print(format_report(numbers).splitlines()[0])
    hamming_loss 0.000   subset_accuracy 1.000   map 1.000   roc_auc_macro 1.000
    """
    intervals = report.get("intervals", {})

    def headline(name):
        low_high = " [{:.3f}, {:.3f}]".format(*intervals[name]) if name in intervals else ""
        return f"{name} {_cell(report[name], 0)}{low_high}"

    groups = ["hamming_loss", "subset_accuracy", "map", "roc_auc_macro"], [n for n in HEADLINES if n.startswith("f1")]
    per_line = 2 if intervals else 4
    lines = ["   ".join(map(headline, names[i : i + per_line])) for names in groups for i in range(0, 4, per_line)]
    per_class = report["per_class"]
    width = max(5, min(28, max(map(len, per_class))))
    columns = {"precision": 9, "recall": 6, "f1": 5, "average_precision": 5, "roc_auc": 5, "threshold": 9,
               "positives": 9, "negatives": 9, "na": 6}
    heads = {"average_precision": "AP", "roc_auc": "AUC", "f1": "F1", "na": "NA"}
    lines += ["", "class".ljust(width) + "".join(" " + heads.get(c, c).rjust(w) for c, w in columns.items())]
    for name, values in per_class.items():
        cells = "".join(" " + _cell(values[column], w) for column, w in columns.items())
        lines.append(shorten(name, width).ljust(width) + cells)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The results table of several runs


def read_run(folder):
    """What a run left in `folder` (config.json and metrics.json) -> dict of options and scores, with its name as "run".

    Raises ValueError that names the file when metrics.json is missing or is not JSON.
    """
    row = {"run": str(folder)}
    for name in ("config.json", "metrics.json"):
        path = Path(folder) / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if name == "config.json":
                continue
            raise ValueError(f"{folder} is not the folder of a finished run: it has no {name}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        row |= {key: value for key, value in content.items() if not isinstance(value, dict)}
    return row


def results_table(rows, sort="f1_macro", ascending=False, group_by=None, group_mode="best"):
    """Runs as rows -> the text of a table, sorted by a score or an option; the best of each score has a *.

    rows: dicts of read_run(). group_by: an option; one row is kept per value of it: the first in the sort order, or,
    with group_mode "mean", the mean of the scores. Raises ValueError for a name that no run has.
    """
    for name in filter(None, (sort, group_by)):
        if not any(name in row for row in rows):
            names = sorted({key for row in rows for key in row})
            raise ValueError(f"no run has {name!r}; there is {', '.join(names)}")

    def in_order(rows):  # numbers by value, words by alphabet, and what is not there last
        def key(row):
            number = isinstance(row[sort], (int, float))
            return number, row[sort] if number else str(row[sort])

        there = [row for row in rows if row.get(sort) is not None]
        return sorted(there, key=key, reverse=not ascending) + [row for row in rows if row.get(sort) is None]

    rows = in_order(rows)
    if group_by:
        groups = {}
        for row in rows:
            groups.setdefault(str(row.get(group_by)), []).append(row)
        if group_mode == "mean":
            rows = in_order([_mean_row(group_by, value, group) for value, group in groups.items()])
        else:
            rows = [group[0] for group in groups.values()]
    columns = ["run", "preset", "backbone", "epochs", "split", *HEADLINES]
    columns += [name for name in (group_by, sort) if name and name not in columns]
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    best = _best_scores(rows)
    table = [columns] + [[_cell(row.get(name), 0) + "*" * (name in best and row.get(name) == best[name])
                          for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table)


def _best_scores(rows):
    """The best value of each score among several rows -> dict."""
    best = {}
    for name in HEADLINES:
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) > 1:
            best[name] = min(values) if name == "hamming_loss" else max(values)
    return best


def _mean_row(group_by, value, group):
    """The mean of the scores of a group of runs."""
    row = {"run": f"mean of {len(group)}", group_by: value}
    for name in HEADLINES:
        values = [run[name] for run in group if run.get(name) is not None]
        row[name] = float(np.mean(values)) if values else None
    return row


def main(argv=None):
    """The command line; returns the text of the table it prints."""
    parser = argparse.ArgumentParser(description="Print the results table of runs; * is the best of a column.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a folder that train.py wrote")
    parser.add_argument("--sort", default="f1_macro", metavar="NAME",
                        help="a score or an option (default: %(default)s)")
    parser.add_argument("--ascending", action="store_true", help="lowest first")
    parser.add_argument("--group-by", metavar="OPTION", help="one row per value of this option")
    parser.add_argument("--group-mode", choices=("best", "mean"), default="best",
                        help="what a group shows (default: %(default)s)")

    def fail(message):
        raise ValueError(message)

    parser.error = fail
    options = parser.parse_args(argv)
    rows = [read_run(folder) for folder in options.runs]
    text = results_table(rows, options.sort, options.ascending, options.group_by, options.group_mode)
    print(text)
    return text


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
