"""Hostile input: thousands of damaged lines, exports, chat templates and models end in one line or in a right pair."""

import ast
import json
import math
import os
import pickle
import pty
import random
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from contextlib import closing

import numpy as np
import pytest
from conftest import CHATML, ROOT, few, make_rows, save_tokenizer, write_rows
from mlx_lm.utils import load_tokenizer
from test_build_pairs import run, save
from test_sources import MORE, SOURCES, TOPICS, Chat, Store, gpt, make

import dpo_trainer
import simpo_trainer

SECONDS = 5  # of computing, for any one input
MEGA = 10**7  # letters of a 10 MB text


def say(role, content):
    return {"role": role, "content": content}


class Quick:
    """A block of code that must be through in so many seconds of this process' own time: others may be busy, too."""

    def __init__(self, what, seconds=SECONDS):
        self.what, self.seconds = what, seconds

    def __enter__(self):
        self.start = time.process_time()

    def __exit__(self, *raised):
        took = time.process_time() - self.start
        assert raised[0] or took < self.seconds, f"{self.what}: {took:.1f} s"


# ------------------------------------------------------------------------------------------------------------- mutants

ODD = [  # what a value may become; what JSON has no letters for is written as Python's json does
    None, True, False, 0, -1, 0.5, 1e308, math.nan, math.inf, -math.inf, 10**400, 2**63, "", " ", "\n\t", "x", "1",
    "\x00", "\x1b[2J\x1b[31mred", "\x07\r\x08", "\u202e", "\u2028", "\ud83d", "\udc00tail", "\ufeff", "\ue200", "NaN",
    [], {}, [None], [[]], [{}], [[[]]], {"": ""}, {"role": "user"}, say("robot", "x"), say("user", None), ["a", 1],
    say(["user"], "x"), say("assistant", [{"type": "text", "text": "x"}]), {"content": "x"}, [say("system", "x")],
    "<|im_start|>", "<|im_end|>", "</s>", "\n\nHuman: x\n\nAssistant:", "\n\nHuman: x\n\nAssistant: y", "<think>",
    "{{ 1 / 0 }}", "9" * 5000, "2999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
]  # fmt: skip
DEEP = ["[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 700 + "]" * 700]
RAW = [*DEEP, "9" * 5000, "1e999", "-1e999", "NaN", "[1,", '{"role":', "'x'", "tru", '"\\ud800"', '"\\x"', '"\t"', "01"]
ROLES = ("robot", "User", "", "system", "developer", "tool", "assistant", "user", 5, None)


