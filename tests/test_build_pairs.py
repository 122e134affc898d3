"""What all sources of build_dpo_pairs.py share: checks, redaction, splits, corrections, generated answers, bad input.

The readers have a file of their own, test_sources.py; its samples are used here. The script runs inside this process
wherever that is enough, so that thousands of damaged exports take seconds.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import sqlite3
import struct
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from conftest import ROOT
from test_sources import BYE, CODE_OTHER, MORE, START, TOPICS, Chat, Log, Rollout, Store
from test_sources import claude, gpt, gpt_vote, key_of, messages, studio_answer, studio_user, webui

import build_dpo_pairs as build
import dpo_trainer

# ------------------------------------------------------------------------------------------------------------ running

Done = namedtuple("Done", "code out err rows unpaired report folder")
NAMES = ("train", "valid", "test")


def run(sources, folder, *words):
    """Run the script in this process; return its exit status, what it printed and what it wrote."""
    sources = sources if isinstance(sources, (list, tuple)) else [sources]
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["build_dpo_pairs.py", *map(str, sources), "--out", str(folder), *map(str, words)]
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            build.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, (int, type(None))) else 1
            err.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
    return Done(code or 0, out.getvalue(), err.getvalue(), *written(Path(folder)))


def written(folder):
    """Return a folder's pairs, its unpaired rows, its report, and the folder."""
    report = folder / "report.md"
    rows = lines_of(folder, *NAMES)
    return rows, lines_of(folder, "unpaired"), report.read_text("utf-8") if report.exists() else "", folder


def lines_of(folder, *names):
    files = [folder / f"{name}.jsonl" for name in names]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text("utf-8").split("\n") if line]


def pair(index, chosen=None, rejected=None, prompt=None):
    """Return a row as preference data sets have it; what is not given is a topic's."""
    t = TOPICS[index % len(TOPICS)]
    return {"prompt": prompt or t.question, "chosen": chosen or t.a, "rejected": rejected or t.b}


def save(path, data):
    """Write records as JSONL if the name says so, anything else as JSON; return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in data) if path.suffix == ".jsonl" else json.dumps(data)
    path.write_text(text, encoding="utf-8")
    return path


def kept(name, question, good, bad, time=0):
    """Return a conversation whose second answer, good, was talked on, and whose first one was not."""
    chat = Chat(name)
    user = chat.add(None, "user", question)
    chat.add(user, "assistant", bad)
    chat.line(chat.add(user, "assistant", good), MORE, BYE)
    return chat


def picked(name, question, good, bad):
    """Return a conversation in which the person took good out of two answers shown side by side."""
    chat = Chat(name)
    user = chat.add(None, "user", question)
    heads = [chat.add(user, "assistant", text) for text in (bad, good)]
    info = dict(type="num_variants_in_stream", num_variants_in_stream=2, conversation_id=name)
    chat.nodes[0]["extra"]["metadata"] = dict(paragen_variants_info=info, paragen_variant_choice=heads[1])
    return chat


def section(report, title):
    """Return the text of a section of the report."""
    parts = re.split(r"^## ", report, flags=re.M)
    return next((part for part in parts if part.lower().startswith(title.lower())), "")


def left_out(done):
    """Return {reason: count} of the report."""
    found = re.findall(r"^\| (.+?) \| (\d+) \|$", section(done.report, "left out"), flags=re.M)
    return {reason: int(count) for reason, count in found}


REASONS = {  # check: how the report may name it
    "equal": "^equal|same answer|identical",
    "near": "near",
    "contradiction": "contradict",
    "duplicate": "already|duplicate|twice",
    "ratio": "length|times as long",
    "refusal": "refus",
    "script": "script|language",
    "artefact": "artefact|thought|citation",
    "long": "too long",
    "many": "more than .* conversation|of a conversation|of one conversation",
}


def dropped(done, check):
    """Return how many pairs were left out for a check's reason."""
    return sum(count for reason, count in left_out(done).items() if re.search(REASONS[check], reason, re.I))


# ------------------------------------------------------------------------------------------------------------- checks

LONG, OTHER = (" ".join(f"{word}{i}" for i in range(60)) for word in ("word", "other"))
BAD_PAIRS = [  # check, the fields of a row that fails it
    ("equal", dict(chosen="The  north pier,\nbeside it.", rejected="the north PIER, beside it.")),
    ("near", dict(chosen=LONG + " end", rejected=LONG + " stop")),
    ("ratio", dict(chosen="At the quay.", rejected=LONG)),
    ("ratio", dict(chosen=LONG, rejected="At the quay.")),
    ("refusal", dict(chosen="I'm sorry, but I can't help with that kind of request.")),
    ("refusal", dict(chosen="I cannot say anything about the piers of that island.")),
    ("refusal", dict(chosen="I can’t tell you which pier the island ferry leaves from.")),
    ("refusal", dict(chosen="As an AI language model, I have no idea about ferries.")),
    ("script", dict(chosen="Паром на остров отходит от северного причала у маяка.")),
    ("script", dict(chosen="渡し船は灯台のそばにある北の桟橋から毎日二回出発しますので、早めに来てください。")),
    ("artefact", dict(chosen="<think>Which pier was it?</think>The north one, beside the lighthouse.")),
    ("artefact", dict(rejected="<think>Which pier was it?</think>The north one, beside the old fish market.")),
    ("artefact", dict(chosen="<details><summary>Thought</summary>hm</details>The north pier, of course.")),
    ("artefact", dict(chosen="The north pier, beside the lighthouse.\ue200cite\ue202turn0search3\ue201")),
    ("artefact", dict(rejected="Boats for that crossing depart at the market.【12†source】")),
]


@pytest.mark.parametrize("check, fields", BAD_PAIRS)
def test_check_drops_and_counts(check, fields, tmp_path):
    """Guards each data check: the pair goes, the report says why, the pair beside it stays."""
    done = run(save(tmp_path / "in.jsonl", [pair(0, **fields), pair(1)]), tmp_path / "out")
    assert [row["chosen"][0]["content"] for row in done.rows] == [TOPICS[1].a], left_out(done)
    assert dropped(done, check) == 1 and sum(left_out(done).values()) == 1, left_out(done)


GOOD_PAIRS = [  # what looks as if it failed a check
    dict(rejected="I'm sorry, but I can't help with that kind of request."),  # a refusal may be the worse answer
    dict(chosen="Sorry to hear that you missed it! The north pier.", rejected="The south pier, or so they say."),
    dict(prompt="Как сказать по-русски, что паром отходит утром?", chosen=TOPICS[0].a),  # both in another script
    dict(prompt="Wie heißt die Mole, von der die Fähre fährt?", chosen="Die Fähre fährt täglich von der Nordmole ab."),
    dict(chosen="Ja."),
    dict(chosen=LONG, rejected=" ".join(f"word{i}" for i in range(0, 80, 2))),
]


@pytest.mark.parametrize("fields", GOOD_PAIRS)
def test_check_lets_pass(fields, tmp_path):
    """Guards against checks that are too eager."""
    fields = {"rejected": "Hm, no."} | fields if fields.get("chosen") == "Ja." else fields
    done = run(save(tmp_path / "in.jsonl", [pair(0, **fields)]), tmp_path / "out")
    assert len(done.rows) == 1, done.out + done.err


def test_same_pair_once(tmp_path):
    """Guards duplicates across conversations: one pair, the others counted."""
    t = TOPICS[0]
    chats = [gpt(kept(f"chat{i}", t.question, t.a, t.b)) for i in range(3)]
    done = run(save(tmp_path / "conversations.json", chats), tmp_path / "out")
    assert len(done.rows) == 1 and dropped(done, "duplicate") == 2, left_out(done)


def test_data_set_keeps_every_pair_of_a_prompt(tmp_path):
    """Guards rows of one prompt: each is a pair of its own, not a newer snapshot of the one before."""
    t = TOPICS[0]
    rows = [pair(0, t.a, t.b), pair(0, t.a, t.c), pair(0, t.b, t.c), pair(0, t.a, t.b)]
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out")
    assert {key_of(row)[1:] for row in done.rows} == {(t.a, t.b), (t.a, t.c), (t.b, t.c)}, left_out(done)
    assert dropped(done, "duplicate") == 1, left_out(done)


def test_contradiction_in_a_data_set(tmp_path):
    """Guards two raters who disagree: neither row stays, both are counted."""
    t = TOPICS[0]
    done = run(save(tmp_path / "in.jsonl", [pair(0, t.a, t.b), pair(0, t.b, t.a), pair(1)]), tmp_path / "out")
    assert {key_of(row)[1:] for row in done.rows} == {(TOPICS[1].a, TOPICS[1].b)}
    assert dropped(done, "contradiction") == 2, left_out(done)


def test_contradiction_of_equal_strength(tmp_path):
    """Guards a person who kept one answer in one chat and the other in another: no pair, both counted."""
    t = TOPICS[0]
    chats = [kept("one", t.question, t.a, t.b), kept("two", t.question, t.b, t.a), kept("else", *TOPICS[1][:3])]
    done = run(save(tmp_path / "conversations.json", [gpt(chat) for chat in chats]), tmp_path / "out")
    assert len(done.rows) == 1 and dropped(done, "contradiction") == 2, left_out(done)


@pytest.mark.parametrize("order", [1, -1])
def test_contradiction_of_different_strength(order, tmp_path):
    """Guards that of two contradicting signals the stronger one stays, whichever is read first."""
    t = TOPICS[0]
    chats = [picked("picked", t.question, t.a, t.b), kept("kept", t.question, t.b, t.a)]
    done = run(save(tmp_path / "conversations.json", [gpt(chat) for chat in chats[::order]]), tmp_path / "out")
    assert [key_of(row)[1:] for row in done.rows] == [(t.a, t.b)] and done.rows[0]["signal"] == "comparison"
    assert dropped(done, "contradiction") == 1, left_out(done)


def test_contradiction_in_a_circle(tmp_path):
    """Guards A better than B, B better than C, C better than A: nobody can learn all three."""
    t = TOPICS[0]
    done = run(
        save(tmp_path / "in.jsonl", [pair(0, t.a, t.b), pair(0, t.b, t.c), pair(0, t.c, t.a), pair(1)]),
        tmp_path / "out",
    )
    assert len(done.rows) < 4 and dropped(done, "contradiction") >= 1, left_out(done)


def test_vote_stays_when_its_pair_goes(tmp_path):
    """Guards silent losses: a rated answer whose only pair was left out is still a rated answer."""
    chat = kept("rated", TOPICS[0].question, "Yes, that one.", "yes, that ONE.")
    votes = [gpt_vote(1, chat.nodes[2]["id"], chat, later=True)]
    save(tmp_path / "in" / "message_feedback.json", votes)
    save(tmp_path / "in" / "conversations.json", [gpt(chat), gpt(kept("other", *TOPICS[1][:3]))])
    done = run(tmp_path / "in", tmp_path / "out")
    assert dropped(done, "equal") == 1 and [row["label"] for row in done.unpaired] == [True]


def many(name, count):
    """Return a conversation of that many questions, each answered twice."""
    chat, leaf = Chat(name), None
    for i, t in enumerate(itertools.islice(itertools.cycle(TOPICS), count)):
        user = chat.add(leaf, "user", f"{t.question} ({name} {i})")
        chat.add(user, "assistant", t.b)
        leaf = chat.add(user, "assistant", t.a)
    chat.line(leaf, MORE, BYE)
    return chat


