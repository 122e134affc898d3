"""Write data/sessions: sample chat logs of one person with the Saltmere assistant, as four programs export them.

    python data/make_sessions.py                    # into data/sessions, which must not be there; 1 s
    python data/make_sessions.py some/folder        # elsewhere
    python build_dpo_pairs.py data/sessions --corrections --out data/session_pairs      # the pairs that are in them

Files: chatgpt-export.zip, claude-projects/ (Claude Code), hermes/state.db, open-webui-export.json. Questions and
answers come from make_tiny_chat.py's grammar, in no wording kept for its test rows. Where the person prefers one of two
answers, it is the helpful one, in half of the cases the longer one. As in anybody's logs, much says nothing: single
answers, stopped ones, edited prompts, ties, slips, tools, system prompts. Whoever sees a preference there is mostly
wrong. The same seed gives the same contents; the bytes of .zip and .db can differ from one zlib or SQLite to another.
How much of what: PLAN. Another kind of event: a function in SCENES. Another program: a function in WRITERS.
"""

import argparse
import itertools
import json
import random
import sqlite3
import uuid
import zipfile
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import make_tiny_chat as world

HERE = Path(__file__).resolve().parent
PLAN = {  # program: how often a scene comes in its logs
    "chatgpt": dict(
        choose=110, compare=50, rate=80, retry=65, correct=6, plain=18, mark=10, cut=6, edit=6, skip=5, tie=5
    ),
    "open-webui": dict(rate=85, retry=40, correct=4, plain=10, mark=8, cut=5, edit=5, tie=5),
    "claude-code": dict(retry=26, correct=46, plain=9, cut=4, edit=4, slip=4),
    "hermes": dict(retry=26, correct=36, plain=9, mark=5, cut=4, edit=4, slip=3),
}
START = 1_741_000_000  # seconds; March 2025
MODEL = "saltmere-1"
SYSTEM = "You are the guide of Saltmere. Answer in plain words."
ABOUT = "I work at the harbour office and often have visitors."  # the person's custom instructions
PRIVATE = [
    " You can write to {name}@example.org.",
    " My notes are in /home/{name}/saltmere/visit.md.",
    " Please send it to {name}.quill@example.com.",
    " I keep a list in /Users/{name}/Documents/places.txt.",
]
NAMES = ["mara", "jonah", "edda"]
COMPLAINTS = [
    "No, that is not an answer. ",
    "That is not what I asked. ",
    "You did not answer my question. ",
    "I asked you something. ",
    "Nope. Once more: ",
    "That's not an answer. ",
    "Not what I asked. ",
    "Try again, please: ",
    "You missed the question. ",
    "No. ",
]
SLIPS = ["No, wait, my mistake. ", "No, I meant to ask something else. ", "Wrong, that was a typo. "]
NOTES = "# Places\n- opening hours: ask the keeper\n- prices: see the board\n"  # what a tool finds

# --- chats ----------------------------------------------------------------------------------------------------------


