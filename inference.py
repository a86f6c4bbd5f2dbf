"""Predict the labels of images with a model that train.py has written.

    python inference.py img.jpg                          # a table of labels and probabilities
    python inference.py photos/ --format csv --out predictions.csv
    python inference.py photos/ --save drawn/ --heatmap  # pictures of the labels and heatmaps
    python inference.py photos/ --model a.pth b.pth --tta  # average two models and mirrored images
    python inference.py --evaluate data/                 # report the model on labelled data
    python inference.py --calibrate data/ --model a.pth b.pth --out ab.pth  # merge two models
    python inference.py --ask data/ --out questions.csv  # which labels to ask a person for
    python inference.py --export model.onnx              # for other runtimes (or model.pt2)

    classifier = inference.load_model("outputs/model.pth")
    probabilities = inference.predict(classifier, ["img.jpg"])  # (N, C)

After Ctrl-C, what was predicted so far is written to FILE.partial, or without --out printed.

To deploy a model, copy dataset.py, inference.py and model.pth. --evaluate, --calibrate and --ask also
need metrics.py.
"""

import base64
import contextlib
import copy
import csv
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

import dataset
from dataset import IMAGE_SUFFIXES, ImageDataset, ImageError, InputError, LabelTable, number, print_text

# --------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """Run the command line.

    Returns: the probabilities (N, C), the report, the questions, the names of --backbones, or what
    export_model() returns.
    """
    options = parse_options(argv)
    dataset.Progress.shown = True
    if options.backbones:
        print_text(format_backbones())
        return backbone_names()
    if options.evaluate or options.calibrate:
        return evaluate_or_calibrate(options)
    if options.ask:
        return ask(options)
    if options.export:
        return export(options)
    return predict_files(options)


def parse_options(argv=None):
    """Parse the command line. Raise InputError if an option is wrong or contradicts another one."""
    parser = dataset.ArgumentParser(
        prog="inference.py",
        usage="%(prog)s IMAGE|DIR ... | --evaluate DATA | --calibrate DATA --out FILE | "
              "--ask DATA --out FILE.csv | --export FILE.pt2|FILE.onnx [options]",
        description="Predict the labels of images, evaluate or calibrate a model on labelled data, "
                    "ask for the labels that it would learn most from, or export it to other programs.")
    add = parser.add_argument
    add("paths", nargs="*", metavar="IMAGE|DIR", help="images, or folders to search for images")
    add("--image", action="append", default=[], metavar="IMAGE", help="same as the positional argument")

    add = parser.add_argument_group("model").add_argument
    add("--model", action="append", default=[], metavar="FILE",
        help="model written by train.py (default: outputs/model.pth); the probabilities of several "
             "models are averaged; every argument that ends in .pth is taken as a model")
    add("--tta", action="store_true",
        help="test-time augmentation: average the probabilities of each image and its mirror image")
    add("--threshold", type=number(float, below=1.001), metavar="T",  # 1.001: T may be 1
        help="probability from which on a label is present (default: the model's thresholds)")

    add = parser.add_argument_group("output").add_argument
    add("--format", choices=("table", "csv", "json", "probabilities"), default="table",
        help="csv: labels and confidences; json: indices of the labels, by the stem of the image "
             "unless two share it; probabilities: CSV with a column per class")
    add("--out", metavar="FILE", help="write the output (with --calibrate, the model) to FILE, which "
        "must not be one that is read; after Ctrl-C, what was predicted so far is written to "
        "FILE.partial, or without --out printed")
    add("--save", metavar="DIR", help="save a picture of each image and its labels in DIR, where "
        "only such pictures are replaced")
    add("--heatmap", action="store_true",
        help="with --save: also show where the model sees each label (Grad-CAM)")
    add("--export", metavar="FILE", help="write one file that needs none of this code: FILE.pt2 for "
        "torch.export.load(), or FILE.onnx (pip install onnx onnxscript); it maps images, uint8 "
        "(N, 3, S, S), to probabilities, float32 (N, C); classes, thresholds and the size S are in "
        "its metadata, as JSON")

    group = parser.add_argument_group("labelled data")
    add = group.add_argument
    add("--evaluate", metavar="DATA",
        help="report the model on a labelled folder: on the test part of the data's own split, "
             "else on the val part, or on all images if there is no split")
    add("--calibrate", metavar="DATA",
        help="refit calibration and thresholds on a labelled folder that the model was not trained "
             "on (the val part of the data's own split, else test), and write one model to --out")
    add("--ask", metavar="DATA",
        help="choose the unknown labels of a folder that the model is least sure of; write them to "
             "--out FILE.csv, and a page for answering them to FILE.html; val and test are left out; "
             "without a label file, all labels are unknown")
    add("--count", type=number(int, 1), metavar="N",
        help="with --ask: maximum number of labels to ask for (default: 200)")
    dataset.add_data_options(group)

    add = parser.add_argument_group("system").add_argument
    add("--backbones", action="store_true",
        help="list the networks that train.py --backbone takes, and do nothing else")
    add("-b", "--batch-size", type=number(int, 1), default=32, metavar="N", help="images per batch")
    add("-j", "--workers", type=number(int), default=default_workers(), metavar="N",
        help="threads that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="number format of the backbone; auto: on a CPU bf16 for more than a few images, if it "
             "is at least 1.3 times as fast")
    options = parser.parse_intermixed_args(argv)  # intermixed: options may follow images

    # In `--model a.pth b.pth img.jpg`, argparse takes b.pth as an image: the suffix decides instead.
    models = [path for path in options.paths if path.lower().endswith(".pth")]
    options.model = [*options.model, *models] or ["outputs/model.pth"]
    options.paths = [path for path in options.paths if path not in models] + options.image
    _check_combinations(options)
    return options


def _check_combinations(options):
    """Raise an InputError if options contradict each other, or if one would have no effect."""
    commands = [name for name in ("evaluate", "calibrate", "ask", "export") if getattr(options, name)]
    if len(commands) > 1:
        raise InputError(f"--{commands[0]} and --{commands[1]} are two commands: use one of them")

    if options.export:
        _check_export(options)
    if options.heatmap and not options.save:
        raise InputError("--heatmap draws into the folder of --save DIR: add that option")
    command = commands[0] if commands and not options.export else None  # one that is about DATA
    if command and (options.paths or options.save or options.format in ("csv", "probabilities")):
        raise InputError(f"--{command} is about its DATA: it takes no images and no --save, and "
                         "--format table or json")
    if options.ask and (options.threshold is not None or options.format != "table"):
        raise InputError("--ask writes probabilities to a CSV file: leave out --threshold and --format")
    if options.count and not options.ask:
        raise InputError("--count goes with --ask DATA")
    if options.calibrate and not options.out:
        raise InputError("--calibrate writes a model: say where with --out FILE")
    if options.calibrate and options.threshold is not None:
        raise InputError("--calibrate chooses the thresholds: leave out --threshold")
    if options.ask and Path(options.out or "").suffix.lower() != ".csv":
        raise InputError("--ask writes its questions to a CSV file, and a page beside it: say where "
                         "with --out questions.csv")

    # `--out photo.jpg` was probably meant as --save, and would turn a photograph into a text file.
    if options.out and Path(options.out).suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"--out {options.out} is the name of an image, but the output is text: "
                         "name another file")

    for name, value in dataset.data_options(options).items():
        if value and not command:
            raise InputError(f"--{name.replace('_', '-')} goes with --evaluate, --calibrate or --ask DATA")


def _check_export(options):
    """Raise an InputError if --export names no known format, or if an option does not go with it."""
    _is_onnx(options.export)
    others = {"images": options.paths, "--out": options.out, "--save": options.save,
              "--heatmap": options.heatmap, "--format": options.format != "table",
              "--device": options.device not in ("auto", "cpu"),
              "--precision": options.precision not in ("auto", "fp32")}
    for name, given in others.items():
        if given:
            raise InputError(f"--export writes a model, in fp32 and for any device: leave out {name}")


def predict_files(options):
    """Predict the images of the command line, print or write the labels, and draw pictures.

    Returns the probabilities (N, C). Raises ImageError if an image could not be read. After Ctrl-C
    or SIGTERM, raises KeyboardInterrupt or SystemExit once everything so far is written.
    """
    # A wrong path should fail at once, not after the seconds that it takes to load a model.
    ids, paths = find_images(options.paths)
    _check_outputs(options, paths)
    classifier = _load_chosen_models(options)
    _note(f"{', '.join(options.model)}: {classifier}; {len(paths)} images")

    signals = []  # numbers of the signals that asked to stop
    with dataset.signals_noted(signals.append, "stopping after the images in progress"):
        with dataset.Progress("predicting", len(paths)) as progress:
            probabilities, errors = predict_all(classifier, paths, options.batch_size,
                                                options.workers, _until(signals, progress))

        # An interrupted run must not look complete, so it writes to FILE.partial.
        count = len(probabilities)
        out = options.out if count == len(paths) else _partial_path(options.out)
        good = [row for row in range(count) if row not in errors]
        if good:
            names = [ids[row] for row in good]
            text = format_predictions(options.format, names, probabilities[good],
                                      classifier.thresholds, classifier)
            _print_or_write(text, out)

        # The pictures come last, since they take much longer.
        drawn = []
        if good and options.save and not signals:
            with dataset.Progress("drawing pictures", len(good)) as progress:
                drawn = save_pictures(classifier, [paths[row] for row in good], probabilities[good],
                                      options.save, options.heatmap, _until(signals, progress))
        if drawn:
            more = f" and {len(drawn) - 1} more" if len(drawn) > 1 else ""
            print_text(f"drawn: {drawn[0]}{more}", file=sys.stderr if options.out else None)

    # Bad images do not keep the good ones from being predicted, but scripts see the exit code.
    for message in errors.values():
        _note(f"skipped: {message}")
    if signals:
        place = f": {out}" if out and good else ""
        pictures = f"; {len(drawn):,} pictures are drawn" if options.save else ""
        _note(f"stopped after {count:,} of {len(paths):,} images{place}{pictures}")
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    if errors:
        raise ImageError(f"{len(errors)} of {len(paths)} images could not be read")
    return probabilities


def _check_outputs(options, paths):
    """Raise an InputError if the output would replace, or lie among, files that are read."""
    if options.out:
        read = [*options.model, *paths]
        dataset.refuse_to_replace("--out", options.out, read)
        dataset.refuse_to_replace("an interrupted --out", _partial_path(options.out), read)
    if not options.save:
        return
    if os.path.exists(options.save) and not os.path.isdir(options.save):
        raise InputError(f"--save {options.save} is a file: name a folder")

    # After `photos/ --save photos/drawn`, the next run would read these pictures as new images.
    folder = Path(options.save).resolve()
    roots = {Path(argument).resolve() for argument in options.paths if os.path.isdir(argument)}
    if roots & {folder, *folder.parents}:
        raise InputError(f"--save {options.save} is inside a folder that images are read from: "
                         "name one outside it")

    # The pictures of an earlier run may be replaced; any other file may be somebody's only copy.
    for picture in picture_paths(paths, options.save):
        if os.path.lexists(picture) and not _is_drawn(picture):
            raise InputError(f"--save {options.save} would replace {picture}, which was not drawn "
                             "by --save: name another folder")


def _load_chosen_models(options):
    """Load the models of --model as one Classifier, and apply --tta and --threshold."""
    classifier = load_model(options.model, options.device, options.precision)
    classifier.mirrored |= options.tta  # a calibrated model may be mirrored already
    if options.threshold is not None:
        classifier.thresholds = [options.threshold] * len(classifier.classes)
    return classifier


def _until(signals, progress):
    """Return a function `advance` that shows progress, and asks to stop once there is a signal."""

    def advance(count=1):
        progress.advance(count)
        return bool(signals)

    return advance


def _partial_path(out):
    """Return where an interrupted run writes: to FILE.partial, unless --out is a stream."""
    return f"{out}.partial" if out and not dataset.is_stream(out) else out


def _note(text):
    """Print a line on stderr, which keeps stdout for the predictions."""
    print_text(text, file=sys.stderr)


def _print_or_write(text, path):
    """Write a text to a file, or print it if there is no path."""
    if path:
        dataset.write_text(path, [text])
    else:
        print_text(text)


# --------------------------------------------------------------------------------------------------
# Finding images


def find_images(arguments):
    """List the images that files and folders stand for.

    A folder stands for all images below it, in sorted order. The ID of such an image is its path
    inside the folder; the ID of a file is its name. Images with the same ID get their full paths.

    Returns: the IDs and the paths, as two lists.
    Raises InputError if a path does not exist, or if there are no images.
    """
    ids, paths = [], []
    for argument in map(Path, arguments):
        if argument.is_dir():
            found = _images_below(argument)
            ids += found
            paths += [argument / name for name in found]
        elif os.path.lexists(argument):  # even a broken link, which counts as a bad image
            ids.append(argument.name)
            paths.append(argument)
        else:
            raise InputError(f"{argument} does not exist: name an image or a folder of images")
    if not paths:
        raise InputError("no images given: python inference.py IMAGE_OR_FOLDER ...")

    counts = Counter(ids)
    return [str(path) if counts[name] > 1 else name for name, path in zip(ids, paths)], paths


def _images_below(folder):
    """List the images below a folder, and say on stderr how many other files there are."""
    images, others = [], []
    for name in sorted(dataset.ImageFolder(folder, folder).names):
        (images if Path(name).suffix.lower() in IMAGE_SUFFIXES else others).append(name)
    skipped = _count_suffixes(others)
    if not images and not skipped:
        raise InputError(f"{folder} holds no files: name a folder of images")
    if not images:
        raise InputError(f"{folder} holds no images that can be read, only {skipped}: convert "
                         "images of other formats to JPEG or PNG")

    # Half of a phone's photos may be HEIC: nobody should mistake the other half for all of them.
    if skipped:
        _note(f"{folder}: skipped {skipped}, which are not read as images")
    return images


def _count_suffixes(names):
    """Describe visible files by their suffixes, the most frequent first: "12 .heic, 1 .csv"."""
    paths = [Path(name) for name in names]
    suffixes = [path.suffix.lower() or "without a suffix" for path in paths if path.name[0] != "."]
    return ", ".join(f"{count} {suffix}" for suffix, count in Counter(suffixes).most_common())


# --------------------------------------------------------------------------------------------------
# Prediction


@dataclass
class Member:
    """One network of a Classifier. Its probabilities are sigmoid(scale * logits + offsets)."""

    network: nn.Module
    backbone: str  # one of backbone_names()
    head: str  # a name in HEADS
    dropout: list  # of the head, one or two rates
    size: int  # images are resized to (size, size)
    offsets: list  # C numbers
    scale: float = 1.0

    def normalize(self, images):
        """Normalize images (B, 3, H, W) in 0..255 as the weights of the backbone expect."""
        _, mean, std = pretrained_input(self.backbone)
        return dataset.normalize(images, mean, std)


@dataclass
class Classifier:
    """One or more networks and everything needed to use them: the content of a model.pth."""

    members: list  # of Member; their probabilities are averaged
    classes: list  # C names
    groups: dict  # group name -> its class names; may be empty
    thresholds: list  # C numbers: a label is present if its probability is >= its threshold
    mirrored: bool = False  # whether to average over the mirrored image, too
    epoch: int = 0  # after which the model was saved
    scores: dict = field(default_factory=dict)  # on val, after that epoch
    trained_on: list = field(default_factory=list)  # dataset.image_keys() of the training images
    options: dict = field(default_factory=dict)  # of the training run
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.float32  # None: predict() chooses, by the number of images

    @property
    def network(self):
        """Return the network of a classifier that has only one."""
        return self.members[0].network

    @property
    def size(self):
        """Return the largest image size of the members, at which images are decoded."""
        return max(member.size for member in self.members)

    def __str__(self):
        """Describe the classifier: "2 x resnet18, 224 px; 6 classes, on cpu"."""
        counts = Counter(f"{member.backbone}, {member.size} px" for member in self.members)
        parts = [name if count == 1 else f"{count} x {name}" for name, count in counts.items()]
        parts += ["averaged with mirrored images"] * self.mirrored
        return "; ".join([*parts, f"{len(self.classes)} classes, on {self.device}"])


def predict(classifier, images, batch_size=32, workers=None):
    """Predict the probabilities of the labels of images.

    Args: images: an image or a list of images, each a path, a PIL image, the bytes of a file, an
    open file, or a uint8 array (H, W, 3); workers: number of threads that decode images. Files are
    decoded at reduced size, so that an image decoded beforehand gives nearly the same numbers.
    Returns: float32 (N, C), with columns in the order of classifier.classes.
    Several threads may share a classifier.
    Raises ImageError for the first image that cannot be read.
    """
    single = isinstance(images, (str, os.PathLike, bytes, Image.Image)) or hasattr(images, "read")
    if single or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]

    probabilities, errors = predict_all(classifier, list(images), batch_size, workers)
    if errors:
        raise ImageError(errors[min(errors)])  # threads find bad images in any order
    return probabilities


def predict_all(classifier, images, batch_size=32, workers=None, advance=None):
    """Predict as predict() does, but carry on after images that cannot be read.

    Args: advance: as for compute_logits().
    Returns: the probabilities (N, C), NaN for bad images, and {row: error message} for these. If
    `advance` stops the work, N is the number of images until then.
    """
    logits, errors = _logits_and_errors(classifier, images, batch_size, workers, advance)
    probabilities = to_probabilities(classifier, logits)
    probabilities[list(errors)] = np.nan  # the network was given a grey image instead
    return probabilities, errors


def _logits_and_errors(classifier, images, batch_size, workers, advance):
    """Return the logits (V, N, C) of a list of images, and {row: message} for bad images.

    Args: advance: as for compute_logits().
    """
    # ImageDataset expects a table with labels: here, all of them are unknown.
    unknown = np.full((len(images), len(classifier.classes)), np.nan, np.float32)
    if not len(images):
        return torch.zeros(len(classifier.members), *unknown.shape), {}

    names = [dataset.image_name(image) for image in images]
    table = LabelTable(names, images, unknown, classifier.classes)
    data = ImageDataset(table, classifier.size)
    workers = default_workers() if workers is None else workers
    precision = classifier.precision or choose_precision("auto", classifier.device, len(images))[0]
    logits = compute_logits(classifier, data, precision, batch_size, workers, advance=advance)
    errors = sorted(data.errors.items())  # threads find bad images in any order
    # If `advance` stopped the work, threads may have decoded images beyond that point.
    return logits, {row: message for row, message in errors if row < logits.shape[1]}


@torch.inference_mode()
def compute_logits(classifier, images, precision, batch_size=32, workers=2, rows=None, advance=None):
    """Compute the logits of every view of the images.

    Args: images: an ImageDataset of the classifier's size; precision: the dtype that the backbones
    compute in; rows: which of the images to use (default: all); advance: a function that is called
    with the number of images after each batch, for example to show progress; if it returns True,
    the images that follow are left out.
    Returns: float32 (V, N, C) on the classifier's device, for V views of N images.
    """
    device = classifier.device
    rows = np.arange(len(images)) if rows is None else rows
    networks = [member.network.eval() for member in classifier.members]
    if precision == torch.float32 and len(rows) > FEW:
        networks = [fold_batchnorm(network) for network in networks]

    # Batches have equal sizes: 33 images make 17 and 16, since a last batch of 1 is inefficient.
    order = np.array_split(rows, max(1, -(-len(rows) // batch_size)))  # -(-a // b) rounds up

    logits = []
    for batch, _, _ in dataset.batches(images, order, workers, pin=device.type == "cuda"):
        batch = dataset.send(batch, device)
        logits.append(forward_views(classifier, networks, batch, precision))
        if advance and advance(len(batch)):
            break
    return torch.cat(logits, dim=1)


def forward_views(classifier, networks, images, precision):
    """Compute the logits, float32 (V, B, C), of every view of a batch of images.

    Args: networks: those of the members, ready for prediction; images: (B, 3, H, W) in 0..255.
    """
    # The views are what average_views() averages. For the members A and B they are A and B, or,
    # if the classifier is mirrored: A, A mirrored, B, B mirrored. All share one decoded image.
    views = []
    for member, network in zip(classifier.members, networks):
        view = _resize(member.normalize(images), member.size)
        views.append(forward(network, view, precision))
        if classifier.mirrored:
            views.append(forward(network, view.flip(3), precision))
    return torch.stack(views)


def to_probabilities(classifier, logits):
    """Return the mean probabilities, float32 (N, C), of the logits of compute_logits()."""
    return average_views(classifier, logits.cpu().double()).float().numpy()  # MPS has no double


def average_views(classifier, logits):
    """Return the mean probabilities (N, C) of logits (V, N, C), computed in the logits' dtype."""
    # Probabilities are averaged instead of logits, so that each member has one vote: one that is
    # overconfident, with logits like 20, would outvote all others.
    members = classifier.members
    views = logits.unflatten(0, (len(members), -1))  # (members, 1 or 2, N, C)
    scales = torch.tensor([member.scale for member in members]).to(logits.dtype).view(-1, 1, 1, 1)
    offsets = torch.tensor([member.offsets for member in members]).to(logits.dtype)[:, None, None, :]
    return torch.sigmoid(scales * views + offsets).mean(dim=(0, 1))


