"""DPO's losses by hand, against numpy in float64 and by finite differences; the metrics of a pair; the first step."""

import json
import math
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, make_rows, run_script, save_model, write_rows

import dpo_trainer as dpo

# log(1 + exp(-0.2)) and log(1 + exp(0.2)), the sigmoid losses of a margin of 0.2 and of -0.2
WON, LOST, LOG_2 = 0.5981388694, 0.7981388694, math.log(2)


def options(**given):
    known = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "delta": 5.0, "length_normalize": False}
    return SimpleNamespace(**known | given)


def loss_of(w, l, loss="sigmoid", **given):
    """Return the loss of one pair's log-ratios."""
    return dpo.DPO_LOSSES[loss](mx.array([w]), mx.array([l]), options(**given)).item()


def batch_of(lengths, ref_logps, weight, prompt=3, padding=0):
    """Return a batch without its rows; lengths: answer tokens, the chosen answers' first; ref_logps: by pair."""
    mask = np.zeros((len(lengths), prompt + max(lengths) + padding), np.float32)
    for row, length in zip(mask, lengths):
        row[prompt : prompt + length] = 1
    return {"mask": mx.array(mask), "ref_logps": mx.array(ref_logps), "weight": mx.array(weight)}


# ----------------------------------------------------------------------------------------------------------- losses

BY_HAND = [  # options: the losses of a won pair, of a lost one, and of one as it was
    ({}, WON, LOST, LOG_2),
    ({"beta": 0.2}, math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(0.4)), LOG_2),
    ({"label_smoothing": 0.25}, 0.75 * WON + 0.25 * LOST, 0.75 * LOST + 0.25 * WON, LOG_2),
    ({"loss": "robust", "label_smoothing": 0.25}, 1.5 * WON - 0.5 * LOST, 1.5 * LOST - 0.5 * WON, LOG_2),
    ({"loss": "robust"}, WON, LOST, LOG_2),
    ({"loss": "hinge"}, 0.8, 1.2, 1),  # 1 - 0.2, 1 + 0.2
    ({"loss": "hinge", "beta": 0.6}, 0.0, 2.2, 1),  # 1 - 1.2 is below 0
    ({"loss": "ipo"}, 9.0, 49.0, 25),  # (2 - 1 / 0.2) ** 2, (-2 - 5) ** 2
    ({"loss": "ipo", "beta": 0.25}, 0.0, 16.0, 4),  # (2 - 1 / 0.5) ** 2
    ({"loss": "dpop"}, WON, LOST + 5, LOG_2),  # only the lost pair's chosen answer lost a nat
    ({"loss": "dpop", "delta": 0.7, "label_smoothing": 0.5}, (WON + LOST) / 2, (WON + LOST) / 2 + 0.7, LOG_2),
]


@pytest.mark.parametrize("given, won, lost, same", BY_HAND)
def test_losses_by_hand(given, won, lost, same):
    """Log-ratios of 1 and -1 nats: at beta 0.1 a margin of 0.2."""
    assert loss_of(1.0, -1.0, **given) == pytest.approx(won, abs=1e-6)
    assert loss_of(-1.0, 1.0, **given) == pytest.approx(lost, abs=1e-5)
    assert loss_of(0.0, 0.0, **given) == pytest.approx(same, abs=1e-6)


def numpy_losses(w, l, beta, smoothing, delta):
    """Return {name: losses} in float64, from probabilities, as the papers write them."""
    p = 1 / (1 + np.exp(-beta * (w - l)))  # of the chosen answer being the better one
    sigmoid = -(1 - smoothing) * np.log(p) - smoothing * np.log(1 - p)
    unbiased = (-(1 - smoothing) * np.log(p) + smoothing * np.log(1 - p)) / (1 - 2 * smoothing)
    found = {"sigmoid": sigmoid, "robust": unbiased, "hinge": np.clip(1 - beta * (w - l), 0, None)}
    return found | {"ipo": (w - l - 0.5 / beta) ** 2, "dpop": sigmoid + delta * np.clip(-w, 0, None)}