class Chat:
    """A conversation as a tree of messages. at: the one that the next follows; again: a retry repeats the prompt."""

    def __init__(self, rng, program, start, asked, longer):
        self.rng, self.program, self.start, self.asked, self.longer = rng, program, start, asked, longer
        self.again = program in ("claude-code", "hermes")
        self.id, self.time, self.at, self.messages, self.compared = self.make_id(), start, None, [], []
        self.place, self.attribute, self.left, self.title = None, None, [], None
        self.needs_more = self.closed = False  # whether the person must go on, and must not

    def make_id(self):
        """Draw a UUID."""
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def say(self, role, text, **facts):
        """Add a message; facts: cut, rating, tool (the answer came after a look at some notes), choice."""
        self.time += self.rng.randint(4, 90)
        tool = role == "assistant" and not facts.get("cut") and self.rng.random() < 0.1
        facts = {"cut": False, "rating": None, "tool": tool, **facts}
        self.at = {"id": self.make_id(), "parent": self.at, "role": role, "text": text, "time": self.time, **facts}
        self.messages.append(self.at)
        return self.at

    def question(self, full=False):
        """Draw a question that no chat has yet begun with, or a follow-up about the same place."""
        follow_up = bool(self.left) and not full and self.rng.random() < 0.8
        if not follow_up:
            self.place = self.rng.choice(world.PLACES)
            self.left = self.rng.sample(world.ATTRIBUTES, len(world.ATTRIBUTES))
        self.title, self.attribute = self.title or world.capital(self.place), self.left.pop()
        while (text := world.ask(self.rng, self.place, self.attribute, follow_up)) in self.asked and not follow_up:
            pass
        self.asked.add(text)
        if not follow_up and self.rng.random() < 0.04:
            text += self.rng.choice(PRIVATE).format(name=self.rng.choice(NAMES))
        return text

    def restated(self):
        """Draw another question for the same fact, without a lead."""
        wordings = world.QUESTIONS[self.attribute]
        allowed = [
            text for i, text in enumerate(wordings) if not world.is_held_out(self.place, self.attribute, wordings, i)
        ]
        return world.fill(self.rng.choice(allowed), self.place)

    def answer(self, helpful):
        """Draw an answer to the last question."""
        return world.answer(self.rng, helpful, self.place, self.attribute)

    def rivals(self, scene):
        """Draw a helpful and an evasive answer; in every second scene of a kind the helpful one is the longer."""
        longer = next(self.longer[scene])
        while True:
            good, bad = self.answer(True), self.answer(False)
            sizes = {(count(good) > count(bad), count(good) < count(bad)) for count in (len, world.count_words)}
            if sizes == {(longer, not longer)}:
                return good, bad

    def attempts(self, question, texts, kept, first=None):
        """Add a prompt and several answers to it, go on from the kept one; first: facts of the first answer."""
        before, asked, found = self.at, None, []
        for text in texts:
            if asked is None or self.again:
                self.at = before
                asked = self.say("user", question)
            self.at = asked
            found.append(self.say("assistant", text, **(first or {}) if not found else {}))
        self.at = found[kept]
        return asked, found

    def path(self):
        """Return the ids of the messages on show: from the last one up."""
        ids, node = set(), self.at
        while node:
            ids.add(node["id"])
            node = node["parent"]
        return ids


# --- scenes: what the person does -------------------------------------------------------------------------------------


def plain(chat):
    """One answer, and nothing said of it."""
    chat.attempts(chat.question(), [chat.answer(chat.rng.random() < 0.5)], 0)


def mark(chat):
    """One answer, with a thumb: half of a pair at most."""
    helpful = chat.rng.random() < 0.5
    chat.attempts(chat.question(), [chat.answer(helpful)], 0, {"rating": 1 if helpful else -1})


def retry(chat):
    """An evasive answer or two, done again until one is helpful; or back to the first, which was the better one."""
    question, (good, bad), kind = chat.question(), chat.rivals("retry"), chat.rng.random()
    if kind < 0.15 and not chat.again:
        chat.attempts(question, [good, bad], 0)
        chat.needs_more = True
    else:
        texts = [bad, chat.answer(False), good] if kind > 0.92 else [bad, good]
        chat.attempts(question, texts, len(texts) - 1)
        chat.needs_more = chat.rng.random() < 0.8


def rate(chat):
    """Two answers with a thumb on one or both; one in four goes on from the worse one."""
    question, (good, bad) = chat.question(), chat.rivals("rate")
    marks = chat.rng.choice([(1, None), (None, -1), (1, -1)])
    texts = [(bad, marks[1]), (good, marks[0])][:: chat.rng.choice((1, 1, -1))]
    better = texts[1][0] == good
    _, found = chat.attempts(question, [text for text, _ in texts], better ^ (chat.rng.random() < 0.25))
    for node, (_, rating) in zip(found, texts):
        node["rating"] = rating


def choose(chat):
    """Two answers side by side, and the choice of one."""
    question, texts = chat.question(), list(chat.rivals("choose"))
    good, better = texts[0], chat.rng.randrange(2)
    asked, found = chat.attempts(question, texts[:: -1 if better else 1], better)
    assert found[better]["text"] == good
    asked["choice"] = found[better]["id"]


def skip(chat):
    """Two answers side by side, no choice, and on with either."""
    question, (good, bad) = chat.question(), chat.rivals("skip")
    chat.attempts(question, [good, bad], 1)[0]["choice"] = None
    chat.needs_more = True


