"""How the HTML pages of `audit` and `attack` are made: each fills the blocks of one base, with the same style."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render_page(
    package: str,
    values: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]],
    finalize: Callable[[Any], Any] | None = None,
) -> str:
    """The `page.html` of a package, filled in: everything is escaped, a name that is not there is an error.

    The page extends `core/base.html`, which says what it wants of each, and may import `core/parts.html`. `finalize` is
    done to every value before it is written.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("dpf_release.core", "")]),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template("page.html").render(values)
