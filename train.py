"""Fine-tune an image network on labels that may be unknown.

    python train.py --data data/                              # ImageNet weights, data/labels.txt, data/images/
    python train.py --data data/ --weights none --epochs 50   # from scratch
    python train.py --demo                                    # drawn data, no network needed
    python train.py --data data/ --resume                     # go on where a run was stopped
    torchrun --standalone --nproc-per-node=2 train.py --data data/      # several GPUs, or processes on a CPU

    report = train.main(["--data", "data/", "--epochs", "10"])     # in a notebook; inference.py uses the model

A run reads the labels, divides them, trains with a masked loss, keeps the epoch that is best on val, chooses a
threshold per class on val and reports on test. All its files are in --out.
"""

import argparse
import atexit
import contextlib
import hashlib
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import distributed, nn

import dataset
import inference
import metrics
from dataset import InputError
from inference import BACKBONES, HEADS

# What --demo changes: small drawn images, and no pretrained weights to start from, for which another rate is best.
DEMO = {"data": "data/demo", "weights": "none", "size": 96, "epochs": 18, "augment": "flip,vflip", "lr": 1e-3,
        "pos_weight": "none"}

# Published recipes as defaults of the options; the README says what each reproduces.
PRESETS = {
    "default": {},
    "inspection": {
        "backbone": "resnet18", "head": "linear", "train_layers": "all", "lr": 1e-3, "wd": 0.0, "batch_size": 16,
        "epochs": 10, "schedule": "constant", "monitor": "loss", "patience": 3, "pos_weight": "sqrt",
        "pos_weight_clip": [1, 20], "augment": "flip,rotation", "thresholds": "pr_curve", "max_threshold": 0.8,
    },
    "two-stage": {
        "backbone": "resnet18", "head": "mlp", "dropout": [0.5, 0.3], "train_layers": "head", "unfreeze": "layer4",
        "unfreeze_epoch": 3, "lr": 2e-3, "lr_backbone": 1e-4, "wd": 0.0, "batch_size": 16, "epochs": 50,
        "schedule": "constant", "monitor": "loss", "patience": 5, "pos_weight": "linear", "pos_weight_clip": [0, 100],
        "augment": "crop,flip,jitter,perspective,erasing", "thresholds": "0.5",
    },
    "assignment": {
        "backbone": "resnet18", "head": "linear", "train_layers": "all", "lr": 1e-3, "wd": 0.0, "epochs": 10,
        "schedule": "constant", "monitor": "loss", "patience": 0, "pos_weight": "linear", "pos_weight_clip": [0, 100],
        "augment": "none", "thresholds": "0.5", "plot_title": "Aimonk_multilabel_problem",
    },
    "resnet50": {
        "backbone": "resnet50", "head": "mlp", "dropout": [0.65, 0.4], "train_layers": "layer3,layer4,head",
        "lr": 5e-5, "wd": 1e-2, "epochs": 40, "schedule": "constant", "monitor": "loss", "patience": 5,
        "pos_weight": "linear", "pos_weight_clip": [0, 100],
        "augment": "resized_crop,flip,vflip,jitter,rotation,erasing", "thresholds": "0.5",
    },
    "coco": {
        "head": "bn", "train_layers": "head", "unfreeze": "all", "lr": 1e-3, "wd": 0.0, "schedule": "multistep",
        "monitor": "f1", "pos_weight": "linear", "pos_weight_clip": [0, 100], "augment": "flip",
        "thresholds": "global",
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Options


def option_parser():
    """The options of the command line, with their defaults."""
    parser = dataset.ArgumentParser(usage="%(prog)s [--data DIR | --demo] [--preset NAME] [options]",
                                    description="Fine-tune an image network on labels that may be unknown.")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data", metavar="DIR", help="folder of labels and images")
    add("--labels", metavar="FILE", help="label file, when it is not found by looking")
    add("--images", metavar="DIR", help="image folder, when it is not DATA/images or DATA")
    add("--label-groups", metavar="FILE", help="JSON file {group: [class, ...]}; DATA/label_groups.json when there")
    add("--split", type=float, nargs=3, default=[0.7, 0.15, 0.15], metavar=("TRAIN", "VAL", "TEST"), help="ratios")
    add("--split-method", choices=("stratified", "random"), default="stratified", help="how rows are divided")
    add("--group", metavar="COLUMN", help="column of the physical object shown: its images stay in one split")
    add("--demo", action="store_true", help="write drawn data (data/demo) when not there, and train on it from scratch")
    add("--seed", type=int, default=0, help="of the split, the initial head, the order and the augmentation")
    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=BACKBONES, default="resnet18", help="torchvision network")
    add("--head", choices=HEADS, default="linear", help="what replaces its last layer")
    add("--dropout", type=float, nargs="+", metavar="P", help="in the head; mlp takes two (mlp: 0.5 0.3, else 0)")
    add("--weights", default="imagenet", metavar="W", help="imagenet, none, or a .pth file, loaded where it fits")
    add("--size", type=int, default=224, help="images are resized to SIZE x SIZE")
    add = parser.add_argument_group("recipe").add_argument
    add("--preset", choices=PRESETS, default="default", help="a published recipe: defaults for the other options")
    add("--epochs", type=int, default=20, help="at most")
    add("-b", "--batch-size", type=int, default=16, help="images per step")
    add("--lr", type=float, default=3e-4, help="learning rate of the head")
    add("--lr-backbone", type=float, help="learning rate of the backbone (default: that of the head)")
    add("--wd", type=float, default=1e-2, help="weight decay of AdamW; 0 makes it Adam")
    add("--schedule", choices=("constant", "cosine", "multistep"), default="cosine", help="of the learning rates")
    add("--milestones", type=int, nargs="+", metavar="EPOCH", help="of multistep (default: half and 3/4 of the epochs)")
    add("--lr-decay", type=float, default=0.1, help="factor at each milestone")
    add("--train-layers", default="all", metavar="LAYERS", help="all, head, or names such as layer3,layer4,head")
    add("--unfreeze", metavar="LAYERS", help="layers to train too from --unfreeze-epoch on")
    add("--unfreeze-epoch", type=int, default=3, metavar="N", help="counted from 1")
    add("--augment", default="light", metavar="A", help=f"none, light, rich, or a list: {','.join(dataset.OPERATIONS)}")
    add = parser.add_argument_group("imbalance").add_argument
    add("--pos-weight", choices=("none", "linear", "sqrt"), default="sqrt", help="weight of positives in the loss")
    add("--pos-weight-clip", type=float, nargs=2, default=[1, 20], metavar=("LO", "HI"), help="its bounds")
    add = parser.add_argument_group("stopping").add_argument
    add("--monitor", choices=("loss", "f1", "map"), default="map", help="what is best on val (f1: weighted)")
    add("--patience", type=int, default=10, help="validations without improvement before stopping; 0 never stops")
    add("--min-delta", type=float, default=0.0, help="what counts as an improvement")
    add("--val-every", type=int, default=1, metavar="N", help="epochs from one validation to the next")
    add("--train-metrics-every", type=int, default=0, metavar="N", help="epochs between metrics on train; 0 never")
    add = parser.add_argument_group("thresholds").add_argument
    add("--thresholds", default="pr_curve", metavar="METHOD", help="pr_curve, grid, global, or a number")
    add("--max-threshold", type=float, default=0.8, metavar="T", help="a threshold above it becomes 0.5")
    add = parser.add_argument_group("output").add_argument
    add("--out", default="outputs", metavar="DIR", help="folder for everything the run writes")
    add("--plot-title", default="", metavar="TEXT", help="over loss_curve.png")
    add("--export-splits", metavar="DIR", help="copy the images into DIR/images/train, val and test")
    add("--registry", metavar="DIR", help="keep the best run of each backbone and configuration there, by weighted F1")
    add("--tensorboard", action="store_true", help="write scalars for TensorBoard too (package tensorboard)")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add = parser.add_argument_group("system").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("-j", "--workers", type=int, default=inference.default_workers(), help="threads that decode images")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 where it is fast")
    add("--cache", default="auto", metavar="GB", help="decoded images kept in memory: auto, off, or gigabytes")
    add("--resume", action="store_true", help="go on from OUT/last.pth")
    return parser


def parse_options(argv=None):
    """The command line -> argparse.Namespace. An explicit option wins over --preset, that over --demo."""
    parser = option_parser()
    first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**(DEMO if first.demo else {}) | PRESETS[first.preset])
    options = parser.parse_args(argv)
    check_options(options)
    return options


