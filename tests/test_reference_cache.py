"""The reference's scores, kept between runs: what is read back is what was computed, bit for bit, or it is not used."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, make_rows, save_model, write_rows
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

import dpo_trainer

END = 4  # <|im_end|>
ADD_REFERENCE, SCORE = dpo_trainer.add_reference, dpo_trainer.completion_logps


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the scores, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference-logps"


@pytest.fixture(scope="module")
def model(tiny):
    return mlx_lm.load(str(tiny))[0]


def random_pairs(count, seed=0):
    """Return pairs of random ids with differing lengths."""
    rng = np.random.default_rng(seed)
    ids = [[rng.integers(7, 320, rng.integers(2, 20)).tolist() for _ in range(3)] for _ in range(count)]
    return [{"prompt": p, "chosen": c + [END], "rejected": r + [END], "weight": 1.0} for p, c, r in ids]


def counted(model, pairs, args):
    """Call add_reference; return for how many pairs it computed the model."""
    sizes = []

    def score(model, batch):
        sizes.append(len(batch["rows"]) // 2)
        return SCORE(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "compile", lambda function: function)  # compiled, it is called once a shape
        patch.setattr(dpo_trainer, "completion_logps", score)
        ADD_REFERENCE(model, pairs, args)
    return sum(sizes)


def bits(pairs):
    return np.array([pair["ref_logps"] for pair in pairs], np.float32).tobytes()


def scores(model, pairs, *words):
    """Return the bits of the reference's log-probabilities, and for how many pairs the model was computed."""
    pairs = [dict(pair) for pair in pairs]
    args = dpo_trainer.parse_args(["--model", "none", "--data", "none", "--batch-size", "2", *words])
    computed = counted(model, pairs, args)
    assert np.isfinite([pair["ref_logps"] for pair in pairs]).all()
    return bits(pairs), computed


def fresh(model, pairs):
    """Return what the model gives without anything kept."""
    return scores(model, pairs, "--no-reference-cache")[0]


def records(folder):
    """Return [(key, value)] of all that is kept; every line must be a record or empty."""
    lines = [line for file in sorted(folder.glob("*")) for line in file.read_text().split("\n") if line]
    return [item for line in lines for item in json.loads(line).items()]


def run(folder, *words):
    """Run main() on folder/pairs.jsonl; return what it computed, printed, measured and saved."""
    out, seen, sizes, lines = folder / "out", [], [], []
    words = ["--data", folder / "pairs.jsonl", "--adapter-path", out, "--iters", 4, "--steps-per-report", 1, *words]
    words += ["--learning-rate", "1e-3"]

    def add_reference(model, pairs, args):
        sizes.append(counted(model, pairs, args))
        seen.extend(pairs)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dpo_trainer.py", *map(str, words)])
        patch.setattr(dpo_trainer, "add_reference", add_reference)
        patch.setattr(dpo_trainer, "print", lambda *texts, **_: lines.append(" ".join(texts)), raising=False)
        try:
            dpo_trainer.main()
        finally:
            signal.signal(signal.SIGINT, handler)
    found = SimpleNamespace(refs=bits(seen), pairs=len(seen), computed=sum(sizes), lines=lines)
    if (out / "metrics.jsonl").exists():
        metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
        clock = ("tokens_per_second", "peak_memory_gb")
        found.curve = [{name: value for name, value in row.items() if name not in clock} for row in metrics]
        found.adapter = (out / "adapters.safetensors").read_bytes()
        shutil.rmtree(out)
    return found


# ---------------------------------------------------------------------------------------------------- runs after runs


def test_a_second_run_computes_nothing_and_is_the_same(tiny, tmp_path, kept):
    write_rows(tmp_path / "pairs.jsonl", make_rows(13))
    first = run(tmp_path, "--model", tiny)
    assert first.computed == first.pairs == 13 and len(records(kept)) == 13 and len(list(kept.iterdir())) == 1
    before = [path.read_bytes() for path in kept.iterdir()]
    second = run(tmp_path, "--model", tiny)
    assert second.computed == 0 and second.refs == first.refs and len(set(first.refs)) > 20
    assert second.curve == first.curve and len(first.curve) == 6 and second.adapter == first.adapter
    others = [["--beta", 0.5, "--batch-size", 3], ["--loss", "ipo", "--seed", 3], ["--fine-tune-type", "full"]]
    for words in [*others, ["--fine-tune-type", "dora", "--length-normalize", "--grad-accumulation-steps", 2]]:
        other = run(tmp_path, "--model", tiny, *words)
        assert other.computed == 0 and sorted_rows(other.refs) == sorted_rows(first.refs), words
        assert other.adapter != first.adapter
    assert [path.read_bytes() for path in kept.iterdir()] == before


