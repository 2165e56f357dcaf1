"""What is told to a user is one line, whatever a stranger's file says."""

import pytest

from puredif_jax.types import InputError


@pytest.mark.parametrize(
    "text,shown",
    [
        ("Größe 3 is no size", "Größe 3 is no size"),
        ("class \x1b]0;title\x07 is unknown", r"class \x1b]0;title\x07 is unknown"),
        ("two\nlines", r"two\nlines"),
        ("right to left: \u202eabc", r"right to left: \u202eabc"),
        ("x" * 10**6 + "y", "x" * 500 + " ... " + "x" * 494 + "y"),
    ],
)
def test_messages_are_short_and_printable(text: str, shown: str) -> None:
    assert str(InputError(text)) == f"{InputError(text)}" == shown
