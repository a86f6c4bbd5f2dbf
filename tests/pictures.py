"""Draw the pictures of the README into tests/pictures/, from a run on the demo data.

    python train.py --demo && python tests/pictures.py outputs

It needs Debian's chromium and chromium-driver, or those of another system.
"""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import inference  # noqa: E402
import metrics  # noqa: E402


def review_page(classifier, table, probabilities, folder):
    """Return a picture of a review page on which the first of 100 questions shows its heatmap."""
    unknown = np.full(table.targets.shape, np.nan)
    questions = [dataset.Question(table.ids[row], table.paths[row], table.classes[c], np.nan, probabilities[row, c])
                 for row, c in metrics.choose_questions(unknown, probabilities, 100, 2, 40)]

    heat = functools.partial(inference.named_heatmaps, classifier)
    inference.write_review(folder / "review.html", questions, heat, "Questions about data/")
    options = webdriver.ChromeOptions()
    for switch in ("--headless=new", "--no-sandbox", f"--user-data-dir={folder / 'profile'}", "--window-size=900,700"):
        options.add_argument(switch)
    with webdriver.Chrome(options, Service(shutil.which("chromedriver"))) as browser:
        browser.get((folder / "review.html").as_uri())
        ActionChains(browser).send_keys("h").perform()
        browser.save_screenshot(str(folder / "review.png"))
    return Image.open(folder / "review.png").convert("RGB")


def main(out):
    """Draw the pictures of the run in the folder `out`."""
    classifier = inference.load_model(out / "model.pth")
    table = dataset.read_labels(classifier.options["data"], out / "test_metadata.csv")

    probabilities = inference.predict(classifier, table.paths)

    # The heatmap shows an image whose labels are all right: about three of them, the rare one included.
    said, hole = probabilities >= classifier.thresholds, classifier.classes.index("hole")
    right = ((said == table.targets) | np.isnan(table.targets)).all(axis=1) & said[:, hole]
    best = int(np.argmin(np.where(right, abs(said.sum(axis=1) - 3), 99)))

    with tempfile.TemporaryDirectory() as folder:
        heatmap = inference.save_pictures(classifier, [table.paths[best]], probabilities[[best]], folder, True)[0]
        pictures = {
            "loss_curve.png": Image.open(out / "loss_curve.png").quantize(64),
            "predictions.jpg": inference.mistakes_sheet(table, probabilities, classifier.thresholds, 6),
            "heatmap.jpg": Image.open(heatmap),
            "review.png": review_page(classifier, table, probabilities, Path(folder)).quantize(128),
        }

        for name, picture in pictures.items():
            path = ROOT / "tests" / "pictures" / name
            with dataset.atomic_write(path, "wb") as file:
                picture.save(file, "PNG" if name.endswith("png") else "JPEG", optimize=True, quality=75)
            print(path, picture.size, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
