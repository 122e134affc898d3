# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Compare adapters with their base model on held-out preference pairs, and write a report.

    python eval_prefs.py --data data/test.jsonl --adapter-path adapters --adapter-path adapters-simpo --out report
    python eval_prefs.py --model mlx-community/Llama-3.2-1B-Instruct-4bit --data my_pairs/test.jsonl --generate 20
    python eval_prefs.py --adapter-path adapters --hard 50 next_round.jsonl

Input: pairs as the trainers take them; adapters as they write them (mlx_lm.lora's, too).
Output, in --out: report.md with pictures (if matplotlib is there); pairs.jsonl, a record a pair with every number, so
that a second run computes only what is new. The base is loaded once, adapters are put in and taken out.
To measure something else edit summarize_model; what is said of it, write_report.
Letters: B pairs, 2B rows (the chosen answers, then the rejected), R response tokens, V vocabulary, N pairs in all.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from bisect import bisect_left
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.utils import linear_to_lora_layers
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- options

BAR = {"leave": False, "disable": None}  # for tqdm: no bars in a log file


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


def number(kind, low, high=sys.float_info.max):
    """Return an argparse type: an int or a float from low to high."""

    def convert(text):
        need(low <= (value := kind(text)) <= high, "out of range")
        return value

    convert.__name__ = f"{kind.__name__} from {low:g} {f'to {high:.3g}' if high < 1e300 else 'up'}"  # for argparse
    return convert


def parse_args(words):
    """Return the options in words (as sys.argv[1:]); exit with one line if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = partial(need, False)
    add, count = parser.add_argument, number(int, 1)
    add("--model", help="base: folder or Hugging Face name (default: the adapters' own, or the bundled one)")
    add("--adapter-path", action="append", default=[], help="folder of an adapter; once for each that is compared")
    add("--data", default="data/test.jsonl", help="pairs: a file, a folder (its test.jsonl) or a hub dataset")
    add("--out", default="report", help="folder of the report (default: %(default)s)")
    add("--prompt-feature", default="prompt", help="column of the prompt (default: %(default)s)")
    add("--chosen-feature", default="chosen", help="column of the better answer (default: %(default)s)")
    add("--rejected-feature", default="rejected", help="column of the worse answer (default: %(default)s)")
    add("--max-seq-length", type=count, default=1024, help="tokens (default: %(default)s); old turns go")
    add("--batch-size", type=count, default=4, help="pairs, or prompts, at once (default: %(default)s)")
    switch = argparse.BooleanOptionalAction
    add("--reference-cache", action=switch, default=True, help="take the base's scores from ~/.cache, and keep them")
    add("--generate", type=number(int, 0), default=0, metavar="N", help="answer N prompts greedily, side by side")
    add("--samples", type=number(int, 0), default=0, metavar="N", help="KL on each adapter's own answers to N prompts")
    add("--max-tokens", type=count, default=256, help="of such an answer (default: %(default)s)")
    add("--judge", help="compare the answers of --generate: an mlx model, or http://HOST/v1 of an OpenAI-like server")
    add("--judge-model", default="default", help="its name at that server")
    add("--hard", nargs=2, metavar=("K", "FILE"), help="write the K pairs with the lowest margin, to train on")
    add("--seed", type=number(int, 0), default=0, help="of samples and intervals (default: %(default)s)")
    with blame(Path(__file__).name, "--help lists all options"):
        args = parser.parse_args(words)
        need(not args.hard or (args.hard[0].isdecimal() and int(args.hard[0])), "--hard takes a number and a file")
        need(not args.judge or args.generate, "--judge needs answers: --generate N")
        names = [Path(path).name for path in args.adapter_path]
        need(len(set(names)) == len(names) and "base" not in names, "give each adapter's folder a name of its own")
    args.configs, args.share = {}, SHARE
    for path in args.adapter_path:
        with blame(path, "name a folder with adapters.safetensors and adapter_config.json"):
            need(Path(path, "adapters.safetensors").exists(), "there is no adapter")
            args.configs[Path(path).name] = config = json.loads(Path(path, "adapter_config.json").read_text())
            need(isinstance(config, dict), "its adapter_config.json is none")
    bases = {config.get("model") for config in args.configs.values()} - {None}
    for base in bases - {args.model} if args.model else ():
        print(f"warning: an adapter was trained on {base}, and is measured on {args.model}")
    if not args.model and len(bases) > 1:
        sys.exit(f"{', '.join(map(str, bases))}: adapters of several models: name one with --model")
    args.model = args.model or next(iter(bases), "data/tiny-chat")
    return args


# ------------------------------------------------------------------------------------------------------------- data


def read_rows(source, split):
    """Yield (place, value) of each row of a .jsonl file, a folder's SPLIT.jsonl or a hub dataset (NAME, NAME:SPLIT)."""
    path = Path(source, f"{split}.jsonl") if Path(source).is_dir() else Path(source)
    if not path.exists() and path.suffix != ".jsonl":
        name, _, given = str(source).partition(":")
        with blame(source, "no such file or folder; a hub dataset needs pip install datasets, and the network"):
            rows = importlib.import_module("datasets").load_dataset(name, split=given or split)
        yield from ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))
        return
    with blame(path, "give a .jsonl file, a folder with train.jsonl or a hub dataset's name"):
        lines = open(path, "rb")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with blame(f"{path}:{number}", "each line must be one JSON object in UTF-8"):
                row = json.loads(line.decode("utf-8-sig"))
            yield f"{path}:{number}", row


def load_pairs(args, source, split):
    """Return the pairs of one split; exit with file:line at a line that is none, but leave out such rows of the hub."""
    is_file, pairs, count = Path(source).exists(), [], 0
    for count, (place, row) in enumerate(read_rows(source, split), 1):
        with blame(place, "mend or delete the line") if is_file else suppress(ValueError):
            pairs.append({"place": place, **read_pair(row, args)})
    if len(pairs) < count:
        print(f"{source}: {count - len(pairs)} of {count} rows are no pairs and were left out")
    advice = "put one on each line, or name its columns: --prompt-feature, --chosen-feature, --rejected-feature"
    return pairs or sys.exit(f"{source}: no {split} pairs in it: {advice}")


def read_pair(row, args):
    """Return a row as {"prompt": messages, "chosen": message, "rejected": message, "tools", "weight"}.

    Forms: prompt (text or messages) or messages (user turn last), with chosen and rejected (text or messages); chosen
    and rejected as whole conversations, whose common beginning is the prompt; messages that end in the chosen answer,
    with rejected. Raises ValueError.
    """
    names = [args.prompt_feature, args.chosen_feature, args.rejected_feature]
    need(isinstance(row, dict), f"not an object with {', '.join(names)}")
    prompt, chosen, rejected = (row.get(name) for name in names)
    prompt = to_messages(row.get("messages", []) if prompt is None else prompt, "user", names[0])
    if chosen is None and "messages" in row:
        prompt, chosen = prompt[:-1], prompt[-1:]
    sides = [to_messages(side, "assistant", name) for side, name in zip((chosen, rejected), names[1:])]
    for i, side in enumerate(sides):
        if prompt and side[: len(prompt)] != prompt:
            need(side and side[0]["role"] == "assistant", f"'{names[1 + i]}' must begin with the prompt or after it")
            sides[i] = prompt + side
    shared = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(*(side[:-1] for side in sides)))
    prompt, answers = [turns[0] for turns in shared], [side[-1] for side in sides if side]
    need(prompt and prompt[-1]["role"] in ("user", "tool"), "there must be a prompt, and it must end in a user turn")
    need({len(side) for side in sides} == {len(prompt) + 1}, "chosen and rejected must differ in one turn, the last")
    need({answer["role"] for answer in answers} == {"assistant"}, "chosen and rejected must be the assistant's turn")
    need(all((a.get("content") or "").strip() or a.get("tool_calls") for a in answers), "an answer is empty")
    need(answers[0] != answers[1], "chosen and rejected are equal")
    system, tools, weight = row.get("system") or "", row.get("tools"), row.get("weight")
    weight = 1.0 if weight is None else weight
    need(isinstance(system, str) and isinstance(tools or [], list), "'system' must be a text and 'tools' a list")
    need(type(weight) in (int, float) and 0 <= weight < 1e9, "'weight' must be a number from 0 up")
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}] + prompt
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "tools": tools, "weight": float(weight)}