def check_options(options):
    """Turn words into values, and refuse values that cannot work. Raises InputError."""
    positive = dict.fromkeys(("epochs", "batch_size", "size", "val_every", "unfreeze_epoch", "milestones"), 1)
    dataset.check_numbers(options, positive | dict.fromkeys((
        "lr", "lr_backbone", "wd", "lr_decay", "dropout", "pos_weight_clip", "max_threshold", "patience",
        "train_metrics_every", "workers", "seed"), 0))
    if max(options.dropout or [0]) >= 1:
        raise InputError(f"--dropout {max(options.dropout)}: it must be below 1")
    if options.pos_weight_clip[0] > options.pos_weight_clip[1]:
        raise InputError("--pos-weight-clip takes the lower bound first")
    dataset.read_operations(options.augment)
    if options.thresholds not in ("pr_curve", "grid", "global"):
        try:
            options.thresholds = float(options.thresholds)
        except ValueError:
            raise InputError(f"--thresholds {options.thresholds}: use pr_curve, grid, global or a number") from None
    options.lr_backbone = options.lr if options.lr_backbone is None else options.lr_backbone
    options.dropout = options.dropout or HEADS[options.head]
    options.milestones = options.milestones or [options.epochs // 2, options.epochs * 3 // 4]


def free_memory():
    """Bytes of memory that are free now, for this container when it is limited; 4 GiB where nothing tells."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():
        return 4 * 2**30
    free = int(meminfo.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)


def cache_bytes(cache):
    """--cache -> bytes. auto is half of the memory that is free now, divided by the processes on this machine."""
    if cache == "off":
        return 0
    if cache != "auto":
        try:
            return max(0.0, float(cache)) * 2**30
        except ValueError:
            raise InputError(f"--cache {cache}: use auto, off, or a number of gigabytes") from None
    return free_memory() / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def masked_bce(logits, targets, pos_weight):
    """Binary cross-entropy over the known labels -> (sum, number of known labels), both scalars.

    logits (B, C); targets (B, C) with 1, 0 and NaN, which counts for nothing; pos_weight (C,) multiplies the loss of
    positives. The mean is sum / number; with no known label both are 0.
    """
    known = ~torch.isnan(targets)
    bce = nn.functional.binary_cross_entropy_with_logits
    loss = bce(logits, torch.where(known, targets, 0.0).to(logits.dtype), pos_weight=pos_weight.to(logits.dtype),
               reduction="none")
    return torch.where(known, loss, 0.0).sum(), known.sum()


def compute_pos_weight(targets, mode="sqrt", clip=(1, 20)):
    """The weight of a class's positives in the loss: negatives / positives -> float32 (C,).

    targets (N, C) with 1, 0, NaN. mode: "none" (all 1), "linear", or "sqrt" (the square root), then clipped to `clip`.
    A class without a known positive gets the upper bound, one without a known label 1.
    """
    positives, negatives = (np.count_nonzero(targets == value, axis=0) for value in (1, 0))
    if mode == "none":
        return np.ones(targets.shape[1], np.float32)
    ratio = negatives / np.maximum(positives, 1)
    weight = np.clip(np.sqrt(ratio) if mode == "sqrt" else ratio, *clip)
    weight[positives == 0] = clip[1]
    weight[positives + negatives == 0] = 1
    return weight.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen layers


def layer_names(network, backbone):
    """The names that --train-layers and --unfreeze take for a network."""
    layers = dict(network.named_children())
    layers |= {f"features.{name}": layer for name, layer in layers.get("features", nn.Module()).named_children()}
    names = [name for name, layer in layers.items() if any(True for _ in layer.parameters())]
    return ["all", "head", *(name for name in names if name != BACKBONES[backbone])]


def select_parameters(network, backbone, layers):
    """The names of the parameters in `layers`, a comma-separated list of layer_names(). Raises InputError."""
    valid, wanted = layer_names(network, backbone), layers.split(",")
    wrong = [name for name in wanted if name not in valid]
    if wrong:
        raise InputError(f"{backbone} has no layer {', '.join(wrong)}; it has {', '.join(valid)}")
    prefixes = tuple({"all": "", "head": BACKBONES[backbone] + "."}.get(name, name + ".") for name in wanted)
    return {name for name, _ in network.named_parameters() if name.startswith(prefixes)}


def freeze(network, trained):
    """Leave only the parameters named in `trained` to the optimiser."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)


def train_mode(network):
    """network.train(), but BatchNorm layers that are frozen stay in eval mode: else their statistics would drift."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
            module.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them: each takes its share of every batch, and all hold the same network


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
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


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


def max_over_ranks(tensor):
    """The largest of a tensor over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def share_buffers(network):
    """Give all processes the leader's BatchNorm statistics, which are those that are saved."""
    if distributed.is_initialized():
        for buffer in network.buffers():
            distributed.broadcast(buffer, 0)


def share_errors(images):
    """Tell all processes of the images that one of them could not read."""
    if distributed.is_initialized():
        errors = [None] * distributed.get_world_size()
        distributed.all_gather_object(errors, images.errors)
        for found in errors:
            images.errors.update(found)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


MONITORED = {"loss": "loss", "f1": "f1_weighted", "map": "map"}  # --monitor -> name of a score


@dataclass
class EarlyStopping:
    """Remembers the best score, and counts the validations since."""

    higher_is_better: bool
    patience: int
    min_delta: float = 0.0
    best: float = None
    best_epoch: int = 0
    waited: int = 0

    def improved(self, score, epoch):
        """Take the score of an epoch; whether it is the best so far by more than min_delta. The first one is."""
        gain = 0 if self.best is None else (score - self.best) * (1 if self.higher_is_better else -1)
        if self.best is None or gain > self.min_delta or math.isnan(self.best):
            self.best, self.best_epoch, self.waited = score, epoch, 0
            return True
        self.waited += 1
        return False

    @property
    def stop(self):
        """Whether `patience` validations in a row brought nothing."""
        return 0 < self.patience <= self.waited


@dataclass
class Run:
    """What a run carries from step to step."""

    options: argparse.Namespace
    classifier: inference.Classifier
    tables: dict  # "train", "val" and "test" -> LabelTable
    images: dict  # the same -> ImageDataset
    pos_weight: torch.Tensor
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    stopping: EarlyStopping
    epoch: int = 0  # finished epochs
    step: int = 0  # finished iterations of the epoch after those
    seconds: float = 0.0  # that these took
    rates: list = field(default_factory=list)  # learning rates at its start, of the backbone and of the head
    signal: int = 0  # that asks to stop
    losses: list = field(default_factory=list)  # of every iteration
    history: list = field(default_factory=list)  # a dict per epoch
    reported: set = field(default_factory=set)  # bad images that the user was told of
    board: object = None  # TensorBoard's writer
    model: nn.Module = None  # what is trained: the network, one of its parallel copies, or its head
    features: dict = field(default_factory=dict)  # split -> what the frozen backbone makes of its images (N, F)

    @property
    def out(self):
        """The folder of the run's files."""
        return Path(self.options.out)


def prepare(options):
    """Read the data, build the network and all that trains it -> Run."""
    if options.demo and is_leader() and not (Path(options.data) / "labels.txt").exists():
        say(options, f"drawing the demo data into {options.data}")
        dataset.write_demo(options.data, seed=0)
    wait_for_leader()
    table = dataset.read_labels(options.data, options.labels, options.images, options.label_groups, options.group)
    say(options, dataset.summary(table, options.data))
    parts = dataset.split(table, options.split, options.split_method, options.seed)
    tables = {name: table.subset(rows) for name, rows in zip(("train", "val", "test"), parts)}
    say(options, "split: " + ", ".join(f"{len(part)} {name}" for name, part in tables.items()))
    if np.isnan(tables["train"].targets).all():
        raise InputError(f"{options.data}: no label of the train split is known: there is nothing to learn from")
    check_batches(options, parts)
    if options.export_splits and is_leader():
        export_splits(tables, Path(options.export_splits))

    torch.manual_seed(options.seed)
    device = inference.choose_device(options.device)
    precision = choose_precision(options, device)
    network = inference.build_model(options.backbone, options.head, len(table.classes), options.dropout)
    for layers in filter(None, (options.train_layers, options.unfreeze)):
        select_parameters(network, options.backbone, layers)  # a wrong name is an error now, not in epoch N
    say(options, load_weights(network, options, table.classes))
    classifier = inference.Classifier(
        inference.to_device(network, device), options.backbone, options.head, options.dropout, table.classes,
        table.groups, [0.5] * len(table.classes), options.size, options=public_options(options), device=device,
        precision=precision,
    )
    pos_weight = compute_pos_weight(tables["train"].targets, options.pos_weight, options.pos_weight_clip)
    for name, column in zip(table.classes, tables["train"].targets.T):
        if not (column == 1).any():
            warn(f"{name} has no known positive in train: it cannot be learned")
    room, images = cache_bytes(options.cache), {}
    for name, part in tables.items():
        images[name] = dataset.ImageDataset(part, options.size, room * len(part) / len(table))
    optimizer, scheduler = build_optimizer(network, options, steps_per_epoch(options, len(parts[0])))
    return Run(
        options, classifier, tables, images, torch.from_numpy(pos_weight).to(device), optimizer, scheduler,
        torch.amp.GradScaler(device.type, enabled=classifier.precision == torch.float16),
        EarlyStopping(options.monitor != "loss", options.patience, options.min_delta), board=open_board(options),
    )


def choose_precision(options, device):
    """The dtype of --precision: for auto that of the run that is resumed, else what the leader finds fastest."""
    name, path = options.precision, Path(options.out) / "last.pth"
    before = inference.read_checkpoint(path) if options.resume and name == "auto" and path.exists() else {}
    if before.get("precision") in ("torch.float32", "torch.bfloat16", "torch.float16"):
        precision, reason = getattr(torch, before["precision"].removeprefix("torch.")), "as in the run that is resumed"
    else:
        precision, reason = inference.choose_precision(name, device)
    if distributed.is_initialized():
        chosen = [precision, reason]
        distributed.broadcast_object_list(chosen)
        precision, reason = chosen
    say(options, f"precision: {str(precision).removeprefix('torch.')} on {device}: {reason}")
    return precision


def load_weights(network, options, classes):
    """Load --weights into the network -> what to tell the user."""
    if options.weights == "none":
        return "weights: none, training from scratch"
    taken, skipped, common = inference.load_weights(network, options.weights, options.backbone, classes)
    lines = [f"weights: {len(taken)} tensors taken from {options.weights}"]
    if common:
        lines.append(f"  head rows taken by class name: {', '.join(common)}")
    for reason in sorted(set(skipped.values())):
        names = [name for name, why in skipped.items() if why == reason]
        layers = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
        lines.append(f"  {len(names)} not taken, {reason}: {', '.join(layers)}")
    return "\n".join(lines)


def steps_per_epoch(options, count):
    """Batches are as equal as can be, so that no last batch of one image meets a BatchNorm."""
    steps = -(-count // options.batch_size)
    return steps if options.batch_size == 1 else max(1, min(steps, count // 2))


def check_batches(options, parts):
    """Raise an InputError when the processes would have too few images, each in a step or in a split (arrays)."""
    ranks, smallest = rank_and_ranks()[1], min(len(part) for part in parts if len(part))
    share = len(parts[0]) // steps_per_epoch(options, len(parts[0])) // ranks
    if ranks > smallest or share == 0:
        raise InputError(f"{ranks} processes are too many for batches of {options.batch_size} and splits of {smallest}")
    if share == 1 and (options.head != "linear" or options.size <= 32):
        raise InputError(f"with -b {options.batch_size} and {len(parts[0])} images to train on a process gets a single "
                         "image in a step, and BatchNorm needs two: raise -b, or add images")


def build_optimizer(network, options, steps):
    """AdamW with a rate for the backbone and one for the head, and the schedule of both, over steps * epochs."""
    head = BACKBONES[options.backbone] + "."
    groups = {True: [], False: []}
    for name, parameter in network.named_parameters():
        groups[name.startswith(head)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[False], "lr": options.lr_backbone}, {"params": groups[True], "lr": options.lr}],
        weight_decay=options.wd, fused=next(network.parameters()).device.type != "mps",  # torch 2.4 has none there
    )
    total, warmup = steps * options.epochs, min(steps, steps * options.epochs // 10)

    def factor(step):
        if options.schedule == "cosine":
            return min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * min(step, total) / total))
        if options.schedule == "multistep":
            return options.lr_decay ** sum(step >= steps * epoch for epoch in options.milestones)
        return 1.0

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def choose_layers(run):
    """Set which layers the coming epoch trains, and with that run.model."""
    options, network = run.options, run.classifier.network
    layers = options.train_layers
    if options.unfreeze and run.epoch + 1 >= options.unfreeze_epoch:
        layers += f",{options.unfreeze}"
    trained = select_parameters(network, options.backbone, layers)
    before = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if run.model is not None and trained == before:
        return
    freeze(network, trained)
    head = network.get_submodule(BACKBONES[options.backbone])
    run.model, run.features = network, {}
    if len(trained) == sum(1 for _ in head.parameters()) and not dataset.read_operations(options.augment):
        run.model = head  # the images are the same each time, and so is what the backbone makes of them
        for split in ("train", "val"):
            run.features[split] = compute_features(run, split)
    if distributed.is_initialized():
        run.model = nn.parallel.DistributedDataParallel(run.model)


def train_batches(run, order):
    """Yield (what run.model takes, targets, rows) for each array of rows in `order`, on the device."""
    options, device, images = run.options, run.classifier.device, run.images["train"]
    if run.features:
        for rows in order:
            yield run.features["train"][rows], images.targets[rows].to(device, non_blocking=True), rows
        return
    operations, noise = dataset.read_operations(options.augment), None
    if operations:
        noise = dataset.draw_noise(len(images), options.seed, run.epoch + 1)
    for batch, targets, rows in dataset.batches(images, order, options.workers, pin=device.type == "cuda"):
        batch = batch.to(device, non_blocking=True)
        if operations:
            batch = dataset.augment(batch, operations, noise[rows].to(device, non_blocking=True))
        yield dataset.normalize(batch), targets.to(device, non_blocking=True), rows


def draw_order(run):
    """The batches of the coming epoch, arrays of rows: they depend on the seed and the epoch alone."""
    options, targets = run.options, run.tables["train"].targets
    seed = options.seed * 1_000_003 + run.epoch + 1
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).numpy()
    order = np.array_split(shuffled, steps_per_epoch(options, len(targets)))
    return [rows for rows in order if not np.isnan(targets[rows]).all()]  # nothing is known: no step


