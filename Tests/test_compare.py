"""Compare.py: what it shows of run folders, as the training scripts write them and as accidents leave them."""

import csv
import errno
import fcntl
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import Compare
import Flags
import Utils

ROOT = Path(__file__).parents[1]
FLAGS = {"data": "shapes", "backbone": "resnet8", "epochs": 4, "lr": 0.5, "seed": 0, "eval": "val", "device": "cpu"}
GENERATOR_FLAGS = {"data": "shapes", "net": "tiny", "periods": 4, "seed": 0, "device": "cpu"}


def save_run(folder, script="TrainSimCLR", epochs=4, evaluation=None, positives=None, **flags):
    """Write a run that has done `epochs` epochs of two steps, and its evaluation.json if there is one."""
    folder.mkdir(parents=True)
    args = (GENERATOR_FLAGS if script == "TrainCamNet" else FLAGS) | flags
    start = {"command": f"python {script}.py --seed {args['seed']}"}
    if positives:
        start["positives"] = positives
    record = {"args": args, "starts": [start]}
    (folder / "args.json").write_text(json.dumps(record))
    lines = []
    for epoch in range(1, epochs + 1):
        position = {"step": 2 * epoch, "epoch": epoch, "seconds": 60.0 * epoch}
        lines.append({**position, "loss": 5.0 - epoch, "lr": 0.1})
        lines.append({**position, "knn": 0.1 * epoch, "linear": 0.15 * epoch})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation:
        (folder / "evaluation.json").write_text(json.dumps({"split": "val", "epoch": epochs, **evaluation}))
    return folder


def show(capsys, *argv):
    """Return what Compare.py prints, after checking that it says nothing of problems."""
    Compare.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def rows(text):
    """Return the rows of the first table in a text, as {head: cell}."""
    head, *body = text.split("\n\n")[0].splitlines()
    starts = [index for index in range(1, len(head)) if head[index - 1] == " " and head[index] != " "]
    starts = [index for index in starts if head[index - 2 : index] == "  "]  # one space is inside a head
    ends = [*starts[1:], None]
    names = [head[start:end].strip() for start, end in zip(starts, ends)]
    return [dict(zip(names, [line[start:end].strip() for start, end in zip(starts, ends)])) for line in body]


