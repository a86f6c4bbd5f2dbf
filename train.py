"""Fine-tune an image classifier when images carry several labels and some labels are unknown.

    python train.py --data data/                             # data/labels.txt, data/images/
    python train.py --data data/ --weights none --epochs 50  # from scratch, not from ImageNet weights
    python train.py --demo                                   # generated images, no download
    python train.py --data data/ --folds 5                   # cross-validate: five networks, one model
    python train.py --data data/ --resume                    # resume a run that was stopped
    torchrun --standalone --nproc-per-node=2 train.py --data data/  # several GPUs, or CPU processes

    report = train.main(["--data", "data/", "--epochs", "10"])      # in a notebook

A run reads and splits the labels, trains with a masked loss, keeps the last epoch (with --patience
the best one on val), calibrates the probabilities and chooses a threshold per class on val, and
reports on test. It writes all its files to --out. inference.py uses the model. Ctrl-C and SIGTERM
save a run and end all its processes, and --resume continues it.
"""

import argparse
import atexit
import contextlib
import datetime
import hashlib
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed, nn

import dataset
import inference
import metrics
from dataset import PARTS, InputError, Progress, number, print_text
from inference import HEADS

# --------------------------------------------------------------------------------------------------
# Recipe and presets: defaults of the options

# What measured best on photographs. The comments say by how much another value changes the test mAP:
# "complete" with all ImageNet weights (EfficientNet-Lite0, 400 photographs of traffic, equal time, 16
# runs, +- 0.014); all others with a ResNet18 whose layer4 starts from scratch (200 photographs, as
# many epochs, no --sam, one seed, where 0.01 is noise), unless they say otherwise.
# `tests/bench.py recipe` compares most of these values at equal training time.
RECIPE = {
    "batch_size": 16,  # 32 with lr 1.5e-3 and 24 epochs, which takes as long: +0.007
    "lr": 1e-3,  # 5e-4: -0.009, complete -0.034; 2e-3: -0.006
    "wd": 1e-2,  # 5e-2: -0.007
    "schedule": "cosine",  # one-cycle: 0.000
    # New layers train alone for a quarter of the epochs. For a tenth of them: -0.003 (complete); late
    # layers from the first epoch on: -0.017; all layers: -0.088, complete -0.034. Late layers train
    # at the rate of the head. At a third of it: -0.063 (complete); at rates that fall to a tenth
    # towards the first layer: -0.025 (complete).
    "train_layers": "new",
    # "rich" also erases, and crops to half the area, which hides small things: -0.013 (complete),
    # -0.011 on meals and 0.000 on traffic (with --sam, three seeds), but +0.013 on 400 images of
    # traffic (one seed). "light" compared with "rich": -0.007.
    "augment": "flip,crop,rotation,perspective,jitter",
    "mix": "none",  # on 100 photographs mixup: -0.015 (three seeds); cutmix: -0.021 (one seed)
    "loss": "bce",  # asymmetric, without pos_weight: -0.009 (100 photographs, three seeds)
    "sampler": "shuffle",  # balanced, without pos_weight: -0.003 (100 photographs)
    "pos_weight": "sqrt",  # none: -0.004
    "pos_weight_clip": [1, 20],  # does not play down frequent labels, and limits very rare ones
    "patience": 0,  # because the best epoch on a small val split is mostly luck
}

# Without --epochs, a pretrained network trains until it has seen about so many images, in 5 to 20
# epochs. Beside 20 epochs, 15 for 400 photographs are +0.003 in 0.76 of the time, and 8 for 780 are
# -0.002 in 0.40 of the time (EfficientNet-Lite0 with all its ImageNet weights, six seeds).
IMAGES_TO_SEE = 6000

# Small generated images, and no pretrained weights to download. An epoch with batches of 32 takes 0.84
# of the time of one with batches of 16, and teaches as much (mAP 0.970 each, one seed).
DEMO = {"data": "data/demo", "weights": "none", "size": 64, "epochs": 16, "batch_size": 32,
        "augment": "flip,vflip", "pos_weight": "none"}

# The last epoch is kept, even with a preset: a fold reports the images that would choose its best
# epoch, which would flatter it. All images are in the folds, unless --split sets a test split aside.
FOLDS = {"split": [0.85, 0.15, 0], "monitor": "last", "patience": 0}

# What most published recipes have in common. The README says what each of them reproduces.
PUBLISHED = {"wd": 0.0, "schedule": "constant", "monitor": "loss", "pos_weight": "linear",
             "pos_weight_clip": None, "calibration": "none", "thresholds": "0.5"}
PRESETS = {
    "default": {},
    "inspection": PUBLISHED | {
        "backbone": "resnet18", "head": "linear", "train_layers": "all", "lr": 1e-3, "epochs": 10,
        "batch_size": 16, "patience": 3, "pos_weight": "sqrt", "pos_weight_clip": [1, 20],
        "augment": "flip,rotation", "thresholds": "pr_curve", "max_threshold": 0.8,
    },
    "two-stage": PUBLISHED | {
        "backbone": "resnet18", "head": "mlp", "dropout": [0.5, 0.3], "train_layers": "head",
        "unfreeze": "layer4", "unfreeze_epoch": 3, "lr": 2e-3, "unfreeze_lr": 1e-4, "epochs": 50,
        "batch_size": 16, "patience": 5, "augment": "crop,flip,jitter,perspective,erasing",
    },
    "assignment": PUBLISHED | {
        "backbone": "resnet18", "head": "linear", "train_layers": "all", "lr": 1e-3, "epochs": 10,
        "patience": 0, "augment": "none", "plot_title": "Aimonk_multilabel_problem",
    },
    "resnet50": PUBLISHED | {
        "backbone": "resnet50", "head": "mlp", "dropout": [0.65, 0.4], "lr": 5e-5, "wd": 1e-2,
        "train_layers": "layer3,layer4,head", "epochs": 40, "patience": 5,
        "augment": "resized_crop,flip,vflip,jitter,rotation,erasing",
    },
    "coco": PUBLISHED | {
        "head": "bn", "train_layers": "head", "unfreeze": "all", "unfreeze_epoch": 3, "lr": 1e-3,
        "epochs": 20, "schedule": "multistep", "monitor": "f1", "patience": 10, "augment": "flip",
        "thresholds": "global",
    },
}


# --------------------------------------------------------------------------------------------------
# Options


def option_parser():
    """Return the parser of the command line, with the recipe as defaults."""
    parser = dataset.ArgumentParser(
        prog="train.py", usage="%(prog)s [--data DIR | --demo] [--preset NAME] [options]",
        description="Fine-tune an image classifier when images carry several labels and some labels "
        "are unknown.")
    real, whole, count = number(float), number(int), number(int, 1)

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", default="data", metavar="DIR", help="folder with labels and images")
    dataset.add_data_options(group)
    add("--split", type=float, nargs=3, default=[0.7, 0.15, 0.15], metavar=("TRAIN", "VAL", "TEST"),
        help="sizes of the splits, relative to each other")
    add("--folds", type=whole, default=0, metavar="K",
        help="cross-validate: train K networks, each tested on the part that it was not trained on, and "
        "all together on the test split, if there is one; also list the labels that are probably "
        "wrong in suspects.csv and review.html; 0: off")
    add("--split-method", choices=("stratified", "random"), default="stratified",
        help="stratified gives each split its share of every label")
    add("--demo", action="store_true", help="train on generated images, drawn first if needed")
    add("--seed", type=whole, default=0, help="random seed")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="resnet18", metavar="NAME",
        help="network of torchvision; python inference.py --backbones lists them")
    add("--head", choices=HEADS, default="linear", help="what replaces the last layer of the backbone")
    add("--dropout", type=number(float, below=1), nargs="+", metavar="P",
        help="dropout rates in the head (default: 0.5 0.3 for mlp, else 0)")
    add("--weights", default="imagenet", metavar="W",
        help="initial weights: imagenet, none (random), or a .pth file of the same backbone")
    add("--size", type=number(int, 32), help="resize images to SIZE x SIZE pixels (default: what "
        "the weights of the backbone expect, 224 for ResNet18)")

    add = parser.add_argument_group("recipe").add_argument
    add("--preset", choices=PRESETS, default="default", help="defaults of a published recipe")
    add("--epochs", type=count, help="number of epochs; with --patience the maximum (default: 6,000 "
        "divided by the number of training images, but 5 to 20; 20 with --patience or --weights "
        "none; --demo and presets have their own)")
    add("-b", "--batch-size", type=count, help="images per step, over all processes")
    add("--lr", type=real, help="learning rate of the head")
    add("--lr-backbone", type=real, help="learning rate of the backbone (default: as --lr, but at "
        "most 5e-5 for a pretrained one without BatchNorm)")
    add("--wd", type=real, help="weight decay of AdamW; 0 makes it Adam")
    add("--schedule", choices=("constant", "cosine", "multistep"), help="learning rate schedule")
    add("--milestones", type=count, nargs="+", metavar="EPOCH",
        help="epochs after which multistep lowers the rate (default: after 1/2 and 3/4 of them)")
    add("--lr-decay", type=real, default=0.1, help="factor on the rate at each milestone")
    add("--train-layers", metavar="LAYERS", help="layers to train: all; head; new (the head, and "
        "layers without loaded weights; from scratch, all); late (all but the first ones); or "
        "names, such as layer3,layer4,head")
    add("--unfreeze", metavar="LAYERS", help="layers to train as well from --unfreeze-epoch on "
        "(default: late with --train-layers new, else none)")
    add("--unfreeze-epoch", type=count, metavar="N",
        help="first epoch that trains them, counted from 1 (default: after a quarter of the epochs)")
    add("--unfreeze-lr", type=real, metavar="LR", help="learning rate of all layers from then on")
    add("--augment", metavar="A", help="none, light, rich (crops up to half of an image instead of "
        "a quarter, and erases boxes), or some of these, joined by commas: "
        + ", ".join(dataset.OPERATIONS))
    add("--mix", choices=("none", *dataset.MIXES),
        help="mix each image with another: mixup blends them, cutmix pastes a box")
    add("--sam", type=real, metavar="RADIUS", help="radius of sharpness-aware minimisation (Foret "
        "2021) in the second half of the epochs, where steps take up to twice as long; 0: off "
        "(default: 0.1, but 0 with --preset or --weights none)")

    add = parser.add_argument_group("imbalance").add_argument
    add("--loss", choices=LOSSES, help="asymmetric plays down easy negatives (Ridnik 2021)")
    add("--sampler", choices=("shuffle", "balanced"), help="balanced draws rare labels more often: "
        "an image with a label that one in fifty has fifty times as often as one without labels")
    add("--pos-weight", choices=("none", "linear", "sqrt"),
        help="weight of positive labels in the loss: 1, negatives / positives, or its square root")
    add("--pos-weight-clip", type=real, nargs=2, metavar=("LO", "HI"), help="bounds of that weight")

    add = parser.add_argument_group("stopping").add_argument
    add("--monitor", choices=MONITORED, help="score on val that decides which epoch is kept "
        "(f1: weighted), or last: the last epoch (default: map with --patience, else last)")
    add("--patience", type=whole, help="validations without improvement to stop after; 0: never")
    add("--min-delta", type=real, default=0.0, help="smallest improvement that counts")
    add("--val-every", type=count, default=1, metavar="N",
        help="validate every N epochs, and after the last one")
    add("--train-metrics-every", type=whole, default=0, metavar="N",
        help="score the train split every N epochs; 0: never")

    add = parser.add_argument_group("thresholds").add_argument
    add("--calibration", choices=("fit", "none"), default="fit",
        help="calibrate probabilities on val")
    add("--thresholds", type=threshold_method, default="soft", metavar="METHOD",
        help="choose thresholds on val: soft, pr_curve, grid, or global (one for all); or a number")
    add("--max-threshold", type=real, metavar="T", help="use 0.5 instead of a threshold above T")

    add = parser.add_argument_group("output").add_argument
    add("--out", default="outputs", metavar="DIR", help="folder for all files of the run")
    add("--plot-title", type=plot_title, default="", metavar="TEXT",
        help="title of loss_curve.png, also saved as TITLE.png")
    add("--export-splits", metavar="DIR", help="copy the images to DIR/images/train, val and test")
    add("--registry", metavar="DIR", help="keep the best run (F1 on val) of each configuration here")
    add("--tensorboard", action="store_true", help="log to OUT/tensorboard (package tensorboard)")
    add("-q", "--quiet", action="store_true", help="print only warnings and errors")

    add = parser.add_argument_group("system").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("-j", "--workers", type=whole, default=inference.default_workers(),
        help="threads that decode images, in each process")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: on a GPU what it is built for; on a CPU bf16 if it is at least 1.3 times as fast")
    add("--cache", type=cache_size, default="auto", metavar="GB",
        help="memory for decoded images, which all folds share: auto (half of what is free, "
             "divided among the processes), off, or gigabytes in each process")
    add("--resume", action="store_true",
        help="resume the run in OUT, for example after Ctrl-C or a crash")
    parser.set_defaults(**RECIPE)
    return parser


