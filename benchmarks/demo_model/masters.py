"""FP32 master weights for training in BF16."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class Masters:
    """FP32 master weights of a BF16 model, and their optimisers.

    Matrices inside the layers are trained by Muon, everything else by AdamW.

    Args:
        groups: Modules and the peak learning rate of each.
        decay: Weight decay of matrices; vectors have none.
        steps: Steps in all.
    """

    def __init__(self, groups: Sequence[tuple[nn.Module, float]], decay: float, steps: int) -> None:
        self._working: list[nn.Parameter] = []
        self._masters: list[torch.Tensor] = []
        hidden: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for module, rate in groups:
            for name, parameter in module.named_parameters():
                master = parameter.detach().float().clone()
                self._working.append(parameter)
                self._masters.append(master)
                inside = parameter.ndim == 2 and "layers." in name
                group = {"params": [master], "lr": rate, "weight_decay": 0.0}
                if parameter.ndim > 1:
                    group["weight_decay"] = decay
                (hidden if inside else others).append(group)
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True)
        ]
        if hidden:
            muon = torch.optim.Muon(
                [group["params"][0] for group in hidden], adjust_lr_fn="match_rms_adamw"
            )
            self._optimisers.append(muon)
            rates = {id(group["params"][0]): group for group in hidden}
            muon.param_groups[:] = [
                {**muon.param_groups[0], **rates[id(parameter)], "params": [parameter]}
                for parameter in muon.param_groups[0]["params"]
            ]
        warm = max(1, min(200, steps // 10))
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimiser,
                lambda step: (
                    min(1.0, (step + 1) / warm)
                    * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))))
                ),
            )
            for optimiser in self._optimisers
        ]

    def step(self) -> None:
        """One step along the gradients, whose norm is limited to 1."""
        for parameter, master in zip(self._working, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        for optimiser, schedule in zip(self._optimisers, self._schedules, strict=True):
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            for parameter, master in zip(self._working, self._masters, strict=True):
                parameter.copy_(master)

    def restore(self) -> None:
        """Give the modules their master weights in FP32."""
        for parameter, master in zip(self._working, self._masters, strict=True):
            parameter.data = master.detach().clone()
