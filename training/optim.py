# mypy: allow-untyped-calls, no-warn-return-any
"""Muon for matrices and convolutions, Adam for everything else, in one optimizer.

Source: K. Jordan et al., Muon (2024); the scaling of the updates is that of Moonlight (2025).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MuonAdam", "orthogonalise"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz iteration that drives singular values to about one."""
_ITERATIONS = 5
_BETAS = (0.9, 0.98)
_EPS = 1e-8


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace the singular values of each of `matrices` `[n, rows, columns]` by values near one."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class MuonAdam(torch.optim.Optimizer):
    """Args: lr and adam_lr: step sizes of matrices (as a fraction of their root-mean-square scale) and of the rest.

    Parameters named in `adam_only` (embeddings, input and output layers) take Adam whatever their shape.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        adam_lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_only: Iterable[str] = (),
    ) -> None:
        prefixes = tuple(adam_only)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if self._is_matrix(p) and not name.startswith(prefixes or ("\0",))]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": lr, "base_lr": lr, "is_muon": True},
            {"params": others, "lr": adam_lr, "base_lr": adam_lr, "is_muon": False},
        ]
        defaults = {"momentum": momentum, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @staticmethod
    def _is_matrix(parameter: Tensor) -> bool:
        return parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1

    def set_base(self, lr: float, adam_lr: float) -> None:
        """Change the step sizes, as in the constructor."""
        for group in self.param_groups:
            group["base_lr"] = lr if group["is_muon"] else adam_lr

    def set_progress(self, factor: float) -> None:
        """Scale every group's step size."""
        for group in self.param_groups:
            group["lr"] = factor * group["base_lr"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            if group["is_muon"]:
                self._muon(group)
            else:
                self._adam(group)

    def _muon(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
            by_shape.setdefault((update.shape[0], update.shape[1]), []).append((parameter, update))
        for (rows, columns), members in by_shape.items():
            updates = orthogonalise(torch.stack([update for _, update in members]))
            size = (
                0.2 * max(rows, columns) ** 0.5
            )  # the update's entries then have a root mean square of about 0.2
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)

    def _adam(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] = torch.zeros(())
            state["step"] += 1
            state["first"].lerp_(parameter.grad, 1 - _BETAS[0])
            state["second"].lerp_(parameter.grad.square(), 1 - _BETAS[1])
            count = float(state["step"])
            mean = state["first"] / (1 - _BETAS[0] ** count)
            spread = (state["second"] / (1 - _BETAS[1] ** count)).sqrt() + _EPS
            parameter.addcdiv_(mean, spread, value=-group["lr"])
