# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""
Build preference pairs from a person's chat exports, session logs and preference datasets.

    python build_dpo_pairs.py ~/Downloads/chatgpt-export.zip ~/.claude/projects ~/.hermes/state.db --out my_pairs
    python build_dpo_pairs.py data/sessions --corrections --dry-run        only says what there is

Input: files, folders and .zip or .gz archives of what the readers below know, told by content; they are only read.
Output, in --out: train.jsonl, valid.jsonl, test.jsonl for the trainers, unpaired.jsonl (rated answers without a rival),
report.md, which says of every record that was read what became of it.

A new source is one function among the readers: a test of a record, and the messages of a record that passes. For a log
of lines as {"id": 7, "ask": "...", "tries": [{"said": "...", "stars": 5}, {"said": "...", "stars": 1}]} it is

    @reads("starlog", has("ask", "tries"))
    def read_starlog(chat, r):
        chat.key = r["id"]
        asked = chat.add({"role": "user", "content": r["ask"]})
        for t in r["tries"]:
            answer = {"role": "assistant", "content": t["said"]}
            chat.add(answer, parent=asked, rating=t["stars"] - 3)

Chat.add says what else a message can have. A new data set is one line of ROWS.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import traceback
import unicodedata
import zipfile
from collections import Counter, defaultdict, namedtuple
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------- options

# what a pair says, strongest first, and how much of its loss counts; half of it where the sign is faint
WEIGHTS = {"comparison": 1.0, "rating": 1.0, "dataset": 1.0, "regenerate": 0.7, "correction": 0.4}
RIVALS = 3  # worse answers to one prompt that are paired with its best
HISTORY = 40  # messages before a prompt, at most: the latest
LONGEST = 2**18  # letters of a message: what is longer is in no pair
UNPACKED = 2**33  # bytes that come out of one archive, at most


def parse_args(words):
    """Return the options in words (as sys.argv[1:]); exit with one line if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = lambda problem: sys.exit(f"{Path(__file__).name}: {problem}: --help lists all options")
    add = parser.add_argument
    add("sources", type=Path, nargs="+", help="files, folders or archives, told by what is in them")
    add("--out", type=Path, default="my_pairs", help="output folder; an older one moves aside (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the report, write nothing")
    add("--corrections", action="store_true", help='also pair answers around "no, ...": guesses, listed in the report')
    add("--max-per-chat", type=int, default=10, help="pairs of one conversation (default: %(default)s)")
    add("--held-out", type=float, default=0.1, help="share of valid, and of test (default: %(default)s)")
    add("--no-redact", action="store_true", help="keep keys, e-mails, phone numbers, home folders in the texts")
    add("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    args = parser.parse_args(words)
    if not 0 <= args.held_out < 0.5 or args.max_per_chat < 1:
        parser.error("--held-out is a share from 0 to 0.5, --max-per-chat 1 or more")
    for source in args.sources:
        if not source.exists():
            parser.error(f"there is no {source}")
        if args.out.is_file() or args.out.resolve() in (source.resolve(), *source.resolve().parents):
            parser.error(f"--out {args.out} is a file, or holds a source, which would move aside with it")
    return args


# ------------------------------------------------------------------------------------------------------------- words

# what front ends show folded or not at all: thoughts, tool calls, reminders, citations, pictures
FOLDED = {"<details type=": "</details>", "<think>": "</think>", "<system-reminder>": "</system-reminder>"}
FOLDED["\ue200"] = "\ue201"
HIDDEN = re.compile(
    r"【[^【】†]*†[^【】]*】|This block is not supported on your current device yet\.|```\s*```"
    r"|[\ue000-\uf8ff\u200b\u2060\ufeff]+|data:\w{1,20}/[\w.+-]{1,99};base64,[\w+/=]+"
)
# kinds of blocks: said; neither said nor done; calls of tools; files, or names of fields that hold them
TEXT = ("text", "input_text", "output_text", "message", "audio_transcription", "contentBlock", "refusal")
SILENT = re.compile("think|thought|reason|debug|status", re.I)
CALL = re.compile("tool|call|function|code|command", re.I)
FILE = re.compile("^(?!.*(?:paragen|dictat)).*(?:image|file|document|audio|video|media|attach|asset|pdf|canvas)", re.I)
MARK = re.compile(  # of a picture, a file or a pasted text that came with a prompt
    r"\[(?:Image|Pasted text) #\d|<image(?: name=[^>]*)?>|;base64,|^(?:\[The user sent an? |# Files mentioned by)", re.M
)
MAKES = re.compile(r"canmore|canvas|artifact|(?<!todo)write|create_?file|present_?files|(?<!view_)image|text2im", re.I)
SPOKEN = re.compile(r"\[The user sent a voice message~ Here's what they said: \"(.*?)\"\]", re.S)
BLOCK = re.compile(r"\s*<([a-z][\w-]*)[^<>]*>.*?</\1[^<>]*>\s*", re.I | re.S)
HTML = "a b body button code div em form h1 h2 head html i img input li ol p pre script span style table ul".split()
HARNESS = re.compile(  # how an agent's program begins what it says in the user's place
    r"\s*(?:<[a-z]+[-_]|Caveat: The messages below|Stop hook feedback:|# AGENTS\.md instructions|\[(?:System|SYSTEM)"
    r"|This session is being continued|\[CONTEXT COMPACTION|Review the conversation above and |\[Request interrupted)"
)
# how an answer ends of which a part is missing, in any of the sources
STOPPED = {
    "max_tokens",
    "length",
    "error",
    "content_filter",
    "interrupted",
    "in_progress",
    "finished_partial_completion",
}
STOPPED |= {"user_canceled", "userStopped", "maxPredictedTokensReached", "contextLengthReached", "failed"}
GOOD = ("1", "thumbsup", "👍", "❤", "🎉", "🔥", "💯")
BAD = ("-1", "thumbsdown", "👎", "😠")
BESIDE = "a prompt with, or after, a picture, file, document or voice that is not in its text"
ELSEWHERE = "an answer, or one after it, whose picture, file or document is not in its text"
STEERED = "an answer, or one after it, that was steered while it was written"
NOBODY = "a prompt after words that no person asked for"
MACHINE = "a session that no person led"
WITH_FILE = {"user": BESIDE, "assistant": ELSEWHERE}


def items(value, kind=dict):
    """Return the elements of a list that are of a kind; an empty list where there is none."""
    return [x for x in value if isinstance(x, kind)] if isinstance(value, list) else []


def part(record, *names):
    """Return the dict at these keys, an empty one where there is none."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def first_of(record, *names):
    """Return the value of the first of these keys that has one, or None."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)


def read_json(text):
    """Return the value of a JSON text, None of any other; a value that is no text as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return None


def vote(value):
    """Return 1 for a word, number or emoji that praises, -1 for one that blames, 0 for any other."""
    word = str(value).lower().replace("_", "").rstrip("\ufe0f")
    return (word in GOOD) - (word in BAD)


