"""FLUX.2's network is diffusers' Flux2Transformer2DModel under other names: outputs, gradients, files, configs."""

from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from torch import Tensor

from families import empty_network, flux2
from flux2 import KLEIN_4B, Flux2, Flux2Config
from formats.names import config_from_diffusers, config_to_diffusers, from_diffusers, to_diffusers

TINY = Flux2Config(
    in_channels=8,
    out_channels=8,
    context_in_dim=12,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 4, 4, 4),
)
DEV = Flux2Config(
    context_in_dim=15360, hidden_size=6144, num_heads=48, depth=8, depth_single_blocks=48, guidance_embed=True
)
# config, rows, columns, text tokens: non-square grids, uneven depths and heads
CASES = {
    "klein": (TINY, 3, 5, 4),
    "guidance is an input": (replace(TINY, guidance_embed=True), 4, 2, 7),
    "three heads": (replace(TINY, hidden_size=24, num_heads=3, axes_dim=(2, 2, 2, 2), depth=1), 1, 6, 3),
}
PUBLISHED = {  # transformer/config.json of FLUX.2-klein-base-4B
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}


def random_flux2(config: Flux2Config, dtype: torch.dtype = torch.float64) -> Flux2:
    """A Flux2 in which no parameter is zero or one, so that no gate or modulation hides an error."""
    generator = torch.Generator().manual_seed(0)
    network = Flux2(config)
    for p in network.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p.shape[1] ** 0.5 if p.ndim == 2 else 0.5 + 0.3 * noise
    return network.to(dtype)


def inputs(case: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The arguments of Flux2.forward, two samples."""
    config, rows, columns, m = CASES[case]
    generator = torch.Generator().manual_seed(1)
    img = torch.randn(2, rows * columns, config.in_channels, generator=generator).to(dtype).requires_grad_()
    txt = torch.randn(2, m, config.context_in_dim, generator=generator).to(dtype).requires_grad_()
    img_ids, txt_ids = flux2.position_ids(rows, columns, m)
    timesteps = torch.tensor([0.73, 0.119], dtype=dtype)
    guidance = torch.tensor([4.0, 1.3], dtype=dtype) if config.guidance_embed else None
    return img, img_ids, txt, txt_ids, timesteps, guidance


def gradients(network: torch.nn.Module, out: Tensor, img: Tensor, txt: Tensor) -> tuple[dict[str, Tensor], ...]:
    """Of a fixed function of the output: those of the parameters by name, and those of the inputs."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names = [name for name, _ in network.named_parameters()]
    values = torch.autograd.grad((out * weights).sum(), [*network.parameters(), img, txt])
    return dict(zip([*names, "img", "txt"], values, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 3e-7), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_diffusers(case, dtype, tolerance):
    """In float64 up to diffusers' table of positions, which is float32."""
    config = CASES[case][0]
    network = random_flux2(config, dtype)
    reference = Flux2Transformer2DModel.from_config(config_to_diffusers(config)).to(dtype)
    reference.load_state_dict(to_diffusers(network.state_dict(), config), strict=True)
    img, img_ids, txt, txt_ids, timesteps, guidance = inputs(case, dtype)
    out = network(img, img_ids, txt, txt_ids, timesteps, guidance)
    expected = reference(
        hidden_states=img, encoder_hidden_states=txt, timestep=timesteps, img_ids=img_ids, txt_ids=txt_ids,
        guidance=guidance, return_dict=False,
    )[0]  # fmt: skip
    assert out.shape == img.shape and out.dtype == dtype
    assert (out - expected).abs().max() < tolerance * expected.abs().max()

    got = gradients(network, out, img, txt)
    inner = {name: got.pop(name) for name in ("img", "txt")}
    got = to_diffusers(got, config) | inner
    for name, gradient in gradients(reference, expected, img, txt).items():
        assert (got[name] - gradient).abs().max() < tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("case", CASES)
def test_both_forms_of_the_weights_round_trip_bit_for_bit(case):
    config = CASES[case][0]
    state = random_flux2(config).state_dict()
    again = dict(from_diffusers(to_diffusers(state, config), config))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_names_and_rows_are_those_of_diffusers_own_converter():
    state = random_flux2(CASES["guidance is an input"][0]).state_dict()
    converted = to_diffusers(state, CASES["guidance is an input"][0])
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(state))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


def test_published_config_is_klein_4b_and_configs_round_trip():
    assert config_from_diffusers(PUBLISHED) == KLEIN_4B
    for config, *_ in CASES.values():
        assert config_from_diffusers(config_to_diffusers(config)) == config
    for entry in ({"eps": 1e-5}, {"patch_size": 2}, {"timestep_guidance_channels": 128}, {"pooled_projection_dim": 8}):
        with pytest.raises(ValueError, match=f"no {next(iter(entry))}="):
            config_from_diffusers(PUBLISHED | entry)


@pytest.mark.parametrize(
    "config, count",
    [
        (KLEIN_4B, 3_875_544_576),
        (
            Flux2Config(context_in_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single_blocks=24),
            9_078_581_248,
        ),
        (DEV, 32_223_281_152),
    ],
    ids=["klein 4B", "klein 9B", "dev"],
)
def test_published_sizes_have_as_many_parameters_as_published(config, count):
    assert sum(p.numel() for p in empty_network(config).parameters()) == count


def test_recomputed_activations_give_the_same_gradients_bit_for_bit():
    network = random_flux2(TINY, torch.float32)
    img, *others = inputs("klein", torch.float32)
    results = []
    for network.recompute in ("none", "light", "blocks"):
        results.append(gradients(network, network(img, *others), img, others[1]))
    for again in results[1:]:
        assert all(torch.equal(gradient, again[name]) for name, gradient in results[0].items())


def test_text_tokens_have_positions():
    """Unlike in FLUX.1, a prompt's tokens in another order are another prompt."""
    network = random_flux2(TINY)
    img, img_ids, txt, txt_ids, *others = inputs("klein")
    out = network(img, img_ids, txt, txt_ids, *others)
    reordered = network(img, img_ids, txt.flip(1), txt_ids, *others)
    assert (out - reordered).abs().max() > 1e-3
    moved_together = network(img, img_ids, txt.flip(1), txt_ids.flip(0), *others)
    torch.testing.assert_close(moved_together, out, rtol=0, atol=1e-12)
