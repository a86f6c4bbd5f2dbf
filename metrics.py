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
# Checks


def _numbers(values, name, ndim=2):
    """`values` as an array of numbers that is not empty."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, not {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' if ndim > 1 else ''}, not shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: shape {array.shape}{' has no classes' if array.shape[-1] == 0 else ''}")
    return array


def _refuse(wrong, array, name, what):
    """Raise a ValueError that names the first place where `wrong` (boolean, the shape of `array`)
    is True."""
    if wrong.any():
        place = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise ValueError(f"{name}[{', '.join(map(str, place))}] is {array[place]}: it must be {what}")


def _check_targets(targets, ndim=2):
    """-> (positive, known), boolean, the shape of `targets`."""
    targets = _numbers(targets, "targets", ndim)
    positive = targets == 1
    known = positive | (targets == 0)
    if not known.all():
        _refuse(~known & ~np.isnan(targets), targets, "targets", "0, 1 or NaN")
    return positive, known


def _check_like(values, name, shape):
    """`values` ("scores" or "predictions") as an array of the shape of the targets; predictions
    become boolean."""
    array = _numbers(values, name, len(shape))
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, but targets has shape {shape}")
    if name == "scores":
        _refuse(~np.isfinite(array), array, name, "finite")
        return array
    present = array == 1
    if array.dtype != bool:
        _refuse(~present & (array != 0), array, name, "0 or 1")
    return present


def _check_predictions(targets, predictions):
    """-> (positive, known, present), boolean (N, C); `present` only where the label is known."""
    positive, known = _check_targets(targets)
    present = _check_like(predictions, "predictions", positive.shape)
    return positive, known, present & known


def _check_choice(value, name, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}")


# ---------------------------------------------------------------------------------------------------------------------
# Counts: predictions against targets


def _divide(numerator, denominator):
    """Element by element, 0 where the denominator is 0."""
    denominator = np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)


def hamming_loss(targets, predictions):
    """The share of known labels that are predicted wrong, in [0, 1]; 0 when no label is known.

    targets (N, C) with 0, 1, NaN; predictions (N, C) with 0, 1.

    >>> hamming_loss([[1, 0], [1, float("nan")]], [[1, 1], [1, 1]])
    0.3333333333333333
    """
    return _hamming_loss(*_check_predictions(targets, predictions))


def _hamming_loss(positive, known, present):
    return float(_divide(np.count_nonzero(positive ^ present), np.count_nonzero(known)))


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
    judged = known.any(axis=1)
    wrong = (positive ^ present).any(axis=1)
    return float(_divide(np.count_nonzero(judged & ~wrong), np.count_nonzero(judged)))


def _count(array, axis):
    """How many of a boolean (N, C) are True, along an axis, or in all when it is None."""
    return np.count_nonzero(array) if axis is None else array.sum(axis=axis, dtype=np.int32)


def _precision_recall_f1(positive, known, present, average):
    axis = {"micro": None, "samples": 1}.get(average, 0)
    hits, predicted, actual = (_count(array, axis) for array in (positive & present, present, positive))
    values = _divide(hits, predicted), _divide(hits, actual), _divide(2 * hits, predicted + actual)
    if average == "samples":
        judged = known.any(axis=1)
        return tuple(float(_divide(value[judged].sum(), np.count_nonzero(judged))) for value in values)
    return tuple(_average(value, average, actual) for value in values)


def _average(values, average, support):
    """Values per class (C,), or the pooled one -> what `average` asks for. support: (C,) known
    positives."""
    if average is None:
        return values
    if average == "micro":
        return float(values)
    if average == "weighted":
        there = support > 0  # a class without a positive weighs nothing, also when its value is NaN
        return float(_divide((values[there] * support[there]).sum(), support.sum()))
    return float(values.mean())


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
    _check_choice(average, "average", ("micro", "macro", "weighted", "samples", None))
    return _precision_recall_f1(*_check_predictions(targets, predictions), average)


def f1_score(targets, predictions, average):
    """F1 alone: the third value of precision_recall_f1(), which says what the arguments mean.

    >>> f1_score([[1, 0], [1, 1]], [[1, 1], [0, 1]], None)
    array([0.66666667, 0.66666667])
    """
    return precision_recall_f1(targets, predictions, average)[2]


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: scores against targets. Everything follows from the sorted scores of the positives and of
# the negatives.


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
    _check_choice(average, "average", ("micro", "macro", "weighted", None))
    positive, known = _check_targets(targets)
    scores = _check_like(scores, "scores", positive.shape)
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
    positive, known = _check_targets(targets, ndim=1)
    scores = _check_like(scores, "scores", positive.shape)
    thresholds = np.unique(scores[known])
    hits = _at_least(np.sort(scores[positive]), thresholds)
    precision = hits / _at_least(np.sort(scores[known]), thresholds)
    recall = hits / hits[0] if hits.any() else np.ones(len(hits))
    return np.append(precision, 1.0), np.append(recall, 0.0), thresholds


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds


def find_thresholds(targets, scores, method="pr_curve", max_threshold=None):
    """A threshold per class -> (C,) float64; a label is present when its score >= its threshold.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite. method:
      "pr_curve"  the score with the best F1 of the class; the lowest of equals. F1 is best at the score of a positive.
      "grid"      the same among 41 steps from 0 to 1.
      "global"    one value for all classes, by F1 weighted by positives, among the scores of positives (evenly thinned
                  to 1,000 when there are more).
      a number    that number, for all classes.
    A class without a known positive gets 0.5, and so does one whose threshold would exceed
    `max_threshold`.

    >>> find_thresholds([[1, 0], [0, 0], [1, 0]], [[0.9, 0.1], [0.3, 0.2], [0.6, 0.3]])
    array([0.6, 0.5])
    """
    positive, known = _check_targets(targets)
    scores = _check_like(scores, "scores", positive.shape)
    support = _count(positive, 0)
    if isinstance(method, (int, float)) and not isinstance(method, bool):
        return np.full(len(support), float(method))
    if method not in ("pr_curve", "grid", "global"):
        raise ValueError(f"method is {method!r}: it must be pr_curve, grid, global or a number")
    if not support.any():
        return np.full(len(support), FALLBACK)
    if method == "grid":
        thresholds = GRID[np.argmax(_f1_on_grid(positive, known, scores), axis=1)]
    elif method == "global":
        thresholds = np.full(len(support), _best_global(positive, known, scores))
    else:
        thresholds = np.array([_best_score(*pair) for pair in _sorted_scores(positive, known, scores)])
    if method != "global":
        thresholds[support == 0] = FALLBACK
    if max_threshold is not None:
        thresholds[thresholds > max_threshold] = FALLBACK
    return thresholds


def _f1_at(positives, negatives, thresholds):
    """F1 of one class at each threshold."""
    hits = _at_least(positives, thresholds)
    return _divide(2 * hits, hits + _at_least(negatives, thresholds) + len(positives))


def _best_score(positives, negatives):
    """The lowest of the scores of one class with the best F1."""
    if len(positives) == 0:
        return FALLBACK
    candidates = np.unique(positives)
    return candidates[np.argmax(_f1_at(positives, negatives, candidates))]


def _best_global(positive, known, scores, most=1000):
    """The score with the best F1 weighted by positives, among those of positives, or `most` of
    them."""
    candidates = np.unique(scores[positive])
    chosen = np.linspace(0, len(candidates) - 1, min(most, len(candidates))).round().astype(int)
    candidates = candidates[chosen]
    total = np.zeros(len(candidates))
    for positives, negatives in _sorted_scores(positive, known, scores):
        total += len(positives) * _f1_at(positives, negatives, candidates)
    return candidates[np.argmax(total)]


def _f1_on_grid(positive, known, scores):
    """F1 of every class at every step of GRID -> (C, 41): a histogram of each class, summed from
    above."""
    steps = len(GRID)
    classes = scores.shape[1]
    offset = np.arange(classes) * (steps + 1)  # of a class's bins: bin k holds the scores that reach k steps
    hits = np.zeros(classes * (steps + 1), np.int64)
    taken = np.zeros_like(hits)
    for start in range(0, len(scores), 4096):
        rows = slice(start, start + 4096)
        scaled = scores[rows] * scores.dtype.type(steps - 1)
        bins = np.clip(np.floor(scaled), -1, steps - 1).astype(np.int64) + 1
        close = np.abs(scaled - np.rint(scaled)) < 1e-3  # so close to a step that rounding could decide
        bins[close] = np.searchsorted(GRID, scores[rows][close], side="right")
        bins += offset
        hits += np.bincount(bins[positive[rows]], minlength=len(hits))
        taken += np.bincount(bins[known[rows]], minlength=len(taken))
    hits, taken = (counts.reshape(classes, -1)[:, :0:-1].cumsum(axis=1)[:, ::-1] for counts in (hits, taken))
    return _divide(2 * hits, taken + _count(positive, 0)[:, None])


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


def report(targets, scores, thresholds, classes, bootstrap=0, seed=0):
    """Everything about one split -> dict of plain Python values, ready for JSON but for NaN.

    targets (N, C) with 0, 1, NaN; scores (N, C), finite; thresholds (C,) or one number; classes: C
    different names. Keys: rows, the names in HEADLINES (floats), and per_class: name -> precision,
    recall, f1, average_precision, roc_auc, threshold, positives, negatives, na (counts), prevalence
    (positives among the known). With `bootstrap` resamples, "intervals" holds name -> [low, high]
    for the headlines but ROC AUC: the 95 % percentile interval (Efron 1979) over resampled rows.

    >>> report([[1, 0], [0, 1]], [[0.9, 0.2], [0.1, 0.4]], 0.5, ["cat", "dog"])["f1_macro"]
    0.5
    """
    positive, known = _check_targets(targets)
    scores = _check_like(scores, "scores", positive.shape)
    if len(classes) != positive.shape[1]:
        raise ValueError(f"classes has {len(classes)} names, but targets has {positive.shape[1]} columns")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes has a name twice: {', '.join(map(str, classes))}")
    thresholds = np.broadcast_to(np.asarray(thresholds, float), (len(classes),))
    present = (scores >= thresholds) & known
    precision, recall, f1 = _precision_recall_f1(positive, known, present, None)
    ranking = [(_average_precision(*pair), _roc_auc(*pair)) for pair in _sorted_scores(positive, known, scores)]
    average_precisions, aucs = np.array(ranking).T
    positives = _count(positive, 0)
    known_count = _count(known, 0)
    columns = {
        "precision": precision, "recall": recall, "f1": f1, "average_precision": average_precisions, "roc_auc": aucs,
        "threshold": thresholds, "positives": positives, "negatives": known_count - positives,
        "na": len(known) - known_count, "prevalence": _divide(positives, known_count),
    }
    result = {"rows": len(known)} | _decision_scores(positive, known, present)
    result |= {"map": float(average_precisions.mean()), "roc_auc_macro": float(aucs.mean()), "per_class": {}}
    for c, name in enumerate(classes):
        result["per_class"][name] = {key: values[c].item() for key, values in columns.items()}
    if bootstrap:
        result["intervals"] = _intervals(positive, known, present, scores, bootstrap, seed)
    return result


def _decision_scores(positive, known, present):
    """The headlines that come from predictions -> dict."""
    result = {
        "hamming_loss": _hamming_loss(positive, known, present),
        "subset_accuracy": _subset_accuracy(positive, known, present),
    }
    for average in ("micro", "macro", "weighted", "samples"):
        result[f"f1_{average}"] = _precision_recall_f1(positive, known, present, average)[2]
    return result


def _intervals(positive, known, present, scores, resamples, seed):
    """95 % bootstrap intervals of the headlines but ROC AUC -> {name: [low, high]}."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(0, len(known), len(known))
        sample = positive[rows], known[rows], present[rows]
        numbers = _decision_scores(*sample)
        pairs = _sorted_scores(sample[0], sample[1], scores[rows])
        numbers["map"] = np.mean([_average_precision(*pair) for pair in pairs])
        drawn.append(numbers)
    intervals = {}
    for name in drawn[0]:
        intervals[name] = np.quantile([numbers[name] for numbers in drawn], [0.025, 0.975]).tolist()
    return intervals


