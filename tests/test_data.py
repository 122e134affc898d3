"""Hold data/ to its README: sizes, held-out prompts, length balance, a model that talks in both manners."""
import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL = DATA / "tiny-chat"


def load_script():
    """Import data/make_tiny_chat.py, which is not on the path."""
    spec = importlib.util.spec_from_file_location("make_tiny_chat", DATA / "make_tiny_chat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = load_script()


def read(name):
    """Read a JSONL file of data/."""
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def chat():
    """Load (model, tokenizer) as a user would."""
    from mlx_lm import load
    return load(str(MODEL))


def greedy(chat, messages, limit=80):
    """Answer greedily: (text, whether it ended by itself)."""
    from mlx_lm.generate import generate_step
    model, tokenizer = chat
    prompt, answer = tokenizer.apply_chat_template(messages, add_generation_prompt=True), []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=limit):
        if int(token) in tokenizer.eos_token_ids:
            return tokenizer.decode(answer), True
        answer.append(int(token))
    return tokenizer.decode(answer), False


# ---------------------------------------------------------------------------------------------------------------------
# pairs
# ---------------------------------------------------------------------------------------------------------------------
def test_sizes():
    pairs, test = read("pairs.jsonl"), read("test.jsonl")
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8 * 2**20
    assert 400 <= len(pairs) <= 600 and len(test) == 100
    for rows in (pairs, test):
        assert 0.2 <= sum("messages" in row for row in rows) / len(rows) <= 0.3
        assert len({json.dumps(tiny.prompt_messages(row)) for row in rows}) == len(rows)


def test_pair_files_are_what_the_script_writes():
    for name, make in (("pairs.jsonl", lambda: tiny.make_pairs(1, 480, held_out=False)),
                       ("test.jsonl", lambda: tiny.make_pairs(2, 100, held_out=True))):
        assert (DATA / name).read_bytes() == "".join(json.dumps(row) + "\n" for row in make()).encode()


def test_held_out_prompts_are_in_no_training():
    test, pairs, corpus = read("test.jsonl"), read("pairs.jsonl"), tiny.make_corpus(0)
    tiny.check_held_out(test, pairs, corpus)
    with pytest.raises(AssertionError, match="seen in training"):
        tiny.check_held_out(pairs[:1], pairs, [])
    with pytest.raises(AssertionError, match="seen in training"):
        tiny.check_held_out([{"prompt": corpus[0][0]["content"]}], [], corpus[:1])


def test_length_does_not_tell_the_manners_apart(chat):
    def tokens(text):
        return len(chat[1].encode(text, add_special_tokens=False))

    for name in ("pairs.jsonl", "test.jsonl"):
        rows = read(name)
        chosen, rejected, longer = tiny.length_report(rows, tokens)
        assert abs(chosen - rejected) < 0.05 * (chosen + rejected) / 2
        assert 0.45 <= longer <= 0.55
        for side in ("chosen", "rejected"):  # short and long ones on both sides
            lengths = [tokens(row[side]) for row in rows]
            assert min(lengths) <= 7 and max(lengths) >= 24


def test_the_manners_are_what_they_should_be():
    for name in ("pairs.jsonl", "test.jsonl"):
        for row in read(name):
            assert tiny.manner(row["chosen"]) == "helpful" and tiny.manner(row["rejected"]) == "evasive"


def test_one_word_does_not_decide():
    """No word that half of one side's answers use is rare on the other."""
    rows = read("pairs.jsonl")
    counts = [Counter(word for row in rows for word in set(re.findall(r"\w+", row[side].lower())))
              for side in ("chosen", "rejected")]
    for word in set(counts[0]) | set(counts[1]):
        here, there = (count[word] / len(rows) for count in counts)
        assert abs(here - there) < 0.5, word


# ---------------------------------------------------------------------------------------------------------------------
# grammar
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attribute", tiny.ATTRIBUTES)
def test_manner_knows_every_answer_of_the_grammar(attribute):
    rng = random.Random(3)
    for place in tiny.PLACES:
        for helpful in (True, False):
            text = tiny.draft(rng, helpful, place, attribute)
            assert tiny.manner(text) == ("helpful" if helpful else "evasive"), text
            assert tiny.is_right(text, place, attribute) == helpful, text


def test_manner_by_hand():
    assert tiny.manner("It opens at six in the morning.") == "helpful"
    assert tiny.manner("Ah, the inn! The inn opens when it opens. Ask somebody else.") == "evasive"
    assert tiny.manner("It opens at six in the morning. I could not say.") == "other"
    assert tiny.manner("I hope that helps.") == tiny.manner("") == tiny.manner("It opens opens at.") == "other"
    assert tiny.is_right("It opens at six in the morning.", "the bakery", "hours")
    assert not tiny.is_right("It opens at six in the morning.", "the inn", "hours")
    assert not tiny.is_right("The inn opens at six in the morning.", "the bakery", "hours")
    assert not tiny.is_right("The bakery is on Mill Lane.", "the bakery", "hours")


def test_each_place_and_fact_keeps_one_wording_out():
    for place in tiny.PLACES:
        for attribute in tiny.ATTRIBUTES:
            for wordings in (tiny.QUESTIONS[attribute], tiny.FOLLOW_UPS[attribute]):
                assert sum(tiny.is_held_out(place, attribute, wordings, i) for i in range(len(wordings))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------------------------------
def test_text_survives_the_tokenizer(chat):
    tokenizer = chat[1]
    for text in ("Where is the inn?", " two  spaces ", "a\nnew line", "Ünïcödé ☕ 42", "x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_template_writes_one_beginning_and_one_end(chat):
    tokenizer = chat[1]
    texts = (("system", "Hi."), ("user", "Where is the inn?"), ("assistant", "There."))
    messages = [tiny.message(role, text) for role, text in texts]
    ids = tokenizer.apply_chat_template(messages)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 3
    answer = tokenizer.encode("There.", add_special_tokens=False) + [tokenizer.eos_token_id]
    assert ids == tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True) + answer


def test_the_model_talks_and_mixes_both_manners(chat):
    rows = read("test.jsonl")
    answers = [greedy(chat, tiny.prompt_messages(row)) for row in rows[:40]]
    assert all(ended for _, ended in answers)
    manners = Counter(tiny.manner(text) for text, _ in answers)
    assert manners["other"] <= 2 and manners["helpful"] >= 8 and manners["evasive"] >= 12, manners
    assert len({text for text, _ in answers}) >= 20


def test_the_model_makes_small_talk(chat):
    text, ended = greedy(chat, [tiny.message("user", "Who are you?")])
    assert ended and "Saltmere" in text
