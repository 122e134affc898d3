"""Labels the right way round: conversations drawn at random, of which only the test knows how good each answer is, are
written as five programs write them, and build_dpo_pairs.py must find the person's preferences, no others, and nothing
that the person did not see."""

import json
import random
import sqlite3
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "build_dpo_pairs.py"
SEEDS = 25
CHATS = 10
"""Conversations of one seed."""

SECRET = "hidden7"
"""In every text that the person did not see, or that is no turn: instructions, tools, thoughts, errors."""
DIGITS = "amber birch cedar delta ember fjord grove heath islet juniper".split()
START = 1_740_000_000


@dataclass(eq=False)
class Ask:
    text: str
    chat: "Chat"
    parent: "Answer | None"
    number: int
    ident: str
    answers: list = field(default_factory=list)


@dataclass(eq=False)
class Answer:
    text: str
    quality: int
    ask: Ask
    status: str
    """ok, or why it is no answer: cancelled, error, tool, empty, truncated."""
    number: int
    ident: str
    rating: int = 0
    lane: int = 0
    """Which of the models that answer side by side."""
    asks: list = field(default_factory=list)

    @property
    def chat(self):
        return self.ask.chat

    def path(self):
        return [*(self.ask.parent.path() if self.ask.parent else []), self]

    def __repr__(self):
        votes = {1: "+", -1: "-", 0: ""}[self.rating]
        return f"{self.chat.name}/{self.number} q{self.quality}{votes} {self.status}: {self.text[:24]!r}"


@dataclass(eq=False)
class Chat:
    name: str
    ident: str
    rng: random.Random
    asks: list = field(default_factory=list)
    leaves: list = field(default_factory=list)
    """Where the person is: the last answer of each session."""
    verdicts: dict = field(default_factory=dict)
    """Two answers (a frozenset): the better one, or None for a tie."""
    shown: dict = field(default_factory=dict)
    """Two answers: how they were compared (variants: both at once; box: asked after a second answer)."""
    cuts: set = field(default_factory=set)
    """Answers after which the program compacted what was said."""
    log: bool = False
    readable: bool = True
    """False: this export does not say which answers are siblings."""
    count: int = 0

    def tick(self):
        self.count += 1
        return self.count

    def uuid(self):
        return str(UUID(int=self.rng.getrandbits(128), version=4))

    def all_asks(self):
        todo = list(self.asks)
        for ask in todo:
            todo += [child for answer in ask.answers for child in answer.asks]
        return sorted(todo, key=lambda ask: ask.number)

    def answers(self):
        return sorted((answer for ask in self.all_asks() for answer in ask.answers), key=lambda answer: answer.number)

    def active(self):
        return {answer for leaf in self.leaves for answer in leaf.path()}


@dataclass
class Habits:
    """What the program lets a person do."""

    resend: float = 0.0
    """How often a second answer is a second message with the same text (1: there is no other way)."""
    log: bool = False
    """A log of what happened: the last attempt is the one that was kept."""
    ratings: bool = False
    comparisons: bool = False
    lanes: bool = False
    branches: bool = True
    """Edited prompts, and going on from more than one answer."""
    rows: bool = False
    """Rows without parents: a prompt that was taken back after another one may have followed that."""
    named: str = ""
    """The source that rows name, where it keeps the conversations' names."""
    statuses: tuple = ("cancelled", "error", "tool", "empty", "truncated")


# Texts


def word(rng):
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3, 3))))


def sentence(rng, low=6, high=12):
    return " ".join(word(rng) for _ in range(rng.randint(low, high)))


def spell(number, width):
    return " ".join(DIGITS[int(digit)] for digit in f"{number:0{width}d}")


def secret(rng):
    return f"{SECRET} {sentence(rng, 3, 6)}"


# The person


def new_ask(chat, parent, text=None):
    ask = Ask(text or sentence(chat.rng).capitalize() + "?", chat, parent, chat.tick(), chat.uuid())
    (parent.asks if parent else chat.asks).append(ask)
    return ask


def new_answer(ask, quality, status):
    rng, number = ask.chat.rng, ask.chat.tick()
    text = f"{sentence(rng, 7, 12)}, {spell(quality, 2)}. {sentence(rng, 7, 12)}.".capitalize()
    if status in ("tool", "empty"):
        text = ""
    if status == "error":
        text = f"Something went wrong: {secret(rng)}"
    answer = Answer(text, quality, ask, status, number, ask.chat.uuid())
    ask.answers.append(answer)
    return answer


def some_status(rng, habits, share=0.12):
    return rng.choice(habits.statuses) if rng.random() < share else "ok"


def answer_once(chat, parent, habits, depth=0):
    """A prompt with one answer, and perhaps more below: a branch that is left behind."""
    answer = new_answer(new_ask(chat, parent), chat.rng.randrange(100), some_status(chat.rng, habits))
    if depth and answer.status == "ok":
        answer_once(chat, answer, habits, depth - 1)
    return answer


def vote(group, kept, habits):
    """Rate some answers of a group, never against their quality; the one that is kept may be a bad one."""
    rng, chat = kept.chat.rng, kept.chat
    fine = sorted((answer for answer in group if answer.status == "ok"), key=lambda answer: answer.quality)
    for answer in group:
        if answer.status != "ok" and answer.text and rng.random() < 0.2:
            answer.rating = rng.choice((-1, 1))
    if habits.comparisons and kept.status == "ok":
        siblings = kept.ask.answers
        for old, new in zip(siblings, siblings[1:]):
            if old.status == new.status == "ok" and rng.random() < 0.5:
                pair, better = frozenset((old, new)), max(old, new, key=lambda answer: answer.quality)
                chat.shown[pair] = rng.choice(("variants", "box")) if old is siblings[0] else "box"
                if chat.shown[pair] == "variants" and rng.random() < 0.15:
                    continue  # Two were shown, and none was chosen.
                chat.verdicts[pair] = None if rng.random() < 0.15 and chat.shown[pair] == "box" else better
    if not fine or rng.random() > 0.4 and (kept is fine[-1] or kept.status != "ok"):
        return
    low = rng.randint(0, len(fine))
    high = rng.randint(low, len(fine))
    if kept.status == "ok" and kept is not fine[-1]:
        low = fine.index(kept) + 1
        high = rng.randint(low, len(fine))
    for place, answer in enumerate(fine):
        answer.rating = -1 if place < low else 1 if place >= high else 0
    if len(group) == len(fine) == 2 and chat.verdicts.get(frozenset(fine)) and rng.random() < 0.5:
        fine[0].rating, fine[1].rating = 1, -1  # A comparison outranks a thumb.