def compare(chat):
    """An answer done again, and the box "Was this response better or worse?" filled in."""
    question, texts = chat.question(), list(chat.rivals("compare"))
    better = chat.rng.choice((0, 1, 1))
    _, found = chat.attempts(question, texts[:: -1 if better else 1], chat.rng.choice((better, better, 1)))
    chat.compared.append((*found, ("original", "new")[better]))


def tie(chat):
    """Two helpful answers, both said to be as good."""
    _, found = chat.attempts(chat.question(), [chat.answer(True), chat.answer(True)], 1)
    chat.needs_more = True
    if chat.program == "chatgpt":
        chat.compared.append((*found, "same"))
    else:
        found[0]["rating"] = found[1]["rating"] = 1


def cut(chat):
    """A helpful answer that was stopped in the middle, then a whole, evasive one."""
    question, (good, bad) = chat.question(), chat.rivals("cut")
    chat.attempts(question, [" ".join(good.split()[:-2]), bad], 1, {"cut": True})


def edit(chat):
    """A helpful answer, then the prompt is edited: an evasive answer to another question."""
    before = chat.at
    chat.attempts(chat.question(), [chat.answer(True)], 0)
    chat.at = before
    chat.attempts(chat.question(full=True), [chat.answer(False)], 0)


def correct(chat):
    """An evasive answer, a complaint with the question again, a helpful answer, mostly thanks."""
    question, (good, bad) = chat.question(full=True), chat.rivals("correct")
    chat.attempts(question, [bad], 0)
    chat.attempts(chat.rng.choice(COMPLAINTS) + chat.restated(), [good], 0)
    chat.closed, chat.needs_more = True, chat.rng.random() < 0.85


def slip(chat):
    """A helpful answer, to a question that the person had not meant to ask, then an evasive one."""
    chat.attempts(chat.question(full=True), [chat.answer(True)], 0)
    chat.attempts(chat.rng.choice(SLIPS) + chat.question(full=True), [chat.answer(False)], 0)
    chat.closed = True


def thank(chat):
    """A word of thanks, and a polite answer."""
    questions, answers = world.SMALL_TALK[1]
    chat.attempts(chat.rng.choice(questions), [chat.rng.choice(answers)], 0)


SCENES = {
    scene.__name__: scene for scene in (plain, mark, retry, rate, choose, skip, compare, tie, cut, edit, correct, slip)
}


def make_chats(rng, program, asked, longer):
    """Deal a program's scenes, shuffled, to chats of one to three."""
    scenes, chats, time = [name for name, count in PLAN[program].items() for _ in range(count)], [], START
    rng.shuffle(scenes)
    while scenes:
        time += rng.randint(20_000, 200_000)
        chat = Chat(rng, program, time, asked, longer)
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            if scenes and not chat.closed:
                chat.needs_more = False
                SCENES[scenes.pop()](chat)
        if chat.needs_more or (not chat.closed and rng.random() < 0.2):
            thank(chat)
        chats.append(chat)
    return chats


# --- writers: one a program -------------------------------------------------------------------------------------------


def iso(time):
    """Write seconds since 1970 as Claude's and OpenAI's files do."""
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def as_json(value):
    """Write JSON as JavaScript does, without spaces."""
    return json.dumps(value, separators=(",", ":"))


