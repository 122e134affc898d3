# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Fine-tune a chat model on preference pairs with SimPO (LoRA, DoRA or full), which has no reference model.

    loss = -log sigmoid(beta * (mean_w - mean_l) - gamma)                        arXiv 2405.14734, Eq. 6
    mean_w, mean_l: log-probability a token of the chosen and of the rejected answer; prompt and padding do not count

    python simpo_trainer.py --data data/pairs.jsonl                              the bundled model, a minute on a CPU
    python simpo_trainer.py --model mlx-community/Llama-3.2-1B-Instruct-4bit --data my_pairs.jsonl
    python simpo_trainer.py --model data/tiny-chat --test data/test.jsonl        measures what lies in adapters-simpo/

Input: one pair a line, {"prompt": "...", "chosen": "...", "rejected": "..."}; read_pair takes more forms.
Output, in --adapter-path: adapters.safetensors and adapter_config.json (mlx-lm loads them), metrics.jsonl, this script.
To change the loss edit simpo_loss; the data forms, read_pair; what counts as the answer, encode_pair; an update, train.
Letters: B pairs, 2B rows (the chosen answers, then the rejected), R response tokens, V vocabulary.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from bisect import bisect_left
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import yaml
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers
from mlx_lm.utils import load_tokenizer, maybe_set_recommended_wired_limit, save_config
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- options

ADAPTER = {"fine_tune_type": "lora", "num_layers": -1, "rank": 8, "scale": 20.0, "dropout": 0.0, "keys": None}
OPTIMIZERS = {name.lower(): getattr(optim, name) for name in ("AdamW", "Adam", "SGD", "Adafactor", "Muon")}
# nested blocks of a config, and their keys that have another name here
YAML_BLOCKS = {"lora_parameters": {}, "hf_dataset": {"path": "data", "name": "data"}}
YAML_BLOCKS["lr_schedule"] = {"name": "lr_schedule", "warmup_steps": "warmup"}
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


def schedule(text):
    """Return a schedule's name, or mlx_lm.lora's block, whose arguments stand for --learning-rate and --warmup."""
    block = yaml.safe_load(text)
    if isinstance(block, dict):
        block["arguments"] = [float(x) for x in block["arguments"]]  # YAML takes 1e-7 for a text
        block |= {"warmup": int(block.get("warmup", 0)), "warmup_init": float(block.get("warmup_init", 0))}
        build_schedule(block)
    need(isinstance(block, dict) or block in ("cosine", "linear", "constant"), "no such schedule")
    return block


