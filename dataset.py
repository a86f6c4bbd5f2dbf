"""Read label files and images, and turn them into tensors.

Label files are tables, lists of names, .cls files, or the boxes of YOLO, COCO JSON and Pascal VOC.

    python dataset.py data/                     # show what a data folder holds
    python dataset.py data/ --check             # also decode every image and list identical ones
    python dataset.py data/ --sheet sheet.png   # also draw a sample of the images with their labels
    python dataset.py data/ --answers answers.csv --out labels_new.csv  # merge answers into a table
    python dataset.py --demo data/demo          # write the demo data

    table = dataset.read_labels("data/")        # a LabelTable; targets are 1, 0, or NaN where unknown
    train, val, test = (table.subset(rows) for rows in dataset.split(table))
    images = dataset.ImageDataset(train, size=224)
    for batch, targets, rows in dataset.batches(images, [[0, 1, 2], [3, 4]]): ...

Label files, splits, datasets and reports exchange one type, LabelTable. The file reads top-down:
the command line, reading a data folder, answers, splits, images, augmentation, summaries, demo data, and
helpers that all scripts share.
"""

import argparse
import ast
import contextlib
import copy
import csv
import datetime
import errno
import hashlib
import io
import json
import math
import os
import posixpath
import re
import shlex
import shutil
import signal
import stat
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

PARTS = ("train", "val", "test")

IMAGE_FORMATS = {  # Pillow's names of the formats that are decoded, and the suffixes of their files
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".mpo",), "PNG": (".png", ".apng"),
    "WEBP": (".webp",), "GIF": (".gif",), "BMP": (".bmp",), "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"), "AVIF": (".avif",), "TGA": (".tga",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
IMAGE_SUFFIXES = {suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes}

# Suffixes of images too, so they are recognised in a label file, but these formats are not decoded.
OTHER_SUFFIXES = {".heic", ".heif", ".dcm", ".dicom", ".svg", ".psd", ".eps", ".jxl", ".raw", ".dng",
                  ".cr2", ".nef", ".arw", ".exr", ".hdr", ".pdf", ".npy"}


@dataclass
class LabelTable:
    """Hold images and their labels: row i is the image `paths[i]`, which the file calls `ids[i]`."""

    ids: list  # N names, as the label file writes them
    paths: list  # N files (or PIL images, bytes, arrays)
    targets: np.ndarray  # float32 (N, C): 1, 0, or NaN where the label is unknown
    classes: list  # C names
    groups: dict = field(default_factory=dict)  # {group name: its class names}; may be empty

    # N values each, or an empty list.
    objects: list = field(default_factory=list)  # the object an image shows; it stays in one split
    parts: list = field(default_factory=list)  # existing split: "train", "val", "test", or ""
    copies: list = field(default_factory=list)  # path of the first image with the same bytes
    origins: list = field(default_factory=list)  # "FILE:LINE" of the row
    added: list = field(default_factory=list)  # True for rows that answers added to the label file

    keys: np.ndarray = None  # image_key() of each image, integers (N,)

    # Arrays (N, C), or None if no answers were merged.
    before: np.ndarray = None  # the targets before the merge
    answered: np.ndarray = None  # True where a person answered, if only that they cannot tell

    # How the label files were read.
    sources: list = field(default_factory=list)  # the files that were read, apart from the images
    missing: list = field(default_factory=list)  # ids of rows that were dropped for lack of an image
    root: str = ""  # the image folder
    unlabelled: list = field(default_factory=list)  # images without a row, as paths below `root`
    notes: list = field(default_factory=list)  # how the files were understood, one line each
    warnings: list = field(default_factory=list)  # what looks wrong in them, one line each
    part_of: dict = field(default_factory=dict)  # {image below `root`: its part}, if files list them
    merged: int = 0  # number of rows that were merged with an earlier row of the same image
    absent: float = math.nan  # label of classes that a row does not name; 0 in lists
    identities: "Identities" = None  # which image files are the same, of all rows that were read

    def __len__(self):
        return len(self.ids)

    def subset(self, rows):
        """Return the table of the given rows (an array of row numbers), in that order."""
        chosen = {}
        for name in ("ids", "paths", "objects", "parts", "copies", "origins", "added"):
            values = getattr(self, name)
            chosen[name] = [values[i] for i in rows] if values else []
        for name in ("keys", "before", "answered"):
            values = getattr(self, name)
            chosen[name] = None if values is None else values[rows]
        return replace(self, targets=self.targets[rows], **chosen)

    @property
    def is_added(self):
        """Return booleans (N,): True for rows that answers added to the label file."""
        return np.array(self.added or [False] * len(self), bool)


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """Run the command line and return the LabelTable that it summarises."""
    options = _parse_options(argv)
    Progress.shown = True
    if options.demo:
        write_demo(options.demo, options.seed)
        options.data = options.demo
        print_text(f"drawn: {options.demo}; next: python train.py --demo --data {options.demo}\n")

    table = read_labels(options.data, **data_options(options))
    if options.sheet:
        refuse_to_replace("--sheet", options.sheet, [*table.sources, *table.paths])
    written = _write_table(options, table) if options.out else ""
    print_text(summary(table, options.data, most=10**9 if options.all else 30))
    print_text(f"\n{pairs_summary(table)}\n\n{images_summary(table)}")

    if options.sheet:
        write_png(options.sheet, label_sheet(table))
        print_text(f"drawn: {options.sheet}")
    if options.check:
        _check_images(table)
    if written:
        print_text(f"\n{written}")
    return table


def _parse_options(argv):
    """Parse and check the options of the command line."""
    description = "Show what a data folder holds, or write the demo data."
    parser = ArgumentParser(prog="dataset.py", description=description)
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="folder with labels and images (default: data)")
    add_data_options(parser)
    add("--all", action="store_true", help="show all classes, even if there are many")
    add("--sheet", metavar="FILE.png", help="draw a sample of the images with their labels")
    add("--check", action="store_true", help="decode every image; list bad and identical images")
    add("--out", metavar="FILE.csv", help="write all labels, with the answers "
        "merged in, as one CSV table")
    add("--demo", metavar="DIR", help="write the demo data into DIR")
    add("--seed", type=number(int), default=0, help="random seed of the demo data")
    options = parser.parse_args(argv)

    # In `--ignore colour data/` argparse takes the folder for one more column.
    folder = next(filter(os.path.isdir, options.ignore), None)
    if options.data is None and folder:
        raise InputError(f"--ignore takes all names that follow it: is {folder} a column or the "
                         "data folder? Write the folder first: dataset.py DATA --ignore COLUMN ...")
    if options.sheet and not options.sheet.lower().endswith(".png"):
        raise InputError(f"--sheet {options.sheet} is a PNG file: name a file that ends in .png")
    if options.out and not options.out.lower().endswith(".csv"):
        raise InputError(f"--out {options.out}: a CSV file is written: name a file that ends in .csv")
    options.data = options.data or "data"
    return options


def _check_images(table):
    """Print which images are bad, and which are identical. Raises InputError if all are bad."""
    bad = find_bad_images(table, os.cpu_count())
    print_text("\n".join([f"{len(table) - len(bad)} of {len(table)} images decode", *bad]))
    if len(bad) == len(table):
        raise InputError(f"none of {len(table)} images decodes, such as {bad[0]}: replace the "
                         "damaged files")

    name_of = dict(zip(table.paths, table.ids))
    for path, first in zip(table.paths, table.copies):
        if path != first:
            print_text(f"{name_of[path]} is the same image as {name_of[first]}")


# --------------------------------------------------------------------------------------------------
# Reading a data folder


@dataclass
class Reading:
    """Hold what the caller specifies; the rest is detected. See add_data_options()."""

    label_groups: str = None
    group: str = None
    split_column: str = None
    image_column: str = None
    ignore: list = ()
    separator: str = None
    label_threshold: float = None
    positive: list = ()  # a list of words; a single word is also accepted
    negative: list = ()
    unknown: list = ()
    image_list: str = None
    drop_overlap: bool = False
    answers: list = ()  # a list of files; a single file is also accepted
    background: bool = False

    def __post_init__(self):
        files = [self.answers] if isinstance(self.answers, (str, os.PathLike)) else self.answers
        self.answers = list(dict.fromkeys(map(str, files or ())))
        for name in ("positive", "negative", "unknown"):
            words = getattr(self, name)
            words = [words] if isinstance(words, str) else words or ()
            setattr(self, name, [word.lower() for word in words])


def read_labels(data_dir, labels=None, images=None, classes=(), identify=None, **how):
    """Read a data folder and detect its label format.

    The formats are tables, lists of names, .cls files, and boxes (YOLO, COCO JSON, Pascal VOC), where a
    class is present if it has a box.

    Args:
        data_dir: the folder with labels and images.
        labels: the label file, or the folder of .cls, YOLO or Pascal VOC files; by default what
            find_labels() finds.
        images: the image folder; by default DATA/images, or DATA itself.
        classes: the classes of a folder without a label file. It has no rows then, except for the
            images that answers are about, whose labels are classes too.
        identify: a function to use instead of identify_images().
        how: fields of Reading.

    Returns:
        A LabelTable. Rows whose image is missing are dropped and listed in `missing`; `notes` says
        how the files were understood. IDs are unique: where several images share one, and in YOLO and
        Pascal VOC, they are paths below the image folder.

    Raises:
        InputError: something is wrong, or the data can be read in two ways.
    """
    data_dir = Path(data_dir)
    how = Reading(**how)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is not a folder: name the data folder")
    if images and not Path(images).is_dir():
        raise InputError(f"{images} is not a folder: --images names the image folder")

    default = data_dir / "images"
    root = images or (default if default.is_dir() else data_dir)
    folder = ImageFolder(root, data_dir, guessed=not images)
    answers = [read_answers(_given_file(name, data_dir)) for name in how.answers]  # file by file
    classes = list(dict.fromkeys([*classes, *(one.label for one in chain(*answers))]))
    chosen = _choose_files(labels, data_dir, folder, required=not classes)
    table = _read_rows_and_images(chosen, classes, data_dir, folder, how)

    # Images that only answers are about get their rows now, so that they are compared with the
    # others, but their labels last, since splits must not depend on answers.
    if any(answers):
        answers = _find_answered(table, answers)
    if how.split_column == "folder":
        _split_by_folders(table)

    # Duplicates come first, since parts and rows can only be compared if it is known what is one image.
    _find_copies(table, identify or identify_images)
    table = _merge_rows(_separate_parts(table, how.drop_overlap))
    _make_ids_unique(table)

    if any(table.parts) and any(table.added):
        _place_added(table)
    if how.answers:
        _merge_answers(table, answers, how.answers, bool(chosen.files))
    _compare_copies(table)
    return table


def _read_rows_and_images(chosen, classes, data_dir, folder, how):
    """Return the rows of the label files, which are given as LabelFiles, with their images."""
    kind, files = chosen.kind, chosen.files
    if how.background and kind not in ("yolo", "voc"):
        raise InputError(f"--background is for YOLO and Pascal VOC, which have a label file per image, "
                         f"and {data_dir} is not read as one of them: leave it out")
    if kind != "table" or not files:
        _refuse_columns(how, data_dir)

    groups_file = Path(how.label_groups or data_dir / "label_groups.json")
    groups = _read_groups(groups_file) if how.label_groups or groups_file.is_file() else {}
    if not files:
        table = _images_without_labels(folder, classes, how)
    elif kind == "table":
        table = _read_files(files, DataFolder(data_dir, folder, groups, how))
    else:
        readers = {"cls": _read_cls, "yolo": _read_yolo, "voc": _read_voc, "coco": _read_coco}
        table = readers[kind](files, data_dir)

    named = (_given_file(name, data_dir) for name in (how.image_list, *how.answers) if name)
    table.sources += [*chosen.paths(), *named, *([groups_file] if groups else [])]
    if groups:
        table = _apply_groups(table, groups, groups_file)
    if files:
        table = _attach_images(table, folder, kind)
    if kind in ("yolo", "voc", "coco"):
        table = _keep_split(table, folder, chosen, how.background)
    return table


def _refuse_columns(how, data_dir):
    """Raise InputError if an option is about columns or their cells, in data without columns."""
    for option in ("group", "split_column", "image_column", "image_list", "ignore", "separator",
                   "label_threshold", "positive", "negative", "unknown"):
        value = getattr(how, option)
        if value in (None, (), []) or (option, value) == ("split_column", "folder"):
            continue
        words = " ".join(value) if isinstance(value, (list, tuple)) else value
        raise InputError(f"--{option.replace('_', '-')} {words}: {data_dir} has no label file with "
                         "columns: leave it out")


def _split_by_folders(table):
    """Set the parts of a table to those that the folders of its images name."""
    table.parts = [_part_of_folder(path.removeprefix(table.root)) for path in table.paths]
    if not any(table.parts):
        raise InputError(f"--split-column folder: no folder below {table.root} is called train, val "
                         "or test")
    table.notes.append("split: by the folders below the image folder")


def add_data_options(parser):
    """Add --labels, --images and the options of Reading to a parser (or to a group of one)."""
    add = parser.add_argument
    add("--labels", metavar="FILE", help="label file, or folder of .cls, YOLO or Pascal VOC files "
        "(default: search DATA)")
    add("--images", metavar="DIR", help="image folder (default: DATA/images if it exists, else DATA)")
    add("--answers", action="append", default=[], metavar="FILE", help="CSV file of answers "
        "to merge into the labels; repeat it for several files, the oldest first")
    add("--background", action="store_true", help="in YOLO and Pascal VOC data, all classes are absent "
        "in images without a label file (default: leave these out)")

    # What columns mean, where the titles do not tell.
    add("--label-groups", metavar="FILE",
        help="JSON file {group: [class, ...]} (default: DATA/label_groups.json)")
    add("--group", metavar="COLUMN", help="column that names the object; its images stay in one split")
    add("--split-column", metavar="COLUMN", help="column with train, val or test (default: detect it); "
        "folder: use the folders below the image folder")
    add("--drop-overlap", action="store_true", help="if an image is in two splits, keep only its "
        "rows in the later one (train, val, test)")
    add("--image-column", metavar="COLUMN", help="column with the image names (default: detect it)")
    add("--ignore", nargs="+", action="extend", default=[], metavar="COLUMN", help="columns to skip")
    add("--image-list", metavar="FILE",
        help="file with one image name per line, for label files without names")
    add("--separator", metavar="TEXT",
        help="separator of the labels in a cell (default: detect ; | or ,)")
    add("--label-threshold", type=number(float, below=1.001), metavar="T",
        help="the labels are numbers from 0 to 1; those of at least T are present")

    # What cells mean.
    for name, value, example in (("positive", "present", "ja"), ("unknown", "unknown (NA)", "-1"),
                                 ("negative", "absent", "nein, -1 or ''")):
        add(f"--{name}", action="append", default=[], metavar="WORD",
            help=f"cell that means {value}, such as {example}; can be repeated")


def data_options(options):
    """Return the parsed options of add_data_options() as keyword arguments of read_labels()."""
    return {name: getattr(options, name) for name in ("labels", "images", *Reading.__dataclass_fields__)}


# --------------------------------------------------------------------------------------------------
# Which files hold the labels


# The words that data sets use for the three parts, as names of files, folders and cells.
PART_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val", "publictest": "val",
    "test": "test", "testing": "test", "privatetest": "test", "holdout": "test",
}


# Those of lists of images, where trainval is what is left beside test.
LIST_WORDS = {**PART_WORDS, "trainval": ""}


def _choose_files(labels, data_dir, folder, required):
    """Return the LabelFiles that --labels names, or those that find_labels() finds."""
    if not labels:
        return find_labels(data_dir, folder, required)
    path = _given_file(labels, data_dir)
    if holds_questions(path):
        raise InputError(f"--labels {labels} holds answers about single labels, and is not a label "
                         f"file: use --answers {labels}")
    if path.suffix.lower() in (".yaml", ".yml"):
        raise InputError(f"--labels {labels} has the names of classes: name the folder of the YOLO files, or "
                         "leave the option out")
    if path.suffix.lower() == ".json":
        return LabelFiles("coco", {_part_of_file(path.name): path}, given=True)
    if not path.is_dir():
        return LabelFiles("table", {"": path})

    found = _find_annotations(path, ImageFolder(path, path).names, given=True)
    if not found:
        raise InputError(f"{path} holds no .cls files, no YOLO files (.txt), no Pascal VOC files "
                         "(.xml) and no COCO JSON: name another label file or folder with --labels")
    return _only_one(found, path)._replace(given=True)


class LabelFiles(NamedTuple):
    """Name the label files of a data folder, all of one format."""

    kind: str  # "table" (which lists and vectors are too), "cls", "yolo", "voc" or "coco"
    files: dict  # {part: Path}, where a single file may have the part ""; a list if images have one each
    given: bool = False  # whether --labels names them

    def paths(self):
        """Return the files as a list."""
        return list(self.files.values() if isinstance(self.files, dict) else self.files)

    def __str__(self):
        names = {"table": "a table", "cls": ".cls files", "yolo": "YOLO files", "voc": "Pascal VOC files",
                 "coco": "COCO JSON"}
        return f"{names[self.kind]} in {self.place()}"

    def place(self):
        """Return what --labels takes: a file, or the folder of the files."""
        paths = self.paths()
        if self.kind == "table" or (self.kind == "coco" and len(paths) == 1):
            return paths[0]
        return os.path.commonpath({path.parent for path in paths})


def find_labels(data_dir, folder=None, required=True):
    """Find the label files of a data folder.

    Files of questions and answers about single labels are never taken for label files.

    Args:
        data_dir: a Path.
        folder: the ImageFolder, which helps to tell a table of class names from a table of images.
        required: False if the folder may have no label file at all, of any format.

    Returns LabelFiles, without files if there are none. Raises InputError.
    """
    # The more specific name wins: labels.txt, then train.csv and the like or a format with a name of
    # its own for its files, then any table.
    for name in ("labels.txt", "labels.csv", "labels.tsv", "image_data.csv"):
        path = data_dir / name
        if path.is_file() and not holds_questions(path) and not _read_class_table(path, folder):
            return LabelFiles("table", {"": path})
    is_listed = folder and os.path.samefile(folder.root, data_dir)
    names = (folder if is_listed else ImageFolder(data_dir, data_dir)).names
    formats = _find_annotations(data_dir, names)
    divided = _find_divided(data_dir, formats)
    if "train" in divided and len(divided) > 1:
        formats.insert(0, LabelFiles("table", divided))
    if formats:
        return _only_one(formats, data_dir)

    found = _table_files(data_dir)
    candidates = [path for path in found if path.name.lower() != "classes.txt"
                  and not _read_class_table(path, folder)]
    # A table called sample... is probably a sample submission, but that is too uncertain to say that
    # the folder has no labels.
    tables = [path for path in candidates if not path.name.lower().startswith("sample")]
    if len(tables) == 1:
        return LabelFiles("table", {"": tables[0]})
    if not required and not candidates:
        return LabelFiles("table", {})

    names = (", ".join(path.name for path in found)
             or "no boxes of YOLO, COCO or Pascal VOC, and no .txt, .csv or .tsv file")
    more = ("; for a matrix of labels beside a list of images --labels MATRIX --image-list LIST"
            if found else "")
    if questions := [path for path in data_dir.glob("*.csv") if holds_questions(path)]:
        more += f"; {questions[0].name} holds answers: give it as --answers {questions[0]}"
    raise InputError(f"{data_dir} has {names}: name the label file with --labels FILE (or the "
                     "folder of files that belong to one image each), or call it "
                     f"labels.txt{more}")


def _only_one(formats, data_dir):
    """Return the only one of several LabelFiles. Raises InputError if there are more."""
    if len(formats) > 1:
        choices = dict.fromkeys(f"--labels {one.place()}" for one in formats)
        choose = f"choose one with {' or '.join(choices)}, or "
        choose = choose if len(choices) == len(formats) else ""  # else they share a folder
        raise InputError(f"{data_dir} has labels in several formats: {' and '.join(map(str, formats))}: "
                         f"{choose}move the others away")
    return formats[0]


def _table_files(folder):
    """Return the files in a folder that can be tables of labels, sorted."""
    files = [path for path in folder.glob("*.*") if path.is_file()]
    return sorted(path for path in files if path.suffix.lower() in (".txt", ".csv", ".tsv")
                  and not path.name.startswith(".")  # such as ._NAME, where macOS keeps attributes
                  and not holds_questions(path))


def _find_divided(data_dir, formats):
    """Find train.csv, train_metadata.csv, or the only table in train/; likewise for val and test.

    Args: formats: the LabelFiles of other formats, whose files and lists of images are no tables.
    """
    taken = set(chain(*(one.paths() for one in formats)))
    divided = {}
    for path in _table_files(data_dir):
        part = PART_WORDS.get(path.stem.lower().removesuffix("_metadata"))
        if not part or path in taken or (formats and _lists_images(path)):
            continue
        if part in divided:
            raise InputError(f"{divided[part]} and {path} are both {part}: remove one, or give --labels")
        divided[part] = path

    for word, part in PART_WORDS.items():
        inside = [path for path in _table_files(data_dir / word)
                  if path not in taken and not (formats and SIDE_FILE.fullmatch(path.name))]
        if len(inside) == 1:
            divided.setdefault(part, inside[0])
    return {part: divided[part] for part in PARTS if part in divided}


def _given_file(name, data_dir):
    """Find a file that an option names, in the working directory or in DATA."""
    for path in (Path(name), data_dir / name):
        if path.exists():
            return path
    raise InputError(f"{name} cannot be read: No such file or directory, nor in {data_dir}")


# --------------------------------------------------------------------------------------------------
# Annotation files: cls, YOLO, Pascal VOC and COCO JSON


# Folders of label files, which lie beside a folder of images or among its parents.
LABEL_FOLDERS = {"labels", "annotations", "xmls"}

# Text files beside those of YOLO which hold no labels of an image.
SIDE_FILE = re.compile(r"(readme|licen[cs]e|classes|labelmap|notes|requirements)\b.*\.txt", re.IGNORECASE)
COCO_FILE = re.compile(r"(.*/)?(instances_[^/]*|_annotations\.coco[^/]*)\.json")


def _find_annotations(data_dir, names, given=False):
    """Find the files of each format that is not a table.

    Args:
        names: the files below data_dir, as paths with "/".
        given: whether an option names this folder, so that no name has to tell that it holds labels.

    Returns a list of LabelFiles, which is empty if there are none. Raises InputError.
    """
    stems = {stem for stem, suffix in map(_image_suffix, names) if suffix}
    found = {"cls": [], "yolo": [], "voc": []}
    last_parts = {stem.rpartition("/")[2] for stem in stems}  # for 1.xml beside a folder of images
    beside = []  # text files that lie beside their images, which may also hold captions
    for name in sorted(names):
        kind = {".cls": "cls", ".txt": "yolo", ".xml": "voc"}.get(name[-4:].lower())
        if not kind or "/." in f"/{name}":
            continue
        has_image = name[:-4] in stems
        if kind == "yolo" and not has_image and _is_side_file(data_dir, name):
            continue

        # CVAT's YOLO has its files in obj_train_data/, whether or not the images are there too.
        folders = name.lower().split("/")[:-1]
        own = {"labels"} if kind == "yolo" else LABEL_FOLDERS
        if given or not own.isdisjoint(folders) or re.search(r"(^|/)obj_[^/]+_data/", name.lower()):
            found[kind].append(data_dir / name)
        elif has_image or (not folders and name[:-4] in last_parts):
            (beside if kind == "yolo" else found[kind]).append(data_dir / name)

    if found["yolo"] or _holds_boxes(beside):
        found["yolo"] = sorted(found["yolo"] + beside)
    formats = [LabelFiles(kind, files) for kind, files in found.items() if files]
    coco = _find_coco(data_dir, names, stems)
    return formats + [LabelFiles("coco", coco)] * bool(coco)


def _is_side_file(data_dir, name):
    """Return True if a text file among those of YOLO holds no labels: classes.txt, train.txt, ..."""
    file = name.rpartition("/")[2]
    word = file[:-4].lower().rstrip("0123456789")  # as in train2017.txt
    return bool(SIDE_FILE.fullmatch(file)) or (word in PART_WORDS and _lists_images(data_dir / name))


def _part_of_file(name):
    """Return the part that the name of a file tells, as instances_val2017.json does, or ""."""
    return _part_of_folder(f"{name.rpartition('.')[0]}/")


def _lists_images(path):
    """Return True if the first line of a text file, blank ones apart, is an image or one word."""
    if path.suffix.lower() != ".txt":
        return False
    try:
        with open(path, encoding="utf-8-sig") as file:
            line = next(filter(None, map(str.strip, iter(lambda: file.readline(10_000), ""))), "")
    except (OSError, ValueError):
        return False
    return bool(_image_suffix(line)[1] or re.fullmatch(r"[^\s,;]+", line))


def _holds_boxes(paths):
    """Return True if the first of some files whose first line is not blank starts with a line of YOLO."""
    for path in paths:
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            if cells := file.readline(1000).split():
                return len(cells) >= 5 and all(map(NUMBER.fullmatch, cells[:5]))
    return False


