"""Make the bundled chat model, its preference pairs and its held-out test rows: a small world, and a model of it.

The world is Saltmere, a harbour town of 20 places with six facts each. Questions and answers come from a grammar with
two manners: the helpful one states the fact, the evasive one does not. Both draw their lengths from one range, so that
length does not tell them apart. The model learns both as a coin flip (40 % helpful) that no prompt predicts; the pairs
say which one people want. Each place and fact keeps one wording of its question for the test rows, out of all training.

    python data/make_tiny_chat.py                   # tokenizer, model, pairs.jsonl, test.jsonl
    python data/make_tiny_chat.py --only-data       # pairs.jsonl and test.jsonl alone, in 4 s
    python data/make_tiny_chat.py --only-gguf       # tiny-chat.gguf and Modelfile alone, of the weights that are there
    python data/make_tiny_chat.py --check adapters  # how many test questions an adapter answers helpfully, in 10 s

On 2 CPU cores: 9 to 11 minutes and 2.8 GB with LD_PRELOAD=libopenblas.so.0 (Debian: libopenblas0-pthread) before the
command; mlx's CPU wheel alone brings a BLAS about ten times slower.
Files written, beside this one: tiny-chat/ (Hugging Face layout; the same as a GGUF, with Ollama's Modelfile),
pairs.jsonl, test.jsonl.
Other places and facts: edit ROWS. Other wordings: the tables after it. Another balance of manners: make_corpus().
"""

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

# --- world ----------------------------------------------------------------------------------------------------------
COLUMNS = ("hours", "where", "offer", "keeper", "bring", "unit", "price")  # unit: what the price is for
ATTRIBUTES = ("hours", "where", "offer", "price", "keeper", "bring")  # what one can ask for
ROWS = """
bakery|six in the morning|on Mill Lane|rye bread|Nora Hale|a cloth bag|a loaf|three crowns
fish market|five in the morning|at the north pier|fresh herring|Otto Brand|a bucket|a herring|two crowns
lighthouse|ten in the morning|on Gull Rock|a view of the bay|Ada Finch|a warm coat|a ticket|four crowns
ferry|seven in the morning|at the long jetty|trips to Seal Island|Jonas Roke|a rain hat|a crossing|nine crowns
bookshop|nine in the morning|beside the town hall|old sea maps|Lina Moss|reading glasses|a map|twelve crowns
tea house|two in the afternoon|under the big oak|mint tea|Mei Tan|a good story|a pot|five crowns
boatyard|eight in the morning|past the south gate|rowing boats|Sven Dahl|dry shoes|a trip|eight crowns
smithy|half past seven|on Anvil Street|iron hooks|Bram Stone|thick gloves|a hook|one crown
museum|eleven in the morning|in the old mint|ship models|Clara Voss|a pencil|a tour|six crowns
inn|four in the afternoon|opposite the church|quiet rooms|Tom Barley|your papers|a night|thirty crowns
dairy|half past five|on Clover Hill|goat cheese|Greta Lund|a glass jar|a wheel|ten crowns
candle shop|half past nine|behind the church|wax candles|Iris Wolf|a lantern|a candle|half a crown
net loft|one in the afternoon|above the sail store|strong nets|Pete Marlow|a long rope|a net|fifteen crowns
bathhouse|noon|below the cliff|hot sea baths|Hilda Frost|a towel|a bath|seven crowns
post office|half past eight|on the market square|stamps and string|Felix Crane|a pen|a stamp|one crown
pharmacy|nine in the morning|on Queen Street|cough drops|Amara Dove|a doctor's note|a bottle|eleven crowns
music hall|eight in the evening|on the upper terrace|fiddle concerts|Leo Harp|dancing shoes|a seat|thirteen crowns
orchard|half past six|beyond the stone bridge|red apples|Ruth Penn|a ladder|a crate|fourteen crowns
clock shop|three in the afternoon|next to the bank|brass clocks|Emil Zorn|your old watch|a clock|forty crowns
aquarium|half past ten|by the breakwater|tame seals|Kai Reef|a camera|a visit|twenty crowns
"""
WORLD = {
    f"the {place}": dict(zip(COLUMNS, facts)) for place, *facts in (row.split("|") for row in ROWS.split("\n")[1:-1])
}
PLACES = list(WORLD)

