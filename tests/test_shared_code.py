"""No script imports another: what several need is written in each, word for word. Here that is held.

    python tests/test_shared_code.py --fix      copies what differs from dpo_trainer.py over the other scripts

A function, class or CONSTANT of the same name has the same text in every script, comments above it included, reads no
module-level name but imports, shared functions and shared constants, and names no algorithm.
"""

import ast
import builtins
import re
import subprocess
import sys
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"main", "parse_args"}  # each script's own
ALGORITHM = re.compile(r"\b_?(dpo|simpo)(?![a-z])", re.I)

TRAINERS = ("dpo_trainer.py", "simpo_trainer.py")
SHARED = {  # the scripts that a name is in, and nowhere else
    ("dpo_trainer.py", "build_dpo_pairs.py", "eval_prefs.py", "export_ollama.py", "simpo_trainer.py"): """
        need blame sync
    """.split(),
    ("dpo_trainer.py", "eval_prefs.py", "export_ollama.py", "simpo_trainer.py"): ["BAR", "write_atomically"],
    ("build_dpo_pairs.py", "export_ollama.py"): ["whole"],
    ("dpo_trainer.py", "eval_prefs.py"): ["add_reference"],
    ("dpo_trainer.py", "eval_prefs.py", "simpo_trainer.py"): """
        number read_rows load_pairs read_pair to_messages time_limit encode_pair encode_pairs
        PAD CHUNK SHARE PrefixCache padded_widths make_batch response_states head_logits in_chunks
        THREADS HEADER ROW FORWARD BACKWARD fused_log_softmax token_logps token_kl completion_logps
        install sorted_batches own_part sum_all is_exact differ settle_sharing fingerprint
    """.split(),
    TRAINERS: """
        ADAPTER OPTIMIZERS YAML_BLOCKS schedule settle_adapter config_words load_splits
        FusedLoRA lean_swiglu lean_swiglu_vjp KeyedDropout Checkpointed
        trainable_parameters pack unpack lighten padding_share mean_metrics evaluate plan_updates make_optimizer MAX_NORM
        train prepare load_model gradients_differ check_folder start_folder save_weights file_hash
        checkpoints save_checkpoint load_checkpoint run_facts earlier_metrics report catch_signals memory_advice explain
        bad_update train_metrics begin keep_best what_is_kept lock say run
    """.split(),
}


def scripts(folder):
    """Return the scripts in a folder, the one that the others are compared with first."""
    return sorted(Path(folder).glob("*.py"), key=lambda path: (path.name != "dpo_trainer.py", path.name))


def defined_name(node):
    """Return the name that a module-level statement defines, or adds to; None if it is no definition."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        return target.value.id if isinstance(target, ast.Subscript) else target.id
    return None


def definitions(path):
    """Return {name: (first line, last line, text)} of a script's functions, classes and constants."""
    return definitions_in(path.read_text())


@lru_cache
def definitions_in(text):
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if name := defined_name(node):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            while lines[first - 2].startswith("#") and not lines[first - 2].startswith("# ---"):
                first -= 1
            first = found[name][0] if name in found else first
            found[name] = (first, node.end_lineno, "\n".join(lines[first - 1 : node.end_lineno]))
    return found


def imports(path):
    """Return {name: the import that brings it} of a script's module level."""
    return imports_in(path.read_text())


@lru_cache
def imports_in(text):
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                found[name] = (getattr(node, "module", None), alias.name, alias.asname)
    return found


def differences(folder):
    """Return "file:line: name ..." for every shared name whose text is not the first script's that has it."""
    first, found = {}, []
    for path in scripts(folder):
        for name, (line, _, text) in definitions(path).items():
            if name not in OWN:
                home, known = first.setdefault(name, (path, text))
                if text != known:
                    both = zip_longest(known.splitlines(), text.splitlines())
                    row = next(i for i, (old, new) in enumerate(both) if old != new)
                    found.append(f"{path.name}:{line + row}: {name} differs from {home.name}")
    return found


def fix(folder):
    """Give the other scripts dpo_trainer.py's text of what they share with it; return what was changed."""
    source, changed = Path(folder, "dpo_trainer.py"), []
    right = definitions(source)
    for path in scripts(folder):
        for name, (first, last, text) in sorted(definitions(path).items(), key=lambda item: -item[1][0]):
            if name in right and name not in OWN and text != right[name][2]:
                lines = path.read_text().splitlines()
                lines[first - 1 : last] = right[name][2].splitlines()
                path.write_text("\n".join(lines) + "\n")
                changed.append(f"{path.name}: {name}")
    return changed


