"""plan.py's counts against what real modules keep, hold and compute."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

import train
from config import PRESETS, Config
from families import flux1, flux2
from formats.weights import read_config
from infra.distributed import join, local_shard
from infra.meter import Flops, Meter, network_flops
from model import FLUX_DEV, Flux, FluxConfig
from start import empty_flux
from tests.activations import (
    backward_bytes,
    built_flux,
    built_in,
    conditions,
    decode_bytes,
    flux_vae,
    kept_bytes,
    leap_bytes,
)
from tools import plan
from tools.plan import DECODE, ENCODERS, LEAP, OFFLOADED, TEXT_TOKENS, VAE, memory, operations

SMALL = replace(
    FLUX_DEV, hidden_size=128, num_heads=4, axes_dim=(8, 12, 12), depth=2, depth_single_blocks=3, context_in_dim=96
)
TINY = read_config(Path(train.__file__).parent / "shapes" / "tiny-flux" / "transformer" / "config.json")
BF16 = torch.bfloat16
PAPER = PRESETS["flux-dev-hpsv2"][1]
CLIP = 123_060_480  # parameters of CLIP-L's text model, published
RESIDENT = ("weights", "gradients", "optimizer", "averages")


def planned_flux(config: FluxConfig = FLUX_DEV, lora: int | None = None) -> Flux:
    return empty_flux(replace(PAPER, lora=lora), config).to(BF16)


# ------------------------------------------------------------------------------------------- compute


@pytest.mark.parametrize("size, published", [(512, 21.5), (720, 37.0)])
def test_an_evaluation_of_flux_dev_costs_what_is_published(size, published):
    flux = empty_flux(PAPER, FLUX_DEV)
    assert network_flops(flux, (size // 16) ** 2, 512).forward / 1e12 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("lora, recompute", [(None, "none"), (None, "blocks"), (8, "light"), (8, "blocks")])
def test_floating_point_operations_are_those_that_torch_counts(lora, recompute):
    flux, image_tokens, text_tokens = built_flux(SMALL, lora, torch.float32), 64, 20
    flux.recompute = recompute
    img = torch.zeros(1, image_tokens, SMALL.in_channels)
    inputs = conditions(SMALL, 1, image_tokens, text_tokens, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):  # no other attention is counted on a CPU
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            flux(img, *inputs)
        with FlopCounterMode(display=False) as forward_backward:
            v = flux(img.requires_grad_(), *inputs)
            v.backward(torch.zeros_like(v))
    cost = network_flops(flux, image_tokens, text_tokens)
    assert cost.forward == forward.get_total_flops()
    # The plan counts a gradient in every input, also in text and time, which need none.
    assert cost.forward_backward == pytest.approx(forward_backward.get_total_flops(), rel=0.01)


def test_a_report_sums_evaluations_over_the_ranks_and_averages_their_seconds(monkeypatch):
    meter, neighbour = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    for rank in (meter, neighbour):
        with rank("rollout", forwards=3):
            pass
        with rank("leaps", forwards=1, backwards=2):
            pass
    meter.seconds |= {"rollout": 2.0, "update": 5.0}
    neighbour.seconds |= {"rollout": 4.0, "update": 1.0}
    monkeypatch.setattr("infra.meter.peak_flops", lambda device: 2e12)
    entry = meter.report([meter, neighbour], Flops(forward=10**12, forward_backward=3 * 10**12), seconds=10.0)
    assert (entry["forwards"], entry["backwards"]) == (2 * (4 + 2), 2 * 2)
    assert entry["seconds_rollout"] == 3.0
    assert entry["seconds_update"] == 5.0  # this rank's own: the others' came before the update
    assert entry["tflops"] == pytest.approx((4 + 2 * 3) / 10)  # a rank's
    assert entry["mfu"] == pytest.approx(entry["tflops"] / 2)
    assert entry["memory"] > 0 and entry["seconds"] == 10.0


def test_operations_are_those_of_the_evaluations_that_a_method_makes_on_average():
    flux = planned_flux(SMALL)
    flux.recompute = "blocks"
    tokens = 45**2
    cost = network_flops(flux, tokens, TEXT_TOKENS)

    def count(**changes) -> float:
        return operations(replace(PAPER, batch=8, **changes), PAPER, flux)

    assert count(updates=3) == 8 * (25 * cost.forward + 2 * cost.forward_backward)
    assert count(updates=3, leaps=3) == 8 * (25 * cost.forward + 3 * cost.forward_backward)
    assert count(updates=1, method="mix_grpo") == 8 * (25 * cost.forward + 4 * cost.forward_backward)
    # ReFL stops at a random one of 11 steps.
    forwards = (count(updates=200, method="refl") / 8 - cost.forward_backward) / cost.forward
    assert 14 < forwards < 25 and abs(forwards - round(forwards)) > 1e-3
    with pytest.raises(ValueError, match="--method nonsense"):
        count(method="nonsense")
    with pytest.raises(ValueError, match="--alpha means nothing with --method refl"):
        count(method="refl", alpha=0.5)


# ---------------------------------------------------------------------------------------- activations


def test_kept_memory_is_counted_once_and_without_parameters():
    w, x = torch.nn.Parameter(torch.ones(50, 50)), torch.ones(10, 50, requires_grad=True)
    two_results_of_exp = 2 * 10 * 50 * 4
    assert kept_bytes(lambda: (x @ w).exp().sum() + (x + x).exp().sum()) == two_results_of_exp


@pytest.mark.parametrize("recompute", ["none", "light", "blocks"])
def test_activations_counted_without_memory_are_those_that_a_real_leap_keeps(recompute):
    with FakeTensorMode():
        fake = Flux(SMALL)
        fake.recompute = recompute
        counted = leap_bytes(fake, 2, 64, 20)
    flux = Flux(SMALL)
    flux.recompute = recompute
    assert counted == leap_bytes(flux, 2, 64, 20)
    assert counted > 2 * 64 * 128 * 4 * 5  # at least a tensor a block


@pytest.mark.parametrize("size, b, recompute", [(512, 2, "none"), (512, 1, "light"), (720, 1, "blocks")])
def test_a_leap_and_a_decode_keep_the_bytes_of_the_plan(recompute, size, b):
    tokens = (size // 16) ** 2
    with FakeTensorMode():
        flux = built_flux(FLUX_DEV, None, BF16)
        flux.recompute = recompute
        leap = leap_bytes(flux, b, tokens, TEXT_TOKENS)
        decode = decode_bytes(flux_vae(), b, size // 8, size // 8, recompute == "blocks")
    assert b * (tokens + TEXT_TOKENS) * LEAP[flux1][recompute] == pytest.approx(leap, rel=0.01)
    assert b * size**2 * DECODE[recompute] == pytest.approx(decode, rel=0.001)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_a_bf16_vae_takes_half_of_the_bytes(recompute):
    with FakeTensorMode(), built_in(BF16):
        decode = decode_bytes(flux_vae(), 1, 64, 64, recompute == "blocks")
    sizes = memory(replace(PAPER, size=("512",), micro_batch=1, recompute=recompute, vae_bf16=True), 8, planned_flux())
    assert sizes["decode"] == pytest.approx(decode, rel=0.001) and sizes["VAE"] == VAE[flux1] / 2


@pytest.mark.parametrize("recompute", ["none", "light", "blocks"])
def test_a_leap_of_klein_keeps_the_bytes_of_the_plan(recompute):
    tokens, config = 32**2, flux2.DEFAULT
    img_ids, txt_ids = flux2.position_ids(32, 32, TEXT_TOKENS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        klein = built_flux(config, None, BF16)
        klein.recompute = recompute
        img = torch.zeros(1, tokens, config.in_channels, dtype=BF16, requires_grad=True)
        txt, time = torch.zeros(1, TEXT_TOKENS, config.context_in_dim, dtype=BF16), torch.zeros(1)
        blocks = [*klein.double_blocks, *klein.single_blocks] if recompute != "none" else []
        leap = backward_bytes(lambda: klein(img, img_ids, txt, txt_ids, time), blocks)
    assert (tokens + TEXT_TOKENS) * LEAP[flux2][recompute] == pytest.approx(leap, rel=0.01)


def test_the_second_branch_of_guidance_is_counted():
    config = replace(PRESETS["flux2-klein-4b"][1], updates=3, batch=8)
    klein = empty_flux(config, flux2.DEFAULT)

    def count(**changes) -> float:
        return operations(replace(config, **changes), config, klein)

    klein.recompute = "blocks"
    cost = network_flops(klein, 32**2, TEXT_TOKENS)
    assert cost.forward / 1e12 == pytest.approx(10.2, rel=0.01)  # published
    assert count() == 8 * (2 * 25 * cost.forward + 2 * cost.forward_backward)
    assert count(detach_negative=False) == 8 * (2 * 25 * cost.forward + 4 * cost.forward_backward)
    assert count(guidance=1.0) == 8 * (25 * cost.forward + 2 * cost.forward_backward)


# --------------------------------------------------------------------------------------------- weights


def test_published_networks_have_the_sizes_of_the_plan():
    with torch.device("meta"):
        config = T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        t5 = T5EncoderModel(config)
        vae = flux_vae()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in t5.encoder.block]
    assert 2 * sum(layers[1:]) == OFFLOADED[flux1]
    assert 2 * (sum(p.numel() for p in t5.parameters()) + CLIP) == ENCODERS[flux1]
    assert 4 * sum(p.numel() for p in vae.parameters()) == VAE[flux1]

    with torch.device("meta"):
        qwen = Qwen3Model(
            Qwen3Config(
                vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=27,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128,
            )
        )  # fmt: skip
        vae = AutoencoderKLFlux2()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in qwen.layers]
    assert 2 * sum(layers[1:]) == OFFLOADED[flux2]
    assert 2 * (sum(layers) + qwen.embed_tokens.weight.numel()) == ENCODERS[flux2]  # without the norm at the end
    assert 4 * sum(p.numel() for p in vae.parameters()) == VAE[flux2]


def test_bytes_held_by_a_run_are_those_of_the_plan():
    flags = dict(batch=2, rollout_steps=3, rollout_batch=2, micro_batch=1)
    cfg = Config(out=Path("nonexistent"), size=("64",), **flags)
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        state = train.make_state(cfg, setup.pipe.flux)
        train.one_update(cfg, setup, state, process, 0)
        train.accumulate_batch_gradient(cfg, setup, process, 1, Meter(process.device))
        tensors = [*state.params.values(), *state.averages.values()]
        tensors += [p.grad for p in state.params.values()]
        for moments in state.optimizers[0].state.values():
            tensors += [moments["exp_avg"], moments["exp_avg_sq"]]
        held_bytes = sum(local_shard(t).nbytes for t in tensors)
    sizes = memory(cfg, 1, empty_flux(cfg, TINY))
    assert held_bytes == sum(sizes[name] for name in RESIDENT)


def test_every_row_of_a_plan_is_counted_in_bytes_a_weight():
    """With weights in fp32: 4 for themselves, 4 for gradients, 8 for moments, 4 for averages; all else by its shape."""
    cfg = replace(PAPER, size=("32", "64"), rollout_steps=3, rollout_batch=2, watch=("judge",), recompute="none")
    flux, lora = planned_flux(SMALL), planned_flux(SMALL, 4)
    sizes = memory(cfg, 2, flux)
    n = sum(p.numel() for p in flux.parameters())
    assert [sizes[name] for name in RESIDENT] == [2 * n, 2 * n, 4 * n, 2 * n]
    assert sizes["states"] == (3 + 1 + 3) * 2 * 16 * 64 * 4  # states and velocities of two rollouts, fp32
    assert sizes["rewards"] == 986_109_441 * 4  # of ViT-H-14, published
    largest_block = sum(p.numel() for p in flux.double_blocks[0].parameters())
    assert sizes["leap"] == (16 + TEXT_TOKENS) * LEAP[flux1]["none"] + 2 * 2 * largest_block
    assert sizes["a checkpoint on disk"] == 16 * n and sizes["best/ or final/ on disk"] == 2 * n
    assert sizes["in the host's memory"] == (16 * n + 4 * n) / 2

    lean = memory(replace(cfg, lean=True), 1, flux)
    moments = 8 * (1 / 4 + 1 / 256)
    assert [lean[name] for name in RESIDENT] == [2 * n, 2 * n, moments * n, 0]
    assert lean["a checkpoint on disk"] == pytest.approx((2 + moments + 4) * n)
    assert lean["in the host's memory"] == pytest.approx((2 + moments + 4 + 2 + 4) * n)

    fp8 = memory(replace(cfg, fp8=True, lora=4), 1, lora)
    largest_linear = max(p.numel() for p in flux.parameters() if p.ndim == 2)
    leap = (16 + TEXT_TOKENS) * LEAP[flux1]["none"]
    assert fp8["leap"] == leap + largest_linear * (4 + 2)  # up-cast by way of fp32
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert fp8["best/ or final/ on disk"] == 4 * trained


def test_a_sharded_network_costs_a_share_and_a_lora_little():
    flux, lora = planned_flux(), planned_flux(lora=64)
    one, eight = (memory(PAPER, gpus, flux) for gpus in (1, 8))
    for name in RESIDENT:
        assert eight[name] == one[name] / 8
    assert one["weights"] == 11_901_408_320 * 4  # the published count
    assert memory(replace(PAPER, lora=64), 1, lora)["peak"] < 80e9 < one["peak"]


# ------------------------------------------------------------------------------------------- the command


def rows_of_command(words: str, monkeypatch, capsys) -> tuple[str, dict[str, list[float]]]:
    """What the command prints, and the numbers of its table."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *words.split()])
    plan.main()
    text = capsys.readouterr().out
    rows = {}
    for line in text.splitlines()[4:]:
        _, name, *cells, _ = line.split("|")
        rows[name.strip()] = [float(cell.replace(",", "")) for cell in cells]
    return text, rows


