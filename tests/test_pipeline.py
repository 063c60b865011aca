"""The pipeline is diffusers' FluxPipeline: the same noise levels, text, pictures and folders."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Block

from families import flux1
from families.common import pack, unpack
from families.flux1 import sigmas
from formats.folders import Pipeline, describe, load_parts, load_pipeline
from formats.locations import locate
from formats.names import from_diffusers
from formats.saving import save_pipeline, save_transformer
from formats.weights import WEIGHTS, build_flux, open_flux
from model import Flux, FluxConfig
from sample import decode, draw_noise, encode, main, sample, token_grid, velocity_of
from tests.tiny_folders import FLUX_DEV_SCHEDULE, SCHNELL_LIKE, edit_json, shard

TINY_FLUX = Path(__file__).parent.parent / "shapes" / "tiny-flux"
PROMPTS = ["a photo of a red circle and a blue square", "two words"]
CELL = 8  # pixels a token: the VAE is f4


@pytest.fixture(scope="module")
def pipe(dev) -> Pipeline:
    return load_pipeline(dev)


@pytest.fixture(scope="module")
def reference(dev) -> FluxPipeline:
    return diffusers_pipeline(dev)


def diffusers_pipeline(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    state_a, state_b = a.state_dict(), b.state_dict()
    assert state_a.keys() == state_b.keys()
    assert all(torch.equal(state_a[k], state_b[k]) and state_a[k].dtype == state_b[k].dtype for k in state_a)


# ---------------------------------------------------------------------------------- the sigma schedule


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("tokens", [16, 256, 1024, 2025, 4096])
@pytest.mark.parametrize(
    "schedule", [FLUX_DEV_SCHEDULE, SCHNELL_LIKE["schedule"], dict(use_dynamic_shifting=False, shift=1.0)]
)
def test_levels_equal_those_that_flux_pipeline_asks_of_its_scheduler(schedule, tokens, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in schedule.items() if not k.startswith("_")})
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    retrieve_timesteps(scheduler, steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels = sigmas(schedule, steps, tokens)
    assert levels.shape == (steps + 1,) and levels.dtype == torch.float32
    assert levels[0] == 1 and levels[-1] == 0
    torch.testing.assert_close(levels, scheduler.sigmas, rtol=0, atol=2e-7)


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (1024, 0.63), (2025, 0.7995), (4096, 1.15)])
def test_published_schedule_has_the_published_shifts(tokens, mu):
    """At sigma = 1/2 the shifted level is the logistic function of mu."""
    assert torch.logit(sigmas(FLUX_DEV_SCHEDULE, 2, tokens)[1]).item() == pytest.approx(mu, abs=1e-3)


# ---------------------------------------------------------------------------------------- the pictures


def diffusers_images(
    diffusers_pipe: FluxPipeline, pipe: Pipeline, height: int, width: int, steps: int, **options
) -> Tensor:
    """From seeds alone: the noise is FluxPipeline's own."""
    return diffusers_pipe(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        height=height,
        width=width,
        num_inference_steps=steps,
        max_sequence_length=pipe.text_length,
        output_type="pt",
        **options,
    ).images


@pytest.mark.parametrize("height, width", [(32, 32), (24, 56)])
@pytest.mark.parametrize("guidance", [3.5, 1.0])
def test_images_of_a_guided_dynamically_shifted_model_equal_flux_pipeline(pipe, reference, height, width, guidance):
    expected = diffusers_images(reference, pipe, height, width, 4, guidance_scale=guidance)
    images = sample(pipe, PROMPTS, [0, 1], 4, height, width, guidance)
    assert images.shape == (2, 3, height, width) and images.std() > 0.01
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 56)])
def test_images_of_an_unguided_model_of_fixed_shift_equal_flux_pipeline(schnell, height, width):
    """Such a model needs no guidance; asked for, it is guided by a second evaluation on a negative prompt."""
    pipe = load_pipeline(schnell)
    expected = diffusers_images(diffusers_pipeline(schnell), pipe, height, width, 4)
    images = sample(pipe, PROMPTS, [0, 1], 4, height, width)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    expected = diffusers_images(
        diffusers_pipeline(schnell), pipe, height, width, 4, true_cfg_scale=3.0, negative_prompt=["two", "two"]
    )
    guided = sample(pipe, PROMPTS, [0, 1], 4, height, width, guidance=3.0, negative_prompt="two")
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-4)
    assert (guided - images).abs().max() > 1e-3


