"""Text as model input: cut into sequences of tokens by a tokenizer file; needs tokenizers (extra `text`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright.data._batches import InputSpecs
from bitwright.errors import InputError, MissingExtraError

SUFFIXES = frozenset({".md", ".text", ".txt"})
TOKENIZER = "tokenizer.json"
"""What the file is called beside a model."""
_MASKS: Mapping[str, int] = {"attention_mask": 1, "token_type_ids": 0}
"""Inputs beside the tokens, and what they hold where no position is padding and all is one text."""


@dataclass(frozen=True)
class TextOptions:
    """How a text file becomes model input: one stream of tokens, cut into rows; a last one that isn't full is left out.

    Attributes:
        tokenizer: a tokenizer.json of Hugging Face's tokenizers; None where only a model's own folder is looked into.
        length: tokens a row, where the model leaves it free.
    """

    tokenizer: Path | None = None
    length: int = 256

    @classmethod
    def beside(cls, model: Path | None) -> TextOptions:
        """With the tokenizer of a model's folder, if the model is one that has it."""
        file = None if model is None else model / TOKENIZER
        return cls(file if file is not None and file.is_file() else None)


def text_rows(path: Path, specs: InputSpecs, options: TextOptions) -> dict[str, NDArray[np.int64]]:
    """A text file as arrays by input name, (rows, length).

    Tokens of the tokenizer's own (a beginning, an end) aren't put in.

    Raises:
        InputError: there is no tokenizer, it or the text can't be read, the model takes no tokens, or the text is
            shorter than a row.
        MissingExtraError: tokenizers isn't installed.
    """
    tokens = _tokens_input(specs, path)
    if options.tokenizer is None:
        raise InputError(
            f"{path} is text, and no tokenizer is known: give its tokenizer.json (--tokenizer, "
            "TextOptions(tokenizer=…)), or the tokens as a .npy file"
        )
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{path} is text: pip install "bitwright[text]"') from error
    if not options.tokenizer.is_file():
        raise InputError(f"there is no tokenizer file {str(options.tokenizer)!r}")
    try:
        tokenizer = Tokenizer.from_file(str(options.tokenizer))
    except Exception as error:  # the library raises bare exceptions
        raise InputError(f"{options.tokenizer} can't be read as a tokenizer: {error}") from error
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as text: {error}") from error
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    shape = specs[tokens][0]
    length = shape[1] if shape[1] is not None else options.length
    if length < 1:
        raise InputError(f"length={length}: a row holds at least one token")
    rows = len(ids) // length
    if rows == 0:
        raise InputError(f"{path} holds {len(ids)} tokens, which don't fill one row of {length}; give more text")
    cut = ids[: rows * length].reshape(rows, length)
    return {n: cut if n == tokens else np.full(cut.shape, _MASKS[n], np.int64) for n in specs}


def _tokens_input(specs: InputSpecs, path: Path) -> str:
    """The input that takes tokens: the one that isn't a mask.

    Raises:
        InputError: there is none, or there are several.
    """
    found = [n for n in specs if n not in _MASKS]
    shape, dtype = specs[found[0]] if len(found) == 1 else ((), "")
    if len(found) != 1 or len(shape) != 2 or not dtype.startswith(("int", "uint")):
        raise InputError(
            f"{path} is text, and the model takes {', '.join(specs)}: text is for models with one input of tokens, "
            "(batch, sequence), integers, and at most attention_mask and token_type_ids beside it"
        )
    return found[0]
