"""LoRA: the file that a run writes is the one that diffusers reads, and both draw the same picture."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import train
from config import Config
from formats.folders import load_pipeline
from formats.lora import FILE, add_lora, lora_layers
from formats.lora_files import changes_of, merge_lora
from infra.distributed import gathered_tensors, join
from sample import Text, sample, velocity_of
from tests.processes import spread

ROOT = Path(train.__file__).parent
TINY = ROOT / "shapes" / "tiny-flux"
PROMPTS = ["a photo of a red circle", "a photo of three squares"]


def run(cfg: Config) -> str:
    with join("cpu") as world:
        train.run(cfg, train.set_up(cfg, world), world)
    return ""


def as_the_preset(cfg: Config) -> tuple[bool, int, int]:
    """An update in the preset's form; is all finite, and how much a save gathers of how much there is."""
    with join("cpu") as world:
        setup = train.set_up(cfg, world)
        run = train.make_state(cfg, setup.pipe.flux)
        entry = train.one_update(cfg, setup, run, world, 0)
        gathered = sum(t.numel() for _, t in gathered_tensors(setup.pipe.flux, torch.float32, world.rank))
        every = sum(p.numel() for p in setup.pipe.flux.parameters())
        return entry["grad_norm"] > 0 and entry["loss"] == entry["loss"], gathered, every


