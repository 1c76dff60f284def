"""Lists of many users: those of the library, whatever stopped the call in between."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from sagerec.cli import main
from sagerec.errors import DatasetError, SettingsError
from sagerec.recommend import load
from sagerec.run.folder import Run
from sagerec.serving import lists
from sagerec.serving.lists import list_users
from tests.kills import leftovers


def test_lists_are_those_of_the_library(small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PART_USERS", 3)
    ids: list[str] = small_run.data.item_ids.ids.to_list()
    histories = [[ids[3], ids[1]], [ids[4]], [], ["nope", ids[9]], ["nope"], None, ids[:30]]
    table = pl.DataFrame({"user_id": [str(i) for i in range(7)], "history": histories})
    table.write_parquet(tmp_path / "users.parquet")
    out = tmp_path / "lists.parquet"
    said = list_users(small_run, tmp_path / "users.parquet", out, k=4, device="cpu")
    assert said == {"users": 7, "empty": 3, "unknown": 2}
    found = pl.read_parquet(out)
    assert found["user_id"].to_list() == table["user_id"].to_list()
    assert found["unknown"].to_list() == [0, 0, 0, 1, 1, 0, 0]
    recommender = load(small_run.folder, device="cpu")
    for history, items, scores in zip(histories, found["items"], found["scores"], strict=True):
        known = [item for item in history or [] if item != "nope"]
        expected = recommender.recommend(known, k=4) if known else None
        assert items.to_list() == ([] if expected is None else expected["item_id"].to_list())
        assert scores.to_list() == pytest.approx([] if expected is None else expected["score"].to_list(), abs=1e-4)
    assert leftovers(tmp_path) == []


def test_users_of_the_log_need_no_history(small_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = small_run.data.user_ids.ids[:5]
    pl.DataFrame({"user_id": users}).write_parquet(tmp_path / "users.parquet")
    command = ["recommend", str(small_run.folder), "--users", str(tmp_path / "users.parquet"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "lists.parquet"), "-k", "3"]) == 0
    assert "lists of 5 users, 0 of them empty; 0 unknown item ids" in " ".join(capsys.readouterr().out.split())
    found = pl.read_parquet(tmp_path / "lists.parquet")
    bounds = small_run.data.user_offsets
    history = small_run.data.item_ids.external(small_run.data.event_items[bounds[4] : bounds[5]])
    expected = load(small_run.folder, device="cpu").recommend(history, k=3)
    assert found["items"][4].to_list() == expected["item_id"].to_list()
    pl.DataFrame({"user_id": ["stranger"]}).write_parquet(tmp_path / "users.parquet")
    assert main([*command, "--out", str(tmp_path / "lists.parquet")]) == 1
    assert "user 'stranger' is not in the run's log; give a column history" in " ".join(capsys.readouterr().err.split())


def stop_at(monkeypatch: pytest.MonkeyPatch, part: int) -> list[int]:
    """Let the call end in the part of that number; a list that grows by one a part that was decoded."""
    real = lists._list_block
    done: list[int] = []

    def listed(*given: Any) -> pl.DataFrame:
        if len(done) == part:
            raise KeyboardInterrupt
        done.append(len(done))
        return real(*given)

    monkeypatch.setattr(lists, "_list_block", listed)
    return done


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_stopped_call_goes_on_and_gives_the_same_table(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """What was done is not done again, and half a part, which a kill may leave, is not taken for one."""
    monkeypatch.setattr(lists, "PART_USERS", 2)
    pl.DataFrame({"user_id": small_run.data.user_ids.ids[:6]}).write_parquet(tmp_path / "users.parquet")

    def work(name: str) -> pl.DataFrame:
        list_users(small_run, tmp_path / "users.parquet", tmp_path / name, k=3, device="cpu")
        return pl.read_parquet(tmp_path / name)

    truth = work("whole.parquet")
    with monkeypatch.context() as stopping:
        stop_at(stopping, part)
        with pytest.raises(KeyboardInterrupt):
            work("lists.parquet")
    assert not (tmp_path / "lists.parquet").exists()
    (tmp_path / ".lists.parquet.parts" / ".000000000004.parquet.fresh").write_bytes(b"half")
    done = stop_at(monkeypatch, 99)
    assert work("lists.parquet").equals(truth)
    assert len(done) == 3 - part
    assert leftovers(tmp_path) == []


def test_parts_of_other_settings_are_not_taken(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lists, "PART_USERS", 2)
    pl.DataFrame({"user_id": small_run.data.user_ids.ids[:6]}).write_parquet(tmp_path / "users.parquet")
    arguments: tuple[Any, ...] = (small_run, tmp_path / "users.parquet", tmp_path / "lists.parquet")
    with monkeypatch.context() as stopping:
        stop_at(stopping, 2)
        with pytest.raises(KeyboardInterrupt):
            list_users(*arguments, k=3, device="cpu")
    with caplog.at_level("INFO"):
        list_users(*arguments, k=5, device="cpu")
    assert "beginning anew" in caplog.text
    assert {len(items) for items in pl.read_parquet(tmp_path / "lists.parquet")["items"]} == {5}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"user": ["a"]}, "column 'user_id' is missing; got user"),
        ({"user_id": ["a"], "history": ["x,y"]}, "column 'history' has type String, expected a list of item ids"),
        ({"user_id": [None], "history": [["x"]]}, "column 'user_id' has type Null|empty values|has 1 empty"),
    ],
)
def test_tables_of_another_shape_are_refused(small_run: Run, tmp_path: Path, table: Any, message: str) -> None:
    pl.DataFrame(table).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(DatasetError, match=message):
        list_users(small_run, tmp_path / "users.parquet", tmp_path / "lists.parquet", device="cpu")


def test_flags_that_do_not_go_together_are_refused(small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected a name that ends in"):
        list_users(small_run, tmp_path / "users.parquet", tmp_path / "lists.csv")
    assert main(["recommend", str(small_run.folder), "--users", "x.parquet"]) == 2
    assert main(["recommend", "run", "--users", "x", "--out", "y", "--slate"]) == 2
