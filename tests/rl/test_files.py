"""Files written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from warp_fast.rl.files import replaced


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), r"\[Errno 28\] No space left on device"),
        (Exception("I/O error: No space left on device (os error 28)"), "I/O error: No space left"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            "full",
        ),
    ],
)
def test_what_could_not_be_written_is_named(tmp_path: Path, error: Exception, reason: str) -> None:
    """torch, safetensors and tokenizers raise errors of their own on a full disk, with no path."""
    (tmp_path / "state").write_text("old")
    with pytest.raises(OSError, match=f"state could not be written: .*{reason}"):
        with replaced(tmp_path / "state") as aside:
            aside.write_text("half")
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_text() == "old"


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replaced(tmp_path / "state"):
        raise KeyError("x")
