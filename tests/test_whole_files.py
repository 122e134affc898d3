"""Every file is whole or absent: after a kill anywhere, a full disk, a folder that went, Ctrl-C, and no memory left."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from itertools import count

import pytest
from conftest import ROOT, make_rows, save_model, write_rows
from test_eval import random_adapter
from test_export import Setup

import eval_prefs
import export_ollama

# ------------------------------------------------------------------------------------------------------------ running

# Forks a child for each job, a line of JSON: the script's imports, which take seconds, are made once. "at": the call of
# those that change a folder in which the signal comes; "bytes": how long a file gets, where the system ends the child
# ("deadly") or refuses to write on, as on a full disk; "patch": what is run before the script.
LAUNCHER = '''
import contextlib, json, os, resource, runpy, shutil, signal, sys
from pathlib import Path
script = sys.argv[1]
sys.path.insert(0, str(Path(script).parent))
__import__(Path(script).stem)
import mlx_lm, mlx_lm.sample_utils
with contextlib.suppress(ImportError):
    import matplotlib.pyplot
    import matplotlib.backends.backend_agg

def signal_at(wanted, number):
    count = 0
    def wrap(name, real):
        def call(*words, **more):
            nonlocal count
            count += 1
            if count == wanted:
                os.kill(os.getpid(), number)
            return real(*words, **more)
        setattr(os, name, call)
    for name in ("mkdir", "replace", "rename", "fsync", "unlink", "rmdir"):
        wrap(name, getattr(os, name))

def child(job, errors):
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, handle in enumerate((nothing, nothing, errors)):
        os.dup2(handle, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(job["cwd"])
    os.environ["XDG_CACHE_HOME"] = job["cwd"] + "/cache"
    sys.argv, code = [script, *job["words"]], 0
    exec(job.get("patch", ""), {})
    if job.get("at"):
        signal_at(job["at"], job.get("signal", signal.SIGKILL))
    if "bytes" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if job.get("deadly") else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["bytes"], job["bytes"]))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, (int, type(None))) else 1
        if isinstance(stop.code, str):
            os.write(2, (stop.code + chr(10)).encode())
    except BaseException:
        import traceback
        code, _ = 1, os.write(2, traceback.format_exc().encode())
    os._exit(code or 0)

for line in sys.stdin:
    mine, its = os.pipe()
    if not (pid := os.fork()):
        child(json.loads(line), its)
    os.close(its)
    with open(mine, errors="replace") as file:
        said = file.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
'''


class Script:
    """A script that is ready to run: run() returns its exit status, negative for a signal's, and its stderr."""

    def __init__(self, name, folder):
        env = {**os.environ, "MPLCONFIGDIR": str(folder), "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
        self.process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(ROOT / f"{name}.py")], **pipes)

    def run(self, cwd, words, **job):
        job |= {"cwd": str(cwd), "words": [str(word) for word in words]}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        lines = said.splitlines(keepends=True)
        return code, "".join(line for line in lines if not line.startswith("[transformers]"))  # it warns as it loads

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)


def launcher(name):
    @pytest.fixture(scope="module")
    def launched(tmp_path_factory):
        script = Script(name, tmp_path_factory.mktemp("launcher"))
        yield script
        script.end()

    return launched


build, evaluation, exporter = map(launcher, ("build_dpo_pairs", "eval_prefs", "export_ollama"))


def contents(folder):
    """Return {name: bytes} of all files below a folder, {} where there is none."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(done, *says):
    code, said = done
    assert code == 1 and len(said.strip().splitlines()) == 1 and "Traceback" not in said, done
    assert all(part in said for part in says), said


def unfinished(folder):
    return [path.name for path in folder.rglob("unfinished*")]


class Case:
    """A script in a folder with earlier outputs, and those of a run that nothing disturbs."""

    def __init__(self, script, folder, words, outputs):
        self.script, self.before, self.words, self.outputs = script, folder / "before", words, outputs
        self.work, self.old, self.new = folder / "work", {}, {}

    def fresh(self):
        """Put everything back as it was before; return the folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before, self.work)
        return self.work

    def run(self, **job):
        return self.script.run(self.work, self.words, **job)

    def there(self):
        """Return {name: bytes} of what is at the outputs' names."""
        found = {name: data for name, data in contents(self.work).items() if name.split("/")[0] in self.outputs}
        return {name: data for name, data in found.items() if "unfinished-" not in name}

    def learn(self):
        self.fresh()
        self.old = self.there()
        assert self.run() == (0, "")
        self.new = self.there()
        assert self.new and self.new != self.old and not unfinished(self.work)
        return self


