# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "mlx-lm>=0.32.2", "numpy", "tqdm"]
# ///
"""
Export an adapter as a model for Ollama, llama.cpp and LM Studio, or as a LoRA for llama.cpp and PEFT.

    W' = W + scale * B A    for each matrix that the adapter changes, in the base's own type or as Q8_0

    python export_ollama.py --gguf base.gguf --out my-model        adapters/ and the same base model as a GGUF
    ollama create my-model -f my-model/Modelfile
    python export_ollama.py --ollama llama3.2:1b --out my-model    the base out of Ollama's store
    python export_ollama.py --out my-model                         the base that a Modelfile in the model's folder names
    python export_ollama.py --fuse --out my-model                  DoRA, full, QLoRA: for llama.cpp's own converter

Input: what the trainers and mlx_lm.lora write. All but --fuse and --peft need the package gguf (pip install gguf).
Written: model.gguf and Modelfile, all or nothing. What the adapter does not touch stays as it is.
Another architecture: a name in ARCHITECTURES and, after its logits were compared with llama.cpp's, in PERMUTED or not.
"""

import argparse
import json
import re
import shlex
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, check_output

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, hf_repo_to_path, load_config, save_config
from tqdm import tqdm

try:
    import gguf
except ImportError:
    gguf = None

# ---------------------------------------------------------------------------------------------------------- options

# model_type: the architecture's name in a GGUF
ARCHITECTURES = {name: name for name in "llama granite smollm3 qwen2 qwen3 gemma gemma2 phi3 olmo2 starcoder2".split()}
ARCHITECTURES |= {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}
ARCHITECTURES |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
PERMUTED = ("llama", "granite", "smollm3")  # llama.cpp has the rows of their q and k in another order
UNTIED = ("mixtral", "phi3", "qwen2_moe")  # mlx-lm gives them a head of their own where config.json does not say
EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # of block_sparse_moe, as its authors call them
KEPT = ("F32", "F16", "BF16", "Q8_0")  # types of changed tensors; rounding to fewer bits would undo the adapter
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"


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


def parse_args():
    """Return the command line's options; exit with one line if they are wrong, or a place is taken."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.error = lambda problem: need(False, problem)
    add, add_base = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--adapter-path", type=Path, default="adapters", help="folder of the adapter (default: %(default)s)")
    add("--model", help="what it was trained on: folder or Hugging Face name (default: as adapter_config.json says)")
    add_base("--gguf", type=Path, help="the same model as a GGUF (default: as a Modelfile in its folder says)")
    add_base("--ollama", metavar="NAME", help="the same model in Ollama: its GGUF, template and parameters are taken")
    add_base("--fuse", action="store_true", help="write a merged model for llama.cpp's converter (DoRA, full, QLoRA)")
    add("--out", type=Path, default="my-model", help="folder for the merged model (default: %(default)s)")
    add("--lora-gguf", type=Path, metavar="FILE", help="write the adapter alone, for llama.cpp's --lora and LM Studio")
    add("--peft", type=Path, metavar="DIR", help="write the adapter alone, for PEFT (transformers, vLLM)")
    with blame(Path(__file__).name, "--help lists all options"):
        args = parser.parse_args()
        args.merge = bool(args.gguf or args.ollama) or not (args.fuse or args.lora_gguf or args.peft)
        need(gguf or not (args.merge or args.lora_gguf), "the package gguf is missing: pip install gguf")
    return args


# ------------------------------------------------------------------------------------------------------------- input


def find_model(args):
    """Return the model's folder: here, in the adapter's folder, above it, or where training downloaded it to."""
    adapter = args.adapter_path.resolve()
    for place in (Path(), adapter, *adapter.parents):
        if (place / args.model / "config.json").is_file():
            return place / args.model
    with suppress(Exception):  # of many kinds, some with a page of text
        return hf_repo_to_path(args.model)
    raise ValueError(f"no folder {args.model} is here or beside the adapter, nor one from hf download: --model")


def read_factors(args):
    """Return a LoRA's {module: (A (r, in), B (out, r))} in float32, experts stacked in front; its scale; r."""
    kind, settings = args.config.get("fine_tune_type", "lora"), args.config.get("lora_parameters") or {}
    need(kind == "lora", f"{kind} is no sum of a matrix and a product: --fuse")
    scale, rank = settings.get("scale"), settings.get("rank")
    need(scale and rank, "adapter_config.json has no lora_parameters with scale and rank")
    weights, found = mx.load(str(args.adapter_path / "adapters.safetensors")), {}
    wrong = [name for name, w in weights.items() if not name.endswith(("lora_a", "lora_b")) or not mx.isfinite(w).all()]
    need(weights and not wrong, f"no part of a LoRA, or no numbers: {', '.join(wrong[:3]) or 'it is empty'}")
    for module in dict.fromkeys(name[: -len(".lora_a")] for name in weights):
        a, b = (np.array(weights[f"{module}.lora_{x}"].astype(mx.float32)) for x in "ab")
        if module.endswith("embed_tokens"):  # (V, r), (r, hidden): its input is a row's number
            a, b = b, a
        elif "switch_mlp" not in module:  # (in, r), (r, out); of experts (E, r, in), (E, out, r)
            a, b = a.T, b.T
        need(a.shape[-2] == b.shape[-1] == rank, f"{module} has another rank than {rank}")
        found[module] = a, b
    return found, scale, rank