def error(capsys, *argv):
    """Return the error that Compare.py ends with: one line, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        Compare.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(err.splitlines()) == 1
    return err


def test_flags_of_no_interest_are_those_of_flags():
    assert set(Compare.RUN_FLAGS.split()) | {"eval", "suffix"} == Flags.RUN_FLAGS
    assert Compare.RENAMED == Utils.RENAMED


def test_runs_of_two_generators_are_no_two_seeds(tmp_path, capsys):
    for seed, positives in enumerate(["0a1b2c3d", "0a1b2c3d", "99999999"]):
        evaluation = {"knn": 0.5, "linear": 0.6 - 0.1 * seed}
        save_run(tmp_path / str(seed), "TrainISICLE", evaluation=evaluation, positives=positives, seed=seed)
    found = rows(show(capsys, tmp_path))
    assert [row["seed"] for row in found] == ["0, 1", "2"]
    assert [row["flags"] for row in found] == ["positives 0a1b2c3d", "positives 99999999"]


def test_files_next_to_runs_are_passed_over(tmp_path, capsys):
    for name in "ab":
        save_run(tmp_path / name, lr=0.1 if name == "a" else 0.2)
    (tmp_path / "README.md").write_text("as in Models/")
    assert len(rows(show(capsys, *sorted(tmp_path.iterdir())))) == 2
    assert "README.md: Not a directory: give a run folder" in error(capsys, tmp_path / "README.md")


def test_letters_that_the_terminal_lacks(tmp_path):
    for seed in (0, 1):
        save_run(tmp_path / str(seed), evaluation={"knn": 0.5, "linear": 0.5 + 0.1 * seed}, seed=seed)
    done = subprocess.run(
        [sys.executable, ROOT / "Compare.py", tmp_path],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert r"55.0 \xb1 7.1" in done.stdout


def test_best_first_with_the_flags_that_differ(tmp_path, capsys):
    save_run(tmp_path / "a", evaluation={"knn": 0.5, "linear": 0.6}, lr=0.5, suffix="first")
    save_run(tmp_path / "b", evaluation={"knn": 0.4, "linear": 0.7}, lr=1.0, device="cuda")
    save_run(tmp_path / "c", "TrainISICLE", evaluation={"knn": 0.6, "linear": 0.7}, lr=1.0, pair="gen_gen")
    text = show(capsys, tmp_path)
    found = rows(text)
    assert [row["linear %"] for row in found] == ["70.0", "70.0", "60.0"]
    assert [row["kNN %"] for row in found] == ["60.0", "40.0", "50.0"]
    assert [row["flags"] for row in found] == ["lr 1.0", "lr 1.0", "lr 0.5"]  # a single pair and suffix say nothing
    assert [row["script"] for row in found] == ["TrainISICLE", "TrainSimCLR", "TrainSimCLR"]
    assert [row["minutes"] for row in found] == ["4.0"] * 3
    assert [row["epochs"] for row in found] == ["4"] * 3
    assert [text.index(f"{number}  {tmp_path / name}") for number, name in ((1, "c"), (2, "b"), (3, "a"))]


def test_flags_that_come_with_the_data_are_not_shown(tmp_path, capsys):
    save_run(tmp_path / "a", data="shapes", lr=1.6, bs=256)
    save_run(tmp_path / "b", data="shapes", lr=0.8, bs=256)
    save_run(tmp_path / "c", data="cifar10", lr=1.2, bs=512)
    found = rows(show(capsys, tmp_path))
    assert sorted(row["flags"] for row in found) == ["lr 0.8", "lr 1.2", "lr 1.6"]


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path, capsys):
    values = [0.5, 0.6, 0.62]
    for seed, knn in enumerate(values):
        save_run(tmp_path / f"s{seed}", evaluation={"knn": knn, "linear": knn + 0.1}, seed=seed)
    save_run(tmp_path / "other", evaluation={"knn": 0.9, "linear": 0.95}, seed=3, lr=1.0)
    save_run(tmp_path / "stopped", epochs=2, seed=4)
    best, three, stopped = rows(show(capsys, tmp_path))
    assert (best["seed"], best["kNN %"]) == ("3", "90.0")
    assert three["seed"] == "0, 1, 2"
    assert three["kNN %"] == f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    assert three["linear %"] == "67.3 ± 6.4"
    assert (stopped["seed"], stopped["kNN %"], stopped["epochs"]) == ("4", "20.0", "2/4")


def test_a_copy_of_a_run_is_no_second_seed(tmp_path, capsys):
    for folder in ("a", "a-backup"):
        save_run(tmp_path / folder, evaluation={"knn": 0.5, "linear": 0.6}, seed=0)
    save_run(tmp_path / "b", evaluation={"knn": 0.7, "linear": 0.8}, seed=1)
    both, copy = rows(show(capsys, tmp_path))
    assert (both["seed"], both["kNN %"]) == ("0, 1", "60.0 ± 14.1")
    assert (copy["seed"], copy["kNN %"]) == ("0", "50.0")


def test_state(tmp_path, capsys):
    folder = save_run(tmp_path / "run", epochs=2)
    assert rows(show(capsys, folder))[0]["state"] == "interrupted"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert rows(show(capsys, folder))[0]["state"] == "running"
    assert rows(show(capsys, folder))[0]["state"] == "interrupted"  # the file is left, the process is gone

    (folder / "evaluation.json").write_text(json.dumps({"knn": 0.3, "linear": 0.4, "epoch": 2, "split": "val"}))
    (row,) = rows(show(capsys, folder))
    assert (row["state"], row["kNN %"]) == ("interrupted", "30.0")  # another epoch than the last was scored
    (folder / "evaluation.json").write_text(json.dumps({"knn": 0.5, "linear": 0.6, "epoch": 4, "split": "val"}))
    assert rows(show(capsys, folder))[0]["state"] == "complete"


def test_state_without_labels(tmp_path, capsys):
    """The last line of a run without labels measures pairs. If training's line is the last, a kill came before it."""
    folder = save_run(tmp_path / "run", epochs=0)
    line = {"step": 8, "epoch": 4, "seconds": 6.0}
    (folder / "metrics.jsonl").write_text(json.dumps({**line, "loss": 1.0}) + "\n")
    (row,) = rows(show(capsys, folder))
    assert (row["state"], row["kNN %"], row["minutes"]) == ("interrupted", "-", "0.1")
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps({**line, "alignment": 0.5}) + "\n")
    assert rows(show(capsys, folder))[0]["state"] == "complete"


