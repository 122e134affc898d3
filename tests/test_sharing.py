"""Prompts computed once, logits in parts, lighter layers: all score and train as mlx-lm's models do, called whole."""

import importlib
import math
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import restore_swiglu
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.activations import swiglu
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from test_logps import by_hand, log_softmax

import dpo_trainer as dpo

VOCABULARY, WINDOW = 97, 6
COMMON = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=512, rope_theta=1e4, tie_word_embeddings=True,
    rms_norm_eps=1e-5, layer_norm_eps=1e-5, norm_epsilon=1e-5, layer_norm_epsilon=1e-5, norm_eps=1e-5,
    attention_bias=False, mlp_bias=False, partial_rotary_factor=0.5,
)  # fmt: skip
TYPES = ["sliding_attention", "full_attention"]
SLIDING = dict(sliding_window=WINDOW, layer_types=TYPES)
PATTERN = dict(sliding_window=WINDOW, sliding_window_pattern=2, query_pre_attn_scalar=8)
MOE = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1,
    moe_intermediate_size=32, norm_topk_prob=True, first_k_dense_replace=1, decoder_sparse_step=1, mlp_only_layers=[],
    topk_group=1, routed_scaling_factor=1.0,
)  # fmt: skip
MLA = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
)  # fmt: skip
YARN = dict(factor=1.0, mscale=1.0, mscale_all_dim=0.0, original_max_position_embeddings=512, beta_fast=32, beta_slow=1)
GRANITE = dict(logits_scaling=2.0, attention_multiplier=0.5, embedding_multiplier=2.0, residual_multiplier=0.7)
MINISTRAL = dict(rope_theta=1e4, llama_4_scaling_beta=0.1, original_max_position_embeddings=8)
GEMMA4 = dict(
    SLIDING, global_head_dim=8, num_kv_shared_layers=0, vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=8, final_logit_softcapping=30.0,
)  # fmt: skip
GEMMA3N = dict(
    COMMON, model_type="gemma3n", num_hidden_layers=4, sliding_window=WINDOW, layer_types=TYPES * 2,
    rope_local_base_freq=1e4, final_logit_softcapping=30.0, activation_sparsity_pattern=[0.0] * 4,
    vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, altup_num_inputs=2, altup_coef_clip=120.0,
    altup_correct_scale=True, altup_active_idx=0, laurel_rank=8, num_kv_shared_layers=2,
)  # fmt: skip
COHERE = dict(layer_norm_bias=False, logit_scale=0.3, use_qk_norm=False)
MINICPM = dict(dim_model_base=16, scale_depth=1.0, scale_emb=2.0)
HUNYUAN = dict(
    MOE, moe_topk=2, num_shared_expert=1, use_mixed_mlp_moe=True, use_qk_norm=True, use_cla=True, cla_share_factor=2,
    rope_scaling=dict(alpha=1000.0, factor=1.0, type="dynamic"),
)  # fmt: skip
LONG_ROPE = dict(type="longrope", long_factor=[1.0] * 4, short_factor=[1.0] * 4, long_mscale=1.0, short_mscale=1.0)
MIMO_V2 = dict(
    MOE, hybrid_layer_pattern=[1, 0], moe_layer_freq=[0, 1], add_swa_attention_sink_bias=True, v_head_dim=8,
    add_full_attention_sink_bias=False, sliding_window_size=WINDOW, topk_method="noaux_tc", scoring_func="sigmoid",
    layernorm_epsilon=1e-5, swa_rope_theta=1e4, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
    swa_v_head_dim=8,
)  # fmt: skip
SHARING = {  # mlx-lm's file, and a word where it is there twice -> what its configuration has beside COMMON
    "llama": {},
    "llama sliding": SLIDING,
    "llama untied": dict(tie_word_embeddings=False),
    "ministral3": dict(SLIDING, rope_parameters=MINISTRAL),
    "mistral3": dict(text_config=dict(COMMON, **SLIDING, model_type="ministral3", rope_parameters=MINISTRAL)),
    "mixtral": MOE,
    "llama4_text": dict(intermediate_size_mlp=64, no_rope_layers=[1, 0], use_qk_norm=True),
    "qwen2": {},
    "qwen2_moe": dict(MOE, shared_expert_intermediate_size=32),
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_vl": dict(text_config=dict(COMMON, model_type="qwen3")),
    "gemma": {},
    "gemma3_text": PATTERN,
    "gemma3": dict(text_config=dict(COMMON, **PATTERN, model_type="gemma3_text")),
    "gemma3n": dict(text_config=dict(GEMMA3N, num_kv_shared_layers=0)),  # its layers' inputs have four axes
    "gemma4_text": GEMMA4,  # its layers return keys and values, too
    "gpt_oss": dict(MOE, **SLIDING),
    "phi": {},
    "phi3": {},
    "phimoe": dict(MOE, rope_scaling=LONG_ROPE),
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": MOE,
    "cohere": COHERE,
    "cohere2": dict(PATTERN, **COHERE),
    "minicpm": MINICPM,
    "minicpm3": dict(MLA, **MINICPM, rope_scaling=dict(YARN, long_factor=[1.0] * 4, short_factor=[1.0] * 4)),
    "internlm2": dict(bias=False),
    "internlm3": {},
    "smollm3": dict(no_rope_layer_interval=2),
    "granite": GRANITE,
    "granitemoe": dict(MOE, **GRANITE),
    "starcoder2": {},
    "stablelm": dict(use_qkv_bias=True, qk_layernorm=True),
    "glm4": {},
    "glm4_moe": dict(MOE, use_qk_norm=True, rope_scaling=None),
    "exaone": dict(num_layers=2),
    "exaone4": dict(sliding_window=WINDOW, sliding_window_pattern="LG", rope_scaling=None),
    "deepseek": MOE,
    "deepseek_v2": dict(MOE, **MLA, topk_method="greedy", rope_scaling=YARN),
    "helium": {},
    "nemotron": dict(hidden_act="relu2"),
    "ernie4_5": dict(use_bias=False),
    "hunyuan": HUNYUAN,
    "hunyuan_v1_dense": {},
    "apertus": dict(post_norm=False, qk_norm=True),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5, num_key_value_heads=4),
    "gpt2": dict(n_ctx=512, n_embd=32, n_head=4, n_layer=2, n_positions=512, num_key_value_heads=4),
    "muse_glimmer": SLIDING,
    "mimo_v2_flash": MIMO_V2,
}
MAMBA = dict(state_size=8, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=4)
DELTA_NET = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_conv_kernel_dim=4, full_attention_interval=2, shared_expert_intermediate_size=32,
)  # fmt: skip
LFM2 = dict(
    conv_bias=False, conv_L_cache=3, block_dim=32, block_multiple_of=8, block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False, full_attn_idxs=[1],
)  # fmt: skip
NOT_SHARING = {
    "gemma2": dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=8.0),  # 5-d scores
    "mamba": MAMBA,  # from here on: recurrent
    "qwen3_next": dict(MOE, **DELTA_NET),
    "falcon_h1": dict(mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=8, mamba_n_heads=4),
    "lfm2": LFM2,
    "gemma3n": dict(text_config=GEMMA3N),  # from here on: layers that use the keys of others
    "gemma4_text": dict(GEMMA4, num_hidden_layers=4, layer_types=TYPES * 2, num_kv_shared_layers=2),
    "afm7": dict(hidden_dim=32, num_layers=3, num_kv_reuse_layers=1, num_heads=4, num_kv_heads=2),
    "nanbeige": dict(num_loops=2),  # goes through its layers twice, and gives other values without an error
}
LINE = "This model's layers cannot share a prompt between two answers: it is computed for each\n"
ROW_WEIGHTS = mx.array([1.0, 2.0, -1.0, 0.5, 1.0, -2.0, 0.3, -0.7])


