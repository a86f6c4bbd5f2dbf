"""Label files, splits, images, augmentation, the demo data, and how files are written."""

import errno
import io
import json
import math
import os
import resource
import signal
import stat
import subprocess
import time
import zlib

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset
from conftest import ODD_PARTS, as_command, draw_images, encoded, files_of, known_rows, refused
from dataset import ImageError, InputError

NAN = math.nan
TABLE = "a.jpg 1 NA 0\nb.jpg 0 1 ?\nc.jpg -1 nan 1.0\n"
TARGETS = [[1, NAN, 0], [0, 1, NAN], [NAN, NAN, 1]]


def command(capsys, *arguments):
    """Run dataset.py as a command, and return its exit code, stdout and stderr."""
    return as_command(capsys, dataset.main, *arguments)


def check_table(table, targets=TARGETS, classes=("Attr1", "Attr2", "Attr3"), ids=("a.jpg", "b.jpg", "c.jpg")):
    """Check all of a LabelTable."""
    np.testing.assert_array_equal(table.targets, np.array(targets, np.float32))
    assert table.targets.dtype == np.float32
    assert table.classes == list(classes)
    assert table.ids == list(ids)


def told(table):
    """Return everything that a table says about how it was read, as one text."""
    return "\n".join(table.notes + table.warnings)


# ---------------------------------------------------------------------------------------------------------------------
# The table format


def test_white_space_without_header(make_data):
    table = dataset.read_labels(make_data(TABLE))
    check_table(table)
    assert "no header" in told(table)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_csv_with_header_bom_and_any_line_end(make_data, delimiter, newline, bom):
    text = "image A B C\n" + TABLE.replace("?", "").replace(" nan", " ")
    text = text.replace(" ", delimiter).replace("\n", newline)
    check_table(dataset.read_labels(make_data(bom + text.encode(), name="labels.csv")), classes="ABC")


def test_quoted_cells_blank_lines_and_a_missing_last_line_end(make_data):
    text = '\nimage,"A, or so",B\n\n"a.jpg",1,0\nb.jpg , 0 , \n\n"c.jpg",NA,1'
    table = dataset.read_labels(make_data(text, name="labels.csv"))
    check_table(table, [[1, 0], [0, NAN], [NAN, 1]], ["A, or so", "B"])


def test_file_names_with_blanks_and_unicode(make_data):
    names = ["my photo.jpg", "Größe 2.jpg", "sub/c.jpg"]
    text = "my photo.jpg 1 0\nGröße 2.jpg 0 1\nsub/c.jpg NA 1\n"
    table = dataset.read_labels(make_data(text, names))
    check_table(table, [[1, 0], [0, 1], [NAN, 1]], ["Attr1", "Attr2"], names)


@pytest.mark.parametrize("name", [
    "deep/a 1.jpg", "a 1.jpg", "deep/a 1", "a 1", "images/deep/a 1.jpg", "./deep/a 1.jpg", "deep\\a 1.jpg",
    "a 1.JPG", ".\\images\\deep\\a 1.Jpg", "deep/../deep/a 1.jpg",
])
def test_an_image_is_found_however_it_is_named(make_data, name):
    data = make_data(f'image,A\n"{name}",1\nb,0\n', ("deep/a 1.jpg", "b.JPG", "other/c.jpg"), "labels.csv")
    table = dataset.read_labels(data)
    assert table.ids == [name, "b"]
    assert table.paths == [f"{data}/images/deep/a 1.jpg", f"{data}/images/b.JPG"]


def test_paths_from_the_working_directory_and_absolute_ones_are_found(make_data, monkeypatch, tmp_path):
    data = make_data("", name="labels.txt")
    link = tmp_path / "link"
    link.symlink_to(data)
    monkeypatch.chdir(data.parent)
    (data / "labels.txt").write_text(
        f"{data}/images/a.jpg 1\n{data.name}/images/b.jpg 0\n{link}/images/c.jpg 1\n"
    )
    for folder in (data, link):
        table = dataset.read_labels(folder)
        assert [os.path.basename(path) for path in table.paths] == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_two_images_that_fit_are_an_error_that_names_both(make_data, name):
    data = make_data(f"{name} 1\nb.jpg 0\n", ("x/a.jpg", "y/a.jpg", "b.jpg"))
    with pytest.raises(InputError, match=r"labels.txt:1: .*x/a.jpg or y/a.jpg"):
        dataset.read_labels(data)


def test_missing_images_are_dropped_and_named(make_data):
    table = dataset.read_labels(make_data(TABLE + "d.jpg 1 1 1\n"))
    assert table.missing == ["d.jpg"]
    check_table(table)
    text = dataset.summary(table)
    assert "4 rows, 3 images, 1 missing" in text and "missing: d.jpg" in text


def test_rows_that_agree_are_merged_and_rows_that_contradict_are_an_error(make_data):
    table = dataset.read_labels(make_data(TABLE + "images/a.jpg NA 1 0\n"))
    check_table(table, [[1, 1, 0], *TARGETS[1:]])
    assert any("1 rows" in line and "merged" in line for line in table.warnings)
    assert "4 rows, 3 images, 0 missing, 1 merged with another row" in dataset.summary(table)
    with pytest.raises(InputError, match=r"labels.txt:4: a.jpg has another label for Attr3 than in line 1"):
        dataset.read_labels(make_data(TABLE + "a.jpg 1 1 1\n"))


def test_images_may_lie_in_the_data_folder_or_elsewhere(make_data):
    folder = make_data("a.jpg 1\nb.jpg 0\n")
    (folder / "images").rename(folder / "pictures")
    assert len(dataset.read_labels(folder, images=folder / "pictures")) == 2
    for file in (folder / "pictures").iterdir():
        file.rename(folder / file.name)
    assert len(dataset.read_labels(folder)) == 2
    with pytest.raises(InputError, match="--images"):
        dataset.read_labels(folder, images=folder / "nowhere")


def test_label_groups_order_and_select_the_classes(make_data):
    folder = make_data("image bolt rust colour\n" + TABLE)
    (folder / "label_groups.json").write_text('{"parts": ["bolt", "nut"], "defects": ["rust"]}')
    table = dataset.read_labels(folder)
    assert table.groups == {"parts": ["bolt"], "defects": ["rust"]} and table.classes == ["bolt", "rust"]
    assert any("dropped" in line and "colour (1 times)" in line for line in table.warnings)
    assert "label_groups.json" in told(table)


def test_a_group_column_names_the_object(make_data):
    folder = make_data("image,A,pipe\na.jpg,1,p1\nb.jpg,0,p2\nc.jpg,1,p1\n", name="labels.csv")
    table = dataset.read_labels(folder, group="pipe")
    assert table.objects == ["p1", "p2", "p1"] and table.classes == ["A"]
    with pytest.raises(InputError, match=r"--group pump: .* no such column; it has A, pipe"):
        dataset.read_labels(folder, group="pump")


def test_columns_can_be_named_and_ignored(make_data):
    text = "A,first,second,B\n1,a.jpg,b.jpg,5\n0,b.jpg,c.jpg,1\n1,c.jpg,a.jpg,0\n"
    folder = make_data(text, name="labels.csv")
    with pytest.raises(InputError, match=r"first and second both name images: .*--image-column first or"):
        dataset.read_labels(folder)
    with pytest.raises(InputError, match=r"labels.csv:2: '5' in the column B .*--ignore B"):
        dataset.read_labels(folder, image_column="first")
    table = dataset.read_labels(folder, image_column="first", ignore=["B"])
    assert known_rows(table) == {"a.jpg": [1], "b.jpg": [0], "c.jpg": [1]}
    assert any("left out" in line and "second" in line for line in table.warnings)
    table = dataset.read_labels(folder, image_column="second", ignore=["B", "first"])
    assert known_rows(table) == {"b.jpg": [1], "c.jpg": [0], "a.jpg": [1]}
    for how in ({"image_column": "third"}, {"image_column": "first", "ignore": ["third", "B"]}):
        with pytest.raises(InputError, match=r"third: .* no such column"):
            dataset.read_labels(folder, **how)


def test_no_label_file_or_several_is_an_error_that_lists_them(make_data, tmp_path):
    folder = make_data("a.jpg 1\n", name="one.txt")
    assert len(dataset.read_labels(folder)) == 1
    (folder / "._two.csv").write_bytes(b"\0\5\26\7")  # macOS writes such files
    (folder / "images" / "._a.jpg").write_bytes(b"\0\5\26\7")
    assert len(dataset.read_labels(folder)) == 1
    (folder / "two.csv").write_text("a.jpg,1\n")
    with pytest.raises(InputError, match=r"one.txt, two.csv.*--labels FILE"):
        dataset.read_labels(folder)
    for labels in (folder / "two.csv", "two.csv"):
        assert len(dataset.read_labels(folder, labels=labels)) == 1
    with pytest.raises(InputError, match=r"three\.csv"):
        dataset.read_labels(folder, labels="three.csv")
    with pytest.raises(InputError, match="is not a folder"):
        dataset.read_labels(tmp_path / "nowhere")