# --------------------------------------------------------------------------------------------------
# Evaluation and calibration


def evaluate_or_calibrate(options):
    """Run --evaluate or --calibrate, and return the report, with the "split" that it is about."""
    option = "--evaluate" if options.evaluate else "--calibrate"
    data = options.evaluate or options.calibrate
    classifier = _load_chosen_models(options)
    metrics = import_metrics(option)
    table = dataset.read_labels(data, **dataset.data_options(options))
    if options.out:
        dataset.refuse_to_replace("--out", options.out, _files_read(options, table))
    _note(f"{', '.join(options.model)}: {classifier}")

    # A model does better on its training images than on new ones, so these are left out if possible.
    # Calibration prefers val, so that test stays untouched for a later --evaluate.
    split, chosen = _held_out(table, ("test", "val") if options.evaluate else ("val", "test"))
    if split == "all":
        _note(f"{option}: all {len(table)} images, including any that the model was trained on, "
              "since the data has no test or val part with labels of its own")
    else:
        _note(f"{option}: the {split} part of the data's own split, "
              f"{len(chosen)} of {len(table)} images")

    recalibrate = bool(options.calibrate)
    report = evaluate(classifier, chosen, options.batch_size, options.workers, recalibrate)
    report = {"split": split} | report
    if recalibrate:
        save_model(classifier, options.out)
        _note(f"written: {options.out}; its report on the images that it was calibrated on:")

    if options.format == "json":
        text = dataset.to_json(report)
    else:
        print_text(dataset.summary(table, data) + "\n")
        heading = "all data" if split == "all" else f"{split} split"
        text = f"{heading}, {report['rows']} images\n{metrics.format_report(report)}"
    _print_or_write(text, options.out if options.evaluate else None)  # else --out is the model
    return report


def _held_out(table, parts):
    """Return the first of `parts` with known labels and its rows, or "all" and the whole table."""
    for part in parts:
        rows = np.array([row for row, own in enumerate(table.parts) if own == part], int)
        if not np.isnan(table.targets[rows]).all():  # also false if there are no rows
            return part, table.subset(rows)
    return "all", table


def _files_read(options, table):
    """List the files that --evaluate, --calibrate and --ask read, which --out must not replace."""
    models = [] if options.calibrate else options.model  # a model may be recalibrated in place
    return [*table.sources, *table.paths, *models]


def evaluate(classifier, table, batch_size=32, workers=None, recalibrate=False):
    """Report a classifier on a LabelTable.

    Args: recalibrate: whether to refit its calibration and soft thresholds on this table first.
    Returns: the dict of metrics.report(), with confidence intervals.
    Raises InputError if the table lacks a class, or if no image can be read.
    """
    metrics = import_metrics("--evaluate")
    targets = targets_for(classifier, table)
    with dataset.Progress("predicting", len(table)) as progress:
        logits, errors = _logits_and_errors(classifier, table.paths, batch_size, workers,
                                            progress.advance)
    for message in errors.values():
        _note(f"skipped: {message}")
    if len(errors) == len(table):
        raise InputError(f"none of the {len(table)} images can be read; the first: {errors[0]}")

    good = [row for row in range(len(table)) if row not in errors]
    logits, targets = logits[:, good], targets[good]
    if recalibrate:
        fit_calibration(classifier, logits, targets)
        probabilities = to_probabilities(classifier, logits)
        classifier.thresholds = metrics.find_thresholds(targets, probabilities, "soft").tolist()

    probabilities = to_probabilities(classifier, logits)
    return metrics.report(targets, probabilities, classifier.thresholds, classifier.classes, intervals=True)


# --------------------------------------------------------------------------------------------------
# Questions: which unknown labels to ask a person about


def ask(options):
    """Run --ask: write questions, and a page on which to answer them. Returns the Questions."""
    classifier = _load_chosen_models(options)
    metrics = import_metrics("--ask")
    table = dataset.read_labels(options.ask, classes=classifier.classes, **dataset.data_options(options))
    page = Path(options.out).with_suffix(".html")
    dataset.refuse_to_replace("--out", options.out, _files_read(options, table))
    dataset.refuse_answered(options.out)
    refuse_other_page(page)
    _note(f"{', '.join(options.model)}: {classifier}")

    images, columns = _find_unknown_labels(classifier, table, options)
    with dataset.Progress("predicting", len(images)) as progress:
        probabilities, errors = predict_all(classifier, images.paths, options.batch_size,
                                            options.workers, progress.advance)
    for message in errors.values():
        _note(f"skipped: {message}")
    good = [row for row in range(len(images)) if row not in errors]
    if not good:
        reason = (f"none of {len(images)} images can be read" if errors else
                  "outside val and test, every label is known" if len(table) else "it holds no images")
        raise InputError(f"{options.ask}: nothing to ask: {reason}")
    images, probabilities = images.subset(good), probabilities[good][:, columns]

    # Two labels of an image, or as many as it takes to use up --count; and twice the equal share of
    # each class, since some classes are harder than others, but none should get all the questions.
    classes = np.count_nonzero(np.isnan(images.targets).any(axis=0))
    count = options.count or 200
    per_image, per_class = max(2, math.ceil(count / len(images))), math.ceil(2 * count / classes)
    chosen = metrics.choose_questions(images.targets, probabilities, count, per_image, per_class)
    questions = [dataset.Question(images.ids[row], images.paths[row], images.classes[c], math.nan,
                                  float(probabilities[row, c])) for row, c in chosen]

    dataset.write_questions(options.out, questions)
    write_review(page, questions, functools.partial(named_heatmaps, classifier),
                 f"Questions about {options.ask}")
    print_text(f"{options.out}: {len(questions)} questions about {len({one.path for one in questions})} "
               f"images; answer them in {page}")
    left = np.count_nonzero(np.isnan(images.targets)) - len(questions)
    if left and len(questions) < count:
        _note(f"{left} more labels are unknown, but at most {per_image} of an image and {per_class} of a "
              "class are asked for at once")
    return questions


