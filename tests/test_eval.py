"""eval_prefs.py: its numbers against the trainers', numpy and hand, its files, its judge, and what it refuses."""

import json
import math
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, make_rows, run_script, save_model, write_rows
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import dpo_trainer
import eval_prefs

LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0}
TRAINED = {  # adapter: script, its options
    "dpo": ("dpo_trainer.py", "--learning-rate 3e-3 --beta 0.3"),
    "simpo": ("simpo_trainer.py", "--learning-rate 3e-3 --num-layers 1"),
    "dora": ("dpo_trainer.py", "--learning-rate 3e-3 --fine-tune-type dora --dropout 0.3"),
    "full": ("dpo_trainer.py", "--learning-rate 1e-3 --fine-tune-type full"),
}
SIDES = ("chosen", "rejected")


def tagged_rows():
    """Return ten rows that are not trained on: half of one source, and signals that some rows lack."""
    rows = make_rows(34)[24:]
    for i, row in enumerate(rows):
        row |= {"source": ("logs", "votes")[i % 2], "weight": 1 + i / 10} | ({"signal": "edit"} if i < 4 else {})
    return rows


def random_adapter(model_path, folder, kind="lora", layers=2, seed=0, size=0.05, **config):
    """Write an adapter of random weights, as mlx-lm reads it; full: changed weights of the last layers."""
    model = mlx_lm.load(str(model_path))[0]
    mx.random.seed(seed)
    if kind == "full":
        named = {name: w for name, w in tree_flatten(model.parameters()) if f".{len(model.layers) - 1}." in name}
    else:
        model.freeze()
        linear_to_lora_layers(model, layers, LORA, kind == "dora")
        named = dict(tree_flatten(model.trainable_parameters()))
    Path(folder).mkdir(parents=True)
    noisy = {name: w + size * mx.random.normal(w.shape).astype(w.dtype) for name, w in named.items()}
    mx.save_safetensors(str(Path(folder, "adapters.safetensors")), noisy)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": LORA, "model": str(model_path)} | config
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    return Path(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, pairs, an adapter of every kind as the trainers leave it, and random ones."""
    folder, running = tmp_path_factory.mktemp("eval"), []
    save_model(folder / "tiny")
    save_model(folder / "other", seed=1)
    save_model(folder / "wide", hidden_size=64, head_dim=16)
    write_rows(folder / "train.jsonl", make_rows(24))
    write_rows(folder / "test.jsonl", tagged_rows())
    for name, (script, options) in TRAINED.items():
        words = f"--model tiny --data train.jsonl --train --test test.jsonl --iters 6 --adapter-path {name} {options}"
        command = [sys.executable, str(ROOT / script), *words.split(), "--warmup", "0", "--steps-per-report", "2"]
        running.append(subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        if len(running) % 2 == 0:  # one a core
            for process in running[-2:]:
                assert process.wait(120) == 0, process.stdout.read()
    for i, name in enumerate(("one", "two")):
        random_adapter(folder / "tiny", folder / name, seed=i, model="tiny")
    random_adapter(folder / "wide", folder / "ofwide", model="wide")
    return folder


@pytest.fixture
def evaluate(place, tmp_path, monkeypatch, capsys):
    """A function that runs main() in this process, in the folder; it returns a Found of what was written."""
    monkeypatch.chdir(place)

    def run(words="", out=None, model="--model tiny", data="test.jsonl"):
        out = Path(out or tmp_path / "report")
        command = f"eval_prefs.py {model} --data {data} {words}".split()
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
        capsys.readouterr()
        eval_prefs.main()
        printed = capsys.readouterr()
        records = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
        report = (out / "report.md").read_text()
        return SimpleNamespace(out=out, printed=printed.out, errors=printed.err, records=records, report=report)

    return run


def paths(*names):
    return " ".join(f"--adapter-path {name}" for name in names)


def scores_of(records, name):
    """Return (N, 3) of a model in the order of the records: log-probability of chosen, of rejected, KL."""
    models = [record["models"][name] for record in records]
    return np.array([[row["chosen"], row["rejected"], row["kl"]] for row in models], float)


def lengths_of(records):
    return np.array([[record[f"{side}_tokens"] for side in SIDES] for record in records])


def summary_of(records, name):
    scores, base = (scores_of(records, which) for which in (name, "base"))
    return eval_prefs.summarize_model(scores, base[:, :2], lengths_of(records), 0)


def lines_of(report, name):
    """Return the cells of each table line of a model."""
    return [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith(f"| {name} |")]


def judged_lines(report):
    """Return {model: the numbers that stand under the judge's name}: won, lost, tied, unclear, share of the first."""
    lines = report.split("\nJudge: ")[1].split("\n\n")[1].splitlines()[2:]
    return {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines)}


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.fixture(scope="module")
def all_records(place, tmp_path_factory):
    """pairs.jsonl of every trained adapter, by one run in a process of its own."""
    out = tmp_path_factory.mktemp("all")
    words = f"--model tiny --data test.jsonl --out {out} {paths(*TRAINED)}".split()
    done = run_script(*words, script="eval_prefs.py", cwd=place)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", TRAINED)
def test_numbers_are_the_trainers(place, all_records, name):
    """metrics.jsonl's last line is the trainer's own evaluation of the same pairs after training."""
    last = json.loads((place / name / "metrics.jsonl").read_text().splitlines()[-1])
    config = json.loads((place / name / "adapter_config.json").read_text())
    assert last["split"] == "test" and last["pairs"] == len(all_records) == 10
    found, scores = summary_of(all_records, name), scores_of(all_records, name)
    close = lambda value: pytest.approx(value, abs=1e-4, rel=1e-6)
    assert scores[:, 0].mean() == close(last["logps/chosen"]) and scores[:, 1].mean() == close(last["logps/rejected"])
    assert found["accuracy"] == close(last["logps/accuracies"])
    assert found["perplexity"] == pytest.approx(last["perplexity/chosen"], rel=1e-5)
    if name == "full":
        assert "kl" not in last and np.isnan(found["kl"])
    else:
        assert found["kl"] == close(last["kl"]) and last["kl"] > 1e-3
    if name == "simpo":
        means = config["beta"] * (scores[:, :2] / lengths_of(all_records)).mean(0)
        assert found["accuracy_mean"] == close(last["rewards/accuracies"])
        assert means == close([last["rewards/chosen"], last["rewards/rejected"]])
    else:
        assert config["beta"] * found["margin"] == close(last["rewards/margins"])
        assert found["gained"] == close(last["rewards/accuracies"])
        before = summary_of(all_records, "base")
        assert before["accuracy"] == close(last["ref_logps/accuracies"])
        assert before["perplexity"] == pytest.approx(last["perplexity/ref_chosen"], rel=1e-5)


def numpy_logps(model, prompt, answer):
    """Return log softmax (T, V) at the answer's tokens, and those tokens, in float64 from one row of logits."""
    logits = np.array(model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True)), answer


