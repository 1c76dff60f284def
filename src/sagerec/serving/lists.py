"""Lists for a table of users, without a server: read in blocks, resumed where it was stopped, written in one piece.

Each block of users becomes a part beside the table to come, whole or not there; once all are, they are joined and go.
"""

import logging
from pathlib import Path

import numpy as np
import polars as pl

from sagerec.artifacts import UNREADABLE, hash_file
from sagerec.catalogue.dataset import PROFILE, as_ids, profile_column, require_columns
from sagerec.config import at_least, require
from sagerec.errors import DatasetError
from sagerec.files import digest, locked, read_json, remove, replace_file, write_json
from sagerec.policies.protocol import AnyPolicy
from sagerec.progress import progress_bar
from sagerec.run.folder import Run
from sagerec.serving.rows import Row, list_rows
from sagerec.serving.settings import MAX_K

logger = logging.getLogger(__name__)
USER, HISTORY = "user_id", "history"
PART_USERS, BATCH_USERS = 8192, 128
"""Users of a part, and of what is decoded at a time."""
SCHEMA = {USER: pl.String(), "items": pl.List(pl.String), "scores": pl.List(pl.Float32), "unknown": pl.Int64()}


def list_users(
    run: Run,
    users: Path,
    out: Path,
    *,
    policy: str = "policy",
    k: int = 10,
    keep_history: bool = False,
    device: str = "auto",
) -> dict[str, int]:
    """Write the k most probable next items of each user to `out`: user_id, items and scores, best first, and how many
    ids of the history the catalogue does not have.

    `users` is a Parquet file with user_id and, unless all users are in the run's log, history: a list of item ids, the
    oldest first. Its column profile says who they are to a policy that reads that; where it says nothing, the run's
    dataset does, of users of the log. Who has no known item gets an empty list. A stopped call goes on where it was.
    Returns: users, how many of them got an empty list, and unknown ids.

    Raises: DatasetError for a table of another shape, or a user without a history who is not in the log.
    """
    require((miss := at_least(1, MAX_K).miss(k)) is None, f"k is {k}; expected {miss}")
    require(out.suffix == ".parquet", f"out is {out}; expected a name that ends in .parquet")
    require(out.resolve() != users.resolve(), f"out is {out}, which holds the users; expected another file")
    total, has_history = _look_at(users)
    made_by = {
        "users": hash_file(users),
        "made_from": run.hashes("dataset", run.actions, policy),
        "settings": [k, keep_history, PART_USERS],
    }
    begins = range(0, total, PART_USERS)
    parts = out.with_name(f".{out.name}.parts")
    with locked(out):
        _settle(parts, digest(made_by))
        missing = [begin for begin in begins if not _part(parts, begin).is_file()]
        if len(missing) < len(begins):
            logger.info("%d of %d parts are there; going on", len(begins) - len(missing), len(begins))
        writer = run.policy(policy, device=device)
        writer.freeze()
        with progress_bar("users", total, completed=total - sum(min(PART_USERS, total - at) for at in missing)) as bar:
            for begin in missing:
                block = pl.scan_parquet(users).slice(begin, PART_USERS).collect()
                read = _histories(run, block, users, has_history)
                found = _list_block(run, writer, read, _profiles(run, block, writer, users), k, keep_history)
                with replace_file(_part(parts, begin)) as fresh:
                    found.write_parquet(fresh)
                bar.update(min(begin + PART_USERS, total))
        with replace_file(out) as fresh:
            if total:
                pl.scan_parquet([_part(parts, begin) for begin in begins]).sink_parquet(fresh)
            else:
                pl.DataFrame(schema=SCHEMA).write_parquet(fresh)
            counts = pl.scan_parquet(fresh).select(
                empty=(pl.col("items").list.len() == 0).sum(), unknown=pl.col("unknown").sum()
            )
            said = {name: int(value) for name, value in counts.collect().row(0, named=True).items()}
        remove(parts)
    return {"users": total, **said}


