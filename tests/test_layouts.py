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


def test_the_option_for_minus_one_counts_for_minus_one_with_decimals_too(tmp_path):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg"])
    (tmp_path / "labels.csv").write_text("image,A,B\n0.jpg,-1.0,1.0\n1.jpg,1.0,-1.0\n")
    table = dataset.read_labels(tmp_path, negative="-1")
    assert known_rows(table) == {"0.jpg": [0, 1], "1.jpg": [1, 0]}


def test_soft_labels_become_labels_with_a_threshold(tmp_path):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    (tmp_path / "labels.csv").write_text("image,A,B\n0.jpg,0.9,1e-05\n1.jpg,0.5,1.0\n2.jpg,0.49,\n")
    with pytest.raises(InputError, match="--label-threshold T"):
        dataset.read_labels(tmp_path)
    table = dataset.read_labels(tmp_path, label_threshold=0.5)
    assert known_rows(table) == {"0.jpg": [1, 0], "1.jpg": [1, 1], "2.jpg": [0, NA]}


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


@pytest.mark.parametrize("title", ["material", "caption", "pipe", "patient_id"])
def test_a_column_of_text_beside_columns_of_labels_is_left_out(tmp_path, title):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    text = f"image,rust,crack,{title}\n0.jpg,1,0,pipe\n1.jpg,0,1,valve\n2.jpg,0,1,pipe\n"
    (tmp_path / "labels.csv").write_text(text)
    table = dataset.read_labels(tmp_path)
    assert known_rows(table) == {"0.jpg": [1, 0], "1.jpg": [0, 1], "2.jpg": [0, 1]}
    assert any("left out" in line and title in line for line in table.warnings)


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
# What can be read in two ways: the right reading, or an error that names the option


def rows_of(text, title="image"):
    """A label file of rows for 0.jpg, 1.jpg, ..., from the other cells of each; the first line are the titles."""
    header, *rows = text.strip().split("\n")
    return "\n".join([f"{title},{header}", *(f"{i}.jpg,{row}" for i, row in enumerate(rows))])


def folder_of(tmp_path, text, title="image", count=6, **files):
    """A folder with the images 0.jpg to 5.jpg and a labels.csv of rows_of(text)."""
    draw_images(tmp_path / "images", [f"{i}.jpg" for i in range(count)])
    (tmp_path / "labels.csv").write_text(rows_of(text, title))
    for name, content in files.items():
        (tmp_path / name.replace("_", ".")).write_text(content)
    return tmp_path


def values_of(table):
    """{class: its labels, as a text of 1, 0 and ?}."""
    columns = zip(*known_rows(table).values())
    return {name: "".join("?" if v is None else str(v) for v in column) for name, column in zip(table.classes, columns)}


