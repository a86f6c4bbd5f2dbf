"""Several processes train as one does, stop together, and end when one of them does.

One process and two are compared in what is equal by mathematics, so that no processor's way of rounding decides: the
first step in single precision, and whole runs in double precision, each with one thread as torchrun sets it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import inference
from conftest import ROOT, SMALL, read_json, same_tensors, tensors

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
    return inference.read_checkpoint(folder / "last.pth")["state"]["losses"]


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


# Starts the processes as forks of one that has imported everything, with the variables that torchrun sets. Their steps
# are slow. Prints what became of them, as JSON.
FORKS = """
import json, os, random, signal, socket, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import conftest, dataset, train
import torchvision.models
from PIL import Image

conftest.use_small_networks()
for module, name in conftest.CHARTS:
    setattr(module, name, lambda *_: Image.new("RGB", (1, 1)))
train_step, prepare_folder = train.train_step, train.prepare_folder

def refuse(run):
    raise dataset.InputError("only the leader knows")

def start(out, seconds, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reader, writer = os.pipe()
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1]:
            continue
        os.environ |= {{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}}
        os.dup2(os.open(f"{{out}}_{{rank}}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)

        def slow_step(*batch):
            os.write(writer, str(rank).encode())
            time.sleep(seconds)
            return train_step(*batch)

        train.train_step = slow_step
        if out == "refused":
            train.prepare_folder = refuse
        code = 0
        try:
            dataset.run_command(lambda: train.main([*{arguments!r}, "--out", out, *more]))
        except SystemExit as ended:
            code = ended.code
        os._exit(code)
    os.close(writer)
    return pids, reader

def ended(pids):
    began = time.time()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, time.time() - began

def read_steps(reader):
    return os.read(reader, 10_000).decode()

result = {{"whole": ended(start("whole", 0)[0])}}
rng = random.Random(0)
result["stops"] = []
for number, asked in enumerate(([1], [0, 1])):  # the leader alone does not know, or torchrun tells both
    pids, reader = start("parts", 0.2, *["--resume"] * (number > 0))
    read_steps(reader)
    time.sleep(rng.uniform(0, 0.5))
    read_steps(reader)
    for rank in asked:
        os.kill(pids[rank], signal.SIGTERM)
    codes, seconds = ended(pids)
    steps = read_steps(reader)
    result["stops"].append([codes, max(steps.count("0"), steps.count("1"))])
result["parts"] = ended(start("parts", 0, "--resume")[0])

pids, reader = start("killed", 0.2)
read_steps(reader)
os.kill(pids[1], signal.SIGKILL)
result["killed"] = ended(pids)
result["refused"] = ended(start("refused", 0)[0])
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def forks(demo, tmp_path_factory):
    """Return the folder in which FORKS ran, and what it printed."""
    folder = tmp_path_factory.mktemp("forks")
    # Each batch is divided into 10 and 9 images, for which dropout draws unequally many numbers.
    arguments = ["--data", str(demo), "--epochs", "2", "-b", "20", "--head", "mlp", "--sam", "0.1", "--train-layers",
                 "layer4,head", "--unfreeze", "all", "--unfreeze-epoch", "2", *SMALL]
    script = FORKS.format(root=str(ROOT), arguments=arguments)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_two_processes_that_are_stopped_and_resumed_end_as_those_that_never_were(forks):
    folder, result = forks
    assert result["whole"][0] == result["parts"][0] == [0, 0]
    for codes, steps in result["stops"]:
        assert codes == [143, 143]
        assert steps <= 2
    stopped = (folder / "parts_0.txt").read_text()
    assert "error" not in stopped

    whole, parts = folder / "whole", folder / "parts"
    assert losses(parts) == losses(whole)
    for name in ("model.pth", "last.pth"):
        assert same_tensors(tensors(parts / name), tensors(whole / name))
    assert read_json(parts / "metrics.json") == read_json(whole / "metrics.json")


def test_a_process_ends_with_a_message_when_another_one_is_killed(forks):
    folder, result = forks
    codes, seconds = result["killed"]
    assert codes == [1, -9]
    assert seconds < 10
    [message] = (folder / "killed_0.txt").read_text().splitlines()
    assert message.startswith("error: another process of this run has ended")
    assert "--resume" in message


def test_an_error_of_one_process_ends_the_others(forks):
    folder, result = forks
    assert result["refused"][0] == [2, 1]
    assert result["refused"][1] < 20
    assert (folder / "refused_0.txt").read_text() == "error: only the leader knows\n"
    [message] = (folder / "refused_1.txt").read_text().splitlines()
    assert message.startswith("error: another process of this run has ended")
