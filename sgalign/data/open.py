"""A data set from its folder, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgalign.data.vrd import VRDDataset


def open_dataset(root: str | Path, split: str, **options: Any) -> VRDDataset:
    return VRDDataset(root, split, **options)  # type: ignore[arg-type]
