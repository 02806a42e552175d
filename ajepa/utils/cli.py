"""Command lines: flags from a dataclass, `--version`, and a short `--help` for a command with many flags."""

import ast
import dataclasses
import inspect
import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ajepa.utils.version import VERSION

T = TypeVar("T")


def parse(
    arguments: type[T],
    argv: Sequence[str] | None,
    prog: str,
    default: T | None = None,
    first: Sequence[str] = (),
) -> T:
    """An instance of the dataclass `arguments` from `argv` (None: the process's own arguments), by tyro.

    `--version` prints the version. If `first` names fields, `--help` describes only these flags, with their values
    in `default`, and `--help-all` describes every flag. Flags of nested dataclasses have no prefix.
    """
    import tyro  # here, because engines and benchmarks read configurations without it

    words = list(sys.argv[1:] if argv is None else argv)
    if "--version" in words:
        print(f"ajepa {VERSION}")
        raise SystemExit(0)
    if "--help-all" in words:
        words = ["--help"]
    elif first and {"--help", "-h"} & set(words):
        print(short_help(arguments, prog, default, first))
        raise SystemExit(0)
    options: dict[str, Any] = {} if default is None else {"default": default}
    return expanded(tyro.cli(arguments, args=words, prog=prog, config=(tyro.conf.OmitArgPrefixes,), **options))


def expanded(value: Any) -> Any:
    """`value` with `~` at the start of a text replaced by the home folder, in dataclasses, lists and tuples as well."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(expanded, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: new for name, old in fields.items() if (new := expanded(old)) != old}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def short_help(arguments: type, prog: str, default: Any, first: Sequence[str]) -> str:
    """The usage, and the flags of the fields `first` with their descriptions."""
    fields = {name: (kind, text) for name, kind, text in describe(arguments)}
    values = dict(leaves(default))
    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"usage: {prog} [FLAGS]", "", inspect.getdoc(arguments) or "", ""]
    for name in first:
        kind, text = fields[name]
        lines.append(f"  {flag(name)} {choices(kind)}".rstrip())
        text += f" (default: {shown(values[name])})"
        lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    rest = len(fields) - len(first)
    lines += ["", f"{rest} more flags set everything else; --help-all describes all of them."]
    return "\n".join(lines)


def describe(arguments: type) -> list[tuple[str, Any, str]]:
    """(name, type, description) of each field of a dataclass and of those nested in it."""
    hints, texts = get_type_hints(arguments), descriptions(arguments)
    found: list[tuple[str, Any, str]] = []
    for field in dataclasses.fields(arguments):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found += describe(kind)
        else:
            found.append((field.name, kind, texts.get(field.name, "")))
    return found


def descriptions(arguments: type) -> dict[str, str]:
    """The string below each field of a dataclass, which tyro shows as the flag's description."""
    body = ast.parse(textwrap.dedent(inspect.getsource(arguments))).body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            texts[field.target.id] = " ".join(below.value.value.split())
    return texts


def leaves(node: Any) -> list[tuple[str, Any]]:
    """(name, value) of each field of a dataclass instance and of those nested in it."""
    found = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        found += leaves(value) if dataclasses.is_dataclass(value) else [(field.name, value)]
    return found


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def choices(kind: Any) -> str:
    """What a flag takes, as tyro writes it: `{a,b}`, INT, FLOAT or STR; nothing for a switch."""
    options = [option for option in get_args(kind) if option is not type(None)] or [kind]
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, options))}}}"
    return {bool: "", int: "INT", float: "FLOAT"}.get(options[0], "STR")


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
