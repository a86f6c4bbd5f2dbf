"""Answers to questions about single labels: they are merged into the labels, and splits stay as they were."""

import csv
import math

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_layouts import LAYOUTS, READ, READ_OPTIONS, folder_of, write_layout

import dataset
import inference
import train
from conftest import SMALL, draw_images, files_of, known_rows, read_json, read_rows, refused
from dataset import InputError

NA = None
HEADER = "ID,label,given,probability,answer"
LABELS = "image,rust,dent\na.jpg,1,0\nb.jpg,0,NA\nsub/c.jpg,NA,1\n"


@pytest.fixture
def folder(tmp_path):
    """Return a data folder with the rows of LABELS, and the images new.jpg and sub/d.jpg without a row."""
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg", "sub/c.jpg", "new.jpg", "sub/d.jpg"])
    (tmp_path / "labels.csv").write_text(LABELS)
    return tmp_path


def write_answers(folder, *lines, name="answers.csv"):
    """Write lines such as "a.jpg,rust,1,0" (the ID, the label, given and answer), and return the path."""
    rows = [line.rsplit(",", 3) for line in lines]
    text = [HEADER, *(f"{image},{label},{given},0.5000,{answer}" for image, label, given, answer in rows)]
    (folder / name).write_text("\n".join(text) + "\n")
    return folder / name


def error_of(folder, *lines, **how):
    """Return the error of reading a folder with these answers; it names the line and what to do."""
    path = write_answers(folder, *lines)
    with pytest.raises(InputError) as error:
        dataset.read_labels(folder, answers=path, **how)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}:")
    return str(error.value).removeprefix(f"{path}:")


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def test_answers_confirm_change_fill_in_and_set_to_unknown(folder):
    path = write_answers(folder, "a.jpg,rust,1,1", "a.jpg,dent,0,1", "b.jpg,dent,NA,0", "sub/c.jpg,dent,1,NA",
                         "sub/c.jpg,rust,NA,", "b.jpg,rust,0,")
    table = dataset.read_labels(folder, answers=path)
    assert known_rows(table) == {"a.jpg": [1, 1], "b.jpg": [0, 0], "sub/c.jpg": [NA, NA]}
    assert f"answers: {path}: 1 confirmed, 1 changed, 1 filled in, 1 set to unknown" in table.notes
    assert "1 confirmed" in dataset.summary(table)


def test_the_targets_before_the_answers_are_kept(folder):
    path = write_answers(folder, "a.jpg,dent,0,1", "new.jpg,dent,NA,1")
    table = dataset.read_labels(folder, answers=[path])
    before = dataset.read_labels(folder)
    assert before.before is None and before.added == []
    np.testing.assert_array_equal(table.before[:3], before.targets)
    assert np.isnan(table.before[3]).all() and table.added == [False, False, False, True]
    chosen = table.subset([3, 0])
    assert chosen.added == [True, False]
    np.testing.assert_array_equal(chosen.before, table.before[[3, 0]])


def test_an_answer_about_an_image_without_a_row_adds_one(folder):
    path = write_answers(folder, "sub/d.jpg,dent,NA,1", "new.jpg,rust,NA,NA", "sub/d.jpg,rust,NA,0")
    table = dataset.read_labels(folder, answers=path)
    assert list(known_rows(table).items())[3:] == [("sub/d.jpg", [0, 1]), ("new.jpg", [NA, NA])]
    assert table.origins[3:] == [f"{path}:2", f"{path}:3"]
    assert table.paths[3:] == [f"{folder}/images/sub/d.jpg", f"{folder}/images/new.jpg"]
    assert table.unlabelled == []
    assert table.notes[-1] == (f"answers: {path}: 1 confirmed, 0 changed, 2 filled in, 0 set to unknown; "
                               "2 rows added")


@pytest.mark.parametrize("name", ["c.jpg", "sub/c.jpg"])
def test_an_id_is_that_of_the_label_file_or_the_path_of_the_image(folder, name):
    (folder / "labels.csv").write_text(LABELS.replace("sub/c.jpg", "c.jpg"))
    table = dataset.read_labels(folder, answers=write_answers(folder, f"{name},rust,NA,1"))
    assert known_rows(table)["c.jpg"] == [1, 1] and len(table) == 3


def test_every_id_of_rows_that_were_merged_may_be_answered(folder):
    (folder / "labels.csv").write_text(LABELS + "images/a.jpg,NA,NA\n")
    table = dataset.read_labels(folder, answers=write_answers(folder, "images/a.jpg,rust,1,0"))
    assert known_rows(table)["a.jpg"] == [0, 0] and len(table) == 3


@pytest.mark.parametrize("lines, reason", [
    (["e.jpg,rust,NA,1"], "2: 'e.jpg' is neither an ID of the label file nor an image below"),
    (["gone.jpg,rust,NA,1"], "2: the image of gone.jpg is missing"),
    (["a.jpg,crack,NA,1"], "2: 'crack' is not a class (the classes are rust, dent)"),
    (["a.jpg,rust,0,NA"], "2: rust of a.jpg was 0 when the question was asked, but is 1 now"),
    (["b.jpg,rust,NA,1"], "2: rust of b.jpg was NA when the question was asked, but is 0 now"),
    (["new.jpg,rust,0,1"], "2: rust of new.jpg was 0 when the question was asked, but is NA now"),
    (["a.jpg,rust,1,0", "b.jpg,rust,0,1", "a.jpg,rust,1,1"], "4: rust of a.jpg is answered 1, but 0 at"),
    (["a.jpg,rust,1,NA", "a.jpg,rust,1,1"], "3: rust of a.jpg is answered 1, but NA at"),
    (["a.jpg,rust,1,2"], "2: '2' in the column answer"),
    (["a.jpg,rust,x,1"], "2: 'x' in the column given"),
])
def test_an_answer_that_cannot_be_merged_is_an_error_with_its_line(folder, lines, reason):
    (folder / "labels.csv").write_text(LABELS + "gone.jpg,1,1\n")
    message = error_of(folder, *lines)
    assert message.startswith(reason)
    assert any(remedy in message for remedy in ("remove the line", "remove one of the two", "write 1, 0 or NA"))


