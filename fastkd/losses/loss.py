"""What the losses of logits have in common."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd._checks import check_choice, check_ignore_index, check_kept_temperature
from fastkd.functional.divergence import Reduction
from fastkd.ops import divergence as _ops


class Loss(nn.Module):
    """What all losses are told; wrong values are found here, not at the first batch."""

    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor, reduction: Reduction, ignore_index: int) -> None:
        super().__init__()
        temperature = check_kept_temperature(temperature)
        if isinstance(temperature, Tensor):
            self.register_buffer("temperature", temperature)  # moves with the module
        else:
            self.temperature = temperature
        check_choice("reduction", reduction, _ops.REDUCTIONS)
        self.reduction: Reduction = reduction
        self.ignore_index = check_ignore_index(ignore_index)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
