"""The script as a person runs it: what it writes, and that mlx-lm loads it and measures there what was reported."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, make_rows, run_script, save_model, write_rows

LOG_2 = math.log(2)
QUIET = {**os.environ, "TQDM_DISABLE": "1"}  # stderr without progress bars
TRAIN = ["--iters", 6, "--batch-size", 2, "--learning-rate", 2e-3, "--steps-per-report", 2, "--steps-per-eval", 4]
SETUPS = {
    "lora": ({}, []),
    "dora": ({}, ["--fine-tune-type", "dora"]),
    "full": ({}, ["--fine-tune-type", "full", "--learning-rate", 5e-4]),
    "4-bit": (dict(bits=4), ["--rank", 4, "--keys", "self_attn.q_proj", "mlp.down_proj"]),
    "bfloat16": (dict(dtype=mx.bfloat16), ["--num-layers", 1]),
}
PER_PAIR = {"loss", *(f"{a}/{b}" for a in ("rewards", "logps") for b in ("chosen", "rejected", "accuracies"))}
PER_PAIR |= {"rewards/margins"}
RATES = {"grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"}
HELD_OUT = {"pairs", "ref_logps/accuracies", "perplexity/chosen", "perplexity/ref_chosen"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 12 training and 7 validation pairs."""
    folder, rows = tmp_path_factory.mktemp("data"), make_rows(19)
    write_rows(folder / "train.jsonl", rows[:12])
    write_rows(folder / "valid.jsonl", rows[12:])
    return folder


def train(model, data, out, *words):
    """Run a short training; return the finished process, which must have ended well."""
    done = run_script("--model", model, "--data", data, "--adapter-path", out, *TRAIN, *words, env=QUIET)
    assert done.returncode == 0, done.stderr
    return done


def metrics_of(folder, split):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=SETUPS)
def trained(request, data, tmp_path_factory):
    """(name, model folder, output folder, stdout) of a run of each kind."""
    folder, (extra, words) = tmp_path_factory.mktemp("trained"), SETUPS[request.param]
    model = save_model(folder / "model", **extra)
    done = train(model, data, folder / "out", *words)
    return request.param, model, folder / "out", done.stdout


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory):
    """Three runs into one folder: new, resumed from the first, with another reference. Returns (folder, processes)."""
    out = tmp_path_factory.mktemp("runs") / "out"
    other = save_model(out.parent / "other", seed=1)
    first = train(tiny, data, out)
    before = contents(out)
    shutil.copytree(out, out.parent / "first")
    second = train(tiny, data, out, "--resume-adapter-file", out.parent / "first" / "adapters.safetensors")
    third = train(tiny, data, out, "--reference-model", other)
    return out, before, [first, second, third]