def when(value):
    """Return a time, in seconds, milliseconds or as an ISO text, as seconds since 1970; 0 where there is none."""
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00")) if isinstance(value, str) else None
        value = moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp() if moment else float(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return (value / 1000 if value > 1e11 else value) if 0 < value < 1e14 else 0


def clean(text):
    """Return what of a text a person saw, in letters that UTF-8 has."""
    text = text.encode("utf-8", "replace").decode()
    for start, end in FOLDED.items():  # up to the last end only: where none follows, each start would search for one
        if end in text:
            before, _, after = text.rpartition(end)
            text = re.sub(f"{start}.*?{end}", "", before + end, flags=re.S) + after
    return HIDDEN.sub("", text).strip()


def typed(text):
    """Return what a person typed of a text in the user's place of an agent's log."""
    text = clean(SPOKEN.sub(r"\1", text))
    while (block := BLOCK.match(text)) and block[1].lower() not in HTML:
        text = text[block.end() :]
    return "" if HARNESS.match(text) else text.split("## My request for Codex:")[-1].strip()


def pieces(content):
    """Yield (kind, text or name) of what stands in a message's text, block or blocks: text, call or another."""
    heard = any(block.get("content_type") == "audio_transcription" for block in items(content))
    for block in content if isinstance(content, list) else [content]:
        block = block if isinstance(block, dict) else {"text": block}
        kind = str(first_of(block, "type", "content_type") or "text")
        inner = first_of(block, "text", "transcript", "content", "value", "steps", "refusal")
        inner = read_json(inner[6:]) if str(inner).startswith("\x00json:") else inner  # Hermes' way with blocks
        if SILENT.search(kind) or part(block, "style").get("type") == "thinking":
            continue
        if CALL.search(kind) and kind not in TEXT or "<tool_call>" in str(inner):
            yield "call", str(first_of(block, "name", "function_name") or part(block, "function").get("name"))
        elif kind not in TEXT and "transcript" not in block:  # nothing, where it is the sound of what is written
            yield from [] if heard and "audio" in kind and not block.get("frames_asset_pointers") else [(kind, "")]
        else:
            yield from pieces(inner) if isinstance(inner, (dict, list)) else [("text", inner)] if inner else []


def spoken(content, role, agent=False):
    """Return a message's text after its last call; whether a call ends it, made a document, more than text is there."""
    said, call, made, beside = [], False, False, False
    for kind, text in pieces(content):
        if kind == "call":
            said, call, made = [], True, made or bool(MAKES.search(text))
        elif kind == "text" and isinstance(text, str):
            said.append(typed(text) if agent and role == "user" else clean(text))
            beside = beside or role == "user" and bool(MARK.search(SPOKEN.sub("", text)))
            call = call and not said[-1]
        else:
            beside = beside or role == "user" or bool(FILE.search(kind))
    return "\n\n".join(filter(None, said)), call, made, beside


def lies_beside(fields):
    """Whether a picture, a file, a document or a voice lies in a message's fields."""
    empty = (None, True, False, "", "[]", "{}", "null", [], {})
    return any(FILE.search(name) for name, value in fields.items() if value not in empty)


# ------------------------------------------------------------------------------------------------------------- chats

ROLES = {"human": "user", "gpt": "assistant", "timmy": "assistant", "function_call": "assistant"}
READERS = []  # (source, test of a record, whether a record is one line of a log, whether of an agent's, reader)


class LeftOut(Exception):
    """A record that nothing can be learnt from, for the reason that this says."""


class Chat:
    """A conversation as a tree of nodes, by key, in the order of their making.

    A node has its parent's key; a role: user, assistant, harness (in the user's place, but typed by nobody), note (the
    same, and no turn where it stands within one) or hop (no turn); a text; a state: "" for whole, "call" where more
    must follow, "cut" where nothing whole came of it; a bar: why no pair may rest on it; a rating: more is better.
    """

    key = leaf = last = thread = model = None  # a thread is a chat among many, of which a forest consists
    updated, skip, system, dataset, alone, forest = 0, "", "", False, False, False

    def __init__(self, source, agent, votes):
        self.source, self.agent, self.votes = source, agent, votes
        self.nodes, self.records, self.turns = {}, Counter(), []

    def add(self, m, key=None, parent=False, state="", bar="", **facts):
        """Add a message (a dict, its fields called as in any of the sources) after parent (False: after the last one).

        Return its key. facts: rating; lane, of several models that answer at once; anything that a reader looks up.
        """
        role, calls = first_of(m, "role", "from", "sender"), items(read_json(m.get("tool_calls")))
        role, key = ROLES.get(role, role), str(len(self.nodes) if key is None else key)
        calls += [{}] if m.get("function_call") or m.get("from") == "function_call" else []
        content = first_of(m, "content", "value", "text")
        blocks = [{"text": content}, *({**call, "type": "call"} for call in calls)]
        text, call, made, beside = spoken(blocks, role, self.agent)
        ends = [m.get(name) for name in ("stop_reason", "finish_reason", "status", "type")]
        cut = m.get("truncated") or m.get("error") or m.get("done") is False or not STOPPED.isdisjoint(map(str, ends))
        state = state or ("cut" if cut else "call" if call else "")
        bar = bar or (WITH_FILE.get(role, "") if beside or lies_beside(m) or made and not self.agent else "")
        if len(text) > LONGEST:
            text, bar = "", f"a message of more than {LONGEST} letters"
        if role in WITH_FILE and not (text or bar or state and role == "assistant"):
            role = "harness" if role == "user" and self.agent and spoken(blocks, "")[0] else "hop"
        time, rating = first_of(m, "timestamp", "created_at", "create_time"), part(m, "annotation").get("rating")
        node = {"parent": self.last if parent is False else str(parent), "role": role, "text": text, "state": state}
        node |= {"bar": bar, "made": made, "time": when(time), "model": first_of(m, "model", "model_name")}
        self.nodes.setdefault(key, node | {"thread": self.thread, "rating": vote(rating)} | facts)
        self.last = key
        return key


def reads(source, test, log=False, agent=False):
    """Enter a function as the reader of records that pass the test; log: they are lines, all of a file one chat."""
    return lambda reader: READERS.append((source, test, log, agent, reader)) or reader


def has(*names):
    return lambda record: all(record.get(name) is not None for name in names)


@reads("chatgpt", lambda r: isinstance(r.get("mapping"), dict))
def read_chatgpt(chat, r):
    chat.key, chat.updated = first_of(r, "conversation_id", "id"), r.get("update_time")
    chat.leaf = r.get("current_node")
    for key in r["mapping"]:
        node, m = part(r["mapping"], key), part(r["mapping"], key, "message")
        meta, content, role = part(m, "metadata"), part(m, "content"), part(m, "author").get("role")
        kind, to, parts = content.get("content_type"), m.get("recipient") or "all", content.get("parts")
        hidden = ("is_visually_hidden_from_conversation", "is_user_system_message", "rebase_system_message")
        shown = kind in ("text", "multimodal_text") and m.get("weight") != 0 and not any(map(meta.get, hidden))
        final = to == "all" and m.get("channel") in (None, "final") and (not shown or m.get("end_turn") is not False)
        made = role == "assistant" and MAKES.search(to) or role == "tool" and spoken(parts, role)[3]
        said = {"status": m.get("status"), "timestamp": m.get("create_time"), "model": meta.get("model_slug")}
        said |= {**(meta if role == "user" else {}), "role": role, "content": parts if shown else ""}
        said |= {"stop_reason": part(meta, "finish_details").get("type"), "error": kind == "system_error"}
        state = "call" if role == "assistant" and (kind == "code" or not final) else ""
        chat.add(said, key, node.get("parent"), state, ELSEWHERE if made else "")
        if meta.get("paragen_variants_info") or meta.get("paragen_variant_choice"):  # answers to choose from
            number = part(meta, "paragen_variants_info").get("num_variants_in_stream")
            offered = items(node.get("children"), str)[: number if type(number) is int else 2]
            chat.votes.prefer(meta.get("paragen_variant_choice"), set(offered))


@reads("chatgpt", lambda r: r.get("rating") and r.get("conversation_id") and first_of(r, "message_id", "id"))
def read_chatgpt_feedback(chat, r):
    chat.votes.rated[str(first_of(r, "message_id", "id"))] = vote(r["rating"])


@reads("chatgpt", lambda r: part(r, "output", "feedback_step_2"))
def read_chatgpt_comparison(chat, r):
    step = part(r, "output", "feedback_step_2")
    turns = {name: {str(m.get("id")) for m in items(step.get(f"{name}_turn"))} for name in ("original", "new")}
    for key in turns.get(step.get("completion_comparison_rating"), [None]):
        chat.votes.prefer(key, turns["original"] | turns["new"])


# what an attachment of Claude Code does to the prompt before it
ATTACHED = dict.fromkeys("file already_read_file compact_file_reference pdf_reference directory image".split(), BESIDE)
ATTACHED["queued_command"] = STEERED


@reads("claude-code", lambda r: "type" in r and r.keys() & {"sessionId", "leafUuid", "messageId"}, log=True, agent=True)
def read_claude_code(chat, r):
    chat.key, chat.forest, m, parent = "", True, part(r, "message"), r.get("parentUuid")
    chat.thread = part(r, "forkedFrom").get("sessionId") or r.get("sessionId")  # a resumed session repeats the old one
    if r.get("operation") == "remove" and chat.last and r.get("reason") in (None, "absorbed_mid_turn"):
        chat.nodes[chat.last]["bar"] = STEERED
    if r.get("isSidechain") or not r.get("uuid"):
        return
    role, content, text, mid = r["type"], m.get("content"), spoken(m.get("content"), "")[0], m.get("id")
    cut = r.get("isApiErrorMessage") or m.get("model") == "<synthetic>" or text.startswith("[Request interrupted")
    if role == "user":
        note = r.get("isMeta") or r.get("isCompactSummary") or r.get("isVisibleInTranscriptOnly")
        other = part(r, "origin").get("kind") not in (None, "human")
        tool = cut or any(block.get("type") == "tool_result" for block in items(content))
        role = "hop" if tool else "note" if note else "harness" if other else role
    before = chat.nodes.get(parent, {})
    if role == "assistant" and text and before.get("text") and before["mid"] == mid and not before["state"]:
        content = [before["text"], text]  # a message is a record for each of its blocks
    said = {"role": role, "content": content, "imagePasteIds": r.get("imagePasteIds"), "model": m.get("model")}
    said |= {"timestamp": r.get("timestamp"), "error": cut}
    bar = ATTACHED.get(part(r, "attachment").get("type"), "")
    chat.add(said, r["uuid"], parent or r.get("logicalParentUuid"), bar=bar, mid=mid)


CODEX = ("session_meta", "response_item", "event_msg", "turn_context", "compacted", "world_state")
ITEMS = ("message", "reasoning", "function_call", "function_call_output")  # of the older files, each a line


@reads("codex", lambda r: r.get("type") in CODEX and isinstance(r.get("payload"), dict), log=True, agent=True)
@reads("codex", lambda r: "record_type" in r or {"id", "timestamp", "instructions"} <= r.keys(), log=True, agent=True)
@reads("codex", lambda r: r.get("type") in ITEMS and not isinstance(r.get("content"), str), log=True, agent=True)
def read_codex(chat, r):
    p, event = part(r, "payload") or r, r.get("type") == "event_msg"
    kind = str(p.get("type"))
    if r.get("type") in (None, "session_meta"):
        chat.key, chat.skip = chat.key or p.get("id"), MACHINE if isinstance(p.get("source"), dict) else ""
    elif event and kind == "thread_rolled_back" and chat.turns:
        back = int(p.get("num_turns") or 1)
        chat.last, chat.turns = chat.turns[-back:][0], chat.turns[:-back]  # what was last before that turn
    elif event and kind in ("turn_aborted", "error", "user_message"):
        aside = kind == "user_message" and lies_beside(p)
        chat.add({"error": kind != "user_message"}, bar=BESIDE if aside else "")
    elif not event and kind == "message" and p.get("role") in ("user", "assistant"):
        before, state = chat.last, "call" if p.get("phase") == "commentary" else ""
        key = chat.add({**p, "timestamp": r.get("timestamp")}, state=state)
        chat.turns += [before] if chat.nodes[key]["role"] == "user" else []
    elif not event and kind.endswith("_call"):
        chat.add({"role": "assistant", "content": p})


@reads("hermes", has("messages", "session_id", "session_start"), agent=True)
@reads("hermes", has("messages", "source", "started_at"), agent=True)
def read_hermes(chat, r):
    chat.key, live, rewound = first_of(r, "session_id", "id"), None, {}
    chat.skip = MACHINE if r.get("source") in ("cron", "batch", "tool", "subagent", "kanban") else ""
    for m in [m for m in items(r["messages"]) if not m.get("observed")]:
        role, raw, marks = m.get("role"), str(m.get("content")), part({"": read_json(m.get("display_metadata"))}, "")
        summary = m.get("_compressed_summary") or raw.startswith("[CONTEXT COMPACTION")  # later prompts rest on it
        hidden = m.get("display_kind") in ("hidden", "async_delegation_complete", "auto_continue", "model_switch")
        role = "hop" if summary else "harness" if hidden and role == "user" else role
        votes = [vote(mark.get("emoji")) for mark in items(marks.get("reactions")) if mark.get("author") == "user"]
        bar = NOBODY if summary else STEERED if role == "tool" and "user guidance:" in raw.lower() else ""
        said, facts = {"model": r.get("model"), **m, "role": role}, {"bar": bar, "rating": sum(votes[:1])}
        if m.get("active") != 0 or m.get("compacted"):
            live, rewound = chat.add(said, None, live, **facts), {}
        else:  # taken back: the same prompt once more starts where it stood before, anything else goes on from there
            text = spoken(m.get("content"), "user", True)[0]
            parent = rewound.setdefault(text, rewound.get(None, live)) if role == "user" else chat.last
            rewound[None] = chat.add(said, None, parent, **facts)


@reads("open-webui", lambda r: "snapshot" in r and part(r, "meta").get("message_id"))
@reads("open-webui", lambda r: part(r, "chat", "history", "messages") or part(r, "history", "messages"))
def read_open_webui(chat, r):
    if "snapshot" in r:  # a vote, with the chat as it was then, at one of three depths
        chat.votes.rated[str(r["meta"]["message_id"])] = vote(part(r, "data").get("rating"))
        shot, inner = part(r, "snapshot"), part(r, "snapshot", "chat")
        r = {"id": r["meta"].get("chat_id")} | (inner if inner.keys() & {"chat", "history"} else shot)
    outer, chat.key, chat.updated = part(r, "chat") or r, r.get("id"), r.get("updated_at")
    messages, chat.leaf = part(outer, "history", "messages"), part(outer, "history").get("currentId")
    apart = items(outer.get("files")) and not any(map(lies_beside, items([*messages.values()])))  # of which prompt?
    for key in messages:
        m = part(messages, key)
        several = len(items(part(messages, m.get("parentId")).get("models"), str)) > 1
        lane = first_of(m, "modelIdx", "model") if several or m.get("modelIdx") else 0
        output = {"content": m["output"]} if spoken(m.get("output"), "assistant")[0] else {}
        chat.add(m | output, key, m.get("parentId"), bar=BESIDE if apart else "", lane=lane)


@reads("lm-studio", lambda r: any("versions" in m for m in items(r.get("messages"))))
def read_lm_studio(chat, r):
    for m in items(r["messages"]):
        versions, selected, before = items(m.get("versions")), m.get("currentlySelected"), chat.last
        for i in sorted(range(len(versions)), key=lambda i: i == selected):  # what follows goes on from that one
            v, steps = versions[i], items(versions[i].get("steps"))
            stops = [part(step, "genInfo", "stats").get("stopReason") in STOPPED for step in steps]
            # which answer belongs to which prompt is lost where a prompt has several versions
            lost = selected not in range(len(versions)) or v.get("role") == "user" and len(versions) > 1
            chat.add({**v, "content": steps or v.get("content"), "error": any(stops) or lost}, None, before)


LINE = {"role", "content", "timestamp", "tool_calls", "tool_call_id", "name"}
NO_TALK = {"chosen", "rejected", "label", "conv", "exportAt"}  # rows of preferences, of programs that are not read
TIMMY = ("message", "tool_call", "decision", "error")


@reads("openai", lambda r: any("role" in m for m in items(r.get("messages"))) and NO_TALK.isdisjoint(r))
@reads("sharegpt", lambda r: any("from" in m for m in items(r.get("conversations"))) and NO_TALK.isdisjoint(r))
@reads("ollama", has("ollama_chat", "messages"))
@reads("timmy", lambda r: r.get("type") in TIMMY and "timestamp" in r, log=True, agent=True)
@reads("hermes", lambda r: "role" in r and r.keys() <= LINE, log=True, agent=True)
@reads("hermes", has("conversations", "completed"), agent=True)
@reads("claude", lambda r: isinstance(r.get("chat_messages"), list))
def read_talk(chat, r):
    """Read messages in a line, or, where they name their parents, in a tree."""
    chat.key, chat.updated = first_of(r, "uuid", "ollama_chat"), r.get("updated_at")
    chat.leaf, bar = r.get("current_leaf_message_uuid"), BESIDE if has_media(r) else ""
    for m in items(first_of(r, "chat_messages", "conversations", "messages")) or [r]:
        tool = {"role": "assistant", "content": {**m, "name": m.get("tool")}} if m.get("type") == "tool_call" else {}
        chat.add(m | tool, m.get("uuid"), m.get("parent_message_uuid") or False, bar=bar)


def has_media(row):
    """Whether a row of a data set has a column of pictures, films or sounds."""
    return lies_beside({name: row[name] for name in row if name.rstrip("s") in ("image", "video", "audio")})


# ---------------------------------------------------------------------------------------------------------- datasets

# source; its two answers' columns, or those that hold one or several; the prompt's: the first that is there; the scores
ROWS = [
    ("openai", "preferred_output non_preferred_output", "input", (1, 0)),
    ("webgpt", "answer_0 answer_1", "question", ("score_0", "score_1")),
    ("shp", "human_ref_A human_ref_B", "history", ("labels", 0.5)),
    ("nectar", "answers", "prompt", ()),
    ("ultrafeedback", "chosen rejected", "prompt", ("score_chosen", "score_rejected")),
    ("trl", "chosen rejected", "prompt question instruction messages conversations input", (1, 0)),
    ("trl", "completion", "prompt", ("label",)),
]


def talk_of(value):
    """Return messages, or a text whose turns begin with a blank line and Human: or Assistant:, as such; else a text."""
    value = first_of(value, "messages", "full_text") or [value] if isinstance(value, dict) else value
    if isinstance(value, list):
        return [m for m in items(value) if first_of(m, "role", "from")] or [{"role": "user", "content": value}]
    _, *parts = re.split(r"\n\n(Human|Assistant):", value) if str(value).startswith("\n\nHuman:") else [""]
    turns = zip(parts[::2], map(str.strip, parts[1::2]))
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said} for who, said in turns if said
    ] or value


