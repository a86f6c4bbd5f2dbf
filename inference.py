"""The network, its checkpoint, and what it says of images.

    python inference.py img.jpg                         # a table of labels, probabilities and thresholds
    python inference.py photos/ --format csv --out predictions.csv
    python inference.py photos/ --save drawn/ --heatmap # pictures of the labels and of where they were seen
    python inference.py --evaluate data/                # report a saved model on a labelled folder

    classifier = inference.load_model("outputs/model.pth")
    probabilities = inference.predict(classifier, ["img.jpg"])      # (N, C); paths or PIL images

To deploy a model, copy dataset.py, inference.py and model.pth.
"""

import copy
import csv
import functools
import io
import json
import math
import os
import pickle
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dataset
from dataset import IMAGE_SUFFIXES, ArgumentParser, ImageDataset, ImageError, InputError, LabelTable

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
FORMAT = 1  # of model.pth
PICTURE = 360  # pixels, the longer side of an image that --save draws


# ---------------------------------------------------------------------------------------------------------------------
# The network


def build_model(backbone, head, num_classes, dropout=None):
    """A torchvision network with a new head, randomly initialised -> nn.Module, images (B, 3, H, W) -> logits (B, C).

    backbone: a name of BACKBONES. head: "linear"; "mlp" (BatchNorm, Dropout, Linear to a quarter, ReLU, Dropout,
    Linear); or "bn" (Linear, BatchNorm). dropout: one rate, or two for "mlp"; by default those of HEADS.
    """
    import torchvision.models  # takes seconds, so it waits until a network is needed

    network = torchvision.models.get_model(backbone, weights=None)
    parent, _, name = BACKBONES[backbone].rpartition(".")
    features = network.get_submodule(BACKBONES[backbone]).in_features
    setattr(network.get_submodule(parent), name, _build_head(head, features, num_classes, dropout or HEADS[head]))
    return network


def _build_head(head, features, num_classes, dropout):
    if head == "mlp":
        first, second = (*dropout, dropout[-1])[:2]
        hidden = features // 4
        return nn.Sequential(
            nn.BatchNorm1d(features), nn.Dropout(first), nn.Linear(features, hidden), nn.ReLU(),
            nn.Dropout(second), nn.Linear(hidden, num_classes),
        )
    layers = [nn.Dropout(dropout[0])] if dropout[0] else []
    layers.append(nn.Linear(features, num_classes))
    if head == "bn":
        layers.append(nn.BatchNorm1d(num_classes))
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


def choose_device(name):
    """ "auto" or a device name -> torch.device. Raises InputError for a device that is not there."""
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
    """ "auto", "fp32", "bf16" or "fp16" -> (the dtype that the network computes in, the reason in words).

    auto: on a CUDA GPU bf16 from compute capability 8.0 on, fp16 from 7.0 on, else fp32. On a CPU that has bf16
    instructions bf16 where a convolution is at least 1.3 times as fast in it, for more than FEW images; else fp32.
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
    """How many times as fast this processor computes a convolution, forward and backward, in bf16 as in fp32. It takes
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
    fp32 = []
    bf16 = []
    while len(bf16) < 4 and (not bf16 or bf16[0] < 5 * fp32[0]):  # in turn, and no longer than there is a doubt
        fp32.append(seconds(torch.float32))
        bf16.append(seconds(torch.bfloat16))
    return min(fp32) / min(bf16)


