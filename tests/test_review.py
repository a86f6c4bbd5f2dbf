"""The review page, in a browser: what a person sees, what keys and buttons do, and what the download holds."""

import base64
import functools
import html
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image, ImageCms
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import dataset
import inference
from dataset import InputError, Question

# No window, no first-run pages, and nothing that the browser itself would ask the network for.
SWITCHES = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"]

DESKTOP, PHONE = (1280, 800), (390, 844)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start one browser for all tests; it is required where CI is set, and optional elsewhere."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        reason = "chromium and chromedriver are not installed"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in [*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(switch)
    with webdriver.Chrome(options, Service(driver)) as browser:  # with a path, selenium looks for no driver
        yield browser


class Page:
    """A review page in the browser, as a person uses it."""

    def __init__(self, browser, folder):
        self.browser = browser
        self.folder = folder
        (folder / "blank.html").write_text("<!DOCTYPE html>")
        self.open("blank.html")
        browser.execute_script("localStorage.clear()")  # which all files share
        self.show()
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", {
            "behavior": "allow", "downloadPath": str(folder / "downloads")})

    def open(self, name):
        self.browser.get((self.folder / name).as_uri())

    def write(self, questions, *arguments, name="review.html", **options):
        """Write a page, and open it."""
        inference.write_review(self.folder / name, questions, *arguments, **options)
        self.open(name)
        return self

    def show(self, size=DESKTOP, dark=False):
        """Change the size of the window and the color scheme."""
        send = self.browser.execute_cdp_cmd
        send("Emulation.setDeviceMetricsOverride", {
            "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size != DESKTOP})
        send("Emulation.setTouchEmulationEnabled", {"enabled": size != DESKTOP})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        send("Emulation.setEmulatedMedia", {"features": [scheme]})

    def find(self, name):
        return self.browser.find_element(By.CSS_SELECTOR, f".lr-{name}")

    def text(self, name):
        return self.browser.execute_script(
            "return document.querySelector(arguments[0]).textContent", f".lr-{name}")

    def button(self, name):
        return self.browser.find_element(By.CSS_SELECTOR, f"[data-do={name}]")

    def press(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def click(self, name):
        self.button(name).click()

    def choose(self, name, text):
        Select(self.find(name)).select_by_visible_text(text)

    def done(self):
        """Return how many cards are answered."""
        return int(self.text("progress").split()[0])

    def card(self):
        """Return the label of the card, or None on the end screen."""
        return self.text("label") if self.find("card").is_displayed() else None

    def answered(self):
        """Return the names of the answer buttons that are marked as pressed."""
        return self.browser.execute_script("""
            return [...document.querySelectorAll(".lr-answers [aria-pressed=true]")].map(one => one.dataset.do)""")

    def download(self):
        """Press the button for the download, and return the file."""
        path = self.folder / "downloads" / "answers.csv"
        path.unlink(missing_ok=True)
        self.click("download")
        deadline = time.monotonic() + 10
        # Chromium makes an empty file of that name first, and renames the whole one to it at the end.
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        return path


@pytest.fixture
def page(browser, tmp_path):
    """Return a Page in an empty folder."""
    return Page(browser, tmp_path)


@pytest.fixture
def photo(tmp_path):
    """Return the path of a small photograph."""
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 48), (90, 120, 60)).save(path)
    return str(path)


@pytest.fixture
def three(photo):
    """Return three questions: two suspects and a question."""
    return [Question("a.jpg", photo, "rust", 1.0, 0.0712), Question("b.jpg", photo, "crack", 0.0, 0.9312),
            Question("c.jpg", photo, "rust", math.nan, 0.5)]


def content(path):
    """Return the data of a page."""
    text = path.read_text(encoding="ascii")
    return json.loads(re.search(r'class="lr-data">(.*?)</script>', text)[1])


def embedded(image):
    """Open an image of a page."""
    return Image.open(io.BytesIO(base64.b64decode(image["file"])))


def same(a, b):
    """Compare tuples in which NaN equals NaN."""
    return repr(a) == repr(b)


# ----------------------------------------------------------------------------------------------------------
# Cards, keys and buttons


def test_a_card_asks_in_words_and_says_what_the_file_and_the_network_say(page, photo):
    chances = [(1.0, 0.0712, "7% present"), (0.0, 0.9312, "93% present"), (math.nan, 0.5, "50% present"),
               (0.0, 0.9999, "over 99% present"), (1.0, 0.0001, "under 1% present"), (1.0, 0.4951, "50% present")]
    page.write([Question("a.jpg", photo, "rust", given, chance) for given, chance, _ in chances], title="<b>Title")
    for given, _, guess in chances:
        assert page.find("card").text.splitlines()[0] == "Is rust present?"
        assert page.text("given") == {1.0: "present", 0.0: "absent"}.get(given, "unknown")
        assert page.text("guess") == guess
        assert (page.text("name"), page.find("photo").get_attribute("alt")) == ("a.jpg", "a.jpg")
        page.press("s")
    assert page.text("title") == page.browser.title == "<b>Title"


KEYS = {"present": ["1", "y", "p", "P"], "absent": ["0", "n", "a", "N"], "unknown": ["u", "?", "U"],
        "back": ["b", Keys.ARROW_LEFT], "skip": ["s", Keys.ARROW_RIGHT], "clear": ["c"], "heatmap": ["h"]}


@pytest.mark.parametrize("by", ["keys", "buttons"])
def test_every_key_and_every_button_does_what_it_says(page, photo, by):
    def ways(name):
        """Return functions that do one thing, each in its own way."""
        if by == "buttons":
            return [functools.partial(page.click, name)]
        return [functools.partial(page.press, key) for key in KEYS[name]]

    def state():
        return page.card(), page.done(), page.answered()

    questions = [Question("a.jpg", photo, f"class {i}", 1.0, 0.1) for i in range(9)]
    page.write(questions, lambda _, labels: np.ones((len(labels), 8, 8), np.float32))
    back, skip, clear = (itertools.cycle(ways(name)) for name in ("back", "skip", "clear"))
    for name in ("present", "absent", "unknown"):
        for do in ways(name):
            do()
            assert state() == ("class 1", 1, [])
            next(back)()
            assert state() == ("class 0", 1, [name])
            next(clear)()
            assert state() == ("class 0", 0, [])
    for _ in range(2):
        next(skip)()
        assert state() == ("class 1", 0, [])
        next(back)()

    for shown in (True, False):
        ways("heatmap")[0]()
        assert page.find("heat").is_displayed() is shown
    assert state() == ("class 0", 0, [])


def test_an_answer_can_be_changed(page, three):
    page.write(three).press("1", "b", "0", "b")
    assert (page.card(), page.answered(), page.done()) == ("rust", ["absent"], 1)
    assert [answer.answer for answer in dataset.read_answers(page.download())] == [0.0]


def test_after_an_answer_the_next_open_card_is_shown_and_at_the_end_a_screen_with_the_commands(page, photo):
    page.write([Question(f"{i}.jpg", photo, "rust", 1.0, 0.1) for i in range(4)])
    page.press("s", "1", "1", "1")
    assert page.text("name") == "0.jpg"  # the one that was skipped
    page.press("s")
    assert page.text("result") == '3 of 4 are answered: "back" shows the one that is left'
    page.press("b")
    assert page.text("name") == "0.jpg"

    page.press("?")
    assert page.text("result") == "All 4 are answered: download the answers"
    assert "python dataset.py DATA --answers answers.csv --out labels_new.csv" in page.find("end").text
    assert "python train.py --data DATA --answers answers.csv" in page.find("end").text
    assert not page.find("answers").is_displayed()

    # There is nothing to answer here, and the way back is that on which one came.
    page.press("1", "c", "s", "h")
    assert page.done() == 4
    for name in ("0.jpg", "3.jpg", "2.jpg", "1.jpg"):
        page.press("b")
        assert page.text("name") == name
    page.press("0")
    assert page.card() is None


def test_back_leads_to_earlier_cards_after_a_reload_too(page, three):
    page.write(three).press("1", "0")
    page.browser.refresh()
    assert page.text("name") == "c.jpg"
    page.press("b")
    assert (page.text("name"), page.answered()) == ("b.jpg", ["absent"])
    page.press("b", "b")
    assert (page.text("name"), page.button("back").is_enabled()) == ("a.jpg", False)


def test_keys_with_ctrl_keys_that_are_held_and_keys_in_a_select_answer_nothing(page, three):
    page.write(three)
    ActionChains(page.browser).key_down(Keys.CONTROL).send_keys("u").key_up(Keys.CONTROL).perform()
    page.browser.execute_script("""
        document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "1", repeat: true, bubbles: true}));""")
    page.find("class").send_keys("c")  # chooses crack
    assert (page.done(), page.card()) == (0, "crack")

    # After a choice the keys work again, and after a click on a button that is gone then.
    page.press("1")
    assert (page.done(), page.card()) == (1, None)
    page.click("back")
    page.click("clear")
    page.press("0")
    assert page.done() == 1


def test_filters_by_class_and_by_kind(page, three):
    page.write(three)
    assert [option.text for option in Select(page.find("class")).options] == [
        "all classes (3)", "crack (1)", "rust (2)"]
    assert [option.text for option in Select(page.find("kind")).options] == [
        "all kinds (3)", "questions (1)", "suspects (2)"]

    # A choice begins with its first open card, and "back" does not leave it.
    page.press("s", "s")
    page.choose("class", "rust (2)")
    assert (page.text("name"), page.button("back").is_enabled()) == ("a.jpg", False)
    page.press("1")
    assert page.text("name") == "c.jpg"
    page.press("0")
    assert page.text("result") == "All 2 are answered: choose others above, or download the answers"
    page.press("b", "c")
    page.choose("kind", "suspects (2)")
    assert page.text("result") == "The only one is answered: choose others above, or download the answers"
    page.choose("class", "crack (1)")
    assert page.text("name") == "b.jpg"
    page.choose("kind", "questions (1)")
    assert page.text("result") == "There is nothing to answer here"
    page.choose("class", "all classes (3)")
    assert (page.text("name"), page.text("progress")) == ("c.jpg", "1 of 3 answered")

    page.write(three[:2], name="suspects.html")
    assert not page.find("kind").is_displayed()


def test_a_heatmap_lies_over_the_photo_and_is_missing_where_no_region_was_found(page, photo):
    asked = []

    def heat(path, labels):
        asked.append((path, labels))
        values = np.zeros((len(labels), 64, 64), np.float32)
        values[:, 40:56, 4:12] = 1  # below, at the left
        values[labels.index("dent")] = 0
        return values

    (page.folder / "bad.jpg").write_bytes(b"no image")
    questions = [Question("a.jpg", photo, label, 1.0, 0.1) for label in ("rust", "dent", "crack")]
    page.write([*questions, Question("bad.jpg", str(page.folder / "bad.jpg"), "rust", 1.0, 0.1)], heat)
    assert asked == [(photo, ["rust", "dent", "crack"])]

    page.press("h")
    assert page.find("heat").rect == page.find("photo").rect
    assert page.find("photo").value_of_css_property("filter") == "grayscale(1)"
    assert page.find("heat").get_attribute("alt") == "heatmap of rust"
    with Image.open(io.BytesIO(base64.b64decode(content(page.folder / "review.html")["cards"][0][-1]))) as glow:
        alpha = np.asarray(glow)[..., 3]
        assert (alpha.shape, glow.mode) == ((28, 28), "RGBA")
    assert alpha[21, 3] == alpha.max() == 170
    assert alpha[:14].max() == alpha[:, 14:].max() == 0

    page.press("s")
    assert (page.button("heatmap").is_enabled(), page.find("heat").is_displayed()) == (False, False)
    page.press("h", "s")  # a key does no more than its button, and heatmaps stay on
    assert page.find("heat").is_displayed()

    page.write(questions, name="without.html")
    assert not page.button("heatmap").is_displayed()


# ----------------------------------------------------------------------------------------------------------
# Answers that are kept


def test_answers_outlast_a_reload_and_belong_to_their_question_alone(page, three):
    page.write(three).press("1", "u")
    page.browser.refresh()
    assert (page.done(), page.text("name"), page.find("note").is_displayed()) == (2, "c.jpg", False)
    page.press("b")
    assert page.answered() == ["unknown"]

    # The page of a later run shows them too, with other probabilities and in another order.
    assert page.write(three, name="copy.html").done() == 2
    later = [one._replace(probability=0.3) for one in reversed(three)]
    assert page.write(later, name="later.html").done() == 2
    assert page.write([three[0]._replace(given=0.0), *three[1:]], name="given.html").done() == 1
    assert page.write([three[0]._replace(label="moss"), *three[1:]], name="label.html").done() == 1
    assert page.write([three[0]._replace(path="other.jpg"), *three[1:]], name="path.html").done() == 1


def test_whatever_the_browser_holds_the_page_works(page, three):
    page.write(three)
    key = "label-review " + content(page.folder / "review.html")["cards"][0][5]
    for stored in ("", "{", "null", "7", '"abc"', "1", "constructor", "__proto__"):
        page.browser.execute_script("localStorage.clear(); localStorage.setItem(...arguments)", key, stored)
        page.browser.refresh()
        kept = int(stored == "1")
        assert page.done() == kept
        page.press("0")
        assert page.done() == kept + 1


def test_a_double_click_answers_one_card(page, three):
    page.write(three)
    ActionChains(page.browser).double_click(page.button("present")).perform()
    assert page.done() == 1
    page.click("absent")
    assert page.done() == 2


def test_two_tabs_with_the_same_page_share_their_answers(page, three):
    page.write(three)
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    try:
        page.open("review.html")
        page.press("1")
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)
    deadline = time.monotonic() + 5
    while page.done() != 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    page.press("s", "0")
    page.browser.refresh()
    assert page.done() == 2


