"""What a pickle would do, found out without doing it.

Pickles of checkpoints are read here with stand-ins for every class and function that they name: nothing is imported
and nothing runs. Before memory is spent, that shows which code the file asks for and how large its tensors claim to be.
"""

import io
import math
import pickle
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import IO, Any

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Modules that hold another one and nothing else (DataParallel, torch.compile): the name of their only child.
WRAPPERS = ({"module"}, {"_orig_mod"})


class StandIn:
    """Takes the place of any object: swallows arguments, items and state, and remembers arguments and state."""

    # Pickles make objects without calling __init__ too.
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Swallow an item."""

    def extend(self, items: Iterable[Any]) -> None:
        """Swallow items."""


# Makes a tensor from (dtype's name, storage's key, offset, shape, stride).
MakeTensor = Callable[[str, str, int, tuple[int, ...], tuple[int, ...]], Any]


class Scan(pickle._Unpickler):  # The pure Python one, since the C one trusts the lengths that a file claims.
    """Reads a pickle into stand-ins.

    globals: every MODULE.NAME that it names. storages: {key: (type's name, elements)} as claimed. tensors: (elements
    of the shape, elements of the storage, type's name) of every tensor. content: what the pickle holds, made of
    stand-ins. tensor: if given, makes what takes the place of a tensor.
    """

    def __init__(self, file: IO[bytes], tensor: MakeTensor | None = None) -> None:
        super().__init__(file, encoding="latin-1")
        self.globals: set[str] = set()
        self.storages: dict[str, tuple[str, int]] = {}
        self.tensors: list[tuple[int, int, str]] = []
        self.content: Any = None
        self._types: dict[str, type] = {}
        self._tensor = tensor

    def load(self) -> Any:
        """Read one pickle and return its content."""
        self.content = super().load()
        return self.content

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in class of that name; for torch's tensor builder, a method of this object."""
        # Names as Python 3 has them, whatever the protocol of the file.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        self.globals.add(path)
        if path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self._rebuild
        if path == "collections.OrderedDict":
            return OrderedDict
        if path not in self._types:
            self._types[path] = types.new_class(path, (StandIn,))
        return self._types[path]

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage: ("storage", type, key, location, elements).

        Files from before PyTorch 1.6 refer in the same way to a module's class: ("module", class, file, source).
        """
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[4], int)):
            raise pickle.UnpicklingError("a reference to outside that is no storage")
        kind = getattr(pid[1], "__name__", str(pid[1])).rpartition(".")[2]
        self.storages[str(pid[2])] = (kind, pid[4])
        return StandIn(kind, str(pid[2]), pid[4])

    def _rebuild(self, storage: StandIn, offset: int, size: Iterable[int], *rest: Any) -> Any:
        kind, key, elements = storage.args
        size = tuple(size)
        if not all(isinstance(n, int) and n >= 0 for n in (offset, *size)):
            raise pickle.UnpicklingError(f"a tensor of shape {size}")
        self.tensors.append((math.prod(size), elements, kind))
        return self._tensor(kind, key, offset, size, rest[0]) if self._tensor else StandIn()


def scan_pickle(data: bytes) -> Scan:
    """Scan the bytes of a pickle. Raises what damaged pickles raise."""
    scan = Scan(io.BytesIO(data))
    scan.load()
    return scan


def scan_legacy(file: IO[bytes]) -> Scan:
    """Scan a file of torch.save before PyTorch 1.6 (pickles in a row, then raw storages), or a plain pickle."""
    scan = Scan(file)
    if scan.load() != LEGACY_MAGIC:
        return scan
    for _ in ("protocol", "system", "content"):
        scan = Scan(file)
        scan.load()
    return scan


def saved_module(content: Any) -> tuple[str, str] | None:
    """Find the outermost nn.Module in the content of a Scan: (the keys that lead to it, its class), or None.

    If the module only wraps another one, the inner one's class is named.
    """
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()
    while queue:
        keys, item = queue.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, StandIn):
            if _is_module(item):
                return ".".join(keys), type(_unwrapped(item)).__name__
            item = item.state
        if isinstance(item, list | tuple):
            item = dict(enumerate(item))
        if isinstance(item, dict):
            queue.extend(((*keys, str(key)), value) for key, value in item.items())
    return None


def _unwrapped(module: StandIn) -> StandIn:
    children = module.state["_modules"]
    if isinstance(children, dict) and children.keys() in WRAPPERS:
        (child,) = children.values()
        if _is_module(child):
            return _unwrapped(child)
    return module


def _is_module(item: Any) -> bool:
    return (
        isinstance(item, StandIn) and isinstance(item.state, dict) and {"_parameters", "_modules"} <= item.state.keys()
    )
