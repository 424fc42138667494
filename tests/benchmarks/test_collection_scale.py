"""The data path's benchmark, on a small collection."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks/ is of the source tree, not of the package

from benchmarks import collection_scale

pytestmark = pytest.mark.no_kernels


@pytest.mark.forks
def test_every_row_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both numbers of items, beside the rows of earlier runs; and the scores are gone."""
    output = tmp_path / "scale.json"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for items, ranks in (("9e3", ["2"]), ("5e3", [])):
        small = ["--draws", "1e3", "--batches", "4", "--seconds", "0.01"]
        where = ["--output", str(output), "--folder", str(scratch)]
        monkeypatch.setattr(sys, "argv", ["scale", "--items", items, *small, *where, "--ranks", *ranks])
        collection_scale.main()
    monkeypatch.setattr(
        sys, "argv", ["scale", "--items", "--plan", "1e6", "10", "--seconds", "0.01", "--output", str(output)]
    )
    collection_scale.main()
    document = json.loads(output.read_text())
    assert [row["bytes_of_a_rank"] for row in document["plan"]] == [8 * 24 * 4096 + 24 * 245] * 2
    rows = document["rows"]
    assert [row["items"] for row in rows] == sorted(row["items"] for row in rows)
    of_large = [row for row in rows if row["items"] == 9000]
    assert {row["row"] for row in of_large} == {
        "memory",
        "score file to table",
        "1000 draws",
        "4 batches of 256",
        "sharded over 2 processes",
    }
    assert not [row for row in rows if "reason" in row]
    memory, sharded = (next(row for row in of_large if row["row"].startswith(word)) for word in ("memory", "sharded"))
    assert memory["table_bytes"] == 8 * 9000 + 24 * 3 + 32
    assert sharded["bytes_of_a_rank"] == 8 * 4904 + 24 * 3
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("items", ["0", "1.5", "1e11", "many"])
def test_items_are_a_number_of_them(items: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scale", "--items", items])
    with pytest.raises(SystemExit):
        collection_scale.main()