def test_without_local_storage_everything_works_and_the_page_warns_before_answers_are_lost(page, three):
    inference.write_review(page.folder / "review.html", three)
    source = html.escape((page.folder / "review.html").read_text())
    (page.folder / "frame.html").write_text(
        f'<iframe sandbox="allow-scripts allow-downloads" style="width: 100%; height: 750px" srcdoc="{source}">')
    page.open("frame.html")
    page.browser.switch_to.frame(0)

    def warns():
        return page.browser.execute_script(
            'const leaving = new Event("beforeunload", {cancelable: true}); return !window.dispatchEvent(leaving)')

    assert page.find("note").text == "This browser does not save your answers: download them before closing the page."
    assert not warns()
    page.click("present")
    page.press("0", "b")
    assert (page.done(), page.answered(), warns()) == (2, ["absent"], True)
    page.choose("class", "rust (2)")
    page.press("u")
    answers = dataset.read_answers(page.download())
    assert same([answer.answer for answer in answers], [1.0, 0.0, math.nan])
    assert not warns()


def test_where_answers_are_kept_nobody_is_asked_to_stay(page, three):
    page.write(three).press("1")
    assert page.browser.execute_script(
        'return window.dispatchEvent(new Event("beforeunload", {cancelable: true}))')


def test_in_a_notebook_two_pages_work_beside_other_elements(page, three):
    """As JupyterLab does it: the text becomes the content of an element, and then each script runs."""
    inference.write_review(page.folder / "review.html", three)
    (page.folder / "notebook.html").write_text("<h1>Notebook</h1><input><div></div><div></div>")
    page.open("notebook.html")
    style = """const {color, font, margin} = getComputedStyle(document.querySelector("h1"));
        return [color, font, margin]"""
    before = page.browser.execute_script(style)
    for cell in range(2):
        page.browser.execute_script("""
            const cell = document.querySelectorAll("div:not(div div, main div)")[arguments[0]];
            cell.innerHTML = arguments[1];
            for (const old of cell.querySelectorAll("script")) {
                const script = document.createElement("script");
                for (const {name, value} of old.attributes) script.setAttribute(name, value);
                script.textContent = old.textContent;
                old.replaceWith(script);
            }""", cell, (page.folder / "review.html").read_text())
    assert page.browser.execute_script(style) == before

    # Keys answer only where the focus is.
    progress = page.browser.find_elements(By.CSS_SELECTOR, ".lr-progress")
    page.browser.find_element(By.CSS_SELECTOR, "input").send_keys("1 0 u")
    assert [element.text for element in progress] == ["0 of 3 answered"] * 2
    page.browser.find_elements(By.CSS_SELECTOR, ".lr-card")[1].click()
    page.press("1", "0")
    assert [element.text for element in progress] == ["0 of 3 answered", "2 of 3 answered"]

    # They work on after a click on a button that is disabled then, or gone.
    second = page.browser.find_elements(By.CSS_SELECTOR, ".lr-page")[1]
    second.find_element(By.CSS_SELECTOR, "[data-do=present]").click()
    page.press("b")
    assert second.find_element(By.CSS_SELECTOR, ".lr-name").text == "c.jpg"
    second.find_element(By.CSS_SELECTOR, "[data-do=clear]").click()
    assert progress[1].text == "2 of 3 answered"
    page.press("1")
    assert progress[1].text == "3 of 3 answered"


