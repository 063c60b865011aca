"""What an update costs: seconds by stage, evaluations of the network, floating-point operations, memory."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from model import Flux

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


def _report(self, counts, cost, seconds):
    n = len(counts)
    forwards, backwards = (sum(c[k] for c in counts) for k in ("forwards", "backwards"))
    entry = dict(forwards=forwards, backwards=backwards)
    for name in counts[0]:
        if name.startswith("seconds"):
            entry[name] = sum(c[name] for c in counts) / n
    entry["seconds_update"] = self.counts["seconds_update"]
    entry["seconds"] = seconds
    entry["memory"] = peak_memory(self.device)
    flops = (forwards - backwards) * cost.forward + backwards * cost.both
    entry["tflops"] = flops / seconds / n / 1e12
    return entry


Meter.report = _report


class Flops(NamedTuple):
    """Floating-point operations of the transformer, for one sample."""

    forward: int
    both: int  # of a forward and its backward


def network_flops(flux: Flux, image_tokens: int, text_tokens: int) -> Flops:
    """What an evaluation multiplies and adds in linear layers and attention: what torch's own counter counts, too.

    A backward multiplies as often for the gradients in the inputs, which attention has two of, and once more for the
    weights that are trained; with `flux.recompute` the blocks run again.  Only shapes are read: `flux` may be without
    memory (on the meta device).
    """

    def tokens(name: str) -> int:
        """How many vectors a sample has that a weight is multiplied with."""
        if "mod" in name or name.startswith(("time_in", "guidance_in", "vector_in")):
            return 1
        both = image_tokens + text_tokens
        return both if "single_blocks" in name else text_tokens if "txt" in name else image_tokens

    # Rows by columns, a multiplication and an addition each: linear layers, LoRA's too, but no biases nor norms.
    linear = {name: 2 * tokens(name) * p.numel() for name, p in flux.named_parameters() if p.ndim == 2}
    trained = sum(linear[name] for name, p in flux.named_parameters() if p.ndim == 2 and p.requires_grad)
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    attention = blocks * 4 * (image_tokens + text_tokens) ** 2 * flux.config.hidden_size
    forward = sum(linear.values()) + attention
    again = attention + sum(count for name, count in linear.items() if "blocks" in name) if flux.recompute else 0
    return Flops(forward, 2 * forward + attention + trained + again)


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