def is_whole(case, name, data):
    """Whether a file is the earlier run's or the later one's; an eval's numbers: a whole state in between."""
    if name.endswith("pairs.jsonl"):
        rows = [json.loads(line) for line in data.decode().splitlines()]
        return len(rows) == len(case.new[name].splitlines()) and all("base" in row["models"] for row in rows)
    return data in (case.old.get(name), case.new.get(name))


def all_whole(case):
    found = case.there()
    assert [name for name, data in found.items() if not is_whole(case, name, data)] == []
    return found


def files_whole(case, killed=False):
    """Files: each at its name is whole, and what was there still is."""
    assert case.old.keys() <= all_whole(case).keys()


def folders_whole(case, killed=False):
    """Folders: all of the earlier or of the later one; the earlier is never lost, and only a kill leaves neither."""
    found = all_whole(case)
    for output in case.outputs:
        own, old, new = ({n: d for n, d in x.items() if n.split("/")[0] == output} for x in (found, case.old, case.new))
        assert own in (old, new) or (killed and not own)
        aside = contents(case.work / f"{output}-1")
        assert not old or old in (own, {f"{output}/{name}": data for name, data in aside.items()})


def every_call(case, check, number=signal.SIGKILL, calls=None, again=True):
    """Have a signal come in each of the calls that change a folder, all by default; return their number."""
    for at in calls or count(1):
        case.fresh()
        done = case.run(at=at, signal=number)
        if done == (0, ""):
            assert calls is None and case.there() == case.new
            return at - 1
        assert done == ((1, "interrupted\n") if number == signal.SIGINT else (-number, "")), (at, done)
        killed = number != signal.SIGINT
        check(case, killed)
        assert killed or not unfinished(case.work), at
        if again:
            runs_again(case)


def runs_again(case):
    """After whatever happened the next run makes all of it, or says that it is there already."""
    there = case.there()
    code, said = case.run()
    if code == 1 and "it is there already" in said:
        assert all(there.get(name) == data for name, data in case.new.items() if name.split("/")[0] in said)
    else:
        assert (code, said) == (0, "") and case.there() == case.new and not unfinished(case.work)


def every_byte(case, check, lengths, deadly):
    """Have files end at a length, by a kill or as on a full disk, and look at what is there; return how many did."""
    ended = 0
    for length in lengths:
        case.fresh()
        done = case.run(bytes=length, deadly=deadly)
        if done == (0, ""):
            assert case.there() == case.new
            continue
        ended += 1
        assert done == (-signal.SIGXFSZ, "") if deadly else one_line(done) is None, (length, done)
        check(case, deadly)
        assert deadly or not unfinished(case.work), length
        runs_again(case)
    return ended