def template_ids(tokenizer, row):
    """Return the prompt's ids and each answer's, by the template alone."""
    turns = row["messages"]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    whole = [tokenizer.apply_chat_template(turns + [{"role": "assistant", "content": row[side]}]) for side in SIDES]
    assert all(ids[: len(prompt)] == prompt for ids in whole)
    return prompt, [ids[len(prompt) :] for ids in whole]


@pytest.mark.parametrize("name", ["base", *TRAINED])
def test_numbers_are_numpys(place, all_records, name):
    """Straight from the logits of mlx-lm's own model with its own loading of adapters, a row at a time."""
    base, tokenizer = mlx_lm.load(str(place / "tiny"))
    model = mlx_lm.load(str(place / "tiny"), adapter_path=None if name == "base" else str(place / name))[0]
    scores = scores_of(all_records, name)
    for i in (0, 3, 8):
        row = json.loads((place / "test.jsonl").read_text().splitlines()[i])
        prompt, answers = template_ids(tokenizer, row)
        kl = 0
        for side, ids in enumerate(answers):
            (logps, _), (others, _) = (numpy_logps(which, prompt, ids) for which in (model, base))
            expected = logps[np.arange(len(ids)), ids].sum()
            assert scores[i, side] == pytest.approx(expected, abs=1e-4, rel=2e-6)
            assert all_records[i][f"{SIDES[side]}_tokens"] == len(ids)
            kl += (np.exp(logps) * (logps - others)).sum()
        assert np.isnan(scores[i, 2]) if name == "full" else scores[i, 2] == pytest.approx(kl, abs=1e-4, rel=1e-5)


def test_the_base_line_is_the_untouched_model(evaluate):
    found = evaluate()
    assert [list(record["models"]) for record in found.records] == [["base"]] * 10
    summary = summary_of(found.records, "base")
    assert summary["margin"] == summary["kl"] == summary["chosen_change"] == summary["became_wrong"] == 0
    assert lines_of(found.report, "base")[0][1].startswith(f"{summary['accuracy']:.2f} (")
    assert f"{summary['perplexity']:.3f}" in lines_of(found.report, "base")[0]


def test_an_adapter_of_zeros_changes_nothing(place, evaluate, tmp_path):
    random_adapter(place / "tiny", tmp_path / "zeros", size=0.0, model="tiny")  # lora_b begins as zeros
    records = evaluate(paths(tmp_path / "zeros")).records
    scores, base = (scores_of(records, name) for name in ("zeros", "base"))
    np.testing.assert_allclose(scores, base, atol=2e-4)


def test_neither_order_nor_batch_size_matters(place, evaluate, tmp_path):
    rows = tagged_rows()
    random.Random(3).shuffle(rows)
    write_rows(tmp_path / "shuffled.jsonl", rows)
    first = evaluate(paths("dpo", "dora"), out=tmp_path / "first").records
    others = [("--batch-size 1", "test.jsonl"), ("--batch-size 7", tmp_path / "shuffled.jsonl")]
    for i, (words, data) in enumerate(others):
        words += f" --no-reference-cache {paths('dpo', 'dora')}"
        second = evaluate(words, out=tmp_path / str(i), data=data).records
        by_key = {record["key"]: record for record in second}
        assert len(by_key) == 10
        for name in ("base", "dpo", "dora"):
            same = scores_of([by_key[record["key"]] for record in first], name)
            np.testing.assert_allclose(scores_of(first, name), same, atol=1e-4, rtol=1e-6, err_msg=f"{name} {words}")


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "last layer", "quantized"])
def test_an_adapter_leaves_no_trace(place, tmp_path, kind):
    """Every bit, every module and every output of the model, after a good use and after one that broke off."""
    where = save_model(tmp_path / "q4", bits=4) if kind == "quantized" else place / "tiny"
    name = {"last layer": "lora", "quantized": "lora"}.get(kind, kind)
    folder = random_adapter(where, tmp_path / "adapter", name, layers=1 if kind == "last layer" else 2)
    model, ids = mlx_lm.load(str(where))[0], mx.array([[5, 9, 40, 7]])
    look = lambda: (eval_prefs.fingerprint(model), [(name, id(m)) for name, m in model.named_modules()])
    before, logits = look(), np.array(model(ids))
    config = json.loads((folder / "adapter_config.json").read_text())
    with eval_prefs.adapter_in(model, folder, config) as (own, _):
        assert np.abs(np.array(eval_prefs.install(model, own)(ids)) - logits).max() > 0.01
    assert look() == before and np.array_equal(model(ids), logits)
    with pytest.raises(RuntimeError, match="broke off"), eval_prefs.adapter_in(model, folder, config) as (own, _):
        eval_prefs.install(model, own)
        raise RuntimeError("broke off")
    assert look() == before and np.array_equal(model(ids), logits)


def test_the_order_of_adapters_does_not_matter(evaluate, tmp_path):
    names = ["full", "dpo", "dora", "simpo"]
    one = evaluate(paths(*names), out=tmp_path / "one").records
    two = evaluate(paths(*reversed(names)), out=tmp_path / "two").records
    for name in ["base", *names]:
        np.testing.assert_array_equal(scores_of(one, name), scores_of(two, name), err_msg=name)
    assert list(one[0]["models"]) == ["base", *names]


# --------------------------------------------------------------------------------------------------------- statistics


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    limits = [eval_prefs.interval(rng.normal(3, 2, 60), seed, rounds=400) for seed in range(200)]
    assert 0.88 <= np.mean([low <= 3 <= high for low, high in limits]) <= 0.99
    assert np.mean([high - low for low, high in limits]) == pytest.approx(2 * 1.96 * 2 / 60**0.5, rel=0.1)


