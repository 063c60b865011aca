"""Families of models: what differs between FLUX.1 and FLUX.2 outside of their transformers, a file each.

A family is a module, and all code outside of this folder asks a family for what it needs. A third one is a file with
the same names:

    NAME                 the family's name in messages
    PIPELINE             its class in model_index.json
    FROZEN               its folders beside transformer/
    Network, Config      the transformer, and its shape
    DEFAULT              the shape of a transformer that comes without config.json
    VAE                  the class of the autoencoder
    GUIDANCE             the usual guidance scale, by whether the transformer reads it; None if it needs none
    HAS_CLIP             whether the first tokenizer is CLIP's, which the reward hpsv2 shares
    TRANSFORMER, CONFIG_NAMES, CONFIG_DEFAULTS    class, entries and defaults of transformer/config.json
    SIGN                 a tensor that only this family's transformer has, by black-forest-labs' name
    OUTER, DOUBLE, SINGLE    modules by black-forest-labs' name and by diffusers'. Several names share the rows of one
                         tensor, in that order: hidden_size rows each, and the last has the remaining rows
    describe_encoders    tokenizers, and the widths of the text encoders, from small files
    load_encoders        the text encoders' weights
    token_limits, prompt_text, encode    prompts to what the transformer reads of them
    sigmas, position_ids, draw_noise     noise levels, rotary positions, and x_1
    vae_latents          tokens to the latents that the VAE decodes
"""

from types import ModuleType

import torch

from families import flux1, flux2
from flux2 import Flux2, Flux2Config
from model import Flux, FluxConfig

Network = Flux | Flux2
NetworkConfig = FluxConfig | Flux2Config
FAMILIES = (flux1, flux2)


def family_of(config: NetworkConfig) -> ModuleType:
    """The family of a transformer's configuration."""
    return flux2 if isinstance(config, Flux2Config) else flux1


def empty_network(config: NetworkConfig) -> Network:
    """The transformer of a configuration on the meta device: names, shapes and dtypes without memory."""
    with torch.device("meta"):
        return family_of(config).Network(config)
