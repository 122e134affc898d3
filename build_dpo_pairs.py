# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""
Build preference pairs from a person's chat exports, session logs and preference datasets.

    python build_dpo_pairs.py ~/Downloads/chatgpt-export.zip ~/.claude/projects ~/.hermes/state.db --out my_pairs
    python build_dpo_pairs.py data/sessions --corrections --dry-run        only says what there is

Input: files, folders and .zip or .gz archives, told by content; they are only read. Output, in --out: train.jsonl,
valid.jsonl, test.jsonl for the trainers; report.md, which says what became of every record.

A new source is one function among the readers: a test of a record, and the messages of a record that passes. For a log
of lines as {"id": 7, "ask": "...", "tries": [{"said": "...", "stars": 5}, {"said": "...", "stars": 1}]} it is

    @reads("starlog", has("ask", "tries"))
    def read_starlog(chat, r):
        chat.key = r["id"]
        asked = chat.add({"role": "user", "content": r["ask"]})
        for t in r["tries"]:
            answer = {"role": "assistant", "content": t["said"]}
            chat.add(answer, parent=asked, rating=t["stars"] - 3)

A message without parent= follows the last one; what is added last is on show. A new data set is one line of ROWS.
"""

import argparse
import gzip
import io
import json
import random
import re
import sqlite3
import sys
import traceback
import zipfile
from collections import Counter, defaultdict, namedtuple
from functools import partial
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------- options
# what a pair says, strongest first, and how much of its loss counts; half of it where the sign is faint
WEIGHTS = {"comparison": 1.0, "rating": 1.0, "dataset": 1.0, "regenerate": 0.7, "correction": 0.4}
RIVALS = 3  # worse answers to one prompt that are paired with its best
HISTORY = 40  # messages before a prompt, at most: the latest
HELD_OUT = 0.1  # share of the pairs that go into valid, and into test
UNPACKED = 2**33  # bytes that come out of one archive, at most


def parse_args(words):
    """Return the options in words (as sys.argv[1:]); exit with one line if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = lambda problem: sys.exit(f"{Path(__file__).name}: {problem}: --help lists all options")
    add = parser.add_argument
    add("sources", type=Path, nargs="+", help="files, folders or archives, told by what is in them")
    add("--out", type=Path, default="my_pairs", help="output folder; an older one moves aside (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the report, write nothing")
    add("--corrections", action="store_true", help='also pair answers around "no, ...": guesses')
    add("--no-redact", action="store_true", help="keep keys, e-mails, phone numbers, home folders in the texts")
    args = parser.parse_args(words)
    for source in args.sources:
        inside = args.out.resolve() in (source.resolve(), *source.resolve().parents)  # it would move aside with --out
        if inside or args.out.is_file() or not source.exists():
            parser.error(f"{source} is not there, or --out {args.out} is a file or holds it")
    return args


# ------------------------------------------------------------------------------------------------------------- words
# names of fields that hold a message's text, or the blocks that do
FIELDS = ("output", "content", "value", "text", "transcript", "parts", "refusal", "markdown", "message", "steps")
# kinds of blocks: neither said nor done; calls of tools; files, also as names of fields; tools that make files
SILENT = re.compile("(?i)think|thought|reason|debug|status")
CALL = re.compile("(?i)tool|call|function|code|command")
FILE = re.compile("(?i)^(?!.*(paragen|transcri)).*(image|(?<!pro)file|docu|audio|video|media|attach|asset|pdf|canvas)")
MAKES = re.compile(r"(?i)canmore|canvas|artifact|(?<!todo)write|create_?file|present_?files|(?<!view_)image|text2im")
# marks of a picture, a file or a pasted text in a message; of words that were spoken
MARK = r"(?m)\[(Image|Pasted text) #\d|<image\b|;base64,|\(sandbox:|!\[.*?\]\(/|^(\[The user sent an? |# Files ment)"
SPOKEN = re.compile(r"(?s)\[The user sent a voice message~ Here's what they said: \"(.*?)\"\]")
# what a person said while an answer was written, in a tool's result
STEERS = re.compile("(?i)proceed, the user said:|user has answered y|user guidance:|user sent a new m|OUT-OF-BAND USER")
# what front ends show folded or not at all: thoughts, reminders, citations, places of blocks
HIDDEN = re.compile(r"""(?sx)<details\ type=.*?</details>|<(think|system-reminder)>.*?</\1>|\ue200.*?\ue201
    |【[^【】]*†[^【】]*】|This\ block\ is\ not\ supported\ on\ your\ current\ device\ yet\.|[\ue000-\uf8ff\u200b\u2060]+""")
# what an agent's program puts before a person's words, unless it is HTML, or says in their place
BLOCK = re.compile(r"(?is)\s*<([a-z][\w-]*)[^<>]*>((?<=<task-notification>).*|.*?</\1[^<>]*>)\s*")
HTML = "a b body button code div em form h1 h2 head html i img input li ol p pre script span style table ul".split()
HARNESS = re.compile(r"""(?x)\s*(<[a-z]+[-_]|Caveat:\ The|Stop\ hook|\#\ AGENTS\.md|\[(System|SYSTEM|CONTEXT\ COMPACT
    |Request\ interrupted)|This\ session\ is\ being\ continued|Review\ the\ conversation\ above|Another\ Claude)""")
