# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Build preference pairs from a person's chat exports, session logs and preference datasets.

    python build_dpo_pairs.py ~/Downloads/chatgpt-export.zip ~/.claude/projects ~/.hermes/state.db --out my_pairs
    python build_dpo_pairs.py data/sessions --corrections --dry-run        only says what there is
    python build_dpo_pairs.py curated.jsonl --generate-rejected mlx-community/Llama-3.2-1B-Instruct-4bit

Input: files, folders and .zip or .gz archives of what the readers below know, told by content; they are only read.
Output, in --out: train.jsonl, valid.jsonl, test.jsonl for the trainers, unpaired.jsonl (rated answers without a rival),
report.md. A new source is one more function under @reads, which adds a record's turns to a Chat; the rest is shared.
"""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter, defaultdict
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------- options

# what a pair says, strongest first, and how much of its loss counts; half of it where the sign is faint
WEIGHTS = {"comparison": 1.0, "rating": 1.0, "dataset": 1.0, "regenerate": 0.7, "generated": 0.5, "correction": 0.4}
RIVALS = 3  # worse answers to one prompt that are paired with its best
HISTORY = 40  # messages before a prompt, at most: the latest
LONGEST = 2**18  # letters of a message: what is longer is in no pair
LIMIT = 2**33  # bytes of an archive's member, unpacked


def need(condition, problem):
    if not condition:
        raise ValueError(problem)


@contextmanager
def blame(place, advice):
    """Turn an exception inside into one line on stderr, "place: problem: advice", and exit status 1."""
    try:
        yield
    except Exception as error:
        sys.exit(f"{place}: {' '.join(str(error).split())[:300]}: {advice}")


def parse_args(words):
    """Return the options in words (as sys.argv[1:]); exit with one line if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = partial(need, False)
    add = parser.add_argument
    add("sources", nargs="+", help="files, folders or archives, told by what is in them")
    add("--out", default="my_pairs", help="output folder; an older one moves aside (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the report, write nothing")
    add("--corrections", action="store_true", help='also pair answers around "no, ...": guesses, listed in the report')
    add("--generate-rejected", metavar="MODEL", help="answer what has only a good answer with this model, as the worse")
    add("--max-tokens", type=int, default=256, help="of an answer by --generate-rejected (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="prompts at once for --generate-rejected (default: %(default)s)")
    add("--model", help="leave out pairs that are too long for it (default: no check)")
    add("--max-seq-length", type=int, default=1024, help="tokens, for --model (default: %(default)s)")
    add("--max-per-chat", type=int, default=10, help="pairs of one conversation (default: %(default)s)")
    add("--held-out", type=float, default=0.1, help="share of valid, and of test (default: %(default)s)")
    add("--no-redact", action="store_true", help="keep keys, e-mails, phone numbers, home folders in the texts")
    add("--seed", type=int, default=0, help="of the split and of --generate-rejected (default: %(default)s)")
    with blame(Path(__file__).name, "--help lists all options"):
        args = parser.parse_args(words)
        need(0 <= args.held_out < 0.5, f"--held-out {args.held_out}: give a share from 0 to 0.5")
        counts = ("max_tokens", "batch_size", "max_seq_length", "max_per_chat")
        need(min(getattr(args, name) for name in counts) > 0, f"each of {', '.join(counts)} must be 1 or more")
        args.out = Path(args.out)
        need(not args.out.is_file(), f"--out {args.out} is a file")
        need(all(args.sources), "a source is an empty word")
        for source in map(Path, args.sources):
            need(source.exists(), f"there is no {source}")
            inside = args.out.resolve() in (source.resolve(), *source.resolve().parents)
            need(not inside, f"--out {args.out} holds the source {source}, which would move aside with it")
    return args


# -------------------------------------------------------------------------------------------------------------- chats

# what front ends show folded or not at all: thoughts, tool calls, reminders, citations, pictures as text
FOLDED = {"<details type=": "</details>", "<think>": "</think>", "<system-reminder>": "</system-reminder>"}
FOLDED["\ue200"] = "\ue201"
HIDDEN = re.compile(
    r"【[^【】†]*†[^【】]*】|data:\w{1,20}/[\w.+-]{1,99};base64,[\w+/=]+|[\ue000-\uf8ff\u200b\u2060\ufeff]+"
)
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "timmy": "assistant"}
READERS = []  # (source, test of a record, whether a record is one line of a chat's log, reader)


def clean(text):
    """Return what of a text a person saw, in letters that UTF-8 has."""
    text = text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""
    for start, end in FOLDED.items():  # up to the last end only: where none follows, each start would search for one
        before, found, after = text.rpartition(end)
        text = re.sub(f"{start}.*?{end}", "", before + found, flags=re.S) + after if found else text
    return HIDDEN.sub("", text).strip()


def items(value, kind=dict):
    """Return the elements of a list that are of a kind; an empty list where there is none."""
    return [x for x in value if isinstance(x, kind)] if isinstance(value, list) else []


def part(record, *names):
    """Return the dict at these keys, an empty one where there is none."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def kinds_of(blocks):
    return {block.get("type") for block in items(blocks)}


def texts(blocks, *kinds):
    """Return the text of a message: itself, or its blocks' of these types joined."""
    if isinstance(blocks, str):
        return blocks
    found = [block.get("text") for block in items(blocks) if block.get("type") in kinds] + items(blocks, str)
    return "\n\n".join(items([text.get("value") if isinstance(text, dict) else text for text in found], str))


def state_of(blind=False, cut=False, call=False):
    return "blind" if blind else "cut" if cut else "call" if call else ""


def printable(text):
    """Return a text without what a terminal would obey and what UTF-8 cannot hold."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cs") and c != "\n" else c for c in text)


def name_of(value):
    """Return what can be the name of a node, a chat or a model: a text or a number; None for anything else."""
    return value if isinstance(value, (str, int, float)) else None


def votes(value, good, bad):
    """Return 1 for the good value, -1 for the bad one, as numbers or as texts, and None for any other."""
    return {str(good): 1, str(bad): -1}.get(str(value))


class Chat:
    """A conversation as a tree of nodes, by key, in the order of their making.

    A node has its parent's key, a role (user, assistant, or hop: no turn of its own), a text and a state: "" for whole,
    "call" where more must follow, "cut" where nothing whole came of it, "blind" for a prompt with a picture or a file,
    which no later prompt can do without. rating: more is better. good: all answers are. forest: many chats, by thread.
    """

    def __init__(self, source):
        self.source, self.key, self.updated, self.leaf, self.last, self.nodes = source, None, 0, None, None, {}
        self.dataset = self.good = self.skip = self.forest = False
        self.long = 0  # messages of more than LONGEST letters
        # {prompt's key: (the answer that was taken, all that were shown to choose from)}; what a reader notes
        self.chosen, self.facts = {}, {}

    def add(self, role, text="", key=None, parent=False, state="", time=None, model=None, **facts):
        """Add a node after parent (False: after the last one), make it the last; return its key."""
        key, text, role = name_of(key) or str(len(self.nodes)), clean(text), ROLES.get(role, role)
        role = role if role in ("user", "assistant") and (text or state) else "hop"
        parent = self.last if parent is False else name_of(parent)
        if len(text) > LONGEST:
            self.long, text, state = self.long + 1, "", "blind" if role == "user" else "cut"
        node = {"parent": parent, "role": role, "text": text, "state": state, "time": time, "model": name_of(model)}
        self.nodes.setdefault(key, node | facts)
        self.last = key
        return key

    def ranked(self, prompt, answers):
        """Add a data set's prompt (text or messages) and its answers, each (text or messages, score)."""
        self.dataset = True
        for message in [{"role": "user", "content": prompt}] if isinstance(prompt, str) else items(prompt):
            self.add(message.get("role") or message.get("from"), message.get("content") or message.get("value"))
        asked = self.last
        for answer, score in answers:
            answer = items(answer)[-1] if items(answer) else answer
            answer = answer.get("content") or answer.get("value") if isinstance(answer, dict) else answer
            if isinstance(score, (int, float)) and isinstance(answer, str):
                # not cleaned: a data set's <think> is part of its answers
                text = answer.encode("utf-8", "replace").decode().strip()
                long = len(text) > LONGEST
                key = self.add("assistant", text if long else "-", parent=asked, rating=score)
                self.nodes[key]["text"] = "" if long else text


def reads(source, test, log=False):
    """Enter a function as the reader of records that pass the test; log: they are lines, all of a file one chat."""
    return lambda reader: READERS.append((source, test, log, reader)) or reader


def has(*names):
    return lambda record: all(record.get(name) is not None for name in names)


