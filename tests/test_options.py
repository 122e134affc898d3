"""Every option matters or is refused, wherever it is written: on the command line or in a YAML file."""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import mlx.core as mx
import mlx_lm.tuner.callbacks
import pytest
import yaml
from conftest import ROOT, few, make_rows, run_script, save_model, write_rows
from mlx_lm import lora

CONFIGS = ROOT / "tests" / "configs"
BASE = ["--model", "tiny", "--data", "data"]
RUN = [*BASE, "--iters", "4", "--batch-size", "2", "--learning-rate", "1e-3", "--adapter-path", "out"]
SCRIPTS = ("dpo_trainer", "simpo_trainer")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, data in two forms and an adapter."""
    folder = tmp_path_factory.mktemp("options")
    save_model(folder / "tiny")
    save_model(folder / "other", seed=1)
    (folder / "data").mkdir()
    rows = make_rows(20)
    for name, part in (("train", rows[:8]), ("valid", rows[8:14]), ("test", rows[14:])):
        write_rows(folder / "data" / f"{name}.jsonl", part)
    write_rows(folder / "more.jsonl", make_rows(12))
    (folder / "beta.yaml").write_text("beta: 0.3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome("dpo_trainer", [])
        shutil.copy("out/adapters.safetensors", "earlier.safetensors")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """Be in that folder."""
    monkeypatch.chdir(place)
    return place


def parse(*words, script="dpo_trainer"):
    return importlib.import_module(script).parse_args([str(word) for word in words])


def outcome(script, words, before=()):
    """Train in this process after another run, if any; return what came of it but the options as they are saved."""
    module, seen = importlib.import_module(script), {"told": [], "saves": [], "layers": [], "remote": []}
    wandb = types.SimpleNamespace(
        init=lambda **given: seen["told"].append(given["project"]), log=lambda row, step: seen["told"].append(step)
    )

    def load(name, config):
        seen["remote"].append(config)
        return real["load"](name, config)

    def save(path, tree, facts):
        seen["saves"].append(str(path))
        real["save"](path, tree, facts)

    def train(model, *given):
        seen["layers"] = [type(layer).__name__ for layer in model.layers]
        return real["train"](model, *given)

    real = {"load": lora.load, "save": module.save, "train": module.train}
    for old in Path().glob("out*"):
        shutil.rmtree(old)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlx_lm.tuner.callbacks, "wandb", wandb)
        for home, name, spy in ((lora, "load", load), (module, "save", save), (module, "train", train)):
            patch.setattr(home, name, spy)
        try:
            for given in ([before] if before else []) + [words]:
                patch.setattr(sys, "argv", [script, *RUN, *given])
                module.main()
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
    rows = [json.loads(line) for file in sorted(Path().glob("out*/metrics.jsonl")) for line in file.open()]
    [row.pop("peak_memory_gb", None) for row in rows]
    weights = {str(file): file.read_bytes() for file in Path().glob("out*/adapters.safetensors")}
    return seen | {"rows": rows, "weights": weights}


# option: (words that are there without it, too; the option's own)
SHOWN = {
    "--config": ([], ["--config", "beta.yaml"]),
    "--model": ([], ["--model", "other"]),
    "--data": ([], ["--data", "more.jsonl"]),
    "--test": ([], ["--test"]),
    "--test-batches": (["--test"], ["--test-batches", "1"]),
    "--val-batches": ([], ["--val-batches", "1"]),
    "--fine-tune-type": ([], ["--fine-tune-type", "dora"]),
    "--optimizer": ([], ["--optimizer", "sgd"]),
    "--num-layers": ([], ["--num-layers", "1"]),
    "--batch-size": ([], ["--batch-size", "3"]),
    "--iters": ([], ["--iters", "5"]),
    "--learning-rate": ([], ["--learning-rate", "2e-3"]),
    "--steps-per-report": ([], ["--steps-per-report", "3"]),
    "--steps-per-eval": ([], ["--steps-per-eval", "3"]),
    "--save-every": ([], ["--save-every", "1"]),
    "--grad-accumulation-steps": ([], ["--grad-accumulation-steps", "2"]),
    "--resume-adapter-file": ([], ["--resume-adapter-file", "earlier.safetensors"]),
    "--adapter-path": ([], ["--adapter-path", "out2"]),
    "--max-seq-length": ([], ["--max-seq-length", "70"]),
    "--grad-checkpoint": ([], ["--grad-checkpoint"]),
    "--report-to": ([], ["--report-to", "wandb"]),
    "--project-name": (["--report-to", "wandb"], ["--project-name", "mine"]),
    "--seed": ([], ["--seed", "1"]),
    "--trust-remote-code": ([], ["--trust-remote-code"]),
    "--loss": ([], ["--loss", "hinge"]),
    "--beta": ([], ["--beta", "0.2"]),
    "--label-smoothing": ([], ["--label-smoothing", "0.2"]),
}
SHOWN_DPO = SHOWN | {
    "--delta": (["--loss", "dpop", "--learning-rate", "0.1"], ["--delta", "50"]),
    "--length-normalize": ([], ["--length-normalize"]),
    "--reference-model": ([], ["--reference-model", "other"]),
}
SHOWN_SIMPO = SHOWN | {"--gamma": ([], ["--gamma", "0.5"]), "--sft-weight": ([], ["--sft-weight", "0.5"])}
ALREADY_SO = {"--train", "--mask-prompt"}  # a command of mlx_lm.lora's says so; here it is never otherwise
TOLD_ELSEWHERE = {"--epochs", "--resume", "--help", "--clear-cache-threshold"}  # each has a test of its own
CASES = [("dpo_trainer", name) for name in SHOWN_DPO]
CASES += [("simpo_trainer", name) for name in ("--loss", "--beta", "--gamma", "--sft-weight")]
CASES += [pytest.param("simpo_trainer", name, marks=pytest.mark.slow) for name in SHOWN]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_in_a_table(script, monkeypatch):
    seen, original = [], argparse.ArgumentParser.parse_known_args
    spy = lambda self, *given: seen.append(self) or original(self, *given)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", spy)
    parse(*BASE, script=script)
    names = {name for action in seen[0]._actions for name in action.option_strings if name.startswith("--")}
    assert names == {*(SHOWN_DPO if script == "dpo_trainer" else SHOWN_SIMPO), *ALREADY_SO, *TOLD_ELSEWHERE}


@pytest.fixture(scope="module")
def known():
    """What came of words that several options share."""
    return {}


@pytest.mark.parametrize("script, option", CASES)
def test_an_option_matters(here, known, script, option):
    common, words = (SHOWN_DPO if script == "dpo_trainer" else SHOWN_SIMPO)[option]
    if (script, *common) not in known:
        known[script, *common] = outcome(script, common)
        assert common or outcome(script, common) == known[script, *common]  # else a difference could be chance
    assert outcome(script, [*common, *words]) != known[script, *common]


def test_what_is_always_so_changes_nothing(here):
    assert outcome("dpo_trainer", ["--train", "--mask-prompt"]) == outcome("dpo_trainer", [])


def test_the_cache_is_held_below_the_threshold(here):
    """A GPU's; a CPU has none, so what MLX is told is looked at."""
    code = "import dpo_trainer as d; d.mx.set_cache_limit = lambda limit: print('limit', limit); d.main()"
    words = [sys.executable, "-c", code, "--model", "none", "--data", "none", "--clear-cache-threshold", "5"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, cwd=here, env=env, capture_output=True, text=True).stdout.split() == ["limit", "5"]


