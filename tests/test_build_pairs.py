"""What all sources of build_dpo_pairs.py share: checks, redaction, splits, corrections, broken input, the folder."""

import gzip
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict

import pytest
from conftest import ROOT
from test_sources import (
    BAD,
    BYE,
    GOOD,
    MORE,
    WEBGPT,
    WRITERS,
    Q,
    chatgpt,
    code,
    codex,
    hermes,
    pairs,
    read_rows,
    retry,
    run,
    save,
    texts,
    webui,
)

import build_dpo_pairs as build


def pair(index, chosen=GOOD, rejected=BAD, prompt=None):
    return {"prompt": prompt or f"Question {index}: which pier is it?", "chosen": chosen, "rejected": rejected}


def table(report, title):
    """Return {reason: count} of a section of the report."""
    part = next(part for part in report.split("\n## ") if part.lower().startswith(title.lower()))
    return {why: int(number) for number, why in re.findall(r"^- (\d+) (.+)$", part, re.M)}


def chats(*talks):
    """Return a ChatGPT export of talks, each the arguments of retry."""
    made = [chatgpt(retry(*talk))["conversations.json"][0] for talk in talks]
    return {"conversations.json": [chat | {"id": f"c{i}", "conversation_id": f"c{i}"} for i, chat in enumerate(made)]}


# ------------------------------------------------------------------------------------------------------------- checks

LONG, OTHER = (" ".join(f"{word}{i}" for i in range(60)) for word in ("word", "other"))
REASONS = {
    "equal": "equal answers",
    "ratio": "one answer ten times as long",
    "refusal": "a refusal as the better answer",
}
BAD_PAIRS = [  # check, the fields of a row that fails it
    ("equal", dict(chosen="The  north pier,\nbeside it.", rejected="the north PIER, beside it.")),
    ("ratio", dict(chosen="At the quay.", rejected=LONG)),
    ("ratio", dict(chosen=LONG, rejected="At the quay.")),
    ("refusal", dict(chosen="I'm sorry, but I can't help with that kind of request.")),
    ("refusal", dict(chosen="I cannot say anything about the piers of that island.")),
    ("refusal", dict(chosen="I can’t tell you which pier the island ferry leaves from.")),
    ("refusal", dict(chosen="As an AI language model, I have no idea about ferries.")),
]


@pytest.mark.parametrize("check, fields", BAD_PAIRS)
def test_check_drops_and_counts(check, fields, tmp_path):
    done = run(tmp_path, {"in.jsonl": [pair(0, **fields), pair(1)]})
    assert [texts(row)[0] for row in done.rows] == [[pair(1)["prompt"]]]
    assert table(done.report, "prompts and pairs") == {REASONS[check]: 1}


GOOD_PAIRS = [  # what looks as if it failed a check
    dict(rejected="I'm sorry, but I can't help with that kind of request."),  # a refusal may be the worse answer
    dict(chosen="Sorry to hear that you missed it! The north pier.", rejected="The south pier, or so they say."),
    dict(prompt="Wie heißt die Mole, von der die Fähre fährt?", chosen="Die Fähre fährt täglich von der Nordmole ab."),
    dict(chosen="Ja."),
    dict(chosen="Yes.", rejected="That would be the one beside the old fish market, as far as I can remember."),
    dict(chosen=LONG, rejected=" ".join(f"word{i}" for i in range(0, 80, 2))),
]


@pytest.mark.parametrize("fields", GOOD_PAIRS)
def test_check_lets_pass(fields, tmp_path):
    fields = {"rejected": "Hm, no."} | fields if fields.get("chosen") == "Ja." else fields
    assert len(run(tmp_path, {"in.jsonl": [pair(0, **fields)]}).rows) == 1


def test_length_is_no_reason_against_a_choice(tmp_path):
    """A long answer beside a short one: dropped where only what is on show speaks, never where the person did."""
    assert run(tmp_path / "0", chatgpt(retry(bad=LONG))).code == 1
    vote = {"message_feedback.json": [{"id": "b", "conversation_id": "c1", "rating": "thumbs_up"}]}
    assert len(run(tmp_path / "1", chatgpt(retry(bad=LONG)) | vote).rows) == 1
    choice = {"paragen_variants_info": {}, "paragen_variant_choice": "b"}
    assert len(run(tmp_path / "2", chatgpt(retry(bad=LONG, u={"metadata": choice}))).rows) == 1