def chatgpt_chat(chat):
    """Make a conversation of conversations.json: a tree below a hidden system message and custom instructions."""
    mapping = {}

    def add(key, parent, role, content, time=None, metadata=None, **facts):
        message = {
            "id": key,
            "author": {"role": role, "name": None, "metadata": {}},
            "create_time": time,
            "update_time": None,
            "content": content,
            "status": "finished_successfully",
            "end_turn": None,
            "weight": 1.0,
            "metadata": metadata or {},
            "recipient": "all",
            "channel": None,
            **facts,
        }
        mapping[key] = {"id": key, "message": message if role else None, "parent": parent, "children": []}
        if parent:
            mapping[parent]["children"].append(key)
        return key

    def text(*parts):
        return {"content_type": "text", "parts": list(parts)}

    hidden = {"is_visually_hidden_from_conversation": True}
    above = add("client-created-root", None, None, None)
    above = add(chat.make_id(), above, "system", text(""), metadata=hidden, weight=0.0, end_turn=True)
    context = {"content_type": "user_editable_context", "user_profile": ABOUT, "user_instructions": SYSTEM}
    above = add(chat.make_id(), above, "user", context, metadata={**hidden, "is_user_system_message": True})
    for m in chat.messages:
        parent, time = m["parent"]["id"] if m["parent"] else above, float(m["time"])
        if m["role"] == "user":
            metadata = {"request_id": chat.make_id()}
            if "choice" in m:
                metadata["paragen_variants_info"] = {
                    "type": "num_variants_in_stream",
                    "num_variants_in_stream": 2,
                    "display_treatment": "skippable",
                    "conversation_id": chat.id,
                }
            if m.get("choice"):
                metadata["paragen_variant_choice"] = m["choice"]
            add(m["id"], parent, "user", text(m["text"]), time, metadata)
            continue
        metadata = {"model_slug": MODEL, "is_complete": True, "finish_details": {"type": "stop"}}
        if m["tool"]:
            code = {"content_type": "code", "language": "unknown", "text": 'search("saltmere places")'}
            facts = {"recipient": "web", "end_turn": False}
            parent = add(chat.make_id(), parent, "assistant", code, time - 2, dict(metadata), **facts)
            found = {"content_type": "tether_browsing_display", "result": NOTES}
            facts = {"recipient": "assistant", "weight": 0.0}
            parent = add(chat.make_id(), parent, "tool", found, time - 1, hidden, **facts)
        facts = {"end_turn": True}
        if m["cut"]:
            metadata = {"model_slug": MODEL, "finish_details": {"type": "interrupted", "reason": "client_stopped"}}
            facts = {"end_turn": None, "status": "in_progress"}
        add(m["id"], parent, "assistant", text(m["text"]), time, metadata, **facts)
    return {
        "title": chat.title,
        "create_time": float(chat.start),
        "update_time": float(chat.time),
        "mapping": mapping,
        "moderation_results": [],
        "current_node": chat.at["id"],
        "plugin_ids": None,
        "conversation_id": chat.id,
        "conversation_template_id": None,
        "gizmo_id": None,
        "is_archived": False,
        "safe_urls": [],
        "default_model_slug": MODEL,
        "id": chat.id,
    }