def test_answers_that_were_merged_into_the_label_file_already_are_told(folder):
    path = write_answers(folder, "a.jpg,rust,1,0", "b.jpg,dent,NA,1")
    write_table(folder, "--answers", path).replace(folder / "labels.csv")
    with pytest.raises(InputError, match=r"answers.csv:2: .* if this file was merged into the labels already"):
        dataset.read_labels(folder, answers=path)


def test_a_contradiction_names_both_lines_and_the_same_answer_twice_is_fine(folder):
    message = error_of(folder, "a.jpg,rust,1,0", "a.jpg,rust,1,1")
    assert message.startswith("3:") and f"{folder / 'answers.csv'}:2" in message
    path = write_answers(folder, "a.jpg,rust,1,0", "a.jpg,rust,1,0")
    table = dataset.read_labels(folder, answers=path)
    assert known_rows(table)["a.jpg"] == [0, 0] and "1 changed" in table.notes[-1]


def test_an_id_that_several_images_share_is_useless_but_their_paths_are_not(tmp_path):
    draw_images(tmp_path, ["train/1.jpg", "test/1.jpg", "test/2.jpg"])
    for part, rows in (("train", "1.jpg,1\n"), ("test", "1.jpg,0\n2.jpg,1\n")):
        (tmp_path / part / "labels.csv").write_text(f"image,rust\n{rows}")
    assert "test/1.jpg or train/1.jpg" in error_of(tmp_path, "1.jpg,rust,1,0")
    table = dataset.read_labels(tmp_path, answers=write_answers(tmp_path, "test/1.jpg,rust,0,1"))
    assert known_rows(table) == {"train/1.jpg": [1], "test/1.jpg": [1], "2.jpg": [1]}
    assert table.parts == ["train", "test", "test"]


def test_an_answer_about_a_row_that_drop_overlap_removed_is_an_error(tmp_path):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "images" / "d.jpg").write_bytes((tmp_path / "images" / "b.jpg").read_bytes())
    (tmp_path / "labels.csv").write_text("image,rust,split\na.jpg,1,train\nb.jpg,0,test\nc.jpg,0,val\nd.jpg,1,train\n")
    assert "--drop-overlap removed" in error_of(tmp_path, "d.jpg,rust,1,0", drop_overlap=True)


# ---------------------------------------------------------------------------------------------------------------------
# Several files


def test_a_later_file_may_change_an_answer_that_it_knows_of(folder):
    first = write_answers(folder, "a.jpg,rust,1,0", "b.jpg,dent,NA,1", name="first.csv")
    second = write_answers(folder, "a.jpg,rust,0,1", "b.jpg,dent,1,NA", name="second.csv")
    table = dataset.read_labels(folder, answers=[first, second])
    assert known_rows(table) == known_rows(dataset.read_labels(folder))
    assert table.notes[-2:] == [f"answers: {first}: 0 confirmed, 1 changed, 1 filled in, 0 set to unknown",
                                f"answers: {second}: 0 confirmed, 1 changed, 0 filled in, 1 set to unknown"]
    with pytest.raises(InputError, match=r"second.csv:2: rust of a.jpg was 0 when the question was asked, but is 1"):
        dataset.read_labels(folder, answers=[second, first])


@pytest.mark.parametrize("answer, fits", [("0", True), ("1", False), ("NA", False)])
def test_a_later_file_that_does_not_know_of_an_answer_must_agree_with_it(folder, answer, fits):
    first = write_answers(folder, "a.jpg,rust,1,0", name="first.csv")
    second = write_answers(folder, f"a.jpg,rust,1,{answer}", name="second.csv")
    if fits:
        assert known_rows(dataset.read_labels(folder, answers=[first, second]))["a.jpg"] == [0, 0]
    else:
        with pytest.raises(InputError, match=r"second.csv:2: .* 0 at .*first.csv:2: remove one"):
            dataset.read_labels(folder, answers=[first, second])


def test_a_later_file_that_may_not_know_of_a_confirmation_must_agree_with_it(folder):
    first = write_answers(folder, "a.jpg,rust,1,1", name="first.csv")
    second = write_answers(folder, "a.jpg,rust,1,0", name="second.csv")
    with pytest.raises(InputError, match=r"second.csv:2: .* answered 0, but 1 at .*first.csv:2: remove one"):
        dataset.read_labels(folder, answers=[first, second])


def test_files_share_the_rows_that_they_add(folder):
    first = write_answers(folder, "new.jpg,rust,NA,0", name="first.csv")
    second = write_answers(folder, "new.jpg,rust,0,1", "new.jpg,dent,NA,1", "sub/d.jpg,rust,NA,1", name="second.csv")
    table = dataset.read_labels(folder, answers=[first, second])
    assert list(known_rows(table).items())[3:] == [("new.jpg", [1, 1]), ("sub/d.jpg", [1, NA])]
    assert [note.endswith("; 1 row added") for note in table.notes[-2:]] == [True, True]


