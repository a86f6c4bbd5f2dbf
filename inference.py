"""The network, its checkpoint, and the labels that it finds in images.

    python inference.py img.jpg                         # a table of labels, probabilities and thresholds
    python inference.py photos/ --format csv --out predictions.csv
    python inference.py photos/ --save drawn/ --heatmap # pictures of the labels and of where they were seen
    python inference.py photos/ --model a.pth b.pth --tta  # the mean of two models, and of mirrored images
    python inference.py --evaluate data/                # report a saved model on a labelled folder, or its test part
    python inference.py --calibrate data/ --model a.pth b.pth --out ab.pth  # make them one model

    classifier = inference.load_model("outputs/model.pth")
    probabilities = inference.predict(classifier, ["img.jpg"])      # (N, C); paths, PIL images, bytes or arrays

To deploy a model, copy dataset.py, inference.py and model.pth; --evaluate and --calibrate need metrics.py too.
"""

import copy
import csv
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dataset
from dataset import IMAGE_SUFFIXES, ImageDataset, ImageError, InputError, LabelTable, number, print_text

BACKBONES = {  # torchvision network -> its last linear layer, which the head replaces
    "resnet18": "fc",
    "resnet50": "fc",
    "densenet121": "classifier",
    "mobilenet_v2": "classifier.1",
    "efficientnet_b0": "classifier.1",
    "vgg16": "classifier.6",
}
LAST_MAPS = dict.fromkeys(BACKBONES, "features") | {"resnet18": "layer4", "resnet50": "layer4"}  # before the pooling
HEADS = {"linear": [0.0], "mlp": [0.5, 0.3], "bn": [0.0]}  # head -> its default dropout
FORMAT = 2  # of model.pth and last.pth


# ---------------------------------------------------------------------------------------------------------------------
# The network


def build_model(backbone, head, num_classes, dropout=None):
    """A torchvision network with a new head, randomly initialised -> nn.Module, images (B, 3, H, W)
    -> logits (B, C).

    backbone: a name of BACKBONES. head: "linear"; "mlp" (BatchNorm, Dropout, Linear to a quarter,
    ReLU, Dropout, Linear); or "bn" (Linear, BatchNorm). dropout: one rate, or two for "mlp"; by
    default those of HEADS.
    """
    network = torchvision_models().get_model(backbone, weights=None)
    parent, _, name = BACKBONES[backbone].rpartition(".")
    features = network.get_submodule(BACKBONES[backbone]).in_features
    setattr(network.get_submodule(parent), name, _build_head(head, features, num_classes, dropout or HEADS[head]))
    return network


def torchvision_models():
    """torchvision.models: it takes seconds to import, and so waits until a network is needed."""
    try:
        import torchvision.models
    except (ImportError, RuntimeError, AttributeError) as error:
        raise InputError(f"torchvision does not work with this torch ({str(error).splitlines()[0]}): install both "
                         "together, with pip install -r requirements.txt") from None
    return torchvision.models


class InFullPrecision:
    """Compute a layer in the precision of its weights, also where autocast lowers that of the others: logits in bf16
    have 8 significant bits, so that different images tie."""

    def forward(self, features):
        features = features.to(next(self.parameters()).dtype)
        kind = features.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return super().forward(features)

        with torch.autocast(kind, enabled=False):
            return super().forward(features)


class Linear(InFullPrecision, nn.Linear):
    """A head of one linear layer."""


class Sequential(InFullPrecision, nn.Sequential):
    """A head of several layers."""


def _build_head(head, features, num_classes, dropout):
    if head == "mlp":
        first, second = (*dropout, dropout[-1])[:2]
        hidden = features // 4
        return Sequential(
            nn.BatchNorm1d(features), nn.Dropout(first), nn.Linear(features, hidden), nn.ReLU(),
            nn.Dropout(second), nn.Linear(hidden, num_classes),
        )
    if head == "linear" and not dropout[0]:
        return Linear(features, num_classes)

    layers = [nn.Dropout(dropout[0])] if dropout[0] else []
    layers.append(nn.Linear(features, num_classes))
    if head == "bn":
        layers.append(nn.BatchNorm1d(num_classes))
    return Sequential(*layers)


def choose_device(name):
    """ "auto" or a device name -> torch.device. Raises InputError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


FEW = 16  # images, up to which it does not pay to measure what is fastest


def choose_precision(name, device, images=math.inf):
    """ "auto", "fp32", "bf16" or "fp16" -> (the dtype that the network computes in, the reason in
    words).

    auto: on a CUDA GPU bf16 from compute capability 8.0 on, fp16 from 7.0 on, else fp32. On a CPU
    that has bf16 instructions bf16 where a convolution is at least 1.3 times as fast in it, for
    more than FEW images; else fp32.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], "as asked for"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = "the GPU has compute capability {}.{}".format(*capability)
        if capability >= (8, 0):
            return torch.bfloat16, reason
        return torch.float16 if capability >= (7, 0) else torch.float32, reason
    if device.type != "cpu" or not has_bf16_instructions():
        return torch.float32, f"the {device.type} has no bf16 instructions that are known"
    if images <= FEW:
        return torch.float32, "few images"
    speedup = measure_bf16()
    reason = f"a convolution in bf16 is {speedup:.1f} times as fast as in fp32"
    return torch.bfloat16 if speedup >= 1.3 else torch.float32, reason


def has_bf16_instructions():
    """Whether the processor says that it multiplies bf16: a hint, since some do it slowly."""
    info = Path("/proc/cpuinfo")
    return info.exists() and re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", info.read_text()) is not None