def draw_pairs(*lengths, seed=0):
    """Return pairs of random ids from (prompt, chosen, rejected) lengths."""
    rng = np.random.default_rng(seed)
    ids = [[rng.integers(5, VOCABULARY, n).tolist() for n in row] for row in lengths]
    return [{"prompt": p, "chosen": c, "rejected": r, "weight": 1.0, "ref_logps": (-9.0, -8.0)} for p, c, r in ids]


PAIRS = draw_pairs((45, 6, 3), (6, 4, 17), (1, 3, 5), (13, 2, 2))  # one prompt far longer than WINDOW, one of a token


def build(family, config=None, seed=0, dtype=mx.float32, **extra):
    """Return a random model of a family; its weights are large enough that every token before counts."""
    kind = family.split()[0]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {**COMMON, **(SHARING[family] if config is None else config), **extra, "model_type": kind}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    named = tree_flatten(model.parameters())
    model.load_weights([(name, w + (0.3 if w.ndim > 1 else 0.1) * mx.random.normal(w.shape)) for name, w in named])
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model.eval()


def options(*words):
    return dpo.parse_args(["--model", "none", "--data", "none", *map(str, words)])


def checkpoint(model):
    """Make the model's layers those of --grad-checkpoint, for training."""
    dpo.lighten(model, options("--grad-checkpoint"))
    return model.train()


@contextmanager
def uncompiled():
    """Run what is under mx.compile as it is: each new kernel takes a C++ compiler half a second."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


@pytest.fixture
def quick():
    with uncompiled():
        yield


def score(model, batch, compiled=False):
    """Return the rows' log-probabilities, and of their weighted sum the gradients: {name: array}, of all trainable."""
    params = model.trainable_parameters()

    def total(params, batch):
        model.update(params)
        logps = dpo.completion_logps(model, batch)
        return (logps * ROW_WEIGHTS[: len(logps)]).sum(), logps

    function = mx.value_and_grad(total)
    (_, logps), gradients = (mx.compile(function) if compiled else function)(params, batch)
    model.update(params)  # it held tracers
    return np.array(logps), {name: np.array(g) for name, g in tree_flatten(gradients)}


def norm(arrays):
    return math.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in arrays.values()))