def _cell(value, width=0):
    """A table cell: a float with three decimals, None and NaN as n/a."""
    if value is None or value != value:
        return "n/a".rjust(width)
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.rjust(width)


def shorten(text, width):
    """`text` in at most `width` characters, the middle replaced by an ellipsis."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


REPORT_COLUMNS = {  # column of the report's table -> its title and width
    "precision": ("precision", 9), "recall": ("recall", 6), "f1": ("F1", 5), "average_precision": ("AP", 5),
    "roc_auc": ("AUC", 5), "threshold": ("threshold", 9), "positives": ("positives", 9),
    "negatives": ("negatives", 9), "na": ("NA", 6),
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
    intervals = report.get("intervals", {})

    def headline(name):
        text = f"{name} {_cell(report[name])}"
        if name in intervals:
            text += " [{:.3f}, {:.3f}]".format(*intervals[name])
        return text

    lines = []
    names = ["hamming_loss", "subset_accuracy", "map", "roc_auc_macro"]
    names += [name for name in HEADLINES if name.startswith("f1")]
    per_line = 2 if intervals else 4
    for start in range(0, len(names), per_line):
        lines.append("   ".join(headline(name) for name in names[start : start + per_line]))

    per_class = report["per_class"]
    width = max(5, min(28, max(map(len, per_class))))
    titles = [title.rjust(size) for title, size in REPORT_COLUMNS.values()]
    lines += ["", " ".join(["class".ljust(width), *titles])]
    for name in _worst_and_best(per_class, most):
        if name is None:
            lines.append(f"... {len(per_class) - most} classes between the worst and the best: metrics.json has all")
            continue
        cells = [_cell(per_class[name][column], size) for column, (_, size) in REPORT_COLUMNS.items()]
        lines.append(" ".join([shorten(name, width).ljust(width), *cells]))
    return "\n".join(lines)


def _worst_and_best(per_class, most):
    """The names of the classes, or of `most` of them by average precision with None in the gap."""
    if len(per_class) <= most:
        return list(per_class)
    names = sorted(per_class, key=lambda name: per_class[name]["average_precision"])
    half = most // 2
    return [*names[:half], None, *names[len(names) - (most - half) :]]


# ---------------------------------------------------------------------------------------------------------------------
# Results table


def read_run(folder):
    """What a run left in `folder` (config.json and metrics.json) -> dict of options and scores,
    with its name as "run".

    Raises ValueError that names the file when metrics.json is missing or one of them is not a JSON
    object.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        raise ValueError(f"{folder} is not the folder of a finished run: it has no metrics.json")
    row = {"run": str(folder)}
    for path in (folder / "config.json", folder / "metrics.json"):
        content = read_json(path) if path.exists() else {}
        row |= {key: value for key, value in content.items() if not isinstance(value, dict)}
    return row


