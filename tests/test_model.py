"""The network is diffusers' FluxTransformer2DModel under other names: outputs, gradients, files, configs."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers import transformer_flux
from torch import Tensor

import model
from formats.lora import add_lora
from formats.names import (
    config_from_diffusers,
    config_to_diffusers,
    empty_state,
    from_diffusers,
    module_names,
    to_diffusers,
)
from model import FLUX_DEV, Flux, FluxConfig, init_weights, rotary_table, rotate, sinusoid

BASE = FluxConfig(
    in_channels=8,
    out_channels=8,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 6, 6),
    guidance_embed=True,
)
# config, rows, columns, text tokens: non-square grids, uneven depths and heads, more outputs than inputs
CASES = {
    "guidance": (BASE, 3, 5, 4),
    "no guidance": (replace(BASE, guidance_embed=False), 4, 2, 7),
    "three heads": (
        replace(BASE, hidden_size=24, num_heads=3, axes_dim=(2, 2, 4), depth=1, out_channels=12),
        1,
        6,
        3,
    ),
    "double blocks only": (replace(BASE, depth=3, depth_single_blocks=0), 2, 2, 1),
    "single blocks only": (
        replace(BASE, depth=0, num_heads=1, axes_dim=(8, 12, 12), guidance_embed=False),
        5,
        1,
        2,
    ),
}


def random_flux(config: FluxConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Flux:
    """A Flux in which no parameter is zero or one, so that no gate or modulation hides an error."""
    generator = torch.Generator().manual_seed(seed)
    flux = Flux(config)
    for p in flux.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p.shape[1] ** 0.5 if p.ndim == 2 else 0.5 + 0.3 * noise
    return flux.to(dtype)


def inputs(
    config: FluxConfig, rows: int, columns: int, m: int, dtype: torch.dtype = torch.float64, b: int = 2
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    arguments = {
        "img": randn(b, rows * columns, config.in_channels),
        "img_ids": torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1),
        "txt": randn(b, m, config.context_in_dim),
        "txt_ids": torch.zeros(m, 3, dtype=torch.long),
        "timesteps": torch.tensor([0.73, 0.119], dtype=dtype)[:b],
        "y": randn(b, config.vec_in_dim),
    }
    if config.guidance_embed:
        arguments["guidance"] = torch.tensor([3.5, 1.3], dtype=dtype)[:b]
    return arguments


def as_diffusers(flux: Flux) -> FluxTransformer2DModel:
    """diffusers' model with the weights of `flux`."""
    reference = FluxTransformer2DModel.from_config(config_to_diffusers(flux.config))
    reference.to(flux.img_in.weight.dtype).load_state_dict(to_diffusers(flux.state_dict(), flux.config))
    return reference


def run_diffusers(reference: FluxTransformer2DModel, a: dict[str, Tensor]) -> Tensor:
    return reference(
        hidden_states=a["img"],
        img_ids=a["img_ids"],
        encoder_hidden_states=a["txt"],
        txt_ids=a["txt_ids"],
        timestep=a["timesteps"],
        pooled_projections=a["y"],
        guidance=a.get("guidance"),
        return_dict=False,
    )[0]


def in_double(function: Callable) -> Callable:
    """`function` with every `.float()` in it a `.double()`."""

    def exact(*args, **kwargs):
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            return function(*args, **kwargs)

    return exact


@pytest.fixture
def exact_rotary(monkeypatch):
    """diffusers rounds its rotary table, and q and k, to float32 even in a float64 model: lift just that."""
    for name in ("get_1d_rotary_pos_embed", "apply_rotary_emb"):
        monkeypatch.setattr(transformer_flux, name, in_double(getattr(transformer_flux, name)))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in module.named_parameters()}