@functools.cache
def measure_bf16():
    """How many times as fast a convolution, forward and backward, is in bf16 as in fp32. It takes
    about a tenth of a second, once in a process."""
    images = torch.ones(4, 64, 56, 56).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.ones(64, 64, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()

    def seconds(precision):
        started = time.perf_counter()
        with torch.enable_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            nn.functional.conv2d(images, weight, padding=1).float().sum().backward()
        return time.perf_counter() - started

    seconds(torch.float32)  # the first calls are slow
    seconds(torch.bfloat16)
    pairs = []  # in turn, and no longer than there is a doubt
    while len(pairs) < 4 and (not pairs or pairs[0][1] < 5 * pairs[0][0]):
        pairs.append((seconds(torch.float32), seconds(torch.bfloat16)))
    fp32, bf16 = map(min, zip(*pairs))
    return fp32 / bf16


def default_workers():
    """Threads that decode images: the processors this process may use, but no more than 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def to_device(network, device):
    """Move a network to its device, in the memory layout that convolutions are fastest in."""
    return network.to(device, memory_format=torch.channels_last)


def forward(network, images, precision):
    """Return the float32 logits (B, C) of normalised images (B, 3, H, W), or of features (B, F) for a head. The
    backbone computes in `precision`, the head in fp32."""
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        return network(images).float()


def scaled(images, size):
    """Images (B, 3, H, W) in (size, size), as they are when they have it."""
    if images.shape[2:] == (size, size):
        return images
    return nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def share_tensors(network):
    """A copy of a network with the same tensors, whose layers and hooks are its own."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def fold_batchnorm(network):
    """A copy of a network in eval mode whose convolutions do the work of the BatchNorm right behind
    them; all other tensors are shared. Logits differ by rounding alone."""
    network = share_tensors(network)
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, layer), (next_name, next_layer) in itertools.pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(layer, next_layer))
                setattr(module, next_name, nn.Identity())
    return network