def places(value, above=()):
    """Yield (holder, key) of each value inside of nested dicts and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(inside):
        yield value, key
        yield from places(inner)


def mutant(row, rng):
    """Return a row as a line of JSON, or of what is nearly JSON, after one to three changes."""
    row, raw = json.loads(json.dumps(row)), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = list(places(row))
        if not spots:
            break
        holder, key = rng.choice(spots)
        kind = rng.randrange(9)
        if kind < 3:
            holder[key] = json.loads(json.dumps(rng.choice(ODD)))
        elif kind == 3 and isinstance(holder, dict):
            holder[rng.choice(["role", "content", "weight", "system", "tools", "prompt", "x"])] = holder.pop(key)
        elif kind == 3 or kind == 4:
            del holder[key]
        elif kind == 5:
            other, its = rng.choice(spots)
            holder[key] = json.loads(json.dumps(other[its])) if its in other or isinstance(its, int) else None
        elif kind == 6 and isinstance(holder, dict) and "role" in holder:
            holder["role"] = rng.choice(ROLES)
        elif kind == 7 and isinstance(holder[key], str):
            at = rng.randrange(len(holder[key]) + 1)
            text = rng.choice([odd for odd in ODD if isinstance(odd, str)])
            holder[key] = holder[key][:at] + text + holder[key][at:]
        else:
            holder[key], raw = f"@{len(raw)}@", [*raw, rng.choice(RAW)]
    line = json.dumps(row, ensure_ascii=rng.random() < 0.7)
    for number, text in enumerate(raw):
        line = line.replace(f'"@{number}@"', text)
    line = line.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:  # the bytes themselves
        at, count = rng.randrange(len(line)), rng.randrange(1, 9)
        noise = rng.randbytes(count)
        line = rng.choice([line[:at], line[:at] + noise + line[at:], line[at:], line[:at] + line[at + 1 :]])
    return line.replace(b"\n", b" ").replace(b"\r", b" ")


# --------------------------------------------------------------------------------------------------------------- pairs

Q, A, B = say("user", "How far?"), say("assistant", "Ten minutes, é 👍."), say("assistant", "Who knows.")
EARLIER = [say("system", "Be brief."), say("user", "Hello"), say("assistant", "Good day.")]
CALL = say("assistant", "I look.") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
HUMAN = "\n\nHuman: Hello\n\nAssistant: Good day.\n\nHuman: How far?\n\nAssistant:"
TEXTS = {"chosen": A["content"], "rejected": B["content"]}
FORMS = [
    {"prompt": Q["content"], **TEXTS},
    {"prompt": [*EARLIER, Q], **TEXTS, "weight": 0.5},
    {"prompt": [*EARLIER, Q], "chosen": [A], "rejected": [B]},
    {"messages": [*EARLIER, Q], **TEXTS},
    {"messages": [*EARLIER, Q, A], "rejected": B["content"]},
    {"messages": [Q, A], "rejected": [Q, B]},
    {"chosen": [*EARLIER, Q, A], "rejected": [*EARLIER, Q, B]},
    {"prompt": Q["content"], "chosen": [Q, A], "rejected": [Q, B], "system": "Be brief."},
    {"prompt": [Q, CALL, say("tool", "10")], "chosen": [A], "rejected": [B], "tools": [{"type": "function"}]},
    {"chosen": HUMAN + " Ten minutes.", "rejected": HUMAN + " Who knows."},
    {"prompt": Q["content"], **TEXTS, "source": "log", "id": 7, "score": [1, {"a": None}]},
]


def spoken(value, role):
    """The oracle's reading of a column: [(role, text)], None where it is no text and no messages."""
    if isinstance(value, str) and value.startswith(("\n\nHuman:", "\n\nAssistant:")):
        parts = re.split("\n\n(Human:|Assistant:)", value)[1:]
        return [({"H": "user", "A": "assistant"}[who[0]], text.strip()) for who, text in zip(parts[::2], parts[1::2])]
    if isinstance(value, str):
        return [(role, value)]
    return [(turn["role"], turn.get("content") or "") for turn in value] if isinstance(value, list) else None


def check_pair(row, pair):
    """Fail if an accepted pair is not what its row says, by read_pair's docstring alone."""
    told = [(m["role"], m.get("content") or "") for m in pair["prompt"]]
    answers = [(pair[side]["role"], pair[side].get("content") or "") for side in ("chosen", "rejected")]
    known = {"system", "developer", "user", "assistant", "tool"}
    assert {role for role, _ in told} <= known and told[-1][0] in ("user", "tool")
    assert [role for role, _ in answers] == ["assistant"] * 2 and pair["chosen"] != pair["rejected"]
    assert type(pair["weight"]) is float and 0 <= pair["weight"] < math.inf
    assert pair["weight"] == (1 if row.get("weight") is None else row["weight"])
    prompt = spoken(row["prompt"] if row.get("prompt") is not None else row.get("messages"), "user") or []
    chosen = spoken(row.get("chosen"), "assistant")
    if chosen is None:
        prompt, chosen = prompt[:-1], prompt[-1:]
    rejected = spoken(row["rejected"], "assistant")
    assert answers == [chosen[-1], rejected[-1]]
    whole = [side if prompt and side[: len(prompt)] == prompt else prompt + side for side in (chosen, rejected)]
    system = row.get("system") and whole[0][0][0] != "system"
    expected = ([("system", row["system"])] if system else []) + whole[0][:-1]
    assert told == expected and whole[0][:-1] == whole[1][:-1]
    assert all(text.encode() is not None for _, text in told + answers)


