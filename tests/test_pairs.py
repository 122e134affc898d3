"""From a row to token ids: what counts as a pair, what is refused, and where the answer begins."""

import json
import os
import random
import subprocess
import sys
import types

import pytest
from conftest import CHATML, ROOT, SPECIAL, save_tokenizer, write_rows
from mlx_lm.utils import load_tokenizer

from dpo_trainer import encode_pair, encode_pairs, load_pairs, load_splits, parse_args, read_pair, to_messages


def options(*words):
    return parse_args(["--model", "m", "--data", "d.jsonl", *map(str, words)])


def say(role, content):
    return {"role": role, "content": content}


Q, A, B = say("user", "How far?"), say("assistant", "Ten minutes."), say("assistant", "Who knows.")
DIALOGUE = [say("user", "Hello"), say("assistant", "Good day."), Q]
TEXTS = {"chosen": A["content"], "rejected": B["content"]}
MESSAGES = {"chosen": [A], "rejected": [B]}


def forms(turns):
    """Return the accepted forms of one pair after these turns."""
    prompt, whole = {"prompt": turns}, {"chosen": turns + [A], "rejected": turns + [B]}
    rows = [prompt | TEXTS, prompt | MESSAGES, {"messages": turns, **TEXTS}, {"messages": turns, **MESSAGES}, whole]
    rows += [{"messages": turns + [A], "rejected": side} for side in (B["content"], [B], turns + [B])]
    rows += [prompt | whole, prompt | TEXTS | {"rejected": [B]}, prompt | TEXTS | {"rejected": turns + [B]}]
    rows += [{"prompt": None, "messages": turns, **TEXTS, "system": None, "tools": None}]  # empty columns
    rows += [prompt | TEXTS | {"source": "log", "signal": "edit", "id": 7}]  # unknown columns
    first = {"prompt": turns[0]["content"]}
    rows += [first | whole] if turns[0]["role"] == "user" else []  # UltraFeedback
    return rows + ([first | TEXTS, first | MESSAGES] if len(turns) == 1 else [])


@pytest.mark.parametrize("turns", [[Q], DIALOGUE, [say("system", "Be brief."), Q]], ids=["one", "dialogue", "system"])
def test_every_form_gives_the_same_pair(turns):
    for row in forms(turns):
        before = json.dumps(row)
        assert read_pair(row, options()) == {"prompt": turns, "chosen": A, "rejected": B, "tools": None, "weight": 1.0}
        assert json.dumps(row) == before, "the row was changed"


