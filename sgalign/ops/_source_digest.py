"""The digest of the sources of the compiled core.

setup.py runs this file too, so it must import neither torch nor the package.
"""

import hashlib
from pathlib import Path


def source_digest(folder: Path) -> str:
    """Return a digest of every C++ and CUDA source in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cuh", ".cu"}:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
