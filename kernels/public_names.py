"""Records the public interface of `ajepa_kernels`: `python kernels/public_names.py` writes kernels/public_names.txt.

The file has the version, and a line for each public name with its arguments and their defaults; annotations are left
out. It changes only together with the version, by the rules of docs/adopt.md: what a release removed or changed makes
the next one a breaking one, and this program refuses to record it under a version that promises not to break.
"""

import ast
import inspect
import sys
from pathlib import Path

import ajepa_kernels

FILE = Path(__file__).with_suffix(".txt")


def arguments(function: object) -> str:
    """The arguments of a function or class in the order and with the defaults of its signature."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare)).replace("<class '", "").replace("'>", "")


def interface() -> list[str]:
    """A line for each public name, and for each public method that a class of the package defines."""
    lines = []
    for name in sorted(ajepa_kernels.__all__):
        value = getattr(ajepa_kernels, name)
        lines.append(name + (arguments(value) if callable(value) else f": {type(value).__name__}"))
        if inspect.isclass(value):
            methods = {key: getattr(value, key) for key in vars(value) if not key.startswith("_")}
            lines += [f"{name}.{key}{arguments(m)}" for key, m in sorted(methods.items()) if inspect.isroutine(m)]
    return lines


def calls(line: str) -> tuple[str, list[tuple], list[tuple]]:
    """The name of a line, its positional arguments and its keyword-only ones, each with its default or None."""
    name, bracket, rest = line.partition("(")
    if not bracket:
        return line, [], []
    (function,) = ast.parse(f"def f({rest}: ...").body
    given = function.args  # type: ignore[attr-defined]
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    pairs = [(a.arg, d and ast.unparse(d)) for a, d in zip(positional, defaults, strict=True)]
    named = [(a.arg, d and ast.unparse(d)) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return name, pairs, named + [(f"*{a.arg}", "") for a in (given.vararg, given.kwarg) if a]


def keeps(before: str, after: str) -> bool:
    """Whether each call that the old line allows means the same by the new one: only optional arguments are new."""
    (old, old_places, old_names), (new, places, names) = calls(before), calls(after)
    added = [*places[len(old_places) :], *(pair for pair in names if pair not in old_names)]
    same = places[: len(old_places)] == old_places and set(old_names) <= {*names, *places[len(old_places) :]}
    return old == new and same and all(default is not None for _, default in added)


def broken(before: list[str], after: list[str]) -> list[str]:
    """The old lines of names that are gone, and of names that no longer take the same calls."""
    return [line for line in before if not any(keeps(line, new) for new in after)]


def promised(version: str) -> tuple[int, ...]:
    """The part of a version that a breaking release raises: the first number, or 0 and the second one."""
    major, minor, *_ = (int(number) for number in version.split("."))
    return (major,) if major else (major, minor)


def recorded() -> tuple[str, list[str]]:
    """The version and the lines of the file."""
    first, *lines = FILE.read_text(encoding="utf-8").splitlines()
    return first.removeprefix("version "), lines


def main() -> int:
    lines, version = interface(), ajepa_kernels.__version__
    if FILE.exists():
        old, before = recorded()
        if (gone := broken(before, lines)) and promised(old) == promised(version):
            print(f"{version} must keep what {old} promised. Raise the version to a breaking one; changed or removed:")
            print("\n".join(gone))
            return 1
    FILE.write_text("\n".join([f"version {version}", *lines]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
