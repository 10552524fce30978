import pytest


@pytest.fixture(params=["numpy", "array_api_strict", "torch"])
def xp(request):
    """Array libraries on which the mathematics must give the same numbers."""
    return pytest.importorskip(request.param)