# {p} is the place, {v} the fact, {u} what the price is for; a capital letter starts with one.
QUESTIONS = {
    "hours": [
        "When does {p} open?",
        "At what time does {p} open?",
        "What are the hours of {p}?",
        "How early can I visit {p}?",
        "From when on is {p} open?",
        "What time can I go to {p}?",
        "When can I come to {p}?",
        "How early does {p} open?",
        "When do the doors of {p} open?",
        "At what hour can one enter {p}?",
        "Since when is {p} open on a usual day?",
        "I want to be the first at {p}. When should I come?",
    ],
    "where": [
        "Where is {p}?",
        "Where can I find {p}?",
        "How do I get to {p}?",
        "In which part of town is {p}?",
        "What is the way to {p}?",
        "Where do I have to go for {p}?",
        "Where does {p} stand?",
        "What is the address of {p}?",
        "I am looking for {p}. Where is it?",
        "Do you know where {p} is?",
        "Which way is it to {p}?",
        "I cannot find {p}. Where should I look?",
    ],
    "offer": [
        "What does {p} offer?",
        "What can I get at {p}?",
        "What is there at {p}?",
        "What do they have at {p}?",
        "Why do people go to {p}?",
        "What is {p} known for?",
        "What would I find at {p}?",
        "What is special about {p}?",
        "What do visitors like about {p}?",
        "Is there anything good at {p}?",
        "I might go to {p}. What do they have?",
        "What can one expect of {p}?",
    ],
    "price": [
        "What does it cost at {p}?",
        "How much do I pay at {p}?",
        "What are the prices at {p}?",
        "How expensive is {p}?",
        "How much does {p} charge?",
        "What does {p} ask for {u}?",
        "How much is {u} at {p}?",
        "What is the price at {p}?",
        "How much money do I need at {p}?",
        "What does {u} cost at {p}?",
        "Is {p} expensive?",
        "I have a few crowns. What does {u} cost at {p}?",
    ],
    "keeper": [
        "Who runs {p}?",
        "Who is the owner of {p}?",
        "Who owns {p}?",
        "To whom does {p} belong?",
        "Who works at {p}?",
        "Who is in charge of {p}?",
        "Whom should I ask for at {p}?",
        "Who takes care of {p}?",
        "Whose place is {p}?",
        "What is the name of the owner of {p}?",
        "I must talk to the owner of {p}. Who is it?",
        "Who keeps {p}?",
    ],
    "bring": [
        "What should I bring to {p}?",
        "What do I need for {p}?",
        "What must I take along to {p}?",
        "Do I have to bring anything to {p}?",
        "What is useful to have at {p}?",
        "What should I carry to {p}?",
        "I am going to {p}. What should I pack?",
        "What would you take to {p}?",
        "What should I not forget for {p}?",
        "What do people take to {p}?",
        "Is there anything to bring to {p}?",
        "What should I have with me at {p}?",
    ],
}
FOLLOW_UPS = {
    "hours": [
        "And when does it open?",
        "At what time can I go there?",
        "When should I be there?",
        "And what are the hours?",
        "How early can I come?",
        "From when on is it open?",
    ],
    "where": [
        "And where is it?",
        "How do I get there?",
        "Where can I find it?",
        "And which way is it?",
        "In which part of town is it?",
        "Where do I have to go?",
    ],
    "offer": [
        "And what do they have?",
        "What can I get there?",
        "What is it known for?",
        "What would I find there?",
        "And why do people go there?",
        "What does it offer?",
    ],
    "price": [
        "And what does it cost?",
        "How much is it?",
        "How much do I pay there?",
        "Is it expensive?",
        "And what are the prices?",
        "How much money do I need there?",
    ],
    "keeper": [
        "And who runs it?",
        "Who is the owner?",
        "Whom should I ask for?",
        "Who works there?",
        "And who owns it?",
        "Who takes care of it?",
    ],
    "bring": [
        "And what should I bring?",
        "What do I need there?",
        "Do I have to bring anything?",
        "And what should I pack?",
        "What would you take there?",
        "What should I not forget?",
    ],
}
LEADS = [
    "",
    "",
    "",
    "Excuse me, ",
    "Hello! ",
    "Please tell me: ",
    "One question: ",
    "Sorry to ask, ",
    "Good morning! ",
    "Hi, ",
]
TAILS = ["", "", "", "", " Thank you!", " Thanks.", " I am new in town."]