@pytest.mark.parametrize("name, separator", [("labels.txt", " "), ("labels.csv", ","), ("labels.csv", ";")])
@pytest.mark.parametrize("first", ["image", "ID", "file name"])
def test_a_header_of_numbers_is_a_header(make_data, name, separator, first):
    if separator == " ":
        first = first.replace(" ", "_")
    lines = [[first, "0", "1"], ["a.jpg", "1", "0"], ["b.jpg", "0", "NA"], ["c.jpg", "0", "1"]]
    data = make_data("".join(separator.join(cells) + "\n" for cells in lines), name=name)
    table = dataset.read_labels(data)
    check_table(table, [[1, 0], [0, NAN], [0, 1]], ["0", "1"])
    assert table.missing == []


@pytest.mark.parametrize("first", ["a.jpg", "a", "gone.jpg"])
def test_a_first_row_that_names_an_image_is_no_header(make_data, first):
    table = dataset.read_labels(make_data(f"{first} 0 1\nb.jpg 1 0\nc.jpg 1 1\n"))
    assert table.classes == ["Attr1", "Attr2"]
    assert len(table) + len(table.missing) == 3


@pytest.mark.parametrize("first", ["/photos/a", "gone"])
def test_a_first_row_that_reads_as_labels_is_not_lost_in_silence(make_data, first):
    data = make_data(f"{first} 1\nb.jpg 0\nc.jpg 1\n")
    try:
        table = dataset.read_labels(data)
    except InputError as error:
        assert "labels.txt:1" in str(error)
    else:
        assert len(table) + len(table.missing) == 3 or " header" in told(table)


