"""The optimizers, SGD and Adam, each optionally with layer-wise adaptation (LARS), and the learning-rate schedule."""

import math

import torch
from torch import nn


def parameter_groups(module, weight_decay):
    """Return two parameter groups: weights, with weight decay and adaptation; biases and norm layers, without both.

    Norm layers are found by the type of the module, not by its name, also in shortcuts and in the head.
    """
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
    weights = []
    others = []
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if isinstance(layer, norms) or name.endswith("bias"):
                others.append(parameter)
            else:
                weights.append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]


def build_optimizer(name, groups, lr, momentum=0.9, lars=False, trust=0.001):
    """Return the optimizer of the flags --opt, --mm, --lars and --trust, for groups as of `parameter_groups`.

    name: "SGD" (with Nesterov momentum) or "Adam" (momentum is its beta1); ValueError on others.
    lars: adapt the learning rate of each layer. trust: for SGD, LARS's eta; for Adam, one step changes a layer by
    lr * trust times its norm.
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
    """Return trust * |weight| / |update| for each pair of tensors, as scalars on the device; 1 where a norm is 0."""
    ratios = []
    for w, u in zip(torch._foreach_norm(weights), torch._foreach_norm(updates)):
        ratios.append(torch.where((w > 0) & (u > 0), trust * w / u, 1.0))
    return ratios


class LARS(torch.optim.Optimizer):
    """SGD with momentum and layer-wise learning rates (You et al. 2017, arXiv:1708.03888), as in Google's SimCLR:

        g <- g + weight_decay * w
        r  = trust * |w| / |g|, or 1 where a norm is 0 or the group does not adapt
        v <- momentum * v + lr * r * g
        w <- w - v, or with nesterov: w <- w - momentum * v - lr * r * g

    The momentum buffer includes the learning rate, which matters while the rate changes (google-research/simclr,
    tf2/lars_optimizer.py, classic momentum). Weights that start at 0 do move, and layers adapt even without weight
    decay.
    """

    def __init__(self, params, lr, momentum=0.9, *, nesterov=False, trust=0.001, weight_decay=0.0, adapt=True):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "trust": trust,
            "weight_decay": weight_decay,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            for w in weights:
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            buffers = [self.state[w]["momentum_buffer"] for w in weights]

            # lr * r * g of the equations above.
            grads = torch._foreach_add([w.grad for w in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                torch._foreach_mul_(grads, trust_ratios(weights, grads, group["trust"]))
            torch._foreach_mul_(grads, group["lr"])

            # Momentum, then the weights.
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            if group["nesterov"]:
                torch._foreach_add_(grads, buffers, alpha=group["momentum"])
            torch._foreach_sub_(weights, grads if group["nesterov"] else buffers)


class AdamLARS(torch.optim.Adam):
    """Adam whose step in each layer is rescaled to lr * trust * |w|, as LAMB does (You et al. 2020, arXiv:1904.00962).

    LARS's own rule, which rescales the gradient, would have no effect: Adam's step does not depend on its scale.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), *, trust=1.0):
        super().__init__(params, lr, betas)
        self.defaults["trust"] = trust
        for group in self.param_groups:
            group["trust"] = trust

    @torch.no_grad()
    def step(self):
        """Take Adam's step, then rescale it in the groups that adapt."""
        adapting = [group for group in self.param_groups if group.get("adapt", True)]
        before = [[w.clone() for w in group["params"]] for group in adapting]
        super().step()
        for group, old in zip(adapting, before):
            if group["lr"] == 0:
                continue
            steps = torch._foreach_sub(group["params"], old)
            unit_steps = torch._foreach_div(steps, group["lr"])
            torch._foreach_mul_(steps, trust_ratios(old, unit_steps, group["trust"]))
            torch._foreach_copy_(group["params"], torch._foreach_add(old, steps))


def learning_rate(step, steps, ramp, peak):
    """Return the learning rate of update `step`, 0 <= step < steps.

    A linear ramp to `peak` over the first `ramp` updates, then half a cosine that reaches 0 at the last update.
    """
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - 1 - ramp)))


def set_learning_rate(optimizer, lr):
    """Give every group the same learning rate; layer-wise adaptation multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