def to_messages(value, role, name):
    """Return a text as one message of that role, and messages as they are; raise ValueError at anything else."""
    turns = re.split(r"\n\n(Human|Assistant):", value) if isinstance(value, str) else []
    if len(turns) > 1 and not turns[0]:  # Anthropic's HH-RLHF: a conversation as one text
        roles = ["user" if who == "Human" else "assistant" for who in turns[1::2]]
        return [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[2::2])]
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    need(isinstance(messages, list), f"'{name}' must be there, as a text or a list of messages")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        need(role in ("system", "developer", "user", "assistant", "tool"), f"'{name}': not a message with a known role")
        content = "" if message.get("tool_calls") and message.get("content") is None else message.get("content")
        need(isinstance(content, str), f"'{name}': content must be a text")
        content.encode()  # half a letter, as of an emoji that was cut, is none
    return messages


@contextmanager
def time_limit(seconds):
    """Raise an exception inside after so many seconds of computing, as a chat template can that loops for ever."""

    def stop(*_):
        raise TimeoutError(f"it takes more than {seconds:.0f} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def encode_pair(tokenizer, messages, chosen, rejected, tools=None):
    """Return the token ids of prompt, chosen and rejected (end of turn included), and how many prompt tokens moved.

    The response is what the template writes after the prompt. Where a template rewrites the end of the prompt once an
    answer follows, the tokens from there on count as response: none is skipped. No template: each text by itself, EOS.
    """
    if tokenizer.has_chat_template:
        render = partial(tokenizer.apply_chat_template, tools=tools)
        ids = [render(messages, add_generation_prompt=True), render(messages + [chosen]), render(messages + [rejected])]
        for side, row in zip((chosen, rejected), ids[1:]):
            plain = {"role": "assistant", "content": side.get("content") or ""}
            need(not side.get("tool_calls") or row != render([*messages, plain]), "it writes no tool calls")
    else:
        need(not (chosen.get("tool_calls") or rejected.get("tool_calls")), "without a template there are no tool calls")
        start = tokenizer.encode("\n".join(message["content"] for message in messages))
        answers = [tokenizer.encode(side["content"], add_special_tokens=False) for side in (chosen, rejected)]
        ids = [start, *(start + answer + [tokenizer.eos_token_id] for answer in answers)]
    bos = [tokenizer.bos_token_id]  # once, as when generating, whether the template writes it, the tokenizer, or both
    while ids[0][:2] == bos * 2:
        ids = [row[1:] for row in ids]
    if tokenizer.encode("")[:1] == bos != ids[0][:1]:
        ids = [bos + row for row in ids]
    shared = len(os.path.commonprefix(ids))
    need(shared, "the prompt has no token to start from")
    return ids[0][:shared], ids[1][shared:], ids[2][shared:], len(ids[0]) - shared


def encode_pairs(tokenizer, pairs, limit):
    """Return the pairs as {"prompt", "chosen", "rejected": token ids, "weight", "place"}; print what was left out.

    A pair of more than limit tokens loses its oldest turns (a system message stays), never a part of an answer.
    """
    kept, shortened, long, moved = [], 0, 0, 0
    room = limit * max(map(len, tokenizer.get_vocab()))  # letters that so many tokens can spell
    for pair in tqdm(pairs, desc="tokenizing", **BAR):
        first = int(pair["prompt"][0]["role"] in ("system", "developer"))
        later = [i for i, message in enumerate(pair["prompt"]) if message["role"] == "user" and i > first]
        answers = ([pair["chosen"]], [pair["rejected"]])

        def encode(start):
            """Return token ids without what stands before start, how many moved, and whether they fit."""
            messages = pair["prompt"][:first] + pair["prompt"][start:]
            size, *sides = (sum(len(m.get("content") or "") for m in part) for part in (messages, *answers))
            if (letters := size + max(sides)) > room:
                return None, 0, False
            with time_limit(2 + letters / 1e5):
                *ids, moves = encode_pair(tokenizer, messages, pair["chosen"], pair["rejected"], pair["tools"])
            return ids, moves, len(ids[0]) + max(map(len, ids[1:])) <= limit

        with blame(pair["place"], "the model's chat template refuses this conversation"):
            start, (ids, moves, fits) = first, encode(first)
            if not fits and later:
                start = later[min(bisect_left(later, True, key=lambda start: encode(start)[2]), len(later) - 1)]
                ids, moves, fits = encode(start)
        shortened, long, moved = shortened + (fits and start > first), long + (not fits), max(moved, moves)
        if fits and ids[1] != ids[2]:
            names = ("prompt", "chosen", "rejected")
            kept.append(dict(zip(names, ids), weight=pair["weight"], place=pair["place"]))
    if shortened or len(kept) < len(pairs):
        equal = len(pairs) - len(kept) - long
        print(f"{shortened} pairs shortened to --max-seq-length, {long} skipped as too long, {equal} as equal")
    if moved:
        print(f"The chat template rewrites up to {moved} tokens at the prompt's end: they are scored with the answer")
    why = "too long: raise --max-seq-length" if long else "of equal answers, in tokens: bring other data"
    return kept or sys.exit(f"{pairs[0]['place']}: this and every other pair is {why}")


# ---------------------------------------------------------------------------------------------------------- logprobs

# Rows are padded to a multiple of this: few shapes, so few compilations; CUDA's fused attention wants 128.
PAD = 8 if mx.default_device() == mx.Device(mx.cpu) else 128 if mx.cuda.is_available() else 32

CHUNK = 2**27  # logits at once where memory counts: 0.27 GB in 16 bits

# Prompts are shared where at most this share of the padded tokens is left: a fast GPU waits for the second call.
SHARE = 0.75 if mx.cuda.is_available() else 0.9


class PrefixCache:
    """One layer's keys and values of B prompts: it stores them, then puts them before those of the 2B answers.

    mlx-lm's models take it for a cache of generated tokens. lengths: (2B,) tokens of each prompt; None while it stores.
    """

    def __init__(self, keys=None, values=None, lengths=None):
        self.keys, self.values, self.lengths = keys, values, lengths
        self.offset = 0 if lengths is None else lengths  # position of the first new token; a rope takes an array

    def update_and_fetch(self, keys, values):
        if self.lengths is None:
            self.keys, self.values = keys, values
            return keys, values
        prompt = (mx.concatenate([x, x]) for x in (self.keys, self.values))  # of the chosen, of the rejected
        return tuple(mx.concatenate(both, axis=2) for both in zip(prompt, (keys, values)))  # (2B, heads, P + R, D)

    def make_mask(self, N, return_array=False, window_size=None):
        """Return what to add to the scores: 0 where a new token sees a column, much less where it may not.

        It sees what does not come after it, lies within the window and is no padding: (2B, 1, N, P + N).
        """
        if self.lengths is None and not (return_array or window_size):
            return "causal"
        rows = columns = mx.arange(N)[None] + (0 if self.lengths is None else self.lengths[:, None])  # true positions
        if self.lengths is not None:
            prompt = mx.arange(self.keys.shape[2])
            prompt = mx.where(prompt < self.lengths[:, None], prompt, 2**30)  # padding lies after everything
            columns = mx.concatenate([prompt, columns], axis=1)
        behind = rows[:, None, :, None] - columns[:, None, None, :]
        seen = (behind >= 0) & (behind < (window_size or 2**30))
        if self.lengths is None:
            return seen
        lowest = mx.array(mx.finfo(self.keys.dtype).min, self.keys.dtype)  # CUDA's attention is slow with booleans
        return mx.where(seen, mx.zeros_like(lowest), lowest)


def padded_widths(pairs, share=SHARE, multiple=PAD):
    """Return P and R of make_batch: multiples of a number, P 0 where sharing prompts does not pay."""
    up = lambda lengths: multiple * math.ceil(max(lengths) / multiple)
    prompts = [len(pair["prompt"]) - 1 for pair in pairs]
    answers = [max(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs]
    shared, plain = (up(prompts), up(answers)), (0, up(map(sum, zip(prompts, answers))))
    return shared if shared[0] + 2 * shared[1] <= share * 2 * plain[1] else plain


def make_batch(pairs, share=SHARE, multiple=PAD):
    """Return B pairs as right-padded arrays: prompts (B, P), prompt_lengths (B,), rows (2B, R + 1), mask (2B, R) ...

    Prompts are computed once for both answers where that leaves at most this share of the padded tokens: prompts then
    hold all of each but its last token, which begins the rows. Else P is 0, and rows hold the whole prompt. mask is 1
    where the target, rows[:, 1:], is a response token. ref_logps (2B,) and weights (B,) are there for the loss.
    share 0: no prompts at all, for a model that is called as a whole, once.
    """
    count, (before, width) = len(pairs), padded_widths(pairs, share, multiple)
    starts = [len(pair["prompt"]) - 1 if before else 0 for pair in pairs]
    rows = [pair["prompt"][k:] + pair[side] for side in ("chosen", "rejected") for pair, k in zip(pairs, starts)]
    prompts, ids = np.zeros((count, before), np.int32), np.zeros((2 * count, width + 1), np.int32)
    mask = np.zeros((2 * count, width), np.float32)
    for pair, start, prompt in zip(pairs, starts, prompts):
        prompt[:start] = pair["prompt"][:start]
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, len(pairs[i % count]["prompt"]) - starts[i % count] - 1 : len(row) - 1] = 1
    refs = np.float32([pair.get("ref_logps", (0, 0)) for pair in pairs]).T.reshape(-1)
    batch = {"rows": ids, "mask": mask, "ref_logps": refs, "weights": np.float32([pair["weight"] for pair in pairs])}
    if share:
        batch |= {"prompts": prompts, "prompt_lengths": np.int32(starts)}
    return {name: mx.array(value) for name, value in batch.items()}


def response_states(model, batch):
    """Return what the model's head makes the logits of a batch's targets from: (2B, R, D)."""
    body, cache = getattr(model, "model", model) if "prompts" in batch else model, None
    if "prompts" in batch and batch["prompts"].size:
        cache, lengths = [PrefixCache() for _ in model.layers], mx.concatenate([batch["prompt_lengths"]] * 2)
        body(batch["prompts"], cache=cache)
        cache = [PrefixCache(layer.keys, layer.values, lengths) for layer in cache]
    return body(batch["rows"][:, :-1], cache=cache)


def head_logits(model, states, batch):
    """Return the logits (2B, R, V) of response_states, by the model's own head: all that it does after its body."""
    body = getattr(model, "model", None) if "prompts" in batch else None
    if body is None:
        return states
    kind, body.__class__ = type(body), type("Given", (type(body),), {"__call__": lambda *_, **__: states})
    try:
        return model(batch["rows"])
    finally:
        body.__class__ = kind


def in_chunks(score, model, batch, *states):
    """Return the sums over R of score(logits, targets, mask), (2B, R), calling it with as many tokens as CHUNK allows.

    For each of states there are logits. In training they are computed again for the backward pass.
    """
    targets, mask = batch["rows"][:, 1:], batch["mask"]
    step = max(1, CHUNK // (len(targets) * head_logits(model, states[0][:, :1], batch).shape[-1]))
    if model.training and not getattr(model.layers[0], "is_checkpointed", False):
        step = len(targets[0])  # where every layer's activations are kept, the logits are not what fills the memory

    def score_part(part, *states):
        logits = (head_logits(model, x, batch) for x in states)
        return score(*logits, targets[:, part], mask[:, part]).sum(-1)

    if step >= len(targets[0]):
        return score_part(slice(None), *states)
    sums = mx.zeros((len(targets),))
    for part in (slice(i, i + step) for i in range(0, len(targets[0]), step)):
        rows = mx.depends([x[:, part] for x in states], [sums])  # or mlx begins on all parts at once
        sums = sums + mx.checkpoint(partial(score_part, part))(*rows)
    return sums


# token_logps's kernels: one threadgroup a row of V logits. The texts are Metal; the header makes CUDA of them.
THREADS = 512 if mx.cuda.is_available() else 256  # a row: a multiple of 32, up to 1024

HEADER = """
#ifdef __CUDACC__
#define DEVICE
#define threadgroup __shared__
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_threadgroup threadIdx.x
#define threadgroup_barrier(flags) __syncthreads()
#define METAL_FUNC __device__
namespace fast { METAL_FUNC float exp(float x) { return __expf(x); } }
METAL_FUNC float simd_max(float x) { for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i)); return x; }
METAL_FUNC float simd_sum(float x) { for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i); return x; }
#else
#define DEVICE device
#endif
#define LOWEST -3e38f  // in -INFINITY's place, which less itself is no number
template <typename T> struct alignas(16) Pack { T values[8]; };  // read or written at once
template <typename T> METAL_FUNC Pack<T> read_pack(const DEVICE T* x, int i, int size) {
    if (i >= 0 && i + 8 <= size) return *(const DEVICE Pack<T>*)(x + i);
    Pack<T> pack;  // at an end of the row
    for (int j = 0; j < 8; j++) pack.values[j] = i + j >= 0 && i + j < size ? x[i + j] : (T)LOWEST;
    return pack;
}
"""

ROW = """
    const int row = threadgroup_position_in_grid.x, index = thread_index_in_threadgroup, target = targets[row];
    const DEVICE T* x = logits + (size_t)row * V;
    const int first = 8 * index - (int)(((size_t)x & 15) / sizeof(T));  // packs start at multiples of 16 bytes
"""

FORWARD = ROW + """
    threadgroup float maxima[32], sums[32];
    if (target < 0 && index == 0) logps[row] = lse[row] = 0;
    if (target < 0) return;
    float high = LOWEST, sum = 0;  // of the values read so far: the maximum, the sum of exp(value - maximum)
    for (int i = first; i < V; i += 8 * THREADS) {
        const Pack<T> pack = read_pack(x, i, V);
        const float old = high;
        for (int j = 0; j < 8; j++) high = max(high, (float)pack.values[j]);
        sum *= fast::exp(old - high);
        for (int j = 0; j < 8; j++) sum += fast::exp((float)pack.values[j] - high);
    }
    float top = simd_max(high);
    sum = simd_sum(sum * fast::exp(high - top));
    if (index % 32 == 0) {
        maxima[index / 32] = top;
        sums[index / 32] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    high = index < THREADS / 32 ? maxima[index] : LOWEST;  // each simdgroup's; the first one joins them
    top = simd_max(high);
    sum = simd_sum(index < THREADS / 32 ? sums[index] * fast::exp(high - top) : 0);
    if (index > 0) return;
    lse[row] = top + log(sum);
    logps[row] = ((float)x[target] - top) - log(sum);  // not less lse: rounded, it costs a likely token its digits
"""

BACKWARD = ROW + """
    DEVICE T* out = gradient + (size_t)row * V;
    const float scale = target < 0 ? 0 : cotangent[row], total = lse[row];
    for (int i = first; i < V; i += 8 * THREADS) {
        Pack<T> pack = {};
        if (scale != 0) pack = read_pack(x, i, V);  // else the row is not read, and its gradient 0
        for (int j = 0; scale != 0 && j < 8; j++)
            pack.values[j] = (T)(scale * ((float)(i + j == target) - fast::exp((float)pack.values[j] - total)));
        if (i >= 0 && i + 8 <= V && ((size_t)(out + i) & 15) == 0) *(DEVICE Pack<T>*)(out + i) = pack;
        else for (int j = 0; j < 8; j++) if (i + j >= 0 && i + j < V) out[i + j] = pack.values[j];
    }
"""


@lru_cache
def fused_log_softmax():
    """Return f(logits (..., V), targets (...) int32) -> (log-probabilities, log-sum-exps), both (...) float32.

    Where a target is -1, both are 0, and so is the gradient. Returns None where there is no GPU, and, with a line that
    says so, where the kernel fails or differs from plain MLX: it is tried here, once.
    """
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        return None
    make = partial(mx.fast.metal_kernel if mx.metal.is_available() else mx.fast.cuda_kernel, header=HEADER)
    forward = make("log_softmax", ["logits", "targets"], ["logps", "lse"], FORWARD)
    backward = make("log_softmax_vjp", ["logits", "targets", "lse", "cotangent"], ["gradient"], BACKWARD)

    def run(kernel, shapes, dtypes, *inputs):
        template = [("T", inputs[0].dtype), ("V", inputs[0].shape[-1]), ("THREADS", THREADS)]
        threads = dict(grid=(inputs[1].size * THREADS, 1, 1), threadgroup=(THREADS, 1, 1))
        return kernel(inputs=inputs, template=template, output_shapes=shapes, output_dtypes=dtypes, **threads)

    @mx.custom_function
    def fused(logits, targets):
        return run(forward, [targets.shape] * 2, [mx.float32] * 2, logits, targets)

    @fused.vjp
    def fused_vjp(primals, cotangents, outputs):
        logits, targets = primals
        gradients = run(backward, [logits.shape], [logits.dtype], logits, targets, outputs[1], cotangents[0])
        return gradients[0], mx.zeros_like(targets)

    def plain(logits):
        logits = logits.astype(mx.float32)
        return ((logits - mx.logsumexp(logits, -1, keepdims=True)) * (targets[:, None] == mx.arange(1003))).sum(-1)

    targets, cotangents = mx.array([5, -1, 1002]), [mx.array([1.0, 1.0, -0.5])]
    both = (lambda logits: fused(logits, targets)[0], plain)
    try:
        for dtype in (mx.float32, mx.bfloat16):
            logits = mx.sin(mx.arange(3 * 1003)).reshape(3, 1003).astype(dtype)
            (ours, gradient), (known, expected) = (mx.vjp(f, [logits], cotangents) for f in both)
            same = mx.allclose(ours[0], known[0], 1e-5) and mx.allclose(gradient[0], expected[0], 1e-2)
            need(same, "it differs from plain MLX")
    except Exception as error:
        return print(f"log-softmax without the fused kernel: {' '.join(str(error).split())[:200]}")
    return fused


def token_logps(logits, targets, mask):
    """Return log softmax(logits) at the targets: (...), of logits (..., V), in float32, and 0 where mask is 0."""
    if mx.default_device() == mx.Device(mx.cpu):  # there cross_entropy sums in the logits' dtype
        logits = logits.astype(mx.float32)
    elif fused := fused_log_softmax():
        return fused(logits, mx.where(mask > 0, targets.astype(mx.int32), -1))[0]
    return mx.where(mask > 0, -mx.fast.cross_entropy(logits, targets), 0.0)


def token_kl(logits, ref_logits, targets, mask):
    """Return KL(policy || reference) at each token: (2B, R) float32, in nats, exact; 0 where mask is 0."""
    both = (x.astype(mx.float32) for x in (logits, ref_logits))
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in both)
    return (mx.exp(p) * (p - q)).sum(-1) * mask


def completion_logps(model, batch):
    """Return the log-probability of each row's response given its prompt, summed over its tokens: (2B,) float32."""
    return in_chunks(token_logps, model, batch, response_states(model, batch))


def install(model, weights, training=False):
    """Return the model with these weights, {name: array}; called inside compiled functions."""
    model.update(tree_unflatten(list(weights.items())))
    return model.train(training)


def sorted_batches(pairs, size, share=SHARE):
    """Return lists of size pairs of like lengths; the last may be shorter.

    Of several orders the one with the fewest padded tokens: by all tokens; by prompt, and by answer within every 1, 2,
    4 ... batches.
    """
    answer = lambda pair: max(len(pair["chosen"]), len(pair["rejected"]))
    by_prompt = sorted(pairs, key=lambda pair: len(pair["prompt"]))
    orders = [sorted(by_prompt, key=lambda pair: len(pair["prompt"]) + answer(pair))]
    for part in (size * 2**k for k in range(len(pairs).bit_length())):
        parts = (by_prompt[i : i + part] for i in range(0, len(pairs), part))
        orders.append([pair for some in parts for pair in sorted(some, key=answer)])
    cuts = [[order[i : i + size] for i in range(0, len(order), size)] for order in orders]
    widths = lambda batches: [(len(batch), *padded_widths(batch, share)) for batch in batches]
    return min(cuts, key=lambda batches: sum(count * (p + 2 * r) for count, p, r in widths(batches)))


def own_part(batch):
    """Return this process's pairs of a batch, and their number; one of weight 0, and 0, where none is left for it."""
    world = mx.distributed.init()
    mine = batch[world.rank() :: world.size()]
    return mine or [{**batch[0], "weight": 0.0}], len(mine)


def sum_all(values):
    """Return the sum of these numbers over all processes, as a numpy array; raise RuntimeError if one is missing."""
    values = np.float32(values)
    *sums, count = np.array(mx.distributed.all_sum(mx.array(np.append(values, np.float32(1)))))
    if count != mx.distributed.init().size():  # a sum can go on without a process that was killed
        raise RuntimeError("a process is missing")
    return np.float32(sums).reshape(values.shape)


def is_exact(model):
    return all(w.dtype != mx.float16 and w.dtype != mx.bfloat16 for _, w in tree_flatten(model.parameters()))


def differ(model, logps, others, batch):
    """Return whether two scorings of a batch's rows differ by more than rounding, which grows as sqrt(tokens)."""
    gaps = mx.abs(logps - others) / mx.sqrt(batch["mask"].sum(-1))
    return not gaps.max().item() <= (2e-3 if is_exact(model) else 0.2)  # nats


def settle_sharing(model, pairs):
    """Return make_batch's share: SHARE, or 0, with a line that says so, if the model scores shared prompts wrongly."""
    pairs = sorted(pairs, key=lambda pair: len(pair["prompt"]))
    plain, shared = (make_batch([pairs[0], pairs[-1]], share) for share in (0, math.inf))  # padding, windows
    with suppress(Exception):
        if not differ(model, completion_logps(model, shared), completion_logps(model, plain), plain):
            return SHARE
    print("This model's layers cannot share a prompt between two answers: it is computed for each")
    return 0


def fingerprint(model, most=None):
    """Return a hash of the model's configuration and of its weights: of every bit, or of about so many of each."""
    scales = [(name, getattr(module, "scale", None)) for name, module in model.named_modules()]  # LoRA's is no weight
    digest = hashlib.sha256(f"{getattr(model, 'args', None)} {sorted(scales, key=str)}".encode())
    for name, w in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {w.shape} {w.dtype} ".encode())
        part = w.reshape(-1)[:: max(1, w.size // most) if most else 1]
        digest.update(memoryview(part.view(mx.uint8)))
    return digest.hexdigest()[:32]


def add_reference(model, pairs, args):
    """Give each pair "ref_logps", the log-probabilities of its chosen and rejected answer under the model as it is.

    They are appended as they are computed to a file in the user's cache folder, named after the model's fingerprint,
    under a hash of the pair's token ids: a second run, a killed one and one with more data compute only what is new.
    """
    texts = [json.dumps([pair[part] for part in ("prompt", "chosen", "rejected")]) for pair in pairs]
    keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
    known, lines, file, world = {}, [], None, mx.distributed.init()
    stop_keeping = lambda error: print(f"The reference is not kept for the next run: {error}")
    if args.reference_cache and not world.rank():
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reference-logps")
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / f"{fingerprint(model)}.jsonl", "ab", buffering=0)
            lines = Path(file.name).read_bytes().splitlines()
        except (OSError, RuntimeError) as error:  # no folder that can be written to, no home
            file = stop_keeping(error)
        for line in lines:
            with suppress(Exception):  # a kill may have cut a line
                known |= {key: np.float32(row).reshape(2) for key, row in json.loads(line).items()}
    nothing = (math.nan, math.nan) if not world.rank() else (0, 0)
    for pair, key, row in zip(pairs, keys, sum_all([known.get(key, nothing) for key in keys])):
        pair["key"], pair["ref_logps"] = key, row
    is_missing = lambda pair: math.isnan(pair["ref_logps"].sum())
    if not any(map(is_missing, pairs)):
        return
    unique = {pair["key"]: pair for pair in pairs}
    batches = sorted_batches([*unique.values()], args.batch_size, args.share)  # the same ones after a kill
    partly = [pair for batch in batches if not all(map(is_missing, batch)) for pair in filter(is_missing, batch)]
    batches = [b for b in batches if all(map(is_missing, b))] + sorted_batches(partly, args.batch_size, args.share)
    score = mx.compile(partial(completion_logps, model))
    for batch in tqdm(batches, desc="reference", **BAR):
        mine, count = own_part(batch)
        values = np.zeros((len(batch), 2))
        values[world.rank() :: world.size()] = np.array(score(make_batch(mine, args.share))).reshape(2, -1).T[:count]
        for pair, row in zip(batch, sum_all(values)):
            pair["ref_logps"] = row
        new = {pair["key"]: pair["ref_logps"].tolist() for pair in batch}
        try:
            file = file and file.write(f"\n{json.dumps(new)}".encode()) and file
        except OSError as error:
            file = stop_keeping(error)
    for pair in pairs:
        pair["ref_logps"] = unique[pair["key"]]["ref_logps"]


# ---------------------------------------------------------------------------------------------------------- adapters


@contextmanager
def adapter_in(model, path, config):
    """Put an adapter into the model; give its parameters and those that make the model its base, None for full.

    Both are {name: array} for install. Afterwards the model is as it was.
    """
    before = dict(model.named_modules())
    weights, kind = mx.load(str(Path(path, "adapters.safetensors"))), config.get("fine_tune_type", "lora")
    if kind == "full":
        there = dict(tree_flatten(model.parameters()))
        taken = {name: there[name] for name in weights if name in there}
    else:
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], kind == "dora")
        there = dict(tree_flatten(model.parameters()))
        taken = {name: there[name].astype(w.dtype) for name, w in weights.items() if name in there}
    wrong = [name for name, w in weights.items() if name not in taken or taken[name].shape != w.shape]
    try:
        need(not wrong, f"it is not of this model: {', '.join(wrong[:3])}")
        yield weights, None if kind == "full" else taken
    finally:
        if kind == "full":
            install(model, taken)
        else:
            now = dict(model.named_modules())
            old = [(name, module) for name, module in before.items() if now.get(name) is not module]
            model.update_modules(tree_unflatten(old))


