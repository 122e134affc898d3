"""
Time a training step of dpo_trainer.py against mlx-lm-lora's `train_dpo` on the same batches, in one process.

    python tests/bench_step.py --shape 1B --lengths 900/150,180/300
    python tests/bench_step.py --shape cpu --lengths 450/75 --pairs 8     a small float32 model, for a CPU
    python tests/bench_step.py --options "--grad-checkpoint"              options of dpo_trainer.py

A random model, LoRA of rank 8 on every linear layer, AdamW, no checkpointing. The two take turns: each turn builds the
model, compiles in a first pass over all batches, times a second one and frees everything. mlx-lm-lora gets our batches,
padded to the longest row as it does, and runs its reference model in each step, as it does; ours ran before training.

ms/step   median of the rounds, the least and the most; with making the batch's arrays
peak GB   of the second pass, weights included
"""

import argparse
import gc
import importlib.util
import io
import json
import math
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo_trainer as dpo

FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
FIELDS += ("head_dim", "vocab_size")
SHAPES = {  # Llama 3.2's two small ones, and one that a laptop's CPU can run
    "1B": (2048, 16, 8192, 32, 8, 64, 128256, mx.bfloat16),
    "3B": (3072, 28, 8192, 24, 8, 128, 128256, mx.bfloat16),
    "cpu": (512, 4, 1536, 8, 4, 64, 8192, mx.float32),
}
SIDES, PEER = ("prompt", "chosen", "rejected"), "mlx-lm-lora"


def build(shape):
    *sizes, dtype = SHAPES[shape]
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(dict(zip(FIELDS, sizes), model_type="llama", rms_norm_eps=1e-5)))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def draw_pairs(medians, count, vocabulary):
    """Return count pairs of random ids whose lengths are lognormal, as chats are, of these medians."""
    medians, rng = np.array([medians[0], medians[1], medians[1]]), np.random.default_rng(1)
    lengths = np.random.default_rng(0).lognormal(np.log(medians), 0.5, (count, 3))
    rows = [
        [rng.integers(5, vocabulary, n).tolist() for n in row] for row in np.clip(lengths, 4, 4 * medians).astype(int)
    ]
    return [dict(zip(SIDES, row), weight=1.0, ref_logps=[-1.0, -1.0]) for row in rows]


def time_ours(shape, batches, args):
    """Return the seconds and peak GB of the second of three passes."""
    model, marks, peaks = build(shape), [], []

    def clock(steps, name, *_, **__):
        for step in steps:
            if name == "training":
                marks.append(time.perf_counter())
                peaks.append(mx.get_peak_memory() / 1e9)
                mx.reset_peak_memory()
            yield step

    # what ours replaces in mlx-lm's module must not reach mlx-lm-lora, which uses the same
    with mock.patch.dict(vars(llama)), mock.patch.object(dpo, "tqdm", clock), tempfile.TemporaryDirectory() as folder:
        dpo.tqdm.write = lambda line: None
        args.adapter_path, args.epochs, args.steps_per_eval = folder, 3, 10**6
        initial = dpo.trainable_parameters(model, args)
        with redirect_stdout(io.StringIO()):
            dpo.train(model, initial, {"train": batches, "valid": batches[:1]}, args, dpo.dpo_metrics)
        last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-2])
    assert math.isfinite(last["loss"]) and len(marks) == 3 * len(batches)
    return marks[2 * len(batches)] - marks[len(batches)], max(peaks[len(batches) + 1 : 2 * len(batches) + 1])


def peer_batch(pairs):
    """Return chosen ids, rejected ids and their masks, (B, T) each, as mlx-lm-lora's iterate_dpo_batches makes them."""
    rows = [(len(pair["prompt"]), pair["prompt"] + pair[side]) for side in SIDES[1:] for pair in pairs]
    width = max(len(row) for _, row in rows)
    ids, masks = np.zeros((2 * len(pairs), width), np.int32), np.zeros((2 * len(pairs), width), np.float32)
    for i, (start, row) in enumerate(rows):
        ids[i, : len(row)] = row
        masks[i, start : len(row)] = 1
    return tuple(mx.array(half) for both in (ids, masks) for half in np.split(both, 2))


def time_peer(shape, batches, args):
    """Return the seconds and peak GB of a second pass of mlx-lm-lora's training over the same batches."""
    from mlx_lm_lora.trainer import dpo_trainer as peer

    model, reference, reports = build(shape), build(shape), []  # it, too, loads the model twice
    model.freeze()
    reference.freeze()
    linear_to_lora_layers(model, -1, args.lora_parameters)
    optimizer = optim.AdamW(args.learning_rate)
    optimizer.init(model.trainable_parameters())  # or its first batch's step would be compiled again in the timed pass
    feed = (peer_batch(pairs) for pairs, _ in batches * 2)  # made within the step, as ours
    # a Mac's memory limit: other devices have none
    limits = {"device_info": lambda: {"max_recommended_working_set_size": 0}, "set_wired_limit": lambda limit: limit}
    watch = SimpleNamespace(on_train_loss_report=lambda report: (reports.append(report), mx.reset_peak_memory()))
    with (
        mock.patch.object(peer, "iterate_dpo_batches", lambda **_: feed),
        mock.patch.multiple(mx, **limits),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
    ):
        settings = peer.DPOTrainingArgs(iters=2 * len(batches), steps_per_report=len(batches), steps_per_save=10**9)
        settings.adapter_file = f"{folder}/adapters.safetensors"
        peer.train_dpo(model, reference, optimizer, [], None, settings, training_callback=watch)
    assert math.isfinite(reports[-1]["train_loss"]), "the loss is not finite"
    return len(batches) / reports[-1]["iterations_per_second"], reports[-1]["peak_memory"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--lengths", default="900/150,180/300", help="median tokens PROMPT/ANSWER, commas between")
    for name, default in (("pairs", 16), ("batch-size", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--options", default="", help="of dpo_trainer.py")
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    words = ["--model", "-", "--data", "-", "--batch-size", str(options.batch_size), *options.options.split()]
    dpo.COMPILE = 0  # what is timed was compiled before, so padding that saves compilations would only cost
    sides = {"ours": time_ours, PEER: time_peer}
    if options.ours_only or not importlib.util.find_spec("mlx_lm_lora"):
        del sides[PEER]
    print(
        f"{mx.device_info()['device_name']}, mlx {mx.__version__}, {options.shape}, {options.pairs} pairs", flush=True
    )
    for name in options.lengths.split(","):
        pairs = draw_pairs([int(n) for n in name.split("/")], options.pairs, SHAPES[options.shape][-2])
        batches, found = dpo.sorted_batches(pairs, options.batch_size, True), {side: [] for side in sides}
        for side in list(sides) * options.rounds:
            found[side].append(sides[side](options.shape, batches, dpo.parse_args(words)))
            gc.collect()  # what was compiled and its model hold each other
            mx.clear_cache()
        for side, rounds in found.items():
            ms = [1e3 * x / len(batches) for x in np.quantile([seconds for seconds, _ in rounds], (0.5, 0, 1))]
            peak = np.median([peak for _, peak in rounds])
            print(f"{name:9}{side:12}{ms[0]:9.1f} ms/step ({ms[1]:.1f}-{ms[2]:.1f}){peak:8.2f} GB", flush=True)
        if len(found) == 2:
            ours, theirs = (np.median(rounds, axis=0) for rounds in found.values())
            print(f"{name:9}{'ratio':12}{ours[0] / theirs[0]:9.3f} {ours[1] / theirs[1]:26.3f}", flush=True)


if __name__ == "__main__":
    main()
