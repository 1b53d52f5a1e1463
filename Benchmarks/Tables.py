"""The tables of README.md and Results/README.md, as Markdown, made from the records in Results/."""

import re
import shlex
import statistics
import string
import textwrap
from importlib import import_module
from pathlib import Path

import Data
import Evaluate
import Flags
import TrainISICLE
from Benchmarks.Compute import training_macs
from CamNet.Measures import fitness_table

SCORES = ("knn", "linear", "linear_aug", "pixels_knn", "untrained_knn", "untrained_linear")
CIFAR_IMAGES = 50_000  # of its train split
SHOWN_RUN_FLAGS = ("eval",)  # of the flags that do not change the result


def spread(values):
    """Return mean and, of several values, their standard deviation, in percent, as text."""
    values = [100 * value for value in values]
    mean = f"{statistics.mean(values):.1f}"
    return mean + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def markdown(head, rows, *below):
    """Return a Markdown table of texts, with paragraphs below it."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n\n".join(["\n".join(lines), *below])


def device_of(record):
    """Return what a record was measured on, as text."""
    return re.sub(r"\b1 threads", "1 thread", record["device"])


def pairs():
    """Return the choices of --pair, the default first, in one line."""
    return "; ".join(f"`{name}`: {pair.what}" for name, pair in TrainISICLE.PAIRS.items())


# ---------------------------------------------------------------------------------------------------- commands


def defaults_of(script, data):
    """Return {flag: default} of a training script for a data set: of those flags with one default on every device."""
    if not Data.is_named(data):
        data = "."  # a folder of images, maybe of another machine: all folders have the same defaults
    build_parser = import_module(Path(script).stem).build_parser
    on_cpu = vars(build_parser(data, "cpu").parse_args([]))
    on_gpu = vars(build_parser(data, "cuda").parse_args([]))
    return {name: value for name, value in on_cpu.items() if value == on_gpu[name]}


def command_of(script, flags, first=()):
    """Return the shortest command that has these flags today: `python SCRIPT` and what differs from the defaults.

    Flags whose default depends on the device are spelled out. Left out are `generator`, a folder on some machine, and
    flags that do not change the result. flags: {name: value}; first: names of flags to begin with.
    """
    default = defaults_of(script, flags["data"]) | {"data": "shapes"}
    names = [name for name in flags if name in first] + [name for name in flags if name not in first]
    words = ["python", script]
    left_out = {"generator"} | Flags.RUN_FLAGS - set(SHOWN_RUN_FLAGS)
    for name in names:
        value = flags[name]
        if name in left_out or value is None or (name in default and value == default[name]):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value).removesuffix(".0")]
    return shlex.join(words)


def shown_command(command, leave_out=()):
    """Return a command without flags of this machine or of no effect on the result, and without those named."""
    unimportant = {f"--{name}" for name in (Flags.RUN_FLAGS - set(SHOWN_RUN_FLAGS)) | set(leave_out)}
    kept = []
    is_value = False  # of a flag that is left out
    for word in shlex.split(command):
        if word.startswith("--"):
            is_value = word in unimportant
        if not is_value:
            kept.append(word)
    return shlex.join(kept)


# ---------------------------------------------------------------------------------------------------- encoders


def encoder_command(record):
    """Return the command that makes the record of an encoder today, without its seed."""
    flags = {name: value for name, value in record["flags"].items() if name != "seed"}
    command = command_of(shlex.split(record["command"])[1], flags)
    return f"{command} --eval {record['evaluation']['split']}"


def encoder_table(records):
    """Return a table of runs of TrainSimCLR.py: a row per command, mean ± standard deviation over its seeds."""
    groups = {}
    for record in records:
        groups.setdefault((encoder_command(record), device_of(record)), []).append(record)
    rows = []
    for (command, device), runs in groups.items():
        scores = {name: spread([run["evaluation"][name] for run in runs]) for name in SCORES}
        minutes = statistics.mean(run["minutes"] for run in runs)
        cells = [f"`{command}`", str(len(runs)), scores["knn"], scores["linear"], scores["linear_aug"]]
        cells.append(scores["pixels_knn"])
        cells.append(f"{scores['untrained_knn']} / {scores['untrained_linear']}")
        cells.append(f"{minutes:.1f}, {device}")
        rows.append(cells)
    head = ["command", "seeds", "kNN", "linear", "linear, aug.", "kNN on pixels", "untrained: kNN / linear", "minutes"]
    return markdown(head, rows)


def output_block(records):
    """Return what the first of some runs printed at its end, as a block of code."""
    return textwrap.indent(Evaluate.scores_table(records[0]["evaluation"]), "    ")


def choice_table(records):
    """Return a table of the runs that a choice was made by: commands of today, and the generator that each used."""
    letters = {}  # {command of a generator: its letter}
    rows = []
    for record in records:
        script = shlex.split(record["command"])[1]
        command = command_of(script, record["flags"], varying(records))
        letter = ""
        if record.get("generator_flags"):
            generator = command_of("TrainCamNet.py", record["generator_flags"])
            letter = letters.setdefault(generator, string.ascii_uppercase[len(letters)])
        scores = [f"{100 * record['evaluation'][name]:.1f}" for name in ("knn", "linear")]
        rows.append([f"`{command}`", letter, *scores])
    generators = "\n".join(f"* {letter}: `{command}`" for command, letter in letters.items())
    first = records[0]
    where = f"Split {first['evaluation']['split']}, seed {first['seed']}, one run each, {device_of(first)}."
    below = f"{where} Generators, trained before:\n\n{generators}"
    return markdown(["command", "generator", "kNN", "linear"], rows, below)


def varying(records):
    """Return the names of the flags that differ between records."""
    values = {}
    for record in records:
        for name, value in record["flags"].items():
            values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) > 1}


# ---------------------------------------------------------------------------------------------------- arms


def by_arm(records):
    """Return {arm: its records} of a file of Benchmarks/Arms.py, in their order."""
    groups = {}
    for row in records:
        groups.setdefault(row["arm"], []).append(row)
    return groups


def title_of(row):
    """Return an arm's title, with --p_gen and --corrupt where they were not the default."""
    script = shlex.split(row["command"])[1]
    default = defaults_of(script, row["flags"]["data"])
    title = row["title"]
    for name in ("p_gen", "corrupt"):
        value = row["flags"].get(name)
        if value != default.get(name):
            title += f", --{name} {value:g}" if isinstance(value, float) else f", --{name} {value}"
    return title


