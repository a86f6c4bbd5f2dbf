"""Label files and images in, tensors out.

    python dataset.py data/                     # what is in a data folder, and how it was understood
    python dataset.py data/ --check             # and decode every image, and list identical ones
    python dataset.py data/ --sheet sheet.png   # and draw a sample of the images with their labels
    python dataset.py --demo data/demo          # write the demo data

    table = dataset.read_labels("data/")        # -> LabelTable; 1, 0 and NaN for an unknown label
    train, val, test = (table.subset(rows) for rows in dataset.split(table))
    images = dataset.ImageDataset(train, size=224)
    for batch, targets, rows in dataset.batches(images, [[0, 1, 2], [3, 4]]): ...

A LabelTable is the one currency between label files, splits, datasets and reports.
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import sys
import textwrap
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain, islice, takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

IMAGE_FORMATS = {  # the formats that are read, by Pillow's names: the suffixes of their files
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".mpo",), "PNG": (".png", ".apng"), "WEBP": (".webp",),
    "GIF": (".gif",), "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",), "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "TGA": (".tga",),
}
IMAGE_SUFFIXES = {suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes}
PARTS = ("train", "val", "test")


@dataclass
class LabelTable:
    """Images and their labels: row i is the image `paths[i]`, named `ids[i]`."""

    ids: list  # N names, as the label file writes them
    paths: list  # N files (or PIL images, bytes, arrays)
    targets: np.ndarray  # float32 (N, C): 1, 0, NaN where the label is unknown
    classes: list  # C names
    groups: dict = field(default_factory=dict)  # group name -> its class names; may be empty
    objects: list = field(default_factory=list)  # N objects that are shown: each stays in one split
    parts: list = field(default_factory=list)  # N of "train", "val", "test" or "": the data's own split
    copies: list = field(default_factory=list)  # N ids of the first image with the same bytes
    origins: list = field(default_factory=list)  # N places "FILE:LINE"; these four may be empty
    missing: list = field(default_factory=list)  # ids of rows that were dropped for lack of an image
    notes: list = field(default_factory=list)  # how the label file was understood, one line each
    warnings: list = field(default_factory=list)  # what was odd in the label file, one line each
    absent: float = math.nan  # what a class is that is not named: 0 in lists of what is there

    def __len__(self):
        return len(self.ids)

    def subset(self, rows):
        """The table of the given rows (an array of row numbers), in that order."""
        chosen = {}
        for name in ("ids", "paths", "objects", "parts", "copies", "origins"):
            values = getattr(self, name)
            chosen[name] = [values[i] for i in rows] if values else []
        return replace(self, targets=self.targets[rows], **chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Label files


@dataclass
class Reading:
    """What read_labels() is told instead of finding it out by looking: see add_data_options()."""

    label_groups: str = None
    group: str = None
    split_column: str = None
    image_column: str = None
    ignore: list = ()
    separator: str = None
    label_threshold: float = None
    negative: str = None
    unknown: str = None
    image_list: str = None


def read_labels(data_dir, labels=None, images=None, **how):
    """Read a data folder, whatever its label format -> LabelTable.

    labels: the label file, or the folder of .cls files; by default that of find_labels(). images:
    the image folder; by default DATA/images, or DATA itself. how: fields of Reading. Rows whose
    image is missing are dropped and listed in `missing`; `notes` says how the files were
    understood. Raises InputError.
    """
    data_dir = Path(data_dir)
    how = Reading(**how)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is not a folder: --data names the folder of labels and images")
    if images and not Path(images).is_dir():
        raise InputError(f"{images} is not a folder: --images names the image folder")
    default = data_dir / "images"
    folder = ImageFolder(images or (default if default.is_dir() else data_dir), data_dir)
    groups_file = Path(how.label_groups or data_dir / "label_groups.json")
    groups = _read_groups(groups_file) if how.label_groups or groups_file.is_file() else {}

    files = {"": _given_file(labels, data_dir)} if labels else find_labels(data_dir)
    tables = []
    lists = None  # whether the files hold lists: the first one decides
    for part, path in files.items():
        if path.is_dir():
            table = _read_cls(path, data_dir)
        else:
            table, lists = _read_file(path, groups, folder, how, lists)
        if part:
            table.parts = [part] * len(table)
        tables.append(table)
    table = _join_tables(tables)
    if len(files) > 1:
        table.notes.append(f"divided: {', '.join(f'{path} is {part}' for part, path in files.items())}")
    if groups:
        table = _apply_groups(table, groups, groups_file)
    table = _attach_images(table, folder)
    if how.split_column == "folder":
        table.parts = [_part_of_folder(path, folder.root) for path in table.paths]
        table.notes.append("split: by the folders below the image folder")
    return _find_copies(_unite_rows(table))


def add_data_options(parser):
    """Add --labels, --images and the options of Reading to a parser (or a group of one)."""
    add = parser.add_argument
    add("--labels", metavar="FILE", help="label file, when it is not found by looking")
    add("--images", metavar="DIR", help="image folder, when it is not DATA/images or DATA")
    add("--label-groups", metavar="FILE", help="JSON file {group: [class, ...]}; DATA/label_groups.json when there")
    add("--group", metavar="COLUMN", help="column of the physical object shown: its images stay in one split")
    add("--split-column", metavar="COLUMN", help="column with train, val or test (a column named split is found); "
        "folder: the folder below the image folder says it")
    add("--image-column", metavar="COLUMN", help="column that names the image, when it is not found by looking")
    add("--ignore", nargs="+", action="extend", default=[], metavar="COLUMN", help="columns that are no labels")
    add("--separator", metavar="TEXT", help="between the labels of a cell, when it is not ; | or ,")
    add("--label-threshold", type=number(float), metavar="T", help="labels from 0 to 1: present from T on")
    add("--negative", metavar="WORD", help="a cell that means absent, such as -1")
    add("--unknown", metavar="WORD", help="a cell that means unknown (NA), such as -1")
    add("--image-list", metavar="FILE", help="file of image names, for labels without any: a name per line")


def data_options(options):
    """The options of add_data_options() as keywords of read_labels()."""
    return {name: getattr(options, name) for name in ("labels", "images", *Reading.__dataclass_fields__)}


def find_labels(data_dir):
    """Look for label files -> {part: Path}; a single one, or one of .cls files, has part "". Raises
    InputError."""
    for name in ("labels.txt", "labels.csv", "labels.tsv", "image_data.csv"):
        if (data_dir / name).is_file():
            return {"": data_dir / name}
    divided = _find_divided(data_dir)
    if "train" in divided and len(divided) > 1:
        return divided
    if next((data_dir / "labels").rglob("*.cls"), None):
        return {"": data_dir / "labels"}
    found = _table_files(data_dir)
    if len(found) == 1:
        return {"": found[0]}
    names = ", ".join(path.name for path in found) or "no .txt, .csv or .tsv file"
    more = "; for a matrix of labels beside a list of images --labels MATRIX --image-list LIST" if found else ""
    raise InputError(f"{data_dir} has {names}: name the label file with --labels FILE, or call it labels.txt{more}")


def _table_files(folder):
    names = [path for path in folder.glob("*.*") if path.suffix.lower() in (".txt", ".csv", ".tsv") and path.is_file()]
    return sorted(path for path in names if not path.name.startswith("._"))


PART_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
              "test": "test", "testing": "test"}


def _find_divided(data_dir):
    """train.csv, train_metadata.csv, or the only table file of train/; val and test likewise."""
    divided = {}
    for path in _table_files(data_dir):
        part = PART_WORDS.get(path.stem.lower().removesuffix("_metadata"))
        if part in divided:
            raise InputError(f"{divided[part]} and {path} are both of {part}: remove one, or give --labels")
        if part:
            divided[part] = path
    for word, part in PART_WORDS.items():
        inside = _table_files(data_dir / word)
        if len(inside) == 1:
            divided.setdefault(part, inside[0])
    return {part: divided[part] for part in PARTS if part in divided}


def _given_file(name, data_dir):
    """A file that an option names, looked for in the working directory and in DATA."""
    for path in (Path(name), data_dir / name):
        if path.exists():
            return path
    raise InputError(f"{name} cannot be read: No such file or directory, nor in {data_dir}")


LONGEST_LINE = 2**20  # bytes; a longer one is not of a label file


def read_lines(path):
    """The lines of a text file in UTF-8, with or without BOM, any line end. Raises InputError."""
    content = bytearray()
    try:
        with open(path, "rb") as file:
            while part := file.read(LONGEST_LINE):
                if len(part) == LONGEST_LINE and not re.search(rb"[\r\n]", part):
                    raise InputError(f"{path} has a line of over {LONGEST_LINE} bytes: it is not a label file")
                content += part
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if b"\0" in content:
        raise InputError(f"{path} has zero bytes, as UTF-16 and binary files do: save it as text in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8: save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")


def _read_names(path):
    return [line.strip() for line in read_lines(path) if line.strip()]


def read_rows(path):
    """A table -> ([(line number, cells), ...] of lines not blank, delimiter). Raises InputError."""
    lines = read_lines(path)
    delimiter = _find_delimiter(path, next((line for line in lines if line.strip()), ""))
    if delimiter == " ":
        return [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()], delimiter
    rows = []
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}: is a quote left open?") from None
    return rows, delimiter


def _find_delimiter(path, line):
    if path.suffix.lower() == ".tsv":
        return "\t"
    delimiter = max(",;\t", key=line.count)
    blanks = len(re.findall(" +", line.strip()))
    if path.suffix.lower() != ".csv" and (blanks > line.count(delimiter) or delimiter not in line):
        return " "
    if line and delimiter not in line:
        raise InputError(f"{path}:1: no label column: separate cells by comma, semicolon or tab")
    return delimiter


DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", " ": "white space"}
ID_TITLES = ("id", "image_id", "imageid", "image", "images", "image_name", "image name", "image index", "filename",
             "file_name", "file name", "file", "path", "filepath", "file_path", "image_path", "img", "name")


def _read_file(path, groups, folder, how, lists):
    """A table or lists file -> (LabelTable without paths, lists: whether it was, or has to be)."""
    rows, delimiter = read_rows(path)
    if not rows:
        raise InputError(f"{path} is empty: it needs a line per image")
    values = LabelValues(how, decimal_comma=delimiter == ";")
    notes = [f"{path}: cells separated by {DELIMITER_NAMES[delimiter]}"]
    if len(rows) > 2 and rows[0][1] in ([str(len(rows) - 1)], [str(len(rows) - 2)]):
        notes.append(f"line {rows[0][0]} tells the number of rows")
        rows = rows[1:]
    if how.image_list:
        image_list = _given_file(how.image_list, path.parent)
        names = _read_names(image_list)
        if len(names) != len(rows):
            raise InputError(f"{image_list} names {len(names)} images, but {path} has {len(rows)} rows")
        rows = [(number, [name, *cells]) for name, (number, cells) in zip(names, rows)]
        notes.append(f"images: named by {image_list}")
    header, rows = _split_header(path, rows, delimiter, folder, values, notes)
    columns = _columns(path, header, rows, delimiter, values)
    title = how.image_column or _find_image_column(columns, folder)
    notes.append(f"images: in the column {title}" if title else "images: in a column without a title")
    table = LabelTable(_take(path, columns, title, "--image-column"), [], None, [], notes=notes)
    table.origins = [f"{path}:{number}" for number, _ in rows]
    for name in how.ignore:
        _take(path, columns, name, "--ignore")
    if how.group:
        table.objects = _take(path, columns, how.group, "--group")
    _read_parts(path, table, columns, how)

    columns = [Column(title, cells, values) for title, cells in columns.items()]
    if lists is None:
        known = how.image_column or title.lower() in ID_TITLES
        lists = delimiter != " " and bool(known) and _looks_like_lists(columns, groups)
    if lists:
        chosen = _read_lists(path, table, columns, groups, values, how)
    else:
        chosen = _read_table(path, table, columns, values, how)
    left_out = [column.title or "one without a title" for column in columns if column not in chosen]
    if left_out:
        table.warnings.append(f"columns that hold no labels were left out: {', '.join(left_out)}")
    return table, lists


def _split_header(path, rows, delimiter, folder, values, notes):
    """-> (titles, the other rows); titles are made up where the first row names an image."""
    number, cells = rows[0]
    if len(cells) < 2:
        raise InputError(f"{path}:{number}: no label column: the image comes first, then 0, 1 or NA for each class")
    labels = len(list(takewhile(lambda cell: values[cell] is not None, reversed(cells))))  # at the end
    name = cells[0]
    width = len(cells) - 1
    if delimiter == " " and 0 < labels < width:  # a file name may hold blanks
        name = " ".join(cells[: len(cells) - labels])
        width = labels
    if folder.names_image(name) or (0 < labels < len(cells) and len(set(cells[1:])) < len(cells) - 1):
        notes.append(f"no header: the image comes first, and the classes are called Attr1 to Attr{width}")
        return ["image", *(f"Attr{i + 1}" for i in range(width))], rows
    if labels == len(cells):
        raise InputError(f"{path}:{number}: a row of labels without an image: name the images with --image-list")
    if len(rows) == 1:
        raise InputError(f"{path} has a header and no rows: it needs a line per image")
    if delimiter == " " and len(rows[1][1]) == len(cells) + 1 and values[rows[1][1][1]] is not None:
        cells = ["", *cells]  # the image column has no title
    elif labels == len(cells) - 1:
        notes.append(f"line {number} is taken as a header, as {name} is no image: write a suffix if it is one")
    _refuse_repeated(f"{path}:{number}", [f"the column {title!r}" for title in cells])
    return cells, rows[1:]


def _columns(path, header, rows, delimiter, values):
    """{title: the cells of the column}, of rows that must have a cell for each title."""
    flat = []
    for number, cells in rows:
        extra = len(cells) - len(header)
        if delimiter == " " and extra > 0 and values[cells[extra]] is None:  # a file name with blanks
            cells = [" ".join(cells[: extra + 1]), *cells[extra + 1 :]]
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: {len(cells)} cells, but there are {len(header)} columns")
        flat += cells
    return {title: flat[i :: len(header)] for i, title in enumerate(header)}


def _take(path, columns, title, option):
    """Remove a column that an option names, and return its cells."""
    if title not in columns:
        raise InputError(f"{option} {title}: {path} has no such column; it has {', '.join(columns)}")
    return columns.pop(title)


def _find_image_column(columns, folder):
    """The title of the column whose cells name most images, or the likeliest title."""
    hits = {}
    for title in sorted(columns, key=lambda title: (title.lower() not in ID_TITLES, _is_index(title))):
        cells = columns[title][:50]
        hits[title] = sum(folder.names_image(cell) for cell in cells)
        if hits[title] == len(cells):
            break
    return max(hits, key=hits.get)


def _is_index(title):
    """Whether a title is that of an index which pandas wrote."""
    return title == "" or title.startswith("Unnamed: ")


def _read_parts(path, table, columns, how):
    """Take the column that says train, val or test, if there is one, into table.parts."""
    title = how.split_column if how.split_column != "folder" else None
    for name in columns:
        if not title and name.lower() == "split" and {cell.lower() for cell in columns[name]} <= {"", *PART_WORDS}:
            title = name
    if not title:
        return
    cells = _take(path, columns, title, "--split-column")
    for origin, cell in zip(table.origins, cells):
        if cell and cell.lower() not in PART_WORDS:
            raise InputError(f"{origin}: {cell!r} in the column {title} is not train, val or test")
    table.parts = [PART_WORDS.get(cell.lower(), "") for cell in cells]
    table.notes.append(f"split: from the column {title}")


def _first_repeated(names):
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _refuse_repeated(place, names):
    repeated = _first_repeated(names)
    if repeated is not None:
        raise InputError(f"{place}: {repeated} is there twice: rename one")


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
DATE = re.compile(r"\d+[-./]\d+[-./]\d")
LABEL_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
LABEL_WORDS |= dict.fromkeys(["", "na", "n/a", "nan", "none", "null", "?"], math.nan)


class LabelValues(dict):
    """cell -> 1.0, 0.0, math.nan, or None for no label; filled as cells are asked for."""

    def __init__(self, how, decimal_comma=False):
        self.how = how
        self.decimal_comma = decimal_comma

    def __missing__(self, cell):
        self[cell] = self._value(cell)
        return self[cell]

    def _value(self, cell):
        number = self.number(cell)
        for word, value in ((self.how.negative, 0.0), (self.how.unknown, math.nan)):
            if word is not None and (cell == word or number == self.number(word) is not None):
                return value
        if number == -1:
            return math.nan
        if self.how.label_threshold is not None and number is not None and 0 <= number <= 1:
            return float(number >= self.how.label_threshold)
        return number if number in (0, 1) else LABEL_WORDS.get(cell.lower())

    def number(self, cell):
        """The cell as a float, or None."""
        if self.decimal_comma:
            cell = cell.replace(",", ".")
        return float(cell) if NUMBER.fullmatch(cell) else None


LIST_TITLE = re.compile(r"label|tag|class|categor|finding", re.IGNORECASE)
OTHER_TITLES = {"split", "fold", "set", "subset", "caption", "text", "description", "comment", "comments", "remarks",
                "note", "notes", "date", "time", "timestamp", "inspector", "operator", "author", "user", "source",
                "url", "confidence"}  # which may hold words, but hardly labels


class Column:
    """A column of a label file, and what its cells read as: every decision looks here."""

    def __init__(self, title, cells, values):
        self.title = title
        self.cells = cells
        self.distinct = set(cells)
        self.values = {values[cell] for cell in self.distinct}
        numbers = {cell: values.number(cell) for cell in self.distinct}
        self.numbers = set(numbers.values())
        odd = [cell for cell in self.distinct if values[cell] is None]
        self.odd_numbers = [numbers[cell] for cell in odd]
        self.words = {cell for cell in odd if numbers[cell] is None and not DATE.match(cell)}
        self.is_index = _is_index(title)
        self.is_other = self.is_index or title.lower() in OTHER_TITLES

    def holds_names(self):
        """Whether it may be a list of names: some words that come again, or nothing at all."""
        repeated = len(self.cells) <= 20 or len(self.distinct) < 0.9 * len(self.cells)
        return bool(self.words or self.values == {math.nan}) and repeated and not self.is_other


def _looks_like_lists(columns, groups):
    """Whether there are words below a title of lists and at most one column of labels, or words and
    no labels."""
    words = [column for column in columns if column.words]
    others = [column for column in columns if not column.words and not column.is_other]
    if any(column.title in groups for column in words):
        return True
    if any(LIST_TITLE.search(column.title) for column in words):
        return sum(None not in column.values and {0, 1} <= column.values for column in others) < 2
    for column in others:
        if column.values & {0, 1} or any(number is not None and 0 <= number <= 1 for number in column.numbers):
            return False
    return bool(words)


def _read_table(path, table, columns, values, how):
    """Set classes and targets from columns of 0, 1 and NA -> these columns."""
    chosen = []
    for column in columns:
        if not (column.is_index and len(columns) > 1) and _holds_labels(path, table, column, values):
            chosen.append(column)
    table.classes = [column.title for column in chosen]
    if not chosen:
        titles = ", ".join(column.title for column in columns)
        raise InputError(f"{path}: no labels (0, 1 or NA) in {titles}; for lists of names give --image-column")
    _check_signs(path, table, chosen, values, how)
    table.targets = np.empty((len(table), len(chosen)), np.float32)
    for c, column in enumerate(chosen):
        table.targets[:, c] = np.fromiter(map(values.__getitem__, column.cells), np.float32, len(table))
    table.notes.append(f"labels: a table with {len(chosen)} columns of 1, 0 and NA")
    return chosen


def _holds_labels(path, table, column, values):
    """Whether the known cells of a column are labels; an InputError when only some are."""
    if None not in column.values:
        return True
    if all(number is not None and 0 < number < 1 for number in column.odd_numbers):
        raise InputError(f"{path}: {column.title} holds numbers from 0 to 1: give --label-threshold T, or --ignore it")
    found = [values[cell] for cell in column.cells]
    if found.count(0) + found.count(1) < found.count(None):
        return False
    row = found.index(None)
    raise InputError(f"{table.origins[row]}: {column.cells[row]!r} in the column {column.title} is not 0, 1 or NA: "
                     f"correct it, or leave the column out with --ignore {column.title}")


def _check_signs(path, table, columns, values, how):
    """Refuse -1 where it may mean absent: without a 0, or a rarer one and -1 in every column."""
    if "-1" in (how.negative, how.unknown) or not any(-1 in column.numbers for column in columns):
        return
    minus = []
    zeros = 0
    for column in columns:
        counts = Counter(column.cells)
        minus.append(sum(count for cell, count in counts.items() if values.number(cell) == -1))
        zeros += sum(count for cell, count in counts.items() if values[cell] == 0)
    if sum(minus) > zeros and (zeros == 0 or min(minus)) and len(table) > 1:
        raise InputError(f"{path}: -1 can mean absent or unknown here: say which with --negative -1 (and --unknown 0 "
                         "where 0 means unknown) or with --unknown -1")
    table.notes.append(f"labels: -1 was read as NA, {sum(minus)} times")


def _read_lists(path, table, columns, groups, values, how):
    """Set classes, targets and groups from columns of names, several in a cell -> these columns."""
    chosen = _list_columns(path, columns, groups)
    titles = [column.title for column in chosen]
    separator = how.separator or _find_separator(path, set().union(*(column.words for column in chosen)))
    cells = set().union(*(column.distinct for column in chosen))
    names, dropped = _split_cells(cells, separator, titles)
    own = {column.title: sorted(set(chain(*map(names.get, column.distinct)))) for column in chosen}
    repeated = _first_repeated(chain(*own.values()))
    if repeated is not None and not groups:
        both = " and ".join(title for title in titles if repeated in own[title])
        raise InputError(f"{path}: {repeated} is in the columns {both}: rename it in one of them, or --label-groups")
    if not any(own.values()):
        raise InputError(f"{path} names no labels in {', '.join(titles)}")
    table.classes = list(dict.fromkeys(chain(*own.values(), *groups.values())))  # some may never be seen
    table.groups = own if len(own) > 1 else {}

    stated = [1.0] * len(table)
    table.absent = 0.0
    table.notes.append(f"labels: lists of names in {', '.join(titles)}, "
                       + (f"separated by {separator!r}" if separator else "one in a cell"))
    if dropped:
        table.notes.append(f"labels: no label is meant by {', '.join(sorted(dropped))}")
    confidence = next((column.cells for column in columns if column.title.lower() == "confidence"), None)
    if confidence:
        stated = [values[cell] for cell in confidence]
        table.absent = math.nan
        table.notes.append("labels: confidence 0 means absent, and a label that is not listed is unknown")
    table.targets = np.full((len(table), len(table.classes)), table.absent, np.float32)
    index = {name: c for c, name in enumerate(table.classes)}
    for row, value in enumerate(stated):
        if value is None:
            raise InputError(f"{table.origins[row]}: {confidence[row]} is not 0 or 1: give --label-threshold T")
        for column in chosen:
            for name in names[column.cells[row]]:
                table.targets[row, index[name]] = value
    return chosen


def _list_columns(path, columns, groups):
    if groups:
        chosen = [column for column in columns if column.title in groups or column.title.lower() == "labels"]
        lacking = f"no column is named labels, or like one of the groups {', '.join(groups)}"
    else:
        names = [column for column in columns if column.holds_names()]
        chosen = [column for column in names if LIST_TITLE.search(column.title)] or names
        lacking = f"no column holds names of labels: it has {', '.join(column.title for column in columns)}"
    if not chosen:
        raise InputError(f"{path}: {lacking}")
    return chosen


def _find_separator(path, cells):
    """What separates the names of a cell: the first of ; | and , that is there, or None."""
    for separator in (";", "|", ","):
        if any(separator in cell for cell in cells):
            return separator
    words = {word for cell in cells for word in cell.split()}
    if len(words) < len(cells):
        example = max(sorted(cells), key=lambda cell: len(cell.split()))
        raise InputError(f'{path}: {example!r} can be one label or several: say --separator " " or --separator ";"')
    return None


def _split_cells(cells, separator, titles):
    """-> ({cell: the names in it}, the parts of cells that are no names)."""
    placeholders = {"", "nan", "none", "na", "n/a", "null"}
    for title in titles:
        stem = title.lower().removesuffix("s")
        placeholders |= {stem, stem + "s"}
    names = {}
    dropped = set()
    for cell in cells:
        parts = cell.strip("[]").split(separator) if separator else [cell]
        parts = [part.strip(" '\"") for part in parts]
        names[cell] = [part for part in parts if part.lower() not in placeholders]
        dropped.update(part or "an empty cell" for part in parts if part.lower() in placeholders)
    return names, dropped


# The cls format: for each image a file LABELS/**/NAME.cls with a class index per line


def _read_cls(folder, data_dir):
    """A folder of .cls files -> LabelTable without paths."""
    classes, source = _read_class_names(data_dir)
    files = sorted(folder.rglob("*.cls"))
    if not files:
        raise InputError(f"{folder} holds no .cls files")
    targets = np.zeros((len(files), len(classes)), np.float32)
    indices = {str(c): c for c in range(len(classes))}
    for row, file in enumerate(files):
        for number, line in enumerate(read_lines(file), 1):
            index = line.strip()
            if index and index not in indices:
                raise InputError(f"{file}:{number}: {index!r} is not a class index, 0 to {len(classes) - 1}")
            if index:
                targets[row, indices[index]] = 1
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    notes = [f"{folder}: {len(files)} .cls files of class indices", f"class names: {source}"]
    return LabelTable(names, [], targets, classes, origins=list(map(str, files)), notes=notes, absent=0.0)


def _read_class_names(data_dir):
    """-> (the names of classes.txt or classes.json, else those of COCO, where they are from)."""
    files = (data_dir / "classes.txt", data_dir / "classes.json")
    source = next((file for file in files if file.is_file()), None)
    if not source:
        return COCO_CLASSES, "the 80 of COCO"
    classes = _read_names(source) if source.suffix == ".txt" else _read_json(source)
    if isinstance(classes, dict):
        classes = classes.get("classes")
    if not classes or not _is_list_of_names(classes):
        raise InputError(f'{source}: it must look like ["class", ...]')
    _refuse_repeated(source, classes)
    return classes, str(source)


COCO_CLASSES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,
wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")


# What all formats share: groups, tables of several files, the images of the rows


def _read_json(path):
    try:
        return json.loads("\n".join(read_lines(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {getattr(error, 'msg', error)}") from None


def _is_list_of_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read_groups(path):
    """A JSON file {group: [class, ...]} -> dict."""
    groups = _read_json(path)
    if not isinstance(groups, dict) or not all(map(_is_list_of_names, groups.values())):
        raise InputError(f'{path}: it must look like {{"group": ["class", ...], ...}}')
    _refuse_repeated(path, chain(*groups.values()))
    return groups


def _apply_groups(table, groups, path):
    """Order the classes by their groups; those in none are dropped, and counted in a warning."""
    column = {name: c for c, name in enumerate(table.classes)}
    groups = {group: [name for name in names if name in column] for group, names in groups.items()}
    classes = list(chain(*groups.values()))
    if not classes:
        raise InputError(f"{path}: none of its names is a class; the classes are {', '.join(table.classes)}")
    positives = np.nansum(table.targets, axis=0)
    dropped = [f"{name} ({positives[c]:.0f} times)" for name, c in column.items() if name not in classes]
    if dropped:
        table.warnings.append(f"{len(dropped)} classes in no group of {path} were dropped: {', '.join(dropped)}")
    table.notes.append(f"groups: {', '.join(groups)}, from {path}")
    targets = table.targets[:, [column[name] for name in classes]]
    return replace(table, classes=classes, targets=targets, groups=groups)


def _join_tables(tables):
    """Tables of several label files -> one; a class that one does not know is absent or unknown."""
    classes = list(dict.fromkeys(chain(*(table.classes for table in tables))))
    targets = []
    joined = LabelTable([], [], None, classes, tables[0].groups, absent=tables[0].absent)
    for table in tables:
        part = np.full((len(table), len(classes)), table.absent, np.float32)
        part[:, [classes.index(name) for name in table.classes]] = table.targets
        targets.append(part)
        lacking = [name for name in classes if name not in table.classes]
        if lacking:
            table.warnings.append(f"{table.origins[0].rpartition(':')[0]} has no {', '.join(lacking)}")
        for name in ("ids", "objects", "parts", "origins", "notes", "warnings"):
            getattr(joined, name).extend(getattr(table, name))
    joined.targets = np.concatenate(targets)
    return joined


class ImageFolder:
    """The files below a folder, listed once; their names are relative to it, with "/"."""

    def __init__(self, root, data_dir):
        self.root = str(root)
        self.bases = (str(data_dir), os.getcwd())  # what a path may be relative to, too
        self.names = set()
        visited = set()
        for folder, folders, names in os.walk(self.root, followlinks=True):
            visited.add(os.path.realpath(folder))
            folders[:] = [name for name in folders if os.path.realpath(f"{folder}/{name}") not in visited]
            inside = os.path.relpath(folder, self.root).replace(os.sep, "/")
            prefix = "" if inside == "." else inside + "/"
            self.names.update(prefix + name for name in names if not name.startswith("._"))

    @cached_property
    def loose(self):
        """{path or name, with a suffix in lower case or without one: the images that it can be}."""
        found = {}
        for name in sorted(self.names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                last = stem.rpartition("/")[2]
                for key in {stem, last, stem + suffix.lower(), last + suffix.lower()}:
                    found.setdefault(key, []).append(name)
        return found

    def names_image(self, name):
        """Whether a cell is the name of an image: by its suffix, or because it is there."""
        return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or name in self.names or name in self.loose

    def find(self, name, origin):
        """The image at a path, or None; an InputError when it lies outside. origin: "FILE:LINE"."""
        if name in self.names:
            return name
        places = []
        root = os.path.realpath(self.root)
        for base in (self.root, os.path.dirname(origin.rpartition(":")[0]), *self.bases):
            folder, last = os.path.split(os.path.normpath(os.path.join(base, name.replace("\\", "/"))))
            place = os.path.join(os.path.realpath(folder), last)
            places.append(os.path.relpath(place, root).replace(os.sep, "/"))
            if places[-1] in self.names:
                return places[-1]
        if places[0].startswith(".."):
            raise InputError(f"{origin}: {name} lies outside the image folder {self.root}: move the image into it")
        return None

    def find_loosely(self, name, origin, taken):
        """The image with a name or a stem, in any folder, but none of `taken` for a name with a
        folder, or None."""
        stem, suffix = os.path.splitext(os.path.normpath(name.replace("\\", "/")))
        if suffix.lower() not in IMAGE_SUFFIXES:  # a dot of the name itself
            stem, suffix = stem + suffix, ""
        for key in (stem, stem.rpartition("/")[2]):
            candidates = self.loose.get(key + suffix.lower(), [])
            if "/" in stem:
                candidates = [candidate for candidate in candidates if candidate not in taken]
            if len(candidates) > 1:
                raise InputError(f"{origin}: {name} can be {candidates[0]} or {candidates[1]}: write the whole name")
            if candidates:
                return candidates[0]
        return None


def _attach_images(table, folder):
    """Set the paths of a table; rows whose image is missing are dropped."""
    found = [folder.find(name, origin) for name, origin in zip(table.ids, table.origins)]
    exact = set(found)
    for row, image in enumerate(found):
        found[row] = image or folder.find_loosely(table.ids[row], table.origins[row], exact)
    rows = np.array([row for row, image in enumerate(found) if image])
    table.missing = list(dict.fromkeys(name for name, image in zip(table.ids, found) if not image))
    if len(rows) == 0:
        source = table.origins[0].rpartition(":")[0] or folder.bases[0]
        raise InputError(f"{source}: none of its {len(found)} images is in {folder.root}; the first one is "
                         f"{table.missing[0]}: name the image folder with --images")
    table.paths = [f"{folder.root}/{image}" for image in found]
    table.notes.append(f"images: {folder.root}")
    return table.subset(rows)


def _part_of_folder(path, root):
    """The part that one of the folders between root and the image names, or ""."""
    words = [word.lower() for word in Path(os.path.relpath(path, root)).parts[:-1]]
    return next((PART_WORDS[word] for word in words if word in PART_WORDS), "")


def _unite_rows(table):
    """Unite the rows of an image; an InputError where they contradict each other or cross parts."""
    first = {}
    for row, path in enumerate(table.paths):
        other = first.setdefault(path, row)
        if other == row:
            continue
        if table.parts and table.parts[row] != table.parts[other]:
            raise InputError(f"{table.origins[row]}: {table.ids[row]} is in {table.parts[row]}, and in "
                             f"{table.parts[other]} at {table.origins[other]}: remove it from one of them")
        conflicts = np.flatnonzero(table.targets[row] + table.targets[other] == 1)
        if len(conflicts) and table.absent != 0:
            place = table.origins[other].rpartition(":")[2]
            raise InputError(f"{table.origins[row]}: {table.ids[row]} has another label for "
                             f"{table.classes[conflicts[0]]} than in line {place}: remove one of the two lines")
        table.targets[other] = np.fmax(table.targets[row], table.targets[other])
    if len(first) < len(table) and table.absent != 0:
        table.warnings.append(f"{len(table) - len(first)} rows name an image again and were united with its first row")
    return table.subset(np.array(list(first.values())))


def _find_copies(table):
    """Set `copies` where images have the same bytes; an InputError when they are in two parts."""
    sizes = {}
    for row, path in enumerate(table.paths):
        with contextlib.suppress(OSError):
            sizes[row] = os.path.getsize(path)
    shared = Counter(sizes.values())
    first = {}
    copied = {}  # row -> the first row with the same bytes
    for row, size in sizes.items():
        if size and shared[size] > 1:
            with contextlib.suppress(OSError):
                other = first.setdefault(hashlib.sha256(Path(table.paths[row]).read_bytes()).digest(), row)
                if other != row:
                    copied[row] = other
    if copied:
        table.copies = [table.ids[copied.get(row, row)] for row in range(len(table))]
    crossing = []
    differing = []
    for row, other in copied.items():
        names = table.ids if table.ids[other] != table.ids[row] else table.paths
        if table.parts and table.parts[row] != table.parts[other]:
            crossing.append(f"{names[other]} and {names[row]}")
        if (table.targets[row] + table.targets[other] == 1).any():
            differing.append(f"{names[other]} and {names[row]}")
    if crossing:
        raise InputError(f"{len(crossing)} images have two names in two parts, remove one: {'; '.join(crossing[:3])}")
    if differing:
        table.warnings.append(f"{len(differing)} pairs of identical images disagree: {'; '.join(differing[:5])}")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def split(table, ratios=(0.7, 0.15, 0.15), method="stratified", seed=0):
    """Divide a table -> three ascending arrays of row numbers: train, val, test.

    Rows of one object, and images with the same bytes, stay together. ratios: three numbers >= 0,
    taken relative to their sum; train and val must not be 0. method: "stratified" is the iterative
    stratification of Sechidis, Tsoumakas & Vlahavas (2011), "On the Stratification of Multi-Label
    Data", on the known positives, so that rare classes reach every split; "random" shuffles. Rows
    with a part of their own (table.parts) keep it: others are divided among the splits that have
    none, and val is taken from train when the data has no val. Raises InputError.
    """
    ratios = np.array(ratios, float)
    if len(ratios) != 3 or not np.isfinite(ratios).all() or ratios.min() < 0 or ratios[:2].min() == 0:
        raise InputError("--split takes three ratios, train, val and test; only the last may be 0")
    part = np.array([PARTS.index(name) if name else -1 for name in table.parts or [""] * len(table)])
    free = np.flatnonzero(part < 0)
    named = set(part[part >= 0].tolist())
    if named and 1 not in named and len(free) == 0:  # val comes out of train
        free = np.flatnonzero(part == 0)
        named.discard(0)
        ratios[2] = 0
    open_parts = [k for k in range(3) if k not in named and ratios[k] > 0] or [0, 1, 2]
    if len(free):
        part[free] = np.array(open_parts)[divide(table.subset(free), ratios[open_parts], method, seed)]
    rows = [np.flatnonzero(part == k) for k in range(3)]
    for name, chosen in zip(PARTS[:2], rows):
        if len(chosen) == 0:
            raise InputError(f"the data's own split has no {name} images: add some, or leave the split out")
    return rows


def divide(table, ratios, method="stratified", seed=0):
    """Divide a table as split() does, into any number of parts -> the part of each row (N,)."""
    ratios = np.asarray(ratios, float) / np.sum(ratios)
    units = _units(table)
    sizes = np.bincount(units)
    wanted = np.flatnonzero(ratios)
    if len(sizes) < len(wanted):
        what = "objects" if table.objects else "images"
        raise InputError(f"{len(sizes)} {what} are too few for {len(wanted)} splits: add some, or change --split or "
                         "--folds")
    rng = np.random.default_rng(seed)
    if method == "random":
        order = rng.permutation(len(sizes))
        done = (np.cumsum(sizes[order]) - sizes[order] / 2) / sizes.sum()
        part = np.empty(len(sizes), int)
        part[order] = np.searchsorted(np.cumsum(ratios)[:-1], done, side="right")
    else:
        positives = np.zeros((len(sizes), table.targets.shape[1]))
        np.add.at(positives, units, np.nan_to_num(table.targets))
        part = _stratified_parts(positives, sizes, ratios, rng)
    for empty in set(wanted) - set(part):  # tiny data: every split asked for gets something
        part[rng.choice(np.flatnonzero(part == np.bincount(part).argmax()))] = empty
    return part[units]


def _units(table):
    """What must not be divided (an object, identical images) -> its number for each row (N,)."""
    keys = [table.objects or table.ids]
    if table.copies:
        keys.append(table.copies)
    units = np.arange(len(table))
    while True:  # rows that share a key get the lowest number among them, until nothing changes
        before = units
        for names in keys:
            lowest = {}
            for name, unit in zip(names, units.tolist()):
                lowest[name] = min(unit, lowest.get(name, unit))
            units = np.array([lowest[name] for name in names])
        if (units == before).all():
            return np.unique(units, return_inverse=True)[1]


def _stratified_parts(positives, sizes, ratios, rng):
    """The label with the fewest units left goes first, to the splits that still want most of it."""
    part = np.full(len(sizes), -1)
    wanted = ratios[:, None] * positives.sum(axis=0)  # (K, C) positives that each split still wants
    room = ratios * sizes.sum()  # (K,) images that each split still wants
    allowed = np.where(ratios > 0, 0.0, -np.inf)
    order = rng.permutation(len(sizes))
    has = positives > 0
    left = has.sum(axis=0)
    while left.any():
        label = np.argmin(np.where(left > 0, left, np.inf))
        for unit in order[has[order, label] & (part[order] < 0)]:
            k = max(range(len(ratios)), key=lambda k: (wanted[k, label] + allowed[k], room[k]))
            part[unit] = k
            wanted[k] -= positives[unit]
            room[k] -= sizes[unit]
        left = has[part < 0].sum(axis=0)
    for unit in order[part[order] < 0]:  # units without a positive
        k = np.argmax(room + allowed)
        part[unit] = k
        room[k] -= sizes[unit]
    return part


# ---------------------------------------------------------------------------------------------------------------------
# Images


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what makes it upright
PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ETIMEDOUT}  # errors that may not come again

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is an error, and reported as one


def load_image(image, size=None, within=None):
    """An image -> PIL image in mode RGB, upright by its EXIF orientation.

    image: a path, a file object, bytes, a PIL image, or a uint8 array (H, W, 3). size: the result
    is resized to (size, size). within: it is shrunk, in its proportions, so that no side is longer.
    JPEG files are then decoded at a smaller scale. Transparent pixels are laid on white; 16-bit and
    float images keep their contrast; of an animation the first frame is taken. Only IMAGE_FORMATS
    are decoded. Raises ImageError.
    """
    try:
        try:
            return _load_image(image, size, within)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(0.1)
            return _load_image(image, size, within)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        raise ImageError(f"{image_name(image)}: {_reason(error)}") from error


def _reason(error):
    """Say in a few words why an image cannot be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a readable format such as JPEG or PNG"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def image_name(image):
    """What to call an image in a message."""
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    return getattr(image, "filename", "") or f"an image given as {type(image).__name__}"