def answer_logps(model, tokenizer, row):
    """Return the float64 log-probabilities of a row's chosen and rejected answer, from mlx-lm's model and template."""
    sums = []
    for side in ("chosen", "rejected"):
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)
        ids = tokenizer.apply_chat_template([*row["messages"], {"role": "assistant", "content": row[side]}])
        assert ids[: len(prompt)] == prompt
        logits = np.array(model(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        sums.append(sum(logps[i - 1, ids[i]] for i in range(len(prompt), len(ids))))
    return sums


def measure(model, adapter, data):
    """Return the validation pairs' log-probabilities under a model as mlx-lm loads it: (pairs, 2)."""
    model, tokenizer = mlx_lm.load(str(model), adapter_path=adapter and str(adapter))
    rows = [json.loads(line) for line in (data / "valid.jsonl").read_text().splitlines()]
    return np.array([answer_logps(model, tokenizer, row) for row in rows])


def test_mlx_lm_sees_what_training_saw(trained, data):
    name, model, out, stdout = trained
    base, policy = measure(model, None, data), measure(model, out, data)
    first, *_, last = metrics_of(out, "valid")
    tolerance = 5e-3 if name == "bfloat16" else 1e-4  # bfloat16 products depend on the shape they are computed in
    gains = policy - base
    margins = 0.1 * (gains[:, 0] - gains[:, 1])
    assert first["logps/chosen"] == pytest.approx(base[:, 0].mean(), rel=tolerance)
    assert first["logps/rejected"] == pytest.approx(base[:, 1].mean(), rel=tolerance)
    assert last["logps/chosen"] == pytest.approx(policy[:, 0].mean(), rel=tolerance)
    assert last["logps/rejected"] == pytest.approx(policy[:, 1].mean(), rel=tolerance)
    loose = 0.1 if name == "bfloat16" else 1e-3
    assert last["rewards/margins"] == pytest.approx(margins.mean(), abs=loose)
    assert last["loss"] == pytest.approx(np.log(1 + np.exp(-margins)).mean(), abs=loose)
    assert first["loss"] == pytest.approx(LOG_2, abs=5e-3 if name == "bfloat16" else 1e-5)
    assert last["loss"] < first["loss"] - 0.1 and last["rewards/accuracies"] > 0.5
    assert f"gained on the rejected one in {last['rewards/accuracies']:.2f}" in stdout and "mlx_lm.generate" in stdout
    assert re.search(r"^pairs: train 12, valid 7, test 0; 6 updates; \d+% of the tokens are padding$", stdout, re.M)
    assert abs(gains).max() > 0.5  # else this test would see no difference between adapter and base


def test_config_and_weights(trained):
    name, model, out, _ = trained
    files = {"adapters.safetensors", "adapter_config.json", "metrics.jsonl", "dpo_trainer.py"}
    files |= {"best/adapters.safetensors", "best/adapter_config.json"}
    assert {name for name in contents(out) if not name.startswith("checkpoint/")} == files
    assert (out / "dpo_trainer.py").read_bytes() == (ROOT / "dpo_trainer.py").read_bytes()
    config = json.loads((out / "adapter_config.json").read_text())
    weights = mx.load(str(out / "adapters.safetensors"))
    kind = name if name in ("dora", "full") else "lora"
    expected = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    if name == "4-bit":
        expected |= {"rank": 4, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    expected["alpha"] = expected["scale"] * expected["rank"]
    assert config["fine_tune_type"] == kind and config["num_layers"] == (1 if name == "bfloat16" else -1)
    assert config["lora_parameters"] == (None if kind == "full" else expected)
    assert config["model"] == str(model) and config["beta"] == 0.1 and config["iters"] == 6
    assert {w.dtype for w in weights.values()} == {mx.bfloat16 if name == "bfloat16" else mx.float32}
    endings = {"lora": {"lora_a", "lora_b"}, "dora": {"lora_a", "lora_b", "m"}, "full": {"weight"}}
    assert {key.rsplit(".", 1)[-1] for key in weights} == endings[kind]
    if name == "4-bit":
        assert {key.split(".", 3)[3].rsplit(".", 1)[0] for key in weights} == set(config["lora_parameters"]["keys"])


def test_metrics_are_one_object_a_line(trained):
    name, _, out, _ = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    places = [(line.pop("step"), line.pop("split")) for line in lines]
    assert places == [(0, "valid"), (2, "train"), (4, "train"), (4, "valid"), (6, "train"), (6, "valid")]
    for (_, split), line in zip(places, lines):
        measured = HELD_OUT | ({"kl"} if name != "full" else set())
        assert set(line) == PER_PAIR | (RATES if split == "train" else measured)
        assert all(math.isfinite(value) for value in line.values())
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-4)
    peak = json.loads((out / "adapter_config.json").read_text())["learning_rate"]
    rates = [peak * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]  # a report is the mean since the last one
    found = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert found == pytest.approx([rates[i + 1] for i in (0, 2, 4)])  # the last update's, no mean
    if name != "full":
        assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 1e-3


def test_older_runs_are_moved_aside(runs):
    out, before, (first, second, third) = runs
    one, two = out.with_name("out-1"), out.with_name("out-2")
    assert contents(one) == before  # nothing of it changed, though the second run began from its adapter
    assert {path.name for path in out.parent.glob("out*")} == {"out", "out-1", "out-2"}
    assert all(len(metrics_of(folder, "train")) == 3 for folder in (out, one, two))
    assert len({contents(folder)["adapters.safetensors"] for folder in (out, one, two)}) == 3
    assert f"The earlier run in {out} is now in {one}" in second.stdout
    assert f"The earlier run in {out} is now in {two}" in third.stdout and "earlier run" not in first.stdout


def test_a_resumed_run_has_the_adapter_as_its_reference(runs, tiny, data):
    out, _, _ = runs
    one, two = out.with_name("out-1"), out.with_name("out-2")
    base, start, end = (measure(tiny, folder, data) for folder in (None, one, two))
    first, *_, last = metrics_of(two, "valid")
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["logps/chosen"] == pytest.approx(start[:, 0].mean(), rel=1e-4)
    assert abs(start - base).max() > 0.5
    assert last["rewards/chosen"] == pytest.approx(0.1 * (end - start)[:, 0].mean(), abs=1e-3)
    config = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, two)]
    assert config[0]["lora_parameters"] == config[1]["lora_parameters"]


def test_another_reference_model(runs, tiny, data):
    out, _, (_, _, third) = runs
    reference, base = measure(out.parent / "other", None, data), measure(tiny, None, data)
    first = metrics_of(out, "valid")[0]
    for i, side in enumerate(("chosen", "rejected")):
        assert first[f"rewards/{side}"] == pytest.approx(0.1 * (base - reference)[:, i].mean(), abs=1e-3)
        assert first[f"logps/{side}"] == pytest.approx(base[:, i].mean(), rel=1e-4)
    assert abs(first["rewards/margins"]) > 0.01 and abs(first["loss"] - LOG_2) > 1e-3
    assert "kl" not in first and "kl is left out" in third.stdout