def same(found, expected, tolerance=1e-5):
    """Assert that two results of score are equal but for rounding: of all gradients together, and of each one."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=5e-5)
    one, two = found[1], expected[1]
    assert set(one) == set(two) and norm(two) > 1
    assert norm({name: one[name] - two[name] for name in two}) <= tolerance * norm(two)
    for name, g in two.items():
        assert np.linalg.norm(one[name] - g) <= 1e-4 * np.linalg.norm(g) + 1e-6 * norm(two), name


def expected_logps(model, pairs):
    return [by_hand(model, pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]


def batches_of(pairs, multiple=8):
    """Return the batch whose prompts are in the rows, and the one whose prompts are computed once."""
    return dpo.make_batch(pairs, 0, multiple), dpo.make_batch(pairs, math.inf, multiple)


# ------------------------------------------------------------------------------------------------ a prompt, once


@pytest.mark.parametrize("family", SHARING)
def test_a_shared_prompt_scores_and_trains_as_a_whole_row(family, capsys, quick):
    """Each row as if alone and unpadded; gradients of all parameters; with --grad-checkpoint, shared and whole."""
    model, (whole, shared) = build(family), batches_of(PAIRS)
    assert "prompts" not in whole and shared["prompts"].shape == (4, 48)
    assert dpo.settle_sharing(model, PAIRS) == dpo.SHARE and capsys.readouterr().out == ""
    expected = score(model, whole)
    np.testing.assert_allclose(expected[0], expected_logps(model, PAIRS), rtol=1e-5, atol=5e-5)
    other = [{**PAIRS[0], "prompt": [7, 7, 7] + PAIRS[0]["prompt"][3:]}]  # attention reaches back to its start
    assert abs(np.array(dpo.completion_logps(model, dpo.make_batch(other, 0)))[0] - expected[0][0]) > 1e-3
    same(score(model, shared), expected)
    if family not in SHARE_MORE:
        checkpoint(model)
        same(score(model, shared), expected)
        same(score(model, whole), expected)


SHARE_MORE = ("afm7",)  # later layers take earlier ones' keys and values past Checkpointed


@pytest.mark.parametrize("family", [*SHARE_MORE, "gemma4_text", "llama sliding", "mixtral"])
def test_gradients_that_checkpointing_changes_are_found(family, quick):
    """Before the first update: main then exits, and says to leave --grad-checkpoint out."""
    model = build(family) if family in SHARING else build(family, NOT_SHARING[family])
    args = dpo.parse_args(["--model", "none", "--data", "none", "--grad-checkpoint"])
    args.share = dpo.settle_sharing(model, PAIRS)
    params, layout = dpo.trainable_parameters(model, args)
    assert dpo.gradients_differ(model, params, layout, PAIRS, args) == (family in SHARE_MORE)


@pytest.mark.parametrize("family", SHARING)
def test_every_family_can_be_traced(family):
    """Nothing in the shared call needs an array's values, which are not there inside mx.compile."""
    model, (_, batch) = checkpoint(build(family)), batches_of(PAIRS)
    params = model.trainable_parameters()
    loss = lambda params, batch: dpo.completion_logps(dpo.install(model, params, training=True), batch).sum()
    gradients = mx.compile(mx.grad(loss))(dict(tree_flatten(params)), batch)  # not evaluated, so no kernel is built
    assert all(gradients[name].shape == w.shape for name, w in tree_flatten(params))


@pytest.mark.parametrize("family", ["llama sliding", "mixtral", "qwen3"])
def test_the_compiled_step_is_the_uncompiled_one(family):
    model, (whole, shared) = build(family), batches_of(PAIRS)
    expected = score(model, whole)
    same(score(model, shared, compiled=True), expected)
    same(score(checkpoint(model), shared, compiled=True), expected)


def test_a_sharing_run_is_a_run_that_does_not_share(quick):
    """Three updates of LoRA, prompts computed once or twice, with --grad-checkpoint or not: the same parameters."""
    pairs = draw_pairs((45, 6, 3), (40, 4, 7), (50, 3, 8), (38, 2, 9), (60, 4, 4), (41, 5, 5))
    results = []
    for share in (0.9, 0):
        for words in ([], ["--grad-checkpoint"]):
            start, params, layout, found, _ = train_a_while(build("llama sliding"), pairs, share, *words)
            results.append((np.array(params["vector"] - start["vector"]), [metrics["loss"] for metrics in found]))
    (change, losses), *others = results
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and len(set(losses)) == 3
    for other, other_losses in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        assert gap(other, change) < 1e-3  # Adam makes much of the rounding of a gradient that is about 0


def train_a_while(model, pairs, share, *words, updates=3):
    """Return a LoRA run's first and last parameters, their layout, its mean metrics by update, and its options."""
    words = ("--batch-size", 3, "--learning-rate", 1e-3, "--warmup", 0, "--beta", 0.05, *words)
    args = options("--iters", updates, *words)
    args.share, args.reference_cache = share, False
    dpo.add_reference(model, pairs, args)
    start, layout = dpo.trainable_parameters(model, args)
    dpo.lighten(model, args)
    found = []
    for _, params, batches, _ in dpo.train(model, start, layout, dpo.plan_updates(pairs, args), args, dpo.dpo_metrics):
        found.append(dpo.mean_metrics(batches))
    return start, params, layout, found, args


# ------------------------------------------------------------------------------------- models that cannot share


@pytest.mark.parametrize("family", NOT_SHARING)
def test_other_families_are_called_whole(family, capsys, quick):
    """The shared call fails or gives other values: found at the start, with a line; whole rows are right."""
    model = build(family, NOT_SHARING[family])
    whole, shared = batches_of(PAIRS)
    assert dpo.settle_sharing(model, PAIRS) == 0
    assert capsys.readouterr().out == LINE
    expected = expected_logps(model, PAIRS)
    with pytest.raises((AssertionError, TypeError, ValueError, AttributeError)):
        np.testing.assert_allclose(np.array(dpo.completion_logps(model, shared)), expected, atol=0.1)
    found = score(model, whole)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=5e-5)
    if family not in SHARE_MORE:
        same(score(checkpoint(model), whole), found)


