"""docs/ does what it says: its diffs apply and work, and its Python runs; in child processes, on few images."""

import codeop
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, save_shapes
from PIL import Image

from Benchmarks.Forks import Child

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
FIRST_HOUR = (ROOT / "docs" / "first_hour.md").read_text()
SMALLER = {"N": 40, "PERIODS": 1, "EPOCHS": 2, "BATCH": 16}  # numbers of first_hour.md
QUICK = {
    "TrainSimCLR": "--device cpu --n_workers 0 --bs 16",
    "TrainISICLE": "--device cpu --n_workers 0 --bs 16 --camnet '--candidates 4 --bs 16'",
    "TrainCamNet": "--device cpu --candidates 4 --bs 16",
}
REGISTRIES = ("Tests/test_data.py", "Tests/test_losses.py", "-k", "rows or recipe or every_form")

# What the commands of a section print, where its diff works.
PRINTED = {
    "A data set": ["birds: 40 images of 96 px"],
    "A backbone": ["mobilenet_v3_small", "convmixer: 87,936 parameters"],
    "A loss": ["images x 3 views"],
    "A pair": ["images x 3 views"],
    "A corruption": ["undoes gray+poster2"],
}

# Runs the Python and the commands of each section, then tests of the suite, in a copy of the repository.
CHILD = """
import contextlib, importlib, io, json, sys, traceback
from pathlib import Path
from Images import Shapes

Shapes.SIZES.update(train=320, val=100, test=100)
results = {}
for title, (blocks, commands) in json.loads(Path("sections.json").read_text()).items():
    printed = io.StringIO()
    error = ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            for block in blocks:
                exec(block, {})
            for script, flags in commands:
                module = importlib.import_module(script)
                module.main(module.get_args(flags))
        except BaseException:
            error = traceback.format_exc()
    results[title] = {"error": error, "printed": printed.getvalue()}
    Path("results.json").write_text(json.dumps(results))

import pytest

printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    code = pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]])
results["registries"] = {"error": printed.getvalue() if code else "", "printed": printed.getvalue()}
Path("results.json").write_text(json.dumps(results))
"""


def sections(text):
    """Return {title: text} of the parts of a document under headings of the second level."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def blocks(text, language):
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """Return [(script, flags)] of the indented lines `python SCRIPT.py FLAGS`, with flags that make it quick."""
    found = []
    for script, flags in re.findall(r"^    python (\w+)\.py(.*)$", text, flags=re.MULTILINE):
        found.append((script, shlex.split(f"{flags} {QUICK[script]}")))
    return found


def apply(diff, folder):
    """Apply a diff to the files in a folder; return git's error, or nothing."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # the folder is no repository
    done = subprocess.run(
        ["git", "apply", "-"], cwd=folder, env=environment, input=diff, capture_output=True, text=True
    )
    return done.stderr


def move_to(copy):
    """Let this process import the repository's modules anew, from a copy of it."""
    os.chdir(copy)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and ROOT in Path(file).parents and ".venv" not in file:
            del sys.modules[name]
    sys.path[:] = [str(copy) if path == str(ROOT) else path for path in sys.path]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """{title: {"error", "printed"}} of what the sections of extending.md do to a copy of the repository."""
    if not shutil.which("git"):
        pytest.skip("needs git, to apply diffs")
    copy = tmp_path_factory.mktemp("extended")
    for pattern in ("*.py", "*/*.py", "pyproject.toml"):
        for file in ROOT.glob(pattern):
            target = copy / file.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)
    for split in ("train", "val", "test"):
        save_shapes(copy / "Data" / "birds" / split, 4)

    # the diffs; what does not apply is not tried
    refused = {}
    tried = {}
    for title, text in sections(EXTENDING).items():
        error = "".join(apply(diff, copy) for diff in blocks(text, "diff"))
        if error:
            refused[title] = {"error": f"the diff does not apply: {error}", "printed": ""}
        else:
            tried[title] = blocks(text, "python"), commands(text)

    # all that they say, in a fork of this process that has forgotten the repository's modules
    (copy / "sections.json").write_text(json.dumps(tried))
    document = SimpleNamespace(__name__="extending", get_args=list, main=lambda _: exec(CHILD, {}))
    child = Child(document, REGISTRIES, copy / "log", lambda: move_to(copy))
    assert child.wait() == 0, child.output()
    return json.loads((copy / "results.json").read_text()) | refused


@pytest.mark.parametrize("title", PRINTED)
def test_extension_works(title, extended):
    text = sections(EXTENDING)[title]
    assert blocks(text, "diff")
    assert commands(text)
    result = extended[title]
    assert not result["error"], f"docs/extending.md, {title}: {result['error']}{result['printed']}"
    for part in PRINTED[title]:
        assert part in result["printed"], f"docs/extending.md, {title}: {result['printed']}"


def test_every_section_is_tried():
    assert list(sections(EXTENDING)) == list(PRINTED)


def test_a_row_is_the_only_edit(extended):
    """Tests of the tables pass with the new rows: they do not list the names."""
    result = extended["registries"]
    assert "passed" in result["printed"]
    assert not result["error"], result["error"]


@pytest.mark.parametrize("block", blocks(FIRST_HOUR, "python"))
def test_first_hour_can_be_pasted_line_by_line(block):
    """As in an interactive Python, which needs an empty line after a loop."""
    typed = []
    for line in [*block.splitlines(), ""]:
        typed.append(line)
        if codeop.compile_command("\n".join(typed), symbol="single"):  # SyntaxError if it can never be complete
            typed = []
    assert "".join(typed) == ""


def test_first_hour_runs(tmp_path, fork):
    program = "\n".join(blocks(FIRST_HOUR, "python"))
    for name, value in SMALLER.items():
        program, count = re.subn(rf"^{name} = \d+ ", f"{name} = {value} ", program, flags=re.MULTILINE)
        assert count == 1, name
    assert "--period 256 " in program
    program = program.replace("--period 256 ", "--period 16 --candidates 4 ")
    document = SimpleNamespace(
        __name__="first_hour", get_args=lambda _: program, main=lambda program: exec(program, {"__name__": "__main__"})
    )
    child = fork(document, [], lambda: os.chdir(tmp_path))
    assert child.wait() == 0, child.output()
    printed = child.output()

    # the document shows lines of this form
    for line in printed.splitlines()[-5:]:
        form = re.sub(r"\d+", r"\\d+", re.escape(line))
        assert re.search(rf"^    {form}$", FIRST_HOUR, re.MULTILINE), line

    # numbers of the right kind, and pictures
    assert f"features: ({SMALLER['N']}, 128) and ({SMALLER['N']}, 128)" in printed
    for name in ("encoder", "untrained encoder", "raw pixels"):
        scores = re.search(rf"^{name} +kNN ([\d.]+) %, linear probe ([\d.]+) %$", printed, re.MULTILINE)
        knn, linear = scores.groups()
        assert 0 < float(knn) <= 100
        assert 0 < float(linear) <= 100
    for name in ("restorations", "neighbors"):
        with Image.open(tmp_path / "Models" / "first_hour" / f"{name}.png") as picture:
            assert picture.width >= 600
            assert len(picture.convert("RGB").getcolors(2**24)) > 100
