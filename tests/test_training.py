"""A run as a person starts it: what it writes, what mlx-lm makes of that; killed, stopped and resumed; how it fails."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter

import mlx.core as mx
import mlx_lm
import pytest
from conftest import ROOT, few, make_rows, run_script, save_model, write_rows

import dpo_trainer

SCRIPTS = ("dpo_trainer", "simpo_trainer")
RUN = "--data data --batch-size 2 --iters 6 --learning-rate 2e-3 --save-every 2 --steps-per-report 2".split()
# Runs a script, and at a given event of it sends the process a signal: the writes of each file, before, after, and in
# the middle; the renames; the batches made. So a moment is a number, and no clock decides.
CHILD = """import os, pathlib, random, signal, sys
root, name, at, number = sys.argv[1:5]
del sys.argv[1:5]
sys.path.insert(0, root)
import mlx.core as mx
script = __import__(name)
sys.argv[0] = script.__file__
events = [0]

def event(torn=None):
    events[0] += 1
    if events[0] == int(at):
        if torn:
            os.truncate(torn, random.Random(events[0]).randrange(os.path.getsize(torn)))
        os.kill(os.getpid(), int(number))

def watch(home, name, torn=False):
    real = getattr(home, name)
    def watched(*given, **named):
        event()
        result = real(*given, **named)
        event(given[0] if torn else None)
        return result
    setattr(home, name, watched)

watch(mx, "save_safetensors", torn=True)
for home, name in ((pathlib.Path, "replace"), (script.lora, "save_config"), (script, "make_batch")):
    watch(home, name)
try:
    script.main()
finally:
    print("events", events[0])
"""
SETTINGS = {  # script, options, options in a YAML file
    "lora": ("dpo_trainer", "", ""),
    "dora": ("simpo_trainer", "--fine-tune-type dora", ""),
    "full": ("dpo_trainer", "--fine-tune-type full --num-layers 1 --learning-rate 1e-4", ""),
    "accumulation": ("simpo_trainer", "--grad-accumulation-steps 3 --epochs 2", ""),
    "dropout": ("dpo_trainer", "--grad-checkpoint", "lora_parameters: {rank: 4, scale: 20.0, dropout: 0.3}"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, data to train, validate and test on, and the child that signals itself."""
    folder = tmp_path_factory.mktemp("training")
    save_model(folder / "tiny")
    (folder / "data").mkdir()
    for name, rows in (("train", make_rows(12)), ("valid", make_rows(15)[12:]), ("test", make_rows(18)[15:])):
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    (folder / "child.py").write_text(CHILD)
    for name, (_, _, text) in SETTINGS.items():
        (folder / f"{name}.yaml").write_text(text + "\nsteps_per_eval: 100\n")
    return folder


def run(place, setting, out, *words, at=0, number=signal.SIGKILL, **given):
    """Run a setting's script in the child; return the finished process."""
    script, options, _ = SETTINGS[setting]
    command = [sys.executable, "child.py", ROOT, script, at, int(number), "--model", "tiny", *RUN, *options.split()]
    command += ["--config", f"{setting}.yaml", "--adapter-path", out, *words]
    return subprocess.run([*map(str, command)], cwd=place, capture_output=True, text=True, timeout=300, **given)


def contents(folder):
    """Return the bytes of the arrays that a run must end with, and its facts; their order in a file is chance."""
    arrays, facts = mx.load(str(folder / "checkpoint.safetensors"), return_metadata=True)
    adapter = mx.load(str(folder / "adapters.safetensors"))
    return [{name: (w.shape, bytes(w)) for name, w in found.items()} for found in (arrays, adapter)] + [facts]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def one_line(shown):
    """Return the one line on stderr with which a process ended at exit status 1."""
    lines = [line for line in shown.stderr.splitlines() if line.strip() and "PyTorch" not in line]
    assert shown.returncode == 1 and len(lines) == 1 and "Traceback" not in shown.stderr, shown
    return lines[0]


# ------------------------------------------------------------------------------------------------------ what is written