def read_row(columns, prompts, scores, chat, r):
    """Read a data set's row; without a prompt of its own, that is what its answers begin with."""
    if (r.get("score_ratio") or 2) < 1.5:  # SHP's card asks for 2
        raise LeftOut("votes that are nearly equal")
    chat.source = "hh-rlhf" if str(r.get("chosen")).startswith("\n\nHuman:") else chat.source
    ranked = [(a.get("answer"), -a["rank"]) for a in items(r.get("answers")) if a.get("rank")]
    scores = [r[score] if isinstance(score, str) else score for score in scores]
    prompt, *sides = map(talk_of, [first_of(r, *prompts), *(r[name] for name in columns if name != "answers")])
    prompt = f"{r['instruction']}\n{r['input']}" if "instruction" in r and r.get("input") else prompt
    if prompt is None and all(isinstance(side, str) for side in sides):
        prompt = os.path.commonprefix(sides)
        prompt = prompt[: prompt.rfind(" ") + 1]  # up to a word
        sides = [text[len(prompt) :] for text in sides]
    elif all(isinstance(side, list) for side in sides) and max(map(len, sides), default=0) > 1:  # whole conversations
        prompt = [m[0] for m in zip(*(side[:-1] for side in sides)) if all(other == m[0] for other in m)]
        if {len(side) for side in sides} != {len(prompt) + 1}:
            raise LeftOut("two conversations that part before the last answer")
    chat.dataset, chat.alone, asked = True, len(sides) == 1, None
    for m in prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]:
        asked = chat.add(m, bar=BESIDE if has_media(r) else "")
        chat.system = spoken(m.get("content"), "system")[0] if m.get("role") == "system" else chat.system
    if asked is None or chat.nodes[asked]["role"] != "user":
        raise LeftOut("a prompt that ends in no question")
    for side, score in ranked or zip(sides, scores):
        side = first_of(side[-1], "content", "value") if isinstance(side, list) else side
        key = chat.add({"role": "assistant", "content": side}, parent=asked, rating=-1 if score is False else 0 + score)
        if isinstance(side, str) and side.strip() and len(side) <= LONGEST:  # <think> is part of a data set's answers
            text = side.encode("utf-8", "replace").decode().strip()
            chat.nodes[key] |= {"text": text, "role": "assistant", "state": ""}


