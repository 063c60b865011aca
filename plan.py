"""What a run needs: memory a GPU and communication a step, counted before anything is rented.  (being written)"""

from model import FluxConfig


def forward_flops(config: FluxConfig, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one evaluation of the transformer, for one image."""
    c, m, tokens = config.hidden_size, config.mlp_dim, image_tokens + text_tokens
    linear = 4 * c * c + 2 * c * m  # weights a token meets in a block: q, k, v, out, and the MLP's two
    outside = config.in_channels * c * image_tokens + config.context_in_dim * c * text_tokens
    outside += config.out_channels * c * image_tokens
    attention = 2 * tokens * tokens * c  # queries with keys, weights with values
    blocks = config.depth + config.depth_single_blocks
    once = (12 * config.depth + 3 * config.depth_single_blocks + 2) * c * c  # modulations, of one vector
    return 2.0 * (blocks * (linear * tokens + attention) + outside + once)