def converse(chat, parent, habits, depth):
    """One turn and those that follow; return the answer where the person ends."""
    rng = chat.rng
    if habits.branches and rng.random() < 0.2:
        answer_once(chat, parent, habits, rng.choice((0, 0, 1)))
    text = None
    if parent and rng.random() < 0.08:
        text = rng.choice(parent.path()).ask.text  # Asked once more, later on: another history.
    ask = new_ask(chat, parent, text)
    text, group = ask.text, []
    tries = rng.choices((1, 2, 3, 4), (45, 38, 13, 4))[0]
    qualities = rng.sample(range(100), tries)
    if habits.log:
        qualities.sort()
    lanes = habits.lanes and tries > 1 and rng.random() < 0.3
    for attempt, quality in enumerate(qualities):
        again = attempt and not lanes and (habits.log or rng.random() < habits.resend)
        ask = new_ask(chat, parent, text) if again else ask
        share = 0.12 if not habits.log or attempt < tries - 1 else 0.05
        group.append(new_answer(ask, quality, some_status(rng, habits, share)))
        group[-1].lane = attempt if lanes else 0
        if habits.branches and attempt < tries - 1 and group[-1].status == "ok" and rng.random() < 0.15:
            answer_once(chat, group[-1], habits, rng.choice((0, 1)))
    fine = [answer for answer in group if answer.status == "ok"]
    best = max(fine or group[-1:], key=lambda answer: answer.quality)
    kept = group[-1] if habits.log else best
    against = habits.ratings and len(fine) > 1 and rng.random() < 0.2
    if against:
        kept = rng.choice([answer for answer in fine if answer is not best])
    if habits.ratings or habits.comparisons:
        vote(group, kept, habits)
    if depth and habits.branches and not habits.log and len(fine) > 1 and rng.random() < 0.1:
        answer_once(chat, rng.choice([answer for answer in fine if answer is not kept]), habits)
    if not depth:
        if not habits.log and not against and rng.random() < 0.15:
            return rng.choice(group)
        return kept
    if kept.status != "ok" and habits.branches and rng.random() < 0.5:
        return converse(chat, parent, habits, depth - 1)
    return converse(chat, kept, habits, depth - 1)


def make_chats(kind, habits):
    for seed in range(SEEDS):
        for place in range(CHATS):
            rng = random.Random(f"{kind} {seed} {place}")
            chat = Chat(f"{seed}.{place}", str(UUID(int=rng.getrandbits(128), version=4)), rng)
            chat.log = habits.log
            chat.leaves = [converse(chat, None, habits, rng.randint(0, 4))]
            yield chat


# What the person's acts say


def relation(left, right):
    """Which of two siblings the person's acts prefer: (better one or None, why, how surely)."""
    pair, active = frozenset((left, right)), left.chat.active()
    if left.chat.verdicts.get(pair, left) is None and left.rating != right.rating:
        return max(left, right, key=lambda answer: answer.rating), "rating", "unclear"
    if pair in left.chat.verdicts:
        return left.chat.verdicts[pair], "comparison", "strong"
    if left.rating != right.rating:
        return max(left, right, key=lambda answer: answer.rating), "rating", "strong"
    if left.rating:
        return None, "rating", "strong"
    went_on = [answer for answer in (left, right) if answer.asks]
    here = [answer for answer in (left, right) if answer in active]
    if left.chat.log and not here:
        return None, "regenerate", "unclear"  # Both were taken back.
    if len(went_on) == 1:
        return went_on[0], "regenerate", "unclear" if here and here != went_on else "strong"
    if len(here) == 1:
        return here[0], "regenerate", "strong" if went_on else "weak"
    if went_on:
        return None, "regenerate", "unclear"
    return max(left, right, key=lambda answer: answer.number), "regenerate", "weak"


def groups(chat):
    """Return the answers that can be compared: to the same text after the same history."""
    found = defaultdict(list)
    for ask in chat.all_asks():
        found[ask.parent, ask.text] += [answer for answer in ask.answers if answer.status == "ok"]
    return list(found.values())


def expected(chat, habits):
    """Yield the pairs that must be found: (better, worse, why)."""
    for group in groups(chat):
        if not group or not chat.readable or any(answer.status != "ok" for answer in group[0].path()):
            continue
        if chat.cuts & set(group[0].path()[:-1]):
            continue
        ask = group[0].ask
        others = [other for other in (ask.parent.asks if ask.parent else chat.asks) if other.text != ask.text]
        archived = any(set(group) & set(cut.path()) for cut in chat.cuts)
        if habits.rows and (archived or any(other.number < ask.number for other in others)):
            continue
        worse = defaultdict(list)
        for place, left in enumerate(group):
            for right in group[:place]:
                better, why, sure = relation(left, right)
                pair = frozenset((left, right))
                apart = not habits.log and left.ask is not right.ask
                apart = apart or why == "regenerate" and (left.lane != right.lane or pair in chat.shown)
                if sure == "strong" and better:
                    worse[right if better is left else left].append((better, why, apart))
        tops = [answer for answer in group if answer not in worse]
        picked = {better for pair, better in chat.verdicts.items() if better and pair <= set(group)}
        if picked and not picked & set(tops):  # The one that was picked of two counts as the best.
            continue
        for loser, winners in worse.items():
            for winner, why, apart in winners:
                if not apart and tops == [winner]:  # The best one with each worse one, no more.
                    yield winner, loser, why


# Running the script, and the properties


def flat(text):
    return " ".join(text.split())


