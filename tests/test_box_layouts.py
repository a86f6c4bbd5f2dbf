"""Boxes as labels, in the folders that annotation tools really write: every label and every part is checked.

Each layout is a few files, written from the documentation or from the exporter of the tool that its comment names.
A row is the part that an image belongs to ("" without a split) and a label per class. The tests only use what users
see: read_labels(), the command line and its output.
"""

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import dataset
from conftest import draw_images, files_of, known_rows, refused

NA = None


@dataclass
class Layout:
    """A data folder, and how it has to be understood."""

    format: str  # "YOLO", "COCO" or "VOC"
    files: dict  # path -> text, bytes, or a dict to be written as JSON
    classes: list
    rows: dict  # path of an image -> [part, a label per class]; "val|test" allows both
    unlabelled: dict = field(default_factory=dict)  # path of an image without an annotation file -> its part
    others: list = ()  # paths of images that do not belong to the data set, such as masks
    warned: list = ()  # what a warning has to name


LAYOUTS = {}


def write_layout(folder, layout):
    """Write the files and images of a layout, no two images alike; return the folder."""
    draw_images(folder, [*layout.rows, *layout.unlabelled, *layout.others])
    for name, content in layout.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ----------------------------------------------------------------------------------------------------------
# YOLO: a .txt file per image, with a class number and at least four numbers per line


def boxes(*numbers):
    """Return the lines of a YOLO file with a box of each class number."""
    return "".join(f"{number} 0.512500 0.433333 0.250000 0.266667\n" for number in numbers)


def polygons(*numbers):
    """Return the lines of a YOLO file with a polygon of each class number: three corners, five corners and so on."""
    corners = ["0.1 0.2", "0.35 0.2", "0.3 0.45", "0.22 0.6", "0.1 0.5"]
    return "".join(f"{number} {' '.join(corners[: 3 + row % 2 * 2])}\n" for row, number in enumerate(numbers))


# Ultralytics, coco8.yaml: `path` is the folder's name in the datasets folder, so it cannot be found from inside.
# Training leaves labels/train.cache behind; an image without a .txt file is background to Ultralytics.
COCO8 = """\
# Ultralytics AGPL-3.0 License - https://ultralytics.com/license

# COCO8 dataset (first 8 images from COCO train2017) by Ultralytics
# Example usage: yolo train data=coco8.yaml

# Train/val/test sets as 1) dir: path/to/imgs, 2) file: path/to/imgs.txt, or 3) list: [path/to/imgs1, ..]
path: coco8 # dataset root dir
train: images/train # train images (relative to 'path') 4 images
val: images/val # val images (relative to 'path') 4 images
test: # test images (optional)

# Classes
names:
  0: person
  1: traffic light
  2: dog
  3: hair drier

# Download script/URL (optional)
download: https://github.com/ultralytics/assets/releases/download/v0.0.0/coco8.zip
"""
COCO8_FILES = {
    "labels/train/000000000009.txt": boxes(0, 2, 2),
    "labels/train/000000000025.txt": boxes(1),
    "labels/train/000000000030.txt": "",
    "labels/val/000000000036.txt": boxes(0, 1),
    "labels/val/000000000042.txt": boxes(2),
    "labels/train.cache": b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}\n\x80\x04\x95",
    "LICENSE": "GNU AFFERO GENERAL PUBLIC LICENSE\n",
    "README.md": "# COCO8\n",
}
COCO8_ROWS = {
    "images/train/000000000009.jpg": ["train", 1, 0, 1, 0],
    "images/train/000000000025.jpg": ["train", 0, 1, 0, 0],
    "images/train/000000000030.jpg": ["train", 0, 0, 0, 0],
    "images/val/000000000036.jpg": ["val", 1, 1, 0, 0],
    "images/val/000000000042.jpg": ["val", 0, 0, 1, 0],
}
COCO8_CLASSES = ["person", "traffic light", "dog", "hair drier"]

LAYOUTS["Ultralytics coco8"] = Layout(
    "YOLO", {"coco8.yaml": COCO8, **COCO8_FILES}, COCO8_CLASSES, COCO8_ROWS,
    unlabelled={"images/train/000000000034.jpg": "train", "images/val/000000000049.jpg": "val"})

# The yaml file may also stay in the datasets folder, beside the folder that `path` names.
LAYOUTS["Ultralytics coco8 from the datasets folder"] = Layout(
    "YOLO", {"coco8.yaml": COCO8, **{f"coco8/{name}": text for name, text in COCO8_FILES.items()}}, COCO8_CLASSES,
    {f"coco8/{name}": row for name, row in COCO8_ROWS.items()})

# Older yaml files of Ultralytics have `path: ../datasets/NAME`; people write a path of their own machine.
for PATH in ("../datasets/coco8", "/content/datasets/coco8", r"C:\Users\eva\datasets\coco8", "./"):
    LAYOUTS[f"Ultralytics with path: {PATH}"] = Layout(
        "YOLO", {"data.yaml": COCO8.replace("path: coco8", f"path: {PATH}"), **COCO8_FILES}, COCO8_CLASSES, COCO8_ROWS)

# Ultralytics, coco128.yaml: train and val are the same folder, so there is no split that could be kept.
LAYOUTS["Ultralytics coco128"] = Layout(
    "YOLO",
    files={
        "coco128.yaml": (
            "path: coco128 # dataset root dir\n"
            "train: images/train2017 # train images (relative to 'path') 128 images\n"
            "val: images/train2017 # val images (relative to 'path') 128 images\n"
            "test: # test images (optional)\n\n# Classes\nnames:\n  0: person\n  1: bicycle\n\n"
            "download: https://github.com/ultralytics/assets/releases/download/v0.0.0/coco128.zip\n"),
        "README.txt": "COCO128 dataset by Ultralytics\n\nThe first 128 images of COCO train2017.\n",
        "labels/train2017/000000000009.txt": boxes(1, 1),
        "labels/train2017/000000000025.txt": boxes(0),
        "labels/train2017/000000000030.txt": boxes(0, 1),
    },
    classes=["person", "bicycle"],
    rows={
        "images/train2017/000000000009.jpg": ["", 0, 1],
        "images/train2017/000000000025.jpg": ["", 1, 0],
        "images/train2017/000000000030.jpg": ["", 1, 1],
    })

# Ultralytics, coco.yaml: lists of images; a download script below `download: |`. Nobody has labels of test-dev2017.
LAYOUTS["Ultralytics coco with lists"] = Layout(
    "YOLO",
    files={
        "coco.yaml": (
            "path: coco # dataset root dir\n"
            "train: train2017.txt # train images (relative to 'path') 118287 images\n"
            "val: val2017.txt # val images (relative to 'path') 5000 images\n"
            "test: test-dev2017.txt # 20288 of 40670 images, submit via https://cocodataset.org\n\n"
            "# Classes\nnames:\n  0: person\n  1: bicycle\n  2: car\n\n"
            "# Download script/URL (optional)\ndownload: |\n  from pathlib import Path\n\n"
            "  # Download labels\n  segments = True  # segment or box labels\n"
            "  dir = Path(yaml[\"path\"])  # dataset root dir\n  download(urls, dir=dir.parent)\n"),
        "train2017.txt": "./images/train2017/000000109622.jpg\n./images/train2017/000000160694.jpg\n",
        "val2017.txt": "./images/val2017/000000182611.jpg\n",
        "test-dev2017.txt": "./images/test2017/000000000001.jpg\n",
        "labels/train2017/000000109622.txt": polygons(2, 0, 2),
        "labels/train2017/000000160694.txt": polygons(1),
        "labels/val2017/000000182611.txt": polygons(0),
    },
    classes=["person", "bicycle", "car"],
    rows={
        "images/train2017/000000109622.jpg": ["train", 1, 0, 1],
        "images/train2017/000000160694.jpg": ["train", 0, 1, 0],
        "images/val2017/000000182611.jpg": ["val", 1, 0, 0],
    },
    unlabelled={"images/test2017/000000000001.jpg": "test"})

