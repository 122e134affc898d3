"""Exported adapters, asked through llama.cpp and PEFT: the logits are those of mlx-lm with the adapter."""

import ctypes
import io
import json
import os
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, run_script, save_model
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import export_ollama

IDS = [3, 41, 7, 250, 12, 99, 180, 5, 301, 17, 64, 2]
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GEMMA = dict(query_pre_attn_scalar=8)
# model_type: what its configuration needs beyond conftest's
FAMILIES = {
    "llama": dict(tie_word_embeddings=False),
    "mistral": {},
    "mixtral": dict(tie_word_embeddings=False),
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": dict(**EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": dict(**EXPERTS, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True),
    "gemma": {},
    "gemma2": GEMMA,
    "gemma3_text": dict(**GEMMA, rope_theta=1e6),
    "phi3": {},
    "granite": dict(
        logits_scaling=2.0, attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_bias=False, mlp_bias=False,
    ),
    "smollm3": dict(num_hidden_layers=4),
    "olmo2": dict(tie_word_embeddings=False),
    "starcoder2": {},
}  # fmt: skip
NAMES = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
NAMES |= {"gemma3_text": "gemma3"}
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")
GELU = ("gemma", "gemma2", "gemma3_text", "starcoder2")  # ggml looks gelu up in a table of halves
# in a GGUF's metadata, after the architecture's name: in config.json
INTEGERS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "rope.dimension_count": "head_dim", "vocab_size": "vocab_size",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_used_count": "num_experts_per_tok",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.sliding_window": "sliding_window", "attention.sliding_window_pattern": "sliding_window_pattern",
}  # fmt: skip
FLOATS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "logit_scale": "logits_scaling", "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- models and adapters


def tiny_model(folder, family="llama", **extra):
    """Write a tiny random model of a family as it comes from its authors; return its folder."""
    save_model(folder, "llama" if family == "mistral" else family, **{**FAMILIES[family], **extra})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": family}))
    if family.startswith("gemma"):
        weights = mx.load(str(folder / "model.safetensors"))
        weights.pop("lm_head.weight", None)  # a head that mlx-lm's class has until it reads weights without one
        weights = {name: 0.2 * mx.random.normal(w.shape) - 0.5 if "norm" in name else w for name, w in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def save_adapter(folder, model_folder, kind="lora", keys=None, num_layers=-1, rank=4, scale=10.0, size=0.05):
    """Write a random adapter as the trainers do; return its folder."""
    model, _ = mlx_lm.load(str(model_folder))
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    num_layers = len(model.layers) if num_layers < 0 else num_layers
    model.freeze()
    if kind == "full":
        model.unfreeze()
    else:
        linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    mx.random.seed(5)
    noise = lambda w: (w if kind != "lora" else 0) + size * mx.random.normal(w.shape)
    weights = {name: noise(w) for name, w in tree_flatten(model.trainable_parameters())}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "model": str(model_folder)}))
    return folder


def mlx_logits(model, adapter=None, ids=IDS):
    model, _ = mlx_lm.load(str(model), adapter_path=adapter and str(adapter))
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


# ----------------------------------------------------------------------------------------------------------- base GGUF


@pytest.fixture(scope="session")
def gguf():
    return pytest.importorskip("gguf", reason="pip install gguf")


@pytest.fixture(scope="session")
def engine():
    """llama.cpp, without its log."""
    lib = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    yield lib
    assert silent


