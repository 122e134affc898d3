"""The losses by hand, against an independent numpy implementation, and what the metrics of a pair say."""

import math

import mlx.core as mx
import numpy as np
import pytest

import dpo_trainer
from dpo_trainer import dpo_loss

# log(1 + exp(-0.2)) and log(1 + exp(0.2)), the sigmoid losses of a margin of 0.2 and of -0.2
WON, LOST, LOG_2 = 0.5981388694, 0.7981388694, math.log(2)


def one_loss(*logps, **options):
    """Return the loss and both rewards of one pair, from chosen, rejected, ref_chosen, ref_rejected."""
    return [value.item() for value in dpo_loss(*(mx.array([x]) for x in logps), **options)]


def options_of(*words):
    return dpo_trainer.parse_args(["--model", "none", "--data", "none", *map(str, words)])


def batch_of(lengths, ref_logps, weights, prompt=3):
    """Return a batch without its rows; lengths: response tokens, the chosen answers' first."""
    mask = np.zeros((len(lengths), prompt + max(lengths)), np.float32)
    for row, length in zip(mask, lengths):
        row[prompt : prompt + length] = 1
    return {"mask": mx.array(mask), "ref_logps": mx.array(ref_logps), "weights": mx.array(weights)}


BY_HAND = [  # options: the losses of a won pair, of a lost one, and of one as it was
    ({}, WON, LOST, LOG_2),
    ({"beta": 0.2}, math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(0.4)), LOG_2),
    ({"label_smoothing": 0.25}, 0.75 * WON + 0.25 * LOST, 0.75 * LOST + 0.25 * WON, LOG_2),
    ({"loss": "hinge"}, 0.8, 1.2, 1),  # 1 - 0.2, 1 + 0.2
    ({"loss": "hinge", "beta": 0.6}, 0.0, 2.2, 1),  # 1 - 1.2 is below 0
    ({"loss": "ipo"}, 9.0, 49.0, 25),  # (2 - 1 / 0.2) ** 2, (-2 - 5) ** 2
    ({"loss": "ipo", "beta": 0.25}, 0.0, 16.0, 4),  # (2 - 1 / 0.5) ** 2
    ({"loss": "dpop", "delta": 0.7, "label_smoothing": 0.5}, (WON + LOST) / 2, (WON + LOST) / 2 + 0.7, LOG_2),
    ({"loss": "dpop"}, WON, LOST + 5, LOG_2),  # only the lost pair's chosen answer lost a nat
]


@pytest.mark.parametrize("options, won, lost, same", BY_HAND)
def test_losses_by_hand(options, won, lost, same):
    """Chosen -11 -> -10, rejected -11 -> -12: gains of 1 and -1, a difference of 2, at beta 0.1 a margin of 0.2."""
    beta = options.get("beta", 0.1)
    expected = [pytest.approx(won, abs=1e-6), pytest.approx(beta), pytest.approx(-beta)]
    assert one_loss(-10.0, -12.0, -11.0, -11.0, **options) == expected
    assert one_loss(-12.0, -10.0, -11.0, -11.0, **options)[0] == pytest.approx(lost, abs=1e-5)
    assert one_loss(-11.0, -7.0, -11.0, -7.0, **options) == [pytest.approx(same, abs=1e-6), 0, 0]


@pytest.mark.parametrize("delta, penalty", [(None, 7.5), (2.0, 3.0), (0.0, 0.0)])
def test_dpop_by_hand(delta, penalty):
    """Chosen -11 -> -12.5, rejected -11 -> -14.5: 1.5 nats lost, the same margin of 0.2; delta is 5 if not given."""
    assert one_loss(-12.5, -14.5, -11.0, -11.0, loss="dpop", delta=delta)[0] == pytest.approx(WON + penalty, abs=1e-5)
    assert one_loss(-12.5, -14.5, -11.0, -11.0, delta=delta)[0] == pytest.approx(WON, abs=1e-6)


def test_huge_margins_stay_finite():
    assert one_loss(0.0, -1e5, -1e5, 0.0)[0] == 0
    assert one_loss(-1e5, 0.0, 0.0, -1e5)[0] == pytest.approx(2e4)
    gradient = mx.grad(lambda x: dpo_loss(x, -x, mx.array([0.0]), mx.array([0.0]))[0].sum())(mx.array([-1e5]))
    assert gradient.item() == pytest.approx(-0.2)


def gradients(*logps, **options):
    """Return the loss's gradient by the chosen and by the rejected answer's log-probability."""
    arrays = [mx.array([x]) for x in logps]
    return [g.item() for g in mx.grad(lambda *x: dpo_loss(*x, **options)[0].sum(), argnums=(0, 1))(*arrays)]


