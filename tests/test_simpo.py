"""SimPO: the losses by hand and against numpy, what lengths may do to them, its options, and whole runs."""

import argparse
import json
import math

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, make_rows, run_script, save_model, write_rows
from mlx.utils import tree_flatten, tree_map
from test_distributed import launch

import dpo_trainer
import simpo_trainer
from simpo_trainer import simpo_loss

LOSSES = ["sigmoid", "hinge", "cpo", "orpo"]


def options_of(*words):
    return simpo_trainer.parse_args(["--model", "none", "--data", "none", *map(str, words)])


def one_loss(*numbers, **options):
    """Return the loss and both rewards of one pair: chosen, rejected log-probability, chosen, rejected length."""
    return [value.item() for value in simpo_loss(*(mx.array([float(x)]) for x in numbers), **options)]


def softplus(x):
    return math.log1p(math.exp(x))


# ------------------------------------------------------------------------------------------------------------- losses

ODDS = math.log(math.exp(-0.5) / (1 - math.exp(-0.5))) - math.log(math.exp(-1.5) / (1 - math.exp(-1.5)))
BY_HAND = [  # options: the loss and the rewards of -4 over 8 tokens (mean -0.5) against -6 over 4 (mean -1.5)
    ({}, softplus(-1), (-1, -3)),  # 2 * (-0.5 + 1.5) - 1 = 1
    ({"beta": 2.5, "gamma": 0.5}, softplus(-2), (-1.25, -3.75)),
    ({"gamma": 3.0}, softplus(1), (-1, -3)),  # absolute: neither times nor over beta
    ({"label_smoothing": 0.25}, 0.75 * softplus(-1) + 0.25 * softplus(1), (-1, -3)),
    ({"sft_weight": 0.5}, softplus(-1) + 0.25, (-1, -3)),
    ({"loss": "hinge", "gamma": 1.5}, 0.5, (-1, -3)),  # 1 - 0.5
    ({"loss": "hinge", "gamma": 0.0}, 0.0, (-1, -3)),  # 1 - 2 is below 0
    ({"loss": "cpo", "beta": 0.1, "gamma": 0.0, "sft_weight": 1.0}, softplus(-0.2) + 0.5, (-0.4, -0.6)),
    ({"loss": "orpo", "beta": 0.1, "gamma": 0.0, "sft_weight": 1.0}, 0.1 * softplus(-ODDS) + 0.5, (-0.05, -0.15)),
]


@pytest.mark.parametrize("options, loss, rewards", BY_HAND)
def test_losses_by_hand(options, loss, rewards):
    assert one_loss(-4, -6, 8, 4, **options) == pytest.approx([loss, *rewards], abs=1e-6)


def test_a_sum_can_prefer_what_the_mean_does_not():
    """The longer answer loses in sum, -12 against -8, and wins a token, -1 against -2."""
    sigmoid, cpo = one_loss(-12, -8, 12, 4), one_loss(-12, -8, 12, 4, loss="cpo", beta=1.0, gamma=0.0)
    assert sigmoid[1] > sigmoid[2] and cpo[1] < cpo[2]