for source, columns, prompts, scores in ROWS:
    names = [*columns.split(), *(score for score in scores if isinstance(score, str))]
    reads(source, has(*names))(partial(read_row, columns.split(), prompts.split(), scores))


# ------------------------------------------------------------------------------------------------------------ reading


def open_members(name, stream, left, depth=0):
    """Yield (name, stream) of a file, or of each file in an archive; left: [bytes that may come out of it]."""
    head, packed = stream.read(4), None
    stream.seek(0)
    if head[:2] == b"\x1f\x8b":
        packed = [(name, gzip.open(stream))]
    elif head == b"PK\x03\x04":
        archive = zipfile.ZipFile(stream)
        outside = [member for member in archive.namelist() if re.match(r"[/\\]|\w:|(.*[/\\])?\.\.([/\\]|$)", member)]
        if outside:
            raise ValueError(f"its member {outside[0]} lies outside of it: such an archive is not read")
        packed = ((f"{name}/{member}", archive.open(member)) for member in archive.namelist())
    for member, source in packed or ():
        with tempfile.TemporaryFile() as file:
            while chunk := source.read(2**20):
                left[0] -= len(chunk)
                if left[0] < 0 or depth > 2:
                    raise ValueError("it unpacks to more than 8 GB, 200 times its size, or archives in archives")
                file.write(chunk)
            file.seek(0)
            yield from open_members(member, file, left, depth + 1)
    if packed is None:
        yield name, stream


def read_values(stream):
    """Yield (line, value) of a stream's JSON, one at a time: a list's elements, one a line, or one; None: broken."""
    encoding = json.detect_encoding(stream.read(4))
    stream.seek(0)
    text = io.TextIOWrapper(stream, "utf-8-sig" if "utf-8" in encoding else encoding, errors="replace")
    decode, step, line, buffer, end = json.JSONDecoder().raw_decode, 2**20, 1, text.read(2**20), 0
    first = buffer.lstrip()[:1]
    if first == "[":
        end = buffer.index("[") + 1
    elif first != "{":
        yield from [(line, None)] if first else []
        return
    while True:
        at = re.compile(r"[\s,]*").match(buffer, end).end()
        line += buffer.count("\n", end, at)
        try:
            value, end = decode(buffer, at)
            step = 2**20
        except (ValueError, RecursionError):
            end = buffer.find("\n{", at) + 1  # where the next record begins, if this one is broken
            end = buffer.find("\n", at) + 1 if end and first == "{" else end
            more = text.read(step) if not end and len(buffer) < 2**30 else ""
            if more:
                step, buffer, end = 2 * step, buffer[at:] + more, 0
                continue
            if at == len(buffer) or first == "[" and buffer[at] == "]":
                return
            value, end = None, end or len(buffer)
        yield line, value
        line += buffer.count("\n", at, end)


