"""Measures of a generator: samples should be near to the real image, differ between codes, and agree with c(x).

All are measured on images that the generator was not trained on.
"""

import torch
from tqdm import tqdm

from CamNet.Codes import Purpose, make_keys

KS = (1, 4, 16)  # samples of an image, of which the nearest is measured
DIVERSE = 8  # samples of an image, whose differences are measured
SHOWN = 8  # rows, and samples in a row, of a picture
AT_ONCE = 64  # images in a forward pass
DIVERSITIES = ("pixels", "histogram", "distance")
BINS = 16  # of a color histogram, per channel
# (distance of two samples) / (distance of a sample and the image). It is 1 if samples have the distribution of the
# image given c(x). Below this, codes are of no use. Measured: generators 0.95 to 0.99, the same nets after training on
# one code 0.40 to 0.46 (Results/camnet-*.json).
LEAST_SHARE = 0.7


# ---------------------------------------------------------------------------------------------------- measures


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


def best_of(distance, samples, targets, ks=KS):
    """Return {k: mean over images of the least distance among the first k samples}.

    samples: (B, K, 3, S, S) and targets (B, 3, S, S) in [0, 1]; ks up to K.
    """
    wanted = distance.features(targets)
    d = torch.stack([distance.between(distance.features(each), wanted) for each in samples.unbind(dim=1)], dim=1)
    return {k: d[:, :k].min(dim=1).values.mean().item() for k in ks}


def _pairwise(columns, difference):
    """Return the mean of difference(a, b) -> (B,) over all pairs of columns; a column holds one sample per image."""
    pairs = [(a, b) for i, a in enumerate(columns) for b in columns[:i]]
    return torch.stack([difference(a, b) for a, b in pairs]).mean().item()


def pixel_diversity(samples):
    """Return the mean absolute difference of pixels, in [0, 1], over all pairs of the samples (B, K, 3, S, S)."""
    return _pairwise(samples.unbind(dim=1), lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))


def perceptual_diversity(samples, distance):
    """Return the mean `distance` over all pairs of the samples (B, K, 3, S, S)."""
    return _pairwise([distance.features(each) for each in samples.unbind(dim=1)], distance.between)


