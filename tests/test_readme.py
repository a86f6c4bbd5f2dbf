"""The README's cells run in a notebook word for word; its options and pictures exist; it is short."""

import inspect
import re
import shutil

import nbclient
import nbformat
import pytest

import dataset
import inference
import metrics
import train
from conftest import ROOT, use_small_networks

README = (ROOT / "README.md").read_text(encoding="utf-8")
CELLS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# Tests cannot download the ImageNet weights, so random ones take their place; nor do they have minutes.
SETUP = inspect.getsource(use_small_networks) + """
use_small_networks()

import os
from pathlib import Path
import torch
from torchvision import models
os.environ["TORCH_HOME"] = "torch"
os.makedirs("torch/hub/checkpoints")
name = Path(models.ResNet18_Weights.DEFAULT.url).name
torch.save(models.resnet18().state_dict(), f"torch/hub/checkpoints/{name}")
"""

OWN_CELLS = {
    "no data": 'train.main(["--data", "nowhere"])',
    "wrong option": 'train.main(["--frobnicate"])',
    "wrong image": 'inference.main(["nowhere.jpg"])',
    "help": 'train.main(["--help"])',
}


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Run a notebook in a folder with the four files and data; return the folder and {cell: its outputs}."""
    folder = tmp_path_factory.mktemp("notebook")
    for name in ("dataset.py", "inference.py", "metrics.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    dataset.write_demo(folder / "data", count=40)

    sources = [SETUP, *CELLS, *OWN_CELLS.values()]
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = nbclient.NotebookClient(content, timeout=300, kernel_name="python3", allow_errors=True,
                                     resources={"metadata": {"path": str(folder)}})
    client.execute()
    names = ["setup", *range(len(CELLS)), *OWN_CELLS]
    return folder, {name: cell.outputs for name, cell in zip(names, content.cells)}


def printed(outputs, stream="stdout"):
    """Return the text that a cell printed."""
    streams = [output for output in outputs if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == stream)


def errors(outputs):
    return [output for output in outputs if output.output_type == "error"]


def test_the_cells_of_the_readme_run_word_for_word(notebook):
    folder, outputs = notebook
    assert len(CELLS) >= 3
    for name in ("setup", *range(len(CELLS))):
        assert not errors(outputs[name]), name
    assert (folder / "outputs" / "predictions.csv").exists()
    images = 0
    for name in range(len(CELLS)):
        images += sum("image/png" in output.get("data", {}) for output in outputs[name])
    assert images >= 3 + 4


def test_a_notebook_shows_progress_within_an_epoch(notebook):
    text = "".join(printed(notebook[1][name]) for name in range(len(CELLS)))
    within = re.findall(r"\repoch 1/10  image (\d+)/(\d+)  loss \d", text)
    assert within
    assert int(within[0][0]) < int(within[0][1])
    assert len(re.findall(r"\repoch +\d+/10  loss .*val loss", text)) == 10
    assert "f1_macro" in text


@pytest.mark.parametrize("cell, message", [("no data", "nowhere is not a folder"),
                                           ("wrong option", "unrecognized arguments: --frobnicate"),
                                           ("wrong image", "nowhere.jpg does not exist")])
def test_a_wrong_input_is_one_line_in_a_notebook(notebook, cell, message):
    (error,) = errors(notebook[1][cell])
    lines = "\n".join(error.traceback).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_help_in_a_notebook_is_that_of_the_script(notebook):
    assert printed(notebook[1]["help"]).startswith("usage: train.py ")


def test_every_option_of_the_readme_is_there(capsys):
    known = {"--standalone", "--nproc-per-node"}  # of torchrun
    for main in (train.main, inference.main, dataset.main, metrics.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known.update(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - known == set()


def test_every_preset_is_in_the_readme():
    for name in set(train.PRESETS) - {"default"}:
        assert f"--preset {name}" in README


def test_pictures_of_the_readme_are_there_and_small():
    names = re.findall(r"tests/pictures/\w+\.(?:png|jpg)", README)
    assert len(names) >= 3
    assert sum((ROOT / name).stat().st_size for name in names) < 300_000


def test_the_readme_is_at_most_14_kilobytes_and_its_links_lead_somewhere():
    assert len(README.encode()) <= 14 * 1024
    links = re.findall(r"\]\(([\w/.]+)", README)
    assert links and all((ROOT / link).exists() for link in links)
