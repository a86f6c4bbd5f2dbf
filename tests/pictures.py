"""Draw the pictures of the README into tests/pictures/, from a run on the demo data.

    python train.py --demo && python tests/pictures.py outputs
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import inference  # noqa: E402


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
        }

        for name, picture in pictures.items():
            path = ROOT / "tests" / "pictures" / name
            with dataset.atomic_write(path, "wb") as file:
                picture.save(file, "PNG" if name.endswith("png") else "JPEG", optimize=True, quality=75)
            print(path, picture.size, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