def test_duplicates_and_contradictions(tmp_path):
    """One pair of equal ones; of two that contradict each other the stronger."""
    done = run(tmp_path / "0", chats((Q,), (Q,), (Q,)))
    assert len(done.rows) == 1 and table(done.report, "prompts and pairs")["a duplicate"] == 2
    done = run(tmp_path / "1", {"in.jsonl": [pair(0), pair(0, BAD, GOOD), pair(1)]})
    assert len(done.rows) == 2 and table(done.report, "prompts and pairs") == {"a contradiction": 1}
    done = run(tmp_path / "2", chats((Q,)) | webui(retry(a={"annotation": {"rating": 1}})))
    assert pairs(done) == [([Q], BAD, GOOD)] and table(done.report, "prompts and pairs")["a contradiction"] == 1
    done = run(tmp_path / "3", {"in.jsonl": [pair(0, "one", "two"), pair(0, "one", "six"), pair(0, "two", "six")]})
    assert len(done.rows) == 3, "each row of a prompt is a pair of its own"


def test_at_most_three_rivals(tmp_path):
    nodes = [(f"a{i}", "u", "assistant", f"Take number {i}, it is {i}.", {}) for i in range(6)]
    assert len(run(tmp_path, chatgpt(retry()[:1] + nodes + retry()[2:])).rows) == 3


def test_a_long_history_is_cut(tmp_path):
    """A prompt has the 40 messages before it, in turns that are whole."""
    turns = [(f"{i}", str(i - 1) if i else None, ("user", "assistant")[i % 2], f"Say {i}.", {}) for i in range(90)]
    last = [(key, parent or "89", *rest) for key, parent, *rest in retry()]
    [row] = run(tmp_path, webui(turns + last)).rows
    assert [m["content"] for m in row["prompt"]] == [f"Say {i}." for i in range(50, 90)] + [Q]


# ------------------------------------------------------------------------------------------------- counts and report


def test_every_record_is_counted(tmp_path):
    """Pairs, answers alone and reasons add up to the records that were read, whatever they were."""
    files = {name: data for write in WRITERS for name, data in write(retry(f"{Q} {write.__name__}")).items()}
    vote = [{"id": i, "conversation_id": "c1", "rating": "thumbs_up"} for i in ("b", "gone")]
    files |= {"feedback.json": vote, "user.json": {"id": 1}, "a.html": "<p>", "b.jsonl": '{"a": 1}\nnull\n{"b"\n'}
    files |= {
        "more/chats.json": webui(retry())["chat-export.json"],
        "rows.jsonl": [pair(0), pair(0), pair(1, GOOD, GOOD)],
    }
    files["more/s.jsonl"] = [{"type": "summary", "leafUuid": "x"}, {"type": "progress", "sessionId": "s", "uuid": "p"}]
    done = run(tmp_path, files)
    lines = sum(len(data) if isinstance(data, list) else 0 for name, data in files.items())
    total = int(re.search(r"What became of (\d+) records", done.report)[1])
    assert total == lines + 2 + 1 + 3, "the lists' elements, two values, the database's session, three broken lines"
    became = table(done.report, "what became")
    assert sum(became.values()) == total and became["pairs"] > 10 and became["equal answers"] == 1


def test_no_pair(tmp_path):
    """Exit status 1 and one line: what was looked for, and why nothing was found; no folder."""
    done = run(tmp_path / "0", chatgpt(retry()[:2]))
    assert done.code == 1 and len(done.text.strip().splitlines()) == 1 and not (tmp_path / "0" / "out").exists()
    assert all(words in done.text for words in ("1 records", "choices, ratings", "--corrections", "1 one answer"))
    assert "0 records" in run(tmp_path / "1", {"a.txt": ""}).text


def test_a_readers_own_error(tmp_path):
    """It is shown with its text, the input's file and line and the reader's line, once a kind, and counted."""
    rows = [WEBGPT | {"score_0": "high"}] * 3
    done = run(tmp_path, {"in.jsonl": [pair(0), *rows]})
    said = [line for line in done.text.splitlines() if "TypeError" in line and "in.jsonl" in line]
    assert len(said) == 1 and re.search(r"in\.jsonl:2: TypeError in read_row, line \d+: unsupported", said[0])
    assert [number for why, number in table(done.report, "what became").items() if "TypeError" in why] == [3]


# ---------------------------------------------------------------------------------------------------------- redaction

