"""README and docstrings tell the truth: commands parse, files exist, figures come from Results/."""

import importlib
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from Benchmarks import Collect

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {path.stem: path for path in ROOT.glob("*.py") if "__main__" in path.read_text()}


def commands():
    """Yield (script, flags) of each `python SCRIPT.py ...` and `torchrun ... SCRIPT.py ...` that users are shown."""
    texts = {"README.md": README} | {path.name: path.read_text().split('"""')[1] for path in SCRIPTS.values()}
    for where, text in texts.items():
        for command in re.findall(r"(?:^ +|`)((?:python|torchrun) [^`\n]+)", text, flags=re.MULTILINE):
            words = shlex.split(command.replace("...", ""), comments=True)
            script = next(word for word in words if word.endswith(".py") or word.startswith("Benchmarks."))
            yield pytest.param(script, words[words.index(script) + 1 :], id=f"{where}: {command[:60]}")


def stand_in(flags, folder):
    """Replace what stands for a user's own files by a folder that exists."""
    return [str(folder) if flag.startswith(("PATH", "Data/")) else flag for flag in flags]


@pytest.mark.parametrize("script, flags", list(commands()))
def test_command_parses(script, flags, tmp_path):
    if script.startswith("Benchmarks."):
        assert (ROOT / (script.replace(".", "/") + ".py")).exists()
        return
    assert (ROOT / script).exists()
    module = importlib.import_module(Path(script).stem) if "/" not in script else None
    if "--help" in flags:
        with pytest.raises(SystemExit, match="0"):
            module.get_args(flags)
    elif hasattr(module, "get_args"):
        module.get_args(stand_in(flags, tmp_path))


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make (\w+)", README)) & {"demo", "test"}
    assert targets == {"demo", "test"} and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), f"README links to {link}"


