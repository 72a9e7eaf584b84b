"""Whether a notebook printed what it printed before, up to the rounding of other hardware.

nbval compares strings. The cores of another machine sum in another order, so that a trained SAE differs in its last bits, and
a mean of two digits now and then in its last one.
"""

import re

NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?%?")


def near(found: str, expected: str) -> bool:
    """Whether numbers differ by 2 %, or by one unit of the last digit, at most. Whole numbers below 100 must be equal."""
    a, b = (float(number.rstrip("%")) for number in (found, expected))
    if re.fullmatch(r"-?\d{1,2}", expected):
        return a == b
    mantissa, _, power = expected.rstrip("%").partition("e")
    unit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= max(0.02 * abs(b), 1.001 * unit)


class Printed(str):
    """What a cell printed: equal to what has the same words and near numbers."""

    __hash__ = str.__hash__

    def __eq__(self, other) -> bool:
        numbers = zip(NUMBER.findall(self), NUMBER.findall(other))
        return NUMBER.sub("#", self) == NUMBER.sub("#", other) and all(near(*pair) for pair in numbers)

    def __ne__(self, other) -> bool:
        return not self == other
