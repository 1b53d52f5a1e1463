"""Conditional implicit maximum likelihood estimation, cIMLE (Li et al. 2020, arXiv:2004.03590).

For every target, several codes are tried; the one whose output is nearest to the target is kept, and training moves
that output closer to the target. Every target has a nearest output, so no target can be ignored.

The search goes from coarse to fine (Peng et al. 2022, arXiv:2211.14286): a level's code is chosen by comparing the
output of that level with the target at the same resolution, and is fixed before the next level is searched. The cost
is the sum of the levels' candidates; the number of combinations is their product.
"""

import warnings
from typing import NamedTuple

import torch

from CamNet.Codes import make_keys
from CamNet.Generator import State

NONE = -1  # in place of a key: no code has been chosen yet
HUGE = torch.finfo(torch.float32).max / 2  # rejected candidates have ranks in (HUGE / 2, HUGE], above any distance


class Found(NamedTuple):
    """keys: int64 (B, L), the chosen code of every level, for `Generator.codes`. distances: float32 (B, L)."""

    keys: torch.Tensor
    distances: torch.Tensor


class _Images(NamedTuple):
    """What the search of one level is given for B images; B is the first dimension of every tensor."""

    condition: torch.Tensor  # c(x) (B, C, r, r)
    seen: tuple  # this level's pair of `Generator.conditions`
    state: State  # after the previous level
    targets: list  # the features of the targets at this level
    candidates: torch.Tensor  # int64 keys (B, m)


class _Best(NamedTuple):
    """The best candidate of each image on one level: the one of lowest rank."""

    rank: torch.Tensor  # float32 (B,)
    key: torch.Tensor  # int64 (B,)
    distance: torch.Tensor  # float32 (B,)
    state: State  # after this level


class OutOfMemoryWarning(UserWarning):
    """Memory ran out in the search, which goes on with smaller chunks."""