def score_pairs(model, weights, initial, pairs, args, found=None, keep=None):
    """Return (N, 3): the log-probabilities of the chosen and the rejected answer, and KL(adapter || base) over both.

    KL is exact, from both distributions, summed over the response tokens; nan where initial is None. found: what is
    known already, nan elsewhere; keep is called with what is known every half minute.
    """

    @mx.compile
    def measure(weights, initial, batch):
        states = response_states(install(model, weights), batch)
        logps = in_chunks(token_logps, model, batch, states).reshape(2, -1)
        if initial is None:
            return mx.concatenate([logps, mx.full((1, logps.shape[1]), math.nan)])
        others = response_states(install(model, initial), batch)
        return mx.concatenate([logps, in_chunks(token_kl, model, batch, states, others).reshape(2, -1).sum(0)[None]])

    found, last = np.full((len(pairs), 3), math.nan) if found is None else found, time.monotonic()
    missing = [pair | {"number": i} for i, pair in enumerate(pairs) if math.isnan(found[i, 0])]
    for batch in tqdm(sorted_batches(missing, args.batch_size, args.share), desc="scoring", **BAR):
        numbers = [pair["number"] for pair in batch]
        found[numbers] = np.array(measure(weights, initial, make_batch(batch, args.share))).T
        if keep and time.monotonic() > last + 30:
            keep(found)
            last = time.monotonic()
    return found


