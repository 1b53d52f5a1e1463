"""Compare ISICLE and SimCLR fairly: runs that differ only in where their views come from, over several seeds.

    python -m Benchmarks.Arms                                                   # all arms on generated shapes
    python -m Benchmarks.Arms --data cifar10 --arms simclr_full,isicle_full -- --backbone resnet8 --epochs 10

Flags after -- go to every run. Writes Results/arms-DATA.json and Results/arms-DATA.png after every run; a second start
continues where the first one stopped. All arms take the same number of steps, except those whose name ends in
_equal_compute: their epochs are such that they cost as much as isicle_full, or, with crop and flip only, as multi_crop.
Compute is in multiply-accumulates; arms with a generator include its search, training and sampling.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import Data
import Flags
import Runs
import Utils
from Benchmarks.Collect import generator_flags
from Benchmarks.Compute import encoder_macs, generator_macs
from Benchmarks.Picture import draw_arms
from Benchmarks.Tables import arms_table
from Flags import bounded

EQUAL = "_equal_compute"  # end of the names of arms that take the compute of an arm of ISICLE, not its steps
ALONE = "--p_gen 1 --aug crop"  # only the restorations make the views differ in color
ARMS = {  # name: (script, flags, what it is)
    "simclr_crop": ("TrainSimCLR.py", "--aug crop", "SimCLR, crop and flip only"),
    "simclr_crop_4_views": (
        "TrainSimCLR.py",
        "--aug crop --num_views 4",
        "SimCLR, four real views, crop and flip only",
    ),
    f"simclr_crop{EQUAL}": (
        "TrainSimCLR.py",
        "--aug crop",
        "SimCLR, crop and flip only, longer: the total compute of four restorations",
    ),
    "simclr_full": ("TrainSimCLR.py", "", "SimCLR"),
    "simclr_full_extra_view": ("TrainSimCLR.py", "--num_views 3", "SimCLR, three real views"),
    "simclr_full_4_views": ("TrainSimCLR.py", "--num_views 4", "SimCLR, four real views"),
    "simclr_full_8_views": ("TrainSimCLR.py", "--num_views 8", "SimCLR, eight real views"),
    f"simclr_full{EQUAL}": ("TrainSimCLR.py", "", "SimCLR, longer: ISICLE's total compute"),
    f"simclr_full_extra_view{EQUAL}": (
        "TrainSimCLR.py",
        "--num_views 3",
        "SimCLR, three real views, longer: ISICLE's total compute",
    ),
    f"simclr_full_4_views{EQUAL}": (
        "TrainSimCLR.py",
        "--num_views 4",
        "SimCLR, four real views: ISICLE's total compute",
    ),
    f"simclr_full_8_views{EQUAL}": (
        "TrainSimCLR.py",
        "--num_views 8",
        "SimCLR, eight real views: ISICLE's total compute",
    ),
    "corrupted_only": ("TrainISICLE.py", "--pair corrupted --aug crop", "c(x) twice, crop and flip only"),
    "single_code": ("TrainISICLE.py", f"--pair gen_twice {ALONE}", "one restoration twice, crop and flip only"),
    "gen_gen_crop": (
        "TrainISICLE.py",
        f"--pair gen_gen {ALONE}",
        "ISICLE, two restorations, crop and flip only",
    ),
    "multi_crop": (
        "TrainISICLE.py",
        f"--pair multi --num_pos 4 {ALONE}",
        "ISICLE, four restorations, crop and flip only",
    ),
    "gen_gen_full": ("TrainISICLE.py", "--pair gen_gen", "ISICLE, two restorations"),
    "real_gen_full": ("TrainISICLE.py", "--pair real_gen", "ISICLE, the image and a restoration"),
    "isicle_full": ("TrainISICLE.py", "", "ISICLE, the image twice and a restoration"),
}


def get_args(argv=None):
    """Parse the flags; those after -- are kept in .rest."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--data", default="shapes", help="data set or folder, as in TrainSimCLR.py")
    add("--arms", metavar="A,..", help=f"arms to run, joined by commas; default: all of {', '.join(ARMS)}")
    add("--seeds", type=bounded(int, 1), default=3, metavar="N", help="runs of each arm, with seeds 0 to N - 1")
    add("--eval", choices=["test", "val", "cv"], default="test", help="split to score; choose flags by val or cv")
    add("--isicle", default="", metavar="FLAGS", help="flags for the arms of TrainISICLE.py only, in one string")
    jobs = "runs at the same time, which divide the cores evenly; 1 on a GPU"
    add("--jobs", type=bounded(int, 1), default=1, metavar="N", help=jobs)
    models = str(Utils.ROOT / "Models")
    add("--models_dir", type=Flags.path, default=models, metavar="DIR", help="folder of the run folders")
    out = "JSON to write; default: Results/arms-DATA.json, or choice-DATA-EVAL.json with --eval val or cv"
    add("--out", type=Flags.path, metavar="FILE", help=out)
    args = parser.parse_args(argv[:cut])
    args.rest = argv[cut + 1 :]
    args.arms = args.arms.split(",") if args.arms else list(ARMS)
    if not find_spec("matplotlib"):
        raise Utils.UserError("matplotlib is not installed: pip install -r requirements-dev.txt")
    Flags.words_in("isicle", args.isicle)  # UserError now, and not after the first run
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown:
        raise Utils.UserError(f"--arms {','.join(unknown)}: choose from {', '.join(ARMS)}")
    return args