# Ultralytics, coco8-seg.yaml: polygons instead of boxes; and the other kinds of lines that its documentation has:
# oriented boxes (four corners) and poses (a box, then keypoints with a visibility).
LAYOUTS["Ultralytics segmentation"] = Layout(
    "YOLO",
    files={
        "coco8-seg.yaml": "path: coco8-seg\ntrain: images/train\nval: images/val\n\nnames:\n  0: cat\n  1: zebra\n",
        "labels/train/1.txt": polygons(0, 1),
        "labels/train/2.txt": polygons(1, 1),
        "labels/train/3.txt": "0 0.78 0.74 0.65 0.74 0.65 0.62 0.78 0.62\n",
        "labels/val/4.txt": "1 0.13 0.30 0.26 0.20 0.1 0.2 2 0.3 0.4 1 0 0 0\n",
        "labels/val/5.txt": boxes(0) + polygons(0),
    },
    classes=["cat", "zebra"],
    rows={
        "images/train/1.jpg": ["train", 1, 1],
        "images/train/2.jpg": ["train", 0, 1],
        "images/train/3.jpg": ["train", 1, 0],
        "images/val/4.jpg": ["val", 0, 1],
        "images/val/5.jpg": ["val", 1, 0],
    })

# Ultralytics, VOC.yaml: train is a list of folders, two of them called val; val and test are the same folder.
# What the yaml says counts, not the names of folders.
LAYOUTS["Ultralytics VOC with lists of folders"] = Layout(
    "YOLO",
    files={
        "VOC.yaml": (
            "path: VOC\n"
            "train: # train images (relative to 'path') 16551 images\n"
            "  - images/train2012\n  - images/train2007\n  - images/val2012\n  - images/val2007\n"
            "val: # val images (relative to 'path') 4952 images\n  - images/test2007\n"
            "test: # test images (optional)\n  - images/test2007\n\n"
            "# Classes\nnames:\n  0: aeroplane\n  1: bicycle\n"),
        "labels/train2012/2008_000002.txt": boxes(0),
        "labels/train2007/000012.txt": boxes(1),
        "labels/val2012/2008_000003.txt": boxes(0, 1),
        "labels/val2007/000005.txt": "",
        "labels/test2007/000001.txt": boxes(1, 0),
        "labels/test2007/000002.txt": boxes(1),
    },
    classes=["aeroplane", "bicycle"],
    rows={
        "images/train2012/2008_000002.jpg": ["train", 1, 0],
        "images/train2007/000012.jpg": ["train", 0, 1],
        "images/val2012/2008_000003.jpg": ["train", 1, 1],
        "images/val2007/000005.jpg": ["train", 0, 0],
        "images/test2007/000001.jpg": ["val|test", 1, 1],
        "images/test2007/000002.jpg": ["val|test", 0, 1],
    })

# Ultralytics, autosplit() (data/split.py): lists in the folder above images/, which the yaml then names. No folder
# says what is train.
LAYOUTS["Ultralytics autosplit"] = Layout(
    "YOLO",
    files={
        "data.yaml": "path: .\ntrain: autosplit_train.txt\nval: autosplit_val.txt\n\nnames:\n  0: cat\n  1: dog\n",
        "autosplit_train.txt": "./images/a.jpg\n./images/c.jpg\n",
        "autosplit_val.txt": "./images/b.jpg\n",
        "autosplit_test.txt": "",
        "labels/a.txt": boxes(0),
        "labels/b.txt": boxes(1),
        "labels/c.txt": boxes(0, 1),
    },
    classes=["cat", "dog"],
    rows={"images/a.jpg": ["train", 1, 0], "images/b.jpg": ["val", 0, 1], "images/c.jpg": ["train", 1, 1]})

# Roboflow, "YOLOv8" and "YOLOv11" exports: paths that are right for a script one folder further down; several
# augmented images of one source, which differ behind ".rf." only; an empty file for an image without boxes.
ROBOFLOW_YAML = """\
train: ../train/images
val: ../valid/images
test: ../test/images

nc: 3
names: ['bolt, M8', 'apple core', 'nut']

roboflow:
  workspace: eva-kx2ab
  project: parts-9ylqe
  version: 2
  license: CC BY 4.0
  url: https://universe.roboflow.com/eva-kx2ab/parts-9ylqe/dataset/2
"""
ROBOFLOW_READMES = {
    "README.dataset.txt": (
        "# parts > 2025-10-10 11:58am\nhttps://universe.roboflow.com/eva-kx2ab/parts-9ylqe\n\n"
        "Provided by a Roboflow user\nLicense: CC BY 4.0\n\n"),
    "README.roboflow.txt": (
        "\nparts - v2 2025-10-10 11:58am\n==============================\n\n"
        "This dataset was exported via roboflow.com on October 10, 2025 at 3:58 PM GMT\n\n"
        "* annotate, and create datasets\n* export, train, and deploy computer vision models\n\n"
        "The dataset includes 6 images.\nObjects are annotated.\n\n"
        "The following pre-processing was applied to each image:\n* Resize to 640x640 (Stretch)\n\n"),
}
LAYOUTS["Roboflow YOLOv8"] = Layout(
    "YOLO",
    files={
        "data.yaml": ROBOFLOW_YAML, **ROBOFLOW_READMES,
        "train/labels/IMG_1_jpg.rf.0a1b2c.txt": boxes(0, 2),
        "train/labels/IMG_1_jpg.rf.9f8e7d.txt": boxes(2),
        "train/labels/IMG_2_jpg.rf.44aa01.txt": "",
        "valid/labels/IMG_3_png.rf.5566ab.txt": boxes(1),
        "valid/labels/IMG_4_jpg.rf.c0ffee.txt": boxes(2, 2, 2),
        "test/labels/IMG_5_jpg.rf.00dd11.txt": boxes(0, 1),
    },
    classes=["bolt, M8", "apple core", "nut"],
    rows={
        "train/images/IMG_1_jpg.rf.0a1b2c.jpg": ["train", 1, 0, 1],
        "train/images/IMG_1_jpg.rf.9f8e7d.jpg": ["train", 0, 0, 1],
        "train/images/IMG_2_jpg.rf.44aa01.jpg": ["train", 0, 0, 0],
        "valid/images/IMG_3_png.rf.5566ab.jpg": ["val", 0, 1, 0],
        "valid/images/IMG_4_jpg.rf.c0ffee.jpg": ["val", 0, 0, 1],
        "test/images/IMG_5_jpg.rf.00dd11.jpg": ["test", 1, 1, 0],
    })

# Roboflow, downloaded with its Python package: for YOLOv5 and YOLOv7, and once for YOLOv8, Version.download() writes
# the folder of the download into train and val, but not into test, and PyYAML sorts the keys.
for PLACE in ("/content/parts-2", "parts-2"):
    LAYOUTS[f"Roboflow YOLOv5 downloaded to {PLACE}"] = replace(LAYOUTS["Roboflow YOLOv8"], files={
        **LAYOUTS["Roboflow YOLOv8"].files,
        "data.yaml": (
            "names:\n- bolt, M8\n- apple core\n- nut\nnc: 3\nroboflow:\n  license: CC BY 4.0\n  project: parts-9ylqe\n"
            "  url: https://universe.roboflow.com/eva-kx2ab/parts-9ylqe/dataset/2\n  version: 2\n"
            f"  workspace: eva-kx2ab\ntest: ../test/images\ntrain: {PLACE}/train/images\nval: {PLACE}/valid/images\n"),
    })

# Roboflow without a test split: the yaml names the folder all the same. Classes that are called 0 and 1.
LAYOUTS["Roboflow YOLOv5 without a test folder"] = Layout(
    "YOLO",
    files={
        "data.yaml": (
            "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['0', '1']\n"),
        **ROBOFLOW_READMES,
        "train/labels/a_jpg.rf.01.txt": boxes(1),
        "train/labels/b_jpg.rf.02.txt": boxes(0),
        "valid/labels/c_jpg.rf.03.txt": boxes(0, 1),
    },
    classes=["0", "1"],
    rows={
        "train/images/a_jpg.rf.01.jpg": ["train", 0, 1],
        "train/images/b_jpg.rf.02.jpg": ["train", 1, 0],
        "valid/images/c_jpg.rf.03.jpg": ["val", 1, 1],
    })