# case: file, content, and (classes, targets) or what the error says; the images a.jpg, b.jpg and c.jpg are there
LABELS = {
    "empty": ("labels.txt", "", "labels.txt is empty: it needs a line per image"),
    "blank lines": ("labels.txt", "\n  \n", "labels.txt is empty"),
    "header only": ("labels.csv", "image,A,B\n", "labels.csv has a header and no rows"),
    "too few cells": ("labels.txt", "a.jpg 1 0\nb.jpg 1\n", "labels.txt:2: 2 cells, but there are 3"),
    "too many cells": ("labels.csv", "i,A\na.jpg,1\nb.jpg,1,0\n", "labels.csv:3: 3 cells, but there are 2"),
    "no label column": ("labels.txt", "a.jpg\nb.jpg\n", "labels.txt:1: no label column"),
    "value 2": ("labels.txt", "a.jpg 1\nb.jpg 2\n",
                "labels.txt:2: '2' in the column Attr1 is not 0, 1 or NA"),
    "letter O": ("labels.txt", "a.jpg 1 0\nb.jpg 1 O\n",
                 "labels.txt:2: 'O' in the column Attr2 is not 0, 1 or NA"),
    "a remedy": ("labels.txt", "a.jpg 1 0\nb.jpg 1 O\n", "--ignore Attr2"),
    "value yes": ("labels.csv", "image,A\na.jpg,yes\nb.jpg,No\nc.jpg,n/a\n", (["A"], [[1], [0], [NAN]])),
    "a row twice": ("labels.txt", "a.jpg 1 NA\na.jpg NA 0\nb.jpg 0 1\n",
                    (["Attr1", "Attr2"], [[1, 0], [0, 1]])),
    "contradiction": ("labels.txt", "a.jpg 1\nb.jpg 0\na.jpg 0\n",
                      "labels.txt:3: a.jpg has another label for Attr1 than in line 1"),
    "class name twice": ("labels.csv", "image,A,B,A\na.jpg,1,0,1\n",
                         "labels.csv:1: the column 'A' is there twice"),
    "no positive, no negative, only NA": ("labels.txt", "a.jpg 0 1 NA\nb.jpg 0 1 ?\n",
                                          (["Attr1", "Attr2", "Attr3"], [[0, 1, NAN], [0, 1, NAN]])),
    "one image, one class": ("labels.txt", "a.jpg 1\n", (["Attr1"], [[1]])),
    "names with spaces": ("labels.csv", 'image,"deep, long crack",Größe\na.jpg,1,0\n',
                          (["deep, long crack", "Größe"], [[1, 0]])),
    "absolute path": ("labels.txt", "a.jpg 0\n/etc/hostname 1\n",
                      "labels.txt:2: /etc/hostname lies outside the image"),
    "path that leaves": ("labels.txt", "../../a.jpg 1\na.jpg 0\n",
                         "labels.txt:1: ../../a.jpg lies outside the image"),
    "hidden way out": ("labels.txt", "x/../../a.jpg 1\na.jpg 0\n",
                       "labels.txt:1: x/../../a.jpg lies outside the"),
    "not UTF-8": ("labels.txt", b"a.jpg 1\n\xe4.jpg 0\n",
                  "labels.txt:2: byte 0xe4 is not UTF-8: save it as UTF-8"),
    "UTF-16": ("labels.txt", "a.jpg 1\n".encode("utf-16"), "labels.txt has zero bytes"),
    "a long line": ("labels.txt", b"a.jpg " + b"1 " * 2**20, "labels.txt has a line of over 1048576 bytes"),
    "open quote": ("labels.csv", 'image,A\na.jpg,"1\nb.jpg,0\n', "is a quote left open?"),
    "no image there": ("labels.txt", "x.jpg 1\n",
                       "the first one is x.jpg: name the image folder with --images"),
    "lists, a cell too many": ("image_data.csv", "ID,parts\na,Bolt\nb,Bolt,Nut\n",
                               "image_data.csv:3: 3 cells, but there are 2"),
    "lists, a column twice": ("image_data.csv", "ID,parts,parts\na,Bolt,\n",
                              "image_data.csv:1: the column 'parts' is"),
    "lists, placeholders only": ("image_data.csv", "ID,parts\na,part\nb,parts\n",
                                 "image_data.csv names no labels in parts"),
    "lists, a name in two columns": ("image_data.csv", "ID,parts,defects\na,Bolt,Rust\nb,Rust,\n",
                                     "Rust is in the columns parts and defects: rename it in one of them"),
    "cls, index out of range": ("labels/a.cls", "0\n80\n", "a.cls:2: '80' is not a class index, 0 to 79"),
    "cls, no number": ("labels/a.cls", "cat\n", "a.cls:1: 'cat' is not a class index"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(make_data, capsys, case):
    name, content, expected = LABELS[case]
    data = make_data("", name="note.md")
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, str):
        assert expected in refused(capsys, dataset.main, data)
        return

    code, out, errors = command(capsys, data)
    assert (code, errors) == (0, "")
    table = dataset.read_labels(data)
    assert table.classes == expected[0] and all(name in out for name in table.classes)
    np.testing.assert_array_equal(table.targets, expected[1])


def test_a_line_of_a_gigabyte_is_refused_in_little_memory(make_data, capsys):
    data = make_data("a.jpg 1\n")
    with open(data / "labels.txt", "r+b") as file:
        file.truncate(2**30)  # zeros, which take no room on the disk
    start = time.perf_counter()
    assert "labels.txt has a line of over 1048576 bytes" in refused(capsys, dataset.main, data)
    assert time.perf_counter() - start < 5


CELLS = ["a.jpg", "b", "sub/c", "../x", "1", "0", "NA", "", "?", "2", " ", ",", ";", "\t", "\n", "\r", '"',
         "ID", "image", "parts", "Bolt", "Rust;Bolt", "\ufeff", "\0", "é", "-1", "1.0",
         "99999999999999999999", "split", "train", "|", "0,5", "confidence", "['a']"]


def check_file(folder, name, content):
    """Read a folder with some content in its label file: it is a table, or one line says what is wrong."""
    (folder / name).write_bytes(content)
    try:
        table = dataset.read_labels(folder)
    except InputError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert table.targets.shape == (len(table.paths), len(table.classes))
        assert table.targets.dtype == np.float32
        assert np.isin(table.targets[~np.isnan(table.targets)], (0, 1)).all()


@pytest.mark.parametrize("name", ["labels.txt", "image_data.csv", "labels/a.cls"])
def test_read_labels_survives_1500_files(tmp_path, name):
    draw_images(tmp_path / "images", ["a.jpg", "b.png", "sub/c.jpg"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    start = "ID,parts,defects\n" if name.startswith("image_data") else ""
    rng = np.random.default_rng(0)
    for case in range(1500):
        if case % 4:
            content = "".join(rng.choice(CELLS, rng.integers(0, 60))).encode()
        else:
            content = rng.bytes(rng.integers(0, 200))
        check_file(tmp_path, name, start.encode() + content)


# ---------------------------------------------------------------------------------------------------------------------
# The lists format and the cls format

LISTS = """ID,components,defects,pipe
a,Centre Support;Channel Bracket,Loose,p1
b,component,defect,p2
a,Circular Connection,nan,p1
c,Components,Loose; Coating Failure,p3
d,Channel Bracket,,p3
"""


def test_lists_merge_the_rows_of_an_id_and_drop_placeholders(make_data):
    folder = make_data(LISTS, ("a.png", "b.jpg", "c.webp"), "image_data.csv")
    table = dataset.read_labels(folder, group="pipe")
    assert table.ids == ["a", "b", "c"] and table.missing == ["d"] and table.objects == ["p1", "p2", "p3"]
    assert table.groups == {"components": ["Centre Support", "Channel Bracket", "Circular Connection"],
                            "defects": ["Coating Failure", "Loose"]}
    assert table.classes == [name for names in table.groups.values() for name in names]
    assert table.targets.tolist() == [[1, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("single", [False, True])
def test_lists_with_valid_names_per_group(make_data, tmp_path, single):
    text = LISTS.replace(",p1", "").replace(",p2", "").replace(",p3", "").replace(",pipe", "")
    if single:
        text = ("image_id,labels\na,Centre Support;Channel Bracket;Loose\nb,label\na,Circular Connection\n"
                "c,Loose;Coating Failure\n")
    folder = make_data(text, ("a.png", "b.jpg", "c.webp"), "image_data.csv")
    groups = {"components": ["Channel Bracket", "Centre Support", "Weld"], "defects": ["Loose"]}
    (tmp_path / "valid.json").write_text(str(groups).replace("'", '"'))
    table = dataset.read_labels(folder, label_groups=tmp_path / "valid.json")
    assert table.groups == groups and table.classes == ["Channel Bracket", "Centre Support", "Weld", "Loose"]
    assert table.targets.tolist() == [[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    warning, = [line for line in table.warnings if "in no group" in line]
    assert "Circular Connection (1 times)" in warning and "Coating Failure (1 times)" in warning


def test_a_name_counts_for_its_own_group_whichever_column_it_stands_in(make_data, tmp_path):
    text = "ID,parts,defects\na,Bolt;Rust,defect\nb,part,Bolt;Rust\nc,defect,part\n"
    folder = make_data(text, name="image_data.csv")
    (tmp_path / "valid.json").write_text('{"parts": ["Bolt"], "defects": ["Rust"]}')
    table = dataset.read_labels(folder, label_groups=tmp_path / "valid.json")
    assert table.groups == {"parts": ["Bolt"], "defects": ["Rust"]}
    assert known_rows(table) == {"a": [1, 1], "b": [1, 1], "c": [0, 0]}


def test_a_placeholder_of_another_column_is_no_class(make_data):
    text = "ID,components,defects\na,Bolt,Rust\nb,defect,component\nc,Defects,Components\n"
    table = dataset.read_labels(make_data(text, name="image_data.csv"))
    assert table.groups == {"components": ["Bolt"], "defects": ["Rust"]}
    assert known_rows(table) == {"a": [1, 1], "b": [0, 0], "c": [0, 0]}


def test_bad_lists(make_data, tmp_path):
    folder = make_data("ID,parts\na,Bolt\n", name="image_data.csv")
    (tmp_path / "g.json").write_text('{"defects": ["Bolt"]}')
    with pytest.raises(InputError, match="no column is named labels, or like one of the groups defects"):
        dataset.read_labels(folder, label_groups=tmp_path / "g.json")
    for text in ('{"a": 1}', "[1]", '{"a": ["x"], "b": ["x"]}', "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (tmp_path / "g.json").write_text(text)
        with pytest.raises(InputError, match=r"g\.json"):
            dataset.read_labels(folder, label_groups=tmp_path / "g.json")


@pytest.fixture
def cls_data(make_data):
    """Return a folder of images in two folders, and .cls files of two classes beside them, one without an image."""
    folder = make_data("bolt\nnut\n", ("train/1.jpg", "train/2.png", "val/1.jpg"), "classes.txt")
    for name, text in (("train/1", "1\n0\n\n1\n"), ("train/2", ""), ("val/1", "0"), ("val/3", "1")):
        file = folder / "labels" / f"{name}.cls"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_cls_files(cls_data):
    table = dataset.read_labels(cls_data)
    assert table.ids == ["train/1", "train/2", "val/1"] and table.missing == ["val/3"]
    assert table.classes == ["bolt", "nut"] and table.targets.tolist() == [[1, 1], [0, 0], [1, 0]]
    by_name = dataset.read_labels(cls_data, labels="labels")
    assert known_rows(by_name) == known_rows(table)


def test_names_of_the_classes_of_cls_files(cls_data):
    (cls_data / "classes.txt").unlink()
    table = dataset.read_labels(cls_data)
    assert table.classes == dataset.COCO_CLASSES and len(set(dataset.COCO_CLASSES)) == 80
    for text in ('{"classes": ["x", "y"]}', '["x", "y"]'):
        (cls_data / "classes.json").write_text(text)
        table = dataset.read_labels(cls_data)
        assert table.classes == ["x", "y"] and "classes.json" in told(table)

    (cls_data / "classes.json").write_text('["x"]')
    with pytest.raises(InputError, match=r"train/1.cls:1: '1' is not a class index, 0 to 0"):
        dataset.read_labels(cls_data)
    for text in ("5", '{"a": ["x"]}', "[1, 2]", "{", '["x", "x"]'):
        (cls_data / "classes.json").write_text(text)
        with pytest.raises(InputError, match=r"classes\.json"):
            dataset.read_labels(cls_data)
    (cls_data / "classes.txt").write_text("bolt\nbolt\n")
    with pytest.raises(InputError, match=r"classes\.txt"):
        dataset.read_labels(cls_data)


def test_an_image_of_a_cls_file_is_found_by_its_stem_with_its_own_folder_first(cls_data):
    for part in ("train", "val"):
        (cls_data / "images" / part).rename(cls_data / "images" / f"{part}-resized")
    (cls_data / "labels" / "val" / "1.cls").rename(cls_data / "labels" / "val" / "4.cls")
    (cls_data / "images" / "val-resized" / "1.jpg").rename(cls_data / "images" / "val-resized" / "4.jpg")
    table = dataset.read_labels(cls_data)
    assert [path.removeprefix(f"{cls_data}/images/") for path in table.paths] == [
        "train-resized/1.jpg", "train-resized/2.png", "val-resized/4.jpg"]
    assert known_rows(table) == {"train/1": [1, 1], "train/2": [0, 0], "val/4": [1, 0]}


def test_odd_images_and_every_format_say_the_same(demo, odd_demo):
    plain = dataset.read_labels(demo)
    rows = list(known_rows(plain).values())
    for style, folder in odd_demo.items():
        table = dataset.read_labels(folder)
        assert table.classes == plain.classes
        assert [name.partition(".")[0] for name in table.missing] == ["part_0080"]
        for row, expected in zip(known_rows(table).values(), rows):
            if style != "table":  # which cannot say NA
                expected = [value or 0 for value in expected]
            assert row == expected

    table = dataset.read_labels(odd_demo["table"])
    for number, kind in ODD_PARTS.items():
        image = np.asarray(dataset.load_image(table.paths[number]), float)
        expected = dataset.load_image(plain.paths[number])
        if kind == "grey":
            expected = expected.convert("L").convert("RGB")
        assert np.abs(image - np.asarray(expected, float)).mean() < 8  # JPEG alone: 4; another image: over 18


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def fake_table(targets, objects=(), parts=(), copies=()):
    names = [str(i) for i in range(len(targets))]
    targets = np.array(targets, np.float32)
    classes = [f"class {c}" for c in range(targets.shape[1])]
    return dataset.LabelTable(names, names, targets, classes, objects=list(objects), parts=list(parts),
                              copies=list(copies))


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_split_is_a_partition_of_the_sizes_asked_for(method):
    table = fake_table(np.random.default_rng(0).random((400, 5)) < 0.3)
    parts = dataset.split(table, (0.7, 0.15, 0.15), method, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(400))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert [len(part) for part in parts] == pytest.approx([280, 60, 60], abs=4)
    assert all((a == b).all() for a, b in zip(parts, dataset.split(table, (70, 15, 15), method, seed=1)))
    other = dataset.split(table, (0.7, 0.15, 0.15), method, seed=2)
    assert set(parts[1]) != set(other[1])
    parts = dataset.split(table, (0.8, 0.2, 0), method)
    assert len(parts[2]) == 0 and len(parts[1]) == pytest.approx(80, abs=4)


def test_stratification_brings_rare_classes_to_every_split():
    rng = np.random.default_rng(0)
    targets = (rng.random((600, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    parts = dataset.split(fake_table(targets))
    total = (targets == 1).sum(axis=0)
    for part, ratio in zip(parts, (0.7, 0.15, 0.15)):
        positives = (targets[part] == 1).sum(axis=0)
        np.testing.assert_allclose(positives, ratio * total, atol=0.1 * total.max() * ratio + 1)
        assert (positives > 0).all()


def assign_one_by_one(positives, sizes, ratios):
    """Return what _stratified_parts() returns, in the plainest way: unit by unit, with nothing carried over."""
    part = [None] * len(sizes)

    def lacking(k, c):
        lack = ratios[k] * positives[c].sum()
        for unit in assigned:
            lack -= positives[c, unit] if part[unit] == k else 0
        return lack

    def room(k):
        left = ratios[k] * sizes.sum()
        for unit in assigned:
            left -= sizes[unit] if part[unit] == k else 0
        return left

    assigned = []
    possible = [k for k in range(len(ratios)) if ratios[k] > 0]
    while len(assigned) < len(sizes):
        units = [unit for unit in range(len(sizes)) if part[unit] is None]
        counts = [np.count_nonzero(row[units]) for row in positives]
        if any(counts):
            rarest = min((c for c in range(len(counts)) if counts[c]), key=counts.__getitem__)
            for unit in [unit for unit in units if positives[rarest, unit]]:
                part[unit] = max(possible, key=lambda k: (lacking(k, rarest), room(k)))
                assigned.append(unit)
        else:
            part[units[0]] = max(possible, key=room)
            assigned.append(units[0])
    return part


@pytest.mark.parametrize("seed", range(12))
def test_stratification_is_that_of_assigning_one_unit_after_the_other(seed):
    rng = np.random.default_rng(seed)
    ratios = np.array([[0.7, 0.15, 0.15], [0.2] * 5, [0.5, 0, 0.5], [0.9, 0.1, 0]][seed % 4])
    positives = rng.poisson(rng.uniform(0, 0.6, (4, 1)), (4, 40)).astype(np.float32)  # units of several rows
    sizes = np.maximum(1, positives.max(axis=0).astype(int))
    assert dataset._stratified_parts(positives, sizes, ratios).tolist() == assign_one_by_one(positives, sizes, ratios)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.sampled_from("vwxyz")), min_size=1))
def test_rows_that_share_an_object_or_a_picture_directly_or_through_others_are_one_unit(rows):
    objects, copies = zip(*rows)
    expected = list(range(len(rows)))
    for _ in rows:  # as often as the longest chain of rows may need
        for i, (name, picture) in enumerate(rows):
            linked = [k for k, other in enumerate(rows) if (name and other[0] == name) or other[1] == picture]
            expected[i] = min(expected[k] for k in linked)
    numbers = sorted(set(expected))  # numbered in the order of their first rows
    table = fake_table([[0]] * len(rows), objects, copies=copies)
    assert dataset._units(table).tolist() == [numbers.index(first) for first in expected]


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_images_of_one_object_stay_together(method):
    rng = np.random.default_rng(0)
    objects = [f"pipe{i}" for i in rng.integers(0, 60, 300)]
    parts = dataset.split(fake_table(rng.random((300, 3)) < 0.3, objects), method=method)
    seen = [{objects[row] for row in part} for part in parts]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert [len(part) for part in parts] == pytest.approx([210, 45, 45], abs=12)


def test_the_cells_of_many_rows_are_those_of_each_label():
    targets = np.random.default_rng(0).choice([0, 1, np.nan], (4100, 2)).astype(np.float32)
    assert list(dataset.to_cells(targets)) == [[dataset.to_cell(label) for label in row] for row in targets]
    assert list(dataset.to_cells(targets[:0])) == []


def test_every_split_gets_something_or_it_is_an_error():
    assert [len(part) for part in dataset.split(fake_table([[1]] * 3))] == [1, 1, 1]
    with pytest.raises(InputError, match="2 images are too few for 3 splits"):
        dataset.split(fake_table([[1]] * 2))
    for ratios in ((0, 1, 0), (1, 0, 0), (0.5, -1, 0.5), (NAN, 1, 1)):
        with pytest.raises(InputError, match="--split takes three ratios"):
            dataset.split(fake_table([[1]] * 9), ratios)


# The data's own split


@pytest.mark.parametrize("title", ["split", "Split", "subset"])
def test_a_column_says_the_split(make_data, title):
    names = [f"{i}.jpg" for i in range(8)]
    words = ["train", "Train", "val", "valid", "validation", "dev", "test", ""]
    lines = [f"{name},{word},{i % 2}\n" for i, (name, word) in enumerate(zip(names, words))]
    data = make_data("".join([f"image,{title},A\n", *lines]), names, "labels.csv")
    table = dataset.read_labels(data, **({} if title.lower() == "split" else {"split_column": title}))
    assert table.parts == ["train", "train", "val", "val", "val", "val", "test", ""]
    assert table.classes == ["A"]
    assert f"split: from the column {title}" in told(table)
    summary = dataset.summary(table)
    assert "2 train, 4 val, 1 test" in summary


def test_a_split_column_that_is_not_one_is_an_error(make_data):
    data = make_data("image,part,A\na.jpg,train,1\nb.jpg,later,0\nc.jpg,val,1\n", name="labels.csv")
    with pytest.raises(InputError, match=r"labels.csv:3: 'later' in the column part is not train, val"):
        dataset.read_labels(data, split_column="part")
    with pytest.raises(InputError, match=r"--split-column parts: .* no such column"):
        dataset.read_labels(data, split_column="parts")


@pytest.mark.parametrize("folders", ["{part}", "by/{part}", "{part}/more"])
def test_folders_say_the_split(make_data, folders):
    parts = ["train", "val", "test", "other"]
    names = [folders.format(part=part) + f"/{i}.jpg" for i, part in enumerate(parts)]
    data = make_data("".join(f"{name} {i % 2}\n" for i, name in enumerate(names)), names)
    table = dataset.read_labels(data, split_column="folder")
    assert table.parts == ["train", "val", "test", ""]
    assert "split: by the folders" in told(table)
    assert dataset.read_labels(data).parts == []


def divided_data(make_data, **parts):
    """Write data with a label file for each part, which names the images of a text like "abc"."""
    data = make_data("", [f"{name}.jpg" for name in "abcdefghi"], "note.md")
    for part, names in parts.items():
        lines = [f"{name}.jpg,{int(name in 'aceg')}\n" for name in names]
        (data / f"{part}.csv").write_text("".join(["image,A\n", *lines]))
    return data


def test_divided_files_say_the_split(make_data):
    table = dataset.read_labels(divided_data(make_data, train="abcd", valid="ef", test="ghi"))
    assert table.parts == ["train"] * 4 + ["val"] * 2 + ["test"] * 3
    assert [row[0] for row in table.targets] == [1, 0, 1, 0, 1, 0, 1, 0, 0]
    parts = dataset.split(table, (0.1, 0.8, 0.1))
    assert [list(rows) for rows in parts] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    assert "train.csv is train" in told(table) and "valid.csv is val" in told(table)


def test_an_image_in_two_parts_is_an_error(make_data):
    with pytest.raises(InputError) as error:
        dataset.read_labels(divided_data(make_data, train="abcd", val="ef", test="dghi"))
    assert "1 images are in two parts: d.jpg (train, " in str(error.value)
    assert "train.csv:5) and d.jpg (test, " in str(error.value) and "test.csv:2)" in str(error.value)
    assert "--drop-overlap" in str(error.value)


def test_a_part_without_a_known_label_is_read_like_the_others(make_data):
    data = divided_data(make_data, train="abc", val="de")
    (data / "train.csv").write_text("image,A,taken\na.jpg,1,at noon\nb.jpg,0,at night\nc.jpg,1,at noon\n")
    (data / "val.csv").write_text("image,A,taken\nd.jpg,NA,at noon\ne.jpg,,at night\n")
    table = dataset.read_labels(data)
    assert table.classes == ["A"]
    np.testing.assert_array_equal(table.targets[:, 0], [1, 0, 1, NAN, NAN])


def test_a_class_that_one_file_lacks_is_unknown_there_and_told(make_data):
    data = divided_data(make_data, train="abc", test="de")
    (data / "test.csv").write_text("image,A,B\nd.jpg,1,0\ne.jpg,0,1\n")
    table = dataset.read_labels(data)
    np.testing.assert_array_equal(table.targets[:, 1], [NAN, NAN, NAN, 0, 1])
    assert any("train.csv has no B" in line for line in table.warnings)


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_of_a_test_part_alone_the_rest_is_divided(method):
    targets = np.random.default_rng(0).random((100, 3)) < 0.3
    own = ["test" if i % 5 == 0 else "" for i in range(100)]
    train, val, test = dataset.split(fake_table(targets, parts=own), (0.7, 0.15, 0.15), method)
    assert list(test) == list(range(0, 100, 5))
    assert [len(train), len(val)] == pytest.approx([66, 14], abs=3)
    assert sorted([*train, *val, *test]) == list(range(100))


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_without_a_val_part_val_is_taken_from_train(method):
    targets = np.random.default_rng(0).random((100, 3)) < 0.3
    own = ["test" if i >= 80 else "train" for i in range(100)]
    train, val, test = dataset.split(fake_table(targets, parts=own), (0.7, 0.15, 0.15), method)
    assert list(test) == list(range(80, 100))
    assert [len(train), len(val)] == pytest.approx([66, 14], abs=3)
    assert max([*train, *val]) < 80


def test_an_own_split_without_train_images_is_an_error():
    table = fake_table([[1]] * 6, parts=["val"] * 3 + ["test"] * 3)
    with pytest.raises(InputError, match="no train images"):
        dataset.split(table)


# Copies: images with the same bytes


@pytest.fixture
def copied_data(make_data):
    """Return a folder of twenty images, of which 1, 3, 5 ... are copies of those before them."""
    names = [f"{i:02}.jpg" for i in range(20)]
    lines = [f"{name} {int(i in (0, 1, 8, 9, 15))} NA\n" for i, name in enumerate(names)]
    data = make_data("".join(lines), names)
    draw_images(data / "images", names)
    for i in range(0, 20, 2):
        (data / "images" / names[i + 1]).write_bytes((data / "images" / names[i]).read_bytes())
    return data


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_identical_images_stay_in_one_split(copied_data, method):
    table = dataset.read_labels(copied_data)
    for seed in range(5):
        for rows in dataset.split(table, (0.5, 0.25, 0.25), method, seed):
            assert len(rows) and {row // 2 for row in rows} == {row // 2 for row in rows if row ^ 1 in rows}


def test_identical_images_with_other_labels_are_a_warning(copied_data):
    table = dataset.read_labels(copied_data)
    warning, = [line for line in table.warnings if "identical" in line]
    assert "14.jpg and 15.jpg" in warning
    assert "00.jpg" not in warning and "02.jpg" not in warning


def test_check_lists_identical_images(copied_data, capsys):
    code, out, _ = command(capsys, copied_data, "--check")
    assert code == 0
    for i in range(0, 20, 2):
        assert f"{i + 1:02}.jpg is the same image as {i:02}.jpg" in out
    assert "00.jpg is the same" not in out


def test_identical_images_in_two_parts_of_an_own_split_are_an_error(copied_data):
    lines = [f"{i:02}.jpg,{'train' if i < 11 else 'test'},{int(i % 3 == 0)}\n" for i in range(20)]
    (copied_data / "labels.txt").unlink()
    (copied_data / "labels.csv").write_text("".join(["image,split,A\n", *lines]))
    with pytest.raises(InputError, match=r"10.jpg \(train, .*labels.csv:12\) and 11.jpg \(test, .*labels.csv:13\)"):
        dataset.read_labels(copied_data)


def test_empty_files_are_no_copies_of_each_other(make_data):
    data = divided_data(make_data, train="abc", val="de", test="fg")
    for name in "adf":
        (data / "images" / f"{name}.jpg").write_bytes(b"")
    table = dataset.read_labels(data)
    assert table.parts == ["train"] * 3 + ["val"] * 2 + ["test"] * 2
    assert table.warnings == []


def test_copies_of_an_object_bring_its_images_with_them():
    objects = ["p0", "p0", "p1", "p1", "p2", "p2", "p3", "p3"]
    copies = ["0", "1", "1", "3", "4", "5", "5", "7"]  # 1 and 2 are the same image, 5 and 6 too
    table = fake_table([[1]] * 8, objects, copies=copies)
    for seed in range(5):
        train, val, _ = dataset.split(table, (1, 1, 0), seed=seed)
        assert sorted([set(train), set(val)], key=min) == [{0, 1, 2, 3}, {4, 5, 6, 7}]


# ---------------------------------------------------------------------------------------------------------------------
# Images


def saved(image, kind, **options):
    return io.BytesIO(encoded(image, kind, **options))


def noise(mode="RGB", size=(40, 30)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def photograph(size=(800, 600)):
    """Return smooth noise, as a photograph has it."""
    return noise().resize(size, Image.Resampling.BICUBIC)


def animation():
    """Return a GIF whose first frame is red."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def plain(mode, colour):
    """Return an image of one colour, as a PNG file."""
    return encoded(Image.new(mode, (20, 10), colour), "PNG")


MODES = {  # what an image is: its file, and the pixels that it has as RGB
    "RGB": (plain("RGB", (9, 8, 7)), (9, 8, 7)),
    "grey": (plain("L", 120), (120,) * 3),
    "one bit": (plain("1", 1), (255,) * 3),
    "grey, opaque": (plain("LA", (120, 255)), (120,) * 3),
    "grey, transparent": (plain("LA", (120, 0)), (255,) * 3),  # over white
    "opaque": (plain("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
    "transparent": (plain("RGBA", (0, 0, 0, 0)), (255,) * 3),
    "half transparent": (plain("RGBA", (0, 0, 0, 51)), (204,) * 3),  # 51 of 255 are black, the rest is white
    "15 of 16 bits": (plain("I;16", 30_000), (234,) * 3),  # the upper 8 bits of those that are used: 30,000 / 128
    "16 bits": (plain("I;16", 40_000), (156,) * 3),
    "palette": (encoded(Image.new("RGB", (20, 10), (10, 200, 30)).quantize(4), "PNG"), (10, 200, 30)),
    "CMYK": (encoded(Image.new("CMYK", (20, 10), (0, 0, 0, 0)), "JPEG"), (255,) * 3),
    "JPEG called PNG": (encoded(Image.new("RGB", (20, 10), (90, 90, 90)), "JPEG"), (90,) * 3),
    "animation": (animation(), (255, 0, 0)),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_becomes_rgb_with_the_right_pixels(tmp_path, mode):
    content, pixel = MODES[mode]
    (tmp_path / "a.png").write_bytes(content)
    for image in (content, tmp_path / "a.png"):
        whole, small = dataset.load_image(image), dataset.load_image(image, 8)
        assert (whole.mode, small.mode, small.size) == ("RGB", "RGB", (8, 8))
        assert whole.getpixel((5, 5)) == small.getpixel((4, 4)) == pixel


def test_exif_orientation_is_applied():
    image, exif = Image.new("RGB", (40, 20), "black"), Image.Exif()
    image.paste("white", (0, 0, 20, 20))  # the left half, which orientation 6 turns to the top
    exif[0x0112] = 6
    content = encoded(image, "JPEG", exif=exif)
    for source in (content, io.BytesIO(content), Image.open(io.BytesIO(content))):
        upright = dataset.load_image(source)
        assert upright.size == (20, 40)
        assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[0] < 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [64, None])
def test_an_image_is_the_same_from_a_path_a_file_bytes_and_pillow(tmp_path, kind, size):
    path = tmp_path / f"a.{kind.lower()}"
    photograph().save(path, quality=95)
    content = path.read_bytes()
    expected = np.asarray(dataset.load_image(path, size))

    opened = Image.open(path)
    decoded = Image.open(path)
    decoded.load()
    sources = [str(path), content, bytearray(content), io.BytesIO(content), opened]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(dataset.load_image(source, size)), expected)

    # What was decoded before cannot be decoded at a smaller size any more
    for source in (decoded, decoded.copy(), np.array(decoded)):
        values = np.asarray(dataset.load_image(source, size), float)
        assert np.abs(values - expected).mean() < (1 if kind == "JPEG" and size else 1e-9)
    assert opened.size == decoded.size == (800, 600)  # the user's image is left as it is
    np.testing.assert_array_equal(np.asarray(dataset.load_image(opened, size)), expected)


@pytest.mark.parametrize("image", [
    np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((3, 9, 9), np.uint8),
    np.zeros((4, 4, 3), np.float32), b"no image" * 1000, b"", 5, None, io.BytesIO(b"no image" * 1000),
])
def test_what_is_no_image_is_named_in_a_few_words(image):
    with pytest.raises(ImageError) as error:
        dataset.load_image(image)
    assert len(str(error.value)) < 150 and "\n" not in str(error.value)
    assert type(image).__name__ in str(error.value) or "not an image" in str(error.value)


def bomb():
    """Return a PNG that says it has 40,000 x 40,000 pixels."""
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


def test_a_pipe_or_a_device_among_the_images_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")

    def give_up(*_):
        raise RuntimeError("it waits for somebody to write into the pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        for name in ("pipe.jpg", "zeros.jpg"):
            with pytest.raises(ImageError, match=f"{name}: a pipe or a device"):
                dataset.load_image(tmp_path / name)
        keys = {dataset.image_key(str(tmp_path / name)) for name in ("pipe.jpg", "zeros.jpg", "missing.jpg")}
        assert len(keys) == 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def programs(monkeypatch):
    """Return the list of the programs that Pillow wants to start, and start none of them."""
    started = []

    def refuse(command, *_, **__):
        started.append(command)
        raise OSError("no program may be started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: refuse("gs"))
    return started


def test_a_postscript_file_starts_no_program_however_it_is_given(tmp_path, programs):
    (tmp_path / "x.jpg").write_bytes(EPS)
    with pytest.raises(OSError, match="no program may be started"):
        Image.open(tmp_path / "x.jpg").load()  # what Pillow does by itself
    assert programs.pop() == "gs"
    opened = Image.open(io.BytesIO(EPS))
    with open(tmp_path / "x.jpg", "rb") as file:
        for image in (tmp_path / "x.jpg", str(tmp_path / "x.jpg"), EPS, bytearray(EPS), io.BytesIO(EPS), file, opened):
            for how in ({}, {"size": 8}, {"within": 8}):
                with pytest.raises(ImageError, match=r"not an image|EPS images are not decoded here"):
                    dataset.load_image(image, **how)
    assert programs == []


def test_a_postscript_file_in_a_data_folder_starts_no_program(make_data, programs, capsys):
    data = make_data("a.jpg 1\nb.jpg 0\nc.jpg 1\n")
    (data / "images" / "b.jpg").write_bytes(EPS)
    code, out, _ = command(capsys, data, "--check", "--sheet", data / "sheet.png")
    assert (code, programs) == (0, [])
    assert "2 of 3 images opened" in out and "2 of 3 images decode" in out and "b.jpg: not an image" in out


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICO", "ICNS", "SGI", "MSP", "DDS"])
def test_formats_that_nobody_asked_for_are_not_decoded(kind):
    content = encoded(noise("1" if kind == "MSP" else "RGB"), kind)
    opened = Image.open(io.BytesIO(content))
    assert opened.format == kind
    for image in (content, io.BytesIO(content)):
        with pytest.raises(ImageError, match="not an image in a readable format"):
            dataset.load_image(image)


def test_an_image_that_the_user_decoded_may_have_any_format():
    opened = Image.open(saved(noise(), "PCX"))
    with pytest.raises(ImageError, match=r"PCX images are not decoded here: call its load\(\) first"):
        dataset.load_image(opened)
    opened.load()
    np.testing.assert_array_equal(np.asarray(dataset.load_image(opened)), np.asarray(noise()))


WRITTEN = {"MPO": {"save_all": True, "append_images": [noise()]}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", dataset.IMAGE_FORMATS)
def test_every_readable_format_is_read_under_each_of_its_suffixes(tmp_path, kind):
    if kind not in Image.SAVE and kind not in Image.SAVE_ALL:
        pytest.skip(f"this Pillow cannot write {kind}")
    written = photograph((320, 240)).convert("P" if kind == "GIF" else "RGB")
    expected = np.asarray(written.convert("RGB"), float)
    for suffix in dataset.IMAGE_FORMATS[kind]:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(encoded(written, kind, **WRITTEN.get(kind, {})))
        for image in (path, path.read_bytes(), Image.open(path)):
            values = np.asarray(dataset.load_image(image), float)
            assert np.abs(values - expected).mean() < 6
        assert dataset.ImageFolder(tmp_path, tmp_path).names_image(path.name)


def test_a_pillow_without_some_format_reads_the_others(monkeypatch):
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    dataset.readable_formats.cache_clear()
    try:
        assert dataset.load_image(encoded(noise(), "TGA")).size == (40, 30)
        with pytest.raises(ImageError, match="not an image"):
            dataset.load_image(b"no image")
    finally:
        dataset.readable_formats.cache_clear()


def test_a_data_folder_without_a_readable_image_is_an_error_that_names_one(make_data, capsys):
    data = make_data("scan.dcm 1\nother.dcm 0\n", images=())
    for name in ("scan.dcm", "other.dcm"):
        (data / "images" / name).write_bytes(bytes(128) + b"DICM" + bytes(100))
    for more in ((), ("--check",), ("--sheet", data / "sheet.png")):
        code, _, errors = command(capsys, data, *more)
        assert (code, errors.count("\n")) == (2, 1)
        assert errors.startswith("error: none of 2 images can be opened, such as ")
        assert "scan.dcm: not an image in a readable format" in errors and "convert them to JPEG or PNG" in errors
    assert not (data / "sheet.png").exists()


def test_check_of_images_that_are_all_damaged_is_an_error(make_data, capsys):
    data = make_data("a.jpg 1\nb.jpg 0\n", images=("a.jpg",))
    content = encoded(noise(size=(400, 300)), "JPEG")
    for name in ("a.jpg", "b.jpg"):
        (data / "images" / name).write_bytes(content[:9000] + name.encode())
    code, out, errors = command(capsys, data, "--check")
    assert code == 2 and "0 of 2 images decode" in out
    assert errors.startswith("error: none of 2 images decodes, such as ") and "a.jpg: image file is truncated" in errors


def test_check_lists_bad_images(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name, (content, _) in IMAGES.items():
        (tmp_path / "images" / name).write_bytes(content)
    (tmp_path / "labels.txt").write_text("".join(f"{name} {i % 2} NA\n" for i, name in enumerate(IMAGES)))
    code, out, _ = command(capsys, tmp_path, "--check")
    bad = [name for name, (_, reason) in IMAGES.items() if reason]
    assert code == 0 and f"{len(IMAGES) - len(bad)} of {len(IMAGES)} images decode" in out
    assert all(f"{name}: " in out for name in bad)


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


RAMP = np.linspace(0, 1, 256)[None, :].repeat(16, axis=0)
DEEP = {  # file name -> values, dark at the left and bright at the right
    "12_bits.png": (RAMP * 4095).astype(np.uint16),
    "low.png": (RAMP * 1000).astype(np.uint16),
    "low_offset.png": (RAMP * 3000 + 300).astype(np.uint16),
    "16_bits.png": (RAMP * 65535).astype(np.uint16),
    "8_of_16_bits.png": (RAMP * 255).astype(np.uint16),
    "12_bits.tif": (RAMP * 4095).astype(np.uint16),
    "32_bits.tif": (RAMP * 4095).astype(np.int32),
    "unit.tif": RAMP.astype(np.float32),
    "float_255.tif": (RAMP * 255).astype(np.float32),
    "float_4095.tif": (RAMP * 4095).astype(np.float32),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_keep_their_contrast(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(DEEP[name]).save(path)
    image = dataset.load_image(path)
    assert image.mode == "RGB"
    row = np.asarray(image)[8, :, 0].astype(int)
    assert row.max() - row.min() > 128
    assert row[-1] == row.max()
    assert (np.diff(row) >= 0).all()
    assert len(np.unique(row)) > 64
    np.testing.assert_array_equal(np.asarray(image)[..., 0], np.asarray(image)[..., 2])


def test_a_float_image_with_odd_values_is_read(tmp_path):
    values = (RAMP * 4095).astype(np.float32)
    values[0, :5] = [np.nan, np.inf, -np.inf, -5, 0]
    Image.fromarray(values).save(tmp_path / "odd.tif")
    row = np.asarray(dataset.load_image(tmp_path / "odd.tif"))[8, :, 0].astype(int)
    assert row.max() - row.min() > 128 and (np.diff(row) >= 0).all()


def test_a_dataset_shows_a_deep_image_bright(tmp_path):
    Image.fromarray((RAMP * 4095).astype(np.uint16)).save(tmp_path / "deep.png")
    table = dataset.LabelTable(["deep.png"], [str(tmp_path / "deep.png")], np.ones((1, 1), np.float32), ["A"])
    images = dataset.ImageDataset(table, 32)
    pixels = images[0][0]
    assert images.errors == {}
    assert pixels.max() > 200
    assert pixels.min() < 50


def one_image(folder):
    """Return a LabelTable of one image, and the pixels of that."""
    image = noise(size=(20, 20))
    image.save(folder / "image.png")
    table = dataset.LabelTable(["image.png"], [str(folder / "image.png")], np.ones((1, 1), np.float32), ["A"])
    return table, np.asarray(image)


PLACES = [(PIL.Image, "open"), (PIL.ImageFile.ImageFile, "load")]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("place", PLACES, ids=["open", "load"])
def test_a_read_error_that_passes_is_tried_again(tmp_path, monkeypatch, place, number):
    table, values = one_image(tmp_path)
    images = dataset.ImageDataset(table, 20)
    function = getattr(*place)
    calls = []

    def fails_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    monkeypatch.setattr(*place, fails_once)
    pixels, targets = images[0][:2]
    assert images.errors == {}
    assert targets.tolist() == [1.0]
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), values)
    assert len(calls) >= 2


def test_a_read_error_that_stays_is_told(tmp_path, monkeypatch):
    table, _ = one_image(tmp_path)
    images = dataset.ImageDataset(table, 20)
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(PIL.Image, "open", fails)
    targets = images[0][1]
    assert len(calls) == 2
    assert targets.isnan().all()
    assert list(images.errors) == [0]
    assert "image.png" in images.errors[0]


@pytest.mark.parametrize("place", PLACES, ids=["open", "load"])
def test_too_little_memory_is_no_bad_image(tmp_path, monkeypatch, place):
    table, _ = one_image(tmp_path)
    images = dataset.ImageDataset(table, 20)

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(*place, fails)
    with pytest.raises(MemoryError):
        images[0]
    assert images.errors == {}
    with pytest.raises(MemoryError):
        dataset.load_image(table.paths[0])


@pytest.mark.parametrize("ends", [".jpg", ""])
def test_links_that_loop_do_not_end_the_search_for_images(make_data, ends):
    data = make_data("".join(f"{name}{ends} 1\n" for name in "abc"))
    images = data / "images"
    (images / "itself").symlink_to("itself")
    (images / "ping").symlink_to("pong")
    (images / "pong").symlink_to("ping")
    (images / "again").symlink_to(images)
    (images / "gone.jpg").symlink_to("nowhere.jpg")
    (images / "deep").mkdir()
    (images / "deep" / "up").symlink_to("..")
    table = dataset.read_labels(data)
    found = [os.path.realpath(path) for path in table.paths]
    assert found == [os.path.realpath(images / f"{name}.jpg") for name in "abc"]
    assert table.missing == []


KINDS = (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {}),
         ("WEBP", {"lossless": True}), ("TGA", {}), ("TGA", {"rle": True}), ("JPEG2000", {}), ("TIFF", {}),
         ("BMP", {}))
SEEDS = [encoded(noise(size=(64, 48)), kind, **options) for kind, options in KINDS]


@pytest.mark.filterwarnings("ignore")  # Pillow has much to say about damaged files
def test_load_image_survives_1500_damaged_files(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.jpg"
    count = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for case in range(1500):
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
            count += 1
            assert (image.mode, image.size) == ("RGB", (32, 32))
        assert time.perf_counter() - start < 10

    # The damage is neither always fatal nor never
    assert 150 < count < 1350
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_dataset_and_batches(demo):
    table = dataset.read_labels(demo)
    images = dataset.ImageDataset(table, 32, dataset.PixelCache(10**9))
    image, targets, name = images[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert targets.dtype == torch.float32 and name == table.ids[3]
    np.testing.assert_array_equal(targets.numpy(), table.targets[3])

    order = np.array_split(np.arange(len(images))[::-1], 7)
    for workers in (0, 3):
        seen = list(dataset.batches(images, order, workers))
        assert [list(rows) for _, _, rows in seen] == [list(rows) for rows in order]
        for batch, targets, rows in seen:
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert all(torch.equal(batch[i], images[row][0]) for i, row in enumerate(rows))
            np.testing.assert_array_equal(targets.numpy(), table.targets[rows])
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    assert next(iter(loader))[0].shape == (4, 3, 32, 32)


def test_a_bad_image_is_ignored_and_remembered(make_data):
    folder = make_data(TABLE)
    (folder / "images" / "b.jpg").write_bytes(b"no image")
    images = dataset.ImageDataset(dataset.read_labels(folder), 16)
    for _ in range(2):
        assert torch.isnan(images[1][1]).all()
        assert list(images.errors) == [1] and "b.jpg" in images.errors[1]
    _, targets, rows = next(dataset.batches(images, [[0, 1, 2]], 0))
    assert list(rows) == [0, 1, 2]
    np.testing.assert_array_equal(targets.numpy(), [TARGETS[0], [NAN] * 3, TARGETS[2]])


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.mark.parametrize("names", [*dataset.LEVELS.values(), *([name] for name in dataset.OPERATIONS)])
def test_augmentation_keeps_shape_and_range_and_depends_on_its_noise_alone(names):
    seed = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 24, 24), generator=seed, dtype=torch.uint8)
    random = dataset.draw_noise(6, seed=1, epoch=2)
    once = dataset.augment(images, names, random)
    assert once.shape == images.shape and once.dtype == torch.float32
    assert once.min() >= 0 and once.max() <= 255
    torch.testing.assert_close(dataset.augment(images[4:5], names, random[4:5]), once[4:5])
    assert torch.equal(random, dataset.draw_noise(6, seed=1, epoch=2))
    assert not torch.equal(random, dataset.draw_noise(6, seed=1, epoch=3))
    if names:
        assert not torch.equal(once, images.float())


def test_flips_are_exact_also_beside_an_operation_that_samples():
    images = torch.rand(4, 3, 16, 16) * 255
    random = torch.full((4, len(dataset.NOISE)), 0.5)  # no turn, no shift
    random[:, dataset.NOISE.index("flip")] = torch.tensor([0.1, 0.9, 0.1, 0.9])
    flipped = dataset.augment(images, ["flip"], random)
    assert torch.equal(flipped[0], images[0].flip(-1)) and torch.equal(flipped[1], images[1])
    sampled = dataset.augment(images, ["flip", "rotation"], random)
    torch.testing.assert_close(sampled, flipped, atol=1e-2, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_mixed_images_hold_the_share_that_is_told_of_each(seed):
    images = torch.tensor([0.0, 100.0, 200.0]).view(3, 1, 1, 1).expand(3, 3, 20, 30).contiguous()
    for kind in dataset.MIXES:
        before = images.clone()
        mixed, share = dataset.mix(images, kind, np.random.default_rng(seed))
        assert torch.equal(images, before) and mixed.shape == images.shape and 0 <= share <= 1
        expected = share * images + (1 - share) * images.roll(1, 0)
        if kind == "cutmix":  # whole pixels of one or the other, in one box
            assert set(mixed.unique().tolist()) <= {0.0, 100.0, 200.0}
            other = mixed[1, 0] == 0
            assert other.sum() == other.any(0).sum() * other.any(1).sum()
            mixed, expected = mixed.mean((1, 2, 3)), expected.mean((1, 2, 3))
        torch.testing.assert_close(mixed, expected, atol=1e-3, rtol=1e-4)


def test_operations_are_read_and_unknown_ones_are_named():
    assert dataset.read_operations("flip,jitter") == ("flip", "jitter")
    assert dataset.read_operations("rich") == dataset.LEVELS["rich"]
    with pytest.raises(InputError, match="'flipp' is not one of none, light"):
        dataset.read_operations("flipp")


# ---------------------------------------------------------------------------------------------------------------------
# Summary, warnings and sheet


def test_classes_without_a_positive_or_without_a_negative_are_a_warning(make_data, capsys):
    data = make_data("image,never,always,both,unknown\na.jpg,0,1,1,NA\nb.jpg,0,1,0,NA\nc.jpg,NA,1,1,NA\n",
                     name="labels.csv")
    _, out, _ = command(capsys, data)
    lines = [line for line in out.splitlines() if line.startswith("warning: ")]
    positive, = [line for line in lines if "no known positive" in line]
    negative, = [line for line in lines if "no known negative" in line]
    assert positive.endswith("never, unknown") and negative.endswith("always, unknown")


def test_the_summary_in_words(make_data, capsys):
    data = make_data("image A B C\na.jpg 1 1 NA\nb.jpg 1 0 1\nc.jpg 1 1 0\n")
    _, out, _ = command(capsys, data, "--sheet", data / "sheet.png", "--check")
    assert f"{data}: 3 rows, 3 images, 0 missing, 3 classes" in out
    assert f"{'A':5} {3:9} {0:9} {0:7} {1:10.1%}  {'#' * 20}" in out
    assert f"{'C':5} {1:9} {1:9} {1:7} {0.5:10.1%}  {'#' * 7}{'-' * 7}\n" in out
    assert "        2  A + B\n        1  A + C" in out and "B + C" not in out
    assert "3 of 3 images opened: width 12 to 12, median 12; height 10 to 10, median 10\n3 RGB JPEG" in out
    assert "3 of 3 images decode" in out
    assert Image.open(data / "sheet.png").width > 500


def test_the_summary_names_the_groups(demo):
    text = dataset.summary(dataset.read_labels(demo))
    lines = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "%" in line}
    assert lines == {"bolt": "parts", "bracket": "parts", "ring": "parts",
                     "rust": "defects", "crack": "defects", "hole": "defects"}


def test_the_summary_of_500_classes_is_short(make_data, capsys):
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(30)]
    rare = rng.random(500)
    rows = [[name, *(rng.random(500) < rare).astype(int).astype(str)] for name in names]
    header = ["image", *(f"class_{c}" for c in range(500))]
    data = make_data("\n".join(",".join(cells) for cells in [header, *rows]), names, "labels.csv")

    table = dataset.read_labels(data)
    lines = dataset.summary(table).splitlines()
    assert len(lines) <= 50

    # The rarest 15 classes and the most frequent 15 are shown
    shown = {line.split()[0] for line in lines if line.startswith("class_")}
    positives = dict(zip(table.classes, (table.targets == 1).sum(axis=0)))
    counts = sorted(positives.values())
    assert len(shown) == 30
    assert sorted(positives[name] for name in shown) == [*counts[:15], *counts[-15:]]
    assert max(map(len, lines)) < 300

    _, out, _ = command(capsys, data)
    assert len(out.splitlines()) < 70
    _, out, _ = command(capsys, data, "--all")
    assert all(f"{name} " in out for name in table.classes)


def test_a_label_sheet_shows_every_image_whole_with_room_for_its_labels(tmp_path):
    sizes = [(10, 10), (500, 20), (20, 500), (1, 1)]
    names = [f"{i}.png" for i in range(4)]
    for name, size in zip(names, sizes):
        Image.new("RGB", size, "red").save(tmp_path / name)
    classes = [f"a class with a long name, number {c}" for c in range(5)]
    targets = np.array([[1] * 5, [NAN] * 5, [0] * 5, [1, NAN, 0, 1, NAN]], np.float32)
    table = dataset.LabelTable(names, [str(tmp_path / name) for name in names], targets, classes)

    sheet = dataset.label_sheet(table)
    pixels = np.asarray(sheet)
    assert (pixels[-8:] == 255).all()  # nothing reaches the lower edge
    red = (pixels == (255, 0, 0)).all(axis=2)
    assert red.any(axis=0).sum() > 250 and red.sum() > 2 * 200 * 200  # each as large as it can be

    few = dataset.LabelTable(names, table.paths, targets[:, :1], ["A"])
    assert sheet.height > dataset.label_sheet(few).height
    assert dataset.label_sheet(table, count=2).width < sheet.width
    same = dataset.label_sheet(table)
    np.testing.assert_array_equal(np.asarray(same), pixels)


def test_a_label_sheet_shows_a_bad_image_too(demo, tmp_path):
    table = dataset.read_labels(demo)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    table.paths[0] = tmp_path / "bad.jpg"
    assert dataset.label_sheet(table, count=80).width == dataset.label_sheet(table.subset([1] * 6)).width


@pytest.mark.parametrize("names", [["Größe", "à l'œil"], ["亀裂", "さび"], ["\U0001f600", "ክክ"]])
def test_a_label_sheet_of_classes_in_any_script(make_data, names, capsys):
    data = make_data(",".join(["image", *names]) + "\na.jpg,1,0\nb.jpg,0,1\nc.jpg,1,1\n", name="labels.csv")
    code, _, errors = command(capsys, data, "--sheet", data / "sheet.png")
    assert code == 0 and (data / "sheet.png").is_file()
    assert errors == "" or (
        errors.count("\n") == 1 and errors.startswith("warning: no font here has the letters")
    )


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_sheet_does_not_hold_full_size_images(large_images, kind):
    decoded, alive = large_images(kind, dataset.label_sheet)
    assert alive <= 3
    if kind == "jpg":  # which is decoded smaller
        assert max(map(max, decoded)) <= 1200


# ---------------------------------------------------------------------------------------------------------------------
# Demo data, and files that are written whole or not at all


def test_the_demo_is_the_same_for_a_seed(demo, tmp_path):
    dataset.write_demo(tmp_path / "again", seed=0, count=20)
    again = files_of(tmp_path / "again")
    whole = files_of(demo)
    for name, content in again.items():
        assert content == whole[name][: len(content)]
    dataset.write_demo(tmp_path / "other", seed=1, count=20)
    other = files_of(tmp_path / "other")
    assert len(other) == 22 and sum(other[name] == again[name] for name in other) == 1  # the groups


def test_the_demo_has_groups_and_unknown_labels(demo):
    table = dataset.read_labels(demo)
    assert table.missing == [] and table.warnings == [] and len(table) == 80
    assert set(table.groups) == {"parts", "defects"} and len(table.classes) == 6
    assert 0.04 < np.isnan(table.targets).mean() < 0.12
    assert (np.nansum(table.targets, axis=0) > 0).all()


def test_a_demo_image_has_a_place_for_each_of_its_labels():
    numbers = [len(dataset.draw_demo_labels(np.random.default_rng(seed))) for seed in range(1000)]
    assert min(numbers) == 0 and max(numbers) == 4


def test_demo_boxes_lie_in_the_picture_and_name_the_labels():
    for labels in (set(), {"bolt"}, {"ring", "hole"}, {"bracket", "rust", "crack", "hole"}):
        for seed in range(4):
            image, boxes = dataset.draw_demo_image(labels, np.random.default_rng(seed))
            assert set(boxes) == labels and image.size == (80, 80)
            for left, top, right, bottom in boxes.values():
                assert 0 <= left < right <= 80 and 0 <= top < bottom <= 80


@pytest.mark.parametrize("name", ["labels.txt", "labels.csv", "image_data.csv", "note.md", "label_groups.json"])
def test_the_demo_leaves_a_folder_of_the_user_alone(make_data, capsys, name):
    text = '{"kinds": ["cat"]}' if name.endswith("json") else "image,cat\na.jpg,1\nb.jpg,0\n"
    data = make_data(text, name=name)
    before = files_of(data)
    assert str(data) in refused(capsys, dataset.main, "--demo", data)
    with pytest.raises(InputError):
        dataset.write_demo(data, count=5)
    assert files_of(data) == before


def test_the_demo_is_written_into_an_empty_folder_and_over_a_demo(tmp_path):
    for seed in (0, 1):
        dataset.write_demo(tmp_path, seed, count=5)
        assert len(dataset.read_labels(tmp_path)) == 5


def test_the_demo_of_an_older_version_is_drawn_again(tmp_path, monkeypatch):
    assert not dataset.demo_is_drawn(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "DEMO_SIZE", 128)
        dataset.write_demo(tmp_path, count=2)
        assert dataset.demo_is_drawn(tmp_path)
    assert not dataset.demo_is_drawn(tmp_path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # stopped after the first image
        draw = dataset.draw_demo_image
        images = iter([draw(set(), np.random.default_rng(0))])
        patch.setattr(dataset, "draw_demo_image", lambda *_: next(images, None) or signal.raise_signal(signal.SIGINT))
        dataset.write_demo(tmp_path, count=2)
    assert not dataset.demo_is_drawn(tmp_path)
    dataset.write_demo(tmp_path, count=2)
    assert dataset.demo_is_drawn(tmp_path) and len(dataset.read_labels(tmp_path)) == 2


def test_the_command_line_writes_the_demo(tmp_path, monkeypatch, capsys):
    image = Image.new("RGB", (8, 8))
    monkeypatch.setattr(dataset, "draw_demo_image", lambda labels, rng: (image.copy(), {}))
    code, out, _ = command(capsys, "--demo", tmp_path / "demo")
    assert code == 0 and "1000 rows, 1000 images, 0 missing, 6 classes" in out


def test_columns_to_ignore_and_the_folder_may_be_given_in_any_order_that_is_clear(make_data, in_folder, capsys):
    make_data("image,a,b,c\na.jpg,1,0,1\nb.jpg,0,1,1\n", name="labels.csv")
    for call in (["--ignore", "a", "b", "--labels", "labels.csv", "."], [".", "--ignore", "a", "b"],
                 [".", "--ignore", "a", "--ignore", "b"], ["--ignore", "a", "--ignore", "b", "--all", "."]):
        assert dataset.main(call).classes == ["c"]
    capsys.readouterr()
    for call in (["--ignore", "a", "b", "."], ["--ignore", "a", "images"]):
        error = refused(capsys, dataset.main, *call)
        assert f"is {call[-1]} a column or the data folder? Write the folder first" in error
    (in_folder / "b").mkdir()
    assert dataset.main([".", "--ignore", "a", "b"]).classes == ["c"]


def test_a_sheet_replaces_no_file_that_is_read(make_data, capsys):
    data = make_data("a.png 1\nb.png 0\n", images=("a.png", "b.png"))
    before = files_of(data)
    for sheet, message in ((data / "images" / "a.png", "would replace a file that is read"),
                           (data / "labels.txt", "name a file that ends in .png")):
        error = refused(capsys, dataset.main, data, "--sheet", sheet)
        assert message in error and str(sheet) in error
    assert files_of(data) == before


def test_wrong_options_are_one_line(tmp_path, capsys):
    wrong = ["--frobnicate"], ["--seed", "-1"], ["--seed", "x"], ["--label-threshold", "nan"], ["/nowhere"]
    for arguments in wrong:
        assert arguments[0] in refused(capsys, dataset.main, *arguments)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "text.txt"
    with dataset.atomic_write(path) as file:
        file.write("old")
        assert not path.exists()
    assert path.read_text() == "old"
    with pytest.raises(KeyError), dataset.atomic_write(path, "wb") as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["text.txt"]
    below = path / "below"
    with pytest.raises(OSError, match=r"text\.txt/below cannot be written"), dataset.atomic_write(below):
        pass


def test_csv_json_text_and_png_are_written(tmp_path):
    dataset.write_csv(tmp_path / "a.csv", [["ID", "label"], ["a, b", "Größe"]])
    assert (tmp_path / "a.csv").read_text("utf-8") == 'ID,label\n"a, b",Größe\n'
    dataset.write_json(tmp_path / "a.json", {"Größe": [1.5, NAN, math.inf, None], "b": {"c": (1, "x")}})
    text = (tmp_path / "a.json").read_text("utf-8")
    assert "Größe" in text
    expected = {"Größe": [1.5, None, None, None], "b": {"c": [1, "x"]}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    dataset.write_text(tmp_path / "a.txt", ["one", "two"])
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"
    dataset.write_png(tmp_path / "a.png", noise())
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(noise()))


def test_writing_follows_links(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "text.txt"
    target.write_text("old")
    links = [tmp_path / "absolute", tmp_path / "relative", tmp_path / "chain", tmp_path / "dangling"]
    links[0].symlink_to(target)
    links[1].symlink_to("there/text.txt")
    links[2].symlink_to("relative")
    links[3].symlink_to("there/new.txt")

    for link in links:
        with dataset.atomic_write(link, "w") as file:
            file.write(link.name)
        assert link.is_symlink()
        assert link.read_text() == link.name
    assert target.read_text() == "chain"
    assert (tmp_path / "there" / "new.txt").read_text() == "dangling"

    # Whole or not at all, through a link too
    with pytest.raises(KeyError), dataset.atomic_write(links[0], "w") as file:
        file.write("half")
        raise KeyError
    assert target.read_text() == "chain"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new.txt", "text.txt"]


@pytest.mark.parametrize("linked", [False, True])
def test_writing_goes_into_a_pipe(tmp_path, linked):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    name = pipe
    if linked:  # as /dev/stdout is
        name = tmp_path / "link"
        name.symlink_to(pipe)

    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with dataset.atomic_write(name, "w") as file:
            file.write("text")
        assert stat.S_ISFIFO(os.stat(name).st_mode)
        assert name.is_symlink() == linked
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
