"""Compare ISICLE and SimCLR fairly: the same but for where views come from, several seeds; one table, one plot.

    python -m Benchmarks.Arms                                                   # all arms on generated shapes
    python -m Benchmarks.Arms --data cifar10 --arms simclr_full,isicle_full -- --backbone resnet8 --epochs 10

What comes after -- goes to every run. Writes Results/arms-DATA.json after every run, and Results/arms-DATA.png; started
again, it goes on where it was. All arms take equal steps; compute (multiply-accumulates, MAC) counts a backward pass as
two forward ones, and charges search, training and sampling of the generator to those that use it. The arm
simclr_full_equal_compute is SimCLR with so many epochs more as isicle_full spends on its generator.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

if find_spec("TrainSimCLR") is None:  # started by its path, Python looks for modules beside it only
    print("Arms.py: error: start it in the repository's folder, as python -m Benchmarks.Arms", file=sys.stderr)
    sys.exit(2)

import Data
import Flags
import TrainCamNet
import TrainISICLE
import Utils
from Backbones import build_head
from Benchmarks.Collect import arms_table, by_arm, title_of
from CamNet.Distances import build_distance
from CamNet.IMLE import Search

EQUAL = "simclr_full_equal_compute"
ALONE = "--p_gen 1 --aug crop"  # the restorations are all that tells the views apart
ARMS = {  # name: (script, flags, what it is)
    "simclr_crop": ("TrainSimCLR.py", "--aug crop", "SimCLR, crop and flip alone"),
    "simclr_full": ("TrainSimCLR.py", "", "SimCLR"),
    "simclr_full_extra_view": ("TrainSimCLR.py", "--num_views 3", "SimCLR, a third real view"),
    EQUAL: ("TrainSimCLR.py", "", "SimCLR, longer: ISICLE's compute"),
    "corrupted_only": ("TrainISICLE.py", "--pair corrupted --aug crop", "c(x) twice, crop and flip alone"),
    "single_code": ("TrainISICLE.py", f"--pair gen_twice {ALONE}", "one restoration twice, crop and flip alone"),
    "gen_gen_crop": ("TrainISICLE.py", f"--pair gen_gen {ALONE}", "ISICLE, two restorations, crop and flip alone"),
    "gen_gen_full": ("TrainISICLE.py", "--pair gen_gen", "ISICLE, two restorations"),
    "real_gen_full": ("TrainISICLE.py", "--pair real_gen", "ISICLE, the image and a restoration"),
    "isicle_full": ("TrainISICLE.py", "", "ISICLE, the image twice and a restoration"),
}


def get_args(argv=None):
    """Parse the flags; what comes after -- is kept as .rest."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=form)
    add = parser.add_argument
    add("--data", default="shapes", help="as of TrainSimCLR.py")
    add("--arms", default=",".join(ARMS), metavar="A,..", help="which of them")
    add("--seeds", type=Flags.bounded(int, 1), default=3, metavar="N", help="seeds 0 to N - 1, one after another")
    add("--eval", choices=["test", "val", "cv"], default="test", help="what is scored; choose flags by val or cv only")
    add("--isicle", default="", metavar="FLAGS", help="flags for the arms of TrainISICLE.py alone, in one string")
    jobs = "runs at a time, each on an equal share of the cores; a GPU takes one"
    add("--jobs", type=Flags.bounded(int, 1), default=1, metavar="N", help=jobs)
    add("--models_dir", default=str(Utils.ROOT / "Models"), metavar="DIR", help="folder of the run folders")
    add(
        "--out",
        metavar="FILE",
        help="JSON to write; None: Results/arms-DATA.json; by val or cv choice-DATA-EVAL.json",
    )
    args = parser.parse_args(argv[:cut])
    args.rest = argv[cut + 1 :]
    args.arms = args.arms.split(",")
    if not find_spec("matplotlib"):
        raise Utils.UserError("matplotlib is not installed: pip install -r requirements-dev.txt")
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        raise Utils.UserError(f"--arms {','.join(unknown)}: choose from {', '.join(ARMS)}")
    return args


