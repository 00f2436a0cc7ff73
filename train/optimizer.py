"""The optimizer's three parameter groups: biases, norm weights without decay, other weights with decay."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from parkdet.train.config import TrainSettings
from parkdet.train.schedule import StepPlan

BIASES, NORMS, WEIGHTS = range(3)


def make_optimizer(network: nn.Module, settings: TrainSettings, weight_decay: float) -> Optimizer:
    """SGD with Nesterov momentum, or AdamW, over the groups in the order BIASES, NORMS, WEIGHTS."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]] = ([], [], [])
    for module in network.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        for name, parameter in module.named_parameters(recurse=False):
            group = BIASES if name == "bias" else NORMS if is_norm else WEIGHTS
            groups[group].append(parameter)
    options = [{"params": group, "weight_decay": 0.0} for group in groups]
    options[WEIGHTS]["weight_decay"] = weight_decay
    if settings.optimizer == "AdamW":
        return AdamW(options, lr=settings.lr0, betas=(settings.momentum, 0.999))
    return SGD(options, lr=settings.lr0, momentum=settings.momentum, nesterov=settings.momentum > 0)


def apply_plan(optimizer: Optimizer, plan: StepPlan) -> None:
    """Set the rates and, for SGD, the momentum of a step."""
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = plan.bias_lr if index == BIASES else plan.lr
        if "momentum" in group:
            group["momentum"] = plan.momentum
