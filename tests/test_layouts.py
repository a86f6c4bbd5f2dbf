"""Label files as real data sets have them: each is read as a person would, or an error names the option.

The files are a few rows each, written from the public descriptions of the data sets; the images are drawn.
"""

import csv
import io
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import dataset
from conftest import draw_images, known_rows
from dataset import InputError

NA = None


@dataclass
class Layout:
    """A data folder, and how it has to be understood."""

    files: dict  # path -> text or bytes
    images: list  # paths
    classes: list
    rows: dict  # id -> a label for each class: 1, 0 or NA
    told: list  # texts that the notes or warnings must hold: what the reader found out by looking
    groups: dict = field(default_factory=dict)
    parts: list = field(default_factory=list)
    objects: list = field(default_factory=list)
    options: dict = field(default_factory=dict)  # of read_labels(), without which it is an error
    named: set = field(default_factory=set)  # the options that this error names


LAYOUTS = {}

# celeba: a line with the number of rows, a header without the image column, 1 and -1 between several blanks
LAYOUTS["CelebA"] = Layout(
    files={"list_attr_celeba.txt": (
        "5\n"
        "5_o_Clock_Shadow Arched_Eyebrows Attractive Male\n"
        "000001.jpg -1  1  1 -1\n"
        "000002.jpg -1 -1 -1 -1\n"
        "000003.jpg -1 -1 -1  1\n"
        "000004.jpg  1 -1  1  1\n"
        "000005.jpg -1  1  1 -1\n")},
    images=[f"img_align_celeba/00000{i}.jpg" for i in range(1, 6)],
    classes=["5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Male"],
    rows={
        "000001.jpg": [0, 1, 1, 0],
        "000002.jpg": [0, 0, 0, 0],
        "000003.jpg": [0, 0, 0, 1],
        "000004.jpg": [1, 0, 1, 1],
        "000005.jpg": [0, 1, 1, 0],
    },
    told=["white space", "line 1 tells the number of rows", "without a title", "a table with 4 columns"],
    options={"negative": "-1"},
    named={"--negative", "--unknown"},
)

# nih chest x-rays: labels separated by "|"; many other columns, some with commas in their titles; a comma
# ends each line
LAYOUTS["ChestX-ray14"] = Layout(
    files={"Data_Entry_2017.csv": (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        "00000001_000.png,Cardiomegaly,0,1,058Y,M,PA,2682,2749,0.143,0.143,\n"
        "00000001_001.png,Cardiomegaly|Emphysema,1,1,058Y,M,PA,2894,2729,0.143,0.143,\n"
        "00000001_002.png,Cardiomegaly|Effusion,2,1,058Y,M,PA,2500,2048,0.168,0.168,\n"
        "00000002_000.png,No Finding,0,2,081Y,M,PA,2500,2048,0.171,0.171,\n"
        "00000003_000.png,Hernia,0,3,081Y,F,PA,2582,2991,0.143,0.143,\n"
        "00000003_001.png,Hernia|Pleural_Thickening,1,3,074Y,F,AP,2500,2048,0.168,0.168,\n")},
    images=["images_001/images/00000001_000.png", "images_001/images/00000001_001.png",
            "images_001/images/00000001_002.png", "images_001/images/00000002_000.png",
            "images_002/images/00000003_000.png", "images_002/images/00000003_001.png"],
    classes=["Cardiomegaly", "Effusion", "Emphysema", "Hernia", "No Finding", "Pleural_Thickening"],
    rows={
        "00000001_000.png": [1, 0, 0, 0, 0, 0],
        "00000001_001.png": [1, 0, 1, 0, 0, 0],
        "00000001_002.png": [1, 1, 0, 0, 0, 0],
        "00000002_000.png": [0, 0, 0, 0, 1, 0],
        "00000003_000.png": [0, 0, 0, 1, 0, 0],
        "00000003_001.png": [0, 0, 0, 1, 0, 1],
    },
    told=["commas", "in the column Image Index", "lists of names in Finding Labels, separated by '|'",
          "left out: Follow-up #, Patient ID, Patient Age, Patient Gender, View Position"],
)

