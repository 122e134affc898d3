"""Every source of build_dpo_pairs.py: small samples of each schema, the pairs they hold, the traps that hold none.

The samples are written from the schemas alone, so this file is a second opinion on the readers: each source is written
into a folder, the script runs on it once, and the pairs it writes are compared with the pairs that were put in.
To add a source: write one function with a @source line that fills a Sample.
"""

import gzip
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START = 1_717_000_000  # seconds; every sample's first message
PRIVATE = "Quokkafish"  # stands in system prompts, account files and tool output; never in the script's files

# ------------------------------------------------------------------------------------------------------------ texts

Topic = namedtuple("Topic", "question a b c")
TOPICS = """
Which pier does the island ferry leave from?
The island ferry leaves from the north pier, beside the lighthouse.
Boats for that crossing depart at the old fish market on the quay.
Look for the blue ticket hut; passengers board right behind it.

How do I keep basil alive on a windowsill?
Water it from below and pinch off the top leaves every week.
Basil mostly wants warmth, so move the pot away from cold glass.
Buy a larger pot, since supermarket plants are far too crowded.

What is the capital of Mongolia?
Ulaanbaatar is the capital, on the Tuul river.
That would be Karakorum, the seat of the old khans.
Mongolia is governed from Darkhan in the north.

When should I prune an apple tree?
Late winter is best, while the buds are still asleep.
Cut it back straight after the harvest in October.
Any dry afternoon in June does the job nicely.

Why does bread go stale so quickly?
Its starch crystallises again as the loaf cools and rests.
Yeast keeps eating the sugar until nothing soft remains.
Kitchen air is simply too damp for a crust to survive.

How can I remove candle wax from a tablecloth?
Freeze the cloth, crack the wax off, then iron through paper.
Boiling water poured from a height melts the stain away.
Scrub gently with toothpaste and rinse under a cold tap.

What does a bicycle chain need after rain?
Wipe it dry, add a drop of oil to each link, wipe again.
Spray plenty of degreaser and leave it to drip overnight.
Nothing at all, because modern chains are rustproof.

Which planet has the shortest day?
Jupiter turns once in just under ten hours.
Mercury, as it sits closest to the sun.
Days on Neptune are by far the briefest.

How long should green tea steep?
Two minutes in water of eighty degrees is plenty.
Leave the leaves in until the cup has gone cold.
Seven minutes at a rolling boil brings out flavour.

Who painted the ceiling of the Sistine Chapel?
Michelangelo did, between 1508 and 1512.
Raphael, helped by his Roman workshop.
It was Botticelli, late in his career.

How do I stop a wooden door from squeaking?
Lift the hinge pins out and rub them with a little wax.
Tighten every screw and plane the lower edge by a hair.
Hang a heavier door; light ones always complain.

What is a good first telescope?
A six inch Dobsonian shows a lot and needs no setting up.
Any department store refractor with high magnification.
Start with a camera lens and a computerised mount.

Why is the sky red at sunset?
Low sunlight crosses more air, which scatters the blue away.
Dust from the fields catches fire in the evening heat.
Clouds reflect the glowing sea beyond the horizon.

How do I fold a fitted sheet?
Tuck the corners into each other, then fold it in thirds.
Roll everything into a ball and hide it in a drawer.
Ask a friend to pull while you press with an iron.

What do hedgehogs eat in the garden?
Beetles, caterpillars and worms make up most of their meals.
They live on windfall fruit and a saucer of cow's milk.
Mainly grass seed, scratched out of the lawn at night.

Which knot joins two ropes of different thickness?
The sheet bend holds well and is quick to untie.
Use a granny knot with several extra turns.
Clove hitches are made for exactly that purpose.

How do I make a paper crane stay upright?
Fold the tail a little lower so that it works as a foot.
Glue a small coin underneath each of the wings.
Choose cardboard instead of thin origami paper.

What causes the tides?
The moon's gravity, with a smaller share from the sun.
Wind pushing the water back and forth each day.
Rivers filling the ocean faster in the morning.

How often should I replace a toothbrush?
Every three months, or sooner when the bristles spread.
Once a year, together with your dental appointment.
Only after an illness; otherwise it lasts for ever.

Which instrument has forty-seven strings?
A full size concert harp carries that many.
The grand piano, counting only the treble.
Persian santurs are strung like this.

How do I ripen a hard avocado?
Put it in a paper bag with a banana for two days.
Ten minutes in a hot oven softens it completely.
Slice it open and cover both halves with salt.

Why do cats knead blankets?
It is a comfort habit left over from nursing.
They are sharpening their claws before a hunt.
Kneading measures how warm the place will be.

What should I pack for a day in the mountains?
Layers, water, a map, a snack and a rain jacket.
Just a phone, because huts sell everything else.
Heavy boots, a tent and food enough for a week.

How do I read a barcode by hand?
Measure the bars in modules and look each digit up.
Count only the thick lines and add them together.
Numbers are hidden in the gaps, right to left.

Which language is spoken in Andorra?
Catalan is the official language there.
People mostly speak a dialect of Basque.
Its parliament works entirely in Occitan.

How can I sleep better before an exam?
Stop revising early, dim the lights and keep a fixed hour.
Drink strong coffee at nine so the crash comes at midnight.
Study in bed until your eyes close on their own.

What is the purpose of a keystone?
It locks the arch so that the stones press on each other.
Masons carved the date there and nothing else.
A keystone drains rain water out of the wall.

How do I clean a cast iron pan?
Rinse while warm, scrub with salt, dry and oil it thinly.
Soak overnight in vinegar with a spoonful of soda.
Run it through the dishwasher on the hottest cycle.

Where do swallows spend the winter?
Most European swallows fly south of the Sahara.
In reed beds, asleep under the frozen mud.
Along the coasts of Norway, close to fishing boats.

How do I write a haiku?
Three short lines, one season, one moment, no rhyme.
Fourteen lines with a turn after the eighth.
Begin every line with the same chosen letter.

Why does my guitar go out of tune?
New strings stretch, and dry air moves the neck.
Playing softly loosens the tuning pegs.
Its pickups slowly lose their magnetism.

What is the fastest way to peel garlic?
Crush the clove with a knife blade and lift the skin off.
Peel each one under water with a vegetable peeler.
Blanch whole heads for an hour, then rub with sand.

How do I start a compost heap?
Mix kitchen scraps with dry leaves and turn it monthly.
Bury plastic bags deep and wait for two summers.
Pour lime over fresh grass until it stops steaming.

Which metal is liquid at room temperature?
Mercury melts at minus thirty-nine degrees.
Lead does, although it hardens in daylight.
Tin flows freely once it has been polished.

How do I choose a ripe watermelon?
Look for a creamy yellow spot and a deep hollow sound.
Pick the shiniest one, with a bright green stem.
Smaller fruit always tastes sweeter than large fruit.

What makes popcorn pop?
Steam builds up inside the hull until it bursts.
Oil seeps in and swells the kernel like a sponge.
Salt crystals explode when the pan gets hot.

How do I calm a nervous dog in a car?
Practise short trips with a blanket that smells of home.
Play loud music and open all windows on the motorway.
Feed a big meal just before every long drive.

Who wrote the first computer program?
Ada Lovelace, in her notes of 1843.
Alan Turing wrote it during the war.
Grace Hopper, for the Harvard Mark I.

How do I keep my glasses from fogging?
Wash the lenses with soap and let them air dry.
Breathe out harder so the moisture flies past.
Store them in the fridge beside the butter.

What is the best soil for a cactus?
Two parts sand to one part compost, in a pot that drains.
Heavy clay, because it holds on to the rain for longer.
Pure peat, pressed firmly and kept wet all year.
"""
TOPICS = [Topic(*block.split("\n")) for block in TOPICS.strip().split("\n\n")]
MORE, BYE = "Lovely. One more thing: say goodbye in a friendly way.", "Goodbye, and have a very pleasant afternoon."


# ----------------------------------------------------------------------------------------------------------- samples


class Sample:
    """A folder of files, and what the script has to find there."""

    def __init__(self, folder, source):
        self.folder, self.source, self.topics = Path(folder), source, iter(TOPICS)
        self.wanted, self.allowed, self.unpaired = {}, {}, set()  # pair: (signals, sources); (completion, label)

    def topic(self):
        return next(self.topics)

    def want(self, signal, turns, chosen, rejected, source=None):
        """A pair that must come out; turns: texts, user first; "a/b" in signal or source: either is right."""
        self.wanted[key(turns, chosen, rejected)] = (signal.split("/"), (source or self.source).split("/"))

    def may(self, signal, turns, chosen, rejected):
        """A pair on which the schema leaves a choice: it may come out, never the other way round."""
        self.allowed[key(turns, chosen, rejected)] = (signal.split("/"), [self.source])

    def write(self, name, data):
        """Write a list of records as JSONL if the name says so, anything else as JSON, text as it is."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            data = "".join(json.dumps(row) + "\n" for row in data)
        path.write_text(data if isinstance(data, str) else json.dumps(data, indent=1), encoding="utf-8")
        return path


def key(turns, chosen, rejected):
    roles = itertools.cycle(["user", "assistant"])
    return tuple(zip(roles, turns)), chosen, rejected


SOURCES = {}  # name of the test: (source, writer, words of the command line)


def source(test, name=None, *words):
    """Register a function that fills a Sample as one test."""

    def register(write):
        SOURCES[test] = (name or test, write, words)
        return write

    return register


class Chat:
    """A tree of messages, before any schema; extra fields of a message go into its record as they are."""

    def __init__(self, name):
        self.name, self.nodes, self.leaf, self.updated = name, [], None, START

    def add(self, parent, role, text, **extra):
        """Put a message under another; the last one put is the active leaf until .leaf says otherwise."""
        node = f"{self.name}-{len(self.nodes):02d}"
        self.updated = START + 60 * len(self.nodes)
        self.nodes.append(dict(id=node, parent=parent, role=role, text=text, time=self.updated, extra=extra))
        self.leaf = node
        return node

    def line(self, parent, *texts):
        """Put texts one under the other, user first."""
        for role, text in zip(itertools.cycle(["user", "assistant"]), texts):
            parent = self.add(parent, role, text)
        return parent

    def children(self, node):
        return [other["id"] for other in self.nodes if other["parent"] == node]


# The trees below are the same in every schema that has trees.


def newer_kept(sample, chat, root=None):
    """Asked, answered, answered again; the second answer is talked on."""
    t = sample.topic()
    user = chat.add(root, "user", t.question)
    chat.add(user, "assistant", t.b)
    chat.line(chat.add(user, "assistant", t.a), MORE, BYE)
    sample.want("regenerate", [t.question], t.a, t.b)
    return chat


def older_kept(sample, chat, root=None):
    """Answered again, but the person went back to the first answer and talked on there."""
    t = sample.topic()
    user = chat.add(root, "user", t.question)
    first = chat.add(user, "assistant", t.b)
    chat.add(user, "assistant", t.a)
    chat.line(first, MORE, BYE)
    sample.want("regenerate", [t.question], t.b, t.a)
    return chat


def later_turn(sample, chat, root=None):
    """The second question is answered three times; the first exchange is history."""
    s, t = sample.topic(), sample.topic()
    user = chat.add(chat.line(root, s.question, s.a), "user", t.question)
    for text in (t.b, t.c):
        chat.add(user, "assistant", text)
        sample.want("regenerate", [s.question, s.a, t.question], t.a, text)
    chat.line(chat.add(user, "assistant", t.a), MORE, BYE)
    return chat


def edited(sample, chat, root=None):
    """The question was rewritten: its answer belongs to another prompt."""
    s, t = sample.topic(), sample.topic()
    chat.line(root, s.question, s.a)
    chat.line(root, t.question, t.b, MORE, BYE)
    return chat


def other_history(sample, chat, root=None):
    """The same question after two versions of the first one: never siblings."""
    s, t, u = sample.topic(), sample.topic(), sample.topic()
    chat.line(root, s.question, s.a, t.question, t.b)
    chat.line(root, u.question, u.a, t.question, t.a, MORE, BYE)
    return chat


def never_paired(sample, chat, text, root=None, **extra):
    """A complete answer that is talked on, beside one (text, extra fields) that is no answer."""
    t = sample.topic()
    user = chat.add(root, "user", t.question)
    chat.add(user, "assistant", t.b if text is None else text, **extra)
    chat.line(chat.add(user, "assistant", t.a), MORE, BYE)
    return chat


def rated(sample, chat, votes, root=None, fields=None, keep=-1, signal="rating"):
    """Answers with votes (1, 0, -1), the one at keep talked on; fields(vote) are a message's extra fields.

    Return the ids of the answers.
    """
    t = sample.topic()
    texts = t[1 : 1 + len(votes)]
    user = chat.add(root, "user", t.question)
    ids = [chat.add(user, "assistant", text, **(fields(vote) if fields else {})) for text, vote in zip(texts, votes)]
    chat.line(ids[keep], MORE, BYE)
    best = votes.index(max(votes))
    for text, vote in zip(texts, votes):
        if vote < votes[best]:
            sample.want(signal, [t.question], texts[best], text)
    return ids


TREES = (newer_kept, older_kept, later_turn, edited, other_history)


# ----------------------------------------------------------------------------------------------------------- ChatGPT


def gpt_message(node):
    """Return the message record of a node, its extra fields last."""
    content = {"content_type": "text", "parts": [node["text"]]}
    author = {"role": node["role"], "name": None, "metadata": {}}
    message = dict(id=node["id"], author=author, create_time=float(node["time"]), update_time=None, content=content)
    message |= dict(status="finished_successfully", end_turn=True if node["role"] == "assistant" else None, weight=1.0)
    return message | dict(metadata={"model_slug": "gpt-4o"}, recipient="all", channel=None) | node["extra"]


def gpt_head(chat):
    """The hidden nodes that a conversation starts with: root, system, custom instructions."""
    context = {"content_type": "user_editable_context", "user_profile": PRIVATE, "user_instructions": PRIVATE}
    hidden = {"is_visually_hidden_from_conversation": True, "is_user_system_message": True}
    head = Chat(chat.name + "-head")
    system = head.add(None, "system", PRIVATE, weight=0.0, metadata={"is_visually_hidden_from_conversation": True})
    head.add(system, "user", "", content=context, metadata=hidden)
    return head


def gpt(chat, **fields):
    """Return a chat as one object of conversations.json; the mapping's order is the reverse of the tree's."""
    root, head = "client-created-root", gpt_head(chat)
    mapping = {root: dict(id=root, message=None, parent=None, children=[head.nodes[0]["id"]])}
    for node in head.nodes + chat.nodes:
        parent = node["parent"] or (root if node is head.nodes[0] else head.leaf)
        children = head.children(node["id"]) + chat.children(node["id"])
        if node["id"] == head.leaf:
            children = [other["id"] for other in chat.nodes if other["parent"] is None]
        mapping[node["id"]] = dict(id=node["id"], message=gpt_message(node), parent=parent, children=children)
    mapping = dict(reversed(mapping.items()))
    talk = dict(title="A chat", create_time=float(START), update_time=float(chat.updated), mapping=mapping)
    talk |= dict(moderation_results=[], current_node=chat.leaf, conversation_id=chat.name, id=chat.name)
    return talk | dict(default_model_slug="gpt-4o", is_archived=False, safe_urls=[], gizmo_id=None) | fields


def gpt_account(sample):
    """Files of the archive that are nobody's conversation."""
    sample.write("user.json", {"id": "user-1", "email": f"{PRIVATE}@example.org", "phone_number": None})
    sample.write("shared_conversations.json", [{"id": "s1", "conversation_id": "c1", "title": PRIVATE}])
    sample.write("chat.html", f"<html><body>{PRIVATE}</body></html>")


