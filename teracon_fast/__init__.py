"""teracon_fast: the fastest exact implementation of TERACON (KDD 2023).

`from teracon_fast import FastTCN` is the drop-in for the published `NextItNet_Decoder`. Importing this package needs only
torch and numpy: no compiler, no Triton, no GPU. Names below are loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.6.0"

# In a source checkout the Triton kernels lie beside this package, not inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "__init__.py").exists():
    __path__.append(str(_root))

_HOMES = {
    "FastTCN": "teracon_fast.model.fast_tcn",
    "Request": "teracon_fast.model.fast_tcn",
    "env_report": "teracon_fast.ops.backends",
}

if TYPE_CHECKING:
    from teracon_fast.model.fast_tcn import FastTCN, Request
    from teracon_fast.ops.backends import env_report

__all__ = ["FastTCN", "Request", "__version__", "env_report"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