# Put together here, so that no whole key stands in this file.
LETTERS, HEX = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0" * 4, "0a1b2c3d4e5f6789" * 6
HEAD, BODY = "eyJ" + LETTERS[:20], "eyJ" + LETTERS[7:40]
JWT = f"{HEAD}.{BODY}.{LETTERS[3:30]}"
PEM = f"-----BEGIN {'OPENSSH'} PRIVATE KEY-----\n{LETTERS[:60]}\n{LETTERS[5:50]}\n-----END OPENSSH PRIVATE KEY-----"
PREFIXED = [
   
    *( "sk-" + rest for rest in ("ant-api03-" + LETTERS[:40], "proj-" + LETTERS[:40], "or-v1-" + HEX[:64], LETTERS[:48]) ),
    *("gsk" + "_" + LETTERS[:40], "xai" + "-" + LETTERS[:60], "pplx" + "-" + LETTERS[:40], "r8" + "_" + LETTERS[:37]),
    *("hf" + "_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH", "AI" + "za" + LETTERS[:35]),
    *("gh" + kind + "_" + LETTERS[:36] for kind in "pousr"),
    *("github" + "_pat_" + LETTERS[:82], "glp" + "at-" + LETTERS[:20], "np" + "m_" + LETTERS[:36]),
    *("py" + "pi-" + LETTERS[:70], "AK" + "IA" + "QWERTYUIOPASDFGH", "AS" + "IA" + "QWERTYUIOPASDFGH"),
    *("dop" + "_v1_" + HEX[:64], "xox" + "b-1234567890-" + LETTERS[:20], "12345678" + "90:AA" + LETTERS[:33]),
    *("sk" + "_live_" + LETTERS[:24], "rk" + "_test_" + LETTERS[:24], "S" + "G." + LETTERS[:22] + "." + LETTERS[:43]),
    *("SK" + HEX[:32], "AGE-SECRET" + "-KEY-1" + "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L" * 2, JWT, PEM),
    "https://hooks.sla" + "ck.com/services/T0/B0/" + LETTERS[:24],
]  # fmt: skip
PLAIN = "k7Qz9xmNf2Lw"  # a password, which nothing but its place tells
PLACED = [
    f"postgres://alice:{PLAIN}@db.example.org/shop", f"redis://:{PLAIN}@localhost:6379/0",
    f"curl -H 'Authorization: Bearer {PLAIN}' https://example.org", f"authorization: basic {PLAIN}",
    f'headers = {{"Authorization": "Bearer {PLAIN}"}}',
    *( f"https://example.org/cb?x=1&{name}={PLAIN}&y=2" for name in ("access_token", "refresh_token", "id_token", "sig") ),
    *(f"https://example.org/cb?{name}={PLAIN}" for name in ("token", "api_key", "client_secret", "password", "code")),
    *(f"https://example.org/cb?{name}={PLAIN}" for name in ("signature", "X-Amz-Signature", "x-goog-signature")),
    *( f"{name}={PLAIN}" for name in ("API_KEY", "apikey", "my-api-key", "SECRET", "token", "DB_PASSWORD", "passwd", "PWD") ),
    *(f'"{name}": "{PLAIN}"' for name in ("api_key", "clientSecret", "authToken", "password", "credentials")),
    f"export GITHUB_TOKEN='{PLAIN}'", f"password: {PLAIN}, as agreed", f"password = {PLAIN};",
    f"The password is {PLAIN}.",
]  # fmt: skip


def told(value, tmp_path, *words):
    """Return a run on a rated pair whose prompt, better answer and lone rated answer hold a text."""
    nodes = retry(f"{Q} {value}", f"{BAD} {OTHER} {value}", f"{GOOD} {LONG} {value}")
    nodes += [("v", None, "user", f"Where? {value}", {}), ("w", "v", "assistant", f"{BYE} {LONG} {value}", {})]
    votes = [{"id": key, "conversation_id": "c1", "rating": "thumbs_up"} for key in "wb"]
    return run(tmp_path, chatgpt(nodes) | {"message_feedback.json": votes}, *words)


def everything(done, tmp_path):
    return done.text + "".join(path.read_text("utf-8") for path in (tmp_path / "out").glob("*"))


def sides(row):
    prompt, *answers = texts(row)
    return [prompt[-1], *answers]


@pytest.mark.parametrize("value", PREFIXED)
def test_keys_are_redacted(value, tmp_path):
    """Gone from all that is written or printed, one mark on all sides, counted."""
    done = told(value, tmp_path)
    text = everything(done, tmp_path)
    assert len(done.rows) == 1 and json.dumps(value)[1:-1] not in text and value[-12:] not in text
    marks = [re.findall(r"\[[A-Z]+[_:]\w+\]", side) for side in sides(done.rows[0])]
    assert marks[0] == marks[1] == marks[2] and len(marks[0]) == 1 and table(done.report, "redacted")["SECRET"] >= 3


@pytest.mark.parametrize("text", PLACED)
def test_passwords_are_redacted(text, tmp_path):
    done = told(text, tmp_path)
    assert PLAIN not in everything(done, tmp_path)
    assert len(set(re.findall(r"\[[A-Z]+_\d+\]", str(sides(done.rows[0]))))) == 1