# cells -> what the classes read as
READ = {
    "a split column of fastai": (
        "labels,is_valid\nbicycle,False\ncar,True\nbicycle,False", {"bicycle": "101", "car": "010"}),
    "names beside the same columns": ("tags,cat,dog\ncat;dog,1,1\ndog,0,1\ncat,1,0", {"cat": "101", "dog": "110"}),
    "names beside a number": ("labels,height\ncat,200\ndog,300\ncat,400", {"cat": "101", "dog": "010"}),
    "names beside a fold": ("labels,fold\ncat,0\ndog,1\ncat,0", {"cat": "101", "dog": "010"}),
    "names beside a person": ("choice,annotator\ncat,1\ndog,1\ncat,0", {"cat": "101", "dog": "010"}),
    "a labelling tool's lists": (
        'choice,annotator,annotation_id,took\n"{""choices"": [""rust"", ""dent""]}",1,1,3.1\nrust,1,2,2.0\n,1,3,1.1',
        {"dent": "100", "rust": "110"}),
    "a list of JSON": ('labels\n"[""a, b"", ""c""]"\n"[""c""]"\n[]', {"a, b": "100", "c": "110"}),
    "a vector": (
        'labels\n"[0, 1, 0, 1]"\n"[1, 1, 0, 0]"', {"Attr1": "01", "Attr2": "11", "Attr3": "00", "Attr4": "10"}),
    "a vector of blanks": ("labels\n0 1\n1 1\n1 0", {"Attr1": "011", "Attr2": "110"}),
    "a vector of numpy": ("labels\n[0. 1.]\n[1. 0.]\n[1. nan]", {"Attr1": "011", "Attr2": "10?"}),
    "a vector of semicolons": ("y\n0;1;0\n1;0;0", {"Attr1": "01", "Attr2": "10", "Attr3": "00"}),
    "a vector of words": ('y\n"(True, False)"\n"(False, True)"', {"Attr1": "10", "Attr2": "01"}),
    "a vector of digits": ("y\n010\n110", {"Attr1": "01", "Attr2": "11", "Attr3": "00"}),
    "a tensor": ('y\n"tensor([0, 1])"\n"tensor([1, 0])"', {"Attr1": "01", "Attr2": "10"}),
    "a vector that is unknown": ('y\n"[0, 1]"\nNA\n"[1, 0]"', {"Attr1": "0?1", "Attr2": "1?0"}),
    "Y and N": ("a,b\nY,N\nN,N\nN,Y", {"a": "100", "b": "001"}),
    "pairs that differ": ("a,b\nY,absent\nN,present\n,absent", {"a": "10?", "b": "010"}),
    "positive and negative": ("a,b\nPositive,neg\nnegative,pos\nnegative,neg", {"a": "100", "b": "010"}),
    "a cross": ("a,b\nx,\n,X\n,", {"a": "100", "b": "010"}),
    "a cross in one column": ("a,b\nx,\n,\nx,", {"a": "101", "b": "000"}),
    "a tick": ("a,b\n✓,\n,✓\n✓,✓", {"a": "101", "b": "011"}),
    "plus and minus": ("a,b\n+,-\n-,+\n-,-", {"a": "100", "b": "010"}),
    "a dash is unknown": ("a,b\n1,-\n0,1\n-,0", {"a": "10?", "b": "?10"}),
    "a spreadsheet's words for unknown": ("a,b\n1,#N/A\n0,1\n<NA>,0", {"a": "10?", "b": "?10"}),
    "class numbers in order": (
        "labels\n10 2\n11\n1 2 0\n2", {"0": "0010", "1": "0010", "2": "1011", "10": "1000", "11": "0100"}),
    "a vector with its device": (
        "y\n\"tensor([0, 1], device='cuda:0')\"\n\"tensor([1, 0])\"", {"Attr1": "01", "Attr2": "10"}),
    "numpy's list of names": ("tags\n['Drama' 'Comedy']\n['Drama']\n\"array(['Comedy', 'War'], dtype=object)\"",
                              {"Comedy": "101", "Drama": "110", "War": "001"}),
    "polygons of a labelling tool": (
        'result\n"[{""points"": [[10.5, 20.1]], ""closed"": true, ""polygonlabels"": [""Car""]}]"\n[]\n'
        '"[{""polygonlabels"": [""Bus""], ""id"": 7}]"', {"Bus": "001", "Car": "100"}),
    "objects with names": (
        "genres\n\"[{'id': 18, 'name': 'Drama'}]\"\n\"[{'id': 9, 'name': 'War'}]\"",
        {"Drama": "10", "War": "01"}),
    "a minus where another column has the plus": ("a,b\n+,-\n-,-\n-,-", {"a": "100", "b": "000"}),
    "classes with odd names": (
        "apple,date,tea set,worker\n1,0,1,0\n0,1,0,1",
        {"apple": "10", "date": "01", "tea set": "10", "worker": "01"}),
    "names with a column of values": ("label,is_present\nrust,1\nrust,0\ndent,1", {"dent": "??1", "rust": "10?"}),
    "codes of rooms beside labels": ("room,rust,dent\n010,1,0\n011,0,1", {"rust": "10", "dent": "01"}),
    "names beside the same columns, in other letters": (
        "tags,cat,dog\nCat Dog,1,1\ndog,0,1\nno finding,0,0",
        {"cat": "100", "dog": "110"}),
    "columns that a spreadsheet left empty": ("rust,dent,,\n1,0,,\n0,1,,", {"rust": "10", "dent": "01"}),
    "pandas' second index": ("Unnamed: 0.1,a\n0,1\n1,0\n0,0", {"a": "100"}),
    "a class called text": ("logo,text\n1,0\n0,1\n1,1", {"logo": "101", "text": "011"}),
}
READ_OPTIONS = {"class numbers in order": {"separator": " "}}