def numpy_loss(chosen, rejected, chosen_lengths, rejected_lengths, loss, beta, gamma, smoothing, sft_weight):
    """Return the losses in float64 from probabilities, straight from the papers' formulas."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    if loss == "orpo":
        p, q = np.exp(chosen / chosen_lengths), np.exp(rejected / rejected_lengths)
        found = -beta * np.log(sigmoid(np.log((p / (1 - p)) / (q / (1 - q)))))
    else:
        x = beta * (chosen - rejected)
        if loss != "cpo":
            x = beta / chosen_lengths * chosen - beta / rejected_lengths * rejected - gamma
        found = -(1 - smoothing) * np.log(sigmoid(x)) - smoothing * np.log(sigmoid(-x))
        if loss == "hinge":
            found = np.clip(1 - x, 0, None)
    return found - sft_weight * chosen / chosen_lengths


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(5))
def test_losses_equal_numpys(loss, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, (2, 500))
    logps = -random.gamma(1.5, 0.6, (2, 500)) * lengths
    beta, gamma = (0.1, 0.0) if loss in ("cpo", "orpo") else (random.uniform(1, 10), random.uniform(0, 4))
    smoothing = random.uniform(0, 0.5) if loss in ("sigmoid", "cpo") else 0.0
    sft_weight = random.uniform(0, 2)
    expected = numpy_loss(*logps, *lengths, loss, beta, gamma, smoothing, sft_weight)
    arrays = [mx.array(np.float32(x)) for x in (*logps, *lengths)]
    found, won, lost = simpo_loss(*arrays, beta, gamma, smoothing, loss, sft_weight)
    np.testing.assert_allclose(np.array(found), expected, rtol=2e-5, atol=2e-5)
    side = logps if loss == "cpo" else logps / lengths
    np.testing.assert_allclose([np.array(won), np.array(lost)], beta * side, rtol=1e-5)


def gradients(*numbers, **options):
    """Return the loss's gradient by the chosen and by the rejected answer's log-probability."""
    arrays = [mx.array([float(x)]) for x in numbers]
    return [g.item() for g in mx.grad(lambda *x: simpo_loss(*x, **options)[0].sum(), argnums=(0, 1))(*arrays)]


def test_gradients_by_hand():
    """sigmoid: beta * sigmoid(-x) over each answer's own length, Eq. 10 of the paper."""
    fade = 2 / (1 + math.exp(1))
    assert gradients(-4, -6, 8, 4) == pytest.approx([-fade / 8, fade / 4])
    assert gradients(-4, -6, 8, 4, sft_weight=0.5) == pytest.approx([-fade / 8 - 0.5 / 8, fade / 4])
    assert gradients(-4, -6, 8, 4, loss="hinge", gamma=1.5) == pytest.approx([-2 / 8, 2 / 4])
    assert gradients(-4, -6, 8, 4, loss="hinge", gamma=0.0) == [0, 0]  # won by more than 1
    fade = 0.1 / (1 + math.exp(0.2))
    assert gradients(-4, -6, 8, 4, loss="cpo", beta=0.1, gamma=0.0) == pytest.approx([-fade, fade])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("numbers", [(-4, -6, 8, 4), (-9, -2, 3, 7)])
def test_gradients_raise_the_chosen_and_lower_the_rejected(loss, numbers):
    chosen, rejected = gradients(*numbers, loss=loss, gamma=0.0, beta=0.3)
    assert chosen < 0 < rejected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("numbers", [(0, -1e5, 5, 5), (-1e5, 0, 5, 5), (0, 0, 5, 5), (-1e-8, -1e-8, 1, 1)])
def test_extremes_stay_finite(loss, numbers):
    """An answer that is certain has infinite odds; one that cannot be has none."""
    assert all(map(math.isfinite, one_loss(*numbers, loss=loss) + gradients(*numbers, loss=loss)))


# ------------------------------------------------------------------------------------------------------------ metrics


def batch_of(lengths, weights, prompt=3, padding=0):
    """Return a batch without its rows; lengths: response tokens, the chosen answers' first."""
    mask = np.zeros((len(lengths), prompt + max(lengths) + padding), np.float32)
    for row, length in zip(mask, lengths):
        row[prompt : prompt + length] = 1
    return {"mask": mx.array(mask), "weights": mx.array(weights)}


