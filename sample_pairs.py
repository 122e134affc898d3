# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Make preference pairs of a model's own answers: rejected ones to good answers, or ranked ones for on-policy DPO.

    python sample_pairs.py --data curated.jsonl --model mlx-community/Llama-3.2-1B-Instruct-4bit --out pairs.jsonl
        chosen: the row's own answer; rejected: the model's, without an adapter
    python sample_pairs.py --data prompts.jsonl --adapter-path adapters --samples 4 \\
        --judge http://localhost:11434/v1 --judge-model qwen3:32b --out round2
        a judge compares every two of a prompt's answers, in both orders: where both agree there is a pair

Reads pairs, good answers alone, unpaired.jsonl or {"prompt": ...} rows (see read_row). Writes train, valid and
test.jsonl, split by prompt, into --out, or one file where that ends in .jsonl. OUT.done.jsonl has each answer and
verdict as it came: the same command goes on after a kill, and asks nothing twice. A server's key is read from
OPENAI_API_KEY. To rank by a function of your own edit reward and give --judge reward; the question: QUESTION.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import combinations, permutations
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm import lora
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.utils import load_adapters
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- options


def need(condition, problem):
    if not condition:
        raise ValueError(problem)


@contextmanager
def blame(place, advice):
    """Turn an exception inside into one line on stderr, "place: problem: advice", and exit status 1."""
    try:
        yield
    except Exception as error:
        sys.exit(f"{place}: {' '.join(str(error).split())[:300]}: {advice}")