@reads("chatgpt", lambda r: isinstance(r.get("mapping"), dict))
def read_chatgpt(chat, r):
    chat.key, chat.updated = r.get("conversation_id") or r.get("id"), r.get("update_time")
    chat.leaf = r.get("current_node")
    results = items(r.get("moderation_results"))
    moderated = {result.get("message_id") for result in results if result.get("flagged") or result.get("blocked")}
    for key in r["mapping"]:
        message = part(r["mapping"], key, "message")
        meta, content, author = (part(message, name) for name in ("metadata", "content", "author"))
        role, kind, parts = author.get("role"), content.get("content_type"), content.get("parts") or []
        hidden = ("is_visually_hidden_from_conversation", "is_user_system_message", "rebase_system_message")
        shown = kind in ("text", "multimodal_text") and message.get("weight") != 0 and not any(map(meta.get, hidden))
        text = "\n".join(items(parts, str)) if shown else ""
        finish = part(meta, "finish_details").get("type")
        whole = message.get("status") in (None, "finished_successfully") and finish not in ("max_tokens", "interrupted")
        final = message.get("recipient") in (None, "all") and message.get("channel") in (None, "final")
        said = role == "assistant"
        state = state_of(
            blind=role == "user" and len(items(parts, str)) < len(parts),
            cut=kind == "system_error" or said and (not whole or key in moderated),
            call=said and (not final or kind == "code" or text and message.get("end_turn") is False),
        )
        parent = part(r["mapping"], key).get("parent")
        chat.add(role, text, key, parent, state, message.get("create_time"), meta.get("model_slug"))
        if meta.get("paragen_variants_info") or meta.get("paragen_variant_choice"):
            count = part(meta, "paragen_variants_info").get("num_variants_in_stream")
            shown = items(part(r["mapping"], key).get("children"), str)[: count if type(count) is int else 2]
            chat.chosen[key] = name_of(meta.get("paragen_variant_choice")), set(shown)


@reads("chatgpt", lambda r: r.get("rating") and r.get("conversation_id") and (r.get("message_id") or r.get("id")))
def read_chatgpt_feedback(chat, r):
    rating = str(r["rating"]).lower().replace("_", "")
    chat.facts["rated"] = {r.get("message_id") or r["id"]: votes(rating, "thumbsup", "thumbsdown")}


@reads("chatgpt", lambda r: part(r, "output", "feedback_step_2"))
def read_chatgpt_comparison(chat, r):
    step = part(r, "output", "feedback_step_2")
    old, new = ({m.get("id") for m in items(step.get(f"{name}_turn"))} for name in ("original", "new"))
    chat.facts["compared"] = [(step.get("completion_comparison_rating"), old, new)]


@reads("claude", lambda r: isinstance(r.get("chat_messages"), list))
def read_claude(chat, r):
    chat.key, chat.updated, chat.leaf = r.get("uuid"), r.get("updated_at"), r.get("current_leaf_message_uuid")
    for m in items(r["chat_messages"]):
        blocks = items(m.get("content"))
        calls = [i for i, block in enumerate(blocks) if block.get("type") in ("tool_use", "tool_result")]
        text = texts(blocks[calls[-1] + 1 :] if calls else blocks, "text") or ("" if calls else m.get("text") or "")
        text = text.replace("This block is not supported on your current device yet.", "").replace("```\n\n```", "")
        cut = m.get("truncated") or m.get("stop_reason") in ("max_tokens", "user_canceled", "error")
        blind = m.get("sender") == "human" and (m.get("attachments") or m.get("files"))
        parent = m.get("parent_message_uuid") or False  # older exports have none: a line
        state = state_of(blind, cut, calls and not text.strip())
        chat.add(m.get("sender"), text, m.get("uuid"), parent, state, m.get("created_at"), r.get("model"))


# what stands in the user's place in an agent's log though nobody typed it
INJECTED = re.compile(
    r"<(command-|local-command-|bash-|task-notification|environment_context|user_instructions|turn_aborted|skill"
    r"|collaboration|permissions)|Caveat: The messages below|Stop hook feedback:|# AGENTS\.md instructions"
    r"|This session is being continued|\[CONTEXT COMPACTION|Review the conversation above and |\[Request interrupted"
)


@reads("claude-code", lambda r: "type" in r and (r.keys() >= {"uuid", "sessionId"} or "leafUuid" in r), log=True)
def read_claude_code(chat, r):
    chat.key, chat.forest, message = "", True, part(r, "message")  # of all files: a resumed session repeats the old one
    if r.get("isSidechain") or not r.get("uuid"):
        return
    blocks, mid, role = message.get("content"), message.get("id"), r["type"]
    text, kinds, parent = texts(blocks, "text"), kinds_of(blocks), r.get("parentUuid") or r.get("logicalParentUuid")
    hidden = ("isMeta", "isCompactSummary", "isVisibleInTranscriptOnly")
    cut = r.get("isApiErrorMessage") or message.get("model") == "<synthetic>" or text.startswith("[Request interrupted")
    if role == "user" and ("tool_result" in kinds or INJECTED.match(text.lstrip()) or any(map(r.get, hidden))):
        role = "hop"
    before = chat.nodes.get(parent, {})
    if role == "assistant" and text and before.get("mid") == mid and before["text"] and not before["state"]:
        text = before["text"] + "\n\n" + text  # a message is a record for each of its blocks
    state = state_of("image" in kinds, cut, "tool_use" in kinds)
    facts = {"mid": mid, "thread": name_of(part(r, "forkedFrom").get("sessionId") or r.get("sessionId"))}
    chat.add(role, text, r["uuid"], parent, state, r.get("timestamp"), message.get("model"), **facts)


CODEX = ("session_meta", "response_item", "event_msg", "turn_context", "compacted", "world_state")


@reads("codex", lambda r: r.get("type") in CODEX and isinstance(r.get("payload"), dict), log=True)
@reads("codex", lambda r: "record_type" in r or {"id", "timestamp", "instructions"} <= r.keys(), log=True)
@reads("codex", lambda r: r.get("type") == "message" and isinstance(r.get("content"), list) and "role" in r, log=True)
@reads("codex", lambda r: r.get("type") in ("reasoning", "function_call", "function_call_output"), log=True)
def read_codex(chat, r):
    p, what, turns = part(r, "payload") or r, r.get("type"), chat.facts.setdefault("turns", [])
    kind, role = p.get("type"), p.get("role")
    if what in (None, "session_meta"):
        chat.key, chat.skip = chat.key or p.get("id"), chat.skip or isinstance(p.get("source"), dict)
    elif what == "turn_context":
        chat.facts["model"] = p.get("model")
    elif what == "event_msg" and kind == "thread_rolled_back" and turns:
        back = min(len(turns), int(p.get("num_turns") or 1))
        chat.last = turns[-back]  # what was last before that turn
        del turns[-back:]
    elif what == "event_msg" and kind in ("turn_aborted", "error"):
        chat.add("hop", state="cut")
    elif what != "event_msg" and kind == "message" and role in ("user", "assistant"):
        text = texts(p.get("content"), "input_text", "output_text", "text")
        if role == "user":
            text = text.split("## My request for Codex:")[-1].strip()
            if INJECTED.match(text):
                return
            turns.append(chat.last)
        state = state_of("input_image" in kinds_of(p.get("content")), call=p.get("phase") == "commentary")
        chat.add(role, text, None, False, state, r.get("timestamp"), chat.facts.get("model"))
    elif what != "event_msg" and str(kind).endswith("_call"):
        chat.add("assistant", state="call")


def hermes_text(content):
    """Return a message's text and whether it holds more than text."""
    if isinstance(content, str) and content.startswith("\x00json:"):
        content = read_json(content[6:])
    return texts(content, "text"), bool(kinds_of(content) - {"text"})


def reaction(metadata):
    """Return 1 or -1 for the user's own emoji on a message, or None."""
    metadata = read_json(metadata) if isinstance(metadata, str) else metadata
    marks = [x.get("emoji") for x in items(part({"": metadata}, "").get("reactions")) if x.get("author") == "user"]
    ratings = {"👍": 1, "❤": 1, "🎉": 1, "🔥": 1, "💯": 1, "👎": -1, "😠": -1}
    return next((ratings[mark[0]] for mark in marks if mark and mark[0] in ratings), None)


def is_hermes(r):
    return {"messages", "session_id", "session_start"} <= r.keys() or {"messages", "source", "started_at"} <= r.keys()


@reads("hermes", is_hermes)
def read_hermes(chat, r):
    chat.key, live, rewound = r.get("session_id") or r.get("id"), None, {}
    chat.skip = r.get("source") in ("cron", "batch", "tool", "subagent", "kanban")
    for m in items(r["messages"]):
        (text, more), role, calls = hermes_text(m.get("content")), m.get("role"), m.get("tool_calls")
        if m.get("observed"):
            continue
        if m.get("_compressed_summary") or text.startswith("[CONTEXT COMPACTION"):
            live, rewound = chat.add("user", "-", None, live, "blind"), {}  # later prompts rest on it unseen
            continue
        hidden = m.get("display_kind") in ("hidden", "async_delegation_complete", "auto_continue", "model_switch")
        harness = role == "user" and (hidden or INJECTED.match(text.lstrip()))
        cut = harness or m.get("finish_reason") in ("length", "error", "content_filter")
        state = state_of(more, cut, role == "assistant" and calls not in (None, "", "[]", "null", []))
        rest = (state, m.get("timestamp"), r.get("model"))
        rating = reaction(m.get("display_metadata"))
        if m.get("active") != 0 or m.get("compacted"):
            live, rewound = chat.add(role, text, None, live, *rest, rating=rating), {}
        else:  # taken back: the same prompt once more starts where it stood before, anything else goes on from there
            parent = rewound.get(text, rewound.get(None, live)) if role == "user" else chat.last
            rewound |= {text: parent} if role == "user" else {}
            rewound[None] = chat.add(role, text, None, parent, *rest, rating=rating)