# ----------------------------------------------------------------------------------------------------------
# The download


HOSTILE = [
    "<script>window.hacked=1</script>", "</script>", "</script x", "<!--", "<!-- <script x", "-->", "]]>", "&amp;",
    "<img src=x onerror=window.hacked=1>", '","', '"', 'say "no"', "'", "two\nlines", "rust; crack", "=1+1", "null",
    "__proto__", "constructor", "hasOwnProperty", "all classes", "{{DATA}}", "{{GENERATOR}}", "$&", "`${1}`", "\\u003c",
    "a\u2028b\u2029c", "\u202eabc", "\N{GRINNING FACE}", "\N{LATIN SMALL LETTER E}\N{COMBINING ACUTE ACCENT}"]


def test_hostile_names_are_shown_as_they_are_and_read_back_from_the_download(page, photo):
    questions = [Question(f"{i} {name}", photo, name, (1.0, 0.0, math.nan)[i % 3], i / 100)
                 for i, name in enumerate(HOSTILE)]
    page.write(questions)
    for i, name in enumerate(HOSTILE):
        assert (page.text("label"), page.text("name")) == (name, f"{i} {name}")
        assert page.find("photo").get_attribute("alt") == f"{i} {name}"
        page.press("10us"[i % 4])

    # Each class can be chosen, even one that is called like the choice of all.
    for name in ("__proto__", "constructor", "all classes", "</script>"):
        Select(page.find("class")).select_by_index(1 + sorted(HOSTILE).index(name))
        assert page.card() == (name if HOSTILE.index(name) % 4 == 3 else None)
    assert page.browser.execute_script("return window.hacked") is None

    values = [1.0, 0.0, math.nan]
    expected = [(one.name, one.label, one.given, values[i % 4]) for i, one in enumerate(questions) if i % 4 < 3]
    assert same([tuple(answer[:4]) for answer in dataset.read_answers(page.download())], expected)
    assert dataset.holds_questions(page.folder / "downloads" / "answers.csv")


