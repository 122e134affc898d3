"""
Time a training step of dpo_trainer.py against mlx-lm-lora's `train_dpo` on the same batches, in one process.

    python tests/bench_step.py --shape 1B --lengths 900/150,180/300
    python tests/bench_step.py --shape cpu --lengths 450/75 --pairs 8     a small float32 model, for a CPU
    python tests/bench_step.py --simpo                                    simpo_trainer.py against dpo_trainer.py
    python tests/bench_step.py --padding 2000 --lengths 900/150           counts the padding of our batches; no model

A random model, LoRA of rank 8 on every linear layer, AdamW, no checkpointing. The two take turns: each turn builds the
model, compiles in a first pass over all batches, times a second one and frees everything. mlx-lm-lora gets our batches,
padded to the longest row as it does, and runs its reference model in each step, as it does; ours ran before training.

ms/step   median of the rounds, the least and the most; with making the batch's arrays
peak GB   of the second pass, weights included
rate      share of the device's own rate at a large matrix product that goes into what the pairs need: 4 x parameters x
          tokens, each prompt once, the vocabulary for answer tokens alone; attention is not counted
floor     2 x the compiled forward of the same batches / the step (frozen weights need no gradient of their own); above
          100 % where the backward takes less than the forward
padding   share of padding in the tokens that our step computes
"""

import argparse
import gc
import importlib.util
import io
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
import simpo_trainer as simpo

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


def draw_lengths(prompt, answer, count):
    """Return (count, 3) tokens of prompt, chosen, rejected: lognormal, as chats are, of these medians."""
    medians = np.array([prompt, answer, answer])
    drawn = np.random.default_rng(0).lognormal(np.log(medians), 0.5, (count, 3))
    return np.clip(drawn, 4, 4 * medians).astype(int)


def draw_pairs(medians, count, vocabulary):
    rng = np.random.default_rng(1)
    rows = [[rng.integers(5, vocabulary, n).tolist() for n in row] for row in draw_lengths(*medians, count)]
    return [dict(zip(SIDES, row), weight=1.0, ref_logps=[-1.0, -1.0]) for row in rows]


def padding_share(batches):
    """Return the share of padding in make_batch's arrays; prompts may stand apart there, once for both answers."""
    padded = real = 0
    for batch in batches:
        mask, prompts = np.array(batch["mask"]) > 0, np.array(batch.get("prompts", []))
        padded += batch["rows"][:, :-1].size + prompts.size
        real += (mask * np.arange(1, mask.shape[1] + 1)).max(-1).sum()  # a row ends at its last scored token
        real += np.array(batch["prompt_lengths"]).sum() if prompts.size else 0
    return 1 - real / padded


def product_rate(dtype):
    """Return the FLOP/s of a large matrix product, the best of ten tries."""
    size, seconds = 8192 if mx.default_device() == mx.Device(mx.gpu) else 1024, []
    weights = (mx.random.normal((size, size)) / math.sqrt(size)).astype(dtype)  # its products keep their scale
    for _ in range(10):
        start = time.perf_counter()
        mx.eval(weights @ weights @ weights @ weights @ weights)  # four at a time, for the launch to weigh little
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * size**3 / min(seconds)


def needed_work(shape, pairs):
    """Return the FLOPs that forward and LoRA's backward of the pairs need at least, attention left out."""
    hidden, layers, inner, heads, kv_heads, head_dim, vocabulary, _ = SHAPES[shape]
    cached = 2 * hidden * head_dim * kv_heads  # of the last layer a prompt needs only the keys and values
    layer = cached + 2 * hidden * head_dim * heads + 3 * hidden * inner
    prompts, answers = (sum(len(pair[side]) for pair in pairs for side in sides) for sides in (SIDES[:1], SIDES[1:]))
    return 4 * (prompts * (layers * layer - layer + cached) + answers * (layers * layer + hidden * vocabulary))


