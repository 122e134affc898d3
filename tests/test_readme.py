"""The README keeps its word: its commands are those of .ci/run, its line counts are right, it names every option."""

import re
import shlex

import pytest
from conftest import ROOT

import build_dpo_pairs
import dpo_trainer
import eval_prefs
import simpo_trainer

TRAINERS = {"dpo_trainer.py": dpo_trainer, "simpo_trainer.py": simpo_trainer}

README = (ROOT / "README.md").read_text()


def blocks():
    return [block.strip() for block in re.findall(r"```\n(.*?)```", README, re.S)]


def test_the_gate_runs_the_readmes_commands():
    install = "pip install -r requirements.txt"
    first = f"{install} && python dpo_trainer.py --data data/pairs.jsonl"
    tests = f"{install} pytest && python -m pytest -q"
    assert first in blocks() and tests in blocks()
    gate = (ROOT / ".ci" / "run").read_text()
    assert tests.replace("install", "install -q") in gate


def test_the_file_table_counts_lines():
    rows = re.findall(r"^\| `([\w/.-]+\.py)` \| [^|]* \| ([\d,]+) \|$", README, re.M)
    assert dict(rows).keys() >= {path.name for path in ROOT.glob("*.py")} | {"data/make_tiny_chat.py"}
    for name, count in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(count.replace(",", "")), name


@pytest.mark.parametrize("script", TRAINERS)
def test_every_command_line_parses(script, monkeypatch):
    """Each command that is shown is one that the script takes."""
    commands = [c for c in re.findall(rf"{script} (--[^`\n&)]+)", README) if c != "--help"]
    assert len(commands) >= {"dpo_trainer.py": 3}.get(script, 1)
    monkeypatch.chdir(ROOT)
    for command in commands:
        # with --train none looks for an adapter on this disk
        args = TRAINERS[script].parse_args(["--data", "data/pairs.jsonl", *shlex.split(command), "--train"])
        assert args.model and args.data


@pytest.mark.parametrize("script", [*TRAINERS, "build_dpo_pairs.py", "eval_prefs.py", "export_ollama.py"])
def test_every_option_is_named(script):
    for option in re.findall(r'^    add\((?:"-c", )?"(--[\w-]+)"', (ROOT / script).read_text(), re.M):
        assert re.search(rf"{option}\b", README), option


def test_every_function_that_it_names_is_there():
    for name in re.findall(r"`(\w+)`", "".join(re.findall(r"^\| [^|]+ \| (`\w+`.*)", README.split("## Which")[1], re.M))):
        assert name in ("step", "train") or any(hasattr(script, name) for script in (*TRAINERS.values(), build_dpo_pairs, eval_prefs)), name