def histogram_diversity(samples):
    """Return the mean distance of color histograms over all pairs of the samples (B, K, 3, S, S), in [0, 1].

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


# ---------------------------------------------------------------------------------------------------- held-out images


class HeldOut:
    """Images that were held out from the training, and what a generator makes of them."""

    def __init__(self, rows, images, corruption, distance, seed, autocast):
        """rows: int64 (B,), their places in the data; images: theirs, uint8 (B, 3, S, S) on the device.

        corruption: a Corruption; distance: see CamNet.Distances; seed: of codes and masks; autocast: makes the context
        of the run's precision.
        """
        self.keys = make_keys(seed, Purpose.MEASURE, rows).to(images.device)
        self.images = images.float() / 255
        self.corruption = corruption
        self.condition = corruption(images, self.keys)
        self.distance = distance
        self.autocast = autocast

    @torch.inference_mode()
    def samples(self, generator, k, vary="both"):
        """Return k samples of each image, float32 (B, k, 3, S, S); vary: see `sample_grid`."""
        parts = []
        with self.autocast():
            generator = generator.frozen()
            batches = list(zip(self.condition.split(AT_ONCE), self.keys.split(AT_ONCE)))
            for condition, keys in tqdm(batches, "measuring", leave=False, disable=None):
                parts.append(sample_grid(generator, condition, keys, k, vary))
        return torch.cat(parts)

    @torch.inference_mode()
    def quality(self, samples, ks):
        """Return {best_of_k, diversity_*, consistency} of samples; the diversities are over the first DIVERSE."""
        total = {}
        for rows in torch.arange(len(samples), device=samples.device).split(AT_ONCE):
            some, x, condition, keys = (each[rows] for each in (samples, self.images, self.condition, self.keys))
            values = {f"best_of_{k}": value for k, value in best_of(self.distance, some, x, ks).items()}
            some = some[:, :DIVERSE]
            if some.shape[1] > 1:
                values |= diversity(some, self.distance)
            values["consistency"] = consistency(self.corruption, some, condition, keys)
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value * len(x) / len(samples)
        return total

    def shown(self, generator):
        """Return x, c(x) and samples of a few images, float32 (b, 2 + SHOWN, 3, S, S) in [0, 1]."""
        samples = self.samples(generator, SHOWN)[:SHOWN]
        x = self.images[:SHOWN, None]
        c = self.corruption.upsample(self.condition[:SHOWN])[:, None]
        return torch.cat([x, c, samples], dim=1)

    def measure(self, generator, single, jittered):
        """Return the measures of the generator, and of what it is compared with.

        single: the net that was trained on one code, or None. jittered: two draws of color jitter of each image,
        float (B, 2, 3, S, S) in [0, 1].
        """
        result = self.quality(self.samples(generator, KS[-1]), KS)
        for vary in ("style", "noise"):  # the other one is held fixed
            result[f"diversity_{vary}"] = pixel_diversity(self.samples(generator, DIVERSE, vary))

        # bicubic interpolation
        bicubic = self.quality(self.corruption.upsample(self.condition)[:, None], (1,))
        result["bicubic"] = bicubic["best_of_1"]
        result["bicubic_consistency"] = bicubic["consistency"]

        # color jitter
        for name, value in self.quality(jittered, (1,)).items():
            if name.startswith("diversity_"):
                result[f"jitter_{name}"] = value

        # the same net, trained on one code
        if single is not None:
            values = self.quality(self.samples(single, KS[-1]), KS)
            result["single_code"] = values.pop("best_of_1")
            result |= {f"single_code_{name}": value for name, value in values.items()}
        return result | {"n_images": len(self.images)}


# what `unfit`, `warning` and `fitness_table` read
READ = ("best_of_1", "best_of_16", "bicubic", "diversity_pixels", "diversity_distance", "n_images")
READ += ("distance", "corrupt")
READ += ("seconds_search_per_1000", "seconds_train_per_1000", "peak_memory_bytes")


def unfit(result):
    """Return why the samples of this generator are not fit as positives, or None. result: see `HeldOut.measure`."""
    best = result["best_of_16"]
    bicubic = result["bicubic"]
    diversity = result["diversity_pixels"]
    if not best < bicubic:  # also where one of them is nan, here and below
        return f"the best of 16 samples ({best:.4f}) is no nearer to the image than bicubic upsampling ({bicubic:.4f})"
    if not diversity > 0:
        return "its samples do not differ from code to code"

    # samples of a net that was trained on one code differ, too, but in useless ways
    if "single_code_diversity_pixels" in result:
        single = result["single_code_diversity_pixels"]
        if not diversity > single:
            return f"its samples differ by {diversity:.4f}, no more than after training on one code ({single:.4f})"
        return None
    share = result["diversity_distance"] / result["best_of_1"]
    if not share > LEAST_SHARE:
        return f"samples differ by {share:.0%} of their distance to the image: less than {LEAST_SHARE:.0%}"
    return None


def warning(result):
    """Return a line that warns of a generator that is not fit for positives, with the remedy, or None."""
    reason = unfit(result)
    if reason is None:
        return None
    remedy = "train it for more --periods or, with --objective cimle, search more --candidates"
    return f"warning: this generator is not fit for positives: {reason}: {remedy}"


def fitness_table(result):
    """Return generator.json as text: the generator next to what it is compared with."""
    columns = {"generator": "", "one code (m = 1)": "single_code_", "bicubic": "bicubic_", "color jitter": "jitter_"}
    shown = dict(result)
    shown["bicubic_best_of_1"] = result["bicubic"]
    if "single_code" in result:
        shown["single_code_best_of_1"] = result["single_code"]
    rows = {f"best_of_{k}": f"distance, best of {k}" for k in KS}
    rows |= {f"diversity_{name}": f"difference of codes: {name}" for name in DIVERSITIES}
    rows |= {f"diversity_{name}": f"  by {name} alone: pixels" for name in ("style", "noise")}
    rows |= {"consistency": "|c(g(c(x), z)) - c(x)|"}
    if not any("single_code_" + name in shown for name in rows):
        del columns["one code (m = 1)"]  # no such net was trained

    lines = [f"{result['n_images']} images held out, distance: {result['distance']}, corruption: {result['corrupt']}"]
    lines.append(" " * 34 + "".join(f"{title:>18}" for title in columns))
    for name, title in rows.items():
        line = f"{title:34}"
        for prefix in columns.values():
            value = shown.get(prefix + name)
            line += f"{'' if value is None else f'{value:.4f}':>18}"
        lines.append(line)
    search = result["seconds_search_per_1000"]
    train = result["seconds_train_per_1000"]
    memory = result["peak_memory_bytes"] / 2**30
    seconds = f"seconds per 1,000 images: search {search:.2f}, training {train:.2f}"
    lines.append(f"{seconds}; memory: {memory:.1f} GiB at most")
    lines.append("Best of 16: lower is better. Best of 1 is higher where the codes differ, as they should.")
    return "\n".join(lines)