# -------------------------------------------------------------------------------------------------------- statistics


def interval(values, seed=0, rounds=2000):
    """Return the 95 % bootstrap interval (low, high) of a mean: values (N,), drawn with replacement."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(rounds)]
    return tuple(np.percentile(means, (2.5, 97.5)))


def sign_test(better, worse):
    """Return the two-sided p of McNemar's exact test, from how often either one alone is right."""
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def correlation(x, y):
    """Return Pearson's r, 0 where one of the two does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) > 0 and np.std(y) > 0 else 0.0


def summarize_model(scores, base, lengths, seed):
    """Return what is known of a model: scores (N, 3), base (N, 2) log-probabilities, lengths (N, 2) in tokens.

    accuracy: the chosen answer is likelier, in sum; accuracy_mean: a token. margin: the implicit reward margin without
    beta, (pi_w - ref_w) - (pi_l - ref_l), in nats. kl: a response token, in nats.
    """
    logps, change = scores[:, :2], scores[:, :2] - base
    right, was = logps[:, 0] > logps[:, 1], base[:, 0] > base[:, 1]
    means = logps / lengths
    margin, longer = change @ [1, -1], lengths @ [1, -1]
    return {
        "pairs": len(scores),
        "accuracy": right.mean(), "accuracy_interval": interval(right, seed),
        "accuracy_mean": (means[:, 0] > means[:, 1]).mean(),
        "accuracy_mean_interval": interval(means[:, 0] > means[:, 1], seed),
        "gained": (margin > 0).mean(), "margin": margin.mean(), "margin_interval": interval(margin, seed),
        "margin_quartiles": tuple(np.percentile(margin, (25, 50, 75))),
        "became_right": (right & ~was).mean(), "became_wrong": (was & ~right).mean(),
        "chosen_change": change[:, 0].mean(), "rejected_change": change[:, 1].mean(),
        "chosen_change_interval": interval(change[:, 0], seed),
        "perplexity": math.exp(-logps[:, 0].sum() / lengths[:, 0].sum()),
        "kl": scores[:, 2].sum() / lengths.sum(),
        "margin_length_correlation": correlation(margin, longer),
        "accuracy_longer": right[longer > 0].mean() if (longer > 0).any() else math.nan,
        "accuracy_shorter": right[longer < 0].mean() if (longer < 0).any() else math.nan,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- answers


def answer(model, tokenizer, prompts, args, temperature=0.0):
    """Return [(token ids without the end, whether it ended by itself)] of one answer to each prompt (token ids)."""
    found = []
    mx.random.seed(args.seed)
    for i in tqdm(range(0, len(prompts), args.batch_size), desc="answering", **BAR):
        settings = {"max_tokens": args.max_tokens, "sampler": make_sampler(temp=temperature), "return_token_ids": True}
        rows = mlx_lm.batch_generate(model, tokenizer, prompts[i : i + args.batch_size], **settings).token_ids
        found += [(row, len(row) < args.max_tokens) for row in rows]
    return found


def repetition(ids):
    """Return the share of an answer's runs of four tokens that were there before."""
    runs = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def sampled_kl(model, tokenizer, weights, initial, pairs, args):
    """Return KL(adapter || base) a token on the adapter's own sampled answers, two to each of --samples prompts."""
    prompts = [pair["prompt"] for pair in pairs[: args.samples]]
    both = answer(install(model, weights), tokenizer, prompts * 2, args, temperature=1.0)
    both = [ids + [tokenizer.eos_token_id] * ended for ids, ended in both]  # the end is a choice, too
    sides = zip(prompts, both, both[len(prompts) :])
    rows = [{"prompt": prompt, "chosen": one, "rejected": two, "weight": 1.0} for prompt, one, two in sides]
    tokens = sum(len(row["chosen"]) + len(row["rejected"]) for row in rows)
    return score_pairs(model, weights, initial, rows, args)[:, 2].sum() / tokens