@torch.inference_mode()
def compute_logits(classifier, images, precision, batch_size=32, workers=2, rows=None):
    """Logits of the given rows of an ImageDataset (default: all), in order -> float32 (V, N, C) on
    the device.

    There is a view for each member of the Classifier, and when it is `mirrored` a second one of the
    mirrored image. An image is decoded once, at images.size, and scaled down for members of a
    smaller size.
    """
    device = classifier.device
    rows = np.arange(len(images)) if rows is None else rows
    networks = [member.network.eval() for member in classifier.members]
    if precision == torch.float32 and len(rows) > FEW:
        networks = [fold_batchnorm(network) for network in networks]
    order = np.array_split(rows, max(1, -(-len(rows) // batch_size)))
    logits = []
    for batch, _, _ in dataset.batches(images, order, workers, pin=device.type == "cuda"):
        batch = dataset.normalize(batch.to(device, non_blocking=True))
        views = []
        for member, network in zip(classifier.members, networks):
            view = scaled(batch, member.size)
            views.append(forward(network, view, precision))
            if classifier.mirrored:
                views.append(forward(network, view.flip(3), precision))
        logits.append(torch.stack(views))
    return torch.cat(logits, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Member:
    """One network of a Classifier: a label's probability is sigmoid(scale * logit + its offset)."""

    network: nn.Module
    backbone: str
    head: str
    dropout: list
    size: int  # images are resized to (size, size)
    offsets: list  # C numbers
    scale: float = 1.0


@dataclass
class Classifier:
    """One or several networks, whose probabilities are averaged, with all that is needed to use
    them: what model.pth holds."""

    members: list  # of Member
    classes: list  # C names
    groups: dict  # group name -> its class names; may be empty
    thresholds: list  # C numbers: a label is present when its probability is >= its threshold
    mirrored: bool = False  # the probabilities of the mirrored image are averaged too
    epoch: int = 0
    scores: dict = field(default_factory=dict)  # on val, at that epoch
    trained_on: list = field(default_factory=list)  # train.image_keys() of the images that it was trained on
    options: dict = field(default_factory=dict)  # of the run that trained it
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.float32  # None: chosen for each predict() by what is fastest for so many images

    @property
    def network(self):
        """The network, of a classifier that has one."""
        return self.members[0].network

    @property
    def size(self):
        """The largest size of its members, at which images are decoded."""
        return max(member.size for member in self.members)

    def __str__(self):
        names = Counter(f"{member.backbone}, {member.size} px" for member in self.members)
        described = "; ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
        return f"{described}{'; mirrored too' if self.mirrored else ''}; {len(self.classes)} classes, on {self.device}"


MEMBER_FIELDS = ("backbone", "head", "dropout", "size", "offsets", "scale")
SAVED_FIELDS = ("classes", "groups", "thresholds", "mirrored", "epoch", "scores", "options")


def save_model(classifier, path):
    """Write a Classifier as model.pth: plain tensors, numbers and strings."""
    content = {"format": FORMAT, "members": []} | {name: getattr(classifier, name) for name in SAVED_FIELDS}
    content["trained_on"] = classifier.trained_on
    for member in classifier.members:
        state = {name: tensor.cpu().contiguous() for name, tensor in member.network.state_dict().items()}
        content["members"].append({name: getattr(member, name) for name in MEMBER_FIELDS} | {"network": state})
    write_checkpoint(path, content)


def write_checkpoint(path, content):
    """torch.save() that leaves a whole file: the new one, or when that fails the one before. Raises
    OSError."""
    with dataset.atomic_write(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of torch's writer, after what the disk said
            raise error.__context__ or error from None


def check_content(path, content, names, kind):
    """Raise an InputError unless `content` is a dict with these names, a `kind` of train.py."""
    if not isinstance(content, dict) or not {"format", *names} <= content.keys():
        raise InputError(f"{path} is not a {kind} of train.py; its weights, perhaps, are for train.py --weights {path}")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}, and this program reads {FORMAT}: use the version of "
                         "the program that wrote it")


def read_checkpoint(path):
    """What torch.save() wrote, without running any code in it. Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is not there") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors, numbers and strings, or is no PyTorch checkpoint: "
                         "it was not loaded") from None
    except Exception as error:  # torch's reader raises whatever the broken bytes lead it to
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint: {reason}") from None


def load_model(path="outputs/model.pth", device="auto", precision="auto"):
    """Read a model.pth -> Classifier, ready for predict(). A list of paths gives one with the
    networks of all, and the mean of their thresholds; their classes must be the same. Raises
    InputError."""
    if not isinstance(path, (str, os.PathLike)):
        return _join([load_model(one, device, precision) for one in path], path)
    if not Path(path).exists():
        raise InputError(f"{path} is not there: train a model first (python train.py), or name one with --model")
    content = read_checkpoint(path)
    check_content(path, content, ("members", *SAVED_FIELDS), "model.pth")
    device = choose_device(device)
    count = len(content["classes"])
    members = []
    for saved in content["members"]:
        fields = {name: saved[name] for name in MEMBER_FIELDS}
        try:
            with torch.device("meta"):  # no time is spent on initial values that are replaced at once
                network = build_model(fields["backbone"], fields["head"], count, fields["dropout"])
            network.load_state_dict(saved["network"], assign=True)
        except InputError:  # of torchvision
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is damaged: its tensors are not those of a {fields['backbone']} network with a "
                             f"{fields['head']} head for its classes") from None
        members.append(Member(to_device(network, device).eval(), **fields))
    if len(content["thresholds"]) != count:
        raise InputError(f"{path} is damaged: it has {len(content['thresholds'])} thresholds for {count} classes")
    precision = None if precision == "auto" else choose_precision(precision, device)[0]
    classifier = Classifier(members, **{name: content[name] for name in SAVED_FIELDS}, device=device,
                            precision=precision)
    classifier.trained_on = content.get("trained_on", classifier.trained_on)  # older files do not have it
    return classifier


def _join(classifiers, paths):
    """Several Classifiers as one."""
    first = classifiers[0]
    for other, path in zip(classifiers, paths):
        if other.classes != first.classes:
            raise InputError(f"{path} has other classes than {paths[0]}: {', '.join(other.classes)}")
    members = [member for classifier in classifiers for member in classifier.members]
    thresholds = np.mean([classifier.thresholds for classifier in classifiers], axis=0).tolist()
    mirrored = any(classifier.mirrored for classifier in classifiers)
    trained_on = sorted(set().union(*(classifier.trained_on for classifier in classifiers)))
    return replace(first, members=members, thresholds=thresholds, mirrored=mirrored, trained_on=trained_on)


@dataclass
class Weights:
    """The content of a file of weights, or torchvision's weights."""

    source: str  # "imagenet", or the file
    tensors: dict  # name -> tensor
    classes: list  # that a checkpoint of train.py names, else empty
    trained_on: list  # as in a Classifier


def load_weights(network, weights, backbone, classes=()):
    """Load every tensor whose name and shape match, and return (names taken, {name: why not} of the others, classes
    taken).

    weights: what read_weights() returns, or its argument. Of a checkpoint of train.py the head's last layers are taken
    row by row, for the classes that it and `classes` both name. Raises InputError when the weights cannot be had,
    match nothing, or are those of another backbone.
    """
    if not isinstance(weights, Weights):
        weights = read_weights(weights, backbone)
    own = network.state_dict()
    state = _without_prefix(weights, own)
    known = weights.classes
    skipped = {}
    common = []

    # Rows of the head are found by the names of their classes, all of a class or nothing: by their places, they could
    # be those of other classes.
    if known and classes:
        rows = _class_tensors(network, backbone)
        if all(name in state and state[name].shape == (len(known), *own[name].shape[1:]) for name in rows):
            common = [name for name in classes if name in known]
            skipped |= {f"head row of {name}": "new class" for name in classes if name not in known}
            skipped |= {f"head row of {name}": "class that is gone" for name in known if name not in classes}
        for name in rows:
            saved = state.pop(name, None)
            if common:
                state[name] = own[name].clone()
                for label in common:
                    state[name][classes.index(label)] = saved[known.index(label)]
            elif saved is not None:
                skipped[name] = "of another head, or of other classes"

    taken = {}
    for name, tensor in state.items():
        if name not in own:
            skipped[name] = "not in this network"
        elif not isinstance(tensor, torch.Tensor) or tensor.shape != own[name].shape:
            skipped[name] = f"another shape than {tuple(own[name].shape)}"
        else:
            taken[name] = tensor
    _refuse_other_backbone(weights.source, state, taken, backbone)
    network.load_state_dict(taken, strict=False)
    skipped |= {name: "not in the file" for name in own if name not in taken and name not in skipped}
    return list(taken), skipped, common


def read_weights(weights, backbone):
    """Return the Weights of "imagenet" (torchvision's default weights of the backbone), or of a file: a model.pth, a
    last.pth or a state_dict. Raises InputError."""
    if weights == "imagenet":
        return Weights(weights, _download(backbone), [], [])

    content = read_checkpoint(weights)
    if not isinstance(content, dict):
        raise InputError(f"{weights} holds no state_dict")
    known = []
    trained_on = []
    if "format" in content and "classes" in content:  # of train.py
        known = list(content["classes"])
        trained_on = list(content.get("trained_on", []))
    if "members" in content:  # a model.pth
        content = content["members"][0]

    # Other programs wrap the tensors, some of them twice.
    wrappers = ("network", "state_dict", "model_state_dict", "model")
    while inner := [content[key] for key in wrappers if isinstance(content.get(key), dict)]:
        content = inner[0]
    return Weights(str(weights), {str(name): tensor for name, tensor in content.items()}, known, trained_on)


def _without_prefix(weights, own):
    """Return the tensors of Weights without what wrappers put before their names: module., _orig_mod., model.backbone.

    The prefix is the one behind which most names of the network follow: in net.conv1.weight, net.layer1.0.conv1.weight
    it is "net.", as "net.layer1.0." has a single one behind it. Raises InputError when two have equally many.
    """
    counts = Counter()
    for name in weights.tensors:
        parts = name.split(".")
        counts.update(".".join(parts[:start]) for start in range(len(parts)) if ".".join(parts[start:]) in own)
    most = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    best = min(most, key=len, default="")
    if not all(prefix.startswith(best) for prefix in most):
        raise InputError(f"{weights.source} holds several networks, {' and '.join(most)}: save the one to use alone")

    if not best:
        return dict(weights.tensors)
    inside = {name[len(best) + 1 :]: tensor for name, tensor in weights.tensors.items() if name.startswith(best + ".")}
    return {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(best + ".")} | inside


def _refuse_other_backbone(source, state, taken, backbone):
    """Raise an InputError when less than half of the file fits, or when it is plainly that of another backbone.

    The head does not count, and nor does what the file lacks, since files of the first layers alone are of use. Half
    of a ResNet18 has the names and shapes of a ResNet50, so that another backbone which fits as a whole decides first.
    """

    def fitting(name, shapes):
        """Return which share of the file a backbone has a place for: of its tensors or of its weights, the lower."""
        sizes = {key: tensor.numel() for key, tensor in state.items()
                 if isinstance(tensor, torch.Tensor) and not key.startswith(BACKBONES[name] + ".")}
        fit = [key for key in sizes if shapes.get(key) == state[key].shape]
        return min(len(fit) / max(len(sizes), 1), sum(sizes[key] for key in fit) / max(sum(sizes.values()), 1))

    share = fitting(backbone, {key: tensor.shape for key, tensor in taken.items()})
    if taken and (share == 1 or all(key.startswith(BACKBONES[backbone] + ".") for key in state)):
        return

    for name in BACKBONES:
        with torch.device("meta"):  # shapes alone, which take no time
            other = torchvision_models().get_model(name, weights=None).state_dict()
        if fitting(name, {key: tensor.shape for key, tensor in other.items()}) > max(share, 0.9):
            raise InputError(f"{source} has weights of which {share:.0%} fit {backbone}: it looks like {name}: give "
                             f"--backbone {name}, or other --weights")
    if not taken:
        raise InputError(f"{source} has no tensor that fits {backbone}: is it of another backbone?")
    if share < 0.5:
        raise InputError(f"{source} has weights of which {share:.0%} fit {backbone}: is it of another backbone?")


def _class_tensors(network, backbone):
    """The names of the tensors with a row per class: those of the head behind its ReLU, or all of
    it."""
    root = BACKBONES[backbone]
    names = []
    for path, layer in network.get_submodule(root).named_modules(prefix=root):
        if isinstance(layer, nn.ReLU):
            names = []
        elif not isinstance(layer, nn.Sequential):
            names += [f"{path}.{key}" for key, tensor in layer.state_dict().items() if tensor.dim()]
    return names


def _download(backbone):
    weights = torchvision_models().get_model_weights(backbone).DEFAULT
    try:
        return weights.get_state_dict(progress=sys.stderr is not None and sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:  # no network; a broken download
        raise InputError(f"the ImageNet weights of {backbone} could not be downloaded ({error}): use --weights PATH "
                         f"for a file, or --weights none to train from scratch") from None


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def predict(classifier, images, batch_size=32, workers=None):
    """Probabilities of the labels of images -> float32 (N, C), columns in the order of
    classifier.classes.

    images: an image or a list of them, each a path, a PIL image, the bytes of a file, a file
    object, or a uint8 array (H, W, 3). Raises ImageError for the first image that cannot be read.
    """
    single = isinstance(images, (str, os.PathLike, bytes)) or hasattr(images, "mode") or hasattr(images, "read")
    if single or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]
    probabilities, errors = predict_all(classifier, list(images), batch_size, workers)
    if errors:
        raise ImageError(errors[min(errors)])
    return probabilities


def predict_all(classifier, images, batch_size=32, workers=None):
    """predict() that goes on past bad images -> (probabilities (N, C), NaN for a bad image; {row:
    message})."""
    logits, errors = _logits_of(classifier, images, batch_size, workers)
    probabilities = to_probabilities(classifier, logits)
    probabilities[list(errors)] = np.nan
    return probabilities, errors


def _logits_of(classifier, images, batch_size, workers):
    """-> (the (V, N, C) of compute_logits(), {row: message} of images that cannot be read)."""
    unknown = np.full((len(images), len(classifier.classes)), np.nan, np.float32)
    if not len(images):
        return torch.zeros(len(classifier.members), *unknown.shape), {}
    names = [dataset.image_name(image) for image in images]
    data = ImageDataset(LabelTable(names, images, unknown, classifier.classes), classifier.size)
    workers = default_workers() if workers is None else workers
    precision = classifier.precision or choose_precision("auto", classifier.device, len(images))[0]
    return compute_logits(classifier, data, precision, batch_size, workers), data.errors


def to_probabilities(classifier, logits):
    """Logits (V, N, C) of compute_logits() -> the mean of the members' probabilities, float32 (N,
    C)."""
    views = logits.cpu().double().unflatten(0, (len(classifier.members), -1))  # (members, 1 or 2 if mirrored, N, C)
    scales = torch.tensor([member.scale for member in classifier.members]).double().view(-1, 1, 1, 1)
    offsets = torch.tensor([member.offsets for member in classifier.members]).double()[:, None, None, :]
    return torch.sigmoid(scales * views + offsets).mean(dim=(0, 1)).float().numpy()


def fit_calibration(classifier, logits, targets):
    """Improve the calibration of a classifier by metrics.fit_calibration(). logits: (V, N, C) of
    compute_logits(); targets (N, C) with 1, 0, NaN. What is fitted to the mean of several members
    is given to each, so it takes turns."""
    import metrics

    for _ in range(1 if len(classifier.members) == 1 else 3):
        add_calibration(classifier, *metrics.fit_calibration(targets, to_probabilities(classifier, logits)))


def add_calibration(classifier, scale, offsets):
    """Calibrate what comes out of each member by a scale and offsets (C,), as metrics.calibrate()
    does."""
    for member in classifier.members:
        member.scale *= scale
        member.offsets = (scale * np.array(member.offsets) + offsets).tolist()


def targets_for(classifier, table):
    """The labels of a LabelTable in the order of the classifier's classes -> (N, C). Other classes
    are ignored; one that the data does not name is absent where the data lists what is there, else
    an InputError."""
    lacking = [name for name in classifier.classes if name not in table.classes]
    if lacking and math.isnan(table.absent):
        raise InputError(f"the data has no labels for {', '.join(lacking)}; it has {', '.join(table.classes)}")
    targets = np.full((len(table), len(classifier.classes)), table.absent, np.float32)
    for c, name in enumerate(classifier.classes):
        if name in table.classes:
            targets[:, c] = table.targets[:, table.classes.index(name)]
    return targets


def _readable(table, errors):
    """The rows of a table whose images could be read; the others are told. Raises InputError when
    there is none."""
    for message in errors.values():
        print_text(f"skipped: {message}", file=sys.stderr)
    if len(errors) == len(table):
        raise InputError(f"none of the {len(table)} images can be read, as {errors[0]}")
    return np.array([row for row in range(len(table)) if row not in errors])


def evaluate(classifier, table, batch_size=32, workers=None):
    """Report a classifier on a LabelTable, as targets_for() reads it -> metrics.report() dict, with
    intervals."""
    metrics = import_metrics("--evaluate")
    targets = targets_for(classifier, table)
    probabilities, errors = predict_all(classifier, table.paths, batch_size, workers)
    good = _readable(table, errors)
    return metrics.report(targets[good], probabilities[good], classifier.thresholds, classifier.classes, True)


def calibrate(classifier, table, batch_size=32, workers=None):
    """Choose the calibration of a classifier's members and its soft thresholds anew on a
    LabelTable, as targets_for() reads it -> its report there, as of evaluate()."""
    metrics = import_metrics("--calibrate")
    logits, errors = _logits_of(classifier, table.paths, batch_size, workers)
    good = _readable(table, errors)
    targets = targets_for(classifier, table)[good]
    fit_calibration(classifier, logits[:, good], targets)
    probabilities = to_probabilities(classifier, logits[:, good])
    classifier.thresholds = metrics.find_thresholds(targets, probabilities, "soft").tolist()
    return metrics.report(targets, probabilities, classifier.thresholds, classifier.classes, intervals=True)


def import_metrics(option):
    """metrics.py, which a deployed model goes without."""
    try:
        import metrics
    except ImportError:
        raise InputError(f"{option} needs metrics.py beside inference.py: copy it there too") from None
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def prediction_rows(ids, probabilities, thresholds, classes, groups):
    """The rows of predictions.csv, the header first: per image and group the labels present, most
    confident first, the same with their probabilities (label:0.1234), and the mean of those; ;
    separates the labels of a cell."""
    groups = groups or {"labels": classes}
    averages = [f"avg_{group.removesuffix('s')}_confidence" for group in groups] + ["overall_avg_confidence"]
    if list(groups) == ["labels"]:
        averages = ["avg_confidence"]
    rows = [["ID", *groups, *(f"{group}_confidence" for group in groups), *averages]]
    for name, row, cuts in zip(ids, probabilities, np.broadcast_to(thresholds, probabilities.shape)):
        labels = []
        confidences = []
        numbers = []
        for members in groups.values():
            columns = [classes.index(member) for member in members]
            found = sorted((c for c in columns if row[c] >= cuts[c]), key=lambda c: -row[c])
            labels.append(";".join(classes[c] for c in found))
            confidences.append(";".join(f"{classes[c]}:{row[c]:.4f}" for c in found))
            numbers.append([float(row[c]) for c in found])
        if len(averages) > 1:
            numbers.append(list(itertools.chain(*numbers)))
        rows.append([name, *labels, *confidences, *(f"{np.mean(part):.4f}" if part else "" for part in numbers)])
    return rows


def format_predictions(style, ids, probabilities, thresholds, classifier):
    """Predictions as text. style: "table" (the whole table for one image, a line each for several),
    "csv" (labels and confidences), "probabilities" (CSV with a column per class) or "json" ({name of
    json_names(): indices of the labels present})."""
    classes = classifier.classes
    present = probabilities >= thresholds
    if style == "json":
        indices = [np.flatnonzero(row).tolist() for row in present]
        return json.dumps(dict(zip(json_names(ids), indices)), ensure_ascii=False)
    if style in ("csv", "probabilities"):
        rows = [["ID", *classes], *([name, *map(str, row)] for name, row in zip(ids, probabilities))]
        if style == "csv":
            rows = prediction_rows(ids, probabilities, thresholds, classes, classifier.groups)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().rstrip("\n")
    if len(ids) == 1:
        width = max(9, *map(len, classes))
        lines = [ids[0], f"{'attribute':{width}}  probability  threshold  status"]
        for c, name in enumerate(classes):
            status = "[PRESENT]" if present[0, c] else "[absent]"
            lines.append(f"{name:{width}}  {probabilities[0, c]:11.4f}  {thresholds[c]:9.4f}  {status}")
        return "\n".join([*lines, "", f"present: {dataset.list_names(classes, present[0]) or 'none'}"])
    width = max(map(len, ids))
    lines = []
    for name, row, found in zip(ids, probabilities, present):
        labels = [f"{classes[c]} {row[c]:.2f}" for c in np.flatnonzero(found)]
        lines.append(f"{name:{width}}  {', '.join(labels) or 'none'}")
    return "\n".join(lines)


def json_names(ids):
    """Shorten the names of images to what tells them apart, as the keys of COCO's predictions are.

    A name is the stem, else the path without a suffix, else the path: "a/1.jpg", "b/1.jpg", "b/2.jpg" and "b/2.png"
    become "a/1", "b/1", "b/2.jpg" and "b/2.png". No form is used that another image has too.
    """
    forms = []
    for name in ids:
        path, suffix = os.path.splitext(name.replace("\\", "/"))
        if suffix.lower() not in IMAGE_SUFFIXES:  # a dot of the name itself
            path += suffix
        forms.append((path.rpartition("/")[2], path, name))
    counts = Counter(form for own in forms for form in set(own))
    return [next((form for form in own if counts[form] == 1), own[-1]) for own in forms]


def find_images(arguments):
    """Return the IDs and the paths of the images in files and folders. Raises InputError.

    A folder stands for all images below it, sorted, each named by its path from there. Its other files are counted on
    stderr. A file is an image whatever its suffix; it is named by its name, or by what was given where two have the
    same.
    """
    ids = []
    paths = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            found, skipped = [], []
            for name in sorted(dataset.ImageFolder(argument, argument).names):
                (found if Path(name).suffix.lower() in IMAGE_SUFFIXES else skipped).append(name)
            others = _count_suffixes(skipped)
            if not found and not others:
                raise InputError(f"{argument} holds no files: name a folder of images")
            if not found:
                raise InputError(f"{argument} holds no images that can be read, only {others}: convert images of other "
                                 "formats to JPEG or PNG")
            if others:
                print_text(f"{argument}: skipped {others}, which are not read as images", file=sys.stderr)
            ids += found
            paths += [argument / name for name in found]
        elif os.path.lexists(argument):
            ids.append(argument.name)
            paths.append(argument)
        else:
            raise InputError(f"{argument} is not there: name an image or a folder of images")
    if not paths:
        raise InputError("no image is named: python inference.py IMAGE_OR_FOLDER ...")
    counts = Counter(ids)
    return [str(path) if counts[name] > 1 else name for name, path in zip(ids, paths)], paths


def _count_suffixes(names):
    """Describe files by their suffixes, the most frequent first: "12 .heic, 1 .csv". Hidden files are left out."""
    names = [Path(name) for name in names]
    suffixes = [path.suffix.lower() or "without a suffix" for path in names if not path.name.startswith(".")]
    return ", ".join(f"{count} {suffix}" for suffix, count in Counter(suffixes).most_common())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of results: heatmaps, labels, mistakes


PICTURE_SIDE = 360  # pixels, the longer side of an image that --save draws


def heatmaps(classifier, image, labels):
    """Where in an image the network sees each of the labels -> float32 (len(labels), size, size), 0
    to 1 each.

    image: as of predict(). labels: column numbers. Grad-CAM: Selvaraju et al. (2017), "Grad-CAM:
    Visual Explanations from Deep Networks via Gradient-based Localization": the last feature maps,
    weighted by the mean gradient of the logit; for a linear head that is CAM (Zhou et al. 2016). Of
    several networks the mean. All 0 where no region was found. Raises ImageError.
    """
    pixels = torch.from_numpy(np.array(dataset.load_image(image, classifier.size))).permute(2, 0, 1)[None]
    images = dataset.normalize(pixels.to(classifier.device))
    total = sum(_member_heatmaps(member, images, labels) for member in classifier.members)
    return total / total.max(axis=(1, 2), keepdims=True, initial=1e-30)


def _member_heatmaps(member, images, labels):
    """heatmaps() of one network, of a normalised image (1, 3, H, W), in its size."""
    kept = []
    network = share_tensors(member.network).eval()  # for the hook, so that threads may share the classifier
    network.get_submodule(LAST_MAPS[member.backbone]).register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.enable_grad():
        logits = network(scaled(images, member.size).requires_grad_())[0]
    result = np.zeros((len(labels), *images.shape[2:]), np.float32)
    for i, label in enumerate(labels):
        gradient = torch.autograd.grad(logits[label], kept[0], retain_graph=True)[0]
        maps = (gradient.mean((2, 3), keepdim=True) * kept[0].detach()).sum(1, keepdim=True).relu()
        maps = upsample(maps, images.shape[2])
        result[i] = (maps / maps.max().clamp(min=1e-30)).cpu()[0]
    return result


def upsample(maps, size):
    """Feature maps (1, 1, h, w) -> (1, size, size). With zeros around them a cell at the edge is
    highest in its middle, not along the edge of the image."""
    height, width = maps.shape[2:]
    axis = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=maps.device)
    points = torch.meshgrid(axis * width / (width + 2), axis * height / (height + 2), indexing="xy")
    padded = nn.functional.pad(maps, (1, 1, 1, 1))
    grid = torch.stack(points, dim=-1)[None]
    return nn.functional.grid_sample(padded, grid, mode="bicubic", align_corners=False)[0].clamp(min=0)


def draw_heatmap(image, heat):
    """A PIL image in grey, a heatmap (H, W) over it in yellow to red, and a ring where it is
    highest."""
    grey = image.convert("L").convert("RGB")
    heat = Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR)
    values = np.asarray(heat).clip(0, 1)
    glow = ImageOps.colorize(Image.fromarray((255 * values).astype(np.uint8)), "yellow", "red")
    grey.paste(glow, mask=Image.fromarray((170 * values).astype(np.uint8)))
    if values.any():
        y, x = np.unravel_index(values.argmax(), values.shape)
        radius = max(image.size) / 30
        ring = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(grey).ellipse(ring, outline="white", width=max(1, round(radius / 4)))
    return grey


def picture_paths(paths, folder):
    """Return the file in `folder` that save_pictures() draws each image into."""
    return [Path(folder) / f"{Path(name).stem}.png" for name in dataset.distinct_names(paths)]


DRAWN = "inference.py --save"  # what the pictures that save_pictures() draws name as their software


def _is_drawn(path):
    """Return whether a file is a picture that save_pictures() has drawn."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == DRAWN
    except OSError:
        return False


def save_pictures(classifier, paths, probabilities, folder, heatmap=False):
    """Draw each image with its labels under it, and with `heatmap` where the network sees each
    label present, into folder/NAME.png -> the paths written. probabilities: (N, C), of
    predict()."""
    names = dataset.picture_names(classifier.classes)
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", DRAWN)
    written = picture_paths(paths, folder)
    for path, picture, row in zip(paths, written, probabilities):
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
    return written


def mistakes_sheet(table, probabilities, thresholds, count=24):
    """The images with the most confident mistakes first -> PIL image.

    table: a LabelTable of N images; probabilities (N, C); thresholds (C,) or (N, C). A mistake is
    as confident as the probability of what was predicted: p for a false alarm, 1 - p for a missed
    label.
    """
    thresholds = np.broadcast_to(thresholds, probabilities.shape)
    predicted = probabilities >= thresholds
    unknown = np.isnan(table.targets)
    wrong = ~unknown & (predicted != (table.targets == 1))
    confidence = np.where(wrong, np.where(predicted, probabilities, 1 - probabilities), 0).max(axis=1)
    rows = np.flatnonzero(wrong.any(axis=1))
    title = f"{len(rows)} of {len(table)} images have a mistake"
    if len(rows):
        title += "; the most confident ones first"
    names = dataset.picture_names(table.classes)
    cells = []
    for row in rows[np.argsort(-confidence[rows], kind="stable")][:count]:
        lines = [(table.ids[row], dataset.BLACK)]
        mistakes = sorted(np.flatnonzero(wrong[row]), key=lambda c: -abs(probabilities[row, c] - thresholds[row, c]))
        for c in mistakes[:6]:
            if predicted[row, c]:
                lines.append((f"+ false alarm: {names[c]} {probabilities[row, c]:.2f}", dataset.RED))
            else:
                lines.append((f"- missed: {names[c]} {probabilities[row, c]:.2f}", dataset.BLUE))
        if len(mistakes) > 6:
            lines.append((f"and {len(mistakes) - 6} mistakes more", dataset.GREY))
        lines.append((f"true: {dataset.list_names(names, table.targets[row] == 1) or 'none'}", dataset.GREY))
        lines.append((f"predicted: {dataset.list_names(names, predicted[row]) or 'none'}", dataset.GREY))
        if unknown[row].any():
            lines.append((f"NA: {dataset.list_names(names, unknown[row])}", dataset.GREY))
        try:
            cells.append((dataset.load_image(table.paths[row], within=200), lines))
        except ImageError:  # it was there a moment ago
            continue
    return dataset.draw_sheet(cells, title)


# Charts


COLOURS = ["#1f6fb4", "#e07b00", "#b9d3ea"]
INK = "#333333"


def draw_chart(series, title, x_label, y_label, size=(900, 420), marks=()):
    """A line chart -> PIL image. series: a list of (name, x values, y values, colour); points that
    are not finite are left out. marks: a list of (x, text) of vertical lines."""
    lines = []
    for _, xs, ys, _ in series:
        points = np.array([xs, ys], float).T
        lines.append(points[np.isfinite(points).all(axis=1)])
    points = np.concatenate(lines) if any(map(len, lines)) else np.array([(0, 0), (1, 1)])
    x_ticks, y_ticks = (ticks(min(values), max(values), size[1] // 70) for values in points.T)
    width, height = 2 * size[0], 2 * size[1]  # drawn twice as large and shrunk, so that lines are smooth
    left, top, right, bottom = 132, 116, width - 48, height - 104

    def to_x(values):
        return np.interp(values, (x_ticks[0], x_ticks[-1]), (left, right))

    def to_y(values):
        return np.interp(values, (y_ticks[0], y_ticks[-1]), (bottom, top))

    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def write(x, y, text, anchor, points=26):
        pen.text((x, y), text, INK, dataset.load_font(points, text), anchor, stroke_width=4, stroke_fill="white")

    for y, value in zip(to_y(y_ticks), y_ticks):
        pen.line([(left, y), (right, y)], fill="#e4e4e4", width=2)
        write(left - 16, y, f"{value:g}", "rm")
    for x, value in zip(to_x(x_ticks), x_ticks):
        pen.line([(x, bottom), (x, bottom + 10)], fill=INK, width=2)
        write(x, bottom + 18, f"{value:g}", "mt")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=2)
    legend = right
    for (name, _, _, colour), points in reversed(list(zip(series, lines))):
        line = list(zip(to_x(points[:, 0]), to_y(points[:, 1])))
        pen.line(line, fill=colour, width=4, joint="curve")
        for x, y in line if len(line) <= 40 else []:
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
        write(legend, top - 28, name, "rm")
        legend -= pen.textlength(name, font=dataset.load_font(26, name)) + 12
        pen.line([(legend - 40, top - 28), (legend, top - 28)], fill=colour, width=6)
        legend -= 68
    for i, (value, text) in enumerate(sorted(marks)):
        x = to_x(value)
        pen.line([(x, top), (x, bottom)], fill="#888888", width=2)
        near_end = x > (left + right) / 2
        y = bottom - 16 - 36 * (i % 8)
        write(x - 12 if near_end else x + 12, y, text, "rb" if near_end else "lb")
    write(width / 2, 32, title, "mm", 30)
    write((left + right) / 2, height - 28, x_label, "mm", 30)
    write(16, top - 28, y_label, "lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def ticks(low, high, count):
    """About `count` round numbers, from at or below `low` to at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    base = 10 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough)
    digits = max(0, -math.floor(math.log10(step)))
    steps = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    return [round(step * k, digits) for k in steps]


