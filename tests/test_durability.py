"""Nothing is lost: resuming to the bit, kills at any moment, full disks, faults, signals. See test_hostile for input.

A run is killed at an event: before or after a write, a flush, a rename or a deletion, in the middle of a file, in the
middle of a line of metrics.jsonl, or between two batches. killed.py counts them, so that a moment is a seeded number.
"""

import json
import os
import pty
import random
import re
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
from conftest import ROOT, few, make_rows, save_model, write_rows

import dpo_trainer

KILLED = """import os, random, signal, sys
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


# --------------------------------------------------------------------------------------------------------- checkpoints


def copy_of(whole, place, name, keep=None):
    """Return a copy of a run's folder; keep: how many of its checkpoints, the oldest first, are in it."""
    out = place / name
    shutil.copytree(whole.out, out)
    for path in dpo_trainer.checkpoints(out)[: -keep if keep else 0]:
        path.unlink()
    return out


def test_a_killed_step_comes_from_its_checkpoint(place, uncut):
    """The uncut run leaves two checkpoints: of the last save and of the one before it."""
    whole = uncut("lora")
    assert [path.name[:8] for path in dpo_trainer.checkpoints(whole.out)] == ["00000012", "00000010"]
    out = copy_of(whole, place, "one-back", keep=1)
    (out / "adapters.safetensors").unlink()
    done = launch(place, "lora", out, "--resume")
    assert "12 updates, 10 of them done" in done.stdout and done.returncode == 0, done.stderr
    assert contents(out) == contents(whole.out) and records(out) == records(whole.out)


@pytest.mark.slow
def test_a_run_that_has_ended_is_resumed_without_harm(place, uncut):
    out = copy_of(uncut("lora"), place, "ended")
    done = launch(place, "lora", out, "--resume")
    assert done.returncode == 0 and "step" not in done.stdout and "valid: 6 held-out pairs" in done.stdout, done.stderr
    assert contents(out) == contents(uncut("lora").out) and records(out) == records(uncut("lora").out)


@pytest.mark.slow
def test_keep(place):
    """As many as --keep says, or none; one that is not wanted is not written."""
    for keep, expected in ((1, ["00000012"]), (3, ["00000012", "00000010", "00000009"]), (0, [])):
        done = launch(place, "lora", f"keep-{keep}", "--keep", keep)
        assert done.returncode == 0, done.stderr
        assert [path.name[:8] for path in dpo_trainer.checkpoints(place / f"keep-{keep}")] == expected


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGE = {
    "cut at the end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in its header": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "a bit of its header's length": lambda path: flip(path, 3),
    "a bit of its header": lambda path: flip(path, 8 * 60 + 2),
    "a bit of its last number": lambda path: flip(path, 8 * path.stat().st_size - 1),
    "a bit in its middle": lambda path: flip(path, 4 * path.stat().st_size),
}


@pytest.mark.parametrize("damage", few(DAMAGE, 2))
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_taken(place, uncut, damage):
    out = copy_of(uncut("lora"), place, f"damaged-{damage}")
    newest = dpo_trainer.checkpoints(out)[0]
    DAMAGE[damage](newest)
    done = launch(place, "lora", out, "--resume")
    assert f"{newest} is damaged: going on from the one before it" in done.stdout, damage
    assert "10 of them done" in done.stdout and done.returncode == 0, done.stderr
    assert contents(out) == contents(uncut("lora").out) and records(out) == records(uncut("lora").out)


def test_files_of_others_among_the_checkpoints(place, uncut):
    """They were deleted, called damaged, or ended the run."""
    out = copy_of(uncut("lora"), place, "visited", keep=1)
    folder, name = out / "checkpoint", "9" * 8 + "-" + "a" * 32 + ".safetensors"
    for other in ("7-mine.safetensors", "00000003-backup copy.safetensors", "99999999-x.safetensors", "notes.txt"):
        (folder / other).write_text("mine")
    (folder / name).mkdir()
    done = launch(place, "lora", out, "--resume")
    assert done.returncode == 0 and "damaged" not in done.stdout, done.stderr
    assert contents(out) == contents(uncut("lora").out)
    assert {path.name for path in folder.iterdir() if path not in dpo_trainer.checkpoints(out)} == {
        "7-mine.safetensors", "00000003-backup copy.safetensors", "99999999-x.safetensors", "notes.txt", name,
    }  # fmt: skip


