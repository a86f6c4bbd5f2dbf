"""--folds: networks that are each tested on what they were not trained on, and the one model of all of them."""

import csv
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from test_stopping import calls_at, interrupt, kill_often

import dataset
import inference
import metrics
import train
from conftest import (
    CHARTS,
    SMALL,
    as_command,
    classifier_of,
    files_of,
    label_cells,
    read_json,
    read_rows,
    refused,
    same_tensors,
)
from dataset import InputError

RUN = ["--epochs", "2", "--lr", "3e-3", *SMALL]
FOLD_FILES = {"model.pth", "last.pth", "classes.json", "label_groups.json", "thresholds.json", "predictions.csv",
              "probabilities.csv", "train_metadata.csv", "val_metadata.csv", "loss_curve.png", "history.csv",
              "metrics.json", "config.json", "images.npz", "pr_curves.png", "predictions.png", "reliability.png"}
OUT_FILES = {"suspects.csv", "review.html"} | FOLD_FILES - {
    "last.pth", "val_metadata.csv", "loss_curve.png", "history.csv"}


@pytest.fixture(scope="module", autouse=True)
def blank_charts(trained):
    """Let runs draw no charts and no heatmaps. `trained` comes first, as other tests look at the charts of its run."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in CHARTS:
            patch.setattr(module, name, lambda *_: Image.new("RGB", (1, 1)))
        patch.setattr(inference, "heatmaps", lambda _, image, labels: np.zeros((len(labels), 8, 8), np.float32))
        yield


def run(data, out, *more):
    """Train on the data into `out`, and return the report."""
    return train.main(["--data", str(data), "--out", str(out), *RUN, *map(str, more)])


def names_in(path):
    """Return the IDs in a CSV file of a run, in order."""
    return [row["ID"] for row in read_rows(path)]


def networks(path):
    """Return the state_dicts of the networks in a model.pth."""
    return [member["network"] for member in inference.read_checkpoint(path)["members"]]


def same_networks(a, b):
    """Return whether two lists of state_dicts are equal."""
    return len(a) == len(b) and all(map(same_tensors, a, b))


def same_models(a, b):
    """Return whether two files model.pth predict the same."""
    (one, one_members), (other, other_members) = (
        (content, [(member["scale"], member["offsets"]) for member in content["members"]])
        for content in map(inference.read_checkpoint, (a, b)))
    return same_networks(networks(a), networks(b)) and (one_members, one["thresholds"]) == (
        other_members, other["thresholds"])


def load(path):
    """Return the Classifier of a model.pth."""
    return inference.load_model(path, "cpu", "fp32")


@pytest.fixture(scope="module")
def objects(demo, tmp_path_factory):
    """Return the demo data as photographs of 40 objects, two of each; two images are there as another object too."""
    folder = tmp_path_factory.mktemp("objects")
    shutil.copytree(demo / "images", folder / "images")
    shutil.copy(demo / "label_groups.json", folder)

    table = dataset.read_labels(demo)
    lines = [",".join(["image", "object", *table.classes])]
    rows = [(name, number // 2, labels) for number, (name, labels) in enumerate(zip(table.ids, table.targets))]

    for copied in (3, 41):
        name = f"copy_{copied}.jpg"
        shutil.copy(table.paths[copied], folder / "images" / name)
        rows.append((name, 100 + copied, table.targets[copied]))

    for name, number, labels in rows:
        lines.append(",".join([name, f"object_{number}", *label_cells(labels)]))
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folded(objects, tmp_path_factory):
    """Return folder and report of a run of three folds on the objects, a fifth of which is the test split."""
    out = tmp_path_factory.mktemp("folded")
    return out, run(objects, out, "--folds", 3, "--group", "object", "--split", 0.6, 0.2, 0.2)


@pytest.fixture(scope="module")
def plain(demo, tmp_path_factory):
    """Return folder and report of a run of three folds on all of the demo data."""
    out = tmp_path_factory.mktemp("plain")
    return out, run(demo, out, "--folds", 3)


def labels_of(path, data):
    """Read a label file of a run as a LabelTable."""
    return dataset.read_labels(data, labels=str(path), images=str(data / "images"))


def out_of_fold(out, data, calibrated=True):
    """Return the table of the pool, the fold of each row and its raw probabilities, computed anew from the files."""
    pool = labels_of(out / "train_metadata.csv", data)
    row_of = {name: row for row, name in enumerate(pool.ids)}
    fold = np.full(len(pool), -1)
    raw = np.full(pool.targets.shape, np.nan)

    for k in range(3):
        folder = out / f"fold_{k + 1}"
        classifier = load(folder / "model.pth")
        classifier.members[0].scale = 1.0
        classifier.members[0].offsets = offsets_of(folder, data) if calibrated else [0.0] * len(pool.classes)
        table = labels_of(folder / "val_metadata.csv", data)
        rows = [row_of[name] for name in table.ids]
        fold[rows] = k
        raw[rows] = inference.predict(classifier, table.paths, workers=0)

    assert not np.isnan(raw).any()
    return pool, fold, raw


def offsets_of(folder, data):
    """Return -log(pos_weight) of a run, by the definition of sqrt and its clip."""
    targets = labels_of(folder / "train_metadata.csv", data).targets
    positives, negatives = (targets == 1).sum(axis=0), (targets == 0).sum(axis=0)
    return (-np.log(np.clip(np.sqrt(negatives / positives), 1, 20))).tolist()


def chosen_by(targets, raw):
    """Return the scale, offsets and soft thresholds that out-of-fold probabilities lead to."""
    scale, offsets = metrics.fit_calibration(targets, raw)
    probabilities = metrics.calibrate(raw, scale, offsets)
    soft = metrics.find_thresholds(targets, probabilities, "soft")
    return scale, offsets, metrics.between_scores(soft, probabilities)


# ----------------------------------------------------------------------------------------------------------
# The folds and their files


def test_every_fold_is_an_ordinary_run_and_out_has_the_model_of_all(folded, plain):
    for out, report in (folded, plain):
        files = {path.name for path in out.iterdir()} - {"test_metadata.csv"}
        assert files == OUT_FILES | {"fold_1", "fold_2", "fold_3", "fold_thresholds.csv"}
        for k in (1, 2, 3):
            folder = out / f"fold_{k}"
            assert {path.name for path in folder.iterdir()} - {"test_metadata.csv"} == FOLD_FILES
            assert read_json(folder / "metrics.json")["split"] == "val"
            assert len(load(folder / "model.pth").members) == 1

        assert len(load(out / "model.pth").members) == 3
        written = read_json(out / "metrics.json")
        assert written["split"] == report["split"] == "folds"
        assert written["f1_macro"] == report["f1_macro"]
        assert set(written["folds"]) == {*metrics.HEADLINES, *metrics.JUDGED}
        assert written["intervals"]["f1_macro"][0] <= written["f1_macro"] <= written["intervals"]["f1_macro"][1]

        pool = names_in(out / "train_metadata.csv")
        assert report["images"] == len(pool)
        for name in ("predictions.csv", "probabilities.csv"):
            assert names_in(out / name) == pool
        assert list(read_json(out / "thresholds.json").values()) == load(out / "model.pth").thresholds


def test_the_parts_are_disjoint_cover_the_pool_and_keep_what_belongs_together(folded, objects):
    out, _ = folded
    pool = names_in(out / "train_metadata.csv")
    test = names_in(out / "test_metadata.csv")
    table = dataset.read_labels(objects, group="object")
    assert sorted(pool + test) == sorted(table.ids) and len(pool) + len(test) == 82

    fold_of = dict.fromkeys(test, "test")
    for k in (1, 2, 3):
        own = names_in(out / f"fold_{k}" / "val_metadata.csv")
        others = names_in(out / f"fold_{k}" / "train_metadata.csv")
        assert not set(own) & set(fold_of)
        assert sorted(own + others) == sorted(pool)
        assert len(pool) / 3 - 4 <= len(own) <= len(pool) / 3 + 4
        fold_of |= dict.fromkeys(own, k)
    assert fold_of.keys() == set(table.ids)

    # What belongs together: photographs of one object, and files with the same bytes
    together = defaultdict(set)
    for name, thing, path in zip(table.ids, table.objects, table.paths):
        together[thing].add(fold_of[name])
        with open(path, "rb") as file:
            together[file.read()].add(fold_of[name])
    assert all(len(folds) == 1 for folds in together.values())
    assert len(together) == 42 + 80


def test_the_folders_of_folds_are_data_that_is_already_divided(folded, plain, objects, demo):
    table = dataset.read_labels(folded[0], images=str(objects / "images"))
    assert {part: table.parts.count(part) for part in table.parts} == {
        part: len(names_in(folded[0] / f"{part}_metadata.csv")) for part in ("train", "test")}
    for k in (1, 2, 3):
        table = dataset.read_labels(plain[0] / f"fold_{k}", images=str(demo / "images"))
        assert {part: table.parts.count(part) for part in table.parts} == {
            part: len(names_in(plain[0] / f"fold_{k}" / f"{part}_metadata.csv")) for part in ("train", "val")}


def test_without_a_split_all_images_are_in_the_folds(plain, demo):
    out, report = plain
    assert sorted(names_in(out / "train_metadata.csv")) == sorted(dataset.read_labels(demo).ids)
    assert "test" not in report
    own = [name for k in (1, 2, 3) for name in names_in(out / f"fold_{k}" / "val_metadata.csv")]
    assert sorted(own) == sorted(names_in(out / "train_metadata.csv"))


# ----------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("which", ["folded", "plain"])
def test_the_report_is_of_predictions_that_nothing_was_chosen_by(request, which, demo, objects):
    out, report = request.getfixturevalue(which)
    pool, fold, raw = out_of_fold(out, objects if which == "folded" else demo)
    probabilities, thresholds = np.empty_like(raw), np.empty_like(raw)
    for k in range(3):
        scale, offsets, thresholds[fold == k] = chosen_by(pool.targets[fold != k], raw[fold != k])
        probabilities[fold == k] = metrics.calibrate(raw[fold == k], scale, offsets)

    expected = metrics.report(pool.targets, probabilities, thresholds, pool.classes, intervals=True)
    for name in metrics.HEADLINES:
        assert report[name] == pytest.approx(expected[name], abs=1e-6), name
    assert report["images"] == expected["rows"]
    assert report["intervals"].keys() == expected["intervals"].keys()
    for name, interval in expected["intervals"].items():
        assert report["intervals"][name] == pytest.approx(interval, abs=1e-6)
    for name, row in expected["per_class"].items():
        assert report["per_class"][name] == pytest.approx(row, abs=1e-6, nan_ok=True)

    parts = []
    for k in range(3):
        own = fold == k
        parts.append(metrics.report(pool.targets[own], probabilities[own], thresholds[own], pool.classes))
    for name, numbers in report["folds"].items():
        values = [part[name] for part in parts]
        assert numbers["mean"] == pytest.approx(np.mean(values), abs=1e-6, nan_ok=True)
        assert numbers["deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-6, nan_ok=True)

    with open(out / "probabilities.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    np.testing.assert_allclose(np.array([row[1:] for row in rows[1:]], float), probabilities, atol=1e-6)


def test_the_model_is_the_mean_of_the_networks_calibrated_by_all_predictions(folded, objects):
    out, _ = folded
    pool, _, raw = out_of_fold(out, objects)
    scale, offsets, thresholds = chosen_by(pool.targets, raw)
    classifier = load(out / "model.pth")
    np.testing.assert_allclose(classifier.thresholds, thresholds, atol=1e-6)

    each = []
    for k, member in enumerate(classifier.members, 1):
        folder = out / f"fold_{k}"
        alone = load(folder / "model.pth")
        assert same_networks([member.network.state_dict()], [alone.network.state_dict()])
        assert member.scale == pytest.approx(scale, abs=1e-6)
        before = np.array(offsets_of(folder, objects))
        np.testing.assert_allclose(member.offsets, scale * before + offsets, atol=1e-5)
        alone.members[0].scale = 1.0
        alone.members[0].offsets = before.tolist()
        each.append(metrics.calibrate(inference.predict(alone, pool.paths[:20], workers=0), scale, offsets))

    predicted = inference.predict(classifier, pool.paths[:20], workers=0)
    np.testing.assert_allclose(predicted, np.mean(each, axis=0), atol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 1e-3


@pytest.mark.parametrize("more", [["--calibration", "none"], ["--preset", "assignment"]])
def test_without_calibration_the_folds_have_none(demo, tmp_path, more):
    report = run(demo, tmp_path, "--folds", 3, "--epochs", 1, *more)
    pool, _, raw = out_of_fold(tmp_path, demo, calibrated=False)
    for member in load(tmp_path / "model.pth").members:
        assert (member.scale, set(member.offsets)) == (1.0, {0.0})
    assert report["log_loss"] == pytest.approx(metrics.log_loss(pool.targets, raw), abs=1e-6)
    if "assignment" in more:
        assert set(read_json(tmp_path / "thresholds.json").values()) == {0.5}


# ----------------------------------------------------------------------------------------------------------
# Test splits, which no fold contains


def test_the_test_split_is_reported_by_all_networks_together(folded, objects):
    out, report = folded
    test = labels_of(out / "test_metadata.csv", objects)
    for k in (1, 2, 3):
        in_fold = names_in(out / f"fold_{k}" / "train_metadata.csv") + names_in(out / f"fold_{k}" / "val_metadata.csv")
        assert not set(in_fold) & set(test.ids)
    classifier = load(out / "model.pth")
    probabilities = inference.predict(classifier, test.paths, workers=0)
    expected = metrics.report(test.targets, probabilities, classifier.thresholds, test.classes)
    for name in metrics.HEADLINES:
        assert report["test"][name] == pytest.approx(expected[name], abs=1e-6, nan_ok=True)
    assert read_json(out / "metrics.json")["test"]["f1_macro"] == report["test"]["f1_macro"]
    assert report["test"]["images"] == len(test) > 10


@pytest.mark.parametrize("parts", [{"train": range(60), "test": range(60, 80)},
                                   {"train": range(40), "val": range(40, 60), "test": range(60, 80)}],
                         ids=lambda parts: "+".join(parts))
def test_data_that_is_divided_keeps_its_test_split(demo, tmp_path, parts):
    table = dataset.read_labels(demo)
    data = tmp_path / "divided"
    shutil.copytree(demo / "images", data / "images")
    for part, rows in parts.items():
        lines = [",".join(["image", *table.classes])]
        for row in rows:
            lines.append(",".join([table.ids[row], *label_cells(table.targets[row])]))
        (data / f"{part}.csv").write_text("\n".join(lines))
    report = run(data, tmp_path / "out", "--folds", 2, "--epochs", 1)
    assert sorted(names_in(tmp_path / "out" / "test_metadata.csv")) == sorted(table.ids[60:])
    assert sorted(names_in(tmp_path / "out" / "train_metadata.csv")) == sorted(table.ids[:60])
    assert (report["images"], report["test"]["images"]) == (60, 20)
    own = [name for k in (1, 2) for name in names_in(tmp_path / "out" / f"fold_{k}" / "val_metadata.csv")]
    assert sorted(own) == sorted(table.ids[:60])


# ----------------------------------------------------------------------------------------------------------
# The model of the folds, in use


def test_the_model_of_folds_is_one_to_predict_with(folded, demo, tmp_path, capsys):
    model = folded[0] / "model.pth"
    images = sorted((demo / "images").iterdir())[:2]
    cpu = ["--model", model, "--device", "cpu", "-j", "0"]
    drawn = tmp_path / "drawn"
    code, out, errors = as_command(capsys, inference.main, *images, *cpu, "--threshold", 0, "--heatmap",
                                   "--save", drawn)
    assert code == 0 and images[1].name in out
    assert "3 x resnet18, 32 px" in errors
    assert {path.stem for path in drawn.iterdir()} == {path.stem for path in images}

    alone = [load(folded[0] / f"fold_{k}" / "model.pth") for k in (1, 2, 3)]
    mean = np.mean([inference.heatmaps(one, images[0], [0, 2]) for one in alone], axis=0)
    maps = inference.heatmaps(load(model), images[0], [0, 2])
    highest = mean.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(maps, np.divide(mean, highest, where=highest > 0, out=np.zeros_like(mean)), atol=1e-4)

    code, out, _ = as_command(capsys, inference.main, "--evaluate", demo, *cpu)
    assert code == 0 and "f1_macro" in out
    code, _, _ = as_command(capsys, inference.main, "--calibrate", demo, *cpu, "--out", tmp_path / "new.pth")
    assert code == 0
    assert same_networks(networks(tmp_path / "new.pth"), networks(model))


def test_weights_of_a_model_of_folds_are_those_of_its_first_network(folded, demo, tmp_path, capsys):
    loud = [option for option in RUN if option != "-q"]
    model = folded[0] / "model.pth"
    train.main(["--data", str(demo), "--out", str(tmp_path), *loud, "--weights", str(model), "--lr", "0",
                "--wd", "0", "--epochs", "1", "--train-layers", "head"])
    assert "head rows taken by class name: bolt, bracket" in capsys.readouterr().out
    assert same_networks(networks(tmp_path / "model.pth"), networks(model)[:1])


# ----------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("folds", ["1", "-3", "x", "2.5"])
def test_folds_that_are_none(demo, tmp_path, capsys, folds):
    assert "--folds" in refused(capsys, train.main, "--data", demo, "--out", tmp_path / "out", *RUN, "--folds", folds)
    assert not (tmp_path / "out").exists()


def test_more_folds_than_images_are_an_error_of_one_line(make_rows, tmp_path, capsys):
    data = make_rows([i % 2 for i in range(6)], "image red")
    error = refused(capsys, train.main, "--data", data, "--out", tmp_path / "out", *RUN, "--folds", 7)
    assert "6 images are too few for 7" in error and "--folds" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [2, 3])
def test_folds_that_train_on_a_single_image_are_an_error_of_one_line(make_rows, tmp_path, capsys, count):
    data = make_rows([i % 2 for i in range(count)], "image red")
    arguments = ["--data", data, "--out", tmp_path / "out", *RUN, "--folds", 2]
    assert "BatchNorm" in refused(capsys, train.main, *arguments, warns=True)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", ["model.pth", "fold_1/model.pth", "fold_2/last.pth", "link"])
def test_weights_of_the_run_that_is_replaced_are_refused(plain, demo, tmp_path, capsys, name, resumed):
    out = tmp_path / "out"
    shutil.copytree(plain[0], out)
    (tmp_path / "link").symlink_to(out / "fold_1" / "model.pth")
    if resumed:
        shutil.rmtree(out / "fold_3")
    before = files_of(out)
    weights = tmp_path / name if name == "link" else out / name
    arguments = ["--data", demo, "--out", out, *RUN, "--folds", 3, "--weights", weights, *["--resume"][:resumed]]
    error = refused(capsys, train.main, *arguments, warns=True)
    assert error.startswith("error: --weights") and "name another --out" in error
    assert files_of(out) == before


@pytest.mark.parametrize("name", ["model.pth", "fold_1/model.pth", "fold_2/last.pth"])
@pytest.mark.parametrize("more", [["--folds", 3], ["--folds", 2, "--seed", 1, "--split", 0.2, 0.2, 0.6]])
def test_folds_refuse_weights_that_were_trained_on_the_images_they_test_on(plain, demo, tmp_path, capsys, name, more):
    renamed = tmp_path / "data"
    shutil.copytree(demo, renamed)
    text = (renamed / "labels.txt").read_text()
    for path in list((renamed / "images").iterdir()):
        path.rename(path.with_name(f"new_{path.name}"))
        text = text.replace(path.name, f"new_{path.name}")
    (renamed / "labels.txt").write_text(text)
    error = refused(capsys, train.main, "--data", renamed, "--out", tmp_path / "out", *RUN, *more, "--weights",
                    plain[0] / name)
    count = 80 if name == "model.pth" else 53
    assert f"was trained on {count} of the images that --folds tests on" in error
    assert not (tmp_path / "out").exists()


def test_every_fold_begins_with_the_weights_as_they_were_and_head_rows_by_name(demo, tmp_path):
    classes = dataset.read_labels(demo).classes
    torch.manual_seed(3)
    network = inference.build_model("resnet18", "linear", len(classes))
    saved = classifier_of(network, "resnet18", "linear", [0.0], classes[::-1], {}, [0.5] * len(classes), 32)
    weights = tmp_path / "weights.pth"
    inference.save_model(saved, weights)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    still = ["--lr", 0, "--wd", 0, "--train-layers", "head", "--epochs", 1]
    with calls_at({1: lambda: torch.save({}, weights)}):  # by then all of them were read
        run(demo, tmp_path / "out", "--folds", 2, "--weights", weights, *still)
    for name in ("fc.weight", "fc.bias"):
        expected[name] = expected[name].flip(0)
    folds = networks(tmp_path / "out" / "model.pth")
    assert same_networks(folds, [expected, expected])


def test_folds_resume_without_their_weights_once_all_have_begun(demo, trained, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save(networks(trained[0] / "model.pth")[0], weights)
    arguments = ["--folds", 2, "--weights", weights, "--epochs", 1, "-b", 8]
    report = run(demo, tmp_path / "whole", *arguments)

    with calls_at({1: interrupt}), pytest.raises(KeyboardInterrupt):  # within the first fold
        run(demo, tmp_path / "out", *arguments)
    weights.rename(tmp_path / "moved.pth")
    error = refused(capsys, train.main, "--data", demo, "--out", tmp_path / "out", *RUN, *arguments, "--resume",
                    warns=True)
    assert error == f"error: {weights} does not exist"

    (tmp_path / "moved.pth").rename(weights)
    with calls_at({5: interrupt}), pytest.raises(KeyboardInterrupt):  # within the second one
        run(demo, tmp_path / "out", *arguments, "--resume")
    assert (tmp_path / "out" / "fold_2" / "last.pth").exists()
    weights.unlink()
    assert run(demo, tmp_path / "out", *arguments, "--resume") == report


def test_the_model_of_folds_knows_every_image_that_a_network_was_trained_on(plain, demo, tmp_path, capsys):
    run(demo, tmp_path, "--weights", plain[0] / "model.pth", "--epochs", 1, "--lr", 0, "--wd", 0)
    errors = capsys.readouterr().err
    for part in ("val", "test"):
        count = len(names_in(tmp_path / f"{part}_metadata.csv"))
        assert f"{part} split: --weights {plain[0]}/model.pth was trained on {count} of the {count} images" in errors
    run(demo, tmp_path / "again", "--weights", tmp_path / "model.pth", "--epochs", 1, "--lr", 0, "--wd", 0)
    assert "was trained on" in capsys.readouterr().err  # which these weights know from those before them


def epochs(out):
    """Return for each of the first two folds how many epochs were trained, and which one was kept."""
    folders = (out / "fold_1", out / "fold_2")
    return [(len(read_rows(folder / "history.csv")), load(folder / "model.pth").epoch) for folder in folders]


@pytest.mark.parametrize("preset", [[], ["--preset", "inspection", "--wd", "0"]], ids=["default", "preset"])
def test_under_folds_every_epoch_is_trained_and_the_last_one_kept(demo, tmp_path, preset):
    still = ["--folds", 2, "--lr", 0, "--wd", 0, "--train-layers", "head", "--epochs", 5, *preset]
    run(demo, tmp_path, *still)
    assert epochs(tmp_path) == [(5, 5), (5, 5)]


def test_a_monitor_and_patience_that_are_given_hold_under_folds_too(demo, tmp_path, capsys):
    run(demo, tmp_path, "--folds", 2, "--lr", 0, "--wd", 0, "--train-layers", "head", "--epochs", 5,
        "--monitor", "map", "--patience", 2)
    assert epochs(tmp_path) == [(3, 1), (3, 1)]
    assert "warning: --monitor map chooses the epoch on the images that are reported" in capsys.readouterr().err


def test_a_fold_without_the_labels_that_the_monitor_needs_is_an_error_before_training(make_rows, tmp_path, capsys):
    data = make_rows([int(i == 0) for i in range(12)], "image red")
    arguments = ["--data", data, "--out", tmp_path / "out", *RUN, "--folds", 3, "--monitor", "map", "--size", 64]
    error = refused(capsys, train.main, *arguments, warns=True)
    assert error.startswith("error: --monitor map needs a class with known positives and known neg")
    assert not (tmp_path / "out").exists()


def test_splits_that_folds_do_not_have_are_not_exported(demo, tmp_path, capsys):
    arguments = ["--data", demo, "--out", tmp_path / "out", *RUN, "--folds", 2, "--export-splits", tmp_path / "export"]
    assert "leave out one of the two" in refused(capsys, train.main, *arguments)
    assert not (tmp_path / "export").exists()


def test_the_registry_gets_the_model_of_all_folds(demo, tmp_path):
    run(demo, tmp_path / "out", "--folds", 2, "--epochs", 1, "--registry", tmp_path / "registry")
    (folder,) = (tmp_path / "registry").iterdir()
    assert len(load(folder / "model.pth").members) == 2
    assert read_json(folder / "metrics.json")["split"] == "folds"


def test_a_bad_image_is_left_out_of_the_report(demo, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    bad = sorted((data / "images").iterdir())[7]
    bad.write_bytes(b"no image")
    report = run(data, tmp_path / "out", "--folds", 2, "--epochs", 1)
    assert report["images"] == 79
    assert bad.name not in names_in(tmp_path / "out" / "predictions.csv")
    assert bad.name in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Stopped, killed, resumed, replaced


def check_same_runs(a, b):
    """Check that two folders hold the same run. config.json and so on say when, where and whether it was resumed."""
    one, other = files_of(a), files_of(b)
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith("model.pth"):
            assert same_models(a / name, b / name)
        elif not name.endswith(("last.pth", "config.json", "history.csv")):
            assert one[name] == other[name], name


def test_a_run_of_folds_that_is_killed_many_times_ends_as_one_that_never_was(make_rows, tmp_path):
    data = make_rows([f"{i % 2} {int(i % 5 == 0)}" for i in range(24)])
    arguments = ["--data", str(data), "--folds", "3", *RUN]
    check_same_runs(*kill_often(tmp_path, arguments, 6, delay=0.004, first="fold_1/last.pth"))


def test_a_stopped_run_goes_on_at_the_fold_that_was_stopped(plain, demo, tmp_path):
    with calls_at({10: interrupt}) as first, pytest.raises(KeyboardInterrupt):
        run(demo, tmp_path, "--folds", 3)
    assert not (tmp_path / "model.pth").exists() and not (tmp_path / "fold_3").exists()
    before = (tmp_path / "fold_1" / "last.pth").stat().st_mtime_ns
    with calls_at({}) as second:
        report = run(demo, tmp_path, "--folds", 3, "--resume")
    steps = sum(int(row["steps"]) for k in (1, 2, 3) for row in read_rows(plain[0] / f"fold_{k}" / "history.csv"))
    assert (len(first), len(second)) == (10, steps - 10)
    assert (tmp_path / "fold_1" / "last.pth").stat().st_mtime_ns == before
    assert report == plain[1]
    assert same_networks(networks(tmp_path / "model.pth"), networks(plain[0] / "model.pth"))


def test_resuming_a_finished_run_of_folds_changes_nothing(plain, demo, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain[0], out)
    before = files_of(out)
    assert run(demo, out, "--folds", 3, "--resume") == plain[1]
    check_same_runs(plain[0], out)
    after = files_of(out)
    for name in before:
        if name.endswith(("last.pth", "history.csv")):  # nothing was trained
            assert after[name] == before[name], name


def test_resuming_with_other_folds_or_labels_is_an_error_and_does_no_harm(plain, demo, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain[0], out)
    before = files_of(out)
    for more in (["--folds", 2], ["--folds", 4], ["--folds", 3, "--seed", 1]):
        with pytest.raises(InputError, match=r"last\.pth is of other splits"):
            run(demo, out, "--resume", *more)
        assert files_of(out) == before
    with pytest.raises(InputError, match=r"last\.pth is not there"):
        run(demo, tmp_path / "none", "--resume", "--folds", 3)
    with pytest.raises(InputError, match=r"last\.pth is not there"):
        run(demo, out, "--resume")
    assert files_of(out) == before


def test_resuming_with_more_epochs_trains_each_fold_on(plain, demo, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain[0], out)
    run(demo, out, "--folds", 3, "--resume", "--epochs", 3)
    assert epochs(out) == [(3, 3), (3, 3)]
    assert not same_networks(networks(out / "model.pth"), networks(plain[0] / "model.pth"))


def test_resuming_with_other_thresholds_changes_those_of_the_model(plain, demo, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain[0], out)
    report = run(demo, out, "--folds", 3, "--resume", "--thresholds", 0.9)
    assert set(load(out / "model.pth").thresholds) == {0.9}
    assert {row["threshold"] for row in report["per_class"].values()} == {0.9}
    assert same_networks(networks(out / "model.pth"), networks(plain[0] / "model.pth"))


def test_a_fresh_run_removes_the_folds_of_the_one_before(plain, demo, tmp_path, capsys):
    loud = [option for option in RUN if option != "-q"]
    out = tmp_path / "out"
    shutil.copytree(plain[0], out)
    (out / "notes.txt").write_text("mine")

    def look():
        left = [name for name in files_of(out) if not name.startswith("fold_1/")]
        seen.append(sorted(set(left) - {"config.json", "images.npz", "classes.json", "label_groups.json",
                                        "train_metadata.csv", "test_metadata.csv"}))
        interrupt()

    seen = []
    with calls_at({2: look}), pytest.raises(KeyboardInterrupt):
        train.main(["--data", str(demo), "--out", str(out), *loud, "--folds", "2", "--epochs", "1"])
    assert seen == [["notes.txt"]]
    assert f"the run that was in {out} is replaced" in capsys.readouterr().out
    assert not (out / "fold_3").exists()


def test_an_ordinary_run_removes_the_folds_of_the_one_before(plain, demo, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain[0], out)
    run(demo, out, "--epochs", 1)
    assert not any(name.startswith("fold_") for name in files_of(out))
    assert not list(out.glob("fold_*"))


def test_the_folder_of_folds_holds_one_run_at_a_time(demo, tmp_path, capsys):
    ended = []

    def start_another():
        for more in ([], ["--resume"], ["--folds", 2], ["--folds", 2, "--resume"]):
            before = files_of(tmp_path)
            ended.append(refused(capsys, train.main, "--data", demo, "--out", tmp_path, *RUN, *more, warns=True))
            assert files_of(tmp_path) == before

    with calls_at({4: start_another}):
        run(demo, tmp_path, "--folds", 2, "--epochs", 1)
    assert len(ended) == 4


# ----------------------------------------------------------------------------------------------------------
# Calibration of an ordinary run


def val_split(out, data):
    """Return the model of a run, its val split, and the logits of that, (N, C)."""
    classifier = load(out / "model.pth")
    table = labels_of(out / "val_metadata.csv", data)
    images = dataset.ImageDataset(table, 32)
    logits = inference.compute_logits(classifier, images, torch.float32, workers=0)
    assert logits.shape == (1, len(table), len(table.classes))
    return classifier, table, logits[0].double().numpy()


@pytest.mark.parametrize("more", [["--calibration", "none"], *(["--preset", name] for name in train.PRESETS
                                                               if name not in ("default", "resnet50"))])
def test_without_calibration_probabilities_are_the_sigmoid_of_the_logits(demo, tmp_path, more):
    run(demo, tmp_path, *more, "--epochs", 1, "--train-layers", "all")
    classifier, table, logits = val_split(tmp_path, demo)
    assert classifier.members[0].scale == 1
    assert set(classifier.members[0].offsets) == {0.0}
    probabilities = inference.predict(classifier, table.paths, workers=0)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_calibration_takes_pos_weight_back_and_lowers_the_log_loss_on_val(demo, tmp_path):
    run(demo, tmp_path)
    classifier, table, logits = val_split(tmp_path, demo)
    offsets = np.array(offsets_of(tmp_path, demo))
    assert np.abs(offsets).max() > 0.2
    plain = metrics.sigmoid(logits + offsets)
    scale, more = metrics.fit_calibration(table.targets, plain)
    member = classifier.members[0]
    assert member.scale == pytest.approx(scale, abs=1e-5)
    np.testing.assert_allclose(member.offsets, scale * offsets + more, atol=1e-4)
    probabilities = inference.predict(classifier, table.paths, workers=0)
    log_loss = metrics.log_loss(table.targets, probabilities)
    assert log_loss <= metrics.log_loss(table.targets, plain) + 1e-6
    assert log_loss <= metrics.log_loss(table.targets, metrics.sigmoid(logits))


# ----------------------------------------------------------------------------------------------------------
# Two runs, compared


def compare(capsys, folders, reports):
    """Check that metrics.py A B --paired shows what the two runs reported."""
    text = metrics.main([*map(str, folders), "--paired"])
    assert capsys.readouterr().out == text + "\n"
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:] if "known positives" not in line}
    assert {"f1_macro", "map", "log_loss"} <= lines.keys()
    for name, cells in lines.items():
        shown = [float(cell) for cell in cells[:3]]
        assert shown[:2] == pytest.approx([report[name] for report in reports], abs=6e-4), name
        assert shown[2] == pytest.approx(reports[1][name] - reports[0][name], abs=6e-4), name
        if cells[3] == "none":
            continue
        low, high = (float(cell.strip("[],")) for cell in cells[3:5])
        assert low <= shown[2] <= high
        assert (cells[-1] == "noise") == (low <= 0 <= high)


def test_two_runs_of_the_same_data_are_compared_by_what_they_report(trained, demo, tmp_path, capsys):
    report = run(demo, tmp_path / "b", "--lr", 1e-2, "--head", "mlp")
    compare(capsys, [trained[0], tmp_path / "b"], [trained[1], report])
    run(demo, tmp_path / "c", "--epochs", 1, "--seed", 1)
    with pytest.raises(ValueError, match="other images"):
        metrics.main([str(trained[0]), str(tmp_path / "c"), "--paired"])


def test_two_runs_of_folds_are_compared_by_what_they_report(plain, demo, tmp_path, capsys):
    report = run(demo, tmp_path, "--folds", 3, "--epochs", 1, "--thresholds", "pr_curve")
    compare(capsys, [plain[0], tmp_path], [plain[1], report])
