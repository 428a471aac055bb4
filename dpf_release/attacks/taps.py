"""What φ2 makes of features on its way to an answer: the outputs of some of its blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MOST = 3
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU)


def taps(phi_2: nn.Module, features: Tensor) -> list[Tensor]:
    """At most three feature maps inside φ2, evenly spread in depth, of features (n, C, h, w): (n, C', h', w') each.

    They are what activations give out, in a network that has three; else whatever layers give out. None where φ2 has
    no layer with a map.
    """
    places = _places(phi_2, features[:1])
    caught: list[Tensor] = []
    _run(phi_2, features, lambda number, _, output: caught.append(output.float()) if number in places else None)
    return caught


def _places(phi_2: nn.Module, features: Tensor) -> set[int]:
    """Which outputs are taken, as numbers among all that `_run` shows."""
    found: list[tuple[int, bool]] = []
    _run(phi_2, features, lambda number, layer, _: found.append((number, isinstance(layer, _ACTIVATIONS))))
    chosen = [number for number, activation in found if activation]
    if len(chosen) < MOST:
        chosen = [number for number, _ in found]
    if not chosen:
        return set()
    spread = np.linspace(0, len(chosen), min(MOST, len(chosen)) + 1)[1:]  # the last of each third
    return {chosen[round(float(place)) - 1] for place in spread}


def _run(phi_2: nn.Module, features: Tensor, see: Callable[[int, nn.Module, Tensor], Any]) -> None:
    """Runs φ2 and shows each feature map that a layer gives out, in order.

    A training reads its next batch in a thread of its own: what φ2 does there in the meantime is none of this run's.
    """
    number, thread = 0, threading.get_ident()

    def hook(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal number
        if threading.get_ident() != thread:
            return
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            see(number, layer, output)
            number += 1

    leaves = [layer for layer in phi_2.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(hook) for layer in leaves]
    try:
        with torch.no_grad():
            phi_2(features)
    finally:
        for handle in handles:
            handle.remove()
