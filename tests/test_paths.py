"""Which image a row means: no label may reach an image that its row does not name.

The rule, as ImageFolder states it, is read here a second time, slowly: every row is compared with every file.
"""

import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import dataset
from conftest import draw_images
from dataset import InputError


def write_rows(folder, rows, images, name="labels.csv"):
    """Write empty files for the images, and a label file of rows (path, label)."""
    for image in images:
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.encode())  # no two alike
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("image,A\n" + "".join(f"{row},{i % 2}\n" for i, row in enumerate(rows)))
    return folder


def read_pairs(folder, **how):
    """Read a folder: {ID of a row: its image, below images/}."""
    table = dataset.read_labels(folder, **how)
    root = f"{folder}/images/"
    return {name: path.removeprefix(root) for name, path in zip(table.ids, table.paths)}


# rows, files below the data folder -> {row: its image}; the other rows have none
MATCHES = {
    "an absent file in another folder": (
        ["siteA/0001.jpg", "siteA/0002.jpg"], ["images/siteA/0002.jpg", "images/siteB/0001.jpg"],
        {"siteA/0002.jpg": "siteA/0002.jpg"}),
    "a longer path, whose end is on the disk": (
        ["SET/train/patient0/study2/view1.jpg", "SET/train/patient1/study2/view1.jpg"],
        ["images/train/patient0/study2/view1.jpg", "images/train/patient1/study2/view1.jpg"],
        {"SET/train/patient0/study2/view1.jpg": "train/patient0/study2/view1.jpg",
         "SET/train/patient1/study2/view1.jpg": "train/patient1/study2/view1.jpg"}),
    "a path from above the data folder": (
        ["set/images/a/1.jpg", "set/images/b/1.jpg"], ["images/a/1.jpg", "images/b/1.jpg"],
        {"set/images/a/1.jpg": "a/1.jpg", "set/images/b/1.jpg": "b/1.jpg"}),
    "absolute paths of another machine": (
        ["/home/other/data/image/cam_0.jpg", "/data/upload/3/x.jpg", "C:\\data\\y.jpg", "D:/pictures/b/z.jpg",
         "\\\\server\\share\\v.jpg", "gs://bucket/set/w.jpg"],
        ["images/cam_0.jpg", "images/x.jpg", "images/y.jpg", "images/b/z.jpg", "images/v.jpg", "images/w.jpg"],
        {"/home/other/data/image/cam_0.jpg": "cam_0.jpg", "/data/upload/3/x.jpg": "x.jpg", "C:\\data\\y.jpg": "y.jpg",
         "D:/pictures/b/z.jpg": "b/z.jpg", "\\\\server\\share\\v.jpg": "v.jpg", "gs://bucket/set/w.jpg": "w.jpg"}),
    "an absolute path whose folders contradict": (
        ["/home/other/siteA/1.jpg", "/home/other/siteB/2.jpg"], ["images/siteB/1.jpg", "images/siteB/2.jpg"],
        {"/home/other/siteB/2.jpg": "siteB/2.jpg"}),
    "a full path before a longer one": (
        ["1.jpg", "b/1.jpg"], ["images/1.jpg", "images/b/1.jpg"], {"1.jpg": "1.jpg", "b/1.jpg": "b/1.jpg"}),
    "names without a suffix": (
        ["1", "b/2", "x.y"], ["images/1.jpg", "images/b/1.jpg", "images/a/b/2.PNG", "images/x.y.png"],
        {"1": "1.jpg", "b/2": "a/b/2.PNG", "x.y": "x.y.png"}),
    "another suffix": (
        ["1.heic", "2.jpg", "3.JPG"], ["images/1.jpg", "images/2.png", "images/3.jpg"], {"3.JPG": "3.jpg"}),
    "the same suffix in other letters": (
        ["a/1.JPG", "b/1.Jpg"], ["images/x/a/1.jpg", "images/b/1.jpg"],
        {"a/1.JPG": "x/a/1.jpg", "b/1.Jpg": "b/1.jpg"}),
    "a folder of another name": (["imgs/1.jpg", "2.jpg"], ["images/jpgs/1.jpg", "images/2.jpg"], {"2.jpg": "2.jpg"}),
    "dots in the middle": (
        ["./a/../b/1.jpg", "images//2.jpg"], ["images/b/1.jpg", "images/a/1.jpg", "images/2.jpg"],
        {"./a/../b/1.jpg": "b/1.jpg", "images//2.jpg": "2.jpg"}),
}