def permute(w, heads):
    """Return the rows of q or k in the order that llama.cpp's rotation wants."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_name(gguf, arch, module, layers):
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    module = module.replace("switch_mlp", "experts")
    if "block_sparse_moe.experts" in module:
        for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            module = module.replace(ours, theirs)
    return gguf.get_tensor_name_map(number, layers).get_name(module)


def convert(name, w, config):
    """Return a weight as llama.cpp wants it."""
    kind = config["model_type"]
    if kind in PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight")):
        return permute(w, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
    if kind.startswith("gemma") and "norm" in name:
        return w + 1
    return w.reshape(-1) if name.endswith("shared_expert_gate.weight") else w


def add_metadata(writer, config, folder):
    arch, kind = writer.arch, config["model_type"]
    config = {**config, "sliding_window": config.get("sliding_window", 0 if kind == "phi3" else None)}
    for names, add in ((INTEGERS, writer.add_uint32), (FLOATS, writer.add_float32)):
        for key, name in names.items():
            if config.get(name) is not None:
                add(f"{arch}.{key}", config[name])
    if experts := config.get("num_local_experts", config.get("num_experts")):
        writer.add_expert_count(experts)
    if kind == "gemma3_text":
        writer.add_float32(f"{arch}.rope.freq_base_swa", 1e4)
    core = json.loads((folder / "tokenizer.json").read_text())["model"]
    known = {i: token for token, i in core["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([known.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_eos_token_id(4)
    writer.add_chat_template("{{ messages[0].content }}")


def write_base(gguf, path, folder, kind="F32", stored=(), more=None):
    """Write a model folder as a GGUF with its matrices as kind; stored: {name: (bytes, kind)} as they are."""
    config = json.loads((folder / "config.json").read_text())
    arch, stored = NAMES.get(config["model_type"], config["model_type"]), dict(stored)
    writer, kind = gguf.GGUFWriter(path, arch), gguf.GGMLQuantizationType[kind]
    add_metadata(writer, config, folder)
    if more:
        more(writer)
    for name, w in mx.load(str(folder / "model.safetensors")).items():
        w = convert(name, np.array(w.astype(mx.float32)), config)
        module, _, leaf = name.rpartition(".")
        name = f"{gguf_name(gguf, arch, module, config['num_hidden_layers'])}.{leaf}"
        data, of = stored.get(name) or (w, kind if w.ndim > 1 and "gate_inp" not in name else 0)
        of = gguf.GGMLQuantizationType(of)
        writer.add_tensor(name, data if name in stored else gguf.quantize(data, of), raw_dtype=of)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def fill(batch, ids):
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    return batch


def add_lora(lib, model, context, path):
    adapter = lib.llama_adapter_lora_init(model, str(path).encode())
    assert adapter, "llama.cpp refuses the LoRA"
    lib.llama_set_adapters_lora(context, (lib.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1))


def llama_logits(lib, path, lora=None, ids=IDS):
    """Return llama.cpp's logits after each of ids, on the CPU with a float32 cache."""
    options, context_options = lib.llama_model_default_params(), lib.llama_context_default_params()
    options.n_gpu_layers, context_options.flash_attn_type = 0, 0
    context_options.type_k = context_options.type_v = 0
    context_options.n_ctx = context_options.n_batch = 256
    context_options.n_threads = context_options.n_threads_batch = 2
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    assert model, "llama.cpp refuses the model"
    context = lib.llama_init_from_model(model, context_options)
    if lora:
        add_lora(lib, model, context, lora)
    batch = fill(lib.llama_batch_init(len(ids), 0, 1), ids)
    assert lib.llama_decode(context, batch) == 0
    count = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    row = lambda i: np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (count,)).copy()
    logits = np.stack([row(i) for i in range(len(ids))])
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return logits


def gap(one, other):
    return float(np.abs(one - other).max())


# ----------------------------------------------------------------------------------------------------------- exporting