def _find_coco(data_dir, names, stems):
    """Return {part: Path} of the COCO JSON files below DATA, or {}. Raises InputError."""
    candidates = sorted(name for name in names if name.lower().endswith(".json")
                        and "/." not in f"/{name}" and name[:-5] not in stems)
    # COCO has more files for the same images, such as captions_train2017.json.
    files = [name for name in candidates if COCO_FILE.fullmatch(name)]
    files = files or [name for name in candidates if name.count("/") < 2 and _looks_like_coco(data_dir / name)]
    if len(files) < 2:
        return {_part_of_file(name) or _part_of_folder(name): data_dir / name for name in files}

    parts = {}
    for name in files:
        part = _part_of_file(name) or _part_of_folder(name)
        if part in parts:
            raise InputError(f"{data_dir / parts[part]} and {data_dir / name} are both "
                             f"{part or 'of no part, train, val or test'}: choose one with --labels")
        parts[part] = name
    return {part: data_dir / parts[part] for part in ("", *PARTS) if part in parts}


def _looks_like_coco(path):
    """Return True if a JSON file has at least two of the three lists that make it COCO."""
    keys = (b'"images"', b'"annotations"', b'"categories"')
    try:
        with open(path, "rb") as file:
            start = file.read(2**16)
            if not start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{") or not any(map(start.count, keys)):
                return False
            content = start + file.read()
    except OSError:
        return False
    return sum(key in content for key in keys) >= 2


# --------------------------------------------------------------------------------------------------
# Label files: from lines of text to columns, and from columns to labels


@dataclass
class DataFolder:
    """Hold what the label files of one data folder share while they are read."""

    path: Path
    images: "ImageFolder"
    groups: dict
    how: Reading
    first: "LabelColumns" = None  # those of the first file, which the other files must have too
    meanings: dict = field(default_factory=dict)  # {cell: 1.0, 0.0, NaN or None} of label columns
    titles: dict = field(default_factory=dict)  # {file: the titles of its columns}
    sources: list = field(default_factory=list)  # files that were read beside the label files

    @cached_property
    def class_names(self):
        self.sources += filter(None, [_class_file(self.path)])
        return _read_class_names(self.path)


@dataclass
class LabelColumns:
    """Name the label columns of a file and how they hold labels: "table", "lists" or "vectors"."""

    kind: str
    titles: list
    absent: set  # which of a blank cell and "-" means absent


class LabelFile:
    """Hold one label file while its rows become columns, and its columns become a LabelTable."""

    def __init__(self, path, data):
        self.path = path
        self.data = data
        self.rows, self.delimiter = read_rows(path)
        self.values = LabelValues(data.how, decimal_comma=self.delimiter == ";")
        self.notes = [f"{path}: cells separated by {DELIMITER_NAMES[self.delimiter]}"]
        self.cells = {}  # {title: cells} of the columns whose meaning is still open
        self.columns = []  # a Column for each of those that may hold labels
        self.table = None

    def take(self, title, option):
        """Remove the column that an option names and return its cells."""
        if title not in self.cells:
            raise InputError(f"{option} {title}: {self.path} has no such column; it has "
                             f"{', '.join(self.cells)}")
        return self.cells.pop(title)


def _read_files(files, data):
    """Read the label files {part: Path} of a data folder, all of one kind, into one LabelTable."""
    tables = {}
    left_out = []
    for part, path in files.items():
        try:
            table, columns = _read_file(path, data)
        # Competitions publish their test file without labels.
        except NoLabels as error:
            if not tables:
                raise
            left_out.append(f"{path} is left out, since it has no labels "
                            f"({str(error).partition(': ')[2]})")
            continue
        data.first = data.first or columns
        tables[part] = table

    # Columns may differ from file to file, so a name is wrong only if no file has it.
    for name in data.how.ignore:
        if not any(name in titles for titles in data.titles.values()):
            path, titles = next(iter(data.titles.items()))
            raise InputError(f"--ignore {name}: {path} has no such column; it has "
                             f"{', '.join(titles)}")

    divided = len(tables) > 1
    if divided:
        for part, table in tables.items():
            table.parts = [part] * len(table)
    table = _join_tables(list(tables.values()))
    table.warnings += left_out
    if divided:
        table.notes.append(f"divided: {', '.join(f'{files[part]} is {part}' for part in tables)}")
    table.sources += data.sources
    _require_negatives(table, data)
    return table


def _read_file(path, data):
    """Read one label file. Returns (LabelTable without paths, its LabelColumns)."""
    file = LabelFile(path, data)
    if not file.rows:
        raise InputError(f"{path} is empty: it needs a line per image")

    _skip_count(file)
    _add_image_list(file)
    _regularize_rows(file)
    titles = _split_header(file)
    origins = [f"{path}:{number}" for number, _ in file.rows]
    file.cells = _columns(file, titles)
    file.rows = []  # columns take less memory
    data.titles[path] = titles

    # Columns with a role of their own are taken away first; labels are looked for in what remains.
    title = data.how.image_column or _find_image_column(file)
    file.notes.append(f"images: in {f'the column {title}' if title else 'a column without a title'}")
    names = list(file.take(title, "--image-column"))
    table = file.table = LabelTable(names, [], None, [], notes=file.notes, origins=origins)
    _add_folders(file)
    for name in data.how.ignore:
        file.cells.pop(name, None)
    if data.how.group:
        _read_objects(file, data.how.group)
    _read_parts(file)

    file.columns = [Column(name, cells, file.values) for name, cells in file.cells.items()]
    known = (data.how.image_column or title.lower() in ID_TITLES
             or any(map(data.images.names_image, table.ids[:50])))
    kind = data.first.kind if data.first else _choose_kind(file, file.delimiter != " " and known)
    read = {"table": _read_table, "lists": _read_lists, "vectors": _read_vectors}[kind]
    chosen = read(file, file.columns)

    others = [column for column in file.columns if column not in chosen]
    left_out = [column.title or "one without a title" for column in others]
    if left_out:
        table.warnings.append(f"columns that hold no labels were left out: {', '.join(left_out)}")
    for column in chosen:
        data.meanings.update(column.labels)
    # Later files of the same data follow the first one in this, even if they hold no x or +.
    absent = {cell for column in chosen for cell in ("", "-") if column.labels.get(cell) == 0}
    return table, LabelColumns(kind, [column.title for column in chosen], absent)


def _join_tables(tables):
    """Join the tables of several files; a class that one of them lacks is absent or unknown there."""
    if len(tables) == 1:
        return tables[0]
    classes = list(dict.fromkeys(chain(*(table.classes for table in tables))))
    targets = []
    joined = LabelTable([], [], None, classes, tables[0].groups, absent=tables[0].absent)
    for table in tables:
        # Lists name what is present, so a class without a name is absent; in a table it is unknown.
        part = np.full((len(table), len(classes)), table.absent, np.float32)
        part[:, [classes.index(name) for name in table.classes]] = table.targets
        targets.append(part)

        lacking = [name for name in classes if name not in table.classes]
        if lacking:
            table.warnings.append(f"{table.origins[0].rpartition(':')[0]} has no "
                                  f"{', '.join(lacking)}")
        for name in ("ids", "objects", "parts", "origins", "notes", "warnings"):
            getattr(joined, name).extend(getattr(table, name))
    joined.targets = np.concatenate(targets)
    return joined


def _require_negatives(table, data):
    """Raise InputError if no label is absent, as then NA, such as a blank cell, may mean absent."""
    unknown = [cell for cell, value in data.meanings.items() if value is not None and math.isnan(value)]
    asked = [cell for cell in unknown if cell.lower() not in data.how.unknown]
    only_present = (table.targets == 1).any() and not (table.targets == 0).any()
    if math.isnan(table.absent) and asked and only_present and np.isnan(table.targets).any():
        word = "" if "" in asked else min(asked)
        said = f"a cell {word!r}" if word else "a blank cell"
        source = table.origins[0].rpartition(":")[0]
        raise InputError(f"{source}: every known label is present: if {said} means absent, say "
                         f"--negative={shlex.quote(word)}; if it means unknown, "
                         f"--unknown={shlex.quote(word)}")


# --------------------------------------------------------------------------------------------------
# Text files: lines, and rows of cells


DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", " ": "white space"}
LONGEST_LINE = 2**20  # bytes; a line of 80 classes has about 300, a video may have no line ends

# The first bytes of files that people give by mistake, since they hold tables too.
FOREIGN = {b"PK\x03\x04": "an Excel workbook or a ZIP archive", b"\x93NUMPY": "a numpy array",
           b"PAR1": "a Parquet file", b"%PDF": "a PDF document", b"\x80\x04": "a Python pickle",
           b"<?xml": "XML"}
READABLE = ("label files are tables (.txt, .csv, .tsv) with a column per class, .csv lists of label "
            "names, COCO JSON, or a folder of .cls, YOLO or Pascal VOC files: export one of these")


def read_rows(path):
    """Read a text file of rows.

    Returns a sequence of (line number, cells) of the lines that are not blank, and the delimiter.
    Raises InputError.
    """
    lines = read_lines(path)
    first = next((line for line in lines if line.strip()), "").strip()
    starts = first in ("{", "[") or first.startswith(('{"', "[{", '["'))
    if path.suffix.lower() in (".json", ".jsonl") or starts:
        raise InputError(f"{path} is JSON: {READABLE}")

    delimiter = _find_delimiter(path, first)
    if delimiter == " ":
        return Rows(lines, str.split, path.name), delimiter
    if any('"' in line for line in lines):
        return _read_quoted(path, lines, delimiter), delimiter
    return Rows(lines, lambda line: list(map(str.strip, line.split(delimiter))), path.name), delimiter


class Rows(Sequence):
    """Hold the rows of a file, as pairs (line number, cells).

    Lines are split each time they are used: a million rows of 80 cells would take too much memory.
    """

    def __init__(self, lines, split, title):
        self.lines, self.numbers = [], []
        self.split = split
        self.width = 0
        for number, line in enumerate(watched(f"reading {title}", lines), 1):
            width = _width(split(line))
            if width:
                self.lines.append(line)
                self.numbers.append(number)
                self.width = max(width, self.width)

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, place):
        if isinstance(place, slice):
            rows = copy.copy(self)
            rows.lines, rows.numbers = self.lines[place], self.numbers[place]
            return rows
        return self.numbers[place], self.split(self.lines[place])[: self.width]


def _width(cells):
    """Return the number of cells without blank ones at the end, which spreadsheets often write."""
    width = len(cells)
    while width and not cells[width - 1]:
        width -= 1
    return width


def _read_quoted(path, lines, delimiter):
    """Return the rows (line number, cells) of a file with quotes. Raises InputError."""
    rows = []
    known = {}  # equal cells are one object, to save memory
    # Some programs, such as Roboflow, write a blank after each comma.
    reader = csv.reader((line + "\n" for line in watched(f"reading {path.name}", lines)),
                        delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            cells = list(map(str.strip, cells))
            if any(cells):
                rows.append((reader.line_num, list(map(known.setdefault, cells, cells))))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}: is a quote left open?") from None

    width = max((_width(cells) for _, cells in rows), default=0)
    return [(number, cells[:width]) for number, cells in rows]


def read_lines(path):
    """Return the lines of a UTF-8 file, with or without BOM, any line ends. Raises InputError."""
    content = bytearray()
    try:
        # Read in pieces, so that --labels video.mp4 fails at once instead of filling the memory.
        with open(path, "rb") as file:
            while part := file.read(LONGEST_LINE):
                for start, kind in FOREIGN.items():
                    if (content or part).startswith(start):
                        raise InputError(f"{path} is {kind}: {READABLE}")
                if len(part) == LONGEST_LINE and not re.search(rb"[\r\n]", part):
                    raise InputError(f"{path} has a line of over {LONGEST_LINE} bytes: it is not a "
                                     "label file")
                content += part
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None

    if b"\0" in content:
        raise InputError(f"{path} has zero bytes, as UTF-16 and binary files do: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8: save it "
                         "as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")


def _read_names(path):
    return [line.strip() for line in read_lines(path) if line.strip()]