@reads("hermes", lambda r: {"conversations", "completed"} <= r.keys())
def read_trajectory(chat, r):
    for m in items(r["conversations"]):
        state = state_of(call=m.get("from") == "gpt" and "<tool_call>" in str(m.get("value")))
        chat.add(m.get("from"), m.get("value"), None, False, state, r.get("timestamp"), r.get("model"))


@reads("open-webui", lambda r: "snapshot" in r and part(r, "meta").get("message_id"))
@reads("open-webui", lambda r: part(r, "chat", "history", "messages") or part(r, "history", "messages"))
def read_open_webui(chat, r):
    if "snapshot" in r:  # a vote, with the chat as it was then, at one of three depths
        chat.facts["rated"] = {r["meta"]["message_id"]: votes(part(r, "data").get("rating"), 1, -1)}
        shot = part(r, "snapshot")
        inner = part(shot, "chat")
        r = {"id": r["meta"].get("chat_id")} | (inner if inner.keys() & {"chat", "history"} else shot)
    history, chat.key, chat.updated = part(r, "chat", "history") or part(r, "history"), r.get("id"), r.get("updated_at")
    chat.leaf = history.get("currentId")
    for key in part(history, "messages"):
        m = part(history, "messages", key)
        state = state_of(items(m.get("files")), m.get("error") or m.get("done") is False)
        rating = votes(part(m, "annotation").get("rating"), 1, -1)
        rest = (m.get("parentId"), state, m.get("timestamp"), m.get("model"))
        chat.add(m.get("role"), m.get("content"), key, *rest, rating=rating)


def studio_version(version):
    """Return the text and the state of one version of a message in LM Studio."""
    text, state, stops = "", "", (None, "eosFound", "stopStringFound", "toolCalls")
    for step in items(version.get("steps")) or [version | {"type": "contentBlock"}]:
        if step.get("type") == "contentBlock" and part(step, "style").get("type") != "thinking":
            kinds, stop = kinds_of(step.get("content")), part(step, "genInfo", "stats").get("stopReason")
            text = texts(step.get("content"), "text") or text
            state = state_of("file" in kinds, stop not in stops, "toolCallRequest" in kinds)
    return text, state


@reads("lm-studio", lambda r: any("versions" in m for m in items(r.get("messages"))))
def read_lm_studio(chat, r):
    for m in items(r["messages"]):
        versions, selected, before = items(m.get("versions")), m.get("currentlySelected"), chat.last
        known = type(selected) is int and 0 <= selected < len(versions)
        for i in sorted(range(len(versions)), key=lambda i: i == selected):  # what follows goes on from that one
            (text, state), role = studio_version(versions[i]), versions[i].get("role")
            doubt = not known or role == "user" and len(versions) > 1  # which answer belongs to which prompt is lost
            chat.add(role, text, None, before, "cut" if doubt else state, r.get("createdAt"))


@reads("llama.cpp", lambda r: isinstance(r.get("conv"), dict) and isinstance(r.get("messages"), list))
def read_llama_cpp(chat, r):
    chat.key, chat.leaf, chat.updated = r["conv"].get("id"), r["conv"].get("currNode"), r["conv"].get("lastModified")
    for m in items(r["messages"]):
        role = "hop" if m.get("type") in ("root", "system") else m.get("role")
        state = state_of(m.get("extra"), call=m.get("toolCalls") not in (None, "", "[]", []))
        rest = (m.get("parent"), state, m.get("timestamp"), m.get("model"))
        chat.add(role, m.get("content"), m.get("id"), *rest)


@reads("llama.cpp", lambda r: r.get("harness") == "llama.app" or "convId" in part(r, "message"), log=True)
def read_llama_cpp_lines(chat, r):
    if "convId" in part(r, "message"):
        read_llama_cpp(chat, {"conv": {"id": chat.key, "currNode": chat.leaf}, "messages": [r["message"]]})
    else:
        chat.key, chat.leaf = r.get("id"), r.get("currNode")


@reads("librechat", lambda r: isinstance(r.get("messagesTree"), list) or {"conversationId", "exportAt"} <= r.keys())
def read_librechat(chat, r):
    chat.key, chat.updated = r.get("conversationId"), r.get("exportAt")
    rows = [(m, False) for m in reversed(items(r.get("messagesTree") or r.get("messages")))]
    while rows:  # a message before its children
        m, above = rows.pop()
        cut = m.get("unfinished") or m.get("error") or m.get("finish_reason") in ("length", "error")
        state = state_of(m.get("files"), cut, [b.get("type") for b in items(m.get("content"))][-1:] == ["tool_call"])
        role = "user" if m.get("isCreatedByUser") else "assistant"
        text = m.get("text") or texts(m.get("content"), "text")
        rest = (m.get("parentMessageId") or above, state, m.get("createdAt"), m.get("model"))
        rating = votes(part(m, "feedback").get("rating"), "thumbsUp", "thumbsDown")
        key = chat.add(role, text, m.get("messageId"), *rest, rating=rating)
        rows += [(child, key) for child in reversed(items(m.get("children")))]


@reads("jan", lambda r: r.get("object") == "thread.message" and "thread_id" in r, log=True)
def read_jan(chat, r):
    chat.key, kinds = r["thread_id"], kinds_of(r.get("content"))
    state = state_of("image_url" in kinds, r.get("status") not in (None, "ready"), "tool_call" in kinds)
    chat.add(r.get("role"), texts(r.get("content"), "text"), None, False, state, r.get("created_at"))


@reads("ollama", has("ollama_chat"))
def read_ollama(chat, r):
    chat.key = r["ollama_chat"]
    for m in r["messages"]:
        chat.add(m.get("role"), m.get("content"), time=m.get("created_at"), model=m.get("model_name"))


@reads("timmy", lambda r: r.get("type") == "message" and r.get("role") in ("user", "timmy"), log=True)
@reads("timmy", lambda r: r.get("type") in ("tool_call", "decision", "error") and "timestamp" in r, log=True)
def read_timmy(chat, r):
    role = r.get("role") or ("assistant" if r["type"] == "tool_call" else "hop")
    state = state_of(cut=r["type"] == "error", call=r["type"] == "tool_call")
    chat.add(role, r.get("content"), state=state, time=r.get("timestamp"))


LINE = {"role", "content", "timestamp", "tool_calls", "tool_call_id", "name"}


@reads("hermes", lambda r: "role" in r and r.keys() <= LINE, log=True)
def read_transcript(chat, r):
    text, more = hermes_text(r.get("content"))
    chat.add(r["role"], text, state=state_of(more, call=r.get("tool_calls")), time=r.get("timestamp"))


# ----------------------------------------------------------------------------------------------------------- datasets


