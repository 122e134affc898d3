# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Export an adapter as a model for Ollama, llama.cpp and LM Studio, or as a LoRA for llama.cpp and PEFT.

    python export_ollama.py --adapter-path adapters --gguf base.gguf --out my-model      merged model.gguf and Modelfile
    ollama create my-model -f my-model/Modelfile
    python export_ollama.py --adapter-path adapters --ollama llama3.2:1b --out my-model  the base out of Ollama's store
    python export_ollama.py --adapter-path adapters --fuse --out my-model                for llama.cpp's own converter

Input: what the trainers and mlx_lm.lora write, and the same base model as a GGUF (pip install gguf).
W + scale * B A is written in the base's own type, or as Q8_0 where that has fewer bits: rounding to 4 bits takes away
most of what a small update adds. What no adapter touches stays as it is.
Another architecture is a line in ARCHITECTURES, once its logits were compared with llama.cpp's: names and the order of
rows differ from one to the next.
"""

import argparse
import importlib.util
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_config
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- options

BAR = {"leave": False, "disable": None}  # for tqdm: no bars in a log file
# model_type: the architecture's name in a GGUF, and whether llama.cpp has the rows of q and k in another order
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), ("llama", True)),
    **{name: (name, True) for name in ("granite", "smollm3")},
    **{name: (name, False) for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "starcoder2")},
    **{"qwen2_moe": ("qwen2moe", False), "qwen3_moe": ("qwen3moe", False), "gemma3_text": ("gemma3", False)},
}
KEPT = ("F32", "F16", "BF16", "Q8_0")  # types of changed tensors; in coarser ones rounding would undo the adapter


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


def parse_args(words):
    """Return the options in words (as sys.argv[1:]); exit with one line if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = partial(need, False)
    add = parser.add_argument
    add("--adapter-path", default="adapters", help="folder of the adapter (default: %(default)s)")
    add("--model", help="what it was trained on: folder or Hugging Face name (default: as adapter_config.json says)")
    add("--gguf", help="the same model as a GGUF file, to be merged with")
    add("--ollama", metavar="NAME", help="the same model in Ollama: its GGUF, template and parameters are taken")
    add("--out", default="my-model", help="folder for model.gguf and Modelfile, or with --fuse (default: %(default)s)")
    add("--fuse", action="store_true", help="write the merged model for llama.cpp's converter (DoRA, full, QLoRA)")
    add("--lora-gguf", metavar="FILE", help="write the adapter alone, for llama.cpp's --lora and LM Studio")
    add("--peft", metavar="DIR", help="write the adapter alone, for PEFT (transformers, vLLM)")
    with blame(Path(__file__).name, "--help lists all options"):
        args = parser.parse_args(words)
        ways = [bool(x) for x in (args.gguf, args.ollama, args.fuse)]
        need(sum(ways) <= 1, "--gguf, --ollama and --fuse are three ways: choose one")
        need(any(ways) or args.lora_gguf or args.peft, "name the base with --gguf or --ollama, or give --fuse")
    for path in filter(None, (any(ways) and args.out, args.lora_gguf, args.peft)):
        with blame(path, "choose another place"):
            need(not Path(path).exists(), "it is there already")
    with blame(args.adapter_path, "name a folder with adapters.safetensors and adapter_config.json"):
        args.config = json.loads(Path(args.adapter_path, "adapter_config.json").read_text())
        args.weights = mx.load(str(Path(args.adapter_path, "adapters.safetensors")))
        args.model = args.model or args.config.get("model")
        need(args.model, "it does not say its model: --model")
    args.kind = args.config.get("fine_tune_type", "lora")
    return args


# ---------------------------------------------------------------------------------------------------------- adapter


def read_adapter(args):
    """Return {module: (A (r, in), B (out, r))} of a LoRA in float32, experts stacked in front, and its scale."""
    need(args.kind == "lora", f"{args.kind} is no sum of a matrix and a product: --fuse")
    factors = {}
    for name, w in args.weights.items():
        module, _, part = name.rpartition(".")
        factors.setdefault(module, {})[part] = np.array(w.astype(mx.float32))
    wrong = [module for module, parts in factors.items() if parts.keys() != {"lora_a", "lora_b"}]
    need(not wrong, f"not a LoRA: {', '.join(wrong[:3])}")
    swap = lambda w, module: w if "switch_mlp" in module else w.T  # experts are stored as they are multiplied
    found = {m: (swap(parts["lora_a"], m), swap(parts["lora_b"], m)) for m, parts in factors.items()}
    for module, (a, b) in found.items():
        if module.endswith("embed_tokens"):  # its input is a row's number: (vocabulary, r) (r, hidden)
            found[module] = b.T, a.T
    return found, float(args.config["lora_parameters"]["scale"])