def stack_charts(charts, columns, title=""):
    """Charts of one size, in rows, under a title -> PIL image."""
    width, height = charts[0].size
    columns = min(columns, len(charts))
    top = 40 if title else 0
    image = Image.new("RGB", (columns * width, top + -(-len(charts) // columns) * height), "white")
    ImageDraw.Draw(image).text((14, 12), title, "black", dataset.load_font(16))
    for place, chart in enumerate(charts):
        image.paste(chart, (place % columns * width, top + place // columns * height))
    return image


def reliability_chart(targets, probabilities):
    """How often labels were there, by the probability that was predicted, beside the ideal -> PIL
    image. Arguments as of metrics.reliability_curve()."""
    import metrics

    mean, share, _ = metrics.reliability_curve(targets, probabilities)
    series = [("ideal", [0, 1], [0, 1], COLOURS[2]), ("all labels", mean, share, COLOURS[0])]
    return draw_chart(series, "Reliability", "predicted probability", "share that was there", (480, 420))


def pr_curves(targets, probabilities, thresholds, classes, most=20):
    """Precision over recall of each class on val, with a line at its threshold; of many classes the
    `most` with the lowest average precision -> PIL image. targets (N, C) with 1, 0, NaN;
    probabilities (N, C); thresholds (C,)."""
    import metrics

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
        line = ("no known positive", [], [], COLOURS[0])
        marks = []
        if positives:
            precision, recall, cuts = metrics.precision_recall_curve(truth, probabilities[:, c])
            line = (f"AP {scores[c]:.3f}, {positives} positives", recall, precision, COLOURS[0])
            marks = [(recall[np.searchsorted(cuts, thresholds[c])], f"threshold {thresholds[c]:.2f}")]
        name = metrics.shorten(names[c], 34)
        charts.append(draw_chart([line], name, "recall", "precision", (300, 280), marks))
    return stack_charts(charts, 4, title)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_options(argv=None):
    """The command line's options. Raises InputError."""
    parser = dataset.ArgumentParser(
        prog="inference.py", usage="%(prog)s IMAGE|DIR ... | --evaluate DATA | --calibrate DATA --out FILE [options]",
        description="Say which labels images carry.")
    parser.add_argument("paths", nargs="*", metavar="IMAGE|DIR", help="images, or folders of images")
    parser.add_argument("--image", action="append", default=[], metavar="IMAGE", help="the same, as an option")
    add = parser.add_argument_group("model").add_argument
    add("--model", action="append", default=[], metavar="FILE", help="what train.py wrote (default: "
        "outputs/model.pth); several are averaged: every argument that ends in .pth is a model, wherever it stands")
    add("--tta", action="store_true", help="average the probabilities with those of the mirrored image")
    add("--threshold", type=number(float, below=1.001), metavar="T", help="one for all labels (default: the model's)")
    add = parser.add_argument_group("output").add_argument
    add("--format", choices=("table", "csv", "json", "probabilities"), default="table", help="of the predictions")
    add("--out", metavar="FILE", help="write the output into a file")
    add("--save", metavar="DIR", help="draw each image with its labels into DIR")
    add("--heatmap", action="store_true", help="with --save: and where each label was seen (Grad-CAM)")
    group = parser.add_argument_group("labelled data")
    add = group.add_argument
    add("--evaluate", metavar="DATA", help="report the model on this labelled folder: on the test part of the data's "
        "own split, else on val; without a split on all images")
    add("--calibrate", metavar="DATA", help="choose calibration and thresholds anew on this labelled folder, which the "
        "model was not trained on (the val part of the data's own split, else test), and write one model to --out")
    dataset.add_data_options(group)
    add = parser.add_argument_group("system").add_argument
    add("-b", "--batch-size", type=number(int, 1), default=32, metavar="N", help="images at a time")
    add("-j", "--workers", type=number(int), default=default_workers(), metavar="N", help="threads that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="to compute in")
    options = parser.parse_intermixed_args(argv)

    # Images may follow the models of --model, and more models the images: the suffix tells them apart.
    models = [path for path in options.paths if path.lower().endswith(".pth")]
    options.model = [*options.model, *models] or ["outputs/model.pth"]
    options.paths = [path for path in options.paths if path not in models]

    if options.heatmap and not options.save:
        raise InputError("--heatmap draws into the folder of --save DIR: give that too")
    option = "--evaluate" if options.evaluate else "--calibrate"
    if options.evaluate and options.calibrate:
        raise InputError("--evaluate and --calibrate are two commands: give one of them")
    if options.evaluate or options.calibrate:
        if options.paths or options.image or options.save or options.format in ("csv", "probabilities"):
            raise InputError(f"{option} is about its DATA: no images, no --save, --format table or json")
        if options.calibrate and not options.out:
            raise InputError("--calibrate writes a model: say where with --out FILE")
        if options.calibrate and options.threshold is not None:
            raise InputError("--calibrate chooses the thresholds: leave out --threshold")
    if options.out and Path(options.out).suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"--out {options.out} has the name of an image, which would be replaced: name another file")
    for name, value in dataset.data_options(options).items():
        if value and not options.evaluate and not options.calibrate:
            raise InputError(f"--{name.replace('_', '-')} goes with --evaluate DATA")
    return options


def main(argv=None):
    """The command line; returns the probabilities (N, C), or the report with --evaluate and
    --calibrate."""
    options = parse_options(argv)
    if not options.evaluate and not options.calibrate:
        ids, paths = find_images(options.paths + options.image)
        check_outputs(options, paths)
    classifier = load_model(options.model, options.device, options.precision)
    classifier.mirrored |= options.tta
    if options.threshold is not None:
        classifier.thresholds = [options.threshold] * len(classifier.classes)
    described = f"{', '.join(options.model)}: {classifier}"
    if options.evaluate or options.calibrate:
        return use_labels(classifier, options, described)
    print_text(f"{described}; {len(paths)} images", file=sys.stderr)
    probabilities, errors = predict_all(classifier, paths, options.batch_size, options.workers)
    good = [row for row in range(len(paths)) if row not in errors]
    if good:
        text = format_predictions(options.format, [ids[row] for row in good], probabilities[good],
                                  np.array(classifier.thresholds), classifier)
        output(text, options.out)
    if options.save and good:
        chosen = [paths[row] for row in good]
        drawn = save_pictures(classifier, chosen, probabilities[good], options.save, options.heatmap)
        more = f" and {len(drawn) - 1} more" if len(drawn) > 1 else ""
        print_text(f"drawn: {drawn[0]}{more}", file=sys.stderr if options.out else None)
    for message in errors.values():
        print_text(f"skipped: {message}", file=sys.stderr)
    if errors:
        raise ImageError(f"{len(errors)} of {len(paths)} images could not be read")
    return probabilities


def check_outputs(options, paths):
    """Raise an InputError if what is written would replace, or lie among, the images and models that are read."""
    if options.out:
        dataset.refuse_to_replace("--out", options.out, [*options.model, *paths])
    if not options.save:
        return
    if os.path.exists(options.save) and not os.path.isdir(options.save):
        raise InputError(f"--save {options.save} is a file: name a folder")

    # The next run would read the pictures as images.
    folder = Path(options.save).resolve()
    roots = {Path(argument).resolve() for argument in options.paths + options.image if os.path.isdir(argument)}
    if roots & {folder, *folder.parents}:
        raise InputError(f"--save {options.save} lies in a folder of images that are read: name one outside it")
    for picture in picture_paths(paths, options.save):
        if os.path.lexists(picture) and not _is_drawn(picture):
            raise InputError(f"--save {options.save} would replace {picture}, which was not drawn by --save: name "
                             "another folder")


def use_labels(classifier, options, described):
    """Run --evaluate, or --calibrate and report what the classifier is worth on the same images; return the report.

    described: the classifier in words.
    """
    data = options.evaluate or options.calibrate
    option = "--evaluate" if options.evaluate else "--calibrate"
    metrics = import_metrics(option)
    table = dataset.read_labels(data, **dataset.data_options(options))
    if options.out:
        dataset.refuse_to_replace("--out", options.out, _files_read(options, data, table))
    print_text(described, file=sys.stderr)

    # What the model was trained on says little about new images. Calibration leaves test to the report, if it can.
    split, chosen = held_out(table, ("test", "val") if options.evaluate else ("val", "test"))
    if split == "all":
        print_text(f"{option}: all {len(table)} images, including any that the model was trained on, since the data "
                   "has no test or val part with labels of its own", file=sys.stderr)
    else:
        print_text(f"{option}: the {split} part of the data's own split, {len(chosen)} of {len(table)} images",
                   file=sys.stderr)

    measure = evaluate if options.evaluate else calibrate
    report = {"split": split} | measure(classifier, chosen, options.batch_size, options.workers)
    if options.calibrate:
        save_model(classifier, options.out)
        print_text(f"written: {options.out}; on the data that it was calibrated with:", file=sys.stderr)
    if options.format == "json":
        text = dataset.to_json(report)
    else:
        print_text(dataset.summary(table, data) + "\n")
        heading = "all data" if split == "all" else f"{split} split"
        text = f"{heading}, {report['rows']} images\n{metrics.format_report(report)}"
    output(text, options.out if options.evaluate else None)
    return report


def held_out(table, parts):
    """Return the first of `parts` that has known labels in the data's own split, and the LabelTable of its rows.

    Data without any of them is returned whole, as "all".
    """
    for part in parts:
        rows = np.array([row for row, own in enumerate(table.parts) if own == part], int)
        if not np.isnan(table.targets[rows]).all():
            return part, table.subset(rows)
    return "all", table


def _files_read(options, data, table):
    """List the files that --evaluate and --calibrate read; a calibrated model may take the place of the model."""
    named = [name for name in (options.labels, options.label_groups, options.image_list) if name]
    names = [*named, "label_groups.json", "classes.txt", "classes.json"]
    label_files = {origin.rpartition(":")[0] for origin in table.origins}
    models = [] if options.calibrate else options.model
    return [*named, *(Path(data) / name for name in names), *label_files, *models, *table.paths]


def output(text, path):
    """Print the text, or write it into a file."""
    if path:
        dataset.write_text(path, [text])
    else:
        print_text(text)


if __name__ == "__main__":
    dataset.run_command(main)
