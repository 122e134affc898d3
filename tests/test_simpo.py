"""SimPO's losses by hand, against numpy in float64 and by finite differences; its metrics; whole runs."""

import json
import math
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import few, make_rows, run_script, save_model, write_rows
from test_logps import by_hand, random_pairs, widths

import simpo_trainer as simpo

ODDS = math.log(math.exp(-0.5) / (1 - math.exp(-0.5))) - math.log(math.exp(-1.5) / (1 - math.exp(-1.5)))


def softplus(x):
    return math.log1p(math.exp(x))


def options(loss="sigmoid", **given):
    usual = {"beta": 0.1, "gamma": 0.0, "sft_weight": 1.0} if loss in ("cpo", "orpo") else {"beta": 2.0, "gamma": 1.0}
    return SimpleNamespace(**{"loss": loss, "sft_weight": 0.0, "label_smoothing": 0.0} | usual | given)


def batch_of(lengths, weight, prompt=3, padding=0):
    """Return a batch without its rows; lengths: answer tokens, the chosen answers' first."""
    mask = np.zeros((len(lengths), prompt + max(lengths) + padding), np.float32)
    for row, length in zip(mask, lengths):
        row[prompt : prompt + length] = 1
    return {"mask": mx.array(mask), "weight": mx.array(weight)}


def metrics_of(w, l, w_length, l_length, *place, **given):
    """Return the metrics of one pair: log-probabilities and lengths of its chosen and its rejected answer."""
    logps = mx.array([float(w), float(l)])
    found = simpo.simpo_metrics(logps, batch_of([w_length, l_length], [1.0], *place), options(**given))
    return {name: values.item() for name, values in found.items()}


# ----------------------------------------------------------------------------------------------------------- losses

BY_HAND = [  # options: the loss and the rewards of -4 over 8 tokens (mean -0.5) against -6 over 4 (mean -1.5)
    ({}, softplus(-1), (-1, -3)),  # 2 * (-0.5 + 1.5) - 1 = 1
    ({"beta": 2.5, "gamma": 0.5}, softplus(-2), (-1.25, -3.75)),
    ({"gamma": 3.0}, softplus(1), (-1, -3)),  # absolute: neither times nor over beta
    ({"label_smoothing": 0.25}, 0.75 * softplus(-1) + 0.25 * softplus(1), (-1, -3)),
    ({"sft_weight": 0.5}, softplus(-1) + 0.25, (-1, -3)),
    ({"loss": "hinge", "gamma": 1.5}, 0.5, (-1, -3)),  # 1 - 0.5
    ({"loss": "hinge", "gamma": 0.0}, 0.0, (-1, -3)),  # 1 - 2 is below 0
    ({"loss": "cpo"}, softplus(-0.2) + 0.5, (-0.4, -0.6)),
    ({"loss": "cpo", "sft_weight": 0.0, "label_smoothing": 0.5}, (softplus(-0.2) + softplus(0.2)) / 2, (-0.4, -0.6)),
    ({"loss": "orpo"}, 0.1 * softplus(-ODDS) + 0.5, (-0.05, -0.15)),
]


@pytest.mark.parametrize("given, loss, rewards", BY_HAND)
def test_losses_by_hand(given, loss, rewards):
    found = metrics_of(-4, -6, 8, 4, **given)
    assert found["loss"] == pytest.approx(loss, abs=1e-6)
    assert (found["rewards/chosen"], found["rewards/rejected"]) == pytest.approx(rewards)


def test_a_sum_can_prefer_what_the_mean_does_not():
    """The longer answer loses in sum, -12 against -8, and wins a token, -1 against -2."""
    assert metrics_of(-12, -8, 12, 4)["rewards/accuracies"] and metrics_of(-12, -8, 12, 4)["rewards/margins"] == 2
    assert not metrics_of(-12, -8, 12, 4, loss="cpo")["rewards/accuracies"]