# ---------------------------------------------------------------------------------------------------- one run


def words_of(args, arm, seed, records):
    """Return [script, flag, ...] of a run. records: of the runs that are finished."""
    script, flags, _ = ARMS[arm]
    words = [script]
    if args.data != "shapes":
        words += ["--data", args.data]
    words += args.rest
    words += flags.split()
    if arm.endswith(EQUAL):
        words += ["--epochs", str(equal_epochs(arm, records))]
    if script == "TrainISICLE.py":
        words += shlex.split(args.isicle)
    return [*words, "--eval", args.eval, "--seed", str(seed)]


def equal_epochs(arm, records):
    """Return the epochs after which an arm costs as much as ISICLE, generator included. UserError if not known.

    ISICLE: multi_crop for an arm with crop and flip only, isicle_full for others. An epoch costs what it costs in the
    arm of the same name without _equal_compute.
    """
    name = arm.removesuffix(EQUAL)
    isicle = "multi_crop" if "--aug crop" in ARMS[arm][1] else "isicle_full"
    ours = [row for row in records if row["arm"] == isicle]
    same = [row for row in records if row["arm"] == name]
    if not ours or not same:
        raise Utils.UserError(f"--arms {arm}: its length follows from {name} and {isicle}: add both")
    spent = ours[0]["encoder_macs"] + ours[0]["generator_macs"]
    return round(spent * same[0]["epochs"] / same[0]["encoder_macs"])


def finish(args, running, arm, seed, words):
    """Do one run, or continue it, and return its record. UserError if it fails.

    running: the set of processes, which holds this one while it runs.
    """
    command = [sys.executable, str(Utils.ROOT / words[0]), *words[1:]]
    command += ["--resume", "auto", "--no-baselines", "--models_dir", args.models_dir]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if args.jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))
    code, output = run_aloud(command, environment, f"{arm}, seed {seed}", running)
    folder = re.search(r"^checkpoints, pictures, logs: (.*Train(?:SimCLR|ISICLE)-.*)$", output, re.MULTILINE)
    if code or not folder:
        reason = (output.strip().splitlines() or ["it printed nothing"])[-1]
        raise Utils.UserError(f"{shlex.join(words)}: {reason}: fix it and start again: finished runs are kept")
    return record_of(arm, seed, args.data, words, Path(folder[1]), output)


def run_aloud(command, environment, title, running):
    """Run a command and print its lines with a title as they come; return (exit code, all of its output).

    running: as in `finish`.
    """
    lines = []
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=Utils.ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        running.add(process)
        for line in process.stdout:
            lines.append(line)
            if line.strip():
                print(f"[{title}] {line.rstrip()}", flush=True)
    running.remove(process)
    return process.returncode, "".join(lines)


def record_of(arm, seed, data, words, folder, output):
    """Return the record of a finished run. data: the flag --data as it was given."""
    if not (folder / "evaluation.json").exists():
        raise Utils.UserError(f"--data {data}: too few labels to score by: the arms need classes to compare")
    result = json.loads((folder / "evaluation.json").read_text())
    run = json.loads((folder / "args.json").read_text())
    last = Runs.read_metrics(folder)[-1]
    flags = argparse.Namespace(**run["args"])
    start = run["starts"][-1]
    record = {
        "arm": arm,
        "title": ARMS[arm][2],
        "seed": seed,
        "linear": result["linear"],
        "knn": result["knn"],
        "split": result["split"],
        "n_test": result["n_test"],
        "steps": last["step"],
        "epochs": result["epoch"],
        "encoder_macs": encoder_macs(flags, last["step"]),
        "generator_macs": 0,
        "command": shlex.join(["python", *words]),
        "minutes": round(last["seconds"] / 60, 1),
        "generator": None,
        "generator_minutes": 0.0,
        "pairs": result.get("pairs", {}),
        "device": start["device"],
        "revision": start["revision"],
        "torch": start["torch"],
        "flags": Flags.hyper_parameters(flags) | {"data": data},
    }
    found = re.search(r"^generator: (.*)$", output, re.MULTILINE)
    if found:
        record |= generator_record(flags, Path(found[1]).parent)
    return record