def _look_at(users: Path) -> tuple[int, bool]:
    """Number of users, and whether they bring histories. Raises: DatasetError."""
    if not users.is_file():
        raise DatasetError(f"{users} is missing; expected a Parquet file with user_id, and maybe history")
    try:
        table = pl.scan_parquet(users)
        schema = table.collect_schema()
        require_columns(pl.DataFrame(schema=schema), (USER,), users)
        total = int(table.select(pl.len()).collect().item())
    except UNREADABLE as error:
        raise DatasetError(f"{users} cannot be read as Parquet ({error}); write it again") from error
    has_history = HISTORY in schema
    if has_history and not isinstance(schema[HISTORY], pl.List):
        raise DatasetError(
            f"{users}: column 'history' has type {schema[HISTORY]}, expected a list of item ids, the oldest first"
        )
    return total, has_history


def _settle(parts: Path, made_by: str) -> None:
    """Keep the parts of a stopped call like this one, and no others."""
    stamp = parts / "made_by.json"
    if parts.exists() and not (stamp.is_file() and read_json(stamp) == made_by):
        logger.info("%s is of other users, another run or other settings; beginning anew", parts)
        remove(parts)
    parts.mkdir(parents=True, exist_ok=True)
    write_json(stamp, made_by)


def _part(parts: Path, begin: int) -> Path:
    return parts / f"{begin:012d}.parquet"


def _histories(run: Run, block: pl.DataFrame, users: Path, has_history: bool) -> list[tuple[str, list[str]]]:
    """User ids of a block, and their histories."""
    ids = as_ids(block, USER, users)[USER].to_list()
    if has_history:
        return list(zip(ids, block[HISTORY].fill_null([]).cast(pl.List(pl.String)).to_list(), strict=True))
    unknown = next((user for user in ids if user not in run.data.user_ids), None)
    if unknown is not None:
        raise DatasetError(f"{users}: user {unknown!r} is not in the run's log; give a column history with item ids")
    rows, bounds = run.data.user_ids.index(ids), run.data.user_offsets
    items = [run.data.event_items[bounds[row] : bounds[row + 1]] for row in rows]
    return [(user, run.data.item_ids.external(taken)) for user, taken in zip(ids, items, strict=True)]


def _profiles(run: Run, block: pl.DataFrame, policy: AnyPolicy, users: Path) -> list[str]:
    """Who the users of a block are: as it says, else as the run's dataset does; "" where the policy reads none.

    Raises: DatasetError for profiles that are no text.
    """
    if not policy.reads_profiles:
        return [""] * len(block)
    found = pl.Series(PROFILE, [None] * len(block), dtype=pl.String)
    if PROFILE in block.columns:
        found = profile_column(block, users)
    if run.data.profiles is not None:
        known = pl.DataFrame([run.data.user_ids.ids.alias(USER), run.data.profiles.alias(PROFILE)])
        asked = as_ids(block, USER, users).select(USER)
        found = found.fill_null(asked.join(known, on=USER, how="left", maintain_order="left")[PROFILE])
    return found.fill_null("").to_list()


def _list_block(
    run: Run,
    policy: AnyPolicy,
    users: list[tuple[str, list[str]]],
    profiles: list[str],
    k: int,
    keep_history: bool,
) -> pl.DataFrame:
    """The part of some users, in their order; histories of like length are decoded together."""
    known, unknown = [], []
    for _, history in users:
        known.append(run.data.item_ids.index(item for item in history if item in run.data.item_ids))
        unknown.append(len(history) - len(known[-1]))
    items: list[list[str]] = [[] for _ in users]
    scores: list[list[float]] = [[] for _ in users]
    order = sorted((at for at in range(len(users)) if len(known[at])), key=lambda at: len(known[at]))
    nothing = np.zeros(0, dtype=np.int64)
    for begin in range(0, len(order), BATCH_USERS):
        batch = order[begin : begin + BATCH_USERS]
        rows = [Row(known[at], nothing if keep_history else np.unique(known[at]), profile=profiles[at]) for at in batch]
        for at, found_row in zip(batch, list_rows(policy, rows, k), strict=True):
            items[at], scores[at] = run.data.item_ids.external(found_row.items), found_row.scores
    return pl.DataFrame([[user for user, _ in users], items, scores, unknown], schema=SCHEMA)
