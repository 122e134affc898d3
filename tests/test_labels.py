"""Labels the right way round: talks drawn at random, of which only the test knows how good each answer is, are written
as six programs write them, and build_dpo_pairs.py must find the person's preferences, no others, with the history that
the person saw."""

import random
from collections import Counter, defaultdict

import pytest
from test_sources import SECRET, chatgpt, claude, code, codex, hermes, run, webui

TALKS = 60
LOGS = (code, codex, hermes)  # the last attempt is the one that was kept, and only that was gone on from
RATED = (chatgpt, webui)
CUT = {  # how each program marks an answer that was stopped
    chatgpt: {"status": "in_progress"}, claude: {"stop_reason": "max_tokens"}, webui: {"done": False},
    code: {"isApiErrorMessage": True}, codex: {"phase": "commentary"}, hermes: {"finish_reason": "length"},
}  # fmt: skip


def sentence(rng, size=7):
    return " ".join("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in range(size))


class Talk:
    """A tree of nodes, as test_sources.py's writers take them, and what the person thinks of each answer.

    facts: {answer's key: quality, rating, whole, asked, history}; choices: {prompt's key: the answer that was taken, or
    None where two were shown and none was taken}; gone_on: the answers that a prompt came after.
    """

    def __init__(self, write, seed):
        self.write, self.rng, self.nodes, self.facts = write, random.Random(f"{write.__name__} {seed}"), [], {}
        self.choices, self.gone_on, self.seed = {}, set(), seed
        self.leaf = self.converse(None, [], self.rng.randint(1, 4))

    def add(self, parent, role, text, fields):
        key = f"{self.seed}-{len(self.nodes)}"
        self.nodes.append((key, parent, role, text, fields))
        return key

    def converse(self, parent, history, turns):
        """Add a question with one to three answers, go on from the best or, in logs, from the last; return the leaf."""
        rng, log = self.rng, self.write in LOGS
        last = log or turns == 1  # the last attempt is on show
        question = sentence(rng) + "?"
        asked = self.add(parent, "user", question, {})
        if parent:
            self.gone_on.add(parent)
        qualities = rng.sample(range(100), rng.choice((1, 2, 2, 3)))
        qualities = sorted(qualities) if log else qualities
        whole = [rng.random() > 0.15 for _ in qualities]
        whole[-1 if last else qualities.index(max(qualities))] = True
        ratings = self.rate(qualities) if self.write in RATED and rng.random() < 0.4 else [0] * len(qualities)
        keys = []
        for quality, fine, rating in zip(qualities, whole, ratings):
            fields = {} if fine else CUT[self.write]
            if rating and self.write is webui:
                fields = fields | {"annotation": {"rating": rating}}
            text = f"{sentence(rng, 6).capitalize()}, {quality}. {sentence(rng, 6)}."
            keys.append(self.add(asked, "assistant", text, fields))
            about = {
                "quality": quality,
                "rating": rating,
                "whole": fine,
                "asked": asked,
                "order": len(keys),
                "text": text,
            }
            self.facts[keys[-1]] = about | {"history": [*history, question]}
        if self.write is chatgpt and len(keys) == 2 and all(whole) and rng.random() < 0.3:
            best = keys[qualities.index(max(qualities))]
            self.choices[asked] = best if rng.random() < 0.8 else None
            choice = {
                "paragen_variants_info": {"num_variants_in_stream": 2},
                "paragen_variant_choice": self.choices[asked],
            }
            place = next(i for i, node in enumerate(self.nodes) if node[0] == asked)
            self.nodes[place] = (*self.nodes[place][:4], {"metadata": choice})
        kept = keys[-1] if last else keys[qualities.index(max(qualities))]
        if not log and len(keys) > 1 and turns > 1 and rng.random() < 0.2:  # a branch that was left behind
            other = rng.choice([key for key in keys if key != kept])
            self.gone_on.add(other)
            aside = self.add(other, "user", sentence(rng) + "?", {})
            self.add(aside, "assistant", sentence(rng), {})
        said = [*history, question, self.facts[kept]["text"]]
        return self.converse(kept, said, turns - 1) if turns > 1 else kept

    def rate(self, qualities):
        """Return a thumb for some answers, never against their quality."""
        low, high = sorted(self.rng.sample(range(101), 2))
        return [-1 if quality < low else 1 if quality > high else 0 for quality in qualities]

    def path(self):
        parents, key, keys = {node[0]: node[1] for node in self.nodes}, self.leaf, set()
        while key:
            keys.add(key)
            key = parents[key]
        return keys

    def verdict(self, left, right):
        """Return (the better of two answers to one question, or None; the signal; its weight)."""
        a, b = self.facts[left], self.facts[right]
        if a["asked"] in self.choices:
            choice = self.choices[a["asked"]]
            if choice or a["rating"] == b["rating"]:
                return choice, "comparison", 1
        if a["rating"] != b["rating"]:
            return (left if a["rating"] > b["rating"] else right), "rating", 1
        shown = [key for key in (left, right) if key in self.path()]
        if a["rating"] or not shown:
            return None, "regenerate", 0
        other = right if shown[0] == left else left
        if shown[0] in self.gone_on:
            return shown[0], "regenerate", 0.35 if other in self.gone_on else 0.7
        return (shown[0] if self.facts[shown[0]]["order"] > self.facts[other]["order"] else None), "regenerate", 0.35

    def wanted(self):
        """Yield (better, worse, signal, weight, whether it must be found: the best one with each of the others)."""
        groups = defaultdict(list)
        for key, about in self.facts.items():
            groups[about["asked"]] += [key] if about["whole"] else []
        for keys in groups.values():
            found = [(*sorted((one, two), key=lambda key: key != better), signal, weight)
                     for i, one in enumerate(keys) for two in keys[:i] for better, signal, weight in [self.verdict(one, two)] if better]  # fmt: skip
            tops = [key for key in keys if all(key != pair[1] for pair in found)]
            for good, bad, signal, weight in found:
                yield good, bad, signal, weight, tops == [good]


def files_of(talks, write):
    """Return the talks as one program's files, each under a name of its own."""
    files = {}
    for talk in talks:
        for name, data in write(talk.nodes).items():
            head = {"id": f"c{talk.seed}", "conversation_id": f"c{talk.seed}", "uuid": f"c{talk.seed}"}
            if write in (chatgpt, claude, webui):
                data = [record | head for record in data]
            if write is code:
                data = [record | {"sessionId": f"s{talk.seed}"} for record in data]
            if write is codex:
                data[0]["payload"]["id"] = f"s{talk.seed}"
            files[f"{talk.seed}/{name}"] = data
    votes = [{"id": key, "conversation_id": "c", "rating": {1: "thumbs_up", -1: "thumbsDown"}[about["rating"]]}
             for talk in talks for key, about in talk.facts.items() if about["rating"]]  # fmt: skip
    return files | ({"message_feedback.json": votes} if write is chatgpt else {})


@pytest.mark.parametrize("write", [chatgpt, claude, webui, code, codex, hermes])
def test_labels(write, tmp_path):
    talks = [Talk(write, seed) for seed in range(TALKS)]
    done = run(tmp_path, files_of(talks, write))
    known = {about["text"]: (talk, key) for talk in talks for key, about in talk.facts.items()}
    found, signals = set(), Counter()
    for row in done.rows:
        sides = [row[side][0]["content"] for side in ("chosen", "rejected")]
        (talk, good), (other, bad) = (known[text] for text in sides)
        assert talk is other and talk.facts[good]["asked"] == talk.facts[bad]["asked"], sides
        assert talk.facts[good]["whole"] and talk.facts[bad]["whole"], sides
        better, signal, weight = talk.verdict(good, bad)
        assert (better, signal, weight) == (good, row["signal"], row["weight"]), (sides, row, better, signal, weight)
        assert [m["content"] for m in row["prompt"]] == talk.facts[good]["history"]
        assert (good, bad) not in found, "once"
        found.add((good, bad))
        signals[signal] += 1
    for talk in talks:
        missing = [pair for pair in talk.wanted() if pair[4] and (pair[0], pair[1]) not in found]
        assert not missing, (talk.seed, missing)
    assert signals["regenerate"] > 15 and (write not in RATED or signals["rating"] > 10)
    assert (write is not chatgpt or signals["comparison"] > 5) and SECRET not in done.text + done.report
