"""What an update costs: seconds by stage, evaluations of the network, floating-point operations, memory."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from model import Flux

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16 FLOP/s, dense, published


class Flops(NamedTuple):
    """Floating-point operations of the transformer, for one sample."""

    forward: int
    forward_backward: int


class Meter:
    """What one rank does in an update. An evaluation is of one sample: a batch of 4 counts 4."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = Counter()  # by stage
        self.without_gradient = 0  # evaluations of the network with a forward alone
        self.with_gradient = 0  # evaluations with a forward and its backward

    @contextmanager
    def __call__(self, stage: str, forwards: int = 0, backwards: int = 0) -> Iterator[None]:
        """Time a stage with so many evaluations, `forwards` without a gradient and `backwards` with one."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(stage)  # which failures.py reads, and a traceback shows
            raise
        if self.device.type != "cpu":
            # A GPU computes while Python goes on: without this, its time would count for a stage that comes later.
            torch.accelerator.synchronize(self.device)
        self.seconds[stage] += time.perf_counter() - start
        self.without_gradient += forwards
        self.with_gradient += backwards

    def report(self, ranks: Sequence["Meter"], cost: Flops, seconds: float) -> dict[str, float]:
        """What metrics.jsonl says of an update of `seconds`, from the meters of all ranks, this rank's among them.

        `forwards` are all evaluations of all ranks, `backwards` those with a gradient; `seconds_STAGE` are means over
        the ranks; `memory` (GB), `tflops` and `mfu` are of one rank, the last two of the transformer alone.
        """
        without_gradient = sum(meter.without_gradient for meter in ranks)
        with_gradient = sum(meter.with_gradient for meter in ranks)
        entry = {"forwards": without_gradient + with_gradient, "backwards": with_gradient}
        for stage in self.seconds:
            entry[f"seconds_{stage}"] = sum(meter.seconds[stage] for meter in ranks) / len(ranks)
        # Ranks exchange their meters before the weights change, so of this stage a rank knows its own time alone.
        entry["seconds_update"] = self.seconds["update"]
        entry["seconds"] = seconds
        entry["memory"] = peak_memory(self.device)

        flops = without_gradient * cost.forward + with_gradient * cost.forward_backward
        rate = flops / len(ranks) / seconds
        entry["tflops"] = rate / 1e12
        peak = peak_flops(self.device)
        if peak:
            entry["mfu"] = rate / peak
        return entry


def network_flops(flux: Flux, image_tokens: int, text_tokens: int) -> Flops:
    """Multiplications and additions of an evaluation in linear layers and attention, as torch's FlopCounterMode counts.

    Biases, norms and activations are left out. Only shapes are read: `flux` may be on the meta device.
    """
    linear, trained, in_blocks = 0, 0, 0
    for name, p in flux.named_parameters():
        if p.ndim == 2:  # the weight of a linear layer, or a factor of a LoRA
            flops = 2 * p.numel() * vectors_of_weight(name, image_tokens, text_tokens)
            linear += flops
            trained += flops * p.requires_grad
            in_blocks += flops * ("blocks" in name)

    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    # Two products, q k^T and the weighted sum of v, of 2 l^2 c each for a sequence of l tokens and c channels.
    attention = blocks * 4 * (image_tokens + text_tokens) ** 2 * flux.config.hidden_size
    forward = linear + attention
    # A product has a gradient in each factor: in its input always, in its weight if the weight is trained. Both factors
    # of attention's products are activations.
    backward = linear + 2 * attention + trained
    if flux.recompute == "blocks":
        backward += in_blocks + attention
    return Flops(forward, forward + backward)


def vectors_of_weight(name: str, image_tokens: int, text_tokens: int) -> int:
    """The number of vectors of a sample that a weight is multiplied with, by the parameter's name."""
    if "mod" in name or name.startswith(("time_in", "guidance_in", "vector_in")):
        return 1
    if "single_blocks" in name:
        return image_tokens + text_tokens
    return text_tokens if "txt" in name else image_tokens


def peak_memory(device: torch.device) -> float:
    """GB: of the device since the start, or of the process on a CPU; 0 where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_flops(device: torch.device) -> float | None:
    """The device's published FLOP/s; None for a device that PEAK does not list."""
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
        for kind, flops in PEAK.items():
            if kind in device_name:
                return flops
    return None