def generator_record(flags, folder):
    """Return the part of a record that describes the generator in a run folder, for a run with these flags."""
    record = {"generator": folder.name, "generator_flags": generator_flags(folder)}
    if flags.pair == "corrupted":  # only its corruption was used
        return record
    theirs = argparse.Namespace(**Runs.stored_flags(folder))
    banks = math.ceil(flags.epochs / flags.refresh) if flags.refresh else 1
    n = len(Data.get_train_split(flags.data, Flags.file_options(flags, "cpu")))
    seconds = Runs.read_metrics(folder)[-1]["seconds"]
    record["generator_macs"] = generator_macs(theirs, n, flags.num_codes, banks)
    record["generator_minutes"] = round(seconds / 60, 1)
    return record


# ---------------------------------------------------------------------------------------------------- all runs


def finished(args, runs):
    """Yield the record of each run (arm, seed, words), --jobs at the same time; none starts after one has failed.

    A signal ends those that run: they save, and the next start continues them.
    """
    running = set()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(finish, args, running, *run) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except (KeyboardInterrupt, SystemExit):
            for process in list(running):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_records(file):
    """Return the records of finished runs in the file of --out, or [] without it. Raises UserError if it is damaged."""
    try:
        records = json.loads(file.read_text()) if file.exists() else []
        if not isinstance(records, list) or not all(isinstance(row, dict) and "command" in row for row in records):
            raise ValueError("no list of runs")
        return records
    except (OSError, ValueError) as error:
        raise Utils.UserError(f"--out {file}: no records of runs ({error}): name another file") from error


def missing(args, arms, records, file):
    """Return the runs (arm, seed, words) of some arms that have no record yet, seed after seed.

    Raises UserError if the file of the records holds runs of these arms with other flags: no table may mix them.
    """
    for row in records:
        if row["arm"] in arms:
            command = shlex.join(["python", *words_of(args, row["arm"], row["seed"], records)])
            if row["command"] != command:
                other = f"{file} holds a run of this arm with other flags, {row['command']}"
                raise Utils.UserError(f"--arms {row['arm']}: {other}: name another file by --out, or move it away")
    done = {row["command"] for row in records}
    runs = []
    for seed in range(args.seeds):
        for arm in arms:
            words = words_of(args, arm, seed, records)
            if shlex.join(["python", *words]) not in done:
                runs.append((arm, seed, words))
    return runs


def add(records, row):
    """Return the records in the order of ARMS, where this one replaces an older one of the same arm and seed."""
    others = [each for each in records if (each["arm"], each["seed"]) != (row["arm"], row["seed"])]
    order = list(ARMS)
    return sorted([*others, row], key=lambda each: (order.index(each["arm"]), each["seed"]))


def main(args):
    """Do the runs that are missing; print the table; return the exit code."""
    name = Data.get_row(args.data).name
    name = f"arms-{name}.json" if args.eval == "test" else f"choice-{name}-{args.eval}.json"
    file = Path(args.out or Utils.ROOT / "Results" / name)
    records = read_records(file)
    first = [arm for arm in args.arms if not arm.endswith(EQUAL)]
    last = [arm for arm in args.arms if arm.endswith(EQUAL)]  # their length follows from the others
    for arms in (first, last):
        for row in finished(args, missing(args, arms, records, file)):
            records = add(records, row)
            file.parent.mkdir(parents=True, exist_ok=True)
            Utils.write_json(file, records)
            draw_arms(records, file.with_suffix(".png"))
            scores = f"kNN {100 * row['knn']:.2f} %  linear {100 * row['linear']:.2f} %"
            print(f"{row['arm']}, seed {row['seed']}: {scores}, {row['minutes']} minutes", flush=True)
    print(f"{arms_table(records)}\nwritten: {file}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