@pytest.mark.parametrize("loss", dpo.DPO_LOSSES)
@pytest.mark.parametrize("beta, smoothing, delta", [(0.1, 0.0, 5.0), (0.5, 0.2, 1.0), (0.01, 0.45, 50.0)])
def test_losses_and_gradients_equal_numpys(loss, beta, smoothing, delta):
    """The gradients are those of finite differences in float64."""
    w, l = np.random.default_rng(0).normal(0, 6, (2, 64))
    given = options(beta=beta, label_smoothing=smoothing, delta=delta)
    oracle = lambda w, l: numpy_losses(w, l, beta, smoothing, delta)[loss]
    function, arrays = dpo.DPO_LOSSES[loss], [mx.array(np.float32(x)) for x in (w, l)]
    np.testing.assert_allclose(np.array(function(*arrays, given)), oracle(w, l), rtol=1e-5, atol=1e-5)
    gradients = mx.grad(lambda w, l: function(w, l, given).sum(), argnums=(0, 1))(*arrays)
    slopes = [(oracle(w + dw, l + dl) - oracle(w - dw, l - dl)) / 2e-5 for dw, dl in ((1e-5, 0), (0, 1e-5))]
    np.testing.assert_allclose(np.array(gradients), slopes, rtol=1e-4, atol=1e-4)


def test_robust_is_unbiased():
    """With a share of labels swapped, its mean is the loss of the true labels (arXiv 2403.00409)."""
    w, l, share = 3.0, -2.0, 0.3
    right, wrong = (loss_of(*pair, "robust", beta=0.5, label_smoothing=share) for pair in ((w, l), (l, w)))
    assert (1 - share) * right + share * wrong == pytest.approx(loss_of(w, l, beta=0.5), abs=1e-6)


@pytest.mark.parametrize("loss", dpo.DPO_LOSSES)
def test_huge_margins_stay_finite(loss):
    function = lambda w: dpo.DPO_LOSSES[loss](w, -w, options(label_smoothing=0.1)).sum()
    for w in (-1e5, 1e5):
        value, gradient = mx.value_and_grad(function)(mx.array([w]))
        assert math.isfinite(value.item()) and math.isfinite(gradient.item()) and (w > 0 or gradient.item() < 0)


# ---------------------------------------------------------------------------------------------------------- metrics


def test_two_pairs_one_right():
    batch = batch_of([4, 4, 4, 4], [[-10.0, -10.0], [-10.0, -10.0]], [1.0, 0.5])
    metrics = dpo.dpo_metrics(mx.array([-8.0, -11.0, -13.0, -10.5]), batch, options())
    expected = {
        "loss": [math.log(1 + math.exp(-0.5)), 0.5 * math.log(1 + math.exp(0.05))],
        "rewards/chosen": [0.2, -0.1],
        "rewards/rejected": [-0.3, -0.05],
        "rewards/margins": [0.5, -0.05],
        "rewards/accuracies": [1, 0],
        "logps/chosen": [-8, -11],
        "logps/rejected": [-13, -10.5],
    }
    assert set(metrics) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(np.array(metrics[name], np.float32), values, atol=1e-6, err_msg=name)
    assert dpo.mean_metrics([(metrics, 2)])["rewards/accuracies"] == 0.5
    means = dpo.mean_metrics([(metrics, 2), (metrics, 1)])  # of the second batch only its first pair is real
    assert set(means) == set(expected) and means["rewards/accuracies"] == pytest.approx(2 / 3)
    assert means["logps/chosen"] == pytest.approx((-8 - 11 - 8) / 3)


def test_each_reference_belongs_to_its_answer_and_a_tie_is_not_right():
    """The policy prefers the rejected answer, though less than the reference did."""
    batch = batch_of([4, 4, 4, 4], [[-20.0, -10.0], [-10.0, -10.0]], [1.0, 1.0])
    metrics = dpo.dpo_metrics(mx.array([-15.0, -10.0, -11.0, -10.0]), batch, options())
    assert metrics["rewards/accuracies"].tolist() == [True, False]
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.6, 0])


