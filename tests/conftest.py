"""Small FLUX folders that several files of tests read, made once."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny_folders import DEV_LIKE, SCHNELL_LIKE, write_checkpoint

torch.set_num_threads(1)  # two workers, and the ranks of a test, share two cores


def pytest_collection_finish() -> None:
    """All files of tests are imported by now."""
    import tests.frozen  # noqa: F401


@pytest.fixture(scope="session")
def dev(tmp_path_factory) -> Path:
    """Guidance is an input, the shift grows with the image: as in FLUX.1-dev."""
    return write_checkpoint(tmp_path_factory.mktemp("dev"), **DEV_LIKE)


@pytest.fixture(scope="session")
def schnell(tmp_path_factory) -> Path:
    """No guidance, a fixed shift: as in FLUX.1-schnell."""
    return write_checkpoint(tmp_path_factory.mktemp("schnell"), **SCHNELL_LIKE)


@pytest.fixture
def broken(dev, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(dev, tmp_path / "broken"))