# planet: understanding the amazon from space: tags separated by blanks, which could be one name too
LAYOUTS["Planet Amazon"] = Layout(
    files={"train_v2.csv": (
        "image_name,tags\n"
        "train_0,haze primary\n"
        "train_1,agriculture clear primary water\n"
        "train_2,clear primary\n"
        "train_3,clear primary water\n"
        "train_4,agriculture clear primary\n"
        "train_5,haze primary water\n"
        "train_6,agriculture haze primary\n")},
    images=[f"train-jpg/train_{i}.jpg" for i in range(7)],
    classes=["agriculture", "clear", "haze", "primary", "water"],
    rows={
        "train_0": [0, 0, 1, 1, 0],
        "train_1": [1, 1, 0, 1, 1],
        "train_2": [0, 1, 0, 1, 0],
        "train_3": [0, 1, 0, 1, 1],
        "train_4": [1, 1, 0, 1, 0],
        "train_5": [0, 0, 1, 1, 1],
        "train_6": [1, 0, 1, 1, 0],
    },
    told=["commas", "in the column image_name", "lists of names in tags, separated by ' '"],
    options={"separator": " "},
    named={"--separator"},
)

# pascal voc 2007 as a table: 1 there, -1 absent, 0 difficult, which no score counts
LAYOUTS["VOC 2007"] = Layout(
    files={"classification_trainval.csv": (
        "name,aeroplane,bicycle,person\n"
        "000005,-1,-1,-1\n"
        "000007,-1,1,0\n"
        "000009,-1,-1,1\n"
        "000012,1,-1,-1\n"
        "000016,-1,1,-1\n")},
    images=[f"JPEGImages/{name}.jpg" for name in ("000005", "000007", "000009", "000012", "000016")],
    classes=["aeroplane", "bicycle", "person"],
    rows={
        "000005": [0, 0, 0],
        "000007": [0, 1, NA],
        "000009": [0, 0, 1],
        "000012": [1, 0, 0],
        "000016": [0, 1, 0],
    },
    told=["commas", "in the column name", "a table with 3 columns"],
    options={"negative": "-1", "unknown": "0"},
    named={"--negative", "--unknown"},
)

# open images, image-level labels that people verified: a row per label; confidence 0 means that it is absent
LAYOUTS["Open Images"] = Layout(
    files={"oidv6-train-annotations-human-imagelabels.csv": (
        "ImageID,Source,LabelName,Confidence\n"
        "000026e7ee790996,verification,/m/04hgtk,0\n"
        "000026e7ee790996,verification,/m/07j7r,1\n"
        "000026e7ee790996,crowdsource-verification,/m/0bt9lr,1\n"
        "000062a39995e348,verification,/m/07j7r,0\n"
        "000062a39995e348,verification,/m/015p6,1\n"
        "0000c64e1253d68f,crowdsource-verification,/m/0bt9lr,0\n")},
    images=["images/000026e7ee790996.jpg", "images/000062a39995e348.jpg", "images/0000c64e1253d68f.jpg"],
    classes=["/m/015p6", "/m/04hgtk", "/m/07j7r", "/m/0bt9lr"],
    rows={
        "000026e7ee790996": [NA, 0, 1, 1],
        "000062a39995e348": [1, NA, 0, NA],
        "0000c64e1253d68f": [NA, NA, NA, 0],
    },
    told=["commas", "in the column ImageID", "lists of names in LabelName, one in a cell",
          "confidence 0 means absent, and a label that is not listed is unknown", "left out: Source"],
)

# uc merced and mlrsnet: tabs, names without a suffix, images in a folder for each scene
LAYOUTS["UCMerced"] = Layout(
    files={"multilabels.txt": (
        "IMAGE\\LABEL\tairplane\tbare-soil\tbuildings\ttrees\n"
        "agricultural00\t0\t0\t0\t0\n"
        "agricultural01\t0\t1\t0\t1\n"
        "airplane00\t1\t0\t1\t0\n"
        "airplane01\t1\t1\t1\t1\n"
        "forest00\t0\t0\t0\t1\n")},
    images=[f"Images/{name[:-2]}/{name}.tif"
            for name in ("agricultural00", "agricultural01", "airplane00", "airplane01", "forest00")],
    classes=["airplane", "bare-soil", "buildings", "trees"],
    rows={
        "agricultural00": [0, 0, 0, 0],
        "agricultural01": [0, 1, 0, 1],
        "airplane00": [1, 0, 1, 0],
        "airplane01": [1, 1, 1, 1],
        "forest00": [0, 0, 0, 1],
    },
    told=["tabs", "in the column IMAGE\\LABEL", "a table with 4 columns"],
)

