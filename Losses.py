"""Contrastive losses: tensors in, a scalar out. The logarithms of sums are taken in float32 or better."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SIMILARITIES = 2**22  # similarities in memory at a time: 16 MiB in float32


def nt_xent(z1, z2, temperature=0.5):
    """Return SimCLR's loss (Chen et al. 2020, arXiv:2002.05709, eq. 1), the mean over all 2N anchors.

    z1, z2: (N, D), projections of two views of the same N images, not yet normalized. The positive of a view is
    the other view of its image; the 2N - 2 views of other images are its negatives. temperature: > 0.
    Equal embeddings everywhere (collapse) give log(2N - 1).
    """
    return multi_positive(torch.stack([z1, z2]), temperature)


def multi_positive(z, temperature=0.5, form="out"):
    """Return NT-Xent for M views of each image, the mean over all M N anchors.

    z: (M, N, D), M >= 2 projections of the same N images, not yet normalized. An anchor has M - 1 positives.
    form: where the mean over an anchor's positives is taken (Khosla et al. 2020, arXiv:2004.11362):
        "out"  outside the logarithm, eq. 2: SupCon's and StableRep's loss;
        "in"   inside it, as a sum: -log(sum of positives / sum of all others).
    Both are `nt_xent` when M = 2. If there are more than SIMILARITIES similarities, the loss is computed for some
    anchors at a time, and again in the backward pass (activation checkpointing), which saves memory.
    Raises ValueError on another form or fewer than two views.
    """
    if form not in ("out", "in"):
        raise ValueError(f"form {form!r}: choose 'out' or 'in'")
    if z.ndim != 3 or len(z) < 2:
        raise ValueError(f"z has shape {tuple(z.shape)}: expected (M, N, D) with M >= 2 views")
    n = z.shape[1]
    with torch.autocast(z.device.type, enabled=False):  # it would round the similarities to 8 bits
        z = z.flatten(0, 1).to(torch.promote_types(z.dtype, torch.float32))
        z = F.normalize(z, dim=1)  # (MN, D), on the unit sphere
        at_once = max(1, SIMILARITIES // len(z))
        if at_once >= len(z):
            return _losses_of(z, z, 0, n, temperature, form).mean()

        # part after part
        losses_of = partial(checkpoint, _losses_of, use_reentrant=False, preserve_rng_state=False)
        starts = range(0, len(z), at_once)
        losses = [losses_of(part, z, start, n, temperature, form) for start, part in zip(starts, z.split(at_once))]
        return torch.cat(losses).mean()


def _losses_of(anchors, z, start, n, temperature, form):
    """Return the losses of `multi_positive` (A,) of A anchors, the rows of z (MN, D) from `start` on.

    z: normalized; n: the number of images.
    """
    rows = torch.arange(start, start + len(anchors), device=z.device)
    s = anchors @ z.T / temperature  # (A, MN), cosine similarities over temperature
    s = s.scatter(1, rows[:, None], float("-inf"))  # a view is neither its own positive nor its own negative
    log_all = s.logsumexp(dim=1)  # over the MN - 1 others

    # the views of the anchor's image: (A, M), the anchor among them
    views = torch.arange(len(z) // n, device=z.device)
    positives = s.gather(1, (rows % n)[:, None] + n * views)
    if form == "in":
        return log_all - positives.logsumexp(dim=1)
    positives = positives.masked_fill((rows // n)[:, None] == views, 0.0)
    return log_all - positives.sum(dim=1) / (len(views) - 1)


def squared_distance(z1, z2):
    """Return the mean squared distance, 0 to 4, of the normalized projections z1, z2 (N, D) of the same images."""
    return (2 - 2 * F.cosine_similarity(z1, z2, dim=1)).mean()


def _first_pair_and(term, z, temperature, weight):
    """NT-Xent of the first two views, plus weight times the mean of term(first view, each further view)."""
    total = nt_xent(z[0], z[1], temperature)
    for further in z[2:]:
        total = total + weight * term(z[0], further) / (len(z) - 2)
    return total


def _lout(z, temperature, weight):
    return multi_positive(z, temperature, "out")


def _lin(z, temperature, weight):
    return multi_positive(z, temperature, "in")


def _ntxent(z, temperature, weight):
    return _first_pair_and(lambda z1, z2: nt_xent(z1, z2, temperature), z, temperature, weight)


def _align(z, temperature, weight):
    return _first_pair_and(squared_distance, z, temperature, weight)


class Form(NamedTuple):
    """A way to compare the views of an image, and how --help describes it."""

    function: Callable  # (z (M, N, D), temperature, weight) -> scalar
    what: str


FORMS = {  # --loss NAME
    "lout": Form(_lout, "SupCon over all views"),
    "lin": Form(_lin, "the same with the sum over positives inside the logarithm"),
    "ntxent": Form(_ntxent, "NT-Xent of the first two views, plus --gen_weight x its mean over first and further view"),
    "align": Form(_align, "as ntxent, but further views are only pulled toward the first (CLSP, arXiv:2408.16965)"),
}


def contrastive(z, temperature=0.5, form="lout", weight=1.0):
    """Return the loss of M views of N images: a scalar, float32 or better.

    z: (M, N, D), M >= 2 projections of the same N images, not yet normalized. temperature: > 0. form: a key of FORMS;
    with two views all of them are `nt_xent`. weight: >= 0, of the views after the second, with "ntxent" and "align".
    Raises ValueError on another form.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r}: choose {', '.join(FORMS)}")
    return FORMS[form].function(z, temperature, weight)


@torch.no_grad()
def view_statistics(z):
    """Return what an embedding looks like, as a dictionary of scalar tensors: no gradient, no wait for the device.

    z: (M, N, D) projections as for `multi_positive`, N >= 2. On the unit sphere (Wang & Isola 2020, arXiv:2005.10242):
        embedding_std  mean over dimensions of the standard deviation over images, times sqrt(D): 1 when spread
                       evenly over the sphere, 0 when all embeddings are equal (collapse)
        alignment      mean squared distance between the first two views of an image, 0 (equal) to 4
        uniformity     log of the mean Gaussian potential exp(-2 d^2) between images, 0 (collapse) to about -4
    The first and the last are those of the first view.
    """
    z = F.normalize(z.float(), dim=2)
    n, d = z.shape[1:]
    square = 2 - 2 * z[0] @ z[0].T  # (N, N) squared distances
    square.fill_diagonal_(float("inf"))
    pairs = n * (n - 1)
    return {
        "embedding_std": z[0].std(dim=0, correction=0).mean() * d**0.5,
        "alignment": (z[0] - z[1]).square().sum(dim=1).mean(),
        "uniformity": torch.logsumexp(-2 * square.flatten(), 0) - math.log(pairs),
    }