def default_workers():
    """Threads that decode images: the processors this process may use, but no more than 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def to_device(network, device):
    """Move a network to its device, in the memory layout that convolutions are fastest in."""
    return network.to(device, memory_format=torch.channels_last)


def forward(network, images, precision):
    """Normalised images (B, 3, H, W), or what a head takes (B, F) -> float32 logits (B, C), computed in `precision`."""
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        return network(images).float()


def fold_batchnorm(network):
    """A copy of a network in eval mode in which each convolution does the work of the BatchNorm right behind it; all
    other tensors are shared. Logits differ by rounding alone."""
    tensors = [*network.parameters(), *network.buffers()]
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, layer), (next_name, next_layer) in zip(children, children[1:]):
            if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(layer, next_layer))
                setattr(module, next_name, nn.Identity())
    return network


@torch.inference_mode()
def compute_logits(network, images, device, precision, batch_size=32, workers=2, rows=None):
    """Logits of the given rows of an ImageDataset (default: all), in order -> float32 (N, C) on the device."""
    network.eval()
    rows = np.arange(len(images)) if rows is None else rows
    if precision == torch.float32 and len(rows) > FEW:
        network = fold_batchnorm(network)
    order = np.array_split(rows, max(1, -(-len(rows) // batch_size)))
    logits = [
        forward(network, dataset.normalize(batch.to(device, non_blocking=True)), precision)
        for batch, _, _ in dataset.batches(images, order, workers, pin=device.type == "cuda")
    ]
    return torch.cat(logits)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Classifier:
    """A network with all that is needed to use it: what model.pth holds."""

    network: nn.Module
    backbone: str
    head: str
    dropout: list
    classes: list  # C names
    groups: dict  # group name -> its class names; may be empty
    thresholds: list  # C numbers: a label is present when its probability is >= its threshold
    size: int  # images are resized to (size, size)
    epoch: int = 0
    scores: dict = field(default_factory=dict)  # on val, at that epoch
    options: dict = field(default_factory=dict)  # of the run that trained it
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.float32  # None: chosen for each predict() by what is fastest for so many images


PLAIN = ("backbone", "head", "dropout", "classes", "groups", "thresholds", "size", "epoch", "scores", "options")


def save_model(classifier, path):
    """Write a Classifier as model.pth: plain tensors, numbers and strings."""
    content = {"format": FORMAT} | {name: getattr(classifier, name) for name in PLAIN}
    content["network"] = {name: tensor.cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    write_checkpoint(path, content)


def write_checkpoint(path, content):
    """torch.save() that leaves a whole file: the new one, or when that cannot be written the one before."""
    try:
        with dataset.atomic_write(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's writer hides what the disk said
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def check_content(path, content, names, kind):
    """Raise an InputError unless `content` is a dict of a known format with these names: a `kind` of train.py."""
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
    """Read a model.pth -> Classifier, ready for predict(). Raises InputError."""
    if not Path(path).exists():
        raise InputError(f"{path} is not there: train a model first (python train.py), or name one with --model")
    content = read_checkpoint(path)
    check_content(path, content, ("network", *PLAIN), "model.pth")
    fields = {name: content[name] for name in PLAIN}
    try:
        with torch.device("meta"):  # no time is spent on initial values that are replaced at once
            network = build_model(fields["backbone"], fields["head"], len(fields["classes"]), fields["dropout"])
        network.load_state_dict(content["network"], assign=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged: its tensors are not those of a {fields['backbone']} network with a "
                         f"{fields['head']} head for its classes") from None
    if len(fields["thresholds"]) != len(fields["classes"]):
        raise InputError(f"{path} is damaged: it has {len(fields['thresholds'])} thresholds for "
                         f"{len(fields['classes'])} classes")
    device = choose_device(device)
    return Classifier(to_device(network, device).eval(), **fields, device=device,
                      precision=None if precision == "auto" else choose_precision(precision, device)[0])


def load_weights(network, weights, backbone, classes=()):
    """Load every tensor whose name and shape match -> (names taken, {name: why not} of the others, classes taken).

    weights: "imagenet" (torchvision's default weights of the backbone), or the path of a state_dict or a model.pth. Of
    a model.pth the head's last layers are taken row by row, for the classes that it and `classes` both name.
    Raises InputError when the weights cannot be had or nothing matches.
    """
    known, common = (), []
    if weights == "imagenet":
        state = _download(backbone)
    else:
        state = read_checkpoint(weights)
        known = state.get("classes", ()) if isinstance(state, dict) and "network" in state else ()
        for key in ("network", "state_dict", "model"):
            state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    own = network.state_dict()
    if not isinstance(state, dict):
        raise InputError(f"{weights} holds no state_dict")
    taken, skipped = {}, {}
    if known and classes:
        state, labels = dict(state), [label for label in classes if label in known]
        rows = [(classes.index(label), known.index(label)) for label in labels]
        for name in _class_tensors(network, backbone):
            if name in state and state[name].shape == (len(known), *own[name].shape[1:]):
                state[name], common = _copy_rows(own[name], state[name], rows), labels
        skipped |= {f"head row of {label}": "new class" for label in classes if label not in known}
        skipped |= {f"head row of {label}": "class that is gone" for label in known if label not in classes}
    for name, tensor in state.items():
        name = str(name).removeprefix("module.")
        if name not in own:
            skipped[name] = "not in this network"
        elif not isinstance(tensor, torch.Tensor) or tensor.shape != own[name].shape:
            skipped[name] = f"another shape than {tuple(own[name].shape)}"
        else:
            taken[name] = tensor
    if not taken:
        raise InputError(f"{weights} has no tensor that fits {backbone}: is it of another backbone?")
    network.load_state_dict(taken, strict=False)
    skipped |= {name: "not in the file" for name in own if name not in taken and name not in skipped}
    return list(taken), skipped, common


def _class_tensors(network, backbone):
    """The names of the tensors with a row per class: those of the head behind its last ReLU."""
    path = BACKBONES[backbone]
    layers = {path: network.get_submodule(path)}
    if isinstance(layers[path], nn.Sequential):
        layers = {f"{path}.{name}": layer for name, layer in layers[path].named_children()}
    names = []
    for path, layer in reversed(layers.items()):
        if isinstance(layer, nn.ReLU):
            break
        names += [f"{path}.{name}" for name, tensor in layer.state_dict().items() if tensor.dim()]
    return names


def _copy_rows(into, source, rows):
    """A copy of `into` with the rows [(row of it, row of source), ...] taken from `source`."""
    result = into.clone()
    for row, other in rows:
        result[row] = source[other]
    return result


def _download(backbone):
    import torchvision.models

    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:  # no network; a broken download
        raise InputError(f"the ImageNet weights of {backbone} could not be downloaded ({error}): use --weights PATH "
                         f"for a file, or --weights none to train from scratch") from None


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def predict(classifier, images, batch_size=32, workers=None):
    """Probabilities of the labels of images -> float32 (N, C), columns in the order of classifier.classes.

    images: a path or PIL image, or a list of them. Raises ImageError for the first image that cannot be read.
    """
    images = [images] if isinstance(images, (str, os.PathLike)) or hasattr(images, "mode") else list(images)
    probabilities, errors = predict_all(classifier, images, batch_size, workers)
    if errors:
        raise ImageError(errors[min(errors)])
    return probabilities


def predict_all(classifier, images, batch_size=32, workers=None):
    """predict() that goes on past bad images -> (probabilities (N, C), NaN for a bad image; {row: message})."""
    unknown = np.full((len(images), len(classifier.classes)), np.nan, np.float32)
    if not images:
        return unknown, {}
    images = ImageDataset(LabelTable(list(map(str, images)), images, unknown, classifier.classes), classifier.size)
    workers = default_workers() if workers is None else workers
    precision = classifier.precision or choose_precision("auto", classifier.device, len(images))[0]
    logits = compute_logits(classifier.network, images, classifier.device, precision, batch_size, workers)
    probabilities = torch.sigmoid(logits).cpu().numpy()
    probabilities[list(images.errors)] = np.nan
    return probabilities, images.errors


def prediction_rows(ids, probabilities, thresholds, classes, groups):
    """The rows of predictions.csv, the header first: per image and group the labels present, most confident first,
    with their probabilities, and the mean of those; names and numbers of one cell are separated by semicolons."""
    groups = groups or {"labels": classes}
    columns = {group: [classes.index(name) for name in names] for group, names in groups.items()}
    header = ["ID", *groups, *(f"{group}_confidence" for group in groups)]
    if list(groups) == ["labels"]:
        header.append("avg_confidence")
    else:
        header += [f"avg_{group.removesuffix('s')}_confidence" for group in groups] + ["overall_avg_confidence"]
    rows = [header]
    for name, row in zip(ids, probabilities):
        present = {
            group: sorted((c for c in members if row[c] >= thresholds[c]), key=lambda c: -row[c])
            for group, members in columns.items()
        }
        cells = [";".join(classes[c] for c in found) for found in present.values()]
        cells += [";".join(f"{row[c]:.4f}" for c in found) for found in present.values()]
        confidences = [[float(row[c]) for c in found] for found in present.values()]
        if header[-1] == "overall_avg_confidence":
            confidences.append([float(row[c]) for found in present.values() for c in found])
        rows.append([name, *cells, *(f"{np.mean(values):.4f}" if values else "" for values in confidences)])
    return rows


def format_table(probabilities, thresholds, classes):
    """One image's labels as an aligned table, with the list of those present under it."""
    width = max(9, *map(len, classes))
    lines = [f"{'attribute':{width}}  probability  threshold  status"]
    present = probabilities >= thresholds
    for name, probability, threshold, found in zip(classes, probabilities, thresholds, present):
        lines.append(f"{name:{width}}  {probability:11.4f}  {threshold:9.4f}  {'[PRESENT]' if found else '[absent]'}")
    names = [name for name, found in zip(classes, present) if found]
    return "\n".join([*lines, "", f"present: {', '.join(names) or 'none'}"])


def format_predictions(style, paths, probabilities, thresholds, classifier):
    """Predictions as text. style: "table" (the whole table for one image, a line each for several), "csv" or "json"."""
    classes = classifier.classes
    stems = [Path(path).stem for path in paths]
    if style == "json":
        indices = [np.flatnonzero(row >= thresholds).tolist() for row in probabilities]
        return json.dumps(dict(zip(stems, indices)), ensure_ascii=False)
    if style == "csv":
        rows = prediction_rows(stems, probabilities, thresholds, classes, classifier.groups)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().rstrip("\n")
    if len(paths) == 1:
        return f"{paths[0]}\n{format_table(probabilities[0], thresholds, classes)}"
    width = max(map(len, map(str, paths)))
    lines = []
    for path, row in zip(paths, probabilities):
        found = [f"{classes[c]} {row[c]:.2f}" for c in np.flatnonzero(row >= thresholds)]
        lines.append(f"{path!s:{width}}  {', '.join(found) or 'none'}")
    return "\n".join(lines)


def find_images(arguments):
    """Files and folders -> image paths; of a folder all images below it, sorted. Raises InputError."""
    paths = []
    for path in map(Path, arguments):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise InputError(f"{path} holds no images")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            raise InputError(f"{path} is not there: name an image or a folder of images")
    if not paths:
        raise InputError("no image is named: python inference.py IMAGE_OR_FOLDER ...")
    return paths


def evaluate(classifier, table, batch_size=32, workers=None, bootstrap=0):
    """Report a classifier on a LabelTable that knows its classes (others are ignored) -> metrics.report() dict, with
    95 % intervals from `bootstrap` resamples when that is not 0."""
    import metrics  # only needed here, so that a deployed model does without it

    lacking = [name for name in classifier.classes if name not in table.classes]
    if lacking:
        raise InputError(f"the data has no labels for {', '.join(lacking)}; it has {', '.join(table.classes)}")
    probabilities, errors = predict_all(classifier, table.paths, batch_size, workers)
    for message in errors.values():
        print(f"skipped: {message}", file=sys.stderr)
    good = [row for row in range(len(table)) if row not in errors]
    targets = table.targets[:, [table.classes.index(name) for name in classifier.classes]]
    return metrics.report(targets[good], probabilities[good], classifier.thresholds, classifier.classes, bootstrap)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def heatmaps(classifier, image, labels):
    """Where in an image the network sees each of the labels -> float32 (len(labels), size, size), 0 to 1 each.

    image: a path or PIL image. labels: column numbers. Grad-CAM: Selvaraju et al. (2017), "Grad-CAM: Visual
    Explanations from Deep Networks via Gradient-based Localization": the last feature maps, weighted by the mean
    gradient of the logit; for a linear head that is CAM (Zhou et al. 2016). All 0 where no place speaks for the label.
    Raises ImageError.
    """
    network, kept = classifier.network.eval(), []
    pixels = torch.from_numpy(np.array(dataset.load_image(image, classifier.size))).permute(2, 0, 1)[None]
    layer = network.get_submodule(LAST_MAPS[classifier.backbone])
    hook = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits = network(dataset.normalize(pixels.to(classifier.device)).requires_grad_())[0]
    finally:
        hook.remove()
    result = [np.zeros((0, classifier.size, classifier.size), np.float32)]
    for label in labels:
        gradient = torch.autograd.grad(logits[label], kept[0], retain_graph=True)[0]
        seen = (gradient.mean((2, 3), keepdim=True) * kept[0].detach()).sum(1, keepdim=True).relu()
        seen = _enlarge(seen, classifier.size)
        result.append((seen / seen.max().clamp(min=1e-30)).cpu().numpy())
    return np.concatenate(result)


def _enlarge(seen, size):
    """Feature maps (1, 1, h, w) -> (1, size, size). With zeros around them a cell at the edge is highest in its middle,
    not along the edge of the image."""
    height, width = seen.shape[2:]
    grid = [torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=seen.device) * cells / (cells + 2)
            for cells in (width, height)]
    places = torch.stack(torch.meshgrid(*grid, indexing="xy"), dim=-1)[None]
    padded = nn.functional.pad(seen, (1, 1, 1, 1))
    return nn.functional.grid_sample(padded, places, mode="bicubic", align_corners=False)[0].clamp(min=0)


