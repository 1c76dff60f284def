"""Titles as actions: unique, ended, cut and replaced as stated, whatever the tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.actions.titles import end_token, normalise, plain_titles, write_titles
from sagerec.catalogue.dataset import read_dataset
from sagerec.errors import DatasetError, SettingsError
from tests.language_models import bpe_tokenizer

pytest.importorskip("transformers")
TEXTS = ["red soap", "Red  Soap", "blue soap", "ｒｅｄ soap", "a very long title of many different words"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bpe_tokenizer(TEXTS)


def word_tokenizer(words: list[str], **special: str) -> Any:
    """A tokenizer of whole words that does not know the line end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


def test_titles_that_read_the_same_are_numbered(tokenizer: Any) -> None:
    """Case, full-width letters and blanks do not tell titles apart, so the second and the fourth get a number."""
    tokens, written, counts = write_titles(TEXTS, tokenizer, max_tokens=64, instead=TEXTS)
    assert written == ["red soap", "Red Soap (2)", "blue soap", "ｒｅｄ soap (3)", TEXTS[4]]
    assert counts == {"cut": 0, "numbered": 2, "unwritable": 0}
    assert [tokenizer.decode(own) for own in tokens] == written


def test_a_long_title_is_cut_and_told_apart(tokenizer: Any) -> None:
    tokens, written, counts = write_titles([TEXTS[4], TEXTS[4] + " more"], tokenizer, max_tokens=3, instead=["a", "b"])
    assert counts == {"cut": 2, "numbered": 1, "unwritable": 0}
    assert len(tokens[0]) == 3
    assert written[1] == f"{written[0]} (2)"


def test_a_title_is_never_cut_inside_a_character(tokenizer: Any) -> None:
    """Of bytes, a token each: three of an emoji's four, or of the second sign of two, are left out."""
    for most, expected in ((4, "ab"), (6, "ab🧴"), (7, "ab🧴"), (9, "ab🧴肥")):
        _, written, counts = write_titles(["ab🧴肥皂"], tokenizer, max_tokens=most, instead=["x"])
        assert (written, counts["cut"], counts["unwritable"]) == ([expected], 1, 0)
    assert write_titles(["🧴"], tokenizer, max_tokens=3, instead=["x"])[1:] == (
        ["x"],
        {"cut": 1, "numbered": 0, "unwritable": 1},
    )


def test_text_that_means_something_to_the_model_is_not_written(tokenizer: Any) -> None:
    """A title may hold the words of a special token; its number never stands in one."""
    tokens, written, counts = write_titles(
        ["<|endoftext|>soap", "<|endoftext|>"], tokenizer, max_tokens=9, instead="xy"
    )
    assert tokenizer.eos_token_id not in [t for own in tokens for t in own]
    assert written == ["soap", "y"]
    assert counts["unwritable"] == 1


def test_the_end_is_the_line_end_or_the_end_of_text(tokenizer: Any) -> None:
    assert tokenizer.decode([end_token(tokenizer)]) == "\n"
    words = ["[UNK]", "soap", "<end>"]
    assert end_token(word_tokenizer(words, eos_token="<end>")) == 2
    with pytest.raises(SettingsError, match="neither a token for the line end nor an end of text"):
        end_token(word_tokenizer(words))


def test_a_tokenizer_that_writes_numbers_alike_is_refused() -> None:
    words = word_tokenizer(["[UNK]", "soap", "<end>"], eos_token="<end>")
    with pytest.raises(SettingsError, match="titles cannot be told apart"):
        write_titles(["soap", "soap"], words, max_tokens=8, instead=["soap", "soap"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=12), st.integers(1, 6))
def test_no_two_titles_read_the_same_or_begin_one_another(texts: list[str], most: int) -> None:
    made = bpe_tokenizer(TEXTS)
    tokens, written, _ = write_titles(
        [" ".join(t.split()) for t in texts], made, max_tokens=most, instead=[f"item {i}" for i in range(len(texts))]
    )
    assert len({normalise(text) for text in written}) == len(texts)
    ended = [(*own, end_token(made)) for own in tokens]
    assert len(set(ended)) == len(texts)
    assert all(end_token(made) not in own and own for own in tokens)


def test_an_empty_title_is_replaced_or_refused(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1, 2]}).write_parquet(
        tmp_path / "interactions.parquet"
    )
    items = {"item_id": ["a", "b", "c"], "title": ["", "  two\nlines ", None], "categories": [["x", "y"], [], []]}
    pl.DataFrame(items, schema_overrides={"categories": pl.List(pl.String)}).write_parquet(tmp_path / "items.parquet")
    data = read_dataset(tmp_path)
    assert plain_titles(data) == (["x y", "two lines", "c"], 2)
    with pytest.raises(DatasetError, match="item 'a' has no title"):
        plain_titles(data, refuse_empty=True)


def test_normalise_by_hand() -> None:
    assert normalise("  ＲＥＤ\tSoaP\n(2) ") == "red soap (2)"
    assert np.all([normalise(normalise(t)) == normalise(t) for t in TEXTS])
