"""Pre-train an encoder with ISICLE: positives are what a generator makes of a corrupted image, each time another one.

    python TrainISICLE.py                                   # generator, bank, encoder, scores: minutes on two cores
    python TrainISICLE.py --pair gen_gen --p_gen 1          # the pair is two restorations, and nothing else
    python TrainISICLE.py --data PATH --bank positives.npy  # positives of your own
    tensorboard --logdir Models

Finds the newest generator that TrainCamNet.py made for the data, or trains one; fills the bank, K restorations of every
image; then trains by TrainSimCLR.py's loop, from which it differs in nothing but the source of positives below.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import Data
import Flags
import TrainSimCLR
import Utils
from Banks import Banks, corruption_for
from CamNet.Bank import Bank, fingerprint_array, read, to_uint8
from CamNet.Codes import make_keys, uniforms
from CamNet.Corruptions import Corruption
from Losses import multi_positive, nt_xent

REAL = {"real_gen": 1, "real_real_gen": 2}  # views that are the image itself
RESTORED = {"gen_gen": 2, "real_gen": 1, "real_real_gen": 1, "gen_twice": 1, "corrupted": 1}  # different ones
TWICE = ("gen_twice", "corrupted")
PICK, SHARE, MASK = range(3)  # what random numbers are for: a part of their keys


def get_args(argv=None):
    """Parse the flags; see Flags.py for what they are."""
    return Flags.parse(argv, lambda data: Flags.isicle_parser(__doc__, data))


class Restored:
    """The source of positives: restorations from the bank, drawn anew in every step, beside the image where asked for.

    What is drawn follows from seed, step and image: neither a resumed run nor one on several processes differs.
    """

    def __init__(self, args, banks):
        """banks: epoch -> Bank; None: nothing is restored."""
        self.args, self.banks, self.bank, self.real = args, banks, None, REAL.get(args.pair, 0)
        self.restored = args.num_pos if args.pair == "multi" else RESTORED[args.pair]
        self.synthetic_share, self.fingerprint = 0.0, ""  # of the last views; of what is restored

    def __len__(self):
        return self.real + self.restored + (self.args.pair in TWICE)

    def start_epoch(self, epoch):
        """Take the bank of an epoch; see TrainSimCLR.SamePair."""
        self.bank = self.banks(epoch) if self.banks else None

    def share(self, trainer):
        """Return the probability of a restoration, where the pair has one, at the trainer's step."""
        warm = self.args.gen_warmup * trainer.steps_per_epoch
        return self.args.p_gen * min(1.0, (trainer.step + 1) / warm if warm else 1.0)

    def __call__(self, indices, images, trainer):
        """Return M batches uint8 (b, 3, H, W), the real ones first; see TrainSimCLR.SamePair."""
        share = self.share(trainer)
        if share == 0:
            return [images] * len(self)
        restored, drawn = self.restorations(indices, images, trainer), [None] * self.restored
        if share < 1:
            keys = make_keys(self.args.seed, trainer.step, indices.cpu(), SHARE)
            drawn = (uniforms(keys, self.restored) < share).unbind(dim=1)
            restored = [_replace(images, view, mine) for view, mine in zip(restored, drawn)]
        views = [images] * self.real + list(restored)
        if self.args.pair in TWICE:
            views, drawn = views * 2, drawn * 2
        shares = [1.0 if mine is None else mine.float().mean().item() for mine in drawn]  # on the host, as the keys are
        self.synthetic_share = sum(shares) / len(views)
        return views

    def restorations(self, indices, images, trainer):
        """Return the different restorations of a step, each uint8 (b, 3, H, W) on the images' device."""
        bank = self.bank
        if self.args.pick == "farthest":
            columns = farthest(bank, indices, self.restored, images if self.real else None, trainer)
        else:
            keys = make_keys(self.args.seed, trainer.step, indices.cpu(), PICK)
            columns = uniforms(keys, bank.k).argsort(dim=1)[:, : self.restored]
        return bank.take(indices, columns).to(images.device).unbind(dim=1)

    def synthetic(self, indices, images, trainer):
        """Return the first restoration of each image, to be measured; see TrainSimCLR.SamePair."""
        if self.bank is None:
            return None
        first = torch.zeros(len(indices), 1, dtype=torch.int64)
        return self.bank.take(indices, first)[:, 0].to(images.device)

    def numbers(self):
        """Return the share of synthetic images among the last views, to be logged."""
        return {"synthetic_share": self.synthetic_share}

    def loss(self, z, args):
        """Return the loss of projections z (M, N, D)."""
        if args.loss in ("lout", "lin"):
            return multi_positive(z, args.temp, form=args.loss.removeprefix("l"))
        total = nt_xent(z[0], z[1], args.temp)
        for further in z[2:]:
            if args.loss == "align":  # CLSP (Zeng et al. 2024, arXiv:2408.16965): it is no negative to anything
                term = (2 - 2 * F.cosine_similarity(z[0], further, dim=1)).mean()
            else:
                term = nt_xent(z[0], further, args.temp)
            total = total + args.gen_weight * term / (len(z) - 2)
        return total


