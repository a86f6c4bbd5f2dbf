"""Label files and images in, tensors out.

    python dataset.py data/                     # what is in a data folder
    python dataset.py data/ --check             # and decode every image
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
import json
import math
import os
import sys
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".avif"}
LABEL_VALUES = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0}
LABEL_VALUES |= dict.fromkeys(["NA", "na", "N/A", "NaN", "nan", "NAN", "?", "-1", "-1.0", ""], math.nan)
LONGEST_LINE = 2**20  # bytes; a longer one is not of a label file
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is an error, and reported as one


class InputError(ValueError):
    """The user's input is wrong. The message names the file, the line or the option, and what to do."""


class ImageError(ValueError):
    """A file cannot be read as an image. The message names the file and the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# What every script needs: a command line that fails in one line, and files that are written whole or not at all


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


def run_command(main):
    """Run main() as a command and exit: 0 done, 1 the run failed, 2 the input is wrong, 130 Ctrl-C."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        print("error: out of memory: try a lower -b (--batch-size), --size or --cache", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, OSError, ImageError) as error:
        print(f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def check_numbers(options, lowest):
    """Raise an InputError for an option (a number, or several) that is below its lowest value, {name: number}."""
    for name, low in lowest.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [low if values is None else values]:
            if not low <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: it must be a number from {low} up")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a temporary file that takes the place of `path` when the block ends well, and is removed otherwise. A
    process that is killed leaves it, and the next one that writes `path` uses it up. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
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


def write_json(path, value):
    """Write a value as JSON; NaN becomes null, since JSON has no NaN."""

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_text(path, [json.dumps(clean(value), indent=2, ensure_ascii=False)])


def write_png(path, image):
    """Write a PIL image as a PNG file."""
    with atomic_write(path, "wb") as file:
        image.save(file, "PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Label files


@dataclass
class LabelTable:
    """Images and what is known of them: row i is the image `paths[i]`, named `ids[i]`, with labels `targets[i]`."""

    ids: list  # N names, as the label file writes them
    paths: list  # N files (or PIL images)
    targets: np.ndarray  # float32 (N, C): 1, 0, NaN where the label is unknown
    classes: list  # C names
    groups: dict = field(default_factory=dict)  # group name -> its class names; may be empty
    objects: list = field(default_factory=list)  # N names of the physical object shown, kept in one split; may be empty
    missing: list = field(default_factory=list)  # ids of the rows that were dropped: their image is not there
    warnings: list = field(default_factory=list)  # what was odd in the label file, one line each

    def __len__(self):
        return len(self.ids)

    def subset(self, rows):
        """The table of the given rows (an array of row numbers), in that order."""
        columns = (self.ids, self.paths, self.objects)
        ids, paths, objects = ([values[i] for i in rows] if values else [] for values in columns)
        return replace(self, ids=ids, paths=paths, targets=self.targets[rows], objects=objects)


def read_labels(data_dir, labels=None, images=None, label_groups=None, group=None):
    """Read a data folder, whatever its label format -> LabelTable.

    data_dir: the folder. labels: the label file, or the folder of .cls files; by default it is found by looking
    (find_labels). images: the image folder; by default DATA/images, or DATA itself. label_groups: a JSON file
    {group: [class, ...]}; by default DATA/label_groups.json when it is there. group: the column that names the physical
    object an image shows. Rows whose image is missing are dropped and listed in `missing`. Raises InputError.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is not a folder: --data names the folder of labels and images")
    path = Path(labels) if labels else find_labels(data_dir)
    folder = Path(images) if images else data_dir / "images"
    if images and not folder.is_dir():
        raise InputError(f"{folder} is not a folder: --images names the image folder")
    groups_file = Path(label_groups) if label_groups else data_dir / "label_groups.json"
    groups = _read_groups(groups_file) if label_groups or groups_file.is_file() else {}
    if path.is_dir():
        table, lines = _read_cls(path, data_dir)
    else:
        table, lines = _read_file(path, groups, group)
    if groups:
        table = _apply_groups(table, groups, groups_file)
    return _find_images(table, lines, path, ImageFolder(folder if folder.is_dir() else data_dir))


def find_labels(data_dir):
    """The label file of a data folder (or its folder of .cls files), found by looking -> Path. Raises InputError when
    there is none, or several."""
    for name in ("labels.txt", "labels.csv", "image_data.csv"):
        if (data_dir / name).is_file():
            return data_dir / name
    if next((data_dir / "labels").rglob("*.cls"), None):
        return data_dir / "labels"
    found = sorted(path for path in data_dir.iterdir() if path.suffix.lower() in (".txt", ".csv") and path.is_file())
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found) or "no .txt or .csv file"
    raise InputError(f"{data_dir} has {names}: name the label file with --labels FILE, or call it labels.txt")


def _read_lines(path):
    """The lines of a label file, without line ends. UTF-8 with or without BOM; any line end."""
    try:
        parts = []
        with open(path, "rb") as file:
            while part := file.read(LONGEST_LINE):
                if len(part) == LONGEST_LINE and b"\n" not in part and b"\r" not in part:
                    raise InputError(f"{path} has a line of over {LONGEST_LINE} bytes: it is not a label file")
                parts.append(part)
        content = b"".join(parts)
        if b"\0" in content:
            raise InputError(f"{path} has zero bytes, as UTF-16 and binary files do: save it as text in UTF-8")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8: save it as UTF-8") from None
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.rstrip("\n").split("\n")


def _delimiter(path, line):
    """What separates the cells of a table, by its first line that is not blank. " " stands for any white space."""
    if path.suffix.lower() != ".csv" and len(line.split()) > 1:
        return " "
    delimiter = max(",;\t", key=line.count)
    if line and delimiter not in line:
        raise InputError(f"{path}:1: no label column: separate the cells by a comma, a semicolon or a tab, "
                         "or by white space in a .txt file")
    return delimiter


def _cells(path, lines, delimiter):
    """Yield (line number, cells) of every line that is not blank. In CSV a quoted cell may hold the delimiter."""
    if delimiter == " ":
        yield from ((number, line.split()) for number, line in enumerate(lines, 1) if line.strip())
        return
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, skipinitialspace=True,
                        strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}: is a quote left open?") from None


def _read_file(path, groups, group):
    """A label file in the table or the lists format -> (LabelTable without paths, line numbers)."""
    lines = _read_lines(path)
    delimiter = _delimiter(path, next((line for line in lines if line.strip()), ""))
    rows = _cells(path, lines, delimiter)
    number, first = next(rows, (0, []))
    if not first:
        raise InputError(f"{path} is empty: it needs a line per image")
    if delimiter != " " and _looks_like_lists(first, rows):
        return _read_lists(path, list(_cells(path, lines, delimiter)), groups, group)
    return _read_table(path, lines, delimiter, number, first, group)


def _read_table(path, lines, delimiter, number, first, group):
    """The table format: an image per line, then a cell per class with 0, 1 or NA; the header is optional."""
    has_header, width = _read_first(path, number, first)
    header = first[1:] if has_header else [f"Attr{i + 1}" for i in range(width)]
    twice = _first_repeated(header)
    if twice is not None:
        raise InputError(f"{path}:{number}: the class {twice} is there twice: rename one of the columns")
    if group and group not in header:
        raise InputError(f"--group {group}: {path} has no such column; it has {', '.join(header)}")
    skip = number if has_header else 0
    rows = None if group else _plain_rows(lines, delimiter, skip, width)
    names, numbers, targets, objects = rows or _any_rows(path, lines, delimiter, skip, header, group)
    if not names:
        raise InputError(f"{path} has a header and no rows: it needs a line per image")
    classes = [name for name in header if name != group]
    return LabelTable(names, [], targets, classes, objects=objects), numbers


def _first_repeated(names):
    """The first name that was there before, or None."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _read_first(path, number, cells):
    """Whether the first line is a header, and how many label columns there are."""
    labels = [cell in LABEL_VALUES for cell in cells]
    width = labels[::-1].index(False) if False in labels else len(cells) - 1  # the cells at the end that read as labels
    if len(cells) < 2:
        raise InputError(f"{path}:{number}: no label column: the image comes first, then 0, 1 or NA for each class")
    if width == 0 and not any(labels[1:]) and Path(cells[0]).suffix.lower() not in IMAGE_SUFFIXES:
        return True, len(cells) - 1
    name = " ".join(cells[: len(cells) - width])  # a file name may hold blanks
    if width == 0 or (width < len(cells) - 1 and Path(name).suffix.lower() not in IMAGE_SUFFIXES):
        bad = next(cell for cell in cells[1:] if cell not in LABEL_VALUES)
        raise InputError(f"{path}:{number}: {bad!r} is not 0, 1 or NA")
    return False, width


def _plain_rows(lines, delimiter, skip, width):
    """_any_rows() as array work, for rows without quotes and with one delimiter between cells; else None."""
    if "" in lines:
        return None
    numbers, lines = range(skip + 1, len(lines) + 1), lines[skip:]
    names = [line[: line.find(delimiter)] for line in lines]
    data = "\n".join([line[len(name) + 1 :] for line, name in zip(lines, names)] + [""]).encode()
    for letter, word, code in ((".", "1.0", "1"), (".", "0.0", "0"), ("-", "-1", "?"), ("n", "nan", "?"),
                               ("N", "NaN", "?"), ("N", "NA", "?")):
        if letter.encode() in data:  # to find a letter takes a tenth of the time of a word
            data = data.replace(word.encode(), code.encode())
    if delimiter != " ":
        comma = delimiter.encode()
        for _ in range(2):  # ",,,": the second pass takes the cells that share a comma with the first
            data = data.replace(comma + comma, comma + b"?" + comma)
        data = data.replace(comma + b"\n", comma + b"?\n")
    joined = "".join(names)
    odd = '"' in joined or b'"' in data or (delimiter == " " and joined.split() != [joined])
    if odd or len(data) != len(lines) * 2 * width:
        return None
    cells = np.frombuffer(data, np.uint8).reshape(len(lines), 2 * width)
    values = np.full(256, 2, np.float32)
    values[[ord("0"), ord("1"), ord("?")]] = 0, 1, math.nan
    targets = values[cells[:, ::2]]
    separators = np.array([ord(delimiter)] * (width - 1) + [ord("\n")], np.uint8)
    if (targets == 2).any() or (cells[:, 1::2] != separators).any():
        return None
    return names if delimiter == " " else [name.strip() for name in names], numbers, targets, []


def _any_rows(path, lines, delimiter, skip, header, group):
    """-> (names, line numbers, targets (N, C), objects) of the lines after the first `skip`."""
    names, numbers, targets, objects = [], [], [], []
    place = header.index(group) if group else None
    for number, cells in _cells(path, lines, delimiter):
        if number <= skip:
            continue
        extra = len(cells) - len(header) - 1
        if delimiter == " " and extra > 0 and cells[extra] not in LABEL_VALUES:
            cells, extra = [" ".join(cells[: extra + 1]), *cells[extra + 1 :]], 0  # a file name with blanks
        if extra:
            raise InputError(f"{path}:{number}: {len(cells) - 1} labels, but there are {len(header)} classes")
        name, *cells = cells
        if group:
            objects.append(cells.pop(place))
        bad = next((cell for cell in cells if cell not in LABEL_VALUES), None)
        if bad is not None:
            raise InputError(f"{path}:{number}: {bad!r} is not 0, 1 or NA")
        names.append(name)
        numbers.append(number)
        targets.append([LABEL_VALUES[cell] for cell in cells])
    return names, numbers, np.array(targets, np.float32), objects


ID_COLUMNS = ("id", "image_id", "image", "filename")


def _looks_like_lists(header, rows):
    """Whether a CSV file holds lists of names: it has an ID column, and no cell of the others is a label value or yes
    or no. Looks at the first rows."""
    names = [name.lower() for name in header]
    place = next((names.index(name) for name in ID_COLUMNS if name in names), None)
    if place is None:
        return False
    cells = {cell.lower() for _, row in islice(rows, 100) for i, cell in enumerate(row) if i != place}
    return bool(cells - {"", "nan"}) and not cells & {"0", "1", "-1", "0.0", "1.0", "yes", "no", "true", "false"}


def _read_lists(path, rows, groups, group):
    """The lists format: an ID column and columns of names separated by ";"; rows of one ID are united."""
    (number, header), *rows = rows
    twice = _first_repeated(header)
    if twice is not None:
        raise InputError(f"{path}:{number}: the column {twice!r} is there twice: rename one of the columns")
    names = [name.lower() for name in header]
    place = next(names.index(name) for name in ID_COLUMNS if name in names)
    if group and group not in header:
        raise InputError(f"--group {group}: {path} has no such column; it has {', '.join(header)}")
    columns = [i for i, name in enumerate(header) if i != place and name != group]
    if groups:  # other columns are no labels
        columns = [i for i in columns if header[i] in groups or names[i] == "labels"]
        if not columns:
            raise InputError(f"{path}: no column is named labels, or like one of the groups {', '.join(groups)}")
    found, lines, objects, first_column = {}, {}, {}, {}
    for number, cells in rows:
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: {len(cells)} cells, but the header has {len(header)}")
        labels = found.setdefault(cells[place], set())
        lines.setdefault(cells[place], number)
        if group:
            objects.setdefault(cells[place], cells[header.index(group)])
        for i in columns:
            stem = names[i].removesuffix("s")
            for name in filter(None, map(str.strip, cells[i].split(";"))):
                if name.lower() in (stem, stem + "s", "nan"):  # a placeholder
                    continue
                labels.add(name)
                if first_column.setdefault(name, i) != i and not groups:
                    raise InputError(f"{path}:{number}: {name} is in the columns {header[first_column[name]]} and "
                                     f"{header[i]}: rename it in one of them")
    if not first_column:
        raise InputError(f"{path} names no labels in {', '.join(header[i] for i in columns)}")
    own = {header[i]: sorted(name for name, column in first_column.items() if column == i) for i in columns}
    classes = list(dict.fromkeys(name for members in own.values() for name in members))
    valid = [name for members in groups.values() for name in members if name not in first_column]  # known, never seen
    index = {name: c for c, name in enumerate(classes + valid)}
    targets = np.zeros((len(found), len(index)), np.float32)
    for row, labels in enumerate(found.values()):
        targets[row, [index[name] for name in labels]] = 1
    own = {} if len(own) == 1 else own
    return LabelTable(list(found), [], targets, list(index), own, list(objects.values())), list(lines.values())


def _read_cls(folder, data_dir):
    """The cls format: for each image a file LABELS/**/NAME.cls with a class index per line."""
    classes = _read_class_names(data_dir)
    files = sorted(folder.rglob("*.cls"))
    if not files:
        raise InputError(f"{folder} holds no .cls files")
    targets, indices = np.zeros((len(files), len(classes)), np.float32), {str(c): c for c in range(len(classes))}
    for row, file in enumerate(files):
        for number, line in enumerate(_read_lines(file), 1):
            if line.strip():
                if line.strip() not in indices:
                    raise InputError(f"{file}:{number}: {line.strip()!r} is not a class index, 0 to {len(classes) - 1}")
                targets[row, indices[line.strip()]] = 1
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    return LabelTable(names, [], targets, classes), names


def _read_class_names(data_dir):
    """The names of classes.txt (a name per line) or classes.json (a list, or {"classes": list}), else those of COCO."""
    text, file = data_dir / "classes.txt", data_dir / "classes.json"
    if text.is_file():
        return [line.strip() for line in _read_lines(text) if line.strip()]
    if not file.is_file():
        return COCO_CLASSES
    content = _read_json(file)
    classes = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f'{file}: it must look like ["class", ...] or {{"classes": ["class", ...]}}')
    return classes


COCO_CLASSES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,
wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")


def _read_json(path):
    try:
        return json.loads("\n".join(_read_lines(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {getattr(error, 'msg', error)}") from None


def _read_groups(path):
    """A JSON file {group: [class, ...]} -> dict."""
    groups = _read_json(path)
    if not isinstance(groups, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups.values()
    ):
        raise InputError(f'{path}: it must look like {{"group": ["class", ...], ...}}')
    twice = _first_repeated([name for members in groups.values() for name in members])
    if twice is not None:
        raise InputError(f"{path}: {twice} is there twice: rename one")
    return groups


def _apply_groups(table, groups, path):
    """Order the classes by their groups; those that are in no group are dropped, and counted in a warning."""
    column = {name: c for c, name in enumerate(table.classes)}
    groups = {group: [name for name in names if name in column] for group, names in groups.items()}
    classes = [name for names in groups.values() for name in names]
    if not classes:
        raise InputError(f"{path}: none of its names is a class; the classes are {', '.join(table.classes)}")
    dropped = [f"{name} ({int(np.nansum(table.targets[:, column[name]]))} times)"
               for name in table.classes if name not in classes]
    warnings = [f"{len(dropped)} classes are in no group of {path} and were dropped: {', '.join(dropped)}"]
    return replace(table, classes=classes, targets=table.targets[:, [column[name] for name in classes]], groups=groups,
                   warnings=table.warnings + warnings * bool(dropped))


class ImageFolder:
    """The files below a folder, listed once, and found by their name or their stem."""

    def __init__(self, root):
        self.root = str(root)
        self.names = set()  # relative to root, with "/"
        folders = [("", self.root)]
        while folders:
            prefix, folder = folders.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if entry.is_dir():
                        folders.append((name + "/", entry.path))
                    else:
                        self.names.add(name)
        self.stems = None

    def path(self, name):
        """The path of one of the names."""
        return f"{self.root}/{name}"

    def find(self, name, where):
        """The path of an image by its name, with or without suffix, or None. `where` is "FILE:LINE", for errors."""
        if name in self.names:
            return self.path(name)
        inside = name.replace("\\", "/")
        inside = os.path.relpath(inside, self.root) if os.path.isabs(inside) else os.path.normpath(inside)
        inside = inside.replace(os.sep, "/")
        if inside.split("/")[0] == "..":
            raise InputError(f"{where}: {name} lies outside the image folder {self.root}: move the image into it")
        inside = inside.removeprefix(os.path.basename(self.root) + "/")
        return self.path(inside) if inside in self.names else self._find_stem(inside, where)

    def _find_stem(self, name, where):
        if self.stems is None:
            self.stems = {}
            for relative in sorted(self.names):
                stem, suffix = os.path.splitext(relative)
                if suffix.lower() in IMAGE_SUFFIXES:
                    for key in {stem, stem.rpartition("/")[2]}:
                        self.stems.setdefault(key, []).append(relative)
        found = self.stems.get(name, [])
        if len(found) > 1:
            raise InputError(f"{where}: {name} can be {found[0]} or {found[1]}: write the whole name")
        return self.path(found[0]) if found else None


def _find_images(table, lines, path, files):
    """Set the paths of a table: missing images are dropped, rows of one image united. lines: for error messages."""
    distinct = set(table.ids)
    if len(distinct) == len(table) and distinct <= files.names:
        return replace(table, paths=[files.path(name) for name in table.ids])
    paths = [files.find(name, f"{path}:{line}") for name, line in zip(table.ids, lines)]
    missing = [name for name, image in zip(table.ids, paths) if image is None]
    if len(missing) == len(paths):
        raise InputError(f"{path}: none of its {len(paths)} images is in {files.root}; the first one is {missing[0]}: "
                         "name the image folder with --images")
    first, keep, targets = {}, [], table.targets
    for row, image in enumerate(paths):
        other = first.setdefault(image, row)
        if image is None:
            continue
        if other == row:
            keep.append(row)
            continue
        conflict = np.flatnonzero(targets[row] + targets[other] == 1)
        if len(conflict):
            raise InputError(f"{path}:{lines[row]}: {table.ids[row]} has another label for "
                             f"{table.classes[conflict[0]]} than in line {lines[other]}: remove one of the two lines")
        targets[other] = np.fmax(targets[row], targets[other])
    united = len(paths) - len(missing) - len(keep)
    warnings = [f"{united} rows name an image again and were united with its first row"] if united else []
    table = replace(table, paths=paths, missing=missing, warnings=table.warnings + warnings)
    return table.subset(np.array(keep))


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def split(table, ratios=(0.7, 0.15, 0.15), method="stratified", seed=0):
    """Divide a table -> three ascending arrays of row numbers: train, val, test. Rows of one object stay together.

    ratios: three numbers >= 0, taken relative to their sum; train and val must not be 0. method: "stratified" is the
    iterative stratification of Sechidis, Tsoumakas & Vlahavas (2011), "On the Stratification of Multi-Label Data",
    on the known positives, so that rare classes reach every split; "random" shuffles. Raises InputError.
    """
    ratios = np.array(ratios, float)
    if len(ratios) != 3 or not np.isfinite(ratios).all() or ratios.min() < 0 or ratios[:2].min() == 0:
        raise InputError("--split takes three ratios, train, val and test; only the last may be 0")
    units = np.arange(len(table))
    if table.objects:
        units = np.unique(table.objects, return_inverse=True)[1]
    sizes = np.bincount(units)
    if len(sizes) < np.count_nonzero(ratios):
        what = "objects" if table.objects else "images"
        raise InputError(f"{len(sizes)} {what} are too few for {np.count_nonzero(ratios)} splits: "
                         "add images, or change --split")
    rng = np.random.default_rng(seed)
    if method == "random":
        part = _random_parts(sizes, ratios / ratios.sum(), rng)
    else:
        positives = np.zeros((len(sizes), table.targets.shape[1]))
        np.add.at(positives, units, np.nan_to_num(table.targets))
        part = _stratified_parts(positives, sizes, ratios / ratios.sum(), rng)
    for empty in set(np.flatnonzero(ratios)) - set(part):  # tiny data: every split asked for gets something
        part[rng.choice(np.flatnonzero(part == np.bincount(part).argmax()))] = empty
    return [np.flatnonzero(part[units] == k) for k in range(3)]


def _random_parts(sizes, ratios, rng):
    order = rng.permutation(len(sizes))
    done = (np.cumsum(sizes[order]) - sizes[order] / 2) / sizes.sum()
    part = np.empty(len(sizes), int)
    part[order] = np.searchsorted(np.cumsum(ratios)[:-1], done, side="right")
    return part


def _stratified_parts(positives, sizes, ratios, rng):
    """Iterative stratification of units with (U, C) counts of positives: the label with the fewest units left goes
    first, and each of its units goes to the split that still wants most of that label."""
    part = np.full(len(sizes), -1)
    want = ratios[:, None] * positives.sum(axis=0)  # (3, C) positives each split still wants
    room = ratios * sizes.sum()  # (3,) images each split still wants
    allowed = np.where(ratios > 0, 0.0, -np.inf)
    order = rng.permutation(len(sizes))
    has = positives > 0
    left = has.sum(axis=0)
    while left.any():
        label = np.argmin(np.where(left > 0, left, np.inf))
        for unit in order[has[order, label] & (part[order] < 0)]:
            k = max(range(3), key=lambda k: (want[k, label] + allowed[k], room[k]))
            part[unit] = k
            want[k] -= positives[unit]
            room[k] -= sizes[unit]
        left = has[part < 0].sum(axis=0)
    for unit in order[part[order] < 0]:  # units without a positive
        k = np.argmax(room + allowed)
        part[unit] = k
        room[k] -= sizes[unit]
    return part


# ---------------------------------------------------------------------------------------------------------------------
# Images


def load_image(image, size=None):
    """An image file, or a PIL image, -> PIL image in mode RGB, upright by its EXIF orientation.

    size: the result is resized to (size, size); JPEG files are then decoded at the smallest scale that holds it.
    Transparent pixels are laid on white, 16 bits become 8, of an animation the first frame is taken. Raises ImageError.
    """
    name = getattr(image, "filename", "image") if isinstance(image, Image.Image) else image
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
            if size:
                image.draft("RGB", (size, size))
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image)
        return image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0) if size else image
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error or type(error).__name__
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or reason}") from error


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits, for which Pillow's own conversion clips instead of scaling
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


PAGE = 4096  # bytes of memory that an image in the cache takes beside its pixels: they fill whole pages, in objects


class ImageDataset(torch.utils.data.Dataset):
    """The images of a LabelTable: dataset[i] is (image uint8 (3, size, size), targets float32 (C,), id).

    Decoded images are kept in memory, up to cache_bytes of them. An image that cannot be read is grey with all its
    labels unknown, so that it counts for nothing, and `errors` says why: row number -> message.
    """

    def __init__(self, table, size, cache_bytes=0):
        self.table, self.size, self.errors = table, size, {}
        self.targets = torch.from_numpy(table.targets.copy())
        self._pixels = {}
        self._capacity = int(cache_bytes // (3 * size * size + PAGE))

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
    """Yield (images uint8 (B, 3, S, S) in channels_last, targets float32 (B, C), rows) for each rows in `order`.

    `workers` threads decode ahead, a batch each: Pillow decodes and resizes without holding the interpreter, and
    threads share the dataset's cache, need no shared memory and start at once on every platform. 0 decodes when asked.
    pin: the images are put into page-locked memory, from which a GPU copies in the background.
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
    """Images (B, 3, H, W), uint8 or float in 0..255 -> float32, normalised as ImageNet networks expect."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=images.device).view(2, 3, 1, 1) * 255
    return (images.float() - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation, on a whole batch where the network is: every turn, shift and stretch is one matrix and one sampling


LEVELS = {
    "none": (),
    "light": ("flip", "crop"),
    "rich": ("resized_crop", "flip", "rotation", "perspective", "jitter", "erasing"),
}
OPERATIONS = ("flip", "vflip", "rotation", "crop", "resized_crop", "perspective", "jitter", "erasing")
NOISE = 18  # random numbers per image, each with its own use


def read_operations(text):
    """A level, or operations separated by commas -> tuple of names of OPERATIONS. Raises InputError."""
    names = LEVELS.get(text, tuple(text.split(",")))
    wrong = [name for name in names if name not in OPERATIONS]
    if wrong:
        raise InputError(f"--augment {text}: {wrong[0]!r} is not one of {', '.join([*LEVELS, *OPERATIONS])}")
    return names


def draw_noise(count, seed, epoch):
    """The random numbers behind the augmentation of `count` images -> (count, NOISE) in [0, 1).

    They depend on the seed, the epoch and the row alone, so that loading order and threads do not matter.
    """
    return torch.rand(count, NOISE, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def augment(images, operations, noise):
    """Change each image of a batch in its own random way -> float32 (B, 3, H, W) in 0..255.

    images: (B, 3, H, W), uint8 or float in 0..255. operations: names of OPERATIONS. noise: (B, NOISE) of draw_noise().
    """
    images = images.float()
    flips, matrix = {"flip", "vflip"}, _geometry(operations, noise)
    if set(operations) & set(OPERATIONS[:6]) <= flips:  # whole pixels: no sampling needed
        for name, axis, column in (("flip", 3, 0), ("vflip", 2, 1)):
            if name in operations:
                images = torch.where(noise[:, column].view(-1, 1, 1, 1) < 0.5, images.flip(axis), images)
    else:
        images = _sample(images, matrix)
    if "jitter" in operations:
        images = _jitter(images, 0.8 + 0.4 * noise[:, 10:13])
    if "erasing" in operations:
        images = torch.where(_box(noise[:, 13:18], images.shape[2:]), 127.0, images)
    return images


def _geometry(operations, noise):
    """(B, 3, 3): where in the input, in [-1, 1], each point of the output comes from."""
    signed = 2 * noise - 1
    one, zero = torch.ones_like(noise[:, 0]), torch.zeros_like(noise[:, 0])

    def matrix(a=one, b=zero, x=zero, c=zero, d=one, y=zero, p=zero, q=zero):
        return torch.stack([a, b, x, c, d, y, p, q, one], dim=1).view(-1, 3, 3)

    total = matrix()
    if "resized_crop" in operations:  # 50 to 100 % of the area, sides 3:4 to 4:3, anywhere
        area, ratio = 0.5 + 0.5 * noise[:, 5], (4 / 3) ** signed[:, 6]
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        total = total @ matrix(a=width, d=height, x=(1 - width) * signed[:, 3], y=(1 - height) * signed[:, 4])
    if "crop" in operations:  # 224 of 256 pixels, anywhere
        side = one * 224 / 256
        total = total @ matrix(a=side, d=side, x=(1 - side) * signed[:, 3], y=(1 - side) * signed[:, 4])
    if "rotation" in operations:  # up to 10 degrees
        angle = signed[:, 2] * math.radians(10)
        total = total @ matrix(a=angle.cos(), b=-angle.sin(), c=angle.sin(), d=angle.cos())
    if "perspective" in operations:  # half of the images, one side up to 1.5 times as long as the other
        strength = 0.2 * (noise[:, 9] < 0.5)
        total = total @ matrix(p=strength * signed[:, 7], q=strength * signed[:, 8])
    if "flip" in operations:
        total = total @ matrix(a=torch.where(noise[:, 0] < 0.5, -one, one))
    if "vflip" in operations:
        total = total @ matrix(d=torch.where(noise[:, 1] < 0.5, -one, one))
    return total


def _sample(images, matrix):
    batch, _, height, width = images.shape
    x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=images.device) * 2 + 1) / height - 1
    points = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width, device=images.device)], -1)
    places = points.view(1, -1, 3) @ matrix.transpose(1, 2)
    grid = (places[..., :2] / places[..., 2:]).view(batch, height, width, 2)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _jitter(images, factors):
    """Scale saturation, contrast and brightness by `factors` (B, 3)."""
    saturation, contrast, brightness = factors.view(-1, 3, 1, 1, 1).unbind(1)
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, saturation)
    images = torch.lerp(images.mean(dim=(1, 2, 3), keepdim=True), images, contrast)
    return (images * brightness).clamp(0, 255)