def test_at_most_so_many_of_a_conversation(tmp_path):
    """Guards against one long chat outweighing the others; the strongest signal of it stays."""
    long, other = many("long", 14), many("other", 2)
    votes = [gpt_vote(-1, long.nodes[-4]["id"], long, later=True)]  # the last question's worse answer
    save(tmp_path / "in" / "message_feedback.json", votes)
    save(tmp_path / "in" / "conversations.json", [gpt(long), gpt(other)])
    done = run(tmp_path / "in", tmp_path / "out")
    counts = [sum(row["conversation_id"] == name for row in done.rows) for name in ("long", "other")]
    assert counts == [10, 2] and dropped(done, "many") == 4, left_out(done)
    assert "rating" in {row["signal"] for row in done.rows}
    done = run(tmp_path / "in", tmp_path / "few", "--max-per-chat", 3)
    assert len(done.rows) == 5 and dropped(done, "many") == 11


def test_too_long_for_the_model(tmp_path, tiny):
    """Guards --model: prompt and longer answer are counted in its tokens, and without --model nothing is."""
    rows = [pair(0, rejected="far " * 300, chosen="near " * 300), pair(1), pair(2, prompt="why " * 400)]
    path = save(tmp_path / "in.jsonl", rows)
    done = run(path, tmp_path / "out", "--model", tiny, "--max-seq-length", 300)
    assert [row["chosen"][0]["content"] for row in done.rows] == [TOPICS[1].a] and dropped(done, "long") == 2
    assert len(run(path, tmp_path / "all").rows) == 3


def test_model_that_does_not_exist(tmp_path):
    """Guards the message for a wrong --model: one line, nothing written."""
    done = run(save(tmp_path / "in.jsonl", [pair(0)]), tmp_path / "out", "--model", tmp_path / "none")
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1 and not done.folder.exists()


# ------------------------------------------------------------------------------------------------------------- report


def report_sample(folder):
    """Write ratings, branches, and a data set into a folder."""
    chats = [kept(f"kept{i}", *TOPICS[i][:3]) for i in range(4)]
    rated = [kept(f"rated{i}", *TOPICS[10 + i][:3]) for i in range(2)]
    votes = [gpt_vote(1, chat.nodes[2]["id"], chat, later=True) for chat in rated]
    late = gpt(chats[3])
    late["mapping"]["kept3-02"]["message"]["create_time"] = START + 86400.0 * 40
    save(folder / "conversations.json", [gpt(chat) for chat in chats[:3] + rated] + [late])
    save(folder / "message_feedback.json", votes)
    save(folder / "rows.jsonl", [pair(20 + i) for i in range(3)])
    return folder


def test_report(tmp_path):
    """Guards what the report must hold: counts by source and signal, dates, models, three samples; also on stdout."""
    done = run(report_sample(tmp_path / "in"), tmp_path / "out")
    for source, signal, count in (("chatgpt", "regenerate", 4), ("chatgpt", "rating", 2), ("trl", "dataset", 3)):
        assert f"| {source} | {signal} | {count} |" in done.report
    assert "2024-05-29" in done.report and "2024-07-08" in done.report, "the range of dates"
    assert re.search(r"\| gpt-4o \| 6 \|", done.report), "the models"
    samples = section(done.report, "samples")
    assert samples.count("chosen:") == samples.count("rejected:") == 3
    assert done.report.strip() in done.out


@pytest.mark.parametrize("longer, warned", [(5, False), (6, False), (7, True), (10, True)])
def test_share_of_longer_answers(longer, warned, tmp_path):
    """Guards the length warning: above 0.6 of ten pairs, not at it."""
    short, long = "Two minutes, {} at most.", "It takes quite a while, at least {} minutes."
    rows = []
    for i in range(10):
        good, bad = (long, short) if i < longer else (short, long)
        rows.append(pair(0, good.format(i), bad.format(i), f"How long does step {i} take?"))
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out")
    said = next(line for line in done.report.splitlines() if f"{longer / 10:.2f}" in line)
    assert len(done.rows) == 10 and ("arning" in said) == warned, said