def train_epoch(run, progress):
    """One pass over the train split, or what is left of it after run.step iterations -> whether it was finished.
    Adds the loss of each iteration to run.losses."""
    order, (rank, ranks), started = draw_order(run), rank_and_ranks(), time.perf_counter()
    train_mode(run.classifier.network)
    losses, before = [], run.seconds
    shares = [np.array_split(rows, ranks)[rank] for rows in order[run.step :]]
    for inputs, targets, rows in train_batches(run, shares):
        logits = inference.forward(run.model, inputs, run.classifier.precision)
        total, known = masked_bce(logits, targets, run.pos_weight)
        all_total, all_known = sum_over_ranks(torch.stack([total.detach(), known]))
        loss = all_total / all_known.clamp(min=1)
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(total * ranks / all_known.clamp(min=1)).backward()  # DDP averages what should be summed
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.scheduler.step()
        run.step, run.seconds = run.step + 1, before + time.perf_counter() - started
        losses.append(loss)
        progress(run.epoch + 1, run.step, len(order), loss, len(rows) * ranks)
        if run.step % 100 == 0:
            keep_losses(run, losses)
        if run.step < len(order) and asked_to_stop(run):
            break
    keep_losses(run, losses)
    share_errors(run.images["train"])
    return run.step == len(order)