# Roboflow without any split: all images are in train/, which divides nothing.
LAYOUTS["Roboflow YOLOv11 with one folder"] = Layout(
    "YOLO",
    files={
        "data.yaml": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\nnames: ['fish']\n",
        **ROBOFLOW_READMES,
        "train/labels/a_jpg.rf.01.txt": polygons(0),
        "train/labels/b_jpg.rf.02.txt": "",
    },
    classes=["fish"],
    rows={"train/images/a_jpg.rf.01.jpg": ["", 1], "train/images/b_jpg.rf.02.jpg": ["", 0]})

# Roboflow, "YOLO Darknet" export: the files lie beside the images, and each part repeats the names of the classes.
LAYOUTS["Roboflow YOLO Darknet"] = Layout(
    "YOLO",
    files={
        **ROBOFLOW_READMES,
        "train/_darknet.labels": "bolt\nnut\n", "valid/_darknet.labels": "bolt\nnut\n",
        "train/IMG_1_jpg.rf.0a1b2c.txt": boxes(0, 1),
        "train/IMG_2_jpg.rf.44aa01.txt": "",
        "valid/IMG_3_png.rf.5566ab.txt": boxes(1),
    },
    classes=["bolt", "nut"],
    rows={
        "train/IMG_1_jpg.rf.0a1b2c.jpg": ["train", 1, 1],
        "train/IMG_2_jpg.rf.44aa01.jpg": ["train", 0, 0],
        "valid/IMG_3_png.rf.5566ab.jpg": ["val", 0, 1],
    })

# CVAT, "YOLO 1.1", as datumaro's YoloConverter writes it: paths start with data/, an image without boxes has an empty
# file, folders of the task stay folders. A task without a subset is called train.
LAYOUTS["CVAT YOLO 1.1"] = Layout(
    "YOLO",
    files={
        "obj.data": "classes = 3\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
        "obj.names": "cat\ndog\ntraffic light\n",
        "train.txt": "".join(f"data/obj_train_data/{name}.jpg\n" for name in ("1", "2", "3", "night/1")),
        "obj_train_data/1.txt": "2 0.133333 0.300000 0.266667 0.200000\n0 0.266667 0.450000 0.133333 0.300000\n",
        "obj_train_data/2.txt": "1 0.133333 0.300000 0.266667 0.200000\n",
        "obj_train_data/3.txt": "",
        "obj_train_data/night/1.txt": "0 0.133333 0.300000 0.266667 0.200000\n",
    },
    classes=["cat", "dog", "traffic light"],
    rows={
        "obj_train_data/1.jpg": ["", 1, 0, 1],
        "obj_train_data/2.jpg": ["", 0, 1, 0],
        "obj_train_data/3.jpg": ["", 0, 0, 0],
        "obj_train_data/night/1.jpg": ["", 1, 0, 0],
    })

# CVAT exports no images unless "Save images" is on: the annotations then lie beside a folder of images.
LAYOUTS["CVAT YOLO 1.1 without images"] = Layout(
    "YOLO",
    files={
        "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
        "obj.names": "cat\ndog\n",
        "train.txt": "data/obj_train_data/1.jpg\ndata/obj_train_data/2.jpg\n",
        "obj_train_data/1.txt": boxes(0),
        "obj_train_data/2.txt": boxes(1, 0),
    },
    classes=["cat", "dog"], rows={"images/1.jpg": ["", 1, 0], "images/2.jpg": ["", 1, 1]},
    unlabelled={"images/3.jpg": ""})

# CVAT, the same for a project: its subsets are called Train, Validation and Test.
LAYOUTS["CVAT YOLO 1.1 with subsets"] = Layout(
    "YOLO",
    files={
        "obj.data": ("classes = 2\nTrain = data/Train.txt\nValidation = data/Validation.txt\n"
                     "names = data/obj.names\nbackup = backup/\n"),
        "obj.names": "cat\ndog\n",
        "Train.txt": "data/obj_Train_data/frame_000000.jpg\ndata/obj_Train_data/frame_000001.jpg\n",
        "Validation.txt": "data/obj_Validation_data/frame_000000.jpg\n",
        "obj_Train_data/frame_000000.txt": boxes(1),
        "obj_Train_data/frame_000001.txt": boxes(0, 0),
        "obj_Validation_data/frame_000000.txt": boxes(0),
    },
    classes=["cat", "dog"],
    rows={
        "obj_Train_data/frame_000000.jpg": ["train", 0, 1],
        "obj_Train_data/frame_000001.jpg": ["train", 1, 0],
        "obj_Validation_data/frame_000000.jpg": ["val", 1, 0],
    })

# CVAT, "Ultralytics YOLO Detection", as datumaro's YOLOv8DetectionConverter writes it: PyYAML sorts the keys, an image
# without boxes is in the list, but has no file; a track number may follow a box.
LAYOUTS["CVAT Ultralytics YOLO Detection"] = Layout(
    "YOLO",
    files={
        "data.yaml": "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n",
        "train.txt": "".join(f"data/images/train/{name}.jpg\n" for name in ("1", "2", "3", "night/1")),
        "labels/train/1.txt": "1 0.133333 0.300000 0.266667 0.200000 7\n",
        "labels/train/2.txt": boxes(0, 1),
        "labels/train/night/1.txt": boxes(0),
    },
    classes=["cat", "dog"],
    rows={"images/train/1.jpg": ["", 0, 1], "images/train/2.jpg": ["", 1, 1], "images/train/night/1.jpg": ["", 1, 0]},
    unlabelled={"images/train/3.jpg": ""})

LAYOUTS["CVAT Ultralytics YOLO Detection with subsets"] = Layout(
    "YOLO",
    files={
        "data.yaml": "Train: Train.txt\nValidation: Validation.txt\nnames:\n  0: cat\n  1: dog\npath: .\n",
        "Train.txt": "data/images/Train/1.jpg\ndata/images/Train/2.jpg\n",
        "Validation.txt": "data/images/Validation/1.jpg\n",
        "labels/Train/1.txt": boxes(1),
        "labels/Train/2.txt": boxes(0),
        "labels/Validation/1.txt": boxes(0, 1),
    },
    classes=["cat", "dog"],
    rows={
        "images/Train/1.jpg": ["train", 0, 1],
        "images/Train/2.jpg": ["train", 1, 0],
        "images/Validation/1.jpg": ["val", 1, 1],
    })

# Label Studio, "YOLO with Images", as convert_to_yolo() of label-studio-sdk writes it: numbers with all their decimals,
# an empty file for a task without boxes, names of uploads behind eight hexadecimal digits.
LABEL_STUDIO_NOTES = {
    "categories": [{"id": 0, "name": "Airplane"}, {"id": 1, "name": "Car"}, {"id": 2, "name": "big car"}],
    "info": {"year": 2025, "version": "1.0", "contributor": "Label Studio"},
}
LAYOUTS["Label Studio YOLO"] = Layout(
    "YOLO",
    files={
        "classes.txt": "Airplane\nCar\nbig car\n",
        "notes.json": json.dumps(LABEL_STUDIO_NOTES, indent=2),
        "labels/3c1f9a7e-street 1.txt": "1 0.5119047619047619 0.31746031746031744 0.09523809523809523 0.2\n",
        "labels/77aa01bc-street_2.txt": "2 0.1 0.2 0.05 1e-05\n0 0.3 0.3 0.1 0.1\n",
        "labels/deadbeef-empty.txt": "",
    },
    classes=["Airplane", "Car", "big car"],
    rows={
        "images/3c1f9a7e-street 1.jpg": ["", 0, 1, 0],
        "images/77aa01bc-street_2.png": ["", 1, 0, 1],
        "images/deadbeef-empty.jpg": ["", 0, 0, 0],
    })

