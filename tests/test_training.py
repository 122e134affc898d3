"""Plan, updates, optimizer and evaluation, on tiny models in this process."""

import math
import random

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
from conftest import FAMILIES, restore_swiglu, save_model
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from test_logps import log_softmax
from test_logps import random_pairs as pairs_of

import dpo_trainer

LOG_2 = math.log(2)


def options(*words):
    return dpo_trainer.parse_args(["--model", "none", "--data", "none", *map(str, words)])


def random_pairs(count, seed=0):
    """Return pairs of random ids with differing lengths."""
    rng = np.random.default_rng(seed)
    return pairs_of([(rng.integers(1, 30), rng.integers(2, 13), rng.integers(2, 13)) for _ in range(count)])


def set_up(folder, *words, count=6, noise=0.0):
    """Return (args, model, params, layout, pairs) as main has them when training starts, with noise on the params."""
    args = options("--model", folder, "--warmup", 0, "--no-reference-cache", *words)
    model, pairs = mlx_lm.load(args.model, adapter_path=args.adapter)[0], random_pairs(count)
    args.share = dpo_trainer.settle_sharing(model, pairs)
    assert args.share == dpo_trainer.SHARE
    dpo_trainer.add_reference(model, pairs, args)
    params, layout = dpo_trainer.trainable_parameters(model, args)
    dpo_trainer.lighten(model, args)
    if noise:
        mx.random.seed(7)
        params = tree_map(lambda w: w + noise * mx.random.normal(w.shape), params)
    return args, model, params, layout, pairs


def named(params, layout):
    """Return the parameters by name as they are, in float32."""
    return dpo_trainer.unpack(params, [(name, shape, mx.float32) for name, shape, _ in layout])


def snapshot(tree):
    return {name: np.array(w.astype(mx.float32) if w.dtype == mx.bfloat16 else w) for name, w in tree_flatten(tree)}


def distance(one, two):
    """Return the largest difference between two trees of the same arrays."""
    one, two = snapshot(one), snapshot(two)
    assert set(one) == set(two)
    return max(np.abs(one[name] - two[name]).max() for name in one)


def run(model, params, layout, plan, args):
    """Return (step, parameters by name, metrics of all its pairs and rates) of each update, as numpy arrays.

    They are looked at after the last one, as main may do: nothing that is yielded changes later.
    """
    mx.random.seed(3)  # of dropout
    updates, results = list(dpo_trainer.train(model, params, layout, plan, args, dpo_trainer.dpo_metrics)), []
    for (step, new, found, rates), group in zip(updates, plan, strict=True):
        assert [count for _, count in found] == [len(batch) for batch in group]
        metrics = {name: np.concatenate([np.array(part[name]) for part, _ in found]) for name in found[0][0]}
        assert {len(values) for values in metrics.values()} == {len(sum(group, []))}
        assert set(rates) == {"grad_norm", "learning_rate"}
        metrics |= {name: rate.item() for name, rate in rates.items()}
        results.append((step, snapshot(named(new, layout)), metrics))
    return results


def visits(plan):
    """Return each visited pair's number, in order."""
    return [pair["number"] for group in plan for batch in group for pair in batch]


def numbered(count):
    return [pair | {"number": i} for i, pair in enumerate(random_pairs(count))]


SIZES = [(1, 4, 1), (3, 4, 2), (8, 4, 1), (10, 3, 1), (10, 2, 2), (7, 1, 4), (31, 4, 1)]


