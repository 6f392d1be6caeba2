import pytest

from orchestrator.group import pool


@pytest.fixture
def soon(monkeypatch):
    """A keeper that is gone is replaced at once."""
    monkeypatch.setattr(pool, "REVIVE_S", 0.02)