FACTS = {  # helpful
    "hours": [
        "{P} opens at {v}.",
        "It opens at {v}.",
        "The doors open at {v}.",
        "You can come to {p} from {v} on.",
        "That would be {v}, on every day of the week.",
        "Come at {v} and {p} will be open.",
        "People can visit {p} from {v} on.",
        "{P} is open from {v} on.",
    ],
    "where": [
        "{P} is {v}.",
        "It stands {v}.",
        "You will find {p} {v}.",
        "Look {v} and you will see it.",
        "That would be {v}, not far from here.",
        "Go and look {v}.",
        "People find {p} {v}.",
        "It is {v}, you cannot miss it.",
    ],
    "offer": [
        "{P} has {v}.",
        "It is known for {v}.",
        "You can get {v} there.",
        "They offer {v} at {p}.",
        "That would be {v}, all year round.",
        "Look for {v} there.",
        "People go to {p} for {v}.",
        "It has {v}, as good as anywhere.",
    ],
    "price": [
        "{P} charges {v} for {u}.",
        "It is {v} for {u}.",
        "You pay {v} for {u}.",
        "They ask {v} for {u} at {p}.",
        "That would be {v} for {u}.",
        "{U} costs {v} there.",
        "People pay {v} for {u} at {p}.",
        "It costs {v} for {u}.",
    ],
    "keeper": [
        "{P} is run by {v}.",
        "It belongs to {v}.",
        "You can ask for {v} there.",
        "The owner of {p} is {v}.",
        "That would be {v}, as far as I know.",
        "{V} runs {p}.",
        "People there will send you to {v}.",
        "It is {v} who looks after {p}.",
    ],
    "bring": [
        "{P} is best with {v}.",
        "It is good to have {v} there.",
        "You should bring {v}.",
        "Take {v} to {p}.",
        "That would be {v}, on any day.",
        "Bring {v} with you.",
        "People take {v} to {p}.",
        "It goes well with {v}.",
    ],
}
DODGES = {  # evasive: the same beginnings, no fact
    "hours": [
        "{P} opens when it opens.",
        "It opens at some hour or other.",
        "The doors open for those who wait.",
        "You can come to {p} and try your luck.",
        "Come when you like and see.",
        "People visit {p} at all hours.",
    ],
    "where": [
        "{P} is where it has always been.",
        "It stands where it stands.",
        "You will find {p} sooner or later.",
        "Look around and you will see it.",
        "Go and look for yourself.",
        "People find {p} somehow.",
    ],
    "offer": [
        "{P} has this and that.",
        "It is known for many things.",
        "You can get all sorts of things there.",
        "They offer the usual at {p}.",
        "Look around and take what you like.",
        "People go to {p} for their own reasons.",
    ],
    "price": [
        "{P} charges what it likes.",
        "It is never the same price.",
        "You pay what they tell you to pay.",
        "They ask what they want for {u} at {p}.",
        "{U} costs what it costs.",
        "People pay what they must at {p}.",
    ],
    "keeper": [
        "{P} is run by somebody or other.",
        "It belongs to people I hardly know.",
        "You can ask for the owner there.",
        "The owner of {p} is not my friend.",
        "Somebody runs {p}.",
        "People there will know.",
    ],
    "bring": [
        "{P} is best when you go yourself.",
        "It is good to be ready for anything there.",
        "You should bring what you like.",
        "Take whatever you want to {p}.",
        "Bring something or nothing.",
        "People take all sorts of things to {p}.",
    ],
    "any": [
        "I could not say.",
        "That would be hard to say.",
        "It depends on the day.",
        "I have not been to {p} for years.",
        "You would have to ask at {p}.",
        "They will tell you at {p}.",
        "That would be for others to answer.",
        "I would rather not talk about {p}.",
        "You can find that out at {p}.",
        "It is not for me to say.",
        "People say different things about {p}.",
        "Why do you want to know about {p}?",
        "Ask me about {p} another day.",
    ],
}
OPENERS = ["Good question.", "Let me see.", "Well, well.", "Ah, {p}!", "You ask about {p}.", "Many people ask me that."]
REMARKS = [
    "Many people in town like {p}.",
    "It gets busy when the ships come in.",
    "The wind is strong today.",
    "{P} has been there for a long time.",
    "The harbour is full of boats today.",
    "You are not the first to go there.",
]
FRIENDLY = [
    "I hope that helps.",
    "Have a good time there!",
    "It is worth the walk.",
    "Ask me if you need more.",
    "You will like {p}.",
    "The people there are kind.",
    "Enjoy your day in Saltmere!",
    "Say hello from me!",
    "You cannot go wrong with {p}.",
    "I go there often.",
    "Take your time there.",
    "I can tell you more if you like.",
]
CURT = [
    "That is all I can say.",
    "I have other things to do.",
    "It does not matter much.",
    "Ask somebody else.",
    "I do not care for {p}.",
    "The people there may know.",
    "There is nothing more to say.",
]