# nus-wide: a matrix of 0 and 1 with a blank at the end of lines, beside a list of images with backslashes
LAYOUTS["NUS-WIDE"] = Layout(
    files={
        "Train_Tags81.txt": "0 0 1 \n1 0 1 \n0 0 0 \n0 1 0 \n",
        "TrainImagelist.txt": (
            "actor\\0001_2124494179.jpg\n"
            "actor\\0002_174174086.jpg\n"
            "administrative_assistant\\0001_534152430.jpg\n"
            "zebra\\0001_2074518214.jpg\n"),
    },
    images=["Flickr/actor/0001_2124494179.jpg", "Flickr/actor/0002_174174086.jpg",
            "Flickr/administrative_assistant/0001_534152430.jpg", "Flickr/zebra/0001_2074518214.jpg"],
    classes=["Attr1", "Attr2", "Attr3"],
    rows={
        "actor\\0001_2124494179.jpg": [0, 0, 1],
        "actor\\0002_174174086.jpg": [1, 0, 1],
        "administrative_assistant\\0001_534152430.jpg": [0, 0, 0],
        "zebra\\0001_2074518214.jpg": [0, 1, 0],
    },
    told=["white space", "called Attr1 to Attr3", "TrainImagelist.txt"],
    options={"labels": "Train_Tags81.txt", "image_list": "TrainImagelist.txt"},
    named={"--labels", "--image-list"},
)

# movie posters: the genres as a list of python in a string, and as columns; one of the genres is called N/A
LAYOUTS["movie posters"] = Layout(
    files={"train.csv": (
        "Id,Genre,Action,Comedy,Drama,N/A\n"
        "tt0086425,\"['Comedy', 'Drama']\",0,1,1,0\n"
        "tt0085549,\"['Drama', 'Action']\",1,0,1,0\n"
        "tt0086465,['Comedy'],0,1,0,0\n"
        "tt0086567,['N/A'],0,0,0,1\n")},
    images=[f"Images/tt00{number}.jpg" for number in ("86425", "85549", "86465", "86567")],
    classes=["Action", "Comedy", "Drama", "N/A"],
    rows={
        "tt0086425": [0, 1, 1, 0],
        "tt0085549": [1, 0, 1, 0],
        "tt0086465": [0, 1, 0, 0],
        "tt0086567": [0, 0, 0, 1],
    },
    told=["commas", "in the column Id", "a table with 4 columns", "left out: Genre"],
)

# DataFrame.to_csv(): an index without a title, TRUE and FALSE, empty cells, a column of text
LAYOUTS["pandas"] = Layout(
    files={"annotations.csv": (
        ",filename,rust,crack,taken by\n"
        "0,pipe 1.jpg,TRUE,FALSE,Anna\n"
        "1,pipe 2.jpg,FALSE,FALSE,Ben\n"
        "2,pipe 3.jpg,FALSE,,Anna\n"
        "3,pipe 4.jpg,True,True,\n")},
    images=[f"images/pipe {i}.jpg" for i in range(1, 5)],
    classes=["rust", "crack"],
    rows={"pipe 1.jpg": [1, 0], "pipe 2.jpg": [0, 0], "pipe 3.jpg": [0, NA], "pipe 4.jpg": [1, 1]},
    told=["commas", "in the column filename", "a table with 2 columns",
          "left out: one without a title, taken by"],
)

# roboflow, multi-label classification: train, valid and test, blanks before names and values
LAYOUTS["Roboflow"] = Layout(
    files={
        "README.dataset.txt": "Pipes > 2024-01-01\nhttps://universe.roboflow.com/pipes\n",
        "README.roboflow.txt": "Pipes - v1\n==========\n\nThe dataset includes 5 images.\n",
        "train/_classes.csv": (
            "filename, crack, rust\n"
            "img_1_jpg.rf.0a1b.jpg, 1, 0\nimg_2_jpg.rf.2c3d.jpg, 0, 1\nimg_3_jpg.rf.4e5f.jpg, 0, 0\n"),
        "valid/_classes.csv": "filename, crack, rust\nimg_4_jpg.rf.6a7b.jpg, 1, 1\n",
        "test/_classes.csv": "filename, crack, rust\nimg_5_jpg.rf.8c9d.jpg, 0, 1\n",
    },
    images=["train/img_1_jpg.rf.0a1b.jpg", "train/img_2_jpg.rf.2c3d.jpg", "train/img_3_jpg.rf.4e5f.jpg",
            "valid/img_4_jpg.rf.6a7b.jpg", "test/img_5_jpg.rf.8c9d.jpg"],
    classes=["crack", "rust"],
    rows={
        "img_1_jpg.rf.0a1b.jpg": [1, 0],
        "img_2_jpg.rf.2c3d.jpg": [0, 1],
        "img_3_jpg.rf.4e5f.jpg": [0, 0],
        "img_4_jpg.rf.6a7b.jpg": [1, 1],
        "img_5_jpg.rf.8c9d.jpg": [0, 1],
    },
    parts=["train", "train", "train", "val", "test"],
    told=["commas", "in the column filename", "a table with 2 columns", "train/_classes.csv is train",
          "valid/_classes.csv is val", "test/_classes.csv is test"],
)

