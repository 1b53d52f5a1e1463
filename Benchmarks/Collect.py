"""Gather finished runs into Results/NAME.json, and write the tables of the README from there.

    python -m Benchmarks.Collect Models/RUN [Models/RUN ...] --out Results/simclr-shapes.json     # or of TrainCamNet.py
    python -m Benchmarks.Collect                # only the README's tables, from what Results/ holds

Every figure of the README comes through here, so that none is typed in by hand.
"""

import argparse
import json
import re
import shlex
import statistics
import textwrap
from pathlib import Path

import Evaluate
import Flags
from CamNet.Measures import fitness_table

ROOT = Path(__file__).resolve().parent.parent
SCORES = ("knn", "linear", "linear_aug", "pixels_knn", "untrained_knn", "untrained_linear")


FLAGS = ("data", "backbone", "aug", "num_views", "pair", "bs", "epochs", "seed")
GENERATOR_FLAGS = ("data", "net", "m", "period", "visits", "periods", "bs", "seed")


def collect(folder):
    """Return the record of a finished run: its scores, and what a number must come with."""
    folder = Path(folder)
    file = next(file for name in ("evaluation", "generator") if (file := folder / f"{name}.json").exists())
    args = json.loads((folder / "args.json").read_text())
    logs = [folder / "metrics.jsonl", folder / "single_code" / "metrics.jsonl"]
    last = [json.loads(log.read_text().splitlines()[-1]) for log in logs if log.exists()]
    start, flags = args["starts"][0], FLAGS if file.stem == "evaluation" else GENERATOR_FLAGS
    hyper = Flags.hyper_parameters(argparse.Namespace(**args["args"]))
    if generator := hyper.get("generator"):  # a run folder of TrainCamNet.py, or a checkpoint in it
        camnet = Path(generator) if Path(generator).is_dir() else Path(generator).parent
        theirs = json.loads((camnet / "args.json").read_text())["args"]
        hyper |= {key: theirs[key] for key in ("corrupt", "periods")}  # what it undoes, and how long it learnt to
    return {
        **{key: args["args"][key] for key in flags if key in args["args"]},
        "steps": last[0]["step"],
        "minutes": round(sum(line["seconds"] for line in last) / 60, 1),  # up to the last epoch's scores
        "starts": len(args["starts"]),
        **{key: start[key] for key in ("command", "revision", "device", "torch", "torchvision", "python")},
        "flags": hyper,
        file.stem: json.loads(file.read_text()),
    }


def spread(values):
    """Return mean and, of several values, their standard deviation, in per cent, as text."""
    values = [100 * value for value in values]
    mean = f"{statistics.mean(values):.1f}"
    return mean + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def same_but_seed(record):
    """Return what runs share that differ in nothing but the seed: the command without it, and the device."""
    words = shlex.split(record["command"])
    unimportant = (
        "--seed",
        "--suffix",
        "--n_workers",
        "--models_dir",
        "--data_dir",
        "--eval_iter",
        "--save_iter",
        "--resume",
    )
    words = [word for before, word in zip(["", *words], words) if before not in unimportant and word not in unimportant]
    return shlex.join(words), record["device"]