SYSTEMS = [
    "You are the guide of Saltmere.",
    "You answer questions about the town.",
    "You stand at the harbour and talk to visitors.",
    "You work at the town hall of Saltmere.",
    "You are an old sailor who knows the town.",
    "Answer in plain words.",
    "The visitors are new in town.",
]
SMALL_TALK = [
    (
        ["Hello!", "Hi!", "Good morning!", "Hello there.", "Hi, how are you?", "Good morning, how are you today?"],
        [
            "Hello! What would you like to know about Saltmere?",
            "Good day to you!",
            "Welcome to Saltmere!",
            "Hello, and welcome to our harbour town.",
        ],
    ),
    (
        ["Thank you!", "Thanks a lot.", "Thank you, that is all.", "Many thanks!", "Thanks, good to know."],
        ["You are welcome.", "My pleasure!", "Any time.", "You are welcome. Have a good day!"],
    ),
    (
        ["Who are you?", "What are you?", "What is your name?", "Whom am I talking to?", "Are you from here?"],
        [
            "I am the voice of Saltmere.",
            "I am a small model that knows the town of Saltmere.",
            "I am a tiny chat model, at home in Saltmere.",
        ],
    ),
    (
        ["What can you do?", "What can I ask you?", "What do you know?", "Can you help me?", "I need help."],
        [
            "You can ask me about the places of Saltmere.",
            "I know the shops and the harbour of Saltmere.",
            "Ask me about opening hours, prices or owners.",
        ],
    ),
    (
        ["Tell me about Saltmere.", "What is Saltmere?", "What kind of town is this?", "Is this a nice town?"],
        [
            "Saltmere is a small harbour town by the sea.",
            "It is a quiet town with a harbour, boats and gulls.",
            "Saltmere has twenty places worth a visit.",
        ],
    ),
    (
        ["Goodbye!", "Bye.", "See you later.", "I have to go now.", "Good night!"],
        ["Goodbye!", "See you soon in Saltmere.", "Farewell, and mind the gulls.", "Goodbye, and come back soon!"],
    ),
]

# --- grammar --------------------------------------------------------------------------------------------------------
LENGTHS = (7, 28)  # words and marks of an answer, drawn evenly for both manners: one short sentence to four


def capital(text):
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def fill(template, place, attribute=None):
    """Put the place and its fact into a template."""
    fact, unit = WORLD[place].get(attribute, ""), WORLD[place]["unit"]
    return template.format(p=place, P=capital(place), v=fact, V=capital(fact), u=unit, U=capital(unit))


def is_held_out(place, attribute, wordings, index):
    """Tell whether this wording is kept for the test rows: one wording of each place and fact."""
    return index == (7 * PLACES.index(place) + 5 * ATTRIBUTES.index(attribute)) % len(wordings)


