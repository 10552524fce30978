from pathlib import Path

import pytest

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "results" / "store.sqlite"