def table(records):
    """Return a Markdown table: a row per command, mean ± standard deviation over its seeds."""
    groups = {}
    for record in records:
        groups.setdefault(same_but_seed(record), []).append(record)
    lines = [
        "| command | seeds | kNN | linear | linear, aug. | pixels | untrained, kNN / lin. | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (command, device), runs in groups.items():
        scores = {key: spread([run["evaluation"][key] for run in runs]) for key in SCORES}
        minutes = statistics.mean(run["minutes"] for run in runs)
        cells = [f"`{command}`", str(len(runs)), scores["knn"], scores["linear"], scores["linear_aug"]]
        cells += [scores["pixels_knn"], f"{scores['untrained_knn']} / {scores['untrained_linear']}"]
        cells += [f"{minutes:.1f}, {device}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_table(records):
    """Return a Markdown table of the runs that a choice was made by: the flags in which each differs from most."""
    names = sorted({name for row in records for name in row["flags"]} - {"generator"})  # corrupt, periods say it
    having = {name: [row["flags"][name] for row in records if name in row["flags"]] for name in names}
    most = {name: statistics.mode(those) for name, those in having.items() if name == "pair" or len(set(those)) > 1}
    lines = ["| run | kNN | linear |", "|---" * 3 + "|"]
    for row in records:
        own = {name: row["flags"][name] for name in most if row["flags"].get(name) is not None}
        flags = [f" --{name} {value}" for name, value in own.items() if name == "pair" or value != most[name]]
        scores = [f"{100 * row['evaluation'][name]:.1f}" for name in ("knn", "linear")]
        script = Path(shlex.split(row["command"])[1]).name
        lines.append(f"| `{script}{''.join(flags)}` | {' | '.join(scores)} |")
    rest = " ".join(f"--{name} {value}" for name, value in most.items() if name != "pair" and value is not None)
    first = records[0]
    of = f"Split {first['evaluation']['split']}, seed {first['seed']}, a run each, {first['device']}"
    return "\n".join([*lines, "", f"Where a row says nothing else: `{rest}`. {of}"])


def speed_table(content):
    """Return the Markdown table of a file of Benchmarks/Speed.py."""
    lines = ["| what | variant | views/s | peak memory, MiB |", "|---|---|---|---|"]
    for row in content["rows"]:
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}" if row.get("peak_memory_bytes") else ""
        lines.append(f"| {row['part']} | {row['variant']} | {row['views_per_second']:,.0f} | {memory} |")
    return "\n".join([*lines, "", f"`{content['command']}`, {content['device']}"])


def shown(records):
    """Return what the first of some runs printed at its end, as a block of code."""
    return textwrap.indent(Evaluate.scores_table(records[0]["evaluation"]), "    ")


def generator_table(records):
    """Return what a run of TrainCamNet.py printed at its end, as a block of code, with its command and time."""
    record = records[0]
    table = textwrap.indent(fitness_table(record["generator"]), "    ")
    return (
        f"{table}\n\n`{record['command']}`, {record['minutes']} minutes without the last measures, {record['device']}"
    )


def by_arm(records):
    """Return {arm: its records} of a file of Benchmarks/Arms.py, in their order."""
    groups = {}
    for row in records:
        groups.setdefault(row["arm"], []).append(row)
    return groups


def title_of(row):
    """Return an arm's title, with --p_gen and --corrupt where its command has them."""
    return ", ".join([row["title"], *re.findall(r" (--(?:p_gen|corrupt) \S+)", row["command"])])


def arms_table(records):
    """Return a Markdown table: a row per arm, mean ± standard deviation over its seeds, and what it took."""
    lines = ["| arm | seeds | kNN | linear | steps | compute, TMAC | of it generator | minutes |", "|---" * 8 + "|"]
    for rows in by_arm(records).values():
        first = rows[0]
        total = first["encoder_macs"] + first["generator_macs"]
        cells = [title_of(first), str(len(rows)), *(spread([row[name] for row in rows]) for name in ("knn", "linear"))]
        cells += [f"{first['steps']:,}", f"{total / 1e12:,.1f}", f"{100 * first['generator_macs'] / total:.0f} %"]
        minutes = statistics.mean(row["minutes"] + row["generator_minutes"] for row in rows)
        lines.append(f"| {' | '.join([*cells, f'{minutes:.1f}'])} |")
    first = records[0]
    return "\n".join([*lines, "", f"Split {first['split']}, {first['n_test']:,} images; each run on {first['device']}"])


def search_table(content):
    """Return the Markdown table of a file of Benchmarks/Search.py."""
    lines = ["| what | variant | images/s | ours / it | same codes |", "|---|---|---|---|---|"]
    for row in content["rows"]:
        same = f"{100 * row['same']:.1f} %" if "same" in row else ""
        speed = f"{row['images_per_second']:,.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['part']} | {row['variant']} | {speed} | {same} |")
    return "\n".join([*lines, "", f"`{content['command']}`, {content['device']}"])


MAKERS = {
    "table": table,
    "speed": speed_table,
    "output": shown,
    "generator": generator_table,
    "search": search_table,
    "arms": arms_table,
    "choice": choice_table,
}


def fill(text, results):
    """Return the text with every block <!-- MAKER NAME --> ... <!-- end --> made anew from Results/NAME.json."""

    def block(match):
        file = results / f"{match[2]}.json"
        if not file.exists():  # not yet measured
            return match[0]
        content = json.loads(file.read_text())
        return f"<!-- {match[1]} {match[2]} -->\n\n{MAKERS[match[1]](content)}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(MAKERS)}) ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(argv=None):
    """Collect runs, if any are named, and refresh the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="run folders of one table")
    parser.add_argument("--out", type=Path, help="file in Results/ to write them to")
    args = parser.parse_args(argv)
    if bool(args.runs) != bool(args.out):
        parser.error("run folders and --out go together")
    if args.runs:
        records = [collect(run) for run in args.runs]
        args.out.write_text(json.dumps(records, indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(), ROOT / "Results"))


if __name__ == "__main__":
    main()
