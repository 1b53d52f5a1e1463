"""What a run shows of itself: the time of a step, the pairs and what they are worth, the projector."""

import time

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

import Data
import Evaluate
from Losses import view_statistics

LOOKED_AT = 512  # images whose pairs are measured
PROBED = 4000  # images that show how well the label is preserved: half to learn from, half to score


class Meter:
    """Where the time of the steps since the last logged line went. On CUDA by events: no step waits for the device."""

    STAGES = ("data", "views", "forward", "loss", "backward")  # backward: the optimizer's step included

    def __init__(self, trainer):
        self.trainer = trainer
        self.start()

    def start(self):
        """Begin anew."""
        self.step, self.marks = self.trainer.step, [(None, self._now())]

    def lap(self, stage):
        """Note that a stage has just ended."""
        self.marks.append((stage, self._now()))

    def _now(self):
        if self.trainer.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.trainer.device))
        return event

    def _between(self, one, other):
        return other - one if isinstance(one, float) else one.elapsed_time(other) / 1000

    def read(self):
        """Return {"views_per_second", and "data_wait" and "time_STAGE", shares of 1}; waits for the device."""
        if self.trainer.device.type == "cuda":
            self.marks[-1][1].synchronize()
        seconds = dict.fromkeys(self.STAGES, 0.0)
        for (_, before), (stage, after) in zip(self.marks, self.marks[1:]):
            seconds[stage] += self._between(before, after)
        total = sum(seconds.values())
        views = (self.trainer.step - self.step) * self.trainer.args.bs * len(self.trainer.positives)
        shares = {f"time_{stage}": round(value / total, 4) for stage, value in seconds.items()}
        return {"views_per_second": round(views / total, 1), "data_wait": shares.pop("time_data"), **shares}


def show_pairs(run, x, num_views, step=0, images=8):
    """Write pairs.png: a row per view, a column per image: what the loss compares."""
    if not run.writes:
        return
    rows = x.view(num_views, -1, *x.shape[1:])[:, :images].flatten(0, 1).float().clamp(0, 1)
    grid = make_grid(rows.cpu(), nrow=min(images, len(rows) // num_views), padding=1, pad_value=1)
    run.picture("pairs", grid, step)


@torch.no_grad()
def measure_pairs(trainer, labelled):
    """Return what the pairs are worth, by the net in evaluation mode; neither it nor training's random state changes.

    alignment, uniformity, embedding_std: of the pairs' projections, see `Losses.view_statistics`. cosine_real: of an
    augmented image to another view of itself; cosine_synthetic: to a view of what the generator made of it, if there is
    a generator. labelled: measure `label_preservation` as well.
    """
    split, views, device = trainer.train_split, trainer.views, trainer.device
    rows = torch.arange(0, len(split), -(-len(split) // LOOKED_AT))
    rows, images = next(iter(split.batches([rows], device)))
    generator = torch.Generator().manual_seed(0)

    def project(batch):
        return trainer.net(views(batch, generator).contiguous(memory_format=torch.channels_last)).float()

    with Evaluate.frozen(trainer.net):
        batches = trainer.positives(rows, images, trainer)
        numbers = view_statistics(torch.stack([project(batch) for batch in batches]))
        anchor = project(images)
        numbers["cosine_real"] = F.cosine_similarity(anchor, project(images)).mean()
        if (synthetic := trainer.positives.synthetic(rows, images, trainer)) is not None:
            numbers["cosine_synthetic"] = F.cosine_similarity(anchor, project(synthetic)).mean()
        numbers = {name: value.item() for name, value in numbers.items()}
        if labelled and synthetic is not None:
            numbers |= label_preservation(trainer)
    return numbers


@torch.no_grad()
def label_preservation(trainer):
    """Return whether the generator leaves the label as it is: a linear probe, learnt from real images of the train
    split, scored on other ones of it ("label_real") and on what was made of those ("label_synthetic"), fractions of 1.
    """
    split, device = trainer.train_split, trainer.device
    labelled = (split.labels >= 0).nonzero().flatten()
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
    rows, images = zip(*split.batches(labelled[order[:PROBED]].split(256), device))  # --skip_bad can leave some out
    plain, real, synthetic = Data.plain_views(split.size), [], []
    for index, batch in zip(rows, images):
        for kind, x in ((real, batch), (synthetic, trainer.positives.synthetic(index, batch, trainer))):
            x = plain(x, torch.Generator()).contiguous(memory_format=torch.channels_last)
            kind.append(trainer.net.encoder(x).float())
    real, synthetic, labels = torch.cat(real), torch.cat(synthetic), split.labels[torch.cat(rows)].to(device)
    half = len(labels) // 2
    with torch.enable_grad():
        return {
            f"label_{name}": Evaluate.linear_accuracy(real[:half], labels[:half], x[half:], labels[half:])
            for name, x in (("real", real), ("synthetic", synthetic))
        }


def show_embedding(run, encoder, split, device, most=1000):
    """Put the features of up to `most` scored images, with labels and pictures, into TensorBoard's projector."""
    rows = torch.arange(0, len(split), -(-len(split) // most))
    rows, images = next(iter(split.batches([rows], device)))  # --skip_bad can leave some out
    plain = Data.plain_views(split.size)(images, torch.Generator())
    with torch.no_grad(), Evaluate.frozen(encoder):
        features = encoder(plain.contiguous(memory_format=torch.channels_last)).float().cpu()
    names = [split.classes[label] if label >= 0 else "?" for label in split.labels[rows].tolist()]
    run.board.add_embedding(features, names, plain.cpu(), global_step=0)
