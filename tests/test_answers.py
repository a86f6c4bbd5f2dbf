"""Answers to questions about single labels: they are merged into the labels, and splits stay as they were."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from conftest import draw_images, known_rows
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
    (["a.jpg,crack,NA,1"], "2: 'crack' is no class (the classes are rust, dent)"),
    (["a.jpg,rust,0,1"], "2: rust of a.jpg was 0 when the question was asked, but is 1 now"),
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


def test_files_share_the_rows_that_they_add(folder):
    first = write_answers(folder, "new.jpg,rust,NA,0", name="first.csv")
    second = write_answers(folder, "new.jpg,rust,0,1", "new.jpg,dent,NA,1", "sub/d.jpg,rust,NA,1", name="second.csv")
    table = dataset.read_labels(folder, answers=[first, second])
    assert list(known_rows(table).items())[3:] == [("new.jpg", [1, 1]), ("sub/d.jpg", [1, NA])]
    assert [note.endswith("; 1 rows added") for note in table.notes[-2:]] == [True, True]


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
        rows.append([f"{i:02}.png", *dataset._cells_of(labels), *who, *part])
    rows[1][1:3], rows[2][1:3] = ["1", "0"], ["0", "1"]
    dataset.write_csv(folder / "labels.csv", rows)

    how = {"images": album, "group": "who" if objects else None}
    before = dataset.read_labels(folder, **how)
    asked = draw(st.lists(st.tuples(st.integers(0, 35), st.integers(0, 1)), unique=True, max_size=30))
    lines = []
    for i, c in asked:
        given = dataset._cells_of([before.targets[i, c] if i < 24 else math.nan])[0]
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


def test_unanswered_questions_change_nothing(folder):
    for path in (write_answers(folder, "a.jpg,rust,1,", "what,ever,NA,"), write_answers(folder, name="empty.csv")):
        table, without = dataset.read_labels(folder, answers=path), dataset.read_labels(folder)
        assert (known_rows(table), table.before, table.added) == (known_rows(without), None, [])
        assert table.notes[:-1] == without.notes and table.warnings == without.warnings


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
    with pytest.raises(InputError, match=r"labels.csv: it has no column"):
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
    assert dataset.find_labels(folder) == {"": folder / "labels.csv"}


def test_ids_and_labels_with_any_letters_are_answered(tmp_path):
    names = ["a, b.jpg", 'the "best".jpg', " blank.jpg", "Größe/é.jpg", "new\nline.jpg"]
    draw_images(tmp_path / "images", names)
    questions = [dataset.Question(name, "", 'rust, "deep"', math.nan, 0.5) for name in names]
    dataset.write_questions(tmp_path / "answers.csv", questions)
    with open(tmp_path / "answers.csv", newline="") as file:
        rows = [[*cells[:4], "1"] for cells in list(csv.reader(file))[1:]]
    dataset.write_csv(tmp_path / "answers.csv", [dataset.ANSWER_COLUMNS, *rows])
    table = dataset.read_labels(tmp_path, answers=tmp_path / "answers.csv")
    assert known_rows(table) == {name: [1] for name in names} and table.classes == ['rust, "deep"']