KINDS = {  # what is trained: the model's own form, the options
    "4-bit dora": ({"bits": 4}, "--fine-tune-type dora"),
    "full": ({}, "--fine-tune-type full --num-layers 1"),
    "bfloat16": ({"dtype": mx.bfloat16}, ""),
    "lora": ({}, ""),
    "dora": ({}, "--fine-tune-type dora"),
    "4-bit": ({"bits": 4}, ""),
    "mxfp4": ({"bits": 4, "mode": "mxfp4"}, ""),  # its scales are of 8 bits, and no floats
}


@pytest.mark.parametrize("kind", few(KINDS, 2))
@pytest.mark.parametrize("script", few(SCRIPTS, 1))
def test_an_adapter_gives_in_mlx_lm_what_training_saw(place, monkeypatch, script, kind):
    """Its logits are those of the parameters in the checkpoint, which training held, and not the base model's."""
    given, options = KINDS[kind]
    model, out = save_model(place / f"model {kind}", **given), place / f"{script} {kind}"
    words = ["--model", model, *RUN, *options.split(), "--adapter-path", out, "--test"]
    shown = run_script(*words, script=f"{script}.py", cwd=place)
    assert shown.returncode == 0, shown.stderr
    files = {"adapters.safetensors", "adapter_config.json", "checkpoint.safetensors", "metrics.jsonl"}
    assert files == {path.name for path in out.iterdir()} - {"dpo_trainer.py", "simpo_trainer.py"}
    steps = [(row["step"], row["split"]) for row in records(out)]
    assert steps == [(0, "valid"), (2, "train"), (4, "train"), (6, "train"), (6, "valid"), (6, "test")]
    assert shown.stdout.splitlines()[-1].startswith("Next: mlx_lm.generate --model ")
    rows = mx.array([dpo_trainer.np.random.default_rng(i).integers(10, 300, 24).tolist() for i in range(3)])
    loaded, base = (mlx_lm.load(str(model), adapter_path=path)[0](rows) for path in (str(out), None))
    monkeypatch.chdir(place)
    trained = mlx_lm.load(str(model))[0]
    args = dpo_trainer.parse_args(["--model", str(model), "--data", "data", *options.split()])
    dpo_trainer.trainable_parameters(trained, args)
    trained = dpo_trainer.install(mx.load(str(out / "checkpoint.safetensors"))["0"], trained)
    far, near = (mx.abs(loaded - other).max().item() for other in (base, trained(rows)))
    assert near <= (1e-4 if given.get("dtype") is None else 0.05) and far > max(0.01, 3 * near), (near, far)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_demo(tmp_path, script, monkeypatch):
    """The first command of the README, from another folder: the bundled files are found beside the script.

    Of the greedy answers to the 100 held-out prompts 29 are helpful before it.
    """
    shown = run_script("--data", "data/pairs.jsonl", "--test", script=f"{script}.py", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    [folder] = tmp_path.iterdir()
    first, last = records(folder)[0], records(folder)[-1]
    assert (first["split"], first["step"], first["kl"], last["split"]) == ("valid", 0, 0, "test")
    assert last["rewards/accuracies"] >= 0.95 and 0 < last["kl"] < (0.05 if script == "dpo_trainer" else 0.3), last
    assert script != "dpo_trainer" or abs(first["loss"] - 0.6931) < 1e-3
    monkeypatch.syspath_prepend(ROOT / "data")
    import make_tiny_chat as world

    words = shown.stdout.splitlines()[-1].removeprefix("Next: mlx_lm.generate --model ").split(" --adapter-path ")
    model, tokenizer = mlx_lm.load(words[0], adapter_path=str(tmp_path / words[1]))
    rows = [json.loads(line) for line in (ROOT / "data" / "test.jsonl").read_text().splitlines()]
    prompts = [tokenizer.apply_chat_template(world.prompt_messages(row), add_generation_prompt=True) for row in rows]
    texts = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=80).texts
    assert Counter(map(world.manner, texts))["helpful"] >= 90


# ------------------------------------------------------------------------------------------------------------ the pairs


