"""No script imports another: what several need is written in each, word for word. Here that is held.

    python tests/test_shared_code.py --fix      copies what differs from dpo_trainer.py over the other SCRIPTS

A function, class or CONSTANT of the same name has the same text in every script, comments above it included, and reads
no module-level name but imports and what the scripts share. No file but those named here is read, counted or changed.
"""

import ast
import builtins
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "dpo_trainer.py simpo_trainer.py eval_prefs.py sample_pairs.py export_ollama.py build_dpo_pairs.py".split()
OWN = {"main", "parse_args"}  # each script's own
ALGORITHM = re.compile(r"\b_?(dpo|simpo)(?![a-z])", re.I)


def scripts(folder):
    """Return the scripts that are there, the one that the others are compared with first."""
    return [Path(folder, name) for name in SCRIPTS if Path(folder, name).exists()]


def definitions(path):
    """Return {name: (first line, last line, text)} of a script's functions, classes and constants."""
    source = path.read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        targets = node.targets[0] if isinstance(node, ast.Assign) else None
        names = [n.id for n in ast.walk(targets) if isinstance(n, ast.Name)] if targets else [getattr(node, "name", "")]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while first > 1 and lines[first - 2].startswith("# ") and not lines[first - 2].startswith("# ---"):
            first -= 1
        text = "\n".join(lines[first - 1 : node.end_lineno])
        found |= {name: (first, node.end_lineno, text) for name in names if name}
    return found


def imports(path):
    """Return {name: the import that brings it} of a script's module level."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    aliases = [(getattr(node, "module", None), alias) for node in nodes for alias in node.names]
    return {alias.asname or alias.name.split(".")[0]: (home, alias.name, alias.asname) for home, alias in aliases}


def differences(folder):
    """Return "file:line: name ..." for every shared name whose text is not the first script's that has it."""
    first, found = {}, []
    for path in scripts(folder):
        for name, (line, _, text) in definitions(path).items():
            home, known = first.setdefault(name, (path, text))
            if name not in OWN and text != known:
                both = zip_longest(known.splitlines(), text.splitlines())
                row = next(i for i, (old, new) in enumerate(both) if old != new)
                found.append(f"{path.name}:{line + row}: {name} differs from {home.name}")
    return found


def fix(folder):
    """Give the other scripts dpo_trainer.py's text of what they share with it; return what was changed."""
    source, *others = scripts(folder)
    right, changed = definitions(source), []
    for path in others:
        for name, (first, last, text) in sorted(definitions(path).items(), key=lambda item: -item[1][0]):
            if name in right and name not in OWN and text != right[name][2]:
                lines = path.read_text().splitlines()
                lines[first - 1 : last] = right[name][2].splitlines()
                path.write_text("\n".join(lines) + "\n")
                changed.append(f"{path.name}: {name}")
    return changed


def shared_names():
    """Return {name: the scripts that have it} of those in more than one."""
    found = {}
    for path in scripts(ROOT):
        for name in definitions(path).keys() - OWN:
            found.setdefault(name, []).append(path)
    return {name: paths for name, paths in sorted(found.items()) if len(paths) > 1}


def names_read(text):
    """Return the names that a definition reads and neither binds itself nor takes from Python."""
    nodes = list(ast.walk(ast.parse(text)))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
    bound |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return read - bound - set(dir(builtins)) - {"__file__"}


def test_shared_text_is_one_text():
    assert differences(ROOT) == []


def test_the_trainers_share_most_of_what_they_have():
    """So that the tests here do hold something."""
    one, two = (definitions(ROOT / name).keys() - OWN for name in SCRIPTS[:2])
    assert len(one & two) > 25 and len(one ^ two) < 10


@pytest.mark.parametrize("name", shared_names())
def test_shared_code_stands_by_itself(name):
    """It reads what every script that has it has alike, and speaks of no algorithm."""
    paths = shared_names()[name]
    text = definitions(paths[0])[name][2]
    assert not ALGORITHM.search(text), ALGORITHM.search(text)
    for read in names_read(text):
        brought = {imports(path).get(read) for path in paths}
        shared = all(read in definitions(path) for path in paths) and read not in OWN
        assert shared or (len(brought) == 1 and None not in brought), f"{name} reads {read}: {brought}"


def test_no_import_is_idle_and_none_is_of_a_neighbour():
    neighbours = {Path(name).stem for name in SCRIPTS}
    for path in scripts(ROOT):
        for name, (module, imported, _) in imports(path).items():
            assert len(re.findall(rf"\b{name}\b", path.read_text())) > 1, f"{path.name}: {name}"
            assert (module or imported).split(".")[0] not in neighbours, f"{path.name}: {imported}"


def test_the_script_blocks_are_one():
    """Each script runs by itself with `uv run`; those that need packages need the same ones."""
    blocks = {path.name: path.read_text().split("# ///\n")[0] for path in scripts(ROOT)}
    assert len({block for block in blocks.values() if "mlx" in block}) == 1


def copies(folder):
    """Copy the trainers to a folder, beside a person's own script that has changed what they share."""
    source, other = (folder / name for name in SCRIPTS[:2])
    for path in (source, other):
        path.write_text((ROOT / path.name).read_text())
    own = (
        source.read_text()
        .replace("def log_loss(", "def log_loss(  # mine\n    ")
        .replace("import json", "import eval_prefs")
    )
    (folder / "my_dpo.py").write_text(own + "this is no Python")
    return source, other


def test_a_difference_is_named_and_fixed_and_a_persons_own_copy_is_left_alone(tmp_path):
    """In a function, a constant, a constant of several names, and a comment above one."""
    source, other = copies(tmp_path)
    text, own = other.read_text(), (tmp_path / "my_dpo.py").read_bytes()
    assert differences(tmp_path) == []
    changes = {"log_loss": ("* mx.logaddexp(0, margins)", "* mx.logaddexp(1, margins)")}
    changes |= {"PLAIN": ("m.role == 'assistant' }}", "m.role }}"), "COMPILE": ("(1, 0, 0.9)", "(1, 0, 0.8)")}
    changes |= {"CUDA": ("# Rows are padded", "# Padded")}
    for name, (old, new) in changes.items():
        assert text.count(old) == 1
        other.write_text(text.replace(old, new))
        line = text[: text.index(old)].count("\n") + 1
        found = differences(tmp_path)
        assert f"simpo_trainer.py:{line}: {name} differs from dpo_trainer.py" in found, found
        assert fix(tmp_path) and other.read_text() == text and differences(tmp_path) == []
    assert (tmp_path / "my_dpo.py").read_bytes() == own


def test_fix_copies_from_the_dpo_trainer_and_leaves_what_is_own(tmp_path):
    source, other = copies(tmp_path)
    before, own = other.read_text(), (tmp_path / "my_dpo.py").read_bytes()
    source.write_text(source.read_text().replace("def log_loss(", "def log_loss(  # told\n    ", 1))
    command = [sys.executable, __file__, "--fix", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.stdout == "simpo_trainer.py: log_loss\n" and shown.returncode == 0, shown
    assert other.read_text() == before.replace("def log_loss(", "def log_loss(  # told\n    ", 1) != before
    assert (tmp_path / "my_dpo.py").read_bytes() == own and fix(tmp_path) == []


if __name__ == "__main__":
    if sys.argv[1:2] != ["--fix"]:
        sys.exit(__doc__)
    print(*(fix(Path(*sys.argv[2:]) if sys.argv[2:] else ROOT) or ["nothing differed"]), sep="\n")