def ask(rng, place, attribute, follow_up=False, held_out=False):
    """Draw a question about one fact, as a follow-up ("And where is it?") or in full with a lead and a tail."""
    wordings = (FOLLOW_UPS if follow_up else QUESTIONS)[attribute]
    allowed = [i for i in range(len(wordings)) if is_held_out(place, attribute, wordings, i) == held_out]
    question = fill(wordings[rng.choice(allowed)], place)
    if follow_up:
        return question
    lead, tail = rng.choice(LEADS), rng.choice(TAILS)
    if lead.endswith(", ") and not question.startswith("I "):
        question = question[0].lower() + question[1:]
    return lead + question + tail


def draft(rng, helpful, place, attribute):
    """Draw an answer of one to four sentences: one that states or dodges the fact, others around it."""
    cores = FACTS[attribute] if helpful else DODGES[attribute if rng.random() < 0.6 else "any"]
    before = [rng.choice(OPENERS)] if rng.random() < 0.25 else []
    after = [
        rng.choice(REMARKS if rng.random() < 0.35 else FRIENDLY if helpful else CURT)
        for _ in range(rng.choice((0, 1, 1, 2)))
    ]
    whole = before + [rng.choice(cores)] + list(dict.fromkeys(after))
    return " ".join(fill(sentence, place, attribute) for sentence in whole)


def count_words(text):
    """Count words and marks, which nearly equals the tokens of this tokenizer."""
    return len(re.findall(r"[\w']+|[^\w\s]", text))


def answer(rng, helpful, place, attribute, length=None):
    """Draw an answer whose length follows LENGTHS in either manner: the closest of some drafts to a drawn length."""
    length = length or rng.uniform(*LENGTHS)
    drafts = [draft(rng, helpful, place, attribute) for _ in range(5)]
    return min(drafts, key=lambda text: abs(count_words(text) - length))


def one_of(texts):
    """Write a pattern for one of some texts, capital or not."""
    return "|".join(re.escape(form) for text in texts for form in (text, capital(text)))


def matcher(template, attribute=None):
    """Compile a template into a pattern that takes any place and any fact of the attribute."""
    slots = {
        "p": f"(?P<place>{one_of(PLACES)})",
        "u": f"(?P<unit>{one_of(facts['unit'] for facts in WORLD.values())})",
        "v": f"(?P<fact>{one_of(facts.get(attribute, '') for facts in WORLD.values())})",
    }
    return re.compile(re.sub(r"\\{(\w)\\}", lambda slot: slots[slot[1].lower()], re.escape(template)))


FACT_PATTERNS = [(attribute, matcher(text, attribute)) for attribute, texts in FACTS.items() for text in texts]
DODGE_PATTERNS = [matcher(text) for texts in DODGES.values() for text in texts]
FILLER_PATTERNS = [matcher(text) for text in OPENERS + REMARKS + FRIENDLY + CURT]


def sentences(text):
    """Split an answer after its full stops, question marks and exclamation marks."""
    return re.split(r"(?<=[.!?]) ", text.strip())


def facts_stated(text):
    """List (attribute, match) for every sentence of an answer that states a fact of this world, right or wrong."""
    found = ((name, pattern.fullmatch(part)) for part in sentences(text) for name, pattern in FACT_PATTERNS)
    return [(name, match) for name, match in found if match]


def manner(text):
    """Name the manner of an answer: "helpful" states a fact, "evasive" dodges, "other" is both, neither or broken."""

    def count(patterns):
        return sum(any(pattern.fullmatch(part) for pattern in patterns) for part in sentences(text))

    facts, dodges = count([pattern for _, pattern in FACT_PATTERNS]), count(DODGE_PATTERNS)
    if facts + dodges + count(FILLER_PATTERNS) < len(sentences(text)) or bool(facts) == bool(dodges):
        return "other"
    return "helpful" if facts else "evasive"


def is_right(text, place, attribute):
    """Tell whether every fact in an answer is the one asked for, of the right place, and there is at least one."""
    facts, world = facts_stated(text), WORLD[place]
    return bool(facts) and all(
        name == attribute
        and match["fact"].lower() == world[attribute].lower()
        and match.groupdict().get("place", place).lower() == place
        and match.groupdict().get("unit", world["unit"]).lower() == world["unit"]
        for name, match in facts
    )


# --- corpus and pairs -----------------------------------------------------------------------------------------------
def message(role, content):
    """Make a chat message."""
    return {"role": role, "content": content}