def check_ids(tokenizer, pair, ids, limit):
    """Fail if the ids spell another text than the pair's turns, oldest ones gone where they are too many."""
    turns = [f"<|im_start|>{m['role']}\n{m.get('content') or ''}<|im_end|>\n" for m in pair["prompt"]]
    text = tokenizer.decode(ids["prompt"])
    first = turns[0] if pair["prompt"][0]["role"] in ("system", "developer") else ""
    assert text.endswith("<|im_start|>assistant\n") and text.startswith(first)
    rest = text.removesuffix("<|im_start|>assistant\n").removeprefix(first)
    ends = ["".join(turns[i:]) for i in range(bool(first), len(turns) + 1)] + ["".join(turns)]
    assert rest in ends and turns[-1] in text
    for side in ("chosen", "rejected"):
        assert tokenizer.decode(ids[side]) == f"{pair[side].get('content') or ''}<|im_end|>\n"
    assert len(ids["prompt"]) + max(len(ids[side]) for side in ("chosen", "rejected")) <= limit


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function that gives the tokenizer of a template."""

    def get(template=CHATML):
        save_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"), template)
        return load_tokenizer(folder)

    return get


def read(path, tokenizer, limit=256):
    """Return (pairs, ids) of a file, as a trainer reads it, or its last word."""
    args = dpo_trainer.parse_args(["--model", "m", "--data", str(path)])
    try:
        pairs = sum(dpo_trainer.load_splits(args).values(), [])
        return pairs, dpo_trainer.encode_pairs(tokenizer, pairs, limit)
    except SystemExit as stop:
        return stop.code


def check_refusal(message, place):
    """One line: where, what, what to do; nothing that a terminal obeys."""
    assert isinstance(message, str) and re.match(rf"{re.escape(str(place))}: .+: .+", message), message
    assert len(message) < 1000 and not re.search(r"[\x00-\x1f\x7f]", message), repr(message)


def strict(line):
    """Return a line's JSON value, by another way than read_rows; raise ValueError where it is none."""
    return json.JSONDecoder().decode(str(line, "utf-8").removeprefix("\ufeff").strip(" \t\r\n"))


@pytest.mark.parametrize("seed", range(4))
def test_mutated_lines(load, tmp_path, seed):
    """Five hundred lines a seed, each alone behind two good ones: its place is named, or its pair is the row's."""
    tokenizer, rng, path, good = load(), random.Random(seed), tmp_path / "pairs.jsonl", json.dumps(FORMS[0]).encode()
    taken = 0
    for number in range(500):
        line = mutant(FORMS[number % len(FORMS)], rng)
        path.write_bytes(good + b"\n\n" + line)
        with Quick(line[:200]):
            found = read(path, tokenizer)
        if isinstance(found, str):
            check_refusal(found, f"{path}:3")
            continue
        try:
            row = strict(line)
        except ValueError:
            assert not line.strip(), f"damaged, but taken: {line[:300]}"
            continue
        pairs, ids = found
        check_pair(row, pairs[1])
        for pair in ids[1:]:
            check_ids(tokenizer, pairs[1], pair, 256)
        taken += 1
    assert 25 < taken < 475  # the mutants are neither all the same nor harmless