# how an answer ends of which a part is missing, in any of the sources
STOPPED = re.compile("(?i)max|length|error|filter|interrupt|progress|partial|incomplete|cancel|stopped|fail|abort")
VOTES = {"1": 1, "thumbsup": 1, "-1": -1, "thumbsdown": -1}
ROLES = {"human": "user", "gpt": "assistant", "timmy": "assistant", "function_call": "assistant"}
# what a person says of a wrong answer; what only looks like it; what a model says of its fault, or instead of an answer
WRONG = re.compile(r"""(?ix)\W*(no|nope|wrong|incorrect|not\ quite|not\ what\ i|(that|this|it)('?s|\ is)\ (not|wrong)
    |still\ wrong|try\ again|(i|we)\ (said|asked)(?!\ my)|you\ (forgot|mis\w+|did(n't|\ not)\ (answer|say)))\b""")
HARMLESS = re.compile(r"""(?ix)\b(no\W+(problem|worries|need|rush|thanks?|idea|doubt|more|further|wait)|typo
    |nothing|i\ (mis|meant)\w*|instead|my\ (bad|mistake)|wrong\ chat|not\ (bad|a|saying)|all\ (good|about))\b|```|^>""")
SORRY = r"(?i)((you.?re (absolutely )?right|(i.?m )?sorry|(my |i )?apologi\w+|my mistake|good catch)[^.!\n]*[.!]\s*)*"
DENIALS = ("wrong", "incorrect", "false", "right", "still", "what", "answer")
REFUSAL = re.compile(r"(?i)\W*(i.?m (very |so )?sorry|i apologi[sz]e|i can.?t|i cannot|i.?m (not|un)\b|as an ai)\b")
# why no pair may rest on a message
BESIDE = "a prompt with, or after, a picture, file, document or voice that is not in its text"
ELSEWHERE = "an answer, or one after it, whose picture, file or document is not in its text"
STEERED = "an answer, or one after it, that was steered while it was written"
NOBODY = "a prompt after words that no person asked for"
MACHINE = "a session that no person led"
# kinds of records: of Codex; what an attachment of Claude Code does to the prompt before it
CODEX = ("session_meta", "response_item", "event_msg", "turn_context", "compacted", "world_state")
ATTACHED = dict.fromkeys("file already_read_file pdf_reference directory image".split(), BESIDE)
ATTACHED["queued_command"] = STEERED
NO_TALK = {"chosen", "rejected", "label", "conv", "exportAt"}  # rows of preferences, of programs that are not read
READERS = []  # (source, test of a record, whether it is one line of a log, whether of an agent's, reader)


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


def clean(text):
    """Return what of a text a person saw, in letters that UTF-8 has."""
    return HIDDEN.sub("", text.encode("utf-8", "replace").decode()).strip()


def typed(text):
    """Return what a person typed of a text in the user's place of an agent's log."""
    text = clean(SPOKEN.sub(r"\1", text))
    while (block := BLOCK.match(text)) and block[1].lower() not in HTML:
        text = text[block.end() :]
    return "" if HARNESS.match(text) else text.split("## My request for Codex:")[-1].strip()


def pieces(content):
    """Yield (kind, text) of a message's text, block or blocks, inner ones too: text, call with its name, or another."""
    content = read_json(content[6:]) if str(content).startswith("\x00json:") else content  # Hermes' way with blocks
    heard = "transcri" in str(content)[: 2**16]
    for block in content if isinstance(content, list) else [content]:
        block = block if isinstance(block, dict) else {"text": block}
        kind, inner = str(first_of(block, "type", "content_type") or "text"), first_of(block, *FIELDS)
        sound = heard and "audio" in kind and "transcri" not in kind and not block.get("frames_asset_pointers")
        if SILENT.search(kind + str(block.get("style"))) or sound and not inner:  # the words of a sound stand beside it
            continue
        if CALL.search(kind) or "<tool_call>" in str(inner):
            yield "call", str(first_of(block, "name", "function_name") or part(block, "function").get("name") or kind)
        elif FILE.search(kind) and "transcript" not in block or inner is None and kind != "text":
            yield kind, ""
        elif isinstance(inner, (dict, list)):
            yield from pieces(inner)
        else:
            yield "text", inner if isinstance(inner, str) else ""


def spoken(content, role, words=clean):
    """Return a message's text after its last call; whether a call ends it, made a document, more than text is there."""
    said, call, made, beside = [], False, False, False
    for kind, text in pieces(content):
        if kind == "call":
            said, call, made = [], True, made or bool(MAKES.search(text))
        elif kind == "text":
            said.append(words(text))
            beside = beside or bool(re.search(MARK, SPOKEN.sub("", text)))
            call = call and not said[-1]
        else:
            beside = beside or role == "user" or bool(FILE.search(kind))
    return "\n\n".join(filter(None, said)), call, made, beside


def lies_beside(fields):
    """Whether a picture, a file, a document or a voice lies in a message's fields."""
    return any(FILE.search(name) and value not in (None, 0, 1, "", "[]", [], {}) for name, value in fields.items())


