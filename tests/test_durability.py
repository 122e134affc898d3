"""Nothing is lost: resuming to the bit, kills at any moment, full disks, faults and signals. Hostile input: test_hostile.

A run is killed at an event: before or after a write, a flush, a rename or a deletion, in the middle of a file, in the
middle of a line of metrics.jsonl, or between two batches. killed.py counts them, so that a moment is a seeded number.
"""

import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, make_rows, restore_swiglu, run_script, save_model, write_rows

import dpo_trainer

KILLED = """import builtins, os, random, signal, sys
root, name, at = sys.argv[1:4]
del sys.argv[1:4]
sys.path.insert(0, root)
import mlx.core as mx
script = __import__(name)
sys.argv[0] = os.path.join(root, name + ".py")
events = [0]

def event(path=None, text=None):
    events[0] += 1
    if events[0] != int(at):
        return
    if text:
        open(path, "a").write(text)
    elif path:
        os.truncate(path, random.Random(events[0]).randrange(os.path.getsize(path)))
    os.kill(os.getpid(), signal.SIGKILL)

def watch(module, name, torn=False):
    real = getattr(module, name)
    def watched(*given, **named):
        event()
        result = real(*given, **named)
        event(given[0] if torn else None)
        return result
    setattr(module, name, watched)

for each in ("fsync", "replace", "rename", "unlink", "mkdir"):
    watch(os, each)
watch(mx, "save_safetensors", torn=True)
watch(script.shutil, "copy")
watch(script, "make_batch")
watch(script, "report")
report = script.report
def torn_report(step, split, metrics, args, callback=None):
    event(args.adapter_path + "/metrics.jsonl", '{"step": 1, "split": "tr')
    report(step, split, metrics, args, callback)
script.report = torn_report
script.main()
print("events", events[0])
"""
RUN = "--batch-size 2 --iters 12 --learning-rate 2e-3 --save-every 3 --steps-per-report 2 --steps-per-eval 5".split()
SETTINGS = {  # script, options
    "lora": ("dpo_trainer", "--rank 4 --grad-accumulation-steps 2"),
    "dora": ("simpo_trainer", "--fine-tune-type dora --dropout 0.2 --rank 4"),
    "full": ("dpo_trainer", "--fine-tune-type full --num-layers 1 --optimizer adafactor"),
    "checkpointed": ("simpo_trainer", "--grad-accumulation-steps 2 --dropout 0.1 --grad-checkpoint --optimizer muon"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, data to train and validate on, and killed.py."""
    folder = tmp_path_factory.mktemp("durability")
    save_model(folder / "tiny")
    (folder / "data").mkdir()
    for name, rows in (("train", make_rows(18)), ("valid", make_rows(24)[18:])):
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    (folder / "killed.py").write_text(KILLED)
    return folder


def launch(place, setting, out, *words, at=0):
    """Run a setting's script as killed.py does; return the finished process."""
    script, options = SETTINGS[setting]
    given = [place / "killed.py", ROOT, script, at, "--model", "tiny", "--data", "data", *RUN, *options.split()]
    command = [sys.executable, *map(str, [*given, "--adapter-path", out, *words])]
    env = {**os.environ, "XDG_CACHE_HOME": str(place / f"cache-{setting}")}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)


def records(out):
    """Return metrics.jsonl without what the clock and the process say."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in ("tokens_per_second", "peak_memory_gb")} for row in rows]


def contents(out):
    """Return what a run leaves that must not depend on kills: {name: bytes}."""
    names = ["adapters.safetensors", "best/adapters.safetensors"]
    return {name: (out / name).read_bytes() for name in names} | {
        path.name[:8]: path.read_bytes() for path in dpo_trainer.checkpoints(out)
    }


def check_whole(out):
    """Assert that whatever has its final name is whole."""
    for path in out.rglob("*"):
        if path.is_file() and not path.name.startswith(("unfinished-", "unnamed")):
            if path.suffix == ".safetensors":
                mx.eval(mx.load(str(path)))
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".py":
                assert path.read_bytes() == (ROOT / path.name).read_bytes()
    for path in dpo_trainer.checkpoints(out):
        assert path.stem[9:] == dpo_trainer.file_hash(path), f"{path} is not whole"
    assert len(dpo_trainer.checkpoints(out)) <= 3, "older checkpoints are not deleted"


@pytest.fixture(scope="module")
def uncut(place):
    """Return a function that gives a setting's uncut run: its folder and number of events; each is made once."""
    made = {}

    def make(setting):
        if setting not in made:
            done = launch(place, setting, f"uncut-{setting}")
            assert done.returncode == 0, done.stderr
            events = int(re.search(r"^events (\d+)$", done.stdout, re.M)[1])
            made[setting] = SimpleNamespace(out=place / f"uncut-{setting}", events=events)
        return made[setting]

    return make


def kill_and_resume(place, whole, setting, kills, seed):
    """Kill runs at so many random events, resuming each time; whatever ends must equal the uncut run."""
    rng, count, chain = random.Random(seed), 0, 0
    while count < kills:
        chain += 1
        out, steps = place / f"killed-{setting}-{seed}-{chain}", []
        while True:
            at = rng.randrange(1, whole.events // 2) if count < kills else 0
            done = launch(place, setting, out, "--resume", at=at)
            what = f"{setting}, seed {seed}, chain {chain}: killed at events {[*steps, at]}"
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, f"{what}: {done.stderr}"
            count += 1
            steps.append(at)
            check_whole(out)
        assert records(out) == records(whole.out), f"{what}: other metrics"
        assert contents(out) == contents(whole.out), f"{what}: another adapter, best adapter or checkpoint"
        assert not [path for path in out.rglob("un*")], f"{what}: files are left over"
    return count


def test_a_few_kills(place, uncut):
    assert kill_and_resume(place, uncut("lora"), "lora", 3, seed=1) == 3


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_thirty_kills(place, uncut, setting):
    """Also settings with dropout, accumulation, checkpointing: the adapter, the best one, checkpoints and metrics."""
    assert kill_and_resume(place, uncut(setting), setting, 30, seed=7) == 30