@pytest.mark.skipif(not TINY_FLUX.exists(), reason="shapes/tiny-flux is not there: python -m recipe.prepare makes it")
def test_images_of_the_shipped_model_equal_flux_pipeline():
    pipe = load_pipeline(TINY_FLUX)
    size = pipe.vae.config.sample_size
    expected = diffusers_images(diffusers_pipeline(TINY_FLUX), pipe, size, size, 4, guidance_scale=3.5)
    images = sample(pipe, PROMPTS, [0, 1], 4, size, size)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_a_seed_is_one_picture_in_any_batch(pipe):
    prompts, seeds = [*PROMPTS, *PROMPTS, PROMPTS[0]], [7, 8, 9, 7, 7]
    images = sample(pipe, prompts, seeds, 3, 32, 24, 3.5)
    for batch in (1, 2, 3):
        torch.testing.assert_close(sample(pipe, prompts, seeds, 3, 32, 24, 3.5, batch), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(images[0], images[4], rtol=0, atol=1e-5)
    assert (images[0] - images[2]).abs().max() > 1e-3  # another seed
    assert (images[0] - images[3]).abs().max() > 1e-5  # another prompt


def test_sampling_leaves_no_graph(pipe):
    assert not sample(pipe, PROMPTS[:1], [0], 2, 16, 16, 3.5).requires_grad


def test_a_guided_network_demands_its_guidance(pipe):
    with pytest.raises(ValueError, match="guidance is missing"):
        sample(pipe, PROMPTS[:1], [0], 1, 16, 16)


@pytest.mark.parametrize("height, width", [(32, 20), (12, 32), (0, 32), (32, -8)])
def test_a_size_of_broken_tokens_is_named(pipe, height, width):
    assert token_grid(pipe, 24, 56) == (3, 7)
    with pytest.raises(ValueError, match=f"{height}x{width} is not a positive multiple of {CELL}"):
        token_grid(pipe, height, width)


def test_network_runs_in_bf16_on_fp32_latents(dev):
    pipe = load_pipeline(dev, dtype=torch.bfloat16)
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    frozen = [*pipe.flux.parameters(), *pipe.encoders[0].parameters(), *pipe.encoders[1].parameters()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    text = encode(pipe, PROMPTS)
    assert text.txt.dtype == text.vec.dtype == torch.bfloat16
    dtypes = []
    pipe.flux.register_forward_pre_hook(lambda _, inputs: dtypes.extend(x.dtype for x in inputs))
    velocity = velocity_of(pipe.flux, text, 2, 3, 3.5)
    assert velocity(draw_noise(pipe, [0, 1], 2, 3), torch.tensor(0.7)).dtype == torch.float32
    bf16, ids = torch.bfloat16, torch.int64
    assert dtypes == [bf16, ids, bf16, ids, torch.float32, bf16, torch.float32]  # time and guidance stay fp32
    low, high = (sample(p, PROMPTS, [0, 1], 2, 16, 24, 3.5) for p in (pipe, load_pipeline(dev)))
    assert low.dtype == torch.float32 and (low - high).abs().max() < 0.05


# -------------------------------------------------------------------------------------- text and latents


def test_text_equals_flux_pipelines(pipe, reference):
    """Long prompts are cut; an empty one is all padding, which no mask hides."""
    prompts = [*PROMPTS, "", "a red circle and " * 20]
    with torch.no_grad():
        txt, vec, ids = reference.encode_prompt(prompts, max_sequence_length=pipe.text_length)
    text = encode(pipe, prompts)
    assert torch.equal(text.txt, txt) and torch.equal(text.vec, vec)
    assert text.txt.shape[1] == len(ids) == pipe.text_length == 12
    assert not text.txt.requires_grad


def test_text_length_may_be_chosen_and_is_512_for_a_tokenizer_without_limit(dev, broken, reference):
    edit_json(broken / "tokenizer_2" / "tokenizer_config.json", model_max_length=int(1e30))
    assert load_pipeline(broken).text_length == 512
    with torch.no_grad():
        txt, _, _ = reference.encode_prompt(PROMPTS, max_sequence_length=20)
    assert torch.equal(encode(load_pipeline(dev, text_length=20), PROMPTS).txt, txt)


def test_with_encoders_offloaded_one_layer_of_t5_at_a_time_is_on_the_device(dev, pipe, monkeypatch):
    on_device, counts, move = set(), [], T5Block.to

    def count_layers(layer: T5Block, device: str) -> T5Block:
        # The device is the CPU here, too: a layer's second move is the one back to the host.
        if layer in on_device:
            on_device.remove(layer)
        else:
            on_device.add(layer)
        counts.append(len(on_device))
        return move(layer, device)

    monkeypatch.setattr(T5Block, "to", count_layers)
    offloaded = load_pipeline(dev, offload=True)
    assert not counts  # loading moves no layer
    for embedding, expected in zip(encode(offloaded, PROMPTS), encode(pipe, PROMPTS), strict=True):
        assert torch.equal(embedding, expected)
    assert max(counts) == 1 and not on_device and len(counts) == 2 * len(offloaded.encoders[1].encoder.block)


def test_packing_round_trips_and_equals_flux_pipelines():
    b, c, h, w = 2, 4, 6, 10
    z = torch.arange(b * c * h * w, dtype=torch.float64).view(b, c, h, w)
    x = pack(z)
    assert torch.equal(x, FluxPipeline._pack_latents(z, b, c, h, w))
    assert torch.equal(unpack(x, h // 2, w // 2), z)
    assert torch.equal(unpack(x, h // 2, w // 2), FluxPipeline._unpack_latents(x, 8 * h, 8 * w, 8))


def test_decoding_equals_flux_pipelines(pipe, reference):
    x = 2 * draw_noise(pipe, [0, 1], 3, 5)
    z = FluxPipeline._unpack_latents(x, 3 * CELL, 5 * CELL, reference.vae_scale_factor)
    z = z / reference.vae.config.scaling_factor + reference.vae.config.shift_factor
    with torch.no_grad():
        expected = reference.image_processor.postprocess(reference.vae.decode(z).sample, output_type="pt")
        images = decode(pipe, x, 3 * CELL, 5 * CELL)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_the_gradient_of_an_image_reaches_its_latents(dev):
    """Against central differences in float64, along random directions; the frozen VAE collects nothing."""
    pipe = load_pipeline(dev)
    pipe.vae.double()
    x = draw_noise(pipe, [0], 2, 3).double().requires_grad_()
    weights = torch.randn(1, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor) -> Tensor:
        return (weights * decode(pipe, x, 16, 24)).sum()

    loss(x).backward()
    assert x.grad.flatten(0, 1).any(dim=1).all()  # every token counts
    for seed in range(3):
        direction, step = draw_noise(pipe, [100 + seed], 2, 3).double(), 1e-5
        with torch.no_grad():
            difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        assert (x.grad * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in pipe.vae.parameters())


def test_a_bf16_vae_gives_fp32_images_and_nearly_the_same_gradient(dev):
    pipe = load_pipeline(dev)
    latents = draw_noise(pipe, range(4), 3, 5)

    def images_and_gradient() -> tuple[Tensor, Tensor]:
        x = latents.clone().requires_grad_()
        images = decode(pipe, x, 3 * CELL, 5 * CELL)
        images.square().sum().backward()
        return images.detach(), x.grad.flatten()

    expected, expected_gradient = images_and_gradient()
    pipe.vae.to(torch.bfloat16)
    images, gradient = images_and_gradient()
    assert images.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=0.02)
    assert torch.cosine_similarity(gradient, expected_gradient, dim=0) > 0.99


def test_images_stay_in_range(pipe):
    images = decode(pipe, 100 * draw_noise(pipe, [0], 2, 2), 16, 16)
    assert images.min() >= 0 and images.max() <= 1


# ----------------------------------------------------------------------------------------------- folders


def load_flux(folder: Path) -> Flux:
    return build_flux(open_flux(locate(folder)), torch.float32)


def test_only_the_transformer_learns(pipe):
    assert all(p.requires_grad for p in pipe.flux.parameters())
    for network in (pipe.vae, *pipe.encoders):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_pipeline_around_the_callers_network_leaves_that_network_alone(dev, pipe):
    """As train.py needs: its network may be sharded, and in another dtype than the text encoders."""
    description = describe(dev)
    with torch.device("meta"):
        flux = Flux(description.weights.config)
    loaded = load_parts(description, flux, "cpu", torch.bfloat16, text_length=7)
    assert loaded.flux is flux and all(p.is_meta and p.dtype == torch.float32 for p in flux.parameters())
    assert (loaded.compute, loaded.text_length, loaded.encoders[1].dtype) == (torch.bfloat16, 7, torch.bfloat16)
    assert_same_weights(loaded.vae, pipe.vae)
    assert dict(description.weights.tensors).keys() == flux.state_dict().keys()  # not read by load_parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_loads_bit_for_bit_here_and_in_diffusers(dev, tmp_path, dtype):
    pipe = load_pipeline(dev)
    with torch.no_grad():
        for p in pipe.flux.parameters():
            p.add_(torch.randn_like(p) / 10)
    pipe.flux.to(dtype)
    folder = tmp_path / "new" / "final"
    save_pipeline(folder, dev, pipe.flux.config, pipe.flux.state_dict().items())
    assert {p.name for p in folder.iterdir()} == {"model_index.json", *flux1.FROZEN, "transformer"}

    loaded = load_pipeline(folder, dtype=dtype)
    assert loaded.flux.config == pipe.flux.config and loaded.schedule == pipe.schedule
    assert_same_weights(loaded.flux, pipe.flux)
    assert_same_weights(loaded.vae, pipe.vae)
    assert_same_weights(loaded.encoders[1].float(), pipe.encoders[1].to(dtype).float())

    diffusers_pipe = diffusers_pipeline(folder)
    converted = dict(from_diffusers(diffusers_pipe.transformer.state_dict(), pipe.flux.config))
    assert all(torch.equal(converted[k].to(dtype), v) for k, v in pipe.flux.state_dict().items())
    expected = diffusers_images(diffusers_pipe, pipe, 16, 24, 2, guidance_scale=3.5)
    images = sample(load_pipeline(folder), PROMPTS, [0, 1], 2, 16, 24, 3.5)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_training_on_the_loaded_weights_leaves_their_file_alone(broken):
    """Loaded weights are mapped from their file."""
    file = broken / "transformer" / WEIGHTS
    contents = file.read_bytes()
    with torch.no_grad():
        for p in load_flux(broken).parameters():
            p.zero_()
    assert file.read_bytes() == contents


def test_a_transformer_can_be_saved_onto_the_files_that_it_is_mapped_from(broken):
    shard(broken)
    flux = load_flux(broken)
    expected = {k: v + 1 for k, v in flux.state_dict().items()}
    state = expected
    for _ in range(2):  # over shards, then over the one file
        save_transformer(broken / "transformer", flux.config, state.items())
        state = load_flux(broken).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert diffusers_pipeline(broken).transformer.x_embedder.bias.equal(expected["img_in.bias"])


def test_a_model_in_use_survives_a_save_over_its_folder(broken, pipe):
    flux = load_flux(broken)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in flux.state_dict().items()}
    save_transformer(broken / "transformer", flux.config, zeros.items())
    assert_same_weights(flux, pipe.flux)
    assert not load_flux(broken).img_in.bias.any()


def test_a_transformer_of_several_files_is_written_and_read(broken, pipe, monkeypatch):
    """Each file but the last is a little larger than SHARD_BYTES; diffusers reads them, too."""
    monkeypatch.setattr("formats.saving.SHARD_BYTES", 60_000)
    save_transformer(broken / "transformer", pipe.flux.config, pipe.flux.state_dict().items())
    names = sorted(p.name for p in (broken / "transformer").glob("*.safetensors"))
    count = len(names)
    assert count > 2 and names[0] == f"diffusion_pytorch_model-00001-of-{count:05d}.safetensors"
    assert_same_weights(load_flux(broken), pipe.flux)
    state = dict(from_diffusers(diffusers_pipeline(broken).transformer.state_dict(), pipe.flux.config))
    assert all(torch.equal(state[name], tensor) for name, tensor in pipe.flux.state_dict().items())


def test_a_sharded_transformer_is_the_same_transformer(broken, pipe):
    assert len(shard(broken)) > 2
    assert_same_weights(load_pipeline(broken).flux, pipe.flux)


def test_flux_dev_fits_in_memory_once_without_initial_values(dev, monkeypatch):
    """Weights are taken from the file, never drawn first: drawing 12B normal numbers takes minutes."""

    def build(config: FluxConfig) -> Flux:
        flux = Flux(config)
        assert all(p.is_meta for p in flux.parameters())
        return flux

    monkeypatch.setattr("families.flux1.Network", build)
    opened = open_flux(locate(dev))
    state = dict(opened.tensors)
    flux = build_flux(opened._replace(tensors=state.items()), torch.float32)
    for name, p in flux.named_parameters():
        assert p.data_ptr() == state[name].data_ptr() and p.requires_grad


# ------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_one_line_before_anything_is_read(device, monkeypatch, capsys):
    flags = ["sample.py", "--device", device, "--model", "/nowhere", "--prompt", "a circle"]
    monkeypatch.setattr("sys.argv", flags)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: --device {device}: torch has no such device here; cpu works everywhere\n"


@pytest.mark.parametrize("command, flags", [("sample", ["--prompt", "a circle"]), ("evaluate", ["--reward", "tiny"])])
def test_out_of_memory_is_one_line_that_says_what_takes_less(command, flags, tmp_path, monkeypatch):
    def allocate(*_, **__) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.chdir(tmp_path)
    module = import_module(command)
    monkeypatch.setattr(module, "load_pipeline", allocate)
    monkeypatch.setattr("sys.argv", [f"{command}.py", *flags])
    with pytest.raises(SystemExit, match="error: out of memory: take a smaller --batch"):
        module.main()
