"""What a row is, what is refused of it and where, what becomes of it in a chat template; the bundled pairs."""

import importlib.util
import json
import random
import sys
import types

import pytest
from conftest import CHATML, ROOT, SPECIAL, few, make_rows, run_script, save_tokenizer, write_rows
from mlx_lm.utils import load_tokenizer

from dpo_trainer import encode_pair, load_pairs, parse_args, read_pair

USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A")))
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]


def options(*words):
    return parse_args(["--model", "m", "--data", "d", *map(str, words)])


def tokenizer_of(folder, template=CHATML, bos=None):
    """Return a tokenizer as mlx-lm loads it, of a template."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder, template, bos)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


# ------------------------------------------------------------------------------------------------------- forms of a row

OTHER = [ASSISTANT | {"content": "B"}]
FORMS = {
    "texts": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "messages and texts": {"messages": [USER], "chosen": "A", "rejected": "B"},
    "messages in prompt": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": OTHER},
    "whole conversations": {"chosen": [USER, ASSISTANT], "rejected": [USER, *OTHER]},
    "the chosen answer last": {"messages": [USER, ASSISTANT], "rejected": OTHER},
    "a prompt beside whole conversations": {"prompt": "Q", "chosen": [USER, ASSISTANT], "rejected": [USER, *OTHER]},
    "content as parts": {
        "prompt": [USER | {"content": [{"type": "text", "text": "Q"}]}],
        "chosen": [ASSISTANT | {"content": [{"type": "text", "text": ""}, {"type": "text", "text": "A"}]}],
        "rejected": OTHER,
    },
    "fields that no template reads": {
        "messages": [USER | {"id": 7, "name": None}],
        "chosen": [ASSISTANT | {"timestamp": "12:00", "tool_calls": None}],
        "rejected": "B",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_is_the_same_pair(form):
    expected = {"prompt": [USER], "chosen": ASSISTANT, "rejected": OTHER[0], "weight": 1.0}
    assert read_pair(FORMS[form], options()) == expected
    longer = json.loads(json.dumps(FORMS[form]))
    for name in ("messages", "chosen", "rejected", "prompt"):  # with earlier turns, where they are messages
        if isinstance(longer.get(name), list) and longer[name][0]["role"] == "user":
            longer[name] = EARLIER + longer[name]
            expected["prompt"] = [*EARLIER, USER]
    if form != "a prompt beside whole conversations":
        assert read_pair(longer, options()) == expected


def test_system_and_weight_are_read():
    row = FORMS["texts"] | {"system": "Be brief.", "weight": 0.25, "source": "chat", "signal": "thumbs"}
    pair = read_pair(row, options())
    assert pair["prompt"] == [{"role": "system", "content": "Be brief."}, USER] and pair["weight"] == 0.25
    own = [{"role": "system", "content": "Be long."}, USER]  # what the messages say holds
    assert read_pair(row | {"prompt": own}, options())["prompt"] == own
    assert read_pair(FORMS["texts"] | {"weight": None, "system": None}, options())["weight"] == 1.0


def test_columns_by_other_names(tmp_path):
    (tmp_path / "columns.yaml").write_text(
        "hf_dataset: {path: d, prompt_feature: question, chosen_feature: good, rejected_feature: bad}\n"
    )
    args = options("--config", tmp_path / "columns.yaml")
    assert read_pair({"question": "Q", "good": "A", "bad": "B"}, args) == read_pair(FORMS["texts"], options())


# ------------------------------------------------------------------------------------------------------------ refusals

GOOD = json.dumps(FORMS["texts"]).encode()
CALL = [{"function": {"name": "tide", "arguments": {}}}]
REFUSED = {  # what the second line is: what is said of it
    json.dumps(FORMS["texts"] | {"tools": CALL}): "rows with tools are not trained on",
    json.dumps({"prompt": "Q", "chosen": [ASSISTANT | {"content": None, "tool_calls": CALL}], "rejected": "B"}): "tool",
    json.dumps({"messages": [USER, {"role": "tool", "content": "3 m"}, USER], "chosen": "A", "rejected": "B"}): "tool",
    json.dumps({"prompt": [USER | {"content": [{"type": "image_url"}]}], "chosen": "A", "rejected": "B"}): "text by",
    json.dumps({"prompt": "Q", "chosen": "A", "rejected": " "}): "empty or equal",
    json.dumps({"prompt": "Q", "chosen": "A", "rejected": "A"}): "empty or equal",
    json.dumps({"prompt": "Q", "chosen": "", "rejected": "B"}): "no chosen and rejected",
    json.dumps({"question": "Q", "good": "A", "bad": "B"}): "question, good, bad: set hf_dataset: {chosen_feature",
    json.dumps({"prompt": "Q", "chosen": "A"}): "no chosen and rejected among prompt, chosen",
    json.dumps({"chosen": "A", "rejected": "B"}): "must follow the same user turn",
    json.dumps({"prompt": [ASSISTANT], "chosen": "A", "rejected": "B"}): "must follow the same user turn",
    json.dumps({"chosen": [USER, ASSISTANT], "rejected": [*EARLIER, USER, *OTHER]}): "must follow the same user turn",
    json.dumps(FORMS["texts"] | {"weight": -1}): "weight must be a number from 0 up",
    json.dumps(FORMS["texts"] | {"weight": "much"}): "much",
    json.dumps(FORMS["texts"] | {"weight": float("nan")}): "weight must be a number from 0 up",
    json.dumps({"prompt": 3, "chosen": "A", "rejected": "B"}): "",
    '{"prompt": "\\ud800", "chosen": "A", "rejected": "B"}': "",
    "[" * 100_000: "",
    '["prompt"]': "",
    "null": "",
    '{"prompt": "Q", "chosen": "A", "rej': "",
    "": "",
}
REFUSED_BYTES = {b'{"prompt": "\xff\xfe", "chosen": "A", "rejected": "B"}': "utf-8"}


def refusal(file, tokenizer):
    """Return the one line in which a file of pairs is refused."""
    with pytest.raises(SystemExit) as ended:
        load_pairs(options(), tokenizer, str(file), "train")
    assert "\n" not in ended.value.code and len(ended.value.code) < 600
    return ended.value.code


@pytest.mark.parametrize("line", [*REFUSED, *REFUSED_BYTES])
def test_a_row_is_refused_by_its_line(tmp_path, tokenizer, line):
    file, said = tmp_path / "pairs.jsonl", (REFUSED | REFUSED_BYTES)[line]
    file.write_bytes(GOOD + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + GOOD + b"\n")
    found = refusal(file, tokenizer)
    assert found.startswith(f"{file}:2: ") and found.endswith(": mend or delete the row") and said in found


FILES = {
    "array.json": json.dumps([FORMS["texts"]], indent=2),
    "pairs.json": json.dumps([FORMS["texts"]]),
    "pairs.csv": "prompt,chosen,rejected\nQ,A,B\n",
    "empty.jsonl": "",
}


@pytest.mark.parametrize("name", FILES)
def test_another_kind_of_file_is_called_that(tmp_path, tokenizer, name):
    (tmp_path / name).write_text(FILES[name])
    found = refusal(tmp_path / name, tokenizer)
    assert found.startswith(f"{tmp_path / name}: ") and "write one object a line" in found


def test_strange_but_whole_files_are_read(tmp_path, tokenizer):
    """With a byte order mark, Windows' line ends, no last line end."""
    (tmp_path / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD)
    assert len(load_pairs(options(), tokenizer, str(tmp_path / "pairs.jsonl"), "train")) == 2


