"""Small RecIF-Bench folders written by hand, for the tests of `sagerec.recif`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.recif.items import make_key

A, B, C, D = (f"<s_a_{n}><s_b_{n}><s_c_{n}>" for n in (1, 2, 3, 4))
"""The bodies of four items."""


def tag(*bodies: str) -> str:
    """Items between their tags."""
    return "".join(f"<|sid_begin|>{body}<|sid_end|>" for body in bodies)


def row(answer: Any, prompt: str = "用户浏览了以下内容", **metadata: Any) -> dict[str, Any]:
    """A row of a task file as it is published."""
    messages = [
        {"role": "system", "content": "助手"},
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
    ]
    return {
        "messages": json.dumps(messages, ensure_ascii=False),
        "metadata": json.dumps({"answer": answer} | metadata, ensure_ascii=False),
    }


def write_task(folder: Path, task: str, rows: Sequence[Mapping[str, Any]], **schema: Any) -> Path:
    """Write a task file."""
    path = folder / task / f"{task}_test.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame([dict(r) for r in rows], schema_overrides=schema or None).write_parquet(path)
    return path


def write_map(folder: Path, entries: Mapping[int, Sequence[tuple[int, int]]], *, key: str = "pid") -> None:
    """Write a map: n stands for the item of the body <s_a_n><s_b_n><s_c_n>, with (id, count after down-sampling)."""
    values = {
        str(make_key(n, n, n)): [{key: i, "count": 2 * c, "count_after_downsample": c} for i, c in found]
        for n, found in entries.items()
    }
    (folder / f"sid2{key}.json").write_text(json.dumps(values), encoding="utf-8")


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write predictions."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path
