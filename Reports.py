"""What a run reports: the time of its steps, its pairs as pictures and in numbers, TensorBoard's projector."""

import math
import time

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import Devices
import Evaluate
import Graphs
from Augmentations import to_float
from Lazy import LazyModule
from Losses import view_statistics
from Utils import shown

torchvision = LazyModule("torchvision")

MEASURED = 512  # images whose pairs are measured
LEAST_WIDTH = 600  # of a picture with captions, in pixels
ROW_WIDTH = 90  # of the captions on the left, before a line break
FONT_SIZE = 17  # of its captions: TensorBoard shows a picture at about half its size
PROBED = 4000  # images that show how well the label is preserved: half to learn from, half to score


class Meter:
    """Times the stages of the steps since the last logged line; on CUDA by events, without waiting for the device."""

    # backward: the optimizer's step included, and with a CUDA graph forward and loss as well
    STAGES = ("data", "views", "forward", "loss", "backward")

    def __init__(self, device, step):
        self.device = device
        self.waited = 0.0  # seconds of "data" in all that was read
        self.elapsed = 0.0
        self.start(step)

    def start(self, step):
        """Start to measure at this step."""
        self.step = step
        self.marks = [(None, self._now())]

    def lap(self, stage):
        """Note that a stage has just ended."""
        self.marks.append((stage, self._now()))

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, one, other):
        return other - one if isinstance(one, float) else one.elapsed_time(other) / 1000

    def read(self, step, views_per_step):
        """Return {"views_per_second", and "data_wait" and "time_STAGE", shares of 1} of the steps up to `step`.

        Waits for the device.
        """
        if self.device.type == "cuda":
            self.marks[-1][1].synchronize()
        seconds = dict.fromkeys(self.STAGES, 0.0)
        for (_, before), (stage, after) in zip(self.marks, self.marks[1:]):
            seconds[stage] += self._between(before, after)
        total = sum(seconds.values())
        self.waited += seconds["data"]
        self.elapsed += total
        views = (step - self.step) * views_per_step
        shares = {stage: round(value / total, 4) for stage, value in seconds.items()}
        values = {"views_per_second": round(views / total, 1), "data_wait": shares.pop("data")}
        return values | {f"time_{stage}": share for stage, share in shares.items()}


class Pace:
    """Estimates how long a training takes, from the steps that are done."""

    SKIPPED = 1  # first steps, which are slower than the others
    SKIPPED_ON_CUDA = Graphs.WARM_UP + 1
    MEASURED = 4

    def __init__(self, step, steps, device):
        """step: the one that comes next; steps: of the whole training."""
        self.first = step + (self.SKIPPED_ON_CUDA if device.type == "cuda" else self.SKIPPED)
        self.steps = steps
        self.device = device
        self.started = None
        self.seconds = None  # mean seconds of a step so far

    def tick(self, step):
        """Note that `step` steps are done. Return whether the pace is now known for the first time."""
        if self.started is None and step >= self.first:
            Devices.wait(self.device)
            self.started = time.perf_counter()
            self.started_at = step
        done = step - self.started_at if self.started else 0
        if done < self.MEASURED:
            return False
        is_first = self.seconds is None
        if is_first:
            Devices.wait(self.device)
        self.seconds = (time.perf_counter() - self.started) / done
        return is_first

    def left(self, step):
        """Return the seconds that the training still takes."""
        return (self.steps - step) * self.seconds


def duration(seconds):
    """Return a duration in words."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def times(spent, left):
    """Return in words what has passed and what is left. left: seconds; 0 or None: nothing, or not known."""
    text = f"{spent:.0f} s"
    return f"{text}, about {duration(left)} left" if left else text


def plural(count, noun):
    """Return a count with its noun."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def show_pairs(run, x, captions, step=0, images=8):
    """Write pairs.png: a row per view, with its caption, and a column per image: what the loss compares."""
    if not run.writes:
        return
    rows = x.view(len(captions), -1, *x.shape[1:])[:, :images].float().clamp(0, 1)
    run.picture("pairs", captioned(grid(rows), rows=captions), step)


@torch.no_grad()
def measure_pairs(net, positives, split, augmentation, step, device, labeled):
    """Measure the pairs by the net in evaluation mode; neither the net nor the random state of training changes.

    net: a ContrastiveNet; positives: a source like TrainSimCLR.SamePair, at `step`; split: the train split;
    augmentation: the random views. labeled: measure `label_preservation` as well.
    alignment, uniformity, embedding_std: of the pairs' projections, see `Losses.view_statistics`. cosine_real:
    similarity of two views of an image; cosine_synthetic: of a view of the image and one of its restoration, if there
    is a generator.
    """
    rows = torch.arange(0, len(split), math.ceil(len(split) / MEASURED))
    rows, images = next(iter(split.batches([rows], device)))
    rng = torch.Generator().manual_seed(0)

    def project(batch):
        return Evaluate.embed(net, augmentation(batch, rng))

    with Evaluate.frozen(net):
        # the pairs as the loss sees them
        views = positives(rows, images, step)
        measured = view_statistics(torch.stack([project(batch) for batch in views]))

        # an image against another view of it, and against a view of its restoration
        anchor = project(images)
        measured["cosine_real"] = F.cosine_similarity(anchor, project(images)).mean()
        synthetic = positives.synthetic(rows, images, step)
        if synthetic is not None:
            measured["cosine_synthetic"] = F.cosine_similarity(anchor, project(synthetic)).mean()
        measured = {name: value.item() for name, value in measured.items()}

        if labeled and synthetic is not None:
            measured |= label_preservation(net.encoder, positives, split, step, device)
    return measured