@pytest.mark.parametrize("case", READ)
def test_cells_are_read_as_a_person_would(tmp_path, case):
    text, expected = READ[case]
    table = dataset.read_labels(folder_of(tmp_path, text), **READ_OPTIONS.get(case, {}))
    assert values_of(table) == expected
    assert table.classes == list(expected)


# cells -> the options that the error names, and the option with which it is read
ASKED = {
    "names beside a stray column": (
        "labels,verified\ncat,1\ndog,0\ncat,1", {"ignore": ["verified"]}, {"cat": "101", "dog": "010"}),
    "names beside another stray column": (
        "class,indoor\ncat,True\ndog,False\ncat,False", {"ignore": ["class"]}, {"indoor": "100"}),
    "names beside columns of labels": (
        "tags,rust,crack\npipe,1,0\nvalve,0,1\npipe,0,1", {"ignore": ["tags"]}, {"rust": "100", "crack": "011"}),
    "a vector beside a column of labels": (
        'y,seen\n"[0, 1]",1\n"[1, 0]",0', {"ignore": ["seen"]}, {"Attr1": "01", "Attr2": "10"}),
    "1 or blank": ("a,b\n1,\n,1\n,", {"negative": ""}, {"a": "100", "b": "010"}),
    "1 or blank, and really unknown": ("a,b\n1,\n,1\n,", {"unknown": ""}, {"a": "1??", "b": "?1?"}),
    "1 or NA": ("a,b\n1,NA\nNA,1\nNA,NA", {"negative": "NA"}, {"a": "100", "b": "010"}),
    "yes or a dash": ("a,b\nyes,-\n-,yes\n-,-", {"negative": "-"}, {"a": "100", "b": "010"}),
    "words of another language": (
        "a,b\nja,nein\nnein,nein\nnein,ja", {"positive": "ja", "negative": "NEIN"}, {"a": "100", "b": "001"}),
    "words of several kinds": (
        "a,b\ngut,ja\nschlecht,nein\ngut,ja", {"positive": ["gut", "ja"], "negative": ["schlecht", "nein"]},
        {"a": "101", "b": "101"}),
    "a word among labels": ("a,b\n1,0\n0,maybe\n1,1", {"unknown": "maybe"}, {"a": "101", "b": "0?1"}),
    "blanks between names": (
        "labels\nbicycle\nbicycle car", {"separator": " "}, {"bicycle": "11", "car": "01"}),
    "a slash between names": ("labels\nrust\nrust/dent\ndent", {"separator": "/"}, {"dent": "011", "rust": "110"}),
    "blanks between class numbers": (
        "labels\n1\n1 2\n2\n3", {"separator": " "}, {"1": "1100", "2": "0110", "3": "0001"}),
    "several names beside a flag": (
        "genre,is_sequel\nDrama|War,1\nWar,0\nDrama,0", {"ignore": ["is_sequel"]}, {"Drama": "101", "War": "110"}),
    "words of another language beside a blank": (
        "a,b\nOK,bad\nNOK,good\n,bad", {"positive": ["NOK", "bad"], "negative": ["ok", "good"]},
        {"a": "01?", "b": "101"}),
    "scores": ("label,score\nrust,0.9\ndent,0.1", {"label_threshold": 0.5}, {"dent": "?0", "rust": "1?"}),
    "two columns of the split": (
        "split,is_valid,a\ntrain,False,1\nval,True,0\ntrain,False,0", {"ignore": ["is_valid"]}, {"a": "100"}),
}