def parse_args(words=None):
    """Return the options; exit with one line where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{message}; --help lists all options")
    add = parser.add_argument
    add("--data", required=True, help="rows: a .jsonl file, or a folder with train.jsonl")
    add("--out", required=True, help="a folder for train, valid and test.jsonl, or a .jsonl file for all pairs")
    add("--model", default=str(Path(__file__).parent / "data/tiny-chat"), help="folder or name (default: the bundled)")
    add("--adapter-path", help="folder of the adapter to answer with (default: none)")
    add("--samples", type=int, help="answers to each prompt (default: 4 with --judge, else 1)")
    add("--max-tokens", type=int, default=512, help="of an answer, its thoughts included (default: 512)")
    add("--temp", type=float, default=0.8, help="sampling temperature (default: 0.8)")
    add("--batch-size", type=int, default=32, help="answers at once (default: 32)")
    add("--judge", help="http://HOST/v1 of an OpenAI-like server, a model's folder or name, or the word reward")
    add("--judge-model", default="default_model", help="its name at that server (default: mlx_lm.server's own)")
    add("--judge-tokens", type=int, default=2048, help="of a verdict, the judge's thoughts included (default: 2048)")
    add("--parallel", type=int, default=4, help="questions to the server at once (default: 4)")
    add("--best-of", action="store_true", help="a pair of the best answer and the worst, not all pairs of a prompt")
    add("--seed", type=int, default=0, help="of the answers and of the split (default: 0)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    args = parser.parse_args(words)
    args.samples = (4 if args.judge else 1) if args.samples is None else args.samples
    with blame("options", "--help lists them all"):
        counts = (args.samples, args.max_tokens, args.judge_tokens, args.batch_size, args.parallel)
        need(min(counts) > 0 <= min(args.temp, args.seed), "temp and seed must be 0 or more, other numbers 1 or more")
        need(not args.judge or args.samples > 1, "a judge compares answers, so it needs two --samples or more")
    return args


# ------------------------------------------------------------------------------------------------------------- data


def to_messages(value, role):
    """Return a text as one message of that role, or messages with their text parts joined; raise at others."""
    found = []
    for turn in [{"role": role, "content": value}] if isinstance(value, str) else value:
        content, roles = turn.get("content"), ("system", "developer", "user", "assistant")
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        plain = isinstance(content, str) and turn.get("role") in roles and not turn.get("tool_calls")
        need(plain, f"a message must be a text by {', '.join(roles)}: others, and tool calls, are not trained on")
        found.append({**{key: part for key, part in turn.items() if part is not None}, "content": content})
    return found


def read_row(row):
    """Return a row as {"prompt": messages, "chosen": message or None, "weight": float}, or raise ValueError.

    Forms: a trainer's pair, also without its rejected or both answers; prompt, completion and, where it is bad, label.
    """
    need(not row.get("tools"), "rows with tools are not trained on")
    prompt = to_messages(row.get("prompt") or row.get("messages") or [], "user")
    answer = to_messages(row.get("chosen") or row.get("completion") or [], "assistant")
    turns = answer if answer[: len(prompt)] == prompt else prompt + answer
    chosen = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
    problem = f"no prompt that ends in a user's turn, and at most one answer after it, in {', '.join(row)}"
    need(turns and turns[-1]["role"] == "user", problem)
    weight = 1.0 if row.get("weight") is None else float(row["weight"])
    need(0 <= weight < np.inf, "weight must be a number from 0 up")
    if row.get("system") and turns[0]["role"] != "system":
        turns = to_messages(row["system"], "system") + turns
    good = chosen and chosen["content"].strip() and row.get("label", True)
    return {"prompt": turns, "chosen": chosen if good else None, "weight": weight}


def load_rows(args):
    """Return the rows of a file, or of a folder's train.jsonl: with a judge each prompt once, else good answers."""
    path, rows = Path(args.data), []
    path = path / "train.jsonl" if path.is_dir() else path
    with blame(path, "give a file, or a folder with train.jsonl, that has one JSON object a line"):
        lines = path.read_bytes().splitlines()
        need(lines and b"{" in lines[0][:4], "no JSON lines in it")
    for number, line in enumerate(lines, 1):
        with blame(f"{path}:{number}", "mend or delete the row"):
            rows.append(read_row(json.loads(line)))
    found = [row for row in rows if row["chosen"]]
    if args.judge:
        found = [*{json.dumps(row["prompt"]): row for row in rows}.values()]
    print(f"rows: {len(found)} of {len(rows)} (others: {'the same prompt' if args.judge else 'no good answer'})")
    if not found:
        sys.exit(f"{path}: no row has a good answer: bring such rows, or let a --judge rank sampled answers")
    return found


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def remember(path):
    """Return {key: value} of a file's lines, and keep(key, value), which adds to both; threads may call it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file, known = open(path, "ab+", buffering=0), {}
    file.seek(0)
    for line in file.read().splitlines():
        with suppress(ValueError):  # a line that a kill cut
            known.update([json.loads(line)])

    def keep(key, value):
        known[key] = value
        file.write(b"\n" + json.dumps([key, value]).encode())  # one write, and on a line of its own after a cut one

    return known, keep


# ---------------------------------------------------------------------------------------------------------- answers

# The marks of many families' thoughts; one in backquotes is only spoken of. What follows a closing one is said.
MARK = re.compile(
    r"(?<!`)(?:<\|?(?:(?:open|close)\|>)?[/\w:]*(?:think|thought|reasoning|reflection|scratchpad)[\w:]*(?:<\|sep)?\|?>"
    r"|\[/?think\]|◁/?think▷|<\|?channel\|?>\s*(?:analysis|commentary|thought|final[^<]*<\|message\|>)?"
    r"|<\|inner_(?:prefix|suffix)\|>|\Aanalysis(?-i:(?=[A-Z]))|assistantfinal)",
    re.I,
)


def cut_thoughts(text):
    """Return what a text says after its last thought, "" where that has no end."""
    last = [*MARK.finditer(text)][-1:]
    closed = last and re.search("/|end|close|suffix|final|<channel", last[0][0], re.I)
    said = text[last[0].end() :] if closed else "" if last else text
    return re.sub(r"\A(\s*<\|\w+\|>)+|(<\|\w+\|>\s*)+\Z", "", said).strip()  # as <|START_RESPONSE|>, <|return|>


PLAIN = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"  # for base models


def encode_prompt(tokenizer, prompt):
    """Return a prompt's token ids, as the trainers write them, and the mark of a thought that the template begins."""
    fixed = {"tokenize": False} if tokenizer.has_chat_template else {"tokenize": False, "chat_template": PLAIN}
    fixed["strftime_now"] = lambda form: time.strftime(form, time.gmtime(1.72e9))  # a template's date: always the same
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **fixed)
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.encode("")[:1]  # once, whether the template writes it or the tokenizer
    ids = bos + ids if bos == [tokenizer.bos_token_id] != ids[:1] else ids
    return ids, "".join(mark[0] for mark in MARK.finditer(text) if not text[mark.end() :].strip())


