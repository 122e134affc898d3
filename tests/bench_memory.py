"""
Measure peak memory and time a step of dpo_trainer.py's training on a random model of a named shape.

    python tests/bench_memory.py                       every row of the README's memory table
    python tests/bench_memory.py --shape 3B --rows base,4-bit
    python tests/bench_memory.py --rows "answers of 4000 + batch 1 + checkpointing" --vocabulary 151936

Prints a line a row: milliseconds a step, pairs a second, peak GB. Rows differ from "base" in what they name.
"""

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo_trainer as dpo

SHAPES = {  # Llama 3.2's two small ones, and one that a laptop's CPU can run
    "1B": dict(hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, head_dim=64),
    "3B": dict(hidden_size=3072, num_hidden_layers=28, intermediate_size=8192, num_attention_heads=24, head_dim=128),
    "tiny": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=512, num_attention_heads=8, head_dim=32),
}
ROWS = {  # name -> (what differs from the first row: options, bits, prompt and answer tokens)
    "base": ("", None, 700, 300),
    "4-bit": ("", 4, 700, 300),
    "batch 2": ("--batch-size 2", None, 700, 300),
    "batch 1": ("--batch-size 1", None, 700, 300),
    "half the length": ("", None, 350, 150),
    "last 8 layers": ("--num-layers 8", None, 700, 300),
    "checkpointing": ("--grad-checkpoint", None, 700, 300),
    "4-bit + batch 1 + checkpointing": ("--batch-size 1 --grad-checkpoint", 4, 700, 300),
    "dora": ("--fine-tune-type dora", None, 700, 300),
    "full": ("--fine-tune-type full", None, 700, 300),
    "answers of 4000 + batch 1": ("--batch-size 1", None, 300, 4000),
    "answers of 4000 + batch 1 + checkpointing": ("--batch-size 1 --grad-checkpoint", None, 300, 4000),
}


def build(shape, bits, vocabulary):
    module = importlib.import_module("mlx_lm.models.llama")
    config = dict(model_type="llama", num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=vocabulary, **SHAPES[shape])
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16 if mx.default_device() == mx.Device(mx.gpu) else mx.float32)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


def measure(shape, row, steps, vocabulary):
    options, bits, prompt, answer = ROWS[row]
    args = dpo.parse_args(["--model", "-", "--data", "-", *options.split()])
    rng, size = np.random.default_rng(0), args.batch_size
    draw = lambda count: rng.integers(5, vocabulary, count).tolist()
    pairs = [
        dict(prompt=draw(prompt), chosen=draw(answer), rejected=draw(answer), weight=1.0, ref_logps=[-1.0, -1.0])
        for _ in range(size * steps)
    ]
    model = build(shape, bits, vocabulary)
    args.share = dpo.settle_sharing(model, pairs)
    params, layout = dpo.trainable_parameters(model, args)
    dpo.lighten(model, args)
    plan = dpo.plan_updates(pairs, args)
    for step, params, _, rates in dpo.train(model, params, layout, plan, args, dpo.dpo_metrics):
        if step == 1:
            mx.eval(params)  # what is yielded is still being computed; the first step compiles
            mx.reset_peak_memory()
            start = time.perf_counter()
    mx.eval(params)
    seconds = (time.perf_counter() - start) / (step - 1)
    dpo.need(math.isfinite(rates["grad_norm"].item()), "the loss is not finite")
    gb = mx.get_peak_memory() / 1e9
    return {"row": row, "ms": round(1e3 * seconds), "pairs_per_s": round(size / seconds, 2), "gb": round(gb, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--rows", default=",".join(ROWS), help="with commas between them")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--chunk", type=int, default=dpo.CHUNK, help="logits at once (default: as the script)")
    args = parser.parse_args()
    dpo.CHUNK = args.chunk
    print(f"{mx.device_info()['device_name']}, {args.shape}, mlx {mx.__version__}", flush=True)
    for row in args.rows.split(","):
        try:
            print(json.dumps(measure(args.shape, row, args.steps, args.vocabulary)), flush=True)
        except Exception as error:  # out of memory in one row must not hide the others
            print(json.dumps({"row": row, "error": str(error)[:200]}), flush=True)
        mx.clear_cache()


if __name__ == "__main__":
    main()