def test_the_download_without_answers_is_byte_for_byte_what_write_questions_writes(page, photo):
    rng = random.Random(0)
    letters = "ab ,\"'\n;\t<>&\\\u00e9\u2028\N{GRINNING FACE}\N{PAPERCLIP}\u4e2d="
    names = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(150)]
    questions = [Question(f"{i}{name}", photo, name, rng.choice([1.0, 0.0, math.nan]), rng.random())
                 for i, name in enumerate(names)]
    dataset.write_questions(page.folder / "questions.csv", questions)
    downloaded = page.write(questions).download().read_bytes()
    assert downloaded == (page.folder / "questions.csv").read_bytes()


# ----------------------------------------------------------------------------------------------------------
# The file: how many cards, what images, nothing else


def test_the_first_200_questions_get_a_card_and_the_page_says_if_there_are_more(page, photo):
    questions = [Question(f"{i}.jpg", photo, "rust", 1.0, 0.1) for i in range(812)]
    page.write(questions)
    assert page.find("total").text == "Showing the first 200 of 812 questions."
    assert page.text("progress") == "0 of 200 answered"
    assert [card[0] for card in content(page.folder / "review.html")["cards"]] == [f"{i}.jpg" for i in range(200)]

    page.write(questions[:200])
    assert page.text("total") == ""
    assert "contains the images" in page.browser.find_element(By.TAG_NAME, "footer").text
    page.write(questions[:201])
    assert "200 of 201" in page.text("total")