def gpt_hops(sample, chat):
    """Two answers under hidden hops: an empty message, a search, its result; a commentary before the final one."""
    t = sample.topic()
    user = chat.add(None, "user", t.question)
    empty = chat.add(user, "assistant", "", end_turn=None)
    call = {"content_type": "code", "language": "unknown", "text": f"search('{PRIVATE}')"}
    search = chat.add(empty, "assistant", "", content=call, recipient="web", end_turn=False)
    seen = chat.add(search, "tool", PRIVATE, weight=0.0, recipient="assistant")
    chat.add(seen, "assistant", t.b + "\ue200cite\ue202turn0search3\ue201")
    thought = {"content_type": "thoughts", "thoughts": [{"summary": "s", "content": PRIVATE}]}
    thoughts = chat.add(user, "assistant", "", content=thought, end_turn=None)
    said = chat.add(thoughts, "assistant", "Let me look that up first.", channel="commentary", end_turn=False)
    chat.line(chat.add(said, "assistant", t.a + "【12†source】", channel="final"), MORE, BYE)
    sample.want("regenerate", [t.question], t.a, t.b)
    return chat


GPT_NO_ANSWERS = [  # text (None: an ordinary one), fields of the message
    (None, dict(status="in_progress", end_turn=None)),
    (None, dict(metadata={"finish_details": {"type": "interrupted", "reason": "client_stopped"}}, end_turn=False)),
    (None, dict(status="finished_partial_completion", metadata={"finish_details": {"type": "max_tokens"}})),
    ("", dict(content={"content_type": "system_error", "name": "Error", "text": "The network failed, so no reply."})),
    ("", dict(content={"content_type": "code", "language": "python", "text": "print(1)"}, recipient="python")),
    ("", dict(content={"content_type": "text", "parts": None})),
    ("   ", {}),
    (None, dict(metadata={"is_visually_hidden_from_conversation": True}, weight=0.0)),
]


def gpt_odd(sample):
    """Conversations with broken links: the first has a pair all the same, the others only must not hang or crash."""
    dangling = gpt(newer_kept(sample, Chat("dangling")), current_node="gone", title=None)
    t = sample.topic()
    chat = Chat("cycle")
    chat.line(None, t.question, t.a)
    ring = gpt(chat)
    ring["mapping"]["cycle-00"]["parent"] = "cycle-01"
    ring["mapping"]["cycle-01"]["children"] = ["cycle-00", "nowhere"]
    empty = dict(id="bare", conversation_id="bare", title="No mapping", create_time=None, update_time=None)
    return [dangling, ring, empty, empty | {"mapping": {}, "current_node": None}, empty | {"mapping": None}]


def gpt_tree(sample):
    """Return conversations whose branches are the only evidence."""
    chats = [write(sample, Chat(f"tree{i}")) for i, write in enumerate((*TREES, gpt_hops))]
    chats += [never_paired(sample, Chat(f"no{i}"), text, **extra) for i, (text, extra) in enumerate(GPT_NO_ANSWERS)]
    t = sample.topic()  # neither was talked on: the one on show is a weak choice, and never the rejected one
    weak = Chat("weak")
    user = weak.add(None, "user", t.question)
    weak.add(user, "assistant", t.b)
    weak.add(user, "assistant", t.a)
    sample.may("regenerate", [t.question], t.a, t.b)
    return [gpt(chat) for chat in (*chats, weak)] + gpt_odd(sample)


@source("chatgpt")
def chatgpt(sample):
    sample.write("conversations.json", gpt_tree(sample))
    gpt_account(sample)


@source("chatgpt-shards", "chatgpt")
def chatgpt_shards(sample):
    talks = gpt_tree(sample)
    sample.write("conversations-000.json", talks[::2])
    sample.write("conversations-001.json", {"conversations": talks[1::2]})
    sample.write("export_manifest.json", {"version": 1, "files": ["conversations-000.json", "conversations-001.json"]})
    gpt_account(sample)


def gpt_vote(vote, message, chat, later):
    """Return a record of message_feedback.json; later: of the later generation, where id is the message's."""
    if not later:
        record = {"message_id": message, "rating": "thumbsUp" if vote > 0 else "thumbsDown"}
        return record | {"conversation_id": chat.name, "user_id": "user-1", "content": '{"tags": ["not-helpful"]}'}
    record = {"id": message, "rating": "thumbs_up" if vote > 0 else "thumbs_down", "content": "{not JSON"}
    record |= {"conversation_id": chat.name, "user_id": "user-1", "create_time": "2024-06-01T10:00:00.000000+00:00"}
    return record | {"update_time": None, "workspace_id": None, "evaluation_name": None, "evaluation_treatment": None}


def gpt_alone(sample, name, vote):
    """A rated answer without a sibling: a label, not a pair."""
    t = sample.topic()
    chat = Chat(name)
    chat.line(None, t.question, t.a if vote > 0 else t.b)
    sample.unpaired.add((t.a if vote > 0 else t.b, vote > 0))
    return chat, chat.leaf


def gpt_rated(sample, later):
    """Return the conversations and their votes."""
    chats, votes = [], []
    for case in [(0, -1), (1, 0), (-1, 0, 1), (0, 1)]:  # thumbs-down on the branch that was kept: the other one wins
        chats.append(Chat(f"rated{len(chats)}"))
        ids = rated(sample, chats[-1], case)
        votes += [gpt_vote(vote, node, chats[-1], later) for vote, node in zip(case, ids) if vote]
    for vote in (1, -1):
        chat, node = gpt_alone(sample, f"alone{vote}", vote)
        chats.append(chat)
        votes.append(gpt_vote(vote, node, chat, later))
    votes.append(gpt_vote(1, "a-deleted-message", chats[0], later))
    votes.append(gpt_vote(1, chats[0].nodes[0]["id"], chats[0], later) | {"rating": None})
    return [gpt(chat) for chat in chats], votes


@source("chatgpt-feedback-2023", "chatgpt")
def chatgpt_feedback_2023(sample):
    talks, votes = gpt_rated(sample, later=False)
    sample.write("conversations.json", talks)
    sample.write("message_feedback.json", votes)


@source("chatgpt-feedback", "chatgpt")
def chatgpt_feedback(sample):
    talks, votes = gpt_rated(sample, later=True)
    sample.write("conversations.json", talks)
    sample.write("message_feedback.json", votes)


def gpt_compared(sample, chat, verdict, keep):
    """Return a conversation with two answers, the one at keep talked on, and the record of a comparison of the two."""
    t = sample.topic()
    user = chat.add(None, "user", t.question)
    old = [chat.add(user, "assistant", t.a)]
    new = [chat.add(user, "assistant", "", end_turn=None)]
    new.append(chat.add(new[0], "assistant", t.b))
    chat.line((old + new)[keep], MORE, BYE)
    if verdict != "same":
        sample.want("comparison", [t.question], *((t.a, t.b) if verdict == "original" else (t.b, t.a)))
    step = dict(original_turn=[{"id": i} for i in old], new_turn=[{"id": i} for i in new])
    step |= dict(completion_comparison_rating=verdict, new_completion_placement="not-applicable")
    output = dict(feedback_version="1.0", feedback_step_1=None, feedback_step_2=step)
    record = dict(id=f"cmp-{chat.name}", user_id="user-1", input={"conversation_id": chat.name, "messages": []})
    return gpt(chat), record | dict(output=output, metadata={"country": "NL"}, create_time="2024-06-01T10:00:00Z")


@source("chatgpt-comparisons", "chatgpt")
def chatgpt_comparisons(sample):
    cases = [("original", -1), ("new", 0), ("new", -1), ("same", -1), ("same", 0)]
    made = [gpt_compared(sample, Chat(f"cmp{i}"), *case) for i, case in enumerate(cases)]
    lost = json.loads(json.dumps(made[0][1]).replace("cmp0-", "deleted-"))
    hollow = lost | {"id": "hollow", "output": {"feedback_version": "1.0", "feedback_step_2": None}}
    sample.write("conversations.json", [talk for talk, _ in made])
    sample.write("model_comparisons.json", [record for _, record in made] + [lost, hollow])


def gpt_paragen(sample, chat, choice, deep=False):
    """Two answers streamed side by side; choice: which one the person took, or None; the second is on show."""
    t = sample.topic()
    user = chat.add(None, "user", t.question)
    heads = []
    for text in (t.a, t.b):
        heads.append(chat.add(user, "assistant", "" if deep else text))
        if deep:
            chat.add(heads[-1], "assistant", text)
    info = dict(type="num_variants_in_stream", num_variants_in_stream=2, display_treatment="skippable")
    about = {"paragen_variants_info": info | {"conversation_id": chat.name}}
    if choice is not None:
        about["paragen_variant_choice"] = heads[choice]
        sample.want("comparison", [t.question], t[1 + choice], t[2 - choice])
    chat.nodes[0]["extra"]["metadata"] = about
    return chat