@pytest.mark.parametrize("count, size, accumulation", SIZES)
def test_one_epoch_visits_every_pair_once(count, size, accumulation):
    args = options("--batch-size", size, "--grad-accumulation-steps", accumulation)
    plan = dpo_trainer.plan_updates(numbered(count), args)
    assert sorted(visits(plan)) == list(range(count))
    batches = math.ceil(count / size)
    assert len(plan) == math.ceil(batches / accumulation)  # the last, partial window is there
    assert [len(group) for group in plan[:-1]] == [accumulation] * (len(plan) - 1)
    assert len(plan[-1]) == batches - accumulation * (len(plan) - 1)
    flat = sum(plan, [])
    assert sorted(map(len, flat)) == sorted([size] * (count // size) + [count % size] * (count % size > 0))


def longer_answer(pair):
    return max(len(pair["chosen"]), len(pair["rejected"]))


def computed_tokens(pairs, size):
    """Return how many tokens the model computes, padding included, with the pairs cut into batches as they stand."""
    arrays = [dpo_trainer.make_batch(pairs[i : i + size]) for i in range(0, len(pairs), size)]
    return sum(batch["mask"].size + batch["prompts"].size for batch in arrays)


@pytest.mark.parametrize("count, size", [(1, 4), (7, 1), (8, 4), (10, 3), (31, 4), (100, 4)])
@pytest.mark.parametrize("prompt, answer", [(30, 13), (300, 40), (40, 300), (300, 300)])
def test_batches_have_pairs_of_like_lengths(count, size, prompt, answer):
    """No plain order has less padding; where only prompts differ, batches are sorted by these."""
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(1, prompt), *rng.integers(2, answer, 2)) for _ in range(count)]
    pairs = [pair | {"number": i} for i, pair in enumerate(pairs_of(lengths))]
    batches = dpo_trainer.sorted_batches(pairs, size)
    assert sorted(visits([batches])) == list(range(count))
    assert [len(batch) for batch in batches] == [size] * (count // size) + [count % size] * (count % size > 0)
    whole = lambda pair: len(pair["prompt"]) + longer_answer(pair)
    for key in (lambda pair: 0, lambda pair: len(pair["prompt"]), longer_answer, whole):
        assert computed_tokens(sum(batches, []), size) <= computed_tokens(sorted(pairs, key=key), size)
    if count > 8 and size > 1 and min(prompt, answer) > 2 * dpo_trainer.PAD:
        assert computed_tokens(sum(batches, []), size) < computed_tokens(pairs, size)
    alike = dpo_trainer.sorted_batches(pairs_of([(n, 5, 9) for n, *_ in lengths]), size)
    assert (found := [len(pair["prompt"]) for pair in sum(alike, [])]) == sorted(found)


def test_padding_by_hand():
    """At 8s: of 16 + 2 * 8 tokens 13 are the prompt's and 4 + 2 the answers'; of 2 * 8 in whole rows 2 * 2, 4 + 2."""
    pad, share = dpo_trainer.PAD, dpo_trainer.padding_share
    long, short = ({"prompt": [7] * n, "chosen": [7] * 4, "rejected": [7] * 2, "weight": 1.0} for n in (2 * pad - 2, 3))
    assert share([[long]], 0.9) == pytest.approx(1 - (2 * pad - 3 + 6) / (4 * pad))
    assert share([[short]], 0.9) == pytest.approx(1 - 10 / (2 * pad))
    assert share([[long], [short]], 0.9) == pytest.approx(1 - (2 * pad - 3 + 16) / (6 * pad))
    assert share([[long]], 0) == pytest.approx(1 - (2 * (2 * pad - 3) + 6) / (6 * pad))  # 3 * 8 a row


def test_epochs_have_their_own_orders_that_repeat_by_seed():
    def order(*words):
        return visits(dpo_trainer.plan_updates(numbered(20), options("--batch-size", 1, *words)))

    first = order("--epochs", 3)
    epochs = [tuple(first[i : i + 20]) for i in (0, 20, 40)]
    assert len(first) == 60 and len(set(epochs)) == 3 and all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert order("--epochs", 3) == first != order("--epochs", 3, "--seed", 1)
    assert order("--epochs", 1) == first[:20]


def test_iters_cut_and_extend():
    words = ("--batch-size", 2, "--grad-accumulation-steps", 2)  # 10 pairs: 5 batches, 3 updates an epoch

    def plan(*more):
        return dpo_trainer.plan_updates(numbered(10), options(*words, *more))

    long = plan("--iters", 7)
    assert len(long) == 7 and visits(long[:6]) == visits(plan("--epochs", 2))
    assert visits(plan("--iters", 2)) == visits(plan("--iters", 2, "--epochs", 9)) == visits(long)[:8]
    assert visits(plan("--iters", 3)) == visits(plan()) and len(plan("--iters", 100)) == 100


def plain_training(folder, start, plan, args, optimizer):
    """Return parameters and gradient norms after each update: mlx-lm's model, a row at a time, clipped by hand."""
    restore_swiglu()
    model = mlx_lm.load(str(folder))[0]
    dpo_trainer.trainable_parameters(model, args)

    def logp(pair, side):
        logits = model(mx.array([pair["prompt"] + pair[side]]))[0, len(pair["prompt"]) - 1 : -1]
        rows = mx.arange(len(logits))
        return (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[rows, mx.array(pair[side])].sum()

    def loss(params, pair):
        model.update(tree_unflatten(list(params.items())))
        won, lost = (logp(pair, side) - ref for side, ref in zip(("chosen", "rejected"), pair["ref_logps"].tolist()))
        return -mx.log(mx.sigmoid(args.beta * (won - lost)))

    results, params = [], start
    for group in plan:
        pairs = sum(group, [])
        gradients = [mx.grad(loss)(params, pair) for pair in pairs]
        mean = tree_map(lambda *g: sum(g) / len(pairs), *gradients)
        norm = math.sqrt(sum((g**2).sum().item() for g in mean.values()))
        params = optimizer.apply_gradients(tree_map(lambda g: g * min(1, 1 / norm), mean), params)
        results.append((snapshot(params), norm))
    return results


KINDS = {  # options, and what is extra about the model
    "checkpointed": (["--grad-checkpoint"], {}),
    "4-bit": ([], dict(bits=4)),
    "dora": (["--fine-tune-type", "dora"], {}),
    "full": (["--fine-tune-type", "full"], {}),
    "full, checkpointed": (["--fine-tune-type", "full", "--grad-checkpoint"], {}),
    **{family: ([], dict(family=family)) for family in FAMILIES},
    "mixtral, checkpointed": (["--grad-checkpoint"], dict(family="mixtral")),
    "gemma3, checkpointed": (["--grad-checkpoint"], dict(family="gemma3_text")),  # every other layer has a window
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, rate", [("sgd", 0.02), ("adamw", 0.002)])
def test_updates_equal_plain_ones(tmp_path, name, rate, kind):
    """The compiled step carries its optimizer's state along; what makes it faster changes no number."""
    optimizer = optim.SGD(rate) if name == "sgd" else optim.AdamW(rate, bias_correction=True)
    words = ["--optimizer", name, "--learning-rate", rate, "--lr-schedule", "constant", *KINDS[kind][0]]
    folder = save_model(tmp_path, **KINDS[kind][1])
    args, model, params, layout, pairs = set_up(folder, *words, count=7, noise=0.02)
    pairs[:2] = [pair | {"prompt": pair["prompt"][:1]} for pair in pairs[:2]]  # nothing stands apart
    args.share, plan = math.inf, [[pairs[:2], pairs[2:4]], [pairs[4:6], pairs[6:]]]  # the other prompts do
    steps = run(model, params, layout, plan, args)
    plain = plain_training(folder, named(params, layout), plan, args, optimizer)
    for (_, new, metrics), (expected, norm) in zip(steps, plain, strict=True):
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 1
        assert set(new) == set(expected)
        gaps = np.sort(np.concatenate([np.abs(new[name] - expected[name]).flatten() for name in new]))
        assert gaps[int(0.99 * len(gaps))] < 5e-6 and gaps[-1] < rate / 2
        assert name != "sgd" or gaps[-1] < 1e-6  # Adam takes whole steps even where a gradient is rounding alone


SETUPS = {
    "lora": ({}, [], 1e-5),
    "lora 4-bit": (dict(bits=4), [], 1e-5),
    "lora bfloat16": (dict(dtype=mx.bfloat16), [], 5e-3),
    "lora 4-bit bfloat16": (dict(bits=4, dtype=mx.bfloat16), [], 5e-3),
    "lora mixtral": (dict(family="mixtral"), [], 1e-5),
    "dora": ({}, ["--fine-tune-type", "dora"], 1e-5),
    "dora 4-bit": (dict(bits=4), ["--fine-tune-type", "dora"], 1e-5),
    "dora bfloat16": (dict(dtype=mx.bfloat16), ["--fine-tune-type", "dora"], 5e-3),
    "full": ({}, ["--fine-tune-type", "full"], 1e-5),
    "full bfloat16": (dict(dtype=mx.bfloat16), ["--fine-tune-type", "full"], 5e-3),
}


@pytest.mark.parametrize("name", SETUPS)
def test_step_0_is_log_2(name, tmp_path):
    extra, words, tolerance = SETUPS[name]
    args, model, params, layout, pairs = set_up(save_model(tmp_path, **extra), *words)
    assert all(w.dtype == mx.float32 for _, w in tree_flatten(params))  # the masters; cast, or all activations were too
    dpo_trainer.install(model, dpo_trainer.unpack(params, layout))
    dtype = extra.get("dtype", mx.float32)
    for share in (0, 1e-9, math.inf):
        batch = dpo_trainer.make_batch(pairs, share)
        assert dpo_trainer.head_logits(model, dpo_trainer.response_states(model, batch), batch).dtype == dtype
    compute = mx.float32 if args.fine_tune_type == "dora" else dtype
    assert {w.dtype for _, w in tree_flatten(model.trainable_parameters())} == {compute}
    initial = params if args.fine_tune_type != "full" else None
    measured = dpo_trainer.evaluate(model, params, initial, layout, pairs, args, dpo_trainer.dpo_metrics)
    assert measured["loss"] == pytest.approx(LOG_2, abs=tolerance)
    assert measured["rewards/margins"] == pytest.approx(0, abs=tolerance)
    assert measured["perplexity/chosen"] == pytest.approx(measured["perplexity/ref_chosen"], rel=tolerance)
    assert (measured["kl"] == 0) if initial else ("kl" not in measured)
    [(step, _, metrics)] = run(model, params, layout, [[pairs[:4], pairs[4:]]], args)
    assert step == 1 and metrics["grad_norm"] > 0
    np.testing.assert_allclose(metrics["loss"], [LOG_2] * 6, atol=tolerance)
    np.testing.assert_allclose(metrics["rewards/margins"], [0] * 6, atol=tolerance)


def rates(*words, updates=20, steps=None):
    """Return the rate of each update."""
    optimizer, params, found = dpo_trainer.make_optimizer(options(*words), updates), {"w": mx.zeros(2)}, []
    for _ in range(steps or updates):
        params = optimizer.apply_gradients({"w": mx.ones(2)}, params)
        found.append(optimizer.learning_rate.item())
    return found


def test_cosine_after_a_tenth_of_warmup():
    """20 updates: 2 of warmup, to the peak; from there half a cosine over 18, which would end at 0 one update on."""
    found = rates("--learning-rate", 1e-3, steps=22)
    expected = [0.5e-3, 1e-3] + [1e-3 * (1 + math.cos(math.pi * i / 18)) / 2 for i in range(18)] + [0, 0]
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[11] == pytest.approx(0.5e-3) and 0 < found[19] < 1e-5


WARMUPS = [(5, [0.2, 0.4, 0.6, 0.8, 1.0]), (0.2, [0.25, 0.5, 0.75, 1.0]), (1, [1.0]), (0, [])]


@pytest.mark.parametrize("warmup, first", WARMUPS)
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_warmup_is_a_share_or_a_number_of_updates(warmup, first, schedule):
    found = rates("--learning-rate", 1, "--lr-schedule", schedule, "--warmup", warmup)
    falling = 20 - len(first)
    rest = [1 - i / falling if schedule == "linear" else 1.0 for i in range(falling)]
    assert found == pytest.approx(first + rest, abs=1e-6)


@pytest.mark.parametrize("name", dpo_trainer.OPTIMIZERS)
def test_every_optimizer_follows_the_rate(name):
    """Adafactor took a step of its own; Adam, without bias correction, one of 0.1 / sqrt(0.001) = 3.2 rates."""
    steps = []
    for rate in (1e-4, 1e-2):
        words = ("--optimizer", name, "--learning-rate", rate, "--warmup", 0)
        optimizer, params = dpo_trainer.make_optimizer(options(*words), 10), {"w": mx.ones((4, 4))}
        new = optimizer.apply_gradients({"w": mx.random.normal((4, 4), key=mx.random.key(0))}, params)
        steps.append(mx.abs(new["w"] - 1).max().item())
        assert steps[-1] == pytest.approx(rate, rel=0.02) if "adam" in name else steps[-1] > 0
    assert steps[1] / steps[0] == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("name", dpo_trainer.OPTIMIZERS)
def test_every_optimizer_trains_matrices_and_vectors(tiny, name):
    words = ("--optimizer", name, "--fine-tune-type", "full", "--num-layers", 1)
    args, model, params, layout, pairs = set_up(tiny, *words, count=2)
    steps = run(model, params, layout, [[pairs]] * 2, args)
    assert len(steps) == 2 and 0 < distance(steps[1][1], named(params, layout)) < 0.2


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", dpo_trainer.OPTIMIZERS)
def test_small_parameters_are_one_vector_where_the_optimizer_sees_no_shapes(tmp_path, name, kind):
    """Adafactor and Muon go by the matrix; a full model's are large, and stay apart."""
    args = options("--fine-tune-type", kind, "--optimizer", name)
    model = mlx_lm.load(str(save_model(tmp_path, dtype=mx.bfloat16)))[0]
    params, layout = dpo_trainer.trainable_parameters(model, args)
    before = dict(tree_flatten(model.trainable_parameters()))
    assert [(name, shape) for name, shape, _ in layout] == [(name, w.shape) for name, w in before.items()]
    assert {dtype for *_, dtype in layout} == {mx.float32 if kind == "dora" else mx.bfloat16}
    together = kind != "full" and name in ("adamw", "adam", "sgd")
    sizes = {"vector": sum(w.size for w in before.values())} if together else {n: w.size for n, w in before.items()}
    assert {name: w.size for name, w in params.items()} == sizes
    assert {w.dtype for w in params.values()} == {mx.float32}
    weights = dpo_trainer.unpack(params, layout)
    assert [(name, w.shape, w.dtype) for name, w in weights.items()] == layout
    assert distance(weights, {name: w.astype(dtype) for (name, w), (*_, dtype) in zip(before.items(), layout)}) == 0
    assert distance(named(params, layout), before) == 0  # nothing is rounded on the way
    assert distance(dpo_trainer.pack(named(params, layout), together), params) == 0


def test_muon_trains_a_matrix_as_a_matrix(tiny):
    """Its steps are orthogonal: a vector of all matrices would be taken for none of them."""
    words = ("--optimizer", "muon", "--learning-rate", 1e-3, "--lr-schedule", "constant")
    args, model, params, layout, pairs = set_up(tiny, *words, noise=0.02)
    [(_, new, _)] = run(model, params, layout, [[pairs]], args)
    steps = [new[name] - np.array(w) for name, w in params.items()]
    assert all(step.ndim == 2 for step in steps)
    spreads = [np.linalg.svd(step, compute_uv=False) for step in steps]
    assert all(spread[len(spread) // 2] > 0.3 * spread[0] > 0 for spread in spreads)


def response_distributions(model, pair, side):
    """Return the float64 log-probabilities (R, V) at each response token, from an unpadded call."""
    logps = log_softmax(model(mx.array([pair["prompt"] + pair[side]]))[0])
    return logps[len(pair["prompt"]) - 1 : -1]


def measure_by_hand(policy, base, pairs, args):
    """Return evaluate's metrics computed a row at a time from both models, in float64."""
    kl, tokens, sums, refs = 0.0, 0, [], []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            p, q = (response_distributions(model, pair, side) for model in (policy, base))
            kl, tokens = kl + (np.exp(p) * (p - q)).sum(), tokens + len(pair[side])
            sums.append(p[range(len(p)), pair[side]].sum())
            refs.append(q[range(len(q)), pair[side]].sum())
    (chosen, rejected), (ref_chosen, ref_rejected) = np.reshape(sums, (2, -1)), np.reshape(refs, (2, -1))
    margins = args.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    chosen_tokens = sum(len(pair["chosen"]) for pair in pairs)
    return {
        "loss": np.log(1 + np.exp(-margins)).mean(),
        "rewards/chosen": args.beta * (chosen - ref_chosen).mean(),
        "rewards/rejected": args.beta * (rejected - ref_rejected).mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "logps/accuracies": (chosen > rejected).mean(),
        "ref_logps/accuracies": (ref_chosen > ref_rejected).mean(),
        "perplexity/chosen": math.exp(-chosen.sum() / chosen_tokens),
        "perplexity/ref_chosen": math.exp(-ref_chosen.sum() / chosen_tokens),
        "kl": kl / tokens,
        "pairs": len(pairs),
    }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_evaluate_by_hand(tiny, kind):
    """Nine pairs in batches of four: the odd one weighs as much as any other."""
    args, model, params, layout, pairs = set_up(tiny, "--fine-tune-type", kind, count=9)
    moved = tree_map(lambda w: w + 0.01 * mx.random.normal(w.shape, key=mx.random.key(w.size)), params)
    measured = dpo_trainer.evaluate(model, moved, params, layout, pairs, args, dpo_trainer.dpo_metrics)
    restore_swiglu()
    base, policy = (mlx_lm.load(str(tiny))[0] for _ in range(2))
    dpo_trainer.trainable_parameters(policy, args)  # mlx-lm's own layers, not lightened
    policy.update(tree_unflatten(list(named(moved, layout).items())))
    expected = measure_by_hand(policy, base, pairs, args)
    assert set(measured) == set(expected) and expected["kl"] > 1e-3
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_sample_is_seeded(tiny):
    args, model, params, layout, pairs = set_up(tiny, "--batch-size", 2, count=20, noise=0.02)

    def measure(size, seed=0):
        args.seed = seed
        return dpo_trainer.evaluate(model, params, None, layout, pairs, args, dpo_trainer.dpo_metrics, size)

    sample, whole = measure(2), measure(-1)
    assert sample == measure(2) and sample["loss"] != measure(2, seed=1)["loss"] and sample["loss"] != whole["loss"]
    assert measure(10) == whole == measure(1000)
    ones = [dpo_trainer.evaluate(model, params, None, layout, [pair], args, dpo_trainer.dpo_metrics) for pair in pairs]
    drawn = random.Random(0).sample(ones, 4)  # 2 batches of 2
    assert sample["loss"] == pytest.approx(np.mean([one["loss"] for one in drawn]), rel=1e-5)
    assert sample["ref_logps/accuracies"] == np.mean([one["ref_logps/accuracies"] for one in drawn])


WORDS = [[], ["--num-layers", 1], ["--keys", "self_attn.q_proj"], ["--fine-tune-type", "dora"]]
WORDS += [["--fine-tune-type", "full", "--learning-rate", 1e-3, *layers] for layers in ([], ["--num-layers", 1])]
WORDS += [[*words, "--grad-checkpoint"] for words in (WORDS[0], WORDS[1], WORDS[-1])]


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_what_is_trained_learns_and_the_rest_stays(tiny, words):
    args, model, params, layout, pairs = set_up(tiny, "--learning-rate", 3e-3, *words, count=4)
    before = snapshot(model.parameters())
    steps = run(model, params, layout, [[pairs]] * 6, args)
    losses, full = [metrics["loss"].mean() for _, _, metrics in steps], "full" in words
    assert losses[0] == pytest.approx(LOG_2, abs=1e-5) and losses[-1] < (0.8 if full else 0.5) * losses[0]
    dpo_trainer.install(model, {name: mx.array(w) for name, w in steps[-1][1].items()})
    after, trained = snapshot(model.parameters()), set(steps[-1][1])
    assert trained == {name for name in before if not np.array_equal(before[name], after[name])}
    layers = ("model.layers.1.",) if "--num-layers" in words else ("model.layers.0.", "model.layers.1.")
    assert {name[:15] for name in trained} == set(layers)
    if full:
        assert trained == {name for name in before if name.startswith(layers)} != set(before)
    else:
        assert {name.rsplit(".", 1)[-1] for name in trained} <= {"lora_a", "lora_b", "m"}
    if "--keys" in words:
        assert all(".self_attn.q_proj." in name for name in trained)


def test_the_same_seed_trains_the_same(tiny):
    def train(seed):
        args, model, params, layout, pairs = set_up(tiny, "--seed", seed, "--learning-rate", 1e-3)
        return run(model, params, layout, dpo_trainer.plan_updates(pairs, args), args)[-1][1]

    one, two, other = train(0), train(0), train(1)
    assert all(np.array_equal(one[name], two[name]) for name in one) and distance(one, other) > 1e-3


def test_dropout_is_for_training_only_and_differs_between_updates(tiny):
    """A compiled step that does not carry the random state along drops the same inputs each time."""
    found = {}
    for dropout in (0, 0.5):
        args, model, params, layout, pairs = set_up(tiny, "--dropout", dropout, "--learning-rate", 1e-30, noise=0.03)
        before = dpo_trainer.evaluate(model, params, None, layout, pairs, args, dpo_trainer.dpo_metrics)
        losses = [metrics["loss"].mean() for _, _, metrics in run(model, params, layout, [[pairs]] * 3, args)]
        assert dpo_trainer.evaluate(model, params, None, layout, pairs, args, dpo_trainer.dpo_metrics) == before
        found[dropout] = before["loss"], *losses
    assert found[0] == pytest.approx([found[0.5][0]] * 4, rel=1e-5)
    assert len(set(found[0.5])) == 4 and min(abs(loss - found[0][0]) for loss in found[0.5][1:]) > 1e-4


@pytest.mark.parametrize("words", [[], ["--grad-checkpoint"]], ids=str)
def test_the_gradient_is_of_the_inputs_that_were_dropped(tiny, words):
    """Layers that are computed twice dropped other inputs the second time: the gradient was not the loss's at all."""
    args, model, params, layout, pairs = set_up(tiny, "--dropout", 0.5, *words, noise=0.03)
    batch = dpo_trainer.make_batch(pairs, args.share)

    def loss(params):
        mx.random.seed(5)
        weights = dpo_trainer.unpack(params, layout)
        logps = dpo_trainer.completion_logps(dpo_trainer.install(model, weights, training=True), batch)
        return dpo_trainer.dpo_metrics(logps, batch, args)["loss"].sum()

    gradient = mx.grad(loss)(params)["vector"]
    norm = mx.linalg.norm(gradient)
    ahead, behind = (loss({"vector": params["vector"] + step * gradient / norm}) for step in (1e-4, -1e-4))
    assert norm.item() > 1 and ((ahead - behind) / 2e-4).item() == pytest.approx(norm.item(), rel=0.01)


def good_steps(steps):
    """Return the updates that were made; the norms of the others, all after them, must be nan, their parameters old."""
    norms = [metrics["grad_norm"] for *_, metrics in steps]
    count = next((i for i, norm in enumerate(norms) if not math.isfinite(norm)), len(steps))
    assert all(math.isnan(norm) for norm in norms[count:])
    for _, new, _ in steps[count:] if count else []:
        assert distance(new, steps[count - 1][1]) == 0
    return steps[:count]


def test_an_absurd_rate_makes_no_update_that_is_not_finite(tiny):
    args, model, params, layout, pairs = set_up(tiny, "--optimizer", "sgd", "--lr-schedule", "constant")
    args.learning_rate = 1e30  # more than parse_args takes
    steps = run(model, params, layout, [[pairs]] * 5, args)
    assert len(steps) == 5 and 0 < len(good_steps(steps)) < 5
    for _, new, metrics in good_steps(steps):
        assert all(np.isfinite(w).all() for w in new.values()) and np.isfinite(metrics["loss"]).all()
    params = tree_map(lambda w: mx.full(w.shape, math.inf), params)
    steps = run(model, params, layout, [[pairs]] * 2, args)
    assert good_steps(steps) == [] and all(np.isposinf(w).all() for _, new, _ in steps for w in new.values())


# the last: a loss of inf whose gradient, beta, is finite; it went on, and reported inf
BAD = [{"weight": math.inf}, {"weight": math.nan}, {"ref_logps": (math.inf, 0.0)}]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_an_update_whose_loss_is_not_finite_is_not_made_nor_any_after_it(tiny, bad, place):
    """The bad pair is in the first or in the last batch of the third update; the fourth and fifth would be good."""
    args, model, params, layout, pairs = set_up(tiny, "--learning-rate", 1e-3)
    group = [[pair] for pair in pairs[:2]]
    group[place] = [group[place][0] | bad]
    steps = run(model, params, layout, [[pairs], [pairs], group, [pairs], [pairs]], args)
    assert [step for step, _, _ in steps] == [1, 2, 3, 4, 5]
    assert [step for step, _, _ in good_steps(steps)] == [1, 2] and distance(steps[0][1], steps[1][1]) > 0
    assert all(np.isfinite(w).all() for w in steps[-1][1].values())


def test_a_weight_of_0_takes_its_pair_out(tiny):
    """Its loss and gradient are 0, though the mean is still over all pairs."""
    args, model, params, layout, pairs = set_up(tiny, "--optimizer", "sgd", "--learning-rate", 1e-2, noise=0.02)
    muted = [pairs[0], pairs[1] | {"weight": 0.0}]
    [(_, _, alone)], [(_, _, both)] = (run(model, params, layout, [[batch]], args) for batch in (pairs[:1], muted))
    assert both["grad_norm"] == pytest.approx(alone["grad_norm"] / 2, rel=1e-5)
    assert both["loss"][1] == 0 and both["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-5)
