"""README files and docstrings tell the truth about the code: commands parse, flags, files and links exist.

What they say about measured figures is tested in test_claims.py.
"""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from Benchmarks import Tables

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "Results/README.md", "Models/README.md", "Data/README.md")]
DOCUMENTS += [ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
SCRIPTS = [path for folder in (".", "Benchmarks", "Data") for path in ROOT.glob(f"{folder}/*.py")]
SCRIPTS = [path for path in SCRIPTS if '\nif __name__ == "__main__":' in path.read_text()]
README = (ROOT / "README.md").read_text()


def texts():
    """Return {name: text} of all that shows commands to users: README files, and the docstrings of scripts."""
    found = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
    for path in SCRIPTS:
        found[str(path.relative_to(ROOT))] = path.read_text().split('"""')[1]
    return found


def commands():
    """Yield (script, flags) of each `python SCRIPT.py ...`, `python -m MODULE ...` and `torchrun ... SCRIPT.py ...`."""
    for where, text in texts().items():
        if where == "docs/extending.md":  # its commands take what its diffs add: test_docs.py runs them
            continue
        for command in re.findall(r"(?:^ {4,}|`)((?:python|torchrun) [^`\n]+)", text, flags=re.MULTILINE):
            words = shlex.split(re.sub(r"\.\.\.|[][]", "", command), comments=True)
            script = next(word for word in words if word.endswith(".py") or word.startswith("Benchmarks."))
            yield pytest.param(script, words[words.index(script) + 1 :], id=f"{where}: {command[:60]}")


def load(script):
    """Return the module of a script; those in Data/ are not importable by name."""
    if script.startswith("Benchmarks."):
        return importlib.import_module(script)
    file = ROOT / script
    assert file.exists()
    if "/" not in script:
        return importlib.import_module(file.stem)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(word, folder):
    """Replace what stands for a user's own URL, file or folder by one that exists."""
    if word == "URL":
        return "https://localhost/images.zip"
    if word == "FILE" or word.endswith(".zip"):
        file = folder / "images.zip"
        file.touch()
        return str(file)
    if word in ("DIR", "FOLDER") or word.startswith(("PATH", "Data/")):
        return str(folder)
    return word


@pytest.mark.parametrize("script, flags", list(commands()))
def test_command_parses(script, flags, tmp_path):
    module = load(script)
    if "--help" in flags:
        with pytest.raises(SystemExit, match="0"):
            module.get_args(flags)
    else:
        module.get_args([stand_in(word, tmp_path) for word in flags])


def test_every_script_is_shown_with_its_flags():
    shown = {parameters.values[0] for parameters in commands()}
    for path in SCRIPTS:
        name = str(path.relative_to(ROOT))
        if path.parent.name == "Benchmarks":
            name = f"Benchmarks.{path.stem}"
        assert name in shown
    assert len(list(commands())) > 100


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_part_of_a_command_looks_like_a_command(file):
    assert re.findall(r"`\w+\.py +-[^`]*`", file.read_text()) == []


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_exist(file):
    code = "".join(path.read_text() for folder in (".", "Benchmarks", "Data") for path in ROOT.glob(f"{folder}/*.py"))
    known = set(re.findall(r'"(--\w+)"', code)) | {"--nproc_per_node", "--logdir", "--help"}
    for flag in re.findall(r"`(--[a-z][\w-]*)", file.read_text()):
        assert flag in known or flag.replace("--no-", "--") in known


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_exist(file):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / link).exists(), f"{file.relative_to(ROOT)} links to {link}"


def headings(text):
    """Return the names by which GitHub links to the headings of a Markdown text."""
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]


def test_links_to_headings_exist():
    for file in DOCUMENTS:
        for link, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", file.read_text()):
            target = file.parent / link if link else file
            assert heading in headings(target.read_text()), f"{file.relative_to(ROOT)} links to #{heading}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set()
    for file in DOCUMENTS:
        targets.update(re.findall(r"(?:^    |`)make (\w+)", file.read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_module_is_listed():
    lines = re.findall(r"^    ((?:\w+\.py(?:, )?)+) ", README, flags=re.MULTILINE)
    listed = [name for line in lines for name in line.split(", ")]
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py"))
    results = (ROOT / "Results" / "README.md").read_text()
    lines = {
        folder: re.search(rf"^    {folder}/ +(.*)$", README, re.MULTILINE) for folder in ("CamNet", "Images", "Data")
    }
    lines["Benchmarks"] = re.search(r"^`Benchmarks/`: (.*?)\n\n", results, re.MULTILINE | re.DOTALL)
    for folder, line in lines.items():
        modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert modules
        assert modules <= set(re.findall(r"\w+", line[1])), folder


def test_front_door_is_short():
    assert len(README.encode()) <= 12_000


def test_pairs_are_those_of_the_script():
    assert f"<!-- pairs -->{Tables.pairs()}<!-- end -->" in README, "run `python -m Benchmarks.Collect`"
