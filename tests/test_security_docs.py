"""The page of security names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_threat_has_a_test_that_exists():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) >= 13
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert [name for name in named if f"def {name}(" not in tests] == []