@pytest.mark.parametrize("case", ASKED)
def test_cells_that_can_be_read_in_two_ways_ask_for_the_option_that_decides(tmp_path, case):
    text, options, expected = ASKED[case]
    folder = folder_of(tmp_path, text)
    with pytest.raises(InputError) as error:
        dataset.read_labels(folder)
    assert "\n" not in str(error.value) and "labels.csv" in str(error.value)
    assert all(f"--{name.replace('_', '-')}" in str(error.value) for name in options)
    assert values_of(dataset.read_labels(folder, **options)) == expected


def test_ids_that_are_stems_of_other_images_do_not_name_the_images(tmp_path):
    folder = folder_of(tmp_path, "a\n1\n0\n1")
    (folder / "labels.csv").write_text("id,file_name,labels\n0,2.jpg,cat\n1,0.jpg,dog\n2,1.jpg,cat\n")
    table = dataset.read_labels(folder)
    assert [path.rpartition("/")[2] for path in table.paths] == ["2.jpg", "0.jpg", "1.jpg"]


def test_of_two_columns_of_names_the_one_whose_images_exist_names_them(tmp_path):
    folder = folder_of(tmp_path, "a\n1\n0")
    (folder / "labels.csv").write_text("image,filename,a\nIMG_7.jpg,0.jpg,1\nIMG_8.jpg,1.jpg,0\n")
    assert dataset.read_labels(folder).ids == ["0.jpg", "1.jpg"]


def test_two_columns_that_name_images_are_asked_about(tmp_path):
    folder = folder_of(tmp_path, "after,a\n3.jpg,1\n4.jpg,0\n5.jpg,1", "before")
    with pytest.raises(InputError, match=r"the columns before and after both name images: .*--image-column after"):
        dataset.read_labels(folder)
    assert dataset.read_labels(folder, image_column="after").ids == ["3.jpg", "4.jpg", "5.jpg"]


@pytest.mark.parametrize("images, missing", [
    (["A/1.jpg", "B/1.jpg", "B/2.jpg"], []), (["A/1.jpg", "B/2.jpg"], ["B/1.jpg"])])
def test_a_column_of_folders_belongs_to_the_names_of_images(tmp_path, images, missing):
    draw_images(tmp_path / "images", images)
    (tmp_path / "labels.csv").write_text("folder,file,labels\nA,1.jpg,cat\nB,2.jpg,dog\nB,1.jpg,horse\n")
    table = dataset.read_labels(tmp_path)
    expected = {"A/1.jpg": "cat", "B/2.jpg": "dog", "B/1.jpg": "horse"}
    assert table.missing == missing and sorted(table.ids) == sorted(set(expected) - {*missing})
    for name, path, row in zip(table.ids, table.paths, table.targets):
        assert path == f"{tmp_path}/images/{name}" and row[table.classes.index(expected[name])] == row.sum() == 1


@pytest.mark.parametrize("lines", [
    "TRAIN,0.jpg,1\nTEST,1.jpg,0\n", "17,0.jpg,1,0\n18,1.jpg,0,1\n", "1,0,0.jpg\n0,1,1.jpg\n"])
def test_a_first_line_that_names_an_image_is_not_taken_for_titles(tmp_path, lines):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg"])
    (tmp_path / "labels.csv").write_text(lines)
    with pytest.raises(InputError, match=r"labels.csv:1: the first line names an image, 0.jpg, but not first"):
        dataset.read_labels(tmp_path)


