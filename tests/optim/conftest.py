import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request):
    """So many ranks, which stay joined for the module's tests."""
    joined = Ranks(request.param)
    yield joined
    joined.close()