PERSONAL = [
    ("Write to jane.doe+news@mail.example.co.uk today", "jane", "today"),
    ("Write to j_d@example.org.", "j_d@", "Write"), ("see /home/janedoe/src/main.py", "janedoe", "src/main.py"),
    ("see /Users/janedoe/src/main.py", "janedoe", "src/main.py"),
    (r"see C:\Users\janedoe\src\main.py", "janedoe", r"\src\main.py"),
    (r"path = 'C:\\Users\\janedoe\\src'", "janedoe", "src"),
    ("file:///home/janedoe/notes.txt", "janedoe", "notes.txt"), ("call +44 20 7946 0958 now", "7946", "now"),
    ("call +1 (415) 555-0132 now", "555", "now"), ("call +4915112345678 now", "15112345678", "now"),
    ("ssh 203.0.113.77 please", "113.77", "please"), ("ping 2001:db8:0:0:0:ff00:42:8329 please", "42:8329", "please"),
    ("pay with 4111 1111 1111 1111 then", "1111 1111", "then"),
    ("pay with 378282246310005 then", "246310005", "then"),
    ("to DE89 3704 0044 0532 0130 00 IN FULL", "0044", "IN FULL"),
    ("to GB29NWBK60161331926819 now", "60161331", "now"), ("to FR1420041010050500013M02606 now", "M02606", "now"),
]  # fmt: skip


@pytest.mark.parametrize("text, gone, stays", PERSONAL)
def test_personal_data_is_redacted(text, gone, stays, tmp_path):
    done = told(text, tmp_path)
    assert gone not in everything(done, tmp_path) and all(stays in side for side in sides(done.rows[0]))


HARMLESS = [
    "Order 1234567890123456 has been shipped.", "EU27 WITH THIS WORD AND 4111 others, ISBN 9783161484100",
    "At 1717000000000 ms, 3.14159265358979 and 10.0.1.", "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
    "id 123e4567-e89b-12d3-a456-426614174000", "2 + 2 = 4, 1+1, +5 degrees, C++17 and 5-7-5",
    "@alice said so on example.org, at 10@night", "/usr/share/doc and /homes/are/here and C:\\Windows\\System32",
    "task-management, ask-me-anything and risk-averse", "Basic authorization: a matter of taste",
    "https://example.org/?q=codes&page=2&tokenizer=bpe", "The secret is patience and practice.",
    "The password is required for this step.", "The token is generated at midnight.",
    "The author is Hemingway, or so they say.", "Authentication is important.",
    *( f"password={value}" for value in ("<your password>", "${DB_PASSWORD}", "xxxxxxxx", "changeme-please", "example-value") ),
    *( f"api_key = {value}" for value in ('os.environ["API_KEY"]', "process.env.API_KEY", '"<API_KEY>"', "'xxxxxxxxxxxx'") ),
    "password: short",
]  # fmt: skip


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text, tmp_path):
    assert all(side.endswith(text) for side in sides(told(text, tmp_path).rows[0]))


def test_one_mark_a_value(tmp_path):
    """The same in all rows, whatever gave it away."""
    key = PREFIXED[0]
    places = [
        f"'Authorization: Bearer {key}'",
        f"OPENAI_API_KEY={key}",
        f"I use {key} here",
        f"https://e.org?token={key}",
    ]
    rows = [pair(i, f"{LONG} {place}", f"{BAD} {OTHER}") for i, place in enumerate(places)]
    rows += [pair(6, f"{LONG} a@b.org, c@b.org", f"{OTHER} c@b.org or a@b.org")]
    done = run(tmp_path, {"in.jsonl": rows})
    text, row = everything(done, tmp_path), next(row for row in done.rows if "EMAIL" in str(row))
    assert key not in text and set(re.findall(r"\[SECRET\w*\]", text)) == {"[SECRET_1]"}
    good, bad = (re.findall(r"\[EMAIL_\d\]", side) for side in sides(row)[1:])
    assert len(set(good)) == 2 and good == bad[::-1]


def test_nothing_redacted(tmp_path):
    words = f"{BAD} {OTHER} {PREFIXED[0]}"
    done = run(tmp_path, chatgpt(retry(good=f"{GOOD} {LONG}", bad=words)), "--no-redact")
    assert PREFIXED[0] in sides(done.rows[0])[2]