# ------------------------------------------------------------------------------------------------------------- chats
class Chat:
    """A conversation as a tree of nodes, by key, in the order of their making.

    A node has a role: user, assistant, harness (in the user's place, but typed by nobody), note (the same, and no turn
    where it stands within one), else no turn; a state: "call" where more must follow, "cut" where nothing whole came of
    it; a bar: why no pair may rest on it; a rating, more is better; a lane, of several models that answer at once.
    """

    key = leaf = last = time = None  # leaf: what is on show; time: of the latest change
    skip, system, dataset = "", "", False

    def __init__(self, source, agent, votes):
        self.source, self.agent, self.votes = source, agent, votes
        self.nodes, self.records, self.turns, self.words = {}, 0, [], {"user": typed} if agent else {}

    def add(self, m, key=None, parent=False, state="", bar="", **facts):
        """Add a message, its fields called as in any source, after parent (False: the last one); return its key."""
        role, key = first_of(m, "role", "from", "sender"), str(len(self.nodes) if key is None else key)
        called = role == "function_call" or m.get("function_call") or items(read_json(m.get("tool_calls")))
        role = ROLES.get(role, role)
        contents, words = [m[name] for name in FIELDS if m.get(name)], self.words.get(role, clean)
        content = next((content for content in contents if any(spoken(content, role, words))), contents)
        text, call, made, beside = spoken(content, role, words)
        ends = [str(m.get(name)) for name in ("stop_reason", "finish_reason", "status", "type")]
        ends += re.findall(r"'stopReason': '(\w+)'", str(m.get("steps")))
        cut = m.get("truncated") or m.get("error") or m.get("done") is False or any(map(STOPPED.search, ends))
        state = "cut" if cut else state or ("call" if call or called else "")
        if beside or lies_beside(m) or made and not self.agent:
            bar = bar or {"user": BESIDE, "assistant": ELSEWHERE}.get(role, "")
        if role in ("user", "assistant") and not (text or bar or state and role == "assistant"):
            role = "harness" if role == "user" and self.agent and spoken(contents, "")[0] else "hop"
        node = {"key": key, "parent": self.last if parent is False else str(parent), "role": role, "text": text}
        node |= {"state": state, "bar": bar, "made": made, "order": len(self.nodes)}
        self.nodes.setdefault(key, node | {"rating": VOTES.get(str(part(m, "annotation").get("rating")), 0)} | facts)
        self.last = key
        return key


def reads(source, test, log=False, agent=False):
    """Enter a function as the reader of records that pass the test; log: all of a file are one chat."""
    return lambda reader: READERS.append((source, test, log, agent, reader)) or reader


def has(*names):
    return lambda r: "signal" not in r and all(r.get(name) is not None for name in names)  # signal: this script's own


@reads("chatgpt", lambda r: isinstance(r.get("mapping"), dict))
def read_chatgpt(chat, r):
    chat.key, chat.leaf, chat.time = first_of(r, "conversation_id", "id"), r.get("current_node"), r.get("update_time")
    for key in r["mapping"]:
        node, m = part(r["mapping"], key), part(r["mapping"], key, "message")
        meta, content, role = part(m, "metadata"), part(m, "content"), part(m, "author").get("role")
        kind, to = content.get("content_type"), m.get("recipient") or "all"
        hidden = ("is_visually_hidden_from_conversation", "is_user_system_message", "rebase_system_message")
        shown = kind in ("text", "multimodal_text") and m.get("weight") != 0 and not any(map(meta.get, hidden))
        final = to == "all" and m.get("channel") in (None, "final") and (not shown or m.get("end_turn") is not False)
        made = role == "assistant" and MAKES.search(to) or role == "tool" and spoken(content, role)[3]
        said = {**(meta if role == "user" else {}), "role": role, "content": content if shown else ""}
        said |= {"status": (m.get("status"), kind), "stop_reason": part(meta, "finish_details").get("type")}
        state = "call" if role == "assistant" and (kind == "code" or not final) else ""
        chat.add(said | {"done": meta.get("is_complete")}, key, node.get("parent"), state, ELSEWHERE if made else "")
        if meta.get("paragen_variants_info") or meta.get("paragen_variant_choice"):  # answers to choose from
            taken, offered = meta.get("paragen_variant_choice"), items(node.get("children"), str)[:2]
            chat.votes.choices |= dict.fromkeys(offered, -1 if taken else 0) | ({taken: 1} if taken else {})


@reads("chatgpt", lambda r: part(r, "output", "feedback_step_2"))
@reads("chatgpt", lambda r: r.get("rating") and r.get("conversation_id"))
@reads("open-webui", lambda r: part(r, "meta").get("message_id") and part(r, "data"))
def read_votes(chat, r):
    step, rating = part(r, "output", "feedback_step_2"), r.get("rating") or part(r, "data").get("rating")
    best = {"original": 1, "new": -1}.get(step.get("completion_comparison_rating"), 0)
    for name, value in ("original_turn", best), ("new_turn", -best):
        chat.votes.choices |= {m.get("id"): value for m in items(step.get(name))}
    key = first_of(r, "message_id") or part(r, "meta").get("message_id") or r.get("id")
    chat.votes.rated[key] = VOTES.get(str(rating).lower().replace("_", ""), 0)


@reads("claude-code", lambda r: "type" in r and r.keys() & {"sessionId", "leafUuid", "messageId"}, log=True, agent=True)
def read_claude_code(chat, r):
    m, role, chat.key = part(r, "message"), r["type"], r.get("sessionId") or chat.key
    if r.get("operation") == "remove" and chat.last and r.get("reason") in (None, "absorbed_mid_turn"):
        chat.nodes[chat.last]["bar"] = STEERED
    if r.get("isSidechain") or not r.get("uuid"):
        return
    text = spoken(m.get("content"), "")[0]
    cut = r.get("isApiErrorMessage") or m.get("model") == "<synthetic>" or text.startswith("[Request interrupted")
    bar = ATTACHED.get(part(r, "attachment").get("type"), "")
    if role == "user":
        note, summary = r.get("isMeta") or r.get("isVisibleInTranscriptOnly"), r.get("isCompactSummary")
        other = part(r, "origin").get("kind") not in (None, "human")
        tool = cut or any(block.get("type") == "tool_result" for block in items(m.get("content")))
        role = "hop" if tool or summary else "note" if note else "harness" if other else role
        bar = NOBODY if summary else STEERED if tool and (typed(text) or STEERS.search(str(m))) else ""
    said = {"role": role, "content": m.get("content"), "imagePasteIds": r.get("imagePasteIds"), "error": cut}
    chat.add(said, r["uuid"], r.get("parentUuid") or r.get("logicalParentUuid"), bar=bar)