def test_resume_goes_on(here):
    for words, steps in ([], [5, 3]), (["--resume"], [3, 5]):  # without it the earlier run moves aside
        found = outcome("dpo_trainer", ["--iters", "5", *words], before=["--iters", "3"])["rows"]
        assert [row["step"] for row in found if row["split"] == "train"] == steps


def test_epochs_are_passes_over_the_pairs(here):
    """8 pairs in batches of 2 and updates of 3 batches: 2 updates an epoch."""
    words = ["--grad-accumulation-steps", "3", "--steps-per-report", "1", "--epochs", "3"]
    with pytest.MonkeyPatch.context() as patch:  # without --iters, which counts more
        patch.setattr(sys.modules[__name__], "RUN", [*BASE, "--batch-size", "2", "--adapter-path", "out"])
        rows = outcome("dpo_trainer", words)["rows"]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]


# --------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["basic", "advanced", "columns"])
def test_a_users_yaml_loads_as_it_stands(name, script):
    words = ["--config", CONFIGS / f"{name}.yaml", *(["--model", "m"] if name == "columns" else [])]
    if script == "simpo_trainer" and name != "columns":  # they name a reference model, which SimPO has not
        with pytest.raises(SystemExit, match="no such option: --reference_model; the nearest one is"):
            parse(*words, script=script)
        return
    args, given = parse(*words, script=script), yaml.load((CONFIGS / f"{name}.yaml").read_text(), lora.yaml_loader)
    block = given.get("hf_dataset", {})
    for key, value in (given | block).items():
        assert getattr(args, "data" if key == "path" else key) == value, key
    assert isinstance(args.learning_rate, float)


