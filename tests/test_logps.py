"""A response's log-probability: exactly its own tokens, in float32, whatever else is in the batch."""

import math

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import FAMILIES, save_model
from mlx.utils import tree_map

import dpo_trainer

END = 4  # <|im_end|>
HAND = {"prompt": [3, 30, 41, 4, 3, 90], "chosen": [50, 61, 72, END], "rejected": [55, END], "weight": 1.0}


def random_pairs(lengths, seed=0):
    """Return pairs of random ids from (prompt, chosen, rejected) lengths; every answer ends in END."""
    rng = np.random.default_rng(seed)
    ids = [[rng.integers(7, 320, n).tolist() for n in row] for row in lengths]
    return [{"prompt": p, "chosen": c[:-1] + [END], "rejected": r[:-1] + [END], "weight": 1.0} for p, c, r in ids]


def log_softmax(logits):
    """Return the float64 log-softmax of an array's last axis."""
    x = np.array(logits.astype(mx.float32)).astype(np.float64)
    peak = x.max(-1, keepdims=True)
    return x - peak - np.log(np.exp(x - peak).sum(-1, keepdims=True))


def by_hand(model, prompt, response):
    """Return the sum over the response's tokens, each predicted from the one before it, of an unpadded call."""
    logps = log_softmax(model(mx.array([prompt + response]))[0])
    return sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(response))


@pytest.fixture(scope="module", params=FAMILIES)
def family_model(request, tmp_path_factory):
    return mlx_lm.load(str(save_model(tmp_path_factory.mktemp(request.param), request.param)))[0]


LAYOUTS = {"apart": 0.9, "whole": 0.1, "plain": 0}  # prompts once for both answers; not worth it; unknown to the model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_batch(layout):
    pairs = [HAND | {"ref_logps": (-1.0, -2.0)}, HAND | {"chosen": [9, END], "weight": 0.5, "ref_logps": (-3.0, -4.0)}]
    pairs[1] |= {"prompt": HAND["prompt"][:4] + HAND["prompt"][5:]}
    batch = dpo_trainer.make_batch(pairs, LAYOUTS[layout], multiple=4)
    batch = {name: np.array(value) for name, value in batch.items()}
    if layout == "apart":  # a row begins with the prompt's last token
        assert batch["prompts"].tolist() == [HAND["prompt"][:5] + [0] * 3, HAND["prompt"][:4] + [0] * 4]
        assert batch["prompt_lengths"].tolist() == [5, 4]
        assert batch["rows"].shape == (4, 5) and batch["mask"].shape == (4, 4)  # 4 targets
        assert batch["rows"][0].tolist() == HAND["prompt"][5:] + HAND["chosen"]
        assert batch["rows"][3].tolist() == HAND["prompt"][5:] + HAND["rejected"] + [0] * 2
        assert batch["mask"].tolist() == [[1] * 4, *[[1] * 2 + [0] * 2] * 3]
    else:
        assert batch["rows"].shape == (4, 13) and batch["mask"].shape == (4, 12)  # 6 + 4 tokens: 9 targets, padded
        assert batch["rows"][0].tolist() == HAND["prompt"] + HAND["chosen"] + [0] * 3
        assert batch["rows"][3].tolist() == pairs[1]["prompt"] + HAND["rejected"] + [0] * 6
        assert batch["mask"][0].tolist() == [0] * 5 + [1] * 4 + [0] * 3
        assert batch["mask"][3].tolist() == [0] * 4 + [1] * 2 + [0] * 6
        assert ("prompts" in batch) == ("prompt_lengths" in batch) == (layout == "whole")
    if layout == "whole":
        assert batch["prompts"].shape == (2, 0) and batch["prompt_lengths"].tolist() == [0, 0]
    assert batch["mask"].sum(-1).tolist() == [4, 2, 2, 2]
    assert batch["ref_logps"].tolist() == [-1, -3, -2, -4] and batch["weights"].tolist() == [1, 0.5]


@pytest.mark.parametrize("longest, width", [(32, 32), (33, 32), (34, 64)])
def test_the_width_counts_targets(longest, width):
    """A row of n tokens has n - 1 targets: one of 33 still fits into 32."""
    batch = dpo_trainer.make_batch([HAND | {"prompt": [7] * (longest - 4)}], 0, multiple=32)
    assert batch["mask"].shape == (2, width) and batch["mask"].sum(-1).tolist() == [4, 2]
    batch = dpo_trainer.make_batch([HAND | {"prompt": [7] * longest}], math.inf, multiple=32)
    assert batch["prompts"].shape == (1, width) and batch["mask"].shape == (2, 32)  # its last token begins the row
    batch = dpo_trainer.make_batch([HAND | {"chosen": [7] * (longest - 1)}], math.inf, multiple=32)
    assert batch["prompts"].shape == (1, 32) and batch["mask"].shape == (2, width)


@pytest.mark.parametrize("share", [0, 1e-9, 0.9, math.inf])
def test_prompts_stand_apart_where_that_is_worth_it(share):
    """Padded to 8s, these prompts are 16 tokens long and their answers 8: 16 + 2 * 8 of 2 * 24 tokens are 2 / 3."""
    pair = HAND | {"prompt": [7] * 14}
    for factor, apart in ((share, share >= 0.9), (2 / 3 + 1e-9, True), (2 / 3 - 1e-9, False)):
        batch = dpo_trainer.make_batch([pair], factor, multiple=8)
        assert (batch["prompts"].shape[1] if factor else 0) == (16 if apart else 0)
        assert batch["mask"].shape == (2, 8 if apart else 24)


SHARES = [0, 1e-9, math.inf]  # plain rows, whole rows, prompts once for both answers