def parse_options(argv=None):
    """Parse the command line, and fill in the defaults that depend on other options.

    Explicit options win over --folds, --folds over --preset, and --preset over --demo.
    Raises InputError for options that contradict each other.
    """
    parser = option_parser()
    # Some options change the defaults of others, so the command line is parsed twice.
    given = parser.parse_known_args(argv)[0]
    defaults = (DEMO if given.demo else {}) | PRESETS[given.preset] | (FOLDS if given.folds else {})
    if given.sampler == "balanced" or given.loss == "asymmetric":
        defaults |= {"pos_weight": "none"}  # these already make up for rare positives
    parser.set_defaults(**defaults)
    options = parser.parse_args(argv)

    if options.folds == 1:
        raise InputError("--folds 1: a fold needs a part that it does not train on: give 2 or more")
    if options.folds and options.export_splits:
        raise InputError("--export-splits copies train, val and test, which --folds does not have: "
                         "leave out one of the two")
    dataset.read_operations(options.augment)  # raises InputError
    if options.pos_weight_clip and options.pos_weight_clip[0] > options.pos_weight_clip[1]:
        raise InputError("--pos-weight-clip takes the lower bound first")
    if len(options.dropout or []) > len(HEADS[options.head]):
        raise InputError(f"--dropout: the {options.head} head takes {len(HEADS[options.head])} of them")
    if options.patience and options.monitor == "last":
        raise InputError("--patience waits for a better epoch, but --monitor last keeps the last: "
                         "name another --monitor, or leave it out")

    # From scratch, all layers are new. Otherwise the new ones train alone at first, because the large
    # gradients of random weights would spoil layers that are good already.
    if options.train_layers == "new" and options.weights == "none":
        options.train_layers = "all"
    if options.train_layers == "new" and options.unfreeze is None:
        options.unfreeze = "late"
    # The extra time only pays off after pretrained layers. There sam 0: -0.012, in 0.76 of the time
    # (100 and 200 photographs, three seeds), and with complete weights -0.008 and -0.005, in 0.75 and
    # 0.71 of it (400 and 780, three seeds); from scratch, sam 0.1: -0.06 (demo, in equal time).
    if options.sam is None:
        options.sam = 0.0 if options.weights == "none" or options.preset != "default" else 0.1
    options.backbone = inference.check_backbone(options.backbone)
    if options.size is None:
        options.size = inference.pretrained_input(options.backbone).size
    inference.check_size(options.backbone, options.size)
    if options.lr_backbone is None:
        options.lr_backbone = default_backbone_rate(options)
    options.dropout = options.dropout or HEADS[options.head]
    options.monitor = options.monitor or ("map" if options.patience else "last")
    return options


def default_backbone_rate(options):
    """Return the learning rate of the backbone for options that name none."""
    if options.weights == "none" or options.preset != "default":
        return options.lr

    # Not measured here: Liu et al. 2022 fine-tune ConvNeXt at 5e-5, and others Swin and ViT at such
    # rates. Without BatchNorm, a high rate spoils pretrained layers more easily.
    network = inference.build_without_values(options.backbone, options.size)
    return options.lr if inference.has_batchnorm(network) else min(options.lr, 5e-5)


# --------------------------------------------------------------------------------------------------
# A run, from the command line down to the gradient


def main(argv=None):
    """Train as the command line says, and return the report that metrics.json holds.

    Raises InputError when an option, a label file or a checkpoint is wrong.
    """
    options = parse_options(argv)
    start_processes(options)
    Progress.shown = is_leader() and not options.quiet
    with ends_with_the_others():
        tables = read_data(options)  # the train, val and test splits
        check_out(options, tables)
        print_configuration(options)

        # All splits and folds share a cache. It is emptied at the end, because a notebook keeps the
        # traceback of a failed run, and with it everything that its functions refer to.
        with contextlib.closing(dataset.PixelCache(cache_budget(options.cache))) as cache:
            report = (cross_validate(options, tables, cache) if options.folds
                      else train(build(options, tables, cache=cache)))

    images = tables["test"].paths or tables["val"].paths or tables["train"].paths
    print_next_steps(options, images[0])
    return report


def train(run):
    """Train, validate and report a run, and return its report."""
    wait_for_leader()
    with folder_locked(run.out):  # so that no second run writes there
        if is_leader():
            prepare_folder(run)
        fit(run)
        return finish(run)


def fit(run):
    """Train until the last epoch, or until patience or a signal ends it sooner."""
    options, state = run.options, run.state
    # Only the leader says so, since torchrun sends a signal to all processes.
    message = "finishing the current step, then saving and stopping" if is_leader() else ""
    noted = dataset.signals_noted(partial(setattr, run, "signal"), message)
    with noted, fastest_convolutions(), ProgressLine(run) as progress:
        # A resumed run may lack its best model, because it was killed before it wrote model.pth, or
        # because by another --monitor the last epoch is now the best.
        best, _ = find_best(run)
        if state.epoch and not state.images and best != run.classifier.epoch:
            validate_last(run)

        while state.epoch < options.epochs:
            _, waited = find_best(run)
            if 0 < options.patience <= waited:
                break
            stop_if_asked(run)
            choose_layers(run)
            train_epoch(run, progress)
            stop_if_asked(run)  # now, and not after a validation that may take minutes
            end_epoch(run)
            progress.end_epoch()

        # A run that is resumed with fewer --epochs may end on an epoch that --val-every left out.
        if not state.images and "val_loss" not in state.history[-1]:
            validate_last(run)
    stop_if_asked(run)  # when the signal came last; from here on, signals act at once


@contextlib.contextmanager
def fastest_convolutions():
    """Let cuDNN time its algorithms for each shape within the block, and use the fastest."""
    # Worth it only in training, where nearly all batches have the same shape. A program that
    # imports inference.py keeps its own setting.
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def train_epoch(run, progress):
    """Train on the rest of the epoch; after a signal, finish only the current step."""
    options, state = run.options, run.state
    rank, ranks = rank_and_ranks()
    count = len(run.tables["train"])
    train_mode(run.member.network)
    started = time.perf_counter() - state.seconds
    losses = []

    for batch in load_batches(run):
        # The rate is that of the middle of the step, which is 0 in neither the first nor the last.
        set_rates(run, state.epoch + (state.images + batch.seen) / 2 / count)
        # last.pth holds the random state of the leader alone. With several processes, each step
        # therefore gets a seed of its own, so that dropout is the same after a resume.
        if ranks > 1:
            rng = np.random.default_rng([options.seed, state.epoch, batch.seen, rank])
            torch.manual_seed(int(rng.integers(2**63)))
        losses.append(train_step(run, batch.images, batch.targets, batch.share))
        state.images, state.seconds = batch.seen, time.perf_counter() - started
        progress.step(losses[-1])

        if len(losses) % 100 == 0:  # rarely, because reading a loss waits for the device
            gather_losses(run, losses)
        if should_stop(run):
            break
    else:
        state.images = count  # batches without a known label were skipped, perhaps the last ones

    gather_losses(run, losses)


def train_step(run, images, targets, share):
    """Take one optimizer step, and return the loss of the batch over all processes as a tensor.

    Args: images (B, 3, S, S), normalised; targets (B, C) with 1, 0 and NaN; share: 1, or the share
    of each image in its mixture with the image before it (--mix): its own labels get that share of
    the loss, and the labels of the image before it get the rest.
    """
    sharp = takes_sam_steps(run.options, run.state.epoch + 1)
    loss = (sharp_gradient if sharp else compute_gradient)(run, images, targets, share)

    # The scaler skips the step when fp16 overflowed in either gradient. A fused optimizer checks
    # that on the GPU, so that nothing in a step waits for the GPU.
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss


def compute_gradient(run, images, targets, share):
    """Set the gradient of the loss, and return the loss; arguments as for train_step()."""
    masked_loss = LOSSES[run.options.loss]
    logits = inference.forward(run.model, images, run.classifier.precision)
    total, known = masked_loss(logits, targets, run.pos_weight)
    if share < 1:  # rolling the targets does not change how many labels are known
        others, _ = masked_loss(logits, targets.roll(1, 0), run.pos_weight)
        total = share * total + (1 - share) * others

    # Divide by the known labels of all processes, such as 8 when 3 are known here and 5 elsewhere.
    # DDP averages the gradients of the processes, and the factor turns the average into their sum.
    # The loss of a batch without a known label is 0, not 0 / 0. The same all-reduce counts the
    # processes that a signal asked to stop, which saves a second one.
    asked = torch.full_like(known, run.signal != 0)
    all_total, all_known, run.asked = sum_over_ranks(torch.stack([total.detach(), known, asked]))
    loss = total * rank_and_ranks()[1] / all_known.clamp(min=1)
    run.optimizer.zero_grad(set_to_none=True)  # of frozen weights it stays None
    run.scaler.scale(loss).backward()
    return all_total / all_known.clamp(min=1)


def sharp_gradient(run, images, targets, share):
    """Set the gradient of the worst point nearby, and return the loss; arguments as for train_step().

    This is sharpness-aware minimisation: it leads to flat minima, which generalise better.
    """
    with frozen_layers_computed_once(run.model):
        loss = compute_gradient(run, images, targets, share)
        with weights_moved_uphill(run.model, run.options.sam):
            compute_gradient(run, images, targets, share)
    return loss


def takes_sam_steps(options, epoch):
    """Return True if the steps of an epoch, counted from 1, are sharpness-aware."""
    return bool(options.sam) and epoch - 1 >= options.epochs / 2


@contextlib.contextmanager
def weights_moved_uphill(model, radius):
    """Move the weights by `radius` uphill, along the gradient of the loss, within the block.

    Afterwards the weights and the BatchNorm statistics are as before, while the gradient is the one
    that the block computed. Source: Foret et al. 2021, equation 2.
    """
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    changed = [*weights, *model.buffers()]  # the statistics must belong to the weights that stay
    before = [tensor.detach().clone() for tensor in changed]

    # The length of the gradient of all weights together. Without a known label it is 0.
    length = torch.stack([weight.grad.norm() for weight in weights]).norm().clamp(min=1e-12)
    with torch.no_grad():
        for weight in weights:
            weight += weight.grad * (radius / length)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before):
                tensor.copy_(value)


