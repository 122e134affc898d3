"""eval_prefs.py: its numbers against the trainer's, numpy's and those by hand, its files, and what it refuses."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import FAMILIES, ROOT, make_rows, run_script, save_model, write_rows
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import eval_prefs

LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0}
RANDOM = {"one": "lora", "two": "lora", "dora": "dora", "full": "full"}
SIDES = ("chosen", "rejected")


def tagged_rows():
    """Return ten rows: half of one source, and signals that some rows lack."""
    for i, row in enumerate(rows := make_rows(34)[24:]):
        row |= {"source": ("logs", "votes")[i % 2], "id": i} | ({"signal": "edit"} if i < 4 else {})
    return rows


def random_adapter(model_path, folder, kind="lora", seed=0, size=0.05, **config):
    """Write an adapter of random weights, as mlx-lm reads it; full: changed weights of the last layer."""
    model = mlx_lm.load(str(model_path))[0]
    mx.random.seed(seed)
    if kind == "full":
        named = {name: w for name, w in tree_flatten(model.parameters()) if f".{len(model.layers) - 1}." in name}
    else:
        model.freeze()
        linear_to_lora_layers(model, 2, LORA, kind == "dora")
        named = dict(tree_flatten(model.trainable_parameters()))
    folder.mkdir(parents=True)
    noisy = {name: w + size * mx.random.normal(w.shape).astype(w.dtype) for name, w in named.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), noisy)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": LORA, "model": model_path.name} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, pairs, an adapter that the trainer trained and measured, and random ones of each kind."""
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "tiny")
    save_model(folder / "wide", hidden_size=64, head_dim=16)
    write_rows(folder / "train.jsonl", make_rows(24))
    write_rows(folder / "test.jsonl", tagged_rows())
    words = "--model tiny --data train.jsonl --train --test --iters 6 --adapter-path dpo --learning-rate 3e-3"
    done = run_script(*words.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    for i, (name, kind) in enumerate(RANDOM.items()):
        random_adapter(folder / "tiny", folder / name, kind, seed=i)
    random_adapter(folder / "wide", folder / "ofwide")
    return folder


def collect(out, printed):
    report, records = (out / "report.md").read_text(), read_lines(out / "pairs.jsonl")
    return SimpleNamespace(out=out, printed=printed, report=report, records=records)


@pytest.fixture
def evaluate(place, tmp_path, monkeypatch, capsys):
    """A function that runs main() in this process, in the folder; it returns what was printed and written."""
    monkeypatch.chdir(place)

    def run(words="", out=None, model="--model tiny", data="test.jsonl"):
        out = Path(out or tmp_path / "report")
        monkeypatch.setattr(sys, "argv", f"eval_prefs.py {model} --data {data} {words} --out {out}".split())
        capsys.readouterr()
        eval_prefs.main()
        return collect(out, capsys.readouterr().out)

    return run


read_lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
paths = lambda *names: " ".join(f"--adapter-path {name}" for name in names)


def scores_of(records, name):
    """Return (N, 3) of a model in the order of the records: log-probability of chosen, of rejected, KL."""
    return np.array([[record["models"][name][part] for part in (*SIDES, "kl")] for record in records], float)


def cells(report, name):
    """Return the cells of each table line that begins with a name."""
    return [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith(f"| {name} |")]


@pytest.fixture(scope="module")
def by_process(place, tmp_path_factory):
    """The report and records of every adapter, by one run in a process of its own."""
    out = tmp_path_factory.mktemp("all") / "report"
    words = f"--data test.jsonl --out {out} {paths('dpo', *RANDOM)}"
    done = run_script(*words.split(), script="eval_prefs.py", cwd=place)
    assert done.returncode == 0, done.stderr
    return collect(out, done.stdout)


def test_numbers_are_the_trainers(place, by_process):
    last = read_lines(place / "dpo" / "metrics.jsonl")[-1]  # the trainer's own evaluation of these pairs
    assert last["split"] == "test" and len(by_process.records) == 10
    scores, base = (scores_of(by_process.records, name) for name in ("dpo", "base"))
    lengths = [[record[f"{side}_tokens"] for side in SIDES] for record in by_process.records]
    found = eval_prefs.summarize(scores, base, np.array(lengths))
    close = lambda value: pytest.approx(value, abs=1e-4, rel=1e-5)
    assert scores[:, 0].mean() == close(last["logps/chosen"]) and scores[:, 1].mean() == close(last["logps/rejected"])
    assert 0.1 * found["margin"][0] == close(last["rewards/margins"])  # beta
    assert found["gained"] == close(last["rewards/accuracies"])
    assert found["kl"] == close(last["kl"]) and last["kl"] > 1e-3


def numpy_logps(model, prompt, answer):
    """Return log softmax (T, V) at an answer's tokens in float64, from one row of logits."""
    logits = np.array(model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", ["base", *RANDOM])
def test_numbers_are_numpys(place, by_process, name):
    base, tokenizer = mlx_lm.load(str(place / "tiny"))
    model = mlx_lm.load(str(place / "tiny"), adapter_path=None if name == "base" else str(place / name))[0]
    scores = scores_of(by_process.records, name)
    for i in (0, 3, 8):
        row, kl = tagged_rows()[i], 0
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)
        for k, side in enumerate(SIDES):
            turns = [*row["messages"], {"role": "assistant", "content": row[side]}]
            ids = tokenizer.apply_chat_template(turns)[len(prompt) :]
            logps, others = (numpy_logps(which, prompt, ids) for which in (model, base))
            assert scores[i, k] == pytest.approx(logps[np.arange(len(ids)), ids].sum(), abs=1e-4, rel=2e-6)
            assert by_process.records[i][f"{side}_tokens"] == len(ids)
            kl += (np.exp(logps) * (logps - others)).sum()
        assert scores[i, 2] == pytest.approx(kl, abs=1e-4, rel=1e-5) and (kl > 1e-3) == (name != "base")


def test_adapters_leave_the_base_as_it_is_and_need_no_second_one(place, evaluate, tmp_path):
    random_adapter(place / "tiny", tmp_path / "zeros", size=0.0)  # lora_b begins as zeros
    alone, last = evaluate(out=tmp_path / "alone"), evaluate(paths("full", "dora", tmp_path / "zeros"))
    np.testing.assert_array_equal(scores_of(alone.records, "base"), scores_of(last.records, "base"))
    np.testing.assert_allclose(scores_of(last.records, "zeros"), scores_of(last.records, "base"), atol=2e-4)
    assert np.abs(scores_of(last.records, "full") - scores_of(last.records, "base")).max() > 0.01
    model = mlx_lm.load(str(place / "tiny"))[0]
    before, copied = mx.get_active_memory(), eval_prefs.copy.deepcopy(model)
    mx.eval(copied.parameters())
    assert mx.get_active_memory() - before < 1000  # bytes


def test_neither_order_nor_batch_size_matters(evaluate, tmp_path):
    write_rows(tmp_path / "turned.jsonl", tagged_rows()[::-1])
    first = evaluate(paths("one", "dora"), out=tmp_path / "first").records
    for i, (size, data) in enumerate(((1, "test.jsonl"), (7, tmp_path / "turned.jsonl"))):
        second = evaluate(f"{paths('dora', 'one')} --batch-size {size}", out=tmp_path / str(i), data=data).records
        for name in ("base", "one", "dora"):
            others = scores_of(second[:: -1 if i else 1], name)
            np.testing.assert_allclose(scores_of(first, name), others, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
def test_shared_prompts_are_scored_as_whole_rows_or_not_shared(tmp_path, family):
    own = dict(conv_kernel=4, state_size=4, use_bias=False, use_conv_bias=True, time_step_rank=4)
    model = mlx_lm.load(str(save_model(tmp_path / family, family, **own)))[0]
    draw = lambda n: np.random.default_rng(n).integers(10, 300, n).tolist()
    pairs = [{"prompt": draw(n), "chosen": draw(7), "rejected": draw(4), "models": {}} for n in (40, 9, 25)]
    assert eval_prefs.shares_prompts(model, pairs) == (family != "mamba")
    eval_prefs.score_batches({"base": model}, eval_prefs.sorted_batches(pairs, 2, family != "mamba"))
    for pair in pairs:
        for side in SIDES:
            logps = numpy_logps(model, pair["prompt"], pair[side])[np.arange(len(pair[side])), pair[side]]
            assert pair["models"]["base"][side] == pytest.approx(logps.sum(), abs=2e-4, rel=1e-5)


@pytest.mark.parametrize("wins, of, low, high", [(8, 8, 0.6756, 1), (0, 8, 0, 0.3244), (97, 100, 0.9155, 0.9897)])
def test_a_share_near_its_end_has_wilsons_interval(wins, of, low, high):
    """8 of 8: n / (n + 1.96^2) = 8 / 11.84; the others by the same equation on paper."""
    assert eval_prefs.interval(np.arange(of) < wins) == pytest.approx((low, high), abs=2e-4)


def test_other_intervals_are_the_bootstraps():
    assert eval_prefs.interval(np.arange(100) < 48) == pytest.approx(
        (0.38, 0.58), abs=0.021
    )  # 0.48 -+ 1.96 * sqrt(0.48 * 0.52 / 100)
    limits = [eval_prefs.interval(np.random.default_rng(seed).normal(3, 2, 60)) for seed in range(40)]
    assert np.mean([high - low for low, high in limits]) == pytest.approx(2 * 1.96 * 2 / 60**0.5, rel=0.1)
    assert np.isnan(eval_prefs.interval([0.5, 1.5, 2.5])).all()  # of a few margins there is none


BINOMIAL = [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (0, 6, 2 / 64), (1, 0, 1.0)]


@pytest.mark.parametrize("first, second, p", BINOMIAL)
def test_mcnemar_by_hand(first, second, p):
    """Twice the tail of a fair coin, at most 1: of 10, 1 or none in (10 + 1) / 1024."""
    one = np.array([True] * first + [False] * second + [True, False])
    two = np.array([False] * first + [True] * second + [True, False])
    assert eval_prefs.mcnemar(one, two) == (first, second, pytest.approx(p))


def test_a_summary_by_hand():
    base = np.array([[-10.0, -12, 0], [-8, -6, 0], [-9, -9.5, 0], [-5, -7, 0]])
    scores = np.array([[-11.0, -16, 2], [-7, -9, 1], [-12, -10, 3], [-6, -7, 0]])  # margins 3, 4, -2.5, -1
    found = eval_prefs.summarize(scores, base, np.array([[10, 4], [2, 5], [6, 6], [8, 4]]))
    expected = {
        "accuracy": 0.75, "gained": 0.5, "margin": 0.875, "became_right": 0.25, "became_wrong": 0.25,
        "accuracy_mean": 0.5,  # -1.1 and -4, -3.5 and -1.8, -2 and -1.67, -0.75 and -1.75
        "chosen_change": -1.0, "rejected_change": -1.875, "kl": 6 / 45, "perplexity": np.exp(36 / 26),
        "accuracy_longer": 1.0, "accuracy_shorter": 1.0,  # the wrong one is equally long
        "length_correlation": np.corrcoef([3, 4, -2.5, -1], [6, -3, 0, 4])[0, 1],
    }  # fmt: skip
    for name, value in expected.items():
        assert np.ravel(found[name])[0] == pytest.approx(value), name
    assert found["quartiles"] == pytest.approx((-1.375, 1.0, 3.25))
    even = eval_prefs.summarize(scores, base, np.full((4, 2), 5))
    assert math.isnan(even["accuracy_longer"]) and even["length_correlation"] == 0


def right_in(count, kl=0.1, of=20):
    """Return the scores of a model that is right in the first pairs."""
    return np.array([[-1.0, -2.0, kl] if i < count else [-2.0, -1.0, kl] for i in range(of)])


def first_lines(scores, lengths=np.full((20, 2), 4)):
    found = {name: eval_prefs.summarize(part, scores["base"], lengths) for name, part in scores.items()}
    return eval_prefs.headlines(found, scores, lengths, "tiny")


def test_the_first_sentence():
    (alone,) = first_lines({"base": right_in(5)})
    assert alone == "tiny prefers the better answer in 5 of 20 held-out pairs; guessing gives half."
    near, chance = "its answers stay close to the base's.", ", which may be chance"
    says = lambda wins: f"prefers the better answer in {wins} of 20 held-out pairs, before it was 5"
    assert first_lines({"base": right_in(5), "mine": right_in(18)}) == [f"The adapter {says(18)}; {near}"]
    assert first_lines({"base": right_in(5), "mine": right_in(8)}) == [f"The adapter {says(8)}{chance}; {near}"]
    two = first_lines({"base": right_in(5), "a": right_in(18, kl=1.6), "b": right_in(18)})
    assert two[0] == f"The adapter a {says(18)}; its answers have moved away from the base's." and "adapter b" in two[1]


def test_warnings():
    """kl: of both answers' 8 tokens. Displacement: in the mean, and where there are enough pairs, beyond doubt."""
    lines = first_lines({"base": right_in(5), "mine": right_in(18, kl=8.1)})
    assert "are far from" in lines[0] and lines[1].startswith("Warning: kl of mine is above 1")
    many = lambda change: " ".join(first_lines({"base": right_in(5), "mine": right_in(5) + change}))
    assert "displacement" in many([-2, -5, 0])
    for change in ([2, -5, 0], [0, -5, 0], np.array([[3.0, 0, 0], [-3.1, 0, 0]] * 10)):
        assert "displacement" not in many(change)


def test_the_report_begins_with_the_sentence_and_has_every_part(by_process):
    sentence = r"The adapter dpo prefers the better answer in \d+ of 10 held-out pairs, before it was \d+"
    assert re.match(sentence, by_process.report) and re.search(sentence, by_process.printed)
    heads = "What moved, Which is better?, Length, Accuracy by length, Accuracy by source, Accuracy by signal"
    assert ", ".join(re.findall("^## (.*)", by_process.report, re.M)).startswith(heads)
    assert [cells(by_process.report, kind)[0][1] for kind in ("logs", "edit", "none")] == ["5", "4", "6"]
    wins = {name: scores_of(by_process.records, name) @ [1, -1, 0] > 0 for name in ("dpo", "one")}
    assert cells(by_process.report, "one")[0][1].startswith(f"{wins['one'].mean():.2f} (")
    assert cells(by_process.report, "logs")[0][3] == f"{wins['dpo'][::2].mean():.2f}"
    tests = [line for line in by_process.report.splitlines() if "| in sum |" in line]
    assert len(tests) == 15 and "nan" not in by_process.report  # of six models, every two


def test_cells_of_any_value_make_a_table():
    table = eval_prefs.to_table(["a"], [["x|y"], ["two\nlines"], [["list"]], ["nan"], ["banana"]])
    assert table.splitlines()[2:] == ["| x\\|y |", "| two lines |", "| ['list'] |", "| - |", "| banana |"]


def test_pictures_or_how_to_get_them(evaluate, tmp_path, monkeypatch):
    if importlib.util.find_spec("matplotlib"):
        found = evaluate(paths("one", "full"), out=tmp_path / "drawn")
        assert min((found.out / name).stat().st_size for name in re.findall(r"\((\w+\.png)\)", found.report)) > 5000
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert "pip install matplotlib" in evaluate(paths("one")).report


def test_answers_stand_side_by_side(place, evaluate):
    found = evaluate(f"{paths('one', 'full')} --generate 3 --max-tokens 8")
    table = found.report.split("| prompt | base | one | full |")[1].split("\n\n")[0].strip().splitlines()[1:]
    assert len(table) == 3 and "How far is number 24?" in table[0]
    tokenizer, answers = mlx_lm.load(str(place / "tiny"))[1], []
    for path in (None, "one", "full"):
        model = mlx_lm.load(str(place / "tiny"), adapter_path=path and str(place / path))[0]
        prompt = tokenizer.apply_chat_template(tagged_rows()[2]["messages"], add_generation_prompt=True)
        answers.append(mlx_lm.generate(model, tokenizer, prompt, max_tokens=8))
    assert table[2].endswith(eval_prefs.to_table([], [answers]).splitlines()[-1][1:])
    assert cells(found.report.split("Greedy answers to 3")[1], "base")[0][1:] == ["8.0", "0.00"]


def test_hard_pairs_are_the_lowest_margins_as_they_were(evaluate, tmp_path):
    found = evaluate(f"{paths('one', 'two')} --hard 4 {tmp_path / 'hard.jsonl'}")
    margins = (scores_of(found.records, "two") - scores_of(found.records, "base")) @ [1, -1, 0]
    assert read_lines(tmp_path / "hard.jsonl") == [tagged_rows()[i] for i in np.argsort(margins)[:4]]
    assert f"4 pairs with margins from {margins.min():.2f} to" in found.report


def test_from_any_folder_with_what_is_bundled(tmp_path):
    """The base beside the script, the pairs by --data; a model that is right in 8 of 8 is not certain to be."""
    rows = read_lines(ROOT / "data/test.jsonl")[:8]
    write_rows(tmp_path / "easy.jsonl", [{**row, "rejected": "crown crown tide the the of map sea."} for row in rows])
    done = run_script("--data", "easy.jsonl", script="eval_prefs.py", cwd=tmp_path)
    assert "better answer in 8 of 8 held-out pairs" in done.stdout, done.stderr
    assert cells(done.stdout, "base")[0][1] == "1.00 (0.68 to 1.00)"


def test_a_model_beside_the_adapter(place, tmp_path, monkeypatch, evaluate):
    shutil.copytree(place / "one", tmp_path / "made/runs/one")
    shutil.copytree(place / "tiny", tmp_path / "made/tiny")
    monkeypatch.chdir(tmp_path)
    assert cells(evaluate(paths("made/runs/one"), model="", data=place / "test.jsonl").report, "one")


def test_columns_are_named_by_the_adapter_or_a_config(place, evaluate, tmp_path):
    rows = [{"question": row["messages"], "chosen": row["chosen"], "bad": row["rejected"]} for row in tagged_rows()]
    write_rows(tmp_path / "named.jsonl", rows)
    random_adapter(place / "tiny", tmp_path / "own", prompt_feature="question", rejected_feature="bad")
    (tmp_path / "options.yaml").write_text("hf_dataset: {prompt_feature: question, rejected_feature: bad}\n")
    ways = (paths(tmp_path / "own"), f"--config {tmp_path / 'options.yaml'}")
    found = [evaluate(words, out=tmp_path / str(i), data=tmp_path / "named.jsonl") for i, words in enumerate(ways)]
    assert len({str(scores_of(one.records, "base")) for one in found}) == 1


def test_old_turns_go_blank_lines_do_not_count_and_lost_thoughts_are_said(place, evaluate, tmp_path):
    rows = tagged_rows()
    long = [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "Yes."}] + rows[1]["messages"]
    rows[2]["chosen"] *= 30
    data = write_rows(tmp_path / "long.jsonl", [{**rows[1], "messages": long}, rows[2], rows[1]])
    data.write_text("\n" + data.read_text())
    found = evaluate("--max-seq-length 200", data=data)
    assert "2 of 3 pairs (others: too long, equal answers), 1 lost old turns" in found.printed
    assert [record["place"][-2:] for record in found.records] == [":2", ":4"]
    np.testing.assert_allclose(*(scores_of([record], "base") for record in found.records), atol=1e-4)
    cut = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    save_model(tmp_path / "cuts", template=cut + "{% if add_generation_prompt %}assistant: {% endif %}")
    data = write_rows(tmp_path / "thinks.jsonl", [{**rows[0], "chosen": "<think>Hm.</think>Ten."}, rows[1]])
    assert "leaves a part of 1 answers out" in evaluate(model=f"--model {tmp_path / 'cuts'}", data=data).printed


@pytest.fixture(scope="module")
def bad(place):
    """Folders and files that are wrong, in the same place."""
    good = '{"prompt": "How far?", "chosen": "Ten minutes.", "rejected": "Who knows."}'
    for name in ("noweights", "broken", "elsewhere/one"):
        shutil.copytree(place / "one", place / name)
    (place / "noweights" / "adapters.safetensors").unlink()
    (place / "nofile").mkdir()
    texts = {"bad": f'{good}\n\n{{"prompt": "a"\n', "array": f"[{good}]", "somefile": "no folder"}
    texts["equal"] = f"{good}\n{good.replace('Who knows.', 'Ten minutes.')}\n"
    for name, text in {**texts, "pairs": good}.items():  # pairs.jsonl: a person's, which must not be written over
        (place / f"{name}.jsonl").write_text(text)
    save_model(place / "overflows", dtype=mx.float16)
    for file, factor in (("overflows/model", 3e4), ("broken/adapters", math.nan)):
        path = str(place / f"{file}.safetensors")
        weights = {name: w * factor if "norm" not in name else w for name, w in mx.load(path).items()}
        mx.save_safetensors(path, weights, {"format": "mlx"})
    return place


ONE, PLAIN = "--model tiny --data test.jsonl --adapter-path", "--model tiny --data"
MISTAKES = {  # words: what is said
    "no numbers": ("--model overflows --data test.jsonl", "overflows: .*of base are no numbers"),
    "an adapter of no numbers": (f"{ONE} broken", "tiny: .*of broken are no numbers.*--learning-rate"),
    "another model's adapter": (f"{ONE} ofwide", "ofwide: .*is it an adapter of this model"),
    "a missing adapter": (f"{ONE} none", "none/adapter_config.json: .*give an adapter's folder"),
    "a folder without weights": (f"{ONE} noweights", "noweights: .*is it an adapter"),
    "adapters of several models": (f"--data test.jsonl {paths('one', 'ofwide')}", "options: .*several models.*--model"),
    "an array": (f"{PLAIN} array.jsonl", "array.jsonl: no JSON lines"),
    "a bad line": (f"{PLAIN} bad.jsonl", "bad.jsonl:3: .*mend or delete the row"),
    "equal answers": (f"{PLAIN} equal.jsonl", "equal.jsonl:2: .*equal answers: mend or delete"),
    "missing data": (f"{PLAIN} none.jsonl", "none.jsonl: .*give a .jsonl file"),
    "a missing model": ("--model ./no/such --data test.jsonl", r"\./no/such: no such folder"),
    "a missing model, as a name": ("--model models/gone --data test.jsonl", "models/gone: no such folder"),
    "a folder without a model": ("--model nofile --data test.jsonl", "nofile: no such folder with a config.json"),
    "every pair too long": (f"{PLAIN} test.jsonl --max-seq-length 5", "test.jsonl: .*raise --max-seq-length"),
    "an output that is a file": (f"{PLAIN} test.jsonl --out somefile.jsonl", "somefile.jsonl: .*choose another --out"),
    "an output with another's pairs": (f"{PLAIN} test.jsonl --out .", r"\.: its pairs.jsonl is no report's"),
    "hard pairs into a folder": (f"{ONE} one --hard 2 nofile", "nofile: .*choose another place"),
    "hard pairs over the data": (f"{ONE} one --hard 2 test.jsonl", "test.jsonl: .*pairs to measure on"),
    "adapters of one name": (f"{ONE} one --adapter-path elsewhere/one", "options: .*a name of its own"),
}
for word in ("--batch-size 0", "--max-tokens 0", "--generate -1", "--hard x out", "--hard 0 out", "--hard 3", "--none"):
    MISTAKES[word] = (f"{PLAIN} test.jsonl {word}", ".*--help lists (them all|all options)")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line(bad, monkeypatch, tmp_path, name):
    words, pattern = MISTAKES[name]
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(bad)
    read = lambda: [(bad / name).read_text() for name in ("pairs.jsonl", "test.jsonl")]
    before = read()
    words = [*words.split(), *([] if "--out" in words else ["--out", str(tmp_path / "report")])]
    monkeypatch.setattr(sys, "argv", ["eval_prefs.py", *words])
    with pytest.raises(SystemExit) as stop:
        eval_prefs.main()
    message = stop.value.code  # a text: Python writes it to stderr, and exits with status 1
    assert re.match(pattern, message) and "\n" not in message and len(message) < 1000, message
    assert before == read()


def test_stderr_and_exit_status(bad):
    check = ("data/make_tiny_chat.py", "--check nofile", "nofile: no adapters.safetensors")
    for script, words, said in (("eval_prefs.py", *MISTAKES["no numbers"]), check):
        done = run_script(*words.split(), script=script, cwd=bad)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.match(said, re.split(r"[\r\n]+", done.stderr.strip())[-1]), done.stderr


def test_another_base_is_warned_of(place, evaluate):
    shutil.copytree(place / "tiny", place / "other", dirs_exist_ok=True)
    assert "warning: one/adapter_config.json is of tiny" in evaluate(paths("one"), model="--model other").printed
    assert "warning" not in evaluate(paths("one")).printed


@pytest.mark.slow
def test_the_headline_of_the_bundled_model(tmp_path):
    random_adapter(ROOT / "data" / "tiny-chat", tmp_path / "zeros", size=0.0)  # answers as the base does
    done = run_script("--check", tmp_path / "zeros", script="data/make_tiny_chat.py")
    assert "helpful 29 -> 29, evasive 71 -> 71, other 0 -> 0" in done.stdout, done.stderr