def compute_of(row):
    """Return (MACs of the encoder, of the generator) that a run took, in 10^12."""
    return row["encoder_macs"] / 1e12, row["generator_macs"] / 1e12


def shared_compute(row, records):
    """Return the MACs of a run, in 10^12, if the training of its generator is divided among all runs that use it."""
    whole = sum(compute_of(row))
    if not row["generator_macs"]:
        return whole
    sharing = [each for each in records if each["generator_macs"] and each["generator"] == row["generator"]]
    return whole - training_macs(row) / 1e12 * (1 - 1 / len(sharing))


def arms_table(records):
    """Return a table: a row per arm, mean ± standard deviation over its seeds, and what it took."""
    rows = []
    for runs in by_arm(records).values():
        first = runs[0]
        encoder, generator = compute_of(first)
        minutes = statistics.mean(row["minutes"] + row["generator_minutes"] for row in runs)
        cells = [title_of(first), str(len(runs))]
        cells += [spread([row[name] for row in runs]) for name in ("knn", "linear")]
        cells += [f"{first['steps']:,}", f"{encoder + generator:,.1f}", f"{shared_compute(first, records):,.1f}"]
        cells += [f"{100 * generator / (encoder + generator):.0f} %", f"{minutes:.1f}"]
        rows.append(cells)
    head = ["arm", "seeds", "kNN", "linear", "steps", "compute", "shared", "generator's part", "minutes"]
    first = records[0]
    below = (
        f"Split {first['split']}, {first['n_test']:,} images; compute in 10^12 multiply-accumulates; shared: compute "
    )
    devices = " or ".join(dict.fromkeys(device_of(record) for record in records))
    below += f"if the runs of this table share the cost of the generator's training; each run on {devices}."
    return markdown(head, rows, below)