def keep_losses(run, losses):
    """Move losses (tensors) to run.losses, which waits for the device. Raises RuntimeError when one of them or a weight
    is not finite: such a state is never saved."""
    values = torch.stack(losses).tolist() if losses else []
    losses.clear()
    bad = next((f"loss is {loss} at iteration {number}" for number, loss in enumerate(values, len(run.losses) + 1)
                if not math.isfinite(loss)), None)
    finite = torch.stack([weight.isfinite().all() for weight in run.classifier.network.parameters()]).all()
    if bad or not finite:
        saved = f"{run.out / 'last.pth'} is that after epoch {run.epoch}" if run.epoch else "nothing is saved yet"
        raise RuntimeError(f"the {bad or 'weights are no longer finite'}, in epoch {run.epoch + 1}: try a lower --lr, "
                           f"or --precision fp32; {saved}")
    run.losses += values


@contextlib.contextmanager
def signals_noted(run):
    """Within the block the first Ctrl-C or SIGTERM only sets run.signal; the second one acts at once."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield
        return

    def note(number, _):
        run.signal = number
        signal.signal(number, before[number])
        os.write(2, b"\nstopping after this step, to save\n")  # print() may be at work on a line of its own

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(run):
    """Whether a signal asks this process to stop, or any of several, which agree on it at every tenth step."""
    if not distributed.is_initialized():
        return run.signal != 0
    if run.step % 10:
        return False
    run.signal = int(max_over_ranks(torch.tensor(run.signal, device=run.classifier.device)))
    return run.signal != 0


def place(run):
    """Where a run is, in words."""
    return f"iteration {run.step} of epoch {run.epoch + 1}" if run.step else f"epoch {run.epoch}"


def stop(run):
    """Save the state, tell how to go on, and raise what the signal stands for."""
    if is_leader():
        save_state(run)
    wait_for_leader()
    warn(f"stopped after {place(run)}: the same command with --resume goes on from here")
    raise KeyboardInterrupt if run.signal == signal.SIGINT else SystemExit(128 + run.signal)


def compute_split(run, split):
    """What the network makes of the images of a split (N, C), float32 on the device; each rank computes a share."""
    classifier, images = run.classifier, run.images[split]
    share_buffers(classifier.network)
    rank, ranks = rank_and_ranks()
    share = np.array_split(np.arange(len(images)), ranks)[rank]
    part = inference.compute_logits(classifier.network, images, classifier.device, classifier.precision,
                                    2 * run.options.batch_size, run.options.workers, share)
    whole = part.new_zeros(len(images), part.shape[1])
    whole[share] = part
    share_errors(images)
    return sum_over_ranks(whole)


def compute_features(run, split):
    """What the head takes of the images of a split (N, F): the network's output when the head passes on its input."""
    network, (parent, _, name) = run.classifier.network, BACKBONES[run.options.backbone].rpartition(".")
    head = getattr(network.get_submodule(parent), name)
    setattr(network.get_submodule(parent), name, nn.Identity())
    try:
        return compute_split(run, split)
    finally:
        setattr(network.get_submodule(parent), name, head)


