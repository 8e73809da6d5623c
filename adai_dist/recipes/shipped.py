"""The configurations that are shipped: recipes, and DeepSpeed's files for them. Each is found by its name."""

from __future__ import annotations

from pathlib import Path

from adai_dist.recipes.refusal import require

_PACKAGE = Path(__file__).parents[1]
# A wheel holds them in the package; in a checkout they stand beside it, where people look for them.
_CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())


def find_config(folder: str, given: str | Path, key: str) -> Path:
    """Returns the path of a configuration that is given by its path, or by its name if it is a shipped one.

    Args:
        folder: recipes or deepspeed.
        given: a path, or the name of a shipped file without its ending; ./NAME is a path in any case.
        key: what the error calls it.

    Raises:
        RecipeError: there is no such file.
    """
    shipped = {path.stem: path for path in sorted((_CONFIGS / folder).iterdir())}
    path = shipped.get(str(given), Path(given))
    must = f"{key} must be a file, or the name of a shipped one"
    require(path.exists(), must, str(given), f"give the path of a file, or one of {', '.join(shipped)}")
    return path