@reads("codex", lambda r: r.get("type") in CODEX and isinstance(r.get("payload"), dict), log=True, agent=True)
def read_codex(chat, r):
    p, event, kind = r["payload"], r["type"] == "event_msg", str(r["payload"].get("type"))
    if r["type"] == "session_meta":
        chat.key, chat.skip = chat.key or p.get("id"), MACHINE if isinstance(p.get("source"), dict) else ""
    elif kind == "thread_rolled_back" and chat.turns:
        back = int(p.get("num_turns") or 1)
        chat.last, chat.turns = chat.turns[-back:][0], chat.turns[:-back]  # what was last before that turn
    elif event and kind in ("turn_aborted", "error", "user_message"):
        chat.add({"error": kind != "user_message"}, bar=BESIDE if lies_beside(p) else "")
    elif not event and kind == "message" and p.get("role") in ("user", "assistant"):
        before, key = chat.last, chat.add(p, state="call" if p.get("phase") == "commentary" else "")
        chat.turns += [before] if chat.nodes[key]["role"] == "user" else []
    elif not event and kind.endswith("_call"):
        chat.add({"role": "assistant", "content": [p]})


@reads("hermes", has("messages", "session_id", "session_start"), agent=True)
@reads("hermes", has("messages", "source", "started_at"), agent=True)
def read_hermes(chat, r):
    chat.key, live, rewound = first_of(r, "session_id", "id"), None, {}
    chat.skip = MACHINE if first_of(r, "source", "platform") in ("cron", "batch", "tool", "subagent", "kanban") else ""
    for m in [m for m in items(r["messages"]) if not m.get("observed")]:
        role, raw = m.get("role"), str(m.get("content"))
        summary = m.get("_compressed_summary") or raw.startswith("[CONTEXT COMPACTION")  # later prompts rest on it
        hidden = m.get("display_kind") in ("hidden", "async_delegation_complete", "auto_continue", "model_switch")
        said = {**m, "role": "hop" if summary else "harness" if hidden and role == "user" else role}
        bar = NOBODY if summary else STEERED if role == "tool" and STEERS.search(raw) else ""
        if m.get("active") != 0 or m.get("compacted"):
            live, rewound = chat.add(said, None, live, bar=bar), {}
        else:  # taken back: the same prompt once more starts where it stood before, anything else goes on from there
            parent = rewound.setdefault(raw, rewound.get(None, live)) if role == "user" else chat.last
            rewound[None] = chat.add(said, None, parent, bar=bar)


@reads("open-webui", lambda r: part(r, "chat", "history", "messages") or part(r, "history", "messages"))
def read_open_webui(chat, r):
    outer, chat.key, chat.time = part(r, "chat") or r, r.get("id"), r.get("updated_at")
    messages, chat.leaf = part(outer, "history", "messages"), part(outer, "history").get("currentId")
    apart = items(outer.get("files")) and not any(map(lies_beside, items([*messages.values()])))  # of which prompt?
    for key in messages:
        m = part(messages, key)
        several = len(items(part(messages, m.get("parentId")).get("models"), str)) > 1
        lane = first_of(m, "modelIdx", "model") if several or m.get("modelIdx") else 0
        chat.add(m, key, m.get("parentId"), bar=BESIDE if apart else "", lane=lane)


@reads("openai", lambda r: any("role" in m for m in items(r.get("messages"))) and NO_TALK.isdisjoint(r))
@reads("sharegpt", lambda r: any("from" in m for m in items(r.get("conversations"))) and NO_TALK.isdisjoint(r))
@reads("timmy", lambda r: "timestamp" in r and r.get("type") in ("message", "tool_call"), log=True, agent=True)
@reads("hermes", lambda r: {"role", "content"} <= r.keys() and not r.keys() & {"id", "type"}, log=True, agent=True)
@reads("hermes", has("conversations", "completed"), agent=True)
@reads("lm-studio", lambda r: any("versions" in m for m in items(r.get("messages"))))
@reads("claude", lambda r: isinstance(r.get("chat_messages"), list))
def read_talk(chat, r):
    chat.key, chat.leaf, bar = r.get("uuid"), r.get("current_leaf_message_uuid"), BESIDE if lies_beside(r) else ""
    for m in items(first_of(r, "chat_messages", "conversations", "messages")) or [r]:
        before, versions = chat.last, items(m.get("versions")) or [m]
        bar = bar or ("a prompt that was edited" if len(versions) > 1 and versions[0].get("role") == "user" else "")
        for _, version in sorted(enumerate(versions), key=lambda place: place[0] == m.get("currentlySelected")):
            chat.add(version, m.get("uuid"), m.get("parent_message_uuid") or before, bar=bar)  # shown: the last one


# source; its two answers' columns, or those that hold one or several; the prompt's: the first that is there; the scores
ROWS = [
    ("openai", "preferred_output non_preferred_output", "input", (1, 0)),
    ("webgpt", "answer_0 answer_1", "question", ("score_0", "score_1")),
    ("shp", "human_ref_A human_ref_B", "history", ("labels", 0.5)),
    ("nectar", "answers", "prompt", ()),
    ("ultrafeedback", "chosen rejected", "prompt", ("score_chosen", "score_rejected")),
    ("trl", "chosen rejected", "prompt question messages conversations", (1, 0)),
]


