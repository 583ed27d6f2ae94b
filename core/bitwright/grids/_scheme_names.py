"""Names of calibration schemes as users write them; what each does is `bitwright.calibration`'s."""

from __future__ import annotations

from bitwright.errors import InputError, unknown_name

SCHEMES = ("minmax", "percentile", "sqnr", "mse", "entropy", "scores")
_ALIASES = {
    "min_max": "minmax",
    "max": "minmax",
    "kl": "entropy",
    "kl_divergence": "entropy",
    # AIMET's, with and without the first words of its `QuantScheme`
    "tf": "minmax",
    "tf_enhanced": "sqnr",
    "post_training_tf": "minmax",
    "post_training_tf_enhanced": "sqnr",
    "post_training_percentile": "percentile",
}
"""Every other name that a scheme goes by."""


def parse_scheme(name: str) -> tuple[str, str | None]:
    """A scheme's own name and its setting, None without one: "percentile:99.9" → ("percentile", "99.9").

    AIMET's names "tf", "tf_enhanced" and "min_max" are understood.

    Raises:
        InputError: unknown name; the message has the nearest one.
    """
    stem, _, setting = name.partition(":")
    key = stem.strip().lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in SCHEMES:
        near = unknown_name(key, (*SCHEMES, *_ALIASES), listed=False)
        raise InputError(f"unknown calibration scheme {name!r}{near}; known: {', '.join(SCHEMES)} (percentile:99.9)")
    return key, setting.strip() or None
