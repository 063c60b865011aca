"""Commands beside training: python -m tools.NAME."""

import infra  # noqa: F401 - before diffusers, from which it hides torchao
