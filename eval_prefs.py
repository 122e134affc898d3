# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Compare adapters with their base model on held-out preference pairs, and write a report.

    margin = (pi_w - ref_w) - (pi_l - ref_l)        how many nats the chosen answer gained on the rejected one
    pi_w, pi_l: log-probability of the chosen and the rejected answer with the adapter; ref_w, ref_l: the base's

    python eval_prefs.py --data data/test.jsonl --adapter-path adapters --out report
    python eval_prefs.py --adapter-path adapters --adapter-path adapters-simpo --generate 20
    python eval_prefs.py --adapter-path adapters --hard 50 next_round.jsonl

Reads pairs as the trainers do, and adapters as they and mlx_lm.lora write them. Writes, in --out, report.md, two
pictures (pip install matplotlib) and pairs.jsonl, a record a pair with every number. To measure something else edit
summarize; what is said of it, the parts of the report. Letters: B pairs, 2B rows (the chosen answers, then the
rejected), P prompt tokens, R row tokens, V vocabulary, N pairs in all.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
from bisect import bisect_left
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import batch_generate, lora
from mlx_lm.models.cache import ConcatenateKVCache
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import maybe_set_recommended_wired_limit
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
    """Return the options; those of the data and the model that are not given are --config's or the first adapter's."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{message}; --help lists all options")
    add = parser.add_argument
    add("--model", help="base: folder or Hugging Face name (default: the adapters' own, or the bundled one)")
    add("--adapter-path", type=Path, action="append", default=[], help="folder of an adapter; once for each")
    add("--data", default="data/test.jsonl", help="file, folder with test.jsonl or hub dataset (default: %(default)s)")
    add("--config", help="a trainer's file of options, for the names of the data's columns (default: the adapter's)")
    add("--max-seq-length", type=int, help="tokens of a pair's rows; old turns go (default: the adapter's, or 1024)")
    add("--batch-size", type=int, default=4, help="pairs scored at once (default: %(default)s)")
    add("--generate", type=int, default=0, metavar="N", help="show greedy answers to the first N prompts (default: 0)")
    add("--max-tokens", type=int, default=256, help="of such an answer (default: %(default)s)")
    add("--hard", nargs=2, default=[], metavar=("K", "FILE"), help="write the K pairs of lowest margin, to train on")
    add("--out", type=Path, default="report", help="folder of the report (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model's tokenizer")
    args, here, bases = parser.parse_args(words), Path(__file__).parent, {}
    settings = {"model": "data/tiny-chat", "max_seq_length": 1024}
    settings |= {f"{side}_feature": side for side in ("prompt", "chosen", "rejected")}
    files = [path / "adapter_config.json" for path in reversed(args.adapter_path)]  # the first one's settings win
    for file in files + [Path(name) for name in [args.config] if name]:
        with blame(file, "give an adapter's folder, or a file of options as data/demo.yaml"):
            config = lora.yaml.load(file.read_text(encoding="utf-8"), lora.yaml_loader)  # JSON is YAML
            config |= config.get("hf_dataset") or {}
            settings |= {name: config[name] for name in settings if config.get(name)}
            bases |= {config["model"]: file} if config.get("model") else {}
    parser.set_defaults(**settings)
    with blame("options", "--help lists them all"):
        need(args.model or len(bases) < 2, f"these are of several models, {', '.join(bases)}: name one with --model")
        args, names = parser.parse_args(words), [path.resolve().name for path in args.adapter_path]
        need(min(args.max_seq_length, args.batch_size, args.max_tokens) > 0 <= args.generate, "numbers must be above 0")
        need(not args.hard or int(args.hard[0]) > 0, "--hard takes a number above 0, and a file")
        need(len({*names, "base"}) == len(names) + 1, "give each adapter's folder a name of its own, and not base")
    for base in bases.keys() - {args.model}:
        print(f"warning: {bases[base]} is of {base}, and is measured on {args.model}")
    if (here / args.data).exists() and not Path(args.data).exists():  # the bundled pairs are found from any folder
        args.data = str(here / args.data)
    return args


# ------------------------------------------------------------------------------------------------------------- data


def read_pair(row, args):
    """Return a row as {"prompt": messages, "chosen", "rejected": message, "weight": float}, or raise ValueError.

    Forms: a prompt, or messages, with chosen and rejected, each a text or messages; chosen and rejected as whole
    conversations; messages that end in the chosen answer, with rejected.
    """
    prompt, chosen, rejected = (row.get(getattr(args, f"{side}_feature")) for side in ("prompt", "chosen", "rejected"))
    prompt = to_messages(row.get("messages", []) if prompt is None else prompt, "user")
    if chosen is None and "messages" in row:
        prompt, chosen = prompt[:-1], prompt[-1:]
    need(chosen and rejected, f"no chosen and rejected among {', '.join(row)}: set hf_dataset: {{chosen_feature: ...}}")
    sides = [to_messages(side, "assistant") for side in (chosen, rejected)]
    (*prompt, chosen), (*other, rejected) = (side if side[: len(prompt)] == prompt else prompt + side for side in sides)
    turns = prompt == other and [turn["role"] for turn in (*prompt[-1:], chosen, rejected)]
    need(turns == ["user", "assistant", "assistant"], f"two answers must follow the same user turn: {', '.join(row)}")
    need(all(side["content"].strip() for side in (chosen, rejected)) and chosen != rejected, "empty or equal answers")
    need(not row.get("tools"), "rows with tools are not trained on")
    weight = 1.0 if row.get("weight") is None else float(row["weight"])
    need(0 <= weight < np.inf, "weight must be a number from 0 up")
    system = to_messages(row["system"], "system") if row.get("system") and prompt[0]["role"] != "system" else []
    return {"prompt": system + prompt, "chosen": chosen, "rejected": rejected, "weight": weight}


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


PLAIN = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"  # for base models
DATE = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"  # a template's date, always the same


def encode_pair(tokenizer, prompt, chosen, rejected):
    """Return the token ids of prompt, chosen and rejected, and how many answers the template leaves a part of out."""
    template = tokenizer.chat_template if tokenizer.has_chat_template else PLAIN  # no text where mlx-lm has a function
    fixed = {"tokenize": False, **({"chat_template": DATE + template} if isinstance(template, str) else {})}
    rows = ([*prompt], [*prompt, chosen], [*prompt, rejected])
    texts = [tokenizer.apply_chat_template(row, add_generation_prompt=row is rows[0], **fixed) for row in rows]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    bos = tokenizer.encode("")[:1]  # once, whether the template writes it or the tokenizer
    ids = [bos + row for row in ids] if bos == [tokenizer.bos_token_id] != ids[0][:1] else ids
    shared = len(os.path.commonprefix(ids))  # where a template writes the prompt's end anew, that is the answers'
    need(shared, "the prompt has no token to start from")
    parts = [[part.strip() for name, part in side.items() if name != "role"] for side in (chosen, rejected)]
    cut = sum(not all(part in text for part in answer) for answer, text in zip(parts, texts[1:]))
    return ids[0][:shared], ids[1][shared:], ids[2][shared:], cut


def load_data(args, tokenizer):
    """Return the pairs {"row", "place", "asked": text, "prompt", "chosen", "rejected": ids}; print what is left out."""
    path, pairs, shortened, cut = Path(args.data), [], 0, 0
    path = path / "test.jsonl" if path.is_dir() else path
    with blame(path, "give a .jsonl file, a folder with test.jsonl, or a hub dataset (pip install datasets)"):
        if path.exists() or path.suffix in (".jsonl", ".json", ".csv"):
            rows = [(i, line) for i, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
            need(rows and rows[0][1].lstrip(b"\xef\xbb\xbf \t")[:1] == b"{", "no JSON lines: write one object a line")
        else:
            from datasets import load_dataset

            name, _, part = args.data.partition(":")
            rows = [*enumerate(load_dataset(name, split=part or "test"), 1)]
    for number, row in tqdm(rows, "reading", leave=False, disable=None):
        with blame(f"{path}:{number}", "mend or delete the row"):
            row = json.loads(row) if isinstance(row, bytes) else row
            pair = read_pair(row, args)
            turns, first = pair["prompt"], int(pair["prompt"][0]["role"] in ("system", "developer"))
            # where it is too long the oldest turns go, but no system message and no part of an answer
            starts = [first] + [i for i, turn in enumerate(turns) if turn["role"] == "user" and i > first]
            encode = lambda i: encode_pair(tokenizer, turns[:first] + turns[i:], pair["chosen"], pair["rejected"])
            fits = lambda ids: len(ids[0]) + max(len(ids[1]), len(ids[2])) <= args.max_seq_length
            start = starts[bisect_left(starts[:-1], True, key=lambda i: fits(encode(i)))]
            ids = encode(start)
        if fits(ids) and ids[1] != ids[2]:
            known = {"row": row, "place": f"{path}:{number}", "asked": turns[-1]["content"], "models": {}}
            known |= {"chosen_tokens": len(ids[1]), "rejected_tokens": len(ids[2])}
            pairs.append({**known, "prompt": ids[0], "chosen": ids[1], "rejected": ids[2]})
            shortened, cut = shortened + (start > first), cut + ids[3]
    print(f"{len(pairs)} of {len(rows)} pairs (others: too long, equal answers), {shortened} lost old turns")
    if cut:
        print(f"warning: the chat template leaves a part of {cut} answers out, as thoughts: it is not scored")
    return pairs or sys.exit(f"{path}: no pair is left: raise --max-seq-length, or bring other data")


# ------------------------------------------------------------------------------------------------------------ scores

# Rows are padded to multiples of PAD; CUDA's fused attention wants 128. A shape is compiled in the time of COMPILE
# tokens, 0.5 s on an H100; a Mac's tokens take longer, a CPU compiles nothing. SHARE: of the tokens sharing may leave.
CUDA, METAL = mx.cuda.is_available(), mx.metal.is_available()
PAD, COMPILE, SHARE = (128, 8000, 0.75) if CUDA else (32, 500, 0.9) if METAL else (1, 0, 0.9)


class PrefixCache:
    """A cache, to mlx-lm's models, that puts B prompts' keys and values before their 2B answers'. lengths: (2B,)."""

    def __init__(self, prompt, lengths):
        self.keys, self.values, self.offset = prompt.keys, prompt.values, lengths  # offset: the first token's position

    def update_and_fetch(self, keys, values):
        both = ((self.keys, keys), (self.values, values))  # (B, heads, P, D), (2B, heads, R, D)
        return tuple(mx.concatenate([mx.concatenate([old, old]), new], axis=2) for old, new in both)

    def make_mask(self, N, return_array=False, window_size=None):
        """Return what is added to the scores, (2B, 1, N, P + N): 0 where a token may look, much less elsewhere."""
        rows = mx.arange(N) + self.offset[:, None]  # true positions
        prompt = mx.arange(self.keys.shape[2])
        prompt = mx.where(prompt < self.offset[:, None], prompt, 2**30)  # padding lies after everything
        behind = rows[:, None, :, None] - mx.concatenate([prompt, rows], axis=1)[:, None, None, :]
        seen = (behind >= 0) & (behind < (window_size or 2**30))
        return mx.where(seen, 0, mx.finfo(self.keys.dtype).min).astype(self.keys.dtype)  # CUDA is slow with booleans