def test_a_missing_file_or_folder_is_named(tmp_path, tokenizer):
    for name in ("missing.jsonl", ""):  # the folder is there, but no train.jsonl
        assert str(tmp_path / name) in refusal(tmp_path / name, tokenizer)


def mutated(line, rng):
    """Return a line with something of it changed as bytes, or a value of its object as JSON."""
    if rng.random() < 0.5:
        place, size = rng.randrange(len(line)), rng.randrange(6)
        return line[:place] + bytes(rng.choices(b'\x00\xff"{}[]\\ue,:0a', k=rng.randrange(4))) + line[place + size :]
    values = [None, "", [], {}, 0, -1.5, True, "x", [None], [[]], [{}], {"role": "user"}, [USER], [ASSISTANT], "\ud83d"]
    row = json.loads(line)
    home, key = row, rng.choice([*row, "system", "weight", "tools", "messages"])
    if isinstance(home.get(key), list) and home[key] and rng.random() < 0.7:
        home, key = rng.choice(home[key]), rng.choice(["role", "content", "tool_calls", "thinking"])
    home[key] = rng.choice(values)
    return json.dumps(row).encode()


def test_no_mutated_line_gives_a_traceback(tmp_path, tokenizer):
    """300 seeded lines, each read as a row or refused by its number."""
    rng, outcomes, args = random.Random(7), {True: 0, False: 0}, options()
    good = [json.dumps(row).encode() for row in (*FORMS.values(), *make_rows(6))]
    for _ in range(300):
        line = mutated(rng.choice(good), rng).replace(b"\n", b"")
        (tmp_path / "pairs.jsonl").write_bytes(GOOD + b"\n" + line + b"\n")
        try:
            read = len(load_pairs(args, tokenizer, str(tmp_path / "pairs.jsonl"), "train")) > 0
        except SystemExit as ended:
            read = False
            assert ended.code.startswith(f"{tmp_path / 'pairs.jsonl'}:2: ") and "\n" not in ended.code, (line, ended)
        outcomes[read] += 1
    assert min(outcomes.values()) > 30, outcomes


