"""The paper's published results (paper.toml), and the data sets that they are comparable with."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from teracon_fast.data import TaskSequence

LEAST_SHARE = 0.9  # smaller over larger number of users; below it, a data set of the same name is a subset or another release


@lru_cache(maxsize=1)
def _file() -> dict[str, dict[str, Any]]:
    return tomllib.loads((resources.files("teracon_fast") / "reproduce" / "paper.toml").read_text("utf-8"))


@dataclass(frozen=True)
class Paper:
    """The paper's results on one data set.

    Attributes:
        key: in paper.toml, and the name of the preset. title: as the paper calls it.
        noise_at: position of the noisy task in Table 4, from 1; None: not published.
    """

    key: str
    title: str
    noise_at: int | None

    def value(self, experiment: str, method: str, variant: str, order: tuple[int, ...], quantity: str, number: int) -> float:
        """A published value; NaN if there is none.

        Args:
            experiment: "table2" and so on. method: by name. variant: key of an `experiments.Variant`.
            order: of the tasks without the noisy one. quantity: "metric", "bwt", "fwt", "change" or "seconds".
            number: of the task, from 1.
        """
        found: Any = _file()[self.key].get(experiment, {})
        numbers = tuple(range(1, len(order) + 1))
        name = {numbers: "original", (1, *numbers[:0:-1]): "reversed"}.get(order, "another order")
        if experiment in ("table3", "table6"):
            found = found.get(name, {})
        elif name != "original":
            return math.nan
        found = found.get(variant if experiment in ("table5", "table6") else method, {})
        values = {"metric": found}.get(quantity) if isinstance(found, list) else found.get(quantity)  # Table 2 has metrics only
        return float(values[number - 1]) if values is not None and 1 <= number <= len(values) else math.nan


def paper_of(dataset: TaskSequence) -> Paper | None:
    """The paper's results on a data set; None unless name, number of tasks and number of users match."""
    for key, about in _file().items():
        alike = dataset.name.lower() in about["names"] and len(dataset.tasks) == about["tasks"]
        users = len(np.unique(dataset.tasks[0].groups))
        if alike and min(users, about["users"]) >= LEAST_SHARE * max(users, about["users"]):
            return Paper(key, about["title"], about.get("noise_at"))
    return None
