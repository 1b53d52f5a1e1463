"""README.md and Results/README.md agree with the records in Results/, and those with what the commands do today.

A failure here says that a text or a figure is out of date, not that the code is broken.
"""

import importlib
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from PIL import Image

import Data
import Flags
import TrainCamNet
from Benchmarks import Arms, Collect, Tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "Results"
TEXTS = {name: (ROOT / name).read_text() for name in Collect.FILES}


def files(pattern):
    """Return the files of Results/ of a pattern. AssertionError if there is none."""
    found = sorted(RESULTS.glob(pattern))
    assert found, f"no Results/{pattern}"
    return found


def records(name):
    """Return the records of Results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def agrees(condition, claim):
    """Fail if a claim of README.md or Results/README.md no longer holds."""
    assert condition, f"README is out of date: {claim}"


def says(name, text):
    """Fail unless a file says a text; line breaks do not count."""
    agrees(text in re.sub(r"\s+", " ", TEXTS[name]), f"{name} does not say {text!r}")


def by_name(file):
    return file.name


# ---------------------------------------------------------------------------------------------------- tables, pictures


@pytest.mark.parametrize("name", Collect.FILES)
def test_tables_come_from_results(name):
    text = TEXTS[name]
    blocks = re.findall(rf"<!-- (?:{'|'.join(Tables.MAKERS)}) ([\w-]+) -->", text)
    assert len(blocks) >= 2
    assert text.count("<!-- end -->") == len(blocks) + text.count("<!-- pairs -->")
    agrees(Collect.fill(text, RESULTS) == text, f"{name}: run `python -m Benchmarks.Collect`")


def test_every_record_is_shown():
    for file in files("*.json"):
        named = any(re.search(rf"<!-- \w+ {file.stem} -->|{file.name}", text) for text in TEXTS.values())
        agrees(named, f"{file.name} is in no text")


@pytest.mark.parametrize("file", files("*.png"), ids=by_name)
def test_pictures_are_shown_and_large_enough_to_read(file):
    assert Image.open(file).width >= 600
    agrees(any(f"{file.name})" in text for text in TEXTS.values()), f"{file.name} is shown nowhere")


# ---------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("file", files("simclr-*.json") + files("isicle-*.json"), ids=by_name)
def test_encoders_say_how_they_were_made(file):
    for record in json.loads(file.read_text()):
        assert record["command"].startswith("python ")
        assert record["revision"]
        assert record["device"]
        assert record["minutes"] > 0
        assert record["evaluation"]["split"] == "test"
        assert record["evaluation"]["epoch"] == record["epochs"]
        assert 0 < record["evaluation"]["linear"] <= 1


@pytest.mark.parametrize("file", files("camnet-*.json"), ids=by_name)
def test_generators_say_how_they_were_made(file):
    for record in json.loads(file.read_text()):
        assert record["command"].startswith("python ")
        assert record["revision"]
        assert record["device"]
        assert record["steps"] > 0
        assert record["minutes"] > 0
        assert file.with_suffix(".png").exists()
        assert record["generator"]["best_of_16"] < 0.85 * record["generator"]["best_of_1"]
        assert record["generator"]["fit"]


@pytest.mark.parametrize("file", files("arms-*.json"), ids=by_name)
def test_arms_are_compared_fairly(file):
    arms = Tables.by_arm(json.loads(file.read_text()))
    steps = next(rows[0]["steps"] for arm, rows in arms.items() if not arm.endswith(Arms.EQUAL))
    for arm, rows in arms.items():
        assert len({row["seed"] for row in rows}) == len(rows) == 3
        assert {row["split"] for row in rows} == {"test"}
        for row in rows:
            assert row["command"].startswith("python Train")
            assert "dirty" not in row["revision"]
            assert row["steps"] == steps or arm.endswith("_equal_compute")
        is_charged = rows[0]["generator_macs"] > 0
        assert is_charged == (rows[0]["flags"].get("pair") not in (None, "corrupted"))


def test_an_arm_has_one_name():
    titles = {}
    for file in files("arms-*.json"):
        for row in json.loads(file.read_text()):
            titles.setdefault(row["arm"], set()).add(re.sub(r", --p_gen [\d.]+$", "", Tables.title_of(row)))
    assert titles.keys() <= Arms.ARMS.keys()
    assert all(len(names) == 1 for names in titles.values()), titles


# ---------------------------------------------------------------------------------------------------- stale figures


def changed_since(record):
    """Return {flag: (then, now)} of the flags that a record's command would set differently today.

    A folder of images need not be on this machine: all folders have the same defaults.
    """
    words = shlex.split(record["command"])
    then = record["flags"]
    if then["data"] not in Data.DATASETS:
        words = ["." if word == then["data"] else word for word in words]
        then = then | {"data": Data.place(".")}
    script = importlib.import_module(Path(words[1]).stem)
    device = ["--device", "cpu"] if record["device"].startswith("cpu") else []
    args = script.get_args(words[2:] + device)
    if script is TrainCamNet:
        TrainCamNet.adjust_to_objective(args)
    now = Flags.hyper_parameters(args)
    changed = {name: (then[name], now.get(name)) for name in then if then[name] != now.get(name)}

    # the generator that the command would train
    if record.get("generator_flags") and not now["generator"]:
        own = [f"--data={now['data']}", *([f"--size={now['size']}"] if now["size"] else []), *device]
        theirs = TrainCamNet.get_args([*shlex.split(now["camnet"]), *own])
        TrainCamNet.adjust_to_objective(theirs)
        theirs = Flags.hyper_parameters(theirs)
        for name, value in (record["generator_flags"] | {"data": then["data"]}).items():
            if name != "single_code" and value != theirs.get(name):  # which is only compared with
                changed[f"generator: {name}"] = (value, theirs.get(name))

    # the color jitter that a generator is compared with
    if "color_s" in record:
        recipe = Data.get_row(record["data"]).recipe
        if record["color_s"] != recipe["color_s"]:
            changed["color_s"] = (record["color_s"], recipe["color_s"])
    return changed


REPORTED = [file for name in ("isicle", "camnet", "arms") for file in files(f"{name}-*.json")]


@pytest.mark.parametrize("file", REPORTED, ids=by_name)
def test_no_figure_is_stale(file):
    for record in json.loads(file.read_text()):
        changed = changed_since(record)
        agrees(not changed, f"{file.name} is stale: {record['command']} has changed in {changed}: measure it again")


def test_a_changed_recipe_is_noticed(monkeypatch):
    encoder = records("arms-shapes")[-1]
    generator = records("camnet-shapes")[0]
    assert changed_since(encoder) == changed_since(generator) == {}
    row = Data.DATASETS["shapes"]
    monkeypatch.setitem(row.recipe, "color_s", 0.25)
    monkeypatch.setitem(row.generator_recipe, "periods", 4)
    assert changed_since(encoder) == {"color_s": (0.5, 0.25), "generator: periods": (3, 4)}
    assert changed_since(generator) == {"color_s": (0.5, 0.25), "periods": (3, 4)}


def differing_flags(command, flags):
    """Return the names of the flags that a command would set differently today."""
    words = shlex.split(command)
    now = Flags.hyper_parameters(importlib.import_module(Path(words[1]).stem).get_args(words[2:]))
    return {name for name in flags if flags[name] != now.get(name)}


@pytest.mark.parametrize("file", files("choice-*.json"), ids=by_name)
def test_commands_of_the_choice_have_the_flags_that_were_run(file):
    for record in json.loads(file.read_text()):
        command = Tables.command_of(shlex.split(record["command"])[1], record["flags"])
        different = differing_flags(command, record["flags"])
        agrees(different <= {"generator"}, f"{file.name}: `{command}` differs in {different}")
        if record.get("generator_flags"):
            command = Tables.command_of("TrainCamNet.py", record["generator_flags"])
            different = differing_flags(command, record["generator_flags"])
            agrees(not different, f"{file.name}: `{command}` differs in {different}")


@pytest.mark.parametrize("file", files("simclr-*.json"), ids=by_name)
def test_commands_of_the_encoders_have_the_flags_that_were_run(file):
    for record in json.loads(file.read_text()):
        different = differing_flags(Tables.encoder_command(record), record["flags"])
        agrees(different <= {"seed"}, f"{file.name}: `{Tables.encoder_command(record)}` differs in {different}")


def test_the_baseline_on_shapes_has_the_defaults():
    shown = {Tables.encoder_command(record) for record in records("simclr-shapes")}
    default = "python TrainSimCLR.py --eval test"
    agrees(default in shown, f"simclr-shapes.json is stale: `{default}` is none of {shown}: measure it again")


# ---------------------------------------------------------------------------------------------------- what is said


def scores_of(name):
    """Return {(arm, score): its values, one for each seed} of a file of Benchmarks/Arms.py."""
    scores = {}
    for arm, rows in Tables.by_arm(records(name)).items():
        for score in ("knn", "linear"):
            scores[arm, score] = [row[score] for row in rows]
    return scores


def mean(scores, arm, score):
    """Return the mean of an arm over its seeds, in percent."""
    return 100 * statistics.mean(scores[arm, score])


def lead(scores, score, arm, over):
    """Return by how many points an arm's mean is above another's, and two of the larger of both standard deviations."""
    deviations = [100 * statistics.stdev(scores[each, score]) for each in (arm, over)]
    return mean(scores, arm, score) - mean(scores, over, score), 2 * max(deviations)


def test_isicle_leads_at_equal_steps():
    scores = scores_of("arms-shapes")
    for score, least in (("linear", 10), ("knn", 14)):
        points, deviations = lead(scores, score, "isicle_full", "simclr_full")
        agrees(round(points, 1) >= least and points > deviations, f"ISICLE leads by {points:.1f} points in {score}")
    points, deviations = lead(scores_of("arms-shapes-20"), "linear", "isicle_full", "simclr_full")
    agrees(points > deviations and round(points) == 5, f"after 20 epochs ISICLE leads by {points:.1f} points")


def test_most_of_the_gain_is_a_third_view():
    scores = scores_of("arms-shapes")
    for score in ("knn", "linear"):
        ours = lead(scores, score, "isicle_full", "simclr_full")[0]
        third = lead(scores, score, "simclr_full_extra_view", "simclr_full")[0]
        more, deviations = lead(scores, score, "isicle_full", "simclr_full_extra_view")
        agrees(third > ours / 2, f"three real views gain {third:.1f} of {ours:.1f} points in {score}")
        agrees(1 <= round(more) <= 2 and more > deviations, f"a restoration adds {more:.1f} points in {score}")


def test_isicle_loses_at_equal_compute():
    scores = scores_of("arms-shapes")
    ours = [mean(scores, "isicle_full", score) for score in ("knn", "linear")]
    arms = Tables.by_arm(records("arms-shapes"))
    for arm in ("simclr_full", "simclr_full_extra_view", "simclr_full_4_views", "simclr_full_8_views"):
        arm = f"{arm}{Arms.EQUAL}"
        theirs = [mean(scores, arm, score) for score in ("knn", "linear")]
        is_better = theirs[0] > ours[0] and theirs[1] > ours[1]
        agrees(is_better == ("8_views" not in arm), f"{arm}: {theirs}, ISICLE: {ours}")
        spent = [sum(Tables.compute_of(arms[each][0])) for each in (arm, "isicle_full")]
        assert spent[0] == pytest.approx(spent[1], rel=0.05)
        if arm in (f"simclr_full{Arms.EQUAL}", f"simclr_full_extra_view{Arms.EQUAL}"):
            says("README.md", f"{theirs[0]:.1f} and {theirs[1]:.1f}")
    says("README.md", f"ISICLE has {ours[0]:.1f} and {ours[1]:.1f}")
    says("Results/README.md", f"that leaves {'eight' if arms[arm][0]['epochs'] == 8 else 'other'} epochs")
    shared = Tables.shared_compute(arms["isicle_full"][0], records("arms-shapes"))
    agrees(shared > sum(Tables.compute_of(arms["simclr_full_extra_view"][0])), "compute of a shared generator")


def test_restorations_replace_color_jitter():
    scores = scores_of("arms-shapes")
    energy = scores_of("arms-shapes-energy")
    for score in ("knn", "linear"):
        crop = mean(scores, "simclr_crop", score)
        jitter = mean(scores, "simclr_full", score)
        agrees(mean(scores, "single_code", score) < 1.1 * crop, "one restoration twice is no better than the image")
        agrees(mean(scores, "gen_gen_full", score) > jitter, "two restorations with jitter")
        agrees(mean(energy, "multi_crop", score) >= jitter, "four restorations without jitter, against jitter")
        agrees(mean(energy, "isicle_full", score) <= mean(scores, "isicle_full", score), "energy score as third view")
    says("README.md", f"two restorations reach {mean(scores, 'gen_gen_crop', 'linear'):.0f} % in the linear probe")
    says("README.md", f"four by the energy score {mean(energy, 'multi_crop', 'linear'):.0f} %")
    agrees(mean(scores, "simclr_crop", "linear") < 16, "SimCLR learns nothing with crop and flip only")


def test_longer_training():
    scores = scores_of("arms-shapes")
    longer = scores_of("arms-shapes-20")
    for score in ("knn", "linear"):
        third = lead(longer, score, "isicle_full", "simclr_full_extra_view")[0]
        agrees(0 < third < 1, f"as third view, a restoration adds {third:.1f} points in {score} after 20 epochs")
        before = lead(scores, score, "isicle_full", "simclr_full")[0]
        after = lead(longer, score, "isicle_full", "simclr_full")[0]
        agrees(after < before / 1.5, f"SimCLR closes the gap in {score} from {before:.1f} to {after:.1f}")
        rest = lead(longer, score, "gen_gen_full", "simclr_full")[0]
        agrees(abs(rest) < 2, f"two restorations lead by {rest:.1f} in {score} after 20 epochs")


def test_cifar10():
    scores = scores_of("arms-cifar10")
    more, deviations = lead(scores, "linear", "isicle_full", "simclr_full_extra_view")
    agrees(more > deviations, "more than two standard deviations above three real views")
    for score, share in (("linear", 4 / 5), ("knn", 2 / 3)):
        jitter = lead(scores, score, "simclr_full", "simclr_crop")[0]
        restored = lead(scores, score, "gen_gen_crop", "simclr_crop")[0]
        agrees(restored / jitter == pytest.approx(share, abs=0.05), f"{restored:.1f} of {jitter:.1f} points in {score}")
        loss = lead(scores, score, "gen_gen_full", "simclr_full")[0]
        agrees(-1.5 < loss < 0, f"two restorations with jitter: {loss:.1f} points in {score}")
        same = lead(scores, score, "real_gen_full", "simclr_full")[0]
        agrees(abs(same) < 0.5, f"one restoration instead of one view: {same:.1f} points in {score}")


@pytest.mark.parametrize("name", ["arms-photos-32", "arms-cifar10-auto"])
def test_photographs(name):
    scores = scores_of(name)
    for score in ("knn", "linear"):
        more, deviations = lead(scores, score, "isicle_full", "simclr_full_extra_view")
        agrees(abs(more) < deviations, f"neither gains nor loses: {more:.1f} points in {score}")
        agrees(abs(more) < 0.5, f"neither gains nor loses: {more:.1f} points in {score}")
    agrees(records(name)[-1]["flags"]["p_gen"] == "auto", "the default")


def test_cifar10_without_jitter():
    scores = scores_of("arms-cifar10-25")
    linear, deviations = lead(scores, "linear", "multi_crop", "simclr_full")
    agrees(abs(linear) < deviations, f"the linear probes are equal: {linear:.1f} points")
    knn, deviations = lead(scores, "knn", "multi_crop", "simclr_full")
    agrees(-knn > deviations, f"four restorations are behind in kNN by {-knn:.1f} points, deviations: {deviations:.1f}")
    says("Results/README.md", f"{-knn:.1f} points behind in kNN")
    arms = Tables.by_arm(records("arms-cifar10-25"))
    compute = {name: sum(Tables.compute_of(rows[0])) for name, rows in arms.items()}
    times = f"{compute['multi_crop'] / compute['simclr_full']:.1f} times the compute"
    says("Results/README.md", times)
    level = mean(scores, "multi_crop", "linear")
    says("README.md", f"four equal it in the linear probe ({level:.0f} %), at {times}")


def test_photographs_without_jitter():
    scores = scores_of("arms-photos-64")
    lifted = []
    for score in ("knn", "linear"):
        more, deviations = lead(scores, score, "multi_crop", "simclr_crop")
        agrees(
            more > deviations,
            f"four restorations lead by {more:.1f} points in {score}, two deviations: {deviations:.1f}",
        )
        lifted.append(f"{more:.1f}")
    says("Results/README.md", f"by {lifted[0]} points in kNN and {lifted[1]} in the linear probe")
    low, high = (mean(scores, arm, "linear") for arm in ("simclr_crop", "multi_crop"))
    says("README.md", f"lift the linear probe from {low:.0f} to {high:.0f} %")
    arms = Tables.by_arm(records("arms-photos-64"))
    compute = {name: sum(Tables.compute_of(rows[0])) for name, rows in arms.items()}
    says("Results/README.md", f"They take {compute['multi_crop'] / compute['simclr_crop']:.1f} times the compute")


def test_photographs_without_jitter_at_equal_compute():
    control = f"simclr_crop{Arms.EQUAL}"
    arms = Tables.by_arm(records("arms-photos-64"))
    compute = {name: sum(Tables.compute_of(rows[0])) for name, rows in arms.items()}
    assert compute[control] == pytest.approx(compute["multi_crop"], rel=0.05)
    says("Results/README.md", f"SimCLR trains for {arms[control][0]['epochs']} epochs")
    scores = scores_of("arms-photos-64")
    leads = []
    for score in ("knn", "linear"):
        more, deviations = lead(scores, score, "multi_crop", control)
        agrees(more > deviations, f"a lead of {more:.1f} points in {score}, two deviations: {deviations:.1f}")
        leads.append(f"{more:.1f}")
    says("Results/README.md", f"lead by {leads[0]} points in kNN and {leads[1]} in the linear probe")
    says("README.md", f"SimCLR of the same total compute reaches {mean(scores, control, 'linear'):.0f} %")


def test_rate_on_cifar10():
    told = ("temp", "aug", "color_s", "num_views", "pair", "p_gen", "loss", "pick")
    runs = {}
    for row in records("choice-cifar10"):
        corrupt = row.get("generator_flags", {}).get("corrupt")
        runs[row["flags"]["lr"], corrupt, *(row["flags"].get(name) for name in told)] = row["evaluation"]
    crop = told.index("aug") + 2
    fast = {key[1:]: scores for key, scores in runs.items() if key[0] == 1.2 and key[crop] == "full"}
    assert len(fast) == 3
    for score in ("knn", "linear"):
        for rest, scores in fast.items():
            agrees(scores[score] > runs[0.6, *rest][score], f"every arm improves at twice the learning rate in {score}")
    three_views = next(scores for rest, scores in fast.items() if 3 in rest)
    best = max(scores["linear"] for scores in fast.values())
    agrees(three_views["linear"] == best, "three real views are ahead at twice the learning rate")

    # four restorations, crop and flip only
    simclr = next(scores for rest, scores in fast.items() if 2 in rest)
    for key, scores in runs.items():
        if key[crop] == "crop" and key[0] == 1.2:
            agrees(scores["knn"] > simclr["knn"] and scores["linear"] > simclr["linear"], "above SimCLR with jitter")


def test_choice_on_shapes():
    choice = records("choice-shapes")
    for epochs in (15, 20):
        runs = [row for row in choice if row["epochs"] == epochs and row["flags"].get("num_views") == 2]
        rates = {row["flags"]["lr"]: row["evaluation"]["knn"] + row["evaluation"]["linear"] for row in runs}
        assert len(rates) >= 3
        agrees(max(rates, key=rates.get) == 1.6, f"SimCLR is best at 1.6 after {epochs} epochs: {rates}")


def test_perfect_generator():
    choice = sorted(records("choice-shapes"), key=lambda row: row["evaluation"]["linear"])
    best = choice[-1]
    perfect = 100 * best["evaluation"]["linear"]
    assert best["flags"]["bank"] == "Data/redrawn.npy"
    assert best["pair"] == "real_real_gen"
    agrees(perfect > 100 * choice[-2]["evaluation"]["linear"] + 3, "redrawn positives are far above all")
    ours = []
    for row in choice:
        if row.get("pair") == "real_real_gen" and row["epochs"] == best["epochs"] and not row["flags"]["bank"]:
            ours.append(100 * row["evaluation"]["linear"])
    says("README.md", f"would give {perfect:.1f} % in the linear probe instead of {max(ours):.1f}")


def test_several_processes():
    rows = {row["what"]: list(row["images_per_second"].values()) for row in records("processes-cpu")["rows"]}
    for what, (alone, threads, processes) in rows.items():
        agrees(threads > alone, f"threads help: {what}")
        agrees(processes > alone, f"processes help: {what}")
    least = min(rows, key=lambda what: rows[what][2] / rows[what][0])
    agrees("SimCLR" in least and rows[least][1] > rows[least][2], "processes help SimCLR's steps least, threads more")
