"""Fine-tune an image network on labels that may be unknown.

    python train.py --data data/                              # ImageNet weights, data/labels.txt, data/images/
    python train.py --data data/ --weights none --epochs 50   # from scratch
    python train.py --demo                                    # drawn data, no network needed
    python train.py --data data/ --folds 5                    # five networks, each tested on what it was not trained on
    python train.py --data data/ --resume                     # go on where a run was stopped
    torchrun --standalone --nproc-per-node=2 train.py --data data/      # several GPUs, or processes on a CPU

    report = train.main(["--data", "data/", "--epochs", "10"])     # in a notebook; inference.py uses the model

A run reads the labels, divides them, trains with a masked loss, keeps the last epoch (with --patience the one that is
best on val), makes the probabilities honest and chooses a threshold per class on val, and reports on test. All its
files are in --out.
"""

import argparse
import atexit
import contextlib
import datetime
import hashlib
import itertools
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

import dataset
import inference
import metrics
from dataset import PARTS, InputError, number, print_text
from inference import BACKBONES, HEADS

# ---------------------------------------------------------------------------------------------------------------------
# Recipe: the options' defaults, and what changes them

# What measured best on photographs. The comments: test mAP with another value instead, after training on 200 of them
# for as many epochs, one seed, where 0.01 is noise, all without sam. tests/bench.py recipe compares most of them at
# equal minutes.
RECIPE = {
    "epochs": 20,
    "batch_size": 16,  # 32 with rate 1.5e-3 and 24 epochs, which takes as long: +0.007
    "lr": 1e-3,  # 5e-4: -0.009; 2e-3: -0.006; from scratch, in 6 epochs of the demo, 3e-3: -0.12
    "wd": 1e-2,  # 5e-2: -0.007
    "schedule": "cosine",  # one-cycle: 0.000
    "train_layers": "new",  # the late layers from the first epoch on: -0.017; the first layers too: -0.088
    # Crops that lose little: rich, which cuts to half and erases too, hides small things: -0.011 on meals, 0.000 on
    # traffic (with sam, three seeds), +0.013 on 400 images of it (one). Beside rich, light: -0.007.
    "augment": "flip,crop,rotation,perspective,jitter",
    "mix": "none",  # mixup: -0.015 (100 photographs, three seeds); cutmix: -0.021 (100, one seed)
    "sam": 0.1,  # 0: -0.012, in 0.76 of the time (100 and 200 photographs, three seeds)
    "loss": "bce",  # asymmetric, without pos_weight: -0.009 (100 photographs, three seeds)
    "sampler": "shuffle",  # balanced, without pos_weight: -0.003 (100 photographs)
    "pos_weight": "sqrt",  # none: -0.004
    "pos_weight_clip": [1, 20],
    "patience": 0,
}

# From scratch all time is needed for steps (the demo in equal time, 12 epochs: mAP -0.06); no published recipe has it.
NO_SAM = {"sam": 0.0}

# Small drawn images, and no pretrained weights to start from.
DEMO = {"data": "data/demo", "weights": "none", "size": 96, "epochs": 18, "augment": "flip,vflip", "pos_weight": "none"}

# The last epoch is kept, also by presets: to choose one by the part that is reported would flatter it.
FOLDS = {"split": [0.85, 0.15, 0], "monitor": "last", "patience": 0}

# With what lifts rare positives in another way, or plays down negatives.
NO_WEIGHT = {"pos_weight": "none"}

