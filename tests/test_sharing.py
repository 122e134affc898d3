"""Prompts computed once for both answers, and --grad-checkpoint: both score and train as whole rows, called plainly."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import few, restore_swiglu
from mlx.utils import tree_flatten
from test_logps import expected_logps, random_pairs, widths

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
SHARING = {  # mlx-lm's file, and a word where it is there twice -> what its configuration has beside COMMON
    **dict.fromkeys("llama qwen2 qwen3 gemma phi phi3 olmo2 internlm3 helium hunyuan_v1_dense".split(), {}),
    **dict.fromkeys(["llama sliding", "olmo3", "muse_glimmer"], SLIDING),
    **dict.fromkeys("mixtral qwen3_moe olmoe deepseek".split(), MOE),
    "llama untied": dict(tie_word_embeddings=False),
    "ministral3": dict(SLIDING, rope_parameters=MINISTRAL),
    "mistral3": dict(text_config=dict(COMMON, **SLIDING, model_type="ministral3", rope_parameters=MINISTRAL)),
    "llama4_text": dict(intermediate_size_mlp=64, no_rope_layers=[1, 0], use_qk_norm=True),
    "qwen2_moe": dict(MOE, shared_expert_intermediate_size=32),
    "gemma3_text": PATTERN,
    "gemma3n": dict(text_config=dict(GEMMA3N, num_kv_shared_layers=0)),  # its layers' inputs have four axes
    "gemma4_text": GEMMA4,  # its layers return keys and values, too
    "gpt_oss": dict(MOE, **SLIDING),
    "cohere": COHERE,
    "cohere2": dict(PATTERN, **COHERE),
    "minicpm": MINICPM,
    "internlm2": dict(bias=False),
    "smollm3": dict(no_rope_layer_interval=2),
    "granite": GRANITE,
    "granitemoe": dict(MOE, **GRANITE),
    "starcoder2": {},
    "stablelm": dict(use_qkv_bias=True, qk_layernorm=True),
    "glm4": {},
    "glm4_moe": dict(MOE, use_qk_norm=True, rope_scaling=None),
    "exaone": dict(num_layers=2),
    "exaone4": dict(sliding_window=WINDOW, sliding_window_pattern="LG", rope_scaling=None),
    "deepseek_v2": dict(MOE, **MLA, topk_method="greedy", rope_scaling=YARN),
    "nemotron": dict(hidden_act="relu2"),
    "ernie4_5": dict(use_bias=False),
    "hunyuan": HUNYUAN,
    "apertus": dict(post_norm=False, qk_norm=True),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5, num_key_value_heads=4),
    "gpt2": dict(n_ctx=512, n_embd=32, n_head=4, n_layer=2, n_positions=512, num_key_value_heads=4),
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
    "gemma3n reuse": dict(text_config=GEMMA3N),  # from here on: layers that use the keys of others
    "gemma4_text reuse": dict(GEMMA4, num_hidden_layers=4, layer_types=TYPES * 2, num_kv_shared_layers=2),
    "afm7": dict(hidden_dim=32, num_layers=3, num_kv_reuse_layers=1, num_heads=4, num_kv_heads=2),
    "nanbeige": dict(num_loops=2),  # goes through its layers twice, and gives other values without an error
}
FAST = (
    "llama sliding,mixtral,llama4_text,qwen2_moe,qwen3,gemma3_text,gemma4_text,gpt_oss,phi3,cohere2,granite,glm4,gpt2"
)
ORDER = sorted(SHARING, key=lambda family: family not in FAST.split(","))  # what --slow adds comes last

ROW_WEIGHTS = mx.array([1.0, 2.0, -1.0, 0.5, 1.0, -2.0, 0.3, -0.7])
# one prompt is far longer than WINDOW, one is of a token
PAIRS = random_pairs([(45, 6, 3), (6, 4, 17), (1, 3, 5), (13, 2, 2)], vocabulary=VOCABULARY)
WHOLE, SHARED = (dpo.make_batch(PAIRS, widths(PAIRS, shared, 8)) for shared in (False, True))


def build(family, seed=0, **extra):
    """Return a random model of a family; its weights are large enough that every token before counts."""
    kind = family.split()[0]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {**COMMON, **(SHARING | NOT_SHARING)[family], **extra, "model_type": kind}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    named = tree_flatten(model.parameters())
    model.load_weights([(name, w + (0.3 if w.ndim > 1 else 0.1) * mx.random.normal(w.shape)) for name, w in named])
    return model.eval()


def prepare(model, *words):
    """Return the vector of what is trained, in training mode; full: the whole model."""
    params = dpo.trainable_parameters(model, dpo.parse_args(["--model", "none", "--data", "none", *words]))
    model.train()
    if "full" in words:
        model.unfreeze()
        params = mx.concatenate([w.flatten() for _, w in tree_flatten(model.trainable_parameters())])
    return params


def score(model, params, batch, wrap=lambda function: function, seed=5):
    """Return the rows' log-probabilities, and the gradient of their weighted sum by the vector of parameters."""

    def total(params, batch):
        logps = dpo.answer_logps(dpo.install(params, model), batch)[0]
        return (logps * ROW_WEIGHTS[: len(logps)]).sum(), logps

    mx.random.seed(seed)  # of dropout
    (_, logps), gradient = wrap(mx.value_and_grad(total))(params, batch)
    mx.eval(logps, gradient, dpo.install(params, model).parameters())  # the model held tracers
    return np.array(logps), np.array(gradient)


