"""`syncbn convert-check` on real models: the rows of docs/convert_check.md.

All in float64, with batches of 4 small images and random weights; nothing is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from syncbn.convert_check import compare
from syncbn.named_model import build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "convert_check.md"
ROWS = re.findall(r"^\| `([\w:]+)` \| (\d+) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "size", "layers"), ROWS, ids=[row[0] for row in ROWS])
def test_row(name: str, size: str, layers: str) -> None:
    found = compare(build(name, 4, int(size)), "sync")
    assert found.refused == []
    assert found.reverted
    assert sum(found.replaced.values()) == int(layers)
    assert found.differences["outputs in evaluation"][0] == found.differences["outputs after revert"][0] == 0
    # What the page says; the command allows a thousand times as much.
    assert max(difference for difference, _ in found.differences.values()) < 1e-9, found.differences


def test_the_page_has_the_families() -> None:
    assert len(ROWS) > 30
    assert {name.partition(":")[0] for name, _, _ in ROWS} >= {"timm", "transformers"}