@contextlib.contextmanager
def frozen_layers_computed_once(model):
    """Compute the frozen first layers once within the block, which must see a single batch.

    Each layer has to run once for the batch, as those of all networks of torchvision do.
    """
    layers = list(dict.fromkeys(frozen_layers(model)))  # a layer may have two parents
    for layer in layers:
        layer.forward = called_once(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # restores the method of the class


def frozen_layers(model):
    """Yield the layers that have weights, but none that train; not those within such a layer."""
    for layer in model.children():
        weights = list(layer.parameters())
        if any(weight.requires_grad for weight in weights):
            yield from frozen_layers(layer)
        elif weights:
            yield layer


def called_once(forward):
    """Return a function that calls `forward` once, and then returns the saved output.

    It calls it again if the output depends on weights that train, or was changed in place.
    """
    kept = []

    def repeat(*inputs, **options):
        if kept and kept[0]._version == kept[1]:  # a ReLU in place, for example, makes another version
            return kept[0]
        output = forward(*inputs, **options)
        if isinstance(output, torch.Tensor) and not output.requires_grad:
            kept[:] = output, output._version
        return output

    return repeat


# --------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them: each trains on its share of every batch


def start_processes(options):
    """Join the other processes if torchrun started this one, and choose its device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return  # a single process, or a second run in the same processes
    use_cuda = options.device in ("auto", "cuda") and torch.cuda.is_available()
    if use_cuda:  # a GPU per process of this machine
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(options.device)

    # The others wait while the leader reads, copies or writes many files, which may take hours. The
    # limit can be this long because torchrun ends all processes when one of them has ended.
    timeout = datetime.timedelta(days=7)
    distributed.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout)  # gloo: no GPUs
    atexit.register(distributed.destroy_process_group)  # NCCL warns without it


def rank_and_ranks():
    """Return the number of this process, counted from 0, and how many there are."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_leader():
    """Return True in the one process that prints and writes files."""
    return rank_and_ranks()[0] == 0


def wait_for_leader():
    """Wait until every process, the leader included, has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def sum_over_ranks(tensor):
    """Return the sum of a tensor over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def ends_with_the_others():
    """End this process with a message if communication fails because another one has ended."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception of its own. Its messages start with the name of one of its source
        # files in brackets.
        if re.match(r"\[[^]]*\bgloo\b", str(error)):
            reason = "its own message, or that of torchrun, says why"
        elif isinstance(error, distributed.DistError):
            reason = str(error).splitlines()[0]  # perhaps NCCL has another problem
        else:
            raise
        print_text(f"error: another process of this run has ended ({reason}): the same command "
                   "with --resume continues after the last save", sys.stderr)
        # Not sys.exit(): destructors of torch may wait for processes that wait for this one.
        os._exit(1)


# --------------------------------------------------------------------------------------------------
# Data


def read_data(options):
    """Read and split the labels, and return a LabelTable for each of "train", "val" and "test".

    With --folds, "train" has all images of train and val, and "val" is empty. Sets the options that
    depend on the number of images, as set_epochs() says. Raises InputError.
    """
    # Only one process draws the demo. The others wait, and then all of them read the same files.
    if options.demo and is_leader() and not dataset.demo_is_drawn(options.data):
        print_once(options, f"drawing the demo data into {options.data}")
        dataset.write_demo(options.data)
    wait_for_leader()
    identify = partial(identify_images, options)
    table = dataset.read_labels(options.data, identify=identify, **dataset.data_options(options))
    print_once(options, dataset.summary(table, options.data))

    parts = dataset.split(table, options.split, options.split_method, options.seed)
    tables = {name: table.subset(rows) for name, rows in zip(PARTS, parts)}
    if options.folds:  # cross_validate() divides train and val anew, and leaves test alone
        pool = np.sort(np.concatenate(parts[:2]))
        tables |= {"train": table.subset(pool), "val": table.subset([])}
    source = "the data's own" if any(table.parts) else f"{options.split_method}, seed {options.seed}"
    counts = ", ".join(f"{len(part)} {name}" for name, part in tables.items())
    print_once(options, f"split ({source}): {counts}")

    check_splits(options, tables)
    smallest = min(len(part) for part in tables.values() if len(part))
    count = len(tables["train"])
    check_batches(options, count, smallest)
    set_epochs(options, count - count // options.folds if options.folds else count)
    return tables


def set_epochs(options, count):
    """Fill in the number of epochs for `count` training images, and the defaults that depend on it."""
    if options.epochs is None and (options.weights == "none" or options.patience):
        options.epochs = 20
    elif options.epochs is None:  # 20 are enough for few images; fewer than 5 leave the head too little
        options.epochs = min(20, max(5, round(IMAGES_TO_SEE / count)))
    options.unfreeze_epoch = options.unfreeze_epoch or 1 + options.epochs // 4
    # Half and three quarters of the epochs, as He et al. 2016 did on CIFAR.
    options.milestones = options.milestones or [max(1, options.epochs * k // 4) for k in (2, 3)]


def identify_images(options, paths):
    """Return the dataset.Identities of the images, which the leader finds for all processes."""
    # That may take minutes for a million images, so --resume takes what the run found when it began,
    # unless an image has changed since.
    found = [None]
    if is_leader():
        known = read_identities(Path(options.out) / "images.npz") if options.resume else None
        found = [dataset.identify_images(paths, known)]
    if distributed.is_initialized():
        distributed.broadcast_object_list(found)
    return found[0]


def read_identities(path):
    """Return the dataset.Identities in a file, or None if there are none."""
    # Where bytes are damaged, zipfile, zlib and numpy raise almost anything.
    with contextlib.suppress(Exception), open(path, "rb") as file:
        saved = np.load(file, allow_pickle=False)
        return dataset.Identities(str(saved["stamp"]), saved["firsts"], saved["keys"])


def write_identities(path, identities):
    """Write a file for read_identities()."""
    with dataset.atomic_write(path, "wb") as file:
        np.savez(file, **identities._asdict())


def check_splits(options, tables):
    """Raise an InputError when too few labels are known to train, or warn what will be missing."""
    if np.isnan(tables["train"].targets).all():
        raise InputError(f"{options.data}: no label of the train split is known: "
                         "there is nothing to learn from")
    for warning in dataset.single_valued_classes(tables["train"]):
        print_warning(f"train split: {warning}: such a class cannot be learned")
    effects = {"val": "the last epoch is kept, and nothing is calibrated on it",
               "test": "nothing is reported"}
    for name, effect in effects.items():
        if len(tables[name]) and np.isnan(tables[name].targets).all():
            print_warning(f"{name} split: no label is known: {effect}")

    if len(tables["val"]):
        check_val(options, tables["val"].targets)
    # Without a test split, val is reported; with folds, the val split of each fold.
    if options.monitor != "last" and (options.folds or len(tables["test"]) == 0):
        print_warning(f"--monitor {options.monitor} chooses the epoch on the images that are "
                      "reported, which makes the model look better than it is: "
                      "--monitor last --patience 0 keeps the last epoch")


def check_val(options, targets):
    """Raise an InputError when the targets (N, C) of val leave the score of --monitor undefined."""
    positive, negative = (targets == 1).any(axis=0), (targets == 0).any(axis=0)
    needs = {"loss": ("a known label", positive | negative),
             "f1": ("a known positive label", positive),
             "map": ("a class with known positives and known negatives", positive & negative)}
    if options.monitor != "last":
        need, classes_that_have_it = needs[options.monitor]
        if not classes_that_have_it.any():
            raise InputError(f"--monitor {options.monitor} needs {need} on val, and there is none: "
                             "label more images, change --split, or keep the last epoch with "
                             "--monitor last --patience 0")


def check_batches(options, count, smallest):
    """Raise an InputError when there are too few images for every process to take part.

    Args: count: number of images to train on; smallest: number of images in the smallest split.
    """
    _, ranks = rank_and_ranks()
    share = count // steps_per_epoch(options, count) // ranks  # images per process and step
    if ranks > smallest or share == 0:
        raise InputError(f"{ranks} processes are too many for batches of {options.batch_size} "
                         f"and splits of {smallest}")
    if share == 1 and not trains_on_one_image(options):
        larger = f", or raise --size {options.size}" if options.head == "linear" else ""
        raise InputError(f"with -b {options.batch_size} and {count} images to train on, a process "
                         "gets a single image per step, and BatchNorm needs two: "
                         f"raise -b, or add images{larger}")


def trains_on_one_image(options):
    """Return True if the network can train on one image at a time."""
    # BatchNorm needs two values per channel. One image has them only where its map is larger than
    # 1 x 1, which depends on --size: let the network itself say.
    with inference.WithoutValues():
        network = inference.build_model(options.backbone, options.head, 1, options.dropout,
                                        options.size)
    image = torch.empty(1, 3, options.size, options.size, device="meta")
    try:
        network.to("meta").train()(image)  # computes shapes, but no values
    except ValueError:  # raised by BatchNorm
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Setup: the network and everything that trains it


@dataclass
class State:
    """Progress of a run: plain values, saved in last.pth as they are."""

    epoch: int = 0  # finished epochs
    images: int = 0  # images used of the epoch in progress
    seconds: float = 0.0  # spent on these
    losses: list = field(default_factory=list)  # of each step
    history: list = field(default_factory=list)  # a dict of scores per epoch

    def __str__(self):
        return f"{self.images} images of epoch {self.epoch + 1}" if self.images else f"epoch {self.epoch}"


@dataclass
class Run:
    """A network with everything that trains it."""

    options: argparse.Namespace
    classifier: inference.Classifier
    tables: dict  # LabelTable of "train", "val" and "test"
    images: dict  # ImageDataset of the same
    fresh: tuple  # names of the parameters without loaded weights
    pos_weight: torch.Tensor  # (C,)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    state: State = field(default_factory=State)
    model: nn.Module = None  # the network, wrapped when several processes train it
    signal: int = 0  # number of the signal that asks this process to stop
    asked: torch.Tensor = None  # how many processes were asked to stop, as of the last step
    reading: tuple = None  # on a GPU: `asked` of an earlier step, as start_reading() returned it
    reported: set = field(default_factory=set)  # warnings about bad images that were printed
    board: object = None  # TensorBoard's writer
    fold: tuple = (1, 1)  # with --folds: which fold, counted from 1, and how many there are
    speeds: dict = field(default_factory=dict)  # {kind of work: seconds per image}, as measured

    @property
    def out(self):
        """The folder of the run's files."""
        return Path(self.options.out)

    @property
    def member(self):
        """The network that is trained, with its calibration."""
        return self.classifier.members[0]

    @cached_property
    def digests(self):
        """The fingerprints of the data in last.pth, computed once, as the tables never change."""
        return {"splits": splits_digest(self.tables), "images": images_digest(self.tables)}


def build(options, tables, weights=None, cache=None):
    """Return a Run at its start, or with --resume at the point where last.pth was saved.

    Args: tables: as read_data() returns them; weights: those of read_weights(), if read already;
    cache: a dataset.PixelCache for the images of train and val.
    Raises InputError for unknown layers, and for weights or a last.pth that do not fit.
    """
    last = read_state(options, tables) if options.resume else None
    torch.manual_seed(options.seed)  # for the random weights here, and for dropout later
    table = tables["train"]
    count = len(table.classes)
    device = inference.choose_device(options.device)
    network = inference.build_model(options.backbone, options.head, count, options.dropout,
                                    options.size)
    for layers in (options.train_layers, options.unfreeze or "all"):
        select_parameters(network, layers)  # an error now, not in epoch N

    if last:  # load_state() fills in the network
        fresh, trained_on = tuple(last["fresh"]), inference.unpack_keys(last["trained_on"])
    else:
        weights = weights or read_weights(options)
        fresh = load_weights(network, weights, options, table.classes)
        trained_on = dataset.image_keys(table).tolist()
        if weights:
            warn_about_leaks(weights, tables)
            trained_on = sorted({*weights.trained_on, *trained_on})

    network = inference.to_device(network, device)
    member = inference.Member(network, options.backbone, options.head, options.dropout, options.size,
                              [0.0] * count)
    classifier = inference.Classifier(
        [member], table.classes, table.groups, [0.5] * count, options=dict(vars(options)),
        trained_on=trained_on, device=device, precision=choose_precision(options, device, last))
    pos_weight = compute_pos_weight(table.targets, options.pos_weight, options.pos_weight_clip)
    # Images of test are read only once, at the end, so it is of no use to cache them.
    images = {name: dataset.ImageDataset(part, options.size, None if name == "test" else cache)
              for name, part in tables.items()}

    optimizer = torch.optim.AdamW(parameter_groups(network), weight_decay=options.wd,
                                  fused=device.type != "mps")  # torch 2.4 has no fused AdamW there
    # Small gradients would be 0 in fp16, unless the loss is scaled up. bf16 has the range of fp32.
    scaler = torch.amp.GradScaler(device.type, enabled=classifier.precision == torch.float16)

    run = Run(options, classifier, tables, images, fresh, torch.from_numpy(pos_weight).to(device),
              optimizer, scaler, board=open_board(options))
    if last:
        load_state(run, last)
    return run


def parameter_groups(network):
    """Return the parameters for the optimizer: of the backbone and of the head.

    A network without BatchNorm has two more such groups: what weight decay leaves alone.
    """
    head = inference.head_name(network) + "."
    # Recipes for networks with LayerNorm exempt its weights, biases and vectors for places.
    exempts = not inference.has_batchnorm(network)
    groups = [[], [], [], []]
    for name, weight in network.named_parameters():
        exempt = exempts and not (name.endswith("weight") and weight.dim() > 1)
        groups[2 * exempt + name.startswith(head)].append(weight)
    return [{"params": group} for group in groups if group]


def set_rates(run, progress):
    """Set the learning rates and the weight decay after `progress` epochs, a fraction."""
    rates = learning_rates(run.options, progress)
    for place, group in enumerate(run.optimizer.param_groups):  # as parameter_groups() orders them
        group.update(lr=rates[place % 2], weight_decay=run.options.wd if place < 2 else 0.0)


def read_weights(options):
    """Return the inference.Weights that --weights names, or None from scratch."""
    return None if options.weights == "none" else inference.read_weights(options.weights, options.backbone)


def load_weights(network, weights, options, classes):
    """Load weights into a network, and return the names of the parameters that got none."""
    names = [name for name, _ in network.named_parameters()]
    if weights is None:
        print_once(options, "weights: none, training from scratch")
        return tuple(names)

    # Head weights are matched to classes by name: a model for other classes is a start, too.
    taken, skipped, common = inference.load_weights(network, weights, options.backbone, classes)
    print_once(options, f"weights: {len(taken)} tensors taken from {options.weights}")
    if common:
        print_once(options, f"  head rows taken by class name: {', '.join(common)}")
    for reason in sorted(set(skipped.values())):
        tensors = [name for name, why in skipped.items() if why == reason]
        layers = dict.fromkeys(name.rpartition(".")[0] or name for name in tensors)
        print_once(options, f"  {len(tensors)} not taken, {reason}: {', '.join(layers)}")
    return tuple(name for name in names if name not in taken)


def count_trained_on(weights, table):
    """Return how many images of a table the weights, if any, were trained on."""
    if weights is None or not weights.trained_on:
        return 0
    return np.count_nonzero(inference.was_trained_on(weights.trained_on, table))


def warn_about_leaks(weights, tables):
    """Warn when the weights were trained on images of val or test."""
    for name in ("val", "test"):
        if known := count_trained_on(weights, tables[name]):
            print_warning(f"{name} split: --weights {weights.source} was trained on {known} of the "
                          f"{len(tables[name])} images: its scores say too little about new images")


def choose_precision(options, device, last):
    """Return the dtype to train in; auto keeps that of a resumed run, else the leader measures."""
    name = last["precision"] if last and options.precision == "auto" else options.precision
    chosen = list(inference.choose_precision(name, device))  # a dtype, and the reason for it
    if name != options.precision:
        chosen[1] = "as in the run that is resumed"
    if distributed.is_initialized():  # two processes could measure different winners
        distributed.broadcast_object_list(chosen)
    precision, reason = chosen
    print_once(options, f"device: {device}, precision: {precision_name(precision)} ({reason})")
    return precision


def precision_name(precision):
    """Return the name that --precision has for a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[precision]


# --------------------------------------------------------------------------------------------------
# Losses


def masked_bce(logits, targets, pos_weight):
    """Return the summed binary cross-entropy over known labels, and how many labels are known.

    Args: logits (B, C); targets (B, C) with 1, 0 and NaN, which is ignored; pos_weight (C,), which
    multiplies the loss of positives.
    Returns: two scalar tensors, whose quotient is the mean; both are 0 when no label is known.
    """
    # A mask by multiplication would not do: NaN times 0 is NaN, in the loss and in the gradient.
    known = ~torch.isnan(targets)
    targets = torch.where(known, targets, 0.0).to(logits.dtype)
    loss = nn.functional.binary_cross_entropy_with_logits(
        logits, targets, pos_weight=pos_weight.to(logits.dtype), reduction="none")
    return torch.where(known, loss, 0.0).sum(), known.sum()


def masked_asymmetric(logits, targets, pos_weight):
    """Return the summed asymmetric loss over known labels, and how many labels are known.

    Args and Returns: as for masked_bce(). Source: Ridnik et al. 2021, equation 7.
    """
    # The authors' parameters: negatives below the margin, a probability of 0.05, do not count, others
    # by the fourth power of what is above it (gamma 4), and positives in full (gamma 0).
    known = ~torch.isnan(targets)
    positive = nn.functional.softplus(-logits) * pos_weight.to(logits.dtype)  # -log p
    shifted = (torch.sigmoid(logits) - 0.05).clamp(min=0)
    negative = -(shifted**4) * torch.log1p(-shifted)
    loss = torch.where(targets == 1, positive, negative)
    return torch.where(known, loss, 0.0).sum(), known.sum()


LOSSES = {"bce": masked_bce, "asymmetric": masked_asymmetric}

# The asymmetric loss inflates probabilities: for a label that is present in 1, 10, 50 or 90 % of
# the cases it is smallest at 0.32, 0.48, 0.68 or 0.92, where its derivative is 0. This line through
# the logits leads almost back, to 0.02, 0.10, 0.48 and 0.98. The calibration on val does the rest.
ASYMMETRIC_SCALE, ASYMMETRIC_OFFSET = 2.5, -2.0


def compute_pos_weight(targets, mode="sqrt", clip=(1, 20)):
    """Return the weight of each class's positives in the loss: negatives / positives, float32 (C,).

    Args: targets (N, C) with 1, 0 and NaN; mode: "none" (all 1), "linear", or "sqrt" (its square
    root); clip: the lowest and highest weight, or None.
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
    weight[(positives == 0) | (negatives == 0)] = 1  # the ratio means nothing then
    return weight.astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Layers: which of them train


def choose_layers(run):
    """Freeze and unfreeze the layers for the coming epoch, and set run.model."""
    options = run.options
    network = run.member.network
    layers = layers_to_train(options, run.state.epoch + 1)
    trained = select_parameters(network, layers, run.fresh)
    before = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if run.model is None or trained != before:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
        run.model = network
        if distributed.is_initialized():  # DDP notes which parameters train when it is made
            run.model = nn.parallel.DistributedDataParallel(network)


def layers_to_train(options, epoch):
    """Return the layers to train in an epoch, counted from 1, for select_parameters()."""
    unfrozen = options.unfreeze and epoch >= options.unfreeze_epoch
    return f"{options.train_layers},{options.unfreeze}" if unfrozen else options.train_layers


def select_parameters(network, layers, fresh=()):
    """Return the set of names of the parameters in `layers`.

    Args: layers: "all", "head", "new" (the head and `fresh`), "late" (all but the first layers) and
    names of layers, separated by commas; fresh: names of the parameters without loaded weights.
    Raises InputError for other names.
    """
    names = [name for name, _ in network.named_parameters()]
    head = inference.head_name(network) + "."
    prefixes = {"all": ("",), "head": (head,), "new": (head, *fresh)}
    prefixes["late"] = (head, *late_parameters(network))

    # "layer4.0.conv1.weight" is in the layers layer4, layer4.0 and layer4.0.conv1.
    inside = {}
    for name in names:
        if not name.startswith(head):
            for layer in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
                inside[layer] = (layer + ".",)  # the dot keeps layer10 out of layer1

    wrong = [name for name in layers.split(",") if name not in prefixes | inside]
    if wrong:
        depth = sorted(name.count(".") for name in inside)[:5][-1]  # at which there are five
        outer = [name for name in inside if name.count(".") <= depth]
        raise InputError(f"the network has no layer {', '.join(wrong)}; it has "
                         f"{', '.join([*prefixes, *outer])}, and the layers inside these")
    chosen = tuple(prefix for name in layers.split(",") for prefix in (prefixes | inside)[name])
    return {name for name in names if name.startswith(chosen)}


def late_parameters(network):
    """Return the names of the parameters of all layers but the first ones, without the head."""
    # The first ones, up to 7 % of the weights, see edges and textures, which are the same in all
    # photographs. Of a ResNet this leaves layer3 and layer4: conv1 to layer2 have 6 % of them.
    head = inference.head_name(network) + "."
    sizes = {name: weight.numel() for name, weight in network.named_parameters()
             if not name.startswith(head)}
    limit = 0.07 * sum(sizes.values())

    def layers(module, prefix=""):
        """Yield the prefix and size of each layer, or of those inside one above the limit."""
        for name, layer in module.named_children():
            path = f"{prefix}{name}."
            size = sum(count for name, count in sizes.items() if name.startswith(path))
            if size > limit and any(layer.children()):
                yield from layers(layer, path)
            else:
                yield path, size

    names = list(sizes)
    passed = 0
    for path, size in layers(network):
        passed += size
        if passed > limit:
            first = next(place for place, name in enumerate(names) if name.startswith(path))
            return names[first:]
    return names


def train_mode(network):
    """Set train mode in the layers that train, and eval mode in frozen ones."""
    # In train mode the statistics of a frozen BatchNorm would drift away from its weights. A layer
    # without parameters, such as dropout, follows the layer before it, or the head that has it.
    trained = True
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own:
            trained = any(parameter.requires_grad for parameter in own)
        module.training = trained
    head = network.get_submodule(inference.head_name(network))
    head.train(any(parameter.requires_grad for parameter in head.parameters()))


# --------------------------------------------------------------------------------------------------
# Schedule


def learning_rates(options, progress):
    """Return the rates of the backbone and of the head after `progress` epochs, a fraction."""
    factor = rate_factor(options, progress)
    unfrozen = options.unfreeze and progress > options.unfreeze_epoch - 1
    if unfrozen and options.unfreeze_lr is not None:
        return options.unfreeze_lr * factor, options.unfreeze_lr * factor
    return options.lr_backbone * factor, options.lr * factor


def rate_factor(options, progress):
    """Return the factor of --schedule on all rates after `progress` epochs."""
    if options.schedule == "cosine":
        # The rate rises linearly for one epoch, or a tenth of a short run, since the first steps of
        # Adam are the least certain ones; then it follows half a wave of the cosine down to 0.
        warmup = min(1.0, options.epochs / 10)
        angle = math.pi * min(1.0, progress / options.epochs)
        return min(progress / warmup, 0.5 + 0.5 * math.cos(angle))
    if options.schedule == "multistep":
        return options.lr_decay ** sum(progress > milestone for milestone in options.milestones)
    return 1.0


# --------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """A batch of this process, ready for the network; train_step() explains the first three."""

    images: torch.Tensor
    targets: torch.Tensor
    share: float
    seen: int  # images of the epoch that all processes have used after this batch


def load_batches(run):
    """Yield a Batch for each step that is left of the epoch: augmented, mixed and normalised."""
    options, epoch = run.options, run.state.epoch + 1
    device = run.classifier.device
    images = run.images["train"]
    drawn = draw_batches(run)
    operations = dataset.read_operations(options.augment)
    noise = dataset.draw_noise(len(images), options.seed, epoch)  # a row for each place
    loaded = dataset.batches(images, [rows for rows, *_ in drawn], options.workers, pin=device.type == "cuda")

    for (_, places, seen), (batch, targets, _) in zip(drawn, loaded):
        batch = dataset.send(batch, device)
        batch = dataset.augment(batch, operations, dataset.send(noise[places], device))
        share = 1.0
        if options.mix != "none":
            rng = np.random.default_rng([options.seed, epoch, seen])  # the same after a resume
            batch, share = dataset.mix(batch, options.mix, rng)
        yield Batch(run.member.normalize(batch), dataset.send(targets, device), share, seen)


def draw_batches(run):
    """Return a tuple (rows, places, seen) for each batch that is left of the epoch.

    Returns: rows: images of this process; places: their positions in the order of the epoch; seen:
    images of the epoch that all processes have used after this batch.
    """
    options, state = run.options, run.state
    targets = run.tables["train"].targets
    useless = np.isnan(targets).all(axis=1)  # nothing can be learned from an image without labels
    count = len(targets)

    # The order depends on the seed and the epoch alone, so that a resumed run continues it: after
    # 320 of 1000 images it goes on at place 320 of the same order, even with another batch size.
    # The factor is larger than any number of epochs: no two pairs of seed and epoch share an order.
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + state.epoch + 1)
    if options.sampler == "balanced":
        weights = torch.from_numpy(sampling_weights(targets))
        rows = torch.multinomial(weights, count, replacement=True, generator=generator).numpy()
    else:
        rows = torch.randperm(count, generator=generator).numpy()

    # A batch is cut from all places first, and then divided among the processes. Augmentation goes
    # by place, so that an image that --sampler balanced draws twice looks different each time.
    rank, ranks = rank_and_ranks()
    balanced = options.sampler == "balanced"  # all copies of an image must not go to one rank
    homes = np.arange(count) % ranks if balanced else home_ranks(run.tables["train"], ranks)[rows]
    steps = steps_per_epoch(options, count - state.images)
    drawn = []
    for places in np.array_split(np.arange(state.images, count), steps):
        if not useless[rows[places]].all():
            own = places[divide_batch(homes[places], ranks) == rank]
            drawn.append((rows[own], own, int(places[-1]) + 1))
    return drawn


