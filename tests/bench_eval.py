"""
Time eval_prefs.py's scoring of preference pairs against plain mlx-lm, which scores each answer by itself.

    python tests/bench_eval.py --shape 1B --lengths 900/150,180/300
    python tests/bench_eval.py --shape cpu --lengths 450/75 --pairs 16     a small float32 model, for a CPU

A random model and LoRA of rank 8 on every linear layer; both score every pair under the base, then under the adapter.
ours: one forward over a batch of pairs of like lengths, prompts shared. plain: model(prompt + answer), one row at a
time, and a float32 log-softmax over the answer. The two take turns; each is timed over its first pass over the pairs,
as an evaluation is, compiling included, after one pair that starts the device. Their log-probabilities are compared.

pairs/s   median of the rounds, under base and adapter both
/ plain   the plain way's seconds over these: above 1 is faster
gap       the largest difference from the plain way's log-probabilities, in nats a token
with KL   ours with the exact KL(adapter || base), which is one forward more, as score_pairs computes it
"""

import argparse
import gc
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from bench_step import SHAPES, SIDES, build, draw_pairs
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_prefs

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


def add_adapter(model):
    """Put LoRA into the model; return its random parameters and those that make the model its base, {name: array}."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    initial = dict(tree_flatten(model.trainable_parameters()))
    mx.random.seed(1)
    own = {name: w + 0.01 * mx.random.normal(w.shape).astype(w.dtype) for name, w in initial.items()}
    mx.eval(own, initial)
    model.update(eval_prefs.tree_unflatten(list(own.items())))
    return own, initial


def score_ours(model, pairs, args):
    """Return (N, 2) log-probabilities, as add_reference computes them."""
    numbered = [pair | {"number": i} for i, pair in enumerate(pairs)]
    found, score = np.zeros((len(pairs), 2)), mx.compile(partial(eval_prefs.completion_logps, model))
    for batch in eval_prefs.sorted_batches(numbered, args.batch_size, args.share):
        logps = score(eval_prefs.make_batch(batch, args.share))
        found[[pair["number"] for pair in batch]] = np.array(logps).reshape(2, -1).T
    return found


def score_plain(model, pairs, args):
    """Return (N, 2) log-probabilities, each answer's with a forward of its own."""

    def score(prompt, answer):
        logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]
        logps = nn.log_softmax(logits.astype(mx.float32), axis=-1)
        return mx.take_along_axis(logps, mx.array(answer)[:, None], axis=-1).sum().item()

    return np.array([[score(pair["prompt"], pair[side]) for side in SIDES[1:]] for pair in pairs])


def time_scoring(score, shape, pairs, args):
    """Return the seconds of scoring the pairs under base and adapter, and both's log-probabilities (2, N, 2)."""
    model, seconds, found = build(shape).eval(), 0.0, []
    args.share = eval_prefs.settle_sharing(model, pairs)
    for adapt in (lambda model: None, add_adapter):
        adapt(model)
        model.eval()
        score(model, pairs[:1], args)
        start = time.perf_counter()
        found.append(score(model, pairs, args))
        seconds += time.perf_counter() - start
    return seconds, np.array(found)


def score_with_kl(shape, pairs, args):
    """Return the seconds of score_pairs over the pairs, and of their base before it; and the log-probabilities."""
    model = build(shape).eval()
    args.share = eval_prefs.settle_sharing(model, pairs)
    score_ours(model, pairs[:1], args)
    start = time.perf_counter()
    base = score_ours(model, pairs, args)
    seconds = time.perf_counter() - start
    weights = add_adapter(model)
    eval_prefs.score_pairs(model, *weights, pairs[:1], args)
    start = time.perf_counter()
    tuned = eval_prefs.score_pairs(model, *weights, pairs, args)[:, :2]
    return seconds + time.perf_counter() - start, np.array([base, tuned])


def compare(name, options):
    """Print a line each of ours, of plain mlx-lm and of ours with KL, for lengths of these medians."""
    args = eval_prefs.parse_args(["--model", "-", "--batch-size", str(options.batch_size)])
    pairs = draw_pairs(map(int, name.split("/")), options.pairs, SHAPES[options.shape][-2])
    sides = {"ours": partial(time_scoring, score_ours), "plain": partial(time_scoring, score_plain)}
    sides, took, logps = sides | {"with KL": score_with_kl}, {}, {}
    for side in list(sides) * options.rounds:
        seconds, logps[side] = sides[side](options.shape, pairs, args)
        took.setdefault(side, []).append(seconds)
        gc.collect()  # what was compiled and its model hold each other
        mx.clear_cache()
    lengths = np.array([[len(pair[side]) for side in SIDES[1:]] for pair in pairs])
    for side, rounds in took.items():
        ratio = np.median(took["plain"]) / np.median(rounds)
        each = sorted(plain / ours for plain, ours in zip(took["plain"], rounds))
        gap = (np.abs(logps[side] - logps["plain"]) / lengths).max()
        line = f"{name:9} {side:8}{len(pairs) / np.median(rounds):10.3f}{ratio:9.2f}"
        print(f"{line}{f'({each[0]:.2f}-{each[-1]:.2f})':>16}{gap:12.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--lengths", default="900/150,180/300", help="median tokens PROMPT/ANSWER, commas between")
    for name, default in (("pairs", 32), ("batch-size", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    options = parser.parse_args()
    print(f"{mx.device_info()['device_name']}, mlx {mx.__version__}, batches of {options.batch_size} pairs", flush=True)
    print(f"{options.shape}, {options.pairs} pairs, {options.rounds} rounds")
    print(f"{'lengths':18}{'pairs/s':>10}{'/ plain':>9}{'(least-most)':>16}{'gap':>12}", flush=True)
    for name in options.lengths.split(","):
        compare(name, options)


if __name__ == "__main__":
    main()