def _find_unknown_labels(classifier, table, options):
    """Return the images with labels to ask for, and the columns of their classes in the model.

    The images are a LabelTable of the classes that both the model and the data know, in which these
    labels are NaN.
    """
    common = [name for name in classifier.classes if name in table.classes]
    for names, side in ((classifier.classes, "model"), (table.classes, "data")):
        if others := [name for name in names if name not in common]:
            _note(f"skipped: {dataset.shortened(others)}, which only the {side} has")
    if not common:
        raise InputError(f"{options.ask} has no class of the model, which are "
                         f"{dataset.shortened(classifier.classes)}")

    held_out = _held_out_rows(classifier, table)
    if held_out:
        _note(f"--ask: {len(held_out)} of {len(table)} rows are left out: they are in val or test, or "
              "new since the training")
    images = dataset.images_to_ask_about(table, held_out)
    odd = [name for name in images.ids if not dataset.can_be_answered(name)]
    if odd:
        _note(f"skipped: {len(odd)} images with names that are not UTF-8, contain a carriage return, or "
              f"start or end with a blank, such as {odd[0]!r}: rename them")

    images.targets = images.targets[:, [table.classes.index(name) for name in common]]
    images.classes = common
    unknown = np.isnan(images.targets).any(axis=1) & [name not in odd for name in images.ids]
    return images.subset(np.flatnonzero(unknown)), [classifier.classes.index(name) for name in common]


def _held_out_rows(classifier, table):
    """Return the rows of val and test: the data's own, and those of the run that trained the model."""
    # For other data, these are what train.py would draw with the same options, in which folds train
    # on val too. Where there are too few rows to draw them, all are train.
    saved = classifier.options
    train = range(len(table))
    with contextlib.suppress(InputError):
        train, val, _ = dataset.split(table, saved.get("split", (0.7, 0.15, 0.15)),
                                      saved.get("split_method", "stratified"), saved.get("seed", 0))
        train = [*train, *val] if saved.get("folds") else train

    # A model that was trained on these images knows which of them it was trained on, whatever other
    # options had a say in that. Rows that answers added later belong to train.
    if not (table.parts and all(table.parts)):
        known = was_trained_on(classifier.trained_on, table)
        if 2 * known.sum() > len(train):
            train = np.flatnonzero(known | table.is_added)
    own = {row for row, part in enumerate(table.parts) if part in ("val", "test")}
    return own | {*range(len(table))}.difference(train)


def was_trained_on(trained_on, table):
    """Return which images of a table a model was trained on, booleans (N,).

    Args: trained_on: the dataset.image_keys() of its training images.
    """
    # Both as uint64: NumPy would compare other integers with them as floats, which lose digits.
    return np.isin(dataset.image_keys(table), np.array(trained_on, np.uint64))


def import_metrics(option):
    """Import metrics.py, which a deployed model can do without unless it is given this option."""
    try:
        import metrics
    except ImportError:
        raise InputError(f"{option} needs metrics.py next to inference.py: copy it there") from None
    return metrics


def targets_for(classifier, table):
    """Return a table's labels (N, C), a column for each class of the classifier.

    Raises InputError if the table does not say whether a class is present.
    """
    # Data that lists the labels of each image, such as "bolt;rust", leaves out what is absent, so a
    # class that it never names is 0 everywhere (table.absent). In a table of 0 and 1, a class
    # without a column is unknown (NaN).
    lacking = [name for name in classifier.classes if name not in table.classes]
    if lacking and math.isnan(table.absent):
        raise InputError(f"the data has no labels for {', '.join(lacking)}; it has "
                         f"{', '.join(table.classes)}")

    targets = np.full((len(table), len(classifier.classes)), table.absent, np.float32)
    for c, name in enumerate(classifier.classes):
        if name in table.classes:
            targets[:, c] = table.targets[:, table.classes.index(name)]
    return targets


def fit_calibration(classifier, logits, targets):
    """Calibrate a classifier in place, to logits (V, N, C) and targets (N, C) with 1, 0 and NaN."""
    import metrics  # here, not at the top: a deployed model goes without it

    # The calibration is fitted to the mean of the members' probabilities, but applied to each
    # member. The mean of calibrated members is not quite the calibrated mean, so this is repeated:
    # in a simulation with three members, a fourth round changed the log loss by 0.000004.
    for _ in range(1 if len(classifier.members) == 1 else 3):
        probabilities = to_probabilities(classifier, logits)
        add_calibration(classifier, *metrics.fit_calibration(targets, probabilities))


def add_calibration(classifier, scale, offsets):
    """Apply a scale and offsets (C,) to the logits of each member, after its own calibration."""
    for member in classifier.members:
        member.scale *= scale
        member.offsets = (scale * np.array(member.offsets) + offsets).tolist()


# --------------------------------------------------------------------------------------------------
# The network: layers, device, precision and the forward pass


HEADS = {"linear": [0.0], "mlp": [0.5, 0.3], "bn": [0.0]}  # head -> its default dropout rates

# Up to this number of images, preparations do not pay. On one core, measuring bf16 takes 0.1 to 2
# seconds; merging BatchNorm into convolutions takes 0.1 seconds and saves 0.02 per image.
FEW = 16


def build_model(backbone, head, num_classes, dropout=None, size=224):
    """Build a torchvision network with a new head, randomly initialised.

    Args: backbone: one of backbone_names(); head: "linear", "mlp" (BatchNorm, Dropout, Linear to a
    quarter of the features, ReLU, Dropout, Linear) or "bn" (Linear, BatchNorm); dropout: a list of
    one rate, or of two for "mlp" (default: see HEADS); size: the side S of the images.
    Returns: an nn.Module that maps images (B, 3, S, S) to logits (B, num_classes).
    Raises InputError if the backbone does not exist, or cannot be used.
    """
    network = _build_backbone(check_backbone(backbone), size)
    name = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    parent, _, child = name.rpartition(".")
    features = network.get_submodule(name).in_features
    layers = _build_head(head, features, num_classes, dropout or HEADS[head])
    setattr(network.get_submodule(parent), child, layers)
    return network


def head_name(network):
    """Return the name of the head in a network of build_model(), such as "fc" or "classifier.1"."""
    return next(name for name, layer in network.named_modules() if isinstance(layer, InFullPrecision))


def _build_head(head, features, num_classes, dropout):
    """Build the layers that map features (B, F) to logits (B, C)."""
    first, second = (*dropout, dropout[-1])[:2]  # [0.6] stands for [0.6, 0.6]
    if head == "mlp":
        hidden = features // 4  # 128 for ResNet18, as in the two-stage recipe
        return LayersHead(
            nn.BatchNorm1d(features), nn.Dropout(first), nn.Linear(features, hidden), nn.ReLU(),
            nn.Dropout(second), nn.Linear(hidden, num_classes),
        )

    # A single layer keeps torchvision's names of tensors: fc.weight instead of fc.0.weight.
    if head == "linear" and not first:
        return LinearHead(features, num_classes)

    layers = [nn.Dropout(first)] if first else []
    layers.append(nn.Linear(features, num_classes))
    if head == "bn":
        layers.append(nn.BatchNorm1d(num_classes))
    return LayersHead(*layers)


class InFullPrecision:
    """Compute a layer in the precision of its weights, even where autocast lowers all others."""

    # Logits in bf16 would have 8 significant bits, in which 1.003 is the same as 1.000. Different
    # images would get equal probabilities, which spoils rankings such as average precision.
    def forward(self, features):
        features = features.to(next(self.parameters()).dtype)
        kind = features.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return super().forward(features)
        return super().forward(features)


class LinearHead(InFullPrecision, nn.Linear):
    """Map features to logits by one linear layer."""


class LayersHead(InFullPrecision, nn.Sequential):
    """Map features to logits by several layers."""


def choose_device(name):
    """Return the torch.device with this name, or the fastest one for "auto".

    Raises InputError if this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # fails for cuda:7 on a machine with one GPU
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def choose_precision(name, device, images=math.inf):
    """Choose the dtype that the backbone computes in.

    Args: name: "fp32", "bf16", "fp16" or "auto"; images: number of images to predict.
    Returns: the dtype, and the reason in words.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], "as requested"

    # GPUs compute fast in fp16 from compute capability 7.0 (Volta) on, in bf16 from 8.0 (Ampere)
    # on. Of the two, bf16 is better: its range is that of fp32, so that nothing overflows.
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = "the GPU has compute capability {}.{}".format(*capability)
        if capability >= (8, 0):
            return torch.bfloat16, reason
        return torch.float16 if capability >= (7, 0) else torch.float32, reason

    if device.type != "cpu" or not has_bf16_instructions():
        return torch.float32, f"the {device.type} has no known bf16 instructions"
    if images <= FEW:
        return torch.float32, "few images"

    # A whole network gains less than its convolutions, since its other layers and the casts are no
    # faster. Below 1.3, too little is left to be worth the lower precision.
    speedup = measure_bf16()
    reason = f"a convolution in bf16 is {speedup:.1f} times as fast as in fp32"
    return torch.bfloat16 if speedup >= 1.3 else torch.float32, reason


def has_bf16_instructions():
    """Return True if the processor claims to multiply bf16, which some do slowly."""
    info = Path("/proc/cpuinfo")
    return info.exists() and re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", info.read_text()) is not None


@functools.cache
def measure_bf16():
    """Measure how many times as fast a convolution, forward and backward, is in bf16 as in fp32."""
    # A convolution of ResNet18's first stage, for 4 images of 224 pixels: large enough to be typical,
    # small enough to take a tenth of a second in all, where bf16 is fast.
    images, weight = (torch.ones(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
                      for shape in ((4, 64, 56, 56), (64, 64, 3, 3)))

    def seconds(precision):
        started = time.perf_counter()
        with torch.enable_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            nn.functional.conv2d(images, weight, padding=1).float().sum().backward()
        return time.perf_counter() - started

    seconds(torch.float32)  # the first calls are slow
    seconds(torch.bfloat16)

    # The two take turns, so that a busy moment of the machine hits both; the fastest of four is the
    # least disturbed. Where bf16 is emulated, it is so slow that a single pair settles it.
    pairs = []
    while len(pairs) < 4 and (not pairs or pairs[0][1] < 5 * pairs[0][0]):
        pairs.append((seconds(torch.float32), seconds(torch.bfloat16)))
    fp32, bf16 = map(min, zip(*pairs))
    return fp32 / bf16


def default_workers():
    """Return how many threads decode images: one per processor that this process may use."""
    affinity = hasattr(os, "sched_getaffinity")  # which macOS and Windows lack
    count = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    count //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes share them
    # Each thread holds a decoded batch: more than 16 of them would mostly cost memory.
    return min(16, max(1, count))


def to_device(network, device):
    """Move a network to a device, in the memory layout that convolutions are fastest in."""
    return network.to(device, memory_format=torch.channels_last)


def forward(network, images, precision):
    """Compute float32 logits (B, C), the backbone in `precision` and the head in fp32.

    Args: images: normalised (B, 3, H, W), or features (B, F) if `network` is only a head.
    """
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    if precision == torch.float32:  # torch 2.4 has no autocast for MPS, not even a disabled one
        return network(images).float()
    with torch.autocast(images.device.type, precision):
        return network(images).float()


def _resize(images, size):
    """Resize images (B, 3, H, W) to (size, size), unless they have that size."""
    if images.shape[2:] == (size, size):
        return images
    return nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def share_tensors(network):
    """Copy a network: the copy has layers and hooks of its own, but the same tensors."""
    # deepcopy() does not copy what its memo lists as copied already.
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def fold_batchnorm(network):
    """Copy a network in eval mode, with each BatchNorm merged into the convolution before it."""
    # In eval mode, BatchNorm is a fixed scale and shift per channel, which the weights of the
    # convolution can absorb: a quarter of the time is saved. Logits differ by rounding only.
    network = share_tensors(network)
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, layer), (next_name, next_layer) in itertools.pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(layer, next_layer))
                setattr(module, next_name, nn.Identity())
    return network


# --------------------------------------------------------------------------------------------------
# Backbones: the classification networks of torchvision

# Their classifier is a convolution, which the head cannot replace.
WITHOUT_LINEAR = ("squeezenet1_0", "squeezenet1_1")

# More classifiers, of GoogLeNet and Inception, which only help to train from scratch. The files of
# torchvision have them: they are half of GoogLeNet's.
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


class PretrainedInput(NamedTuple):
    """The images that the weights of a backbone expect."""

    size: int  # the side in pixels
    mean: tuple  # of red, green and blue, which range from 0 to 1
    std: tuple


@functools.cache
def pretrained_input(backbone):
    """Return the PretrainedInput of torchvision's default weights of a backbone."""
    expected = torchvision_models().get_model_weights(backbone).DEFAULT.transforms()
    return PretrainedInput(expected.crop_size[0], tuple(expected.mean), tuple(expected.std))


def torchvision_models():
    """Return torchvision.models, whose import takes seconds and waits until it is needed."""
    try:
        import torchvision.models
    except (ImportError, RuntimeError, AttributeError) as error:  # if built for another torch
        reason = str(error).splitlines()[0]
        raise InputError(f"torchvision does not work with this torch ({reason}): install both "
                         "together, with pip install -r requirements.txt") from None
    return torchvision.models


def backbone_names():
    """Return the names of the networks that build_model() takes, sorted."""
    models = torchvision_models()
    return [name for name in models.list_models(module=models) if name not in WITHOUT_LINEAR]


def format_backbones():
    """Return a table of all backbones, with their parameters and the size of their images."""
    rows = [f"{'backbone':<20}{'parameters':>12}{'images':>10}"]
    for name in backbone_names():
        count = torchvision_models().get_model_weights(name).DEFAULT.meta["num_params"]
        rows.append(f"{name:<20}{count / 1e6:10.1f} M{pretrained_input(name).size:7} px")
    return "\n".join(rows)


