"""Several processes train as one does, and a run that must stop stops at a known update, in all of them."""

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, SPECIAL, make_rows, save_model, write_rows

import dpo_trainer

LAUNCH = Path(sys.executable).parent / "mlx.launch"
CLOCK = ("tokens_per_second", "peak_memory_gb")


def free_ports(count):
    """Return the first of count free ports in a row, below those that the system gives away by itself."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first


@contextmanager
def launched(count, folder, *words, name="run", script=ROOT / "dpo_trainer.py"):
    """Start the script in count processes, with a cache of its own in folder; kill what is left of them at the end."""
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [LAUNCH, "--backend", "ring", "-n", count, "-p", free_ports(count), "--", sys.executable]
    command = [str(word) for word in (*command, script, *words)]
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    with open(out, "w") as stdout, open(err, "w") as stderr:
        given = dict(cwd=folder, env=env, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)
        process = subprocess.Popen(command, start_new_session=True, **given)
    try:
        yield SimpleNamespace(process=process, out=out, err=err)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()


def finish(run, limit=300):
    """Wait for the end of all processes of a run; return what they printed, and the exit status of each that failed.

    mlx.launch ends with SIGTERM, -15, who is still there 0.1 seconds after another one has failed.
    """
    try:
        run.process.wait(limit)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it hangs: {run.out.read_text()} {run.err.read_text()}")
    out, err = run.out.read_text(), run.err.read_text()
    statuses = {int(rank): int(code) for rank, code in re.findall(r"rank (\d+) exited with code (-?\d+)", err)}
    return SimpleNamespace(out=out, err=err, lines=out.splitlines(), statuses=statuses)


def launch(count, folder, *words, **given):
    with launched(count, folder, *words, **given) as run:
        return finish(run)


def failed(done, message):
    """Whether a run of two ended with that message, and nothing else on stderr that is of the script."""
    ends = set(done.statuses.values())
    return len(done.statuses) == 2 and 1 in ends <= {1, -15} and message in done.err and "Traceback" not in done.err


def alone(folder, *words, cache="cache-alone"):
    """Run main() in this process, alone; return what it prints."""
    handler, lines = signal.getsignal(signal.SIGINT), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / cache))
        patch.setattr(sys, "argv", ["dpo_trainer.py", *map(str, words)])
        patch.setattr(dpo_trainer, "print", lambda *texts, **_: lines.extend(map(str, texts)), raising=False)
        patch.setattr(dpo_trainer.tqdm, "write", lines.append)
        try:
            dpo_trainer.main()
        finally:
            signal.signal(signal.SIGINT, handler)
    return lines


def curve(folder):
    """Return metrics.jsonl as {(step, split): metrics}; no step may be there twice."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {(row.pop("step"), row.pop("split")): row for row in rows}
    assert len(found) == len(rows)
    return found


def records(folder):
    """Return [(key, value)] of the reference's scores kept in a folder."""
    lines = [line for path in (folder / "reference-logps").glob("*") for line in path.read_text().split("\n") if line]
    return [item for line in lines for item in json.loads(line).items()]


def same_curve(one, two):
    """Compare every metric but the clock's."""
    assert list(one) == list(two) and len(one) > 3
    for place, metrics in one.items():
        assert set(metrics) == set(two[place])
        for name in set(metrics) - set(CLOCK):
            assert metrics[name] == pytest.approx(two[place][name], abs=1e-4, rel=1e-4), (place, name)
        assert place[1] != "train" or all(two[place][name] > 0 for name in CLOCK)


def same_adapter(one, two):
    one, two = (mx.load(str(path / "adapters.safetensors")) for path in (one, two))
    assert set(one) == set(two)
    assert max(mx.abs(one[name] - two[name]).max().item() for name in one) < 1e-5
    assert max(mx.abs(one[name]).max().item() for name in one if "lora_b" in name) > 1e-4  # it has learnt something


