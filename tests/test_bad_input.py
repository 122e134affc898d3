"""What a user can get wrong ends in one line that says where and what to do, with exit status 1 and nothing written."""

import json
import re
import shutil
import sys

import mlx_lm
import pytest
from conftest import CHATML, make_rows, run_script, save_model, save_tokenizer, write_rows

import dpo_trainer

GOOD = {"prompt": "How far?", "chosen": "Ten minutes.", "rejected": "Who knows."}
REFUSES = "{{ raise_exception('no such turn') }}"
LINES = {  # a line that stands third in a file: what is said about it; test_pairs.py has all that read_pair says
    "no_json": ('{"prompt": "How far?", "chosen', "each line must be one JSON object in UTF-8"),
    "two_values": (json.dumps(GOOD) + json.dumps(GOOD), "each line must be one JSON object in UTF-8"),
    "latin1": (json.dumps(GOOD)[:-2].encode() + 'é"}'.encode("latin-1"), "utf-8.*one JSON object in UTF-8"),
    "utf16": (json.dumps(GOOD).encode("utf-16"), "each line must be one JSON object in UTF-8"),
    "no_object": ([GOOD], "not an object with prompt, chosen, rejected: mend or delete the line"),
    "number": (GOOD | {"chosen": 5}, "'chosen' must be there, as a text or a list of messages: mend"),
    "equal": (GOOD | {"rejected": GOOD["chosen"]}, "chosen and rejected are equal: mend"),
    "robot": (GOOD | {"prompt": [{"role": "robot", "content": "x"}]}, "'prompt': .*known role: mend"),
    "assistant_last": (GOOD | {"prompt": [{"role": "assistant", "content": "x"}]}, ".*end in a user turn: mend"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with models, an adapter of one of them, and files of pairs, good and bad."""
    folder = tmp_path_factory.mktemp("bad")
    save_model(folder / "tiny")
    save_model(folder / "wide", hidden_size=64, head_dim=16)
    for name in ("noweights", "refuses", "words"):
        shutil.copytree(folder / "tiny", folder / name)
    (folder / "noweights" / "model.safetensors").unlink()
    save_tokenizer(folder / "refuses", REFUSES + CHATML)
    words = folder / "words" / "tokenizer.json"
    words.write_text(words.read_text().replace("</s>", "<end>"))
    write_rows(folder / "pairs.jsonl", make_rows(12))
    for name in ("empty", "notrain"):
        (folder / name).mkdir()
    write_rows(folder / "notrain" / "valid.jsonl", make_rows(3))
    (folder / "blank.jsonl").write_text("\n  \n\n")
    (folder / "nothing.jsonl").write_text("")
    (folder / "somefile").write_text("a file, no folder")
    for name, (line, _) in LINES.items():
        text = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        (folder / f"{name}.jsonl").write_bytes(b"%s\n\n%s\n%s\n" % (good := json.dumps(GOOD).encode(), text, good))
    (adapter := folder / "adapters").mkdir()
    args = dpo_trainer.parse_args(["--model", str(folder / "tiny"), "--data", "pairs.jsonl"])
    weights = dpo_trainer.trainable_parameters(mlx_lm.load(args.model)[0], args)
    dpo_trainer.save_weights(adapter / "adapters.safetensors", *weights)
    dpo_trainer.save_config(dict(vars(args)), adapter / "adapter_config.json")
    (adapter / "metrics.jsonl").write_text("an earlier run\n")
    for name in ("unread", "noconfig", "torn"):
        shutil.copytree(adapter, folder / name)
    (folder / "unread" / "adapter_config.json").write_text("{")
    (folder / "noconfig" / "adapter_config.json").unlink()
    (folder / "torn" / "adapters.safetensors").write_bytes((adapter / "adapters.safetensors").read_bytes()[:100])
    return folder


@pytest.fixture
def made(original, tmp_path):
    """A copy of it, so that a test that fails harms no other."""
    return shutil.copytree(original, tmp_path / "made")


def everything(folder):
    """Return each file and folder below, with its content and time."""
    times = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
    return times, {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(made, monkeypatch, words):
    """Run main() in this process; return its last word, after a look at the folder."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "argv", ["dpo_trainer.py", *words.split()])
    before = everything(made)
    with pytest.raises(SystemExit) as stop:
        dpo_trainer.main()
    assert everything(made) == before, "something was written"
    message = stop.value.code
    assert isinstance(message, str) and "\n" not in message  # Python prints it to stderr and exits with status 1
    assert len(message) < 1000  # mlx-lm names every tensor of another model: 24 here, hundreds in a real one
    return message


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named(made, monkeypatch, name):
    message = refusal(made, monkeypatch, f"--model tiny --data {name}.jsonl")
    assert re.match(rf"{name}\.jsonl:3: .*{LINES[name][1]}", message), message


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_bad_line_of_each_split_is_named(made, monkeypatch, name):
    for split in ("train", "valid", "test"):
        write_rows(made / "notrain" / f"{split}.jsonl", [GOOD, GOOD | {"chosen": ""} if split == name else GOOD])
    message = refusal(made, monkeypatch, "--model tiny --data notrain --train --test")
    assert message.startswith(f"notrain/{name}.jsonl:2: an answer is empty: mend or delete"), message


RUN = "--model tiny --data pairs.jsonl"
RESUME = "--data pairs.jsonl --resume-adapter-file"
AWAY = "--adapter-path elsewhere"
TEST = "--model tiny --test pairs.jsonl --adapter-path"
NAME, SHAPE = "give a folder or a Hugging Face name", "shape.*cannot be loaded for wide: see --model and --adapter-path"
NO_ADAPTER = "there is no such adapter: name a folder's adapters.safetensors that was trained with these options"
CASES = {  # words: where, what to do
    "missing file": ("--model tiny --data none.jsonl", "none.jsonl: .*give a .jsonl file"),
    "missing file of another kind": ("--model tiny --data none.json", "none.json: .*no such file or folder"),
    "missing folder": ("--model tiny --data nofolder/", "nofolder/: .*no such file or folder"),
    "missing test file": (f"{RUN} --train --test none.jsonl", "none.jsonl: .*give a .jsonl file"),
    "an empty folder": ("--model tiny --data empty", "empty/train.jsonl: .*a folder with train.jsonl"),
    "a folder without train.jsonl": ("--model tiny --data notrain", "notrain/train.jsonl: .*folder with train"),
    "a folder without test.jsonl": ("--model tiny --data notrain --test --train", "notrain/test.jsonl: .*give"),
    "an empty file": ("--model tiny --data nothing.jsonl", "nothing.jsonl: no train pairs in it: put one on each line"),
    "a file of empty lines": ("--model tiny --data blank.jsonl", "blank.jsonl: no train pairs .*--prompt-feature"),
    "no datasets package": ("--model tiny --data some/name", "some/name: .*datasets.*pip install datasets"),
    "no wandb package": (f"{RUN} --report-to wandb", "dpo_trainer.py: .*pip install wandb"),
    "every pair too long": (f"{RUN} --max-seq-length 5", r"pairs.jsonl:\d+: .*too long: raise --max-seq-length"),
    "a missing config": ("--config none.yaml", "none.yaml: .*a config is a YAML file of options"),
    "a missing model": (f"{RUN} --model ./no/such/one", f"./no/such/one: .*{NAME}"),
    "a file as the model": (f"{RUN} --model somefile", f"somefile: .*{NAME}"),
    "an empty folder as the model": (f"{RUN} --model empty", f"empty: .*{NAME}"),
    "a model without weights": (f"{RUN} --model noweights", "noweights: No safetensors found.*see --model"),
    "too long, new output": (f"{RUN} --max-seq-length 5 --adapter-path new", r"pairs.jsonl:\d+: .*too long"),
    "a reference without weights": (f"{RUN} --reference-model noweights", f"noweights: No safetensors.*{NAME}"),
    "a missing reference": (f"{RUN} --reference-model ./no/such/one", f"./no/such/one: .*{NAME}"),
    "a reference of other words": (f"{RUN} --reference-model words", "words: the reference has another tokenizer: "),
    "a template that raises": (f"{RUN} --model refuses", r"pairs.jsonl:\d+: no such turn: .*chat template"),
    "an output below a file": (f"{RUN} --adapter-path somefile/a", "somefile/a: .*choose another --adapter-path"),
    "no adapter to measure": (f"{TEST} empty", f"empty/adapters.safetensors: {NO_ADAPTER}"),
    "no config of an adapter to measure": (f"{TEST} noconfig", "noconfig/adapters.safetensors: .*name a folder's"),
    "another rank to measure": (f"{TEST} adapters --rank 4", "adapters/adapters.safetensors: .*rank 8, not 4: name a"),
    "no adapter to resume": (f"--model tiny {RESUME} none/adapters.safetensors", f"none/adapters.*: {NO_ADAPTER}"),
    "another file to resume": (f"--model tiny {RESUME} adapters/best.safetensors", f"adapters/best.*: {NO_ADAPTER}"),
    "no config": (f"--model tiny {RESUME} noconfig/adapters.safetensors", "noconfig/adapters.*adapter_config.*name a"),
    "an unreadable config": (f"--model tiny {RESUME} unread/adapters.safetensors", "unread/adapters.*: name a folder"),
    "a torn adapter": (f"--model tiny {RESUME} torn/adapters.safetensors", "torn: .*incomplete.*see --model and --ad"),
    "another model's, resumed": (f"--model wide {RESUME} adapters/adapters.safetensors {AWAY}", f"adapters: .*{SHAPE}"),
    "an adapter that would be moved": (f"--model tiny {RESUME} adapters/adapters.safetensors", ".*what this run reads"),
    "nothing to resume": ("--model tiny --test pairs.jsonl --resume", ".*goes on with a training: --help"),
    "another model's, measured": ("--model wide --test pairs.jsonl", f"adapters: .*{SHAPE}"),
    "keys that no layer has": (f"{RUN} --keys self_attn.nonsense", ".*--keys.*nonsense.*choose"),
    "more layers than there are": (f"{RUN} --num-layers 9", ".*--num-layers 9: there are 2: choose what tiny"),
    "a batch of none": (f"{RUN} --batch-size 0", "dpo_trainer.py: .*--batch-size.*'0'.*--help"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_in_one_line(made, monkeypatch, name):
    words, pattern = CASES[name]
    for package in ("datasets", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    message = refusal(made, monkeypatch, words)
    assert re.match(pattern, message), message


def test_stderr_and_exit_status(made):
    """As a user sees it, in processes of their own."""
    before, cases = everything(made), [("--model tiny --data equal.jsonl", "equal.jsonl:3: chosen and rejected are")]
    cases += [CASES[name] for name in ("a template that raises", "another model's, measured", "a batch of none")]
    for words, pattern in cases:
        done = run_script(*words.split(), cwd=made)
        assert done.returncode == 1 and "Traceback" not in done.stderr, words
        assert re.match(pattern, re.split(r"[\r\n]+", done.stderr.strip())[-1]), done.stderr
    assert everything(made) == before


def test_a_folder_that_the_run_reads_is_not_moved_aside(tiny, tmp_path):
    """--adapter-path MODEL or the data's folder was renamed to -1: the run read from a place that was gone."""
    model, data = tmp_path / "model", tmp_path / "mine" / "pairs.jsonl"
    shutil.copytree(tiny, model)
    data.parent.mkdir()
    write_rows(data, make_rows(6))
    for folder in (model, data.parent, tmp_path):
        done = run_script("--model", model, "--data", data, "--adapter-path", folder)
        assert done.returncode == 1 and f"{folder}: it holds what this run reads: choose another" in done.stderr
    assert model.exists() and data.exists() and not (tmp_path / "mine-1").exists()
