"""Responses: when the answers of a request came that has several of them, as that of a decoupled model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.record.statistics import Seconds


@dataclass(frozen=True)
class Responses:
    """The responses of a run's requests that were answered in a stream of them, one element for each response.

    Args:
        request: whose it is, as an index into the arrays of the results.
        at: when it came, in seconds after the start; ascending for each request.
    """

    request: NDArray[np.int64]
    at: Seconds

    def ordered(self, order: NDArray[np.int64]) -> "Responses":
        """Return them with the requests' indices after a sort by `order`, those of one request together."""
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        request = place[self.request]
        by_request = np.lexsort((self.at, request))
        return Responses(request[by_request], self.at[by_request])


class Collected:
    """The responses of a file while it is read."""

    def __init__(self) -> None:
        self.request: list[int] = []
        self.at: list[float] = []

    def add(self, rows: Sequence[dict[str, Any]], places: NDArray[np.int64]) -> None:
        """Take the responses of the requests in a block of lines; `places` are the requests' indices."""
        for row, place in zip(rows, places.tolist(), strict=True):
            times = row.get("responses", ())
            self.request += [place] * len(times)
            self.at += map(float, times)

    def whole(self, order: NDArray[np.int64]) -> Responses:
        """Return all of them, for requests that are sorted by `order`."""
        return Responses(np.array(self.request, np.int64), np.array(self.at, np.float64)).ordered(order)