def _box(noise, shape):
    """For a quarter of the images a box of 2 to 20 % of the area, (B, 1, H, W) boolean."""
    area, ratio = 0.02 + 0.18 * noise[:, 1], 3 ** (2 * noise[:, 2] - 1)
    inside = (noise[:, 0] < 0.25).view(-1, 1, 1, 1)
    for axis, size in ((2, (area * ratio).sqrt()), (3, (area / ratio).sqrt())):
        start = (1 - size) * noise[:, axis + 1]
        place = ((torch.arange(shape[axis - 2], device=noise.device) + 0.5) / shape[axis - 2]).expand(len(noise), -1)
        along = (place >= start[:, None]) & (place < (start + size)[:, None])
        inside = inside & (along[:, None, :, None] if axis == 2 else along[:, None, None, :])
    return inside


# ---------------------------------------------------------------------------------------------------------------------
# Pictures with words under them


BLACK, GREY, GREEN, RED, BLUE = "#222222", "#767676", "#1b7837", "#b2182b", "#1f4e9c"


def load_font(size):
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def fit_text(text, font, width):
    """The text, or as much of it as `width` pixels hold, with dots after it."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrap_text(text, font, width, most=4):
    """The text as at most `most` lines of at most `width` pixels, broken at its blanks; what does not fit is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = fit_text(longer, font, width)
        else:
            lines.append(fit_text(word, font, width))
    if len(lines) > most:
        lines = [*lines[: most - 1], fit_text(f"{lines[most - 1]} {lines[most]}", font, width)]
    return lines