# ----------------------------------------------------------------------------------------------------------- data sets


def test_a_hub_dataset_is_loaded_by_its_split(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", hub := types.ModuleType("datasets"))
    asked = []
    hub.load_dataset = lambda path, split: asked.append((path, split)) or [FORMS["texts"], FORMS["whole conversations"]]
    pairs = load_pairs(options(), tokenizer, "org/pairs", "train")
    assert asked == [("org/pairs", "train")] and pairs[0]["chosen"] == pairs[1]["chosen"] and len(pairs) == 2
    load_pairs(options(), tokenizer, "org/pairs:train_prefs", "train")
    load_pairs(options(), tokenizer, "org/pairs:train_prefs", "test")
    args = options()
    args.hf_dataset = {"valid_split": "train[:9]"}
    load_pairs(args, tokenizer, "org/pairs", "valid")
    assert [split for _, split in asked[1:]] == ["train_prefs", "test", "train[:9]"]
    hub.load_dataset = lambda path, split: [FORMS["texts"], {"text": "Q"}]
    assert refusal("org/pairs", tokenizer).startswith("org/pairs:2: no chosen and rejected among text: ")
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    assert "datasets" in refusal("org/pairs", tokenizer)


def test_no_more_batches_are_read_than_asked_for(tmp_path, tokenizer):
    file = write_rows(tmp_path / "pairs.jsonl", make_rows(9))
    counts = [len(load_pairs(options("--batch-size", 2), tokenizer, str(file), "valid", n)) for n in (-1, 1, 3, 99)]
    assert counts == [9, 2, 6, 9]


# ------------------------------------------------------------------------------------------------------------ templates


def written(tokenizer, ids):
    return [tokenizer.decode(part) for part in ids[:3]]


def test_prompt_and_answers_are_what_the_template_writes(tokenizer):
    ids = encode_pair(tokenizer, [*EARLIER, USER], ASSISTANT, OTHER[0])
    prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in [*EARLIER, USER])
    answers = ["A<|im_end|>\n", "B<|im_end|>\n"]
    assert written(tokenizer, ids) == [prompt + "<|im_start|>assistant\n", *answers] and ids[3] == 0