@pytest.mark.parametrize(
    "text", ["a.", "a-b+", "password ", "-----BEGIN ", "4 ", "x@", "AA11", "://a:", "eyJaA", "token=a "]
)
def test_redaction_of_long_texts(text):
    """Patterns that go back and forth: 40 kB of anything take less than half a second of work."""
    row = {"prompt": [{"role": "user", "content": text * (40_000 // len(text))}], "chosen": [{"content": ""}]}
    start = time.process_time()
    build.redact(row, defaultdict(dict), Counter())
    assert time.process_time() - start < 2


# ------------------------------------------------------------------------------------------------------------- splits


def test_splits(tmp_path):
    """A tenth each, by conversation and by first prompt; drawn by the seed; none for a single pair."""
    files = chats(*((f"{Q} ({i // 2})", f"{BAD} {i}") for i in range(80)))
    done = run(tmp_path / "0", files)
    parts = [read_rows(tmp_path / "0" / "out" / f"{name}.jsonl") for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [64, 8, 8] and len(done.rows) == 80
    prompts = [{row["prompt"][0]["content"] for row in part} for part in parts]
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))
    assert done.rows == run(tmp_path / "1", files).rows
    assert len(run(tmp_path / "3", chats((Q,))).rows) == len(read_rows(tmp_path / "3" / "out" / "train.jsonl")) == 1


def test_trainers_take_the_folder(tmp_path, tiny):
    run(tmp_path, chats(*((f"{Q} ({i})",) for i in range(20))))
    words = ["--model", tiny, "--data", tmp_path / "out", "--iters", 1, "--batch-size", 1, "--num-layers", 1]
    command = [sys.executable, ROOT / "dpo_trainer.py", *words, "--adapter-path", tmp_path / "adapters"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- corrections

CORRECTIONS = [
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
NOT_CORRECTIONS = [
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
    "Wait, there's more: the paper crane should be blue.",
    "No doubt the moon causes the tides. And the waves?",
    "Ignore that, my toothbrush question was answered yesterday. Dentist?",
    "Stop. Now tell me about a ripe avocado, not a hard one.",
    "No more about cats, please. Why do dogs circle a blanket?",
    "No rush, but what should my dog wear in the mountains?",
    "My bad, I meant a QR code, not a barcode.",
    "Noted! Which language is spoken in Monaco, not Andorra?",
    "Scratch that: how can I sleep better on a plane, not before an exam?",
    "```\nNo, that's wrong\n```\nWhy does my keystone program print this?",
    "> That's wrong.\n\nWho said that of a cast iron pan?",
    "Thanks, great! No longer do I wonder about swallows. And storks?",
]
FURTHER = [
    "I asked my doctor about the island ferry, too. What about trains?",
    "I said that about basil to my sister as well. And parsley?",
    "You didn't disappoint: I know the capital of Mongolia now. And of Nepal?",
    "That's not bad at all for an apple tree. What about roses?",
    "That's not a problem, stale bread makes good toast. What about rice?",
    "No, that's all about candle wax. What about ink?",
    "Nope, all good with the bicycle chain. What about the brakes?",
    "Not quite sure what a planet is. Can you explain?", "No further questions on green tea. What about coffee?",
    "Wrong answers only: who painted the ceiling?", "I told you the door was old, right? How old can a door get?",
    "You forgot nothing about the telescope, well done. What about maps?",
]  # fmt: skip


def talked(*said):
    """Return a talk, user first, as rows of messages."""
    return {
        "messages": [
            {"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), said)
        ]
    }


def question(turn):
    """Return a question that has the longer words of a turn."""
    return "Explain, please: " + " ".join(re.findall(r"\w{5,}", turn))


def corrected(tmp_path, turns, *end):
    talks = [talked(question(turn), BAD, turn, GOOD, *(end or ("Thanks!", BYE))) for turn in turns]
    return run(tmp_path, {"in.jsonl": talks}, "--corrections")


def test_corrections_are_found(tmp_path):
    """Of 25 clear complaints at least 18; of ordinary turns that look like one none, of rarer ones a quarter at most."""
    found = {texts(row)[0][0]: texts(row)[1:] for row in corrected(tmp_path / "0", CORRECTIONS).rows}
    assert len(found) >= 18 and set(found.values()) == {(GOOD, BAD)} and found.keys() <= set(map(question, CORRECTIONS))
    assert not pairs(corrected(tmp_path / "1", NOT_CORRECTIONS))
    assert len(corrected(tmp_path / "2", FURTHER).rows) <= 3


@pytest.mark.parametrize("lead", ["You're right. ", "You’re absolutely right! ", "Sorry about that. ", "My apologies. ", "My mistake! ",
    "I apologize for the confusion. ", "Good catch! ", "I'm sorry for the mistake. ", "You're right! My mistake. "])  # fmt: skip
def test_apologies_are_cut_off(lead, tmp_path):
    done = run(
        tmp_path, {"in.jsonl": [talked(Q, BAD, "No, that's wrong.", lead + GOOD, "Thanks!", BYE)]}, "--corrections"
    )
    assert pairs(done) == [([Q], GOOD, BAD)]


WRONG = f"No, that's wrong. {Q}"
NO_PAIRS = [
    (Q, BAD, WRONG, "Which island do you mean?", "Rottnest.", BYE), (Q, BAD, WRONG, "I'm sorry, but I can't help.", "Pity.", BYE),
    (Q, BAD, WRONG, BAD, "Thanks", BYE), (Q, BAD, WRONG, "You're right.", "Thanks", BYE), (Q, BAD, WRONG), (WRONG, GOOD, "Thanks", BYE),
    (Q, BAD, WRONG, GOOD, "No, that's still the wrong pier.", BYE), (Q, BAD, "No, do it differently, with more sugar.", GOOD, "Thanks", BYE),
    (Q, BAD, "No, use pnpm instead.", GOOD, "Thanks", BYE), (Q, BAD, "No, I said so.", GOOD, "Thanks", BYE),
]  # fmt: skip


@pytest.mark.parametrize("said", NO_PAIRS)
def test_conditions_of_a_correction(said, tmp_path):
    other = "How do I keep basil alive?"
    done = run(tmp_path, {"in.jsonl": [talked(*said), talked(other, BAD, WRONG, GOOD, MORE, BYE)]}, "--corrections")
    assert [texts(row)[0] for row in done.rows] == [[other]] and done.rows[0]["weight"] == 0.2, "0.4 with thanks"


# ------------------------------------------------------------------------------------------------------- broken input

DAMAGE = [None, 7, "text", ["x"], {"a": 1}]  # put in the place of each value, one at a time


def places(data, above=()):
    """Yield the path of each value inside of nested dicts and lists."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


@pytest.mark.parametrize("write", [chatgpt, webui, code, codex])
def test_every_value_damaged(write, tmp_path):
    """Null and other types anywhere: no traceback, no text of another type, and the row beside it keeps its pair."""
    [(name, records)] = write(retry()[:4]).items()
    for number, (place, value) in enumerate(itertools.product(places(records), DAMAGE)):
        copy = json.loads(json.dumps(records))
        inner = copy
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        chats = build.Chats()
        for line, record in enumerate(copy if isinstance(copy, list) else [copy]):
            chats.give(record, "file", line)
        for chat in chats.logs.values():
            chats.keep(chat)
        rows, _ = build.make_rows(chats, build.parse_args([str(tmp_path), "--out", "x", "--corrections"]))
        assert all(isinstance(text, str) for row in rows for text in sides(row)), (place, value)
    assert number > 100


@pytest.mark.parametrize("fields", [dict(chosen=""), dict(rejected={}), dict(prompt=""), dict(prompt=[]), dict(chosen=[None]),
    dict(chosen=[{"role": "assistant"}]), dict(prompt="\u200b"), dict(prompt=[{"role": "user", "content": None}])])  # fmt: skip
def test_empty_sides(fields, tmp_path):
    done = run(tmp_path, {"in.jsonl": [pair(0) | fields, pair(1)]})
    assert len(done.rows) == 1 and sum(table(done.report, "what became").values()) == 2, done.report


@pytest.mark.parametrize("data", [b"", b"\x00" * 99, b"{", b"[", b'"a"', b"{}", b"[[[[", b"not json", b"PK\x03\x04broken", b"\x1f\x8bno",
    b"SQLite format 3\x00" + bytes(99), json.dumps([1, None, "x", [], {}]).encode(), b'{"a": ' * 20_000, b"\xff\xfe\x00"])  # fmt: skip
def test_broken_file(data, tmp_path):
    """No traceback, exit 1 when it is alone; the file beside it counts."""
    assert run(tmp_path / "0", {"a.json": data}).code == 1
    assert len(run(tmp_path / "1", {"a.json": data, "b.jsonl": [pair(0)]}).rows) == 1


def test_lists_that_break_off_and_other_letters(tmp_path):
    records = chats(*((f"{Q} ({i})",) for i in range(6)))["conversations.json"]
    text = json.dumps(records)
    done = run(tmp_path / "0", {"c.json": text[: int(len(text) * 0.8)]})
    assert len(done.rows) == 4 and "- 1 broken, or of no known kind: []" in done.report
    assert len(run(tmp_path / "1", {"c.json": text.encode("utf-16")}).rows) == 6
    assert len(run(tmp_path / "2", {"c.json": json.dumps(records, indent=2)}).rows) == 6
    assert len(run(tmp_path / "4", {"c.json": json.dumps(records[0], indent=2)}).rows) == 1
    done = run(tmp_path / "3", chats((f"{Q} \ud83d", f"{BAD} \ud83d", f"{GOOD} \x1b[2J \udfff")))
    assert len(done.rows) == 1 and "\x1b" not in done.text and "\ud83d" not in str(done.rows)


def test_links_of_a_tree(tmp_path):
    """Rings, parents that are gone, a tree of 20,000 nodes: neither endless nor too deep."""
    for number, links in enumerate(
        ({"u": "u"}, {"u": "y"}, {"a": "b", "b": "a"}, {"b": "gone"}, dict.fromkeys("uabmy"))
    ):
        files = chatgpt(retry())
        for key, parent in links.items():
            files["conversations.json"][0]["mapping"][key]["parent"] = parent
        done = run(tmp_path / str(number), files | {"in.jsonl": [pair(0)]})
        assert ([pair(0)["prompt"]], GOOD, BAD) in pairs(done)
    chain = [(str(i), str(i - 1) if i else None, ("user", "assistant")[i % 2], f"Say {i}.", {}) for i in range(20_000)]
    last = [(key, parent or "19999", *rest) for key, parent, *rest in retry()]
    assert len(run(tmp_path / "long", webui(chain + last)).rows) == 1


# --------------------------------------------------------------------------------------------- archives and databases


@pytest.mark.parametrize("name", ["../c.json", "a/../../b.json", "/etc/c.json", "..\\b.json", "C:/b.json"])
def test_member_outside(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(name, json.dumps(chats((Q,))["conversations.json"]))
    done = run(tmp_path, {"x.zip": (tmp_path / "x.zip").read_bytes(), "in.jsonl": [pair(0)]})
    assert len(done.rows) == 1 and "x.zip: not read: it has members outside" in done.text
    assert "- 1 a file, or the rest of one, that could not be read" in done.report


def test_bombs(tmp_path, monkeypatch):
    """More than so many bytes, and a .gz a hundred deep: refused."""
    monkeypatch.setattr(build, "UNPACKED", 2**20)
    deep, large = b"[]", json.dumps([pair(9, "a" * 2**20)]).encode()
    for _ in range(100):
        deep = gzip.compress(deep, 1)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", large)
    files = {
        "in.jsonl": [pair(0)],
        "a.zip": (tmp_path / "z.zip").read_bytes(),
        "b.gz": gzip.compress(large),
        "c.gz": deep,
    }
    done = run(tmp_path, files | {"d.gz": gzip.compress(json.dumps([pair(1)]).encode())})
    assert len(done.rows) == 2 and done.text.count("more than 8 GB or archives in archives") == 3


def test_databases(tmp_path):
    """One that another program has open, or writes to, is read and left alone; another program's is refused by a line."""
    [data] = hermes(retry()).values()
    save(tmp_path / "in", {"state.db": data})
    base = sqlite3.connect(tmp_path / "in" / "state.db")
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("UPDATE messages SET content = content || ' Truly.' WHERE role = 'assistant'")
    base.commit()
    base.execute("BEGIN EXCLUSIVE")
    base.execute("UPDATE messages SET content = 'never said'")
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir() if "-shm" not in path.name}
    done = run(tmp_path, {})
    assert pairs(done) == [([Q], f"{GOOD} Truly.", f"{BAD} Truly.")]
    assert all(path.read_bytes() == data for path, data in before.items())
    base.close()
    for number, change in enumerate(("DROP TABLE messages", "ALTER TABLE sessions RENAME TO chats")):  # as Ollama's
        base = sqlite3.connect(":memory:")
        base.deserialize(data)
        base.execute(change)
        done = run(tmp_path / str(number), {"state.db": base.serialize(), "in.jsonl": [pair(0)]})
        assert len(done.rows) == 1 and "state.db: not read: no such table" in done.text


# --------------------------------------------------------------------------------------------------------- the folder

SCRIPT = [sys.executable, str(ROOT / "build_dpo_pairs.py")]


def shell(folder, *words, **options):
    return subprocess.run([*SCRIPT, *map(str, words)], cwd=folder, capture_output=True, text=True, **options)


@pytest.mark.parametrize("words", [[], ["gone"], ["in", "--held-out", "0.5"],
    ["in", "--out", "in"], ["in", "--out", "in/../in"], ["in", "--out", "in/a.jsonl"], ["in/a.jsonl", "--out", "."], ["in", "--what"],
    ["in", "--out", "in/a.jsonl/b"]])  # fmt: skip
def test_wrong_words(words, tmp_path):
    """One line on stderr, exit status 1, nothing written."""
    save(tmp_path / "in", {"a.jsonl": [pair(0)]})
    done = shell(tmp_path, *words)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "in"]


def test_earlier_output_moves_aside_and_is_no_source(tmp_path):
    save(tmp_path, {"a.jsonl": [pair(0)]})
    for number in range(3):
        done = shell(tmp_path, ".", "--out", "out/")
        assert done.returncode == 0 and len(read_rows(tmp_path / "out" / "train.jsonl")) == 1, done.stderr
        assert ("The earlier out is now out-" in done.stdout) == (number > 0)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out", "out-1", "out-2"}
    before = sorted(tmp_path.rglob("*"))
    assert "1 pairs" in shell(tmp_path, ".", "--dry-run").stdout and sorted(tmp_path.rglob("*")) == before


KILLER = """
import os, runpy, sys
made, step = 0, int(sys.argv[1])
def hook(event, args):
    global made
    made += event in ("open", "os.mkdir", "os.rename") and ("unfinished" in str(args) or event == "os.rename")
    if made == step:
        os._exit(9)
sys.addaudithook(hook)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_folder_is_whole_or_absent(tmp_path):
    """Killed at each step of writing, the earlier folder is still whole, under one name or the other."""
    save(tmp_path, {"a.jsonl": [pair(i) for i in range(30)]})
    shell(tmp_path, "a.jsonl", "--out", "out")
    before, killed = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}, 0
    for step in range(1, 12):
        words = [sys.executable, "-c", KILLER, str(step), SCRIPT[1], "a.jsonl", "--out", "out"]
        killed += subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 9
        for folder in (path for path in tmp_path.glob("out*")):
            assert len({path.name for path in folder.iterdir()}) == 4, (step, folder)
            assert sum(len(read_rows(path)) for path in folder.glob("*.jsonl")) == 30
        held = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in tmp_path.glob("out*")]
        assert before in held
    assert killed >= 5 and shell(tmp_path, "a.jsonl", "--out", "out").returncode == 0


def test_a_full_disk(tmp_path):
    """One line, and the earlier folder stays."""
    save(tmp_path, {"a.jsonl": [pair(i, f"{LONG} {i}", f"{OTHER} {i}") for i in range(300)], "out/mine.txt": "x"})
    command = f"ulimit -f 64; exec {' '.join(SCRIPT)} a.jsonl --out out"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr and os.listdir(tmp_path / "out") == ["mine.txt"]


# ----------------------------------------------------------------------------------------------------- large sources

FILLER = "Whoever walks along the shore sees it from afar, and more than once a day. "
PEAK = "import os, sys\npid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])\n_, status, used = os.wait4(pid, 0)\n"
PEAK += "print(os.waitstatus_to_exitcode(status), used.ru_maxrss // 1024, used.ru_utime)"


def large(write, talks, turns):
    """Return the records of talks of so many turns, each tenth question answered twice."""
    for number in range(talks):
        nodes, last = [], None
        for i in range(turns):
            nodes.append((f"{number}-{i}", last, "user", f"Question {i} of {number}: how far is it?", {}))
            nodes += [(f"{number}-{i}b", f"{number}-{i}", "assistant", f"I would not know, {number}, {i}.", {})] * (
                i % 10 == 0
            )
            last = f"{number}-{i}a"
            nodes.append((last, f"{number}-{i}", "assistant", f"{number * i} miles. {FILLER * 2}", {}))
        yield write(nodes)


LARGE = {
    "many chats": lambda: {
        "c.json": [{**chat, "id": i} for i, f in enumerate(large(webui, 5000, 10)) for chat in f["chat-export.json"]]
    },
    "long chats": lambda: {
        "c.json": [{**chat, "id": i} for i, f in enumerate(large(webui, 10, 5000)) for chat in f["chat-export.json"]]
    },
    "logs": lambda: {
        f"{i}.jsonl": f["projects/s.jsonl"] for i, f in enumerate(large(lambda nodes: code(nodes), 1000, 50))
    },
    "rows": lambda: {"r.jsonl": [pair(i % 4, f"{i} {FILLER}", f"Nobody knows it, case {i}.") for i in range(50_000)]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_hundred_thousand_messages(name, tmp_path):
    """In whatever shape: 20 s of work and 1 GB."""
    save(tmp_path / "in", LARGE[name]())
    words = [sys.executable, "-c", PEAK, *SCRIPT, "in", "--out", "out"]
    done = subprocess.run(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    status, peak, seconds = map(float, done.stdout.split()[-3:])
    assert status == 0 and peak < 1000 and seconds < 20, done.stdout[-200:]
