"""The network is diffusers' FluxTransformer2DModel under other names: outputs, gradients, files, configs."""

from collections.abc import Callable
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers import transformer_flux
from torch import Tensor

import model
from formats.names import (
    config_from_diffusers,
    config_to_diffusers,
    from_diffusers,
    load_weights,
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
    ours = flux(**a | {k: a[k].requires_grad_() for k in fields})
    theirs = run_diffusers(reference, b | {k: b[k].requires_grad_() for k in fields})
    assert ours.shape == (2, rows * columns, config.out_channels) and ours.dtype == dtype
    assert distance(ours, theirs) < tolerance

    weights = torch.linspace(-1, 1, ours.numel(), dtype=dtype).view_as(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients, wanted = to_diffusers(gradients_of(flux), config), gradients_of(reference)
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
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
    theirs = get_timestep_embedding(1000 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(sinusoid(t), theirs)


def test_bf16_output_is_close_to_float64_with_the_same_weights():
    config, rows, columns, m = CASES["guidance"]
    flux, a = random_flux(config, torch.bfloat16), inputs(config, rows, columns, m, torch.bfloat16)
    low = flux(**a)
    exact = flux.double()(**{k: v.double() if v.is_floating_point() else v for k, v in a.items()})
    assert low.dtype == torch.bfloat16
    assert distance(low.double(), exact) < 0.04


def test_bf16_network_turns_by_a_float32_table_and_rounds_once(monkeypatch):
    """A bf16 table, or bf16 positions, would miss both bounds by a factor of a thousand."""
    config, seen = replace(BASE, depth=1, depth_single_blocks=1), []

    def spy(q, k, v, pe):
        seen.append(pe)
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
    assert len(seen) == 2
    for pe in seen:
        assert (torch.view_as_real(pe).double() - exact).abs().max() < 1e-7

    x = torch.randn(2, 2, 8, config.head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, seen[0])
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
    moved = a | {name: a[name] + offset for name in ("img_ids", "txt_ids")}
    assert distance(flux(**moved), flux(**a)) < 1e-10
    assert distance(flux(**a | {"img_ids": a["img_ids"] + offset}), flux(**a)) > 1e-3


def test_ids_may_differ_within_a_batch():
    flux, a = random_flux(BASE), inputs(BASE, 3, 4, 2)
    ids = torch.stack([a["img_ids"], a["img_ids"].flip(0)])
    together = flux(**a | {"img_ids": ids})
    for i in range(2):
        alone = {k: v if k.endswith("_ids") else v[i : i + 1] for k, v in a.items()}
        assert distance(together[i], flux(**alone | {"img_ids": ids[i]})[0]) < 1e-12


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
    with torch.device("meta"):
        state = Flux(FLUX_DEV).state_dict()
    assert sum(t.numel() for t in state.values()) == 11_901_408_320
    assert len(state) == 780
    assert state["double_blocks.18.txt_attn.norm.query_norm.scale"].shape == (128,)
    assert state["single_blocks.37.linear1.weight"].shape == (21504, 3072)


@pytest.mark.parametrize("case", CASES)
def test_both_forms_round_trip_bit_for_bit(case):
    config = CASES[case][0]
    ours = random_flux(config).state_dict()
    theirs = FluxTransformer2DModel.from_config(config_to_diffusers(config)).state_dict()
    back = dict(from_diffusers(to_diffusers(ours, config), config))
    forth = to_diffusers(dict(from_diffusers(theirs, config)), config)
    assert back.keys() == ours.keys() and all(torch.equal(back[k], ours[k]) for k in ours)
    assert forth.keys() == theirs.keys() and all(torch.equal(forth[k], theirs[k]) for k in theirs)


def test_conversion_equals_diffusers_own():
    """Their converter knows FLUX.1's width only: here its heights, one column, no entry twice."""
    files = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = replace(FLUX_DEV, depth=2, depth_single_blocks=3)
    with torch.device("meta"):
        shapes = {k: (len(t), 1)[: t.ndim] for k, t in Flux(config).state_dict().items()}
    state, start = {}, 0
    for key, shape in shapes.items():
        state[key] = torch.arange(start, start + shape[0]).view(shape)
        start += shape[0]
    ours = to_diffusers(state, config)
    theirs = files.convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("case", CASES)
def test_table_names_every_module_that_holds_parameters(case):
    config = CASES[case][0]
    with torch.device("meta"):
        ours = {k.rpartition(".")[0] for k, _ in Flux(config).named_parameters()}
    assert {name for name, _ in module_names(config)} == ours


@pytest.mark.parametrize("case", CASES)
def test_configs_round_trip_through_diffusers(case):
    config = CASES[case][0]
    written = dict(FluxTransformer2DModel.from_config(config_to_diffusers(config)).config)
    assert config_from_diffusers(written) == config
    assert {k: v for k, v in written.items() if not k.startswith("_")} == {
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


@pytest.mark.parametrize("field", [{"mlp_ratio": 3.0}, {"theta": 2000}, {"qkv_bias": False}])
def test_what_diffusers_cannot_say_is_named(field):
    (name,) = field
    with pytest.raises(ValueError, match=name):
        config_to_diffusers(replace(BASE, **field))
    assert asdict(replace(BASE, **field))[name] == field[name]


@pytest.mark.parametrize("entry", [{"patch_size": 2}, {"_class_name": "SD3Transformer2DModel"}, {"pos_embed": 7}])
def test_what_flux_cannot_be_is_named(entry):
    (name,) = entry
    with pytest.raises(ValueError, match=name):
        config_from_diffusers(config_to_diffusers(BASE) | entry)


# --------------------------------------------------------------------------------------- loading


def test_loading_into_meta_takes_the_tensors_and_otherwise_copies():
    state = random_flux(BASE, torch.bfloat16).state_dict()
    with torch.device("meta"):
        empty = Flux(BASE)
    load_weights(empty, state, "here")
    full = Flux(BASE)
    load_weights(full, state, "here")
    for key, p in empty.named_parameters():
        assert p.data_ptr() == state[key].data_ptr() and p.dtype == torch.bfloat16 and p.requires_grad
    for key, p in full.named_parameters():
        assert p.data_ptr() != state[key].data_ptr() and p.dtype == torch.float32
        assert torch.equal(p, state[key].float())


@pytest.mark.parametrize("form", ["ours", "diffusers"])
def test_wrong_tensors_name_themselves_their_shapes_and_their_source(form):
    ours = random_flux(BASE).state_dict()
    if form == "ours":
        state, key, shape = ours, "single_blocks.1.linear2.weight", r"\(32, 160\)"
    else:
        state, key, shape = (
            to_diffusers(ours, BASE),
            "single_transformer_blocks.1.attn.to_k.weight",
            r"\(32, 32\)",
        )

    def load(state: dict[str, Tensor]) -> None:
        if form == "ours":
            load_weights(Flux(BASE), state, "some/folder")
        else:
            dict(from_diffusers(state, BASE, "some/folder"))

    load(state)
    with pytest.raises(ValueError, match=rf"some/folder.*misshapen \({key} \(32, 31\) instead of {shape}"):
        load(state | {key: torch.zeros(32, 31)})
    with pytest.raises(ValueError, match=rf"some/folder.*1 missing \({key}\)"):
        load({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"some/folder.*1 unexpected \(_orig_mod.img_in.weight\)"):
        load(state | {"_orig_mod.img_in.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"some/folder.*{len(state)} missing \([^)]*, \.\.\.\)"):
        load({})


def test_converting_a_foreign_tensor_names_it():
    with pytest.raises(ValueError, match=r"guidance_in\.in_layer\.weight"):
        to_diffusers(random_flux(BASE).state_dict(), replace(BASE, guidance_embed=False))


def test_rotary_table_is_as_precise_as_the_network():
    ids = torch.tensor([[0, 1, 2]])
    dtypes = {
        torch.bfloat16: torch.complex64,
        torch.float32: torch.complex64,
        torch.float64: torch.complex128,
    }
    for dtype, kind in dtypes.items():
        assert rotary_table(ids, (4, 6, 6), 10_000, dtype).dtype == kind