def gguf_factors(args):
    """Return {GGUF tensor's name: (A, B)} with B's rows in llama.cpp's order, scale, architecture's name, config."""
    import gguf

    config = load_config(Path(find_model(args.model)))
    kind = config["model_type"]
    need(kind in ARCHITECTURES, f"{kind} was not compared with llama.cpp: {', '.join(ARCHITECTURES)} were")
    (arch, permuted), (found, scale) = ARCHITECTURES[kind], read_adapter(args)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, heads = gguf.get_tensor_name_map(number, config["num_hidden_layers"]), config["num_attention_heads"]
    tensors = {}
    for module, (a, b) in found.items():
        plain = module.removeprefix("language_model.").replace("switch_mlp", "experts")
        if kind == "mixtral":
            plain = re.sub(r"(gate|up|down)_proj$", lambda m: {"gate": "w1", "up": "w3", "down": "w2"}[m[1]], plain)
        name = names.get_name(plain)
        need(name, f"llama.cpp has no tensor for {module}")
        if permuted and plain.endswith(("q_proj", "k_proj")):
            count = heads if plain.endswith("q_proj") else config.get("num_key_value_heads") or heads
            b = b.reshape(count, 2, -1, b.shape[-1]).swapaxes(1, 2).reshape(b.shape)
        tensors[f"{name}.weight"] = a, b
    return tensors, scale, arch, config


def find_model(name):
    """Return the folder of a model, downloaded if it is none."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"])


# ------------------------------------------------------------------------------------------------------------- gguf


def open_gguf(path):
    with blame(path, "give the GGUF file of the model that the adapter was trained on"):
        import gguf

        return gguf.GGUFReader(path)


def check_base(reader, tensors, arch, path):
    """Raise ValueError where a GGUF is not of the adapter's model; name the first three that differ."""
    parts = reader.fields.get("split.count")
    need(not parts or parts.contents() < 2, "it is one part of several: join them (llama-gguf-split --merge)")
    have = {t.name: (1,) * (len(t.shape) == 1) + tuple(map(int, t.shape[::-1])) for t in reader.tensors}  # out, in
    said = reader.fields["general.architecture"].contents()
    need(said == arch, f"it is a {said} model, the adapter's is {arch}")
    for name, (a, b) in list(tensors.items()):
        if name == "output.weight" and name not in have:  # tied
            tensors["token_embd.weight"] = tensors.pop(name)
    wrong = [
        f"{name} {have.get(name, 'is not there')}, not {(*b.shape[:-1], a.shape[-1])}"
        for name, (a, b) in tensors.items()
        if have.get(name) != (*b.shape[:-1], a.shape[-1])
    ]
    need(not wrong, f"{len(wrong)} tensors differ ({'; '.join(wrong[:3])}): another model, or Ollama's own layout")


class Checked(np.ndarray):
    """An array that the GGUF writer cannot lose: numpy's own tofile is silent where the disk is full."""

    def tofile(self, file):
        file.write(memoryview(np.ascontiguousarray(self)))


def copy_fields(reader, writer):
    import gguf

    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            kind = field.types[0]
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            if of is not None and not len(field.data):
                continue  # an empty list, which cannot be written
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of)


def merged(tensor, a, b, scale, kind):
    """Return a tensor's data plus scale * B A, as kind; a part of its rows at a time, for the memory's sake."""
    import gguf

    shape = tensor.data.shape
    data = tensor.data.reshape(-1, *((1, *shape) if len(shape) == 1 else shape[-2:]))
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    first = gguf.quantize(gguf.dequantize(data[0, :1], tensor.tensor_type).astype(np.float32), kind)
    found = np.empty((*data.shape[:2], first.shape[-1]), first.dtype)
    for out, rows, down, up in zip(found, data, a, b):
        for i in range(0, len(rows), 4096):
            part = gguf.dequantize(rows[i : i + 4096], tensor.tensor_type).astype(np.float32)
            out[i : i + 4096] = gguf.quantize(part + scale * (up[i : i + 4096] @ down), kind)
    return found.reshape(*shape[:-1], -1)


