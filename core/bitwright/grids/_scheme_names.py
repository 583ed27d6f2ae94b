"""Names of calibration schemes as users write them; what each does is `bitwright.calibration`'s."""

from __future__ import annotations

from bitwright.errors import InputError

SCHEMES = ("minmax", "percentile", "sqnr", "mse", "entropy", "scores")
_ALIASES = {"min_max": "minmax", "tf": "minmax", "tf_enhanced": "sqnr", "kl": "entropy"}


def parse_scheme(name: str) -> tuple[str, str | None]:
    """A scheme's own name and its setting, None without one: "percentile:99.9" → ("percentile", "99.9").

    AIMET's names "tf", "tf_enhanced" and "min_max" are understood.

    Raises:
        InputError: unknown name.
    """
    stem, _, setting = name.partition(":")
    key = stem.strip().lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in SCHEMES:
        raise InputError(f"unknown calibration scheme {name!r}; known: {', '.join(SCHEMES)} (percentile:99.9)")
    return key, setting.strip() or None
