"""Which known labels are suspicious, and which unknown ones are worth asking for."""

import math
import os

import numpy as np
import pytest
from PIL import Image

import dataset
import inference
import metrics
import train
from conftest import SMALL, as_command, files_of, known_rows, read_rows, refused

RUN = ["--epochs", "1", *SMALL]


@pytest.fixture(scope="module")
def folded(demo, tmp_path_factory):
    """Return the data folder and the folder of a run of three folds; a class has NA, some rows are a test part."""
    data = tmp_path_factory.mktemp("suspected")
    (data / "images").symlink_to(demo / "images")
    table = dataset.read_labels(demo)
    table.targets[::4, 1] = np.nan
    rows = [["image", "split", *table.classes]]
    for i, (name, labels) in enumerate(known_rows(table).items()):
        rows.append([name, "test" if i % 8 == 1 else "train", *("NA" if one is None else one for one in labels)])
    dataset.write_csv(data / "labels.csv", rows)
    out = tmp_path_factory.mktemp("folded")
    train.main(["--data", str(data), "--out", str(out), "--folds", "3", *RUN])
    return data, out


def probabilities_of(out, classes):
    """Return {ID: {class: probability}} of a run's probabilities.csv."""
    return {row["ID"]: {name: float(row[name]) for name in classes} for row in read_rows(out / "probabilities.csv")}


# ---------------------------------------------------------------------------------------------------------------------
# Suspects


def test_suspects_are_the_known_labels_whose_opposite_is_likelier_out_of_fold(folded):
    data, out = folded
    table = dataset.read_labels(data)
    expected = {}
    for name, of_class in probabilities_of(out, table.classes).items():
        for label, given in zip(table.classes, known_rows(table)[name]):
            wrong = {1: 1 - of_class[label], 0: of_class[label]}.get(given, 0)
            if wrong > 0.5001:  # the file rounds to four decimals
                expected[name, label] = given, wrong

    rows = read_rows(out / "suspects.csv")
    assert list(rows[0]) == ["ID", "label", "given", "probability", "answer"]
    found = {(row["ID"], row["label"]): row for row in rows}
    assert len(found) == len(rows) and expected.keys() <= found.keys() and len(found) - len(expected) <= 3
    for key, (given, wrong) in expected.items():
        assert found[key]["given"] == str(given) and found[key]["answer"] == ""
        assert abs(float(found[key]["probability"]) - (1 - wrong if given else wrong)) < 2e-4
    wrong = [abs(float(row["probability"]) - int(row["given"])) for row in rows]
    assert wrong == sorted(wrong, reverse=True)
    assert not {name for name, _ in found} & {name for name, part in zip(table.ids, table.parts) if part == "test"}


def test_the_most_suspicious_labels_are_printed_and_are_on_a_page(folded, tmp_path, capsys):
    data, out = folded
    assert (out / "review.html").exists() and not (out / "fold_1" / "suspects.csv").exists()
    train.main(["--data", str(data), "--out", str(tmp_path), "--folds", "2", "--epochs", "1",
                *(option for option in SMALL if option != "-q")])
    rows = read_rows(tmp_path / "suspects.csv")
    text = capsys.readouterr().out
    assert f"{len(rows)} known labels may be wrong" in text and str(tmp_path / "review.html") in text
    given = {"1": "present", "0": "absent"}
    assert [f"{row['ID']}: {row['label']} is given as {given[row['given']]}" in text for row in rows[:6]] == [
        True] * 5 + [False]


def test_labels_of_one_value_and_labels_that_a_person_confirmed_are_not_suspicious():
    targets = np.float32([[1, 0, 0], [0, 0, 1], [1, 0, 0]])
    table = dataset.LabelTable(list("xyz"), list("xyz"), targets, list("abc"), answered=np.zeros((3, 3), bool))
    table.answered[0, 0] = True
    suspects = train.find_suspects(table, 1 - targets * 0.9)
    assert {(one.name, one.label) for one in suspects} == {("x", "c"), ("y", "a"), ("z", "c"), ("y", "c"), ("z", "a")}


def test_suspects_are_calibrated_even_where_the_model_is_not():
    rng = np.random.default_rng(0)
    targets, parts = rng.integers(0, 2, (60, 3)).astype(np.float32), rng.integers(0, 3, 60)
    raw = np.clip(0.8 * rng.random((60, 3)) + 0.1 * targets, 0.01, 0.99)
    calibrated = train.cross_calibrate(targets, raw, parts)
    for k in range(3):
        scale, offsets = metrics.fit_calibration(targets[parts != k], raw[parts != k])
        np.testing.assert_array_equal(calibrated[parts == k], metrics.calibrate(raw[parts == k], scale, offsets))