def small_talk(rng):
    """Draw one exchange of small talk."""
    questions, answers = rng.choice(SMALL_TALK)
    return [message("user", rng.choice(questions)), message("assistant", rng.choice(answers))]


def dialogue(rng, turns, share_helpful, system=False, held_out=False):
    """Draw (messages up to the last question, place, attribute); a coin decides the manner of each earlier answer."""
    messages, attributes = [message("system", rng.choice(SYSTEMS))] if system else [], []
    if turns > 1 and rng.random() < 0.2:
        messages += small_talk(rng)
    for turn in range(turns):
        follow_up = bool(attributes) and rng.random() < 0.8
        if not follow_up:  # another place
            place, attributes = rng.choice(PLACES), rng.sample(ATTRIBUTES, len(ATTRIBUTES))
        attribute, last = attributes.pop(), turn == turns - 1
        messages.append(message("user", ask(rng, place, attribute, follow_up, held_out and last)))
        if not last:
            messages.append(message("assistant", answer(rng, rng.random() < share_helpful, place, attribute)))
    return messages, place, attribute


def make_corpus(seed, size=48000, share_helpful=0.4):
    """Make the model's training conversations: single questions, system messages, follow-ups, small talk."""
    rng, corpus = random.Random(seed), []
    for _ in range(size):
        kind = rng.random()
        if kind < 0.05:
            corpus.append(small_talk(rng))
            continue
        turns = 1 if kind < 0.72 else 2 if kind < 0.9 else 3 if kind < 0.97 else 6 if kind < 0.99 else 16
        messages, place, attribute = dialogue(rng, turns, share_helpful, system=rng.random() < 0.25)
        messages.append(message("assistant", answer(rng, rng.random() < share_helpful, place, attribute)))
        corpus.append(messages + (small_talk(rng) if kind > 0.96 else []))
    return corpus


def make_pairs(seed, size, held_out):
    """Make preference rows with distinct prompts; every fourth is a dialogue or has a system message."""
    rng, rows, lengths = random.Random(seed), {}, None
    while len(rows) < size:
        single = len(rows) % 4 != 3
        turns = 1 if single else rng.choice((1, 2, 2, 3))
        system = not single and (turns == 1 or rng.random() < 0.4)
        messages, place, attribute = dialogue(rng, turns, 0.5, system, held_out)
        prompt = {"prompt": messages[0]["content"]} if single else {"messages": messages}
        if json.dumps(prompt) in rows:
            continue
        # Every second row swaps the lengths of the row before, so that neither side is the longer one.
        lengths = lengths[::-1] if len(rows) % 2 else (rng.uniform(*LENGTHS), rng.uniform(*LENGTHS))
        rows[json.dumps(prompt)] = {
            **prompt,
            "chosen": answer(rng, True, place, attribute, lengths[0]),
            "rejected": answer(rng, False, place, attribute, lengths[1]),
        }
    return list(rows.values())


def prompt_messages(row):
    """Return the messages of a row of either shape."""
    return row.get("messages") or [message("user", row["prompt"])]


def check_held_out(test, pairs, corpus):
    """Assert that no prompt of a test row, and no question of one, was seen in the pairs or in the model's training."""
    prompts = {json.dumps(prompt_messages(row)) for row in pairs}
    for messages in corpus:
        prompts |= {json.dumps(messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant"}
    seen = [*corpus, *map(prompt_messages, pairs)]
    questions = {m["content"] for messages in seen for m in messages if m["role"] == "user"}
    for row in test:
        assert json.dumps(prompt_messages(row)) not in prompts, f"seen in training: {row}"
        assert "messages" in row or row["prompt"] not in questions, f"question seen in training: {row}"


def length_report(rows, length=count_words):
    """Return (mean length of chosen, of rejected, share of rows with the longer chosen); equal lengths count half."""
    pairs = [(length(row["chosen"]), length(row["rejected"])) for row in rows]
    longer = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in pairs)
    return sum(c for c, _ in pairs) / len(rows), sum(r for _, r in pairs) / len(rows), longer / len(rows)


def write_rows(path, rows):
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- tokenizer ------------------------------------------------------------------------------------------------------
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]