def test_a_lora_trains_in_bf16_recomputing_on_two_ranks_and_saves_only_itself():
    cfg = Config(out=Path("nonexistent"), lora=4, bf16=True, recompute=True, rollout_batch=2, micro_batch=1, batch=4)
    (fine, gathered, every), (fine_too, nothing, _) = spread(2, as_the_preset, cfg)
    assert fine and fine_too and nothing == 0 < gathered < 0.2 * every


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The final/ of a short run on two ranks, with a rate that changes pictures."""
    root = tmp_path_factory.mktemp("lora")
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    (root / "few.txt").write_text("\n".join(lines[::60]) + "\n")
    cfg = Config(out=root / "run", lora=4, lr=1e-2, decay=False, batch=8, rollout_steps=3, updates=3, eval_every=3,
                 ema=0.5, save_every=2, eval_prompts=root / "few.txt")  # fmt: skip
    assert spread(2, run, cfg) == ["", ""]
    return root / "run" / "final"


def images_of(pipeline: FluxPipeline, steps: int = 4) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        PROMPTS, height=64, width=64, num_inference_steps=steps, guidance_scale=1.0, generator=generators,
        max_sequence_length=12, output_type="pt",
    )  # fmt: skip
    return out.images


def test_diffusers_takes_the_file_as_it_is_and_draws_the_same_picture(trained):
    theirs = FluxPipeline.from_pretrained(TINY)
    before = images_of(theirs)
    theirs.load_lora_weights(trained)
    ours = sample(load_pipeline(trained), PROMPTS, [0, 1], 4, 64, 64)
    torch.testing.assert_close(images_of(theirs), ours, atol=2e-4, rtol=0)
    assert (ours - before).abs().mean() > 0.01  # it changed something


def test_the_file_names_what_published_loras_of_flux_do(trained):
    state = load_file(trained / FILE)
    layers = {k.removeprefix("transformer.").rsplit(".", 2)[0] for k in state}
    double = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
              "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
              "ff_context.net.2"}  # fmt: skip
    single = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    assert layers == {f"transformer_blocks.{i}.{n}" for i in range(2) for n in double} | {
        f"single_transformer_blocks.{i}.{n}" for i in range(4) for n in single
    }
    assert {k.rsplit(".", 2)[1] for k in state} == {"lora_A", "lora_B"}
    assert all(v.shape[0] == 4 for k, v in state.items() if "lora_A" in k)


def test_a_lora_starts_as_the_network_that_it_changes_and_trains_nothing_else():
    with join("cpu") as world:
        cfg = Config(out=Path("nonexistent"), lora=4, bf16=True)
        flux = train.set_up(cfg, world).pipe.flux
        trained = [n for n, p in flux.named_parameters() if p.requires_grad]
        assert all(".a." in n or ".b." in n for n in trained)
        dtypes = {n: p.dtype for n, p in flux.named_parameters()}
        assert {dtypes[n] for n in trained} == {torch.float32}
        assert {d for n, d in dtypes.items() if n not in trained} == {torch.bfloat16}
        plain = train.set_up(replace(cfg, bf16=False), world).pipe
        x = sample(plain, PROMPTS, [0, 1], 2, 64, 64)
    torch.testing.assert_close(x, sample(load_pipeline(TINY), PROMPTS, [0, 1], 2, 64, 64), atol=1e-5, rtol=0)


def test_the_change_is_alpha_over_rank_times_B_A_in_each_part_of_a_fused_layer():
    flux, whole = load_pipeline(TINY).flux, load_pipeline(TINY).flux
    add_lora(flux, rank=3, alpha=6.0)
    torch.manual_seed(0)
    for name, parts in lora_layers(whole.config):
        layer, plain = flux.get_submodule(name), whole.get_submodule(name)
        for p in (*layer.a, *layer.b):
            p.data.normal_()
        change = torch.cat([b @ a for a, b in zip(layer.a, layer.b)])
        x = torch.randn(2, plain.in_features)
        expected = plain(x) + 2 * x @ change.T
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
        assert len(layer.a) == len(parts) and sum(len(b) for b in layer.b) == plain.out_features


def start_of(cfg: Config) -> dict[str, Tensor]:
    with join("cpu") as world:
        return dict(gathered_tensors(train.set_up(cfg, world).pipe.flux, torch.float32, world.rank))


def test_a_run_of_all_weights_goes_on_from_a_lora(trained):
    merged, base = load_pipeline(trained).flux.state_dict(), load_pipeline(TINY).flux.state_dict()
    assert any(not torch.equal(merged[k], base[k]) for k in base)
    start = spread(2, start_of, Config(out=Path("nonexistent"), model=str(trained)))[0]  # gathered on rank 0
    assert all(torch.equal(start[k], merged[k]) for k in merged)


def velocity_at(flux: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, txt, vec = (torch.randn(s, generator=generator) for s in ((2, 16, 32), (2, 12, 96), (2, 64)))
    return velocity_of(flux, Text(txt, vec), 4, 4)(x, torch.tensor([0.7, 0.2]))


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (6, 3.0)])
def test_a_lora_goes_on_from_a_lora_of_its_rank_or_less(trained, rank, alpha):
    with join("cpu") as world:
        cfg = Config(out=Path("nonexistent"), model=str(trained), lora=rank, lora_alpha=alpha)
        flux = train.set_up(cfg, world).pipe.flux
        with torch.no_grad():
            there, base = velocity_at(load_pipeline(trained).flux), velocity_at(load_pipeline(TINY).flux)
            torch.testing.assert_close(velocity_at(flux), there, atol=1e-4, rtol=1e-4)
    assert (there - base).abs().mean() > 0.01


def test_what_a_lora_cannot_go_on_with_is_told_before_weights_are_read(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("start.load", lambda *_: pytest.fail("weights were read"))
    cfg = Config(out=tmp_path / "run", model=str(trained), lora=2)
    with pytest.raises(ValueError, match=r"--lora 2 .* rank 2 is too low to go on with a LoRA of rank"):
        start_of(cfg)
    outer = "transformer.single_transformer_blocks.1.norm.linear"
    save_file({f"{outer}.lora_A.weight": torch.ones(2, 128), f"{outer}.lora_B.weight": torch.ones(384, 2)},
              tmp_path / "outer.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"single_blocks\.1\.modulation\.lin\.weight too, .* without --lora"):
        start_of(replace(cfg, model=str(tmp_path / "outer.safetensors"), base=str(TINY)))


def test_a_lora_continued_by_a_run_is_read_by_diffusers_over_the_first_ones_base(trained, tmp_path):
    cfg = Config(out=tmp_path / "run", model=str(trained), lora=6, lr=1e-2, ema=0.5, batch=4, rollout_steps=3, updates=2,
                 eval_every=2, eval_prompts=trained.parent.parent / "few.txt")  # fmt: skip
    assert run(cfg) == ""
    theirs = FluxPipeline.from_pretrained(TINY)
    theirs.load_lora_weights(cfg.out / "final")
    ours = sample(load_pipeline(cfg.out / "final"), PROMPTS, [0, 1], 4, 64, 64)
    torch.testing.assert_close(images_of(theirs), ours, atol=2e-4, rtol=0)
    assert (ours - sample(load_pipeline(trained), PROMPTS, [0, 1], 4, 64, 64)).abs().mean() > 0.001


def test_a_lora_whose_base_has_moved_says_where_to_write_the_new_place(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "lora")
    (folder / "lora.json").write_text('{"base": "/gone/FLUX"}')
    with pytest.raises(ValueError, match=r"its base at /gone/FLUX, as .*lora.json says"):
        load_pipeline(folder)


def test_a_lora_folder_can_be_moved_with_its_base_and_broken_files_are_named(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "lora")
    (tmp_path / "base").symlink_to(TINY)
    (folder / "lora.json").write_text('{"base": "../base"}')
    assert load_pipeline(folder).location.folder.resolve() == Path(TINY).resolve()
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"cannot read .*{FILE}"):
        load_pipeline(folder)
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=f"needs its {FILE}"):
        load_pipeline(folder)
    (folder / "lora.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read .*lora\.json"):
        load_pipeline(folder)


def merge(file: Path) -> None:
    flux = load_pipeline(TINY).flux
    dict(merge_lora(iter(flux.state_dict().items()), changes_of(load_file(file), flux.config)))


def test_a_lora_of_another_flux_is_refused(trained, tmp_path):
    from safetensors.torch import save_file

    state = load_file(trained / FILE)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    for change in ({name: torch.zeros(4, 7)}, {"transformer.time.lora_A.weight": torch.zeros(1)}):
        save_file(state | change, tmp_path / FILE)
        with pytest.raises(ValueError, match=r"no LoRA of this Flux|does not: transformer\.time"):
            merge(tmp_path / FILE)
    del state[name]
    save_file(state, tmp_path / FILE)
    with pytest.raises(ValueError, match="no LoRA of this Flux"):
        merge(tmp_path / FILE)


def test_a_lora_resumes(trained):
    cfg = Config(out=trained.parent, lora=4, lr=1e-2, decay=False, batch=8, rollout_steps=3, updates=3, eval_every=3,
                 ema=0.5, save_every=2, eval_prompts=trained.parent.parent / "few.txt", resume=True)  # fmt: skip
    before = load_file(trained / FILE)
    assert spread(2, run, cfg) == ["", ""]  # from step 2
    after = load_file(trained / FILE)
    assert all(torch.equal(after[k], before[k]) for k in before)