def export(*words):
    """Run the exporter in this process; return its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with mock.patch.object(sys, "argv", ["export_ollama.py", *map(str, words)]):
        with redirect_stdout(out), redirect_stderr(err):
            try:
                export_ollama.main()
            except SystemExit as end:
                code, said = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
                err.write(said and said + "\n")
    return code, out.getvalue(), err.getvalue()


def exported(*words):
    code, out, err = export(*words)
    assert code == 0, err
    return out


def refused(folder, *words, says=()):
    """Check that the exporter ends with one line that has all of says, and that folder is as it was."""
    before = sorted(folder.rglob("*"))
    code, _, err = export(*words)
    assert code == 1 and len(err.strip().splitlines()) == 1, err
    assert sorted(folder.rglob("*")) == before
    for part in says:
        assert part in err, err
    return err


class Setup:
    """A model folder, its adapter and its base GGUF."""

    def __init__(self, folder, gguf=None, family="llama", kind="F32", keys=None, **extra):
        self.folder, self.family = folder, family
        self.model = tiny_model(folder / "model", family, **extra)
        self.adapter = save_adapter(folder / "adapter", self.model, keys=keys)
        self.base = gguf and write_base(gguf, folder / "base.gguf", self.model, kind)
        self.words = "--adapter-path", self.adapter
        self.limit = 5e-3 if family in GELU else 1e-4

    def merge(self, out="out"):
        exported(*self.words, "--gguf", self.base, "--out", self.folder / out)
        return self.folder / out / "model.gguf"

    def lora(self):
        exported(*self.words, "--lora-gguf", self.folder / "lora.gguf")
        return self.folder / "lora.gguf"


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, gguf, engine, tmp_path_factory):
    return Setup(tmp_path_factory.mktemp(request.param), gguf, request.param)


def test_the_base_is_right(setup, engine):
    """Of the writer in this file: what is measured next means nothing otherwise."""
    error = gap(llama_logits(engine, setup.base), mlx_logits(setup.model))
    print(f"{setup.family}: base {error:.1e}")
    assert error <= setup.limit


def test_merged_is_model_with_adapter(setup, engine):
    want = mlx_logits(setup.model, setup.adapter)
    effect, error = gap(want, mlx_logits(setup.model)), gap(llama_logits(engine, setup.merge()), want)
    print(f"{setup.family}: merged {error:.1e} of an effect of {effect:.1f}")
    assert error <= setup.limit < effect / 20


def test_lora_gguf_is_model_with_adapter(setup, engine):
    error = gap(llama_logits(engine, setup.base, setup.lora()), mlx_logits(setup.model, setup.adapter))
    print(f"{setup.family}: lora {error:.1e}")
    assert error <= setup.limit


def test_subprocess_and_some_layers(gguf, engine, tmp_path):
    """As a person runs it, with an adapter on the last layer's q and down_proj only."""
    model = tiny_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", model, keys=["self_attn.q_proj", "mlp.down_proj"], num_layers=1)
    base, out = write_base(gguf, tmp_path / "base.gguf", model), tmp_path / "sub" / "out"
    words = "--adapter-path", adapter, "--gguf", base, "--out", out, "--lora-gguf", tmp_path / "lora.gguf"
    done = run_script(*words, script="export_ollama.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 tensors changed" in done.stdout and "ollama create" in done.stdout
    assert (out / "Modelfile").read_text().split("\n")[0] == "FROM ./model.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
    assert out.stat().st_mode == out.parent.stat().st_mode  # as readable as any new folder
    want = mlx_logits(model, adapter)
    assert gap(llama_logits(engine, out / "model.gguf"), want) <= 1e-4
    assert gap(llama_logits(engine, base, tmp_path / "lora.gguf"), want) <= 1e-4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The bundled model, an adapter that dpo_trainer.py made in 8 updates, and a real prompt."""
    folder, model = tmp_path_factory.mktemp("trained"), ROOT / "data" / "tiny-chat"
    rows = (ROOT / "data" / "pairs.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "pairs.jsonl").write_text("".join(rows))
    words = "--model", model, "--data", folder / "pairs.jsonl", "--adapter-path", folder / "adapter"
    done = run_script(*words, "--iters", 8, "--batch-size", 2, "--learning-rate", 1e-3)
    assert done.returncode == 0, done.stderr
    _, tokenizer = mlx_lm.load(str(model))
    turns = [{"role": "user", "content": "When does the bakery open?"}]
    return folder, model, folder / "adapter", list(tokenizer.apply_chat_template(turns, add_generation_prompt=True))


@pytest.fixture(params=["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def answers(request, gguf, engine, trained):
    """(type, base's GGUF, merged GGUF, {what was asked: logits}) of the trained adapter on a base of each type."""
    folder, model, adapter, ids = trained
    base, out = write_base(gguf, folder / "base.gguf", model, request.param), folder / request.param
    lora, merged = out.with_suffix(".lora.gguf"), out / "model.gguf"
    exported("--adapter-path", adapter, "--gguf", base, "--out", out, "--lora-gguf", lora)
    asked = {"mlx": mlx_logits(model, None, ids), "mlx with adapter": mlx_logits(model, adapter, ids)}
    asked |= {"base": llama_logits(engine, base, None, ids), "base with lora": llama_logits(engine, base, lora, ids)}
    return request.param, base, merged, {**asked, "merged": llama_logits(engine, merged, None, ids)}


def test_a_trained_adapter_on_every_type(answers, gguf):
    """What is merged is as exact as its base and as base and LoRA: rounding has not taken the adapter away again."""
    kind, base, merged, asked = answers
    rms = lambda one, other: float(np.sqrt(np.mean((asked[one] - asked[other]) ** 2)))
    was, now, kept = rms("base", "mlx"), rms("merged", "mlx with adapter"), rms("merged", "base with lora")
    effect = rms("mlx", "mlx with adapter")
    print(f"{kind}: rms error of base {was:.1e}, merged {now:.1e}, to base with lora {kept:.1e}; {effect:.2f}")
    if kind == "F32":
        assert max(gap(asked["merged"], asked["mlx with adapter"]), gap(asked["base"], asked["mlx"])) <= 1e-4
        assert gap(asked["base with lora"], asked["mlx with adapter"]) <= 1e-4
    assert effect > 0.2 and now <= 1.5 * was and kept <= 0.15 * effect
    kinds = [{t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors} for path in (base, merged)]
    assert all(kinds[1][name] in (of, "Q8_0") for name, of in kinds[0].items())
    assert kinds[0] == kinds[1] or kind[:2] in ("Q4", "Q5")


def k_quants(gguf, count, columns):
    """Return the bytes of random rows as Q4_K: 256 numbers are two halves, 12 bytes of scales, 128 of quarters."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, columns // 256, 144), np.uint8)
    halves = np.array([0.001, 0.005], np.float16)
    blocks[..., :4] = halves.view(np.uint8)
    return blocks.reshape(count, -1)


def test_k_quants_become_q8_0(gguf, engine, tmp_path):
    """Where the adapter is; the others stay, byte for byte."""
    model, kind = tiny_model(tmp_path / "model", intermediate_size=256), gguf.GGMLQuantizationType.Q4_K
    weights, stored, rows = mx.load(str(model / "model.safetensors")), {}, k_quants(gguf, 32, 256)
    for i in range(2):
        stored[f"blk.{i}.ffn_down.weight"] = rows, kind
        weights[f"model.layers.{i}.mlp.down_proj.weight"] = mx.array(gguf.dequantize(rows, kind))
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    adapter = save_adapter(tmp_path / "adapter", model, num_layers=1)
    base = write_base(gguf, tmp_path / "base.gguf", model, stored=stored)
    out = exported("--adapter-path", adapter, "--gguf", base, "--out", tmp_path / "out")
    assert re.search(r"\b1 [^;]*\bQ8_0", out), out
    path = tmp_path / "out" / "model.gguf"
    first, second = (t for t in gguf.GGUFReader(path).tensors if "ffn_down" in t.name)
    assert first.tensor_type == kind and (first.data == rows).all() and second.tensor_type.name == "Q8_0"
    a, b = (mx.load(str(adapter / "adapters.safetensors"))[f"model.layers.1.mlp.down_proj.lora_{x}"] for x in "ab")
    want = np.array(weights["model.layers.1.mlp.down_proj.weight"] + 10 * (a @ b).T)
    step = np.abs(want.reshape(32, -1, 32)).max(-1, keepdims=True) / 127
    error = np.abs(gguf.dequantize(second.data, second.tensor_type) - want).reshape(32, -1, 32)
    assert (error <= 0.57 * step).all()  # 0.5, and the step is kept in 16 bits
    want = mlx_logits(model, adapter)
    error, was = (gap(llama_logits(engine, x), mlx_logits(model, y)) for x, y in ((path, adapter), (base, None)))
    print(f"Q4_K: base {was:.1e}, merged {error:.1e} of an effect of {gap(want, mlx_logits(model)):.1f}")
    assert error <= max(2 * was, 0.05)


def add_odd_keys(writer):
    writer.add_custom_alignment(64)
    writer.add_array("odd.strings", ["é", "", "日本"])
    writer.add_array("odd.numbers", [1.5, -2.0])
    writer.add_bool("odd.bool", True)
    writer.add_int8("odd.int8", -3)
    writer.add_uint64("odd.uint64", 2**40)
    writer.add_float64("odd.float64", 0.1)


def test_the_rest_of_the_base_is_kept(gguf, engine, tmp_path):
    """Every key, with its type, and every tensor that is not adapted; also where tensors are aligned otherwise."""
    model = tiny_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", model, keys=["self_attn.v_proj"])
    base = write_base(gguf, tmp_path / "base.gguf", model, more=add_odd_keys)
    exported("--adapter-path", adapter, "--gguf", base, "--out", tmp_path / "out")
    was, now = (gguf.GGUFReader(path) for path in (base, tmp_path / "out" / "model.gguf"))
    fields = [{f.name: (f.types, f.contents()) for f in x.fields.values() if f.name[:5] != "GGUF."} for x in (was, now)]
    assert fields[0] == fields[1]
    assert [t.name for t in was.tensors] == [t.name for t in now.tensors]
    for one, other in zip(was.tensors, now.tensors):
        assert (one.data.tobytes() == other.data.tobytes()) != ("attn_v" in one.name), one.name
    assert gap(llama_logits(engine, tmp_path / "out" / "model.gguf"), mlx_logits(model, adapter)) <= 1e-4


def test_an_empty_list_in_the_base(gguf, engine, tmp_path):
    """llama.cpp's own programs write such keys; the Python package can not."""
    setup = Setup(tmp_path, gguf)
    data = setup.base.read_bytes()
    count = int.from_bytes(data[16:24], "little") + 1
    parts = [(8, 8), b"odd.none", (9, 4), (8, 4), (0, 8)]  # 32 bytes: what follows stays aligned
    key = b"".join(x if isinstance(x, bytes) else x[0].to_bytes(x[1], "little") for x in parts)
    setup.base.write_bytes(data[:16] + count.to_bytes(8, "little") + key + data[24:])
    assert gap(llama_logits(engine, setup.merge()), mlx_logits(setup.model, setup.adapter)) <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_adapted_embedding_and_head(gguf, engine, tied, tmp_path):
    keys = ["model.embed_tokens", "self_attn.k_proj"] + ["lm_head"] * (not tied)
    setup = Setup(tmp_path, gguf, keys=keys, tie_word_embeddings=tied)
    want = mlx_logits(setup.model, setup.adapter)
    error = gap(llama_logits(engine, setup.merge()), want)
    print(f"embedding, {'tied' if tied else 'head'}: merged {error:.1e}")
    assert error <= 1e-4 < gap(want, mlx_logits(setup.model)) / 100
    if tied:
        refused(tmp_path, *setup.words, "--lora-gguf", tmp_path / "lora.gguf", says=["tied"])
    else:
        error = gap(llama_logits(engine, setup.base, setup.lora()), want)
        print(f"embedding, head: lora {error:.1e}")
        assert error <= 1e-4


def test_tied_where_the_configuration_does_not_say(gguf, tmp_path):
    """mlx-lm takes a llama without tie_word_embeddings as tied; llama.cpp would end on such a LoRA."""
    setup = Setup(tmp_path, gguf, keys=["model.embed_tokens"])
    model = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    config = json.loads((model / "config.json").read_text())
    del config["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    refused(tmp_path, *setup.words, "--lora-gguf", tmp_path / "lora.gguf", says=["tied"])


# ---------------------------------------------------------------------------------------------------------------- PEFT


def peft_logits(model, folder):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    peft = pytest.importorskip("peft", reason="pip install peft")
    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor([IDS])).logits[0].numpy()
        adapted = peft.PeftModel.from_pretrained(base, folder).eval()
        return plain, adapted(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize(
    "keys, layers", [(None, 2), (["self_attn.q_proj", "mlp.up_proj"], 1), (["model.embed_tokens", "lm_head"], 2)]
)
def test_peft_loads_it(keys, layers, tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    model = tiny_model(tmp_path / "model", architectures=["LlamaForCausalLM"], hidden_act="silu", attention_bias=False)
    adapter = save_adapter(tmp_path / "adapter", model, keys=keys, num_layers=layers)
    exported("--adapter-path", adapter, "--peft", tmp_path / "peft")
    plain, adapted = peft_logits(model, tmp_path / "peft")
    want, was = mlx_logits(model, adapter), mlx_logits(model)
    print(f"peft: base {gap(plain, was):.1e}, adapted {gap(adapted, want):.1e} of an effect of {gap(want, was):.1f}")
    assert gap(plain, was) <= 1e-4 and gap(adapted, want) <= 1e-4 < gap(want, was) / 100


# ---------------------------------------------------------------------------------------------------------------- fuse

FUSED = {
    "dora": ("llama", "dora", {}),
    "4-bit": ("mixtral", "lora", dict(bits=4)),
    "full": ("qwen3_moe", "full", {}),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_is_model_with_adapter(name, tmp_path):
    family, kind, extra = FUSED[name]
    model, out = tiny_model(tmp_path / "model", family, **extra), tmp_path / "out"
    adapter = save_adapter(tmp_path / "adapter", model, kind)
    said = exported("--adapter-path", adapter, "--fuse", "--out", out)
    assert "convert_hf_to_gguf.py" in said and "ollama create" in said
    want = mlx_logits(model, adapter)
    error, effect = gap(mlx_logits(out), want), gap(want, mlx_logits(model))
    print(f"fused {name}: {error:.1e} of an effect of {effect:.1f}")
    assert error <= 1e-4 < effect / 100
    for path in model.glob("*token*"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert "quantization" not in json.loads((out / "config.json").read_text())
    names = {name for path in out.glob("*.safetensors") for name in mx.load(str(path))}
    assert not any("switch_mlp" in name for name in names)
    one = {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.3.down_proj"}
    assert f"model.layers.1.{one.get(family, 'mlp.down_proj')}.weight" in names


def test_fuse_that_fails_leaves_nothing(tmp_path):
    setup = Setup(tmp_path)

    def half():
        folder = Path(sys.argv[sys.argv.index("--save-path") + 1])
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("[write] Unable to write")

    with mock.patch("mlx_lm.fuse.main", half):
        refused(tmp_path, *setup.words, "--fuse", "--out", tmp_path / "out", says=["fuse"])


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def plain(gguf, tmp_path_factory):
    return Setup(tmp_path_factory.mktemp("plain"), gguf)


def forms(setup):
    """Return the three forms of a LoRA, as words."""
    out = setup.folder / "out"
    return ("--gguf", setup.base, "--out", out), ("--lora-gguf", out), ("--peft", out)


def test_unknown_architectures_are_refused(gguf, tmp_path):
    setup = Setup(tmp_path, gguf)
    path = setup.model / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"cohere"'))
    for words in forms(setup)[:2]:
        refused(tmp_path, *setup.words, *words, says=["cohere", "llama"])


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_what_is_no_lora_is_refused(gguf, kind, tmp_path):
    setup = Setup(tmp_path, gguf)
    shutil.rmtree(setup.adapter)
    save_adapter(setup.adapter, setup.model, kind)
    for words in forms(setup):
        refused(tmp_path, *setup.words, *words, says=[kind, "--fuse"])


def test_another_models_gguf_is_refused(gguf, tmp_path):
    setup = Setup(tmp_path, gguf)
    other = write_base(gguf, tmp_path / "other.gguf", tiny_model(tmp_path / "other", intermediate_size=96))
    said = refused(tmp_path, *setup.words, "--gguf", other, "--out", tmp_path / "out", says=["(96, 32)", "(64, 32)"])
    assert len(set(re.findall(r"blk\.\d\.\w+\.weight", said))) == 3
    other = write_base(gguf, tmp_path / "other.gguf", tiny_model(tmp_path / "other", "qwen2"))
    refused(tmp_path, *setup.words, "--gguf", other, "--out", tmp_path / "out", says=["qwen2", "llama"])


def test_a_part_of_a_gguf_is_refused(gguf, tmp_path):
    """llama.cpp would look for the other parts beside model.gguf, in vain."""
    setup = Setup(tmp_path, gguf)
    part = write_base(gguf, tmp_path / "part.gguf", setup.model, more=lambda x: x.add_uint16("split.count", 2))
    refused(tmp_path, *setup.words, "--gguf", part, "--out", tmp_path / "out", says=["part.gguf"])


def test_what_is_no_gguf_is_refused(plain, tmp_path):
    (tmp_path / "text.gguf").write_text("not a GGUF" * 9)
    for name in ("text.gguf", "nowhere.gguf"):
        refused(tmp_path, *plain.words, "--gguf", tmp_path / name, "--out", tmp_path / "out", says=[name])


def test_a_full_disk_is_seen_first(plain):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        refused(plain.folder, *plain.words, *forms(plain)[0], says=["GB"])


def test_without_the_gguf_package(tmp_path):
    """It is named; what needs it not goes without."""
    setup = Setup(tmp_path)
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with mock.patch.dict(sys.modules, {"gguf": None}):
        for words in (("--gguf", tmp_path / "base.gguf"), ("--lora-gguf", tmp_path / "lora.gguf")):
            refused(tmp_path, *setup.words, *words, "--out", tmp_path / "out", says=["pip install gguf"])
        exported(*setup.words, "--peft", tmp_path / "peft")


def test_an_out_that_exists_is_left_alone(plain, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for way in (("--gguf", plain.base), ("--fuse",)):
        refused(tmp_path, *plain.words, *way, "--out", tmp_path / "out", says=["out"])


def test_stacked_experts_have_no_peft_form(tmp_path):
    setup = Setup(tmp_path, family="mixtral")
    refused(tmp_path, *setup.words, "--peft", tmp_path / "peft", says=["experts"])


def test_no_adapter_and_no_way(tmp_path):
    setup = Setup(tmp_path)
    refused(tmp_path, "--adapter-path", tmp_path / "nowhere", "--fuse", "--out", tmp_path / "out", says=["nowhere"])
    refused(tmp_path, *setup.words, "--out", tmp_path / "out", says=["--gguf"])
    refused(tmp_path, *setup.words, "--fuse", "--gguf", "x", "--out", tmp_path / "out", says=["--fuse"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("out"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["quantize", "GGUFWriter.write_tensor_data"])
def test_whole_or_not_at_all(plain, gguf, place, error):
    """What fails at the third tensor leaves nothing behind."""
    owner, _, name = place.rpartition(".")
    owner = getattr(gguf, owner) if owner else gguf
    real, calls = getattr(owner, name), []

    def third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*args, **kwargs)

    before = sorted(plain.folder.rglob("*"))
    with mock.patch.object(owner, name, third):
        try:
            code, _, said = export(*plain.words, *forms(plain)[0])
            assert code and len(said.strip().splitlines()) == 1
        except KeyboardInterrupt:
            pass
    assert len(calls) >= 3 and sorted(plain.folder.rglob("*")) == before


# -------------------------------------------------------------------------------------------------------------- ollama

KEPT = '''TEMPLATE """{{ if .Tools }}
# Tools

FROM here on, call them.
{{ end }}{{ .Prompt }}"""
SYSTEM You are a harbour guide.
PARAMETER stop <|im_end|>
PARAMETER temperature 0.5
LICENSE """# LICENSE AGREEMENT
FROM the first day on.
"""'''
SHOWN = f"""# Modelfile generated by "ollama show"
# To build a new Modelfile based on this, replace FROM with:
# FROM harbour:latest

FROM BLOB
{KEPT}
"""


def fake_ollama(folder, shown, code=0):
    """Put a program `ollama` in a folder; return an environment in which it is the only one."""
    folder.mkdir()
    (folder / "shown").write_text(shown)
    said = f"cat '{folder}/shown'" if not code else "echo 'Error: model not found' >&2"
    (folder / "ollama").write_text(f'#!/bin/sh\n[ "$*" = "show --modelfile harbour" ] || exit 3\n{said}\nexit {code}\n')
    (folder / "ollama").chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"}


def from_ollama(setup, env):
    with mock.patch.dict(os.environ, env):
        return export(*setup.words, "--ollama", "harbour", "--out", setup.folder / "out")


def test_ollamas_template_and_parameters_are_kept(gguf, tmp_path):
    setup = Setup(tmp_path, gguf)
    blob = setup.base.rename(tmp_path / "sha256-0123")
    code, out, err = from_ollama(setup, fake_ollama(tmp_path / "bin", SHOWN.replace("BLOB", str(blob))))
    assert code == 0, err
    assert (tmp_path / "out" / "Modelfile").read_text().strip() == f"FROM ./model.gguf\n{KEPT}"
    write_base(gguf, tmp_path / "base.gguf", setup.model)
    assert (tmp_path / "out" / "model.gguf").read_bytes() == setup.merge("again").read_bytes()


@pytest.mark.parametrize("problem", ["not installed", "not pulled", "no file"])
def test_without_ollama(plain, problem, tmp_path):
    code, path = (1 if problem == "not pulled" else 0), tmp_path / "gone"
    env = fake_ollama(tmp_path / "bin", SHOWN.replace("BLOB", str(path)), code)
    if problem == "not installed":
        (tmp_path / "bin" / "ollama").unlink()
        env["PATH"] = str(tmp_path / "bin")
    before = sorted(plain.folder.rglob("*"))
    code, _, err = from_ollama(plain, env)
    assert code == 1 and len(err.strip().splitlines()) == 1 and "harbour" in err and "Traceback" not in err
    assert sorted(plain.folder.rglob("*")) == before