def test_what_else_a_row_may_hold():
    """Tool calls before the last turn belong to the prompt when both answers made them; their content may be null."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "far", "arguments": {}}}]}
    row = {"prompt": [Q], "chosen": [call, say("tool", "10"), A], "rejected": [call, say("tool", "10"), B]}
    assert read_pair(row, options())["prompt"] == [Q, call, say("tool", "10")]
    for tool_call in (call, {name: value for name, value in call.items() if name != "content"}):
        assert read_pair({"prompt": [Q], "chosen": [tool_call], "rejected": "b"}, options())["chosen"] == tool_call
    row = {"prompt": "How far?", **TEXTS, "system": "Be brief."}
    assert read_pair(row, options())["prompt"] == [say("system", "Be brief."), Q]
    row["prompt"] = [say("system", "Be long."), Q]  # it stays the only one
    assert read_pair(row, options())["prompt"] == row["prompt"]
    tools = [{"type": "function", "function": {"name": "far"}}]
    for given, weight in ((2, 2.0), (0, 0.0), (0.5, 0.5), (None, 1.0)):
        pair = read_pair({"prompt": "How far?", **TEXTS, "tools": tools, "weight": given}, options())
        assert pair["tools"] == tools and pair["weight"] == weight and type(pair["weight"]) is float
    every_role = [say(role, "x") for role in ("system", "developer", "user", "assistant", "tool")]
    assert to_messages(every_role, "user", "prompt") == every_role


HUMAN = "\n\nHuman: Hello\n\nAssistant: Good day.\n\nHuman: How far?\n\nAssistant:"
HH_RLHF = [
    ({"chosen": f"{HUMAN} Ten minutes.", "rejected": f"{HUMAN} Who knows."}, DIALOGUE),
    ({"chosen": f"{HUMAN} Ten minutes.\n", "rejected": f"{HUMAN}  Who knows."}, DIALOGUE),
    ({"chosen": f"{HUMAN[-29:]} Ten minutes.", "rejected": f"{HUMAN[-29:]} Who knows."}, [Q]),
    ({"prompt": HUMAN.removesuffix("\n\nAssistant:"), **TEXTS}, DIALOGUE),
    ({"prompt": "How far?", "chosen": f"{HUMAN[-29:]} Ten minutes.", "rejected": B["content"]}, [Q]),
]


@pytest.mark.parametrize("row, turns", HH_RLHF)
def test_a_conversation_in_one_text(row, turns):
    expected = {"prompt": turns, "chosen": A, "rejected": B, "tools": None, "weight": 1.0}
    assert read_pair(row, options()) == expected


def test_a_text_that_only_quotes_one_is_no_conversation():
    quote = "They said:\n\nHuman: Who goes there?\n\nAssistant: I."
    pair = read_pair({"prompt": quote, "chosen": f"x{HUMAN}", "rejected": "Human: I."}, options())
    assert pair["prompt"] == [say("user", quote)] and pair["chosen"]["content"] == f"x{HUMAN}"
    assert pair["rejected"]["content"] == "Human: I."


def test_renamed_columns():
    args = options("--prompt-feature", "question", "--chosen-feature", "good", "--rejected-feature", "bad")
    row = {"question": "How far?", "good": A["content"], "bad": B["content"]}
    decoys = {"prompt": "x", "chosen": "y", "rejected": "z"}
    for more in ({}, decoys):
        pair = read_pair(row | more, args)
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([Q], A, B)
    with pytest.raises(ValueError, match="'good' must be there"):
        read_pair({"question": "How far?", "bad": "b"} | decoys, args)
    with pytest.raises(ValueError, match="not an object with question, good, bad"):
        read_pair([], args)


ODD = {"role": "assistant", "content": 5, "tool_calls": [{}]}  # a number, though tool calls stand beside it
LATER = [[say("system", "Be brief."), Q], DIALOGUE]  # put behind the prompt, the model would see the question twice
NO_PAIR = {  # what is said: rows
    "not an object with prompt, chosen, rejected": [5, None, "text", [{"prompt": "How far?", **TEXTS}]],
    "'prompt' must be there, as a text or a list of messages": [{"prompt": x, **TEXTS} for x in (5, False, Q)]
    + [{"messages": x, **TEXTS} for x in (5, None)],
    "'chosen' must be there, as a text or a list of messages": [
        {}, {"prompt": "How far?", "rejected": "b"}, {"prompt": "How far?", "chosen": 5, "rejected": "b"},
    ],
    "'rejected' must be there, as a text or a list of messages": [
        {"prompt": "How far?", "chosen": "a"}, {"messages": DIALOGUE + [A]},
        {"prompt": "How far?", "chosen": "a", "rejected": {"role": "assistant"}},
    ],
    "there must be a prompt, and it must end in a user turn": [
        TEXTS, {"prompt": [], **TEXTS}, {"messages": [], **TEXTS}, {"messages": [A], "rejected": "b"},
        {"prompt": [Q, A], **TEXTS}, {"messages": [Q, A], **TEXTS}, {"prompt": [say("system", "Be brief.")], **TEXTS},
        {"chosen": [Q, A], "rejected": [say("user", "What?"), B]},
    ],
    "'prompt': not a message with a known role": [
        {"prompt": [turn], **TEXTS}
        for turn in ("How far?", {"content": "How far?"}, say("robot", "How far?"), say(["user"], "How far?"))
    ],
    "'chosen': not a message with a known role": [{"prompt": [Q], "chosen": [say("robot", "a")], "rejected": "b"}],
    "'rejected': not a message with a known role": [{"prompt": [Q], "chosen": "a", "rejected": ["b"]}],
    "'prompt': content must be a text": [
        {"prompt": [turn], **TEXTS}
        for turn in (say("user", 5), say("user", None), {"role": "user"}, say("user", [{"type": "image"}]))
    ],
    "'chosen': content must be a text": [
        {"prompt": [Q], "chosen": [turn], "rejected": "b"}
        for turn in (say("assistant", ["a"]), say("assistant", None), ODD, say("assistant", None) | {"tool_calls": []})
    ],
    "an answer is empty": [
        {"prompt": [Q], "chosen": "", "rejected": "b"}, {"prompt": [Q], "chosen": "a", "rejected": " \n\t"},
        {"prompt": [Q], "chosen": [A], "rejected": [say("assistant", "")]},
    ],
    "chosen and rejected are equal": [
        {"prompt": "How far?", "chosen": "a", "rejected": "a"}, {"messages": [Q, A], "rejected": A["content"]},
    ],
    "'(chosen|rejected)' must begin with the prompt or after it": [
        {"prompt": Q["content"], "chosen": turns + [A], "rejected": turns + [B]} for turns in LATER
    ] + [{"prompt": [Q], "chosen": [A], "rejected": []}],
    "must differ in one turn, the last": [
        {"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, B]}, {"chosen": [Q, A, Q, A], "rejected": [Q, B]},
        {"prompt": [Q], "chosen": [A, Q, A], "rejected": [B, Q, B]}, {"prompt": [Q], "chosen": [A, A], "rejected": [B]},
        {"chosen": f"{HUMAN} Ten minutes.", "rejected": f"{HUMAN.replace('day', 'night')} Who knows."},
    ],
    "must be the assistant's turn": [{"chosen": [Q, say("user", "a")], "rejected": [Q, say("user", "b")]}],
    "'system' must be a text": [{"prompt": "How far?", **TEXTS, "system": ["x"]}],
    "'tools' a list": [{"prompt": "How far?", **TEXTS, "tools": {"name": "x"}}],
    "'weight' must be a number from 0 up": [
        {"prompt": "How far?", **TEXTS, "weight": weight}
        for weight in (-1, -0.001, float("nan"), float("inf"), True, False, "1", [1])
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", NO_PAIR)
def test_what_is_no_pair_is_refused(message):
    for row in NO_PAIR[message]:
        with pytest.raises(ValueError, match=message):
            print(row, read_pair(row, options()))  # shown when nothing is raised


def prompts(pairs):
    return [pair["prompt"][-1]["content"] for pair in pairs]


def rows_of(count, repeat=1):
    """Return repeat rows of each of count prompts."""
    texts = [(f"Number {i}?", f"Yes {j}.") for i in range(count) for j in range(repeat)]
    return [{"prompt": prompt, "chosen": chosen, "rejected": "No."} for prompt, chosen in texts]


@pytest.mark.parametrize("count, held_out", [(1, 0), (9, 0), (10, 1), (100, 10), (1999, 199), (2500, 200)])
def test_a_tenth_of_the_prompts_of_a_file_is_held_out(tmp_path, count, held_out):
    path = write_rows(tmp_path / "pairs.jsonl", rows_of(count, repeat=2))
    splits = load_splits(options("--data", path))
    train, valid = prompts(splits["train"]), prompts(splits["valid"])
    assert len(valid) == 2 * held_out and len(train) == 2 * (count - held_out)
    assert not set(train) & set(valid)


def test_the_split_is_seeded_and_hangs_on_neither_order_nor_process(tmp_path):
    """The order of a set of texts changes from one process to the next, so it must not decide."""
    rows = rows_of(50)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    mixed = write_rows(tmp_path / "mixed.jsonl", random.Random(1).sample(rows, len(rows)))
    every = (["--data", path], ["--data", path], ["--data", mixed], ["--data", path, "--seed", 1])
    valid = [sorted(prompts(load_splits(options(*words))["valid"])) for words in every]
    assert valid[0] == valid[1] == valid[2] != valid[3]
    code = (
        "import sys; from dpo_trainer import load_splits, parse_args\n"
        "pairs = load_splits(parse_args(sys.argv[1:]))['valid']\n"
        "print(*sorted(pair['prompt'][0]['content'] for pair in pairs), sep='|', end='')"
    )
    command = [sys.executable, "-c", code, "--model", "m", "--data", str(path)]
    there = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert there.stdout == "|".join(valid[0])


def test_a_folder_with_train_valid_test(tmp_path):
    for name, count in (("train", 20), ("valid", 3), ("test", 4)):
        write_rows(tmp_path / f"{name}.jsonl", [row | {"prompt": f"{name} {row['prompt']}"} for row in rows_of(count)])
    args = options("--data", tmp_path, "--train", "--test")
    splits = load_splits(args)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 20, "valid": 3, "test": 4}
    assert all(prompt.startswith(name) for name, pairs in splits.items() for prompt in prompts(pairs))
    assert set(load_splits(options("--data", tmp_path))) == {"train", "valid"}
    args.train = False  # --test alone, which needs an adapter
    assert set(load_splits(args)) == {"test"}
    (tmp_path / "valid.jsonl").unlink()
    splits = load_splits(options("--data", tmp_path))
    assert len(splits["train"]) == 18 and len(splits["valid"]) == 2


def test_places_count_the_lines_of_the_file(tmp_path):
    path, row = tmp_path / "pairs.jsonl", json.dumps(rows_of(1)[0])
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n  \n{row}\r\n{row}".encode())  # after a byte order mark
    assert [pair["place"] for pair in load_pairs(options(), path, "train")] == [f"{path}:{n}" for n in (1, 4, 5)]


def fake_datasets(monkeypatch, rows):
    """Put a module in the place of datasets; return the list of (name, split) that it is asked for."""
    asked, module = [], types.ModuleType("datasets")
    module.load_dataset = lambda name, split: asked.append((name, split)) or rows
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hub_dataset(monkeypatch, capsys):
    asked = fake_datasets(monkeypatch, rows_of(30))
    splits = load_splits(options("--data", "some/name"))
    assert asked == [("some/name", "train")]
    assert len(splits["train"]) == 27 and len(splits["valid"]) == 3
    load_splits(options("--data", "some/name:train_prefs", "--train", "--test", "other/name:test_prefs"))
    assert asked[1:] == [("other/name", "test_prefs"), ("some/name", "train_prefs")]
    load_splits(options("--data", "some/name", "--train", "--test"))
    assert asked[3:] == [("some/name", "test"), ("some/name", "train")]
    assert capsys.readouterr().out == ""
    fake_datasets(monkeypatch, [{"q": f"{i}?", "good": "Yes.", "bad": "No."} for i in range(3)])
    columns = "--prompt-feature q --chosen-feature good --rejected-feature bad"
    assert prompts(load_splits(options("--data", "some/name", *columns.split()))["train"]) == ["0?", "1?", "2?"]


def test_bad_rows_of_the_hub_are_left_out_and_counted(monkeypatch, capsys):
    rows = rows_of(5)
    rows[1]["chosen"], rows[3]["rejected"] = "", None
    fake_datasets(monkeypatch, rows)
    splits = load_splits(options("--data", "some/name"))
    assert prompts(splits["train"]) == ["Number 0?", "Number 2?", "Number 4?"]
    assert [pair["place"] for pair in splits["train"]] == [f"some/name:{n}" for n in (1, 3, 5)]
    assert "some/name: 2 of 5 rows are no pairs and were left out" in capsys.readouterr().out
    fake_datasets(monkeypatch, [{"text": "x"}] * 3)
    with pytest.raises(SystemExit, match="^some/name: no train pairs in it: .*--prompt-feature"):
        load_splits(options("--data", "some/name"))


BOS, START, END, THINK, UNTHINK = map(SPECIAL.index, ("<s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"))
STUB = (  # as Qwen3's: past thoughts are dropped, the last answer gets an empty one, the generation prompt none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")  # the generation prompt opens a thought
BARE = (  # no special token between prompt and answer
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS = "{% if tools %}{{ tools | length }} tools\n{% endif %}" + CHATML


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function that gives the tokenizer of a template, made once."""
    made = {}

    def get(template=CHATML, bos=None):
        if (template, bos) not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            save_tokenizer(folder, template, bos)
            made[template, bos] = load_tokenizer(folder)
        return made[template, bos]

    return get


