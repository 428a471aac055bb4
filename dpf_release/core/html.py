"""How the HTML pages of `audit` and `attack` are made: one template each, and the style that they share."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup


def page_template(
    package: str, filters: dict[str, Callable[..., Any]], finalize: Callable[[Any], Any] | None = None
) -> Template:
    """The template `page.html` of a package: everything is escaped, a name that is not there is an error.

    Args:
        package: as `dpf_release.audit`.
        filters: by name.
        finalize: what is done to every value before it is written.
    """
    environment = Environment(
        autoescape=True, finalize=finalize, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    environment.globals["style"] = Markup(_text("dpf_release.core", "page.css"))
    return environment.from_string(_text(package, "page.html"))


def _text(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
