"""Decoded images in memory: how many fit, and that splits, folds and processes decode none of them needlessly."""

import contextlib
import threading
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
import inference
import train
from conftest import SMALL, draw_images

pytestmark = pytest.mark.usefixtures("blank_pictures")

GIB = 2**30


def run(data, out, *options):
    """Train for an epoch with small settings, and return the report."""
    return train.main(["--data", str(data), "--out", str(out), "--epochs", "1", *SMALL, *map(str, options)])


@pytest.fixture
def decodes(monkeypatch):
    """Count how often each image is decoded in the size of the network: {path: number}."""
    load = dataset.load_image
    counted = Counter()

    def watched(image, size=None, **options):
        counted[image] += size is not None
        return load(image, size, **options)

    monkeypatch.setattr(dataset, "load_image", watched)
    monkeypatch.setattr(inference, "heatmaps", lambda _, image, labels: np.zeros((len(labels), 8, 8), np.float32))
    return counted


@pytest.fixture
def table(tmp_path):
    """Return a LabelTable of 20 images."""
    names = [f"{i}.png" for i in range(20)]
    draw_images(tmp_path, names)
    return dataset.LabelTable(names, [str(tmp_path / name) for name in names], np.ones((20, 1), np.float32), ["A"])


# ----------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize(("limit", "least", "most"), [(0, 0, 0), (5 * 3 * 64 * 64, 1, 5), (10**9, 20, 20)])
def test_the_cache_holds_what_it_may(table, decodes, limit, least, most):
    images = dataset.ImageDataset(table, 64, dataset.PixelCache(limit))
    first = [images[i][0] for i in range(20)]
    decodes.clear()
    assert all(torch.equal(images[i][0], first[i]) for i in range(20))
    assert 20 - most <= decodes.total() <= 20 - least


def test_datasets_that_share_a_cache_share_its_limit_and_its_images_of_their_size(table, decodes):
    cache = dataset.PixelCache(8 * (3 * 64 * 64 + dataset.CACHE_OVERHEAD))
    first, second = (dataset.ImageDataset(table.subset(rows), 64, cache) for rows in (range(12), range(6, 20)))
    for images in (first, second, first, second):
        for row in range(len(images)):
            images.pixels(row)
    counts = [decodes[path] for path in table.paths]
    assert counts == [1] * 8 + [4] * 4 + [2] * 8  # the first 8 are held; 4 more are in both

    small = dataset.ImageDataset(table, 32, dataset.PixelCache(10**9))
    other = dataset.ImageDataset(table, 48, small.cache)
    assert (small[3][0].shape, other[3][0].shape) == ((3, 32, 32), (3, 48, 48))


def test_threads_that_share_a_cache_keep_to_its_limit(table, monkeypatch):
    together = threading.Barrier(4)
    load = dataset.load_image

    def slow(image, size):
        together.wait(timeout=10)  # so that all four decode the same image
        return load(image, size)

    monkeypatch.setattr(dataset, "load_image", slow)
    cache = dataset.PixelCache(5 * (3 * 16 * 16 + dataset.CACHE_OVERHEAD))
    images = dataset.ImageDataset(table, 16, cache)
    for _ in dataset.batches(images, [[row] for row in (0, 0, 0, 0, 1, 1, 1, 1)], 4):
        pass
    monkeypatch.setattr(dataset, "load_image", load)
    for row in range(20):
        images.pixels(row)

    assert len(cache._held) == 5  # an image that four threads decoded takes the room of one


def test_an_unreadable_image_is_an_error_in_each_dataset_that_shares_a_cache(table, decodes, tmp_path):
    (tmp_path / "7.png").write_bytes(b"no image")
    cache = dataset.PixelCache(10**9)
    for rows in ([3, 7], [7, 8, 9]):
        images = dataset.ImageDataset(table.subset(rows), 32, cache)
        row = rows.index(7)
        for _ in range(2):
            assert torch.isnan(images[row][1]).all() and (images[row][0] == 127).all()
            assert list(images.errors) == [row] and "7.png" in images.errors[row]
    assert decodes[table.paths[7]] == 1


