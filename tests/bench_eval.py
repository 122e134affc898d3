"""
Time eval_prefs.py's scoring of preference pairs against plain mlx-lm, which scores each answer by itself.

    python tests/bench_eval.py --shape 3B --lengths 900/150,180/300
    python tests/bench_eval.py --shape cpu --lengths 450/75 --pairs 16     a small float32 model, for a CPU

A random model, and an adapter of rank 8 on every linear layer; every pair is scored under both.
ours: score_batches, as for a report: batches of like lengths, prompts shared, the exact KL between the two as well.
plain: model(prompt + answer), a row at a time, and a float32 log-softmax over the answer; no KL.
The two take turns, each after a pair that starts the device. Printed: pairs a second under both models, median of the
rounds; the plain way's seconds over ours (above 1: ours is faster); the largest difference, in nats a token.
"""

import argparse
import copy
import sys
import time
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_prefs

FIELDS = "hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size"
SHAPES = {  # Llama 3.2's two small ones, and one that a laptop's CPU can run
    "1B": (2048, 16, 8192, 32, 8, 64, 128256, mx.bfloat16),
    "3B": (3072, 28, 8192, 24, 8, 128, 128256, mx.bfloat16),
    "cpu": (512, 4, 1536, 8, 4, 64, 8192, mx.float32),
}
SIDES = ("chosen", "rejected")


def build(shape):
    """Return a random model, and the same with an adapter in it."""
    *sizes, dtype = SHAPES[shape]
    model = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **dict(zip(FIELDS.split(), sizes))))
    model.set_dtype(dtype)
    tuned = copy.deepcopy(model.eval().freeze())
    linear_to_lora_layers(tuned, sizes[1], {"rank": 8, "scale": 20.0, "dropout": 0.0})
    tuned.update(tree_map(lambda w: (w + mx.random.normal(w.shape) / 100).astype(dtype), tuned.trainable_parameters()))
    mx.eval(model.parameters(), tuned.parameters())
    return {"base": model, "tuned": tuned.eval()}


def draw_pairs(prompt, answer, count, vocabulary):
    """Return pairs of random ids, of lognormal lengths, as chats have, with these medians."""
    rng, medians = np.random.default_rng(0), np.array([prompt, answer, answer])
    lengths = np.clip(rng.lognormal(np.log(medians), 0.5, (count, 3)), 4, 4 * medians).astype(int)
    rows = [[rng.integers(5, vocabulary, n).tolist() for n in row] for row in lengths]
    return [{**dict(zip(("prompt", *SIDES), row)), "models": {}} for row in rows]


def score_ours(models, pairs, size):
    """Return {name: (N, 2)}, the log-probabilities of both answers."""
    eval_prefs.score_batches(models, eval_prefs.sorted_batches(pairs, size, True))
    return {name: np.array([[pair["models"][name][side] for side in SIDES] for pair in pairs]) for name in models}


def score_plain(models, pairs, _):
    """Return the same, each answer's with a forward of its own."""
    found = {name: np.zeros((len(pairs), 2)) for name in models}
    for name, i, k in product(models, range(len(pairs)), range(2)):
        prompt, answer = pairs[i]["prompt"], pairs[i][SIDES[k]]
        logits = models[name](mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]
        logps = nn.log_softmax(logits.astype(mx.float32), axis=-1)
        found[name][i, k] = mx.take_along_axis(logps, mx.array(answer)[:, None], axis=-1).sum().item()
    return found


def compare(models, name, options):
    """Print a line for lengths of these medians."""
    pairs = draw_pairs(*map(int, name.split("/")), options.pairs, SHAPES[options.shape][-2])
    assert eval_prefs.shares_prompts(models["base"], pairs)
    took, found, ways = {"ours": [], "plain": []}, {}, {"ours": score_ours, "plain": score_plain}
    for side, score in [*ways.items()] * options.rounds:
        score(models, pairs[:1], 1)
        start = time.perf_counter()
        found[side] = np.array([*score(models, pairs, options.batch_size).values()])
        took[side].append(time.perf_counter() - start)
    ratios = sorted(plain / ours for plain, ours in zip(took["plain"], took["ours"]))
    gap = (np.abs(found["ours"] - found["plain"]) / [[len(pair[side]) for side in SIDES] for pair in pairs]).max()
    speeds = "".join(f"{len(pairs) / np.median(took[side]):10.3f}" for side in ("ours", "plain"))
    print(f"{name}: pairs/s, ours and plain {speeds}; plain / ours {np.median(ratios):.2f}", end=" ")
    print(f"({ratios[0]:.2f} to {ratios[-1]:.2f}); gap {gap:.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--lengths", default="900/150,180/300", help="median tokens PROMPT/ANSWER, commas between")
    for name, default in (("pairs", 32), ("batch-size", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    options = parser.parse_args()
    if not (eval_prefs.CUDA or eval_prefs.METAL):  # as eval_prefs.py does
        mx.disable_compile()
    print(mx.device_info()["device_name"], "mlx", mx.__version__, options)
    models = build(options.shape)
    for name in options.lengths.split(","):
        compare(models, name, options)


if __name__ == "__main__":
    main()
