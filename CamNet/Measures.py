"""What a generator is worth as a source of positives: near to the real image, different between codes, true to c(x)."""

import torch

from CamNet.Codes import make_keys

DIVERSITIES = ("pixels", "histogram", "distance")
BINS = 16  # of a colour histogram, per channel


def sample_grid(generator, condition, keys, k, vary="both"):
    """Return k restorations (B, k, 3, S, S) of each c(x); keys: int64 (B,).

    vary: what differs between the k codes of an image: "both", "style" or "noise".
    """
    draws = make_keys(keys[:, None], torch.arange(k, device=keys.device))  # (B, k)
    first = draws[:, :1].expand_as(draws)
    columns = []
    for j in range(k):
        z_codes = generator.codes((first if vary == "noise" else draws)[:, j])
        noise_codes = generator.codes((first if vary == "style" else draws)[:, j])
        codes = [(z, noise) for (z, _), (_, noise) in zip(z_codes, noise_codes)]
        columns.append(generator(condition, codes)[-1])
    return torch.stack(columns, dim=1)


def best_of(distance, samples, targets, ks=(1, 4, 16)):
    """Return {k: mean over images of the least distance among the first k samples}.

    samples: (B, K, 3, S, S) and targets (B, 3, S, S) in [0, 1]; ks up to K.
    """
    wanted = distance.features(targets)
    d = torch.stack([distance.between(distance.features(each), wanted) for each in samples.unbind(dim=1)], dim=1)
    return {k: d[:, :k].min(dim=1).values.mean().item() for k in ks}


def _pairwise(columns, difference):
    """Return the mean of difference(a, b) -> (B,) over all pairs of columns, of which each holds a sample per image."""
    pairs = [(a, b) for i, a in enumerate(columns) for b in columns[:i]]
    return torch.stack([difference(a, b) for a, b in pairs]).mean().item()


def pixel_diversity(samples):
    """Return the mean absolute difference of pixels, in [0, 1], over all pairs of the samples (B, K, 3, S, S)."""
    return _pairwise(samples.unbind(dim=1), lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))


def perceptual_diversity(samples, distance):
    """Return the mean `distance` over all pairs of the samples (B, K, 3, S, S)."""
    return _pairwise([distance.features(each) for each in samples.unbind(dim=1)], distance.between)


def histogram_diversity(samples):
    """Return the mean distance of colour histograms over all pairs of the samples (B, K, 3, S, S), in [0, 1].

    The earth mover's distance of each channel's histogram (mean difference of the cumulative shares), their mean.
    """
    cumulative = torch.stack(
        [(samples <= edge / BINS).float().mean(dim=(3, 4)) for edge in range(1, BINS)], dim=-1
    )  # (B, K, 3, bins)
    return _pairwise(cumulative.unbind(dim=1), lambda a, b: (a - b).abs().mean(dim=(1, 2)))


def diversity(samples, distance):
    """Return {"diversity_NAME"} for each of DIVERSITIES, of samples (B, K, 3, S, S) in [0, 1]."""
    values = (pixel_diversity(samples), histogram_diversity(samples), perceptual_diversity(samples, distance))
    return {f"diversity_{name}": value for name, value in zip(DIVERSITIES, values)}


def consistency(corruption, samples, condition, keys=None):
    """Return the mean of |c(g(c(x), z)) - c(x)| over the samples (B, K, 3, S, S), in [0, 1]; keys: of the masks."""
    errors = [(corruption(each, keys) - condition).abs().mean() for each in samples.unbind(dim=1)]
    return torch.stack(errors).mean().item()