def evaluate(run, split):
    """-> (targets, probabilities, loss, LabelTable) of the images of a split that can be read."""
    images, classifier = run.images[split], run.classifier
    if split in run.features:
        head = classifier.network.get_submodule(BACKBONES[classifier.backbone]).eval()
        with torch.inference_mode():
            logits = inference.forward(head, run.features[split], classifier.precision)
    else:
        logits = compute_split(run, split)
    check_readable(run, split)
    good = np.array([row for row in range(len(images)) if row not in images.errors], int)
    table, logits = run.tables[split].subset(good), logits[good].cpu()
    total, known = masked_bce(logits, torch.from_numpy(table.targets), run.pos_weight.cpu())
    if not logits.isfinite().all():
        raise RuntimeError(f"the outputs on {split} are not all finite: try a lower --lr, or --precision fp32")
    return table.targets, torch.sigmoid(logits).numpy(), (total / known).item(), table


def validate(run):
    """Choose the thresholds on val -> the scores of val with them."""
    targets, probabilities, loss, _ = evaluate(run, "val")
    thresholds = metrics.find_thresholds(targets, probabilities, run.options.thresholds, run.options.max_threshold)
    run.classifier.thresholds = thresholds.tolist()
    report = metrics.report(targets, probabilities, thresholds, run.classifier.classes)
    return {"loss": loss} | {name: report[name] for name in metrics.HEADLINES}


def train_scores(run):
    """The scores of the train split, with the thresholds chosen on val."""
    targets, probabilities, _, _ = evaluate(run, "train")
    report = metrics.report(targets, probabilities, run.classifier.thresholds, run.classifier.classes)
    return {name: report[name] for name in ("f1_macro", "f1_weighted", "map")}


def fit(run):
    """Train until the last epoch, or until the early stopping or a signal says so."""
    progress = Progress(run.options, steps_per_epoch(run.options, len(run.tables["train"])))
    with signals_noted(run):
        while run.epoch < run.options.epochs and not run.stopping.stop:
            choose_layers(run)
            if run.step == 0:
                run.rates = [group["lr"] for group in run.optimizer.param_groups]
            if train_epoch(run, progress):
                row = end_epoch(run)
                progress.end_epoch(row, run.stopping.best_epoch == run.epoch)
            if asked_to_stop(run):
                stop(run)


def end_epoch(run):
    """Validate the epoch that was trained, keep it if it is the best, and save the state -> its row of the history."""
    options, steps, seconds = run.options, run.step, run.seconds
    run.epoch, run.step, run.seconds = run.epoch + 1, 0, 0.0
    check_readable(run, "train")
    row = {"epoch": run.epoch, "train_loss": float(np.mean(run.losses[-steps:])) if steps else math.nan}
    if run.epoch % options.val_every == 0 or run.epoch == options.epochs:
        scores = validate(run)
        row |= {f"val_{name}": value for name, value in scores.items()}
        every = options.train_metrics_every
        if every and (run.epoch % every == 0 or run.epoch == options.epochs):
            row |= {f"train_{name}": value for name, value in train_scores(run).items()}
        if run.stopping.improved(scores[MONITORED[options.monitor]], run.epoch) and is_leader():
            run.classifier.epoch, run.classifier.scores = run.epoch, scores
            inference.save_model(run.classifier, run.out / "model.pth")
    row |= {"lr": run.rates[1], "lr_backbone": run.rates[0], "seconds": seconds,
            "images_per_second": len(run.tables["train"]) / seconds if steps else 0.0}
    run.history.append(row)
    report_bad_images(run)
    if is_leader():
        save_state(run)
        write_history(run)
    if run.board:
        write_scalars(run, row, steps)
    return row


def check_readable(run, split):
    """Raise an InputError when most images of a split cannot be read."""
    errors, count = run.images[split].errors, len(run.images[split])
    if 2 * len(errors) > count:
        raise InputError(f"{len(errors)} of {count} images of the {split} split cannot be read, as "
                         f"{next(iter(errors.values()))}: python dataset.py DATA --check lists them all")


def report_bad_images(run):
    """Tell once of each image that could not be read."""
    for images in run.images.values():
        for message in sorted(set(images.errors.values()) - run.reported):
            warn(f"skipped {message}")
            run.reported.add(message)


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run