def sorted_rows(bits):
    return sorted(map(tuple, np.frombuffer(bits, np.float32).reshape(-1, 2).tolist()))


def test_more_data_computes_only_what_is_new(tiny, tmp_path, kept):
    write_rows(tmp_path / "pairs.jsonl", make_rows(9))
    first = run(tmp_path, "--model", tiny)
    write_rows(tmp_path / "pairs.jsonl", make_rows(14))
    grown = run(tmp_path, "--model", tiny)
    assert (first.computed, grown.computed, grown.pairs) == (9, 5, 14)
    assert set(sorted_rows(first.refs)) < set(sorted_rows(grown.refs)) and len(records(kept)) == 14
    test = write_rows(tmp_path / "test.jsonl", make_rows(16))
    measured = run(tmp_path, "--model", tiny, "--test", test)
    assert measured.computed == 2 and measured.pairs == 14 + 16


def test_a_test_alone_uses_what_the_training_kept(tiny, tmp_path, kept, monkeypatch):
    write_rows(tmp_path / "pairs.jsonl", make_rows(9))
    monkeypatch.setattr(shutil, "rmtree", lambda *_: None)  # the adapter stays for the test
    first = run(tmp_path, "--model", tiny)
    alone = run(tmp_path, "--model", tiny, "--no-train", "--test", tmp_path / "pairs.jsonl")
    assert alone.computed == 0 and sorted_rows(alone.refs) == sorted_rows(first.refs)


def test_a_reference_model_has_scores_of_its_own(tiny, tmp_path, kept):
    other = save_model(tmp_path / "other", seed=1)
    write_rows(tmp_path / "pairs.jsonl", make_rows(9))
    own = run(tmp_path, "--model", tiny)
    theirs = run(tmp_path, "--model", tiny, "--reference-model", other)
    assert theirs.computed == 9 and theirs.refs != own.refs and len(list(kept.iterdir())) == 2
    again = run(tmp_path, "--model", tiny, "--reference-model", other)
    assert again.computed == 0 and again.refs == theirs.refs and again.curve == theirs.curve
    as_policy = run(tmp_path, "--model", other)  # the same weights: the same scores
    assert as_policy.computed == 0 and as_policy.refs == theirs.refs
    assert run(tmp_path, "--model", tiny, "--reference-model", tiny).refs == own.refs


def test_where_it_is_kept(model, tmp_path, monkeypatch):
    pairs, home = random_pairs(2), tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    for given in (None, ""):  # unset, or empty, which stands for unset
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", "") if given == "" else monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        scores(model, pairs)
        [file] = [path for path in home.rglob("*") if path.is_file()]
        assert file == home / ".cache" / "reference-logps" / f"{dpo_trainer.fingerprint(model)}.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert scores(model, pairs)[1] == 2 and scores(model, pairs)[1] == 0
    assert (tmp_path / "elsewhere" / "reference-logps" / file.name).exists()


def test_no_reference_cache_neither_reads_nor_writes(model, tiny, tmp_path, kept, monkeypatch):
    pairs = random_pairs(5)
    expected = fresh(model, pairs)
    assert not kept.parent.exists()
    scores(model, pairs)
    [file] = kept.iterdir()
    lies = "".join(f"\n{json.dumps({key: [-1.0, -2.0]})}" for key, _ in records(kept))
    file.write_text(lies)
    lied = scores(model, pairs)
    assert lied[1] == 0 and lied[0] != expected  # they are believed, without which the next line says nothing
    assert scores(model, pairs, "--no-reference-cache") == (expected, 5) and file.read_text() == lies
    write_rows(tmp_path / "pairs.jsonl", make_rows(5))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    for _ in range(2):
        assert run(tmp_path, "--model", tiny, "--no-reference-cache").computed == 5
    assert not (tmp_path / "none").exists()