def test_interval_is_seeded():
    values = np.random.default_rng(0).normal(size=50)
    assert eval_prefs.interval(values, 1) == eval_prefs.interval(values.tolist(), 1) != eval_prefs.interval(values, 2)
    assert eval_prefs.interval([True, True]) == (1, 1)


BINOMIAL = [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (0, 6, 2 / 64), (1, 0, 1.0)]


@pytest.mark.parametrize("better, worse, p", BINOMIAL)
def test_sign_test_by_hand(better, worse, p):
    """Twice the tail of a fair coin, at most 1: of 10, 1 or none in (10 + 1) / 1024."""
    assert eval_prefs.sign_test(better, worse) == pytest.approx(p)


def test_sign_test_of_many():
    assert 0 <= eval_prefs.sign_test(400, 1600) < 1e-100 and eval_prefs.sign_test(1000, 1000) == 1


def test_correlation():
    assert eval_prefs.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert eval_prefs.correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert eval_prefs.correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0)
    assert eval_prefs.correlation([1, 1], [2, 3]) == eval_prefs.correlation([2, 3], [1, 1]) == 0


BASE = np.array([[-10.0, -12], [-8, -6], [-9, -9.5], [-5, -7]])
SCORES = np.array([[-11.0, -16, 2], [-7, -9, 1], [-12, -10, 3], [-6, -7, 0]])  # margins 3, 4, -2.5, -1
LENGTHS = np.array([[10, 4], [2, 5], [6, 6], [8, 4]])


def test_a_summary_by_hand():
    found = eval_prefs.summarize_model(SCORES, BASE, LENGTHS, 0)
    margins = [3, 4, -2.5, -1]
    expected = {
        "pairs": 4, "accuracy": 0.75, "gained": 0.5, "margin": 0.875, "became_right": 0.25, "became_wrong": 0.25,
        "accuracy_mean": 0.5,  # -1.1 and -4, -3.5 and -1.8, -2 and -1.67, -0.75 and -1.75
        "chosen_change": -1.0, "rejected_change": -1.875, "kl": 6 / 45, "perplexity": np.exp(36 / 26),
        "accuracy_longer": 1.0, "accuracy_shorter": 1.0,  # the wrong one is equally long
        "margin_length_correlation": np.corrcoef(margins, [6, -3, 0, 4])[0, 1],
    }  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert found["margin_quartiles"] == pytest.approx((-1.375, 1.0, 3.25))
    for name in ("accuracy", "accuracy_mean", "margin", "chosen_change"):
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high, name


def test_no_pair_with_a_longer_side():
    found = eval_prefs.summarize_model(SCORES, BASE, np.full((4, 2), 5), 0)
    assert np.isnan(found["accuracy_longer"]) and np.isnan(found["accuracy_shorter"])
    assert found["margin_length_correlation"] == 0


def report_of(scores, lengths, rows=None, extra=()):
    """Return write_report's text; scores: {model: (N, 3)}, "base" among them."""
    args = SimpleNamespace(model="m", data="d", out="o", seed=0)
    base = scores["base"][:, :2]
    found = {name: eval_prefs.summarize_model(part, base, lengths, 0) for name, part in scores.items()}
    return eval_prefs.write_report(found, scores, rows or [{}] * len(base), lengths, list(extra), args)


def with_kl(logps):
    return np.c_[logps, np.zeros(len(logps))]


def test_displacement_is_warned_of():
    many, lengths = np.tile(BASE, (8, 1)), np.tile(LENGTHS, (8, 1))
    scores = lambda change: {"base": with_kl(many), "mine": with_kl(many + change)}
    warned = lambda change: "displacement" in report_of(scores(change), lengths)
    assert warned([-2, -5]) and not warned([2, -5]) and not warned([0, -5])


def test_displacement_of_a_few_is_not():
    many, change = np.tile(BASE, (8, 1)), np.zeros((32, 2))
    change[::2, 0], change[1::2, 0] = 3, -3.1  # below 0 in the mean, and 0 is well within the interval
    report = report_of({"base": with_kl(many), "mine": with_kl(many + change)}, np.tile(LENGTHS, (8, 1)))
    assert "displacement" not in report


def right_in(count, of=20):
    """Return the scores of a model that is right in the first pairs."""
    return with_kl(np.array([[-1.0, -2.0] if i < count else [-2.0, -1.0] for i in range(of)]))


@pytest.mark.parametrize("counts, said", [((10, 10), False), ((10, 13), False), ((10, 15), False), ((10, 16), True)])
def test_compare_tells_no_difference_that_is_not_there(counts, said):
    """5 against none is p = 0.0625, 6 against none 0.031."""
    one, two = (right_in(count)[:, :2] for count in counts)
    ahead = counts[1] - counts[0]
    for found, word in ((eval_prefs.compare(one, two), "second"), (eval_prefs.compare(two, one), "first")):
        assert sorted(found[:2]) == [0, ahead] and found[2] == 20 - ahead
        assert f"the {word} is better" == found[4] if said else "no difference" in found[4]


def test_every_two_models_are_compared():
    scores = {"base": right_in(5), "one": right_in(18), "two": right_in(18)}
    part = report_of(scores, np.tile([[3, 5]], (20, 1))).split("## Which is better?")[1].split("##")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if "in sum" in line]
    assert [line[0] for line in lines] == ["base, one", "base, two", "one, two"]
    assert [line[2:5] for line in lines] == [["0", "13", "7"], ["0", "13", "7"], ["0", "0", "20"]]
    assert "second is better" in lines[0][-1] and "no difference" in lines[2][-1] and lines[2][-2] == "1"


def group_of(report, what, kind):
    part = report.split(f"## Accuracy by {what}\n")[1].split("\n## ")[0]
    return next(line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith(f"| {kind} |"))


def test_groups_by_length_source_and_signal():
    """Of 20 pairs the model is right in the first 10; lengths grow, sources alternate, two pairs carry a signal."""
    lengths = np.array([[i + 1, i + 2] for i in range(20)])
    rows = [{"source": "ab"[i % 2]} | ({"signal": "edit"} if i < 2 else {}) for i in range(20)]
    report = report_of({"base": right_in(20), "mine": right_in(10)}, lengths, rows)
    assert group_of(report, "length", "quarter 1") == ["quarter 1", "5", "1.00", "1.00"]
    assert group_of(report, "length", "quarter 4") == ["quarter 4", "5", "1.00", "0.00"]
    assert group_of(report, "source", "a") == ["a", "10", "1.00", "0.50"]
    assert group_of(report, "signal", "edit") == ["edit", "2", "1.00", "1.00"]
    assert group_of(report, "signal", "none") == ["none", "18", "1.00", "0.44"]
    assert "The longer answer is the chosen one in 0.00 of the pairs" in report