def public_options(options):
    """The options as plain JSON values, as config.json and model.pth keep them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}


def splits_digest(run):
    """A fingerprint of which image is in which split."""
    return hashlib.sha256(repr([table.ids for table in run.tables.values()]).encode()).hexdigest()


PLACE = ("epoch", "step", "seconds", "rates", "losses", "history")  # fields of a Run that tell how far it is


def save_state(run):
    """Write last.pth: all that --resume needs to go on as if nothing had happened."""
    state = {
        "format": inference.FORMAT, "options": run.classifier.options, "classes": run.classifier.classes,
        "splits": splits_digest(run), "network": run.classifier.network.state_dict(),
        "optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(), "precision": str(run.classifier.precision), "stopping": vars(run.stopping), "random": torch.get_rng_state(),
    } | {name: getattr(run, name) for name in PLACE}
    if run.classifier.device.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state(run.classifier.device)
    inference.write_checkpoint(run.out / "last.pth", state)


def load_state(run):
    """Take up the run of last.pth. Raises InputError when it is of other data or another network."""
    path, options = run.out / "last.pth", run.classifier.options
    if not path.exists():
        raise InputError(f"{path} is not there: without --resume a run starts from the beginning")
    state = inference.read_checkpoint(path)
    inference.check_content(path, state, ("optimizer", *PLACE), "last.pth")
    for name, now in (("classes", run.classifier.classes), ("splits", splits_digest(run))):
        if state[name] != now:
            raise InputError(f"--resume: {path} is of other {name}: give the same data and seed, or another --out")
    for name in ("backbone", "head"):
        if state["options"][name] != options[name]:
            raise InputError(f"--resume: {path} has --{name} {state['options'][name]}, not {options[name]}")
    before = state["options"]
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in options.items()
               if before.get(name) != value and name not in ("resume", "quiet")]
    if changed:
        warn(f"resumed with other options than before: {', '.join(changed)}")
    run.classifier.network.load_state_dict(state["network"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    vars(run.stopping).update(state["stopping"], patience=run.stopping.patience, min_delta=run.stopping.min_delta)
    for name in PLACE:
        setattr(run, name, state[name])
    run.step = state["step"] * state["options"]["batch_size"] // options["batch_size"]  # as many images, if it changed
    torch.set_rng_state(state["random"])
    if "random_cuda" in state:
        torch.cuda.set_rng_state(state["random_cuda"], run.classifier.device)
    say(run.options, f"resumed after {place(run)}, from {path}")


def write_inputs(run):
    """Write what is known before training: config.json, classes.json and the three metadata files, and of a run that
    is resumed the history, which may have been stopped before it was written."""
    if run.history:
        write_history(run)
    dataset.write_json(run.out / "config.json", run.classifier.options)
    dataset.write_json(run.out / "classes.json", {"classes": run.classifier.classes, "groups": run.classifier.groups})
    words = {1.0: "1", 0.0: "0"}
    for split, table in run.tables.items():
        labels = ([words.get(value, "NA") for value in row] for row in table.targets.tolist())
        rows = [[name, *cells] for name, cells in zip(table.ids, labels)]
        dataset.write_csv(run.out / f"{split}_metadata.csv", [["ID", *table.classes], *rows])


HISTORY = ["epoch", "train_loss", "val_loss", *(f"val_{name}" for name in metrics.HEADLINES), "train_f1_macro",
           "train_f1_weighted", "train_map", "lr", "lr_backbone", "seconds", "images_per_second"]


def write_history(run):
    """Write history.csv and loss_curve.png."""
    rows = [[row.get(name, "") for name in HISTORY] for row in run.history]
    dataset.write_csv(run.out / "history.csv", [HISTORY, *rows])
    curves = loss_curves(run.losses, run.history, epoch_marks(run), run.options.plot_title)
    dataset.write_png(run.out / "loss_curve.png", curves)


def finish(run):
    """Report the best model on test, or on val when there is no test split, and write it -> report dict."""
    split = "test" if len(run.tables["test"]) else "val"
    wait_for_leader()
    precision = run.classifier.precision
    best = inference.load_model(run.out / "model.pth", run.classifier.device)
    best.precision = precision
    run.classifier, run.features = best, {}
    targets, probabilities, loss, table = evaluate(run, split)
    on_val = evaluate(run, "val") if split == "test" else (targets, probabilities)
    report_bad_images(run)
    report = metrics.report(targets, probabilities, best.thresholds, best.classes)
    report = {"split": split, "images": report.pop("rows"), "loss": loss, "epoch": best.epoch} | report
    if is_leader():
        write_report(run, report, table, probabilities)
        draw_report(run, on_val, table, probabilities)
    say(run.options, f"\n{split} split, {len(table)} images, epoch {best.epoch}\n{metrics.format_report(report)}")
    return report


def write_report(run, report, table, probabilities):
    """Write metrics.json, thresholds.json and predictions.csv, and what else was asked for."""
    best = run.classifier
    rows = inference.prediction_rows(table.ids, probabilities, best.thresholds, best.classes, best.groups)
    dataset.write_csv(run.out / "predictions.csv", rows)
    dataset.write_json(run.out / "thresholds.json", dict(zip(best.classes, best.thresholds)))
    dataset.write_json(run.out / "metrics.json", report)
    if run.options.thresholds == "global":
        text = inference.format_predictions("json", table.ids, probabilities, np.array(best.thresholds), best)
        dataset.write_text(run.out / predictions_name(run, report), [text])
    if run.options.registry:
        register(run, report)


def draw_report(run, on_val, table, probabilities):
    """Draw pr_curves.png of val and predictions.png, the mistakes on the split that is reported."""
    best = run.classifier
    dataset.write_png(run.out / "pr_curves.png", pr_curves(on_val[0], on_val[1], best.thresholds, best.classes))
    sheet = inference.mistakes_sheet(table, probabilities, best.thresholds)
    dataset.write_png(run.out / "predictions.png", sheet)


def predictions_name(run, report):
    """The name of the JSON predictions, which tells how they were made."""
    options = run.options
    return (f"predictions_{options.backbone}_f1-{report['f1_weighted']:.4f}_epoch-{run.classifier.epoch}"
            f"_b-{options.batch_size}_lr-{options.lr:g}_t-{run.classifier.thresholds[0]:.4f}.json")


NO_CONFIGURATION = ("out", "registry", "seed", "quiet", "device", "workers", "cache", "resume", "tensorboard",
                    "export_splits", "plot_title")


def register(run, report):
    """Copy model.pth, config.json and metrics.json into a folder of the registry that is named by backbone, head and
    configuration, unless a run with a better weighted F1 is there."""
    options = {name: value for name, value in run.classifier.options.items() if name not in NO_CONFIGURATION}
    digest = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]
    folder = Path(run.options.registry) / f"{options['backbone']}-{options['head']}-{digest}"
    if (folder / "metrics.json").exists():
        best = metrics.read_run(folder)["f1_weighted"]
        if best is not None and best >= report["f1_weighted"]:
            say(run.options, f"registry: {folder} keeps its F1 of {best:.4f}")
            return
    for name in ("model.pth", "config.json", "metrics.json"):
        with dataset.atomic_write(folder / name, "wb") as file:
            file.write((run.out / name).read_bytes())
    say(run.options, f"registry: {folder} has now an F1 of {report['f1_weighted']:.4f}")


def export_splits(tables, folder):
    """Copy the images into folder/images/train, val and test. Of two with one name the second gets its folder's too."""
    for split, table in tables.items():
        target = folder / "images" / split
        target.mkdir(parents=True, exist_ok=True)
        for path, name in zip(table.paths, dataset.distinct_names(table.paths)):
            shutil.copy2(path, target / name)


