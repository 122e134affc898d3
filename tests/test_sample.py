"""sample_pairs.py: a model's own answers as pairs, ranked by stand-in servers; the generator is stood in for, too."""

import json
import os
import re
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace

import huggingface_hub
import mlx_lm
import pytest
from conftest import CHATML, ROOT, run_script, save_model, write_rows

import dpo_trainer
import sample_pairs

PROMPTS = [{"prompt": f"How far is number {i}?"} for i in range(12)]
CURATED = [{**row, "chosen": f"It is {i} minutes."} for i, row in enumerate(PROMPTS)]
KEY = "sk-secret-0123456789"


def said(content, finish="stop", **message):
    return 200, {
        "choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}]
    }


def refused(code, message):
    return code, {"error": {"message": message}}


def shown(body):
    return body["messages"][0]["content"].split("\n\nAnswer A:\n")[1].split("\n\nAnswer B:\n")


def longer(body):
    a, b = shown(body)
    return "A" if len(a) > len(b) else "B" if len(a) < len(b) else "TIE"


@pytest.fixture
def serve():
    """Start servers of f(body) -> (status, JSON or bytes); each has its url, and the bodies that it was asked."""
    servers = []

    def start(reply):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append({**body, "key": self.headers["Authorization"], "path": self.path})
                status, out = reply(body)
                out = out if isinstance(out, bytes) else json.dumps(out).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(out)))
                self.end_headers()
                self.wfile.write(out)

        kind = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 64, "daemon_threads": True})
        server = kind(("127.0.0.1", 0), Handler)
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    """Run main() in an empty folder; return (rows written, what is printed, the error line or "")."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_pairs.time, "sleep", lambda _: None)
    monkeypatch.setattr(sample_pairs.signal, "signal", lambda *_: None)

    def run(rows, *words, answers=lambda i: "far " * (i % 4 + 1), out="out"):
        number = count()

        def generate(model, tokenizer, prompts, max_tokens, **options):
            texts = [answers(next(number)) for _ in prompts]
            return SimpleNamespace(
                texts=texts, token_ids=[[1] * (max_tokens if "CUT" in text else 5) for text in texts]
            )

        if answers:
            monkeypatch.setattr(mlx_lm, "batch_generate", generate)
        write_rows("rows.jsonl", rows) if isinstance(rows, list) else open("rows.jsonl", "w").write(rows)
        monkeypatch.setattr(sys, "argv", ["", "--data", "rows.jsonl", "--out", out, *map(str, words)])
        error = ""
        try:
            sample_pairs.main()
        except SystemExit as end:
            error = str(end)
        files = [out] if out.endswith(".jsonl") else [f"{out}/{part}.jsonl" for part in ("train", "valid", "test")]
        found = [json.loads(line) for file in files if os.path.exists(file) for line in open(file)]
        return found, capsys.readouterr().out, error

    return run


THOUGHTS = r"""Just an answer. => Just an answer. ; <think>\nA is better\n</think>\n\nB => B ; [THINK]A[/THINK]B => B
They ask. A?\n</think>\n\nB => B ; <think>\nOkay. Answer A says the herring is => ; <think>A</think>B<think>three =>
<thinking>A</thinking> B => B ; <thought>A</thought>B => B ; <seed:think>A</seed:think>B => B ; [THINK]A =>
<longcat_think>A</longcat_think>B => B ; <reasoning>A</reasoning>\n<answer>B</answer> => <answer>B</answer>
◁think▷A◁/think▷B => B ; <|begin_of_thought|>A<|end_of_thought|>B => B ; <|think:start|>A<|think:end|>B => B
<|START_THINKING|>A<|END_THINKING|><|START_RESPONSE|>B<|END_RESPONSE|> => B ; <|channel>thought\nA =>
<|open|>think<|sep|>A<|close|>think<|sep|>B => B ; <|channel>thought\nA<channel|>B => B ; analysisThey ask =>
<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B<|return|> => B
<|channel|>analysis<|message|>A => ; <|channel|>commentary to=functions.send<|message|>A =>
<|channel|>final <|constrain|>json<|message|>B => B ; analysisThey ask.assistantfinalB => B
<|inner_prefix|>A<|inner_suffix|>B => B ; A `<think>` is a mark. => A `<think>` is a mark.
See [thinking](a.html), <b>think</b>, analysis of x. => See [thinking](a.html), <b>think</b>, analysis of x."""
THOUGHTS = [case.split(" =>") for line in THOUGHTS.splitlines() for case in line.replace("\\n", "\n").split(" ; ")]


@pytest.mark.parametrize("text, expected", THOUGHTS)
def test_thoughts_are_cut_off(text, expected):
    assert sample_pairs.cut_thoughts(text) == expected.strip()


VERDICTS = {
    "A": """A|A.|**A**|a|Answer A|answer: A|"A"|(A)|[[A]]|\\boxed{A}|{"verdict": "A"}|The better answer is A.|Verdict: A
