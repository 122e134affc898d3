"""Every source of build_dpo_pairs.py: small samples written from the schemas alone, and the pairs that they hold.

One talk, a question answered twice (RETRY) or put right by a complaint (TALK), is written as each program writes it. The
kinds of fault that people met are tables below: what a program puts into a record, and whether a pair may come of it.
"""

import contextlib
import gzip
import io
import json
import re
import sqlite3
import subprocess
import sys
import zipfile
from collections import namedtuple
from unittest.mock import patch

import pytest
from conftest import ROOT

import build_dpo_pairs as build

Q = "Which pier does the ferry leave from?"
BAD, GOOD = "From the old fish market.", "The north pier, by the lighthouse."
MORE, BYE, SECRET = "Lovely, and when does it come back?", "At six in the evening.", "Quokkafish"
SENTINEL = "00000000-0000-4000-8000-000000000000"
Done = namedtuple("Done", "code text rows report")


def read_rows(*paths):
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text("utf-8").split("\n") if line]


def save(folder, files):
    """Write {name: records}: JSONL if the name says so, text and bytes as they are, anything else as JSON."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl") and isinstance(data, list):
            data = "".join(json.dumps(row) + "\n" for row in data)
        if not isinstance(data, bytes):
            data = (data if isinstance(data, str) else json.dumps(data)).encode()
        path.write_bytes(data)
    return folder


def run(tmp_path, files, *words):
    """Run the script in this process on files, {name: records}; return what it said and wrote."""
    source, out, code = save(tmp_path / "in", files), tmp_path / "out", 0
    said, argv = io.StringIO(), ["build_dpo_pairs.py", str(source), "--out", str(out), *map(str, words)]
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            build.main()
        except SystemExit as stop:
            code = 1
            said.write(f"{stop.code}\n")
    rows = read_rows(*(out / f"{name}.jsonl" for name in ("train", "valid", "test")))
    report = (out / "report.md").read_text("utf-8") if (out / "report.md").exists() else ""
    assert "Traceback" not in said.getvalue(), said.getvalue()
    return Done(code, said.getvalue(), rows, report)


def texts(row):
    return [m["content"] for m in row["prompt"]], row["chosen"][0]["content"], row["rejected"][0]["content"]


def pairs(done):
    return [texts(row) for row in done.rows]


# ----------------------------------------------------------------------------------------------------------- writers
# a node: key, parent, role, text, fields of its record


def retry(q=Q, bad=BAD, good=GOOD, **fields):
    """Return a question that was answered again, and gone on from the second answer; fields: {key: of its record}."""
    nodes = [("u", None, "user", q), ("a", "u", "assistant", bad), ("b", "u", "assistant", good)]
    nodes += [("m", "b", "user", MORE), ("y", "m", "assistant", BYE)]
    return [(*node, fields.get(node[0], {})) for node in nodes]


def chatgpt(nodes):
    mapping = {}
    for key, parent, role, text, more in nodes:
        message = {"id": key, "author": {"role": role}, "create_time": 1.7e9 + len(mapping), "recipient": "all"}
        message |= {"content": {"content_type": "text", "parts": [text]}, "status": "finished_successfully"}
        message |= {"end_turn": True if role == "assistant" else None, "weight": 1.0, "metadata": {}} | more
        kids = [other[0] for other in nodes if other[1] == key]
        mapping[key] = {"id": key, "parent": parent, "children": kids, "message": message}
    chat = {"id": "c1", "conversation_id": "c1", "title": SECRET, "update_time": 1.7e9, "mapping": mapping}
    return {"conversations.json": [chat | {"current_node": nodes[-1][0]}]}


def claude(nodes):
    said = lambda text: [{"type": "thinking", "thinking": SECRET}, {"type": "text", "text": text, "citations": []}]
    messages = [
        {"uuid": key, "sender": "human" if role == "user" else role, "text": "", "content": said(text), "files": []}
        | {"parent_message_uuid": parent or SENTINEL, "created_at": f"2025-03-01T10:00:{i:02}Z", "attachments": []} | more
        for i, (key, parent, role, text, more) in enumerate(nodes)
    ]  # fmt: skip
    return {"conversations.json": [{"uuid": "c1", "name": SECRET, "chat_messages": messages}]}


def webui(nodes, **outer):
    messages = {
        key: {"id": key, "parentId": parent, "role": role, "content": text, "timestamp": 1.7e9 + i, "files": []} | more
        for i, (key, parent, role, text, more) in enumerate(nodes)
    }
    inner = {"title": SECRET, "params": {"system": SECRET}, "files": [], "messages": []} | outer
    inner["history"] = {"currentId": nodes[-1][0], "messages": messages}
    return {"chat-export.json": [{"id": "c1", "user_id": "u", "updated_at": 1.7e9, "chat": inner}]}


def twice(nodes):
    """Return nodes in which a second answer follows a second copy of its question, as logs have it."""
    seen, renamed = set(), {}
    for key, parent, role, text, more in nodes:
        if role == "assistant" and parent in seen:
            asked = next(node for node in nodes if node[0] == parent)
            renamed[parent] = renamed.get(parent, parent) + "2"
            yield (renamed[parent], *asked[1:])
        seen.add(parent)
        yield key, renamed.get(parent, parent), role, text, more


def code(nodes, extra=()):
    """Write a Claude Code session; extra: (after which key, record)."""
    records = []
    for i, (key, parent, role, text, more) in enumerate(twice(nodes)):
        message = {"role": role, "content": text, "id": f"msg_{key}", "model": "m"}
        record = {"parentUuid": parent, "isSidechain": False, "sessionId": "s", "type": role, "uuid": key}
        records.append(record | {"timestamp": f"2026-05-02T10:{i:02}:00Z", "version": "2", "message": message} | more)
        records += [{"sessionId": "s", **new} for after, new in extra if after == key]
    return {"projects/s.jsonl": records}


def codex(nodes, extra=()):
    lines = [("session_meta", {"id": "s", "cwd": "/srv", "source": "cli", "instructions": SECRET})]
    last = None
    for key, parent, role, text, more in twice(nodes):
        if role == "user" and last and parent != last:
            lines.append(("event_msg", {"type": "thread_rolled_back", "num_turns": 1}))
        kind = "output_text" if role == "assistant" else "input_text"
        item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}]} | more
        lines += [("response_item", item), *((new[0], new[1]) for after, *new in extra if after == key)]
        last = key
    return {"sessions/r.jsonl": [{"timestamp": "2026-05-02T10:00:00Z", "type": t, "payload": p} for t, p in lines]}


def hermes(nodes):
    """Return a Hermes state.db in which the first answer was taken back."""
    base = sqlite3.connect(":memory:")
    base.execute("CREATE TABLE sessions (id TEXT, source TEXT, model TEXT, system_prompt TEXT, started_at REAL)")
    base.execute(
        "CREATE TABLE messages (id INTEGER PRIMARY KEY, session_id TEXT, role TEXT, content TEXT, tool_calls TEXT,"
        " timestamp REAL, finish_reason TEXT, observed DEFAULT 0, active DEFAULT 1, compacted DEFAULT 0, display_kind,"
        " display_metadata, attachments)"
    )
    base.execute("INSERT INTO sessions VALUES (?, 'cli', 'hermes-4', ?, 1)", [f"s{nodes[0][0]}", SECRET])
    nodes = list(twice(nodes))
    parents, key, live = {node[0]: node[1] for node in nodes}, nodes[-1][0], set()
    while key and key not in live:
        live.add(key)
        key = parents.get(key)
    for i, (key, _, role, text, more) in enumerate(nodes):
        row = {"session_id": f"s{nodes[0][0]}", "role": role, "content": text, "timestamp": 1.7e9 + i}
        row |= {"active": int(key in live)} | more
        base.execute(f"INSERT INTO messages ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
    base.commit()
    return {"state.db": base.serialize()}


def studio(nodes):
    """Write an LM Studio conversation: a list of turns, each with its versions; what follows them is of all."""
    parents, shown, level, turns = {node[0]: node[1] for node in nodes}, {nodes[-1][0]}, [None], []
    while {parents[key] for key in shown} - {None} - shown:
        shown |= {parents[key] for key in shown} - {None}
    while found := [node for node in nodes if node[1] in level]:
        versions = []
        for key, _, role, text, more in found:
            block = lambda text, **facts: {"type": "contentBlock", "content": [{"type": "text", "text": text}]} | facts
            steps = [block(SECRET, style={"type": "thinking", "ended": True}), {"type": "status", "text": SECRET}]
            steps += [
                block(text, genInfo={"stats": {"stopReason": "eosFound"}}),
                {"type": "debugInfoBlock", "debugInfo": SECRET},
            ]
            said = {"content": [{"type": "text", "text": text}]} if role == "user" else {"steps": steps}
            versions.append({"type": "singleStep", "role": role, **said} | more)
        turns.append({"versions": versions, "currentlySelected": [node[0] in shown for node in found].index(True)})
        level = [node[0] for node in found]
    return {"1.conversation.json": {"name": SECRET, "userFilesSizeBytes": 0, "systemPrompt": SECRET, "messages": turns}}


WRITERS = [chatgpt, claude, webui, code, codex, hermes, studio]


@pytest.mark.parametrize("write", WRITERS)
def test_a_question_answered_again(write, tmp_path):
    """The answer that was gone on from is the better one; the source is named, read only, and nothing hidden is copied."""
    files = write(retry())
    done = run(tmp_path, files)
    assert pairs(done) == [([Q], GOOD, BAD)], done.text
    names = {chatgpt: "chatgpt", claude: "claude", webui: "open-webui", code: "claude-code", studio: "lm-studio"}
    row = done.rows[0]
    assert (row["signal"], row["weight"], row["source"]) == ("regenerate", 0.7, names.get(write, write.__name__))
    assert SECRET not in done.text + done.report and save(tmp_path / "same", files)
    for path in (tmp_path / "same").rglob("*.*"):
        assert (
            path.is_dir() or (tmp_path / "in" / path.relative_to(tmp_path / "same")).read_bytes() == path.read_bytes()
        )


@pytest.mark.parametrize("write", WRITERS)
def test_an_edited_question_gives_no_pair(write, tmp_path):
    nodes = retry()
    nodes[2:3] = [("v", None, "user", "How do I keep basil alive?", {}), ("b", "v", "assistant", GOOD, {})]
    done = run(tmp_path, write(nodes))
    why = "a prompt that was edited" if write is studio else "one answer, no other to compare"
    assert done.code == 1 and not done.rows and why in done.text


def test_the_newer_copy_of_a_conversation_counts(tmp_path):
    """By its time of change, not by the order of the files."""
    new, old = (chatgpt(nodes)["conversations.json"][0] for nodes in ([*retry()[:1], *retry()[2:0:-1]], retry()[:3]))
    done = run(tmp_path, {"a.json": [new | {"update_time": 2.0}], "b.json": [old | {"update_time": 1.0}]})
    assert pairs(done) == [([Q], BAD, GOOD)]


def test_versions_of_an_answer(tmp_path):
    """The one on show may be the older one, or be out of range; one that was stopped, or is a file, is none."""
    older = [*retry()[:1], *retry()[2:0:-1], *retry()[3:]]
    assert pairs(run(tmp_path / "0", studio(older))) == [([Q], GOOD, BAD)]
    files = studio(retry()[:3])
    files["1.conversation.json"]["messages"][1]["currentlySelected"] = 7
    done = run(tmp_path / "1", files)
    assert pairs(done) == [([Q], GOOD, BAD)] and done.rows[0]["weight"] == 0.35
    for i, reason in enumerate(("userStopped", "maxPredictedTokensReached", "failed")):
        steps = [{"type": "contentBlock", "content": PART(BAD), "genInfo": {"stats": {"stopReason": reason}}}]
        assert run(tmp_path / reason, studio(retry(a={"steps": steps}))).code == 1
    done = run(tmp_path / "2", studio(retry(u={"content": [{"type": "file", "name": "a.pdf"}, *PART(Q)]})))
    assert done.code == 1 and "a prompt with, or after, a picture" in done.text


TALK = [("Which month comes before August?", "September comes before August.")]
TALK += [("No, that's wrong. Which month comes before August?", "Sorry, my mistake. July does.")]
TALK += [("Thanks!", "Welcome.")]
LINE = [{"role": role, "content": text} for turn in TALK for role, text in zip(("user", "assistant"), turn)]
SHARE = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in LINE]
TIMMY = [{**m, "type": "message", "timestamp": "2026-05-02T10:00:00"} for m in LINE]
TIMMY = [m | {"role": "timmy"} if m["role"] == "assistant" else m for m in TIMMY]
CHAIN = [(str(i), str(i - 1) if i else None, m["role"], m["content"], {}) for i, m in enumerate(LINE)]
LINES = {
    "openai": {"rows.jsonl": [{"messages": [{"role": "system", "content": SECRET}, *LINE]}]},
    "sharegpt": {"rows.jsonl": [{"id": 1, "conversations": [{"from": "system", "value": SECRET}, *SHARE]}]},
    "timmy": {"logs/day.jsonl": [*TIMMY[:1], {"type": "tool_call", "tool": "sh", "result": SECRET, "timestamp": 1}, *TIMMY[1:]]},
    "hermes": {"sessions/20260101.jsonl": LINE},
    "hermes trajectories": {"t.jsonl": [{"conversations": SHARE, "completed": False, "timestamp": "x", "model": "m"}]},
    "hermes sessions": {"s.json": {"session_id": "s", "session_start": "x", "system_prompt": SECRET, "messages": LINE}},
    "hermes export": {"e.jsonl": [{"id": "s", "source": "cli", "started_at": 1.0, "messages": LINE}]},
    "claude": {"old.json": [{"uuid": "c", "chat_messages": [{"sender": m["role"], "text": m["content"]} for m in LINE]}]},
    "claude-code": code(CHAIN), "codex": codex(CHAIN), "chatgpt": chatgpt(CHAIN), "open-webui": webui(CHAIN),
    "lm-studio": studio(CHAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_complaint_and_the_answer_after_it(name, tmp_path):
    """With --corrections alone; the apology is no part of the better answer, the complaint none of the prompt."""
    done = run(tmp_path, LINES[name], "--corrections")
    assert pairs(done) == [([TALK[0][0]], "July does.", TALK[0][1])], done.text
    assert (done.rows[0]["signal"], done.rows[0]["weight"]) == ("correction", 0.4)
    assert done.rows[0]["source"] == name.split()[0] and SECRET not in done.report
    assert run(tmp_path, LINES[name]).code == 1


def test_ratings_and_choices(tmp_path):
    """A thumb outranks what is on show, a choice a thumb; two thumbs of a kind, and no choice, are ties."""
    asked = {"paragen_variants_info": {"num_variants_in_stream": 2}, "paragen_variant_choice": "a"}
    files = chatgpt(retry(u={"metadata": asked}))
    files["message_feedback.json"] = [{"id": "a", "conversation_id": "c1", "rating": "thumbs_down"}]
    done = run(tmp_path / "0", files)
    assert pairs(done) == [([Q], BAD, GOOD)] and done.rows[0]["signal"] == "comparison"
    del asked["paragen_variant_choice"]
    assert run(tmp_path / "1", chatgpt(retry(u={"metadata": asked}))).code == 1
    thumbs = [{"message_id": "b", "conversation_id": "c1", "rating": "thumbsDown", "content": "{bad"}]
    done = run(tmp_path / "2", chatgpt(retry()) | {"message_feedback.json": thumbs})
    assert pairs(done) == [([Q], BAD, GOOD)] and done.rows[0]["signal"] == "rating"
    box = {"original_turn": [{"id": "a"}], "new_turn": [{"id": "b"}], "completion_comparison_rating": "original"}
    done = run(tmp_path / "3", chatgpt(retry()) | {"model_comparisons.json": [{"output": {"feedback_step_2": box}}]})
    assert pairs(done) == [([Q], BAD, GOOD)] and done.rows[0]["signal"] == "comparison"
    files = {"f.json": [{"output": {"feedback_step_2": box | {"completion_comparison_rating": "same"}}}]}
    assert run(tmp_path / "4", chatgpt(retry()) | files).code == 1
    liked = {"annotation": {"rating": 1}}
    assert not run(tmp_path / "5", webui(retry(a=liked, b=liked))).rows
    vote = {"type": "rating", "data": {"rating": "-1"}, "meta": {"message_id": "b", "chat_id": "c1"}, "snapshot": None}
    done = run(tmp_path / "6", webui(retry()) | {"feedback.json": [vote]})
    assert pairs(done) == [([Q], BAD, GOOD)] and done.rows[0]["signal"] == "rating"


# ------------------------------------------------------------------------------------------- kinds of fault, by table

PART = lambda text: [{"type": "text", "text": text}]
CALLED = [
    {"type": "reasoning", "content": [{"type": "output_text", "text": SECRET}]},
    {"type": "message", "content": PART("I look.")},
]
CALLED += [
    {"type": "function_call", "name": "search", "arguments": "{}"},
    {"type": "function_call_output", "output": PART(SECRET)},
]
VOICE = lambda text: {"content": {"content_type": "multimodal_text", "parts": [
    {"content_type": "audio_transcription", "text": text, "direction": "in"},
    {"content_type": "real_time_user_audio_video_asset_pointer", "frames_asset_pointers": []}]}}  # fmt: skip
ANSWER = lambda text: {"type": "message", "content": [{"type": "output_text", "text": text}]}
OUTPUT = lambda text: {"content": "", "output": [*CALLED, ANSWER(text)]}
TRL = {"prompt": [{"role": "user", "content": PART(Q)}]}
TRL |= {side: [{"role": "assistant", "content": PART(text)}] for side, text in (("chosen", GOOD), ("rejected", BAD))}
TEXT_IN_BLOCKS = {  # where programs keep the text of a message
    "webui output": webui(retry(bad="", good="", a=OUTPUT(BAD), b=OUTPUT(GOOD))),
    "webui output of a user and of an older answer": webui(retry(q="", u={"content": PART(Q)}, b=OUTPUT(GOOD))),
    "webui details": webui(retry(good=f'<details type="reasoning">{SECRET}</details>\n{GOOD}')),
    "chatgpt voice": chatgpt(retry(u=VOICE(Q), a=VOICE(BAD), b=VOICE(GOOD))),
    "chatgpt objects": chatgpt(retry(u={"content": {"content_type": "text", "parts": PART(Q)}})),
    "claude old text": claude(retry(a={"content": [], "text": BAD}, b={"content": None, "text": GOOD})),
    "claude tools": claude(retry(b={"content": [*PART("I look."), {"type": "tool_use", "name": "web_search"},
        {"type": "tool_result", "content": PART(SECRET)}, *PART(GOOD)]})),
    "code blocks": code(retry(u={"message": {"role": "user", "content": PART(Q)}})),
    "codex blocks": codex(retry(b={"content": [{"type": "output_text", "text": GOOD}], "phase": "final_answer"})),
    "hermes blocks": hermes(retry(b={"content": "\x00json:" + json.dumps(PART(GOOD))})),
    "hermes voice": hermes(retry(q=f"[The user sent a voice message~ Here's what they said: \"{Q}\"]")),
    "trl": {"r.jsonl": [TRL]},
    "trl text and parts": {"r.jsonl": [{"prompt": Q, "chosen": PART(GOOD), "rejected": BAD}]},
    "ultrafeedback": {"r.jsonl": [{"prompt": Q, "chosen": TRL["prompt"] + TRL["chosen"], "score_chosen": 9,
        "rejected": TRL["prompt"] + TRL["rejected"], "score_rejected": 2}]},
    "openai": {"r.jsonl": [{"input": {"messages": TRL["prompt"]}, "preferred_output": TRL["chosen"],
        "non_preferred_output": TRL["rejected"]}]},
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_IN_BLOCKS)
def test_text_in_blocks(name, tmp_path):
    done = run(tmp_path, TEXT_IN_BLOCKS[name])
    assert pairs(done) == [([Q], GOOD, BAD)] and SECRET not in done.report, done.text


USER = lambda *blocks: {"message": {"role": "user", "content": [*blocks, *PART(Q)]}}
ATTACHED = {"type": "attachment", "attachment": {"type": "file", "filename": "lease.pdf"}}
ATTACHED |= {"uuid": "f", "parentUuid": "u2"}
BESIDE = {  # a picture, a file, a voice that came with the question
    "chatgpt file": chatgpt(retry(u={"metadata": {"attachments": [{"name": "lease.pdf"}]}})),
    "chatgpt picture": chatgpt(retry(u={"content": {"content_type": "multimodal_text", "parts": [
        {"content_type": "image_asset_pointer", "asset_pointer": "sediment://f"}, Q]}})),
    "chatgpt voice without words": chatgpt(retry(u={"content": {"content_type": "multimodal_text", "parts": [
        {"content_type": "audio_asset_pointer", "asset_pointer": "sediment://f"}]}})),
    "chatgpt camera": chatgpt(retry(u={"content": {"content_type": "multimodal_text", "parts": [Q,
        {"content_type": "real_time_user_audio_video_asset_pointer", "frames_asset_pointers": ["f"]}]}})),
    "claude attachment": claude(retry(u={"attachments": [{"file_name": "a.txt", "extracted_content": SECRET}]})),
    "claude newer field": claude(retry(u={"files_v2": [{"file_kind": "image"}]})),
    "webui file": webui(retry(u={"files": [{"type": "file", "id": "f"}]})),
    "webui file of the chat": webui(retry(), files=[{"type": "collection", "id": "k"}]),
    "webui picture in the text": webui(retry(q=f"{Q} ![](data:image/png;base64,iVBORw0KGgo=)")),
    "code picture": code(retry(u=USER({"type": "image", "source": {}}))),
    "code document": code(retry(u=USER({"type": "document", "source": {}}))),
    "code pasted text": code(retry(q=f"{Q} [Pasted text #1 +20 lines]")),
    "code ids": code(retry(u={"imagePasteIds": [1]})),
    "code record": code([(k, "f" if k == "b" else p, *rest) for k, p, *rest in twice(retry())], [("u2", ATTACHED)]),
    "codex picture": codex(retry(u={"content": [{"type": "input_image", "image_url": "x"}, {"type": "input_text", "text": Q}]})),
    "codex event": codex(retry(), [("u", "event_msg", {"type": "user_message", "local_images": ["/a.png"]}),
        ("u2", "event_msg", {"type": "user_message", "local_images": ["/a.png"]})]),
    "hermes picture": hermes(retry(q=f"[The user sent an image~ Here's what I can see: a boat]\n{Q}")),
    "hermes column": hermes(retry(u={"attachments": '["a.png"]'})),
    "hermes blocks": hermes(retry(u={"content": "\x00json:" + json.dumps([{"type": "image_url"}, *PART(Q)])})),
    "trl picture": {"r.jsonl": [TRL | {"prompt": [{"role": "user", "content": [{"type": "image"}, *PART(Q)]}]}]},
    "trl column": {"r.jsonl": [TRL | {"images": ["a.png"]}]},
    "rows": {"r.jsonl": [{"messages": [{"role": "user", "content": [{"type": "input_audio"}, *PART(Q)]}, *LINE[1:]]}]},
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_lay_beside_a_prompt(name, tmp_path):
    """No pair rests on it, nor on what came after it, and it is counted, also beside other pairs."""
    done = run(tmp_path, BESIDE[name], "--corrections")
    assert done.code == 1 and re.search(r"[1-9]\d* a prompt with, or after, a picture", done.text), (
        pairs(done),
        done.text,
    )
    done = run(tmp_path, {"other.jsonl": [{"prompt": "x y", "chosen": "one", "rejected": "two"}]}, "--corrections")
    assert len(done.rows) == 1 and "a prompt with, or after, a picture" in done.report


MADE = [
    *PART("I write it."),
    {"type": "tool_use", "name": "artifacts", "input": {"content": GOOD}},
    *PART("It stands beside."),
]
ELSEWHERE = {  # the answer is in a document or a picture; its text only says so
    "chatgpt canvas": chatgpt(retry(good="", b={"recipient": "canmore.create_textdoc", "end_turn": False})[:3]
        + [("c", "b", "assistant", "It stands beside.", {}), ("m", "c", "user", MORE, {}), ("y", "m", "assistant", BYE, {})]),
    "chatgpt picture": chatgpt(retry(b={"author": {"role": "tool"}, "content": {"content_type": "multimodal_text",
        "parts": [{"content_type": "image_asset_pointer"}]}})[:3]
        + [("c", "b", "assistant", "Here it is.", {}), ("m", "c", "user", MORE, {}), ("y", "m", "assistant", BYE, {})]),
    "claude artifact": claude(retry(b={"content": MADE})),
    "claude file": claude(retry(b={"content": [{"type": "tool_use", "name": "create_file"}, *PART("It is ready.")]})),
    "webui picture made": webui(retry(b={"content": "", "output": [{"type": "image_generation_call"}, ANSWER("Here.")]})),
    "webui link": webui(retry(good="![Generated Image](/api/v1/files/a/content)")),
    "chatgpt link": chatgpt(retry(good="[Download the letter](sandbox:/mnt/data/letter.docx)")),
    "webui picture": webui(retry(b={"files": [{"type": "image", "url": "x"}]})),
    "code file": code(retry(b={"message": {"role": "assistant", "content": [{"type": "tool_use", "name": "Write"}, *PART("Done.")]}})),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_answer_that_is_elsewhere(name, tmp_path):
    done = run(tmp_path, ELSEWHERE[name])
    assert done.code == 1 and "an answer, or one after it, whose picture, file or document" in done.text, pairs(done)


NOT_WHOLE = {
    "claude's announcement": claude(retry(b={"text": "It stands beside.", "content": MADE[:2]})),
    "chatgpt, cut and gone on with": chatgpt([*retry()[:2], ("c", "u", "assistant", "The", {"end_turn": False,
        "metadata": {"finish_details": {"type": "max_tokens"}}}), ("b", "c", "assistant", GOOD, {}), *retry()[3:]]),
    "chatgpt, not complete": chatgpt(retry(b={"metadata": {"is_complete": False}})),
    "a summary of what is not there": code([(*n[:4], {"isCompactSummary": True} if n[0] == "s" else n[4]) for n in
        [("s", None, "user", "Earlier: tea.", {}), ("k", "s", "assistant", "Yes.", {}), *((k, p or "k", *r) for k, p, *r in retry())]]),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_what_is_not_whole_is_in_no_pair(name, tmp_path):
    done = run(tmp_path, NOT_WHOLE[name])
    assert done.code == 1 and re.search("no whole answer|no person asked|not in its text", done.text), pairs(done)


BEFORE = ["<ide_opened_file>The user opened /a.py</ide_opened_file>\n", "<system-reminder>x</system-reminder>"]
BEFORE += ["<user-prompt-submit-hook>\nok\n</user-prompt-submit-hook>"]
BEFORE += ["<context>a</context><new_thing a='b'>c</new_thing>\n"]


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("write", [code, codex, hermes])
def test_what_a_program_puts_before_the_words(write, before, tmp_path):
    assert pairs(run(tmp_path, write(retry(q=before + Q)))) == [([Q], GOOD, BAD)]


@pytest.mark.parametrize(
    "write, q", [(code, f"<div>a</div> {Q}"), (claude, f"<doc>a</doc> {Q}"), (chatgpt, f"<a-b>c</a-b> {Q}")]
)
def test_what_a_person_typed_stays(write, q, tmp_path):
    assert pairs(run(tmp_path, write(retry(q=q)))) == [([q], GOOD, BAD)]


HARNESS = ["<command-name>/review</command-name>", "<teammate-message id='1'>\nNo, that is wrong.\n</teammate-message>"]
HARNESS += [
    "<task-notification>done</task-notification>\nRead the output file to retrieve the result: /tmp/x",
    "<bash-stdout>a",
]
HARNESS += [
    "Stop hook feedback:\nno",
    "[System note: go on]",
    "Another Claude session sent a message:\n<message>hi</message>",
]


@pytest.mark.parametrize("words", HARNESS)
@pytest.mark.parametrize("write", [code, codex, hermes])
def test_what_nobody_typed(write, words, tmp_path):
    """It is no turn: the answer to it belongs to nobody, and is in no pair and no history."""
    middle = [("0", None, "user", Q, {}), ("1", "0", "assistant", BAD, {}), ("2", "1", "user", words, {})]
    middle += [("3", "2", "assistant", f"{SECRET} is done.", {})]
    after = [(key, parent or "3", *rest) for key, parent, *rest in retry(q="Is it far?")]
    done = run(tmp_path / "0", write(middle + after), "--corrections")
    assert done.code == 1 and "a prompt after words that no person asked for" in done.text, pairs(done)
    wrong = [("4", "3", "user", f"No, that is wrong. {Q}", {}), ("5", "4", "assistant", GOOD, {})]
    assert run(tmp_path / "1", write(middle + wrong), "--corrections").code == 1
    unanswered = [(key, parent or "2", *rest) for key, parent, *rest in retry(q="Is it far?")]
    done = run(tmp_path / "2", write(middle[:3] + unanswered))
    assert pairs(done) == [([Q, BAD, "Is it far?"], GOOD, BAD)], done.text


CALL = {"message": {"role": "assistant", "content": [{"type": "tool_use", "name": "Bash"}]}}
STEPS = [("u", None, "user", Q, {}), ("t", "u", "assistant", "", CALL), ("a", "t", "assistant", BAD, {})]
STEPS += [("v", None, "user", Q, {}), ("b", "v", "assistant", GOOD, {})]
STEPS += [("m", "b", "user", MORE, {}), ("y", "m", "assistant", BYE, {})]
QUEUED = {"type": "attachment", "attachment": {"type": "queued_command", "prompt": "Short."}}
QUEUED |= {"uuid": "q", "parentUuid": "t"}
REMOVED = {"type": "queue-operation", "operation": "remove", "content": "In one line."}
TOLD = [("response_item", {"type": "function_call", "name": "sh"}), ("response_item", {"type": "message", "role": "user",
    "content": [{"type": "input_text", "text": "In one line."}]})]  # fmt: skip
ANSWERED = [("code " + text[:20], code([(k, "r" if k == "a" else p, *rest) for k, p, *rest in STEPS], [("t", {"uuid": "r",
    "parentUuid": "t", "type": "user", "message": {"role": "user", "content": [{"type": "tool_result", "content": text}, *more]}})]))
    for text, more in (("To tell you how to proceed, the user said:\nin Portuguese", ()), ("ok", PART("In Portuguese, please.")),
        ('User has answered your questions: "Which?"="Short"', ()), ("<system-reminder>The user sent a new message", ()))]  # fmt: skip
TOOL = {"role": "tool", "content": "a.py\n\nUser guidance: in one line"}
STEERED = dict(ANSWERED) | {
    "code record": code([(k, "q" if k == "a" else p, *rest) for k, p, *rest in STEPS], [("t", QUEUED)]),
    "code operation": code(STEPS, [("t", REMOVED)]),
    "code other agent": code([(k, "o" if k == "a" else p, *rest) for k, p, *rest in STEPS], [("t", {"uuid": "o", "type": "user",
        "parentUuid": "t", "message": {"role": "user", "content": "<teammate-message>No.</teammate-message>"}})]),
    "codex": codex(retry()[:1] + [("a", "u", "assistant", BAD, {}), *retry()[2:]], [("u", *TOLD[0]), ("u", *TOLD[1])]),
    "hermes": hermes([("u", None, "user", Q, {"active": 0}), ("t", "u", "assistant", "", {"active": 0, "tool_calls": '[{"id": 1}]'}),
        ("r", "t", "tool", TOOL["content"], {"active": 0}), ("a", "r", "assistant", BAD, {"active": 0}), *STEPS[3:]]),
}  # fmt: skip


@pytest.mark.parametrize("name", STEERED)
def test_an_answer_that_was_steered(name, tmp_path):
    done = run(tmp_path, STEERED[name])
    assert not done.rows and re.search("steered|no whole answer", done.text), (pairs(done), done.text)
    if name.startswith("code op"):
        files = code(STEPS, [("t", REMOVED | {"operation": "enqueue"})])
        assert pairs(run(tmp_path / "not", files)) == [([Q], GOOD, BAD)]


def test_two_prompts_in_a_row(tmp_path):
    """The first is left out where its answer is on another branch, no pair rests on it where it was never answered."""
    first = [("0", None, "user", Q, {}), ("1", "0", "assistant", BAD, {}), ("2", "1", "user", "Good.", {})]
    second = [(key, parent or "2", *rest) for key, parent, *rest in retry(q="Is it far?")]
    answered = first + [("3", "2", "assistant", BYE, {})] + second
    assert pairs(run(tmp_path / "0", code(answered))) == [([Q, BAD, "Is it far?"], GOOD, BAD)]
    done = run(tmp_path / "1", code(first + second))
    assert done.code == 1 and "a prompt after one that got no whole answer" in done.text
    again = [(key, parent or "2", *rest) for key, parent, *rest in retry(q="Good.")]
    assert pairs(run(tmp_path / "2", code(first + again))) == [([Q, BAD, "Good."], GOOD, BAD)], "only sent once more"


def test_two_models_at_once(tmp_path):
    """The last answer is on show whatever the person thinks: going on from one is a weak sign, a thumb a strong one."""
    lanes = {"u": {"models": ["x", "y"]}, "a": {"model": "x", "modelIdx": 0}, "b": {"model": "y", "modelIdx": 1}}
    assert run(tmp_path / "0", webui(retry(**lanes)[:3])).code == 1
    assert [row["weight"] for row in run(tmp_path / "1", webui(retry(**lanes))).rows] == [0.35]
    older = {"u": lanes["u"], "a": {"model": "x"}, "b": {"model": "y"}}  # no modelIdx yet
    assert run(tmp_path / "2", webui(retry(**older)[:3])).code == 1
    again = retry(**lanes)[:3] + [("c", "u", "assistant", "By the blue hut.", {"model": "y", "modelIdx": 1})]
    assert pairs(run(tmp_path / "3", webui(again))) == [([Q], "By the blue hut.", GOOD)], "the same model again"
    both = retry(**lanes) + [("n", "a", "user", MORE, {}), ("o", "n", "assistant", BYE, {})]
    assert run(tmp_path / "4", webui(both)).code == 1, "each gone on from"
    rated = lanes | {"a": lanes["a"] | {"annotation": {"rating": 1}}}
    assert pairs(run(tmp_path / "5", webui(retry(**rated)[:3]))) == [([Q], BAD, GOOD)]


# ---------------------------------------------------------------------------------------------------------- data sets

TURNS = lambda *said: "".join(f"\n\n{name}: {text}" for name, text in zip(("Human", "Assistant") * 2, said))
SHP = {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_ratio": 4.0}
WEBGPT = {"question": {"full_text": Q}, "answer_0": BAD, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5}
ULTRA = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "score_chosen": 8.5, "score_rejected": 4.0}
NECTAR = {"prompt": TURNS(Q, ""), "answers": [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]}
DATA = [  # source, row
    ("trl", {"prompt": Q, "chosen": GOOD, "rejected": BAD}),
    ("trl", {side: TRL["prompt"] + TRL[side] for side in ("chosen", "rejected")}),
    ("trl", {"messages": TRL["prompt"], "chosen": {"role": "assistant", "content": GOOD}, "rejected": BAD}),
    ("trl", {"chosen": TURNS(Q, GOOD), "rejected": TURNS(Q, BAD)}),
    ("shp", SHP), ("shp", SHP | {"labels": 1, "human_ref_A": GOOD, "human_ref_B": BAD}),
    ("webgpt", WEBGPT), ("ultrafeedback", ULTRA), ("nectar", NECTAR),
]  # fmt: skip


@pytest.mark.parametrize("name, row", DATA)
def test_data_set(name, row, tmp_path):
    done = run(tmp_path, {"train.jsonl": [row]})
    assert pairs(done) == [([Q], GOOD, BAD)], done.text
    assert (done.rows[0]["source"], done.rows[0]["signal"], done.rows[0]["weight"]) == (name, "dataset", 1.0)


NO_DATA = [  # row, why it gives no pair
    (WEBGPT | {"score_0": 0, "score_1": 0}, "several answers, none preferred"),
    (ULTRA | {"score_chosen": 4.0}, "several answers, none preferred"),
    ({"chosen": TURNS(Q, GOOD, MORE, BYE), "rejected": TURNS(Q, BAD, MORE, BYE)}, "two conversations that part early"),
    ({"prompt": [{"role": "assistant", "content": Q}], "chosen": GOOD, "rejected": BAD}, "ends in no question"),
    ({"prompt": Q, "chosen": GOOD, "rejected": GOOD}, "equal answers"),
    ({"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"}, "ends in no question"),
    ({"instruction": Q, "input": MORE, "chosen": GOOD, "rejected": BAD}, "ends in no question"),
    ({"message_tree_id": "1", "prompt": {"text": Q, "replies": []}}, "of no known kind: ['message_tree_id', 'prompt']"),
    ({"prompt": Q, "response": GOOD, "helpfulness": 4}, "of no known kind: ['prompt', 'response', 'helpfulness']"),
    ({"conv": {"id": "1"}, "messages": [m | {"parent": None} for m in LINE]}, "of no known kind: ['conv', 'messages']"),
]


@pytest.mark.parametrize("row, why", NO_DATA)
def test_a_row_that_is_left_out_is_counted(row, why, tmp_path):
    done = run(tmp_path, {"train.jsonl": [row]})
    assert done.code == 1 and f"1 {why}" in done.text or why in done.text, done.text


def test_histories_of_data_sets(tmp_path):
    """Its system prompt and its thoughts stay."""
    said = (("system", "Be brief."), ("user", Q), ("assistant", GOOD), ("user", MORE))
    talk = [{"role": role, "content": text} for role, text in said]
    row = {"prompt": talk, "chosen": "<think>a</think>Six.", "rejected": "<think>b</think>Seven, or so."}
    done = run(tmp_path, {"train.jsonl": [row]})
    assert pairs(done) == [(["Be brief.", Q, GOOD, MORE], "<think>a</think>Six.", "<think>b</think>Seven, or so.")]


# --------------------------------------------------------------------------------------------------- what all share


def packed(files, how):
    """Return files packed: in a .zip, each in a .gz, in a .zip in a .zip."""
    if how == "gz":
        return {f"{name}.gz": gzip.compress(path.read_bytes()) for name, path in files.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            archive.writestr(f"export/{name}", path.read_bytes())
    return {"export.zip": buffer.getvalue(), "notes.txt": "nothing here"}


@pytest.mark.parametrize("how", ["zip", "gz", "zip in zip"])
@pytest.mark.parametrize("write", [chatgpt, claude, code, codex])
def test_packed(write, how, tmp_path):
    folder = save(tmp_path / "plain", write(retry()))
    files = packed({str(path.relative_to(folder)): path for path in folder.rglob("*.*") if path.is_file()}, how)
    if " in " in how:
        files = packed({"inner.zip": save(tmp_path / "once", files) / "export.zip"}, how)
    assert pairs(run(tmp_path, files)) == [([Q], GOOD, BAD)]


@pytest.mark.parametrize("write", [code, codex])
def test_broken_and_unknown_lines(write, tmp_path):
    """Half a line, a null, a record of next month: all others count, and the report adds them up."""
    [(name, records)] = write(retry()).items()
    lines = [json.dumps(record) for record in records]
    odd = ["null", "7", "[]", "{}", '{"type": "from-next-month", "payload": {"role": "user"}}', '{"a": ']
    done = run(tmp_path, {name: "\n".join([lines[0], *odd, "", *lines[1:], lines[-1][:40]])})
    assert pairs(done) == [([Q], GOOD, BAD)], done.text
    total = int(re.search(r"What became of (\d+) records", done.report)[1])
    assert total == len(lines) + len(odd) + 1


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("write, field", [(chatgpt, "update_time"), (webui, "updated_at")])
def test_of_two_copies_the_larger_one_counts(write, field, newest_first, tmp_path):
    [(_, [old])], [(_, [new])] = (
        write(retry()).items(),
        write([*retry(), ("n", "a", "user", MORE, {}), ("o", "n", "assistant", BYE, {})]).items(),
    )
    copies = [old, new | {field: 1.7e9 + 500}]
    done = run(tmp_path, {f"{i}/chats.json": [copy] for i, copy in enumerate(copies[:: -1 if newest_first else 1])})
    assert pairs(done) == [([Q], BAD, GOOD)] and "- 1 another copy of a conversation" in done.report


def test_the_reader_in_the_docstring(tmp_path):
    """The eight lines that the script's own text shows for a new source are a reader."""
    text = re.search(r'    @reads\("starlog".*?rating=t\["stars"\] - 3\)\n', build.__doc__, re.S)[0]
    assert len(text.splitlines()) <= 8
    script = (ROOT / "build_dpo_pairs.py").read_text()
    head, ruler, tail = script.partition("# " + "-" * 60)  # any place after the readers' helpers will do
    at = script.index("\n\n# ---", script.index("def read_talk"))
    mine = re.sub("^    ", "", text, flags=re.M)
    (tmp_path / "mine.py").write_text(script[:at] + "\n\n" + mine + script[at:])
    tries = [{"said": GOOD, "stars": 5}, {"said": BAD, "stars": 1}]
    save(tmp_path, {"log.jsonl": [{"id": 7, "ask": Q, "tries": tries}, {"id": 8, "ask": Q, "tries": 3}]})
    words = [sys.executable, tmp_path / "mine.py", tmp_path / "log.jsonl", "--out", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [row] = read_rows(tmp_path / "out" / "train.jsonl")
    assert texts(row) == ([Q], GOOD, BAD) and (row["source"], row["signal"]) == ("starlog", "rating")
    assert re.search(r"log\.jsonl:2: TypeError in read_starlog, line \d+: .*not iterable", done.stderr), done.stderr