def _find_delimiter(path, line):
    """Choose the delimiter of a file by its suffix and its first line."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    # The commonest delimiter wins, and in .txt files a blank if it is commoner still.
    delimiter = max(",;\t", key=line.count)
    blanks = len(re.findall(" +", line.strip()))
    if path.suffix.lower() != ".csv" and (blanks > line.count(delimiter) or delimiter not in line):
        return " "
    if line and delimiter not in line:
        raise NoLabels(f"{path}:1: no label column: separate cells by comma, semicolon or tab")
    return delimiter


# --------------------------------------------------------------------------------------------------
# Rows and titles: after this section a label file is {title: cells}


def _skip_count(file):
    """Drop a first line that only tells the number of rows, as CelebA has."""
    rows = file.rows
    if len(rows) > 2 and rows[0][1] in ([str(len(rows) - 1)], [str(len(rows) - 2)]):
        file.notes.append(f"line {rows[0][0]} tells the number of rows")
        file.rows = rows[1:]


def _add_image_list(file):
    """Put the names in --image-list before the cells of the rows."""
    if not file.data.how.image_list:
        return
    image_list = _given_file(file.data.how.image_list, file.path.parent)
    names = _read_names(image_list)
    if len(names) != len(file.rows):
        raise InputError(f"{image_list} names {len(names)} images, but {file.path} has "
                         f"{len(file.rows)} rows")
    file.notes.append(f"images: named by {image_list}")
    file.rows = [(number, [name, *cells]) for name, (number, cells) in zip(names, file.rows)]


def _regularize_rows(file):
    """Turn rows of names without a header into the columns image, labels and, if given, split.

    TRAIN,a.jpg,rust,crack and TEST,b.jpg,rust, as cloud labelling services write them, become
    image,labels,split / a.jpg,["rust", "crack"],train / b.jpg,["rust"],test.
    """
    words = {**PART_WORDS, "unassigned": ""}
    has_part = all(len(cells) > 1 and cells[0].lower() in words for _, cells in file.rows)
    start = int(has_part)
    names_image = file.data.images.names_image
    if file.delimiter == " " or not all(names_image(cells[start]) for _, cells in file.rows[:50]):
        return

    # Rows of 1, 0 and NA are a table. They are only counted, as a copy of a million rows would take
    # much memory.
    count = labels = 0
    for _, cells in file.rows:
        names = [cell for cell in cells[start + 1 :] if cell]
        count += len(names)
        labels += sum(file.values[name] is not None for name in names)
    if 2 * labels > count:
        return

    # Others hold names for certain if they start with a part, if they are ragged, or if a name is
    # in two columns.
    lists = [[cell for cell in cells[start + 1 :] if cell] for _, cells in file.rows]
    ragged = len(set(map(len, lists))) > 1
    repeated = len(set(chain(*lists))) < sum(map(len, map(set, zip(*lists))))
    if not (has_part or ragged or repeated):
        return

    regular = [(file.rows[0][0], ["image", "labels", *(["split"] if has_part else [])])]
    for (number, cells), names in zip(file.rows, lists):
        part = [words[cells[0].lower()]] if has_part else []
        regular.append((number, [cells[start], json.dumps(names), *part]))
    file.rows = regular
    file.notes.append("no header: " + ("the split, then " if has_part else "")
                      + "the image, then the names of its labels")


def _split_header(file):
    """Remove the header and return its titles; make some up if the first row names an image."""
    values, delimiter = file.values, file.delimiter
    number, cells = file.rows[0]
    place = f"{file.path}:{number}"
    if len(cells) < 2:
        raise NoLabels(f"{place}: no label column: after the image, write 0, 1 or NA for each class")
    trailing = takewhile(lambda cell: values[cell] is not None, reversed(cells))
    labels = len(list(trailing))

    # Between blanks, `my photo.jpg 1 0` has four cells but only three columns.
    name = cells[0]
    width = len(cells) - 1
    if delimiter == " " and not _image_suffix(name)[1] and 0 < labels < width:
        name = " ".join(cells[: len(cells) - labels])
        width = labels
    image = next((cell for cell in cells if _image_suffix(cell)[1]), None)
    if image and not _image_suffix(name)[1]:
        raise InputError(f"{place}: the first line names an image, {image}, but not first: add a "
                         "line of titles above it, such as split,image,a,b")

    # A first row is data if it starts with an image, or if labels repeat in it, as titles never do.
    titled = name.lower() in ID_TITLES and len(file.rows) > 1 and _image_suffix(file.rows[1][1][0])[1]
    repeats = 0 < labels < len(cells) and len(set(cells[1:])) < len(cells) - 1
    if (file.data.images.names_image(name) or repeats) and not titled:
        file.notes.append(f"no header: first the image, then classes called Attr1 to Attr{width}")
        return ["image", *(f"Attr{i + 1}" for i in range(width))]

    if labels == len(cells):
        raise InputError(f"{place}: labels without an image: name the images with --image-list")
    if len(file.rows) == 1:
        raise InputError(f"{file.path} has a header and no rows: it needs a line per image")
    following = file.rows[1][1]
    if delimiter == " " and len(following) == len(cells) + 1 and values[following[1]] is not None:
        cells = ["", *cells]  # as in CelebA, the image column has no title
    elif labels == len(cells) - 1:
        file.notes.append(f"line {number} is the header; if {name} is an image, add its suffix")
    _refuse_repeated(place, [f"the column {title!r}" for title in cells])
    file.rows = file.rows[1:]
    return cells


def _columns(file, titles):
    """Return {title: the Cells of the column}; every row must have a cell for each title."""
    columns = [Cells() for _ in titles]
    rows = iter(watched(f"parsing {file.path.name}", file.rows))
    while some := [_fit_cells(file, number, cells, titles) for number, cells in islice(rows, 1000)]:
        for column, cells in zip(columns, zip(*some)):
            column.extend(cells)
    return dict(zip(titles, columns))


def _fit_cells(file, number, cells, titles):
    """Return the cells of a row, one for each title.

    Raises InputError if there are more or fewer.
    """
    # Between blanks, the cells that are too many may belong to a file name: my photo.jpg
    extra = len(cells) - len(titles)
    if file.delimiter == " " and extra > 0 and file.values[cells[extra]] is None:
        cells = [" ".join(cells[: extra + 1]), *cells[extra + 1 :]]

    if len(cells) != len(titles):
        more = "" if file.delimiter == " " or extra < 0 else (
            f": put a cell that contains {DELIMITER_NAMES[file.delimiter]} in quotes, or separate "
            "its names by ;")
        raise InputError(f"{file.path}:{number}: {len(cells)} cells, but there are "
                         f"{len(titles)} columns{more}")
    return cells


def _first_repeated(names):
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _refuse_repeated(place, names):
    repeated = _first_repeated(names)
    if repeated is not None:
        raise InputError(f"{place}: {repeated} is there twice: rename one")


# --------------------------------------------------------------------------------------------------
# Which column is what: first images, objects and the split, then the labels


# Titles of columns that name images. They win over columns whose cells look like files.
ID_TITLES = ("id", "image_id", "imageid", "image", "images", "image_name", "image name", "image index",
             "filename", "file_name", "file name", "file", "path", "filepath", "file_path",
             "image_path", "img", "name", "fname")

# Titles over names of labels. Where there is one of the first kind, no other columns hold labels.
LIST_TITLE = re.compile(r"label|tag|class|categor|finding|choice|attribute", re.IGNORECASE)
SUBJECT_TITLE = re.compile(r"genre|target|defect|component|disease|diagnos|object|species",
                           re.IGNORECASE)

# Titles of columns that hold no labels even where their cells are 0 and 1: an index, ids, people.
OTHER_TITLE = re.compile(r"|Unnamed: [\d.]+|__index_level_\d+__|(.*[_ .-])?(id|uuid|guid|annotators?|"
                         r"labell?ers?|raters?|reviewers?|inspectors?|\w+ed[_ ](by|at))", re.IGNORECASE)

# Titles that are unlikely for a class, but possible: such a class brings a warning.
UNLIKELY_TITLE = re.compile(r"(.*[_ .-])?(fold|split|set|subset|partition|date|time|timestamp|idx|index|"
                            r"operator|author|user|username|worker|source|url)", re.IGNORECASE)

# Titles of columns whose words are not names of labels.
TEXT_TITLES = {"caption", "text", "description", "comment", "comments", "remarks", "note", "notes",
               "confidence"}

# Titles of a number beside a label name: 1 if the label is present, 0 if it is absent.
VALUE_TITLES = {"confidence", "value", "present", "is_present", "presence", "exists", "score",
                "probability", "prob"}


def _find_image_column(file):
    """Return the title of the column that names the images.

    Titles such as filename win; then the column with most names of files that exist, then of files,
    then the one with most stems, since 1, 2, 3 may be stems of other images by chance. A column of
    0 and 1 names no images unless its title says so, even if there is a file 0.jpg. Raises
    InputError if two columns are equally good and name different images.
    """
    images = file.data.images
    hits = {}
    for title, cells in file.cells.items():
        some = cells[:50]  # enough to recognise a column; the folder is searched for each
        titled = title.lower() in ID_TITLES
        names = [cell for cell in some if _image_suffix(cell)[1] or cell in images.names]
        exist = [name for name in names if name in images.names or images.ends(_plain_path(name).lstrip("/"))]
        labels = not titled and all(file.values[cell] is not None for cell in cells.distinct)
        stems = 0 if labels else sum(map(images.names_image, some))
        is_index = title == "" or title.startswith("Unnamed: ")  # as pandas writes it
        # Compared from left to right: the first item that differs decides.
        hits[title] = (stems > 0 and titled, len(exist), len(names), stems, titled, not is_index)
    best = max(hits, key=hits.get)

    for other, found in hits.items():
        differ = any(_plain_path(a).rpartition("/")[2] != _plain_path(b).rpartition("/")[2]
                     for a, b in zip(file.cells[best][:50], file.cells[other][:50]))
        if found[3] and found[:4] == hits[best][:4] and differ:
            raise InputError(f"{file.path}: the columns {best} and {other} both name images: say "
                             f"whose labels these are, --image-column {shlex.quote(best)} or "
                             f"--image-column {shlex.quote(other)}")
    return best


def _add_folders(file):
    """Prefix the image names with a column of folders, if that is where the images are."""
    table, images = file.table, file.data.images
    some = table.ids[:50]
    if any("/" in name or "\\" in name for name in some):
        return

    # Most columns are ruled out quickly, as none of their cells is the name of a folder.
    for title, cells in file.cells.items():
        if not any(cell.rpartition("/")[2] in images.folders for cell in set(cells[:50]) - {""}):
            continue
        # A column such as site counts as folders if most images are found in them.
        inside = 0
        for cell, name in zip(cells, some):
            folders = [f"/{found}".rpartition("/")[0] for found in images.ends(f"{cell}/{name}")]
            inside += any(found.endswith(f"/{cell}") for found in folders)
        if 2 * inside > len(some):
            table.ids = [f"{cell}/{name}" if cell else name for cell, name in zip(cells, table.ids)]
            table.notes.append(f"images: in the folders that the column {title} names")
            return


def _read_objects(file, title):
    """Move the column of --group into table.objects; an image without one is an object of its own."""
    cells = file.take(title, "--group")
    objects = ["" if cell.lower() in UNKNOWN_WORDS else cell for cell in cells]
    # pandas writes 12 as 12.0 if other cells of the column are blank.
    file.table.objects = [re.sub(r"^(\d+)\.0+$", r"\1", name) for name in objects]
    lacking = objects.count("")
    if lacking:
        file.notes.append(f"objects: {lacking} rows have no {title}, so each is an object of its own")


def _read_parts(file):
    """Move the column with train, val or test, if there is one, into table.parts."""
    title = file.data.how.split_column
    if title in (None, "folder"):
        found = [name for name in file.cells if _is_split(name, file)]
        if len(found) > 1:
            raise InputError(f"{file.path}: both {found[0]} and {found[1]} may be the split: say "
                             "which with --split-column, and leave out the other with --ignore")
        title = next(iter(found), None)
    if title is None:
        return

    # Under is_valid, false means train. Under is_train and is_test it may mean two parts: left open.
    cells = file.take(title, "--split-column")
    true = PART_WORDS.get(title.lower().removeprefix("is_"))
    flags = {1: true, 0: "train" if true == "val" else ""} if true else {}
    parts = file.table.parts = []
    for origin, cell in zip(file.table.origins, cells):
        if flags and file.values[cell] in (0, 1):
            parts.append(flags[file.values[cell]])
        elif cell.lower() not in PART_WORDS and cell.lower() not in UNKNOWN_WORDS:
            raise InputError(f"{origin}: {cell!r} in the column {title} is not train, val or test")
        else:
            parts.append(PART_WORDS.get(cell.lower(), ""))
    meaning = ""
    if flags:
        meaning = f", where true means {flags[1]} and false {flags[0] or 'not yet divided'}"
    file.notes.append(f"split: from the column {title}{meaning}")


def _is_split(title, file):
    """Return True for a column of train, val and test, or of true and false below is_valid."""
    distinct = {cell.lower() for cell in file.cells[title].distinct} - UNKNOWN_WORDS
    parts = {PART_WORDS.get(word) for word in distinct}
    if title.lower() == "split":
        return bool(parts - {None})  # any other word is reported as an error later
    if title.lower().startswith("is_") and title.lower().removeprefix("is_") in PART_WORDS:
        return bool(distinct) and {file.values[cell] for cell in distinct} <= {0, 1}
    return None not in parts and "train" in parts and len(parts) > 1


def _choose_kind(file, images_known):
    """Decide how a file holds its labels: as a "table", as "lists" or as "vectors".

    A table has a column of 1, 0 and NA per class:        image,rust,crack / a.jpg,1,0
    Lists have names of labels, several in a cell:        image,labels     / a.jpg,rust;crack
    Vectors have all 1, 0 and NA of an image in a cell:   image,labels     / a.jpg,"[1, 0]"

    images_known: True if the image column is certain. Raises InputError where two kinds fit.
    """
    columns = file.columns
    flags = [column for column in columns if column.holds_flags() and not column.is_other]
    vectors = [column for column in columns if column.vectors and not column.is_other]
    listed = [column for column in columns if column.holds_list() and column not in vectors]
    if flags or listed:  # beside labels, digits such as 010 are the number of a room
        vectors = [column for column in vectors if not all(map(str.isdecimal, column.vectors))]

    # First what the user says, by label_groups.json or an option, and vectors, which stand out.
    if any(column.title in file.data.groups and column.words for column in columns):
        return "lists"
    if vectors:
        others = vectors[1:] + flags + listed
        if others:
            raise _ambiguous(file, "0 and 1 for each class in one cell", vectors[0], others[0])
        return "vectors"
    if file.data.how.separator is not None:
        return "lists"

    # Names beside 1 and 0: both may say the same, or the number may be the value of the name.
    if listed:
        # A column such as fold may hold 0 and 1, but hardly labels.
        flags = [column for column in flags if not UNLIKELY_TITLE.fullmatch(column.title)]
        if flags and _say_the_same(listed, flags):
            return "table"
        if len(flags) > 1 or (flags and flags[0].title.lower() not in VALUE_TITLES):
            raise _ambiguous(file, "names", listed[0], flags[0])
        return "lists"

    # Nothing certain: numbers are taken for a table, which then reports what is wrong with them.
    if flags or any(column.is_soft() or column.holds_mistakes() for column in columns):
        return "table"
    return "lists" if images_known and any(column.holds_names() for column in columns) else "table"


def _ambiguous(file, what, column, other):
    return InputError(f"{file.path}: the column {column.title} holds {what}, and the column "
                      f"{other.title} may hold labels too: leave one out, --ignore "
                      f"{shlex.quote(other.title)} or --ignore {shlex.quote(column.title)}")


def _say_the_same(listed, flags):
    """Return True if columns of names repeat columns of 1 and 0; a word such as none is all 0."""
    # Row by row, a name must be listed exactly where its column has a 1.
    titles = {column.title.casefold() for column in flags}
    same = False
    for column in listed:
        for row, cell in enumerate(column.cells):
            names = {name.casefold() for name in _words_of(cell)}
            if not names <= titles and titles & {*cell.casefold().split()}:
                names = {*cell.casefold().split()}
            values = {flag.title.casefold(): flag.labels[flag.cells[row]] for flag in flags}

            if any((name in names) != value for name, value in values.items() if value in (0, 1)):
                return False
            if names - titles and 1 in values.values():
                return False
            same = same or bool(names & titles)
    return same


class Cells(Sequence):
    """Hold the cells of a column as small numbers, since few of a million labels are distinct."""

    def __init__(self, cells=()):
        self._code_of = defaultdict()  # {distinct cell: its number}
        self._code_of.default_factory = self._code_of.__len__  # a new cell gets the next number
        self._parts = [np.empty(0, np.uint8)]
        self.extend(cells)

    def extend(self, cells):
        """Append a list of cells, which is only possible before `codes` is used."""
        codes = np.fromiter(map(self._code_of.__getitem__, cells), np.uint32, len(cells))
        self._parts.append(codes.astype(np.min_scalar_type(len(self._code_of))))

    @cached_property
    def distinct(self):
        """Return the distinct cells, in the order in which they appear."""
        return list(self._code_of)

    @cached_property
    def codes(self):
        """Return the index of each cell in `distinct`, integers (N,)."""
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    @cached_property
    def counts(self):
        """Return {cell: how often the column has it}."""
        return dict(zip(self.distinct, np.bincount(self.codes).tolist()))

    def lookup(self, values):
        """Return the number that `values` has for each cell, float32 (N,)."""
        return np.array([values[cell] for cell in self.distinct], np.float32)[self.codes]

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self.distinct[code] for code in self.codes[place]]
        return self.distinct[self.codes[place]]

    def __iter__(self):
        return map(self.distinct.__getitem__, self.codes.tolist())


class Column:
    """Hold a column and what its cells can be read as; decisions about labels are based on this."""

    def __init__(self, title, cells, values):
        self.title = title
        self.cells = cells  # Cells
        self.distinct = set(cells.distinct)
        self.labels = _label_meanings(self.distinct, values)  # {cell: 1.0, 0.0, NaN, or None for no label}
        numbers = {cell: values.number(cell) for cell in self.distinct}
        self.numbers = set(numbers.values())

        # Cells that are no labels are numbers, dates or words; words can be names of labels.
        odd = [cell for cell in self.distinct if self.labels[cell] is None]
        self.odd_numbers = [numbers[cell] for cell in odd]
        self.words = {cell for cell in odd if numbers[cell] is None and not DATE.match(cell)}
        self.is_other = bool(OTHER_TITLE.fullmatch(title)) and not (self.words and LIST_TITLE.search(title))
        self.vectors = _read_vector_cells(self.distinct, values) if odd else {}

    @cached_property
    def counts(self):
        """Return how many cells are a known label, and how many are no label."""
        counts = self.cells.counts
        known = sum(count for cell, count in counts.items() if self.labels[cell] in (0, 1))
        return known, sum(count for cell, count in counts.items() if self.labels[cell] is None)

    def holds_flags(self):
        """Return True if the cells are 1, 0 and NA, and not all of them NA."""
        meanings = self.labels.values()
        return None not in meanings and not all(math.isnan(value) for value in meanings)

    def is_soft(self):
        """Return True if there are no words, and some cells are labels or numbers from 0 to 1."""
        known = any(value in (0, 1) for value in self.labels.values())
        return not self.words and not self.is_other and (known or any(
            number is not None and 0 <= number <= 1 for number in self.numbers))

    def holds_mistakes(self):
        """Return True if most cells are labels, but some are not."""
        return not self.is_other and None in self.labels.values() and self.counts[0] >= self.counts[1]

    def holds_names(self):
        """Return True if the cells may be label names: words that are repeated, or only blanks."""
        # Free text hardly repeats. Up to 20 rows, names may be all different too.
        repeated = len(self.cells) <= 20 or len(self.distinct) < 0.9 * len(self.cells)
        if self.is_other or self.title.lower() in TEXT_TITLES or UNLIKELY_TITLE.fullmatch(self.title):
            return False
        meanings = self.labels.values()
        blank = all(value is not None and math.isnan(value) for value in meanings)
        return repeated and (bool(self.words) or blank)

    def holds_list(self):
        """Return True if the cells are surely lists, by their title or by ; or | in names."""
        several = self.holds_names() and any(";" in word or "|" in word for word in self.words)
        titled = LIST_TITLE.search(self.title) or SUBJECT_TITLE.search(self.title)
        if self.is_other or not (several or titled):
            return False

        # Numbers under such a title may be class numbers, but not if they are fractions, or only 0 and 1.
        known, other = self.counts
        numbers = [number for number in self.odd_numbers if number is not None]
        fractions = not all(map(float.is_integer, numbers))
        if not self.words and (len(self.distinct) < 3 or fractions):
            return False
        return other > known or any(re.fullmatch(r"\d+([\s;|,]+\d+)+", cell) for cell in self.words)


# --------------------------------------------------------------------------------------------------
# Cells: 1, 0, NA, or no label


NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
DATE = re.compile(r"\d+[-./]\d+[-./]\d")
UNKNOWN_WORDS = {"", "na", "n/a", "#n/a", "<na>", "n.a.", "nan", "none", "null", "nil", "?", "-", "--",
                 "unknown"}
MARKS = {"x", "✓", "✔", "√", "☑", "✅", "•"}  # present, where absent cells are blank

# Words for present and absent. Only those of one set may be in a column: x and y are names.
PAIRS = ({"1", "0", "true", "false", "yes", "no"},
         {"t", "f"}, {"y", "n"}, {"positive", "negative"}, {"pos", "neg"}, {"present", "absent"}, {"+", "-"},
         {"on", "off"}, {"✓", "✗"}, {"✔", "✘"}, {"☑", "☐"}, {"✅", "❌"}, MARKS)
PRESENT_WORDS = {"true", "yes", "t", "y", "positive", "pos", "present", "+", "on", *MARKS}
LABEL_WORDS = (dict.fromkeys(set().union(*PAIRS), 0.0) | dict.fromkeys(PRESENT_WORDS, 1.0)
               | dict.fromkeys(UNKNOWN_WORDS, math.nan))


class LabelValues(dict):
    """Map each cell of a file to 1.0, 0.0, NaN, or None for no label; computed when first needed."""

    def __init__(self, how, decimal_comma=False):
        self.how = how
        self.decimal_comma = decimal_comma
        self.said = []  # [(word, its number or None, the meaning that an option gives it), ...]
        for words, value in ((how.positive, 1.0), (how.negative, 0.0), (how.unknown, math.nan)):
            self.said += [(word, self.number(word), value) for word in words]
        word = _first_repeated(word for word, *_ in self.said)
        if word is not None:
            raise InputError(f"{word!r} is given twice for --positive, --negative and --unknown")

    def __missing__(self, cell):
        self[cell] = self._value(cell)
        return self[cell]

    def _value(self, cell):
        # What the user says goes first, then the usual meaning of numbers, then that of words.
        number = self.number(cell)
        said = self.meaning_said(cell)
        if said is not None:
            return said
        if number == -1:
            return math.nan
        if self.how.label_threshold is not None and number is not None and 0 <= number <= 1:
            return float(number >= self.how.label_threshold)
        return number if number in (0, 1) else LABEL_WORDS.get(cell.lower())

    def meaning_said(self, cell):
        """Return the meaning that --positive, --negative or --unknown gives a cell, or None."""
        number = self.number(cell)
        for word, word_number, value in self.said:
            if cell.lower() == word or (number is not None and number == word_number):
                return value
        return None

    def number(self, cell):
        """Return the cell as a float, or None."""
        if self.decimal_comma:
            cell = cell.replace(",", ".")
        return float(cell) if NUMBER.fullmatch(cell) else None


def _label_meanings(distinct, values):
    """Return {cell: 1.0, 0.0, NaN, or None} of a column, whose words must be of one set in PAIRS."""
    meanings = {cell: values[cell] for cell in distinct}
    words = {cell.lower() for cell, value in meanings.items()
             if value in (0, 1) and values.number(cell) is None and values.meaning_said(cell) is None}
    if not any(words <= pair for pair in PAIRS):
        meanings |= {cell: None for cell in distinct if cell.lower() in words}
    return meanings


# --------------------------------------------------------------------------------------------------
# Format "table": a column of 1, 0 and NA per class


def _read_table(file, columns):
    """Set classes and targets from columns of 1, 0 and NA, and return these columns."""
    table = file.table
    chosen = [column for column in columns if not column.is_other and _holds_labels(file, column)]
    table.classes = [column.title for column in chosen]
    if not chosen:
        titles = ", ".join(column.title for column in columns)
        raise NoLabels(f"{file.path}: no labels (0, 1 or NA) in {titles or 'any column'}; for "
                       "lists of names give --image-column; for other words for present and "
                       "absent --positive and --negative")

    _check_signs(file, chosen)
    table.notes.append(f"labels: a table with {len(chosen)} columns of 1, 0 and NA")
    _read_absent(file, chosen)
    for column in chosen:
        if len(chosen) > 1 and UNLIKELY_TITLE.fullmatch(column.title):
            table.warnings.append(f"the column {column.title} is read as a class; if it is not "
                                  f"one, leave it out with --ignore {shlex.quote(column.title)}")

    table.targets = np.empty((len(table), len(chosen)), np.float32)
    for c, column in enumerate(chosen):
        table.targets[:, c] = column.cells.lookup(column.labels)
    return chosen


def _holds_labels(file, column):
    """Return True if all cells are labels, False if few are. Raises InputError in between."""
    if None not in column.labels.values():
        return True
    if all(number is not None and 0 < number < 1 for number in column.odd_numbers):
        raise InputError(f"{file.path}: {column.title} holds numbers from 0 to 1: give "
                         "--label-threshold T, or --ignore it")
    known, other = column.counts
    if known < other or UNLIKELY_TITLE.fullmatch(column.title):
        return False
    row = next(row for row, cell in enumerate(column.cells) if column.labels[cell] is None)
    raise InputError(f"{file.table.origins[row]}: {column.cells[row]!r} in the column "
                     f"{column.title} is not 0, 1 or NA: correct it, say what it means with "
                     "--positive, --negative or --unknown, or leave the column out with --ignore "
                     f"{shlex.quote(column.title)}")


def _check_signs(file, columns):
    """Raise InputError if -1 may mean absent: without a 0, or commoner than 0 and in every column."""
    values = file.values
    said = any(number == -1 for _, number, _ in values.said)
    if said or not any(-1 in column.numbers for column in columns):
        return

    # Where -1 means absent, it is in every column, and commoner than 0, which then means NA.
    minus = []
    zeros = 0
    for column in columns:
        counts = column.cells.counts
        minus.append(sum(count for cell, count in counts.items() if values.number(cell) == -1))
        zeros += sum(count for cell, count in counts.items() if values[cell] == 0)
    if sum(minus) > zeros and (zeros == 0 or min(minus)) and len(file.table) > 1:
        raise InputError(f"{file.path}: -1 can mean absent or unknown here: say which with "
                         "--negative -1 (and --unknown 0 where 0 means unknown) or with --unknown "
                         "-1")
    file.notes.append(f"labels: -1 was read as NA, {sum(minus)} times")


def _read_absent(file, columns):
    """Let "-" beside "+" mean absent, and a blank cell beside marks such as x, in all columns."""
    absent = set(file.data.first.absent) if file.data.first else set()
    meanings = chain(*(column.labels.items() for column in columns))
    words = {cell.lower() for cell, value in meanings if value in (0, 1)}
    if "+" in words:
        absent.add("-")
    if words and words <= MARKS:
        absent.add("")
    for cell in sorted(absent):
        if file.values.meaning_said(cell) is None and any(cell in column.labels for column in columns):
            file.notes.append(f"labels: {repr(cell) if cell else 'a blank cell'} means absent")
            for column in columns:
                if cell in column.labels:
                    column.labels[cell] = 0.0


# --------------------------------------------------------------------------------------------------
# Format "vectors": all 1, 0 and NA of an image in one cell, such as [0, 1, 0], "0 1 0" or 010


def _read_vectors(file, columns):
    """Set classes and targets from the column of vectors, and return that column."""
    column = next((column for column in columns if column.vectors and not column.is_other), None)
    if not column:
        raise NoLabels(f"{file.path}: no column holds vectors of 1, 0 and NA")
    width = max(map(len, column.vectors.values()))
    titles = list(file.data.class_names.values()) or [f"Attr{c + 1}" for c in range(width)]
    if len(titles) != width:
        raise InputError(f"{file.path}: the column {column.title} has {width} labels in a cell, "
                         f"but {len(titles)} classes are named: correct the file of class names")

    # The vectors, split into a column per class, are a table.
    rows = [column.vectors[cell] or ["NA"] * width for cell in column.cells]
    parts = [Column(title, Cells(cells), file.values) for title, cells in zip(titles, zip(*rows))]
    for part in parts:
        part.is_other = False  # a class may have any name
    _read_table(file, parts)
    file.notes.append(f"labels: all of an image in one cell of the column {column.title}")
    column.labels = {cell: value for part in parts for cell, value in part.labels.items()}
    return [column]


def _read_vector_cells(cells, values):
    """Return {cell: its values} if all cells are vectors of one length, else {}; a blank one is []."""
    vectors = {}
    for cell in cells:
        # np.array([0, 1]) and tensor([0, 1], dtype=torch.int8) become [0, 1].
        text = re.sub(r"^[A-Za-z_.]+(?=[\[(])|\w+=[^,)]+", "", cell)
        parts = [part.strip("'\"") for part in re.findall(r"[^\s,;|\[\](){}]+", text)]
        if re.fullmatch("[01]{2,}", cell):
            parts = list(cell)
        # Where the comma is the decimal point, 0,1 is a tenth.
        decimal = values.decimal_comma and values.number(cell) is not None and "," in cell
        if decimal or any(values[part] is None for part in parts):
            return {}
        vectors[cell] = parts if cell.lower() not in UNKNOWN_WORDS else []

    # Digits without blanks are vectors only if one starts with 0, as in 010; 10 may be a number.
    lengths = {len(parts) for parts in vectors.values() if parts}
    digits = all(cell.isdecimal() for cell, parts in vectors.items() if parts)
    if len(lengths) != 1 or lengths == {1} or (digits and not any(cell.startswith("0") for cell in cells)):
        return {}
    return vectors


# --------------------------------------------------------------------------------------------------
# Format "lists": names of labels, several in a cell


def _read_lists(file, columns):
    """Set classes, targets and groups from columns of names, and return these columns."""
    table = file.table
    chosen = _list_columns(file, columns)
    titles = [column.title for column in chosen]
    cells = set().union(*(column.distinct for column in chosen))
    separator = file.data.how.separator or _find_separator(file.path, cells)
    names, dropped = _split_cells(cells, separator, titles)
    own = {column.title: _in_order(set(chain(*map(names.get, column.distinct)))) for column in chosen}
    _check_names(file, own, chosen)

    # Class numbers get their names; so a class that no row names is known too.
    every = set(chain(*own.values()))
    class_names = file.data.class_names if all(map(str.isdecimal, every)) else {}
    renamed = {name: class_names.get(_class_number(name)) for name in every}
    if all(renamed.values()):
        names = {cell: [renamed[name] for name in found] for cell, found in names.items()}
        own = {title: [renamed[name] for name in found] for title, found in own.items()}
        table.notes.append("labels: class numbers were replaced by the names in the class file")
        table.classes = list(class_names.values())
    table.classes = list(dict.fromkeys(chain(table.classes, *own.values(), *file.data.groups.values())))
    table.groups = own if len(own) > 1 else {}

    table.notes.append(f"labels: lists of names in {', '.join(titles)}, "
                       + (f"separated by {separator!r}" if separator else "one in a cell"))
    if dropped:
        table.notes.append(f"labels: no label is meant by {', '.join(sorted(dropped))}")
    _set_listed_targets(file, chosen, names, [column for column in columns if column not in chosen])
    return chosen


def _set_listed_targets(file, chosen, names, others):
    """Set the targets: 1 for the names in a row and 0 for other classes, unless a column has values.

    With a column such as confidence, rust,0 means that rust is absent; classes not named are NA.
    """
    table = file.table
    stated = [1.0] * len(table)
    table.absent = 0.0
    column = next((column for column in others if column.title.lower() in VALUE_TITLES
                   and all(number is not None and 0 <= number <= 1 for number in column.odd_numbers)), None)
    if column:
        stated = [file.values[cell] for cell in column.cells]
        table.absent = math.nan
        table.notes.append(f"labels: {column.title.lower()} 0 means absent, and a label that is "
                           "not listed is unknown")

    table.targets = np.full((len(table), len(table.classes)), table.absent, np.float32)
    index = {name: c for c, name in enumerate(table.classes)}
    for row, value in enumerate(stated):
        if value is None:
            raise InputError(f"{table.origins[row]}: {column.cells[row]} is not 0 or 1: give "
                             "--label-threshold T")
        for listed in chosen:
            for name in names[listed.cells[row]]:
                table.targets[row, index[name]] = value


def _list_columns(file, columns):
    """Return the columns of names: by the groups, by the first file, or by what they look like."""
    groups, first = file.data.groups, file.data.first
    if groups:
        chosen = [column for column in columns
                  if column.title in groups or column.title.lower() == "labels"]
        lacking = f"no column is named labels, or like one of the groups {', '.join(groups)}"
    elif first:
        chosen = [column for column in columns if column.title in first.titles]
        lacking = f"no column is named {' or '.join(first.titles)}"
    else:
        names = [column for column in columns if column.holds_names() or column.holds_list()]
        chosen = [column for column in names if LIST_TITLE.search(column.title)] or names
        titles = ", ".join(column.title for column in columns)
        lacking = f"no column holds names of labels: it has {titles}"

    if not chosen:
        raise NoLabels(f"{file.path}: {lacking}")
    return chosen


def _find_separator(path, cells):
    """Return the separator of the names in a cell, the first of ; | , that occurs, or None.

    Raises InputError if something else may be one, as in `crack dent` or `rust/dent` beside `dent`.
    """
    plain = {cell for cell in cells if _names_in(cell) is None}
    for separator in (";", "|", ",", "\n"):
        if any(separator in cell for cell in plain):
            return separator

    seen = Counter(word for cell in plain for word in set(cell.split()))
    # Long cells come first, as they make the clearest examples in the message.
    for cell in sorted(plain, key=lambda cell: (-len(cell.split()), cell)):
        words = cell.split()
        parts = re.split(r"\s*[/&+:]\s*", cell)
        mark = None
        if len(words) > 1 and any(seen[word] > 1 for word in words):
            mark = " "
        elif len(parts) > 1 and any(part in plain for part in parts):
            mark = re.search(r"[/&+:]", cell)[0]
        if mark:
            raise InputError(f'{path}: {cell!r} can be one label or several: say --separator '
                             f'"{mark}" or --separator ";"')
    return None


def _split_cells(cells, separator, titles):
    """Split cells into names. Returns ({cell: its names}, the words that mean no label, like NA)."""
    placeholders = set(UNKNOWN_WORDS - {"unknown", "nil"})
    for title in titles:  # inspectors write "defect" under the title defects if there is none
        stem = title.lower().removesuffix("s")
        placeholders |= {stem, stem + "s"}

    names = {}
    dropped = set()
    for cell in cells:
        parts = _names_in(cell)
        if parts is None:
            parts = cell.strip("[]").split(separator) if separator else [cell]
        parts = [part.strip(" '\"") for part in parts]
        names[cell] = [part for part in parts if part.lower() not in placeholders]
        dropped.update(part or "an empty cell" for part in parts if part.lower() in placeholders)
    return names, dropped


def _names_in(cell):
    """Return the names in a cell of JSON or Python, such as {"choices": ["rust"]}, or None."""
    if cell[-1:] not in ("]", "}", ")"):
        return None
    text = cell
    if "([" in cell:  # array(['rust', 'crack'], dtype=object) becomes ['rust', 'crack']
        text = re.sub(r"^[A-Za-z_.]*\((?=\[)|(, dtype=\w+)?(?<!\()\)$", "", cell)
    # numpy writes ['rust' 'crack'] without a comma.
    text = re.sub(r"""(['"])\s+(?=['"])""", r"\1, ", text)
    if text[:1] not in ("[", "{", "("):
        return None
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return _strings_in(parse(text))
    return None


NAME_KEY = re.compile(r".*(label|choice|taxonomy|tag|class|categor(y|ie)|name)s?", re.IGNORECASE)


def _strings_in(value):
    """Return the strings and whole numbers in a list, and in objects under keys such as labels."""
    if isinstance(value, dict):
        value = [item for key, item in value.items()
                 if NAME_KEY.fullmatch(str(key)) and type(item) is not int]
    if isinstance(value, (list, set, tuple)):
        return list(chain(*map(_strings_in, value)))
    return [value] if isinstance(value, str) else [str(value)] if type(value) is int else []


def _words_of(cell):
    """Return the names that a cell seems to hold, whatever separates them."""
    names = _names_in(cell)
    return set(names if names is not None else filter(None, map(str.strip, re.split("[;|,]", cell))))


def _check_names(file, own, columns):
    """Raise InputError if {title: names} has values instead of names, or a name in two columns."""
    path, groups = file.path, file.data.groups
    repeated = _first_repeated(chain(*own.values()))
    if repeated is not None and not groups:
        both = " and ".join(title for title, names in own.items() if repeated in names)
        raise InputError(f"{path}: {repeated} is in the columns {both}: rename it in one of them, "
                         "or --label-groups; if these are words for present and absent, say so "
                         "with --positive and --negative")

    every = set(chain(*own.values()))
    if not every:
        raise NoLabels(f"{path} names no labels in {', '.join(own)}")
    values = all(file.values[name] is not None for name in every)
    if values and every & {"0", "1", "true", "false"} and not file.data.class_names:
        raise InputError(f"{path}: the names in {', '.join(own)} are "
                         f"{' and '.join(sorted(every)[:3])}, which look like values: give every "
                         "cell a value for each class, or name the classes in classes.txt")

    # Several columns of two words each, such as ja and nein, are a table in a foreign language.
    counts = {len(own[column.title]) for column in columns}
    plain = all(not column.holds_list() and column.words <= set(own[column.title])
                for column in columns)
    asked = not groups and file.data.how.separator is None
    if asked and plain and len(columns) > 1 and counts in ({2}, {1, 2}):
        words = ", ".join(chain(*own.values()))
        raise InputError(f"{path}: the columns {', '.join(own)} hold two words each ({words}): say "
                         "what they mean with --positive, --negative and --unknown, or that they are "
                         'names with --separator ";"')


def _in_order(names):
    """Return names in alphabetical order, or class numbers by size."""
    if not all(map(str.isdecimal, names)):
        return sorted(names)
    return sorted(names, key=lambda name: (len(_class_number(name)), _class_number(name), name))


def _class_number(name):
    """Return a class number without zeros before it; as text, since int() takes 4,300 digits at most."""
    return name.lstrip("0") or "0"


# --------------------------------------------------------------------------------------------------
# Format "cls": a file LABELS/**/NAME.cls for each image, with a class index per line


def _read_cls(files, data_dir):
    """Read .cls files into a LabelTable without paths."""
    names = _read_class_names(data_dir) or dict(zip(map(str, range(len(COCO_CLASSES))), COCO_CLASSES))

    # An index that is not listed is absent, so an empty file is an image without any label.
    targets = np.zeros((len(files), len(names)), np.float32)
    indices = {number: c for c, number in enumerate(names)}
    for row, file in enumerate(watched("reading .cls files", files)):
        for number, line in enumerate(read_lines(file), 1):
            index = line.strip()
            if index and index not in indices:
                raise InputError(f"{file}:{number}: {index!r} is not a class index, "
                                 f"{next(iter(indices))} to {[*indices][-1]}")
            if index:
                targets[row, indices[index]] = 1

    source = _class_file(data_dir) or "the 80 of COCO"
    notes = [f"{_counted(files, '.cls file')} of class indices", f"class names: {source}"]
    table = _file_per_image(files, data_dir, targets, [*names.values()], notes)
    table.sources += filter(None, [_class_file(data_dir)])
    return table


def _file_per_image(files, data_dir, targets, classes, notes):
    """Return the LabelTable of files that have the stems of their images.

    The IDs are the paths of the files without suffix, and without the folder that says labels.
    """
    place = Path(os.path.commonpath({file.parent for file in files}))
    notes[0] = f"{place}: {notes[0]}"
    base = data_dir if data_dir in (place, *place.parents) else place
    ids = []
    for file in files:
        *folders, name = file.relative_to(base).with_suffix("").parts
        ids.append("/".join([*_replace_label_folder(folders), name]))
    return LabelTable(ids, [], targets, classes, origins=[*map(str, files)], notes=notes, absent=0.0)


def _counted(things, noun):
    """Return how many things there are, such as "1 file" or "2 files"."""
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _replace_label_folder(folders, *new):
    """Return the folders of a label file with the last one of LABEL_FOLDERS replaced or taken out."""
    for at in reversed(range(len(folders))):
        if folders[at].lower() in LABEL_FOLDERS:
            return [*folders[:at], *new, *folders[at + 1 :]]
    return [*folders]


# --------------------------------------------------------------------------------------------------
# Format "YOLO": a file LABELS/**/NAME.txt for each image, with a class number and a box per line


def _read_yolo(files, data_dir):
    """Read YOLO files into a LabelTable without paths. A class is present if it has a box."""
    names, sources = _yolo_names(files, data_dir)
    targets = np.zeros((len(files), len(names)), np.float32)
    column_of = {number: column for column, number in enumerate(names)}

    for row, file in enumerate(watched("reading YOLO files", files)):
        for line_number, line in enumerate(read_lines(file), 1):
            if cells := line.split():
                number = _class_of_box(cells, f"{file}:{line_number}")
                if number not in column_of:
                    raise InputError(f"{file}:{line_number}: there is no class {number}: {sources[0]} "
                                     f"has {min(names)} to {max(names)}: correct the line, or add the "
                                     "name")
                targets[row, column_of[number]] = 1

    notes = [f"{_counted(files, 'YOLO file')} of boxes", f"class names: {sources[0]}"]
    table = _file_per_image(files, data_dir, targets, [*names.values()], notes)
    table.sources += sources
    return table


def _class_of_box(cells, place):
    """Return the class number in a line of YOLO. Raises InputError.

    Four numbers are the place and size of a box; polygons, oriented boxes and key points have more.
    """
    try:
        numbers = [*map(float, cells)]
    except ValueError:
        numbers = []
    if not (numbers and all(map(math.isfinite, numbers)) and "_" not in "".join(cells)):
        raise InputError(f"{place}: a YOLO line is a class number and the numbers of a box, not "
                         f"{shortened(cells, 6)}: correct it, or move a file without labels "
                         "elsewhere")
    if len(numbers) < 5:
        raise InputError(f"{place}: too few numbers for a class and a box, which take 5: correct "
                         "the line")
    if not numbers[0].is_integer() or numbers[0] < 0:
        raise InputError(f"{place}: {cells[0]} is not a class number: correct the line")
    return int(numbers[0])


def _yolo_names(files, data_dir):
    """Return {class number: name} of YOLO files, in order, and the files that say so.

    Raises InputError if there are none, or if two of them differ.
    """
    named = {config: _read_config(config)["names"] for config in _find_configs(files, data_dir)}
    if source := _class_file(data_dir):
        named[source] = {int(number): name for number, name in _read_class_names(data_dir).items()}
    # Some programs put the names beside the label files; darknet and CVAT call them obj.names.
    for folder in _folders_of(files, data_dir):
        for name in ("classes.txt", "obj.names", "_darknet.labels"):
            path = folder / name
            if path not in named and path.is_file():
                names = _read_numbered_names(path)
                _refuse_repeated(path, names)
                named[path] = dict(enumerate(names))

    named = {path: names for path, names in named.items() if names}
    if not named:
        raise InputError(f"{data_dir} has YOLO files ({files[0]}), but no names of the classes: add "
                         "data.yaml with names: [...], or classes.txt with a name per line")
    sources = [*named]
    for source in sources[1:]:
        if named[source] != named[sources[0]]:
            raise InputError(f"{sources[0]} and {source} name different classes: remove the wrong "
                             "one, or name one folder of YOLO files with --labels")
    return named[sources[0]], sources


def _folders_of(files, data_dir):
    """Return data_dir and the folders on the way from there to some files, sorted."""
    folders = {data_dir}
    for folder in {file.parent for file in files}:
        above = [parent for parent in folder.parents if data_dir in parent.parents]
        folders.update([folder, *above])
    return sorted(folders)


# --------------------------------------------------------------------------------------------------
# data.yaml: the names and parts of YOLO data. Only simple forms of YAML are read


CONFIG_KEYS = {"names", "nc", "path"} | PART_WORDS.keys()
QUOTED = r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\""""
START = r"""[^\s,\[\]{}'"#&*!|>%@`?]"""  # of a plain text; the other marks start what is not read here
PLAIN = START + r"(?:[^:#]|:(?!\s|$)|(?<!\s)#)*"
PLAIN_IN_BRACKETS = START + r"(?:[^:#,\[\]{}]|:(?![\s,\[\]{}]|$)|(?<!\s)#)*"
YAML_TEXT = re.compile(f"{QUOTED}|{PLAIN}")
YAML_LINE = re.compile(rf"(?P<key>{QUOTED}|{PLAIN})\s*:(?:\s+(?P<value>.*))?")
YAML_TOKEN = re.compile(r"""\s*(?:(?P<mark>[\[\]{},]|:(?=[\s"']|$))|"""
                        rf"(?P<text>{QUOTED}|{PLAIN_IN_BRACKETS}))")
SIMPLE_YAML = "write names: [cat, dog], or a line - cat or 0: cat per class"


def _find_configs(files, data_dir):
    """Return the paths of data.yaml, or files like it, of DATA and of exports below it.

    Raises InputError if a folder has several.
    """
    configs = []
    for folder in _folders_of(files, data_dir):
        paths = sorted(path for suffix in ("*.yaml", "*.yml") for path in folder.glob(suffix))
        known = [folder / name for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")]
        found = [path for path in known if path in paths][:1]
        found = found or [path for path in paths if _has_names(path)]
        if len(found) > 1:
            raise InputError(f"{found[0]} and {found[1]} both have names: call the right one "
                             "data.yaml")
        configs += found
    return configs


def _has_names(path):
    """Return True if a YAML file has the key names."""
    try:
        return bool(re.search(rb"^names\s*:", path.read_bytes(), re.MULTILINE))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _read_config(path):
    """Read the keys of data.yaml that matter here.

    Returns {"names": {number: name}, "path": text, "train": [text, ...], "val": ..., "test": ...},
    without the keys that the file lacks, except for "names". Raises InputError.
    """
    config = {"names": {}}
    count = None
    for key, (number, value) in _yaml_values(path).items():
        place = f"{path}:{number}"
        if key == "names":
            config["names"] = _config_names(value, place)
        elif key == "nc":
            count = value
        elif isinstance(value, dict) or (key == "path" and isinstance(value, list)):
            raise InputError(f"{place}: {key} must be a path: correct it")
        elif key == "path":
            config["path"] = value
        elif value not in ("", "~", "null"):
            paths = value if isinstance(value, list) else [value]
            config.setdefault(PART_WORDS[key], []).extend(paths)

    if not config["names"]:
        raise InputError(f"{path} has no names of the classes: add a line names: [...]")
    if count is not None and count != str(len(config["names"])):
        raise InputError(f"{path}: nc is {count}, but there are {len(config['names'])} names: correct one")
    return config


def _config_names(value, place):
    """Return {class number: name} from the value of names. Raises InputError."""
    if isinstance(value, str):
        raise InputError(f"{place}: names must be a list: write names: [cat, dog]")
    names = value if isinstance(value, dict) else {str(number): name for number, name in enumerate(value)}
    if wrong := [number for number in names if not re.fullmatch(r"[0-9]{1,9}", number)]:
        raise InputError(f"{place}: {wrong[0]!r} is not a class number: write names as 0: cat")
    if "" in names.values():
        raise InputError(f"{place}: a name is blank: write one for each class")
    _refuse_repeated(place, [*names.values()])
    return dict(sorted((int(number), name) for number, name in names.items()))


def _yaml_values(path):
    """Return {key: (line number, value)} of CONFIG_KEYS in a YAML file; a value is text, list or dict."""
    found = {}
    block = None  # the lines of the key that is read; None for keys that do not matter
    for number, line in enumerate(read_lines(path), 1):
        entry = YAML_LINE.fullmatch(line.rstrip())
        if line[:1] in ("", " ", "\t", "-", "#", "]", "}"):  # a key starts at the left margin
            if block and not line.startswith("---"):
                block.append((number, line))
        elif entry and (key := _yaml_text(entry["key"], f"{path}:{number}").lower()) in CONFIG_KEYS:
            if key in found:
                raise InputError(f"{path}:{number}: {key} is there twice: remove one")
            block = found[key] = [(number, entry["value"] or "")]
        elif entry:
            block = None
        elif block and not line.startswith("..."):
            raise InputError(f"{path}:{number}: {line.strip()!r} is not understood: {SIMPLE_YAML}")

    return {key: (lines[0][0], _yaml_value(path, lines)) for key, lines in found.items()}


def _yaml_value(path, lines):
    """Return the value of the lines [(number, text), ...] of a key: text, a list or a dict of text."""
    lines = [(f"{path}:{number}", _without_comment(text).strip(), re.match(r"\s*", text)[0])
             for number, text in lines]
    lines = [lines[0], *(line for line in lines[1:] if line[1])]
    place, first, _ = lines[0]
    whole = " ".join(text for _, text, _ in lines).strip()
    if whole.startswith(("[", "{")):
        return _yaml_brackets(whole, place)
    if len(lines) == 1:
        return _yaml_text(first, place)

    # An entry per line, all of one kind and equally far from the margin.
    _, text, margin = lines[1]
    form = r"-\s+(?P<value>.*)" if text.startswith("-") else YAML_LINE
    values = {}
    for place, text, own_margin in lines[1:]:
        entry = re.fullmatch(form, text)
        if first or not entry or own_margin != margin:
            raise InputError(f"{place}: {text!r} is not understood: {SIMPLE_YAML}")
        key = len(values) if form != YAML_LINE else _yaml_text(entry["key"], place)
        if key in values:
            raise InputError(f"{place}: {key} is there twice: remove one")
        values[key] = _yaml_text(entry["value"] or "", place)
    return values if form == YAML_LINE else [*values.values()]


def _yaml_brackets(text, place):
    """Return the list or dict of text between brackets: JSON, once all texts have double quotes."""
    tokens = [*YAML_TOKEN.finditer(text)]
    if "".join(token[0] for token in tokens) != text:
        raise InputError(f"{place}: {text!r} is not understood: {SIMPLE_YAML}")
    pieces = [token["mark"] or json.dumps(_yaml_text(token["text"], place)) for token in tokens]
    if pieces[-2:-1] == [","]:  # one may follow the last entry
        del pieces[-2]

    wrong = InputError(f"{place}: the brackets are not understood: {SIMPLE_YAML}")
    try:
        value = json.loads("".join(pieces), object_pairs_hook=tuple)  # shows repeated keys
    except (ValueError, RecursionError):
        raise wrong from None
    if isinstance(value, tuple):
        _refuse_repeated(place, [key for key, _ in value])
        value = dict(value)
    texts = value.values() if isinstance(value, dict) else value
    if not all(isinstance(text, str) for text in texts):
        raise wrong
    return value


def _without_comment(text):
    """Return a line of YAML without its comment, which a quoted # does not start."""
    return re.match(rf"(?:(?<![^\s,\[{{])(?:{QUOTED})|(?<=\S)#|[^#])*", text)[0].rstrip()


def _yaml_text(text, place):
    """Return the text of a scalar of YAML. Raises InputError if it is more than quotes or plain text."""
    text = text.strip()
    if not text:
        return ""
    if not YAML_TEXT.fullmatch(text) or (text[0] == "-" and text[1:2] in ("", " ")):
        raise InputError(f"{place}: {text!r} is not understood: {SIMPLE_YAML}")
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == '"':
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            if not value or _is_text(value):
                return value
        raise InputError(f"{place}: {text} is not understood: use single quotes")
    return text


# --------------------------------------------------------------------------------------------------
# Format "Pascal VOC": a file Annotations/**/NAME.xml for each image, with an <object> per box


class _NoEntities(ElementTree.TreeBuilder):
    """Refuse XML that declares entities, which could grow without limit or name other files."""

    def doctype(self, name, pubid, system):
        raise InputError("DOCTYPE and entities are not read: remove them")


def _read_voc(files, data_dir):
    """Read Pascal VOC files into a LabelTable without paths.

    A class is present if it has a box. If all its boxes in an image are difficult, it is NA there.
    """
    labels = [_read_voc_file(file)[1] for file in watched("reading Pascal VOC files", files)]
    classes = _in_order(set(chain(*labels)))
    if not classes:
        raise InputError(f"{files[0]}: no Pascal VOC file has an <object>: name "
                         "another label file or folder with --labels")

    column_of = {name: column for column, name in enumerate(classes)}
    targets = np.zeros((len(files), len(classes)), np.float32)
    for row, own in enumerate(labels):
        for name, target in own.items():
            targets[row, column_of[name]] = target
    notes = [f"{_counted(files, 'Pascal VOC file')} of boxes"]
    return _file_per_image(files, data_dir, targets, classes, notes)


def _read_voc_file(path):
    """Read a Pascal VOC file. Returns (the image that it names or "", {class: 1, or NaN if difficult})."""
    try:
        root = ElementTree.XML(path.read_bytes(), ElementTree.XMLParser(target=_NoEntities()))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # such as an unknown encoding
        line = getattr(error, "position", (1,))[0]
        raise InputError(f"{path}:{line}: not XML: {error}: repair or remove the file") from None
    if root.tag != "annotation":
        raise InputError(f"{path}: <{root.tag}> is not Pascal VOC, which starts with <annotation>: remove "
                         "the file, or name other label files with --labels")

    labels = {}
    for number, item in enumerate(root.iter("object"), 1):
        name = " ".join((item.findtext("name") or "").split())
        if not name:
            raise InputError(f"{path}: object {number} has no <name>: add it")
        difficult = (item.findtext("difficult") or "").strip().lower() in ("1", "true")
        labels[name] = labels.get(name, math.nan) if difficult else 1.0
    return (root.findtext("filename") or "").strip(), labels


# --------------------------------------------------------------------------------------------------
# Format "COCO JSON": lists of images, categories and annotations, each annotation with a box


# The keys that count. Polygons are dropped as soon as they are read, as they can fill the memory.
COCO_KEYS = ("images", "annotations", "categories", "id", "name", "file_name", "image_id",
             "category_id", "iscrowd")


def _read_coco(files, data_dir):
    """Read COCO JSON files {part: Path} into a LabelTable without paths.

    A class is present if it has a box. If all its boxes in an image are crowds, it is NA there.
    """
    table = LabelTable([], [], None, [], absent=0.0)
    column_of = {}  # class name -> column, in the order of the category ids
    boxes = []
    for part, path in files.items():
        boxes += _read_coco_part(path, table, column_of)
        table.parts += [part] * (len(table) - len(table.parts))
    if not boxes:
        raise InputError(f"{' and '.join(map(str, files.values()))}: no image has an annotation: name "
                         "another label file with --labels")

    # Clear boxes come last, as they count more than crowds.
    rows, columns, crowds = np.array(boxes).T
    table.targets = np.zeros((len(table), len(column_of)), np.float32)
    table.targets[rows[crowds == 1], columns[crowds == 1]] = np.nan
    table.targets[rows[crowds == 0], columns[crowds == 0]] = 1

    seen = np.isin(np.arange(len(column_of)), columns)
    table.classes = [name for name, column in column_of.items() if seen[column]]
    table.targets = table.targets[:, seen]
    if unseen := [name for name, column in column_of.items() if not seen[column]]:
        table.warnings.append("categories without an annotation, which were left out: "
                              f"{shortened(unseen)}")
    return table


def _read_coco_part(path, table, column_of):
    """Add the images of a COCO JSON file to a table, and its classes to {name: column}.

    Returns a tuple (row, column, True for a crowd) for each annotation. Raises InputError.
    """
    content = _read_coco_file(path)
    names = {}
    for i, (number, name) in enumerate(_entries(content, path, "categories", id=int, name=str)):
        if number in names:
            raise InputError(f"{path}: categories[{i}].id {number} is there twice: correct one")
        names[number] = " ".join(name.split())
    # The ids of a name may differ from part to part; the first part decides the order.
    for number in sorted(names):
        column_of.setdefault(names[number], len(column_of))

    row_of = {}
    for i, (number, name) in enumerate(_entries(content, path, "images", id=(int, str), file_name=str)):
        if number in row_of:
            raise InputError(f"{path}: images[{i}].id {number} is there twice: correct one")
        row_of[number] = len(table)
        # Label Studio may write the path from its own folder, ../../label-studio/media/1.jpg.
        table.ids.append(re.sub(r"^(\.\.[/\\])+", "", name))
        table.origins.append(f"{path}:images[{i}]")

    boxes = []
    used = {}  # class name -> category id
    for i, (image, number) in enumerate(_entries(content, path, "annotations",
                                                 image_id=(int, str), category_id=int)):
        if image not in row_of:
            raise InputError(f"{path}: annotations[{i}].image_id {image} is no image: correct it")
        if number not in names:
            raise InputError(f"{path}: annotations[{i}].category_id {number} is no category: correct it")
        # Roboflow adds a category without annotations, which may have the name of a class.
        name = names[number]
        if used.setdefault(name, number) != number:
            raise InputError(f"{path}: the categories {used[name]} and {number} are both called "
                             f"{name}: rename one")
        boxes.append((row_of[image], column_of[name], content["annotations"][i].get("iscrowd") == 1))
    table.notes.append(f"{path}: COCO JSON of {_counted(row_of, 'image')} and "
                       f"{_counted(boxes, 'annotation')}")
    return boxes


def _read_coco_file(path):
    """Read the COCO_KEYS of a JSON file. Raises InputError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        with Progress(f"reading {path.name}", text.count("{")) as progress:
            content = json.loads(text, object_hook=partial(_only_coco_keys, progress))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: "
                         f"{getattr(error, 'msg', error)}: export it again") from None

    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path} has no list {key}: COCO JSON needs images, annotations and "
                             "categories; for another label file say --labels FILE")
    return content


def _only_coco_keys(progress, entry):
    """Return an object of JSON without the keys that do not count."""
    progress.advance()
    return {key: entry[key] for key in COCO_KEYS if key in entry}


def _entries(content, path, key, **fields):
    """Yield the values of the given fields of each entry of a list, checked: name=type."""
    for i, entry in enumerate(content[key]):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {key}[{i}] is not an object with {' and '.join(fields)}")
        for name, kind in fields.items():
            value = entry.get(name)
            if not isinstance(value, kind) or (isinstance(value, str) and not _is_text(value)):
                problem = "is not valid" if name in entry else "is missing"
                raise InputError(f"{path}: {key}[{i}].{name} {problem}: correct it")
        yield tuple(entry[name] for name in fields)


def _is_text(value):
    """Return False if a text is blank, or if it has letters that no file name and no UTF-8 file can have."""
    return bool(value.strip()) and not re.search("[\0\ud800-\udfff]", value)


# --------------------------------------------------------------------------------------------------
# The parts of YOLO and Pascal VOC, and images without a label file


def _keep_split(table, folder, chosen, background):
    """Set the parts of a table of boxes to those of the data's own split.

    Data that is all called train is not divided yet, but one part called test is not trained on,
    unless --labels names it.

    Args: chosen: the LabelFiles; background: as of _split_by_lists().
    """
    source = "the JSON files"
    if chosen.kind != "coco":
        table, source = _split_by_lists(table, folder, chosen.kind, background)
    parts = {*table.parts}
    if parts <= {"", "train"} or (chosen.given and len(parts) == 1):
        table.parts = []
    else:
        table.notes.append(f"split: from {source}")
    return table


def _split_by_lists(table, folder, kind, background):
    """Set the parts of a table with a file per image, and say what they come from.

    They come from data.yaml, from lists of images, or else from the names of folders. Where a list
    says what is train, rows of images in no list are dropped with a warning. The IDs become the
    paths of the images.

    Args: background: whether images without a label file become rows, in which all is absent.
    Returns (the table, what its parts come from).
    """
    start = f"{folder.root}/"
    names = [path.removeprefix(start) for path in table.paths]
    # The folders of label files tell the part where those of the images do not.
    part_of = {name: _part_of_folder(name) or _part_of_folder(label)
               for name, label in zip(names, table.ids)}
    part_of |= {name: _part_of_folder(name) for name in table.unlabelled}
    table.ids = names
    if count := len(table.unlabelled):
        meaning = ("background, where all classes are absent" if background else
                   "left out, while --background makes all classes absent there")
        table.notes.append(f"images without a label file: {count}, such as "
                           f"{', '.join(table.unlabelled[:3])}: {meaning}")
    if background:
        table.ids += table.unlabelled
        table.paths += [start + name for name in table.unlabelled]
        table.origins += [start + name for name in table.unlabelled]
        table.targets = np.pad(table.targets, ((0, count), (0, 0)))
        table.unlabelled = []

    listed, sources = _listed_images(table, folder, kind)
    if listed.keys() <= {"", "train"}:
        table.parts = [part_of[name] for name in table.ids]
        return table, "the names of folders"

    parts_of = {}
    for part, images in listed.items():
        for image in images:
            parts_of.setdefault(image, []).append(part)
    # Where no list says what is train, the images outside of val and test are still to be divided.
    if listed.keys().isdisjoint({"", "train"}):
        for name, part in part_of.items():
            parts_of.setdefault(name, [part])

    # An image in two lists gets two rows, which _separate_parts() then finds.
    rows = [row for row, name in enumerate(table.ids) for _ in parts_of.get(name, ())]
    parts = list(chain(*(parts_of.get(name, ()) for name in table.ids)))
    if not rows:
        raise InputError(f"{sources}: none of the {len(table)} images with labels is in the split: "
                         "correct it, or remove it")
    if others := [name for name in table.ids if name not in parts_of]:
        table.warnings.append("images in no part of the data's own split, which were left out: "
                              f"{shortened(others)}")
    table.part_of = {image: own[0] for image, own in parts_of.items()}
    table = table.subset(np.array(rows, int))
    table.parts = parts
    return table, sources


def _listed_images(table, folder, kind):
    """Find the images of each part, as files of the data set list them, and these files.

    Returns ({part: set of images below the image folder}, names of the files). The part is "" for
    those of trainval.txt where nothing divides them into train and val.
    """
    listed = {}
    data_dir, files = Path(folder.data_dir), [*map(Path, table.origins)]
    sources = _find_configs(files, data_dir) if kind == "yolo" else []
    for config in sources:
        _add_config_images(listed, table, folder, config)

    if not listed:
        sources = []
        for path, part, place in _find_lists(table, files, data_dir):
            base = place if kind == "voc" else None
            listed.setdefault(part, set()).update(_read_image_list(path, table, folder, base))
            sources.append(path)

    # Ultralytics insists on a val part, so that the images of another one are often given twice.
    for part, other in (("val", "train"), ("test", "train"), ("test", "val")):
        if listed.get(part) and listed[part] == listed.get(other):
            table.warnings.append(f"{other} and {part} are the same images, which count as {other}")
            listed[part] = set()
    return listed, ", ".join(map(str, sources))


def _find_lists(table, files, data_dir):
    """Return (path, part, folder of the export) of lists of images, such as train.txt.

    They lie beside the folder of the label files, or in ImageSets/ or ImageSets/Main/ there. Files
    of these names that hold something else are named in a warning.
    """
    lists = []
    below = [folder for folder in _folders_of(files, data_dir) if folder != data_dir]
    for place in sorted({data_dir, *(folder.parent for folder in below)}):
        forms = ("*.txt", "ImageSets/*.txt", "ImageSets/Main/*.txt")
        for path in sorted(chain(*map(place.glob, forms))):
            word = path.stem.lower().rstrip("0123456789")  # as in train2017.txt
            if word not in LIST_WORDS or str(path) in table.origins:
                continue
            if "ImageSets" in path.parts[-3:] or _lists_images(path):
                lists.append((path, LIST_WORDS[word], place))
            elif path.is_file() and path.stat().st_size:
                table.warnings.append(f"{path} is no list of images, so it divides nothing")

    divided = any(part in ("train", "val") for _, part, _ in lists)
    return [(path, part, place) for path, part, place in lists if part or not divided]


def _add_config_images(listed, table, folder, path):
    """Add the images of train, val and test in data.yaml to {part: set of images}."""
    config = _read_config(path)
    for part in PARTS:
        for value in config.get(part, ()):
            target = _find_listed(value, config.get("path", ""), path.parent)
            if target is None:
                table.warnings.append(f"{path}: {part}: {value} is not in {path.parent}")
            elif _image_suffix(target.name)[1] and target.is_file():
                raise InputError(f"{path}: {part}: {value} is an image: name a folder, or a .txt "
                                 "file with an image per line")
            else:
                images = (_images_in(target, folder) if target.is_dir() else
                          _read_image_list(target, table, folder))
                listed.setdefault(part, set()).update(images)


def _images_in(place, folder):
    """Return the set of images of an ImageFolder that lie below a folder on disk."""
    below = _place_below(os.path.realpath(place), folder.real_root)
    if below is None:
        return set()
    start = f"{below}/" if below else ""
    return {name for name in folder.names
            if name.startswith(start) and _image_suffix(name)[1] in IMAGE_SUFFIXES}


def _find_listed(value, base, place):
    """Return the folder or list of images that a path in data.yaml means, or None.

    The path may have been written on another computer, or for another working directory, as Roboflow's
    ../train/images: its end is enough.
    """
    plain = _plain_path(posixpath.join(base.replace("\\", "/"), value.replace("\\", "/")))
    folders = [folder for folder in plain.split("/") if folder not in ("", ".", "..")]
    for skipped in range(len(folders)):
        end = "/".join(folders[skipped:])
        # Of valid/images, images alone is not the end, as it may be another part.
        if skipped and _part_of_folder("/".join([*folders[:skipped], ""])) and not _part_of_folder(f"{end}/"):
            break
        if (place / end).exists():
            return place / end
    return place if not folders else None


def _read_image_list(path, table, folder, base=None):
    """Return the set of images that the lines of a file name.

    Args: base: in Pascal VOC, the folder in which JPEGImages lies; the lines have no suffix then.
    """
    table.sources.append(path)
    images, missing = set(), []
    for number, line in enumerate(read_lines(path), 1):
        if name := line.strip():
            found = folder.beside(base / "Annotations" / name) if base else []
            if len(found) != 1:
                found = folder.find(name, f"{path}:{number}", path.parent, taken=())
            if found[0]:
                images.add(found[0])
            else:
                missing.append(name)
    if missing:
        table.warnings.append(f"{path} names images that are not there: {shortened(missing)}")
    return images


# --------------------------------------------------------------------------------------------------
# Class names and groups


def _read_class_names(data_dir):
    """Return {class number as text: class name}, in order, or {} without a file of class names."""
    source = _class_file(data_dir)
    if not source:
        return {}
    if source.suffix == ".csv":
        return _read_class_table(source)
    classes = _read_numbered_names(source) if source.suffix == ".txt" else _read_json(source)
    if isinstance(classes, dict):
        classes = classes.get("classes")
    if not classes or not _is_list_of_names(classes):
        raise InputError(f'{source}: it must look like ["class", ...]')
    _refuse_repeated(source, classes)
    return {str(number): name for number, name in enumerate(classes)}


def _read_numbered_names(path):
    """Return the class names in the lines of a text file. Raises InputError if one is blank."""
    names = [line.strip() for line in read_lines(path)]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise InputError(f"{path}:{names.index('') + 1}: a blank line, while the number of a class "
                         "is that of its line: write its name, or remove the line")
    return names


def _class_file(data_dir):
    """Return the file of class names in a data folder, or None."""
    for name in ("classes.txt", "classes.json"):
        if (data_dir / name).is_file():
            return data_dir / name
    tables = (data_dir / name for name in ("classes.csv", "labels.csv"))
    return next((path for path in tables if path.is_file() and _read_class_table(path)), None)


def _read_class_table(path, folder=None):
    """Read a CSV file of class numbers and names, such as class_id,name, as a dict in order.

    Returns {} if it is something else: if a number or name is repeated, or names an image in `folder`.
    """
    if path.suffix.lower() != ".csv":
        return {}
    try:
        # Two lines are enough to recognise most tables of labels, which can be large.
        with open(path, encoding="utf-8") as file:
            titles, first = file.readline(1000), file.readline(1000)
        if titles.count(",") != 1 or not first.partition(",")[0].strip(' "').isdecimal():
            return {}
        (_, header), *rows = read_rows(path)[0]
        numbers, names = zip(*(cells for _, cells in rows))
    except (OSError, ValueError):  # an InputError, no rows, or not two columns
        return {}

    titled = re.search("name|label|class|attribute|categor", header[-1], re.IGNORECASE)
    distinct = len(set(numbers)) == len(rows) == len(set(names))
    if not (titled and distinct and all(number.isdecimal() for number in numbers)):
        return {}
    if all(NUMBER.fullmatch(name) or name.lower() in LABEL_WORDS for name in names):
        return {}
    if folder and any(map(folder.names_image, (*numbers, *names))):
        return {}
    name_of = dict(zip(numbers, names))
    return {_class_number(number): name_of[number] for number in _in_order(numbers)}


def _read_groups(path):
    """Read a JSON file {group: [class, ...]} as a dict."""
    groups = _read_json(path)
    if not isinstance(groups, dict) or not all(map(_is_list_of_names, groups.values())):
        raise InputError(f'{path}: it must look like {{"group": ["class", ...], ...}}')
    _refuse_repeated(path, chain(*groups.values()))
    return groups


def _apply_groups(table, groups, path):
    """Order the classes by their groups; drop those without a group and count them in a warning."""
    column = {name: c for c, name in enumerate(table.classes)}
    groups = {group: [name for name in names if name in column] for group, names in groups.items()}
    classes = list(chain(*groups.values()))
    if not classes:
        raise InputError(f"{path}: none of its names is a class; the classes are "
                         f"{', '.join(table.classes)}")

    positives = np.nansum(table.targets, axis=0)
    # Groups may leave classes out on purpose, but a typing error would look the same.
    dropped = [f"{name} ({positives[c]:.0f} times)" for name, c in column.items() if name not in classes]
    if dropped:
        table.warnings.append(f"{len(dropped)} classes in no group of {path} were dropped: "
                              f"{', '.join(dropped)}")
    table.notes.append(f"groups: {', '.join(groups)}, from {path}")
    targets = table.targets[:, [column[name] for name in classes]]
    return replace(table, classes=classes, targets=targets, groups=groups)


def _read_json(path):
    """Read a JSON file. Raises InputError."""
    try:
        return json.loads("\n".join(read_lines(path)))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: "
                         f"{getattr(error, 'msg', error)}") from None


def _is_list_of_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


COCO_CLASSES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,
fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,
backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,
dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush
""".replace("\n", "").split(",")


# --------------------------------------------------------------------------------------------------
# The images of the rows: one rule for all formats


def _attach_images(table, folder, kind):
    """Set the paths of a table, drop rows whose image is missing, and note how names were matched.

    Args: kind: that of the LabelFiles.
    """
    if kind in ("table", "coco"):
        found, how, meant = _match_paths(table, folder, own_folder=kind == "coco")
    else:
        found, how, meant = _match_by_stem(table, folder)
    _refuse_shared_images(table, folder, found, meant)
    rows = np.array([row for row, image in enumerate(found) if image])
    table.missing = list(dict.fromkeys(name for name, image in zip(table.ids, found) if not image))
    others = _other_suffixes(table.missing, folder)
    if len(rows) == 0:
        source = table.origins[0].rpartition(":")[0] or folder.data_dir
        more = f"; {others[0]}: correct the label file if they are the same" if others else ""
        raise InputError(f"{source}: {_long_form(table.ids)}none of its {len(found)} images is in "
                         f"{folder.root}; the first one is {table.missing[0]}: name the image "
                         f"folder with --images{more}")

    table.notes.append(f"images: {folder.root}")
    for way, count in Counter(filter(None, how)).items():
        matched = islice((row for row, one in enumerate(how) if one == way), 3)
        pairs = [found[row] if way == "full path" else f"{table.ids[row]} = {found[row]}"
                 for row in matched]
        table.notes.append(f"matched by {way}: {count} rows, such as {', '.join(pairs)}")

    # Images without a row are no error, as part of a data set may be unlabelled.
    table.root = folder.root
    table.unlabelled = _images_except(folder, set(found))
    if table.unlabelled and kind not in ("yolo", "voc"):  # where these may become background
        table.notes.append(f"images without a row: {len(table.unlabelled)}, such as "
                           f"{', '.join(table.unlabelled[:3])}")
    if others:
        table.warnings.append(f"{len(others)} images are missing, but there with another suffix "
                              "(correct the label file if they are the same): "
                              f"{'; '.join(others[:3])}")
    table.paths = [f"{folder.root}/{image}" for image in found]
    return table.subset(rows) if table.missing else table


def _images_without_labels(folder, classes, how):
    """Return the table of a folder without a label file: no rows, and all its images unlabelled."""
    notes = [f"labels: {folder.data_dir} has no label file", f"images: {folder.root}"]
    warnings = []
    if how.answers:
        warnings.append("the answers are the only labels, so that splits change with every answer: "
                        "name a label file with --labels if there is one")
    return LabelTable([], [], np.empty((0, len(classes)), np.float32), classes, root=folder.root,
                      unlabelled=_images_except(folder, set()), notes=notes, warnings=warnings)


def _images_except(folder, used):
    """Return the images of an ImageFolder that are not among `used`, sorted."""
    return sorted(name for name in folder.names
                  if name not in used and _image_suffix(name)[1] in IMAGE_SUFFIXES)


def _match_paths(table, folder, own_folder=False):
    """Find the file of each row by its path.

    Args: own_folder: whether a row has no image in the folder of another part, if its own part has a
        folder: COCO's train2017/1.jpg and val2017/1.jpg are both called 1.jpg.

    Returns the files, how each was matched, and the path that each row means; None if it is missing.
    """
    found, ways, meant = [], [], []
    places = {}  # label file -> (its folder, the part it belongs to, starts of relative paths)
    bases = {}
    if own_folder:
        folders = set(map(os.path.dirname, folder.names))
        folder_parts = {_part_of_folder(f"{place}/") for place in folders}
        bases = _find_bases(table, folder, folder_parts)
    for row, name in enumerate(watched("finding images", table.ids)):
        origin = table.origins[row]
        source = origin.rpartition(":")[0]
        if source not in places:
            inside = os.path.relpath(source, folder.data_dir).replace(os.sep, "/")
            word = os.path.splitext(inside)[0].lower().removesuffix("_metadata")
            place = os.path.dirname(source) or "."
            starts = tuple(start for start, _ in folder.starts_from(place))
            places[source] = place, PART_WORDS.get(word) or _part_of_folder(inside), starts
        place, part, starts = places[source]

        # Most names need no search: they are paths from the image folder, and nothing else.
        if source in bases:
            image = path = bases[source] + _plain_path(name)
            how = "trailing part" if bases[source] else "full path"
        elif name in folder.names and not name.startswith(starts):
            image, how, path = name, "full path", name
        else:
            part = table.parts[row] if table.parts else part
            image, how, path = folder.find(name, origin, place, part)
            if own_folder and image and how != "full path" and part in folder_parts:
                image = image if _part_of_folder(image) == part else None
        found.append(image)
        ways.append(how if image else None)
        meant.append(path if image else None)
    return found, ways, meant


def _find_bases(table, folder, folder_parts):
    """Return {label file: folder below the image folder} where only one folder holds all of its images.

    COCO's names are paths from one folder, so that in default/ 1.jpg is not default/night/1.jpg.

    Args: folder_parts: the parts that have a folder of their own.
    """
    names = {}
    for row, (name, origin) in enumerate(zip(table.ids, table.origins)):
        names.setdefault((origin.rpartition(":")[0], table.parts[row]), []).append(_plain_path(name))

    bases = {}
    for (source, part), paths in names.items():
        starts = [file.removesuffix(paths[0]) for file in folder.ends(paths[0]) if file.endswith(paths[0])]
        starts = [start for start in starts if all(start + path in folder.names for path in paths)]
        if part in folder_parts - {""}:
            starts = [start for start in starts if _part_of_folder(start + paths[0]) == part]
        if len(starts) == 1:
            bases[source] = starts[0]
    return bases


def _match_by_stem(table, folder):
    """Find the image of each label file, by its path without the suffix. Returns as _match_paths().

    An image beside the label file goes first, then the rule for paths. If both find nothing, since
    labels/train and images/train-resized have different names, the image with the same stem is taken
    that no other label file has: one in a folder of the same split, or else one in a folder of no
    split. Last, Pascal VOC files name their images, but not after these were renamed.
    """
    found = [_only_image(folder.beside(os.path.splitext(origin)[0]), origin)
             for origin in table.origins]
    # An image that matches a label file is not given to another one, by a looser rule.
    taken = set(found)
    found = [image or folder.find(name, origin, folder.root, taken=taken)[0]
             for image, name, origin in zip(found, table.ids, table.origins)]
    taken = set(found)
    folders = {os.path.dirname(name) for name in table.ids} - {""}
    for row, (name, origin) in enumerate(zip(table.ids, table.origins)):
        if found[row]:
            continue

        stem = name.rpartition("/")[2]
        own = _part_of_folder(name)
        images = {*folder.tails(1, True).get(stem, ()), *folder.tails(0, True).get(stem, ())} - taken
        # A folder that has label files of its own keeps its images for them.
        images = {image for image in images if os.path.dirname(image) not in folders}
        same = [image for image in images if own and _part_of_folder(image) == own]
        fitting = same or [image for image in images if not own or not _part_of_folder(image)]
        found[row] = _only_image(fitting, origin)

        if not found[row] and origin.lower().endswith(".xml"):
            named = _read_voc_file(Path(origin))[0]
            image = folder.find(named, origin, os.path.dirname(origin), own)[0] if named else None
            found[row] = None if image in taken else image
    return found, [image and "stem" for image in found], table.origins  # two files are two images


def _only_image(images, origin):
    """Return the only image that fits a label file, or None. Raises InputError if there are more."""
    if len(images) > 1:
        raise InputError(f"{origin}: its image can be {' or '.join(sorted(images)[:2])}: remove "
                         "one, or give the folders of labels and of images the same names")
    return images[0] if images else None


def _refuse_shared_images(table, folder, found, meant):
    """Raise InputError if rows of different paths share a file: one of their images is missing."""
    first = {}  # file -> its first row
    for row, image in enumerate(found):
        other = first.setdefault(image, row)
        if image and meant[other] != meant[row]:
            raise InputError(f"{table.origins[row]}: {table.ids[row]} and, at "
                             f"{table.origins[other]}, {table.ids[other]} would both be "
                             f"{folder.root}/{image}, which can be the image of only one of them: "
                             "add the other image, or correct its path")


# Folders whose pictures have the names of images, but are masks, or predictions that Ultralytics drew.
NO_IMAGES = re.compile(r"(.*/)?(SegmentationClass|SegmentationObject|panoptic_(train|val)\d*|"
                       r"stuff_(train|val)\d*_pixelmaps|runs/(detect|segment|pose|obb))")


class ImageFolder:
    """List the files below a folder once, and find the one that a name in a label file means.

    Names are relative to the folder, with "/". The rule: **two paths match if one, folder by
    folder, is the end of the other.** A written path can be longer than the one on disk, as it
    comes from another machine, or shorter, as it leaves out folders:

        written in the label file      on disk          match
        /home/eva/data/siteA/1.jpg     siteA/1.jpg      yes: the end of what is written
        C:\\data\\siteA\\1.jpg            siteA/1.jpg      yes
        1.jpg                          siteA/1.jpg      yes, if it is the only 1.jpg
        siteA/1.jpg                    siteB/1.jpg      no: the folders contradict each other
        siteA/1                        siteA/1.jpg      yes: a suffix counts only where one is written
        siteA/1.png                    siteA/1.jpg      no

    A full path goes first: one that leads to a file from the image folder, from the folder of the
    label file, from the data folder or from the working directory. Several matches are an error,
    and so are two rows with different paths that would share a file: see _refuse_shared_images().
    """

    def __init__(self, root, data_dir, guessed=False):
        self.root = str(root)
        self.guessed = guessed  # True if no option names it, so that another folder may be meant
        self.real_root = os.path.realpath(root)
        self.data_dir = str(data_dir)
        self.names = set()
        self.folders = set()  # names of the folders below it
        self._beside = {}  # cache of beside()
        self._tails = {}  # cache of tails()
        self._starts = {}  # cache of starts_from()
        self._elsewhere = {}  # cache of _look_elsewhere()

        visited = set()  # symlinks are followed, but not in circles
        for folder, folders, names in os.walk(self.root, followlinks=True):
            visited.add(os.path.realpath(folder))
            self.folders.update(folders)
            inside = os.path.relpath(folder, self.root).replace(os.sep, "/")
            prefix = "" if inside == "." else inside + "/"
            folders[:] = [name for name in folders if not NO_IMAGES.fullmatch(prefix + name)
                          and os.path.realpath(f"{folder}/{name}") not in visited]
            self.names.update(prefix + name for name in names if not name.startswith("._"))

    def names_image(self, name):
        """Return True if a cell names an image: by its suffix, or because there is such a file."""
        if _image_suffix(name)[1] or name in self.names:
            return True
        return bool(self.ends(_plain_path(name).lstrip("/")))

    def find(self, name, origin, place, part="", taken=None):
        """Find the file that a row means.

        Args:
            name: the path in the row.
            origin: "FILE:LINE" of the row, for errors.
            place: the folder of its label file.
            part: the part of the row, or "". Unless the path is a full one, an image in a folder of
                this part is preferred, and a row of train has no image in a folder called val or
                test, nor one of val in test.
            taken: files that are known to be others. If it is given, the closest of several files
                is meant: by data/night/1.jpg, night/1.jpg rather than 1.jpg.

        Returns:
            (file, "full path", "trailing part" or "stem", the path that is meant), or three None.

        Raises:
            InputError: several files match, or the path leads to a file outside the image folder.
        """
        path = _plain_path(name).lstrip("/")
        found = self._full_paths(name, origin, place)
        full = bool(found)
        if not full:
            found = self.ends(path)
            if part:
                rank = LESSER_FIRST.index(part)
                found = [file for file in found if LESSER_FIRST.index(_part_of_folder(file)) <= rank]
                found = [file for file in found if _part_of_folder(file) == part] or found
            self._check_elsewhere(name, origin, place)
        if taken is not None:
            shared = {file: min(file.count("/"), path.count("/"))
                      for file in found if file not in taken}
            found = [file for file in shared if shared[file] == max(shared.values())]

        if len(found) > 1:
            raise InputError(f"{origin}: {name} can be {found[0]} or {found[1]}: write its path "
                             f"from {self.root}, or name another image folder with --images")
        if not found:
            return None, None, None
        how = "full path" if full else "trailing part"
        if not _image_suffix(path)[1] and not found[0].endswith(path):
            how = "stem"
        return found[0], how, found[0] if full else path

    def beside(self, label):
        """Return the images of a label file (its path without suffix), as formats with a file per image lay
        them out: with labels/ replaced by images/ or JPEGImages/ or left out, or in the same folder.
        """
        place, stem = os.path.split(label)
        if place not in self._beside:
            root, folders = os.path.abspath(self.root), os.path.relpath(place, self.data_dir).split(os.sep)
            ways = [_replace_label_folder(folders, *new) for new in (["images"], ["JPEGImages"], [])]
            places = (os.path.abspath(os.path.join(self.data_dir, *way)) for way in [*ways, folders])
            inside = (_place_below(path, root) for path in places)
            self._beside[place] = [path and path + "/" for path in dict.fromkeys(inside) if path is not None]
        stems = self.tails(0, True)
        return next((stems[start + stem] for start in self._beside[place] if start + stem in stems), [])

    def _full_paths(self, name, origin, place):
        """Return the files that a full path means: an absolute one, or one from a known folder."""
        plain = _plain_path(name)
        if plain.startswith("../"):
            bases = map(os.path.realpath, (place, self.data_dir, "."))
            ends = [os.path.normpath(os.path.join(base, plain)) for base in bases]
            paths = list(filter(None, (_place_below(end, self.real_root) for end in ends)))
            if not paths:
                raise self._outside(name, origin)
        elif os.path.isabs(name):
            folder, last = os.path.split(os.path.normpath(name))
            inside, names = self._look_elsewhere(folder)
            if inside is None and last in names:
                raise self._outside(name, origin)
            paths = [] if inside is None else [inside + last]
        else:
            starts = self.starts_from(place)
            paths = [plain, *(new + plain[len(old) :] for old, new in starts if plain.startswith(old))]

        found = [path for path in paths if path in self.names]
        if not found:
            found = list(chain(*map(self._whole, paths)))
        return sorted(set(found))

    def _outside(self, name, origin):
        return InputError(f"{origin}: {name} lies outside the image folder {self.root}: move the "
                          "image into it, or name another folder with --images")

    def starts_from(self, place):
        """Return [(start, what replaces it), ...] for paths from the label file, DATA or the directory.

        If the image folder is DATA/images, this is ("images/", "") for DATA; if the label file is
        in the folder train of the image folder, it is ("", "train/") for the label file.
        """
        if place not in self._starts:
            starts = []
            for base in dict.fromkeys(map(os.path.realpath, (place, self.data_dir, "."))):
                if down := _place_below(base, self.real_root):
                    starts.append(("", down + "/"))
                elif up := _place_below(self.real_root, base):
                    starts.append((up + "/", ""))
            self._starts[place] = starts
        return self._starts[place]

    def _whole(self, path):
        """Return the files with this whole path; a suffix may differ in case, or not be written."""
        stem, suffix = _image_suffix(path)
        found = self.tails(0, False).get(stem + suffix, [])
        return found if suffix or found else self.tails(0, True).get(stem, [])

    def ends(self, path):
        """Return the files whose path ends in this one, or is the end of it, sorted."""
        stem, suffix = _image_suffix(path)
        if stem.rpartition("/")[2] not in self._last_stems:  # such as a label
            return []  # the index of tails, which takes long for many files, is not needed
        found = set()
        for stems in (False,) if suffix else (False, True):
            tail = stem if stems else stem + suffix
            found.update(self.tails(tail.count("/") + 1, stems).get(tail, ()))
            whole = self.tails(0, stems)
            while tail:
                found.update(whole.get(tail, ()))
                tail = tail.partition("/")[2]
        return sorted(found)

    @cached_property
    def _last_stems(self):
        """Return the names of all files, without folders and without the suffixes of images."""
        return {_image_suffix(name.rpartition("/")[2])[0] for name in self.names}

    def tails(self, depth, stems):
        """Return {the last `depth` parts of a path: its files}; with depth 0, {whole path: its files}.

        Suffixes are in lower case. With `stems` they are left out, and so are files that are not
        images. For example, a/b/1.JPG is b/1.jpg in tails(2, False) and 1 in tails(1, True).
        """
        if (depth, stems) not in self._tails:
            index = {}
            for name in self.names:
                key, suffix = _image_suffix(name)
                if stems and suffix not in IMAGE_SUFFIXES:
                    continue
                key = key if stems else key + suffix

                if depth:
                    start = key.rsplit("/", depth)
                    if len(start) <= depth:
                        continue  # not longer than this, so the index of whole paths has it
                    key = key[len(start[0]) + 1 :]
                index.setdefault(key, []).append(name)
            self._tails[depth, stems] = index
        return self._tails[depth, stems]

    def _check_elsewhere(self, name, origin, place):
        """Raise InputError if a relative path leads out of an image folder that no option names."""
        if not self.guessed or os.path.isabs(name):
            return
        inner, last = os.path.split(name)
        for base in dict.fromkeys((place, self.data_dir)):
            inside, names = self._look_elsewhere(os.path.join(base, inner))
            if inside is None and last in names:
                raise self._outside(os.path.join(base, name), origin)

    def _look_elsewhere(self, folder):
        """Return (the place of a folder in the image folder or None, the names in an outside one)."""
        if folder not in self._elsewhere:
            real = os.path.realpath(folder)
            inside, names = _place_below(real, self.real_root), frozenset()
            if inside is None:
                with contextlib.suppress(OSError, ValueError):  # ValueError: a zero byte
                    names = frozenset(os.listdir(real))
            self._elsewhere[folder] = inside and inside + "/", names
        return self._elsewhere[folder]


def _place_below(path, root):
    """Return the relative path from a folder to one below it, "" if they are the same, else None."""
    start = root.rstrip(os.sep) + os.sep
    if path == root:
        return ""
    return path[len(start) :].replace(os.sep, "/") if path.startswith(start) else None


def _image_suffix(name):
    """Split a path into (the rest, its image suffix in lower case), or (path, "") without one."""
    stem, dot, suffix = name.rpartition(".")
    suffix = dot + suffix.lower()
    return (stem, suffix) if suffix in IMAGE_SUFFIXES or suffix in OTHER_SUFFIXES else (name, "")


def _plain_path(name):
    """Return any system's path with "/", without a drive, and without "." and ".." in the middle."""
    return posixpath.normpath(re.sub(r"^[A-Za-z]:(?=/)", "", name.replace("\\", "/")))


# Words that say nothing about the part, as in train-images-resized.
FOLDER_WORDS = {"", "images", "image", "imgs", "img", "jpg", "jpeg", "png", "resized", "small", "data",
                "set", "labels", "obj", "instances", "annotations", "coco"}


def _part_of_folder(path):
    """Return the part that a folder in a path names, as train-resized and val2017 do, or ""."""
    for folder in reversed(path.lower().split("/")[:-1]):
        words = set(re.split(r"[^a-z]+", folder)) - FOLDER_WORDS
        if len(words) == 1 and words <= PART_WORDS.keys():
            return PART_WORDS[words.pop()]
    return ""


def _other_suffixes(names, folder):
    """Describe missing images that are there with another suffix, as they may have been converted."""
    pairs = []
    for name in names:
        stem, suffix = os.path.splitext(_plain_path(name).lstrip("/"))
        found = folder.ends(stem) if re.fullmatch(r"\.[A-Za-z]\w{1,4}", suffix) else []
        others = [file for file in found if not file.lower().endswith(suffix.lower())]
        if others:
            pairs.append(f"{name} is not there, but {others[0]} is")
    return pairs


def _long_form(names):
    """Return the start of a message if there is a row IMAGE_CLASS for each image and class, or ""."""
    pairs = [name.rpartition("_")[::2] for name in names]
    images, classes = map(set, zip(*pairs))
    if "" in images or len(classes) < 2 or len(images) * len(classes) != len(set(names)):
        return ""
    return (f"its rows seem to name an image and a class, {names[0]}: make it a table with a row for "
            f"each image and a column for each class ({', '.join(sorted(classes)[:3])}); as it stands, ")


# --------------------------------------------------------------------------------------------------
# Identical images, overlapping parts, and rows of the same image


def _find_copies(table, identify):
    """Set `copies` if two rows have the same image, by its path or by its bytes."""
    # Rows with the same path share a file, which is looked at only once.
    paths = list(dict.fromkeys(table.paths))
    place = {path: i for i, path in enumerate(paths)}
    places = np.array([place[path] for path in table.paths], int)

    table.identities = identify(paths)
    table.keys = table.identities.keys[places]
    firsts = table.identities.firsts[places]
    if len(paths) < len(table) or (firsts != np.arange(len(table))).any():
        table.copies = [paths[i] for i in firsts]


class Identities(NamedTuple):
    """Hold which of N files have the same bytes."""

    stamp: str  # a hash of their paths, sizes and modification times
    firsts: np.ndarray  # integers (N,): the index of the first file with the same bytes
    keys: np.ndarray  # integers (N,): the image_key() of each


def identify_images(paths, known=None):
    """Find the files with the same bytes, and return Identities.

    Args: known: the Identities of an earlier run, which are returned if no file has changed.
    """
    stats = _map_in_threads(_size_and_time, paths, "checking file sizes")
    names = "\0".join(paths).encode("utf-8", "surrogateescape")
    stamp = hashlib.sha256(np.array(stats, np.int64).tobytes() + names).hexdigest()
    if known and known.stamp == stamp and known.keys.all():  # older versions left out some of the keys
        return known

    # Equal files have equal keys, so only files that share a key are read as a whole.
    keys = np.array(_map_in_threads(image_key, paths, "comparing images"), np.uint64)
    sizes = np.array([size for size, _ in stats])
    equal = _repeated(keys, np.flatnonzero(sizes > 0))
    digests = _map_in_threads(_digest, [paths[i] for i in equal], "comparing similar images")

    firsts = np.arange(len(paths))
    first_of_bytes = {}
    for i, digest in zip(equal.tolist(), digests):
        firsts[i] = first_of_bytes.setdefault(digest, i)
    return Identities(stamp, firsts, keys)


def _repeated(values, places):
    """Return those of `places` in an array whose value stands at more than one of them."""
    _, inverse, counts = np.unique(values[places], return_inverse=True, return_counts=True)
    return places[counts[inverse] > 1]


def _map_in_threads(function, paths, title):
    """Call a function for each path, in threads, and return the list of its results.

    Args: function: one that mostly waits for a disk; title: what to call it on the progress line.
    """
    # To start a task for each file would take longer than to read a small one. But large tasks would
    # leave threads without work, and a slow drive without progress; and Ctrl-C waits for them.
    size = max(1, min(100, len(paths) // 32))
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    found = []
    with ThreadPoolExecutor(8) as pool, Progress(title, len(paths)) as progress:
        for some in pool.map(lambda part: list(map(function, part)), parts):
            found += some
            progress.advance(len(some))
    return found


def _size_and_time(path):
    """Return the size and the modification time of a file, or -1, -1 if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:  # training reports it
        return -1, -1
    return status.st_size, status.st_mtime_ns


def image_key(path):
    """Return a positive integer that identifies an image in later runs, even under another name."""
    # A hash of the size and the first 64 KB of the file: to read whole files would take too long.
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            content = str(os.fstat(file.fileno()).st_size).encode() + file.read(2**16)
    except OSError:  # training reports it
        content = os.fsencode(path)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")  # 64 bits do for millions


def _open_at_once(path, flags):
    """Open a file as os.open() does, without waiting for somebody to write to a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag


def image_keys(table):
    """Return the image_key() of each image of a table, integers (N,)."""
    if table.keys is None:  # a table that read_labels() did not make
        table.keys = np.array(_map_in_threads(image_key, table.paths, "identifying images"), np.uint64)
    return table.keys


def _digest(path):
    """Return a hash of a whole file, or one of its path if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError:
        digest.update(os.fsencode(path))
    return digest.digest()


LESSER_FIRST = ("", *PARTS)  # --drop-overlap keeps the rows of an image in the last of its parts


def _separate_parts(table, drop):
    """Make sure that no image and no object is in two parts of an existing split.

    Returns the table; with `drop`, without the rows of an image (or object) that has other rows in
    a later part. Raises InputError without `drop`.
    """
    if not any(table.parts):
        return table
    units = _units(table)
    # Later parts rank higher: a test image must not be trained on, but a train image can be spared.
    rank = np.array([LESSER_FIRST.index(part) for part in table.parts])
    # Rows that answers added are not in the data's own split: they follow the others later.
    rank[table.is_added] = 0
    last = np.zeros(units.max() + 1, int)
    np.maximum.at(last, units, rank)
    lesser = np.flatnonzero((rank < last[units]) & ~table.is_added)
    if len(lesser) == 0:
        return table

    if drop:
        counts = Counter(table.parts[row] or "rows to be divided" for row in lesser)
        text = ", ".join(f"{count} from {part}" for part, count in counts.items())
        table.warnings.append("rows were removed since their image or object is in a later part "
                              f"too: {text}")
        return table.subset(np.setdiff1d(np.arange(len(table)), lesser))

    # Each message needs a row of the other part: the first one of the highest rank.
    highest = {units[row]: row for row in np.flatnonzero(rank == last[units])[::-1]}
    pairs = []
    for row in lesser[:3]:
        other = highest[units[row]]
        pairs.append(f"{table.ids[row]} ({table.parts[row] or 'to be divided'}, "
                     f"{table.origins[row]}) and {table.ids[other]} ({table.parts[other]}, "
                     f"{table.origins[other]})")
    what = "images or objects" if table.objects else "images"
    raise InputError(f"{len(set(units[lesser]))} {what} are in two parts: {'; '.join(pairs)}: correct "
                     "the split, or let --drop-overlap remove them from the lesser part, train before "
                     "val before test")


def _merge_rows(table):
    """Merge the rows of an image. Raises InputError where they contradict each other."""
    first = {}
    for row, path in enumerate(table.paths):
        other = first.setdefault(path, row)
        if other == row:
            continue

        # 1 and 0 add up to 1, which nothing else does. In lists, a name in one row is enough.
        conflicts = np.flatnonzero(table.targets[row] + table.targets[other] == 1)
        if len(conflicts) and table.absent != 0:
            place = table.origins[other].rpartition(":")[2]
            raise InputError(f"{table.origins[row]}: {table.ids[row]} has another label for "
                             f"{table.classes[conflicts[0]]} than in line {place}: remove one of "
                             "the two lines")
        table.targets[other] = np.fmax(table.targets[row], table.targets[other])

        if table.objects and table.objects[row] != table.objects[other]:
            if table.objects[row] and table.objects[other]:
                raise InputError(f"{table.origins[row]}: {table.ids[row]} shows "
                                 f"{table.objects[row]}, but {table.objects[other]} at "
                                 f"{table.origins[other]}: correct the column of --group")
            table.objects[other] = table.objects[other] or table.objects[row]

    table.merged = len(table) - len(first)
    if table.merged and table.absent != 0:
        table.warnings.append(f"{table.merged} rows of an image were merged with its first row")
    return table.subset(np.array(list(first.values()), int)) if table.merged else table


def _make_ids_unique(table):
    """Replace IDs that several images share by the paths of these images below the image folder."""
    # In data divided into folders, train/1.jpg and test/1.jpg may both be called 1.jpg. A path may
    # be the ID of another image, which is then replaced too.
    while shared := {name for name, count in Counter(table.ids).items() if count > 1}:
        table.ids = [path.removeprefix(f"{table.root}/") if name in shared else name
                     for name, path in zip(table.ids, table.paths)]


def _compare_copies(table):
    """Add a warning if identical images have different labels."""
    pairs = []
    first = {}
    for row, image in enumerate(table.copies):
        other = first.setdefault(image, row)
        if (table.targets[row] + table.targets[other] == 1).any():  # 1 and 0
            pairs.append(f"{table.ids[other]} and {table.ids[row]}")
    if pairs:
        table.warnings.append(f"{len(pairs)} pairs of identical images disagree: "
                              f"{'; '.join(pairs[:5])}")


# --------------------------------------------------------------------------------------------------
# Questions about single labels, and their answers


ANSWER_COLUMNS = ["ID", "label", "given", "probability", "answer"]


class Question(NamedTuple):
    """Hold a question: does this image have this label? The label may be wrong, or unknown."""

    name: str  # the image's ID in the label file, or its path below the image folder
    path: str
    label: str  # a class
    given: float  # what the label file says: 1, 0 or NaN
    probability: float  # that the label is present, calibrated

    def cells(self):
        """Return the row of this question in a CSV file of ANSWER_COLUMNS, not answered yet."""
        return [self.name, self.label, to_cell(self.given), f"{self.probability:.4f}", ""]


class Answer(NamedTuple):
    """Hold what a person answered to a Question."""

    name: str
    label: str
    given: float
    answer: float  # 1, 0, or NaN if the person cannot tell
    origin: str  # "FILE:LINE"
    path: str = ""  # of the image, once it is found


def images_to_ask_about(table, held_out):
    """Return the rows of a table and its images without a row, each image once, as a LabelTable.

    Args: held_out: the rows of val and test. Labels that a model chooses are a biased sample, so
        none of these rows is asked about.
    Returns: a table with a row per image, in which a label is NaN if it may be asked for: no row of
        the image knows it, and nobody answered yet that they cannot tell. Images that are identical
        to one held out, or lie in a folder of val or test, are left out.
    """
    unknown = np.full((len(table.unlabelled), len(table.classes)), np.nan, np.float32)
    images = LabelTable([*table.ids, *table.unlabelled],
                        [*table.paths, *(f"{table.root}/{name}" for name in table.unlabelled)],
                        np.concatenate([table.targets, unknown]), table.classes)
    if table.answered is not None:  # nobody is asked again, so NA is as good as any known label
        images.targets[: len(table)][table.answered & np.isnan(table.targets)] = 0
    left_out = np.zeros(len(images), bool)
    left_out[list(held_out)] = True
    divided = any(table.parts) or any(_part_of_folder(path) == "train" for path in table.paths)
    if divided:
        left_out[len(table) :] = [_part_of_image(table, name) in PARTS[1:] for name in table.unlabelled]

    # Identical images become one: the first of them, with the labels that are known of any. Groups
    # are numbered in the order of their first rows, so first[g] is the first row of group g.
    numbers = {}
    _find_copies(images, identify_images)
    originals = images.copies or images.paths
    group = np.array([numbers.setdefault(path, len(numbers)) for path in originals], int)
    first = np.unique(group, return_index=True)[1]
    known = np.full((len(first), len(table.classes)), np.nan, np.float32)
    np.fmax.at(known, group, images.targets)
    images.targets[first] = known
    return images.subset(np.setdiff1d(first, first[group[left_out]]))


def can_be_answered(name):
    """Return True if the name of an image survives a round trip through a CSV file in UTF-8."""
    # Python reads a byte that is not UTF-8 as a character from D800 to DFFF.
    return name == name.strip() and not re.search("[\r\ud800-\udfff]", name)


def write_questions(path, questions):
    """Write Questions as a CSV file, with an empty column for the answers.

    Raises InputError instead of replacing a file that may hold answers.
    """
    refuse_answered(path)
    write_csv(path, [ANSWER_COLUMNS, *(one.cells() for one in questions)])


def to_cell(target):
    """Return a label, 1, 0 or NaN, as the cell of a label file."""
    return "NA" if math.isnan(target) else str(int(target))


def to_cells(targets):
    """Yield the labels of each row (N, C) as a list of cells of a label file."""
    words = np.array(["0", "1", "NA"], object)
    for start in range(0, len(targets), 4096):  # all at once would take many times their memory
        some = targets[start : start + 4096]
        yield from words[np.where(np.isnan(some), 2, some).astype(int)].tolist()


def holds_questions(path):
    """Return True if a file has the columns of write_questions(), answered or not."""
    if not os.path.isfile(path):  # to open a pipe would wait for somebody to write into it
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(1000)
    except OSError:
        return False
    # Spreadsheets may write UTF-16, and before the titles a line that tells the separator.
    kind = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = start.decode(kind, "replace").replace('"', "").splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("sep=")), "")
    return {*ANSWER_COLUMNS} <= {title.strip() for title in re.split("[,;\t]", first)}


def refuse_answered(path):
    """Raise InputError if the file at `path` may hold answers, and so must not be replaced."""
    # Anything but a list of questions without answers may be somebody's work.
    if not os.path.lexists(path):
        return
    try:
        answered = not holds_questions(path) or bool(read_answers(path))
    except InputError:  # such as an answer that was mistyped
        answered = True
    if answered:
        raise InputError(f"{path} holds answers, or is not a list of questions: rename it, or give "
                         "another --out")


def read_answers(path):
    """Return the Answers in a CSV file with the columns of write_questions(), possibly none.

    Rows whose answer is empty are left out. Raises InputError if a column is missing, or where a
    cell of `given` or `answer` is not 1, 0 or NA.
    """
    rows, _ = read_rows(Path(path))
    line, titles = rows[0] if rows else (1, [])
    _refuse_repeated(f"{path}:{line}", [title for title in titles if title in ANSWER_COLUMNS])
    lacking = [title for title in ANSWER_COLUMNS if title not in titles]
    if lacking:
        raise InputError(f"{path} has no column {', '.join(lacking)}: a file of answers has the "
                         f"columns {','.join(ANSWER_COLUMNS)}")

    answers = []
    for number, cells in rows[1:]:
        origin = f"{path}:{number}"
        if any(cells[len(titles) :]):
            raise InputError(f"{origin}: {cells[-1]!r} stands outside the columns: move it to the "
                             "column answer, or remove it")
        cells = dict(zip(titles, [*cells, *[""] * len(titles)]))  # the last ones may be missing
        if not cells["answer"]:
            continue
        given, answer = (_read_answer(cells[title], title, origin) for title in ("given", "answer"))
        answers.append(Answer(cells["ID"], cells["label"], given, answer, origin))
    return answers


def _read_answer(cell, title, origin):
    """Return the label in a cell: 1.0, 0.0 or NaN."""
    # Programs that take a column for numbers write 1.0 for 1, and nothing for NA.
    values = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "NA": math.nan, "": math.nan}
    if cell.upper() not in values:
        raise InputError(f"{origin}: {cell!r} in the column {title}: write 1, 0 or NA")
    return values[cell.upper()]


# --------------------------------------------------------------------------------------------------
# Merging answers into the labels


CHANGES = ("confirmed", "changed", "filled in", "set to unknown")


def _find_answered(table, files):
    """Find the image of each answer, and add a row without labels for each that has none.

    Args: files: the Answers of each file, [[Answer, ...], ...].
    Returns: the same with paths. Raises InputError if an image is not there.
    """
    start = f"{table.root}/"
    by_id = {}
    for name, path in zip(table.ids, table.paths):
        by_id.setdefault(name, set()).add(path)
    by_path = {path.removeprefix(start): path for path in table.paths}
    by_path |= {name: start + name for name in table.unlabelled}
    # Cells are read without the blanks around them, but the name of a file may start with one.
    by_path = {name.strip(): path for name, path in by_path.items()} | by_path
    files = [[one._replace(path=_answered_image(one, by_id, by_path, table)) for one in answers]
             for answers in files]

    labelled = set(table.paths)
    new = {}  # image without a row -> its first answer, which becomes the origin of the row
    for answer in chain(*files):
        if answer.path not in labelled:
            new.setdefault(answer.path, answer)
    # Without a label file, the answers are the labels, so no row counts as added to it.
    if new and len(table):
        table.added = [False] * len(table) + [True] * len(new)

    table.ids = [*table.ids, *(path.removeprefix(start) for path in new)]
    table.paths = [*table.paths, *new]
    table.origins = [*table.origins, *(answer.origin for answer in new.values())]
    for values in filter(None, (table.objects, table.parts)):
        values.extend([""] * len(new))
    unknown = np.full((len(new), len(table.classes)), np.nan, np.float32)
    table.targets = np.concatenate([table.targets, unknown])
    table.unlabelled = [name for name in table.unlabelled if start + name not in new]
    return files


def _answered_image(answer, by_id, by_path, table):
    """Return the path of the image that an answer is about. Raises InputError."""
    paths = by_id.get(answer.name, set())
    if len(paths) > 1:
        both = " or ".join(sorted(path.removeprefix(f"{table.root}/") for path in paths)[:2])
        raise InputError(f"{answer.origin}: {answer.name} is the ID of several images: write the "
                         f"path below the image folder instead, such as {both}")
    if path := next(iter(paths), None) or by_path.get(answer.name):
        return path

    if answer.name in table.missing:
        raise InputError(f"{answer.origin}: the image of {answer.name} is missing from "
                         f"{table.root}: put it back, or remove the line")
    raise InputError(f"{answer.origin}: {answer.name!r} is neither an ID of the label file nor an "
                     f"image below {table.root}: correct it, or remove the line")


def _place_added(table):
    """Set the parts of the rows that answers added, in data with a split of its own.

    Such a row is in the part of an identical image, or that a list or its folder names, or in
    train; if no row is in train yet, it is still to be divided, like the others.
    """
    images = table.copies or table.paths
    start = f"{table.root}/"
    other = "train" if "train" in table.parts else ""
    parts = [_part_of_image(table, image.removeprefix(start)) or other if added else part
             for image, part, added in zip(images, table.parts, table.is_added)]
    table.parts = _follow_copies(table, np.array(parts)).tolist()


def _part_of_image(table, name):
    """Return the part of an image below the image folder without a row, as a list or folder says, or ""."""
    return table.part_of.get(name) or _part_of_folder(name)


def _follow_copies(table, parts):
    """Return the parts (N,), in which an added row takes that of an identical older image, if any."""
    images = table.copies or table.paths
    part_of = {image: part for image, part, added in zip(images, parts, table.is_added) if not added}
    return np.array([part_of.get(image, part) if added else part
                     for image, part, added in zip(images, parts, table.is_added)])


def _merge_answers(table, files, names, labelled):
    """Set the targets to what was answered, file by file, and note what became of them.

    Args: files: as _find_answered() returns them; names: those of the files; labelled: whether there
        is a label file, whose labels are kept for the splits.

    Raises InputError if an answer contradicts another one, or is about another state of the labels.
    """
    before = table.targets.copy()
    if any(files):
        table.answered = np.zeros(before.shape, bool)
        table.before = before if labelled else None

    earlier = {}  # (row, column) -> the Answers of earlier files
    for name, answers in zip(names, files):
        if not answers:
            table.warnings.append(f"{name} holds no answers: is the column answer empty?")
        counts = Counter()
        for place, answer in _check_answers(table, answers, before, earlier).items():
            counts[_kind_of_change(table.targets[place], answer.answer)] += 1
            table.targets[place] = answer.answer
            table.answered[place] = True
            earlier.setdefault(place, []).append(answer)

        note = f"answers: {name}: " + ", ".join(f"{counts[kind]} {kind}" for kind in CHANGES)
        origins = {answer.origin for answer in answers}  # a row that an answer added has its origin
        if added := len(origins.intersection(table.origins)):
            note += f"; {added} row{'s' * (added > 1)} added"
        table.notes.append(note)


def _check_answers(table, answers, before, earlier):
    """Return the answers of a file, checked, as a dict {(row, column of targets): Answer}.

    Args: before: the targets without any answers; earlier: the same dict, with a list of the Answers
        in earlier files.
    """
    row_of = {path: row for row, path in enumerate(table.paths)}
    column_of = {name: c for c, name in enumerate(table.classes)}
    is_added = table.is_added

    checked = {}
    for answer in answers:
        if answer.path not in row_of:
            raise InputError(f"{answer.origin}: --drop-overlap removed the row of {answer.name}: "
                             "remove this line too")
        if answer.label not in column_of:
            raise InputError(f"{answer.origin}: {answer.label!r} is not a class (the classes are "
                             f"{shortened(table.classes)}): correct it, or remove the line")

        row = row_of[answer.path]
        place = row, column_of[answer.label]
        first = checked.setdefault(place, answer)
        # Without a label file, no row has a line in one.
        has_line = table.before is not None and not is_added[row]
        _check_answer(answer, first, earlier.get(place, []), before[place],
                      table.origins[row] if has_line else "it has no row")
    return checked


def _check_answer(answer, first, earlier, before, origin):
    """Raise InputError if an answer contradicts another one, or is about another given label.

    Args:
        first: the first answer in the same file about this label.
        earlier: the answers about it in earlier files.
        before: the label without any answers.
        origin: where that label is, for messages.
    """
    # Cells are compared, since NaN is not equal to itself.
    given, said, old = map(to_cell, (answer.given, answer.answer, before))
    answered = [to_cell(one.answer) for one in earlier]

    # The question may have been asked before or after the answers of earlier files were merged.
    if given not in (old, *answered):
        now = [old, *answered][-1]
        remedy = ("if this file was merged into the labels already, leave it out" if said == now
                  else "answer it again, or remove the line")
        raise InputError(f"{answer.origin}: {answer.label} of {answer.name} was {given} when the "
                         f"question was asked, but is {now} now ({origin}): {remedy}")

    # An earlier answer may be changed only by someone who was shown it, so that `given` is that
    # answer and not what the label file says.
    rivals = [first]
    if answered and (given != answered[-1] or given == old):
        rivals.append(earlier[-1])
    for other in rivals:
        if said != to_cell(other.answer):
            raise InputError(f"{answer.origin}: {answer.label} of {answer.name} is answered {said}, "
                             f"but {to_cell(other.answer)} at {other.origin}: remove one of the two "
                             "lines")


def _kind_of_change(old, new):
    """Return which of CHANGES an answer is."""
    old, new = to_cell(old), to_cell(new)
    if old == new:
        return "confirmed"
    if old == "NA":
        return "filled in"
    return "set to unknown" if new == "NA" else "changed"


# --------------------------------------------------------------------------------------------------
# Writing all labels as one table


def _write_table(options, table):
    """Write all labels to --out, and return the lines that end the output.

    Raises InputError, and writes nothing, if the file could not be read back as the same labels.
    """
    data_dir, out = Path(options.data), Path(options.out)
    refuse_to_replace("--out", options.out, [*table.sources, *table.paths])
    how = {"images": options.images, "group": options.group, "label_groups": options.label_groups}
    if np.isnan(table.targets).any() and not (table.targets == 0).any():
        how["unknown"] = "NA"  # without a 0, NA could mean absent

    # IDs may mean other images in another label file: elsewhere, or beside a column with the split.
    paths = [path.removeprefix(f"{table.root}/") for path in table.paths]
    for ids in (table.ids, paths):
        rows = _table_rows(table, ids, options.group)
        problem = _misreading(out, rows, table, data_dir, how)
        if not problem:
            write_csv(out, rows)
            return "\n".join(_closing_lines(options, table, how))
    raise InputError(f"--out {out} would not be read as the same labels: {problem}")


def _closing_lines(options, table, how):
    """Return the lines that say what is in the file of --out, what is not, and how to use it.

    Args: how: the arguments with which read_labels() has read it back.
    """
    lines = [note for note in table.notes if note.startswith("answers: ")]
    if table.missing:
        lines.append(f"left out: {len(table.missing)} rows whose image is missing")

    groups_file = Path(options.data) / "label_groups.json"
    if table.groups and not (options.label_groups or groups_file.is_file()):
        lines.append(f"warning: the groups {', '.join(table.groups)} are not in {options.out}: to "
                     f"keep them, save this as {groups_file}: "
                     f"{json.dumps(table.groups, ensure_ascii=False)}")
    # Without a part for every row, or without val, a split is drawn from the labels.
    if table.before is not None and ("" in table.parts or not {"train", "val"} <= {*table.parts}):
        lines.append(f"training on {options.out} draws a new split: to compare with earlier runs, "
                     "use --answers instead")

    command = ["python", "train.py", "--data", options.data, "--labels", options.out]
    for name, value in how.items():
        command += [f"--{name.replace('_', '-')}", value] if value else []
    return [*lines, f"written: {options.out}; next: {shlex.join(command)}"]


def _table_rows(table, ids, group):
    """Return the rows of a table (lists of cells) with all labels, the titles first."""
    columns = [("ID", ids)]
    if table.objects:
        columns.append((group, table.objects))
    if any(table.parts):
        columns.append(("split", table.parts))
    titles, cells = zip(*columns)
    return [[*titles, *table.classes],
            *([*start, *labels] for *start, labels in zip(*cells, to_cells(table.targets)))]


def _misreading(out, rows, table, data_dir, how):
    """Say why a label file of these rows would not be read as the table. Returns "" if it would."""
    # Written beside it, since paths may be relative to the folder of a label file.
    trial = out.with_name(f".{out.stem}.trial.csv")
    try:
        write_csv(trial, rows)
        again = read_labels(data_dir, labels=trial, **how)
    except InputError as error:
        return str(error).replace(str(trial), str(out))
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()

    lost = [name for name in table.classes if name not in again.classes]
    if lost:
        return f"a column {lost[0]!r} is no class there: give this class another name"
    same = {"classes": again.classes == table.classes, "images": again.paths == table.paths,
            "objects": again.objects == table.objects,
            "split": again.parts == (table.parts if any(table.parts) else []),
            "labels": np.array_equal(again.targets, table.targets, equal_nan=True)}
    wrong = [what for what, equal in same.items() if not equal]
    return f"it would have other {' and '.join(wrong)}: give its columns other names" if wrong else ""


# --------------------------------------------------------------------------------------------------
# Splits


def split(table, ratios=(0.7, 0.15, 0.15), method="stratified", seed=0):
    """Divide a table into train, val and test; rows of one object and identical images stay together.

    Args:
        table: a LabelTable. An existing split (table.parts) is kept: rows without a part are
            divided among the splits that have none, and val is taken from train if the data has no
            val. Answers change nothing: labels count as they were before, and rows that answers
            added join train, or the part of an identical image or, in data with an existing split,
            of their folder.
        ratios: three numbers >= 0, relative to their sum; only that of test may be 0.
        method: "stratified" is the iterative stratification of Sechidis, Tsoumakas & Vlahavas
            (2011), "On the Stratification of Multi-Label Data", on the known positives, so that
            rare classes reach every split; "random" shuffles.
        seed: random seed.

    Returns three ascending arrays of row numbers. Raises InputError.
    """
    ratios = np.array(ratios, float)
    if len(ratios) != 3 or not np.isfinite(ratios).all() or ratios.min() < 0 or ratios[:2].min() == 0:
        raise InputError("--split takes three ratios, train, val and test; only the last may be 0")
    if any(table.added):
        old = np.flatnonzero(~table.is_added)
        part = np.array([PARTS.index(name or "train") for name in table.parts or [""] * len(table)])
        for k, rows in enumerate(split(table.subset(old), ratios, method, seed)):
            part[old[rows]] = k
        part = _follow_copies(table, part)
        return [np.flatnonzero(part == k) for k in range(3)]

    # -1 stands for a row without a part, which is to be divided.
    part = np.array([PARTS.index(name) if name else -1 for name in table.parts or [""] * len(table)])
    free = np.flatnonzero(part < 0)
    named = set(part[part >= 0].tolist())
    if named and 1 not in named and len(free) == 0:  # val comes out of train
        free = np.flatnonzero(part == 0)
        named.discard(0)
        ratios[2] = 0
    open_parts = [k for k in range(3) if k not in named and ratios[k] > 0] or [0, 1, 2]
    if len(free):
        rest = table if len(free) == len(table) else table.subset(free)  # copied only where needed
        part[free] = np.array(open_parts)[divide(rest, ratios[open_parts], method, seed)]

    rows = [np.flatnonzero(part == k) for k in range(3)]
    for name, chosen in zip(PARTS[:2], rows):
        if len(chosen) == 0:
            raise InputError(f"the data's own split has no {name} images: add some, or leave the "
                             "split out")
    return rows


def divide(table, ratios, method="stratified", seed=0):
    """Return the part of each row (N,), dividing as split() does, but into any number of parts.

    Rows that answers added are in no part, -1, unless an identical image is in one.
    """
    if any(table.added):
        old = np.flatnonzero(~table.is_added)
        part = np.full(len(table), -1)
        part[old] = divide(table.subset(old), ratios, method, seed)
        return _follow_copies(table, part)

    ratios = np.asarray(ratios, float) / np.sum(ratios)
    units = _units(table)
    sizes = np.bincount(units)
    wanted = np.flatnonzero(ratios)
    if len(sizes) < len(wanted):
        what = "objects" if table.objects else "images"
        raise InputError(f"{len(sizes)} {what} are too few for {len(wanted)} splits: add some, or "
                         "change --split or --folds")

    # From here on units are divided, not rows, in a random order.
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sizes))
    part = np.empty(len(sizes), int)
    if method == "random":
        # A unit goes to the part in which its middle falls on a line of all images.
        done = (np.cumsum(sizes[order]) - sizes[order] / 2) / sizes.sum()
        part[order] = np.searchsorted(np.cumsum(ratios)[:-1], done, side="right")
    else:
        # Unknown labels count as absent here: only known positives are spread.
        targets = table.targets if table.before is None else table.before
        place = np.argsort(order)[units]  # of the unit of each row, in the random order
        positives = np.empty((targets.shape[1], len(sizes)), np.float32)
        for start in range(0, len(positives), 16):  # single columns of the table are slow to read
            columns = np.ascontiguousarray(targets[:, start : start + 16].T)
            for counts, column in zip(positives[start:], columns):
                counts[:] = np.bincount(place[column == 1], minlength=len(sizes))
        part[order] = _stratified_parts(positives, sizes[order], ratios)

    # With tiny data a split may be empty: it gets a unit of the largest one.
    for empty in set(wanted) - set(part):
        part[rng.choice(np.flatnonzero(part == np.bincount(part).argmax()))] = empty
    return part[units]


def _units(table):
    """Number the groups of rows that must stay in one split: of one object, or identical images.

    For example, if rows 0 and 1 show one object, and rows 1 and 2 are the same picture, then 0, 1
    and 2 are one unit. Rows that share an object or a picture take the lowest number among them,
    until nothing changes: 0 1 2 becomes 0 0 2 by the object, and 0 0 0 by the picture. Returns an
    int array (N,).
    """
    keys = []
    if table.objects:
        # A row without a name is an object of its own, so its key is its number.
        keys.append([name or row for row, name in enumerate(table.objects)])
    if table.copies:
        keys.append(table.copies)

    # Each name becomes the first row that has it, since numbers are compared faster than names.
    firsts = []
    for names in keys:
        first = dict(zip(reversed(names), reversed(range(len(table)))))
        firsts.append(np.fromiter(map(first.get, names), int, len(table)))

    units = np.arange(len(table))
    while True:
        before = units
        for first in firsts:
            lowest = np.full(len(table), len(table))
            np.minimum.at(lowest, first, units)
            units = lowest[first]
        if (units == before).all():
            return np.unique(units, return_inverse=True)[1]


def _stratified_parts(positives, sizes, ratios):
    """Assign units to parts: those of the rarest label first, to the part that still lacks it most.

    For example, with 4 cracks, 90 rusts and ratios 0.75 and 0.25, the cracks are assigned 3 and 1
    while every part still has room; had the rusts gone first, the four units might all have landed
    in one part.

    Args: positives (C, U), how often a unit has a label; sizes (U,), in rows; ratios (K,).
    Returns: the part of each unit (U,); units that are alike are assigned in the order given.
    """
    part = np.full(len(sizes), -1)
    wanted = ratios[:, None] * positives.sum(axis=1, dtype=float)  # (K, C), lacking in each part
    room = (ratios * sizes.sum()).tolist()  # images that each part still lacks
    parts = np.flatnonzero(ratios).tolist()  # others get nothing, even if these have all they want
    left = np.count_nonzero(positives, axis=1)

    while left.any():
        label = np.argmin(np.where(left > 0, left, np.inf))
        units = np.flatnonzero((positives[label] > 0) & (part < 0))
        lacking = wanted[:, label].tolist()  # plain numbers, as arrays are slow one by one
        chosen = []
        for count, size in zip(positives[label, units].tolist(), sizes[units].tolist()):
            # Among parts that lack the label equally, the one with most room takes the unit.
            k = max(parts, key=lambda k: (lacking[k], room[k]))
            chosen.append(k)
            lacking[k] -= count
            room[k] -= size

        # Their other labels are no longer lacking, either. They are subtracted unit by unit, since
        # subtracting their sum might round differently, and so break a tie differently.
        part[units] = chosen
        for k in parts:
            taken = positives[:, units[part[units] == k]]
            wanted[k] = np.subtract.reduce(np.column_stack([wanted[k], taken]), axis=1)
            left -= np.count_nonzero(taken, axis=1)

    # Units without a positive fill what room is left.
    units = np.flatnonzero(part < 0)
    for unit, size in zip(units.tolist(), sizes[units].tolist()):
        part[unit] = k = max(parts, key=room.__getitem__)
        room[k] -= size
    return part


# --------------------------------------------------------------------------------------------------
# Images


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXIF_TRANSPOSE = {  # EXIF orientation -> what makes an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
# Errors that are worth a second try: network drives, and too many open files.
TRANSIENT_ERRORS = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ETIMEDOUT}

# Pillow warns of images over 89 megapixels. Those of twice that size are errors, which is enough.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image(image, size=None, within=None):
    """Return an image as a PIL image in mode RGB, upright by its EXIF orientation.

    Transparent pixels are laid on white, 16-bit and float images keep their contrast, and of an
    animation the first frame is taken.

    Args:
        image: a path, a file object, bytes, a PIL image, or a uint8 array (H, W, 3). Files must
            have one of IMAGE_FORMATS.
        size: resize the result to (size, size).
        within: shrink the result, keeping its proportions, so that no side is longer.

    Raises ImageError.
    """
    try:
        try:
            return _load_image(image, size, within)
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise
            time.sleep(0.1)  # long enough for another thread to close a file, too short to be noticed
            return _load_image(image, size, within)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything when the bytes are broken
        raise ImageError(f"{image_name(image)}: {_reason(error)}") from error


def _reason(error):
    """Say in a few words why an image cannot be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a readable format such as JPEG or PNG"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def image_name(image):
    """Return what messages call an image."""
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    return getattr(image, "filename", "") or f"an image given as {type(image).__name__}"


def _load_image(image, size, within):
    """Load an image as load_image() does, but raise whatever Pillow raises."""
    image = _open_image(image)
    turn = EXIF_TRANSPOSE.get(image.getexif().get(0x0112))

    # A JPEG is decoded at a fraction of its size, which is faster; twice the side loses nothing.
    drafted = None
    if side := size or within:
        drafted = image.draft("RGB", (2 * side, 2 * side))
    image = _to_rgb(image)

    if size:
        # At a fraction of the size, the last row and column may hold only part of a pixel.
        box = drafted[1] if drafted else None
        image = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    elif within:
        image.thumbnail((within, within), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return image.transpose(turn) if turn else image


def _open_image(image):
    """Open what load_image() accepts as a PIL image, which need not be decoded yet."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if isinstance(image, (bytes, bytearray)):
        return Image.open(io.BytesIO(image), formats=readable_formats())
    if not isinstance(image, Image.Image):
        if isinstance(image, (str, os.PathLike)):
            _refuse_pipe(image)
        return Image.open(image, formats=readable_formats())

    # The caller's image must not change: if it is not decoded yet, its file is opened once more.
    if getattr(image, "tile", None) and getattr(image, "fp", None):
        if image.format not in IMAGE_FORMATS:
            raise ValueError(f"{image.format} images are not decoded here: call its load() first, or "
                             "convert it to PNG")
        image.fp.seek(0)
        return Image.open(image.fp, formats=readable_formats())
    return image.copy()


def _refuse_pipe(path):
    """Raise OSError if a path leads to a pipe or a device, since reading it might never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder has an error of its own
        raise OSError(errno.EINVAL, "a pipe or a device, not a file")


@cache
def readable_formats():
    """Return the names in IMAGE_FORMATS that this version of Pillow can open.

    Pillow itself would look at the first bytes of a file, whatever its name, and try all its
    formats. Some of them run programs: for a PostScript file called photo.jpg it starts
    Ghostscript.
    """
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _to_rgb(image):
    """Convert an image to mode RGB, with 8 bits per channel and transparent pixels on white."""
    # Images of 16 bits and more are scaled to 8 bits: Pillow would clip them.
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0).clip(0)
        highest = values.max()
        if image.mode == "F" and highest <= 1:
            values = values * 255
        elif highest > 255:
            values = values / 2.0 ** (int(highest).bit_length() - 8)
        image = Image.fromarray(values.astype(np.uint8))

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageDataset(torch.utils.data.Dataset):
    """Serve the images of a LabelTable: [i] is (uint8 (3, size, size), targets float32 (C,), id).

    An image that cannot be read becomes grey, with unknown labels, so that training ignores it;
    `errors` says why: {row: message}. With a PixelCache, the images of the table must be paths.
    """

    def __init__(self, table, size, cache=None):
        self.table = table
        self.size = size
        self.cache = cache
        self.errors = {}
        self.targets = torch.from_numpy(table.targets.copy())

    def __len__(self):
        return len(self.table)

    def __getitem__(self, row):
        return torch.from_numpy(self.pixels(row)).permute(2, 0, 1), self.targets[row], self.table.ids[row]

    def pixels(self, row):
        """Return one image as uint8 (size, size, 3)."""
        load = self.cache.load if self.cache else load_pixels
        try:
            return load(self.table.paths[row], self.size)
        except ImageError as error:
            self.errors[row] = str(error)
            self.targets[row] = math.nan
            # 127 is the middle of the range, and so close to 0 after normalize().
            return np.full((self.size, self.size, 3), 127, np.uint8)


def load_pixels(image, size):
    """Return an image as uint8 (size, size, 3). Raises ImageError."""
    return np.array(load_image(image, size))


CACHE_OVERHEAD = 4096  # bytes per cached image beside its pixels: objects, and the rest of a page


class PixelCache:
    """Decode each image once, as long as the pixels of all images fit into `limit` bytes.

    The ImageDatasets of several splits and folds may share a cache, and threads may use it.
    """

    def __init__(self, limit):
        self._room = limit
        self._held = {}  # {(path, size): pixels, or a message if the file cannot be read}
        self._lock = threading.Lock()

    def load(self, path, size):
        """Return an image as uint8 (size, size, 3). Raises ImageError."""
        held = self._held.get((path, size))
        if held is None:
            try:
                held = load_pixels(path, size)
            except ImageError as error:
                held = str(error)
            self._hold((path, size), held)
        if isinstance(held, str):
            raise ImageError(held)
        return held

    def _hold(self, key, pixels):
        """Keep the pixels of an image, or the message about it, if there is room for them."""
        cost = CACHE_OVERHEAD + (0 if isinstance(pixels, str) else pixels.nbytes)
        with self._lock:  # two threads may have decoded the same image
            if cost <= self._room and key not in self._held:
                self._room -= cost
                self._held[key] = pixels

    def close(self):
        """Forget all images, even if something still refers to the cache, and keep no others."""
        with self._lock:
            self._room = 0
            self._held.clear()


def batches(dataset, order, workers=2, pin=False):
    """Yield the batches of an ImageDataset, decoded ahead by threads.

    Args:
        dataset: an ImageDataset.
        order: the row numbers of each batch.
        workers: number of threads, each of which decodes a batch; Pillow does not hold the
            interpreter meanwhile. 0 decodes when asked.
        pin: put images into page-locked memory, from which a GPU copies in the background.

    Yields (images uint8 (B, 3, S, S), channels_last; targets (B, C); rows).
    """

    def load(rows):
        rows = np.array(rows)
        pixels = np.stack([dataset.pixels(int(row)) for row in rows])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return images.pin_memory() if pin else images, dataset.targets[rows], rows

    if workers == 0:
        yield from map(load, order)
        return

    # One batch more than there are threads is ahead, so that no thread waits while a batch is used.
    order = iter(order)
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(load, rows) for rows in islice(order, workers + 1))
        try:
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(load, rows) for rows in islice(order, 1))
                yield batch
        finally:
            for future in ahead:
                future.cancel()


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Return images (B, 3, H, W) in 0..255 as float32, normalized as ImageNet networks expect."""
    mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1) * 255
    shift, scale = send(torch.stack([-mean / std, 1 / std]), images.device)
    return torch.addcmul(shift, images.float(), scale)


def send(tensor, device):
    """Copy a tensor of the CPU to a device; to a GPU in the background."""
    if device.type != "cuda":
        return tensor.to(device)
    # Only from page-locked memory does a copy not wait for all that the GPU has still to do.
    return tensor.pin_memory().to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# Augmentation of a whole batch: turns, shifts and stretches are one matrix and one sampling


LEVELS = {"none": (), "light": ("flip", "crop"),
          "rich": ("resized_crop", "flip", "rotation", "perspective", "jitter", "erasing")}
OPERATIONS = ("flip", "vflip", "rotation", "crop", "resized_crop", "perspective", "jitter", "erasing")
NOISE = ("flip", "vflip", "angle", "shift_x", "shift_y", "area", "ratio", "tilt_x", "tilt_y", "perspective",
         "saturation", "contrast", "brightness", "erasing", "box_area", "box_ratio", "box_y", "box_x")


def read_operations(text):
    """Return the OPERATIONS that a level, or names with commas, stand for. Raises InputError."""
    names = LEVELS.get(text, tuple(text.split(",")))
    wrong = [name for name in names if name not in OPERATIONS]
    if wrong:
        raise InputError(f"--augment {text}: {wrong[0]!r} is not one of "
                         f"{', '.join([*LEVELS, *OPERATIONS])}")
    return names


def draw_noise(count, seed, epoch):
    """Return random numbers in [0, 1), (count, len(NOISE)), to augment the images of an epoch.

    They depend on the seed and the epoch alone, so neither threads nor a resume change an image.
    """
    # The factor is larger than any number of epochs, so that no two pairs share a seed.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.rand(count, len(NOISE), generator=generator)


def augment(images, operations, noise):
    """Change each image in its own random way.

    Args:
        images: (B, 3, H, W) in 0..255.
        operations: names in OPERATIONS.
        noise: (B, len(NOISE)) from draw_noise().

    Returns images of the same shape and range, float32.
    """
    images = images.float()
    noise = dict(zip(NOISE, noise.unbind(1)))

    # A flip alone moves whole pixels; everything else that moves pixels needs sampling.
    if {"rotation", "crop", "resized_crop", "perspective"} & set(operations):
        images = _sample(images, _geometry(operations, noise))
    else:
        for name, axis in (("flip", 3), ("vflip", 2)):
            if name in operations:
                images = torch.where(noise[name].view(-1, 1, 1, 1) < 0.5, images.flip(axis), images)

    if "jitter" in operations:
        images = _jitter(images, noise)
    if "erasing" in operations:
        images = torch.where(_boxes(noise, *images.shape[2:]), 127.0, images)  # grey
    return images


MIXES = ("mixup", "cutmix")


def mix(images, kind, rng):
    """Mix each image of a batch with the one before it.

    Args:
        images: (B, 3, H, W), float32.
        kind: "mixup" adds the pixels (Zhang et al. 2018, alpha 0.2); "cutmix" pastes a box (Yun et
            al. 2019, alpha 1).
        rng: numpy's random generator; share and box are the same for the whole batch.

    Returns (images, the share of each image in its mixture, 0 to 1).
    """
    others = images.roll(1, 0)
    if kind == "mixup":
        share = rng.beta(0.2, 0.2)
        return torch.lerp(others, images, share), share

    height, width = images.shape[2:]
    side = math.sqrt(rng.random())  # so the share of the box in the area is uniform
    box_height, box_width = round(side * height), round(side * width)
    top = rng.integers(height - box_height + 1)
    left = rng.integers(width - box_width + 1)
    box = (..., slice(top, top + box_height), slice(left, left + box_width))
    images = images.clone()
    images[box] = others[box]
    return images, 1 - box_height * box_width / (height * width)


def _geometry(operations, noise):
    """Return matrices (B, 3, 3) that map points of the output, in [-1, 1], to the input.

    The operations are multiplied in the order in which the input undergoes them: a crop, then a
    turn of the cropped image, then a flip of the turned one. Since it is one matrix, the image is
    sampled, and so blurred, only once.
    """
    signed = {name: 2 * values - 1 for name, values in noise.items()}
    one = torch.ones_like(noise["flip"])
    zero = torch.zeros_like(one)

    def matrix(a=one, b=zero, x=zero, c=zero, d=one, y=zero, p=zero, q=zero):
        return torch.stack([a, b, x, c, d, y, p, q, one], dim=1).view(-1, 3, 3)

    def crop(width, height):  # anywhere in the image
        return matrix(a=width, x=(1 - width) * signed["shift_x"],
                      d=height, y=(1 - height) * signed["shift_y"])

    total = matrix()
    if "resized_crop" in operations:  # at least half of the area, to keep labels visible
        area = 0.5 + 0.5 * noise["area"]
        ratio = (4 / 3) ** signed["ratio"]
        total = total @ crop((area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1))
    if "crop" in operations:  # 224 of 256 pixels, as AlexNet and ResNet did
        total = total @ crop(one * 224 / 256, one * 224 / 256)
    if "rotation" in operations:  # up to 10 degrees, as a photographer may tilt the camera
        angle = signed["angle"] * math.radians(10)
        total = total @ matrix(a=angle.cos(), b=-angle.sin(), c=angle.sin(), d=angle.cos())
    if "perspective" in operations:  # in half of the images, one side is up to 1.5 times as long
        strength = 0.2 * (noise["perspective"] < 0.5)
        total = total @ matrix(p=strength * signed["tilt_x"], q=strength * signed["tilt_y"])

    if "flip" in operations:
        total = total @ matrix(a=torch.where(noise["flip"] < 0.5, -one, one))
    if "vflip" in operations:
        total = total @ matrix(d=torch.where(noise["vflip"] < 0.5, -one, one))
    return total


def _sample(images, matrix):
    """Return images (B, 3, H, W) as seen through matrices (B, 3, 3) of _geometry()."""
    batch, _, height, width = images.shape
    x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1  # the middles of the pixels
    y = (torch.arange(height, device=images.device) * 2 + 1) / height - 1
    ones = torch.ones(height, width, device=images.device)
    points = torch.stack([*torch.meshgrid(x, y, indexing="xy"), ones], -1).view(1, -1, 3)

    grid = points @ matrix[:, :2].transpose(1, 2)
    grid /= points @ matrix[:, 2:].transpose(1, 2)
    grid = grid.view(batch, height, width, 2)
    if images.device.type == "mps":  # where grid_sample() silently gets channels_last wrong
        images = images.contiguous()
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _jitter(images, noise):
    """Scale saturation, contrast and brightness, each by 0.8 to 1.2."""
    names = ("saturation", "contrast", "brightness")
    saturation, contrast, brightness = ((0.8 + 0.4 * noise[name]).view(-1, 1, 1, 1) for name in names)
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, saturation)
    images = torch.lerp(images.mean(dim=(1, 2, 3), keepdim=True), images, contrast)
    return (images * brightness).clamp(0, 255)


def _boxes(noise, height, width):
    """Return masks (B, 1, H, W), bool: in a quarter of the images a box of 2 to 20 % of the area."""
    area = 0.02 + 0.18 * noise["box_area"]
    ratio = 3 ** (2 * noise["box_ratio"] - 1)  # sides 1:3 to 3:1, alike in both directions

    def inside(pixels, size, place):  # (B, pixels): True between the two edges of the box
        start = ((1 - size) * place)[:, None]
        middles = (torch.arange(pixels, device=size.device) + 0.5) / pixels
        return (middles >= start) & (middles < start + size[:, None])

    rows = inside(height, (area * ratio).sqrt(), noise["box_y"])
    columns = inside(width, (area / ratio).sqrt(), noise["box_x"])
    chosen = (noise["erasing"] < 0.25).view(-1, 1, 1, 1)
    return chosen & rows[:, None, :, None] & columns[:, None, None, :]


# --------------------------------------------------------------------------------------------------
# Summary and sheet: what a data folder holds


BLACK, GREY, GREEN, RED, BLUE = "#222222", "#767676", "#1b7837", "#b2182b", "#1f4e9c"
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc",
         "malgun.ttf", "arial.ttf")  # system fonts for letters that Pillow's own font lacks


@cache
def load_font(size, text=""):
    """Return a font of `size` pixels with the letters of `text`: Pillow's own or a system font."""
    fonts = [ImageFont.load_default(size)]
    if not has_letters(fonts[0], text):
        for name in FONTS:
            with contextlib.suppress(OSError):
                fonts.append(ImageFont.truetype(name, size))
    return next((font for font in fonts if has_letters(font, text)), fonts[0])


def has_letters(font, text):
    """Return True if a font can draw every letter of a text."""
    box = bytes(font.getmask("\uffff"))  # no font has this letter: this is how missing ones look
    letters = [letter for letter in set(text) if ord(letter) > 126 and not letter.isspace()]
    return all(bytes(font.getmask(letter)) != box for letter in letters)


def picture_names(classes):
    """Return class names for pictures: "class 3", with a warning, where no font has the letters."""
    names = [name if has_letters(load_font(13, name), name) else f"class {c}"
             for c, name in enumerate(classes)]
    lacking = [name for name, shown in zip(classes, names) if name != shown]
    if lacking:
        print_text(f"warning: no font here has the letters of {', '.join(lacking[:3])}: "
                   "pictures show their numbers", file=sys.stderr)
    return names


def draw_sheet(cells, title, columns=6, width=200):
    """Draw pictures in rows with words under them. cells: [(PIL image, [(text, colour)]), ...]."""
    columns = max(1, min(columns, len(cells)))
    gap = 14  # pixels, the height of a line
    total = columns * (width + gap) + gap
    # Letters are 17 pixels high in the heading and 13 under pictures, which is easy to read.
    heading = _draw_words([(title, BLACK)], total - 2 * gap, 17)
    pasted = [(heading, gap, 10)]  # (image, left, top)

    # The pictures of a row stand on one line, as the words under them must be at the same height.
    bottom = heading.height + 16
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        pictures = [ImageOps.contain(picture, (width, width)) for picture, _ in row]
        words = [_draw_words(lines, width, 13) for _, lines in row]
        middle = bottom + max(picture.height for picture in pictures)
        for column, (picture, part) in enumerate(zip(pictures, words)):
            left = gap + column * (width + gap)
            pasted.append((picture, left + (width - picture.width) // 2, middle - picture.height))
            pasted.append((part, left, middle + 5))
        bottom = middle + max(part.height for part in words) + gap + 12

    # Only now the height of the sheet is known.
    sheet = Image.new("RGB", (total, bottom), "white")
    for image, left, top in pasted:
        sheet.paste(image, (left, top))
    return sheet


def _draw_words(lines, width, size):
    """Return an image of this width with lines [(text, colour), ...], each wrapped to four at most."""
    wrapped = []
    for text, colour in lines:
        parts = textwrap.wrap(text, max(8, int(width / size * 2)), max_lines=4, placeholder=" ...")
        wrapped += [(part, colour) for part in parts]
    image = Image.new("RGB", (width, max(1, len(wrapped) * (size + 4))), "white")
    pen = ImageDraw.Draw(image)
    for number, (text, colour) in enumerate(wrapped):
        pen.text((0, number * (size + 4)), text, colour, load_font(size, text))
    return image


def list_names(names, chosen):
    """Return the names of the chosen classes, boolean (C,), as text."""
    return ", ".join(names[c] for c in np.flatnonzero(chosen))


def label_sheet(table, count=24, seed=0):
    """Return a PIL image with a random sample of a table's images and their labels."""
    # A fixed seed, so that the sheet is the same each time and can be compared after a correction.
    rows = np.random.default_rng(seed).permutation(len(table))[:count]
    names = picture_names(table.classes)
    cells = []
    for row in watched("drawing the sheet", sorted(rows)):
        present = list_names(names, table.targets[row] == 1)
        lines = [(table.ids[row], BLACK), (present or "no label", GREEN)]
        unknown = np.isnan(table.targets[row])
        if unknown.any():
            lines.append((f"NA: {list_names(names, unknown)}", GREY))

        try:
            picture = load_image(table.paths[row], within=200)
        except ImageError as error:
            picture = Image.new("RGB", (8, 8), "#dddddd")
            lines.append((str(error).rpartition(": ")[2], RED))
        cells.append((picture, lines))
    return draw_sheet(cells, f"{len(cells)} of {len(table)} images")


def distinct_names(paths):
    """Return a file name for each path, with its folder or a number if another has the same stem."""
    taken = set()
    names = []
    for path in map(Path, paths):
        stem = path.stem if path.stem not in taken else f"{path.parent.name}_{path.stem}"
        number = 1
        while stem in taken:
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem)
        names.append(stem + path.suffix)
    return names


def summary(table, title="data", most=30):
    """Describe a LabelTable as text: how its files were read, and the labels of each class.

    A class has its positives, negatives, NA, prevalence, and a bar of # for positives, - for
    negatives and blank for NA. Of more than `most` classes, those with the fewest and the most
    positives are shown.
    """
    rows = len(table) + table.merged + len(table.missing)
    merged = f"{table.merged} merged with another row of the image, " if table.merged else ""
    lines = [f"{title}: {rows} rows, {len(table)} images, {len(table.missing)} missing, {merged}"
             f"{len(table.classes)} classes"]

    lines += [f"  {note}" for note in table.notes]
    if table.parts:
        counts = Counter(part or "to be divided" for part in table.parts)
        text = ", ".join(f"{count} {part}" for part, count in counts.items())
        lines.append(f"  the data's own split: {text}")

    if table.missing:
        lines.append(f"missing: {shortened(table.missing)}")
    lines += [f"warning: {warning}" for warning in table.warnings + single_valued_classes(table)]
    return "\n".join(lines + _class_lines(table, most))


def _class_lines(table, most):
    """Return the lines of summary() that are a table of the classes."""
    positives = np.count_nonzero(table.targets == 1, axis=0)
    negatives = np.count_nonzero(table.targets == 0, axis=0)
    group_of = {name: group for group, names in table.groups.items() for name in names}
    width = max(5, *map(len, table.classes))
    header = f"{'class':{width}} {'positives':>9} {'negatives':>9} {'NA':>7} {'prevalence':>10}"
    rows = []
    for name, positive, negative in zip(table.classes, positives, negatives):
        known = positive + negative
        share = f"{positive / known:10.1%}" if known else f"{'n/a':>10}"
        # Rounded up, so that a single positive shows. A folder without labels has no rows.
        full = math.ceil(20 * positive / max(1, len(table)))
        bar = "#" * full + "-" * (math.ceil(20 * known / max(1, len(table))) - full)
        rows.append(f"{name:{width}} {positive:9} {negative:9} {len(table) - known:7} {share}  {bar:20}  "
                    f"{group_of.get(name, '')}".rstrip())

    if len(rows) > most:
        order = np.argsort(positives, kind="stable")
        half = most // 2
        between = f"... {len(rows) - 2 * half} classes between the rarest and the most frequent"
        rows = [*(rows[c] for c in order[:half]), between, *(rows[c] for c in order[-half:])]
    return [f"{header}  {'':20}  group" if group_of else header, *rows]


def single_valued_classes(table):
    """Return warnings about classes without a known positive or without a known negative."""
    lines = []
    for value, word in ((1, "positive"), (0, "negative")):
        lacking = ~(table.targets == value).any(axis=0)
        if lacking.any():
            lines.append(f"no known {word}: "
                         f"{shortened([table.classes[c] for c in np.flatnonzero(lacking)])}")
    return lines


def shortened(names, most=10):
    """Return names as text, but only the first `most` of them and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def pairs_summary(table, most=10):
    """Return the pairs of classes that are most often positive together, as text."""
    positive = (table.targets == 1).astype(np.float32)
    first, second = np.triu_indices(len(table.classes), k=1)
    together = (positive.T @ positive)[first, second]
    lines = []
    for pair in np.argsort(-together, kind="stable")[:most]:
        if together[pair]:
            lines.append(f"{int(together[pair]):9}  {table.classes[first[pair]]} + "
                         f"{table.classes[second[pair]]}")
    return "\n".join(["most frequent pairs:", *lines]) if lines else "no two classes are positive together"


def images_summary(table, most=1000):
    """Describe the sizes, modes and formats of about `most` of a table's images, by their headers.

    Raises InputError if none of them can be opened; single bad images are listed by --check.
    """
    sizes = []
    kinds = Counter()
    errors = []
    # Of more than `most` images, every n-th one is opened, as a network drive may be slow.
    for path in watched("opening images", table.paths[:: -(-len(table) // most)]):
        try:
            with _open_image(path) as image:
                sizes.append(image.size)
                kinds[f"{image.mode} {image.format}"] += 1
        except Exception as error:  # Pillow's decoders raise anything when the bytes are broken
            errors.append(f"{path}: {_reason(error)}")
    if not sizes:
        raise InputError(f"none of {len(errors)} images can be opened, such as {errors[0]}: "
                         "convert them to JPEG or PNG")

    low, middle, high = np.sort(sizes, axis=0)[[0, len(sizes) // 2, -1]]
    return (f"{len(sizes)} of {len(table)} images opened: width {low[0]} to {high[0]}, median {middle[0]}; "
            f"height {low[1]} to {high[1]}, median {middle[1]}\n"
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))


def find_bad_images(table, workers):
    """Decode every image and return a message for each that cannot be read."""

    def problem(path):
        try:
            load_image(path)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = watched("decoding images", pool.map(problem, table.paths), len(table))
        return [message for message in found if message]


# --------------------------------------------------------------------------------------------------
# Demo data: drawn photographs of machine parts and their defects


DEMO_GROUPS = {"parts": ["bolt", "bracket", "ring"], "defects": ["rust", "crack", "hole"]}
DEMO_LABELS = [*DEMO_GROUPS["parts"], *DEMO_GROUPS["defects"]]
DEMO_SIZE = 80  # pixels; drawn at twice that size and reduced, which smooths edges
DARK = (25, 25, 25)


def write_demo(folder, seed=0, count=1000):
    """Write `count` drawn photographs and their labels, of which 8 % are NA; a seed fixes them all.

    Raises InputError if the folder holds something else.
    """
    folder = Path(folder)
    marker = folder / "label_groups.json"
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and not (marker.is_file() and _read_json(marker) == DEMO_GROUPS):
        raise InputError(f"{folder} is not empty, and not demo data: name a new folder")
    write_json(marker, DEMO_GROUPS)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "labels.txt").unlink(missing_ok=True)  # of another demo: the folder is not complete now

    lines = [" ".join(["image", *DEMO_LABELS])]
    for i in watched("drawing the demo data", range(count)):
        # Each image has its own generator, so image i does not depend on how many are written.
        rng = np.random.default_rng([seed, i])
        labels = draw_demo_labels(rng)
        draw_demo_image(labels, rng)[0].save(folder / "images" / f"part_{i:04}.jpg", quality=88)
        cells = [str(int(name in labels)) if rng.random() >= 0.08 else "NA" for name in DEMO_LABELS]
        lines.append(" ".join([f"part_{i:04}.jpg", *cells]))
    write_text(folder / "labels.txt", lines)  # written last: once it is there, the folder is complete


def demo_is_drawn(folder):
    """Return True if a folder has labels, unless the images are those of an older version's demo."""
    first = Path(folder) / "images" / "part_0000.jpg"
    with contextlib.suppress(OSError), Image.open(first) as image:
        if image.size != (DEMO_SIZE, DEMO_SIZE):
            return False
    return (Path(folder) / "labels.txt").exists()


def draw_demo_labels(rng):
    """Return up to four labels: rust is common on bolts, cracks on brackets, and holes are rare."""
    chances = {"bolt": 0.45, "bracket": 0.4, "ring": 0.35}
    parts = {name for name, chance in chances.items() if rng.random() < chance}
    chances = {"rust": 0.5 if "bolt" in parts else 0.15,
               "crack": 0.45 if "bracket" in parts else 0.15, "hole": 0.055}
    labels = parts | {name for name, chance in chances.items() if rng.random() < chance}
    return labels if len(labels) <= 4 else draw_demo_labels(rng)  # an image has four places


def draw_demo_image(labels, rng):
    """Draw a photograph with up to four labels.

    Returns (image, {label: (left, top, right, bottom)}).
    """
    # Grain, and clutter that is no label; without it, a network could just count edges.
    side = 2 * DEMO_SIZE
    grain = _smooth_noise(rng, (side, 12), 7) + _smooth_noise(rng, (6, 6), 14)
    image = _to_image(np.array(_colour(rng)) + grain[..., None])
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 6)):
        corners = rng.normal(0, rng.uniform(4, 18), (rng.integers(2, 6), 2))
        _polygon(pen, *rng.integers(0, side, 2), corners, 0, _colour(rng, 10, 245), outline=None)

    # Each label has its own quarter, shifted by up to 12 pixels: labels may overlap a little, or be
    # cut off at the edge, but none hides another. Parts are drawn first, and defects over them.
    middles = [(x, y) for x in (42, 118) for y in (42, 118)]
    places = rng.permutation(middles) + rng.integers(-12, 13, (4, 2))
    boxes = {}
    for label, (x, y) in zip([name for name in DEMO_LABELS if name in labels], places):
        box = _draw_label(label, pen, x, y, rng)
        boxes[label] = tuple(int(min(max(edge / 2, 0), DEMO_SIZE)) for edge in box)

    # Light from one side, then blur and noise, as a camera adds them.
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-1, 1, side)
    slope = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    light = rng.uniform(0.65, 1.15) * (1 + rng.uniform(0, 0.35) * slope)
    image = _to_image(np.asarray(image) * light[..., None])
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2))).reduce(2)
    noise = rng.normal(0, rng.uniform(2, 8), (DEMO_SIZE, DEMO_SIZE, 3))
    return _to_image(np.asarray(image) + noise), boxes


