"""torchvision's models, imported without torch's compiler. All of featcache takes them from here.

One of torchvision's operators imports a module of torch._dynamo for a function that it calls only when it is compiled.
That import loads the whole compiler and sympy, and takes as long as importing torch.
"""

import sys
import types
from importlib import import_module
from typing import Any

COMPILER, FUNCTION = "torch._dynamo.utils", "is_compile_supported"


class _Later(types.ModuleType):
    """Takes the compiler's place while torchvision is imported. Any other attribute comes from the real module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == FUNCTION:
            return lambda *words: getattr(self.real(), FUNCTION)(*words)
        return getattr(self.real(), name)

    def real(self) -> types.ModuleType:
        """Make way for the real module and return it."""
        self.make_way()
        return import_module(COMPILER)

    def make_way(self) -> None:
        """Leave the table of modules."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]


def _import_models() -> Any:
    later = _Later(COMPILER)
    sys.modules.setdefault(COMPILER, later)
    try:
        return import_module("torchvision.models")
    finally:
        later.make_way()


models = _import_models()