MAIN = [  # arms of the README
    "simclr_crop",
    "simclr_full",
    "simclr_full_extra_view",
    "simclr_full_equal_compute",
    "simclr_full_extra_view_equal_compute",
    "gen_gen_crop",
    "multi_crop",
    "gen_gen_full",
    "isicle_full",
]


def main_table(records):
    """Return the scores and the compute of the main arms."""
    rows = []
    for arm, runs in by_arm(records).items():
        if arm in MAIN:
            scores = [spread([row[name] for row in runs]) for name in ("knn", "linear")]
            rows.append([title_of(runs[0]), *scores, f"{sum(compute_of(runs[0])):,.1f}"])
    return markdown(["arm", "kNN", "linear", "compute"], rows)


# ---------------------------------------------------------------------------------------------------- generators


def generator_block(records):
    """Return what a run of TrainCamNet.py printed at its end, as a block of code, with its command and time."""
    record = records[0]
    table = textwrap.indent(fitness_table(record["generator"]), "    ")
    command = shown_command(record["command"])
    return f"{table}\n\n`{command}`: {record['minutes']} minutes without the measures at its end, {device_of(record)}"


# ---------------------------------------------------------------------------------------------------- speed


def speed_table(content):
    """Return the table of a file of Benchmarks/Speed.py."""
    rows = []
    for row in content["rows"]:
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}" if row.get("peak_memory_bytes") else ""
        rows.append([row["part"], row["variant"], f"{row['views_per_second']:,.0f}", memory])
    below = f"`{content['command']}`, {device_of(content)}"
    return markdown(["what", "variant", "views/s", "peak memory, MiB"], rows, below)


def floor_table(content):
    """Return the two tables of a file of Benchmarks/Floor.py: the floors of the stages, and their profiles."""
    rows = []
    profiles = []
    for row in content["rows"]:
        whole, products, rest = (1000 * row[name] for name in ("seconds", "products_floor", "bytes_floor"))
        macs = ", ".join(f"{count / 1e9:.1f} {dtype}" for dtype, count in row["macs"].items())
        cells = [f"{whole:.1f}", f"{products:.1f}", f"{rest:.1f}", f"{whole / (products + rest):.1f}"]
        rows.append([row["stage"], macs, f"{row['bytes'] / 2**20:,.0f}", *cells])
        profiles.append([row["stage"], *(f"{100 * share:.0f} %" for share in row["shares"].values())])
    rates = {name: f"{value / 1e9:,.0f}" for name, value in content["rates"].items()}
    measured = f"{rates['bfloat16']} x 10^9 MACs a second in bfloat16, {rates['float32']} in float32; "
    measured += f"{rates['bandwidth']} x 10^9 bytes a second"
    head = ["stage", "10^9 MACs", "MiB of other operations", "ms", "floor of MACs", "floor of bytes", "time / floor"]
    below = f"Measured: {measured}. `{content['command']}`, {device_of(content)}"
    first = markdown(head, rows, "Shares of the time:")
    return f"{first}\n\n{markdown(['stage', *content['rows'][0]['shares']], profiles, below)}"


def chunks_table(content):
    """Return the table of a file of Benchmarks/Chunks.py."""
    rows = []
    for row in content["rows"]:
        sizes = [f"{row[name] / 2**20:,.0f}" for name in ("before_bytes", "peak_memory_bytes")]
        chunk = f"{row['chunk_views']:,}" if row["chunk_views"] else "all"
        rows.append([f"{row['bs']:,}", chunk, *sizes, f"{row['views_per_second']:,.0f}"])
    head = ["images in a step", "views at a time", "before the first step, MiB", "peak memory, MiB", "views/s"]
    return markdown(head, rows, f"`{content['command']}`, {device_of(content)}")