def home_ranks(table, ranks):
    """Return the rank whose cache should hold each image of a table, an int array (N,).

    The other ranks seldom need the image, so that their caches have room for others.
    """
    if ranks == 1:
        return np.zeros(len(table), int)

    # Homes are random, because rows are often sorted by label, and BatchNorm must not see a single
    # class. A hash of the image gives the same home in every process, epoch and fold.
    return (dataset.image_keys(table) % np.uint64(ranks)).astype(int)


def divide_batch(homes, ranks):
    """Return the rank that gets each image of a batch, an int array (B,).

    All ranks get the same number, give or take one. An image whose home has enough goes elsewhere.
    Args: homes (B,), as home_ranks() returns them.
    """
    room = [len(share) for share in np.array_split(homes, ranks)]
    chosen = np.full(len(homes), -1)
    for i, home in enumerate(homes.tolist()):
        if room[home]:
            chosen[i] = home
            room[home] -= 1
    chosen[chosen < 0] = np.repeat(np.arange(ranks), room)
    return chosen


def steps_per_epoch(options, count):
    """Return the number of batches that `count` images make."""
    # They are even, since BatchNorm cannot train on a single image that is left over: 33 images in
    # batches of 16 make three steps of 11 images, not 16 + 16 + 1.
    steps = -(-count // options.batch_size)  # rounded up
    if options.batch_size > 1:
        steps = min(steps, count // 2)
    return max(1, steps)


def sampling_weights(targets):
    """Return the relative weight (N,) with which --sampler balanced draws each image, at least 1.

    Args: targets (N, C) with 1, 0 and NaN.
    """
    # The rarest known positive label of an image decides, by known labels / positives of its class:
    # an image with a label that 2 of 100 have is drawn 50 times as often as one without any label.
    known = np.count_nonzero(~np.isnan(targets), axis=0)
    positives = np.count_nonzero(targets == 1, axis=0)
    return np.where(targets == 1, known / np.maximum(positives, 1), 1.0).max(axis=1)


def cache_size(text):
    """Return a valid --cache; a type= function for argparse."""
    with contextlib.suppress(ValueError):
        if text in ("auto", "off") or 0 <= float(text) < math.inf:
            return text
    raise argparse.ArgumentTypeError(f"{text}: use auto, off, or a number of gigabytes")


def cache_budget(cache, root=Path("/")):
    """Return the bytes of --cache; auto is half of the free memory, shared by the processes.

    Args: root: the folder with proc/ and sys/.
    """
    if cache != "auto":
        return 0 if cache == "off" else float(cache) * 2**30

    free = 4 * 2**30  # a cautious guess where there is no /proc: macOS and Windows
    kilobytes = read_number(root / "proc/meminfo", "MemAvailable:")
    if kilobytes is not None:
        free = 1024 * kilobytes
    for folder in memory_groups(root):
        free = min(free, free_in_group(folder))
    # The other half is for the network, the batches, and other programs.
    return max(0, free) / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_groups(root):
    """Yield the folders of the control groups that may limit the memory of this process.

    Containers, SLURM and systemd run processes in such groups. The groups above one limit it, too.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):  # no Linux
        return

    # A line looks like "0::/user/job" (cgroup version 2) or "7:memory:/user/job" (version 1). Where
    # both are in use, version 2 has a folder of its own.
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in [mounts / "memory"] if controllers else [mounts, mounts / "unified"]:
            # In a container, the mount often is its own group, while the path is the one outside.
            names = [name for name in path.split("/") if name]
            if ".." in names or not os.path.isdir(mount.joinpath(*names)):
                names = []
            for depth in range(len(names) + 1):
                yield mount.joinpath(*names[:depth])


# Files of a control group in versions 1 and 2: its limits, the memory in use, and the line of
# memory.stat that counts file contents which the kernel keeps in memory but can drop at any time.
GROUP_FILES = (
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
)


def free_in_group(folder):
    """Return the bytes that a control group leaves to its processes; infinity without a limit."""
    free = math.inf
    for limits, used, droppable in GROUP_FILES:
        taken = read_number(folder / used) or 0
        taken -= read_number(folder / "memory.stat", droppable) or 0
        for name in limits:
            limit = read_number(folder / name)
            if limit is not None:
                free = min(free, limit - taken)
    return free


def read_number(path, title=None):
    """Return the number in a file, or on its line that starts with `title`, or None."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = path.read_text()
        if title is None:
            return int(text)  # a ValueError for "max", which means no limit
        for line in text.splitlines():
            words = line.split()
            if words[:1] == [title]:
                return int(words[1])
    return None


# --------------------------------------------------------------------------------------------------
# Losses of an epoch, and validation


def gather_losses(run, losses):
    """Move the losses of steps (scalar tensors) to run.state.losses, which waits for the device.

    Raises RuntimeError when a loss or a weight is not finite: such a state is never saved.
    """
    state = run.state
    values = torch.stack(losses).tolist() if losses else []
    losses.clear()

    bad = [f"loss is {loss} at iteration {iteration}"
           for iteration, loss in enumerate(values, len(state.losses) + 1)
           if not math.isfinite(loss)]
    # The last step may have spoiled the weights, which only the next loss would show.
    finite = torch.stack([weight.isfinite().all() for weight in run.member.network.parameters()])
    if not finite.all():  # read once, as each reading waits for the device
        bad.append("weights are no longer finite")
    if bad:
        saved = "nothing is saved yet"
        if state.epoch:
            saved = f"{run.out / 'last.pth'} holds epoch {state.epoch}"
        raise RuntimeError(f"the {bad[0]}, in epoch {state.epoch + 1}: "
                           f"try a lower --lr, or --precision fp32; {saved}")
    state.losses += values


def end_epoch(run):
    """Validate the epoch that was trained, add it to the history, and save it."""
    options, state = run.options, run.state
    report_bad_images(run, "train")
    epoch = state.epoch + 1
    losses = state.losses[sum(row["steps"] for row in state.history) :]  # those of this epoch
    mean = float(np.mean(losses)) if losses else math.nan  # none, when no label was known
    row = {"epoch": epoch, "steps": len(losses), "train_loss": mean}

    splits = splits_to_score(options, epoch)
    if "val" in splits:
        row |= validate(run)
    if "train" in splits:
        report = evaluate_split(run, "train")[2]
        row |= {f"train_{name}": report[name] for name in ("f1_macro", "f1_weighted", "map")}

    rates = learning_rates(options, state.epoch + 0.5)  # in the middle of the epoch
    row |= {"lr": rates[1], "lr_backbone": rates[0], "seconds": state.seconds,
            "images_per_second": state.images / state.seconds if state.seconds else 0.0}
    state.history.append(row)
    state.epoch, state.images, state.seconds = epoch, 0, 0.0
    save_epoch(run)

    if run.board:
        for name, value in row.items():
            run.board.add_scalar(f"epoch/{name}", value, epoch)
        for step, loss in enumerate(losses, len(state.losses) - len(losses) + 1):
            run.board.add_scalar("iteration/train_loss", loss, step)
        run.board.flush()


def splits_to_score(options, epoch):
    """Return which of train and val are predicted after an epoch, counted from 1."""
    every = {"train": options.train_metrics_every, "val": options.val_every}
    return [split for split, n in every.items() if n and (epoch % n == 0 or epoch == options.epochs)]


def validate(run):
    """Return the scores on val as a dict, named as in the history."""
    table, _, report = evaluate_split(run, "val")
    check_val(run.options, table.targets)  # unreadable images may have had the labels that it needs
    return {f"val_{name}": report[name] for name in ("loss", *metrics.HEADLINES)}


def validate_last(run):
    """Validate the last epoch of a resumed run, whose network last.pth held, and save it."""
    run.state.history[-1] |= validate(run)
    save_epoch(run)


def evaluate_split(run, split, intervals=False):
    """Predict a split, choosing calibration and thresholds first if it is val.

    Returns: a LabelTable of the images that can be read, their probabilities (n, C), the report.
    """
    classifier = run.classifier
    rows, logits = predict_split(run, split)
    table = run.tables[split].subset(rows)

    if split == "val":  # start anew: the best model may be calibrated already
        start_calibration(run)
        if run.options.calibration == "fit":
            inference.fit_calibration(classifier, logits[None], table.targets)
    probabilities = inference.to_probabilities(classifier, logits[None])
    if split == "val":
        classifier.thresholds = choose_thresholds(run.options, table.targets, probabilities)

    # The loss is that of training, of the raw logits, so that the two curves can be compared.
    report = metrics.report(table.targets, probabilities, classifier.thresholds, table.classes, intervals)
    masked_loss, targets = LOSSES[run.options.loss], torch.from_numpy(table.targets)
    total, known = masked_loss(logits, targets, run.pos_weight.cpu())
    report["loss"] = (total / known).item()
    return table, probabilities, report


def predict_split(run, split):
    """Return the rows of a split's images that can be read, and their logits (n, C), on the CPU.

    Raises RuntimeError when a logit is not finite.
    """
    images = run.images[split]
    rank, ranks = rank_and_ranks()
    if ranks > 1:  # BatchNorm statistics differ between processes, and the leader's are saved
        for buffer in run.member.network.buffers():
            distributed.broadcast(buffer, 0)

    # Each process fills in its rows, and the sum of all is complete, as the other rows are 0.
    homes = home_ranks(run.tables[split], ranks)
    share = np.flatnonzero(divide_batch(homes, ranks) == rank)
    batch_size = 2 * run.options.batch_size  # without gradients there is room for more
    title = "  ".join([*place_of(run), f"predicting {split}"])
    with Progress(title, len(share)) as progress:

        def advance(count):
            progress.advance(count)
            return run.signal != 0

        # A signal ends this process's share early, but the process itself ends in stop_if_asked(),
        # where all agree to: otherwise the others would wait for it. A resumed run predicts the
        # whole split again.
        part = inference.compute_logits(run.classifier, images, run.classifier.precision, batch_size,
                                        run.options.workers, share, advance)[0]
    stop_if_asked(run)
    logits = part.new_zeros(len(images), part.shape[1])
    logits[share] = part
    logits = sum_over_ranks(logits).cpu()

    report_bad_images(run, split)
    good = np.array([row for row in range(len(images)) if row not in images.errors], int)
    if not logits[good].isfinite().all():
        raise RuntimeError(f"some outputs on {split} are not finite: try a lower --lr, or --precision fp32")
    return good, logits[good]


def report_bad_images(run, split):
    """Tell all processes which images cannot be read, and warn once about each.

    Raises InputError when they are more than half of the split.
    """
    errors = run.images[split].errors
    count = len(run.images[split])
    if distributed.is_initialized():  # each process has read only its share
        found = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, errors)
        for errors_of_one in found:
            errors.update(errors_of_one)

    if 2 * len(errors) > count:  # more likely the wrong folder than damaged images
        raise InputError(f"{len(errors)} of {count} images of the {split} split cannot be read, as "
                         f"{next(iter(errors.values()))}: python dataset.py DATA --check lists them all")
    for message in sorted(set(errors.values()) - run.reported):
        print_warning(f"skipped {message}")
        run.reported.add(message)


def start_calibration(run):
    """Undo the known effects of pos_weight, sampler and loss on the probabilities.

    With --calibration none, leave the probabilities as they are.
    """
    # A pos_weight of 4, for example, makes the predicted odds 4 times too high, so log 4 is
    # subtracted from the logits. What is left to fit is small, so that a small val split will do.
    scale, offsets = 1.0, np.zeros(len(run.classifier.classes))
    if run.options.calibration == "fit":
        if run.options.loss == "asymmetric":
            scale, offsets = ASYMMETRIC_SCALE, offsets + ASYMMETRIC_OFFSET
        offsets -= np.log(run.pos_weight.cpu().numpy().astype(float))
        if run.options.sampler == "balanced":
            offsets -= sampling_shift(run.tables["train"].targets)
    run.member.scale, run.member.offsets = scale, offsets.tolist()


def sampling_shift(targets):
    """Return by how much sampling_weights() raises the log odds of each class: (C,)."""
    weights = sampling_weights(targets)[:, None]
    present, absent = targets == 1, targets == 0
    # Compare the odds among the images drawn with the odds in the data. A class that is always or
    # never present has no odds, and no shift.
    both = present.any(axis=0) & absent.any(axis=0)
    drawn = (weights * present).sum(axis=0), (weights * absent).sum(axis=0)
    odds = np.divide(*drawn, out=np.ones_like(drawn[0]), where=both)
    plain = np.divide(present.sum(axis=0), absent.sum(axis=0), out=np.ones_like(odds), where=both)
    return np.log(odds / plain)


def choose_thresholds(options, targets, probabilities):
    """Return the threshold of each class by --thresholds, a list of C floats."""
    thresholds = metrics.find_thresholds(targets, probabilities, options.thresholds, options.max_threshold)
    # A chosen threshold is moved to the middle between two probabilities. On one of them, rounding
    # on another machine could flip a prediction.
    if options.thresholds == "global":  # one for all classes, so between the probabilities of all
        moved = metrics.between_scores(thresholds[:1], probabilities.reshape(-1, 1))
        return moved.tolist() * len(thresholds)
    if not isinstance(options.thresholds, float):
        thresholds = metrics.between_scores(thresholds, probabilities)
    return thresholds.tolist()


def threshold_method(text):
    """Return the value of --thresholds, a name or a float; a type= function for argparse."""
    if text in ("soft", "pr_curve", "grid", "global"):
        return text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: use soft, pr_curve, grid, global or a number from 0 to 1")


# --------------------------------------------------------------------------------------------------
# Early stopping: the best epoch follows from the history, so a resumed run may change its options

# The score that each --monitor looks at. "last" looks at none, but its epoch must be validated.
MONITORED = {"loss": "loss", "f1": "f1_weighted", "map": "map", "last": "map"}


def save_epoch(run):
    """Save a finished epoch: the state, the history, and the model if this is the best epoch."""
    if not is_leader():
        return
    save_state(run)  # first: a run that is killed before it writes the model still has it there
    row = run.state.history[-1]
    if find_best(run)[0] == row["epoch"]:
        run.classifier.epoch = row["epoch"]
        run.classifier.scores = {name: row[f"val_{name}"] for name in ("loss", *metrics.HEADLINES)}
        inference.save_model(run.classifier, run.out / "model.pth")
    write_history(run)


def find_best(run):
    """Return the best epoch by the run's options, and the number of validations since then."""
    return best_epoch(run.state.history, run.options.monitor, run.options.min_delta)


def best_epoch(history, monitor, min_delta=0.0):
    """Return the epoch that is best on val, and the number of validations since then.

    Args: history: a dict of scores per epoch; monitor, min_delta: as on the command line.
    Returns: two integers, both 0 before the first validation.
    """
    # With a min_delta of 0.01, scores of 0.50, 0.505 and 0.52 make epoch 3 the best: epoch 2
    # improves by too little, so that epoch 3 is still compared with epoch 1.
    sign = -1 if monitor == "loss" else 1  # a lower loss is better, a higher score
    best, epoch, waited = -math.inf, 0, 0

    for row in history:
        score = row.get(f"val_{MONITORED[monitor]}")
        if score is None:  # not validated
            continue
        score = sign * score if math.isfinite(score) else -math.inf  # NaN is worse than any score
        if epoch == 0 or score > best + min_delta or monitor == "last":
            best, epoch, waited = score, row["epoch"], 0
        else:
            waited += 1
    return epoch, waited


# --------------------------------------------------------------------------------------------------
# Interrupt and resume


def should_stop(run):
    """Return True once a signal asks to stop, in all processes after the same step."""
    if not distributed.is_initialized():
        return run.signal != 0

    # On a GPU the answer is that of the step before, because reading this step's would wait for it.
    reading = start_reading(run.asked)
    if run.asked.device.type == "cuda":
        reading, run.reading = run.reading, reading
    return reading is not None and finish_reading(run, reading) != 0


def stop_if_asked(run):
    """Save and stop if a signal has asked any process to."""
    agreed = run.signal
    if distributed.is_initialized():
        # If they got different signals, the highest number counts: SIGTERM, not SIGINT.
        highest = torch.tensor(run.signal, device=run.classifier.device)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        agreed = finish_reading(run, start_reading(highest))
    # A signal that came meanwhile, which the others may not know of, stays noted for the next time.
    if agreed:
        run.signal = agreed
        save_and_stop(run)


def start_reading(number):
    """Start to copy a number from a GPU, and return what finish_reading() takes."""
    if number.device.type != "cuda":
        return number, None
    copy = torch.empty_like(number, device="cpu", pin_memory=True)
    copy.copy_(number, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def finish_reading(run, reading):
    """Return the number that start_reading() started to copy.

    Raises DistError if the other processes no longer answer.
    """
    copy, event = reading
    deadline = math.inf
    while event and not event.query():
        # NCCL waits forever for a process that has ended. torchrun then sends SIGTERM to the others
        # and kills them 30 s later. Giving up after 20 s leaves time for an error message.
        if run.signal:
            deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            raise distributed.DistError("the other processes do not answer")
        time.sleep(0.001)
    return int(copy)


def save_and_stop(run):
    """Save the state, say how to continue, and raise the exception that the signal stands for."""
    if is_leader():
        save_state(run)
    wait_for_leader()
    print_warning(f"stopped after {run.state}: the same command with --resume continues from here")
    raise KeyboardInterrupt if run.signal == signal.SIGINT else SystemExit(128 + run.signal)  # as shells do


def save_state(run):
    """Write last.pth, with everything that --resume needs to continue as if never stopped."""
    classifier = run.classifier
    content = {
        "format": inference.FORMAT, "options": classifier.options, "classes": classifier.classes,
        **run.digests, "precision": precision_name(classifier.precision),
        "state": dict(vars(run.state)),
        "fresh": list(run.fresh), "trained_on": inference.pack_keys(classifier.trained_on),
        "network": run.member.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "random": torch.get_rng_state(),
    }
    if classifier.device.type == "cuda":
        content["random_cuda"] = torch.cuda.get_rng_state(classifier.device)
    inference.write_checkpoint(run.out / "last.pth", content)


def splits_digest(tables):
    """Return a fingerprint of which image is in which split, and of the labels."""
    # A resumed run on other splits would be tested on images that it was trained on.
    digest = hashlib.sha256()
    for table in tables.values():
        digest.update(repr(table.ids).encode("utf-8", "surrogateescape"))
        digest.update(table.targets.tobytes())
    return digest.hexdigest()


def images_digest(tables):
    """Return a fingerprint of which image is in which split, whatever its labels."""
    # Rows that answers added do not count: without these answers the splits are the same.
    names = [[name for name, added in zip(table.ids, table.is_added) if not added]
             for table in tables.values()]
    return hashlib.sha256(repr(names).encode("utf-8", "surrogateescape")).hexdigest()


def read_state(options, tables):
    """Return the content of last.pth, and warn about options that differ from those in it.

    Raises InputError when it is missing, or belongs to other data or another network.
    """
    path = Path(options.out) / "last.pth"
    if not path.exists():
        raise InputError(f"{path} is not there: without --resume a run starts from the beginning")
    content = inference.read_checkpoint(path)
    names = ("state", "optimizer", "scaler", "network", "random", "precision")
    inference.check_content(path, content, names, "last.pth")
    before = {"answers": []} | content["options"]  # older versions had no --answers
    same_classes = content["classes"] == tables["train"].classes
    if not same_classes or content["splits"] != splits_digest(tables):
        if same_classes and content.get("images") == images_digest(tables):
            raise other_labels(options, before, path)
        raise InputError(f"--resume: {path} is of other splits or labels: "
                         "give the same data and seed, or a new --out")
    if "fresh" not in content:
        raise InputError(f"--resume: {path} was written by an older version, which did not save the "
                         "layers without weights: resume it with that version, or start again "
                         "without --resume")

    epoch = content["state"]["epoch"]
    changed = {name: value for name, value in vars(options).items() if before.get(name) != value}
    for name in ("backbone", "head"):
        if name in changed:
            raise InputError(f"--resume: {path} has --{name} {before[name]}, not {changed[name]}")
    if content["state"]["history"] and epoch < options.epochs:
        check_comparable(options, before, path)

    shown = [f"{name} {before.get(name)} -> {value}" for name, value in changed.items()
             if name not in ("resume", "quiet", "weights")]
    if shown:
        print_warning(f"resumed with other options than before: {', '.join(shown)}")
    if "weights" in changed:
        print_warning(f"--weights {options.weights} is not loaded: --resume continues with the "
                      f"network of {path}")
    if epoch > options.epochs:
        print_warning(f"--epochs {options.epochs}: {epoch} epochs are trained already")
    return content


def other_labels(options, before, path):
    """Return the InputError of a run that is resumed with other labels of the same images.

    Args: before: the options of the run so far; path: its last.pth.
    """
    then, now = (" ".join(files) or "none" for files in (before["answers"], options.answers))
    what, again = "", "the same labels"
    if then != now:
        what, again = f" (--answers {then} then, {now} now)", "the same answers"
    return InputError(f"--resume: the labels differ from those that {path} was trained with{what}: "
                      f"give {again}, leave out --resume, or name another --out")


def check_comparable(options, before, path):
    """Raise an InputError when an option changes what --monitor measures."""
    # Else the best epoch is chosen among scores of two kinds: a larger pos_weight raises the loss.
    decisive = {"loss": ("loss", "pos_weight", "pos_weight_clip"),
                "f1": ("calibration", "thresholds", "max_threshold")}
    for name in decisive.get(options.monitor, ()):
        if before[name] != vars(options)[name]:
            raise InputError(f"--resume: with another --{name.replace('_', '-')} the {options.monitor} "
                             "of further epochs cannot be compared with that of the epochs in "
                             f"{path}: keep it, or start again without --resume")


def load_state(run, content):
    """Restore a run to the point where last.pth, with this content, was saved.

    Raises InputError when the network of the best epoch is lost.
    """
    run.state = State(**content["state"])
    path = run.out / "model.pth"
    if path.exists():  # the best epoch so far
        saved = inference.read_checkpoint(path)
        inference.check_content(path, saved, ("members", *inference.SAVED_FIELDS), "model.pth")
        run.classifier.epoch, run.classifier.scores = saved["epoch"], saved["scores"]
    check_best_is_kept(run, content["options"])

    try:
        inference.load_tensors(run.member.network, content["network"])
    except RuntimeError:
        # A ViT has weights for each place in an image, and dropout is a layer of the head.
        size, dropout = content["options"]["size"], content["options"]["dropout"]
        raise InputError(f"--resume: the network in {run.out / 'last.pth'} has --size {size} and "
                         f"--dropout {' '.join(map(str, dropout))}: give the same, or start again "
                         "without --resume") from None
    try:
        run.optimizer.load_state_dict(content["optimizer"])
    except ValueError:  # older versions did not exempt norms and biases from weight decay
        raise InputError(f"--resume: {run.out / 'last.pth'} was written by another version of "
                         "train.py, which trained in another way: start again without --resume") from None
    if run.scaler.is_enabled() and content["scaler"]:  # --precision may have changed
        run.scaler.load_state_dict(content["scaler"])
    torch.set_rng_state(content["random"])  # of dropout
    if "random_cuda" in content and run.classifier.device.type == "cuda":
        torch.cuda.set_rng_state(content["random_cuda"], run.classifier.device)
    print_once(run.options, f"resumed after {run.state}, from {run.out / 'last.pth'}")


def check_best_is_kept(run, before):
    """Raise an InputError when the network of a resumed run's best epoch is lost.

    Args: before: the options of the run so far.
    """
    # For example: --monitor loss kept epoch 3 in model.pth, last.pth holds epoch 5, and by the new
    # --monitor map epoch 4 was the best.
    options, state = run.options, run.state
    best, kept = find_best(run)[0], run.classifier.epoch

    if best == 0 and state.images and state.epoch >= options.epochs:
        raise InputError(f"--resume --epochs {options.epochs}: no epoch was validated yet, and the run "
                         f"has begun the next one: give --epochs {state.epoch + 1} or more")
    if best == kept or (best == state.epoch and not state.images):  # in model.pth, or in last.pth
        return
    if options.monitor == "last" and state.epoch < options.epochs:  # still to come
        return
    held = f"holds epoch {kept}" if kept else "is not there"
    raise InputError(f"--resume: by --monitor {options.monitor} --min-delta {options.min_delta:g} epoch "
                     f"{best} is the best, but its network is lost ({run.out / 'model.pth'} {held}): "
                     f"resume with --monitor {before['monitor']} --min-delta {before['min_delta']:g}, "
                     "or start again in another --out")


# --------------------------------------------------------------------------------------------------
# Folds: cross-validation


def cross_validate(options, tables, cache=None):
    """Train a network for each part of the data on all other parts, and return the report.

    Args: tables: as read_data() returns them; cache: a dataset.PixelCache for all folds.
    Raises InputError when a part is too small, or when --weights has seen the images.
    """
    # Each fold is an ordinary run in OUT/fold_k. Its network predicts the part that it was not
    # trained on, as its val split. By all these out-of-fold predictions OUT/model.pth, which holds
    # all the networks, is calibrated, gets its thresholds, and is reported.
    pool, out = tables["train"], Path(options.out)
    folders = [out / f"fold_{k + 1}" for k in range(options.folds)]
    parts = dataset.divide(pool, [1] * options.folds, options.split_method, options.seed)
    sizes = np.bincount(parts[parts >= 0])  # all folds train on rows that answers added, in part -1
    check_batches(options, len(pool) - sizes.max(), sizes.min())
    for k in range(options.folds):
        check_val(options, pool.targets[parts == k])

    # Read the weights only once: --weights may name a file that a fold is about to replace.
    weights = None
    begun = [(folder / "last.pth").exists() for folder in folders]
    if not options.resume or (begun[0] and not all(begun)):
        weights = read_weights(options)
    if known := sum(count_trained_on(weights, table) for table in (pool, tables["test"])):
        raise InputError(f"--weights {options.weights} was trained on {known} of the images that "
                         "--folds tests on: use weights that have not seen them, such as imagenet")

    classifiers, speeds = [], {}
    raw = np.full(pool.targets.shape, np.nan)  # out-of-fold probabilities, before their calibration
    with folder_locked(out):
        for k, folder in enumerate(folders):
            print_once(options, f"\nfold {k + 1} of {options.folds}")
            run = build_fold(options, pool, parts == k, folder, weights, cache)
            run.fold, run.speeds = (k + 1, options.folds), speeds
            if k == 0 and is_leader():  # only now, after build() has found no error
                if not options.resume:
                    remove_old_run(options)
                write_inputs(options, {"train": pool, "test": tables["test"]})
            train(run)
            # Forget what the fold fitted on its val split: that is the part which it is tested on.
            start_calibration(run)
            rows, logits = predict_split(run, "val")
            raw[np.flatnonzero(parts == k)[rows]] = inference.to_probabilities(run.classifier, logits[None])
            classifiers.append(run.classifier)

        # The model of all folds averages their probabilities.
        members = [member for one in classifiers for member in one.members]
        trained_on = sorted({key for one in classifiers for key in one.trained_on})
        classifier = replace(run.classifier, members=members, trained_on=trained_on, epoch=0, scores={})
        good = np.flatnonzero(~np.isnan(raw).any(axis=1))  # images that can be read
        table = pool.subset(good)
        report, probabilities, thresholds = report_folds(options, classifier, table, parts[good], raw[good])
        if len(tables["test"]):
            report["test"] = inference.evaluate(classifier, tables["test"], 2 * options.batch_size,
                                                options.workers)
            report["test"]["images"] = report["test"].pop("rows")

        if is_leader():
            write_report(options, classifier, report, table, probabilities, thresholds)
            header = ["ID", *table.classes]
            rows = ([name, *row.tolist()] for name, row in zip(table.ids, thresholds))
            dataset.write_csv(out / "fold_thresholds.csv", itertools.chain([header], rows))
            write_pr_curves(out, table, probabilities, classifier)
        print_once(options, format_folds(report))
        if is_leader():
            if options.calibration == "none":
                probabilities = cross_calibrate(table.targets, raw[good], parts[good])
            network_of = dict(zip(table.paths, (classifiers[k] for k in parts[good])))
            print_once(options, write_suspects(out, table, probabilities, network_of))
        wait_for_leader()
    return report


def build_fold(options, pool, own, out, weights, cache):
    """Return the Run of a fold, which writes to the folder `out`.

    Args: own: booleans (N,), the rows of the pool to validate on; weights, cache: as for build().
    """
    fold = argparse.Namespace(**vars(options))
    fold.out, fold.folds, fold.registry, fold.export_splits = str(out), 0, None, None
    if out.name != "fold_1" and not (out / "last.pth").exists():
        fold.resume = False  # the run was stopped in an earlier fold, so this one begins
    rows = {"train": np.flatnonzero(~own), "val": np.flatnonzero(own), "test": []}
    return build(fold, {name: pool.subset(rows[name]) for name in PARTS}, weights, cache)


def report_folds(options, classifier, table, parts, raw):
    """Report out-of-fold predictions, and calibrate the classifier by them.

    Args: parts (N,), the fold of each image; raw (N, C), probabilities before their calibration.
    Returns: the report, and the probabilities and thresholds (N, C) that it is about.
    """
    # The report is cross-fitted: what is applied to a part is chosen on the other parts. Chosen on
    # the images that it is tested on, it would flatter the model.
    probabilities, thresholds = np.empty_like(raw), np.empty_like(raw)
    scores = []
    for k in range(options.folds):
        own = parts == k
        scale, offsets, thresholds[own] = fit_to(options, table.targets[~own], raw[~own])
        probabilities[own] = metrics.calibrate(raw[own], scale, offsets)
        scores.append(metrics.report(table.targets[own], probabilities[own], thresholds[own], table.classes))

    report = {"split": "folds"} | metrics.report(table.targets, probabilities, thresholds,
                                                 table.classes, intervals=True)
    report["images"] = report.pop("rows")
    report |= {f"val_{name}": report[name] for name in metrics.HEADLINES}
    report["folds"] = {}
    for name in (*metrics.HEADLINES, *metrics.JUDGED):
        values = [of_fold[name] for of_fold in scores]
        report["folds"][name] = {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1))}

    # New images are in no part, so the classifier gets what all parts together choose.
    scale, offsets, classifier.thresholds = fit_to(options, table.targets, raw)
    inference.add_calibration(classifier, scale, offsets)
    return report, probabilities, thresholds


