"""torchvision's models, imported without torch's compiler. Whatever of featcache needs them takes them from here.

One of torchvision's operators imports a module of torch._dynamo for a function that it calls only when
it is compiled. That import loads the whole compiler and sympy, and is as long as torch's own.
"""

import sys
import types
from importlib import import_module

COMPILER, FUNCTION = "torch._dynamo.utils", "is_compile_supported"


class _Later(types.ModuleType):
    """Takes the compiler's place while torchvision is imported. Whatever else is asked of it comes from the real one."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == FUNCTION:
            return lambda *words: getattr(self.real(), FUNCTION)(*words)
        return getattr(self.real(), name)

    def real(self):
        """Make way for the real module and return it."""
        self.make_way()
        return import_module(COMPILER)

    def make_way(self):
        """Leave the table of modules."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]


def _import_models():
    later = _Later(COMPILER)
    sys.modules.setdefault(COMPILER, later)
    try:
        return import_module("torchvision.models")
    finally:
        later.make_way()


models = _import_models()