def talk_of(value):
    """Return messages, or a text whose turns begin with a blank line and Human: or Assistant:, as such; else a text."""
    value = first_of(value, "messages", "full_text") or [value] if isinstance(value, dict) else value
    if isinstance(value, list):
        return [m for m in items(value) if first_of(m, "role", "from")] or [{"role": "user", "content": value}]
    who, said = {"Human": "user", "Assistant": "assistant"}, re.split(r"\n\n(Human|Assistant):", str(value))
    turns = [{"role": who[name], "content": text} for name, text in zip(said[1::2], said[2::2]) if text.strip()]
    return turns if turns and not said[0] else value


def read_row(columns, prompts, scores, chat, r):
    """Read a data set's row; without a prompt of its own, that is what its answers begin with."""
    ranked = [a for a in items(r.get("answers")) if a.get("rank")]
    scores = [-a["rank"] for a in ranked] or [r.get(score, score) for score in scores]
    sides = [talk_of(a.get("answer")) for a in ranked] or [talk_of(r[name]) for name in columns]
    prompt = talk_of(first_of(r, *prompts))
    if all(isinstance(side, list) for side in sides) and max(map(len, sides), default=0) > 1:  # whole conversations
        prompt = sides[0][:-1]
        chat.skip = "" if all(side[:-1] == prompt for side in sides) else "two conversations that part early"
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    chat.dataset, chat.words["assistant"] = True, str.strip  # <think> is part of a data set's answers
    chat.system = "".join(spoken(m.get("content"), "system")[0] for m in prompt if m.get("role") == "system")
    asked = [chat.add(m, bar=BESIDE if lies_beside(r) else "") for m in prompt]
    if not asked or chat.nodes[asked[-1]]["role"] != "user":
        chat.skip = "a prompt that ends in no question"
    for side, score in zip(sides, scores):
        side = first_of(side[-1], *FIELDS) if isinstance(side, list) else side
        chat.add({"role": "assistant", "content": side}, parent=asked[-1] if asked else None, rating=0 + score)


for source, columns, prompts, scores in ROWS:
    names = [*columns.split(), *(score for score in scores if isinstance(score, str))]
    reads(source, has(*names))(partial(read_row, columns.split(), prompts.split(), scores))


# ------------------------------------------------------------------------------------------------------------ reading
def open_members(name, stream, depth=0):
    """Yield (name, stream) of a file, or of each file in an archive; raise ValueError of one that is not to be read."""
    head, _ = stream.read(4), stream.seek(0)
    if head == b"PK\x03\x04":
        archive = zipfile.ZipFile(stream)
        outside = [member for member in archive.namelist() if re.match(r"[/\\]|\w:|(.*[/\\])?\.\.([/\\]|$)", member)]
        if outside or depth > 2 or sum(info.file_size for info in archive.infolist()) > UNPACKED:
            raise ValueError(f"it has members outside {outside[:1]}, more than 8 GB or archives in archives")
        for member in archive.namelist():
            yield from open_members(f"{name}/{member}", archive.open(member), depth + 1)
    elif head[:2] == b"\x1f\x8b":
        if depth > 2 or gzip.open(stream).seek(UNPACKED) == UNPACKED:
            raise ValueError("it has more than 8 GB or archives in archives")
        stream.seek(0)
        yield from open_members(name, gzip.open(stream), depth + 1)
    else:
        yield name, stream


def read_values(path, stream):
    """Yield records, one at a time: of Hermes' state.db, a JSON list or lines of JSON; None for what is broken."""
    head, _ = stream.read(16), stream.seek(0)
    if head == b"SQLite format 3\0":
        alone = not Path(f"{path}-wal").exists()  # else sqlite would leave files beside it
        db = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro&immutable={int(alone)}", uri=True)
        db.row_factory, db.text_factory = sqlite3.Row, lambda raw: raw.decode("utf-8", "replace")
        for session in db.execute("SELECT * FROM sessions"):
            found = db.execute("SELECT * FROM messages WHERE session_id = ? ORDER BY rowid", [session["id"]])
            yield {**session, "session_id": session["id"], "session_start": 0, "messages": [{**row} for row in found]}
        return
    encoding, decode = json.detect_encoding(head[:4]), json.JSONDecoder().raw_decode
    text = io.TextIOWrapper(stream, "utf-8-sig" if "utf-8" in encoding else encoding, errors="replace")
    buffer = text.read(2**20).lstrip()
    at = 1 if buffer.startswith("[") else 0 if buffer.startswith("{") or '\n{"' in buffer else len(buffer)
    while True:
        at = re.compile(r"[\s,]*").match(buffer, at).end()
        try:
            value, at = decode(buffer, at)
        except (ValueError, RecursionError):
            more = text.read(max(2**20, len(buffer))) if len(buffer) < 2**30 and at < len(buffer) else ""
            if more:
                buffer, at = buffer[at:] + more, 0
                continue
            if not buffer[at:].strip("] \n"):
                return
            value, at = None, buffer.find("\n{", at) + 1 or len(buffer)  # the next record, if this one is broken
        yield value