def check_backbone(name):
    """Return the name of a backbone in lower case. Raises InputError if it cannot be one."""
    name = name.lower()
    known = backbone_names()
    if name in known:
        return name
    if name in WITHOUT_LINEAR:
        raise InputError(f"--backbone {name}: its classifier is a convolution, not a linear layer "
                         "that a head could replace: name another network")

    models = torchvision_models()
    if name in models.list_models():
        module = models.get_model_builder(name).__module__.rpartition(".")[0]
        raise InputError(f"--backbone {name}: {module} is not for the classification of images, or "
                         "not for training: name another network")
    longer = [one for one in known if one.startswith(name)][:3]  # of "vit", say
    similar = difflib.get_close_matches(name, known) or longer
    more = f" (did you mean {' or '.join(similar)}?)" if similar else ""
    raise InputError(f"--backbone {name}: torchvision has no such classification network{more}: "
                     "python inference.py --backbones lists them")


def check_size(backbone, size):
    """Raise InputError if a backbone takes no images of this size; name the nearest that it takes."""
    if build_without_values(backbone, size):
        return

    # Networks that take only certain sizes cut images into patches of 14, 16 or 32 pixels.
    others = sorted({patch * count for patch in (14, 16) for count in range(1, 65)}, reverse=True)
    below = [other for other in others if other < size]
    above = [other for other in reversed(others) if other > size]
    nearest = [next((other for other in side if build_without_values(backbone, other)), None)
               for side in (below, above)]
    raise InputError(f"--size {size}: {backbone} does not take images of this size, but of "
                     f"{' or '.join(str(one) for one in nearest if one)} pixels, for example")


@functools.cache
def build_without_values(backbone, size):
    """Return a network without values, or None if it takes no images of this size."""
    check_backbone(backbone)
    try:
        with WithoutValues():
            network = build_model(backbone, "linear", 1, size=size).to("meta").eval()
        network(torch.empty(1, 3, size, size, device="meta"))  # only computes shapes
    except (AssertionError, RuntimeError, ValueError):
        return None
    return network


class WithoutValues(TorchFunctionMode):
    """Let layers be built without values for their weights, which takes no time and no memory."""

    # torch.device("meta") would leave all tensors without values, but some networks compute with
    # others: RegNet with its widths, and Swin v2 with tables that no file of weights contains.
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:  # from which layers make their weights
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


def _build_backbone(name, size):
    """Build a torchvision network for images (B, 3, size, size) and the classes of ImageNet."""
    options = {}
    if name.startswith("vit_"):  # has a vector for each place in an image
        options = {"image_size": size}
    elif name.startswith("maxvit"):  # divides images into windows
        options = {"input_size": (size, size)}
    elif name in ("googlenet", "inception_v3"):
        # transform_input: their weights expect another normalization, to which the network changes
        # that of ImageNet.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    return torchvision_models().get_model(name, weights=None, **options)


def has_batchnorm(network):
    """Return True for a network that normalizes batches; others have LayerNorm, or nothing."""
    return any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


# --------------------------------------------------------------------------------------------------
# Pretrained weights


@dataclass
class Weights:
    """Pretrained tensors, from a file or from torchvision."""

    source: str  # "imagenet", or the file
    tensors: dict  # name -> tensor
    classes: list  # of the model in a checkpoint of train.py, else empty
    trained_on: list  # as in a Classifier


def load_weights(network, weights, backbone, classes=()):
    """Load every tensor whose name and shape match into a network.

    Args: weights: a Weights, or what read_weights() takes; classes: the classes of the network, whose
    rows in the last layers of the head are taken from a checkpoint of train.py by name.
    Returns: the names of the loaded tensors, {name: reason} for the others, and the classes whose
    rows were loaded.
    Raises InputError if the weights cannot be read or belong to another backbone.
    """
    if not isinstance(weights, Weights):
        weights = read_weights(weights, backbone)
    own = network.state_dict()
    state = {name: tensor for name, tensor in _without_prefix(weights, own).items()
             if not name.startswith(AUXILIARY_HEADS)}
    state = _fit_positions(network, state)
    common, skipped = [], {}
    if weights.classes and classes:
        rows = _class_tensors(network)
        common, skipped = _match_head_rows(state, own, rows, weights.classes, classes)

    taken = {}
    for name, tensor in state.items():
        if name not in own:
            skipped[name] = "not in this network"
        elif not isinstance(tensor, torch.Tensor) or tensor.shape != own[name].shape:
            skipped[name] = f"another shape than {tuple(own[name].shape)}"
        else:
            taken[name] = tensor

    _refuse_other_backbone(weights.source, state, taken, backbone, head_name(network))
    _refuse_smaller_backbone(weights.source, state, network, backbone)
    load_tensors(network, taken, strict=False)  # everything else keeps its initial values
    missing = [name for name in own if name not in taken and name not in skipped]
    return list(taken), skipped | dict.fromkeys(missing, "not in the file"), common


def load_tensors(network, tensors, **how):
    """Load tensors into a network, with the options of load_state_dict()."""
    # MNASNet only loads a state_dict that says of which version of it the tensors are. Files do not.
    state = OrderedDict(tensors)
    state._metadata = network.state_dict()._metadata
    network.load_state_dict(state, **how)


def read_weights(weights, backbone):
    """Read the Weights to start training from.

    Args: weights: "imagenet" for torchvision's default weights of the backbone, or a file: a
    model.pth, a last.pth, or the state_dict of another program.
    Raises InputError if they cannot be downloaded or read.
    """
    if weights == "imagenet":
        return Weights(weights, _download(backbone), [], [])

    content = read_checkpoint(weights)
    if not isinstance(content, dict):
        raise InputError(f"{weights} holds no state_dict")
    classes, trained_on = [], []
    if "format" in content and "classes" in content:  # a checkpoint of train.py
        classes = list(content["classes"])
        trained_on = unpack_keys(content.get("trained_on", []))
    if "members" in content:  # a model.pth, of which the first network is taken
        content = content["members"][0]

    # Many programs save {"state_dict": tensors} or {"model": tensors}; some wrap them twice.
    wrappers = ("network", "state_dict", "model_state_dict", "model")
    while inner := [content[key] for key in wrappers if isinstance(content.get(key), dict)]:
        content = inner[0]
    return Weights(str(weights), {str(name): tensor for name, tensor in content.items()}, classes, trained_on)


def _download(backbone):
    """Download torchvision's default weights of a backbone, unless they are in its cache."""
    weights = torchvision_models().get_model_weights(backbone).DEFAULT
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        return weights.get_state_dict(progress=terminal, check_hash=True)
    except (OSError, RuntimeError) as error:  # no connection; a broken download
        raise InputError(f"the ImageNet weights of {backbone} could not be downloaded ({error}): use "
                         "--weights PATH for a file, or --weights none to train from scratch") from None


def _without_prefix(weights, own):
    """Return the tensors of Weights without what wrappers put before their names, like "module."."""
    # The prefix is what most often stands before a name of the network. In net.conv1.weight and
    # net.layer1.0.conv1.weight, that is "net", which stands before conv1.weight and before
    # layer1.0.conv1.weight. "net.layer1.0" stands before conv1.weight, too, but only once.
    counts = Counter()
    for name in weights.tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                counts[".".join(parts[:start])] += 1

    # If the second name were alone, both prefixes would be equally frequent; the shorter one is
    # right. If neither begins the other, such as "model" and "ema", the file holds two networks.
    most = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    best = min(most, key=len, default="")
    if not all(prefix.startswith(best) for prefix in most):
        raise InputError(f"{weights.source} holds several networks, {' and '.join(most)}: save the "
                         "one to use alone")

    start = best + "."  # without a prefix "." is left, which begins no name
    inside = [name for name in weights.tensors if name.startswith(start)]
    outside = [name for name in weights.tensors if not name.startswith(start)]
    return {name.removeprefix(start): weights.tensors[name] for name in outside + inside}


def _fit_positions(network, state):
    """Return a state_dict with ViT's vectors of places interpolated to the size of its images."""
    transformers = torchvision_models().vision_transformer
    if not isinstance(network, transformers.VisionTransformer) or "encoder.pos_embedding" not in state:
        return state
    try:
        return transformers.interpolate_embeddings(network.image_size, network.patch_size, state)
    except (AttributeError, ValueError):  # no tensor, or one of another shape, which is reported
        return state


def _class_tensors(network):
    """Name the head's tensors with a row per class: all those after its ReLU, if it has one."""
    root = head_name(network)
    names = []
    for path, layer in network.get_submodule(root).named_modules(prefix=root):
        if isinstance(layer, nn.ReLU):
            names = []
        elif not isinstance(layer, nn.Sequential):
            # dim(): BatchNorm also counts its batches, in a single number for all classes.
            names += [f"{path}.{key}" for key, value in layer.state_dict().items() if value.dim()]
    return names


def _match_head_rows(state, own, rows, known, classes):
    """Change the tensors named `rows` in a state_dict from the file's classes to the network's.

    Returns: the common classes, and {name: reason} for what is skipped.
    """
    # Rows are matched by class name. If the file knows [rust, bolt] and the network [bolt, nut],
    # row 1 of the file becomes row 0 of the network, whose row 1 stays random. By position, "bolt"
    # would start from what the file knows about "rust".
    common, skipped = [], {}
    if all(name in state and state[name].shape == (len(known), *own[name].shape[1:]) for name in rows):
        common = [name for name in classes if name in known]
        skipped |= {f"head row of {name}": "new class" for name in classes if name not in known}
        skipped |= {f"head row of {name}": "removed class" for name in known if name not in classes}

    for name in rows:
        saved = state.pop(name, None)
        if common:
            state[name] = own[name].clone()
            for label in common:
                state[name][classes.index(label)] = saved[known.index(label)]
        elif saved is not None:
            skipped[name] = "belongs to another head or to other classes"
    return common, skipped


def _refuse_other_backbone(source, state, taken, backbone, head):
    """Raise an InputError if less than half of a file fits, or if it is of another backbone."""

    # The head does not count, since it is often new, nor does what is missing from the file, since
    # a file of the first layers is useful, too. Tensors and numbers are both counted, as a single
    # tensor can have most of the numbers: the first linear layer of VGG16 does. A ViT's vectors of
    # places only depend on the size of images.
    def fit(shapes, head):
        """Return the share of the file that a backbone has a place for, from 0 to 1."""
        sizes = {key: tensor.numel() for key, tensor in state.items()
                 if isinstance(tensor, torch.Tensor)
                 and not key.startswith((head + ".", "encoder.pos_embedding"))}
        fitting = [key for key in sizes if shapes.get(key) == state[key].shape]
        numbers = sum(sizes[key] for key in fitting) / max(sum(sizes.values()), 1)
        return min(len(fitting) / max(len(sizes), 1), numbers)

    share = fit({key: tensor.shape for key, tensor in taken.items()}, head)
    only_head = all(key.startswith(head + ".") for key in state)
    if taken and (share == 1 or only_head):
        return

    # Half of a ResNet18 fits a ResNet50, so a backbone that fits nearly all of the file is looked
    # for first. 0.9: such a file may have some more tensors, like those of a training loss.
    for name in _similar_in_size(state):
        other = build_without_values(name, pretrained_input(name).size)
        shapes = {key: tensor.shape for key, tensor in other.state_dict().items()}
        if fit(shapes, head_name(other)) > max(share, 0.9):
            raise InputError(f"{source} has weights of which {share:.0%} fit {backbone}: it looks "
                             f"like {name}: give --backbone {name}, or other --weights")
    if share < 0.5 or not taken:
        found = f"weights of which {share:.0%} fit" if taken else "no tensor that fits"
        raise InputError(f"{source} has {found} {backbone}: is it of another backbone?")


def _refuse_smaller_backbone(source, state, network, backbone):
    """Raise an InputError if a file is all of a smaller network of the same family."""
    # All tensors of a ResNet18 fit a ResNet34, whose other half would stay random. A file of the
    # first layers of any network is taken: it is useful, and nobody can say of which network it is.
    def is_complete(network):
        head = head_name(network) + "."
        return all(getattr(state.get(name), "shape", None) == weight.shape
                   for name, weight in network.named_parameters() if not name.startswith(head))

    if is_complete(network):
        return
    builder = torchvision_models().get_model_builder
    for name in _similar_in_size(state):
        related = builder(name).__module__ == builder(backbone).__module__ and name != backbone
        if related and is_complete(build_without_values(name, pretrained_input(name).size)):
            raise InputError(f"{source} has only a part of the weights of {backbone}: it looks "
                             f"like {name}: give --backbone {name}, or other --weights")


def _similar_in_size(state, most=12):
    """Return the backbones whose numbers of parameters are closest to that of a state_dict."""
    count = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, torch.Tensor))

    def difference(name):
        parameters = torchvision_models().get_model_weights(name).DEFAULT.meta["num_params"]
        return abs(math.log(parameters / max(count, 1)))

    return sorted(backbone_names(), key=difference)[:most]


# --------------------------------------------------------------------------------------------------
# Checkpoints


FORMAT = 2  # of model.pth and last.pth: raised when a change makes older files unreadable
MEMBER_FIELDS = ("backbone", "head", "dropout", "size", "offsets", "scale")  # beside the tensors
SAVED_FIELDS = ("classes", "groups", "thresholds", "mirrored", "epoch", "scores", "options")


def save_model(classifier, path):
    """Save a Classifier as a model.pth, which holds only tensors, numbers and strings."""
    # contiguous() undoes the memory layout of to_device(), which is of no use in a file.
    members = []
    for member in classifier.members:
        state = member.network.state_dict()
        state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        fields = {name: getattr(member, name) for name in MEMBER_FIELDS}
        members.append(fields | {"network": state})

    fields = {name: getattr(classifier, name) for name in SAVED_FIELDS}
    fields["trained_on"] = pack_keys(classifier.trained_on)
    write_checkpoint(path, {"format": FORMAT, "members": members} | fields)


def pack_keys(keys):
    """Return a list of image keys as a tensor, since a list of a million takes seconds to load."""
    # torch has few functions for unsigned integers, so the same 64 bits are saved as signed ones.
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64))


def unpack_keys(saved):
    """Return the list of image keys that pack_keys() packed."""
    if isinstance(saved, torch.Tensor):
        return saved.numpy().view(np.uint64).tolist()
    return list(saved)  # older files hold the list itself


