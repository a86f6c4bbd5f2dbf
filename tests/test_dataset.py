"""Label files, splits and images."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset
from conftest import encoded
from dataset import InputError

NAN = float("nan")
TABLE = "a.jpg 1 NA 0\nb.jpg 0 1 ?\nc.jpg -1 nan 1.0\n"
TARGETS = [[1, NAN, 0], [0, 1, NAN], [NAN, NAN, 1]]


def same(table, targets=TARGETS, classes=("Attr1", "Attr2", "Attr3"), ids=("a.jpg", "b.jpg", "c.jpg")):
    np.testing.assert_array_equal(table.targets, np.array(targets, np.float32))
    return table.targets.dtype == np.float32 and table.classes == list(classes) and table.ids == list(ids)


# ---------------------------------------------------------------------------------------------------------------------
# The table format


def test_white_space_without_header(make_data):
    assert same(dataset.read_labels(make_data(TABLE)))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_csv_with_header_bom_and_any_line_end(make_data, delimiter, newline, bom):
    text = "image A B C\n" + TABLE.replace("?", "").replace(" nan", " ")
    text = text.replace(" ", delimiter).replace("\n", newline)
    assert same(dataset.read_labels(make_data(bom + text.encode(), name="labels.csv")), classes="ABC")


def test_quoted_cells_blank_lines_and_a_missing_last_line_end(make_data):
    text = '\nimage,"A, or so",B\n\n"a.jpg",1,0\nb.jpg , 0 , \n\n"c.jpg",NA,1'
    table = dataset.read_labels(make_data(text, name="labels.csv"))
    assert same(table, [[1, 0], [0, NAN], [NAN, 1]], ["A, or so", "B"])


def test_file_names_with_blanks_and_unicode(make_data):
    names = ["my photo.jpg", "Größe 2.jpg", "sub/c.jpg"]
    text = "my photo.jpg 1 0\nGröße 2.jpg 0 1\nsub/c.jpg NA 1\n"
    assert same(dataset.read_labels(make_data(text, names)), [[1, 0], [0, 1], [NAN, 1]], ["Attr1", "Attr2"], names)


def test_names_without_suffix_or_with_the_image_folder_are_found(make_data):
    table = dataset.read_labels(make_data("image A\na 1\nimages/b.jpg 0\n./c.jpg 1\n"))
    assert [path.rsplit("/")[-1] for path in table.paths] == ["a.jpg", "b.jpg", "c.jpg"]


def test_missing_images_are_dropped_and_named(make_data):
    table = dataset.read_labels(make_data(TABLE + "d.jpg 1 1 1\n"))
    assert table.missing == ["d.jpg"] and same(table)
    assert "4 rows, 3 images, 1 missing" in dataset.summary(table) and "missing: d.jpg" in dataset.summary(table)


def test_rows_that_agree_are_united_and_rows_that_contradict_are_an_error(make_data):
    table = dataset.read_labels(make_data(TABLE + "images/a.jpg NA 1 0\n"))
    assert same(table, [[1, 1, 0], *TARGETS[1:]]) and "1 rows name an image again" in table.warnings[0]
    with pytest.raises(InputError, match=r"labels.txt:4: a.jpg has another label for Attr3 than in line 1"):
        dataset.read_labels(make_data(TABLE + "a.jpg 1 1 1\n"))


def test_images_may_lie_in_the_data_folder_or_elsewhere(make_data, tmp_path):
    folder = make_data("a.jpg 1\nb.jpg 0\n")
    (folder / "images").rename(folder / "pictures")
    assert len(dataset.read_labels(folder, images=folder / "pictures")) == 2
    for file in (folder / "pictures").iterdir():
        file.rename(folder / file.name)
    assert len(dataset.read_labels(folder)) == 2


def test_label_groups_order_and_select_the_classes(make_data):
    folder = make_data("image bolt rust colour\n" + TABLE)
    (folder / "label_groups.json").write_text('{"parts": ["bolt", "nut"], "defects": ["rust"]}')
    table = dataset.read_labels(folder)
    assert table.groups == {"parts": ["bolt"], "defects": ["rust"]} and table.classes == ["bolt", "rust"]
    assert "1 classes are in no group of" in table.warnings[0] and "dropped: colour (1 times)" in table.warnings[0]


def test_a_group_column_names_the_object(make_data):
    folder = make_data("image,A,pipe\na.jpg,1,p1\nb.jpg,0,p2\nc.jpg,1,p1\n", name="labels.csv")
    table = dataset.read_labels(folder, group="pipe")
    assert table.objects == ["p1", "p2", "p1"] and table.classes == ["A"]
    with pytest.raises(InputError, match="no such column"):
        dataset.read_labels(folder, group="pump")


def test_no_label_file_or_several_is_an_error_that_lists_them(make_data, tmp_path):
    folder = make_data("a.jpg 1\n", name="one.txt")
    assert len(dataset.read_labels(folder)) == 1
    (folder / "two.csv").write_text("a.jpg,1\n")
    with pytest.raises(InputError, match=r"one.txt, two.csv.*--labels FILE"):
        dataset.read_labels(folder)
    assert len(dataset.read_labels(folder, labels=folder / "two.csv")) == 1
    with pytest.raises(InputError, match="is not a folder"):
        dataset.read_labels(tmp_path / "nowhere")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_fast_reader_agrees_with_the_careful_one(data):
    delimiter = data.draw(st.sampled_from([" ", ",", ";", "\t"]))
    words = st.sampled_from(["0", "1", "NA", "nan", "?", "-1", "1.0", "0.0", *([""] if delimiter != " " else [])])
    width = data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.lists(words, min_size=width, max_size=width), min_size=1, max_size=5))
    lines = [delimiter.join([f"x{i}.jpg", *row]) for i, row in enumerate(rows)]
    if data.draw(st.booleans()):  # damage one place
        line = data.draw(st.integers(0, len(lines) - 1))
        at = data.draw(st.integers(0, len(lines[line])))
        lines[line] = lines[line][:at] + data.draw(st.sampled_from(list('01N?, ;\t"A-.'))) + lines[line][at:]
    fast = dataset._plain_rows(lines, delimiter, 0, width)
    if fast is None:
        return
    header = [f"c{i}" for i in range(width)]
    careful = dataset._any_rows("file", lines, delimiter, 0, header, None)
    assert fast[0] == careful[0] and list(fast[1]) == careful[1]
    np.testing.assert_array_equal(fast[2], careful[2])


# ---------------------------------------------------------------------------------------------------------------------
# The lists format and the cls format

LISTS = """ID,components,defects,pipe
a,Centre Support;Channel Bracket,Loose,p1
b,component,defect,p2
a,Circular Connection,nan,p1
c,Components,Loose; Coating Failure,p3
d,Channel Bracket,,p3
"""


def test_lists_unite_the_rows_of_an_id_and_drop_placeholders(make_data):
    folder = make_data(LISTS, ("a.png", "b.jpg", "c.webp"), "image_data.csv")
    table = dataset.read_labels(folder, group="pipe")
    assert table.ids == ["a", "b", "c"] and table.missing == ["d"] and table.objects == ["p1", "p2", "p3"]
    assert table.groups == {"components": ["Centre Support", "Channel Bracket", "Circular Connection"],
                            "defects": ["Coating Failure", "Loose"]}
    assert table.classes == [name for names in table.groups.values() for name in names]
    assert table.targets.tolist() == [[1, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("single", [False, True])
def test_lists_with_valid_names_per_group(make_data, tmp_path, single):
    text = LISTS.replace(",p1", "").replace(",p2", "").replace(",p3", "").replace(",pipe", "")
    if single:
        text = "image_id,labels\na,Centre Support;Channel Bracket;Loose\nb,label\na,Circular Connection\nc,Loose;Coating Failure\n"  # noqa: E501
    folder = make_data(text, ("a.png", "b.jpg", "c.webp"), "image_data.csv")
    groups = {"components": ["Channel Bracket", "Centre Support", "Weld"], "defects": ["Loose"]}
    (tmp_path / "valid.json").write_text(str(groups).replace("'", '"'))
    table = dataset.read_labels(folder, label_groups=tmp_path / "valid.json")
    assert table.groups == groups and table.classes == ["Channel Bracket", "Centre Support", "Weld", "Loose"]
    assert table.targets.tolist() == [[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert "2 classes are in no group" in table.warnings[0]
    assert "Circular Connection (1 times)" in table.warnings[0] and "Coating Failure (1 times)" in table.warnings[0]


def test_bad_lists(make_data, tmp_path):
    folder = make_data("ID,parts,defects\na,Bolt,Rust\nb,Rust,Bolt\n", name="image_data.csv")
    with pytest.raises(InputError, match=r"image_data.csv:3: Rust is in the columns defects and parts"):
        dataset.read_labels(folder)
    (folder / "image_data.csv").write_text("ID,parts\na,Bolt\nb,Bolt,Nut\n")
    with pytest.raises(InputError, match=r"image_data.csv:3: 3 cells, but the header has 2"):
        dataset.read_labels(folder)
    (folder / "image_data.csv").write_text("ID,parts\na,Bolt\n")
    (tmp_path / "g.json").write_text('{"defects": ["Bolt"]}')
    with pytest.raises(InputError, match="no column is named labels, or like one of the groups defects"):
        dataset.read_labels(folder, label_groups=tmp_path / "g.json")
    (folder / "image_data.csv").write_text("image,A\na,yes\nb,no\n")
    with pytest.raises(InputError, match=r"image_data.csv:2: 'yes' is not 0, 1 or NA"):
        dataset.read_labels(folder)
    for text in ('{"a": 1}', "[1]", '{"a": ["x"], "b": ["x"]}', "{", "[" * 100_000):
        (tmp_path / "g.json").write_text(text)
        with pytest.raises(InputError, match=r"g\.json"):
            dataset.read_labels(folder, label_groups=tmp_path / "g.json")


def test_cls_files(make_data):
    folder = make_data("bolt\nnut\n", ("train/1.jpg", "train/2.png", "val/1.jpg"), "classes.txt")
    for name, text in (("train/1", "1\n0\n\n1\n"), ("train/2", ""), ("val/1", "0"), ("val/2", "1")):
        file = folder / "labels" / f"{name}.cls"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    table = dataset.read_labels(folder)
    assert table.ids == ["train/1", "train/2", "val/1"] and table.missing == ["val/2"]
    assert table.classes == ["bolt", "nut"] and table.targets.tolist() == [[1, 1], [0, 0], [1, 0]]
    (folder / "classes.txt").unlink()
    assert dataset.read_labels(folder).classes == dataset.COCO_CLASSES and len(dataset.COCO_CLASSES) == 80
    (folder / "classes.json").write_text('{"classes": ["x"]}')
    with pytest.raises(InputError, match=r"train/1.cls:1: '1' is not a class index, 0 to 0"):
        dataset.read_labels(folder)


@pytest.mark.parametrize("style", ["lists", "cls"])
def test_the_demo_says_the_same_in_every_format(demo, tmp_path, style):
    dataset.write_demo(tmp_path, seed=0, count=80, style=style)
    table, other = dataset.read_labels(demo), dataset.read_labels(tmp_path)
    rows = [other.ids.index(name.split(".")[0]) for name in table.ids]
    assert other.classes == table.classes and other.missing == ["part_0080"]
    known = ~np.isnan(table.targets)
    assert (other.targets[rows][known] == table.targets[known]).all() and not np.isnan(other.targets).any()


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def fake_table(targets, objects=()):
    names = [str(i) for i in range(len(targets))]
    targets = np.array(targets, np.float32)
    return dataset.LabelTable(names, names, targets, list(range(targets.shape[1])), objects=list(objects))


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_split_is_a_partition_of_the_sizes_asked_for(method):
    table = fake_table(np.random.default_rng(0).random((400, 5)) < 0.3)
    parts = dataset.split(table, (0.7, 0.15, 0.15), method, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(400))
    assert [len(part) for part in parts] == pytest.approx([280, 60, 60], abs=4)
    assert all((a == b).all() for a, b in zip(parts, dataset.split(table, (70, 15, 15), method, seed=1)))
    assert (parts[0] != dataset.split(table, (0.7, 0.15, 0.15), method, seed=2)[0][: len(parts[0])]).any()
    parts = dataset.split(table, (0.8, 0.2, 0), method)
    assert len(parts[2]) == 0 and len(parts[1]) == pytest.approx(80, abs=4)


def test_stratification_brings_rare_classes_to_every_split():
    rng = np.random.default_rng(0)
    targets = (rng.random((600, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    parts = dataset.split(fake_table(targets))
    total = (targets == 1).sum(axis=0)
    for part, ratio in zip(parts, (0.7, 0.15, 0.15)):
        np.testing.assert_allclose((targets[part] == 1).sum(axis=0), ratio * total, atol=0.1 * total.max() * ratio + 1)
        assert ((targets[part] == 1).sum(axis=0) > 0).all()


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_images_of_one_object_stay_together(method):
    rng = np.random.default_rng(0)
    objects = [f"pipe{i}" for i in rng.integers(0, 60, 300)]
    parts = dataset.split(fake_table(rng.random((300, 3)) < 0.3, objects), method=method)
    seen = [{objects[row] for row in part} for part in parts]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert [len(part) for part in parts] == pytest.approx([210, 45, 45], abs=12)


def test_every_split_gets_something_or_it_is_an_error():
    assert [len(part) for part in dataset.split(fake_table([[1]] * 3))] == [1, 1, 1]
    with pytest.raises(InputError, match="2 images are too few for 3 splits"):
        dataset.split(fake_table([[1]] * 2))
    for ratios in ((0, 1, 0), (1, 0, 0), (0.5, -1, 0.5), (NAN, 1, 1)):
        with pytest.raises(InputError, match="--split takes three ratios"):
            dataset.split(fake_table([[1]] * 9), ratios)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def saved(image, kind, **options):
    return io.BytesIO(encoded(image, kind, **options))


@pytest.mark.parametrize("mode, colour", [
    ("RGBA", (200, 100, 50, 255)), ("L", 120), ("P", 3), ("1", 1), ("LA", (120, 255)), ("I;16", 30000),
    ("RGB", (9, 8, 7)),
])
def test_png_of_every_mode_becomes_rgb(mode, colour):
    image = dataset.load_image(saved(Image.new(mode, (20, 10), colour), "PNG"), 8)
    assert image.mode == "RGB" and image.size == (8, 8)


def test_values_of_odd_modes_are_right():
    pixel = lambda image: dataset.load_image(image).getpixel((0, 0))  # noqa: E731
    assert pixel(saved(Image.new("I;16", (4, 4), 128 * 256), "PNG")) == (128, 128, 128)
    assert pixel(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert pixel(saved(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG")) == (255, 255, 255)
    assert pixel(Image.new("RGB", (4, 4), (1, 2, 3))) == (1, 2, 3)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert pixel(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


def test_exif_orientation_is_applied():
    image, exif = Image.new("RGB", (40, 20), "black"), Image.Exif()
    image.paste("white", (0, 0, 20, 20))  # the left half, which orientation 6 turns to the top
    exif[0x0112] = 6
    upright = dataset.load_image(saved(image, "JPEG", exif=exif))
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[0] < 50


def test_draft_decoding_gives_nearly_the_same_picture(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    noise.resize((800, 600), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    fast = np.asarray(dataset.load_image(tmp_path / "a.jpg", 64), float)
    whole = np.asarray(dataset.load_image(tmp_path / "a.jpg").resize((64, 64), Image.Resampling.BILINEAR), float)
    assert np.abs(fast - whole).mean() < 2


def test_dataset_and_batches(demo):
    table = dataset.read_labels(demo)
    images = dataset.ImageDataset(table, 32, cache_bytes=10**9)
    image, targets, name = images[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert targets.dtype == torch.float32 and name == table.ids[3]
    np.testing.assert_array_equal(targets.numpy(), table.targets[3])
    order = np.array_split(np.arange(len(images))[::-1], 7)
    for workers in (0, 3):
        seen = list(dataset.batches(images, order, workers))
        assert [list(rows) for _, _, rows in seen] == [list(rows) for rows in order]
        for batch, targets, rows in seen:
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert all(torch.equal(batch[i], images[row][0]) for i, row in enumerate(rows))
            np.testing.assert_array_equal(targets.numpy(), table.targets[rows])
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    assert next(iter(loader))[0].shape == (4, 3, 32, 32)


def test_the_cache_holds_what_it_may(demo):
    table = dataset.read_labels(demo)
    for limit, count in ((0, 0), (3 * 224 * 224 * 5, 4), (10**9, 80)):
        images = dataset.ImageDataset(table, 224, cache_bytes=limit)
        first = [images[i][0] for i in range(80)]
        assert len(images._pixels) == count and sum(pixels.nbytes for pixels in images._pixels.values()) <= limit
        assert all(torch.equal(images[i][0], first[i]) for i in range(80))


def test_a_bad_image_counts_for_nothing_and_is_remembered(make_data):
    folder = make_data(TABLE)
    (folder / "images" / "b.jpg").write_bytes(b"no image")
    images = dataset.ImageDataset(dataset.read_labels(folder), 16)
    assert torch.isnan(images[1][1]).any() and list(images.errors) == [1] and "b.jpg" in images.errors[1]
    assert torch.isnan(images[1][1]).all() and not torch.isnan(images[0][1]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.mark.parametrize("names", [*dataset.LEVELS.values(), *([name] for name in dataset.OPERATIONS)])
def test_augmentation_keeps_shape_and_range_and_depends_on_its_noise_alone(names):
    images = torch.randint(0, 256, (6, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = dataset.draw_noise(6, seed=1, epoch=2)
    once = dataset.augment(images, names, noise)
    assert once.shape == images.shape and once.dtype == torch.float32 and once.min() >= 0 and once.max() <= 255
    torch.testing.assert_close(dataset.augment(images[4:5], names, noise[4:5]), once[4:5])
    if names:
        assert not torch.equal(once, images.float())


def test_flips_are_exact_and_sampling_without_a_change_is_the_identity():
    images = torch.rand(4, 3, 16, 16) * 255
    noise = torch.full((4, dataset.NOISE), 0.9)
    noise[:, 0] = torch.tensor([0.1, 0.9, 0.1, 0.9])
    flipped = dataset.augment(images, ["flip"], noise)
    assert torch.equal(flipped[0], images[0].flip(-1)) and torch.equal(flipped[1], images[1])
    sampled = dataset._sample(images, dataset._geometry(["flip"], noise))
    torch.testing.assert_close(sampled, flipped, atol=1e-2, rtol=0)


def test_unknown_operations_are_named():
    assert dataset.read_operations("flip,jitter") == ("flip", "jitter")
    with pytest.raises(InputError, match="'flipp' is not one of none, light"):
        dataset.read_operations("flipp")


# ---------------------------------------------------------------------------------------------------------------------
# Demo data and command line


def test_demo_is_deterministic_and_as_odd_as_real_life(demo, tmp_path):
    dataset.write_demo(tmp_path, seed=0, count=80)
    names = sorted(path.name for path in (demo / "images").iterdir())
    assert (demo / "labels.txt").read_bytes() == (tmp_path / "labels.txt").read_bytes()
    assert all((demo / "images" / name).read_bytes() == (tmp_path / "images" / name).read_bytes() for name in names)
    modes = {Image.open(demo / "images" / name).mode for name in names}
    assert modes == {"RGB", "RGBA", "L"} and {name[-3:] for name in names} == {"jpg", "png"}
    table = dataset.read_labels(demo)
    assert table.missing == ["part_0080.jpg"] and set(table.groups) == {"parts", "defects"}
    assert 0.04 < np.isnan(table.targets).mean() < 0.12


def test_demo_boxes_lie_in_the_picture_and_name_the_labels():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = dataset.draw_demo_labels(rng)
        image, boxes = dataset.draw_demo_image(labels, rng)
        assert set(boxes) == labels and image.size == (128, 128)
        for left, top, right, bottom in boxes.values():
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128


def test_command_line_summary_and_check(make_data, capsys):
    folder = make_data(TABLE)
    (folder / "images" / "b.jpg").write_bytes(b"no image")
    dataset.main([str(folder), "--check"])
    text = capsys.readouterr().out
    assert "3 rows, 3 images, 0 missing, 3 classes" in text
    assert "2 of 3 images decode" in text and "b.jpg: not an image" in text
    assert text.splitlines()[2].split() == ["Attr1", "1", "1", "1", "50.0%", "#######-------"]
    assert "Attr2" in text and "100.0%" in text