def write_chatgpt(chats, out):
    """Write a data export as it comes by mail, newest chat first."""
    me = "user-saltmere"
    feedback = [
        {
            "id": m["id"],
            "conversation_id": chat.id,
            "user_id": me,
            "create_time": iso(m["time"] + 9),
            "rating": "thumbs_up" if m["rating"] > 0 else "thumbs_down",
            "workspace_id": None,
            "content": "{}",
        }
        for chat in chats
        for m in chat.messages
        if m["rating"]
    ]
    comparisons = []
    for chat, (old, new, rating) in ((chat, told) for chat in chats for told in chat.compared):
        step = {
            "original_turn": [{"id": old["id"]}],
            "new_turn": [{"id": new["id"]}],
            "completion_comparison_rating": rating,
            "new_completion_placement": "not-applicable",
        }
        output = {"feedback_version": "inline_regen_feedback:a:1.0", "feedback_step_2": step}
        comparisons.append(
            {
                "id": chat.make_id(),
                "user_id": me,
                "input": {"conversation_id": chat.id},
                "output": output,
                "metadata": {"country": "SM"},
                "create_time": iso(new["time"] + 9),
            }
        )
    user = {"id": me, "email": "mara.quill@example.com", "chatgpt_plus_user": False, "phone_number": None}
    conversations = [chatgpt_chat(chat) for chat in reversed(chats)]
    members = {
        "conversations.json": conversations,
        "message_feedback.json": feedback,
        "model_comparisons.json": comparisons,
        "shared_conversations.json": [],
        "user.json": user,
    }
    with zipfile.ZipFile(out / "chatgpt-export.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, value in members.items():
            info = zipfile.ZipInfo(name, (2025, 11, 1, 0, 0, 0))
            info.compress_type, info.create_system, info.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(info, as_json(value))


def write_open_webui(chats, out):
    """Write the list of chats that "Export all chats" gives."""
    exported = []
    for chat in chats:
        messages = {}
        for m in chat.messages:
            parent = m["parent"] and m["parent"]["id"]
            messages[m["id"]] = row = {
                "id": m["id"],
                "parentId": parent,
                "childrenIds": [],
                "role": m["role"],
                "content": m["text"],
                "timestamp": m["time"],
            }
            if parent:
                messages[parent]["childrenIds"].append(m["id"])
            if m["role"] == "user":
                row["models"] = [MODEL]
                continue
            row |= {"model": MODEL, "modelName": "Saltmere", "modelIdx": 0, "done": not m["cut"]}
            if m["tool"]:
                row["content"] = f'<details type="reasoning" done="true" duration="1">\n{NOTES}</details>\n{m["text"]}'
            if m["rating"]:
                row["annotation"] = {"rating": m["rating"], "reason": "", "comment": "", "tags": []}
        inner = {
            "title": chat.title,
            "models": [MODEL],
            "params": {"system": SYSTEM},
            "files": [],
            "tags": [],
            "history": {"currentId": chat.at["id"], "messages": messages},
            "timestamp": chat.start * 1000,
        }
        exported.append(
            {
                "id": chat.id,
                "user_id": "saltmere",
                "title": chat.title,
                "chat": inner,
                "archived": False,
                "created_at": chat.start,
                "updated_at": chat.time,
                "pinned": False,
                "meta": {},
            }
        )
    (out / "open-webui-export.json").write_text(as_json(exported) + "\n")


def write_claude_code(chats, out):
    """Write a file of lines a session; now and then one that goes on repeats the lines of the session before it."""
    folder = out / "claude-projects" / "-home-mara-saltmere"
    folder.mkdir(parents=True)
    for number, chat in enumerate(chats):
        records = []

        def add(kind, message, key, parent, time, **facts):
            records.append(
                {
                    "parentUuid": parent,
                    "isSidechain": False,
                    "userType": "external",
                    "type": kind,
                    "cwd": "/home/mara/saltmere",
                    "sessionId": chat.id,
                    "version": "2.0.14",
                    "gitBranch": "main",
                    "message": {"role": kind, **message},
                    "uuid": key,
                    "timestamp": iso(time),
                    **facts,
                }
            )
            return key

        def reply(block, key, parent, time):
            message = {"id": f"msg_{key[:8]}", "type": "message", "model": MODEL, "content": [block]}
            return add("assistant", {**message, "stop_reason": None}, key, parent, time)

        above = None
        if number % 6 == 0:
            above = add("user", {"content": "<command-name>/clear</command-name>"}, chat.make_id(), None, chat.start)
        for m in chat.messages:
            parent, time = m["parent"]["id"] if m["parent"] else above, m["time"]
            if m["role"] == "user":
                add("user", {"content": m["text"]}, m["id"], parent, time)
                continue
            if m["tool"]:
                call = {"type": "tool_use", "id": f"toolu_{m['id'][:8]}", "name": "Read"}
                parent = reply(call | {"input": {"file_path": "places.md"}}, chat.make_id(), parent, time - 2)
                result = {"type": "tool_result", "tool_use_id": call["id"], "content": NOTES}
                parent = add("user", {"content": [result]}, chat.make_id(), parent, time - 1)
            reply({"type": "text", "text": m["text"]}, m["id"], parent, time)
            if m["cut"]:
                stop = [{"type": "text", "text": "[Request interrupted by user]"}]
                add("user", {"content": stop}, chat.make_id(), m["id"], time + 1)
        if number % 5 == 0:
            records.append({"type": "summary", "summary": chat.title, "leafUuid": chat.at["id"]})
        lines = "".join(as_json(record) + "\n" for record in records)
        (folder / f"{chat.id}.jsonl").write_text(lines)
        if number % 20 == 0:  # resumed and left at once
            (folder / f"{chat.make_id()}.jsonl").write_text(lines)


SCHEMA = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE sessions (id TEXT PRIMARY KEY, source TEXT NOT NULL, user_id TEXT, session_key TEXT, model TEXT,
    model_config TEXT, system_prompt TEXT, parent_session_id TEXT, started_at REAL NOT NULL, ended_at REAL,
    end_reason TEXT, message_count INTEGER DEFAULT 0, title TEXT, cwd TEXT, rewind_count INTEGER NOT NULL DEFAULT 0,
    archived INTEGER NOT NULL DEFAULT 0, pinned INTEGER NOT NULL DEFAULT 0, hidden INTEGER NOT NULL DEFAULT 0);
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT NOT NULL REFERENCES sessions(id),
    role TEXT NOT NULL, content TEXT, tool_call_id TEXT, tool_calls TEXT, tool_name TEXT, timestamp REAL NOT NULL,
    finish_reason TEXT, reasoning TEXT, reasoning_content TEXT, reasoning_details TEXT, platform_message_id TEXT,
    observed INTEGER DEFAULT 0, _compressed_summary INTEGER NOT NULL DEFAULT 0, active INTEGER NOT NULL DEFAULT 1,
    compacted INTEGER NOT NULL DEFAULT 0, api_content TEXT, display_kind TEXT, display_metadata TEXT);