def write_checkpoint(path, content):
    """Write a file with torch.save(), completely or not at all.

    Raises OSError, for example if the disk is full; then the previous file is still there.
    """
    with dataset.atomic_write(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's error says less than the OSError that caused it
            raise error.__context__ or error from None


def load_model(path="outputs/model.pth", device="auto", precision="auto"):
    """Load a model.pth as a Classifier, ready for predict().

    Args: path: a file, or a list of files with the same classes, which gives a Classifier with all
    their networks and the mean of their thresholds; device: as for choose_device(); precision: as
    for choose_precision().
    Raises InputError if a file cannot be used.
    """
    if not isinstance(path, (str, os.PathLike)):
        return _merge_classifiers([load_model(one, device, precision) for one in path], path)

    if not Path(path).exists():
        raise InputError(f"{path} does not exist: train a model first (python train.py), or name "
                         "one with --model")
    content = read_checkpoint(path)
    check_content(path, content, ("members", *SAVED_FIELDS), "model.pth")

    count = len(content["classes"])
    thresholds = len(content["thresholds"])
    device = choose_device(device)
    members = [_load_member(path, saved, count, device) for saved in content["members"]]
    if thresholds != count:
        raise InputError(f"{path} is damaged: it has {thresholds} thresholds for {count} classes")

    precision = None if precision == "auto" else choose_precision(precision, device)[0]
    fields = {name: content[name] for name in SAVED_FIELDS}
    trained_on = unpack_keys(content.get("trained_on", []))  # which the first files lack
    return Classifier(members, **fields, trained_on=trained_on, device=device, precision=precision)


def _load_member(path, saved, num_classes, device):
    """Build one network of a model.pth and load its tensors."""
    fields = {name: saved[name] for name in MEMBER_FIELDS}
    # backbone_names() also says if torchvision is broken, which is not the fault of the file.
    if saved["backbone"] not in backbone_names():
        raise InputError(f"{path} has the backbone {saved['backbone']}, which this torchvision does "
                         "not have: pip install -U torch torchvision")
    try:
        with WithoutValues():  # since random ones would be replaced at once
            network = build_model(saved["backbone"], saved["head"], num_classes, saved["dropout"],
                                  saved["size"])
        load_tensors(network, saved["network"], assign=True)  # there is no memory to copy them to
    except (AssertionError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        # Wrong content raises all of these.
        raise InputError(f"{path} is damaged: its tensors are not those of a {saved['backbone']} "
                         f"network with a {saved['head']} head for its classes") from None
    return Member(to_device(network, device).eval(), **fields)


def _merge_classifiers(classifiers, paths):
    """Merge the Classifiers of several files into one."""
    first = classifiers[0]
    for other, path in zip(classifiers, paths):
        if other.classes != first.classes:
            raise InputError(f"{path} has different classes from {paths[0]}: {', '.join(other.classes)}")

    return replace(
        first,
        members=[member for classifier in classifiers for member in classifier.members],
        thresholds=np.mean([one.thresholds for one in classifiers], axis=0).tolist(),
        mirrored=any(one.mirrored for one in classifiers),
        trained_on=sorted(set().union(*(one.trained_on for one in classifiers))),
    )


def read_checkpoint(path):
    """Return what torch.save() wrote, without running code that an untrusted file may contain.

    Raises InputError if it cannot be read or holds more than tensors, numbers and strings.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors, numbers and strings, or is not a "
                         "PyTorch checkpoint: it was not loaded") from None
    except Exception as error:  # torch raises whatever the bytes of a broken file lead it to
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint: {reason}") from None


def check_content(path, content, names, kind):
    """Raise an InputError unless a checkpoint is a `kind`, such as "model.pth", with `names`."""
    if not isinstance(content, dict) or not {"format", *names} <= content.keys():
        raise InputError(f"{path} is not a {kind} of train.py; to start training from its weights, "
                         f"use train.py --weights {path}")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}, and this program reads {FORMAT}: "
                         "use the version of the program that wrote it")


# --------------------------------------------------------------------------------------------------
# Export: the model as one file for other programs


CHECKED_IMAGES = 32  # on which an exported file must give the probabilities of predict()

# Rounding in fp32 changed probabilities by at most 0.00001. Whatever changes them by ten times as much
# has another cause, such as a layer that was converted wrongly.
MAX_DIFFERENCE = 1e-4

# A protobuf message holds at most 2**31 bytes, which leaves the graph as much as it could ever need.
MAX_ONNX_BYTES = 2_000_000_000


def export(options):
    """Run --export, and return the largest difference from predict()."""
    dataset.refuse_to_replace("--export", options.export, options.model)
    if _is_onnx(options.export):
        _import_onnx()  # fails before the seconds that it takes to load a model
    options.device, options.precision = "cpu", "fp32"
    classifier = _load_chosen_models(options)
    _note(f"{', '.join(options.model)}: {classifier}")
    return export_model(classifier, options.export)


def export_model(classifier, path):
    """Write a Classifier as a file that runs without this code, and compare it with predict().

    The file maps `images`, uint8 (N, 3, S, S) for any N, to `probabilities`, float32 (N, C).
    Everything else is inside: normalisation, all members, mirrored views, calibration and averaging.
    Its metadata are the JSON texts `classes` (C names), `thresholds` (C numbers) and `size` (S):

        metadata = dict.fromkeys(["classes", "thresholds", "size"], "")
        program = torch.export.load("model.pt2", extra_files=metadata).module()
        classes = json.loads(metadata["classes"])
        with torch.inference_mode():
            probabilities = program(images)

        session = onnxruntime.InferenceSession("model.onnx")
        classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
        [probabilities] = session.run(None, {"images": images})

    Args: path: a file .pt2, written by torch.export.save(), or .onnx.
    Returns: the largest difference of the probabilities of random images, which is printed too.
    Raises InputError for another suffix, or if ONNX is not available or cannot hold the model, and
    RuntimeError if the conversion fails or the difference is above 0.0001; then no file is written.
    """
    onnx = _is_onnx(path)
    classifier = _copy_to_cpu(classifier)
    module = ExportedClassifier(classifier).eval()
    if onnx:
        _import_onnx()
        _check_onnx_size(module)
    metadata = {"classes": classifier.classes, "thresholds": classifier.thresholds,
                "size": classifier.size}
    metadata = {name: json.dumps(value) for name, value in metadata.items()}

    # The temporary file of atomic_write() is read back, so that only a file that works becomes `path`.
    with dataset.atomic_write(path, "wb") as file, warnings.catch_warnings():
        # Torch warns about its own conversion, such as weights in channels_last that "may cause issues".
        warnings.filterwarnings("ignore", module=r"torch\.(_?export|fx|onnx)\b")
        _note(f"{path}: converting")
        # If torch.export fails, it also prints the graph of the network, which has hundreds of lines.
        with (_one_line_error(f"torch {torch.__version__} cannot convert this model"),
              contextlib.redirect_stderr(io.StringIO())):
            content = _to_onnx(module, metadata) if onnx else _to_pt2(module, metadata)
        file.write(content)
        file.flush()

        with _one_line_error(f"{path} was not written: the converted model does not run"):
            run, runtime = _load_onnx(file.name) if onnx else _load_pt2(file.name)
            _note(f"{path}: comparing {runtime} with predict()")
            difference = _largest_difference(classifier, run)
        if not difference <= MAX_DIFFERENCE:  # also if it is NaN
            raise RuntimeError(f"{path} was not written: with {runtime}, its probabilities differ from "
                               f"those of predict() by up to {difference:.2g}, more than {MAX_DIFFERENCE}")

    print_text(f"{path}: largest difference from predict() on {CHECKED_IMAGES} random images, with "
               f"{runtime}: {difference:.2g}")
    return difference


def _copy_to_cpu(classifier):
    """Copy a Classifier to the CPU and to fp32, with networks of its own."""
    cpu = torch.device("cpu")
    members = [replace(member, network=to_device(copy.deepcopy(member.network), cpu))
               for member in classifier.members]
    return replace(classifier, members=members, device=cpu, precision=torch.float32)


@contextlib.contextmanager
def _one_line_error(message):
    """Raise any exception of the block as a RuntimeError: the message, and the reason in a line."""
    try:
        yield
    except Exception as error:  # torch and onnxruntime raise errors of many types
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(f"{message}: {reason}") from error


class ExportedClassifier(nn.Module):
    """Map images, uint8 (N, 3, S, S), to the mean probabilities (N, C) of a Classifier of size S.

    The gradients of the Classifier's networks are switched off.
    """

    def __init__(self, classifier):
        super().__init__()
        # Networks that take smaller images get a layer in front that resizes them, so that for
        # forward_views() all of them take images of the same size.
        size = classifier.size
        networks = []
        for member in classifier.members:
            network = fold_batchnorm(member.network.eval())
            if member.size < size:
                network = nn.Sequential(MatrixResize(size, member.size), network)
            networks.append(network.requires_grad_(False))  # so that the output has no gradient either
        self.networks = nn.ModuleList(networks)
        members = [replace(member, size=size) for member in classifier.members]
        self.classifier = replace(classifier, members=members)

    def forward(self, images):
        # Not in double precision, which predict() can afford, but many runtimes lack.
        logits = forward_views(self.classifier, self.networks, images, torch.float32)
        return average_views(self.classifier, logits)


class MatrixResize(nn.Module):
    """Resize images as _resize() does, by two matrix products.

    ONNX has an antialiased resize too, but onnxruntime's is up to 0.006 grey levels off, and
    other runtimes lack it.
    """

    def __init__(self, size, new_size):
        super().__init__()
        identity = torch.eye(size)[None, None]
        matrix = nn.functional.interpolate(identity, (new_size, size), mode="bilinear", antialias=True)
        self.register_buffer("matrix", matrix[0, 0])  # resized columns are matrix @ columns

    def forward(self, images):
        return self.matrix @ images @ self.matrix.T


def _is_onnx(path):
    """Return True for a file .onnx and False for .pt2. Raise an InputError for another suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".pt2", ".onnx"):
        raise InputError(f"--export {path}: the suffix says which format to write: name a file .pt2 or "
                         ".onnx")
    return suffix == ".onnx"


def _trace(module):
    """Return the torch.export.ExportedProgram of an ExportedClassifier, for any number of images."""
    # Two images, since a program that is traced with one may work for one only.
    size = module.classifier.size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("N")}}
    program = torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)

    # Each step carries the line of code that it comes from, with folders of this machine: whoever gets
    # the file need not know them.
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _to_pt2(module, metadata):
    """Convert an ExportedClassifier, and return the bytes of a .pt2 file."""
    file = io.BytesIO()
    torch.export.save(_trace(module), file, extra_files=metadata)
    return file.getvalue()


def _load_pt2(path):
    """Load a .pt2 file. Returns a function of uint8 images, and the name of what runs it."""
    with open(path, "rb") as file:
        program = torch.export.load(file).module()
    run = torch.no_grad()(program)  # torch 2.9 forgets that the weights have no gradients
    return lambda images: run(torch.from_numpy(images)).numpy(), "torch.export.load"


def _import_onnx():
    """Raise an InputError if this machine lacks what an export to ONNX needs."""
    if torch.__version__ < (2, 9):  # 2.6 cannot convert the normalisation; 2.7 and 2.8 were not tried
        raise InputError(f"--export to ONNX needs torch 2.9 or newer, and this is {torch.__version__}: "
                         "update it, or export to a file .pt2")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--export to ONNX needs two more packages ({error}): "
                         "pip install onnx onnxscript") from None


def _check_onnx_size(module):
    """Raise an InputError if the weights of a module are too large for an .onnx file."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if weights > MAX_ONNX_BYTES:
        raise InputError(f"the weights take {weights / 1e9:.1f} GB, and an .onnx file holds 2 GB: "
                         "export to a file .pt2")


def _to_onnx(module, metadata):
    """Convert an ExportedClassifier, and return the bytes of an .onnx file."""
    program = torch.onnx.export(_trace(module), (), dynamo=True, verbose=False,
                                input_names=["images"], output_names=["probabilities"])
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def _load_onnx(path):
    """Load an .onnx file. Returns a function of uint8 images, and the name of what runs it."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        _note("onnxruntime is not installed: onnx's reference evaluator takes minutes instead of seconds")
        program, runtime = ReferenceEvaluator(path), "onnx's reference evaluator"
    else:
        program = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        runtime = f"onnxruntime {onnxruntime.__version__}"
    return lambda images: program.run(None, {"images": images})[0], runtime


def _largest_difference(classifier, run):
    """Return the largest difference between probabilities of predict() and of an exported file."""
    # Each image has noise of its own coarseness, since networks see much the same in all fine noise.
    rng = np.random.default_rng(0)
    images = []
    for cells in range(1, CHECKED_IMAGES + 1):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        images.append(np.asarray(noise.resize((classifier.size, classifier.size))))

    # In batches of 1 and of 31, as the file should take any number of images.
    stacked = np.stack(images).transpose(0, 3, 1, 2)
    exported = [run(np.ascontiguousarray(batch)) for batch in np.split(stacked, [1])]
    return float(np.abs(np.concatenate(exported) - predict(classifier, images, workers=0)).max())


# --------------------------------------------------------------------------------------------------
# Predictions as text