def words_of(args, arm, seed, records):
    """Return [script, flag, ...] of a run; records: of runs that are finished."""
    script, flags, _ = ARMS[arm]
    words = [script, *(["--data", args.data] if args.data != "shapes" else []), *args.rest, *flags.split()]
    words += ["--epochs", str(equal_epochs(records))] if arm == EQUAL else []
    words += shlex.split(args.isicle) if script == "TrainISICLE.py" else []
    return [*words, "--eval", args.eval, "--seed", str(seed)]


def count_macs(function, *inputs):
    """Return the multiply-accumulates of a call: those of convolutions and matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() // 2


def encoder_macs(flags, steps):
    """Return the MACs of training the encoder by these flags, that many steps."""
    encoder = Flags.encoder_for(flags).eval()
    size = Data.get_row(flags.data, flags.size).size
    head = build_head(encoder.num_features, flags.proj_hidden, flags.proj_dim, flags.proj_norm).eval()
    forward = count_macs(encoder, torch.rand(1, 3, size, size))
    views = flags.num_views if "num_views" in flags else len(TrainISICLE.Restored(flags))
    per_image = 3 * views * (forward + count_macs(head, torch.rand(1, encoder.num_features)))
    if getattr(flags, "pick", "random") == "farthest":  # all restorations are looked at
        per_image += (flags.num_codes + (flags.pair != "gen_gen")) * forward
    return steps * flags.bs * per_image


def generator_macs(flags, n, k, banks=1):
    """Return the MACs of search and training by flags of TrainCamNet.py, and of banks of k restorations of n images."""
    size = Data.get_row(flags.data, flags.size).size
    net = TrainCamNet.build_generator(flags, size).eval()
    distance = build_distance(flags.distance, flags.lpips_weights, flags.lpips_side, flags.alpha)
    keys = torch.zeros(1, dtype=torch.int64)
    condition, codes = net.corruption(torch.rand(1, 3, size, size), keys), net.codes(keys)
    upto = [0, *(count_macs(net, condition, codes[: level + 1]) for level in range(len(codes)))]
    seen = [count_macs(distance.features, torch.rand(1, 3, side, side)) for side in net.sides]
    search = Search([int(count) for count in flags.m.split(",")])
    candidates = [search.count(level) for level in range(len(codes))]
    searched = sum(m * (b - a + d) for m, a, b, d in zip(candidates, upto, upto[1:], seen))
    visited = min(flags.period, n - min(TrainCamNet.HELD_OUT, n // 10))
    return flags.periods * visited * (searched + flags.visits * 3 * (upto[-1] + sum(seen))) + banks * n * k * upto[-1]


def finish(args, arm, seed, words):
    """Do one run to its end and return its record. UserError where it fails; it goes on when it is started again."""
    flags = ["--resume", "auto", "--no-baselines", "--models_dir", args.models_dir]
    command = [sys.executable, str(Utils.ROOT / words[0]), *words[1:], *flags]
    threads = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))
    environment = {**os.environ, **({"OMP_NUM_THREADS": threads} if args.jobs > 1 else {})}
    done = subprocess.run(command, cwd=Utils.ROOT, env=environment, capture_output=True, text=True)
    place = re.search(r"^checkpoints, pictures, logs: (.*TrainSimCLR-.*|.*TrainISICLE-.*)$", done.stdout, re.MULTILINE)
    if done.returncode or not place:
        reason = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no word"])[-1]
        raise Utils.UserError(f"{shlex.join(words)}: {reason}: mend it and start again: finished runs are kept")
    return record_of(arm, seed, words, Path(place[1]), done.stdout)


def record_of(arm, seed, words, folder, output):
    """Return what is known of a finished run."""
    result, run = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "args.json"))
    flags, start = argparse.Namespace(**run["args"]), run["starts"][-1]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    generated, minutes, found = 0, 0.0, re.search(r"^generator: (.*)$", output, re.MULTILINE)
    if found and flags.pair != "corrupted":
        camnet = Path(found[1]).parent
        theirs = argparse.Namespace(**json.loads((camnet / "args.json").read_text())["args"])
        banks = -(-flags.epochs // flags.refresh) if flags.refresh else 1
        n = len(Data.get_train_split(flags.data, Flags.file_options(flags, "cpu")))
        generated = generator_macs(theirs, n, flags.num_codes, banks)
        minutes = json.loads((camnet / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] / 60
    return {
        **{
            "arm": arm,
            "title": ARMS[arm][2],
            "seed": seed,
            "linear": result["linear"],
            "knn": result["knn"],
            "split": result["split"],
        },
        **{"n_test": result["n_test"], "steps": last["step"], "epochs": result["epoch"]},
        **{"encoder_macs": encoder_macs(flags, last["step"]), "generator_macs": generated},
        **{"command": shlex.join(["python", *words]), "minutes": round(last["seconds"] / 60, 1)},
        **{
            "generator": Path(found[1]).parent.name if found else None,
            "generator_minutes": round(minutes, 1),
            "pairs": result.get("pairs", {}),
        },
        **{key: start[key] for key in ("device", "revision", "torch")},
    }


def equal_epochs(records):
    """Return the epochs in which SimCLR spends what isicle_full does, generator included. UserError if not known."""
    spent = [row["encoder_macs"] + row["generator_macs"] for row in records if row["arm"] == "isicle_full"]
    plain = [row["encoder_macs"] / row["epochs"] for row in records if row["arm"] == "simclr_full"]
    if not spent or not plain:
        raise Utils.UserError(f"--arms {EQUAL}: it is measured by simclr_full and isicle_full: add both")
    return round(spent[0] / plain[0])


def plot(records, file):
    """Draw linear accuracy over compute, a point per arm with its standard deviation."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for rows in by_arm(records).values():
        x = (rows[0]["encoder_macs"] + rows[0]["generator_macs"]) / 1e12
        values = [100 * row["linear"] for row in rows]
        mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        look = {"fmt": "o" if rows[0]["title"].startswith("SimCLR") else "s", "mfc": "none", "capsize": 3}
        axes.errorbar(x, mean, deviation, label=f"{mean:.1f}  {title_of(rows[0])}", **look)
    axes.set_xlabel("compute, TMAC, generator included")
    axes.set_ylabel(f"linear probe, % of {records[0]['split']}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write(file, records):
    """Write the records, whole, and draw them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Utils.write_json(file, records)
    plot(records, file.with_suffix(".png"))


def finished(args, runs):
    """Yield the record of each run (arm, seed, words), --jobs at a time; none is begun after one has failed."""
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(finish, args, *run) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def main(args):
    """Do what is missing of the runs, seed after seed; print the table; return the exit code."""
    name = Data.get_row(args.data).name
    name = f"arms-{name}.json" if args.eval == "test" else f"choice-{name}-{args.eval}.json"
    file = Path(args.out or Utils.ROOT / "Results" / name)
    records = json.loads(file.read_text()) if file.exists() else []
    order = list(ARMS)
    for arms in ([arm for arm in args.arms if arm != EQUAL], [arm for arm in args.arms if arm == EQUAL]):
        runs = [(arm, seed, words_of(args, arm, seed, records)) for seed in range(args.seeds) for arm in arms]
        done = {row["command"] for row in records}
        runs = [run for run in runs if shlex.join(["python", *run[2]]) not in done]
        for row in finished(args, runs):
            records = [each for each in records if (each["arm"], each["seed"]) != (row["arm"], row["seed"])]
            records = sorted([*records, row], key=lambda each: (order.index(each["arm"]), each["seed"]))
            write(file, records)
            scores = f"kNN {100 * row['knn']:.2f} %  linear {100 * row['linear']:.2f} %"
            print(f"{row['arm']}, seed {row['seed']}: {scores}, {row['minutes']} minutes", flush=True)
    print(f"{arms_table(records)}\nwritten: {file}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