def first_of(record, *names):
    """Return the value of the first of these keys that has one, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


@reads("webgpt", has("question", "answer_0", "answer_1", "score_0", "score_1"))
def read_webgpt(chat, r):
    question = part(r, "question").get("full_text") or r["question"]
    chat.ranked(question, [(r["answer_0"], r["score_0"]), (r["answer_1"], r["score_1"])])


@reads("shp", has("history", "human_ref_A", "human_ref_B", "labels"))
def read_shp(chat, r):
    if (r.get("score_ratio") or 2) >= 1.5:  # the data set's card asks for 2
        chat.ranked(r["history"], [(r["human_ref_A"], r["labels"]), (r["human_ref_B"], 1 - r["labels"])])


@reads("nectar", lambda r: "prompt" in r and any("rank" in answer for answer in items(r.get("answers"))))
def read_nectar(chat, r):
    ranks = [(a.get("answer"), a.get("rank")) for a in items(r["answers"])]
    chat.ranked(turns_of(r["prompt"]), [(text, -rank) for text, rank in ranks if type(rank) in (int, float)])


@reads("helpsteer", has("prompt", "response_1", "response_2", "preference_strength"))
@reads("helpsteer", has("context", "response1", "response2", "overall_preference"))
def read_helpsteer_preference(chat, r):
    strength = first_of(r, "preference_strength", "overall_preference")  # below 0: the first is better
    sides = [first_of(r, f"response_{i}", f"response{i}") for i in (1, 2)]
    chat.ranked(first_of(r, "prompt", "context"), zip(sides, (-strength, strength)))


@reads("helpsteer", has("prompt", "response", "helpfulness"), log=True)
def read_helpsteer(chat, r):
    """Rows of one prompt stand one after another: they meet at its node."""
    chat.dataset = chat.forest = True
    need(isinstance(r["helpfulness"], (int, float)), "its score is no number")
    asked = chat.add("user", r["prompt"], str(r["prompt"]), None, thread=str(r["prompt"]))
    chat.add("assistant", r["response"], parent=asked, rating=r["helpfulness"])


@reads("oasst", lambda r: isinstance(part(r, "prompt").get("replies"), list) and "message_tree_id" in r)
@reads("oasst", has("message_tree_id", "message_id", "text", "role"), log=True)
def read_oasst(chat, r):
    chat.dataset = chat.forest = True
    rows = [(r.get("prompt") or r, r.get("parent_id"))]
    while rows:
        m, above = rows.pop()
        rank, cut = m.get("rank"), m.get("deleted") or m.get("review_result") is False
        facts = {"rating": None if rank is None else -rank, "thread": name_of(r["message_tree_id"])}
        key = chat.add(m.get("role"), m.get("text"), m.get("message_id"), above, state_of(cut=cut), **facts)
        rows += [(child, key) for child in reversed(items(m.get("replies")))]


@reads("openai", lambda r: "preferred_output" in r and "non_preferred_output" in r)
def read_openai_pair(chat, r):
    chat.ranked(part(r, "input").get("messages"), [(r["preferred_output"], 1), (r["non_preferred_output"], 0)])


def turns_of(text):
    """Return a text of turns, each begun by a blank line and Human: or Assistant:, as messages; any other as it is."""
    parts = re.split(r"\n\n(Human|Assistant):", text) if isinstance(text, str) else [text]
    if len(parts) < 3 or parts[0]:
        return text
    roles = ["user" if who == "Human" else "assistant" for who in parts[1::2]]
    return [{"role": role, "content": said.strip()} for role, said in zip(roles, parts[2::2]) if said.strip()]


def row_source(r):
    """Return whose form a row with a chosen and a rejected answer has."""
    if "score_chosen" in r:
        return "ultrafeedback"
    if "chosen_response" in r or "question" in r or "messages" in r and "prompt" not in r:
        return "axolotl"
    if "conversations" in r or "instruction" in r:
        return "llama-factory"
    return "hh-rlhf" if str(r.get("chosen")).startswith("\n\nHuman:") else "trl"


CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response")


@reads("trl", lambda r: first_of(r, *CHOSEN) is not None and first_of(r, *REJECTED) is not None)
def read_pair_row(chat, r):
    """Rows with chosen and rejected: TRL's, HH-RLHF, UltraFeedback, Axolotl's and LLaMA-Factory's forms."""
    chat.source, sides = row_source(r), [turns_of(first_of(r, *names)) for names in (CHOSEN, REJECTED)]
    prompt = turns_of(first_of(r, "prompt", "question", "instruction", "messages", "conversations", "input"))
    if "instruction" in r and r.get("input"):
        prompt = f"{r['instruction']}\n{r['input']}"
    lengths = {len(items(side)) for side in sides}
    if prompt is None and all(isinstance(side, str) for side in sides):  # what both begin with, up to a word
        prompt = os.path.commonprefix(sides)
        prompt = prompt[: prompt.rfind(" ") + 1]
        sides = [side[len(prompt) :] for side in sides]
    elif max(lengths) > 1:  # whole conversations: they must part at the last answer
        prompt = [a for a, b in zip(*(side[:-1] for side in sides)) if a == b]
        need(lengths == {len(prompt) + 1}, "they part before the last answer")
    roles = [ROLES.get(role, role) for role in (m.get("role") or m.get("from") for m in items(prompt))]
    need(not roles or roles[-1] == "user", "the prompt ends in no question")
    scored = r.get("score_chosen") is not None
    chat.ranked(prompt, zip(sides, (r["score_chosen"], r.get("score_rejected")) if scored else (1, 0)))


def label_of(r):
    """Return whether a row says that its answer is a good one; None where it says nothing: "pinned" is no label."""
    return next((r[name] for name in ("label", "kto_tag") if isinstance(r.get(name), bool)), None)


@reads("trl", lambda r: "prompt" in r and "completion" in r and label_of(r) is not None)
@reads("llama-factory", lambda r: ("messages" in r or "conversations" in r) and label_of(r) is not None)
def read_rated_row(chat, r):
    *prompt, last = items(r.get("messages") or r.get("conversations")) or [r.get("prompt"), r.get("completion")]
    chat.ranked(prompt[0] if "completion" in r else prompt, [(last, 1 if label_of(r) else -1)])
    chat.facts["unpaired"] = True


@reads("sharegpt", lambda r: any("from" in m for m in items(r.get("conversations"))))
@reads("openai", lambda r: any("role" in m for m in items(r.get("messages"))))
def read_good_row(chat, r):
    chat.good = True
    for m in items(r.get("conversations")) or items(r["messages"]):
        call = m.get("tool_calls") or m.get("function_call") or m.get("from") == "function_call"
        text = texts(first_of(m, "content", "value"), "text")
        chat.add(m.get("role") or m.get("from"), text, state=state_of(call=call))


# ------------------------------------------------------------------------------------------------------------ reading


def when(value):
    """Return a time, in seconds, milliseconds or as an ISO text, as seconds since 1970; 0 where there is none."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return 0
        value = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    value = value if type(value) in (int, float) and 0 < value < 1e14 else 0
    return value / 1000 if value > 1e11 else value


def find_files(sources):
    """Return the paths of all files in these files and folders."""
    found = [[path] if path.is_file() else path.rglob("*") for path in map(Path, sources)]
    return sorted({file for files in found for file in files if file.is_file()})


class Bounded(io.RawIOBase):
    """A stream that raises ValueError where it goes beyond a limit, as an archive made to fill the memory does."""

    def __init__(self, stream, limit):
        self.stream, self.limit = stream, limit

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *place):
        return self.stream.seek(*place)

    def readinto(self, buffer):
        count = self.stream.readinto(buffer)
        need(self.stream.tell() <= self.limit, f"it would unpack to more than {self.limit / 1e9:.2g} GB")
        return count


def open_members(stream, size, depth=0):
    """Yield the stream of a file, or of each file in it where it is a .zip or .gz; raise ValueError at a bomb.

    size: bytes of it on the disk, also where it comes out of another archive.
    """
    head = stream.read(4)
    stream.seek(0)
    bound = lambda packed: min(LIMIT, max(2**23, 200 * packed))
    need(depth < 4, "archives within archives within archives")
    if head[:2] == b"\x1f\x8b":
        with gzip.open(stream) as unpacked:
            yield from open_members(io.BufferedReader(Bounded(unpacked, bound(size))), size, depth + 1)
    elif head == b"PK\x03\x04":
        with zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                inside = not re.match(r"[/\\]|\w:", info.filename) and ".." not in re.split(r"[/\\]", info.filename)
                need(inside, f"its member {info.filename} lies outside of it")
                need(info.file_size <= bound(info.compress_size), f"its member {info.filename} is a bomb")
                with archive.open(info) as member:
                    yield from open_members(member, info.compress_size, depth + 1)
    else:
        yield stream


def read_json(text):
    """Return a text's JSON value; None where it is none, or a blank one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_values(stream, problems):
    """Yield the JSON values of a stream, one at a time: a list's elements, one value a line, or a single one."""
    wide = stream.read(2) in (b"\xff\xfe", b"\xfe\xff")
    stream.seek(0)
    text = io.TextIOWrapper(stream, "utf-16" if wide else "utf-8-sig", errors="replace")
    head = text.read(2**16).lstrip()[:1]
    text.seek(0)
    if head == "[":
        yield from read_list(text, problems)
    elif head == "{":
        first = text.readline(2**28)
        whole = None if read_json(first) is not None else read_json(first + text.read(2**30))  # over many lines
        if whole is not None:
            yield whole
            return
        text.seek(0)
        for line in iter(lambda: text.readline(2**28), ""):
            if not line.isspace():
                value = read_json(line)
                problems["lines that are no JSON"] += value is None
                yield value
    elif head:
        problems["files that are no JSON"] += 1


def read_list(text, problems):
    """Yield the elements of a JSON list as they are read, so that a large one never lies in memory as a whole."""
    decode, size = json.JSONDecoder().raw_decode, 2**20
    buffer = text.read(size)
    at = buffer.index("[") + 1
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        try:
            value, at = decode(buffer, at)
        except (ValueError, RecursionError) as error:
            more = text.read(size) if isinstance(error, ValueError) and len(buffer) < 2**30 else ""
            if not more:
                problems["lists that break off"] += buffer[at : at + 1] not in ("", "]")
                return
            buffer, at, size = buffer[at:] + more, 0, 2 * size
            continue
        size = 2**20
        if isinstance(value, dict):
            yield value


