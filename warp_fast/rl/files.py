"""Writing files so that a killed process leaves the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warp_fast.merge.write import sync, sync_entries


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the name of `path` when all went well.

    Works for a file or a directory; what a killed writer left behind is overwritten by the next.

    Raises:
        OSError: it could not be written; names `path`, whichever library wrote.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    remove(aside)
    try:
        yield aside
        sync(aside)
        if path.is_dir():
            remove(path)
        os.replace(aside, path)
        sync_entries(path.parent)
    except BaseException as error:
        remove(aside)
        reason = str(error)
        # so safetensors and tokenizers tell of an OSError
        from_system = isinstance(error, OSError) or "(os error " in reason
        if "inline_container" in reason:  # torch.save says where it stood, and not why
            reason = "torch.save failed, as it does where the disk is full"
        elif not from_system:
            raise
        raise OSError(f"{path} could not be written: {reason}") from error


def remove(path: Path) -> None:
    """Delete a file or a directory tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replaced(path) as aside:
        aside.write_text(text, encoding="utf-8")


def append_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append one line of JSON per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if it is not there."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]
