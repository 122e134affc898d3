"""Tiny random models of real architectures, tokenizers trained on the spot, a runner for the scripts; no downloads."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HAS_GPU = mx.metal.is_available() or mx.cuda.is_available()
SWIGLU = activations.swiglu

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEXT = ["How far is the harbour from the station?", "About ten minutes on foot, along the river.", "I could not say."]

SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-5, head_dim=8, max_position_embeddings=2048, rope_theta=1e4, tie_word_embeddings=True,
)  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": dict(sliding_window=8, sliding_window_pattern=2, query_pre_attn_scalar=8),
    "phi3": {},
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
}


def save_tokenizer(folder, template=CHATML, bos=None):
    """Train a byte-level BPE on TEXT and save it in folder; bos: the token its encode() puts first."""
    from tokenizers.processors import TemplateProcessing

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(TEXT, trainer)
    if bos:
        core.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, SPECIAL.index(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token=bos, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(
    folder, family="llama", seed=0, dtype=mx.float32, bits=None, mode="affine", template=CHATML, bos=None, **extra
):
    """Write a tiny random model of a family, with its tokenizer, as mlx_lm.load reads it; return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, template, bos)
    config = {"model_type": family, "vocab_size": 320, **SHAPE, **FAMILIES.get(family, {}), **extra}
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    named = tree_flatten(model.parameters())
    model.load_weights([(name, w + 0.3 * mx.random.normal(w.shape) if w.ndim > 1 else w) for name, w in named])
    model.set_dtype(dtype)
    if bits:
        config["quantization"] = {"group_size": 32, "bits": bits, "mode": mode}
        nn.quantize(model, **config["quantization"])
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return folder


def make_rows(count):
    """Return count preference rows with differing lengths; every third is a dialogue."""
    rows = []
    for i in range(count):
        good, bad = f"It is {i} minutes" + " along the river" * (i % 3) + ".", "Who knows."
        earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
        turns = (earlier if i % 3 == 0 else []) + [{"role": "user", "content": f"How far is number {i}?"}]
        rows.append({"messages": turns, "chosen": good, "rejected": bad + " I could not say." * (i % 4 == 1)})
    return rows


def write_rows(path, rows):
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_script(*words, script="dpo_trainer.py", cwd=None, env=None):
    """Run one of the scripts as a person would; return the finished process with its stdout and stderr as text."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=300)


def few(cases, count):
    """Return a test's cases, of which but the first ones are slow."""
    return [pytest.param(case, marks=[pytest.mark.slow] * (i >= count)) for i, case in enumerate(cases)]


def restore_swiglu():
    """Give mlx-lm's model files their own swiglu back: trainable_parameters puts another there, for the process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and hasattr(module, "swiglu"):
            module.swiglu = SWIGLU


@pytest.fixture
def compiled():
    """Let mx.compile compile during a test; elsewhere it does nothing on a CPU, as in the trainers."""
    mx.enable_compile()
    yield
    if not HAS_GPU:
        mx.disable_compile()


@pytest.fixture(autouse=True)
def plain_models():
    """Leave the model files to the next test as mlx-lm wrote them."""
    yield
    restore_swiglu()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny random llama on disk."""
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """Thirty preference rows in a file."""
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_rows(30))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pytest --slow runs it"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: what pytest --slow runs")
    if not HAS_GPU:
        mx.disable_compile()  # each shape would call a C++ compiler
