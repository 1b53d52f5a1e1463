"""Benchmarks/Arms.py, by running it on a small data set; its compute, counted by hand; the tables made from runs."""

import contextlib
import io
import json
import shlex
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Forked, one_error, one_line, wait_for
from PIL import Image

import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Benchmarks import Arms, Collect, Compute, Picture, Tables
from Benchmarks.Forks import Child

ROOT = Path(__file__).parents[1]
KEYS = {"arm", "seed", "linear", "knn", "steps", "epochs", "encoder_macs", "generator_macs", "command", "minutes"}
KEYS |= {"device", "flags"}
CHOSEN = ["simclr_full", "simclr_full_equal_compute", "isicle_full"]  # one that waits for the two others
FORKED = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)  # in place of subprocess
GENERATOR = "--net tiny --distance pixels --candidates 4,2 --period 16 --visits 2 --periods 1 --bs 8 --no-single_code"


@pytest.fixture(scope="module")
def arms(flags, tree, tmp_path_factory):
    """.argv are the flags of Arms with one seed of a few arms; .out is its file, .models the folder of the runs."""
    folder = tmp_path_factory.mktemp("arms")
    place = ["--data", str(tree), "--models_dir", str(folder / "m")]
    cache = ["--data_dir", str(tree.parent / "cache"), "--size", "16"]
    child = Child(TrainCamNet, [*GENERATOR.split(), *place, *cache], folder / "camnet.log")
    assert child.wait() == 0, child.output()
    own = [*place, "--arms", ",".join(CHOSEN), "--seeds", "1", "--jobs", "2", "--out", str(folder / "arms.json")]
    of_runs = [*flags(folder)[2:-2], "--size", "16", "--epochs", "2", "--bs", "24"]
    return SimpleNamespace(
        argv=lambda *more: [*own, *more, "--", *of_runs], out=folder / "arms.json", models=folder / "m"
    )