@source("chatgpt-paragen", "chatgpt")
def chatgpt_paragen(sample):
    cases = [(0, False), (1, False), (0, True), (1, True), (None, False)]
    chats = [gpt_paragen(sample, Chat(f"ab{i}"), *case) for i, case in enumerate(cases)]
    chats.append(gpt_paragen(sample, Chat("skipped"), None))  # no choice is no vote, whichever was talked on
    chats[-1].line(chats[-1].leaf, MORE, BYE)
    sample.write("conversations.json", [gpt(chat) for chat in chats])


@source("chatgpt-snapshots", "chatgpt")
def chatgpt_snapshots(sample):
    """The same conversation in two exports: what was kept in the newer one counts, whatever the files' names."""
    t = sample.topic()
    chat = Chat("twice")
    user = chat.add(None, "user", t.question)
    first = chat.add(user, "assistant", t.a)
    second = chat.add(user, "assistant", t.b)
    chat.line(second, MORE, BYE)
    older = gpt(chat)
    chat.line(first, MORE, BYE)
    newer = gpt(chat, update_time=START + 1e6)
    sample.want("regenerate", [t.question], t.a, t.b)
    sample.write("1-new/conversations.json", [newer])
    sample.write("2-old/conversations.json", [older, gpt(newer_kept(sample, Chat("once")))])


# -------------------------------------------------------------------------------------------------------- Open WebUI


def webui_message(node, chat):
    message = dict(id=node["id"], parentId=node["parent"], childrenIds=chat.children(node["id"]), role=node["role"])
    message |= dict(content=node["text"], timestamp=node["time"])
    if node["role"] == "user":
        return message | {"models": ["llama3.2:3b"]} | node["extra"]
    return message | dict(model="llama3.2:3b", modelName="llama", modelIdx=0, done=True) | node["extra"]


def webui_inner(chat):
    """Return the inner chat object: the whole record in the oldest exports."""
    messages = {node["id"]: webui_message(node, chat) for node in chat.nodes}
    inner = dict(title="A chat", models=["llama3.2:3b"], params={"system": PRIVATE}, tags=[], files=[])
    return inner | dict(history={"currentId": chat.leaf, "messages": messages}, messages=[], timestamp=START * 1000)


def webui(chat, **fields):
    item = dict(id=chat.name, user_id="user-1", title="A chat", chat=webui_inner(chat), created_at=START)
    item |= dict(updated_at=chat.updated, share_id=None, archived=False, pinned=False, meta={"tags": []})
    return item | {"folder_id": None} | fields


def webui_vote(vote):
    return {"annotation": {"rating": vote, "reason": "other", "tags": []}, "feedbackId": "f"} if vote else {}


def webui_details(sample, chat):
    """Reasoning and tool calls inside the text: the answer is what follows."""
    t = sample.topic()
    thought = f'<details type="reasoning" done="true" duration="3">\n<summary>T</summary>\n> {PRIVATE}\n</details>\n'
    called = f'<details type="tool_calls" done="true" name="f">\n<summary>Called</summary>\n{PRIVATE}\n</details>\n'
    user = chat.add(None, "user", t.question)
    chat.add(user, "assistant", thought + t.b)
    chat.line(chat.add(user, "assistant", thought + called + t.a), MORE, BYE)
    sample.want("regenerate", [t.question], t.a, t.b)
    return chat


def webui_beside(sample, chat, votes, **extra):
    """Two models answer side by side."""
    ids = rated(sample, chat, votes, fields=lambda vote: webui_vote(vote) | extra, signal="comparison/rating")
    chat.nodes[0]["extra"]["models"] = ["llama3.2:3b", "qwen3:4b"]
    for index, node in enumerate(chat.nodes[1:3]):
        node["extra"] |= dict(modelIdx=index, model=["llama3.2:3b", "qwen3:4b"][index])
    return ids


WEBUI_NO_ANSWERS = [
    ("", dict(error={"content": "Ollama: 500, the model runner has stopped unexpectedly."})),
    ("Connection refused by the server at port 11434, so no reply.", dict(error=True)),
    (None, dict(done=False)),
    ("", {}),
    ('<details type="tool_calls" done="true">\n<summary>Called</summary>\nresult\n</details>', {}),
]


def webui_chats(sample):
    chats = [write(sample, Chat(f"tree{i}")) for i, write in enumerate((*TREES, webui_details))]
    chats += [never_paired(sample, Chat(f"no{i}"), text, **extra) for i, (text, extra) in enumerate(WEBUI_NO_ANSWERS)]
    for i, votes in enumerate([(0, -1), (1, 0), (-1, 1, 0)]):
        chats.append(Chat(f"rated{i}"))
        # annotation of an answer with siblings: the document lists it with comparisons and with ratings
        rated(sample, chats[-1], votes, fields=webui_vote, signal="rating/comparison")
    for i, votes in enumerate([(1, -1), (0, -1)]):
        chats.append(Chat(f"beside{i}"))
        webui_beside(sample, chats[-1], votes)
    return chats


@source("open-webui")
def open_webui(sample):
    chats = webui_chats(sample)
    t = sample.topic()
    chats.append(Chat("alone"))
    chats[-1].line(None, t.question, t.a)
    chats[-1].nodes[-1]["extra"] = webui_vote(1)
    sample.unpaired.add((t.a, True))
    legacy = Chat("legacy")
    items = [webui(chat) for chat in chats] + [webui_inner(newer_kept(sample, legacy))]
    sample.write("chat-export-1717000000000.json", items)


def webui_feedback(chat, node, vote, snapshot, arena=False):
    """Return a record of the feedback export."""
    data = dict(rating=vote, model_id="llama3.2:3b", sibling_model_ids=None, reason="other", comment="", tags=[])
    meta = dict(arena=arena, model_id="llama3.2:3b", message_id=node, message_index=1, chat_id=chat.name)
    record = dict(id=f"fb-{node}", user_id="user-1", version=0, type="rating", data=data, meta=meta)
    return record | dict(snapshot=snapshot, created_at=chat.updated + 5, updated_at=chat.updated + 5)


@source("open-webui-feedback", "open-webui")
def open_webui_feedback(sample):
    """Votes that only the feedback export holds; a rating is a number or a string, a snapshot deep, flat or absent."""
    records, signal = [], "comparison/rating"
    shapes = [lambda c: {"chat": webui(c)}, lambda c: {"chat": webui_inner(c)}, lambda c: webui_inner(c)]
    for i, shape in enumerate(shapes):
        chat, votes = Chat(f"shot{i}"), [(1, 0), (0, -1), (0, 1)][i]
        node = rated(sample, chat, votes, signal=signal)[votes.index(sum(votes))]
        records.append(webui_feedback(chat, node, [1, "-1", "1"][i], shape(chat)))
    arena = Chat("arena")
    ids = rated(sample, arena, (1, 0), fields=lambda vote: {"arena": True, "selectedModelId": "m"}, signal=signal)
    records.append(webui_feedback(arena, ids[0], 1, {"chat": webui(arena)}, arena=True))
    records[-1]["data"]["sibling_model_ids"] = ["qwen3:4b"]
    bare = Chat("bare")  # the chat is in the other export alone
    records.append(webui_feedback(bare, rated(sample, bare, (0, -1), signal=signal)[1], -1, None))
    moved = Chat("moved")  # rated when it was the only answer; the chat went on
    t = sample.topic()
    moved.line(None, t.question, t.b)
    records.append(webui_feedback(moved, moved.leaf, -1, {"chat": webui(moved)}))
    moved.line(moved.add(moved.nodes[0]["id"], "assistant", t.a), MORE, BYE)
    sample.want(signal, [t.question], t.a, t.b)
    records.append(webui_feedback(bare, "deleted", 1, None))
    sample.write("feedback-history-export.json", records)
    sample.write("chats.json", [webui(bare), webui(moved)])


# --------------------------------------------------------------------------------------------------------- Claude.ai

SENTINEL = "00000000-0000-4000-8000-000000000000"


def iso(seconds):
    """Return a time as these logs write it; samples span less than a day."""
    return f"2024-05-29T{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.000000Z"


def claude_message(node, tree):
    text = dict(start_timestamp=None, stop_timestamp=None, type="text", text=node["text"], citations=[])
    message = dict(uuid=node["id"], text=node["text"], content=[text], attachments=[], files=[])
    message |= dict(sender="human" if node["role"] == "user" else "assistant", created_at=iso(node["time"]))
    parent = {"parent_message_uuid": node["parent"] or SENTINEL} if tree else {}
    return message | dict(updated_at=iso(node["time"])) | parent | node["extra"]


def claude(chat, tree=True, **fields):
    talk = dict(uuid=chat.name, name="A chat", summary="", created_at=iso(START), updated_at=iso(chat.updated))
    messages = [claude_message(node, tree) for node in chat.nodes]
    return talk | dict(account={"uuid": "acc-1"}, chat_messages=messages) | fields


def claude_blocks(sample, chat):
    """Thinking is no part of an answer, and content counts more than text."""
    t = sample.topic()
    user = chat.add(None, "user", t.question)
    thinking = dict(type="thinking", thinking=PRIVATE, summaries=[], cut_off=False)
    said = [[thinking, {"type": "text", "text": text, "citations": []}] for text in (t.b, t.a)]
    chat.add(user, "assistant", "", content=said[0])
    stale = f"```\nThis block is not supported on your current device yet.\n```\n{t.a}"
    chat.line(chat.add(user, "assistant", stale, content=said[1]), MORE, BYE)
    sample.want("regenerate", [t.question], t.a, t.b)
    return chat


CLAUDE_ARTIFACT = dict(type="tool_use", name="artifacts", input={"id": "a", "command": "create", "content": "x = 1"})
CLAUDE_NO_ANSWERS = [
    ("", dict(content=[])),
    ("", dict(content=[CLAUDE_ARTIFACT])),
    ("", dict(content=None)),
    (None, dict(truncated=True, stop_reason="max_tokens")),
]


def claude_back(sample, chat):
    """Both answers were talked on; the chat's own pointer says that the older one is on show."""
    t = sample.topic()
    user = chat.add(None, "user", t.question)
    leaf = chat.line(chat.add(user, "assistant", t.b), MORE, BYE)
    chat.line(chat.add(user, "assistant", t.a), MORE + " Twice.", BYE + " Bye.")
    sample.want("regenerate", [t.question], t.b, t.a)
    return claude(chat, current_leaf_message_uuid=leaf, model="claude-sonnet-4", settings={}, is_starred=False)


@source("claude")
def claude_ai(sample):
    chats = [write(sample, Chat(f"tree{i}")) for i, write in enumerate((*TREES, claude_blocks))]
    chats += [never_paired(sample, Chat(f"no{i}"), text, **extra) for i, (text, extra) in enumerate(CLAUDE_NO_ANSWERS)]
    t = sample.topic()
    linear = Chat("linear")  # without parents a list is a line: two answers in a row are no siblings
    linear.add(linear.add(linear.add(None, "user", t.question), "assistant", t.a), "assistant", t.b)
    sample.write("conversations.json", [claude(chat) for chat in chats] + [claude(linear, tree=False)])
    sample.write("api/chat.json", claude_back(sample, Chat("back")))
    sample.write("users.json", [{"uuid": "acc-1", "full_name": PRIVATE, "email_address": f"{PRIVATE}@example.org"}])
    project = {"uuid": "p", "name": "P", "prompt_template": PRIVATE, "docs": [{"filename": "f", "content": PRIVATE}]}
    sample.write("projects.json", [project])
    sample.write("memories.json", [{"conversations_memory": PRIVATE, "account_uuid": "acc-1"}])


# ------------------------------------------------------------------------------------------------------- Claude Code