def sorted_batches(pairs, size, share):
    """Return [(pairs, (P, R))]: batches of like lengths, padded so that tokens and compilations take the least time."""
    prompts, answers = np.array([(len(p["prompt"]) - 1, max(len(p["chosen"]), len(p["rejected"]))) for p in pairs]).T
    starts, places, plans = np.arange(0, len(pairs), size), np.argsort(np.argsort(prompts, kind="stable")), []
    for part, up in product(size * 2 ** np.arange(12), PAD * np.arange(1, 9 if COMPILE else 2)):
        order = np.lexsort((answers, places // part))  # by prompt, and by answer in every part
        longest = (np.maximum.reduceat(x[order], starts) for x in (prompts, answers, prompts + answers))
        P, R, whole = (-(-x // up) * up for x in longest)
        shared = share & (P + 2 * R <= SHARE * 2 * whole)  # else P is 0, and each row holds the whole prompt
        shapes = [*zip(np.where(shared, P, 0).tolist(), np.where(shared, R, whole).tolist())]
        plans.append((size * sum(P + 2 * R for P, R in shapes) + COMPILE * len({*shapes}), order.tolist(), shapes))
    _, order, shapes = min(plans)
    return [([pairs[i] for i in order[start : start + size]], shape) for start, shape in zip(starts, shapes)]


def make_batch(pairs, shape):
    """Return B pairs as arrays: prompts (B, P), lengths (2B,), rows (2B, R + 1), mask (2B, R), weight (B,) ...

    prompts hold all of each but its last token, which begins its rows; mask is 1 where rows[:, 1:] is of the answer.
    """
    P, R = shape
    before = [len(pair["prompt"]) - 1 if P else 0 for pair in pairs]
    rows = [pair["prompt"][i:] + pair[side] for side in ("chosen", "rejected") for pair, i in zip(pairs, before)]
    starts = [len(pair["prompt"]) - 1 - i for pair, i in zip(pairs, before)] * 2
    masks = [[0.0] * start + [1.0] * (len(row) - 1 - start) for row, start in zip(rows, starts)]
    pad = lambda lists, width: mx.array([values + [0] * (width - len(values)) for values in lists])
    batch = {"rows": pad(rows, R + 1), "mask": pad(masks, R), "lengths": mx.array(before * 2)}
    batch["prompts"] = pad([pair["prompt"][:i] for pair, i in zip(pairs, before)], P)
    return batch | {name: mx.array([p[name] for p in pairs]) for name in ("weight", "ref_logps") if name in pairs[0]}


def answer_logits(model, batch):
    """Return the logits of all targets, rows[:, 1:], (2B, R, V); each prompt is computed once for both answers."""
    prefix = None
    if batch["prompts"].size:
        prefix = [ConcatenateKVCache() for _ in model.layers]
        model(batch["prompts"], cache=prefix)  # nothing reads its logits, so mlx never computes them
        prefix = [PrefixCache(layer, batch["lengths"]) for layer in prefix]
    return model(batch["rows"][:, :-1], cache=prefix)


def score_batch(logits, base_logits, batch):
    """Return (2B, 2) float32: each answer's log-probability and its KL(model || base), both summed over its tokens."""
    found, rows = [], zip(logits, base_logits, batch["rows"][:, 1:], batch["mask"] > 0)
    for row, base_row, targets, mask in rows:  # one by one, for the memory's sake
        p = nn.log_softmax(row.astype(mx.float32))  # (R, V)
        q = p if logits is base_logits else nn.log_softmax(base_row.astype(mx.float32))
        logps = mx.take_along_axis(p, targets[:, None], axis=-1)[:, 0]
        kl = nn.losses.kl_div_loss(q, p, reduction="none")  # exact, from both whole distributions
        found.append(mx.where(mask, mx.stack([logps, kl]), 0.0).sum(-1))
    return mx.stack(found)


def shares_prompts(model, pairs):
    """Return whether the model scores shared prompts as whole rows, as one with a recurrent state does not."""
    pairs = [pick(pairs, key=lambda pair: len(pair["prompt"])) for pick in (min, max)]
    P = max(len(pair["prompt"]) for pair in pairs)
    R = max(len(pair[side]) for pair in pairs for side in ("chosen", "rejected"))
    whole, shared = make_batch(pairs, (0, P + R)), make_batch(pairs, (P, R))
    logits = answer_logits(model, whole)
    try:
        others = answer_logits(model, shared)
        logps, others = (score_batch(x, x, batch)[:, 0] for x, batch in ((logits, whole), (others, shared)))
        gaps = mx.abs(others - logps) / mx.sqrt(whole["mask"].sum(-1))  # as rounding grows
        return gaps.max().item() < (2e-3 if logits.dtype == mx.float32 else 0.2)
    except Exception:
        return False


def score_batches(models, batches):
    """Give each pair its "models": under each of them, both answers' log-probabilities and their KL from the base."""
    for some, shape in tqdm(batches, "scoring", leave=False, disable=None):
        batch = make_batch(some, shape)
        base = answer_logits(models["base"], batch)
        for name, model in models.items():
            logits = base if name == "base" else answer_logits(model, batch)
            found = np.array(score_batch(logits, base, batch), float).reshape(2, -1, 2)
            wrong = f"the log-probabilities of {name} are no numbers, as of float16, or of too high a --learning-rate"
            need(np.isfinite(found).all(), wrong)
            for pair, (chosen, kl), (rejected, more) in zip(some, *found):
                pair["models"][name] = {"chosen": chosen, "rejected": rejected, "kl": kl + more}


# -------------------------------------------------------------------------------------------------------- statistics


def interval(values):
    """Return the 95 % interval (low, high) of a mean: of a share near 0 or 1 Wilson's, else the bootstrap's.

    Drawing anew from values that are nearly all alike finds no doubt, and from fewer than 10 too little: nan then.
    """
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    n, share, z = len(values), values.mean(), 1.96
    if set(values) <= {0.0, 1.0} and min(share, 1 - share) * n < 5:  # Wilson 1927, Eq. 4 of Brown, Cai, DasGupta 2001
        middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    if n < 10:
        return math.nan, math.nan
    means = [values[rng.integers(0, n, n)].mean() for _ in range(2000)]
    return tuple(np.percentile(means, (2.5, 97.5)))


def mcnemar(one, two):
    """Return how often only one and only two is right, of (N,) bool, and the two-sided p of McNemar's exact test."""
    only_one, only_two = int((one & ~two).sum()), int((two & ~one).sum())
    n, k = only_one + only_two, min(only_one, only_two)
    return only_one, only_two, min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def right(scores, lengths=1):
    """Return whether each pair's chosen answer is the likelier one, (N,): in sum, or a token if lengths (N, 2)."""
    chosen, rejected = (scores[:, :2] / lengths).T
    return chosen > rejected


def summarize(scores, base, lengths):
    """Return {name: value, or (mean, low, high)} of a model; scores, base (N, 3), lengths (N, 2); nats without beta."""
    change, now, before = (scores - base)[:, :2], right(scores), right(base)
    margin, longer = change @ [1, -1], lengths @ [1, -1]
    product = ((margin - margin.mean()) * (longer - longer.mean())).mean()
    mean = lambda values: (values.mean(), *interval(values))
    return {
        "accuracy": mean(now),
        "accuracy_mean": mean(right(scores, lengths)),
        "gained": (margin > 0).mean(),
        "margin": mean(margin),
        "quartiles": np.percentile(margin, (25, 50, 75)),
        "became_right": (now & ~before).mean(),
        "became_wrong": (before & ~now).mean(),
        "chosen_change": mean(change[:, 0]),
        "rejected_change": change[:, 1].mean(),
        "kl": scores[:, 2].sum() / lengths.sum(),
        "perplexity": math.exp(-scores[:, 0].sum() / lengths[:, 0].sum()),
        "length_correlation": product / (margin.std() * longer.std() or 1),
        "accuracy_longer": now[longer > 0].mean() if (longer > 0).any() else math.nan,
        "accuracy_shorter": now[longer < 0].mean() if (longer < 0).any() else math.nan,
    }


# ------------------------------------------------------------------------------------------------------------ report


def to_table(heads, rows):
    """Return a Markdown table."""
    cell = lambda value: "-" if value == "nan" else " ".join(str(value).split()).replace("|", "\\|")
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in [heads, ["---"] * len(heads), *rows])


def headlines(found, scores, lengths, model):
    """Return what a person wants to know first: a sentence on each adapter, and its warnings."""
    wins, lines = {name: right(part, lengths) for name, part in scores.items()}, []
    before = wins["base"].sum()
    if len(found) == 1:
        return [f"{model} prefers the better answer in {before} of {len(lengths)} held-out pairs; guessing gives half."]
    for name in [*found][1:]:
        who, m = "The adapter" if len(found) == 2 else f"The adapter {name}", found[name]
        now = (
            f"prefers the better answer in {wins[name].sum()} of {len(lengths)} held-out pairs, before it was {before}"
        )
        chance = ", which may be chance" if mcnemar(wins["base"], wins[name])[2] >= 0.05 else ""
        near = "stay close to" if m["kl"] < 0.1 else "have moved away from" if m["kl"] <= 1 else "are far from"
        lines.append(f"{who} {now}{chance}; its answers {near} the base's.")
        if m["kl"] > 1:
            lines.append(f"Warning: kl of {name} is above 1: its answers may be broken: lower --learning-rate.")
        if m["chosen_change"][0] < 0 and not m["chosen_change"][2] >= 0:
            lines.append(f"Warning: {name} made the chosen answers less likely, too (likelihood displacement).")
    return lines


def models_part(found):
    """Return the table of all models, and that of what each adapter moved."""
    heads = ["model", "accuracy, in sum", "accuracy, a token", "gained", "margin, nats", "kl", "perplexity, chosen"]
    between = lambda mean, low, high: f"{mean:.2f} " + (f"({low:.2f} to {high:.2f})" if low == low else "(too few)")
    rows, moved = [], []
    for name, m in found.items():
        gained = [f"{m['gained']:.2f}", between(*m["margin"]), f"{m['kl']:.4f}"] if name != "base" else "---"
        rows.append([name, between(*m["accuracy"]), between(*m["accuracy_mean"]), *gained, f"{m['perplexity']:.3f}"])
        changes = [f"{m['became_right']:.2f}", f"{m['became_wrong']:.2f}", between(*m["chosen_change"])]
        quartiles = " / ".join(f"{q:.2f}" for q in m["quartiles"])
        moved.append([name, quartiles, *changes, f"{m['rejected_change']:+.2f}"])
    explained = (
        "Accuracy: share of pairs whose chosen answer is likelier, in sum or (the first sentence) a token. Gained: it"
        " gained on the rejected one against the base. Margin: by how much, without beta. kl: from the base, a token."
    )
    lines = [to_table(heads, rows), explained]
    heads = ["model", "margin quartiles", "became right", "became wrong", "chosen log-prob", "rejected log-prob"]
    return lines + (["## What moved", to_table(heads, moved[1:])] if moved[1:] else [])


def tests_part(scores, lengths):
    """Return McNemar's test of every two models."""
    heads = ["models", "log-prob", "only the first right", "only the second", "both, or none", "p", ""]
    rows = []
    for (one, two), (how, by) in product(combinations(scores, 2), {"in sum": 1, "a token": lengths}.items()):
        first, second, p = mcnemar(right(scores[one], by), right(scores[two], by))
        better = f"the {'first' if first > second else 'second'} is better" if p < 0.05 else "no difference to be seen"
        rows.append([f"{one}, {two}", how, first, second, len(lengths) - first - second, f"{p:.2g}", better])
    title = f"McNemar's exact test on {len(lengths)} pairs."
    return ["## Which is better?", title, to_table(heads, rows)] if rows else []


def groups_part(found, scores, lengths, pairs):
    """Return what length does, and the accuracy by length, source and signal where these differ."""
    chosen, rejected = lengths.T
    shares = f"the chosen one in {(chosen > rejected).mean():.2f} of the pairs; {(chosen == rejected).sum()} tie."
    heads = ["model", "correlation of margin and length", "accuracy, chosen longer", "accuracy, chosen shorter"]
    shown = lambda m: (f"{m['length_correlation']:+.2f}", f"{m['accuracy_longer']:.2f}", f"{m['accuracy_shorter']:.2f}")
    rows = [[name, *shown(m)] for name, m in found.items()]
    lines = ["## Length", f"The longer answer is {shares}", to_table(heads, rows)]
    total = lengths.sum(1)
    groups = {"length": [f"quarter {i + 1}" for i in np.digitize(total, np.percentile(total, (25, 50, 75)))]}
    groups |= {name: [str(pair["row"].get(name) or "none") for pair in pairs] for name in ("source", "signal")}
    for what, kinds in groups.items():
        masks = {kind: np.array(kinds) == kind for kind in sorted(set(kinds))}
        share = lambda name, mask: f"{right(scores[name])[mask].mean():.2f}"
        rows = [[kind, mask.sum(), *(share(name, mask) for name in scores)] for kind, mask in masks.items()]
        lines += [f"## Accuracy by {what}", to_table([what, "pairs", *scores], rows)] if len(masks) > 1 else []
    return lines


def answers_part(models, tokenizer, pairs, args):
    """Return the report's part on the models' greedy answers to these pairs' prompts, side by side."""
    rows, prompts, texts = [], [pair["prompt"] for pair in pairs], [[pair["asked"] for pair in pairs]]
    settings = {"max_tokens": args.max_tokens, "completion_batch_size": args.batch_size, "return_token_ids": True}
    for name, model in models.items():
        done = batch_generate(model, tokenizer, prompts, **settings)
        lengths = np.array([len(ids) for ids in done.token_ids])
        rows.append([name, f"{lengths.mean():.1f}", f"{(lengths < args.max_tokens).mean():.2f}"])
        texts.append(done.texts)
    lines = [f"Greedy answers to {len(pairs)} prompts.", to_table(["model", "tokens", "end by themselves"], rows)]
    cells = [[text[:200] for text in row] for row in zip(*texts)]
    return ["## Own answers", *lines, to_table(["prompt", *models], cells)]


def draw(folder, scores):
    """Draw margins.png and shift.png; return the Markdown that shows them, or says that matplotlib is not there."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return ["No pictures: pip install matplotlib"]
    plt.switch_backend("Agg")
    (left, left_ax), (below, below_ax) = plt.subplots(figsize=(7, 3.2)), plt.subplots(figsize=(5.4, 4.6))
    gaps = {name: part[:, 0] - part[:, 1] for name, part in scores.items()}
    edges = np.histogram_bin_edges([gap - gaps["base"] for gap in gaps.values()], 30)
    for name in [name for name in gaps if name != "base"]:
        left_ax.hist(gaps[name] - gaps["base"], edges, alpha=0.5, label=name)
        below_ax.scatter(gaps["base"], gaps[name], s=14, alpha=0.6, label=name)
    left_ax.axvline(0, color="black", linewidth=1)
    left_ax.set(xlabel="margin (nats): right of 0 the chosen answer gained", ylabel="pairs")
    below_ax.axhline(0, color="black", linewidth=1)
    below_ax.axline((0, 0), slope=1, color="black", linewidth=1, linestyle=":")
    below_ax.set(xlabel="base: log-prob chosen - rejected (nats)", ylabel="adapter: the same")
    for figure, ax, name in ((left, left_ax, "margins.png"), (below, below_ax, "shift.png")):
        ax.legend(frameon=False)
        figure.savefig(folder / name, dpi=130, bbox_inches="tight")
        plt.close(figure)
    return ["## Margins", "![Margins](margins.png)", "## Before and after", "![Before and after](shift.png)"]


# -------------------------------------------------------------------------------------------------------------- main


def load_base(args):
    """Return the base and its tokenizer, of a folder here, beside an adapter or beside this script, or of the hub."""
    folders = [Path(), *(place for path in args.adapter_path for place in (path.resolve(), *path.resolve().parents))]
    found = [folder / args.model for folder in (*folders, Path(__file__).parent)]
    found = [str(path) for path in found if (path / "config.json").is_file()]
    with blame(args.model, "give a model's folder, or its name on the Hugging Face hub: --model"):
        try:
            return lora.load((found or [args.model])[0], {"trust_remote_code": args.trust_remote_code})
        except Exception as error:
            missing = "no such folder with a config.json is here, beside an adapter or this script, nor on the hub"
            raise ValueError(error if found else f"{missing}: {error}") from error


def check_places(args):
    """Exit with one line, now and not after an hour, where a file cannot be written, or must not be written over."""
    report, records, *hard = args.out / "report.md", args.out / "pairs.jsonl", *args.hard[1:]
    with blame(args.out, "choose another --out"):
        args.out.mkdir(parents=True, exist_ok=True)
        need(report.exists() or not records.exists(), "its pairs.jsonl is no report's, and would be lost")
    for file in (report, records, *hard):
        with blame(file, "choose another place for it"):
            need(Path(file).resolve() != Path(args.data).resolve(), "these are the pairs to measure on")
            open(file, "a").close()


def write(file, lines):
    """Write lines of text."""
    with blame(file, "choose another place for it, or make room"):
        Path(file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a traceback
    args = parse_args()
    check_places(args)
    if not (CUDA or METAL):
        mx.disable_compile()  # it calls a C++ compiler, which takes longer than it saves
    maybe_set_recommended_wired_limit()
    model, tokenizer = load_base(args)
    models, pairs = {"base": model}, load_data(args, tokenizer)
    for path in args.adapter_path:
        with blame(path, "is it an adapter of this model?"):  # a deep copy of a model has the same arrays in memory
            models[path.resolve().name] = load_adapters(copy.deepcopy(model), str(path)).eval()
    with blame(args.model, "take another model or adapter or, where memory ends, --batch-size 1"):
        score_batches(models, sorted_batches(pairs, args.batch_size, shares_prompts(model, pairs)))
    scores = {name: np.array([[*pair["models"][name].values()] for pair in pairs]) for name in models}
    lengths = np.array([[pair["chosen_tokens"], pair["rejected_tokens"]] for pair in pairs])
    found = {name: summarize(part, scores["base"], lengths) for name, part in scores.items()}
    lines = headlines(found, scores, lengths, args.model)
    lines += [f"{args.model} on {len(pairs)} pairs of {args.data}. In brackets: 95 % intervals, bootstrap or Wilson's."]
    lines += models_part(found) + tests_part(scores, lengths)
    shown = [*lines, f"Written: {args.out}/report.md and {args.out}/pairs.jsonl"]
    lines += groups_part(found, scores, lengths, pairs)
    kept = ("place", "chosen_tokens", "rejected_tokens", "models")
    write(args.out / "pairs.jsonl", [json.dumps({name: pair[name] for name in kept}) for pair in pairs])
    if args.hard:
        gaps = [part[:, 0] - part[:, 1] for part in scores.values()]
        margins = gaps[-1] - gaps[0] if args.adapter_path else gaps[0]
        order = np.argsort(margins, kind="stable")[: int(args.hard[0])]  # the most wrong first
        write(args.hard[1], [json.dumps(pairs[i]["row"], ensure_ascii=False, default=str) for i in order])
        low, high = margins[order[[0, -1]]]
        lines += [f"{len(order)} pairs with margins from {low:.2f} to {high:.2f} nats are in {args.hard[1]}."]
    if args.generate:
        with blame(args.model, "leave out --generate"):
            lines += answers_part(models, tokenizer, pairs[: args.generate], args)
    with blame(args.out, "choose another --out, or make room"):
        lines += draw(args.out, scores) if args.adapter_path else []
    write(args.out / "report.md", ["\n\n".join(lines)])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # head and less may not read to the end
    print("\n\n".join(shown))


if __name__ == "__main__":
    main()