QUESTION = """Two assistants answered the same request. Which answer is better? Say A, B or TIE, and nothing else.

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}"""


def make_judge(args):
    """Return f(text) -> the judge's reply, of a local model or of a server; a server is asked three times."""
    if not args.judge.startswith("http"):
        with blame(args.judge, "give a folder, a Hugging Face name or the address of a server"):
            model, tokenizer = mlx_lm.load(args.judge, {"trust_remote_code": False})

        def ask(text):
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            return mlx_lm.generate(model, tokenizer, ids, max_tokens=16)

        return ask

    def ask(text):
        body = {"model": args.judge_model, "temperature": 0, "max_tokens": 16}
        body = json.dumps(body | {"messages": [{"role": "user", "content": text}]}).encode()
        key = os.environ.get("OPENAI_API_KEY", "none")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        for wait in (0, 1, 4):
            time.sleep(wait)
            try:
                request = urllib.request.Request(f"{args.judge.rstrip('/')}/chat/completions", body, headers)
                with urllib.request.urlopen(request, timeout=120) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except Exception as error:
                problem = f"{args.judge}: {' '.join(str(error).split())[:200]}"
        raise ConnectionError(problem)

    return ask


def verdict(reply):
    """Return "A", "B" or "TIE" as a judge's reply says, "" where it says neither or both."""
    if re.search(r"\btie\b", reply, re.I):
        return "TIE"
    letters = set(re.findall(r"\b[AB]\b", reply)) or {reply.strip(" .*\n").upper()}
    return letters.pop() if letters in ({"A"}, {"B"}) else ""