def authors_name(name):
    """Return what the model's authors call a module or weight; mlx-lm stacks experts and gives them other names."""
    name = re.sub(r"(?<=block_sparse_moe\.switch_mlp\.)\w+_proj", lambda found: EXPERTS[found[0]], name)
    return name.replace(".switch_mlp.", ".experts.")


# ------------------------------------------------------------------------------------------------------------ output


def to_gguf(found, config):
    """Return {GGUF tensor's name: (A, B)} with B's rows in llama.cpp's order, and the architecture's name."""
    arch = ARCHITECTURES.get(config["model_type"])
    need(arch, f"{config['model_type']} was not compared with llama.cpp: {', '.join(ARCHITECTURES)} were")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    heads, tensors = config["num_attention_heads"], {}
    for module, (a, b) in found.items():
        name = names.get_name(authors_name(module).removeprefix("language_model."))
        need(name, f"llama.cpp has no tensor for {module}")
        if arch in PERMUTED and module.endswith(("q_proj", "k_proj")):
            count = heads if module.endswith("q_proj") else config.get("num_key_value_heads") or heads
            b = b.reshape(count, 2, -1, b.shape[-1]).swapaxes(1, 2).reshape(b.shape)
        tensors[f"{name}.weight"] = a, b
    return tensors, arch


def find_base(args):
    """Return the base's GGUF, and a Modelfile for the merged one: plain, or as Ollama's or the model's own says."""
    if args.gguf:
        return args.gguf, "FROM ./model.gguf\n"
    if args.ollama:
        text = check_output(["ollama", "show", "--modelfile", args.ollama], stderr=DEVNULL, text=True)
    else:
        text = (args.folder / "Modelfile").read_text(encoding="utf-8")
    base = re.search(r"^FROM (.+)$", text, re.M)
    path = args.folder / base[1].strip().strip('"') if base else None  # Ollama quotes a path with spaces, or does not
    need(path and path.is_file(), f"its Modelfile names no file ({path})")
    need(not re.search(r"^ADAPTER ", text, re.M), "it has an adapter already: take the model that it was made of")
    return path, re.sub(r"^(#.*\n|\n)+", "", f"{text[: base.start()]}FROM ./model.gguf{text[base.end() :]}")


def check_base(reader, tensors, arch, tied):
    """Give a head that the GGUF has and a tied model has not its part; raise ValueError where the models differ."""
    said, parts = reader.fields["general.architecture"].contents(), reader.fields.get("split.count")
    need(said == arch, f"it is a {said} model, the adapter's is {arch}")
    need(not parts or parts.contents() < 2, "it is one part of several: join them (llama-gguf-split --merge)")
    have = {t.name: (1,) * (len(t.shape) == 1) + tuple(map(int, t.shape[::-1])) for t in reader.tensors}  # out, in
    tensors |= {HEAD: tensors[EMBEDDING]} if tied and EMBEDDING in tensors and HEAD in have else {}
    need(tied or HEAD in have or not tensors.keys() & {EMBEDDING, HEAD}, "its head is its embedding: another model")
    want = {name: (*b.shape[:-1], a.shape[-1]) for name, (a, b) in tensors.items()}
    wrong = [f"{name} {have.get(name, 'is not there')}, not {of}" for name, of in want.items() if have.get(name) != of]
    need(not wrong, f"{len(wrong)} tensors differ ({'; '.join(wrong[:3])}): another model, or Ollama's own layout")


def merged(tensor, a, b, scale, kind):
    """Return a base tensor plus scale * B A, rounded to kind; 4096 rows at a time, for the memory's sake."""
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])  # (E, r, in), (E, out, r); E is 1 if no experts
    parts = []
    for old, down, up in zip(tensor.data.reshape(*b.shape[:2], -1), a, b):
        for i in range(0, len(old), 4096):
            part = gguf.dequantize(old[i : i + 4096], tensor.tensor_type).astype(np.float32)
            parts.append(gguf.quantize(part + scale * (up[i : i + 4096] @ down), kind))
    return np.concatenate(parts)


