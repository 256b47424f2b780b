"""The text of a grid: YAML, files that include others, and groups that start from others."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from featcache.errors import BadInput, nearest, shown
from featcache.names import unwritable
from featcache.probes.grids.fields import check_known
from featcache.probes.grids.ranges import is_range
from featcache.probes.identity import REGISTRIES

# Anchors may make a few lines stand for any number of nodes.
MOST_NODES = 1_000_000


@dataclass(frozen=True)
class Group:
    """A group of fields, with those that it starts `from` filled in.

    path: of the group, as errors name it. origins: {field: path} and {(section, field): path} for the fields that come
    from another group.
    """

    fields: Any
    path: str
    origins: dict[Any, str] = field(default_factory=dict)

    def where(self, key: Any) -> str:
        """Return the path of a field."""
        return self.origins.get(key, f"{self.path}.{key}")


@dataclass(frozen=True)
class Written:
    """A grid without `include` and `from`.

    content: the same in plain dicts and lists. origins: {top-level field: "FILE: "} for the fields that come from an
    included file. exclude: [(path, rule)].
    """

    content: dict[str, Any]
    groups: list[Group]
    origins: dict[str, str]
    exclude: list[tuple[str, Any]]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is given twice, of which YAML readers silently keep one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # construct_mapping would also see the keys that << merges in.
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        try:
            # YAML 1.1 reads 010 as 8 and 1:30 as 90, which nobody who writes a grid means.
            if kind in ("int", "float") and re.fullmatch(r"[-+]?0[\d_]+|.*:.*", node.value):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"YAML takes {node.value} for a number of base 8 or 60; write a plain one",
                    node.start_mark,
                )
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):
            # For example the date 2001-02-30, or !!int x.
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(node.value)} is not what YAML calls {kind}", node.start_mark
            ) from None


def read_content(path: str | PathLike[str]) -> Any:
    """Read one YAML file into dicts and lists. Raises BadInput with line and column."""
    path = Path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise BadInput(f"grid not found: {path}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"cannot read grid {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read grid {path}: {error}") from None
    except RecursionError:
        raise BadInput(f"grid {path}: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"grid {path}{where}: {getattr(error, 'problem', None) or error}") from None


def assemble(content: dict[Any, Any], path: str | PathLike[str], known: Collection[str], errors: list[str]) -> Written:
    """Fill in the files that a grid includes, and the groups that its groups start from.

    content: of the file at `path`, to which `include` is relative. known: top-level fields. Adds to `errors`.
    """
    raw = Written({}, [], {}, [])
    _add(content, Path(path), "", (Path(path).resolve(),), known, raw, errors)
    filled: dict[int, Group | None] = {}
    for number in range(len(raw.groups)):
        _fill(number, raw.groups, filled, (), errors)
    groups = [group for number in range(len(raw.groups)) if (group := filled[number])]
    whole = raw.content | {"probes": [group.fields for group in groups]}
    if raw.exclude:
        whole["exclude"] = [rule for _, rule in raw.exclude]
    return Written(whole, groups, raw.origins, raw.exclude)


def check_size(content: Any, title: str) -> None:
    """Raise BadInput if a grid refers to itself, if aliases blow it up, or if it has text that cannot be written."""

    def count(value: Any, within: frozenset[int]) -> int:
        # Half a surrogate pair can be in no file; what may hold a zero byte, each field says.
        if isinstance(value, str) and "\0" not in value and (reason := unwritable(value)):
            raise BadInput(f"{title}: it holds {shown(value)}, {reason}")
        if not isinstance(value, (dict, list)):
            return 1
        if id(value) in within:
            raise BadInput(f"{title}: an alias refers to what it stands in")
        if id(value) not in sizes:
            inside = within | {id(value)}
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(count(part, inside) for part in parts)
        return sizes[id(value)]

    sizes: dict[int, int] = {}
    try:
        if count(content, frozenset()) > MOST_NODES:
            raise BadInput(f"{title}: more than {MOST_NODES:,} values")
    except RecursionError:
        raise BadInput(f"{title}: nested too deeply") from None


def _add(
    content: dict[Any, Any],
    file: Path,
    prefix: str,
    chain: tuple[Path, ...],
    known: Collection[str],
    result: Written,
    errors: list[str],
) -> None:
    """Add a file's groups to `result`, and those of its top-level fields that no file that includes it has.

    prefix: what its paths in messages begin with. chain: the file, after all that include it.
    """
    check_known(content, known, prefix, errors)
    for key, value in content.items():
        if key in known and key not in ("include", "probes", "exclude") and key not in result.content:
            result.content[key] = value
            result.origins[key] = prefix
    result.groups.extend(Group(value, where) for where, value in items(content, "probes", "group", prefix, errors))
    result.exclude.extend(items(content, "exclude", "rule", prefix, errors))
    names = content.get("include", [])
    for number, name in enumerate(names if isinstance(names, list) else [names]):
        where = f"{prefix}include" + f"[{number}]" * (names is not name)
        inner = _included(name, file, where, chain, errors)
        if inner is not None:
            path = file.parent / name
            _add(inner, path, f"{name}: ", (*chain, path.resolve()), known, result, errors)


def items(content: dict[Any, Any], key: str, what: str, prefix: str, errors: list[str]) -> list[tuple[str, Any]]:
    """Return [(path, item)] of a list in a field, [] without one. what: an item. prefix: of the field's path."""
    value = content.get(key, [])
    if not isinstance(value, list) or (key in content and not value):
        errors.append(f"{prefix}{key}: expected a list of at least one {what}")
        return []
    return [(f"{prefix}{key}[{number}]", item) for number, item in enumerate(value)]