def test_deepseek_v3_is_right_either_way(capsys):
    """Its attention takes a mask for booleans; where PrefixCache gives others, it must not share."""
    model = build("deepseek_v3", dict(MOE, **MLA))
    share = dpo.settle_sharing(model, PAIRS)
    assert capsys.readouterr().out == ("" if share else LINE)
    logps = dpo.completion_logps(model, dpo.make_batch(PAIRS, share and math.inf))
    np.testing.assert_allclose(np.array(logps), expected_logps(model, PAIRS), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", ["gemma2", "mamba"])
def test_models_that_cannot_share_train(family, quick):
    """From a reference scored row by row and a loss of log 2 on; at the end, evaluation scores as a row by itself."""
    pairs = draw_pairs((45, 6, 3), (6, 4, 7), (1, 3, 8), (13, 2, 9), (30, 4, 4))
    model = build(family, NOT_SHARING[family])
    expected = np.reshape(expected_logps(model, pairs), (2, -1)).T
    share = dpo.settle_sharing(model, pairs)
    _, params, layout, found, args = train_a_while(model, pairs, share, updates=6)
    np.testing.assert_allclose([pair["ref_logps"] for pair in pairs], expected, rtol=1e-5, atol=5e-5)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found[4]["loss"] + found[5]["loss"] < 2 * math.log(2) - 0.1  # the third epoch: all pairs
    metrics = dpo.evaluate(model, params, None, layout, pairs, args, dpo.dpo_metrics)
    dpo.install(model, dpo.unpack(params, layout))
    trained = np.reshape(expected_logps(model, pairs), (2, -1)).mean(1)
    assert np.abs(trained - expected.mean(0)).max() > 0.1
    assert [metrics["logps/chosen"], metrics["logps/rejected"]] == pytest.approx(trained.tolist(), rel=1e-5)


class NoWindow(dpo.PrefixCache):
    def make_mask(self, N, return_array=False, window_size=None):
        return super().make_mask(N, return_array)


class OneTokenMore(dpo.PrefixCache):
    def make_mask(self, N, return_array=False, window_size=None):
        return super().make_mask(N, return_array, window_size and window_size + 1)


class NoPadding(dpo.PrefixCache):
    """Every column of the prompts is seen, their padding too."""

    def make_mask(self, N, return_array=False, window_size=None):
        if self.lengths is None:
            return super().make_mask(N, return_array, window_size)
        whole = mx.full(self.lengths.shape, self.keys.shape[2])
        return dpo.PrefixCache(self.keys, self.values, whole).make_mask(N, return_array, window_size)


class NoMask(dpo.PrefixCache):
    def make_mask(self, N, return_array=False, window_size=None):
        return "causal"


class Blind(dpo.PrefixCache):
    """An answer is told that its prompt has no tokens, and sees its own alone."""

    def make_mask(self, N, return_array=False, window_size=None):
        if self.lengths is None:
            return super().make_mask(N, return_array, window_size)
        nothing = dpo.PrefixCache(self.keys, self.values, mx.zeros_like(self.lengths))
        return nothing.make_mask(N, return_array, window_size)


class Later(dpo.PrefixCache):
    offset = property(lambda self: 0 if self.lengths is None else self.lengths + 1, lambda self, value: None)


class FromZero(dpo.PrefixCache):
    offset = property(lambda self: 0, lambda self, value: None)


class FromTheEndOfThePadding(dpo.PrefixCache):
    offset = property(lambda self: 0 if self.lengths is None else self.keys.shape[2], lambda self, value: None)


class OneOffsetForAll(dpo.PrefixCache):
    offset = property(lambda self: 0 if self.lengths is None else self.lengths.max(), lambda self, value: None)


class OtherPrompt(dpo.PrefixCache):
    """Each answer follows the keys and values of another pair's prompt."""

    def update_and_fetch(self, keys, values):
        if self.lengths is not None:
            self.keys, self.values = self.keys[::-1], self.values[::-1]
        return super().update_and_fetch(keys, values)


FAULTS = [NoWindow, OneTokenMore, NoPadding, NoMask, Blind, Later, FromZero, FromTheEndOfThePadding, OneOffsetForAll]
FAULTS += [OtherPrompt]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_wrong_values_are_found(fault, dtype, capsys):
    """A model that is called with a cache and does other than without one, raising nothing, must not share."""
    model = build("llama sliding", dtype=dtype)
    kind = type(model.model)

    class Careless(kind):
        def __call__(self, inputs, cache=None, *rest):
            for layer in cache or []:
                layer.__class__ = fault or dpo.PrefixCache
            return super().__call__(inputs, cache, *rest)

    model.model.__class__ = Careless
    logps = dpo.completion_logps(model, dpo.make_batch(PAIRS, math.inf))
    assert mx.isfinite(logps).all().item()
    share = dpo.settle_sharing(model, [PAIRS[3], PAIRS[0], PAIRS[1]])
    assert (share, capsys.readouterr().out) == ((dpo.SHARE, "") if fault is None else (0, LINE))


# ----------------------------------------------------------------------------------------- where sharing pays


def sizes(prompt, chosen, rejected, *more, share=0.9):
    """Return the widths P and R of a batch of these lengths, padded to multiples of 8."""
    batch = dpo.make_batch(draw_pairs((prompt, chosen, rejected), *more), share, 8)
    return batch["prompts"].shape[1], batch["rows"].shape[1] - 1


def test_sharing_must_cut_a_tenth_of_the_padded_tokens():
    """A prompt of n tokens leaves n - 1 to compute once; its last one begins both rows.

    8 + 2 * 32 = 72 tokens are nine tenths of 2 * 40 and share; 8 + 2 * 40 = 88 of 2 * 48 = 96 are more, and do not.
    """
    assert sizes(9, 32, 5) == (8, 32)
    assert sizes(9, 33, 5) == (0, 48) and sizes(9, 5, 33) == (0, 48)  # the longer answer counts
    assert sizes(9, 40, 5) == (0, 48) and sizes(17, 40, 5) == (16, 40)  # 16 + 80 = 96 of 112
    assert sizes(10, 32, 5) == (16, 32)  # 9 tokens take 16: 16 + 64 = 80 of 2 * 48
    assert sizes(1, 6, 3) == (0, 8)  # nothing before the token that begins the rows
    assert sizes(45, 6, 3) == (48, 8) and sizes(4, 90, 80) == (0, 96)


def test_the_longest_prompt_and_the_longest_answer_decide():
    """96 + 2 * 64 = 224 tokens, padded: of 2 * 160 where one pair has both, of 2 * 104 where two have them."""
    assert sizes(97, 60, 3, (40, 6, 2)) == (96, 64)
    assert sizes(97, 6, 3, (40, 60, 2)) == (0, 104)
    assert sizes(97, 60, 3, (40, 6, 2), share=0.7) == (96, 64) and sizes(97, 60, 3, (40, 6, 2), share=0.69) == (0, 160)
    assert sizes(45, 6, 3, (1, 2, 2)) == (48, 8)


@pytest.mark.parametrize("lengths", [[(45, 6, 3), (1, 3, 5)], [(9, 33, 5), (6, 4, 17), (1, 3, 5)], [(1, 6, 3)]])
@pytest.mark.parametrize("family", ["llama sliding", "gpt_oss"])
def test_a_batch_is_right_whether_it_shares_or_not(family, lengths):
    pairs, model = draw_pairs(*lengths), build(family)
    batch = dpo.make_batch(pairs, 0.9, 8)
    assert (batch["prompts"].size > 0) == (lengths[0][0] == 45)
    logps = dpo.completion_logps(model, batch)
    np.testing.assert_allclose(np.array(logps), expected_logps(model, pairs), rtol=1e-5, atol=5e-5)


def test_layout_of_a_shared_batch():
    """Prompts without their last token; rows from it on, the chosen answers first; masks on the answers alone."""
    pairs = [
        {"prompt": [10, 11, 12, 13, 14], "chosen": [20, 21, 22], "rejected": [30]},
        {"prompt": [40, 41], "chosen": [50], "rejected": [60, 61, 62, 63, 64]},
        {"prompt": [70], "chosen": [80, 81], "rejected": [90, 91]},
    ]
    for pair, weight, refs in zip(pairs, (1.0, 0.5, 2.0), ((-1, -2), (-3, -4), (-5, -6))):
        pair |= {"weight": weight, "ref_logps": refs}
    batch = {name: np.array(value).tolist() for name, value in dpo.make_batch(pairs, math.inf, 4).items()}
    assert batch.pop("prompts") == [[10, 11, 12, 13], [40, 0, 0, 0], [0] * 4]
    assert batch.pop("prompt_lengths") == [4, 1, 0]
    chosen = [[14, 20, 21, 22] + [0] * 5, [41, 50] + [0] * 7, [70, 80, 81] + [0] * 6]
    rejected = [[14, 30] + [0] * 7, [41, 60, 61, 62, 63, 64] + [0] * 3, [70, 90, 91] + [0] * 6]
    assert batch.pop("rows") == chosen + rejected
    assert batch.pop("mask") == [[1] * n + [0] * (8 - n) for n in (3, 1, 2, 1, 5, 2)]
    assert batch.pop("ref_logps") == [-1, -3, -5, -2, -4, -6] and batch.pop("weights") == [1, 0.5, 2]
    assert not batch


# --------------------------------------------------------------------- neither padding nor neighbours nor sharing


@pytest.mark.parametrize("family", ["llama sliding", "gemma3_text", "mixtral", "gpt_oss", "cohere2", "deepseek_v2"])
def test_a_row_is_scored_as_if_it_were_alone(family, quick):
    """Whatever the padding, the other pairs, their order, and whether its prompt is computed once."""
    model = build(family)
    pairs = draw_pairs((45, 6, 3), (6, 4, 17), (1, 3, 5), (13, 2, 2), (30, 20, 9))
    expected = np.reshape(expected_logps(model, pairs), (2, -1))

    def check(numbers, *layout):
        batch = dpo.make_batch([pairs[i] for i in numbers], *layout)
        logps = np.array(dpo.completion_logps(model, batch)).reshape(2, -1)
        np.testing.assert_allclose(logps, expected[:, numbers], rtol=1e-5, atol=5e-5)

    for share in (0, 0.9, math.inf):
        for multiple in (1, 8, 50):
            check([0, 1, 2, 3, 4], share, multiple)
        check([4, 2, 0, 3, 1], share, 8)
        check([2, 1], share, 32)
        for i in range(5):
            check([i], share, 1)


# ------------------------------------------------------------------------------------ logits a part at a time


HEADS = ["llama", "llama untied", "gemma3_text", "gemma3_text tied", "cohere2", "minicpm", "granite", "muse_glimmer"]


def build_head(family):
    """Return a model whose layers alone are trained, as dpo_trainer trains them: the logits' own weights are frozen."""
    model = build(family, SHARING[family.removesuffix(" tied")] if family.endswith(" tied") else None)
    if family == "gemma3_text tied":
        model.sanitize({})  # as when its file has no head
        assert "lm_head" not in model
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    return model


@pytest.fixture
def seen(monkeypatch):
    """Return a list of the number of tokens of each call of token_logps."""
    widths, own = [], dpo.token_logps
    monkeypatch.setattr(dpo, "token_logps", lambda logits, *rest: widths.append(logits.shape[1]) or own(logits, *rest))
    return widths


@pytest.mark.parametrize("family", HEADS)
def test_logits_in_parts_are_the_whole_ones(family, monkeypatch, seen, quick):
    """For every part's size, up to all of the tokens; a size that does not divide them; scoring and training."""
    model, (_, batch) = build_head(family), batches_of(PAIRS)
    (rows, width), expected = batch["mask"].shape, score(model.eval(), batch)
    assert (rows, width) == (8, 24)
    np.testing.assert_allclose(expected[0], expected_logps(model, PAIRS), rtol=1e-5, atol=5e-5)
    checkpoint(model)
    for step in (1, 5, 23, 24):
        monkeypatch.setattr(dpo, "CHUNK", rows * VOCABULARY * (step + 1) - 1)
        parts = [min(step, width - i) for i in range(0, width, step)]
        for training in (False, True):
            seen.clear()
            np.testing.assert_allclose(np.array(dpo.completion_logps(model.train(training), batch)), expected[0], 1e-6)
            assert seen == parts
            same(score(model, batch), expected)
    monkeypatch.setattr(dpo, "CHUNK", 1)  # less than a token of each row
    seen.clear()
    np.testing.assert_allclose(np.array(dpo.completion_logps(model, batch)), expected[0], 1e-6)
    assert seen == [1] * width


def test_logits_are_whole_where_the_activations_are(monkeypatch, seen, quick):
    """Training without --grad-checkpoint keeps more than the logits; scoring keeps none."""
    model, (_, batch) = build_head("llama"), batches_of(PAIRS)
    monkeypatch.setattr(dpo, "CHUNK", 8 * VOCABULARY * 10)
    for training, parts in ((True, [24]), (False, [10, 10, 4])):
        seen.clear()
        mx.eval(dpo.completion_logps(model.train(training), batch))
        assert seen == parts


@pytest.mark.parametrize("share", [0, 0.9])
def test_logits_in_parts_of_rows_with_their_prompts(share, monkeypatch, seen, quick):
    """gemma2 and others that are called whole give all logits at once: in parts they are only summed up."""
    family = "llama untied" if share else "gemma2"
    model, pairs = build(family, None if share else NOT_SHARING[family]), draw_pairs((9, 33, 5), (6, 4, 17))
    batch = dpo.make_batch(pairs, share, 8)
    assert batch["mask"].shape == (4, 48) and (share == 0 or batch["prompts"].size == 0)
    calls, kind = [], type(model)
    called = lambda self, ids, *rest, **named: calls.append(ids.shape) or kind.__call__(self, ids, *rest, **named)
    model.__class__ = type("Counting", (kind,), {"__call__": called})
    expected = np.array(dpo.completion_logps(model, batch))
    assert seen == [48]
    for training in (False, True):
        (checkpoint(model) if training else model).train(training)
        monkeypatch.setattr(dpo, "CHUNK", 4 * VOCABULARY * 20)
        calls.clear(), seen.clear()
        np.testing.assert_allclose(np.array(dpo.completion_logps(model, batch)), expected, 1e-6)
        assert seen == [20, 20, 8] and (share > 0 or calls == [(4, 48)])
    np.testing.assert_allclose(expected, expected_logps(model.eval(), pairs), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "cohere2", "gemma2"])
