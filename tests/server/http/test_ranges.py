"""What of a Range header is honoured."""

import pytest

from fleetwire_server.http.ranges import parse_range


@pytest.mark.parametrize(
    ("header", "parsed"),
    [
        ("bytes=0-", (0, None)),
        ("bytes=5-", (5, None)),
        ("bytes=5-9", (5, 5)),
        (" bytes=5-5 ", (5, 1)),
        ("bytes=-3", (-3, None)),
        (None, None),
        ("", None),
        ("bytes=-0", None),
        ("bytes=-", None),
        ("bytes=9-5", None),
        ("bytes=0-1,5-6", None),
        ("bytes=a-b", None),
        ("bytes=٣-٤", None),
        ("lines=0-1", None),
        ("bytes=" + "9" * 19 + "-", None),
    ],
)
def test_one_range_of_bytes_is_honoured(header: str | None, parsed: tuple[int, int | None] | None) -> None:
    assert parse_range(header) == parsed