def _included(name: Any, file: Path, where: str, chain: tuple[Path, ...], errors: list[str]) -> dict[Any, Any] | None:
    """Return the content of an included file, or add an error and return None."""
    if not isinstance(name, str) or not name or "\0" in name:
        errors.append(f"{where}: {shown(name)} is not the path of a file")
        return None
    path = file.parent / name
    if path.resolve() in chain:
        errors.append(f"{where}: {name} includes itself" + " through other files" * (len(chain) > 1))
        return None
    try:
        content = read_content(path)
        if not isinstance(content, dict):
            raise BadInput(f"grid {path}: expected fields such as probes at the top")
        check_size(content, f"grid {path}")
    except BadInput as error:
        errors.append(f"{where}: {error.message}")
        return None
    return content


def _fill(
    number: int, groups: list[Group], filled: dict[int, Group | None], chain: tuple[int, ...], errors: list[str]
) -> None:
    """Put group `number`, with the fields of the one that it starts from, into `filled`; None if it has errors."""
    if number in filled:
        return
    group = groups[number]
    filled[number] = group
    if not isinstance(group.fields, dict) or "from" not in group.fields:
        return
    filled[number] = None
    own = {key: value for key, value in group.fields.items() if key != "from"}
    base = _base(number, group, groups, chain, errors)
    if base is not None:
        _fill(base, groups, filled, (*chain, number), errors)
        if start := filled[base]:
            filled[number] = _merged(start, own, group.path, errors)


def _base(number: int, group: Group, groups: list[Group], chain: tuple[int, ...], errors: list[str]) -> int | None:
    """Return the number of the group that a group starts from, or add an error and return None."""
    name, where = group.fields["from"], f"{group.path}.from"
    names = [g.fields.get("name") if isinstance(g.fields, dict) else None for g in groups]
    bases = [n for n, other in enumerate(names) if isinstance(name, str) and other == name]
    if not bases:
        errors.append(
            f"{where}: no group is called {shown(name)}{nearest(name, [n for n in names if isinstance(n, str)])}"
        )
    elif len(bases) > 1:
        errors.append(f"{where}: {len(bases)} groups are called {name!r}")
    elif bases[0] in (*chain, number):
        errors.append(f"{where}: {name!r} starts from itself")
    else:
        return bases[0]
    return None


def _merged(base: Group, own: dict[Any, Any], path: str, errors: list[str]) -> Group:
    """Return a group that starts from another. Its fields replace those of the base, a section without a type only the
    fields that it names.
    """
    fields = dict(base.fields)
    origins = {key: base.where(key) for key in fields} | {k: v for k, v in base.origins.items() if isinstance(k, tuple)}
    for key, value in own.items():
        changes = isinstance(value, dict) and "type" not in value and not is_range(value)
        if key in REGISTRIES and key in fields and changes:
            if is_range(fields[key]):
                errors.append(f"{path}.{key}: {base.where(key)} is a choice; give a type here to replace it")
                continue
            given = fields[key]
            changed = [_section(item) | value for item in (given if isinstance(given, list) else [given])]
            fields[key] = changed if isinstance(given, list) else changed[0]
            origins |= {(key, part): f"{path}.{key}.{part}" for part in value}
        else:
            fields[key] = value
            origins = {k: v for k, v in origins.items() if k != key and not (isinstance(k, tuple) and k[0] == key)}
    return Group(fields, path, origins)


def _section(item: Any) -> dict[Any, Any]:
    return item if isinstance(item, dict) else {"type": item}
