"""What a run shows of itself: pictures, the projector, the time of a step."""

import time

import torch
from torchvision.utils import make_grid

import Data
import Evaluate


class Meter:
    """Time since the last logged line, and the share of it spent waiting for data."""

    def __init__(self, trainer):
        self.trainer, self.step, self.waited, self.start = trainer, trainer.step, 0.0, time.perf_counter()

    def waiting(self, batches):
        """Yield from `batches`, counting the time that each takes to come."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def read(self):
        """Return {"views_per_second", "data_wait"} and start again. data_wait: a fraction of 1."""
        seconds = time.perf_counter() - self.start
        views = (self.trainer.step - self.step) * self.trainer.args.bs * len(self.trainer.positives)
        numbers = {"views_per_second": round(views / seconds, 1), "data_wait": round(self.waited / seconds, 4)}
        self.step, self.waited, self.start = self.trainer.step, 0.0, time.perf_counter()
        return numbers


def show_pairs(run, x, num_views, images=8):
    """Write pairs.png: a row per view, a column per image: what the loss compares."""
    if not run.writes:
        return
    rows = x.view(num_views, -1, *x.shape[1:])[:, :images].flatten(0, 1).float().clamp(0, 1)
    grid = make_grid(rows.cpu(), nrow=min(images, len(rows) // num_views), padding=1, pad_value=1)
    run.picture("pairs", grid)


def show_embedding(run, encoder, split, device, most=1000):
    """Put the features of up to `most` scored images, with labels and pictures, into TensorBoard's projector."""
    rows = torch.arange(0, len(split), -(-len(split) // most))
    rows, images = next(iter(split.batches([rows], device)))  # --skip_bad can leave some out
    plain = Data.plain_views(split.size)(images, torch.Generator())
    with torch.no_grad(), Evaluate.frozen(encoder):
        features = encoder(plain.contiguous(memory_format=torch.channels_last)).float().cpu()
    names = [split.classes[label] if label >= 0 else "?" for label in split.labels[rows].tolist()]
    run.board.add_embedding(features, names, plain.cpu(), global_step=0)
