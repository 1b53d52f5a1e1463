"""Optimizers and the learning-rate schedule: SGD and Adam, each optionally with layer-wise adaptation."""

import math

import torch
from torch import nn


def parameter_groups(module, weight_decay):
    """Return two groups, by module type: weights, which decay and adapt; and biases and norm layers, which do neither.

    The type of the module decides, never its name: a norm layer in a shortcut or in the head is a norm layer too.
    """
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
    weights, others = [], []
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            plain = isinstance(layer, norms) or name.endswith("bias")
            (others if plain else weights).append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]


def build_optimizer(name, groups, lr, momentum=0.9, lars=False, trust=0.001):
    """Return the optimizer of the flags --opt, --mm, --lars and --trust over `parameter_groups`.

    name: "SGD" (Nesterov momentum) or "Adam" (momentum is its beta1). lars: adapt the rate of each layer; `trust` is
    LARS's eta for SGD, and the multiple of |w| that one step moves a layer by, per unit of lr, for Adam.
    """
    if name not in ("SGD", "Adam"):
        raise ValueError(f"--opt {name}: choose SGD or Adam")
    nesterov = momentum > 0
    if lars:
        if name == "SGD":
            return LARS(groups, lr, momentum, nesterov=nesterov, trust=trust)
        return AdamLARS(groups, lr, betas=(momentum, 0.999), trust=trust)
    if name == "SGD":
        return torch.optim.SGD(groups, lr, momentum, nesterov=nesterov, fused=True)
    return torch.optim.Adam(groups, lr, betas=(momentum, 0.999), fused=True)


def trust_ratios(weights, updates, trust):
    """Return trust * |w| / |u| per tensor, 1 where a norm is 0: scalars that stay on the device."""
    pairs = zip(torch._foreach_norm(weights), torch._foreach_norm(updates))
    return [torch.where((w > 0) & (u > 0), trust * w / u, 1.0) for w, u in pairs]


class LARS(torch.optim.Optimizer):
    """SGD with momentum under layer-wise rates (You et al. 2017, arXiv:1708.03888), as Google's SimCLR updates:

        g <- g + weight_decay * w;  r = trust * |w| / |g|, or 1 where one of them is 0 or the group does not adapt
        v <- momentum * v + lr * r * g;  w <- w - v   (nesterov: w <- w - momentum * v - lr * r * g)

    The rate is inside the momentum buffer, which matters while it changes (google-research/simclr,
    tf2/lars_optimizer.py, classic momentum). A weight that starts at 0 moves, and weight_decay = 0 still adapts.
    """

    def __init__(self, params, lr, momentum=0.9, *, nesterov=False, trust=0.001, weight_decay=0.0, adapt=True):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "trust": trust}
        super().__init__(params, defaults | {"weight_decay": weight_decay, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            for w in weights:
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            buffers = [self.state[w]["momentum_buffer"] for w in weights]
            grads = torch._foreach_add([w.grad for w in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                torch._foreach_mul_(grads, trust_ratios(weights, grads, group["trust"]))
            torch._foreach_mul_(grads, group["lr"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            if group["nesterov"]:
                torch._foreach_add_(grads, buffers, alpha=group["momentum"])
            torch._foreach_sub_(weights, grads if group["nesterov"] else buffers)


class AdamLARS(torch.optim.Adam):
    """Adam whose step in each layer is rescaled to lr * trust * |w|, as LAMB does (You et al. 2020, arXiv:1904.00962).

    Adam's direction does not depend on the gradient's scale, so LARS's own rule, to scale that, would do nothing.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), *, trust=1.0):
        super().__init__(params, lr, betas)
        self.defaults["trust"] = trust
        for group in self.param_groups:
            group["trust"] = trust

    @torch.no_grad()
    def step(self, closure=None):
        """Take Adam's step, then rescale it in the groups that adapt."""
        before = [
            [w.clone() for w in group["params"]] if group.get("adapt", True) else None for group in self.param_groups
        ]
        super().step()
        for group, old in zip(self.param_groups, before):
            if old is None or group["lr"] == 0:
                continue
            steps = torch._foreach_sub(group["params"], old)
            unit_steps = torch._foreach_div(steps, group["lr"])
            torch._foreach_mul_(steps, trust_ratios(old, unit_steps, group["trust"]))
            torch._foreach_copy_(group["params"], torch._foreach_add(old, steps))


def learning_rate(step, steps, ramp, peak):
    """Return the rate of update `step` (0 <= step < steps): a linear ramp to `peak` over `ramp` updates, then half a
    cosine that reaches 0 at the last update."""
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - 1 - ramp)))


def set_learning_rate(optimizer, lr):
    """Give every group the same rate; layer-wise adaptation multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
