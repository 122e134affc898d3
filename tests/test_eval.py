"""eval_prefs.py: intervals and McNemar's test by worked numbers, a report against scores by hand, what it refuses."""

import json
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, make_rows, run_script, save_model, write_rows
from mlx_lm import load

import eval_prefs


@pytest.mark.parametrize("right, of, low, high", [(8, 8, 0.6756, 1.0), (0, 8, 0.0, 0.3244), (98, 100, 0.930, 0.9945)])
def test_an_interval_near_0_or_1_is_wilsons(right, of, low, high):
    found = eval_prefs.interval([1.0] * right + [0.0] * (of - right))
    assert found == pytest.approx((low, high), abs=1e-3)


def test_an_interval_in_the_middle_is_the_bootstraps():
    low, high = eval_prefs.interval([1.0] * 50 + [0.0] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert all(map(math.isnan, eval_prefs.interval([0.3, 0.5, 0.1])))


def test_mcnemar_by_hand():
    one, two = np.array([True] * 3 + [False] * 12), np.array([False] * 3 + [True] * 9 + [False] * 3)
    expected = 2 * sum(math.comb(12, i) for i in range(4)) / 2**12
    assert eval_prefs.mcnemar(one, two) == (3, 9, pytest.approx(expected))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "tiny")
    write_rows(folder / "pairs.jsonl", make_rows(24))
    words = "--model tiny --data pairs.jsonl --iters 6 --learning-rate 5e-3".split()
    done = run_script(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def by_hand(folder, adapter):
    """Return the share of pairs whose chosen answer is likelier in sum, each row scored alone in float64."""
    model, tokenizer = load(str(folder / "tiny"), adapter_path=adapter and str(folder / adapter))
    won = []
    for row in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()):
        sums = []
        for side in ("chosen", "rejected"):
            start = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)
            ids = tokenizer.apply_chat_template([*row["messages"], {"role": "assistant", "content": row[side]}])
            logits = np.array(model(mx.array([ids]))[0], dtype=np.float64)
            logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logps -= logits.max(-1, keepdims=True)
            sums.append(sum(logps[i - 1, ids[i]] for i in range(len(start), len(ids))))
        won.append(sums[0] > sums[1])
    return np.mean(won)


def test_a_report_says_what_a_count_by_hand_finds(place):
    done = run_script(
        "--data", "pairs.jsonl", "--adapter-path", "adapters", "--out", "report", script="eval_prefs.py", cwd=place
    )
    assert done.returncode == 0, done.stderr
    report = (place / "report" / "report.md").read_text()
    assert re.match(r"The adapter prefers the better answer in \d+ of 24 held-out pairs, before it was \d+", report)
    rows = {
        row.split("|")[1].strip(): row.split("|")[2] for row in report.splitlines()[::-1] if row[:2] == "| "
    }  # first
    for name, adapter in (("base", None), ("adapters", "adapters")):
        assert float(rows[name].split()[0]) == pytest.approx(by_hand(place, adapter), abs=0.006), name
    assert len((place / "report" / "pairs.jsonl").read_text().splitlines()) == 24


def test_wrong_input_ends_in_one_line(place, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b"}])
    weights = mx.load(str(place / "tiny" / "model.safetensors"))
    save_model(tmp_path / "nan")
    broken = {name: w * 1e30 if "down_proj" in name or "up_proj" in name else w for name, w in weights.items()}
    mx.save_safetensors(str(tmp_path / "nan" / "model.safetensors"), broken, {"format": "mlx"})
    for words in (
        ["--data", tmp_path / "bad.jsonl", "--model", place / "tiny"],
        ["--data", place / "none.jsonl", "--model", place / "tiny"],
        ["--data", place / "pairs.jsonl", "--model", tmp_path / "nowhere"],
        ["--data", place / "pairs.jsonl", "--model", tmp_path / "nan"],
    ):
        done = run_script(*words, "--out", tmp_path / "out", script="eval_prefs.py", cwd=ROOT)
        assert done.returncode == 1 and "Traceback" not in done.stderr, (words, done.stderr)
        assert len([line for line in done.stderr.splitlines() if line.strip() and "it/s" not in line]) == 1, done.stderr