def test_where_a_template_writes_the_prompts_end_anew_it_is_the_answers(tmp_path):
    """As Qwen3's does: the generation prompt opens a thought, the whole conversation has none."""
    tokenizer = tokenizer_of(tmp_path, CHATML.replace("assistant\\n{% endif %}", "assistant\\n<think>{% endif %}"))
    prompt, chosen, rejected = written(tokenizer, encode_pair(tokenizer, [USER], ASSISTANT, OTHER[0]))
    assert prompt.endswith("<|im_start|>assistant\n") and (chosen, rejected) == ("A<|im_end|>\n", "B<|im_end|>\n")


@pytest.mark.parametrize("template", [CHATML, "<s>" + CHATML, None])
def test_the_first_token_is_written_once(tmp_path, template):
    """By the template, by the tokenizer, or by both."""
    tokenizer = tokenizer_of(tmp_path, template, bos="<s>")
    for side in (parts := encode_pair(tokenizer, [USER], ASSISTANT, OTHER[0]))[1:3]:
        assert (parts[0] + side).count(tokenizer.bos_token_id) == 1 and parts[0][0] == tokenizer.bos_token_id


def test_without_a_template_only_the_answers_end(tmp_path):
    """The tokenizer ends every text with its EOS, as add_eos_token makes it."""
    tokenizer_of(tmp_path, None, bos="<s>")
    core = json.loads((tmp_path / "tokenizer.json").read_text())
    core["post_processor"]["single"].append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}})
    end = {"id": "<|im_end|>", "ids": [SPECIAL.index("<|im_end|>")], "tokens": ["<|im_end|>"]}
    core["post_processor"]["special_tokens"]["<|im_end|>"] = end
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Q")[-1] == tokenizer.eos_token_id
    parts = written(tokenizer, encode_pair(tokenizer, [USER], ASSISTANT, OTHER[0]))
    assert parts == ["<s>Q", "A<|im_end|>", "B<|im_end|>"]


DATED = "{%- macro head() -%}Today: {{ strftime_now('%d %b %Y') }}. {%- endmacro -%}{{ head() }}" + CHATML


@pytest.mark.parametrize("template", [DATED, "{{ 'It is ' + strftime_now('%Y-%m-%d') }}" + CHATML])
def test_a_templates_date_is_the_same_on_every_day(tmp_path, monkeypatch, template):
    import datetime

    import transformers.utils.chat_template_utils as theirs

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 5, 9)

    tokenizer = tokenizer_of(tmp_path, template)
    today = encode_pair(tokenizer, [USER], ASSISTANT, OTHER[0])
    monkeypatch.setattr(theirs, "datetime", Tomorrow)
    assert "2031" in tokenizer.apply_chat_template([USER], tokenize=False)  # the template does ask for the date
    assert encode_pair(tokenizer, [USER], ASSISTANT, OTHER[0]) == today
    assert "26 Jul 2024" in tokenizer.decode(today[0])


CUTS = (  # as DeepSeek-R1's: the thoughts of an answer go
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content }}{% endfor %}"
)


def test_thoughts_that_a_template_cuts_are_counted_and_said(tmp_path, tokenizer, capsys):
    thinking = FORMS["texts"] | {"chosen": "<think>\nHm.\n</think>\n\nA"}
    field = FORMS["texts"] | {"chosen": [ASSISTANT | {"reasoning_content": "Hm."}]}
    file = write_rows(tmp_path / "pairs.jsonl", [thinking, field, *make_rows(4)])
    warning = "warning: the chat template leaves a part of {} answers out, as thoughts: it is not trained on\n"
    for template, count in ((CUTS, 2), (CHATML, 1), (MISTRAL, 1)):  # the field is nowhere in any of them
        load_pairs(options(), tokenizer_of(tmp_path / "other", template), str(file), "train")
        assert capsys.readouterr().out.split("turns\n")[1] == warning.format(count)
    write_rows(file, [FORMS["fields that no template reads"], *make_rows(4)])
    load_pairs(options(), tokenizer_of(tmp_path / "other", MISTRAL), str(file), "train")
    assert "warning" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- truncation