def spell(tokenizer, *parts):
    """Return the ids of parts: an id as it is, a text encoded by itself."""
    return sum(([p] if isinstance(p, int) else tokenizer.encode(p, add_special_tokens=False) for p in parts), [])


def renderings(tokenizer, turns, chosen=A, rejected=B):
    """Return the template's ids of the generation prompt and of both whole conversations."""
    render = tokenizer.apply_chat_template
    return render(turns, add_generation_prompt=True), render(turns + [chosen]), render(turns + [rejected])


def test_chatml_by_hand(load):
    tokenizer = load()
    prompt, chosen, rejected, moved = encode_pair(tokenizer, [Q], A, B)
    assert prompt == spell(tokenizer, START, "user\nHow far?", END, "\n", START, "assistant\n")
    assert chosen == spell(tokenizer, "Ten minutes.", END, "\n")  # the end of the turn is scored
    assert rejected == spell(tokenizer, "Who knows.", END, "\n")
    assert moved == 0 and tokenizer.bos_token is None and BOS not in prompt + chosen + rejected
    prompt = encode_pair(tokenizer, [say("system", "Be brief."), *DIALOGUE], A, B)[0]
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Good day."), ("user", "How far?")]
    pieces = [piece for role, text in turns for piece in (START, f"{role}\n{text}", END, "\n")]
    assert prompt == spell(tokenizer, *pieces, START, "assistant\n")