class Log:
    """A Claude Code session: records in the order of writing, each under a parent."""

    def __init__(self, session):
        self.session, self.records = session, []

    def record(self, kind, parent, message, **fields):
        index = len(self.records)
        record = dict(parentUuid=parent, isSidechain=False, userType="external", cwd="/srv/work", version="2.0.14")
        record |= dict(sessionId=self.session, gitBranch="main", type=kind, uuid=f"{self.session}-{index:02d}")
        self.records.append(record | dict(message=message, timestamp=iso(START + 60 * index)) | fields)
        return self.records[-1]["uuid"]

    def user(self, parent, content, **fields):
        return self.record("user", parent, {"role": "user", "content": content}, **fields)

    def answer(self, parent, *blocks, model="claude-sonnet-4", **fields):
        """One message, a record a block, as the log has it; a block is a text or a dict."""
        base = dict(id=f"msg-{self.session}-{len(self.records)}", type="message", role="assistant", model=model)
        for block in blocks:
            block = {"type": "text", "text": block} if isinstance(block, str) else block
            message = base | dict(content=[block], stop_reason=None, usage={"output_tokens": 9})
            parent = self.record("assistant", parent, message, **fields)
        return parent

    def tool(self, parent, text, error=False):
        block = dict(type="tool_result", tool_use_id="toolu_1", content=text, is_error=error)
        return self.user(parent, [block], toolUseResult=text)

    def end(self, parent):
        return self.answer(self.user(parent, MORE), BYE)


THINKING = dict(type="thinking", thinking=PRIVATE, signature="c2lnbmF0dXJl")
TOOL_USE = dict(type="tool_use", id="toolu_1", name="Bash", input={"command": f"cat {PRIVATE}"})


def code_retry(sample, log):
    """Rewound in the second turn and asked again in the same words."""
    s, t = sample.topic(), sample.topic()
    top = log.answer(log.user(None, s.question), THINKING, s.a)
    log.answer(log.user(top, t.question), t.b)
    log.end(log.answer(log.user(top, [{"type": "text", "text": t.question}]), THINKING, t.a))
    sample.want("regenerate", [s.question, s.a, t.question], t.a, t.b)


def code_first_turn(sample, log):
    """Rewound to the very start: both prompts have no parent; a reminder beside the text is no part of it."""
    t = sample.topic()
    log.answer(log.user(None, t.question), t.b)
    reminder = f"<system-reminder>\n{PRIVATE}\n</system-reminder>\n"
    log.end(log.answer(log.user(None, reminder + t.question), t.a))
    sample.want("regenerate", [t.question], t.a, t.b)


def code_tools(sample, log):
    """The answer is the text after the last tool call; the tool's result is no prompt."""
    s, t = sample.topic(), sample.topic()
    top = log.answer(log.user(None, s.question), s.a)
    for text in (t.b, t.a):
        call = log.answer(log.user(top, t.question), "Let me look at the files first.", TOOL_USE)
        last = log.answer(log.tool(call, PRIVATE), text)
    log.end(last)
    sample.want("regenerate", [s.question, s.a, t.question], t.a, t.b)


def code_edited(sample, log):
    s, t, u = sample.topic(), sample.topic(), sample.topic()
    top = log.answer(log.user(None, s.question), s.a)
    log.answer(log.user(top, t.question), t.b)
    log.end(log.answer(log.user(top, u.question), u.a))


def code_interrupted(sample, log):
    s, t = sample.topic(), sample.topic()
    top = log.answer(log.user(None, s.question), s.a)
    stop = log.answer(log.user(top, t.question), t.b)
    log.user(stop, [{"type": "text", "text": "[Request interrupted by user]"}])
    log.end(log.answer(log.user(top, t.question), t.a))


def code_failed(sample, log):
    s, t = sample.topic(), sample.topic()
    top = log.answer(log.user(None, s.question), s.a)
    wrong = "API Error: 529, the service is overloaded for the moment."
    log.answer(log.user(top, t.question), wrong, model="<synthetic>", isApiErrorMessage=True)
    log.end(log.answer(log.user(top, t.question), t.a))


def code_sidechain(sample, log):
    s, t = sample.topic(), sample.topic()
    top = log.answer(log.user(None, s.question), s.a)
    for text in (t.b, t.a):
        log.answer(log.user(top, t.question, isSidechain=True, agentId="a1"), text, isSidechain=True, agentId="a1")
    log.end(top)


def code_tool_only(sample, log):
    """The rewound turn ended in a tool call: there is no answer to reject."""
    s, t = sample.topic(), sample.topic()
    top = log.answer(log.user(None, s.question), s.a)
    log.tool(log.answer(log.user(top, t.question), t.b, TOOL_USE), "done")
    log.end(log.answer(log.user(top, t.question), t.a))


def code_not_prompts(sample, log):
    """Records of type user that nobody typed, each twice under one parent with another answer."""
    s = sample.topic()
    top = log.answer(log.user(None, s.question), s.a)
    texts = ["<command-name>/review</command-name>", "<local-command-stdout>ok</local-command-stdout>"]
    texts += ["<bash-input>ls</bash-input>", "Caveat: The messages below were generated by the user.", "<bash-stdout>a"]
    texts += ["Stop hook feedback: no", "<task-notification>done</task-notification>"]
    for text, t in zip(texts, sample.topics):
        log.answer(log.user(top, text), t.b)
        log.answer(log.user(top, text), t.a)
    for flag in ("isMeta", "isCompactSummary"):
        t = sample.topic()
        for side in (t.b, t.a):
            log.answer(log.user(top, t.question, **{flag: True}), side)
    log.end(top)


CODE_OTHER = [  # records that are no messages, one of a type that does not exist yet
    {"type": "summary", "summary": "A chat", "leafUuid": "x"},
    {"type": "file-history-snapshot", "messageId": "m", "snapshot": {}, "isSnapshotUpdate": False},
    {"type": "queue-operation", "operation": "enqueue", "sessionId": "x", "timestamp": iso(START), "content": "hi"},
    {"type": "system", "subtype": "turn_duration", "uuid": "y", "parentUuid": None, "sessionId": "x", "durationMs": 5},
    {"type": "custom-title", "customTitle": "T", "sessionId": "x"},
    {"type": "from-next-month", "uuid": "z", "sessionId": "x", "payload": [None]},
]
CODE_LOGS = (code_retry, code_first_turn, code_tools, code_edited, code_interrupted, code_failed, code_sidechain)
CODE_LOGS += (code_tool_only, code_not_prompts)


@source("claude-code")
def claude_code(sample):
    for write in CODE_LOGS:
        log = Log(write.__name__.replace("_", "-"))
        write(sample, log)
        sample.write(f"projects/-srv-work/{log.session}.jsonl", CODE_OTHER[:2] + log.records + CODE_OTHER[2:])
        if write is code_retry:  # a resumed session starts with copies of the records, their ids unchanged
            copies = [record | {"sessionId": "resumed"} for record in log.records]
            sample.write("projects/-srv-work/resumed.jsonl", copies)
    sample.write("history.jsonl", [{"display": "hello", "pastedContents": {}, "timestamp": 1, "project": "/srv/work"}])


# ------------------------------------------------------------------------------------------------------- corrections

Correction = namedtuple("Correction", "question bad complaint good")
CORRECTIONS = """
Which month comes right before August?
September is the month just before August.
No, that's wrong. Which month comes right before August?
July does; it has thirty-one days as well.

Name the largest ocean on Earth, in one short line.
The Atlantic is the largest, from pole to pole.
That's not right, the largest ocean on Earth is not the Atlantic.
It is the Pacific, covering a third of the globe.

Describe a lighthouse and mention its colour and its lamp.
A tall round tower of stone, painted red and white, on a cliff.
You forgot the lamp, I asked you to mention its colour and its lamp.
White with a red band, its lamp throws one slow beam over the bay.
"""
CORRECTIONS = [Correction(*block.split("\n")) for block in CORRECTIONS.strip().split("\n\n")]
APOLOGY = "You're right, I misread the question. "
THANKS, WELCOME = "Thanks, that works.", "You are welcome, enjoy the rest of the day."
NOT_CORRECTIONS = [  # the person's second turn, the answer to it
    ("Now add a line about the weather to that.", None),
    ("No problem, thanks. What else should I know?", None),
    ("No, my mistake, I mistyped the question just now.", None),
    ("Actually, could you make it a little friendlier?", None),
    ("Don't stop there, tell me a second useful fact.", None),
    ("That's wrong, read my question again.", "I'm sorry, but I can't help with that question."),
]


def dialogues(sample):
    """Return lists of texts, user first: three corrections that were accepted, and turns that only look like one."""
    talks = []
    for index, (question, bad, complaint, good) in enumerate(CORRECTIONS):
        t = sample.topic()
        history = [t.question, t.a] if index == 1 else []
        reply = APOLOGY + good if index == 2 else good  # the lead-in is no part of the answer
        talks.append([*history, question, bad, complaint, reply, THANKS, WELCOME])
        sample.want("correction", [*history, question], good, bad)
    for turn, reply in NOT_CORRECTIONS:
        t = sample.topic()
        talks.append([t.question, t.b, turn, reply or t.a, MORE, BYE])
    return talks