|A is better|Answer A is better than answer B.|A because it states the hour.|A, since B is vague|I would say A|A</s>
|My choice: Answer A|A wins|**Answer A** is better.|Assistant A|Option A: it says when|answer a is better|A - shorter
|A is clearly the better answer, as it is helpful|<think>B</think>A|Which is better, A or B? A|<answer>A</answer>""",
    "B": "B|b.|answer b|Answer B|B.\n\nAnswer A does not say it.|Answer A is vague.\nB|<think>A or B? A.</think>\n\nB",
    "TIE": "TIE|tie|Tie.|It's a tie.|Both answers are equally good|Neither|A tie|**TIE**|Neither is better|Both: TIE",
    "": """|C|Both|A and B|A or B|A is not better|Answer A says the herring is|A/B|<think>A is better|Not A
|It is not a tie|A. B.|A: it says so. B: it does not.|I cannot judge that.|Answer B is vague|As an AI I cannot say""",
}


@pytest.mark.parametrize("expected", VERDICTS)
def test_verdicts(expected):
    found = {reply: sample_pairs.read_verdict(reply) for reply in VERDICTS[expected].split("|")}
    assert {reply: verdict for reply, verdict in found.items() if verdict != expected} == {}
    assert sample_pairs.read_verdict(None) == ""  # the limit cut it


USER, GOOD, BAD = [
    dict(role=role, content=text) for role, text in (("user", "Q"), ("assistant", "g"), ("assistant", "b"))
]
FORMS = [  # of rows that have a good answer
    {"prompt": "Q", "chosen": "g", "rejected": "b"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"messages": [USER], "chosen": "g", "rejected": "b"},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"messages": [USER, GOOD]},
    {"prompt": [USER], "completion": [GOOD], "label": True},
]
BARE = [{"prompt": [USER], "completion": [BAD], "label": False}, {"prompt": "Q"}, {"prompt": "Q", "chosen": " "}]
BARE += [{"prompt": [USER]}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]}]


@pytest.mark.parametrize("row", FORMS + BARE)
def test_forms_of_rows(row):
    found = sample_pairs.read_prompt({**row, "weight": None})
    assert (found["prompt"], found["weight"], found["shown"]) == ([USER], 1.0, "Q")
    assert (found["chosen"] or "") == ("g" if row in FORMS else "")
    found = sample_pairs.read_prompt({"system": "S", "messages": [USER, GOOD, USER], "weight": 0.5})
    assert (found["shown"], found["weight"]) == ("system: S\n\nuser: Q\n\nassistant: g\n\nuser: Q", 0.5)


WRONG = {  # a second row, or options: what is wrong
    '{"prompt": "Q"': "rows.jsonl:2: Expecting ',' delimiter",
    '{"text": "Q"}': "rows.jsonl:2: no prompt",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "rows.jsonl:2: a message must be a text",
    '{"messages": [{"role": "system", "content": "S"}]}': "rows.jsonl:2: no prompt, or none that ends in a user's turn",
    '{"prompt": "Q", "tools": [{}]}': "rows.jsonl:2: rows with tools",
    '{"prompt": "Q", "weight": "x"}': "rows.jsonl:2: could not convert",
    "--data none.jsonl": "none.jsonl: ",
    "--out rows.jsonl": "rows.jsonl: it is there already",
    "--batch-size 0": "options: ",
    "--model none": "none: ",
    "--adapter-path none": "none: ",
    "--judge none": "none: ",
    "--judge http://127.0.0.1:9/v1": "http://127.0.0.1:9/v1/chat/completions: <urlopen error [Errno 111] Connection",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(sample, monkeypatch, what):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = what.split() if what.startswith("--") else []
    error = sample(json.dumps(CURATED[0]) + ("" if words else f"\n{what}\n"), *words)[2]
    assert error.startswith(WRONG[what]) and "\n" not in error


def test_rejected_answers_to_good_ones(sample):
    rows, _, error = sample(CURATED, answers=lambda i: "<think>\nThey ask.\n</think>\n\nI could not say.")
    assert not error and {(row["signal"], row["weight"]) for row in rows} == {("generated", 0.5)}
    assert {row["rejected"][0]["content"] for row in rows} == {"I could not say."}
    assert sorted(row["chosen"][0]["content"] for row in rows) == sorted(row["chosen"] for row in CURATED)
    args = dpo_trainer.parse_args(["--model", "data/tiny-chat", "--data", "out"])
    assert all(dpo_trainer.read_pair(row, args)["prompt"] == row["prompt"] for row in rows)
    assert len(sample(CURATED[:1])[0]) == 1 == len(os.listdir("out"))  # no part of an earlier run is left
    # answers that teach nothing are left out and counted
    texts = ["It is 0 minutes.", "", "<think>no end", "on and on CUT", "fine", "fine", "other", "  "]
    rows, printed, _ = sample(CURATED[:1], "--samples", 8, out="one.jsonl", answers=texts.__getitem__)
    assert [row["rejected"][0]["content"] for row in rows] == ["fine", "other"]
    assert "2 kept, 2 equal, 3 empty, 1 cut by --max-tokens" in printed


def test_splits_are_by_prompt_and_the_same_in_every_round(sample):
    places, parts = [], ("train", "valid", "test")
    for i, (seed, text) in enumerate(((0, "one "), (0, "two "), (1, "one "))):
        words = ("--judge", "reward", "--samples", 3, "--seed", seed)
        sample(
            PROMPTS * 2 + [{"prompt": f"{i}"} for i in range(60)], *words, answers=lambda n: text * (n + 1), out=f"{i}"
        )
        files = {part: map(json.loads, open(f"{i}/{part}.jsonl")) for part in parts}
        places.append({(str(row["prompt"]), part) for part in parts for row in files[part]})
    assert places[0] == places[1] != places[2] and len(places[0]) == 72
    assert 2 <= sum(part == "test" for _, part in places[0]) <= 16


def test_prompts_are_encoded_as_the_trainers_do(tiny, sample, monkeypatch, tmp_path):
    found, row = [], {"system": "S", "prompt": "How far?", "chosen": "Ten.", "rejected": "No."}
    monkeypatch.setattr(mlx_lm, "batch_generate", lambda model, tokenizer, ids, **_: found.extend([tokenizer, *ids]))
    assert sample([row], "--model", tiny, answers=None)[2].startswith(str(tiny))
    pair = dpo_trainer.read_pair(row, dpo_trainer.parse_args(["--model", "x", "--data", "y"]))
    assert found[1:] == [dpo_trainer.encode_pair(found[0], pair["prompt"], pair["chosen"], pair["rejected"])[0]]
    thinker = save_model(tmp_path / "thinker", template=CHATML.replace("assistant\n", "assistant\n<think>\n"))
    rows = sample(CURATED[:2], "--model", thinker, answers=["No end", "They ask.</think>Go."].__getitem__)[0]
    assert [row["rejected"][0]["content"] for row in rows] == ["Go."]  # the template began the thought


def test_answers_are_seeded_and_a_killed_run_goes_on(sample, monkeypatch):
    real, calls = mlx_lm.batch_generate, count()

    def kept(out, *more):
        sample(CURATED[:6], "--max-tokens", 12, "--batch-size", 2, *more, out=out, answers=None)
        lines = open(f"{out}.done.jsonl").read().splitlines()
        return [json.loads(line)[1] for line in lines if line.endswith("]")]

    whole, other = kept("a.jsonl"), kept("b.jsonl", "--seed", 1)
    monkeypatch.setattr(mlx_lm, "batch_generate", lambda *a, **k: real(*a, **k) if next(calls) < 2 else 1 / 0)
    assert kept("c.jsonl") == whole[:4]
    open("c.jsonl.done.jsonl", "a").write('\n["half a li')
    monkeypatch.setattr(mlx_lm, "batch_generate", lambda *a, **k: next(calls) and real(*a, **k))
    assert kept("c.jsonl") == whole != other and next(calls) == 4


def test_every_two_answers_in_both_orders(sample, serve):
    server = serve(lambda body: said(longer(body)))
    words = ("--samples", 4, "--judge", server.url + "/", "--judge-model", "m", "--judge-tokens", 99)
    rows, printed, error = sample(PROMPTS[:3], *words)
    assert not error and len(rows) == 18 and len(server.asked) == 36 and "18 agree, 0 tie" in printed
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows)
    assert {row["signal"] for row in rows} == {"judged"} and "first wins 18 times, the other one 18 times" in printed
    asked = [server.asked[0][name] for name in ("path", "model", "max_tokens", "temperature")]
    assert asked == ["/v1/chat/completions", "m", 99, 0]
    assert sample(PROMPTS[:3], *words)[0] == rows
    rows = sample(PROMPTS[:3], *words, "--best-of")[0]
    assert [row["verdicts"] for row in rows] == [{"chosen": {"won": 3}, "rejected": {"lost": 3}}] * 3
    assert len(server.asked) == 36  # nothing was asked twice


THOUGHT = "<think>\nAnswer A says the herring is cheap. A is better.\n</think>\n\n"
CHANNEL = "<|channel|>analysis<|message|>A is better<|end|><|start|>assistant<|channel|>final<|message|>"
REPLIES = {  # kind of judge: (its reply to a question, what is counted)
    "the first": (lambda body: said("A"), "0 agree, 0 tie, 6 contradict, 0 unclear"),
    "tie": (lambda body: said("TIE"), "0 agree, 6 tie, 0 contradict, 0 unclear"),
    "thinks": (lambda body: said(THOUGHT + longer(body)), "6 agree"),
    "channels": (lambda body: said(CHANNEL + longer(body)), "6 agree"),
    "field": (lambda body: said(longer(body), reasoning_content="A is better"), "6 agree"),
    "parts": (lambda body: said([{"type": "thinking"}, {"type": "text", "text": longer(body)}]), "6 agree"),
    "cut": (lambda body: said(THOUGHT[:60]), "6 unclear"),
    "cut, no tags": (lambda body: said("Okay. Answer A is better", "length"), "6 unclear"),
    "cut, in a field": (lambda body: said("", "length", reasoning="A is better"), "6 unclear"),
    "null": (lambda body: said(None, reasoning_content="A"), "6 unclear"),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_what_a_judge_says_is_counted(sample, serve, kind):
    reply, counts = REPLIES[kind]
    rows, printed, error = sample(PROMPTS[:1], "--judge", serve(reply).url)
    assert counts in printed and len(rows) == (6 if "6 agree" in counts else 0)
    assert error.startswith("out: no pair: ") if not rows else not error
    assert kind != "the first" or "first wins 12 times, the other one 0 times" in printed


def test_a_server_that_wants_other_names(sample, serve):
    def newer(body):
        if "max_tokens" in body:
            return refused(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return refused(400, "Unsupported value: 'temperature'") if "temperature" in body else said(longer(body))

    server = serve(newer)
    assert len(sample(PROMPTS[:2], "--judge", server.url)[0]) == 12 and "max_completion_tokens" in server.asked[-1]


TROUBLE = {  # what a server says: what is shown of it, and how often it is asked about one question
    "refusal": (refused(400, "This model's maximum context length is 512"), "maximum context length is 512", 1),
    "no model": ((404, {"error": "model 'm' not found, try pulling it first"}), "model 'm' not found", 1),
    "wrong key": (refused(401, f"Incorrect API key: {KEY}"), "Incorrect API key: OPENAI_API_KEY", 1),
    "page": ((502, b"<html><style>a{}</style><h1>Bad\nGateway</h1></html>"), "502: Bad Gateway Bad Gateway: the", 5),
    "no choices": ((200, {"choices": []}), '{"choices": []}', 5),
    "error, but 200": ((200, {"error": {"message": "Provider is down"}}), "Provider is down", 5),
    "bytes": ((500, b"\xff\xfe"), "HTTP Error 500", 5),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_is_shown_in_the_servers_words_and_the_key_nowhere(sample, serve, monkeypatch, kind):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    answer, words, times = TROUBLE[kind]
    server = serve(lambda _: answer)
    _, printed, error = sample(PROMPTS[:1], "--samples", 2, "--judge", server.url, "--batch-size", 1)
    assert error.startswith(f"{server.url}/chat/completions: ") and words in error and "\n" not in error
    assert len(server.asked) == times and server.asked[0]["key"] == f"Bearer {KEY}"
    assert KEY not in printed + error + "".join(open(path).read() for path in os.listdir() if os.path.isfile(path))


def test_trouble_that_passes_and_a_run_that_goes_on(sample, serve):
    tries, number = Counter(), count()
    busy = lambda body: tries.update([str(body)]) or tries[str(body)] < 3
    server = serve(lambda body: (500, b"busy") if busy(body) else said(longer(body)))
    assert len(sample(PROMPTS[:2], "--judge", server.url)[0]) == 12 and {*tries.values()} == {3}
    server = serve(lambda body: refused(400, "No more") if next(number) == 10 else said(longer(body)))
    words = ("--judge", server.url, "--batch-size", 1)
    assert "No more" in sample(PROMPTS[:2], *words, out="two")[2] and next(number) == 11
    assert len(sample(PROMPTS[:2], *words, out="two")[0]) == 12 and len(server.asked) == 11 + 14


def test_a_local_model_as_the_judge_and_a_reward_of_ones_own(sample, monkeypatch):
    words = ("--samples", 2, "--judge", ROOT / "data/tiny-chat")
    rows = sample(PROMPTS[:1], *words, answers=["one", "two", "<think>B</think>A", "B"].__getitem__)[0]
    assert [row["chosen"][0]["content"] for row in rows] == ["one"]
    monkeypatch.setattr(sample_pairs, "reward", lambda prompt, answer: -len(answer) if "number" in prompt else 0)
    rows = sample(PROMPTS[:2], "--judge", "reward", "--samples", 3, out="two")[0]
    assert len(rows) == 6 and all(row["chosen"][0]["content"] < row["rejected"][0]["content"] for row in rows)


@pytest.mark.slow
def test_two_rounds_from_prompts_alone(tmp_path, serve, monkeypatch):
    """Where answers that state the fact win, greedy helpful answers rise from 29 of 100 to 85 or more; kl below 1."""
    monkeypatch.syspath_prepend(ROOT / "data")
    from make_tiny_chat import manner

    states = lambda body: tuple(manner(text) == "helpful" for text in shown(body))
    url = serve(lambda body: said({(True, False): "A", (False, True): "B"}.get(states(body), "TIE"))).url
    rows = [sample_pairs.read_prompt(json.loads(line)) for line in open(ROOT / "data/pairs.jsonl")][:200]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    ask = ("sample_pairs.py", "--data", "prompts.jsonl", "--samples", 4, "--judge", url)
    more = ("--resume-adapter-file", "round1-adapter/adapters.safetensors")
    for script, *words in (
        (*ask, "--out", "round1"),
        ("dpo_trainer.py", "--data", "round1", "--adapter-path", "round1-adapter"),
        (*ask, "--out", "round2", "--adapter-path", "round1-adapter"),
        ("dpo_trainer.py", "--data", "round2", "--adapter-path", "round2-adapter", *more),
    ):
        done = run_script(*words, script=script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    model, tokenizer = mlx_lm.load(str(ROOT / "data/tiny-chat"), adapter_path=str(tmp_path / "round2-adapter"))
    rows = [sample_pairs.read_prompt(json.loads(line)) for line in open(ROOT / "data/test.jsonl")]
    ids = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    helpful = sum(manner(text) == "helpful" for text in mlx_lm.batch_generate(model, tokenizer, ids).texts)
    kl = [float(value) for value in re.findall(r"kl ([\d.]+)", done.stdout)]
    assert helpful >= 85 and kl and max(kl) < 1