def names(model):
    """Return the trained arrays' names and where each one starts in the vector."""
    trained = tree_flatten(model.trainable_parameters())
    return [name for name, _ in trained], np.cumsum([w.size for _, w in trained])[:-1]


def same(found, expected, model):
    """Assert that two results of score are equal but for rounding: all gradients together, and each array's."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=5e-5)
    size = np.linalg.norm(expected[1])
    assert size > 1 and np.linalg.norm(found[1] - expected[1]) <= 1e-5 * size
    labels, starts = names(model)
    for name, one, two in zip(labels, *(np.split(x[1], starts) for x in (found, expected)), strict=True):
        assert np.linalg.norm(one - two) <= 1e-4 * np.linalg.norm(two) + 1e-6 * size, name


# --------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", few(ORDER, 13))
def test_a_shared_prompt_scores_and_trains_as_a_whole_row(family):
    """Each row as if alone and unpadded; gradients of all parameters; with --grad-checkpoint, shared and whole."""
    model = build(family)
    assert WHOLE["prompts"].size == 0 and SHARED["prompts"].shape == (4, 48) and dpo.can_share(model, PAIRS)
    by_hand = expected_logps(model, PAIRS)
    model.unfreeze()
    params = mx.concatenate([w.flatten() for _, w in tree_flatten(model.trainable_parameters())])
    expected = score(model, params, WHOLE)  # as mlx-lm's model is, before anything is put into it
    np.testing.assert_allclose(expected[0], by_hand, rtol=1e-5, atol=5e-5)
    early = [{**PAIRS[0], "prompt": [7, 7, 7] + PAIRS[0]["prompt"][3:]}]  # attention reaches back to its start
    assert abs(dpo.answer_logps(model, dpo.make_batch(early, (0, 56)))[0][0].item() - expected[0][0]) > 1e-3
    same(score(model, params, SHARED), expected, model)
    assert prepare(model, "--fine-tune-type", "full", "--grad-checkpoint").size == params.size
    assert all(isinstance(layer, dpo.Checkpointed) for layer in model.layers)
    for batch in (SHARED, WHOLE):
        same(score(model, params, batch), expected, model)


@pytest.mark.parametrize("family", few([*NOT_SHARING][::-1], 5))
def test_families_that_cannot_share_fall_back(family):
    """can_share finds them by their error, or by their values; whole rows train with --grad-checkpoint, too."""
    model = build(family)
    assert not dpo.can_share(model, PAIRS)
    if family == "nanbeige":  # it writes its answers' keys behind its answers' keys, without an error
        shared, whole = (dpo.answer_logps(model, batch)[0] for batch in (SHARED, WHOLE))
        assert mx.isfinite(shared).all() and mx.abs(shared - whole).max() > 0.1
    model.unfreeze()
    params = mx.concatenate([w.flatten() for _, w in tree_flatten(model.trainable_parameters())])
    expected = score(model, params, WHOLE)
    np.testing.assert_allclose(expected[0], expected_logps(model, PAIRS), rtol=1e-5, atol=5e-5)
    prepare(model, "--fine-tune-type", "full", "--grad-checkpoint")
    same(score(model, params, WHOLE), expected, model)


# ----------------------------------------------------------------------------------------- adapters, dropout, compiled


ADAPTERS = ["llama sliding lora", "llama sliding dora", "qwen3_moe lora", "gpt_oss lora", "phi3 dora", "hunyuan lora"]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("case", few(ADAPTERS, 2))
def test_adapters_train_alike_by_every_path(case, bits):
    """Whole rows of the layers as mlx-lm has them; the trainer's; shared prompts; with --grad-checkpoint, too."""
    family, _, kind = case.rpartition(" ")
    found = []
    for words in ([], ["--grad-checkpoint"]):
        model = build(family)
        if bits:
            nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, m: isinstance(m, nn.Linear))
        batches = [WHOLE, SHARED] if dpo.can_share(model, PAIRS) else [WHOLE]
        params = prepare(model, "--fine-tune-type", kind, *words)
        params = params + 0.05 * mx.random.normal(params.shape, key=mx.random.key(3))
        found += [score(model, params, batch) for batch in batches]
        restore_swiglu()
        found += [] if words else [score(model, params, WHOLE)]
    expected = found.pop(len(batches))
    assert len(found) == 2 * len(batches) == (2 if family in NOT_SHARING else 4)
    for result in found:
        same(result, expected, model)


