"""An OmniAvatar release and a plain base, tiny, on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.weights import release


@pytest.fixture
def omni(tmp_path: Path) -> Path:
    return release.write_release(tmp_path / "omni")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return release.write_base(tmp_path / "wan" / "diffusion_pytorch_model.safetensors").parent
