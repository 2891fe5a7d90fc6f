"""Every family, its folder saved once for a file of tests."""

from __future__ import annotations

import pytest

from tests.backbones.families import FAMILIES, Family
from tests.backbones.tiny_family import Tiny


@pytest.fixture(scope="session", params=FAMILIES, ids=str)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    family: Family = request.param
    return Tiny(family, tmp_path_factory.mktemp(family.name))
