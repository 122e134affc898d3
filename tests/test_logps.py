"""An answer's log-probability: exactly its own tokens, in float32, whatever else is in the batch; and the batches."""

import math

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import FAMILIES, save_model

import dpo_trainer as dpo

END = 4  # <|im_end|>
HAND = {"prompt": [3, 30, 41, 4, 3, 90], "chosen": [50, 61, 72, END], "rejected": [55, END], "weight": 1.0}


def random_pairs(lengths, seed=0, vocabulary=320):
    """Return pairs of random ids from (prompt, chosen, rejected) lengths; every answer ends in END."""
    rng = np.random.default_rng(seed)
    ids = [[rng.integers(7, vocabulary, n).tolist() for n in row] for row in lengths]
    return [{"prompt": p, "chosen": c[:-1] + [END], "rejected": r[:-1] + [END], "weight": 1.0} for p, c, r in ids]


def log_softmax(logits):
    """Return the float64 log-softmax of an array's last axis."""
    x = np.array(logits.astype(mx.float32)).astype(np.float64)
    peak = x.max(-1, keepdims=True)
    return x - peak - np.log(np.exp(x - peak).sum(-1, keepdims=True))


def by_hand(model, prompt, answer):
    """Return the sum over the answer's tokens, each predicted from the one before it, of an unpadded call."""
    logps = log_softmax(model(mx.array([prompt + answer]))[0])
    return sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def expected_logps(model, pairs):
    return [by_hand(model, pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]


def widths(pairs, shared, up=1):
    """Return the least (P, R), multiples of up, that hold the pairs; shared: prompts apart from the rows."""
    answers = [max(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs]
    prompts = [len(pair["prompt"]) - 1 for pair in pairs]
    if shared:
        return -(-max(*prompts, 1) // up) * up, -(-max(answers) // up) * up
    return 0, -(-max(map(sum, zip(prompts, answers))) // up) * up


def scores(model, pairs, *layout):
    """Return the pairs' log-probabilities, (2, B)."""
    return np.array(dpo.answer_logps(model, dpo.make_batch(pairs, widths(pairs, *layout)))[0]).reshape(2, -1)


# ---------------------------------------------------------------------------------------------------------- a batch


def test_layout_of_a_batch():
    pairs = [HAND | {"ref_logps": (-1.0, -2.0)}, HAND | {"chosen": [9, END], "weight": 0.5, "ref_logps": (-3.0, -4.0)}]
    pairs[1]["prompt"] = HAND["prompt"][:4] + HAND["prompt"][5:]
    shared, whole = ({k: v.tolist() for k, v in dpo.make_batch(pairs, shape).items()} for shape in ((8, 5), (0, 12)))
    assert shared["prompts"] == [HAND["prompt"][:5] + [0] * 3, HAND["prompt"][:4] + [0] * 4]
    assert shared["lengths"] == [5, 4, 5, 4]
    assert shared["rows"][0] == HAND["prompt"][5:] + HAND["chosen"] + [0]  # a row begins with the prompt's last token
    assert shared["rows"][3] == HAND["prompt"][5:] + HAND["rejected"] + [0] * 3
    assert shared["mask"] == [[1] * 4 + [0], *[[1] * 2 + [0] * 3] * 3]
    assert whole["prompts"] == [[], []] and whole["lengths"] == [0] * 4
    assert whole["rows"][0] == HAND["prompt"] + HAND["chosen"] + [0] * 3
    assert whole["rows"][3] == pairs[1]["prompt"] + HAND["rejected"] + [0] * 6
    assert whole["mask"][0] == [0] * 5 + [1] * 4 + [0] * 3 and whole["mask"][3] == [0] * 4 + [1] * 2 + [0] * 6
    for batch in (shared, whole):
        assert batch["ref_logps"] == [[-1, -2], [-3, -4]] and batch["weight"] == [1, 0.5]


@pytest.fixture(scope="module", params=FAMILIES)
def family_model(request, tmp_path_factory):
    return mlx_lm.load(str(save_model(tmp_path_factory.mktemp(request.param), request.param)))[0]


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared"])
def test_neither_padding_nor_neighbours_matter(family_model, shared):
    """Nor does it whether a prompt is shared: all are the sums by hand, over the answers' tokens alone."""
    pairs = [HAND, *random_pairs([(12, 5, 9), (1, 3, 2), (40, 17, 30), (20, 7, 3)])]
    expected = np.reshape(expected_logps(family_model, pairs), (2, -1))
    for up in (1, 32, 50):
        np.testing.assert_allclose(scores(family_model, pairs, shared, up), expected, rtol=1e-5)
    np.testing.assert_allclose(scores(family_model, pairs[::-1], shared)[:, ::-1], expected, rtol=1e-5)
    for i, pair in enumerate(pairs):
        np.testing.assert_allclose(scores(family_model, [pair], shared)[:, 0], expected[:, i], rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_batch_of_two_is_one_and_one(family, shared, tmp_path):
    args = dpo.parse_args(["--model", str(save_model(tmp_path, family)), "--data", "none"])
    model = mlx_lm.load(args.model)[0]
    params = dpo.trainable_parameters(model, args)
    params = params + 0.01 * mx.random.normal(params.shape)  # B starts at 0: so would A's gradients
    first, second = (pair | {"ref_logps": (-30.0, -28.0)} for pair in random_pairs([(5, 4, 9), (40, 17, 6)]))

    def loss(params, batch):
        return dpo.dpo_metrics(dpo.answer_logps(dpo.install(params, model), batch)[0], batch, args)["loss"].sum()

    both, one, two = (
        mx.value_and_grad(loss)(params, dpo.make_batch(pairs, widths(pairs, shared, 8)))
        for pairs in ([first, second], [first], [second])
    )
    assert both[0].item() == pytest.approx(one[0].item() + two[0].item(), rel=1e-5)
    assert mx.linalg.norm(both[1]).item() > 0.1 and (both[1] != 0).mean().item() > 0.5
    assert mx.linalg.norm(both[1] - one[1] - two[1]) <= 1e-5 * mx.linalg.norm(both[1])


# ------------------------------------------------------------------------------------------------------- its logits


def answer_logps(logits, targets, mask):
    """Return answer_logps of a model that gives these logits, (rows, R, V)."""
    batch = {"rows": mx.array([[0, *row] for row in targets]), "mask": mx.array(mask), "prompts": mx.zeros((1, 0))}
    return dpo.answer_logps(lambda rows, cache: logits, batch)[0]


def test_token_logps_by_hand():
    """Logits log 1, log 2, log 5 have the probabilities 1/8, 2/8, 5/8; the second target is masked; -inf has none."""
    logits = mx.log(mx.array([[[1.0, 2.0, 5.0], [1.0, 2.0, 5.0], [5.0, 2.0, 1.0]]]))
    logps = answer_logps(logits, [[2, 0, 1]], [[1.0, 0.0, 1.0]])
    assert logps.tolist() == [pytest.approx(math.log(5 / 8) + math.log(2 / 8))] and logps.dtype == mx.float32
    logits = mx.array([[[0.0, 0.0, -math.inf]]] * 2)
    assert answer_logps(logits, [[1], [2]], [[1.0], [1.0]]).tolist() == [pytest.approx(-math.log(2)), -math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_tokens_do_not_count(bad):
    logits = mx.array([[[bad] * 3, [1.0, 2.0, 3.0], [bad, 0.0, 0.0]]])
    expected = log_softmax(logits[0, 1])[2]
    assert answer_logps(logits, [[0, 2, 1]], [[0.0, 1.0, 0.0]]).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared"])
def test_a_long_row_in_bfloat16(shared, tmp_path):
    """1,000 tokens are within 1e-2 of float32's; summed in bfloat16, whose steps are 16 nats there, they would not."""
    model = mlx_lm.load(str(save_model(tmp_path, dtype=mx.bfloat16)))[0]
    pairs = random_pairs([(5, 1000, 700)])
    found, whole = scores(model, pairs, shared), np.reshape(expected_logps(model, pairs), (2, 1))
    if not shared:  # the same bfloat16 logits, so that only the sum differs
        np.testing.assert_allclose(found, whole, atol=0.1)
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(found, np.reshape(expected_logps(model, pairs), (2, 1)), rtol=1e-2)


# ---------------------------------------------------------------------------------------------------------- batches

CUDA, MAC, CPU = (128, 8000, 0.75), (32, 500, 0.9), (1, 0, 0.9)  # PAD, COMPILE, SHARE


def pairs_of_lengths(count, prompt, answer, seed=0):
    """Return pairs about as long as that, each length a lognormal one with a deviation of 0.4."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.lognormal(0, 0.4, (count, 3)) * [prompt, answer, answer], 2).astype(int)
    row = range(10**4)
    return [
        {"prompt": row[:p], "chosen": row[:c], "rejected": row[:r], "number": i} for i, (p, c, r) in enumerate(lengths)
    ]


def planned(monkeypatch, device, pairs, size=4, share=True):
    """Return sorted_batches's shapes on a device, and their tokens."""
    for name, value in zip(("PAD", "COMPILE", "SHARE"), device):
        monkeypatch.setattr(dpo, name, value)
    batches = dpo.sorted_batches(pairs, size, share)
    assert sorted(pair["number"] for group, _ in batches for pair in group) == list(range(len(pairs)))
    assert {len(group) for group, _ in batches[:-1]} <= {size}
    for group, (P, R) in batches:
        longest, least = max(len(pair["prompt"]) for pair in group), widths(group, P > 0)
        assert P % device[0] == R % device[0] == 0 and R >= least[1] and (not P or share and P >= longest - 1)
    return {shape for _, shape in batches}, sum(len(group) * (P + 2 * R) for group, (P, R) in batches)


BATCHES = [  # device, prompt, answer; of 1,000 pairs: the most shapes, and tokens over those of the pairs alone
    (CUDA, 900, 150, 20, 1.33),
    (CUDA, 180, 300, 16, 1.33),
    (MAC, 900, 150, 170, 1.08),
    (MAC, 180, 300, 111, 1.11),
]


@pytest.mark.parametrize("device, prompt, answer, most, padding", BATCHES)
def test_batches_have_few_shapes_and_little_padding(monkeypatch, device, prompt, answer, most, padding):
    """A shape is worth COMPILE tokens: what the merged ones cost in all is less."""
    pairs = pairs_of_lengths(1000, prompt, answer)
    shapes, tokens = planned(monkeypatch, device, pairs)
    plain_shapes, plain_tokens = planned(monkeypatch, (device[0], 0, device[2]), pairs)
    alone = sum(p + 2 * r for p, r in (widths([pair], True) for pair in pairs))
    assert len(shapes) <= most and alone <= tokens <= padding * alone
    assert tokens + device[1] * len(shapes) <= plain_tokens + device[1] * len(plain_shapes)


@pytest.mark.parametrize("device", [CUDA, MAC, CPU])
@pytest.mark.parametrize("count, size, share", [(1, 4, True), (4, 4, True), (103, 4, False), (50, 1, True)])
def test_every_pair_is_in_a_batch_that_holds_it(monkeypatch, device, count, size, share):
    planned(monkeypatch, device, pairs_of_lengths(count, 100, 40), size, share)
    same = [{"prompt": [1], "chosen": [2], "rejected": [3], "number": i} for i in range(count)]
    shapes, _ = planned(monkeypatch, device, same, size, share)
    assert shapes == {(0, device[0])}


def test_ten_thousand_pairs_are_sorted_as_often_as_ten(monkeypatch):
    """Each plan is a sort and three maxima of whole arrays: no step is taken pair by pair to merge shapes."""
    calls, original = [], np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: calls.append(len(keys[0])) or original(keys))
    for count in (10, 10_000):
        planned(monkeypatch, MAC, pairs_of_lengths(count, 300, 100))
    assert calls.count(10) == calls.count(10_000) <= 100 and len(calls) == 2 * calls.count(10)


def test_prompts_are_shared_where_that_is_worth_it(monkeypatch):
    """Padded to 8s, the prompt is 16 tokens long and its answers 8: 16 + 2 * 8 of 2 * 24 tokens are 2 / 3."""
    pair = {"prompt": [7] * 17, "chosen": [8] * 8, "rejected": [9] * 5}
    for share, shape in ((2 / 3 + 1e-9, (16, 8)), (2 / 3 - 1e-9, (0, 24))):
        monkeypatch.setattr(dpo, "SHARE", share)
        for name, value in (("PAD", 8), ("COMPILE", 0)):
            monkeypatch.setattr(dpo, name, value)
        assert dpo.sorted_batches([pair], 4, True) == [([pair], shape)]
        assert dpo.sorted_batches([pair], 4, False) == [([pair], (0, 24))]
