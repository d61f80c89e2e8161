"""The servers that answer wrongly on purpose are those of the load tests."""

from tests.loadtest.conftest import stand_in

__all__ = ["stand_in"]