def test_a_generation_prompt_that_is_no_prefix_skips_nothing(load, capsys):
    tokenizer = load(OPENS)
    prompt, chosen, _, moved = encode_pair(tokenizer, [Q], A, B)
    generation = renderings(tokenizer, [Q])[0]
    assert generation == prompt + spell(tokenizer, THINK, "\n") and moved == 2
    assert chosen == spell(tokenizer, "Ten minutes.", END, "\n")
    pairs = [{"place": "p:1", **read_pair({"prompt": [Q], **MESSAGES}, options())}]
    encode_pairs(tokenizer, pairs, 100)
    assert "rewrites up to 2 tokens" in capsys.readouterr().out
    encode_pairs(load(), pairs, 100)
    assert capsys.readouterr().out == ""


MOVED = {CHATML: {0}, STUB: {0, 1}, OPENS: {2}, BARE: {0, 1}, TOOLS: {0}}  # 1: a space or newlines join the answer
JOINED = say("assistant", "minutes along"), say("assistant", "the river")  # with BARE, each with the space before


@pytest.mark.parametrize("template", MOVED)
def test_prompt_and_answer_are_the_whole_rendering(load, template):
    """Nothing is skipped or written twice, and the prompt is all that both answers and the generation prompt share."""
    tokenizer, thought = load(template), say("assistant", "<think>\nBy foot.</think>Ten minutes.")
    for turns in ([Q], DIALOGUE, [say("system", "Be brief."), Q]):
        for sides in ((A, B), JOINED, (thought, B)):  # the thought goes on where OPENS's generation prompt ends
            prompt, chosen, rejected, moved = encode_pair(tokenizer, turns, *sides)
            generation, *whole = renderings(tokenizer, turns, *sides)
            assert [prompt + chosen, prompt + rejected] == whole
            assert prompt == generation[: len(prompt)] and moved == len(generation) - len(prompt)
            assert not moved or len({generation[len(prompt)], chosen[0], rejected[0]}) > 1
            assert moved in ({1} if (sides, template) == (JOINED, BARE) else MOVED[template])
            assert template != STUB or (THINK in chosen and UNTHINK in rejected)