def test_kl_in_parts_is_the_whole_one(family, monkeypatch, quick):
    """And both are the sum over the answers' tokens of p (log p - log q), from two unpadded calls, a token."""
    model = build(family, NOT_SHARING.get(family))
    pairs = draw_pairs((45, 6, 3), (6, 4, 17), (1, 3, 5))
    args = options("--batch-size", 2)
    args.share = dpo.settle_sharing(model, pairs)
    initial, layout = dpo.trainable_parameters(model, args)
    params = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(1)), initial)
    whole = dpo.evaluate(model, params, initial, layout, pairs, args, dpo.dpo_metrics)
    monkeypatch.setattr(dpo, "CHUNK", 4 * VOCABULARY * 3)
    for name, value in dpo.evaluate(model, params, initial, layout, pairs, args, dpo.dpo_metrics).items():
        assert value == pytest.approx(whole[name], rel=1e-5), name
    total = count = 0
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids = mx.array([pair["prompt"] + pair[side]])
            p, q = (
                log_softmax(dpo.install(model, dpo.unpack(weights, layout))(ids)[0, len(pair["prompt"]) - 1 : -1])
                for weights in (params, initial)
            )
            total, count = total + (np.exp(p) * (p - q)).sum(), count + len(pair[side])
    assert whole["kl"] == pytest.approx(total / count, rel=1e-4) and whole["kl"] > 0.01