def test_test_alone_measures_and_writes_nothing(runs, tiny, data):
    """out-1 was trained from the base model, its reference here, so the numbers are those of its last validation."""
    out = runs[0].with_name("out-1")
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    done = run_script("--model", tiny, "--test", data / "valid.jsonl", "--adapter-path", out, env=QUIET, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    last = metrics_of(out, "valid")[-1]
    line = next(line for line in done.stdout.splitlines() if line.startswith("step 0 test: "))
    shown = dict(part.rsplit(" ", 1) for part in line.removeprefix("step 0 test: ").split("  "))
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        assert float(shown[name]) == pytest.approx(last[name], rel=1e-3), name
    assert contents(out) == before and times == {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}


def test_grad_checkpoint_changes_no_number(runs, tiny, data):
    out, _, _ = runs
    train(tiny, data, out.parent / "checkpointed", "--grad-checkpoint")
    folders = out.with_name("out-1"), out.parent / "checkpointed"
    for plain, other in zip(*(metrics_of(folder, "train") for folder in folders), strict=True):
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert other[name] == pytest.approx(plain[name], rel=1e-4), name


def test_interrupted_training_keeps_its_adapter(tiny, data, tmp_path):
    out = tmp_path / "out"
    words = ["--model", tiny, "--data", data, "--adapter-path", out, "--iters", 100000, "--steps-per-report", 1]
    words += ["--learning-rate", 1e-4, "--save-every", 100000]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    env = {**QUIET, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *map(str, [ROOT / "dpo_trainer.py", *words])], env=env, **pipes)
    assert any(line.startswith("step 1 train:") for line in process.stdout)  # reads until there is one
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    step = metrics_of(out, "train")[-1]["step"]
    assert process.returncode == 1 and step > 0
    told, line = stderr.strip().splitlines()
    holds, command = line.split(f"; to go on from step {step}: python ")
    assert holds == f"{out}: interrupted (SIGINT); {out}/adapters.safetensors holds step {step} of 100000"
    assert told == "This step is finished first, and saved. Once more: leave at once"
    base, policy = measure(tiny, None, data), measure(tiny, out, data)
    assert np.isfinite(policy).all() and abs(policy - base).max() > 0
    assert not list(out.glob("unfinished*"))
    words = [sys.executable, *shlex.split(command), "--iters", str(step + 2)]  # what it advises works
    subprocess.run(words, env=env, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert [row["step"] for row in metrics_of(out, "train")] == list(range(1, step + 3))


def test_a_gradient_beyond_measure_keeps_the_last_good_adapter(tiny, tmp_path):
    """The line said that the folder held step 1, though nothing had been saved since the last --save-every."""
    rows, out = make_rows(9), tmp_path / "out"
    turns = [{"role": "user", "content": "How far is number 4? " * 9}]  # the longest of both: alone in the last batch
    rows[4] |= {"messages": turns, "chosen": "It is far along the river. " * 9, "weight": 9e8}
    path = write_rows(tmp_path / "train.jsonl", rows)
    words = ["--batch-size", 1, "--learning-rate", 1e-3, "--seed", 1]
    done = run_script("--model", tiny, "--data", path, "--adapter-path", out, *words, env=QUIET)
    good = np.random.default_rng([1, 0]).permutation(9).tolist().index(8)  # updates before that batch
    assert done.returncode == 1 and good > 0
    why = f"step {good + 1} was not made: the gradient norm is N, above 1e+06, at {path}:5: mend them, or lower"
    expected = f"{out}: {why} --learning-rate, and begin anew; {out}/adapters.safetensors holds step {good} of 9\n"
    assert re.sub(r"norm is [\d.]+e\+\d\d", "norm is N", done.stderr) == expected
    assert all(mx.isfinite(w).all() for w in mx.load(str(out / "adapters.safetensors")).values())


def test_no_update_was_good(tiny, tmp_path):
    path, out = write_rows(tmp_path / "train.jsonl", [row | {"weight": 1e8} for row in make_rows(8)]), tmp_path / "out"
    done = run_script("--model", tiny, "--data", path, "--adapter-path", out, "--beta", 1e35, env=QUIET)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    why = "step 1 was not made: the loss or its gradient is not finite"
    assert done.stderr.startswith(f"{out}: {why}, at {path}:")
    assert done.stderr.endswith("begin anew; nothing is trained yet\n")
    assert not list(out.glob("*.safetensors"))
    assert "adapters.safetensors" not in done.stderr  # nothing is there to go on from


UNFIT = [("full", "quantized", dict(bits=4)), ("dora", "DoRA", dict(family="mixtral"))]


@pytest.mark.parametrize("kind, why, extra", UNFIT)
def test_what_cannot_be_trained_is_refused_in_one_line(kind, why, extra, data, tmp_path):
    """Full training of packed 4-bit integers ended in "1.7 nats a token off", DoRA of experts in a traceback."""
    model, out = save_model(tmp_path / "model", **extra), tmp_path / "out"
    done = run_script("--model", model, "--data", data, "--adapter-path", out, "--fine-tune-type", kind, env=QUIET)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.match(f"--fine-tune-type {kind}: .*{why}.*: choose what {model} can be trained with", done.stderr)
    assert not out.exists()