class Search:
    """Finds codes whose outputs are close to given images.

    counts: number of candidates per level, coarse to fine; further levels use the last number.
    chunk: maximum number of candidates in one forward pass. It bounds the memory, and changes the result by rounding
    only. When memory runs out it is halved, for all later calls too.
    reject: candidates closer to the target than this are not chosen unless all of them are (RS-IMLE, Vashist et al.
    2024, arXiv:2409.17439): the codes used in training then resemble codes that are drawn without a search.
    """

    def __init__(self, counts, chunk=1024, reject=0.0):
        self.counts = tuple(counts)
        self.chunk = chunk
        self.reject = reject

    def count(self, level):
        """Return the number of candidates of a level."""
        return self.counts[min(level, len(self.counts) - 1)]

    @torch.inference_mode()
    def __call__(self, generator, distance, condition, target_features, keys, previous=None):
        """Return the `Found` codes of B images. The caller decides the precision, by autocast.

        condition: c(x) (B, C, r, r).
        target_features: for every level the `distance.features` of its targets.
        keys: int64 (B,), seeds of the candidates.
        previous: int64 (B, L), codes of an earlier search, or None. An image keeps them if their summed distance is not
        larger than that of the codes found now. -1 where an image has none.
        """

        def candidates(level):
            return make_keys(keys[:, None], level, torch.arange(self.count(level), device=keys.device))  # (B, m)

        def earlier(level):
            return previous[:, level, None]  # (B, 1)

        ranks, found = self._all_levels(generator, distance, condition, target_features, candidates)
        if previous is None:
            return found

        # What the earlier codes are worth now: a search with a single candidate per level.
        old_ranks, old = self._all_levels(generator, distance, condition, target_features, earlier)

        # Compare the means over the levels, divided first: two ranks of rejected candidates can add up to infinity.
        levels = ranks.shape[1]
        not_worse = (old_ranks / levels).sum(dim=1) <= (ranks / levels).sum(dim=1)
        kept = not_worse & (previous[:, 0] != NONE)
        return _map(lambda before, now: torch.where(kept[:, None], before, now), old, found)

    def _all_levels(self, generator, distance, condition, target_features, candidates):
        """Search level after level; return (ranks (B, L), Found). candidates(level): their keys (B, m)."""
        seen = generator.conditions(condition)
        state = State()
        ranks = []
        keys = []
        distances = []
        for level, targets in enumerate(target_features):
            images = _Images(condition, seen[level], state, targets, candidates(level))
            best = self._level(generator, distance, level, images)
            ranks.append(best.rank)
            keys.append(best.key)
            distances.append(best.distance)
            state = best.state
        return torch.stack(ranks, dim=1), Found(torch.stack(keys, dim=1), torch.stack(distances, dim=1))

    def _level(self, generator, distance, level, images):
        """Return the `_Best` of one level, computed in chunks."""
        n_images, n_candidates = images.candidates.shape
        done = 0  # images
        results = []
        while done < n_images:
            # As many whole images as fit into a chunk, or one image whose candidates are split.
            rows = slice(done, done + max(1, self.chunk // n_candidates))
            some = _take(images, rows)
            best = None
            try:
                for part in some.candidates.split(self.chunk, dim=1):
                    found = self._nearest(generator, distance, level, some._replace(candidates=part))
                    best = found if best is None else _lower(best, found)
            except RuntimeError as error:  # includes torch.OutOfMemoryError; the CPU raises a plain RuntimeError
                if self.chunk == 1 or not _is_out_of_memory(error):
                    raise
                self.chunk = max(1, min(self.chunk, images.candidates.numel()) // 2)
                note = f"out of memory in the search: continuing with --chunk {self.chunk}"
                warnings.warn(note, OutOfMemoryWarning, stacklevel=2)
                continue
            results.append(best)
            done = rows.stop
        if len(results) == 1:
            return results[0]
        return _map(lambda *parts: torch.cat(parts), *results)

    def _nearest(self, generator, distance, level, images):
        """Return the `_Best` of one chunk: all candidates in one forward pass."""
        # Repeat every image, once per candidate, and run the level.
        n_images, m = images.candidates.shape
        condition = _repeat(images.condition, m)
        seen = _repeat(images.seen, m)
        state = _repeat(images.state, m)
        code = generator.draw(images.candidates.flatten(), level)
        image, after = generator.step(level, condition, seen, state, code)
        d = distance.between(distance.features(image), images.targets).view(n_images, m)

        # The rank is the distance, but candidates that are too near come last, the nearest of them at the very end.
        too_near = d < self.reject
        nearness = 1 - d / (self.reject or 1) / 2  # of those: 1 at distance 0, 1/2 at `reject`
        ranks = torch.where(too_near, HUGE * nearness, d)

        # Keep the candidate of lowest rank.
        rank, index = ranks.min(dim=1)
        rows = torch.arange(n_images, device=d.device)
        return _Best(rank, images.candidates[rows, index], d[rows, index], _take(after, rows * m + index))


def _map(function, *nests):
    """Apply a function to the corresponding tensors of tuples, lists and named tuples of one structure; keep None."""
    first = nests[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return function(*nests)
    values = [_map(function, *parts) for parts in zip(*nests, strict=True)]
    return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)


def _take(nest, rows):
    """Return these rows, a slice or indices, of every tensor."""
    return _map(lambda x: x[rows], nest)


def _repeat(nest, m):
    """Return every tensor with each of its rows m times in succession."""
    return _map(lambda x: x.repeat_interleave(m, 0), nest)


def _lower(one, other):
    """Return, image by image, the `_Best` of lower rank; the first where both are equal."""
    better = other.rank < one.rank
    return _map(lambda a, b: torch.where(better.view(-1, *[1] * (a.ndim - 1)), b, a), one, other)


def _is_out_of_memory(error):
    # of the CPU; of a kernel that is loaded late; of cuBLAS and cuDNN
    parts = ("allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in parts)


def loss(generator, distance, condition, target_features, codes):
    """Return the distance to the targets, summed over the levels and averaged over the images, with gradients.

    Arguments as in `Search`, except for codes: `Generator.codes` of the keys that the search found.
    """
    images = generator(condition, codes)
    return sum(distance.between(distance.features(x), y).mean() for x, y in zip(images, target_features))