def numpy_loss(w, l, w_length, l_length, o):
    """Return the losses in float64 from probabilities, as the papers write them."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    margin = o.beta * (w - l) if o.loss == "cpo" else o.beta / w_length * w - o.beta / l_length * l - o.gamma
    found = -(1 - o.label_smoothing) * np.log(sigmoid(margin)) - o.label_smoothing * np.log(sigmoid(-margin))
    if o.loss == "hinge":
        found = np.clip(1 - margin, 0, None)
    if o.loss == "orpo":
        p, q = np.exp(w / w_length), np.exp(l / l_length)
        found = -o.beta * np.log(sigmoid(np.log((p / (1 - p)) / (q / (1 - q)))))
    return found - o.sft_weight * w / w_length


@pytest.mark.parametrize("loss", simpo.SIMPO_LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_equal_numpys(loss, seed):
    """The gradients are those of finite differences in float64, by each answer's own length."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, (2, 200))
    w, l = -(0.05 + random.gamma(1.5, 0.6, (2, 200))) * lengths
    given = {"sft_weight": random.uniform(0, 2), "label_smoothing": random.uniform(0, 0.5)}
    given |= {} if loss in ("cpo", "orpo") else {"beta": random.uniform(1, 10), "gamma": random.uniform(0, 4)}
    o, batch = options(loss, **given), batch_of(lengths.flatten().tolist(), [1.0] * 200)
    oracle = lambda w, l: numpy_loss(w, l, *lengths, o)
    logps = mx.array(np.float32(np.concatenate([w, l])))
    found = simpo.simpo_metrics(logps, batch, o)
    np.testing.assert_allclose(np.array(found["loss"]), oracle(w, l), rtol=2e-5, atol=2e-5)
    side = [w, l] if loss == "cpo" else [w, l] / lengths
    rewards = [np.array(found[name]) for name in ("rewards/chosen", "rewards/rejected")]
    np.testing.assert_allclose(rewards, o.beta * np.array(side), rtol=1e-5)
    gradient = mx.grad(lambda x: simpo.simpo_metrics(x, batch, o)["loss"].sum())(logps)
    slopes = [(oracle(w + dw, l + dl) - oracle(w - dw, l - dl)) / 2e-5 for dw, dl in ((1e-5, 0), (0, 1e-5))]
    np.testing.assert_allclose(np.array(gradient).reshape(2, -1), slopes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", simpo.SIMPO_LOSSES)
@pytest.mark.parametrize("numbers", [(0, -1e5), (-1e5, 0), (0, 0), (-1e-8, -1e-8)])
def test_extremes_stay_finite(loss, numbers):
    """An answer that is certain has infinite odds; one that cannot be has none."""
    function = lambda x: simpo.simpo_metrics(x, batch_of([5, 5], [1.0]), options(loss))["loss"].sum()
    value, gradient = mx.value_and_grad(function)(mx.array([float(x) for x in numbers]))
    assert mx.isfinite(mx.stack([value, *gradient])).all()


# ---------------------------------------------------------------------------------------------------------- metrics


def test_two_pairs_one_right():
    batch = batch_of([8, 2, 4, 4], [1.0, 0.5])
    found = simpo.simpo_metrics(mx.array([-4.0, -5.0, -6.0, -2.0]), batch, options())
    expected = {
        "loss": [softplus(-1), 0.5 * softplus(5)],  # 2 * (-2.5 + 0.5) - 1 = -5
        "rewards/chosen": [-1, -5],
        "rewards/rejected": [-3, -1],
        "rewards/margins": [2, -4],
        "rewards/accuracies": [1, 0],
        "logps/chosen": [-4, -5],
        "logps/rejected": [-6, -2],
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(np.array(found[name], np.float32), values, atol=1e-5, err_msg=name)
    assert simpo.mean_metrics([(found, 2)])["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("loss", simpo.SIMPO_LOSSES)
def test_prompts_and_padding_do_not_count(loss):
    one, *others = (metrics_of(-4, -6, 8, 4, *place, loss=loss) for place in ((1, 0), (70, 0), (3, 55)))
    assert others == [one] * 2


@pytest.mark.parametrize("loss", simpo.SIMPO_LOSSES)
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared"])
def test_a_model_equals_the_formula(loss, shared, tiny):
    """Batch, model and metrics together, weights too, against a float64 log-softmax of each answer by itself."""
    model, pairs = mlx_lm.load(str(tiny))[0], random_pairs([(9, 4, 17), (30, 12, 5), (2, 1, 3)])
    for pair, weight in zip(pairs, (1.0, 0.5, 2.0)):
        pair["weight"] = weight
    batch, o = simpo.make_batch(pairs, widths(pairs, shared, 8)), options(loss, sft_weight=0.3)
    found = simpo.simpo_metrics(simpo.answer_logps(model, batch)[0], batch, o)
    for i, pair in enumerate(pairs):
        sums = [by_hand(model, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        expected = pair["weight"] * numpy_loss(*sums, len(pair["chosen"]), len(pair["rejected"]), o)
        assert found["loss"][i].item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simpo")
    save_model(folder / "tiny")
    write_rows(folder / "pairs.jsonl", make_rows(24))
    return folder


@pytest.mark.parametrize("loss", few(simpo.SIMPO_LOSSES, 1))
def test_a_run_learns(place, loss):
    """It starts as the model is, at no kl, and ends with each chosen answer ahead, at one."""
    words = ["--model", "tiny", "--data", "pairs.jsonl", "--steps-per-report", 2, "--epochs", 8, "--loss", loss]
    words += ["--learning-rate", 2e-3, "--adapter-path", loss]
    done = run_script(*words, script="simpo_trainer.py", cwd=place)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (place / loss / "metrics.jsonl").read_text().splitlines()]
    train, valid = ([row for row in found if row["split"] == split] for split in ("train", "valid"))
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["rewards/accuracies"] == 1
    assert valid[0]["step"] == 0 and valid[0]["kl"] == pytest.approx(0, abs=1e-6) and valid[-1]["kl"] > 1e-3
    assert not any("ref" in name for row in found for name in row)


@pytest.mark.parametrize("loss", simpo.SIMPO_LOSSES)
def test_each_loss_has_its_own_defaults(loss):
    given = ["--model", "none", "--data", "none", "--loss", loss]
    for words, changed in ((given, {}), ([*given, "--beta", "3", "--sft-weight", "0"], {"beta": 3, "sft_weight": 0})):
        args, expected = simpo.parse_args(words), vars(options(loss, **changed))
        assert {name: getattr(args, name) for name in expected} == expected