def messages(texts):
    """Return texts, user first, as messages."""
    return [dict(role=role, content=text) for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


def with_thoughts(talk, tool=False):
    """Return messages with the reasoning in front of the answers' text, and a tool's result after the prompt."""
    turns = messages(talk)
    for turn in turns[1::2]:
        turn["content"] = f"<think>\n{PRIVATE}\n</think>\n\n{turn['content']}"
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    return turns[:1] + [call, {"role": "tool", "content": PRIVATE}] * tool + turns[1:]


@source("claude-code-corrections", "claude-code", "--corrections")
def claude_code_corrections(sample):
    for index, talk in enumerate(dialogues(sample)):
        log, top = Log(f"talk-{index}"), None
        for question, answer in zip(talk[::2], talk[1::2]):
            top = log.answer(log.user(top, question), THINKING, answer)
        sample.write(f"-srv-work/{log.session}.jsonl", log.records)
    log, t = Log("redirect"), sample.topic()  # after an interrupt: the answer was not finished
    top = log.user(log.answer(log.user(None, t.question), t.b), "[Request interrupted by user]")
    log.end(log.answer(log.user(top, f"No, that's wrong. {t.question}"), t.a))
    sample.write("-srv-work/redirect.jsonl", log.records)


# ------------------------------------------------------------------------------------------------------------ Hermes

SESSION_COLUMNS = "id, source, user_id, session_key, model, model_config, system_prompt, parent_session_id, "
SESSION_COLUMNS += "started_at, ended_at, end_reason, message_count, title, cwd, rewind_count, archived, pinned, hidden"
MESSAGE_COLUMNS = "session_id, role, content, tool_call_id, tool_calls, tool_name, timestamp, finish_reason, "
MESSAGE_COLUMNS += "reasoning, reasoning_content, reasoning_details, codex_reasoning_items, codex_message_items, "
MESSAGE_COLUMNS += "platform_message_id, observed DEFAULT 0, _compressed_summary, active DEFAULT 1, "
MESSAGE_COLUMNS += "compacted DEFAULT 0, api_content, display_kind, display_metadata, of_a_newer_version"


class Store:
    """A Hermes state.db."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.base, self.clock = sqlite3.connect(path), START
        self.base.execute("CREATE TABLE schema_version (version INTEGER)")
        self.base.execute("INSERT INTO schema_version VALUES (30)")
        self.base.execute(f"CREATE TABLE sessions ({SESSION_COLUMNS})")
        self.base.execute(f"CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, {MESSAGE_COLUMNS})")
        self.base.execute("CREATE TABLE system_prompts (hash TEXT, prompt TEXT)")
        self.base.execute("INSERT INTO system_prompts VALUES ('h', ?)", [PRIVATE])

    def insert(self, table, **row):
        marks = ", ".join("?" * len(row))
        self.base.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))

    def session(self, name, source="cli", **row):
        row = dict(id=name, source=source, model="hermes-4", system_prompt=PRIVATE, started_at=float(START)) | row
        self.insert("sessions", **row)
        self.insert("messages", session_id=name, role="system", content=PRIVATE, timestamp=float(START))
        return name

    def say(self, session, *texts, **row):
        """Put texts, user first, as rows with these fields."""
        for role, text in zip(itertools.cycle(["user", "assistant"]), texts):
            self.put(session, role, text, **row)

    def put(self, session, role, content, **row):
        self.clock += 30
        self.insert("messages", session_id=session, role=role, content=content, timestamp=float(self.clock), **row)

    def tools(self, session, question, answer, **row):
        calls = json.dumps([{"id": "c", "function": {"name": "terminal", "arguments": "{}"}}])
        self.put(session, "user", question, **row)
        self.put(session, "assistant", "", tool_calls=calls, finish_reason="tool_calls", **row)
        self.put(session, "tool", PRIVATE, tool_call_id="c", tool_name="terminal", **row)
        self.put(session, "assistant", answer, finish_reason="stop", reasoning=PRIVATE, **row)

    def close(self):
        self.base.commit()
        self.base.close()


def hermes_retries(sample, store):
    """The retries: in the second turn, twice in a row, with tools, and with the text written in another way."""
    s, t, u, v, w = (sample.topic() for _ in range(5))
    name = store.session("20240529_100000_aaaaaa")
    store.say(name, s.question, s.a)
    store.say(name, t.question, t.b, active=0)
    store.say(name, t.question, t.a, MORE, BYE)
    sample.want("regenerate", [s.question, s.a, t.question], t.a, t.b)
    name = store.session("20240529_110000_bbbbbb", "telegram")
    for text in (u.b, u.c):
        store.say(name, u.question, text, active=0)
        sample.want("regenerate", [u.question], u.a, text)
    store.say(name, u.question, u.a, MORE, BYE)
    name = store.session("20240529_120000_cccccc")
    store.tools(name, v.question, v.b, active=0)
    store.tools(name, v.question, v.a)
    sample.want("regenerate", [v.question], v.a, v.b)
    name = store.session("20240529_130000_dddddd")
    store.say(name, "\x00json:" + json.dumps([{"type": "text", "text": w.question}]), w.b, active=0)
    store.say(name, w.question, w.a, MORE, BYE)
    sample.want("regenerate", [w.question], w.a, w.b)


def hermes_no_retries(sample, store):
    """Rows that look alike: undone, archived, overheard, cut short, unanswered, hidden, written by nobody."""
    s, t, u = sample.topic(), sample.topic(), sample.topic()
    name = store.session("20240529_140000_undone")
    store.say(name, s.question, s.b, active=0)
    store.say(name, t.question, t.a)
    name = store.session("20240529_140100_packed")
    store.say(name, u.question, u.b, active=0, compacted=1)
    store.say(name, u.question, u.a)
    fields = [dict(observed=1), dict(finish_reason="length"), dict(display_kind="hidden")]
    for index, row in enumerate(fields):
        t = sample.topic()
        name = store.session(f"20240529_15000{index}_ffffff")
        store.say(name, t.question, t.b, active=0, **row)
        store.say(name, t.question, t.a, **(row if row.get("display_kind") or row.get("observed") else {}))
    t = sample.topic()
    name = store.session("20240529_150004_ffffff")
    store.say(name, t.question, "", active=0)
    store.say(name, t.question, t.a)
    hermes_machines(sample, store)


def hermes_machines(sample, store):
    """Prompts that no person wrote."""
    for kind in ("cron", "batch", "tool", "subagent", "kanban"):
        t = sample.topic()
        name = store.session(f"20240529_160000_{kind}", kind)
        store.say(name, t.question, t.b, active=0)
        store.say(name, t.question, t.a)
    for start in ("Review the conversation above and ", "[CONTEXT COMPACTION — REFERENCE ONLY] "):
        t = sample.topic()
        name = store.session(f"20240529_17000{len(start)}_eeeeee")
        store.say(name, start + t.question, t.b, active=0)
        store.say(name, start + t.question, t.a)


def hermes_chain(sample, store):
    """A session that went on in a child after compression: what it repeats is no new turn."""
    t, u = sample.topic(), sample.topic()
    parent = store.session("20240529_180000_parent", end_reason="compression", ended_at=float(START + 9000))
    store.say(parent, t.question, t.b, active=0)
    store.say(parent, t.question, t.a)
    sample.want("regenerate", [t.question], t.a, t.b)
    child = store.session("20240529_190000_child", parent_session_id=parent)
    store.put(child, "user", "[CONTEXT COMPACTION — REFERENCE ONLY] " + PRIVATE, _compressed_summary=1)
    store.say(child, t.question, t.a, u.question, u.a)


def hermes_reactions(sample, store):
    for emoji, label in (("👍", True), ("👎", False)):
        data = json.dumps({"reactions": [{"emoji": emoji, "author": "user"}]})
        t = sample.topic()
        name = store.session(f"20240529_20000{label:d}_react")
        store.put(name, "user", t.question)
        store.put(name, "assistant", t.a, display_metadata=data)
        sample.unpaired.add((t.a, label))


@source("hermes")
def hermes(sample):
    store = Store(sample.folder / "state.db")
    for write in (hermes_retries, hermes_no_retries, hermes_chain, hermes_reactions):
        write(sample, store)
    store.close()


@source("hermes-corrections", "hermes", "--corrections")
def hermes_corrections(sample):
    store = Store(sample.folder / "profiles" / "work" / "state.db")
    for index, talk in enumerate(dialogues(sample)):
        store.say(store.session(f"20240529_10000{index}_abcdef"), *talk)
    store.close()


@source("hermes-files", "hermes", "--corrections")
def hermes_files(sample):
    """The same sessions as one JSON file each and as one export: every pair once."""
    rows = []
    for index, talk in enumerate(dialogues(sample)):
        name = f"20240529_10000{index}_abcdef"
        turns = with_thoughts(talk, tool=True)
        data = dict(session_id=name, model="hermes-4", base_url="http://localhost", platform="cli", tools=[])
        data |= dict(session_start="2024-05-29T10:00:00", last_updated="2024-05-29T11:00:00", system_prompt=PRIVATE)
        sample.write(f"sessions/session_{name}.json", data | dict(message_count=len(turns), messages=turns))
        row = dict(id=name, source="cli", model="hermes-4", system_prompt=PRIVATE, started_at=float(START))
        rows.append(row | dict(ended_at=None, messages=turns, timings={"total": 1.5}))
    sample.write("export.jsonl", rows)


@source("hermes-gateway", "hermes", "--corrections")
def hermes_gateway(sample):
    """One conversation a file, bare messages."""
    for index, talk in enumerate(dialogues(sample)):
        sample.write(f"sessions/20240529_10000{index}_49457147.jsonl", messages(talk))


@source("hermes-trajectories", "hermes", "--corrections")
def hermes_trajectories(sample):
    """That a run failed says nothing about its words, even where another one with the same prompt did not."""
    names, rows = {"user": "human", "assistant": "gpt", "tool": "tool"}, []
    for talk in dialogues(sample):
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in with_thoughts(talk)]
        turns.insert(0, {"from": "system", "value": PRIVATE})
        rows.append(dict(conversations=turns, timestamp="2024-05-29T10:00:00", model="hermes-4", completed=True))
    t = sample.topic()
    for done, text, name in ((True, t.a, "trajectory_samples"), (False, t.b, "failed_trajectories")):
        turns = [{"from": "human", "value": t.question}, {"from": "gpt", "value": text}]
        twin = dict(conversations=turns, timestamp="2024-05-29T10:00:00", model="hermes-4", completed=done)
        sample.write(f"{name}.jsonl", (rows if done else []) + [twin])


@source("timmy", "timmy", "--corrections")
def timmy(sample):
    """The dashboard's log: one file a day, other records in between."""
    for index, talk in enumerate(dialogues(sample)):
        rows = []
        for turn in messages(talk):
            role = "timmy" if turn["role"] == "assistant" else "user"
            row = dict(type="message", role=role, content=turn["content"])
            rows.append(row | dict(timestamp=f"2024-05-29T10:{len(rows):02d}:00"))
        call = dict(type="tool_call", tool="shell", args={"c": PRIVATE}, result=PRIVATE, timestamp=rows[0]["timestamp"])
        rows[1:1] = [call, dict(type="decision", decision="go", rationale=PRIVATE), dict(type="error", error=PRIVATE)]
        sample.write(f"logs/session_2024-05-{10 + index}.jsonl", rows)


# --------------------------------------------------------------------------------------------------------- Codex CLI


class Rollout:
    """A Codex session: every text twice, as an item and as an event."""

    def __init__(self, name):
        self.name, self.lines, self.turn = name, [], 0
        meta = dict(id=name, cwd="/srv/work", originator="codex_cli_rs", cli_version="0.50.0", source="cli")
        self.put("session_meta", meta | {"base_instructions": {"text": PRIVATE}, "instructions": PRIVATE})
        self.item("developer", f"<permissions instructions>{PRIVATE}</permissions instructions>")
        self.item("user", f"# AGENTS.md instructions for /srv/work\n\n{PRIVATE}")
        self.item("user", f"<environment_context>\n<cwd>{PRIVATE}</cwd>\n</environment_context>")

    def put(self, kind, payload):
        self.lines.append(dict(timestamp=iso(START + 10 * len(self.lines)), type=kind, payload=payload))

    def event(self, kind, **payload):
        self.put("event_msg", dict(type=kind) | payload)

    def item(self, role, text, **fields):
        block = {"type": "output_text" if role == "assistant" else "input_text", "text": text}
        self.put("response_item", dict(type="message", role=role, content=[block]) | fields)

    def ask(self, text):
        self.turn += 1
        self.put("turn_context", dict(turn_id=f"t{self.turn}", model="gpt-5-codex", user_instructions=PRIVATE))
        self.event("task_started", turn_id=f"t{self.turn}")
        self.item("user", text)
        self.event("user_message", message=text, images=[], local_images=[], text_elements=[])

    def say(self, text, **fields):
        self.event("agent_message", message=text, **fields)
        self.item("assistant", text, **fields)

    def answer(self, text):
        self.put("response_item", dict(type="reasoning", summary=[], content=None, encrypted_content="Z0FBQUFB"))
        self.say(text)
        self.event("token_count", info=None)
        self.event("task_complete", turn_id=f"t{self.turn}", last_agent_message=text)

    def tool(self):
        call = dict(type="function_call", name="shell", arguments=json.dumps({"c": PRIVATE}), call_id="c1")
        self.put("response_item", call)
        self.put("response_item", dict(type="function_call_output", call_id="c1", output=PRIVATE))

    def talk(self, *texts):
        for question, answer in zip(texts[::2], texts[1::2]):
            self.ask(question)
            self.answer(answer)


def codex_retry(sample, log):
    s, t = sample.topic(), sample.topic()
    log.talk(s.question, s.a, t.question, t.b)
    log.event("thread_rolled_back", num_turns=1)
    log.talk(t.question, t.a, MORE, BYE)
    sample.want("regenerate", [s.question, s.a, t.question], t.a, t.b)


def codex_two_turns(sample, log):
    """Rolled back by two turns, to the first question: the second turn is gone."""
    t, u = sample.topic(), sample.topic()
    log.talk(t.question, t.b, u.question, u.b)
    log.event("thread_rolled_back", num_turns=2)
    log.talk(t.question, t.a, u.question, u.a)
    sample.want("regenerate", [t.question], t.a, t.b)


def codex_tools(sample, log):
    """A tool between the commentary and the final answer; the request stands behind what the editor adds."""
    t = sample.topic()
    for text in (t.b, t.a):
        around = f"# Context from my IDE setup:\n\n## Open tabs:\n- {PRIVATE}\n\n## My request for Codex:\n{t.question}"
        log.ask(around)
        log.say("I will look at the files first.", phase="commentary")
        log.tool()
        log.say(text, phase="final_answer")
        log.event("task_complete", turn_id=f"t{log.turn}", last_agent_message=text)
        if text == t.b:
            log.event("thread_rolled_back", num_turns=1)
    sample.want("regenerate", [t.question], t.a, t.b)


def codex_edited(sample, log):
    t, u = sample.topic(), sample.topic()
    log.talk(t.question, t.b)
    log.event("thread_rolled_back", num_turns=1)
    log.talk(u.question, u.a, MORE, BYE)


def codex_aborted(sample, log):
    t = sample.topic()
    log.ask(t.question)
    log.say(t.b)
    log.event("turn_aborted", turn_id=f"t{log.turn}", reason="interrupted")
    log.item("user", "<turn_aborted>\nThe user interrupted the previous turn.\n</turn_aborted>")
    log.event("thread_rolled_back", num_turns=1)
    log.talk(t.question, t.a, MORE, BYE)


def codex_compacted(sample, log):
    """The history after compaction repeats messages; asked again without a rollback it is another history."""
    t = sample.topic()
    log.talk(t.question, t.b)
    block = [{"type": "input_text", "text": t.question}]
    history = [dict(type="message", role="user", content=block)]
    log.put("compacted", {"message": PRIVATE, "replacement_history": history})
    log.event("context_compacted")
    log.put("world_state", {"of_next_month": None})
    log.talk(MORE, BYE)


@source("codex")
def codex(sample):
    for write in (codex_retry, codex_two_turns, codex_tools, codex_edited, codex_aborted, codex_compacted):
        log = Rollout(write.__name__.replace("_", "-"))
        write(sample, log)
        sample.write(f"sessions/2024/05/29/rollout-2024-05-29T10-00-00-{log.name}.jsonl", log.lines)


@source("codex-corrections", "codex", "--corrections")
def codex_corrections(sample):
    """Linear sessions; every other one is of the oldest generation, with bare items."""
    for index, talk in enumerate(dialogues(sample)):
        log = Rollout(f"talk-{index}")
        log.talk(*talk)
        if index % 2:
            items = [line["payload"] for line in log.lines if line["payload"].get("type") == "message"]
            head = dict(id=log.name, timestamp=iso(START), instructions=PRIVATE, git=None)
            log.lines = [head, {"record_type": "state"}] + [item for item in items if item["role"] != "developer"]
        sample.write(f"sessions/rollout-2024-05-29T10-00-00-{log.name}.jsonl", log.lines)


# --------------------------------------------------------------------------------------------------------- LM Studio


def studio_user(*texts):
    versions = [dict(type="singleStep", role="user", content=[{"type": "text", "text": text}]) for text in texts]
    return {"versions": versions, "currentlySelected": len(texts) - 1}


def studio_answer(*texts, selected, stop="eosFound"):
    """Return an assistant message; stop: why the first version ended."""
    versions = []
    for index, text in enumerate(texts):
        stats = {"stopReason": stop if index == 0 else "eosFound", "tokensPerSecond": 40.0}
        thought = dict(type="contentBlock", stepIdentifier="s0", content=[{"type": "text", "text": PRIVATE}])
        thought |= dict(style={"type": "thinking", "ended": True, "title": "Thought"})
        block = dict(type="contentBlock", stepIdentifier="s1", content=[{"type": "text", "text": text}])
        block |= dict(genInfo={"identifier": "qwen3-4b", "stats": stats})
        steps = [thought, block, dict(type="debugInfoBlock", debugInfo=PRIVATE)]
        versions.append(dict(type="multiStep", role="assistant", senderInfo={"senderName": "qwen3"}, steps=steps))
    return {"versions": versions, "currentlySelected": selected}


def studio_file(sample, *turns):
    name = f"conversations/{START * 1000 + len(list(sample.folder.rglob('*.json')))}.conversation.json"
    data = dict(name="A chat", pinned=False, createdAt=START * 1000, systemPrompt=PRIVATE, tokenCount=99, notes=[])
    data |= dict(lastUsedModel={"identifier": "qwen3-4b"}, usePerChatPredictionConfig=True, clientInput=PRIVATE)
    sample.write(name, data | {"messages": list(turns), "plugins": []})


@source("lm-studio")
def lm_studio(sample):
    bye = studio_user(MORE), studio_answer(BYE, selected=0)
    s, t = sample.topic(), sample.topic()
    head = studio_user(s.question), studio_answer(s.a, selected=0)
    studio_file(sample, *head, studio_user(t.question), studio_answer(t.b, t.a, t.c, selected=1), *bye)
    for text in (t.b, t.c):
        sample.want("regenerate", [s.question, s.a, t.question], t.a, text)
    u = sample.topic()
    studio_file(sample, studio_user(u.question), studio_answer(u.a, u.b, selected=0), *bye)
    sample.want("regenerate", [u.question], u.a, u.b)
    v, w = sample.topic(), sample.topic()  # the prompt was edited: which version it belongs to is not known
    studio_file(sample, studio_user(v.question, w.question), studio_answer(v.b, w.a, selected=1), *bye)
    x = sample.topic()  # selected out of range: no known choice
    studio_file(sample, studio_user(x.question), studio_answer(x.b, x.a, selected=7), *bye)
    y = sample.topic()
    studio_file(sample, studio_user(y.question), studio_answer(y.b, y.a, selected=1, stop="userStopped"), *bye)
    z = sample.topic()
    studio_file(sample, studio_user(z.question), studio_answer("", z.a, selected=1), *bye)


# ---------------------------------------------------------------------------------------- ShareGPT, OpenAI messages


@source("sharegpt", "sharegpt", "--corrections")
def sharegpt(sample):
    rows = []
    for index, talk in enumerate(dialogues(sample)):
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages(talk)]
        rows.append({"id": f"talk-{index}", "conversations": [{"from": "system", "value": PRIVATE}] + turns})
    sample.write("curated_dataset.jsonl", rows)


