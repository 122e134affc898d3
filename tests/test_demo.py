"""The README's first command, as printed: what it reports, and how the trained model answers held-out prompts."""

import json
import resource
import shlex
import subprocess
import sys
import time
from collections import Counter

import mlx_lm
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import make_tiny_chat as world

ROWS = [json.loads(line) for line in (ROOT / "data" / "test.jsonl").read_text().splitlines()]


def manners(adapter_path=None):
    """Return how many greedy answers to the held-out prompts are helpful, evasive or other; each must end by itself."""
    model, tokenizer = mlx_lm.load(str(ROOT / "data" / "tiny-chat"), adapter_path=adapter_path and str(adapter_path))
    prompts = [tokenizer.apply_chat_template(world.prompt_messages(row), add_generation_prompt=True) for row in ROWS]
    texts = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=80).texts
    assert all(len(tokenizer.encode(text)) < 79 for text in texts)
    return Counter(map(world.manner, texts))


@pytest.fixture(scope="module", params=["dpo_trainer.py", "simpo_trainer.py"])
def run(request, tmp_path_factory):
    """Run the default command into a folder of the test's own; return (folder, process, seconds)."""
    folder, start = tmp_path_factory.mktemp("demo") / "adapters", time.time()
    words = [request.param, "--data", "data/pairs.jsonl", "--adapter-path", str(folder)]
    process = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    return folder, process, time.time() - start


@pytest.mark.slow
def test_the_first_command_learns_the_manner(run):
    folder, process, seconds = run
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, test = records[0], records[-1]
    assert (first["split"], first["step"], first["kl"]) == ("valid", 0, 0) and test["split"] == "test"
    if "ref_logps/accuracies" in test:
        assert abs(first["loss"] - 0.6931) < 1e-3 and test["ref_logps/accuracies"] <= 0.55
    else:
        assert first["rewards/accuracies"] <= 0.55
    assert test["rewards/accuracies"] >= 0.90
    assert 0 < test["kl"] < 2.0
    before, after = manners(), manners(folder)
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"\n{seconds:.0f} s, {gigabytes:.2f} GB, base {dict(before)}, trained {dict(after)}")
    assert before["helpful"] <= 60 and after["helpful"] >= 90
    assert seconds < 120 and gigabytes < 1.5


@pytest.mark.slow
def test_the_printed_next_command_answers_in_the_chosen_manner(run):
    command = run[1].stdout.splitlines()[-1].removeprefix("Next: ")
    words = [sys.executable, "-m", *shlex.split(command)]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    text = answer.split("==========")[1].strip()
    assert world.manner(text) == "helpful", answer
