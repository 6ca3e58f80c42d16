"""Modules of which some buffers follow from one that the user chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastflow.transforms import unrecorded


class Arranged(nn.Module):
    """A module with an arrangement of its features, an order say, and buffers that follow from it.

    The arrangement is a buffer, so that it travels with the state dict; what follows from it is
    made anew when another is loaded. It is also kept on the CPU, for `reset_parameters` after
    `to_empty`.
    """

    _arrangement: str  # the name of the buffer
    _arranged: Tensor  # its value, on the CPU

    def _arrange(self, name: str, value: Tensor, device: torch.device | None = None) -> None:
        """Makes the buffers, on a device; by default torch's own default."""
        self._arrangement, self._arranged = name, value
        device = torch.empty(()).device if device is None else device
        self.register_buffer(name, value.to(device))
        for key, buffer in self._derived().items():
            self.register_buffer(key, buffer.to(device), persistent=False)

    def _checked(self, value: Tensor) -> Tensor:
        """The arrangement in memory of its own on the CPU; TypeError, ValueError if it is none."""
        raise NotImplementedError

    def _derived(self) -> dict[str, Tensor]:
        """The buffers that follow from the arrangement, by name, on the CPU."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Restores the arrangement last drawn, given or loaded."""
        for key, buffer in {self._arrangement: self._arranged, **self._derived()}.items():
            getattr(self, key).copy_(buffer)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        value, errors = state_dict.get(f"{prefix}{self._arrangement}"), args[-1]
        arranged = self._arranged
        if isinstance(value, Tensor) and not value.is_meta:
            if value.shape != arranged.shape:  # PyTorch says so better
                return super()._load_from_state_dict(state_dict, prefix, *args)
            try:
                with unrecorded():
                    arranged = self._checked(value)
            except (TypeError, ValueError) as problem:
                errors.append(f"{type(self).__name__}: {problem}")  # all are raised at once
                return None
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._arranged = arranged
        device = getattr(self, self._arrangement).device
        if device.type != "meta":
            with unrecorded():
                found = {key: buffer.to(device) for key, buffer in self._derived().items()}
            for key, buffer in found.items():
                setattr(self, key, buffer)
        return None