class Chats:
    """All that was read: chats by source and key, votes by message, and what became of records that are in no chat."""

    def __init__(self):
        # rated: an answer's rating; choices: 1 where it was preferred to another, -1, 0 for a tie
        self.chats, self.logs, self.fates, self.rated, self.choices = {}, {}, Counter(), {}, {}

    def give(self, record, name, number):
        """Give a record to the first reader whose test it passes; count one that no reader takes, or that breaks it."""
        record = record if isinstance(record, dict) else {}
        try:
            source, _, log, agent, reader = next((entry for entry in READERS if entry[1](record)), [None] * 5)
            chat = self.logs.get((name, reader)) or Chat(source, agent, self)
            if reader:
                reader(chat, record)
                chat.records += 1
                return self.logs.setdefault((name, reader), chat) if log else self.keep(chat)
            fate = f"broken, or of no known kind: {[*record][:4]}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            fate = f"{type(error).__name__} in {where.name}, line {where.lineno}"
            if fate not in self.fates:
                print(f"{name}:{number}: {fate}: {str(error)[:300]}: passed over", file=sys.stderr)
        self.fates[fate] += 1

    def keep(self, chat):
        """Enter a chat; of two copies, the larger one."""
        chat.key = str(chat.key or f"number {len(self.chats)}")
        place = chat.source, chat.key
        older, newer = sorted([self.chats.get(place, chat), chat], key=lambda c: (str(c.time or ""), len(c.nodes)))
        if chat.skip or not chat.nodes:
            self.fates[chat.skip or "votes, or nothing said"] += chat.records
            return
        self.chats[place] = newer
        self.fates["another copy of a conversation"] += older.records if older is not newer else 0


# -------------------------------------------------------------------------------------------------------------- pairs
# where a node stands: why no pair may rest on it; its prompt's key, the answer before that, the latest text of
# the answer; whether that is whole, more must follow, nothing whole can, a document was made, nobody typed it
Place = namedtuple("Place", "bar user history last whole call cut made idle", defaults=["", *[None] * 8])


class Turns:
    """A chat's prompts with the answers that each got, found by walking its tree from the roots.

    answers: {(history, prompt): {key: node, with its prompt's key, user, and its choice}}; after: {answer: the prompts
    that follow}; active: the keys of what is on show.
    """

    def __init__(self, chat, reasons):
        self.chat, self.nodes, self.reasons, self.at, self.active = chat, chat.nodes, reasons, {}, set()
        self.children, self.answers, self.after = defaultdict(list), defaultdict(dict), defaultdict(list)
        for key, node in self.nodes.items():
            self.children[node["parent"] if node["parent"] in self.nodes else None].append(key)
        todo = self.children[None][::-1]
        while todo:
            key = todo.pop()
            at = self.at[key] = self.step(self.nodes[key])
            ends = ("user", "harness", "note") if at.whole else ("user", "harness")
            if all(self.nodes[child]["role"] in ends for child in self.children[key]):
                self.end(at, key)
            todo += reversed(self.children[key])
        leaf = str(chat.leaf) if str(chat.leaf) in self.nodes else [*self.nodes][-1]
        while leaf in self.nodes and leaf not in self.active:
            self.active.add(leaf)
            leaf = self.nodes[leaf]["parent"]

    def step(self, node):
        """Return where a node stands, from where the one before it does."""
        at = self.at.get(node["parent"]) or Place()
        role, bar, cut = node["role"], at.bar or node["bar"], node["state"] == "cut"
        if role == "user":
            before = self.nodes.get(at.user, node)["text"]
            branch = at.user == node["parent"] and any(self.nodes[c]["role"] != "user" for c in self.children[at.user])
            if not (at.whole or branch or before == node["text"]):  # branch: the answer is on another one
                bar = bar or "a prompt after one that got no whole answer"
            self.after[at.last].append(node["text"])
            return Place(bar, node["key"], at.last if at.whole else at.history, cut=cut)
        in_turn = at.user is not None and not (at.whole or at.cut)
        if role == "harness" and in_turn:
            return at._replace(bar=bar or STEERED)
        if role == "harness" or role == "note" and not in_turn:
            return at._replace(idle=True)
        if at.idle and role == "assistant":
            return Place(bar or NOBODY)
        cut, call = at.cut or cut, node["state"] == "call" or at.call and role != "assistant"
        last = node["key"] if role == "assistant" and node["text"] and not call and at.user else at.last
        whole, made = last is not None and not (call or cut), at.made or node["made"]
        return Place(bar, at.user, at.history, last, whole, call, cut, made, at.idle)

    def end(self, at, key):
        """Enter the answer of a branch that ends at key, or the reason why it is none."""
        why = at.bar or (ELSEWHERE if at.whole and at.made else "" if at.whole else "no whole answer")
        if at.user in (None, key) or at.idle or why:
            self.reasons[self.chat.key, why] += at.user not in (None, key) and not at.idle
            return
        answer, votes = self.nodes[at.last] | {"user": at.user, "choice": None}, self.chat.votes
        while key != at.user:
            answer["rating"] = answer["rating"] or votes.rated.get(key, 0)
            answer["choice"] = votes.choices.get(key) if answer["choice"] is None else answer["choice"]
            key = self.nodes[key]["parent"]
        self.answers[at.history, " ".join(self.nodes[at.user]["text"].split())][at.last] = answer