def cross_calibrate(targets, raw, parts):
    """Calibrate the out-of-fold probabilities (N, C) of each part by those of the other parts."""
    calibrated = np.empty_like(raw)
    for k in np.unique(parts):
        own = parts == k
        calibrated[own] = metrics.calibrate(raw[own], *metrics.fit_calibration(targets[~own], raw[~own]))
    return calibrated


def fit_to(options, targets, raw):
    """Return the scale, offsets (C,) and thresholds (C,) that probabilities (N, C) call for."""
    scale, offsets = 1.0, np.zeros(targets.shape[1])
    if options.calibration == "fit":
        scale, offsets = metrics.fit_calibration(targets, raw)
    probabilities = metrics.calibrate(raw, scale, offsets)
    return scale, offsets, choose_thresholds(options, targets, probabilities)


def format_folds(report):
    """Return the report of cross_validate() as text."""
    text = f"\nall folds, {report['images']} images\n{metrics.format_report(report)}\n"
    folds = report["folds"]
    for name in ("f1_macro", "map", "f1_macro_judged", "map_judged"):
        headline = name.removesuffix("_judged")
        # The two differ when a rare class has no positive in some fold.
        if name == headline or folds[name] != folds[headline]:
            text += "\n{}: {mean:.3f} +- {deviation:.3f} over the folds".format(name, **folds[name])
    if "test" in report:
        text += f"\n\ntest split, {report['test']['images']} images, all networks together\n"
        text += metrics.format_report(report["test"])
    return text + "\n"