def peak_of(function):
    """Return the most bytes that a call, evaluated, held beyond what was there before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("training, compiled", [(False, False), (True, False), (True, True)])
def test_parts_take_less_memory(training, compiled, monkeypatch):
    """Of 4 * 64 * 20000 logits, 20 MB in float32, some are there at once: mlx computes ahead, but not all 16 parts."""
    model = build("llama untied", num_hidden_layers=1, vocab_size=20000)
    batch, logits = dpo.make_batch(draw_pairs((45, 60, 50), (20, 64, 45)), math.inf, 8), 4 * 64 * 20000
    assert batch["mask"].shape == (4, 64)
    params = checkpoint(model).layers[0].trainable_parameters()
    model.train(training)

    def loss(params, batch):
        model.layers[0].update(params)
        return dpo.completion_logps(model, batch).sum()

    def peak(parts):
        monkeypatch.setattr(dpo, "CHUNK", logits // parts)
        function = mx.value_and_grad(loss) if training else loss
        found = peak_of(lambda: (mx.compile(function) if compiled else function)(params, batch))
        model.layers[0].update(params)
        return found

    whole, parts = peak(1), peak(16)
    assert whole > (2 if training else 1) * 4 * logits
    assert parts < (0.75 if training and compiled else 0.5) * whole  # the compiled order computes more parts ahead


# ------------------------------------------------------------------------------------------------- lean layers


def lora_layer(bits=None, bias=True, dtype=mx.float32, dropout=0.0, kind=LoRALinear):
    """Return a random LoRA layer of 64 inputs and 96 outputs, by itself in a list of layers, in training mode."""
    mx.random.seed(5)
    linear = nn.Linear(64, 96, bias=bias)
    linear.set_dtype(dtype)
    if bits:
        linear = nn.QuantizedLinear.from_linear(linear, group_size=32, bits=bits)
    layer = kind.from_base(linear, r=4, scale=3.0, dropout=dropout)
    layer.lora_a, layer.lora_b = (0.3 * mx.random.normal(w.shape) for w in (layer.lora_a, layer.lora_b))
    linear.freeze()
    layer.lora_a, layer.lora_b = layer.lora_a.astype(dtype), layer.lora_b.astype(dtype)
    return layer.train()


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)


def lean(layer, *words):
    dpo.lighten(Stack(layer), options(*words))
    return layer


def pull_back(function, inputs, seed=6):
    """Return [output, gradients of the inputs ...] of a function, for one random cotangent, in float32."""
    cotangent = mx.random.normal(function(*inputs).shape, key=mx.random.key(seed)).astype(inputs[0].dtype)
    (out,), gradients = mx.vjp(function, inputs, [cotangent])
    return [np.array(x.astype(mx.float32)) for x in (out, *gradients)]


def through(layer):
    """Return a function of a LoRA layer's input and of its two matrices."""

    def function(x, a, b):
        layer.lora_a, layer.lora_b = a, b
        return layer(x)

    return function