def test_no_groups_where_there_is_one_kind():
    report = report_of({"base": right_in(5)}, np.full((20, 2), 4), [{"source": "logs"}] * 20)
    assert "Accuracy by source" not in report and "Accuracy by signal" not in report
    assert "Accuracy by length" not in report and "20 tie" in report


def test_groups_of_any_json_values():
    """Sources may be numbers, lists, or texts with a table's own mark: hub datasets have them."""
    rows = [{"source": source} for source in (1, 2, None, "a|b", ["x"]) for _ in range(4)]
    report = report_of({"base": right_in(5)}, np.full((20, 2), 4), rows)
    part = report.split("## Accuracy by source")[1].strip().split("\n\n")[0].splitlines()
    assert len(part) == 7 and all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in part)
    assert [line.strip("| ").split(" | ")[1] for line in part[2:]] == ["4"] * 5


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def scored(monkeypatch):
    """The places of the pairs that each adapter is computed on: they have a number; the base's own scoring left out."""
    calls, original = [], eval_prefs.sorted_batches

    def order(pairs, *given):
        places = [pair["place"] for pair in pairs if "number" in pair]
        calls.extend([places] if places else [])
        return original(pairs, *given)

    monkeypatch.setattr(eval_prefs, "sorted_batches", order)
    return calls


def test_a_record_a_pair_with_every_number(evaluate):
    records = evaluate(paths("one", "full")).records
    assert len(records) == 10 and len({record["key"] for record in records}) == 10
    for i, record in enumerate(records, 1):
        assert record["place"] == f"test.jsonl:{i}" and record["chosen_tokens"] > 0 < record["rejected_tokens"]
        assert list(record["models"]) == ["base", "one", "full"]
        for name, numbers in record["models"].items():
            assert numbers["chosen"] < 0 > numbers["rejected"] and "kl" in numbers, name


def test_a_second_run_computes_nothing_again(evaluate, scored):
    first = evaluate(paths("one", "full"))
    assert len(scored) == 2
    second = evaluate(paths("one", "full"))
    assert len(scored) == 2 and [record["key"] for record in second.records] == [r["key"] for r in first.records]
    for name in ("base", "one", "full"):
        np.testing.assert_array_equal(scores_of(first.records, name), scores_of(second.records, name))
    assert first.report == second.report


def test_only_a_new_adapter_is_computed(evaluate, scored):
    evaluate(paths("one"))
    found = evaluate(paths("two", "one"))
    assert len(scored) == 2 and list(found.records[0]["models"]) == ["base", "two", "one"]


def test_a_changed_adapter_is_computed(place, evaluate, scored, tmp_path):
    """Same folder, other weights; then same weights, another scale."""
    shutil.copytree(place / "one", tmp_path / "mine")
    first = evaluate(paths(tmp_path / "mine")).records
    shutil.copy(place / "two" / "adapters.safetensors", tmp_path / "mine")
    second = evaluate(paths(tmp_path / "mine")).records
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    config["lora_parameters"] = LORA | {"scale": 5.0}
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps(config))
    third = evaluate(paths(tmp_path / "mine")).records
    assert len(scored) == 3
    a, b, c = (scores_of(records, "mine") for records in (first, second, third))
    assert np.abs(a - b).max() > 1e-2 < np.abs(b - c).max()


def test_an_added_pair_is_computed(place, evaluate, scored, tmp_path):
    rows = tagged_rows()
    data = write_rows(tmp_path / "some.jsonl", rows[:7])
    first = evaluate(paths("one"), data=data).records
    write_rows(data, rows)
    second = evaluate(paths("one"), data=data).records
    assert len(first) == 7 and len(second) == 10
    assert scored[1:] == [[f"{data}:{i}" for i in (8, 9, 10)]]
    np.testing.assert_allclose(scores_of(first, "one"), scores_of(second[:7], "one"), atol=1e-4)
    whole = evaluate(paths("one"), out=tmp_path / "whole", data=data).records
    np.testing.assert_allclose(scores_of(whole, "one"), scores_of(second, "one"), atol=1e-4)


