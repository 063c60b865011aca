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
from families.flux1 import Text
from formats.folders import load_pipeline
from formats.lora import add_lora, first_values, lora_layers
from formats.lora_files import layer_rows, merge_lora, read_lora
from formats.names import to_diffusers
from formats.saving import save_pipeline
from infra.distributed import join
from model import Flux
from sample import velocity_of
from start import describe_model

TINY = Path(__file__).parent.parent / "shapes" / "tiny-flux"
RANK, ALPHA = 4, 16.0
FLUX = load_pipeline(TINY).flux
WEIGHTS = FLUX.state_dict()
LAYER_ROWS = layer_rows(FLUX.config)
XFLUX = {  # what x-flux calls two layers
    "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
    "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
}

# Layers by diffusers' names and by black-forest-labs': some that a run here trains, and some that it does not.
DIFFUSERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.ff.net.2",
    "single_transformer_blocks.3.proj_mlp",
    "single_transformer_blocks.0.proj_out",
)
DIFFUSERS_OUTER = (
    "single_transformer_blocks.1.norm.linear",
    "transformer_blocks.0.norm1_context.linear",
    "proj_out",
    "x_embedder",
)
FUSED = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.0", "single_blocks.0.linear2")


def with_underscores(layer: str) -> str:
    return layer.replace(".", "_")


def factors(
    layers: tuple[str, ...],
    prefix: str = "transformer.",
    down: str = "lora_A",
    up: str = "lora_B",
    spelling: Callable[[str], str] = str,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """The tensors of a LoRA file that changes `layers`: normal numbers, of a size that changes pictures."""
    torch.manual_seed(0)
    state = {}
    for layer in layers:
        _, rows, shape = LAYER_ROWS[with_underscores(XFLUX.get(layer, layer))]
        name = prefix + spelling(layer)
        state[f"{name}.{down}.weight"] = torch.randn(RANK, shape[1]) / 8
        state[f"{name}.{up}.weight"] = torch.randn(len(rows), RANK) / 8
        if alpha:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def kohya(layers: tuple[str, ...], prefix: str = "lora_unet_") -> dict[str, Tensor]:
    return factors(layers, prefix, "lora_down", "lora_up", with_underscores, ALPHA)


def metadata() -> dict[str, str]:
    """As diffusers' training scripts write it."""
    settings = dict(r=RANK, lora_alpha=ALPHA, target_modules=list(DIFFUSERS), peft_type="LORA")
    packed = {f"transformer.{key}": value for key, value in settings.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}


STATES = {
    "diffusers": factors(DIFFUSERS),
    "diffusers with metadata": factors(DIFFUSERS),
    "ai-toolkit": factors(DIFFUSERS + DIFFUSERS_OUTER),
    "kohya": kohya(FUSED),
    "x-flux": factors(tuple(XFLUX), "", "down", "up"),
}


def written(trainer: str, folder: Path) -> Path:
    file = folder / "their_lora.safetensors"
    save_file(STATES[trainer], file, metadata=metadata() if "metadata" in trainer else None)
    return file


def with_lora(model: Path) -> dict[str, Tensor]:
    """The weights of the tiny model under a LoRA, by our names."""
    return load_pipeline(model, base=str(TINY)).flux.state_dict()


# ------------------------------------------------------------------------------------------------ what a file adds


@pytest.fixture(scope="module")
def diffusers_pipeline() -> FluxPipeline:
    return FluxPipeline.from_pretrained(TINY)


@pytest.mark.parametrize("trainer", STATES)
def test_a_file_adds_what_diffusers_adds(trainer, diffusers_pipeline, tmp_path):
    file = written(trainer, tmp_path)
    weights = to_diffusers(with_lora(file), FLUX.config)
    base = to_diffusers(WEIGHTS, FLUX.config)
    diffusers_pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    changed_layers = 0
    for name, module in diffusers_pipeline.transformer.named_modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight(next(iter(module.lora_A)))
            expected = base[f"{name}.weight"] + delta
            torch.testing.assert_close(weights.pop(f"{name}.weight"), expected, atol=1e-5, rtol=0)
            changed_layers += delta.abs().max() > 0.01
    diffusers_pipeline.unload_lora_weights()
    assert changed_layers >= 3
    assert all(torch.equal(weights[name], base[name]) for name in weights)


def test_a_folder_with_one_lora_is_that_lora(tmp_path):
    by_file, by_folder = with_lora(written("kohya", tmp_path)), with_lora(tmp_path)
    assert all(torch.equal(by_file[name], by_folder[name]) for name in WEIGHTS)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "renamed.safetensors"])