def test_report_lists_what_was_dropped_when_nothing_is_left(tmp_path):
    """Guards the one line of a run without pairs: why each was dropped stands in it."""
    done = run(save(tmp_path / "in.jsonl", [pair(0, "Yes, that one.", "yes, that ONE.")] * 3), tmp_path / "out")
    assert done.code == 1 and re.search("equal", done.err) and len(done.err.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------- redaction

# Put together here, so that no whole key stands in this file.
LETTERS, HEX = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0" * 4, "0a1b2c3d4e5f6789" * 6
HEAD, BODY = "eyJ" + LETTERS[:20], "eyJ" + LETTERS[7:40]
JWT = f"{HEAD}.{BODY}.{LETTERS[3:30]}"
PEM = f"-----BEGIN {'OPENSSH'} PRIVATE KEY-----\n{LETTERS[:60]}\n{LETTERS[5:50]}\n-----END OPENSSH PRIVATE KEY-----"
PREFIXED = [
    *(
        "sk-" + rest
        for rest in ("ant-api03-" + LETTERS[:40], "proj-" + LETTERS[:40], "or-v1-" + HEX[:64], LETTERS[:48])
    ),
    *("gsk" + "_" + LETTERS[:40], "xai" + "-" + LETTERS[:60], "pplx" + "-" + LETTERS[:40], "r8" + "_" + LETTERS[:37]),
    *("hf" + "_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH", "AI" + "za" + LETTERS[:35]),
    *("gh" + kind + "_" + LETTERS[:36] for kind in "pousr"),
    *("github" + "_pat_" + LETTERS[:82], "glp" + "at-" + LETTERS[:20], "np" + "m_" + LETTERS[:36]),
    *("py" + "pi-" + LETTERS[:70], "AK" + "IA" + "QWERTYUIOPASDFGH", "AS" + "IA" + "QWERTYUIOPASDFGH"),
    *("dop" + "_v1_" + HEX[:64], "xox" + "b-1234567890-" + LETTERS[:20], "12345678" + "90:AA" + LETTERS[:33]),
    *("sk" + "_live_" + LETTERS[:24], "rk" + "_test_" + LETTERS[:24], "S" + "G." + LETTERS[:22] + "." + LETTERS[:43]),
    *("SK" + HEX[:32], "AGE-SECRET" + "-KEY-1" + "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L" * 2, JWT, PEM),
    "https://hooks.sla" + "ck.com/services/T0/B0/" + LETTERS[:24],
]
PLAIN = "k7Qz9xmNf2Lw"  # a password, which nothing but its place tells
PLACED = [  # texts that hold it
    f"postgres://alice:{PLAIN}@db.example.org/shop",
    f"redis://:{PLAIN}@localhost:6379/0",
    f"curl -H 'Authorization: Bearer {PLAIN}' https://example.org",
    f"authorization: basic {PLAIN}",
    f'headers = {{"Authorization": "Bearer {PLAIN}"}}',
    *(
        f"https://example.org/cb?x=1&{name}={PLAIN}&y=2"
        for name in ("access_token", "refresh_token", "id_token", "sig")
    ),
    *(f"https://example.org/cb?{name}={PLAIN}" for name in ("token", "api_key", "client_secret", "password", "code")),
    *(f"https://example.org/cb?{name}={PLAIN}" for name in ("signature", "X-Amz-Signature", "x-goog-signature")),
    *(
        f"{name}={PLAIN}"
        for name in ("API_KEY", "apikey", "my-api-key", "SECRET", "token", "DB_PASSWORD", "passwd", "PWD")
    ),
    *(f'"{name}": "{PLAIN}"' for name in ("api_key", "clientSecret", "authToken", "password", "credentials")),
    f"export GITHUB_TOKEN='{PLAIN}'",
    f"password: {PLAIN}, as agreed",
    f"password = {PLAIN};",
    f"The password is {PLAIN}.",
]


def told(value, tmp_path, *words):
    """Return a run on one rated pair whose prompt, better answer and lone rated answer hold a text."""
    t, u = TOPICS[0], TOPICS[1]
    chat, alone = (
        kept("rated", f"{t.question} {value}", f"{t.a} {LONG} {value}", f"{t.b} {OTHER} {value}"),
        Chat("alone"),
    )
    alone.line(None, f"{u.question} {value}", f"{u.a} {LONG} {value}")
    votes = [gpt_vote(-1, alone.leaf, alone, later=True)]
    save(tmp_path / "in" / "conversations.json", [gpt(chat), gpt(alone)])
    save(tmp_path / "in" / "message_feedback.json", votes)
    return run(tmp_path / "in", tmp_path / "out", *words)


def sides(row):
    """Return the last texts of a row: prompt, better and worse answer."""
    return [row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")]


def everything(done):
    """Return all that a run wrote and printed."""
    files = [path.read_text("utf-8") for path in done.folder.rglob("*") if path.is_file()]
    return "\n".join([*files, done.out, done.err])


@pytest.mark.parametrize("value", PREFIXED)
def test_keys_are_redacted(value, tmp_path):
    """Guards each kind of key: gone from all that is written or printed, one mark on all sides, counted."""
    done = told(value, tmp_path)
    assert len(done.rows) == len(done.unpaired) == 1
    text = everything(done)
    assert value not in text and json.dumps(value)[1:-1] not in text and value[-12:] not in text
    marks = [re.findall(r"\[[A-Z]+[_:]\w+\]", side) for side in sides(done.rows[0])]
    assert marks[0] == marks[1] == marks[2] and len(marks[0]) == 1, marks
    assert re.search(r"\| SECRET\w* \| \d+ \|", section(done.report, "redacted"))


@pytest.mark.parametrize("text", PLACED)
def test_passwords_are_redacted(text, tmp_path):
    """Guards what only its place shows to be secret."""
    done = told(text, tmp_path)
    assert PLAIN not in everything(done), sides(done.rows[0])
    assert len(set(re.findall(r"\[[A-Z]+[_:]\w+\]", " ".join(sides(done.rows[0]))))) == 1


PERSONAL = [  # text, what of it must go, what must stay
    ("Write to jane.doe+news@mail.example.co.uk today", "jane", "today"),
    ("Write to j_d@example.org.", "j_d@", "Write"),
    ("see /home/janedoe/src/main.py", "janedoe", "src/main.py"),
    ("see /Users/janedoe/src/main.py", "janedoe", "src/main.py"),
    (r"see C:\Users\janedoe\src\main.py", "janedoe", r"\src\main.py"),
    (r"path = 'C:\\Users\\janedoe\\src'", "janedoe", "src"),
    ("file:///home/janedoe/notes.txt", "janedoe", "notes.txt"),
    ("call +44 20 7946 0958 now", "7946", "now"),
    ("call +1 (415) 555-0132 now", "555", "now"),
    ("call +4915112345678 now", "15112345678", "now"),
    ("card 4111 1111 1111 1111 please", "4111 1111", "please"),
    ("card 4111-1111-1111-1111 please", "4111-1111", "please"),
    ("card 5500000000000004 please", "5500000000000004", "please"),
    ("card 378282246310005 please", "378282246310005", "please"),
    ("card 4111 1111 1111 1111 12/27 please", "4111 1111", "please"),
    ("card 4111 1111 1111 1111 737 please", "4111 1111", "please"),
    ("cards 4111 1111 1111 1111 5500 0000 0000 0004 please", "5500 0000", "please"),
    ("IBAN DE89 3704 0044 0532 0130 00 thanks", "3704 0044", "thanks"),
    ("IBAN GB29NWBK60161331926819 thanks", "60161331926819", "thanks"),
    ("IBAN NL91ABNA0417164300 thanks", "0417164300", "thanks"),
]


@pytest.mark.parametrize("text, gone, stays", PERSONAL)
def test_personal_data_is_redacted(text, gone, stays, tmp_path):
    """Guards e-mails, home folders, phones, cards and accounts: on every side, and no more of the text than that."""
    done = told(text, tmp_path)
    assert gone not in everything(done), sides(done.rows[0])
    assert all(stays in side for side in sides(done.rows[0]))
    assert section(done.report, "redacted").count("|") > 4, "counted"


HARMLESS = [
    "The number 4111 1111 1111 1112 is no card.",
    "Order 1234567890123456 has been shipped.",
    "At 1717000000000 ms, 3.14159265358979 and 10.0.0.1.",
    "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
    "id 123e4567-e89b-12d3-a456-426614174000",
    "2 + 2 = 4, 1+1, +5 degrees, C++17 and 5-7-5",
    "@alice said so on example.org, at 10@night",
    "/usr/share/doc and /homes/are/here and C:\\Windows\\System32",
    "task-management, ask-me-anything and risk-averse",
    "Basic authorization: a matter of taste",
    "https://example.org/?q=codes&page=2&tokenizer=bpe",
    "The secret is patience and practice.",
    "The password is required for this step.",
    "The token is generated at midnight.",
    "The author is Hemingway, or so they say.",
    "Authentication is important.",
    *(
        f"password={value}"
        for value in ("<your password>", "${DB_PASSWORD}", "xxxxxxxx", "changeme-please", "example-value")
    ),
    *(
        f"api_key = {value}"
        for value in ('os.environ["API_KEY"]', "process.env.API_KEY", '"<API_KEY>"', "'xxxxxxxxxxxx'")
    ),
    "password: short",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text, tmp_path):
    """Guards against eager patterns: near misses and placeholders stay as they are."""
    done = told(text, tmp_path)
    assert all(side.endswith(text) for side in sides(done.rows[0])), sides(done.rows[0])


def test_one_mark_a_value(tmp_path):
    """Guards that a value is one mark on all sides and in all rows, two values are two marks, however they stand."""
    first, second = "a@example.org", "b@example.org"
    rows = [pair(0, f"{LONG} Ask {first}, then {second}.", f"{OTHER} Write: {second} or {first}", f"Is {first} right?")]
    rows.append(pair(1, f"{LONG} Only {second}", "Nobody knows " + OTHER))
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out")
    other, texts = sorted(map(sides, done.rows), key=lambda texts: "EMAIL" in texts[0])
    asked, good, bad = (re.findall(r"\[EMAIL\w*\]", text) for text in texts)
    assert len(asked) == 1 and good == asked + bad[:1] and bad == good[::-1] and good[0] != good[1]
    assert good[1] in other[1], "another row"


def test_a_key_is_one_mark_wherever_it_stands(tmp_path):
    """Guards two patterns on one value: after "Authorization" a key is the same mark as without."""
    key = PREFIXED[0]
    places = [
        f"curl -H 'Authorization: Bearer {key}'",
        f"OPENAI_API_KEY={key}",
        f"I use {key} here",
        f"https://e.org?token={key}",
    ]
    rows = [pair(i, f"{LONG} {place}", f"{TOPICS[i].b} {OTHER}") for i, place in enumerate(places)]
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out")
    marks = set(re.findall(r"\[SECRET\w*\]", json.dumps(done.rows)))
    assert len(marks) == 1, marks
    assert re.search(r"\| SECRET\w* \| 4 \|", section(done.report, "redacted")), "each place counted once"


def test_a_password_is_gone_where_nothing_marks_it(tmp_path):
    """Guards the answer that repeats what the prompt introduced as a password: a mark here and a value there leaks."""
    rows = [pair(0, f"I set {PLAIN} for you. {LONG}", f"Done: {PLAIN}! {OTHER}", f"Set it up: password={PLAIN}")]
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out")
    assert PLAIN not in everything(done), sides(done.rows[0])


def test_key_after_an_escape(tmp_path):
    """Guards a key behind a line break that is written out, as in JSON inside a text."""
    done = told(r"env: {\"a\": \"x\n" + PREFIXED[8] + r"\n\"}", tmp_path)
    assert PREFIXED[8] not in everything(done)


def test_password_with_other_signs(tmp_path):
    """Guards passwords that hold commas and semicolons: no part of them stays."""
    done = told("password: k7,Qz;9x!mNa", tmp_path)
    assert "Qz" not in everything(done) and "mNa" not in everything(done)


def test_ids_do_not_stop_the_run(tmp_path):
    """Guards the last scan: an id that looks like a key, in a column of its own, must not cost the whole run."""
    chats = [gpt(kept("sk" + "-learn-basics-and-more-of-it", *TOPICS[2][:3])), gpt(kept("plain", *TOPICS[3][:3]))]
    done = run(save(tmp_path / "conversations.json", chats), tmp_path / "out")
    assert len(done.rows) == 2, done.err


def test_mostly_redacted_answers(tmp_path):
    """Guards answers that are nothing but marks: they teach nothing, and are counted."""
    rows = [pair(0, f"Take {PREFIXED[0]}"), pair(1)]
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out")
    assert len(done.rows) == 1 and any("redact" in reason for reason in left_out(done)), left_out(done)


def test_what_is_beside_the_texts_is_redacted(tmp_path):
    """Guards the other columns: a local model's name is often a path in somebody's home folder."""
    chat = kept("local", *TOPICS[0][:3])
    for node in chat.nodes:
        node["extra"] |= {"model": "/Users/janedoe/models/llama.gguf"}
    done = run(save(tmp_path / "chats.json", [webui(chat)]), tmp_path / "out")
    assert len(done.rows) == 1 and "janedoe" not in everything(done), section(done.report, "models")


@pytest.mark.parametrize("before", [" ", "\n", "\t", '"'])
@pytest.mark.parametrize("where", ["pairs", "unpaired"])
def test_finished_files_are_scanned(where, before, tmp_path):
    """Guards the last scan: where redaction let a key through, also behind a line break, nothing is written."""
    chat = kept("rated", TOPICS[0].question, TOPICS[0].a, f"{TOPICS[0].b}{before}{PREFIXED[0]}")
    if where == "unpaired":
        chat = Chat("alone")
        chat.line(None, TOPICS[0].question, f"{TOPICS[0].a}{before}{PREFIXED[0]}")
    votes = [gpt_vote(-1, chat.nodes[1]["id"], chat, later=True)]
    save(tmp_path / "in" / "conversations.json", [gpt(chat)])
    save(tmp_path / "in" / "message_feedback.json", votes)
    with patch.object(build.Redactor, "__call__", lambda self, text: text):
        done = run(tmp_path / "in", tmp_path / "out")
    assert done.code == 1 and os.listdir(tmp_path) == ["in"], os.listdir(tmp_path)
    assert PREFIXED[0] not in done.err and len(done.err.strip().splitlines()) == 1


def test_no_redact_says_what_it_means(tmp_path):
    """Guards --no-redact: the texts stay, and a warning names what is in them."""
    done = told(PREFIXED[0], tmp_path, "--no-redact")
    assert all(PREFIXED[0] in side for side in sides(done.rows[0]))
    assert "warning" in (done.out + done.err).lower() and re.search("password|keys", done.out + done.err)
    assert "warning: --no-redact" not in told("x", tmp_path / "b").out


LONG_TEXTS = [
    "a.",
    "a-b+",
    "password ",
    "-----BEGIN ",
    "4 ",
    "x@",
    "AA11",
    "://a:",
    "eyJaA",
    "\\",
    "token=a ",
    "a@b.",
    "+1 ",
]


@pytest.mark.parametrize("text", LONG_TEXTS)
def test_redaction_of_long_texts(text):
    """Guards patterns that go back and forth: 40 kB of anything take less than half a second."""
    start = time.perf_counter()
    build.Redactor()(text * (40_000 // len(text)))
    assert time.perf_counter() - start < 0.5


def test_redaction_of_many_values():
    """Guards the numbering of marks: it must not look through all the earlier ones."""
    redactor, start = build.Redactor(), time.perf_counter()
    redactor(" ".join(f"a{i}@example.org" for i in range(20_000)))
    assert time.perf_counter() - start < 2


# ------------------------------------------------------------------------------------------------------------- splits


def first_chats(count, name="chat"):
    """Return that many conversations with a pair each, no prompt twice."""
    texts = [(f"{t.question} ({n})", t.a, t.b) for n in range(count // len(TOPICS) + 1) for t in TOPICS]
    return [gpt(kept(f"{name}{i}", *texts[i])) for i in range(count)]


def parts_of(done):
    return {name: lines_of(done.folder, name) for name in NAMES}


def test_split_by_conversation(tmp_path):
    """Guards the three files: each about its share, and no conversation in two."""
    chats = [gpt(many(f"chat{i}", 3)) for i in range(40)]
    done = run(save(tmp_path / "conversations.json", chats), tmp_path / "out")
    parts = parts_of(done)
    names = [{row["conversation_id"] for row in part} for part in parts.values()]
    assert not any(a & b for a, b in itertools.combinations(names, 2))
    assert sum(map(len, parts.values())) == 120 and all(9 <= len(parts[name]) <= 15 for name in ("valid", "test"))


def test_split_by_shared_prompt(tmp_path):
    """Guards conversations linked by a prompt, also over a third one, and in other letters: all in one file."""
    rows = []
    for i in range(30):
        t = TOPICS[i % len(TOPICS)]
        rows += [gpt(kept(f"one{i}", f"Group {i}? {t.question}", t.a, t.b))]
        rows += [gpt(kept(f"two{i}", f"GROUP {i}?  {t.question}", t.c, t.b))]
    done = run(save(tmp_path / "conversations.json", rows), tmp_path / "out", "--held-out", 0.2)
    prompts = [{build.plain(row["prompt"][0]["content"]) for row in part} for part in parts_of(done).values()]
    assert len(done.rows) == 60 and all(prompts)
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))


def test_seed(tmp_path):
    """Guards that the same call writes the same bytes, files in another order too, and another seed splits anew."""
    chats = first_chats(40)
    path, other = save(tmp_path / "a" / "x.json", chats[:20]).parent, save(tmp_path / "a" / "y.json", chats[20:])
    swapped = save(tmp_path / "b" / "x.json", chats[20:]).parent
    save(tmp_path / "b" / "y.json", chats[:20])
    done = [run(*call) for call in ((path, tmp_path / "1"), (path, tmp_path / "2"), (swapped, tmp_path / "3"))]
    files = [{name: sorted(map(json.dumps, part)) for name, part in parts_of(one).items()} for one in done]
    assert other.exists() and files[0] == files[1] == files[2]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*(sorted(one.folder.iterdir()) for one in done[:2])))
    seeded = run(path, tmp_path / "4", "--seed", 1)
    assert {name: sorted(map(json.dumps, part)) for name, part in parts_of(seeded).items()} != files[0]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_trainers_take_the_folder(count, tmp_path, tiny):
    """Guards the way on: whatever the number of conversations, the trainer reads what was written, all of it."""
    done = run(save(tmp_path / "conversations.json", first_chats(count)), tmp_path / "out")
    assert len(done.rows) == count
    args = dpo_trainer.parse_args(["--model", str(tiny), "--data", str(done.folder)])
    splits = dpo_trainer.load_splits(args)
    assert sum(map(len, splits.values())) >= count - len(lines_of(done.folder, "test")) > 0
    row = next(row for row in done.rows if row in lines_of(done.folder, "train"))
    read = next(
        pair for pair in splits["train"] if json.dumps(row["prompt"][-1]["content"]) in json.dumps(pair["prompt"])
    )
    assert (read["chosen"]["content"], read["rejected"]["content"]) == tuple(sides(row)[1:])


def test_trainer_tests_on_the_folder(tmp_path, tiny):
    """Guards test.jsonl: the trainer's --test finds it."""
    done = run(save(tmp_path / "conversations.json", first_chats(40)), tmp_path / "out")
    args = dpo_trainer.parse_args(["--model", str(tiny), "--data", str(done.folder), "--train", "--test"])
    assert len(dpo_trainer.load_splits(args)["test"]) == len(lines_of(done.folder, "test")) > 0


@pytest.mark.parametrize("share", [-0.1, 0.5, 1, "nan"])
def test_wrong_share(share, tmp_path):
    """Guards --held-out: one line for what is no share."""
    done = run(save(tmp_path / "in.jsonl", [pair(0)]), tmp_path / "out", f"--held-out={share}")
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1 and "held-out" in done.err


# -------------------------------------------------------------------------------------------------------- corrections

CORRECTIONS = [  # each after a wrong answer to the topic of the same number, and before a right one
    "No, that's wrong. The island ferry leaves from another pier.",
    "No, I asked about basil on a windowsill, not about basil in a field.",
    "That's not the capital of Mongolia.",
    "Wrong. An apple tree is pruned while it sleeps.",
    "Incorrect, bread goes stale for another reason.",
    "You forgot that the candle wax is on a tablecloth, not on a pan.",
    "You misread the question: the bicycle chain gets wet in the rain.",
    "I said the shortest day, not the hottest planet.",
    "Not quite - green tea gets bitter if it steeps like that.",
    "Nope, the ceiling of the Sistine Chapel is by somebody else.",
    "You didn't say how to stop the door from squeaking.",
    "That’s incorrect; my first telescope was like that and I saw nothing.",
    "Still wrong: the sky at sunset does not work like that.",
    "It still doesn't tell me how to fold a fitted sheet.",
    "You missed what hedgehogs really eat in the garden.",
    "Same mistake again: that knot does not join ropes of different thickness.",
    "Try again, my paper crane falls over when I do that.",
    "This is not what causes the tides.",
    "We asked how often a toothbrush is replaced, not how it is cleaned.",
    "Not what I asked: which instrument has forty-seven strings?",
    "You got the avocado wrong, it is as hard as before.",
    "no no no, cats knead for another reason",
    "> Just a phone, because huts sell everything else.\n\nThat is not enough for a day in the mountains!",
    "That's false, no barcode can be read by hand like this.",
    "You ignored that I asked about Andorra.",
]
NOT_CORRECTIONS = [  # each after an answer to the topic of the same number, and before another one
    "No problem, the island ferry can wait. What about the return?",
    "No worries about the basil. And parsley?",
    "No, thanks, that is all about the capital of Mongolia.",
    "No need to prune more than the apple tree, then. What about pears?",
    "No idea how bread goes stale, but what about cake?",
    "Nothing wrong with that tablecloth. What about candle wax on wood?",
    "I'm not saying you're wrong about the bicycle chain, but what about the brakes?",
    "Sorry, I mistyped: which planet has the longest day?",
    "Wrong chat, sorry, that green tea was for my sister.",
    "No, I made a typo: who painted the Last Supper ceiling?",
    "Actually, could you tell me about a squeaking floor instead of the door?",
    "Don't stop at the telescope, tell me about binoculars.",
    "I see, the sky at sunset. Why is it blue at noon?",
    "Now fold a duvet cover, not a fitted sheet.",
    "Do hedgehogs eat nuts, too?",
    "Use a shorter rope for that knot, and explain it again in French.",
    "Wait, there's more: the paper crane should be blue.",
    "No doubt the moon causes the tides. And the waves?",
    "Ignore that, my toothbrush question was answered yesterday. Dentist?",
    "Notice the strings; which instrument has six?",
    "Stop. Now tell me about a ripe avocado, not a hard one.",
    "No more about cats, please. Why do dogs circle a blanket?",
    "No rush, but what should my dog wear in the mountains?",
    "My bad, I meant a QR code, not a barcode.",
    "Noted! Which language is spoken in Monaco, not Andorra?",
    "Scratch that: how can I sleep better on a plane, not before an exam?",
    "```\nNo, that's wrong\n```\nWhy does my keystone program print this?",
    "> That's wrong.\n\nWho said that of a cast iron pan?",
    "Thanks, great! No longer do I wonder about swallows. And storks?",
    "Is it wrong to write a haiku in prose?",
]


def talk_of(turn, index, *end):
    """Return a conversation's texts: question, answer, turn, another answer, and how it went on."""
    t = TOPICS[index]
    return [t.question, t.b, turn, t.a, *(end or ("Thanks, that helps.", BYE))]


def corrected(talks, tmp_path, *words):
    """Run on linear conversations, a file each, looking for corrections."""
    for index, texts in enumerate(talks):
        save(tmp_path / "in" / f"{index:03d}.jsonl", messages(texts))
    return run(tmp_path / "in", tmp_path / "out", "--corrections", *words)


def by_question(done):
    return {row["prompt"][-1]["content"]: row for row in done.rows}


def test_corrections_are_found(tmp_path):
    """Guards recall: of 25 clear corrections at least 22, each the right way round and without the complaint."""
    done = corrected([talk_of(turn, index) for index, turn in enumerate(CORRECTIONS)], tmp_path)
    found = by_question(done)
    missed = [turn for turn, t in zip(CORRECTIONS, TOPICS) if t.question not in found]
    assert len(missed) <= 3, missed
    wanted = {t.question: (t.question, t.a, t.b) for t in TOPICS}
    assert all(tuple(sides(row)) == wanted[question] and len(row["prompt"]) == 1 for question, row in found.items())
    assert {row["signal"] for row in done.rows} == {"correction"}


@pytest.mark.parametrize("index", range(len(NOT_CORRECTIONS)))
def test_not_corrections(index, tmp_path):
    """Guards precision: ordinary turns that look like a complaint give no pair."""
    done = corrected([talk_of(NOT_CORRECTIONS[index], index)], tmp_path)
    assert done.code == 1 and not done.rows, NOT_CORRECTIONS[index]


FURTHER = [  # the same, less common
    "I asked my doctor about the island ferry, too. What about trains?",
    "I said that about basil to my sister as well. And parsley?",
    "You didn't disappoint: I know the capital of Mongolia now. And of Nepal?",
    "That's not bad at all for an apple tree. What about roses?",
    "That's not a problem, stale bread makes good toast. What about rice?",
    "No, that's all about candle wax. What about ink?",
    "Nope, all good with the bicycle chain. What about the brakes?",
    "Not quite sure what a planet is. Can you explain?",
    "No further questions on green tea. What about coffee?",
    "Wrong answers only: who painted the ceiling?",
    "I told you the door was old, right? How old can a door get?",
    "You forgot nothing about the telescope, well done. What about maps?",
]


def test_further_not_corrections(tmp_path):
    """Guards precision where a complaint's first words go on as something else: of twelve at most three pairs."""
    found = by_question(corrected([talk_of(turn, index) for index, turn in enumerate(FURTHER)], tmp_path))
    wrong = [turn for turn, t in zip(FURTHER, TOPICS) if t.question in found]
    assert len(wrong) <= 3, wrong


def test_corrections_are_opt_in(tmp_path):
    """Guards that guesses are made on request alone, weigh least, and are all listed."""
    talks = [talk_of(CORRECTIONS[i], i) for i in range(5)]
    done = corrected(talks, tmp_path)
    listed = section(done.report, "correction")
    assert len(done.rows) == 5 and all(t.a in listed and t.b in listed for t in TOPICS[:5])
    assert all(0 < row["weight"] < build.WEIGHTS["regenerate"] for row in done.rows)
    plain = run(tmp_path / "in", tmp_path / "plain")
    assert plain.code == 1 and "--corrections" in plain.err and not plain.folder.exists()


LEAD_INS = [
    "You're right. ",
    "You’re absolutely right! ",
    "You are right, sorry. ",
    "Sorry about that. ",
    "My apologies. ",
    "I apologize for the confusion. ",
    "My mistake! ",
    "Good catch! ",
    "Apologies for the mix-up.\n\n",
    "I'm sorry for the mistake. ",
    "You're right! My mistake. ",
]


@pytest.mark.parametrize("lead", LEAD_INS)
def test_apologies_are_cut_off(lead, tmp_path):
    """Guards the better answer's beginning: no model shall learn to start with an apology."""
    t = TOPICS[0]
    done = corrected([[t.question, t.b, CORRECTIONS[0], lead + t.a, "Thanks!", BYE]], tmp_path)
    assert [sides(row)[1] for row in done.rows] == [t.a]


NO_PAIRS = [  # condition of the correction rule that fails, and the texts
    ("a question back", [*talk_of(CORRECTIONS[0], 0)[:3], "Which island do you mean?", "Rottnest.", BYE]),
    ("a refusal", [*talk_of(CORRECTIONS[0], 0)[:3], "I'm sorry, but I can't help with that.", "Pity.", BYE]),
    ("the same answer", [*talk_of(CORRECTIONS[0], 0)[:3], TOPICS[0].b, "Thanks", BYE]),
    ("only an apology", [*talk_of(CORRECTIONS[0], 0)[:3], "You're right.", "Thanks", BYE]),
    ("corrected again", talk_of(CORRECTIONS[0], 0, "No, that's still the wrong pier.", TOPICS[0].c, "Thanks", BYE)[:6]),
    ("of nothing known", talk_of("No, do it differently, with more sugar.", 0)),
    ("of a correction", talk_of("No, I said so.", 0)),
    ("something new", talk_of("No, use pnpm instead.", 0)),
    ("something new", talk_of("Not what I wanted, use the Tuesday timetable instead.", 0)),
    ("no answer after", talk_of(CORRECTIONS[0], 0)[:3]),
    ("at the start", ["No, that's wrong, the ferry leaves elsewhere.", TOPICS[0].a, "Thanks", BYE]),
]


@pytest.mark.parametrize("why, texts", NO_PAIRS)
def test_conditions_of_a_correction(why, texts, tmp_path):
    """Guards each condition: without it there is no pair that says the right thing."""
    done = corrected([texts, talk_of(CORRECTIONS[1], 1)], tmp_path)
    assert [sides(row)[0] for row in done.rows] == [TOPICS[1].question], why


def test_correction_after_an_unfinished_answer(tmp_path):
    """Guards condition (a): an answer that was cut short or still called a tool is not the worse one."""
    t, logs = TOPICS[0], []
    for name, row in (("cut", dict(finish_reason="length")), ("call", dict(tool_calls='[{"id": "c"}]')), ("whole", {})):
        store = Store(tmp_path / "in" / name / "state.db")
        session = store.session(f"20240529_100000_{name}")
        store.put(session, "user", f"{t.question} {name}")
        store.put(session, "assistant", t.b, **row)
        store.say(session, CORRECTIONS[0], t.a, "Thanks", BYE)
        store.close()
        logs.append(store)
    done = run(tmp_path / "in", tmp_path / "out", "--corrections")
    assert len(logs) == 3 and [sides(row)[0] for row in done.rows] == [f"{t.question} whole"]


def test_thanks_weigh(tmp_path):
    """Guards condition (c): a correction whose answer was thanked for counts more than one nobody spoke of again."""
    talks = [talk_of(CORRECTIONS[0], 0), talk_of(CORRECTIONS[1], 1)[:4], talk_of(CORRECTIONS[2], 2, MORE, BYE)]
    found = by_question(corrected(talks, tmp_path))
    weights = [found[t.question]["weight"] for t in TOPICS[:3]]
    assert weights[0] > weights[1] == weights[2] > 0


# --------------------------------------------------------------------------------------------------- generated answers


def curated(path, count, start=0):
    """Write conversations that hold only a good answer, as ShareGPT has them."""
    rows = []
    for t in TOPICS[start : start + count]:
        turns = [{"from": "human", "value": t.question}, {"from": "gpt", "value": t.a}]
        rows.append({"conversations": turns})
    return save(path, rows)


def answers(model, tokenizer, prompts, **options):
    """Stand in for mlx-lm's batched generation: quick, seeded, and each answer whole."""
    import mlx.core as mx

    number = lambda: int(mx.random.randint(0, 10**6))
    texts = [f"Nobody could ever say, case {number()}." for _ in prompts]
    return SimpleNamespace(texts=texts, token_ids=[[7] * 9 for _ in prompts])


def test_generated_by_a_model(tmp_path, tiny):
    """Guards the whole way through mlx-lm, with a model that only babbles: what it says is the worse side."""
    path, words = curated(tmp_path / "in.jsonl", 20), ("--generate-rejected", tiny, "--max-tokens", 200)
    done = run(path, tmp_path / "out", *words)
    assert done.rows, done.out + done.err
    right = {t.question: t.a for t in TOPICS}
    assert all(right[sides(row)[0]] == sides(row)[1] != sides(row)[2] for row in done.rows)
    assert {(row["signal"], row["weight"]) for row in done.rows} == {("generated", build.WEIGHTS["generated"])}
    again = run(path, tmp_path / "again", *words)
    assert sorted(map(sides, done.rows)) == sorted(map(sides, again.rows)), "seeded"
    assert sorted(map(sides, run(path, tmp_path / "other", *words, "--seed", 1).rows)) != sorted(map(sides, done.rows))


def generated(tmp_path, tiny, *words, out="out", stop_after=10**6):
    """Run with the quick stand-in on in/; return the run and the prompts of each call."""
    calls = []

    def call(model, tokenizer, prompts, **options):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(list(map(tuple, prompts)))
        return answers(model, tokenizer, prompts)

    with patch("mlx_lm.batch_generate", call), contextlib.suppress(KeyboardInterrupt):
        return run(tmp_path / "in", f"{tmp_path}/{out}", "--generate-rejected", tiny, *words), calls
    return None, calls


def test_generation_goes_on_where_it_stopped(tmp_path, tiny):
    """Guards the .generated.jsonl file: interrupted, run again, run a third time: nothing is answered twice."""
    curated(tmp_path / "in" / "a.jsonl", 10)
    nothing, first = generated(tmp_path, tiny, "--batch-size", 4, stop_after=1)
    assert nothing is None and (tmp_path / "out.generated.jsonl").read_text().count("\n") == 4
    done, second = generated(tmp_path, tiny, "--batch-size", 4)
    asked = sum(first + second, [])
    assert len(asked) == len(set(asked)) == 10 and len(done.rows) == 10
    again, third = generated(tmp_path, tiny, "--batch-size", 4)
    assert third == [] and sorted(map(sides, again.rows)) == sorted(map(sides, done.rows))
    whole, _ = generated(tmp_path, tiny, "--batch-size", 4, out="whole")
    assert sorted(map(sides, whole.rows)) == sorted(map(sides, done.rows)), "as if it had not been stopped"


def test_generation_after_a_broken_line(tmp_path, tiny):
    """Guards a stop in the middle of a line: one answer is made again, and kept this time."""
    curated(tmp_path / "in" / "a.jsonl", 4)
    generated(tmp_path, tiny)
    path = tmp_path / "out.generated.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    done, calls = generated(tmp_path, tiny)
    assert len(sum(calls, [])) == 1 and len(done.rows) == 4
    assert generated(tmp_path, tiny)[1] == []


def test_generation_only_where_there_is_no_pair(tmp_path, tiny):
    """Guards that answers with a rival keep it: only good answers alone get one, bad ones and plain chats none."""
    rated, alone, bad, plain = kept("rated", *TOPICS[0][:3]), Chat("alone"), Chat("bad"), Chat("plain")
    for index, chat in enumerate((alone, bad, plain), 1):
        chat.line(None, TOPICS[index].question, TOPICS[index].a)
    votes = [(1, rated.nodes[2]["id"], rated), (1, alone.leaf, alone), (-1, bad.leaf, bad)]
    save(tmp_path / "in" / "conversations.json", [gpt(chat) for chat in (rated, alone, bad, plain)])
    save(tmp_path / "in" / "message_feedback.json", [gpt_vote(*vote, later=True) for vote in votes])
    save(tmp_path / "in" / "rows.jsonl", [pair(4)])
    curated(tmp_path / "in" / "good.jsonl", 1, start=5)
    done, calls = generated(tmp_path, tiny)
    made = {sides(row)[0] for row in done.rows if row["signal"] == "generated"}
    assert made == {TOPICS[1].question, TOPICS[5].question} and len(sum(calls, [])) == 2
    assert len(done.rows) == 4


def test_generation_without_the_folder_above(tmp_path, tiny):
    """Guards --out in a folder that does not exist yet."""
    curated(tmp_path / "in" / "a.jsonl", 2)
    done, _ = generated(tmp_path, tiny, out="new/deep/out")
    assert done.code == 0 and len(done.rows) == 2


def test_generation_with_a_slash_at_the_end(tmp_path, tiny):
    """Guards --out as a shell completes it, with a slash: the second run goes on, and so does the third."""
    curated(tmp_path / "in" / "a.jsonl", 2)
    runs = [generated(tmp_path, tiny, out="out/") for _ in range(3)]
    assert [len(sum(calls, [])) for _, calls in runs] == [2, 0, 0] and len(runs[2][0].rows) == 2


def test_generation_is_redacted(tmp_path, tiny):
    """Guards what the model is asked and what is kept of it: no key in the file of answers, one mark on both sides."""
    t = TOPICS[0]
    turns = [
        {"from": "human", "value": f"{t.question} {PREFIXED[0]}"},
        {"from": "gpt", "value": f"{t.a} {t.b} {t.c} {PREFIXED[0]}"},
    ]
    save(tmp_path / "in" / "a.jsonl", [{"conversations": turns}])
    done, _ = generated(tmp_path, tiny)
    assert len(done.rows) == 1 and PREFIXED[0] not in everything(done)
    assert len(set(re.findall(r"\[SECRET\w*\]", json.dumps(done.rows)))) == 1


def test_generation_of_a_model_that_does_not_exist(tmp_path):
    """Guards the message for a wrong --generate-rejected: one line, nothing written."""
    curated(tmp_path / "in" / "a.jsonl", 2)
    done = run(tmp_path / "in", tmp_path / "out", "--generate-rejected", tmp_path / "none")
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1 and os.listdir(tmp_path) == ["in"]


def test_generation_in_a_dry_run(tmp_path, tiny):
    """Guards --dry-run: nothing is answered, nothing is written."""
    curated(tmp_path / "in" / "a.jsonl", 2)
    done, calls = generated(tmp_path, tiny, "--dry-run")
    assert calls == [] and os.listdir(tmp_path) == ["in"] and "Traceback" not in done.err


# ---------------------------------------------------------------------------------------------------------- bad input

WRONG = [None, 7, "text", ["x"], {"a": 1}]  # put in the place of each value, one at a time


def places(data, above=()):
    """Yield the path of each value inside of nested dicts and lists."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inside:
        yield (*above, key)
        yield from places(value, (*above, key))


def damaged(data, place, value):
    """Return a copy of the data with another value at a place."""
    copy = json.loads(json.dumps(data))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


def small(name, index):
    """Return a conversation with one regenerated answer."""
    t, chat = TOPICS[index], Chat(name)
    user = chat.add(None, "user", t.question)
    chat.add(user, "assistant", t.b)
    chat.line(chat.add(user, "assistant", t.a), MORE)
    return chat


def damaged_chatgpt():
    victim, other = picked("victim", *TOPICS[0][:3]), small("other", 1)
    victim.nodes[1]["extra"] = {"metadata": {"finish_details": {"type": "stop"}, "model_slug": "gpt-4o"}}
    step = dict(original_turn=[{"id": "victim-01"}], new_turn=[{"id": "victim-02"}], completion_comparison_rating="new")
    compared = dict(id="c", input={"conversation_id": "victim"}, output={"feedback_step_2": step})
    yield "conversations.json", gpt(victim, moderation_results=[{"message_id": "m", "flagged": False}]), gpt(other)
    yield (
        "message_feedback.json",
        gpt_vote(-1, "victim-01", victim, later=True),
        gpt_vote(1, "other-02", other, later=False),
    )
    yield "model_comparisons.json", compared, {"id": "d", "output": {"feedback_step_2": None}}


def damaged_webui():
    victim, other = small("victim", 0), small("other", 1)
    victim.nodes[1]["extra"] = {"annotation": {"rating": -1}, "files": [{"type": "file"}], "error": None}
    vote = dict(id="f", type="rating", data={"rating": "1"}, meta={"message_id": "victim-02", "chat_id": "victim"})
    yield "chats.json", webui(victim), webui(other)
    yield "feedback.json", vote | {"snapshot": {"chat": webui(victim)}}, {}


def damaged_claude():
    victim, other = small("victim", 0), small("other", 1)
    yield "conversations.json", claude(victim, current_leaf_message_uuid=victim.leaf, model="m"), claude(other)


def damaged_claude_code():
    logs = []
    for name, t in zip(("victim", "other"), TOPICS):
        log = Log(name)
        log.answer(log.user(None, t.question), {"type": "thinking", "thinking": "hm"}, t.b)
        call = log.answer(
            log.user(None, t.question), {"type": "tool_use", "id": "t", "name": "Bash", "input": {"c": "ls"}}
        )
        log.end(log.answer(log.tool(call, "a.txt"), t.a))
        logs.append(log.records)
    yield "victim.jsonl", logs[0] + CODE_OTHER, logs[1]


def damaged_codex():
    logs = []
    for name, t in zip(("victim", "other"), TOPICS):
        log = Rollout(name)
        log.ask(t.question)
        log.answer(t.b)
        log.event("thread_rolled_back", num_turns=1)
        log.ask(t.question)
        log.tool()
        log.answer(t.a)
        logs.append(log.lines)
    yield "victim.jsonl", logs[0], logs[1]


def damaged_hermes():
    sessions = []
    for name, index in (("victim", 0), ("other", 1)):
        data = dict(session_id=name, session_start="2024-05-29T10:00:00", model="hermes-4", platform="cli")
        call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
        turns = messages(talk_of(CORRECTIONS[index], index))
        turns[1]["display_metadata"] = json.dumps({"reactions": [{"emoji": "👍", "author": "user"}]})
        sessions.append(data | {"messages": turns + [call, {"role": "tool", "content": "x"}]})
    yield "victim.json", *sessions


def damaged_studio():
    chats = []
    for t in TOPICS[:2]:
        turns = [studio_user(t.question), studio_answer(t.b, t.a, selected=1), studio_user(MORE)]
        chats.append(dict(name="A chat", createdAt=START * 1000, systemPrompt="s", messages=turns))
    yield "victim.conversation.json", *chats


DAMAGED = [
    damaged_chatgpt,
    damaged_webui,
    damaged_claude,
    damaged_claude_code,
    damaged_codex,
    damaged_hermes,
    damaged_studio,
]


def put_damaged(folder, name, victim, other):
    """Write a damaged record and a whole one: in one list, or in a file each where a file is one conversation."""
    if name.endswith(".jsonl") or "victim" in name:
        save(folder / name, victim)
        save(folder / name.replace("victim", "other"), other)
    else:
        save(folder / name, [victim, other])


def remove(folder):
    for path in folder.iterdir() if folder.exists() else ():
        path.unlink()
    if folder.exists():
        folder.rmdir()


def verdict(done):
    """Return what is wrong with a run on a damaged file beside a whole one, or None."""
    found, t = {key_of(row)[1:] for row in done.rows}, TOPICS[1]
    if (t.a, t.b) not in found or (t.b, t.a) in found:
        return f"the other conversation's pair: {done.out[:300]} {done.err[:300]}"
    texts = [text for row in done.rows for text in sides(row)]
    return None if all(isinstance(text, str) and text for text in texts) else f"texts: {texts}"


def try_damaged(folder, name, victim, other):
    """Return a line for each damage that the script does not survive."""
    lines = []
    for place in places(victim):
        for value in WRONG:
            put_damaged(folder / "in", name, damaged(victim, place, value), other)
            try:
                problem = verdict(run(folder / "in", folder / "out", "--corrections"))
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            remove(folder / "out")
            lines += [f"{'/'.join(map(str, place))} = {value!r}: {problem}"] if problem else []
    return lines


@pytest.mark.parametrize("write", DAMAGED)
def test_every_value_damaged(write, tmp_path):
    """Guards null and other types anywhere: no traceback, and the conversation beside it keeps its pair."""
    files = list(write())
    for name, victim, other in files:
        put_damaged(tmp_path / "in", name, victim, other)
    lines = sum((try_damaged(tmp_path, *file) for file in files), [])
    assert not lines, f"{len(lines)} of them:\n" + "\n".join(lines[:: max(1, len(lines) // 25)])


EMPTY_ROWS = [
    dict(chosen=""),
    dict(rejected=""),
    dict(prompt=""),
    dict(chosen="   "),
    dict(prompt=[]),
    dict(chosen=[]),
    dict(chosen=[{"role": "assistant", "content": ""}]),
    dict(chosen=[{"role": "assistant"}]),
    dict(prompt="\u200b"),
    dict(prompt=[{"role": "user", "content": None}]),
    dict(rejected={}),
    dict(chosen=[None]),
    dict(chosen=[[]]),
]


@pytest.mark.parametrize("fields", EMPTY_ROWS)
def test_empty_sides(fields, tmp_path):
    """Guards data set rows with nothing in a column."""
    done = run(save(tmp_path / "in.jsonl", [pair(0) | fields, pair(1)]), tmp_path / "out")
    assert [sides(row)[1] for row in done.rows] == [TOPICS[1].a], done.out + done.err


BROKEN = [  # name, bytes of a file beside a good one
    ("empty.json", b""),
    ("blank.jsonl", b"\n \n\n"),
    ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40),
    ("noise.json", random.Random(0).randbytes(5000)),
    ("bracket.json", b"["),
    ("brace.jsonl", b"{"),
    ("open.json", b'[{"mapping": {"a": {"message": '),
    ("nul.jsonl", b"\0" * 5000),
    ("deep.json", b"[" * 10_000 + b"]" * 10_000),
    ("deep.json", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    ("deep.json", b'{"a":[' * 900 + b"1" + b"]}" * 900),
    ("deep.json", b'{"a":[' * 400 + b"1" + b"]}" * 400),
    ("deep.jsonl", b'{"type": "user", "uuid": "x", "sessionId": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n"),
    ("number.json", b'[{"mapping": {}, "update_time": ' + b"9" * 5000 + b"}]"),
    ("nan.json", b'[{"mapping": {}, "update_time": NaN, "current_node": Infinity}]'),
    ("utf16.json", '[{"mapping": {}}]'.encode("utf-16")),
    ("bad.gz", b"\x1f\x8b\x08\x00" + random.Random(1).randbytes(2000)),
    ("cut.gz", gzip.compress(random.Random(2).randbytes(5000))[:2500]),
    ("body.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:15] + b"\xff" * 60),
    ("bad.zip", b"PK\x03\x04" + random.Random(3).randbytes(2000)),
    ("state.db", b"SQLite format 3\0" + random.Random(4).randbytes(8000)),
    ("state.db", b"SQLite format 3\0"),
]


@pytest.mark.parametrize("name, data", BROKEN)
def test_broken_file(name, data, tmp_path):
    """Guards files that are no export: the good one beside it counts, and so it does when it comes later."""
    for folder in ("a", "z"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / name).write_bytes(data)
    save(tmp_path / "in" / "m" / "rows.jsonl", [pair(0), pair(1)])
    done = run(tmp_path / "in", tmp_path / "out")
    assert len(done.rows) == 2, done.out + done.err
    alone = run(tmp_path / "in" / "a" / name, tmp_path / "alone")
    assert alone.code == 1 and len(alone.err.strip().splitlines()) == 1 and not alone.folder.exists()


def test_what_no_reader_knows_is_said(tmp_path):
    """Guards silent losses: a file in another encoding is named or counted, not passed over without a word."""
    path = tmp_path / "conversations.json"
    path.write_bytes(json.dumps([gpt(kept("a", *TOPICS[0][:3]))]).encode("utf-16"))
    done = run(path, tmp_path / "out")
    counted = re.search(r"\b1 (files?|lines?|records?|lists?)\b(?! *:)", done.err.split("looked for")[-1])
    assert done.rows or counted or "conversations.json" in done.out, done.out + done.err


@pytest.mark.parametrize("at", [0, 3, 6])
def test_corrupt_lines(at, tmp_path):
    """Guards JSONL: a line that is none costs itself alone, first, middle or last, and is counted."""
    lines = [json.dumps(pair(i)) for i in range(6)]
    for broken in ('{"prompt": "half of', "\x00\x01\x02", "}{", '{"a": ' * 20_000):
        path = tmp_path / "in.jsonl"
        path.write_text("\n".join(lines[:at] + [broken] + lines[at:]))
        done = run(path, tmp_path / "out")
        assert len(done.rows) == 6, (broken[:20], done.out)
        assert re.search(r"\| .*line.* \| 1 \|", section(done.report, "not read")), section(done.report, "not read")


def test_truncated_list(tmp_path):
    """Guards an export that breaks off: the conversations before the break count, and the report says so."""
    text = json.dumps(first_chats(6))
    (tmp_path / "conversations.json").write_text(text[: int(len(text) * 0.8)])
    done = run(tmp_path / "conversations.json", tmp_path / "out")
    assert len(done.rows) == 4 and re.search(r"\| .+ \| 1 \|", section(done.report, "not read"))


def test_lone_surrogates(tmp_path):
    """Guards halves of an emoji, which exports that cut texts contain: the pair is written in UTF-8."""
    chat = kept("half", TOPICS[0].question + " \ud83d", TOPICS[0].a + " \udc4d", TOPICS[0].b)
    chat.nodes[1]["extra"] = {"metadata": {"model_slug": "m\ud83d"}}
    rows = [pair(1, chosen=TOPICS[1].a + "\ud83d", prompt="\udfff" + TOPICS[1].question)]
    save(tmp_path / "in" / "conversations.json", [gpt(chat, conversation_id="half\ud83d", id="half\ud83d")])
    done = run([tmp_path / "in", save(tmp_path / "rows.jsonl", rows)], tmp_path / "out")
    assert len(done.rows) == 2 and all("\ud83d" not in text for row in done.rows for text in sides(row))


def looped(change):
    """Return a conversation's record whose links were changed, beside a whole one."""
    talk = gpt(small("loop", 0))
    change(talk["mapping"], talk)
    return [talk, gpt(small("whole", 1))]


def own_parent(mapping, talk):
    mapping["loop-01"]["parent"] = "loop-01"


def ring(mapping, talk):
    mapping["loop-00"]["parent"] = "loop-03"


def ring_of_all(mapping, talk):
    for key in mapping:
        mapping[key]["parent"] = "loop-00"


def no_parents(mapping, talk):
    for key in mapping:
        mapping[key]["parent"] = "gone"


def nothing_on_show(mapping, talk):
    talk["current_node"] = "gone"


def no_nodes(mapping, talk):
    for key in mapping:
        mapping[key] = None


@pytest.mark.parametrize("change", [own_parent, ring, ring_of_all, no_parents, nothing_on_show, no_nodes])
def test_links_of_a_tree(change, tmp_path):
    """Guards cycles and dangling parents: the script ends, no pair is the wrong way round, the whole one counts."""
    done = run(save(tmp_path / "conversations.json", looped(change)), tmp_path / "out")
    found = {key_of(row)[1:] for row in done.rows}
    assert (TOPICS[1].a, TOPICS[1].b) in found and (TOPICS[0].b, TOPICS[0].a) not in found
    assert len(found) <= 2


def test_long_chain(tmp_path):
    """Guards a conversation of 10,000 turns, one below the other."""
    chat = Chat("long")
    leaf = chat.line(None, *(f"turn {i}" for i in range(10_000)))
    user = chat.add(leaf, "user", TOPICS[0].question)
    chat.add(user, "assistant", TOPICS[0].b)
    chat.line(chat.add(user, "assistant", TOPICS[0].a), MORE, BYE)
    nodes = {
        node["id"]: dict(id=node["id"], parentId=node["parent"], role=node["role"], content=node["text"])
        for node in chat.nodes
    }
    record = dict(id="long", chat={"history": {"currentId": chat.leaf, "messages": nodes}})
    done = run(save(tmp_path / "chats.json", [record]), tmp_path / "out")
    assert len(done.rows) == 1 and len(done.rows[0]["prompt"]) == build.HISTORY + 1


# ----------------------------------------------------------------------------------------------------------- archives


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def refused(done, folder):
    """Whether a run on an archive alone said so in one line each and wrote nothing."""
    return done.code == 1 and len(done.err.strip().splitlines()) == 1 and not folder.exists()


def test_zip_bomb(tmp_path):
    """Guards memory: a member of 256 MB in 256 kB is refused, and the file beside the archive counts."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("conversations.json", "w") as member:
            for _ in range(64):
                member.write(b" " * 2**22)
    start, done = time.perf_counter(), run(tmp_path / "bomb.zip", tmp_path / "out")
    assert refused(done, tmp_path / "out") and "bomb.zip" in done.out + done.err and time.perf_counter() - start < 3
    done = run([tmp_path / "bomb.zip", save(tmp_path / "rows.jsonl", [pair(0)])], tmp_path / "out")
    assert len(done.rows) == 1 and re.search(r"\| .*file.* \| 1 \|", section(done.report, "not read"))


@pytest.mark.parametrize("name", ["../conversations.json", "a/../../b.json", "/etc/conversations.json", "..\\b.json"])
def test_member_outside(name, tmp_path):
    """Guards path-escaping members: refused, said, and nothing is written outside."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = zipped(tmp_path / "deep" / "er" / "x.zip", [(name, json.dumps(first_chats(2)))])
    before = sorted(tmp_path.rglob("*"))
    done = run(path, tmp_path / "out")
    assert refused(done, tmp_path / "out") and "x.zip" in done.out + done.err and sorted(tmp_path.rglob("*")) == before


def test_locked_archive(tmp_path):
    """Guards an archive with a password: one line, not a traceback."""
    path = zipped(tmp_path / "x.zip", [("conversations.json", json.dumps(first_chats(2)))])
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(mark) + offset
        data[at : at + 2] = struct.pack("<H", 1)
    path.write_bytes(data)
    assert refused(run(path, tmp_path / "out"), tmp_path / "out")


def test_damaged_member(tmp_path):
    """Guards a member whose bytes are wrong, in the packed data or in the checksum alone."""
    for name, method in (("packed.zip", zipfile.ZIP_DEFLATED), ("stored.zip", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / name, "w", method) as archive:
            archive.writestr("conversations.json", json.dumps(first_chats(5)))
        data = bytearray((tmp_path / name).read_bytes())
        data[200:230] = b"\xff" * 30
        (tmp_path / name).write_bytes(data)
    done = run(
        [tmp_path / "packed.zip", tmp_path / "stored.zip", save(tmp_path / "rows.jsonl", [pair(39)])], tmp_path / "out"
    )
    assert TOPICS[39].a in {sides(row)[1] for row in done.rows} and "Traceback" not in done.out + done.err


def test_archive_in_archives(tmp_path):
    """Guards .gz in .gz, a few deep: what is in it counts."""
    data = gzip.compress(gzip.compress(json.dumps(first_chats(2)).encode()))
    (tmp_path / "x.json.gz.gz").write_bytes(data)
    assert len(run(tmp_path / "x.json.gz.gz", tmp_path / "out").rows) == 2


def test_endless_archive(tmp_path):
    """Guards .gz in .gz two thousand deep."""
    data = b"[]"
    for _ in range(2000):
        data = gzip.compress(data, 1)
    (tmp_path / "x.gz").write_bytes(data)
    assert refused(run(tmp_path / "x.gz", tmp_path / "out"), tmp_path / "out")


LAUNCH = """
import os, subprocess, sys, threading
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
timer = threading.Timer(float(sys.argv[1]), process.kill)
timer.start()
_, status, used = os.wait4(process.pid, 0)
timer.cancel()
print(os.waitstatus_to_exitcode(status), used.ru_maxrss / 1024)
"""  # a small process of its own: a child's peak starts with its parent's


def measured(sources, out, *words, limit=60):
    """Run the script by itself; return its exit status, its seconds, its peak in MB."""
    command = [sys.executable, "-c", LAUNCH, str(limit), sys.executable, str(ROOT / "build_dpo_pairs.py")]
    start = time.perf_counter()
    done = subprocess.run([*command, *map(str, sources), "--out", str(out), *words], capture_output=True, text=True)
    status, peak = done.stdout.split()
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return int(status), time.perf_counter() - start, float(peak)


@pytest.mark.parametrize(
    "start, fill", [(b'["', b"a"), (b"[", b" "), (b'{"a": "', b"a"), (b"[", b"0 "), (b'{"a":1}', b"\n")]
)
def test_gz_bomb(start, fill, tmp_path):
    """Guards 4 GB in a .gz in a .gz of some kB: refused within seconds, in little memory."""
    block = gzip.compress(fill * (2**26 // len(fill)), 1)
    (tmp_path / "bomb.json.gz.gz").write_bytes(gzip.compress(gzip.compress(start) + block * 64, 1))
    status, seconds, peak = measured([tmp_path / "bomb.json.gz.gz"], tmp_path / "out", limit=8)
    assert status == 1 and seconds < 8 and peak < 1000 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- databases


def retried(path, index=0, **options):
    """Write a Hermes database with one retried answer; return it, open."""
    t, store = TOPICS[index], Store(path)
    name = store.session(f"20240529_100000_{index:06d}")
    store.say(name, t.question, t.b, active=0)
    store.say(name, t.question, t.a, MORE, BYE)
    store.base.commit()
    return store


def fingerprint(folder):
    """Return hash, size and time of change of all files, and the folders' too."""
    paths = sorted(folder.rglob("*"))
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return [(str(path), digest(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def only_pair(done, index=0):
    return [key_of(row)[1:] for row in done.rows] == [(TOPICS[index].a, TOPICS[index].b)]


def test_database_that_another_program_locks(tmp_path):
    """Guards a running Hermes: an exclusive lock, with rows that are not committed, and what is committed counts."""
    store = retried(tmp_path / "in" / "state.db")
    store.base.execute("PRAGMA locking_mode = EXCLUSIVE")
    store.base.execute("BEGIN EXCLUSIVE")
    store.base.execute("UPDATE messages SET content = 'never said' WHERE role = 'assistant'")
    before = fingerprint(tmp_path / "in")
    done = run(tmp_path / "in", tmp_path / "out")
    assert only_pair(done), done.out + done.err
    assert fingerprint(tmp_path / "in") == before
    store.base.rollback()


def test_database_in_the_middle_of_a_write(tmp_path):
    """Guards half of a transaction in the file: its journal says what was there before."""
    store = retried(tmp_path / "in" / "state.db")
    for i in range(200):
        store.say(store.session(f"fill{i}"), "filler " * 50, "filler " * 50)
    store.base.commit()
    store.base.execute("PRAGMA cache_size = 1")
    store.base.execute("UPDATE messages SET content = 'never said ' || id")
    assert (tmp_path / "in" / "state.db-journal").stat().st_size, "the sample is as it should be"
    done = run(tmp_path / "in", tmp_path / "out")
    assert only_pair(done), done.out + done.err
    store.base.rollback()


def test_database_with_a_write_ahead_log(tmp_path):
    """Guards what the program has not put into the database yet: it is read, and neither file is changed."""
    store = Store(tmp_path / "in" / "state.db")
    store.base.commit()
    store.base.execute("PRAGMA journal_mode = WAL")
    store.base.execute("PRAGMA wal_autocheckpoint = 0")
    t, name = TOPICS[0], store.session("20240529_100000_aaaaaa")
    store.say(name, t.question, t.b, active=0)
    store.say(name, t.question, t.a, MORE, BYE)
    store.base.commit()
    before = fingerprint(tmp_path / "in")
    assert any("-wal" in name and size for name, _, size, _ in before), "the sample is as it should be"
    assert only_pair(run(tmp_path / "in", tmp_path / "out"))
    assert fingerprint(tmp_path / "in") == before
    store.base.close()


CHANGES = [  # statements, whether the pair can still be told
    (["ALTER TABLE messages ADD COLUMN shade TEXT DEFAULT 'x'", "ALTER TABLE sessions ADD COLUMN shade"], True),
    (["UPDATE schema_version SET version = 99", "CREATE TABLE of_next_year (a)", "CREATE VIEW v AS SELECT 1"], True),
    (["DROP TABLE schema_version", "DROP TABLE system_prompts"], True),
    (["ALTER TABLE messages DROP COLUMN finish_reason", "ALTER TABLE messages DROP COLUMN observed"], True),
    (["ALTER TABLE messages DROP COLUMN display_kind", "ALTER TABLE sessions DROP COLUMN model"], True),
    (["ALTER TABLE messages DROP COLUMN timestamp", "ALTER TABLE sessions DROP COLUMN source"], True),
    (["ALTER TABLE messages DROP COLUMN session_id"], False),
    (["ALTER TABLE messages RENAME COLUMN content TO body"], False),
    (["ALTER TABLE sessions RENAME COLUMN id TO name"], False),
    (["DROP TABLE messages"], False),
    (["DROP TABLE sessions"], False),
    (["DELETE FROM sessions"], False),
    (["UPDATE messages SET content = x'ff00fe'"], False),
    (["UPDATE messages SET role = NULL"], False),
    (["UPDATE sessions SET id = NULL"], False),
    (["UPDATE messages SET tool_calls = '{', display_metadata = '[', timestamp = 'then'"], None),
    (['UPDATE messages SET display_metadata = \'{"reactions": [{"emoji": 7, "author": "user"}]}\''], None),
    (["UPDATE messages SET display_metadata = '[1]', timestamp = -1e300"], None),
]


@pytest.mark.parametrize("statements, known", CHANGES)
def test_database_of_another_schema(statements, known, tmp_path):
    """Guards newer and older schemas: more columns, fewer columns, other types; the database beside it counts."""
    store = retried(tmp_path / "in" / "a" / "state.db")
    for statement in statements:
        store.base.execute(statement)
    store.close()
    retried(tmp_path / "in" / "b" / "state.db", 1).close()
    done = run(tmp_path / "in", tmp_path / "out")
    found = {key_of(row)[1:] for row in done.rows}
    assert (TOPICS[1].a, TOPICS[1].b) in found, done.out + done.err
    assert known is None or ((TOPICS[0].a, TOPICS[0].b) in found) == known
    assert (TOPICS[0].b, TOPICS[0].a) not in found


def test_database_with_damaged_pages(tmp_path):
    """Guards a database whose later pages are gone."""
    store = retried(tmp_path / "in" / "state.db")
    for i in range(200):
        store.say(store.session(f"fill{i}"), "filler " * 50, "filler " * 50)
    store.close()
    path = tmp_path / "in" / "state.db"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3 // 4096 * 4096] + b"\xaa" * 8192)
    save(tmp_path / "in" / "rows.jsonl", [pair(39)])
    done = run(tmp_path / "in", tmp_path / "out")
    assert TOPICS[39].a in {sides(row)[1] for row in done.rows}


def test_database_of_another_program(tmp_path):
    """Guards tables of the same names with other columns."""
    for index, tables in enumerate((("chats", "messages"), ("sessions", "messages"), ("a", "b"))):
        base = sqlite3.connect(tmp_path / f"{index}.db")
        for table in tables:
            base.execute(f"CREATE TABLE {table} (key TEXT, value BLOB)")
            base.execute(f"INSERT INTO {table} VALUES ('a', x'00ff')")
        base.commit()
        base.close()
        assert refused(run(tmp_path / f"{index}.db", tmp_path / "out"), tmp_path / "out")


# ------------------------------------------------------------------------------------------------- sources and output


def test_no_pair(tmp_path):
    """Guards the last line of a run that found nothing: exit status 1, the signals that were looked for, no folder."""
    chat = Chat("plain")
    chat.line(None, TOPICS[0].question, TOPICS[0].a)
    done = run(save(tmp_path / "conversations.json", [gpt(chat)]), tmp_path / "out")
    assert refused(done, tmp_path / "out") and os.listdir(tmp_path) == ["conversations.json"]
    for signal in ("choice|compar", "rating|rated", "regenerat", "correct"):
        assert re.search(signal, done.err), signal


@pytest.mark.parametrize(
    "words",
    [
        ["{}/none"],
        ["{}/in", "{}/none"],
        ["{}/in", "--sed", "1"],
        [],
        ["{}/in", "--max-per-chat", "0"],
        ["{}/in", "--seed", "x"],
        ["{}/in", "--max-tokens", "-1"],
        ["{}/in", "--batch-size", "0"],
    ],
)
def test_wrong_words(words, tmp_path):
    """Guards the command line: one line on stderr for a missing path and for options that are none."""
    save(tmp_path / "in" / "rows.jsonl", [pair(0)])
    done = run([word.format(tmp_path) for word in words], tmp_path / "out")
    assert refused(done, tmp_path / "out") and "Traceback" not in done.err


@pytest.mark.parametrize("source", ["in", "in/empty"])
def test_empty_folder(source, tmp_path):
    """Guards a folder without files."""
    (tmp_path / "in" / "empty").mkdir(parents=True)
    assert refused(run(tmp_path / source, tmp_path / "out"), tmp_path / "out")


def test_earlier_output_moves_aside(tmp_path):
    """Guards what is in --out already: twice moved aside, byte for byte, and a file of that name as well."""
    path = save(tmp_path / "in" / "rows.jsonl", [pair(0)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("mine")
    for _ in range(2):
        assert run(path, tmp_path / "out").code == 0
    texts = [file.read_text() for file in tmp_path.glob("out*/train.jsonl")]
    assert len(texts) == 3 and "mine" in texts
    (tmp_path / "file").write_text("mine, too")
    done = run(path, tmp_path / "file")
    kept_file = [file for file in tmp_path.glob("file*") if file.is_file()]
    assert [file.read_text() for file in kept_file] == ["mine, too"] and done.code in (0, 1)


def test_output_with_a_slash(tmp_path):
    """Guards --out as a shell completes it: an earlier output moves beside the folder, not into it."""
    path = save(tmp_path / "in" / "rows.jsonl", [pair(0)])
    for _ in range(3):
        assert run(path, f"{tmp_path}/out/").code == 0
    assert len(list(tmp_path.glob("out*"))) == 3 and (tmp_path / "out" / "train.jsonl").is_file()
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_output_inside_a_source(tmp_path):
    """Guards runs whose output lies among the sources: the next ones must not take it for data, or they refuse."""
    save(tmp_path / "in" / "conversations.json", first_chats(6))
    found = []
    for _ in range(3):
        done = run(tmp_path / "in", tmp_path / "in" / "pairs")
        found.append(
            sorted((*sides(row), row["signal"], row["source"]) for row in done.rows) if done.code == 0 else None
        )
    assert found[0] == found[1] == found[2], [len(rows or ()) for rows in found]


@pytest.mark.parametrize("out", ["in", ".", "in/../in"])
def test_output_is_a_source(out, tmp_path):
    """Guards a source that would be moved aside: it stays where and as it is."""
    save(tmp_path / "in" / "conversations.json", first_chats(3))
    before = fingerprint(tmp_path)
    done = run(tmp_path / "in", tmp_path / out)
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1 and fingerprint(tmp_path) == before


def test_output_is_a_source_file(tmp_path):
    """Guards --out that names the very file to read."""
    path = save(tmp_path / "rows.jsonl", [pair(0)])
    text = path.read_text()
    done = run(path, path)
    assert done.code == 1 and path.is_file() and path.read_text() == text


def test_output_cannot_be_written(tmp_path):
    """Guards a read-only place: one line that names it, nothing left behind."""
    path = save(tmp_path / "in" / "rows.jsonl", [pair(0)])
    done = run(path, path / "out")
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1 and path.is_file()
    with patch.object(Path, "mkdir", side_effect=PermissionError(13, "Permission denied")):
        done = run(path, tmp_path / "out")
    assert refused(done, tmp_path / "out") and str(tmp_path / "out") in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_read_only_folder(tmp_path):
    """Guards a real folder without write permission."""
    path = save(tmp_path / "in" / "rows.jsonl", [pair(0)])
    (tmp_path / "locked").mkdir(mode=0o555)
    assert refused(run(path, tmp_path / "locked" / "out"), tmp_path / "locked" / "out")


def test_disk_full(tmp_path):
    """Guards a write that breaks off: the earlier output is where it was."""
    path = save(tmp_path / "in" / "rows.jsonl", [pair(0)])
    run(path, tmp_path / "out")
    before = fingerprint(tmp_path / "out")
    with patch.object(Path, "write_text", side_effect=OSError(28, "No space left on device")):
        done = run(path, tmp_path / "out")
    assert done.code == 1 and fingerprint(tmp_path / "out") == before


def mixed(folder):
    """Write sources of several kinds, archives among them."""
    save(folder / "a" / "conversations.json", first_chats(3))
    zipped(folder / "x.zip", [("conversations.json", json.dumps(first_chats(3, "zip")))])
    (folder / "y.json.gz").write_bytes(gzip.compress(json.dumps(first_chats(3, "gz")).encode()))
    retried(folder / "state.db", 20).close()
    return folder


def test_sources_stay(tmp_path):
    """Guards the sources: bytes, times and list of files are the same afterwards."""
    before = fingerprint(mixed(tmp_path / "in"))
    done = run(tmp_path / "in", tmp_path / "out", "--corrections")
    assert len(done.rows) == 4 and fingerprint(tmp_path / "in") == before


def test_dry_run(tmp_path):
    """Guards --dry-run: the report is printed, nothing is written, an earlier output stays where it is."""
    mixed(tmp_path / "in")
    run(save(tmp_path / "rows.jsonl", [pair(0)]), tmp_path / "out")
    before = fingerprint(tmp_path)
    done = run(tmp_path / "in", tmp_path / "out", "--dry-run")
    assert done.code == 0 and fingerprint(tmp_path) == before and "| hermes | regenerate | 1 |" in done.out


def test_read_only_sources(tmp_path):
    """Guards sources on a read-only disk."""
    mixed(tmp_path / "in")
    for path in [*tmp_path.joinpath("in").rglob("*"), tmp_path / "in"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").chmod(0o755)
    (tmp_path / "in" / "a").chmod(0o755)
    assert len(done.rows) == 4


def test_same_source_twice(tmp_path):
    """Guards a file that is named twice, once through a link: nothing is counted twice."""
    path = save(tmp_path / "in" / "conversations.json", first_chats(3))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    done = run([path, tmp_path / "in", tmp_path / "link" / "conversations.json"], tmp_path / "out")
    assert len(done.rows) == 3


def test_as_a_program(tmp_path):
    """Guards the script as a person calls it: exit status, one line, no traceback."""
    command = [sys.executable, str(ROOT / "build_dpo_pairs.py"), str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and str(tmp_path / "none") in done.stderr
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------------- performance

FILLER = "It depends on the season, on the wind, and on how long the queue at the harbour is today. "


def wide(count, turns, name="chat"):
    """Yield conversations, each of that many messages, every tenth answer regenerated."""
    for number in range(count):
        chat, leaf = Chat(f"{name}{number}"), None
        for turn in range(turns // 2):
            leaf = chat.add(leaf, "user", f"Question {turn} of {number}: how far is it?")
            if turn % 10 == 0:
                chat.add(leaf, "assistant", f"I would not know, {number}, {turn}.")
            leaf = chat.add(leaf, "assistant", f"{number * turn} miles. {FILLER * 2}")
        yield chat


def flat(chat):
    """Return a conversation as Open WebUI has it: chat.children would be quadratic here."""
    nodes = {n["id"]: dict(id=n["id"], parentId=n["parent"], role=n["role"], content=n["text"]) for n in chat.nodes}
    return dict(id=chat.name, updated_at=chat.updated, chat={"history": {"currentId": chat.leaf, "messages": nodes}})


def many_chats(folder):
    save(folder / "chats.json", [flat(chat) for chat in wide(5000, 20)])


def few_chats(folder):
    save(folder / "chats.json", [flat(chat) for chat in wide(10, 10_000)])


def all_rated(folder):
    """Every answer of long conversations has a vote and a rival."""
    chats = list(wide(200, 500))
    for chat in chats:
        for node in [node for node in chat.nodes if node["role"] == "assistant"]:
            node["text"] += " 0123"
            chat.nodes.append(node | {"id": node["id"] + "-b", "text": "Nobody ever measured it."})
    records = [flat(chat) for chat in chats]
    for record in records:
        for key, message in record["chat"]["history"]["messages"].items():
            message |= (
                {"annotation": {"rating": -1 if key.endswith("-b") else 1}} if message["role"] == "assistant" else {}
            )
    save(folder / "chats.json", records)


def many_logs(folder):
    """Two thousand Claude Code files of fifty records."""
    for number, chat in enumerate(wide(2000, 50)):
        log, keys = Log(f"s{number}"), {None: None}
        for node in chat.nodes:
            say = log.user if node["role"] == "user" else log.answer
            keys[node["id"]] = say(keys[node["parent"]], node["text"])
        save(folder / f"{log.session}.jsonl", log.records)


def database(folder):
    """Five thousand sessions of one Hermes database, without an index."""
    store = Store(folder / "state.db")
    for number in range(5000):
        name = store.session(f"20240529_{number:06d}")
        store.say(name, "How far is it?", f"I would not know, {number}.", active=0)
        store.say(name, *itertools.chain.from_iterable(("How far is it?", f"{number} {FILLER}") for _ in range(9)))
    store.close()


def data_set(folder):
    """A hundred thousand rows of four prompts."""
    save(folder / "rows.jsonl", [pair(i % 4, f"{i} {FILLER}", f"Nobody knows it, case {i}.") for i in range(50_000)])


def one_prompt(folder):
    """Conversations that all begin with the same words."""
    chats = (
        kept(f"chat{i}", "Hello there, how are you?", f"{i} {FILLER}", f"No idea, case {i}.") for i in range(20_000)
    )
    save(folder / "chats.json", [flat(chat) for chat in chats])


@pytest.mark.slow
@pytest.mark.parametrize("write", [many_chats, few_chats, all_rated, many_logs, database, data_set, one_prompt])
def test_hundred_thousand_messages(write, tmp_path):
    """Guards speed and memory: 100,000 messages in whatever shape take less than 20 s and 1 GB."""
    write(tmp_path / "in")
    status, seconds, peak = measured([tmp_path / "in"], tmp_path / "out", limit=120)
    assert status == 0 and seconds < 20 and peak < 1000, (status, seconds, peak)


def big_list(path, size):
    """Write a conversations.json of that many bytes."""
    with open(path, "w") as file:
        file.write("[")
        for number in itertools.count():
            t = TOPICS[number % len(TOPICS)]
            talk = kept(f"chat{number}", f"{t.question} ({number})", f"{number} {FILLER * 40}", f"{t.b} {FILLER * 30}")
            file.write(json.dumps(gpt(talk)) + ("," if file.tell() < size else "]"))
            if file.tell() >= size:
                return path


@pytest.mark.slow
def test_large_list(tmp_path):
    """Guards memory: a conversations.json of 300 MB in less than 2 GB."""
    path = big_list(tmp_path / "conversations.json", 300 * 10**6)
    status, seconds, peak = measured([path], tmp_path / "out", limit=200)
    assert status == 0 and peak < 2000, (status, seconds, peak)


@pytest.mark.slow
def test_large_lines(tmp_path):
    """Guards streaming: 300 MB of JSONL that hold one conversation's tool output take little memory."""
    log, t = Log("big"), TOPICS[0]
    log.answer(log.user(None, t.question), t.b)
    log.end(log.answer(log.user(None, t.question), t.a))
    with open(tmp_path / "big.jsonl", "w") as file:
        file.write("".join(json.dumps(record) + "\n" for record in log.records[:2]))
        line = (
            json.dumps(log.records[0] | {"uuid": "tool-%d", "type": "progress", "toolUseResult": "x" * 10_000}) + "\n"
        )
        for number in range(30_000):
            file.write(line.replace("tool-%d", f"tool-{number}"))
        file.write("".join(json.dumps(record) + "\n" for record in log.records[2:]))
    status, seconds, peak = measured([tmp_path / "big.jsonl"], tmp_path / "out", limit=200)
    assert status == 0 and seconds < 60 and peak < 500, (status, seconds, peak)


def test_a_switch_is_no_label(tmp_path):
    """Guards conversations of programs that nobody knows: "pinned": false made a rejected answer of what they hold."""
    talk = [{"role": "user", "content": TOPICS[0].question}, {"role": "assistant", "content": TOPICS[0].a}]
    rows = [{"messages": talk, "pinned": False}, {"messages": talk, "archived": True}, pair(1)]
    done = run(save(tmp_path / "in.jsonl", rows), tmp_path / "out")
    assert len(done.rows) == 1 and not done.unpaired
    done = run(save(tmp_path / "in.jsonl", [*rows, {"messages": talk, "label": False}]), tmp_path / "more")
    assert [row["label"] for row in done.unpaired] == [False]