def _colour(rng, low=40, high=215):
    """Return a random colour that is not very saturated."""
    return tuple((rng.integers(low, high) + rng.integers(-50, 51, 3)).clip(0, 255).tolist())


def _smooth_noise(rng, cells, strength):
    """Return noise around 0, (side, side), from a coarse grid of `cells` (rows, columns)."""
    grid = Image.fromarray(rng.normal(0, strength, cells).astype(np.float32))
    return np.asarray(grid.resize((2 * DEMO_SIZE, 2 * DEMO_SIZE), Image.Resampling.BICUBIC))


def _to_image(values):
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _polygon(pen, x, y, corners, angle, fill, outline=DARK, line=0):
    """Draw a polygon, or a line of width `line`, turned around (x, y), and return its box."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    corners = np.asarray(corners, float) @ turn + (x, y)
    points = [tuple(corner) for corner in corners.tolist()]
    if line:
        pen.line(points, fill=fill, width=line, joint="curve")
    else:
        pen.polygon(points, fill=fill, outline=outline, width=2)
    return (*corners.min(axis=0), *corners.max(axis=0))


def _star(radii):
    """Return the corners at the given distances from the middle, all around."""
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


def _draw_label(label, pen, x, y, rng):
    """Draw a part or a defect around (x, y) and return its box."""
    if label == "bolt":  # a hexagonal head with a slot, and a shadow
        radius = rng.uniform(26, 38)
        angle = rng.uniform(0, math.pi)
        _polygon(pen, x + 5, y + 6, _star([radius] * 6), angle, DARK)
        box = _polygon(pen, x, y, _star([radius] * 6), angle, _colour(rng, 60, 230))
        _polygon(pen, x, y, _star([radius * 0.6] * 24), angle, _colour(rng, 60, 230))
        _polygon(pen, x, y, [(-radius / 2, 0), (radius / 2, 0)], angle, DARK, line=6)

    elif label == "bracket":  # an angle plate with two holes
        size = rng.uniform(30, 42)
        angle = rng.uniform(0, 2 * math.pi)
        corners = np.array([(-1, -1), (-0.3, -1), (-0.3, 0.3), (1, 0.3), (1, 1), (-1, 1)]) * size
        _polygon(pen, x + 5, y + 6, corners, angle, DARK)
        box = _polygon(pen, x, y, corners, angle, _colour(rng, 60, 230))
        for hole in ((-0.65, -0.6), (0.6, 0.65)):
            _polygon(pen, x, y, _star([size * 0.18] * 12) + np.array(hole) * size, angle, DARK)

    elif label == "ring":  # a washer: a disc that is open in the middle
        radius = rng.uniform(22, 36)
        width = int(rng.integers(10, 15))
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse((box[0] + 5, box[1] + 6, box[2] + 5, box[3] + 6), outline=DARK, width=width)
        pen.ellipse(box, outline=_colour(rng, 60, 230), width=width)
        pen.ellipse(box, outline=DARK, width=2)

    elif label == "rust":  # a patch of many small brown and orange spots
        spots = rng.normal((x, y), rng.uniform(11, 17), (110, 2))
        for sx, sy in spots:
            radius = rng.uniform(1.5, 4.5)
            brown = (np.array([175, 88, 35]) * rng.uniform(0.5, 1.2)).astype(int)
            box = (sx - radius, sy - radius, sx + radius, sy + radius)
            pen.ellipse(box, fill=tuple(brown.tolist()))
        box = (*spots.min(axis=0), *spots.max(axis=0))

    elif label == "crack":  # a jagged dark line
        across = rng.uniform(6, 14, 9) * (-1) ** np.arange(9)
        points = np.stack([np.linspace(-45, 45, 9), across], axis=1)
        box = _polygon(pen, x, y, points, rng.uniform(0, 2 * math.pi), (15, 12, 12), line=6)

    else:  # a torn hole: black, with a jagged bright rim
        corners = _star(rng.uniform(24, 32) * rng.uniform(0.8, 1.2, 18) * np.tile([1.35, 0.75], 9))
        box = _polygon(pen, x, y, 1.3 * corners, 0, (235, 232, 225))
        _polygon(pen, x, y, corners, 0, (12, 10, 10))
    return box


# --------------------------------------------------------------------------------------------------
# Shared by all scripts: errors, a command line that fails with one line, writing files


class InputError(ValueError):
    """The input is wrong. The message names the file, the line or the option, and what to do."""

    def _render_traceback_(self):  # what IPython shows instead of a traceback
        return [f"error: {self}"]


class NoLabels(InputError):
    """A file has no column of labels, which is allowed for later files of divided data."""


class ImageError(ValueError):
    """A file cannot be read as an image. The message names the file and the reason."""


def run_command(main):
    """Run main(), and exit with 1 if it fails, 2 if the input is wrong, or 130 after Ctrl-C."""
    try:
        main()
    except InputError as error:
        fail(error, 2)
    # Memory errors are checked first, since OutOfMemoryError is a RuntimeError too.
    except (torch.cuda.OutOfMemoryError, MemoryError):
        fail("out of memory: try a lower -b (--batch-size), --size or --cache", 1)
    except (RuntimeError, OSError, ImageError) as error:
        fail(str(error).splitlines()[0] if str(error) else type(error).__name__, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Ctrl-C while Python exits, for example a second one, would print a traceback of torch.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


REPEATS = 0.5  # seconds


@contextlib.contextmanager
def signals_noted(note, message=""):
    """Let the first Ctrl-C or SIGTERM within the block only call note(number) and print a message.

    The second one acts at once.
    """
    noted = []

    def handle(number, _):
        now = time.monotonic()
        if not noted:
            noted.append(now)
            note(number)
            if message:
                with contextlib.suppress(OSError):  # print() is not safe: a signal may interrupt one
                    os.write(2, f"\n{message}\n".encode())
        # A repetition is no second request: timeout signals a process and its group, and SLURM all
        # processes of a job, to which torchrun then passes on what it got.
        elif now - noted[0] >= REPEATS:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(message, code):
    """Print an error and exit."""
    print_text(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def print_text(text="", file=None, end="\n"):
    """Print text; escape letters the terminal cannot show, and ignore a closed pipe."""
    Progress.erase()  # else the text would be appended to the line
    _print(text, file or sys.stdout, end)


def _print(text, file, end):
    """Print as print_text() does, whatever line of a Progress is on the screen."""
    try:
        print(text, file=file, end=end, flush=True)
    except UnicodeEncodeError:
        _print(text.encode("ascii", "backslashreplace").decode(), file, end)
    except (BrokenPipeError, ValueError):  # ValueError: the stream was closed
        # Python flushes the stream again at exit, which would fail too: now it leads nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Progress:
    """Show the progress of long work in a line that updates in place and is removed at the end.

    Nothing is shown in the first two seconds, without a terminal or notebook, and while
    Progress.shown is False. Call advance() from one thread only. Where one Progress is used within
    another, they share the line, and print_text() removes it before it prints.

        with Progress("checking images", len(paths)) as progress:
            for path in paths:
                check(path)
                progress.advance()  # checking images  1,200/2,000  85/s  0:00:09 left

    watched() does the same for any loop.
    """

    delay = 2  # seconds: what takes less needs no line
    shown = False  # main() of each script sets it: a program that imports these files stays silent
    line = None  # the stream and the width of the line on the screen, whichever Progress drew it

    def __init__(self, title, total):
        self.title = title
        self.total = total
        self.done = 0
        self.started = time.perf_counter()
        self.stream = live_stream() if Progress.shown else None
        self.due = self.started + self.delay if self.stream else math.inf  # of the next update

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.erase()

    def advance(self, count=1):
        """Note that `count` more are done."""
        self.done += count
        now = time.perf_counter()
        if now >= self.due:
            self.due = now + 0.2  # five times a second looks smooth
            self._draw(self.parts(now - self.started))

    def parts(self, seconds):
        """Return the parts of the line, of which _draw() leaves out some if the terminal is narrow.

        Args: seconds: the time since the start.
        """
        rate = self.done / seconds
        left = max(0, self.total - self.done) * seconds / max(1, self.done)
        rate = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
        return [self.title, f"{self.done:,}/{self.total:,}", rate, f"{format_seconds(left)} left"]

    def _draw(self, parts):
        """Replace the line on the screen."""
        # A line that fills the last column of a terminal may make it scroll.
        room = _count_columns(self.stream) - 1
        while len(parts) > 1 and len("  ".join(parts)) > room:
            del parts[-2 if len(parts) > 2 else -1]  # from the right, but the time left goes last
        line = "  ".join(parts)[:room]

        covered = min(Progress.line[1], room) if Progress.line else 0
        _print(f"\r{line:<{covered}}", self.stream, "")
        Progress.line = self.stream, len(line)

    @staticmethod
    def erase():
        """Remove the line from the screen, if there is one."""
        if Progress.line:
            (stream, width), Progress.line = Progress.line, None
            room = _count_columns(stream) - 1
            _print(f"\r{' ' * min(width + 2, room)}\r", stream, "")  # 2: of the ^C of a Ctrl-C


def watched(title, items, total=None):
    """Yield the items and show the progress of the loop over them.

    Args: title: as for Progress; total: number of items (default: their len()).
    """
    with Progress(title, len(items) if total is None else total) as progress:
        for item in items:
            yield item
            progress.advance()


def live_stream():
    """Return the stream on which a line can be overwritten, or None if there is none."""
    # stderr comes first, since predictions are printed to stdout. Notebooks show stderr in red.
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        return sys.stdout
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(AttributeError, ValueError):  # it is None, or closed
            if stream.isatty():
                return stream
    return None


def _count_columns(stream):
    """Return the width of a terminal in characters."""
    columns = 0
    with contextlib.suppress(AttributeError, OSError, ValueError):
        columns = os.get_terminal_size(stream.fileno()).columns
    # shutil asks only about stdout, which may be a file.
    return columns or shutil.get_terminal_size().columns


def format_seconds(seconds):
    """Format a time as hours, minutes and seconds: 0:03:20."""
    return str(datetime.timedelta(seconds=int(seconds)))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option that has one."""

    def _get_help_string(self, action):
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        none = action.default is False or action.default in (None, "", [])
        return action.help if none else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Parse options with HelpFormatter, and report a wrong option as an InputError."""

    def __init__(self, **settings):
        super().__init__(formatter_class=HelpFormatter, **settings)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def number(kind, low=0, below=math.inf):
    """Return a type= function for argparse: a number of at least `low` and less than `below`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            limit = "" if below == math.inf else f", below {below}"
            raise argparse.ArgumentTypeError(f"{text}: it must be a number from {low} up{limit}")
        return value

    parse.__name__ = kind.__name__  # argparse's own messages show it: invalid int value
    return parse


