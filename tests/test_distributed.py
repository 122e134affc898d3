"""Two processes train as one does; only the first one prints and writes; a mistake ends both."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, few, make_rows, run_script, save_model, write_rows

LAUNCH = Path(sys.executable).parent / "mlx.launch"
WEIGHTS = (1, 0.5, 2, 1, 0, 1.5)
TRAIN = "--model tiny --data data --batch-size 4 --grad-accumulation-steps 2 --epochs 2 --learning-rate 1e-3 --test"
TRAIN += " --steps-per-report 1 --steps-per-eval 2"


def free_ports(count):
    """Return the first of count free ports in a row, below those that the system gives away by itself."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first


def launch(count, folder, *words, script="dpo_trainer.py"):
    """Run a script in count processes; return their output, and the exit status of each that failed."""
    command = [LAUNCH, "--backend", "ring", "-n", count, "-p", free_ports(count), "--", sys.executable, ROOT / script]
    given = dict(cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*map(str, [*command, *words])], start_new_session=True, **given)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return out, err, re.findall(r"rank (\d+) exited with code (-?\d+)", err)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and data whose batches of 4 are never even: 11, 3 and 2 pairs, of different weights."""
    folder = tmp_path_factory.mktemp("distributed")
    save_model(folder / "tiny")
    (folder / "data").mkdir()
    rows = [row | {"weight": WEIGHTS[i % 6]} for i, row in enumerate(make_rows(16))]
    for name, part in (("train", rows[:11]), ("valid", rows[11:14]), ("test", rows[14:])):
        write_rows(folder / "data" / f"{name}.jsonl", part)
    return folder


def curve(folder):
    """Return metrics.jsonl as {(step, split): metrics}; no step may be there twice."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {(row.pop("step"), row.pop("split")): row for row in rows}
    assert len(found) == len(rows)
    return found


def same(one, two):
    """Compare every metric but the memory, and the adapters."""
    ours, theirs = curve(one), curve(two)
    assert list(ours) == list(theirs) and len(ours) > 3
    for place, metrics in ours.items():
        assert metrics.keys() == theirs[place].keys()
        at_first = {"rewards/accuracies"} if place[0] <= 1 else set()  # margins of rounding alone
        for name in metrics.keys() - {"peak_memory_gb"} - at_first:
            assert metrics[name] == pytest.approx(theirs[place][name], abs=1e-4, rel=1e-4), (place, name)
    ours, theirs = (mx.load(str(path / "adapters.safetensors")) for path in (one, two))
    assert ours.keys() == theirs.keys()
    assert max(mx.abs(ours[name] - theirs[name]).max().item() for name in ours) < 1e-4
    assert max(mx.abs(ours[name]).max().item() for name in ours if "lora_b" in name) > 1e-3  # it has learnt something


@pytest.mark.parametrize("script", few(["dpo_trainer.py", "simpo_trainer.py"], 1))
def test_two_processes_train_as_one_and_the_first_speaks(place, script):
    """In a last batch of 3 pairs the second process has one of its own; in one of 2 as well."""
    name = script.split("_")[0]
    alone = run_script(*TRAIN.split(), "--adapter-path", f"{name}-1", script=script, cwd=place)
    out, err, failed = launch(2, place, *TRAIN.split(), "--adapter-path", f"{name}-2", script=script)
    assert alone.returncode == 0 and not failed and "Traceback" not in err, err
    same(place / f"{name}-1", place / f"{name}-2")
    files = [sorted(path.name for path in (place / f"{name}-{count}").iterdir()) for count in (1, 2)]
    assert files[0] == files[1]
    words = [[re.sub(r"-?\d\S*", "#", line) for line in text.splitlines()] for text in (alone.stdout, out)]
    assert words[0] == words[1] and len(words[0]) > 8  # all but the digits, which rounding may change


@pytest.mark.slow
def test_a_process_without_a_pair(place):
    """Batches of 1, so that the second process never has one."""
    words = "--model tiny --data data --batch-size 1 --grad-accumulation-steps 3 --iters 4 --learning-rate 1e-3"
    words += " --steps-per-report 1 --adapter-path"
    assert run_script(*words.split(), "idle-1", cwd=place).returncode == 0
    assert not launch(2, place, *words.split(), "idle-2")[2]
    same(place / "idle-1", place / "idle-2")


@pytest.mark.slow
def test_two_resume_what_one_began(place):
    """At 3 of 4 updates, as if they had been two from the beginning."""
    words = "--model tiny --data data --batch-size 2 --learning-rate 1e-3 --save-every 1 --iters".split()
    assert run_script(*words, 3, "--adapter-path", "gone-on", cwd=place).returncode == 0
    assert not launch(2, place, *words, 4, "--adapter-path", "gone-on", "--resume")[2]
    facts = mx.load(str(place / "gone-on" / "checkpoint.safetensors"), return_metadata=True)[1]
    assert facts["step"] == "4" and {(3, "train"), (4, "train")} <= {*curve(place / "gone-on")}


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--data bad.jsonl", "--adapter-path file/out"])
def test_a_mistake_ends_all(place, words):
    """One that all see, and one that only the first process sees: mlx.launch ends the others when it is gone."""
    write_rows(place / "bad.jsonl", [*make_rows(5), {"prompt": "no answers"}])
    (place / "file").write_text("a file")
    out, err, failed = launch(2, place, "--model", "tiny", "--data", "data", "--adapter-path", "bad", *words.split())
    said = "bad.jsonl:6: no chosen and rejected among prompt" if "bad" in words else "choose another --adapter-path"
    own, others = (
        err.split("[ring]")[0],
        {code for _, code in failed},
    )  # what mlx writes when a neighbour has gone follows
    assert said in own and "Traceback" not in own and not (place / "bad").exists()
    assert len(failed) == 2 and "1" in others <= {"1", "-15"}, err