WEIGHTS = (1, 0.5, 2, 1, 0, 1.5)
TRAIN = ["--batch-size", 4, "--grad-accumulation-steps", 2, "--epochs", 2, "--learning-rate", "1e-3"]
TRAIN += ["--model", "tiny", "--data", "data", "--train", "--test", "--steps-per-report", 1, "--steps-per-eval", 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and data whose batches of 4 are never even: 19, 7 and 5 pairs, of different weights."""
    folder = tmp_path_factory.mktemp("distributed")
    save_model(folder / "tiny")
    (folder / "data").mkdir()
    rows = [row | {"weight": WEIGHTS[i % 6]} for i, row in enumerate(make_rows(31))]
    for name, part in (("train", rows[:19]), ("valid", rows[19:26]), ("test", rows[26:])):
        write_rows(folder / "data" / f"{name}.jsonl", part)
    write_rows(folder / "three.jsonl", make_rows(3))
    return folder


@pytest.fixture(scope="module")
def one(place):
    """A run in one process."""
    lines = alone(place, *TRAIN, "--adapter-path", "one")
    return SimpleNamespace(lines=lines, folder=place / "one")


@pytest.fixture(scope="module")
def two(place):
    """The same in two, where an earlier run lies in the output folder."""
    (place / "two").mkdir()
    (place / "two" / "metrics.jsonl").write_text("an earlier run\n")
    return launch(2, place, *TRAIN, "--adapter-path", "two", name="two")


def test_two_processes_train_as_one(place, one, two):
    same_curve(curve(place / "one"), curve(place / "two"))
    same_adapter(place / "one", place / "two")
    steps = [step for step, split in curve(place / "two") if split == "train"]
    assert steps == [1, 2, 3, 4, 5, 6] and not two.statuses


def plain(lines):
    """Return the lines without what differs from run to run."""
    lines = [re.sub(r"tokens_per_second \S+ |peak_memory_gb \S+", "", line) for line in lines]
    return [re.sub(r"\b(one|two)\b", "PATH", line).strip() for line in lines if not line.startswith("The earlier run")]


def test_only_the_first_process_prints_and_writes(place, one, two):
    words = [[re.sub(r"\d\S*", "#", line) for line in plain(lines)] for lines in (one.lines, two.lines)]
    assert words[0] == words[1] and len(words[0]) > 10  # all but the digits, which rounding may change
    assert [line for line in two.lines if "earlier run" in line] == ["The earlier run in two is now in two-1"]
    assert (place / "two-1" / "metrics.jsonl").read_text() == "an earlier run\n" and not (place / "two-2").exists()
    files = [sorted(path.name for path in (place / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] and not [name for name in files[1] if name.startswith("unfinished")]
    assert "Traceback" not in two.err and "step" not in two.err


def test_the_scores_are_kept_once(place, one, two):
    ours, theirs = records(place / "cache-alone"), records(place / "cache")
    assert len(theirs) == len(dict(theirs)) == 31 and set(dict(ours)) == set(dict(theirs))
    for key, row in theirs:
        assert row == pytest.approx(dict(ours)[key], rel=1e-5)


def test_three_processes_go_on_with_what_two_have_kept(place, one, two):
    """Of the 31 scores a third is taken away: these are computed again, the others are used by all three."""
    (place / "three").mkdir()
    kept = place / "three" / "cache" / "reference-logps"
    [file] = (place / "cache" / "reference-logps").iterdir()
    lines = [json.dumps(dict([item])) for item in records(place / "cache")][10:]
    kept.mkdir(parents=True)
    (kept / file.name).write_text("".join(f"\n{line}" for line in lines))
    for name in ("tiny", "data"):
        (place / "three" / name).symlink_to(place / name)
    done = launch(3, place / "three", *TRAIN, "--adapter-path", "out")
    assert not done.statuses, done.err
    same_curve(curve(place / "one"), curve(place / "three" / "out"))
    same_adapter(place / "one", place / "three" / "out")
    found = records(place / "three" / "cache")
    assert [json.dumps(dict([item])) for item in found[:21]] == lines and len(dict(found)) == len(found) == 31
    assert len([line for line in done.lines if line.startswith("step ")]) == len(curve(place / "one"))


def test_a_process_without_a_pair(place):
    """Batches of 1, so that the second process never has one, and a last update of one batch instead of two."""
    words = ["--model", "tiny", "--data", "three.jsonl", "--batch-size", 1, "--grad-accumulation-steps", 2]
    words += ["--learning-rate", "1e-3", "--steps-per-report", 1, "--epochs", 2, "--no-reference-cache"]
    alone(place, *words, "--adapter-path", "idle-one")
    done = launch(2, place, *words, "--adapter-path", "idle-two", name="idle")
    assert not done.statuses, done.err
    same_curve(curve(place / "idle-one"), curve(place / "idle-two"))
    same_adapter(place / "idle-one", place / "idle-two")


def test_a_test_alone_by_the_scores_of_the_first_process(place, one, two):
    """All scores that are kept are lies: both processes must believe them, for those of the second have no file."""
    words = ["--model", "tiny", "--test", "data", "--adapter-path", "one"]
    (place / "lies").mkdir()
    for name in ("tiny", "data", "one"):
        (place / "lies" / name).symlink_to(place / name)
    honest = alone(place, *words)
    for name in ("cache", "cache-alone"):
        kept = place / "lies" / name / "reference-logps"
        kept.mkdir(parents=True)
        [file] = (place / "cache" / "reference-logps").iterdir()
        lies = [{key: [-50.0 - i, -60.0 + i]} for i, (key, _) in enumerate(records(place / "cache"))]
        (kept / file.name).write_text("".join(f"\n{json.dumps(row)}" for row in lies))
    expected = alone(place / "lies", *words)
    before = sorted(path for path in (place / "one").rglob("*"))
    done = launch(2, place / "lies", *words)
    assert not done.statuses and sorted(path for path in (place / "one").rglob("*")) == before, done.err
    assert expected != honest and len(done.lines) == len(expected)
    for ours, theirs in zip(done.lines, expected):
        assert re.sub(r"\d\S*", "#", ours) == re.sub(r"\d\S*", "#", theirs)
        for x, y in zip(re.findall(r" (-?\d\S*)", ours), re.findall(r" (-?\d\S*)", theirs), strict=True):
            assert x == y or float(x) == pytest.approx(float(y), abs=1e-3, rel=1e-3), (ours, theirs)


# ------------------------------------------------------------------------------------------------------------ the end


def test_a_mistake_in_the_data_ends_all(place):
    write_rows(place / "bad.jsonl", [*make_rows(5), {"prompt": "no answers"}])
    done = launch(2, place, "--model", "tiny", "--data", "bad.jsonl", "--adapter-path", "bad-out", name="bad")
    assert failed(done, "bad.jsonl:6: 'chosen' must be there, as a text or a list of messages: mend or"), done.err
    assert not (place / "bad-out").exists() and not done.lines


def test_what_only_the_first_process_sees_ends_all(place):
    """The others wait for it; mlx.launch ends them when it is gone."""
    (place / "somefile").write_text("a file")
    words = ["--model", "tiny", "--data", "three.jsonl", "--adapter-path", "somefile/out"]
    done = launch(2, place, *words, name="below")
    assert failed(done, "choose another --adapter-path") and "somefile/out: " in done.err, done.err


def wait_for(condition, run, limit=300):
    """Wait until a condition holds; fail if the run ends before."""
    end = time.monotonic() + limit
    while not condition():
        assert run.process.poll() is None and time.monotonic() < end, run.out.read_text() + run.err.read_text()
        time.sleep(0.005)


def trained(folder):
    """Return the last update that metrics.jsonl tells of, 0 at first."""
    with suppress(OSError):
        return max([step for step, split in curve(folder) if split == "train"], default=0)
    return 0


LONG = ["--model", "tiny", "--data", "data", "--iters", 20000, "--steps-per-report", 5, "--save-every", 10**6]


def test_control_c_ends_all_and_saves(place):
    """With dropout, which must run too."""
    with launched(2, place, *LONG, "--dropout", 0.1, "--adapter-path", "stopped", name="stopped") as run:
        wait_for(lambda: trained(place / "stopped") >= 10, run)
        os.killpg(run.process.pid, signal.SIGINT)
        seen = trained(place / "stopped")
        finish(run, 100)
        with pytest.raises(ProcessLookupError):  # nobody is left
            os.killpg(run.process.pid, 0)
    last = trained(place / "stopped")
    assert seen <= last <= seen + 15 and last % 5 == 0  # the report that is under way, the next, and one to spare
    weights = mx.load(str(place / "stopped" / "adapters.safetensors"))
    assert all(mx.isfinite(w).all() for w in weights.values()) and any(mx.abs(w).max() > 0 for w in weights.values())


def test_control_c_in_the_reference_pass_ends_all(place):
    write_rows(place / "many.jsonl", make_rows(1500))
    words = ["--model", "tiny", "--data", "many.jsonl", "--batch-size", 1, "--adapter-path", "early"]
    (folder := place / "early-run").mkdir()
    for name in ("tiny", "many.jsonl"):
        (folder / name).symlink_to(place / name)
    with launched(2, folder, *words) as run:
        wait_for(lambda: len(list((folder / "cache" / "reference-logps").glob("*"))) > 0, run)
        wait_for(lambda: len(records(folder / "cache")) > 20, run)
        os.killpg(run.process.pid, signal.SIGINT)
        finish(run, 100)
    assert 20 < len(records(folder / "cache")) < 1500 and not (folder / "early").exists()


def test_control_c_in_one_process_ends_both(place):
    """Sent to the second one only, and started without mlx.launch, which would end the first, and keeps its words."""
    port = free_ports(2)
    (place / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    processes, command = [], [sys.executable, ROOT / "dpo_trainer.py", *LONG, "--adapter-path", "half"]
    try:
        for rank in (0, 1):
            env = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(place / "hosts.json")}
            with open(place / f"half-{rank}.err", "w") as output:
                given = dict(cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=output)
                processes.append(subprocess.Popen(list(map(str, command)), **given))
        run = SimpleNamespace(process=processes[0], out=place / "half-0.err", err=place / "half-1.err")
        wait_for(lambda: trained(place / "half") >= 10, run)
        processes[1].send_signal(signal.SIGINT)
        assert [process.wait(100) for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    last = trained(place / "half")
    for rank in (0, 1):
        text = (place / f"half-{rank}.err").read_text()
        who = ("elsewhere", "SIGINT")[rank]
        assert f"half: interrupted ({who}); half/adapters.safetensors holds step {last} of 20000; to go on" in text
        assert "not finite" not in text
    assert (place / "half" / "adapters.safetensors").exists()


@pytest.fixture(scope="module")
def hollow(place):
    """Data of which one pair has a token that the model does not know what to make of: nan."""
    save_model(place / "hollow", tie_word_embeddings=False)
    weights = mx.load(str(place / "hollow" / "model.safetensors"))
    weights["model.embed_tokens.weight"][SPECIAL.index("<think>")] = math.nan
    mx.save_safetensors(str(place / "hollow" / "model.safetensors"), weights, {"format": "mlx"})
    rows = make_rows(20)
    rows[17]["chosen"] = "<think> It is far."
    (place / "odd").mkdir()
    for name, part in (("train", rows[:18]), ("valid", rows[18:])):
        write_rows(place / "odd" / f"{name}.jsonl", part)
    return ["--model", "hollow", "--data", "odd", "--learning-rate", "1e-3", "--epochs", 4, "--steps-per-report", 6]


SLOW = """import sys, time
sys.path.insert(0, sys.argv.pop(1))
import mlx.core as mx
import dpo_trainer

def slow(path, arrays, save=mx.save_safetensors):
    with open("saves.txt", "a") as file:
        file.write(f"{path}\\n")
    time.sleep(2)
    save(path, arrays)

mx.save_safetensors = slow
dpo_trainer.main()
"""


def test_a_loss_that_is_not_finite_ends_all(place, hollow):
    """One process sees it, both stop before it, and what is saved is what one process alone would save.

    The second one must wait for that: when it ends with an error, mlx.launch ends the first one, which is still saving.
    """
    for seed in range(9):
        out = f"hollow-one-{seed}"
        with pytest.raises(SystemExit) as stop:
            alone(place, *hollow, "--seed", seed, "--adapter-path", out)
        step = int(re.match(rf"{out}: step (\d+) was not made: the .* finite, at odd/", stop.value.code)[1])
        if 1 < step < 6:  # so that there is something to save, and it is not found out at once
            break
    assert stop.value.code.endswith(f"and begin anew; {out}/adapters.safetensors holds step {step - 1} of 20")
    (place / "slow.py").write_text(SLOW)
    words = [ROOT, *hollow, "--seed", seed, "--adapter-path", "hollow-two"]
    done = launch(2, place, *words, name="hollow", script="slow.py")
    assert failed(done, f"hollow-two: step {step} was not made: ") and "not finite, at odd/" in done.err, done.err
    assert len((place / "saves.txt").read_text().splitlines()) == 1  # in one process
    same_adapter(place / out, place / "hollow-two")
    assert list(curve(place / out)) == list(curve(place / "hollow-two")) == [(0, "valid")]


# ------------------------------------------------------------------------------------------------- in this process


def watch_updates(patch, then):
    """Have then called after each update with its number and the parameters, as they would be saved."""
    train = dpo_trainer.train

    def watched(model, params, layout, *given):
        for step, params, *rest in train(model, params, layout, *given):
            then(step, {name: np.array(w) for name, w in dpo_trainer.unpack(params, layout).items()})
            yield step, params, *rest

    patch.setattr(dpo_trainer, "train", watched)


UPDATES = ["--model", "tiny", "--data", "data", "--batch-size", 2, "--grad-accumulation-steps", 2, "--iters", 10]
UPDATES += ["--learning-rate", "1e-3", "--steps-per-eval", 100]


@pytest.fixture(scope="module")
def clean(place):
    """A run without a fault: its parameters after each update, and its metrics."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        watch_updates(patch, seen.__setitem__)
        alone(place, *UPDATES, "--steps-per-report", 1, "--adapter-path", "clean")
    assert sorted(seen) == list(range(1, 11)) and any((seen[4][name] != seen[5][name]).any() for name in seen[5])
    return SimpleNamespace(seen=seen, curve=curve(place / "clean"))


# weight 1e30: the loss is finite, the gradient's norm is not; an infinite ref_logps: the other way round, with SLiC
FAULTS = [{"weight": math.inf}, {"weight": math.nan}, {"weight": 1e30}, {"ref_logps": (math.inf, 0.0)}]
FAULTS += [{"ref_logps": (0.0, math.nan)}]


@pytest.mark.parametrize("bad, fault, batch", [(3, 0, 0), (4, 1, 1), (7, 2, 0), (2, 3, 1), (9, 4, 0), (1, 0, 1)])
def test_an_update_that_is_not_finite_is_not_made_nor_any_after_it(place, clean, bad, fault, batch, request):
    """Reports come every fourth update: the run goes on until then, and the fault is in one batch of two."""
    out, steps, plan_updates = place / request.node.name, [], dpo_trainer.plan_updates

    def faulty(pairs, args):
        plan = plan_updates(pairs, args)
        group = plan[bad - 1] = list(plan[bad - 1])
        group[batch] = [group[batch][0] | FAULTS[fault], *group[batch][1:]]
        return plan

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(dpo_trainer, "plan_updates", faulty)
        watch_updates(patch, lambda step, weights: steps.append(step))
        alone(place, *UPDATES, "--steps-per-report", 4, "--adapter-path", out)
    assert steps == list(range(1, min(4 * math.ceil(bad / 4), 10) + 1))
    assert re.match(rf"{re.escape(str(out))}: step {bad} was not made: the .*finite, at data/train.js", stop.value.code)
    reported = {place: row for place, row in curve(out).items() if place[1] == "train"}
    assert [step for step, _ in reported] == [step for step in (4, 8) if step < bad]
    assert all(math.isfinite(value) for row in reported.values() for value in row.values())
    if bad == 1:
        assert "nothing is trained yet" in stop.value.code and not (out / "adapters.safetensors").exists()
        return
    assert f"begin anew; {out}/adapters.safetensors holds step {bad - 1} of 10" in stop.value.code
    saved, expected = mx.load(str(out / "adapters.safetensors")), clean.seen[bad - 1]
    assert set(saved) == set(expected)
    assert all(np.array(saved[name]).tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("every", [1, 3])
def test_a_save_between_the_fault_and_the_report_is_of_the_last_good_update(place, clean, every, request):
    out, saves, plan_updates, save = place / request.node.name, [], dpo_trainer.plan_updates, dpo_trainer.save_weights

    def faulty(pairs, args):
        plan = plan_updates(pairs, args)
        plan[4] = [[pair | {"weight": math.inf} for pair in pairs] for pairs in plan[4]]
        return plan

    def save_weights(path, params, layout):
        saves.append({name: np.array(w).tobytes() for name, w in dpo_trainer.unpack(params, layout).items()})
        save(path, params, layout)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="step 5 was not made"):
        patch.setattr(dpo_trainer, "plan_updates", faulty)
        patch.setattr(dpo_trainer, "save_weights", save_weights)
        alone(place, *UPDATES, "--steps-per-report", 10, "--save-every", every, "--adapter-path", out)
    good = {step: {name: w.tobytes() for name, w in weights.items()} for step, weights in clean.seen.items()}
    assert saves == [good[step] for step in range(every, 5, every)] + [good[4]] * (4 % every > 0)


def arrays_in(tree):
    """Return the arrays in nested lists and dicts."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [array for part in tree for array in arrays_in(part)]
    return [tree] if isinstance(tree, mx.array) else []


def watch_waits(patch):
    """Return a list that grows by a name whenever the host waits for what was begun last, or for what was not begun."""
    waits, begun, evaluate, begin = [], [[]], mx.eval, mx.async_eval

    class Numpy:
        def __getattr__(self, name):
            value = getattr(np, name)
            known = isinstance(value, type) or not callable(value)  # a type, as float32, may stand for a dtype
            return value if known else lambda *args, **given: told(f"np.{name}", value, args, given)

    def told(name, function, args, given):
        if arrays_in([args, given]):
            waits.append(name)
        return function(*args, **given)

    def spied(name, method):
        return lambda self, *args: waits.append(name) or method(self, *args)

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__format__", "__repr__"):
        patch.setattr(mx.array, name, spied(name, getattr(mx.array, name)))
    patch.setattr(dpo_trainer, "np", Numpy())

    def eval_(*trees):
        earlier = [array for arrays in begun[:-1] for array in arrays]
        if not all(any(array is other for other in earlier) for array in arrays_in(trees)):
            waits.append("eval")
        evaluate(*trees)

    def async_eval(*trees):
        begun.append(arrays_in(trees))
        begin(*trees)

    patch.setattr(mx, "eval", eval_)
    patch.setattr(mx, "async_eval", async_eval)
    patch.setattr(mx, "synchronize", lambda *_: waits.append("synchronize"))
    return waits


WAITS = {  # what waits: whether it is seen
    "item": (lambda x: x.item(), True),
    "a number": (lambda x: float(x.sum()), True),
    "a condition": (lambda x: 1 if x.sum() > 0 else 0, True),
    "numpy": (lambda x: dpo_trainer.np.array([x]), True),
    "a sum": (lambda x: dpo_trainer.sum_all([x.sum()]), True),
    "a print": (lambda x: f"{x.sum()}", True),
    "eval": (lambda x: mx.eval(x + 1), True),
    "eval of the last": (lambda x: mx.async_eval(x) or mx.eval(x), True),
    "eval of the one before": (lambda x: mx.async_eval(x) or mx.async_eval(x + 1) or mx.eval({"x": [x]}), False),
    "async_eval": (lambda x: mx.async_eval(x + 1), False),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_watch_sees(name):
    """Or the next test says nothing."""
    wait, seen = WAITS[name]
    with pytest.MonkeyPatch.context() as patch:
        waits = watch_waits(patch)
        wait(mx.ones(1))
    assert bool(waits) == seen


OTHERS = [[], ["--dropout", 0.1], ["--fine-tune-type", "full", "--optimizer", "adafactor"], ["--grad-checkpoint"]]


@pytest.mark.parametrize("words", OTHERS, ids=str)
def test_the_host_never_waits_for_the_batch_just_begun(place, words):
    """A GPU that waits for the host between batches is idle meanwhile."""
    args = dpo_trainer.parse_args(["--model", str(place / "tiny"), "--data", "none", *map(str, words)])
    model, rng = mlx_lm.load(args.model)[0], np.random.default_rng(0)
    pairs = [{side: rng.integers(7, 320, 9).tolist() for side in ("prompt", "chosen", "rejected")} for _ in range(8)]
    pairs = [pair | {"weight": 1.0, "ref_logps": (-50.0, -51.0)} for pair in pairs]
    params, layout = dpo_trainer.trainable_parameters(model, args)
    dpo_trainer.lighten(model, args)
    plan, steps = [[pairs[:4], pairs[4:]], [pairs[2:6]]] * 4, []
    with pytest.MonkeyPatch.context() as patch:
        waits = watch_waits(patch)
        for step, *_ in dpo_trainer.train(model, params, layout, plan, args, dpo_trainer.dpo_metrics):
            steps.append(step)
    assert steps == list(range(1, 9)) and not waits


def test_main_waits_at_reports_only(place):
    """Reports come at 4, 8 and 11, the last update."""
    train, where, found = dpo_trainer.train, [0], {}

    def watched(*given):
        for result in train(*given):
            where[0] = result[0]
            del waits[:]
            yield result
            found[result[0]] = list(waits)
            del waits[:]
        found["train"] = list(waits)

    words = [*UPDATES[:-2], "--iters", 11, "--steps-per-report", 4, "--steps-per-eval", 100, "--save-every", 100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_trainer, "train", watched)
        waits = watch_waits(patch)
        alone(place, *words, "--adapter-path", "waits")
    assert [step for step, waits in found.items() if waits] == [4, 8, 11] and len(found) == 12