def parse_args(words):
    """Return the options in words (as sys.argv[1:]), laid over those of --config; exit with one line if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = partial(need, False)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    count, real = number(int, 1), partial(number, float)
    # what to do, on what
    add("-c", "--config", help="YAML file of these options, mlx_lm.lora's blocks too; the command line wins")
    add("--model", help="folder or Hugging Face name; a quantized one trains as QLoRA (default: the bundled one)")
    add("--data", help="pairs: a .jsonl file, a folder (train, valid, test .jsonl), a hub dataset (NAME, NAME:SPLIT)")
    add("--train", action=switch, help="train (default, but with --test and no pairs to train on)")
    add("--test", nargs="?", const="", help="measure at the end, on this file, folder or hub dataset, or on --data's")
    add("--prompt-feature", default="prompt", help="column of the prompt (default: prompt)")
    add("--chosen-feature", default="chosen", help="column of the better answer (default: chosen)")
    add("--rejected-feature", default="rejected", help="column of the worse answer (default: rejected)")
    add("--max-seq-length", type=count, default=1024, help="tokens (default: 1024); old turns go, answers stay whole")
    # objective
    add("--loss", choices=["sigmoid", "hinge", "cpo", "orpo"], default="sigmoid", help="(default: sigmoid)")
    add("--beta", type=real(1e-6), help="scale of the log-probabilities, 2 to 10 (default: 2; cpo, orpo: 0.1)")
    add("--gamma", type=real(0), help="margin to win by, 0.3 to 1.6; 0: none (default: 1; cpo, orpo: none)")
    add("--label-smoothing", type=real(0, 0.5), default=0.0, help="share of pairs taken as mislabelled (default: 0)")
    add("--sft-weight", type=real(0), help="of the chosen answer's own loss; 0: off (default: 0; cpo, orpo: 1)")
    # what is trained
    add("--fine-tune-type", choices=["lora", "dora", "full"], help="(default: lora)")
    add("--num-layers", type=number(int, -1), help="last N layers; -1: all (default)")
    add("--rank", type=count, help="of LoRA, DoRA (default: 8)")
    add("--scale", type=real(0), help="of LoRA, DoRA: PEFT's alpha / rank (default: 20)")
    add("--dropout", type=real(0, 0.99), help="of LoRA, DoRA inputs (default: 0, off)")
    add("--keys", nargs="+", help="layers for LoRA, DoRA, as self_attn.q_proj (default: every linear layer)")
    add("--resume-adapter-file", help="start from this adapters.safetensors")
    # optimization
    add("--epochs", type=count, default=1, help="passes over the pairs (default: 1)")
    add("--iters", type=count, help="updates, instead of --epochs")
    add("--batch-size", type=count, default=4, help="pairs a batch (default: 4)")
    add("--grad-accumulation-steps", type=count, default=1, help="batches an update (default: 1)")
    add("--learning-rate", type=real(0, 10), help="peak (default: 1e-5; full: 1e-6)")
    add("--lr-schedule", type=schedule, default="cosine", help="cosine, linear or constant (default: cosine)")
    add("--warmup", type=real(0), default=0.1, help="share of the updates; 1 or more: updates (default: 0.1)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: adamw)")
    add("--grad-checkpoint", action=switch, help="less memory, about 1.3 times the time")
    add("--seed", type=number(int, 0, 2**63), default=0, help="of adapters, order, dropout, split (default: 0)")
    # measuring and saving
    add("--adapter-path", default="adapters-simpo", help="output; an older run moves aside (default: %(default)s)")
    add("--resume", action=switch, help="go on from the newest checkpoint in --adapter-path, to the bit")
    add("--steps-per-report", type=count, default=10, help="updates (default: 10)")
    add("--steps-per-eval", type=count, default=200, help="updates (default: 200)")
    add("--save-every", type=count, default=100, help="updates (default: 100)")
    add("--keep", type=number(int, 0), default=2, help="checkpoints, thrice what is trained; 0: none (default: 2)")
    add("--val-batches", type=number(int, -1), default=-1, help="sample of the valid pairs; -1, 0: all (default)")
    add("--test-batches", type=number(int, -1), default=-1, help="sample of the test pairs; -1, 0: all (default)")
    add("--report-to", help="wandb, swanlab or wandb,swanlab")
    add("--project-name", help="for --report-to")
    with blame(Path(__file__).name, "--help lists all options"):
        typed = args = parser.parse_args(words)
        if not (args.config or args.model):
            args.config = "data/demo-simpo.yaml"
            print(f"No --model given: taking the bundled one and {args.config}. Yours: --model FOLDER_OR_NAME")
            need(Path(args.config).exists(), f"name a model with --model ({args.config} is not here)")
        if args.config:
            args = parser.parse_args(config_words(parser, args.config) + words)
        need(args.train is not False or args.test is not None, "neither training nor a test is asked for")
        if args.train is None:  # --test with pairs of its own does not ask for --data's: these are to train on
            args.train = args.test is None or bool(args.test and args.data)
        need(args.train or not args.resume, "--resume goes on with a training")
        need(args.model, "name a model with --model")
        need(args.data or (args.test and not args.train), "name the pairs with --data")
        single = args.data and not Path(args.data).is_dir() and (Path(args.data).is_file() or ":" in args.data)
        need(args.test != "" or not (args.train and single), "name other pairs to measure on: --test NAME")
        need(args.loss in ("sigmoid", "cpo") or not args.label_smoothing, f"{args.loss} has no --label-smoothing")
        simpo = args.loss in ("sigmoid", "hinge")
        need(simpo or not args.gamma, f"{args.loss} has no --gamma")
        for name, value in {"beta": 2.0 if simpo else 0.1, "gamma": 1.0 * simpo, "sft_weight": 1.0 - simpo}.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        lora = [name for name in ("rank", "scale", "dropout", "keys") if getattr(typed, name) is not None]
        need(args.fine_tune_type != "full" or not lora, f"full fine-tuning has no --{lora and lora[0]}")
        for package in args.report_to.split(",") if args.report_to else []:
            need(package in ("wandb", "swanlab"), f"--report-to takes wandb, swanlab or both, not {package}")
            need(importlib.util.find_spec(package), f"{package} is not installed: pip install {package}")
    return settle_adapter(args)


def settle_adapter(args):
    """Return args with what is adapted filled in: as the adapter to start from says, if there is one; or by default."""
    file = args.resume_adapter_file or (None if args.train else f"{args.adapter_path}/adapters.safetensors")
    says, args.adapter = dict(ADAPTER), file and str(Path(file).parent)
    with blame(file, "name a folder's adapters.safetensors that was trained with these options"):
        if file:
            need(Path(file).name == "adapters.safetensors" and Path(file).exists(), "there is no such adapter")
            config = json.loads((Path(args.adapter) / "adapter_config.json").read_text())
            says |= {**config, **(config["lora_parameters"] or {})}
            names = ("loss", "beta", "label_smoothing", "delta", "length_normalize", "gamma", "sft_weight")
            objective = {name: config[name] for name in names if name in config}
            if not args.train and objective.keys() <= vars(args).keys():  # measured as it was trained
                vars(args).update(objective)
        for name in ADAPTER:
            told = getattr(args, name)
            need(not file or told in (None, says[name]), f"this adapter has {name} {says[name]}, not {told}")
            setattr(args, name, says[name] if told is None else told)
    full, lora = args.fine_tune_type == "full", {name: getattr(args, name) for name in ("rank", "scale", "dropout")}
    args.lora_parameters = None if full else {**lora, **({"keys": args.keys} if args.keys else {})}
    args.learning_rate = args.learning_rate if args.learning_rate is not None else 1e-6 if full else 1e-5
    args.share = SHARE  # for make_batch, until settle_sharing has tried the model
    return args


def config_words(parser, path):
    """Return a YAML file's options as command-line words, to be checked alike; exit with file:line if wrong."""
    with blame(path, "a config is a YAML file of options, as data/demo.yaml"):
        text = Path(path).read_text(encoding="utf-8")
        config, words = yaml.safe_load(text) or {}, []
        need(isinstance(config, dict), "not lines of name: value")
    for key, item in config.items():
        block = item if key in YAML_BLOCKS and isinstance(item, dict) else {}
        entries = {key: item} if not block or "arguments" in block else block  # mlx_lm.lora's schedule stays whole
        for name, value in entries.items():
            line = next((i for i, row in enumerate(text.splitlines(), 1) if row.strip().startswith(f"{name}:")), 1)
            flag = str(YAML_BLOCKS.get(key, {}).get(name, name)).replace("_", "-")
            values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
            new = [f"--no-{flag}" if value is False else f"--{flag}", *map(str, values)]
            if value is not None and new != ["--no-test"]:
                with blame(f"{path}:{line}", "--help lists all options"):
                    known = flag not in ("config", "help") and not parser.parse_known_args(new)[1]
                    need(known, f"no such option or value: {name}: {value}")
                words += new
    return words


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