@pytest.mark.parametrize("case", MATCHES)
def test_a_row_takes_the_image_that_its_path_names_and_no_other(tmp_path, case):
    rows, files, expected = MATCHES[case]
    write_rows(tmp_path, rows, files)
    assert read_pairs(tmp_path) == expected
    assert dataset.read_labels(tmp_path).missing == [row for row in rows if row not in expected]


def test_rows_of_a_split_that_is_not_on_the_disk_are_missing(tmp_path):
    names = [f"{i:04}.png" for i in range(12)]
    write_rows(tmp_path, [f"train/{name}" for name in names], [f"images/test/{name}" for name in names])
    with pytest.raises(InputError, match=r"none of its 12 images is in .*images; the first one is train/0000.png"):
        dataset.read_labels(tmp_path)


# rows, files -> what the error says; two files or two rows are named
CONFLICTS = {
    "a name in two folders": (["1.jpg"], ["images/a/1.jpg", "images/b/1.jpg"], ":2: 1.jpg can be a/1.jpg or b/1.jpg: "),
    "a stem with two suffixes": (["1"], ["images/1.jpg", "images/1.png"], ":2: 1 can be 1.jpg or 1.png: "),
    "a suffix in two kinds of letters": (
        ["1.JPEG"], ["images/1.jpeg", "images/1.Jpeg"], "1.JPEG can be 1.Jpeg or 1.jpeg"),
    "the ends of a longer path": (["x/a/1.jpg"], ["images/a/1.jpg", "images/1.jpg"], "can be 1.jpg or a/1.jpg"),
    "two rows of other folders": (["siteA/1.jpg", "siteB/1.jpg"], ["images/1.jpg"],
                                  ":3: siteB/1.jpg and, at {folder}/labels.csv:2, siteA/1.jpg would both be"),
    "two rows of other machines": (["/data/upload/3/x.jpg", "/data/upload/4/x.jpg"], ["images/x.jpg"], "would both be"),
    "a whole path and a longer one": (["1.jpg", "siteA/1.jpg"], ["images/1.jpg"], "would both be"),
    "a path that leaves the folder": (["../../1.jpg"], ["images/1.jpg"], ":2: ../../1.jpg lies outside the image"),
    "an absolute path to a file elsewhere": (["/etc/hostname"], ["images/1.jpg"], "/etc/hostname lies outside"),
    "a file of the data folder beside images/": (["train/1.jpg"], ["images/1.jpg", "train/1.jpg"],
                                                 "train/1.jpg lies outside the image folder"),
    "a file beside the label file": (["1.jpg"], ["images/a/1.jpg", "1.jpg"], "1.jpg lies outside the image folder"),
    "a row without a name": ([""], ["images/1.jpg"], "none of its 1 images"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_path_that_can_be_read_in_two_ways_is_an_error_that_names_both(tmp_path, case):
    rows, files, message = CONFLICTS[case]
    write_rows(tmp_path, rows, files)
    with pytest.raises(InputError, match=re.escape(message.format(folder=tmp_path))) as error:
        dataset.read_labels(tmp_path)
    assert "\n" not in str(error.value)


def test_a_path_is_relative_to_its_label_file_or_to_the_image_folder(tmp_path):
    write_rows(tmp_path, ["1.jpg"], ["train/1.jpg", "valid/1.jpg"], "train/labels.csv")
    write_rows(tmp_path, ["1.jpg"], [], "valid/labels.csv")
    table = dataset.read_labels(tmp_path)
    assert table.paths == [f"{tmp_path}/train/1.jpg", f"{tmp_path}/valid/1.jpg"] and table.parts == ["train", "val"]
    (tmp_path / "1.jpg").write_text("another one")
    with pytest.raises(InputError, match=r"train/labels.csv:2: 1.jpg can be 1.jpg or train/1.jpg"):
        dataset.read_labels(tmp_path)


def test_the_image_folder_that_an_option_names_may_repeat_the_names_beside_it(tmp_path):
    write_rows(tmp_path, ["images/1.jpg", "images/2.jpg"], ["images/1.jpg", "images/2.jpg", "small/1.jpg"])
    table = dataset.read_labels(tmp_path, images=tmp_path / "small")
    assert table.paths == [f"{tmp_path}/small/1.jpg"] and table.missing == ["images/2.jpg"]


def test_how_names_were_matched_is_told_with_three_examples_each(tmp_path):
    rows = [f"{i}.jpg" for i in range(5)] + [f"/x/y/{i}.png" for i in range(4)] + ["s1", "s2", "none.jpg", "h.heic"]
    files = [f"{i}.jpg" for i in range(5)] + [f"y/{i}.png" for i in range(4)] + ["s1.jpg", "a/s2.png", "h.jpg", "z.png"]
    write_rows(tmp_path, rows, [f"images/{name}" for name in files])
    table = dataset.read_labels(tmp_path)
    for line in ("matched by full path: 5 rows, such as 0.jpg, 1.jpg, 2.jpg",
                 "matched by trailing part: 4 rows, such as /x/y/0.png = y/0.png, /x/y/1.png = y/1.png, "
                 "/x/y/2.png = y/2.png",
                 "matched by stem: 2 rows, such as s1 = s1.jpg, s2 = a/s2.png",
                 "images without a row: 2, such as h.jpg, z.png"):
        assert line in table.notes and line in dataset.summary(table)
    assert "13 rows, 11 images, 2 missing" in dataset.summary(table)
    assert "missing: none.jpg, h.heic" in dataset.summary(table)
    warning, = table.warnings
    assert "1 images are missing, but there with another suffix" in warning
    assert "h.heic is not there, but h.jpg is" in warning


def test_a_set_whose_images_were_all_converted_is_told_so(tmp_path):
    write_rows(tmp_path, ["1.HEIC", "2.HEIC"], ["images/1.jpg", "images/2.jpg"])
    with pytest.raises(InputError, match=r"1.HEIC is not there, but 1.jpg is: correct the label file"):
        dataset.read_labels(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# A label file for each image


def write_cls(folder, labels, images):
    write_rows(folder, ["note"], [f"images/{image}" for image in images], "note.md")
    for number, name in enumerate(labels):
        path = folder / "labels" / f"{name}.cls"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")


# label files, images -> {label file: its image}
STEMS = {
    "folders of other names": (["train/1", "val/1"], ["train-resized/1.jpg", "val-resized/1.jpg"],
                               {"train/1": "train-resized/1.jpg", "val/1": "val-resized/1.jpg"}),
    "years": (["train2017/1"], ["val2017/1.jpg", "train_images/1.jpg"], {"train2017/1": "train_images/1.jpg"}),
    "a folder for each batch": (["1", "2"], ["batch/1.jpg", "other/2.jpg"], {"1": "batch/1.jpg", "2": "other/2.jpg"}),
    "another split only": (["train/1", "train/2"], ["test/1.jpg", "train/2.jpg"], {"train/2": "train/2.jpg"}),
    "a folder of other label files": (
        ["siteA/1", "siteB/2"], ["siteB/1.jpg", "siteB/2.jpg"], {"siteB/2": "siteB/2.jpg"}),
    "one that another label file has": (["siteA/1", "siteB/1"], ["siteB/1.jpg"], {"siteB/1": "siteB/1.jpg"}),
    "a dot in the name": (["a.b"], ["x/a.b.png", "x/a.png"], {"a.b": "x/a.b.png"}),
}


@pytest.mark.parametrize("case", STEMS)
def test_a_label_file_takes_the_image_with_its_stem_of_the_same_split_first(tmp_path, case):
    labels, images, expected = STEMS[case]
    write_cls(tmp_path, labels, images)
    assert read_pairs(tmp_path) == expected


@pytest.mark.parametrize("labels, images", [
    (["1"], ["a/1.jpg", "b/1.jpg"]), (["train/1"], ["train-a/1.jpg", "train-b/1.jpg"]),
    (["a/1", "b/1"], ["1.jpg"]), (["a/1", "b/1"], ["c/1.jpg"]),
])
def test_a_label_file_whose_image_can_be_two_is_an_error(tmp_path, labels, images):
    write_cls(tmp_path, labels, images)
    with pytest.raises(InputError, match=r"1.*(can be|both)"):
        dataset.read_labels(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Random folders against a slow reading of the rule


FOLDERS = ["", "a/", "b/", "a/b/", "b/a/", "train/", "test/"]
STARTS = ["", "", "", "images/", "./", "SET/", "/home/eva/", "C:\\set\\", "a/", "b/"]
ENDINGS = [".jpg", ".jpg", ".png", ".JPG", "", ".heic"]


def slow_matches(row, files):
    """Return (full matches, matches by the rule) of a row among files, comparing it with each of them."""
    def split(path):
        parts = [part for part in re.sub("^[A-Za-z]:", "", path.replace("\\", "/")).split("/") if part not in ("", ".")]
        stem, suffix = os.path.splitext(parts[-1])
        return parts[:-1], stem, suffix.lower()

    def fits(one, other):
        folders, stem, suffix = one
        other_folders, other_stem, other_suffix = other
        shared = min(len(folders), len(other_folders))
        ends = folders[len(folders) - shared :] == other_folders[len(other_folders) - shared :]
        return ends and stem == other_stem and suffix in ("", other_suffix)

    relative = not re.match(r"/|[A-Za-z]:", row)
    full = set()
    for path in (row, row.removeprefix("images/")):
        if relative and path.removeprefix("./") in files:
            full.add(path.removeprefix("./"))
    if not full and relative:
        full = {file for file in files for path in {row, row.removeprefix("images/")}
                if split(path)[0] == split(file)[0] and fits(split(path), split(file))}
    return full, {file for file in files if fits(split(row), split(file))}


def slow_reading(rows, files):
    """Return {row: file} by the rule, or None where it is an error."""
    found = {}
    meant = {}
    for row in rows:
        full, matches = slow_matches(row, files)
        chosen = full or matches
        if len(chosen) > 1:
            return None
        for file in chosen:
            path = file if full else re.sub("^[A-Za-z]:", "", row.replace("\\", "/")).lstrip("/").removeprefix("./")
            if meant.setdefault(file, path) != path:
                return None
            found[row] = file
    return found


def check_random_folder(draw, outcome):
    """Draw a data folder, read it, and compare what was read with the slow reading."""
    names = st.sampled_from(["0", "1", "2"])
    files = draw(st.sets(st.builds(lambda folder, name, end: folder + name + end, st.sampled_from(FOLDERS), names,
                                   st.sampled_from([".jpg", ".png"])), min_size=1, max_size=8))
    row = st.builds(lambda start, folder, name, end: start + folder + name + end, st.sampled_from(STARTS),
                    st.sampled_from(FOLDERS), names, st.sampled_from(ENDINGS))
    rows = draw(st.lists(row, min_size=1, max_size=6, unique=True))
    expected = slow_reading(rows, files)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), ["0.jpg", *rows], [f"images/{file}" for file in files])
        lines = "".join(f'"{row}",{i % 2}\n' for i, row in enumerate(rows))
        (Path(folder) / "labels.csv").write_text("image,A\n" + lines)
        try:
            table = dataset.read_labels(folder)
        except InputError as error:
            outcome("an error")
            nothing = not expected and "none of its" in str(error)
            contradiction = "another label" in str(error)  # two rows of one image that disagree
            assert expected is None or nothing or contradiction, (str(error), rows, files)
            return
    outcome("read")
    root = f"{folder}/images/"
    merged = {}
    for name, file in (expected or {}).items():
        merged.setdefault(file, name)
    assert {path.removeprefix(root): name for name, path in zip(table.ids, table.paths)} == merged, (rows, files)


@settings(max_examples=int(os.environ.get("RANDOM_FOLDERS", "100")), deadline=None, database=None, derandomize=True)
@given(st.data())
def test_random_folders_are_read_as_a_slow_reading_of_the_rule_says(data):
    check_random_folder(data.draw, event)


def test_decoded_images_of_matched_rows_are_the_ones_on_the_disk(tmp_path):
    draw_images(tmp_path / "images", ["siteA/1.jpg", "siteB/1.jpg"])
    (tmp_path / "labels.csv").write_text("image,A\n/mnt/x/siteB/1.jpg,1\n/mnt/x/siteA/1.jpg,0\n")
    table = dataset.read_labels(tmp_path)
    sizes = [dataset.load_image(path).size for path in table.paths]
    assert sizes == [dataset.load_image(tmp_path / "images" / name).size for name in ("siteB/1.jpg", "siteA/1.jpg")]
    assert sizes[0] != sizes[1] and table.targets.tolist() == [[1], [0]]