def test_a_page_without_questions_says_so(page):
    page.write([])
    assert (page.text("progress"), page.text("result")) == ("0 of 0 answered", "There is nothing to answer here")


def test_200_large_photographs_fit_into_5_megabytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    encoded = []
    for i in range(4):
        noise = Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8))
        noise.resize((1200, 900), Image.Resampling.NEAREST).save(tmp_path / f"{i}.jpg", quality=70)
        encoded.append(inference._encode_image(tmp_path / f"{i}.jpg"))

    # Four of them stand for all, as it takes ten seconds to encode 200.
    monkeypatch.setattr(inference, "_encode_image", lambda path: encoded[int(path) % 4])
    questions = [Question(f"{i}.jpg", str(i), "rust", 1.0, 0.1) for i in range(200)]
    heat = np.float32(rng.random((64, 64)))
    inference.write_review(tmp_path / "review.html", questions, lambda path, labels: heat[None])
    assert 2_000_000 < os.path.getsize(tmp_path / "review.html") <= 5_000_000
    ((width, height),) = {embedded(image).size for image in content(tmp_path / "review.html")["images"]}
    assert width >= 200
    assert height == width * 3 / 4


def test_images_are_as_large_as_the_limit_allows(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", compress_level=1)
    question = Question("a.png", str(tmp_path / "a.png"), "rust", 1.0, 0.1)
    sizes = []
    for limit in (10_000_000, 300_000, 100_000, 50_000):
        monkeypatch.setattr(inference, "REVIEW_BYTES", limit)
        inference.write_review(tmp_path / "review.html", [question])
        assert os.path.getsize(tmp_path / "review.html") <= limit
        sizes.append(max(embedded(content(tmp_path / "review.html")["images"][0]).size))
    assert sizes[0] == 960
    assert sizes == sorted(set(sizes), reverse=True)

    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")  # a small image is not enlarged
    inference.write_review(tmp_path / "review.html", [question])
    assert embedded(content(tmp_path / "review.html")["images"][0]).size == (30, 20)


def test_an_image_is_embedded_once_upright_and_without_what_the_camera_wrote(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    exif[0x010F] = "the camera's maker"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (60, 40), "green").save(path, exif=exif, comment="a secret", icc_profile=profile, xmp=b"a secret")
    with Image.open(path) as image:
        assert (image.getexif()[0x0112], image.info["comment"]) == (6, b"a secret")

    questions = [Question("turned.jpg", str(path), label, 1.0, 0.1) for label in "abc"]
    inference.write_review(tmp_path / "review.html", questions)
    (image,) = content(tmp_path / "review.html")["images"]
    jpeg = embedded(image)
    assert (jpeg.format, jpeg.size, image["ratio"]) == ("JPEG", (40, 60), 40 / 60)
    assert not dict(jpeg.getexif())
    assert {*jpeg.info} == {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_an_image_that_cannot_be_read_is_replaced_by_the_reason(page, photo):
    (page.folder / "bad.jpg").write_bytes(b"no image")
    names = ["bad.jpg", "missing.jpg"]
    page.write([*(Question(name, str(page.folder / name), "rust", 1.0, 0.1) for name in names),
                Question("good.jpg", photo, "rust", 1.0, 0.1)])
    assert page.find("reason").text == (
        "This image cannot be shown: not an image in a readable format such as JPEG or PNG")
    assert not page.find("photo").is_displayed()
    page.press("1")
    assert page.find("reason").text == "This image cannot be shown: No such file or directory"
    page.press("1")
    assert (page.find("reason").is_displayed(), page.find("photo").is_displayed()) == (False, True)
    assert str(page.folder) not in (page.folder / "review.html").read_text()


def test_the_page_refers_to_no_other_host_and_lets_nothing_out(page, three):
    assert not re.search(r"https?:|//[a-z]|url\(|@import", inference.REVIEW_PAGE)
    page.browser.get_log("browser")  # what other tests left
    page.write(three, lambda _, labels: np.ones((len(labels), 8, 8), np.float32)).press("h", "1", "s")
    loaded = page.browser.execute_script("return performance.getEntries().map(entry => entry.name)")
    assert not [name for name in loaded if "http" in name]
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]

    # Even a script that got in by some mistake could send nothing away.
    blocked = page.browser.execute_async_script("""
        const done = arguments[0], blocked = [];
        document.addEventListener("securitypolicyviolation", event => {
            blocked.push(event.effectiveDirective);
            if (blocked.length === 2) done(blocked);
        });
        new Image().src = "https://host.invalid/";
        fetch("https://host.invalid/").catch(() => {});""")
    assert sorted(blocked) == ["connect-src", "img-src"]


def test_only_an_earlier_review_page_is_replaced(tmp_path, three):
    path = tmp_path / "review.html"
    inference.write_review(path, three)
    assert inference._is_review(path)
    inference.write_review(path, three[:1])
    assert len(content(path)["cards"]) == 1
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".jpg"] == ["review.html"]

    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.html").write_text("<!DOCTYPE html><p>my notes")
    for name in ("folder", "notes.html"):
        with pytest.raises(InputError, match=rf"{name} exists and is not a review page: name another --out"):
            inference.write_review(tmp_path / name, three)
    assert (tmp_path / "notes.html").read_text() == "<!DOCTYPE html><p>my notes"
    assert not inference._is_review(tmp_path / "folder")
    assert not inference._is_review(tmp_path / "none.html")