def test_titles_are_titles_even_where_an_image_is_called_so(tmp_path):
    folder = folder_of(tmp_path, "labels\nrust\ndent")
    draw_images(folder / "images", ["image.jpg"])
    assert values_of(dataset.read_labels(folder)) == {"dent": "01", "rust": "10"}


@pytest.mark.parametrize("words, parts", [
    (("train", "val", "nan"), ["train", "val", ""]),
    (("Training", "PublicTest", "PrivateTest"), ["train", "val", "test"])])
@pytest.mark.parametrize("title", ["split", "Usage", "data_split", "fold"])
def test_a_column_of_nothing_but_parts_is_the_split(tmp_path, title, words, parts):
    text = "\n".join([f"a,{title}", *(f"{i % 2},{word}" for i, word in enumerate(words))])
    table = dataset.read_labels(folder_of(tmp_path, text))
    assert table.parts == parts and table.classes == ["a"]


@pytest.mark.parametrize("title, cells, parts", [
    ("is_train", ("True", "False"), ["train", ""]), ("is_valid", ("False", "False"), ["train", "train"]),
    ("is_test", ("0", "1"), ["", "test"])])
def test_true_and_false_may_say_each_part(tmp_path, title, cells, parts):
    table = dataset.read_labels(folder_of(tmp_path, f"a,{title}\n1,{cells[0]}\n0,{cells[1]}"))
    assert table.parts == parts and table.classes == ["a"]


def test_an_odd_word_in_the_split_is_an_error_that_names_it(tmp_path):
    folder = folder_of(tmp_path, "a,split\n1,train\n0,val\n1,trainval")
    with pytest.raises(InputError, match=r"labels.csv:4: 'trainval' in the column split is not train, val or test"):
        dataset.read_labels(folder)


def test_folders_that_name_no_split_are_an_error_when_they_should(tmp_path):
    folder = folder_of(tmp_path, "a\n1\n0")
    with pytest.raises(InputError, match=r"no folder below .* is called train, val or test"):
        dataset.read_labels(folder, split_column="folder")


def test_an_object_is_the_same_as_a_number_with_and_without_decimals(tmp_path):
    draw_images(tmp_path / "images", [f"{i}.jpg" for i in range(4)])
    (tmp_path / "train.csv").write_text("image,a,patient\n0.jpg,1,12.0\n1.jpg,0,\n")
    (tmp_path / "test.csv").write_text("image,a,patient\n2.jpg,1,12\n3.jpg,0,13\n")
    with pytest.raises(InputError, match=r"1 images or objects are in two parts: 0.jpg"):
        dataset.read_labels(tmp_path, group="patient")


def test_a_column_to_ignore_needs_to_be_in_one_of_several_files(tmp_path):
    draw_images(tmp_path / "images", [f"{i}.jpg" for i in range(3)])
    (tmp_path / "train.csv").write_text("image,labels,verified\n0.jpg,cat,1\n1.jpg,dog,0\n")
    (tmp_path / "test.csv").write_text("image,labels\n2.jpg,dog\n")
    assert dataset.read_labels(tmp_path, ignore=["verified"]).classes == ["cat", "dog"]
    with pytest.raises(InputError, match=r"--ignore checked: .*train.csv has no such column; it has image"):
        dataset.read_labels(tmp_path, ignore=["verified", "checked"])


@pytest.mark.parametrize("row, missing", [("train", True), ("val", True), ("test", False)])
@pytest.mark.parametrize("by", ["file", "column"])
def test_a_row_has_no_image_in_the_folder_of_a_later_part(tmp_path, by, row, missing):
    draw_images(tmp_path / "images", ["train/0.jpg", "test/1.jpg"])
    if by == "file":
        (tmp_path / f"{row}.csv").write_text("image,a\n0.jpg,1\n1.jpg,0\n")
    else:
        (tmp_path / "labels.csv").write_text(f"image,a,split\n0.jpg,1,{row}\n1.jpg,0,{row}\n")
    table = dataset.read_labels(tmp_path, labels=tmp_path / f"{row}.csv" if by == "file" else None)
    assert table.missing == (["1.jpg"] if missing else [])
    assert not any("suffix" in line for line in table.warnings)