def test_a_folder_that_is_a_link(place):
    """The earlier run moved aside as a link, and a new folder stood in the link's place, on the wrong disk."""
    (place / "far").mkdir()
    (place / "link").symlink_to(place / "far")
    for _ in range(2):
        assert launch(place, "lora", "link").returncode == 0
    assert (place / "link").is_symlink() and (place / "link" / "adapters.safetensors").exists()
    assert (place / "far-1" / "adapters.safetensors").exists() and not (place / "link-1").exists()


def test_no_checkpoint_is_whole(place, uncut):
    out = copy_of(uncut("lora"), place, "hopeless")
    for path in dpo_trainer.checkpoints(out):
        flip(path, 999)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = launch(place, "lora", out, "--resume")
    assert (done.returncode, done.stdout.count("is damaged")) == (1, 2)
    assert done.stderr == f"{out}: no checkpoint is whole: leave out --resume, and the run begins anew\n"
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_nothing_to_resume_is_said_and_the_run_begins(place, uncut):
    done = launch(place, "lora", "nothing-yet", "--resume")
    assert "nothing-yet has no checkpoint: the run begins at step 0" in done.stdout
    assert contents(place / "nothing-yet") == contents(uncut("lora").out)


@pytest.mark.slow
def test_more_updates_are_allowed_and_equal_those_of_one_run(place):
    """With a constant rate they do not depend on how many there are."""
    words = ["--lr-schedule", "constant", "--warmup", 0]
    for out, *rest in (("long", "--iters", 15), ("grown", "--iters", 9), ("grown", "--iters", 15, "--resume")):
        done = launch(place, "dora", out, *words, *rest)
        assert done.returncode == 0, done.stderr
    assert (place / "grown/adapters.safetensors").read_bytes() == (place / "long/adapters.safetensors").read_bytes()
    steps = [(row["step"], row["split"]) for row in records(place / "grown")]
    assert len(steps) == len(set(steps)) and steps[-1] == (15, "valid")


def test_fewer_updates_than_are_done(place, uncut):
    out = copy_of(uncut("lora"), place, "fewer")
    done = launch(place, "lora", out, "--resume", "--iters", 5)
    why = "it is at step 12 of 5: resume with more --epochs or --iters; several processes, with the same files"
    assert (done.returncode, done.stderr) == (1, f"{out}: {why}\n")


@pytest.fixture(scope="module")
def others(place):
    """Another model, other rows, and the same rows and model elsewhere."""
    save_model(place / "other-model", seed=1)
    shutil.copytree(place / "tiny", place / "moved-model")
    shutil.copytree(place / "data", place / "moved-data")
    rows = make_rows(18)
    for name, changed in {"reordered": rows[::-1], "reworded": [*rows[:-1], rows[-1] | {"chosen": "No."}]}.items():
        shutil.copytree(place / "data", place / name)
        write_rows(place / name / "train.jsonl", changed)
    shutil.copytree(place / "data", place / "other-valid")
    write_rows(place / "other-valid" / "valid.jsonl", rows[:6])
    shutil.copytree(place / "data", place / "weighted")
    write_rows(place / "weighted" / "train.jsonl", [*rows[:-1], rows[-1] | {"weight": 0.5}])


REFUSED = {  # options: what the line must tell
    "--rank 8": r"rank \(was 4, is 8\)",
    "--seed 3": r"seed \(was 0, is 3\)",
    "--data reordered": r"the train pairs \(was \w{8}, is \w{8}\)",
    "--data reworded": r"the train pairs \(was \w{8}, is \w{8}\)",
    "--data weighted": r"the train pairs \(was \w{8}, is \w{8}\)",
    "--model other-model": r"the weights at first \(was \w{8}, is \w{8}\)",
    "--batch-size 1 --beta 0.3": r"batch_size \(was 2, is 1\), beta \(was 0.1, is 0.3\)",
    "--learning-rate 1e-4 --optimizer sgd": r"learning_rate \(was 0.002, is 0.0001\), optimizer \(was adamw, is sgd\)",
    "--lr-schedule linear": r"lr_schedule \(was cosine, is linear\)",
    "--val-batches 1": r"val_batches \(was -1, is 1\)",
    "--data other-valid": r"the valid pairs \(was \w{8}, is \w{8}\)",
    "--reference-model other-model": r"the reference's log-probability \(was -\d+, is -\d+\)",
    "--grad-accumulation-steps 1": r"grad_accumulation_steps \(was 2, is 1\)",
    "--num-layers 1": r"num_layers \(was -1, is 1\)",
    "--loss hinge": r"loss \(was sigmoid, is hinge\)",
}


