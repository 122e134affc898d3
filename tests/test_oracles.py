"""Independent versions: every loss in numpy, the summed log-softmax with its end of turn, KL of both distributions."""

import argparse

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import make_rows, save_model, write_rows
from mlx.utils import tree_map

import dpo_trainer as dpo


def log_softmax(logits):
    x = np.array(logits.astype(mx.float32), dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_loss(pi_w, pi_l, ref_w, ref_l, beta, loss, smoothing, delta):
    z = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    if loss == "hinge":
        return np.maximum(0, 1 - z)
    if loss == "ipo":
        return ((pi_w - ref_w) - (pi_l - ref_l) - 1 / (2 * beta)) ** 2
    sigmoid = (1 - smoothing) * np.log1p(np.exp(-z)) + smoothing * np.log1p(np.exp(z))
    return sigmoid + (delta * np.maximum(0, ref_w - pi_w) if loss == "dpop" else 0)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "dpop"])
@pytest.mark.parametrize("beta, smoothing, delta", [(0.1, 0.0, 5.0), (0.5, 0.2, 1.0), (0.01, 0.5, 50.0)])
def test_losses_equal_numpys(loss, beta, smoothing, delta):
    values = np.random.default_rng(0).normal(-30, 8, (4, 64)).astype(np.float32)
    got, won, lost = dpo.dpo_loss(*map(mx.array, values), beta, loss, smoothing, delta)
    pi_w, pi_l, ref_w, ref_l = values.astype(np.float64)
    expected = numpy_loss(pi_w, pi_l, ref_w, ref_l, beta, loss, smoothing, delta)
    np.testing.assert_allclose(np.array(got), expected, rtol=1e-4)
    np.testing.assert_allclose(np.array(won), beta * (pi_w - ref_w), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(lost), beta * (pi_l - ref_l), rtol=1e-4, atol=1e-5)


def test_a_gradient_raises_the_chosen_and_lowers_the_rejected():
    for loss in ("sigmoid", "hinge", "ipo", "dpop"):
        total = lambda w, l: dpo.dpo_loss(w, l, mx.array([-20.0]), mx.array([-21.0]), 0.1, loss)[0].sum()
        up, down = mx.grad(total, argnums=(0, 1))(mx.array([-20.5]), mx.array([-20.5]))
        assert up.item() < 0 < down.item(), loss


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Return (args, model, params, layout, encoded pairs with their reference, tokenizer): a tiny llama with LoRA."""
    folder = tmp_path_factory.mktemp("oracle")
    path = write_rows(folder / "pairs.jsonl", make_rows(12))
    words = ["--data", str(path), "--optimizer", "sgd", "--no-reference-cache"]
    args = dpo.parse_args(["--model", str(save_model(folder / "model")), *words])
    model, tokenizer = mlx_lm.load(args.model)
    pairs = dpo.encode_pairs(tokenizer, dpo.load_pairs(args, args.data, "train"), 1024)
    dpo.add_reference(model, pairs, args)
    params, layout = dpo.trainable_parameters(model, args)
    return args, model, params, layout, pairs, tokenizer


def moved(params):
    """Return the parameters with every zero of lora_b replaced by noise."""
    mx.random.seed(3)
    return tree_map(lambda w: w + 0.02 * mx.random.normal(w.shape), params)


def row_logits(model, ids):
    return log_softmax(model(mx.array([ids]))[0])


def test_the_end_of_turn_is_scored_and_nothing_before_the_answer(ready):
    _, model, params, layout, pairs, tokenizer = ready
    dpo.install(model, dpo.unpack(params, layout))
    for pair in pairs[:4]:
        assert tokenizer.eos_token_id in pair["chosen"][-2:]  # <|im_end|>, and the template's newline after it
        ids = pair["prompt"] + pair["chosen"]
        logps = row_logits(model, ids)
        by_hand = sum(logps[i - 1, ids[i]] for i in range(len(pair["prompt"]), len(ids)))
        for share in (0, 0.9, np.inf):
            logps = dpo.completion_logps(model, dpo.make_batch([pair], share))
            assert logps[0].item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("share, chunk", [(0.9, dpo.CHUNK), (0, dpo.CHUNK), (0.9, 5000)])  # 5000 logits: a token
def test_kl_and_perplexity_are_those_of_both_distributions(ready, monkeypatch, share, chunk):
    args, model, params, layout, pairs, _ = ready
    args, policy = argparse.Namespace(**vars(args) | {"share": share}), moved(params)
    monkeypatch.setattr(dpo, "CHUNK", chunk)
    found = dpo.evaluate(model, policy, params, layout, pairs, args, dpo.dpo_metrics)
    kl, nats, tokens = 0.0, 0.0, {"chosen": 0, "rejected": 0}
    for pair in pairs:
        for side in tokens:
            ids, start = pair["prompt"] + pair[side], len(pair["prompt"])
            p = row_logits(dpo.install(model, dpo.unpack(policy, layout)), ids)[start - 1 : -1]
            q = row_logits(dpo.install(model, dpo.unpack(params, layout)), ids)[start - 1 : -1]
            kl += (np.exp(p) * (p - q)).sum()
            tokens[side] += len(pair[side])
            nats -= sum(p[range(len(pair[side])), pair[side]]) if side == "chosen" else 0
    assert found["kl"] > 1e-3  # the other way round would differ by more than the tolerance
    assert found["kl"] == pytest.approx(kl / sum(tokens.values()), rel=1e-4)
    assert found["perplexity/chosen"] == pytest.approx(np.exp(nats / tokens["chosen"]), rel=1e-4)


@pytest.mark.parametrize("share", [0, 0.9])
@pytest.mark.parametrize("count", [8, 7])
def test_accumulating_four_times_one_is_one_times_four(ready, count, share):
    """With 7 pairs the last window is partial: it divides by its three pairs."""
    args, model, params, layout, pairs, _ = ready
    args = argparse.Namespace(**vars(args) | {"share": share})
    groups = [pairs[i : min(i + 4, count)] for i in (0, 4)]
    plans = [[[[pair] for pair in group] for group in groups], [[group] for group in groups]]
    ends = [list(dpo.train(model, params, layout, plan, args, dpo.dpo_metrics))[-1][1] for plan in plans]
    one, other, start = (dpo.unpack(given, layout) for given in (*ends, params))
    assert len(start) == len(layout) > 20
    for name in start:
        assert mx.allclose(one[name], other[name], rtol=1e-4, atol=1e-7).item(), name
    assert any(mx.abs(one[name] - start[name]).max().item() > 1e-6 for name in start)