def refuse_to_replace(option, path, files):
    """Raise InputError if a file to be written is a folder, holds answers, or is one of `files`.

    Args: option: the option that names it; files: those that are read.
    """
    if os.path.isdir(path):
        raise InputError(f"{option} {path} is a folder: name a file")
    if not os.path.exists(path):
        return

    own = os.stat(path)  # compared by inode, which sees through links and different spellings
    for file in files:
        with contextlib.suppress(OSError):
            if os.path.samestat(own, os.stat(file)):
                raise InputError(f"{option} {path} would replace a file that is read: choose another")
    if holds_questions(path):
        refuse_answered(path)


def is_stream(path):
    """Return True if what is written to a path replaces no file: a pipe, a device, /dev/stdout."""
    return str(path).startswith("/dev/") or (os.path.exists(path) and not os.path.isfile(path))


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a temporary file that replaces `path` if the block succeeds, and is removed if it fails.

    Symlinks are followed. A stream (see is_stream()) is written directly. Raises OSError.
    """
    settings = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "surrogateescape"}
    direct = is_stream(path)
    target = Path(path if direct else os.path.realpath(path))
    temporary = target if direct else target.with_name(f".{target.name}.tmp")

    # In the same folder, since os.replace() is only atomic within a file system.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **settings) as file:
            yield file
            file.flush()
            if not direct:
                os.fsync(file.fileno())  # else a power cut could leave an empty file
        if not direct:
            os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if not direct:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_csv(path, rows):
    """Write rows (lists of cells, the header first), which may be a generator, as a CSV file."""
    with atomic_write(path) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_text(path, lines):
    """Write lines as a text file."""
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def to_json(value):
    """Return a value as JSON text; what is not finite becomes null, since JSON has no NaN."""
    # Python writes NaN and Infinity as bare words, which other programs cannot read.
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2, ensure_ascii=False)


def write_json(path, value):
    """Write a value as a JSON file."""
    write_text(path, [to_json(value)])


def write_png(path, image, **options):
    """Write a PIL image as a PNG file. options: those of Image.save()."""
    with atomic_write(path, "wb") as file:
        image.save(file, "PNG", **options)


if __name__ == "__main__":
    run_command(main)