# Label Studio, "YOLO" without images: people put their own folder there, with more images than were annotated.
LAYOUTS["Label Studio YOLO without images"] = Layout(
    "YOLO",
    files={
        "classes.txt": "Airplane\nCar\n",
        "notes.json": json.dumps(LABEL_STUDIO_NOTES, indent=2),
        "labels/DSC_0001.txt": boxes(1),
        "labels/DSC_0002.txt": boxes(0) + polygons(1),
    },
    classes=["Airplane", "Car"],
    rows={"images/DSC_0001.JPG": ["", 0, 1], "images/DSC_0002.JPG": ["", 1, 1]},
    unlabelled={"images/DSC_0003.JPG": ""})

# darknet, README of AlexeyAB/darknet ("How to train to detect your custom objects"): obj/ holds the images and their
# files, obj.data calls the list test.txt valid.
LAYOUTS["darknet"] = Layout(
    "YOLO",
    files={
        "obj.data": ("classes = 2\ntrain  = data/train.txt\nvalid  = data/test.txt\nnames = data/obj.names\n"
                     "backup = backup/\n"),
        "obj.names": "air\nbird\n",
        "train.txt": "data/obj/img1.jpg\ndata/obj/img2.jpg\n",
        "test.txt": "data/obj/img3.jpg\n",
        "obj/img1.txt": "1 0.716797 0.395833 0.216406 0.147222\n0 0.687109 0.379167 0.255469 0.158333\n",
        "obj/img2.txt": boxes(0),
        "obj/img3.txt": boxes(1),
    },
    classes=["air", "bird"],
    rows={
        "obj/img1.jpg": ["train", 1, 1],
        "obj/img2.jpg": ["train", 1, 0],
        "obj/img3.jpg": ["val|test", 0, 1],
    })

# LabelImg in YOLO mode: a file beside each image, and classes.txt in the same folder; Windows ends the lines.
LABELIMG_YOLO = {"classes.txt": "dog\r\nperson\r\ncat\r\n", "photo 1.txt": boxes(2, 1).replace("\n", "\r\n"),
                 "photo 2.txt": boxes(1).replace("\n", "\r\n")}
LAYOUTS["LabelImg YOLO"] = Layout(
    "YOLO", LABELIMG_YOLO, classes=["dog", "person", "cat"],
    rows={"photo 1.jpg": ["", 0, 1, 1], "photo 2.png": ["", 0, 1, 0]},
    unlabelled={"photo 3.jpg": ""})

LAYOUTS["LabelImg YOLO in a folder of images"] = Layout(
    "YOLO", {f"images/{name}": text for name, text in LABELIMG_YOLO.items()}, classes=["dog", "person", "cat"],
    rows={"images/photo 1.jpg": ["", 0, 1, 1], "images/photo 2.png": ["", 0, 1, 0]},
    unlabelled={"images/photo 3.jpg": ""})

LAYOUTS["LabelImg YOLO with a folder of labels"] = Layout(
    "YOLO", {f"labels/{name}": text for name, text in LABELIMG_YOLO.items()}, classes=["dog", "person", "cat"],
    rows={"images/photo 1.jpg": ["", 0, 1, 1], "images/photo 2.png": ["", 0, 1, 0]})

# FiftyOne, YOLOv5DatasetExporter: dataset.yaml, with names as a list in older versions and a folder that ends in "/".
LAYOUTS["FiftyOne YOLOv5"] = Layout(
    "YOLO",
    files={
        "dataset.yaml": "names:\n- cat\n- dog\nnc: 2\ntrain: ./images/train/\nval: ./images/val/\n",
        "labels/train/000001.txt": boxes(0),
        "labels/train/000002.txt": "1 0.5 0.5 0.25 0.25 0.9713\n",
        "labels/val/000003.txt": boxes(1, 0),
    },
    classes=["cat", "dog"],
    rows={
        "images/train/000001.jpg": ["train", 1, 0],
        "images/train/000002.jpg": ["train", 0, 1],
        "images/val/000003.jpg": ["val", 1, 1],
    })


# ----------------------------------------------------------------------------------------------------------
# COCO: JSON files with images, annotations and categories


def coco(categories, images, annotations, **more):
    """Return a COCO file: {id: name}, {id: file_name}, and (image, category) or (image, category, 1) for a crowd."""
    lines = []
    for number, (image, category, *crowd) in enumerate(annotations, 1):
        shape = {"counts": [20, 5, 95], "size": [10, 12]} if crowd else [[1.0, 1.0, 6.5, 1.0, 6.5, 7.0]]
        lines.append({"id": number, "image_id": image, "category_id": category, "iscrowd": len(crowd), "area": 16.5,
                      "bbox": [1.0, 1.0, 5.5, 6.0], "segmentation": shape})
    return {
        "info": {"description": "", "version": "1.0", "year": 2017, "contributor": "", "url": "", "date_created": ""},
        "licenses": [{"id": 0, "name": "", "url": ""}],
        "images": [{"id": number, "license": 0, "file_name": name, "width": 12, "height": 10}
                   for number, name in images.items()],
        "annotations": lines,
        "categories": [{"supercategory": "", "id": number, "name": name} for number, name in categories.items()],
        **more,
    }


# COCO 2017, cocodataset.org: annotations_trainval2017.zip and the folders of images. The numbers of categories have
# gaps, toothbrush has no annotation; a dog that is only in a crowd is unknown; one name of a file is in both parts.
COCO_CATEGORIES = {1: "person", 18: "dog", 44: "bottle", 90: "toothbrush"}
COCO_TRAIN = coco(COCO_CATEGORIES, {9: "000000000009.jpg", 25: "000000000025.jpg", 30: "000000000030.jpg"},
                  [(9, 44), (25, 1), (25, 18, 1), (9, 44), (9, 18), (9, 18, 1)])
COCO_VAL = coco(COCO_CATEGORIES, {9: "000000000009.jpg", 139: "000000000139.jpg"}, [(139, 18), (139, 1, 1), (9, 1)])
COCO_FILES = {
    "annotations/instances_train2017.json": COCO_TRAIN,
    "annotations/instances_val2017.json": COCO_VAL,
    "annotations/captions_train2017.json": {
        **COCO_TRAIN, "annotations": [{"id": 1, "image_id": 9, "caption": "A bottle."}]},
    "annotations/captions_val2017.json": {
        **COCO_VAL, "annotations": [{"id": 1, "image_id": 139, "caption": "A dog."}]},
    "annotations/person_keypoints_train2017.json": coco({1: "person"}, {25: "000000000025.jpg"}, [(25, 1)]),
    "annotations/person_keypoints_val2017.json": coco({1: "person"}, {139: "000000000139.jpg"}, []),
}
COCO_ROWS = {
    "train2017/000000000009.jpg": ["train", 0, 1, 1],
    "train2017/000000000025.jpg": ["train", 1, NA, 0],
    "train2017/000000000030.jpg": ["train", 0, 0, 0],
    "val2017/000000000009.jpg": ["val", 1, 0, 0],
    "val2017/000000000139.jpg": ["val", NA, 1, 0],
}
LAYOUTS["COCO 2017"] = Layout("COCO", COCO_FILES, ["person", "dog", "bottle"], COCO_ROWS, warned=["toothbrush"])

LAYOUTS["COCO 2017 below images"] = Layout(
    "COCO", COCO_FILES, ["person", "dog", "bottle"], {f"images/{name}": row for name, row in COCO_ROWS.items()},
    warned=["toothbrush"])

# COCO 2017 with its test images, whose JSON has images and categories, but no annotations at all.
IMAGE_INFO = coco(COCO_CATEGORIES, {1: "000000000001.jpg"}, [])
del IMAGE_INFO["annotations"]
LAYOUTS["COCO 2017 with test images"] = Layout(
    "COCO",
    files={**COCO_FILES, "annotations/image_info_test2017.json": IMAGE_INFO,
           "annotations/image_info_test-dev2017.json": IMAGE_INFO},
    classes=["person", "dog", "bottle"], rows=COCO_ROWS, unlabelled={"test2017/000000000001.jpg": "test"},
    warned=["toothbrush"])

