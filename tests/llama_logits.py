"""Write llama.cpp's logits to a file, in a process of its own: where llama.cpp crashes, one test fails and no more.

python tests/llama_logits.py logits.npz '[1, 2, 3]' base=base.gguf both=base.gguf+lora.gguf     a name for each
"""

import ctypes
import json
import sys

import llama_cpp as lib
import numpy as np


def fill(batch, ids):
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    return batch


def logits_of(path, lora, ids):
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
    target, ids, *asked = sys.argv[1:]
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    files = {name: words.split("+") for name, words in (word.split("=") for word in asked)}
    np.savez(target, **{name: logits_of(*(paths + [None])[:2], json.loads(ids)) for name, paths in files.items()})


if __name__ == "__main__":
    main()