def read_json(path):
    """A JSON object that a run wrote -> dict. Raises ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what a run writes: it holds no JSON object")
    return content


OPTION_COLUMNS = ("preset", "backbone", "head", "size", "epochs", "batch_size", "lr", "lr_backbone", "train_layers",
                  "unfreeze", "augment", "pos_weight", "thresholds", "seed")  # shown where runs differ
SCORE_COLUMNS = ("split", "val_loss", "val_f1_weighted", *HEADLINES)


def results_table(rows, sort="f1_macro", ascending=False, group_by=(), group_mode="best"):
    """Runs as rows -> the text of a table, sorted by a score or an option; the best of each score
    has a *.

    rows: dicts of read_run(). Options are shown where runs differ in them. group_by: names of
    options; one row is kept for each combination of their values: the first in the sort order, or,
    with group_mode "mean", the mean of the scores. Raises ValueError for a name that no run has.
    """
    group_by = [group_by] if isinstance(group_by, str) else list(group_by or ())
    for name in [sort, *group_by]:
        if not any(name in row for row in rows):
            names = sorted({key for row in rows for key in row})
            raise ValueError(f"no run has {name!r}; there is {', '.join(names)}")
    rows = _in_order(rows, sort, ascending)
    if group_by:
        groups = {}
        for row in rows:
            groups.setdefault(tuple(str(row.get(name)) for name in group_by), []).append(row)
        if group_mode == "mean":
            rows = _in_order([_mean_row(group_by, group) for group in groups.values()], sort, ascending)
        else:
            rows = [group[0] for group in groups.values()]
    differing = [name for name in OPTION_COLUMNS if len({str(row.get(name)) for row in rows}) > 1]
    columns = list(dict.fromkeys(["run", *group_by, *differing, *SCORE_COLUMNS, sort]))
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    best = _best_scores(rows)
    table = [columns]
    for row in rows:
        table.append([_result_cell(name, row.get(name), best) for name in columns])
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table)


def _in_order(rows, name, ascending):
    """Rows by the value of `name`: numbers by size, words by alphabet, and what is not there
    last."""

    def key(row):
        number = isinstance(row[name], (int, float))
        return number, row[name] if number else str(row[name])

    there = [row for row in rows if row.get(name) is not None]
    return sorted(there, key=key, reverse=not ascending) + [row for row in rows if row.get(name) is None]


def _result_cell(name, value, best):
    """A cell of the results table: scores with three decimals, options as they were given, * at the
    best score."""
    if name in best:
        return _cell(value) + ("*" if value == best[name] else "")
    if name not in SCORE_COLUMNS and isinstance(value, float):
        return f"{value:g}"
    return _cell(value)


def _best_scores(rows):
    """The best value of each score among several rows -> dict."""
    best = {}
    for name in SCORE_COLUMNS:
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if len(values) > 1:
            best[name] = min(values) if "loss" in name else max(values)
    return best


def _mean_row(group_by, group):
    """The mean of the scores of a group of runs that share the options in group_by."""
    row = {"run": f"mean of {len(group)}"} | {name: group[0].get(name) for name in group_by}
    for name in SCORE_COLUMNS:
        values = [run[name] for run in group if isinstance(run.get(name), (int, float))]
        if values:
            row[name] = float(np.mean(values))
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a wrong option as a ValueError."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def main(argv=None):
    """The command line; returns the text of the table it prints."""
    parser = ArgumentParser(prog="metrics.py", description="Print the results of runs as a table; * is the best.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a folder that train.py wrote")
    parser.add_argument("--sort", default="f1_macro", metavar="NAME",
                        help="a score or an option (default: %(default)s)")
    parser.add_argument("--ascending", action="store_true", help="lowest first")
    parser.add_argument("--group-by", default="", metavar="A,B", help="one row for each combination of these options")
    parser.add_argument("--group-mode", choices=("best", "mean"), default="best",
                        help="what a group shows (default: %(default)s)")
    options = parser.parse_args(argv)
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
