"""The methods that TERACON is compared with, on one backbone: all run on packed rows."""

from __future__ import annotations

from teracon_fast.methods.base import Group, Method, Place, Sizes, group
from teracon_fast.methods.fine_all import FineAll
from teracon_fast.methods.hat import HAT
from teracon_fast.methods.multi_task import MTL
from teracon_fast.methods.single import SinMo

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SinMo,
        FineAll,
        MTL,
        HAT,
    )
}  # fmt: skip

__all__ = [
    "HAT",
    "METHODS",
    "MTL",
    "FineAll",
    "Group",
    "Method",
    "Place",
    "SinMo",
    "Sizes",
    "group",
]
