"""`ajepa`, or `python -m ajepa`: lists the commands, and runs the one that is named first on the command line."""

import ast
import difflib
import importlib
import re
import sys
from pathlib import Path

from ajepa.utils.version import VERSION

COMMANDS = ("train", "probe", "finetune", "embed", "export", "convert", "pack", "doctor")


def summary(command: str) -> str:
    """The first sentence of a command's docstring, read from its file because importing the module would load torch."""
    tree = ast.parse(Path(__file__).with_name(f"{command}.py").read_text("utf-8"))
    paragraph = (ast.get_docstring(tree) or "").split("\n\n")[0]
    text = re.sub(r"^`[^`]*`:", "", " ".join(paragraph.split())).strip()  # some begin with their command line
    text = re.split(r"[.:] ", text, maxsplit=1)[0].rstrip(".:")
    return text[:1].upper() + text[1:]


def usage() -> str:
    lines = [f"  {command:<10}{summary(command)}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: ajepa COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "`ajepa COMMAND --help` explains a command. `ajepa COMMAND`, `ajepa-COMMAND` and `python -m ajepa.COMMAND`",
            "are the same. `ajepa --version` prints the version.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Print the list of commands or the version, or run a command. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"ajepa {VERSION}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: {name} is not a command{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"ajepa.{name}")
    sys.argv = [f"ajepa {name}", *arguments[1:]]  # from which the command reads its options
    return module.main()


if __name__ == "__main__":
    sys.exit(main())