def test_numbers_of_another_base_are_not_taken(place, evaluate, tmp_path):
    """An adapter's numbers belong to the base under it: another --model, then other weights in the same folder."""
    shutil.copytree(place / "tiny", tmp_path / "base")
    evaluate(paths("one"))
    for i, other in enumerate(("other", tmp_path / "base", tmp_path / "base")):
        if i == 2:
            shutil.copy(place / "other" / "model.safetensors", tmp_path / "base")
        again = evaluate(paths("one"), model=f"--model {other}").records
        fresh = evaluate(paths("one"), model=f"--model {other}", out=tmp_path / str(i)).records
        np.testing.assert_allclose(scores_of(again, "one"), scores_of(fresh, "one"), atol=1e-4, err_msg=str(i))


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "cut to nothing": lambda text: b"",
    "garbage": lambda text: b"\xff\xfe\x00 no JSON\n" + text,
    "other JSON": lambda text: b'5\n[]\n{}\n{"key": "x", "models": []}\n{"key": "x", "models": {"one": 3}}\n' + text,
    "no numbers": lambda text: re.sub(rb'"chosen": [-0-9.e]+', b'"chosen": null', text),
    "other names": lambda text: text.replace(b'"rejected":', b'"lost":'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_tolerated(evaluate, scored, damage):
    first = evaluate(paths("one"))
    file = first.out / "pairs.jsonl"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    second = evaluate(paths("one")).records
    np.testing.assert_allclose(scores_of(first.records, "one"), scores_of(second, "one"), atol=1e-4)
    assert sum(map(len, scored[1:])) == {"cut": 5, "garbage": 0, "other JSON": 0}.get(damage, 10)


@pytest.mark.parametrize("after", [0, 1])
def test_what_was_computed_before_a_break_is_kept(evaluate, monkeypatch, tmp_path, scored, after):
    """The first adapter's numbers are on disk before the second's are computed, or in the middle of the first."""
    counting, seconds = eval_prefs.sorted_batches, iter(range(0, 10**6, 60))

    def midway(batches):
        for i, batch in enumerate(batches):
            if i == 1 and len(scored) == 1 + after:
                raise KeyboardInterrupt
            yield batch

    def breaks(pairs, *given):
        return (midway if any("number" in pair for pair in pairs) else list)(counting(pairs, *given))

    with monkeypatch.context() as patch:
        patch.setattr(eval_prefs, "sorted_batches", breaks)
        patch.setattr(eval_prefs.time, "monotonic", lambda: next(seconds))
        with pytest.raises(KeyboardInterrupt):
            evaluate(paths("one", "two"))
    evaluate(paths("one", "two"))
    assert list(map(len, scored)) == [[10, 6, 10], [10, 10, 6]][after]
    assert not list((tmp_path / "report").glob("unfinished*"))


def test_every_line_is_json_for_others_too(evaluate):
    """NaN is Python's own: jq, pandas' readers and browsers refuse the line."""
    found = evaluate(paths("full"))

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    for line in (found.out / "pairs.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_the_printed_table_is_the_reports(evaluate):
    found = evaluate(paths("one"))
    assert lines_of(found.printed, "one")[0] == lines_of(found.report, "one")[0]
    assert f"{found.out}/report.md" in found.printed and "nan" not in found.report
    assert "nan" not in evaluate(paths("full")).report


# ------------------------------------------------------------------------------------------------------------ answers


def options(*words):
    return eval_prefs.parse_args(["--model", "none", *map(str, words)])


def greedy(model, tokenizer, prompt, limit):
    """Return mlx-lm's own greedy answer to one prompt: its tokens without the last stop, and whether it stopped."""
    ids = []
    for response in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=limit):
        if response.finish_reason == "stop":
            return ids, True
        ids.append(response.token)
    return ids, False


def test_answers_are_mlx_lms_tokens(place):
    """A random model writes half characters: what is read again from its text is not what it wrote."""
    model, tokenizer = mlx_lm.load(str(place / "tiny"))
    prompts = [tokenizer.encode(text) for text in ("How far?", "Who", "About ten minutes on foot")]
    found = eval_prefs.answer(model, tokenizer, prompts, options("--max-tokens", 12, "--batch-size", 2))
    assert [(list(ids), ended) for ids, ended in found] == [greedy(model, tokenizer, ids, 12) for ids in prompts]


def test_an_answer_that_just_ends_in_time_has_ended():
    """The stop is the last token allowed; with one less it is cut."""
    model, tokenizer = mlx_lm.load(str(ROOT / "data" / "tiny-chat"))
    asked = [{"role": "user", "content": "Where is the inn?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    ids, ended = greedy(model, tokenizer, prompt, 100)
    assert ended and len(ids) > 3
    for limit, expected in ((100, True), (len(ids) + 1, True), (len(ids), False), (len(ids) - 1, False)):
        (found,) = eval_prefs.answer(model, tokenizer, [prompt], options("--max-tokens", limit))
        assert list(found[0]) == ids[:limit] and found[1] == expected, limit


def test_samples_are_seeded(place):
    model, tokenizer = mlx_lm.load(str(place / "tiny"))
    words = lambda seed: options("--max-tokens", 8, "--seed", seed)
    sample = lambda seed: eval_prefs.answer(model, tokenizer, [[5, 6]] * 3, words(seed), 1.0)
    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("ids, share", [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4], 0), ([7] * 8, 0.8), ([1, 2] * 4, 0.6)])
def test_repetition_by_hand(ids, share):
    """Of [7] * 8 there are five runs of four, all the same one; of 1, 2, 1, 2 ... there are two."""
    assert eval_prefs.repetition(ids) == pytest.approx(share)


def test_answers_stand_side_by_side(evaluate):
    found = evaluate(f"{paths('one', 'two')} --generate 3 --max-tokens 8")
    part = found.report.split("Greedy answers to 3 prompts")[1]
    assert [row[1] for row in (lines_of(part, name)[0] for name in ("base", "one", "two"))] == ["8.0"] * 3
    table = part[part.index("| prompt | base | one | two |") :].split("\n\n")[0].strip().splitlines()
    assert len(table) == 5 and all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table)
    assert "How far is number 24?" in table[2]


def test_more_answers_asked_than_pairs(evaluate):
    assert "Greedy answers to 10 prompts" in evaluate("--generate 50 --max-tokens 2 --batch-size 16").report


def test_the_base_answers_as_if_alone(evaluate, tmp_path):
    """No adapter may be in the model while the base answers, nor another one while an adapter does."""
    words = "--generate 4 --max-tokens 8"
    both = evaluate(f"{paths('full', 'one', 'dora')} {words}", out=tmp_path / "both").report
    answers = lambda report: report[report.index("| prompt | base |") :].split("\n\n")[0].strip().splitlines()[2:]
    split = lambda report: [re.split(r"(?<!\\)\|", line) for line in answers(report)]
    for column, name in enumerate(("full", "one", "dora"), 3):
        alone = split(evaluate(f"{paths(name)} {words}", out=tmp_path / name).report)
        assert [row[2:4] for row in alone] == [[row[2], row[column]] for row in split(both)], name


def test_kl_on_own_answers(evaluate, place):
    found = evaluate(f"{paths('one', 'full')} --samples 4 --max-tokens 10")
    values = re.findall(r"KL\((\w+) \|\| base\) on its own answers to (\d+) prompts: ([\d.]+) nats", found.report)
    assert [value[:2] for value in values] == [("one", "4")] and float(values[0][2]) > 0
    assert found.report == evaluate(f"{paths('one', 'full')} --samples 4 --max-tokens 10").report


