"""The methods that TERACON is compared with, on one backbone: all run on packed rows."""

from __future__ import annotations

from teracon_fast.methods.base import Group, Method, Place, Sizes, group
from teracon_fast.methods.conure import Conure
from teracon_fast.methods.fine_all import FineAll
from teracon_fast.methods.hat import HAT
from teracon_fast.methods.multi_task import MTL
from teracon_fast.methods.piggyback import Piggyback
from teracon_fast.methods.single import SinMo

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SinMo,
        FineAll,
        MTL,
        Piggyback,
        HAT,
        Conure,
    )
}  # fmt: skip

__all__ = [
    "HAT",
    "METHODS",
    "MTL",
    "Conure",
    "FineAll",
    "Group",
    "Method",
    "Piggyback",
    "Place",
    "SinMo",
    "Sizes",
    "group",
]
