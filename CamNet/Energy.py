"""The energy score, a loss for generators that needs no search.

Gneiting and Raftery 2007, doi:10.1198/016214506000001437, section 4.3. For a target x and two independent samples g1,
g2 it is (d(x, g1) + d(x, g2)) / 2 - d(g1, g2) / 2: samples are pulled to the target and pushed apart. Its mean
is lowest if the samples have the distribution of the targets that share their condition. This holds for distances of
negative type, such as the Euclidean distance of patches, but not for squared ones such as LPIPS, by which a generator
learns the mean alone (Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018).
"""

import torch

from CamNet.Codes import Purpose, make_keys


def make_pairs(seed, step, rows):
    """Return int64 (2 b,): keys of the first samples of images `rows` (b,) in a step, then of their second ones."""
    keys = make_keys(seed, Purpose.PAIR, step, rows)
    return torch.cat([make_keys(keys, 0), make_keys(keys, 1)])


def loss(generator, distance, condition, target_features, codes):
    """Return the energy score, summed over the levels and averaged over the images, with gradients.

    Arguments as in `IMLE.loss`, except for codes: `Generator.codes` of `make_pairs`, two for each of the B images.
    """
    b = len(condition)
    total = 0.0
    for images, targets in zip(generator(torch.cat([condition, condition]), codes), target_features):
        features = distance.features(images)
        first = [each[:b] for each in features]
        second = [each[b:] for each in features]
        to_target = distance.between(first, targets) + distance.between(second, targets)
        total = total + (to_target - distance.between(first, second)).mean() / 2
    return total