def open_board(options):
    """TensorBoard's writer into OUT/tensorboard, or None. Raises InputError when the package is not there."""
    if not options.tensorboard or not is_leader():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(Path(options.out) / "tensorboard")


def write_scalars(run, row, steps):
    """Send an epoch (a row of the history) and the losses of its iterations to TensorBoard."""
    for name, value in row.items():
        run.board.add_scalar(f"epoch/{name}", value, row["epoch"])
    for step, loss in enumerate(run.losses[-steps:] if steps else [], len(run.losses) - steps + 1):
        run.board.add_scalar("iteration/train_loss", loss, step)
    run.board.flush()


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees


def say(options, text):
    """Print, unless --quiet."""
    if is_leader() and not options.quiet:
        print(text, flush=True)


def warn(text):
    """Print a warning, also with --quiet."""
    if is_leader():
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Progress:
    """One line that updates in place on a terminal; elsewhere, and at its end, a line per epoch."""

    def __init__(self, options, steps):
        self.live = sys.stdout.isatty() and is_leader() and not options.quiet
        self.options, self.steps = options, steps
        self.started, self.done, self.images, self.shown = time.perf_counter(), 0, 0, 0.0

    def __call__(self, epoch, step, steps, loss, images):
        """Count a finished step, and show it if the last one shown is old enough."""
        self.done, self.images, now = self.done + 1, self.images + images, time.perf_counter()
        if not self.live or (now - self.shown < 0.2 and step < steps):
            return
        self.shown, spent = now, now - self.started
        left = spent / self.done * (self.options.epochs * steps - (epoch - 1) * steps - step)
        line = (f"epoch {epoch}/{self.options.epochs}  batch {step}/{steps}  loss {loss.item():.4f}  "
                f"{self.images / spent:.0f} images/s  {clock(left)} left")
        print(f"\r\033[K{line}", end="", flush=True)

    def end_epoch(self, row, best):
        """Show a finished epoch (a row of the history)."""
        width = len(str(self.options.epochs))
        parts = [f"epoch {row['epoch']:{width}}/{self.options.epochs}", f"loss {row['train_loss']:.4f}"]
        if "val_loss" in row:
            parts.append(f"val loss {row['val_loss']:.4f}  f1 macro {row['val_f1_macro']:.3f}")
            parts.append(f"map {row['val_map']:.3f}")
        parts.append(f"{row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s" + "  best" * best)
        say(self.options, "\r\033[K" * self.live + "  ".join(parts))


def clock(seconds):
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


# ---------------------------------------------------------------------------------------------------------------------
# Charts


COLOURS = ["#1f6fb4", "#e07b00", "#2e8b57", "#b03a5b"]
SCALE = 2  # charts are drawn larger and shrunk, so that lines are smooth