def read_database(path, stream):
    """Yield the chats of Hermes' state.db or of Ollama's app, from a copy: the original is not even locked."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy.db")
        with open(copy, "wb") as file:
            shutil.copyfileobj(stream, file)
        for end in ("-wal", "-journal"):  # what the program that has it open is about to put into it, or take back
            if os.path.exists(f"{path}{end}"):
                shutil.copy(f"{path}{end}", f"{copy}{end}")
        with closing(sqlite3.connect(copy)) as db:
            db.row_factory, db.text_factory = sqlite3.Row, lambda raw: raw.decode("utf-8", "replace")
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            name, of = ("sessions", "session_id") if "sessions" in tables else ("chats", "chat_id")
            need({name, "messages"} <= tables, "it holds neither Hermes' sessions nor Ollama's chats")
            db.execute(f"CREATE INDEX of_chat ON messages ({of})")
            for row in map(dict, db.execute(f"SELECT * FROM {name}")):
                found = db.execute(f"SELECT * FROM messages WHERE {of} = ? ORDER BY rowid", (row["id"],))
                head = row | {"session_id": row["id"], "session_start": 0}
                head = {"ollama_chat": row["id"]} if name == "chats" else head
                yield head | {"messages": list(map(dict, found))}


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


class Chats:
    """All that was read: chats by source and key, votes by message id, and counts of what could not be used."""

    def __init__(self):
        self.chats, self.rated, self.problems = {}, {}, Counter()
        self.won, self.tied = defaultdict(set), defaultdict(set)  # answer: those that it was preferred to, was equal to

    def read(self, path):
        """Read a file, and the files in an archive; one that cannot be read is named and counted."""
        try:
            with open(path, "rb") as stream:
                for member in open_members(stream, os.fstat(stream.fileno()).st_size):
                    head = member.read(16)
                    member.seek(0)
                    database = head == b"SQLite format 3\0"
                    self.take(read_database(path, member) if database else read_values(member, self.problems))
        except Exception as error:  # one damaged file, of whatever kind, must not stop the others
            self.problems["files that could not be read"] += 1
            print(printable(f"{path}: {error}: passed over"))

    def take(self, values):
        logs = {}
        for value in values:
            if isinstance(value, dict):
                self.dispatch(value, logs)
        for chat in logs.values():
            self.keep(chat)

    def dispatch(self, record, logs):
        """Give a record to the first reader whose test it passes, or its elements, where it holds a list of records."""
        for source, test, log, reader in READERS:
            try:
                if not test(record):
                    continue
                chat = logs.setdefault(reader, Chat(source)) if log else Chat(source)
                reader(chat, record)
                log or self.keep(chat)
            except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError):
                self.problems[f"records of {source} that could not be read"] += 1
            return
        inner = [items(value) for value in record.values()]
        for element in sum(inner, []) if any(inner) and len(record) < 5 else []:
            self.dispatch(element, logs)
        self.problems["records of no known kind"] += not any(inner)

    def keep(self, chat):
        """Enter a chat, over an older snapshot of it, and its votes."""
        self.rated.update({key: rating for key, rating in chat.facts.get("rated", {}).items() if rating})
        for rating, old, new in chat.facts.get("compared", []):
            better, worse = (new, old) if rating == "new" else (old, new)
            for key in better if rating in ("new", "original") else ():
                self.won[key] |= worse
            for key in old | new if rating == "same" else ():
                self.tied[key] |= old | new
        if chat.skip or not chat.nodes:
            return
        self.problems[f"messages of more than {LONGEST} letters"] += chat.long
        chat.key, chat.leaf = name_of(chat.key), name_of(chat.leaf)
        if not (chat.key or chat.forest):  # a data set's row is no snapshot of another
            chat.key = len(self.chats) if chat.dataset else digest([node["text"] for node in chat.nodes.values()])
        known = self.chats.setdefault((chat.source, chat.key), chat)
        if chat.forest:
            for key, node in chat.nodes.items():
                known.nodes.setdefault(key, node)
        elif (when(chat.updated), len(chat.nodes)) > (when(known.updated), len(known.nodes)):
            self.chats[chat.source, chat.key] = chat


# -------------------------------------------------------------------------------------------------------------- pairs


class Turns:
    """A chat's prompts with the answers that each got, found by walking its tree from the roots.

    A history is a number: that of the history before, a prompt and its answer. answers: {(thread, history, prompt):
    answers}; each is a dict with key, text, time, model, rating, ids (of its branch), active, continued, order.
    """

    def __init__(self, chat, rated, redactor):
        self.chat, self.rated, self.redactor, self.nodes, self.said = chat, rated, redactor, chat.nodes, {}
        self.histories, self.numbers = [None], {}
        self.order = {key: i for i, key in enumerate(self.nodes)}
        self.children, roots = defaultdict(list), []
        for key, node in self.nodes.items():
            inside = node["parent"] in self.nodes and node["parent"] != key
            (self.children[node["parent"]] if inside else roots).append(key)
        self.at, self.answers, self.continued, self.active = {}, defaultdict(dict), set(), set()
        self.threads, self.held = defaultdict(list), {}
        for root in roots:
            self.walk(root)
        for keys in self.threads.values():
            self.show(keys)

    def enter(self, history, prompt, answer):
        """Return the number of the history that goes on with this prompt and answer."""
        step = (history, prompt, answer)
        if step not in self.numbers:
            self.numbers[step] = len(self.histories)
            self.histories.append(step)
        return self.numbers[step]

    def message(self, role, text):
        """Return a redacted message; the same one each time, since a history stands in many prompts."""
        if (role, text) not in self.said:
            self.said[role, text] = {"role": role, "content": self.redactor(text)}
        return self.said[role, text]

    def messages(self, history, prompt):
        """Return a history and a prompt after it as messages, without the turns that were not answered."""
        found = [self.message("user", prompt)]
        while history and len(found) <= HISTORY:
            history, asked, answer = self.histories[history]
            if answer is not None:
                found += [self.message("assistant", answer), self.message("user", asked)]
        return found[::-1]

    def walk(self, root):
        """Follow a tree from its root: where each node stands, which branches end in an answer, which is shown."""
        stack, seen, thread = [root], [], self.nodes[root].get("thread") or self.chat.key
        while stack:
            key = stack.pop()
            seen.append(key)
            node, kin = self.nodes[key], self.children[key]
            # the prompt that it belongs to, the history of that, the last text since, whether more must follow, is cut
            user, history, last, call, cut = self.at.get(node["parent"], (None, 0, None, False, False))
            if node["role"] == "user":
                before = {last, *self.held.get(user, ())}
                if node["state"] == "cut":  # the program's own words: whether the person goes on is seen after them
                    self.held[key] = before
                else:
                    self.continued |= before
                if user is not None and history is not None:
                    whole = last is not None and not (call or cut)
                    answer = self.nodes[last]["text"] if whole else None
                    history = self.enter(history, self.nodes[user]["text"], answer)
                history = None if node["state"] == "blind" else history
                user, last, call, cut = key, None, False, node["state"] == "cut"
            else:
                cut = cut or node["state"] == "cut"
                call = node["state"] == "call" or call and node["role"] == "hop"
                last = key if node["role"] == "assistant" and node["text"] and not call else last
            self.at[key] = (user, history, last, call, cut)
            ends = all(self.nodes[child]["role"] == "user" for child in kin)
            if ends and user is not None and last is not None and not (call or cut) and history is not None:
                self.enter_answer(thread, history, user, last, key)
            stack += reversed(kin)
        self.threads[thread] += seen

    def show(self, keys):
        """Mark as active the branch of a thread that is on show: the chat's own leaf's, or the latest node's."""
        leaf = self.chat.leaf
        if leaf not in self.at:
            leaf = max(keys, key=lambda key: (when(self.nodes[key].get("time")), self.order[key]))
        while leaf in self.nodes and leaf not in self.active:
            self.active.add(leaf)
            leaf = self.nodes[leaf]["parent"]

    def enter_answer(self, thread, history, user, last, end):
        """Enter the answer whose text is last, of the branch from user to end."""
        node, ids, rating = self.nodes[last], set(), None
        while end != user:
            ids.add(end)
            rating = self.rated.get(end, rating)
            end = self.nodes[end]["parent"]
        rating = node.get("rating") if node.get("rating") is not None else rating
        place = thread, history, " ".join(self.nodes[user]["text"].split())
        facts = {"key": last, "user": user, "ids": ids, "rating": rating, "order": self.order[last]}
        self.answers[place][last] = {name: node[name] for name in ("text", "time", "model")} | facts


