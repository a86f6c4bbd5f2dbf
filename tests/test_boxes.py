"""Boxes as labels: YOLO, Pascal VOC and COCO JSON. What they mean, and what is wrong with them."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import dataset
import inference
import train
from conftest import as_command, draw_images, known_rows, refused
from dataset import InputError

BOX = "0.5 0.5 0.2 0.1"
NA = None


def write(folder, files):
    """Write texts, or bytes, or objects as JSON, {path: content}, and draw the images among the paths."""
    draw_images(folder, [name for name in files if name.endswith((".jpg", ".png"))])
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".jpg", ".png")):
            continue
        content = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_yolo(folder, files=(), config="names: [cat, dog, cow]\n"):
    """Write YOLO data: images/a.jpg and b.jpg with label files, c.jpg without one, and more files."""
    images = dict.fromkeys(("images/a.jpg", "images/b.jpg", "images/c.jpg"), "")
    labels = {"labels/a.txt": f"2 {BOX}\n0 {BOX}\n2 {BOX}\n", "labels/b.txt": "", "data.yaml": config}
    return write(folder, images | labels | dict(files))


def voc(*objects, filename="x.jpg", head=""):
    """Return Pascal VOC for (name, difficult) objects."""
    items = "".join(f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox/></object>\n"
                    for name, difficult in objects)
    return f"{head}<annotation>\n<filename>{filename}</filename>\n{items}</annotation>\n"


def coco(images, annotations=(), categories=((1, "cat"), (5, "dog"))):
    """Return COCO JSON for {id: file_name}, (image_id, category_id, iscrowd), and (id, name)."""
    boxes = [{"id": k, "image_id": image, "category_id": category, "iscrowd": crowd, "bbox": [1, 2, 3, 4]}
             for k, (image, category, crowd) in enumerate(annotations)]
    return {"images": [{"id": number, "file_name": name} for number, name in images.items()], "annotations": boxes,
            "categories": [{"id": number, "name": name} for number, name in categories]}


def rows(folder, **how):
    """Read a folder, and return its rows by the paths of the images below it."""
    table = dataset.read_labels(folder, **how)
    assert table.absent == 0.0 and table.targets.dtype == np.float32
    table.ids = [path.removeprefix(f"{folder}/") for path in table.paths]
    return known_rows(table)


def parts(folder, **how):
    """Read a folder, and return the part of each image by its path below it; {} without a split."""
    table = dataset.read_labels(folder, **how)
    return {path.removeprefix(f"{folder}/"): part for path, part in zip(table.paths, table.parts)}


def told(table):
    return "\n".join(table.notes + table.warnings)


# ---------------------------------------------------------------------------------------------------------------------
# What boxes mean


def test_a_class_of_yolo_is_present_if_it_has_a_box_polygon_or_key_points(tmp_path):
    polygon = "1 " + " ".join(["0.1"] * 7)
    key_points = f"2 {BOX} 0.1 0.2 2.000000"
    folder = write_yolo(tmp_path, {"labels/a.txt": f"{polygon}\r\n\r\n  {key_points}\r\n", "labels/c.txt": "\n"})
    assert rows(folder) == {"images/a.jpg": [0, 1, 1], "images/b.jpg": [0, 0, 0], "images/c.jpg": [0, 0, 0]}
    assert dataset.read_labels(folder).classes == ["cat", "dog", "cow"]


def test_difficult_objects_alone_make_a_class_of_voc_unknown(tmp_path):
    write(tmp_path, {"JPEGImages/a.jpg": "", "JPEGImages/b.jpg": "", "JPEGImages/c.jpg": "",
                     "Annotations/a.xml": voc(("dog", 1), ("cat", 0), ("dog", 1)),
                     "Annotations/b.xml": voc(("dog", 1), ("dog", 0)), "Annotations/c.xml": voc()})
    assert dataset.read_labels(tmp_path).classes == ["cat", "dog"]
    assert rows(tmp_path) == {"JPEGImages/a.jpg": [1, NA], "JPEGImages/b.jpg": [0, 1], "JPEGImages/c.jpg": [0, 0]}


def test_objects_of_voc_count_wherever_they_are_and_true_is_difficult_too(tmp_path):
    text = "<annotation><objects><object><name>cat</name><difficult>{}</difficult></object></objects></annotation>"
    write(tmp_path, {"a.jpg": "", "b.jpg": "", "a.xml": text.format("False"), "b.xml": text.format("True")})
    assert rows(tmp_path) == {"a.jpg": [1], "b.jpg": [NA]}


def test_crowds_alone_make_a_class_of_coco_unknown(tmp_path):
    content = coco({7: "a.jpg", "x": "b.jpg", 3: "c.jpg"},
                   [(7, 5, 1), (7, 1, 0), ("x", 5, 1), ("x", 5, 0), ("x", 5, 1)], [(5, "dog"), (90, "cow"), (1, "cat")])
    write(tmp_path, {"images/a.jpg": "", "images/b.jpg": "", "images/c.jpg": "", "result.json": content})
    table = dataset.read_labels(tmp_path)
    assert table.classes == ["cat", "dog"] and "without an annotation, which were left out: cow" in told(table)
    assert rows(tmp_path) == {"images/a.jpg": [1, NA], "images/b.jpg": [0, 1], "images/c.jpg": [0, 0]}
    assert table.origins[2] == f"{tmp_path}/result.json:images[2]"


def test_background_makes_all_absent_in_images_without_a_label_file(tmp_path):
    for name, folder in (("yolo", write_yolo(tmp_path / "yolo")), ("voc", write(tmp_path / "voc", {
            "images/a.jpg": "", "images/b.jpg": "", "images/c.jpg": "",
            "Annotations/a.xml": voc(("cat", 0)), "Annotations/b.xml": voc()}))):
        table = dataset.read_labels(folder)
        assert table.unlabelled == ["c.jpg"] and "images without a label file: 1, such as c.jpg" in told(table)
        with_all = dataset.read_labels(folder, background=True)
        assert with_all.ids == ["a.jpg", "b.jpg", "c.jpg"] and with_all.unlabelled == [], name
        assert (with_all.targets[:2] == table.targets).all() and (with_all.targets[2] == 0).all()
        assert "c.jpg: background, where all classes are absent" in told(with_all)


def test_background_joins_the_part_of_its_folder_or_list(tmp_path):
    files = {f"images/{name}.jpg": "" for name in ("train/a", "train/b", "val/a", "val/b", "c")}
    files |= {"labels/train/a.txt": f"0 {BOX}", "labels/val/a.txt": f"0 {BOX}", "classes.txt": "cat\n"}
    write(tmp_path, files)
    expected = {"images/train/a.jpg": "train", "images/train/b.jpg": "train", "images/val/a.jpg": "val",
                "images/val/b.jpg": "val"}
    assert parts(tmp_path, background=True) == expected | {"images/c.jpg": ""}
    write(tmp_path, {"train.txt": "images/train/a.jpg\nimages/c.jpg\n", "val.txt": "./images/val/a.jpg\nval/b.jpg\n"})
    assert parts(tmp_path, background=True) == {"images/train/a.jpg": "train", "images/c.jpg": "train",
                                                "images/val/a.jpg": "val", "images/val/b.jpg": "val"}
    warnings = dataset.read_labels(tmp_path, background=True).warnings
    assert any("in no part" in text and "train/b.jpg" in text for text in warnings)


def test_background_is_refused_for_other_formats(tmp_path, make_data, capsys):
    write(tmp_path / "coco", {"a.jpg": "", "labels.json": coco({1: "a.jpg"}, [(1, 1, 0)])})
    for folder in (tmp_path / "coco", make_data("a.jpg 1\nb.jpg 0\n")):
        assert "--background is for YOLO and Pascal VOC" in refused(capsys, dataset.main, folder, "--background")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6), min_size=1, max_size=5))
def test_all_three_formats_say_what_a_loop_over_the_boxes_says(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("boxes")
    names = ["bird", "cat", "cow", "dog"]
    pictures = {f"images/{i}.jpg": "" for i in range(len(images))}
    write(folder / "voc", pictures | {f"Annotations/{i}.xml": voc(*((names[c], int(hard)) for c, hard in boxes))
                                      for i, boxes in enumerate(images)})
    write(folder / "coco", pictures | {"annotations/instances_default.json": coco(
        {i: f"{i}.jpg" for i in range(len(images))},
        [(i, 10 * c, int(hard)) for i, boxes in enumerate(images) for c, hard in boxes],
        [(10 * c, name) for c, name in enumerate(names)])})
    write(folder / "yolo", pictures | {"classes.txt": "\n".join(names)} | {
        f"labels/{i}.txt": "".join(f"{c} {BOX}\n" for c, hard in boxes if not hard) for i, boxes in enumerate(images)})

    seen = sorted({names[c] for boxes in images for c, _ in boxes})
    event(f"{len(seen)} classes")
    for kind, classes in (("voc", seen), ("coco", seen), ("yolo", names)):
        if not classes:
            with pytest.raises(InputError):
                dataset.read_labels(folder / kind)
            continue
        expected = {}
        for i, boxes in enumerate(images):
            clear = {names[c] for c, hard in boxes if not hard}
            hard = {names[c] for c, hard in boxes if hard} if kind != "yolo" else set()
            expected[f"images/{i}.jpg"] = [1 if name in clear else NA if name in hard else 0 for name in classes]
        assert rows(folder / kind) == expected
        assert dataset.read_labels(folder / kind).classes == classes


# ---------------------------------------------------------------------------------------------------------------------
# Which files are label files


def test_a_label_file_with_a_specific_name_wins_over_boxes(tmp_path):
    folder = write_yolo(tmp_path, {"labels.csv": "image,cow\na.jpg,0\nb.jpg,1\n"})
    assert dataset.read_labels(folder).classes == ["cow"]
    assert dataset.read_labels(folder, labels="labels").classes == ["cat", "dog", "cow"]


SECOND = {
    "voc": ({"Annotations/a.xml": voc(("cat", 0))}, "YOLO files in {0}/labels and Pascal VOC files in {0}/Annotations"),
    "coco": ({"annotations/instances_train.json": coco({1: "a.jpg"}, [(1, 1, 0)])},
             "--labels {0}/labels or --labels {0}/annotations/instances_train.json"),
    "cls": ({"labels/b.cls": "1\n"}, ".cls files in {0}/labels and YOLO files in {0}/labels: move the others away"),
    "tables": ({"train.csv": "image,cow\na.jpg,0\n", "val.csv": "image,cow\nb.jpg,1\n"}, "a table in {0}/train.csv"),
}


@pytest.mark.parametrize("kind", SECOND)
def test_two_formats_in_a_folder_are_an_error_that_names_both(tmp_path, kind):
    files, message = SECOND[kind]
    write_yolo(tmp_path, files)
    with pytest.raises(InputError, match=re.escape(message.format(tmp_path))):
        dataset.read_labels(tmp_path)


def test_the_option_chooses_among_formats(tmp_path, in_folder):
    folder = write_yolo(tmp_path, {"Annotations/a.xml": voc(("cat", 0)),
                                   "other/x.json": coco({1: "b.jpg"}, [(1, 5, 0)])})
    assert rows(folder, labels="Annotations") == {"images/a.jpg": [1]}
    assert rows(folder, labels=folder / "other" / "x.json") == {"images/b.jpg": [1]}
    assert rows(folder, labels="other") == {"images/b.jpg": [1]}
    assert rows(folder, labels="labels") == {"images/a.jpg": [1, 0, 1], "images/b.jpg": [0, 0, 0]}
    for named, message in (("images", "holds no .cls files"), ("data.yaml", "name the folder of the YOLO files")):
        with pytest.raises(InputError, match=message):
            dataset.read_labels(folder, labels=named)


def test_captions_beside_images_are_not_taken_for_boxes(tmp_path):
    write(tmp_path, {"x/a.jpg": "", "x/b.jpg": "", "x/a.txt": "\n", "x/b.txt": "3 dogs in the rain at night"})
    with pytest.raises(InputError, match="name the label file with --labels"):
        dataset.read_labels(tmp_path)
    write(tmp_path, {"table.csv": "image,cat\na.jpg,1\nb.jpg,0\n"})
    assert dataset.read_labels(tmp_path).classes == ["cat"]


def test_lists_and_notes_beside_yolo_files_are_not_label_files(tmp_path):
    files = {"README.txt": "Thanks", "labels/classes.txt": "cat\ndog\ncow\n",
             "notes.json": {"categories": [], "info": {}},
             "train.txt": "images/a.jpg\n", "val.txt": "images/b.jpg\n", "images/train.jpg": "",
             "labels/train.txt": f"1 {BOX}\n", "labels/.ipynb_checkpoints/a-checkpoint.txt": "?"}
    folder = write_yolo(tmp_path, files)
    assert parts(folder) == {"images/a.jpg": "train", "images/b.jpg": "val"}
    for name in ("train.txt", "val.txt"):
        (folder / name).unlink()
    assert rows(folder)["images/train.jpg"] == [0, 1, 0]


def test_other_json_beside_coco_is_ignored(tmp_path):
    content = coco({1: "a.jpg"}, [(1, 1, 0)])
    write(tmp_path, {"val2017/a.jpg": "", "annotations/instances_val2017.json": content, "map.json": {"images": []},
                     "annotations/captions_val2017.json": coco({1: "b.jpg"}), "config.json": "[not json",
                     "annotations/person_keypoints_val2017.json": content})
    assert rows(tmp_path) == {"val2017/a.jpg": [1]}


def test_two_json_files_of_the_same_part_are_an_error(tmp_path):
    content = coco({1: "a.jpg"}, [(1, 1, 0)])
    write(tmp_path, {"a.jpg": "", "instances_train.json": content, "instances_train2017.json": content})
    with pytest.raises(InputError, match=r"instances_train.json and .*instances_train2017.json are both train"):
        dataset.read_labels(tmp_path)
    assert len(rows(tmp_path, labels="instances_train.json")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Which image belongs to a label file


def test_each_part_of_coco_sees_only_its_own_images(tmp_path):
    write(tmp_path, {"train2017/1.jpg": "", "val2017/1.jpg": "", "train2017/2.jpg": "",
                     "annotations/instances_train2017.json": coco({1: "1.jpg"}, [(1, 1, 0)]),
                     "annotations/instances_val2017.json": coco({1: "1.jpg", 2: "2.jpg"}, [(1, 5, 0), (2, 5, 0)])})
    assert rows(tmp_path) == {"train2017/1.jpg": [1, 0], "val2017/1.jpg": [0, 1]}
    assert parts(tmp_path) == {"train2017/1.jpg": "train", "val2017/1.jpg": "val"}
    assert dataset.read_labels(tmp_path).missing == ["2.jpg"]


def test_parts_of_coco_that_share_a_folder_find_their_images_there(tmp_path):
    write(tmp_path, {"train/1.jpg": "", "train/2.jpg": "", "train.json": coco({1: "1.jpg"}, [(1, 1, 0)]),
                     "val.json": coco({1: "2.jpg"}, [(1, 1, 0)])})
    assert parts(tmp_path) == {"train/1.jpg": "train", "train/2.jpg": "val"}
    write(tmp_path, {"val.json": coco({1: "2.jpg", 2: "1.jpg"}, [(1, 1, 0)])})
    with pytest.raises(InputError, match=r"1.jpg \(train, .*images\[0\]\) and 1.jpg \(val, .*images\[1\]\)"):
        dataset.read_labels(tmp_path)
    assert parts(tmp_path, drop_overlap=True) == {"train/1.jpg": "val", "train/2.jpg": "val"}


def test_classes_of_the_parts_of_coco_are_matched_by_name(tmp_path):
    write(tmp_path, {"train/_annotations.coco.json": coco({1: "1.jpg"}, [(1, 3, 0)], [(3, "dog"), (7, "cat")]),
                     "valid/_annotations.coco.json": coco({1: "1.jpg"}, [(1, 3, 0)], [(3, "cat"), (4, "cow")]),
                     "train/1.jpg": "", "valid/1.jpg": ""})
    table = dataset.read_labels(tmp_path)
    assert table.classes == ["dog", "cat"] and table.targets.tolist() == [[1, 0], [0, 1]]
    assert "categories without an annotation, which were left out: cow" in told(table)


def test_the_stem_of_a_voc_file_decides_before_the_name_in_it(tmp_path):
    write(tmp_path, {"images/a.jpg": "", "images/b.jpg": "", "images/c.png": "",
                     "Annotations/a.xml": voc(("cat", 0), filename="b.jpg"),
                     "Annotations/b.xml": voc(("dog", 0), filename="b"),
                     "Annotations/0001.xml": voc(("cat", 0), ("dog", 0), filename="c.png"),
                     "Annotations/0002.xml": voc(("cat", 0), filename="")})
    assert rows(tmp_path) == {"images/a.jpg": [1, 0], "images/b.jpg": [0, 1], "images/c.png": [1, 1]}
    assert dataset.read_labels(tmp_path).missing == ["0002"]
    write(tmp_path, {"Annotations/0002.xml": voc(("cat", 0), filename="c.png")})
    with pytest.raises(InputError, match="which can be the image of only one of them"):
        dataset.read_labels(tmp_path)


def test_equal_stems_in_several_folders_belong_to_the_images_beside(tmp_path):
    names = ("siteA", "siteB/part1", "siteB/part2")
    files = {f"{name}/images/1.jpg": "" for name in names} | {"classes.txt": "a\nb\nc\n"}
    write(tmp_path, files | {f"{name}/labels/1.txt": f"{k} {BOX}" for k, name in enumerate(names)})
    assert rows(tmp_path) == {"siteA/images/1.jpg": [1, 0, 0], "siteB/part1/images/1.jpg": [0, 1, 0],
                              "siteB/part2/images/1.jpg": [0, 0, 1]}
    draw_images(tmp_path, ["siteA/images/1.png"])
    with pytest.raises(InputError, match=r"siteA/labels/1.txt: its image can be siteA/images/1.jpg or "):
        dataset.read_labels(tmp_path)


def test_the_closest_of_several_images_is_that_of_a_label_file_or_line_of_another_folder(tmp_path):
    write(tmp_path, {"images/1.jpg": "", "images/night/1.jpg": "", "obj.names": "cat\ndog\n",
                     "obj_train_data/1.txt": f"0 {BOX}", "obj_train_data/night/1.txt": f"1 {BOX}",
                     "train.txt": "data/obj_train_data/1.jpg\n", "test.txt": "data/obj_train_data/night/1.jpg\n"})
    assert rows(tmp_path) == {"images/1.jpg": [1, 0], "images/night/1.jpg": [0, 1]}
    assert parts(tmp_path) == {"images/1.jpg": "train", "images/night/1.jpg": "test"}


def test_the_image_of_one_label_file_is_not_that_of_another_whose_image_is_missing(tmp_path):
    write(tmp_path, {"JPEGImages/night/1.jpg": "", "Annotations/1.xml": voc(("cat", 0)),
                     "Annotations/night/1.xml": voc(("dog", 0)), "JPEGImages/day/1.jpg": "",
                     "Annotations/day/1.xml": voc(("cat", 0))})
    assert rows(tmp_path) == {"JPEGImages/night/1.jpg": [0, 1], "JPEGImages/day/1.jpg": [1, 0]}
    assert dataset.read_labels(tmp_path).missing == ["1"]


def test_an_image_of_its_own_label_file_is_not_what_the_name_in_another_one_means(tmp_path):
    write(tmp_path, {"images/b.jpg": "", "Annotations/a.xml": voc(("cat", 0), filename="b.jpg"),
                     "Annotations/b.xml": voc(("dog", 0), filename="b.jpg")})
    assert rows(tmp_path) == {"images/b.jpg": [0, 1]}


@pytest.mark.parametrize("files", [
    {"a.txt": f"0 {BOX}", "labels/a.txt": f"1 {BOX}", "classes.txt": "cat\ndog\n"},
    {"labels/a.xml": voc(("cat", 0)), "annotations/a.xml": voc(("dog", 0))},
    {"a.cls": "0\n", "labels/a.cls": "1\n"}])
def test_two_label_files_of_an_image_are_an_error(tmp_path, files):
    write(tmp_path, {"a.jpg": ""} | files)
    with pytest.raises(InputError, match=r"would both be .*/a\.jpg"):
        dataset.read_labels(tmp_path)


def test_label_files_may_lie_beside_a_folder_of_images(tmp_path):
    pictures = {"images/1.jpg": "", "images/2.jpg": ""}
    write(tmp_path / "voc", pictures | {"1.xml": voc(("cat", 0)), "2.xml": voc(), "pom.xml": "<project/>"})
    write(tmp_path / "yolo", pictures | {"1.txt": f"0 {BOX}", "2.txt": "", "classes.txt": "cat\n"})
    for kind in ("voc", "yolo"):
        assert rows(tmp_path / kind) == {"images/1.jpg": [1], "images/2.jpg": [0]}
    (tmp_path / "yolo" / "1.txt").write_text("3 dogs in the rain at night")
    with pytest.raises(InputError, match="name the label file with --labels"):
        dataset.read_labels(tmp_path / "yolo")


def test_masks_of_voc_are_not_images(tmp_path):
    write(tmp_path, {"JPEGImages/a.jpg": "", "SegmentationClass/a.png": "", "SegmentationObject/a.png": "",
                     "Annotations/a.xml": voc(("cat", 0))})
    assert rows(tmp_path, background=True) == {"JPEGImages/a.jpg": [1]}


# ---------------------------------------------------------------------------------------------------------------------
# Existing splits


def write_divided(folder, config, **files):
    """Write YOLO data with two images in each of images/train, images/val and images/test."""
    names = [f"{part}/{k}" for part in ("train", "val", "test") for k in range(2)]
    images = {f"images/{name}.jpg": "" for name in names}
    labels = {f"labels/{name}.txt": f"0 {BOX}" for name in names}
    return write(folder, images | labels | {"data.yaml": f"names: [cat]\n{config}"} | files)


BY_FOLDER = {f"images/{part}/{k}.jpg": part for part in ("train", "val", "test") for k in range(2)}
CONFIGS = {
    "folders": ("train: images/train\nval: images/val\ntest: images/test\n", BY_FOLDER),
    "another computer": ("path: /content/My Drive/data\ntrain: images/train\nval: images/val\ntest: images/test\n",
                         BY_FOLDER),
    "absolute": ("train: C:\\data\\images\\train\nval: /data/test/x/images/val\ntest: ../images/test/\n", BY_FOLDER),
    "lists of folders": ("train: [images/train, images/val]\ntest:\n  - images/test\n",
                         BY_FOLDER | {"images/val/0.jpg": "train", "images/val/1.jpg": "train"}),
    "nothing": ("train:\nval: ~\n", BY_FOLDER),
    "other roles than the names": ("train: images/test\nval: images/train\n", {
        "images/test/0.jpg": "train", "images/test/1.jpg": "train", "images/train/0.jpg": "val",
        "images/train/1.jpg": "val"}),
    "val is test": ("train: images/train\nval: images/val\ntest: images/val\n",
                    {name: part for name, part in BY_FOLDER.items() if part != "test"}),
    "val is train": ("train: images\nval: images\n", {}),
    "a missing folder": ("train: images/train\nval: images/nowhere\n", BY_FOLDER),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_split_of_a_config_is_kept(tmp_path, name):
    config, expected = CONFIGS[name]
    folder = write_divided(tmp_path, config)
    assert parts(folder) == expected
    said = told(dataset.read_labels(folder))
    assert ("are the same images, which count as" in said) == (" is t" in name)
    assert ("images/nowhere is not in" in said) == ("missing" in name)
    assert ("were left out" in said) == (name in ("other roles than the names", "val is test"))


@pytest.mark.parametrize("form", ["labels/{}/{}.txt", "obj_{}_data/{}.txt", "Annotations/{}/{}.xml"])
def test_folders_of_label_files_are_the_split_where_all_images_are_in_one(tmp_path, form):
    text = voc(("cat", 0)) if form.endswith("xml") else f"0 {BOX}"
    write(tmp_path, {"images/a.jpg": "", "images/b.jpg": "", form.format("train", "a"): text,
                     form.format("test", "b"): text, "classes.txt": "cat\n"})
    assert parts(tmp_path) == {"images/a.jpg": "train", "images/b.jpg": "test"}


def test_a_config_may_name_lists_of_images(tmp_path):
    folder = write_divided(tmp_path, "path: .\ntrain: Train.txt\nval: lists/val.txt\n", **{
        "Train.txt": "data/images/train/0.jpg\n./images/test/1.jpg\n\n",
        "lists/val.txt": "images/val/1.jpg\nnone.jpg\n"})
    assert parts(folder) == {"images/train/0.jpg": "train", "images/test/1.jpg": "train", "images/val/1.jpg": "val"}
    assert "lists/val.txt names images that are not there: none.jpg" in told(dataset.read_labels(folder))


def test_an_image_in_two_parts_is_an_error(tmp_path):
    folder = write_divided(tmp_path, "train: images\nval: images/val\n")
    with pytest.raises(InputError, match=r"2 images are in two parts: val/0.jpg \(train, .*--drop-overlap"):
        dataset.read_labels(folder)
    assert parts(folder, drop_overlap=True)["images/val/0.jpg"] == "val"


def test_image_sets_are_the_split_of_voc(tmp_path):
    files = {f"JPEGImages/2007_{k}.jpg": "" for k in range(5)}
    files |= {f"Annotations/2007_{k}.xml": voc(("cat", 0)) for k in range(5)}
    sets = {"train": "2007_0\n2007_3\n", "val": "2007_1\n", "trainval": "2007_0\n2007_1\n2007_3\n",
            "cat_train": "2007_4  1\n", "default": "2007_4\n"}
    write(tmp_path, files | {f"ImageSets/Main/{name}.txt": text for name, text in sets.items()})
    assert parts(tmp_path) == {"JPEGImages/2007_0.jpg": "train", "JPEGImages/2007_1.jpg": "val",
                               "JPEGImages/2007_3.jpg": "train"}
    assert "images in no part of the data's own split" in told(dataset.read_labels(tmp_path))

    (tmp_path / "ImageSets" / "Main" / "val.txt").unlink()  # all that is called train is not divided yet
    assert parts(tmp_path) == {} and len(rows(tmp_path)) == 5


def split_of(folder, **how):
    """Return the names of the images in train, val and test, as training divides them."""
    table = dataset.read_labels(folder, **how)
    return [{table.ids[row] for row in rows} for rows in dataset.split(table)]


def test_images_of_trainval_are_divided_and_those_of_test_are_kept(tmp_path):
    names = [f"2007_{k}" for k in range(12)]
    files = {f"JPEGImages/{name}.jpg": "" for name in names}
    files |= {f"Annotations/{name}.xml": voc(("cat", 0)) for name in names}
    sets = {"trainval": "\n".join(names[:8]), "test": "\n".join(names[8:11])}
    write(tmp_path, files | {f"ImageSets/Main/{name}.txt": text for name, text in sets.items()})
    train_names, val, test = split_of(tmp_path)
    assert val and train_names | val == {f"JPEGImages/{name}.jpg" for name in names[:8]}
    assert test == {f"JPEGImages/{name}.jpg" for name in names[8:11]}
    assert "which were left out: JPEGImages/2007_11.jpg" in told(dataset.read_labels(tmp_path))

    # Without trainval.txt, all other images are divided.
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").unlink()
    assert split_of(tmp_path)[2] == test and len(parts(tmp_path)) == 12
    (tmp_path / "ImageSets" / "Main" / "test.txt").rename(tmp_path / "ImageSets" / "Main" / "trainval.txt")
    assert parts(tmp_path) == {} and len(rows(tmp_path)) == 12


@pytest.mark.parametrize("kind", ["list", "config", "folder"])
def test_images_of_a_test_part_are_not_trained_on_even_if_it_is_the_only_part(tmp_path, kind):
    other = "test" if kind == "folder" else "b"
    names = [f"{folder}/{k}" for folder in ("a", other) for k in range(4)]
    files = {f"images/{name}.jpg": "" for name in names} | {f"labels/{name}.txt": f"0 {BOX}" for name in names}
    files |= {"data.yaml": "names: [cat]\n" + ("test: images/b\n" if kind == "config" else "")}
    files |= {"test.txt": "".join(f"images/b/{k}.jpg\n" for k in range(4))} if kind == "list" else {}
    write(tmp_path, files)
    train_names, val, test = split_of(tmp_path)
    assert val and train_names | val == {f"a/{k}.jpg" for k in range(4)}
    assert test == {f"{other}/{k}.jpg" for k in range(4)}


def test_images_that_answers_add_to_data_with_a_test_part_do_not_leave_the_others_to_val(tmp_path):
    names = [f"{folder}/{k}" for folder in ("a", "test") for k in range(4)]
    files = {f"images/{name}.jpg": "" for name in names} | {f"labels/{name}.txt": f"0 {BOX}" for name in names}
    folder = write(tmp_path / "data", files | {"images/a/x.jpg": "", "classes.txt": "cat\n"})
    answers = tmp_path / "answers.csv"
    answers.write_text("ID,label,given,probability,answer\na/x.jpg,cat,NA,,0\n")
    assert "a/x.jpg" in split_of(folder, answers=answers)[0]
    dataset.main([str(folder), "--answers", str(answers), "--out", str(tmp_path / "new.csv")])
    assert [len(part) for part in split_of(folder, labels=tmp_path / "new.csv")] == [4, 1, 4]


@pytest.mark.parametrize("kind", ["yolo", "voc", "coco"])
def test_data_that_is_all_test_is_not_trained_on_unless_an_option_names_its_labels(tmp_path, kind):
    names = [f"test/images/{k}" for k in range(4)]
    files = {f"{name}.jpg": "" for name in names} | {
        "yolo": {"classes.txt": "cat\n", **{f"{name.replace('images', 'labels')}.txt": f"0 {BOX}" for name in names}},
        "voc": {f"{name}.xml": voc(("cat", 0)) for name in names},
        "coco": {"annotations/instances_test.json": coco({k: f"{k}.jpg" for k in range(4)}, [(1, 1, 0)])}}[kind]
    write(tmp_path, files)
    assert {*parts(tmp_path).values()} == {"test"}
    with pytest.raises(InputError, match="split has no train images"):
        split_of(tmp_path)
    labels = {"yolo": "test/labels", "voc": "test/images", "coco": "annotations/instances_test.json"}[kind]
    assert sum(map(len, split_of(tmp_path, labels=labels))) == 4


@pytest.mark.parametrize("form", ["stems", "blank line first", "ImageSets"])
@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_lists_of_images_in_other_forms_and_places_are_the_split_too(tmp_path, kind, form):
    folder = write_yolo(tmp_path) if kind == "yolo" else write(tmp_path, {
        "images/a.jpg": "", "images/b.jpg": "", "Annotations/a.xml": voc(("cat", 0)), "Annotations/b.xml": voc()})
    place = "ImageSets/" if form == "ImageSets" else ""
    text = {"stems": "{}\n", "blank line first": "\n \nimages/{}.jpg\n", "ImageSets": "{}.jpg\n"}[form]
    write(folder, {f"{place}train.txt": text.format("a"), f"{place}val.txt": text.format("b")})
    assert parts(folder) == {"images/a.jpg": "train", "images/b.jpg": "val"}


def test_a_file_with_the_name_of_a_list_that_is_none_is_named_in_a_warning(tmp_path):
    folder = write_yolo(tmp_path, {"val.txt": "images/b.jpg labels/b.txt\n"})
    (folder / "test.txt").symlink_to("nowhere")
    assert f"{folder}/val.txt is no list of images" in told(dataset.read_labels(folder, labels="labels"))


def test_an_image_is_no_list_of_images(tmp_path, capsys):
    folder = write_yolo(tmp_path, config="names: [cat, dog, cow]\nval: images/b.jpg\n")
    assert "val: images/b.jpg is an image: name a folder" in refused(capsys, dataset.main, folder)


def test_nobody_is_asked_about_an_image_that_a_list_puts_into_val(tmp_path):
    folder = write_yolo(tmp_path, {"images/d.jpg": "", "train.txt": "images/a.jpg\nimages/d.jpg\n",
                                   "val.txt": "images/b.jpg\nimages/c.jpg\n"})
    table = dataset.read_labels(folder)
    images = dataset.images_to_ask_about(table, [1])
    assert sorted(images.ids) == ["a.jpg", "d.jpg"]


# ---------------------------------------------------------------------------------------------------------------------
# Names of the classes, and data.yaml


FORMS = {
    "brackets": "names: ['cat', \"dog\", big cow]  # three\nnc: 3\n",
    "brackets on lines": "nc: 3\nnames: [\n  'cat',  # the first\n  dog,\n\n  \"big cow\",\n]\n",
    "lines": "names:\n- cat\n- 'dog'\n# none\n- big cow # last\ntrain: x\n",
    "indented lines": "---\nnames:\n    - cat\n\n    - dog\n    - \"big cow\"\n",
    "numbers": "names:\n  0: cat\n  2: big cow\n  1: dog\n",
    "braces": "names: {0: cat, 1: 'dog', 2: big cow}\n",
    "braces below": "'names':\n  {0: cat, 1: dog,\n   2: big cow}\n",
    "others": "names: [cat, dog, big cow]\ndownload: |\n  names: [x]\n  &a *b\nkpt_shape: [17, 3]\nr:\n  url: 'a'\n",
    "from Windows": "\ufeffnames:\r\n  0: cat\r\n  1: dog\r\n  2: big cow\r\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_names_in_every_simple_form_of_yaml(tmp_path, form):
    assert dataset.read_labels(write_yolo(tmp_path, config=FORMS[form])).classes == ["cat", "dog", "big cow"]


WRONG_CONFIGS = {
    "anchor": ("names: &n [cat, dog, cow]\n", "data.yaml:1: '&n"),
    "tag": ("nc: 3\nnames: !!set {cat}\n", "data.yaml:2: '!!set"),
    "block text": ("names: |\n  cat\n  dog\n", "data.yaml:2: 'cat' is not understood"),
    "reference": ("names:\n  0: *cat\n", "data.yaml:2: '*cat' is not understood"),
    "nested": ("names:\n  0:\n    cat\n", "data.yaml:3: 'cat' is not understood"),
    "no list": ("names: cat\n", "data.yaml:1: names must be a list"),
    "open bracket": ("names: [cat,\n  dog\ntrain: x\n", "data.yaml:1: the brackets are not understood"),
    "open quote": ("names: ['cat, dog]\n", "data.yaml:1: "),
    "list in a list": ("names: [[cat, dog], cow]\n", "data.yaml:1: the brackets are not understood"),
    "key twice": ("names: {0: cat, 0: dog, 2: cow}\n", "data.yaml:1: "),
    "comma missing": ("names: ['cat' 'dog']\n", "data.yaml:1: the brackets are not understood"),
    "nc": ("nc: 2\nnames: [cat, dog, cow]\n", "data.yaml: nc is 2, but there are 3 names"),
    "twice": ("names: [cat, dog, cow]\nnames: [cat]\n", "data.yaml:2: names is there twice"),
    "number twice": ("names:\n  0: cat\n  0: dog\n", "data.yaml:3: 0 is there twice"),
    "repeated": ("names: [cat, dog, cat]\n", "cat"),
    "blank": ("names: [cat, '', dog]\n", "data.yaml:1: a name is blank"),
    "half a letter": ('names: [cat, "\\ud800", dog]\n', "data.yaml:1: "),
    "no number": ("names: {a: cat}\n", "data.yaml:1: 'a' is not a class number"),
    "none": ("nc: 3\n", "data.yaml has no names of the classes"),
    "gap": ("names: {0: cat, 1: dog, 3: cow}\n", "labels/a.txt:1: there is no class 2: "),
    "too few": ("names: [cat, dog]\n", "labels/a.txt:1: there is no class 2: "),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_what_is_wrong_with_a_config(tmp_path, capsys, name):
    config, message = WRONG_CONFIGS[name]
    assert message in refused(capsys, dataset.main, write_yolo(tmp_path, config=config))


NAMES = st.lists(st.text(st.sampled_from("abz09 _-'\"#:,[]{}&*!|>%@`\\é"), min_size=1, max_size=6).map(str.strip)
                 .filter(bool), min_size=3, max_size=6, unique=True)


@given(NAMES, st.sampled_from(["[{}]", "lines", "numbers", "braces"]), st.sampled_from("'\""))
def test_quoted_names_are_read_back_whatever_is_in_them(tmp_path_factory, names, form, quote):
    quoted = [json.dumps(name, ensure_ascii=False) if quote == '"' else "'" + name.replace("'", "''") + "'"
              for name in names]
    text = {"[{}]": f"names: [{', '.join(quoted)}]", "lines": "\n".join(["names:", *(f" - {name}" for name in quoted)]),
            "numbers": "\n".join(["names:", *(f"  {k}: {name} # it's" for k, name in enumerate(quoted))]),
            "braces": f"names: {{{', '.join(f'{k}: {name}' for k, name in enumerate(quoted))}}} # {{"}[form]
    path = tmp_path_factory.mktemp("yaml") / "data.yaml"
    path.write_text(text + "\ntrain: x\n", encoding="utf-8")
    assert dataset._read_config(path) == {"names": dict(enumerate(names)), "train": ["x"]}


def test_names_beside_the_label_files_or_of_darknet(tmp_path):
    for k, name in enumerate(("classes.txt", "obj.names", "labels/classes.txt", "labels/_darknet.labels", "coco.yaml")):
        text = "names: [cat, dog, cow]\n" if name.endswith("yaml") else "cat\ndog\ncow\n\n"
        folder = write_yolo(tmp_path / str(k), {name: text})
        (folder / "data.yaml").unlink()
        table = dataset.read_labels(folder)
        assert table.classes == ["cat", "dog", "cow"] and folder / name in table.sources


def test_names_that_differ_from_file_to_file_are_an_error(tmp_path, capsys):
    folder = write_yolo(tmp_path, {"classes.txt": "dog\ncat\ncow\n"})
    assert "classes.txt name different classes" in refused(capsys, dataset.main, folder)
    (folder / "classes.txt").unlink()
    (folder / "data.yaml").unlink()
    assert "no names of the classes: add data.yaml" in refused(capsys, dataset.main, folder)


def test_a_blank_line_among_numbered_names_is_an_error(tmp_path, capsys):
    folder = write_yolo(tmp_path, {"classes.txt": "cat\n\ndog\ncow\n"})
    assert "classes.txt:2: a blank line" in refused(capsys, dataset.main, folder)
    write(tmp_path, {"classes.txt": "cat\ndog\ncow\n \n\n"})
    assert dataset.read_labels(folder).classes == ["cat", "dog", "cow"]


def test_an_export_in_a_folder_below_has_its_own_names_and_split(tmp_path, capsys):
    folder = write_yolo(tmp_path, {f"export/images/{name}.jpg": "" for name in "de"} | {
        "export/labels/d.txt": f"0 {BOX}", "export/labels/e.txt": "", "export/train.txt": "images/d.jpg\n",
        "export/val.txt": "images/e.jpg\n", "export/data.yaml": "names: [bird]\ntrain: train.txt\nval: val.txt\n"})
    assert "data.yaml name different classes" in refused(capsys, dataset.main, folder)
    assert dataset.read_labels(folder, labels="labels").classes == ["cat", "dog", "cow"]
    shutil.rmtree(folder / "images")
    shutil.rmtree(folder / "labels")
    (folder / "data.yaml").unlink()
    assert rows(folder) == {"export/images/d.jpg": [1], "export/images/e.jpg": [0]}
    assert parts(folder) == {"export/images/d.jpg": "train", "export/images/e.jpg": "val"}


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with label files


WRONG_LINES = {
    f"x {BOX}": "a class number and the numbers of a box, not x, 0.5",
    "1 0.5 0.5 0.2": "a.txt:2: too few numbers",
    f"3 {BOX}": "a.txt:2: there is no class 3: ",
    f"-1 {BOX}": "a.txt:2: -1 is not a class number",
    f"0.5 {BOX}": "a.txt:2: 0.5 is not a class number",
    "1 0.5 nan 0.2 0.1": "a.txt:2: a YOLO line",
    "1 0.5 inf 0.2 0.1": "a.txt:2: a YOLO line",
    "1,0.5,0.5,0.2,0.1": "a.txt:2: a YOLO line",
    "1_0 0.5 0.5 0.2 0.1": "a.txt:2: a YOLO line",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_what_is_wrong_with_a_line_of_yolo(tmp_path, capsys, line):
    folder = write_yolo(tmp_path, {"labels/a.txt": f"1 {BOX}\n{line}\n"})
    assert WRONG_LINES[line] in refused(capsys, dataset.main, folder)


BOMB = '<?xml version="1.0"?>\n<!DOCTYPE a [<!ENTITY a "cat"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>\n'
WRONG_XML = {
    "entities": (voc(("&b;", 0), head=BOMB), "a.xml: DOCTYPE and entities are not read"),
    "a file": (voc(("&b;", 0), head='<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>'), "a.xml: DOCTYPE"),
    "unknown entity": (voc(("&b;", 0)), "a.xml:3: not XML: undefined entity"),
    "in UTF-16": (voc(("&b;", 0), head=BOMB).encode("utf-16"), "a.xml: DOCTYPE"),
    "no name": ("<annotation><object><name>cat</name></object><object/></annotation>", "a.xml: object 2 has no <name>"),
    "another root": ("<annotations><image/></annotations>", "a.xml: <annotations> is not Pascal VOC"),
    "cut off": (voc(("cat", 0))[:-20], "a.xml:3: not XML: "),
    "empty": ("", "a.xml:1: not XML: no element found"),
    "unknown encoding": ("<?xml version='1.0' encoding='x'?><annotation/>", "a.xml:1: not XML: "),
    "no object": ("<annotation/>", "no Pascal VOC file has an <object>"),
}


@pytest.mark.parametrize("name", WRONG_XML)
def test_what_is_wrong_with_a_voc_file(tmp_path, capsys, name):
    content, message = WRONG_XML[name]
    write(tmp_path, {"images/a.jpg": "", "Annotations/a.xml": content})
    assert message in refused(capsys, dataset.main, tmp_path)


def changed(**lists):
    """Return COCO JSON of two images with other lists, or other entries where a list has one."""
    return coco({1: "a.jpg", 2: "b.jpg"}, [(1, 1, 0), (2, 5, 0)]) | lists


WRONG_JSON = {
    "no images": ({"annotations": [], "categories": []}, "x.json has no list images"),
    "no categories": ({"annotations": [], "images": []}, "x.json has no list categories"),
    "a list": ("[]", "x.json has no list images"),
    "cut off": ('{"images": [],\n "annotations": [', "x.json:2: not JSON: "),
    "not UTF-8": (b'{"images": "\xe9"}', "x.json is not UTF-8"),
    "image without name": (changed(images=[{"id": 1}]), "images[0].file_name is missing"),
    "image without id": (changed(images=[{"file_name": "a.jpg"}]), "images[0].id is missing"),
    "image of another type": (changed(images=[5]), "images[0] is not an object"),
    "zero byte": (changed(images=[{"id": 1, "file_name": "a\0/b.jpg"}]), "images[0].file_name is not valid"),
    "half a letter": (changed(images=[{"id": 1, "file_name": "\ud800/b.jpg"}]), "images[0].file_name is not valid"),
    "repeated image": (changed(images=[{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]),
                       "images[1].id 1 is there twice"),
    "repeated category": (changed(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
                          "categories[1].id 1 is there twice"),
    "category without name": (changed(categories=[{"id": 1, "name": ""}]), "categories[0].name is not valid"),
    "category id": (changed(categories=[{"id": "1", "name": "a"}]), "categories[0].id is not valid"),
    "two ids of a name": (changed(categories=[{"id": 1, "name": "a"}, {"id": 5, "name": "a"}]),
                          "the categories 1 and 5 are both called a"),
    "unknown image": (changed(annotations=[{"image_id": 9, "category_id": 1}]),
                      "annotations[0].image_id 9 is no image"),
    "unknown category": (changed(annotations=[{"image_id": 1, "category_id": 1}, {"image_id": 1, "category_id": 9}]),
                         "annotations[1].category_id 9 is no category"),
    "list as id": (changed(annotations=[{"image_id": [1], "category_id": 1}]), "annotations[0].image_id is not valid"),
    "no annotation": (changed(annotations=[]), "no image has an annotation"),
}


@pytest.mark.parametrize("name", WRONG_JSON)
def test_what_is_wrong_with_coco(tmp_path, capsys, name):
    content, message = WRONG_JSON[name]
    write(tmp_path, {"a.jpg": "", "b.jpg": "", "x.json": content})
    assert message in refused(capsys, dataset.main, tmp_path, "--labels", tmp_path / "x.json")


def test_the_unused_category_that_roboflow_adds_may_have_the_name_of_a_class(tmp_path):
    content = coco({1: "a.jpg", 2: "b.jpg"}, [(1, 1, 0)], [(0, "cat"), (1, "cat")])
    write(tmp_path, {"a.jpg": "", "b.jpg": "", "_annotations.coco.json": content})
    assert rows(tmp_path) == {"a.jpg": [1], "b.jpg": [0]}


def test_polygons_are_not_kept(tmp_path, monkeypatch):
    content = coco({1: "a.jpg"}, [(1, 1, 0)])
    content["annotations"][0]["segmentation"] = {"counts": [1, 2], "size": [3, 4]}
    content["images"][0]["flickr_url"] = "x"
    path = write(tmp_path, {"x.json": content}) / "x.json"
    assert dataset._read_coco_file(path) == {
        "images": [{"id": 1, "file_name": "a.jpg"}], "categories": content["categories"],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 1, "iscrowd": 0}]}


DAMAGED = {
    "yolo": ({"images/a.jpg": "", "data.yaml": "names: [cat, 'dog', cow]\ntrain: images\nval: images\nnc: 3\n",
              "labels/a.txt": f"0 {BOX}\n2 0.1 0.2 0.3 0.4 0.5\n"}, ("labels/a.txt", "data.yaml")),
    "yaml": ({"images/a.jpg": "",
              "data.yaml": "names:\n  0: cat\n  1: \"dog\"\npath: x\ntrain:\n - images\n - y # no\n",
              "labels/a.txt": f"0 {BOX}\n"}, ("data.yaml",)),
    "voc": ({"images/a.jpg": "", "Annotations/a.xml": voc(("cat", 0), ("dog", 1)), "ImageSets/Main/train.txt": "a\n",
             "ImageSets/Main/val.txt": "b\n"}, ("Annotations/a.xml", "ImageSets/Main/train.txt")),
    "coco": ({"images/a.jpg": "", "instances_x.json": coco({1: "a.jpg"}, [(1, 1, 0), (1, 5, 1)])},
             ("instances_x.json",)),
}
PIECES = [b"", b"\n", b"\r\n", b" ", b"\0", b"\xff", b"\xef\xbb\xbf", b"'", b'"', b"[", b"]", b"{", b"}", b":", b"#",
          b"-", b"- ", b"<", b">", b"&", b"/>", b"<object>", b"<!DOCTYPE a>", b"1", b"-1", b"1e999", b"nan", b"null",
          b"true", b"..", b"../", b"\\", b",", b"0: x", b"names:", b"val: ", b"\t", b"|", b"\xc3\xa9"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(DAMAGED)), st.data())
def test_a_damaged_file_is_a_table_or_one_line_that_says_what_is_wrong(tmp_path_factory, kind, data):
    files, damaged = DAMAGED[kind]
    folder = write(tmp_path_factory.mktemp("damaged"), files)
    path = folder / data.draw(st.sampled_from(damaged))
    content = path.read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 12)))
        content = content[:start] + data.draw(st.sampled_from(PIECES)) + content[end:]
    path.write_bytes(content)

    try:
        table = dataset.read_labels(folder)
    except InputError as error:
        event("error")
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        event("table")
        assert table.targets.shape == (len(table.paths), len(table.classes)) and len(table) == 1
        assert np.isin(table.targets[~np.isnan(table.targets)], (0, 1)).all()
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are read, and all that follows from the labels


def test_no_output_replaces_a_file_that_yolo_was_read_from(tmp_path, trained, capsys):
    folder = write_yolo(tmp_path / "data", {"train.txt": "images/a.jpg\n", "val.txt": "images/b.jpg\n"},
                        "train: train.txt\nval: val.txt\nnames: [bolt, bracket, ring, rust, crack, hole]\n")
    names = ["data.yaml", "train.txt", "val.txt", "labels/a.txt", "labels/b.txt"]
    table = dataset.read_labels(folder)
    assert sorted(table.sources) == sorted(folder / name for name in names)
    for name in names:
        before = (folder / name).read_bytes()
        error = refused(capsys, inference.main, "--model", trained[0] / "model.pth", "--evaluate", folder,
                        "--out", folder / name, warns=True)
        assert "would replace a file that is read" in error and (folder / name).read_bytes() == before


def test_a_run_does_not_replace_lists_that_it_reads(tmp_path, capsys):
    folder = write_yolo(tmp_path, {"out/history.csv": "images/a.jpg\n"},
                        "train: images\nval: out/history.csv\nnames: [cat, dog, cow]\n")
    code, _, errors = as_command(capsys, train.main, "--data", folder, "--out", folder / "out", "--drop-overlap",
                                 "--weights", "none")
    assert code == 2 and "history.csv, which the run reads, lies in --out" in errors.splitlines()[-1]


@pytest.mark.parametrize("kind", ["yolo", "voc", "coco"])
def test_all_labels_are_written_as_one_table_with_answers_merged_in(tmp_path, kind):
    pictures = dict.fromkeys(("train/images/a.jpg", "valid/images/a.jpg"), "")
    folder = write(tmp_path / kind, pictures | {
        "yolo": {"classes.txt": "cat\ndog\n", "train/labels/a.txt": f"0 {BOX}", "valid/labels/a.txt": f"1 {BOX}"},
        "voc": {"train/images/a.xml": voc(("cat", 0), ("dog", 1)), "valid/images/a.xml": voc(("dog", 0))},
        "coco": {"train/_annotations.coco.json": coco({1: "images/a.jpg"}, [(1, 1, 0), (1, 5, 1)]),
                 "valid/_annotations.coco.json": coco({1: "images/a.jpg"}, [(1, 5, 0)])}}[kind])
    table = dataset.read_labels(folder)
    assert table.parts == ["train", "val"] and table.classes == ["cat", "dog"]

    given = "NA" if math.isnan(table.targets[0, 1]) else "0"
    answers = tmp_path / "answers.csv"
    answers.write_text(f"ID,label,given,probability,answer\n{table.ids[0]},dog,{given},,1\n")
    dataset.main([str(folder), "--answers", str(answers), "--out", str(tmp_path / "new.csv")])
    again = dataset.read_labels(folder, labels=tmp_path / "new.csv")
    assert again.paths == table.paths and again.parts == table.parts
    assert again.targets.tolist() == [[1, 1], [0, 1]]


def test_a_column_cannot_be_named_in_data_without_columns(tmp_path, capsys):
    folder = write_yolo(tmp_path)
    (folder / "part").write_text("a.jpg")
    for option in ("--group", "--split-column", "--image-column", "--image-list", "--ignore", "--separator",
                   "--positive", "--negative", "--unknown"):
        assert f"{option} part: {folder} has no label file with columns" in refused(
            capsys, dataset.main, folder, option, "part")
    assert "--label-threshold 0.0: " in refused(capsys, dataset.main, folder, "--label-threshold", "0")
    assert len(dataset.read_labels(write_divided(tmp_path / "divided", ""), split_column="folder").parts) == 6