@pytest.mark.parametrize("words", few(REFUSED, 3))
def test_another_run_is_refused_with_what_differs(place, uncut, others, words):
    whole = uncut("lora")
    before = {path: path.read_bytes() for path in whole.out.rglob("*") if path.is_file()}
    done = launch(place, "lora", whole.out, "--resume", *words.split())
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(rf"{dpo_trainer.checkpoints(whole.out)[0]}: this run differs in .*({REFUSED[words]})", done.stderr)
    assert done.stderr.endswith(": resume with the options and data that it was made with, or leave out --resume\n")
    assert before == {path: path.read_bytes() for path in whole.out.rglob("*") if path.is_file()}


def test_what_does_not_change_the_adapter_may_change(place, uncut, others):
    """Also where the files lie, --grad-checkpoint and how often it is saved and measured."""
    out = copy_of(uncut("lora"), place, "freely", keep=1)
    words = "--model moved-model --data moved-data --save-every 1 --steps-per-report 5 --steps-per-eval 7 --keep 1"
    done = launch(place, "lora", out, "--resume", *words.split(), "--test", "data/valid.jsonl", "--max-seq-length", 900)
    assert done.returncode == 0, done.stderr
    assert (out / "adapters.safetensors").read_bytes() == (uncut("lora").out / "adapters.safetensors").read_bytes()