def judge_answers(ask, prompts, ours, base, found=None):
    """Count "won", "lost", "tied", "unclear", "first" and "verdicts" over the answers in found, and return it.

    Each pair is shown in both orders. won: ours was taken in both, or in one and a tie in the other; first: how often
    the answer shown first was, of all verdicts for one.
    """
    found = Counter() if found is None else found
    for prompt, mine, other in zip(tqdm(prompts, desc="judging", **BAR), ours, base):
        texts = [QUESTION.format(prompt=prompt, a=a, b=b) for a, b in ((mine, other), (other, mine))]
        words = [verdict(ask(text)) for text in texts]
        found["first"] += words.count("A")
        found["verdicts"] += words.count("A") + words.count("B")
        found["unclear"] += words.count("")
        score = (words[0] == "A") - (words[0] == "B") - (words[1] == "A") + (words[1] == "B")
        found["won" if score > 0 else "lost" if score < 0 else "tied"] += 1
    return found


# ------------------------------------------------------------------------------------------------------------ report


def to_table(heads, rows):
    """Return a Markdown table."""
    cell = lambda value: str(value).replace("|", "\\|")
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in [heads, ["---"] * len(heads), *rows])


def between(value, limits, digits=2):
    return f"{value:.{digits}f} ({limits[0]:.{digits}f} to {limits[1]:.{digits}f})"