def processes_table(content):
    """Return the table of a file of Benchmarks/Processes.py."""
    rows = []
    for row in content["rows"]:
        first, *others = list(row["images_per_second"].values())
        cells = [f"{first:,.0f}", *(f"{speed:,.0f} ({speed / first:.2f} x)" for speed in others)]
        rows.append([row["what"], *cells])
    head = ["images/s", *content["rows"][0]["images_per_second"]]
    return markdown(head, rows, f"`{content['command']}`, {device_of(content)}")


RATIO = "ours / it: the median over rounds, so not the quotient of two speeds"


def decoding_table(content):
    """Return the table of a file of Benchmarks/Decoding.py."""
    rows = []
    for row in content["rows"]:
        speed = f"{row['images_per_second']:,.0f}"
        equal = f"{100 * row['equal']:.1f} %"
        rows.append([row["variant"], speed, f"{row['ratio']:.2f}", f"{row['difference']:.4f}", equal])
    size = f"JPEGs of {content['bytes_per_image'] / 1000:,.0f} kB to {content['size']} pixels"
    below = f"{size}; {RATIO}. `{content['command']}`, cpu, 1 thread"
    head = ["variant", "images/s on a core", "ours / it", "difference from Pillow", "equal values"]
    return markdown(head, rows, below)


def search_table(content):
    """Return the table of a file of Benchmarks/Search.py."""
    rows = []
    for row in content["rows"]:
        same = f"{100 * row['same']:.1f} %" if "same" in row else ""
        rows.append([row["part"], row["variant"], f"{row['images_per_second']:,.1f}", f"{row['ratio']:.2f}", same])
    generator = command_of("TrainCamNet.py", content["generator"])
    measured = f"python -m Benchmarks.Search --images {content['images']} --rounds {content['rounds']}"
    below = f"{RATIO}. `{generator}`, then `{measured}`, {device_of(content)}"
    return markdown(["what", "variant", "images/s", "ours / it", "same codes"], rows, below)


def soak_table(content):
    """Return the Markdown table of a file of Benchmarks/Soak.py."""
    rows = []
    for row in content["rows"]:
        counts = [str(row["tried"]), str(row["passed"])]
        rows.append([row["kind"], *counts, f"{row['hits']} {row['hits_are']}", row["revision"]])
    below = f"`python -m Benchmarks.Soak`, {device_of(content)}"
    return markdown(["what is done to runs", "tried", "passed", "of these", "revision"], rows, below)


def kernels_table(content):
    """Return the two tables of a file of Benchmarks/Kernels.py: contrastive steps, and CamNet."""
    steps = {}  # {step: its rows}
    for row in content["rows"]:
        steps.setdefault(row["step"], []).append(row)
    kinds = ("pinned copies", "pageable copies", "waits")
    contrastive = []
    camnet = []
    for step, rows in steps.items():
        if step.startswith("CamNet"):
            for row in rows:
                counts = [f"{row[kind]}" for kind in kinds]
                camnet.append([step, row["part"], kernels_cell([row]), *counts])
        else:
            counts = [f"{sum(row[kind] for row in rows)}" for kind in kinds]
            contrastive.append([step, *(kernels_cell([row]) for row in rows), kernels_cell(rows), *counts])
            parts = [row["part"] for row in rows]
    below = f"{content['bs']} images in a step; kernels, and in parentheses the MiB that they touch."
    first = markdown(["step of ResNet-18", *parts, "sum", *kinds], contrastive, below)
    measured = f"{content['camnet_bs']} images, 4 codes, the pixel distance. `python -m Benchmarks.Kernels`"
    return f"{first}\n\n{markdown(['net', 'part', 'kernels', *kinds], camnet, measured)}"


def kernels_cell(rows):
    """Return the kernels of rows and, in parentheses, the MiB that they touch, as text."""
    touched = sum(row["touched bytes"] for row in rows) / 2**20
    return f"{sum(row['kernels'] for row in rows):,} ({touched:,.0f})"


