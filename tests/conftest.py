"""What several test files share: how a program is started, how its files are read, small data, and one small run."""

import csv
import gc
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small images gain nothing from threads
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore for what they start in the background

import numpy as np  # noqa: E402
import PIL.ImageFile  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import dataset  # noqa: E402
import inference  # noqa: E402
import train  # noqa: E402

SMALL = ["--weights", "none", "--size", "32", "-q", "--device", "cpu", "--precision", "fp32", "--workers", "0"]


# ----------------------------------------------------------------------------------------------------------
# Programs and their errors


def as_command(capsys, function, *arguments):
    """Run a main() as a command; return its exit code, stdout and stderr."""
    code = 0
    try:
        dataset.run_command(lambda: function([str(argument) for argument in arguments]))
    except SystemExit as ended:
        code = ended.code
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as no command has ended
    return code, *capsys.readouterr()


def refused(capsys, function, *arguments, warns=False):
    """Check that a command ends with exit code 2, no output and one line of error; return that line.

    Lines on stderr may come before it where `warns` is true: warnings, or what was understood so far.
    """
    capsys.readouterr()  # what was printed before is of other calls
    code, out, errors = as_command(capsys, function, *arguments)
    *others, error = errors.splitlines()
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert warns or not others
    assert not any(line.startswith(("error: ", "Traceback")) for line in others)
    return error


# ----------------------------------------------------------------------------------------------------------
# Files


def encoded(image, kind, **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read_json(path):
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path):
    """Return the rows of a CSV file as dicts."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files_of(folder):
    """Return the bytes of every file below a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(path):
    """Return the state_dict of the first network in a checkpoint."""
    content = inference.read_checkpoint(path)
    return content["members"][0]["network"] if "members" in content else content["network"]


def same_tensors(a, b):
    """Return whether two state_dicts are equal."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------
# Networks


def classifier_of(network, backbone, head, dropout, classes, groups, thresholds, size, **fields):
    """Return a Classifier with one network."""
    member = inference.Member(network, backbone, head, dropout, size, [0.0] * len(classes))
    return inference.Classifier([member], classes, groups, thresholds, **fields)


# One network of each family of torchvision, except for those that take seconds.
BACKBONES = ["resnet18", "resnet50", "densenet121", "mobilenet_v2", "efficientnet_b0", "vgg16", "alexnet",
             "convnext_tiny", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v3_small",
             "regnet_y_400mf", "shufflenet_v2_x0_5", "swin_t", "swin_v2_t", "vit_b_32"]


def size_for(backbone):
    """Return a small size of images that a backbone takes."""
    return {"maxvit_t": 224, "inception_v3": 96, "alexnet": 64, "vit_b_32": 64}.get(backbone, 32)


def head_of(network):
    """Return the head of a network."""
    return network.get_submodule(inference.head_name(network))


def use_small_networks(setattr=setattr):
    """Replace torchvision's ResNets by networks with the same names of layers and a thousandth of the work.

    The imports are here because other processes and a notebook run this function too.
    """
    from torch import nn
    from torchvision.models import resnet

    class SmallResNet(nn.Module):
        def __init__(self, block, layers, **_):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(8)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            self.layer1 = nn.Sequential(resnet.BasicBlock(8, 8))
            self.layer2 = self.layer(8, 16)
            self.layer3 = self.layer(16, 32)
            self.layer4 = self.layer(32, 64)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(64, 1000)

        def layer(self, before, width):
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            return nn.Sequential(resnet.BasicBlock(before, width, 2, shortcut))

        def forward(self, images):
            maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
            maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
            return self.fc(self.avgpool(maps).flatten(1))

    setattr(resnet, "ResNet", SmallResNet)


@pytest.fixture(scope="session", autouse=True)
def small_networks():
    """Let no test train a real ResNet, unless it asks for real_networks: a run takes a second instead of six."""
    from torchvision.models import resnet

    real = resnet.ResNet
    with pytest.MonkeyPatch.context() as patch:
        use_small_networks(patch.setattr)
        yield real


@pytest.fixture
def real_networks(monkeypatch, small_networks):
    """Use torchvision's own ResNets."""
    monkeypatch.setattr("torchvision.models.resnet.ResNet", small_networks)
    inference.build_without_values.cache_clear()
    yield
    inference.build_without_values.cache_clear()