def judge(answers, turns, chats):
    """Yield (chosen, rejected, signal, share of the weight): of a prompt's answers the best against each worse one."""
    chat = turns.chat
    for a in answers:
        a["active"], a["continued"] = a["key"] in turns.active, a["key"] in turns.continued

    def shown(a, b):
        """Return which answer was taken where these two were shown to choose from, else False."""
        choice, heads = chat.chosen.get(a["user"], (None, set()))
        return choice if a["user"] == b["user"] and heads & a["ids"] and heads & b["ids"] else False

    def beats(a, b):
        mine, others = a["ids"] - b["ids"], b["ids"] - a["ids"]
        return shown(a, b) in mine or any(chats.won[i] & others for i in mine if i in chats.won)

    def place(a):
        votes = sum(beats(a, b) - beats(b, a) for b in answers) if chat.chosen or chats.won else 0
        return votes, a["rating"] or 0, a["active"], a["continued"], a["order"]

    best, *rest = sorted(answers, key=place, reverse=True)
    for other in rest[:RIVALS]:
        up, down = best["rating"] or 0, other["rating"] or 0
        tied = any(chats.tied[i] & other["ids"] for i in best["ids"] if i in chats.tied) or shown(best, other) is None
        if beats(best, other):
            yield best, other, "comparison", 1
        elif up != down or chat.dataset:
            if up > down and not beats(other, best):
                yield best, other, "dataset" if chat.dataset else "rating", 1
        elif not (tied or up or beats(other, best)):
            kept = best["continued"] and not other["continued"]
            if best["active"] and not other["active"] and (best["continued"] or best["order"] > other["order"]):
                yield best, other, "regenerate", 1 if kept else 0.5


STRONG = re.compile(
    r"""^\W*(?:(?:no|nope|nah|wrong|incorrect|not\ quite|not\ what\ i)\b(?!\W+(?:problem|worries|need|rush|wait
    |thanks|thank|idea|doubt|more|one|longer|matter|further|other|all|sure|answers|that'?s\ all)\b)
    |(?:that|this|it)(?:'?s|\ is)\ (?:not|wrong|incorrect|false)\b(?!\s+(?:bad|a\s+(?:bad|problem)|an\s+issue|too|all))
    |(?:i|we)\s+(?:said|asked)\b(?!\s+(?:my|him|her|them|an?|some|that|so|it|around)\b)
    |(?:i|we)\s+(?:clearly|explicitly)\b
    |you\s+(?:forgot|missed|ignored|misread|misunderstood|skipped|left\s+out|made\s+a\s+mistake|got\s.{0,20}wrong)\b
    (?!\s+nothing)
    |you\s+(?:didn'?t|did\s+not)\s+(?:answer|say|tell|give|mention|include|use|follow|read|add|do|fix|address)\b
    |(?:it\s+|that\s+)?still\s+(?:wrong|fail|broken|doesn'?t|does\s+not|not\s+working|the\s+same)
    |(?:try|do\ it|check|redo|rewrite)\ (?:it\ )?again\b)""", re.I | re.X,
)  # fmt: skip
OWN_FAULT = re.compile(
    r"\b(i\s+(mis\w+|made\s+a|meant\s+to|was\s+wrong|should\s+have)|my\s+(bad|mistake|fault|typo)|scratch\s+that|typo"
    r"|wrong\s+(window|chat|tab)|ignore\s+(that|my)|not\s+saying|nothing\s+wrong|all\s+good|well\s+done"
    r"|no\W+(problem|worries|need|rush|thanks?))\b", re.I,
)  # fmt: skip
DENIAL = re.compile(
    r"\b(wrong|incorrect|false|not\s+(true|right|correct|the\s+case|an\s+answer|what\s+i)|mistaken?|forgot|missed"
    r"|misread|misunderstood|still)\b",
    re.I,
)  # fmt: skip
THANKS = re.compile(r"^\W*(thanks|thank you|ty|perfect|great|exactly|yes|good|works|that works|👍)", re.I)
APOLOGY = re.compile(
    r"^(?:(?:(?:you'?re|you are) (?:absolutely )?right|(?:i'?m )?sorry|(?:my )?apologies|i apologi[sz]e|my mistake"
    r"|good catch)[^.!\n]*[.!]\s*)+", re.I,
)  # fmt: skip
REFUSAL = re.compile(
    r"^\W*(i'?m (very |so )?sorry|i apologi[sz]e|i can'?t|i cannot|i'?m (not able|unable)|as an ai)\b", re.I
)
COMMON = set(
    "about after again answer could does from have here into just more need only please should some tell than that"
    " their them then there these they this those very want what when where which while will with would your".split()
)


def straight(text):
    return text.replace("’", "'")


def is_correction(text):
    """Whether a turn says that the answer before it was wrong, as section by section of the patterns above."""
    text = re.sub(r"```.*?```|^>.*?$", "", straight(text), flags=re.S | re.M)[:400]
    return bool(STRONG.search(text)) and not OWN_FAULT.search(text)


def words(text):
    return {word for word in re.findall(r"\w{4,}", text.lower()) if word not in COMMON}


def corrections(turns):
    """Yield (thread, history, prompt, chosen, rejected, share of the weight): an answer and the one that mended it."""
    following = defaultdict(list)  # answer: the prompts that came after it
    for key, node in turns.nodes.items():
        if node["role"] == "user" and key in turns.at and node["parent"] in turns.at:
            following[turns.at[node["parent"]][2]].append(key)
    for (thread, _, _), answers in turns.answers.items():
        user = next(iter(answers.values()))["user"]
        asked, said = turns.nodes[user]["text"], turns.at[user]
        before = turns.at.get(turns.nodes[user]["parent"])
        if len(answers) != 1 or not before or None in before[:3] or before[3] or before[4] or not is_correction(asked):
            continue
        first, [good] = turns.nodes[before[0]]["text"], answers.values()
        bad, text = turns.nodes[before[2]], good["text"]
        if sorry := APOLOGY.match(straight(text)):
            text = text[sorry.end() :]
        later = [turns.nodes[key]["text"] for key in following[good["key"]]]
        about = DENIAL.search(asked) or words(asked) & words(first)
        if "instead" in asked.lower() and words(asked) - words(first) - {"instead"}:
            about = None  # what the prompt did not say, an answer to it can only guess
        mended = not (REFUSAL.match(straight(text)) or text.rstrip().endswith("?") or any(map(is_correction, later)))
        if about and mended and text and not is_correction(first) and before[1] is not None and said[1] is not None:
            share = 1 if any(map(THANKS.match, later)) else 0.5
            yield thread, before[1], first, good | {"text": text}, bad, share


def make_rows(chats, redactor, args):
    """Return (rows, unpaired rows, rows that have only a good answer) of all chats, redacted."""
    rows, unpaired, singles = [], [], []
    for chat in chats.chats.values():
        turns, last = Turns(chat, chats.rated, redactor), None

        def row(thread, history, prompt, chosen, rejected, signal, share=1):
            moment, sides = when(chosen["time"]), [side["text"] for side in (chosen, rejected) if side]
            found = {
                "prompt": turns.messages(history, prompt),
                **{name: [turns.message("assistant", text)] for name, text in zip(("chosen", "rejected"), sides)},
                "signal": signal,
                "weight": round(WEIGHTS[signal] * share, 3),
                "source": chat.source,
                "conversation_id": digest(thread) if chat.dataset else str(thread),
                "created": datetime.fromtimestamp(moment, timezone.utc).isoformat() if moment else None,
                "model": redactor(chosen.get("model")),
                "gone": max(map(redactor.gone, sides)),
                "voted": {(id(chat), side["key"]) for side in (chosen, rejected) if side and signal != "correction"},
            }
            return redactor.row(found)

        for (thread, history, _), answers in turns.answers.items():
            answers = list(answers.values())
            place = thread, history, turns.nodes[answers[0]["user"]]["text"]
            rows += [row(*place, *judged) for judged in judge(answers, turns, chats)]
            for a in answers if not chat.dataset or chat.facts.get("unpaired") else []:
                if a["rating"]:
                    alone = row(*place, a, None, "dataset" if chat.dataset else "rating")
                    unpaired.append(alone | {"label": a["rating"] > 0})
            last = (*place, answers[-1], None, "generated")
        singles += [row(*last)] if chat.good and last else []
        if args.corrections:
            rows += [row(*found[:-1], "correction", found[-1]) for found in corrections(turns)]
    used = set().union(*(row["voted"] for row in rows))
    good = [row for row in unpaired if row["label"] and not row["voted"] & used]
    return rows, unpaired, singles + [row | {"signal": "generated", "weight": WEIGHTS["generated"]} for row in good]


# ---------------------------------------------------------------------------------------------------------- redaction