def write_suspects(out, table, probabilities, network_of):
    """Write the known labels that are probably wrong, and a page on which to correct them.

    Args: probabilities: out-of-fold, (N, C); network_of: {path: the Classifier of its fold, which was
        not trained on it}.
    Returns: a text with the most suspicious ones.
    """
    suspects = find_suspects(table, probabilities)

    def heat(path, labels):
        return inference.named_heatmaps(network_of[path], path, labels)

    dataset.write_questions(out / "suspects.csv", suspects)
    inference.write_review(out / "review.html", suspects, heat, "Suspicious labels")

    lines = [f"{len(suspects)} known labels may be wrong: review them in {out / 'review.html'}"]
    for one in suspects[:5]:  # enough to see whether it is worth looking at more
        given = "present" if one.given else "absent"
        lines.append(f"  {one.name}: {one.label} is given as {given}, probability {one.probability:.3f}")
    return "\n".join(lines)


def find_suspects(table, probabilities, most=1000):
    """Return a Question for each known label whose opposite is likelier, the likeliest first.

    Args: probabilities: out-of-fold, (N, C); most: maximum number of Questions, as nobody checks
        more than that one by one.
    """
    quality = metrics.label_quality(table.targets, probabilities)
    # Nothing is to be said about a class whose known labels are all the same, about a label that a
    # person has confirmed already, and about an image that cannot be named in the file.
    targets = table.targets
    quality[:, ~((targets == 1).any(axis=0) & (targets == 0).any(axis=0))] = np.nan
    quality[[not dataset.can_be_answered(name) for name in table.ids]] = np.nan
    if table.answered is not None:
        quality[table.answered] = np.nan

    suspicious = np.argwhere(quality < 0.5)  # NaN, for unknown labels, is not
    order = np.argsort(quality[tuple(suspicious.T)], kind="stable")
    return [dataset.Question(table.ids[row], table.paths[row], table.classes[c],
                             float(table.targets[row, c]), float(probabilities[row, c]))
            for row, c in suspicious[order][:most]]