BIG = {  # name: how the text of 10 MB is made
    "words": "word " * (MEGA // 5), "one word": "x" * MEGA, "lines": "\n" * MEGA, "letters": "é" * (MEGA // 2),
    "marks": "<|im_end|>" * (MEGA // 10), "turns": "\n\nHuman: a\n\nAssistant: b" * (MEGA // 24),
}  # fmt: skip


@pytest.mark.parametrize("name", few(BIG, 3))
def test_texts_of_10_mb(load, tmp_path, name, capsys):
    tokenizer, path = load(), tmp_path / "pairs.jsonl"
    for column in ("prompt", "chosen", "rejected"):
        write_rows(path, [FORMS[0], FORMS[0] | {column: BIG[name]}])
        with Quick(column):
            found = read(path, tokenizer)
        if isinstance(found, str):
            check_refusal(found, f"{path}:2")
        else:
            assert len(found[1]) == 1 and "1 skipped as too long" in capsys.readouterr().out


@pytest.mark.parametrize("limit, kept", [(100, True), (10_000, True), (10, False)])
def test_five_thousand_turns(load, tmp_path, limit, kept):
    """Each shorter conversation was tried in turn: minutes for one line."""
    tokenizer, path = load(), tmp_path / "pairs.jsonl"
    turns = EARLIER[:1] + [say(("user", "assistant")[i % 2], f"turn {i} of many") for i in range(4999)]
    write_rows(path, [{"prompt": turns, **TEXTS}, FORMS[0]])
    with Quick(limit):
        found = read(path, tokenizer, limit)
    if kept:
        pairs, ids = found
        check_ids(tokenizer, pairs[0], ids[0], limit)
        later = tokenizer.decode(ids[0]["prompt"]).count("<|im_start|>user")
        assert later >= limit / 100  # no more turns are gone than must be
    else:
        check_refusal(found, f"{path}:1")


# ----------------------------------------------------------------------------------------------------------- templates

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {  # what it does: its text, what is said
    "raises": ("{{ raise_exception('no such turn') }}", "no such turn"),
    "raises a screenful": ("{{ raise_exception('x\n' * 100000) }}", "x x x"),
    "reads what is not there": ("{{ messages.nope.nope }}", "has no attribute"),
    "divides by zero": ("{{ 1 // 0 }}", "zero"),
    "is no template": ("{% for %}", ""),
    "is cut": ("{% for m in messages %}", ""),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "loops in its answer": ("{% if not add_generation_prompt %}" + LOOP + "{% endif %}" + CHATML, "more than 2 s"),
    "takes a large range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "includes a file": ("{% include '/etc/passwd' %}", "no loader"),
    "imports a file": ("{% import '/etc/passwd' as x %}{{ x }}", "no loader"),
    "extends a file": ("{% extends '../../etc/passwd' %}", "no loader"),
    "climbs to object": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "climbs by attr": ("{{ (''|attr('__class__')).mro() }}", "unsafe|undefined"),
    "climbs by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "reaches globals": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
    "reaches the exception's": ("{{ raise_exception.__globals__.x }}", "unsafe|undefined"),
    "changes the messages": ("{{ messages.append(1) }}", "unsafe"),
    "changes a message": ("{{ messages[0].update({'content': 'changed'}) }}", "unsafe"),
    "opens": ("{{ open('/etc/passwd').read() }}", "'open' is undefined"),
    "writes nothing": ("", "no token"),
    "writes no answer": ("{{ messages[0].content }}", "equal answers"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template(load, tmp_path, name):
    text, said = TEMPLATES[name]
    path = write_rows(tmp_path / "pairs.jsonl", FORMS[:1] * 2)
    with Quick(name):
        found = read(path, load(text))
    check_refusal(found, f"{path}:1")
    assert re.search(said, found), found


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_tool_call_is_not_lost(load, tmp_path, template):
    """A template that knows none wrote an empty answer, which was trained."""
    path = write_rows(tmp_path / "pairs.jsonl", [FORMS[0] | {"chosen": [CALL | {"content": None}]}])
    check_refusal(found := read(path, load(template)), f"{path}:1")
    assert "no tool calls" in found
    knows = CHATML.replace("{{ m.content }}", "{{ m.content or (m.tool_calls or []) | tojson }}")
    assert '"name": "f"' in load(knows).decode(read(path, load(knows))[1][0]["chosen"])


def test_the_time_limit_ends_with_the_template(load, tmp_path):
    """What comes after is not interrupted, and an earlier handler is back."""
    before = signal.getsignal(signal.SIGVTALRM)
    assert read(write_rows(tmp_path / "pairs.jsonl", FORMS[:1]), load())[1]
    assert read(write_rows(tmp_path / "pairs.jsonl", FORMS[:1]), load(LOOP)).count("more than 2 s")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and signal.getsignal(signal.SIGVTALRM) == before


# ------------------------------------------------------------------------------------------------------------- exports

GONE = re.compile(  # what a person did not see of a text
    "<details type=.*?</details>|<think>.*?</think>|<system-reminder>.*?</system-reminder>"
    "|\ue200.*?\ue201|【[^】]*†[^】]*】|[\ue000-\uf8ff\u200b\u2060\ufeff]", re.S,
)  # fmt: skip


def texts_of(value):
    """Return every text in nested dicts and lists, as letters that UTF-8 has."""
    found, rest = [], [value]
    while rest:
        value = rest.pop()
        rest += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found += [value.encode("utf-8", "replace").decode()] if isinstance(value, str) else []
    return found


def check_built(done, values):
    """Fail unless each line of each answer stands in the values that were read, and the trainers take the rows."""
    there = "\n".join(texts_of(values))
    there += "\n" + GONE.sub("", there)
    args = dpo_trainer.parse_args(["--model", "m", "--data", "d.jsonl"])
    for row in done.rows:
        pair = dpo_trainer.read_pair(row, args)
        assert pair["weight"] > 0
        for side in ("chosen", "rejected"):
            lines = pair[side]["content"].splitlines()
            assert all(line.strip() in there for line in lines), (side, lines)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The records of every source's sample: [(source, file, records, whether they are lines)]."""
    found = []
    for test in SOURCES:
        make(test, folder := tmp_path_factory.mktemp("source"))
        for path in sorted(folder.rglob("*.json*")):
            lines = path.suffix == ".jsonl"
            text = path.read_text()
            values = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
            found += [(test, path.name, values if isinstance(values, list) else [values], lines)] if values else []
    return found


def written_export(path, values, line, at, lines):
    """Write records with another line in the place of one; return those that are JSON."""
    texts = [json.dumps(value).encode() for value in values]
    texts[at] = line
    path.write_bytes(b"\n".join(texts) if lines else b"[" + b",\n".join(texts) + b"]")
    try:
        return values[:at] + [json.loads(line.decode("utf-8", "replace"))] + values[at + 1 :]
    except (ValueError, RecursionError):
        return values


@pytest.mark.parametrize("seed", few(range(4), 1))
def test_mutated_exports(exports, tmp_path, seed):
    """Five hundred a seed, of every source: one record of up to eight is a mutant."""
    rng, made = random.Random(seed), 0
    for number in range(500):
        test, name, values, lines = exports[number % len(exports)]
        start = rng.randrange(max(1, len(values) - 7))
        values = values[start : start + 8]
        at = rng.randrange(len(values))
        line = mutant(values[at], rng) if isinstance(values[at], (dict, list)) else b"{"
        known = written_export(tmp_path / name, values, line, at, lines)
        words = ["--corrections"] * (number % 2) + ["--no-redact"] * (number % 3 > 0)
        try:
            with Quick(name):
                done = run(tmp_path / name, tmp_path / "out", *words)
            assert done.code == 0 or len(done.err.strip().splitlines()) == 1, done.err
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff]", done.out), done.out
            if "--no-redact" in words:
                check_built(done, known)
        except (Exception, AssertionError) as error:
            raise AssertionError(f"{test}, {name}, seed {seed}, number {number}: {line[:2000]}") from error
        made += len(done.rows)
        (tmp_path / name).unlink()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert made > 100


T = TOPICS[0]
UNITS = ["word ", "x", "\n", "<think>", "<details type=", "\ue200", "【", "【†", "data:a/", "1 ", "a@", "key="]
UNITS += ["```", "\\", "I'm sorry. ", "-----BEGIN PRIVATE KEY-----", "/home/", "\n\nHuman:", "\u200b", "AB12 "]


@pytest.mark.parametrize("unit", few(UNITS, 4))
def test_long_messages(tmp_path, unit):
    """A few marks that were never closed took minutes; a text of 10 MB is in no pair, and is counted."""
    chat = Chat("long")
    user = chat.add(None, "user", T.question)
    long = T.a + unit * (MEGA // 50 // len(unit))
    chat.line(chat.add(user, "assistant", long), "No, that is wrong. " + T.question, f"I'm sorry. {long}", MORE)
    chat.add(user, "assistant", T.b)
    rows = [{"prompt": T.question, "chosen": T.b, "rejected": T.c}]
    rows += [{"prompt": T.question, **sides} for sides in ({"chosen": long, "rejected": T.a},)]
    save(tmp_path / "in" / "rows.jsonl", rows)
    save(tmp_path / "in" / "conversations.json", [gpt(chat)])
    with Quick(unit):
        done = run(tmp_path / "in", tmp_path / "out", "--corrections")
    assert T.c in {row["rejected"][0]["content"] for row in done.rows}
    column = ("prompt", "chosen", "rejected")[UNITS.index(unit) % 3]
    save(tmp_path / "in" / "rows.jsonl", [*rows[:1], rows[0] | {column: unit * (MEGA // len(unit))}])
    with Quick(column):
        done = run([tmp_path / "in" / "rows.jsonl"], tmp_path / "out")
    assert [row["rejected"][0]["content"] for row in done.rows] == [T.c]


def test_many_answers_to_one_prompt(tmp_path):
    chat = Chat("many")
    user = chat.add(None, "user", T.question)
    for number in range(3000):
        chat.add(user, "assistant", f"answer {'of another kind ' * (number % 7)}{number}")
    chat.line(chat.add(user, "assistant", T.a), MORE)
    with Quick("answers"):
        assert run(save(tmp_path / "conversations.json", [gpt(chat)]), tmp_path / "out").rows


def test_names_that_a_terminal_would_obey(tmp_path):
    """In a report, of a model, a chat, a file, and in the texts that it shows."""
    chat = Chat("\x1b[2J\ud800")
    user = chat.add(None, "user", T.question + "\x1b]0;title\x07")
    chat.add(user, "assistant", T.b)
    chat.line(chat.add(user, "assistant", T.a + "\x1b[31m", metadata={"model_slug": "m\x1b[2J\ud83d|"}), MORE)
    save(tmp_path / "in" / "conversations.json", [gpt(chat)])
    (tmp_path / "in" / "bad\x1b[2J.json.gz").write_bytes(b"\x1f\x8b\x08bad")
    with open(os.fsencode(tmp_path / "in") + b"/\xff.gz", "wb") as file:
        file.write(b"\x1f\x8b\x08bad")
    command = [sys.executable, str(ROOT / "build_dpo_pairs.py"), tmp_path / "in", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert b"2 |" in done.stdout and b"\x1b" not in done.stdout + (tmp_path / "out" / "report.md").read_bytes()
    [row] = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text("utf-8").splitlines()]
    assert row["chosen"][0]["content"] == T.a + "\x1b[31m"  # in the pair it is as it was said


def database(path):
    """Write a state.db of Hermes with an answer that was taken back and given again."""
    store = Store(path)
    for topic in TOPICS[:5]:
        store.say(store.session(topic.question[:8]), topic.question, topic.a)
    store.close()
    return path.read_bytes()


def test_damaged_databases(tmp_path):
    """Cut and overwritten at random places."""
    (tmp_path / "in").mkdir()
    whole, rng, path = database(tmp_path / "state.db"), random.Random(0), tmp_path / "in" / "state.db"
    save(tmp_path / "in" / "rows.jsonl", [{"prompt": T.question, "chosen": T.a, "rejected": T.b}])
    for number in range(150):
        at, count = rng.randrange(100 * (number % 2), len(whole)), rng.choice((1, 8, 100, 5000))
        path.write_bytes(whole[:at] + (rng.randbytes(count) + whole[at + count :] if number % 3 else b""))
        with Quick(f"{number}: {count} bytes at {at}"):
            done = run(tmp_path / "in", tmp_path / "out", "--corrections")
        assert T.b in {row["rejected"][0]["content"] for row in done.rows}
        shutil.rmtree(tmp_path / "out")


def test_a_database_that_never_ends(tmp_path):
    """A table may be a question that SQLite answers for ever."""
    with closing(sqlite3.connect(path := tmp_path / "state.db")) as base:
        base.execute("CREATE TABLE messages (session_id, role, content)")
        count = "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id FROM n"
        base.execute(f"CREATE VIEW sessions AS {count}")
        base.commit()
    command = [sys.executable, str(ROOT / "build_dpo_pairs.py"), path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "neither Hermes' sessions" in done.stdout and "Traceback" not in done.stderr


def test_an_archive_of_many_bombs(tmp_path):
    """Each member is below what one may unpack to; that is still read in seconds."""
    with zipfile.ZipFile(tmp_path / "bombs.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(12):
            archive.writestr(f"{number}.json", b"[" + b" " * 2**22 + b"]")
        archive.writestr("rows.jsonl", json.dumps({"prompt": T.question, "chosen": T.a, "rejected": T.b}))
    with Quick("bombs"):
        assert run(tmp_path / "bombs.zip", tmp_path / "out").rows


# -------------------------------------------------------------------------------------------------------------- models

MARKER = "from pathlib import Path\nPath(__file__).parent.joinpath('marker').touch()\n"
CODE = MARKER + "class Model: pass\nclass ModelArgs: pass\nclass Mine: pass\n"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def model_file(folder):
    edit(folder / "config.json", model_file="code.py")


def tokenizer_map(folder):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Mine", None]}, tokenizer_class="Mine")


def config_map(folder):
    edit(folder / "config.json", auto_map={"AutoConfig": "code.Mine"}, model_type="mine")


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "marker")))


class Bomb:
    """Leaves a marker where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


MODELS = {model_file: "trust_remote_code", tokenizer_map: "trust_remote_code", config_map: "mine not supported"}
MODELS[pickle_only] = "safetensors"


def hostile_model(tiny, folder, change):
    """Write a model with code of its own, and pairs, into a folder."""
    model = shutil.copytree(tiny, folder / "model")
    (model / "code.py").write_text(CODE)
    change(model)
    write_rows(folder / "pairs.jsonl", make_rows(6))
    return model


@pytest.mark.parametrize("change", MODELS)
@pytest.mark.parametrize("script", [dpo_trainer, simpo_trainer])
def test_a_models_code_is_not_run(tiny, tmp_path, monkeypatch, script, change):
    model, asked = hostile_model(tiny, tmp_path, change), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    monkeypatch.setattr(sys, "argv", ["script", "--model", "model", "--data", "pairs.jsonl"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert not asked and not (model / "marker").exists()
    check_refusal(stop.value.code, "model")
    assert MODELS[change] in stop.value.code, stop.value.code


@pytest.mark.parametrize("change", MODELS)
@pytest.mark.parametrize("option", ["--model", "--generate-rejected"])
def test_nor_where_pairs_are_built(tiny, tmp_path, monkeypatch, option, change):
    model, asked = hostile_model(tiny, tmp_path, change), []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    rows = [{"prompt": "Where?", "completion": TOPICS[0].a, "label": True}, {"prompt": "How far?", **TEXTS}]
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out", option, model)
    assert not asked and not (model / "marker").exists()
    if change is tokenizer_map or option == "--generate-rejected":
        assert done.code == 1 and MODELS[change] in done.err and done.err.count("\n") == 1, done.err
    else:
        assert done.code == 0  # the tokenizer, which is all that it needs, is harmless


def in_terminal(command, cwd):
    """Run a command in a terminal of its own, where a question would wait for an answer; return status and output."""
    screen, keys = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, stdin=keys, stdout=keys, stderr=keys, start_new_session=True)
    os.close(keys)
    seen, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([screen], [], [], 0.2)[0]:
            try:
                seen += os.read(screen, 2**16)
            except OSError:  # the other end is closed
                break
    process.kill() if process.poll() is None and time.monotonic() >= end else None
    os.close(screen)
    return process.wait(), seen.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("change", MODELS)
@pytest.mark.parametrize("script", ["dpo_trainer.py", "simpo_trainer.py"])
def test_nothing_is_asked_on_the_terminal(tiny, tmp_path, script, change):
    model = hostile_model(tiny, tmp_path, change)
    command = [sys.executable, str(ROOT / script), "--model", "model", "--data", "pairs.jsonl"]
    status, seen = in_terminal(command, tmp_path)
    assert not (model / "marker").exists() and "[y/N]" not in seen and "Traceback" not in seen, seen
    assert status == 1 and MODELS[change] in re.split(r"[\r\n]+", seen.strip())[-1], seen


ADAPTERS = {  # what lies in the folder in the place of safetensors
    "npz": lambda folder: np.savez(folder / "adapters.npz", a=np.zeros(2)),
    "pickle": lambda folder: (folder / "adapters.safetensors").write_bytes(pickle.dumps(Bomb(folder / "marker"))),
    "npy": lambda folder: np.save(open(folder / "adapters.safetensors", "wb"), np.array([{}]), allow_pickle=True),
    "huge header": lambda folder: (folder / "adapters.safetensors").write_bytes(b"\xff" * 7 + b"\x00" + b"{}"),
    "empty": lambda folder: (folder / "adapters.safetensors").touch(),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_safetensors_are_adapters(tiny, tmp_path, monkeypatch, name):
    (folder := tmp_path / "adapters").mkdir()
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ADAPTERS[name](folder)
    write_rows(tmp_path / "pairs.jsonl", make_rows(6))
    monkeypatch.chdir(tmp_path)
    words = ["--data", "pairs.jsonl", "--no-reference-cache", "--resume-adapter-file", "adapters/adapters.safetensors"]
    monkeypatch.setattr(sys, "argv", ["dpo_trainer.py", "--model", str(tiny), *words])
    with pytest.raises(SystemExit) as stop:
        dpo_trainer.main()
    assert not (folder / "marker").exists()
    assert re.match(r"adapters[^:]*: .+: .+", stop.value.code) and "\n" not in stop.value.code, stop.value.code


def test_nothing_unpickles():
    """Nor trusts a model's code, evaluates a text or opens a shell."""
    never = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "torch"}
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & never, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call):
                called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in ("np.load", "torch.load", "eval", "exec", "yaml.load", "os.system"), node.lineno
                assert "allow_pickle" not in words and words.get("trust_remote_code", "False") == "False", node.lineno
                assert words.get("shell", "False") == "False", f"{path.name}:{node.lineno}"