"""


def hermes_rows(chat, shown):
    """Yield a chat's rows of the table messages; what /retry and /undo took back is not active."""
    for m in chat.messages:
        row = {"role": m["role"], "content": m["text"], "timestamp": float(m["time"]), "active": int(m["id"] in shown)}
        if m["tool"]:
            function = {"name": "read_file", "arguments": '{"path": "places.md"}'}
            call = {"id": f"call_{m['id'][:8]}", "type": "function", "function": function}
            yield row | {"content": "", "tool_calls": json.dumps([call]), "finish_reason": "tool_calls"}
            yield row | {"role": "tool", "content": NOTES, "tool_call_id": call["id"], "tool_name": "read_file"}
        if m["role"] == "assistant":
            row["finish_reason"] = "length" if m["cut"] else "stop"
        if m["rating"]:
            reaction = {"emoji": "👍" if m["rating"] > 0 else "👎", "author": "user"}
            row["display_metadata"] = json.dumps({"reactions": [reaction]})
        yield row


def write_hermes(chats, out):
    """Write the database, with the columns of its version 30 that say something."""
    (out / "hermes").mkdir(parents=True)
    db = sqlite3.connect(out / "hermes" / "state.db")
    db.executescript("PRAGMA page_size = 4096; PRAGMA encoding = 'UTF-8'; PRAGMA journal_mode = DELETE;" + SCHEMA)

    def insert(table, row):
        db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))

    insert("schema_version", {"version": 30})
    for number, chat in enumerate(chats):
        name = datetime.fromtimestamp(chat.start, timezone.utc).strftime("%Y%m%d_%H%M%S_") + chat.id[:8]
        rows = list(hermes_rows(chat, chat.path()))
        insert(
            "sessions",
            {
                "id": name,
                "source": ("cli", "telegram")[number % 2],
                "model": MODEL,
                "title": chat.title,
                "system_prompt": SYSTEM,
                "cwd": "/home/mara",
                "message_count": len(rows),
                "started_at": float(chat.start),
                "ended_at": float(chat.time),
                "end_reason": "session_reset",
            },
        )
        for row in rows:
            insert("messages", {"session_id": name, **row})
    db.commit()
    db.close()


WRITERS = {
    "chatgpt": write_chatgpt,
    "open-webui": write_open_webui,
    "claude-code": write_claude_code,
    "hermes": write_hermes,
}

# --- main -------------------------------------------------------------------------------------------------------------


def main():
    """Write all logs into a new or empty folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "sessions", help="folder (default: data/sessions)")
    parser.add_argument("--seed", type=int, default=0, help="of everything: the same seed gives the same contents")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.exit(1, f"{args.out}: is not empty: delete it first, or name another folder\n")
    args.out.mkdir(parents=True, exist_ok=True)
    rng, asked, longer = random.Random(args.seed), set(), defaultdict(lambda: itertools.cycle((True, False)))
    for program, write in WRITERS.items():
        chats = make_chats(rng, program, asked, longer)
        write(chats, args.out)
        print(f"{program}: {len(chats)} chats, {sum(len(chat.messages) for chat in chats)} messages")


if __name__ == "__main__":
    main()