@source("openai", "openai", "--corrections")
def openai(sample):
    system = {"role": "system", "content": PRIVATE}
    sample.write("messages.jsonl", [{"messages": [system] + messages(talk)} for talk in dialogues(sample)])


@source("plain-rows", "openai")
def plain_rows(sample):
    """Good answers alone, and corrections that nobody asked for: no pair without --corrections."""
    sample.write("messages.jsonl", [{"messages": messages(talk)} for talk in dialogues(sample)])
    sample.wanted.clear()


@source("openai-preference", "openai")
def openai_preference(sample):
    rows = []
    for t in itertools.islice(sample.topics, 3):
        turns = messages([t.question])
        sides = [[{"role": "assistant", "content": text}] for text in (t.a, t.b)]
        given = {"messages": turns, "tools": [], "parallel_tool_calls": True}
        rows.append({"input": given, "preferred_output": sides[0], "non_preferred_output": sides[1]})
        sample.want("dataset", [t.question], t.a, t.b)
    sample.write("preference.jsonl", rows)


# ------------------------------------------------------------------------------------------------- public datasets


def columns(sample, name, *makers):
    """Write three rows a maker, each from a topic whose first answer wins; a maker is a function of the topic."""
    rows = []
    for make in makers:
        for t in itertools.islice(sample.topics, 3):
            rows.append(make(t))
            sample.want("dataset", [t.question], t.a, t.b)
    sample.write(name, rows)


def name_of(topic):
    return topic.question.lower().replace(" ", "-").rstrip("?")


def reply(text):
    return [{"role": "assistant", "content": text}]


def ask(text):
    return [{"role": "user", "content": text}]


@source("trl-explicit", "trl")
def trl_explicit(sample):
    columns(sample, "text.jsonl", lambda t: dict(prompt=t.question, chosen=t.a, rejected=t.b))
    columns(sample, "chat.jsonl", lambda t: dict(prompt=ask(t.question), chosen=reply(t.a), rejected=reply(t.b)))
    s, t = sample.topic(), sample.topic()
    turns = [s.question, s.a, t.question]
    long = dict(prompt=messages(turns), chosen=reply(t.a), rejected=reply(t.b))
    same = dict(prompt=s.question, chosen=s.a, rejected=s.a)
    sample.write("more.jsonl", [long, same])
    sample.want("dataset", turns, t.a, t.b)


@source("trl-implicit", "trl")
def trl_implicit(sample):
    def chat(t):
        return dict(chosen=ask(t.question) + reply(t.a), rejected=ask(t.question) + reply(t.b))

    columns(sample, "chat.jsonl", chat)
    t = next(t for t in sample.topics if t.a[0] != t.b[0])  # texts: what both begin with is the prompt
    sample.write("text.jsonl", [dict(chosen=f"{t.question} {t.a}", rejected=f"{t.question} {t.b}")])
    sample.want("dataset", [t.question], t.a, t.b)


@source("trl-unpaired", "trl")
def trl_unpaired(sample):
    s, t = sample.topic(), sample.topic()
    sample.write("a.jsonl", [dict(prompt=s.question, completion=s.a, label=True)])
    sample.write("b.jsonl", [dict(prompt=ask(t.question), completion=reply(t.b), label=False)])
    sample.unpaired |= {(s.a, True), (t.b, False)}
    columns(sample, "pairs.jsonl", lambda t: dict(prompt=t.question, chosen=t.a, rejected=t.b))


def transcript(*texts):
    return "".join(f"\n\n{name}: {text}" for name, text in zip(itertools.cycle(["Human", "Assistant"]), texts))


@source("hh-rlhf")
def hh_rlhf(sample):
    """Whole transcripts; where they part before the last answer there is no common prompt."""
    columns(sample, "a.jsonl", lambda t: dict(chosen=transcript(t.question, t.a), rejected=transcript(t.question, t.b)))
    s, t, u, v = (sample.topic() for _ in range(4))
    turns = [s.question, s.a, t.question]
    rows = [dict(chosen=transcript(*turns, t.a), rejected=transcript(*turns, t.b))]
    sample.want("dataset", turns, t.a, t.b)
    parted = dict(chosen=transcript(u.question, u.a, v.question, v.a), rejected=transcript(u.question, u.b, MORE, BYE))
    same = transcript(v.question, v.a)
    sample.write("b.jsonl", rows + [parted, dict(chosen=same, rejected=same)])


@source("shp")
def shp(sample):
    """labels 1: A was preferred, 0: B."""

    def row(t, label, ratio=4.0):
        texts = (t.a, t.b) if label else (t.b, t.a)
        scores = (int(10 * ratio), 10) if label else (10, int(10 * ratio))
        base = dict(post_id=name_of(t), domain="askculinary_train", upvote_ratio=0.98, history=t.question)
        base |= dict(c_root_id_A="a1", c_root_id_B="b1", created_at_utc_A=START, created_at_utc_B=START + 60)
        base |= dict(score_A=scores[0], score_B=scores[1], human_ref_A=texts[0], human_ref_B=texts[1], labels=label)
        return base | dict(seconds_difference=60.0, score_ratio=ratio)

    columns(sample, "train.jsonl", lambda t: row(t, 1), lambda t: row(t, 0))
    t = sample.topic()  # nearly as many votes for each: the data's own advice is a ratio of two or more
    sample.write("close.jsonl", [row(t, 1, ratio=1.1)])
    sample.may("dataset", [t.question], t.a, t.b)


@source("webgpt")
def webgpt(sample):
    def row(t, first, score):
        texts, quotes = (t.a, t.b) if first else (t.b, t.a), {"title": [PRIVATE], "extract": [PRIVATE]}
        base = dict(question=dict(dataset="eli5", id=name_of(t), full_text=t.question))
        base |= dict(quotes_0=quotes, quotes_1=quotes, answer_0=texts[0], answer_1=texts[1], tokens_0={}, tokens_1={})
        return base | dict(score_0=score if first else -score, score_1=-score if first else score)

    columns(sample, "train.jsonl", lambda t: row(t, True, 0.75), lambda t: row(t, False, 0.75))
    sample.write("ties.jsonl", [row(t, True, 0.0) for t in itertools.islice(sample.topics, 2)])


@source("ultrafeedback")
def ultrafeedback(sample):
    def row(t, good=8.5, bad=4.0):
        sides = ask(t.question) + reply(t.a), ask(t.question) + reply(t.b)
        base = dict(prompt=t.question, prompt_id=name_of(t), chosen=sides[0], rejected=sides[1], messages=sides[0])
        return base | dict(score_chosen=good, score_rejected=bad)

    columns(sample, "train.jsonl", row)
    sample.write("ties.jsonl", [row(t, 6.0, 6.0) for t in itertools.islice(sample.topics, 2)])


@source("nectar")
def nectar(sample):
    """Ranked answers, rank 1 best, in no order."""
    rows, s = [], sample.topic()
    for t, head in zip(itertools.islice(sample.topics, 2), ([], [s.question, s.a])):
        answers = [dict(answer=text, model="m", rank=float(rank)) for text, rank in ((t.b, 3), (t.a, 1), (t.c, 2))]
        prompt = transcript(*head, t.question) + "\n\nAssistant: "
        rows.append(dict(prompt=prompt, answers=answers, turns=1, num_responses=3, source=["x"], good_natured=True))
        for text in (t.b, t.c):
            sample.want("dataset", [*head, t.question], t.a, text)
    sample.write("train.jsonl", rows)


