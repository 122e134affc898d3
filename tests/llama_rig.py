"""A model's folder as a GGUF, and llama.cpp's logits of GGUFs: the rig that exported adapters are measured with.

    python tests/llama_rig.py logits.npz '[1, 2, 3]' base=base.gguf lora=base.gguf+lora.gguf

writes the logits after each token, a name each. That is a process of its own: where llama.cpp crashes, one test fails.
"""

import ctypes
import json
import sys

import mlx.core as mx
import numpy as np

NAMES = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
NAMES |= {"gemma3_text": "gemma3"}
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")
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


def gguf_name(gguf, arch, module, layers):
    module = module.replace("switch_mlp", "experts")
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        module = module.replace(f"block_sparse_moe.experts.{ours}", f"block_sparse_moe.experts.{theirs}")
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers).get_name(module)


def convert(name, w, config):
    """Return a weight as llama.cpp wants it; its rotation wants the rows of q and k in another order."""
    kind = config["model_type"]
    if kind in PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    if kind.startswith("gemma") and "norm" in name:
        return w + 1
    return w.reshape(-1) if name.endswith("shared_expert_gate.weight") else w


def add_metadata(writer, config):
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
    writer.add_tokenizer_model("no_vocab")


def write_base(gguf, path, folder, kind="F32", stored=(), more=None):
    """Write a model folder as a GGUF with its matrices as kind; stored: {name: (bytes, kind)} as they are."""
    config = json.loads((folder / "config.json").read_text())
    arch, stored = NAMES.get(config["model_type"], config["model_type"]), dict(stored)
    writer, kind = gguf.GGUFWriter(path, arch), gguf.GGMLQuantizationType[kind]
    add_metadata(writer, config)
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


def logits_of(lib, path, lora, ids):
    """Return llama.cpp's logits (T, V) after each of ids, on the CPU with a float32 cache."""
    options, context_options = lib.llama_model_default_params(), lib.llama_context_default_params()
    options.n_gpu_layers, context_options.flash_attn_type = 0, 0
    context_options.type_k = context_options.type_v = 0
    context_options.n_ctx = context_options.n_batch = 256
    context_options.n_threads = context_options.n_threads_batch = 2
    model = lib.llama_model_load_from_file(path.encode(), options)
    assert model, f"llama.cpp refuses {path}"
    context = lib.llama_init_from_model(model, context_options)
    if lora:
        adapter = lib.llama_adapter_lora_init(model, lora.encode())
        assert adapter, f"llama.cpp refuses {lora}"
        pointers = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        lib.llama_set_adapters_lora(context, pointers, 1, (ctypes.c_float * 1)(1))
    assert lib.llama_decode(context, fill(lib.llama_batch_init(len(ids), 0, 1), ids)) == 0
    count = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (count,)).copy() for i in range(len(ids))]
    lib.llama_free(context)
    lib.llama_model_free(model)
    return np.stack(rows)


def main():
    import llama_cpp as lib

    target, ids, *asked = sys.argv[1:]
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    files = {name: words.split("+") for name, words in (word.split("=") for word in asked)}
    np.savez(target, **{name: logits_of(lib, *(paths + [None])[:2], json.loads(ids)) for name, paths in files.items()})


if __name__ == "__main__":
    main()