def spread(case, number):
    """Return that many lengths, up to that of the longest file."""
    longest = max(map(len, case.new.values()))
    return sorted({*range(0, longest, max(longest // number, 1)), longest - 1})


# --------------------------------------------------------------------------------------------------------------- cases


@pytest.fixture(scope="module")
def pairs_case(build, tmp_path_factory):
    """build_dpo_pairs.py over an earlier output."""
    folder = tmp_path_factory.mktemp("build")
    rows = [{"prompt": r["messages"][-1]["content"], **{s: r[s] for s in ("chosen", "rejected")}} for r in make_rows(9)]
    (folder / "before").mkdir()
    source = write_rows(folder / "before" / "in.jsonl", rows[:4])
    case = Case(build, folder, ["in.jsonl", "--out", "out"], ["out"])
    assert build.run(folder / "before", case.words) == (0, "")
    write_rows(source, rows)
    return case.learn()


@pytest.fixture(scope="module")
def eval_case(evaluation, tmp_path_factory):
    """eval_prefs.py over an earlier report, with a second adapter and, where matplotlib is, pictures."""
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "before" / "tiny")
    write_rows(folder / "before" / "test.jsonl", make_rows(6))
    for seed, name in enumerate(("one", "two")):
        random_adapter(folder / "before" / "tiny", folder / "before" / name, seed=seed)
        (folder / "before" / name / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.7}\n')
    words = "--model tiny --data test.jsonl --adapter-path one --hard 2 report/hard.jsonl".split()
    assert evaluation.run(folder / "before", words) == (0, "")
    return Case(evaluation, folder, [*words, "--adapter-path", "two"], ["report"]).learn()


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    gguf = sys.modules.get("gguf")
    try:
        import gguf
    except ImportError:
        pass
    (folder / "before").mkdir()
    Setup(folder / "before", gguf)
    config = folder / "before" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model": "model"}))
    return folder


EXPORTS = {
    "peft": ("--peft p", ["p"]),
    "fuse": ("--fuse --out f", ["f"]),
    "lora": ("--lora-gguf lora.gguf", ["lora.gguf"]),
    "merged": ("--gguf base.gguf --out m", ["m"]),
}


@pytest.fixture(scope="module")
def export_case(exporter, export_folder):
    @cache
    def case(name):
        if name in ("lora", "merged"):
            pytest.importorskip("gguf", reason="pip install gguf")
        words, outputs = EXPORTS[name]
        return Case(exporter, export_folder, ["--adapter-path", "adapter", *words.split()], outputs).learn()

    return case


# --------------------------------------------------------------------------------------------------------------- kills


def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut is no kill: bytes are flushed before the rename, the names after it."""
    log, number = [], lambda path: path.stat().st_ino
    for name in ("fsync", "replace", "rename"):
        said = lambda *words, name=name, real=getattr(os, name): (
            log.append(os.fstat(words[0]).st_ino if name == "fsync" else name),
            real(*words),
        )
        monkeypatch.setattr(os, name, said)
    path = tmp_path / "report.md"
    for text in ("old", "new"):
        log.clear()
        eval_prefs.write_atomically(path, lambda name: name.write_text(text))
        assert log == [number(path), "replace", number(tmp_path)] and path.read_text() == text
    for _ in range(2):
        log.clear()
        with export_ollama.whole(tmp_path / "deep" / "out") as folder:
            (folder / "sub").mkdir()
            for path in (folder / "a", folder / "sub" / "b"):
                path.write_text("text")
        inside = [tmp_path / "deep" / "out", *(tmp_path / "deep" / "out").rglob("*")]
        before, after = log[: log.index("rename")], [x for x in log[log.index("rename") :] if x != "rename"]
        assert sorted(before) == sorted(map(number, inside)) and after == [number(tmp_path / "deep")]


def test_pairs_are_whole_after_a_kill(pairs_case):
    assert every_call(pairs_case, folders_whole) == 7
    assert every_byte(pairs_case, folders_whole, spread(pairs_case, 8), deadly=True) > 6


@pytest.mark.slow
def test_pairs_are_whole_after_a_kill_at_any_byte(pairs_case):
    longest = max(map(len, pairs_case.new.values()))
    assert every_byte(pairs_case, folders_whole, range(0, longest, 23), deadly=True) > 40


def test_a_report_is_whole_after_a_kill(eval_case):
    every_call(eval_case, files_whole, calls=[15])


@pytest.mark.slow
def test_a_report_is_whole_after_any_kill(eval_case):
    assert every_call(eval_case, files_whole) > 15
    assert every_call(eval_case, files_whole, signal.SIGINT, again=False) > 15
    assert every_byte(eval_case, files_whole, spread(eval_case, 12), deadly=True) > 8


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_whole_after_a_kill(export_case, name):
    case = export_case(name)
    check = files_whole if name == "lora" else folders_whole
    every_call(case, check, calls=[2, 4])
    assert every_byte(case, check, spread(case, 2)[1:2], deadly=True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_whole_after_any_kill(export_case, name):
    case = export_case(name)
    check = files_whole if name == "lora" else folders_whole
    assert every_call(case, check) > 3
    assert every_call(case, check, signal.SIGINT, again=False) > 3
    assert every_byte(case, check, spread(case, 40), deadly=True) > 20


def test_a_kill_between_two_renames_is_explained(pairs_case):
    """The one moment at which nothing has the name: the earlier output is aside; the next run says what it found."""
    patch = "import os; os.rename = lambda *words, r=os.rename: (r(*words), os.kill(os.getpid(), 9))"
    pairs_case.fresh()
    assert pairs_case.run(patch=patch) == (-9, "")
    assert not (pairs_case.work / "out").exists() and unfinished(pairs_case.work) == ["unfinished-out"]
    words = [sys.executable, str(ROOT / "build_dpo_pairs.py"), *pairs_case.words]
    done = subprocess.run(words, cwd=pairs_case.work, capture_output=True, text=True)
    assert done.returncode == 0 and "unfinished-out is what a killed run left" in done.stdout
    folders_whole(pairs_case)
    assert pairs_case.there() == pairs_case.new


def test_an_unfinished_folder_is_no_source(pairs_case):
    """What a killed run left beside --out is not read as data where the folder of both is a source."""
    work = pairs_case.fresh()
    (work / "unfinished-out").mkdir()
    row = {"prompt": "Is it read?", "chosen": "No, it is not.", "rejected": "It seems so."}
    write_rows(work / "unfinished-out" / "train.jsonl", [row])
    assert pairs_case.script.run(work, [".", "--out", "out"])[0] == 0
    assert pairs_case.there() == pairs_case.new


# ------------------------------------------------------------------------------------------------------- full, or gone


def test_pairs_on_a_disk_that_fills(pairs_case):
    """A limit on the length of a file is refused as a full disk is: in the middle of a write."""
    assert every_byte(pairs_case, folders_whole, spread(pairs_case, 8), deadly=False) > 6


def test_a_report_on_a_disk_that_fills(eval_case):
    assert every_byte(eval_case, files_whole, spread(eval_case, 2)[:2], deadly=False) > 1


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_on_a_disk_that_fills(export_case, name):
    case = export_case(name)
    check = files_whole if name == "lora" else folders_whole
    assert every_byte(case, check, spread(case, 2)[1:2], deadly=False) == 1


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small disk in memory at a folder; skips where the system does not allow it."""
    mounted = []

    def call(folder, options):
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    try:
        yield call
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    finally:
        for folder in mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(disk, free):
    """Write a file that leaves so many bytes."""
    left = shutil.disk_usage(disk).free - free
    (disk / "filler").write_bytes(bytes(left))


def disk_case(case, mount):
    """Return the case with its earlier outputs on a disk of its own, and the words to write there."""
    case.fresh()
    disk = mount(case.work.parent / "disk", "size=1m")
    for output in case.outputs:
        if (case.work / output).exists():
            shutil.copytree(case.work / output, disk / output)
    words = [f"{disk}/{word}" if word.split("/")[0] in case.outputs else word for word in case.words]
    return disk, words if any(str(disk) in word for word in words) else [*words, "--out", f"{disk}/report"]


@pytest.mark.parametrize("free", [0, 4096])
def test_pairs_on_a_full_disk(pairs_case, mount, free):
    disk, words = disk_case(pairs_case, mount)
    fill(disk, free)
    before = contents(disk)
    one_line(pairs_case.script.run(pairs_case.work, words), "out", "No space left")
    assert contents(disk) == before and not unfinished(disk)


@pytest.mark.parametrize("free", [0, 4096])
def test_a_report_on_a_full_disk(eval_case, mount, free):
    if free:
        pytest.importorskip("matplotlib", reason="the rest has room in there")
    disk, words = disk_case(eval_case, mount)
    words = [*words, "--out", f"{disk}/report"]
    fill(disk, free)
    one_line(eval_case.script.run(eval_case.work, words), "No space left")
    found = {name: data for name, data in contents(disk).items() if name != "filler"}
    assert found.keys() >= eval_case.old.keys() and not unfinished(disk)
    assert all(is_whole(eval_case, name, data) for name, data in found.items())


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("free", [0, 4096])
def test_an_export_on_a_full_disk(export_case, mount, name, free):
    case = export_case(name)
    disk, words = disk_case(case, mount)
    fill(disk, free)
    one_line(case.script.run(case.work, words), case.outputs[0] if name != "fuse" else "fuse")
    assert list(contents(disk)) == ["filler"] and not unfinished(disk)


def read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


@pytest.mark.parametrize("name", ["pairs", "eval", *EXPORTS])
def test_a_read_only_disk(name, mount, request):
    """Root may write anywhere, but not there."""
    known = name in ("pairs", "eval")
    case = request.getfixturevalue(f"{name}_case") if known else request.getfixturevalue("export_case")(name)
    disk, words = disk_case(case, mount)
    words += ["--out", f"{disk}/report"] if name == "eval" else []
    read_only(disk)
    before = contents(disk)
    one_line(case.script.run(case.work, words), str(disk), "ead-only")
    assert contents(disk) == before


GONE = """
import shutil, {module} as module
def call(*words, real=module.{name}, **more):
    shutil.rmtree("{folder}", ignore_errors=True)
    return real(*words, **more)
module.{name} = call
"""


@pytest.mark.parametrize("module, name", [("mlx_lm", "load"), ("matplotlib.figure", "Figure.savefig")])
def test_the_reports_folder_goes(eval_case, module, name):
    if "matplotlib" in module:
        pytest.importorskip("matplotlib")
    eval_case.fresh()
    module, _, owner = module.partition(" ")
    patch = GONE.format(module=module, name=name, folder="report")
    one_line(eval_case.run(patch=patch), "No such file or directory", "report/")
    assert not (eval_case.work / "report").exists()
    runs_again(eval_case)


def test_the_folder_above_the_pairs_goes(pairs_case):
    """Before a word is written it is made again; in the middle of it: one line."""
    work = pairs_case.fresh()
    words = ["in.jsonl", "--out", "deep/out"]
    for module, name in (("random", "Random.shuffle"), ("json", "dumps")):
        done = pairs_case.script.run(work, words, patch=GONE.format(module=module, name=name, folder="deep"))
        assert done == (0, "") if name == "Random.shuffle" else one_line(done, "deep/out: ") is None
    assert not (work / "deep").exists()


@pytest.mark.parametrize("name", EXPORTS)
def test_the_folder_above_an_export_goes(export_case, name):
    case = export_case(name)
    work = case.fresh()
    words = [f"deep/{word}" if word in case.outputs else word for word in case.words]
    (work / "deep").mkdir()
    module = "mlx.core" if name in ("peft", "fuse") else "gguf"
    call = "save_safetensors" if name in ("peft", "fuse") else "GGUFWriter.write_header_to_file"
    one_line(case.script.run(work, words, patch=GONE.format(module=module, name=call, folder="deep")))
    assert not list((work / "deep").rglob("*"))


# -------------------------------------------------------------------------------------------------- Ctrl-C, and memory


def test_ctrl_c_while_pairs_are_written(pairs_case):
    assert every_call(pairs_case, folders_whole, signal.SIGINT) == 7
    every_call(pairs_case, folders_whole, signal.SIGTERM, calls=[2, 6])


def test_ctrl_c_while_a_report_is_written(eval_case):
    every_call(eval_case, files_whole, signal.SIGINT, calls=[5, 14], again=False)
    every_call(eval_case, files_whole, signal.SIGTERM, calls=[10], again=False)


@pytest.mark.parametrize("name", EXPORTS)
def test_ctrl_c_while_an_export_is_written(export_case, name):
    check = files_whole if name == "lora" else folders_whole
    every_call(export_case(name), check, signal.SIGINT, calls=[3], again=False)


def raising(module, name, error):
    return f"import {module} as module\ndef call(*words, **more):\n    raise {error}\nmodule.{name} = call\n"


@pytest.mark.parametrize("error", ['RuntimeError("[malloc] Unable to allocate 123 bytes.")', "MemoryError()"])
def test_an_evaluation_without_memory(eval_case, error):
    eval_case.fresh()
    done = eval_case.run(patch=raising("mlx.core.fast", "cross_entropy", error))
    one_line(done, "--batch-size", "--max-seq-length", "Unable to allocate 123" if "malloc" in error else "")
    assert eval_case.there() == eval_case.old
    runs_again(eval_case)


def test_an_export_without_memory(export_case):
    case = export_case("peft")
    case.fresh()
    error = 'RuntimeError("[malloc] Unable to allocate 123 bytes.")'
    one_line(case.run(patch=raising("mlx.core", "save_safetensors", error)), "p: ", "Unable to allocate 123")
    assert not case.there() and not unfinished(case.work)


# --------------------------------------------------------------------------------------------------- generated answers

ANSWERS = """
import mlx_lm, types
texts = iter(f"Nobody could ever say, case {i}." for i in range(99))
make = lambda m, t, prompts, **more: [next(texts) for _ in prompts]
mlx_lm.load = lambda name, *_: (None, types.SimpleNamespace(apply_chat_template=lambda *words, **more: [1]))
mlx_lm.batch_generate = lambda *words, **more: types.SimpleNamespace(
    texts=(found := make(*words)), token_ids=[[7]] * len(found))
"""


@pytest.fixture
def answering(build, tmp_path):
    """A folder with four prompts that have only a good answer, and what a run on them with a stand-in model writes."""
    turns = [[("human", f"How far is number {i}?"), ("gpt", f"It is {i} minutes along the river.")] for i in range(4)]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in pair]} for pair in turns]
    write_rows(tmp_path / "in.jsonl", rows)
    words = ["in.jsonl", "--out", "out", "--generate-rejected", "m", "--batch-size", "2"]
    assert build.run(tmp_path, words, patch=ANSWERS) == (0, "")
    return tmp_path, words, (tmp_path / "out.generated.jsonl").read_bytes()