def time_ours(shape, plan, args, script=dpo, objective=dpo.dpo_metrics):
    """Return the seconds and peak GB of a pass, the seconds of its forwards alone, and its batches' padding share."""
    model, batches, make_batch, half = build(shape), [], script.make_batch, len(plan) // 2
    args.share = script.settle_sharing(model, plan[0][0])
    params, layout = script.trainable_parameters(model, args)

    def recorded(*given, **named):  # floor and padding are of the very arrays that were trained on
        batches.append(make_batch(*given, **named))
        return batches[-1]

    # what ours replaces in mlx-lm's module must not reach mlx-lm-lora, which uses the same
    with mock.patch.dict(vars(llama)), mock.patch.object(script, "make_batch", recorded):
        script.lighten(model, args)
        for step, params, *_, rates in script.train(model, params, layout, plan, args, objective):
            if step == half:
                mx.eval(params)  # what is yielded is still being computed
                mx.reset_peak_memory()
                start = time.perf_counter()
        mx.eval(params)
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory() / 1e9
    assert math.isfinite(rates["grad_norm"].item()), "the loss is not finite"
    policy = lambda params: script.install(model, script.unpack(params, layout), True)
    forward = mx.compile(lambda params, batch: script.completion_logps(policy(params), batch))
    for _ in range(2):  # the first pass compiles
        start, logps = time.perf_counter(), None
        for batch in batches[half:]:
            before, logps = logps, forward(params, batch)
            mx.async_eval(logps)  # as in training the host is one batch ahead
            mx.eval(before)
        mx.eval(logps)
    return seconds, peak, time.perf_counter() - start, padding_share(batches[half:])


def peer_batch(pairs):
    """Return chosen ids, rejected ids and their masks, (B, T) each, as mlx-lm-lora's iterate_dpo_batches makes them."""
    rows = [(len(pair["prompt"]), pair["prompt"] + pair[side]) for side in SIDES[1:] for pair in pairs]
    width = max(len(row) for _, row in rows)
    ids, masks = np.zeros((2 * len(pairs), width), np.int32), np.zeros((2 * len(pairs), width), np.float32)
    for i, (start, row) in enumerate(rows):
        ids[i, : len(row)] = row
        masks[i, start : len(row)] = 1
    return tuple(mx.array(half) for both in (ids, masks) for half in np.split(both, 2))


def time_simpo(shape, plan, args):
    own = simpo.parse_args(f"--model - --data - --epochs 2 --batch-size {args.batch_size}".split())
    return time_ours(shape, plan, own, simpo, simpo.simpo_metrics)


def time_peer(shape, plan, args):
    """Return the seconds and peak GB of a pass of mlx-lm-lora's training over the same batches."""
    from mlx_lm_lora.trainer import dpo_trainer as peer

    model, reference, reports, half = build(shape), build(shape), [], len(plan) // 2  # it, too, loads the model twice
    model.freeze()
    reference.freeze()
    linear_to_lora_layers(model, args.num_layers, args.lora_parameters)
    optimizer = optim.AdamW(args.learning_rate)
    optimizer.init(model.trainable_parameters())  # or its first batch's step would be compiled again in the timed pass
    feed = (peer_batch(batch) for group in plan for batch in group)  # made within the step, as ours
    # a Mac's memory limit: other devices have none, and on a Mac our training has set it before
    limits = {"device_info": lambda: {"max_recommended_working_set_size": 0}, "set_wired_limit": lambda limit: limit}
    watch = SimpleNamespace(on_train_loss_report=lambda report: (reports.append(report), mx.reset_peak_memory()))
    with (
        mock.patch.object(peer, "iterate_dpo_batches", lambda **_: feed),
        mock.patch.multiple(mx, **limits),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
    ):
        settings = peer.DPOTrainingArgs(iters=len(plan), steps_per_report=half, steps_per_save=10**9)
        settings.adapter_file = f"{folder}/adapters.safetensors"
        peer.train_dpo(model, reference, optimizer, [], None, settings, training_callback=watch)
    assert math.isfinite(reports[-1]["train_loss"]), "the loss is not finite"
    return half / reports[-1]["iterations_per_second"], reports[-1]["peak_memory"]