@pytest.fixture
def dropout(tmp_path):
    """Return a config whose LoRA layers drop a tenth."""
    path = tmp_path / "dropout.yaml"
    path.write_text("lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n")
    return str(path)


@pytest.mark.parametrize("family", few(ORDER, 13))
def test_every_family_can_be_traced(family, compiled):
    """Nothing in the shared call needs an array's values, which are not there inside mx.compile."""
    model = build(family)
    params = prepare(model, "--fine-tune-type", "full", "--grad-checkpoint")
    loss = lambda params, batch: dpo.answer_logps(dpo.install(params, model), batch)[0].sum()
    gradient = mx.compile(mx.grad(loss), inputs=mx.random.state, outputs=mx.random.state)(params, SHARED)
    assert gradient.shape == params.shape  # not evaluated, so that no kernel is built


@pytest.mark.slow  # half a minute of a C++ compiler where none of it was compiled before
@pytest.mark.parametrize("family", ["llama sliding", "mixtral", "qwen3"])
@pytest.mark.parametrize("words", [[], ["--grad-checkpoint"]])
def test_the_compiled_step_is_the_uncompiled_one(family, words, compiled, dropout):
    """With dropout: inside mx.compile its masks come from the random state, which is an input and an output."""
    model, state = build(family), mx.random.state
    params = prepare(model, *words, "--config", dropout)
    params = params + 0.05 * mx.random.normal(params.shape, key=mx.random.key(3))
    step = lambda function: mx.compile(function, inputs=state, outputs=state)
    found = score(model, params, SHARED, step)
    mx.disable_compile()
    same(found, score(model, params, SHARED), model)
    assert abs(found[0] - score(model, params, SHARED, seed=6)[0]).min() > 1e-4


@pytest.mark.parametrize("batch", [WHOLE, SHARED], ids=["whole", "shared"])
@pytest.mark.parametrize("family", ["llama sliding", "gemma3_text"])
def test_checkpointed_dropout_draws_the_same_mask_again(family, batch, monkeypatch, dropout):
    """Its gradient is that of the same draws without mx.checkpoint, and the slope along itself is its length."""
    model = build(family)
    params = prepare(model, "--grad-checkpoint", "--config", dropout)
    params = params + 0.05 * mx.random.normal(params.shape, key=mx.random.key(3))
    logps, gradient = score(model, params, batch)
    assert abs(logps - score(model, params, batch, seed=6)[0]).min() > 1e-4
    length, step = np.linalg.norm(gradient), 2e-4
    ends = [score(model, params + sign * step / length * mx.array(gradient), batch)[0] for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) * np.array(ROW_WEIGHTS)).sum() / (2 * step)
    assert slope == pytest.approx(length, rel=0.03)
    monkeypatch.setattr(mx, "checkpoint", lambda function: function)
    same(score(model, params, batch), (logps, gradient), model)
    model.eval()  # nothing is dropped
    assert (score(model, params, batch)[0] == score(model, params, batch, seed=6)[0]).all()


def test_a_model_in_bfloat16_shares():
    """Its rounding is no reason to fall back; a recurrent one's gap still is; and what is no number is said."""
    for family, shares in (("llama sliding", True), ("qwen3", True), ("mamba", False), ("nanbeige", False)):
        model = build(family)
        model.set_dtype(mx.bfloat16)
        assert dpo.can_share(model, PAIRS) == shares, family
    model.model.norm.weight = model.model.norm.weight * mx.inf
    with pytest.raises(ValueError, match="no numbers"):
        dpo.can_share(model, PAIRS)


def test_checkpointing_and_sharing_lower_the_peak():
    """16 layers of four long prompts: whole rows, shared prompts, and these with only the layers' inputs kept."""
    pairs = random_pairs([(97, 16, 16)] * 4, vocabulary=VOCABULARY)
    batches = [dpo.make_batch(pairs, widths(pairs, shared, 8)) for shared in (False, True)]
    model = build("llama", num_hidden_layers=16, intermediate_size=128)
    peaks = []
    for words in ([], ["--grad-checkpoint"]):
        params = prepare(model, "--fine-tune-type", "full", *words)
        for batch in batches:
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            score(model, params, batch)
            peaks.append(mx.get_peak_memory() - before)
    whole, shared, *light = peaks
    assert shared < 0.75 * whole  # 512 tokens' activations instead of 896's
    assert light[0] < 0.5 * whole and light[1] < 0.5 * shared