# ----------------------------------------------------------------------------------------------------------
# One cache for a run


@pytest.mark.parametrize("workers", [0, 2])
def test_three_folds_decode_each_image_once(few_images, tmp_path, decodes, workers):
    run(few_images, tmp_path / "out", "--folds", 3, "--epochs", 2, "--workers", workers)
    assert len(decodes) == 24 and set(decodes.values()) == {1}


def test_an_unreadable_image_is_left_out_of_every_fold(few_images, tmp_path, capsys):
    (few_images / "images" / "05.png").write_bytes(b"no image")
    report = run(few_images, tmp_path / "out", "--folds", 3)
    assert report["images"] == 23
    assert "05.png" not in (tmp_path / "out" / "predictions.csv").read_text()
    for k in (1, 2, 3):
        part = (tmp_path / "out" / f"fold_{k}" / "predictions.csv").read_text()
        assert "05.png" not in part
    assert capsys.readouterr().err.count("05.png") == 3


def test_images_of_test_take_no_room_in_the_cache(few_images, tmp_path, monkeypatch):
    closed = []
    close = dataset.PixelCache.close
    monkeypatch.setattr(dataset.PixelCache, "close", lambda cache: (closed.append(len(cache._held)), close(cache)))
    run(few_images, tmp_path / "out", "--split", 12, 6, 6)
    assert closed == [18]


@pytest.mark.parametrize("fails", [False, True])
def test_the_images_of_a_run_are_freed_when_it_ends_even_while_its_error_is_kept(
    few_images, tmp_path, monkeypatch, fails
):
    decoded = []
    load = dataset.load_pixels

    def watched(image, size):
        pixels = load(image, size)
        decoded.append(weakref.ref(pixels))
        return pixels

    def fail(*_):
        raise RuntimeError("no report")

    monkeypatch.setattr(dataset, "load_pixels", watched)
    if fails:
        monkeypatch.setattr(train, "write_report", fail)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext() as error:
        run(few_images, tmp_path / "out")
    assert len(decoded) == 24
    assert not any(reference() is not None for reference in decoded)
    assert (error is not None) == fails


# ----------------------------------------------------------------------------------------------------------
# Several processes


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.data())
def test_a_batch_is_divided_evenly_and_no_image_leaves_home_without_need(ranks, data):
    homes = np.array(data.draw(st.lists(st.integers(0, ranks - 1), max_size=30)), int)
    chosen = train.divide_batch(homes, ranks)
    sizes = [len(share) for share in np.array_split(homes, ranks)]
    assert np.bincount(chosen, minlength=ranks).tolist() == sizes
    for rank, size in enumerate(sizes):
        at_home = (chosen == rank) & (homes == rank)
        assert at_home.sum() == min(size, (homes == rank).sum())


def share_of(monkeypatch, rank, ranks, table, epoch, *options):
    """Return what train.draw_batches() gives to one of several processes."""
    monkeypatch.setattr(train, "rank_and_ranks", lambda: (rank, ranks))
    options = train.parse_options(["--batch-size", "32", *options])
    return train.draw_batches(SimpleNamespace(options=options, tables={"train": table}, state=train.State(epoch)))


