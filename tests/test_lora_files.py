"""LoRA files of other trainers: what they add is what diffusers adds, and what is not understood is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import Tensor

import evaluate
from config import Config
from formats.folders import load_pipeline
from formats.lora import add_lora, first_values, lora_layers
from formats.lora_files import layer_rows, merge_lora, read_lora
from formats.names import to_diffusers
from formats.saving import save_pipeline
from infra.distributed import join
from model import Flux
from sample import Text, velocity_of
from start import check_model

TINY = Path(__file__).parent.parent / "shapes" / "tiny-flux"
RANK, ALPHA = 4, 16.0
FLUX = load_pipeline(TINY).flux
SHAPES = {name: (count, width) for name, (_, _, count, width) in layer_rows(FLUX.config).items()}
THEIRS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "single_transformer_blocks.3.proj_mlp",
          "single_transformer_blocks.0.proj_out")  # fmt: skip
FUSED = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_mlp.0",
    "single_blocks.0.linear2",
)
OUTER = (
    "single_transformer_blocks.1.norm.linear",
    "transformer_blocks.0.norm1_context.linear",
    "proj_out",
    "x_embedder",
)


def drawn(layers: tuple[str, ...], prefix: str, down: str, up: str, underscores: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {}
    for layer in layers:
        flat = layer.replace(".", "_")
        (count, width), name = SHAPES[flat], prefix + (flat if underscores else layer)
        state |= {
            f"{name}.{down}.weight": torch.randn(RANK, width) / 8,
            f"{name}.{up}.weight": torch.randn(count, RANK) / 8,
        }
    return state


def with_alpha(state: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    return state | {f"{k.removesuffix(end)}.alpha": torch.tensor(ALPHA) for k in state if k.endswith(end)}


def metadata() -> dict[str, str]:
    """As diffusers' training scripts write it."""
    settings = dict(r=RANK, lora_alpha=ALPHA, target_modules=list(THEIRS), peft_type="LORA")
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}


