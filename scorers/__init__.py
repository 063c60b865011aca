"""Rewards, a file each; what all of them are made of is common.py."""

import infra  # noqa: F401 - before transformers, from which it hides torchao