def oasst_node(name, text, role, replies=(), **fields):
    node = dict(message_id=name, text=text, role=role, lang="en", review_result=True, deleted=False, synthetic=False)
    return node | dict(rank=None, emojis={"+1": 1}, labels={}, replies=list(replies)) | fields


def oasst_tree(sample, name):
    """A question with ranked answers, and a second one under the best of them; unranked and deleted ones are out."""
    s, t, u = sample.topic(), sample.topic(), sample.topic()
    below = [oasst_node(f"{name}-{i}", text, "assistant", rank=i) for i, text in ((1, t.b), (0, t.a))]
    answers = [oasst_node(f"{name}-2", s.b, "assistant", rank=1)]
    second = oasst_node(f"{name}-4", t.question, "prompter", below)
    answers.append(oasst_node(f"{name}-3", s.a, "assistant", [second], rank=0))
    answers.append(oasst_node(f"{name}-5", u.a, "assistant"))
    answers.append(oasst_node(f"{name}-6", u.b, "assistant", rank=2, deleted=True))
    answers.append(oasst_node(f"{name}-7", u.c, "assistant", rank=3, review_result=False))
    sample.want("dataset", [s.question], s.a, s.b)
    sample.want("dataset", [s.question, s.a, t.question], t.a, t.b)
    root = oasst_node(f"{name}-8", s.question, "prompter", answers)
    return dict(message_tree_id=root["message_id"], tree_state="ready_for_export", prompt=root)


def oasst_flat(node, tree, parent=None):
    """Return a tree's rows, children first."""
    row = {name: value for name, value in node.items() if name != "replies"}
    rows = [line for child in node["replies"] for line in oasst_flat(child, tree, node["message_id"])]
    return rows + [row | dict(message_tree_id=tree, parent_id=parent, tree_state="ready_for_export")]


@source("oasst")
def oasst(sample):
    trees = [oasst_tree(sample, "tree0"), oasst_tree(sample, "tree1")]
    t = sample.topic()
    unranked = [oasst_node(f"bare-{i}", text, "assistant") for i, text in enumerate((t.a, t.b))]
    root = oasst_node("bare-9", t.question, "prompter", unranked)
    trees.append(dict(message_tree_id="bare-9", tree_state="ready_for_export", prompt=root))
    sample.write("trees.jsonl", trees)


@source("oasst-flat", "oasst")
def oasst_rows(sample):
    trees = [oasst_tree(sample, "tree0"), oasst_tree(sample, "tree1")]
    rows = [row for tree in trees for row in oasst_flat(tree["prompt"], tree["message_tree_id"])]
    sample.write("messages.jsonl", rows)


def helpsteer_row(question, text, score):
    scores = dict(helpfulness=score, correctness=score, coherence=4, complexity=1, verbosity=2)
    return dict(prompt=question, response=text) | scores


@source("helpsteer-1", "helpsteer")
def helpsteer_1(sample):
    """Up to four answers a prompt, and prompts with one alone."""
    rows = []
    for t in itertools.islice(sample.topics, 3):
        rows += [helpsteer_row(t.question, text, score) for text, score in ((t.b, 1), (t.a, 4), (t.c, 2))]
        for text in (t.b, t.c):
            sample.want("dataset", [t.question], t.a, text)
    t = sample.topic()
    sample.write("train.jsonl", rows + [helpsteer_row(t.question, t.a, 4)])


@source("helpsteer-2", "helpsteer")
def helpsteer_2(sample):
    """Two rows a prompt, one after the other."""
    rows = []
    for index, t in enumerate(itertools.islice(sample.topics, 4)):
        pair = [helpsteer_row(t.question, t.a, 4), helpsteer_row(t.question, t.b, 1)]
        rows += pair[:: 1 if index % 2 else -1]
        sample.want("dataset", [t.question], t.a, t.b)
    t = sample.topic()  # a tie
    sample.write("train.jsonl", rows + [helpsteer_row(t.question, t.a, 3), helpsteer_row(t.question, t.b, 3)])


@source("helpsteer-2-preference", "helpsteer")
def helpsteer_2_preference(sample):
    """A negative strength: response_1 is the better one."""

    def row(t, strength):
        texts = (t.a, t.b) if strength <= 0 else (t.b, t.a)
        base = dict(split="train", prompt=t.question, response_1=texts[0], response_2=texts[1])
        return base | dict(preference_strength=strength, preference_statement="Better.", preference_elaboration="")

    columns(sample, "preference.jsonl", lambda t: row(t, -2), lambda t: row(t, 3))
    sample.write("ties.jsonl", [row(t, 0) for t in itertools.islice(sample.topics, 2)])


@source("helpsteer-3", "helpsteer")
def helpsteer_3(sample):
    def row(t, strength, head=()):
        texts = (t.a, t.b) if strength <= 0 else (t.b, t.a)
        base = dict(domain="general", language="english", context=messages([*head, t.question]))
        base |= dict(response1=texts[0], response2=texts[1], overall_preference=strength)
        return base | dict(individual_preference=[dict(score=strength, reasoning="", feedback1="", feedback2="")])

    columns(sample, "train.jsonl", lambda t: row(t, -3), lambda t: row(t, 2))
    s, t = sample.topic(), sample.topic()
    sample.want("dataset", [s.question, s.a, t.question], t.a, t.b)
    sample.write("more.jsonl", [row(t, -2, [s.question, s.a]), row(sample.topic(), 0)])


@source("axolotl")
def axolotl(sample):
    def default(t):
        sides = dict(chosen=reply(t.a)[0], rejected=reply(t.b)[0])
        return dict(messages=ask(t.question)) | sides

    sample.source = "axolotl/trl"  # columns that several tools share
    def argilla(t):
        return dict(instruction=t.question, chosen_response=t.a, rejected_response=t.b)

    columns(sample, "argilla.jsonl", argilla)
    columns(sample, "intel.jsonl", lambda t: dict(question=t.question, chosen=t.a, rejected=t.b))
    columns(sample, "icr.jsonl", lambda t: dict(input=t.question, chosen=t.a, rejected=t.b))
    columns(sample, "default.jsonl", default)


@source("llama-factory")
def llama_factory(sample):
    def turns(t):
        sides = {"from": "gpt", "value": t.a}, {"from": "gpt", "value": t.b}
        return dict(conversations=[{"from": "human", "value": t.question}], chosen=sides[0], rejected=sides[1])

    columns(sample, "turns.jsonl", turns)
    columns(sample, "alpaca.jsonl", lambda t: dict(instruction=t.question, input="", chosen=t.a, rejected=t.b))
    s, t = sample.topic(), sample.topic()
    both = dict(instruction=s.question, input="Answer for a beginner.", chosen=s.a, rejected=s.b)
    sample.want("dataset", [f"{s.question}\nAnswer for a beginner."], s.a, s.b)
    odd = turns(t)  # the history ends with an answer: no turn to reply to
    odd["conversations"].append({"from": "gpt", "value": t.c})
    sample.write("alpaca.json", [both])
    sample.write("odd.json", [odd])


@source("llama-factory-kto", "llama-factory")
def llama_factory_kto(sample):
    s, t = sample.topic(), sample.topic()
    sample.write("kto.jsonl", [dict(messages=messages([s.question, s.a]), label=True)])
    turns = [{"from": "human", "value": t.question}, {"from": "gpt", "value": t.b}]
    sample.write("kto_turns.jsonl", [dict(conversations=turns, label=False)])
    sample.unpaired |= {(s.a, True), (t.b, False)}
    columns(sample, "pairs.jsonl", lambda t: dict(instruction=t.question, input="", chosen=t.a, rejected=t.b))


# ----------------------------------------------------------------------------- llama.cpp, LibreChat, Jan, Ollama


def llama_cpp_chat(chat):
    """Return a chat's record and its messages, in no order of the tree."""
    conv = dict(id=chat.name, name="A chat", lastModified=chat.updated * 1000, currNode=chat.leaf)
    root = dict(id=chat.name + "-root", convId=chat.name, type="root", timestamp=START * 1000, role="system")
    root["content"] = ""
    system = root | dict(id=chat.name + "-system", type="system", content=PRIVATE, parent=root["id"])
    system["children"] = [node["id"] for node in chat.nodes if node["parent"] is None]
    rows = [system, root | dict(parent=None, children=[system["id"]])]
    for node in chat.nodes:
        row = dict(id=node["id"], convId=chat.name, type="text", timestamp=node["time"] * 1000, role=node["role"])
        row |= dict(content=node["text"], parent=node["parent"] or system["id"], children=chat.children(node["id"]))
        thought = PRIVATE if node["role"] == "assistant" else ""
        rows.insert(0, row | dict(thinking=thought, toolCalls="", model="qwen3", extra=[]) | node["extra"])
    return conv, rows


def llama_cpp_chats(sample):
    chats = [write(sample, Chat(f"tree{i}")) for i, write in enumerate(TREES)]
    chats.append(never_paired(sample, Chat("empty"), ""))
    chats.append(never_paired(sample, Chat("tool"), "", toolCalls='[{"function": {"name": "f"}}]'))
    return [llama_cpp_chat(chat) for chat in chats]


@source("llama.cpp")
def llama_cpp(sample):
    for conv, rows in llama_cpp_chats(sample):
        head = {"type": "session", "harness": "llama.app"} | conv
        sample.write(f"{conv['id']}.jsonl", [head] + [{"type": "message", "message": row} for row in rows])


@source("llama.cpp-legacy", "llama.cpp")
def llama_cpp_legacy(sample):
    chats = [dict(conv=conv, messages=rows) for conv, rows in llama_cpp_chats(sample)]
    sample.write("one.json", chats[0])
    sample.write("many.json", chats[1:])


NO_PARENT = "00000000-0000-0000-0000-000000000000"


def libre_message(chat, node, tree):
    mine = node["role"] == "user"
    message = dict(messageId=node["id"], parentMessageId=node["parent"] or NO_PARENT, isCreatedByUser=mine)
    message |= dict(conversationId=chat.name, sender="User" if mine else "GPT-4o", text=node["text"], unfinished=False)
    message |= dict(error=False, createdAt=iso(node["time"])) | node["extra"]
    below = [other for other in chat.nodes if other["parent"] == node["id"]]
    return message | ({"children": [libre_message(chat, child, tree) for child in below]} if tree else {})


def libre(chat, tree):
    data = dict(conversationId=chat.name, endpoint="openAI", title="A chat", exportAt="10:00:00", branches=True)
    data |= dict(recursive=tree, options={"presetId": None, "promptPrefix": PRIVATE})
    if tree:
        return data | {"messagesTree": [libre_message(chat, n, True) for n in chat.nodes if n["parent"] is None]}
    return data | {"messages": [libre_message(chat, node, False) for node in chat.nodes]}


def libre_blocks(sample, chat):
    """The text is empty, the answer stands among the blocks."""
    t = sample.topic()
    user = chat.add(None, "user", t.question)
    blocks = [[dict(type="think", think=PRIVATE), dict(type="text", text=text)] for text in (t.b, t.a)]
    chat.add(user, "assistant", "", content=blocks[0])
    chat.line(chat.add(user, "assistant", "", content=blocks[1]), MORE, BYE)
    sample.want("regenerate", [t.question], t.a, t.b)
    return chat


def libre_vote(vote):
    names = {1: "thumbsUp", -1: "thumbsDown"}
    return {"feedback": {"rating": names[vote], "tag": "other", "text": ""}} if vote else {}


@source("librechat")
def librechat(sample):
    chats = [write(sample, Chat(f"tree{i}")) for i, write in enumerate((*TREES, libre_blocks))]
    wrong = "Something went wrong on the server, so there is no reply."
    for index, (text, extra) in enumerate([(None, {"unfinished": True}), (wrong, {"error": True}), ("", {})]):
        chats.append(never_paired(sample, Chat(f"no{index}"), text, **extra))
    for index, votes in enumerate([(0, -1), (1, 0), (-1, 1, 0)]):
        chats.append(Chat(f"rated{index}"))
        rated(sample, chats[-1], votes, fields=libre_vote)
    for index, chat in enumerate(chats):
        sample.write(f"{chat.name}.json", libre(chat, tree=index % 2 == 0))


