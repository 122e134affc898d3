"""The README keeps its word: its commands are those of .ci/run and parse, its line counts are right."""

import re
import shlex

import pytest
from conftest import ROOT

import dpo_trainer
import simpo_trainer

README = (ROOT / "README.md").read_text()


def test_the_gate_runs_the_readmes_commands():
    blocks = [block.strip() for block in re.findall(r"```\n(.*?)```", README, re.S)]
    tests = "pip install -r requirements.txt pytest && python -m pytest -q"
    assert "pip install -r requirements.txt && python dpo_trainer.py --data data/pairs.jsonl" in blocks
    assert tests in blocks and tests.replace("install", "install -q", 1) in (ROOT / ".ci" / "run").read_text()


def test_the_file_table_counts_lines():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| [^|]* \| (\d+) \|", README, re.M))
    assert rows.keys() == {path.name for path in ROOT.glob("*.py") if path.name in rows} and len(rows) == 6
    for name, count in rows.items():
        assert len((ROOT / name).read_text().splitlines()) == int(count), name


@pytest.mark.parametrize("script", [dpo_trainer, simpo_trainer])
def test_every_command_parses(script, monkeypatch):
    name = f"{script.__name__}.py"
    commands = [words for words in re.findall(rf"{name} (--[^`\n&)]+)", README) if "--help" not in words]
    assert commands
    monkeypatch.chdir(ROOT)
    for command in commands:
        if "--resume" not in command:  # goes on with a run that is there
            assert script.parse_args(["--data", "data/pairs.jsonl", *shlex.split(command)]).model


def test_what_it_names_is_printed_or_there():
    sides = ("chosen", "rejected", "margins", "accuracies")
    kinds = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in sides}
    for name in re.findall(r"`(\w+/\w+)`", README):
        assert name in kinds or (ROOT / name).exists() or name.split("/")[0] in ("report", "data", "adapters"), name