def gpu_table(content):
    """Return the table of a file of Benchmarks/Gpu.py, and what the recipe of CIFAR-10 takes by these times."""
    row = Data.get_row("cifar10")
    encoder = row.recipe_for("cuda")
    generator = row.generator_recipe_for("cuda")
    measured = {each["part"]: each for each in content["rows"]}
    contrastive_steps = encoder["epochs"] * (CIFAR_IMAGES // encoder["bs"])
    generator_steps = generator["periods"] * generator["visits"] * generator["period"] // generator["bs"]
    searched = generator["periods"] * generator["period"]

    rows = []

    def add(what, value, unit, times, recipe):
        minutes = value * times / 60
        rows.append([what, f"{value * (1000 if unit == 'ms' else 1):.3g} {unit}", f"{recipe}: {minutes:.2g} min"])

    epochs = f"{encoder['epochs']} epochs, {contrastive_steps:,} steps"
    steps = {
        "SimCLR, a step of 2 views of 512 images": measured["simclr"]["step_ms"],
        "ISICLE, a step of its default pair, bank on the GPU": measured["isicle"]["step_ms"],
        "the same, bank on the disk": measured["isicle"]["mapped_ms"],
        "the same, --pick farthest": measured["isicle"]["mapped_farthest_ms"],
    }
    for what, milliseconds in steps.items():
        add(what, milliseconds / 1000, "ms", contrastive_steps, epochs)
    for bs in (32, 256):
        step = measured["camnet"][f"step_of_{bs}_ms"] / 1000
        times = f"{generator_steps:,} steps of {generator['bs']}"
        add(f"CAM-Net small, a step of {bs} images", step, "ms", generator_steps, times)
    search = measured["search"]["chunk_4096_s_per_1000"]
    add("its search, 1,000 images", search, "s", searched / 1000, f"{searched:,} images")
    bank = measured["bank"]["batches_of_2048_s_per_1000"]
    add("bank, 8 restorations of 1,000 images", bank, "s", CIFAR_IMAGES / 1000, f"{CIFAR_IMAGES:,} images")
    below = f"`{content['command']}`, {device_of(content)}, torch {content['torch']}"
    return markdown(["what", "time", "CIFAR-10 by its recipe, estimated"], rows, below)


GROWTH = [  # data, train images, side in pixels
    ("CIFAR-10", CIFAR_IMAGES, 32),
    ("ImageNet-100", 126_689, 128),
    ("ImageNet-100", 126_689, 224),
    ("ImageNet-1k", 1_281_167, 128),
    ("ImageNet-1k", 1_281_167, 224),
]


def growth_table(content):
    """Return what data sets of other sizes take on paper, from the times in a file of Benchmarks/Gpu.py."""
    measured = {each["part"]: each for each in content["rows"]}
    filling = measured["bank"]["batches_of_2048_s_per_1000"]  # 8 restorations of 32 px
    generator = Data.get_row("cifar10").generator_recipe_for("cuda")
    searching = measured["search"]["chunk_4096_s_per_1000"] * generator["periods"] * generator["period"] / 1000

    rows = []
    for name, images, side in GROWTH:
        one = images * 3 * side**2 / 2**30
        pixels = (side / 32) ** 2
        hours = [filling * pixels * images / 1000 / 3600, searching * pixels / 3600]
        sizes = [f"{count * one:,.2g}" if count * one < 10 else f"{count * one:,.0f}" for count in (1, 2, 8)]
        rows.append([f"{name}, {side} px", f"{images:,}", *sizes, *(f"{value:.2g}" for value in hours)])
    head = ["data", "images", "images, GiB", "bank of 2, GiB", "bank of 8, GiB", "filling of 8, hours", "search, hours"]
    return markdown(head, rows)


MAKERS = {
    "table": encoder_table,
    "speed": speed_table,
    "output": output_block,
    "generator": generator_block,
    "search": search_table,
    "floor": floor_table,
    "chunks": chunks_table,
    "processes": processes_table,
    "decoding": decoding_table,
    "arms": arms_table,
    "main": main_table,
    "choice": choice_table,
    "soak": soak_table,
    "kernels": kernels_table,
    "gpu": gpu_table,
    "growth": growth_table,
}
