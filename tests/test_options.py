"""Every option matters or is refused, wherever it is written: on the command line or in a YAML file."""

import argparse
import ast
import functools
import json
import math
import operator
import os
import re
import signal
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.tuner.callbacks
import pytest
import yaml
from conftest import ROOT, make_rows, run_script, save_model, write_rows
from mlx.utils import tree_map
from mlx_lm.tuner.utils import build_schedule
from mlx_lm.utils import load_tokenizer

import dpo_trainer
from dpo_trainer import ADAPTER, parse_args

CONFIGS = ROOT / "tests" / "configs"
BASE = ["--model", "tiny", "--data", "data"]
RUN = [*BASE, "--iters", "4", "--batch-size", "2", "--adapter-path", "out"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, data in three forms and an adapter."""
    folder = tmp_path_factory.mktemp("options")
    save_model(folder / "tiny")
    save_model(folder / "other", seed=1)
    (folder / "data").mkdir()
    rows = make_rows(20)
    for name, part in (("train", rows[:8]), ("valid", rows[8:14]), ("test", rows[14:])):
        write_rows(folder / "data" / f"{name}.jsonl", part)
    write_rows(folder / "more.jsonl", make_rows(12))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(folder)
    args = parse_args([*BASE, "--rank", "4", "--keys", "self_attn.q_proj"])
    params, layout = dpo_trainer.trainable_parameters(mlx_lm.load("tiny")[0], args)
    (folder / "adapter").mkdir()
    params = tree_map(lambda w: w + 0.01, params)
    dpo_trainer.save_weights(folder / "adapter" / "adapters.safetensors", params, layout)
    dpo_trainer.save_config(dict(vars(args)), folder / "adapter" / "adapter_config.json")
    monkeypatch.undo()
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """Be in that folder, with fake wandb and swanlab modules."""
    monkeypatch.chdir(place)
    for name in ("wandb", "swanlab"):
        monkeypatch.setitem(sys.modules, name, module := types.ModuleType(name))
        module.__spec__ = ModuleSpec(name, None)  # installed, for find_spec
    return place


def actions_of(monkeypatch):
    """Return {"--option": its argparse action} of all but --help."""
    seen, original = [], argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: seen.append(self) or original(self, *a))
        parse_args(["--model", "m", "--data", "d"])
    actions = seen[0]._actions
    return {action.option_strings[-1 if len(action.option_strings[0]) == 2 else 0]: action for action in actions[1:]}


def splits(words, folder):
    """What is trained, validated and tested on."""
    found = dpo_trainer.load_splits(parse_args(BASE + words))
    return {name: [pair["prompt"][-1]["content"] for pair in pairs] for name, pairs in found.items()}


def row(words, folder):
    """What is read from a row with two sets of columns."""
    columns = {"prompt": "p", "chosen": "c", "rejected": "r"}
    columns |= {f"my_{name}": text.upper() for name, text in columns.items()}
    return dpo_trainer.read_pair(columns, parse_args(BASE + words))


def lengths(words, folder):
    """How many tokens are left of each pair."""
    args = parse_args(BASE + words)
    pairs = dpo_trainer.load_splits(args)["train"]
    pairs = dpo_trainer.encode_pairs(load_tokenizer("tiny"), pairs, args.max_seq_length)
    return [len(pair["prompt"]) for pair in pairs]


def loss(words, folder):
    """The losses of two pairs."""
    mask = mx.array([[1.0] * n + [0.0] * (6 - n) for n in (2, 6, 3, 4)])
    batch = {"mask": mask, "ref_logps": mx.array([-3.0, -9.0, -4.0, -7.0]), "weights": mx.ones(2)}
    logps = mx.array([-3.5, -6.0, -4.25, -9.0])
    return dpo_trainer.dpo_metrics(logps, batch, parse_args(BASE + words))["loss"].tolist()


def plan(words, folder):
    """Which pairs make up which batch of which update."""
    pairs = [{"prompt": [0] * i, "chosen": [i], "rejected": [0]} for i in range(12)]
    return dpo_trainer.plan_updates(pairs, parse_args(BASE + words))


def path_of_a_weight(words, folder):
    """Where 20 updates of a constant gradient lead."""
    optimizer = dpo_trainer.make_optimizer(parse_args(BASE + words), 20)
    weights, way = {"w": mx.array([[1.0, 2.0], [3.0, -4.0]])}, []
    for _ in range(20):
        weights = optimizer.apply_gradients({"w": mx.array([[0.3, 0.1], [-0.2, 0.05]])}, weights)
        way += weights["w"].flatten().tolist()
    return way


def trained(words, folder):
    """Which parameters are trained, and what a training step computes with them."""
    args = parse_args(BASE + words)
    model = mlx_lm.load(args.model, adapter_path=args.adapter)[0]
    params, layout = dpo_trainer.trainable_parameters(model, args)
    dpo_trainer.lighten(model, args)
    weights = dpo_trainer.unpack(tree_map(lambda w: w + 0.1, params), layout)
    model = dpo_trainer.install(model, weights, training=True)
    return layout, model(mx.array([[7, 8, 9, 10]]))[0, -1, :5].tolist()


def run(words, folder):
    """Train for four updates in this process; return what was written and called on the way.

    The report is no more than noted here, so that metrics.jsonl is not there.
    """
    saves, checkpoints, reports, told, lighten = [], [], [], [], dpo_trainer.lighten
    save = dpo_trainer.save_weights

    def light(model, args):
        lighten(model, args)
        checkpoints.extend(layer for layer in model.layers if isinstance(layer, dpo_trainer.Checkpointed))

    spies = {
        (dpo_trainer, "save_weights"): lambda path, *weights: saves.append(str(path)) or save(path, *weights),
        (dpo_trainer, "lighten"): light,
        (dpo_trainer, "lock"): lambda folder, keep=False: None,  # it is this process', which runs many
        (dpo_trainer, "report"): lambda *given: reports.append(given),
        (mlx_lm.tuner.callbacks, "wandb"): types.SimpleNamespace(init=lambda **given: told.append(given["project"])),
        (sys, "argv"): ["dpo_trainer.py", *RUN, *words],
    }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), spy in spies.items():
            patch.setattr(module, name, spy)
        try:
            dpo_trainer.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    steps = {name: [step for step, split, *_ in reports if split == name] for name in ("train", "valid", "test")}
    first = {name: [metrics for _, split, metrics, *_ in reports if split == name][:1] for name in steps}
    for metrics in sum(first.values(), []):  # the clock and the process, no results
        [metrics.pop(name, None) for name in ("tokens_per_second", "peak_memory_gb")]
    return {"steps": steps, "first": first, "saves": saves, "checkpoints": len(checkpoints), "told": told}


def kept(words, folder):
    """Which files a run writes into the user's cache folder, and how many scores."""
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        run(words, folder)
        files = [path for path in sorted(Path(cache).rglob("*")) if path.is_file()]
        return {str(path.relative_to(cache)): path.read_text().count(": [") for path in files}


def resumed(words, folder):
    """Which steps a run reports in the folder of one that has ended."""
    run([], folder)
    return run(words, folder)["steps"]["train"]


def checkpoint_steps(words, folder):
    """Which checkpoints are there after a run that saves at every update."""
    run([*words, "--save-every", "1"], folder)
    return sorted(path.name[:8] for path in Path("out").glob("checkpoint/*"))


def ran(*keys):
    """Return a function that runs the words and gives one thing of what came of it."""
    return lambda words, folder: functools.reduce(operator.getitem, keys, run(words, folder))


ADAPTS = ["--rank", "4", "--keys", "self_attn.q_proj"]
# option: (words that are there without it, too; the option; a function that must see the difference)
SHOWN = {
    "--config": ([], ["--config", "beta.yaml"], loss),
    "--model": ([], ["--model", "other"], ran("first", "valid")),
    "--data": ([], ["--data", "more.jsonl"], splits),
    "--train": (["--test", "--adapter-path", "adapter"], ["--train"], splits),
    "--test": (["--train"], ["--test", "more.jsonl"], splits),
    "--prompt-feature": ([], ["--prompt-feature", "my_prompt"], row),
    "--chosen-feature": ([], ["--chosen-feature", "my_chosen"], row),
    "--rejected-feature": ([], ["--rejected-feature", "my_rejected"], row),
    "--max-seq-length": ([], ["--max-seq-length", "70"], lengths),
    "--loss": ([], ["--loss", "hinge"], loss),
    "--beta": ([], ["--beta", "0.3"], loss),
    "--label-smoothing": ([], ["--label-smoothing", "0.1"], loss),
    "--delta": (["--loss", "dpop"], ["--delta", "2.5"], loss),
    "--length-normalize": ([], ["--length-normalize"], loss),
    "--reference-model": ([], ["--reference-model", "other"], ran("first", "valid")),
    "--reference-cache": ([], ["--no-reference-cache"], kept),
    "--fine-tune-type": ([], ["--fine-tune-type", "dora"], trained),
    "--num-layers": ([], ["--num-layers", "1"], trained),
    "--rank": ([], ["--rank", "3"], trained),
    "--scale": ([], ["--scale", "10.5"], trained),
    "--dropout": ([], ["--dropout", "0.25"], trained),
    "--keys": ([], ["--keys", "self_attn.q_proj", "mlp.up_proj"], trained),
    "--resume-adapter-file": (ADAPTS, ["--resume-adapter-file", "adapter/adapters.safetensors"], trained),
    "--epochs": ([], ["--epochs", "3"], plan),
    "--iters": ([], ["--iters", "2"], plan),
    "--batch-size": ([], ["--batch-size", "3"], plan),
    "--grad-accumulation-steps": ([], ["--grad-accumulation-steps", "2"], plan),
    "--learning-rate": ([], ["--learning-rate", "0.003"], path_of_a_weight),
    "--lr-schedule": ([], ["--lr-schedule", "linear"], path_of_a_weight),
    "--warmup": ([], ["--warmup", "0.5"], path_of_a_weight),
    "--optimizer": ([], ["--optimizer", "sgd"], path_of_a_weight),
    "--grad-checkpoint": ([], ["--grad-checkpoint"], ran("checkpoints")),
    "--seed": ([], ["--seed", "5"], plan),
    "--adapter-path": ([], ["--adapter-path", "elsewhere"], ran("saves")),
    "--resume": ([], ["--resume"], resumed),
    "--keep": ([], ["--keep", "1"], checkpoint_steps),
    "--steps-per-report": ([], ["--steps-per-report", "2"], ran("steps", "train")),
    "--steps-per-eval": ([], ["--steps-per-eval", "3"], ran("steps", "valid")),
    "--save-every": ([], ["--save-every", "1"], ran("saves")),
    "--val-batches": ([], ["--val-batches", "1"], ran("first", "valid")),
    "--test-batches": (["--train", "--test"], ["--test-batches", "1"], ran("first", "test")),
    "--report-to": ([], ["--report-to", "wandb"], ran("told")),
    "--project-name": (["--report-to", "wandb"], ["--project-name", "mine"], ran("told")),
}


def test_every_option_is_in_the_table(monkeypatch):
    assert set(actions_of(monkeypatch)) == set(SHOWN)


@pytest.mark.parametrize("option", SHOWN)
def test_an_option_matters(here, option):
    Path("beta.yaml").write_text("beta: 0.3\n")
    common, words, observe = SHOWN[option]
    with_it, without, again = (observe(found, here) for found in (common + words, common, common))
    assert without == again  # else the difference could be chance
    assert with_it != without


def test_the_reference_is_kept_in_the_cache_folder(here):
    """A file of the model, with the scores of the 14 pairs to train and to validate on; or none at all."""
    [(name, scores)] = kept([], here).items()
    assert re.fullmatch(r"reference-logps/\w+\.jsonl", name) and scores == 14
    assert kept(["--no-reference-cache"], here) == {}


SCHEDULES = ["cosine", "linear", "constant", "{name: cosine_decay, warmup: 2, arguments: [1e-5, 20]}"]


@pytest.mark.parametrize("option", ["--loss", "--fine-tune-type", "--lr-schedule", "--optimizer"])
def test_every_choice_differs_from_the_others(here, monkeypatch, option):
    choices = SCHEDULES if option == "--lr-schedule" else actions_of(monkeypatch)[option].choices
    found = [SHOWN[option][2]([option, choice], here) for choice in choices]
    assert len(found) > 2 and all(found[i] != found[j] for i in range(len(found)) for j in range(i))


def test_help_lists_every_option_with_its_default(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    for option, action in actions_of(monkeypatch).items():
        assert re.search(rf"^  (-c.*, )?{option}\b", shown, re.MULTILINE), option
        default = ADAPTER.get(action.dest) if action.default is None else action.default
        if default is True:
            assert "(default)" in action.help, option
        elif default not in (None, -1):
            default = default if isinstance(default, str) else f"{default:g}"
            assert f"(default: {default}" in action.help % {"default": action.default}, option
    assert "-1: all (default)" in shown and "(default: 1e-5; full: 1e-6)" in shown


def test_defaults(here):
    args = parse_args(BASE)
    assert args.train and args.test is args.adapter is None
    assert (args.epochs, args.iters, args.batch_size, args.grad_accumulation_steps) == (1, None, 4, 1)
    assert (args.optimizer, args.warmup, args.lr_schedule, args.max_seq_length) == ("adamw", 0.1, "cosine", 1024)
    assert (args.beta, args.num_layers, args.learning_rate, args.fine_tune_type) == (0.1, -1, 1e-5, "lora")
    assert args.reference_cache is True and not args.grad_checkpoint
    assert args.lora_parameters == {"rank": 8, "scale": 20.0, "dropout": 0.0}
    full = parse_args([*BASE, "--fine-tune-type", "full"])
    assert full.learning_rate == 1e-6 and full.lora_parameters is None
    assert parse_args([*BASE, "--fine-tune-type", "full", "--learning-rate", "3e-4"]).learning_rate == 3e-4
    assert not parse_args([*BASE, "--test", "--adapter-path", "adapter"]).train
    both = parse_args([*BASE, "--test", "--train", "--adapter-path", "adapter"])  # written to, not read
    assert both.train and both.adapter is None and both.rank == 8
    zero = parse_args([*BASE, "--learning-rate", "0", "--scale", "0"])  # no `or default`: 0 is false in Python
    assert (zero.learning_rate, zero.scale, zero.lora_parameters["scale"]) == (0, 0, 0)


STARTS = ["--resume-adapter-file adapter/adapters.safetensors", "--test --adapter-path adapter"]


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_says_what_it_is(here, start):
    """What its config says holds; another value on the command line is refused, and must not be passed over."""
    args = parse_args([*BASE, *start.split()])
    assert (args.adapter, args.rank, args.scale, args.num_layers) == ("adapter", 4, 20.0, -1)
    assert (args.keys, args.fine_tune_type) == (["self_attn.q_proj"], "lora")
    assert args.lora_parameters == {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    same = "--rank 4 --scale 20 --keys self_attn.q_proj --num-layers -1 --fine-tune-type lora"
    assert vars(parse_args([*BASE, *start.split(), *same.split()])) == vars(args)
    for words, said in [
        ("--rank 16", "rank 4, not 16"), ("--scale 2", "scale 20.0, not 2.0"), ("--dropout 0.5", "not 0.5"),
        ("--keys mlp.up_proj", r"keys \['self_attn.q_proj'\], not \['mlp.up_proj'\]"),
        ("--num-layers 1", "num_layers -1, not 1"), ("--fine-tune-type dora", "fine_tune_type lora, not dora"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit, match=f"^adapter/adapters.safetensors: .*{said}: name a folder's"):
            parse_args([*BASE, *start.split(), *words.split()])


def namespace(words):
    """Return the options as a dict, without --config."""
    return {name: value for name, value in vars(parse_args(words)).items() if name != "config"}


def with_config(text, *words, base=BASE):
    """Return the options with a YAML file of this text, or of this dict."""
    Path("c.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return namespace([*base, "--config", "c.yaml", *words])


def another(value):
    """Return a value that differs from it and that the same option takes."""
    others = {"wandb": "swanlab", "hinge": "ipo", "dora": "full", "linear": "constant", "sgd": "adam"}
    if isinstance(value, list):
        return ["self_attn.k_proj"]
    if isinstance(value, bool):
        return not value
    return value * 2 if type(value) in (int, float) else others.get(value, f"{value}2")


@pytest.mark.parametrize("option", [option for option in SHOWN if option not in ("--config", "--model")])
def test_yaml_sets_every_option_and_the_command_line_wins(here, monkeypatch, option):
    (common, words, _), action = SHOWN[option], actions_of(monkeypatch)[option]
    dest, value, one = action.dest, words[1:], words[1] if words[1:] else None
    if action.nargs != "+":
        switch = isinstance(action, argparse.BooleanOptionalAction)
        value = not words[0].startswith("--no-") if switch else action.type(one) if action.type else one
    expected, base = namespace(BASE + common + words), [*(BASE[:2] if option == "--data" else BASE), *common]
    assert with_config({dest: value}, base=base) == expected
    assert with_config({dest.replace("_", "-"): value}, base=base) == expected
    assert with_config({dest: None}, base=BASE + common) == namespace(BASE + common) != expected
    if option != "--resume-adapter-file":  # there is no other one
        assert with_config({dest: another(value)}, *words, base=base) == expected


def test_yaml_sets_switches_model_data_and_test(here):
    assert with_config({"model": "tiny", "data": "data"}, base=[]) == namespace(BASE)
    assert with_config({"test": True, "train": True}) == namespace([*BASE, "--test", "--train"])
    assert with_config({"test": False}) == with_config("") == with_config("# nothing\n") == namespace(BASE)
    for switch in ("grad_checkpoint", "length_normalize", "reference_cache"):
        assert with_config({switch: True})[switch] is True
        assert not with_config({switch: True}, f"--no-{switch.replace('_', '-')}")[switch]
        assert with_config({switch: False}, f"--{switch.replace('_', '-')}")[switch] is True
    off = with_config({"train": True, "test": "more.jsonl"}, "--no-train", "--adapter-path", "adapter")
    assert not off["train"] and off["adapter"] == "adapter"
    for written in ("1e-6", "1.0e-6", "0.000001", "'1e-6'"):  # YAML takes the first for a text
        assert with_config(f"learning_rate: {written}\n")["learning_rate"] == 1e-6


def test_blocks(here):
    text = "lora_parameters:\n  rank: 3\n  scale: 4.5\n  dropout: 0.2\n  keys: [self_attn.q_proj, mlp.up_proj]\n"
    expected = {"rank": 3, "scale": 4.5, "dropout": 0.2, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    assert with_config(text)["lora_parameters"] == expected
    assert with_config(text, "--rank", "5")["lora_parameters"] == expected | {"rank": 5}
    assert with_config(text, "--keys", "self_attn.v_proj")["lora_parameters"]["keys"] == ["self_attn.v_proj"]
    for name in ("warmup_steps", "warmup"):
        found = with_config(f"lr_schedule:\n  name: linear\n  {name}: 7\n")
        assert (found["lr_schedule"], found["warmup"]) == ("linear", 7.0)
    columns = {"prompt_feature": "q", "chosen_feature": "good", "rejected_feature": "bad"}
    block = {"hf_dataset": {"path": "some/name", **columns}}
    assert with_config(block, base=BASE[:2]).items() >= ({"data": "some/name"} | columns).items()
    assert with_config(block, "--data", "mine")["data"] == "mine"
    text = "beta: null\nlora_parameters:\n  rank: null\nreport_to: ~\nkeys:\nlr_schedule: null\nreference_model: null\n"
    assert with_config(text) == namespace(BASE)


@pytest.mark.parametrize("numbers", ["[1e-3, 10, 1e-5]", "[0.001, 10, 0.00001]"])
def test_the_schedule_of_mlx_lm(here, numbers):
    """Its block is its own: the rate starts at 0 and climbs for 2 updates, then half a cosine over 10 to 1e-5."""
    Path("c.yaml").write_text(f"lr_schedule:\n  name: cosine_decay\n  warmup: 2\n  arguments: {numbers}\n")
    args, weights, found = parse_args([*BASE, "--config", "c.yaml"]), {"w": mx.zeros(2)}, []
    optimizer = dpo_trainer.make_optimizer(args, 100)
    for _ in range(16):
        weights = optimizer.apply_gradients({"w": mx.ones(2)}, weights)
        found.append(optimizer.learning_rate.item())
    arguments = [1e-3, 10, 1e-5]
    theirs = build_schedule({"name": "cosine_decay", "warmup": 2, "arguments": arguments})
    by_hand = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * min(i, 10) / 10)) / 2 for i in range(13)]
    assert found == pytest.approx([float(theirs(mx.array(i))) for i in range(16)], rel=1e-5)
    assert found == pytest.approx([0, 0.5e-3, 1e-3, *by_hand], rel=1e-4, abs=1e-9)


SAME = {  # a config: the same in words
    "basic.yaml": """--model mlx-community/Meta-Llama-3-8B-Instruct-4bit --train --fine-tune-type lora --iters 1000
        --beta 0.1 --data preference_data/ --batch-size 4 --learning-rate 1e-6 --max-seq-length 1024 --rank 8 --scale 20
        --dropout 0""",
    "advanced.yaml": """--model meta-llama/Llama-2-7b-hf --train --fine-tune-type dora --data anthropic/hh-rlhf
        --beta 0.2 --batch-size 8 --iters 5000 --learning-rate 5e-7 --max-seq-length 2048 --rank 16 --scale 10
        --reference-model path/to/reference/model --grad-checkpoint --optimizer adamw --lr-schedule cosine --warmup 100
        --dropout 0.1 --report-to wandb --project-name dpo-llama-experiments""",
    "columns.yaml": """--model m --data your-dataset/preference-data --prompt-feature question
        --chosen-feature good_answer --rejected-feature bad_answer""",
}


@pytest.mark.parametrize("name", SAME)
def test_the_configs_load(here, name):
    words = ["--config", str(CONFIGS / name), *["--model", "m"] * (name == "columns.yaml")]
    assert namespace(words) == namespace(SAME[name].split())


BROKEN = "a config is a YAML file of options"
WRONG_CONFIGS = {
    "unknown key": ("beta: 0.2\nbogus: 1\n", "2: no such option or value: bogus: 1: --help lists all options"),
    "wrong type": ("beta: 0.2\n\nbatch_size: two\n", "3: .*--batch-size.*'two'.*--help"),
    "a text for a switch": ("grad_checkpoint: maybe\n", "1: .*maybe.*--help"),
    "a switch for a text": ("project_name: true\n", "1: .*--project-name.*--help"),
    "a list for a number": ("beta: [1, 2]\n", "1: .*beta.*--help"),
    "a block for a number": ("beta:\n  high: 2\n", "1: .*--beta.*--help"),
    "out of range": ("epochs: 1\nbeta: -1\n", "2: .*--beta.*from.*'-1'.*--help"),
    "not finite": ("learning_rate: .inf\n", "1: .*--learning-rate.*--help"),
    "no such choice": ("loss: foo\n", "1: .*--loss.*'foo'.*sigmoid.*--help"),
    "unknown key in a block": ("beta: 0.2\nlora_parameters:\n  alpha: 16\n", "3: no such option or value: alpha: 16: "),
    "wrong value in a block": ("seed: 1\nlora_parameters:\n  scale: 1\n  rank: 0\n", "4: .*--rank.*--help"),
    "no block": ("lora_parameters: 8\n", "1: no such option or value: lora_parameters: 8: --help"),
    "an empty list": ("keys: []\n", "1: .*--keys.*--help"),
    "no such schedule": ("lr_schedule: {name: bogus, arguments: [1]}\n", "1: .*bogus.*--help"),
    "another config": ("beta: 1\nconfig: beta.yaml\n", "2: no such option or value: config: beta.yaml: --help"),
    "help": ("help: true\n", "1: no such option or value: help: True: --help"),
    "not a mapping": ("- beta\n- 0.2\n", f" .*{BROKEN}"),
    "a text": ("just words\n", f" .*{BROKEN}"),
    "broken": ("beta: [1\nseed: 2\n", f" .*line 2.*{BROKEN}"),
    "a tab": ("beta: 0.2\n\tseed: 2\n", f" .*line 2.*{BROKEN}"),
    "not UTF-8": (b"project_name: \xff\n", f" .*{BROKEN}"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_config_is_refused(tmp_path, monkeypatch, name):
    text, message = WRONG_CONFIGS[name]
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=f"^c.yaml:{message}") as stop:
        parse_args([*BASE, "-c", "c.yaml"])
    assert "\n" not in stop.value.code


DEMO = (
    "model: data/tiny-chat\ndata: data/pairs.jsonl\ntrain: true\ntest: data/test.jsonl\nlearning_rate: 1e-3\n"
    "epochs: 2\nlora_parameters:\n  rank: 16\n"
)


def test_no_model_means_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^dpo_trainer.py: name a model with --model"):
        parse_args([])
    Path("data").mkdir()
    Path("data/demo.yaml").write_text(DEMO)
    capsys.readouterr()
    args = parse_args([])
    shown = capsys.readouterr().out
    assert "data/demo.yaml" in shown and "--model" in shown and len(shown.splitlines()) == 1
    assert (args.model, args.data, args.test) == ("data/tiny-chat", "data/pairs.jsonl", "data/test.jsonl")
    assert (args.train, args.learning_rate, args.epochs, args.lora_parameters["rank"]) == (True, 1e-3, 2, 16)
    args = parse_args(["--data", "mine.jsonl", "--epochs", "1"])
    assert (args.model, args.data, args.epochs, args.learning_rate) == ("data/tiny-chat", "mine.jsonl", 1, 1e-3)
    capsys.readouterr()
    args = parse_args(["--model", "m", "--data", "d"])
    assert capsys.readouterr().out == ""
    assert (args.learning_rate, args.epochs, args.test) == (1e-5, 1, None)


# each with the option, or the other words, that the message must name
IDLE = [
    ("--data data --delta 2", "no --delta"),
    ("--data data --loss hinge --label-smoothing 0.1", "hinge has no --label-smoothing"),
    ("--data data --loss ipo --label-smoothing 0.1", "ipo has no --label-smoothing"),
    ("--data data --fine-tune-type full --rank 4", "no --rank"),
    ("--data data --fine-tune-type full --keys self_attn.q_proj", "no --keys"),
    ("--data more.jsonl --train --test", "--test NAME"),
    ("--data some/name:train --train --test", "--test NAME"),  # NAME:SPLIT is one split: it would be trained on
    ("", "--data"),
    ("--test", "--data"),
    ("--test more.jsonl --train", "--data"),
    ("--data data --no-train", "neither training nor a test"),
    ("--data data --report-to json", "--report-to takes wandb, swanlab or both, not json"),
]
BAD_VALUES = """--batch-size 0, --batch-size 2.5, --beta 0, --beta -1, --beta nan, --beta inf, --epochs x, --epochs 0,
--iters 0, --loss foo, --label-smoothing 0.6, --delta -1, --rank 0, --scale -1, --dropout 1, --dropout -0.1,
--num-layers -2, --seed -1, --seed 18446744073709551616, --learning-rate -1e-5, --learning-rate 11, --warmup -1,
--optimizer lion, --max-seq-length 0, --grad-accumulation-steps 0, --steps-per-report 0, --steps-per-eval 0,
--save-every 0, --val-batches -2, --test-batches -2, --lr-schedule cosine_decay, --fine-tune-type qlora, --model,
--keys, --bet 0.1, --bogus, stray"""
REFUSED = IDLE + [(f"--data data {words}", words.split()[0]) for words in re.split(r",\s", BAD_VALUES)]


@pytest.mark.parametrize("words, named", REFUSED)
def test_idle_combinations_and_bad_values_are_refused_by_name(here, words, named):
    with pytest.raises(SystemExit, match=f"^dpo_trainer.py: .*{named}.*--help lists all options") as stop:
        parse_args(["--model", "tiny", *words.split()])
    assert "\n" not in stop.value.code


RECORDER = """
import json, pathlib

def tell(**what):
    with open(pathlib.Path(__file__).with_name("told.jsonl"), "a") as file:
        file.write(json.dumps(what) + "\\n")

def init(config=None, **words):
    tell(init={name: str(value) for name, value in words.items()}, beta=config["beta"])

def log(data, step=None):
    tell(data=data, step=step)
"""


def test_report_to_wandb_and_swanlab(here, tmp_path):
    """mlx-lm's callbacks import both packages at start, so the fakes lie on the path of a process of its own."""
    for name in ("wandb", "swanlab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(RECORDER)
    words = ["--adapter-path", tmp_path / "out", "--steps-per-report", 2]
    words += ["--report-to", "wandb,swanlab", "--project-name", "mine"]
    done = run_script(*RUN, *words, cwd=here, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    wanted = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for name in ("wandb", "swanlab"):
        first, *told = [json.loads(line) for line in (tmp_path / name / "told.jsonl").read_text().splitlines()]
        assert first["init"]["project"] == "mine" and first["beta"] == 0.1
        assert "out" in (first["init"].get("name"), first["init"].get("experiment_name"))
        assert [line["step"] for line in told] == [0, 2, 4, 4] == [line["step"] for line in wanted]
        for line, metrics in zip(told, wanted):
            split = metrics.pop("split") if name == "swanlab" else metrics["split"]
            expected = {f"{split}/{key}": value for key, value in metrics.items() if key not in ("step", "split")}
            assert line["data"] == {"iteration": line["step"], **expected}
            assert f"{split}/rewards/margins" in line["data"]


def test_the_script_block_names_the_requirements():
    lines = (ROOT / "dpo_trainer.py").read_text().splitlines()
    assert lines[0] == "# /// script"
    block = "\n".join(line.removeprefix("#").strip() for line in lines[1 : lines.index("# ///")])
    wanted = ast.literal_eval(re.search(r"^dependencies = (\[.*?\])$", block, re.DOTALL | re.MULTILINE).group(1))
    assert sorted(wanted) == sorted((ROOT / "requirements.txt").read_text().split())
    assert re.search(r'requires-python = ">=3\.\d+"', block)


def test_test_pairs_of_their_own_leave_the_data_to_train_on(here):
    """--data X --test Y measured an old adapter on Y, or said that there was none, and passed over X."""
    assert parse_args([*BASE, "--test", "more.jsonl"]).train
    alone = parse_args(["--model", "tiny", "--test", "more.jsonl", "--adapter-path", "adapter"])
    assert not alone.train and alone.adapter == "adapter"


def test_full_on_the_command_line_wins_over_a_files_rank(here):
    """It was refused for a --rank that nobody had typed."""
    assert with_config({"lora_parameters": {"rank": 4}}, "--fine-tune-type", "full")["lora_parameters"] is None
    with pytest.raises(SystemExit, match="full fine-tuning has no --rank"):
        parse_args([*BASE, "--fine-tune-type", "full", "--rank", "4"])


def test_mlx_lms_example_schedule_is_read_whole(here):
    """YAML reads 1e-7 as a text: warmup_init was left one, and the run ended in a traceback."""
    block = {"name": "cosine_decay", "warmup": 2, "warmup_init": "1e-7", "arguments": ["1e-5", 10, "1e-7"]}
    found = with_config({"lr_schedule": block})["lr_schedule"]
    assert found == {"name": "cosine_decay", "warmup": 2, "warmup_init": 1e-7, "arguments": [1e-5, 10.0, 1e-7]}


def test_a_test_alone_measures_by_the_adapters_own_objective(here):
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"loss": "ipo", "beta": 0.4}))
    args = parse_args(["--model", "tiny", "--test", "more.jsonl", "--adapter-path", "adapter"])
    assert (args.loss, args.beta) == ("ipo", 0.4)
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
