"""What is told to a user is one line, whatever a stranger's file says."""

import pytest

from puredif_jax.types import InputError, shown


@pytest.mark.parametrize(
    "text,shown",
    [
        ("Größe 3 is no size", "Größe 3 is no size"),
        ("class \x1b]0;title\x07 is unknown", r"class \x1b]0;title\x07 is unknown"),
        ("two\nlines", r"two\nlines"),
        ("right to left: \u202eabc", r"right to left: \u202eabc"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("a\u3164\u2800\ufe0f\U000e0101", r"a\u3164\u2800\ufe0f\U000e0101"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        ("not \udcff UTF-8", r"not \udcff UTF-8"),
        ("Zu\u0308rich, Vie\u0302\u0323t", "Zu\u0308rich, Vie\u0302\u0323t"),
        ("o" + "\u0301" * 5 + "k", "o" + "\u0301" * 3 + r"\u0301\u0301k"),
        ("x" * 10**6 + "y", "x" * 500 + " ... " + "x" * 494 + "y"),
    ],
)
def test_messages_are_short_and_printable(text: str, shown: str) -> None:
    assert str(InputError(text)) == f"{InputError(text)}" == shown


def test_what_is_shown_is_cut_where_it_is_asked_to() -> None:
    text = "".join(map(chr, range(0x41, 0x5B)))
    assert shown(text, 20) == "ABCDEFGHIJ ... VWXYZ"
    assert shown(text, 26) == text


@pytest.mark.parametrize("code", [*range(0x20), 0x7F, *range(0x80, 0xA0), 0xAD])
def test_no_control_character_is_shown(code: int) -> None:
    assert shown(chr(code)).isprintable() and shown(chr(code)).startswith("\\")


@pytest.mark.parametrize(
    "code",
    [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
)
def test_no_mark_of_direction_is_shown(code: int) -> None:
    assert shown(f"a{chr(code)}b") == f"a\\u{code:04x}b"