def compare_answers(answers, turns):
    """Yield (signal, share of its weight, chosen, rejected): of a prompt's answers the best against each worse one."""
    place = lambda a: (a["choice"] or 0, a["rating"], a["key"] in turns.active, a["key"] in turns.after, a["order"])
    best, *rest = sorted(answers, key=place, reverse=True)
    choice, up, shown, gone_on, late = place(best)
    for other in rest[:RIVALS]:
        other_choice, down, other_shown, other_gone_on, early = place(other)
        asked, alone = None not in (best["choice"], other["choice"]), gone_on and not other_gone_on
        # of several models that answer at once, the last one is on show unless the person goes on from another
        at_once = best["user"] == other["user"] and best.get("lane") != other.get("lane")
        if asked and choice > other_choice:
            yield "comparison", 1, best, other
        elif up > down:
            yield "dataset" if turns.chat.dataset else "rating", 1, best, other
        elif shown and not (asked or up or down or other_shown or turns.chat.dataset):
            if not at_once and (gone_on or late > early) or alone:
                yield "regenerate", 1 if alone and not at_once else 0.5, best, other


def corrections(turns):
    """Yield (history, prompt, signal, share, chosen, rejected): an answer and the one that mended it."""
    for (_, asked), answers in turns.answers.items():
        good, *others = answers.values()
        at = turns.at.get(turns.nodes[good["user"]]["parent"])
        if others or not at or not at.whole or at.made:
            continue
        first, later = turns.nodes[at.user]["text"], turns.after[good["key"]]
        said = [text.replace("’", "'") for text in (asked, first, *later)]
        wrong, *more = [WRONG.match(text) and not HARMLESS.search(text) for text in said]
        text, known = re.sub(SORRY, "", good["text"], count=1), {*re.findall(r"\w{5,}", first.lower()), *DENIALS}
        refused = REFUSAL.match(text) or text.endswith("?") or not text or any(more)
        if wrong and known.intersection(re.findall(r"\w+", asked.lower())) and not refused:
            share = 1 if re.match(r"(?i)\W*(thank|perfect|great|exactly|yes|good|works)", " ".join(later)) else 0.5
            yield at.history, first, "correction", share, good | {"text": text}, turns.nodes[at.last]


def make_row(turns, history, prompt, signal, share, chosen, rejected):
    """Return a row of an output file; history: the answer before the prompt."""
    messages = [{"role": "user", "content": prompt}]
    while history and len(messages) <= HISTORY:
        answer, asked = turns.nodes[history], turns.nodes[turns.at[history].user]
        messages += [{"role": node["role"], "content": node["text"]} for node in (answer, asked)]
        history = turns.at[history].history
    messages += [{"role": "system", "content": turns.chat.system}] if turns.chat.system else []
    good, bad = ([{"role": "assistant", "content": side["text"]}] for side in (chosen, rejected))
    facts = {"signal": signal, "weight": round(WEIGHTS[signal] * share, 3), "source": turns.chat.source}
    return {"prompt": messages[::-1], "chosen": good, "rejected": bad, **facts, "conversation_id": turns.chat.key}


def make_rows(chats, args):
    """Return the rows of all pairs, and a Counter of (conversation, why a prompt of it gave none)."""
    rows, reasons = [], Counter()
    for chat in chats.chats.values():
        turns = Turns(chat, reasons)
        for (history, _), answers in turns.answers.items():
            answers = [*answers.values()]
            place = turns, history, turns.nodes[answers[0]["user"]]["text"]
            pairs = [make_row(*place, *found) for found in compare_answers(answers, turns)]
            why = "several answers, none preferred" if len(answers) > 1 else "one answer, no other to compare"
            reasons[chat.key, why] += not pairs
            rows += pairs
        rows += [make_row(turns, *found) for found in (corrections(turns) if args.corrections else ())]
    return rows, reasons


# what is private: a kind and a pattern a line; a mark takes the place of the pattern's last group, or of all of it
PATTERNS = r"""SECRET -----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY-----[\s\S]*?(?:-----END[ A-Z0-9_-]*-----|\Z)
SECRET \b(?:sk|gsk|xai|pplx|r8|hf|gh[pousr]|github_pat|glpat|npm|pypi|dop_v1|xox[a-z]|[sr]k_(?:live|test))[-_][\w-]{16,}
SECRET \b(?:AIza|AKIA|ASIA|SG\.|AGE-SECRET-KEY|\d{8,10}:A|SK[0-9a-f]{4}|eyJ[\w-]+\.e)[\w.-]{12,}|hooks\.slack\.com/\S+
SECRET ://[^\s:/@]{0,99}:([^\s@/]{1,99})@
SECRET (?i)KEY[\w.-]{0,30}["']?\s*(?:[:=]|is\s(?=\S*\d))\s*["']?(?:(?:bearer|basic|token)\s+)?(?!FAKE)([^\s"'&,;)]{8,})
IBAN \b[A-Z]{2}\d\d(?: ?[A-Z]{4})?(?: ?\d{4}){2,7}(?: ?\d{1,4}|[A-Z0-9]{1,4}){0,4}\b
CARD \b(?:4\d\d|5[1-5]\d|2[2-7]\d|3[47]\d|6[05]\d)\d(?:[ -]?\d{4}){2}[ -]?\d{3,4}\b
EMAIL \b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}\.[A-Za-z]{2,24}\b
HOME (?:(?<![\w.])/(?:home|Users)/|[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2})([^/\\\s\"':]+)
IP \b(?:\d{1,3}\.){3}\d{1,3}\b|\b(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}\b
PHONE \+\d[\d ().-]{7,24}\d"""
NAMED = r"(?:api[_-]?key|secret|token|passw(?:or)?[dt]|pwd|credential|auth(?!ors?\b|enti)|[?&]code|[?&]sig|-signature)"
FAKE = r"\[|xxx|<|\$\{|[\w.]+[(\[]|\w+\.\w+\.|example|changeme"
PRIVATE = [line.replace("KEY[", f"{NAMED}[").replace("FAKE", FAKE).split(" ", 1) for line in PATTERNS.splitlines()]