def format_predictions(style, ids, probabilities, thresholds, classifier):
    """Format predictions as text.

    Args: style: "table" (a full table for one image, else a line per image), "csv" (see
    prediction_rows()), "probabilities" (CSV with a column per class) or "json" ({image: indices of
    its labels}); ids: N names; probabilities (N, C); thresholds (C,), or (N, C) except for "table".
    """
    classes = classifier.classes
    if style == "csv":
        return _csv_text(prediction_rows(ids, probabilities, thresholds, classes, classifier.groups))
    if style == "probabilities":
        rows = ([name, *map(str, row)] for name, row in zip(ids, probabilities))
        return _csv_text(itertools.chain([["ID", *classes]], rows))

    present = probabilities >= thresholds
    if style == "json":
        indices = _cut_by_row(np.nonzero(present)[1].tolist(), present)
        return json.dumps(dict(zip(_shortest_names(ids), indices)), ensure_ascii=False)
    if len(ids) == 1:
        return _format_table(ids[0], classes, probabilities[0], thresholds, present[0])

    width = max(map(len, ids))
    lines = []
    found = _cut_by_row(np.nonzero(present)[1].tolist(), present)
    for name, row, columns in zip(ids, probabilities, found):
        labels = [f"{classes[c]} {row[c]:.2f}" for c in columns]
        lines.append(f"{name:{width}}  {', '.join(labels) or 'none'}")
    return "\n".join(lines)


def prediction_rows(ids, probabilities, thresholds, classes, groups):
    """Yield the rows of predictions.csv, the header first.

    Each group of classes has a column with its labels, such as "nut;bolt", the most confident
    first; one with their probabilities, "nut:0.9000;bolt:0.6000"; and one with the mean of these.
    """
    groups = groups or {"labels": classes}
    averages = [f"avg_{group.removesuffix('s')}_confidence" for group in groups] + ["overall_avg_confidence"]
    if list(groups) == ["labels"]:  # a single group, whose mean is the overall mean
        averages = ["avg_confidence"]

    yield ["ID", *groups, *(f"{group}_confidence" for group in groups), *averages]
    members = [np.array([classes.index(name) for name in names], int) for names in groups.values()]
    cuts = np.broadcast_to(thresholds, probabilities.shape)
    for start in range(0, len(ids), 4096):  # all at once would take many times the memory
        some = slice(start, start + 4096)
        found = [_present_labels(probabilities[some], cuts[some], columns) for columns in members]

        for name, *parts in zip(ids[some], *found):  # a list of labels per group
            labels = [";".join(classes[c] for c, _ in part) for part in parts]
            confidences = [";".join(f"{classes[c]}:{p:.4f}" for c, p in part) for part in parts]
            if len(averages) > 1:
                parts.append(list(itertools.chain(*parts)))
            means = [f"{sum(p for _, p in part) / len(part):.4f}" if part else "" for part in parts]
            yield [name, *labels, *confidences, *means]


def _present_labels(probabilities, cuts, columns):
    """Return the labels of each row in some columns: a list of (column, probability) per row.

    The likeliest come first, and equally likely ones in the order of `columns`.
    Args: probabilities, cuts (N, C); columns: an array of column numbers.
    """
    values = probabilities[:, columns]
    present = values >= cuts[:, columns]
    rows, places = np.nonzero(present)
    values = values[present]
    order = np.lexsort((-values, rows))  # by rows first; where both are equal, the order stays
    return _cut_by_row(list(zip(columns[places[order]].tolist(), values[order].tolist())), present)


def _cut_by_row(values, chosen):
    """Cut a list of values, one for each True of a boolean (N, C), into a list per row."""
    ends = np.cumsum(np.count_nonzero(chosen, axis=1)).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends)]


def _csv_text(rows):
    """Format rows as CSV, without a line break at the end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # Python's default is \r\n
    return text.getvalue().rstrip("\n")


def _shortest_names(ids):
    """Shorten the names of images to what is unique, like the keys of COCO's predictions."""
    # A name becomes its stem; if another image has that, too, its path without the suffix; else it
    # stays: a/1.jpg, b/1.jpg, b/2.jpg and b/2.png become a/1, b/1, b/2.jpg and b/2.png.
    forms = []
    for name in ids:
        path, suffix = os.path.splitext(name.replace("\\", "/"))
        if suffix.lower() not in IMAGE_SUFFIXES:  # the dot belongs to the name, as in scan.1
            path += suffix
        forms.append((path.rpartition("/")[2], path, name))

    counts = Counter(form for own in forms for form in set(own))
    return [next((form for form in own if counts[form] == 1), own[-1]) for own in forms]


def _format_table(name, classes, probabilities, thresholds, present):
    """Format the prediction of a single image as a table with a line per class."""
    width = max(len("attribute"), *map(len, classes))
    lines = [name, f"{'attribute':{width}}  probability  threshold  status"]
    for c, label in enumerate(classes):
        status = "[PRESENT]" if present[c] else "[absent]"
        lines.append(f"{label:{width}}  {probabilities[c]:11.4f}  {thresholds[c]:9.4f}  {status}")
    return "\n".join([*lines, "", f"present: {dataset.list_names(classes, present) or 'none'}"])


# --------------------------------------------------------------------------------------------------
# Pictures: labels, heatmaps and mistakes


PICTURE_SIDE = 360  # pixels of an image's longer side: four in a row fill a laptop's screen
SOFTWARE = "inference.py --save"  # by which a PNG file says that save_pictures() drew it


def save_pictures(classifier, paths, probabilities, folder, heatmap=False, advance=None):
    """Draw each image with its labels below it, and save it as folder/NAME.png.

    Args: probabilities (N, C) from predict(); heatmap: whether to add a picture of each label that
    shows where the network sees it; advance: a function that is called after each picture; if it
    returns True, the images that follow are left out.
    Returns: the paths of the pictures.
    """
    names = dataset.picture_names(classifier.classes)
    mark = PngImagePlugin.PngInfo()  # so that a later run knows that it may replace the picture
    mark.add_text("Software", SOFTWARE)
    written = []
    for path, picture, row in zip(paths, picture_paths(paths, folder), probabilities):
        image = dataset.load_image(path, within=PICTURE_SIDE)
        present = np.flatnonzero(row >= np.array(classifier.thresholds))
        labels = sorted(present, key=lambda c: -row[c])
        words = [(f"{names[c]} {row[c]:.2f}", dataset.GREEN) for c in labels]
        cells = [(image, words or [("none of the labels", dataset.GREY)])]

        if heatmap:
            for heat, (text, _) in zip(heatmaps(classifier, path, labels), words):
                found = "seen here" if heat.any() else "no region found"
                cells.append((draw_heatmap(image, heat), [(f"{text}, {found}", dataset.RED)]))
        dataset.write_png(picture, dataset.draw_sheet(cells, Path(path).name, 4, PICTURE_SIDE), pnginfo=mark)
        written.append(picture)
        if advance and advance():
            break
    return written


def picture_paths(paths, folder):
    """Return the files in a folder that save_pictures() writes for the images at `paths`."""
    return [Path(folder) / f"{Path(name).stem}.png" for name in dataset.distinct_names(paths)]


def _is_drawn(path):
    """Return True if a file is a picture that save_pictures() drew."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except OSError:
        return False


def heatmaps(classifier, image, labels):
    """Compute where in an image the networks see each of the labels.

    Args: image: one image, as for predict(); labels: class indices.
    Returns: float32 (len(labels), size, size), each from 0 to 1, or all 0 if no region was found.
    Raises ImageError if the image cannot be read.
    Source: Selvaraju et al. (2017), "Grad-CAM: Visual Explanations from Deep Networks via
    Gradient-based Localization"; with a linear head it is CAM (Zhou et al. 2016).
    """
    pixels = torch.from_numpy(np.array(dataset.load_image(image, classifier.size))).permute(2, 0, 1)[None]
    pixels = pixels.to(classifier.device)

    # Each network's map has its highest value at 1, so that all count the same in the mean.
    total = sum(_member_heatmaps(member, pixels, labels) for member in classifier.members)
    return total / total.max(axis=(1, 2), keepdims=True, initial=1e-30)  # a map of zeros stays 0


def named_heatmaps(classifier, image, names):
    """Compute heatmaps() of the labels with these names."""
    return heatmaps(classifier, image, [classifier.classes.index(name) for name in names])


def _member_heatmaps(member, pixels, labels):
    """Compute the heatmaps of one network, at the size of the image (1, 3, H, W) in 0..255."""
    outputs = []  # of all layers that still have places, in the order of the computation

    def keep(layer, inputs, output):
        if _to_maps(output) is not None:
            outputs.append(output)

    network = share_tensors(member.network).eval()  # for the hooks: threads may share a classifier
    for layer in network.modules():
        if not isinstance(layer, nn.AdaptiveAvgPool2d):  # VGG's enlarges small maps to 7 x 7
            layer.register_forward_hook(keep)
    with torch.enable_grad():
        images = _resize(member.normalize(pixels), member.size).requires_grad_()
        logits = network(images)[0]

    # The last maps are closest to the labels: 7 x 7 for an image of 224 pixels. The last tokens of a
    # ViT have no influence, apart from the one that stands for the whole image, so its maps are what
    # the last attention looks at.
    output = next((one for one in reversed(outputs) if _has_influence(one, logits)), None)
    result = np.zeros((len(labels), *pixels.shape[2:]), np.float32)
    if output is None:
        return result

    # Each feature map is weighted by how much raising it would raise the logit of the label. The sum
    # is positive where the image speaks for the label; what speaks against it is cut off.
    maps = _to_maps(output.detach())
    for i, label in enumerate(labels):
        gradient = torch.autograd.grad(logits[label], output, retain_graph=True)[0]
        weights = _to_maps(gradient).mean((2, 3), keepdim=True)
        heat = _upsample((weights * maps).sum(1, keepdim=True).relu(), pixels.shape[2])
        result[i] = (heat / heat.max().clamp(min=1e-30)).cpu()[0]
    return result


def _to_maps(output):
    """Return a layer's output as maps (1, C, H, W), H = W > 1, or None if it has no places."""
    if not isinstance(output, torch.Tensor):
        return None
    if output.dim() == 3:  # the tokens of a ViT: one for the image, then one per place, row by row
        side = math.isqrt(output.shape[1] - 1)
        if 1 < side * side == output.shape[1] - 1:
            return output[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    if output.dim() == 4 and 1 < output.shape[2] == output.shape[3]:
        return output
    return None


def _has_influence(output, logits):
    """Return True if the places in a layer's output influence the logits."""
    gradient = torch.autograd.grad(logits.sum(), output, retain_graph=True, allow_unused=True)[0]
    return gradient is not None and bool(_to_maps(gradient).any())


def _upsample(maps, size):
    """Enlarge maps (1, 1, h, w) to (1, size, size), as if there were zeros around them."""
    # Without the zeros, the edge would be repeated outwards. A high cell at the edge would then be
    # highest at the border of the image instead of in its own middle.
    height, width = maps.shape[2:]
    padded = nn.functional.pad(maps, (1, 1, 1, 1))

    # grid_sample() counts from -1 to 1 across the padded maps. The maps themselves, h of h + 2
    # rows, fill the inner h / (h + 2) of this range.
    axis = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=maps.device)
    across, down = axis * width / (width + 2), axis * height / (height + 2)
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)[None]
    mode = "bilinear" if maps.device.type == "mps" else "bicubic"  # MPS has no bicubic sampling
    large = nn.functional.grid_sample(padded, grid, mode=mode, align_corners=False)
    return large[0].clamp(min=0)  # bicubic curves swing below zero


def draw_heatmap(image, heat):
    """Draw a heatmap (H, W) over a PIL image: yellow to red on grey, with a ring at its peak."""
    grey = image.convert("L").convert("RGB")
    heat = Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR)
    values = np.asarray(heat).clip(0, 1)
    glow = _glow(values)
    grey.paste(glow, mask=glow)

    if values.any():
        y, x = np.unravel_index(values.argmax(), values.shape)
        radius = max(image.size) / 30  # small enough to point, large enough to be seen
        ring = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(grey).ellipse(ring, outline="white", width=max(1, round(radius / 4)))
    return grey


def _glow(values):
    """Return a heatmap (H, W) as an RGBA image: the higher, the redder and the less transparent."""
    glow = ImageOps.colorize(Image.fromarray((255 * values).astype(np.uint8)), "yellow", "red")
    glow.putalpha(Image.fromarray((170 * values).astype(np.uint8)))  # up to 170 of 255: two thirds
    return glow


def mistakes_sheet(table, probabilities, thresholds, count=24):
    """Draw the images with mistakes, the most confident mistakes first, as a PIL image.

    Args: table: a LabelTable of N images; probabilities (N, C); thresholds (C,) or (N, C); count: at
    most so many images are drawn (24: four rows of six).
    """
    # A mistake is as confident as the probability of what was predicted: p for a false alarm, 1 - p
    # for a missed label. An image ranks by its most confident mistake.
    thresholds = np.broadcast_to(thresholds, probabilities.shape)
    predicted = probabilities >= thresholds
    wrong = ~np.isnan(table.targets) & (predicted != (table.targets == 1))
    confidence = np.where(wrong, np.where(predicted, probabilities, 1 - probabilities), 0).max(axis=1)
    rows = np.flatnonzero(wrong.any(axis=1))
    title = f"{len(rows)} of {len(table)} images have a mistake"
    if len(rows):
        title += "; the most confident ones first"

    names = dataset.picture_names(table.classes)
    cells = []
    for row in rows[np.argsort(-confidence[rows], kind="stable")][:count]:
        # The mistakes of one image are listed by how far they are beyond the threshold.
        distance = abs(probabilities[row] - thresholds[row])
        mistakes = np.flatnonzero(wrong[row])
        mistakes = mistakes[np.argsort(-distance[mistakes], kind="stable")]
        lines = _describe_mistakes(table, row, names, probabilities[row], predicted[row], mistakes)
        with contextlib.suppress(ImageError):  # the file was readable a moment ago
            image = dataset.load_image(table.paths[row], within=200)  # the width of a cell
            cells.append((image, lines))
    return dataset.draw_sheet(cells, title)