def merge(args, tensors, scale, arch, tied):
    """Write the base with the adapter added to its tensors, and a Modelfile."""
    with blame(args.ollama or args.gguf or args.folder, "name the model that the adapter is of: --gguf or --ollama"):
        base, modelfile = find_base(args)
        reader, kinds = gguf.GGUFReader(base), {}
        check_base(reader, tensors, arch, tied)
    coarse = {t.name for t in reader.tensors if t.name in tensors and t.tensor_type.name not in KEPT}
    with finished(args.out) as folder:
        folder.mkdir()
        (folder / "Modelfile").write_text(modelfile)
        writer = gguf.GGUFWriter(folder / "model.gguf", arch)
        writer.data_alignment = reader.alignment
        for field in reader.fields.values():
            own = field.name.startswith(("GGUF.", "general.architecture"))  # the writer's own
            if not own and field.contents() != []:  # an empty list cannot be written
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1])
        for t in reader.tensors:
            kinds[t.name] = gguf.GGMLQuantizationType.Q8_0 if t.name in coarse else t.tensor_type
            shape = gguf.quant_shape_to_byte_shape([int(n) for n in t.shape[::-1]], kinds[t.name])
            writer.add_tensor_info(t.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[t.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tqdm(reader.tensors, desc="merging", leave=False, disable=None):  # no bar in a log file
            data = merged(t, *tensors[t.name], scale, kinds[t.name]) if t.name in tensors else t.data
            writer.write_tensor_data(data)
        writer.close()
        gguf.GGUFReader(folder / "model.gguf")  # where the disk was full the writer is silent, the reader is not
    print(f"{len(tensors)} tensors changed, {len(coarse)} of them to Q8_0")


def write_lora(path, tensors, scale, rank, arch):
    """Write the adapter as a GGUF of its own."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)
    for name, (a, b) in tensors.items():
        a, b = (b, a.T) if name == EMBEDDING else (a, b)  # rows of it are looked up
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf.GGUFReader(path)  # as above


def write_peft(folder, found, scale, rank, model):
    """Write the adapter as PEFT reads it."""
    arrays = {}
    for module, (a, b) in found.items():
        names = ("embedding_A", "embedding_B") if module.endswith("embed_tokens") else ("A.weight", "B.weight")
        arrays |= {f"base_model.model.{module}.lora_{name}": mx.array(w) for name, w in zip(names, (a, b))}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "bias": "none"}
    config |= {"r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "target_modules": sorted(found)}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def write_fused(folder, args):
    """Write the merged, dequantized model with each expert on its own, and the tokenizer as its authors wrote it."""
    with blame(args.adapter_path, f"is it an adapter of {args.model}?"):
        model, _, config = mlx_lm.load(str(args.folder), adapter_path=str(args.adapter_path), return_config=True)
        fused = [(name, part.fuse(dequantize=True)) for name, part in model.named_modules() if hasattr(part, "fuse")]
        model.update_modules(tree_unflatten(fused))
    weights = {}
    for name, w in tree_flatten(dequantize_model(model).parameters()):
        base, experts, part = authors_name(name).partition(".experts.")
        weights |= {f"{base}.experts.{i}.{part}": w[i] for i in range(len(w))} if experts else {name: w}
    shutil.copytree(args.folder, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.gguf", "*.bin", "*.pth"))
    save_config({key: config[key] for key in config if not key.startswith("quantization")}, folder / "config.json")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "Modelfile").write_text("FROM ./model.gguf\n")


@contextmanager
def finished(path):
    """Give a place to write to, which takes the path's name when all is written; what fails leaves nothing behind."""
    unfinished = path.with_name(f"unfinished-{path.name}")  # what a killed run left there is written anew
    with blame(path, "choose another place, or make room"):
        need(not path.exists(), "it is there already")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished / path.name
            (unfinished / path.name).rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Written: {path}")


def main():
    args = parse_args()
    with blame(args.adapter_path, "see --help for other ways"):
        args.config = json.loads((args.adapter_path / "adapter_config.json").read_text(encoding="utf-8"))
        args.model = args.model or args.config.get("model")
        need(args.model, "adapter_config.json does not say its model: --model")
        args.folder = find_model(args)
        config = load_config(args.folder)
        tied = config.get("tie_word_embeddings", config["model_type"] not in UNTIED)
        if args.merge or args.lora_gguf or args.peft:
            found, scale, rank = read_factors(args)
            both = tied and any(module.endswith("embed_tokens") for module in found)
            need(not both or not (args.lora_gguf or args.peft), "a LoRA of a tied embedding leaves the head: --gguf")
            need(not args.peft or "switch_mlp" not in str(list(found)), "PEFT has no form for stacked experts")
        if args.merge or args.lora_gguf:
            tensors, arch = to_gguf(found, config)
    out = shlex.quote(str(args.out))
    if args.merge:
        merge(args, tensors, scale, arch, tied)
    if args.fuse:
        with finished(args.out) as folder:
            write_fused(folder, args)
        print(f"Next: python llama.cpp/convert_hf_to_gguf.py {out} --outfile {out}/model.gguf")
    if args.lora_gguf:
        with finished(args.lora_gguf) as path:
            write_lora(path, tensors, scale, rank, arch)
    if args.peft:
        with finished(args.peft) as folder:
            write_peft(folder, found, scale, rank, args.model)
    if args.merge or args.fuse:
        name = re.sub(r"[^\w.-]+", "-", args.out.name, flags=re.ASCII).strip("-.") or "my-model"  # as Ollama takes it
        print(f"Next: ollama create {name} -f {out}/Modelfile")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