def gap(one, two):
    return np.linalg.norm(one - two) / np.linalg.norm(two)


@pytest.mark.parametrize("shape", [(3, 7, 64), (5, 64), (2, 3, 4, 64)])
@pytest.mark.parametrize("bits, bias", [(None, True), (None, False), (4, True), (8, False)])
def test_fused_lora_is_lora(bits, bias, shape):
    layer = lora_layer(bits, bias)
    inputs = [mx.random.normal(shape), layer.lora_a, layer.lora_b]
    expected = pull_back(through(layer), inputs)
    assert type(lean(layer)) is dpo.FusedLoRA
    for one, two in zip(pull_back(through(layer), inputs), expected, strict=True):
        assert one.shape == two.shape and gap(one, two) < 1e-6
    assert gap(expected[0], np.array(layer.linear(inputs[0]))) > 0.1  # the adapter counts


@pytest.mark.parametrize("bits", [None, 4])
def test_fused_lora_is_as_exact_in_bfloat16(bits):
    """Its error against float32, from the same bfloat16 values, is at most about that of mlx-lm's layer."""
    layer, exact = (lora_layer(bits, dtype=dtype) for dtype in (mx.bfloat16, mx.float32))
    x = mx.random.normal((8, 64, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    inputs = [x, layer.lora_a, layer.lora_b]
    exact.linear.update(tree_map(lambda w: w.astype(mx.float32) if w.dtype != mx.uint32 else w, layer.linear))
    mx.random.seed(0)
    cotangent = mx.random.normal((8, 64, 96)).astype(mx.bfloat16)

    def run(layer, dtype):
        (out,), gradients = mx.vjp(through(layer), [v.astype(dtype) for v in inputs], [cotangent.astype(dtype)])
        assert {v.dtype for v in (out, *gradients)} == {dtype}
        return [np.array(v.astype(mx.float32)) for v in (out, *gradients)]

    known, own = run(exact, mx.float32), run(layer, mx.bfloat16)
    for ours, theirs, truth in zip(run(lean(layer), mx.bfloat16), own, known, strict=True):
        assert gap(ours, truth) <= 1.5 * gap(theirs, truth)
        assert gap(theirs, truth) < 0.02


def test_a_layer_with_dropout_or_of_dora_stays():
    assert type(lean(lora_layer())) is dpo.FusedLoRA
    assert type(lean(lora_layer(dropout=0.1), "--dropout", 0.1)) is LoRALinear
    layer = lora_layer(kind=DoRALinear)
    inputs = [mx.random.normal((3, 7, 64)), layer.lora_a, layer.lora_b]
    expected = pull_back(through(layer), inputs)
    assert type(lean(layer, "--fine-tune-type", "dora")) is DoRALinear
    for one, two in zip(pull_back(through(layer), inputs), expected, strict=True):
        assert (one == two).all()


def test_dropout_still_drops(quick):
    """With --dropout a lightened model's training differs from call to call, and scores as ever outside training."""
    args, model = options("--dropout", 0.5), build("llama")
    params, layout = dpo.trainable_parameters(model, args)
    dpo.lighten(model, args)
    params = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape), params)
    batch, weights = dpo.make_batch(PAIRS, math.inf, 8), dpo.unpack(params, layout)
    one, two = (np.array(dpo.completion_logps(dpo.install(model, weights, training=True), batch)) for _ in range(2))
    assert np.abs(one - two).min() > 1e-3
    one, two = (np.array(dpo.completion_logps(dpo.install(model, weights), batch)) for _ in range(2))
    assert (one == two).all()


def test_lean_swiglu_is_swiglu():
    extremes = mx.array([-200.0, -90.0, -30.0, 0.0, 30.0, 200.0])
    gate = mx.concatenate([4 * mx.random.normal((2000,), key=mx.random.key(0)), extremes])
    x = mx.random.normal(gate.shape, key=mx.random.key(1))
    for one, two in zip(pull_back(dpo.lean_swiglu, [gate, x]), pull_back(swiglu, [gate, x]), strict=True):
        assert gap(one, two) < 1e-6
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("spread", [0.3, 1, 4])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_lean_swiglu_is_as_exact_in_16_bits(dtype, spread):
    gate, x = (s * mx.random.normal((200, 100), key=mx.random.key(k)) for k, s in ((0, spread), (1, 1)))
    gate, x = gate.astype(dtype), x.astype(dtype)
    cotangent = mx.random.normal(gate.shape, key=mx.random.key(2)).astype(dtype)

    def run(function, dtype):
        (out,), gradients = mx.vjp(function, [v.astype(dtype) for v in (gate, x)], [cotangent.astype(dtype)])
        assert {v.dtype for v in (out, *gradients)} == {dtype}
        return [np.array(v.astype(mx.float32)) for v in (out, *gradients)]

    exact = run(swiglu, mx.float32)
    for ours, theirs, truth in zip(run(dpo.lean_swiglu, dtype), run(swiglu, dtype), exact, strict=True):
        assert gap(ours, truth) <= 1.5 * gap(theirs, truth)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["llama sliding", "qwen3_moe", "gpt_oss", "phi3", "glm4"])
def test_a_lightened_model_has_the_gradients_of_mlx_lms_own(family, bits, quick):
    """LoRA on every linear layer, prompts shared; with --grad-checkpoint, too."""
    model, (_, batch) = build(family), batches_of(PAIRS)
    if bits:
        nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    params, layout = dpo.trainable_parameters(model, options())
    params = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(3)), params)
    dpo.install(model, dpo.unpack(params, layout), training=True)
    expected = score(model, batch)
    dpo.lighten(model, options())
    kinds = {type(module) for module in model.modules()}
    assert dpo.FusedLoRA in kinds and LoRALinear not in kinds
    same(score(model, batch), expected)
    same(score(checkpoint(model), batch), expected)
    restore_swiglu()
    same(score(model, batch), expected)