def test_the_command_line_wins_over_yaml(tmp_path):
    (tmp_path / "all.yaml").write_text("beta: 0.3\nlearning_rate: 5e-4\nbatch_size: 8\ngrad_checkpoint: true\n")
    args = parse(*BASE, "--beta", 0.2, "--config", tmp_path / "all.yaml", "--batch-size", 2)
    assert (args.beta, args.learning_rate, args.batch_size, args.grad_checkpoint) == (0.2, 5e-4, 2, True)


def test_without_a_model_the_demos_options_hold_and_the_command_line_wins():
    for script, name in zip(SCRIPTS, ("demo", "demo-simpo")):
        given = yaml.load((ROOT / "data" / f"{name}.yaml").read_text(), lora.yaml_loader)
        args = parse("--data", "data/pairs.jsonl", "--batch-size", 3, script=script)
        assert args.batch_size == 3 != given["batch_size"] and args.learning_rate == given["learning_rate"]
        assert Path(args.model).resolve() == ROOT / "data" / "tiny-chat"


def test_bundled_files_are_found_from_any_folder(tmp_path, monkeypatch):
    """But what lies there by the same name comes first."""
    monkeypatch.chdir(tmp_path)
    args = parse("--data", "data/pairs.jsonl")
    assert (args.model, args.data) == (str(ROOT / "data/tiny-chat"), str(ROOT / "data/pairs.jsonl"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text("{}")
    assert parse("--data", "data/pairs.jsonl").data == "data/pairs.jsonl"


RATES = {  # lr_schedule: the rates of 40 updates at 1e-2, by hand
    "{name: constant}": lambda i: 1e-2 * min((i + 1) / 4, 1),
    "{name: linear, warmup_steps: 10}": lambda i: 1e-2 * min((i + 1) / 10, 1 - max(i - 10, 0) / 30),
    "{name: linear, warmup: 8}": lambda i: 1e-2 * min((i + 1) / 8, 1 - max(i - 8, 0) / 32),
    "{name: cosine, warmup_steps: 100}": lambda i: 1e-2 * (i + 1) / 100,
    "{name: linear_schedule, arguments: [1e-3, 0.0, 40]}": lambda i: 1e-3 * (1 - i / 40),
    "{name: cosine_decay, warmup: 10, warmup_init: 1e-7, arguments: [1e-3, 1000, 1e-7]}": None,  # by mlx-lm itself
}


@pytest.mark.parametrize("block", RATES)
def test_a_schedule_of_a_config_is_what_it_says(block, tmp_path):
    (tmp_path / "lr.yaml").write_text(f"lr_schedule: {block}\nlearning_rate: 1e-2\n")
    args = parse(*BASE, "--config", tmp_path / "lr.yaml")
    optimizer, rates = importlib.import_module("dpo_trainer").make_optimizer(args, updates=40), []
    weight = {"w": mx.array([1.0])}
    for _ in range(40):
        weight = optimizer.apply_gradients({"w": mx.array([0.1])}, weight)
        rates.append(optimizer.learning_rate.item())
    theirs = lora.build_schedule(yaml.load(block, lora.yaml_loader)) if RATES[block] is None else None
    expected = [RATES[block](i) if RATES[block] else theirs(mx.array(i)).item() for i in range(40)]
    assert rates == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_an_optimizers_own_options_and_the_adapters_are_read(here):
    (here / "own.yaml").write_text("optimizer_config: {adamw: {weight_decay: 0.5}}\nlora_parameters: {rank: 2}\n")
    (here / "keys.yaml").write_text("lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, keys: [self_attn.q_proj]}\n")
    optimizer = importlib.import_module("dpo_trainer").make_optimizer(parse(*BASE, "--config", "own.yaml"), updates=9)
    assert optimizer.weight_decay == 0.5
    outcome("dpo_trainer", ["--config", "keys.yaml"])
    names = mx.load("out/adapters.safetensors").keys()
    assert names and all("q_proj.lora" in name for name in names)


# ---------------------------------------------------------------------------------------------------------- refusals

WRONG = {  # words: what the one line says
    "--leaning-rate 1e-3": "no such option: --leaning-rate; the nearest one is --learning-rate",
    "--betta 3": "no such option: --betta; the nearest one is --beta",
    "--config misspelt.yaml": "no such option: --grad_checkpiont; the nearest one is --grad-checkpoint",
    "--config broken.yaml": "broken.yaml",
    "--config missing.yaml": "missing.yaml",
    "--config loss.yaml": "no such loss",
    "--config text.yaml": "save-every",
    "--config type.yaml": "no such loss or type",
    "--config optimizer.yaml": "muon",
    "--config schedule.yaml": "wavy",
    "--config rank.yaml": "training with these options",
    "--beta many": "--beta",
    "--loss dpo": "sigmoid",
    "--beta 0": "above 0",
    "--beta nan": "beta",
    "--batch-size 0": "batch_size",
    "--iters 0": "iters",
    "--label-smoothing 0.5": "label_smoothing",
    "--label-smoothing nan": "label_smoothing",
    "--learning-rate -1": "learning_rate",
    "--learning-rate nan": "learning_rate",
    "--optimizer muon": "adamw",
    "--optimizer adafactor": "adamw",
    "--fine-tune-type qlora": "lora",
    "--report-to paper": "paper",
    "--report-to swanlab": "swanlab is not installed",
    "--model missing/folder/x": "config.json",
    "--model data": "config.json",
    "--max-seq-length 3": "no pair is left to train on",
    "--resume --adapter-path nothing": "nothing",
    "--resume-adapter-file nothing.safetensors": "nothing",
    "--seed -1": "seed",
}
FILES = {
    "misspelt.yaml": "grad_checkpiont: true",
    "broken.yaml": "beta: [1",
    "loss.yaml": "loss: dpo",
    "type.yaml": "fine_tune_type: qlora",
    "optimizer.yaml": "optimizer: muon",
    "text.yaml": "save_every: four",
    "schedule.yaml": "lr_schedule: {name: wavy}",
    "rank.yaml": "lora_parameters: {rank: eight, scale: 20.0, dropout: 0.0}",
}


def refused(place, script, words):
    """Run main() in this process on wrong words; return the one line that it ends with."""
    module = importlib.import_module(script)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [script, *RUN, *words])
        [shutil.rmtree(old) for old in Path().glob("out*")]
        module.main()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    assert isinstance(ended.value.code, str)  # which Python prints on stderr, with exit status 1
    return ended.value.code


@pytest.mark.parametrize("script", few(SCRIPTS, 1))
@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_value_is_refused_in_one_line(here, words, script):
    for name, text in FILES.items():
        (here / name).write_text(text + "\n")
    line = refused(here, script, words.split())
    assert WRONG[words] in line and "\n" not in line and len(line) < 500, line


@pytest.mark.parametrize("script, words", [("dpo_trainer.py", "--betta 3"), ("simpo_trainer.py", "--beta 0")])
def test_it_is_on_stderr_with_exit_status_1(here, script, words):
    shown = run_script(*BASE, *words.split(), script=script, cwd=here)
    assert shown.returncode == 1 and len(shown.stderr.strip().splitlines()) == 1 and not shown.stdout, shown


def test_nothing_to_train_and_nothing_to_train_on_are_named(here):
    assert "--data" in str(pytest.raises(SystemExit, parse, "--model", "tiny").value)
    (here / "data.yaml").write_text("data: data")
    assert "--model" in str(pytest.raises(SystemExit, parse, "--config", "data.yaml").value)
