"""Measure the program beside a reference, in turn and in one run: ratios hold on a noisy machine, seconds do not.

    python tests/bench.py metrics            # metrics.py beside scikit-learn, on the size of COCO's validation set
    python tests/bench.py intervals [REPLICATIONS [CLASSES [MIN_POSITIVES]]]   # how often they cover the truth
    python tests/bench.py baseline           # a linear classifier on the pixels of the demo data
    python tests/bench.py train DATA         # images/s beside a plain loop, and beside the compute ceiling
    python tests/bench.py learn [DATA [WEIGHTS [SEEDS]]]   # time to the plain loop's best val mAP
    python tests/bench.py recipe PHOTOS SMALL WEIGHTS [VARIANT...]  # recipes at equal minutes; takes hours
    python tests/bench.py infer MODEL DIR    # inference.py beside the bare imports, and beside a plain loop
    python tests/bench.py export MODEL[,MODEL...]... [--tta]   # exported files beside predict()
    python tests/bench.py labels             # read_labels beside pandas (pip install pandas)
    python tests/bench.py coco [MEGABYTES]   # read_labels of a large COCO file, and of many files of YOLO and VOC
    python tests/bench.py scale [ROWS [CLASSES [FOLDER]]]   # start, resume and end of an epoch with many small files
    python tests/bench.py cache              # peak memory with and without a cache of 2 GiB
    python tests/bench.py thresholds RUN...  # threshold methods and calibration, on the val and test splits of runs
    python tests/bench.py suspects DATA WEIGHTS [SHARE [SEEDS]]  # are flipped labels found? beside cleanlab
    python tests/bench.py corrections DATA WEIGHTS   # what correcting the most suspicious labels recovers
    python tests/bench.py ask DATA WEIGHTS   # single labels chosen by --ask beside random ones and whole images
    python tests/bench.py unknown DATA WEIGHTS [SHARES [SEEDS [OPTION...]]]   # training with unknown labels
    python tests/bench.py backbones [NAME...]   # does every classification network of torchvision train and predict?
    python tests/bench.py pointing MODEL     # how often the heatmap of a demo defect is highest on the defect
"""

import dataclasses
import io
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import metrics  # noqa: E402


def alternate(ours, theirs, runs=5):
    """Run two functions in turn; return the median seconds of ours and of theirs, and the median of theirs / ours."""
    ours()  # imports and caches are warm from here on
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


def spread(values):
    """Return the mean of scores as text, with the standard deviation if there are several."""
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def peak_memory(function):
    """Return the most bytes that were allocated at once while the function ran."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def problem(rows, classes, unknown, seed=0):
    """Return targets with rare and frequent classes, and scores that are better than chance."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, classes), dtype=np.float32) < rng.uniform(0.002, 0.1, classes)).astype(np.float32)
    scores = (0.6 * rng.random((rows, classes), dtype=np.float32) + 0.4 * targets * rng.random(classes, np.float32))
    if unknown:
        targets[rng.random((rows, classes), dtype=np.float32) < unknown] = np.nan
    return targets, scores


def by_column(function, targets, values):
    """Call a function of scikit-learn on the known labels of each column."""
    known = ~np.isnan(targets)
    return [function(targets[known[:, c], c], values[known[:, c], c]) for c in range(targets.shape[1])]


def references(targets, scores, predictions):
    """Return the same four measurements with scikit-learn: on whole arrays, or column by column where there are NaN."""
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
    """Time metrics.py beside scikit-learn on the size of COCO's validation set, and then alone on a larger one."""
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

    targets, scores = problem(500_000, 200, 0.1)  # scikit-learn takes minutes here
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


def simulate(rng, rows, prevalence, distances):
    """Return targets, probabilities of a model and those of a weaker one, (rows, classes) each.

    Scores are Gaussian, and higher by `distances` (classes,) for positives. The labels of an image are correlated, and
    so are its scores, within a model and between the two.
    """
    def gaussian(correlation):
        own, shared = rng.normal(size=(rows, len(prevalence))), rng.normal(size=(rows, 1))
        return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own

    def probabilities(noise, distance):
        score = noise + distance * targets
        return metrics.sigmoid(distance * (score - distance / 2) + np.log(prevalence / (1 - prevalence)))

    border = [statistics.NormalDist().inv_cdf(1 - share) for share in prevalence]
    targets = (gaussian(0.2) > border).astype(float)
    noise = gaussian(0.2)
    return targets, probabilities(noise, distances), probabilities(0.8 * noise + 0.6 * gaussian(0.2), 0.9 * distances)


def bench_intervals(replications=500, classes=20, least=metrics.MIN_POSITIVES):
    """Print how often the 95 % intervals cover the truth, which is what 100,000 images say at the same thresholds.

    The truth of an interval of f1_macro or map is the mean over the classes that this interval covers.
    """
    replications, classes, metrics.MIN_POSITIVES = int(replications), int(classes), int(least)
    names = [str(c) for c in range(classes)]
    columns = {"f1_macro": "f1", "map": "average_precision"}
    print(f"{classes} classes, covered from {least} positives; {replications} replications; coverage +- standard error")
    for rows, fewest, most in [(rows, *few) for rows in (150, 1000) for few in ((2, 2), (5, 5), (20, 20), (2, 50))]:
        rng = np.random.default_rng(0)
        prevalence = np.geomspace(most, fewest, classes) / rows
        distances = 0.3 + np.linspace(0.7, 1.3, classes) * np.sqrt(-2 * np.log(prevalence))

        # The truth of both models
        targets, *models = simulate(rng, 100_000, prevalence, distances)
        thresholds = [metrics.find_thresholds(targets, p, "pr_curve") for p in models]
        truths = [metrics.report(targets, p, t, names) for p, t in zip(models, thresholds)]
        f1 = [row["f1"] for row in truths[0]["per_class"].values()]
        positives = f"{fewest} to {most}" if fewest < most else fewest
        print(f"\n{rows} images, {positives} positives per class; true F1 {min(f1):.2f} to {max(f1):.2f}, mean "
              f"{np.mean(f1):.2f}, mAP {truths[0]['map']:.2f}, of the other model {truths[1]['map']:.2f}")

        # Does each interval of a small test set cover it?
        covered = {}
        for _ in range(replications):
            targets, *models = simulate(rng, rows, prevalence, distances)
            supported = metrics._supported_classes((targets == 1).sum(axis=0))

            def truth(name, supported=supported, truths=truths):
                values = []
                for report in truths:
                    if name in columns:  # asked for only if there is an interval
                        column = [row[columns[name]] for row in report["per_class"].values()]
                        values.append(np.mean(np.array(column)[supported]))
                    else:
                        values.append(report[name])
                return values

            report = metrics.report(targets, models[0], thresholds[0], names, intervals=True)
            for name, (low, high) in report["intervals"].items():
                assert low <= report[name] <= high
                name = name.removesuffix("_supported")
                covered.setdefault((name, "single"), []).append((low <= truth(name)[0] <= high, high - low))
            differences = metrics.paired_differences(targets, models[0], thresholds[0], models[1], thresholds[1])
            for name, (*_, difference, low, high) in differences.items():
                if low is None:
                    continue
                assert low <= difference <= high
                name = name.removesuffix("_supported")
                one, other = truth(name)
                covered.setdefault((name, "paired"), []).append((low <= other - one <= high, high - low))

        for name in dict.fromkeys([*columns, *(name for name, _ in covered)]):
            line = f"{name:16}"
            for kind in ("single", "paired"):
                if (name, kind) not in covered:
                    line += f"  {kind} never given"
                    continue
                hits, widths = zip(*covered[name, kind])
                share = np.mean(hits)
                error = np.sqrt(share * (1 - share) / len(hits))
                line += (f"  {kind} {share:.3f} +- {error:.3f}, width {np.mean(widths):.3f}, "
                         f"given {len(hits) / replications:4.0%}")
            print(line, flush=True)