@pytest.mark.parametrize(
    "words, peak",
    [
        ("--gpus 8", 55),
        ("flux-dev-pickscore --gpus 8", 55),
        ("flux-dev-hpsv3 --gpus 8", 68),
        ("flux-dev-hpsv2 --lean --gpus 1", 97),
        ("flux-dev-lora --gpus 1", 54),
        ("flux2-klein-4b --gpus 1", 96),
        ("flux2-klein-4b --gpus 8", 28),
        ("flux2-klein-4b-lora --gpus 1", 22),
        ("--gpus 1 --batch 16 --lora 64 --offload-encoders", 46),
        ("flux-dev-lora --gpus 1 --lora 16 --offload-encoders --size 512 --fp8 --watch", 22),
    ],
)
def test_peaks_are_those_of_the_readmes_table(words, peak, monkeypatch, capsys):
    assert round(rows_of_command(words, monkeypatch, capsys)[1]["peak, GB"][0]) == peak


def test_hours_are_operations_over_the_assumed_rate_which_is_printed(monkeypatch, capsys):
    text, rows = rows_of_command("flux-dev-hpsv2 --gpus 1 8 --tflops 78 --updates 10", monkeypatch, capsys)
    assert "a GPU attains 78 TFLOP/s (--tflops" in text
    flux = planned_flux()
    flux.recompute = "blocks"
    cost = network_flops(flux, 45**2, TEXT_TOKENS)
    seconds = 64 * (25 * cost.forward + 2 * cost.forward_backward) / 78e12
    assert rows["seconds of an update"] == [pytest.approx(seconds / gpus, abs=0.051) for gpus in (1, 8)]
    assert rows["hours of the run"] == [pytest.approx(10 * seconds / 3600 / gpus, abs=0.051) for gpus in (1, 8)]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--gpus 6", "--gpus 6: --batch 64 must be a multiple"),
        ("--gpus 2 --lean", "--gpus 2: --batch 64 must be a multiple, and --lean"),
        ("--size 9*9", "--size 9"),
        ("--method nonsense", "--method nonsense"),
        ("--gpus 0", "--gpus 0 is out of range"),
        ("--tflops 0", "--tflops 0.0 is out of range"),
        ("--updates 0", "--updates 0 is out of range"),
        ("--last 99", "--last 99: a rollout has 25 steps"),
        ("--model shapes/tiny-flux --gpus", "give --gpus a number"),
    ],
)
def test_a_flag_that_cannot_be_is_named(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", *words.split()])
    with pytest.raises(SystemExit, match=message.replace("*", ".")):
        plan.main()