def test_a_row_has_the_image_in_the_folder_of_its_own_part_first(tmp_path):
    for part in ("train", "test"):
        draw_images(tmp_path / part, ["images/1.jpg"])
        (tmp_path / part / "labels.csv").write_text(f"image,a\n1.jpg,{int(part == 'train')}\n")
    (tmp_path / "test" / "images" / "1.jpg").write_bytes(b"another one")
    assert dataset.read_labels(tmp_path).paths == [f"{tmp_path}/{part}/images/1.jpg" for part in ("train", "test")]


def test_one_word_cannot_mean_two_things(tmp_path):
    with pytest.raises(InputError, match="'ja' is given twice for --positive, --negative and --unknown"):
        dataset.read_labels(folder_of(tmp_path, "a\nja\nnein"), positive="ja", negative=["nein", "Ja"])


def test_names_in_the_lines_of_a_cell_are_names(tmp_path):
    folder = folder_of(tmp_path, "a\n1\n0")
    (folder / "labels.csv").write_text('image,labels\n0.jpg,"rust\ndent"\n1.jpg,rust\n')
    assert values_of(dataset.read_labels(folder)) == {"dent": "10", "rust": "11"}


def test_a_decimal_comma_makes_no_vector(tmp_path):
    folder = folder_of(tmp_path, "a\n1\n0")
    (folder / "labels.csv").write_text("image;a\n0.jpg;0,9\n1.jpg;0,1\n")
    with pytest.raises(InputError, match="--label-threshold"):
        dataset.read_labels(folder)
    (folder / "labels.csv").write_text("image;a\n0.jpg;0,0\n1.jpg;1,0\n")
    assert values_of(dataset.read_labels(folder)) == {"a": "01"}


def test_vectors_of_unequal_length_are_an_error_with_a_separator_too(tmp_path):
    folder = folder_of(tmp_path, "labels\n0 1\n1 0 1\n1")
    for how in ({}, {"separator": " "}):
        with pytest.raises(InputError, match=r"look like values|--separator"):
            dataset.read_labels(folder, **how)


def test_vectors_get_the_names_of_the_file_of_class_names(tmp_path):
    folder = folder_of(tmp_path, "labels\n0 1\n1 0", classes_txt="rust\ndent\n")
    assert values_of(dataset.read_labels(folder)) == {"rust": "01", "dent": "10"}
    (folder / "classes.txt").write_text("rust\ndent\nhole\n")
    with pytest.raises(InputError, match="has 2 labels in a cell, but 3 classes are named"):
        dataset.read_labels(folder)


def test_names_need_no_file_of_class_names_whatever_is_in_it(tmp_path):
    folder = folder_of(tmp_path, "labels\nrust;dent\nrust", classes_json='{"0": "rust"}')
    assert values_of(dataset.read_labels(folder)) == {"dent": "10", "rust": "11"}


def test_class_numbers_of_any_length_are_in_order(tmp_path):
    long = "9" * 5000
    folder = folder_of(tmp_path, f"labels\n{long};10\n10\n2\n007")
    assert dataset.read_labels(folder).classes == ["2", "007", "10", long]
    (folder / "classes.csv").write_text(f"class_id,name\n2,rust\n10,dent\n{long},hole\n7,dirt\n")
    table = dataset.read_labels(folder)
    assert values_of(table) == {"rust": "0010", "dirt": "0001", "dent": "1100", "hole": "1000"}


@pytest.mark.parametrize("name, content", [
    ("labels.csv", "attribute_id,attribute_name\n0,rust\n1,dent\n2,hole\n"), ("classes.txt", "rust\ndent\nhole\n")])