def test_gradients_by_hand():
    """sigmoid: beta * sigmoid(-margin), Eq. 7's derivative; dpop adds its delta to the chosen answer alone."""
    fade = 0.1 / (1 + math.exp(0.2))
    assert gradients(-10.0, -12.0, -11.0, -11.0) == pytest.approx([-fade, fade])
    assert gradients(-12.5, -14.5, -11.0, -11.0, loss="dpop") == pytest.approx([-fade - 5, fade])
    assert gradients(-10.0, -12.0, -11.0, -11.0, loss="hinge") == pytest.approx([-0.1, 0.1])
    assert gradients(-10.0, -40.0, -11.0, -11.0, loss="hinge") == [0, 0]  # won by more than 1: nothing left to do
    assert gradients(-10.0, -12.0, -11.0, -11.0, loss="ipo") == pytest.approx([-6, 6])  # 2 * (2 - 5)
    assert gradients(-10.0, -22.0, -11.0, -11.0, loss="ipo")[0] > 0  # past 1 / (2 beta) it pulls back
    for margin, sign in ((math.log(9) - 0.1, -1), (math.log(9) + 0.1, 1)):  # smoothed by 0.1: least at log 9
        assert gradients(margin, 0.0, 0.0, 0.0, beta=1.0, label_smoothing=0.1)[0] * sign > 0


def test_two_pairs_one_right():
    batch = batch_of([4, 4, 4, 4], [-10.0, -10.0, -10.0, -10.0], [1.0, 1.0])
    metrics = dpo_trainer.dpo_metrics(mx.array([-8.0, -11.0, -13.0, -10.5]), batch, options_of())
    expected = {
        "loss": [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.05))],
        "rewards/chosen": [0.2, -0.1],
        "rewards/rejected": [-0.3, -0.05],
        "rewards/margins": [0.5, -0.05],
        "rewards/accuracies": [1, 0],
        "logps/chosen": [-8, -11],
        "logps/rejected": [-13, -10.5],
        "logps/accuracies": [1, 0],
    }
    assert set(metrics) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(np.array(metrics[name], np.float32), values, atol=1e-6, err_msg=name)
    assert dpo_trainer.mean_metrics([(metrics, 2)])["rewards/accuracies"] == 0.5
    means = dpo_trainer.mean_metrics([(metrics, 2), (metrics, 1)])  # of the second batch only its first pair is real
    assert set(means) == set(expected) and means["rewards/accuracies"] == pytest.approx(2 / 3)
    assert means["logps/chosen"] == pytest.approx((-8 - 11 - 8) / 3)


def test_accuracies_of_rewards_and_of_logps_differ():
    """The policy prefers the rejected answer, though less than the reference did; and a tie is not right."""
    batch = batch_of([4, 4, 4, 4], [-20.0, -10.0, -10.0, -10.0], [1.0, 1.0])
    metrics = dpo_trainer.dpo_metrics(mx.array([-15.0, -10.0, -11.0, -10.0]), batch, options_of())
    assert metrics["rewards/accuracies"].tolist() == [True, False]
    assert metrics["logps/accuracies"].tolist() == [False, False]


PER_TOKEN = [["--length-normalize"], ["--loss", "ipo"], ["--loss", "dpop", "--length-normalize"]]


@pytest.mark.parametrize("words", [*PER_TOKEN, [], ["--loss", "hinge"], ["--loss", "dpop"]])
@pytest.mark.parametrize("prompt", [1, 50])
def test_lengths_are_the_response_tokens_and_count_only_if_asked(words, prompt):
    """Chosen -12 -> -10 of 4 tokens, rejected -6 -> -9 of 2: gains of 0.5 and of -1.5 a token."""
    batch = batch_of([4, 2], [-12.0, -6.0], [1.0], prompt)
    metrics = dpo_trainer.dpo_metrics(mx.array([-10.0, -9.0]), batch, options_of(*words))
    won, lost = (0.05, -0.15) if words in PER_TOKEN else (0.2, -0.3)
    whole = 0.5 if "hinge" in words else math.log(1 + math.exp(-0.5))
    assert (metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item()) == pytest.approx((won, lost))
    expected = whole if words not in PER_TOKEN else 9.0 if "ipo" in words else WON  # (2 - 5) ** 2; a margin of 0.2
    assert metrics["loss"].item() == pytest.approx(expected, abs=1e-5)
    assert metrics["logps/chosen"].item() == -10 and metrics["logps/rejected"].item() == -9


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "dpop"])
def test_weight_multiplies_its_rows_loss_only(loss):
    logps = mx.array([-8.0, -11.0, -13.0, -10.5])
    plain, weighted = (
        dpo_trainer.dpo_metrics(logps, batch_of([4, 3, 2, 1], [-10.0] * 4, weights), options_of("--loss", loss))
        for weights in ([1.0, 1.0], [3.0, 0.0])
    )
    assert weighted["loss"].tolist() == pytest.approx([3 * plain["loss"][0].item(), 0])
    for name in set(plain) - {"loss"}:
        assert plain[name].tolist() == weighted[name].tolist(), name


def test_options_reach_the_loss():
    batch, logps = batch_of([4, 4], [-11.0, -11.0], [1.0]), mx.array([-12.5, -14.5])
    for words, expected in (
        (["--beta", 0.2], math.log(1 + math.exp(-0.4))),
        (["--label-smoothing", 0.25], 0.75 * WON + 0.25 * LOST),
        (["--loss", "hinge"], 0.8),
        (["--loss", "dpop"], WON + 7.5),
        (["--loss", "dpop", "--delta", 2], WON + 3),
        (["--loss", "dpop", "--delta", 0], WON),
    ):
        loss = dpo_trainer.dpo_metrics(logps, batch, options_of(*words))["loss"].item()
        assert loss == pytest.approx(expected, abs=1e-5), words