# --------------------------------------------------------------------------------------------------
# Output files: what a run may replace, and what it writes

RUN_FILES = (
    "model.pth", "last.pth", "classes.json", "label_groups.json", "thresholds.json", "predictions.csv",
    "probabilities.csv", "train_metadata.csv", "val_metadata.csv", "test_metadata.csv",
    "loss_curve.png", "pr_curves.png", "reliability.png", "predictions.png", "history.csv",
    "metrics.json", "config.json", "images.npz", "fold_thresholds.csv", "suspects.csv", "review.html")
HISTORY = ["epoch", "steps", "train_loss", "val_loss", *(f"val_{name}" for name in metrics.HEADLINES),
           "train_f1_macro", "train_f1_weighted", "train_map", "lr", "lr_backbone", "seconds",
           "images_per_second"]


def check_out(options, tables):
    """Raise an InputError when the run would replace a file that it reads, or that no run wrote."""
    out = Path(options.out)
    names = {*RUN_FILES, title_path(out, options.plot_title or "loss_curve").name}
    reads = files_read(options, tables, names)

    # The run writes to --out and its folds, where any file with one of the names is in the way. And
    # it removes what an older run wrote, there and in further folds, which may be one of its inputs.
    written = [out, *(out / f"fold_{k + 1}" for k in range(options.folds))]
    for folder in dict.fromkeys([*written, *fold_folders(out)]):
        ours = files_of_run(folder)
        there = [folder / name for name in sorted(names) if os.path.lexists(folder / name)]
        for path in [*ours, *(there if folder in written else [])]:
            if what := reads.get(file_number(path)):
                raise InputError(f"{what} lies in --out, and would be replaced: name another --out")
            if path.name == "suspects.csv":
                dataset.refuse_answered(path)
            elif path.name == "review.html":
                inference.refuse_other_page(path)
            if path not in ours:
                raise InputError(f"--out {out}: {path} would be replaced, and no run of train.py "
                                 "wrote it: name another --out")

    if options.export_splits and not options.resume:
        images = Path(options.export_splits) / "images"
        if images.is_dir() and any(images.iterdir()):
            raise InputError(f"--export-splits {options.export_splits}: {images} is not empty: "
                             "name a new folder")


def files_read(options, tables, names):
    """Return what the run reads, as a dict from file_number() to a description for messages."""
    # Of the images, of which there may be millions, only those that share a name with an output.
    images = [path for path in itertools.chain(*(table.paths for table in tables.values()))
              if os.path.basename(str(path)) in names]
    sources = dict.fromkeys(itertools.chain(*(table.sources for table in tables.values())))
    reads = {file_number(path): f"{path}, which the run reads," for path in (*images, *sources)}
    if options.weights and (options.folds or not options.resume):  # a resumed run does not read them
        reads[file_number(options.weights)] = f"--weights {options.weights}"
    reads.pop(None, None)
    return reads