KEYS = re.compile(  # what begins as only a key does; https://github.com/gitleaks/gitleaks has more of them
    r"(?:\b|(?<=\\[nrt]))"
    r"(?:sk-ant-[\w-]{20,}|sk-(?:proj-|svcacct-|admin-|or-v1-)?[A-Za-z0-9_-]{16,}|gsk_\w{20,}|xai-\w{30,}|r8_\w{20,}"
    r"|pplx-\w{20,}|hf_[A-Za-z]{30,}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{60,}|xox[abposr]-[\w-]{10,}"
    r"|gl(?:pat|dt|ft|rt|cbt|ptt|soat|agent)-[\w.-]{20,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|dop_v1_[a-f0-9]{64}"
    r"|(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"
    r"|\d{8,10}:A[\w-]{34}|[sr]k_(?:live|test)_\w{10,}|SG\.[\w.-]{20,}|SK[0-9a-f]{32}|AGE-SECRET-KEY-1\w+"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{8,})|https://hooks\.slack\.com/\S+"
    r"|-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY-----[\s\S]*?(?:-----END[ A-Z0-9_-]*-----|$)"
)
UNMARKED = r"(?!\[[A-Z]+_\d)"  # not what has become a mark already
NAMED = r"(?i)(?:api[_-]?key|secret|token|passw(?:or)?d|passwd|pwd|credential|auth(?!or|ent))[\w.-]{0,30}[\"']?\s{0,3}"
ASSIGNED = (
    r"[:=]\s{0,3}[\"']?(?!xxx|<|\$\{|os\.environ|process\.env|example|changeme)" + UNMARKED +
    r"(?!(?:bearer|basic|token)\s|[\w.]+[(\[])([^\s\"'&]{7,}[^\s\"'&,;.)])"
)
IN_ADDRESS = (
    r"(?i)[?&](?:(?:access_|refresh_|id_)?token|api_key|client_secret|password|code|sig(?:nature)?"
    r"|x-(?:amz|goog)-signature)=" + UNMARKED + r"([^\s&\"']+)"
)
AUTHORIZATION = (
    r"(?i)authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:bearer|basic|token)\s+" + UNMARKED + r"([^\s\"']+)"
)
PRIVATE = [  # mark, pattern; what its group (all of it, without one) matches is replaced
    ("SECRET", KEYS),
    ("SECRET", re.compile(r"://[^\s:/@]{0,99}:" + UNMARKED + r"([^\s@/]{1,99})@")),
    ("SECRET", re.compile(AUTHORIZATION)),
    ("SECRET", re.compile(IN_ADDRESS)),
    ("SECRET", re.compile(NAMED + ASSIGNED)),
    ("SECRET", re.compile(NAMED + r"is\s+[\"']?((?=[^\s\"']*\d)[^\s\"'&]{7,}[^\s\"'&,;.)])")),
    ("EMAIL", re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}\.[A-Za-z]{2,24}\b")),
    ("HOME", re.compile(r"(?:(?<![\w.])/(?:home|Users)/|[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2})[^/\\\s\"':]+")),
    ("IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")),
    ("CARD", re.compile(r"\b\d(?:[ -]?\d){12,18}\b")),
    ("PHONE", re.compile(r"\+\d[\d ().-]{7,24}\d")),
]  # fmt: skip


@lru_cache(None)
def has_key(text):
    return bool(KEYS.search(text))


def is_card(text):
    """Whether digits pass the check of card numbers (Luhn's)."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * d, 10)) for d in digits[1::2]) % 10


def is_account(text):
    """Whether a text passes the check of account numbers (ISO 13616)."""
    text = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


class Redactor:
    """Puts a mark in the place of what is private, the same one wherever a value stands; off: changes nothing."""

    def __init__(self, off=False):
        self.off, self.known, self.marks, self.counts = off, {}, defaultdict(dict), Counter()
        self.secrets = {}  # {redacted text: {secret: its mark}}

    def __call__(self, text):
        if self.off or not isinstance(text, str):
            return text
        if text not in self.known:
            secrets, changed = {}, text
            for kind, pattern in PRIVATE:
                changed = pattern.sub(partial(self.mark, kind, secrets), changed)
            self.known[text] = changed
            if secrets:
                self.secrets[changed] = secrets
        return self.known[text]

    def mark(self, kind, secrets, found):
        value = found.group(found.re.groups)
        if kind == "IBAN" and not is_account(value):
            return found.group()
        if kind == "CARD":  # what follows a card's number may look like more of it
            ends = [i for i in range(len(value), 12, -1) if not value[i : i + 1].isdigit()]
            value = next((value[:i] for i in ends if is_card(value[:i])), None)
            if value is None:
                return found.group()
        self.counts[kind] += 1
        mark = "~" if kind == "HOME" else f"[{kind}_{self.marks[kind].setdefault(value, len(self.marks[kind]) + 1)}]"
        if kind == "SECRET":
            secrets[value] = mark
        return found.group().replace(value, mark)

    def row(self, row):
        """Return a row in which its secrets are gone, too, where they stand without what gave them away elsewhere."""
        sides = [name for name in ("prompt", "chosen", "rejected") if name in row]
        secrets = {}
        for message in sum([row[name] for name in sides], []):
            secrets |= self.secrets.get(message["content"], {})
        for name in sides if secrets else ():
            row[name] = [dict(message) for message in row[name]]
            for message, (value, mark) in itertools.product(row[name], secrets.items()):
                message["content"] = message["content"].replace(value, mark)
        return row

    def gone(self, text):
        """Return the share of a text that marks stand for."""
        kept = len(re.sub(r"\[(?:SECRET|EMAIL|IBAN|CARD|PHONE)_\d+\]", "", self(text)))
        return 1 - kept / max(len(text), 1)


# ------------------------------------------------------------------------------------------------------------- checks

ARTEFACT = re.compile(r"</?think>|</?details|</?tool_call>|[\ue000-\uf8ff]|【|turn\d+search\d+|\u200b")


def plain(text):
    return " ".join(text.casefold().split())


def script(text):
    """Return the script of most of a text's letters, as LATIN or CJK; None of fewer than 20."""
    letters = [unicodedata.name(c, "?").split()[0] for c in text[:2000] if c.isalpha()]
    return Counter(letters).most_common(1)[0][0] if len(letters) >= 20 else None


def why_not(row, too_long):
    """Return the reason to leave a pair out, or None."""
    prompt, good, bad = row["prompt"][-1]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]
    ours, theirs = (Counter(plain(side).split()) for side in (good, bad))
    scripts = [script(text) for text in (prompt, good, bad)]
    if not (good.strip() and bad.strip() and prompt.strip()):
        return "an empty prompt or answer"
    if plain(good) == plain(bad):
        return "equal answers"
    if sum((ours & theirs).values()) > 0.9 * max(ours.total(), theirs.total()):
        return "nearly equal answers"
    if min(len(good), len(bad)) < 0.1 * max(len(good), len(bad)):
        return "one answer ten times as long"
    if REFUSAL.match(straight(good)) and not REFUSAL.match(straight(bad)):
        return "a refusal as the better answer"
    if None not in scripts and scripts[0] == scripts[2] != scripts[1]:
        return "a better answer in another script"
    if set(ARTEFACT.findall(good)) != set(ARTEFACT.findall(bad)):
        return "thoughts, tool calls or citations in one answer"
    return "too long for the model" if too_long(row) else None


def leads(worse, start, end):
    """Whether worse, {answer: {answers worse than it: ...}}, leads from start to end."""
    seen, todo = set(), [start]
    while todo and end not in seen:
        found = set(worse.get(todo.pop(), ())) - seen
        seen |= found
        todo += found
    return end in seen


def select(rows, too_long, args):
    """Return the rows that pass, strongest signals first in each conversation, and a Counter of why others did not."""
    dropped, kept, worse, count = Counter(), {}, defaultdict(lambda: defaultdict(dict)), Counter()
    for number, row in enumerate(sorted(rows, key=lambda row: -row["weight"])):
        reason = "more than 0.3 of an answer redacted" if row.pop("gone", 0) > 0.3 else why_not(row, too_long)
        known = worse[tuple(message["content"] for message in row["prompt"])]
        good, bad = plain(row["chosen"][0]["content"]), plain(row["rejected"][0]["content"])
        chat, other = (row["source"], row["conversation_id"]), known[bad].get(good)
        if not reason and bad in known[good]:
            reason = "a duplicate"
        elif not reason and leads(known, bad, good):  # the stronger signal stays; of two equal ones none
            reason = "a contradiction"
            if other in kept and kept[other]["weight"] == row["weight"]:
                del kept[other]
                dropped[reason] += 1
        elif not reason and count[chat] >= args.max_per_chat:
            reason = f"more than {args.max_per_chat} pairs of a conversation"
        if reason:
            dropped[reason] += 1
        else:
            known[good][bad], kept[number] = number, row
            count[chat] += 1
    return list(kept.values()), dropped


def length_check(args):
    """Return a test of a row: whether prompt and longer answer have more tokens than --max-seq-length."""
    if not args.model:
        return lambda row: False
    with blame(args.model, "give a folder or a Hugging Face name; trust_remote_code is off"):
        from mlx_lm.utils import load_tokenizer

        tokenizer = load_tokenizer(args.model, {"trust_remote_code": False})
    count = lambda messages: len(tokenizer.apply_chat_template(messages))
    return lambda row: max(count(row["prompt"] + row[side]) for side in ("chosen", "rejected")) > args.max_seq_length


