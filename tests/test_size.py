"""The ceilings: how long a script, the tests and the README may be, and in how many lines the trainers differ."""

import ast
import io
import shutil
import subprocess
import tokenize

import pytest
from conftest import ROOT

CEILINGS = {  # lines as ruff format leaves them: in all, and of code
    "dpo_trainer.py": (600, 450),
    "simpo_trainer.py": (560, 420),
    "build_dpo_pairs.py": (740, 560),
    "sample_pairs.py": (320, 240),
    "eval_prefs.py": (560, 420),
    "export_ollama.py": (320, 240),
}
IDLE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
SCRIPTS = [name for name in CEILINGS if (ROOT / name).exists()]


def code_lines(source):
    """Return the numbers of the lines that hold code: no blank, comment-only or docstring lines."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    rows = {row for token in tokens if token.type not in IDLE for row in range(token.start[0], token.end[0] + 1)}
    blank = {row for row, line in enumerate(source.splitlines(), 1) if not line.strip()}  # within a text, too
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            rows -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return rows - blank


def test_the_count_is_right():
    source = '"""A\n\ndocstring."""\n\n# a comment\nx = [  # one\n    1,\n\n]\n\n\ndef f():\n    """Two."""\n'
    assert code_lines(source + '    return """a\n\nb"""\n') == {6, 7, 9, 12, 14, 16}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_within_its_ceilings(name):
    source = (ROOT / name).read_text()
    assert (len(source.splitlines()) <= CEILINGS[name][0], len(code_lines(source)) <= CEILINGS[name][1]) == (True, True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_functions_and_its_lines_are_short(name):
    nodes = ast.walk(ast.parse((ROOT / name).read_text()))
    assert max(node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef)) <= 80
    assert max(map(len, (ROOT / name).read_text().splitlines())) <= 120


@pytest.mark.skipif(not shutil.which("ruff"), reason="ruff is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_formatted(name):
    """So that lines are counted alike."""
    command = ["ruff", "format", "--isolated", "--line-length", "120", "--check", str(ROOT / name)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0 and "fmt: off" not in (ROOT / name).read_text(), shown.stdout


def test_the_tests_and_the_readme_are_within_theirs():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py")}
    assert sum(lines.values()) <= 6500, sorted(lines.items(), key=lambda item: -item[1])
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme.splitlines()) <= 260 and len(readme) <= 18 * 1024, (len(readme.splitlines()), len(readme))


def test_the_trainers_differ_in_fewer_than_130_lines():
    """Counted side by side: a changed line is one, and so is a line that only one of them has."""
    command = ["diff", "--side-by-side", "--suppress-common-lines", ROOT / "dpo_trainer.py", ROOT / "simpo_trainer.py"]
    assert 20 < len(subprocess.run(command, capture_output=True, text=True).stdout.splitlines()) < 130