def test_scores_that_are_wrong_are_noticed_before_training(tiny, tmp_path, kept):
    """As after a change in mlx-lm's model: no run goes on from them, and the message says what to do."""
    write_rows(tmp_path / "pairs.jsonl", make_rows(9))
    run(tmp_path, "--model", tiny)
    [file] = kept.iterdir()
    file.write_text("".join(f"\n{json.dumps({key: [one + 1, two]})}" for key, (one, two) in records(kept)))
    with pytest.raises(SystemExit, match="self-check: .*--no-reference-cache"):
        run(tmp_path, "--model", tiny)
    assert not (tmp_path / "out").exists() and run(tmp_path, "--model", tiny, "--no-reference-cache").computed == 9


# ---------------------------------------------------------------------------------------------- nothing is mixed up


def changed_weight(name, index):
    """Return a function that changes one element of one tensor by its last bit."""

    def change(model):
        weights = dict(tree_flatten(model.parameters()))
        w = np.array(weights[name])
        w.flat[index] = np.nextafter(w.flat[index], np.float32(9))
        model.load_weights([(name, mx.array(w))], strict=False)

    return change


def swapped_layers(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


VARIANTS = {  # what save_model is given, what is then done to the model
    "the first weight": ({}, changed_weight("model.embed_tokens.weight", 0)),
    "the last weight": ({}, changed_weight("model.layers.1.mlp.down_proj.weight", -1)),
    "a norm's weight": ({}, changed_weight("model.layers.0.input_layernorm.weight", 5)),
    "two layers swapped": ({}, swapped_layers),
    "bfloat16": (dict(dtype=mx.bfloat16), None),
    "float16": (dict(dtype=mx.float16), None),
    "4 bits": (dict(bits=4), None),
    "8 bits": (dict(bits=8), None),
    "rope_theta": (dict(rope_theta=2e4), None),
    "rms_norm_eps": (dict(rms_norm_eps=1e-3), None),
    "attention heads": (dict(num_attention_heads=2, head_dim=16, num_key_value_heads=1), None),
    "another architecture": (dict(family="qwen3"), None),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_another_model_has_scores_of_its_own(model, tmp_path, kept, name):
    extra, change = VARIANTS[name]
    pairs = random_pairs(3)
    expected = scores(model, pairs)[0]
    other = mlx_lm.load(str(save_model(tmp_path / "other", **extra)))[0]
    if change:
        assert scores(other, pairs) == (expected, 0)  # the same weights in another folder
        change(other)
    own = fresh(other, pairs)
    assert scores(other, pairs) == (own, 3) and len(list(kept.iterdir())) == 2
    assert scores(other, pairs) == (own, 0) and scores(model, pairs) == (expected, 0)
    assert own != expected or change


def adapted(tiny, folder, weight, **config):
    """Return the model with a LoRA adapter whose lora_b are all weight."""
    args = dpo_trainer.parse_args(["--model", str(tiny), "--data", "none"])
    params, layout = dpo_trainer.trainable_parameters(mlx_lm.load(args.model)[0], args)
    arrays = dpo_trainer.unpack(params, layout)
    folder.mkdir()
    arrays = {name: mx.full(w.shape, weight) if "lora_b" in name else w for name, w in arrays.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    args.lora_parameters |= config
    dpo_trainer.save_config(dict(vars(args)), folder / "adapter_config.json")
    return mlx_lm.load(str(tiny), adapter_path=str(folder))[0]


def test_an_adapter_has_scores_of_its_own(tiny, model, tmp_path, kept):
    """The scale is no weight: two adapters of the same weights that differed in it had one another's scores."""
    pairs, found = random_pairs(3), {}
    models = {"none": model, "idle": adapted(tiny, tmp_path / "idle", 0.0), "one": adapted(tiny, tmp_path / "1", 0.01)}
    models |= {"two": adapted(tiny, tmp_path / "2", 0.02), "scale": adapted(tiny, tmp_path / "scale", 0.01, scale=1.5)}
    for name, adapter in models.items():
        found[name] = scores(adapter, pairs)
        assert found[name] == (fresh(adapter, pairs), 3), name
        assert scores(adapter, pairs) == (found[name][0], 0), name
    assert len({found[name] for name in ("none", "one", "two", "scale")}) == 4


def test_a_resumed_run_does_not_take_the_scores_of_the_bare_model(tiny, tmp_path, kept):
    write_rows(tmp_path / "pairs.jsonl", make_rows(6))
    bare = run(tmp_path, "--model", tiny)
    adapted(tiny, tmp_path / "adapter", 0.01)
    words = ["--model", tiny, "--resume-adapter-file", tmp_path / "adapter" / "adapters.safetensors"]
    resumed = run(tmp_path, *words)
    assert resumed.computed == 6 and resumed.refs != bare.refs
    assert run(tmp_path, *words).computed == 0 and run(tmp_path, *words, "--reference-model", tiny).refs == bare.refs


def test_other_tokens_have_scores_of_their_own(model, kept):
    [pair] = random_pairs(1, seed=5)
    prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    variants = [dict(prompt=[9, *prompt[1:]]), dict(chosen=[9, *chosen[1:]]), dict(rejected=[*rejected[:-2], 9, END])]
    variants += [dict(chosen=rejected, rejected=chosen), dict(prompt=prompt + [9]), dict(prompt=prompt[1:])]
    joined = [dict(prompt=[*prompt, chosen[0]], chosen=chosen[1:])]  # the same tokens, parted elsewhere
    joined += [dict(chosen=chosen + rejected[:1], rejected=rejected[1:])]
    joined += [dict(prompt=[1], chosen=[one, END], rejected=[1, END]) for one in (12, 11)]  # the same digits
    joined += [dict(prompt=[1], chosen=[1, 2, END], rejected=[1, END]), dict(prompt=[11], chosen=[1, END])]
    scores(model, [pair])
    found = [pair]
    for variant in variants + joined:
        new = pair | variant
        if new not in found:
            assert scores(model, [*found, new]) == (fresh(model, [*found, new]), 1), variant
            found.append(new)
    assert len(found) >= 10 and len({key for key, _ in records(kept)}) == len(found)
    again = scores(model, [pair | {"weight": 3.0, "place": "a.jsonl:1"}])  # what is no token does not matter
    assert again[1] == 0


# -------------------------------------------------------------------------------------------------------- what is torn


@pytest.fixture
def torn(model, kept):
    """Nine pairs, their scores, the file that keeps them, a batch of two a line, and its content."""
    pairs = random_pairs(9, seed=1)
    expected, computed = scores(model, pairs)
    [file] = kept.iterdir()
    assert computed == 9
    return SimpleNamespace(pairs=pairs, expected=expected, file=file, text=file.read_text())


def check(model, torn, computed, what):
    """It must compute so many, keep them, and know all the next time."""
    assert scores(model, torn.pairs) == (torn.expected, computed), what
    assert scores(model, torn.pairs) == (torn.expected, 0), what


def test_a_line_cut_at_any_byte_is_computed_again(model, torn):
    whole = torn.text.rstrip("\n")
    start = whole.rindex("\n") if "\n" in whole.lstrip("\n") else 0
    assert len(whole) - start > 50  # a hash and two numbers
    last = len(json.loads(whole[start:]))
    for end in range(start, len(torn.text) + 1):
        torn.file.write_text(torn.text[:end])
        check(model, torn, 0 if end >= len(whole) else last, torn.text[:end][-90:])


@pytest.mark.parametrize("end", [0, 1, 40])
def test_hardly_anything_is_left_of_the_file(model, torn, end):
    torn.file.write_text(torn.text[:end])
    check(model, torn, 9, end)


NO_RECORDS = {
    "garbage": random.Random(0).randbytes(3000),
    "zeros": bytes(4096),
    "utf-16": '{"a": [1, 2]}'.encode("utf-16"),
    "half a letter": b'{"\xc3',
    "null": b"null",
    "a number": b"5",
    "true": b"true",
    "a text": b'"text"',
    "a list": b"[1]",
    "a list of lists": b"[[1, 2]]",
    "a list of texts": b'["ab"]',
    "an empty list": b"[]",
    "another record": b'{"another": "record", "x": 1}',
    "no end of brackets": b"[" * 200_000,
    "a long number": b'{"a": ' + b"1" * 10_000 + b"}",
    "an html page": b"<html>\r\n<p>no</p>\r",
}


@pytest.mark.parametrize("name", NO_RECORDS)
def test_what_is_no_record_does_no_harm(model, torn, name):
    """It stands before, between or after the records, on lines of its own, or it is all that there is."""
    lines, junk = [line for line in torn.text.encode().split(b"\n") if line], NO_RECORDS[name]
    assert len(lines) == 5
    for place in range(6):
        torn.file.write_bytes(b"\n".join(lines[:place] + [junk] + lines[place:]) + b"\n")
        check(model, torn, 0, place)
    torn.file.write_bytes(junk)
    check(model, torn, 9, "alone")


WRONG = ['"text"', "null", "5", "[]", "[-1.5]", "[-1.5, -2.5, -3.5]", "[NaN, NaN]", "[NaN, -2.5]", "[-1.5, NaN]"]
WRONG += ["[null, null]", '["a", "b"]', '{"chosen": -1.5}', "[[-1.5, -2.5], [-1.5, -2.5]]", "true", '"ab"', "{}"]
WRONG += ['[-1.5, "b"]', "[-1.5, [-2.5]]", "[-1.5, null]", f"[-1{'0' * 400}, -2.5]"]


@pytest.mark.parametrize("value", WRONG)
def test_a_record_of_wrong_values_is_computed_again(model, torn, value):
    """One of a batch: the batch's other scores may go with it."""
    lines = torn.text.strip().split("\n")
    key, row = list(json.loads(lines[1]).items())[1]
    torn.file.write_text(torn.text.replace(f'"{key}": {row}', f'"{key}": {value}'))
    computed = scores(model, torn.pairs)
    assert computed[0] == torn.expected and computed[1] in (1, 2), value
    assert scores(model, torn.pairs) == (torn.expected, 0), value


@pytest.mark.parametrize("value", ['"text"', "[NaN, NaN]", "[-1.5]"])
def test_a_file_of_nothing_but_wrong_values(model, torn, value):
    keys = [key for line in torn.text.strip().split("\n") for key in json.loads(line)]
    torn.file.write_text("".join(f'\n{{"{key}": {value}}}' for key in keys))
    check(model, torn, 9, value)


# ------------------------------------------------------------------------------------------------------------ no place


def spoil(kept, file_name, way):
    """Put something in the way of the scores."""
    if way == "a file for the cache folder":
        kept.parent.write_text("a file")
    elif way == "a file for our folder":
        kept.parent.mkdir()
        kept.write_text("a file")
    elif way == "a folder for the scores":
        (kept / file_name).mkdir(parents=True)
    elif way == "a link to nowhere":
        kept.parent.mkdir()
        kept.symlink_to("no/such/place")


WAYS = ["a file for the cache folder", "a file for our folder", "a folder for the scores", "a link to nowhere"]


@pytest.mark.parametrize("way", WAYS)
def test_without_a_place_it_says_so_and_trains(model, tiny, tmp_path, kept, way):
    write_rows(tmp_path / "pairs.jsonl", make_rows(5))
    normal = run(tmp_path, "--model", tiny, "--no-reference-cache")
    spoil(kept, f"{dpo_trainer.fingerprint(model)}.jsonl", way)
    before = sorted(tmp_path.rglob("*"))
    spoilt = run(tmp_path, "--model", tiny)
    assert spoilt.computed == 5 and spoilt.refs == normal.refs and spoilt.curve == normal.curve
    assert spoilt.adapter == normal.adapter and sorted(tmp_path.rglob("*")) == before
    [line] = [line for line in spoilt.lines if line not in normal.lines]
    assert re.search("not kept", line) and "\n" not in line and str(kept.parent) in line


@pytest.fixture
def readable():
    """A folder that anybody may read, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("known", [False, True])
def test_a_cache_that_may_only_be_read(model, readable, monkeypatch, capsys, known):
    monkeypatch.setenv("XDG_CACHE_HOME", str(readable))
    pairs, kept = random_pairs(3), readable / "reference-logps"
    expected = scores(model, pairs)[0]
    if not known:
        shutil.rmtree(kept)
    for path in [*readable.rglob("*"), readable]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    capsys.readouterr()
    root = os.geteuid() == 0  # who may write everywhere
    try:
        if root:
            os.seteuid(65534)
        found = scores(model, pairs)
    finally:
        if root:
            os.seteuid(0)
        readable.chmod(0o755)
        kept.exists() and kept.chmod(0o755)
    assert found[0] == expected and found[1] in ((0, 3) if known else (3,))
    assert len(capsys.readouterr().out.splitlines()) == 1 or found[1] == 0


def test_a_disk_that_is_full(model, kept, capsys):
    """A quota on the home folder: what still fits is kept, the rest is computed each time."""
    resource = pytest.importorskip("resource")
    pairs = random_pairs(40)
    expected = fresh(model, pairs)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        found = scores(model, pairs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == (expected, 40)
    assert len(capsys.readouterr().out.splitlines()) == 1
    again, computed = scores(model, pairs)
    assert again == expected and 20 < computed < 40


# ------------------------------------------------------------------------------------------------- several processes


def test_another_run_appends_in_the_middle_of_ours(model, kept):
    """Its records and ours are all there, whoever opened the file first."""
    pairs, others = random_pairs(8), random_pairs(6, seed=9)
    expected, theirs = fresh(model, pairs), fresh(model, others)
    original, done = dpo_trainer.own_part, []

    def own_part(batch):
        done.append(batch)
        if len(done) == 3:  # of four batches of ours; the others' come in between
            assert len(records(kept)) == 4  # what is computed is in the file, not in a buffer
            assert scores(model, others) == (theirs, 6)
        return original(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_trainer, "own_part", own_part)
        assert scores(model, pairs)[0] == expected
    assert len(done) == 7 and len(records(kept)) == len(dict(records(kept))) == 14
    assert scores(model, pairs + others) == (expected + theirs, 0)


def rows_about(name, count):
    """Return rows that no other name has."""
    return [{**row, "prompt": f"{name}: how far is it?"} for row in make_rows(count)]


@pytest.fixture(scope="module")
def processes(tiny, tmp_path_factory):
    """Two runs at once that keep their scores in one file, and a third that is killed in its reference pass."""
    folder, started = tmp_path_factory.mktemp("processes"), {}
    counts = {"a": 300, "b": 300, "killed": 1500}
    try:
        for name, count in counts.items():
            write_rows(folder / f"{name}.jsonl", rows_about(name, count))
            words = [ROOT / "dpo_trainer.py", "--model", tiny, "--data", folder / f"{name}.jsonl", "--iters", 1]
            words += ["--adapter-path", folder / f"out-{name}", "--batch-size", 1, "--val-batches", 1]
            env = os.environ | {"XDG_CACHE_HOME": str(folder / ("killed" if name == "killed" else "both"))}
            with open(folder / f"{name}.txt", "w") as output:
                command = [sys.executable, *map(str, words)]
                started[name] = subprocess.Popen(command, env=env, stdout=output, stderr=output)
        deadline, kept = time.monotonic() + 120, folder / "killed" / "reference-logps"
        while time.monotonic() < deadline and started["killed"].poll() is None:
            if sum(path.read_bytes().count(b"\n") for path in kept.glob("*")) > 20:
                break
            time.sleep(0.001)
        started["killed"].kill()
        status = {name: process.wait(120) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    outputs = {name: (folder / f"{name}.txt").read_text() for name in started}
    return SimpleNamespace(folder=folder, counts=counts, status=status, outputs=outputs)


def pairs_of(tiny, path):
    """Return the pairs of a file as main encodes them."""
    args = dpo_trainer.parse_args(["--model", str(tiny), "--data", str(path)])
    return dpo_trainer.encode_pairs(load_tokenizer(tiny), dpo_trainer.load_pairs(args, path, "train"), 1024)


def test_two_runs_at_once_lose_nothing(tiny, model, processes, monkeypatch):
    assert processes.status["a"] == processes.status["b"] == 0, processes.outputs
    monkeypatch.setenv("XDG_CACHE_HOME", str(processes.folder / "both"))
    found = records(processes.folder / "both" / "reference-logps")
    assert len(found) == len(dict(found)) == processes.counts["a"] + processes.counts["b"]
    pairs = sum((pairs_of(tiny, processes.folder / f"{name}.jsonl") for name in "ab"), [])
    kept, computed = scores(model, pairs)
    assert computed == 0
    one, two = (np.frombuffer(x, np.float32) for x in (kept, fresh(model, pairs)))  # compiled there, not here
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_a_killed_run_keeps_what_it_computed(tiny, model, processes, monkeypatch):
    assert processes.status["killed"] == -signal.SIGKILL, processes.outputs
    kept = len(records(processes.folder / "killed" / "reference-logps"))
    assert 20 < kept < processes.counts["killed"], "it was not killed in the middle"
    monkeypatch.setenv("XDG_CACHE_HOME", str(processes.folder / "killed"))
    pairs = pairs_of(tiny, processes.folder / "killed.jsonl")
    found, computed = scores(model, pairs, "--batch-size", "32")
    assert computed == processes.counts["killed"] - kept
    one, two = (np.frombuffer(x, np.float32) for x in (found, fresh(model, pairs[:200])))
    np.testing.assert_allclose(one[:400], two, rtol=1e-5)
    assert scores(model, pairs) == (found, 0)