# Published recipes; the README says what each reproduces.
PRESETS = {
    "default": {},
    "inspection": {
        "backbone": "resnet18", "head": "linear", "train_layers": "all", "lr": 1e-3, "wd": 0.0, "batch_size": 16,
        "epochs": 10, "schedule": "constant", "monitor": "loss", "patience": 3, "pos_weight": "sqrt",
        "pos_weight_clip": [1, 20], "augment": "flip,rotation", "calibration": "none", "thresholds": "pr_curve",
        "max_threshold": 0.8,
    },
    "two-stage": {
        "backbone": "resnet18", "head": "mlp", "dropout": [0.5, 0.3], "train_layers": "head", "unfreeze": "layer4",
        "unfreeze_epoch": 3, "lr": 2e-3, "unfreeze_lr": 1e-4, "wd": 0.0, "batch_size": 16, "epochs": 50,
        "schedule": "constant", "monitor": "loss", "patience": 5, "pos_weight": "linear", "pos_weight_clip": None,
        "augment": "crop,flip,jitter,perspective,erasing", "calibration": "none", "thresholds": "0.5",
    },
    "assignment": {
        "backbone": "resnet18", "head": "linear", "train_layers": "all", "lr": 1e-3, "wd": 0.0, "epochs": 10,
        "schedule": "constant", "monitor": "loss", "patience": 0, "pos_weight": "linear", "pos_weight_clip": None,
        "augment": "none", "calibration": "none", "thresholds": "0.5", "plot_title": "Aimonk_multilabel_problem",
    },
    "resnet50": {
        "backbone": "resnet50", "head": "mlp", "dropout": [0.65, 0.4], "train_layers": "layer3,layer4,head",
        "lr": 5e-5, "wd": 1e-2, "epochs": 40, "schedule": "constant", "monitor": "loss", "patience": 5,
        "pos_weight": "linear", "pos_weight_clip": None, "augment": "resized_crop,flip,vflip,jitter,rotation,erasing",
        "calibration": "none", "thresholds": "0.5",
    },
    "coco": {
        "head": "bn", "train_layers": "head", "unfreeze": "all", "unfreeze_epoch": 3, "lr": 1e-3, "wd": 0.0,
        "schedule": "multistep", "monitor": "f1", "patience": 10, "pos_weight": "linear", "pos_weight_clip": None,
        "augment": "flip", "calibration": "none", "thresholds": "global",
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# Options


def option_parser():
    """The options of the command line, with their defaults."""
    parser = dataset.ArgumentParser(prog="train.py", usage="%(prog)s [--data DIR | --demo] [--preset NAME] [options]",
                                    description="Fine-tune an image network on labels that may be unknown.")
    real = number(float)
    whole = number(int)
    count = number(int, 1)
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", default="data", metavar="DIR", help="folder of labels and images")
    dataset.add_data_options(group)
    add("--split", type=float, nargs=3, default=[0.7, 0.15, 0.15], metavar=("TRAIN", "VAL", "TEST"), help="ratios")
    add("--folds", type=whole, default=0, metavar="K", help="train K networks, each on all of K parts but "
        "one, and report it on that one (and, where --split names a test ratio, all together on test)")
    add("--split-method", choices=("stratified", "random"), default="stratified", help="how rows are divided")
    add("--demo", action="store_true", help="draw data (data/demo) when not there, and train on it")
    add("--seed", type=whole, default=0, help="of the split, the head, the order and the augmentation")
    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=BACKBONES, default="resnet18", help="torchvision network")
    add("--head", choices=HEADS, default="linear", help="what replaces its last layer")
    add("--dropout", type=number(float, below=1), nargs="+", metavar="P", help="in the head (mlp: 0.5 0.3, else 0)")
    add("--weights", default="imagenet", metavar="W", help="imagenet, none, or a .pth file")
    add("--size", type=number(int, 32), default=224, help="images are resized to SIZE x SIZE")
    add = parser.add_argument_group("recipe").add_argument
    add("--preset", choices=PRESETS, default="default", help="a published recipe: other defaults")
    add("--epochs", type=count, help="with --patience at most so many")
    add("-b", "--batch-size", type=count, help="images per step")
    add("--lr", type=real, help="learning rate of the head")
    add("--lr-backbone", type=real, help="that of the backbone (default: that of the head)")
    add("--wd", type=real, help="weight decay of AdamW; 0 makes it Adam")
    add("--schedule", choices=("constant", "cosine", "multistep"), help="of the learning rates")
    add("--milestones", type=count, nargs="+", metavar="EPOCH", help="of multistep (default: half, 3/4 of the epochs)")
    add("--lr-decay", type=real, default=0.1, help="factor at each milestone")
    add("--train-layers", metavar="LAYERS", help="all, head, new (the head and what no weights were loaded for, "
        "then --unfreeze too; from scratch: all), late (all but the first layers), or names: layer3,layer4,head")
    add("--unfreeze", metavar="LAYERS", help="to train too from --unfreeze-epoch on (default: late with new)")
    add("--unfreeze-epoch", type=count, metavar="N", help="counted from 1 (default: after a quarter of the epochs)")
    add("--unfreeze-lr", type=real, metavar="LR", help="learning rate of all layers from then on")
    add("--augment", metavar="A", help=f"none, light, rich, or some of {','.join(dataset.OPERATIONS)}")
    add("--mix", choices=("none", *dataset.MIXES), help="each image with another: pixels, or a box")
    add("--sam", type=real, metavar="RADIUS", help="sharpness-aware minimisation (Foret 2021) in the second half of "
        "the epochs, whose steps take twice as long; 0: off, the default from scratch and of presets")
    add = parser.add_argument_group("imbalance").add_argument
    add("--loss", choices=LOSSES, help="asymmetric: easy negatives count little (Ridnik 2021)")
    add("--sampler", choices=("shuffle", "balanced"), help="balanced: rare labels more often")
    add("--pos-weight", choices=("none", "linear", "sqrt"), help="of positives in the loss")
    add("--pos-weight-clip", type=real, nargs=2, metavar=("LO", "HI"), help="its bounds")
    add = parser.add_argument_group("stopping").add_argument
    add("--monitor", choices=MONITORED, help="what is best on val (f1: weighted; last: the last epoch, which is the "
        "default without --patience; with it: map)")
    add("--patience", type=whole, help="validations without improvement to stop after; 0: never")
    add("--min-delta", type=real, default=0.0, help="what counts as an improvement")
    add("--val-every", type=count, default=1, metavar="N", help="epochs between validations")
    add("--train-metrics-every", type=whole, default=0, metavar="N", help="epochs between scores on train; 0: never")
    add = parser.add_argument_group("thresholds").add_argument
    add("--calibration", choices=("fit", "none"), default="fit", help="make the probabilities honest on val")
    add("--thresholds", type=threshold_method, default="soft", metavar="METHOD",
        help="soft, pr_curve, grid, global, or a number")
    add("--max-threshold", type=real, metavar="T", help="a threshold above it becomes 0.5")
    add = parser.add_argument_group("output").add_argument
    add("--out", default="outputs", metavar="DIR", help="folder for everything the run writes")
    add("--plot-title", type=plot_title, default="", metavar="TEXT", help="title of loss_curve.png, also saved as "
        "TITLE.png")
    add("--export-splits", metavar="DIR", help="copy the images into DIR/images/train, val, test")
    add("--registry", metavar="DIR", help="keep the best run (by F1 on val) of each configuration")
    add("--tensorboard", action="store_true", help="write scalars (package tensorboard)")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add = parser.add_argument_group("system").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("-j", "--workers", type=whole, default=inference.default_workers(), help="threads that decode images")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: what is measured faster")
    add("--cache", type=cache_size, default="auto", metavar="GB", help="of decoded images: auto, off, or GB")
    add("--resume", action="store_true", help="go on from OUT/last.pth")
    parser.set_defaults(**RECIPE)
    return parser


def parse_options(argv=None):
    """The command line -> Namespace. An explicit option wins over --folds, that over --preset, that
    over --demo."""
    parser = option_parser()
    first = parser.parse_known_args(argv)[0]
    lifted = first.sampler == "balanced" or first.loss == "asymmetric"
    parser.set_defaults(**DEMO if first.demo else {})
    scratch = parser.parse_known_args(argv)[0].weights == "none"
    parser.set_defaults(**(NO_SAM if scratch or first.preset != "default" else {}) | PRESETS[first.preset]
                        | (FOLDS if first.folds else {}) | (NO_WEIGHT if lifted else {}))
    options = parser.parse_args(argv)
    if options.folds == 1:
        raise InputError("--folds 1: each network needs a part that it is not trained on: give 2 or more")
    if options.folds and options.export_splits:
        raise InputError("--export-splits copies train, val and test, which --folds has not: leave out one of the two")
    dataset.read_operations(options.augment)  # raises InputError
    if options.pos_weight_clip and options.pos_weight_clip[0] > options.pos_weight_clip[1]:
        raise InputError("--pos-weight-clip takes the lower bound first")
    if options.lr_backbone is None:
        options.lr_backbone = options.lr
    options.dropout = options.dropout or HEADS[options.head]
    if len(options.dropout) > len(HEADS[options.head]):
        raise InputError(f"--dropout: the {options.head} head takes {len(HEADS[options.head])} of them")
    if options.train_layers == "new" and options.weights == "none":
        options.train_layers = "all"
    if options.train_layers == "new" and options.unfreeze is None:
        options.unfreeze = "late"
    options.monitor = options.monitor or ("map" if options.patience else "last")
    if options.patience and options.monitor == "last":
        raise InputError("--patience waits for a better epoch, but the last is kept: name a --monitor, or leave it out")
    options.unfreeze_epoch = options.unfreeze_epoch or 1 + options.epochs // 4
    options.milestones = options.milestones or [max(1, options.epochs // 2), max(1, options.epochs * 3 // 4)]
    return options


# ---------------------------------------------------------------------------------------------------------------------
# A run, from the command line to the gradient


def main(argv=None):
    """Train as the command line says -> the report, as metrics.json has it. Raises InputError."""
    options = parse_options(argv)
    start_processes(options)
    tables = read_data(options)
    check_out(options, tables)
    print_configuration(options)
    report = cross_validate(options, tables) if options.folds else train(build(options, tables))
    print_last_words(options, (tables["test"].paths or tables["val"].paths or tables["train"].paths)[0])
    return report


def train(run):
    """Train a run to its end -> its report."""
    wait_for_leader()
    with folder_locked(run.out) if is_leader() else contextlib.nullcontext():
        if is_leader():
            if not run.options.resume:
                remove_old_run(run.options)
                if run.options.export_splits:
                    export_splits(run.tables, run.options.export_splits)
            try:
                write_inputs(run.options, run.tables)
            except OSError as error:
                raise InputError(f"--out {run.options.out}: {error}") from None
            if run.state.history:  # of a resumed run: it may have been stopped before it was written
                write_history(run)
        fit(run)
        return finish(run)


@dataclass
class State:
    """How far a run is: plain values, which last.pth holds as they stand."""

    epoch: int = 0  # finished epochs
    images: int = 0  # images used of the epoch in progress
    seconds: float = 0.0  # that these took
    losses: list = field(default_factory=list)  # of every iteration
    history: list = field(default_factory=list)  # a dict per epoch

    def __str__(self):
        return f"{self.images} images of epoch {self.epoch + 1}" if self.images else f"epoch {self.epoch}"


@dataclass
class Run:
    """Everything that trains."""

    options: argparse.Namespace
    classifier: inference.Classifier
    tables: dict  # "train", "val" and "test" -> LabelTable
    images: dict  # the same -> ImageDataset
    fresh: tuple  # names of the parameters that no weights were loaded for
    pos_weight: torch.Tensor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    state: State = field(default_factory=State)
    model: nn.Module = None  # what is trained: the network, or one of its parallel copies
    signal: int = 0  # that asks to stop
    reported: set = field(default_factory=set)  # bad images that the user was told of
    board: object = None  # TensorBoard's writer

    @property
    def out(self):
        """The folder of the run's files."""
        return Path(self.options.out)

    @property
    def member(self):
        """The network that is trained, with its calibration."""
        return self.classifier.members[0]


def fit(run):
    """Train until the last epoch, or until patience or a signal says so."""
    options, state = run.options, run.state
    progress = ProgressLine(run)
    with signals_noted(run):
        # A run that was killed after last.pth was written, or that is resumed with another --monitor.
        if state.epoch and not state.images and find_best(run) != run.classifier.epoch:
            validate_last(run)

        while state.epoch < options.epochs:
            waited = best_epoch(state.history, options.monitor, options.min_delta)[1]
            if 0 < options.patience <= waited:
                break
            choose_layers(run)
            train_epoch(run, progress)
            if state.images == len(run.tables["train"]):
                end_epoch(run)
                progress.end_epoch()
            if should_stop(run):
                save_and_stop(run)

        # A run that is resumed with fewer --epochs than before, else the last epoch is validated.
        if not state.images and "val_loss" not in state.history[-1]:
            validate_last(run)


def train_epoch(run, progress):
    """One pass over (what is left of) the train split; a signal ends it after the step in hand."""
    options, state = run.options, run.state
    count = len(run.tables["train"])
    order = draw_batches(run)
    train_mode(run.member.network, options.backbone)
    started = time.perf_counter() - state.seconds
    losses = []
    for (*_, used), batch in zip(order, load_batches(run, order)):
        rates = learning_rates(options, state.epoch + (state.images + used) / 2 / count)
        for group, rate in zip(run.optimizer.param_groups, rates):
            group.update(lr=rate, weight_decay=options.wd)
        losses.append(train_step(run, *batch))
        state.images = used
        state.seconds = time.perf_counter() - started
        progress.step(losses[-1])
        if len(losses) % 100 == 0:
            gather_losses(run, losses)
        if should_stop(run, len(losses)):
            break
    else:
        state.images = count  # also what no label is known of
    gather_losses(run, losses)


def train_step(run, images, targets, share):
    """One step of the optimiser -> the loss of the whole batch, over all processes. `share` is that
    of an image's own labels in its loss; the rest is for those of the one before it.

    With --sam the gradient is, in the second half of the epochs, that of the place nearby where the
    loss is highest (sharpness-aware minimisation, Foret et al. 2021), which leads to flatter minima.
    An infinite one, of fp16, ends in NaN, and the scaler leaves out the step, as without.
    """
    loss = compute_gradient(run, images, targets, share)
    if run.options.sam and run.state.epoch >= run.options.epochs / 2:
        weights = [weight for weight in run.model.parameters() if weight.grad is not None]
        changed = [*weights, *run.model.buffers()]  # BatchNorm's statistics stay those of the weights that stay
        before = [tensor.detach().clone() for tensor in changed]
        climb(weights, run.options.sam)
        compute_gradient(run, images, targets, share)
        with torch.no_grad():
            for tensor, value in zip(changed, before):
                tensor.copy_(value)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss


def compute_gradient(run, images, targets, share):
    """Set the gradient of the loss -> the loss; arguments as of train_step()."""
    masked_loss = LOSSES[run.options.loss]
    logits = inference.forward(run.model, images, run.classifier.precision)
    total, known = masked_loss(logits, targets, run.pos_weight)
    if share < 1:  # as many labels are known
        total = share * total + (1 - share) * masked_loss(logits, targets.roll(1, 0), run.pos_weight)[0]
    all_total, all_known = sum_over_ranks(torch.stack([total.detach(), known]))
    loss = total * rank_and_ranks()[1] / all_known.clamp(min=1)  # DDP averages, it should sum
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    return all_total / all_known.clamp(min=1)


def climb(weights, radius):
    """Move the weights, together by `radius`, in the direction in which the loss rises most."""
    length = torch.stack([weight.grad.norm() for weight in weights]).norm().clamp(min=1e-12)
    with torch.no_grad():
        for weight in weights:
            weight += weight.grad * (radius / length)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them: each takes its share of every batch


def start_processes(options):
    """Join the processes of torchrun, if it started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return
    use_cuda = options.device in ("auto", "cuda") and torch.cuda.is_available()
    if use_cuda:
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(options.device)
    distributed.init_process_group("nccl" if use_cuda else "gloo")
    atexit.register(distributed.destroy_process_group)


def rank_and_ranks():
    """The number of this process, and of all."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_leader():
    """Whether this is the process that prints and writes."""
    return rank_and_ranks()[0] == 0


def wait_for_leader():
    """Go on when every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def sum_over_ranks(tensor):
    """The sum of a tensor over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_data(options):
    """Read and divide the labels -> {"train", "val" and "test": LabelTable}. Raises InputError."""
    if options.demo and is_leader() and not (Path(options.data) / "labels.txt").exists():
        print_once(options, f"drawing the demo data into {options.data}")
        dataset.write_demo(options.data)
    wait_for_leader()
    table = dataset.read_labels(options.data, **dataset.data_options(options))
    print_once(options, dataset.summary(table, options.data))
    parts = dataset.split(table, options.split, options.split_method, options.seed)
    tables = {name: table.subset(rows) for name, rows in zip(PARTS, parts)}
    source = "the data's own" if any(table.parts) else f"{options.split_method}, seed {options.seed}"
    if options.folds:
        pool = np.sort(np.concatenate(parts[:2]))
        tables |= {"train": table.subset(pool), "val": table.subset([])}
    counts = ", ".join(f"{len(part)} {name}" for name, part in tables.items())
    print_once(options, f"split ({source}): {counts}")
    if np.isnan(tables["train"].targets).all():
        raise InputError(f"{options.data}: no label of the train split is known: there is nothing to learn from")
    for warning in dataset.single_valued_classes(tables["train"]):
        print_warning(f"train split: {warning}: such a class cannot be learned")
    for name in ("val", "test"):
        if len(tables[name]) and np.isnan(tables[name].targets).all():
            print_warning(f"{name} split: no label is known: " + (
                "the last epoch is kept, and nothing is calibrated on it" if name == "val" else "nothing is reported"))
    if len(tables["val"]):
        check_val(options, tables["val"].targets)
    if options.monitor != "last" and (options.folds or len(tables["test"]) == 0):
        print_warning(f"--monitor {options.monitor} chooses the epoch on the images that are reported, which makes the "
                      "model look better than it is: --monitor last --patience 0 keeps the last one")
    check_batches(options, len(tables["train"]), min(len(part) for part in tables.values() if len(part)))
    return tables


def check_val(options, targets):
    """Raise an InputError when the score of --monitor cannot change from epoch to epoch on val, with its targets (N,
    C)."""
    needs = {"loss": "a known label", "f1": "a known positive label",
             "map": "a class with known positives and known negatives"}
    positive, negative = (targets == 1).any(axis=0), (targets == 0).any(axis=0)
    has = {"loss": positive | negative, "f1": positive, "map": positive & negative}
    if options.monitor != "last" and not has[options.monitor].any():
        raise InputError(f"--monitor {options.monitor} needs {needs[options.monitor]} on val, and there is none: know "
                         "more labels, change --split, or keep the last epoch with --monitor last --patience 0")


def check_batches(options, count, smallest):
    """Raise an InputError when a process would have too few of the `count` images to train on, or
    of the smallest split."""
    ranks = rank_and_ranks()[1]
    share = count // steps_per_epoch(options, count) // ranks
    if ranks > smallest or share == 0:
        raise InputError(f"{ranks} processes are too many for batches of {options.batch_size} and splits of {smallest}")
    if share == 1 and not trains_on_one_image(options):
        larger = f", or raise --size {options.size}" if options.head == "linear" else ""
        raise InputError(f"with -b {options.batch_size} and {count} images to train on a process gets a single "
                         f"image in a step, and BatchNorm needs two: raise -b, or add images{larger}")


def trains_on_one_image(options):
    """Return whether the network can train on one image at a time: BatchNorm needs two values of each channel."""
    with torch.device("meta"):  # shapes are computed, and no values
        network = inference.build_model(options.backbone, options.head, 1, options.dropout)
        image = torch.empty(1, 3, options.size, options.size)
    try:
        network.train()(image)
    except ValueError:  # of BatchNorm
        return False
    return True


def steps_per_epoch(options, count):
    """The number of batches of `count` images, equal ones: no single image meets a BatchNorm."""
    steps = -(-count // options.batch_size)
    if options.batch_size > 1:
        steps = min(steps, count // 2)
    return max(1, steps)


# ---------------------------------------------------------------------------------------------------------------------
# The network and all that trains it


def build(options, tables, weights=None):
    """Build the Run: the network and all that trains it, or with --resume what last.pth holds.

    weights: what read_weights() returned, if it was called before.
    """
    last = read_state(options, tables) if options.resume else None
    torch.manual_seed(options.seed)
    table = tables["train"]
    device = inference.choose_device(options.device)
    network = inference.build_model(options.backbone, options.head, len(table.classes), options.dropout)
    for layers in (options.train_layers, options.unfreeze or "all"):
        select_parameters(network, options.backbone, layers)  # a wrong name is an error now, not in epoch N
    if last:  # it holds the whole network
        fresh, trained_on = tuple(last["fresh"]), last["trained_on"]
    else:
        weights = weights or read_weights(options)
        fresh = load_weights(network, weights, options, table.classes)
        trained_on = image_keys(table)
        if weights:
            warn_of_tested_images(weights, tables)
            trained_on = sorted({*weights.trained_on, *trained_on})
    network = inference.to_device(network, device)
    count = len(table.classes)
    member = inference.Member(network, options.backbone, options.head, options.dropout, options.size, [0.0] * count)
    classifier = inference.Classifier([member], table.classes, table.groups, [0.5] * count, options=dict(vars(options)),
                                      trained_on=trained_on, device=device,
                                      precision=choose_precision(options, device, last))
    pos_weight = compute_pos_weight(table.targets, options.pos_weight, options.pos_weight_clip)
    budget = cache_budget(options.cache) / sum(len(part) for part in tables.values())
    images = {name: dataset.ImageDataset(part, options.size, budget * len(part)) for name, part in tables.items()}
    head = list(network.get_submodule(BACKBONES[options.backbone]).parameters())
    backbone = [weight for weight in network.parameters() if all(weight is not other for other in head)]
    optimizer = torch.optim.AdamW([{"params": backbone}, {"params": head}], weight_decay=options.wd,
                                  fused=device.type != "mps")  # torch 2.4 has no fused one there
    scaler = torch.amp.GradScaler(device.type, enabled=classifier.precision == torch.float16)
    pos_weight = torch.from_numpy(pos_weight).to(device)
    run = Run(options, classifier, tables, images, fresh, pos_weight, optimizer, scaler, board=open_board(options))
    if last:
        load_state(run, last)
    return run


def read_weights(options):
    """Return what --weights names as inference.Weights, or None from scratch."""
    return None if options.weights == "none" else inference.read_weights(options.weights, options.backbone)


def load_weights(network, weights, options, classes):
    """Load what read_weights() returned, and return the names of the parameters that it has nothing for."""
    names = [name for name, _ in network.named_parameters()]
    if weights is None:
        print_once(options, "weights: none, training from scratch")
        return tuple(names)
    taken, skipped, common = inference.load_weights(network, weights, options.backbone, classes)
    print_once(options, f"weights: {len(taken)} tensors taken from {options.weights}")
    if common:
        print_once(options, f"  head rows taken by class name: {', '.join(common)}")
    for reason in sorted(set(skipped.values())):
        tensors = [name for name, why in skipped.items() if why == reason]
        layers = dict.fromkeys(name.rpartition(".")[0] or name for name in tensors)
        print_once(options, f"  {len(tensors)} not taken, {reason}: {', '.join(layers)}")
    return tuple(name for name in names if name not in taken)


def image_keys(table):
    """Return a number for each image, by which a later run knows it again, also under another name: a hash of the size
    and the first 64 KB of its file, since whole files take too long."""

    def key(path):
        try:
            with open(path, "rb") as file:
                content = str(os.fstat(file.fileno()).st_size).encode() + file.read(2**16)
        except OSError:  # training reports it
            content = os.fsencode(path)
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")

    with ThreadPoolExecutor(inference.default_workers()) as pool:
        return list(pool.map(key, table.paths))


def count_trained_on(weights, table):
    """Return how many images of a table some Weights say that they were trained on."""
    if weights is None or not weights.trained_on:
        return 0
    known = set(weights.trained_on)
    return sum(key in known for key in image_keys(table))


def warn_of_tested_images(weights, tables):
    """Warn when the weights know images of val or test: folds refuse such weights before they begin."""
    for name in ("val", "test"):
        if known := count_trained_on(weights, tables[name]):
            print_warning(f"{name} split: --weights {weights.source} was trained on {known} of the {len(tables[name])} "
                          "images: the scores there say too little about new images")


def choose_precision(options, device, last):
    """The dtype of --precision: for auto that of last.pth, else what the leader finds faster."""
    name = last["precision"] if last and options.precision == "auto" else options.precision
    chosen = list(inference.choose_precision(name, device))
    if name != options.precision:
        chosen[1] = "as in the run that is resumed"
    if distributed.is_initialized():
        distributed.broadcast_object_list(chosen)
    precision, reason = chosen
    print_once(options, f"device: {device}, precision: {precision_name(precision)} ({reason})")
    return precision


def precision_name(precision):
    """A dtype as --precision calls it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[precision]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def masked_bce(logits, targets, pos_weight):
    """Binary cross-entropy over the known labels -> (sum, number of known labels), both scalars.

    logits (B, C); targets (B, C) with 1, 0 and NaN, which is ignored; pos_weight (C,) multiplies
    the loss of positives. The mean is sum / number; with no known label both are 0.
    """
    known = ~torch.isnan(targets)
    targets = torch.where(known, targets, 0.0).to(logits.dtype)
    bce = nn.functional.binary_cross_entropy_with_logits
    loss = bce(logits, targets, pos_weight=pos_weight.to(logits.dtype), reduction="none")
    return torch.where(known, loss, 0.0).sum(), known.sum()


def masked_asymmetric(logits, targets, pos_weight):
    """The asymmetric loss (Ridnik et al. 2021, equation 7) over the known labels, with its
    parameters: easy negatives weigh little (gamma 4, probability margin 0.05), positives are not
    focused on (gamma 0). Takes and returns what masked_bce() does."""
    known = ~torch.isnan(targets)
    positive = nn.functional.softplus(-logits) * pos_weight.to(logits.dtype)  # -log p
    shifted = (torch.sigmoid(logits) - 0.05).clamp(min=0)
    negative = -(shifted**4) * torch.log1p(-shifted)
    loss = torch.where(targets == 1, positive, negative)
    return torch.where(known, loss, 0.0).sum(), known.sum()

# A label that is there in 1, 10, 50 or 90 % of cases gets the probability 0.32, 0.48, 0.68 or 0.92 by this loss, as its
# derivative there is 0. This line through the logits leads nearly back: to 0.02, 0.10, 0.48 and 0.98.
ASYMMETRIC_SCALE, ASYMMETRIC_OFFSET = 2.5, -2.0

LOSSES = {"bce": masked_bce, "asymmetric": masked_asymmetric}


def compute_pos_weight(targets, mode="sqrt", clip=(1, 20)):
    """The weight of a class's positives in the loss: negatives / positives -> float32 (C,).

    targets (N, C) with 1, 0, NaN. mode: "none" (all 1), "linear", or "sqrt" (the square root), then
    clipped to `clip`, if given. A class without a known positive or negative gets 1.
    """
    positives = np.count_nonzero(targets == 1, axis=0)
    negatives = np.count_nonzero(targets == 0, axis=0)
    if mode == "none":
        return np.ones(targets.shape[1], np.float32)
    weight = negatives / np.maximum(positives, 1)
    if mode == "sqrt":
        weight = np.sqrt(weight)
    if clip is not None:
        weight = np.clip(weight, *clip)
    weight[(positives == 0) | (negatives == 0)] = 1
    return weight.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def choose_layers(run):
    """Set which layers the coming epoch trains, and with that run.model."""
    options = run.options
    network = run.member.network
    layers = options.train_layers
    if options.unfreeze and run.state.epoch + 1 >= options.unfreeze_epoch:
        layers += f",{options.unfreeze}"
    trained = select_parameters(network, options.backbone, layers, run.fresh)
    before = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if run.model is None or trained != before:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
        run.model = nn.parallel.DistributedDataParallel(network) if distributed.is_initialized() else network


def select_parameters(network, backbone, layers, fresh=()):
    """The names of the parameters in `layers`, names separated by commas: of layers, or "all",
    "head", "new" (the head, and `fresh`: parameters that no weights were loaded for), or "late" (all
    but the first layers). Raises InputError."""
    sizes = layer_sizes(network, backbone)
    head = BACKBONES[backbone] + "."
    prefixes = {"all": ("",), "head": (head,), "new": (head, *fresh), "late": (head, *late_layers(sizes))}
    prefixes |= {name: (name + ".",) for name in sizes}
    wrong = [name for name in layers.split(",") if name not in prefixes]
    if wrong:
        raise InputError(f"{backbone} has no layer {', '.join(wrong)}; it has {', '.join(prefixes)}")
    chosen = tuple(prefix for name in layers.split(",") for prefix in prefixes[name])
    return {name for name, _ in network.named_parameters() if name.startswith(chosen)}


def layer_sizes(network, backbone):
    """{name of each layer of the backbone, the first one first: number of its weights}."""
    layers = {}
    for name, layer in network.named_children():
        layers[name] = layer
        if name == "features":
            layers |= {f"features.{inner}": part for inner, part in layer.named_children()}
    head = {id(weight) for weight in network.get_submodule(BACKBONES[backbone]).parameters()}
    sizes = {}
    for name, layer in layers.items():
        sizes[name] = sum(weight.numel() for weight in layer.parameters() if id(weight) not in head)
    return {name: size for name, size in sizes.items() if size}


def late_layers(sizes):
    """The prefixes of the layers behind the first ones, which hold at most 7 % of the weights and
    see edges and textures: for a ResNet layer3 and layer4."""
    names = [name for name in sizes if name != "features"]
    up_to = np.cumsum([sizes[name] for name in names])
    return tuple(name + "." for name, weights in zip(names, up_to) if weights > 0.07 * up_to[-1])


def train_mode(network, backbone):
    """Train mode, but eval mode for layers that are frozen: BatchNorm, whose statistics would
    drift, and dropout, which is frozen with the layer before it, or as part of the head."""
    head = network.get_submodule(BACKBONES[backbone])
    trained = True
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own:
            trained = any(parameter.requires_grad for parameter in own)
        module.training = trained
    head.train(any(parameter.requires_grad for parameter in head.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Schedule


def learning_rates(options, progress):
    """(Rate of the backbone, rate of the head) after `progress` epochs."""
    factor = rate_factor(options, progress)
    if options.unfreeze and options.unfreeze_lr is not None and progress > options.unfreeze_epoch - 1:
        return options.unfreeze_lr * factor, options.unfreeze_lr * factor
    return options.lr_backbone * factor, options.lr * factor


def rate_factor(options, progress):
    """Return the factor on both rates after `progress` epochs, a fraction: the middle of the current step, so that
    neither the first step nor the last one has the rate 0."""
    if options.schedule == "cosine":
        warmup = min(1.0, options.epochs / 10)
        return min(progress / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress / options.epochs)))
    if options.schedule == "multistep":
        return options.lr_decay ** sum(progress > milestone for milestone in options.milestones)
    return 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def load_batches(run, order):
    """Yield (images, targets, share) on the device for each batch, augmented, mixed and normalised;
    share: see train_step()."""
    options, epoch = run.options, run.state.epoch + 1
    device = run.classifier.device
    images = run.images["train"]
    operations = dataset.read_operations(options.augment)
    noise = dataset.draw_noise(len(images), options.seed, epoch)
    batches = dataset.batches(images, [rows for rows, *_ in order], options.workers, pin=device.type == "cuda")
    for (_, places, used), (batch, targets, _) in zip(order, batches):
        batch = batch.to(device, non_blocking=True)
        batch = dataset.augment(batch, operations, noise[places].to(device, non_blocking=True))
        share = 1.0
        if options.mix != "none":
            batch, share = dataset.mix(batch, options.mix, np.random.default_rng([options.seed, epoch, used]))
        yield dataset.normalize(batch), targets.to(device, non_blocking=True), share


def draw_batches(run):
    """The batches left of the epoch -> [(this process's rows, their places in the epoch, images used
    after it by all), ...]. The order depends on the seed and the epoch alone; a batch of which no
    label is known is left out. An image that is drawn twice is augmented by its place, differently."""
    options, state = run.options, run.state
    targets = run.tables["train"].targets
    count = len(targets)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + state.epoch + 1)
    if options.sampler == "balanced":
        weights = torch.from_numpy(sampling_weights(targets))
        rows = torch.multinomial(weights, count, replacement=True, generator=generator).numpy()
    else:
        rows = torch.randperm(count, generator=generator).numpy()
    rank, ranks = rank_and_ranks()
    order = []
    for places in np.array_split(np.arange(state.images, count), steps_per_epoch(options, count - state.images)):
        if not np.isnan(targets[rows[places]]).all():
            own = np.array_split(places, ranks)[rank]
            order.append((rows[own], own, int(places[-1]) + 1))
    return order


def sampling_weights(targets):
    """How often --sampler balanced draws each image, relative to the others -> (N,), at least 1.

    An image weighs what its rarest known positive label does: known labels / positives of the
    class. targets (N, C) with 1, 0, NaN.
    """
    known = np.count_nonzero(~np.isnan(targets), axis=0)
    positives = np.count_nonzero(targets == 1, axis=0)
    return np.where(targets == 1, known / np.maximum(positives, 1), 1.0).max(axis=1)


def cache_size(text):
    """A type= function for argparse: what --cache takes."""
    with contextlib.suppress(ValueError):
        if text in ("auto", "off") or 0 <= float(text) < math.inf:
            return text
    raise argparse.ArgumentTypeError(f"{text}: use auto, off, or a number of gigabytes")


def cache_budget(cache):
    """--cache -> bytes: auto is half of the free memory, shared by the processes."""
    if cache != "auto":
        return 0 if cache == "off" else float(cache) * 2**30
    free = 4 * 2**30  # where nothing tells
    meminfo = Path("/proc/meminfo")
    group = Path("/sys/fs/cgroup")
    if meminfo.exists():
        free = int(meminfo.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, IndexError):  # no limit, or another kind of container
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        file_cache = int((group / "memory.stat").read_text().partition("inactive_file")[2].split()[0])
        free = min(free, limit - used + file_cache)
    return max(0, free) / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def end_epoch(run):
    """Validate the epoch that was trained, keep it if it is the best, and save the state."""
    options, state = run.options, run.state
    report_bad_images(run, "train")
    epoch = state.epoch + 1
    losses = state.losses[sum(row["steps"] for row in state.history) :]
    rates = learning_rates(options, state.epoch + 0.5)
    row = {"epoch": epoch, "steps": len(losses), "train_loss": float(np.mean(losses)) if losses else math.nan}
    if epoch % options.val_every == 0 or epoch == options.epochs:
        row |= validate(run)
    every = options.train_metrics_every
    if every and (epoch % every == 0 or epoch == options.epochs):
        report = evaluate_split(run, "train")[2]
        row |= {f"train_{name}": report[name] for name in ("f1_macro", "f1_weighted", "map")}
    row |= {"lr": rates[1], "lr_backbone": rates[0], "seconds": state.seconds,
            "images_per_second": state.images / state.seconds if state.seconds else 0.0}
    state.history.append(row)
    state.epoch = epoch
    state.images = 0
    state.seconds = 0.0
    save_epoch(run)
    if run.board:
        for name, value in row.items():
            run.board.add_scalar(f"epoch/{name}", value, epoch)
        for step, loss in enumerate(losses, len(state.losses) - len(losses) + 1):
            run.board.add_scalar("iteration/train_loss", loss, step)
        run.board.flush()


def gather_losses(run, losses):
    """Move losses (tensors) to run.state.losses, which waits for the device. Raises RuntimeError
    when one of them or a weight is not finite: such a state is never saved."""
    epoch = run.state.epoch
    values = torch.stack(losses).tolist() if losses else []
    losses.clear()
    bad = []
    for iteration, loss in enumerate(values, len(run.state.losses) + 1):
        if not math.isfinite(loss):
            bad.append(f"loss is {loss} at iteration {iteration}")
    if not all(bool(weight.isfinite().all()) for weight in run.member.network.parameters()):
        bad.append("weights are no longer finite")
    if bad:
        saved = f"{run.out / 'last.pth'} is that after epoch {epoch}" if epoch else "nothing is saved yet"
        raise RuntimeError(f"the {bad[0]}, in epoch {epoch + 1}: try a lower --lr, or --precision fp32; {saved}")
    run.state.losses += values


def validate(run):
    """Return the scores on val, named as in the history."""
    table, _, report = evaluate_split(run, "val")
    check_val(run.options, table.targets)  # images that cannot be read may have had the labels that count
    return {f"val_{name}": report[name] for name in ("loss", *metrics.HEADLINES)}


def evaluate_split(run, split, intervals=False):
    """-> (LabelTable, probabilities, report) of a split's readable images. Calibration and
    thresholds are chosen on val, before its report."""
    classifier = run.classifier
    rows, logits = predict_split(run, split)
    table = run.tables[split].subset(rows)
    if split == "val":
        start_calibration(run)
        if run.options.calibration == "fit":
            inference.fit_calibration(classifier, logits[None], table.targets)
    probabilities = inference.to_probabilities(classifier, logits[None])
    if split == "val":
        classifier.thresholds = choose_thresholds(run.options, table.targets, probabilities)
    report = metrics.report(table.targets, probabilities, classifier.thresholds, table.classes, intervals)
    total, known = LOSSES[run.options.loss](logits, torch.from_numpy(table.targets), run.pos_weight.cpu())
    report["loss"] = (total / known).item()
    return table, probabilities, report


def predict_split(run, split):
    """-> (the rows of a split's readable images, their logits (n, C)), of which each process
    computes a share."""
    images = run.images[split]
    rank, ranks = rank_and_ranks()
    if ranks > 1:  # all take the leader's BatchNorm statistics, which are those that are saved
        for buffer in run.member.network.buffers():
            distributed.broadcast(buffer, 0)
    share = np.array_split(np.arange(len(images)), ranks)[rank]
    part = inference.compute_logits(run.classifier, images, run.classifier.precision, 2 * run.options.batch_size,
                                    run.options.workers, share)[0]
    logits = part.new_zeros(len(images), part.shape[1])
    logits[share] = part
    logits = sum_over_ranks(logits).cpu()
    report_bad_images(run, split)
    good = np.array([row for row in range(len(images)) if row not in images.errors], int)
    if not logits[good].isfinite().all():
        raise RuntimeError(f"the outputs on {split} are not all finite: try a lower --lr, or --precision fp32")
    return good, logits[good]


def report_bad_images(run, split):
    """Tell all processes which images cannot be read, and warn once about each. Raises InputError
    when most of the split cannot."""
    errors = run.images[split].errors
    count = len(run.images[split])
    if distributed.is_initialized():
        found = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, errors)
        for of_one in found:
            errors.update(of_one)
    if 2 * len(errors) > count:
        raise InputError(f"{len(errors)} of {count} images of the {split} split cannot be read, as "
                         f"{next(iter(errors.values()))}: python dataset.py DATA --check lists them all")
    for message in sorted(set(errors.values()) - run.reported):
        print_warning(f"skipped {message}")
        run.reported.add(message)


def start_calibration(run):
    """Take back what pos_weight did to the odds, which are higher by that factor, and what sampler
    and loss did; with --calibration none nothing."""
    scale, offsets = 1.0, np.zeros(len(run.classifier.classes))
    if run.options.calibration == "fit":
        if run.options.loss == "asymmetric":
            scale, offsets = ASYMMETRIC_SCALE, offsets + ASYMMETRIC_OFFSET
        offsets -= np.log(run.pos_weight.cpu().numpy().astype(float))
        if run.options.sampler == "balanced":
            offsets -= sampling_shift(run.tables["train"].targets)
    run.member.scale, run.member.offsets = scale, offsets.tolist()


def sampling_shift(targets):
    """By how much drawing with sampling_weights() raises the log odds of each class -> (C,)."""
    weights = sampling_weights(targets)[:, None]
    present, absent = targets == 1, targets == 0
    drawn = (weights * present).sum(axis=0), (weights * absent).sum(axis=0)
    both = present.any(axis=0) & absent.any(axis=0)
    odds = np.divide(*drawn, out=np.ones_like(drawn[0]), where=both)
    plain = np.divide(present.sum(axis=0), absent.sum(axis=0), out=np.ones_like(odds), where=both)
    return np.log(odds / plain)


def choose_thresholds(options, targets, probabilities):
    """The thresholds of --thresholds -> list of C floats, none on a probability."""
    thresholds = metrics.find_thresholds(targets, probabilities, options.thresholds, options.max_threshold)
    if options.thresholds == "global":  # one for all classes, between the probabilities of all
        moved = metrics.between_scores(thresholds[:1], probabilities.reshape(-1, 1))
        return moved.tolist() * len(thresholds)
    if not isinstance(options.thresholds, float):
        thresholds = metrics.between_scores(thresholds, probabilities)
    return thresholds.tolist()


def threshold_method(text):
    """A type= function for argparse: what --thresholds takes."""
    if text in ("soft", "pr_curve", "grid", "global"):
        return text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: use soft, pr_curve, grid, global or a number from 0 to 1")


# ---------------------------------------------------------------------------------------------------------------------
# Early stopping

MONITORED = {"loss": "loss", "f1": "f1_weighted", "map": "map", "last": "map"}  # --monitor -> name of a score


def save_epoch(run):
    """Save a finished epoch: the state, the model if it is the best, and the history.

    The state comes first. A run that is killed before the model is written still has it in the state.
    """
    if not is_leader():
        return
    save_state(run)
    row = run.state.history[-1]
    if find_best(run) == row["epoch"]:
        run.classifier.epoch = row["epoch"]
        run.classifier.scores = {name: row[f"val_{name}"] for name in ("loss", *metrics.HEADLINES)}
        inference.save_model(run.classifier, run.out / "model.pth")
    write_history(run)


def find_best(run):
    """Return the epoch that is best by the run's options, 0 before the first validation."""
    return best_epoch(run.state.history, run.options.monitor, run.options.min_delta)[0]


def best_epoch(history, monitor, min_delta=0.0):
    """-> (the epoch that is best on val, validations since then); (0, 0) before the first."""
    sign = -1 if monitor == "loss" else 1
    best, epoch, waited = -math.inf, 0, 0
    for row in history:
        score = row.get(f"val_{MONITORED[monitor]}")
        if score is None:
            continue
        score = sign * score if math.isfinite(score) else -math.inf
        if epoch == 0 or score > best + min_delta or monitor == "last":
            best, epoch, waited = score, row["epoch"], 0
        else:
            waited += 1
    return epoch, waited


def validate_last(run):
    """Validate the last epoch of a resumed run, whose network last.pth held, and keep it if it is the best."""
    run.state.history[-1] |= validate(run)
    save_epoch(run)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupt and resume


@contextlib.contextmanager
def signals_noted(run):
    """Within the block the first Ctrl-C or SIGTERM only sets run.signal; the second acts at
    once."""

    def note(signal_number, _):
        run.signal = signal_number
        signal.signal(signal_number, before[signal_number])
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step, to save\n")  # print() may be at work on a line of its own

    before = {}
    if threading.current_thread() is threading.main_thread():  # which signals go to
        before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def should_stop(run, step=0):
    """Whether a signal asks to stop; several processes agree on it at every tenth step."""
    if distributed.is_initialized() and step % 10 == 0:
        agreed = torch.tensor(run.signal, device=run.classifier.device)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
        run.signal = int(agreed)
        return run.signal != 0
    return run.signal != 0 and not distributed.is_initialized()


def save_and_stop(run):
    """Save the state, tell how to go on, and raise what the signal stands for."""
    if is_leader():
        save_state(run)
    wait_for_leader()
    print_warning(f"stopped after {run.state}: the same command with --resume goes on from here")
    raise KeyboardInterrupt if run.signal == signal.SIGINT else SystemExit(128 + run.signal)


def save_state(run):
    """Write last.pth: all that --resume needs to go on as if nothing had happened."""
    content = {
        "format": inference.FORMAT, "options": run.classifier.options, "classes": run.classifier.classes,
        "splits": splits_digest(run.tables), "precision": precision_name(run.classifier.precision),
        "state": dict(vars(run.state)), "fresh": list(run.fresh), "trained_on": run.classifier.trained_on,
        "network": run.member.network.state_dict(),
        "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "random": torch.get_rng_state(),
    }
    if run.classifier.device.type == "cuda":
        content["random_cuda"] = torch.cuda.get_rng_state(run.classifier.device)
    inference.write_checkpoint(run.out / "last.pth", content)


def splits_digest(tables):
    """A fingerprint of which image is in which split, and of its labels."""
    digest = hashlib.sha256()
    for table in tables.values():
        digest.update(repr(table.ids).encode("utf-8", "surrogateescape"))
        digest.update(table.targets.tobytes())
    return digest.hexdigest()


def read_state(options, tables):
    """The content of last.pth. Raises InputError when it is of other data or another network."""
    path = Path(options.out) / "last.pth"
    if not path.exists():
        raise InputError(f"{path} is not there: without --resume a run starts from the beginning")
    content = inference.read_checkpoint(path)
    names = ("state", "optimizer", "scaler", "network", "random", "precision")
    inference.check_content(path, content, names, "last.pth")
    if content["classes"] != tables["train"].classes or content["splits"] != splits_digest(tables):
        raise InputError(f"--resume: {path} is of other splits or labels: give the same data and seed, or a new --out")
    if "fresh" not in content:
        raise InputError(f"--resume: {path} was written by an older version, and does not say which layers had no "
                         "weights: resume it with that version, or start again without --resume")
    before = content["options"]
    changed = []
    for name, value in vars(options).items():
        if before.get(name) != value and name in ("backbone", "head"):
            raise InputError(f"--resume: {path} has --{name} {before[name]}, not {value}")
        if before.get(name) != value and name not in ("resume", "quiet", "weights"):
            changed.append(f"{name} {before.get(name)} -> {value}")
    if content["state"]["history"] and content["state"]["epoch"] < options.epochs:
        check_comparable(options, before, path)
    if changed:
        print_warning(f"resumed with other options than before: {', '.join(changed)}")
    if before["weights"] != options.weights:
        print_warning(f"--weights {options.weights} is not loaded: --resume goes on with the network of {path}")
    if content["state"]["epoch"] > options.epochs:
        print_warning(f"--epochs {options.epochs}: {content['state']['epoch']} epochs are trained already")
    return content


def check_comparable(options, before, path):
    """Raise an InputError when an option changes what --monitor measures, so that the best epoch of a resumed run would
    be chosen among scores of two kinds."""
    decisive = {"loss": ("loss", "pos_weight", "pos_weight_clip"), "f1": ("calibration", "thresholds", "max_threshold")}
    for name in decisive.get(options.monitor, ()):
        if before[name] != vars(options)[name]:
            raise InputError(f"--resume: with another --{name.replace('_', '-')} the {options.monitor} of further "
                             f"epochs cannot be compared with that of the epochs in {path}: keep it, or start again "
                             "without --resume")


def load_state(run, content):
    """Put a run to where last.pth was written. Raises InputError when the best epoch by its options is lost."""
    run.state = State(**content["state"])
    if (run.out / "model.pth").exists():
        saved = inference.read_checkpoint(run.out / "model.pth")
        inference.check_content(run.out / "model.pth", saved, ("members", *inference.SAVED_FIELDS), "model.pth")
        run.classifier.epoch, run.classifier.scores = saved["epoch"], saved["scores"]
    check_kept(run, content["options"])
    run.member.network.load_state_dict(content["network"])
    run.optimizer.load_state_dict(content["optimizer"])
    if run.scaler.is_enabled() and content["scaler"]:
        run.scaler.load_state_dict(content["scaler"])
    torch.set_rng_state(content["random"])
    if "random_cuda" in content and run.classifier.device.type == "cuda":
        torch.cuda.set_rng_state(content["random_cuda"], run.classifier.device)
    print_once(run.options, f"resumed after {run.state}, from {run.out / 'last.pth'}")


def check_kept(run, before):
    """Raise an InputError when the epoch that is best by the options of a resumed run, which had others before, is
    neither in model.pth, nor in last.pth, nor still to come."""
    options, state = run.options, run.state
    best = find_best(run)
    kept = run.classifier.epoch
    if best == 0 and state.images and state.epoch >= options.epochs:
        raise InputError(f"--resume --epochs {options.epochs}: no epoch was validated yet, and the run has begun the "
                         f"next one: give --epochs {state.epoch + 1} or more")
    if best == kept or (best == state.epoch and not state.images):
        return
    if options.monitor == "last" and state.epoch < options.epochs:
        return
    held = f"holds epoch {kept}" if kept else "is not there"
    raise InputError(f"--resume: by --monitor {options.monitor} --min-delta {options.min_delta:g} epoch {best} is the "
                     f"best, but its network is lost ({run.out / 'model.pth'} {held}): resume with --monitor "
                     f"{before['monitor']} --min-delta {before['min_delta']:g}, or start again in another --out")


# ---------------------------------------------------------------------------------------------------------------------
# Folds


def cross_validate(options, tables):
    """--folds: a run in OUT/fold_k for each part of the data, trained on all other parts -> report
    dict.

    Each image is predicted by the network that was not trained on it. By these predictions the
    calibration and the thresholds of OUT/model.pth are chosen, which holds all the networks.
    """
    pool = tables["train"]
    out = Path(options.out)
    parts = dataset.divide(pool, [1] * options.folds, options.split_method, options.seed)
    sizes = np.bincount(parts)
    check_batches(options, len(pool) - sizes.max(), sizes.min())
    for k in range(options.folds):
        check_val(options, pool.targets[parts == k])

    # The weights are read once: a fold must not begin with what another one has just written.
    weights = None
    begun = [(out / f"fold_{k + 1}" / "last.pth").exists() for k in range(options.folds)]
    if not options.resume or (begun[0] and not all(begun)):
        weights = read_weights(options)
    if known := sum(count_trained_on(weights, table) for table in (pool, tables["test"])):
        raise InputError(f"--weights {options.weights} was trained on {known} of the images that --folds tests on: use "
                         "weights that have not seen them, such as imagenet")
    members = []
    trained_on = set()
    raw = np.full(pool.targets.shape, np.nan)  # probabilities that are not calibrated yet
    with folder_locked(out) if is_leader() else contextlib.nullcontext():
        for k in range(options.folds):
            print_once(options, f"\nfold {k + 1} of {options.folds}")
            run = build_fold(options, pool, parts == k, out / f"fold_{k + 1}", weights)
            if k == 0 and is_leader():
                if not options.resume:
                    remove_old_run(options)
                write_inputs(options, {"train": pool, "test": tables["test"]})
            train(run)
            start_calibration(run)
            rows, logits = predict_split(run, "val")
            raw[np.flatnonzero(parts == k)[rows]] = inference.to_probabilities(run.classifier, logits[None])
            members += run.classifier.members
            trained_on.update(run.classifier.trained_on)
        classifier = replace(run.classifier, members=members, epoch=0, scores={}, trained_on=sorted(trained_on))
        good = np.flatnonzero(~np.isnan(raw).any(axis=1))
        table = pool.subset(good)
        report, probabilities, thresholds = report_folds(options, classifier, table, parts[good], raw[good])
        if len(tables["test"]):
            report["test"] = inference.evaluate(classifier, tables["test"], 2 * options.batch_size, options.workers)
            report["test"]["images"] = report["test"].pop("rows")
        if is_leader():
            write_report(options, classifier, report, table, probabilities, thresholds)
            rows = [[name, *row] for name, row in zip(table.ids, thresholds.tolist())]
            dataset.write_csv(out / "fold_thresholds.csv", [["ID", *table.classes], *rows])
            curves = inference.pr_curves(table.targets, probabilities, classifier.thresholds, classifier.classes)
            dataset.write_png(out / "pr_curves.png", curves)
        print_once(options, format_folds(report))
        wait_for_leader()
    return report


def build_fold(options, pool, own, out, weights):
    """Return the Run of a fold, into the folder `out`: it validates on the rows that are its `own` (N,), boolean.
    weights: as of build()."""
    fold = argparse.Namespace(**vars(options))
    fold.out = str(out)
    fold.folds = 0
    fold.registry = None
    fold.export_splits = None
    if out.name != "fold_1" and not (out / "last.pth").exists():  # it was not begun
        fold.resume = False
    rows = {"train": np.flatnonzero(~own), "val": np.flatnonzero(own), "test": []}
    return build(fold, {name: pool.subset(rows[name]) for name in PARTS}, weights)


def report_folds(options, classifier, table, parts, raw):
    """Choose the calibration and the thresholds of a classifier by the predictions of its folds,
    and report these: those of a part (N,) by what the other parts would choose -> (report dict,
    probabilities, thresholds, (N, C))."""
    probabilities = np.empty_like(raw)
    thresholds = np.empty_like(raw)
    for k in range(options.folds):
        own = parts == k
        scale, offsets, thresholds[own] = fit_to(options, table.targets[~own], raw[~own])
        probabilities[own] = metrics.calibrate(raw[own], scale, offsets)
    report = {"split": "folds"} | metrics.report(table.targets, probabilities, thresholds, table.classes, True)
    report["images"] = report.pop("rows")
    report |= {f"val_{name}": report[name] for name in metrics.HEADLINES}
    of_folds = []
    for k in range(options.folds):
        own = parts == k
        of_folds.append(metrics.report(table.targets[own], probabilities[own], thresholds[own], table.classes))
    report["folds"] = {}
    for name in (*metrics.HEADLINES, *metrics.JUDGED):
        values = [one[name] for one in of_folds]
        report["folds"][name] = {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1))}
    scale, offsets, classifier.thresholds = fit_to(options, table.targets, raw)
    inference.add_calibration(classifier, scale, offsets)
    return report, probabilities, thresholds


def fit_to(options, targets, raw):
    """What --calibration and --thresholds choose for probabilities (N, C) -> (scale, offsets,
    thresholds)."""
    scale, offsets = 1.0, np.zeros(targets.shape[1])
    if options.calibration == "fit":
        scale, offsets = metrics.fit_calibration(targets, raw)
    return scale, offsets, choose_thresholds(options, targets, metrics.calibrate(raw, scale, offsets))


def format_folds(report):
    """The report of cross_validate() as text."""
    text = f"\nall folds, {report['images']} images\n{metrics.format_report(report)}\n"
    folds = report["folds"]
    for name in ("f1_macro", "map", "f1_macro_judged", "map_judged"):
        headline = name.removesuffix("_judged")
        if name == headline or folds[name] != folds[headline]:  # a rare class may have no positive in a fold
            text += "\n{}: {mean:.3f} +- {deviation:.3f} over the folds".format(name, **folds[name])
    if "test" in report:
        text += f"\n\ntest split, {report['test']['images']} images, all networks together\n"
        text += metrics.format_report(report["test"])
    return text + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Output files

RUN_FILES = ("model.pth", "last.pth", "classes.json", "label_groups.json", "thresholds.json", "predictions.csv",
             "probabilities.csv", "train_metadata.csv", "val_metadata.csv", "test_metadata.csv", "loss_curve.png",
             "pr_curves.png", "reliability.png", "predictions.png", "history.csv", "metrics.json", "config.json",
             "fold_thresholds.csv")


@contextlib.contextmanager
def folder_locked(out):
    """Hold a run's folder within the block. Raises InputError when another run does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: it cannot be written: {error.strerror}") from None
    with contextlib.ExitStack() as stack:
        try:
            import fcntl
            folder = os.open(out, os.O_RDONLY)  # the system unlocks it when the process ends, however it ends
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {out}: another run writes there: wait, or name another folder") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        yield


def check_out(options, tables):
    """Raise an InputError when the run would replace a file that it reads, or that no run wrote."""
    out = Path(options.out)
    names = {*RUN_FILES, title_path(out, options.plot_title or "loss_curve").name}
    reads = files_read(options, tables, names)

    written = [out, *(out / f"fold_{k + 1}" for k in range(options.folds))]
    for folder in dict.fromkeys([*written, *fold_folders(out)]):
        ours = files_of_run(folder)
        there = [folder / name for name in sorted(names) if (folder / name).exists()] if folder in written else []
        for path in [*ours, *there]:
            what = reads.get(os.path.realpath(path))
            if what:
                raise InputError(f"{what} lies in --out, and would be replaced: name another --out")
            if path not in ours:
                raise InputError(f"--out {out}: {path} would be replaced, and no run of train.py wrote it: name "
                                 "another --out")

    if options.export_splits and not options.resume:
        images = Path(options.export_splits) / "images"
        if images.is_dir() and any(images.iterdir()):
            raise InputError(f"--export-splits {options.export_splits}: {images} is not empty: name a new folder")


def files_read(options, tables, names):
    """Return the files that a run reads as {real path: what it is, in words}; of its images those with one of the
    `names`, since there may be millions."""
    data = Path(options.data)
    paths = {str(data / "label_groups.json")}
    for table in tables.values():
        paths.update(origin.rpartition(":")[0] for origin in table.origins)  # FILE:LINE
        paths.update(str(path) for path in table.paths if os.path.basename(path) in names)
    reads = {os.path.realpath(path): f"{path}, which the run reads," for path in paths}

    given = ["labels", "label_groups", "image_list"]
    if options.folds or not options.resume:
        given.append("weights")
    for option in given:
        value = getattr(options, option)
        if value:  # a label file may be named from within DATA
            path = Path(value) if option == "weights" or Path(value).exists() else data / value
            reads[os.path.realpath(path)] = f"--{option.replace('_', '-')} {value}"
    return reads


def files_of_run(folder):
    """Return the files in a folder that an earlier run wrote there; config.json, by which they are known, is last."""
    try:
        config = metrics.read_json(folder / "config.json")
    except ValueError:
        return []
    if not {"data", "out", "backbone"} <= config.keys():  # somebody else's config.json
        return []
    names = {*RUN_FILES} - {"config.json"}
    if config.get("plot_title") and isinstance(config["plot_title"], str):
        names.add(title_path(folder, config["plot_title"]).name)
    present = [path for path in sorted(folder.iterdir()) if path.is_file() or path.is_symlink()]
    ours = [path for path in present if path.name in names or path.match("predictions_*_t-*.json")]
    return [*ours, folder / "config.json"]


def fold_folders(out):
    """Return the folders of folds in --out."""
    return sorted(path for path in out.glob("fold_[0-9]*") if path.is_dir())


def remove_old_run(options):
    """Remove what an older run left in --out, and in the folders of its folds."""
    out = Path(options.out)
    old = 0
    for folder in [*fold_folders(out), out]:
        for path in files_of_run(folder):
            path.unlink()
            old += 1
        if folder != out:
            with contextlib.suppress(OSError):  # there is something else in it
                folder.rmdir()
    if old:
        print_once(options, f"the run that was in {out} is replaced")


def write_inputs(options, tables):
    """Write what is known before training."""
    out = Path(options.out)
    table = tables["train"]
    dataset.write_json(out / "config.json", vars(options))
    dataset.write_json(out / "classes.json", table.classes)
    if table.groups:
        dataset.write_json(out / "label_groups.json", table.groups)
    for split, part in tables.items():
        if len(part) == 0:
            continue
        rows = [["ID", *part.classes]]
        for name, labels in zip(part.ids, part.targets.tolist()):
            rows.append([name, *("NA" if math.isnan(label) else int(label) for label in labels)])
        dataset.write_csv(out / f"{split}_metadata.csv", rows)

HISTORY = ["epoch", "steps", "train_loss", "val_loss", *(f"val_{name}" for name in metrics.HEADLINES),
           "train_f1_macro", "train_f1_weighted", "train_map", "lr", "lr_backbone", "seconds", "images_per_second"]


def write_history(run):
    """Write history.csv and loss_curve.png, which has the name of --plot-title too."""
    options, history = run.options, run.state.history
    rows = [[row.get(name, "") for name in HISTORY] for row in history]
    dataset.write_csv(run.out / "history.csv", [HISTORY, *rows])
    marks = []
    best = best_epoch(history, options.monitor, options.min_delta)[0]
    if best and options.monitor != "last":
        marks.append((best, f"best epoch: {best}"))
    if options.unfreeze and run.state.epoch >= options.unfreeze_epoch:
        marks.append((options.unfreeze_epoch, f"{options.unfreeze} unfrozen"))
    if options.schedule != "cosine":  # which changes the rate all the time
        for before, row in itertools.pairwise(history):
            if row["lr"] != before["lr"]:
                marks.append((row["epoch"], f"lr {row['lr']:g}"))
    curves = loss_curves(run.state.losses, history, marks, options.plot_title)
    dataset.write_png(run.out / "loss_curve.png", curves)
    if options.plot_title:
        dataset.write_png(title_path(run.out, options.plot_title), curves)


def loss_curves(losses, history, marks=(), title=""):
    """The loss of each iteration over that of each epoch, with marks (epoch, text) -> PIL image."""
    steps = range(1, len(losses) + 1)
    series = [("each iteration", steps, losses, inference.COLOURS[0])]
    window = len(losses) // 40
    if window > 1:
        means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        series = [(f"mean of {window}", steps[window - 1 :], means, inference.COLOURS[0]),
                  ("each iteration", steps, losses, inference.COLOURS[2])]
    upper = inference.draw_chart(series, title or "Loss per iteration", "iteration_number", "training_loss")
    epochs = [row["epoch"] for row in history]
    series = []
    for name, colour in (("train", inference.COLOURS[0]), ("val", inference.COLOURS[1])):
        series.append((name, epochs, [row.get(f"{name}_loss", math.nan) for row in history], colour))
    lower = inference.draw_chart(series, "Loss per epoch", "epoch", "loss", marks=marks)
    return inference.stack_charts([upper, lower], 1)


def title_path(out, title):
    """Where the curves of --plot-title are."""
    return out / f"{title.replace('/', '_')}.png"


def plot_title(text):
    """Return a --plot-title that can be the name of a file: a type= function for argparse."""
    problem = None
    if text and not text.strip():
        problem = "it is blank"
    elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        problem = "it has control characters"
    elif len(text.encode()) > 200:  # file systems allow 255 bytes, with what is added to a name while it is written
        problem = "it is longer than 200 bytes"
    elif title_path(Path(), text).name in set(RUN_FILES) - {"loss_curve.png"}:
        problem = "a run writes another file of that name"
    if problem:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} also names a file, and {problem}: use another title")
    return text


def finish(run):
    """Choose the best model's calibration and thresholds on val, and report it on test if there is
    one -> dict."""
    options = run.options
    wait_for_leader()
    best = inference.load_model(run.out / "model.pth", run.classifier.device)
    best.precision = run.classifier.precision
    run.classifier = best
    split = "test" if len(run.tables["test"]) else "val"
    table, probabilities, scores = evaluate_split(run, "val", intervals=split == "val")
    if is_leader():
        curves = inference.pr_curves(table.targets, probabilities, best.thresholds, best.classes)
        dataset.write_png(run.out / "pr_curves.png", curves)
    if split == "test":
        table, probabilities, scores = evaluate_split(run, "test", intervals=True)
    report = {"split": split, "images": scores.pop("rows"), "loss": scores.pop("loss"), "epoch": best.epoch}
    report |= {f"val_{name}": value for name, value in best.scores.items()}
    report |= scores
    if is_leader():
        write_report(options, best, report, table, probabilities, np.array(best.thresholds))
    print_once(options, f"\n{split} split, {len(table)} images, epoch {best.epoch}\n{metrics.format_report(report)}\n")
    return report


def write_report(options, best, report, table, probabilities, thresholds):
    """Write the model and its report, and what else was asked for. thresholds: (C,), or (N, C),
    what was reported."""
    out = Path(options.out)
    best.options = dict(vars(options))
    inference.save_model(best, out / "model.pth")
    for name, style in (("predictions.csv", "csv"), ("probabilities.csv", "probabilities")):
        text = inference.format_predictions(style, table.ids, probabilities, thresholds, best)
        dataset.write_text(out / name, [text])
    dataset.write_png(out / "predictions.png", inference.mistakes_sheet(table, probabilities, thresholds))
    dataset.write_png(out / "reliability.png", inference.reliability_chart(table.targets, probabilities))
    dataset.write_json(out / "thresholds.json", dict(zip(best.classes, best.thresholds)))
    dataset.write_json(out / "metrics.json", report)
    if options.thresholds == "global":
        name = (f"predictions_{options.backbone}_f1-{report['val_f1_weighted']:.4f}_epoch-{best.epoch}"
                f"_b-{options.batch_size}_lr-{options.lr:g}_t-{best.thresholds[0]:.4f}.json")
        text = inference.format_predictions("json", table.ids, probabilities, thresholds, best)
        dataset.write_text(out / name, [text])
    if options.registry:
        register(options, report)

NO_CONFIGURATION = ("out", "registry", "seed", "quiet", "device", "workers", "cache", "resume", "tensorboard",
                    "export_splits", "plot_title")


def registry_name(options):
    """The name of a configuration: its main options, and a fingerprint of all."""
    known = sorted((name, value) for name, value in options.items() if name not in NO_CONFIGURATION)
    tokens = [f"{options['backbone']}-{options['head']}", f"b-{options['batch_size']}", f"lr-{options['lr']:g}"]
    if options["lr_backbone"] != options["lr"]:
        tokens.append(f"lrb-{options['lr_backbone']:g}")
    tokens += [f"wd-{options['wd']:g}", f"e-{options['epochs']}", f"train-{options['train_layers'].replace(',', '+')}"]
    if options["unfreeze"]:
        tokens.append(f"unfreeze-{options['unfreeze'].replace(',', '+')}-{options['unfreeze_epoch']}")
    return "_".join([*tokens, hashlib.sha256(repr(known).encode()).hexdigest()[:6]])


def register(options, report):
    """Copy the run into its folder of the registry, unless one with a better F1 on val is there."""
    folder = Path(options.registry) / registry_name(vars(options))
    if (folder / "metrics.json").exists():
        best = None
        with contextlib.suppress(ValueError):
            best = metrics.read_run(folder).get("val_f1_weighted")
        if not isinstance(best, (int, float)):
            print_warning(f"registry: {folder / 'metrics.json'} tells no F1 on val: the run there is replaced")
        elif best >= report["val_f1_weighted"]:
            print_once(options, f"registry: {folder} keeps its F1 of {best:.4f} on val")
            return
    for name in ("model.pth", "config.json", "metrics.json"):
        with dataset.atomic_write(folder / name, "wb") as file:
            file.write((Path(options.out) / name).read_bytes())
    print_once(options, f"registry: {folder} now has an F1 of {report['val_f1_weighted']:.4f} on val")


def export_splits(tables, folder):
    """Copy the images into folder/images/train, val, test; check_out() has looked whether they are there already."""
    images = Path(folder) / "images"
    for split, table in tables.items():
        target = images / split
        target.mkdir(parents=True, exist_ok=True)
        for path, name in zip(table.paths, dataset.distinct_names(table.paths)):
            shutil.copy2(path, target / name)


def open_board(options):
    """TensorBoard's writer into OUT/tensorboard, or None. Raises InputError without the package."""
    if not options.tensorboard or not is_leader():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(Path(options.out) / "tensorboard")


# ---------------------------------------------------------------------------------------------------------------------
# Console output


def print_once(options, text):
    """Print in the leader, unless --quiet."""
    if is_leader() and not options.quiet:
        print_text(text)


def print_warning(text):
    """Print a warning, also with --quiet."""
    if is_leader():
        print_text(f"warning: {text}", file=sys.stderr)

# Options whose default depends on others; the other lines tell them. And --quiet.
NOT_GIVEN = ("milestones", "dropout", "lr_backbone", "train_layers", "unfreeze", "unfreeze_epoch", "monitor", "sam",
             "quiet")


def print_configuration(options):
    """Print what will be trained and how, and which options differ from the defaults."""
    kept = f"the best epoch by {options.monitor} on val is kept, patience {options.patience}"
    if options.monitor == "last":
        kept = "the last epoch is kept"
    lines = [
        f"model: {options.backbone}, {options.head} head, {options.size} px, trained: {options.train_layers}",
        f"recipe: {options.epochs} epochs, batch {options.batch_size}, lr {options.lr:g}"
        f" (backbone {options.lr_backbone:g}), weight decay {options.wd:g}, {options.schedule}, "
        f"augment {options.augment}, pos_weight {options.pos_weight}, sam {options.sam:g}",
        f"{kept}; thresholds: {options.thresholds}",
    ]
    if options.unfreeze:
        lines[0] += f", from epoch {options.unfreeze_epoch} {options.unfreeze} too"
    defaults = vars(option_parser().parse_args([]))
    given = [f"{name}={value}" for name, value in vars(options).items()
             if value != defaults[name] and name not in NOT_GIVEN]
    lines.append(f"not the defaults: {', '.join(given) or 'nothing'}")
    print_once(options, "\n".join(lines))
    if options.unfreeze and options.unfreeze_epoch > options.epochs:
        print_warning(f"{options.unfreeze} is never trained: --unfreeze-epoch {options.unfreeze_epoch} is beyond "
                      f"--epochs {options.epochs}")


def print_last_words(options, image):
    """Print what the run left, and what to look at next."""
    model = [] if options.out == "outputs" else ["--model", str(Path(options.out) / "model.pth")]
    command = ["python", "inference.py", str(image), *model, "--save", "drawn", "--heatmap"]
    print_once(options, f"written to {options.out}/: model.pth, metrics.json, predictions.csv and more,\n"
               f"and pictures (predictions.png shows the worst mistakes)\nnext: {shlex.join(command)}")


class ProgressLine:
    """A line that updates in place on a terminal or in a notebook, and a line per epoch."""

    def __init__(self, run):
        self.run = run
        self.live = is_leader() and not run.options.quiet and is_interactive()
        self.shown = 0.0  # when the line was shown

    def step(self, loss):
        """Show a finished step, if the line is old enough."""
        options, state = self.run.options, self.run.state
        count = len(self.run.tables["train"])
        now = time.perf_counter()
        if not self.live or (now - self.shown < 0.2 and state.images < count):
            return
        self.shown = now
        rate = state.images / state.seconds
        left = datetime.timedelta(seconds=int(((options.epochs - state.epoch) * count - state.images) / rate))
        line = (f"epoch {state.epoch + 1}/{options.epochs}  image {state.images}/{count}  loss {loss.item():.4f}  "
                f"{rate:.0f} images/s  {left} left")
        print_text(f"\r{line:<90}", end="")

    def end_epoch(self):
        """Show the last epoch of the history."""
        options, history = self.run.options, self.run.state.history
        row = history[-1]
        line = "epoch {epoch:{width}}/{epochs}  loss {train_loss:.4f}"
        if "val_loss" in row:
            line += "  val loss {val_loss:.4f}  f1 macro {val_f1_macro:.3f}  map {val_map:.3f}"
        line += "  {images_per_second:.0f} images/s  {seconds:.1f} s"
        best = best_epoch(history, options.monitor, options.min_delta)[0]
        if best == row["epoch"] and options.monitor != "last":
            line += "  best"
        line = line.format(width=len(str(options.epochs)), epochs=options.epochs, **row)
        print_once(options, f"\r{line:<90}" if self.live else line)


def is_interactive():
    """Whether the output is a terminal or a notebook, which can show a line again."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        return True
    with contextlib.suppress(AttributeError, ValueError):  # there is none, or it is closed
        return sys.stdout.isatty()
    return False


if __name__ == "__main__":
    dataset.run_command(main)