def read_database(path, stream):
    """Yield (number, chat) of Hermes' state.db or of Ollama's app, from a copy: the original is not even locked."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "copy.db").write_bytes(stream.read())
        for end in ("-wal", "-journal"):  # what the program that has it open is about to put into it, or take back
            if os.path.exists(f"{path}{end}"):
                shutil.copy(f"{path}{end}", Path(folder, f"copy.db{end}"))
        db = sqlite3.connect(Path(folder, "copy.db"))
        db.row_factory, db.text_factory = sqlite3.Row, lambda raw: raw.decode("utf-8", "replace")
        rows = lambda sql, *values: map(dict, db.execute(sql, values))
        tables, beside = {row["name"] for row in rows("SELECT name FROM sqlite_master WHERE type = 'table'")}, {}
        ollama = "chats" in tables
        name, of, key = ("chats", "chat_id", "ollama_chat") if ollama else ("sessions", *["session_id"] * 2)
        if not {name, "messages"} <= tables:
            raise ValueError("it holds neither Hermes' sessions nor Ollama's chats")
        for table in tables - {"messages"}:  # what other tables have of a message: its attachments, its tool calls
            for row in rows(f'SELECT * FROM "{table}"'):
                beside.setdefault(row.get("message_id", table), {}).setdefault(table, []).append(row)
        db.execute(f"CREATE INDEX of_chat ON messages ({of})")
        for number, chat in enumerate(rows(f"SELECT * FROM {name}"), 1):
            found = rows(f"SELECT * FROM messages WHERE {of} = ? ORDER BY rowid", chat["id"])
            chat |= {key: chat["id"], "messages": [row | beside.get(row.get("id"), {}) for row in found]}
            yield number, {"session_start": 0, **chat}


class Chats:
    """All that was read: chats by source and key, votes by message, and what became of records that are in no chat."""

    def __init__(self):
        self.chats, self.rated, self.fates = {}, {}, Counter()
        self.won, self.tied = defaultdict(set), defaultdict(set)  # answer: those that it was preferred to, was equal to

    def prefer(self, key, offered):
        """Enter that of some answers one was taken, or none: then they are tied."""
        for answer in [key] if key else offered:
            (self.won if key else self.tied)[str(answer)] |= offered

    def read(self, path):
        """Read a file, and the files in an archive; one that cannot be read is named and counted."""
        logs = {}
        try:
            with open(path, "rb") as file:
                left = [min(UNPACKED, max(2**23, 200 * path.stat().st_size))]
                for name, stream in open_members(str(path), file, left):
                    database = stream.read(16) == b"SQLite format 3\0"
                    stream.seek(0)
                    for number, record in read_database(path, stream) if database else read_values(stream):
                        self.give(record, logs, name, number)
        except Exception as error:  # one damaged file, of whatever kind, must not stop the others
            self.fates["a file, or the rest of one, that could not be read"] += 1
            print(f"{path}: {error}: passed over")
        for chat in logs.values():
            self.keep(chat)

    def give(self, record, logs, name, number):
        """Give a record to the first reader whose test it passes, or its elements, where it holds a list of records."""
        fate, reader = "no JSON, or no record: broken, or of another kind", None
        try:
            source, _, log, agent, reader = next((entry for entry in READERS if entry[1](record)), [None] * 5)
            chat = logs.get((name, reader)) or Chat(source, agent, self)
            if reader:
                reader(chat, record)
                chat.records[chat.thread] += 1
                logs |= {(name, reader): chat} if log else {}
                return None if log else self.keep(chat)
            inner = [element for value in record.values() for element in items(value)] if len(record) < 5 else []
            for element in inner:
                self.give(element, logs, name, number)
            fate = "" if inner else f"of no known kind, with {', '.join([*record][:4])}"
        except LeftOut as reason:
            fate = str(reason)
        except Exception as error:
            if isinstance(record, dict):
                frames, kind = traceback.extract_tb(error.__traceback__), type(error).__name__
                where = next((frame for frame in frames if frame.name.startswith("read_")), frames[-1])
                fate = f"{kind} in {where.name}, line {where.lineno}"
                if fate not in self.fates:
                    print(f"{name}:{number}: {fate}: {str(error)[:300]}: passed over")
        self.fates[fate] += bool(fate)

    def keep(self, chat):
        """Enter a chat; of two copies, that which is newer, or larger."""
        if not chat.forest and not chat.key:  # a data set's row is no copy of another
            texts = json.dumps([node["text"] for node in chat.nodes.values()])
            chat.key = len(self.chats) if chat.dataset else hashlib.sha256(texts.encode()).hexdigest()[:12]
        known = self.chats.get((chat.source, str(chat.key)))
        if chat.skip or not chat.nodes:
            self.fates[chat.skip or "votes, or nothing said"] += chat.records.total()
        elif known and chat.forest:
            known.records += chat.records
            for key, node in chat.nodes.items():
                known.nodes.setdefault(key, node)
        else:
            age = lambda chat: (when(chat.updated), len(chat.nodes))
            older, newer = (known, chat) if not known or age(chat) > age(known) else (chat, known)
            self.chats[chat.source, str(chat.key)] = newer
            self.fates["another copy of a conversation"] += older.records.total() if older else 0


# -------------------------------------------------------------------------------------------------------------- pairs

# where a node stands: its prompt's key, the number of the history before that, the latest text of the answer; whether
# more must follow, nothing whole can, a document was made; why no pair may rest on it; whether nobody typed the last
Place = namedtuple("Place", "user history last call cut made bar idle", defaults=(None, 0, None, 0, 0, 0, "", 0))


def is_whole(at):
    return at.last is not None and not (at.call or at.cut)


class Turns:
    """A chat's prompts with the answers that each got, found by walking its tree from the roots.

    A history is a number: that of (the history before, a prompt, its answer). answers: {(thread, history, prompt):
    {key: answer}}: a node with key, user, ids (of its branch), order.
    """

    def __init__(self, chat, rated):
        self.chat, self.rated, self.nodes, self.histories, self.at = chat, rated, chat.nodes, {}, {}
        self.answers, self.reasons, self.continued, self.active = defaultdict(dict), defaultdict(Counter), set(), set()
        self.children, latest, self.said = defaultdict(list), {}, {}
        for order, (key, node) in enumerate(self.nodes.items()):
            inside = node["parent"] in self.nodes and node["parent"] != key
            self.children[node["parent"] if inside else None].append(key)
            node["order"] = node["time"], order
        for root in self.children.pop(None, []):
            thread = str(self.nodes[root]["thread"] or chat.key)
            for key in self.walk(root, thread):
                latest[thread] = max(latest.get(thread, key), key, key=lambda key: self.nodes[key]["order"])
        self.steps = [None, *self.histories]
        for leaf in [str(chat.leaf)] if str(chat.leaf) in self.at else latest.values():
            while leaf in self.nodes and leaf not in self.active:  # what is on show
                self.active.add(leaf)
                leaf = self.nodes[leaf]["parent"]

    def message(self, role, text):
        """Return a message; the same one each time, since a history stands in many prompts."""
        return self.said.setdefault((role, text), {"role": role, "content": text.replace("\x1e", "")})

    def walk(self, root, thread):
        """Follow a tree from its root, enter the branches that end in an answer; yield its keys."""
        stack = [root]
        while stack:
            key = stack.pop()
            node, kin = self.nodes[key], self.children[key]
            at = self.at[key] = self.step(self.at.get(node["parent"], Place()), key, node)
            ends = ("user", "harness", "note") if is_whole(at) else ("user", "harness")
            if node["role"] != "user" and not at.idle and all(self.nodes[child]["role"] in ends for child in kin):
                self.end(thread, at, key)
            stack += reversed(kin)
            yield key

    def step(self, at, key, node):
        """Return where a node stands, from where the one before it does."""
        role, bar, whole = node["role"], at.bar or node["bar"], is_whole(at)
        if role == "user":
            self.continued.add(at.last)
            history, before = at.history, self.nodes[at.user]["text"] if at.user is not None else None
            if before is not None:
                step = history, before, self.nodes[at.last]["text"] if whole else None
                history = self.histories.setdefault(step, len(self.histories) + 1)
            # without an answer, the same text is only sent once more, or the answer is on another branch
            kin = {self.nodes[child]["role"] for child in self.children[node["parent"]]}
            if not whole and before not in (None, node["text"]) and (node["parent"] != at.user or kin == {"user"}):
                bar = bar or "a prompt after one that got no whole answer"
            return Place(key, history, cut=node["state"] == "cut", bar=bar)
        if role == "harness" or role == "note" and (whole or at.cut):
            in_turn = at.user is not None and not (whole or at.cut)
            return at._replace(bar=bar or STEERED) if in_turn else at._replace(idle=True)
        if at.idle and role == "assistant":
            return at._replace(user=None, idle=False, bar=bar or NOBODY)
        if at.user is None:
            return at._replace(bar=bar)
        cut, call = at.cut or node["state"] == "cut", node["state"] == "call" or at.call and role != "assistant"
        last = key if role == "assistant" and node["text"] and not call else at.last
        return at._replace(last=last, call=call, cut=cut, made=at.made or node["made"], bar=bar)

    def end(self, thread, at, key):
        """Enter the answer of a branch that ends at key, or the reason why it is none."""
        why = at.bar or ("no whole answer" if not is_whole(at) else ELSEWHERE if at.made else "")
        if at.user is None or why:
            self.reasons[thread][why] += at.user is not None
            return
        answer = self.nodes[at.last] | {"key": at.last, "user": at.user, "ids": set()}
        while key != at.user:
            answer["ids"].add(key)
            answer["rating"] = answer["rating"] or self.rated.get(key, 0)
            key = self.nodes[key]["parent"]
        self.answers[thread, at.history, " ".join(self.nodes[at.user]["text"].split())][at.last] = answer


def compare_answers(answers, turns, chats):
    """Yield (chosen, rejected, signal, share of the weight): of a prompt's answers the best against each worse one."""

    def beats(a, b):
        return any(chats.won[i] & (b["ids"] - a["ids"]) for i in a["ids"] - b["ids"] if i in chats.won)

    def place(a):
        won = sum(beats(a, b) - beats(b, a) for b in answers) if chats.won else 0
        return won, a["rating"], a["key"] in turns.active, a["key"] in turns.continued, a["order"][1]

    best, *rest = sorted(answers, key=place, reverse=True)
    for other in rest[:RIVALS]:
        (_, up, shown, gone_on, late), (_, down, other_shown, other_gone_on, early) = place(best), place(other)
        tied = any(chats.tied[i] & other["ids"] for i in best["ids"] if i in chats.tied)
        if beats(best, other):
            yield best, other, "comparison", 1
        elif up != down or turns.chat.dataset:
            if up > down and not beats(other, best):
                yield best, other, "dataset" if turns.chat.dataset else "rating", 1
        elif shown and not (tied or up or other_shown or beats(other, best)):
            # of several models that answer at once, the last one is on show unless the person goes on from another
            at_once = best["user"] == other["user"] and best.get("lane") != other.get("lane")
            if gone_on and (not other_gone_on or not at_once) or not at_once and late > early:
                yield best, other, "regenerate", 1 if gone_on and not other_gone_on and not at_once else 0.5


