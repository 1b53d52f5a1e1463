"""Gather finished runs into Results/NAME.json, and write the tables of README.md and Results/README.md from there.

    python -m Benchmarks.Collect Models/RUN [Models/RUN ...] --out Results/simclr-shapes.json
    python -m Benchmarks.Collect                # only the tables, from what Results/ holds

RUN is a run folder of TrainSimCLR.py, TrainISICLE.py or TrainCamNet.py. All tables of the two files are
made here, so that no figure is typed by hand.
"""

import argparse
import json
import re
from pathlib import Path

import Data
import Flags
import Runs
import Utils
from Benchmarks import Tables

FILES = ("README.md", "Results/README.md")
FLAGS = ("data", "backbone", "aug", "num_views", "pair", "bs", "epochs", "seed")
GENERATOR_FLAGS = ("data", "net", "candidates", "period", "visits", "periods", "bs", "seed")
STARTED = ("command", "revision", "device", "torch", "torchvision", "python")


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders of one table")
    parser.add_argument(
        "--out", type=Flags.path, metavar="FILE", help="JSON to write them to; those in Results/ are shown"
    )
    args = parser.parse_args(argv)
    if bool(args.runs) != bool(args.out):
        raise Utils.UserError("run folders and --out FILE go together: give both, or neither")
    return args


# ---------------------------------------------------------------------------------------------------- records


def collect(folder):
    """Return the record of a finished run: scores, command, flags, device, time. UserError if it is not finished."""
    folder = Path(folder)
    found = [folder / name for name in ("evaluation.json", "generator.json") if (folder / name).exists()]
    if not found:
        raise Utils.UserError(f"{folder} holds no evaluation.json or generator.json: give the folder of a finished run")
    file = found[0]
    is_generator = file.stem == "generator"
    flags = Runs.stored_flags(folder)
    starts = json.loads((folder / "args.json").read_text())["starts"]

    # what was learned, and how long it took up to the last epoch's scores
    record = {}
    for name in GENERATOR_FLAGS if is_generator else FLAGS:
        if name in flags:
            record[name] = flags[name]
    logs = [folder / "metrics.jsonl", folder / "single_code" / "metrics.jsonl"]
    last = [json.loads(log.read_text().splitlines()[-1]) for log in logs if log.exists()]
    record["steps"] = last[0]["step"]
    record["minutes"] = round(sum(line["seconds"] for line in last) / 60, 1)
    record["starts"] = len(starts)
    for name in STARTED:
        record[name] = starts[0][name]

    # the flags that decide the result, those of its generator, and the jitter that a generator is compared with
    record["flags"] = Flags.hyper_parameters(argparse.Namespace(**flags))
    if record["flags"].get("generator"):
        record["generator_flags"] = generator_flags(record["flags"]["generator"])
    if is_generator:
        record["color_s"] = Data.get_row(record["data"]).recipe["color_s"]
    record[file.stem] = json.loads(file.read_text())
    return record


def generator_flags(place):
    """Return the flags that decide the result of a run of TrainCamNet.py; place: its folder or a checkpoint in it."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    return Flags.hyper_parameters(argparse.Namespace(**Runs.stored_flags(folder)))


def newest_generator(models):
    """Return the newest finished run folder of TrainCamNet.py. Raises UserError if there is none."""
    found = sorted(models.glob("TrainCamNet-*/generator.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise Utils.UserError(f"no generator in {models}: run python TrainCamNet.py, or name its run folder")
    return found[-1].parent


# ---------------------------------------------------------------------------------------------------- blocks of text


def fill(text, results):
    """Return the text with all its blocks made again.

    <!-- MAKER NAME --> ... <!-- end -->: a table of Results/NAME.json, by `Tables.MAKERS`.
    <!-- pairs --> ... <!-- end -->, in one line: the choices of --pair.
    """

    def block(match):
        file = results / f"{match[2]}.json"
        if not file.exists():
            raise Utils.UserError(f"{file} is missing: measure it, or remove its block from the text")
        content = json.loads(file.read_text())
        return f"<!-- {match[1]} {match[2]} -->\n\n{Tables.MAKERS[match[1]](content)}\n\n<!-- end -->"

    makers = "|".join(Tables.MAKERS)
    text = re.sub(rf"<!-- ({makers}) ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)
    return re.sub(r"<!-- pairs -->.*?<!-- end -->", f"<!-- pairs -->{Tables.pairs()}<!-- end -->", text)


# ---------------------------------------------------------------------------------------------------- script


def main(args):
    """Collect the runs, if any are named, and update the tables."""
    if args.runs:
        Utils.write_json(args.out, [collect(run) for run in args.runs])
        print(f"written: {args.out}")
    for name in FILES:
        file = Utils.ROOT / name
        before = file.read_text()
        after = fill(before, Utils.ROOT / "Results")
        if after != before:
            Utils.write_text(file, after)
        print(f"{'unchanged' if after == before else 'written'}: {file}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
