"""What changes in a model that takes the operations: `python examples/adopt/diffs.py` writes it into docs/adopt.md."""

import difflib
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "adopt.md"
FAMILIES = ("ijepa", "vjepa2", "lejepa")
BLOCK = re.compile(r"(<!-- diff:begin (\w+), [^\n]*-->\n).*?(<!-- diff:end -->)", re.DOTALL)


def diff(family: str) -> list[str]:
    """The unified diff from the plain training to the one with the operations, with one line of context."""
    before, after = f"{family}.py", f"{family}_ops.py"
    texts = [(HERE / name).read_text(encoding="utf-8").splitlines() for name in (before, after)]
    return list(difflib.unified_diff(*texts, before, after, n=1, lineterm=""))


def counts(family: str) -> tuple[int, int]:
    """Number of lines that are new or changed, and by how many lines the file is shorter; blank lines do not count."""
    lines = [line for line in diff(family) if line[1:].strip() and not line.startswith(("---", "+++"))]
    new, old = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    return new, old - new


def section(family: str) -> str:
    new, fewer = counts(family)
    body = "\n".join(diff(family)[2:])
    return f"**{new} lines are new or changed**, and the file is {fewer} lines shorter.\n\n```diff\n{body}\n```\n"


def page(text: str) -> str:
    """The text of the page with the diffs of the files as they are now."""
    return BLOCK.sub(lambda found: found[1] + section(found[2]) + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