# what a person says of a wrong answer, of a slip of their own, of a right answer; what a model says of its fault
STRONG = re.compile(r"""(?ix)^\W*(?:
    (?:no|nope|nah|wrong|incorrect|not\ quite|not\ what\ i)\b(?!\W+(?:problem|worries|need|rush|wait|thanks
    |thank|idea|doubt|more|one|longer|matter|further|other|all|sure|answers|that'?s\ all)\b)
    |(?:that|this|it)(?:'?s|\ is)\ (?:not|wrong|incorrect|false)\b(?!\s+(?:bad|a\s+(?:bad|problem)|an\s+issue|too|all))
    |(?:i|we)\s+(?:(?:said|asked)\b(?!\s+(?:my|him|her|them|an?|some|that|so|it|around)\b)|(?:clearly|explicitly)\b)
    |you\s+(?:forgot|missed|ignored|misread|misunderstood|skipped|left\s+out|made\s+a\s+mistake|got\s.{0,20}wrong)\b
    (?!\s+nothing)
    |you\s+(?:didn'?t|did\s+not)\s+(?:answer|say|tell|give|mention|include|use|follow|read|add|do|fix|address)\b
    |(?:it\s+|that\s+)?still\s+(?:wrong|fail|broken|doesn'?t|does\s+not|not\s+working|the\s+same)
    |(?:try|do\ it|check|redo|rewrite)\ (?:it\ )?again\b)""")
OWN_FAULT = re.compile(r"""(?ix)\b(i\s+(mis\w+|made\s+a|meant\s+to|was\s+wrong|should\s+have)|scratch\s+that|typo
    |my\s+(bad|mistake|fault|typo)|wrong\s+(window|chat|tab)|ignore\s+(that|my)|not\s+saying|nothing\s+wrong
    |all\s+good|well\s+done|no\W+(problem|worries|need|rush|thanks?))\b""")
DENIAL = re.compile(r"""(?ix)\b(wrong|incorrect|false|not\s+(true|right|correct|the\s+case|an\s+answer|what\s+i)
    |mistaken?|forgot|missed|misread|misunderstood|still)\b""")
THANKS = re.compile(r"^\W*(thanks|thank you|ty|perfect|great|exactly|yes|good|works|that works|👍)", re.I)
APOLOGY = re.compile(r"""(?ix)^(?:(?:(?:you'?re|you\ are)\ (?:absolutely\ )?right|(?:i'?m\ )?sorry|(?:my\ )?apologies
    |i\ apologi[sz]e|my\ mistake|good\ catch)[^.!\n]*[.!]\s*)+""")
REFUSAL = re.compile(r"""(?ix)^\W*(i'?m\ (very\ |so\ )?sorry|i\ apologi[sz]e|i\ can'?t|i\ cannot
    |i'?m\ (not\ able|unable)|as\ an\ ai)\b""")
COMMON = """about after again answer could does from have here into just more need only please should some tell
    than that their them then there these they this those very want what when where which while will with would
    your""".split()


def is_correction(text):
    """Whether a turn says that the answer before it was wrong; what it quotes and its code do not count."""
    text = re.sub(r"```.*?```|^>.*?$", "", text.replace("’", "'"), flags=re.S | re.M)[:400]
    return bool(STRONG.search(text)) and not OWN_FAULT.search(text)


def topics(text):
    return set(re.findall(r"\w{4,}", text.lower())).difference(COMMON)


def corrections(turns):
    """Yield (thread, history, prompt, chosen, rejected, signal, share): an answer and the one that mended it."""
    following = defaultdict(list)  # answer: the prompts that came after it
    for _, node in turns.nodes.items():
        if node["role"] == "user" and node["parent"] in turns.at:
            following[turns.at[node["parent"]].last].append(node["text"])
    for (thread, _, _), answers in turns.answers.items():
        good = next(iter(answers.values()))
        asked, before = turns.nodes[good["user"]]["text"], turns.at.get(turns.nodes[good["user"]]["parent"], Place())
        if len(answers) > 1 or before.user is None or not is_whole(before) or before.made or not is_correction(asked):
            continue
        first, later, text = turns.nodes[before.user]["text"], following[good["key"]], good["text"]
        sorry = APOLOGY.match(text.replace("’", "'"))
        text = text[sorry.end() :] if sorry else text
        about = DENIAL.search(asked) or topics(asked) & topics(first)
        # what the prompt did not say, an answer to it can only guess
        guess = "instead" in asked.lower() and topics(asked) - topics(first) - {"instead"}
        refused = REFUSAL.match(text.replace("’", "'")) or text.rstrip().endswith("?") or not text
        if about and not (guess or refused or any(map(is_correction, [first, *later]))):
            share = 1 if any(map(THANKS.match, later)) else 0.5
            yield thread, before.history, first, good | {"text": text}, turns.nodes[before.last], "correction", share


def make_rows(chats, args):
    """Return (rows, makers of rows of rated answers, {(source, conversation): Counter of why prompts gave none})."""
    rows, rated, reasons = [], [], defaultdict(Counter)
    for chat in chats.chats.values():
        turns = Turns(chat, chats.rated)
        for thread, why in turns.reasons.items():
            reasons[chat.source, thread] += why
        for (thread, history, _), answers in turns.answers.items():
            answers, signal = list(answers.values()), "dataset" if chat.dataset else "rating"
            place = thread, history, turns.nodes[answers[0]["user"]]["text"]
            pairs = [make_row(turns, *place, *found) for found in compare_answers(answers, turns, chats)]
            voted = [a for a in answers if a["rating"] and (chat.alone or not chat.dataset)]
            rated += [partial(make_row, turns, *place, a, None, signal, 1) for a in voted]
            rows += pairs
            why = "several answers, none preferred" if len(answers) > 1 else "one answer, not rated"
            reasons[chat.source, thread][why] += not pairs and not voted
        rows += [make_row(turns, *found) for found in (corrections(turns) if args.corrections else ())]
    return rows, rated, reasons


def make_row(turns, thread, history, prompt, chosen, rejected, signal, share):
    """Return a row of an output file, and what is needed of it on the way there; rejected: None for a rated answer."""
    messages, sides = [turns.message("user", prompt)], [side for side in (chosen, rejected) if side]
    while history and len(messages) <= HISTORY:
        history, asked, answer = turns.steps[history]
        if answer is not None:
            messages += [turns.message("assistant", answer), turns.message("user", asked)]
    messages += [turns.message("system", turns.chat.system)] if turns.chat.system else []
    row = {"prompt": messages[::-1]}
    row |= {name: [turns.message("assistant", a["text"])] for name, a in zip(("chosen", "rejected"), sides)}
    row |= {"signal": signal, "weight": round(WEIGHTS[signal] * share, 3), "source": turns.chat.source}
    row |= {"conversation_id": thread, "created": None, "model": chosen["model"]}
    if chosen["time"]:
        row["created"] = datetime.fromtimestamp(chosen["time"], timezone.utc).isoformat()
    voted = {(id(turns.chat), side["key"]) for side in sides if signal != "correction"}
    return row | {"home": (turns.chat.source, thread), "voted": voted, "label": chosen["rating"] > 0}