@pytest.fixture(scope="module")
def done(arms):
    """What the first start, whose runs are forks of this process, printed and wrote."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arms, "subprocess", FORKED)
        assert Arms.main(Arms.get_args(arms.argv())) == 0
    return printed.getvalue(), json.loads(arms.out.read_text())


# ---------------------------------------------------------------------------------------------------- runs


def test_every_run_is_recorded(done):
    printed, records = done
    assert [(row["arm"], row["seed"]) for row in records] == [(arm, 0) for arm in CHOSEN]
    for row in records:
        assert row.keys() >= KEYS
        assert row["split"] == "test"
        assert row["n_test"] == 60
        assert row["command"].startswith("python Train")
        assert row["command"].endswith("--seed 0")
        assert f"{row['arm']}, seed 0: kNN {100 * row['knn']:.2f} %" in printed
        assert row["steps"] == 20 or row["arm"].endswith(Arms.EQUAL)  # 2 epochs of 10 steps
    assert Tables.arms_table(records) in printed


def test_lines_of_the_runs_are_shown_as_they_come(done):
    for arm in CHOSEN:
        assert f"[{arm}, seed 0] epoch 2/" in done[0]


def test_the_generator_of_a_run_is_recorded(done):
    rows = {row["arm"]: row for row in done[1]}
    assert rows["isicle_full"]["generator"].startswith("TrainCamNet-")
    assert rows["isicle_full"]["generator_flags"].items() >= {"candidates": "4,2", "period": 16}.items()
    assert rows["simclr_full"]["generator"] is None
    assert "generator_flags" not in rows["simclr_full"]


def test_picture(done, arms):
    assert Image.open(arms.out.with_suffix(".png")).width >= 600


def test_started_again_it_runs_what_is_missing(done, arms, cli):
    """The missing run has a process of its own."""
    records = done[1]
    arms.out.write_text(json.dumps(records[:-1]))
    again = cli(arms.argv(), Arms)
    assert again.code == 0, again.err
    assert "isicle_full, seed 0: kNN" in again.out
    assert "simclr_full, seed 0: kNN" not in again.out
    after = json.loads(arms.out.read_text())
    assert after[:-1] == records[:-1]
    for name in ("arm", "seed", "knn", "linear", "steps", "encoder_macs", "generator_macs", "command", "flags"):
        assert after[-1][name] == records[-1][name], name  # not the revision, which may be another one by now


def test_runs_with_other_flags_do_not_join_a_table(done, arms, tmp_path, cli):
    out = tmp_path / "arms.json"
    out.write_text(json.dumps(done[1]))
    for more in (["--lr", "0.7"], ["--epochs", "3"]):
        argv = [*arms.argv("--out", str(out)), *more]
        one_error(cli(argv, Arms), "--arms simclr", "holds a run of this arm with other flags", "--out")
    assert json.loads(out.read_text()) == done[1]


def test_failing_run_is_one_line(arms, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(Arms, "subprocess", FORKED)
    more = ("--arms", "isicle_full", "--out", str(tmp_path / "a.json"), "--isicle", f"--generator {tmp_path}")
    failed = cli(arms.argv(*more), Arms)
    one_error(failed, "no checkpoint there")
    assert len(failed.err.splitlines()) == 1


def test_a_signal_ends_the_runs_as_well(arms, fork, tmp_path):
    argv = arms.argv("--arms", "simclr_full", "--models_dir", tmp_path, "--out", tmp_path / "a.json")
    child = fork(Arms, [*argv, "--epochs", "1000"])
    wait_for(lambda: child.log.exists() and "epoch 1/1000" in child.output(), child)
    child.send(signal.SIGTERM)
    assert child.wait(60) == 0, child.output()
    assert "interrupted: saved" in child.output()
    assert not (tmp_path / "a.json").exists()


def test_one_generator_and_one_bank_for_every_arm(arms, done):
    assert len(list(arms.models.glob("TrainCamNet-*"))) == 1
    assert len(list(arms.models.glob("TrainCamNet-*/bank-*.npy"))) == 1  # of the one seed


# ---------------------------------------------------------------------------------------------------- arms


def arguments(*argv):
    return Arms.get_args([*argv, "--", "--lr", "0.5"])


def test_every_arm_has_its_seeds_and_flags():
    args = arguments("--data", "cifar10", "--seeds", "2", "--isicle", "--num_codes 4")
    runs = Arms.missing(args, ["simclr_crop", "gen_gen_crop"], [], "arms.json")
    assert [(arm, seed) for arm, seed, _ in runs] == [(a, s) for s in (0, 1) for a in ("simclr_crop", "gen_gen_crop")]
    assert runs[0][2] == shlex.split("TrainSimCLR.py --data cifar10 --lr 0.5 --aug crop --eval test --seed 0")
    restored = "TrainISICLE.py --data cifar10 --lr 0.5 --pair gen_gen --p_gen 1 --aug crop --num_codes 4"
    assert runs[3][2] == shlex.split(f"{restored} --eval test --seed 1")


def test_records_are_kept_in_the_order_of_the_arms():
    rows = [{"arm": arm, "seed": seed} for arm in ("simclr_full", "isicle_full") for seed in (0, 1)]
    records = []
    for row in reversed(rows):
        records = Arms.add(records, row)
    assert records == rows
    new = {"arm": "simclr_full", "seed": 1, "knn": 0.5}
    assert Arms.add(records, new) == [rows[0], new, *rows[2:]]


def test_flags_of_the_arms_mean_what_their_titles_say():
    pairs = {
        "c(x) twice": "corrupted",
        "one restoration twice": "gen_twice",
        "two restorations": "gen_gen",
        "four restorations": "multi",
        "the image and a restoration": "real_gen",
        "the image twice and a restoration": "real_real_gen",
    }
    views = {"three": 3, "four": 4, "eight": 8}
    for script, flags, title in Arms.ARMS.values():
        module = {"TrainSimCLR.py": TrainSimCLR, "TrainISICLE.py": TrainISICLE}[script]
        parsed = module.get_args(shlex.split(flags))
        assert (parsed.aug == "crop") == ("crop and flip only" in title)
        assert parsed.aug in ("crop", "full")
        if script == "TrainSimCLR.py":
            assert [parsed.num_views] == ([count for word, count in views.items() if f"{word} real" in title] or [2])
        else:
            assert [parsed.pair] == [pair for words, pair in pairs.items() if words in title]


@pytest.mark.parametrize("bad, part", [("simclr_ful", "simclr_full"), ("a,b", "a,b: choose from")])
def test_unknown_arm(bad, part):
    with pytest.raises(Utils.UserError, match=part):
        Arms.get_args(["--arms", bad])


@pytest.mark.parametrize("missing", ["simclr_full", "isicle_full"])
def test_equal_compute_needs_both_arms(done, missing):
    with pytest.raises(Utils.UserError, match="simclr_full and isicle_full: add both"):
        Arms.equal_epochs(f"simclr_full{Arms.EQUAL}", [row for row in done[1] if row["arm"] != missing])


def test_equal_compute_without_jitter_is_that_of_four_restorations():
    rows = [
        {"arm": "simclr_crop", "epochs": 6, "encoder_macs": 60, "generator_macs": 0},
        {"arm": "isicle_full", "epochs": 6, "encoder_macs": 90, "generator_macs": 10},
        {"arm": "multi_crop", "epochs": 6, "encoder_macs": 120, "generator_macs": 80},
    ]
    assert Arms.equal_epochs(f"simclr_crop{Arms.EQUAL}", rows) == 20
    with pytest.raises(Utils.UserError, match="simclr_crop and multi_crop: add both"):
        Arms.equal_epochs(f"simclr_crop{Arms.EQUAL}", rows[:2])


# ---------------------------------------------------------------------------------------------------- compute


def test_compute_is_what_was_counted_by_hand(done):
    stem = 3 * 32 * 9 * 8**2  # 16 pixels, stride 2
    blocks = 2 * 32 * 32 * 9 * 8**2 + (32 + 64) * 64 * 9 * 4**2 + 32 * 64 * 4**2
    blocks += (64 + 128) * 128 * 9 * 2**2 + 64 * 128 * 2**2
    head = 128 * 32 + 32 * 128  # --proj_hidden 32, --proj_dim 128
    rows = {row["arm"]: row for row in done[1]}
    for arm, views in (("simclr_full", 2), ("isicle_full", 3)):
        assert rows[arm]["encoder_macs"] == 3 * views * 8 * 60 * (stem + blocks + head)
    assert rows["simclr_full"]["generator_macs"] == 0
    assert rows["isicle_full"]["generator_macs"] > 0


def test_chunks_and_farthest_restorations_are_counted():
    def macs(*words):
        flags = TrainISICLE.get_args([*words, "--num_codes", "5"])
        TrainSimCLR.adjust_flags(flags, 1)
        return Compute.encoder_macs(flags, 10)

    plain = macs("--pair", "multi")
    assert macs("--pair", "multi", "--chunk_views", "8") * 3 == plain * 4  # a second forward pass
    more = {pair: macs("--pair", pair, "--pick", "farthest") - macs("--pair", pair) for pair in TrainISICLE.PAIRS}
    assert more["corrupted"] == 0
    assert more["multi"] == more["gen_gen"] == more["gen_twice"]  # five restorations
    assert more["real_gen"] * 5 == more["multi"] * 6  # and the image


@pytest.mark.parametrize("pair, views", [("gen_gen", 2), ("corrupted", 2), ("multi", 3), ("real_real_gen", 3)])
def test_every_view_of_a_pair_is_counted(pair, views):
    flags = TrainISICLE.get_args(["--pair", pair])
    plain = TrainSimCLR.get_args([])
    for each in (flags, plain):
        TrainSimCLR.adjust_flags(each, 1)
    assert Compute.encoder_macs(flags, 10) * 2 == Compute.encoder_macs(plain, 10) * views


def test_corrupted_views_cost_no_generator(done, arms):
    folder = next(arms.models.glob("TrainCamNet-*"))
    assert "generator_macs" not in Arms.generator_record(SimpleNamespace(pair="corrupted"), folder)


def test_generator_is_charged_for_search_training_and_bank():
    def macs(*more, k=0, banks=1):
        return Compute.generator_macs(TrainCamNet.get_args([*GENERATOR.split(), *more]), 240, k, banks)

    base = macs()
    sample = (macs(k=1) - base) // 240  # of one restoration
    assert sample > 1e6
    assert macs(k=8, banks=3) == base + 3 * 240 * 8 * sample
    assert base > 16 * 2 * 3 * sample  # 16 images, trained on twice, forward and backward
    more = macs("--candidates", "4,3") - base  # one candidate more on the finer level, the dearer one
    assert 16 * sample / 2 < more < 16 * sample
    assert macs("--periods", "2") == 2 * base

    # the energy score: no search, two samples of each image in a step; patches are compared at no further cost
    energy = [word for word in GENERATOR.split() if word not in ("--candidates", "4,2")]
    flags = TrainCamNet.get_args([*energy, "--objective", "energy"])
    assert Compute.generator_macs(flags, 240, 0) == 16 * 2 * 2 * 3 * sample


def test_a_shared_generator_is_divided_among_its_runs(done):
    ours = next(row for row in done[1] if row["arm"] == "isicle_full")
    other = ours | {"generator": "another"}
    whole = sum(Tables.compute_of(ours))
    assert Tables.shared_compute(ours, [ours, other]) == pytest.approx(whole)
    words = [*GENERATOR.split(), "--size", "16", "--corrupt", ours["generator_flags"]["corrupt"]]
    training = Compute.generator_macs(TrainCamNet.get_args(words), 240, 0) / 1e12
    assert 0 < training < ours["generator_macs"] / 1e12
    assert Tables.shared_compute(ours, [ours, ours, ours, other]) == pytest.approx(whole - training * 2 / 3)
    assert Tables.shared_compute(done[1][0], done[1]) == sum(Tables.compute_of(done[1][0]))


def test_equal_compute_is_equal(done):
    rows = {row["arm"]: row for row in done[1]}
    ours = rows["isicle_full"]["encoder_macs"] + rows["isicle_full"]["generator_macs"]
    per_epoch = rows["simclr_full"]["encoder_macs"] / rows["simclr_full"]["epochs"]
    longer = rows[f"simclr_full{Arms.EQUAL}"]
    assert abs(longer["encoder_macs"] - ours) <= per_epoch / 2
    assert longer["epochs"] > rows["isicle_full"]["epochs"]


def test_equal_compute_follows_from_the_arm_of_the_same_views(done):
    rows = {row["arm"]: row for row in done[1]}
    eight = rows["simclr_full"] | {
        "arm": "simclr_full_8_views",
        "encoder_macs": 4 * rows["simclr_full"]["encoder_macs"],
    }
    epochs = [
        Arms.equal_epochs(f"{arm}{Arms.EQUAL}", [*done[1], eight]) for arm in ("simclr_full", "simclr_full_8_views")
    ]
    assert abs(epochs[0] / 4 - epochs[1]) <= 1


# ---------------------------------------------------------------------------------------------------- tables


def test_every_machine_of_the_runs_is_named(done):
    rows = [
        row | {"device": device} for row, device in zip(done[1], ["cpu, 1 threads", "cpu, 2 threads", "cpu, 1 threads"])
    ]
    assert "each run on cpu, 1 thread or cpu, 2 threads." in Tables.arms_table(rows)


def test_title_says_what_was_not_the_default(done):
    row = done[1][-1]
    assert Tables.title_of(row) == row["title"]
    default = row | {"command": f"{row['command']} --p_gen 0.5"}  # spelled out, and yet the default
    assert Tables.title_of(default) == row["title"]
    other = row | {"flags": row["flags"] | {"p_gen": 1.0, "corrupt": "gray"}}
    assert Tables.title_of(other) == f"{row['title']}, --p_gen 1, --corrupt gray"
    folder = row | {"flags": row["flags"] | {"data": "/on/another/machine", "p_gen": 0.5}}
    assert Tables.title_of(folder) == f"{row['title']}, --p_gen 0.5"


def test_command_is_the_shortest_that_has_the_flags(done):
    for row in done[1]:
        script = shlex.split(row["command"])[1]
        words = shlex.split(Tables.command_of(script, row["flags"]))
        module = {"TrainSimCLR.py": TrainSimCLR, "TrainISICLE.py": TrainISICLE}[script]
        assert words[:2] == ["python", script]
        assert vars(module.get_args(words[2:])).items() >= row["flags"].items()
        assert "--opt" not in words
    flags = vars(TrainSimCLR.get_args(["--no-proj_norm", "--lars", "--lr", "2"]))
    flags = {name: flags[name] for name in ("data", "lr", "proj_norm", "lars")}
    assert Tables.command_of("TrainSimCLR.py", flags, ["lars"]) == "python TrainSimCLR.py --lars --lr 2 --no-proj_norm"


def test_shown_command_has_what_matters():
    command = "python TrainSimCLR.py --suffix a --lr 2 --seed 1 --resume auto --skip_bad --eval test --models_dir '/a'"
    assert Tables.shown_command(command, ["seed"]) == "python TrainSimCLR.py --lr 2 --eval test"


def test_choice_is_shown_as_commands_and_generators(done, arms):
    runs = sorted({file.parent for file in arms.models.glob("Train*/evaluation.json")})
    records = [Collect.collect(run) for run in runs]
    assert len(records) == 3
    generator = {"data": "shapes", "corrupt": "gray", "periods": 7}
    records[0]["generator_flags"] = generator
    lines = Tables.choice_table(records).splitlines()
    for record in records:
        scores = f" | {100 * record['evaluation']['knn']:.1f} | {100 * record['evaluation']['linear']:.1f} |"
        command = Tables.command_of(shlex.split(record["command"])[1], record["flags"], Tables.varying(records))
        (line,) = [line for line in lines if line.startswith(f"| `{command}`")]
        assert line.endswith(scores)
        assert ("| A |" in line) == (record is records[0])
    assert lines[-1] == "* A: `python TrainCamNet.py --corrupt gray --periods 7`"


@pytest.mark.parametrize("file", ["", "3.pt"])
def test_a_record_holds_the_flags_of_its_generator(tmp_path, file):
    camnet = tmp_path / "camnet"
    run = tmp_path / "run"
    for folder in (camnet, run):
        folder.mkdir()
    (camnet / "args.json").write_text(json.dumps({"args": {"corrupt": "gray+mask0.5", "periods": 7, "device": "cpu"}}))
    start = dict.fromkeys(("command", "revision", "device", "torch", "torchvision", "python"), "")
    args = {"data": "shapes", "seed": 0, "corrupt": None, "generator": str(camnet / file)}
    (run / "args.json").write_text(json.dumps({"args": args, "starts": [start]}))
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 60}\n')
    (run / "evaluation.json").write_text("{}")
    record = Collect.collect(run)
    assert record["generator_flags"] == {"corrupt": "gray+mask0.5", "periods": 7}
    assert record["flags"] == args


def test_a_record_of_a_generator_says_what_it_is_compared_with(arms, done):
    folder = next(arms.models.glob("TrainCamNet-*"))
    record = Collect.collect(folder)
    assert record["color_s"] == 0.5
    assert record["generator"] == json.loads((folder / "generator.json").read_text())
    assert "python TrainCamNet.py" in Tables.generator_block([record])


def test_collect_says_what_it_wrote_and_what_is_wrong(tmp_path, arms, done, monkeypatch, capsys):
    texts = {"README.md": "<!-- arms arms -->\n<!-- end -->\n<!-- pairs --><!-- end -->\n", "other.md": "nothing\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "Results").mkdir()
    (tmp_path / "Results" / "arms.json").write_text(json.dumps(done[1]))
    monkeypatch.setattr(Utils, "ROOT", tmp_path)
    monkeypatch.setattr(Collect, "FILES", tuple(texts))
    run = next(arms.models.glob("TrainSimCLR-*"))
    out = tmp_path / "runs.json"
    Collect.main(Collect.get_args([str(run), "--out", str(out)]))
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"written: {out}", f"written: {tmp_path}/README.md", f"unchanged: {tmp_path}/other.md"]
    assert Tables.arms_table(done[1]) in (tmp_path / "README.md").read_text()
    assert json.loads(out.read_text()) == [Collect.collect(run)]
    for argv in ([str(run)], ["--out", "x"]):
        with pytest.raises(Utils.UserError, match="go together"):
            Collect.get_args(argv)
    with pytest.raises(Utils.UserError, match="the folder of a finished run"):
        Collect.collect(tmp_path)
    with pytest.raises(Utils.UserError, match="missing: measure it"):
        Collect.fill("<!-- arms none -->\n<!-- end -->", tmp_path)


# ---------------------------------------------------------------------------------------------------- pictures


def test_method_is_drawn_from_a_generator(arms, tree, tmp_path):
    folder = next(arms.models.glob("TrainCamNet-*"))
    file = tmp_path / "method.png"
    Picture.main(Picture.get_args(["method", str(folder), "--out", str(file)]))
    width, height = Image.open(file).size
    assert width == 5 * (8 * 17 + 1)  # 8 columns of 16 pixels, enlarged to 600 pixels or more
    assert height > 5 * (Picture.ROWS * 17 + 1)  # and captions
    with pytest.raises(Utils.UserError, match="holds no generator"):
        Picture.main(Picture.get_args(["method", str(tmp_path)]))
    with pytest.raises(Utils.UserError, match="no generator in"):
        Collect.newest_generator(tmp_path)
    with pytest.raises(Utils.UserError, match="name the JSON file"):
        Picture.get_args(["arms"])


def test_shapes_are_drawn_with_their_names(tmp_path):
    file = tmp_path / "shapes.png"
    Picture.main(Picture.get_args(["shapes", "--out", str(file)]))
    width, height = Image.open(file).size
    assert height == 10 * 33 + 1
    assert width > Picture.EACH * 33 + 1


def test_a_damaged_file_of_records_and_an_open_quotation_are_one_line(tmp_path):
    for content in ("[{", "{}", "[1]"):
        (tmp_path / "arms.json").write_text(content)
        one_line(lambda: Arms.read_records(tmp_path / "arms.json"), "--out", "arms.json", "another file")
    one_line(lambda: Arms.read_records(tmp_path), "--out", "another file")
    assert Arms.read_records(tmp_path / "none.json") == []
    one_line(lambda: Arms.get_args(["--isicle", "'"]), "--isicle '", "quotation")


def test_a_run_that_could_not_be_scored_is_one_line(tmp_path):
    run = ("simclr_full", 0, "flat", ["TrainSimCLR.py"], tmp_path, "")
    one_line(lambda: Arms.record_of(*run), "--data flat", "labels")