def test_generators(tmp_path, capsys):
    for name, best in (("worse", 0.2), ("better", 0.1)):
        folder = save_run(tmp_path / name, "TrainCamNet", net=name)
        result = {"best_of_16": best, "diversity_pixels": 0.03, "fit": name == "better"}
        (folder / "generator.json").write_text(json.dumps(result))
    save_run(tmp_path / "going", "TrainCamNet", epochs=1)
    save_run(tmp_path / "encoder", evaluation={"knn": 0.5, "linear": 0.6})
    text = show(capsys, tmp_path)
    assert len(rows(text)) == 1  # the encoders come first, and the numbers of rows go on
    found = rows(text[text.index("   data", 5) :])
    assert [row["best of 16"] for row in found] == ["0.1000", "0.2000", "-"]
    assert [row["fit"] for row in found] == ["yes", "no", "-"]
    assert [row["state"] for row in found] == ["complete", "complete", "interrupted"]
    assert [row["flags"] for row in found] == ["net better", "net worse", "net tiny"]
    assert f"2  {tmp_path / 'better'}" in text


@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize(
    "content", [b'{"args": ', b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000, b'{"args": 3, "epoch": {}}']
)
def test_damaged_files_are_one_notice(tmp_path, capsys, name, content):
    folder = save_run(tmp_path / "run", evaluation={"knn": 0.5, "linear": 0.6})
    (folder / "metrics.jsonl").unlink()
    (folder / name).write_bytes(content)
    Compare.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert err.startswith(f"notice: {folder}: ") and len(err.splitlines()) == 1
    (row,) = rows(out)
    assert "?" in row.values()


def test_foreign_values_are_one_notice(tmp_path, capsys):
    folder = save_run(tmp_path / "run", evaluation={"knn": "high", "linear": float("nan")})
    Compare.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert err == f"notice: {folder}: knn is high; linear is nan\n"
    (row,) = rows(out)
    assert (row["kNN %"], row["linear %"], row["state"]) == ("?", "?", "complete")


def test_a_folder_in_place_of_a_file_and_half_a_line(tmp_path, capsys):
    folder = save_run(tmp_path / "run", epochs=2)
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "epo')  # a kill leaves it: no reason for a notice
    assert rows(show(capsys, folder))[0]["epochs"] == "2/4"
    (folder / "evaluation.json").mkdir()
    Compare.main([str(folder)])
    out, err = capsys.readouterr()
    assert err == f"notice: {folder}: evaluation.json cannot be read (Is a directory)\n"
    assert rows(out)[0]["state"] == "?"


def test_names_cannot_steer_the_terminal(tmp_path, capsys):
    bad = "x\x1b]0;title\x07\x1b[31m\u202e\n"
    for name in ("a", "b"):
        save_run(tmp_path / f"{name}{bad}", data=bad, suffix=f"{bad}{name}", eval=f"{name}{bad}", net="ü")
    (tmp_path / f"a{bad}" / "evaluation.json").write_text("?")
    Compare.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert r"a" + r"x\x1b]0;title\x07\x1b[31m\u202e\n" in out
    assert len(err.splitlines()) == 1
    assert "\x1b" not in error(capsys, tmp_path / bad)
    assert "\x1b" not in error(capsys, f"--{bad}")