def test_class_numbers_get_the_names_of_the_file_of_class_names(tmp_path, name, content):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / name).write_text(content)
    (tmp_path / "train.csv").write_text("id,attribute_ids\na,2 0\nb,1\nc,0\n")
    table = dataset.read_labels(tmp_path, separator=" ")
    assert values_of(table) == {"rust": "101", "dent": "010", "hole": "100"}


def test_the_long_form_is_named_with_how_to_convert_it(tmp_path):
    draw_images(tmp_path / "images", ["ID_7.jpg", "ID_8.jpg"])
    (tmp_path / "labels.csv").write_text("ID,Label\nID_7_any,1\nID_7_rust,0\nID_8_any,0\nID_8_rust,0\n")
    with pytest.raises(InputError, match=r"name an image and a class, ID_7_any: make it a table"):
        dataset.read_labels(tmp_path)


@pytest.mark.parametrize("has_part", [True, False])
def test_ragged_lines_of_names_are_lists(tmp_path, has_part):
    draw_images(tmp_path / "images", ["0.jpg", "1.jpg", "2.jpg"])
    rows = ["gs://set/0.jpg,rust,dent", "gs://set/1.jpg,dent", "gs://set/2.jpg,rust"]
    parts = ["TRAIN,", "VALIDATION,", "TEST,"] if has_part else [""] * 3
    (tmp_path / "all.csv").write_text("".join(f"{part}{row}\n" for part, row in zip(parts, rows)))
    table = dataset.read_labels(tmp_path)
    assert values_of(table) == {"dent": "110", "rust": "101"}
    assert table.parts == (["train", "val", "test"] if has_part else [])


def test_a_true_or_false_column_says_what_is_valid(tmp_path):
    table = dataset.read_labels(folder_of(tmp_path, "labels,is_valid\ncat,False\ndog,True\ncat,False", "fname"))
    assert table.parts == ["train", "val", "train"] and table.classes == ["cat", "dog"]
    assert any("is_valid, where true means val" in note for note in table.notes)


@pytest.mark.parametrize("content, kind", [
    (b'{"images": []}', "JSON"), (b'[\n  {"file": "0.jpg"}\n]', "JSON"), (b"PK\x03\x04....", "Excel"),
    (b"<?xml version='1.0'?>", "XML"), (b"\x93NUMPY\x01\x00", "numpy")])
def test_a_label_file_in_a_format_that_is_not_read_is_called_by_its_name(tmp_path, content, kind):
    folder = folder_of(tmp_path, "a\n1\n0")
    (folder / "labels.dat").write_bytes(content)
    with pytest.raises(InputError, match=f"labels.dat is .*{kind}.*label files are tables"):
        dataset.read_labels(folder, labels=folder / "labels.dat")


@pytest.mark.parametrize("test", ["id\n3\n4\n", "id,caption\n3,a pipe\n4,a valve\n", "id,width\n3,200\n4,300\n"])
@pytest.mark.parametrize("train", ["id,a,b\n0,1,0\n1,0,1\n2,0,0\n", "id,labels\n0,cat;dog\n1,dog\n2,cat\n"])
def test_a_test_file_without_labels_is_left_out_and_told(tmp_path, train, test):
    draw_images(tmp_path / "images", [f"{i}.jpg" for i in range(5)])
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "test.csv").write_text(test)
    (tmp_path / "sample_submission.csv").write_text("id,a\n3,0\n")
    table = dataset.read_labels(tmp_path)
    assert table.ids == ["0", "1", "2"] and table.parts == []
    assert any("test.csv is left out, since it has no labels" in line for line in table.warnings)


@pytest.mark.parametrize("text", ["1" * 20_000 + "x", "1" * 20_000, "9" * 400, "1e999", "." * 20_000, "[" * 20_000])
def test_long_cells_are_read_quickly(tmp_path, text):
    folder = folder_of(tmp_path, f"a,b\n1,{text}\n0,1\n1,0")
    with pytest.raises(InputError, match="--ignore b"):
        dataset.read_labels(folder)


