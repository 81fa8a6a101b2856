"""How the code is laid out: modules per folder, import arrows, and circles, for Python and C++.

    python -m tests.structure [ROOT]

An arrow is a pair of modules, or of places, of which the first imports from the second anywhere (also inside a
function, or for type checking only). Includes of C++ files count in the same way.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOMS", "Structure", "circles", "imports", "place", "structure"]

ROOMS = ("lightforcing_ref", "plugins", "export", "runtime", "engines", "serving", "training", "benchmarks")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Structure:
    """Python modules as `export/build.py`, folders as `export/cli`; C++ files apart from both."""

    modules: Mapping[str, frozenset[str]]
    """Module -> the modules that it imports."""
    sources: Mapping[str, frozenset[str]]
    """C++ file -> the files of ours that it includes."""

    def places(self) -> dict[str, frozenset[str]]:
        """Place -> the other places that its modules import from; see `place`."""
        found: dict[str, set[str]] = {}
        for module, imported in self.modules.items():
            found.setdefault(place(module), set()).update(place(other) for other in imported)
        return {name: frozenset(others - {name}) for name, others in sorted(found.items())}

    def sizes(self) -> dict[str, int]:
        """Folder -> the number of its modules, without `__init__` and `__main__`."""
        found: dict[str, int] = {}
        for module in self.modules:
            if Path(module).stem not in ("__init__", "__main__"):
                found[_folder(module)] = found.get(_folder(module), 0) + 1
        return dict(sorted(found.items()))


def place(module: str) -> str:
    """The place of a module on a room's floors: its folder, or itself where it stands at the top of the room."""
    folder, _, _ = module.rpartition("/")
    return folder if "/" in folder else module.removesuffix(".py")


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, relative ones resolved; `from a import b` gives `a.b`."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)


def structure(root: Path) -> Structure:
    """The structure of the checkout at `root`."""
    paths = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    names = {_dotted(path.relative_to(root)): path.relative_to(root).as_posix() for path in paths}
    modules = {}
    for path in paths:
        found = {_module(name, names) for _, name in imports(path, root)}
        own = path.relative_to(root).as_posix()
        modules[own] = frozenset(module for module in found if module is not None and module != own)
    files = [path for pattern in ("*.h", "*.cpp") for path in sorted((root / "plugins").rglob(pattern))]
    known = {path.relative_to(root).as_posix() for path in files}
    sources = {}
    for path in files:
        near = [path.parent, *(root / "plugins" / folder for folder in ("launch", "tensorrt"))]
        included = _INCLUDE.findall(path.read_text(encoding="utf-8"))
        places = ((folder / name).relative_to(root).as_posix() for name in included for folder in near)
        sources[path.relative_to(root).as_posix()] = frozenset(place for place in places if place in known)
    return Structure(modules, sources)


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another, largest first; none in a graph without circles."""
    reach = {node: _reachable(node, graph) for node in graph}
    groups = {frozenset({node, *(n for n in reach[node] if node in reach.get(n, ()))}) for node in graph}
    return sorted((sorted(group) for group in groups if len(group) > 1), key=len, reverse=True)


def _reachable(start: str, graph: Mapping[str, Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for node in graph.get(waiting.pop(), ()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _module(name: str, names: Mapping[str, str]) -> str | None:
    """The file that a dotted name leads to: the module itself, or the one that holds the name."""
    return names.get(name) or names.get(name.rpartition(".")[0])


def _folder(module: str) -> str:
    return module.rpartition("/")[0]


def _within(room: str, graph: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """What lies in a room, and of its arrows those that stay there."""
    inside = {node for node in graph if node.split("/")[0] == room}
    return {node: graph[node] & inside for node in sorted(inside)}


def _report(root: Path) -> Iterator[str]:
    found = structure(root)
    places, sizes = found.places(), found.sizes()
    yield f"{'room':<18}{'folders':>8}{'modules':>9}{'largest':>9}{'arrows':>8}{'places':>9}{'circles':>9}"
    for room in ROOMS:
        own = _within(room, found.modules)
        counted = [count for folder, count in sizes.items() if folder.split("/")[0] == room]
        yield (
            f"{room:<18}{len(counted):>8}{sum(counted):>9}{max(counted, default=0):>9}"
            f"{sum(map(len, own.values())):>8}{sum(map(len, _within(room, places).values())):>9}{len(circles(own)):>9}"
        )
    yield ""
    yield from (f"{folder:<32}{count:>4} modules" for folder, count in sizes.items())
    for kind, graph in (("modules", found.modules), ("places", places), ("C++ files", found.sources)):
        for circle in circles(graph):
            yield f"circle of {kind}: {', '.join(circle)}"


if __name__ == "__main__":
    print("\n".join(_report(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())))