def test_kl_on_own_answers_is_of_the_sampled_tokens(place, monkeypatch):
    """Against numpy over the tokens that were sampled, the stop at the end left in or out."""
    model, tokenizer = mlx_lm.load(str(place / "tiny"))
    config = json.loads((place / "one" / "adapter_config.json").read_text())
    drawn = [[[40, 41, 42], [50, 51]], [[60, 61, 62, 63], [70]]]  # of each prompt
    order = [drawn[0][0], drawn[1][0], drawn[0][1], drawn[1][1]]
    monkeypatch.setattr(eval_prefs, "answer", lambda *_, **__: [(ids, False) for ids in order])
    pairs = [{"prompt": [5, 6, 7]}, {"prompt": [8, 9]}]
    args = options("--samples", 2)
    with eval_prefs.adapter_in(model, place / "one", config) as (own, initial):
        found = eval_prefs.sampled_kl(model, tokenizer, own, initial, pairs, args)
    total, tuned = 0, mlx_lm.load(str(place / "tiny"), adapter_path=str(place / "one"))[0]
    for pair, answers in zip(pairs, drawn):
        for ids in answers:
            (p, _), (q, _) = (numpy_logps(which, pair["prompt"], ids) for which in (tuned, model))
            total += (np.exp(p) * (p - q)).sum()
    assert found == pytest.approx(total / 10, rel=1e-4)


def test_an_adapter_that_answers_nothing_does_not_end_the_report(evaluate, monkeypatch):
    monkeypatch.setattr(eval_prefs, "answer", lambda model, tokenizer, prompts, *_, **__: [([], True) for _ in prompts])
    found = evaluate(f"{paths('one')} --samples 2 --generate 2")
    assert lines_of(found.report, "one")


# --------------------------------------------------------------------------------------------------------------- hard


def test_hard_pairs_are_the_lowest_margins_and_load(place, evaluate, tmp_path):
    out = tmp_path / "hard.jsonl"
    found = evaluate(f"{paths('dpo')} --hard 4 {out}")
    change = scores_of(found.records, "dpo") - scores_of(found.records, "base")
    order = np.argsort(change[:, 0] - change[:, 1])[:4]
    args = dpo_trainer.parse_args(["--model", "m", "--data", str(out)])
    loaded, sources = (dpo_trainer.load_pairs(args, path, "train") for path in (out, place / "test.jsonl"))
    strip = lambda pair: {name: value for name, value in pair.items() if name != "place"}
    assert [strip(pair) for pair in loaded] == [strip(sources[i]) for i in order]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["source"] for row in rows] == [tagged_rows()[i]["source"] for i in order]
    assert f"{out}" in found.report


HARD_ROWS = [
    {"system": "Be brief.", "prompt": "How far?", "chosen": "Ten minutes.", "rejected": "Who knows.", "weight": 0.5},
    {"prompt": [{"role": "user", "content": "Hé “far”?"}], "chosen": [{"role": "assistant", "content": "Zehn."}],
     "rejected": [{"role": "assistant", "content": "Wer weiß."}]},
    {"chosen": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}],
     "rejected": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "C."}]},
    {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}], "rejected": "No."},
    {"prompt": "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?", "chosen": "Four.", "rejected": "Five."},
]  # fmt: skip


def test_hard_pairs_of_every_form_come_back_as_they_were(evaluate, tmp_path):
    data, out = write_rows(tmp_path / "forms.jsonl", HARD_ROWS), tmp_path / "hard.jsonl"
    evaluate(f"{paths('one')} --hard 99 {out}", data=data)
    args = dpo_trainer.parse_args(["--model", "m", "--data", str(out)])
    loaded, sources = (dpo_trainer.load_pairs(args, path, "train") for path in (out, data))
    bare = lambda pairs: sorted(json.dumps(pair | {"place": ""}, sort_keys=True) for pair in pairs)
    assert bare(loaded) == bare(sources) and len(loaded) == 5