def _describe_mistakes(table, row, names, probabilities, predicted, mistakes):
    """Return the lines below an image of mistakes_sheet(), as (text, colour)."""
    lines = [(table.ids[row], dataset.BLACK)]
    for c in mistakes[:6]:  # more lines would make the text longer than the picture
        if predicted[c]:
            lines.append((f"+ false alarm: {names[c]} {probabilities[c]:.2f}", dataset.RED))
        else:
            lines.append((f"- missed: {names[c]} {probabilities[c]:.2f}", dataset.BLUE))
    if len(mistakes) > 6:
        lines.append((f"and {len(mistakes) - 6} more mistakes", dataset.GREY))

    targets = table.targets[row]
    for title, chosen in (("true", targets == 1), ("predicted", predicted)):
        lines.append((f"{title}: {dataset.list_names(names, chosen) or 'none'}", dataset.GREY))
    if np.isnan(targets).any():
        lines.append((f"NA: {dataset.list_names(names, np.isnan(targets))}", dataset.GREY))
    return lines


# --------------------------------------------------------------------------------------------------
# The review page


REVIEW_CARDS = 200  # as many as a person answers in a quarter of an hour
REVIEW_BYTES = 5_000_000  # of the page: small enough to mail, and to open on a phone
REVIEW_SIDES = (960, 640, 480, 360, 280, 200, 140)  # pixels of the longer side of the images
REVIEW_GENERATOR = "inference.py, review page"  # marks a page as ours: a later run may replace it
GLOW_SIDE = 28  # pixels of heatmaps on the page, which come from 7 x 7 cells


def write_review(path, questions, heat=None, title="Review labels"):
    """Write a page on which a person answers questions about single labels, as one HTML file.

    The page contains the images, and needs no other file and no network. A person downloads the
    answers from it as answers.csv, which dataset.read_answers() reads.

    Args:
        path: the HTML file. Of existing files, only an earlier review page is replaced.
        questions: a list of dataset.Question, of which the first REVIEW_CARDS are on the page.
        heat: None, or a function that takes the path of an image and a list of L labels, and
            returns their heatmaps, as heatmaps() does: float32 (L, S, S), all 0 where no region was
            found.
        title: the heading of the page.

    Raises InputError if another file would be replaced.
    """
    refuse_other_page(path)

    # An image is embedded once, even if several cards show it.
    cards = questions[:REVIEW_CARDS]
    places = {file: i for i, file in enumerate(dict.fromkeys(card.path for card in cards))}
    with ThreadPoolExecutor(default_workers()) as pool:
        encoded = pool.map(_encode_image, places)
        images = list(dataset.watched("encoding images", encoded, len(places)))

    rows = [[*card.cells()[:4], places[card.path], _storage_key(card)] for card in cards]
    for file, place in dataset.watched("drawing heatmaps", places.items()):
        readable = images[place][1]
        if heat and readable:
            own = [row for row in rows if row[4] == place]
            for row, values in zip(own, heat(file, [row[1] for row in own])):
                row.append(_encode_heat(values))

    # Images are as large as the limit allows. Photographs of 200 cards mostly get 360 pixels, and
    # noise, which compresses worst, 280, so the smallest sizes are a reserve.
    data = {"title": title, "total": len(questions), "cards": rows}
    for side in REVIEW_SIDES:
        data["images"] = [{"ratio": ratio, "file": files.get(side), "reason": reason}
                          for ratio, files, reason in images]
        page = REVIEW_PAGE.replace("{{DATA}}", _to_script(data))
        if len(page) <= REVIEW_BYTES:
            break
    dataset.write_text(path, [page])


def _storage_key(card):
    """Return the name under which a browser keeps the answer to a Question."""
    # The question itself, so that a page of a later run still shows what was answered.
    question = [os.path.realpath(card.path), card.label, *card.cells()[2:3]]
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]


def refuse_other_page(path):
    """Raise InputError if there is a file at `path` that is not a page of write_review()."""
    if os.path.isdir(path) or (os.path.isfile(path) and not _is_review(path)):
        raise InputError(f"{path} exists and is not a review page: name another --out")


def _is_review(path):
    """Return True if a file is a page that write_review() wrote."""
    try:
        with open(path, "rb") as file:
            return f'name="generator" content="{REVIEW_GENERATOR}"'.encode() in file.read(1000)
    except OSError:
        return False


def _encode_image(path):
    """Encode an image as JPEG files of all REVIEW_SIDES, or tell why it cannot be read.

    Returns: width / height, {side: base64}, which is empty if it cannot be read, and the reason.
    """
    try:
        image = dataset.load_image(path, within=REVIEW_SIDES[0])
    except ImageError as error:
        reason = str(error).removeprefix(f"{dataset.image_name(path)}: ")
        return 4 / 3, {}, reason

    ratio = image.width / image.height
    files = {}
    for side in REVIEW_SIDES:
        image.thumbnail((side, side), Image.Resampling.BILINEAR)
        files[side] = _to_base64(image, "JPEG", quality=75, comment="")  # Pillow keeps comments
    return ratio, files, ""


def _encode_heat(heat):
    """Encode a heatmap as a small transparent PNG file in base64, or as "" if it is all 0."""
    if not heat.any():
        return ""
    small = Image.fromarray(heat).resize((GLOW_SIDE, GLOW_SIDE), Image.Resampling.BILINEAR)
    return _to_base64(_glow(np.asarray(small)), "PNG", optimize=True)


def _to_base64(image, kind, **options):
    """Return a PIL image as an image file in base64. options: those of Image.save()."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def _to_script(value):
    """Return a value as ASCII JSON that no browser takes for markup, whatever the names in it."""
    text = json.dumps(value)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


# In a notebook the page is part of another document, so its classes start with lr-, it has no ids
# and no styles for html or body, and data-lm-suppress-shortcuts keeps JupyterLab's own keys away.
REVIEW_PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{{GENERATOR}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Review labels</title>
<style>
.lr-page {
  --ink: #1b1e22; --muted: #59616b; --paper: #fff; --panel: #f1f3f5; --line: #c9ced4;
  --accent: #1a5fb4; --on-accent: #fff;
  color-scheme: light dark; box-sizing: border-box; height: 680px; padding: 10px 16px;
  display: flex; flex-direction: column; gap: 8px; outline: none;
  font: 16px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--paper);
}
@media (prefers-color-scheme: dark) {
  .lr-page { --ink: #e7eaee; --muted: #a3acb7; --paper: #15181b; --panel: #22262b; --line: #454c54;
    --accent: #8ab8f2; --on-accent: #10151b; }
}
/* A page of its own fills the window; the frames of notebooks grow with their content instead. */
.lr-alone { position: fixed; inset: 0; height: auto; overflow: auto; }

.lr-page * { box-sizing: border-box; }
.lr-page [hidden] { display: none; }
.lr-page p, .lr-page h1, .lr-page h2 { margin: 0; }
.lr-page button, .lr-page select { min-height: 44px; padding: 0 14px; border: 1px solid var(--line);
  border-radius: 8px; font: inherit; color: var(--ink); background: var(--panel); }
.lr-page button { cursor: pointer; touch-action: manipulation; }
.lr-page button:disabled { opacity: .45; cursor: default; }
.lr-page button[aria-pressed=true], .lr-end button {
  color: var(--on-accent) !important; background: var(--accent) !important; }
.lr-page :focus-visible:not(main) { outline: 3px solid var(--accent); outline-offset: 2px; }
.lr-page kbd { margin-left: 8px; padding: 0 4px; border: 1px solid; border-radius: 4px;
  font: 12px ui-monospace, monospace; color: inherit; background: none; pointer-events: none; }
@media (pointer: coarse) { .lr-page kbd { display: none; } }

.lr-head { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 12px; }
.lr-head h1 { font-size: 16px; font-weight: 600; }
.lr-head select { max-width: 13em; text-overflow: ellipsis; }
.lr-head .lr-progress { margin-right: auto; }
.lr-track { height: 3px; flex: none; background: var(--line); }
.lr-bar { height: 100%; background: var(--accent); }
.lr-body { flex: 1; min-height: 0; display: flex; flex-direction: column; gap: 8px; }

/* The stage takes what the rest leaves. The frame is the largest box in it that has the shape of
   the image; the heatmap, which is square, is stretched to it. */
.lr-stage { flex: 1; min-height: 120px; display: grid; place-items: center; container-type: size; }
.lr-frame { position: relative; aspect-ratio: var(--ratio);
  width: min(100cqw, 100cqh * var(--ratio)); }
.lr-frame img { position: absolute; width: 100%; height: 100%; }
.lr-gray { filter: grayscale(1); }
.lr-frame p { height: 100%; display: grid; place-items: center; padding: 16px; text-align: center;
  background: var(--panel); }

.lr-side { display: flex; flex-direction: column; justify-content: center; gap: 8px; }
.lr-card { text-align: center; overflow-wrap: anywhere; }
.lr-card h2 { font-size: 22px; font-weight: 400; line-height: 1.25; }
.lr-card span { display: inline-block; margin: 0 8px; color: var(--muted); }
.lr-card b { font-weight: 600; white-space: nowrap; color: var(--ink); }
.lr-card .lr-name { font-size: 13px; color: var(--muted); }
.lr-row { display: flex; gap: 8px; width: 100%; max-width: 640px; margin: 0 auto; }
.lr-row button { flex: 1 0 0; padding: 0 2px; }
.lr-answers button { min-height: 54px; font-weight: 600; }
.lr-side footer { font-size: 12px; text-align: center; color: var(--muted); }

.lr-end { flex: 1; display: flex; flex-direction: column; align-items: center;
  justify-content: center; gap: 14px; text-align: center; }
.lr-end pre { margin: 0; padding: 12px; max-width: 100%; text-align: left; white-space: pre-wrap;
  font: 13px/1.6 ui-monospace, monospace; color: var(--ink); background: var(--panel); }

@media (max-width: 900px) { .lr-head h1 { display: none; } }
@media (max-width: 600px) {
  .lr-page .lr-head p, .lr-page .lr-head button { font-size: 14px; }
  .lr-head select { order: 1; flex: 1 0 40%; min-width: 0; padding: 0 6px; }
}
@media (max-height: 520px) and (min-width: 600px) {  /* a phone on its side */
  .lr-alone .lr-body { flex-direction: row; }
  .lr-alone .lr-body > * { flex: 1; }
}
</style>
</head>
<body>
<main class="lr-page" tabindex="-1" data-lm-suppress-shortcuts="true">
  <header class="lr-head">
    <h1 class="lr-title"></h1>
    <p class="lr-progress" role="status"></p>
    <select class="lr-kind" aria-label="kind"></select>
    <select class="lr-class" aria-label="class"></select>
    <button type="button" data-do="download">Download answers.csv</button>
  </header>
  <noscript>This page needs JavaScript: open the file in a browser.</noscript>
  <div class="lr-track"><div class="lr-bar"></div></div>
  <p class="lr-note" role="note">This browser does not save your answers: download them before closing the page.</p>

  <div class="lr-body">
    <div class="lr-stage">
      <div class="lr-frame">
        <img class="lr-photo"><img class="lr-heat"><p class="lr-reason"></p>
      </div>
    </div>
    <div class="lr-end">
      <h2 class="lr-result" aria-live="polite"></h2>
      <button type="button" data-do="download">Download answers.csv</button>
      <p>Merge the answers into a new label file, or train with them right away:</p>
      <pre>python dataset.py DATA --answers answers.csv --out labels_new.csv
python train.py --data DATA --answers answers.csv</pre>
    </div>

    <div class="lr-side">
      <div class="lr-card" aria-live="polite">
        <h2>Is <strong class="lr-label"></strong> present?</h2>
        <p><span>the file says: <b class="lr-given"></b></span>
          <span>the network says: <b class="lr-guess"></b></span></p>
        <p class="lr-name"></p>
      </div>
      <div class="lr-row lr-answers">
        <button type="button" data-do="present">present<kbd>1</kbd></button>
        <button type="button" data-do="absent">absent<kbd>0</kbd></button>
        <button type="button" data-do="unknown">unknown<kbd>u</kbd></button>
      </div>
      <div class="lr-row">
        <button type="button" data-do="back">back<kbd>&larr;</kbd></button>
        <button type="button" data-do="clear">clear<kbd>c</kbd></button>
        <button type="button" data-do="heatmap">heatmap<kbd>h</kbd></button>
        <button type="button" data-do="skip">skip<kbd>&rarr;</kbd></button>
      </div>
      <footer>This file contains the images. <span class="lr-total"></span></footer>
    </div>
  </div>
  <script type="application/json" class="lr-data">{{DATA}}</script>
</main>
<script>
(() => {
  "use strict";

  // A notebook may show several pages, and runs the script of each after adding its elements.
  const page = [...document.querySelectorAll(".lr-page:not(.lr-started)")].pop();
  const alone = page.parentElement === document.body;
  page.classList.add("lr-started", ...(alone ? ["lr-alone"] : []));
  const find = name => page.querySelector(".lr-" + name);
  const button = name => page.querySelector(`[data-do=${name}]`);

  const data = JSON.parse(find("data").textContent);
  const cards = data.cards.map(([name, label, given, probability, image, key, heat]) =>
    ({name, label, given, probability, image: data.images[image], key, heat, answer: ""}));
  const kindOf = one => one.given === "NA" ? "questions" : "suspects";
  const words = new Map([["1", "present"], ["0", "absent"], ["NA", "unknown"]]);

  let shown = cards;  // the cards that the filters let through
  let card = null;  // the current card; null on the end screen
  let trail = [];  // the cards that were current before it
  let heated = false;  // true while heatmaps are wanted
  let pressed = 0;  // when a button was last pressed, in milliseconds
  let kept = false;  // true if the browser keeps the answers
  let unsaved = false;  // true if there are answers that were not downloaded

  function start() {
    find("title").textContent = data.title;
    if (alone) document.title = data.title;
    if (data.total > cards.length) {
      find("total").textContent = `Showing the first ${cards.length} of ${data.total} questions.`;
    }
    addOptions(find("kind"), "all kinds", cards.map(kindOf));
    addOptions(find("class"), "all classes", cards.map(one => one.label));
    find("kind").hidden = new Set(cards.map(kindOf)).size < 2;
    button("heatmap").hidden = !cards.some(one => one.heat);

    load();
    save();  // tells whether the browser keeps anything
    filter();
    render();
    if (alone) focus();  // in a notebook, somebody may be typing
  }

  function addOptions(select, all, values) {
    select.append(new Option(`${all} (${values.length})`));
    for (const value of [...new Set(values)].sort()) {
      const count = values.filter(other => other === value).length;
      select.append(new Option(`${value} (${count})`, "=" + value));  // "=" tells it from "all"
    }
  }

  // Answers in the browser, each under the key of its question, so that the page of a later run
  // shows them too. localStorage may be missing, switched off or full, or hold anything.
  function load() {
    try {
      for (const one of cards) {
        const answer = localStorage.getItem("label-review " + one.key);
        one.answer = words.has(answer) ? answer : "";
      }
    } catch { }
  }

  function save(changed = cards) {
    try {
      for (const one of changed) localStorage.setItem("label-review " + one.key, one.answer);
      kept = true;
    } catch {
      kept = false;
    }
  }

  // What the buttons do
  const actions = {present: () => answer("1"), absent: () => answer("0"),
    unknown: () => answer("NA"), clear: () => answer(""), skip, back,
    heatmap: () => { heated = !heated; }, download};

  function answer(value) {
    card.answer = value;
    unsaved = true;
    save([card]);
    if (value) skip();
  }

  function skip() {
    const place = shown.indexOf(card);
    trail.push(card);
    card = [...shown.slice(place + 1), ...shown.slice(0, place)].find(one => !one.answer) || null;
  }

  function back() {
    card = previous();
    trail.pop();
  }

  function previous() {
    const place = card ? shown.indexOf(card) : shown.length;
    return trail[trail.length - 1] || shown[place - 1];
  }

  function filter() {
    const [kind, label] = ["kind", "class"].map(name => find(name).value);
    shown = cards.filter(one => (!kind.startsWith("=") || kind === "=" + kindOf(one))
      && (!label.startsWith("=") || label === "=" + one.label));
    trail = [];
    card = shown.find(one => !one.answer) || null;
  }

  function download() {
    const quote = text => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const rows = [["ID", "label", "given", "probability", "answer"], ...cards.map(one =>
      [one.name, one.label, one.given, one.probability, one.answer])];
    const text = rows.map(row => row.map(quote).join(",") + "\n").join("");

    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
    link.download = "answers.csv";
    link.click();
    unsaved = false;
  }

  // Show the current card, or the end screen.
  function render() {
    const done = cards.filter(one => one.answer).length;
    find("progress").textContent = `${done} of ${cards.length} answered`;
    find("bar").style.width = `${100 * done / (cards.length || 1)}%`;
    find("note").hidden = kept;

    find("stage").hidden = find("card").hidden = find("answers").hidden = !card;
    find("end").hidden = Boolean(card);
    for (const [value, name] of words) {
      button(name).disabled = !card;
      button(name).setAttribute("aria-pressed", Boolean(card) && card.answer === value);
    }
    button("clear").disabled = !card || !card.answer;
    button("skip").disabled = !card;
    button("back").disabled = !previous();
    button("heatmap").disabled = !card || !card.heat;
    button("heatmap").title = button("heatmap").disabled ? "the network sees it nowhere" : "";
    card ? renderCard() : renderEnd();
  }

  function renderCard() {
    // No word of its own such as "absent": that would take the model's threshold.
    const percent = Math.round(100 * card.probability);
    const guess = percent < 1 ? "under 1%" : percent > 99 ? "over 99%" : `${percent}%`;
    find("label").textContent = card.label;
    find("given").textContent = words.get(card.given);
    find("guess").textContent = `${guess} present`;
    find("name").textContent = card.name;

    const {ratio, file, reason} = card.image, glows = Boolean(heated && card.heat);
    find("frame").style.setProperty("--ratio", ratio);
    find("reason").hidden = Boolean(file);
    find("reason").textContent = `This image cannot be shown: ${reason}`;
    show(find("photo"), file && "data:image/jpeg;base64," + file, card.name);
    show(find("heat"), glows && "data:image/png;base64," + card.heat, `heatmap of ${card.label}`);
    find("photo").classList.toggle("lr-gray", glows);
    button("heatmap").setAttribute("aria-pressed", heated);
  }

  function show(picture, source, text) {
    picture.hidden = !source;
    picture.alt = text;
    if (source) picture.src = source;
  }

  function renderEnd() {
    const count = shown.length, open = shown.filter(one => !one.answer).length;
    const all = count === 1 ? "The only one is" : `All ${count} are`;
    const others = count < cards.length ? "choose others above, or " : "";
    find("result").textContent = !count ? "There is nothing to answer here"
      : open ? `${count - open} of ${count} are answered: "back" shows the one that is left`
      : `${all} answered: ${others}download the answers`;
  }

  // Buttons and keys. A key presses its button, so that it works where the button does.
  page.addEventListener("click", event => {
    const action = event.target.closest("button") && actions[event.target.dataset.do];
    if (!action) return;
    // The second click of a double click would answer a card that nobody has seen.
    if (event.detail > 1 && event.timeStamp - pressed < 300) return;
    pressed = event.timeStamp;
    action();
    render();

    // If the pressed button is now hidden or disabled, the page gets the focus, so that keys still work.
    const focused = document.activeElement;
    if (!page.contains(focused) || focused.disabled || focused.closest("[hidden]")) focus();
  });

  const keys = {1: "present", y: "present", p: "present", 0: "absent", n: "absent", a: "absent",
    u: "unknown", "?": "unknown", ArrowLeft: "back", b: "back", ArrowRight: "skip", s: "skip",
    c: "clear", h: "heatmap"};

  (alone ? document : page).addEventListener("keydown", event => {
    const name = keys[event.key] || keys[event.key.toLowerCase()];  // for Caps Lock
    if (!name || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.repeat || event.target.closest("select")) return;  // selects take letters themselves
    event.preventDefault();
    event.stopPropagation();  // a notebook has keys of its own
    button(name).click();
  });

  function focus() {
    page.focus({preventScroll: true});
  }

  for (const name of ["kind", "class"]) {
    find(name).addEventListener("change", () => {
      filter();
      render();
      focus();  // else the next key would choose another option
    });
  }

  window.addEventListener("storage", () => { load(); render(); });  // answers in another tab
  window.addEventListener("beforeunload", event => {
    if (unsaved && !kept) event.preventDefault();
  });
  start();
})();
</script>
</body>
</html>
""".replace("{{GENERATOR}}", REVIEW_GENERATOR)