@pytest.mark.parametrize("kind", [float, str])
def test_pefts_alpha_is_that_of_its_config(name, kind, tmp_path):
    state = factors(DIFFUSERS, "base_model.model.")
    save_file(state, tmp_path / name)
    settings = dict(r=RANK, lora_alpha=kind(ALPHA), alpha_pattern={"ff.net.2": kind(2)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = to_diffusers(with_lora(tmp_path), FLUX.config)
    base = to_diffusers(WEIGHTS, FLUX.config)
    for layer in DIFFUSERS:
        a, b = (state[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
        scale = (2.0 if "ff.net.2" in layer else ALPHA) / RANK
        expected = base[f"{layer}.weight"] + scale * b @ a
        torch.testing.assert_close(weights[f"{layer}.weight"], expected, atol=1e-5, rtol=0)


def test_rslora_divides_alpha_by_the_root_of_the_rank(tmp_path):
    save_file(factors(DIFFUSERS), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(lora_alpha=ALPHA)))
    unrooted = read_lora(tmp_path / "adapter_model.safetensors", FLUX.config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(lora_alpha=ALPHA, use_rslora=True)))
    rooted = read_lora(tmp_path / "adapter_model.safetensors", FLUX.config)
    for weight in unrooted:
        torch.testing.assert_close(rooted[weight].up, unrooted[weight].up * RANK**0.5)


@pytest.mark.parametrize(
    "layer, state",
    [
        ("single_blocks.2.linear1", kohya(("single_blocks.2.linear1",))),  # diffusers: at FLUX.1-dev's widths only
        ("img_in", kohya(("img_in",))),  # diffusers drops it
        ("final_layer.adaLN_modulation.1", kohya(("final_layer.adaLN_modulation.1",))),  # diffusers drops it
        ("transformer_blocks.1.ff.net.2", kohya(("transformer_blocks.1.ff.net.2",), "lora_transformer_")),  # OneTrainer
        ("double_blocks.1.img_attn.qkv", factors(("double_blocks.1.img_attn.qkv",), "diffusion_model.", alpha=ALPHA)),
        ("proj_out", factors(("proj_out",), "base_model.model.", "lora_A.default", "lora_B.default", alpha=ALPHA)),
    ],
    ids=["kohya fused", "kohya outer", "kohya modulation", "OneTrainer", "black-forest-labs", "PEFT"],
)
def test_layers_that_diffusers_does_not_read_are_changed_too(layer, state, tmp_path):
    save_file(state, tmp_path / "lora.safetensors")
    down, up = (tensor for tensor in state.values() if tensor.ndim == 2)
    weight, rows, _ = LAYER_ROWS[with_underscores(layer)]
    expected = WEIGHTS[weight].clone()
    expected[rows] += ALPHA / RANK * up @ down
    torch.testing.assert_close(with_lora(tmp_path)[weight], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_in_bf16_a_small_change_is_not_rounded_away(tmp_path):
    state = {name: t * (1e-3 if "lora_B" in name else 1) for name, t in STATES["diffusers"].items()}
    file = tmp_path / "small.safetensors"
    save_file(state, file)
    merged = dict(merge_lora(iter(WEIGHTS.items()), read_lora(file, FLUX.config)))

    x = torch.randn(2, 16, FLUX.config.in_channels)
    text = Text(torch.randn(2, 12, FLUX.config.context_in_dim), torch.randn(2, FLUX.config.vec_in_dim))

    def velocity(flux: Flux) -> Tensor:
        return velocity_of(flux.float(), text, 4, 4)(x, torch.tensor(0.7))

    def velocity_with(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        flux = Flux(FLUX.config)
        flux.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
        return velocity(flux)

    expected = velocity_with(merged) - velocity_with(WEIGHTS)
    base = velocity_with(WEIGHTS, torch.bfloat16)
    loaded = velocity(load_pipeline(file, dtype=torch.bfloat16, base=str(TINY)).flux) - base
    rounded = velocity_with(merged, torch.bfloat16) - base  # as if the change were added to weights in bf16
    assert (loaded - expected).norm() < 0.1 * expected.norm()
    assert (rounded - expected).norm() > 0.5 * expected.norm()


def test_strength_is_a_straight_line_through_base_and_tuned_for_loras_and_for_full_weights(tmp_path):
    file = written("diffusers", tmp_path)
    tuned = with_lora(file)
    save_pipeline(tmp_path / "tuned", TINY, FLUX.config, tuned.items())
    for model in (file, tmp_path / "tuned"):
        for strength in (0.0, 0.4, 1.0, 1.5):
            weights = load_pipeline(model, base=str(TINY), strength=strength).flux.state_dict()
            for name, base in WEIGHTS.items():
                expected = base.double() + strength * (tuned[name].double() - base.double())
                torch.testing.assert_close(weights[name].double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"--strength 0\.4 needs --base FOLDER"):
        load_pipeline(tmp_path / "tuned", strength=0.4)


# ----------------------------------------------------------------------------------------------- training goes on


@pytest.mark.parametrize("trainer", ["diffusers with metadata", "kohya", "x-flux"])
def test_a_lora_of_ours_starts_as_that_of_any_trainer(trainer, tmp_path):
    file = written(trainer, tmp_path)
    flux = load_pipeline(TINY).flux
    add_lora(flux, rank=RANK + 1, alpha=3.0)
    parameters = dict(flux.named_parameters())
    for name, value in first_values(flux, 0, read_lora(file, flux.config)):
        parameters[name].data = value
    weights = with_lora(file)
    changed_layers = 0
    for name, _ in lora_layers(flux.config):
        layer = flux.get_submodule(name)
        delta = layer.scale * torch.cat([b @ a for a, b in zip(layer.a, layer.b, strict=True)])
        expected = weights[f"{name}.weight"] - layer.linear.weight
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-6)
        changed_layers += delta.abs().max() > 0.01
    assert changed_layers >= 2


# -------------------------------------------------------------------------------------------------------- errors


def test_without_a_base_the_flag_is_named_and_with_it_every_command_finds_it(tmp_path):
    file = written("diffusers", tmp_path)
    with pytest.raises(ValueError, match="a LoRA that does not say what it changes: give --base FOLDER"):
        load_pipeline(file)
    with pytest.raises(ValueError, match=r"--base .* is a LoRA too"):
        load_pipeline(file, base=str(file))
    assert describe_model(Config(model=str(file), base=str(TINY))).location.lora == file


def test_a_folder_of_several_loras_is_refused_with_one_of_them_named(tmp_path):
    written("diffusers", tmp_path).rename(tmp_path / "step-100.safetensors")
    written("kohya", tmp_path).rename(tmp_path / "step-200.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 LoRAs: give one of its files, such as .*step-200"):
        load_pipeline(tmp_path, base=str(TINY))


TEXT_ENCODER = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 1),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(1, 1),
}


def test_what_a_lora_changes_of_text_encoders_is_left_out_and_reported_once(tmp_path, capsys):
    file = written("kohya", tmp_path)
    expected = with_lora(file)
    save_file(STATES["kohya"] | TEXT_ENCODER, file)
    capsys.readouterr()
    for _ in range(2):
        weights = with_lora(file)
    assert all(torch.equal(weights[name], expected[name]) for name in WEIGHTS)
    note = f"note: {file} changes text encoders too: only what it changes of the transformer is used\n"
    assert capsys.readouterr().err == note


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "state, words",
    [
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(1)}, "is a DoRA, which is not read"),
        ({"lora_unet_x.dora_scale": torch.ones(1)}, "is a DoRA, which is not read"),
        ({"transformer.elsewhere.lora_A.weight": torch.ones(1, 1)}, "elsewhere.* is of no layer of this Flux"),
        ({"transformer.elsewhere.weight": torch.ones(1, 1)}, "transformer.elsewhere.weight is not understood"),
        ({f"{LAYER}.lora_A.weight": torch.ones(4, 7)}, r"no LoRA of this Flux, whose .*to_q is 128 x 128"),
        ({f"{LAYER}.lora_B.weight": torch.ones(128, 7)}, "no LoRA of this Flux"),
        ({f"{LAYER}.lora_B.weight": torch.full((128, RANK), torch.inf)}, f"tensor {LAYER}.lora_B.weight is not finite"),
    ],
)
def test_what_is_not_understood_is_named(state, words, tmp_path):
    save_file(STATES["diffusers"] | state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"odd.safetensors.*{words}"):
        load_pipeline(tmp_path / "odd.safetensors", base=str(TINY))


@pytest.mark.parametrize(
    "state, words",
    [
        ({"lycoris_x.lokr_w1": torch.ones(1)}, "is a LoKr, which is not read"),
        ({"lycoris_x.hada_w1_a": torch.ones(1)}, "is a LoHa, which is not read"),
        (TEXT_ENCODER, "changes no layer of the transformer"),
        ({f"{LAYER}.lora_A.weight": torch.ones(RANK, 128)}, "no LoRA of this Flux"),
        ({"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(RANK, 128)}, "cannot read"),
    ],
)
def test_a_file_without_a_change_of_the_transformer_is_refused_by_its_kind(state, words, tmp_path):
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"{words}.*odd.safetensors|odd.safetensors.*{words}"):
        load_pipeline(tmp_path / "odd.safetensors", base=str(TINY))


def test_evaluate_refuses_a_strength_without_a_base_before_it_reads_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    cfg = replace(evaluate.EvaluateFlags(), strength=0.5, out=tmp_path / "out", device="cpu")
    with join("cpu") as process, pytest.raises(ValueError, match=r"--strength 0\.5 needs --base"):
        evaluate.evaluate_models(cfg, process)
