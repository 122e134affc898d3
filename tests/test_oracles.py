"""Independent versions: a model of transformers in torch, the KL of whole distributions, accumulated gradients."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import make_rows, save_model, write_rows
from mlx.utils import tree_flatten
from test_logps import log_softmax, random_pairs, widths

import dpo_trainer as dpo


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Return (args, model, initial parameters, batches with their reference): a tiny llama with LoRA."""
    folder = tmp_path_factory.mktemp("oracle")
    words = ["--data", str(write_rows(folder / "pairs.jsonl", make_rows(12))), "--optimizer", "sgd"]
    args = dpo.parse_args(["--model", str(save_model(folder / "model")), "--adapter-path", str(folder), *words])
    model, tokenizer = mlx_lm.load(args.model)
    batches = dpo.sorted_batches(dpo.load_pairs(args, tokenizer, args.data, "train"), 4, True)
    initial = dpo.trainable_parameters(model, args)
    dpo.add_reference(dpo.install(initial, model), batches)
    return args, model, initial, batches


def test_kl_is_that_of_both_distributions(ready):
    """KL(policy || initial policy), in nats a token of all answers; the other way round would differ by far more."""
    args, model, initial, batches = ready
    policy = initial + 0.05 * mx.random.normal(initial.shape, key=mx.random.key(3))
    found = dpo.evaluate(model, policy, initial, batches, args, dpo.dpo_metrics)
    kl, tokens = np.zeros(2), 0
    for pair in sum((pairs for pairs, _ in batches), []):
        for side in ("chosen", "rejected"):
            ids, start = mx.array([pair["prompt"] + pair[side]]), len(pair["prompt"])
            p, q = (log_softmax(dpo.install(x, model)(ids)[0, start - 1 : -1]) for x in (policy, initial))
            kl += (np.exp(p) * (p - q)).sum(), (np.exp(q) * (q - p)).sum()
            tokens += len(pair[side])
    assert found["kl"] == pytest.approx(kl[0] / tokens, rel=1e-4) and found["kl"] > 1e-3
    assert abs(kl[1] / kl[0] - 1) > 1e-3


@pytest.mark.parametrize("count", [8, 7])
def test_accumulating_four_times_one_is_one_times_four(ready, count):
    """With 7 pairs the last update is of three: it divides by its pairs, whatever batches they came in."""
    args, model, initial, batches = ready
    pairs, ends = sum((pairs for pairs, _ in batches), [])[:count], []
    for size, steps in ((4, 1), (1, 4)):
        args.grad_accumulation_steps, args.learning_rate = steps, 1e-2
        groups = [pairs[i : i + size] for i in range(0, count, size)]
        order = np.random.default_rng([args.seed, 0]).permutation(len(groups))  # train's, undone
        splits = {"train": [None] * len(groups), "valid": batches[:1]}
        for place, group in zip(order, groups):
            splits["train"][place] = (group, widths(group, True, 8))
        ends.append(dpo.train(model, initial, splits, args, dpo.dpo_metrics))
    assert mx.linalg.norm(ends[0] - initial) > 1e-3
    assert mx.linalg.norm(ends[0] - ends[1]) < 1e-4 * mx.linalg.norm(ends[0] - initial)


def test_a_model_of_transformers_has_the_same_loss_and_gradient(tmp_path):
    """DPO in torch, pair by pair and unpadded, by autograd through every weight of a llama that mlx-lm loads."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    args = dpo.parse_args(["--model", str(save_model(tmp_path, tie_word_embeddings=False)), "--data", "none"])
    theirs, (model, _) = (
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        mlx_lm.load(args.model),
    )
    pairs = [pair | {"ref_logps": (-30.0, -28.0)} for pair in random_pairs([(9, 4, 17), (30, 12, 5), (2, 1, 3)])]
    total = 0
    for pair in pairs:
        sums = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt"] + pair[side]])
            logps = theirs(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[..., 0]
            sums.append(logps[len(pair["prompt"]) - 1 :].sum())
        margin = args.beta * ((sums[0] + 30) - (sums[1] + 28))
        total = total - torch.nn.functional.logsigmoid(margin)
    total.backward()
    batch = dpo.make_batch(pairs, widths(pairs, True, 8))

    def loss(weights):
        return dpo.dpo_metrics(dpo.answer_logps(model.update(weights), batch)[0], batch, args)["loss"].sum()

    value, gradients = mx.value_and_grad(loss)(model.trainable_parameters())
    assert value.item() == pytest.approx(total.item(), rel=1e-5)
    known = {name: w.grad.numpy() for name, w in theirs.named_parameters()}
    found = dict(tree_flatten(gradients))
    assert known.keys() == found.keys() and len(known) > 20
    for name, w in known.items():
        np.testing.assert_allclose(np.array(found[name]), w, rtol=1e-3, atol=1e-5 * abs(w).max(), err_msg=name)