def answers_in(data):
    """Return {name: answer} of a file's whole lines."""
    known = {}
    for line in data.decode(errors="replace").splitlines():
        if line.endswith("]"):
            name, text = json.loads(line)
            known[name] = text
    return known


def torn(build, answering, cuts):
    """Check that whatever is whole in a file of answers that was cut there is kept, and the rest made anew."""
    folder, words, whole = answering
    for cut in cuts:
        (folder / "out.generated.jsonl").write_bytes(whole[:cut])
        assert build.run(folder, words, patch=ANSWERS) == (0, ""), cut
        known = answers_in((folder / "out.generated.jsonl").read_bytes())
        assert known.keys() == answers_in(whole).keys() and known.items() >= answers_in(whole[:cut]).items(), cut
        rows = [json.loads(x) for path in (folder / "out").glob("*.jsonl") for x in path.read_text().splitlines()]
        assert sorted(row["rejected"][0]["content"] for row in rows) == sorted(known.values()), cut
        shutil.rmtree(folder / "out")
        for older in folder.glob("out-*"):
            shutil.rmtree(older)


def test_a_torn_file_of_answers(build, answering):
    torn(build, answering, range(0, len(answering[2]), 41))


@pytest.mark.slow
def test_a_file_of_answers_torn_at_any_byte(build, answering):
    torn(build, answering, range(len(answering[2]) + 1))


def test_generation_without_memory_or_disk(build, answering):
    """What was answered before stays, and the next run goes on from there."""
    folder, words, whole = answering
    (folder / "out.generated.jsonl").unlink()
    shutil.rmtree(folder / "out")
    error = 'RuntimeError("[malloc] Unable to allocate 123 bytes.")'
    second = f"{ANSWERS}\nreal, calls = make, []\ndef make(*words, **more):\n    calls.append(1)\n"
    second += f"    if len(calls) == 2:\n        raise {error}\n    return real(*words)\n"
    one_line(build.run(folder, words, patch=second), "--batch-size", "out.generated.jsonl", "Unable to allocate")
    half = (folder / "out.generated.jsonl").read_bytes()
    assert len(answers_in(half)) == 2 and not (folder / "out").exists()
    one_line(build.run(folder, words, patch=ANSWERS, bytes=len(half) + 30), "out.generated.jsonl", "make room")
    assert (folder / "out.generated.jsonl").read_bytes().startswith(half)
    assert build.run(folder, words, patch=ANSWERS) == (0, "")
    assert answers_in((folder / "out.generated.jsonl").read_bytes()).items() >= answers_in(half).items()