def merge(reader, tensors, scale, arch, target):
    """Write the base with the adapter added to its tensors; return how many became Q8_0."""
    import gguf

    changed, writer = 0, gguf.GGUFWriter(target, arch, endianess=reader.endianess)
    copy_fields(reader, writer)
    kinds = {}
    for t in reader.tensors:
        kinds[t.name] = t.tensor_type
        shape, dtype, size = t.data.shape, t.data.dtype, t.data.nbytes
        if t.name in tensors and t.tensor_type.name not in KEPT:
            kinds[t.name], changed = gguf.GGMLQuantizationType.Q8_0, changed + 1
            dims = tuple(int(n) for n in t.shape)[::-1]
            shape = gguf.quant_shape_to_byte_shape(dims, kinds[t.name])
            dtype, size = np.dtype(np.uint8), int(np.prod(shape))
        writer.add_tensor_info(t.name, shape, dtype, size, kinds[t.name])
    sizes = sum(info.nbytes for shard in writer.tensors for info in shard.values())
    free = shutil.disk_usage(Path(target).parent).free
    need(free > sizes + 2**26, f"{sizes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tqdm(reader.tensors, desc="merging", **BAR):
        data = merged(t, *tensors[t.name], scale, kinds[t.name]) if t.name in tensors else t.data
        writer.write_tensor_data(data.view(Checked), tensor_endianess=reader.endianess)
        reader.data._mmap.madvise(mmap.MADV_DONTNEED)  # what was read of the file is not read again
    writer.close()
    return changed


def write_lora(path, tensors, scale, arch, config):
    """Write the adapter as a GGUF of its own."""
    import gguf

    tied = config.get("tie_word_embeddings", True)  # as mlx-lm takes it
    need(not (tied and "token_embd.weight" in tensors), "llama.cpp takes no LoRA of a tied embedding: merge instead")
    need(len({a.shape[-2] for a, _ in tensors.values()}) == 1, "its layers have several ranks")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * next(iter(tensors.values()))[0].shape[-2])
    for name, (a, b) in tensors.items():
        a, b = (b, a.T) if name == "token_embd.weight" else (a, b)  # rows of it are looked up
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32).view(Checked))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32).view(Checked))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ------------------------------------------------------------------------------------------------------------ others


def to_peft(args):
    """Return the adapter's arrays and its configuration as PEFT reads them."""
    found, scale = read_adapter(args)
    need(not any("switch_mlp" in module for module in found), "PEFT has no form for stacked experts")
    whole = any(module.endswith(("lm_head", "embed_tokens")) for module in found)
    layers = sorted({int(m[1]) for module in found if (m := re.search(r"\.layers\.(\d+)\.", module))})
    arrays = {}
    for module, (a, b) in found.items():
        names = ("lora_A.weight", "lora_B.weight")
        if module.endswith("embed_tokens"):
            names, a, b = ("lora_embedding_A", "lora_embedding_B"), b.T, a.T
        arrays |= {f"base_model.model.{module}.{name}": mx.array(w) for name, w in zip(names, (a, b))}
    rank = args.config["lora_parameters"]["rank"]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0,
        "bias": "none", "use_rslora": False, "base_model_name_or_path": args.model, "inference_mode": True,
        "target_modules": sorted(found if whole else {module.rpartition(".")[2] for module in found}),
        "layers_to_transform": None if whole else layers,
    }  # fmt: skip
    return arrays, config


def fuse(args, folder):
    """Write the merged, dequantized model, its tokenizer as it was, experts one by one, and a Modelfile."""
    import mlx_lm.fuse

    source, sys.argv = find_model(args.model), ["mlx_lm.fuse", "--dequantize", "--model", args.model]  # it reads them
    sys.argv += ["--adapter-path", args.adapter_path, "--save-path", str(folder)]
    with blame("mlx_lm.fuse", f"is {args.adapter_path} an adapter of {args.model}, and is there room?"):
        mlx_lm.fuse.main()
    for path in [*Path(source).glob("*token*"), *Path(source).glob("chat_template*")]:
        shutil.copy(path, folder)  # mlx-lm leaves out some, and names a class that older readers do not know
    for path in folder.glob("*.safetensors"):
        weights = mx.load(str(path))
        if any("switch_mlp" in name for name in weights):
            mx.save_safetensors(str(path), unstack(weights, load_config(folder)["model_type"]), {"format": "mlx"})
            (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "Modelfile").write_text("FROM ./model.gguf\n")


