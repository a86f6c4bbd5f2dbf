"""The README's cells run as they stand there."""

import re
import sys
from types import SimpleNamespace

from PIL import Image

import dataset
import inference
from conftest import ROOT


def test_colab_cells_run_word_for_word(in_folder, monkeypatch):
    """In order, in one process. Only the download of the ImageNet weights and the notebook's display are replaced."""
    dataset.write_demo(in_folder / "data", count=40)
    initial = inference.build_model("resnet18", "linear", 1000).state_dict()
    monkeypatch.setattr(inference, "_download", lambda backbone: initial)
    shown = []
    notebook = SimpleNamespace(Image=Image.open, display=lambda image: shown.append(image.size))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(cells) == 3
    space = {}
    for cell in cells:
        exec(compile(cell, "README.md", "exec"), space)
    assert 0 <= space["report"]["f1_macro"] <= 1 and (in_folder / "outputs" / "predictions.csv").exists()
    assert len(shown) == 3 + 4 and shown[0] == (900, 840)


def test_pictures_of_the_readme_are_there_and_small():
    names = re.findall(r"tests/pictures/\w+\.\w+", (ROOT / "README.md").read_text())
    assert len(names) == 3 and sum((ROOT / name).stat().st_size for name in names) < 300_000