# ------------------------------------------------------------------------------------- parameters as one vector


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind, optimizer", [("lora", "adamw"), ("lora", "muon"), ("dora", "adam"), ("full", "adamw")])
def test_what_is_packed_comes_back(kind, optimizer, dtype):
    """Each array under its name, of its shape, with its values, in what it is computed in: DoRA's in float32."""
    model = build("llama", dtype=dtype)
    params, layout = dpo.trainable_parameters(model, options("--fine-tune-type", kind, "--optimizer", optimizer))
    own = dict(tree_flatten(model.trainable_parameters()))
    assert set(params) == ({"vector"} if (kind, optimizer) in (("lora", "adamw"), ("dora", "adam")) else set(own))
    assert all(w.dtype == mx.float32 for w in params.values())
    back = dpo.unpack(params, layout)
    assert list(back) == [name for name, _, _ in layout] and set(back) == set(own)
    assert any(name.endswith("lora_b") for name in own) == (kind != "full")
    for name, w in back.items():
        assert w.shape == own[name].shape and w.dtype == (mx.float32 if kind == "dora" else dtype)
        assert (w == own[name].astype(w.dtype)).all().item(), name
    for together in (True, False):
        distinct = {name: mx.random.normal(w.shape) for name, w in own.items()}
        again = dpo.unpack(dpo.pack(distinct, together), [(name, w.shape, mx.float32) for name, w in own.items()])
        assert all((again[name] == distinct[name]).all().item() for name in own)


@pytest.mark.parametrize("optimizer", dpo.OPTIMIZERS)
def test_optimizers_that_go_by_the_matrix_keep_matrices(optimizer):
    params, layout = dpo.trainable_parameters(build("llama"), options("--optimizer", optimizer))
    if optimizer in ("muon", "adafactor"):
        assert [(name, w.shape) for name, w in params.items()] == [(name, shape) for name, shape, _ in layout]
        assert all(w.ndim == 2 for w in params.values())
    else:
        assert list(params) == ["vector"] and params["vector"].size == sum(math.prod(shape) for _, shape, _ in layout)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_of_the_vector_is_the_update_of_its_arrays(optimizer, quick):
    """Clipping included: both take the norm of all gradients."""
    results, pairs = [], draw_pairs((45, 6, 3), (40, 4, 7))
    for together in (True, False):
        args = options("--optimizer", optimizer, "--iters", 2, "--learning-rate", 1e-3, "--warmup", 0)
        model = build("llama")
        params, layout = dpo.trainable_parameters(model, args)
        params = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(3)), params)
        weights = dpo.unpack(params, layout)
        start = dpo.pack(weights, together)
        assert ("vector" in start) == together
        plan = dpo.plan_updates(pairs, args) * 2
        for _, end, _, rates in dpo.train(model, start, layout, plan, args, dpo.dpo_metrics):
            pass
        end = dpo.unpack(end, layout)
        assert rates["grad_norm"].item() > 1  # so that it is clipped
        results.append({name: np.array(end[name] - weights[name]) for name in weights})
    assert norm(results[0]) > 1e-4
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-3, atol=1e-7, err_msg=name)


# -------------------------------------------------------------------------------------------------------- memory


def test_checkpointing_and_sharing_lower_the_peak(quick):
    """16 layers of four long prompts: whole rows, shared prompts, and these with only the layers' inputs kept."""
    pairs = draw_pairs(*[(97, 16, 16)] * 4)
    model, (whole, shared) = build("llama", num_hidden_layers=16, intermediate_size=128).train(), batches_of(pairs)
    assert whole["mask"].shape == (8, 112) and shared["prompts"].shape == (4, 96) and shared["mask"].shape == (8, 16)
    params = model.trainable_parameters()

    def peak(batch):
        loss = lambda params: (model.update(params), dpo.completion_logps(model, batch).sum())[1]
        found = peak_of(lambda: mx.value_and_grad(loss)(params))
        model.update(params)
        return found

    plain = [peak(batch) for batch in (whole, shared)]
    checkpoint(model)
    light = [peak(batch) for batch in (whole, shared)]
    assert plain[1] < 0.75 * plain[0]  # 512 tokens' activations instead of 896's
    assert light[1] < 0.5 * plain[1] and light[0] < 0.5 * plain[0]


def test_checkpointed_dropout_draws_the_same_mask_again_also_when_compiled():
    """The compiled step failed: the masks' keys were no arguments. The gradient's slope along itself is its norm."""
    args = options("--dropout", 0.3, "--grad-checkpoint")
    model, batch = build("llama"), dpo.make_batch(draw_pairs((9, 5, 7), (12, 6, 4)), 0)
    params, layout = dpo.trainable_parameters(model, args)
    params = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(3)), params)
    dpo.lighten(model, args)
    loss = lambda params: dpo.completion_logps(dpo.install(model, dpo.unpack(params, layout), True), batch).sum()
    step = partial(mx.compile, inputs=[mx.random.state], outputs=[mx.random.state])(mx.value_and_grad(loss))

    def at(function, params):
        mx.random.seed(5)
        return function(params)

    value, gradient = at(step, params)
    other = step(params)[0]
    assert value.item() == pytest.approx(at(loss, params).item(), rel=1e-5) and abs(other - value).item() > 1e-3
    size, far = norm(gradient), 2e-4
    ends = [at(loss, {"vector": params["vector"] + sign * far / size * gradient["vector"]}) for sign in (1, -1)]
    assert (ends[0] - ends[1]).item() / (2 * far) == pytest.approx(size, rel=0.03)