def compare(name, options, rate):
    """Print a line of ours, one of mlx-lm-lora's and one of their ratios for lengths of these medians."""
    args = dpo.parse_args(f"--model - --data - --epochs 2 --batch-size {options.batch_size}".split())
    pairs = draw_pairs(map(int, name.split("/")), options.pairs, SHAPES[options.shape][-2])
    plan, sides = dpo.plan_updates(pairs, args), {"ours": time_ours, PEER: time_peer}
    sides = {"simpo": time_simpo, "dpo": time_ours} if options.simpo else sides
    found = {side: [] for side in list(sides)[: 1 if options.ours_only else 2]}
    for side in list(found) * options.rounds:
        try:
            found[side].append(sides[side](options.shape, plan, args))
        except RuntimeError as error:  # out of memory in one must not hide the other
            print(f"{name:9} {side:12} {str(error)[:200]}", flush=True)
        gc.collect()  # what was compiled and its model hold each other
        mx.clear_cache()
    found = {side: rounds for side, rounds in found.items() if rounds}
    for side, rounds in found.items():
        seconds, peak, *rest = np.median(rounds, axis=0)
        ms = [2e3 * took / len(plan) for took in (seconds, min(rounds)[0], max(rounds)[0])]
        line = f"{name:9} {side:12}{ms[0]:9.1f}{f'({ms[1]:.1f}-{ms[2]:.1f})':>18}{len(pairs) / seconds:9.2f}{peak:9.2f}"
        line += f"{needed_work(options.shape, pairs) / seconds / rate:9.0%}"
        print(line + (f"{2 * rest[0] / seconds:9.0%}{rest[1]:9.1%}" if rest else ""), flush=True)
    if len(found) == 2:
        took, peak = np.divide(*(np.median([turn[:2] for turn in rounds], axis=0) for rounds in found.values()))
        each = sorted(ours[0] / theirs[0] for ours, theirs in zip(*found.values()))
        who = "simpo/dpo" if options.simpo else "ours/theirs"
        line = f"{name:9} {who:12}{took:9.3f}{f'({each[0]:.3f}-{each[-1]:.3f})':>18}"
        print(f"{line}{1 / took:9.2f}{peak:9.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--lengths", default="900/150,180/300", help="median tokens PROMPT/ANSWER, commas between")
    for name, default in (("pairs", 16), ("batch-size", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--simpo", action="store_true", help="time simpo_trainer.py against dpo_trainer.py instead")
    parser.add_argument("--padding", type=int, metavar="N", help="only count padding and shapes over N pairs")
    options = parser.parse_args()
    print(f"{mx.device_info()['device_name']}, mlx {mx.__version__}, batches of {options.batch_size} pairs", flush=True)
    if options.padding:
        for name in options.lengths.split(","):
            args = dpo.parse_args(f"--model - --data - --batch-size {options.batch_size}".split())
            plan = dpo.plan_updates(draw_pairs(map(int, name.split("/")), options.padding, 1000), args)
            batches = [dpo.make_batch(batch) for group in plan for batch in group]
            shapes = {str(sorted((field, array.shape) for field, array in batch.items())) for batch in batches}
            print(f"{name:9} padding {padding_share(batches):.1%}, {len(shapes)} shapes in {len(batches)} batches")
        return
    if not (options.ours_only or options.simpo) and not importlib.util.find_spec("mlx_lm_lora"):
        print(f"{PEER} is not installed (pip install {PEER}): only ours is timed")
        options.ours_only = True
    rate = product_rate(SHAPES[options.shape][-1])
    print(f"{options.shape}, {options.pairs} pairs, {options.rounds} rounds; matrix products {rate / 1e12:.3g} TFLOP/s")
    heads = "".join(f"{head:>9}" for head in ("pairs/s", "peak GB", "rate", "floor", "padding"))
    print(f"{'lengths':22}{'ms/step':>9}{'(least-most)':>18}{heads}", flush=True)
    for name in options.lengths.split(","):
        compare(name, options, rate)


if __name__ == "__main__":
    main()