def test_every_module_is_listed():
    listed = set(re.findall(r"^    (\w+\.py) ", README, flags=re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob("*.py")}


def test_figures_come_from_results():
    blocks = re.findall(rf"<!-- (?:{'|'.join(Collect.MAKERS)}) ([\w-]+)", README)
    assert README.count("<!-- end -->") == len(blocks) >= 7
    for name in blocks:
        assert (ROOT / "Results" / f"{name}.json").exists()
    assert Collect.fill(README, ROOT / "Results") == README, "run `python -m Benchmarks.Collect`"


ENCODERS = [*(ROOT / "Results").glob("simclr-*.json"), *(ROOT / "Results").glob("isicle-*.json")]


@pytest.mark.parametrize("file", ENCODERS, ids=lambda file: file.name)
def test_results_say_how_they_were_made(file):
    for record in json.loads(file.read_text()):
        assert record["command"].startswith("python ") and record["revision"] and record["device"]
        assert record["evaluation"]["split"] == "test" and record["evaluation"]["epoch"] == record["epochs"]
        assert 0 < record["evaluation"]["linear"] <= 1 and record["minutes"] > 0


@pytest.mark.parametrize("file", sorted((ROOT / "Results").glob("camnet-*.json")), ids=lambda file: file.name)
def test_generators_say_how_they_were_made(file):
    for record in json.loads(file.read_text()):
        assert record["command"].startswith("python ") and record["revision"] and record["device"]
        assert record["steps"] > 0 and record["minutes"] > 0 and (ROOT / "Results" / f"{file.stem}.png").exists()
        measures = record["generator"]
        assert measures["best_of_16"] < 0.85 * measures["best_of_1"] and measures["fit"]


def scores_of(name):
    """Return {(arm, score): its values, one for each seed} of a file of Benchmarks/Arms.py, and their means."""
    arms = Collect.by_arm(json.loads((ROOT / "Results" / f"{name}.json").read_text()))
    scores = {(arm, score): [row[score] for row in rows] for arm, rows in arms.items() for score in ("knn", "linear")}
    return scores, {key: statistics.mean(values) for key, values in scores.items()}


@pytest.mark.parametrize("file", sorted((ROOT / "Results").glob("arms-*.json")), ids=lambda file: file.name)
def test_arms_are_compared_fairly(file):
    arms = Collect.by_arm(json.loads(file.read_text()))
    for arm, rows in arms.items():
        assert len({row["seed"] for row in rows}) == len(rows) and {row["split"] for row in rows} == {"test"}
        assert all(row["command"].startswith("python Train") and "dirty" not in row["revision"] for row in rows)
        assert arm == "simclr_full_equal_compute" or {row["steps"] for row in rows} == {arms["simclr_full"][0]["steps"]}
        assert (rows[0]["generator_macs"] > 0) == (rows[0]["title"].startswith(("ISICLE", "one restoration")))


def lead(scores, name, arm, over):
    """Return by how much an arm's mean is above another's, and two of the larger of both standard deviations."""
    pair = [scores[each, name] for each in (arm, over)]
    return statistics.mean(pair[0]) - statistics.mean(pair[1]), 2 * max(map(statistics.stdev, pair))


def test_what_must_hold_on_generated_shapes():
    for file in ("arms-shapes", "arms-shapes-20"):
        scores, mean = scores_of(file)
        assert {len(values) for values in scores.values()} == {3}
        for name in ("knn", "linear"):
            points, deviations = lead(scores, name, "isicle_full", "simclr_full")
            assert points >= max(0.05, deviations)
    _, mean = scores_of("arms-shapes")
    assert mean["gen_gen_crop", "linear"] >= 2 * mean["simclr_crop", "linear"]


def test_what_is_said_of_generated_shapes():
    (scores, mean), (longer, _) = scores_of("arms-shapes"), scores_of("arms-shapes-20")
    for name in ("knn", "linear"):
        others = [value for (arm, each), value in mean.items() if each == name and "equal" not in arm]
        assert mean["isicle_full", name] == max(others)
        points = {arm: lead(scores, name, arm, "simclr_full")[0] for arm in ("isicle_full", "simclr_full_extra_view")}
        assert points["isicle_full"] > {"knn": 0.1, "linear": 0.05}[name]
        assert points["simclr_full_extra_view"] > points["isicle_full"] / 2
        more, deviations = lead(scores, name, "isicle_full", "simclr_full_extra_view")
        assert 0.01 < more < 0.03 and more > deviations
        assert mean["simclr_full_equal_compute", name] > mean["isicle_full", name]
        assert lead(longer, name, "isicle_full", "simclr_full")[0] < points["isicle_full"] / 1.5
        assert mean["single_code", name] < 1.1 * mean["simclr_crop", name]
        assert mean["gen_gen_full", name] > mean["simclr_full", name]
        assert abs(lead(longer, name, "gen_gen_full", "simclr_full")[0]) < 0.02


def test_what_is_said_of_the_choice():
    choice = json.loads((ROOT / "Results" / "choice-shapes.json").read_text())
    for epochs in (15, 20):
        runs = [row for row in choice if row["epochs"] == epochs and row["flags"].get("num_views") == 2]
        rates = {row["flags"]["lr"]: row["evaluation"]["knn"] + row["evaluation"]["linear"] for row in runs}
        assert len(rates) >= 3 and max(rates, key=rates.get) == 1.6
    best = sorted(choice, key=lambda row: row["evaluation"]["linear"])
    assert best[-1]["flags"]["bank"] == "Data/redrawn.npy" and best[-1]["pair"] == "real_real_gen"
    assert best[-1]["evaluation"]["linear"] > best[-2]["evaluation"]["linear"] + 0.03


def test_what_is_said_of_the_rate_on_cifar10():
    choice = json.loads((ROOT / "Results" / "choice-cifar10.json").read_text())
    told = ("temp", "aug", "color_s", "num_views", "pair", "p_gen", "corrupt", "loss", "pick")
    runs = {(row["flags"]["lr"], *(row["flags"].get(name) for name in told)): row["evaluation"] for row in choice}
    fast = {key[1:]: scores for key, scores in runs.items() if key[0] == 1.2}
    assert len(fast) == 3
    for name in ("knn", "linear"):
        assert all(scores[name] > runs[0.6, *rest][name] for rest, scores in fast.items())
    third = next(scores for rest, scores in fast.items() if 3 in rest)
    assert third["linear"] == max(scores["linear"] for scores in fast.values())


def test_data_is_no_package():
    assert not (ROOT / "Data" / "__init__.py").exists(), "it would hide Data.py from every script"