def draw_heatmap(image, heat):
    """A PIL image in grey with a heatmap (H, W) over it in yellow to red, and a ring where it is highest."""
    grey = image.convert("L").convert("RGB")
    heat = Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR)
    values = np.asarray(heat).clip(0, 1)
    glow = np.stack([np.full_like(values, 255), 255 * (1 - values), np.zeros_like(values)], axis=2).astype(np.uint8)
    grey.paste(Image.fromarray(glow), mask=Image.fromarray((170 * values).astype(np.uint8)))
    if values.any():
        y, x = np.unravel_index(values.argmax(), values.shape)
        radius = max(image.size) / 30
        ring = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(grey).ellipse(ring, outline="white", width=max(1, round(radius / 4)))
    return grey


def save_pictures(classifier, paths, probabilities, folder, heatmap=False):
    """Draw each image with its labels under it, and with `heatmap` where the network sees each label present, into
    folder/NAME.png -> the paths written. probabilities: (N, C), of predict()."""
    written, thresholds = [], np.array(classifier.thresholds)
    for path, name, row in zip(paths, dataset.distinct_names(paths), probabilities):
        image = dataset.fit_image(dataset.load_image(path), PICTURE)
        labels = sorted(np.flatnonzero(row >= thresholds), key=lambda c: -row[c])
        words = [(f"{classifier.classes[c]} {row[c]:.2f}", dataset.GREEN) for c in labels]
        cells = [(image, words or [("none of the labels", dataset.GREY)])]
        if heatmap:
            for heat, (text, _) in zip(heatmaps(classifier, path, labels), words):
                place = "seen here" if heat.any() else "no place speaks for it"
                cells.append((draw_heatmap(image, heat), [(f"{text}, {place}", dataset.RED)]))
        target = Path(folder) / f"{Path(name).stem}.png"
        dataset.write_png(target, dataset.draw_sheet(cells, Path(path).name, 4, PICTURE))
        written.append(target)
    return written