def file_number(path):
    """Return what tells a file from all others, whatever path and links lead to it; None without one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def files_of_run(folder):
    """Return the files in a folder that an earlier run wrote there, config.json last."""
    # Its config.json marks them as a run's. As it is removed last, a removal that is interrupted
    # leaves files that are still recognised.
    try:
        config = metrics.read_json(folder / "config.json")
    except ValueError:
        return []
    if not {"data", "out", "backbone"} <= config.keys():  # another program's config.json
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


@contextlib.contextmanager
def folder_locked(out):
    """Create a run's folder, and keep other runs out of it within the block.

    Raises InputError when another run is in it, or when it cannot be written.
    """
    if not is_leader():  # the lock of the leader does for all
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: it cannot be written: {error.strerror}") from None

    with contextlib.ExitStack() as stack:
        try:
            import fcntl
            folder = os.open(out, os.O_RDONLY)  # the system unlocks it however the process ends
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {out}: another run writes there: wait, or name another folder") from None
        except (ImportError, OSError):  # Windows has no fcntl, some network drives have no locks
            pass
        yield


def prepare_folder(run):
    """Remove an older run from the folder unless this one resumes it, and write what is known."""
    options = run.options
    if not options.resume:
        remove_old_run(options)
        if options.export_splits:
            export_splits(run.tables, options.export_splits)
    try:
        write_inputs(options, run.tables)
    except OSError as error:
        raise InputError(f"--out {options.out}: {error}") from None
    if run.state.history:  # the run may have been killed between last.pth and the history
        write_history(run)


def remove_old_run(options):
    """Remove what an older run left in --out and in the folders of its folds."""
    out = Path(options.out)
    old = 0
    for folder in [*fold_folders(out), out]:
        for path in files_of_run(folder):
            if path.name == "suspects.csv":  # somebody may have answered it in the meantime
                dataset.refuse_answered(path)
            path.unlink()
            old += 1
        if folder != out:
            with contextlib.suppress(OSError):  # it holds other files too
                folder.rmdir()
    if old:
        print_once(options, f"the run that was in {out} is replaced")


def export_splits(tables, folder):
    """Copy the images to folder/images/train, val and test, which check_out() has found empty."""
    for split, table in tables.items():
        target = Path(folder) / "images" / split
        target.mkdir(parents=True, exist_ok=True)
        # Two images of different folders may have the same name.
        names = dataset.distinct_names(table.paths)
        for path, name in zip(dataset.watched(f"copying {split}", table.paths), names):
            shutil.copy2(path, target / name)


def write_inputs(options, tables):
    """Write what is known before training: options, classes, and the labels of each split."""
    out = Path(options.out)
    table = tables["train"]
    dataset.write_json(out / "config.json", vars(options))  # first: it marks the others as a run's
    dataset.write_json(out / "classes.json", table.classes)
    if table.groups:
        dataset.write_json(out / "label_groups.json", table.groups)
    write_identities(out / "images.npz", table.identities)

    for split, part in tables.items():
        if len(part) == 0:
            continue
        header = ["ID", *part.classes]
        rows = ([name, *labels] for name, labels in zip(part.ids, dataset.to_cells(part.targets)))
        dataset.write_csv(out / f"{split}_metadata.csv", itertools.chain([header], rows))


def open_board(options):
    """Return TensorBoard's writer for OUT/tensorboard, or None without --tensorboard.

    Raises InputError when the package is missing.
    """
    if not options.tensorboard or not is_leader():
        return None
    try:  # it is no requirement, and slow to import
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(Path(options.out) / "tensorboard")


def write_history(run):
    """Write history.csv and loss_curve.png, the latter also under the name of --plot-title."""
    options, history = run.options, run.state.history
    rows = [[row.get(name, "") for name in HISTORY] for row in history]
    dataset.write_csv(run.out / "history.csv", [HISTORY, *rows])

    marks = []
    best = find_best(run)[0]
    if best and options.monitor != "last":
        marks.append((best, f"best epoch: {best}"))
    if options.unfreeze and run.state.epoch >= options.unfreeze_epoch:
        marks.append((options.unfreeze_epoch, f"{options.unfreeze} unfrozen"))
    if options.schedule != "cosine":  # which changes the rate all the time
        for before, row in itertools.pairwise(history):
            if row["lr"] != before["lr"]:
                marks.append((row["epoch"], f"lr {row['lr']:g}"))

    curves = loss_curves(run.state.losses, history, marks, options.plot_title)
    for title in {"loss_curve", options.plot_title or "loss_curve"}:
        dataset.write_png(title_path(run.out, title), curves)


def loss_curves(losses, history, marks=(), title=""):
    """Draw the loss of each step above the loss of each epoch, and return a PIL image.

    Args: losses: a number per step; history: a dict per epoch; marks: pairs (epoch, text).
    """
    losses = np.array(losses, float)
    steps = np.arange(1, len(losses) + 1)
    series = [("each iteration", steps, losses, inference.COLOURS[0])]
    # A long curve is mostly noise. A running mean over a 40th of it shows the trend.
    window = len(losses) // 40
    if window > 1:
        # The sum of the losses 11 to 20 is that of the first 20 less that of the first 10.
        sums = np.cumsum(np.append(0, losses))
        means = (sums[window:] - sums[:-window]) / window
        series = [(f"mean of {window}", steps[window - 1 :], means, inference.COLOURS[0]),
                  ("each iteration", steps, losses, inference.COLOURS[2])]
    upper = inference.draw_chart(series, title or "Loss per iteration", "iteration_number", "training_loss")

    epochs = [row["epoch"] for row in history]
    series = [(name, epochs, [row.get(f"{name}_loss", math.nan) for row in history], colour)
              for name, colour in zip(("train", "val"), inference.COLOURS)]
    lower = inference.draw_chart(series, "Loss per epoch", "epoch", "loss", marks=marks)
    return inference.stack_charts([upper, lower], 1)


def title_path(out, title):
    """Return the path of the loss curves that --plot-title names."""
    return out / f"{title.replace('/', '_')}.png"


def plot_title(text):
    """Return a --plot-title that can be a file name; a type= function for argparse."""
    problem = None
    if text and not text.strip():
        problem = "it is blank"
    elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        problem = "it has control characters"
    elif len(text.encode()) > 200:  # file systems allow 255, and a temporary file has a longer name
        problem = "it is longer than 200 bytes"
    elif title_path(Path(), text).name in set(RUN_FILES) - {"loss_curve.png"}:
        problem = "a run writes another file of that name"
    if problem:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} also names a file, and {problem}: use another")
    return text


def finish(run):
    """Calibrate the kept model, choose its thresholds, report it, and write the report.

    The report is on test, or on val if there is no test split.
    """
    options = run.options
    wait_for_leader()  # to write model.pth
    best = inference.load_model(run.out / "model.pth", run.classifier.device)
    best.precision = run.classifier.precision  # not measured again
    run.classifier = best

    split = "test" if len(run.tables["test"]) else "val"
    table, probabilities, scores = evaluate_split(run, "val", intervals=split == "val")
    if is_leader():
        write_pr_curves(run.out, table, probabilities, best)
    if split == "test":
        table, probabilities, scores = evaluate_split(run, "test", intervals=True)

    report = {"split": split, "images": scores.pop("rows"), "loss": scores.pop("loss"), "epoch": best.epoch}
    report |= {f"val_{name}": value for name, value in best.scores.items()}  # for the registry
    report |= scores
    if is_leader():
        write_report(options, best, report, table, probabilities, np.array(best.thresholds))
    print_once(options, f"\n{split} split, {len(table)} images, epoch {best.epoch}\n"
               f"{metrics.format_report(report)}\n")
    return report


def write_pr_curves(out, table, probabilities, classifier):
    """Write pr_curves.png, with the thresholds that were chosen on these probabilities."""
    curves = inference.pr_curves(table.targets, probabilities, classifier.thresholds, table.classes)
    dataset.write_png(out / "pr_curves.png", curves)


def write_report(options, classifier, report, table, probabilities, thresholds):
    """Write the model, its report and its predictions, and add it to the registry.

    Args: thresholds: those of the report, (C,), or with folds (N, C).
    """
    out = Path(options.out)
    classifier.options = dict(vars(options))
    inference.save_model(classifier, out / "model.pth")
    styles = {"predictions.csv": "csv", "probabilities.csv": "probabilities"}
    if options.thresholds == "global":  # the coco recipe puts its results in the file name
        name = (f"predictions_{options.backbone}_f1-{report['val_f1_weighted']:.4f}"
                f"_epoch-{classifier.epoch}_b-{options.batch_size}_lr-{options.lr:g}"
                f"_t-{classifier.thresholds[0]:.4f}.json")
        styles[name] = "json"
    for name, style in styles.items():
        text = inference.format_predictions(style, table.ids, probabilities, thresholds, classifier)
        dataset.write_text(out / name, [text])

    dataset.write_png(out / "predictions.png", inference.mistakes_sheet(table, probabilities, thresholds))
    dataset.write_png(out / "reliability.png", inference.reliability_chart(table.targets, probabilities))
    dataset.write_json(out / "thresholds.json", dict(zip(classifier.classes, classifier.thresholds)))
    dataset.write_json(out / "metrics.json", report)
    if options.registry:
        register(options, report)


def register(options, report):
    """Copy the run to its folder of the registry, unless a run with a better F1 on val is there."""
    folder = Path(options.registry) / registry_name(vars(options))
    if (folder / "metrics.json").exists():
        best = None
        with contextlib.suppress(ValueError):  # a damaged file is replaced
            best = metrics.read_run(folder).get("val_f1_weighted")
        if not isinstance(best, (int, float)):
            print_warning(f"registry: {folder / 'metrics.json'} has no F1 on val: the run there is replaced")
        elif best >= report["val_f1_weighted"]:
            print_once(options, f"registry: {folder} keeps its F1 of {best:.4f} on val")
            return

    for name in ("model.pth", "config.json", "metrics.json"):
        with dataset.atomic_write(folder / name, "wb") as file:
            file.write((Path(options.out) / name).read_bytes())
    print_once(options, f"registry: {folder} now has an F1 of {report['val_f1_weighted']:.4f} on val")


# Options that do not change what is learned; and the random seed, of which the luckiest is kept.
NOT_IN_REGISTRY = ("out", "registry", "seed", "quiet", "device", "workers", "cache", "resume",
                   "tensorboard", "export_splits", "plot_title")


def registry_name(options):
    """Return the folder name of a configuration: its main options, and a fingerprint of all."""
    known = sorted((name, value) for name, value in options.items() if name not in NOT_IN_REGISTRY)
    tokens = [f"{options['backbone']}-{options['head']}", f"b-{options['batch_size']}",
              f"lr-{options['lr']:g}"]
    if options["lr_backbone"] != options["lr"]:
        tokens.append(f"lrb-{options['lr_backbone']:g}")
    tokens += [f"wd-{options['wd']:g}", f"e-{options['epochs']}",
               f"train-{options['train_layers'].replace(',', '+')}"]
    if options["unfreeze"]:
        layers = options["unfreeze"].replace(",", "+")
        tokens.append(f"unfreeze-{layers}-{options['unfreeze_epoch']}")
    return "_".join([*tokens, hashlib.sha256(repr(known).encode()).hexdigest()[:6]])


# --------------------------------------------------------------------------------------------------
# Console output


def print_once(options, text):
    """Print in the leader, unless --quiet."""
    if is_leader() and not options.quiet:
        print_text(text)


def print_warning(text):
    """Print a warning in the leader, even with --quiet."""
    if is_leader():
        print_text(f"warning: {text}", file=sys.stderr)


# Not listed among "not the defaults": options whose default depends on others, most of which the
# other lines show; and --quiet.
NOT_LISTED = ("epochs", "size", "milestones", "dropout", "lr_backbone", "train_layers",
              "unfreeze", "unfreeze_epoch", "monitor", "sam", "quiet")


def print_configuration(options):
    """Print what will be trained and how, and which options differ from the defaults."""
    layers = options.train_layers
    if options.unfreeze:
        layers += f", from epoch {options.unfreeze_epoch} also {options.unfreeze}"
    kept = f"the best epoch by {options.monitor} on val is kept, patience {options.patience}"
    if options.monitor == "last":
        kept = "the last epoch is kept"

    defaults = vars(option_parser().parse_args([]))
    changed = [f"{name}={value}" for name, value in vars(options).items()
               if value != defaults[name] and name not in NOT_LISTED]
    print_once(options, (
        f"model: {options.backbone}, {options.head} head, {options.size} px, trained: {layers}\n"
        f"recipe: {options.epochs} epochs, batch {options.batch_size}, lr {options.lr:g}"
        f" (backbone {options.lr_backbone:g}), weight decay {options.wd:g}, {options.schedule}, "
        f"augment {options.augment}, pos_weight {options.pos_weight}, sam {options.sam:g}\n"
        f"{kept}; thresholds: {options.thresholds}\n"
        f"not the defaults: {', '.join(changed) or 'nothing'}"))
    if options.unfreeze and options.unfreeze_epoch > options.epochs:
        print_warning(f"{options.unfreeze} is never trained: --unfreeze-epoch "
                      f"{options.unfreeze_epoch} is beyond --epochs {options.epochs}")


def print_next_steps(options, image):
    """Print what the run wrote, and a command that applies the model to an image."""
    model = [] if options.out == "outputs" else ["--model", str(Path(options.out) / "model.pth")]
    command = ["python", "inference.py", str(image), *model, "--save", "drawn", "--heatmap"]
    print_once(options, f"written to {options.out}/: model.pth, metrics.json, predictions.csv, "
               "and pictures, such as\nthe worst mistakes in predictions.png\n"
               f"next: {shlex.join(command)}")


def place_of(run):
    """Return the first parts of a progress line, such as ["fold 2/5", "epoch 3/20"]."""
    fold, folds = run.fold
    parts = [f"fold {fold}/{folds}"] if folds > 1 else []
    if run.state.images:  # else no epoch is in progress
        parts.append(f"epoch {run.state.epoch + 1}/{run.options.epochs}")
    return parts


class ProgressLine(Progress):
    """Print a line per epoch, and within it, on a terminal, one that updates in place."""

    delay = 0  # seconds: training always takes long enough for a line

    def __init__(self, run):
        self.run = run
        self.loss = None  # of the last step, still on the device
        self.trained = 0.0  # time of the last step
        self.units = work_units(run)
        for row in run.state.history:  # of a resumed run
            self.note_speed(row)
        super().__init__("training", len(run.tables["train"]) * run.options.epochs)

    def step(self, loss):
        """Show the progress after a step."""
        self.loss = loss
        if self.stream and self.run.state.images == len(self.run.tables["train"]):
            self.due = 0.0  # at once, so that the last step of an epoch is always shown
        self.advance()
        self.trained = time.perf_counter()

    def parts(self, _):
        """Return the parts of the line, as Progress.parts() does."""
        state = self.run.state
        count = len(self.run.tables["train"])
        rate = state.images / state.seconds
        left = f"{dataset.format_seconds(estimate_left(self.run, self.units))} left"
        if self.run.fold[1] > 1:
            left += " in all"
        # Reading the loss waits for the device, but only five times a second.
        return [*place_of(self.run), f"image {state.images:,}/{count:,}",
                f"loss {self.loss.item():.4f}", f"{rate:,.0f} images/s", left]

    def end_epoch(self):
        """Print the last row of the history."""
        options, state = self.run.options, self.run.state
        row = state.history[-1]
        self.note_speed(row)
        if predicted := images_to_score(options, self.run.tables, row["epoch"]):
            seconds = time.perf_counter() - self.trained  # to predict and to save
            self.run.speeds[PREDICT] = seconds / predicted

        line = "epoch {epoch:{width}}/{epochs}  loss {train_loss:.4f}"
        if "val_loss" in row:
            line += "  val loss {val_loss:.4f}  f1 macro {val_f1_macro:.3f}  map {val_map:.3f}"
        line += "  {images_per_second:.0f} images/s  {seconds:.1f} s"
        if find_best(self.run)[0] == row["epoch"] and options.monitor != "last":
            line += "  best"
        print_once(options, line.format(width=len(str(options.epochs)), epochs=options.epochs, **row))

    def note_speed(self, row):
        """Note how fast the steps of an epoch were, from its row of the history."""
        if row["images_per_second"]:
            kind = kind_of_step(self.run.options, row["epoch"])
            self.run.speeds[kind] = 1 / row["images_per_second"]


# The time left is estimated from the images that are still to be trained on or predicted. How long
# an image takes depends on the kind of work: a step that trains all layers takes longer than one
# that trains only the head, and a step with --sam computes the layers that it trains twice. A kind
# that was not measured yet is taken to be as fast as the epoch in progress, in proportion to what it
# computes.

PREDICT = "predict"  # a kind of work; the others are those of kind_of_step()


def estimate_left(run, units):
    """Return the seconds that a run will still take, with --folds those of all folds.

    Args: units: as work_units() returns them.
    """
    options, state = run.options, run.state
    fold, folds = run.fold
    left = images_left(options, run.tables, state.epoch, state.images)
    for _ in range(folds - fold):
        left.update(images_left(options, run.tables))  # which adds: folds are of similar size

    # Seconds per unit of work, as measured before this epoch and in it.
    paces = {kind: run.speeds[kind] / units[kind] for kind in units if kind in run.speeds}
    current = kind_of_step(options, state.epoch + 1)
    now = state.seconds / state.images / units[current]

    # An epoch may be faster than the one before, for example because its images are in memory now.
    # Its first steps say little about it, but a fifth of it says enough.
    before = paces.get(current, paces.get(kind_of_step(options, state.epoch), now))
    weight = min(1, 5 * state.images / len(run.tables["train"]))
    paces[current] = weight * now + (1 - weight) * before
    return sum(images * units[kind] * paces.get(kind, paces[current])
               for kind, images in left.items())


def images_left(options, tables, epoch=0, images=0):
    """Count the images that are left of a run: {kind of work: number of images}.

    Args: epoch: finished epochs; images: those used of the epoch in progress.
    """
    left = Counter()
    for one in range(epoch + 1, options.epochs + 1):
        left[kind_of_step(options, one)] += len(tables["train"])
        left[PREDICT] += images_to_score(options, tables, one)
    left[kind_of_step(options, epoch + 1)] -= images
    left[PREDICT] += len(tables["val"]) + len(tables["test"])  # for the report
    return left


def kind_of_step(options, epoch):
    """Return what decides how long a step takes in an epoch, counted from 1: its layers, and --sam."""
    return layers_to_train(options, epoch), takes_sam_steps(options, epoch)


def images_to_score(options, tables, epoch):
    """Return how many images are predicted after an epoch, counted from 1."""
    return sum(len(tables[split]) for split in splits_to_score(options, epoch))


def work_units(run):
    """Return about how long an image takes in each kind of work, compared with predicting one."""
    # The backward pass of a layer takes twice as long as its forward pass, but it ends at the first
    # layer that is trained. Parameters stand for layers, and those of most networks take similar
    # times: a ResNet18 of which layer3, layer4 and the head are trained takes 1 + 2 * 32 / 62.
    options, network = run.options, run.member.network
    names = [name for name, _ in network.named_parameters()]
    units = {PREDICT: 1.0}
    for layers, sam in {kind_of_step(options, epoch + 1) for epoch in range(options.epochs)}:
        trained = select_parameters(network, layers, run.fresh)
        first = next(place for place, name in enumerate(names) if name in trained)
        trains = 1 - first / len(names)
        units[layers, sam] = 1 + 2 * trains + sam * 3 * trains  # SAM computes these layers once more
    return units


if __name__ == "__main__":
    dataset.run_command(main)