def load_splits(args):
    """Return {"train", "valid", "test": pairs}; with no valid.jsonl a tenth of the prompts, at most 200, held out."""
    splits = {"test": load_pairs(args, args.test or args.data, "test")} if args.test is not None else {}
    if args.train:
        splits["train"] = pairs = load_pairs(args, args.data, "train")
        if Path(args.data, "valid.jsonl").exists():
            return splits | {"valid": load_pairs(args, args.data, "valid")}
        prompts = sorted({json.dumps(pair["prompt"]) for pair in pairs})
        held_out = set(random.Random(args.seed).sample(prompts, min(len(prompts) // 10, 200)))
        for name in ("train", "valid"):  # by prompt: none is on both sides
            splits[name] = [pair for pair in pairs if (json.dumps(pair["prompt"]) in held_out) == (name == "valid")]
    return splits


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


class FusedLoRA(LoRALinear):
    """A LoRALinear without dropout, whose adapter takes no pass of its own over the layer's inputs and outputs."""

    def __call__(self, x):
        @mx.custom_function
        def layer(x, a, b):
            down = (x @ a) * self.scale
            return mx.addmm(self.linear(x), down, b), down

        @layer.vjp
        def layer_vjp(primals, cotangents, outputs):
            (x, a, b), up, down = primals, cotangents[0], outputs[1]
            down_up = (up @ b.T) * self.scale
            rows = [v.flatten(0, -2) for v in (x, down_up, down, up)]  # or each text has gradients, to be summed up
            through = mx.vjp(self.linear, [x], [up])[1][0]  # the layer's own weights are frozen
            return mx.addmm(through, down_up, a.T), rows[0].T @ rows[1], rows[2].T @ rows[3]

        return layer(x, self.lora_a, self.lora_b)[0]


@mx.custom_function
def lean_swiglu(gate, x):
    """Return silu(gate) * x, and keep nothing but these two for the backward pass."""
    return nn.silu(gate) * x


@lean_swiglu.vjp
def lean_swiglu_vjp(primals, cotangent, _):
    (gate, x), s = primals, 1 / (1 + mx.exp(-primals[0]))
    same = (1 + mx.tanh(gate / 2)) / 2  # a sigmoid that is shared, with the forward too, would be kept and read again
    return cotangent * x * s * (1 + gate * (1 - s)), cotangent * gate * same


class KeyedDropout(nn.Dropout):
    """Dropout by a key that stays the same when the layer is computed again."""

    def __call__(self, x):
        if self._p_1 == 1 or not self.training:
            return x
        return mx.random.bernoulli(self._p_1, x.shape, key=self._key) * x * (1 / self._p_1)


class Checkpointed:
    """Mixed into a model's layers, keeps their inputs only, a PrefixCache's among them, and computes the rest twice."""

    is_checkpointed = True

    def __call__(self, *args, **kwargs):
        given = dict(zip(inspect.signature(super().__call__).parameters, args)) | kwargs
        cache = next((x for x in given.values() if isinstance(x, PrefixCache)), PrefixCache())
        dropouts = [module for module in self.modules() if isinstance(module, KeyedDropout)]
        keys = [mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) for _ in dropouts]

        def layer(params, held, given, keys):  # what is no argument, mx.compile does not find again
            self.update(params)
            cache.keys, cache.values = held
            for dropout, key in zip(dropouts, keys):
                dropout._key = mx.stop_gradient(key)
            if isinstance(given.get("mask"), mx.array):  # CUDA's attention has no gradient of it, and none is wanted
                given = given | {"mask": mx.stop_gradient(given["mask"])}
            out = super(Checkpointed, self).__call__(**given)
            # + 0: where out holds them as well, mx.checkpoint would lose the gradient of one of the two
            return out, [x + 0 for x in (cache.keys, cache.values) if x is not None]

        held = (cache.keys, cache.values)
        out, held = mx.checkpoint(layer)(self.trainable_parameters(), held, given, keys)
        cache.keys, cache.values = held or (None, None)
        return out


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


def simpo_loss(
    chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta=2.0, gamma=1.0, label_smoothing=0.0,
    loss="sigmoid", sft_weight=0.0,
):  # fmt: skip
    """Return (losses, chosen_rewards, rejected_rewards), each (B,), from summed log-probs and lengths, each (B,).

    sigmoid: Eq. 6 of arXiv 2405.14734; gamma is absolute; label_smoothing as in conservative DPO. hinge: of the same x,
    max(0, 1 - x). cpo: arXiv 2401.08417, section 3: x of sums and no gamma. orpo: Eq. 6 and 7 of arXiv 2403.07691:
    beta, its lambda, times -log sigmoid of the log odds ratio, where p = exp(mean) and odds = p / (1 - p). sft_weight
    adds that much of -mean_w: the 1 of cpo, whose paper has the sum, and of orpo.
    """
    means = chosen_means, rejected_means = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    rewards = [beta * x for x in ((chosen_logps, rejected_logps) if loss == "cpo" else means)]
    margins = rewards[0] - rewards[1] - (0 if loss == "cpo" else gamma)
    losses = (1 - label_smoothing) * mx.logaddexp(0, -margins) + label_smoothing * mx.logaddexp(0, margins)
    if loss == "hinge":
        losses = mx.maximum(1 - margins, 0)
    elif loss == "orpo":  # an answer that is certain, mean 0, has no finite odds
        odds = [x - mx.log(-mx.expm1(x)) for x in (mx.minimum(mean, -1e-6) for mean in means)]
        losses = beta * mx.logaddexp(0, odds[1] - odds[0])
    return losses - sft_weight * chosen_means, *rewards


def simpo_metrics(logps, batch, args):
    """Return {"loss", "rewards/...", "logps/...", "lengths/...": (B,)} from the rows' log-probabilities (2B,)."""
    (chosen, rejected), lengths = logps.reshape(2, -1), batch["mask"].sum(-1).reshape(2, -1)
    options = (args.beta, args.gamma, args.label_smoothing, args.loss, args.sft_weight)
    losses, won, lost = simpo_loss(chosen, rejected, *lengths, *options)
    metrics = {"loss": losses * batch["weights"], "rewards/chosen": won, "rewards/rejected": lost}
    metrics |= {"rewards/margins": won - lost, "rewards/accuracies": won > lost}
    metrics |= {"lengths/chosen": lengths[0], "lengths/rejected": lengths[1]}
    return metrics | {"logps/chosen": chosen, "logps/rejected": rejected, "logps/accuracies": chosen > rejected}


# --------------------------------------------------------------------------------------------------------- training


def trainable_parameters(model, args):
    """Freeze the model, add LoRA or DoRA layers (or find them) or unfreeze whole ones; return what is trained, float32.

    Returns (params, layout): a dict of arrays, or of one vector with all of them, since an optimizer's pass over each
    of hundreds of small ones takes longer than over their sum; and each one's name, shape and dtype to compute in:
    LoRA's is the model's own, since float32 adapters make every activation float32; DoRA's is float32, for its norms.
    """
    floats = [w for _, w in tree_flatten(model.parameters()) if mx.issubdtype(w.dtype, mx.floating)]
    common = max({w.dtype for w in floats}, key=lambda dtype: sum(w.size for w in floats if w.dtype == dtype))
    need(args.num_layers <= len(model.layers), f"--num-layers {args.num_layers}: there are {len(model.layers)}")
    mx.random.seed(args.seed)
    model.freeze()
    if args.fine_tune_type == "full":
        for layer in model.layers[-max(args.num_layers, 0) :]:
            layer.unfreeze()
    elif args.adapter:
        model.unfreeze(keys=["lora_a", "lora_b", "m"], strict=False)
    else:
        linear_to_lora_layers(model, args.num_layers, args.lora_parameters, args.fine_tune_type == "dora")
    params = dict(tree_flatten(model.trainable_parameters()))
    need(params, f"no layer has the --keys {args.keys}")
    need(all(mx.issubdtype(w.dtype, mx.floating) for w in params.values()), "a quantized model has no full fine-tuning")
    own = {"lora": common, "dora": mx.float32}.get(args.fine_tune_type)
    layout = [(name, w.shape, own or w.dtype) for name, w in params.items()]
    return pack(params, own and args.optimizer in ("adamw", "adam", "sgd")), layout  # the others go by the matrix


def pack(arrays, together):
    """Return a dict of arrays in float32, or {"vector": all of them one after another}."""
    if together:
        return {"vector": mx.concatenate([w.flatten() for w in arrays.values()]).astype(mx.float32)}
    return {name: w.astype(mx.float32) for name, w in arrays.items()}


def unpack(params, layout):
    """Return what pack was given, each array in its compute dtype."""
    arrays = params.values()
    if "vector" in params:
        ends = np.cumsum([math.prod(shape) for _, shape, _ in layout])[:-1]
        arrays = mx.split(params["vector"].astype(layout[0][2]), ends.tolist())
    return {name: w.reshape(shape).astype(dtype) for w, (name, shape, dtype) in zip(arrays, layout)}


def lighten(model, args):
    """Make the model's layers cost less memory and time in training; much less memory with --grad-checkpoint."""
    for module in model.modules():
        if type(module) is LoRALinear and not args.dropout:
            module.__class__ = FusedLoRA
        home = sys.modules[type(module).__module__]
        if hasattr(home, "swiglu"):
            home.swiglu = lean_swiglu
        if type(module) is nn.Dropout and args.dropout and args.grad_checkpoint:
            module.__class__ = KeyedDropout
    for layer in model.layers if args.grad_checkpoint else []:
        layer.__class__ = type(type(layer).__name__, (Checkpointed, type(layer)), {})


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


def padding_share(batches, share):
    """Return the share of padding in the tokens that these batches make the model compute."""
    real = padded = 0
    for pairs in batches:
        prompt, row = padded_widths(pairs, share)
        padded += len(pairs) * (prompt + 2 * row)
        times = 1 if prompt else 2  # so often each prompt is computed
        real += sum(times * (len(p["prompt"]) - 1) + len(p["chosen"]) + len(p["rejected"]) for p in pairs)
    return 1 - real / padded


def mean_metrics(found):
    """Return the mean of each metric over all processes' pairs, from (dict of arrays, number of pairs) a batch."""
    sums = [sum(np.array(metrics[name][:count]).sum() for metrics, count in found) for name in found[0][0]]
    *sums, count = sum_all([*sums, sum(count for _, count in found)])
    return {name: float(value / count) for name, value in zip(found[0][0], sums)}


def evaluate(model, params, initial, layout, pairs, args, objective, size=-1):
    """Return the mean of every metric over the pairs, the chosen answers' perplexity, and KL(policy || reference).

    KL is exact, from both distributions, in nats a response token; initial, the parameters that make the model its own
    reference, is None where there are none, and KL is left out. size: batches of pairs, a seeded sample; -1: all.
    """

    @mx.compile
    def measure(params, initial, batch):
        states = response_states(install(model, unpack(params, layout)), batch)
        metrics = objective(in_chunks(token_logps, model, batch, states), batch, args)
        if initial is None:
            return metrics
        ref_states = response_states(install(model, unpack(initial, layout)), batch)
        return metrics | {"kl": in_chunks(token_kl, model, batch, states, ref_states).reshape(2, -1).sum(0)}

    if 0 < size * args.batch_size < len(pairs):
        pairs = random.Random(args.seed).sample(pairs, size * args.batch_size)
    found = []
    for batch in tqdm(sorted_batches(pairs, args.batch_size, args.share), desc="measuring", **BAR):
        mine, count = own_part(batch)
        found.append((measure(params, initial, make_batch(mine, args.share)), count))
        mx.eval(found[-1])  # or every batch's logits wait for the end
    means = mean_metrics(found)
    chosen, rejected = (sum(len(pair[side]) for pair in pairs) for side in ("chosen", "rejected"))
    if initial is not None:
        means["kl"] *= len(pairs) / (chosen + rejected)
    means["pairs"] = len(pairs)
    means["perplexity/chosen"] = math.exp(-means["logps/chosen"] * len(pairs) / chosen)
    if "ref_logps" in pairs[0]:
        refs = np.array([pair["ref_logps"] for pair in pairs])
        means["ref_logps/accuracies"] = float((refs[:, 0] > refs[:, 1]).mean())
        means["perplexity/ref_chosen"] = math.exp(-refs[:, 0].sum() / chosen)
    return means


def plan_updates(pairs, args):
    """Return the batches of each update of the run: every batch once an epoch, in that epoch's own seeded order."""
    batches, plan, size = sorted_batches(pairs, args.batch_size, args.share), [], args.grad_accumulation_steps
    epochs = math.ceil(args.iters / math.ceil(len(batches) / size)) if args.iters else args.epochs
    for epoch in range(epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(batches))
        plan += [[batches[j] for j in order[i : i + size]] for i in range(0, len(order), size)]
    return plan[: args.iters]


def make_optimizer(args, updates):
    """Return the optimizer; its rate rises linearly, then falls until the last update as --lr-schedule says."""
    warmup = int(args.warmup if args.warmup >= 1 else args.warmup * updates)

    def rate(step):  # step: an unsigned array, the updates done
        done = mx.clip((step.astype(mx.float32) - warmup) / max(updates - warmup, 1), 0, 1)
        falls = {"cosine": (1 + mx.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return args.learning_rate * mx.minimum((step + 1) / max(warmup, 1), falls[args.lr_schedule])

    if isinstance(args.lr_schedule, dict):
        rate = build_schedule(args.lr_schedule)
    # mlx's defaults: Adam's first steps are three times too long, and Adafactor goes by a rate of its own
    own = {"adamw": {"bias_correction": True}, "adam": {"bias_correction": True}, "adafactor": {"relative_step": False}}
    return OPTIMIZERS[args.optimizer](learning_rate=rate, **own.get(args.optimizer, {}))


# An update of a larger gradient norm is not made. Healthy runs have 1 to 100 with answers of 17 tokens, so some 10,000
# with 4,000; beside a pair of 1,000,000 the others, of about 1, are lost in the rounding of float32.
MAX_NORM = 1e6


def train(model, params, layout, plan, args, objective, optimizer=None):
    """Yield (step, params, found, rates) after each update of the plan, all still being computed.

    objective(logps (2B,), batch, args) returns the pairs' metrics, each (B,), "loss" among them. found: the update's
    batches, as mean_metrics takes them; rates: grad_norm and learning_rate. An update whose loss is not finite, or
    whose norm is not up to MAX_NORM, is not made, nor any after it, whose norms are nan: params stay the last good
    ones. optimizer: one that has made the plan's first updates already, as its state says; by default a new one.
    """
    maybe_set_recommended_wired_limit()  # a Mac then keeps the model's memory in place
    done = optimizer.state["step"].item() if optimizer else 0
    optimizer, world = optimizer or make_optimizer(args, len(plan)), mx.distributed.init()
    norm, before = mx.array(0.0), None
    optimizer.init(params)
    state = [optimizer.state, mx.random.state]

    def batch_loss(weights, batch):
        logps = completion_logps(install(model, weights, training=True), batch)
        return objective(logps, batch, args)["loss"].sum(), logps

    @partial(mx.compile, inputs=state, outputs=state)
    def step(params, sums, norm, batch, count):
        """Add the batch's loss and gradients; given the count of the update's pairs, on its last batch, update too."""
        (loss, logps), gradients = mx.value_and_grad(batch_loss)(unpack(params, layout), batch)
        metrics, new = objective(logps, batch, args), (loss, pack(gradients, "vector" in params))
        sums = new if sums is None else tree_map(mx.add, sums, new)
        if count is None:
            return params, sums, norm, metrics
        loss, gradients = tree_map(lambda g: g * (world.size() / count), average_gradients(sums))
        gradients, new_norm = optim.clip_grad_norm(gradients, 1.0)
        norm = mx.where((norm <= MAX_NORM) & mx.isfinite(loss), new_norm, math.nan)
        new = optimizer.apply_gradients(gradients, params)
        params = tree_map(lambda new, old: mx.where(norm <= MAX_NORM, new, old), new, params)
        return params, None, norm, metrics

    for update, group in enumerate(tqdm(plan[done:], desc="training", initial=done, total=len(plan), **BAR), done + 1):
        sums, found = None, []
        mx.random.seed(np.random.default_rng([args.seed, update]).integers(2**63).item())  # of dropout, as if uncut
        for batch in group:
            pairs, own = own_part(batch)
            count = mx.array(sum(map(len, group))) if batch is group[-1] else None
            params, sums, norm, metrics = step(params, sums, norm, make_batch(pairs, args.share), count)
            mx.async_eval(params, sums, norm, metrics, optimizer.state)
            mx.eval(before)  # one batch is computed while the host prepares the next, not more
            before = metrics
            found.append((metrics, own))
        yield update, params, found, {"grad_norm": norm, "learning_rate": optimizer.learning_rate}


# ------------------------------------------------------------------------------------------------------------- main


def prepare(parse):
    """Return args, the tokenizer, {"train", "valid", "test": pairs as token ids} and the line that ends a training."""
    if not (first := mx.distributed.init().rank() == 0):  # the first process speaks for all
        sys.stdout, BAR["disable"] = open(os.devnull, "w"), True
    args = parse(sys.argv[1:])
    splits = load_splits(args)
    asked = next((p["prompt"][0]["content"] for p in sum(splits.values(), []) if len(p["prompt"]) == 1), "Hello")
    words = ["--model", args.model, "--adapter-path", args.adapter_path, "--prompt", asked]
    if args.train and first:
        check_folder(Path(args.adapter_path), args)  # now, not after an hour
    with blame(args.model, "give a folder or a Hugging Face name; trust_remote_code is off"):
        tokenizer = load_tokenizer(args.model, {"trust_remote_code": False})  # or it asks, on the terminal
    splits = {name: encode_pairs(tokenizer, pairs, args.max_seq_length) for name, pairs in splits.items() if pairs}
    return args, tokenizer, splits, f"Next: mlx_lm.generate {shlex.join(words)}"


def load_model(name, adapter, tokenizer, pairs, args):
    """Return a model with its adapter, and settle args.share for it; exit where it cannot be loaded."""
    fitting = f"it cannot be loaded for {args.model}: see --model and --adapter-path"
    with blame(adapter or name, fitting if name == args.model else "give a folder or a Hugging Face name"):
        model, other = mlx_lm.load(name, {"trust_remote_code": False}, adapter_path=adapter)
        need(other.get_vocab() == tokenizer.get_vocab(), "the reference has another tokenizer")
    args.share = settle_sharing(model, pairs)
    return model


def gradients_differ(model, params, layout, pairs, args):
    """Lighten the model; return whether a pair's gradients are others then, as where layers share more than inputs."""
    middle = sorted(pairs, key=lambda pair: len(pair["prompt"]))[len(pairs) // 2]
    batch = make_batch([middle], args.share and math.inf)
    gradients = mx.grad(lambda weights: completion_logps(install(model, weights), batch).sum())
    before = gradients(unpack(params, layout))
    mx.eval(before)
    lighten(model, args)
    after, square = gradients(unpack(params, layout)), lambda w: (w.astype(mx.float32) ** 2).sum()
    gap, size = (sum(map(square, ws)) for ws in ([after[name] - w for name, w in before.items()], before.values()))
    return not mx.sqrt(gap).item() <= (1e-3 if is_exact(model) else 0.3) * mx.sqrt(size).item()


def lock(folder, keep=False):
    """Raise ValueError if another run has this folder; keep: have it until this process ends."""
    with suppress(OSError):  # no folder yet, or a disk that knows no locks
        handle, free = os.open(folder, os.O_RDONLY), True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        if not keep:
            os.close(handle)
        need(free, "another run is writing there")


def check_folder(folder, args):
    """Exit if the output folder cannot be written, or holds what the run reads, which would be moved aside with it."""
    with blame(folder, "choose another --adapter-path"):
        lock(folder)
        read = (args.model, args.data, args.test, args.config, args.resume_adapter_file, __file__)
        read = [Path(str(name)).resolve() for name in (*read, getattr(args, "reference_model", None))]
        need(not any(folder.resolve() in (path, *path.parents) for path in read), "it holds what this run reads")
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()


def start_folder(folder, args, goes_on=False):
    """Make the output folder, with the options and this script in it; an earlier run there becomes folder-1, -2 ..."""
    if not goes_on and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        place = folder.resolve() if folder.is_symlink() else folder  # not the link
        older = next(path for n in range(1, 10**6) if not (path := Path(f"{place}-{n}")).exists())
        print(f"The earlier run in {folder} is now in {place.rename(older)}")
        place.mkdir()
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(vars(args))
    if lora := args.lora_parameters:  # mlx-lm goes by scale; others know PEFT's alpha
        config["lora_parameters"] = {**lora, "alpha": lora["scale"] * lora["rank"]}
    write_atomically(folder / "adapter_config.json", partial(save_config, config))
    write_atomically(folder / Path(__file__).name, partial(shutil.copy, __file__))


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


def save_weights(path, params, layout):
    """Write parameters in their compute dtypes, as mlx-lm loads them."""
    write_atomically(path, lambda name: mx.save_safetensors(str(name), unpack(params, layout)))


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(partial(file.read, 2**20), b""):
            digest.update(part)
    return digest.hexdigest()[:32]


def checkpoints(folder):
    """Return a run's checkpoints, checkpoint/STEP-HASH.safetensors, the newest first."""
    found = (path for path in folder.glob("checkpoint/*") if re.fullmatch(r"\d{8}-[\da-f]{32}\.safetensors", path.name))
    return sorted(filter(Path.is_file, found), reverse=True)


def save_checkpoint(folder, step, state, facts, keep):
    """Write state, a tree of arrays, with facts; then delete all checkpoints but the newest ones up to this step.

    Safetensors have no checksum: the file's name holds it, so that a flipped bit is found.
    """
    arrays, unnamed = dict(tree_flatten(state)), folder / "checkpoint" / "unnamed.safetensors"
    unnamed.parent.mkdir(exist_ok=True)
    unnamed.unlink(missing_ok=True)  # of a killed run
    write_atomically(unnamed, lambda name: mx.save_safetensors(str(name), arrays, {"facts": json.dumps(facts)}))
    new = unnamed.rename(unnamed.with_name(f"{step:08}-{file_hash(unnamed)}.safetensors"))
    with suppress(OSError):
        sync(new.parent)
    older = [path for path in checkpoints(folder) if path.name[:8] < new.name[:8]]
    for path in {*checkpoints(folder)} - {new, *older[: keep - 1]}:  # one of this step or a later one is damaged
        path.unlink()


def load_checkpoint(folder, facts):
    """Return the arrays of the newest whole checkpoint, {} where there is none; exit if it is of other facts."""
    for path in checkpoints(folder):
        if path.stem[9:] != file_hash(path):
            print(f"{path} is damaged: going on from the one before it")
            continue
        with blame(path, "resume with the options and data that it was made with, or leave out --resume"):
            arrays, metadata = mx.load(str(path), return_metadata=True)
            known = json.loads(metadata["facts"])
            differing = [name for name in sorted({*known, *facts}) if known.get(name) != facts.get(name)]
            changes = ", ".join(f"{name} (was {known.get(name)}, is {facts.get(name)})" for name in differing)
            need(not differing, f"this run differs in {changes}")
        return arrays
    if checkpoints(folder):
        sys.exit(f"{folder}: no checkpoint is whole: leave out --resume, and the run begins anew")
    print(f"{folder} has no checkpoint: the run begins at step 0")
    return {}


def run_facts(model, splits, args):
    """Return what a run must have in common with the one that it resumes, {name: JSON value}."""
    free = "model data config adapter_path adapter resume_adapter_file reference_model resume train epochs iters test"
    free += " test_batches steps_per_report steps_per_eval save_every keep report_to project_name grad_checkpoint share"
    free += " max_seq_length prompt_feature chosen_feature rejected_feature reference_cache lora_parameters"
    facts = {name: value for name, value in vars(args).items() if name not in free.split()}
    facts["the weights at first"] = fingerprint(model, 1024)[:8]
    for name in ("train", "valid"):
        digest = hashlib.sha256()
        for pair in splits.get(name, []):
            digest.update(json.dumps([pair[part] for part in ("prompt", "chosen", "rejected", "weight")]).encode())
        facts[f"the {name} pairs"] = digest.hexdigest()[:8]
    if refs := [sum(pair["ref_logps"]) for pair in splits["train"] if "ref_logps" in pair]:
        facts["the reference's log-probability"] = f"{np.mean(refs):.3g}"  # rough: a GPU's last digits may differ
    return json.loads(json.dumps(facts))


def earlier_metrics(folder, step):
    """Return {(step, split): metrics} of metrics.jsonl up to a step, and cut off what was written later.

    So is what was told of the test at the end, which may be on other pairs now.
    """
    told, lines, file = {}, [], folder / "metrics.jsonl"
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with suppress(Exception):  # a kill may have cut a line
            record = json.loads(line)
            at, split, _ = record.pop("step"), record.pop("split"), record["loss"]
            if at <= step and (split != "test" or at == 0):
                told[at, split] = record
                lines.append(line + b"\n")
    if not mx.distributed.init().rank():
        write_atomically(file, lambda name: name.write_bytes(b"".join(lines)))
    return told


def say(*lines):
    """Print lines, above the bar; whoever read them may be gone, as in ... | head, without an end of the run."""
    try:
        for line in lines:
            tqdm.write(line)
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def report(step, split, metrics, args, callback=None):
    """Print a line of the metrics; in training also append them to metrics.jsonl and give them to wandb or swanlab."""
    shown = ("loss", "accuracies", "margins", "kl", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb")
    line = [f"{name} {value:.4g}" for name, value in metrics.items() if name.removeprefix("rewards/") in shown]
    say(f"step {step} {split}: {'  '.join(line)}")
    if args.train and not mx.distributed.init().rank():
        with open(Path(args.adapter_path, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
    if callback:
        tell = callback.on_train_loss_report if split == "train" else callback.on_val_loss_report
        tell({"iteration": step, **{f"{split}/{name}": value for name, value in metrics.items()}})


def catch_signals():
    """Return a list that Ctrl-C, SIGTERM or a closed terminal is added to; the second one ends the process at once."""
    numbers, caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), []
    watched = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup wants it

    def note(number, _):
        caught.append(signal.Signals(number).name)
        for other in watched:
            signal.signal(other, signal.SIG_DFL)
        if number == signal.SIGHUP:  # nothing can be written to the terminal any more
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        os.write(2, b"\nThis step is finished first, and saved. Once more: leave at once\n")

    for number in watched:
        signal.signal(number, note)
    return caught


def memory_advice(pairs, args):
    """Return the size of the largest batch, and which options make it smaller."""
    sizes = [(len(b), *padded_widths(b, args.share)) for b in sorted_batches(pairs, args.batch_size, args.share)]
    count, prompt, row = max(sizes, key=lambda size: size[0] * (size[1] + 2 * size[2]))
    ways = ["add --grad-checkpoint"] if args.train and not args.grad_checkpoint else []
    if args.batch_size > 1:
        ways += [f"--batch-size {args.batch_size // 2} --grad-accumulation-steps {2 * args.grad_accumulation_steps}"]
    ways += [f"--max-seq-length below {prompt + row}", "a lower --num-layers", "a quantized --model, as one of 4 bits"]
    return f"the largest batch is {count} pairs of {prompt} + 2 x {row} tokens: {', or '.join(ways)}"


@contextmanager
def explain(pairs, args):
    """Turn a failure of memory, of files or of another process inside into one line: what to do, and what is kept.

    Yields a list; its last function is called then, with whether what was trained can still be saved.
    """
    rescues = [lambda _: "what was trained is as it was" if args.resume else "nothing is trained yet"]
    try:
        yield rescues
    except (OSError, RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())[:300]
        files = isinstance(error, OSError) or text.startswith(("[write]", "[save_safetensors]"))
        if files:  # first, for the name of a file can say anything
            advice = "make room on that disk, or choose another --adapter-path"
        elif isinstance(error, MemoryError) or re.search("memory|alloc", text, re.I):
            advice = memory_advice(pairs, args)
        elif mx.distributed.init().size() > 1:
            advice = "another process ended: see what it says"
        else:
            raise
        kept = "the first process says what is kept" if mx.distributed.init().rank() else rescues[-1](files)
        sys.exit(f"{args.adapter_path}: {text or 'out of memory'}: {advice}; {kept}")


def bad_update(found, plan):
    """Return (step, what is wrong with which pairs) of the first update that was not made; None if all were."""
    for step, (batches, rates) in found.items():
        if not (norm := rates["grad_norm"].item()) <= MAX_NORM:
            pairs = [pair for batch in plan[step - 1] for pair in own_part(batch)[0]]
            losses = np.concatenate([np.array(metrics["loss"]) for metrics, _ in batches])
            bad = [pair for pair, loss in zip(pairs, losses) if not math.isfinite(loss)]
            why = "the loss is not finite" if bad else "the loss or its gradient is not finite"
            why = f"the gradient norm is {norm:.3g}, above {MAX_NORM:g}" if math.isfinite(norm) else why
            places = ", ".join(pair["place"] for pair in (bad or sum(plan[step - 1], []))[:8])
            return step, f"{why}, at {places}: mend them, or lower --learning-rate, and begin anew"
    return None


def train_metrics(found, plan, seconds):
    """Return the mean metrics of some updates, {step: (batches, rates)}, that took so many seconds."""
    norms = [rates["grad_norm"].item() for _, rates in found.values()]
    pairs = [pair for step in found for batch in plan[step - 1] for pair in batch]
    tokens = sum(2 * len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs)
    metrics = mean_metrics(sum((batches for batches, _ in found.values()), []))
    metrics |= {"grad_norm": sum(norms) / len(norms), "learning_rate": found[max(found)][1]["learning_rate"].item()}
    return metrics | {"tokens_per_second": tokens / seconds, "peak_memory_gb": mx.get_peak_memory() / 1e9}


def begin(folder, model, params, plan, splits, args):
    """Make the output folder, or go on in it: return run_facts, parameters, the optimizer and earlier_metrics."""
    facts, optimizer, world = run_facts(model, splits, args), make_optimizer(args, len(plan)), mx.distributed.init()
    optimizer.init(params)
    own = dict(params)
    params.clear()  # the caller's: full fine-tuning would keep what it began with in memory
    if arrays := load_checkpoint(folder, facts) if args.resume else {}:
        own = {name: arrays[f"params.{name}"] for name in own}
        optimizer.state.update(tree_map_with_path(lambda name, _: arrays[f"optimizer.{name}"], optimizer.state))
    step = optimizer.state["step"].item()
    with blame(folder, "resume with more --epochs or --iters; several processes, with the same files"):
        need(step <= len(plan) and sum_all(step) == step * world.size(), f"it is at step {step} of {len(plan)}")
    with blame(folder, "choose another --adapter-path"):
        told = earlier_metrics(folder, step) if arrays else {}
        if not world.rank():
            lock(folder)
            start_folder(folder, args, goes_on=bool(arrays))
            lock(folder, keep=True)
    return facts, own, optimizer, told


def keep_best(folder, told, step):
    """Copy this step's adapter to folder/best if no step has a lower validation loss, or return which one has."""
    losses = {at: metrics["loss"] for (at, name), metrics in told.items() if name == "valid" and at}
    best = min(losses, key=lambda at: (math.isnan(losses[at]), losses[at]))
    if not losses[step] <= losses[best]:
        there = (folder / "best" / "adapters.safetensors").exists()
        return f"; its loss was lower at step {best}" + f": {folder / 'best'} holds that adapter" * there
    (folder / "best").mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapters.safetensors"):
        write_atomically(folder / "best" / name, partial(shutil.copy, folder / name))
    return ""


def what_is_kept(folder, saved, step, updates, goes_on=True):
    """Return a sentence: which step the adapter in the folder is of, what is lost, and, if it can, how to go on."""
    file, text = folder / "adapters.safetensors", "all that was trained is lost" if step else "nothing is trained yet"
    if file.exists():
        text = f"{file} holds {f'step {saved}' if saved else 'an earlier save'} of {updates}"
        text += ", what came after it is lost" * (step > saved)
    if goes_on and (found := checkpoints(folder)):
        command = shlex.join([*(word for word in sys.argv if word != "--resume"), "--resume"])
        size = mx.distributed.init().size()
        launch = f"mlx.launch -n {size} -- " if size > 1 else ""
        text += f"; to go on from step {int(found[0].name[:8])}: {launch}python {command}"
    return text


def run(model, params, layout, initial, splits, args, objective, summarize, rescues):
    """Train, saving and measuring on the way, and print what came of it; exit with a line where training breaks off.

    objective, initial: see train and evaluate. summarize(name, before, after) returns a sentence on the metrics of a
    split. rescues: see explain.
    """
    folder, world, plan = Path(args.adapter_path), mx.distributed.init(), plan_updates(splits["train"], args)
    facts, params, optimizer, told = begin(folder, model, params, plan, splits, args)
    step, saved = optimizer.state["step"].item(), 0
    first, bad, stop, summary = world.rank() == 0, None, False, {}

    def save():
        nonlocal saved
        if first:
            save_weights(folder / "adapters.safetensors", params, layout)
        saved = step

    def measure(name):
        if name not in splits:
            return
        if (step, name) not in told:
            size = args.val_batches if name == "valid" else args.test_batches
            told[step, name] = evaluate(model, params, initial, layout, splits[name], args, objective, size)
            report(step, name, told[step, name], args, callback)
        now, before = told[step, name], told.get((0, name), {})
        summary[name] = summarize(name, before if before.get("pairs") == now["pairs"] else now, now)
        if name == "valid" and step and first:
            summary[name] += keep_best(folder, told, step)

    def rescue(can_save):
        """Save the last good update, if that is possible; return what is kept."""
        if can_save and step and not (saved == step and (folder / "adapters.safetensors").exists()):
            with suppress(OSError, RuntimeError):
                if first:
                    start_folder(folder, args, goes_on=True)  # it may have been deleted
                save()
        return what_is_kept(folder, saved, step, len(plan), not bad)  # a bad update would come again

    rescues.append(rescue)
    callback = first and get_reporting_callbacks(args.report_to, args.project_name, str(folder), vars(args))
    if gradients_differ(model, params, layout, splits["train"], args):
        sys.exit("self-check: this model has other gradients with lighter layers: leave out --grad-checkpoint")
    counts = ", ".join(f"{name} {len(splits.get(name, []))}" for name in ("train", "valid", "test"))
    padding = f"{padding_share(itertools.chain(*plan), args.share):.0%} of the tokens are padding"
    say(f"pairs: {counts}; {len(plan)} updates{f', {step} of them done' if step else ''}; {padding}")
    caught = catch_signals()
    if step:
        save()  # the folder may hold a later one, or none
    if step % args.steps_per_eval == 0 or step == len(plan):
        measure("valid")
    if not step and "ref_logps" not in splits["train"][0]:  # the reference tells of the test as it was
        measure("test")
    found, start = {}, time.perf_counter()
    for step, params, batches, rates in train(model, params, layout, plan, args, objective, optimizer):
        found[step], every = (batches, rates), (args.steps_per_report, args.save_every, args.steps_per_eval)
        reports, saves, measures = (step % n == 0 or step == len(plan) for n in every)
        due = reports or saves or measures
        stop = bool(caught) if world.size() == 1 else due and sum_all(len(caught)) > 0  # together, or they hang
        if not (due or stop):
            continue
        if bad := bad_update(found, plan):
            break
        report(step, "train", train_metrics(found, plan, time.perf_counter() - start), args, callback)
        if saves or measures or stop:
            save()
            if first and args.keep:
                save_checkpoint(folder, step, {"params": params, "optimizer": optimizer.state}, facts, args.keep)
        if measures:
            measure("valid")
        if stop:
            break
        found, start = {}, time.perf_counter()
    if bad or step < len(plan):
        step = bad[0] - 1 if bad else step
        why = f"step {bad[0]} was not made: {bad[1]}" if bad else f"interrupted ({(caught or ['elsewhere'])[0]})"
        kept = rescue(True)
        sum_all(0)  # the others wait: the launcher ends all when one ends
        sys.exit(f"{folder}: {why}; {kept}")
    measure("test")
    say(*summary.values())


def simpo_summary(name, before, metrics):
    """Return a sentence on what evaluate found on a split, before training and now."""
    won = " -> ".join(f"{found['rewards/accuracies']:.2f}" for found in (before, metrics)[before is metrics :])
    return f"{name}: {metrics['pairs']} held-out pairs: chosen answer ahead in {won} (rewards/accuracies)"


def main():
    objective, summarize = simpo_metrics, simpo_summary
    args, tokenizer, splits, next_line = prepare(parse_args)
    if args.train and args.loss in ("sigmoid", "hinge"):
        small = "; warning: 0.1 is DPO's scale of beta, SimPO's is 2 to 10" if args.beta < 1 else ""
        print(f"gamma/beta {args.gamma / args.beta:.2g}{small}")
    if args.fine_tune_type == "full" and args.learning_rate > 1e-5:
        print(f"warning: --learning-rate {args.learning_rate:g}: above 1e-5 full fine-tuning soon breaks a model")
    pairs = sum(splits.values(), [])
    with explain(pairs, args) as rescues:
        model = load_model(args.model, args.adapter, tokenizer, pairs, args)
        with blame(f"--fine-tune-type {args.fine_tune_type}", f"choose what {args.model} can be trained with"):
            params, layout = trainable_parameters(model, args)
        initial = dict(params) if args.train and args.fine_tune_type != "full" else None
        if initial is None:
            print("kl is left out: it is there for LoRA and DoRA in training, with the model itself as the reference")
        if not args.train:
            metrics = evaluate(model, params, None, layout, splits["test"], args, objective, args.test_batches)
            report(0, "test", metrics, args)
            return print(summarize("test", metrics, metrics))
        run(model, params, layout, initial, splits, args, objective, summarize, rescues)
    print(next_line)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