@pytest.mark.parametrize("loss", dpo.DPO_LOSSES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("prompt", [1, 50])
def test_lengths_are_the_answers_tokens_and_count_only_if_asked(loss, normalize, prompt):
    """Chosen -12 -> -10 of 4 tokens, rejected -6 -> -9 of 2: 2 and -3 nats, or 0.5 and -1.5 a token; ipo: always."""
    batch, given = batch_of([4, 2], [[-12.0, -6.0]], [1.0], prompt), options(loss=loss, length_normalize=normalize)
    metrics = dpo.dpo_metrics(mx.array([-10.0, -9.0]), batch, given)
    w, l = (0.5, -1.5) if normalize or loss == "ipo" else (2.0, -3.0)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.1 * w)
    assert metrics["rewards/rejected"].item() == pytest.approx(0.1 * l)
    assert metrics["loss"].item() == pytest.approx(numpy_losses(w, l, 0.1, 0.0, 5.0)[loss], abs=1e-5)
    assert metrics["logps/chosen"].item() == -10 and metrics["logps/rejected"].item() == -9


@pytest.mark.parametrize("loss", dpo.DPO_LOSSES)
def test_a_weight_multiplies_its_pairs_loss_only(loss):
    logps, ref_logps = mx.array([-8.0, -11.0, -13.0, -10.5]), [[-10.0, -10.0]] * 2
    plain, weighted = (
        dpo.dpo_metrics(logps, batch_of([4, 3, 2, 1], ref_logps, weight), options(loss=loss))
        for weight in ([1.0, 1.0], [3.0, 0.0])
    )
    assert weighted["loss"].tolist() == pytest.approx([3 * plain["loss"][0].item(), 0]) and plain["loss"][1] > 0
    for name in set(plain) - {"loss"}:
        assert plain[name].tolist() == weighted[name].tolist(), name


# ------------------------------------------------------------------------------------------------------- first step


@pytest.mark.parametrize("kind, bits", [("lora", None), ("lora", 4), ("dora", None), ("dora", 4), ("full", None)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_training_starts_at_log_2_with_no_margin(kind, bits, dtype, tmp_path):
    """Whatever is trained, it is the reference before the first update; in evaluation as in training."""
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(10))
    words = ["--model", str(save_model(tmp_path / "model", dtype=dtype, bits=bits)), "--data", str(data)]
    args = dpo.parse_args([*words, "--fine-tune-type", kind])
    model, tokenizer = mlx_lm.load(args.model)
    pairs = dpo.load_pairs(args, tokenizer, args.data, "train")
    batches = dpo.sorted_batches(pairs, 4, dpo.can_share(model, pairs))
    initial = dpo.trainable_parameters(model, args)
    dpo.add_reference(dpo.install(initial, model), batches)
    found = dpo.evaluate(model, initial, initial, batches, args, dpo.dpo_metrics)
    assert found["loss"] == pytest.approx(LOG_2, abs=1e-6) and found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["rewards/margins"] == found["rewards/chosen"] == 0 and found["logps/chosen"] < -5
    batch = dpo.make_batch(*batches[0])
    loss = lambda params: dpo.dpo_metrics(dpo.answer_logps(dpo.install(params, model.train()), batch)[0], batch, args)
    value, gradient = mx.value_and_grad(lambda params: loss(params)["loss"].mean())(initial)
    assert value.item() == pytest.approx(LOG_2, abs=1e-6) and 0 < mx.linalg.norm(gradient).item() < math.inf


@pytest.mark.parametrize("script, first", [("dpo_trainer.py", 2.5), ("simpo_trainer.py", None)])
def test_a_loss_of_ones_own_is_one_entry(script, first, tmp_path):
    """Known to --help and trained on, after one line more in a copy of the script; w = l = 0 before a DPO step."""
    text, entry = (ROOT / script).read_text(), '    "mine": lambda w, l, o: mx.abs(w - l - 25) * o.beta,\n'
    hinge = text.index('    "hinge": lambda')
    (tmp_path / "mine.py").write_text(text[:hinge] + entry + text[hinge:])
    data, model = write_rows(tmp_path / "pairs.jsonl", make_rows(12)), save_model(tmp_path / "model")
    words = ["--model", model, "--data", data, "--adapter-path", tmp_path / "out", "--loss", "mine", "--beta", 0.1]
    words += ["--learning-rate", 1e-3, "--epochs", 4, "--steps-per-report", 1]
    done = run_script(*words, script=tmp_path / "mine.py")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in found if row["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0] and first in (None, pytest.approx(losses[0], abs=1e-5))
    assert "mine" in run_script("--help", script=tmp_path / "mine.py").stdout