# COCO 2017 panoptic and stuff annotations: beside instances; their pictures are masks with the names of the images.
LAYOUTS["COCO 2017 with panoptic annotations"] = Layout(
    "COCO",
    files={
        **COCO_FILES,
        "annotations/panoptic_val2017.json": {
            **COCO_VAL, "annotations": [{"image_id": 139, "file_name": "000000000139.png", "segments_info": []}]},
        "annotations/stuff_val2017.json": coco({92: "banner"}, {139: "000000000139.jpg"}, [(139, 92)]),
    },
    classes=["person", "dog", "bottle"], rows=COCO_ROWS, warned=["toothbrush"],
    others=["annotations/panoptic_val2017/000000000139.png"])

# Roboflow, "COCO" export (README and JSON files of public projects): the JSON lies beside the images of its part;
# category 0 is the name of the project; the numbers of images start at 0 in each part.
ROBOFLOW_CATEGORIES = {0: "parts-9ylqe", 1: "bolt", 2: "nut", 3: "washer"}
LAYOUTS["Roboflow COCO"] = Layout(
    "COCO",
    files={
        **ROBOFLOW_READMES,
        "train/_annotations.coco.json": coco(
            ROBOFLOW_CATEGORIES, {0: "IMG_1_jpg.rf.0a1b2c.jpg", 1: "IMG_1_jpg.rf.9f8e7d.jpg"}, [(0, 1), (1, 2)]),
        "valid/_annotations.coco.json": coco(
            ROBOFLOW_CATEGORIES, {0: "IMG_3_png.rf.5566ab.jpg", 1: "IMG_4_jpg.rf.c0ffee.jpg"}, [(0, 2), (0, 1)]),
        "test/_annotations.coco.json": coco(ROBOFLOW_CATEGORIES, {0: "IMG_5_jpg.rf.00dd11.jpg"}, [(0, 3)]),
    },
    classes=["bolt", "nut", "washer"],
    rows={
        "train/IMG_1_jpg.rf.0a1b2c.jpg": ["train", 1, 0, 0],
        "train/IMG_1_jpg.rf.9f8e7d.jpg": ["train", 0, 1, 0],
        "valid/IMG_3_png.rf.5566ab.jpg": ["val", 1, 1, 0],
        "valid/IMG_4_jpg.rf.c0ffee.jpg": ["val", 0, 0, 0],
        "test/IMG_5_jpg.rf.00dd11.jpg": ["test", 0, 0, 1],
    },
    warned=["parts-9ylqe"])

# Roboflow, a project that is called as one of its classes (such a file is in open-edge-platform/datumaro#1160):
# of the two categories fish, only the second one has annotations.
FISH = {0: "fish", 1: "fish", 2: "lobster trap"}
LAYOUTS["Roboflow COCO with the name of a class as its category 0"] = Layout(
    "COCO",
    files={
        "train/_annotations.coco.json": coco(FISH, {0: "a_jpg.rf.01.jpg", 1: "b_jpg.rf.02.jpg"}, [(0, 1), (1, 2)]),
        "valid/_annotations.coco.json": coco(FISH, {0: "c_jpg.rf.03.jpg"}, [(0, 1), (0, 2)]),
    },
    classes=["fish", "lobster trap"],
    rows={
        "train/a_jpg.rf.01.jpg": ["train", 1, 0],
        "train/b_jpg.rf.02.jpg": ["train", 0, 1],
        "valid/c_jpg.rf.03.jpg": ["val", 1, 1],
    })

# Roboflow without any split: all images are in train/.
LAYOUTS["Roboflow COCO with one folder"] = Layout(
    "COCO",
    files={**ROBOFLOW_READMES, "train/_annotations.coco.json": coco(
        {0: "animals", 1: "cat"}, {0: "a_jpg.rf.01.jpg", 1: "b_jpg.rf.02.jpg"}, [(1, 1)])},
    classes=["cat"], rows={"train/a_jpg.rf.01.jpg": ["", 0], "train/b_jpg.rf.02.jpg": ["", 1]}, warned=["animals"])

# CVAT, "COCO 1.0", as datumaro's CocoConverter writes it, with its images in one folder (merge_images) or in one per
# subset. Folders of the task are part of file_name; annotations have attributes.
CVAT_JSON = coco({1: "cat", 2: "dog", 4: "plane"}, {1: "1.jpg", 2: "night/1.jpg", 3: "2.jpg"},
                 [(1, 2), (2, 1), (2, 4), (1, 2)])
for line in CVAT_JSON["annotations"]:
    line["attributes"] = {"occluded": False, "name": "x"}
CVAT_ROWS = {"1.jpg": ["", 0, 1, 0], "night/1.jpg": ["", 1, 0, 1], "2.jpg": ["", 0, 0, 0]}
for FOLDER in ("images", "images/default"):
    LAYOUTS[f"CVAT COCO with {FOLDER}"] = Layout(
        "COCO", {"annotations/instances_default.json": CVAT_JSON}, ["cat", "dog", "plane"],
        {f"{FOLDER}/{name}": row for name, row in CVAT_ROWS.items()})

LAYOUTS["CVAT COCO with subsets"] = Layout(
    "COCO",
    files={
        "annotations/instances_Train.json": coco({1: "cat", 2: "dog"}, {1: "1.jpg", 2: "2.jpg"}, [(1, 2), (2, 1)]),
        "annotations/instances_Validation.json": coco({1: "cat", 2: "dog"}, {1: "1.jpg"}, [(1, 1)]),
    },
    classes=["cat", "dog"],
    rows={
        "images/Train/1.jpg": ["train", 0, 1],
        "images/Train/2.jpg": ["train", 1, 0],
        "images/Validation/1.jpg": ["val", 1, 0],
    })

# Label Studio, "COCO with Images", as convert_to_coco() of label-studio-sdk writes it: numbers start at 0, and
# file_name is a relative path of the machine that exported it, so it has backslashes if that one runs Windows.
# Label Studio 1.16 writes the path of the upload instead (HumanSignal/label-studio#7294).
for SYSTEM, START in (("Linux", "images/"), ("Windows", "images\\"),
                      ("version 1.16", "..\\..\\label-studio\\media\\upload\\4\\")):
    LAYOUTS[f"Label Studio COCO from {SYSTEM}"] = Layout(
        "COCO",
        files={"result.json": json.dumps(coco(
            {0: "Airplane", 1: "Car", 2: "Van"},
            {0: f"{START}3c1f9a7e-street 1.jpg", 1: f"{START}77aa01bc-street_2.png", 2: f"{START}e.jpg"},
            [(0, 1), (1, 0), (1, 1)]), indent=2)},
        classes=["Airplane", "Car"],
        rows={
            "images/3c1f9a7e-street 1.jpg": ["", 0, 1],
            "images/77aa01bc-street_2.png": ["", 1, 1],
            "images/e.jpg": ["", 0, 0],
        },
        warned=["Van"])

# FiftyOne, COCODetectionDataset (docs.voxel51.com, "Exporting FiftyOne Datasets"): labels.json beside data/.
LAYOUTS["FiftyOne COCO"] = Layout(
    "COCO",
    files={"labels.json": coco({0: "cat", 1: "dog"}, {1: "000001.jpg", 2: "000002.png"}, [(1, 1), (2, 0), (2, 1)])},
    classes=["cat", "dog"],
    rows={"data/000001.jpg": ["", 0, 1], "data/000002.png": ["", 1, 1]},
    unlabelled={"data/000003.jpg": ""})


# ----------------------------------------------------------------------------------------------------------
# Pascal VOC: an XML file per image


def thing(name, difficult=0, more=""):
    """Return an object of a VOC file."""
    return (f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>1</truncated>\n"
            f"\t\t<difficult>{difficult}</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>2</xmin>\n\t\t\t<ymin>1</ymin>\n"
            f"\t\t\t<xmax>9</xmax>\n\t\t\t<ymax>8</ymax>\n\t\t</bndbox>\n{more}\t</object>\n")


def voc(filename, *objects, head="<annotation>", folder="VOC2007", more=""):
    """Return a VOC file with objects, which are names or what thing() returns."""
    things = "".join(one if one.startswith("\t") else thing(one) for one in objects)
    return (f"{head}\n\t<folder>{folder}</folder>\n\t<filename>{filename}</filename>\n{more}"
            "\t<source>\n\t\t<database>Unknown</database>\n\t</source>\n"
            "\t<size>\n\t\t<width>12</width>\n\t\t<height>10</height>\n\t\t<depth>3</depth>\n\t</size>\n"
            f"\t<segmented>0</segmented>\n{things}</annotation>\n")