def bench_baseline(data="data/demo"):
    """Fit a linear classifier to the pixels of the demo data, with the splits and thresholds of train.py.

    Were the demo too easy, this classifier would be good at it.
    """
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


# ---------------------------------------------------------------------------------------------------------------------
# Training


def plain_loop(table, size=224, batch_size=16, backbone="resnet18", device="cpu"):
    """Return a function that trains one epoch as people write it, and its transforms for single images.

    That is Pillow, torchvision's transforms, a DataLoader and fp32.
    """
    import torch
    import torchvision
    from PIL import Image
    from torchvision import transforms

    change = transforms.Compose([
        transforms.Resize((size, size)), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(table)

        def __getitem__(self, i):
            return change(Image.open(table.paths[i]).convert("RGB")), torch.tensor(table.targets[i])

    loader = torch.utils.data.DataLoader(Images(), batch_size, shuffle=True, num_workers=os.cpu_count(), drop_last=True)
    network = torchvision.models.get_model(backbone, num_classes=len(table.classes)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def epoch():
        network.train()
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            known = ~torch.isnan(targets)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(images)[known], targets[known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    epoch.network = network
    return epoch, transforms.Compose([step for i, step in enumerate(change.transforms) if i != 1])


def describe_machine():
    """Print what the figures are measured on."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", info) or ["unknown processor"]
    flags = sorted(set(re.findall(r"\b(amx_\w+|avx512_bf16|avx512f|avx2)\b", info)))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "none")
    print(f"{names[0]}, {' '.join(flags) or 'no flags'}; {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"ONEDNN_MAX_CPU_ISA {limit}")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())


def ceiling(run, precision, layout):
    """Return a function for a number of training steps: same network, loss and optimiser, on tensors in memory."""
    import copy

    import torch

    import train

    network = copy.deepcopy(run.classifier.network).train().to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    options, device = run.options, run.classifier.device
    images = torch.randn(options.batch_size, 3, options.size, options.size).to(device, memory_format=layout)
    targets = torch.randint(0, 2, (options.batch_size, len(run.classifier.classes)), device=device).float()

    def steps(count):
        for _ in range(count):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = network(images).float()
            total, known = train.masked_bce(logits, targets, run.pos_weight)
            optimizer.zero_grad(set_to_none=True)
            (total / known).backward()
            optimizer.step()

    return steps


def ceilings(run):
    """Return {name: (function for a number of steps, seconds of a step)} of {fp32, bf16} x {contiguous, channels_last}.

    The best of four steps counts. What is three times slower than the best so far is measured by one step.
    """
    import torch

    found = {}
    for precision in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            steps = ceiling(run, precision, layout)
            times = [seconds(lambda: steps(1))]  # noqa: B023
            best = min([value for _, value in found.values()], default=times[0])
            while len(times) < 4 and times[-1] < 3 * best:
                times.append(seconds(lambda: steps(1)))  # noqa: B023
            found[f"{str(precision)[6:]} {str(layout)[6:]}"] = steps, min(times)
    return found


def start_run(*options):
    """Return a Run that is ready to train, and a function that trains one epoch of it."""
    import dataset
    import train

    class Silent:
        def step(self, *_):
            pass

    options = train.parse_options([*options, "-q", "--out", tempfile.mkdtemp()])
    cache = dataset.PixelCache(train.cache_budget(options.cache))
    run = train.build(options, train.read_data(options), cache=cache)

    def epoch():
        train.choose_layers(run)
        train.train_epoch(run, Silent())
        run.state = train.State(epoch=run.state.epoch + 1)

    return run, epoch


def seconds(function):
    """Return how long a call takes, and what it has asked a GPU to do."""
    import torch

    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench_train(data, *options):
    """Print the images per second of an epoch of ours, of a plain loop and of the ceiling, which reads no images.

    Further options are those of train.py, for example --backbone resnet50 -b 64 --precision bf16 on a GPU.
    """
    import torch

    import train

    describe_machine()
    torch.backends.cudnn.benchmark = True  # for the references too
    options = ["--data", data, "--weights", "none", *options]
    run, ours = start_run(*options)
    count = len(run.tables["train"])
    batch = run.options.batch_size
    plain, _ = plain_loop(run.tables["train"], run.options.size, batch, run.options.backbone, run.classifier.device)
    tops = ceilings(run)
    fastest = sorted(tops, key=lambda name: tops[name][1])
    chosen = f"{str(run.classifier.precision)[6:]} channels_last"
    print("a step on tensors in memory, images/s: "
          + ", ".join(f"{name} {batch / tops[name][1]:.1f}" for name in fastest))

    cold = count / seconds(ours)
    layers = start_run(*options, "--train-layers", "layer4,head")[1]
    layers()  # its cache is warm too
    work = {"ours": (ours, count), "plain loop": (plain, count), "layer4 and head only": (layers, count)}
    for name in dict.fromkeys([*fastest[:2], chosen]):  # what can be the ceiling, and what was chosen
        work[name] = (lambda steps=tops[name][0]: steps(6), 6 * batch)

    rates = {name: [] for name in work}
    for _ in range(3):
        for name, (function, images) in work.items():
            rates[name].append(images / seconds(function))
    median = {name: statistics.median(values) for name, values in rates.items()}
    top = max(fastest[:2], key=median.get)

    print(f"{count} images, {run.options.size} px, batch {batch}, {train.precision_name(run.classifier.precision)}")
    print(f"{'images/s':32} {'median':>7}  ours / it")
    for name, value in median.items():
        print(f"{name:32} {value:7.1f}  {median['ours'] / value:.2f}{'  the ceiling' if name == top else ''}")
    print(f"{'ours, first epoch':32} {cold:7.1f}  {cold / median['plain loop']:.2f} x the plain loop")
    if median[chosen] < 0.95 * median[top]:
        print(f"DEFECT: auto chose {chosen}, and {top} is {median[top] / median[chosen]:.2f} times as fast")


def scores_until(goal, run, epoch, network, precision, epochs):
    """Train a network until its mAP on val reaches the goal; return (mAP, seconds of training) after each epoch."""
    import torch

    import inference

    classifier = dataclasses.replace(run.classifier, members=[dataclasses.replace(run.member, network=network)])
    spent, score, rows = 0.0, 0.0, []
    while len(rows) < epochs and score < goal:
        spent += seconds(epoch)
        logits = inference.compute_logits(classifier, run.images["val"], precision)[0]
        score = metrics.average_precision(run.tables["val"].targets, torch.sigmoid(logits).numpy())
        rows.append((score, spent))
    return rows


def bench_learn(data="data/demo", weights="none", seeds="3"):
    """Print how long the default recipe trains until it reaches the best val mAP that a plain loop has in 10 epochs.

    Validation is not counted. Both start from scratch, or from the same weights.
    """
    import torch

    import inference

    describe_machine()
    recipe = ["--demo"] if weights == "none" else ["--size", "96", "--weights", weights]
    for seed in range(int(seeds)):
        run, ours = start_run(*recipe, "--data", data, "--seed", str(seed))
        torch.manual_seed(seed)
        plain, _ = plain_loop(run.tables["train"], run.options.size)
        if weights != "none":
            inference.load_weights(plain.network, weights, "resnet18")
        theirs = scores_until(1.0, run, plain, plain.network, torch.float32, 10)
        best, when = max(theirs, key=lambda row: row[0])
        rows = scores_until(best, run, ours, run.member.network, run.classifier.precision, run.options.epochs)
        there = rows[-1][1] if rows[-1][0] >= best else float("nan")
        print(f"seed {seed}: plain loop: best val mAP {best:.3f} after {when:.0f} s of {theirs[-1][1]:.0f} s; "
              f"ours: there after {there:.0f} s and {len(rows)} epochs, ratio {there / when:.2f}", flush=True)


# What `recipe` compares: the options in which each differs from the default. More: "NAME=OPTIONS" on the command line.
VARIANTS = {
    "former default": "--epochs 20 --lr 3e-4 --augment light --train-layers all --monitor map --patience 10 --sam 0",
    "default": "",
    "all layers": "--train-layers new --unfreeze all",
    "no warm-up": "--unfreeze-epoch 1",
    "rich": "--augment rich",
    "light": "--augment light",
    "lr 5e-4": "--lr 5e-4",
    "lr 2e-3": "--lr 2e-3",
    "backbone at 3e-4": "--lr-backbone 3e-4",
    "batch 32": "-b 32 --lr 1.5e-3",
    "no sam": "--sam 0",
    "no pos_weight": "--pos-weight none",
    "best epoch on val": "--monitor map",
    "mixup": "--mix mixup",
    "cutmix": "--mix cutmix",
    "asymmetric": "--loss asymmetric --pos-weight none",
    "balanced": "--sampler balanced --pos-weight none",
}


def recipe_tasks(photographs, small, weights):
    """Return {name: options of train.py} of the tasks on which variants are compared.

    They win over the options of a variant: folds keep their last epoch, and the demo its augmentation.
    """
    tasks = {}
    for start, size in ((weights, "128"), ("none", "96")):
        origin = "from scratch" if start == "none" else "pretrained"
        common = ["--weights", start, "--size", size]
        for share in (0.1, 0.2, 0.4):
            split = ["--split", str(share), "0.05", f"{0.95 - share:.2f}"]
            tasks[f"{share:.0%} of {Path(photographs).name}, {origin}"] = ["--data", photographs, *split, *common]
        folds = ["--data", small, "--folds", "5", "--monitor", "last", "--patience", "0"]
        tasks[f"{Path(small).name}, 5 folds, {origin}"] = [*folds, *common]
        demo = ["--demo", "--augment", "flip,vflip", "--pos-weight", "none", "--weights", start]
        tasks[f"demo, {origin}"] = [*demo, "--size", "64"]
    return tasks


def bench_recipe(photographs, small, weights, *variants, seeds=3):
    """Print test mAP and F1-macro of variants of the recipe, mean and standard deviation over seeds.

    All get as many minutes as the first one takes for its --epochs. The tasks are 10, 20 and 40 % of a folder of
    photographs (the rest is mostly test), a small folder in five folds, and the demo, each with weights and without.
    Weights of another network than ResNet18 take variants that name it, such as "default=--backbone efficientnet_b0".
    """
    import train

    describe_machine()
    chosen = {name: options if given else VARIANTS[name]
              for name, given, options in (variant.partition("=") for variant in variants or VARIANTS)}
    print(f"{'':40} {'variant':20} epochs  seconds  mAP           F1-macro")
    for task, where in recipe_tasks(photographs, small, weights).items():
        budget = None
        seen = []  # what the variants come to: some do not differ on a task
        for name, options in chosen.items():
            command = [*options.split(), *where]
            parsed = train.parse_options(command)
            if parsed in seen:
                continue
            seen.append(parsed)

            # Epochs for the same minutes. --sam makes those of the second half longer.
            run, epoch = start_run(*command, "--unfreeze-epoch", "1")  # what most epochs cost
            length = run.options.epochs
            epoch()  # fills the cache
            halves = []
            for done in (0, 0, length - 1, length - 1):
                run.state.epoch = done
                halves.append(seconds(epoch))
            own = (min(halves[:2]) + min(halves[2:])) / 2
            budget = budget or length * own
            epochs = str(max(1, round(budget / own)))

            rows = []
            for seed in range(seeds):
                out = tempfile.mkdtemp()
                start = time.perf_counter()
                report = train.main([*command, "--epochs", epochs, "--seed", str(seed), "-q", "--out", out])
                rows.append((report["map"], report["f1_macro"], time.perf_counter() - start))
                shutil.rmtree(out)
            scores, f1, taken = zip(*rows)
            print(f"{task:40} {name:20} {epochs:>6} {statistics.mean(taken):8.0f}  {spread(scores)}  {spread(f1)}",
                  flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Inference, label files, memory


def bench_infer(model, folder):
    """Time inference.py on one image beside the bare imports, and predict() on a folder beside a plain loop."""
    describe_machine()
    image = str(next(path for path in sorted(Path(folder).iterdir()) if path.suffix == ".jpg"))
    call = [sys.executable, str(ROOT / "inference.py"), "--model", model]
    run = lambda *command: subprocess.run(command, check=True, capture_output=True)  # noqa: E731
    bare = lambda: run(sys.executable, "-c", "import torch, torchvision")  # noqa: E731
    mine, other, ratio = alternate(lambda: run(*call, image), bare)
    print(f"one image, whole process: {mine:.2f} s; import torch, torchvision: {other:.2f} s; ratio {1 / ratio:.2f}")

    import torch
    from PIL import Image

    import dataset
    import inference

    paths = sorted(map(str, Path(folder).iterdir()))
    fast, slow = inference.load_model(model), inference.load_model(model, precision="fp32")
    network = slow.network.to(memory_format=torch.contiguous_format)  # as torchvision builds it
    unknown = np.zeros((len(paths), len(slow.classes)), np.float32)
    change = plain_loop(dataset.LabelTable(paths, paths, unknown, slow.classes), slow.size)[1]

    def plain():
        with torch.no_grad():
            for path in paths:
                torch.sigmoid(network(change(Image.open(path).convert("RGB"))[None]))

    mine, other, ratio = alternate(lambda: inference.predict(fast, paths), plain, runs=3)
    print(f"{len(paths)} images: predict {mine:.2f} s; plain loop: {other:.2f} s; ratio {ratio:.2f}")


def bench_export(*arguments):
    """Compare exported files with predict(), in fp32 and one thread: largest difference, and time per image.

    Each argument is a model, or several with commas between them, whose average is exported.
    """
    import contextlib
    import io

    import onnxruntime
    import torch

    import inference

    torch.set_num_threads(1)
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = one_thread.inter_op_num_threads = 1
    describe_machine()
    print(f"onnxruntime {onnxruntime.__version__}; largest difference from predict(), and ms per image\n\n"
          "                                       difference         batch of 1            batch of 32\n"
          "model                                .pt2     .onnx  predict  .pt2  .onnx   predict  .pt2  .onnx")

    for group in (argument for argument in arguments if argument != "--tta"):
        classifier = inference.load_model(group.split(","), "cpu", "fp32")
        classifier.mirrored |= "--tta" in arguments
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / name) for name in ("model.pt2", "model.onnx")]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                differences = [inference.export_model(classifier, path) for path in paths]
            program = torch.export.load(paths[0]).module()
            session = onnxruntime.InferenceSession(paths[1], one_thread)

        size = classifier.size
        images = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), np.uint8)
        stacked = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        times = []
        for count, rounds in ((1, 25), (32, 5)):
            ways = (lambda n=count: inference.predict(classifier, list(images[:n]), workers=0),  # noqa: B023
                    lambda n=count: program(torch.from_numpy(stacked[:n])),  # noqa: B023
                    lambda n=count: session.run(None, {"images": stacked[:n]}))  # noqa: B023
            for way in ways:
                way()  # the first call prepares
            turns = [[seconds(way) for way in ways] for _ in range(rounds)]  # each round takes turns
            times += (1000 * np.min(turns, axis=0) / count).tolist()  # the least disturbed

        name = str(classifier).partition(";")[0] + ", mirrored" * classifier.mirrored
        print(f"{name:34}{differences[0]:8.1e}  {differences[1]:8.1e}  {times[0]:7.1f}{times[1]:6.1f}{times[2]:7.1f}"
              f"   {times[3]:7.1f}{times[4]:6.1f}{times[5]:7.1f}", flush=True)


def bench_labels(rows=200_000, classes=80):
    """Time read_labels() of a large labels.txt beside pandas.read_csv() and a scan of the folder.

    The file has plain names, and then absolute paths of another machine.
    """
    import pandas

    import dataset

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/images")
        words = np.array(["0", "1", "NA"])[rng.choice(3, (rows, classes), p=[0.85, 0.1, 0.05])]
        for i in range(rows):
            open(f"{folder}/images/image_{i}.jpg", "w").close()

        def reference():
            pandas.read_csv(f"{folder}/labels.txt", sep=" ", header=None, na_values=["NA"])
            with os.scandir(f"{folder}/images") as entries:
                assert len({entry.name for entry in entries}) == rows

        for kind, start in (("plain names", ""), ("foreign paths", "/home/other/set/")):
            with open(f"{folder}/labels.txt", "w") as file:
                file.writelines(f"{start}image_{i}.jpg {' '.join(row)}\n" for i, row in enumerate(words))
            mine, other, ratio = alternate(lambda: dataset.read_labels(folder), reference)
            print(f"{rows} x {classes}, {kind}: read_labels {mine:.2f} s; pandas and os.scandir {other:.2f} s; "
                  f"ratio {1 / ratio:.2f}")


def bench_coco(megabytes=450, files=100_000):
    """Time read_labels() of a COCO file with polygons, and of YOLO and Pascal VOC files, and print the peak memory.

    Each is read in a process of its own. The images are empty files, which read_labels() does not open.
    """
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("coco", "yolo", "voc"):
            data = Path(folder, kind)
            write = {"coco": write_large_coco, "yolo": write_many_yolo, "voc": write_many_voc}[kind]
            count = write(data, int(megabytes) if kind == "coco" else int(files))
            code = (f"import resource, sys, time; sys.path.insert(0, {str(ROOT)!r}); import dataset; "
                    f"start = time.perf_counter(); table = dataset.read_labels({str(data)!r}); "
                    f"print(len(table), time.perf_counter() - start, "
                    f"resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
            result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            images, seconds, peak = map(float, result.stdout.split())
            assert images == count
            print(f"{kind}: {images:.0f} images in {seconds:.1f} s, peak {peak / 2**20:.2f} GiB, imports included",
                  flush=True)


def write_large_coco(folder, megabytes):
    """Write COCO JSON of about this size, with empty files as images. Returns the number of images."""
    rng = np.random.default_rng(0)
    polygons = [[[round(value, 2) for value in rng.uniform(0, 640, 2 * length).tolist()]]
                for length in rng.integers(4, 30, 1000)]
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    names = [f"{number:012d}.jpg" for number in range(megabytes * 260)]  # 118,000 in the 450 MB of COCO's train2017
    for name in names:
        (folder / "train2017" / name).touch()

    images = (f'{{"license": 1, "file_name": "{name}", "coco_url": "http://images.cocodataset.org/{name}", '
              f'"height": 480, "width": 640, "id": {number}}}' for number, name in enumerate(names))
    categories = (f'{{"supercategory": "x", "id": {k}, "name": "class {k}"}}' for k in range(1, 91))
    with open(folder / "annotations" / "instances_train2017.json", "w") as file:
        file.write(f'{{"info": {{}}, "images": [{", ".join(images)}], "categories": [{", ".join(categories)}], '
                   '"annotations": [')
        number = 0
        while file.tell() < megabytes * 1e6:
            file.write(f'{", " if number else ""}{{"segmentation": {polygons[number % 1000]}, "area": 702.1, '
                       f'"iscrowd": 0, "image_id": {number * 7 % len(names)}, "bbox": [473.07, 395.93, 38.65, 28.67], '
                       f'"category_id": {number % 90 + 1}, "id": {number}}}')
            number += 1
        file.write("]}")
    return len(names)


def write_many_yolo(folder, count):
    """Write YOLO files, with empty files as images. Returns their number."""
    for place in ("images/train", "images/val", "labels/train", "labels/val"):
        (folder / place).mkdir(parents=True)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, c, d, e]\n")
    for number in range(count):
        name = f"{'val' if number % 10 == 0 else 'train'}/{number:012d}"
        (folder / "images" / f"{name}.jpg").touch()
        lines = (f"{(number + box) % 5} 0.479492 0.688771 0.955609 0.595500\n" for box in range(number % 8))
        (folder / "labels" / f"{name}.txt").write_text("".join(lines))
    return count


def write_many_voc(folder, count):
    """Write Pascal VOC files, with empty files as images. Returns their number."""
    for place in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    names = [f"{number:06d}" for number in range(count)]
    for number, name in enumerate(names):
        (folder / "JPEGImages" / f"{name}.jpg").touch()
        objects = "".join(
            f"<object>\n<name>class {(number + box) % 20}</name>\n<pose>Left</pose>\n<truncated>1</truncated>\n"
            "<difficult>0</difficult>\n<bndbox><xmin>263</xmin><ymin>211</ymin><xmax>324</xmax><ymax>339</ymax>"
            "</bndbox>\n</object>\n" for box in range(1 + number % 3))
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>\n<folder>VOC2007</folder>\n<filename>{name}.jpg</filename>\n<size><width>500</width>"
            f"<height>375</height><depth>3</depth></size>\n<segmented>0</segmented>\n{objects}</annotation>\n")
    for part, chosen in (("train", names[: count // 2]), ("val", names[count // 2 :])):
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(chosen) + "\n")
    return count


# Each command starts in a process of its own and ends where the first training step would begin. "stop" takes the
# step and saves. "epoch" then ends an epoch after a million steps, on made-up outputs for val.
STARTS = """
import os, resource, sys
sys.path.insert(0, {root!r})
command, data, out = sys.argv[1:]
if command == "dataset.py":
    import dataset
    dataset.main([data])
    sys.exit()

import torch
import inference, train
options = ["--data", data, "--out", out, "--weights", "none", "--size", "32", "--cache", "off", "--device", "cpu"]

def first_step(run, *batch):
    if command in ("train.py", "--resume"):
        sys.stdout.flush()
        os._exit(0)
    run.signal = 15
    return torch.tensor(0.5)

def outputs(classifier, images, *rest, **more):
    return torch.randn(1, len(images), len(classifier.classes), generator=torch.Generator().manual_seed(0))

def finished_epoch(run):
    if command == "epoch":
        run.state.losses = [1 / (1 + step / 1000) for step in range(1_000_000)]
        run.state.images = len(run.tables["train"])
        inference.compute_logits = outputs
        before = resource.getrusage(resource.RUSAGE_SELF)
        train.end_epoch(run)
        after = resource.getrusage(resource.RUSAGE_SELF)
        print("end of an epoch:", after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        os._exit(0)
    raise SystemExit

train.train_step = first_step
if command == "epoch":
    train.fit = finished_epoch
train.main(options + ["--resume"] * (command == "--resume"))
"""


def bench_scale(rows=1_000_000, classes=5, folder=None):
    """Print the CPU seconds and peak memory of starting, resuming and ending an epoch with many small files.

    The files are kept in FOLDER and used again if they are there already; without FOLDER, they are temporary.
    """
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(folder or temporary)
        if not (data / "labels.txt").exists():
            write_many_images(data, int(rows), int(classes))
        for entry in os.scandir(data / "images"):  # from now on the files are in the page cache
            with open(entry.path, "rb") as file:
                file.read()
        describe_machine()

        script = Path(temporary, "starts.py")
        script.write_text(STARTS.format(root=str(ROOT)))
        for command in ("dataset.py", "train.py", "stop", "--resume", "epoch"):
            arguments = [sys.executable, str(script), command, str(data), f"{temporary}/out"]
            process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            output = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            seconds = used.ru_utime + used.ru_stime
            ended = re.search(r"end of an epoch: ([\d.]+)", output)
            print(f"{rows} x {classes}  {command:12}{seconds:8.1f} s of CPU, peak {used.ru_maxrss / 2**20:.2f} GiB"
                  + (f"; the end of the epoch alone {float(ended[1]):.1f} s" if ended else ""), flush=True)
            assert status in (0, 143 << 8), output


def write_many_images(folder, rows, classes):
    """Write a labels.txt and as many small JPEG files, no two of which have the same bytes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(buffer, "jpeg")
    image = buffer.getvalue()
    labels = np.array(["0", "1", "NA"])[rng.choice(3, (rows, classes), p=[0.7, 0.2, 0.1])]
    with open(folder / "labels.txt", "w") as file:
        for row, words in enumerate(labels.tolist()):
            with open(f"{folder}/images/{row:07d}.jpg", "wb") as picture:
                picture.write(image + str(row).encode())
            file.write(f"{row:07d}.jpg {' '.join(words)}\n")


def bench_cache(gigabytes=None):
    """Print the peak memory of reading 100,000 images of 256 px at 224, each setting in a process of its own."""
    if gigabytes is None:
        peaks = {}
        for setting in ("0", "2"):
            command = [sys.executable, __file__, "cache", setting]
            peaks[setting] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"--cache {setting}: peak memory {peaks[setting] / 2**20:.2f} GiB", flush=True)
        print(f"difference {(peaks['2'] - peaks['0']) / 2**20:.2f} GiB")
        return

    from PIL import Image

    import dataset

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(50):
            Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(f"{folder}/{i}.jpg")
        names, targets = [str(i) for i in range(100_000)], np.zeros((100_000, 80), np.float32)
        files = [f"{folder}/{i}.jpg" for i in range(100_000)]
        for i in range(50, 100_000):  # each has a path of its own, by which the cache knows it
            os.link(files[i % 50], files[i])
        table = dataset.LabelTable(names, files, targets, [str(c) for c in range(80)])
        images = dataset.ImageDataset(table, 224, dataset.PixelCache(float(gigabytes) * 2**30))
        for _ in dataset.batches(images, np.array_split(np.arange(100_000), 100_000 // 64), 2):
            pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def bench_pointing(model, data="data/demo", seed=0):
    """Print how often the heatmap of a defect that was rightly found is highest inside the box of the defect.

    Chance would give the share of the image that the boxes cover, which is beside it.
    """
    import dataset
    import inference

    classifier = inference.load_model(model)
    table = dataset.read_labels(data, Path(model).parent / "test_metadata.csv")
    found, hits, chance = [], [], []
    for row, probabilities in enumerate(inference.predict(classifier, table.paths)):
        rng = np.random.default_rng([seed, int(Path(table.paths[row]).stem.removeprefix("part_"))])
        boxes = dataset.draw_demo_image(dataset.draw_demo_labels(rng), rng)[1]
        for name in dataset.DEMO_GROUPS["defects"]:
            c = classifier.classes.index(name)
            if table.targets[row, c] == 1 and probabilities[c] >= classifier.thresholds[c]:
                heat = inference.heatmaps(classifier, table.paths[row], [c])[0]
                y, x = (np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) * dataset.DEMO_SIZE / len(heat)
                left, top, right, bottom = boxes[name]
                found.append(name)
                hits.append(left <= x <= right and top <= y <= bottom)
                chance.append((right - left) * (bottom - top) / dataset.DEMO_SIZE**2)

    for name in dict.fromkeys(["all defects", *found]):
        rows = [i for i, other in enumerate(found) if name in (other, "all defects")]
        print(f"{name:12} {len(rows):4} found, {np.mean([hits[i] for i in rows]):.1%} pointed at, "
              f"{np.mean([chance[i] for i in rows]):.1%} by chance")


def held_out(folder):
    """Return what a run did not train on: targets, plain probabilities, those without the bias of pos_weight, and which
    rows are of val."""
    import torch

    import dataset
    import inference
    import train

    classifier = inference.load_model(f"{folder}/model.pth", precision="fp32")
    options = classifier.options
    tables = {}
    for part in dataset.PARTS:
        how = {"labels": f"{folder}/{part}_metadata.csv", "images": options["images"]}
        tables[part] = dataset.read_labels(options["data"], **how)

    weight = train.compute_pos_weight(tables["train"].targets, options["pos_weight"], options["pos_weight_clip"])
    logits = []
    for part in ("val", "test"):
        images = dataset.ImageDataset(tables[part], classifier.size)
        logits.append(inference.compute_logits(classifier, images, torch.float32)[0].double().numpy())

    targets = np.concatenate([tables["val"].targets, tables["test"].targets])
    logits = np.concatenate(logits)
    of_val = np.arange(len(targets)) < len(tables["val"])
    return targets, metrics.sigmoid(logits), metrics.sigmoid(logits - np.log(weight)), of_val


def calibrated(targets, probabilities, val):
    """Return the probabilities, calibrated on the rows `val`."""
    return metrics.calibrate(probabilities, *metrics.fit_calibration(targets[val], probabilities[val]))


def bench_thresholds(*folders):
    """Print test F1-macro of each threshold method, and what calibration does to ECE, Brier score and log loss.

    F1 is the mean over 200 random divisions of the held-out images. The runs NAME0, NAME1 and so on are averaged.
    """
    table, calibration = {}, {}

    for folder in folders:
        name = Path(folder).name.rstrip("0123456789")
        targets, plain, undone, of_val = held_out(folder)
        for share in (0.5, 0.25):
            rng = np.random.default_rng(0)
            for _ in range(200):
                order = rng.permutation(len(targets))
                val, test = np.split(order, [round(share * len(order))])
                scores = dict.fromkeys((0.5, "pr_curve", "grid"), plain)
                scores["soft"] = calibrated(targets, undone, val)
                for method, p in scores.items():
                    most = None if method == "soft" else 0.8
                    thresholds = metrics.find_thresholds(targets[val], p[val], method, most)
                    f1 = metrics.f1_score(targets[test], p[test] >= thresholds, "macro")
                    table.setdefault(f"{name} {share:.0%} val", {}).setdefault(method, []).append(f1)
        for kind, p in (("before", plain), ("after", calibrated(targets, undone, of_val))):
            report = metrics.report(targets[~of_val], p[~of_val], 0.5, list(map(str, range(targets.shape[1]))))
            calibration.setdefault((name, kind), []).append([report[key] for key in ("ece", "brier", "log_loss")])
    print(f"{'test F1-macro':20} {'0.5':>8} {'pr_curve':>8} {'grid':>8} {'soft':>8}")
    for name, row in table.items():
        print(f"{name:20} " + " ".join(f"{np.mean(values):8.3f}" for values in row.values()))
    print(f"\n{'on test':20} {'ece':>8} {'brier':>8} {'log loss':>8}")
    for (name, kind), values in calibration.items():
        print(f"{name + ', ' + kind:20} " + " ".join(f"{value:8.3f}" for value in np.mean(values, axis=0)))


# ---------------------------------------------------------------------------------------------------------------------
# Better labels: does it find the wrong ones, and do corrections and answers pay?


def write_labels(folder, table, targets, parts=None):
    """Write a data folder with the images of a table and these targets, and return its path."""
    import dataset

    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    rows = [["image", *["split"] * bool(parts), *table.classes]]
    for i, (path, row) in enumerate(zip(table.paths, targets)):
        (folder / "images" / Path(path).name).symlink_to(Path(path).resolve())
        cells = ["NA" if np.isnan(value) else int(value) for value in row]
        rows.append([Path(path).name, *([parts[i]] if parts else []), *cells])
    dataset.write_csv(folder / "labels.csv", rows)
    return folder


def train_quietly(folder, name, seed, weights, *options):
    """Train on a data folder, and return the report and the folder of the run."""
    import contextlib
    import io

    import train

    out = folder / name
    with contextlib.redirect_stdout(io.StringIO()):
        report = train.main(["--data", str(folder), "--out", str(out), "--seed", str(seed), "--weights", weights,
                             "--size", "112", "--epochs", "10", "-q", *options])
    return report, out


def flip(targets, share, rng, rows=None):
    """Return targets with a share of the known labels (of some rows) flipped, and which ones: boolean (N, C)."""
    allowed = ~np.isnan(targets)
    if rows is not None:
        allowed[np.setdiff1d(np.arange(len(targets)), rows)] = False
    places = np.argwhere(allowed)
    chosen = places[rng.permutation(len(places))[: round(share * len(places))]]
    flipped = np.zeros(targets.shape, bool)
    flipped[tuple(chosen.T)] = True
    return np.where(flipped, 1 - targets, targets), flipped


def out_of_fold(out, table):
    """Return the out-of-fold probabilities (N, C) that a run with folds wrote, in the order of a table."""
    import csv

    with open(out / "probabilities.csv", newline="") as file:
        rows = {row["ID"]: row for row in csv.DictReader(file)}
    return np.array([[float(rows[Path(path).name][name]) for name in table.classes] for path in table.paths])


def bench_suspects(data, weights, share="0.05", seeds="0,1,2", *options):
    """Flip some of the known labels, and print how well out-of-fold predictions find them: beside cleanlab.

    cleanlab (pip install cleanlab) says of each class which known labels it takes for wrong. Its precision stands
    beside that of as many of our most suspicious labels. Further options are those of train.py.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_self_confidence_for_each_label
    from sklearn.metrics import roc_auc_score

    import dataset

    describe_machine()
    truth = dataset.read_labels(data)
    for seed in map(int, seeds.split(",")):
        given, flipped = flip(truth.targets, float(share), np.random.default_rng(seed))
        with tempfile.TemporaryDirectory() as folder:
            folder = write_labels(Path(folder) / "data", truth, given)
            report, out = train_quietly(folder, "out", seed, weights, "--folds", "5", *options)
            probabilities = out_of_fold(out, truth)

        known = ~np.isnan(given)
        quality = metrics.label_quality(given, probabilities)
        order = np.argsort(quality[known], kind="stable")
        hits = flipped[known][order]
        flagged = np.zeros(given.shape, bool)
        for c in range(given.shape[1]):
            rows, p = known[:, c], probabilities[known[:, c], c]
            labels, pairs = given[rows, c].astype(int), np.stack([1 - p, p], axis=1)
            flagged[rows, c] = find_label_issues(labels, pairs)
            np.testing.assert_array_equal(quality[rows, c], get_self_confidence_for_each_label(labels, pairs))
        count = flagged.sum()
        suspects = (quality[known] < 0.5).sum()
        print(f"seed {seed}: {flipped.sum()} of {known.sum()} labels flipped, out-of-fold mAP {report['map']:.3f} (by "
              f"the flipped labels); AUROC {roc_auc_score(flipped[known], -quality[known]):.3f}; truly flipped: of the "
              f"first 100 {hits[:100].mean():.2f}, of all {suspects} suspects {hits[:suspects].mean():.2f}; of the "
              f"{count} that cleanlab flags {flipped[flagged].mean():.2f}, of as many of ours "
              f"{hits[:count].mean():.2f}", flush=True)


def bench_corrections(data, weights, share="0.1", checked="0.15", seeds="0,1,2", *options):
    """Print the test mAP of a training with true labels, with some of them flipped, and with the suspects corrected.

    A share of the train and val labels is flipped; then the most suspicious share of them, `checked`, by five folds, is
    answered from the truth. 300 random images are for testing and 100 for val. Further options are those of train.py.
    """
    import dataset

    describe_machine()
    truth = dataset.read_labels(data)
    order = np.random.default_rng(0).permutation(len(truth))
    parts = ["train"] * len(truth)
    for i, row in enumerate(order[:400]):
        parts[row] = "test" if i < 300 else "val"
    pool = np.sort(order[300:])

    results = []
    for seed in map(int, seeds.split(",")):
        given, flipped = flip(truth.targets, float(share), np.random.default_rng(seed), pool)
        with tempfile.TemporaryDirectory() as folder:
            noisy = write_labels(Path(folder) / "flipped", truth, given, parts)
            _, out = train_quietly(noisy, "out", seed, weights, "--folds", "5", *options)
            quality = np.full(given.shape, np.nan)
            quality[pool] = metrics.label_quality(given[pool], out_of_fold(out, truth.subset(pool)))
            known = np.argwhere(~np.isnan(quality))
            order = np.argsort(quality[tuple(known.T)], kind="stable")
            suspects = tuple(known[order][: round(float(checked) * len(known))].T)
            corrected = given.copy()
            corrected[suspects] = truth.targets[suspects]

            scores = []
            for name, targets in (("true", truth.targets), ("wrong", given), ("corrected", corrected)):
                copy = write_labels(Path(folder) / name, truth, targets, parts)
                scores.append(train_quietly(copy, "out", seed, weights, *options)[0]["map"])
        results.append(scores)
        print(f"seed {seed}: {flipped.sum()} of {len(known)} labels flipped, {flipped[suspects].sum()} of them among "
              f"the {len(suspects[0])} most suspicious; test mAP {scores[0]:.3f} with true labels, {scores[1]:.3f} "
              f"with flipped ones, {scores[2]:.3f} corrected", flush=True)
    true, wrong, corrected = np.array(results).T
    for name, values in (("flipping costs", true - wrong), ("correcting recovers", corrected - wrong)):
        print(f"{name} {spread(values)}")
    print(f"{(corrected - wrong).sum() / (true - wrong).sum():.0%} is recovered")


def bench_ask(data, weights, seeds="0,1,2", steps=150):
    """Print the test mAP after each of four rounds of 300 answers, for three ways to choose what to ask for.

    "chosen" are single labels by inference.py --ask, "random" are random single labels, and "images" are random images,
    all of whose labels are answered. 100 images are labelled from the start, 600 are not, and 300 are for testing.
    Every training takes about as many steps, from the same weights.
    """
    import dataset

    describe_machine()
    truth = dataset.read_labels(data)
    curves = {}
    for seed in map(int, seeds.split(",")):
        rng = np.random.default_rng(seed)
        test, start, pool = np.split(rng.permutation(len(truth)), [300, 400])
        pool = np.sort(pool[:600])
        with tempfile.TemporaryDirectory() as folder:
            rows = [*test, *start]
            folder = write_labels(Path(folder) / "data", truth.subset(rows), truth.targets[rows],
                                  ["test"] * 300 + ["train"] * 100)
            for row in pool:
                name = Path(truth.paths[row]).name
                (folder / "images" / name).symlink_to(Path(truth.paths[row]).resolve())
            first = None  # the score before any answer, which all three ways share
            for way in ("chosen", "random", "images"):
                scores = rounds_of_answers(folder, way, truth, pool, seed, weights, int(steps), first)
                first = scores[0]
                curves.setdefault(way, []).append(scores)
                print(f"seed {seed}, {way:7} " + " ".join(f"{score:.3f}" for score in curves[way][-1]), flush=True)

    means = {way: np.mean(scores, axis=0) for way, scores in curves.items()}
    for way, scores in curves.items():
        print(f"mean of {len(scores)}, {way:7} " + "  ".join(map(spread, zip(*scores))))
    goal = means["images"][-1]
    needed = np.interp(goal, np.maximum.accumulate(means["chosen"]), np.arange(0, 1500, 300))
    print(f"images reach {goal:.3f} with 1200 answers, chosen labels with {needed:.0f}: {needed / 1200:.2f} of it")


def rounds_of_answers(folder, way, truth, pool, seed, weights, steps, first=None):
    """Return the test mAP before, and after each of four rounds of 300 answers from the truth."""
    import contextlib
    import io

    import dataset
    import inference

    rng = np.random.default_rng(seed)
    row_of = {Path(path).name: row for row, path in enumerate(truth.paths)}
    cells = [(row, c) for row in pool for c in range(len(truth.classes))]
    if way == "random":
        cells = [cells[i] for i in rng.permutation(len(cells))]
    elif way == "images":
        cells = [(row, c) for row in rng.permutation(pool) for c in range(len(truth.classes))]

    scores, answers, answered = [], [], set()
    for number in range(5):
        given = [option for path in answers for option in ("--answers", str(path))]
        if number == 0 and first is not None:
            scores.append(first)
        else:
            images = 82 + len({row for row, _ in answered})  # val takes 18 of the first 100
            epochs = str(max(1, round(16 * steps / images)))
            report, out = train_quietly(folder, "out", seed, weights, "--epochs", epochs, "--sam", "0", *given)
            scores.append(report["map"])
        if number == 4:
            break

        if way == "chosen":
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                questions = inference.main(["--ask", str(folder), "--model", str(out / "model.pth"), "--count", "300",
                                            "--out", str(folder.parent / "questions.csv"), *given])
            chosen = [(row_of[Path(one.path).name], truth.classes.index(one.label)) for one in questions]
        else:
            chosen = cells[300 * number : 300 * (number + 1)]
        answered.update(chosen)
        answers.append(folder.parent / f"{way}_{number}.csv")
        rows = [[Path(truth.paths[row]).name, truth.classes[c], "NA", "", int(truth.targets[row, c])]
                for row, c in chosen]
        dataset.write_csv(answers[-1], [dataset.ANSWER_COLUMNS, *rows])
    return scores


def bench_unknown(data, weights, shares="0.2,0.5,0.8", seeds="0,1,2", *options):
    """Print test mAP and F1-macro of trainings in which only a share of the training labels is known.

    "masked" keeps random labels, and the others are unknown; "absent" takes the others for absent, as scripts without
    NA do; "images" keeps as many labels, but all those of random images. All labels are known of 100 images
    for val and 300 for testing; the others are for training. Every training takes about as many steps. Further options
    are those of train.py.
    """
    import dataset

    describe_machine()
    truth = dataset.read_labels(data)
    found = {}
    for seed in map(int, seeds.split(",")):
        rng = np.random.default_rng(seed)
        parts = np.array(["test"] * 300 + ["val"] * 100 + ["train"] * (len(truth) - 400))[rng.permutation(len(truth))]
        places = np.argwhere((parts == "train")[:, None] & ~np.isnan(truth.targets))
        places = places[rng.permutation(len(places))]
        images = rng.permutation(np.flatnonzero(parts == "train"))
        for share in [1.0, *map(float, shares.split(","))]:
            for way in ("masked", "absent", "images") if share < 1 else ("all",):
                targets, rows, epochs = truth.targets.copy(), np.arange(len(truth)), 10
                if way == "images":
                    rows = np.sort(np.r_[np.flatnonzero(parts != "train"), images[: round(share * len(images))]])
                    epochs = round(epochs / share)
                else:
                    targets[tuple(places[round(share * len(places)) :].T)] = 0 if way == "absent" else np.nan
                kept = truth.subset(rows)
                with tempfile.TemporaryDirectory() as folder:
                    folder = write_labels(Path(folder) / "data", kept, targets[rows], parts[rows].tolist())
                    report, _ = train_quietly(folder, "out", seed, weights, "--epochs", str(epochs), *options)
                found.setdefault((share, way), []).append((report["map"], report["f1_macro"]))
                print(f"seed {seed}, {share:.0%} known, {way:6}: mAP {report['map']:.3f}, F1-macro "
                      f"{report['f1_macro']:.3f}", flush=True)

    for (share, way), rows in found.items():
        scores, f1 = zip(*rows)
        print(f"{share:.0%} known, {way:6}: mAP {spread(scores)}, F1-macro {spread(f1)}")


def bench_backbones(*names):
    """Take a training step with each network of torchvision, at a small size, and use the model in every way."""
    import torchvision.models

    names = names or torchvision.models.list_models(module=torchvision.models)
    describe_machine()
    print("\n| backbone | parameters | size | loss of a step | predicts | heatmap | .pt2 off by | .onnx off by |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in names:
        print(f"| {name} | {' | '.join(try_backbone(name))} |", flush=True)


def try_backbone(name):
    """Return the cells of a table that says what works with a backbone."""
    import contextlib
    import io

    from PIL import Image

    import dataset
    import inference
    import train

    try:
        size = next(size for size in (64, 96, 224) if inference.build_without_values(name, size))
    except ValueError as error:
        return [str(error)]

    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
        noise = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
        paths = [Path(folder) / f"{number}.png" for number in range(4)]
        for path, pixels in zip(paths, noise):
            dataset.write_png(path, Image.fromarray(pixels))
        # Of an untrained network, the map of a label is zero as often as not: of eight, some are not.
        targets = np.random.default_rng(0).choice([0, 1, np.nan], (4, 8)).astype(np.float32)
        table = dataset.LabelTable(list("abcd"), paths, targets, list("stuvwxyz"))
        options = train.parse_options([*f"--backbone {name} --size {size} -b 4 --epochs 1 --weights none --device cpu "
                                        f"--precision fp32 -j 0 -q --out {folder}".split()])
        run = train.build(options, dict.fromkeys(("train", "val", "test"), table))
        train.choose_layers(run)
        train.train_epoch(run, train.ProgressLine(run))
        loss, classifier, run = run.state.losses[0], run.classifier, None

        millions = sum(weight.numel() for weight in classifier.network.parameters()) / 1e6
        predicts = np.isfinite(inference.predict(classifier, paths)).all()
        heat = inference.heatmaps(classifier, paths[0], list(range(8)))
        yes_or_no = ["yes" if works else "no" for works in (predicts, heat.any())]
        cells = [f"{millions:.1f} M", str(size), f"{loss:.3f}", *yes_or_no]
        for suffix in ("pt2", "onnx"):
            try:
                path = Path(folder) / f"model.{suffix}"
                cells.append(f"{inference.export_model(classifier, path):.1g}")
                path.unlink()
            except (ValueError, RuntimeError) as error:
                cells.append(f"no: {str(error)[:100]}")
    return cells


BENCHES = {name.removeprefix("bench_"): value for name, value in list(globals().items()) if name.startswith("bench_")}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python tests/bench.py {'|'.join(BENCHES)}")
    BENCHES[sys.argv[1]](*sys.argv[2:])