# ---------------------------------------------------------------------------------------------------------- redaction

KEYS = re.compile(  # what begins as only a key does; https://github.com/gitleaks/gitleaks has more of them
    r"(?:\b|(?<=\\[nrt]))"
    r"(?:sk-ant-[\w-]{20,}|sk-(?:proj-|svcacct-|admin-|or-v1-)?[A-Za-z0-9_-]{16,}|gsk_\w{20,}|xai-\w{30,}|r8_\w{20,}"
    r"|pplx-\w{20,}|hf_[A-Za-z]{30,}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{60,}|xox[abposr]-[\w-]{10,}"
    r"|gl(?:pat|dt|ft|rt|cbt|ptt|soat|agent)-[\w.-]{20,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|dop_v1_[a-f0-9]{64}"
    r"|(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"
    r"|\d{8,10}:A[\w-]{34}|[sr]k_(?:live|test)_\w{10,}|SG\.[\w.-]{20,}|SK[0-9a-f]{32}|AGE-SECRET-KEY-1\w+"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{8,})|https://hooks\.slack\.com/\S+"
    r"|-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY-----[^\x1e]*?(?:-----END[ A-Z0-9_-]*-----|(?=\x1e)|$)"
)
PARTS = {  # of the patterns below: names of what is secret; what is a mark already; what only stands for a secret
    "NAMED": r"(?:api[_-]?key|secret|token|passw(?:or)?d|pwd|credential|auth(?!or|ent))[\w.-]{0,30}[\"']?\s{0,3}",
    "MARK": r"(?!\[[A-Z]+_\d)",
    "FAKE": r"xxx|<|\$\{|os\.environ|process\.env|example|changeme|(?:bearer|basic|token)\s|[\w.]+[(\[]",
}
PATTERNS = r"""
SECRET ://[^\s:/@]{0,99}:MARK([^\s@/]{1,99})@
SECRET (?i)authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:bearer|basic|token)\s+MARK([^\s\"']+)
SECRET (?i)[?&](?:\w*token|api_key|client_secret|password|code|sig(?:nature)?|x-(?:amz|goog)-signature)=MARK([^\s&\"']+)
SECRET (?i)NAMED[:=]\s{0,3}[\"']?MARK(?!FAKE)([^\s\"'&]{7,}[^\s\"'&,;.)])
SECRET (?i)NAMEDis\s+[\"']?((?=[^\s\"']*\d)[^\s\"'&]{7,}[^\s\"'&,;.)])
EMAIL \b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}\.[A-Za-z]{2,24}\b
HOME (?:(?<![\w.])/(?:home|Users)/|[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2})[^/\\\s\"':]+
IBAN \b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b
CARD \b\d(?:[ -]?\d){12,18}\b
PHONE \+\d[\d ().-]{7,24}\d
"""  # a mark and a pattern a line; what its group (all of it, without one) matches is replaced
LINES = [re.sub("|".join(PARTS), lambda name: PARTS[name[0]], line) for line in PATTERNS.strip().splitlines()]
PRIVATE = [("SECRET", KEYS), *((line.split(" ", 1)[0], re.compile(line.split(" ", 1)[1])) for line in LINES)]


def is_card(text):
    """Whether digits pass the check of card numbers (Luhn's)."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * d, 10)) for d in digits[1::2]) % 10


def is_account(text):
    """Whether a text passes the check of account numbers (ISO 13616)."""
    text = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def redact(row, marks, counts):
    """Put a mark in the place of what is private in a row, the same one wherever a value stands; return their share.

    marks: {kind: {value: its number}}; counts: of what was replaced.
    """
    secrets, messages = {}, [m for value in row.values() for m in items(value)]

    def mark(kind, found):
        value = found.group(found.re.groups)
        if kind == "CARD":  # what follows a card's number may look like more of it
            ends = [i for i in range(len(value), 12, -1) if not value[i : i + 1].isdigit()]
            value = next((value[:i] for i in ends if is_card(value[:i])), None)
        if value is None or kind == "IBAN" and not is_account(value):
            return found.group()
        counts[kind] += 1
        name = "~" if kind == "HOME" else f"[{kind}_{marks[kind].setdefault(value, len(marks[kind]) + 1)}]"
        secrets.update({value: name} if kind == "SECRET" and len(value) > 5 else {})
        return found.group().replace(value, name)

    text = "\n\x1e\n".join([str(row["model"] or "").replace("\x1e", ""), *(m["content"] for m in messages)])
    for kind, pattern in PRIVATE:
        text = pattern.sub(partial(mark, kind), text)
    for value, name in secrets.items():  # also where it stands without what gave it away elsewhere
        text = text.replace(value, name)
    model, *texts = text.split("\n\x1e\n")
    row["model"] = model or None
    kept = [len(re.sub(r"\[[A-Z]+_\d+\]", "", text)) / max(len(m["content"]), 1) for m, text in zip(messages, texts)]
    for name in row:
        row[name] = [{**m, "content": texts.pop(0)} for m in row[name]] if items(row[name]) else row[name]
    return 1 - min(kept[-len({"chosen", "rejected"} & row.keys()) :])


# ------------------------------------------------------------------------------------------------------------- checks

ARTEFACT = re.compile(r"</?think>|</?details|</?tool_call>|[\ue000-\uf8ff]|【|turn\d+search\d+|\u200b")


def plain(text):
    return " ".join(text.casefold().split())


def script_of(text):
    """Return the script of most of a text's letters, as LATIN or CJK; None of fewer than 20."""
    letters = [unicodedata.name(c, "?").split()[0] for c in text[:2000] if c.isalpha()]
    return Counter(letters).most_common(1)[0][0] if len(letters) >= 20 else None


def why_not(row):
    """Return the reason to leave a pair out, or None."""
    texts = [row[name][-1]["content"].replace("’", "'") for name in ("prompt", "chosen", "rejected")]
    _, good, bad = texts
    ours, theirs = (Counter(plain(side).split()) for side in (good, bad))
    scripts, (short, long) = [script_of(text) for text in texts], sorted((len(good), len(bad)))
    checks = {
        "an empty prompt or answer": not all(map(str.strip, texts)),
        "equal answers": plain(good) == plain(bad),
        "nearly equal answers": (ours & theirs).total() > 0.9 * max(ours.total(), theirs.total()),
        "one answer ten times as long": long > max(200, 10 * short) and row["signal"] not in ("comparison", "rating"),
        "a refusal as the better answer": REFUSAL.match(good) and not REFUSAL.match(bad),
        "a better answer in another script": None not in scripts and scripts[0] == scripts[2] != scripts[1],
        "thoughts, tool calls or citations in one answer": set(ARTEFACT.findall(good)) != set(ARTEFACT.findall(bad)),
    }
    return next((reason for reason, found in checks.items() if found), None)


def leads(worse, start, end):
    """Whether worse, {answer: {answers worse than it: ...}}, leads from start to end."""
    seen = todo = {start}
    while todo and end not in seen:
        todo = {below for answer in todo for below in worse.get(answer, ())} - seen
        seen = seen | todo
    return end in seen


def select_pairs(rows, args):
    """Return the rows that pass, strongest signals first in each conversation, and (row, why not) of the others."""
    dropped, kept, worse, taken = [], {}, defaultdict(lambda: defaultdict(dict)), Counter()
    for number, row in enumerate(sorted(rows, key=lambda row: -row["weight"])):
        if taken[row["home"]] >= args.max_per_chat:
            dropped.append((row, f"more than {args.max_per_chat} pairs of a conversation"))
            continue
        good, bad = (plain(row[side][0]["content"]) for side in ("chosen", "rejected"))
        known = worse[tuple(message["content"] for message in row["prompt"])]
        reason, other = why_not(row), known[bad].get(good)
        if not reason and bad in known[good]:
            reason = "a duplicate"
        elif not reason and leads(known, bad, good):  # the stronger signal stays; of two equal ones none
            reason = "a contradiction"
            if other in kept and kept[other]["weight"] == row["weight"]:
                dropped.append((kept.pop(other), reason))
        if reason:
            dropped.append((row, reason))
        else:
            known[good][bad], kept[number] = number, row
            taken[row["home"]] += 1
    return list(kept.values()), dropped