# Pascal VOC 2007 (VOCdevkit and its documentation): parts and the owner have names, but are no objects; a chair that
# is only there as `difficult` is unknown; lists of single classes and of other tasks divide nothing; masks have the
# stems of the images.
OWNER = "\t<owner>\n\t\t<flickrid>Fried Camels</flickrid>\n\t\t<name>Jinky the Fruit Bat</name>\n\t</owner>\n"
HEAD = "\t\t<part>\n\t\t\t<name>head</name>\n\t\t\t<bndbox>\n\t\t\t\t<xmin>3</xmin>\n\t\t\t</bndbox>\n\t\t</part>\n"
VOC_FILES = {
    "Annotations/000005.xml": voc("000005.jpg", "chair", thing("chair", 1), thing("person", more=HEAD), more=OWNER),
    "Annotations/000007.xml": voc("000007.jpg", "car", more=OWNER),
    "Annotations/000009.xml": voc("000009.jpg", "person", thing("chair", 1), more=OWNER),
    "Annotations/000012.xml": voc("000012.jpg", thing("cat", 1), thing("cat", 1), more=OWNER),
    "Annotations/000001.xml": voc("000001.jpg", "cat", "car", more=OWNER),
    "Annotations/000003.xml": voc("000003.jpg", more=OWNER),
    "ImageSets/Main/train.txt": "000012\n000005\n",
    "ImageSets/Main/val.txt": "000007\n000009\n",
    "ImageSets/Main/trainval.txt": "000005\n000007\n000009\n000012\n",
    "ImageSets/Main/test.txt": "000001\n000002\n000003\n",
    "ImageSets/Main/cat_train.txt": "000012  0\n000005 -1\n",
    "ImageSets/Main/cat_val.txt": "000007 -1\n000009 -1\n",
    "ImageSets/Main/cat_test.txt": "000001  1\n000003 -1\n",
    "ImageSets/Layout/val.txt": "000005 1\n",
    "ImageSets/Segmentation/train.txt": "000007\n",
    "ImageSets/Segmentation/test.txt": "000005\n",
}
VOC_CLASSES = ["car", "cat", "chair", "person"]
VOC_ROWS = {
    "JPEGImages/000005.jpg": ["train", 0, 0, 1, 1],
    "JPEGImages/000007.jpg": ["val", 1, 0, 0, 0],
    "JPEGImages/000009.jpg": ["val", 0, 0, NA, 1],
    "JPEGImages/000012.jpg": ["train", 0, NA, 0, 0],
    "JPEGImages/000001.jpg": ["test", 1, 1, 0, 0],
    "JPEGImages/000003.jpg": ["test", 0, 0, 0, 0],
}
LAYOUTS["Pascal VOC 2007"] = Layout(
    "VOC", VOC_FILES, VOC_CLASSES, VOC_ROWS, unlabelled={"JPEGImages/000002.jpg": "test"},
    others=["SegmentationClass/000007.png", "SegmentationObject/000007.png"])

# The archives of Pascal VOC unpack to VOCdevkit/VOC2007, beside the Matlab code of the devkit.
LAYOUTS["Pascal VOC devkit"] = Layout(
    "VOC",
    files={
        **{f"VOC2007/{name}": text for name, text in VOC_FILES.items()},
        "VOCcode/VOCinit.m": "clear VOCopts\n", "example_classifier.m": "function example_classifier\n",
    },
    classes=VOC_CLASSES, rows={f"VOC2007/{name}": row for name, row in VOC_ROWS.items()},
    unlabelled={"VOC2007/JPEGImages/000002.jpg": "test"},
    others=["VOC2007/SegmentationClass/000007.png", "VOC2007/SegmentationObject/000007.png"])

# Pascal VOC 2007 and 2012 in one devkit, as torchvision's VOCDetection and many papers use them.
LAYOUTS["Pascal VOC devkit of two years"] = Layout(
    "VOC",
    files={
        **{f"VOC2007/{name}": text for name, text in VOC_FILES.items()},
        "VOC2012/Annotations/2008_000002.xml": voc("2008_000002.jpg", "person", "bird", folder="VOC2012"),
        "VOC2012/Annotations/2008_000003.xml": voc("2008_000003.jpg", thing("car", 1), folder="VOC2012"),
        "VOC2012/ImageSets/Main/train.txt": "2008_000003\n",
        "VOC2012/ImageSets/Main/val.txt": "2008_000002\n",
        "VOC2012/ImageSets/Main/trainval.txt": "2008_000002\n2008_000003\n",
    },
    classes=["bird", *VOC_CLASSES],
    rows={
        **{f"VOC2007/{name}": [part, 0, *labels] for name, (part, *labels) in VOC_ROWS.items()},
        "VOC2012/JPEGImages/2008_000002.jpg": ["val", 1, 0, 0, 0, 1],
        "VOC2012/JPEGImages/2008_000003.jpg": ["train", 0, NA, 0, 0, 0],
    },
    unlabelled={"VOC2007/JPEGImages/000002.jpg": "test"})

# Roboflow, "Pascal VOC" export: the XML lies beside its image; <path> repeats the name.
LAYOUTS["Roboflow VOC"] = Layout(
    "VOC",
    files={
        **ROBOFLOW_READMES,
        **{f"{name}.xml": voc(f"{os.path.basename(name)}.jpg", *names, folder="",
                              more=f"\t<path>{os.path.basename(name)}.jpg</path>\n")
           for name, names in {"train/IMG_1_jpg.rf.0a1b2c": ["nut", "bolt", "nut"],
                               "train/IMG_1_jpg.rf.9f8e7d": ["nut"],
                               "valid/IMG_3_png.rf.5566ab": ["bolt"],
                               "valid/IMG_4_jpg.rf.c0ffee": [],
                               "test/IMG_5_jpg.rf.00dd11": ["nut"]}.items()},
    },
    classes=["bolt", "nut"],
    rows={
        "train/IMG_1_jpg.rf.0a1b2c.jpg": ["train", 1, 1],
        "train/IMG_1_jpg.rf.9f8e7d.jpg": ["train", 0, 1],
        "valid/IMG_3_png.rf.5566ab.jpg": ["val", 1, 0],
        "valid/IMG_4_jpg.rf.c0ffee.jpg": ["val", 0, 0],
        "test/IMG_5_jpg.rf.00dd11.jpg": ["test", 0, 1],
    },
    unlabelled={"train/IMG_9_jpg.rf.aaaaaa.jpg": "train"})

# CVAT, "PASCAL VOC 1.1", as datumaro's VocConverter writes it: folders of the task below Annotations/, <filename> and
# in the list; attributes of objects have names too; labelmap.txt is no table of labels; an image without objects has
# a file.
ATTRIBUTES = ("\t\t<attributes>\n\t\t\t<attribute>\n\t\t\t\t<name>rotation</name>\n\t\t\t\t<value>0.0</value>\n"
              "\t\t\t</attribute>\n\t\t</attributes>\n")
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:64,0,0::\ndog:128,0,0::\n"
LAYOUTS["CVAT VOC 1.1"] = Layout(
    "VOC",
    files={
        "Annotations/day/1.xml": voc("day/1.jpg", thing("dog", more=ATTRIBUTES), folder=""),
        "Annotations/night/1.xml": voc("night/1.jpg", thing("cat", more=ATTRIBUTES), "dog", folder=""),
        "Annotations/frame_000001.xml": voc("frame_000001.jpg", folder="frame"),
        "ImageSets/Main/default.txt": "day/1\nnight/1\nframe_000001\n",
        "ImageSets/Main/cat_default.txt": "day/1  -1\nnight/1  1\nframe_000001  -1\n",
        "ImageSets/Segmentation/default.txt": "",
        "labelmap.txt": LABELMAP,
    },
    classes=["cat", "dog"],
    rows={
        "JPEGImages/day/1.jpg": ["", 0, 1],
        "JPEGImages/night/1.jpg": ["", 1, 1],
        "JPEGImages/frame_000001.jpg": ["", 0, 0],
    })

