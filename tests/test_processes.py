"""Several processes train as one does."""

import json
import math
import os
import subprocess
import sys

import pytest

from conftest import ROOT, SMALL
from dataset import read_labels

# Trains with every BatchNorm in eval mode, since its statistics are those of a process's own share of a batch.
SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
import train
from torch import nn
whole = train.train_mode
def frozen(network):
    whole(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
train.train_mode = frozen
losses = []
fit = train.fit
def keep(run):
    fit(run)
    losses.extend(run.losses)
train.fit = keep
report = train.main({arguments!r})
if train.is_leader():
    json.dump([losses, report], open({result!r}, "w"))
"""


def losses_of(processes, data, folder, *options):
    folder.mkdir()
    arguments = ["--data", str(data), "--out", str(folder / "out"), "--epochs", "2", *SMALL, *options]
    result = str(folder / "result.json")
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT), arguments=arguments, result=result))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # torchrun's own default: with another number of threads sums round differently, and Adam makes that grow
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder / "script.py")], capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    return json.load(open(result))


@pytest.mark.parametrize("options", [["--augment", "flip"], ["--train-layers", "head", "--augment", "none"]])
def test_two_processes_have_the_losses_of_one(demo, tmp_path, options):
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(demo / "images")
    lines = (demo / "labels.txt").read_text().splitlines()
    for i in range(1, len(lines), 2):  # every second image knows little, so that the ranks know unequally much
        name, first, *rest = lines[i].split()
        lines[i] = " ".join([name, first, *["NA"] * len(rest)])
    (data / "labels.txt").write_text("\n".join(lines))
    assert len(read_labels(data)) == 80
    one, report = losses_of(1, data, tmp_path / "one", *options)
    two, other = losses_of(2, data, tmp_path / "two", *options)
    assert len(one) == 8 and two == pytest.approx(one, abs=1e-5)
    assert other["map"] == pytest.approx(report["map"], abs=1e-3) and math.isfinite(report["loss"])