def test_tools_reach_the_template(load):
    tokenizer, tools = load(TOOLS), [{"type": "function", "function": {"name": "far"}}]
    plain, with_tools = (encode_pair(tokenizer, [Q], A, B, given)[0] for given in (None, tools))
    assert with_tools == spell(tokenizer, "1 tools\n") + plain
    pair = {"place": "p:1", **read_pair({"prompt": [Q], **MESSAGES, "tools": tools}, options())}
    assert encode_pairs(tokenizer, [pair], 100)[0]["prompt"] == with_tools


@pytest.mark.parametrize("written", [0, 1, 2], ids=["not in template", "in template", "twice in template"])
@pytest.mark.parametrize("added", [True, False], ids=["added", "not added"])
def test_bos_stands_once(load, tmp_path, written, added):
    save_tokenizer(tmp_path, "<s>" * written + CHATML, "<s>" if added else None)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.bos_token = "<s>"  # it has one, whether encode() puts it or not
    assert (tokenizer.encode("x")[0] == BOS) == added
    prompt, chosen, rejected, moved = encode_pair(tokenizer, [Q], A, B)
    assert prompt[: written > 0 or added] == [BOS] * (written > 0 or added)
    assert (prompt + chosen + rejected).count(BOS) == int(written > 0 or added)
    plain = load()
    assert prompt[-5:] == encode_pair(plain, [Q], A, B)[0][-5:]
    assert chosen == encode_pair(plain, [Q], A, B)[1] and moved == 0


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_without_a_template_each_text_stands_by_itself(load, bos):
    tokenizer = load(None, bos)
    assert not tokenizer.has_chat_template
    sides = say("assistant", "ar is it?"), say("assistant", "oot?")
    prompt, chosen, rejected, moved = encode_pair(tokenizer, [say("system", "Be brief."), say("user", "How f")], *sides)
    assert prompt == spell(tokenizer, *([BOS] if bos else []), "Be brief.\nHow f")
    assert chosen == spell(tokenizer, "ar is it?") + [END] and rejected == spell(tokenizer, "oot?") + [END]
    assert prompt + chosen[:-1] != tokenizer.encode("Be brief.\nHow far is it?")  # so the border matters here
    assert moved == 0


