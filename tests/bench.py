"""Measurements beside a stated reference, in one run, alternating: ratios hold on a noisy machine, seconds do not.

    python tests/bench.py metrics       # metrics.py beside scikit-learn, on the size of COCO's validation set
    python tests/bench.py baseline      # a linear classifier on the pixels of the demo data
"""

import statistics
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import metrics  # noqa: E402


def alternate(ours, theirs, runs=5):
    """Run the two in turn -> (median seconds of ours, of theirs, median of the ratios theirs / ours)."""
    pairs = []
    for _ in range(runs):
        pair = []
        for function in (ours, theirs):
            start = time.perf_counter()
            function()
            pair.append(time.perf_counter() - start)
        pairs.append(pair)
    mine, other = zip(*pairs)
    return statistics.median(mine), statistics.median(other), statistics.median(b / a for a, b in pairs)


def peak_memory(function):
    """The most bytes allocated at once while the function ran."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def problem(rows, classes, unknown, seed=0):
    """Targets with rare and frequent classes, and scores that know something of them."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, classes), dtype=np.float32) < rng.uniform(0.002, 0.1, classes)).astype(np.float32)
    scores = (0.6 * rng.random((rows, classes), dtype=np.float32) + 0.4 * targets * rng.random(classes, np.float32))
    if unknown:
        targets[rng.random((rows, classes), dtype=np.float32) < unknown] = np.nan
    return targets, scores


def by_column(function, targets, values):
    """scikit-learn on the known labels of each column."""
    known = ~np.isnan(targets)
    return [function(targets[known[:, c], c], values[known[:, c], c]) for c in range(targets.shape[1])]


def references(targets, scores, predictions):
    """What scikit-learn offers: on the whole arrays without NaN, else column by column."""
    import sklearn.metrics as sk

    def best(truth, score):
        precision, recall, thresholds = sk.precision_recall_curve(truth, score)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return thresholds[np.argmax(f1[:-1])]

    def grid(truth, score):
        return [sk.f1_score(truth, score >= t, zero_division=0) for t in np.linspace(0, 1, 41)]

    if np.isnan(targets).any():
        def counts():
            by_column(sk.hamming_loss, targets, predictions)
            for _ in range(4):
                by_column(lambda t, p: sk.f1_score(t, p, zero_division=0), targets, predictions)
    else:
        def counts():
            truth = targets.astype(int)
            sk.hamming_loss(truth, predictions)
            for average in ("micro", "macro", "weighted", "samples"):
                sk.f1_score(truth, predictions, average=average, zero_division=0)
    return (
        counts,
        lambda: by_column(best, targets, scores),
        lambda: by_column(sk.average_precision_score, targets, scores),
        lambda: by_column(grid, targets, scores),
    )


def bench_metrics():
    """metrics.py beside scikit-learn, then a large case alone."""
    warnings.simplefilter("ignore")
    for unknown in (0, 0.1):
        targets, scores = problem(40_504, 80, unknown)
        predictions = scores >= 0.5

        def counts(targets=targets, predictions=predictions):
            metrics.hamming_loss(targets, predictions)
            for average in ("micro", "macro", "weighted", "samples"):
                metrics.f1_score(targets, predictions, average)

        ours = (
            counts,
            lambda t=targets, s=scores: metrics.find_thresholds(t, s, "pr_curve"),
            lambda t=targets, s=scores: metrics.average_precision(t, s),
            lambda t=targets, s=scores: metrics.find_thresholds(t, s, "grid"),
        )
        names = "Hamming loss and four F1s", "PR-curve thresholds", "mAP", "grid of 41 thresholds"
        print(f"\n40,504 x 80, {unknown:.0%} NA            {'ours s':>8} {'sklearn s':>10} {'ratio':>7}  extra memory")
        for name, mine, other in zip(names, ours, references(targets, scores, predictions)):
            seconds, reference, ratio = alternate(mine, other, runs=1 if name.startswith("grid") else 5)
            extra = peak_memory(mine) / scores.nbytes
            print(f"{name:28} {seconds:8.3f} {reference:10.3f} {ratio:6.1f}x  {extra:.2f} x the scores", flush=True)
    targets, scores = problem(500_000, 200, 0.1)
    print("\n500,000 x 200, 10% NA        seconds  extra memory")
    for name, function in (
        ("report", lambda: metrics.report(targets, scores, 0.5, [str(c) for c in range(200)])),
        ("PR-curve thresholds", lambda: metrics.find_thresholds(targets, scores, "pr_curve")),
        ("grid of 41 thresholds", lambda: metrics.find_thresholds(targets, scores, "grid")),
        ("global threshold", lambda: metrics.find_thresholds(targets, scores, "global")),
    ):
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        print(f"{name:28} {seconds:7.2f}  {peak_memory(function) / scores.nbytes:.2f} x the scores", flush=True)


def bench_baseline(data="data/demo"):
    """A linear classifier on the pixels of the demo data, on the splits and thresholds of train.py: what a demo that
    is too easy would give away."""
    import torch
    from sklearn.linear_model import LogisticRegression

    import dataset

    table = dataset.read_labels(data)
    images = dataset.ImageDataset(table, 32)
    pixels = torch.stack([images[i][0] for i in range(len(images))]).float().flatten(1).numpy() / 255
    for seed in (0, 1, 2):
        train, val, test = dataset.split(table, seed=seed)
        scores = np.zeros(table.targets.shape)
        for c in range(len(table.classes)):
            known = train[~np.isnan(table.targets[train, c])]
            model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
            scores[:, c] = model.fit(pixels[known], table.targets[known, c]).predict_proba(pixels)[:, 1]
        thresholds = metrics.find_thresholds(table.targets[val], scores[val], "pr_curve", 0.8)
        report = metrics.report(table.targets[test], scores[test], thresholds, table.classes)
        print(f"seed {seed}: a linear classifier on pixels has test F1-macro {report['f1_macro']:.3f}, "
              f"mAP {report['map']:.3f}")


BENCHES = {"metrics": bench_metrics, "baseline": bench_baseline}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python tests/bench.py {'|'.join(BENCHES)}")
    BENCHES[sys.argv[1]](*sys.argv[2:])