def test_shared_text_is_one_text():
    assert differences(ROOT) == []


def test_the_shared_names_and_their_scripts_are_these():
    """Neither more, as by a copy that nobody noticed, nor fewer, as by a new name for what is the same."""
    found = {}
    for path in scripts(ROOT):
        for name in definitions(path).keys() - OWN:
            found.setdefault(name, []).append(path.name)
    shared = {name: tuple(files) for name, files in found.items() if len(files) > 1}
    assert shared == {name: files for files, names in SHARED.items() for name in names}


def names_read(text):
    """Return the names that a definition reads and neither binds itself nor takes from Python."""
    nodes = list(ast.walk(ast.parse(text)))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return read - bound - set(dir(builtins)) - {"__file__"}


@pytest.mark.parametrize("name", sorted({name for names in SHARED.values() for name in names}))
def test_shared_code_stands_by_itself(name):
    """It reads what every script that has it has alike, and speaks of no algorithm."""
    files = next(files for files, names in SHARED.items() if name in names)
    text = definitions(ROOT / files[0])[name][2]
    assert not ALGORITHM.search(text), ALGORITHM.search(text)
    for read in names_read(text):
        brought = {imports(ROOT / file).get(read) for file in files}
        shared = all(read in definitions(ROOT / file) for file in files) and read not in OWN
        assert shared or (len(brought) == 1 and None not in brought), f"{name} reads {read}: {brought}"


def test_no_import_is_idle_and_none_is_of_a_neighbour():
    neighbours = {path.stem for path in scripts(ROOT)}
    for path in scripts(ROOT):
        text = path.read_text()
        for name, (module, imported, _) in imports(path).items():
            assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{path.name}: {name}"
            assert (module or imported).split(".")[0] not in neighbours, f"{path.name}: {imported}"


def test_the_script_blocks_are_one():
    """Each script runs by itself with `uv run`; which packages it needs is requirements.txt's list."""
    blocks = {path.read_text().split("# ///\n")[0] for path in scripts(ROOT)}
    assert len(blocks) == 1


def copies(folder):
    for path in scripts(ROOT):
        (folder / path.name).write_text(path.read_text())
    return folder / "dpo_trainer.py", folder / "simpo_trainer.py"


def test_a_difference_is_named_and_fixed(tmp_path):
    """In a function, a constant that is added to, and a comment above one."""
    _, other = copies(tmp_path)
    text = other.read_text()
    for old, new in (
        ("    return model.train(training)", "    return model.train(not training)"),
        ('{"name": "lr_schedule", "warmup_steps": "warmup"}', '{"name": "lr_schedule"}'),
        ("# nested blocks of a config", "# blocks of a config"),
    ):
        assert text.count(old) == 1
        other.write_text(text.replace(old, new))
        [found] = differences(tmp_path)
        line = text[: text.index(old)].count("\n") + 1
        assert re.match(rf"simpo_trainer.py:{line}: \w+ differs from dpo_trainer.py", found), found
        assert len(fix(tmp_path)) == 1 and other.read_text() == text


def test_fix_copies_from_the_dpo_trainer_and_leaves_what_is_own(tmp_path):
    source, other = copies(tmp_path)
    before, mains = other.read_text(), definitions(other)["main"]
    source.write_text(source.read_text().replace("def schedule(", "def schedule(  # told\n    ", 1))
    command = [sys.executable, str(ROOT / "tests" / "test_shared_code.py"), "--fix", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.stdout == "simpo_trainer.py: schedule\n" and shown.returncode == 0, shown
    assert other.read_text() == before.replace("def schedule(", "def schedule(  # told\n    ", 1) != before
    assert definitions(other)["main"][2] == mains[2] != definitions(source)["main"][2]
    assert differences(tmp_path) == [] and fix(tmp_path) == []


def test_the_trainers_differ_in_fewer_than_120_lines():
    """Counted side by side: a changed line is one, and so is a line that only one of them has."""
    command = ["diff", "--side-by-side", "--suppress-common-lines", *(str(ROOT / name) for name in TRAINERS)]
    assert 50 < len(subprocess.run(command, capture_output=True, text=True).stdout.splitlines()) < 120


if __name__ == "__main__":
    if sys.argv[1:2] != ["--fix"]:
        sys.exit(__doc__)
    print(*(fix(Path(*sys.argv[2:]) if sys.argv[2:] else ROOT) or ["nothing differed"]), sep="\n")
