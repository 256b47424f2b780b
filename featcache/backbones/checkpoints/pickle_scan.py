"""What a pickle would do, found out without doing it.

Pickles of checkpoints are read here with stand-ins for every class and function that they name:
nothing is imported and nothing runs. That shows, before memory is spent, which code the file asks
for and how large its tensors claim to be.
"""

import io
import math
import pickle
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, deque

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Modules that hold another one and nothing else (DataParallel, torch.compile): the name of their only child.
WRAPPERS = ({"module"}, {"_orig_mod"})


class StandIn:
    """Takes the place of any object: swallows arguments, items and state, and remembers them."""

    # Pickles make objects without calling __init__ too.
    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        """Swallow an item."""

    def extend(self, items):
        """Swallow items."""


class Scan(pickle._Unpickler):  # The pure Python one: the C one trusts the lengths that a file claims.
    """Reads a pickle into stand-ins.

    globals: every MODULE.NAME that it names. storages: key to (type's name, elements) as claimed.
    tensors: (elements of the shape, elements of the storage, type's name) of every tensor. content: what
    the pickle holds, made of stand-ins.
    """

    def __init__(self, file, tensor=None):
        super().__init__(file, encoding="latin-1")
        self.globals, self.storages, self.tensors = set(), {}, []
        self.content = None
        self._types = {}
        self._tensor = tensor

    def load(self):
        """Read one pickle and return its content."""
        self.content = super().load()
        return self.content

    def find_class(self, module, name):
        """Return a stand-in class of that name; of torch's tensor builder, this object's own."""
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

    def persistent_load(self, pid):
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

    def _rebuild(self, storage, offset, size, *rest):
        kind, key, elements = storage.args
        size = tuple(size)
        if not all(isinstance(n, int) and n >= 0 for n in (offset, *size)):
            raise pickle.UnpicklingError(f"a tensor of shape {size}")
        self.tensors.append((math.prod(size), elements, kind))
        return self._tensor(kind, key, offset, size, rest[0]) if self._tensor else StandIn()


def scan_pickle(data):
    """Scan the bytes of a pickle. Raises what damaged pickles raise."""
    scan = Scan(io.BytesIO(data))
    scan.load()
    return scan


def scan_legacy(file):
    """Scan a file of torch.save before PyTorch 1.6, pickles in a row and then raw storages, or a plain pickle."""
    scan = Scan(file)
    if scan.load() != LEGACY_MAGIC:
        return scan
    for _ in ("protocol", "system", "content"):
        scan = Scan(file)
        scan.load()
    return scan


def saved_module(content):
    """Find the outermost nn.Module in the content of a Scan: (the keys that lead to it, its class), or None.

    Of a module that only wraps another one, the inner one's class is named.
    """
    queue, seen = deque([((), content)]), set()
    while queue:
        way, item = queue.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, StandIn):
            if _is_module(item):
                return ".".join(way), type(_unwrapped(item)).__name__
            item = item.state
        if isinstance(item, list | tuple):
            item = dict(enumerate(item))
        if isinstance(item, dict):
            queue.extend(((*way, str(key)), value) for key, value in item.items())
    return None


def _unwrapped(module):
    children = module.state["_modules"]
    if isinstance(children, dict) and children.keys() in WRAPPERS:
        (child,) = children.values()
        if _is_module(child):
            return _unwrapped(child)
    return module


def _is_module(item):
    return (
        isinstance(item, StandIn) and isinstance(item.state, dict) and {"_parameters", "_modules"} <= item.state.keys()
    )