def load_model(name, args):
    """Return a model and its tokenizer from a folder or the hub; exit with one line where there is none."""
    with blame(name, "give a model's folder, or its name on the Hugging Face hub"):
        is_name = name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()
        need(is_name or Path(name, "config.json").exists(), "no such folder, or no config.json, so no model, in it")
        return lora.load(name, {"trust_remote_code": args.trust_remote_code})


def answer(name, adapter, prompts, samples, tokens, temp, args, known, keep):
    """Return [samples texts, thoughts cut out, None for one without an end] of a model's answers to prompts."""
    weights = [path.read_bytes() for path in sorted(Path(adapter or "none").glob("adapter*"))]  # trained on, it changes
    setting = [name, hashlib.sha256(b"".join(weights)).hexdigest(), samples, tokens, temp, args.seed]
    keys = [digest([*setting, prompt]) for prompt in prompts]
    todo = [*{key: prompt for key, prompt in zip(keys, prompts) if key not in known}.items()]
    print(f"{len(todo) * samples} answers to get from {name}; a run that is killed goes on with the same command")
    model, tokenizer = load_model(name, args) if todo else (None, None)
    if adapter and todo:
        with blame(adapter, f"give the folder of an adapter that was trained on {name}"):
            load_adapters(model, adapter)
    step = -(-args.batch_size // samples)
    for start in tqdm(range(0, len(todo), step), "answering", leave=False, disable=None):
        batch = todo[start : start + step]
        mx.random.seed(int(batch[0][0][:8], 16))  # of a key, as --seed is in it: a run that goes on draws the same
        with blame(name, "lower --batch-size or --max-tokens; what is answered is kept, and not asked again"):
            ids, begun = zip(*[encode_prompt(tokenizer, prompt) for _, prompt in batch for _ in range(samples)])
            size = {"max_tokens": tokens, "completion_batch_size": args.batch_size, "return_token_ids": True}
            found = mlx_lm.batch_generate(model, tokenizer, [*ids], sampler=make_sampler(temp), **size)
            texts = [cut_thoughts(mark + text) for mark, text in zip(begun, found.texts)]
            texts = [text if len(ids) < tokens else None for text, ids in zip(texts, found.token_ids)]
            for i, (key, _) in enumerate(batch):
                keep(key, texts[i * samples : (i + 1) * samples])
    return [known[key] for key in keys]


# ------------------------------------------------------------------------------------------------------------ judge

QUESTION = "Two assistants answered the same request. Which answer is better? Say A, B or TIE, and nothing else.\n\n"
QUESTION += "Request:\n{prompt}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"


def question(prompt, a, b):
    """Return the text that asks which of two answers to a prompt, messages, is better."""
    turns = [turn["content"] if len(prompt) == 1 else f"{turn['role']}: {turn['content']}" for turn in prompt]
    return QUESTION.format(prompt="\n\n".join(turns), a=a, b=b)


def reward(prompt, answer):
    """Return a number, higher for a better answer, for --judge reward: edit it. Here: how few words come twice."""
    words = answer.split()
    return len({*words}) / len(words)


TIED = {"tie", "tied", "draw", "neither", "equal", "equally"}
FILLER = {*"the a an is are was my i i'd would say think choose prefer pick final better best answer answers".split()}
FILLER |= {*"response option assistant verdict winner choice wins it it's so clearly much slightly far boxed".split()}


def read_verdict(reply):
    """Return "A", "B" or "TIE" as a reply's clauses say, "" where none or several do; None is a reply cut short."""
    said, found = cut_thoughts(reply or ""), set()
    for clause in re.split(r"[.,:;!?()\n–—-]|\b(?=(?:because|since|as|than|over|in|for)\b)", said):
        words = re.findall(r"[\w']+", clause)
        words = [word for word in words if word == "A" or word.lower() not in FILLER] or words[-1:] * (len(said) < 4)
        if TIED & {word.lower() for word in words} and "not" not in words:
            found.add("TIE")
        elif len(words) == 1 and words[0].upper() in ("A", "B"):
            found.add(words[0].upper())
    return found.pop() if len(found) == 1 else ""


def words_of(body):
    """Return what a server says in a body: a JSON error's message, or a page's text."""
    said = re.sub(r"(?s)<style.*?</style>|<[^>]*>", " ", body.decode("utf-8", "replace"))
    with suppress(ValueError):
        said = json.loads(body)
    while isinstance(said, dict):
        said = next((said[name] for name in ("error", "message", "detail") if said.get(name)), json.dumps(said))
    return " ".join(str(said).split())[:200] or "nothing"


def reply_of(body):
    """Return the text of a chat completion, None where the limit cut it; raise ValueError with what it says instead."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        choice = json.loads(body)["choices"][0]
        content = choice["message"].get("content") or ""
        if isinstance(content, list):  # thoughts may be among the parts
            content = "".join(part["text"] for part in content if part["type"] == "text")
        return None if choice.get("finish_reason") == "length" else content
    raise ValueError(f"no answer, but {words_of(body)}")


def ask_server(questions, args, known, keep):
    """Return {question: reply, None where the limit cut it} and what went wrong with each that is missing."""
    url = args.judge.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    secret, problems, streak = os.environ.get("OPENAI_API_KEY", "").strip(), [], []
    options = {"model": args.judge_model, "temperature": 0, "max_tokens": args.judge_tokens}
    keys = {text: digest([url, args.judge_model, args.judge_tokens, text]) for text in questions}

    def settle(text):
        problem = ""
        for wait in (0, 1, 2, 4, 8) if len(streak) < 5 else ():  # or the server has gone
            time.sleep(wait)
            sent = {**options, "messages": [{"role": "user", "content": text}]}
            request = urllib.request.Request(url, json.dumps(sent).encode(), {"Content-Type": "application/json"})
            if secret:
                request.add_unredirected_header("Authorization", f"Bearer {secret}")  # not to where a server points
            try:
                with urllib.request.urlopen(request, timeout=600) as reply:
                    keep(keys[text], reply_of(reply.read()))
                return streak.clear()
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {words_of(error.read())}"
                if "max_completion_tokens" in problem and "max_tokens" in sent:  # as newer models want it
                    options["max_completion_tokens"] = options.pop("max_tokens", args.judge_tokens)
                elif "temperature" in problem and "temperature" in sent:
                    options.pop("temperature", None)
                elif error.code < 500 and error.code not in (408, 425, 429):
                    break  # asking again does not help
            except Exception as error:
                problem = str(getattr(error, "reason", error))
        problems.append(problem.replace(secret or "OPENAI_API_KEY", "OPENAI_API_KEY"))
        streak.append(problem)

    todo = [text for text in keys if keys[text] not in known]
    print(f"{len(todo)} questions to {url}; {len(keys) - len(todo)} are answered already")
    with ThreadPoolExecutor(args.parallel) as pool:
        [*tqdm(pool.map(settle, todo), "judging", len(todo), leave=False, disable=None)]
    return {text: known[key] for text, key in keys.items() if key in known}, problems


# ------------------------------------------------------------------------------------------------------------ pairs


def usable(texts, good, counts):
    """Return the answers that a pair can be made of; count them, and the others by what is wrong with them."""
    kept = []
    for text in texts:
        fault = "cut by --max-tokens" if text is None else "equal" if text in good + kept else "" if text else "empty"
        counts[fault or "kept"] += 1
        kept += [] if fault else [text]
    return kept


SIDES = {("A", "B"): ("won", "lost"), ("B", "A"): ("lost", "won"), ("TIE", "TIE"): ("ties", "ties")}


def judged_pairs(rows, say, args):
    """Return [(row, chosen, rejected, facts)] where say() agrees in both orders, or each row's widest; print how."""
    pairs, counts = [], Counter()
    for row in rows:
        agreed, tallies = [], {text: Counter() for text in row["answers"]}
        for a, b in combinations(row["answers"], 2):
            both = say(row["prompt"], a, b), say(row["prompt"], b, a)
            sides = SIDES.get(both, ["unclear" if "" in both else "contradictions"] * 2)
            tallies[a].update(sides[:1])
            tallies[b].update(sides[1:])
            counts.update([*both, sides[0]])
            agreed += [(a, b) if sides[0] == "won" else (b, a)] if "won" in sides else []
        lead = lambda pair: (
            tallies[pair[0]]["won"] - tallies[pair[0]]["lost"] - tallies[pair[1]]["won"] + tallies[pair[1]]["lost"]
        )
        for pair in sorted(agreed, key=lead)[-1:] if args.best_of else agreed:
            facts = {"verdicts": {side: tallies[text] for side, text in zip(("chosen", "rejected"), pair)}}
            pairs.append((row, {"role": "assistant", "content": pair[0]}, pair[1], facts))
    outcomes = ", ".join(f"{counts[name]} {name}" for name in ("ties", "contradictions", "unclear"))
    print(f"comparisons: {counts['won'] + counts['lost']} agree in both orders, {outcomes}")
    said = counts["A"] + counts["B"]
    print(f"position: the answer shown first wins {counts['A']} of {said} verdicts, {counts['A'] / max(said, 1):.0%}")
    return pairs


def write_pairs(pairs, args):
    """Write pairs to --out: a file, or a folder's train, valid and test.jsonl, a tenth of the prompts in each."""
    out, single = Path(args.out), args.out.endswith(".jsonl")
    parts = {out: []} if single else {out / f"{name}.jsonl": [] for name in ("train", "valid", "test")}
    signal, weight = ("judged", 1.0) if args.judge else ("generated", 0.5)
    for row, chosen, rejected, facts in pairs:
        sides = {"chosen": [chosen], "rejected": [{"role": "assistant", "content": rejected}]}
        facts = {"signal": signal, "weight": weight * row["weight"], "model": args.model, **facts}
        place = int(digest([args.seed, row["prompt"]]), 16) % 10  # in every round a prompt has the same place
        lines = [*parts.values()][0 if single or place > 2 else place % 3]
        lines.append(json.dumps({"prompt": row["prompt"], **sides, **facts}) + "\n")
    with blame(out, "make room, or choose another --out"):
        for path, lines in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
            if not lines:
                path.unlink()  # to a trainer an empty file is a mistake
    print("pairs:", ", ".join(f"{len(lines)} in {path}" for path, lines in parts.items()))


# ------------------------------------------------------------------------------------------------------------- main


def main():
    args = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an end at once, as nothing is lost by it
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        mx.disable_compile()  # it calls a C++ compiler, which takes longer than it saves
    rows, counts, problems = load_rows(args), Counter(), []
    with blame(args.out, "choose another --out"):
        done = Path(f"{Path(args.out)}.done.jsonl")
        need(done.exists() or not Path(args.out).exists(), "it is there already, and not by this script")
        log = remember(done)
    prompts = [row["prompt"] for row in rows]
    found = answer(args.model, args.adapter_path, prompts, args.samples, args.max_tokens, args.temp, args, *log)
    for row, texts in zip(rows, found):
        row["answers"] = usable(texts, [] if args.judge else [row["chosen"]["content"]], counts)
    print("answers:", ", ".join(f"{counts[name]} {name}" for name in ("kept", "equal", "empty", "cut by --max-tokens")))
    asked = [question(row["prompt"], *two) for row in rows for two in permutations(row["answers"], 2)]
    if not args.judge:
        pairs = [(row, row["chosen"], text, {}) for row in rows for text in row["answers"]]
    elif args.judge == "reward":
        gap = lambda prompt, a, b: reward(prompt, a) - reward(prompt, b)
        pairs = judged_pairs(rows, lambda *words: {1: "A", 0: "TIE", -1: "B"}[np.sign(gap(*words))], args)
    else:
        if args.judge.startswith("http"):
            replies, problems = ask_server(asked, args, *log)
        else:
            prompts = [to_messages(text, "user") for text in asked]
            texts = answer(args.judge, None, prompts, 1, args.judge_tokens, 0.0, args, *log)
            replies = dict(zip(asked, sum(texts, [])))
        pairs = judged_pairs(rows, lambda *words: read_verdict(replies.get(question(*words))), args)
    write_pairs(pairs, args)
    if problems:
        advice = "the same command asks again what has no answer, and that alone"
        sys.exit(f"{args.judge}: {len(problems)} questions failed: {problems[0]}: {advice}")
    if not pairs:
        sys.exit(
            f"{args.out}: no pair: no answers that differ, or no verdict that is the same in both orders: see above"
        )
    print("Next:", shlex.join(["python", "dpo_trainer.py", "--model", args.model, "--data", args.out]))


if __name__ == "__main__":
    main()
