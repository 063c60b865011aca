"""The embedded world: scenes, captions, a judge, and how its models were made."""

import infra  # noqa: F401, first: it keeps torchao quiet