def fit_image(image, side):
    """A PIL image, resized so that its longer side has `side` pixels."""
    return image.resize([max(1, round(length * side / max(image.size))) for length in image.size])


def draw_sheet(cells, title, columns=6, width=200):
    """Pictures in rows with words under them -> PIL image. cells: a list of (PIL image, [(line of text, colour), ...]).
    """
    font, heading, gap, line = load_font(13), load_font(17), 14, 17
    columns = max(1, min(columns, len(cells)))
    texts = [[(part, colour) for text, colour in lines for part in wrap_text(text, font, width)] for _, lines in cells]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    pictures = [fit_image(picture, width) for picture, _ in cells]
    tops = [max(pictures[i].height for i in row) for row in rows]
    heights = [top + line * max(len(texts[i]) for i in row) + gap + 6 for top, row in zip(tops, rows)]
    total = columns * (width + gap) + gap
    titles = wrap_text(title, heading, total - 2 * gap)
    y = gap + 6 + 24 * len(titles)
    sheet = Image.new("RGB", (total, y + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(titles):
        pen.text((gap, 10 + 24 * number), text, BLACK, heading)
    for row, top, height in zip(rows, tops, heights):
        for column, i in enumerate(row):
            x, picture = gap + column * (width + gap), pictures[i]
            sheet.paste(picture, (x + (width - picture.width) // 2, y + top - picture.height))
            for number, (text, colour) in enumerate(texts[i]):
                pen.text((x, y + top + 5 + number * line), text, colour, font)
        y += height
    return sheet


def list_names(classes, chosen):
    """The names of the chosen classes (C,), boolean, as text."""
    return ", ".join(classes[c] for c in np.flatnonzero(chosen))


def label_sheet(table, count=24, seed=0):
    """A random sample of a table's images with their labels -> PIL image."""
    rows, cells = np.random.default_rng(seed).permutation(len(table))[:count], []
    for row in sorted(rows):
        present, unknown = (list_names(table.classes, chosen)
                            for chosen in (table.targets[row] == 1, np.isnan(table.targets[row])))
        lines = [(table.ids[row], BLACK), (present or "no label", GREEN)]
        if unknown:
            lines.append((f"NA: {unknown}", GREY))
        try:
            cells.append((load_image(table.paths[row]), lines))
        except ImageError as error:
            cells.append((Image.new("RGB", (8, 8), "#dddddd"), [*lines, (str(error).rpartition(": ")[2], RED)]))
    return draw_sheet(cells, f"{len(cells)} of {len(table)} images")


def distinct_names(paths):
    """A file name for each path, without folders: its own, where two have the same with the folder's name before it,
    and where that is not enough with a number."""
    names, taken = [], set()
    for path in map(Path, paths):
        stem = path.stem if path.name not in taken else f"{path.parent.name}_{path.stem}"
        name, number = stem + path.suffix, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}{path.suffix}"
        taken.add(name)
        names.append(name)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# What is in a data folder


def summary(table, title="data"):
    """A LabelTable as text: rows, images, missing files, and per class positives, negatives, NA and prevalence, with a
    bar of 20 characters: # positives, - negatives, blank NA."""
    positives, negatives = (np.count_nonzero(table.targets == value, axis=0) for value in (1, 0))
    rows = len(table) + len(table.missing)
    lines = [f"{title}: {rows} rows, {len(table)} images, {len(table.missing)} missing, {len(table.classes)} classes"]
    if table.missing:
        more = f" and {len(table.missing) - 10} more" if len(table.missing) > 10 else ""
        lines.append(f"missing: {', '.join(table.missing[:10])}{more}")
    lines += [f"warning: {warning}" for warning in table.warnings]
    group_of = {name: group for group, names in table.groups.items() for name in names}
    width = max(5, *map(len, table.classes))
    head = f"{'class':{width}} {'positives':>9} {'negatives':>9} {'NA':>7} {'prevalence':>10}"
    lines.append(head + f"  {'':20}  group" * bool(group_of))
    for name, yes, no in zip(table.classes, positives, negatives):
        share = f"{yes / (yes + no):10.1%}" if yes + no else f"{'n/a':>10}"
        full = math.ceil(20 * yes / len(table))
        bar = "#" * full + "-" * (math.ceil(20 * (yes + no) / len(table)) - full)
        line = f"{name:{width}} {yes:9} {no:9} {len(table) - yes - no:7} {share}  {bar:20}  {group_of.get(name, '')}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def pairs_summary(table, most=10):
    """The pairs of classes that are most often positive together, as text."""
    positive = (table.targets == 1).astype(np.float32)
    together = np.triu(positive.T @ positive, k=1)
    pairs = [np.unravel_index(flat, together.shape) for flat in np.argsort(-together, axis=None, kind="stable")[:most]]
    lines = [f"{int(together[a, b]):9}  {table.classes[a]} + {table.classes[b]}" for a, b in pairs if together[a, b]]
    return "\n".join(["most frequent pairs:", *lines]) if lines else "no two classes are positive together"


def images_summary(table, most=1000):
    """The sizes, modes and formats of a table's images, or of `most` of them, by their headers, as text."""
    sizes, kinds = [], Counter()
    paths = table.paths[:: -(-len(table) // most)]
    for path in paths:
        with contextlib.suppress(Exception), Image.open(path) as image:  # --check is what reports bad images
            sizes.append(image.size)
            kinds[f"{image.mode} {image.format}"] += 1
    if not sizes:
        return "no image can be opened"
    widths, heights = (sorted(values) for values in zip(*sizes))
    middle = len(sizes) // 2
    return (f"{len(sizes)} of {len(table)} images opened: width {widths[0]} to {widths[-1]}, median {widths[middle]}; "
            f"height {heights[0]} to {heights[-1]}, median {heights[middle]}\n"
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
# Demo data: drawn inspection photographs of machine parts and their defects


DEMO_GROUPS = {"parts": ["bolt", "bracket", "ring"], "defects": ["rust", "crack", "hole"]}
DEMO_SIZE = 128  # pixels; drawn at twice that


def write_demo(folder, seed=0, count=1000, style="table"):
    """Write `count` drawn photographs and their labels into `folder`: the same files for the same seed.

    As in real life 8 % of the labels are NA, a few files are PNG, RGBA, greyscale or turned by EXIF, and one row names
    a file that is not there. style: "table", "lists" or "cls", the label format; only the first can say NA.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    classes = [name for names in DEMO_GROUPS.values() for name in names]
    rows = []  # (file name, labels, known)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        labels = draw_demo_labels(rng)
        image, _ = draw_demo_image(labels, rng)
        name, exif = f"part_{i:04}.{'png' if i % 100 in (7, 8) else 'jpg'}", Image.Exif()
        if i % 100 == 7:
            image.putalpha(255)
        elif i % 100 == 9:
            image = image.convert("L")
        elif i % 100 == 10:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / "images" / name, quality=88, exif=exif)
        rows.append((name, labels, rng.random(len(classes)) >= 0.08))
    rows.append((f"part_{count:04}.jpg", set(), np.ones(len(classes), bool)))
    if style == "cls":
        write_text(folder / "classes.txt", classes)
        for name, labels, _ in rows:
            write_text(folder / "labels" / f"{Path(name).stem}.cls", [classes.index(label) for label in sorted(labels)])
        return
    write_json(folder / "label_groups.json", DEMO_GROUPS)
    if style == "table":  # the label file comes last: with it the folder is complete
        words = ([str(int(c in labels)) if k else "NA" for c, k in zip(classes, known)] for _, labels, known in rows)
        lines = [" ".join([name, *cells]) for (name, _, _), cells in zip(rows, words)]
        write_text(folder / "labels.txt", ["image " + " ".join(classes), *lines])
        return
    lists = [["ID", *DEMO_GROUPS]]  # a row per part found, as inspectors write them, with the defects in the first
    for name, labels, _ in rows:
        parts, defects = (sorted(labels & set(names)) for names in DEMO_GROUPS.values())
        lists.append([Path(name).stem, parts[0] if parts else "part", ";".join(defects) or "defect"])
        lists += [[Path(name).stem, part, "nan"] for part in parts[1:]]
    write_csv(folder / "image_data.csv", lists)


def draw_demo_labels(rng):
    """A random set of labels: rust likes bolts, cracks like brackets, holes are rare."""
    labels = {name for name, share in (("bolt", 0.45), ("bracket", 0.4), ("ring", 0.35)) if rng.random() < share}
    chances = {"rust": 0.5 if "bolt" in labels else 0.15, "crack": 0.45 if "bracket" in labels else 0.15, "hole": 0.055}
    return labels | {name for name, share in chances.items() if rng.random() < share}


def draw_demo_image(labels, rng):
    """Draw a photograph with the given labels -> (PIL image, {label: its box (left, top, right, bottom)})."""
    image = _draw_background(rng)
    for _ in range(rng.integers(3, 7)):
        _draw_clutter(image, rng)
    places, boxes = rng.permutation([(x, y) for x in (50, 128, 206) for y in (50, 128, 206)]), {}
    for label, (x, y) in zip(DEMO_DRAWERS, places):  # parts first, defects over them
        if label in labels:
            box = DEMO_DRAWERS[label](image, x + rng.integers(-20, 21), y + rng.integers(-20, 21), rng)
            boxes[label] = tuple(int(min(max(edge / 2, 0), DEMO_SIZE)) for edge in box)
    return _photograph(image, rng), boxes


def _colour(rng, low=40, high=215, tint=50):
    """A random, not very saturated colour."""
    return tuple(int(v) for v in (rng.integers(low, high) + rng.integers(-tint, tint + 1, 3)).clip(0, 255))


def _noise_image(rng, cells, strength):
    """Smooth noise around 0, (256, 256), from a coarse grid of `cells` (rows, columns)."""
    grid = Image.fromarray(rng.normal(0, strength, cells).astype(np.float32))
    return np.asarray(grid.resize((2 * DEMO_SIZE, 2 * DEMO_SIZE), Image.Resampling.BICUBIC))


def _to_image(values):
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _draw_background(rng):
    """Painted or brushed metal, with stains."""
    grain = (256, 12) if rng.random() < 0.5 else (12, 256)
    shade = _noise_image(rng, (6, 6), 12) + _noise_image(rng, grain, 7)
    stains = _noise_image(rng, (5, 5), 8)[..., None] * rng.random(3)
    return _to_image(np.array(_colour(rng)) + shade[..., None] + stains)


def _photograph(image, rng):
    """Light from one side, a little blur and noise, and the final size."""
    angle, axis = rng.uniform(0, 2 * math.pi), np.linspace(-1, 1, 2 * DEMO_SIZE)
    slope = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    light = rng.uniform(0.65, 1.15) * (1 + rng.uniform(0, 0.35) * slope)
    image = _to_image(np.asarray(image) * light[..., None] * rng.uniform(0.9, 1.1, 3))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2))).reduce(2)
    return _to_image(np.asarray(image) + rng.normal(0, rng.uniform(2, 8), (DEMO_SIZE, DEMO_SIZE, 3)))


def _around(x, y, points, angle, scale=1.0):
    """Points turned by `angle`, scaled and moved to (x, y)."""
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    return [(x + cos * px - sin * py, y + sin * px + cos * py) for px, py in points]


def _bounds(points):
    xs, ys = zip(*points)
    return min(xs), min(ys), max(xs), max(ys)


def _disc(x, y, radius):
    return x - radius, y - radius, x + radius, y + radius


def _draw_clutter(image, rng):
    """Something that is no label: cables, scratches, plates, spots of any colour."""
    pen, (x, y), kind = ImageDraw.Draw(image), rng.integers(0, 256, 2), rng.integers(4)
    if kind == 0:
        ends = _around(x, y, [(-rng.integers(30, 150), 0), (rng.integers(30, 150), 0)], rng.uniform(0, math.pi))
        pen.line(ends, fill=_colour(rng, 10, 245), width=int(rng.integers(1, 6)))
    elif kind == 1:
        w, h = rng.integers(8, 40, 2)
        pen.polygon(_around(x, y, [(-w, -h), (w, -h), (w, h), (-w, h)], rng.uniform(0, math.pi)), fill=_colour(rng))
    elif kind == 2:
        pen.ellipse(_disc(x, y, rng.integers(6, 26)), fill=_colour(rng, tint=80))
    else:
        brown = tuple(int(v) for v in rng.integers((120, 60, 20), (200, 120, 60)))
        pen.ellipse(_disc(x, y, rng.integers(8, 22)), fill=brown)


def _draw_bolt(image, x, y, rng):
    """A hexagonal head with a round top and a slot."""
    pen, angle, radius = ImageDraw.Draw(image), rng.uniform(0, math.pi), rng.uniform(26, 38)
    corners = [(radius * math.cos(k * math.pi / 3), radius * math.sin(k * math.pi / 3)) for k in range(6)]
    pen.polygon(_around(x + 4, y + 5, corners, angle), fill=(20, 20, 20))
    pen.polygon(_around(x, y, corners, angle), fill=_colour(rng, 60, 230), outline=(30, 30, 30), width=2)
    pen.ellipse(_disc(x, y, radius * 0.62), outline=(30, 30, 30), width=3)
    pen.line(_around(x, y, [(-radius * 0.5, 0), (radius * 0.5, 0)], angle), fill=(30, 30, 30), width=5)
    return _disc(x, y, radius)


def _draw_bracket(image, x, y, rng):
    """An angle plate with a hole in each arm."""
    pen, angle, size = ImageDraw.Draw(image), rng.uniform(0, 2 * math.pi), rng.uniform(30, 42)
    shape = [(-1, -1), (-0.3, -1), (-0.3, 0.3), (1, 0.3), (1, 1), (-1, 1)]
    pen.polygon(_around(x + 4, y + 5, shape, angle, size), fill=(20, 20, 20))
    corners = _around(x, y, shape, angle, size)
    pen.polygon(corners, fill=_colour(rng, 60, 230), outline=(30, 30, 30), width=2)
    for hole in _around(x, y, [(-0.65, -0.6), (0.6, 0.65)], angle, size):
        pen.ellipse(_disc(*hole, size * 0.17), fill=(25, 25, 25))
    return _bounds(corners)


def _draw_ring(image, x, y, rng):
    """A washer: a disc that is open in the middle."""
    pen, radius, width = ImageDraw.Draw(image), rng.uniform(22, 36), int(rng.integers(8, 13))
    pen.ellipse(_disc(x + 4, y + 5, radius), outline=(20, 20, 20), width=width)
    pen.ellipse(_disc(x, y, radius), outline=_colour(rng, 60, 230), width=width)
    pen.ellipse(_disc(x, y, radius), outline=(30, 30, 30), width=2)
    return _disc(x, y, radius)


def _draw_rust(image, x, y, rng):
    """A patch of many small brown and orange spots."""
    pen, spots = ImageDraw.Draw(image), rng.normal((x, y), rng.uniform(11, 17), (110, 2))
    for spot in spots:
        shade = rng.uniform(0.5, 1.15)
        colour = tuple(int(v * shade) for v in (rng.integers(150, 200), rng.integers(70, 105), rng.integers(20, 50)))
        pen.ellipse(_disc(*spot, rng.uniform(1.5, 4.5)), fill=colour)
    return _bounds(spots)


def _draw_crack(image, x, y, rng):
    """A jagged dark line with branches."""
    pen, heading, points = ImageDraw.Draw(image), rng.uniform(0, 2 * math.pi), []
    at = np.array([x - 42 * math.cos(heading), y - 42 * math.sin(heading)])
    for k in range(9):
        points.append(tuple(at))
        turn = heading + rng.uniform(0.6, 1.1) * (-1) ** k
        if k in (3, 5, 6):
            branch = at + 20 * np.array([math.cos(turn + 0.8), math.sin(turn + 0.8)])
            pen.line([tuple(at), tuple(branch)], fill=(18, 16, 16), width=3)
        at = at + rng.uniform(12, 18) * np.array([math.cos(turn), math.sin(turn)])
    pen.line(points, fill=(15, 12, 12), width=6, joint="curve")
    return _bounds(points)


def _draw_hole(image, x, y, rng):
    """A torn hole: black, with a jagged bright rim."""
    pen, radius, angle = ImageDraw.Draw(image), rng.uniform(20, 28), rng.uniform(0, math.pi)
    reach = radius * rng.uniform(0.8, 1.2, 18) * np.tile([1.35, 0.75], 9)
    corners = [(r * math.cos(k * math.pi / 9), r * math.sin(k * math.pi / 9)) for k, r in enumerate(reach)]
    rim = _around(x, y, corners, angle, 1.25)
    pen.polygon(rim, fill=(235, 232, 225))
    pen.polygon(_around(x, y, corners, angle), fill=(12, 10, 10))
    return _bounds(rim)


DEMO_DRAWERS = {"bolt": _draw_bolt, "bracket": _draw_bracket, "ring": _draw_ring,
                "rust": _draw_rust, "crack": _draw_crack, "hole": _draw_hole}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """The command line; returns the LabelTable that it summarises."""
    parser = ArgumentParser(description="Show what is in a data folder, or write the demo data.")
    parser.add_argument("data", nargs="?", default="data", help="folder of labels and images")
    parser.add_argument("--labels", metavar="FILE", help="label file, when it is not found by looking")
    parser.add_argument("--images", metavar="DIR", help="image folder, when it is not DATA/images or DATA")
    parser.add_argument("--label-groups", metavar="FILE", help="JSON file {group: [class, ...]}")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw a sample of the images with their labels")
    parser.add_argument("--check", action="store_true", help="decode every image and list those that cannot be read")
    parser.add_argument("--demo", metavar="DIR", help="write the demo data into DIR")
    parser.add_argument("--format", choices=("table", "lists", "cls"), default="table", help="of the demo's labels")
    parser.add_argument("--seed", type=int, default=0, help="of the demo data")
    options = parser.parse_args(argv)
    if options.demo:
        write_demo(options.demo, options.seed, style=options.format)
        options.data = options.demo
        print(f"drawn: {options.demo}; next: python train.py --demo --data {options.demo}\n")
    table = read_labels(options.data, options.labels, options.images, options.label_groups)
    print(summary(table, options.data), pairs_summary(table), images_summary(table), sep="\n\n")
    if options.sheet:
        write_png(options.sheet, label_sheet(table))
        print(f"drawn: {options.sheet}")
    if options.check:
        bad = find_bad_images(table, os.cpu_count())
        print("\n".join([f"{len(table) - len(bad)} of {len(table)} images decode", *bad]))
    return table


if __name__ == "__main__":
    run_command(main)