CASES = {
    "diffusers": lambda: (drawn(THEIRS, "transformer.", "lora_A", "lora_B"), None),
    "diffusers with metadata": lambda: (drawn(THEIRS, "transformer.", "lora_A", "lora_B"), metadata()),
    "ai-toolkit": lambda: (drawn(THEIRS + OUTER, "transformer.", "lora_A", "lora_B"), None),
    "kohya": lambda: (with_alpha(drawn(FUSED, "lora_unet_", "lora_down", "lora_up", True), ".lora_down.weight"), None),
    "x-flux": lambda: (
        drawn(("double_blocks.0.processor.qkv_lora1", "double_blocks.0.processor.proj_lora2"), "", "down", "up"), None
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> FluxPipeline:
    return FluxPipeline.from_pretrained(TINY)


@pytest.mark.parametrize("case", CASES)
def test_a_file_adds_what_diffusers_adds(case, theirs, tmp_path):
    state, notes = CASES[case]()
    save_file(state, tmp_path / "their_lora.safetensors", metadata=notes)
    before = to_diffusers(FLUX.state_dict(), FLUX.config)
    theirs.load_lora_weights(tmp_path, weight_name="their_lora.safetensors")
    for name in (tmp_path, tmp_path / "their_lora.safetensors"):
        ours = to_diffusers(load_pipeline(name, base=str(TINY)).flux.state_dict(), FLUX.config)
    changed = 0
    for name, module in theirs.transformer.named_modules():
        if hasattr(module, "lora_A"):
            expected = before[f"{name}.weight"] + module.get_delta_weight(next(iter(module.lora_A)))
            torch.testing.assert_close(ours.pop(f"{name}.weight"), expected, atol=1e-5, rtol=0)
            changed += (expected - before[f"{name}.weight"]).abs().max() > 0.01
    theirs.unload_lora_weights()
    assert changed >= 3 and all(torch.equal(ours[k], before[k]) for k in ours)


def test_pefts_alpha_is_that_of_its_config(tmp_path):
    state = drawn(THEIRS, "base_model.model.", "lora_A", "lora_B")
    save_file(state, tmp_path / "adapter_model.safetensors")
    settings = dict(r=RANK, lora_alpha=ALPHA, alpha_pattern={"ff.net.2": 2.0})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    ours = to_diffusers(load_pipeline(tmp_path, base=str(TINY)).flux.state_dict(), FLUX.config)
    before = to_diffusers(FLUX.state_dict(), FLUX.config)
    for layer in THEIRS:
        a, b = (state[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
        scale = (2.0 if "ff.net.2" in layer else ALPHA) / RANK
        torch.testing.assert_close(
            ours[f"{layer}.weight"], before[f"{layer}.weight"] + scale * b @ a, atol=1e-5, rtol=0
        )


def test_kohyas_fused_layer_of_a_single_block_is_changed_whole(tmp_path):
    """diffusers knows it at FLUX.1-dev's widths only."""
    layer, end = "single_blocks.2.linear1", ".lora_down.weight"
    state = with_alpha(drawn((layer,), "lora_unet_", "lora_down", "lora_up", True), end)
    save_file(state, tmp_path / "kohya.safetensors")
    down, up = (state[f"lora_unet_single_blocks_2_linear1.lora_{x}.weight"] for x in ("down", "up"))
    expected = FLUX.state_dict()[f"{layer}.weight"] + ALPHA / RANK * up @ down
    ours = load_pipeline(tmp_path, base=str(TINY)).flux.state_dict()[f"{layer}.weight"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_in_bf16_a_small_change_is_not_rounded_away(tmp_path):
    state = {
        k: v * (1e-3 if "lora_B" in k else 1) for k, v in drawn(THEIRS, "transformer.", "lora_A", "lora_B").items()
    }
    save_file(state, file := tmp_path / "small.safetensors")
    base = FLUX.state_dict()
    merged = dict(merge_lora(iter(base.items()), read_lora(file, FLUX.config)))

    x = torch.randn(2, 16, FLUX.config.in_channels)
    text = Text(torch.randn(2, 12, FLUX.config.context_in_dim), torch.randn(2, FLUX.config.vec_in_dim))

    def velocity(flux: Flux) -> Tensor:
        return velocity_of(flux.float(), text, 4, 4)(x, torch.tensor(0.7))

    def of_weights(weights: dict[str, Tensor]) -> Tensor:
        flux = Flux(FLUX.config)
        flux.load_state_dict(weights)
        return velocity(flux)

    expected = of_weights(merged) - of_weights(base)
    loaded = velocity(load_pipeline(file, dtype=torch.bfloat16, base=str(TINY)).flux)
    before, rounded = (of_weights({k: v.bfloat16() for k, v in weights.items()}) for weights in (base, merged))
    assert (loaded - before - expected).norm() < 0.1 * expected.norm()
    assert (rounded - before - expected).norm() > 0.5 * expected.norm()  # what merging in bf16 does


@pytest.mark.parametrize("case", ["diffusers with metadata", "kohya", "x-flux"])
def test_a_lora_of_ours_starts_as_any_of_theirs_with_fused_layers_taken_apart(case, tmp_path):
    state, notes = CASES[case]()
    save_file(state, file := tmp_path / "their_lora.safetensors", metadata=notes)
    merged, flux = load_pipeline(file, base=str(TINY)).flux, load_pipeline(TINY).flux
    add_lora(flux, rank=RANK + 1, alpha=3.0)
    params = dict(flux.named_parameters())
    for name, value in first_values(flux, 0, read_lora(file, flux.config)):
        params[name].data = value
    changed = 0
    for name, _ in lora_layers(flux.config):
        layer, expected = flux.get_submodule(name), merged.get_submodule(name).weight
        change = layer.scale * torch.cat([b @ a for a, b in zip(layer.a, layer.b, strict=True)])
        torch.testing.assert_close(layer.linear.weight + change, expected, atol=1e-5, rtol=1e-4)
        changed += change.abs().max() > 0.01
    assert changed >= 2


def lora(folder: Path) -> Path:
    save_file(drawn(THEIRS, "transformer.", "lora_A", "lora_B"), folder / "a.safetensors")
    return folder / "a.safetensors"


def test_without_a_base_the_flag_is_named_and_with_it_every_command_finds_it(tmp_path):
    file = lora(tmp_path)
    with pytest.raises(ValueError, match="a LoRA that does not say what it changes: give --base FOLDER"):
        load_pipeline(file)
    with pytest.raises(ValueError, match=r"--base .* is a LoRA too"):
        load_pipeline(file, base=str(file))
    assert len(check_model(Config(model=str(file), base=str(TINY)))[0]) == Config().rollout_steps + 1


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s | {"transformer.proj_out.lora_magnitude_vector": torch.ones(1)}, "a DoRA"),
        (lambda s: s | {"lora_te1_x.lora_down.weight": torch.ones(1, 1)}, "changes text encoders too"),
        (lambda s: s | {"lycoris_x.lokr_w1": torch.ones(1)}, "a LoKr, which is not read"),
        (lambda s: s | {"transformer.elsewhere.lora_A.weight": torch.ones(1, 1)}, "does not: transformer.elsewhere"),
    ],
)
def test_what_is_not_understood_is_named(change: Callable, words: str, tmp_path):
    save_file(change(drawn(THEIRS, "transformer.", "lora_A", "lora_B")), tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"odd.safetensors.*{words}"):
        load_pipeline(tmp_path / "odd.safetensors", base=str(TINY))


def test_strength_is_a_straight_line_through_base_and_tuned_for_loras_and_for_full_weights(tmp_path):
    file, before = lora(tmp_path), FLUX.state_dict()
    tuned = load_pipeline(file, base=str(TINY)).flux.state_dict()
    save_pipeline(tmp_path / "tuned", TINY, FLUX.config, tuned.items())
    for model in (file, tmp_path / "tuned"):
        for strength in (0.0, 0.4, 1.0, 1.5):
            ours = load_pipeline(model, base=str(TINY), strength=strength).flux.state_dict()
            for k in before:
                expected = before[k].double() + strength * (tuned[k].double() - before[k].double())
                torch.testing.assert_close(ours[k].double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"--strength 0\.4 needs --base FOLDER"):
        load_pipeline(tmp_path / "tuned", strength=0.4)


def test_evaluate_refuses_a_strength_without_a_base_before_it_reads_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    cfg = replace(evaluate.EvaluateFlags(), strength=0.5, out=tmp_path / "out", device="cpu")
    with join("cpu") as world, pytest.raises(ValueError, match=r"--strength 0\.5 needs --base"):
        evaluate.evaluate_models(cfg, world)
