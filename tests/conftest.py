"""Small data and one small trained run, shared by all tests."""

import io
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import train  # noqa: E402

SMALL = ["--weights", "none", "--size", "32", "-q", "--device", "cpu", "--precision", "fp32", "--workers", "0"]


def encoded(image, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