def build(source, out, *words):
    command = [sys.executable, str(SCRIPT), str(source), "--out", str(out), "--max-per-chat", "1000", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    read = lambda name: [json.loads(line) for line in (out / name).read_text().splitlines()]  # noqa: E731
    rows = [row for name in ("train.jsonl", "valid.jsonl", "test.jsonl") if (out / name).exists() for row in read(name)]
    unpaired = read("unpaired.jsonl") if (out / "unpaired.jsonl").exists() else []
    return rows, unpaired, "".join(path.read_text() for path in sorted(out.rglob("*")) if path.is_file())


def history_fault(prompt, answer):
    """Say what is wrong with a prompt as the history of an answer, or nothing."""
    said = [(message["role"], flat(message["content"])) for message in prompt]
    fits = {0}
    for before in answer.path()[:-1]:
        turn = [("user", flat(before.ask.text)), ("assistant", flat(before.text))]
        forms = [turn] if before.status == "ok" else [turn, turn[:1], []]  # An unfinished turn may be left out.
        fits = {at + len(form) for at in fits for form in forms if said[at : at + len(form)] == form}
    if any(said[at:] == [("user", flat(answer.ask.text))] for at in fits):
        return None
    return f"prompt {said} for history {[[turn.ask.text, turn] for turn in answer.path()]}"


def check(kind, habits, chats, rows, unpaired, everything, loose=()):
    """Check every property; loose: names of the signals that may stand for each other."""
    known = {flat(answer.text): answer for chat in chats for answer in chat.answers() if answer.text}
    faults, found = [], Counter()
    for row in rows:
        sides = [row["chosen"], row["rejected"]]
        assert [[message["role"] for message in side] for side in sides] == [["assistant"]] * 2, row
        chosen, rejected = (known.get(flat(side[0]["content"])) for side in sides)
        if not chosen or not rejected:
            faults.append(f"text that is no answer: {row}")
            continue
        found[chosen, rejected] += 1
        where = f"{chosen} over {rejected} ({row['signal']}, {row['weight']})"
        if chosen.chat is not rejected.chat:
            faults.append(f"of two chats: {where}")
            continue
        if chosen.status != "ok" or rejected.status != "ok":
            faults.append(f"no answer: {where}")
        if chosen.ask.text != rejected.ask.text or chosen.ask.parent is not rejected.ask.parent:
            faults.append(f"another history: {where}")
            continue
        if habits.named and (row["source"], row["conversation_id"]) != (habits.named, chosen.chat.ident):
            faults.append(f"from {row['source']}, {row['conversation_id']}: {where}")
        if not chosen.chat.readable:
            faults.append(f"no siblings here: {where}")
        fault = history_fault(row["prompt"], chosen)
        if fault:
            faults.append(f"{fault}: {where}")
        better, why, sure = relation(chosen, rejected)
        if sure != "unclear" and better is not chosen:
            faults.append(f"wrong way round, {better} by {why}: {where}")
        if row["signal"] != why and not {row["signal"], why} <= set(loose):
            faults.append(f"signal should be {why}: {where}")
        at_once = chosen.lane != rejected.lane  # going on from one of several models' answers says less
        weight = 1 if why != "regenerate" else 0.7 if sure == "strong" and not at_once else 0.35
        both = why == "regenerate" and chosen.asks and rejected.asks  # Both were gone on from: as weak, or not.
        if sure != "unclear" and row["weight"] != weight and not both:
            faults.append(f"weight should be {weight}: {where}")
    faults += [f"{count} times: {pair}" for pair, count in found.items() if count > 1]
    for row in unpaired:
        answer = known.get(flat(row["completion"][0]["content"]))
        if not answer or answer.status != "ok" or answer.rating != (1 if row["label"] else -1):
            faults.append(f"unpaired {answer}: {row}")
        elif history_fault(row["prompt"], answer):
            faults.append(f"unpaired {answer}: {history_fault(row['prompt'], answer)}")
    if SECRET in everything.lower():
        place = everything.lower().index(SECRET)
        faults.append(f"hidden text: {everything[max(0, place - 300) : place + 100]}")
    assert not faults, f"{kind}: {len(faults)} of {len(rows)}\n" + "\n".join(faults[:20])
    wanted = defaultdict(list)
    for chat in chats:
        for better, worse, why in expected(chat, habits):
            assert why == "comparison" or (better, worse) and relation(better, worse)[0] is better
            wanted[why].append((better, worse))
    for why, pairs in wanted.items():
        missing = [pair for pair in pairs if pair not in found]
        assert len(missing) <= 0.05 * len(pairs), f"{kind} {why}: {len(missing)} of {len(pairs)} missing: {missing[:8]}"
    return Counter({why: len(pairs) for why, pairs in wanted.items()})


def iso(number):
    return (
        datetime.fromtimestamp(START + number, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


# ChatGPT


def chatgpt_chat(chat, rng, until=None):
    """Return a conversation; until: as it was when that many things had happened."""
    nodes, tails, sane = {}, {}, rng.random() < 0.6
    origin = START + int(chat.name.split(".")[0]) * 100_000

    def add(ident, parent, author=None, content=None, number=0, metadata=None, bare=False, **more):
        time = origin + number * 40.5 if sane else rng.choice((None, origin + rng.randint(0, 9000)))
        message = None if bare else {
            "id": ident, "author": {"role": author, "name": None, "metadata": {}}, "create_time": time,
            "update_time": None, "content": content, "status": "finished_successfully", "end_turn": None,
            "weight": 1.0, "metadata": metadata if metadata is not None else {}, "recipient": "all", "channel": None,
        } | more  # fmt: skip
        nodes[ident] = {"id": ident, "message": message, "parent": parent, "children": []}
        if parent:
            nodes[parent]["children"].append(ident)
        return ident

    text = lambda *parts: {"content_type": "text", "parts": list(parts)}  # noqa: E731
    hidden = {"is_visually_hidden_from_conversation": True}
    fresh = lambda: str(UUID(int=rng.getrandbits(128), version=4))  # noqa: E731
    top = add(rng.choice(("client-created-root", fresh())), None, bare=True)
    top = add(fresh(), top, "system", text(secret(rng)), metadata=hidden, weight=0.0)
    if rng.random() < 0.5:
        about = {"about_user_message": secret(rng), "about_model_message": secret(rng)}
        content = {
            "content_type": "user_editable_context",
            "user_profile": secret(rng),
            "user_instructions": secret(rng),
        }
        if rng.random() < 0.3:
            content = text("")
        meta = hidden | {"is_user_system_message": True, "user_context_message_data": about}
        top = add(fresh(), top, "user", content, metadata=meta)

    def hop(tail, number):
        kind = rng.choice(("empty", "thoughts", "search", "python", "commentary", "recap", "memory", "null"))
        if kind == "empty":
            return add(fresh(), tail, "assistant", text(""), number)
        if kind == "null":
            return add(fresh(), tail, bare=True)
        if kind == "thoughts":
            thought = {"summary": secret(rng), "content": secret(rng)}
            content = {"content_type": "thoughts", "thoughts": [thought], "source_analysis_msg_id": fresh()}
            return add(fresh(), tail, "assistant", content, number, end_turn=False)
        if kind == "recap":
            content = {"content_type": "reasoning_recap", "content": secret(rng)}
            return add(fresh(), tail, "assistant", content, number, end_turn=False)
        if kind == "commentary":
            return add(fresh(), tail, "assistant", text(secret(rng)), number, channel="commentary", end_turn=False)
        to = {"search": "web", "python": "python", "memory": "bio"}[kind]
        content = {"content_type": "code", "language": "unknown", "text": secret(rng)}
        content = text(secret(rng)) if kind == "memory" else content
        tail = add(fresh(), tail, "assistant", content, number, recipient=to, end_turn=False)
        out = {"content_type": "execution_output", "text": secret(rng)}
        out = {"content_type": "tether_quote", "text": secret(rng), "url": "u"} if kind == "search" else out
        author = {"role": "tool", "name": to, "metadata": {"real_author": f"tool:{to}"}}
        weight = rng.choice((0.0, 1.0))
        return add(fresh(), tail, number=number, content=out, author=author, weight=weight) and tail_of(tail, author)

    def tail_of(tail, author):
        last = nodes[tail]["children"][-1]
        nodes[last]["message"]["author"] = author
        return last

    heads = {}
    things = [(ask.number, ask) for ask in chat.all_asks()] + [(answer.number, answer) for answer in chat.answers()]
    for number, thing in sorted(things, key=lambda pair: pair[0]):
        if until and number > until:
            break
        if isinstance(thing, Ask):
            meta = {"request_id": fresh(), "unknown_field": None}
            for pair, how in chat.shown.items():
                if how == "variants" and all(answer.ask is thing for answer in pair):
                    meta["paragen_variants_info"] = {
                        "type": "num_variants_in_stream", "num_variants_in_stream": 2, "display_treatment": "skippable",
                        "conversation_id": chat.ident,
                    }  # fmt: skip
            if thing.answers and rng.random() < 0.1:  # A vote on pictures says nothing of the texts.
                meta["image_gen_paragen_metadata"] = {"image_gen_paragen_choice": thing.answers[-1].ident}
            content = text(thing.text)
            if rng.random() < 0.1:
                content = {"content_type": "multimodal_text", "parts": [thing.text]}
            add(thing.ident, tails[thing.parent] if thing.parent else top, "user", content, number, metadata=meta)
            continue
        tail, size = thing.ask.ident, len(nodes)
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            tail = hop(tail, number)
        said, more = thing.text, {"end_turn": True}
        meta = {"model_slug": "m-1", "finish_details": {"type": "stop"}, "is_complete": True}
        meta = rng.choice((meta, {"model_slug": "m-1"}, meta | {"citations": None}))
        if thing.status == "ok":
            if rng.random() < 0.1:
                said += rng.choice((" \ue200cite\ue202turn0search3\ue201", "【12†source】"))
            more["channel"] = rng.choice((None, "final"))
            tail = add(thing.ident, tail, "assistant", text(said), number, meta, **more)
        elif thing.status == "cancelled":
            meta, more = rng.choice((
                ({"finish_details": {"type": "interrupted", "reason": "client_stopped"}}, {"end_turn": True}),
                ({"finish_details": {"type": "interrupted"}}, {"status": "finished_partial_completion"}),
                ({"model_slug": "m-1"}, {"status": "in_progress"}),
                (None, {"status": "in_progress", "end_turn": None}),
            ))  # fmt: skip
            tail = add(thing.ident, tail, "assistant", text(said), number, meta, **more)
        elif thing.status == "truncated":
            meta = {"finish_details": {"type": "max_tokens"}}
            tail = add(thing.ident, tail, "assistant", text(said), number, meta, end_turn=rng.choice((None, True)))
        elif thing.status == "error":
            content = {"content_type": "system_error", "name": "E", "text": said}
            tail = add(thing.ident, tail, rng.choice(("assistant", "tool")), content, number)
        elif thing.status == "tool":
            code = {"content_type": "code", "language": "python", "text": secret(rng)}
            tail = add(thing.ident, tail, "assistant", code, number, recipient="python")
            if rng.random() < 0.5:
                out = {"content_type": "execution_output", "text": secret(rng)}
                tail = add(fresh(), tail, "tool", out, number, weight=0.0)
        else:
            content = rng.choice((text(""), text(), {"content_type": "text", "parts": None}, None))
            tail = add(thing.ident, tail, "assistant", content, number, bare=rng.random() < 0.2)
        heads[thing] = list(nodes)[size]
        if rng.random() < 0.1:
            tail = add(fresh(), tail, "system", text(secret(rng)), number, {"rebase_system_message": True}, weight=0.0)
        tails[thing] = tail
        for pair, how in chat.shown.items():
            if how == "variants" and thing in pair and pair <= set(tails) and pair in chat.verdicts:
                better = chat.verdicts[pair]
                meta = nodes[thing.ask.ident]["message"]["metadata"]
                meta["paragen_variant_choice"] = rng.choice((heads[better], better.ident))
    last = max(tails, key=lambda answer: answer.number)
    leaf = last if until else chat.leaves[0]
    pointer = tails[leaf]
    if leaf is last and sane and rng.random() < 0.3:
        pointer = rng.choice((None, fresh()))
    mapping = list(nodes.items())
    if rng.random() < 0.5:
        rng.shuffle(mapping)
    return {
        "title": rng.choice((None, secret(rng))), "create_time": START + 0.5, "mapping": dict(mapping),
        "update_time": START + 5000.25 - 1000 * bool(until), "moderation_results": [], "current_node": pointer,
        "conversation_id": chat.ident, "id": chat.ident, "plugin_ids": None, "voice": None, "memory_scope": "global",
    }  # fmt: skip


def write_chatgpt(chats, folder):
    rng = random.Random("chatgpt")
    exports = []
    for part in range(4):
        some = chats[part::4]
        conversations = [chatgpt_chat(chat, rng) for chat in some] + [{"title": "no mapping", "id": "x"}]
        feedback = [{"id": "gone", "conversation_id": "gone", "user_id": "u", "rating": "thumbs_up", "content": "{}"}]
        compared = [{"id": "c", "user_id": "u", "input": None, "output": {"feedback_step_2": None}, "metadata": {}}]
        for chat in some:
            for answer in chat.answers():
                if answer.rating and part % 2:
                    rating = "thumbsUp" if answer.rating > 0 else "thumbsDown"
                    content = json.dumps({"tags": ["not-helpful"], "text": secret(rng)})
                    feedback.append({
                        "message_id": answer.ident, "conversation_id": chat.ident, "user_id": "u", "rating": rating,
                        "content": content,
                    })  # fmt: skip
                elif answer.rating:
                    rating = rng.choice(
                        ("thumbs_up", "thumbsUp") if answer.rating > 0 else ("thumbs_down", "thumbsDown")
                    )
                    feedback.append({
                        "id": answer.ident, "conversation_id": chat.ident, "user_id": "u", "rating": rating,
                        "create_time": "2025-03-01T10:00:00.123456Z", "update_time": "2025-03-01T10:00:00.123456Z",
                        "workspace_id": None, "content": rng.choice(("{}", "{not json", "flagged")),
                        "evaluation_name": None, "evaluation_treatment": None,
                    })  # fmt: skip
            for pair, how in chat.shown.items():
                if how == "box":
                    old, new = sorted(pair, key=lambda answer: answer.number)
                    better = chat.verdicts[pair]
                    word = "same" if better is None else "new" if better is new else "original"
                    output = {
                        "feedback_version": "comparison_feedback_modal:a:1.0",
                        "feedback_step_1": {"rating": "none", "tags": [], "text": secret(rng)},
                        "feedback_step_2": {
                            "original_turn": [{"id": old.ident}], "new_turn": [{"id": new.ident}],
                            "completion_comparison_rating": word, "new_completion_placement": "not-applicable",
                        },
                    }  # fmt: skip
                    entry = {"conversation_id": chat.ident, "messages": [], "unknown": None}
                    compared.append({
                        "id": chat.uuid(), "user_id": "u", "input": entry, "output": output, "create_time": iso(5),
                        "metadata": {"country": "NL"},
                    })  # fmt: skip
        files = {"conversations.json": conversations}
        if part == 1:
            files = {"conversations-000.json": conversations[:9], "conversations-001.json": conversations[9:]}
            files["export_manifest.json"] = {"files": list(files)}
        files |= {"message_feedback.json": feedback, "model_comparisons.json": compared}
        files |= {"user.json": {"id": "u", "email": f"{SECRET}@example.org"}, "shared_conversations.json": []}
        exports.append(files)
    older = [
        chatgpt_chat(chat, rng, rng.randint(2, chat.count)) for chat in chats if rng.random() < 0.3 and chat.count > 2
    ]
    for place, files in enumerate([*exports, {"conversations.json": older}]):
        if place in (0, 1):
            with zipfile.ZipFile(folder / f"export-{place}.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, json.dumps(content, ensure_ascii=place == 0))
            continue
        (folder / f"export-{place}").mkdir()
        for name, content in files.items():
            (folder / f"export-{place}" / name).write_text(json.dumps(content), encoding="utf-8-sig")


# Open WebUI


def open_webui_chat(chat, rng, until=None):
    messages = {}

    def add(ident, parent, number, **more):
        messages[ident] = {
            "id": ident, "parentId": parent, "childrenIds": [], "timestamp": START + number * 20,
        } | more  # fmt: skip
        if parent:
            messages[parent]["childrenIds"].append(ident)

    things = [(ask.number, ask) for ask in chat.all_asks()] + [(answer.number, answer) for answer in chat.answers()]
    for number, thing in sorted(things, key=lambda pair: pair[0]):
        if until and number > until:
            break
        if isinstance(thing, Ask):
            lanes = max((answer.lane for answer in thing.answers), default=0)
            models = [f"model-{lane}" for lane in range(lanes + 1)]
            parent = thing.parent.ident if thing.parent else None
            add(thing.ident, parent, number, role="user", content=thing.text, models=models, files=None)
            continue
        said, more = thing.text, {"done": True}
        if thing.status == "cancelled":
            more = {"done": False}
        if thing.status == "error":
            more = rng.choice(({"done": True, "error": True}, {"done": True, "error": {"content": said}}))
            said = said if more["error"] is True else ""
        if thing.status == "truncated":
            more = {"done": False}
        if rng.random() < 0.3 or thing.status == "tool":
            think = f'<details type="reasoning" done="true" duration="3">\n> {secret(rng)}\n</details>\n'
            call = f'<details type="tool_calls" result="{secret(rng)}">\n<summary>x</summary>\n</details>\n'
            said = rng.choice((think, call, think + call)) + said
        if thing.rating:
            more["annotation"] = {
                "rating": thing.rating, "reason": secret(rng), "comment": None, "tags": ["x"],
                "details": {"rating": 9 if thing.rating > 0 else 2},
            }  # fmt: skip
            more["feedbackId"] = chat.uuid()
        elif rng.random() < 0.1:
            more["annotation"] = rng.choice((None, {}, {"rating": None, "tags": []}))
        model = f"model-{thing.lane}"
        add(
            thing.ident, thing.ask.ident, number, role="assistant", content=said, model=model, modelName=model,
            modelIdx=thing.lane, statusHistory=[{"description": secret(rng)}], sources=[{"document": [secret(rng)]}],
            **more,
        )  # fmt: skip
    last = max((answer for answer in chat.answers() if answer.ident in messages), key=lambda answer: answer.number)
    entries = list(messages.items())
    if rng.random() < 0.5:
        rng.shuffle(entries)
    current = (last if until else chat.leaves[0]).ident
    return {
        "title": secret(rng), "models": ["model-0"], "params": {"system": secret(rng)}, "tags": [], "files": [],
        "history": {"currentId": current, "messages": dict(entries)}, "timestamp": START * 1000,
        "messages": [],
    }  # fmt: skip


def write_open_webui(chats, folder):
    rng = random.Random("open webui")
    wrap = lambda chat, inner, updated: {  # noqa: E731
        "id": chat.ident, "user_id": "u", "title": SECRET, "chat": inner, "created_at": START,
        "updated_at": START + updated, "share_id": None, "archived": False, "pinned": None, "meta": {"tags": []},
        "folder_id": None,
    }  # fmt: skip
    exported, feedback = [], [{"id": "f", "type": "rating", "data": {"rating": None}, "meta": None, "snapshot": None}]
    for chat in chats:
        rated = [answer for answer in chat.answers() if answer.rating]
        form = rng.choice(("chat", "chat", "both", "feedback")) if rated else "chat"
        if form == "both" or form == "chat":
            exported.append(wrap(chat, open_webui_chat(chat, rng), 9000))
        for place, answer in enumerate(rated if form != "chat" else []):
            if form == "feedback":
                snapshot = {"chat": wrap(chat, open_webui_chat(chat, rng), 9000)}
                if place and rng.random() < 0.3:
                    snapshot = None
            else:
                snapshot = {"chat": wrap(chat, open_webui_chat(chat, rng, answer.number + rng.randint(0, 2)), 100)}
            if snapshot and rng.random() < 0.2:
                snapshot = {"chat": snapshot["chat"]["chat"] | {"id": chat.ident}}
            siblings = [f"model-{other.lane}" for other in answer.ask.answers if other.lane != answer.lane]
            feedback.append({
                "id": chat.uuid(), "user_id": "u", "version": 0, "type": "rating",
                "data": {
                    "rating": rng.choice((answer.rating, str(answer.rating))), "model_id": f"model-{answer.lane}",
                    "sibling_model_ids": siblings or None, "reason": secret(rng), "comment": "", "tags": None,
                    "details": {"rating": 9 if answer.rating > 0 else 2},
                },
                "meta": {
                    "arena": False, "model_id": f"model-{answer.lane}", "message_id": answer.ident, "message_index": 2,
                    "chat_id": chat.ident, "base_models": {},
                },
                "snapshot": snapshot, "created_at": START + answer.number, "updated_at": START + answer.number,
            })  # fmt: skip
    (folder / "chat-export-1.json").write_text(json.dumps(exported[::2]))
    (folder / "chat-export-2.json").write_text(json.dumps(exported[1::2]))
    (folder / "feedback-history-export.json").write_text(json.dumps(feedback))


# Logs: what happened, line by line


def events(chat):
    """Yield (turns taken back, ask, answer) in the order of time: a person who tries again goes back first."""
    path = []
    for answer in chat.answers():
        parents = answer.ask.parent.path() if answer.ask.parent else []
        assert path[: len(parents)] == parents
        yield path[len(parents) :], answer.ask, answer
        path = [*parents, answer]


def lines_of(records, rng, noise):
    """Return records as lines, with what a log may hold besides."""
    lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records]
    for extra in noise:
        lines.insert(rng.randint(1, len(lines)), extra if isinstance(extra, str) else json.dumps(extra))
    if rng.random() < 0.3:
        lines.append(json.dumps(records[-1])[: rng.randint(5, 30)])
    return "\n".join(lines) + "\n" * rng.randint(0, 1)


# Claude Code


def claude_code_files(chat, rng):
    """Yield (name, text): the session, a subagent, and perhaps a session that was forked or resumed from it."""
    session, records, tails, starts = chat.ident, [], {None: None}, {}
    fresh = lambda: str(UUID(int=rng.getrandbits(128), version=4))  # noqa: E731

    def add(kind, parent, message=None, ident=None, **more):
        ident = ident or fresh()
        records.append({
            "parentUuid": parent, "isSidechain": False, "userType": "external", "cwd": "/srv/x", "version": "2.0.1",
            "sessionId": session, "gitBranch": "main", "type": kind, "uuid": ident, "timestamp": iso(len(records)),
        } | ({"message": message} if message else {}) | more)  # fmt: skip
        return ident

    def reply(parent, content, message="", **more):
        message = {
            "id": message or "msg_" + fresh(), "type": "message", "role": "assistant", "model": "m-4",
            "content": content, "stop_reason": None, "usage": {"output_tokens": 1},
        } | more.pop("message_more", {})  # fmt: skip
        return add("assistant", parent, message, requestId="r", **more)

    def use_tool(tail, finish=True):
        message = "msg_" + fresh()
        if rng.random() < 0.5:
            tail = reply(tail, [{"type": "thinking", "thinking": secret(rng), "signature": "x"}], message)
        if rng.random() < 0.5:
            tail = reply(tail, [{"type": "text", "text": secret(rng)}], message)
        call = {"type": "tool_use", "id": "toolu_" + fresh(), "name": "Bash", "input": {"command": secret(rng)}}
        tail = reply(tail, [call], message)
        if rng.random() < 0.2:
            tail = add("progress", tail, data={"type": "hook_progress", "text": secret(rng)}, toolUseID=call["id"])
        content = rng.choice((secret(rng), [{"type": "text", "text": secret(rng)}]))
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": content, "is_error": None}
        if finish:
            return user(tail, [result], toolUseResult={"stdout": secret(rng)})
        no = "The user doesn't want to proceed with this tool use. The tool use was rejected."
        result |= {"is_error": True, "content": no}
        tail = user(tail, [result], toolUseResult="User rejected tool use")
        return user(tail, [{"type": "text", "text": "[Request interrupted by user for tool use]"}])

    def user(parent, content, ident=None, **more):
        return add("user", parent, {"role": "user", "content": content}, ident, **more)

    def start(parent):
        """What comes between two turns, once: a retry has the same parent."""
        if parent in starts:
            return starts[parent]
        tail = tails[parent]
        if rng.random() < 0.15:
            tail = user(tail, f"Caveat: The messages below {secret(rng)}", isMeta=True)
            tail = user(tail, f"<command-name>/model</command-name> <command-args>{secret(rng)}</command-args>")
            tail = user(tail, f"<local-command-stdout>{secret(rng)}</local-command-stdout>")
        if rng.random() < 0.15:
            tail = add("system", tail, subtype="turn_duration", durationMs=5, content=None)
        if rng.random() < 0.15:
            tail = add("attachment", tail, attachment={"type": "x", "content": secret(rng)})
        if parent and parent in chat.leaves[0].path() and rng.random() < 0.06:
            chat.cuts.add(parent)
            more = {"subtype": "compact_boundary", "content": "Conversation compacted", "logicalParentUuid": tail}
            tail = add("system", None, isMeta=False, **more)
            summary = f"This session is being continued from a previous conversation. {secret(rng)}"
            tail = user(tail, summary, isCompactSummary=True, isVisibleInTranscriptOnly=True)
        starts[parent] = tail
        return tail

    def subagent():
        side = add("user", None, {"role": "user", "content": f"{SECRET} the same task"}, isSidechain=True, agentId="a")
        reply(side, [{"type": "text", "text": secret(rng)}], isSidechain=True, agentId="a")

    def turn(ask, answer):
        content = ask.text
        reminder = f"<system-reminder>\n{secret(rng)}\n</system-reminder>"
        if rng.random() < 0.2:
            content = [{"type": "text", "text": reminder}, {"type": "text", "text": ask.text}]
        elif rng.random() < 0.1:
            content = f"{ask.text}\n{reminder}"
        tail = user(start(ask.parent), content, ask.ident)
        if rng.random() < 0.15:
            subagent()
        for _ in range(rng.choice((0, 0, 1, 2))):
            tail = use_tool(tail)
        message = "msg_" + fresh()
        if rng.random() < 0.4:
            tail = reply(tail, [{"type": "thinking", "thinking": secret(rng), "signature": "x"}], message)
        if answer.status == "ok":
            if rng.random() < 0.1:  # Two blocks of one message.
                first, second = answer.text.split(", ", 1)
                tail = reply(tail, [{"type": "text", "text": first + ", "}], message)
                tail = reply(tail, [{"type": "text", "text": second}], message)
            else:
                tail = reply(tail, [{"type": "text", "text": answer.text}], message, message_more=rng.choice((
                    {}, {"stop_reason": "end_turn"})))  # fmt: skip
        elif answer.status == "cancelled":
            tail = reply(tail, [{"type": "text", "text": answer.text}], message)
            tail = user(tail, [{"type": "text", "text": "[Request interrupted by user]"}])
        elif answer.status == "error":
            content = [{"type": "text", "text": f"API Error: {answer.text}"}]
            tail = reply(tail, content, isApiErrorMessage=True, message_more={"model": "<synthetic>"})
        elif answer.status == "tool":
            tail = use_tool(tail, finish=False)
        tails[answer] = tail
        if rng.random() < 0.1:
            tails[answer] = add("system", tail, subtype="stop_hook_summary", hookCount=1, content=secret(rng))

    for _, ask, answer in events(chat):
        turn(ask, answer)
    for _ in range(rng.choice((0, 0, 0, 2))):
        subagent()
    noise = [
        {"type": "file-history-snapshot", "messageId": fresh(), "snapshot": {"x": secret(rng)}},
        {"type": "queue-operation", "operation": "enqueue", "content": secret(rng), "sessionId": session},
        {"type": "custom-title", "customTitle": secret(rng), "sessionId": session}, "", {"type": "new-kind", "x": None},
    ]  # fmt: skip
    if rng.random() < 0.2:
        noise.append('{"type": "user", "uuid": "broken')
    yield f"{session}.jsonl", lines_of(records, rng, rng.sample(noise, rng.randint(0, len(noise))))
    if rng.random() < 0.3:
        said = [{"type": "text", "text": secret(rng)}]
        agent = [dict(records[0], isSidechain=True, agentId="a1", uuid=fresh(), type="user", parentUuid=None)]
        agent[0]["message"] = {"role": "user", "content": secret(rng)}
        agent.append(dict(agent[0], uuid=fresh(), type="assistant", parentUuid=agent[0]["uuid"]))
        agent[1]["message"] = {"id": "msg_a", "role": "assistant", "model": "m-4", "content": said}
        yield "agent-a1.jsonl", lines_of(agent, rng, [])
    if rng.random() < 0.3 and chat.leaves[0].status == "ok" and not chat.cuts:
        origin = rng.choice(chat.leaves[0].path())
        if origin.status == "ok":
            by_id, chain, ident = {record["uuid"]: record for record in records}, [], tails[origin]
            while ident:
                chain.append(by_id[ident])
                ident = by_id[ident]["parentUuid"]
            old, session = session, fresh()
            starts[origin] = tails[origin]
            records = [
                record | {"sessionId": session, "forkedFrom": {"sessionId": old, "messageUuid": record["uuid"]}}
                for record in reversed(chain)
            ]
            ask = new_ask(chat, origin)
            leaf = new_answer(ask, 50, "ok")
            turn(ask, leaf)
            chat.leaves = [leaf] if origin is chat.leaves[0] else [*chat.leaves, leaf]
            yield f"{session}.jsonl", lines_of(records, rng, [])


def write_claude_code(chats, folder):
    rng = random.Random("claude code")
    for chat in chats:
        for name, text in claude_code_files(chat, rng):
            place = folder / f"-srv-{chat.name}"
            place.mkdir(exist_ok=True)
            (place / name).write_text(text)


# Codex


def codex_lines(chat, rng, old):
    records, path = [], []
    fresh = lambda: str(UUID(int=rng.getrandbits(128), version=4))  # noqa: E731

    def add(kind, **payload):
        record = {"timestamp": iso(len(records)), "type": kind, "payload": payload}
        records.append(payload if old and kind == "response_item" else record)

    def event(kind, **more):
        if not old:
            add("event_msg", type=kind, **more)

    def message(role, text, **more):
        kind = "output_text" if role == "assistant" else "input_text"
        add("response_item", type="message", role=role, content=[{"type": kind, "text": text}], **more)

    if old:
        records.append({"id": chat.ident, "timestamp": iso(0), "instructions": secret(rng), "git": None})
        records.append({"record_type": "state"})
    else:
        add(
            "session_meta", id=chat.ident, timestamp=iso(0), cwd="/srv/x", originator="codex_cli_rs", cli_version="0.9",
            source="cli", base_instructions={"text": secret(rng)}, instructions=secret(rng),
        )  # fmt: skip
        message("developer", f"<permissions instructions>{secret(rng)}</permissions instructions>")
    message("user", f"# AGENTS.md instructions for /srv/x\n\n<INSTRUCTIONS>\n{secret(rng)}\n</INSTRUCTIONS>")
    message("user", f"<environment_context>\n{secret(rng)}\n</environment_context>")
    for back, ask, answer in events(chat):
        if back:
            event("thread_rolled_back", num_turns=len(back))
        elif path and not old and rng.random() < 0.05:
            chat.cuts.add(path[-1])
            summary = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": secret(rng)}]}
            kept = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": path[-1].ask.text}]}
            add("compacted", message=secret(rng), replacement_history=[kept, summary])
            event("context_compacted")
        path = answer.path()
        turn = fresh()
        event("task_started", turn_id=turn, model_context_window=1000)
        if not old:
            add("turn_context", turn_id=turn, cwd="/srv/x", model="m-5", summary="auto", user_instructions=secret(rng))
        text = ask.text
        if rng.random() < 0.1:
            text = f"# Context from my IDE setup:\n\n{secret(rng)}\n\n## My request for Codex:\n{ask.text}"
        message("user", text)
        event("user_message", message=text, images=[], local_images=[], text_elements=[])
        for _ in range(rng.choice((0, 0, 1, 2)) + (answer.status == "tool")):
            thought = [{"type": "summary_text", "text": secret(rng)}]
            add("response_item", type="reasoning", summary=thought, content=None, encrypted_content=secret(rng))
            event("agent_reasoning", text=secret(rng))
            if rng.random() < 0.5 and not old:
                note = secret(rng)
                message("assistant", note, phase="commentary")
                event("agent_message", message=note, phase="commentary")
            call = rng.choice(("function_call", "custom_tool_call"))
            key = "arguments" if call == "function_call" else "input"
            add("response_item", type=call, name="shell", call_id="c1", **{key: json.dumps({"x": secret(rng)})})
            add("response_item", type=call + "_output", call_id="c1", output=secret(rng))
            event("token_count", info=None, rate_limits=None)
        if answer.status in ("ok", "cancelled"):
            phase = rng.choice(({}, {"phase": "final_answer"})) if answer.status == "ok" else {}
            first, second = rng.choice((True, False)), partial(event, "agent_message", message=answer.text, **phase)
            if first:
                second()
            message("assistant", answer.text, **phase)
            if not first:
                second()
        if answer.status == "error":
            event("error", message=answer.text, codex_error_info="other")
        if answer.status == "cancelled":
            event("turn_aborted", turn_id=turn, reason="interrupted")
            if rng.random() < 0.5:
                message("user", f"<turn_aborted>\n{secret(rng)}\n</turn_aborted>")
        else:
            last = answer.text if answer.status == "ok" else None
            event("task_complete", turn_id=turn, last_agent_message=last)
        if rng.random() < 0.1 and not old:
            add("world_state", x=secret(rng))
            add("response_item", type="ghost_snapshot", ghost_commit={"id": secret(rng)})
    return records


def write_codex(chats, folder):
    rng = random.Random("codex")
    for place, chat in enumerate(chats):
        straight = all(not back for back, _, _ in events(chat))
        fine = all(answer.status in ("ok", "tool", "empty") for answer in chat.answers())
        records = codex_lines(chat, rng, straight and fine and rng.random() < 0.5)
        name = f"rollout-2025-02-19T21-20-{place:02d}-{chat.ident}.jsonl"
        day = folder / "2025" / "02" / f"{1 + place % 20:02d}"
        day.mkdir(parents=True, exist_ok=True)
        (day / name).write_text(
            lines_of(records, rng, ["", {"timestamp": None, "type": "new_kind", "payload": {}}][: place % 3])
        )
        if place % 7 == 0 and not straight:  # A fork writes the lines once more, under another id.
            head = records[0] | {"payload": records[0]["payload"] | {"id": chat.uuid(), "forked_from_id": chat.ident}}
            (day / f"rollout-2025-02-20T21-20-{place:02d}.jsonl").write_text(lines_of([head, *records[1:]], rng, []))


# Hermes


def write_hermes(chats, folder):
    rng = random.Random("hermes")
    with closing(sqlite3.connect(folder / "state.db")) as db:
        db.executescript("""
            CREATE TABLE schema_version (version INTEGER NOT NULL);
            INSERT INTO schema_version VALUES (30);
            CREATE TABLE sessions (id TEXT PRIMARY KEY, source TEXT NOT NULL, user_id TEXT, session_key TEXT,
                model TEXT, model_config TEXT, system_prompt TEXT, parent_session_id TEXT,
                started_at REAL NOT NULL, ended_at REAL,
                end_reason TEXT, message_count INTEGER DEFAULT 0, title TEXT, cwd TEXT, rewind_count INTEGER);
            CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT NOT NULL, role TEXT NOT NULL,
                content TEXT, tool_call_id TEXT, tool_calls TEXT, tool_name TEXT, timestamp REAL NOT NULL,
                finish_reason TEXT, reasoning TEXT, reasoning_content TEXT, platform_message_id TEXT,
                observed INTEGER DEFAULT 0, _compressed_summary INTEGER, active INTEGER NOT NULL DEFAULT 1,
                compacted INTEGER NOT NULL DEFAULT 0, display_kind TEXT, display_metadata TEXT, unknown TEXT);
        """)

        def add(session, number, role, content, **more):
            row = {"session_id": session, "role": role, "content": content, "timestamp": START + number * 9.5} | more
            keys = ", ".join(row)
            marks = ", ".join("?" * len(row))
            return db.execute(f"INSERT INTO messages ({keys}) VALUES ({marks})", list(row.values())).lastrowid

        def session(ident, source="cli", **more):
            row = {"id": ident, "source": source, "model": "m-6", "system_prompt": secret(rng), "title": secret(rng),
                   "started_at": START + 1.5} | more  # fmt: skip
            marks = ", ".join("?" * len(row))
            db.execute(f"INSERT INTO sessions ({', '.join(row)}) VALUES ({marks})", list(row.values()))

        for place, chat in enumerate(chats):
            ident = f"20250219_2120{place % 60:02d}_{chat.ident[:6]}"
            session(ident, rng.choice(("cli", "telegram")))
            rows = {}
            for back, ask, answer in events(chat):
                for gone in back:
                    marks = ", ".join("?" * len(rows[gone]))
                    db.execute(f"UPDATE messages SET active = 0 WHERE compacted = 0 AND id IN ({marks})", rows[gone])
                before = answer.path()[:-1]
                if before and not back and before[-1] in chat.active() and rng.random() < 0.05 and not chat.cuts:
                    chat.cuts.add(before[-1])
                    done = [row for turn in before for row in rows[turn]]
                    marks = ", ".join("?" * len(done))
                    db.execute(f"UPDATE messages SET active = 0, compacted = 1 WHERE id IN ({marks})", done)
                    mark = "[CONTEXT COMPACTION \u2014 REFERENCE ONLY] " if rng.random() < 0.5 else ""
                    add(ident, answer.number, "user", mark + secret(rng), _compressed_summary=None if mark else 1)
                text = ask.text
                if rng.random() < 0.1:
                    text = "\x00json:" + json.dumps([{"type": "text", "text": ask.text}])
                new = [add(ident, answer.number, "user", text)]
                for _ in range(rng.choice((0, 0, 1, 2)) + (answer.status == "tool")):
                    arguments = json.dumps({"x": secret(rng)})
                    calls = json.dumps([{"id": "c", "function": {"name": "f", "arguments": arguments}}])
                    more = {"tool_calls": calls, "finish_reason": "tool_calls", "reasoning": secret(rng)}
                    said = rng.choice((None, "", secret(rng)))
                    new.append(add(ident, answer.number, "assistant", said, **more))
                    new.append(add(ident, answer.number, "tool", secret(rng), tool_call_id="c", tool_name="f"))
                if answer.status == "ok":
                    more = {"finish_reason": rng.choice((None, "stop")), "reasoning": rng.choice((None, secret(rng)))}
                    new.append(add(ident, answer.number, "assistant", answer.text, **more))
                elif answer.status == "truncated":
                    new.append(add(ident, answer.number, "assistant", answer.text, finish_reason="length"))
                elif answer.status == "empty" and rng.random() < 0.5:
                    new.append(add(ident, answer.number, "assistant", rng.choice((None, "", "  "))))
                rows[answer] = new
                if rng.random() < 0.05:
                    new.append(add(ident, answer.number, "user", secret(rng), display_kind="hidden"))
                if rng.random() < 0.05:
                    new.append(add(ident, answer.number, "user", secret(rng), observed=1))
        for place, source in enumerate(("cron", "batch", "tool", "subagent", "kanban")):
            session(f"20250220_0000{place:02d}_abcdef", source)
            for active in (0, 1):
                add(f"20250220_0000{place:02d}_abcdef", place, "user", f"{SECRET} the same task", active=active)
                add(f"20250220_0000{place:02d}_abcdef", place, "assistant", secret(rng), active=active)
        db.commit()


TREES = {
    "chatgpt": (write_chatgpt, Habits(resend=0.05, ratings=True, comparisons=True, named="chatgpt")),
    "open_webui": (write_open_webui, Habits(resend=0.05, ratings=True, lanes=True, named="open-webui")),
}


LOGS = {
    "claude_code": (write_claude_code, Habits(resend=1, log=True, statuses=("cancelled", "error", "tool", "empty"))),
    "codex": (write_codex, Habits(resend=1, log=True, statuses=("cancelled", "error", "tool", "empty"))),
    "hermes": (write_hermes, Habits(resend=1, log=True, rows=True, statuses=("tool", "empty", "truncated"))),
}


@pytest.mark.parametrize("kind", [*TREES, *LOGS])
def test_labels(kind, tmp_path):
    write, habits = (TREES | LOGS)[kind]
    chats = list(make_chats(kind, habits))
    source = tmp_path / "source"
    source.mkdir()
    write(chats, source)
    loose = ("comparison", "rating") * (kind == "open_webui")
    counts = check(kind, habits, chats, *build(source, tmp_path / "out"), loose=loose)
    assert counts["regenerate"] > 20, counts