def trained_alike(place, rows, words, monkeypatch, script="dpo_trainer"):
    """Return the adapters of a run in this process for each list of words, on the same rows, as {name: array}."""
    monkeypatch.chdir(place)
    module, found = __import__(script), []
    write_rows(place / "alike" / "train.jsonl", rows)
    for given in words:
        shutil.rmtree("alike-out", ignore_errors=True)
        command = [
            script,
            "--model",
            "tiny",
            "--data",
            "alike",
            "--learning-rate",
            "1e-3",
            "--adapter-path",
            "alike-out",
        ]
        monkeypatch.setattr(sys, "argv", command + given.split())
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        module.main()
        found.append(mx.load("alike-out/adapters.safetensors"))
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulation_is_a_larger_batch(place, monkeypatch, script):
    """An update of 5 pairs: 5, 2 + 2 + 1, or one at a time, though lengths and weights differ."""
    (place / "alike").mkdir(exist_ok=True)
    write_rows(place / "alike" / "valid.jsonl", make_rows(2))
    rows = [row | {"weight": weight} for row, weight in zip(make_rows(5), (1, 0.5, 2, 1, 3))]
    words = [f"--iters 3 --batch-size {a} --grad-accumulation-steps {b}" for a, b in ((5, 1), (2, 3), (1, 5))]
    whole, *others = trained_alike(place, rows, words, monkeypatch, script)
    assert max(mx.abs(w).max().item() for name, w in whole.items() if "lora_b" in name) > 1e-4
    for other in others:
        assert max(mx.abs(whole[name] - other[name]).max().item() for name in whole) < 2e-5


@pytest.mark.parametrize("script", few(SCRIPTS, 1))
def test_an_epoch_visits_every_pair_once(place, monkeypatch, script):
    """11 pairs in batches of 2 and updates of 4 batches: 2 updates an epoch, the second of them with what is left."""
    module, seen = __import__(script), []
    (place / "alike").mkdir(exist_ok=True)
    write_rows(place / "alike" / "valid.jsonl", make_rows(2))
    train, make_batch = module.train, module.make_batch
    done = lambda *_: {"rewards/accuracies": 1.0, "kl": 0.0}

    def watched(*given):
        monkeypatch.setattr(module, "evaluate", done)
        monkeypatch.setattr(module, "make_batch", lambda *b: seen.append([p["asked"] for p in b[0]]) or make_batch(*b))
        train(*given)

    monkeypatch.setattr(module, "train", watched)
    words = "--epochs 3 --batch-size 2 --grad-accumulation-steps 4"
    trained_alike(place, make_rows(11), [words], monkeypatch, script)
    epochs = [Counter(sum(seen[i : i + 6], [])) for i in range(0, len(seen), 6)]
    assert len(epochs) == 3 and all(len(epoch) == 11 and {*epoch.values()} == {1} for epoch in epochs)
    assert len({str(seen[i : i + 6]) for i in range(0, len(seen), 6)}) == 3  # in another order each time


# -------------------------------------------------------------------------------------------------------------- killed

KILLS = [f"{name} {seed}" for seed in range(3) for name in SETTINGS]


@pytest.fixture(scope="module")
def uncut(place):
    """The runs that nobody disturbs, each once: {setting: (what it ends with, its number of events)}."""
    found = {}

    def get(setting):
        if setting not in found:
            shown = run(place, setting, f"uncut-{setting}")
            assert shown.returncode == 0, shown.stderr
            found[setting] = contents(place / f"uncut-{setting}"), int(shown.stdout.split()[-1])
        return found[setting]

    return get


