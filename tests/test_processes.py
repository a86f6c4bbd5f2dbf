"""Several processes train as one does.

Compared is what is equal by mathematics, so that no processor's way of rounding decides: the first step in single
precision, and whole runs in double precision, each with one thread as torchrun sets it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import inference
from conftest import ROOT, SMALL

# Runs the cases one after the other. "double": in float64; "frozen": with BatchNorm in eval mode, since its statistics
# are those of a share of the batch. Each rank keeps the gradients of its first step, and what it validated with.
SCRIPT = """
import json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from torch import nn
from PIL import Image
import conftest, inference, train

conftest.use_small_networks()
for module, name in conftest.CHARTS:
    setattr(module, name, lambda *_: Image.new("RGB", (1, 1)))

def sums(tensors):
    return {{name: tensor.double().sum().item() for name, tensor in tensors}}

build_model, forward, train_mode = inference.build_model, inference.forward, train.train_mode
compute_logits, adam_step = inference.compute_logits, torch.optim.AdamW.step

def frozen_statistics(network, *rest):
    train_mode(network, *rest)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

def keep_gradients(optimizer, *rest):
    if not kept["gradients"]:
        kept["gradients"] = [p.grad.double().norm().item() for g in optimizer.param_groups for p in g["params"]
                             if p.grad is not None]
    return adam_step(optimizer, *rest)

def keep_statistics(classifier, *rest):
    state = classifier.network.state_dict()
    kept["validated with"].append(sums((n, t) for n, t in state.items() if "running" in n))
    return compute_logits(classifier, *rest)

torch.optim.AdamW.step, inference.compute_logits = keep_gradients, keep_statistics
for name, arguments in json.load(open({cases!r})).items():
    double = "double" in name
    inference.build_model = (lambda *a, **k: build_model(*a, **k).double()) if double else build_model
    inference.forward = (lambda network, x, _: network(x.double())) if double else forward
    train.train_mode = frozen_statistics if "frozen" in name else train_mode
    kept = {{"gradients": [], "validated with": []}}
    kept["report"] = train.main(arguments)
    rank = os.environ.get("RANK", "0")
    json.dump(kept, open(arguments[arguments.index("--out") + 1] + "/kept_" + rank + ".json", "w"))
"""

CASES = {
    "double frozen": ["--augment", "flip", "--epochs", "2"],
    "double frozen, head only": ["--train-layers", "head", "--augment", "none", "--epochs", "2"],
    "double frozen, unfreezes": ["--train-layers", "head", "--unfreeze", "layer4", "--unfreeze-epoch", "2", "--sampler",
                                 "balanced", "--augment", "flip", "--epochs", "2", "--sam", "0.2"],
    "single frozen": ["--augment", "flip", "--epochs", "1"],
    "single": ["--augment", "flip", "--epochs", "2", "--lr", "3e-3"],
}


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """Return {(processes, case): the folder of a finished run}.

    Of every second image one label alone is known, so that the ranks know unequally many.
    """
    folder = tmp_path_factory.mktemp("processes")
    (folder / "images").symlink_to(demo / "images")
    lines = (demo / "labels.txt").read_text().splitlines()
    for i in range(1, len(lines), 2):
        name, first, *rest = lines[i].split()
        lines[i] = " ".join([name, first, *["NA"] * len(rest)])
    (folder / "labels.txt").write_text("\n".join(lines))

    made = {}
    for processes in (1, 2):
        cases = {}
        for case, options in CASES.items():
            made[processes, case] = folder / f"{processes} {case}"
            cases[case] = ["--data", str(folder), "--out", str(made[processes, case]), *SMALL, *options]
        cases_file = folder / f"{processes}.json"
        cases_file.write_text(json.dumps(cases))

        script = folder / f"{processes}.py"
        script.write_text(SCRIPT.format(root=str(ROOT), cases=str(cases_file)))
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, env=one_thread)
        assert done.returncode == 0, done.stderr
    return made


def losses(folder):
    return inference.read_checkpoint(folder / "last.pth")["state"]["losses"].tolist()


def kept(folder, rank=0):
    return json.loads((folder / f"kept_{rank}.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if "double" in case])
def test_two_processes_have_the_losses_of_one(runs, case):
    one = losses(runs[1, case])
    assert len(one) == 8
    np.testing.assert_allclose(losses(runs[2, case]), one, rtol=1e-9)
    for name, value in kept(runs[1, case])["report"].items():
        if isinstance(value, float):
            assert kept(runs[2, case])["report"][name] == pytest.approx(value, rel=1e-6, nan_ok=True), name


def test_the_first_step_of_two_processes_has_the_loss_and_the_gradients_of_one(runs):
    one, two = runs[1, "single frozen"], runs[2, "single frozen"]
    assert losses(two)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    gradients = np.array(kept(one)["gradients"])
    assert len(gradients) == 38
    np.testing.assert_allclose(kept(two)["gradients"], gradients, rtol=1e-5, atol=1e-5 * gradients.max())


def test_all_processes_validate_with_the_same_statistics(runs):
    first, second = (kept(runs[2, "single"], rank)["validated with"] for rank in (0, 1))
    assert len(first) >= 2 and first == second
    saved = inference.read_checkpoint(runs[2, "single"] / "last.pth")["network"]
    last = {name: tensor.double().sum().item() for name, tensor in saved.items() if "running" in name}
    assert last in first
