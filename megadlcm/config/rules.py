"""The checks that the config sections share; each failure is one line with the way out."""

from __future__ import annotations

import math
from typing import Any

from data_pipeline.errors import InputError


def require_at_least(section: str, config: Any, minimum: float, *keys: str) -> None:
    """Refuses a number below a minimum, and one that is not finite.

    Args:
        section: dotted name of the section, for the message; empty for the run itself.
        config: the section.
        minimum: smallest allowed value.
        keys: fields to check; None passes.

    Raises:
        InputError: a field is below the minimum.
    """
    for key in keys:
        value = getattr(config, key)
        # `not (>=)`, because a NaN compares false with everything
        if value is not None and not (math.isfinite(value) and value >= minimum):
            dotted = _dotted(section, key)
            raise InputError(
                f"{dotted} = {value}, must be a number >= {minimum:g}; choose another value",
                key=dotted,
            )


def require_positive(section: str, config: Any, *keys: str) -> None:
    """Refuses a number that is not finite and greater than zero; None passes.

    Args:
        section: dotted name of the section, for the message; empty for the run itself.
        config: the section.
        keys: fields to check.

    Raises:
        InputError: a field is not positive.
    """
    for key in keys:
        value = getattr(config, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            dotted = _dotted(section, key)
            raise InputError(f"{dotted} = {value}, must be > 0; choose another value", key=dotted)


def require_share(section: str, config: Any, *keys: str) -> None:
    """Refuses a number outside of [0, 1].

    Args:
        section: dotted name of the section, for the message; empty for the run itself.
        config: the section.
        keys: fields to check.

    Raises:
        InputError: a field is no share.
    """
    for key in keys:
        value = getattr(config, key)
        # 95 for 95 % is the usual slip
        if not 0.0 <= value <= 1.0:
            dotted = _dotted(section, key)
            raise InputError(
                f"{dotted} = {value}, must be between 0 and 1; it is a share, not a percentage",
                key=dotted,
            )


def require_choice(section: str, config: Any, key: str, choices: tuple[Any, ...]) -> None:
    """Refuses a value that is not one of the choices.

    Args:
        section: dotted name of the section, for the message; empty for the run itself.
        config: the section.
        key: field to check.
        choices: allowed values.

    Raises:
        InputError: the value is not among them.
    """
    value = getattr(config, key)
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices)
        dotted = _dotted(section, key)
        raise InputError(
            f"{dotted} = {value}, must be one of {names}; choose one of them", key=dotted
        )


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key