def unstack(weights, kind):
    """Return the weights with each expert as an array of its own, under the names of the original model."""
    single = {}
    for name, w in weights.items():
        if "switch_mlp" not in name:
            single[name] = w
            continue
        base, part = name.split(".switch_mlp.")
        if kind == "mixtral":
            part = part.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2")
        single |= {f"{base}.experts.{i}.{part}": w[i] for i in range(len(w))}
    return single


def ask_ollama(name):
    """Return the GGUF of a model in Ollama's store, and its Modelfile's lines that are to be kept."""
    with blame(f"--ollama {name}", "is Ollama installed, and the model pulled?"):
        shown = subprocess.run(["ollama", "show", "--modelfile", name], capture_output=True, text=True)
        need(shown.returncode == 0, shown.stderr or "ollama show failed")
        blob = re.search(r"^FROM (\S+)$", shown.stdout, re.M)
        need(blob and Path(blob[1]).exists(), "its Modelfile names no file")
        lines = shown.stdout.partition(blob[0])[2].strip()
        need(not re.search(r"^ADAPTER ", lines, re.M), "it has an adapter already: take the model that it was made of")
    return blob[1], lines


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


@contextmanager
def whole(folder):
    """Give a folder to write in, which gets this name when all of it is on the disk; an older one moves aside."""
    with blame(folder, "choose another folder, or make room"):
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        older = next(path for n in range(1, 10**6) if not (path := Path(f"{folder}-{n}")).exists())
        if unfinished.exists():
            print(f"{unfinished} is what a killed run left: it is written anew")
            shutil.rmtree(unfinished)
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            for path in [*unfinished.rglob("*"), unfinished]:
                sync(path)
            if folder.exists():
                folder.rename(older)
            unfinished.rename(folder)
            sync(folder.parent)
        finally:
            if older.exists() and not folder.exists():
                older.rename(folder)
            shutil.rmtree(unfinished, ignore_errors=True)
        if older.exists():
            print(f"The earlier {folder} is now {older}")


def main():
    args = parse_args(sys.argv[1:])
    folder, lines = Path(args.out), ""
    if args.peft:
        with blame(args.adapter_path, "choose another form"):
            arrays, config = to_peft(args)
        with whole(Path(args.peft)) as unfinished:
            mx.save_safetensors(str(unfinished / "adapter_model.safetensors"), arrays, {"format": "pt"})
            (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=1))
        print(f"Written: {args.peft}, for peft.PeftModel.from_pretrained")
    if args.fuse:
        with whole(folder) as unfinished:
            fuse(args, unfinished)
        print(f"Next: python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {folder}/model.gguf")
        print(f"then: ollama create {folder.name} -f {folder}/Modelfile")
    if not (args.gguf or args.ollama or args.lora_gguf):
        return
    with blame("GGUF", "pip install gguf"):
        need(importlib.util.find_spec("gguf"), "the package gguf is not there")
    with blame(args.adapter_path, "see --help for the other forms"):
        tensors, scale, arch, config = gguf_factors(args)
    if args.lora_gguf:
        with blame(args.lora_gguf, "choose another place, or another form: --help"):
            write_atomically(Path(args.lora_gguf), lambda name: write_lora(name, tensors, scale, arch, config))
        print(f"Written: {args.lora_gguf}, for llama.cpp's --lora")
    if args.ollama:
        args.gguf, lines = ask_ollama(args.ollama)
    if not args.gguf:
        return
    reader = open_gguf(args.gguf)
    with blame(args.gguf, "give the GGUF of the model that the adapter was trained on"):
        check_base(reader, tensors, arch, args.gguf)
    with whole(folder) as unfinished:
        changed = merge(reader, tensors, scale, arch, unfinished / "model.gguf")
        (unfinished / "Modelfile").write_text(f"FROM ./model.gguf\n{lines}\n")
    size, was = ((Path(path).stat().st_size / 1e9) for path in (folder / "model.gguf", args.gguf))
    note = f", {changed} of them to Q8_0" if changed else ""
    print(f"Written: {folder}/model.gguf: {len(tensors)} tensors changed{note}, {was:.2f} -> {size:.2f} GB")
    print(f"Next: ollama create {folder.name} -f {folder}/Modelfile")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
