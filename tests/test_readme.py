"""The README's cells run as they stand there."""

import re

import dataset
import inference
from conftest import ROOT


def test_colab_cells_run_word_for_word(in_folder, monkeypatch):
    """In order, in one process. Only the download of the ImageNet weights is replaced."""
    dataset.write_demo(in_folder / "data", count=40)
    initial = inference.build_model("resnet18", "linear", 1000).state_dict()
    monkeypatch.setattr(inference, "_download", lambda backbone: initial)
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(cells) >= 3
    space = {}
    for cell in cells:
        exec(compile(cell, "README.md", "exec"), space)
    assert 0 <= space["report"]["f1_macro"] <= 1 and (in_folder / "outputs" / "predictions.csv").exists()