# excel where the comma is the decimal point: semicolons, a byte order mark, 1,0 and 0,0
LAYOUTS["Excel"] = Layout(
    files={"Prüfung.csv": (
        b"\xef\xbb\xbf" + "Bild;Riss;Rost, leicht;Größe\r\n"
        "a.jpg;1,0;0,0;0,0\r\n"
        "b.jpg;0,0;1,0;\r\n"
        "c.jpg;0,0;NA;1,0\r\n".encode())},
    images=["images/a.jpg", "images/b.jpg", "images/c.jpg"],
    classes=["Riss", "Rost, leicht", "Größe"],
    rows={"a.jpg": [1, 0, 0], "b.jpg": [0, 1, NA], "c.jpg": [0, NA, 1]},
    told=["semicolons", "in the column Bild", "a table with 3 columns"],
)

# the references' own, three: a table without a header ...
LAYOUTS["assignment"] = Layout(
    files={"labels.txt": "image_0.jpg 1 NA 0 1\nimage_1.jpg NA 0 1 0\nimage_2.jpg 1 0 0 NA\n"},
    images=[f"images/image_{i}.jpg" for i in range(3)],
    classes=["Attr1", "Attr2", "Attr3", "Attr4"],
    rows={"image_0.jpg": [1, NA, 0, 1], "image_1.jpg": [NA, 0, 1, 0], "image_2.jpg": [1, 0, 0, NA]},
    told=["white space", "no header", "called Attr1 to Attr4", "a table with 4 columns"],
)

# ... lists, with several rows for an image, and a placeholder where there is nothing ...
LAYOUTS["inspection"] = Layout(
    files={"image_data.csv": (
        "ID,components,defects\n"
        "7,Centre Support;Channel Bracket,Loose\n"
        "8,component,defect\n"
        "7,Circular Connection,nan\n"
        "9,components,Coating Failure; Loose\n"
        "10,Channel Bracket,defect\n")},
    images=[f"images/{i}.jpg" for i in range(7, 11)],
    classes=["Centre Support", "Channel Bracket", "Circular Connection", "Coating Failure", "Loose"],
    groups={"components": ["Centre Support", "Channel Bracket", "Circular Connection"],
            "defects": ["Coating Failure", "Loose"]},
    rows={"7": [1, 1, 1, 0, 1], "8": [0, 0, 0, 0, 0], "9": [0, 0, 0, 1, 1], "10": [0, 1, 0, 0, 0]},
    told=["commas", "in the column ID", "lists of names in components, defects, separated by ';'"],
)

# ... and a file of class indices for each image, with the images in a folder of another name
LAYOUTS["COCO"] = Layout(
    files={
        "labels/train/000000000009.cls": "45\n49\n50\n",
        "labels/train/000000000025.cls": "23\n",
        "labels/train/000000000030.cls": "",
        "labels/val/000000000139.cls": "0\n56\n0\n",
    },
    images=["images/train-resized/000000000009.jpg", "images/train-resized/000000000025.jpg",
            "images/train-resized/000000000030.jpg", "images/val-resized/000000000139.jpg"],
    classes=dataset.COCO_CLASSES,
    rows={
        "train/000000000009": [int(c in (45, 49, 50)) for c in range(80)],
        "train/000000000025": [int(c == 23) for c in range(80)],
        "train/000000000030": [0] * 80,
        "val/000000000139": [int(c in (0, 56)) for c in range(80)],
    },
    told=["4 .cls files of class indices", "class names: the 80 of COCO"],
)


def write_layout(folder, layout):
    for name, content in layout.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    draw_images(folder, layout.images)


