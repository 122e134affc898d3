"""Draw data/first_run.png, the README's picture, from a finished run of the first command.

python dpo_trainer.py --data data/pairs.jsonl --steps-per-report 4
pip install matplotlib && python data/draw_readme.py adapters
"""

import json
import sys
from pathlib import Path

import make_tiny_chat as world
import matplotlib
import mlx_lm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
INK, BLUE, GREY = "#1f2937", "#2563eb", "#9ca3af"


def helpful_answers(adapter_path=None):
    """Return how many of the 100 held-out prompts are answered in the helpful manner, greedily."""
    model, tokenizer = mlx_lm.load(str(HERE / "tiny-chat"), adapter_path=adapter_path)
    rows = [json.loads(line) for line in (HERE / "test.jsonl").read_text().splitlines()]
    prompts = [tokenizer.apply_chat_template(world.prompt_messages(row), add_generation_prompt=True) for row in rows]
    texts = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=80).texts
    return sum(world.manner(text) == "helpful" for text in texts)


def main():
    folder = sys.argv[1]
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["split"] == "train"]
    before, after = helpful_answers(), helpful_answers(folder)

    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[3, 2], facecolor="white")
    left.plot([r["step"] for r in train], [r["rewards/accuracies"] for r in train], color=BLUE, linewidth=2)
    left.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
    left.text(train[-1]["step"], 0.51, "a coin", color=GREY, ha="right", va="bottom")
    left.set(xlabel="update (4 pairs each)", ylim=(0.3, 1.02), title="Better answer gained on the worse one")
    left.set_ylabel("share of the batch's pairs")
    bars = right.barh(["before", "after"], [before, after], color=[GREY, BLUE])
    right.bar_label(bars, padding=4)
    right.invert_yaxis()
    right.set(xlim=(0, 112), xlabel="of 100 unseen questions", title="Answered helpfully, not evasively")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    figure.tight_layout()
    figure.savefig(HERE / "first_run.png", dpi=150)
    print(f"{before} -> {after} of 100 answers helpful; drew {HERE / 'first_run.png'}")


if __name__ == "__main__":
    main()