@pytest.mark.parametrize("share", SHARES)
def test_every_family_sums_the_response_only(family_model, share):
    pairs = [HAND, *random_pairs([(12, 5, 9), (1, 3, 2)])]
    logps = dpo_trainer.completion_logps(family_model, dpo_trainer.make_batch(pairs, share))
    expected = [by_hand(family_model, pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    assert logps.dtype == mx.float32
    np.testing.assert_allclose(np.array(logps), expected, rtol=1e-5)


@pytest.mark.parametrize("share", SHARES)
def test_neither_padding_nor_neighbours_matter(family_model, share):
    def logps(pairs, *multiple):
        batch = dpo_trainer.make_batch(pairs, share, *multiple)
        return np.array(dpo_trainer.completion_logps(family_model, batch)).reshape(2, -1)

    pairs = random_pairs([(5, 4, 9), (40, 17, 30), (1, 2, 2), (20, 7, 3)])
    together = logps(pairs, 1)
    for multiple in (32, 50, 128):
        np.testing.assert_allclose(logps(pairs, multiple), together, rtol=1e-5)
    np.testing.assert_allclose(logps(pairs[::-1])[:, ::-1], together, rtol=1e-5)
    for i, pair in enumerate(pairs):
        np.testing.assert_allclose(logps([pair])[:, 0], together[:, i], rtol=1e-5)


def test_token_logps_by_hand():
    """Logits log 1, log 2, log 5 have the probabilities 1/8, 2/8, 5/8; the second target is masked."""
    logits = mx.log(mx.array([[[1.0, 2.0, 5.0], [1.0, 2.0, 5.0], [5.0, 2.0, 1.0]]]))
    logps = dpo_trainer.token_logps(logits, mx.array([[2, 0, 1]]), mx.array([[1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(np.array(logps), [[math.log(5 / 8), 0, math.log(2 / 8)]], rtol=1e-6)


def test_impossible_tokens():
    """A logit of -inf takes no probability, and as a target has none."""
    logits = mx.array([[[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]]])
    logps = dpo_trainer.token_logps(logits, mx.array([[1, 2]]), mx.ones((1, 2)))
    assert logps.tolist() == [[pytest.approx(-math.log(2)), -math.inf]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_tokens_are_exactly_zero(bad):
    logits, mask = mx.array([[[bad] * 3, [1.0, 2.0, 3.0], [bad, 0.0, 0.0]]]), mx.array([[0.0, 1.0, 0.0]])
    logps = dpo_trainer.token_logps(logits, mx.array([[0, 2, 1]]), mask)
    assert logps[0, ::2].tolist() == [0, 0] and math.isfinite(logps[0, 1].item())


def test_gradient_of_token_logps():
    """It is onehot - softmax where the mask is 1, and 0 elsewhere."""
    logits, targets = mx.random.normal((1, 3, 8), key=mx.random.key(3)), mx.array([[2, 5, 7]])
    mask = mx.array([[1.0, 0.0, 1.0]])
    gradient = mx.grad(lambda x: dpo_trainer.token_logps(x, targets, mask).sum())(logits)
    expected = (np.eye(8)[np.array(targets)] - np.exp(log_softmax(logits))) * np.array(mask)[..., None]
    np.testing.assert_allclose(np.array(gradient), expected, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32(tmp_path):
    """Summed in bfloat16, 1,000 tokens lose the margin: its steps are 16 nats from 2,048 on."""
    model = mlx_lm.load(str(save_model(tmp_path, dtype=mx.bfloat16)))[0]
    batch = dpo_trainer.make_batch(random_pairs([(5, 1000, 700)]))
    assert batch["prompts"].size == 0  # the rows are whole, so that the model can be called with them
    logps, logits = dpo_trainer.completion_logps(model, batch), model(batch["rows"][:, :-1])
    tokens = np.take_along_axis(log_softmax(logits), np.array(batch["rows"])[:, 1:, None], -1)[..., 0]
    assert logits.dtype == mx.bfloat16 and logps.dtype == mx.float32
    np.testing.assert_allclose(np.array(logps), [tokens[0, 4:1004].sum(), tokens[1, 4:704].sum()], atol=1e-2)


@pytest.mark.parametrize("share", SHARES[1:])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_batch_of_two_is_one_and_one(family, share, tmp_path):
    args = dpo_trainer.parse_args(["--model", str(save_model(tmp_path, family)), "--data", "none"])
    model = mlx_lm.load(args.model)[0]
    params, layout = dpo_trainer.trainable_parameters(model, args)
    params = tree_map(lambda w: w + 0.01 * mx.random.normal(w.shape), params)  # B starts at 0: so would A's gradients
    first, second = (pair | {"ref_logps": (-30.0, -28.0)} for pair in random_pairs([(5, 4, 9), (40, 17, 6)]))
    dpo_trainer.lighten(model, args)

    def loss(params, batch):
        model_now = dpo_trainer.install(model, dpo_trainer.unpack(params, layout), training=True)
        return dpo_trainer.dpo_metrics(dpo_trainer.completion_logps(model_now, batch), batch, args)["loss"].sum()

    both, one, two = (
        mx.value_and_grad(loss)(params, dpo_trainer.make_batch(pairs, share))
        for pairs in ([first, second], [first], [second])
    )
    assert both[0].item() == pytest.approx(one[0].item() + two[0].item(), rel=1e-5)
    gradients = [dpo_trainer.unpack(gradient, layout) for _, gradient in (both, one, two)]
    assert len(gradients[0]) == len(layout) > 20
    for name, a in gradients[0].items():
        b, c = (gradient[name] for gradient in gradients[1:])
        assert mx.abs(a).max() > 0, name
        small = 1e-5 * mx.abs(a).max().item()
        np.testing.assert_allclose(np.array(a), np.array(b + c), rtol=1e-4, atol=small, err_msg=name)