@pytest.mark.parametrize("kill", few(KILLS, 1))
def test_killed_at_any_event_and_resumed_it_ends_as_uncut(place, uncut, kill):
    """Twice but in the first ones, where the second kill follows the resumption; what has its name is always whole."""
    setting, seed = kill.split()
    expected, events = uncut(setting)
    rng, out = random.Random(kill), place / f"killed-{setting}-{seed}"
    for at in (rng.randrange(events // 3, events + 1), rng.randrange(1, events // 3))[: 1 + int(seed)]:
        words = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
        assert run(place, setting, out.name, *words, at=at).returncode == -signal.SIGKILL
        for path in out.glob("[!u]*.safetensors"):
            mx.eval(mx.load(str(path)))
    words = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
    shown = run(place, setting, out.name, *words)
    assert shown.returncode == 0 and contents(out) == expected, shown.stderr


@pytest.mark.parametrize("number", few([signal.SIGTERM, signal.SIGINT], 1))
def test_a_signal_ends_after_the_step_with_all_saved(place, uncut, number):
    """And says how to go on; what goes on ends as if it had never been stopped."""
    expected, events = uncut("lora")
    shown = run(place, "lora", f"stopped-{number}", at=events * 2 // 3, number=number)
    found = one_line(shown)
    step = int(found.removeprefix("interrupted, saved at step ").split()[0])
    assert found.endswith(f"step {step} of 6: go on with the same command and --resume") and 0 < step < 6
    facts = mx.load(str(place / f"stopped-{number}" / "checkpoint.safetensors"), return_metadata=True)[1]
    assert facts["step"] == str(step) == str(records(place / f"stopped-{number}")[-1]["step"])
    assert run(place, "lora", f"stopped-{number}", "--resume").returncode == 0
    assert contents(place / f"stopped-{number}") == expected


def test_a_run_is_resumed_by_its_folder_alone(place, uncut, tmp_path):
    """Its options are in the folder; with them it ends at once, for it had ended."""
    expected, _ = uncut("lora")
    shown = run_script("--resume", "--adapter-path", "uncut-lora", cwd=place)
    assert shown.returncode == 0 and contents(place / "uncut-lora") == expected, shown.stderr


OTHERS = ["--beta 0.2", "--learning-rate 1e-3", "--seed 1", "--data more.jsonl", "--batch-size 3", "--loss ipo"]


@pytest.mark.parametrize("words", few(OTHERS, 1))
def test_another_run_is_not_resumed(place, uncut, words):
    expected, _ = uncut("lora")
    write_rows(place / "more.jsonl", make_rows(14))
    found = one_line(run_script("--resume", "--adapter-path", "uncut-lora", *words.split(), cwd=place))
    assert found.startswith("uncut-lora/checkpoint.safetensors: it is of other options or pairs: ")
    assert contents(place / "uncut-lora") == expected


@pytest.mark.slow
def test_changed_pairs_are_not_resumed_and_a_torn_checkpoint_is_named(place, uncut):
    uncut("lora")
    shutil.copytree(place / "uncut-lora", place / "torn")
    shutil.copytree(place / "data", place / "changed")
    rows = (place / "data" / "train.jsonl").read_text()
    (place / "changed" / "train.jsonl").write_text(rows.replace("It is 3 minutes", "It is 4 minutes"))
    words = ["--resume", "--adapter-path", "torn"]
    assert "other options or pairs" in one_line(run_script(*words, "--data", "changed", cwd=place))
    os.truncate(place / "torn" / "checkpoint.safetensors", 3000)
    assert one_line(run_script(*words, cwd=place)).startswith("torn/checkpoint.safetensors: ")


@pytest.mark.slow
def test_the_earlier_run_moves_aside(place, uncut):
    expected, _ = uncut("lora")
    shutil.copytree(place / "uncut-lora", place / "again")
    shown = run(place, "lora", "again")
    moved = [path for path in place.glob("again-*")]
    assert shown.returncode == 0 and f"The earlier run is now in {moved[0].name}" in shown.stdout and len(moved) == 1
    assert contents(moved[0]) == contents(place / "again") == expected


# --------------------------------------------------------------------------------------------------------- how it fails


@pytest.mark.parametrize("at", few([16_000, 60_000, 0], 1))
def test_a_full_disk_is_one_line_and_what_was_saved_is_whole(place, uncut, at):
    """No file may pass a size: below that of the adapter, the checkpoint, the options."""
    uncut("lora")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    found = one_line(run(place, "lora", f"full-{at}", preexec_fn=limit))
    assert f"full-{at}" in found and ("make room" in found or "choose another --adapter-path" in found)
    for path in (place / f"full-{at}").glob("[!u]*.safetensors"):
        mx.eval(mx.load(str(path)))


def test_a_folder_that_cannot_be_made_is_one_line(place):
    (place / "file").write_text("a file")
    words = ["--model", "tiny", *RUN, "--adapter-path", "file/out"]
    assert one_line(run_script(*words, cwd=place)).endswith(": choose another --adapter-path")


@pytest.mark.parametrize("script", few(SCRIPTS, 1))
def test_a_model_of_no_numbers_is_named(place, script):
    """float16 overflows in it."""
    model = save_model(place / "nan", dtype=mx.float16)
    weights = mx.load(str(model / "model.safetensors"))
    weights = {name: w * 600 if "up_proj" in name or "gate_proj" in name else w for name, w in weights.items()}
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    found = one_line(run_script("--model", "nan", *RUN, "--adapter-path", "n", script=f"{script}.py", cwd=place))
    assert found.startswith("nan, data: its log-probabilities are no numbers, as where float16 overflows"), found


def test_a_second_round_starts_from_the_first(place):
    """Its adapter is read before the earlier run moves aside; dropout or not, nothing has moved from it at step 0."""
    block = "lora_parameters: {rank: %d, scale: 20.0, dropout: 0.3}"
    more = ["--resume-adapter-file", "adapters/adapters.safetensors"]
    for rank, words, status in ((4, [], 0), (4, more, 0), (2, more, 1)):
        (place / "c.yaml").write_text(block % rank)
        words = ["--config", "c.yaml", "--model", "tiny", *RUN, "--learning-rate", "1e-2", *words]
        shown = run_script(*words, cwd=place)
        assert shown.returncode == status, shown.stderr
    assert "--resume-adapter-file has other layers or another rank" in one_line(shown)
    first = records(place / "adapters")[0]
    assert abs(first["loss"] - 0.6931472) < 1e-6 and first["rewards/margins"] == 0 == first["kl"]


def test_a_run_that_breaks_says_so(place):
    """A rate that is far too high ends in a warning; one beyond all measure, in no numbers, at once."""
    words = ["--model", "tiny", *RUN, "--adapter-path"]
    shown = run_script(*words, "hot", "--learning-rate", "0.3", cwd=place)
    assert shown.returncode == 0 and records(place / "hot")[-1]["kl"] > 1
    assert "warning: kl is above 1: answers may be broken: lower --learning-rate" in shown.stdout.splitlines()
    assert "the loss is not finite" in one_line(run_script(*words, "burnt", "--learning-rate", "1e30", cwd=place))


@pytest.mark.slow
def test_what_is_reported_goes_to_wandb(place):
    """A module of that name, which notes what it is given."""
    (place / "fake").mkdir()
    (place / "fake" / "wandb.py").write_text(
        "def init(**given):\n    print('init', given['project'], given['name'], given['config']['beta'])\n\n\n"
        "def log(row, step):\n    print('log', step, *sorted(row))\n"
    )
    env = os.environ | {"PYTHONPATH": str(place / "fake")}
    words = ["--model", "tiny", *RUN, "--adapter-path", "told", "--report-to", "wandb", "--project-name", "mine"]
    lines = run_script(*words, cwd=place, env=env).stdout.splitlines()
    assert "init mine told 0.1" in lines
    logged = [line.split() for line in lines if line.startswith("log ")]
    assert [words[1] for words in logged] == ["0", "2", "4", "6", "6"]
    assert {"iteration", "valid/loss", "valid/kl"} <= {*logged[0]} and "train/rewards/accuracies" in logged[1]


def test_dropout_is_the_same_when_a_checkpoint_computes_it_again(tiny):
    """Along the gradient the loss rises as steeply as the gradient says, the masks being drawn alike each time."""
    args = dpo_trainer.parse_args(["--model", str(tiny), "--data", "d", "--grad-checkpoint"])
    args.lora_parameters = {"rank": 4, "scale": 20.0, "dropout": 0.4}
    model = mlx_lm.load(str(tiny))[0]
    params = dpo_trainer.trainable_parameters(model, args)
    params = params + 0.05 * mx.random.normal(params.shape, key=mx.random.key(3))
    pair = {"prompt": [*range(7, 40)], "chosen": [*range(50, 60)], "rejected": [*range(60, 66)], "weight": 1.0}
    batch = dpo_trainer.make_batch([pair], (64, 32))
    model.train()

    def loss(vector):
        mx.random.seed(1)
        dpo_trainer.np.random.seed(1)
        return dpo_trainer.answer_logps(dpo_trainer.install(vector, model), batch)[0].sum()

    gradient = mx.grad(loss)(params)
    slope = mx.linalg.norm(gradient).item()
    step = 1e-3 * gradient / slope
    assert slope > 10 and loss(params).item() != dpo_trainer.answer_logps(model.eval(), batch)[0].sum().item()
    model.train()
    assert (loss(params + step) - loss(params - step)).item() / 2e-3 == pytest.approx(slope, rel=0.02)