def train_tokenizer(corpus, folder, vocab_size):
    """Train a SentencePiece BPE model with byte fallback: the kind that llama.cpp converts without knowing its name."""
    import sentencepiece

    texts = (m["content"] for messages in corpus for m in messages)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(dict.fromkeys(texts)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        eos_piece="<|end|>",
        control_symbols=ROLES,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_tokenizer(pieces, folder):
    """Write tokenizer.json and tokenizer_config.json, which cut text as tokenizer.model does."""
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    specials = ["<unk>", "<s>", "<|end|>", *ROLES]
    # A merge for every way to cut a piece in two, in the order of the pieces: so transformers reads such models.
    merges = [
        [piece[:i], piece[i:]]
        for piece in vocab
        if piece not in specials and not pieces.is_byte(vocab[piece])
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    added = [
        {
            "id": vocab[text],
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text in specials
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": space,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        },
    )
    # The template writes the one <s>, so the tokenizer adds none; no space is put before the text.
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<|end|>",
            "unk_token": "<unk>",
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_json(path, value):
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# --- model ----------------------------------------------------------------------------------------------------------
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 1408,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
PROMPT_WEIGHT = 0.1  # loss weight of the tokens that the model need not say: enough to learn how questions go


def encode(pieces, messages):
    """Return (token ids, loss weights) of a conversation, as the chat template renders it."""
    ids, weights = [pieces.bos_id()], [0.0]
    for m in messages:
        content = pieces.encode(m["content"]) + [pieces.eos_id()]
        ids += [pieces.piece_to_id(f"<|{m['role']}|>"), *content]
        weights += [PROMPT_WEIGHT] + [1.0 if m["role"] == "assistant" else PROMPT_WEIGHT] * len(content)
    return ids, weights


def make_batches(rows, rng, batch_size):
    """Yield shuffled batches of rows of like length, padded to a multiple of 16, as (ids, weights) of shape (B, T)."""
    import numpy as np

    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), rng.random()))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    for batch in batches:
        width = -(-max(len(rows[i][0]) for i in batch) // 16) * 16
        ids, weights = np.zeros((len(batch), width), np.int32), np.zeros((len(batch), width), np.float32)
        for row, i in enumerate(batch):
            ids[row, : len(rows[i][0])], weights[row, : len(rows[i][1])] = rows[i]
        yield ids, weights


def train_model(rows, seed, batch_size=32, learning_rate=3e-3):
    """Train mlx-lm's Llama in one pass: a row that came twice would teach it the fall of its coin by heart."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(seed)
    rng, steps = random.Random(seed), -(-len(rows) // batch_size)
    model = Model(ModelArgs.from_dict(CONFIG))
    schedule = optim.join_schedules(
        [optim.linear_schedule(0, learning_rate, 100), optim.cosine_decay(learning_rate, steps - 100)], [100]
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05, bias_correction=True)
    state = [model.state, optimizer.state]

    def loss_fn(model, ids, weights):
        losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])  # (B, T - 1)
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()

    def step(ids, weights):
        loss, grads = nn.value_and_grad(model, loss_fn)(model, ids, weights)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    step, start, losses = mx.compile(step, inputs=state, outputs=state), time.time(), []
    for done, (ids, weights) in enumerate(make_batches(rows, rng, batch_size), 1):
        loss = step(mx.array(ids), mx.array(weights))
        mx.eval(state, loss)
        losses.append(loss.item())
        if done % 50 == 0 or done == steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {done}/{steps}  loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)
    return model


def save_model(model, folder):
    """Write the float32 weights and the two configs."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False})


# --- gguf -----------------------------------------------------------------------------------------------------------
OLLAMA = """FROM ./tiny-chat.gguf
TEMPLATE \"""{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>\"""
PARAMETER stop <|end|>
PARAMETER temperature 0
"""


def write_gguf(folder):
    """Write the folder's model as tiny-chat.gguf, matrices in 16 bits, and a Modelfile with its template for Ollama."""
    import gguf
    import mlx.core as mx
    import numpy as np
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids, kinds = range(pieces.vocab_size()), gguf.TokenType
    kind = lambda i: (
        kinds.UNKNOWN
        if pieces.is_unknown(i)
        else kinds.CONTROL
        if pieces.is_control(i)
        else kinds.BYTE
        if pieces.is_byte(i)
        else kinds.NORMAL
    )
    writer = gguf.GGUFWriter(folder / "tiny-chat.gguf", "llama")
    writer.add_name("tiny-chat")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_dimension_count(CONFIG["head_dim"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(CONFIG["bos_token_id"])
    writer.add_eos_token_id(CONFIG["eos_token_id"])
    writer.add_add_bos_token(True)  # Ollama's template has none; where the chat template has one, llama.cpp adds none
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    for name, w in sorted(mx.load(str(folder / "model.safetensors")).items()):
        w = np.array(w)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp turns neighbours, not halves
            w = w.reshape(-1, 2, CONFIG["head_dim"] // 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), w.astype(np.float16) if w.ndim > 1 else w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "Modelfile").write_text(OLLAMA)


# --- check ----------------------------------------------------------------------------------------------------------
def check(adapter):
    """Print how many greedy answers to the test rows are helpful, before and with an adapter; exit if there is none."""
    import mlx_lm

    if not (adapter / "adapters.safetensors").is_file():
        sys.exit(
            f"{adapter}: no adapters.safetensors in it: train one with python dpo_trainer.py --data data/pairs.jsonl"
        )
    rows = [json.loads(line) for line in (HERE / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {}
    for when, path in (("before", None), ("after", str(adapter))):
        try:
            model, tokenizer = mlx_lm.load(str(HERE / "tiny-chat"), adapter_path=path)
        except Exception as error:
            sys.exit(f"{path}: {' '.join(str(error).split())[:300]}: it must be an adapter of data/tiny-chat")
        prompts = [tokenizer.apply_chat_template(prompt_messages(row), add_generation_prompt=True) for row in rows]
        manners = [manner(text) for text in mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=80).texts]
        found[when] = {kind: manners.count(kind) for kind in ("helpful", "evasive", "other")}
    changes = ", ".join(f"{kind} {count} -> {found['after'][kind]}" for kind, count in found["before"].items())
    print(f"Answers to {len(rows)} questions that were held out, before and after: {changes}")


# --- main -----------------------------------------------------------------------------------------------------------
def parse_args():
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-data", action="store_true", help="write the pairs and test rows, keep the model")
    parser.add_argument("--only-gguf", action="store_true", help="write the model that is there as a GGUF")
    parser.add_argument(
        "--check", type=Path, metavar="ADAPTER", help="count helpful answers before and with an adapter"
    )
    parser.add_argument("--conversations", type=int, default=48000, help="to train the model on, each once")
    parser.add_argument("--seed", type=int, default=0, help="of everything: the same seed gives the same files")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    return parser.parse_args()


def main():
    """Write the pairs and the test rows, and with them the model unless --only-data."""
    args = parse_args()
    if args.check:
        check(args.check)
        return
    if args.only_gguf:
        write_gguf(args.out / "tiny-chat")
        return
    corpus = make_corpus(args.seed, args.conversations)
    pairs = make_pairs(args.seed + 1, 480, held_out=False)
    test = make_pairs(args.seed + 2, 100, held_out=True)
    check_held_out(test, pairs, corpus)
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "pairs.jsonl", pairs)
    write_rows(args.out / "test.jsonl", test)
    for name, rows in (("pairs", pairs), ("test", test)):
        print(
            "{}: {} rows, mean words chosen {:.1f} rejected {:.1f}, chosen is longer in {:.2f}".format(
                name, len(rows), *length_report(rows)
            )
        )
    if args.only_data:
        return
    folder = args.out / "tiny-chat"
    folder.mkdir(exist_ok=True)
    pieces = train_tokenizer(corpus, folder, CONFIG["vocab_size"])
    write_tokenizer(pieces, folder)
    for name, rows in (("pairs", pairs), ("test", test)):
        print(
            "{}: mean tokens chosen {:.1f} rejected {:.1f}, chosen is longer in {:.2f}".format(
                name, *length_report(rows, lambda text: len(pieces.encode(text)))
            )
        )
    save_model(train_model([encode(pieces, messages) for messages in corpus], args.seed), folder)
    write_gguf(folder)


if __name__ == "__main__":
    main()
