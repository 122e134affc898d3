"""
Time a whole first run: load, tokens, reference, one epoch over pairs of a length, save; no pass before it, no warm-up.

    python tests/bench_run.py --shape 1B --lengths 900/150 --pairs 160          ours, mlx-lm-lora and TRL
    python tests/bench_run.py --shape cpu --lengths 90/15 --pairs 16 --sides ours
    python tests/bench_run.py --sides ours,my_dpo.py                            another copy of dpo_trainer.py beside it

A random model and pairs of random words are written to a folder; each side then runs on them in a process of its own,
as its users start it: LoRA of rank 8 on every linear layer, batches of 4, AdamW. Two pairs are held out and measured
by ours at both ends ("measure"); the sum is the time of the whole process, imports too. What earlier runs compiled is
cached on disk, as on a person's machine. shapes: batch shapes that ours compiled.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # hidden, layers, inner, heads, key heads, head, vocabulary: Llama 3.2's two small ones, one for a CPU
    "1B": (2048, 16, 8192, 32, 8, 64, 128256),
    "3B": (3072, 28, 8192, 24, 8, 128, 128256),
    "cpu": (256, 4, 768, 8, 4, 32, 4096),
}
FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
FIELDS += ("head_dim", "vocab_size")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} [EOS]{% endif %}{% endfor %}"


def write_files(folder, shape, medians, count):
    """Write a model with a tokenizer of 2,000 words, and lognormal pairs of these median tokens, at most twice as many."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = {
        **dict(zip(FIELDS, SHAPES[shape])),
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32 if shape == "cpu" else mx.bfloat16)
    (folder / "model").mkdir()
    mx.save_safetensors(
        str(folder / "model/model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    config |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2001, "max_position_embeddings": 8192}
    (folder / "model/config.json").write_text(json.dumps(config))
    words = {f"w{i}": i for i in range(2000)} | {"[UNK]": 2000, "[EOS]": 2001, "[PAD]": 2002}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)
    tokenizer.save_pretrained(folder / "model")
    rng, medians = np.random.default_rng(0), np.array([medians[0], medians[1], medians[1]])
    lengths = np.clip(rng.lognormal(np.log(medians), 0.5, (count + 2, 3)), 4, 2 * medians).astype(int)
    rows = []
    for row in lengths:
        texts = [" ".join(f"w{i}" for i in rng.integers(0, 2000, n)) for n in row]
        rows.append(json.dumps({"prompt": texts[0], "chosen": " " + texts[1], "rejected": " " + texts[2]}) + "\n")
    for name, part in (("train", rows[2:]), ("valid", rows[:2]), ("test", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(part))


def run_ours(folder, path, count):
    """Run dpo_trainer.py, or another copy of it, and return the seconds of its parts."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    parts, inside = defaultdict(float), []

    def clock(name, part, after=lambda result: None):
        function = getattr(script, name)

        def timed(*args, **words):
            start = time.perf_counter()
            inside.append(0.0)
            result = function(*args, **words)
            seconds = time.perf_counter() - start
            parts[part] += seconds - inside.pop()
            if inside:
                inside[-1] += seconds  # of a part within another one
            after(result)
            return result

        setattr(script, name, timed)

    count_shapes = lambda batches: parts.update(shapes=max(parts["shapes"], len({shape for _, shape in batches})))
    for name, part in {"load_model": "load", "load_pairs": "tokens", "can_share": "check", "save": "save"}.items():
        clock(name, part)
    for name, part in {"add_reference": "reference", "evaluate": "measure", "train": "epoch"}.items():
        clock(name, part)
    clock("sorted_batches", "tokens", count_shapes)
    sys.argv = ["dpo_trainer.py", "--model", f"{folder}/model", "--data", str(folder), "--max-seq-length", "8192"]
    sys.argv += ["--adapter-path", f"{folder}/{Path(path).stem}"]
    script.main()
    return parts


def run_peer(folder, count):
    from mlx_lm_lora import train

    sys.argv = ["train", "--train", "--train-mode", "dpo", "--model", f"{folder}/model", "--data", str(folder)]
    sys.argv += ["--iters", str(count // 4), "--batch-size", "4", "--num-layers", "-1", "--max-seq-length", "8192"]
    sys.argv += ["--optimizer", "adamw", "--val-batches", "1", "--steps-per-eval", "100000", "--beta", "0.1"]
    train.main()
    return {}


def run_trl(folder, count):
    import torch
    import transformers
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    parts, start = {}, time.perf_counter()
    half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=half, attn_implementation="sdpa")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    parts["load"], start = time.perf_counter() - start, time.perf_counter()
    data = load_dataset("json", data_files=f"{folder}/train.jsonl", split="train")
    settings = DPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=4, num_train_epochs=1, report_to=[], max_length=None,
        learning_rate=1e-5, bf16=half == torch.bfloat16, precompute_ref_log_probs=True, gradient_checkpointing=False,
        save_strategy="no",
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/model")
    trainer = DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    parts["tokens"], start = time.perf_counter() - start, time.perf_counter()
    trainer.train()  # with the reference, which it computes first
    parts["epoch"], start = time.perf_counter() - start, time.perf_counter()
    trainer.save_model(f"{folder}/trl")
    return {**parts, "save": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--lengths", default="900/150", help="median tokens PROMPT/ANSWER")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--sides", default="ours,mlx-lm-lora,trl", help="or a path of a copy of dpo_trainer.py")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of a child process
    options = parser.parse_args()
    if options.folder:
        if options.sides == "files":  # in a process of its own, or what it leaves on a GPU is missing for the others
            medians = [int(n) for n in options.lengths.split("/")]
            return write_files(Path(options.folder), options.shape, medians, options.pairs)
        run = {"trl": run_trl, "mlx-lm-lora": run_peer}.get(options.sides)
        path = ROOT / "dpo_trainer.py" if options.sides == "ours" else options.sides
        parts = run(options.folder, options.pairs) if run else run_ours(options.folder, path, options.pairs)
        return Path(options.folder, "parts.json").write_text(json.dumps(parts))
    with tempfile.TemporaryDirectory() as name:
        words = ["--shape", options.shape, "--lengths", options.lengths, "--pairs", str(options.pairs)]
        subprocess.run([sys.executable, __file__, "--folder", name, "--sides", "files", *words], check=True)
        print(
            f"{options.shape}, {options.pairs} pairs of {options.lengths}; seconds of a whole first run, and of parts"
        )
        for side in options.sides.split(","):
            words = [sys.executable, __file__, "--folder", name, "--sides", side, "--pairs", str(options.pairs)]
            start = time.perf_counter()
            done = subprocess.run(words, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            parts = json.loads(Path(name, "parts.json").read_text()) if done.returncode == 0 else {}
            found = "  ".join(f"{part} {value:.4g}" for part, value in parts.items())
            print(f"{side:12}{seconds:8.1f}  {found or done.stderr[-300:]}", flush=True)
            Path(name, "parts.json").write_text("{}")


if __name__ == "__main__":
    main()