@pytest.fixture
def imagenet_weights(tmp_path, monkeypatch):
    """Return the state_dict of a ResNet18, put where torchvision keeps what it has downloaded."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    weights = models.resnet18(weights=None).state_dict()
    torch.save(weights, folder / Path(models.ResNet18_Weights.DEFAULT.url).name)
    return weights


# ----------------------------------------------------------------------------------------------------------
# Data


def label_cells(targets):
    """Return a row of targets (1, 0 or NaN) as the cells of a label file."""
    return ["NA" if target != target else str(int(target)) for target in targets]


def known_rows(table):
    """Return a LabelTable as {id: [1, 0 or None for NA, ...]}, which compares by ==."""
    rows = {}
    for name, targets in zip(table.ids, table.targets.tolist()):
        rows[name] = [None if value != value else int(value) for value in targets]
    return rows


def draw_images(folder, names):
    """Write a small image under each name below `folder`, no two alike, in the format of its suffix."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + number % 40, 10 + number // 40), (7 * number % 256, 90, 160)).save(path)


@pytest.fixture
def make_data(tmp_path):
    """Write a data folder and return its path: make_data(text, images=("a.jpg", ...), name="labels.txt")."""

    def make(text, images=("a.jpg", "b.jpg", "c.jpg"), name="labels.txt"):
        (tmp_path / "images").mkdir(exist_ok=True)
        for i, image in enumerate(images):
            path = tmp_path / "images" / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (40 * i % 255, 90, 120)).save(path)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return make


@pytest.fixture
def make_rows(make_data):
    """Write a data folder with an image per row, 00.png and so on: make_rows(["1 NA", "0 1"], "image red tall")."""

    def make(rows, header="image red tall"):
        names = [f"{number:02}.png" for number in range(len(rows))]
        return make_data("\n".join([header, *(f"{name} {row}" for name, row in zip(names, rows))]), names)

    return make


@pytest.fixture
def few_images(make_rows):
    """Return a data folder with 24 images and known labels of two classes."""
    return make_rows([f"{i % 2} {i // 2 % 2}" for i in range(24)])


@pytest.fixture
def large_images(tmp_path, monkeypatch):
    """Draw a sheet of four large images: large_images("jpg", draw).

    `draw` turns a LabelTable into a sheet. Return the sizes that images were decoded in, and how many large ones were
    in memory at once.
    """
    load = PIL.ImageFile.ImageFile.load
    decoded, alive = [], []

    def watched(image):
        decoded.append(image.size)
        others = [other for other in gc.get_objects() if issubclass(type(other), Image.Image)]
        alive.append(sum(max(other.size) > 1300 for other in others))
        return load(image)

    def draw_sheet(kind, draw):
        paths = [str(tmp_path / f"{i}.{kind}") for i in range(4)]
        for i, path in enumerate(paths):
            Image.new("RGB", (2400, 1600), (40 * i, 90, 120)).save(path, compress_level=1)
        table = dataset.LabelTable([Path(path).name for path in paths], paths, np.ones((4, 1), np.float32), ["A"])
        with monkeypatch.context() as patch:
            patch.setattr(PIL.ImageFile.ImageFile, "load", watched)
            sheet = draw(table)

        # All four are on the sheet: each has a red of its own
        pixels = {sheet.getpixel((x, y)) for x in range(0, sheet.width, 20) for y in range(0, sheet.height, 20)}
        assert len([pixel for pixel in pixels if abs(pixel[1] - 90) < 4 and abs(pixel[2] - 120) < 4]) == 4
        return decoded, max(alive)

    return draw_sheet