def split_by_chat(rows, args):
    """Return {"train", "valid", "test": rows}, by conversation: none, and no prompt, is in two of them."""
    home, groups = {}, defaultdict(list)  # {conversation or prompt: all that share one, in one set}
    for row in rows:
        names = ("prompt", plain(row["prompt"][0]["content"])), row["home"]
        small, large = sorted((home.setdefault(name, {name}) for name in names), key=len)
        if small is not large:
            large |= small
            home |= dict.fromkeys(small, large)
    for row in rows:
        groups[id(home[row["home"]])].append(row)
    order = sorted(groups.values(), key=lambda group: str(group[0]["home"]))
    random.Random(args.seed).shuffle(order)
    parts, wanted = {"test": [], "valid": [], "train": []}, args.held_out * len(rows)
    for group in order:
        name = next((name for name in ("test", "valid") if len(parts[name]) + len(group) <= wanted), "train")
        parts[name] += group
    return parts


# --------------------------------------------------------------------------------------------------------------- main


def markdown_table(counter, *heads):
    """Return a Counter as a Markdown table, the largest first; its keys are texts, or tuples of several columns."""
    cells = [(*(key if isinstance(key, tuple) else (key,)), number) for key, number in counter.most_common() if number]
    rows = [f"| {' | '.join(map(str, row))} |" for row in [heads, ["---"] * len(heads), *cells]]
    return "\n".join(rows) if cells else "none"


def report_of(rows, alone, parts, records, left_out, counts):
    """Return report.md's text; records: what became of each that was read; left_out: why prompts and pairs were."""
    longer = sum(len(r["chosen"][0]["content"]) > len(r["rejected"][0]["content"]) for r in rows) / max(len(rows), 1)
    homes, kinds = {r["home"] for r in rows}, Counter((r["source"], r["signal"]) for r in rows)
    splits = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
    lines = ["# Pairs", f"{len(rows)} pairs of {len(homes)} conversations: {splits}; {len(alone)} rated answers alone"]
    days = sorted(row["created"][:10] for row in rows if row["created"]) or ["unknown"]
    lines[-1] += f"; {days[0]} to {days[-1]}."
    lines += [f"The chosen answer is the longer one in {longer:.2f} of the pairs."]
    if longer > 0.6:
        lines[-1] += " Warning: above 0.6 a model learns to write more; add pairs whose better answer is the shorter."
    if len(rows) < 100:
        lines += ["Warning: fewer than 100 pairs are soon learnt by heart."]
    lines += ["## Source and signal", markdown_table(kinds, "source", "signal", "pairs")]
    lines += [f"## What became of {records.total()} records", markdown_table(records, "it came to, or was", "records")]
    lines += ["## Left out", markdown_table(left_out, "why", "prompts or pairs")]
    lines += ["## Redacted", markdown_table(counts, "what", "places")]
    guesses = [row for row in rows if row["signal"] == "correction"]
    lines += ["## Corrections, to be read: they are guesses", *map(shown_pair, guesses)] if guesses else []
    lines += ["## Samples", *map(shown_pair, rows[:: max(1, len(rows) // 3)][:3])]
    return re.sub(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "?", "\n\n".join(lines) + "\n")  # no control codes


def shown_pair(row):
    """Return the beginnings of a row's texts as a Markdown list, in letters that a terminal can show."""
    names = ("prompt", "chosen", "rejected")
    texts = [f"  - {name}: {' '.join(row[name][-1]['content'].split())[:300]}" for name in names]
    return "\n".join([f"- {row['signal']}, {row['source']}", *texts])


def write_folder(folder, parts, report, redacted):
    """Write all files, or none: under another name until all are there; an older folder of this name moves aside."""
    texts = [m["content"] for rows in parts.values() for row in rows for value in row.values() for m in items(value)]
    if redacted and any(map(KEYS.search, [report, *texts])):
        sys.exit(f"{folder}: something like a key is left in the texts: nothing was written")
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run left
    try:
        unfinished.mkdir(parents=True)
        for name, rows in parts.items():
            with open(unfinished / f"{name}.jsonl", "w", encoding="utf-8", errors="replace") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (unfinished / "report.md").write_text(report, encoding="utf-8", errors="replace")
        older = next(path for n in range(1, 10**6) if not (path := Path(f"{folder}-{n}")).exists())
        moved = folder.exists() and folder.rename(older)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if moved:
        print(f"The earlier {folder} is now {older}")


def main():
    args, chats = parse_args(sys.argv[1:]), Chats()
    own = re.compile(rf"{re.escape(str(args.out.parent.resolve() / args.out.name))}(-\d+)?/")  # earlier outputs
    found = [path for source in args.sources for path in ([source] if source.is_file() else source.rglob("*"))]
    paths = sorted({path for path in found if path.is_file() and not own.match(str(path.resolve()))})
    for done, path in enumerate(paths, 1):
        chats.read(path)
        if sys.stderr.isatty():
            print(f"\rreading {done} of {len(paths)}", end="\n" * (done == len(paths)), file=sys.stderr, flush=True)
    rows, rated, reasons = make_rows(chats, args)
    rows, dropped = select_pairs(rows, args)
    used, alone = set().union(*(row["voted"] for row in rows)), defaultdict(list)
    for make in rated:  # its arguments: turns, thread, history, prompt, answer
        turns, thread, answer = make.args[0], make.args[1], make.args[4]
        if (id(turns.chat), answer["key"]) not in used and len(alone[id(turns), thread]) < args.max_per_chat:
            alone[id(turns), thread].append(make())
    alone = sum(alone.values(), [])

    marks, counts = defaultdict(dict), Counter()
    if args.no_redact:
        print("warning: --no-redact: keys, passwords, e-mails, numbers go into the files, and a model can learn them")
    else:
        shares = [redact(row, marks, counts) for row in rows]
        for row in alone:
            redact(row, marks, counts)
        dropped += [(row, "more than 0.3 of an answer redacted") for row, share in zip(rows, shares) if share > 0.3]
        rows = [row for row, share in zip(rows, shares) if share <= 0.3]
    # what a conversation's records came to: the last of these
    fate = {home: why.most_common(1)[0][0] for home, why in reasons.items() if why.total()}
    fate |= {row["home"]: why for row, why in dropped} | {row["home"]: "unpaired answers" for row in alone}
    fate |= {row["home"]: "pairs" for row in rows}
    records = chats.fates.copy()
    for chat in chats.chats.values():
        for thread, number in chat.records.items():
            home = chat.source, str(thread or chat.key)
            records[fate.get(home, "no answer to a person's words, or a copy of one")] += number
    left_out = sum(reasons.values(), Counter(reason for _, reason in dropped))
    if not (rows or alone):
        looked = "choices between two answers, ratings, regenerated answers, data sets' pairs"
        more = "" if args.corrections else "; --corrections looks for corrected answers, too"
        why = "; ".join(f"{number} {reason}" for reason, number in (records | left_out).most_common() if number)
        sys.exit(f"no pair in {len(paths)} files, {records.total()} records: looked for {looked}{more}. {why}")
    parts = split_by_chat(rows, args)
    report = report_of(rows, alone, parts, records, left_out, counts)
    if not args.dry_run:
        inner, names = ("home", "voted", "label"), ("prompt", "chosen", "label", "signal")
        parts = {name: [{k: row[k] for k in row if k not in inner} for row in part] for name, part in parts.items()}
        parts["unpaired"] = [{k.replace("chosen", "completion"): row[k] for k in names} for row in alone]
        write_folder(args.out, {name: part for name, part in parts.items() if part}, report, not args.no_redact)
        report += f"\nNext: python dpo_trainer.py --data {args.out} --model ..."
    print(report.encode("utf-8", "replace").decode())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # the report went into head or less, which has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}: make room there, or choose another --out")