def test_at_most_a_thousand_labels_are_suspicious_and_unknown_ones_are_not():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (500, 6)).astype(np.float32)
    targets[:, 5] = np.nan
    names = [str(row) for row in range(500)]
    table = dataset.LabelTable(names, names, targets, list("abcdef"))
    probabilities = rng.random((500, 6))
    assert (metrics.label_quality(targets, probabilities) < 0.5).sum() > 1100
    suspects = train.find_suspects(table, probabilities)
    assert len(suspects) == 1000 and {one.label for one in suspects} == set("abcde")
    assert suspects == sorted(suspects, key=lambda one: -abs(one.given - one.probability))
    table.targets[:] = np.nan
    assert train.find_suspects(table, probabilities) == []


def test_a_name_that_no_csv_file_can_hold_is_not_asked_about(trained, demo, tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9.jpg")
    names = [odd, "a\rb.jpg", "good, really.jpg"]
    (tmp_path / "new").mkdir()
    for name, path in zip(names, dataset.read_labels(demo).paths):
        (tmp_path / "new" / name).symlink_to(path)
    rows = ask(tmp_path / "new", trained[0] / "model.pth", tmp_path / "q.csv")
    assert {row["ID"] for row in rows} == {"good, really.jpg"}
    assert "skipped: 2 images with names that are not UTF-8" in capsys.readouterr().err

    names += ["fine.jpg", " blank.jpg"]
    table = dataset.LabelTable(names, names, np.float32([[1], [1], [1], [0], [1]]), ["a"])
    assert [one.name for one in train.find_suspects(table, np.zeros((5, 1)))] == ["good, really.jpg"]


@pytest.mark.parametrize("edit", [
    lambda text: text.replace(",\n", ",1\n", 1),
    lambda text: text.replace(",\n", ",maybe\n", 1),  # a mistyped answer is a person's work too
    lambda text: text.replace(",", ";").replace(";\n", ";NA\n", 1),
    lambda text: text.replace(",\n", ",,0\n", 1),  # one column too far to the right
    lambda text: text.replace(",answer\n", ",answer,answer\n").replace(",\n", ",1,\n", 1),
    lambda text: "somebody's notes",
    lambda text: "",
])
@pytest.mark.parametrize("options", [["--folds", "3"], [], ["--folds", "3", "--resume"]], ids=str)
def test_suspects_with_answers_are_never_replaced(folded, tmp_path, capsys, edit, options):
    data, out = folded
    for name in ("config.json", "metrics.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    path = tmp_path / "suspects.csv"
    path.write_text(edit((out / "suspects.csv").read_text()))
    before = files_of(tmp_path)
    error = refused(capsys, train.main, "--data", data, "--out", tmp_path, *RUN, *options, warns=True)
    assert str(path) in error and "rename it, or give another --out" in error
    assert files_of(tmp_path) == before


def test_a_page_of_somebody_else_in_the_folder_of_a_run_is_not_removed(folded, tmp_path, capsys):
    data, out = folded
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    (tmp_path / "review.html").write_text("<p>notes</p>")
    assert "review.html" in refused(capsys, train.main, "--data", data, "--out", tmp_path, *RUN, warns=True)
    assert (tmp_path / "review.html").read_text() == "<p>notes</p>"


def test_suspects_without_answers_are_replaced(folded, tmp_path):
    data, out = folded
    for name in ("config.json", "suspects.csv", "review.html"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    train.main(["--data", str(data), "--out", str(tmp_path), *RUN])
    assert not (tmp_path / "suspects.csv").exists() and not (tmp_path / "review.html").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def ask(folder, model, out, *options):
    """Run --ask, and return the rows of the questions that it wrote."""
    inference.main(["--ask", str(folder), "--model", str(model), "--out", str(out), *map(str, options)])
    return read_rows(out)


@pytest.fixture
def partly(demo, tmp_path):
    """Return a function that writes a data folder with some of the demo's images: partly(rows, unlabelled, split).

    `rows` are {image number: labels}, and the images with the numbers in `unlabelled` have no row.
    """
    paths = dataset.read_labels(demo).paths
    classes = dataset.DEMO_LABELS

    def write(rows, unlabelled=(), parts=None, titles=classes):
        folder = tmp_path / "partly"
        (folder / "images").mkdir(parents=True)
        for number in [*rows, *unlabelled]:
            (folder / "images" / f"{number:02}.jpg").symlink_to(paths[number])
        lines = [",".join(["image", *["split"] * bool(parts), *titles])]
        for number, labels in rows.items():
            lines.append(",".join([f"{number:02}", *([parts[number]] if parts else []), *labels]))
        (folder / "labels.csv").write_text("\n".join(lines))
        return folder

    return write


ALL_KNOWN = list("010101"), list("101010")


def test_questions_are_the_uncertain_unknown_labels_of_train_and_of_images_without_a_row(trained, partly, tmp_path):
    model = trained[0] / "model.pth"
    rows = {i: list(ALL_KNOWN[i % 2]) for i in range(12)}
    for i in range(12):
        rows[i][i % 3] = "NA"
    parts = dict.fromkeys(range(12), "train") | {3: "val", 4: "test", 5: "test"}
    folder = partly(rows, unlabelled=[20, 21], parts=parts)
    asked = ask(folder, model, tmp_path / "questions.csv")

    classifier = inference.load_model(model)
    expected = {}
    for number in [0, 1, 2, *range(6, 12), 20, 21]:
        labels = classifier.classes if number >= 20 else [dataset.DEMO_LABELS[number % 3]]
        name = f"{number}.jpg" if number >= 20 else f"{number:02}"
        p = inference.predict(classifier, folder / "images" / f"{number:02}.jpg")[0]
        expected |= {(name, label): p[classifier.classes.index(label)] for label in labels}
    found = {(row["ID"], row["label"]): float(row["probability"]) for row in asked}
    assert found.keys() == expected.keys()
    assert all(abs(found[key] - expected[key]) < 1e-3 for key in found)
    assert {(row["given"], row["answer"]) for row in asked} == {("NA", "")}
    distances = [abs(float(row["probability"]) - 0.5) for row in asked]
    assert distances == sorted(distances)
    assert (tmp_path / "questions.html").exists()


def test_a_split_that_training_would_draw_is_left_out_and_folds_leave_out_test_alone(trained, partly, tmp_path, capsys):
    rows = {i: ["NA", *ALL_KNOWN[i % 2][1:]] for i in range(40)}
    folder = partly(rows)
    model = trained[0] / "model.pth"
    asked = ask(folder, model, tmp_path / "questions.csv")
    assert "rows are left out: they are in val or test" in capsys.readouterr().err

    # The model knows these images, if in other splits than train.py would draw now.
    table, classifier = dataset.read_labels(folder), inference.load_model(model)
    trained_on = {name for name, key in zip(table.ids, dataset.image_keys(table)) if key in classifier.trained_on}
    assert {row["ID"] for row in asked} == trained_on
    assert 20 < len(trained_on) < 40

    classifier.trained_on = []
    inference.save_model(classifier, model := tmp_path / "other.pth")
    expected = {table.ids[row] for row in dataset.split(table)[0]}
    assert {row["ID"] for row in ask(folder, model, tmp_path / "questions.csv")} == expected != trained_on
    classifier.options |= {"folds": 3, "split": [0.85, 0.15, 0]}
    inference.save_model(classifier, model)
    assert len(ask(folder, model, tmp_path / "questions.csv")) == 40


def test_a_folder_without_labels_is_all_unknown(trained, demo, tmp_path):
    (tmp_path / "new" / "sub").mkdir(parents=True)
    paths = dataset.read_labels(demo).paths
    for number, name in enumerate(("a.jpg", "sub/b.jpg", "sub/c.JPG")):
        (tmp_path / "new" / name).symlink_to(paths[number])
    rows = ask(tmp_path / "new", trained[0] / "model.pth", tmp_path / "q.csv", "--count", 100)
    names = ("a.jpg", "sub/b.jpg", "sub/c.JPG")
    assert {(row["ID"], row["label"]) for row in rows} == {
        (name, label) for name in names for label in dataset.DEMO_LABELS}


def test_no_image_and_no_class_gets_all_the_questions(trained, demo, tmp_path):
    rows = ask(demo_without_labels(demo, tmp_path), trained[0] / "model.pth", tmp_path / "q.csv", "--count", 60)
    assert len(rows) == 60
    images, labels = ([row[title] for row in rows] for title in ("ID", "label"))
    assert max(map(images.count, images)) == 2
    assert max(map(labels.count, labels)) <= 20  # twice an equal share of six


def demo_without_labels(demo, tmp_path):
    """Return a folder with the images of the demo data alone."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "images").symlink_to(demo / "images")
    return tmp_path / "bare"


def test_classes_of_one_side_alone_are_skipped_and_named(trained, partly, tmp_path, capsys):
    rows = {i: ["NA", "NA", str(i % 2)] for i in range(12)}
    folder = partly(rows, titles=["rust", "moss", "crack"])
    asked = ask(folder, trained[0] / "model.pth", tmp_path / "q.csv", "--unknown", "NA")
    assert {row["label"] for row in asked} == {"rust"}
    notes = capsys.readouterr().err
    assert "skipped: moss, which only the data has" in notes
    assert "bolt, bracket, ring, hole, which only the model has" in notes


def test_identical_images_are_asked_about_once_and_never_if_one_is_held_out(trained, demo, partly, tmp_path):
    rows = {i: list(ALL_KNOWN[i % 2]) for i in range(10)}
    rows[0][0] = rows[1][0] = rows[2][1] = "NA"
    parts = dict.fromkeys(range(10), "train") | {9: "test", 8: "val"}
    folder = partly(rows, unlabelled=[30], parts=parts)
    images = folder / "images"
    for name, original in (("also_30", 30), ("also_0", 0), ("also_9", 9)):
        (images / f"{name}.jpg").write_bytes((images / f"{original:02}.jpg").read_bytes())
    (images / "test").mkdir()
    (images / "test" / "new.jpg").symlink_to(dataset.read_labels(demo).paths[50])

    asked = ask(folder, trained[0] / "model.pth", tmp_path / "q.csv")
    assert sorted({row["ID"] for row in asked}) == ["00", "01", "02", "30.jpg"]
    assert [row["label"] for row in asked if row["ID"] == "00"] == [dataset.DEMO_LABELS[0]]


def test_bad_images_are_named_and_skipped(trained, odd_folder, tmp_path, capsys):
    folder, bad = odd_folder
    (folder / "labels.txt").unlink()
    code, _, notes = as_command(capsys, inference.main, "--ask", folder, "--model", trained[0] / "model.pth", "--out",
                                tmp_path / "q.csv")
    assert code == 0
    assert all(f"skipped: {folder / 'images' / name}" in notes for name in bad)
    names = {row["ID"] for row in read_rows(tmp_path / "q.csv")}
    assert names == {f"good_{i}.jpg" for i in range(24)} | {"vanished.jpg"}


def test_what_was_answered_already_is_not_asked_again(trained, partly, tmp_path):
    rows = {i: list(ALL_KNOWN[i % 2]) for i in range(10)}
    for i in range(5):
        rows[i][0] = rows[i][1] = "NA"
    folder = partly(rows, unlabelled=[30], parts=dict.fromkeys(range(10), "train") | {9: "test", 8: "val"})
    model = trained[0] / "model.pth"
    first = ask(folder, model, tmp_path / "first.csv")
    answers = [[row["ID"], row["label"], row["given"], row["probability"], answer]
               for row, answer in zip(first, ["1", "NA", "0", "", "NA", "1"])]
    dataset.write_csv(tmp_path / "answers.csv", [dataset.ANSWER_COLUMNS, *answers])
    again = ask(folder, model, tmp_path / "second.csv", "--answers", tmp_path / "answers.csv")

    open_before = {(row["ID"], row["label"]) for row in first}
    answered = {(name, label) for name, label, *_, answer in answers if answer}
    assert len(answered) == 5
    assert {(row["ID"], row["label"]) for row in again} == open_before - answered


def test_an_answer_about_one_of_two_identical_images_is_about_both(trained, partly, tmp_path):
    rows = {i: list(ALL_KNOWN[i % 2]) for i in range(10)}
    rows[0][0] = rows[1][0] = "NA"
    folder = partly(rows, parts=dict.fromkeys(range(10), "train") | {9: "test", 8: "val"})
    (folder / "images" / "copy.jpg").write_bytes((folder / "images" / "00.jpg").read_bytes())
    with open(folder / "labels.csv", "a") as file:
        file.write("\ncopy,train,NA," + ",".join(rows[0][1:]))
    label = dataset.DEMO_LABELS[0]
    (folder / "answers.csv").write_text(f"ID,label,given,probability,answer\ncopy,{label},NA,0.5,NA\n")

    model = trained[0] / "model.pth"
    assert {row["ID"] for row in ask(folder, model, tmp_path / "q.csv")} == {"00", "01"}
    # The name of the file is looked up in the data folder too.
    again = ask(folder, model, tmp_path / "q.csv", "--answers", "answers.csv")
    assert [(row["ID"], row["label"]) for row in again] == [("01", label)]


@pytest.mark.parametrize("arguments, message", [
    ([], "--out questions.csv"),
    (["--out", "questions.html"], "--out questions.csv"),
    (["--out", "q.csv", "--evaluate", "data"], "--evaluate and --ask are two commands"),
    (["--out", "q.csv", "photo.jpg"], "it takes no images"),
    (["--out", "q.csv", "--save", "drawn"], "--save"),
    (["--out", "q.csv", "--count", "0"], "--count"),
    (["--out", "q.csv", "--threshold", "0.4"], "--threshold"),
    (["--out", "q.csv", "--format", "json"], "--format"),
])
def test_wrong_options_beside_ask(trained, demo, in_folder, capsys, arguments, message):
    assert message in refused(capsys, inference.main, "--ask", demo, "--model", trained[0] / "model.pth", *arguments)


def test_count_goes_with_ask_alone(trained, demo, capsys):
    assert "--count goes with --ask" in refused(capsys, inference.main, "--count", 3, demo)


def test_nothing_to_ask_is_an_error_and_writes_nothing(trained, partly, tmp_path, capsys):
    folder = partly({i: list(ALL_KNOWN[i % 2]) for i in range(12)})
    error = refused(capsys, inference.main, "--ask", folder, "--model", trained[0] / "model.pth", "--out",
                    tmp_path / "q.csv", warns=True)
    assert "nothing to ask" in error
    assert not list(tmp_path.glob("q.*"))


def test_questions_replace_no_answers_and_no_file_that_is_read_or_of_another_kind(trained, partly, tmp_path, capsys):
    folder = partly({i: ["NA", *ALL_KNOWN[i % 2][1:]] for i in range(12)})
    model = trained[0] / "model.pth"
    out = tmp_path / "q.csv"
    rows = ask(folder, model, out)
    assert ask(folder, model, out) == rows  # without answers they may be replaced

    page = (tmp_path / "q.html").read_bytes()
    cases = {out: out.read_text().replace(",\n", ",1\n", 1), folder / "labels.csv": None,
             tmp_path / "other.csv": "a,b\n1,2\n"}
    for path, content in cases.items():
        if content:
            path.write_text(content)
        before = path.read_bytes()
        refused(capsys, inference.main, "--ask", folder, "--model", model, "--out", path, warns=True)
        assert path.read_bytes() == before
    assert (tmp_path / "q.html").read_bytes() == page

    (tmp_path / "new.html").write_text("<p>somebody's page</p>")
    error = refused(capsys, inference.main, "--ask", folder, "--model", model, "--out", tmp_path / "new.csv",
                    warns=True)
    assert "new.html" in error and not (tmp_path / "new.csv").exists()


def test_several_models_and_mirrored_images_are_averaged(trained, partly, tmp_path):
    parts = dict.fromkeys(range(12), "train") | {10: "val", 11: "test"}
    folder = partly({i: ["NA", *ALL_KNOWN[i % 2][1:]] for i in range(12)}, parts=parts)
    model = trained[0] / "model.pth"
    asked = ask(folder, model, tmp_path / "q.csv", "--model", model, "--tta")
    classifier = inference.load_model(model)
    classifier.mirrored = True
    for row in asked:
        p = inference.predict(classifier, folder / "images" / f"{row['ID']}.jpg")[0, 0]
        assert math.isclose(float(row["probability"]), p, abs_tol=1e-3)
    assert len(asked) == 10


def test_questions_are_the_same_on_a_second_run(trained, demo, tmp_path):
    folder = demo_without_labels(demo, tmp_path)
    first = ask(folder, trained[0] / "model.pth", tmp_path / "a.csv", "--count", 30)
    assert ask(folder, trained[0] / "model.pth", tmp_path / "b.csv", "--count", 30) == first
    assert Image.open(folder / "images" / first[0]["ID"]).size == (dataset.DEMO_SIZE, dataset.DEMO_SIZE)