# --------------------------------------------------------------------------------------------------
# Charts


COLOURS = ["#1f6fb4", "#e07b00", "#b9d3ea"]  # blue, orange, and a light blue for the background
INK = "#333333"


def pr_curves(targets, probabilities, thresholds, classes, most=20):
    """Draw the precision-recall curve of each class on val, as a PIL image.

    Args: targets (N, C) with 1, 0 and NaN; probabilities (N, C); thresholds (C,), which are marked;
    most: at most so many classes are drawn, the worst ones (20: five rows of four).
    """
    import metrics  # here, not at the top: a deployed model goes without it

    scores = metrics.average_precision(targets, probabilities, None)
    names = dataset.picture_names(classes)
    shown = range(len(classes))
    title = "Precision and recall on val"
    if len(classes) > most:
        shown = np.argsort(scores, kind="stable")[:most]
        title += f"; the {most} of {len(classes)} classes with the lowest average precision"

    charts = []
    for c in shown:
        truth = targets[:, c]
        positives = int(np.nansum(truth))
        line, marks = ("no known positive", [], [], COLOURS[0]), []
        if positives:
            precision, recall, cuts = metrics.precision_recall_curve(truth, probabilities[:, c])
            line = (f"AP {scores[c]:.3f}, {positives} positives", recall, precision, COLOURS[0])
            marks = [(recall[np.searchsorted(cuts, thresholds[c])], f"threshold {thresholds[c]:.2f}")]
        name = metrics.shorten(names[c], 34)  # characters that fit above a chart of 300 pixels
        charts.append(draw_chart([line], name, "recall", "precision", (300, 280), marks))
    return stack_charts(charts, 4, title)


def reliability_chart(targets, probabilities):
    """Draw how often labels are present, by predicted probability, as a PIL image."""
    import metrics  # here, not at the top: a deployed model goes without it

    mean, share, _ = metrics.reliability_curve(targets, probabilities)
    series = [("ideal", [0, 1], [0, 1], COLOURS[2]), ("all labels", mean, share, COLOURS[0])]
    return draw_chart(series, "Reliability", "predicted probability", "observed frequency", (480, 420))


def draw_chart(series, title, x_label, y_label, size=(900, 420), marks=()):
    """Draw a line chart, as a PIL image of the given size.

    Args: series: (name, x values, y values, colour) for each line, of which points that are not
    finite are left out; marks: (x, text) for each vertical line.
    """
    lines = []
    for _, xs, ys, _ in series:
        points = np.array([xs, ys], float).T
        lines.append(points[np.isfinite(points).all(axis=1)])
    points = np.concatenate(lines)
    if not len(points):
        points = np.array([(0, 0), (1, 1)])
    count = size[1] // 70  # a tick every 70 pixels
    x_ticks, y_ticks = (_ticks(values.min(), values.max(), count) for values in points.T)

    # Pillow's lines are jagged, so the chart is drawn twice as large, and shrunk at the end. The
    # margins leave room for the title, the legend and the numbers and names of the axes.
    width, height = 2 * size[0], 2 * size[1]
    left, top, right, bottom = 132, 116, width - 48, height - 104
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def to_x(values):
        return np.interp(values, (x_ticks[0], x_ticks[-1]), (left, right))

    def to_y(values):
        return np.interp(values, (y_ticks[0], y_ticks[-1]), (bottom, top))

    # The anchor is Pillow's: "rm" puts the right end of the text at x, and its middle at y. The white
    # border keeps lines from running through the text.
    def write(x, y, text, anchor, points=26):
        font = dataset.load_font(points, text)
        pen.text((x, y), text, INK, font, anchor, stroke_width=4, stroke_fill="white")

    # The grid is only horizontal, since values are read along it; the x axis has short marks.
    for y, value in zip(to_y(y_ticks), y_ticks):
        pen.line([(left, y), (right, y)], fill="#e4e4e4", width=2)
        write(left - 16, y, f"{value:g}", "rm")
    for x, value in zip(to_x(x_ticks), x_ticks):
        pen.line([(x, bottom), (x, bottom + 10)], fill=INK, width=2)
        write(x, bottom + 18, f"{value:g}", "mt")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=2)

    # The last series is drawn first, so that the first one ends up on top of the others and, as the
    # legend is written from right to left, at its beginning.
    legend = right
    for (name, _, _, colour), points in reversed(list(zip(series, lines))):
        line = np.column_stack([to_x(points[:, 0]), to_y(points[:, 1])])
        if len(line) > 4 * width:
            line = _thin_out(line)
        line = list(map(tuple, line.tolist()))
        pen.line(line, fill=colour, width=4, joint="curve")
        for x, y in line if len(line) <= 40 else []:  # more dots would merge into a thick line
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)

        write(legend, top - 28, name, "rm")  # the name, and to the left of it a piece of line
        legend -= pen.textlength(name, font=dataset.load_font(26, name)) + 12
        pen.line([(legend - 40, top - 28), (legend, top - 28)], fill=colour, width=6)
        legend -= 68

    # Texts of neighbouring marks stand at different heights, and on the side with more room, so
    # that they neither overlap nor leave the chart.
    for i, (value, text) in enumerate(sorted(marks)):
        x = to_x(value)
        pen.line([(x, top), (x, bottom)], fill="#888888", width=2)
        y = bottom - 16 - 36 * (i % 8)  # a text is 36 high with its gap, and eight fit
        near_end = x > (left + right) / 2
        write(x - 12 if near_end else x + 12, y, text, "rb" if near_end else "lb")

    write(width / 2, 32, title, "mm", 30)
    write((left + right) / 2, height - 28, x_label, "mm", 30)
    write(16, top - 28, y_label, "lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def _thin_out(line):
    """Return a line (N, 2) with two points for each column of pixels: its lowest and highest there.

    The picture of a million points stays the same, but is drawn much faster.
    """
    xs, ys = line.T
    starts = np.flatnonzero(np.diff(xs.astype(int), prepend=-1))  # where the line enters a column
    low, high = np.minimum.reduceat(ys, starts), np.maximum.reduceat(ys, starts)
    return np.column_stack([xs[starts], low, xs[starts], high]).reshape(-1, 2)


def _ticks(low, high, count):
    """Return about `count` round numbers that enclose a range: 0, 0.2, 0.4, 0.6 for 0.1 to 0.58."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a single value would have steps of 0
        low, high = low - 0.5, high + 0.5

    # The step is the next larger number of the form 1, 2 or 5 times a power of ten.
    rough = (high - low) / count
    base = 10 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough)
    digits = max(0, -math.floor(math.log10(step)))

    # 1e-9, since 0.3 / 0.1 is 2.9999999999999996.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, digits) for k in range(first, last + 1)]


def stack_charts(charts, columns, title=""):
    """Arrange charts of the same size in rows under a title, as a PIL image."""
    width, height = charts[0].size
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    top = 40 if title else 0  # room for a line of text
    image = Image.new("RGB", (columns * width, top + rows * height), "white")
    ImageDraw.Draw(image).text((14, 12), title, "black", dataset.load_font(16))
    for place, chart in enumerate(charts):
        row, column = divmod(place, columns)
        image.paste(chart, (column * width, top + row * height))
    return image


if __name__ == "__main__":
    dataset.run_command(main)
