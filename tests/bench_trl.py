"""
Time a training step of TRL's DPOTrainer (PyTorch, PEFT) on bench_step.py's lengths and shapes, sorted by length.

    python tests/bench_trl.py --shape 1B --lengths 900/150,180/300                    needs pip install trl peft
    python tests/bench_trl.py --order random                                          batches as TRL makes them itself

A pass over all pairs to warm up, then timed ones: milliseconds a step (median of the passes, the least, the most),
pairs a second, peak GB (NVIDIA GPU only; weights included). LoRA as in bench_step.py, no checkpointing. TRL scores the
reference in each step by default; "precomputed": before training, as dpo_trainer.py does, and not in these figures.
"""

import argparse
import gc
import io
import itertools
import math
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec

import numpy as np

if missing := [name for name in ("trl", "peft") if not find_spec(name)]:
    sys.exit(f"{' and '.join(missing)} not installed (pip install trl peft): nothing to time")
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer

FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
FIELDS += ("head_dim", "vocab_size")
SHAPES = {  # bench_step.py's, not imported: it needs MLX
    "1B": (2048, 16, 8192, 32, 8, 64, 128256, torch.bfloat16),
    "3B": (3072, 28, 8192, 24, 8, 128, 128256, torch.bfloat16),
    "cpu": (512, 4, 1536, 8, 4, 64, 8192, torch.float32),
}
GPU = torch.cuda.is_available()


def draw_lengths(prompt, answer, count):
    """Return (count, 3) tokens of prompt, chosen, rejected: lognormal, as chats are, of these medians."""
    medians = np.array([prompt, answer, answer])
    drawn = np.random.default_rng(0).lognormal(np.log(medians), 0.5, (count, 3))
    return np.clip(drawn, 4, 4 * medians).astype(int)


def make_data(medians, count):
    """Return a tokenizer of 2000 words, and pairs of them sorted by all tokens, not as dpo_trainer.py always does."""
    words = {f"w{i}": i for i in range(2000)} | {"[UNK]": 2000, "[EOS]": 2001, "[PAD]": 2002}
    backend, rng = Tokenizer(models.WordLevel(words, unk_token="[UNK]")), np.random.default_rng(1)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(eos_token="[EOS]", pad_token="[PAD]", unk_token="[UNK]")
    say = lambda length: "".join(f"w{i} " for i in rng.integers(0, 2000, length))
    rows = sorted(draw_lengths(*medians, count).tolist(), key=lambda row: row[0] + max(row[1:]))
    pairs = [dict(prompt=say(p), chosen=say(c - 1), rejected=say(r - 1)) for p, c, r in rows]  # TRL adds the EOS
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special), Dataset.from_list(pairs)


def measure(options, medians, steps, precompute):
    """Return the seconds of each timed pass, and the peak GB (0 without a GPU)."""
    (*sizes, dtype), marks = SHAPES[options.shape], []
    config = transformers.LlamaConfig(**dict(zip(FIELDS, sizes)), tie_word_embeddings=True)
    with torch.device("cuda" if GPU else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % steps == 0:  # the end of a pass
                if GPU:
                    torch.cuda.synchronize()
                if GPU and not marks:
                    torch.cuda.reset_peak_memory_stats()
                marks.append(time.perf_counter())

    tokenizer, pairs = make_data(medians, options.pairs)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        settings = dict(output_dir=folder, report_to=[], save_strategy="no", logging_steps=10**6, learning_rate=1e-5)
        settings |= dict(per_device_train_batch_size=options.batch_size, max_steps=steps * (1 + options.rounds))
        settings |= dict(train_sampling_strategy=options.order, max_length=None, gradient_checkpointing=False)
        settings = DPOConfig(**settings, precompute_ref_log_probs=precompute, bf16=dtype == torch.bfloat16)
        lora = LoraConfig(r=8, lora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
        named = dict(args=settings, train_dataset=pairs, processing_class=tokenizer, peft_config=lora)
        DPOTrainer(model, **named, callbacks=[Clock()]).train()
    return np.diff(marks), torch.cuda.max_memory_allocated() / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--lengths", default="900/150,180/300", help="median tokens PROMPT/ANSWER, commas between")
    for name, default in (("pairs", 16), ("batch-size", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--order", choices=["sequential", "random"], default="sequential", help="random: TRL's default")
    options = parser.parse_args()
    steps = math.ceil(options.pairs / options.batch_size)
    transformers.logging.set_verbosity_error()
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}, {vars(options)}")
    print(f"{'lengths':10}{'reference':12}{'ms/step':>9}{'(least-most)':>20}{'pairs/s':>9}{'peak GB':>9}", flush=True)
    for name, precompute in itertools.product(options.lengths.split(","), (False, True)):
        try:
            seconds, peak = measure(options, map(int, name.split("/")), steps, precompute)
            least, ms, most = 1e3 / steps * np.quantile(seconds, (0, 0.5, 1))
            line = f"{ms:9.1f}{f'({least:.1f}-{most:.1f})':>20}{options.pairs / np.median(seconds):9.2f}{peak:9.2f}"
        except RuntimeError as error:  # out of memory in one must not hide the others
            line = f" {str(error)[:200]}"
        print(f"{name:10}{'precomputed' if precompute else 'in the step':12}{line}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
