"""What nbval takes for the same output: rounding of other hardware, and nothing else."""

import pytest
from printed import Printed


@pytest.mark.parametrize("found,expected", [
    ("{'tokens': 0.42}\n45 SAEs\n", "{'tokens': 0.43}\n45 SAEs\n"), ("71% and 59%", "72% and 59%"), ("1.1%", "1.2%"),
    ("1022 live", "1023 live"), ("-.08", "-.09"), ("1.2e-05", "1.1e-05"), ("no number", "no number")])
def test_the_last_digit_may_differ(found, expected):
    assert Printed(found) == expected and not Printed(found) != expected


@pytest.mark.parametrize("found,expected", [
    ("44 SAEs", "45 SAEs"), ("0.40", "0.43"), ("70%", "72%"), ("0.42 nats", "0.42 bits"), ("0.42", "0.42 0.42"),
    ("900 live", "1023 live"), ("0.1", "-0.1"), ("1.2e-05", "1.2e-04"), ("found", "not seen")])
def test_more_is_another_output(found, expected):
    assert Printed(found) != expected and not Printed(found) == expected


def test_notebooks_are_compared_so(request):
    cells = [item for item in request.session.items if type(item).__name__ == "IPyNbCell"]
    if not cells:
        pytest.skip("no notebook is tested beside this")
    assert all(isinstance(cell.sanitize("0.42"), Printed) for cell in cells)