def test_what_is_too_long_loses_old_turns_and_nothing_else(tmp_path, tokenizer, capsys):
    """At every limit: system and last turn stay, the answers are whole, and no more goes than must."""
    system = {"role": "system", "content": "Be brief."}
    turns = [turn for i in range(5) for turn in (USER | {"content": f"Question {i}?"}, ASSISTANT)]
    row = {"messages": [system, *turns, USER], "chosen": "Ten minutes on foot.", "rejected": "I could not say."}
    file = write_rows(tmp_path / "pairs.jsonl", [row])
    answers = [{"role": "assistant", "content": row[side]} for side in ("chosen", "rejected")]
    kept = [encode_pair(tokenizer, [system, *turns[i:], USER], *answers) for i in range(0, 11, 2)]
    sizes = [len(ids[0]) + max(len(ids[1]), len(ids[2])) for ids in kept]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 2
    for limit in range(sizes[-1], sizes[0] + 2):
        [pair] = load_pairs(options("--max-seq-length", limit), tokenizer, str(file), "train")
        expected = next(ids for ids, size in zip(kept, sizes) if size <= limit)
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == expected[:3]
        said = f"1 of 1 pairs (others: too long, equal answers), {int(limit < sizes[0])} lost old turns"
        assert said in capsys.readouterr().out
    assert load_pairs(options("--max-seq-length", sizes[-1] - 1), tokenizer, str(file), "train") == []
    assert "0 of 1 pairs" in capsys.readouterr().out


def test_answers_that_the_template_makes_equal_are_left_out_and_counted(tmp_path, capsys):
    row = FORMS["texts"] | {"rejected": "A "}
    file = write_rows(tmp_path / "pairs.jsonl", [row, FORMS["texts"]])
    tokenizer = tokenizer_of(tmp_path / "other", CHATML.replace("m.content", "m.content | trim"))
    assert len(load_pairs(options(), tokenizer, str(file), "train")) == 1
    assert "train: 1 of 2 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("rows", few([[FORMS["texts"]] * 5, make_rows(1)], 1))
def test_too_few_pairs_to_hold_some_out_is_said(tiny, tmp_path, rows):
    """All rows have one prompt, which must not be on both sides."""
    write_rows(tmp_path / "pairs.jsonl", rows)
    shown = run_script("--model", tiny, "--data", "pairs.jsonl", cwd=tmp_path)
    assert shown.returncode == 1 and "no pair is left to train on, or to measure" in shown.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------------------------- the bundled pairs


@pytest.fixture(scope="module")
def world():
    """data/make_tiny_chat.py, which made the bundled pairs and the model."""
    spec = importlib.util.spec_from_file_location("make_tiny_chat", ROOT / "data" / "make_tiny_chat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bundled(name):
    return [json.loads(line) for line in (ROOT / "data" / name).read_text().splitlines()]


def test_the_bundled_pairs_are_what_their_script_writes(world):
    for name, made in (("pairs", world.make_pairs(1, 480, held_out=False)), ("test", world.make_pairs(2, 100, True))):
        assert (ROOT / "data" / f"{name}.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in made)
    for row in bundled("pairs.jsonl") + bundled("test.jsonl"):
        assert (world.manner(row["chosen"]), world.manner(row["rejected"])) == ("helpful", "evasive")


@pytest.mark.slow
def test_no_bundled_test_prompt_is_in_any_training(world):
    test, pairs, corpus = bundled("test.jsonl"), bundled("pairs.jsonl"), world.make_corpus(0)
    world.check_held_out(test, pairs, corpus)


def test_length_does_not_tell_the_bundled_answers_apart(world):
    tokenizer = load_tokenizer(ROOT / "data" / "tiny-chat")
    for name in ("pairs.jsonl", "test.jsonl"):
        chosen, rejected, longer = world.length_report(bundled(name), lambda text: len(tokenizer.encode(text)))
        assert abs(chosen - rejected) < 0.05 * (chosen + rejected) / 2 and 0.45 <= longer <= 0.55