def test_two_pairs_one_right():
    batch = batch_of([8, 2, 4, 4], [1.0, 0.5])
    found = simpo_trainer.simpo_metrics(mx.array([-4.0, -5.0, -6.0, -2.0]), batch, options_of())
    expected = {
        "loss": [softplus(-1), 0.5 * softplus(5)],  # 2 * (-2.5 + 0.5) - 1 = -5
        "rewards/chosen": [-1, -5],
        "rewards/rejected": [-3, -1],
        "rewards/margins": [2, -4],
        "rewards/accuracies": [1, 0],
        "logps/chosen": [-4, -5],
        "logps/rejected": [-6, -2],
        "logps/accuracies": [1, 0],
        "lengths/chosen": [8, 2],
        "lengths/rejected": [4, 4],
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(np.array(found[name], np.float32), values, atol=1e-5, err_msg=name)
    assert dpo_trainer.mean_metrics([(found, 2)])["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_prompts_and_padding_do_not_count(loss):
    """A peer divides by prompt and response: there the loss depends on what else is in the batch."""
    logps, options = mx.array([-4.0, -6.0]), options_of("--loss", loss, "--sft-weight", 0.3)
    losses = [
        simpo_trainer.simpo_metrics(logps, batch_of([8, 4], [1.0], prompt, padding), options)["loss"].item()
        for prompt, padding in ((1, 0), (70, 0), (3, 55))
    ]
    assert losses[0] == losses[1] == losses[2]


def random_pairs(count, seed=0):
    random = np.random.default_rng(seed)
    ids = lambda low, high: random.integers(7, 300, random.integers(low, high)).tolist()
    pairs = [{"prompt": ids(2, 40), "chosen": ids(1, 30), "rejected": ids(1, 30)} for _ in range(count)]
    return [pair | {"weight": float(random.uniform(0.5, 2))} for pair in pairs]


@pytest.fixture(scope="module")
def model(tiny):
    return mlx_lm.load(str(tiny))[0]


def loss_and_gradient(model, pairs, options, share=0.9):
    """Return the summed loss of a batch of pairs and its gradient by the model's output norm and first layer."""
    named = tree_flatten(model.parameters())
    weights = {name: w for name, w in named if name.endswith(("q_proj.weight", "norm.weight"))}

    def loss(weights):
        batch = simpo_trainer.make_batch(pairs, share)
        logps = simpo_trainer.completion_logps(simpo_trainer.install(model, weights), batch)
        return simpo_trainer.simpo_metrics(logps, batch, options)["loss"].sum()

    value, gradient = mx.value_and_grad(loss)(weights)
    return value.item(), {name: np.array(g) for name, g in gradient.items()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("share", [0, 0.9])
def test_a_batch_of_two_is_one_and_one(model, loss, share):
    """Loss and gradient: of pairs whose lengths differ, so that each is padded by the other."""
    pairs, options = random_pairs(2, seed=3), options_of("--loss", loss, "--sft-weight", 0.3)
    both = loss_and_gradient(model, pairs, options, share)
    ones = [loss_and_gradient(model, [pair], options, share) for pair in pairs]
    assert both[0] == pytest.approx(ones[0][0] + ones[1][0], rel=1e-5)
    for name, gradient in both[1].items():
        together = ones[0][1][name] + ones[1][1][name]
        np.testing.assert_allclose(gradient, together, atol=1e-4 * np.abs(together).max() + 1e-7, err_msg=name)


def test_a_run_equals_the_formula(model, tiny):
    """make_batch, the model and simpo_metrics together, against a float64 log-softmax of each answer by itself."""
    pairs = random_pairs(4, seed=1)
    batch = simpo_trainer.make_batch(pairs)
    found = simpo_trainer.simpo_metrics(simpo_trainer.completion_logps(model, batch), batch, options_of())
    for i, pair in enumerate(pairs):
        means = []
        for side in ("chosen", "rejected"):
            ids = pair["prompt"] + pair[side]
            logits = np.array(model(mx.array([ids]))[0], np.float64)
            logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logps -= logits.max(-1, keepdims=True)
            means.append(np.mean([logps[j - 1, ids[j]] for j in range(len(pair["prompt"]), len(ids))]))
        expected = pair["weight"] * softplus(-(2 * (means[0] - means[1]) - 1))
        assert found["loss"][i].item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ options


def actions_of(script, monkeypatch):
    seen, original = [], argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: seen.append(self) or original(self, *a))
        script.parse_args(["--model", "m", "--data", "d"])
    return {action.option_strings[-1 if action.dest == "config" else 0]: action for action in seen[0]._actions}


def test_the_options_are_dpo_trainers_but_for_the_objective(monkeypatch):
    ours, theirs = actions_of(simpo_trainer, monkeypatch), actions_of(dpo_trainer, monkeypatch)
    assert theirs.keys() - ours.keys() == {"--delta", "--length-normalize", "--reference-model", "--reference-cache"}
    assert ours.keys() - theirs.keys() == {"--gamma", "--sft-weight"}
    what = lambda action: (action.default, getattr(action.type, "__name__", action.type), action.choices, action.nargs)
    differ = {name for name in ours.keys() & theirs.keys() if what(ours[name]) != what(theirs[name])}
    assert differ == {"--loss", "--beta", "--adapter-path"}


@pytest.mark.parametrize("loss", LOSSES)
def test_defaults(loss):
    beta, gamma, sft = (0.1, 0, 1) if loss in ("cpo", "orpo") else (2, 1, 0)
    args = options_of("--loss", loss)
    assert (args.beta, args.gamma, args.sft_weight) == (beta, gamma, sft)
    assert (args.epochs, args.warmup, args.lr_schedule, args.learning_rate) == (1, 0.1, "cosine", 1e-5)
    assert args.adapter_path == "adapters-simpo"
    given = options_of("--loss", loss, "--beta", 3, "--sft-weight", 0.25)
    assert (given.beta, given.sft_weight) == (3, 0.25)
    assert options_of("--loss", loss, "--sft-weight", 0).sft_weight == 0


REACH = ["--gamma 0.3", "--sft-weight 0.4", "--beta 5", "--label-smoothing 0.1"]


@pytest.mark.parametrize("words", REACH + [f"--loss {loss}" for loss in LOSSES[1:]])
def test_every_option_of_the_objective_reaches_the_loss(words):
    logps, batch = mx.array([-4.0, -6.0]), batch_of([8, 4], [1.0])
    found, plain = (
        simpo_trainer.simpo_metrics(logps, batch, options_of(*given))["loss"].item() for given in (words.split(), [])
    )
    assert found != plain


REFUSED = ["--loss cpo --gamma 1", "--loss orpo --gamma 0.5", "--loss hinge --label-smoothing 0.1", "--gamma -1"]
REFUSED += ["--loss orpo --label-smoothing 0.1", "--sft-weight -1", "--beta 0", "--loss dpop", "--delta 2"]
REFUSED += ["--reference-model other", "--length-normalize", "--gamma x"]


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_sense_is_refused_in_a_line(words):
    with pytest.raises(SystemExit, match="^simpo_trainer.py: .*--help lists all options$") as stop:
        options_of(*words.split())
    assert "\n" not in stop.value.code


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simpo")
    save_model(folder / "tiny")
    write_rows(folder / "pairs.jsonl", make_rows(24))
    write_rows(folder / "test.jsonl", make_rows(30)[24:])
    return folder


def run(place, *words):
    words = ["--model", "tiny", "--data", "pairs.jsonl", "--steps-per-report", 2, *words]
    return run_script(*words, script="simpo_trainer.py", cwd=place)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_learns_and_leaves_what_mlx_lm_loads(place, loss):
    out = place / f"out-{loss}"
    words = ["--loss", loss, "--epochs", 8, "--learning-rate", 2e-3, "--test", "test.jsonl", "--adapter-path", out]
    done = run(place, *words)
    assert done.returncode == 0, done.stderr
    found = records(out)
    assert {"loss", "rewards/margins", "lengths/chosen", "lengths/rejected", "kl"} <= found[0].keys()
    assert found[0]["kl"] == 0 < found[-1]["kl"]
    assert not any("ref" in name for record in found for name in record)
    train = [record for record in found if record["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["rewards/accuracies"] == 1
    starts = {record["split"] for record in found if record["step"] == 0}
    assert starts == {"valid", "test"}
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapters.safetensors", "best", "checkpoint", "metrics.jsonl", "simpo_trainer.py",
    ]  # fmt: skip
    assert "(rewards/accuracies)" in done.stdout and "Next: mlx_lm.generate" in done.stdout
    assert ("gamma/beta 0.5" in done.stdout) == (loss in ("sigmoid", "hinge"))
    model, tokenizer = mlx_lm.load(str(place / "tiny"), adapter_path=str(out))
    pairs = simpo_trainer.load_pairs(options_of(), place / "test.jsonl", "test")
    batch = simpo_trainer.make_batch(simpo_trainer.encode_pairs(tokenizer, pairs, 1024))
    logps = simpo_trainer.completion_logps(model, batch)
    metrics = simpo_trainer.simpo_metrics(logps, batch, options_of("--loss", loss))
    assert metrics["loss"].mean().item() == pytest.approx(found[-1]["loss"], rel=1e-4)


def test_a_test_alone_measures_as_trained(place):
    out = place / "alone"
    words = ["--adapter-path", out, "--gamma", 0.25, "--beta", 3, "--sft-weight", 0.5]
    assert run(place, *words, "--test", "test.jsonl").returncode == 0
    words = ["--model", "tiny", "--test", "test.jsonl", "--adapter-path", out]
    done = run_script(*words, script="simpo_trainer.py", cwd=place)
    assert done.returncode == 0, done.stderr
    loss = float(done.stdout.split("step 0 test: loss ")[1].split()[0])
    assert loss == pytest.approx(records(out)[-1]["loss"], rel=1e-3)
    assert "ahead in 0." in done.stdout.splitlines()[-1] and "->" not in done.stdout.splitlines()[-1]


def test_each_trainer_measures_and_goes_on_from_the_others_adapter(place):
    """By its own objective: the other one's loss and beta mean something else here."""
    first = run_script("--model", "tiny", "--data", "pairs.jsonl", "--adapter-path", "dpo", "--loss", "ipo", cwd=place)
    assert first.returncode == 0, first.stderr
    words = ["--model", "tiny", "--test", "test.jsonl", "--adapter-path", "dpo"]
    args = simpo_trainer.parse_args([*words[:-1], str(place / "dpo")])
    assert (args.loss, args.beta, args.gamma) == ("sigmoid", 2.0, 1.0)
    on = run(place, "--resume-adapter-file", "dpo/adapters.safetensors", "--adapter-path", "both")
    assert on.returncode == 0 and records(place / "both")[0]["kl"] == 0, on.stderr
    args = dpo_trainer.parse_args(["--model", "tiny", "--test", "x.jsonl", "--adapter-path", str(place / "both")])
    assert (args.loss, args.beta) == ("sigmoid", 0.1)


def test_warnings(place):
    small = run(place, "--beta", 0.1, "--adapter-path", "small")
    assert "gamma/beta 10; warning: 0.1 is DPO's scale of beta, SimPO's is 2 to 10" in small.stdout
    full = run(place, "--fine-tune-type", "full", "--learning-rate", 1e-4, "--adapter-path", "full")
    assert "warning: --learning-rate 0.0001: above 1e-5 full" in full.stdout and full.returncode == 0
    usual = run(place, "--fine-tune-type", "full", "--adapter-path", "usual")
    assert "warning" not in usual.stdout and usual.returncode == 0, usual.stderr


def test_bad_data_ends_in_one_line(place):
    (place / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    done = run(place, "--data", "bad.jsonl")
    assert done.returncode == 1 and done.stderr.strip().splitlines() == [
        "bad.jsonl:1: chosen and rejected are equal: mend or delete the line"
    ]


def test_two_processes_have_the_curve_of_one(place):
    words = ["--model", "tiny", "--data", "pairs.jsonl", "--sft-weight", "0.5", "--learning-rate", "1e-3"]
    words += ["--steps-per-report", "1", "--adapter-path"]
    alone = run_script(*words, "by-1", script="simpo_trainer.py", cwd=place)
    both = launch(2, place, *words, "by-2", script=ROOT / "simpo_trainer.py")
    assert alone.returncode == 0 and not any(both.statuses.values()), alone.stderr + both.err
    one, two = records(place / "by-1"), records(place / "by-2")
    assert len(one) == len(two) > 5
    for a, b in zip(one, two):
        for name in a.keys() - {"split", "tokens_per_second", "peak_memory_gb"}:
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), name


def test_gradients_by_accumulation(place):
    """4 batches of 1 are one of 4: the same weights after the same updates."""
    ends = []
    for size, count in ((4, 1), (1, 4)):
        args = options_of("--batch-size", size, "--grad-accumulation-steps", count, "--learning-rate", 1e-3)
        model = mlx_lm.load(str(place / "tiny"))[0]
        params, layout = simpo_trainer.trainable_parameters(model, args)
        pairs = random_pairs(4, seed=5)
        plan = [[pairs]] if size == 4 else [[[pair] for pair in pairs]]
        *_, (_, params, _, _) = simpo_trainer.train(model, params, layout, plan, args, simpo_trainer.simpo_metrics)
        ends.append(tree_map(np.array, simpo_trainer.unpack(params, layout)))
    for name, w in ends[0].items():
        np.testing.assert_allclose(w, ends[1][name], atol=2e-5, err_msg=name)