def test_mistakes(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = save_run(tmp_path / "run")
    assert "holds no run: train one by python TrainSimCLR.py" in error(capsys, tmp_path / "empty")
    assert "none: No such file" in error(capsys, tmp_path / "none")
    assert "Not a directory" in error(capsys, run / "args.json")
    assert "cannot write" in error(capsys, run, "--csv", tmp_path / "none" / "runs.csv")
    assert "unrecognized arguments: --cvs" in error(capsys, "--cvs", "runs.csv")


def test_runs_are_listed_once(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    save_run(run / "single_code")  # part of the run
    (tmp_path / "README.md").write_text("")
    (tmp_path / "bank").mkdir()
    assert show(capsys, tmp_path, run).count(f"1  {run}\n") == 1


def test_csv(tmp_path, capsys):
    save_run(tmp_path / "a", evaluation={"knn": 0.5, "linear": 0.6}, lr=0.5)
    save_run(tmp_path / "b", epochs=1, lr=1.0, seed=1)
    show(capsys, tmp_path, "--csv", tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as handle:
        a, b = csv.DictReader(handle)
    assert (a["folder"], a["lr"], a["knn"], a["best_of_16"]) == (str(tmp_path / "a"), "0.5", "0.5", "")
    assert (b["seed"], b["epoch"], b["epochs"], b["linear"]) == ("1", "1", "4", "0.15")
    assert (b["minutes"], b["state"]) == ("1.0", "interrupted")


def test_plot(tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    savefig = figure.Figure.savefig

    def keep(self, *args, **kwargs):
        drawn.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    save_run(tmp_path / "a", evaluation={"knn": 0.5, "linear": 0.6}, lr=0.5)
    save_run(tmp_path / "b", epochs=3, lr=1.0)
    save_run(tmp_path / "generator", "TrainCamNet")
    show(capsys, tmp_path, "--plot", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width >= 600

    titles = {axes.get_ylabel(): axes for axes in drawn[0].axes}
    knn = titles["kNN accuracy, %"]
    assert [line.get_ydata()[-1] for line in knn.lines] == pytest.approx([40, 30])
    assert [list(line.get_xdata()) for line in knn.lines] == [[2, 4, 6, 8], [2, 4, 6]]
    assert [text.get_text().strip() for text in knn.texts] == ["1", "2"]
    assert len(titles["loss"].lines) == 2  # the loss of a generator is another one
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert len(legend) == 3
    assert legend[0] == "1  shapes  TrainSimCLR  lr 0.5  seed 0"


def test_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    run = save_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot needs matplotlib: python -m pip install matplotlib" in error(
        capsys, run, "--plot", tmp_path / "x.png"
    )


def test_a_hundred_runs_without_torch(tmp_path):
    """Half a second of one core, the start of Python included, and neither torch nor matplotlib."""
    for index in range(100):
        save_run(tmp_path / f"run{index}", epochs=100, lr=index % 20, seed=index // 20)
    code = f"import sys, Compare; Compare.main([{str(tmp_path)!r}]); print(sorted(sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.count("interrupted") == 100
    modules = done.stdout.splitlines()[-1]
    assert "'argparse'" in modules
    assert not [name for name in ("torch", "numpy", "matplotlib") if f"'{name}'" in modules]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_runs_of_the_scripts(whole, capsys):
    (row,) = rows(show(capsys, whole.models_dir))
    result = json.loads((whole.folder / "evaluation.json").read_text())
    assert row["script"] == "TrainSimCLR"
    assert row["state"] == "complete"
    assert row["linear %"] == f"{100 * result['linear']:.1f}"
    assert row["epochs"] == "3"


def test_a_table_that_cannot_be_written_leaves_the_old_one_alone(tmp_path, capsys, monkeypatch):
    save_run(tmp_path / "Models" / "a")
    file = tmp_path / "runs.csv"
    file.write_text("old")

    def fail(scratch, groups):
        scratch.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Compare, "write_csv", fail)
    with pytest.raises(SystemExit):
        Compare.main([str(tmp_path / "Models"), "--csv", str(file)])
    assert f"--csv {file}: cannot write it: No space left" in capsys.readouterr().err
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["runs.csv"]


@pytest.mark.parametrize("name", ["x.pdf", "x.jpg"])
def test_a_plot_is_a_png(tmp_path, capsys, name):
    assert f"{name}: the picture is a PNG" in error(capsys, save_run(tmp_path / "a"), "--plot", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_plot_of_names_with_dollars(tmp_path):
    save_run(tmp_path / "Models" / "a", data="/x/$a^$b_{")
    Compare.main([str(tmp_path / "Models"), "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_must_not_be_entered_is_passed_over(monkeypatch, tmp_path):
    for name in ("lost+found", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    exists = Path.exists

    def refused(path, **options):
        if "lost+found" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refused)
    assert Compare.find_runs(tmp_path) == [tmp_path / "run"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "1.pt"])
def test_a_table_does_not_replace_files_of_runs(name, tmp_path, capsys):
    (tmp_path / "args.json").write_text("{}")
    file = tmp_path / name
    file.write_text("kept")
    with pytest.raises(Compare.UserError, match="files of runs end so"):
        Compare.replace_file("--csv", file, lambda scratch: scratch.write_text("a table"))
    assert file.read_text() == "kept"