def mistakes_sheet(table, probabilities, thresholds, count=24):
    """The images with the most confident mistakes first -> PIL image.

    table: a LabelTable of N images; probabilities (N, C); thresholds (C,). A mistake is as confident as the probability
    of what was said: p for a false alarm, 1 - p for a missed label.
    """
    said = probabilities >= np.array(thresholds)
    wrong = ~np.isnan(table.targets) & (said != (table.targets == 1))
    confidence = np.where(wrong, np.where(said, probabilities, 1 - probabilities), 0).max(axis=1)
    cells = []
    for row in [row for row in np.argsort(-confidence, kind="stable")[:count] if wrong[row].any()]:
        lines, unknown = [(table.ids[row], dataset.BLACK)], np.isnan(table.targets[row])
        mistakes = sorted(np.flatnonzero(wrong[row]), key=lambda c: -abs(probabilities[row, c] - thresholds[c]))
        for c in mistakes[:6]:
            kind, colour = ("+ false alarm:", dataset.RED) if said[row, c] else ("- missed:", dataset.BLUE)
            lines.append((f"{kind} {table.classes[c]} {probabilities[row, c]:.2f}", colour))
        if len(mistakes) > 6:
            lines.append((f"and {len(mistakes) - 6} mistakes more", dataset.GREY))
        for what, chosen in (("true", table.targets[row] == 1), ("said", said[row]), ("NA", unknown)):
            names = dataset.list_names(table.classes, chosen)
            if names or what != "NA":
                lines.append((f"{what}: {names or 'none'}", dataset.GREY))
        try:
            cells.append((dataset.load_image(table.paths[row]), lines))
        except ImageError:  # it was there a moment ago
            continue
    title = f"{int(wrong.any(axis=1).sum())} of {len(table)} images have a mistake"
    return dataset.draw_sheet(cells, title + "; the most confident ones first" * bool(cells))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_options(argv=None):
    """The command line's options."""
    parser = ArgumentParser(usage="%(prog)s IMAGE|DIR ... [options], or %(prog)s --evaluate DATA [options]",
                            description="Say which labels images carry.")
    parser.add_argument("images", nargs="*", metavar="IMAGE|DIR", help="images, or folders of images")
    parser.add_argument("--image", action="append", default=[], metavar="IMAGE", help="the same, as an option")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="outputs/model.pth", metavar="FILE", help="what train.py wrote")
    add("--threshold", type=float, metavar="T", help="one for all labels (default: the model's)")
    add = parser.add_argument_group("output").add_argument
    add("--format", choices=("table", "csv", "json"), default="table", help="of the predictions")
    add("--out", metavar="FILE", help="write the output into a file")
    add("--save", metavar="DIR", help="draw each image with its labels into DIR")
    add("--heatmap", action="store_true", help="with --save: and where each label was seen (Grad-CAM)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", metavar="DATA", help="report the model on this labelled folder")
    add("--labels", metavar="FILE", help="label file of DATA, when it is not found by looking")
    add("--bootstrap", type=int, default=0, metavar="N", help="95 %% intervals, from N resamples of DATA; 0: none")
    add = parser.add_argument_group("system").add_argument
    add("-b", "--batch-size", type=int, default=32, metavar="N", help="images at a time")
    add("-j", "--workers", type=int, default=default_workers(), metavar="N", help="threads that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="to compute in")
    options = parser.parse_args(argv)
    dataset.check_numbers(options, {"batch_size": 1, "workers": 0, "bootstrap": 0})
    if options.heatmap and not options.save:
        raise InputError("--heatmap draws into the folder of --save DIR: give that too")
    return options


def main(argv=None):
    """The command line; returns the probabilities (N, C), or the report with --evaluate."""
    options = parse_options(argv)
    if not options.evaluate:
        paths = find_images(options.images + options.image)
    classifier = load_model(options.model, options.device, options.precision)
    if options.threshold is not None:
        classifier.thresholds = [options.threshold] * len(classifier.classes)
    if options.evaluate:
        import metrics

        table = dataset.read_labels(options.evaluate, options.labels)
        print(dataset.summary(table, options.evaluate), end="\n\n")
        result = evaluate(classifier, table, options.batch_size, options.workers, options.bootstrap)
        output(metrics.format_report(result), options.out)
        return result
    probabilities, errors = predict_all(classifier, paths, options.batch_size, options.workers)
    good = [row for row in range(len(paths)) if row not in errors]
    if good:
        output(format_predictions(options.format, [paths[row] for row in good], probabilities[good],
                                  np.array(classifier.thresholds), classifier), options.out)
    if options.save:
        chosen = [paths[row] for row in good]
        drawn = save_pictures(classifier, chosen, probabilities[good], options.save, options.heatmap)
        print(f"drawn: {drawn[0]}" + f" and {len(drawn) - 1} more" * (len(drawn) > 1) if drawn else "drawn: nothing")
    for message in errors.values():
        print(f"skipped: {message}", file=sys.stderr)
    if errors:
        raise ImageError(f"{len(errors)} of {len(paths)} images could not be read")
    return probabilities


def output(text, path):
    """Print the text, or write it into a file."""
    if not path:
        print(text)
        return
    dataset.write_text(path, [text])


if __name__ == "__main__":
    dataset.run_command(main)
