# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
r"""
Make preference pairs of a model's own answers: rejected ones to good answers, or ranked ones for on-policy DPO.

    python sample_pairs.py --data curated.jsonl --model mlx-community/Llama-3.2-1B-Instruct-4bit --out pairs.jsonl
    python sample_pairs.py --data prompts.jsonl --model mlx-community/Llama-3.2-1B-Instruct-4bit --out round2 \
        --adapter-path adapters --samples 4 --judge http://localhost:11434/v1 --judge-model qwen3:32b

The first: chosen is the row's own answer, rejected the model's. The second: a judge compares every two answers to a
prompt in both orders; where both agree there is a pair. Reads the trainers' rows, also without answers, and KTO's.
Writes OUT/train, valid and test.jsonl, split by prompt, or a file. OUT.done.jsonl keeps what is answered: after a kill
the same command goes on. A server's key is read from OPENAI_API_KEY. Own ranking: edit reward, give --judge reward.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import combinations, permutations
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

# The marks of many families' thoughts; one in backquotes is only spoken of. What follows a closing one is said.
TAGS = r"(?<!`)<\|?(?:(?:open|close)\|>)?[/\w:]*(?i:think|thought|reasoning|reflection|scratchpad)[\w:]*(?:<\|sep)?\|?>"
TAGS += r"|<\|?channel\|?>\s*(?:analysis|commentary|thought|final.*?<\|message\|>)?|\Aanalysis(?=[A-Z])"
TAGS += r"|assistantfinal|\[/?THINK\]|◁/?think▷|<\|inner_(?:prefix|suffix)\|>"
PLAIN = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"  # for base models
QUESTION = "Two assistants answered the same request. Which answer is better? Say A, B or TIE, and nothing else.\n\n"
QUESTION += "Request:\n{prompt}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"
FILLER = "the a an is are was my i i'd would say think choose prefer pick final better best both answer answers".split()
FILLER += "response option assistant verdict winner choice wins it it's so clearly much slightly far good boxed".split()
SIDES = {("A", "B"): ("won", "lost"), ("B", "A"): ("lost", "won"), ("TIE", "TIE"): ("tie", "tie")}

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
    add, bundled = parser.add_argument, os.path.relpath(Path(__file__).parent / "data/tiny-chat")
    add("--data", required=True, help="rows: a .jsonl file, or a folder with train.jsonl")
    add("--out", required=True, help="a folder for train, valid and test.jsonl, or a .jsonl file for all pairs")
    add("--model", default=bundled, help="folder or name (default: the bundled model)")
    add("--adapter-path", help="folder of the adapter to answer with (default: none)")
    add("--samples", type=int, help="answers to each prompt (default: 4 with --judge, else 1)")
    add("--max-tokens", type=int, default=512, help="of an answer, its thoughts included (default: 512)")
    add("--temp", type=float, default=0.8, help="sampling temperature (default: 0.8)")
    add("--batch-size", type=int, default=16, help="answers, or questions to a server, at once (default: 16)")
    add("--judge", default="", help="http://HOST/v1 of an OpenAI-like server, a model, or the word reward")
    add("--judge-model", default="default_model", help="its name at that server (default: mlx_lm.server's own)")
    add("--judge-tokens", type=int, default=2048, help="of a verdict, the judge's thoughts included (default: 2048)")
    add("--best-of", action="store_true", help="a pair of the best answer and the worst, not all pairs of a prompt")
    add("--seed", type=int, default=0, help="of the answers and of the split (default: 0)")
    args = parser.parse_args(words)
    args.samples = (4 if args.judge else 1) if args.samples is None else args.samples
    with blame("options", "--help lists them all"):
        need(
            min(args.samples, args.max_tokens, args.judge_tokens, args.batch_size) > 0 <= args.temp, "too low a number"
        )
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
        thoughts = {name: turn[name] for name in ("reasoning_content", "reasoning", "thinking") if turn.get(name)}
        found.append({"role": turn["role"], "content": content, **thoughts})
    return found


def read_prompt(row):
    """Return a row's {"prompt": messages, "shown": as a text, "chosen": text or none, "weight"}; raise ValueError."""
    need(not row.get("tools"), "rows with tools are not trained on")
    prompt = to_messages(row.get("prompt") or row.get("messages") or [], "user")
    answer = to_messages(row.get("chosen") or row.get("completion") or [], "assistant")
    turns = answer if answer[: len(prompt)] == prompt else prompt + answer
    chosen = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
    need(turns and turns[-1]["role"] == "user", f"no prompt, or none that ends in a user's turn, in {', '.join(row)}")
    weight = 1.0 if row.get("weight") is None else float(row["weight"])
    turns = (to_messages(row["system"], "system") if row.get("system") and turns[0]["role"] != "system" else []) + turns
    shown = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if turns[1:] else turns[0]["content"]
    good = chosen.strip() and row.get("label", True) and chosen
    return {"prompt": turns, "shown": shown, "chosen": good, "weight": weight}


