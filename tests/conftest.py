"""Small data and one small trained run, shared by all tests."""

import io
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small images gain nothing from threads

import dataset  # noqa: E402
import inference  # noqa: E402
import train  # noqa: E402

SMALL = ["--weights", "none", "--size", "32", "-q", "--device", "cpu", "--precision", "fp32", "--workers", "0"]


def encoded(image, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def classifier_of(network, backbone, head, dropout, classes, groups, thresholds, size, **fields):
    """A Classifier with one network."""
    member = inference.Member(network, backbone, head, dropout, size, [0.0] * len(classes))
    return inference.Classifier([member], classes, groups, thresholds, **fields)


def use_small_networks(setattr=setattr):
    """Let torchvision's ResNets be networks with the same names of layers and a thousandth of the work."""
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
    """No test trains a real ResNet, unless it asks for real_networks: a run takes a second instead of six."""
    from torchvision.models import resnet

    real = resnet.ResNet
    with pytest.MonkeyPatch.context() as patch:
        use_small_networks(patch.setattr)
        yield real


@pytest.fixture
def real_networks(monkeypatch, small_networks):
    """Torchvision's own ResNets."""
    monkeypatch.setattr("torchvision.models.resnet.ResNet", small_networks)


CHARTS = ((train, "loss_curves"), (inference, "pr_curves"), (inference, "mistakes_sheet"),
          (inference, "reliability_chart"))


@pytest.fixture
def blank_pictures(monkeypatch):
    """Runs draw no charts, which take half of the time of a small run."""
    from PIL import Image

    for module, name in CHARTS:
        monkeypatch.setattr(module, name, lambda *_: Image.new("RGB", (1, 1)))


def as_command(capsys, function, *arguments):
    """Run a main() as a command -> (exit code, stdout, stderr)."""
    code = 0
    try:
        dataset.run_command(lambda: function([str(argument) for argument in arguments]))
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo data with 80 images."""
    folder = tmp_path_factory.mktemp("demo")
    dataset.write_demo(folder, seed=0, count=80)
    return folder


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """The folder of a finished run of two epochs on the demo data, and its report."""
    out = tmp_path_factory.mktemp("run")
    report = train.main(["--data", str(demo), "--out", str(out), "--epochs", "2", *SMALL])
    return out, report


@pytest.fixture
def imagenet_weights(tmp_path, monkeypatch):
    """The weights of a ResNet18 that were downloaded before -> state_dict."""
    import torch
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    weights = models.resnet18(weights=None).state_dict()
    torch.save(weights, folder / Path(models.ResNet18_Weights.DEFAULT.url).name)
    return weights


@pytest.fixture
def odd_folder(tmp_path):
    """A data folder with good images, bad ones, and vanished.jpg -> (folder, names of the bad ones)."""
    import numpy as np
    from PIL import Image

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
def in_folder(tmp_path):
    """Run a test inside an empty folder."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.fixture
def make_data(tmp_path):
    """Write a data folder: make_data(text, images=("a.jpg", ...), name="labels.txt") -> its path."""
    from PIL import Image

    def make(text, images=("a.jpg", "b.jpg", "c.jpg"), name="labels.txt"):
        (tmp_path / "images").mkdir(exist_ok=True)
        for i, image in enumerate(images):
            path = tmp_path / "images" / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (40 * i % 255, 90, 120)).save(path)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return make


def draw_images(folder, names):
    """Write a small image under each name below `folder`, no two alike, in the format of its suffix."""
    from PIL import Image

    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + number % 40, 10 + number // 40), (7 * number % 256, 90, 160)).save(path)


def known_rows(table):
    """A LabelTable as {id: [1, 0 or None for NA, ...]}, which compares by ==."""
    rows = {}
    for name, targets in zip(table.ids, table.targets.tolist()):
        rows[name] = [None if value != value else int(value) for value in targets]
    return rows


ODD_PARTS = {7: "RGBA", 8: "PNG", 9: "grey", 10: "turned"}  # images of odd_demo that are no plain JPEG files


@pytest.fixture(scope="session")
def odd_demo(demo, tmp_path_factory):
    """The demo data as it comes in real life: {"table", "lists", "cls": its folder in that format}.

    The label files name one image that is not there; a few images are PNG, RGBA, greyscale or turned by EXIF.
    Only the table can say NA: a label that is unknown there is absent in the other two.
    """
    from PIL import Image

    table = dataset.read_labels(demo)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("table", "lists", "cls")}
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
        for folder in folders.values():
            (folder / "images").mkdir(exist_ok=True)
            (folder / "images" / names[-1]).write_bytes(content)
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