def redact(row, marks, counts):
    """Put marks in the place of what is private in a row; marks: {kind: {value: its number}}; counts: of places."""

    def mark(kind, found):
        value = found.group(found.re.groups)
        counts[kind] += 1
        return found.group().replace(value, f"[{kind}_{marks[kind].setdefault(value, len(marks[kind]) + 1)}]")

    for message in [m for value in row.values() for m in items(value)]:
        for kind, pattern in PRIVATE:
            message["content"] = re.sub(pattern, partial(mark, kind), message["content"])


def select_pairs(rows, reasons):
    """Return the rows that pass, the strongest signals first; count in reasons why the others do not."""
    kept, seen = [], set()
    for row in sorted(rows, key=lambda row: -row["weight"]):
        said = [m["content"].casefold().replace("’", "'") for m in row["prompt"] + row["chosen"] + row["rejected"]]
        *prompt, good, bad = (" ".join(text.split()) for text in said)
        texts, other = (*prompt, good, bad), (*prompt, bad, good)
        (short, long), voted = sorted((len(good), len(bad))), row["signal"] in ("comparison", "rating")
        checks = {
            "an empty prompt or answer": not (prompt[-1] and good and bad),
            "equal answers": good == bad,
            "one answer ten times as long": long > max(200, 10 * short) and not voted,
            "a refusal as the better answer": REFUSAL.match(good) and not REFUSAL.match(bad),
            "a duplicate": texts in seen,
            "a contradiction": other in seen,
        }
        why = [reason for reason, found in checks.items() if found]
        if why:
            reasons[row["conversation_id"], why[0]] += 1
        else:
            kept.append(row)
            seen.add(texts)
    return kept


# --------------------------------------------------------------------------------------------------------------- main
def main():
    args, chats = parse_args(sys.argv[1:]), Chats()
    own = re.compile(rf"{re.escape(str(args.out.parent.resolve() / args.out.name))}(-\d+)?/")  # earlier outputs
    found = [path for source in args.sources for path in ([source] if source.is_file() else source.rglob("*"))]
    paths = sorted({path for path in found if path.is_file() and not own.match(str(path.resolve()))})
    for path in paths:
        try:
            for name, stream in open_members(str(path), open(path, "rb")):
                for number, record in enumerate(read_values(path, stream), 1):
                    chats.give(record, name, number)
        except Exception as error:  # one damaged file, of whatever kind, must not stop the others
            chats.fates["a file, or the rest of one, that could not be read"] += 1
            print(f"{path}: not read: {error}", file=sys.stderr)
    for chat in chats.logs.values():
        chats.keep(chat)
    rows, reasons = make_rows(chats, args)
    rows, counts, marks, left_out = select_pairs(rows, reasons), Counter(), defaultdict(dict), Counter()
    for row in () if args.no_redact else rows:
        redact(row, marks, counts)
    for (_, why), number in reasons.items():
        left_out[why] += number
    fate = {chat: why for (chat, why), number in reversed(reasons.most_common()) if number}  # the most common one stays
    fate |= {row["conversation_id"]: "pairs" for row in rows}
    for chat in chats.chats.values():
        chats.fates[fate.get(chat.key, "no answer to a person's words, or a copy of one")] += chat.records
    total = chats.fates.total()
    if not rows:
        why = "; ".join(f"{number} {reason}" for reason, number in (chats.fates | left_out).items() if number)
        looked = "choices, ratings, answers made again, data sets' pairs, and, with --corrections, corrected answers"
        sys.exit(f"no pair in {len(paths)} files, {total} records: looked for {looked}. {why}")
    # what begins with the same prompt stays together
    start = lambda row: next(m["content"] for m in row["prompt"] if m["role"] == "user")
    order = random.Random(0).sample(sorted({*map(start, rows)}), len({*map(start, rows)}))
    held = int(HELD_OUT * len(order))
    prompts = {"train": {*order[2 * held :]}, "valid": {*order[held : 2 * held]}, "test": {*order[:held]}}
    parts = {name: [r for r in rows if start(r) in prompts[name]] for name in prompts}
    tables = {"Pairs": Counter(f"{row['source']}, {row['signal']}" for row in rows), "Redacted": counts}
    tables |= {f"What became of {total} records": chats.fates, "Prompts and pairs that were left out": left_out}
    report = f"# {len(rows)} pairs: {', '.join(f'{name} {len(part)}' for name, part in parts.items())}\n"
    for title, counter in tables.items():
        report += f"\n## {title}\n\n" + ("".join(f"- {n} {why}\n" for why, n in counter.most_common() if n) or "none\n")
    if not args.dry_run:
        folder = args.out.with_name(f"unfinished-{args.out.name}")  # under another name until all is there
        folder.mkdir(parents=True, exist_ok=True)
        parts = {f"{name}.jsonl": [json.dumps(row, ensure_ascii=False) for row in part] for name, part in parts.items()}
        for name, lines in (parts | {"report.md": [report]}).items():
            if lines:
                (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
        if args.out.exists():
            older = next(path for n in range(1, 10**6) if not (path := Path(f"{args.out}-{n}")).exists())
            print(f"The earlier {args.out} is now {args.out.rename(older)}")
        folder.rename(args.out)
        report += f"\nNext: python dpo_trainer.py --data {str(args.out)!r} --model ..."
    print(report.encode("utf-8", "replace").decode())


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {str(error) or 'interrupted'}: what is in --out is whole")
