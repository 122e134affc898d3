"""The sample logs of data/sessions: their script writes them again, build_dpo_pairs.py finds the committed pairs in
them, and those say the same as data/pairs.jsonl: the helpful answer is the better one, and length says nothing."""

import json
import re
import sqlite3
import subprocess
import sys
import zipfile
from collections import Counter
from contextlib import closing

from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "data"))
import make_tiny_chat as world

SESSIONS, PAIRS = ROOT / "data" / "sessions", ROOT / "data" / "session_pairs"
SPLITS = ("train.jsonl", "valid.jsonl", "test.jsonl")


def contents(path):
    """Return what a file says; of an archive its members and of a database its rows, as their bytes vary by library."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return [(info.filename, info.date_time, archive.read(info)) for info in archive.infolist()]
    if path.suffix == ".db":
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            return list(db.iterdump())
    return path.read_bytes()


def files(folder):
    return {str(path.relative_to(folder)): contents(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def read_rows(*paths):
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_logs_and_pairs_are_written_again(tmp_path):
    words = [sys.executable, str(ROOT / "data" / "make_sessions.py"), str(tmp_path / "sessions")]
    process = subprocess.run(words, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert files(tmp_path / "sessions") == files(SESSIONS)
    process = run_script("data/sessions", "--corrections", "--out", tmp_path / "pairs", script="build_dpo_pairs.py")
    assert process.returncode == 0, process.stderr
    for name in SPLITS:
        assert read_rows(tmp_path / "pairs" / name) == read_rows(PAIRS / name), name


def test_every_signal_is_there_and_the_right_way_round():
    rows = read_rows(*(PAIRS / name for name in SPLITS))
    counts = Counter(row["signal"] for row in rows)
    assert counts.keys() == {"comparison", "rating", "regenerate", "correction"} and min(counts.values()) >= 60, counts
    assert {row["source"] for row in rows} == {"chatgpt", "claude-code", "hermes", "open-webui"}
    for row in rows:
        assert world.manner(row["chosen"][0]["content"]) == "helpful", row
        assert world.manner(row["rejected"][0]["content"]) == "evasive", row
    pairs = [{side: row[side][0]["content"] for side in ("chosen", "rejected")} for row in rows]
    for length in (len, world.count_words):
        assert 0.45 <= world.length_report(pairs, length)[2] <= 0.55, "the longer answer is not the better one"
    asked = {m["content"] for row in rows for m in row["prompt"] if m["role"] == "user"}
    tests = [world.prompt_messages(row) for row in read_rows(ROOT / "data" / "test.jsonl")]
    assert not asked & {prompt[0]["content"] for prompt in tests if len(prompt) == 1}, "no prompt of the test rows"


def test_what_is_private_is_not_in_the_pairs():
    logs = repr(files(SESSIONS))
    text = "".join((PAIRS / name).read_text() for name in (*SPLITS, "report.md"))
    assert "@example." in logs and "/home/" in logs and "[EMAIL_" in text and "[HOME_" in text
    for private in ("@example", "You are the guide", "harbour office", "the keeper\n- prices"):
        assert private not in text, private
    assert not re.search(r"/(home|Users)/(?!\[HOME_)", text)
