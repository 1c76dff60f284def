"""Semantic IDs that somebody else made: MiniOneRec's column `semantic_id` and its file index.json.

An ID is a run of tokens `<a_236><b_231><c_226>`: a letter for the level, a number for the code. Items may share one.

Shapes: N items, L codes per item.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sagerec.catalogue.dataset import ITEM_ID, Dataset
from sagerec.errors import DatasetError
from sagerec.files import read_json

SEMANTIC_ID = "semantic_id"
LARGEST_CODE = 32767
_TOKEN = re.compile(r"<([a-z])_([0-9]{1,5})>")


def read_existing(data: Dataset, index: Path | None) -> np.ndarray:
    """Codes (N, L) int32 of the items: from the file `index` ({item_id: [token, …]}) or, on None, from the column.

    Raises: DatasetError where an item has no ID, one that cannot be read, or one of another length than the first's;
    ArtifactError where the file is missing or is not JSON.
    """
    if index is None:
        if SEMANTIC_ID not in data.items.columns:
            raise DatasetError(
                f"the items have no column {SEMANTIC_ID!r}, which the quantiser 'existing' reads; "
                "add it (such as <a_236><b_231><c_226>) or give an index.json with --ids.existing"
            )
        column = data.items[SEMANTIC_ID]
        if column.dtype not in (pl.String, pl.Null):
            raise DatasetError(f"column {SEMANTIC_ID!r} has type {column.dtype}, expected text. Cast it")
        texts: list[Any] = column.to_list()
        source = f"column {SEMANTIC_ID!r}"
    else:
        texts, source = _from_index(data, index), str(index)
    codes: list[list[int]] = []
    for item, text in zip(data.items[ITEM_ID], texts, strict=True):
        codes.append(parse_id(text, f"{source}: item {item!r}"))
        if len(codes[-1]) != len(codes[0]):
            raise DatasetError(
                f"{source}: item {item!r} has {len(codes[-1])} codes, the first item {len(codes[0])}; expected as many "
                "for each. Drop the codes that only separate items of equal IDs: sagerec adds its own (--ids.unique)"
            )
    return np.array(codes, dtype=np.int32)


def parse_id(text: Any, where: str) -> list[int]:
    """The codes of one ID. Raises: DatasetError, beginning with `where`."""
    if not isinstance(text, str) or not text:
        raise DatasetError(f"{where} has no Semantic ID; give it one, such as <a_236><b_231><c_226>")
    tokens = _TOKEN.findall(text)
    letters = "".join(letter for letter, _ in tokens)
    if "".join(f"<{letter}_{code}>" for letter, code in tokens) != text or letters != "abcdefgh"[: len(tokens)]:
        raise DatasetError(
            f"{where} has the Semantic ID {text!r}; expected tokens <a_…><b_…>… with a number each, at most 8"
        )
    codes = [int(code) for _, code in tokens]
    if max(codes) > LARGEST_CODE:
        raise DatasetError(f"{where} has the code {max(codes)}; expected at most {LARGEST_CODE}. Number the codes anew")
    return codes


def _from_index(data: Dataset, index: Path) -> list[str]:
    """The ID of each item of the catalogue as one text; the file may hold further items."""
    values = read_json(index)
    if not isinstance(values, dict) or not values:
        raise DatasetError(f"{index} holds no JSON object with items; expected {{item_id: ['<a_236>', …]}}")
    texts = []
    for item in data.items[ITEM_ID]:
        if item not in values:
            raise DatasetError(
                f"{index} has no item {item!r}, which the catalogue has; got {len(values):,} such as "
                f"{next(iter(values))!r}. Name the items there by their item_id"
            )
        tokens = values[item]
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise DatasetError(f"{index}: item {item!r} holds {tokens!r}; expected a list of tokens such as '<a_236>'")
        texts.append("".join(tokens))
    return texts