def numbered(count, system=True):
    """Return a pair with count user turns, each with a number."""
    turns = [say("system", "Be brief.")] if system else []
    for i in range(count):
        turns += [say("user", f"How far is number {i}?"), say("assistant", f"It is {i} minutes.")]
    return {"place": "p:1", "prompt": turns[:-1], "chosen": A, "rejected": B, "tools": None, "weight": 1.0}


@pytest.mark.parametrize("system", [True, False])
def test_the_oldest_turns_go_first(load, capsys, system):
    tokenizer, pair = load(), numbered(5, system)
    whole = encode_pair(tokenizer, pair["prompt"], A, B)
    longest = len(whole[0]) + max(len(whole[1]), len(whole[2]))
    left = []
    for limit in range(longest + 1, 0, -1):
        try:
            (found,) = encode_pairs(tokenizer, [pair], limit)
        except SystemExit:
            break
        assert len(found["prompt"]) + max(len(found["chosen"]), len(found["rejected"])) <= limit
        assert (found["chosen"], found["rejected"]) == whole[1:3]  # never cut
        count = tokenizer.decode(found["prompt"]).count("user\n")
        first = int(system)
        kept = pair["prompt"][:first] + pair["prompt"][len(pair["prompt"]) - 2 * count + 1 :]
        assert found["prompt"] == encode_pair(tokenizer, kept, A, B)[0]
        more = pair["prompt"][:first] + pair["prompt"][len(pair["prompt"]) - 2 * count - 1 :]
        assert count == 5 or len(encode_pair(tokenizer, more, A, B)[0]) + max(map(len, whole[1:3])) > limit
        assert ("1 pairs shortened" in capsys.readouterr().out) == (limit < longest)
        left.append(count)
    assert sorted(set(left), reverse=True) == [5, 4, 3, 2, 1]


def test_too_long_is_skipped_counted_and_said(load, capsys):
    tokenizer, short = load(), numbered(1)
    long = short | {"place": "p:2", "rejected": say("assistant", "Who knows. " * 50)}
    kept = encode_pairs(tokenizer, [short | {"weight": 3.0}, long, numbered(9) | {"weight": 2.0}, long], 60)
    assert [pair["weight"] for pair in kept] == [3.0, 2.0]
    assert kept[0]["chosen"] == kept[1]["chosen"] == encode_pair(tokenizer, [Q], A, B)[1]
    assert "1 pairs shortened to --max-seq-length, 2 skipped as too long, 0 as equal" in capsys.readouterr().out


def test_equal_in_tokens_is_skipped_counted_and_said(load, capsys):
    assert len(encode_pairs(load(TRIM), [numbered(1), EQUAL], 100)) == 1
    assert "0 pairs shortened to --max-seq-length, 0 skipped as too long, 1 as equal" in capsys.readouterr().out


STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
TRIM = CHATML.replace("m.content", "m.content | trim")
EQUAL = numbered(1) | {"chosen": say("assistant", "Yes."), "rejected": say("assistant", "Yes. ")}
BLANK = numbered(1) | {"prompt": [say("user", "")]}


@pytest.mark.parametrize(
    "template, pair, limit, said",
    [
        (CHATML, numbered(1), 10, "this and every other pair is too long: raise --max-seq-length"),
        (TRIM, EQUAL, 100, "this and every other pair is of equal answers.*bring other data"),
        (STRICT, numbered(1), 100, "no system turn: .*template"),
        (None, BLANK, 100, "the prompt has no token to start from"),  # nothing to predict the first answer token from
    ],
    ids=["too long", "equal", "refused", "no prompt"],
)
def test_what_ends_the_run_is_said_with_its_place(load, template, pair, limit, said):
    with pytest.raises(SystemExit, match=f"^p:1: {said}"):
        encode_pairs(load(template), [pair, pair | {"place": "p:2"}], limit)