def test_hard_pairs_of_the_base_alone_are_those_it_gets_wrong(evaluate, tmp_path):
    """Without an adapter every margin is 0: then the hardest are those whose rejected answer is the likelier one."""
    found = evaluate(f"--hard 3 {tmp_path / 'hard.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "hard.jsonl").read_text().splitlines()]
    base, sources = scores_of(found.records, "base"), tagged_rows()
    order = np.argsort(base[:, 0] - base[:, 1])[:3]
    assert [row["chosen"][0]["content"] for row in rows] == [sources[i]["chosen"] for i in order]


# -------------------------------------------------------------------------------------------------------------- judge


class Server(ThreadingHTTPServer):
    """An OpenAI-like server: reply(text of the question, number of the request) is what it says, or a status."""

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.seen, self.url = reply, [], f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        said = self.server.reply(body["messages"][0]["content"], len(self.server.seen))
        whole = said if isinstance(said, (bytes, int)) else json.dumps({"choices": [{"message": {"content": said}}]})
        self.send_response(said if isinstance(said, int) else 200)
        self.end_headers()
        self.wfile.write(whole if isinstance(whole, bytes) else str(whole).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server with these replies; no waiting between tries."""
    servers = []
    monkeypatch.setattr(eval_prefs.time, "sleep", lambda seconds: None)
    yield lambda reply: servers.append(Server(reply)) or servers[-1]
    for server in servers:
        server.shutdown()
        server.server_close()


def prefer(word):
    """Return a reply that takes the answer with a word in it, wherever it stands; a tie where both or none have it."""

    def reply(text, number):
        a, b = text.split("Answer A:")[1].split("Answer B:")
        return "TIE" if (word in a) == (word in b) else "A" if word in a else "B"

    return reply


def judged(server, ours, base):
    args = options("--judge", server.url, "--generate", 1)
    prompts = [f"Question {i}" for i in range(len(ours))]
    return eval_prefs.judge_answers(eval_prefs.make_judge(args), prompts, ours, base)


def test_a_judge_who_prefers_a_text(serve):
    server = serve(prefer("river"))
    found = judged(server, ["the river", "no", "the river", "no"], ["no", "the river", "a river", "nothing"])
    assert (found["won"], found["lost"], found["tied"], found["unclear"]) == (1, 1, 2, 0)
    assert found["first"] / found["verdicts"] == 0.5 and len(server.seen) == 8
    path, body = server.seen[0]
    assert path == "/v1/chat/completions" and body["temperature"] == 0
    assert "Question 0" in body["messages"][0]["content"]


def test_a_judge_who_takes_the_first_only_ties(serve, evaluate):
    server = serve(lambda text, number: "A")
    found = evaluate(f"{paths('one', 'two')} --generate 3 --max-tokens 4 --judge {server.url}")
    expected = ["0", "0", "3", "0", "1.00"]
    assert judged_lines(found.report) == {"one": expected, "two": expected} and len(server.seen) == 12


REPLIES = {"A": "A", " a.": "A", "Answer B": "B", "**B**": "B", "TIE": "TIE", "It's a tie.": "TIE", "tie": "TIE"}
REPLIES |= {"A tie": "TIE", "": "unclear", "I cannot say": "unclear", "As a judge I take B": "B"}


@pytest.mark.parametrize("said, meant", REPLIES.items())
def test_what_a_judge_says(said, meant):
    """One reply in both orders: 'a' in a sentence is an article, not an answer."""
    found = eval_prefs.judge_answers(lambda text: said, ["q"], ["x"], ["y"])
    counts = {"A": (2, 2, 0), "B": (0, 2, 0), "TIE": (0, 0, 0), "unclear": (0, 0, 2)}[meant]
    assert (found["first"], found["verdicts"], found["unclear"]) == counts and found["tied"] == 1


def test_a_server_that_fails_twice_is_asked_again(serve):
    server = serve(lambda text, number: 500 if number < 3 else prefer("good")(text, number))
    found = judged(server, ["good"], ["bad"])
    assert found["won"] == 1 and len(server.seen) == 4


BROKEN = {"no JSON": b"<html>", "no choices": b'{"error": "no such model"}', "no content": None, "a status": 503}


@pytest.mark.parametrize("how", BROKEN)
def test_a_server_that_answers_nonsense_is_named_and_the_report_written(serve, evaluate, how):
    """A reasoning model's content may be null."""
    server = serve(lambda text, number: BROKEN[how])
    found = evaluate(f"{paths('one')} --generate 2 --max-tokens 4 --judge {server.url}")
    assert lines_of(found.report, "one")
    if how != "no content":
        assert server.url in found.printed and f"{server.url}" in found.report and len(server.seen) == 3


def test_what_was_judged_before_a_server_went_is_not_lost(serve, evaluate):
    """It answers for the first two of three prompts."""
    server = serve(lambda text, number: "TIE" if number <= 4 else 503)
    found = evaluate(f"{paths('one')} --generate 3 --max-tokens 4 --judge {server.url}")
    assert judged_lines(found.report)["one"][:4] == ["0", "0", "2", "0"]
    assert server.url in found.printed


def test_a_server_that_is_down(evaluate, monkeypatch):
    """One line names it, the report is there, and main() returns: status 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    waits = []
    monkeypatch.setattr(eval_prefs.time, "sleep", waits.append)
    found = evaluate(f"{paths('one')} --generate 2 --max-tokens 4 --judge {url}")
    lines = [line for line in (found.printed + found.errors).splitlines() if url in line and "refused" in line]
    assert "one" in lines[0] and "not judged" in lines[0] and sum(waits) > 0
    assert "not judged" in found.report and lines_of(found.report, "one")


def test_a_local_judge(evaluate):
    """A random model says nothing clear: no verdicts, and no division by their number."""
    found = evaluate(f"{paths('one')} --generate 2 --max-tokens 4 --judge tiny")
    assert sum(map(int, judged_lines(found.report)["one"][:3])) == 2


# ----------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_drawn_and_shown(evaluate):
    pytest.importorskip("matplotlib")
    found = evaluate(paths("dpo", "simpo"))
    for name in ("curves.png", "margins.png", "shift.png"):
        assert (found.out / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in found.report
    assert "matplotlib" not in found.report


def test_the_base_alone_has_no_pictures_and_no_warnings(evaluate, recwarn):
    pytest.importorskip("matplotlib")
    found = evaluate()
    assert not list(found.out.glob("*.png")) and "png" not in found.report
    assert not [str(warning.message) for warning in recwarn if "legend" in str(warning.message)]


def test_without_matplotlib_the_report_says_so(evaluate, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    found = evaluate(paths("dpo"))
    assert "pip install matplotlib" in found.report and "png" not in found.report and lines_of(found.report, "dpo")
    assert not list(found.out.glob("*.png"))


METRICS = {"empty": "", "torn": '{"step": 1, "split"', "another program's": '{"iteration": 1, "train_loss": 2.0}\n5\n'}
METRICS |= {"partial": '{"step": 1, "split": "train", "loss": NaN}\n'}


@pytest.mark.parametrize("name", METRICS)
def test_a_foreign_metrics_file_does_no_harm(place, evaluate, tmp_path, name):
    """Only curves come from it: a run that lasted an hour must not end there."""
    shutil.copytree(place / "one", tmp_path / "mine")
    (tmp_path / "mine" / "metrics.jsonl").write_text(METRICS[name])
    found = evaluate(paths(tmp_path / "mine"))
    assert lines_of(found.report, "mine")


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(place):
    """Folders and files that are wrong, in the same place."""
    good = '{"prompt": "How far?", "chosen": "Ten minutes.", "rejected": "Who knows."}'
    for name in ("noconfig", "unread", "list", "torn", "nokeys", "elsewhere/one"):
        shutil.copytree(place / "one", place / name)
    (place / "noconfig" / "adapter_config.json").unlink()
    (place / "unread" / "adapter_config.json").write_text("{")
    (place / "list" / "adapter_config.json").write_text("[]")
    (place / "nokeys" / "adapter_config.json").write_text("{}")
    (place / "torn" / "adapters.safetensors").write_bytes((place / "one" / "adapters.safetensors").read_bytes()[:99])
    (place / "nofile").mkdir()
    (place / "empty.jsonl").write_text("\n \n")
    (place / "bad.jsonl").write_text(f'{good}\n\n{{"prompt": "a"\n')
    (place / "equal.jsonl").write_text(f"{good}\n{good.replace('Who knows.', 'Ten minutes.')}\n")
    (place / "somefile").write_text("no folder")
    (place / "full-out" / "pairs.jsonl").mkdir(parents=True)
    (place / "full-report" / "report.md").mkdir(parents=True)
    return place


ONE = "--model tiny --data test.jsonl --adapter-path"
PLAIN = "--model tiny --data"
MISTAKES = {  # words: what is said
    "another model's adapter": ("--model tiny --data test.jsonl --adapter-path ofwide", "ofwide: .*adapter of tiny"),
    "a missing adapter": (f"{ONE} none", "none: .*name a folder with adapters.safetensors"),
    "a folder without weights": (f"{ONE} nofile", "nofile: .*name a folder with adapters.safetensors"),
    "no config": (f"{ONE} noconfig", "noconfig: .*adapter_config.json"),
    "an unreadable config": (f"{ONE} unread", "unread: .*adapter_config.json"),
    "a config of another kind": (f"{ONE} list", "list: "),
    "a config without layers": (f"{ONE} nokeys", "nokeys: "),
    "a torn adapter": (f"{ONE} torn", "torn: "),
    "adapters of several models": (f"--data test.jsonl {paths('one', 'ofwide')}", ".*tiny.*--model"),
    "an empty test file": (f"{PLAIN} empty.jsonl", "empty.jsonl: no test pairs in it: put one on each line"),
    "a bad line": (f"{PLAIN} bad.jsonl", "bad.jsonl:3: .*each line must be one JSON object"),
    "equal answers": (f"{PLAIN} equal.jsonl", "equal.jsonl:2: chosen and rejected are equal: mend or delete"),
    "missing data": (f"{PLAIN} none.jsonl", "none.jsonl: .*give a .jsonl file"),
    "a missing folder of data": (f"{PLAIN} nofolder/", "nofolder/: .*no such file or folder"),
    "a folder without test.jsonl": (f"{PLAIN} nofile", "nofile/test.jsonl: .*give a .jsonl file"),
    "a missing model": ("--model ./no/such --data test.jsonl", "./no/such: .*give a folder or a Hugging Face name"),
    "every pair too long": (f"{PLAIN} test.jsonl --max-seq-length 5", r"test.jsonl:\d+: .*raise --max-seq-length"),
    "an output that is a file": (f"{PLAIN} test.jsonl --out somefile", "somefile: .*choose another --out"),
    "an output below a file": (f"{PLAIN} test.jsonl --out somefile/a", "somefile/a: .*choose another --out"),
    "pairs.jsonl is a folder": (f"{PLAIN} test.jsonl --out full-out", "full-out.*: "),
    "report.md is a folder": (f"{PLAIN} test.jsonl --out full-report", "full-report.*: "),
    "hard pairs into a folder": (f"{ONE} one --hard 2 nofile", "nofile: .*can be written"),
    "the same adapter twice": (f"{ONE} one --adapter-path one", "eval_prefs.py: .*a name of its own"),
    "adapters of one name": (f"{ONE} one --adapter-path elsewhere/one", "eval_prefs.py: .*a name of its own"),
    "a judge with nothing to judge": (f"{ONE} one --judge tiny", "eval_prefs.py: .*--generate"),
    "a missing judge": (f"{ONE} one --generate 1 --max-tokens 2 --judge ./no/such", "./no/such: .*address of a server"),
}
OUT_OF_RANGE = ["--batch-size 0", "--max-tokens 0", "--max-seq-length 0", "--generate -1", "--samples -1", "--seed -1"]
OUT_OF_RANGE += ["--hard x out", "--hard 3", "--hard -3 out", "--hard ² out", "--generate x", "--nonsense"]


def refusal(folder, monkeypatch, tmp_path, words):
    """Run main() in this process; return its last word."""
    monkeypatch.chdir(folder)
    words = words.split() if "--out" in words else [*words.split(), "--out", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", ["eval_prefs.py", *words])
    with pytest.raises(SystemExit) as stop:
        eval_prefs.main()
    message = stop.value.code
    assert isinstance(message, str) and "\n" not in message  # Python prints it to stderr and exits with status 1
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line(bad, monkeypatch, tmp_path, name):
    words, pattern = MISTAKES[name]
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    message = refusal(bad, monkeypatch, tmp_path, words)
    assert re.match(pattern, message), message


def test_an_adapter_that_is_no_number_is_said_to_be(place, evaluate, tmp_path):
    """Trained to nan by another program: a report or one line, no traceback."""
    shutil.copytree(place / "one", tmp_path / "mine")
    weights = mx.load(str(place / "one" / "adapters.safetensors"))
    weights = {name: w * math.nan for name, w in weights.items()}
    mx.save_safetensors(str(tmp_path / "mine" / "adapters.safetensors"), weights)
    try:
        evaluate(paths("one", tmp_path / "mine"))
    except SystemExit as stop:
        assert str(tmp_path / "mine") in stop.code and "\n" not in stop.code


@pytest.mark.parametrize("words", OUT_OF_RANGE)
def test_an_option_out_of_range_is_refused(bad, monkeypatch, tmp_path, words):
    message = refusal(bad, monkeypatch, tmp_path, f"{PLAIN} test.jsonl {words}")
    assert re.match("eval_prefs.py: .*--help lists all options$", message), message


def test_no_hard_pairs_asked(evaluate, tmp_path):
    """--hard 0 read the margin of a pair that was not there."""
    try:
        evaluate(f"{paths('one')} --hard 0 {tmp_path / 'hard.jsonl'}")
    except SystemExit as stop:
        assert "--hard" in stop.code


@pytest.mark.parametrize("name", ["an output that is a file", "an output below a file"])
def test_an_output_is_tried_before_an_hour_of_scoring(bad, monkeypatch, tmp_path, name):
    words, called = MISTAKES[name][0], []
    monkeypatch.setattr(eval_prefs, "add_reference", lambda *_: called.append(1) or sys.exit("scored"))
    assert "choose another --out" in refusal(bad, monkeypatch, tmp_path, words) and not called


def test_stderr_and_exit_status(bad, tmp_path):
    """As a user sees it, in processes of their own."""
    names = ["another model's adapter", "a bad line", "a missing adapter"]
    commands = [[sys.executable, str(ROOT / "eval_prefs.py"), *MISTAKES[name][0].split()] for name in names]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": bad}
    running = [subprocess.Popen([*command, "--out", str(tmp_path / "r")], **pipes) for command in commands]
    for name, process in zip(names, running):
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 1 and "Traceback" not in errors, errors
        assert re.match(MISTAKES[name][1], re.split(r"[\r\n]+", errors.strip())[-1]), errors


def test_another_base_is_warned_of(place, evaluate):
    found = evaluate(paths("one"), model="--model other")
    assert "warning" in found.printed and "tiny" in found.printed.split("warning")[1] and lines_of(found.report, "one")
    assert "warning" not in evaluate(paths("one")).printed


def test_the_base_is_the_adapters_own(place, evaluate):
    found = evaluate(paths("one"), model="")
    assert found.report.splitlines()[2].startswith("tiny on 10 pairs of test.jsonl")