def check_parity(case: str, dtype: torch.dtype, tolerance: float) -> None:
    config, rows, columns, m = CASES[case]
    flux, a = random_flux(config, dtype), inputs(config, rows, columns, m, dtype)
    reference, b = as_diffusers(flux), {k: v.clone() for k, v in a.items()}
    fields = ("img", "txt", "y")
    out = flux(**a | {k: a[k].requires_grad_() for k in fields})
    expected = run_diffusers(reference, b | {k: b[k].requires_grad_() for k in fields})
    assert out.shape == (2, rows * columns, config.out_channels) and out.dtype == dtype
    assert distance(out, expected) < tolerance

    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients, expected_gradients = to_diffusers(gradients_of(flux), config), gradients_of(reference)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        # Text leaves the last double block for the single blocks only: without them some weights are idle.
        assert gradient.any() or not config.depth_single_blocks, key
        assert (gradients[key] - gradient).abs().max() <= tolerance * gradient.abs().max(), key
    for key in fields:
        assert distance(a[key].grad, b[key].grad) < tolerance, key


# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("case", CASES)
def test_float64_output_and_gradients_equal_diffusers_to_1e_9(case, exact_rotary):
    check_parity(case, torch.float64, 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_float32_output_and_gradients_equal_diffusers_to_1e_5(case):
    check_parity(case, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_features_equal_diffusers_bit_for_bit(dtype):
    t = torch.tensor([0, 1e-3, 0.73, 1, 3.5], dtype=dtype)
    expected = get_timestep_embedding(1000 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(sinusoid(t), expected)


def test_bf16_output_is_close_to_float64_with_the_same_weights():
    config, rows, columns, m = CASES["guidance"]
    flux, a = random_flux(config, torch.bfloat16), inputs(config, rows, columns, m, torch.bfloat16)
    low = flux(**a)
    exact = flux.double()(**{k: v.double() if v.is_floating_point() else v for k, v in a.items()})
    assert low.dtype == torch.bfloat16
    assert distance(low.double(), exact) < 0.04


def test_bf16_network_turns_by_a_float32_table_and_rounds_once(monkeypatch):
    """A bf16 table, or bf16 positions, would miss both bounds by a factor of a thousand."""
    config, tables = replace(BASE, depth=1, depth_single_blocks=1), []

    def spy(q, k, v, pe):
        tables.append(pe)
        return attention(q, k, v, pe)

    attention = model.attention
    monkeypatch.setattr(model, "attention", spy)
    a = inputs(config, 2, 3, 2, torch.bfloat16) | {"img_ids": torch.tensor([[0, 257 + i, 999 * i] for i in range(6)])}
    random_flux(config, torch.bfloat16)(**a)

    ids = torch.cat([a["txt_ids"], a["img_ids"]])
    frequency = [10_000.0 ** (-2 * j / dim) for dim in config.axes_dim for j in range(dim // 2)]
    position = ids.double().repeat_interleave(torch.tensor([d // 2 for d in config.axes_dim]), dim=-1)
    angle = position * torch.tensor(frequency, dtype=torch.float64)
    exact = torch.stack([angle.cos(), angle.sin()], dim=-1)
    assert len(tables) == 2
    for pe in tables:
        assert (torch.view_as_real(pe).double() - exact).abs().max() < 1e-7

    x = torch.randn(2, 2, 8, config.head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, tables[0])
    once = torch.view_as_real(
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.view_as_complex(exact)
    ).flatten(-2)
    assert turned.dtype == torch.bfloat16
    assert ((turned.double() - once).abs() <= once.abs() * 2**-8 + 1e-6).all()  # half a unit in the last place


@pytest.mark.parametrize("name", ["img_ids", "txt_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floating_point_ids_are_rejected(name, dtype):
    a = inputs(BASE, 2, 2, 2)
    with pytest.raises(ValueError, match="ids must be integers"):
        random_flux(BASE)(**a | {name: a[name].to(dtype)})


def test_only_relative_positions_matter():
    flux, a = random_flux(BASE), inputs(BASE, 3, 4, 2)
    offset = torch.tensor([5, 1000, 77])
    shifted = a | {name: a[name] + offset for name in ("img_ids", "txt_ids")}
    assert distance(flux(**shifted), flux(**a)) < 1e-10
    assert distance(flux(**a | {"img_ids": a["img_ids"] + offset}), flux(**a)) > 1e-3


def test_ids_may_differ_within_a_batch():
    flux, a = random_flux(BASE), inputs(BASE, 3, 4, 2)
    ids = torch.stack([a["img_ids"], a["img_ids"].flip(0)])
    batch_out = flux(**a | {"img_ids": ids})
    for i in range(2):
        one_sample = {k: v if k.endswith("_ids") else v[i : i + 1] for k, v in a.items()}
        assert distance(batch_out[i], flux(**one_sample | {"img_ids": ids[i]})[0]) < 1e-12


def test_missing_and_superfluous_guidance_are_named():
    a = inputs(BASE, 2, 2, 2)
    with pytest.raises(ValueError, match="guidance is missing"):
        random_flux(BASE)(**{k: v for k, v in a.items() if k != "guidance"})
    with pytest.raises(ValueError, match="guidance was given"):
        random_flux(replace(BASE, guidance_embed=False))(**a)


def test_fresh_network_predicts_zero_and_can_learn():
    flux, a = Flux(BASE).double(), inputs(BASE, 3, 4, 2)
    init_weights(flux)
    out = flux(**a)
    assert torch.count_nonzero(out) == 0
    (out - 1).square().sum().backward()
    learning = {k for k, p in flux.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {
        "final_layer.linear.weight",
        "final_layer.linear.bias",
    }  # one step, and all of them do
    assert all(p.any() for k, p in flux.named_parameters() if k.endswith((".proj.weight", "linear2.weight")))


def test_impossible_shapes_are_rejected():
    with pytest.raises(ValueError, match="num_heads 3"):
        replace(BASE, num_heads=3)
    with pytest.raises(ValueError, match=r"axes_dim \(4, 6, 4\).*16"):
        replace(BASE, axes_dim=(4, 6, 4))
    with pytest.raises(ValueError, match="even"):
        replace(BASE, axes_dim=(5, 5, 6))


# ------------------------------------------------------------------------------- published forms


def test_flux_dev_has_11901408320_parameters_in_780_tensors():
    state = empty_state(FLUX_DEV)
    assert sum(t.numel() for t in state.values()) == 11_901_408_320
    assert len(state) == 780
    assert state["double_blocks.18.txt_attn.norm.query_norm.scale"].shape == (128,)
    assert state["single_blocks.37.linear1.weight"].shape == (21504, 3072)


@pytest.mark.parametrize("case", CASES)
def test_both_forms_round_trip_bit_for_bit(case):
    config = CASES[case][0]
    bfl_state = random_flux(config).state_dict()
    diffusers_state = FluxTransformer2DModel.from_config(config_to_diffusers(config)).state_dict()
    bfl_again = dict(from_diffusers(to_diffusers(bfl_state, config), config))
    diffusers_again = to_diffusers(dict(from_diffusers(diffusers_state, config)), config)
    assert bfl_again.keys() == bfl_state.keys()
    assert diffusers_again.keys() == diffusers_state.keys()
    assert all(torch.equal(bfl_again[k], tensor) for k, tensor in bfl_state.items())
    assert all(torch.equal(diffusers_again[k], tensor) for k, tensor in diffusers_state.items())


def test_conversion_equals_diffusers_own():
    """Their converter knows FLUX.1's width only: here its heights, one column, no entry twice."""
    files = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = replace(FLUX_DEV, depth=2, depth_single_blocks=3)
    state, start = {}, 0
    for key, tensor in empty_state(config).items():
        rows = len(tensor)
        shape = (rows, 1)[: tensor.ndim]
        state[key] = torch.arange(start, start + rows).view(shape)
        start += rows
    converted = to_diffusers(state, config)
    expected = files.convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[k], tensor) for k, tensor in expected.items())


@pytest.mark.parametrize("case", CASES)
def test_table_names_every_module_that_holds_parameters(case):
    config = CASES[case][0]
    modules = {name.rpartition(".")[0] for name in empty_state(config)}
    assert {name for name, _ in module_names(config)} == modules


@pytest.mark.parametrize("case", CASES)
def test_configs_round_trip_through_diffusers(case):
    config = CASES[case][0]
    entries = dict(FluxTransformer2DModel.from_config(config_to_diffusers(config)).config)
    assert config_from_diffusers(entries) == config
    assert {k: v for k, v in entries.items() if not k.startswith("_")} == {
        k: v for k, v in config_to_diffusers(config).items() if not k.startswith("_")
    }


def test_published_config_of_flux_dev_is_flux_dev():
    published = {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": "../checkpoints/flux-dev/transformer",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    }
    assert config_from_diffusers(published) == FLUX_DEV
    schnell = {k: v for k, v in published.items() if k != "guidance_embeds"}
    assert config_from_diffusers(schnell) == replace(FLUX_DEV, guidance_embed=False)


@pytest.mark.parametrize("entry", [{"patch_size": 2}, {"_class_name": "SD3Transformer2DModel"}, {"pos_embed": 7}])
def test_what_flux_cannot_be_is_named(entry):
    (name,) = entry
    with pytest.raises(ValueError, match=name):
        config_from_diffusers(config_to_diffusers(BASE) | entry)


def test_wrong_tensors_are_named_with_their_shapes_and_their_source():
    state = to_diffusers(random_flux(BASE).state_dict(), BASE)
    key = "single_transformer_blocks.1.attn.to_k.weight"

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(from_diffusers(state, BASE, "some/folder"))

    convert(state)
    with pytest.raises(ValueError, match=rf"some/folder.* in 1 tensors: {key} is \(32, 31\) instead of \(32, 32\)$"):
        convert(state | {key: torch.zeros(32, 31)})
    with pytest.raises(ValueError, match=rf"some/folder.* in 1 tensors: {key} is missing$"):
        convert({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"some/folder.* in 1 tensors: _orig_mod.x_embedder.weight is unexpected$"):
        convert(state | {"_orig_mod.x_embedder.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=rf"some/folder.* in {len(state)} tensors: ([\w.]+ is missing; ){{3}}[\w.]+ is miss"
    ):
        convert({})


def test_rotary_table_is_as_precise_as_the_network():
    ids = torch.tensor([[0, 1, 2]])
    dtypes = {
        torch.bfloat16: torch.complex64,
        torch.float32: torch.complex64,
        torch.float64: torch.complex128,
    }
    for dtype, kind in dtypes.items():
        assert rotary_table(ids, (4, 6, 6), 10_000, dtype).dtype == kind


# ------------------------------------------------------------------------------------ recomputation


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_backward_computes_again_leaves_all_gradients_as_they_are(dtype, lora):
    def gradient(recompute: str) -> Tensor:
        flux, a = random_flux(BASE, dtype), inputs(BASE, 3, 5, 4, dtype)
        if lora:
            add_lora(flux, lora, alpha=2 * lora)
            for name, p in flux.named_parameters():
                if p.requires_grad:
                    p.data = uniform(name, p.shape)
        flux.recompute = recompute
        a["img"].requires_grad_()
        v = flux(**a)
        (v * torch.linspace(-1, 1, v.numel(), dtype=dtype).view_as(v)).sum().backward()
        trained = [p.grad.flatten() for p in flux.parameters() if p.requires_grad]
        return torch.cat([*trained, a["img"].grad.flatten()])

    expected = gradient("none")
    assert expected.any()
    assert torch.equal(gradient("light"), expected)
    assert torch.equal(gradient("blocks"), expected)


def uniform(name: str, shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(name))) - 0.5