def read(folder, layout):
    return dataset.read_labels(folder, **layout.options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_real_layout_is_read_as_a_person_would(tmp_path, monkeypatch, name):
    layout = LAYOUTS[name]
    write_layout(tmp_path, layout)
    if layout.options:
        with pytest.raises(InputError) as error:
            dataset.read_labels(tmp_path)
        message = str(error.value)
        assert "\n" not in message
        assert set(re.findall(r"--[a-z-]+", message)) == layout.named
        monkeypatch.chdir(tmp_path)  # for options that name files
    table = read(tmp_path, layout)
    assert table.classes == layout.classes
    assert known_rows(table) == layout.rows
    assert list(known_rows(table)) == list(layout.rows)
    assert table.groups == layout.groups
    assert table.parts == layout.parts
    assert table.missing == []
    assert sorted(table.paths) == sorted(str(tmp_path / image) for image in layout.images)
    stems = [re.split(r"[/\\]", name)[-1] for name in table.ids]
    for stem, path in zip(stems, table.paths):
        assert Path(path).name.startswith(stem)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_found_by_looking_is_told(tmp_path, monkeypatch, name):
    layout = LAYOUTS[name]
    write_layout(tmp_path, layout)
    monkeypatch.chdir(tmp_path)
    table = read(tmp_path, layout)
    told = "\n".join(table.notes + table.warnings)
    assert [text for text in layout.told if text not in told] == []
    assert f"images: {tmp_path}" in told
    summary = dataset.summary(table)
    assert all(line in summary for line in [*table.notes, *table.warnings])


def test_few_layouts_need_an_option():
    asked = [name for name in LAYOUTS if LAYOUTS[name].options]
    assert asked == ["CelebA", "Planet Amazon", "VOC 2007", "NUS-WIDE"]


def test_files_that_options_name_may_lie_in_the_data_folder(tmp_path):
    layout = LAYOUTS["NUS-WIDE"]
    write_layout(tmp_path, layout)
    assert known_rows(read(tmp_path, layout)) == layout.rows


def test_columns_of_a_layout_serve_other_options(tmp_path):
    layout = LAYOUTS["ChestX-ray14"]
    write_layout(tmp_path, layout)
    table = dataset.read_labels(tmp_path, group="Patient ID", ignore=["Patient Age"])
    assert table.objects == ["1", "1", "1", "2", "3", "3"]
    assert known_rows(table) == layout.rows


def test_the_folders_of_a_layout_can_be_its_split(tmp_path):
    layout = LAYOUTS["Roboflow"]
    write_layout(tmp_path, layout)
    text = "filename,crack,rust\n" + "".join(f"{name},1,0\n" for name in layout.images)
    for part in ("train", "valid", "test"):
        (tmp_path / part / "_classes.csv").unlink()
    (tmp_path / "all.csv").write_text(text)
    table = dataset.read_labels(tmp_path, labels="all.csv", split_column="folder")
    assert table.parts == layout.parts
    assert any("split" in note for note in table.notes)


def test_the_lists_of_a_layout_say_what_counts_as_nothing(tmp_path):
    write_layout(tmp_path, LAYOUTS["inspection"])
    table = read(tmp_path, LAYOUTS["inspection"])
    told = "\n".join(table.notes + table.warnings)
    assert all(word in told for word in ("component", "defect", "nan"))
    assert any("nan" in line and "component" in line for line in table.notes + table.warnings)


# Q1
@pytest.mark.parametrize("rows", ["1,-1\n1,1\n1,-1\n", "-1,-1\n1,1\n-1,1\n", "1,-1\n0,1\n0,0\n"])
def test_minus_one_is_an_error_or_told(tmp_path, rows):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    lines = [f"{i}.jpg,{row}" for i, row in enumerate(rows.splitlines())]
    (tmp_path / "labels.csv").write_text("\n".join(["image,A,B", *lines]))
    try:
        table = dataset.read_labels(tmp_path)
    except InputError as error:
        assert "--negative -1" in str(error) and "--unknown -1" in str(error)
    else:
        assert any("-1" in line for line in table.notes + table.warnings)
    for option, expected in (("negative", 0), ("unknown", NA)):
        table = dataset.read_labels(tmp_path, **{option: "-1"})
        values = [value for row in known_rows(table).values() for value in row]
        cells = [cell for row in rows.splitlines() for cell in row.split(",")]
        assert values == [expected if cell == "-1" else int(cell) for cell in cells]


# Q1
def test_the_option_for_minus_one_counts_for_minus_one_with_decimals_too(tmp_path):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg"])
    (tmp_path / "labels.csv").write_text("image,A,B\n0.jpg,-1.0,1.0\n1.jpg,1.0,-1.0\n")
    table = dataset.read_labels(tmp_path, negative="-1")
    assert known_rows(table) == {"0.jpg": [0, 1], "1.jpg": [1, 0]}


# Q13
def test_soft_labels_become_labels_with_a_threshold(tmp_path):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    (tmp_path / "labels.csv").write_text("image,A,B\n0.jpg,0.9,1e-05\n1.jpg,0.5,1.0\n2.jpg,0.49,\n")
    with pytest.raises(InputError, match="--label-threshold T"):
        dataset.read_labels(tmp_path)
    table = dataset.read_labels(tmp_path, label_threshold=0.5)
    assert known_rows(table) == {"0.jpg": [1, 0], "1.jpg": [1, 1], "2.jpg": [0, NA]}


# Q13
def test_a_column_of_text_makes_no_lists_of_a_table_of_soft_labels(tmp_path):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    (tmp_path / "labels.csv").write_text("image,A,seen by\n0.jpg,0.9,Anna\n1.jpg,0.5,Ben\n2.jpg,0.2,Anna\n")
    with pytest.raises(InputError, match="--label-threshold T"):
        dataset.read_labels(tmp_path)
    table = dataset.read_labels(tmp_path, label_threshold=0.5)
    assert known_rows(table) == {"0.jpg": [1], "1.jpg": [1], "2.jpg": [0]}


@pytest.mark.parametrize("header", ["image", "ID", "file_name"])
def test_names_with_blanks_below_a_header(tmp_path, header):
    draw_images(tmp_path / "images", ["my photo.jpg", "photo.jpg", "other.jpg"])
    (tmp_path / "labels.txt").write_text(f"{header} A B\nmy photo.jpg 1 0\nother.jpg 0 1\nphoto.jpg 0 NA\n")
    table = dataset.read_labels(tmp_path)
    assert table.classes == ["A", "B"]
    assert known_rows(table) == {"my photo.jpg": [1, 0], "other.jpg": [0, 1], "photo.jpg": [0, NA]}


# Q13
@pytest.mark.parametrize("title", ["genre", "category", "tags", "class"])
def test_a_column_of_text_beside_columns_of_labels_is_left_out(tmp_path, title):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    text = f"image,rust,crack,{title}\n0.jpg,1,0,pipe\n1.jpg,0,1,valve\n2.jpg,0,1,pipe\n"
    (tmp_path / "labels.csv").write_text(text)
    table = dataset.read_labels(tmp_path)
    assert known_rows(table) == {"0.jpg": [1, 0], "1.jpg": [0, 1], "2.jpg": [0, 1]}
    assert any("left out" in line and title in line for line in table.warnings)


# Q2
@pytest.mark.parametrize("title", ["photo", "bild", "Frame"])
def test_lists_with_an_image_column_of_any_title(tmp_path, title):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    (tmp_path / "labels.csv").write_text(f"{title},labels\n0.jpg,cat;dog\n1.jpg,dog\n2.jpg,\n")
    expected = {"0.jpg": [1, 1], "1.jpg": [0, 1], "2.jpg": [0, 0]}
    assert known_rows(dataset.read_labels(tmp_path, image_column=title)) == expected
    try:
        table = dataset.read_labels(tmp_path)
    except InputError as error:
        assert "--image-column" in str(error)
    else:
        assert known_rows(table) == expected


# Q2
def test_columns_that_are_no_labels_stay_out_of_lists(tmp_path):
    names = [f"{i:02}.jpg" for i in range(24)]
    draw_images(tmp_path / "images", names)
    lines = [",image_id,labels,split,fold,date,inspector,caption,taken"]
    for i, name in enumerate(names):
        labels = ("cat, dog", "NA", "bird", "None")[i % 4]
        part = ("train", "valid", "test")[i % 3]
        others = f"{part},{i % 5},2024-01-0{i % 9 + 1},Anna,a photo of number {i},noon {i}"
        lines.append(f'{i},{name},"{labels}",{others}')
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    table = dataset.read_labels(tmp_path)
    assert table.classes == ["bird", "cat", "dog"]
    assert known_rows(table)["00.jpg"] == [0, 1, 1]
    assert known_rows(table)["01.jpg"] == [0, 0, 0]
    assert known_rows(table)["03.jpg"] == [0, 0, 0]
    assert table.parts[:3] == ["train", "val", "test"]
    warning = next(line for line in table.warnings if "left out" in line)
    assert all(title in warning for title in ("fold", "date", "inspector", "caption", "taken"))


# Q2
def test_a_table_whose_first_rows_are_unknown_is_a_table(tmp_path):
    names = [f"{i}.jpg" for i in range(150)]
    draw_images(tmp_path / "images", names)
    lines = ["image,A,B"]
    lines += [f"{name},NA,NA" if i < 120 else f"{name},{i % 2},NA" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    table = dataset.read_labels(tmp_path)
    assert table.classes == ["A", "B"]
    assert known_rows(table)["0.jpg"] == [NA, NA]
    assert known_rows(table)["149.jpg"] == [1, NA]


# ---------------------------------------------------------------------------------------------------------------------
# Variants: however a program writes a table, its labels are read as they were written, or there is an error


IMAGES = [*(f"photo {i}.jpg" for i in range(4)), *(f"sub/part.{i}.png" for i in range(4))]
CLASSES = ["rust", "deep crack", "Größe", "hole", "10", "A, or B"]
WORDS = [  # how a program writes 1, 0 and NA
    ("1", "0", "NA"), ("1", "0", ""), ("1", "0", "-1"), ("1.0", "0.0", "nan"), ("1", "0", "?"),
    ("TRUE", "FALSE", "NA"), ("True", "False", ""), ("yes", "no", "n/a"), ("Yes", "No", "None"),
    ("1", "0", "null"),
]
SOME = settings(max_examples=300, deadline=None, database=None, derandomize=True)
OUTCOMES = Counter()


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder of the images IMAGES."""
    folder = tmp_path_factory.mktemp("album")
    draw_images(folder / "images", IMAGES)
    return folder


def name_of(draw, image):
    """One of the ways to write the name of an image."""
    stem = image.rpartition(".")[0]
    names = [image, image.rpartition("/")[2], stem, f"images/{image}", image.replace("/", "\\")]
    return draw(st.sampled_from(names))


def encode(draw, rows, delimiter):
    """Rows of cells as the bytes of a file: quotes, line ends, byte order mark and blank lines are drawn."""
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    if delimiter == " ":
        text = "".join(" ".join(cells) + newline for cells in rows)
    else:
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=newline).writerows(rows)
        text = file.getvalue()
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    if draw(st.booleans()):
        text = newline + text + newline
    return b"\xef\xbb\xbf" * draw(st.booleans()) + text.encode()


def draw_columns(draw, titles, columns):
    """Columns of cells, shuffled, at times with an index and a column of text -> rows, the titles first."""
    titles = list(titles)
    columns = list(columns)
    height = len(columns[0])
    if draw(st.booleans()):
        titles.append(draw(st.sampled_from(["remarks", "inspector", "taken"])))
        texts = [f"seen by {i}" for i in range(height)]
        dates = [f"2024-05-{i + 10}" for i in range(height)]
        columns.append(draw(st.sampled_from([texts, dates, ["Anna"] * height])))
    order = draw(st.permutations(range(len(titles))))
    if draw(st.booleans()):
        titles.append(draw(st.sampled_from(["", "Unnamed: 0"])))
        columns.append([str(i) for i in range(height)])
        order = [len(titles) - 1, *order]
    rows = [[titles[i] for i in order]]
    for row in range(height):
        rows.append([columns[i][row] for i in order])
    return rows


def read_again(folder, expected, **how):
    """Read a folder that a program wrote and compare it with what was meant: {image: {class: label}}."""
    try:
        table = dataset.read_labels(folder, **how)
    except InputError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        event("an error")
        OUTCOMES["error"] += 1
        return None
    OUTCOMES["read"] += 1
    root = f"{folder}/images/"
    images = [path.removeprefix(root) for path in table.paths]
    classes = set().union(*expected.values())
    assert set(table.classes) == classes
    assert set(images) == set(expected) and len(images) == len(expected)
    for image, row in zip(images, known_rows(table).values()):
        assert dict(zip(table.classes, row)) == expected[image]
    return table


def draw_labels(draw, classes, values):
    """{image: {class: label}} with a positive of each class."""
    images = draw(st.permutations(IMAGES))[: draw(st.integers(5, 8))]
    meant = {}
    for image in images:
        meant[image] = {name: draw(st.sampled_from(values)) for name in classes}
    for name in classes:
        meant[images[draw(st.integers(0, 4))]][name] = 1
    return meant


def write_table(draw, path, meant, delimiter):
    """Write {image: {class: label}} as a table."""
    classes = list(next(iter(meant.values())))
    there, absent, unknown = draw(st.sampled_from(WORDS))
    if delimiter == " " and unknown == "":
        unknown = "NA"
    word = {1: there, 0: absent, NA: unknown}
    title = draw(st.sampled_from(["image", "ID", "filename", "Image Name", "photo"]))
    columns = [[name_of(draw, image) for image in meant]]
    columns += [[word[labels[name]] for labels in meant.values()] for name in classes]
    if delimiter == " ":
        rows = [[title.replace(" ", "_"), *classes], *zip(*columns)]
    else:
        rows = draw_columns(draw, [title, *classes], columns)
    path.write_bytes(encode(draw, rows, delimiter))


def classes_of(draw, delimiter):
    """Some class names that a file with this delimiter can hold."""
    names = draw(st.permutations(CLASSES))[: draw(st.integers(1, 4))]
    return [name.replace(" ", "_") for name in names] if delimiter == " " else names


FORMS = [(".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", "\t"),
         (".txt", ","), (".txt", ";"), (".txt", " ")]


def test_variants_of_a_table(album):
    OUTCOMES.clear()

    @SOME
    @given(st.data())
    def check(data):
        suffix, delimiter = data.draw(st.sampled_from(FORMS))
        meant = draw_labels(data.draw, classes_of(data.draw, delimiter), [1, 0, NA])
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "images").symlink_to(album / "images")
            write_table(data.draw, folder / f"labels{suffix}", meant, delimiter)
            read_again(folder, meant)

    check()
    assert OUTCOMES["read"] > 4 * OUTCOMES["error"]


def test_variants_of_lists(album):
    OUTCOMES.clear()

    @SOME
    @given(st.data())
    def check(data):
        draw = data.draw
        delimiter = draw(st.sampled_from([",", ";", "\t"]))
        separator = draw(st.sampled_from([";", "|", ",", "; ", ", ", " | "]))
        names = draw(st.permutations(["rust", "deep crack", "Größe", "hole", "10 mm"]))
        names = names[: draw(st.integers(2, 4))]
        meant = draw_labels(draw, names, [1, 0])
        title = draw(st.sampled_from(["labels", "Finding Labels", "tags"]))
        nothing = draw(st.sampled_from(["", "nan", "None", "NA", title, title.lower().rstrip("s")]))
        cells = []
        for labels in meant.values():
            cells.append(separator.join(name for name in names if labels[name]) or nothing)
        several = any(separator in cell for cell in cells)
        ids = [name_of(draw, image) for image in meant]
        if draw(st.booleans()):  # a row for each label, as inspectors write them
            pairs = []
            for name, cell in zip(ids, cells):
                pairs += [(name, part) for part in cell.split(separator)]
            ids, cells = zip(*pairs)
            several = False
        titles = [draw(st.sampled_from(["ID", "image_id", "filename", "Image Index"])), title]
        rows = draw_columns(draw, titles, [ids, cells])
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "images").symlink_to(album / "images")
            (folder / "labels.csv").write_bytes(encode(draw, rows, delimiter))
            options = {"separator": separator.strip()} if not several else {}
            read_again(folder, meant, **draw(st.sampled_from([{}, options])))

    check()
    assert OUTCOMES["read"] > 4 * OUTCOMES["error"]


def test_variants_of_divided_tables(album):
    OUTCOMES.clear()

    @SOME
    @given(st.data())
    def check(data):
        draw = data.draw
        meant = draw_labels(draw, draw(st.permutations(CLASSES))[:2], [1, 0, NA])
        images = list(meant)
        val = draw(st.sampled_from(["val", "valid"]))
        cuts = {"train": images[:3], val: images[3:4], "test": images[4:]}
        forms = ["{}.csv", "{}.tsv", "{}/labels.csv", "{}/_classes.csv", "{}_metadata.csv"]
        form = draw(st.sampled_from(forms))
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "images").symlink_to(album / "images")
            for part, members in cuts.items():
                path = folder / form.format(part)
                path.parent.mkdir(exist_ok=True)
                delimiter = "\t" if path.suffix == ".tsv" else draw(st.sampled_from([",", ";"]))
                write_table(draw, path, {image: meant[image] for image in members}, delimiter)
            table = read_again(folder, meant)
            if table:
                part_of = {}
                for part, members in cuts.items():
                    part_of |= dict.fromkeys(members, part.replace("valid", "val"))
                root = f"{folder}/images/"
                assert table.parts == [part_of[path.removeprefix(root)] for path in table.paths]

    check()
    assert OUTCOMES["read"] > 4 * OUTCOMES["error"]