class Corrupted(Restored):
    """A control: the views are c(x), enlarged to the image's size; what the corruption does without a generator."""

    def __init__(self, args, corruption):
        super().__init__(args, None)
        self.corruption, self.synthetic_share = corruption, 1.0

    def __call__(self, indices, images, trainer):
        """Return c(x), uint8 (b, 3, H, W), twice; see TrainSimCLR.SamePair."""
        return [self.synthetic(indices, images, trainer)] * 2

    def synthetic(self, indices, images, trainer):
        """Return c(x), uint8 (b, 3, H, W)."""
        keys = make_keys(self.args.seed, trainer.step, indices, MASK).to(images.device)
        return to_uint8(self.corruption.upsample(self.corruption(images, keys)))


def _replace(images, view, drawn):
    """Return the view where it is drawn (b,), the image elsewhere."""
    return torch.where(drawn.to(images.device, non_blocking=True)[:, None, None, None], view, images)


@torch.no_grad()
def farthest(bank, indices, count, images, trainer):
    """Return columns (b, count) of the bank: one after the other the least like those before, to the encoder.

    The first is the least like the image (b, 3, H, W), or, without one, like the mean of all restorations.
    """
    rows = torch.arange(bank.k).expand(len(indices), -1)
    batch = bank.take(indices, rows).flatten(0, 1)
    batch = torch.cat([batch, images]) if images is not None else batch
    encoder, mode = trainer.net.encoder, trainer.net.training
    encoder.eval()
    plain = Data.plain_views(batch.shape[-1])(batch, torch.Generator())
    features = F.normalize(encoder(plain.contiguous(memory_format=torch.channels_last)).float(), dim=1)
    encoder.train(mode)
    restored = features[: len(indices) * bank.k].view(len(indices), bank.k, -1)  # (b, K, F)
    seen = restored.mean(dim=1) if images is None else features[len(indices) * bank.k :]
    likeness = torch.einsum("bkf,bf->bk", restored, seen)
    columns = []
    for _ in range(count):
        column = likeness.argmin(dim=1, keepdim=True)  # (b, 1)
        columns.append(column)
        picked = restored.gather(1, column[:, :, None].expand(-1, -1, restored.shape[2]))[:, 0]
        own = torch.einsum("bkf,bf->bk", restored, picked)
        likeness = own if images is None and len(columns) == 1 else torch.maximum(likeness, own)
        likeness = likeness.scatter(1, torch.cat(columns, dim=1), 2.0)  # above every cosine: never twice
    return torch.cat(columns, dim=1)


def make_positives(args, splits, device):
    """Return the source of positives of a run's flags. Raises UserError on flags that do not go together."""
    try:
        return _make_positives(args, splits.train, device)
    except ValueError as error:
        raise Utils.UserError(str(error)) from error


def _make_positives(args, split, device):
    source = Restored(args, None)
    if args.loss == "align" and len(source) == 2:
        raise ValueError(f"--loss align: --pair {args.pair} has two views: use real_real_gen, or multi")
    if args.p_gen == 0:
        return source
    beside = [name for name in ("generator", "corrupt", "refresh") if args.bank and getattr(args, name)]
    if beside:
        raise ValueError(
            f"--bank {args.bank}: --{beside[0]} is for banks that a generator makes: leave one of them out"
        )
    if args.pair == "corrupted":
        return Corrupted(args, Corruption(corruption_for(args), split.size))
    images = read(args.bank, len(split), split.size) if args.bank else None
    if (k := images.shape[1] if args.bank else args.num_codes) < source.restored:
        flag = f"--bank {args.bank}: it holds" if args.bank else "--num_codes:"
        raise ValueError(
            f"{flag} {k} restorations of an image, and --pair {args.pair} takes {source.restored}: use "
            f"{source.restored} or more, or --pair real_gen"
        )
    if args.bank:
        bank = Bank(images, device, Utils.is_held(args.bank_storage, images.nbytes, device))
        source.banks, source.fingerprint = (lambda epoch: bank), fingerprint_array(images)
    else:
        source.banks = Banks(args, split, device)
        source.fingerprint = source.banks.fingerprint
    return source


def main(args):
    """Find or train the generator, fill the bank, train, save, score; return the exit code."""
    return TrainSimCLR.main(args, make_positives, script=Path(__file__).stem)


if __name__ == "__main__":
    Utils.run_script(main, get_args)
