"""Odd and broken label files, images and options: each has its defined outcome."""

import math
import os
import resource
import shutil
import time
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset
import inference
import train
from conftest import SMALL, encoded
from dataset import ImageError, InputError


def command(capsys, function, *arguments):
    """Run a main() as a command -> (exit code, stdout, stderr)."""
    code = 0
    try:
        dataset.run_command(lambda: function([str(argument) for argument in arguments]))
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


# ---------------------------------------------------------------------------------------------------------------------
# Label files. The images a.jpg, b.jpg and c.jpg are there; X is a text that the summary or the error must hold.

NAN = math.nan
LABELS = {  # name, content -> (classes, targets), or the error
    "empty": ("labels.txt", "", "labels.txt is empty: it needs a line per image"),
    "blank lines": ("labels.txt", "\n  \n", "labels.txt is empty"),
    "header only": ("labels.csv", "image,A,B\n", "labels.csv has a header and no rows"),
    "too few cells": ("labels.txt", "a.jpg 1 0\nb.jpg 1\n", "labels.txt:2: 1 labels, but there are 2 classes"),
    "too many cells": ("labels.csv", "i,A\na.jpg,1\nb.jpg,1,0\n", "labels.csv:3: 2 labels, but there are 1 classes"),
    "no label column": ("labels.txt", "a.jpg\nb.jpg\n", "labels.txt:1: no label column"),
    "value 2": ("labels.txt", "a.jpg 1\nb.jpg 2\n", "labels.txt:2: '2' is not 0, 1 or NA"),
    "value yes": ("labels.csv", "image,A\na.jpg,yes\n", "labels.csv:2: 'yes' is not 0, 1 or NA"),
    "letter O": ("labels.txt", "a.jpg 1 0\nb.jpg 1 O\n", "labels.txt:2: 'O' is not 0, 1 or NA"),
    "a row twice": ("labels.txt", "a.jpg 1 NA\na.jpg NA 0\nb.jpg 0 1\n", (["Attr1", "Attr2"], [[1, 0], [0, 1]])),
    "contradiction": ("labels.txt", "a.jpg 1\nb.jpg 0\na.jpg 0\n",
                      "labels.txt:3: a.jpg has another label for Attr1 than in line 1"),
    "class name twice": ("labels.csv", "image,A,B,A\na.jpg,1,0,1\n", "labels.csv:1: the class A is there twice"),
    "no positive, no negative, only NA": ("labels.txt", "a.jpg 0 1 NA\nb.jpg 0 1 ?\n",
                                          (["Attr1", "Attr2", "Attr3"], [[0, 1, NAN], [0, 1, NAN]])),
    "one image, one class": ("labels.txt", "a.jpg 1\n", (["Attr1"], [[1]])),
    "names with spaces": ("labels.csv", 'image,"deep, long crack",Größe\na.jpg,1,0\n',
                          (["deep, long crack", "Größe"], [[1, 0]])),
    "absolute path": ("labels.txt", "/etc/hostname 1\na.jpg 0\n",
                      "labels.txt:1: /etc/hostname lies outside the image folder"),
    "path that leaves": ("labels.txt", "../../a.jpg 1\na.jpg 0\n",
                         "labels.txt:1: ../../a.jpg lies outside the image folder"),
    "hidden way out": ("labels.txt", "x/../../a.jpg 1\na.jpg 0\n",
                       "labels.txt:1: x/../../a.jpg lies outside the image folder"),
    "not UTF-8": ("labels.txt", b"a.jpg 1\n\xe4.jpg 0\n", "labels.txt:2: byte 0xe4 is not UTF-8: save it as UTF-8"),
    "UTF-16": ("labels.txt", "a.jpg 1\n".encode("utf-16"), "labels.txt has zero bytes"),
    "a long line": ("labels.txt", b"a.jpg " + b"1 " * 2**20, "labels.txt has a line of over 1048576 bytes"),
    "open quote": ("labels.csv", 'image,A\na.jpg,"1\nb.jpg,0\n', "is a quote left open?"),
    "no image there": ("labels.txt", "x.jpg 1\n", "none of its 1 images is in"),
    "lists, a cell too many": ("image_data.csv", "ID,parts\na,Bolt\nb,Bolt,Nut\n",
                               "image_data.csv:3: 3 cells, but the header has 2"),
    "lists, a column twice": ("image_data.csv", "ID,,\na,Bolt,\n", "image_data.csv:1: the column '' is there twice"),
    "lists, placeholders only": ("image_data.csv", "ID,parts\na,part\nb,parts\n",
                                 "image_data.csv names no labels in parts"),
    "lists, a name in two columns": ("image_data.csv", "ID,parts,defects\na,Bolt,Rust\nb,Rust,\n",
                                     "image_data.csv:3: Rust is in the columns"),
    "cls, index out of range": ("labels/a.cls", "0\n80\n", "a.cls:2: '80' is not a class index, 0 to 79"),
    "cls, no number": ("labels/a.cls", "cat\n", "a.cls:1: 'cat' is not a class index"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(make_data, tmp_path, capsys, case):
    name, content, expected = LABELS[case]
    data = make_data("", name="note.md")
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, errors = command(capsys, dataset.main, data)
    if isinstance(expected, str):
        assert (code, out, errors.count("\n")) == (2, "", 1) and errors.startswith("error: ") and expected in errors
        code, out, errors = command(capsys, train.main, "--data", data, "--out", tmp_path / "out", *SMALL)
        assert (code, out) == (2, "") and expected in errors and not (tmp_path / "out").exists()
        return
    assert (code, errors) == (0, "")
    table = dataset.read_labels(data)
    assert table.classes == expected[0] and all(name in out for name in table.classes)
    np.testing.assert_array_equal(table.targets, expected[1])


def test_a_line_of_a_gigabyte_is_refused_in_little_memory(make_data, capsys):
    data = make_data("a.jpg 1\n")
    with open(data / "labels.txt", "r+b") as file:
        file.truncate(2**30)  # zeros, which take no room on the disk
    start = time.perf_counter()
    code, _, errors = command(capsys, dataset.main, data)
    assert code == 2 and "labels.txt has a line of over 1048576 bytes" in errors and time.perf_counter() - start < 5


# ---------------------------------------------------------------------------------------------------------------------
# Images


def noise(mode="RGB", size=(40, 30)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def animation():
    frames = [Image.new("P", (20, 20), colour) for colour in (1, 2, 3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bomb():
    """A PNG that says it has 40,000 x 40,000 pixels."""
    content = bytearray(encoded(noise("L"), "PNG"))
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


IMAGES = {  # file name -> (content, None when it can be read, else the reason that is given)
    "good.jpg": (encoded(noise(), "JPEG"), None),
    "truncated.jpg": (encoded(noise(size=(400, 300)), "JPEG")[:20_000], "image file is truncated"),
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"this is no image", "not an image"),
    "16bit.png": (encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"), None),
    "cmyk.jpg": (encoded(noise("CMYK"), "JPEG"), None),
    "palette.png": (encoded(noise("P"), "PNG", transparency=0), None),
    "grey_alpha.png": (encoded(noise("LA"), "PNG"), None),
    "bits.png": (encoded(noise("1"), "PNG"), None),
    "animated.gif": (animation(), None),
    "photo.webp": (encoded(noise(), "WEBP"), None),
    "one.png": (encoded(noise(size=(1, 1)), "PNG"), None),
    "thin.png": (encoded(noise(size=(1, 20_000)), "PNG"), None),
    "bomb.png": (bomb(), "exceeds limit"),
    "wrong_suffix.png": (encoded(noise(), "JPEG"), None),
    "cut_header.png": (encoded(noise(), "PNG")[:20], "Truncated File Read"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_read_right_or_named(tmp_path, name):
    content, reason = IMAGES[name]
    (tmp_path / name).write_bytes(content)
    if reason:
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
            dataset.load_image(tmp_path / name, 32)
        return
    image = dataset.load_image(tmp_path / name, 32)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    whole = dataset.load_image(tmp_path / name)
    assert whole.mode == "RGB" and whole.size == Image.open(tmp_path / name).size


def test_odd_images_have_the_right_colours(tmp_path):
    for name, colour in (("16bit.png", (156,) * 3), ("animated.gif", None), ("wrong_suffix.png", None)):
        (tmp_path / name).write_bytes(IMAGES[name][0])
        pixel = dataset.load_image(tmp_path / name).getpixel((5, 5))
        expected = colour or Image.open(tmp_path / name).convert("RGB").getpixel((5, 5))
        assert pixel == expected


def test_files_that_may_not_be_read_or_vanish(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(IMAGES["good.jpg"][0])
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        with pytest.raises(ImageError, match=r"a\.jpg: Permission denied"):
            dataset.load_image(path)
    finally:
        os.seteuid(user)
    path.unlink()
    with pytest.raises(ImageError, match=r"a\.jpg: No such file or directory"):
        dataset.load_image(path)
    path.mkdir()
    with pytest.raises(ImageError, match=r"a\.jpg: Is a directory"):
        dataset.load_image(path)


@pytest.fixture
def odd_folder(tmp_path):
    """A data folder of all IMAGES with labels, and one image more that vanishes when training has begun."""
    (tmp_path / "images").mkdir()
    names = [*IMAGES, *(f"good_{i}.jpg" for i in range(20)), "vanished.jpg"]
    for name in names:
        (tmp_path / "images" / name).write_bytes(IMAGES.get(name, IMAGES["good.jpg"])[0])
    (tmp_path / "labels.txt").write_text("".join(f"{name} {i % 2} NA\n" for i, name in enumerate(names)))
    return tmp_path


BROKEN = [name for name, (_, reason) in IMAGES.items() if reason]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_names_each_bad_image_once(odd_folder, tmp_path, capsys, monkeypatch, workers):
    fit = train.fit

    def vanish(run):
        (odd_folder / "images" / "vanished.jpg").unlink()
        fit(run)

    monkeypatch.setattr(train, "fit", vanish)
    out = tmp_path / "out"
    code, _, errors = command(capsys, train.main, "--data", odd_folder, "--out", out, "--epochs", 2, *SMALL,
                              "--workers", workers)
    assert code == 0 and (out / "metrics.json").exists()
    for name in [*BROKEN, "vanished.jpg"]:
        assert errors.count(f"{name}: ") == 1 and f"warning: skipped {odd_folder}/images/{name}" in errors
    assert errors.count("warning: ") == len(BROKEN) + 2  # one for the class without a known label


def test_inference_reports_bad_images_and_predicts_the_others(odd_folder, trained, capsys):
    model = trained[0] / "model.pth"
    code, out, errors = command(capsys, inference.main, odd_folder / "images", "--model", model, "--device", "cpu")
    assert code == 1 and len(out.splitlines()) == 37 - len(BROKEN)
    assert all(errors.count(f"{name}: ") == 1 for name in BROKEN)
    assert errors.splitlines()[-1] == f"error: {len(BROKEN)} of 37 images could not be read"
    code, out, errors = command(capsys, inference.main, odd_folder / "images" / "text.jpg", "--model", model)
    assert code == 1 and out == "" and "text.jpg: not an image" in errors


def test_check_lists_bad_images(odd_folder, capsys):
    code, out, _ = command(capsys, dataset.main, odd_folder, "--check")
    assert code == 0 and "32 of 37 images decode" in out and all(f"{name}: " in out for name in BROKEN)


@pytest.mark.parametrize("bad, split", [(range(16), "train"), (range(4, 20), "")])
def test_more_than_half_bad_stops_the_run(make_data, tmp_path, capsys, bad, split):
    names = [f"{i}.jpg" for i in range(20)]
    data = make_data("".join(f"{name} {i % 2}\n" for i, name in enumerate(names)), names)
    for i in bad:
        (data / "images" / f"{i}.jpg").write_bytes(b"no image")
    code, _, errors = command(capsys, train.main, "--data", data, "--out", tmp_path / "out", "--epochs", 1, *SMALL)
    assert code == 2 and "of the train split cannot be read, as" in errors and "--check lists them all" in errors


# ---------------------------------------------------------------------------------------------------------------------
# Random damage


KINDS = (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {}),
         ("WEBP", {"lossless": True}))
SEEDS = [encoded(noise(size=(64, 48)), kind, **options) for kind, options in KINDS]


def test_load_image_survives_5000_damaged_files(tmp_path):
    rng, path, read = np.random.default_rng(0), tmp_path / "x.jpg", 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(5000):
        content = np.frombuffer(SEEDS[case % len(SEEDS)], np.uint8).copy()
        for place in rng.integers(0, len(content), rng.integers(1, 8)):
            content[place] = rng.integers(0, 256)
        if case % 3 == 0:
            content = content[: rng.integers(0, len(content))]
        if case % 5 == 0:  # in the first bytes, where sizes are
            content[rng.integers(0, 40) :][:1] ^= np.uint8(1 << rng.integers(0, 8))
        path.write_bytes(content.tobytes())
        start = time.perf_counter()
        try:
            image = dataset.load_image(path, 32)
        except ImageError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            read += 1
            assert (image.mode, image.size) == ("RGB", (32, 32))
        assert time.perf_counter() - start < 10
    assert 500 < read < 4500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


CELLS = ["a.jpg", "b", "sub/c", "../x", "1", "0", "NA", "", "?", "2", " ", ",", ";", "\t", "\n", "\r", '"', "ID",
         "image", "parts", "Bolt", "Rust;Bolt", "\ufeff", "\0", "é", "-1", "1.0", "99999999999999999999"]
CONTENT = st.one_of(st.binary(max_size=200),
                    st.lists(st.sampled_from(CELLS), max_size=60).map(lambda cells: "".join(cells).encode()))


@pytest.mark.parametrize("name", ["labels.txt", "image_data.csv", "labels/a.cls"])
def test_read_labels_survives_5000_files(tmp_path, name):
    folder = tmp_path
    for image in ("a.jpg", "b.png", "sub/c.jpg"):
        (folder / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / image).touch()
    (folder / name).parent.mkdir(exist_ok=True)

    @settings(max_examples=5000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(CONTENT)
    def check(content):
        if name.startswith("image_data"):
            content = b"ID,parts,defects\n" + content
        (folder / name).write_bytes(content)
        try:
            table = dataset.read_labels(folder)
        except InputError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        else:
            assert table.targets.shape == (len(table.paths), len(table.classes)) and table.targets.dtype == np.float32
            assert np.isin(table.targets[~np.isnan(table.targets)], (0, 1)).all()

    check()
    shutil.rmtree(folder / "images")


# ---------------------------------------------------------------------------------------------------------------------
# Options

OPTIONS = [
    (["--lr", "-1"], "--lr -1.0: it must be a number from 0 up"),
    (["--lr", "nan"], "--lr nan: it must be a number from 0 up"),
    (["--wd", "inf"], "--wd inf: it must be"),
    (["--dropout", "1.5"], "--dropout 1.5: it must be below 1"),
    (["--seed", "-1"], "--seed -1: it must be a number from 0 up"),
    (["--epochs", "0"], "--epochs 0: it must be a number from 1 up"),
    (["-b", "0"], "--batch-size 0: it must be a number from 1 up"),
    (["-j", "-1"], "--workers -1: it must be a number from 0 up"),
    (["--pos-weight-clip", "5", "2"], "--pos-weight-clip takes the lower bound first"),
    (["--milestones", "0"], "--milestones 0: it must be a number from 1 up"),
    (["--split", "1", "0", "0"], "--split takes three ratios"),
    (["--group", "pipe"], "--group pipe: "),
    (["--weights", "labels.txt"], "labels.txt is not there"),
    (["--data", "/nowhere"], "/nowhere is not a folder"),
    (["--thresholds", "best"], "--thresholds best: use pr_curve"),
    (["--augment", "spin"], "--augment spin: 'spin' is not one of"),
    (["--cache", "lots"], "--cache lots: use auto"),
    (["--device", "abacus"], "--device abacus"),
    (["--weights", "/nowhere.pth"], "/nowhere.pth is not there"),
    (["--backbone", "vgg99"], "argument --backbone: invalid choice: 'vgg99'"),
    (["--train-layers", "layer9"], "resnet18 has no layer layer9"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate (see --help)"),
]


@pytest.mark.parametrize("arguments, message", OPTIONS)
def test_options(demo, tmp_path, capsys, arguments, message):
    code, out, errors = command(capsys, train.main, "--data", demo, "--out", tmp_path / "out", *SMALL, *arguments)
    assert (code, out, errors.count("\n")) == (2, "", 1) and errors.startswith("error: ") and message in errors
    assert not (tmp_path / "out").exists()