@dataclass
class Frame:
    """The rectangle of a chart in which the lines are, and the values at its edges."""

    left: int
    top: int
    right: int
    bottom: int
    x: tuple
    y: tuple

    def place(self, x, y):
        """The pixel of a point."""
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def draw_chart(series, title, x_label, y_label, size=(900, 420), marks=(), dots=(), limits=None):
    """A line chart -> PIL image.

    series: a list of (name, x values, y values, colour, width in pixels); values that are not finite are left out.
    marks: (x, text) of vertical lines. dots: points (x, y) to ring. limits: ((lowest x, highest x), the same of y), by
    default those of the series.
    """
    series = [(name, *finite_points(x, y), colour, width) for name, x, y, colour, width in series]
    xs = limits[0] if limits else [value for _, x, _, _, _ in series for value in x] or [0, 1]
    ys = limits[1] if limits else [value for _, _, y, _, _ in series for value in y] or [0, 1]
    count = max(2, min(6, size[1] // 70))
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), not limits, count), nice_ticks(min(ys), max(ys), False, count)
    width, height = size[0] * SCALE, size[1] * SCALE
    frame = Frame(66 * SCALE, 58 * SCALE, width - 20 * SCALE, height - 52 * SCALE,
                  (min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs))), (y_ticks[0], y_ticks[-1]))
    image = Image.new("RGB", (width, height), "white")
    pen, small = ImageDraw.Draw(image), dataset.load_font(13 * SCALE)
    font = dataset.load_font(15 * SCALE) if size[0] > 400 else small
    draw_axes(pen, frame, x_ticks, y_ticks, small)
    for _, x, y, colour, line_width in series:
        points = [frame.place(*point) for point in zip(x, y)]
        if len(points) > 1:
            pen.line(points, fill=colour, width=line_width * SCALE, joint="curve")
        for px, py in points if len(points) <= 40 and not limits else []:
            radius = (line_width + 1) * SCALE
            pen.ellipse((px - radius, py - radius, px + radius, py + radius), fill=colour)
    draw_marks(pen, frame, marks, small)
    for x, y in (frame.place(*dot) for dot in dots):
        radius = 6 * SCALE
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline="black", width=2 * SCALE)
    draw_legend(pen, series, frame, small)
    middle = (frame.left + frame.right) / 2
    title = dataset.fit_text(title, font, width - 12 * SCALE)
    pen.text((width / 2, 18 * SCALE), title, fill="black", font=font, anchor="mm")
    pen.text((middle, height - 14 * SCALE), x_label, fill="black", font=font, anchor="mm")
    draw_turned(image, y_label, font, 16 * SCALE, (frame.top + frame.bottom) // 2)
    return image.resize(size, Image.Resampling.LANCZOS)


def draw_axes(pen, frame, x_ticks, y_ticks, font):
    """The axes with their numbers, and a line across for each number of the y axis."""
    for value in y_ticks:
        y = frame.place(frame.x[0], value)[1]
        pen.line([(frame.left, y), (frame.right, y)], fill="#e4e4e4", width=SCALE)
        pen.text((frame.left - 8 * SCALE, y), f"{value:g}", fill="#333333", font=font, anchor="rm")
    for value in x_ticks:
        x = frame.place(value, frame.y[0])[0]
        pen.line([(x, frame.bottom), (x, frame.bottom + 5 * SCALE)], fill="#333333", width=SCALE)
        pen.text((x, frame.bottom + 9 * SCALE), f"{value:g}", fill="#333333", font=font, anchor="mt")
    corners = [(frame.left, frame.top), (frame.left, frame.bottom), (frame.right, frame.bottom)]
    pen.line(corners, fill="#333333", width=SCALE)


def draw_marks(pen, frame, marks, font):
    """Vertical lines with words at their foot, each a line of text above the one before."""
    for number, (value, text) in enumerate(sorted(marks)):
        x, y = frame.place(value, frame.y[0])[0], frame.bottom - (8 + 18 * (number % 8)) * SCALE
        pen.line([(x, frame.top), (x, frame.bottom)], fill="#888888", width=SCALE)
        near_end = x > (frame.left + frame.right) / 2
        side, anchor = (-6, "rb") if near_end else (6, "lb")
        pen.text((x + side * SCALE, y), text, "#333333", font, anchor, stroke_width=3 * SCALE, stroke_fill="white")


def draw_legend(pen, series, frame, font):
    """The names of the series, in a row over the right end of the frame."""
    x, y = frame.right, frame.top - 14 * SCALE
    for name, _, _, colour, _ in reversed([entry for entry in series if entry[0]]):
        x -= pen.textlength(name, font=font)
        pen.text((x, y), name, fill="#333333", font=font, anchor="lm")
        pen.line([(x - 26 * SCALE, y), (x - 6 * SCALE, y)], fill=colour, width=3 * SCALE)
        x -= 44 * SCALE


def draw_turned(image, text, font, x, y):
    """Text that reads upwards, centred at (x, y)."""
    right, bottom = font.getbbox(text)[2:]
    label = Image.new("L", (right + 4, bottom + 4), 0)
    ImageDraw.Draw(label).text((2, 2), text, fill=255, font=font)
    label = label.rotate(90, expand=True)
    image.paste("black", (x - label.width // 2, int(y - label.height // 2)), label)


def finite_points(x, y):
    """The points whose coordinates are both finite -> (xs, ys)."""
    points = [(float(a), float(b)) for a, b in zip(x, y) if math.isfinite(a) and math.isfinite(b)]
    return [point[0] for point in points], [point[1] for point in points]


def nice_ticks(low, high, whole=False, count=6):
    """About `count` round numbers from at or below `low` to at or above `high`; whole ones inside for an x axis."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (1 if whole else 0.5), high + (1 if whole else 0.5)
    rough = (high - low) / count
    base = 10 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough)
    if whole:
        step = max(1, round(step))
        return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return [round(step * k, digits) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def smooth(values, window):
    """The mean of the last `window` values at each place, of fewer at the start."""
    sums = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def stack(charts, columns, title=""):
    """Charts of one size, in rows, under a title -> PIL image."""
    (width, height), top = charts[0].size, 44 if title else 0
    columns = min(columns, len(charts))
    image = Image.new("RGB", (columns * width, top + -(-len(charts) // columns) * height), "white")
    if title:
        font, pen = dataset.load_font(18), ImageDraw.Draw(image)
        pen.text((image.width / 2, 26), dataset.fit_text(title, font, image.width - 20), "black", font, anchor="mm")
    for number, chart in enumerate(charts):
        image.paste(chart, (number % columns * width, top + number // columns * height))
    return image


def loss_curves(losses, history, marks=(), title=""):
    """The loss per iteration over the loss per epoch, with marks (epoch, text) -> PIL image."""
    steps = np.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 40)
    raw = [("each iteration", steps, losses, COLOURS[0], 2)]
    if window > 1:
        raw = [("each iteration", steps, losses, "#b9d3ea", 1),
               (f"mean of {window}", steps, smooth(losses, window), COLOURS[0], 2)]
    upper = draw_chart(raw, title or "Loss per iteration", "iteration_number", "training_loss")
    epochs = [row["epoch"] for row in history]
    both = [(name, epochs, [row.get(key, math.nan) for row in history], colour, 2)
            for name, key, colour in (("train", "train_loss", COLOURS[0]), ("val", "val_loss", COLOURS[1]))]
    return stack([upper, draw_chart(both, "Loss per epoch", "epoch", "loss", marks=marks)], 1)


def epoch_marks(run):
    """What loss_curves() marks: the best epoch, that of the unfreezing, and those of a new learning rate."""
    options, marks = run.options, []
    if run.stopping.best_epoch:
        marks.append((run.stopping.best_epoch, f"best epoch: {run.stopping.best_epoch}"))
    if options.unfreeze and run.epoch >= options.unfreeze_epoch:
        marks.append((options.unfreeze_epoch, f"{options.unfreeze} unfrozen"))
    if options.schedule != "cosine":  # which changes it all the time
        marks += [(row["epoch"], f"lr {row['lr']:g}") for before, row in zip(run.history, run.history[1:])
                  if row["lr"] != before["lr"]]
    return marks


def pr_curves(targets, probabilities, thresholds, classes, most=20):
    """Precision over recall of each class on val, its threshold ringed; of many classes the `most` with the lowest
    average precision -> PIL image. targets (N, C) with 1, 0, NaN; probabilities (N, C); thresholds (C,)."""
    scores = metrics.average_precision(targets, probabilities, None)
    worst = np.argsort(scores, kind="stable")[:most] if len(classes) > most else range(len(classes))
    charts = []
    for c in worst:
        precision, recall, cuts = metrics.precision_recall_curve(targets[:, c], probabilities[:, c])
        at, positives = np.searchsorted(cuts, thresholds[c]), int(np.nansum(targets[:, c]))
        curve, dots = (f"AP {scores[c]:.3f}, {positives} positives", recall, precision), [(recall[at], precision[at])]
        if not positives:
            curve, dots = ("no known positive", [], []), []
        charts.append(draw_chart([(*curve, COLOURS[0], 2)], classes[c], "recall", "precision", (300, 280), dots=dots,
                                 limits=((0, 1), (0, 1))))
    few = f"; the {most} of {len(classes)} classes with the lowest average precision" if len(classes) > most else ""
    return stack(charts, 4, "Precision and recall on val; circle: the threshold" + few)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Train as the command line says -> the final report, as metrics.json has it. Raises InputError."""
    options = parse_options(argv)
    start_processes(options)
    run = prepare(options)
    if options.resume:
        load_state(run)
    if is_leader():
        try:
            write_inputs(run)
        except OSError as error:
            raise InputError(f"--out {options.out}: {error}") from None
    fit(run)
    report = finish(run)
    image = (run.tables["test"].paths or run.tables["val"].paths)[0]
    model = [] if options.out == "outputs" else ["--model", str(run.out / "model.pth")]
    next_one = shlex.join(["python", "inference.py", str(image), *model, "--save", "drawn", "--heatmap"])
    say(options, f"\nwritten to {run.out}/: model.pth, the report (metrics.json, predictions.csv, history.csv)\n"
                 "  and pictures (loss_curve.png, pr_curves.png; predictions.png shows the worst mistakes)\n"
                 f"next: {next_one}")
    return report


if __name__ == "__main__":
    dataset.run_command(main)
