"""Exported adapters: llama.cpp's logits are those of mlx-lm with the adapter, and what cannot be right is refused."""

import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, run_script, save_model
from llama_rig import write_base
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import export_ollama

TINY_CHAT = ROOT / "data" / "tiny-chat"
IDS = [3, 41, 7, 250, 12, 99, 180, 5, 301, 17, 64, 2]
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GEMMA = dict(query_pre_attn_scalar=8)
# model_type: what its configuration needs beyond conftest's
FAMILIES = {
    "llama": dict(tie_word_embeddings=False), "mistral": {}, "mixtral": dict(tie_word_embeddings=False),
    "qwen2": {}, "qwen3": {}, "qwen2_moe": dict(**EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": dict(**EXPERTS, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True),
    "gemma": {}, "gemma2": GEMMA, "gemma3_text": dict(**GEMMA, rope_theta=1e6), "phi3": {},
    "granite": dict(logits_scaling=2.0, attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.5,
                    attention_bias=False, mlp_bias=False),
    "smollm3": dict(num_hidden_layers=4), "olmo2": dict(tie_word_embeddings=False), "starcoder2": {},
}  # fmt: skip
GELU = ("gemma", "gemma2", "gemma3_text", "starcoder2")  # ggml looks gelu up in a table of halves


# --------------------------------------------------------------------------------------------- models, adapters, GGUFs


@pytest.fixture(scope="session")
def gguf():
    return pytest.importorskip("gguf", reason="pip install gguf")


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


def exported(*words, status=0):
    """Run the exporter in this process, check its exit status, and return what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["export_ollama.py", *map(str, words)]):
        with redirect_stdout(out), redirect_stderr(err):
            try:
                export_ollama.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else bool(err.write(f"{end.code}\n"))
    assert code == status, err.getvalue()
    return err.getvalue() if status else out.getvalue()


class Setup:
    """A model folder, its adapter and its base GGUF."""

    def __init__(self, folder, gguf=None, family="llama", kind="F32", keys=None, **extra):
        self.folder, self.model = folder, tiny_model(folder / "model", family, **extra)
        self.adapter = save_adapter(folder / "adapter", self.model, keys=keys)
        self.base = gguf and write_base(gguf, folder / "base.gguf", self.model, kind)
        self.words = "--adapter-path", self.adapter

    def merge(self, out="out"):
        exported(*self.words, "--gguf", self.base, "--out", self.folder / out)
        return self.folder / out / "model.gguf"

    def change(self, file="model/config.json", **values):
        """Give values in a configuration other values; None takes one away."""
        config = {**json.loads((self.folder / file).read_text()), **values}
        (self.folder / file).write_text(json.dumps({key: x for key, x in config.items() if x is not None}))

    def refused(self, *words, says=()):
        """Check that the exporter ends with one line that has all of says, and that the folder is as it was."""
        before = sorted(self.folder.rglob("*"))
        err = exported(*self.words, *words, status=1)
        assert len(err.strip().splitlines()) == 1, err
        assert sorted(self.folder.rglob("*")) == before and all(str(part) in err for part in says), err


@pytest.fixture
def setup(gguf, tmp_path):
    return Setup(tmp_path, gguf)


def gap(one, other):
    return float(np.abs(one - other).max())


def tensors_of(gguf, path):
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="session")
def engine(gguf):
    if not importlib.util.find_spec("llama_cpp"):
        pytest.skip("pip install llama-cpp-python")


def mlx_logits(model, adapter=None, ids=IDS):
    model, _ = mlx_lm.load(str(model), adapter_path=adapter and str(adapter))
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def llama_logits(target, ids=IDS, env=None, **files):
    """Return {name: logits} of files, each a GGUF or (GGUF, LoRA), from llama.cpp in a process of its own."""
    words = [f"{name}={'+'.join(map(str, x if isinstance(x, tuple) else (x,)))}" for name, x in files.items()]
    command = [sys.executable, ROOT / "tests" / "llama_rig.py", target, json.dumps(ids), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    crash = f"llama.cpp crashed: {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    assert done.returncode == 0, f"{crash}\n{done.stderr}"
    return dict(np.load(target))


EMBEDDED = ["model.embed_tokens", "self_attn.k_proj"]
ADAPTED = [(family, None, {}) for family in FAMILIES]  # family, adapted modules, configuration
ADAPTED += [("llama", EMBEDDED, dict(tie_word_embeddings=True)), ("llama", [*EMBEDDED, "lm_head"], {})]


@pytest.mark.parametrize("family, keys, extra", ADAPTED)
def test_logits_are_those_of_mlx_with_the_adapter(family, keys, extra, gguf, engine, tmp_path):
    """The base, so that what follows means something; the merged GGUF; the base with the LoRA."""
    setup, lora = Setup(tmp_path, gguf, family, keys=keys, **extra), tmp_path / "lora.gguf"
    files = dict(base=setup.base, merged=setup.merge())
    if not (keys and extra):  # llama.cpp takes no LoRA of a tied embedding
        exported(*setup.words, "--lora-gguf", lora)
        files["lora"] = setup.base, lora
    plain, want = mlx_logits(setup.model), mlx_logits(setup.model, setup.adapter)
    found = llama_logits(tmp_path / "logits.npz", **files)
    errors = {name: gap(logits, plain if name == "base" else want) for name, logits in found.items()}
    print(f"{family}: {', '.join(f'{name} {error:.1e}' for name, error in errors.items())} of {gap(want, plain):.1f}")
    assert max(errors.values()) <= (5e-3 if family in GELU else 1e-4) < gap(want, plain) / 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a newcomer: data/tiny-chat, and adapters/ that dpo_trainer.py made in 8 updates, without a network."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(TINY_CHAT, folder / "data" / "tiny-chat")
    rows = (ROOT / "data" / "pairs.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "pairs.jsonl").write_text("".join(rows))
    words = "--model", "data/tiny-chat", "--data", "pairs.jsonl", "--iters", 8, "--batch-size", 2
    done = run_script(*words, "--learning-rate", 1e-3, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", ["bundled", "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_trained_adapter_on_every_type(kind, gguf, engine, trained, tmp_path):
    """What is merged is as exact as its base and as base and LoRA: rounding has not taken the adapter away again."""
    _, tokenizer = mlx_lm.load(str(TINY_CHAT))
    asked = [{"role": "user", "content": f"{question} the bakery?"} for question in ("When can I go to", "Who runs")]
    ids = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True))
    bundled, adapter = TINY_CHAT / "tiny-chat.gguf", trained / "adapters"
    base = bundled if kind == "bundled" else write_base(gguf, tmp_path / "base.gguf", TINY_CHAT, kind)
    lora, merged = tmp_path / "lora.gguf", tmp_path / "out" / "model.gguf"
    exported("--adapter-path", adapter, "--gguf", base, "--out", tmp_path / "out", "--lora-gguf", lora)
    asked = llama_logits(tmp_path / "logits.npz", ids, base=base, lora=(base, lora), merged=merged)
    asked |= {"mlx": mlx_logits(TINY_CHAT, None, ids), "adapted": mlx_logits(TINY_CHAT, adapter, ids)}
    rms = lambda one, other: float(np.sqrt(np.mean((asked[one] - asked[other]) ** 2)))
    effect, was, now = rms("mlx", "adapted"), rms("base", "mlx"), rms("merged", "adapted")
    print(f"{kind}: base {was:.1e}, merged {now:.1e}, to base with lora {rms('merged', 'lora'):.1e} of {effect:.2f}")
    assert effect > 0.2 and now <= max(2 * was, 1e-4) and rms("merged", "lora") <= 0.15 * effect
    kinds = [{t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors} for path in (base, merged)]
    assert all(kinds[1][name] in (of, "Q8_0") for name, of in kinds[0].items())
    assert kinds[0] == kinds[1] or kind[:2] in ("Q4", "Q5")


def test_a_crash_of_llama_cpp_is_one_failed_test(tmp_path):
    (tmp_path / "llama_cpp.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    with pytest.raises(AssertionError, match="llama.cpp crashed: SIGILL"):
        llama_logits(tmp_path / "x.npz", env={**os.environ, "PYTHONPATH": str(tmp_path)}, base="base.gguf")


# ------------------------------------------------------------------------------------------------------------ the files


def test_the_bundled_model_as_a_newcomer_exports_it(gguf, trained, tmp_path):
    """From another folder, with spaces in names; and the bundled GGUF is what the script makes of the weights."""
    words, there = ["--adapter-path", "../adapters", "--out", "my model"], trained / "else where"
    there.mkdir()
    done = run_script(*words, script="export_ollama.py", cwd=there, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    out, own = there / "my model", (TINY_CHAT / "Modelfile").read_text()
    assert sorted(path.name for path in there.rglob("*")) == ["Modelfile", "model.gguf", "my model"]
    assert (out / "Modelfile").read_text() == own.replace("tiny-chat.gguf", "model.gguf") and "TEMPLATE" in own
    weights = mx.load(str(trained / "adapters" / "adapters.safetensors"))
    scale = json.loads((trained / "adapters" / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    a, b = (np.array(weights[f"model.layers.3.mlp.down_proj.lora_{x}"]) for x in "ab")
    was, now = tensors_of(gguf, TINY_CHAT / "tiny-chat.gguf"), tensors_of(gguf, out / "model.gguf")
    want = was["blk.3.ffn_down.weight"] + scale * (a @ b).T
    assert gap(now["blk.3.ffn_down.weight"], want) <= 1e-3 < gap(want, was["blk.3.ffn_down.weight"])
    (trained / "data" / "tiny-chat" / "tiny-chat.gguf").unlink()
    done = run_script("--only-gguf", "--out", trained / "data", script="data/make_tiny_chat.py")
    assert done.returncode == 0, done.stderr
    for path in TINY_CHAT.iterdir():
        assert path.read_bytes() == (trained / "data" / "tiny-chat" / path.name).read_bytes(), path.name


def add_odd_keys(writer):
    writer.add_custom_alignment(256)
    writer.add_array("odd.strings", ["é", "", "日本"])
    writer.add_int8("odd.int8", -3)
    writer.add_float64("odd.float64", 0.1)


def add_empty_list(path, name="odd.none".ljust(232, ".")):
    """Put a key of 256 bytes into a GGUF that llama.cpp's own programs write, and the Python package cannot."""
    data, number = path.read_bytes(), lambda n, size: n.to_bytes(size, "little")
    key = number(len(name), 8) + name.encode() + number(9, 4) + number(8, 4) + number(0, 8)
    path.write_bytes(data[:16] + number(int.from_bytes(data[16:24], "little") + 1, 8) + key + data[24:])


def test_the_rest_of_the_base_is_kept(gguf, tmp_path):
    """Keys with their types, alignment, and what is not adapted, to the byte; an adapted K-quant becomes Q8_0."""
    setup, kind = Setup(tmp_path, intermediate_size=256), gguf.GGMLQuantizationType.Q4_K
    rows = np.random.default_rng(0).integers(0, 256, (32, 144), np.uint8)  # 256 numbers: 2 halves, then 140 bytes
    rows[:, :4] = np.array([0.001, 0.005], np.float16).view(np.uint8)
    shutil.rmtree(setup.adapter)
    save_adapter(setup.adapter, setup.model, num_layers=1, keys=["mlp.down_proj"])
    stored = {f"blk.{i}.ffn_down.weight": (rows, kind) for i in range(2)}
    setup.base = write_base(gguf, tmp_path / "base.gguf", setup.model, "Q8_0", stored, add_odd_keys)
    add_empty_list(setup.base)
    was, now = (gguf.GGUFReader(path) for path in (setup.base, setup.merge()))
    fields = [{f.name: (f.types, f.contents()) for f in x.fields.values() if f.name[:5] != "GGUF."} for x in (was, now)]
    assert fields[1] == {name: field for name, field in fields[0].items() if field[1] != []} != fields[0]
    assert [t.name for t in was.tensors] == [t.name for t in now.tensors]
    adapted = {"blk.1.ffn_down.weight"}
    assert {t.name for t, u in zip(was.tensors, now.tensors) if t.data.tobytes() != u.data.tobytes()} == adapted
    changed = next(t for t in now.tensors if t.name in adapted)
    weights = mx.load(str(setup.adapter / "adapters.safetensors"))
    a, b = (np.array(weights[f"model.layers.1.mlp.down_proj.lora_{x}"]) for x in "ab")
    want = (gguf.dequantize(rows, kind) + 10 * (a @ b).T).reshape(32, -1, 32)
    error = np.abs(gguf.dequantize(changed.data, changed.tensor_type).reshape(want.shape) - want)
    step = np.abs(want).max(-1, keepdims=True) / 127
    assert changed.tensor_type.name == "Q8_0" and (error <= 0.57 * step).all()  # 0.5, and the step has 16 bits


@pytest.mark.parametrize("tied, key, moved", [(True, "model.embed_tokens", ["output.weight", "token_embd.weight"]),
    (False, "model.embed_tokens", ["token_embd.weight"]), (False, "lm_head", ["output.weight"])])  # fmt: skip
def test_one_matrix_or_two(tied, key, moved, gguf, tmp_path):
    """One in mlx-lm and two in the GGUF: both change alike. Two in mlx-lm and one in the GGUF: refused."""
    setup, file = Setup(tmp_path, keys=[key], tie_word_embeddings=tied), tmp_path / "model" / "model.safetensors"
    weights = mx.load(str(file))
    head = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"] + 1)
    mx.save_safetensors(str(file), weights | {"lm_head.weight": head})
    setup.base = write_base(gguf, tmp_path / "two.gguf", setup.model, "F16")
    was, now = (tensors_of(gguf, path) for path in (setup.base, setup.merge()))
    changes = {name: now[name] - was[name] for name in was if gap(was[name], now[name])}
    assert sorted(changes) == moved and gap(changes[moved[0]], changes[moved[-1]]) <= 0.02 < gap(changes[moved[0]], 0)
    mx.save_safetensors(str(file), weights)
    setup.base = write_base(gguf, tmp_path / "one.gguf", setup.model, "F16")
    if tied:
        setup.merge("again")
    else:
        setup.refused("--gguf", setup.base, "--out", tmp_path / "again", says=["one.gguf", "head"])


def test_peft_by_hand(tmp_path):
    setup, peft = Setup(tmp_path), tmp_path / "peft"
    exported(*setup.words, "--peft", peft)
    config = json.loads((peft / "adapter_config.json").read_text())
    weights = mx.load(str(setup.adapter / "adapters.safetensors"))
    found = mx.load(str(peft / "adapter_model.safetensors"))
    assert config["lora_alpha"] / config["r"] == 10 and len(found) == len(weights)
    for module in config["target_modules"]:
        a, b = (found[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert gap((b @ a).T, weights[f"{module}.lora_a"] @ weights[f"{module}.lora_b"]) <= 1e-6, module


FUSED = [("llama", "dora", None), ("mixtral", "lora", 4), ("qwen3_moe", "full", None)]


@pytest.mark.parametrize("family, kind, bits", FUSED)
def test_fused_is_model_with_adapter(family, kind, bits, tmp_path):
    model, out = tiny_model(tmp_path / "model", family, bits=bits), tmp_path / "out"
    adapter = save_adapter(tmp_path / "adapter", model, kind)
    (model / "old.gguf").write_text("large")
    exported("--adapter-path", adapter, "--fuse", "--out", out)
    want = mlx_logits(model, adapter)
    assert gap(mlx_logits(out), want) <= 1e-4 < gap(want, mlx_logits(model)) / 100
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in model.glob("*token*"))
    assert "quantization" not in (out / "config.json").read_text() and not (out / "old.gguf").exists()
    names = mx.load(str(out / "model.safetensors"))
    one = {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.3.down_proj"}
    assert f"model.layers.1.{one.get(family, 'mlp.down_proj')}.weight" in names and "switch_mlp" not in str(list(names))


# -------------------------------------------------------------------------------------------------- refused and failing


def test_bad_models_and_adapters_are_refused(setup, tmp_path):
    out, file = tmp_path / "out", str(setup.adapter / "adapters.safetensors")
    merge, lora, peft = ("--gguf", setup.base, "--out", out), ("--lora-gguf", out), ("--peft", out)
    for way in (merge, lora):
        setup.change(model_type="cohere")
        setup.refused(*way, says=["cohere", "llama"])
        setup.change(model_type="llama")
    weights, name = mx.load(file), "model.layers.0.self_attn.q_proj.lora_a"
    for bad in ({name: weights[name] * float("nan")}, {"model.norm.weight": mx.ones(4)}, {name: weights[name][:, :2]}):
        mx.save_safetensors(file, weights | bad)
        for way in (merge, lora, peft):
            setup.refused(*way, says=[setup.adapter, "model."])
    mx.save_safetensors(
        file, {"model.embed_tokens.lora_a": mx.ones((320, 4)), "model.embed_tokens.lora_b": mx.ones((4, 32))}
    )
    for tied in (True, None):  # a configuration that does not say so is tied, too
        setup.change(tie_word_embeddings=tied)
        for way in (lora, peft):  # llama.cpp would end on it, PEFT would change one of the two
            setup.refused(*way, says=["tied"])
    for bad in ({"lora_parameters": {"rank": 4}}, {"lora_parameters": None}, {"model": None}):
        setup.change("adapter/adapter_config.json", **bad)
        setup.refused(*merge, says=[setup.adapter, *bad])
    for kind in ("dora", "full"):
        shutil.rmtree(setup.adapter)
        save_adapter(setup.adapter, setup.model, kind)
        for way in (merge, lora, peft):
            setup.refused(*way, says=[kind, "--fuse"])
    (setup.adapter / "adapter_config.json").write_text("{")
    setup.refused(*merge, says=[setup.adapter])


def test_bad_bases_are_refused(setup, gguf, tmp_path):
    write_base(gguf, tmp_path / "other.gguf", tiny_model(tmp_path / "other", intermediate_size=96))
    write_base(gguf, tmp_path / "qwen.gguf", tiny_model(tmp_path / "qwen", "qwen2"))
    write_base(gguf, tmp_path / "part.gguf", setup.model, more=lambda writer: writer.add_uint16("split.count", 2))
    (tmp_path / "text.gguf").write_text("not a GGUF" * 9)
    says = {
        "other.gguf": ["(96, 32)", "(64, 32)", "blk.0.ffn"],
        "qwen.gguf": ["qwen2", "llama"],
        "part.gguf": ["part of"],
    }
    for name in (*says, "text.gguf", "nowhere.gguf", "model"):
        words = says.get(name, []) + [name]
        setup.refused("--gguf", tmp_path / name, "--out", tmp_path / "out", says=words)


def test_wrong_words(setup, tmp_path):
    (tmp_path / "there").mkdir()
    for way in (("--gguf", setup.base, "--out"), ("--fuse", "--out"), ("--peft",), ("--lora-gguf",)):
        setup.refused(*way, tmp_path / "there", says=["there: it is there already"])
    setup.refused("--adapter-path", tmp_path / "nowhere", "--fuse", "--out", tmp_path / "out", says=["nowhere"])
    setup.refused("--out", tmp_path / "out", says=["--gguf", "Modelfile"])  # no base is named
    setup.refused("--fuse", "--gguf", "x", "--out", tmp_path / "out", says=["--fuse", "--gguf"])
    Setup(tmp_path / "moe", family="mixtral").refused("--peft", tmp_path / "peft", says=["experts"])
    with mock.patch.object(export_ollama, "gguf", None):
        for way in (("--gguf", setup.base), ("--lora-gguf", tmp_path / "lora.gguf")):
            setup.refused(*way, "--out", tmp_path / "out", says=["pip install gguf"])
        exported(*setup.words, "--peft", tmp_path / "peft")


@pytest.mark.parametrize("name", ["model", "../model", "./model", "gone/model", "/gone/model", "gone"])
def test_the_model_is_looked_for_beside_the_adapter(name, setup, tmp_path):
    """A path is relative to where training ran, or to the adapter; one that is not there is called that."""
    setup.change("adapter/adapter_config.json", model=name)
    if "gone" in name:
        setup.refused("--gguf", setup.base, "--out", tmp_path / "out", says=[f"no folder {name}", "beside the adapter"])
    else:
        setup.merge()


LIMITED = """import resource, signal, sys; n = int(sys.argv.pop(1)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); sys.path.insert(0, sys.argv.pop(1))
import export_ollama; export_ollama.main()"""


@pytest.mark.parametrize("form", ["--gguf", "--lora-gguf", "--peft", "--fuse"])
def test_a_full_disk_a_kill_and_ctrl_c(form, setup, gguf, tmp_path):
    """All of it or nothing, also where the last bytes find no room, which numpy's tofile does not say."""
    words = {"--gguf": ["--gguf", str(setup.base), "--out"], "--fuse": ["--fuse", "--out"]}.get(form, [form])
    exported(*setup.words, *words, tmp_path / "whole")
    files = [path for path in (tmp_path / "whole", *(tmp_path / "whole").glob("*")) if path.is_file()]
    before, size = sorted(tmp_path.rglob("*")), max(path.stat().st_size for path in files)
    command = [sys.executable, "-c", LIMITED, str(size - 8), str(ROOT), *map(str, setup.words), *words]
    done = subprocess.run([*command, str(tmp_path / "short")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "short" in done.stderr, done.stderr
    with mock.patch("gguf.quantize" if form == "--gguf" else "pathlib.Path.rename", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            exported(*setup.words, *words, tmp_path / "short")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "unfinished-short").mkdir()  # what a kill leaves
    (tmp_path / "unfinished-short" / "short").write_text("half")
    exported(*setup.words, *words, tmp_path / "short")
    assert not (tmp_path / "unfinished-short").exists()
    for path in files:
        assert (tmp_path / "short" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path


# -------------------------------------------------------------------------------------------------------------- ollama

KEPT = 'TEMPLATE """\n# Tools\n\nFROM here on, call them.\n{{ .Prompt }}"""\nPARAMETER stop <|im_end|>\n'
REMARKS = '# Modelfile generated by "ollama show"\n# FROM harbour:latest\n\n'
OLLAMA = """#!/bin/sh
[ "$1" = create ] && printf '%s\\n' "$@" > "$0.created" && exit
[ "$*" = "show --modelfile harbour" ] || exit 3
cat "$0.shown" || exit 1
"""


@pytest.fixture
def ollama(tmp_path, monkeypatch):
    """A program `ollama` that shows the file .shown beside it, and writes down what it is to create, a word a line."""
    path = tmp_path / "bin" / "ollama"
    path.parent.mkdir()
    path.write_text(OLLAMA)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return path


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("name", ["plain", 'My Disk/it\'s "here" $HOME;x'])
def test_paths_with_spaces_and_quotes(name, quote, setup, ollama, tmp_path):
    """Ollama's store, the adapter and the output in any folder: what is printed is what a shell takes."""
    place = tmp_path / name
    place.mkdir(parents=True)
    blob, adapter, out = setup.base.rename(place / "sha256-0a"), place / "adapters", place / "my model"
    setup.adapter.rename(adapter)
    ollama.with_suffix(".shown").write_text(f"{REMARKS}FROM {quote}{blob}{quote}\n{KEPT}")
    said = exported("--adapter-path", adapter, "--ollama", "harbour", "--out", out)
    assert (out / "Modelfile").read_text() == f"FROM ./model.gguf\n{KEPT}"
    exported("--adapter-path", adapter, "--gguf", blob, "--out", place / "again")
    assert (out / "model.gguf").read_bytes() == (place / "again" / "model.gguf").read_bytes()
    subprocess.run(said.partition("Next: ")[2], shell=True, check=True)
    created = ollama.with_suffix(".created").read_text().splitlines()
    assert created == ["create", "my-model", "-f", str(out / "Modelfile")]  # Ollama's names have no spaces
    said = exported("--adapter-path", adapter, "--fuse", "--out", place / "a fuse").splitlines()[1]
    assert shlex.split(said)[3:] == [str(place / "a fuse"), "--outfile", str(place / "a fuse" / "model.gguf")]


@pytest.mark.parametrize("problem", ["not installed", "not pulled", "no file", "adapter"])
def test_without_ollamas_model(problem, setup, ollama, tmp_path):
    shown = f"FROM {tmp_path / 'gone' if problem == 'no file' else setup.base}\n{KEPT}"
    if problem == "not installed":
        ollama.unlink()
    elif problem != "not pulled":
        ollama.with_suffix(".shown").write_text(shown + "ADAPTER /store/sha256-1b\n" * (problem == "adapter"))
    setup.refused("--ollama", "harbour", "--out", tmp_path / "out", says=["harbour"])
