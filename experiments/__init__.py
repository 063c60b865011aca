"""What is measured: python -m experiments.NAME."""

import infra  # noqa: F401 - before diffusers, from which it hides torchao