def write_report(found, scores, rows, lengths, extra, args):
    """Return report.md's text; found: {model: summarize_model's}, scores: {model: (N, 3)}, extra: further sections."""
    count = len(lengths)
    longer, tied = lengths[:, 0] > lengths[:, 1], (lengths[:, 0] == lengths[:, 1]).sum()
    lines = ["# Preferences", f"{args.model} on {count} pairs of {args.data}. In brackets: 95 % bootstrap intervals."]
    heads = ["model", "accuracy, in sum", "accuracy, a token", "gained", "margin, nats", "kl", "perplexity, chosen"]
    parts = []
    for name, m in found.items():
        parts += [[name, *(between(m[key], m[f"{key}_interval"]) for key in ("accuracy", "accuracy_mean"))]]
        moved = [f"{m['gained']:.2f}", between(m["margin"], m["margin_interval"]), f"{m['kl']:.4f}".replace("nan", "-")]
        parts[-1] += [*(moved if name != "base" else "---"), f"{m['perplexity']:.3f}"]
    lines += [to_table(heads, parts)]
    lines += [
        "Accuracy: share of the pairs whose chosen answer is the likelier one. Gained: whose chosen answer gained on"
        " the rejected one against the base. Margin: by how much, without beta. KL(model || base): a response token."
    ]
    heads = ["model", "margin quartiles", "became right", "became wrong", "chosen log-prob", "rejected log-prob"]
    parts = [[
        name, " / ".join(f"{q:.2f}" for q in m["margin_quartiles"]),
        f"{m['became_right']:.2f}", f"{m['became_wrong']:.2f}",
        between(m["chosen_change"], m["chosen_change_interval"]), f"{m['rejected_change']:+.2f}",
    ] for name, m in found.items() if name != "base"]  # fmt: skip
    lines += ["## What moved", to_table(heads, parts)] if parts else []
    for name, m in found.items():
        if m["chosen_change_interval"][1] < 0:
            lines += [f"Warning: {name} made the chosen answers themselves less likely (likelihood displacement)."]
    heads = ["models", "log-prob", "only the first right", "only the second", "both, or none", "p", ""]
    each = itertools.product(itertools.combinations(found, 2), ((1, "in sum"), (lengths, "a token")))
    both = lambda one, two, by: compare(scores[one][:, :2] / by, scores[two][:, :2] / by)
    parts = [[f"{one}, {two}", how, *both(one, two, by)] for (one, two), (by, how) in each]
    lines += ["## Which is better?", f"McNemar's exact test on {count} pairs.", to_table(heads, parts)] if parts else []
    lines += ["## Length", f"The longer answer is the chosen one in {longer.mean():.2f} of the pairs; {tied} tie."]
    heads = ["model", "correlation of margin and length", "accuracy, chosen longer", "accuracy, chosen shorter"]
    lines += [to_table(heads, [[
        name, f"{m['margin_length_correlation']:+.2f}", f"{m['accuracy_longer']:.2f}", f"{m['accuracy_shorter']:.2f}",
    ] for name, m in found.items()])]  # fmt: skip
    total = lengths.sum(1)
    bucket = np.digitize(total, np.percentile(total, (25, 50, 75)))
    groups = {"length": [f"quarter {i + 1}" for i in bucket]}
    groups |= {name: [str(row.get(name) or "none") for row in rows] for name in ("source", "signal")}
    for what, names in groups.items():
        if len(set(names)) > 1:
            kinds, names = sorted(set(names)), np.array(names)
            of = lambda model, kind: (scores[model][:, 0] > scores[model][:, 1])[names == kind].mean()
            parts = [[kind, (names == kind).sum(), *(f"{of(model, kind):.2f}" for model in scores)] for kind in kinds]
            lines += [f"## Accuracy by {what}", to_table([what, "pairs", *scores], parts)]
    return "\n\n".join(lines + extra) + "\n"


def compare(one, two):
    """Return how often only one, only two and both or neither of two models are right, p, and what it says."""
    a, b = one[:, 0] > one[:, 1], two[:, 0] > two[:, 1]
    only_one, only_two = int((a & ~b).sum()), int((b & ~a).sum())
    p = sign_test(only_one, only_two)
    better = f"the {'first' if only_one > only_two else 'second'} is better" if p < 0.05 else "no difference to be seen"
    return only_one, only_two, len(a) - only_one - only_two, f"{p:.2g}", better


