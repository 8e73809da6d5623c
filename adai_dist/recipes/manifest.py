"""What a checkpoint says of itself, in about.json: its step, its files, and the parameters it was written of.

A folder with a readable about.json is a complete checkpoint; the sizes and checksums in it tell whether it still is.
A checksum is a CRC-32, which finds accidents, not malice. It is taken of the file as it is read back after writing.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from adai_dist.recipes import durable
from adai_dist.recipes.world import World

Shapes = dict[str, list[int]]
"""By the name of a parameter, its shape in the whole model."""

_NAME = "about.json"
_CHUNK_BYTES = 1 << 22
_RANK_IN_NAME = re.compile(r"(?:__|pp_rank_)(\d+)_")  # torch: __3_0.distcp; DeepSpeed: zero_pp_rank_3_mp_rank_00_...


@dataclass(frozen=True)
class FileSum:
    """One file of a checkpoint as it was written."""

    size: int
    """Bytes."""
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """The content of about.json."""

    step: int
    world_size: int
    shapes: Shapes
    files: dict[str, FileSum]
    """By path below the folder."""

    def write(self, folder: Path) -> None:
        """Makes the folder a complete checkpoint; its other files must be on the disk."""
        durable.write_text(folder / _NAME, json.dumps(asdict(self)) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None where it is missing or cannot be understood."""
    try:
        about: Any = json.loads((folder / _NAME).read_text())
        files = {str(name): FileSum(int(of["size"]), int(of["crc32"])) for name, of in about["files"].items()}
        shapes = {str(name): [int(size) for size in shape] for name, shape in about["shapes"].items()}
        return Manifest(int(about["step"]), int(about["world_size"]), shapes, files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def sum_files(folder: Path, world: World) -> dict[str, FileSum]:
    """Sizes and checksums of this rank's share of the files, which are on the disk afterwards.

    Its share are the files that it wrote itself, judged by their names: they lie in the memory of its own machine.

    Raises:
        OSError: a file cannot be read, or not be brought to the disk.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    share = [name for name in names if _is_mine(name, world)]
    for name in share:
        durable.sync(folder / name)
    return {name: _sum(folder / name) for name in share}


def find_damage(folder: Path, files: Mapping[str, FileSum], world: World) -> str | None:
    """What is wrong with this rank's share of the files, in words; None where nothing is."""
    for name, expected in files.items():
        if not _is_mine(name, world):
            continue
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                return f"{name} has {size:,} bytes instead of {expected.size:,}"
            if _sum(path) != expected:
                return f"{name} does not have the content that was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def compare_shapes(saved: Shapes, current: Shapes) -> str | None:
    """The first difference between the parameters of two models, in words; None where there is none."""
    for name, shape in current.items():
        if name not in saved:
            return f"it has no parameter {name!r}"
        if saved[name] != shape:
            return f"its {name!r} has the shape {tuple(saved[name])} instead of {tuple(shape)}"
    extra = next((name for name in saved if name not in current), None)
    return None if extra is None else f"its {extra!r} is no parameter of this model"


def _is_mine(name: str, world: World) -> bool:
    match = _RANK_IN_NAME.search(name)
    return (int(match[1]) if match else 0) % world.size == world.rank


def _sum(path: Path) -> FileSum:
    size, crc32 = 0, 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_read := cast(int, file.readinto(buffer)):
            crc32 = zlib.crc32(buffer[:num_read], crc32)
            size += num_read
    return FileSum(size, crc32)
