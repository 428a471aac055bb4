"""All functions and parameters as they are declared: for `dpf-release functions`, and for docs/functions.md."""

from __future__ import annotations

import inspect

from dpf_release.poisoning.chain import known_functions

TABLE_HEADER = ("function", "parameter", "default", "from", "to", "what it is")


def table_rows(trust_code: bool = False) -> list[tuple[str, ...]]:
    """One row a function, and one for each of its parameters: name, parameter, default, bounds, help."""
    rows: list[tuple[str, ...]] = []
    for name, cls in sorted(known_functions(trust_code).items()):
        summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        rows.append((name, "", "", "", "", summary))
        for parameter in cls.parameters:
            numbers = (f"{number:g}" for number in (parameter.default, parameter.low, parameter.high))
            rows.append((name, parameter.name, *numbers, parameter.help))
    return rows


def markdown() -> str:
    """The same as a Markdown table."""
    named = [(f"`{name}`", *rest) for name, *rest in table_rows()]
    lines: list[tuple[str, ...]] = [TABLE_HEADER, ("---",) * len(TABLE_HEADER), *named]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"