@pytest.mark.slow
def test_the_best_adapter_is_kept(place):
    """On validation pairs the wrong way round, which get worse: best/ holds what the first measured step gave."""
    shutil.copytree(place / "data", place / "contrary")
    rows = [json.loads(line) for line in (place / "data" / "valid.jsonl").read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_rows(place / "contrary" / "valid.jsonl", swapped)
    words = ["--data", "contrary", "--iters", 20, "--steps-per-eval", 4, "--lr-schedule", "constant", "--warmup", 0]
    done = launch(place, "lora", "worse", *words)
    assert done.returncode == 0, done.stderr
    losses = {row["step"]: row["loss"] for row in records(place / "worse") if row["split"] == "valid" and row["step"]}
    best = min(losses, key=losses.get)
    assert best != 20 and f"its loss was lower at step {best}: worse/best holds that adapter" in done.stdout
    done = launch(place, "lora", "until-best", *words, "--iters", best)
    files = [place / name / "adapters.safetensors" for name in ("worse/best", "until-best")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((place / "worse" / "best" / "adapter_config.json").read_text())["fine_tune_type"] == "lora"
    shutil.rmtree(place / "worse" / "best")
    done = launch(place, "lora", "worse", *words, "--resume")
    assert f"its loss was lower at step {best}" in done.stdout and "holds that" not in done.stdout


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    for name in ("adapters.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("new")
    told = {(step, "valid"): {"loss": loss} for step, loss in ((0, 0.7), (2, 1.0), (4, float("nan")))}
    assert "lower at step 2" in dpo_trainer.keep_best(tmp_path, told, 4) and not (tmp_path / "best").exists()
    assert dpo_trainer.keep_best(tmp_path, told, 2) == "" and (tmp_path / "best" / "adapters.safetensors").exists()


def test_another_test_file_is_measured_when_a_run_that_has_ended_is_resumed(place, uncut):
    """Its sentence had the numbers of the file before."""
    out = copy_of(uncut("lora"), place, "two-tests")
    for name, count in (("valid", 6), ("train", 18)):
        done = launch(place, "lora", out, "--resume", "--test", f"data/{name}.jsonl")
        assert f"test: {count} held-out pairs" in done.stdout, done.stderr
    assert [row["pairs"] for row in records(out) if row["split"] == "test"] == [18]


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def disk(place, request):
    """A function that mounts a small disk at a new folder; skips where the system does not allow it."""
    folder = place / re.sub(r"\W", "-", request.node.name)

    def mount(size):
        folder.mkdir(exist_ok=True)
        state = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{state}size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def one_line(done, out):
    """Assert that a run ended with status 1 and one line, without a traceback; return the line."""
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{out}: "), done.stderr
    return done.stderr.strip()


def held_step(line):
    found = re.search(r"adapters.safetensors holds step (\d+) of 12", line)
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def steps_of(place, uncut):
    """The uncut run's parameters after each save: {step: sorted numbers}."""
    done = launch(place, "lora", "every-save", "--keep", 99)
    assert done.returncode == 0, done.stderr
    found = dpo_trainer.checkpoints(place / "every-save")
    return {int(path.name[:8]): np.sort(mx.load(str(path))["params.vector"]) for path in found}


def check_adapter(out, step, steps_of):
    """Assert that the adapter in a folder is the one that the uncut run had at this step."""
    weights = mx.load(str(out / "adapters.safetensors"))
    ours = np.sort(np.concatenate([np.array(w).flatten() for w in weights.values()]))
    assert (ours == steps_of[step]).all(), f"the adapter in {out} is not that of step {step}"


SIZES = [176, 4, 256, 40, 80, 100, 112, 128, 144, 160, 192, 224]  # KB


@pytest.mark.parametrize("size", few(SIZES, 1))
def test_a_disk_that_is_full(place, uncut, steps_of, disk, size):
    """One line, which step is in place and which is lost; with more room, --resume ends as the uncut run did."""
    out = disk(f"{size}k") / "out"
    done = launch(place, "lora", out)
    line = one_line(done, out)
    assert "Unable to write" in line or "No space left" in line, line
    assert "make room on that disk" in line or "choose another --adapter-path" in line, line
    assert not out.exists() or not list(out.rglob("unfinished-*")), "what is unfinished takes room"
    if step := held_step(line):
        check_adapter(out, step, steps_of)
    else:
        assert "nothing is trained yet" in line or "choose another" in line
        assert not (out / "adapters.safetensors").exists()
    disk("9m")
    done = launch(place, "lora", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(uncut("lora").out) and records(out) == records(uncut("lora").out)


EXEC = "import fcntl, os, sys, termios; os.execv(sys.argv[1], sys.argv[1:])"


def started(place, out, *words, setting="lora", iters=5000, take=EXEC, **pipes):
    """Start a run that goes on for long; return the process once its ninth update is reported."""
    script, options = SETTINGS[setting]
    given = [ROOT / f"{script}.py", "--model", "tiny", "--data", "data", *RUN, *options.split()]
    given += ["--iters", iters, "--adapter-path", out, "--lr-schedule", "constant", "--learning-rate", 1e-4]
    given += ["--warmup", 0, *words]
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell may have it ignored
    command = [sys.executable, "-c", f"{restore}; {take}", sys.executable, *map(str, given)]
    env = {**os.environ, "XDG_CACHE_HOME": str(place / "cache-lora"), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | pipes
    process = subprocess.Popen(command, cwd=place, env=env, **pipes)
    metrics = Path(place, out, "metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and '"step": 9, "split": "train"' in metrics.read_text()):
        time.sleep(0.02)
    return process


def ended(process):
    """Return a process that has ended, with its output."""
    stdout, stderr = process.communicate(timeout=100)
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def test_a_disk_that_becomes_read_only(place, disk):
    out = disk("9m") / "out"
    process = started(place, out)
    subprocess.run(["mount", "-o", "remount,ro", str(out.parent)], check=True)
    line = one_line(ended(process), out)
    assert "Read-only file system" in line, line
    kept = re.search(r"holds step (\d+) of 5000(, what came after it is lost)?; to go on from step \d+: python ", line)
    assert int(kept[1]) >= 9, line
    assert np.isfinite(np.concatenate([w.flatten() for w in mx.load(str(out / "adapters.safetensors")).values()])).all()


def test_a_read_only_disk_is_refused_before_the_work(place, disk):
    out = disk("9m") / "out"
    subprocess.run(["mount", "-o", "remount,ro", str(out.parent)], check=True)
    done = launch(place, "lora", out)
    assert "Read-only file system" in one_line(done, out) and "tokenizing" not in done.stdout


def test_a_folder_that_is_deleted_in_training(place):
    """The adapter of the last update is put in place again; only metrics and checkpoints are lost with the folder."""
    out = place / "deleted"
    process = started(place, out)
    shutil.rmtree(out.rename(place / "bin"))  # at once: else it would race with what the run writes
    line = one_line(ended(process), out)
    assert "No such file or directory" in line, line
    step = int(re.search(r"adapters.safetensors holds step (\d+) of 5000", line)[1])
    assert step > 8 and {"adapters.safetensors", "adapter_config.json"} <= {path.name for path in out.iterdir()}
    model = dpo_trainer.mlx_lm.load(str(place / "tiny"), adapter_path=str(out))[0]
    assert mx.isfinite(model(mx.array([[7, 8, 9]]))).all()


MEMORY = [  # as MLX says it with Metal, with CUDA and on the CPU, and Python
    "RuntimeError('[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBuffer)')",
    "RuntimeError('[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed size')",
    "RuntimeError('[cudaMallocAsync] out of memory.')",
    "MemoryError()",
]
BEGIN = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport dpo_trainer as script\n"


def run_code(place, code, *words):
    """Run dpo_trainer.py after this code; return the finished process."""
    words = ["--model", "tiny", "--data", "data", *RUN, *words]
    command = [sys.executable, "-c", f"{BEGIN}{code}script.main()", *map(str, words)]
    env = {**os.environ, "XDG_CACHE_HOME": str(place / "cache-lora")}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)


PLACES = {"completion_logps": "reference", "evaluate": "measuring", "train": "training", "save_weights": "saving"}


@pytest.mark.parametrize("function", PLACES)
@pytest.mark.parametrize("error", few(MEMORY, 1))
def test_out_of_memory(place, function, error):
    out = place / f"memory-{function}-{MEMORY.index(error)}"
    code = f"def fails(*given, **named):\n    raise {error}\nscript.{function} = fails\n"
    code += "script.settle_sharing = lambda *_: 0.9\n"  # which calls completion_logps too
    done = run_code(place, code, "--batch-size", 6, "--no-reference-cache", "--adapter-path", out)
    line = one_line(done, out)
    sizes = r"the largest batch is 6 pairs of \d+ \+ 2 x \d+ tokens: add --grad-checkpoint, or "
    ways = "--batch-size 3 --grad-accumulation-steps 2, or --max-seq-length below "
    ways += r"\d+, or a lower --num-layers, or a quantized --model, as one of 4 bits; "
    ways += "all that was trained is lost" if function == "save_weights" else "nothing is trained yet"
    assert re.search(sizes + ways, line), line


@pytest.mark.slow
@pytest.mark.parametrize("error", MEMORY)
def test_memory_that_ends_in_training_leaves_the_last_save(place, uncut, steps_of, error):
    """It ends in the eighth update; step 6 is in place, and with --grad-checkpoint the run goes on from there."""
    out = place / f"memory-at-8-{MEMORY.index(error)}"
    code = "train = script.train\ndef fails(*given):\n    for found in train(*given):\n        if found[0] == 7:\n"
    code += f"            raise {error}\n        yield found\nscript.train = fails\n"
    line = one_line(run_code(place, code, *SETTINGS["lora"][1].split(), "--adapter-path", out), out)
    assert held_step(line) == 6 and "; to go on from step 6: python " in line, line
    check_adapter(out, 6, steps_of)
    done = launch(place, "lora", out, "--resume", "--grad-checkpoint")
    assert done.returncode == 0 and "6 of them done" in done.stdout, done.stderr


def test_another_fault_is_no_matter_of_memory(place):
    """What is wrong with the code is shown as what it is, with its place."""
    code = "def fails(*given):\n    raise RuntimeError('of another kind')\nscript.train = fails\n"
    done = run_code(place, code, "--adapter-path", "fault")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: of another kind\n")


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", few([signal.SIGTERM, signal.SIGINT], 1))
@pytest.mark.parametrize("setting", few(["lora", "dora"], 1))
def test_a_signal_ends_after_the_step_and_the_printed_command_goes_on(place, number, setting):
    """What it tells to type ends where a run without a break ends."""
    out, whole = place / f"signal-{number}-{setting}", place / f"no-signal-{setting}"
    process = started(place, out, setting=setting)
    process.send_signal(number)
    done = ended(process)
    note, line = done.stderr.strip().splitlines()
    assert note == "This step is finished first, and saved. Once more: leave at once" and done.returncode == 1
    name = signal.Signals(number).name
    held = rf"{out}: interrupted \({name}\); {out}/adapters.safetensors holds step (\d+) of 5000; to go on from step \1"
    step = int(re.match(held, line)[1])
    command = line.split(": python ")[1].split()
    assert records(out)[-1]["step"] == step and command[-1] == "--resume"
    env = {**os.environ, "XDG_CACHE_HOME": str(place / "cache-lora")}
    command = [sys.executable, *command, "--iters", str(step + 3)]
    subprocess.run(command, cwd=place, env=env, check=True, stdout=subprocess.DEVNULL)
    process = started(place, whole, setting=setting, iters=step + 3)
    assert ended(process).returncode == 0
    same = [folder / "adapters.safetensors" for folder in (out, whole)]
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.parametrize("number", few([signal.SIGTERM, signal.SIGINT], 1))
def test_two_signals_end_at_once_and_nothing_is_torn(place, number):
    """The tenth update takes a minute: the second signal does not wait for it, and step 9 stays in place."""
    out = place / f"twice-{number}"
    slow = "import time\ntrain = script.train\ndef slowly(*given):\n    for found in train(*given):\n"
    slow += "        time.sleep(60 * (found[0] == 10))\n        yield found\nscript.train = slowly\n"
    process = started(place, out, take=f"import sys; sys.argv[:2] = []\n{BEGIN}{slow}script.main()")
    process.send_signal(number)
    assert process.stderr.readline() == "\n" and process.stderr.readline().startswith("This step is finished")
    time.sleep(0.3)
    assert process.poll() is None, "the first signal lets the step end"
    process.send_signal(number)
    start = time.monotonic()
    assert ended(process).returncode == -number and time.monotonic() - start < 5
    check_whole(out)
    assert [path.name[:8] for path in dpo_trainer.checkpoints(out)] == ["00000009", "00000006"]


@pytest.mark.parametrize("ignored", few([False, True], 1))
def test_a_terminal_that_is_closed(place, ignored):
    """As a window that is shut: nothing can be written any more; nohup has the run go on."""
    out = place / f"closed-{ignored}"
    ours, theirs = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        streams = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        take = EXEC.replace("os.execv", "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv")
        if ignored:  # nohup writes to a file then
            streams |= dict.fromkeys(("stdout", "stderr"), open(place / "nohup.out", "w"))
        process = started(place, out, iters=60, take=take, **streams)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.close(theirs)
    os.close(ours)
    status = process.wait(100)
    last = records(out)[-1]["step"]
    check_whole(out)
    steps = [int(path.name[:8]) for path in dpo_trainer.checkpoints(out)]
    assert (status, last == 60) == ((0, True) if ignored else (1, False)), (status, last)
    assert steps[0] == last, f"step {last} is lost: the checkpoints are of steps {steps}"


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(place, uncut):
    """As in dpo_trainer.py ... | head -2."""
    process = started(place, place / "piped", iters=12)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(100) == 0
    assert (place / "piped" / "adapters.safetensors").exists() and records(place / "piped")[-1]["step"] == 12
    process.stderr.close()


def test_two_runs_do_not_write_into_one_folder(place):
    """The second moved the first one's folder aside, and the first then wrote into the second's."""
    out = place / "shared"
    process = started(place, out)
    line = one_line(launch(place, "lora", out), out)
    assert line == f"{out}: another run is writing there: choose another --adapter-path"
    assert one_line(launch(place, "lora", out, "--resume"), out) == line and not Path(f"{out}-1").exists()
    process.kill()
    process.communicate()
    assert launch(place, "lora", out).returncode == 0 and Path(f"{out}-1").exists()


def test_a_bad_update_is_not_offered_to_be_made_again(place):
    """--resume would come to the same update."""
    shutil.copytree(place / "data", place / "heavy")
    rows = make_rows(18)
    write_rows(place / "heavy" / "train.jsonl", [*rows[:3], rows[3] | {"weight": 9e8}, *rows[4:]])
    done = launch(place, "lora", "heavy-out", "--data", "heavy", "--save-every", 1, "--iters", 18)
    line = one_line(done, "heavy-out")
    step = int(re.match(r"heavy-out: step (\d+) was not made: the gradient norm is \S+, above 1e\+06, at ", line)[1])
    assert "heavy/train.jsonl:4" in line and "resume" not in line
    assert line.endswith("nothing is trained yet" if step == 1 else f"adapters.safetensors holds step {step - 1} of 18")


def test_a_metrics_file_with_other_lines_in_it(place, uncut):
    out = copy_of(uncut("lora"), place, "strange", keep=1)
    text = (out / "metrics.jsonl").read_text()
    lines = b'5\n{}\n[1]\n"x"\n{"step": "x"}\n{"step": 5, "split": "valid"}\n\xff\xfe\n\0\0\n'
    (out / "metrics.jsonl").write_bytes(lines + text.encode() + b'{"step": 11, "spl')
    assert launch(place, "lora", out, "--resume").returncode == 0
    assert records(out) == records(uncut("lora").out)


# ---------------------------------------------------------------------------------------------------------------- soak

SOAK = """import json, os, subprocess, sys, time
sys.path.insert(0, sys.argv.pop(1))
import dpo_trainer
report = dpo_trainer.report

def measured(step, *given):
    kilobytes = int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) if step % 200 == 0 else 0
    print("usage", json.dumps([step, kilobytes, time.process_time()]), flush=True)
    report(step, *given)

dpo_trainer.report = measured
dpo_trainer.main()
"""


@pytest.mark.slow
def test_two_thousand_updates_take_no_more_memory_and_time_at_the_end(tmp_path):
    """The bundled model and 120 of its pairs, an epoch of which is 108 updates: at step 200 every shape was seen.

    Each new shape is compiled and kept, so memory grows in the first epoch. Time is the process' own, of the quickest
    108 updates: other programs slow this one down for a while, and once more is tried where they did all the time.
    """
    (tmp_path / "soak.py").write_text(SOAK)
    lines = (ROOT / "data" / "pairs.jsonl").read_text().splitlines(keepends=True)[:120]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    words = ["--model", "data/tiny-chat", "--data", tmp_path / "pairs.jsonl", "--iters", 2000, "--batch-size", 1]
    words += ["--steps-per-report", 4, "--steps-per-eval", 100, "--adapter-path", tmp_path / "out"]
    command = [sys.executable, *map(str, [tmp_path / "soak.py", ROOT, *words])]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        usage = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("usage ")]
        memory, seconds = ({step: row[i] for step, *row in usage} for i in (0, 1))
        spans = (range(200, 700, 4), range(1392, 1892, 4))
        early, late = (min(seconds[step + 108] - seconds[step] for step in span) / 108 for span in spans)
        print(f"memory {memory[200]} -> {memory[2000]} KB, seconds a step {early:.4f} -> {late:.4f}")
        assert memory[2000] <= 1.05 * memory[200], f"memory grew from {memory[200]} KB to {memory[2000]} KB"
        if late <= 1.1 * early:
            return
    raise AssertionError(f"a step took {early:.4f} s at first, {late:.4f} s at the end")


def test_a_sum_without_a_process_is_refused(monkeypatch):
    """A ring went on when one was killed, and the sum of the others was taken for that of all."""
    world = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(dpo_trainer.mx.distributed, "init", lambda: world)
    monkeypatch.setattr(dpo_trainer.mx.distributed, "all_sum", lambda values: 2 * values)
    assert dpo_trainer.sum_all([[1.5, 2], [3, 4]]).tolist() == [[3, 4], [6, 8]] and dpo_trainer.sum_all(3).shape == ()
    monkeypatch.setattr(dpo_trainer.mx.distributed, "all_sum", lambda values: values)
    with pytest.raises(RuntimeError, match="a process is missing"):
        dpo_trainer.sum_all([1.0])


def test_full_fine_tuning_does_not_keep_what_it_began_with(place):
    """The caller's name for the first parameters kept them in memory: as much as all weights in 32 bits."""
    code = "import atexit\nbegin, counts = script.begin, []\n"
    code += "def watched(folder, model, params, *given):\n    counts.append(len(params))\n"
    code += "    result = begin(folder, model, params, *given)\n    counts.append(len(params))\n    return result\n"
    code += "script.begin = watched\natexit.register(lambda: print('counts', *counts))\n"
    done = run_code(place, code, "--fine-tune-type", "full", "--adapter-path", "full-memory")
    counts = list(map(int, re.search(r"counts (\d+) (\d+)", done.stdout).groups()))
    assert counts[0] > 10 and counts[1] == 0, done.stderr