@pytest.fixture
def odd_folder(tmp_path):
    """Return a data folder with good images, bad ones and vanished.jpg, and the names of the bad ones."""
    folder = tmp_path / "odd"
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    good = encoded(Image.fromarray(noise), "JPEG")
    large = encoded(Image.fromarray(np.tile(noise, (10, 10, 1))), "JPEG")
    bad = {"truncated.jpg": large[: len(large) // 3], "empty.jpg": b"", "text.jpg": b"this is no image",
           "cut_header.png": encoded(Image.fromarray(noise), "PNG")[:20]}

    names = [*bad, *(f"good_{i}.jpg" for i in range(24)), "vanished.jpg"]
    for name in names:
        (folder / "images" / name).write_bytes(bad.get(name, good + name.encode()))
    (folder / "labels.txt").write_text("".join(f"{name} {i % 2} NA\n" for i, name in enumerate(names)))
    return folder, list(bad)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Run a test inside an empty folder, and return the folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Return the folder of the demo data with 80 images."""
    folder = tmp_path_factory.mktemp("demo")
    dataset.write_demo(folder, seed=0, count=80)
    return folder


ODD_PARTS = {7: "RGBA", 8: "PNG", 9: "grey", 10: "turned"}  # images of odd_demo that are no plain JPEG files


@pytest.fixture(scope="session")
def odd_demo(demo, tmp_path_factory):
    """Return the demo data as it comes in real life: {"table", "lists", "cls": its folder in that format}.

    The label files name one image that is not there; a few images are PNG, RGBA, greyscale or turned by EXIF.
    Only the table can say NA: a label that is unknown there is absent in the other two.
    """
    table = dataset.read_labels(demo)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("table", "lists", "cls")}
    names = write_odd_images(table, folders.values())
    names.append(f"part_{len(table):04}.jpg")
    rows = [*known_rows(table).values(), [0] * len(table.classes)]

    lines = ["image " + " ".join(table.classes)]
    lists = ["ID," + ",".join(table.groups)]  # a row per part found, as inspectors write them
    (folders["cls"] / "labels").mkdir()
    for name, row in zip(names, rows):
        stem = name.partition(".")[0]
        there = [label for label, value in zip(table.classes, row) if value == 1]
        parts, defects = ([label for label in there if label in group] for group in table.groups.values())
        lines.append(" ".join([name, *("NA" if value is None else str(value) for value in row)]))
        lists.append(f"{stem},{parts[0] if parts else 'part'},{';'.join(defects) or 'defect'}")
        lists += [f"{stem},{part},nan" for part in parts[1:]]
        indices = [str(table.classes.index(label)) for label in there]
        (folders["cls"] / "labels" / f"{stem}.cls").write_text("\n".join(indices))

    (folders["table"] / "labels.txt").write_text("\n".join(lines))
    (folders["lists"] / "image_data.csv").write_text("\n".join(lists))
    (folders["cls"] / "classes.txt").write_text("\n".join(table.classes))
    for name in ("table", "lists"):
        (folders[name] / "label_groups.json").write_bytes((demo / "label_groups.json").read_bytes())
    return folders


def write_odd_images(table, folders):
    """Write the images of a table into each folder, some of them as ODD_PARTS says; return their names."""
    names = []
    for number, path in enumerate(table.paths):
        image = Image.open(path)
        kind = ODD_PARTS.get(number, "")
        exif = Image.Exif()
        if kind == "RGBA":
            image.putalpha(255)
        elif kind == "grey":
            image = image.convert("L")
        elif kind == "turned":
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6

        suffix = "png" if kind in ("RGBA", "PNG") else "jpg"
        names.append(f"part_{number:04}.{suffix}")
        content = encoded(image, suffix.replace("jpg", "jpeg"), exif=exif)
        for folder in folders:
            (folder / "images").mkdir(exist_ok=True)
            (folder / "images" / names[-1]).write_bytes(content)
    return names


# ----------------------------------------------------------------------------------------------------------
# Runs


CHARTS = ((train, "loss_curves"), (inference, "pr_curves"), (inference, "mistakes_sheet"),
          (inference, "reliability_chart"))


@pytest.fixture
def blank_pictures(monkeypatch):
    """Let runs draw no charts, which take half of the time of a small run."""
    for module, name in CHARTS:
        monkeypatch.setattr(module, name, lambda *_: Image.new("RGB", (1, 1)))


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """Return the folder of a finished run of two epochs on the demo data, and its report."""
    out = tmp_path_factory.mktemp("run")
    report = train.main(["--data", str(demo), "--out", str(out), "--epochs", "2", *SMALL])
    return out, report
