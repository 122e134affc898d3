# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Fine-tune a chat model on preference pairs with DPO (LoRA, DoRA or full), holding one model in memory.

    loss = -log sigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l)))                arXiv 2305.18290, Eq. 7
    pi_w, pi_l: log-probability of the chosen and the rejected answer now; ref_w, ref_l: the same before training

    python dpo_trainer.py --data data/pairs.jsonl                                the bundled model, a minute on a CPU
    python dpo_trainer.py --model mlx-community/Llama-3.2-1B-Instruct-4bit --data my_pairs.jsonl
    python dpo_trainer.py --resume                                               goes on with what was interrupted

Reads one pair a line, {"prompt": "...", "chosen": "...", "rejected": "..."}; read_pair takes more forms. Writes, in
--adapter-path, adapters.safetensors and adapter_config.json, which mlx-lm loads, metrics.jsonl and this script.
To change the loss edit DPO_LOSSES; the data forms, read_pair; what is the answer, encode_pair; an update, train.
Letters: B pairs, 2B rows (the chosen answers, then the rejected), P prompt tokens, R row tokens, V vocabulary.
"""

import argparse
import difflib
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from bisect import bisect_left
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm import lora, utils
from mlx_lm.models.cache import ConcatenateKVCache
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
    """Return the options: the command line's over those of --config, of the run to resume or of data/demo.yaml."""
    parser = argparse.ArgumentParser(parents=[lora.build_parser()], conflict_handler="resolve", allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{message}; --help lists all options")
    own = {"model": None, "data": None, "iters": None, "num_layers": -1, "val_batches": -1, "test_batches": -1}
    own |= {"max_seq_length": 1024, "optimizer": "adamw", "lr_schedule": {"name": "cosine"}, "hf_dataset": {}}
    own |= {f"{name}_feature": name for name in ("prompt", "chosen", "rejected")} | {"adapter_path": "adapters"}
    parser.set_defaults(**{**lora.CONFIG_DEFAULTS, **own})
    add = parser.add_argument
    add("--optimizer", choices=("adamw", "adam", "sgd"), help="(default: adamw)")
    add("--loss", choices=DPO_LOSSES, default="sigmoid", help="(default: sigmoid)")
    add("--beta", type=float, default=0.1, help="hold on the reference, 0.01 loose to 0.5 tight (default: 0.1)")
    add("--label-smoothing", type=float, default=0.0, help="share of pairs taken as mislabelled, below 0.5 (0)")
    add("--delta", type=float, default=5.0, help="dpop: penalty a nat lost on the chosen answer (default: 5)")
    add("--length-normalize", action="store_true", help="log-probabilities a token (ipo: always)")
    add("--reference-model", help="folder or name (default: the model itself as it is before training)")
    add("--epochs", type=int, default=1, help="passes over the pairs; --iters counts updates instead (default: 1)")
    add("--resume", action="store_true", help="go on from the checkpoint in --adapter-path, to the bit")
    (args, unknown), config, here = parser.parse_known_args(words), {}, Path(__file__).parent
    kept = f"{args.adapter_path}/adapter_config.json" if args.resume else None
    if file := args.config or kept or (None if args.model else here / "data/demo.yaml"):
        with blame(file, "name a file of options, as data/demo.yaml, or a run's --adapter-path"):
            config = lora.yaml.load(Path(file).read_text(encoding="utf-8"), lora.yaml_loader)
            block = {"path": None, **(config.get("hf_dataset") or {})}
            parser.set_defaults(**{"data": block.pop("path"), **block, **config})
        print(f"Options not given here are those of {file}")
    for word in unknown + [f"--{name}" for name in config if name not in vars(args)]:
        flags = [f"--{name}".replace("_", "-") for name in vars(args)]
        parser.error(f"no such option: {word}; the nearest one is {difflib.get_close_matches(word, flags, 1, 0)[0]}")
    args = parser.parse_args(words)
    for name in ("model", "data", "reference_model"):  # the bundled ones are found from any folder
        path = Path(str(getattr(args, name, None)))
        setattr(args, name, str(here / path) if (here / path).exists() and not path.exists() else getattr(args, name))
    with blame("options", "--help lists them all"):
        need(args.model and args.data, "name a model with --model and pairs with --data")
        each = "beta learning_rate batch_size grad_accumulation_steps epochs steps_per_report steps_per_eval save_every"
        need(all(getattr(args, name) > 0 for name in each.split()), f"each must be above 0: {each}")
        need(0 <= args.label_smoothing < 0.5 and (args.iters is None or args.iters > 0), "bad label_smoothing or iters")
        need(args.loss in DPO_LOSSES and args.fine_tune_type in ("lora", "dora", "full"), "no such loss or type")
        make_optimizer(args, updates=1)
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


def load_pairs(args, tokenizer, source, split, batches=-1):
    """Return the first batches, -1: all, of a file, a folder's SPLIT.jsonl or a hub dataset; print what is left out."""
    path, pairs, shortened, cut = Path(source), [], 0, 0
    path = path / f"{split}.jsonl" if path.is_dir() else path
    with blame(path, "give a .jsonl file, a folder with train.jsonl, or a hub dataset (pip install datasets)"):
        if path.exists() or path.suffix in (".jsonl", ".json", ".csv"):
            rows = path.read_bytes().rstrip().splitlines()
            need(rows and rows[0].strip().endswith(b"}"), "empty, array or CSV, no JSON lines: write one object a line")
        else:
            from datasets import load_dataset

            name, _, part = source.partition(":")
            rows = load_dataset(name, split=(split == "train" and part) or args.hf_dataset.get(f"{split}_split", split))
    for number, row in enumerate(tqdm(rows, f"reading {split}", leave=False, disable=None), 1):
        with blame(f"{path}:{number}", "mend or delete the row"):
            pair = read_pair(json.loads(row) if isinstance(row, bytes) else row, args)
            turns, first = pair["prompt"], int(pair["prompt"][0]["role"] in ("system", "developer"))
            # where it is too long the oldest turns go, but no system message and no part of an answer
            starts = [first] + [i for i, turn in enumerate(turns) if turn["role"] == "user" and i > first]
            encode = lambda i: encode_pair(tokenizer, turns[:first] + turns[i:], pair["chosen"], pair["rejected"])
            fits = lambda ids: len(ids[0]) + max(len(ids[1]), len(ids[2])) <= args.max_seq_length
            start = starts[bisect_left(starts[:-1], True, key=lambda i: fits(encode(i)))]
            ids = encode(start)
        if fits(ids) and ids[1] != ids[2]:
            pairs.append({**pair, "asked": json.dumps(turns), "prompt": ids[0], "chosen": ids[1], "rejected": ids[2]})
            shortened, cut = shortened + (start > first), cut + ids[3]
    print(f"{split}: {len(pairs)} of {len(rows)} pairs (others: too long, equal answers), {shortened} lost old turns")
    if cut:
        print(f"warning: the chat template leaves a part of {cut} answers out, as thoughts: it is not trained on")
    return pairs[: batches * args.batch_size if batches > 0 else None]


# ------------------------------------------------------------------------------------------------------------- loss

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


LOG_SOFTMAX = """  // 32 threads, a simdgroup, take a row of V logits
    const uint row = thread_position_in_grid.x / 32, lane = thread_position_in_grid.x % 32;
    const device T* x = logits + (size_t)row * V;
    float top = -3e38f, sum = 0;  // of the values so far: the maximum, the sum of exp(value - maximum)
    for (int i = lane; i < V; i += 32) {
        const float value = x[i], old = top;
        top = metal::max(top, value);
        sum = sum * metal::exp(old - top) + metal::exp(value - top);
    }
    const float high = simd_max(top), log_sum = metal::log(simd_sum(sum * metal::exp(top - high)));
    if (lane > 0) return;
    lse[row] = high + log_sum;
    logps[row] = ((float)x[targets[row]] - high) - log_sum;  // not less lse: a likely token would lose digits
"""


@mx.custom_function
def fused_log_softmax(logits, targets):
    """Return log softmax(logits) at the targets, and the log-sum-exps, (...) float32 of logits (..., V), on Metal."""
    kernel = mx.fast.metal_kernel("log_softmax", ["logits", "targets"], ["logps", "lse"], LOG_SOFTMAX)
    sizes = {"grid": (32 * targets.size, 1, 1), "threadgroup": (32, 1, 1), "output_shapes": [targets.shape] * 2}
    template = [("T", logits.dtype), ("V", logits.shape[-1])]
    return kernel(inputs=[logits, targets], template=template, output_dtypes=[mx.float32] * 2, **sizes)


@fused_log_softmax.vjp
def fused_log_softmax_vjp(primals, cotangents, outputs):
    (logits, targets), lse = primals, outputs[1][..., None]
    change = (mx.arange(logits.shape[-1]) == targets[..., None]) - mx.exp(logits.astype(mx.float32) - lse)
    return (cotangents[0][..., None] * change).astype(logits.dtype), mx.zeros_like(targets)


def answer_logps(model, batch):
    """Return the rows' log-probabilities of their answers, (2B,) float32, and the logits of all targets, (2B, R, V)."""
    prefix, targets = None, batch["rows"][:, 1:]
    if batch["prompts"].size:  # each prompt is computed once for both of its answers
        prefix = [ConcatenateKVCache() for _ in model.layers]
        model(batch["prompts"], cache=prefix)  # nothing reads its logits, so mlx never computes them
        prefix = [PrefixCache(layer, batch["lengths"]) for layer in prefix]
    logits = model(batch["rows"][:, :-1], cache=prefix)
    exact = logits if CUDA or METAL else logits.astype(mx.float32)  # a CPU's cross_entropy sums in the logits' dtype
    logps = fused_log_softmax(logits, targets)[0] if METAL else -mx.fast.cross_entropy(exact, targets)
    return mx.where(batch["mask"] > 0, logps, 0.0).sum(-1), logits


def log_loss(margins, smoothing):
    """Return -log sigmoid(margins), where a share of smoothing of the pairs is taken as mislabelled."""
    return (1 - smoothing) * mx.logaddexp(0, -margins) + smoothing * mx.logaddexp(0, margins)


DPO_LOSSES = {  # of a pair's log-ratios w = pi_w - ref_w and l = pi_l - ref_l, both (B,) in nats, and the options o
    # Eq. 7 of arXiv 2305.18290; with label_smoothing Eq. 3 of Mitchell's note on conservative DPO; robust: 2403.00409
    "sigmoid": lambda w, l, o: log_loss(o.beta * (w - l), o.label_smoothing),
    "robust": lambda w, l, o: log_loss(o.beta * (w - l), -o.label_smoothing / (1 - 2 * o.label_smoothing)),
    "hinge": lambda w, l, o: mx.maximum(1 - o.beta * (w - l), 0),  # SLiC, arXiv 2305.10425
    "ipo": lambda w, l, o: (w - l - 1 / (2 * o.beta)) ** 2,  # Eq. 17 of arXiv 2310.12036, of nats a token
    # arXiv 2402.13228, but its penalty stands outside the sigmoid, where it does not fade as a pair is won
    "dpop": lambda w, l, o: log_loss(o.beta * (w - l), o.label_smoothing) + o.delta * mx.maximum(-w, 0),
}


def dpo_metrics(logps, batch, args):
    """Return {"loss", "rewards/...", "logps/...": (B,)} from the rows' log-probabilities, (2B,)."""
    lengths = batch["mask"].sum(-1) if args.length_normalize or args.loss == "ipo" else 1
    ratios = ((logps - batch["ref_logps"].T.flatten()) / lengths).reshape(2, -1)
    (won, lost), (chosen, rejected) = args.beta * ratios, logps.reshape(2, -1)
    metrics = {"loss": DPO_LOSSES[args.loss](*ratios, args) * batch["weight"]}
    metrics |= {"rewards/chosen": won, "rewards/rejected": lost, "rewards/margins": won - lost}
    return metrics | {"rewards/accuracies": won > lost, "logps/chosen": chosen, "logps/rejected": rejected}


# --------------------------------------------------------------------------------------------------------- training


def trainable_parameters(model, args):
    """Freeze the model but for new LoRA or DoRA layers, or whole ones; return what is trained as one float32 vector."""
    mx.random.seed(args.seed)
    model.freeze()
    dtype = max((w for _, w in tree_flatten(model.parameters()) if "float" in str(w.dtype)), key=lambda w: w.size).dtype
    if args.fine_tune_type == "full":
        for layer in model.layers[-max(args.num_layers, 0) :]:
            layer.unfreeze()
    else:
        lora.linear_to_lora_layers(model, args.num_layers, args.lora_parameters, args.fine_tune_type == "dora")
    if args.fine_tune_type == "lora":  # float32 adapters would make every activation float32; DoRA's norms need it
        model.update(tree_map(lambda w: w.astype(dtype), model.trainable_parameters()))
    for module in model.modules():
        home = sys.modules[type(module).__module__]
        if hasattr(home, "swiglu"):  # its product is computed again in the backward pass, not kept
            home.swiglu = mx.checkpoint(lambda gate, x: nn.silu(gate) * x)
        if type(module) in (nn.Linear, nn.Embedding) and not (CUDA or METAL):
            module.weight = mx.pad(module.weight, (0, 1))[:-1, :-1]  # mlx copies what has gaps: BLAS is slow transposed
    for layer in model.layers if args.grad_checkpoint else []:
        layer.__class__ = type("Checkpointed", (Checkpointed, type(layer)), {"plain": type(layer).__call__})
    trained = dict(tree_flatten(model.trainable_parameters()))
    need(trained and mx.uint32 not in {w.dtype for w in trained.values()}, "there is nothing in it to train so")
    saved = mx.load(args.resume_adapter_file) if args.resume_adapter_file else trained
    alike = {name: w.shape for name, w in saved.items()} == {name: w.shape for name, w in trained.items()}
    need(alike, "--resume-adapter-file has other layers or another rank: see its adapter_config.json")
    return mx.concatenate([saved[name].flatten().astype(mx.float32) for name in trained])


class Checkpointed:
    """Mixed into a model's layers, keeps their inputs only, a prompt's keys among them, and computes the rest twice."""

    def __call__(self, *args, **kwargs):
        given = dict(zip(self.plain.__code__.co_varnames[1:], args)) | kwargs  # by name: each family has its own order
        masks = {name: value for name, value in given.items() if "mask" in name}  # fast attention has no gradient of it
        held = getattr(given.get("cache"), "__dict__", {})  # the prompt's keys, values and offset

        def compute(params, given, before, seed):
            self.update(params)
            mx.random.state[0][:] = mx.stop_gradient(seed)  # the same dropout both times
            held.update(before)
            # + 0: an output that is one of the inputs as it was would have a wrong gradient
            return self.plain(**given | masks), {name: x if x is None else x + 0 for name, x in held.items()}

        seed, mx.random.state[0][:] = mx.random.split(mx.random.state[0])
        out, after = mx.checkpoint(compute)(self.trainable_parameters(), given, {**held}, seed)
        held.update(after)
        return out


def install(params, model):
    """Return the model with the vector's values in its trainable parameters, in the dtypes that these have."""
    trained = tree_flatten(model.trainable_parameters())
    split = mx.custom_function(lambda params: mx.split(params, np.cumsum([w.size for _, w in trained])[:-1].tolist()))
    split.vjp(lambda _, gradients, parts: mx.concatenate(gradients))  # mx.split's pads each part's to the whole length
    new = [(name, part.reshape(w.shape).astype(w.dtype)) for (name, w), part in zip(trained, split(params))]
    return model.update(tree_unflatten(new))


def can_share(model, pairs):
    """Return whether the model scores shared prompts as whole rows, as one with a recurrent state does not."""
    pairs = [pick(pairs, key=lambda pair: len(pair["prompt"])) for pick in (min, max)]
    P, R = (max(len(pair[side]) for pair in pairs for side in sides) for sides in (["prompt"], ["chosen", "rejected"]))
    whole, shared = make_batch(pairs, (0, P + R)), make_batch(pairs, (P, R))
    logps, logits = answer_logps(model, whole)
    need(mx.isfinite(logps).all().item(), "its log-probabilities are no numbers, as where float16 overflows")
    try:
        gaps = mx.abs(answer_logps(model, shared)[0] - logps) / mx.sqrt(whole["mask"].sum(-1))  # as rounding grows
        return gaps.max().item() < (2e-3 if logits.dtype == mx.float32 else 0.2)
    except Exception:
        return False


def add_reference(model, batches):
    """Give each pair "ref_logps", its answers' log-probabilities under the model; raise where they are no numbers."""
    for pairs, shape in tqdm(batches, "reference", leave=False, disable=None):
        logps = answer_logps(model.eval(), make_batch(pairs, shape))[0].reshape(2, -1).T.tolist()
        need(np.isfinite(logps).all(), "its log-probabilities are no numbers, as where float16 overflows")
        for pair, row in zip(pairs, logps):
            pair["ref_logps"] = row


def mean_metrics(found):
    """Return the mean of each metric over all processes' pairs, from [(metrics, number of pairs)]."""
    sums = [sum(np.array(metrics[name])[:count].sum() for metrics, count in found) for name in found[0][0]]
    *sums, pairs = mx.distributed.all_sum(mx.array(np.float32([*sums, sum(count for _, count in found)]))).tolist()
    return {name: total / pairs for name, total in zip(found[0][0], sums)}


def evaluate(model, params, initial, batches, args, objective):
    """Return the mean over the pairs of each metric, and of the exact KL(policy || initial policy) in nats a token."""
    found, world = [], mx.distributed.init()
    for pairs, shape in tqdm(batches, "measuring", leave=False, disable=None):
        own = pairs[world.rank() :: world.size()]
        batch = make_batch(own or pairs[:1], shape)
        logps, now = answer_logps(install(params, model).eval(), batch)
        then = now if params is initial else answer_logps(install(initial, model).eval(), batch)[1]
        rows = zip(*([nn.log_softmax(row.astype(mx.float32)) for row in logits] for logits in (now, then)))
        kl = mx.stack([nn.losses.kl_div_loss(q, p, reduction="none") for p, q in rows]) * batch["mask"]  # (2B, R)
        kl, tokens = (x.sum(-1).reshape(2, -1).sum(0) for x in (kl, batch["mask"]))
        found.append(({**objective(logps, batch, args), "kl": kl, "tokens": tokens}, len(own)))
        mx.eval(found[-1:])  # or every batch's logits wait for the end
    means = mean_metrics(found)
    return {**means, "kl": means["kl"] / means["tokens"]}


def make_optimizer(args, updates):
    """Return the optimizer; its rate rises for warmup_steps, or a tenth of all, and falls as lr_schedule says."""
    warmup = args.lr_schedule.get("warmup_steps", args.lr_schedule.get("warmup", updates // 10))

    def rate(step):  # step: an array, the updates done
        done = mx.clip((step.astype(mx.float32) - warmup) / max(updates - warmup, 1), 0, 1)  # step is unsigned
        falls = {"cosine": (1 + mx.cos(np.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return args.learning_rate * mx.minimum((step + 1) / max(warmup, 1), falls[args.lr_schedule["name"]])

    rate = lora.build_schedule(args.lr_schedule) if "arguments" in args.lr_schedule else rate
    own = {} if args.optimizer == "sgd" else {"bias_correction": True}  # or Adam's first steps are three times too long
    kind = {"adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD}[args.optimizer]
    return kind(learning_rate=rate, **own, **args.optimizer_config.get(args.optimizer, {}))


def train(model, initial, splits, args, objective, stop=()):
    """Train, report, measure and save, until stop has an element; return the parameters, a vector."""
    folder, world, size = Path(args.adapter_path), mx.distributed.init(), args.grad_accumulation_steps
    params, done, found = initial, 0, []
    per_epoch = -(-len(splits["train"]) // size)
    updates = int(args.iters or args.epochs * per_epoch)
    optimizer, checkpoint = make_optimizer(args, updates), folder / "checkpoint.safetensors"
    free = "resume iters epochs adapter_path save_every steps_per_report steps_per_eval report_to config test"
    options = {name: value for name, value in vars(args).items() if name not in free.split()}
    rows = [[{**pair, "ref_logps": None} for pair in pairs] for pairs, _ in splits["train"]]  # these differ by machine
    run = hashlib.sha256(json.dumps([options, rows]).encode()).hexdigest()
    if args.resume:
        with blame(checkpoint, "resume with that run's command, or leave out --resume"):
            arrays, facts = mx.load(str(checkpoint), return_metadata=True)
            need(facts["run"] == run, "it is of other options or pairs")
            (params, optimizer.state), done = tree_unflatten([*arrays.items()]), int(facts["step"])
    with blame("--report-to", "mend that, or leave it out"):
        callback = lora.get_reporting_callbacks(args.report_to, args.project_name, str(folder), vars(args))

    def report(step, split, metrics):
        shown = [f"{name} {metrics[name]:.4g}" for name in metrics if not name.endswith(("/chosen", "/rejected"))]
        tqdm.write(f"step {step} {split}: {'  '.join(shown)}")
        with blame(folder, "make room"), open(os.devnull if world.rank() else folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        if callback:
            callback.on_train_loss_report({"iteration": step, **{f"{split}/{key}": metrics[key] for key in metrics}})

    def batch_loss(params, batch):
        metrics = objective(answer_logps(install(params, model).train(), batch)[0], batch, args)
        return metrics["loss"].sum(), metrics

    gradient = mx.compile(mx.value_and_grad(batch_loss), inputs=mx.random.state, outputs=mx.random.state)
    for step in tqdm(range(done + 1, updates + 1), "training", updates, initial=done, leave=False, disable=None):
        if (step - 1) % args.steps_per_eval == 0:
            report(step - 1, "valid", evaluate(model, params, initial, splits["valid"], args, objective))
        epoch, first = divmod((step - 1) * size, size * per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(splits["train"]))  # every pair once an epoch
        batches, sums = [splits["train"][i] for i in order[first : first + size]], mx.zeros_like(params)
        mx.random.seed(args.seed * 10**6 + step)  # of dropout, so that a resumed run draws the same
        for pairs, shape in batches:
            own = pairs[world.rank() :: world.size()]  # none where a last batch has fewer pairs than processes
            (_, metrics), gradients = gradient(params, make_batch(own or [{**pairs[0], "weight": 0.0}], shape))
            sums = sums + gradients
            mx.async_eval(sums, metrics)
            mx.eval(found[-1:])  # one batch is computed while the host prepares the next, not more
            found.append((metrics, len(own)))
        mean = nn.average_gradients({"all": sums})["all"] * world.size() / sum(len(pairs) for pairs, _ in batches)
        norm = mx.linalg.norm(mean)
        params = optimizer.apply_gradients({"all": mean * mx.minimum(1, 1 / (norm + 1e-6))}, {"all": params})["all"]
        reports, saves = (step % n == 0 or step == updates for n in (args.steps_per_report, args.save_every))
        stops = len(stop) if world.size() == 1 else mx.distributed.all_sum(mx.array(len(stop))).item()
        if reports or saves or stops:
            means = mean_metrics(found) | {"grad_norm": norm.item(), "learning_rate": optimizer.learning_rate.item()}
            if not np.isfinite(means["loss"] + means["grad_norm"]):
                sys.exit(f"step {step}: the loss is not finite; {folder} holds the last save: lower --learning-rate")
            report(step, "train", {**means, "peak_memory_gb": mx.get_peak_memory() / 1e9})
            found = []
        if (saves or stops) and not world.rank():
            save(folder / "adapters.safetensors", install(params, model).trainable_parameters(), {})
            save(checkpoint, [params, optimizer.state], {"run": run, "step": str(step)})
        if stops:
            sys.exit(f"interrupted, saved at step {step} of {updates}: go on with the same command and --resume")
    for name in [*splits][1:]:
        report(max(done, updates), name, now := evaluate(model, params, initial, splits[name], args, objective))
        print(f"{name}: the better answer is ahead in {now['rewards/accuracies']:.1%} of the pairs; kl {now['kl']:.3f}")
        if now["kl"] > 1:
            print("warning: kl is above 1: answers may be broken: lower --learning-rate")
    return params


# ------------------------------------------------------------------------------------------------------------- main


def save(path, tree, facts):
    """Write a tree of arrays, and facts, to a safetensors file that is there whole or not at all."""
    part = path.with_name(f"unfinished-{path.name}")
    with blame(path, "make room, or choose another --adapter-path; what was saved before is whole"):
        mx.save_safetensors(str(part), dict(tree_flatten(tree)), facts)
        part.replace(path)


def load_model(name, args):
    """Return a model and its tokenizer from a folder or the hub; exit with one line where there is none."""
    with blame(name, "give a model's folder, or its name on the Hugging Face hub"):
        is_name = name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()
        need(is_name or Path(name, "config.json").exists(), "no such folder, or no config.json, so no model, in it")
        return lora.load(name, {"trust_remote_code": args.trust_remote_code})


def main():
    args, objective, stop = parse_args(), dpo_metrics, []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one waits for the step and saves, the second does not
        signal.signal(number, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    folder, first = Path(args.adapter_path), mx.distributed.init().rank() == 0
    if not first:  # the first process speaks for all
        sys.stdout, args.report_to = open(os.devnull, "w"), None
    if not (CUDA or METAL):
        mx.disable_compile()  # it calls a C++ compiler, which takes longer than it saves
    utils.maybe_set_recommended_wired_limit()
    mx.set_cache_limit(args.clear_cache_threshold or 2**48)  # bytes; 0: as much as memory allows
    model, tokenizer = load_model(args.model, args)
    splits = {"train": load_pairs(args, tokenizer, args.data, "train")}
    if Path(args.data, "valid.jsonl").exists() or args.hf_dataset.get("valid_split"):
        splits["valid"] = load_pairs(args, tokenizer, args.data, "valid", args.val_batches)
    else:  # by prompt: none is on both sides
        prompts = np.array(sorted({pair["asked"] for pair in splits["train"]}), object)
        held_out = {*np.random.default_rng(args.seed).permutation(prompts)[: min(-(-len(prompts) // 10), 200)]}
        splits["valid"] = [pair for pair in splits["train"] if pair["asked"] in held_out]
        splits["train"] = [pair for pair in splits["train"] if pair["asked"] not in held_out]
    if args.test:
        source = Path(args.data).parent if Path(args.data).is_file() else args.data
        splits["test"] = load_pairs(args, tokenizer, source, "test", args.test_batches)
    with blame(f"{args.model}, {args.data}", "no training with these options"):
        need(all(splits.values()), "no pair is left to train on, or to measure")
        share = can_share(model, sum(splits.values(), []))
        splits = {name: sorted_batches(pairs, args.batch_size, share) for name, pairs in splits.items()}
        initial = trainable_parameters(model, args)
    if first and not args.resume:
        with blame(folder, "choose another --adapter-path"):
            if (folder / "adapter_config.json").exists():
                print("The earlier run is now in", folder.rename(f"{folder}-{time.strftime('%y%m%d-%H%M%S')}"))
            folder.mkdir(parents=True, exist_ok=True)
            lora.save_config(dict(vars(args)), folder / "adapter_config.json")
            (folder / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
    with blame(args.reference_model or args.model, "choose another model"):
        reference, words = install(initial, model), tokenizer
        if args.reference_model:
            reference, words = load_model(args.reference_model, args)
        need(words.get_vocab() == tokenizer.get_vocab(), "it has another tokenizer")
        add_reference(reference, sum(splits.values(), []))
        del reference
    train(model, initial, splits, args, objective, stop)
    print("Next:", shlex.join(["mlx_lm.generate", "--model", args.model, "--adapter-path", args.adapter_path]))


if __name__ == "__main__":
    main()
