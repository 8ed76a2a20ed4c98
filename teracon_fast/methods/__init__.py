"""The methods that TERACON is compared with, on one backbone: all run on packed rows."""

from __future__ import annotations

from teracon_fast.methods.base import Group, Method, Place, Sizes, group
from teracon_fast.methods.fine_all import FineAll
from teracon_fast.methods.hat import HAT
from teracon_fast.methods.multi_task import MTL
from teracon_fast.methods.parameter_masks import ParameterMasks
from teracon_fast.methods.peterrec import PeterRec
from teracon_fast.methods.single import SinMo
from teracon_fast.methods.teracon import Teracon

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SinMo,
        FineAll,
        PeterRec,
        MTL,
        HAT,
        Teracon,
        ParameterMasks,
    )
}  # fmt: skip

__all__ = [
    "HAT",
    "METHODS",
    "MTL",
    "FineAll",
    "Group",
    "Method",
    "ParameterMasks",
    "PeterRec",
    "Place",
    "SinMo",
    "Sizes",
    "Teracon",
    "group",
]