def load_rows(args):
    """Return the rows of a file, or of a folder's train.jsonl: with a judge each prompt once, else each good answer."""
    path, found = Path(args.data, "train.jsonl" if os.path.isdir(args.data) else ""), {}
    with blame(path, "give a file, or a folder with train.jsonl, that has one JSON object a line"):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        with blame(f"{path}:{number}", "mend or delete the row: one JSON object a line"):
            row = read_prompt(json.loads(line))
        if args.judge or row["chosen"]:
            found[json.dumps([row["prompt"], None if args.judge else row["chosen"]])] = row
    print(f"rows: {len(found)} of {len(lines)}, each once" + ", that have a good answer" * (not args.judge))
    return [*found.values()]


def remember(path):
    """Return {key: value} of a file's lines, and keep(key, value), which adds to both; threads may call it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file, known = open(path, "ab+", buffering=0), {}
    file.seek(0)
    for line in file.read().splitlines():
        with suppress(ValueError):  # a line that a kill cut
            known.update([json.loads(line)])

    def keep(key, value):
        file.write(b"\n" + json.dumps([key, value]).encode())  # in one piece, and not at the end of a line that was cut
        known[key] = value

    return known, keep


# ---------------------------------------------------------------------------------------------------------- answers


def cut_thoughts(text):
    """Return what a text says after its last thought, "" where that has no end."""
    last = [*re.finditer(TAGS, text)][-1:]
    closed = last and re.search("(?i)/|end|close|suffix|final|<channel", last[0][0])
    said = text[last[0].end() :] if closed else "" if last else text
    return re.sub(r"\A(\s*<\|\w+\|>)+|(<\|\w+\|>\s*)+\Z", "", said).strip()  # as <|START_RESPONSE|>, <|return|>


def answer(args, name, adapter, requests, tokens, temp, known, keep):
    """Return the texts, without thoughts, None where one has no end, that a model answers to [(prompt, sample)]."""
    with blame(adapter or name, "name a model (or http://SERVER), its adapter; if memory runs out lower --batch-size"):
        model, tokenizer = mlx_lm.load(name, adapter_path=adapter)
        trained = Path(adapter, "adapters.safetensors").stat().st_mtime if adapter else 0
        keys = [json.dumps([name, adapter, trained, tokens, temp, args.seed, *request]) for request in requests]
        todo = [key for key in dict.fromkeys(keys) if key not in known]
        print(f"{name}: {len(todo)} answers to sample, {len(keys) - len(todo)} are there from earlier")
        form = {"tokenize": False, "chat_template": None if tokenizer.has_chat_template else PLAIN}
        form["strftime_now"] = lambda form: time.strftime(form, time.gmtime(1.72e9))  # the trainers' date
        bos = tokenizer.encode("")[:1]  # once, whether the template writes it or the tokenizer
        size = {"max_tokens": tokens, "completion_batch_size": args.batch_size, "return_token_ids": True}
        for start in tqdm(range(0, len(todo), args.batch_size), "answering", leave=False, disable=None):
            batch = todo[start : start + args.batch_size]
            drawn = [json.loads(key)[-3:] for key in batch]  # [--seed, prompt, sample]
            mx.random.seed(random.Random(str(drawn[0])).getrandbits(32))  # so a run that goes on draws the same
            asked = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, **form) for _, turns, _ in drawn]
            rows = [tokenizer.encode(text, add_special_tokens=False) for text in asked]
            rows = [bos + row if bos == [tokenizer.bos_token_id] != row[:1] else row for row in rows]
            found = mlx_lm.batch_generate(model, tokenizer, rows, sampler=make_sampler(temp), **size)
            for key, before, text, ids in zip(batch, asked, found.texts, found.token_ids):
                begun = "".join(re.findall(rf"(?:{TAGS})\s*\Z", before))  # a thought that the template begins
                keep(key, cut_thoughts(begun + text) if len(ids) < tokens else None)
    return [known[key] for key in keys]


def reward(prompt, answer):
    """Return a number, higher for a better answer, for --judge reward: edit it. Here: how few words come twice."""
    return len({*answer.split()}) / len(answer.split())


def read_verdict(reply):
    """Return "A", "B" or "TIE" as a reply's clauses say, "" where none or several do; None is a reply cut short."""
    said = re.sub(r"(?i)\b(?:a\s+)?(?:tied?|draw|neither|equal(?:ly)?)\b", "TIE", cut_thoughts(reply or ""))
    clauses = re.split(r"[.,:;!?()/\n–—-]|\b(?=(?:because|since|as|than|over|in|for)\b)", said)
    parts = [re.findall(r"[\w']+", clause.upper() if said.islower() else clause) for clause in clauses]
    found = {" ".join(w for w in part if w == "A" or w.lower() not in FILLER) for part in parts} & {"A", "B", "TIE"}
    return found.pop() if len(found) == 1 else ""