LAYOUTS["CVAT VOC 1.1 with subsets"] = Layout(
    "VOC",
    files={
        "Annotations/1.xml": voc("1.jpg", "dog", folder=""),
        "Annotations/2.xml": voc("2.jpg", "cat", folder=""),
        "Annotations/photo 3.xml": voc("photo 3.png", "cat", "dog", folder=""),
        "ImageSets/Main/Train.txt": "1\n2\n",
        "ImageSets/Main/Validation.txt": "photo 3\n",
        "labelmap.txt": LABELMAP,
    },
    classes=["cat", "dog"],
    rows={
        "JPEGImages/1.jpg": ["train", 0, 1],
        "JPEGImages/2.jpg": ["train", 1, 0],
        "JPEGImages/photo 3.png": ["val", 1, 1],
    })

LAYOUTS["CVAT VOC 1.1 with only a list called train"] = Layout(
    "VOC",
    files={
        "Annotations/1.xml": voc("1.jpg", "dog", folder=""),
        "Annotations/2.xml": voc("2.jpg", "cat", folder=""),
        "ImageSets/Main/train.txt": "1\n2\n",
        "labelmap.txt": LABELMAP,
    },
    classes=["cat", "dog"], rows={"JPEGImages/1.jpg": ["", 0, 1], "JPEGImages/2.jpg": ["", 1, 0]})

# Label Studio, "Pascal VOC XML", as convert_to_voc() of label-studio-sdk writes it: minidom's header; a task without
# boxes has an image, but no XML.
STUDIO = '<?xml version="1.0" encoding="utf-8"?>\n<annotation>'
LAYOUTS["Label Studio VOC"] = Layout(
    "VOC",
    files={
        "Annotations/3c1f9a7e-street 1.xml": voc("3c1f9a7e-street 1.jpg", "Car", "Car", head=STUDIO, folder="images"),
        "Annotations/77aa01bc-Straße.xml": voc("77aa01bc-Straße.png", "Car & Van", head=STUDIO, folder="images")
        .replace("&", "&amp;"),
    },
    classes=["Car", "Car & Van"],
    rows={"images/3c1f9a7e-street 1.jpg": ["", 1, 0], "images/77aa01bc-Straße.png": ["", 0, 1]},
    unlabelled={"images/deadbeef-empty.jpg": ""})

# LabelImg in Pascal VOC mode: all in one folder, with the path of the machine where it was drawn. Renaming the images
# and their XML files together leaves the old <filename> inside.
LABELIMG = {
    "photo 1.xml": voc("DSC_0001.JPG", "dog", head='<annotation verified="yes">', folder="photos",
                       more="\t<path>C:\\Users\\eva\\photos\\DSC_0001.JPG</path>\n"),
    "photo 2.xml": voc("photo 2.png", "person", thing("dog", 1), folder="photos"),
    "photo 3.xml": voc("photo 3", folder="photos", head='<annotation verified="yes">'),
}
LABELIMG_ROWS = {"photo 1.jpg": ["", 1, 0], "photo 2.png": ["", NA, 1], "photo 3.jpg": ["", 0, 0]}
LAYOUTS["LabelImg VOC"] = Layout(
    "VOC", LABELIMG, ["dog", "person"], LABELIMG_ROWS, unlabelled={"photo 4.jpg": ""})

LAYOUTS["LabelImg VOC in a folder of images"] = Layout(
    "VOC", {f"images/{name}": text for name, text in LABELIMG.items()}, ["dog", "person"],
    {f"images/{name}": row for name, row in LABELIMG_ROWS.items()}, unlabelled={"images/photo 4.jpg": ""})

# LabelImg, with its XML files saved to another folder.
LAYOUTS["LabelImg VOC with a folder of annotations"] = Layout(
    "VOC", {f"annotations/{name}": text for name, text in LABELIMG.items()}, ["dog", "person"],
    {f"images/{name}": row for name, row in LABELIMG_ROWS.items()})


# ----------------------------------------------------------------------------------------------------------
# What is read


@pytest.fixture(params=LAYOUTS)
def case(request, tmp_path):
    """Return a folder with one of the layouts, and the layout."""
    layout = LAYOUTS[request.param]
    return write_layout(tmp_path / "data", layout), layout


def rows_of(table, folder):
    """Return {path of the image below the folder: [part, a label per class]}."""
    rows = {}
    parts = table.parts or [""] * len(table)
    for path, part, labels in zip(table.paths, parts, known_rows(table).values()):
        rows[Path(os.path.relpath(path, folder)).as_posix()] = [part, *labels]
    assert len(rows) == len(table)
    return rows


def unlabelled_of(table, folder):
    """Return the paths below the folder of the images without a row, sorted."""
    paths = [Path(table.root) / name for name in table.unlabelled]
    return sorted(Path(os.path.relpath(path, folder)).as_posix() for path in paths)


def check(table, folder, layout, rows):
    """Check the classes, labels and parts of a table."""
    assert table.classes == layout.classes
    found = rows_of(table, folder)
    assert found.keys() == rows.keys()
    for name, (part, *labels) in rows.items():
        assert found[name][1:] == labels, name
        assert found[name][0] in part.split("|"), name
    assert len({found[name][0] for name in rows if rows[name][0] == "val|test"}) <= 1


def test_each_label_and_each_part_of_a_layout_is_read(case):
    folder, layout = case
    table = dataset.read_labels(folder)
    check(table, folder, layout, layout.rows)
    assert unlabelled_of(table, folder) == sorted(layout.unlabelled)
    assert table.missing == []
    assert table.absent == 0.0
    for name in layout.warned:
        assert any(name in warning for warning in table.warnings), name

    # An origin is the annotation file of the image.
    for path, origin in zip(table.paths, table.origins):
        file = Path(origin if Path(origin).is_file() else origin.rpartition(":")[0])
        assert file.is_file()
        assert layout.format == "COCO" or file.stem == Path(path).stem


def test_the_command_shows_a_layout_without_options_and_names_its_format(case, capsys):
    folder, layout = case
    before = files_of(folder)
    table = dataset.main([str(folder)])
    check(table, folder, layout, layout.rows)
    assert files_of(folder) == before

    out = capsys.readouterr().out.replace(str(folder), "DATA")
    formats = [name for name in ("YOLO", "COCO", "VOC") if re.search(rf"(?<![\w/-]){name}(?![\w-]|\.\w)", out)]
    assert formats == [layout.format]


def test_a_layout_written_as_one_table_has_the_same_labels(case, tmp_path, capsys):
    folder, layout = case
    out = tmp_path / "labels.csv"
    dataset.main([str(folder), "--out", str(out)])
    again = dataset.read_labels(folder, labels=out)
    assert again.classes == layout.classes
    labels = {name: labels for name, (_, *labels) in rows_of(again, folder).items()}
    assert labels == {name: labels for name, (_, *labels) in layout.rows.items()}


# ----------------------------------------------------------------------------------------------------------
# No annotation


PER_IMAGE = [name for name, layout in LAYOUTS.items() if layout.format != "COCO"]


@pytest.mark.parametrize("name", PER_IMAGE)
def test_with_background_an_image_without_a_file_shows_nothing(tmp_path, name):
    layout = LAYOUTS[name]
    folder = write_layout(tmp_path / "data", layout)
    table = dataset.read_labels(folder, background=True)
    rows = {image: [part, *[0] * len(layout.classes)] for image, part in layout.unlabelled.items()}
    check(table, folder, layout, {**layout.rows, **rows})
    assert table.unlabelled == []


