"""Text as data: rows of tokens, or a reason why not."""

import sys

import numpy as np
import pytest

from bitwright.data import TextOptions, open_data
from bitwright.errors import InputError, MissingExtraError

SPECS = {"input_ids": ((None, None), "int64")}
MASKED = {**SPECS, "attention_mask": ((None, None), "int64"), "token_type_ids": ((None, None), "int64")}


@pytest.fixture
def tokenizer(tmp_path):
    """One token a word, and a beginning that its post-processor would add."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["<s>", "one", "two", "three", "four", "five", "six", "seven"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    file = tmp_path / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two three\nfour five six seven")
    return file


def test_rows_of_tokens(tokenizer, text):
    data = open_data(text, MASKED, batch_size=2, text=TextOptions(tokenizer, 3))
    (batch,) = data
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]  # no beginning, and "seven" fills no row
    assert batch["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert batch["token_type_ids"].tolist() == [[0, 0, 0]] * 2
    assert batch["input_ids"].dtype == np.int64


def test_the_models_own_length_counts(tokenizer, text):
    (batch,) = open_data(text, {"x": ((None, 7), "int32")}, text=TextOptions(tokenizer, 3))
    assert batch["x"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["x"].dtype == np.int32


def test_too_little_text(tokenizer, text):
    with pytest.raises(InputError, match=r"7 tokens, which don't fill one row of 8"):
        open_data(text, SPECS, text=TextOptions(tokenizer, 8))


def test_no_tokenizer_is_known(text):
    with pytest.raises(InputError, match=r"no tokenizer is known: give its tokenizer.json"):
        open_data(text, SPECS)


def test_models_that_take_no_tokens(tokenizer, text):
    for specs in ({"x": ((None, 3, 8, 8), "float32")}, {**SPECS, "past": ((None, None), "int64")}):
        with pytest.raises(InputError, match="text is for models with one input of tokens"):
            open_data(text, specs, text=TextOptions(tokenizer))


def test_without_the_package(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"bitwright\[text\]"):
        open_data(text, SPECS, text=TextOptions(tmp_path / "tokenizer.json"))


def test_the_tokenizer_of_a_models_folder(tmp_path):
    assert TextOptions.beside(tmp_path).tokenizer is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert TextOptions.beside(tmp_path).tokenizer == tmp_path / "tokenizer.json"
    assert TextOptions.beside(tmp_path / "model.onnx").tokenizer is None