def ask_server(args, questions, known, keep):
    """Return a server's replies to questions, None where the limit cut one; exit where it has none after five times."""
    url = args.judge.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    secret = (os.environ.get("OPENAI_API_KEY", "").split() or ["no-key"])[0]
    styles = [{"temperature": 0, "max_tokens": args.judge_tokens}, {"max_completion_tokens": args.judge_tokens}]
    keys = [json.dumps([url, args.judge_model, args.judge_tokens, text]) for text in questions]
    todo = [key for key in dict.fromkeys(keys) if key not in known]
    waits = [0, 1, 2, 4, 8]  # s before each try

    def settle(key):
        for wait in waits:
            time.sleep(wait)
            style, body = styles[0], b""
            sent = {"model": args.judge_model, **style, "messages": [{"role": "user", "content": json.loads(key)[-1]}]}
            request = urllib.request.Request(url, json.dumps(sent).encode(), {"Content-Type": "application/json"})
            request.add_unredirected_header("Authorization", f"Bearer {secret}")  # not to where a server points
            try:
                body = urllib.request.urlopen(request, timeout=3600).read()
                choice = json.loads(body)["choices"][0]
                said = choice["message"].get("content") or ""
                if isinstance(said, list):  # of parts, thoughts among them
                    said = "".join(part["text"] for part in said if part["type"] == "text")
                return keep(key, None if choice.get("finish_reason") in ("length", "max_tokens") else said)
            except Exception as error:
                body = error.read() if isinstance(error, urllib.request.HTTPError) else body
                problem = f"{error} " + re.sub(r"(?s)<style.*?</style>|<[^>]*>", " ", body.decode("utf-8", "replace"))
                if style is not styles[-1] and re.search("max_completion_tokens|temperature", problem):
                    styles[:] = styles[-1:]  # newer models take neither
                elif 400 <= getattr(error, "code", 500) < 500 and error.code not in (408, 425, 429):
                    break  # asking again does not help
        waits.clear()  # nor need others try
        raise ConnectionError(problem.replace(secret, "OPENAI_API_KEY"))

    with blame(url, "the same command asks what is left"), ThreadPoolExecutor(args.batch_size) as pool:
        [*tqdm(pool.map(settle, todo), "judging", len(todo), leave=False, disable=None)]  # an error cancels the others
    return [known[key] for key in keys]