def test_a_note_counts_the_images_without_a_file_and_names_the_option_for_them(tmp_path):
    for name in ("Ultralytics coco8", "Pascal VOC 2007"):
        layout = LAYOUTS[name]
        folder = write_layout(tmp_path / layout.format, layout)
        count = len(layout.unlabelled)
        notes = dataset.read_labels(folder).notes
        assert any(re.search(rf"\b{count}\b", note) and "--background" in note for note in notes), name

        # With the option none is left, and no note says otherwise.
        table = dataset.main([str(folder), "--background"])
        assert len(table) == len(layout.rows) + count
        assert all("background" in note for note in table.notes if "images without" in note), name


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name].format == "COCO"])
def test_background_is_refused_for_coco_which_lists_its_images(tmp_path, capsys, name):
    folder = write_layout(tmp_path / "data", LAYOUTS[name])
    assert "--background" in refused(capsys, dataset.main, folder, "--background")


def test_background_is_refused_for_a_table(make_data, capsys):
    folder = make_data("image red\na.jpg 1\nb.jpg 0\n")
    assert "--background" in refused(capsys, dataset.main, folder, "--background")


@pytest.mark.parametrize("text", ["", "\n", " \r\n\r\n"])
@pytest.mark.parametrize("background", [False, True])
def test_an_empty_yolo_file_says_that_nothing_is_there(tmp_path, text, background):
    files = {"classes.txt": "cat\ndog\n", "labels/a.txt": boxes(1), "labels/b.txt": text}
    layout = Layout("YOLO", files, ["cat", "dog"], {"images/a.jpg": ["", 0, 1], "images/b.jpg": ["", 0, 0]})
    folder = write_layout(tmp_path, layout)
    check(dataset.read_labels(folder, background=background), folder, layout, layout.rows)


@pytest.mark.parametrize("background", [False, True])
def test_an_annotation_file_without_its_image_is_missing_and_not_background(tmp_path, background):
    for name, lost in (("Ultralytics coco8", "images/train/000000000025.jpg"),
                       ("Pascal VOC 2007", "JPEGImages/000007.jpg")):  # a mask of that name is still there
        layout = LAYOUTS[name]
        folder = write_layout(tmp_path / layout.format, layout)
        (folder / lost).unlink()
        table = dataset.read_labels(folder, background=background)
        rows = {image: row for image, row in layout.rows.items() if image != lost}
        if background:
            rows.update({image: [part, *[0] * len(layout.classes)] for image, part in layout.unlabelled.items()})
        check(table, folder, layout, rows)
        assert [Path(name).stem for name in table.missing] == [Path(lost).stem]


def test_coco_of_which_only_val_was_downloaded_reads_val(tmp_path):
    """annotations_trainval2017.zip holds the JSON of both parts, and train2017.zip has 19 GB."""
    layout = LAYOUTS["COCO 2017"]
    folder = write_layout(tmp_path, layout)
    for name in [name for name in layout.rows if name.startswith("train2017")]:
        (folder / name).unlink()
    (folder / "train2017").rmdir()

    table = dataset.read_labels(folder)
    labels = {name: labels for name, (_, *labels) in rows_of(table, folder).items()}
    assert labels == {name: row[1:] for name, row in layout.rows.items() if name.startswith("val2017")}
    assert len(table.missing) == 3


# ----------------------------------------------------------------------------------------------------------
# --labels, and folders with two formats


@pytest.mark.parametrize("name, labels", [
    ("Ultralytics coco8", "labels"), ("Roboflow YOLOv5 without a test folder", "train/labels"),
    ("CVAT YOLO 1.1", "obj_train_data"), ("Label Studio YOLO", "labels"),
    ("COCO 2017", "annotations/instances_train2017.json"), ("COCO 2017", "annotations/instances_val2017.json"),
    ("Roboflow COCO", "valid/_annotations.coco.json"), ("CVAT COCO with images", "annotations/instances_default.json"),
    ("Label Studio COCO from Linux", "result.json"), ("FiftyOne COCO", "labels.json"),
    ("Pascal VOC 2007", "Annotations"), ("Roboflow VOC", "train"), ("Label Studio VOC", "Annotations"),
])
def test_labels_names_a_json_file_or_a_folder_of_files(tmp_path, name, labels):
    layout = LAYOUTS[name]
    folder = write_layout(tmp_path, layout)
    table = dataset.read_labels(folder, labels=folder / labels)
    found = rows_of(table, folder)

    # A folder or file of one part holds only the images of that part, and so no split.
    part = {"train/labels": "train", "train": "train", "valid/_annotations.coco.json": "val"}.get(
        labels, "train" if "train2017" in labels else "val" if "val2017" in labels else "")
    rows = {image: row for image, row in layout.rows.items() if not part or row[0] == part}
    assert found.keys() == rows.keys()
    for image, row in rows.items():
        known = dict(zip(layout.classes, row[1:]))
        for label, value in zip(table.classes, found[image][1:]):
            assert known[label] == value, (image, label)
        assert found[image][0] in (row[0], "")


TWO_FORMATS = {
    # coco2017labels.zip of Ultralytics holds annotations/instances_val2017.json beside labels/
    "YOLO and COCO": ("Ultralytics coco8", "labels", "annotations/instances_val.json", coco(
        {1: "person"}, {1: "000000000036.jpg", 2: "000000000042.jpg"}, [(1, 1)])),
    "YOLO and VOC": ("Label Studio YOLO", "labels", "Annotations/3c1f9a7e-street 1.xml",
                     voc("3c1f9a7e-street 1.jpg", "Car")),
    "COCO and VOC": ("Label Studio COCO from Linux", "result.json", "Annotations/e.xml", voc("e.jpg", "Car")),
}


@pytest.mark.parametrize("name, first, added, text", TWO_FORMATS.values(), ids=TWO_FORMATS)
def test_two_formats_in_one_folder_are_an_error_that_names_both(tmp_path, capsys, name, first, added, text):
    layout = LAYOUTS[name]
    folder = write_layout(tmp_path / "data", replace(layout, files={**layout.files, added: text}))
    second = added if added.endswith(".json") else "Annotations"
    error = refused(capsys, dataset.main, folder)
    assert "--labels" in error
    for choice in (first, second):
        assert choice in error.replace("--labels", "")
        assert len(dataset.read_labels(folder, labels=folder / choice)) > 0


def test_a_label_file_with_a_specific_name_wins_over_boxes(tmp_path):
    layout = LAYOUTS["Label Studio YOLO"]
    folder = write_layout(tmp_path, layout)
    (folder / "labels.csv").write_text("image,wet,dry\n77aa01bc-street_2.png,1,0\ndeadbeef-empty.jpg,0,1\n")
    table = dataset.read_labels(folder)
    assert table.classes == ["wet", "dry"]
    assert sorted(table.ids) == ["77aa01bc-street_2.png", "deadbeef-empty.jpg"]


@pytest.mark.parametrize("name", [
    "Ultralytics coco8", "Roboflow YOLOv11 with one folder", "Label Studio YOLO without images", "LabelImg YOLO"])
@pytest.mark.parametrize("pictures", [False, True])
def test_predictions_of_ultralytics_in_the_data_folder_are_no_labels(tmp_path, name, pictures):
    """`yolo predict save_txt=True` writes runs/detect/predict/labels/*.txt below the working directory."""
    layout = LAYOUTS[name]
    images = [*layout.rows, *layout.unlabelled]
    predicted = {f"runs/detect/predict/labels/{Path(image).stem}.txt": boxes(0, 0) for image in images}
    more = {**predicted, "runs/detect/train/args.yaml": "task: detect\nmode: train\ndata: data.yaml\n",
            "runs/detect/train/results.csv": "epoch,time,metrics/mAP50(B)\n1,2.5,0.5\n2,5.1,0.6\n"}
    drawn = [f"runs/detect/predict/{Path(image).name}" for image in images] if pictures else []
    folder = write_layout(tmp_path, replace(layout, files={**layout.files, **more}, others=drawn))
    table = dataset.read_labels(folder)
    check(table, folder, layout, layout.rows)
    assert table.missing == []


def test_yolo_without_names_of_classes_is_an_error_that_says_where_to_put_them(tmp_path, capsys):
    """The archive of coco8 holds no yaml file: it is part of the package."""
    layout = LAYOUTS["Ultralytics coco8"]
    folder = write_layout(tmp_path / "data", layout)
    (folder / "coco8.yaml").unlink()
    error = refused(capsys, dataset.main, folder)
    assert "data.yaml" in error and "classes.txt" in error
