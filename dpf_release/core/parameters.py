"""Parameters in a name: `recombine:k=20,patch=2`. What declares them says their type, default and bounds once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpf_release.errors import ConfigError

Value = int | float


@dataclass(frozen=True)
class Parameter:
    """A parameter, as it is declared."""

    name: str
    default: Value  # whose type, `int` or `float`, is the parameter's
    low: float
    high: float
    help: str  # what it is, in one line

    def check(self, owner: str, value: Value) -> Value:
        """The value, of the parameter's type.

        Raises:
            ConfigError: it is out of bounds, or not a whole number where one is needed; names `owner:name`.
        """
        name = f"{owner}:{self.name}"
        if not self.low <= value <= self.high:
            raise ConfigError(f"expected {name} from {self.low:g} to {self.high:g}, found {value:g}.")
        if isinstance(self.default, int) and value != int(value):
            raise ConfigError(f"expected a whole number for {name}, found {value:g}.")
        return type(self.default)(value)

    def vary(self, value: Value, generator: np.random.Generator) -> Value:
        """Another value near it: half to double, within the bounds, and of the parameter's type."""
        drawn = min(max(value * 2 ** generator.uniform(-1, 1), self.low), self.high)
        return round(drawn) if isinstance(self.default, int) else float(drawn)


def parse_parameters(owner: str, text: str, declared: Sequence[Parameter]) -> dict[str, Value]:
    """The values of `k=20,patch=2`, checked against all that are declared; those that it leaves out are not in it.

    Raises:
        ConfigError: another form, no such parameter, no number, or one out of bounds.
    """
    if text and not re.fullmatch(r"\w+=[^,=]+(,\w+=[^,=]+)*", text):
        raise ConfigError(f"expected parameters as in 'recombine:k=20,patch=2', found {owner + ':' + text!r}.")
    known = {parameter.name: parameter for parameter in declared}
    values: dict[str, Value] = {}
    for key, value in (pair.split("=") for pair in text.split(",") if pair):
        if key not in known:
            raise ConfigError(f"{owner} has the parameters {list(known) or 'none'}, found {key!r} in {text!r}.")
        try:
            number = int(value) if re.fullmatch(r"-?\d+", value) else float(value)
        except ValueError:
            raise ConfigError(f"expected a number for {owner}:{key}, found {value!r}.") from None
        values[key] = known[key].check(owner, number)
    return values