def _load_image(image, size, within):
    image = _open_image(image)
    turn = TURNS.get(image.getexif().get(0x0112))
    drafted = None
    if side := size or within:  # twice that, so that the scale of the decoding does not show
        drafted = image.draft("RGB", (2 * side, 2 * side))
    image = _to_rgb(image)
    if size:
        box = drafted[1] if drafted else None  # the last row and column may be a part of a pixel
        image = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    elif within:
        image.thumbnail((within, within), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return image.transpose(turn) if turn else image


def _open_image(image):
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if isinstance(image, (bytes, bytearray)):
        return Image.open(io.BytesIO(image), formats=readable_formats())
    if not isinstance(image, Image.Image):
        return Image.open(image, formats=readable_formats())

    # The user's own image is not touched: while it is not decoded, its file is opened once more.
    if getattr(image, "tile", None) and getattr(image, "fp", None):
        if image.format not in IMAGE_FORMATS:
            raise ValueError(f"{image.format} images are not decoded here: call its load() first, or convert it to PNG")
        image.fp.seek(0)
        return Image.open(image.fp, formats=readable_formats())
    return image.copy()


@cache
def readable_formats():
    """Return the names in IMAGE_FORMATS that this version of Pillow can open.

    Pillow itself would look at the first bytes of a file, whatever its name, and try all its formats. Some of them
    run programs: for a PostScript file called photo.jpg it starts Ghostscript.
    """
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _to_rgb(image):
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow's own conversion clips instead of scaling
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


CACHE_OVERHEAD = 4096  # bytes of memory that a cached image takes beside its pixels: they fill whole pages, in objects


class ImageDataset(torch.utils.data.Dataset):
    """The images of a LabelTable: [i] is (uint8 (3, size, size), targets float32 (C,), id).

    Decoded images are kept in memory, up to cache_bytes of them. An image that cannot be read is
    grey, with unknown labels, so that it is ignored, and `errors` says why: {row: message}.
    """

    def __init__(self, table, size, cache_bytes=0):
        self.table = table
        self.size = size
        self.errors = {}
        self.targets = torch.from_numpy(table.targets.copy())
        self._pixels = {}
        self._capacity = int(cache_bytes // (3 * size * size + CACHE_OVERHEAD))

    def __len__(self):
        return len(self.table)

    def __getitem__(self, row):
        return torch.from_numpy(self.pixels(row)).permute(2, 0, 1), self.targets[row], self.table.ids[row]

    def pixels(self, row):
        """One image as uint8 (size, size, 3)."""
        pixels = self._pixels.get(row)
        if pixels is None:
            try:
                pixels = np.array(load_image(self.table.paths[row], self.size))
            except ImageError as error:
                self.errors[row] = str(error)
                self.targets[row] = math.nan
                pixels = np.full((self.size, self.size, 3), 127, np.uint8)
            if len(self._pixels) < self._capacity:
                self._pixels[row] = pixels
        return pixels


def batches(dataset, order, workers=2, pin=False):
    """Yield (images uint8 (B, 3, S, S), channels_last, targets (B, C), rows) for each of `order`.

    `workers` threads decode ahead, a batch each, which works as Pillow decodes and resizes without
    holding the interpreter; 0 decodes when asked. pin: the images are put into page-locked memory,
    from which a GPU copies in the background.
    """

    def load(rows):
        rows = np.array(rows)
        pixels = np.stack([dataset.pixels(int(row)) for row in rows])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return images.pin_memory() if pin else images, dataset.targets[rows], rows

    if workers == 0:
        yield from map(load, order)
        return
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


def normalize(images):
    """Images (B, 3, H, W) in 0..255 -> float32, normalised as ImageNet networks expect."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=images.device).view(2, 3, 1, 1) * 255
    return torch.addcmul(-mean / std, images.float(), 1 / std)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation, on a whole batch: every turn, shift and stretch is one matrix and one sampling


LEVELS = {"none": (), "light": ("flip", "crop"),
          "rich": ("resized_crop", "flip", "rotation", "perspective", "jitter", "erasing")}
OPERATIONS = ("flip", "vflip", "rotation", "crop", "resized_crop", "perspective", "jitter", "erasing")
NOISE = ("flip", "vflip", "angle", "shift_x", "shift_y", "area", "ratio", "tilt_x", "tilt_y", "perspective",
         "saturation", "contrast", "brightness", "erasing", "box_area", "box_ratio", "box_y", "box_x")


def read_operations(text):
    """A level, or operations separated by commas -> names of OPERATIONS. Raises InputError."""
    names = LEVELS.get(text, tuple(text.split(",")))
    wrong = [name for name in names if name not in OPERATIONS]
    if wrong:
        raise InputError(f"--augment {text}: {wrong[0]!r} is not one of {', '.join([*LEVELS, *OPERATIONS])}")
    return names


def draw_noise(count, seed, epoch):
    """Random numbers for the augmentation of the `count` images of an epoch, by their places in it ->
    (count, len(NOISE)) in [0, 1), which depend on the seed and the epoch alone, not on threads."""
    return torch.rand(count, len(NOISE), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def augment(images, operations, noise):
    """Images (B, 3, H, W) in 0..255, each changed in its own random way -> float32, the same range.
    operations: names of OPERATIONS. noise: (B, len(NOISE)) of draw_noise()."""
    images = images.float()
    noise = dict(zip(NOISE, noise.unbind(1)))
    if {"rotation", "crop", "resized_crop", "perspective"} & set(operations):
        images = _sample(images, _geometry(operations, noise))
    else:  # whole pixels: no sampling is needed
        for name, axis in (("flip", 3), ("vflip", 2)):
            if name in operations:
                images = torch.where(noise[name].view(-1, 1, 1, 1) < 0.5, images.flip(axis), images)
    if "jitter" in operations:
        images = _jitter(images, noise)
    if "erasing" in operations:
        images = torch.where(_boxes(noise, *images.shape[2:]), 127.0, images)
    return images


MIXES = ("mixup", "cutmix")


def mix(images, kind, rng):
    """Mix each image of a batch (B, 3, H, W), float32, with the one before it -> (images, the share
    of each in its mixture, 0 to 1).

    kind: "mixup" adds the pixels (Zhang et al. 2018, alpha 0.2), "cutmix" takes over a box (Yun et
    al. 2019, alpha 1). rng: numpy's random generator; share and box are the same for the batch.
    """
    others = images.roll(1, 0)
    if kind == "mixup":
        share = rng.beta(0.2, 0.2)
        return torch.lerp(others, images, share), share
    height, width = images.shape[2:]
    side = math.sqrt(rng.random())  # the box's share of the area is uniform
    box_height, box_width = round(side * height), round(side * width)
    top = rng.integers(height - box_height + 1)
    left = rng.integers(width - box_width + 1)
    box = (..., slice(top, top + box_height), slice(left, left + box_width))
    images = images.clone()
    images[box] = others[box]
    return images, 1 - box_height * box_width / (height * width)


def _geometry(operations, noise):
    """(B, 3, 3): where in the input, in [-1, 1], each point of the output comes from."""
    signed = {name: 2 * values - 1 for name, values in noise.items()}
    one = torch.ones_like(noise["flip"])
    zero = torch.zeros_like(one)

    def matrix(a=one, b=zero, x=zero, c=zero, d=one, y=zero, p=zero, q=zero):
        return torch.stack([a, b, x, c, d, y, p, q, one], dim=1).view(-1, 3, 3)

    def crop(width, height):  # anywhere
        return matrix(a=width, d=height, x=(1 - width) * signed["shift_x"], y=(1 - height) * signed["shift_y"])

    total = matrix()
    if "resized_crop" in operations:  # 50 to 100 % of the area, sides 3:4 to 4:3
        area = 0.5 + 0.5 * noise["area"]
        ratio = (4 / 3) ** signed["ratio"]
        total = total @ crop((area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1))
    if "crop" in operations:  # 224 of 256 pixels
        total = total @ crop(one * 224 / 256, one * 224 / 256)
    if "rotation" in operations:  # up to 10 degrees
        angle = signed["angle"] * math.radians(10)
        total = total @ matrix(a=angle.cos(), b=-angle.sin(), c=angle.sin(), d=angle.cos())
    if "perspective" in operations:  # half of the images, one side up to 1.5 times as long as the other
        strength = 0.2 * (noise["perspective"] < 0.5)
        total = total @ matrix(p=strength * signed["tilt_x"], q=strength * signed["tilt_y"])
    if "flip" in operations:
        total = total @ matrix(a=torch.where(noise["flip"] < 0.5, -one, one))
    if "vflip" in operations:
        total = total @ matrix(d=torch.where(noise["vflip"] < 0.5, -one, one))
    return total


def _sample(images, matrix):
    """Images (B, 3, H, W) seen through a matrix (B, 3, 3) of _geometry()."""
    batch, _, height, width = images.shape
    x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=images.device) * 2 + 1) / height - 1
    points = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width, device=images.device)], -1)
    points = points.view(1, -1, 3)
    grid = points @ matrix[:, :2].transpose(1, 2)
    grid /= points @ matrix[:, 2:].transpose(1, 2)
    grid = grid.view(batch, height, width, 2)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _jitter(images, noise):
    """Scale saturation, contrast and brightness, each by 0.8 to 1.2."""
    saturation, contrast, brightness = (
        (0.8 + 0.4 * noise[name]).view(-1, 1, 1, 1) for name in ("saturation", "contrast", "brightness"))
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, saturation)
    images = torch.lerp(images.mean(dim=(1, 2, 3), keepdim=True), images, contrast)
    return (images * brightness).clamp(0, 255)


def _boxes(noise, height, width):
    """For a quarter of the images a box of 2 to 20 % of the area -> boolean (B, 1, H, W)."""
    area = 0.02 + 0.18 * noise["box_area"]
    ratio = 3 ** (2 * noise["box_ratio"] - 1)

    def inside(pixels, size, place):  # (B, pixels): those between the two edges of the box
        start = ((1 - size) * place)[:, None]
        middles = (torch.arange(pixels, device=size.device) + 0.5) / pixels
        return (middles >= start) & (middles < start + size[:, None])

    rows = inside(height, (area * ratio).sqrt(), noise["box_y"])
    columns = inside(width, (area / ratio).sqrt(), noise["box_x"])
    chosen = (noise["erasing"] < 0.25).view(-1, 1, 1, 1)
    return chosen & rows[:, None, :, None] & columns[:, None, None, :]


# ---------------------------------------------------------------------------------------------------------------------
# Sheet and summary: what is in a data folder


BLACK, GREY, GREEN, RED, BLUE = "#222222", "#767676", "#1b7837", "#b2182b", "#1f4e9c"
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc",
         "malgun.ttf", "arial.ttf")  # of the system, for letters that Pillow's own font has not


@cache
def load_font(size, text=""):
    """A font of `size` pixels with the letters of `text`: Pillow's own, or one of the system."""
    fonts = [ImageFont.load_default(size)]
    if not has_letters(fonts[0], text):
        for name in FONTS:
            with contextlib.suppress(OSError):
                fonts.append(ImageFont.truetype(name, size))
    return next((font for font in fonts if has_letters(font, text)), fonts[0])


def has_letters(font, text):
    """Whether a font can draw every letter of a text."""
    box = bytes(font.getmask("\uffff"))  # what it draws for a letter that it has not
    return all(letter.isspace() or bytes(font.getmask(letter)) != box for letter in set(text) if ord(letter) > 126)


def picture_names(classes):
    """Class names as pictures show them: "class 3", with a warning, where no font has the
    letters."""
    names = [name if has_letters(load_font(13, name), name) else f"class {c}" for c, name in enumerate(classes)]
    lacking = [name for name, shown in zip(classes, names) if name != shown]
    if lacking:
        print_text(f"warning: no font here has the letters of {', '.join(lacking[:3])}: pictures show their numbers",
                   file=sys.stderr)
    return names


def draw_sheet(cells, title, columns=6, width=200):
    """Pictures in rows with words under them -> PIL image. cells: (PIL image, [(text, colour)])."""
    columns = max(1, min(columns, len(cells)))
    gap = 14
    total = columns * (width + gap) + gap
    heading = _draw_words([(title, BLACK)], total - 2 * gap, 17)
    pasted = [(heading, gap, 10)]  # (image, left, top)
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
    sheet = Image.new("RGB", (total, bottom), "white")
    for image, left, top in pasted:
        sheet.paste(image, (left, top))
    return sheet


def _draw_words(lines, width, size):
    """Lines of text [(text, colour), ...], wrapped -> PIL image of that width."""
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
    """The names of the chosen classes (C,), boolean, as text."""
    return ", ".join(names[c] for c in np.flatnonzero(chosen))


def label_sheet(table, count=24, seed=0):
    """A random sample of a table's images with their labels -> PIL image."""
    rows = np.random.default_rng(seed).permutation(len(table))[:count]
    names = picture_names(table.classes)
    cells = []
    for row in sorted(rows):
        lines = [(table.ids[row], BLACK), (list_names(names, table.targets[row] == 1) or "no label", GREEN)]
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
    """A file name for each path: its own, or with the folder's name or a number where another has
    the same stem."""
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
    """A LabelTable as text: how its files were read, and per class positives, negatives, NA,
    prevalence, and a bar of # positives, - negatives, blank NA. Of more than `most` classes those
    with fewest and most positives."""
    positives = np.count_nonzero(table.targets == 1, axis=0)
    negatives = np.count_nonzero(table.targets == 0, axis=0)
    lines = [f"{title}: {len(table) + len(table.missing)} rows, {len(table)} images, {len(table.missing)} missing, "
             f"{len(table.classes)} classes"]
    lines += [f"  {note}" for note in table.notes]
    if table.parts:
        counts = Counter(part or "to be divided" for part in table.parts)
        lines.append("  the data's own split: " + ", ".join(f"{count} {part}" for part, count in counts.items()))
    if table.missing:
        lines.append(f"missing: {shortened(table.missing)}")
    lines += [f"warning: {warning}" for warning in table.warnings + one_sided(table)]

    group_of = {name: group for group, names in table.groups.items() for name in names}
    width = max(5, *map(len, table.classes))
    header = f"{'class':{width}} {'positives':>9} {'negatives':>9} {'NA':>7} {'prevalence':>10}"
    lines.append(f"{header}  {'':20}  group" if group_of else header)
    rows = []
    for name, positive, negative in zip(table.classes, positives, negatives):
        known = positive + negative
        share = f"{positive / known:10.1%}" if known else f"{'n/a':>10}"
        full = math.ceil(20 * positive / len(table))
        bar = "#" * full + "-" * (math.ceil(20 * known / len(table)) - full)
        rows.append(f"{name:{width}} {positive:9} {negative:9} {len(table) - known:7} {share}  {bar:20}  "
                    f"{group_of.get(name, '')}".rstrip())
    if len(rows) > most:
        order = np.argsort(positives, kind="stable")
        half = most // 2
        between = f"... {len(rows) - 2 * half} classes between the rarest and the most frequent"
        rows = [*(rows[c] for c in order[:half]), between, *(rows[c] for c in order[-half:])]
    return "\n".join(lines + rows)


def one_sided(table):
    """Warnings of the classes of a table that have no known positive, or no known negative."""
    lines = []
    for value, word in ((1, "positive"), (0, "negative")):
        lacking = ~(table.targets == value).any(axis=0)
        if lacking.any():
            lines.append(f"no known {word}: {shortened([table.classes[c] for c in np.flatnonzero(lacking)])}")
    return lines


def shortened(names, most=10):
    """Names as text, the first `most` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def pairs_summary(table, most=10):
    """The pairs of classes that are most often positive together, as text."""
    positive = (table.targets == 1).astype(np.float32)
    first, second = np.triu_indices(len(table.classes), k=1)
    together = (positive.T @ positive)[first, second]
    lines = []
    for pair in np.argsort(-together, kind="stable")[:most]:
        if together[pair]:
            lines.append(f"{int(together[pair]):9}  {table.classes[first[pair]]} + {table.classes[second[pair]]}")
    return "\n".join(["most frequent pairs:", *lines]) if lines else "no two classes are positive together"


def images_summary(table, most=1000):
    """Describe the sizes, modes and formats of a table's images, or of `most` of them, by their headers.

    Raises InputError if none of them can be opened; --check is what lists single bad images.
    """
    sizes = []
    kinds = Counter()
    errors = []
    for path in table.paths[:: -(-len(table) // most)]:
        try:
            with _open_image(path) as image:
                sizes.append(image.size)
                kinds[f"{image.mode} {image.format}"] += 1
        except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
            errors.append(f"{path}: {_reason(error)}")
    if not sizes:
        raise InputError(f"none of {len(errors)} images can be opened, such as {errors[0]}: "
                         "convert them to JPEG or PNG")

    low, middle, high = np.sort(sizes, axis=0)[[0, len(sizes) // 2, -1]]
    return (f"{len(sizes)} of {len(table)} images opened: width {low[0]} to {high[0]}, median {middle[0]}; "
            f"height {low[1]} to {high[1]}, median {middle[1]}\n"
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))


def find_bad_images(table, workers):
    """Decode every image -> messages of those that cannot be read."""

    def problem(path):
        try:
            load_image(path)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return [message for message in pool.map(problem, table.paths) if message]


# ---------------------------------------------------------------------------------------------------------------------
# Demo data: drawn photographs of machine parts and their defects


DEMO_GROUPS = {"parts": ["bolt", "bracket", "ring"], "defects": ["rust", "crack", "hole"]}
DEMO_LABELS = [*DEMO_GROUPS["parts"], *DEMO_GROUPS["defects"]]
DEMO_SIZE = 128  # pixels; drawn at twice that
DARK = (25, 25, 25)


def write_demo(folder, seed=0, count=1000):
    """Write `count` drawn photographs and their labels, of which 8 % are NA: the same for a seed.
    Raises InputError when the folder holds something else."""
    folder = Path(folder)
    marker = folder / "label_groups.json"
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and not (marker.is_file() and _read_json(marker) == DEMO_GROUPS):
        raise InputError(f"{folder} is not empty, and not demo data: name a new folder")
    write_json(marker, DEMO_GROUPS)
    (folder / "images").mkdir(exist_ok=True)
    lines = [" ".join(["image", *DEMO_LABELS])]
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        labels = draw_demo_labels(rng)
        draw_demo_image(labels, rng)[0].save(folder / "images" / f"part_{i:04}.jpg", quality=88)
        cells = [str(int(name in labels)) if rng.random() >= 0.08 else "NA" for name in DEMO_LABELS]
        lines.append(" ".join([f"part_{i:04}.jpg", *cells]))
    write_text(folder / "labels.txt", lines)  # the last: with it the folder is complete


def draw_demo_labels(rng):
    """A random set of labels: rust likes bolts, cracks like brackets, holes are rare."""
    chances = {"bolt": 0.45, "bracket": 0.4, "ring": 0.35}
    parts = {name for name, chance in chances.items() if rng.random() < chance}
    chances = {"rust": 0.5 if "bolt" in parts else 0.15, "crack": 0.45 if "bracket" in parts else 0.15, "hole": 0.055}
    return parts | {name for name, chance in chances.items() if rng.random() < chance}


def draw_demo_image(labels, rng):
    """Draw a photograph with these labels -> (PIL image, {label: (left, top, right, bottom)})."""
    side = 2 * DEMO_SIZE
    grain = _smooth_noise(rng, (side, 12), 7) + _smooth_noise(rng, (6, 6), 14)
    image = _to_image(np.array(_colour(rng)) + grain[..., None])
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 6)):  # clutter that is no label
        corners = rng.normal(0, rng.uniform(4, 18), (rng.integers(2, 6), 2))
        _polygon(pen, *rng.integers(0, side, 2), corners, 0, _colour(rng, 10, 245), outline=None)
    places = rng.permutation([(x, y) for x in (50, 128, 206) for y in (50, 128, 206)]) + rng.integers(-20, 21, (9, 2))
    boxes = {}
    for label, (x, y) in zip(DEMO_LABELS, places):  # parts first, defects over them
        if label in labels:
            box = _draw_label(label, pen, x, y, rng)
            boxes[label] = tuple(int(min(max(edge / 2, 0), DEMO_SIZE)) for edge in box)
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-1, 1, side)
    slope = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    light = rng.uniform(0.65, 1.15) * (1 + rng.uniform(0, 0.35) * slope)  # from one side
    image = _to_image(np.asarray(image) * light[..., None])
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2))).reduce(2)
    return _to_image(np.asarray(image) + rng.normal(0, rng.uniform(2, 8), (DEMO_SIZE, DEMO_SIZE, 3))), boxes


def _colour(rng, low=40, high=215):
    """A random, not very saturated colour."""
    return tuple((rng.integers(low, high) + rng.integers(-50, 51, 3)).clip(0, 255).tolist())


def _smooth_noise(rng, cells, strength):
    """Noise around 0, (side, side), from a coarse grid of `cells` (rows, columns)."""
    grid = Image.fromarray(rng.normal(0, strength, cells).astype(np.float32))
    return np.asarray(grid.resize((2 * DEMO_SIZE, 2 * DEMO_SIZE), Image.Resampling.BICUBIC))


def _to_image(values):
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _polygon(pen, x, y, corners, angle, fill, outline=DARK, line=0):
    """Draw a polygon (or a line of that width) turned by `angle` around (x, y) -> its box."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    corners = np.asarray(corners, float) @ turn + (x, y)
    points = [tuple(corner) for corner in corners.tolist()]
    if line:
        pen.line(points, fill=fill, width=line, joint="curve")
    else:
        pen.polygon(points, fill=fill, outline=outline, width=2)
    return (*corners.min(axis=0), *corners.max(axis=0))


def _star(radii):
    """Corners at the given distances from the middle, all around."""
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


def _draw_label(label, pen, x, y, rng):
    """Draw a part or a defect around (x, y) -> its box."""
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
            pen.ellipse((sx - radius, sy - radius, sx + radius, sy + radius), fill=tuple(brown.tolist()))
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


# ---------------------------------------------------------------------------------------------------------------------
# What all scripts share: errors, a command line that fails in one line, writing files


class InputError(ValueError):
    """The input is wrong. The message names the file, the line or the option, and what to do."""

    def _render_traceback_(self):  # what IPython shows instead of a traceback
        return [f"error: {self}"]


class ImageError(ValueError):
    """A file cannot be read as an image. The message names the file and the reason."""


def run_command(main):
    """Run main(); exit with 1 when it fails, 2 when the input is wrong, 130 on Ctrl-C."""
    try:
        main()
    except InputError as error:
        fail(error, 2)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        fail("out of memory: try a lower -b (--batch-size), --size or --cache", 1)
    except (RuntimeError, OSError, ImageError) as error:
        fail(str(error).splitlines()[0] if str(error) else type(error).__name__, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message, code):
    """Print an error and exit."""
    print_text(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def print_text(text="", file=None, end="\n"):
    """print() that a closed pipe silences; letters that a terminal lacks are escaped."""
    file = file or sys.stdout
    try:
        print(text, file=file, end=end, flush=True)
    except UnicodeEncodeError:
        print_text(text.encode("ascii", "backslashreplace").decode(), file, end)
    except (BrokenPipeError, ValueError):  # ValueError: the stream was closed
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what follows goes nowhere, at the exit too


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action):
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        none = action.default is False or action.default in (None, "", [])
        return action.help if none else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with HelpFormatter that reports a wrong option as an InputError."""

    def __init__(self, **settings):
        super().__init__(formatter_class=HelpFormatter, **settings)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def number(kind, low=0, below=math.inf):
    """A type= function for argparse: a number from `low` up to, but not including, `below`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            limit = "" if below == math.inf else f", below {below}"
            raise argparse.ArgumentTypeError(f"{text}: it must be a number from {low} up{limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def refuse_to_replace(option, path, files):
    """Raise an InputError if what an option names for writing is a folder, or one of `files`, which are read."""
    if os.path.isdir(path):
        raise InputError(f"{option} {path} is a folder: name a file")
    if not os.path.exists(path):
        return

    own = os.stat(path)  # compared by inode, which sees through links and different spellings
    for file in files:
        with contextlib.suppress(OSError):
            if os.path.samestat(own, os.stat(file)):
                raise InputError(f"{option} {path} would replace a file that is read: name another one")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a temporary file that takes the place of `path` when the block ends well, and is removed
    otherwise. A link stays, and its target is replaced; what is no regular file (a pipe,
    /dev/stdout) is written straight. Raises OSError."""
    settings = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "surrogateescape"}
    straight = str(path).startswith("/dev/") or (os.path.exists(path) and not os.path.isfile(path))
    target = Path(path if straight else os.path.realpath(path))
    temporary = target if straight else target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **settings) as file:
            yield file
            file.flush()
            if not straight:
                os.fsync(file.fileno())
        if not straight:
            os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if not straight:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_csv(path, rows):
    """Write rows (lists of cells, the header first) as a CSV file."""
    with atomic_write(path) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_text(path, lines):
    """Write lines as a text file."""
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def to_json(value):
    """A value as JSON text; what is not finite becomes null, since JSON has no NaN."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2, ensure_ascii=False)


def write_json(path, value):
    """Write a value as a JSON file."""
    write_text(path, [to_json(value)])


def write_png(path, image, **options):
    """Write a PIL image as a PNG file. options: as of Image.save()."""
    with atomic_write(path, "wb") as file:
        image.save(file, "PNG", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """The command line; returns the LabelTable that it summarises."""
    parser = ArgumentParser(prog="dataset.py", description="Show what is in a data folder, or write the demo data.")
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder of labels and images (default: data)")
    add_data_options(parser)
    parser.add_argument("--all", action="store_true", help="show all classes, however many")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw a sample of the images with their labels")
    parser.add_argument("--check", action="store_true", help="decode every image, and list bad and identical ones")
    parser.add_argument("--demo", metavar="DIR", help="write the demo data into DIR")
    parser.add_argument("--seed", type=number(int), default=0, help="of the demo data")
    options = parser.parse_args(argv)
    folder = next(filter(os.path.isdir, options.ignore), None)
    if options.data is None and folder:
        raise InputError(f"--ignore takes all names that follow it: is {folder} a column, or the folder of the data? "
                         "Write the folder first: python dataset.py DATA --ignore COLUMN ...")
    if options.sheet and not options.sheet.lower().endswith(".png"):
        raise InputError(f"--sheet {options.sheet}: it is written as PNG: name a file that ends in .png")
    options.data = options.data or "data"

    if options.demo:
        write_demo(options.demo, options.seed)
        options.data = options.demo
        print_text(f"drawn: {options.demo}; next: python train.py --demo --data {options.demo}\n")
    table = read_labels(options.data, **data_options(options))
    if options.sheet:
        refuse_to_replace("--sheet", options.sheet, table.paths)
    print_text(summary(table, options.data, most=10**9 if options.all else 30))
    print_text(f"\n{pairs_summary(table)}\n\n{images_summary(table)}")
    if options.sheet:
        write_png(options.sheet, label_sheet(table))
        print_text(f"drawn: {options.sheet}")
    if options.check:
        bad = find_bad_images(table, os.cpu_count())
        print_text("\n".join([f"{len(table) - len(bad)} of {len(table)} images decode", *bad]))
        if len(bad) == len(table):
            raise InputError(f"none of {len(table)} images decodes, such as {bad[0]}: replace the damaged files")
        for name, first in zip(table.ids, table.copies):
            if name != first:
                print_text(f"{name} is the same image as {first}")
    return table


if __name__ == "__main__":
    run_command(main)