def sorted_table(count):
    """Return a LabelTable whose second half has the label, without files."""
    names = [f"{i:05}.jpg" for i in range(count)]
    targets = (np.arange(count) >= count // 2).astype(np.float32)[:, None]
    return dataset.LabelTable(names, names, targets, ["A"])


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_several_processes_share_the_batches_of_one(monkeypatch, sampler):
    table = sorted_table(1003)
    whole = share_of(monkeypatch, 0, 1, table, 2, "--sampler", sampler)
    shares = [share_of(monkeypatch, rank, 3, table, 2, "--sampler", sampler) for rank in range(3)]
    for (rows, places, seen), *parts in zip(whole, *shares):
        assert {part[2] for part in parts} == {seen}
        assert sorted(np.concatenate([part[1] for part in parts])) == places.tolist()
        of_place = dict(zip(places.tolist(), rows.tolist()))
        assert all(of_place[place] == row for part in parts for row, place in zip(*map(np.ndarray.tolist, part[:2])))
        assert max(len(part[0]) for part in parts) - min(len(part[0]) for part in parts) <= 1


def test_a_process_sees_mostly_the_same_images_in_every_epoch_and_as_many_of_each_label(monkeypatch):
    table = sorted_table(1024)
    seen = Counter()
    for epoch in range(4):
        rows = np.concatenate([own for own, *_ in share_of(monkeypatch, 1, 2, table, epoch)])
        assert len(rows) == 512 and table.targets[rows].mean() == pytest.approx(0.5, abs=0.08)
        seen.update(rows.tolist())
    # By chance, it would see one image in 16 every time
    assert sum(count == 4 for count in seen.values()) > 350


def test_copies_of_an_image_that_the_balanced_sampler_draws_are_divided_among_the_processes(monkeypatch):
    table = sorted_table(1000)
    table.targets[1:] = 0
    table.targets[0] = 1  # half of all draws are this image
    for rows, *_ in share_of(monkeypatch, 1, 2, table, 0, "--sampler", "balanced"):
        assert 0 < (rows == 0).sum() < len(rows)


def test_the_home_of_an_image_does_not_depend_on_other_images():
    table = sorted_table(300)
    homes = train.home_ranks(table, 3)
    assert train.home_ranks(table.subset(np.arange(300)[::-2]), 3).tolist() == homes[::-2].tolist()
    assert (np.bincount(homes) > 70).all()
    assert not train.home_ranks(table, 1).any()


# ----------------------------------------------------------------------------------------------------------
# The automatic size


def write_tree(root, files, free=48 * GIB):
    """Write a /proc and a /sys below `root`: files is {path: text}."""
    for path, text in {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {free // 1024} kB\n", **files}.items():
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def version_1(folder, limit, used, droppable):
    """Return the files of a control group of version 1; sizes in GiB."""
    return {f"{folder}/memory.limit_in_bytes": f"{limit * GIB}\n", f"{folder}/memory.usage_in_bytes": f"{used * GIB}\n",
            f"{folder}/memory.stat": f"cache {GIB}\ninactive_file 5\ntotal_inactive_file {droppable * GIB}\n"}


def version_2(folder, limit, used, droppable, high="max"):
    """Return the files of a control group of version 2; sizes in GiB."""
    limit, high = (f"{size}\n" if size == "max" else f"{size * GIB}\n" for size in (limit, high))
    return {f"{folder}/memory.max": limit, f"{folder}/memory.high": high,
            f"{folder}/memory.current": f"{used * GIB}\n",
            f"{folder}/memory.stat": f"file {GIB}\nactive_file 7\ninactive_file {droppable * GIB}\n"}


GROUPS = "sys/fs/cgroup"
IN_VERSION_1 = {"proc/self/cgroup": "12:pids:/other\n7:cpu,memory:/user/job\n0::/\n"}
IN_VERSION_2 = {"proc/self/cgroup": "0::/user/job\n"}
NO_LIMIT = {"memory.limit_in_bytes": f"{2**63 - 4096}", "memory.usage_in_bytes": f"{30 * GIB}"}
TREES = {  # {name: (files, free GiB)}
    "no groups": ({}, 48),
    "version 1": (IN_VERSION_1 | version_1(f"{GROUPS}/memory/user/job", 16, 15, 10), 11),
    "version 1, limit above": (IN_VERSION_1 | version_1(f"{GROUPS}/memory/user/job", 16, 2, 0)
                               | version_1(f"{GROUPS}/memory/user", 8, 5, 1), 4),
    "version 1, seen from inside": (IN_VERSION_1 | version_1(f"{GROUPS}/memory", 2, 1, 0), 1),
    "version 1, no limit": (IN_VERSION_1 | {f"{GROUPS}/memory/{name}": text for name, text in NO_LIMIT.items()}, 48),
    "version 2": (IN_VERSION_2 | version_2(f"{GROUPS}/user/job", 16, 15, 10), 11),
    "version 2, limit above": (IN_VERSION_2 | version_2(f"{GROUPS}/user/job", "max", 2, 0)
                               | version_2(f"{GROUPS}/user", 8, 6, 1), 3),
    "version 2, tighter below": (IN_VERSION_2 | version_2(f"{GROUPS}/user/job", 4, 2, 0)
                                 | version_2(f"{GROUPS}/user", 8, 2, 0), 2),
    "version 2, high": (IN_VERSION_2 | version_2(f"{GROUPS}/user/job", 16, 4, 0, high=10), 6),
    "version 2, only high": (IN_VERSION_2 | version_2(f"{GROUPS}/user/job", "max", 4, 0, high=10), 6),
    "version 2, seen from inside": ({"proc/self/cgroup": "0::/\n"} | version_2(GROUPS, 2, 1, 0), 1),
    "version 2, outside of the mount": ({"proc/self/cgroup": "0::/../other\n"} | version_2(GROUPS, 2, 1, 0)
                                        | version_2("sys/fs/other", 1, 1, 0), 1),
    "version 2, no limit": (IN_VERSION_2 | version_2(f"{GROUPS}/user/job", "max", 30, 0), 48),
    "both, limit in version 1": (
        {"proc/self/cgroup": "4:memory:/job\n0::/job\n", f"{GROUPS}/unified/job/cgroup.procs": "1\n"}
        | version_1(f"{GROUPS}/memory/job", 16, 9, 0), 7),
    "both, limit in version 2": (
        {"proc/self/cgroup": "4:cpu:/job\n0::/job\n"} | version_2(f"{GROUPS}/unified/job", 16, 9, 0), 7),
    "more in use than the limit": (IN_VERSION_2 | version_2(f"{GROUPS}/user/job", 2, 3, 0), 0),
    "usage unknown": (IN_VERSION_2 | {f"{GROUPS}/user/job/memory.max": f"{16 * GIB}"}, 16),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_automatic_cache_takes_half_of_what_the_machine_and_its_groups_leave(tmp_path, tree):
    files, free = TREES[tree]
    assert train.cache_budget("auto", write_tree(tmp_path, files)) == free * GIB / 2


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\n", b"many\n", b"-\n\n", b"9" * 5000, b"inactive_file\n", None])
def test_damaged_files_of_the_system_never_raise(tmp_path, version, damage):
    good = (IN_VERSION_1 | version_1(f"{GROUPS}/memory/user/job", 16, 15, 10) if version == 1
            else IN_VERSION_2 | version_2(f"{GROUPS}/user/job", 16, 15, 10))
    for number, path in enumerate(["proc/meminfo", *good]):
        root = write_tree(tmp_path / str(number), good)
        (root / path).unlink()
        if damage is None:
            (root / path).mkdir()  # cannot be read as a file
        else:
            (root / path).write_bytes(damage)
        assert 0 <= train.cache_budget("auto", root) <= 24 * GIB


def test_without_a_proc_the_automatic_cache_is_cautious(tmp_path):
    assert train.cache_budget("auto", tmp_path) == 2 * GIB


@pytest.mark.parametrize("processes", [1, 2])
def test_the_processes_of_a_machine_share_the_automatic_cache_and_not_a_given_one(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    root = write_tree(tmp_path, IN_VERSION_2 | version_2(f"{GROUPS}/user/job", 16, 8, 0))
    assert train.cache_budget("auto", root) == 4 * GIB / processes
    assert train.cache_budget("0.5", root) == GIB / 2 and train.cache_budget("off", root) == 0


def test_all_folds_of_a_run_share_the_memory_that_it_may_use(few_images, tmp_path, monkeypatch):
    limits = []
    make = dataset.PixelCache
    monkeypatch.setattr(dataset, "PixelCache", lambda limit: limits.append(limit) or make(limit))
    run(few_images, tmp_path / "out", "--folds", 2, "--cache", "0.5")
    assert limits == [GIB / 2]
