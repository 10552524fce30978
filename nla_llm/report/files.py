"""Writing files so that a reader sees the old ones or the new ones, never half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class ReportError(OSError):
    """A report could not be written; the message is a sentence that says where and why."""


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files under ``folder``, given by their relative paths; all are complete before the first gets its name.

    Raises
    ------
    ReportError
        If the folder cannot be made or written to, or the disk is full. What was there before is still there whole.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for name, content in contents.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            written.append((_write_beside(target, content), target))
        for temporary, target in written:
            temporary.replace(target)
    except OSError as error:
        last = Path(str(error.filename or folder)).name
        reason = error.strerror or str(error)
        raise ReportError(
            f"the report cannot be written to {folder} ({last}: {reason}); make the folder writable, free space on its "
            "disk, or pass another folder"
        ) from error
    finally:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _write_beside(target: Path, content: bytes) -> Path:
    """Temporary file with the content, on the disk of its target."""
    if target.is_dir():
        raise IsADirectoryError(21, "a folder has this name", str(target))
    path = target.with_name(f".{target.name[:60]}.{secrets.token_hex(6)}.tmp")
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a crash after the renaming could leave an empty file under the right name
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    return path
