"""Large data: which images are the same, what --resume need not read again, and the memory that reading takes."""

import os
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dataset
import train
from conftest import SMALL

# ----------------------------------------------------------------------------------------------------------
# Which images are the same

# Of one size, and equal up to 64 KB; and small ones.
LONG = st.sampled_from([b"a" * 70_000, b"a" * 69_999 + b"b", b"b" + b"a" * 69_999, b"a" * 70_001])
CONTENTS = st.one_of(st.binary(max_size=2), LONG)


@given(st.lists(CONTENTS, max_size=12))
def test_files_are_the_same_if_their_bytes_are(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for i, content in enumerate(contents):
        (folder / str(i)).write_bytes(content)
        paths.append(str(folder / str(i)))

    expected = [contents.index(content) if content else i for i, content in enumerate(contents)]
    assert dataset.identify_images(paths).firsts.tolist() == expected


def test_a_file_that_cannot_be_read_is_the_same_as_no_other(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()  # which can be looked at, but not read
    paths = [str(tmp_path / name) for name in ("a", "b", "missing", "missing too")]
    assert dataset.identify_images(paths).firsts.tolist() == [0, 1, 2, 3]


def test_keys_are_those_of_each_image_alone(tmp_path):
    contents = {"a": b"12", "b": b"34", "alone": b"567", "same": b"12"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in contents]
    table = dataset.LabelTable(list(contents), paths, np.zeros((4, 1), np.float32), ["x"])

    alone = [dataset.image_key(path) for path in paths]
    table.keys = dataset.identify_images(paths).keys
    assert dataset.image_keys(table).tolist() == alone
    table.keys = None
    assert dataset.image_keys(table).tolist() == alone


def test_a_few_images_are_read_at_the_same_time():
    together = threading.Barrier(8, timeout=2)
    dataset._map_in_threads(lambda _: together.wait(), [f"{i}.jpg" for i in range(40)], "looking at images")


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 3200, 3333])
def test_what_threads_find_is_in_the_order_of_the_images(count):
    paths = [f"{i}.jpg" for i in range(count)]
    assert dataset._map_in_threads(str.upper, paths, "looking at images") == list(map(str.upper, paths))


# ----------------------------------------------------------------------------------------------------------
# What --resume need not read again


@pytest.fixture
def stopped(demo, tmp_path):
    """Return the options of a run that has trained for one of two epochs, and can be resumed."""
    options = ["--data", str(demo), "--out", str(tmp_path / "out"), *SMALL]
    train.main([*options, "--epochs", "1"])
    return [*options, "--epochs", "2", "--resume"]


def refuse(*_):
    raise AssertionError("an image was read")


def test_a_resumed_run_compares_no_images_again(stopped, monkeypatch):
    monkeypatch.setattr(dataset, "image_key", refuse)
    monkeypatch.setattr(dataset, "_digest", refuse)
    train.main(stopped)


@pytest.mark.parametrize("size", [None, 0, 100, 10_000])
def test_a_run_is_resumed_although_what_it_found_about_images_is_lost(stopped, size, tmp_path):
    before = train.read_identities(tmp_path / "out" / "images.npz")
    if size is None:
        os.unlink(tmp_path / "out" / "images.npz")
    else:
        os.truncate(tmp_path / "out" / "images.npz", size)
    train.main(stopped)
    after = train.read_identities(tmp_path / "out" / "images.npz")
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


def test_keys_that_an_older_version_left_out_are_found(demo):
    paths = dataset.read_labels(demo).paths
    known = dataset.identify_images(paths)
    older = known._replace(keys=np.where(np.arange(len(paths)) == 1, 0, known.keys))
    assert np.array_equal(dataset.identify_images(paths, older).keys, known.keys)


def test_a_damaged_file_of_identities_is_as_good_as_none(tmp_path):
    path = tmp_path / "images.npz"
    saved = dataset.Identities("stamp", np.arange(3), np.arange(3, dtype=np.uint64))
    train.write_identities(path, saved)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 33]) + content[place + 1 :])
        found = train.read_identities(path)
        assert not found or found.stamp != "stamp" or all(map(np.array_equal, found, saved))

    for save in (np.save, np.savez_compressed):  # what somebody else wrote
        with open(path, "wb") as file:
            save(file, np.arange(3))
        assert train.read_identities(path) is None


def test_images_that_have_changed_are_compared_again(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path, content in zip(paths, (b"12", b"34")):
        with open(path, "wb") as file:
            file.write(content)
        os.utime(path, (1, 1))
    before = dataset.identify_images(paths)
    assert dataset.identify_images(paths, before) is before

    with open(paths[1], "wb") as file:
        file.write(b"12")
    after = dataset.identify_images(paths, before)
    assert (before.firsts.tolist(), after.firsts.tolist()) == ([0, 1], [0, 0])
    assert dataset.identify_images(paths[:1], before) is not before


def test_processes_other_than_the_leader_read_no_images(monkeypatch):
    identities = dataset.Identities("", np.arange(1), np.zeros(1, np.uint64))

    def broadcast(found):
        assert found == [None]
        found[0] = identities

    monkeypatch.setattr(train, "is_leader", lambda: False)
    monkeypatch.setattr(train.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(train.distributed, "broadcast_object_list", broadcast)
    assert train.identify_images(train.parse_options([]), ["missing.jpg"]) is identities


# ----------------------------------------------------------------------------------------------------------
# Time and memory of reading


def test_reading_takes_a_few_times_the_memory_of_its_result(tmp_path):
    rows, classes = 4000, 80
    labels = np.random.default_rng(0).choice(["0", "1", "NA"], (rows, classes))
    (tmp_path / "images").mkdir()
    for row in range(rows):
        (tmp_path / "images" / f"{row}.jpg").touch()
    lines = [",".join([f"{row}.jpg", *cells]) for row, cells in enumerate(labels)]
    titles = ",".join(["image", *(f"class {c}" for c in range(classes))])
    (tmp_path / "labels.csv").write_text("\n".join([titles, *lines]))

    tracemalloc.start()
    try:
        table = dataset.read_labels(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(table.targets, np.where(labels == "NA", "nan", labels).astype(np.float32))
    assert peak < 6 * table.targets.nbytes  # 4 MB of what it reads at once are no matter for a million rows


def test_cells_that_name_no_image_need_no_index_of_the_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "abc":
        (tmp_path / "images" / f"{name}.jpg").touch()
    folder = dataset.ImageFolder(tmp_path / "images", tmp_path)
    assert not any(folder.names_image(cell) for cell in ("0", "1", "NA", "x/0", "d.jpg.txt"))
    assert not folder._tails
    assert folder.names_image("x/a")
