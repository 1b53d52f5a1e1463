"""Conditional implicit maximum likelihood, cIMLE (Li et al. 2020, arXiv:2004.03590): every target takes the nearest of
m samples as its own, and training draws that one nearer; so no target can be dropped.

The search goes from coarse to fine (Peng et al. 2022, arXiv:2211.14286): a level's code is judged by that level's own
output, beside the target reduced to its side, and kept before the next level is looked at. It costs the sum of the
counts, and reaches their product.
"""

import warnings
from typing import NamedTuple

import torch

from CamNet.Codes import make_keys
from CamNet.Generator import State

NONE = -1  # in the place of a key: no code has been chosen yet


class Found(NamedTuple):
    """keys: int64 (B, L), the chosen code of every level, for `Generator.draw`. distances: float32 (B, L)."""

    keys: torch.Tensor
    distances: torch.Tensor


def codes_of(generator, keys):
    """Return the codes [(z, noise)] of keys (B, L), coarse to fine."""
    return [generator.draw(column, level) for level, column in enumerate(keys.unbind(dim=1))]


class Search:
    """Finds the codes of images. counts: candidates of each level, coarse to fine; the last is repeated.

    chunk: candidates in one forward, which bounds the memory and changes nothing else but rounding; it halves itself,
    for good, when memory runs out. reject: candidates nearer to the target than this are passed over (RS-IMLE, Vashist
    et al. 2024, arXiv:2409.17439): the codes that training sees then resemble those drawn later, without any search.
    """

    def __init__(self, counts, chunk=1024, reject=0.0):
        self.counts, self.chunk, self.reject = tuple(counts), chunk, reject

    def count(self, level):
        """Return the candidates of a level."""
        return self.counts[min(level, len(self.counts) - 1)]

    @torch.inference_mode()
    def __call__(self, generator, distance, condition, wanted, keys, previous=None):
        """Return the `Found` of B images.

        condition: c(x) (B, C, r, r); wanted: for every level the `distance.features` of its targets; keys: int64 (B,),
        of which alone the candidates are made; previous: keys (B, L) that are kept where all levels' distances together
        are no more than those of the codes found now (-1: an image has none), or None. Precision is the caller's, by
        autocast.
        """

        def candidates(level):
            return make_keys(keys[:, None], level, torch.arange(self.count(level), device=keys.device))  # (B, m)

        ranks, *found = self._chain(generator, distance, condition, wanted, candidates)
        if previous is not None:
            before, *old = self._chain(generator, distance, condition, wanted, lambda level: previous[:, level, None])
            levels = ranks.shape[1]  # the ranks of the rejected are so large that the sum of several is infinite
            kept = ((before / levels).sum(dim=1) <= (ranks / levels).sum(dim=1)) & (previous[:, 0] != NONE)
            found = [torch.where(kept[:, None], *each) for each in zip(old, found)]
        return Found(*found)

    def _chain(self, generator, distance, condition, wanted, candidates):
        """Return (ranks, keys, distances), each (B, L), of the best of candidates(level) (B, m), level after level."""
        seen, state, results = generator.conditions(condition), State(), []
        for level, features in enumerate(wanted):
            place = (generator, distance, level, condition, seen[level], state)
            *best, state = self._level(*place, candidates(level), features)
            results.append(best)
        return [torch.stack(each, dim=1) for each in zip(*results)]

    def _level(self, generator, distance, level, condition, seen, state, candidates, features):
        """Return (rank, key, distance, state after this level) of the best candidate of each image, by chunks."""
        everything, done, results = [condition, seen, state, candidates, features], 0, []
        while done < len(candidates):
            rows = slice(done, done + max(1, self.chunk // candidates.shape[1]))
            condition, seen, state, some, features = (_rows(each, rows) for each in everything)
            try:
                best = None
                for part in some.split(self.chunk, dim=1):
                    found = self._nearest(generator, distance, level, condition, seen, state, part, features)
                    best = found if best is None else _nearer(best, found)
            except RuntimeError as error:  # torch's OutOfMemoryError is one, and the CPU's allocator raises it plainly
                if self.chunk == 1 or not _out_of_memory(error):
                    raise
                self.chunk = max(1, min(self.chunk, candidates.numel()) // 2)
                warnings.warn(f"out of memory in the search: going on with --chunk {self.chunk}", stacklevel=5)
                continue
            results.append(best)
            done = rows.stop
        return _join(results)

    def _nearest(self, generator, distance, level, condition, seen, state, candidates, features):
        """Return (rank, key, distance, state after this level) of the best candidate (b, k) of each image."""
        b, k = candidates.shape
        code = generator.draw(candidates.flatten(), level)
        seen = [None if each is None else each.repeat_interleave(k, 0) for each in seen]
        image, after = generator.step(level, condition.repeat_interleave(k, 0), seen, state.repeat(k), code)
        d = distance.between(distance.features(image), features).view(b, k)
        # the rejected come last, the farthest of them first
        rank = torch.where(d < self.reject, torch.finfo(d.dtype).max / 2 * (1 - d / (self.reject or 1) / 2), d)
        lowest, index = rank.min(dim=1)
        rows = torch.arange(b, device=d.device)
        return lowest, candidates[rows, index], d[rows, index], _rows(after, rows * k + index)


def _rows(each, rows):
    """Return these rows of a tensor, or of each part of a tuple or list; None stays."""
    if isinstance(each, torch.Tensor):
        return each[rows]
    if isinstance(each, State):
        return State(*(_rows(part, rows) for part in each))
    return each if each is None else type(each)(_rows(part, rows) for part in each)


def _zip(function, *parts):
    """Return function(tensors) of equally built nests of tensors, in the same nest."""
    if isinstance(parts[0], torch.Tensor):
        return function(*parts)
    values = [_zip(function, *each) for each in zip(*parts)]
    return State(*values) if isinstance(parts[0], State) else tuple(values)


def _nearer(one, other):
    """Return, image by image, the result of lower rank; the first where both are equal."""
    better = other[0] < one[0]
    return _zip(lambda a, b: torch.where(better.view(-1, *[1] * (a.ndim - 1)), b, a), one, other)


def _join(results):
    """Return the results of several chunks as one."""
    return _zip(lambda *parts: torch.cat(parts), *results) if len(results) > 1 else results[0]


def _out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def loss(generator, distance, condition, wanted, keys):
    """Return the distance to the targets, summed over the levels and averaged over the images, with gradients.

    Arguments as of `Search`, but keys (B, L): those that it found.
    """
    images = generator(condition, codes_of(generator, keys))
    return sum(distance.between(distance.features(x), y).mean() for x, y in zip(images, wanted))