def judge_rows(rows, verdicts, args):
    """Return [(row, chosen, rejected, verdicts)] where both orders agree, or each row's widest; print the counts."""
    pairs, counts = [], Counter()
    for row in rows:
        agreed, tallies = [], defaultdict(Counter)
        for two in combinations(row["answers"], 2):
            both = verdicts[(row["shown"], *two)], verdicts[(row["shown"], *two[::-1])]
            sides = SIDES.get(both, ["unclear" if "" in both else "contradict"] * 2)
            for text, side in zip(two, sides):
                tallies[text][side] += 1
            counts.update([*both, "agree" if "won" in sides else sides[0]])
            agreed += [two[:: 1 if sides[0] == "won" else -1]] if "won" in sides else []
        agreed.sort(key=lambda pair: tallies[pair[0]]["won"] + tallies[pair[1]]["lost"])
        for chosen, rejected in agreed[-1:] if args.best_of else agreed:
            pairs.append((row, chosen, rejected, {"chosen": tallies[chosen], "rejected": tallies[rejected]}))
    print("comparisons:", ", ".join(f"{counts[name]} {name}" for name in ("agree", "tie", "contradict", "unclear")))
    print(f"position: the answer shown first wins {counts['A']} times, the other one {counts['B']} times")
    return pairs


def write_pairs(pairs, args):
    """Write pairs to --out: a file, or a folder's train, valid and test.jsonl (each of two a tenth of the prompts)."""
    names = [""] if args.out.endswith(".jsonl") else ["train.jsonl", "valid.jsonl", "test.jsonl"]
    files = {Path(args.out, name): [] for name in names}
    signal, weight = ("judged", 1.0) if args.judge else ("generated", 0.5)
    for row, *texts, verdicts in pairs:
        sides = {side: [{"role": "assistant", "content": text}] for side, text in zip(("chosen", "rejected"), texts)}
        facts = {"signal": signal, "weight": weight * row["weight"], "model": args.model, "verdicts": verdicts}
        place = random.Random(f"{args.seed} {row['prompt']}").randrange(10)  # in every round the same
        lines = [*files.values()][place if place < len(files) else 0]
        lines.append(json.dumps({"prompt": row["prompt"], **sides, **facts}) + "\n")
    with blame(args.out, "make room, or choose another --out"):
        for path, lines in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if lines:  # to a trainer an empty file is a mistake
                path.write_text("".join(lines))
    print("pairs:", ", ".join(f"{len(lines)} in {path}" for path, lines in files.items()))


# ------------------------------------------------------------------------------------------------------------- main


def main():
    args = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an end at once, as nothing is lost by it
    rows, done = load_rows(args), Path(f"{Path(args.out)}.done.jsonl")
    with blame(args.out, "choose another --out"):
        need(done.exists() or not Path(args.out).exists(), "it is there already, and not by this script")
        log = remember(done)
    requests = [(row["prompt"], i) for row in rows for i in range(args.samples)]
    texts = answer(args, args.model, args.adapter_path, requests, args.max_tokens, args.temp, *log)
    for start, row in zip(range(0, len(texts), args.samples), rows):
        good = {None, "", None if args.judge else row["chosen"].strip()}
        row["answers"] = [*dict.fromkeys(text for text in texts[start : start + args.samples] if text not in good)]
    kept, cut, empty = sum(len(row["answers"]) for row in rows), texts.count(None), texts.count("")
    print(f"answers: {kept} kept, {len(texts) - kept - cut - empty} equal, {empty} empty, {cut} cut by --max-tokens")
    asked = [(row["shown"], *two) for row in rows for two in permutations(row["answers"], 2)]
    questions = [QUESTION.format(prompt=prompt, a=a, b=b) for prompt, a, b in asked]
    pairs = [(row, row["chosen"], text, None) for row in rows for text in row["answers"]]
    if args.judge == "reward":
        gaps = [reward(prompt, a) - reward(prompt, b) for prompt, a, b in asked]
        replies = ["A" if gap > 0 else "B" if gap < 0 else "TIE" for gap in gaps]
    elif args.judge.startswith(("http://", "https://")):
        replies = ask_server(args, questions, *log)
    elif args.judge:
        requests = [(to_messages(text, "user"), 0) for text in questions]
        replies = answer(args, args.judge, None, requests, args.judge_tokens, 0.0, *log)
    if args.judge:
        pairs = judge_rows(rows, dict(zip(asked, map(read_verdict, replies))), args)
    write_pairs(pairs, args)
    if not pairs:
        sys.exit(f"{args.out}: no pair: answers equal, empty or cut, or verdicts that turn with the order")


if __name__ == "__main__":
    main()