# ---------------------------------------------------------------------------------------------------------------------
# Splits


VALUES = st.sampled_from([1.0, 0.0, math.nan])


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Return a folder of 36 images: 24 of one kind, then 12 of which 6 are copies of the first six."""
    folder = tmp_path_factory.mktemp("album")
    draw_images(folder, [f"{i:02}.png" for i in range(36)])
    for i in range(6):
        (folder / f"{24 + i}.png").write_bytes((folder / f"{i:02}.png").read_bytes())
    (folder / "21.png").write_bytes((folder / "20.png").read_bytes())
    return folder


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_splits_and_folds_are_those_without_answers(album, tmp_path_factory, data):
    draw = data.draw
    folder = tmp_path_factory.mktemp("data")
    targets = draw(st.lists(st.tuples(VALUES, VALUES), min_size=24, max_size=24))
    objects = draw(st.booleans())
    own = draw(st.sampled_from([(), ("train", "val", "test"), ("train", "test"), ("train", "test", "")]))
    rows = [["ID", "x", "y", *(["who"] if objects else []), *(["split"] if own else [])]]
    for i, labels in enumerate(targets):
        same = {21: 20}.get(i, i)  # copies are in one part
        part = [own[same % len(own)]] if own else []
        who = [str(same if own else i % 9)] if objects else []
        rows.append([f"{i:02}.png", *map(dataset.to_cell, labels), *who, *part])
    rows[1][1:3], rows[2][1:3] = ["1", "0"], ["0", "1"]
    dataset.write_csv(folder / "labels.csv", rows)

    how = {"images": album, "group": "who" if objects else None}
    before = dataset.read_labels(folder, **how)
    asked = draw(st.lists(st.tuples(st.integers(0, 35), st.integers(0, 1)), unique=True, max_size=30))
    lines = []
    for i, c in asked:
        given = dataset.to_cell(before.targets[i, c] if i < 24 else math.nan)
        lines.append(f"{i:02}.png,{'xy'[c]},{given},{draw(st.sampled_from(['1', '0', 'NA']))}")
    after = dataset.read_labels(folder, answers=write_answers(folder, *lines), **how)
    added = {f"{album}/{i}.png" for i, _ in asked if i >= 24}
    assert set(after.paths[24:]) == added and len(after) == 24 + len(added)

    method = draw(st.sampled_from(["stratified", "random"]))
    settings = {"method": method, "seed": draw(st.integers(0, 3))}
    folds, new_folds = (dict(zip(table.paths, dataset.divide(table, [1] * 3, **settings)))
                        for table in (before, after))
    splits, new_splits = {}, {}
    for table, parts in ((before, splits), (after, new_splits)):
        for part, chosen in zip(dataset.PARTS, dataset.split(table, **settings)):
            parts |= dict.fromkeys([table.paths[row] for row in chosen], part)
            assert list(chosen) == sorted(chosen)
    for old, new, elsewhere in ((folds, new_folds, -1), (splits, new_splits, "train")):
        assert len(new) == len(after)
        for path, part in new.items():
            number = int(path[-6:-4])
            original = f"{album}/{number - 24:02}.png" if 24 <= number < 30 else path
            assert part == old.get(original, elsewhere)


def test_an_added_row_is_in_the_part_that_its_folder_names(tmp_path):
    draw_images(tmp_path / "images", ["1.jpg", "2.jpg", "3.jpg", "test/4.jpg", "val/5.jpg", "6.jpg", "test/7.jpg"])
    (tmp_path / "images/test/7.jpg").write_bytes((tmp_path / "images/1.jpg").read_bytes())
    (tmp_path / "labels.csv").write_text("ID,rust,split\n1.jpg,1,train\n2.jpg,0,val\n3.jpg,1,test\n")
    names = ["test/4.jpg", "val/5.jpg", "6.jpg", "test/7.jpg"]
    table = dataset.read_labels(tmp_path, answers=write_answers(tmp_path, *(f"{name},rust,NA,1" for name in names)))
    assert table.parts == ["train", "val", "test", "test", "val", "train", "train"]
    assert [rows.tolist() for rows in dataset.split(table)] == [[0, 5, 6], [1, 4], [2, 3]]


def test_an_added_copy_in_the_folder_of_another_part_follows_the_row(tmp_path):
    draw_images(tmp_path / "images", ["train/1.jpg", "val/2.jpg", "test/3.jpg", "test/4.jpg"])
    (tmp_path / "images/test/4.jpg").write_bytes((tmp_path / "images/train/1.jpg").read_bytes())
    (tmp_path / "labels.csv").write_text("ID,rust\ntrain/1.jpg,1\nval/2.jpg,0\ntest/3.jpg,1\n")
    path = write_answers(tmp_path, "test/4.jpg,rust,NA,1")
    table = dataset.read_labels(tmp_path, answers=path, split_column="folder")
    assert table.parts == ["train", "val", "test", "train"]


def test_added_rows_of_one_image_stay_together(tmp_path):
    draw_images(tmp_path / "images", ["1.jpg", "2.jpg", "3.jpg", "a/4.jpg", "test/5.jpg"])
    (tmp_path / "images/test/5.jpg").write_bytes((tmp_path / "images/a/4.jpg").read_bytes())
    (tmp_path / "labels.csv").write_text("ID,rust,split\n1.jpg,1,train\n2.jpg,0,val\n3.jpg,1,test\n")
    table = dataset.read_labels(tmp_path, answers=write_answers(tmp_path, "test/5.jpg,rust,NA,1", "a/4.jpg,rust,NA,0"))
    assert table.parts[3:] == ["test", "test"]
    assert any("1 pairs of identical images disagree" in warning for warning in table.warnings)


def test_answers_that_settle_a_disagreement_of_copies_leave_no_warning(folder):
    (folder / "images/b.jpg").write_bytes((folder / "images/a.jpg").read_bytes())
    assert any("disagree" in warning for warning in dataset.read_labels(folder).warnings)
    table = dataset.read_labels(folder, answers=write_answers(folder, "b.jpg,rust,0,1"))
    assert not any("disagree" in warning for warning in table.warnings)


def test_unanswered_questions_change_nothing_but_are_a_warning(folder):
    for path in (write_answers(folder, "a.jpg,rust,1,", "what,ever,NA,"), write_answers(folder, name="empty.csv")):
        table, without = dataset.read_labels(folder, answers=path), dataset.read_labels(folder)
        assert (known_rows(table), table.before, table.added) == (known_rows(without), None, [])
        assert table.notes[:-1] == without.notes
        assert table.warnings == [*without.warnings, f"{path} holds no answers: is the column answer empty?"]


# ---------------------------------------------------------------------------------------------------------------------
# Without a label file, and beside one


def test_without_a_label_file_the_answers_are_the_labels(folder):
    (folder / "labels.csv").unlink()
    path = write_answers(folder, "b.jpg,split,NA,1", "a.jpg,rust,NA,0", "b.jpg,rust,NA,1")
    table = dataset.read_labels(folder, answers=path)
    assert table.classes == ["split", "rust"]
    assert known_rows(table) == {"b.jpg": [1, 1], "a.jpg": [NA, 0]}
    assert table.origins == [f"{path}:2", f"{path}:3"]
    assert (table.before, table.added) == (None, [])
    assert table.unlabelled == ["new.jpg", "sub/c.jpg", "sub/d.jpg"]
    assert any("no label file" in note for note in table.notes) and dataset.summary(table)


def test_without_a_label_file_rows_are_divided_as_usual(album, tmp_path):
    path = write_answers(tmp_path, *(f"{i}.png,x,NA,{i % 2}" for i in range(10, 34)))
    table = dataset.read_labels(tmp_path, images=album, answers=path)
    parts = dataset.split(table)
    assert sorted(np.concatenate(parts)) == list(range(24)) and min(map(len, parts)) > 1


def test_a_folder_without_a_label_file_can_be_read_for_given_classes(folder):
    (folder / "labels.csv").unlink()
    (folder / "classes.txt").write_text("unused\n")
    table = dataset.read_labels(folder, classes=["rust", "dent"])
    assert (len(table), table.classes, table.targets.shape) == (0, ["rust", "dent"], (0, 2))
    assert len(table.unlabelled) == 5 and table.root == f"{folder}/images"
    assert dataset.summary(table).startswith("data: 0 rows")
    path = write_answers(folder, "a.jpg,crack,NA,1")
    table = dataset.read_labels(folder, classes=["rust", "dent"], answers=path)
    assert table.classes == ["rust", "dent", "crack"] and known_rows(table) == {"a.jpg": [NA, NA, 1]}


def test_classes_are_those_of_the_label_file_if_there_is_one(folder):
    assert dataset.read_labels(folder, classes=["crack"]).classes == ["rust", "dent"]


def test_a_folder_without_a_label_file_needs_answers(folder):
    (folder / "labels.csv").unlink()
    path = write_answers(folder, "a.jpg,rust,NA,")
    for answers in ((), path):
        with pytest.raises(InputError, match=r"no .txt, .csv or .tsv file: .*--labels FILE.*--answers"):
            dataset.read_labels(folder, answers=answers)
    write_answers(folder, "a.jpg,rust,NA,1")
    (folder / "one.csv").write_text(LABELS)
    (folder / "two.csv").write_text(LABELS)
    with pytest.raises(InputError, match=r"one.csv, two.csv: name the label file with --labels"):
        dataset.read_labels(folder, answers=path)
    (folder / "one.csv").unlink()
    (folder / "two.csv").unlink()
    with pytest.raises(InputError, match=r"--group who: .* no label file"):
        dataset.read_labels(folder, answers=path, group="who")


@pytest.mark.parametrize("name", ["labels.txt", "labels.csv", "train.csv", "train/x.csv", "questions.csv"])
def test_questions_are_never_taken_for_a_label_file(tmp_path, name):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    for other in ("train.csv", "test.csv"):
        (tmp_path / other).write_text("image,rust\n" + ("a.jpg,1\n" if other == "train.csv" else "b.jpg,0\n"))
    (tmp_path / "train").mkdir()
    if name == "train.csv":
        (tmp_path / "train.csv").rename(tmp_path / "train" / "labels.csv")
    expected = known_rows(dataset.read_labels(tmp_path))
    write_answers(tmp_path, "a.jpg,rust,1,0", name=name)
    assert known_rows(dataset.read_labels(tmp_path)) == expected


def test_answers_given_as_labels_are_an_error_that_names_the_option(folder):
    path = write_answers(folder, "a.jpg,rust,1,0")
    with pytest.raises(InputError, match=r"--labels answers.csv holds answers.*--answers answers.csv"):
        dataset.read_labels(folder, labels="answers.csv")
    with pytest.raises(InputError, match=r"labels.csv has no column"):
        dataset.read_labels(folder, answers="labels.csv")
    assert known_rows(dataset.read_labels(folder, answers="answers.csv"))["a.jpg"] == [0, 0]
    assert path.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What spreadsheets and other programs make of the file


SPREADSHEETS = {
    "LibreOffice": "\ufeffID;label;given;probability;answer;;\r\n\"a.jpg\";\"rust\";1;0,1;0;;\r\n"
                   "b.jpg;dent;NA;0,5;1;;\r\nsub/c.jpg;dent;1;0,9;;;\r\n",
    "Excel": "\ufeffID,label,given,probability,answer\r\na.jpg,rust,1,0.1,0\r\nb.jpg,dent,NA,0.5,1\r\n"
             "sub/c.jpg,dent,1,0.9,\r\n,,,,\r\n",
    "pandas": "ID,label,given,probability,answer\na.jpg,rust,1.0,0.1,0.0\nb.jpg,dent,,0.5,1.0\n"
              "sub/c.jpg,dent,1.0,0.9,\n",
    "columns in another order": "answer,note,ID,label,given,probability\n0,why,a.jpg,rust,1,0.1\n1,,b.jpg,dent,NA,0.5\n"
                                ",,sub/c.jpg,dent,1,0.9\n",
    "cells missing at the end": "ID,label,given,probability,answer\na.jpg,rust,1,0.1,0\nb.jpg,dent,NA,0.5,1\n"
                                "sub/c.jpg,dent,1,0.9\n",
}


@pytest.mark.parametrize("program", SPREADSHEETS)
def test_answers_that_a_spreadsheet_saved_are_read(folder, program):
    (folder / "answers.csv").write_bytes(SPREADSHEETS[program].encode())
    table = dataset.read_labels(folder, answers=folder / "answers.csv")
    assert known_rows(table) == {"a.jpg": [0, 0], "b.jpg": [0, 1], "sub/c.jpg": [NA, 1]}
    assert dataset.find_labels(folder).files == {"": folder / "labels.csv"}


def test_ids_and_labels_with_any_letters_are_answered(tmp_path):
    names = ["a, b.jpg", 'the "best".jpg', " blank.jpg", "c.jpg", "Größe/é.jpg", "new\nline.jpg"]
    draw_images(tmp_path / "images", [*names, " c.jpg"])
    questions = [dataset.Question(name, "", 'rust, "deep"', math.nan, 0.5) for name in names]
    dataset.write_questions(tmp_path / "answers.csv", questions)
    with open(tmp_path / "answers.csv", newline="") as file:
        rows = [[*cells[:4], "1"] for cells in list(csv.reader(file))[1:]]
    dataset.write_csv(tmp_path / "answers.csv", [dataset.ANSWER_COLUMNS, *rows])
    table = dataset.read_labels(tmp_path, answers=tmp_path / "answers.csv")
    assert known_rows(table) == {name: [1] for name in names} and table.classes == ['rust, "deep"']


# ---------------------------------------------------------------------------------------------------------------------
# A table of all labels


def assert_same_labels(a, b):
    """Check that two LabelTables have the same images in the same order, with the same labels, objects and parts."""
    assert a.paths == b.paths and a.classes == b.classes
    np.testing.assert_array_equal(a.targets, b.targets)
    assert a.objects == b.objects
    assert (a.parts if any(a.parts) else []) == (b.parts if any(b.parts) else [])


def write_table(folder, *options, out="labels_new.csv"):
    """Run `dataset.py FOLDER --out FILE` and return the path of the file."""
    dataset.main([str(folder), "--out", str(folder / out), *map(str, options)])
    return folder / out


def written(capsys):
    """Return the last lines of the output, from the answers on."""
    lines = capsys.readouterr().out.splitlines()
    return lines[len(lines) - lines[::-1].index("") :]


def test_a_table_of_all_labels_is_written_with_the_answers(folder, capsys):
    (folder / "labels.csv").write_text(LABELS + "gone.jpg,1,1\n")
    path = write_answers(folder, "a.jpg,rust,1,0", "sub/d.jpg,dent,NA,1")
    out = write_table(folder, "--answers", path)
    assert out.read_text() == "ID,rust,dent\na.jpg,0,0\nb.jpg,0,NA\nsub/c.jpg,NA,1\nsub/d.jpg,NA,1\n"
    assert written(capsys) == [
        f"answers: {path}: 0 confirmed, 1 changed, 1 filled in, 0 set to unknown; 1 row added",
        "left out: 1 rows whose image is missing",
        f"training on {out} draws a new split: to compare with earlier runs, use --answers instead",
        f"written: {out}; next: python train.py --data {folder} --labels {out}"]
    assert_same_labels(dataset.read_labels(folder, labels=out), dataset.read_labels(folder, answers=path))
    assert sorted(file.name for file in folder.iterdir()) == ["answers.csv", "images", "labels.csv", "labels_new.csv"]
    assert known_rows(dataset.read_labels(folder)) == {"a.jpg": [1, 0], "b.jpg": [0, NA], "sub/c.jpg": [NA, 1]}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("place", ["", "tables/"])
def test_every_layout_is_written_as_a_table_that_reads_the_same(tmp_path, monkeypatch, name, place):
    layout = LAYOUTS[name]
    write_layout(tmp_path, layout)
    monkeypatch.chdir(tmp_path)
    table = dataset.read_labels(tmp_path, **layout.options)
    options = [f"--{option.replace('_', '-')}={value}" for option, value in layout.options.items()]
    out = write_table(tmp_path, *options, out=f"{place}labels_new.csv")
    groups = {"label_groups": layout.options["label_groups"]} if "label_groups" in layout.options else {}
    again = dataset.read_labels(tmp_path, labels=out, **groups)
    assert_same_labels(again, table)


@pytest.mark.parametrize("case", READ)
def test_every_kind_of_cells_is_written_as_a_table_that_reads_the_same(tmp_path, case):
    folder_of(tmp_path, READ[case][0])
    options = [f"--{name}={value}" for name, value in READ_OPTIONS.get(case, {}).items()]
    table = dataset.read_labels(tmp_path, **READ_OPTIONS.get(case, {}))
    assert_same_labels(dataset.read_labels(tmp_path, labels=write_table(tmp_path, *options)), table)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_a_table_with_objects_and_a_split_reads_the_same(tmp_path_factory, data):
    draw = data.draw
    folder = tmp_path_factory.mktemp("table")
    images = ["a.jpg", "b c.jpg", "sub/a.jpg", "sub/é, f.png", "7.png"]
    draw_images(folder / "images", images)
    titles = st.sampled_from(["rust", "deep, dent", "split", "10", "is_valid", "ID", "fold", "label", "Größe", 'a "b"'])
    classes = draw(st.lists(titles, min_size=1, max_size=3, unique=True))
    rows = [["image", "who", "set", *classes]]
    for number, image in enumerate(images):
        part = dataset.PARTS[number % 3] if number < 3 else draw(st.sampled_from([*dataset.PARTS, ""]))
        who = draw(st.sampled_from(["", "p1", "7"])) if part == "train" else ""
        rows.append([image, who, part, *(draw(st.sampled_from(["1", "0", "NA"])) for _ in classes)])
    dataset.write_csv(folder / "labels.csv", rows)
    how = draw(st.sampled_from([{"group": "who"}, {}]))
    ignored = [name for name in ("who", "set") if name not in how.values() and draw(st.booleans())]
    try:
        table = dataset.read_labels(folder, ignore=ignored, **how)
    except InputError:
        return  # such as a class is_valid beside the split
    out = folder / "new.csv"
    try:
        dataset.main([str(folder), "--out", str(out), *(["--group", "who"] if how else []),
                      *(f"--ignore={name}" for name in ignored)])
    except InputError as error:
        event("refused")
        assert "--out" in str(error) and "\n" not in str(error) and not out.exists()
        return
    event("written")
    assert sorted(path.name for path in folder.iterdir()) == ["images", "labels.csv", "new.csv"]
    unknown = {} if (table.targets == 0).any() else {"unknown": "NA"}
    assert_same_labels(dataset.read_labels(folder, labels=out, **how, **unknown), table)


@pytest.mark.parametrize("labels, classes", [
    ("is_valid;rust", ["is_valid"]), ("ID;rust", ["ID"]), ("image_id;rust", ["image_id"]), ("rust;Rust ", []),
    ("split;rust", []), ("name;rust", []), ("1;0;2", []), ("fold;date", []), ("confidence;label", []),
])
def test_a_class_that_a_table_cannot_hold_is_an_error(tmp_path, capsys, labels, classes):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    path = write_answers(tmp_path, *(f"{image},{label},NA,{value}" for label in labels.split(";")
                                     for image, value in (("a.jpg", 1), ("b.jpg", 0))))
    table = dataset.read_labels(tmp_path, answers=path)
    out = tmp_path / "new.csv"
    if classes:
        error = refused(capsys, dataset.main, tmp_path, "--answers", path, "--out", out)
        assert error.startswith(f"error: --out {out} would not be read as the same labels: ")
        assert classes[0] in error and sorted(files_of(tmp_path)) == ["answers.csv", "images/a.jpg", "images/b.jpg"]
    else:
        dataset.main([str(tmp_path), "--answers", str(path), "--out", str(out)])
        assert_same_labels(dataset.read_labels(tmp_path, labels=out), table)


def test_a_table_of_nothing_but_present_labels_says_what_na_means(tmp_path, capsys):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    path = write_answers(tmp_path, "a.jpg,rust,NA,1", "b.jpg,dent,NA,1")
    table = dataset.read_labels(tmp_path, answers=path)
    out = write_table(tmp_path, "--answers", path)
    assert written(capsys)[-1].endswith(f"--labels {out} --unknown NA")
    assert_same_labels(dataset.read_labels(tmp_path, labels=out, unknown="NA"), table)


def test_columns_of_objects_and_parts_are_kept_and_the_command_names_the_options(tmp_path, capsys):
    draw_images(tmp_path / "photos", ["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
    (tmp_path / "labels.txt").write_text("image who rust subset\n1.jpg p1 1 train\n2.jpg p2 0 valid\n3.jpg NA 1 test\n")
    how = ["--images", tmp_path / "photos", "--group", "who"]
    out = write_table(tmp_path, *how, "--answers", write_answers(tmp_path, "4.jpg,rust,NA,0"))
    assert out.read_text() == "ID,who,split,rust\n1.jpg,p1,train,1\n2.jpg,p2,val,0\n3.jpg,,test,1\n4.jpg,,train,0\n"
    assert written(capsys)[1:] == [f"written: {out}; next: python train.py --data {tmp_path} --labels {out} "
                                   f"--images {tmp_path / 'photos'} --group who"]


def test_groups_that_a_table_cannot_hold_are_told(tmp_path, capsys):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    (tmp_path / "labels.csv").write_text("ID,components,defects\na.jpg,bolt;nut,rust\nb.jpg,nut,dent\n")
    out = write_table(tmp_path)
    groups = '{"components": ["bolt", "nut"], "defects": ["dent", "rust"]}'
    assert written(capsys)[0] == (f"warning: the groups components, defects are not in {out}: to keep them, save "
                                  f"this as {tmp_path / 'label_groups.json'}: {groups}")
    (tmp_path / "label_groups.json").write_text(groups)
    assert dataset.read_labels(tmp_path, labels=out).groups == dataset.read_labels(tmp_path).groups
    write_table(tmp_path)
    assert not any("warning" in line for line in written(capsys))


def test_a_folder_of_cls_files_becomes_a_table(tmp_path):
    draw_images(tmp_path / "images", ["train/a.jpg", "train/b.jpg", "val/a.jpg"])
    for name, text in (("train/a", "0\n"), ("val/a", "1\n0\n")):
        (tmp_path / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "labels" / f"{name}.cls").write_text(text)
    (tmp_path / "classes.txt").write_text("rust\ndent\n")
    path = write_answers(tmp_path, "train/b.jpg,dent,NA,1", "val/a,rust,1,0", "train/a.jpg,dent,0,1")
    out = write_table(tmp_path, "--answers", path)
    assert out.read_text() == "ID,rust,dent\ntrain/a,1,1\nval/a,0,1\ntrain/b.jpg,NA,1\n"


def test_a_name_that_no_text_file_can_hold_is_an_error(tmp_path, capsys):
    images = ["a.jpg", b"\xff.jpg".decode("utf-8", "surrogateescape")]
    draw_images(tmp_path / "images", images)
    (tmp_path / "labels").mkdir()
    for name in images:
        (tmp_path / "labels" / name).with_suffix(".cls").write_text("0\n")
    error = refused(capsys, dataset.main, tmp_path, "--out", tmp_path / "new.csv")
    assert f"--out {tmp_path / 'new.csv'} would not be read" in error and "new.csv:3: byte 0xff" in error
    assert not (tmp_path / "new.csv").exists()


def test_a_table_replaces_no_file_that_is_read_or_holds_answers(folder, capsys):
    answers = write_answers(folder, "a.jpg,rust,1,0")
    (folder / "gone.csv").write_text("image,rust\ngone.jpg,1\n")
    (folder / "link.csv").symlink_to(folder / "labels.csv")
    other = write_answers(folder, "a.jpg,rust,1,NA", name="other.csv")
    before = files_of(folder)
    for name, options, reason in (
            ("labels.csv", [], "is read"), ("link.csv", [], "is read"), ("images", [], ".csv"),
            ("answers.csv", ["--answers", "answers.csv"], "is read"), ("labels.txt", [], "ends in .csv"),
            ("other.csv", ["--answers", answers], "holds answers"),
            ("gone.csv", ["--labels", folder / "gone.csv"], "none of its 1 images")):
        assert reason in refused(capsys, dataset.main, folder, "--out", folder / name, *options)
    assert files_of(folder) == before and other.exists()


def test_a_label_file_whose_images_are_all_missing_is_not_replaced(tmp_path, capsys):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    (tmp_path / "train.csv").write_text("image,rust\na.jpg,1\nb.jpg,0\n")
    (tmp_path / "test.csv").write_text("image,rust\ngone.jpg,1\n")
    assert "is read" in refused(capsys, dataset.main, tmp_path, "--out", tmp_path / "test.csv")


def test_an_older_table_is_replaced_and_a_failure_leaves_it(folder, monkeypatch):
    out = write_table(folder)
    again = write_table(folder, "--answers", write_answers(folder, "a.jpg,rust,1,0"))
    assert again.read_text().splitlines()[1] == "a.jpg,0,0"
    monkeypatch.setattr(dataset, "_misreading", lambda *_: "something is wrong")
    with pytest.raises(InputError, match=r"--out .* something is wrong"):
        write_table(folder)
    assert out.read_text().splitlines()[1] == "a.jpg,0,0"


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation


RUN = ["--epochs", "1", "--lr", "3e-3", *SMALL]


@pytest.fixture
def extended(few_images):
    """Return the data folder few_images with two more images, and answers about them and about two rows."""
    draw_images(few_images / "images", ["new1.png", "new2.png"])
    answers = write_answers(few_images, "new1.png,red,NA,1", "new2.png,tall,NA,0", "00.png,red,0,1", "05.png,tall,0,1")
    return few_images, answers


def splits_of(out):
    """Return {split: {ID: its labels}} by the files of a run."""
    return {name: {row.pop("ID"): [*row.values()] for row in read_rows(out / f"{name}_metadata.csv")}
            for name in dataset.PARTS if (out / f"{name}_metadata.csv").exists()}


def test_training_with_answers_divides_as_without_and_trains_on_new_rows(extended, tmp_path):
    data, answers = extended
    train.main(["--data", str(data), "--out", str(tmp_path / "a"), *RUN])
    train.main(["--data", str(data), "--out", str(tmp_path / "b"), *RUN, "--answers", str(answers)])
    before, after = splits_of(tmp_path / "a"), splits_of(tmp_path / "b")
    assert {**before["train"], "new1.png": 0, "new2.png": 0}.keys() == after["train"].keys()
    assert before["val"].keys() == after["val"].keys() and before["test"].keys() == after["test"].keys()
    labels = after["train"] | after["val"] | after["test"]
    assert (labels["00.png"], labels["05.png"]) == (["1", "0"], ["1", "1"])
    assert (labels["new1.png"], labels["new2.png"]) == (["1", "NA"], ["NA", "0"])
    assert read_json(tmp_path / "b" / "config.json")["answers"] == [str(answers)]


def test_folds_train_on_new_rows_and_report_the_same_images(extended, tmp_path):
    data, answers = extended
    folds = ["--folds", "2", "--split", "0.7", "0.15", "0.15"]
    train.main(["--data", str(data), "--out", str(tmp_path / "a"), *RUN, *folds])
    report = train.main(["--data", str(data), "--out", str(tmp_path / "b"), *RUN, *folds, "--answers", str(answers)])
    ids = [[row["ID"] for row in read_rows(tmp_path / run / "predictions.csv")] for run in "ab"]
    assert ids[0] == ids[1] and report["images"] == len(ids[0])
    for fold in ("fold_1", "fold_2"):
        before, after = splits_of(tmp_path / "a" / fold), splits_of(tmp_path / "b" / fold)
        assert after["train"].keys() == {*before["train"], "new1.png", "new2.png"}
        assert after["val"].keys() == before["val"].keys()


@pytest.mark.parametrize("lines, other", [
    (["00.png,red,0,1"], "new1.png,red,NA,1"), (["new1.png,red,NA,1"], "new1.png,red,NA,0"),
])
def test_resume_knows_that_answers_changed(extended, tmp_path, capsys, lines, other):
    data, _ = extended
    answers = write_answers(data, *lines)
    options = ["--data", data, "--out", tmp_path / "out", *RUN]
    train.main([*map(str, options), "--answers", str(answers)])
    for now, shown in (([], "none"), (["--answers", write_answers(data, other, name="b.csv")], data / "b.csv")):
        error = refused(capsys, train.main, *options, "--resume", *now, warns=True)
        last = tmp_path / "out" / "last.pth"
        assert (f"--resume: the labels differ from those that {last} was trained with (--answers {answers} then, "
                f"{shown} now): give the same answers, leave out --resume, or name another --out") in error
    write_answers(data, other)
    error = refused(capsys, train.main, *options, "--resume", "--answers", answers, warns=True)
    assert "was trained with: give the same labels" in error
    error = refused(capsys, train.main, *options, "--resume", "--seed", "1", warns=True)
    assert "is of other splits" in error
    write_answers(data, *lines)
    train.main([*map(str, options), "--resume", "--epochs", "2", "--answers", str(answers)])


def test_a_run_of_an_older_version_is_resumed_without_a_word_about_answers(few_images, tmp_path, capsys):
    options = ["--data", str(few_images), "--out", str(tmp_path / "out"), *RUN]
    train.main(options)
    content = inference.read_checkpoint(tmp_path / "out" / "last.pth")
    del content["images"], content["options"]["answers"]
    inference.write_checkpoint(tmp_path / "out" / "last.pth", content)
    capsys.readouterr()
    train.main([*options, "--resume"])
    assert "answers" not in capsys.readouterr().err
    error = refused(capsys, train.main, *options, "--resume", "--seed", "1", warns=True)
    assert "is of other splits or labels" in error


def test_no_output_replaces_answers(extended, tmp_path, capsys, trained):
    data, answers = extended
    out = tmp_path / "out"
    out.mkdir()
    answers = answers.rename(out / "predictions.csv")
    error = refused(capsys, train.main, "--data", data, "--out", out, *RUN, "--answers", answers)
    assert f"{answers}, which the run reads, lies in --out" in error
    before = answers.read_bytes()
    error = refused(capsys, inference.main, "--model", trained[0] / "model.pth", "--evaluate", data, "--out", answers,
                    "--answers", answers, warns=True)
    assert "would replace a file that is read" in error and answers.read_bytes() == before
    error = refused(capsys, inference.main, data, "--answers", answers)
    assert "--answers goes with --evaluate, --calibrate or --ask" in error


def test_an_answer_about_a_test_row_corrects_its_label_and_leaves_it_there(tmp_path):
    draw_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "labels.csv").write_text("image,rust,split\na.jpg,1,train\nb.jpg,0,val\nc.jpg,0,test\n")
    table = dataset.read_labels(tmp_path, answers=write_answers(tmp_path, "c.jpg,rust,0,1"))
    assert table.parts == ["train", "val", "test"] and known_rows(table)["c.jpg"] == [1]
    assert [rows.tolist() for rows in dataset.split(table)] == [[0], [1], [2]]


def test_answers_reach_images_behind_links(tmp_path):
    draw_images(tmp_path / "elsewhere", ["a.jpg", "b.jpg"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "labels.csv").write_text("image,rust\na.jpg,1\n")
    path = write_answers(tmp_path, "b.jpg,rust,NA,0")
    (tmp_path / "data" / "answers.csv").symlink_to(path)
    table = dataset.read_labels(tmp_path / "data", answers="answers.csv")
    assert known_rows(table) == {"a.jpg": [1], "b.jpg": [0]}
    out = write_table(tmp_path / "data", "--answers", path)
    assert_same_labels(dataset.read_labels(tmp_path / "data", labels=out), table)