@torch.no_grad()
def label_preservation(encoder, positives, split, step, device):
    """Return how well restorations keep the label, as fractions of 1.

    A linear probe learns from real images of the train split. "label_real": its accuracy on other images of
    this split; "label_synthetic": on the restorations of those.
    """
    # a random part of the labeled images
    labeled = (split.labels >= 0).nonzero().flatten()
    order = torch.randperm(len(labeled), generator=torch.Generator().manual_seed(0))
    chosen = labeled[order[:PROBED]]

    # features of the images and of their restorations
    real = []
    synthetic = []
    rows = []
    for index, images in split.batches(chosen.split(256), device):
        rows.append(index)
        real.append(Evaluate.embed(encoder, to_float(images)))
        synthetic.append(Evaluate.embed(encoder, to_float(positives.synthetic(index, images, step))))
    real = torch.cat(real)
    synthetic = torch.cat(synthetic)
    labels = split.labels[torch.cat(rows)].to(device)

    # the probe learns from the first half and is scored on the second
    half = len(labels) // 2
    accuracies = {}
    with torch.enable_grad():
        for name, features in (("label_real", real), ("label_synthetic", synthetic)):
            accuracies[name] = Evaluate.linear_accuracy(real[:half], labels[:half], features[half:], labels[half:])
    return accuracies


def show_embedding(run, encoder, split, device, most=1000):
    """Put the features of up to `most` scored images, with labels and pictures, into TensorBoard's projector."""
    rows = torch.arange(0, len(split), math.ceil(len(split) / most))
    rows, images = next(iter(split.batches([rows], device)))
    pictures = to_float(images)
    with torch.no_grad(), Evaluate.frozen(encoder):
        features = Evaluate.embed(encoder, pictures).cpu()
    names = [shown(split.classes[label]) if label >= 0 else "?" for label in split.labels[rows].tolist()]
    run.board.add_embedding(features, names, pictures.cpu(), global_step=0, tag="features")


# ---------------------------------------------------------------------------------------------------- captions


def grid(rows):
    """Return images float (R, C, 3, H, W) as one picture, float (3, H', W'): R rows of C tiles."""
    tiles = rows.flatten(0, 1).cpu()
    return torchvision.utils.make_grid(tiles, nrow=rows.shape[1], padding=1, pad_value=1)


def captioned(picture, columns=(), rows=()):
    """Return a picture, enlarged by a whole number to at least 600 pixels, with a caption for each column and row.

    picture: float (3, H, W) in [0, 1], see `grid`. columns: texts above; rows: texts on the left; either may be
    empty. Both break between words. Returns float (3, H', W') in [0, 1].
    """
    # the picture, enlarged
    scale = math.ceil(LEAST_WIDTH / picture.shape[2])
    tiles = torchvision.transforms.functional.to_pil_image(picture)
    tiles = tiles.resize((tiles.width * scale, tiles.height * scale), Image.Resampling.NEAREST)

    # room for the captions
    font = ImageFont.load_default(FONT_SIZE)
    tile_width = tiles.width / max(1, len(columns))
    heads = [_wrapped(text, font, tile_width - 6) for text in columns]
    top = (FONT_SIZE + 5) * max(text.count("\n") + 1 for text in heads) + 8 if heads else 0
    names = [_wrapped(text, font, ROW_WIDTH) for text in rows]
    left = round(max(font.getlength(line) for text in names for line in text.split("\n"))) + 12 if rows else 0

    # all of it on white
    page = Image.new("RGB", (left + tiles.width, top + tiles.height), "white")
    page.paste(tiles, (left, top))
    draw = ImageDraw.Draw(page)
    for index, text in enumerate(heads):
        middle = left + (index + 0.5) * tile_width
        draw.multiline_text((middle, top - 5), text, "black", font, anchor="md", align="center")
    for index, text in enumerate(names):
        middle = top + (index + 0.5) * tiles.height / len(rows)
        draw.multiline_text((left - 6, middle), text, "black", font, anchor="rm", align="right")
    return torchvision.transforms.functional.to_tensor(page)


def _wrapped(text, font, width):
    """Return a text with a line break wherever the next word would not fit into the width, in pixels."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)