def generate_rejected(singles, args, done_file):
    """Return the rows with a model's own answers as the rejected ones, seeded; what done_file has is not done again."""
    with blame(args.generate_rejected, "give a folder or a Hugging Face name; trust_remote_code is off"):
        import mlx.core as mx
        import mlx_lm
        from mlx_lm.sample_utils import make_sampler

        model, tokenizer = mlx_lm.load(args.generate_rejected, {"trust_remote_code": False})
    with blame(done_file, "choose another --out"):
        done_file.parent.mkdir(parents=True, exist_ok=True)
        done_file.touch()
        known = [read_json(line) for line in done_file.read_text(encoding="utf-8", errors="replace").splitlines()]
    known = dict(pair for pair in known if len(items(pair, str)) == 2)
    name = lambda row: digest([args.generate_rejected, args.seed, args.max_tokens, row["prompt"]])
    rest = [row for row in singles if name(row) not in known]
    advice = f"lower --batch-size or --max-tokens, or make room; what is in {done_file} is not done again"
    for at in range(0, len(rest), args.batch_size):
        batch = rest[at : at + args.batch_size]
        mx.random.seed(int(name(batch[0])[:8], 16))
        ids = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in batch]
        settings = {"max_tokens": args.max_tokens, "sampler": make_sampler(temp=0.8), "return_token_ids": True}
        with blame(args.generate_rejected, advice):
            found = mlx_lm.batch_generate(model, tokenizer, ids, **settings)
        with blame(done_file, advice), open(done_file, "a", encoding="utf-8") as file:
            for row, text, tokens in zip(batch, found.texts, found.token_ids):
                # an answer that was cut teaches only length
                known[name(row)] = text if len(tokens) < args.max_tokens else ""
                file.write("\n" + json.dumps([name(row), known[name(row)]]))  # after a line that a kill may have cut
        progress("answering", at + len(batch), len(rest))
    return [row | {"rejected": [{"role": "assistant", "content": known[name(row)]}]} for row in singles]


# --------------------------------------------------------------------------------------------------------------- main


def progress(what, done, total):
    if sys.stderr.isatty():
        print(f"\r{what} {done} of {total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def split(rows, args):
    """Return {"train", "valid", "test": rows}, by conversation: none, and no prompt, is in two of them."""
    home = {}  # of conversations that share a prompt, the first

    def find(name):
        while home.setdefault(name, name) != name:
            home[name] = name = home.setdefault(home[name], home[name])  # shorter for the next one
        return name

    for row in rows:
        home[find(("prompt", plain(row["prompt"][0]["content"])))] = find((row["source"], row["conversation_id"]))
    groups = defaultdict(list)
    for row in rows:
        groups[find((row["source"], row["conversation_id"]))].append(row)
    order = [groups[name] for name in sorted(groups, key=str)]
    random.Random(args.seed).shuffle(order)
    parts, wanted = {"test": [], "valid": [], "train": []}, args.held_out * len(rows)
    for group in order:
        name = next((name for name in ("test", "valid") if len(parts[name]) + len(group) <= wanted), "train")
        parts[name] += group
    return parts


def table(counter, *heads):
    """Return a Counter as a Markdown table, the largest first; its keys are texts, or tuples of several columns."""
    cells = [(*(key if isinstance(key, tuple) else (key,)), count) for key, count in counter.most_common() if count]
    rows = [f"| {' | '.join(map(str, row))} |" for row in [heads, ["---"] * len(heads), *cells]]
    return "\n".join(rows) if cells else "none"


def make_report(rows, dropped, parts, problems, unpaired, redactor, args):
    """Return report.md's text."""
    longer = sum(len(r["chosen"][0]["content"]) > len(r["rejected"][0]["content"]) for r in rows) / max(len(rows), 1)
    days = sorted(r["created"][:10] for r in rows if r["created"]) or ["unknown"]
    sizes = Counter((r["source"], r["conversation_id"]) for r in rows)
    most = max(sizes.values(), default=0)
    lines = ["# Pairs", f"{len(rows)} pairs of {len(sizes)} conversations, at most {most} of one: "]
    lines[-1] += ", ".join(f"{name} {len(part)}" for name, part in parts.items())
    lines += [f"{len(unpaired)} rated answers without a rival.", f"Dates: {days[0]} to {days[-1]}."]
    lines += [f"The chosen answer is the longer one in {longer:.2f} of the pairs."]
    if longer > 0.6:
        lines[-1] += " Warning: above 0.6 a model learns to write more; add pairs whose better answer is the shorter."
    if len(rows) < 100:
        lines += ["Warning: fewer than 100 pairs are soon learnt by heart."]
    kinds = Counter((r["source"], r["signal"]) for r in rows)
    lines += ["## Source and signal", table(kinds, "source", "signal", "pairs")]
    lines += ["## Left out", table(dropped, "why", "pairs"), "## Not read", table(problems, "what", "count")]
    lines += ["## Redacted", table(redactor.counts, "what", "places")]
    lines += ["## Models", table(Counter(r["model"] or "unknown" for r in rows), "model", "pairs")]
    if corrected := [r for r in rows if r["signal"] == "correction"]:
        lines += ["## Corrections, to be read: they are guesses", *map(sample, corrected)]
    lines += ["## Samples", *map(sample, random.Random(args.seed).sample(rows, min(3, len(rows))))]
    return printable("\n\n".join(lines) + "\n")


def sample(row):
    cut = lambda text: " ".join(text.split())[:300]
    prompt, good, bad = (cut(messages[-1]["content"]) for messages in (row["prompt"], row["chosen"], row["rejected"]))
    return f"- {row['signal']}, {row['source']}\n  - prompt: {prompt}\n  - chosen: {good}\n  - rejected: {bad}"


def sync(path):
    """Return when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(folder):
    """Give a folder to write in, which gets this name when all of it is on the disk; an older one moves aside."""
    with blame(folder, "choose another folder, or make room"):
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        older = next(path for n in range(1, 10**6) if not (path := Path(f"{folder}-{n}")).exists())
        if unfinished.exists():
            print(f"{unfinished} is what a killed run left: it is written anew")
            shutil.rmtree(unfinished)
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            for path in [*unfinished.rglob("*"), unfinished]:
                sync(path)
            if folder.exists():
                folder.rename(older)
            unfinished.rename(folder)
            sync(folder.parent)
        finally:
            if older.exists() and not folder.exists():
                older.rename(folder)
            shutil.rmtree(unfinished, ignore_errors=True)
        if older.exists():
            print(f"The earlier {folder} is now {older}")


def write(folder, parts, report, redacted):
    """Write all files, or none: exit if a key is left."""
    with blame(folder, "nothing was written"):
        for name, rows in parts.items() if redacted else ():
            for row in rows:
                messages = sum([row.get(part, []) for part in ("prompt", "chosen", "rejected", "completion")], [])
                left = any(has_key(message["content"]) for message in messages)
                need(not left, f"something like a key is left in {name}.jsonl")
        need(not (redacted and has_key(report)), "something like a key is left in the report")
    with whole(folder) as unfinished:
        for name, rows in parts.items():
            with open(unfinished / f"{name}.jsonl", "w", encoding="utf-8", errors="replace") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (unfinished / "report.md").write_text(report, encoding="utf-8", errors="replace")


def is_output(path, folder):
    """Whether a file lies in an output of this script: the folder of this run, an older one or an unfinished one."""
    name = re.escape(folder.name)
    own = re.compile(rf"unfinished-{name}|{name}(-\d+|\.generated\.jsonl)?")
    places, home = [path.resolve(), *path.resolve().parents], folder.resolve().parent
    return any(own.fullmatch(place.name) and place.parent == home for place in places)


def main():
    args, chats = parse_args(sys.argv[1:]), Chats()
    redactor, folder = Redactor(args.no_redact), args.out
    if args.no_redact:
        print("warning: --no-redact: keys, passwords, e-mails, numbers go into the files, and a model can learn them")
    paths = [path for path in find_files(args.sources) if not is_output(path, folder)]
    for done, path in enumerate(paths, 1):
        chats.read(path)
        progress("reading", done, len(paths))
    rows, unpaired, singles = make_rows(chats, redactor, args)
    if args.generate_rejected and singles and not args.dry_run:
        rows += generate_rejected(singles, args, Path(f"{args.out}.generated.jsonl"))
    rows, dropped = select(rows, length_check(args), args)
    alone, names = [], {"prompt": "prompt", "chosen": "completion", "label": "label", "signal": "signal"}
    used, count = set().union(*(row.pop("voted") for row in rows)), Counter()
    for row in [row for row in unpaired if not row["voted"] & used]:
        count[row["source"], row["conversation_id"]] += 1
        if count[row["source"], row["conversation_id"]] <= args.max_per_chat:
            alone.append({new: row[old] for old, new in names.items()})
    if not (rows or alone):
        looked = "choices between two answers, ratings, regenerated answers, data sets' pairs"
        more = "" if args.corrections else "; --corrections looks for corrected answers, too"
        why = "; ".join(f"{count} {reason}" for reason, count in [*dropped.items(), *chats.problems.items()] if count)
        sys.exit(f"no pair in {len(paths)} files: looked for {looked}{more}. {why}")
    parts = split(rows, args)
    report = make_report(rows, dropped, parts, chats.problems, alone, redactor, args)
    if not args.dry_run:
        parts = {name: part for name, part in {**parts, "unpaired": alone}.items() if part}
        write(folder, parts, report, not args.no_redact)
        report += f"\nNext: python dpo_trainer.py --data {folder} --model ..."
    print(report)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # the report went into head or less, which has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}: make room there, or choose another --out")
