"""What a recipe must not say, in one line for the person who wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class RecipeError(ValueError):
    """A recipe or command line that cannot be run. The message is one line for the person who wrote it."""


def require(condition: bool, must: str, got: object, advice: str) -> None:
    """Raises RecipeError "{must}; got {got!r}; {advice}" unless `condition` holds."""
    if not condition:
        raise RecipeError(f"{must}; got {got!r}; {advice}")


def require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises RecipeError unless `value` is one of `choices`."""
    require(
        value in choices, f"{key} must be one of {', '.join(choices)}", value, f"set {key}={choices[0]}, for example"
    )


def require_at_least(key: str, value: float, minimum: float) -> None:
    """Raises RecipeError if `value` is below `minimum`."""
    require(value >= minimum, f"{key} must be at least {minimum}", value, "give a larger number")


def require_known(prefix: str, given: Iterable[str], valid: Sequence[str], where: str) -> None:
    """Raises RecipeError for the first of the given keys, which stand behind `prefix`, that is not valid."""
    for key in given:
        if key not in valid:
            raise RecipeError(f"unknown key {f'{prefix}{key}'!r} {where}; valid keys are {', '.join(valid)}")
