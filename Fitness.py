"""What a generator is worth as a source of positives, measured on images that it was not trained on."""

from dataclasses import replace

import torch
from torchvision.utils import make_grid

import Data
import Utils
from CamNet import Measures
from CamNet.Codes import make_keys

HELD_OUT = 256  # images that the generator is measured on, at most a tenth of the data
KS, DIVERSE = (1, 4, 16), 8  # samples of each of them: for the nearest of k, and for the differences between codes
SHOWN = 8  # rows, and samples in a row, of a picture
AT_ONCE = 64  # images in a forward
PURPOSE = 2  # of the random numbers drawn here: a part of their keys


class Held:
    """Images that were held out from the training, and what the generator makes of them."""

    def __init__(self, trainer, most=HELD_OUT):
        rows, images = trainer.images(trainer.held_out[:most])
        self.distance, self.corruption = trainer.distance, trainer.net.corruption
        self.keys = make_keys(trainer.args.seed, PURPOSE, rows).to(images.device)
        self.images, self.condition = images.float() / 255, self.corruption(images, self.keys)

    @torch.inference_mode()
    def samples(self, trainer, k, vary="both"):
        """Return k samples of each image, float32 (B, k, 3, S, S), by the averaged weights."""
        parts = zip(self.condition.split(AT_ONCE), self.keys.split(AT_ONCE))
        with trainer.autocast():
            return torch.cat([Measures.sample_grid(trainer.ema, *part, k, vary) for part in parts])

    @torch.inference_mode()
    def quality(self, samples, ks):
        """Return {best_of_k, diversity_*, consistency} of samples; the diversities are over the first DIVERSE."""
        total, parts = {}, (samples, self.images, self.condition, self.keys)
        for some, x, condition, keys in zip(*(each.split(AT_ONCE) for each in parts)):
            numbers = {f"best_of_{k}": value for k, value in Measures.best_of(self.distance, some, x, ks).items()}
            some = some[:, :DIVERSE]
            numbers |= Measures.diversity(some, self.distance) if some.shape[1] > 1 else {}
            numbers["consistency"] = Measures.consistency(self.corruption, some, condition, keys)
            for name, value in numbers.items():
                total[name] = total.get(name, 0.0) + value * len(x) / len(samples)
        return total

    def jittered(self, args):
        """Return two colour-jitter draws of each image, as SimCLR's recipe for the data draws them."""
        views = Data.get_ssl_data_augs(args.data, size=args.size)
        views = replace(views, crop_scale=None, flip_p=0.0, gray_p=0.0, blur_p=0.0)
        generator = torch.Generator().manual_seed(args.seed)
        return torch.stack([views(self.images, generator) for _ in range(2)], dim=1)

    def picture(self, trainer):
        """Return rows of x, c(x) and samples as one image (3, H, W)."""
        samples = self.samples(trainer, SHOWN)[:SHOWN]
        x, c = self.images[:SHOWN, None], self.corruption.upsample(self.condition[:SHOWN])[:, None]
        rows = torch.cat([x, c, samples], dim=1)
        return make_grid(rows.flatten(0, 1).cpu(), nrow=rows.shape[1], padding=1, pad_value=1)


def measure(trainer, single):
    """Return the content of generator.json; single: the Trainer of the net that learnt from one code, or None."""
    held, args = Held(trainer), trainer.args
    result = held.quality(held.samples(trainer, KS[-1]), KS)
    for vary in ("style", "noise"):  # the other one held fixed
        result[f"diversity_{vary}"] = Measures.pixel_diversity(held.samples(trainer, DIVERSE, vary))
    bicubic = held.quality(held.corruption.upsample(held.condition)[:, None], (1,))
    result |= {"bicubic": bicubic["best_of_1"], "bicubic_consistency": bicubic["consistency"]}
    jittered = held.quality(held.jittered(args), (1,))
    result |= {f"jitter_{name}": value for name, value in jittered.items() if name.startswith("diversity_")}
    if single:
        numbers = held.quality(held.samples(single, KS[-1]), KS)
        result["single_code"] = numbers.pop("best_of_1")
        result |= {f"single_code_{name}": value for name, value in numbers.items()}
    steps = {"search": trainer.period * trainer.visited, "train": trainer.step * min(args.bs, trainer.visited)}
    result |= {f"seconds_{name}_per_1000": 1000 * trainer.seconds[name] / steps[name] for name in steps}
    result |= {"peak_memory_bytes": Utils.peak_memory(trainer.device), "n_images": len(held.images)}
    return result | {"distance": args.distance, "corrupt": trainer.net.corruption.spec, "fit": not unfit(result)}


def unfit(result):
    """Return why the samples of this generator are no good as positives, or None."""
    best, bicubic, diversity = (result[name] for name in ("best_of_16", "bicubic", "diversity_pixels"))
    if not best < bicubic:  # written so that nan fails, here and below
        return f"the best of 16 samples ({best:.4f}) is no nearer to the image than bicubic upsampling ({bicubic:.4f})"
    if not diversity > 0:
        return "its samples do not differ from code to code"
    single = result.get("single_code_diversity_pixels", 0.0)
    if not diversity > single:
        return f"its samples differ by {diversity:.4f}, no more than after training on one code ({single:.4f})"
    return None


def table(result):
    """Return generator.json as text: the generator beside what it is to be compared to."""
    columns = {"generator": "", "one code (m = 1)": "single_code_", "bicubic": "bicubic_", "colour jitter": "jitter_"}
    shown = result | {"bicubic_best_of_1": result["bicubic"]}
    if "single_code" in result:
        shown["single_code_best_of_1"] = result["single_code"]
    rows = [(f"distance, best of {k}", f"best_of_{k}") for k in KS]
    rows += [(f"difference of codes: {name}", f"diversity_{name}") for name in Measures.DIVERSITIES]
    rows += [(f"  by {name} alone: pixels", f"diversity_{name}") for name in ("style", "noise")]
    rows += [("|c(g(c(x), z)) - c(x)|", "consistency")]
    lines = [f"{result['n_images']} images held out, distance: {result['distance']}, corruption: {result['corrupt']}"]
    lines += ["".join([f"{'':34}", *(f"{title:>18}" for title in columns)])]
    for title, name in rows:
        values = [shown.get(prefix + name) for prefix in columns.values()]
        lines += ["".join([f"{title:34}", *(f"{'' if value is None else f'{value:.4f}':>18}" for value in values)])]
    search, train = result["seconds_search_per_1000"], result["seconds_train_per_1000"]
    memory = f"{result['peak_memory_bytes'] / 2**30:.1f} GiB at most"
    return "\n".join([*lines, f"seconds per 1,000 images: search {search:.2f}, training {train:.2f}; memory: {memory}"])
