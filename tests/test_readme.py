"""The README keeps its word: its commands are those of .ci/run, its line counts are right, it names every option."""

import re
import shlex

import dpo_trainer
from conftest import ROOT

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
    rows = re.findall(r"^\| `([\w/.-]+)` \| [^|]* \| ([\d,]+) \|$", README, re.M)
    assert dict(rows).keys() >= {"dpo_trainer.py", "data/make_tiny_chat.py"}
    for name, count in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(count.replace(",", "")), name


def test_every_command_line_parses(tmp_path, monkeypatch):
    """Each dpo_trainer.py command that is shown is one that the script takes."""
    commands = [c for c in re.findall(r"dpo_trainer\.py (--[^`\n&)]+)", README) if c != "--help"]
    assert len(commands) >= 3
    monkeypatch.chdir(ROOT)
    for command in commands:
        # with --train none looks for an adapter on this disk
        args = dpo_trainer.parse_args(["--data", "data/pairs.jsonl", *shlex.split(command), "--train"])
        assert args.model and args.data


def test_every_option_is_named():
    for option in re.findall(r'^    add\((?:"-c", )?"(--[\w-]+)"', (ROOT / "dpo_trainer.py").read_text(), re.M):
        assert re.search(rf"{option}\b", README), option


def test_every_function_that_it_names_is_there():
    for name in re.findall(r"^\| [^|]+ \| `(\w+)`", README.split("## Which function to edit")[1], re.M):
        assert name == "step" or hasattr(dpo_trainer, name), name