# ----------------------------------------------------------------------------------------------------------
# What it looks like


@pytest.mark.parametrize("size", [DESKTOP, PHONE, PHONE[::-1], (320, 568)], ids=str)
def test_image_and_buttons_are_on_the_screen_without_scrolling_and_large_enough_for_a_thumb(page, size):
    for name, shape in (("wide", (1600, 900)), ("tall", (900, 1600))):
        Image.new("RGB", shape).save(page.folder / f"{name}.jpg")
    label = "corrosion of the lower left bracket" if size != (320, 568) else "rust"
    questions = [Question("a.jpg", str(page.folder / f"{name}.jpg"), label, (1.0, math.nan)[i], 0.1)
                 for i, name in enumerate(("wide", "tall"))]
    page.show(size)
    page.write(questions * 101, lambda _, labels: np.ones((len(labels), 8, 8), np.float32))
    for _ in questions:
        for element in page.browser.find_elements(By.CSS_SELECTOR, "main button, main select, .lr-photo, footer"):
            if not element.is_displayed():
                continue
            box = page.browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
            assert box["left"] >= 0 and box["right"] <= size[0]
            assert box["top"] >= 0 and box["bottom"] <= size[1]
            assert box["height"] >= 44 or element.tag_name in ("img", "footer")
            assert element.tag_name != "img" or abs(box["width"] / box["height"] - page.browser.execute_script(
                "return arguments[0].naturalWidth / arguments[0].naturalHeight", element)) < 0.02

        photo = page.find("photo").rect
        assert photo["width"] * photo["height"] > size[0] * size[1] / 15
        page.press("s")
    assert page.browser.execute_script("""
        const page = document.querySelector("main"), all = document.documentElement;
        return page.scrollHeight === page.clientHeight && all.scrollWidth === innerWidth""")
    hints = page.browser.find_elements(By.TAG_NAME, "kbd")
    assert {hint.is_displayed() for hint in hints} == {size == DESKTOP}


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_what_is_behind_them(page, three, dark):
    page.show(dark=dark)
    page.write(three, lambda _, labels: np.ones((len(labels), 8, 8), np.float32)).press("1", "b", "h")

    def luminance(color):
        values = np.array([int(number) for number in re.findall(r"\d+", color)[:3]]) / 255
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def check():
        found = page.browser.execute_script("""
            const all = [...document.querySelectorAll("main :not(script, option, :disabled, :disabled *)")].filter(
                one => one.checkVisibility() && [...one.childNodes].some(node => node.nodeType === 3));
            return all.map(one => {
                let behind = one;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [one.className, getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
            });""")
        assert len(found) > 8
        for name, *colors in found:
            low, high = sorted(map(luminance, colors))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, colors)

    check()
    page.press("1", "1", "1")
    assert page.card() is None
    check()
    background = page.browser.execute_script("return getComputedStyle(document.querySelector('main')).backgroundColor")
    assert (luminance(background) < 0.1) == dark