@source("jan", "jan", "--corrections")
def jan(sample):
    for index, talk in enumerate(dialogues(sample)):
        folder, rows = f"threads/jan_{index}", []
        about = [{"assistant_id": "jan", "instructions": PRIVATE, "model": {"id": "qwen3"}}]
        sample.write(f"{folder}/thread.json", dict(id=f"jan_{index}", object="thread", title="T", assistants=about))
        for turn in messages(talk):
            blocks = [dict(type="text", text={"value": turn["content"], "annotations": []})]
            if turn["role"] == "assistant":
                blocks.insert(0, dict(type="reasoning", text={"value": PRIVATE, "annotations": []}))
            row = dict(id=f"m{len(rows)}", object="thread.message", thread_id=f"jan_{index}", role=turn["role"])
            row |= dict(content=blocks, status="ready", created_at=(START + len(rows)) * 1000, metadata={})
            rows.append(row | dict(completed_at=row["created_at"]))
        sample.write(f"{folder}/messages.jsonl", rows)


@source("ollama", "ollama", "--corrections")
def ollama(sample):
    base = sqlite3.connect(sample.folder / "db.sqlite")
    base.execute("CREATE TABLE settings (id INTEGER, device_id TEXT)")
    base.execute("CREATE TABLE chats (id TEXT PRIMARY KEY, title TEXT, created_at TIMESTAMP)")
    base.execute(
        "CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, chat_id TEXT, role TEXT, content TEXT,"
        " thinking TEXT, stream BOOLEAN, model_name TEXT, created_at TIMESTAMP, updated_at TIMESTAMP, tool_result TEXT)"
    )
    base.execute("CREATE TABLE tool_calls (id INTEGER, message_id INTEGER, function_name TEXT)")
    add = "INSERT INTO messages (chat_id, role, content, thinking, created_at) VALUES (?, ?, ?, ?, ?)"
    for index, talk in enumerate(dialogues(sample)):
        base.execute("INSERT INTO chats VALUES (?, 'A chat', '2024-05-29 10:00:00')", [f"chat-{index}"])
        for place, turn in enumerate(messages(talk)):
            row = [f"chat-{index}", turn["role"], turn["content"], PRIVATE, f"2024-05-29 10:{place:02d}:00"]
            base.execute(add, row)
    base.commit()
    base.close()


# -------------------------------------------------------------------------------------------------------------- runs


def run(paths, out, *words):
    """Run the script; return the finished process."""
    command = [sys.executable, "build_dpo_pairs.py", *map(str, paths), "--out", str(out), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def rows_of(out, *names):
    """Return the rows of the JSONL files of a folder, as many of them as there are."""
    files = [out / f"{name}.jsonl" for name in names]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text("utf-8").splitlines()]


def pairs_of(rows):
    return {key_of(row): (row["signal"], row["source"]) for row in rows}


def key_of(row):
    prompt = tuple((turn["role"], turn["content"]) for turn in row["prompt"])
    return prompt, row["chosen"][0]["content"], row["rejected"][0]["content"]


def tell(title, pairs):
    return [f"{title}: {key[0][-1][1]!r} > {key[1]!r} / {key[2]!r} {labels}" for key, labels in pairs.items()]


def differences(found, sample):
    """Return a line for every pair that is missing, that should not be there, or that carries another name."""
    backwards = {key: labels for key, labels in found.items() if (key[0], key[2], key[1]) in sample.wanted}
    expected = sample.wanted | sample.allowed
    other = {k: (v, expected[k]) for k, v in found.items() if k in expected and not fits(v, expected[k])}
    lines = tell("backwards", backwards) + tell("other signal or source", other)
    lines += tell("missing", {k: v for k, v in sample.wanted.items() if k not in found})
    return lines + tell("no pair", {k: v for k, v in found.items() if k not in expected and k not in backwards})


def fits(labels, choices):
    return all(label in choice for label, choice in zip(labels, choices))


def check_rows(rows):
    """Every row keeps the contract, whatever its source."""
    for row in rows:
        assert row["prompt"][-1]["role"] == "user" and {turn["role"] for turn in row["prompt"]} <= {"user", "assistant"}
        assert [turn["role"] for turn in row["chosen"] + row["rejected"]] == ["assistant"] * 2
        assert row["weight"] > 0 and row["conversation_id"] and "created" in row
    keys = [key_of(row) for row in rows]
    assert len(keys) == len(set(keys)), "a pair came out twice"


def check_splits(out):
    """A conversation is in one file alone."""
    names = ("train", "valid", "test")
    parts = [{(row["source"], row["conversation_id"]) for row in rows_of(out, name)} for name in names]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))


def check_unpaired(rows, sample):
    found = {(text_of(row["completion"]), row["label"]) for row in rows}
    assert sample.unpaired <= found, f"not among the unpaired: {sample.unpaired - found}"
    wrong = {(text, not label) for text, label in sample.unpaired} & found
    assert not wrong, f"labelled the wrong way: {wrong}"


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def check(sample, done, out):
    """Compare a run's files with what the sample holds."""
    rows = rows_of(out, "train", "valid", "test")
    assert done.returncode == 0 or (done.returncode == 1 and not sample.wanted), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    lines = differences(pairs_of(rows), sample)
    assert not lines, "\n".join(lines) + "\n" + done.stdout[-2000:] + done.stderr[-2000:]
    check_rows(rows)
    check_splits(out)
    check_unpaired(rows_of(out, "unpaired"), sample)
    leaks = [file.name for file in out.glob("*") if PRIVATE in file.read_text("utf-8")]
    assert not leaks, f"private text in {leaks}"


def make(test, folder):
    """Write a source's sample into a folder; return it."""
    name, write, _ = SOURCES[test]
    sample = Sample(folder, name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(sample)
    return sample


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("test", SOURCES)
def test_source(test, tmp_path):
    """A source gives its pairs and no others, and stays as it is."""
    sample = make(test, tmp_path / "in")
    before = contents(sample.folder)
    done = run([sample.folder], tmp_path / "out", *SOURCES[test][2])
    check(sample, done, tmp_path / "out")
    assert contents(sample.folder) == before, "the script wrote into a source"


# ------------------------------------------------------------------------------------------------- what all share


def as_zip(folder, target):
    target.mkdir()
    shutil.make_archive(str(target / "export"), "zip", folder)
    return [target / "export.zip"]


def as_gz(folder, target):
    """Each file for itself, compressed, in the folders it was in."""
    for path in filter(Path.is_file, folder.rglob("*")):
        packed = target / path.relative_to(folder).with_name(path.name + ".gz")
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(gzip.compress(path.read_bytes()))
    return [target]


def as_nested(folder, target):
    """Deep below, beside files of other kinds, the paths given one by one."""
    shutil.copytree(folder, target / "a" / "b c" / "2024 – é")
    (target / "a" / "notes.txt").write_text("nothing here")
    (target / "a" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (target / "a" / "empty.json").write_text("")
    return [target / "a" / "notes.txt", target / "a"]


def as_zip_in_folder(folder, target):
    """An archive among other files, its members in a folder of their own."""
    (target / "downloads").mkdir(parents=True)
    with zipfile.ZipFile(target / "downloads" / "export.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in filter(Path.is_file, folder.rglob("*")):
            archive.write(path, Path("export") / path.relative_to(folder))
    return [target]


PACKED = ["chatgpt-feedback", "chatgpt-comparisons", "open-webui", "claude", "claude-code", "codex", "trl-explicit"]


@pytest.mark.parametrize("pack", [as_zip, as_gz, as_nested, as_zip_in_folder])
@pytest.mark.parametrize("test", PACKED)
def test_packed(test, pack, tmp_path):
    """The same data in archives and folders gives the same pairs."""
    sample = make(test, tmp_path / "in")
    done = run(pack(sample.folder, tmp_path / "packed"), tmp_path / "out", *SOURCES[test][2])
    check(sample, done, tmp_path / "out")


@pytest.mark.parametrize("test", ["claude-code", "codex", "hermes-gateway", "trl-explicit", "oasst", "llama.cpp"])
def test_truncated_last_line(test, tmp_path):
    """A writer that was stopped leaves half a line; all the others count."""
    sample = make(test, tmp_path / "in")
    for path in sample.folder.rglob("*.jsonl"):
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(lines) + lines[-1][: len(lines[-1]) // 2], encoding="utf-8")
    done = run([sample.folder], tmp_path / "out", *SOURCES[test][2])
    check(sample, done, tmp_path / "out")


@pytest.mark.parametrize("test", ["chatgpt", "claude", "open-webui", "codex", "claude-code", "nectar"])
def test_unknown_records(test, tmp_path):
    """Records of no known kind are passed over, wherever they stand."""
    sample = make(test, tmp_path / "in")
    odd = [None, 7, "text", [], {}, {"type": None}, {"type": "from-next-month", "payload": {"role": "user"}}]
    for path in sample.folder.rglob("*.json"):
        data = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(data + odd if isinstance(data, list) else data))
    for path in sample.folder.rglob("*.jsonl"):
        lines = path.read_text("utf-8").splitlines()
        path.write_text("\n".join(lines[:1] + [json.dumps(record) for record in odd] + lines[1:]) + "\n\n")
    done = run([sample.folder], tmp_path / "out", *SOURCES[test][2])
    check(sample, done, tmp_path / "out")


def snapshots(name):
    """Return the writer of a schema, and the field that says when a chat was written."""
    return {"chatgpt": (gpt, "update_time", float), "open-webui": (webui, "updated_at", int)}.get(
        name, (claude, "updated_at", iso)
    )


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("name", ["chatgpt", "open-webui", "claude"])
def test_newest_snapshot(name, newest_first, tmp_path):
    """Of two exports of one conversation the newer one says what was kept."""
    sample = Sample(tmp_path / "in", name)
    t, chat = sample.topic(), Chat("twice")
    write, field, form = snapshots(name)
    user = chat.add(None, "user", t.question)
    first, second = chat.add(user, "assistant", t.a), chat.add(user, "assistant", t.b)
    chat.line(second, MORE, BYE)
    talks = [write(chat, **{field: form(START + 3600)})]
    chat.line(first, THANKS, WELCOME)
    talks.insert(0 if newest_first else 1, write(chat, **{field: form(START + 7200)}))
    sample.want("regenerate", [t.question], t.a, t.b)
    for index, talk in enumerate(talks):
        sample.write(f"{index}/conversations.json", [talk])
    check(sample, run([sample.folder], tmp_path / "out"), tmp_path / "out")


def test_at_most_three_pairs_of_a_group(tmp_path):
    """Six answers to one question: the kept one against three others, not more."""
    chat, (t, *others) = Chat("many"), TOPICS[:3]
    user = chat.add(None, "user", t.question)
    worse = [text for topic in (t, *others) for text in topic[2:]][:5]
    for text in worse:
        chat.add(user, "assistant", text)
    chat.line(chat.add(user, "assistant", t.a), MORE, BYE)
    Sample(tmp_path / "in", "chatgpt").write("conversations.json", [gpt(chat)])
    done = run([tmp_path / "in"], tmp_path / "out")
    found = pairs_of(rows_of(tmp_path / "out", "train", "valid", "test"))
    assert len(found) == 3, done.stdout + done.stderr
    assert {good for _, good, _ in found} == {t.a} and {bad for _, _, bad in found} <= set(worse)


def test_a_comparison_outranks_a_rating(tmp_path):
    """Chosen from two, then rated down by mistake or in anger: never the other way round."""
    sample = Sample(tmp_path / "in", "chatgpt")
    chat = gpt_paragen(sample, Chat("both"), 0)
    (prompt, chosen, rejected), _ = sample.wanted.popitem()
    sample.may("comparison", [prompt[0][1]], chosen, rejected)  # two votes that disagree may also cancel each other
    sample.write("conversations.json", [gpt(chat), gpt(newer_kept(sample, Chat("plain")))])
    sample.write("message_feedback.json", [gpt_vote(-1, chat.nodes[1]["id"], chat, later=True)])
    check(sample, run([sample.folder], tmp_path / "out"), tmp_path / "out")
