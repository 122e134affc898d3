"""sample_pairs.py: a model's own answers as pairs, judged by stand-in servers; no model but the bundled one is loaded."""

import json
import os
import re
import subprocess
import sys
import threading

from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace

import huggingface_hub
import mlx_lm
import pytest
from conftest import ROOT, run_script, write_rows

import dpo_trainer
import sample_pairs

sys.path.insert(0, str(ROOT / "data"))
from make_tiny_chat import manner  # noqa: E402

PROMPTS = [{"prompt": f"How far is number {i}?"} for i in range(12)]
CURATED = [{**row, "chosen": f"It is {i} minutes."} for i, row in enumerate(PROMPTS)]
KEY = "sk-secret-0123456789"


def said(content, finish="stop", **message):
    return 200, {
        "choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}]
    }


def refused(code, message):
    return code, {"error": {"message": message, "type": "invalid_request_error"}}


def longer(body):
    """Answer as a judge that takes the longer answer."""
    a, b = body["messages"][0]["content"].split("\n\nAnswer A:\n")[1].split("\n\nAnswer B:\n")
    return said("A" if len(a) > len(b) else "B" if len(a) < len(b) else "TIE")


@pytest.fixture
def serve():
    """Start servers of f(body) -> (status, JSON or bytes); each has its address, and the bodies that it was sent."""
    servers = []

    def start(reply):
        class Handler(BaseHTTPRequestHandler):
            log_message = lambda *_: None

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append({**body, "headers": dict(self.headers), "path": self.path})
                status, out = reply(body)
                out = out if isinstance(out, bytes) else json.dumps(out).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(out)))
                self.end_headers()
                self.wfile.write(out)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.asked, server.url = True, [], f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    """Run main() in an empty folder, generator stood in for; return (rows written, printed, the error line or "")."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_pairs.time, "sleep", lambda _: None)
    monkeypatch.setattr(sample_pairs.signal, "signal", lambda *_: None)

    def run(rows, *words, answers=None, out="out", tokens=5, text=""):
        number = count()
        texts = answers or (lambda i: "far " * (i % 4 + 1))

        def generate(model, tokenizer, prompts, **options):
            found = [texts(next(number)) for _ in prompts]
            ends = [options["max_tokens"] if text.endswith("CUT") else tokens for text in found]
            return SimpleNamespace(texts=found, token_ids=[[1] * end for end in ends])

        if answers is not mlx_lm:
            monkeypatch.setattr(mlx_lm, "batch_generate", generate)
        write_rows("rows.jsonl", rows)
        open("rows.jsonl", "a").write(text)
        monkeypatch.setattr(sys, "argv", ["sample_pairs.py", "--data", "rows.jsonl", "--out", out, *map(str, words)])
        error = ""
        try:
            sample_pairs.main()
        except SystemExit as end:
            error = str(end)
        return written(out), capsys.readouterr().out, error

    return run


def written(out):
    files = [out] if out.endswith(".jsonl") else [f"{out}/{part}.jsonl" for part in ("train", "valid", "test")]
    return [json.loads(line) for file in files if os.path.exists(file) for line in open(file)]


# ---------------------------------------------------------------------------------------------------------- thoughts


THOUGHTS = r"""Just an answer. => Just an answer.
<think>\nA is better\n</think>\n\nB => B
They ask. A?\n</think>\n\nB => B
<think>\nOkay. Answer A says the herring is =>
<think>one</think>two<think>three =>
<thinking>A</thinking> B => B
<thought>A</thought>B => B
<seed:think>A</seed:think>B => B
<longcat_think>A</longcat_think>B => B
<reasoning>A</reasoning>\n<answer>B</answer> => <answer>B</answer>
[THINK]A[/THINK]B => B
[THINK]A =>
◁think▷A◁/think▷B => B
<|begin_of_thought|>A<|end_of_thought|>B => B
<|START_THINKING|>A<|END_THINKING|><|START_RESPONSE|>B<|END_RESPONSE|> => B
<|think:start|>A<|think:end|>B => B
<|open|>think<|sep|>A<|close|>think<|sep|>B => B
<|channel>thought\nA<channel|>B => B
<|channel>thought\nA =>
<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B<|return|> => B
<|channel|>analysis<|message|>A =>
<|channel|>commentary to=functions.send<|message|>A =>
<|channel|>final <|constrain|>json<|message|>B => B
analysisThey ask.assistantfinalB => B
analysisThey ask =>
<|inner_prefix|>A<|inner_suffix|>B => B
A model writes `<think>` before it thinks. => A model writes `<think>` before it thinks.
See [thinking](a.html), <b>think</b>, analysis of x. => See [thinking](a.html), <b>think</b>, analysis of x."""


@pytest.mark.parametrize("line", THOUGHTS.splitlines())
def test_thoughts_are_cut_off(line):
    text, expected = line.replace("\\n", "\n").split(" =>")
    assert sample_pairs.cut_thoughts(text) == expected.strip()


VERDICTS = {
    "A": """A | A. | **A** | a | Answer A | Answer A. | answer: A | "A" | (A) | [[A]] | \\boxed{A} | {"verdict": "A"} |
        The better answer is A. | A is better | Answer A is better than answer B. | A because it states the hour. |
        A, since B is vague | I would say A | Verdict: A! | My choice: Answer A | A wins | **Answer A** is better. |
        Assistant A | Option A: it says when | A is clearly the better answer, as it is helpful | <think>B</think>A |
        Which is better, A or B? A | Final answer: **A** | A - it is shorter""",
    "B": "B | b | b. | Answer B | B.\n\nAnswer A does not say it. | Answer A is vague.\nB | <think>A or B? A.</think>\n\nB",
    "TIE": """TIE | tie | Tie. | It's a tie. | It is a tie | Both answers are equally good | Neither | A tie | **TIE** |
        Neither is better | They are both: TIE""",
    "": """ | C | Both | A and B | A or B | A is not better | Answer A says the herring is | Better is neither A | A/B |
        <think>A is better | Not A | It is not a tie | A. B. | A: it says so. B: it does not. | I cannot judge that. |
        Answer B is vague | As an AI I cannot say""",
}


@pytest.mark.parametrize("expected", VERDICTS)
def test_verdicts(expected):
    replies = [reply.strip(" ") for reply in VERDICTS[expected].replace("|\n       ", "|").split("|")]
    wrong = {reply: sample_pairs.read_verdict(reply) for reply in replies}
    assert {reply: found for reply, found in wrong.items() if found != expected} == {}
    assert sample_pairs.read_verdict(None) == ""  # cut by the limit


# -------------------------------------------------------------------------------------------------------------- rows

USER, GOOD, BAD = [
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "g"), ("assistant", "b"))
]
FORMS = [  # with a good answer
    {"prompt": "Q", "chosen": "g", "rejected": "b"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"messages": [USER], "chosen": "g", "rejected": "b"},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"messages": [USER, GOOD], "rejected": [BAD]},
    {"messages": [USER, GOOD]},
    {"prompt": "Q", "chosen": "g"},
    {"prompt": "Q", "completion": "g"},
    {"prompt": [USER], "completion": [GOOD], "label": True},
]
BARE = [
    {"prompt": [USER], "completion": [BAD], "label": False},
    {"prompt": "Q"},
    {"prompt": [USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]},
    {"prompt": "Q", "chosen": " "},
]


@pytest.mark.parametrize("row", FORMS + BARE)
def test_forms_of_rows(row):
    found = sample_pairs.read_row({**row, "weight": None})
    assert (found["prompt"], found["weight"], found["shown"]) == ([USER], 1.0, "Q")
    assert (found["chosen"] or "") == ("g" if row in FORMS else "")


def test_a_system_message_and_earlier_turns_are_part_of_the_prompt():
    found = sample_pairs.read_row({"system": "S", "messages": [USER, GOOD, USER], "weight": 0.5})
    assert [turn["role"] for turn in found["prompt"]] == ["system", "user", "assistant", "user"]
    assert (found["shown"], found["weight"], found["chosen"]) == (
        "system: S\n\nuser: Q\n\nassistant: g\n\nuser: Q",
        0.5,
        "",
    )


WRONG_ROWS = {
    '{"prompt": "Q"': "rows.jsonl:2: ",
    "[1]": "rows.jsonl:2: ",
    "": "rows.jsonl:2: ",
    '{"text": "Q"}': "no prompt",
    '{"prompt": 5}': "rows.jsonl:2: ",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "a message must be a text",
    '{"messages": [{"role": "system", "content": "S"}]}': "ends in a user's turn",
    '{"prompt": "Q", "tools": [{}]}': "tools",
    '{"prompt": "Q", "weight": "x"}': "could not convert",
}


@pytest.mark.parametrize("line", WRONG_ROWS)
def test_a_wrong_row_is_named(sample, line):
    _, printed, error = sample([], text=f'{{"prompt": "Q"}}\n{line}\n')
    assert printed == "" and error.startswith("rows.jsonl:2: ") and WRONG_ROWS[line] in error


WRONG_WORDS = [
    ("--data none.jsonl", "none.jsonl: "),
    ("--out rows.jsonl", "rows.jsonl: it is there already"),
    ("--batch-size 0", "options: "),
    ("--temp -1", "options: "),
    ("--samples 0", "options: "),
    ("--best", "unrecognized arguments: --best"),
    ("--model none", "none: "),
    ("--adapter-path none", "none: "),
    ("--judge none --samples 2", "none: "),
]


@pytest.mark.parametrize("words, problem", WRONG_WORDS)
def test_wrong_options_are_named(sample, monkeypatch, words, problem):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = sample(CURATED[:1], *words.split())[2]
    assert problem in error and "\n" not in error


def test_no_row_of_use(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    done = run_script("--data", "prompts.jsonl", "--out", "out", script="sample_pairs.py", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "rows: 0 of 12" in done.stdout
    assert done.stderr.startswith("out: no pair: ") and os.listdir(tmp_path) != []


# ----------------------------------------------------------------------------------------------------------- answers


def test_rejected_answers_to_good_ones(sample):
    rows, printed, error = sample(CURATED, answers=lambda i: "<think>\nThey ask.\n</think>\n\nI could not say.")
    assert not error and len(rows) == 12 and {row["signal"] for row in rows} == {"generated"}
    assert {row["rejected"][0]["content"] for row in rows} == {"I could not say."}
    assert sorted(row["chosen"][0]["content"] for row in rows) == sorted(row["chosen"] for row in CURATED)
    assert {row["weight"] for row in rows} == {0.5}
    args = dpo_trainer.parse_args(["--model", "data/tiny-chat", "--data", "out"])
    assert all(dpo_trainer.read_pair(row, args)["prompt"] == row["prompt"] for row in rows)


def test_answers_that_teach_nothing_are_left_out_and_counted(sample):
    texts = ["It is 0 minutes.", "", "<think>no end", "on and on CUT", "fine", "fine", "other", "  "]
    rows, printed, _ = sample(CURATED[:1], "--samples", 8, answers=texts.__getitem__)
    assert [row["rejected"][0]["content"] for row in rows] == ["fine", "other"]
    assert "2 kept, 2 equal, 3 empty, 1 cut by --max-tokens" in printed


def test_splits_are_by_prompt_and_the_same_in_every_round(sample):
    places = []
    for seed, texts in ((0, "one {}"), (0, "two {}"), (1, "one {}")):
        sample(PROMPTS * 2 + [{"prompt": f"More {i}"} for i in range(60)], "--samples", 3, "--judge", "reward",
               "--seed", seed, answers=lambda i: texts.format("x " * (i % 3)), out=f"out{len(places)}")  # fmt: skip
        places.append({json.dumps(row["prompt"]): part for part in ("train", "valid", "test")
                       for row in map(json.loads, open(f"out{len(places)}/{part}.jsonl"))})  # fmt: skip
    assert places[0] == places[1] != places[2] and len(places[0]) == 72
    assert 2 <= sum(part == "test" for part in places[0].values()) <= 16


def test_one_file_and_stale_parts(sample):
    assert len(sample(CURATED, out="pairs.jsonl")[0]) == 12
    sample(CURATED)
    left = sorted(os.listdir("out"))
    assert len(sample(CURATED[:1])[0]) == 1 and len(os.listdir("out")) == 1 < len(left)


def test_prompts_are_encoded_as_the_trainers_do(tiny, sample, monkeypatch):
    found = []
    generate = lambda model, tokenizer, prompts, **_: found.extend([tokenizer, *prompts]) or 1 / 0
    rows = [{"system": "S", "prompt": "How far?", "chosen": "Ten."}]
    monkeypatch.setattr(mlx_lm, "batch_generate", generate)
    assert "division" in sample(rows, "--model", tiny, answers=mlx_lm)[2]
    row = dpo_trainer.read_pair({**rows[0], "rejected": "No."}, dpo_trainer.parse_args(["--model", "x", "--data", "y"]))
    assert found[1:] == [dpo_trainer.encode_pair(found[0], row["prompt"], row["chosen"], row["rejected"])[0]]


def test_a_thought_that_the_template_begins(tmp_path, sample):
    from conftest import CHATML, save_model

    model = save_model(tmp_path / "thinker", template=CHATML.replace("assistant\n", "assistant\n<think>\n"))
    rows = sample(CURATED[:2], "--model", model, answers=["No end", "They ask.</think>Go."].__getitem__)[0]
    assert [row["rejected"][0]["content"] for row in rows] == ["Go."]


def test_answers_are_seeded_and_a_killed_run_goes_on(sample, monkeypatch):
    real, words = mlx_lm.batch_generate, ("--max-tokens", 12, "--batch-size", 2, "--temp", 1)
    answers = lambda out, *more: (
        sample(CURATED[:6], *words, *more, out=out, answers=mlx_lm) and open(f"{out}.done.jsonl").read()
    )
    whole, other = answers("a.jsonl"), answers("b.jsonl", "--seed", 1)
    calls = count()
    monkeypatch.setattr(mlx_lm, "batch_generate", lambda *a, **k: real(*a, **k) if next(calls) < 2 else 1 / 0)
    part = answers("c.jsonl")
    with open("c.jsonl.done.jsonl", "a") as file:
        file.write('\n["half a li')
    monkeypatch.setattr(mlx_lm, "batch_generate", lambda *a, **k: next(calls) and real(*a, **k))
    said = lambda text: [json.loads(line)[1] for line in text.splitlines() if line.endswith("]")]
    resumed = answers("c.jsonl")
    assert whole.startswith(part) and said(resumed) == said(whole) != said(other) and next(calls) == 4


# ------------------------------------------------------------------------------------------------------------- judge


def test_every_two_answers_in_both_orders(sample, serve):
    server = serve(longer)
    words = ("--samples", 4, "--judge", server.url + "/", "--judge-model", "m", "--judge-tokens", 99)
    rows, printed, error = sample(PROMPTS[:3], *words)
    assert not error and len(rows) == 18 and len(server.asked) == 36 and "18 agree, 0 tie" in printed
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows)
    assert "first wins 18 times, the other one 18 times" in printed
    best = max(rows, key=lambda row: len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]))
    assert best["verdicts"] == {"chosen": {"won": 3}, "rejected": {"lost": 3}} and best["signal"] == "judged"
    asked = server.asked[0]
    assert (asked["path"], asked["model"], asked["max_tokens"]) == ("/v1/chat/completions", "m", 99)
    assert sample(PROMPTS[:3], *words)[0] == rows and len(server.asked) == 36  # nothing is asked twice
    rows = sample(PROMPTS[:3], *words, "--best-of")[0]
    assert [row["verdicts"] for row in rows] == [best["verdicts"]] * 3 and len(server.asked) == 36


def test_a_judge_that_goes_by_the_place_makes_no_pair(sample, serve):
    rows, printed, error = sample(PROMPTS[:2], "--judge", serve(lambda _: said("A")).url)
    assert rows == [] and "0 agree, 0 tie, 12 contradict" in printed and error.startswith("out: no pair: ")
    assert "first wins 24 times, the other one 0 times" in printed


def test_ties_and_unclear_replies(sample, serve):
    for reply, counts in (("TIE", "0 agree, 6 tie, 0 contradict, 0 unclear"), ("Hm", "0 tie, 0 contradict, 6 unclear")):
        assert counts in sample(PROMPTS[:1], "--judge", serve(lambda _: said(reply)).url)[1]


THOUGHT = "<think>\nAnswer A says the herring is cheap. A is better.\n</think>\n\n"
THINKERS = {  # what a judge says that would take the longer answer
    "in tags": lambda body, word: said(THOUGHT + word),
    "in a field": lambda body, word: said(word, reasoning_content="A is better"),
    "in parts": lambda body, word: said([{"type": "thinking", "thinking": []}, {"type": "text", "text": word}]),
    "in a channel": lambda body, word: said(f"<|channel|>analysis<|message|>A<|end|><|channel|>final<|message|>{word}"),
}
CUT = {
    "in tags": said(THOUGHT[:60], "length"),
    "in tags, no reason": said(THOUGHT[:60]),
    "without tags": said("Okay. Answer A is better", "length"),
    "in a field": said("", "length", reasoning="A is better"),
    "null": said(None, "length", reasoning_content="A"),
    "null at the end": said(None, reasoning_content="A"),
}


@pytest.mark.parametrize("kind", THINKERS)
def test_thoughts_of_a_judge_are_no_verdict(sample, serve, kind):
    server = serve(lambda body: THINKERS[kind](body, longer(body)[1]["choices"][0]["message"]["content"]))
    assert len(sample(PROMPTS[:1], "--judge", server.url)[0]) == 6


@pytest.mark.parametrize("kind", CUT)
def test_thoughts_without_an_end_are_no_verdict(sample, serve, kind):
    assert "6 unclear" in sample(PROMPTS[:1], "--judge", serve(lambda body: CUT[kind]).url)[1]


def test_a_server_that_wants_other_names(sample, serve):
    def newer(body):
        if "max_tokens" in body:
            return refused(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return refused(400, "Unsupported value: 'temperature'") if "temperature" in body else longer(body)

    server = serve(newer)
    assert len(sample(PROMPTS[:2], "--judge", server.url)[0]) == 12
    assert sum("max_completion_tokens" in body for body in server.asked) == 24


TROUBLE = {  # what a server says, and how often it is asked about one question
    "refusal": (refused(400, "This model's maximum context length is 512 tokens"), "maximum context length is 512", 1),
    "no model": ((404, {"error": "model 'm' not found, try pulling it first"}), "model 'm' not found", 1),
    "wrong key": (refused(401, f"Incorrect API key provided: {KEY}"), "Incorrect API key provided: OPENAI_API_KEY", 1),
    "detail": ((422, {"detail": "Field required"}), "Field required", 1),
    "page": (
        (502, b"<html><style>a{}</style><h1>Bad Gateway</h1></html>"),
        "502: Bad Gateway: Bad Gateway: the same",
        5,
    ),
    "crowd": (refused(429, "Slow down"), "Slow down", 5),
    "no choices": ((200, {"choices": []}), '{"choices": []}', 5),
    "error, but 200": ((200, {"error": {"message": "Provider is down"}}), "Provider is down", 5),
    "no JSON": ((200, b"<html>Ollama is running</html>"), "Ollama is running", 5),
    "nothing": ((500, b""), "HTTP Error 500", 5),
    "bytes": ((500, b"\xff\xfe"), "HTTP Error 500", 5),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_is_shown_in_the_servers_words(sample, serve, monkeypatch, kind):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    answer, words, times = TROUBLE[kind]
    server = serve(lambda _: answer)
    _, printed, error = sample(PROMPTS[:1], "--samples", 2, "--judge", server.url, "--batch-size", 1)
    assert error.startswith(f"{server.url}/chat/completions: ") and words in error and "\n" not in error
    assert len(server.asked) in (times, 2 * times) and server.asked[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    files = "".join(open(path).read() for path in os.listdir() if os.path.isfile(path))
    assert KEY not in printed + error + files


def test_a_server_that_is_not_there(sample):
    _, _, error = sample(PROMPTS[:1], "--judge", "http://127.0.0.1:9/v1")
    assert error.startswith("http://127.0.0.1:9/v1/chat/completions: ") and "refused" in error


def test_trouble_that_passes_and_a_run_that_goes_on(sample, serve):
    tries = Counter()
    busy = lambda body: tries.update([str(body)]) or tries[str(body)] < 3
    server = serve(lambda body: (500, b"busy") if busy(body) else longer(body))
    assert len(sample(PROMPTS[:2], "--judge", server.url)[0]) == 12 and set(tries.values()) == {3}
    number, server = count(), serve(lambda body: longer(body) if next(number) < 10 else refused(400, "No more"))
    words = ("--judge", server.url, "--batch-size", 1)
    assert "No more" in sample(PROMPTS[:2], *words, out="two")[2] and len(server.asked) in (11, 12)
    number = count(-1000)
    assert len(sample(PROMPTS[:2], *words, out="two")[0]) == 12 and len(server.asked) in (25, 26)


def test_a_local_model_as_the_judge(sample):
    rows, printed, _ = sample(PROMPTS[:1], "--samples", 2, "--judge", ROOT / "data/tiny-chat",
                              answers=["one", "two", "<think>B</think>A", "B"].__getitem__)  # fmt: skip
    assert [row["chosen"][0]["content"] for row in rows] == ["one"] and "1 agree" in printed


def test_a_reward_of_ones_own(sample, monkeypatch):
    monkeypatch.setattr(sample_pairs, "reward", lambda prompt, answer: -len(answer) if "number" in prompt else 1 / 0)
    rows = sample(PROMPTS[:2], "--judge", "reward", "--samples", 3)[0]
    assert len(rows) == 6 and all(row["chosen"][0]["content"] < row["rejected"][0]["content"] for row in rows)


@pytest.mark.parametrize("name", ["need", "blame", "to_messages", "PLAIN"])
def test_what_the_scripts_share_is_one_text(name):
    find = lambda script: re.search(
        rf"^(@.*\n)?(def {name}\(|{name} = )(.*\n)((    .*)?\n)*", (ROOT / script).read_text(), re.M
    )
    assert find("sample_pairs.py")[0].strip() == find("dpo_trainer.py")[0].strip()


# ------------------------------------------------------------------------------------------------------------ rounds


@pytest.mark.slow
def test_two_rounds_from_prompts_alone(tmp_path, serve):
    """Answers that state the fact win: greedy helpful answers to the test rows rise from 29 to 85 or more of 100."""

    def states_the_fact(body):
        a, b = body["messages"][0]["content"].split("\n\nAnswer A:\n")[1].split("\n\nAnswer B:\n")
        helpful = manner(a) == "helpful", manner(b) == "helpful"
        return said({(True, False): "A", (False, True): "B"}.get(helpful, "TIE"))

    def run(script, *words):
        done = run_script(*words, script=script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    url = serve(states_the_fact).url
    rows = [json.loads(line) for line in open(ROOT / "data/pairs.jsonl")][:200]
    write_rows(tmp_path / "prompts.jsonl", [{k: row[k] for k in ("prompt", "messages") if k in row} for row in rows])
    ask = ("--data", "prompts.jsonl", "--samples", 4, "--judge", url)
    run("sample_pairs.py", *ask, "--out", "round1")
    run("dpo_trainer.py", "--data", "round1", "--adapter-path", "a1")
    run("sample_pairs.py", *ask, "--out", "round2", "--adapter-path", "a1")
    words = ("--data", "round2", "--adapter-path", "a2", "--resume-adapter-file", "a1/adapters.safetensors")
    printed = run("dpo_trainer.py", *words)
    kl = [float(value) for value in re.findall(r"at a kl of ([\d.]+)", printed)]
    model, tokenizer = mlx_lm.load(str(ROOT / "data/tiny-chat"), adapter_path=str(tmp_path / "a2"))
    rows = [sample_pairs.read_row(json.loads(line)) for line in open(ROOT / "data/test.jsonl")]
    ids = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    answers = mlx_lm.batch_generate(model, tokenizer, ids, max_tokens=128).texts
    assert sum(manner(text) == "helpful" for text in answers) >= 85 and kl and max(kl) < 1
