"""What an update costs: seconds by stage, evaluations of the network, floating-point operations, memory."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Flux, FluxConfig

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16 FLOP/s, dense, published


class Meter:
    """Adds up, while an update runs, what its stages take, where the calls are made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.counts = device, Counter()

    @contextmanager
    def __call__(self, stage: str, forwards: int = 0, backwards: int = 0) -> Iterator[None]:
        """Within: a stage, in which the network is evaluated that often, and as often with a backward."""
        began = time.perf_counter()
        yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.counts[f"seconds_{stage}"] += time.perf_counter() - began
        self.counts["forwards"] += forwards + backwards
        self.counts["backwards"] += backwards


class Flops(NamedTuple):
    """Floating-point operations of the transformer, for one sample."""

    forward: int
    both: int  # of a forward and its backward


def network_flops(flux: Flux, image_tokens: int, text_tokens: int) -> Flops:
    """What torch counts in one evaluation; `flux` may be without memory (on the meta device), the count is the same."""
    weight = flux.img_in.weight
    img, *others = flux_inputs(flux.config, 1, image_tokens, text_tokens, weight.dtype, weight.device)
    with sdpa_kernel(SDPBackend.MATH):  # no other attention is counted on a CPU
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            flux(img, *others)
        with FlopCounterMode(display=False) as both, torch.enable_grad():
            v = flux(img.requires_grad_(), *others)
            v.backward(torch.zeros_like(v))
    flux.zero_grad()
    return Flops(forward.get_total_flops(), both.get_total_flops())


def flux_inputs(
    config: FluxConfig, b: int, image_tokens: int, text_tokens: int, dtype: torch.dtype, device: torch.device | str
) -> tuple:
    """Inputs of a Flux, all zero."""
    with torch.device(device):
        img = torch.zeros(b, image_tokens, config.in_channels, dtype=dtype)
        txt = torch.zeros(b, text_tokens, config.context_in_dim, dtype=dtype)
        vec = torch.zeros(b, config.vec_in_dim, dtype=dtype)
        img_ids, txt_ids = (torch.zeros(n, 3, dtype=torch.long) for n in (image_tokens, text_tokens))
        t = torch.zeros(b)
    return img, img_ids, txt, txt_ids, t, vec, t if config.guidance_embed else None


def peak_memory(device: torch.device) -> float:
    """GB: of the device since the start, or of the process on a CPU; 0 where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device is sold with, if it is a known one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for kind, flops in PEAK.items() if kind in name), None)