def draw(folder, curves, scores, base):
    """Draw curves.png, margins.png and shift.png; return the Markdown that shows them, nothing without matplotlib."""
    with suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        ink, colours = "#475569", ["#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2"]
        plt.rcParams.update({"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "font.size": 11})
        plt.rcParams.update({"xtick.color": ink, "ytick.color": ink, "figure.facecolor": "white"})
        names, shown = [name for name in scores if name != "base"], []
        if not names:
            return []
        paint = dict(zip(names, itertools.cycle(colours)))
        figure, axes = plt.subplots(1, 4, figsize=(14, 3.2))
        wanted = {"loss": "training loss", "rewards/accuracies": "training accuracy"}
        wanted |= {"rewards/margins": "training margin (with beta)", "kl": "validation KL (nats a token)"}
        for ax, (metric, label) in zip(axes, wanted.items()):
            for name, records in curves.items():
                split = "valid" if metric == "kl" else "train"
                points = [(r["step"], r[metric]) for r in records if r.get("split") == split and metric in r]
                marker = "o" if split == "valid" else ""
                ax.plot([x for x, _ in points], [y for _, y in points], color=paint[name], label=name, marker=marker)
            ax.set(xlabel="update", title=label)
        if curves:
            axes[0].legend(frameon=False)
            shown += [("Training", figure, "curves.png")]
        figure, ax = plt.subplots(figsize=(7, 3.2))
        margins = {name: (scores[name][:, :2] - base) @ [1, -1] for name in names}
        edges = np.histogram_bin_edges(np.concatenate(list(margins.values())), 30)
        for name in names:
            ax.hist(margins[name], edges, color=paint[name], alpha=0.5, label=name)
        ax.axvline(0, color=ink, linewidth=1)
        ax.set(xlabel="margin (nats): right of 0 the chosen answer gained", ylabel="pairs")
        ax.legend(frameon=False)
        shown += [("Margins", figure, "margins.png")]
        figure, ax = plt.subplots(figsize=(5.4, 4.6))
        before = base[:, 0] - base[:, 1]
        for name in names:
            ax.scatter(before, scores[name][:, 0] - scores[name][:, 1], s=14, color=paint[name], alpha=0.6, label=name)
        ax.axhline(0, color=ink, linewidth=1)
        ax.axline((0, 0), slope=1, color=ink, linewidth=1, linestyle=":")
        ax.set(xlabel="base: log-prob chosen - rejected (nats)", ylabel="adapter: the same")
        ax.legend(frameon=False)
        shown += [("Before and after", figure, "shift.png")]
        for title, figure, name in shown:
            for ax in figure.axes:
                ax.spines[["top", "right"]].set_visible(False)
            figure.tight_layout()
            write_atomically(folder / name, partial(figure.savefig, dpi=130))
        plt.close("all")
        return [f"## {title}\n\n![{title}]({name})" for title, _, name in shown]
    return ["No pictures: pip install matplotlib"]


# -------------------------------------------------------------------------------------------------------------- main


def sync(path):
    """Return when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path, write):
    """Have write(name) make a file, and give it its place: after a kill at any byte all of it is there, or what was."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        write(unfinished)
        sync(unfinished)
        unfinished.replace(path)
        with suppress(OSError):  # some disks in a network know no flush of a folder
            sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)  # where it failed, as on a full disk, that needs the room


def show_answers(answers, asked, tokenizer, args):
    """Return the report's part on what the models answered to the asked pairs' prompts, and on what a judge said."""
    said = {name: [tokenizer.decode(ids) for ids, _ in found] for name, found in answers.items()}
    prompts = [pair["prompt"][-1]["content"] for pair in asked]
    heads = ["model", "tokens", "end by themselves", "repeat runs of four tokens"]
    rows = [
        [
            name,
            f"{np.mean([len(ids) for ids, _ in found]):.1f}",
            f"{np.mean([ended for _, ended in found]):.2f}",
            f"{np.mean([repetition(ids) for ids, _ in found]):.3f}",
        ]
        for name, found in answers.items()
    ]
    lines = [f"Greedy answers to {len(asked)} prompts.", to_table(heads, rows)]
    if args.judge:
        ask, rows = make_judge(args), []
        for name in [name for name in said if name != "base"]:
            found = Counter()
            try:
                judge_answers(ask, prompts, said[name], said["base"], found)
            except ConnectionError as error:
                count = found["won"] + found["lost"] + found["tied"]
                lines += [f"{name}: {len(asked) - count} of {len(asked)} answers are not judged: {error}"]
                print(lines[-1])
            if found:
                first = found["first"] / max(found["verdicts"], 1)
                rows += [[name, *(found[key] for key in ("won", "lost", "tied", "unclear")), f"{first:.2f}"]]
        heads = ["model", "won against base", "lost", "tied", "unclear replies", "share of the answer shown first"]
        lines += [f"Judge: {args.judge}, each pair in both orders.", to_table(heads, rows)] if rows else []
    cut = lambda text: " ".join(text.split())[:200]
    return lines + [to_table(["prompt", *said], [map(cut, row) for row in zip(prompts, *said.values())])]


def write_hard(hard, margins, pairs, messages, rows):
    """Write the pairs whose margin is lowest, the most wrong first, as rows for the trainers; say so in a sentence."""
    order, lines = np.argsort(margins, kind="stable")[: int(hard[0])], []
    for i in order:
        pair = messages[pairs[i]["place"]]
        row = {"prompt": pair["prompt"], "chosen": [pair["chosen"]], "rejected": [pair["rejected"]]}
        row |= {"tools": pair["tools"]} if pair["tools"] else {}
        row |= {name: rows[i][name] for name in ("weight", "source", "signal", "id") if name in rows[i]}
        lines += [json.dumps(row, ensure_ascii=False) + "\n"]
    with blame(hard[1], "name a file that can be written"):
        file = Path(hard[1]).resolve()
        need(file.is_file() or not file.exists(), "it is no file")  # a rename would put one in a device's place
        write_atomically(file, lambda name: name.write_text("".join(lines), encoding="utf-8"))
    low, high = margins[order[0]], margins[order[-1]]
    return f"{len(order)} pairs with margins from {low:.2f} to {high:.2f} nats are in {hard[1]}."


def read_known(file):
    """Return {pair's key: {model's key: its numbers}} of an earlier run's pairs.jsonl, as far as it goes."""
    known, is_number = {}, lambda value: type(value) in (int, float)
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                row = json.loads(line)
                models = [m for m in row["models"].values() if is_number(m["chosen"]) and is_number(m["rejected"])]
                known[row["key"]] = {m["key"]: [m["chosen"], m["rejected"], m["kl"]] for m in models}
    return known


def write_pairs(file, pairs, scores, keys):
    """Write a record a pair, with every model's numbers so far, whole or not at all."""
    lines = []
    for i, pair in enumerate(pairs):
        models = {}
        for name, found in scores.items():
            if not math.isnan(found[i, 0]):
                chosen, rejected, kl = found[i].tolist()
                kl = None if math.isnan(kl) else kl
                models[name] = {"key": keys[name], "chosen": chosen, "rejected": rejected, "kl": kl}
        lengths = {"chosen_tokens": len(pair["chosen"]), "rejected_tokens": len(pair["rejected"])}
        lines += [json.dumps({"key": pair["key"], "place": pair["place"], **lengths, "models": models}) + "\n"]
    with blame(file, "choose another --out, or make room"):
        write_atomically(file, lambda name: name.write_text("".join(lines), encoding="utf-8"))


def main():
    args = parse_args(sys.argv[1:])
    folder = Path(args.out)
    with blame(folder, "choose another --out"):  # now, not after an hour
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        need(not any(Path(folder, name).is_dir() for name in ("report.md", "pairs.jsonl")), "it is no report's folder")
    messages = {pair["place"]: pair for pair in load_pairs(args, args.data, "test")}
    columns = dict(read_rows(args.data, "test"))
    with blame(args.model, "give a folder or a Hugging Face name; trust_remote_code is off"):
        model, tokenizer = mlx_lm.load(args.model, {"trust_remote_code": False})  # or it asks, on the terminal
    pairs = encode_pairs(tokenizer, list(messages.values()), args.max_seq_length)
    args.share = settle_sharing(model, pairs)
    add_reference(model, pairs, args)
    base = np.array([pair["ref_logps"] for pair in pairs], np.float64)
    lengths = np.array([[len(pair["chosen"]), len(pair["rejected"])] for pair in pairs])
    scores, keys, file = {"base": np.c_[base, np.zeros(len(base))]}, {"base": "base"}, folder / "pairs.jsonl"
    model_key = fingerprint(model)
    known, rows, extra, curves, answers = read_known(file), [columns[pair["place"]] for pair in pairs], [], {}, {}
    prompts = [pair["prompt"] for pair in pairs]
    asked = range(min(args.generate, len(pairs)))
    if asked:
        answers["base"] = answer(model, tokenizer, [prompts[i] for i in asked], args)
    for path in args.adapter_path:
        name, text = Path(path).name, Path(path, "adapters.safetensors").read_bytes()
        config = args.configs[name]
        keys[name] = hashlib.sha256(text + json.dumps([model_key, config]).encode()).hexdigest()[:32]
        there = [known.get(pair["key"], {}).get(keys[name], [None] * 3) for pair in pairs]
        keep = lambda found, name=name: write_pairs(file, pairs, scores | {name: found}, keys)
        with ExitStack() as stack:
            with blame(path, f"is it an adapter of {args.model}?"):
                own, initial = stack.enter_context(adapter_in(model, path, config))
            scores[name] = score_pairs(model, own, initial, pairs, args, np.array(there, float), keep)
            with blame(path, "train it anew, with a lower --learning-rate"):
                need(np.isfinite(scores[name][:, :2]).all(), "its log-probabilities are no numbers")
            keep(scores[name])
            install(model, own)
            if asked:
                answers[name] = answer(model, tokenizer, [prompts[i] for i in asked], args)
            if args.samples and initial is not None:
                kl, count = sampled_kl(model, tokenizer, own, initial, pairs, args), min(args.samples, len(pairs))
                extra += [f"KL({name} || base) on its own answers to {count} prompts: {kl:.4f} nats a token."]
        with suppress(OSError, ValueError):
            lines = Path(path, "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last one
            curves[name] = [record for record in records if isinstance(record, dict) and "step" in record]
    write_pairs(file, pairs, scores, keys)
    found = {name: summarize_model(part, base, lengths, args.seed) for name, part in scores.items()}
    if answers:
        extra += show_answers(answers, [messages[pairs[i]["place"]] for i in asked], tokenizer, args)
    extra = draw(folder, curves, scores, base) + (["## Own answers", *extra] if extra else [])
    if args.hard:
        last = list(scores)[-1]
        margins = (scores[last][:, :2] - (base if last != "base" else 0)) @ [1, -1]
        extra += [write_hard(args.hard, margins, pairs, messages, rows)]
    report = write_report(found, scores, rows, lengths, extra, args)
    write_atomically(folder / "report.md", lambda name: name.write_text(report, encoding="utf-8"))
    print(report.split("## Length")[0] + f"Written: {folder}/report.md and {folder}/pairs.jsonl")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # the report went into head or less, which has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}: choose another --out, or make room")
    except (MemoryError, RuntimeError) as error:  # MLX raises the latter where memory ends
        if isinstance(error, RuntimeError) and not re.search("memory|alloc", str(error), re.I):
            raise
        sys.exit(f"{' '.join(str(error).split())[:300]}: lower --batch-size or --max-seq-length")