def test_rows_without_an_object_are_objects_of_their_own(tmp_path):
    rows = [f"{i % 2},{'p1' if i < 3 else word}" for i, word in enumerate(["", "", "", "", "NA", "nan", "None", "-"])]
    table = dataset.read_labels(folder_of(tmp_path, "\n".join(["a,patient", *rows]), count=8), group="patient")
    assert dataset._units(table).tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert any("5 rows have no patient" in note for note in table.notes)


OBJECTS = "a,patient,split\n1,p1,train\n0,p1,test\n1,p2,val\n0,p2,train\n0,p3,train\n1,,test"


def test_an_object_in_two_parts_is_an_error_and_can_be_removed_from_the_lesser(tmp_path):
    folder = folder_of(tmp_path, OBJECTS)
    with pytest.raises(InputError, match=r"2 images or objects are in two parts: 0.jpg \(train, .*--drop-overlap"):
        dataset.read_labels(folder, group="patient")
    assert len(dataset.read_labels(folder, ignore=["patient"])) == 6
    table = dataset.read_labels(folder, group="patient", drop_overlap=True)
    assert table.ids == ["1.jpg", "2.jpg", "4.jpg", "5.jpg"] and table.parts == ["test", "val", "train", "test"]
    assert any("2 from train" in line for line in table.warnings)


def test_images_in_two_parts_are_counted_and_three_are_named(tmp_path):
    draw_images(tmp_path / "images", [f"{i}.jpg" for i in range(9)])
    (tmp_path / "train.csv").write_text("image,a\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(7)))
    (tmp_path / "test.csv").write_text("image,a\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(2, 9)))
    with pytest.raises(InputError, match="5 images are in two parts") as error:
        dataset.read_labels(tmp_path)
    assert str(error.value).count("(train, ") == 3 and "--drop-overlap" in str(error.value)
    table = dataset.read_labels(tmp_path, drop_overlap=True)
    assert table.parts == ["train"] * 2 + ["test"] * 7 and len(table) == 9


def test_an_image_of_two_objects_is_an_error(tmp_path):
    folder = folder_of(tmp_path, "a,patient\n1,p1\n0,p2")
    with open(folder / "labels.csv", "a") as file:
        file.write("\n0.jpg,1,p3\n")
    with pytest.raises(InputError, match=r"labels.csv:4: 0.jpg shows p3, but p1 at .*labels.csv:2"):
        dataset.read_labels(folder, group="patient")


# ---------------------------------------------------------------------------------------------------------------------
# Variants: however a program writes a table, its labels are read as they were written, or there is an error


IMAGES = [*(f"photo {i}.jpg" for i in range(4)), *(f"sub/part.{i}.png" for i in range(4))]
CLASSES = ["rust", "deep crack", "Größe", "hole", "10", "A, or B"]
WORDS = [  # how a program writes 1, 0 and NA
    ("1", "0", "NA"), ("1", "0", ""), ("1", "0", "-1"), ("1.0", "0.0", "nan"), ("1", "0", "?"),
    ("TRUE", "FALSE", "NA"), ("True", "False", ""), ("yes", "no", "n/a"), ("Yes", "No", "None"),
    ("1", "0", "null"),
]
SOME = settings(max_examples=100, deadline=None, database=None, derandomize=True)
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
    """{image: {class: label}} with a positive of each class, and a negative of one."""
    images = draw(st.permutations(IMAGES))[: draw(st.integers(5, 8))]
    meant = {}
    for image in images:
        meant[image] = {name: draw(st.sampled_from(values)) for name in classes}
    for name in classes:
        meant[images[draw(st.integers(0, 3))]][name] = 1
    meant[images[4]][classes[0]] = 0
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
